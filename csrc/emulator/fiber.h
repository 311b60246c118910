// Stacks that can be left and re-entered: the one machine-dependent piece of the emulator.
// x86-64 switches with seven pushes. Elsewhere (or with -DFA_EMULATOR_UCONTEXT) swapcontext does it, with a system call each time; it is
// not used under AddressSanitizer on x86-64 because ASan's swapcontext wipes the shadow of live frames.
#pragma once
#include <sys/mman.h>
#include <unistd.h>
#include <cstddef>
#include <cstdint>
#include <new>
#if !defined(__x86_64__) && !defined(FA_EMULATOR_UCONTEXT)
#define FA_EMULATOR_UCONTEXT
#endif
#if defined(FA_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fa::emulator {

#if !defined(FA_EMULATOR_UCONTEXT)
extern "C" void fa_emulator_switch(void** save_to, void* go_to);
asm(R"(
  .pushsection .text
  .local fa_emulator_switch
  .type fa_emulator_switch, @function
fa_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fa_emulator_switch, . - fa_emulator_switch
  .popsection
)");
#endif

// A place where execution stands still. The host thread's own stack is a Fiber too, one without a `base`.
class Fiber {
 public:
  Fiber() = default;
  explicit Fiber(void (*entry)()) {
    // The lowest page stays inaccessible, so that a kernel with too large a frame faults instead of eating its neighbour's stack.
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    base_ = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base_ == MAP_FAILED || mprotect(base_, page, PROT_NONE) != 0) throw std::bad_alloc();
    bottom_ = static_cast<char*>(base_) + page;
    size_ = kStack - page;
#if defined(FA_EMULATOR_UCONTEXT)
    getcontext(&context_);
    context_.uc_stack.ss_sp = base_;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    static size_t count = 0;  // tops at equal offsets of their stacks would share a few cache sets: 10 % slower at 512 threads
    void** top = reinterpret_cast<void**>(static_cast<char*>(base_) + kStack - count++ % 256 * 192);
    *--top = nullptr;  // keeps the ABI's alignment at entry, and ends backtraces
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer_ = top - 6;  // six zeroed registers for the first switch to pop
#endif
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (base_) munmap(base_, kStack);
  }

  static void switch_to(Fiber& from, Fiber& to) {
    leaving_ = &from;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
#if defined(FA_EMULATOR_UCONTEXT)
    swapcontext(&from.context_, &to.context_);
#else
    fa_emulator_switch(&from.stack_pointer_, to.stack_pointer_);
#endif
    arrived(from);
  }

  // To be called first by `entry`: the first arrival does not come out of switch_to.
  static void arrived([[maybe_unused]] Fiber& self) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self.fake_stack_, &leaving_->bottom_, &leaving_->size_);  // also learns the bounds of the host's stack
#endif
  }

 private:
  static constexpr size_t kStack = 256 << 10;  // reserved, committed on touch; ASan's -O0 frames are large
  inline static Fiber* leaving_ = nullptr;
  void* base_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#if defined(FA_EMULATOR_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  [[maybe_unused]] void* fake_stack_ = nullptr;
};

}  // namespace fa::emulator

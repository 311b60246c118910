// The scheduler behind cuda_on_cpu.h: picks which thread of the block runs next, pairs barriers and warp operations, explains a block
// that is stuck.
#include <algorithm>
#include <deque>
#include <exception>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>
#include "../core/launch.h"
#include "fiber.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace fa::emulator {

uint3 thread_idx{}, block_idx{};
dim3 block_dim, grid_dim;

namespace {

constexpr size_t kSharedLimit = 48 << 10;  // what a block gets without asking the driver for more
constexpr uint32_t kPoison = 0xFFC0DEAD;  // as a float a quiet NaN, as an index far out of bounds

struct Thread {
  enum State { kReady, kRunning, kWaiting, kExited } state;
  Fiber* fiber;  // null until the thread first runs
  Wait kind;
  Site site;
  uint32_t mask;
  unsigned source_lane;
  uint64_t value, result;
};

struct Cancelled {};  // unwinds the waiting threads of a block that failed

std::string text(Site s) { return std::string(s.file) + ":" + std::to_string(s.line); }

const char* name(Wait kind) {
  switch (kind) {
    case Wait::kSyncthreads: return "syncthreads";
    case Wait::kSyncthreadsCount: return "syncthreads_or/count";
    case Wait::kSyncwarp: return "syncwarp";
    case Wait::kShuffle: return "shfl";
    case Wait::kBallot: return "ballot/any/all";
  }
  return "?";
}

bool is_block_wide(Wait kind) { return kind == Wait::kSyncthreads || kind == Wait::kSyncthreadsCount; }
bool same_place(const Thread& a, const Thread& b) {
  return a.kind == b.kind && a.site.line == b.site.line && !std::strcmp(a.site.file, b.site.file);
}

class SharedMemory {
 public:
  SharedMemory() : memory_(new (std::align_val_t(128)) unsigned char[kBytes]) { ASAN_POISON_MEMORY_REGION(memory_, kBytes); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() {
    ASAN_UNPOISON_MEMORY_REGION(memory_, kBytes);
    ::operator delete[](memory_, std::align_val_t(128));
  }

  void start_block(size_t dynamic_bytes) {
    ASAN_POISON_MEMORY_REGION(memory_, end_);
    variables_.clear();
    end_ = used_ = 0;
    dynamic_ = take(dynamic_bytes, 16);
  }

  void* dynamic() const { return dynamic_; }

  void* variable(const void* key, size_t bytes, size_t alignment, const char* variable_name) {
    for (const auto& [k, address] : variables_)
      if (k == key) return address;
    if (used_ + bytes > kSharedLimit)
      throw Error("emulator: a block may use 49152 bytes of shared memory; variable '" + std::string(variable_name) + "' brings it to " +
                  std::to_string(used_ + bytes) + "; use smaller tiles");
    void* p = take(bytes, alignment);
    variables_.emplace_back(key, p);
    return p;
  }

 private:
  static constexpr size_t kBytes = 2 * kSharedLimit, kGap = 32;  // gaps stay poisoned: running off one variable into the next is reported

  void* take(size_t bytes, size_t alignment) {
    alignment = std::max<size_t>(alignment, 16);
    const size_t begin = (end_ + kGap + alignment - 1) / alignment * alignment;
    if (begin + bytes > kBytes)
      throw Error("emulator: a kernel may have few shared variables; gaps filled the arena; merge them in a struct");
    end_ = begin + bytes;
    used_ += bytes;
    ASAN_UNPOISON_MEMORY_REGION(memory_ + begin, bytes);
    for (size_t i = 0; i < bytes; ++i) memory_[begin + i] = static_cast<unsigned char>(kPoison >> (i % 4 * 8));
    return memory_ + begin;
  }

  unsigned char* memory_;
  std::vector<std::pair<const void*, void*>> variables_;
  size_t end_ = 0, used_ = 0;
  void* dynamic_ = nullptr;
};

class Device {
 public:
  void launch(const Launch& l);
  void seed(uint64_t s) { random_ = s * 0x9E3779B97F4A7C15u + 0x632BE59BD9B4E019u; }
  uint64_t wait(Wait kind, Site site, uint32_t mask, uint64_t value, unsigned source_lane);
  void work();
  std::string where() const;

  std::mutex mutex;
  SharedMemory shared;
  unsigned index(const Thread* t) const { return unsigned(t - threads_.data()); }
  const Thread* current() const { return current_; }

 private:
  void run_block();
  void switch_away(Fiber& from, Thread* to);
  void activate(Thread* t);
  Thread* pick();
  void settle();
  void complete_warp_operation(const Thread& t);
  std::string why_stuck() const;
  std::string describe(const Thread& t) const;
  void fail(std::exception_ptr e);
  uint32_t below(uint64_t n);

  std::vector<Thread> threads_;
  std::vector<uint32_t> ready_;
  std::deque<Fiber> fibers_;
  std::vector<Fiber*> idle_;
  Fiber host_;
  Launch launch_{};
  Thread* current_ = nullptr;
  std::exception_ptr error_;
  unsigned live_ = 0;
  uint64_t random_ = 0x632BE59BD9B4E019u;
};

Device& device() {
  static Device d;
  return d;
}

uint32_t Device::below(uint64_t n) {  // splitmix64; n < 2^32
  uint64_t z = random_ += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  return uint32_t(((z ^ (z >> 27)) >> 32) * n >> 32);
}

cudaError_t invalid_configuration(const Launch& l) {
  const dim3 g = l.grid, b = l.block;
  const uint64_t threads = uint64_t(b.x) * b.y * b.z;
  if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
  if (!threads || threads > 1024 || b.x > 1024 || b.y > 1024 || b.z > 64) return cudaErrorInvalidConfiguration;
  return l.shared_bytes > kSharedLimit ? cudaErrorInvalidValue : cudaSuccess;
}

void Device::launch(const Launch& l) {
  if (report(invalid_configuration(l)) != cudaSuccess) return;  // as CUDA: nothing runs, and only cudaGetLastError tells
  launch_ = l;
  block_dim = l.block;
  grid_dim = l.grid;
  const uint64_t blocks = uint64_t(l.grid.x) * l.grid.y * l.grid.z;
  uint64_t stride = 1 + below(std::min<uint64_t>(blocks, 0xffffffff)), b = below(std::min<uint64_t>(blocks, 0xffffffff));
  while (std::gcd(stride, blocks) != 1) ++stride;  // then b + i * stride visits every block once
  for (uint64_t i = 0; i < blocks; ++i, b = (b + stride) % blocks) {
    block_idx = {unsigned(b % l.grid.x), unsigned(b / l.grid.x % l.grid.y), unsigned(b / l.grid.x / l.grid.y)};
    run_block();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

void Device::run_block() {
  live_ = launch_.block.x * launch_.block.y * launch_.block.z;
  threads_.assign(live_, Thread{});
  ready_.resize(live_);
  std::iota(ready_.begin(), ready_.end(), 0u);
  shared.start_block(launch_.shared_bytes);
  switch_away(host_, pick());
}

void Device::activate(Thread* t) {
  current_ = t;
  t->state = Thread::kRunning;
  const unsigned i = index(t), x = launch_.block.x, y = launch_.block.y;
  thread_idx = i < x ? uint3{i, 0, 0} : uint3{i % x, i / x % y, i / x / y};
}

// Leaves `from` for the stack of `to`, or for the host when the block is over.
void Device::switch_away(Fiber& from, Thread* to) {
  if (!to) return Fiber::switch_to(from, host_);
  if (!to->fiber) {
    if (idle_.empty()) idle_.push_back(&fibers_.emplace_back([] { device().work(); }));
    to->fiber = idle_.back();
    idle_.pop_back();
  }
  activate(to);
  Fiber::switch_to(from, *to->fiber);
}

// A fiber runs fresh threads as plain calls, one after the other; a thread that waits keeps the fiber, and another fiber takes over.
void Device::work() {
  Fiber* const me = current_->fiber;
  Fiber::arrived(*me);
  for (;;) {
    try {
      launch_.thread(launch_.arguments);
    } catch (const Cancelled&) {
    } catch (const std::exception&) {
      fail(std::current_exception());
    }
    current_->state = Thread::kExited;
    --live_;
    Thread* next = pick();
    if (next && !next->fiber) {
      next->fiber = me;
      activate(next);
    } else {
      idle_.push_back(me);
      switch_away(*me, next);
    }
  }
}

Thread* Device::pick() {
  if (ready_.empty() && live_) settle();
  if (ready_.empty()) return nullptr;
  std::swap(ready_[below(ready_.size())], ready_.back());
  Thread* t = &threads_[ready_.back()];
  ready_.pop_back();
  return t;
}

uint64_t Device::wait(Wait kind, Site site, uint32_t mask, uint64_t value, unsigned source_lane) {
  Thread& t = *current_;
  if (error_) throw Cancelled{};  // another thread of the block failed, and a destructor or handler of this one waits again
  t.state = Thread::kWaiting;
  t.kind = kind;
  t.site = site;
  t.mask = mask;
  t.value = value;
  t.source_lane = source_lane;
  if (!is_block_wide(kind)) complete_warp_operation(t);
  Thread* next = pick();
  if (next == &t)
    activate(next);
  else
    switch_away(*t.fiber, next);
  if (error_) throw Cancelled{};
  return t.result;
}

// Does nothing until the last lane of the mask has come to the same place; then all of them get their results, read from what every lane
// brought.
void Device::complete_warp_operation(const Thread& t) {
  const unsigned me = index(&t), base = me / kWarp * kWarp;
  if (!(t.mask >> (me - base) & 1)) return;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(t.mask >> lane & 1)) continue;
    if (base + lane >= threads_.size()) return;
    const Thread& other = threads_[base + lane];
    if (other.state != Thread::kWaiting || !same_place(other, t) || other.mask != t.mask || !(t.mask >> other.source_lane & 1)) return;
  }
  uint64_t votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane)
    if (t.mask >> lane & 1) votes |= (threads_[base + lane].value & 1) << lane;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(t.mask >> lane & 1)) continue;
    Thread& other = threads_[base + lane];
    other.result = t.kind == Wait::kShuffle ? threads_[base + other.source_lane].value : votes;
    other.state = Thread::kReady;
    ready_.push_back(base + lane);
  }
}

// Nobody can run: either the whole block stands at one barrier, which opens, or the kernel is wrong.
void Device::settle() {
  const Thread& first = threads_[0];
  uint64_t count = 0;
  bool together = live_ == threads_.size() && is_block_wide(first.kind);
  for (size_t i = 0; together && i < threads_.size(); ++i) {
    together = same_place(threads_[i], first);
    count += threads_[i].value;
  }
  if (!together) return fail(std::make_exception_ptr(Error("emulator: " + why_stuck() + where())));
  for (Thread& t : threads_) {
    t.result = count;
    t.state = Thread::kReady;
    ready_.push_back(index(&t));
  }
}

// Keeps the first error and lets every thread that waits unwind its stack; threads that never ran never will.
void Device::fail(std::exception_ptr e) {
  if (!error_) error_ = std::move(e);
  ready_.clear();
  for (Thread& t : threads_) {
    if (t.state == Thread::kExited || t.state == Thread::kRunning) continue;
    t.state = t.fiber ? Thread::kReady : Thread::kExited;
    if (t.fiber)
      ready_.push_back(index(&t));
    else
      --live_;
  }
}

std::string Device::describe(const Thread& t) const {
  const std::string who = "thread " + std::to_string(index(&t));
  return t.state == Thread::kExited ? who + " has exited" : who + " waits at " + name(t.kind) + " (" + text(t.site) + ")";
}

std::string Device::where() const {
  const uint3 b = block_idx;
  return " [block (" + std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z) + ") of " + launch_.kernel +
         ", launched at " + text(launch_.site) + "]";
}

std::string Device::why_stuck() const {
  for (const Thread& t : threads_) {
    if (t.state != Thread::kWaiting || is_block_wide(t.kind)) continue;
    const unsigned me = index(&t), base = me / kWarp * kWarp;
    if (!(t.mask >> (me - base) & 1)) return "a lane must be in its own mask; " + describe(t) + " and is not; fix the mask";
    if (!(t.mask >> t.source_lane & 1))
      return "a shuffle must read a lane of its mask; " + describe(t) + " and reads lane " + std::to_string(t.source_lane) +
             "; widen the mask";
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(t.mask >> lane & 1)) continue;
      const std::string must = "every lane of the mask must reach one " + std::string(name(t.kind)) + "; " + describe(t) + " but ";
      if (base + lane >= threads_.size())
        return must + "lane " + std::to_string(lane) + " does not exist; make the block a multiple of 32 threads";
      const Thread& other = threads_[base + lane];
      if (other.state == Thread::kExited) return must + describe(other) + "; keep lanes alive until the last warp operation";
      if (!same_place(other, t)) return must + describe(other) + "; move it out of the branch or give each branch its own mask";
      if (other.mask != t.mask) return must + describe(other) + " with another mask; use one mask";
    }
  }
  const auto waiting = std::find_if(threads_.begin(), threads_.end(), [](const Thread& t) { return t.state == Thread::kWaiting; });
  const auto odd = std::find_if(threads_.begin(), threads_.end(),
                                [&](const Thread& t) { return t.state == Thread::kExited || !same_place(t, *waiting); });
  return "every thread of a block must reach one barrier; " + describe(*waiting) + " but " + describe(*odd) +
         "; move the barrier out of the branch and exit only after the last one";
}

}  // namespace

void run(const Launch& launch) {
  const std::lock_guard<std::mutex> one_at_a_time(device().mutex);
  device().launch(launch);
}

void set_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> one_at_a_time(device().mutex);
  device().seed(seed);
}

uint64_t wait(Wait kind, Site site, uint32_t mask, uint64_t value, unsigned source_lane) {
  return device().wait(kind, site, mask, value, source_lane);
}
void* shared_variable(const void* key, size_t bytes, size_t alignment, const char* name) {
  return device().shared.variable(key, bytes, alignment, name);
}
void* dynamic_shared_memory() { return device().shared.dynamic(); }
unsigned current_lane() { return device().index(device().current()) % kWarp; }

void misaligned(const char* what, const void* address, size_t bytes, Site site) {
  throw Error("emulator: " + std::string(what) + " needs an address that is a multiple of " + std::to_string(bytes) + "; thread " +
              std::to_string(device().index(device().current())) + " at " + text(site) + " uses one that is " +
              std::to_string(reinterpret_cast<uintptr_t>(address) % bytes) + " past; take the element-by-element path" + device().where());
}

}  // namespace fa::emulator

// A strict CPU stand-in for the CUDA launch model: runs the real .cu kernels in tests and throws fa::emulator::Error on what would break
// a GPU.
//
// Each CUDA thread runs until it must wait for others; then it keeps its stack (a fiber) and another thread of the block goes on. So a
// kernel without barriers is a plain loop of calls (12 ns a thread; a wait costs ~75 ns). Threads and blocks run in a random order drawn
// from the seed: code that leans on an order fails.
// Caught: a barrier that not every thread of the block reaches on one line; a shuffle
// or vote whose mask names lanes that exited, do not exist or wait elsewhere; reads of shared memory never written (poisoned as NaN
// 0xFFC0DEAD in each block); missing barriers, through the random order; misaligned vector accesses; more shared memory than a block
// gets; under AddressSanitizer every access out of bounds, shared memory included.
// Not modelled: blocks running at once (a block that
// spins on another hangs), memory ordering, sub-warp `width`, warp-synchronous code without a mask.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include "runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define FA_DEVICE inline
#define FA_UNROLL

namespace fa::emulator {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Where in the kernel a thread waits. Used as a default argument, `here()` names the caller's line.
struct Site {
  const char* file;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

enum class Wait { kSyncthreads, kSyncthreadsCount, kSyncwarp, kShuffle, kBallot };

// The running thread's coordinates. Plain globals, because launches are serialised and a thread_local costs a call per access in a shared
// library.
extern uint3 thread_idx, block_idx;
extern dim3 block_dim, grid_dim;

struct Launch {
  const char* kernel;  // source text of FA_LAUNCH's arguments, for messages
  Site site;
  dim3 grid, block;
  size_t shared_bytes;
  void (*thread)(void*);  // runs the kernel body for the current thread
  void* arguments;
};

void run(const Launch& launch);
void set_seed(uint64_t seed);  // the order of threads and blocks is a function of it and of the launches since

// Parks the current thread until everyone it must meet has come; returns what the meeting computed for it (see emulator.cpp).
uint64_t wait(Wait kind, Site site, uint32_t mask, uint64_t value, unsigned source_lane);
void* shared_variable(const void* key, size_t bytes, size_t alignment, const char* name);
void* dynamic_shared_memory();
unsigned current_lane();
[[noreturn]] void misaligned(const char* what, const void* address, size_t bytes, Site site);

template <class T> T& shared(const void* key, const char* name) {
  using Element = std::remove_all_extents_t<T>;
  static_assert(std::is_trivially_default_constructible_v<Element>, "CUDA never runs constructors of shared variables");
  return *static_cast<T*>(shared_variable(key, sizeof(T), alignof(T), name));
}

template <class... Params, class... Args>
void launch(const char* text, Site site, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Args... args) {
  auto body = [=] { kernel(static_cast<Params>(args)...); };  // by value, as CUDA copies arguments at the launch
  run({text, site, grid, block, shared_bytes, [](void* b) { (*static_cast<decltype(body)*>(b))(); }, &body});
}

template <class T> T exchange(T v, unsigned source_lane, unsigned mask, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "warp shuffles move 4 or 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &v, sizeof v);
  word = wait(Wait::kShuffle, site, mask, word, source_lane);
  std::memcpy(&v, &word, sizeof v);
  return v;
}

}  // namespace fa::emulator

inline constexpr const uint3& threadIdx = fa::emulator::thread_idx;
inline constexpr const uint3& blockIdx = fa::emulator::block_idx;
inline constexpr const dim3& blockDim = fa::emulator::block_dim;
inline constexpr const dim3& gridDim = fa::emulator::grid_dim;

#define FA_LAUNCH(...) ::fa::emulator::launch(#__VA_ARGS__, ::fa::emulator::here(), __VA_ARGS__)
// The address of a static is the key, so that every instantiation of a template kernel gets its own variable.
#define FA_SHARED(type, name, ...) \
  static char fa_key_of_##name;    \
  auto& name = ::fa::emulator::shared<type __VA_ARGS__>(&fa_key_of_##name, #name)

namespace fa {

using emulator::here;
using emulator::Site;

template <class T> T* dynamic_shared() { return static_cast<T*>(emulator::dynamic_shared_memory()); }

template <class V> V vec_load(const void* p, Site s = here()) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(V)) emulator::misaligned("vec_load", p, alignof(V), s);
  return *static_cast<const V*>(p);
}
template <class V> void vec_store(void* p, const V& v, Site s = here()) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(V)) emulator::misaligned("vec_store", p, alignof(V), s);
  *static_cast<V*>(p) = v;
}

inline void syncthreads(Site s = here()) { emulator::wait(emulator::Wait::kSyncthreads, s, 0, 0, 0); }
inline int syncthreads_count(bool pred, Site s = here()) { return int(emulator::wait(emulator::Wait::kSyncthreadsCount, s, 0, pred, 0)); }
inline bool syncthreads_or(bool pred, Site s = here()) { return emulator::wait(emulator::Wait::kSyncthreadsCount, s, 0, pred, 0) != 0; }
inline void syncwarp(unsigned mask = kAllLanes, Site s = here()) {
  emulator::wait(emulator::Wait::kSyncwarp, s, mask, 0, emulator::current_lane());
}
inline void threadfence() {}

template <class T> T shfl(T v, unsigned lane, unsigned mask = kAllLanes, Site s = here()) {
  return emulator::exchange(v, lane % kWarp, mask, s);
}
template <class T> T shfl_xor(T v, unsigned bits, unsigned mask = kAllLanes, Site s = here()) {
  const unsigned me = emulator::current_lane(), other = me ^ bits;
  return emulator::exchange(v, other < kWarp ? other : me, mask, s);
}
template <class T> T shfl_down(T v, unsigned by, unsigned mask = kAllLanes, Site s = here()) {
  const unsigned me = emulator::current_lane();
  return emulator::exchange(v, by < kWarp - me ? me + by : me, mask, s);
}
template <class T> T shfl_up(T v, unsigned by, unsigned mask = kAllLanes, Site s = here()) {
  const unsigned me = emulator::current_lane();
  return emulator::exchange(v, by <= me ? me - by : me, mask, s);
}
inline unsigned ballot(bool pred, unsigned mask = kAllLanes, Site s = here()) {
  return unsigned(emulator::wait(emulator::Wait::kBallot, s, mask, pred, emulator::current_lane()));
}
inline bool any(bool pred, unsigned mask = kAllLanes, Site s = here()) { return ballot(pred, mask, s) != 0; }
inline bool all(bool pred, unsigned mask = kAllLanes, Site s = here()) { return ballot(pred, mask, s) == mask; }

// One thread runs at a time, so plain code is atomic.
template <class T> T atomic_exch(T* p, T v) {
  const T old = *p;
  return *p = v, old;
}
template <class T> T atomic_add(T* p, T v) { return atomic_exch(p, T(*p + v)); }
template <class T> T atomic_max(T* p, T v) { return atomic_exch(p, *p < v ? v : *p); }
template <class T> T atomic_min(T* p, T v) { return atomic_exch(p, v < *p ? v : *p); }
template <class T> T atomic_or(T* p, T v) { return atomic_exch(p, T(*p | v)); }
template <class T> T atomic_cas(T* p, T expected, T v) { return atomic_exch(p, *p == expected ? v : *p); }

}  // namespace fa

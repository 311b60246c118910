// The CUDA launch model as our kernels use it: every .cu file includes this and nothing else from CUDA.
// nvcc gets the real thing; with -DFA_EMULATE the same names come from csrc/emulator/cuda_on_cpu.h, which runs the kernel on the CPU and
// throws on what would break a GPU. Kernels use only these names (never a raw __shfl_*_sync or __shared__), or the emulator cannot watch.
//
//   FA_LAUNCH(kernel, grid, block, dynamic_smem_bytes, stream, args...)   then fa::check(cudaGetLastError(), "op")
//   FA_SHARED(float, tile, [32][33]);  FA_SHARED(int, count);             statically sized shared memory, uninitialised
//   fa::dynamic_shared<T>()                                               the launch's dynamic shared memory
//   fa::vec_load<Pack>(p)  fa::vec_store(p, pack)                         one 4-, 8- or 16-byte access; p must be aligned to it
//   fa::syncthreads()  syncthreads_or(pred)  syncthreads_count(pred)  syncwarp(mask)
//   fa::shfl(v, lane)  shfl_xor(v, m)  shfl_down(v, d)  shfl_up(v, d)  ballot(pred)  any(pred)  all(pred)   lane mask last
//   fa::atomic_add/max/min/or/exch/cas   fa::threadfence()   fa::lane_id()
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fa {
inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
}  // namespace fa

#if defined(FA_EMULATE)
#include "../emulator/cuda_on_cpu.h"
#define FA_NO_UNROLL
#else
#include <cuda_runtime.h>

#define FA_DEVICE __device__ __forceinline__
#define FA_UNROLL _Pragma("unroll")
#define FA_NO_UNROLL _Pragma("unroll 1")
#define FA_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define FA_LAUNCH(...) ::fa::launch(__VA_ARGS__)

namespace fa {

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args... args) {
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(args)...);
  // clang-format on
}

// One untyped array for all: `extern __shared__ T x[]` with a second T is a redeclaration error.
template <class T> FA_DEVICE T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char fa_dynamic_shared[];
  return reinterpret_cast<T*>(fa_dynamic_shared);
}

template <class V> FA_DEVICE V vec_load(const void* p) { return *static_cast<const V*>(p); }
template <class V> FA_DEVICE void vec_store(void* p, const V& v) { *static_cast<V*>(p) = v; }

FA_DEVICE void syncthreads() { __syncthreads(); }
FA_DEVICE bool syncthreads_or(bool pred) { return __syncthreads_or(pred) != 0; }
FA_DEVICE int syncthreads_count(bool pred) { return __syncthreads_count(pred); }
FA_DEVICE void syncwarp(unsigned mask = kAllLanes) { __syncwarp(mask); }
FA_DEVICE void threadfence() { __threadfence(); }

template <class T> FA_DEVICE T shfl(T v, unsigned lane, unsigned mask = kAllLanes) { return __shfl_sync(mask, v, int(lane)); }
template <class T> FA_DEVICE T shfl_xor(T v, unsigned bits, unsigned mask = kAllLanes) { return __shfl_xor_sync(mask, v, int(bits)); }
template <class T> FA_DEVICE T shfl_down(T v, unsigned by, unsigned mask = kAllLanes) { return __shfl_down_sync(mask, v, by); }
template <class T> FA_DEVICE T shfl_up(T v, unsigned by, unsigned mask = kAllLanes) { return __shfl_up_sync(mask, v, by); }
FA_DEVICE unsigned ballot(bool pred, unsigned mask = kAllLanes) { return __ballot_sync(mask, pred); }
FA_DEVICE bool any(bool pred, unsigned mask = kAllLanes) { return __any_sync(mask, pred) != 0; }
FA_DEVICE bool all(bool pred, unsigned mask = kAllLanes) { return __all_sync(mask, pred) != 0; }

template <class T> FA_DEVICE T atomic_add(T* p, T v) { return atomicAdd(p, v); }
template <class T> FA_DEVICE T atomic_max(T* p, T v) { return atomicMax(p, v); }
template <class T> FA_DEVICE T atomic_min(T* p, T v) { return atomicMin(p, v); }
template <class T> FA_DEVICE T atomic_or(T* p, T v) { return atomicOr(p, v); }
template <class T> FA_DEVICE T atomic_exch(T* p, T v) { return atomicExch(p, v); }
template <class T> FA_DEVICE T atomic_cas(T* p, T expected, T v) { return atomicCAS(p, expected, v); }

}  // namespace fa
#endif

namespace fa {

FA_DEVICE unsigned lane_id() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % kWarp; }

// Throws what CUDA reported. `what` names the op for the user: "fusedadapt.optim.AdamW.step".
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // CUDA keeps the error: the next launch, of whatever op, would be blamed for it
  throw std::runtime_error(std::string(what) + ": CUDA call failed; " + cudaGetErrorString(error));
}

inline int sm_count(int device) {
  int n = 0;
  check(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device), "sm_count");
  return n;
}

class DeviceGuard {
 public:
  DeviceGuard(int device, const char* what) {
    check(cudaGetDevice(&previous_), what);
    if (previous_ == device) return;
    check(cudaSetDevice(device), what);
    moved_ = true;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (moved_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool moved_ = false;
};

}  // namespace fa

// The few CUDA runtime calls our launchers make, as one CPU "device" whose memory is host memory and whose streams are all in order.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

namespace fa::emulator {
inline constexpr int kSmCount = 132;  // an H100's, so that chunking decisions are the ones made there
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t report(cudaError_t e) {
  if (e != cudaSuccess) last_error = e;
  return e;
}
}  // namespace fa::emulator

inline cudaError_t cudaPeekAtLastError() { return fa::emulator::last_error; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t e = fa::emulator::last_error;
  fa::emulator::last_error = cudaSuccess;
  return e;
}
inline const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
  }
  return "unknown error";
}

inline cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return fa::emulator::report(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = fa::emulator::kSmCount;
  return fa::emulator::report(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes) std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** p,
                              size_t bytes) {  // filled with garbage as a GPU's is: a zeroed allocation hides missing initialisation
  *p = std::malloc(bytes ? bytes : 1);
  if (*p && bytes) std::memset(*p, 0xC7, bytes);
  return fa::emulator::report(*p ? cudaSuccess : cudaErrorMemoryAllocation);
}
inline cudaError_t cudaFree(void* p) { return std::free(p), cudaSuccess; }

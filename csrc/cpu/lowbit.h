// Coded states on a CPU (formats: ../core/lowbit.h), interface between the instruction-set specific part (lowbit_isa.cpp) and the rest.
#pragma once
#include <cstdint>

#include "../core/lowbit.h"
#include "../core/table.h"

namespace fa::cpu {

// One block of n elements; kind: kD8S, kD8U or kF8X. Arrays of floats hold kBlockPad more elements than n, which may be overwritten.
struct Codec {
  void (*decode)(int kind, const uint8_t* codes, const float* scale, int n, float* out);
  void (*encode)(int kind, float* values, int n, uint8_t* codes, float* scale);
};
constexpr int kBlockPad = 32;
constexpr int kLargestBlock = 2048;

extern const Codec codec_base;
#if defined(__x86_64__)
extern const Codec codec_avx2, codec_avx512;
#endif
const float* levels();  // level_of each of the 128 magnitudes of e4m3

}  // namespace fa::cpu

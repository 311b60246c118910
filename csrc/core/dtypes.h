// Element types: conversion to fp32 and the one rounding back. All integer arithmetic, so every backend gives the same bits.
#pragma once
#include <cstdint>
#include <cstring>

#include "macros.h"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#elif defined(__F16C__)
#include <immintrin.h>
#endif

namespace fa {

// Codes stored in the tensor table; kernels/common.py repeats them. A code is a storage format, never a compute type.
enum DType : uint8_t { kNone = 0, kF32 = 1, kBF16 = 2, kF16 = 3, kI16 = 4, kF64 = 5, kU8 = 6, kI8 = 7, kI64 = 8, kBool = 9, kI32 = 10 };
enum CodedDType : uint8_t { kD8S = 11, kD8U = 12, kF8X = 13 };  // states of one byte an element and a scale a block: lowbit.h
enum IndexDType : uint8_t { kBits = 14 };  // of an index that is a mask (TensorDesc, table.h)

FA_HD int dtype_size(int code) {
  return code == kF32 || code == kI32                    ? 4
         : code == kBF16 || code == kF16 || code == kI16 ? 2
         : code == kF64 || code == kI64                  ? 8
         : code == kNone                                 ? 0
                                                         : 1;
}

FA_HD uint32_t as_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
FA_HD float as_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

FA_HD float bf16_to_float(uint16_t h) { return as_float(uint32_t(h) << 16); }

// Round to nearest even; NaN stays NaN (the carry must not turn it into infinity).
// In the high half of a word; the low half is rubbish.
FA_HD uint32_t round_bf16_high(float f) {
  const uint32_t u = as_bits(f), rounded = u + 0x7fffu + ((u >> 16) & 1u);
  const uint32_t nan = 0u - uint32_t(f != f);  // as a mask: a select would be narrowed twice by the vectoriser
  return (rounded & ~nan) | ((u | 0x400000u) & nan);
}

FA_HD uint16_t float_to_bf16(float f) { return uint16_t(round_bf16_high(f) >> 16); }

// Stochastic rounding: add 16 random bits below the kept ones, truncate. Unbiased; infinities and NaN are kept, and a finite
// value above the largest bf16 is cut, not carried into infinity.
FA_HD uint16_t float_to_bf16_stochastic(float f, uint32_t random16) {
  const uint32_t u = as_bits(f);
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t carried = u + (random16 & 0xffffu);
  const bool keep = magnitude >= 0x7f800000u || (carried & 0x7f800000u) == 0x7f800000u;
  const uint32_t quiet = magnitude > 0x7f800000u ? 0x40u : 0u;
  return uint16_t(((keep ? u : carried) >> 16) | quiet);
}

FA_HD float half_to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(h));
#elif defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t magnitude = uint32_t(h & 0x7fffu) << 13;
  const uint32_t special = h & 0x7fffu;
  const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);  // the multiply normalises subnormals exactly
  const uint32_t bits = special >= 0x7c00u ? magnitude | 0x7f800000u | (special > 0x7c00u ? 0x400000u : 0u) : finite;
  return as_float(bits | uint32_t(h & 0x8000u) << 16);
#endif
}

FA_HD uint16_t float_to_half(float f) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(f));
#elif defined(__F16C__)
  return uint16_t(_cvtss_sh(f, 0));
#else
  const uint32_t u = as_bits(f), magnitude = u & 0x7fffffffu;
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;  // the add rounds at 2^-24, half's last subnormal bit
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const uint32_t r = magnitude > 0x7f800000u ? nan : magnitude >= 0x477ff000u ? 0x7c00u : magnitude < 0x38800000u ? subnormal : normal;
  return uint16_t(r | ((u >> 16) & 0x8000u));
#endif
}

// Split master weight: the parameter is the fp32 value rounded to nearest bf16 (ties away from zero, so that the difference of
// the bit patterns always fits), the remainder is that signed difference. Two bytes make the fp32 value exact.
FA_HD float join_split(uint16_t high, int16_t low) { return as_float((uint32_t(high) << 16) + uint32_t(int32_t(low))); }
FA_HD void split(float f, uint16_t* high, int16_t* low) {
  const uint32_t u = as_bits(f);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  *high = uint16_t(nan ? (u >> 16) | 0x40u : (u + 0x8000u) >> 16);
  *low = nan ? int16_t(0) : int16_t(uint16_t(u & 0xffffu));
}

}  // namespace fa

// e4m3 and e5m2 in vectors: bytes to numbers by shifts and one multiplication, numbers to bytes by one rounding. Only for *_isa.cpp files: everything
// is in an unnamed namespace.
#pragma once
#include "lowrank_vector.h"

namespace fa::cpu::lowrank {
namespace {

template <int exponent>
struct Float8 {
  static constexpr int kMantissa = 7 - exponent, kBias = (1 << (exponent - 1)) - 1, kDropped = 23 - kMantissa;
  static constexpr int16_t kLast = exponent == 4 ? 0x7e : 0x7c;  // beyond: NaN
  static constexpr int32_t kLargest = exponent == 4 ? 0x7e : 0x7b;

  // Bytes in the high halves of 16-bit integers -> fp16; of e4m3 2^-8 times the number, because the exponents' biases differ by 8.
  template <class V>
  FA_INLINE V halves(V high) {
    const V sign = high & int16_t(-0x8000), magnitude = high & int16_t(0x7f00), nan = magnitude > (V{} + int16_t(kLast << 8));
    return sign | (magnitude >> (5 - exponent) & ~nan) | (nan & int16_t(0x7e00));
  }
  // Exact, subnormal numbers too.
  FA_INLINE F numbers(H half) {
    const F f = F16::widen(half);
    return exponent == 4 ? f * splat(256.f) : f;
  }
  // To nearest even, saturating, the sign kept. Normal numbers by a carry into the upper bits, those below by an addition whose last bit is the
  // smallest number.
  FA_INLINE I code(F f) {
    const I magnitude = I(f) & 0x7fffffff;
    I normal = ((magnitude + ((1 << (kDropped - 1)) - 1) + ((magnitude >> kDropped) & 1)) >> kDropped) - ((127 - kBias) << kMantissa);
    normal = normal < kLargest ? normal : I{} + kLargest;
    constexpr int32_t kStep = (127 + kDropped + 1 - kBias) << 23;  // a power of two
    const I small = I(F(magnitude) + F(I{} + kStep)) - kStep;
    const I is_small = magnitude < (128 - kBias) << 23;
    return (small & is_small) | (normal & ~is_small) | (I(U(f) >> 24) & 0x80);
  }
};

}  // namespace
}  // namespace fa::cpu::lowrank

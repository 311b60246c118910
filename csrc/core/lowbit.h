// States of 8 bits: a block of neighbouring elements shares a scale, an element is one byte. fusedadapt/reference/lowbit.py is the same text.
//
//   kD8S, kD8U  dynamic map (arXiv 2110.02861), signed and unsigned:  x = map[code] * extreme.          scale: fp32 [blocks]: extreme
//   kF8X        e4m3 of an expanded range (COAT, arXiv 2410.19313):   |x| = absmax * (q / 448)^(1 / k). scale: fp32 [blocks, 2]: absmax, k
//
// extreme: the element of the largest magnitude, with its sign if the state has one (+ where both signs have it). It is exact then, and so
// decoding and encoding again changes no bit; with absmax alone a negative extreme would lose 0.7 % a step, because the map has no -1.
// COAT's own form, with c = sqrt(max min) and (|x| / c)^k scaled to 448, is this one after c has cancelled. k stretches the block's range over
// e4m3's and is a multiple of 1/16 in [1/16, 8]. Logarithm and power are sums and products of our own: codes are equal on every backend.
//
// Whatever the format: a block with no magnitude of 2^-120 or more is a block of zeros (scale 0, k 1, codes of zero); one that holds an infinity
// or a NaN has the scale NaN (k 1) and codes of zero, so that all of it decodes to NaN. A positive element of an unsigned state never gets the code of zero: under a root in a denominator,
// a zero turns a small momentum into a huge step (bitsandbytes' map does that), and AdaBelief's state is never below its eps.
#pragma once
#include <cmath>

#include "dtypes.h"

namespace fa {

// ---- the dynamic map: decades 10^(e-6) [0.1, 1], e = 0..6, of 2^e cells (unsigned: twice as many), zero, and 1 ----

// Code c of the signed map is +-magnitude |c - 127|, of the unsigned one magnitude c + 1; a magnitude m in [2^n, 2^(n+1)) is cell m - 2^n.
constexpr int kSignedZero = 127, kUnsignedZero = 0;

struct DynamicMap {
  float value[256];
};

constexpr DynamicMap dynamic_map(bool has_sign) {
  const double decade[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  DynamicMap map{};
  for (int e = 0; e < 7; ++e) {
    const int cells = has_sign ? 1 << e : 2 << e;
    for (int j = 0; j < cells; ++j) {
      const auto value = float(decade[e] * (0.1 + 0.9 * (j + 0.5) / cells));
      map.value[has_sign ? kSignedZero + cells + j : cells + j - 1] = value;
      if (has_sign) map.value[kSignedZero - cells - j] = -value;
    }
  }
  map.value[255] = 1.f;
  return map;
}

// One row per decade: the magnitude of x in it is min(trunc(x * slope + offset), last); the next decade begins above `end`, halfway between
// the two values there. Rounding moves the other cuts by less than 1e-4 of a cell.
struct Decades {
  float end[8], slope[8], offset[8], last[8];  // the eighth is 1 itself
};

constexpr Decades decades(bool has_sign) {
  const double decade[7] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  Decades d{};
  for (int e = 0; e < 7; ++e) {
    const double cells = has_sign ? 1 << e : 2 << e;
    d.end[e] = float(e < 6 ? decade[e] * (1.0 + 0.9 / cells) : 1.0 - 0.225 / cells);
    d.slope[e] = float(cells / (0.9 * decade[e]));
    d.offset[e] = float(cells * 8.0 / 9.0);
    d.last[e] = float(2.0 * cells - 1.0);
  }
  // Cells that zero or a positive remainder stretches: of the signed map from half its value on, of the unsigned one from 0 on.
  d.slope[0] = float(has_sign ? 1.0 / (0.5 * 0.55 * decade[0]) : 1.0 / (0.55 * decade[0]));
  d.offset[0] = has_sign ? 0.f : 2.f;
  d.offset[7] = d.last[7] = has_sign ? 128.f : 256.f;
  return d;
}

// The largest key of a block belongs to its extreme: the magnitude's bits, and below them whether it is positive.
FA_HD uint32_t extreme_key(float value) {
  const uint32_t u = as_bits(value);
  return (u << 1 | u >> 31) ^ 1u;
}
FA_HD float scale_of(uint32_t key, bool has_sign) {
  const uint32_t magnitude = key >> 1;
  if (magnitude >= 0x7f800000u) return as_float(0x7fc00000u);
  if (magnitude < 0x03800000u) return 0.f;  // 2^-120
  return as_float(magnitude | (has_sign ? ~key << 31 : 0u));
}
FA_HD float inverse_of(float scale) { return scale == scale && scale != 0.f ? 1.f / scale : 0.f; }

// x = value * inverse_of(scale), in [-1, 1], or NaN in a block that is. Branchless: a chain of selects for processors and GPUs alike.
template <bool kSigned>
FA_HD uint8_t dynamic_code(float x) {
  constexpr Decades d = decades(kSigned);
  const float a = kSigned ? fabsf(x) : x;
  float slope = d.slope[0], offset = d.offset[0], last = d.last[0];
#define FA_DECADE(e)                                \
  slope = a > d.end[e - 1] ? d.slope[e] : slope;    \
  offset = a > d.end[e - 1] ? d.offset[e] : offset; \
  last = a > d.end[e - 1] ? d.last[e] : last
  FA_DECADE(1);
  FA_DECADE(2);
  FA_DECADE(3);
  FA_DECADE(4);
  FA_DECADE(5);
  FA_DECADE(6);
  FA_DECADE(7);
#undef FA_DECADE
  float y = a * slope + offset;
  y = y < last ? y : last;
  const int32_t m = a > 0.f ? int32_t(y) : 0;
  if (!kSigned) return uint8_t(a > 0.f ? m - 1 : 0);
  return uint8_t(x < 0.f ? kSignedZero - (m < 127 ? m : 127) : kSignedZero + m);
}

// ---- e4m3 of an expanded range ----

constexpr float kExpandRange = 16.6147098f;  // log2(448^2 / 2)
constexpr float kLeastRatio = 0x1p-120f;

// log2 of a normal positive x: atanh series of its mantissa in [sqrt(1/2), sqrt(2)), within 2e-7.
FA_HD float log2_series(float x) {
  const int32_t u = int32_t(as_bits(x)) - 0x3f3504f3;
  const int32_t n = u >> 23;
  const float m = as_float(uint32_t((u & 0x7fffff) + 0x3f3504f3));
  const float t = (m - 1.f) / (m + 1.f), s = t * t;
  const float p = (((s * 0.111111112f + 0.142857149f) * s + 0.2f) * s + 0.333333343f) * s + 1.f;
  return float(n) + t * 2.88539004f * p;
}

// 2^y for y in [-120, 0], within 2e-7 of it; for less, down to -960, a number that means nothing.
FA_HD float exp2_series(float y) {
  const auto n = int32_t(y - 0.5f);
  const float f = y - float(n);
  float p = f * 1.52527336e-5f + 1.54035297e-4f;
  p = p * f + 1.33335579e-3f;
  p = p * f + 9.61812865e-3f;
  p = p * f + 5.55041097e-2f;
  p = p * f + 0.240226507f;
  p = p * f + 0.693147182f;
  p = p * f + 1.f;
  return as_float(as_bits(p) + (uint32_t(n) << 23));
}

// k of a live block whose smallest nonzero magnitude is `ratio` times the largest.
FA_HD float expansion(float ratio) {
  const float range = -log2_series(ratio > kLeastRatio ? ratio : kLeastRatio);
  if (range * 8.f <= kExpandRange) return 8.f;
  const float k = float(int32_t(kExpandRange / range * 16.f)) * 0.0625f;
  return k > 0.0625f ? k : 0.0625f;
}

// q in [0, 448] to the nearest e4m3, ties to even: the byte without its sign.
FA_HD uint32_t e4m3_code(float q) {
  const uint32_t u = as_bits(q);
  const uint32_t normal = ((u + 0x7ffffu + ((u >> 20) & 1u)) >> 20) - (120u << 3);
  const uint32_t subnormal = as_bits(q + 16384.f) - as_bits(16384.f);  // the add rounds at 2^-9
  return q < 0.015625f ? subnormal : normal < 126u ? normal : 126u;
}

FA_HD float e4m3_magnitude(uint32_t c) { return c < 8u ? float(int32_t(c)) * 0x1p-9f : as_float((c << 20) + (120u << 23)); }

FA_HD uint8_t expanded_code(float value, float inverse, float k) {
  const float x = fabsf(value) * inverse;
  const uint32_t c = e4m3_code(448.f * exp2_series(k * log2_series(x > kLeastRatio ? x : kLeastRatio)));
  return uint8_t(x > 0.f ? c | (as_bits(value) >> 31 << 7) : 0u);
}

// `inverse_k`: 1 / k. `level`: level_of(code & 127); worth a table.
FA_HD float level_of(uint32_t c) { return c ? log2_series(e4m3_magnitude(c) / 448.f) : 0.f; }
FA_HD float expanded_value(uint32_t code, float level, float absmax, float inverse_k) {
  const float y = level * inverse_k;
  const uint32_t some = 0u - uint32_t((code & 127u) != 0u);  // as a mask: with a branch the loops around it would not be vectorised
  const float magnitude = as_float(as_bits(exp2_series(y > -120.f ? y : -120.f)) & some) * absmax;
  return as_float(as_bits(magnitude) ^ (code >> 7 << 31));
}

}  // namespace fa

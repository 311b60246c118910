// Tiles of a model as fp32, and their difference from the base: for the *_isa.cpp of merging. Everything is in an unnamed namespace, so that each
// instruction set has its own copy.
#pragma once
#include "../core/dtypes.h"
#include "merge.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define FA_CAT2(a, b) a##b
#define FA_CAT(a, b) FA_CAT2(a, b)

namespace fa::cpu {
namespace {

constexpr int kTile = kMergeTile;
constexpr uint32_t kSign = 0x80000000u;
constexpr int32_t kInf = 0x7f800000;

FA_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- tiles in and out

template <class To, class From, class Convert>
FA_HD void convert(To* __restrict out, const From* __restrict in, int n, Convert f) {
  for (int i = 0; i < n; ++i) out[i] = f(in[i]);
}

#if defined(__AVX2__)  // GCC takes 16-bit loads apart before it widens them
FA_HD __m256 load_bf16(const uint16_t* in) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))), 16));
}
#endif

void widen_bf16(float* __restrict out, const uint16_t* __restrict in, int n) {
  int i = 0;
#if defined(__AVX2__)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, load_bf16(in + i));
#endif
  convert(out + i, in + i, n - i, [](uint16_t h) { return bf16_to_float(h); });
}

void widen_half(float* __restrict out, const uint16_t* __restrict in, int n) {
  int i = 0;
#if defined(__F16C__)  // GCC does not vectorise the conversion of halves
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  convert(out + i, in + i, n - i, [](uint16_t h) { return half_to_float(h); });
}

// A tile as fp32: the array itself, or the buffer it was widened into.
const float* widen(const void* base, int dtype, int64_t offset, int n, float* buffer) {
  if (dtype == kF32) return static_cast<const float*>(base) + offset;
  const uint16_t* in = static_cast<const uint16_t*>(base) + offset;
  if (dtype == kBF16) widen_bf16(buffer, in, n);
  if (dtype == kF16) widen_half(buffer, in, n);
  return buffer;
}

// ---- deltas

// x - base; base null: x.
void subtract(const void* x, int dtype, int64_t offset, int n, const float* base, float* __restrict d) {
  if (dtype == kF32 && base) {
    const float* __restrict in = static_cast<const float*>(x) + offset;
    for (int i = 0; i < n; ++i) d[i] = in[i] - base[i];
    return;
  }
#if defined(__AVX2__)
  if (dtype == kBF16 && base && n % 8 == 0) {
    const uint16_t* in = static_cast<const uint16_t*>(x) + offset;
    for (int i = 0; i < n; i += 8) _mm256_storeu_ps(d + i, _mm256_sub_ps(load_bf16(in + i), _mm256_loadu_ps(base + i)));
    return;
  }
#endif
  const float* in = widen(x, dtype, offset, n, d);
  if (in != d) return convert(d, in, n, [](float f) { return f; });
  if (!base) return;
  for (int i = 0; i < n; ++i) d[i] -= base[i];
}

}  // namespace
}  // namespace fa::cpu

// A tile of an array as signed keys, and 32 keys as a word of comparisons. Only for *_isa.cpp: everything is in their unnamed namespace, a copy for
// each instruction set.
#pragma once
#include "../core/dtypes.h"
#include "prefetch.h"
#include "sparse.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fa::cpu {
namespace {

constexpr int kTile = 512, kAhead = 2 * kTile;
constexpr uint32_t kSign = 0x80000000u, kInf = 0x7f800000u;
constexpr int32_t kLowest = INT32_MIN;

FA_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- scores and keys

template <class To, class From, class Convert>
FA_HD void convert(To* __restrict out, const From* __restrict in, int n, Convert f) {
  for (int i = 0; i < n; ++i) out[i] = f(in[i]);
}

// A tile as fp32: the array itself, or the buffer it was widened into.
const float* widen(const void* base, int dtype, int64_t offset, int n, float* __restrict buffer) {
  if (dtype == kF32) return static_cast<const float*>(base) + offset;
  const uint16_t* in = static_cast<const uint16_t*>(base) + offset;
  if (dtype == kBF16) {
    convert(buffer, in, n, [](uint16_t h) { return bf16_to_float(h); });
    return buffer;
  }
  int i = 0;
#if defined(__F16C__)  // GCC does not vectorise the scalar conversion
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  convert(buffer + i, in + i, n - i, [](uint16_t h) { return half_to_float(h); });
  return buffer;
}

// The factors of the columns that elements [offset, offset + n) are in.
const float* factors(const Source& s, int64_t offset, int n, float* buffer) {
  const float* scale = static_cast<const float*>(s.other);
  int64_t column = (s.first_column + offset) % s.columns;
  if (column + n <= s.columns) return scale + column;
  for (int i = 0; i < n; ++i) {
    buffer[i] = scale[column];
    column = column + 1 == s.columns ? 0 : column + 1;
  }
  return buffer;
}

FA_HD int32_t choose(bool yes, int32_t a, int32_t b) {
  const int32_t mask = -int32_t(yes);
  return (a & mask) | (b & ~mask);
}

FA_HD int32_t key_of(float score, int32_t nan_key) {
  const int32_t u = int32_t(as_bits(score)), magnitude = u & 0x7fffffff;
  const int32_t key = choose(magnitude == 0, 0, u ^ ((u >> 31) & 0x7fffffff));
  return choose(magnitude > int32_t(kInf), nan_key, key);
}

FA_HD int32_t key_of_abs(float score, int32_t nan_key) {
  const int32_t magnitude = int32_t(as_bits(score) & ~kSign);
  return choose(magnitude > int32_t(kInf), nan_key, magnitude);
}

FA_HD float absolute(float f) { return as_float(as_bits(f) & ~kSign); }

// The tile's scores; for kAbs and kGiven the elements themselves. Buffers of kTile numbers.
void tile_scores(const Source& s, int64_t offset, int n, float* __restrict out) {
  alignas(64) float xb[kTile], yb[kTile];
  const float* x = widen(s.x, s.dtype, offset, n, xb);
  if (s.score == kAbs) return convert(out, x, n, absolute);
  if (s.score == kGiven) return convert(out, x, n, [](float f) { return f; });
  const float* y = s.score == kAbsScaled ? factors(s, offset, n, yb) : widen(s.other, s.other_dtype, offset, n, yb);
  if (s.score == kAbsDiff)
    for (int i = 0; i < n; ++i) out[i] = absolute(x[i] - y[i]);
  if (s.score == kAbsScaled)
    for (int i = 0; i < n; ++i) out[i] = absolute(x[i]) * y[i];
  if (s.score == kAbsProduct)
    for (int i = 0; i < n; ++i) out[i] = absolute(x[i] * y[i]);
}

// The tile after next is asked for while this one is worked on: counting is all cache hits, and the memory bus would wait meanwhile.
FA_HD void prefetch(const void* base, int dtype, int64_t offset) {
  const char* p = static_cast<const char*>(base) + (offset + kAhead) * dtype_size(dtype);
  for (int line = 0; line < kTile * dtype_size(dtype); line += 64) prefetch_line<0, 2>(p + line);
}

void tile_keys(const Source& s, int64_t offset, int n, int32_t* __restrict out) {
  if (offset + kAhead + kTile <= s.n) prefetch(s.x, s.dtype, offset);
  const int32_t nan_key = s.nan_key;
  if (s.score == kAbs && s.dtype == kF32)
    return convert(out, static_cast<const float*>(s.x) + offset, n, [nan_key](float f) { return key_of_abs(f, nan_key); });
  if (s.score == kAbs && s.dtype == kBF16)
    return convert(out, static_cast<const uint16_t*>(s.x) + offset, n,
                   [nan_key](uint16_t h) { return key_of_abs(bf16_to_float(h), nan_key); });
  alignas(64) float scores[kTile];
  tile_scores(s, offset, n, scores);
  convert(out, scores, n, [nan_key](float f) { return key_of(f, nan_key); });
}

// ---- 32 keys to one word

#if defined(__AVX512F__)  // maskz: GCC 12 warns about the undefined operand inside its own _mm512_sra_epi32
FA_HD uint32_t above(const int32_t* k, int32_t t) {
  const __m512i v = _mm512_set1_epi32(t);
  return uint32_t(_mm512_cmpgt_epi32_mask(_mm512_loadu_si512(k), v)) | uint32_t(_mm512_cmpgt_epi32_mask(_mm512_loadu_si512(k + 16), v))
                                                                           << 16;
}
FA_HD uint32_t same(const int32_t* k, int shift, int32_t t) {
  const __m512i v = _mm512_set1_epi32(t);
  const __m128i by = _mm_cvtsi32_si128(shift);
  return uint32_t(_mm512_cmpeq_epi32_mask(_mm512_maskz_sra_epi32(0xffff, _mm512_loadu_si512(k), by), v)) |
         uint32_t(_mm512_cmpeq_epi32_mask(_mm512_maskz_sra_epi32(0xffff, _mm512_loadu_si512(k + 16), by), v)) << 16;
}
#elif defined(__AVX2__)
FA_HD __m256i load8(const int32_t* k) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(k)); }
FA_HD uint32_t bits8(__m256i v) { return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(v))); }
FA_HD uint32_t above(const int32_t* k, int32_t t) {
  const __m256i v = _mm256_set1_epi32(t);
  return bits8(_mm256_cmpgt_epi32(load8(k), v)) | bits8(_mm256_cmpgt_epi32(load8(k + 8), v)) << 8 |
         bits8(_mm256_cmpgt_epi32(load8(k + 16), v)) << 16 | bits8(_mm256_cmpgt_epi32(load8(k + 24), v)) << 24;
}
FA_HD uint32_t same(const int32_t* k, int shift, int32_t t) {
  const __m256i v = _mm256_set1_epi32(t);
  const __m128i by = _mm_cvtsi32_si128(shift);
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= bits8(_mm256_cmpeq_epi32(_mm256_sra_epi32(load8(k + 8 * i), by), v)) << 8 * i;
  return word;
}
#elif defined(__SSE2__)
FA_HD __m128i load4(const int32_t* k) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(k)); }
FA_HD uint32_t bits4(__m128i v) { return uint32_t(_mm_movemask_ps(_mm_castsi128_ps(v))); }
FA_HD uint32_t above(const int32_t* k, int32_t t) {
  const __m128i v = _mm_set1_epi32(t);
  uint32_t word = 0;
  for (int i = 0; i < 8; ++i) word |= bits4(_mm_cmpgt_epi32(load4(k + 4 * i), v)) << 4 * i;
  return word;
}
FA_HD uint32_t same(const int32_t* k, int shift, int32_t t) {
  const __m128i v = _mm_set1_epi32(t), by = _mm_cvtsi32_si128(shift);
  uint32_t word = 0;
  for (int i = 0; i < 8; ++i) word |= bits4(_mm_cmpeq_epi32(_mm_sra_epi32(load4(k + 4 * i), by), v)) << 4 * i;
  return word;
}
#else
FA_HD uint32_t above(const int32_t* k, int32_t t) {
  uint32_t word = 0;
  for (int i = 0; i < 32; ++i) word |= uint32_t(k[i] > t) << i;
  return word;
}
FA_HD uint32_t same(const int32_t* k, int shift, int32_t t) {
  uint32_t word = 0;
  for (int i = 0; i < 32; ++i) word |= uint32_t((k[i] >> shift) == t) << i;
  return word;
}
#endif

}  // namespace
}  // namespace fa::cpu

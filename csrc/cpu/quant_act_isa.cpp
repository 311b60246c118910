// Quantized activations, compiled once per instruction set (FA_ISA).
//
// The product is dots of rows: four of x against two or four of w, a vector of int32 sums for each pair, which stay in registers over thousands of
// columns. vpmaddubsw and vpdpbusd take an unsigned and a signed byte: |w| and x with w's sign. Exact for every w, -128 included, because x is never
// -128: two products are at most 2 * 128 * 127 < 2^15, where vpmaddubsw would saturate.
#include <cstdint>
#include <cstring>

#include "../core/dtypes.h"
#include "float8.h"
#include "quant_act.h"

#define FA_CAT2(a, b) a##b
#define FA_CAT(a, b) FA_CAT2(a, b)

namespace fa::cpu::quant_act {
namespace {

using namespace lowrank;

FA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- codes ----

constexpr int kRun = 4 * kLanes;  // elements coded at a time
constexpr uint32_t kNaN = 0x7fc00000u, kInfinity = 0x7f800000u;
constexpr float kTiny = 0x1p-120f;  // below, 1 / absmax could overflow: a group of zeros

// Low bytes of four vectors, in order.
FA_INLINE void store_bytes(uint8_t* out, const I v[4]) {
#if defined(__AVX512F__)
  for (int i = 0; i < 4; ++i) store(out + i * kLanes, _mm512_maskz_cvtepi32_epi8(0xffff, __m512i(v[i])));
#elif defined(__AVX2__)
  const __m256i low = _mm256_packus_epi32(__m256i(v[0] & 255), __m256i(v[1] & 255));
  const __m256i high = _mm256_packus_epi32(__m256i(v[2] & 255), __m256i(v[3] & 255));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  store(out, _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order));
#else
  for (int i = 0; i < kRun; ++i) out[i] = uint8_t(v[i / kLanes][i % kLanes]);
#endif
}

// To nearest even, |f| < 2^22: the sum's last bit is 1.
FA_INLINE I nearest(F f) { return I(f + splat(12582912.f)) - 0x4b400000; }

// |f| <= 127.0001, because the factor is 127 / absmax.
struct Int8 {
  static constexpr float kLargest = 127.f;
  static float factor(float absmax, float) { return (1.f / absmax) * kLargest; }
  FA_INLINE I code(F f) { return nearest(f); }
};

struct E4M3 {
  static constexpr float kLargest = 448.f;
  static float factor(float, float scale) { return 1.f / scale; }
  FA_INLINE I code(F f) { return Float8<4>::code(f); }
};

template <class Format>
uint32_t largest_bits(const typename Format::E* x, int64_t n) {
  I most[2] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= n; k += 2 * kLanes)
    for (int i = 0; i < 2; ++i) {
      const I bits = I(Format::widen(load<typename Format::V>(x + k + i * kLanes))) & 0x7fffffff;
      most[i] = bits > most[i] ? bits : most[i];
    }
  for (; k < n; k += kLanes) {
    const I bits = I(widen_at<Format>(x + k, n - k)) & 0x7fffffff;
    most[0] = bits > most[0] ? bits : most[0];
  }
  int32_t found = 0;
  for (const I& m : most)
    for (int i = 0; i < kLanes; ++i) found = m[i] > found ? m[i] : found;
  return uint32_t(found);
}

template <class Code, class Format>
FA_INLINE void code_run(const typename Format::E* x, float factor, uint8_t* q) {
  I codes[4];
  for (int i = 0; i < 4; ++i) codes[i] = Code::code(Format::widen(load<typename Format::V>(x + i * kLanes)) * splat(factor));
  store_bytes(q, codes);
}

// One group: its scale, and codes of x * factor; zeros where the factor is of no use (nothing but zeros, or anything not finite).
template <class Code, class Format>
float code_group(const typename Format::E* x, int64_t n, uint8_t* q) {
  const uint32_t bits = largest_bits<Format>(x, n);
  const float absmax = bits >= kInfinity ? as_float(kNaN) : as_float(bits) < kTiny ? 0.f : as_float(bits);
  const float scale = absmax / Code::kLargest, factor = Code::factor(absmax, scale);
  if (factor == 0.f || (as_bits(factor) & kInfinity) == kInfinity) {
    memset(q, 0, size_t(n));
    return scale;
  }
  int64_t k = 0;
  for (; k + kRun <= n; k += kRun) code_run<Code, Format>(x + k, factor, q + k);
  if (k < n) {
    typename Format::E rest[kRun] = {};
    uint8_t codes[kRun];
    memcpy(rest, x + k, size_t(n - k) * sizeof(*x));
    code_run<Code, Format>(rest, factor, codes);
    memcpy(q + k, codes, size_t(n - k));
  }
  return scale;
}

template <class Code>
void quantize_as(const Activations& a, int64_t first, int64_t last) {
  const int64_t groups = (a.columns + a.block - 1) / a.block;
  with_format(a.dtype, [&](auto format) {
    using Format = decltype(format);
    for (int64_t t = first; t < last; ++t) {
      const auto* x = static_cast<const typename Format::E*>(a.x) + t * a.stride;
      for (int64_t g = 0, k = 0; g < groups; ++g, k += a.block)
        a.scale[t * groups + g] = code_group<Code, Format>(x + k, least(a.block, a.columns - k), a.q + t * a.columns + k);
    }
  });
}

void quantize(const Activations& a, int64_t first, int64_t last) {
  if (a.codes == kInt8)
    quantize_as<Int8>(a, first, last);
  else
    quantize_as<E4M3>(a, first, last);
}

// ---- product ----

// A kind of dot: kCodes, how many codes of a row it takes at a time.
#if defined(__AVX512F__)
struct Plain {
  static constexpr int kCodes = 64;
  using V = __m512i;
  FA_INLINE V load(const int8_t* p) { return lowrank::load<V>(p); }
  FA_INLINE V turned(V x, V w) { return _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x); }
  FA_INLINE V magnitude(V w) { return _mm512_maskz_abs_epi8(~0ull, w); }
  FA_INLINE I dot(I sum, V x, V w) {
    const V pairs = _mm512_maskz_maddubs_epi16(~0u, magnitude(w), turned(x, w));
    return sum + I(_mm512_maskz_madd_epi16(0xffff, pairs, _mm512_set1_epi16(1)));
  }
};
struct Vnni : Plain {
  // The instruction by name: the file is compiled without -mavx512vnni, and its other functions run where there is none.
  FA_INLINE I dot(I sum, V x, V w) {
    const V signed_codes = turned(x, w), unsigned_codes = magnitude(w);
    asm("vpdpbusd %[x], %[w], %[sum]" : [sum] "+v"(sum) : [w] "v"(unsigned_codes), [x] "v"(signed_codes));
    return sum;
  }
};
#elif defined(__AVX2__)
struct Plain {
  static constexpr int kCodes = 32;
  using V = __m256i;
  FA_INLINE V load(const int8_t* p) { return lowrank::load<V>(p); }
  // Four instructions for 32 products, as many as after widening to 16 bits, with half the loads.
  FA_INLINE I dot(I sum, V x, V w) {
    const V pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return sum + I(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
#else
struct Plain {
  static constexpr int kCodes = 8;
  typedef int16_t V __attribute__((vector_size(16)));
  typedef int8_t Bytes __attribute__((vector_size(8)));
  FA_INLINE V load(const int8_t* p) { return __builtin_convertvector(lowrank::load<Bytes>(p), V); }
  FA_INLINE I dot(I sum, V x, V w) {
#if defined(__SSE2__)
    return sum + I(_mm_madd_epi16(__m128i(x), __m128i(w)));
#else
    for (int i = 0; i < 8; ++i) sum[i / 2] += int32_t(x[i]) * w[i];
    return sum;
#endif
  }
};
#endif

constexpr int kTall = 4;

FA_INLINE int32_t total(I v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(__m256i(v)), _mm256_extracti128_si256(__m256i(v), 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
#else
  int32_t s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
#endif
}

// Keeps the compiler from loading v anew for every product.
template <class V>
FA_INLINE void in_register([[maybe_unused]] V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
}

// Rows of x and w, `stride` apart, and `depth` columns of them.
struct Rows {
  const int8_t *x, *w;
  int64_t stride, depth;
};

// out[m * kOutputs + n] += row m of x times row n of w.
template <class Dot, int M, int N>
void tile(const Rows& r, int32_t* out) {
  using V = typename Dot::V;
  const int64_t stride = r.stride, depth = r.depth;
  I sum[M][N] = {};
  int64_t k = 0;
  for (; k + Dot::kCodes <= depth; k += Dot::kCodes) {
    V x[M];
    for (int m = 0; m < M; ++m) {
      x[m] = Dot::load(r.x + m * stride + k);
      in_register(x[m]);
    }
    for (int n = 0; n < N; ++n) {
      V w = Dot::load(r.w + n * stride + k);
      in_register(w);
      for (int m = 0; m < M; ++m) sum[m][n] = Dot::dot(sum[m][n], x[m], w);
    }
  }
  if (k < depth) {
    int8_t rest[M + N][Dot::kCodes] = {};
    for (int m = 0; m < M; ++m) memcpy(rest[m], r.x + m * stride + k, size_t(depth - k));
    for (int n = 0; n < N; ++n) memcpy(rest[M + n], r.w + n * stride + k, size_t(depth - k));
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) sum[m][n] = Dot::dot(sum[m][n], Dot::load(rest[m]), Dot::load(rest[M + n]));
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m * kOutputs + n] += total(sum[m][n]);
}

// M rows of x against n of w.
template <class Dot, int M>
void tiles(Rows r, int64_t n, int32_t* out) {
#if defined(__AVX512F__)
  constexpr int kWide = 4;
#else
  constexpr int kWide = M <= 2 ? 4 : 2;  // 4 x 2 sums, four of x, one of w, its magnitude, the ones and a product: AVX2's sixteen registers
#endif
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide, r.w += kWide * r.stride) tile<Dot, M, kWide>(r, out + i);
  for (; i < n; ++i, r.w += r.stride) tile<Dot, M, 1>(r, out + i);
}

// Adds columns [k0, k1) to the sums of one piece.
template <class Dot>
void add_columns(const Int8Product& p, int64_t t0, int64_t t1, int64_t n0, int64_t n1, int64_t k0, int64_t k1, int32_t* sums) {
  constexpr void (*kOf[kTall])(Rows, int64_t, int32_t*) = {tiles<Dot, 1>, tiles<Dot, 2>, tiles<Dot, 3>, tiles<Dot, 4>};
  const int64_t step = t1 - t0 <= kTall ? k1 - k0 : kDepth;  // few tokens: w is read once, in runs as long as can be
  for (int64_t k = k0; k < k1; k += step)
    for (int64_t t = t0; t < t1; t += kTall) {
      const Rows rows{p.x + t * p.k + k, p.w + n0 * p.k + k, p.k, least(step, k1 - k)};
      kOf[least(kTall, t1 - t) - 1](rows, n1 - n0, sums + (t - t0) * kOutputs);
    }
}

void scale_row(const Int8Product& p, int64_t t, int64_t n0, int64_t n, float* row) {
  for (int64_t i = 0; i < n; ++i) row[i] = (row[i] * p.w_scale[n0 + i]) * p.x_scale[t];
  if (p.bias)
    for (int64_t i = 0; i < n; ++i) row[i] += p.bias[n0 + i];
  with_format(p.dtype, [&](auto format) {
    using Format = decltype(format);
    auto* y = static_cast<typename Format::E*>(p.y) + t * p.n + n0;
    for (int64_t i = 0; i < n; i += kLanes) narrow_at<Format>(y + i, load<F>(row + i), n - i);
  });
}

template <class Dot>
void product(const Int8Product& p, int64_t t0, int64_t t1, int64_t n0, int64_t n1) {
  alignas(64) int32_t sums[kTokens * kOutputs];
  alignas(64) float totals[kTokens * kOutputs] = {};
  for (int64_t k = 0; k < p.k; k += kChunk) {
    memset(sums, 0, sizeof sums);
    add_columns<Dot>(p, t0, t1, n0, n1, k, least(k + kChunk, p.k), sums);
    for (int64_t i = 0; i < (t1 - t0) * kOutputs; ++i) totals[i] += float(sums[i]);
  }
  for (int64_t t = t0; t < t1; ++t) scale_row(p, t, n0, n1 - n0, totals + (t - t0) * kOutputs);
}

#define FA_STRING2(a) #a
#define FA_STRING(a) FA_STRING2(a)

}  // namespace

extern const Kernels FA_CAT(kernels_, FA_ISA) = {FA_STRING(FA_ISA), &quantize, &product<Plain>};
#if defined(__AVX512F__)
extern const Kernels kernels_vnni = {"vnni", &quantize, &product<Vnni>};
#endif

}  // namespace fa::cpu::quant_act

// Vectors of the instruction set a file is compiled for. Only for *_isa.cpp files: everything is in an unnamed namespace, so that the linker cannot
// merge one instruction set's copy into another's.
#pragma once
#include <cstdint>
#include <cstring>

#include "../core/dtypes.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The AVX-512 intrinsics are the maskz ones, all lanes on: the plain ones read an uninitialised vector in GCC 12, which warns about it.
#define FA_INLINE static inline __attribute__((always_inline))

namespace fa::cpu::lowrank {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kWidth = 2 * kLanes;  // of a panel

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));
typedef int16_t S __attribute__((vector_size(2 * kLanes)));
typedef uint16_t Pairs __attribute__((vector_size(4 * kLanes)));

template <class V, class T>
FA_INLINE V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
FA_INLINE void store(T* p, V v) {
  memcpy(p, &v, sizeof v);
}
// n < kLanes elements, zeros beyond.
template <class V, class T>
FA_INLINE V load_part(const T* p, int n) {
  T part[kLanes] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load<V>(part);
}
template <class V, class T>
FA_INLINE void store_part(T* p, V v, int n) {
  T part[kLanes];
  store(part, v);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

// f - 0 is f and costs nothing; f + 0 would be an addition, because of -0.
FA_INLINE F splat(float f) { return f - F{}; }

FA_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return F(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  return F(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}

FA_INLINE F masked(F f, S mask) { return F(I(f) & __builtin_convertvector(mask, I)); }

// kLanes vectors become their columns: at each step neighbours at a distance of `s` change the halves off their diagonal.
template <int s>
FA_INLINE void exchange(F* r) {
  I first{}, second{};
#pragma GCC unroll 16
  for (int c = 0; c < kLanes; ++c) first[c] = c & s ? kLanes + c - s : c, second[c] = c & s ? kLanes + c : c + s;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & s) continue;
    const F a = r[i], b = r[i + s];
    r[i] = __builtin_shuffle(a, b, first), r[i + s] = __builtin_shuffle(a, b, second);
  }
}
FA_INLINE void transpose(F* r) {
  exchange<1>(r), exchange<2>(r);
  if constexpr (kLanes > 4) exchange<4>(r);
  if constexpr (kLanes > 8) exchange<8>(r);
}

// Storage formats: E is an element in memory, V a vector of them.
struct F32 {
  using E = float;
  using V = F;
  FA_INLINE F widen(V v) { return v; }
  FA_INLINE void load_pair(const E* p, F* a, F* b) { *a = load<F>(p), *b = load<F>(p + kLanes); }
  FA_INLINE V narrow(F f) { return f; }
  FA_INLINE void store_pair(E* p, F a, F b) {
    store(p, a);
    store(p + kLanes, b);
  }
  FA_INLINE float widen_one(E e) { return e; }
  FA_INLINE E narrow_one(float f) { return f; }
};

#if defined(__AVX512BW__)
// Which 16-bit half goes where: each of a word's halves twice, the lower and the upper 16 of them; the upper or lower halves of the lanes of two vectors.
struct alignas(64) Halves16 {
  uint16_t twice[64], upper[32], lower[32];
  constexpr Halves16() : twice(), upper(), lower() {
    for (int i = 0; i < 64; ++i) twice[i] = uint16_t(i / 2);
    for (int i = 0; i < 32; ++i) lower[i] = uint16_t(2 * i), upper[i] = uint16_t(2 * i + 1);
  }
};
constexpr Halves16 kHalves;

// 32 neighbouring bf16 as two vectors in their order.
FA_INLINE void widen_pair(__m512i pair, F* a, F* b) {
  *a = F(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, load<__m512i>(kHalves.twice), pair));
  *b = F(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, load<__m512i>(kHalves.twice + 32), pair));
}
#endif

struct BF16 {
  using E = uint16_t;
  using V = H;
  FA_INLINE F widen(V v) { return F(__builtin_convertvector(v, U) << 16); }
  // Two neighbours; from one word where a shuffle puts its halves in place.
  FA_INLINE void load_pair(const E* p, F* a, F* b) {
#if defined(__AVX512BW__)
    widen_pair(load<__m512i>(p), a, b);
#else
    *a = widen(load<V>(p)), *b = widen(load<V>(p + kLanes));
#endif
  }
  // In the upper half of every lane.
  FA_INLINE U rounded(F f) {
    const U u = U(f);
    return f != f ? u | 0x400000u : u + 0x7fffu + ((u >> 16) & 1u);
  }
  FA_INLINE U round(F f) { return rounded(f) >> 16; }
  FA_INLINE V narrow(F f) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i packed = _mm256_packus_epi32(__m256i(round(f)), __m256i(round(f)));
    return H(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
    return __builtin_convertvector(round(f), H);
#endif
  }
  // Two neighbours, in one word where that is cheaper.
  FA_INLINE void store_pair(E* p, F a, F b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    store(p, _mm256_permute4x64_epi64(_mm256_packus_epi32(__m256i(round(a)), __m256i(round(b))), 0xd8));
#elif defined(__AVX512BW__)
    store(p, _mm512_maskz_permutex2var_epi16(~__mmask32{0}, __m512i(rounded(a)), load<__m512i>(kHalves.upper), __m512i(rounded(b))));
#else
    store(p, narrow(a));
    store(p + kLanes, narrow(b));
#endif
  }
#if defined(__AVX512BW__)
  // store_pair by the instruction of processors that have AVX512_BF16. It takes denormals for zeros: which of the results are zeros or denormals. In
  // assembly, because this file is compiled for all processors.
  FA_INLINE __mmask32 store_pair_native(E* p, F a, F b) {
    __m512i pair;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pair) : "v"(a), "v"(b));
    store(p, pair);
    return _mm512_testn_epi16_mask(pair, __m512i(Pairs{} + uint16_t(0x7f80)));
  }
#endif
  FA_INLINE float widen_one(E e) { return bf16_to_float(e); }
  FA_INLINE E narrow_one(float f) { return float_to_bf16(f); }
};

struct F16 {
  using E = uint16_t;
  using V = H;
#if defined(__AVX512F__)
  FA_INLINE F widen(V v) { return F(_mm512_maskz_cvtph_ps(0xffff, __m256i(v))); }
  FA_INLINE V narrow(F f) { return H(_mm512_maskz_cvtps_ph(0xffff, __m512(f), 0)); }
#elif defined(__F16C__)
  FA_INLINE F widen(V v) { return F(_mm256_cvtph_ps(__m128i(v))); }
  FA_INLINE V narrow(F f) { return H(_mm256_cvtps_ph(__m256(f), 0)); }
#else
  FA_INLINE F widen(V v) {
    F f = {};
    for (int i = 0; i < kLanes; ++i) f[i] = half_to_float(v[i]);
    return f;
  }
  FA_INLINE V narrow(F f) {
    H v = {};
    for (int i = 0; i < kLanes; ++i) v[i] = float_to_half(f[i]);
    return v;
  }
#endif
  FA_INLINE void load_pair(const E* p, F* a, F* b) { *a = widen(load<V>(p)), *b = widen(load<V>(p + kLanes)); }
  FA_INLINE void store_pair(E* p, F a, F b) {
    store(p, narrow(a));
    store(p + kLanes, narrow(b));
  }
  FA_INLINE float widen_one(E e) { return half_to_float(e); }
  FA_INLINE E narrow_one(float f) { return float_to_half(f); }
};

// Calls f(format of dtype).
template <class Function>
FA_INLINE void with_format(int dtype, Function f) {
  if (dtype == kF32) return f(F32{});
  if (dtype == kBF16) return f(BF16{});
  if (dtype == kF16) return f(F16{});
}

template <class Format>
FA_INLINE F widen_at(const typename Format::E* p, int64_t left) {
  using V = typename Format::V;
  return Format::widen(left >= kLanes ? load<V>(p) : load_part<V>(p, int(left)));
}
template <class Format>
FA_INLINE void narrow_at(typename Format::E* p, F f, int64_t left) {
  if (left >= kLanes)
    store(p, Format::narrow(f));
  else
    store_part(p, Format::narrow(f), int(left));
}

// Philox on 64-bit lanes: a product needs the low half of a lane only, so what the high halves hold never matters.
#if defined(__AVX512F__)
constexpr int kCounters = 8;
#elif defined(__AVX2__)
constexpr int kCounters = 4;
#else
constexpr int kCounters = 2;
#endif
typedef uint64_t W __attribute__((vector_size(8 * kCounters)));

FA_INLINE W multiply_low(W a, W b) {
#if defined(__AVX512F__)
  return W(_mm512_maskz_mul_epu32(0xff, __m512i(a), __m512i(b)));
#elif defined(__AVX2__)
  return W(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__x86_64__)
  return W(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The counters of kCounters neighbouring blocks, in the order in which `words_in_order` puts them right.
FA_INLINE W counters(uint64_t first) {
  W c;
  for (int i = 0; i < kCounters / 2; ++i) {
    c[2 * i] = first + i;
    c[2 * i + 1] = first + kCounters / 2 + i;
  }
  return c;
}

// low, high: the two halves of each counter's 128 random bits. out: 8 * kCounters random halves in the order of the elements.
FA_INLINE void words_in_order(W low, W high, W* out) {
#if defined(__AVX512F__)
  out[0] = W(_mm512_maskz_unpacklo_epi64(0xff, __m512i(low), __m512i(high)));
  out[1] = W(_mm512_maskz_unpackhi_epi64(0xff, __m512i(low), __m512i(high)));
#elif defined(__AVX2__)
  out[0] = W(_mm256_unpacklo_epi64(__m256i(low), __m256i(high)));
  out[1] = W(_mm256_unpackhi_epi64(__m256i(low), __m256i(high)));
#else
  out[0] = W{low[0], high[0]};
  out[1] = W{low[1], high[1]};
#endif
}

}  // namespace
}  // namespace fa::cpu::lowrank

// Codes in vectors: packed bytes to codes, codes to numbers, group numbers to one per element. Only for *_isa.cpp files: everything is in an unnamed
// namespace, so that the linker cannot merge one instruction set's copy into another's.
#pragma once
#include "float8.h"
#include "quant.h"
#include "quant_tables.h"

namespace fa::cpu::quant {
namespace {

using namespace lowrank;

FA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- packed codes ----

// Eight codes of `bits` < 8 from p, no byte further.
template <int bits>
FA_INLINE uint32_t eight(const uint8_t* p) {
  if constexpr (bits == 3)
    return uint32_t(p[0]) | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16;  // three bytes copied would wait for their store
  uint32_t word = 0;
  memcpy(&word, p, bits);
  return word;
}

// kLanes bytes as numbers. Compilers turn the generic conversions of so short vectors into dozens of instructions.
FA_INLINE U load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return U(_mm512_maskz_cvtepu8_epi32(0xffff, load<__m128i>(p)));
#elif defined(__AVX2__)
  return U(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return U{p[0], p[1], p[2], p[3]};
#endif
}
FA_INLINE I load_signed(const uint8_t* p) { return I(load_bytes(p) << 24) >> 24; }
FA_INLINE void store_bytes(uint8_t* p, U v) {
#if defined(__AVX512F__)
  store(p, _mm512_maskz_cvtepi32_epi8(0xffff, __m512i(v)));
#elif defined(__AVX2__)
  const __m256i low = _mm256_shuffle_epi8(__m256i(v), _mm256_set1_epi32(0x0c080400));
  store(p, _mm_cvtsi128_si32(_mm256_castsi256_si128(low)));
  store(p + 4, _mm_cvtsi128_si32(_mm256_extracti128_si256(low, 1)));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(v[i]);
#endif
}

// kLanes codes from element i of a row on, i a multiple of kLanes, in the lanes' low bits: what lies above them is rubbish unless `clean`.
template <int bits, bool high_first, bool clean>
FA_INLINE U codes_at(const uint8_t* row, int64_t i) {
  if constexpr (bits == 8) {
    return load_bytes(row + i);
  } else {
    U word, shift;
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) shift[lane] = uint32_t((high_first ? (lane & 7) ^ 1 : lane & 7) * bits);
#if defined(__AVX512F__)
    // Not by broadcasts under a mask: from memory they take twenty times as long where codes cross a line (Zen 5).
    const uint8_t* p = row + i / 8 * bits;
    const I half = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    const __m128i two = _mm_cvtsi64_si128(int64_t(eight<bits>(p) | uint64_t(eight<bits>(p + bits)) << 32));
    word = U(_mm512_maskz_permutexvar_epi32(0xffff, __m512i(half), _mm512_castsi128_si512(two)));
#elif defined(__AVX2__)
    word = U{} + eight<bits>(row + i / 8 * bits);
#else
    word = U{} + (eight<bits>(row + i / 8 * bits) >> int(i & 4) * bits);
#endif
    word >>= shift;
    return clean ? word & ((1u << bits) - 1) : word;
  }
}

// One code, anywhere.
FA_INLINE uint32_t code_at(const uint8_t* row, int bits, bool high_first, int64_t i) {
  if (bits == 8) return row[i];
  const int64_t bit = i * bits;
  const int at = int(high_first ? (bit & 7) ^ 4 : bit & 7);
  uint32_t two = row[bit / 8];
  if (at + bits > 8) two |= uint32_t(row[bit / 8 + 1]) << 8;
  return (two >> at) & ((1u << bits) - 1);
}

// ---- tables ----

// from[index]
FA_INLINE F picked(const float* from, U index) {
#if defined(__AVX512F__)
  return F(_mm512_mask_i32gather_ps(__m512{}, 0xffff, __m512i(index), from, 4));
#elif defined(__AVX2__)
  return F(_mm256_i32gather_ps(from, __m256i(index), 4));
#else
  F f;
  for (int i = 0; i < kLanes; ++i) f[i] = from[index[i]];
  return f;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// from[byte] for eight bytes. Zen 3 takes 3.3 ns for the processor's own gather, 1.7 ns for these loads.
FA_INLINE F picked_eight(const float* from, uint64_t b) {
  return F{from[b & 255],       from[b >> 8 & 255],  from[b >> 16 & 255], from[b >> 24 & 255],
           from[b >> 32 & 255], from[b >> 40 & 255], from[b >> 48 & 255], from[b >> 56]};
}
#endif

// from[p[lane]]
FA_INLINE F picked_bytes(const float* from, const uint8_t* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return picked_eight(from, load<uint64_t>(p));
#else
  return picked(from, load_bytes(p));
#endif
}

// kLanes bytes in the high halves of 16-bit integers.
FA_INLINE S load_high(const uint8_t* p) {
#if defined(__AVX512F__)
  return S(_mm256_slli_epi16(_mm256_cvtepu8_epi16(load<__m128i>(p)), 8));
#elif defined(__AVX2__)
  return S(_mm_unpacklo_epi8(_mm_setzero_si128(), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  S s;
  for (int i = 0; i < kLanes; ++i) s[i] = int16_t(p[i] << 8);
  return s;
#endif
}

// 2^bits numbers of 32 bits, at most 16, in registers; of an index only the low `bits` count.
template <int bits>
struct Lookup {
  F low, high;

  FA_INLINE void set(Lookup& t, const float* values) {
    float padded[16];
    for (int i = 0; i < 16; ++i) padded[i] = values[i & ((1 << bits) - 1)];
    t.low = load<F>(padded);
    if (kLanes == 8) t.high = load<F>(padded + 8);
    if (kLanes == 4) memcpy(t.small, padded, sizeof padded);
  }
  // v in place of every number of the table
  template <class Function>
  FA_INLINE Lookup map(const Lookup& t, Function f) {
    Lookup out = t;
    if (kLanes == 4)
      for (int i = 0; i < 16; i += kLanes) store(out.small + i, f(load<F>(t.small + i)));
    else
      out.low = f(t.low), out.high = f(t.high);
    return out;
  }
  FA_INLINE F at(const Lookup& t, U index) {
#if defined(__AVX512F__)
    return F(_mm512_maskz_permutexvar_ps(0xffff, __m512i(index), __m512(t.low)));
#elif defined(__AVX2__)
    const __m256 low = _mm256_permutevar8x32_ps(__m256(t.low), __m256i(index));
    if constexpr (bits < 4) return F(low);
    const __m256 high = _mm256_permutevar8x32_ps(__m256(t.high), __m256i(index));
    return F(_mm256_blendv_ps(low, high, __m256(index << 28)));
#else
    F f = {};
    for (int i = 0; i < kLanes; ++i) f[i] = t.small[index[i] & ((1u << bits) - 1)];
    return f;
#endif
  }
  float small[kLanes == 4 ? 16 : 1];
};

// ---- groups ----

// to[i] = from[(c0 + i) / side - c0 / side], i < n. Up to kLanes - 1 further are written.
FA_INLINE void spread(const float* from, int64_t c0, int64_t n, int64_t side, float* to) {
  if (side == 1) {
    memcpy(to, from, size_t(n) * sizeof(float));
    return;
  }
  for (int64_t i = 0, next = side - c0 % side; i < n; next += side, ++from) {
    const int64_t end = least(next, n);
    const F f = splat(*from);
    for (int64_t j = i; j < end; j += kLanes) store(to + j, f);
    i = end;
  }
}

// to[i] = table[bytes[i]] * above + offset, i < n
inline void coded_scales(const uint8_t* bytes, int64_t n, const float* table, float above, float offset, float* to) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  if (n >= 32) {
    Table256 t;
    for (Table256::set(t, table); i + 32 <= n; i += 32) {
      F a, b;
      Table256::in_order(t, load_wide(bytes + i), &a, &b);
      store(to + i, a * splat(above) + splat(offset)), store(to + i + kLanes, b * splat(above) + splat(offset));
    }
  }
#endif
  for (; i < n; ++i) to[i] = table[bytes[i]] * above + offset;
}

// Scales of groups [first, first + n). Up to kLanes - 1 further are written.
inline void scales_of(const Scales& s, int64_t first, int64_t n, float* to) {
  if (s.coding == Coding::kPlain)
    return with_format(s.dtype, [&](auto format) {
      using Format = decltype(format);
      const auto* from = static_cast<const typename Format::E*>(s.data) + first;
      for (int64_t i = 0; i < n; i += kLanes) store(to + i, widen_at<Format>(from + i, n - i));
    });
  const uint8_t* bytes = static_cast<const uint8_t*>(s.data) + first;
  if (s.coding == Coding::kPowers) {
    for (int64_t i = 0; i < n; ++i) to[i] = as_float(bytes[i] == 255 ? 0x7fc00000u : bytes[i] ? uint32_t(bytes[i]) << 23 : 1u << 22);
    return;
  }
  for (int64_t i = 0, end; i < n; i = end) {
    end = least(n, ((first + i) / s.block + 1) * s.block - first);
    coded_scales(bytes + i, end - i, s.table, s.above[(first + i) / s.block], s.offset ? *s.offset : -0.f, to + i);
  }
}

// The same of zeros; 0 where there are none.
inline void zeros_of(const Weight& w, int64_t first, int64_t n, float* to) {
  if (w.zero_dtype == kF32)
    memcpy(to, static_cast<const float*>(w.zero) + first, size_t(n) * sizeof(float));
  else if (w.zero_dtype == kU8)
    for (int64_t i = 0; i < n; ++i) to[i] = float(static_cast<const uint8_t*>(w.zero)[first + i]);
  else
    memset(to, 0, size_t(n) * sizeof(float));
}

}  // namespace
}  // namespace fa::cpu::quant

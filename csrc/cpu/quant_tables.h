// Tables of as many numbers as a byte has values, in AVX-512's registers: its gathers from memory take four times as long (Zen 5). Only for *_isa.cpp
// files: everything is in an unnamed namespace.
#pragma once
#include "lowrank_vector.h"

#if defined(__AVX512BW__)
namespace fa::cpu::quant {
namespace {

using namespace lowrank;

// Numbers of 16 bits, looked up by the low bits of 16-bit lanes; what lies above them does not count.
template <int count>
struct Words {
  static_assert(count == 128 || count == 256);
  __m512i part[count / 32];

  FA_INLINE void set(Words& t, const uint16_t* values) {
#pragma GCC unroll 8
    for (int i = 0; i < count / 32; ++i) t.part[i] = load<__m512i>(values + 32 * i);
  }
  // Their upper or lower halves. `which`: of the halves of two vectors.
  FA_INLINE void set(Words& t, const float* values, const uint16_t* which) {
#pragma GCC unroll 8
    for (int i = 0; i < count / 32; ++i)
      t.part[i] = _mm512_permutex2var_epi16(load<__m512i>(values + 32 * i), load<__m512i>(which), load<__m512i>(values + 32 * i + kLanes));
  }
  FA_INLINE __m512i at(const Words& t, __m512i index) {
    const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
    const __m512i low = quarter_pair(t.part, index, upper);
    if constexpr (count == 128) return low;
    return _mm512_mask_mov_epi16(low, _mm512_test_epi16_mask(index, _mm512_set1_epi16(128)),
                                 quarter_pair(t.part + count / 64, index, upper));
  }

 private:
  FA_INLINE __m512i quarter_pair(const __m512i* part, __m512i index, __mmask32 upper) {
    const __m512i low = _mm512_permutex2var_epi16(part[0], index, part[1]);
    return _mm512_mask_mov_epi16(low, upper, _mm512_permutex2var_epi16(part[2], index, part[3]));
  }
};

// 256 numbers of 32 bits: their upper and lower halves.
struct Table256 {
  Words<256> upper, lower;

  FA_INLINE void set(Table256& t, const float* values) {
    Words<256>::set(t.upper, values, kHalves.upper);
    Words<256>::set(t.lower, values, kHalves.lower);
  }
  // Of the 16-bit lanes that stand in the lower halves of 32-bit ones, and in the upper ones.
  FA_INLINE void at(const Table256& t, __m512i index, F* in_lower, F* in_upper) {
    const __m512i high = Words<256>::at(t.upper, index), low = Words<256>::at(t.lower, index);
    *in_lower = F(_mm512_mask_mov_epi16(__m512i(U(high) << 16), 0x55555555, low));
    *in_upper = F(_mm512_mask_mov_epi16(__m512i(U(low) >> 16), 0xaaaaaaaa, high));
  }
  // Of lanes 0 to 15, and of the rest.
  FA_INLINE void in_order(const Table256& t, __m512i index, F* first, F* second) {
    const __m512i high = Words<256>::at(t.upper, index), low = Words<256>::at(t.lower, index);
    const auto pair = [&](const uint16_t* halves) {
      const __m512i where = load<__m512i>(halves);
      return F(_mm512_mask_permutexvar_epi16(_mm512_maskz_permutexvar_epi16(0x55555555, where, low), 0xaaaaaaaa, where, high));
    };
    *first = pair(kHalves.twice), *second = pair(kHalves.twice + 32);
  }
};

// Floats of 8 bits, which bf16 holds exactly: of a byte's low 7 bits, the sign beside.
struct Float8Table {
  Words<128> magnitudes;

  FA_INLINE void set(Float8Table& t, const float* values) { Words<128>::set(t.magnitudes, values, kHalves.upper); }
  // bf16 of the low bytes of 16-bit lanes, with the signs of `signs`.
  FA_INLINE __m512i at(const Float8Table& t, __m512i index, __m512i signs) {
    return _mm512_ternarylogic_epi32(Words<128>::at(t.magnitudes, index), signs, _mm512_set1_epi16(-0x8000), 0xf8);  // a | (b & c)
  }
  FA_INLINE void in_order(const Float8Table& t, __m512i index, F* first, F* second) {
    widen_pair(at(t, index, _mm512_maskz_slli_epi16(~0u, index, 8)), first, second);
  }
};

// 32 bytes in 16-bit lanes.
FA_INLINE __m512i load_wide(const uint8_t* p) { return _mm512_maskz_cvtepu8_epi16(~0u, load<__m256i>(p)); }

}  // namespace
}  // namespace fa::cpu::quant
#endif

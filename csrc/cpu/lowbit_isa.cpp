// Codes of a block <-> fp32, compiled once per instruction set (FA_ISA). About 0.9 cycles an element to encode and 0.6 to decode would hide
// behind the memory of an 8-bit Adam step.
//
// The rows of the dynamic map are looked up by permutes, not by gathers; base processors use the chain of selects of core/lowbit.h.
#include "lowbit.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FA_CAT2(a, b) a##b
#define FA_CAT(a, b) FA_CAT2(a, b)

namespace fa::cpu {
namespace {

template <bool kSigned>
constexpr DynamicMap kMap = dynamic_map(kSigned);
template <bool kSigned>
constexpr Decades kDecades = decades(kSigned);

#if defined(__AVX512F__)
constexpr __mmask16 kAll = 0xffff;
#endif

uint32_t largest_key(const float* values, int n) {
  uint32_t key = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t mine = extreme_key(values[i]);
    key = mine > key ? mine : key;
  }
  return key;
}

#if defined(__AVX512F__)
// Rows twice: the permute reads sixteen lanes. The maskz forms, all lanes on: the plain ones make GCC 12 warn of an uninitialised vector.
FA_HD __m512 row(const float* values) { return _mm512_maskz_broadcast_f32x8(kAll, _mm256_loadu_ps(values)); }

template <bool kSigned>
void encode_dynamic(const float* values, int n, float inverse, uint8_t* codes) {
  const __m512 slopes = row(kDecades<kSigned>.slope), offsets = row(kDecades<kSigned>.offset), lasts = row(kDecades<kSigned>.last);
  const __m512i one = _mm512_set1_epi32(1);
  for (int i = 0; i < n; i += 16) {
    const __m512 x = _mm512_maskz_mul_ps(kAll, _mm512_loadu_ps(values + i), _mm512_set1_ps(inverse));
    const __m512i bits = _mm512_castps_si512(x);
    const __m512 a = kSigned ? _mm512_castsi512_ps(_mm512_maskz_and_epi32(kAll, bits, _mm512_set1_epi32(0x7fffffff))) : x;
    __m512i e = _mm512_setzero_si512();
    for (int k = 0; k < 7; ++k) {
      const __mmask16 above = _mm512_cmp_ps_mask(a, _mm512_set1_ps(kDecades<kSigned>.end[k]), _CMP_GT_OQ);
      e = _mm512_mask_add_epi32(e, above, e, one);
    }
    const __m512 y = _mm512_maskz_add_ps(kAll, _mm512_maskz_mul_ps(kAll, a, _mm512_maskz_permutexvar_ps(kAll, e, slopes)),
                                         _mm512_maskz_permutexvar_ps(kAll, e, offsets));
    __m512 m = _mm512_maskz_min_ps(kAll, y, _mm512_maskz_permutexvar_ps(kAll, e, lasts));
    const __mmask16 some = _mm512_cmp_ps_mask(a, _mm512_set1_ps(kSigned ? kSignedLeast : 0.f), _CMP_GT_OQ);
    if (!kSigned) m = _mm512_maskz_max_ps(kAll, m, _mm512_set1_ps(2.f));
    __m512i code = _mm512_maskz_cvttps_epi32(some, m);
    if (kSigned) {
      const __mmask16 negative = _mm512_cmplt_epi32_mask(bits, _mm512_setzero_si512());
      code = _mm512_mask_min_epi32(code, negative, code, _mm512_set1_epi32(kSignedZero));
      code = _mm512_mask_sub_epi32(code, negative, _mm512_setzero_si512(), code);
      code = _mm512_maskz_add_epi32(kAll, code, _mm512_set1_epi32(kSignedZero));
    } else {
      code = _mm512_maskz_sub_epi32(some, code, one);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_maskz_cvtepi32_epi8(kAll, code));
  }
}

template <bool kSigned>
void decode_dynamic(const uint8_t* codes, int n, float scale, float* out) {
  for (int i = 0; i < n; i += 16) {
    const __m512i at = _mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
    const __m512 x = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), kAll, at, kMap<kSigned>.value, 4);
    _mm512_storeu_ps(out + i, _mm512_maskz_mul_ps(kAll, x, _mm512_set1_ps(scale)));
  }
}

constexpr int kStep = 16;
#elif defined(__AVX2__)
template <bool kSigned>
FA_HD __m256i encode_eight(const float* values, float inverse) {
  const __m256 slopes = _mm256_loadu_ps(kDecades<kSigned>.slope), offsets = _mm256_loadu_ps(kDecades<kSigned>.offset);
  const __m256 lasts = _mm256_loadu_ps(kDecades<kSigned>.last), x = _mm256_mul_ps(_mm256_loadu_ps(values), _mm256_set1_ps(inverse));
  const __m256i bits = _mm256_castps_si256(x);
  const __m256 a = kSigned ? _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff))) : x;
  __m256i e = _mm256_setzero_si256();
#pragma GCC unroll 7
  for (int k = 0; k < 7; ++k)
    e = _mm256_sub_epi32(e, _mm256_castps_si256(_mm256_cmp_ps(a, _mm256_set1_ps(kDecades<kSigned>.end[k]), _CMP_GT_OQ)));
  const __m256 y = _mm256_add_ps(_mm256_mul_ps(a, _mm256_permutevar8x32_ps(slopes, e)), _mm256_permutevar8x32_ps(offsets, e));
  __m256 m = _mm256_min_ps(y, _mm256_permutevar8x32_ps(lasts, e));
  const __m256i some = _mm256_castps_si256(_mm256_cmp_ps(a, _mm256_set1_ps(kSigned ? kSignedLeast : 0.f), _CMP_GT_OQ));
  if (!kSigned) {
    m = _mm256_max_ps(m, _mm256_set1_ps(2.f));
    return _mm256_and_si256(_mm256_sub_epi32(_mm256_cvttps_epi32(m), _mm256_set1_epi32(1)), some);
  }
  const __m256i negative = _mm256_srai_epi32(bits, 31);
  __m256i code = _mm256_and_si256(_mm256_cvttps_epi32(m), some);
  code = _mm256_min_epi32(code, _mm256_sub_epi32(_mm256_set1_epi32(128), _mm256_srli_epi32(negative, 31)));
  return _mm256_add_epi32(_mm256_sub_epi32(_mm256_xor_si256(code, negative), negative), _mm256_set1_epi32(kSignedZero));
}

template <bool kSigned>
void encode_dynamic(const float* values, int n, float inverse, uint8_t* codes) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs work within halves
  for (int i = 0; i < n; i += 32) {
    const __m256i a = _mm256_packs_epi32(encode_eight<kSigned>(values + i, inverse), encode_eight<kSigned>(values + i + 8, inverse));
    const __m256i b = _mm256_packs_epi32(encode_eight<kSigned>(values + i + 16, inverse), encode_eight<kSigned>(values + i + 24, inverse));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), order));
  }
}

template <bool kSigned>
void decode_dynamic(const uint8_t* codes, int n, float scale, float* out) {
  for (int i = 0; i < n; i += 8) {
    const __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_i32gather_ps(kMap<kSigned>.value, at, 4), _mm256_set1_ps(scale)));
  }
}

constexpr int kStep = 32;
#else
template <bool kSigned>
void encode_dynamic(const float* values, int n, float inverse, uint8_t* codes) {
  for (int i = 0; i < n; ++i) codes[i] = dynamic_code<kSigned>(values[i] * inverse);
}

template <bool kSigned>
void decode_dynamic(const uint8_t* codes, int n, float scale, float* out) {
  for (int i = 0; i < n; ++i) out[i] = kMap<kSigned>.value[codes[i]] * scale;
}

constexpr int kStep = 1;
#endif

void encode_expanded(const float* values, int n, float absmax, float inverse, uint8_t* codes, float* scale) {
  uint32_t least = 0x7f800000u;
  for (int i = 0; i < n; ++i) {
    const uint32_t mine = as_bits(values[i]) & 0x7fffffffu;
    least = mine - 1u < least - 1u ? mine : least;  // zeros wrap around to the top
  }
  const float k = inverse != 0.f ? expansion(as_float(least) * inverse) : 1.f;
  for (int i = 0; i < n; ++i) codes[i] = expanded_code(values[i], inverse, k);
  scale[0] = absmax;
  scale[1] = k;
}

void decode(int kind, const uint8_t* codes, const float* scale, int n, float* out) {
  if (kind == kF8X) {
    const float *level = levels(), absmax = scale[0], inverse_k = 1.f / scale[1];
    for (int i = 0; i < n; ++i) out[i] = expanded_value(codes[i], level[codes[i] & 127], absmax, inverse_k);
    return;
  }
  alignas(64) uint8_t padded[kBlockPad] = {};
  const int whole = n / kStep * kStep;
  const auto run = [&](const uint8_t* in, int count, float* to) {
    kind == kD8S ? decode_dynamic<true>(in, count, scale[0], to) : decode_dynamic<false>(in, count, scale[0], to);
  };
  run(codes, whole, out);
  if (whole == n) return;
  memcpy(padded, codes + whole, size_t(n - whole));
  run(padded, kStep, out + whole);
}

void encode(int kind, float* values, int n, uint8_t* codes, float* scale) {
  const float top = scale_of(largest_key(values, n), kind == kD8S), inverse = inverse_of(top);
  if (kind == kF8X) return encode_expanded(values, n, top, inverse, codes, scale);
  alignas(64) uint8_t padded[kBlockPad];
  const int whole = n / kStep * kStep;
  const auto run = [&](const float* in, int count, uint8_t* to) {
    kind == kD8S ? encode_dynamic<true>(in, count, inverse, to) : encode_dynamic<false>(in, count, inverse, to);
  };
  scale[0] = top;
  run(values, whole, codes);
  if (whole == n) return;
  for (int i = n; i < whole + kStep; ++i) values[i] = 0.f;
  run(values + whole, kStep, padded);
  memcpy(codes + whole, padded, size_t(n - whole));
}

}  // namespace

extern const Codec FA_CAT(codec_, FA_ISA);
const Codec FA_CAT(codec_, FA_ISA) = {decode, encode};

}  // namespace fa::cpu

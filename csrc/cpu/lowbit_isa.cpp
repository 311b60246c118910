// Codes of a block <-> fp32, compiled once per instruction set (FA_ISA). With AVX2, per element: 0.5 ns to encode a dynamic map and 0.3 to decode
// it, 2.0 and 1.8 for the expanded range (one thread of a busy 2-core AMD EPYC, 2026-11-21).
//
// The rows of the dynamic map are looked up by permutes, not by gathers; base processors use the chain of selects of core/lowbit.h.
#include "lowbit.h"

#if defined(__SSE2__)
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

uint32_t largest_key(const float* values, int n) {
  uint32_t key = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t mine = extreme_key(values[i]);
    key = mine > key ? mine : key;
  }
  return key;
}

// Plain loads: the compiler's gather takes half as long again (AMD, 2026-11).
template <bool kSigned>
void decode_dynamic(const uint8_t* codes, int n, float scale, float* out) {
  const float* map = kMap<kSigned>.value;
  int i = 0;
#if defined(__SSE2__)
  for (; i + 4 <= n; i += 4) {
    const __m128 x = _mm_setr_ps(map[codes[i]], map[codes[i + 1]], map[codes[i + 2]], map[codes[i + 3]]);
    _mm_storeu_ps(out + i, _mm_mul_ps(x, _mm_set1_ps(scale)));
  }
#endif
  for (; i < n; ++i) out[i] = map[codes[i]] * scale;
}

// Also what the AVX-512 build runs: its registers are twice as wide, and the step waits for memory by then.
#if defined(__AVX2__)
// Two neighbouring powers of four hold one decade's end at most: the upper exponent bits of a choose a decade, one comparison corrects it.
// Everything below 2^-31 has the code of 2^-31.
constexpr float kLeastChosen = 0x1p-31f;
template <bool kSigned>
struct Choice {
  alignas(16) uint8_t decade[16] = {};
  constexpr Choice() {
    float low = kLeastChosen;  // of a's with (exponent field / 2) % 16 == k
    for (int k = 0; k < 16; ++k, low *= 4.f)
      for (int e = 0; e < 7; ++e) decade[k] = uint8_t(decade[k] + (low > kDecades<kSigned>.end[e]));
  }
};
template <bool kSigned>
constexpr Choice<kSigned> kChoice;

template <bool kSigned>
struct Encoder {
  const __m256 ends = _mm256_loadu_ps(kDecades<kSigned>.end), slopes = _mm256_loadu_ps(kDecades<kSigned>.slope);
  const __m256 offsets = _mm256_loadu_ps(kDecades<kSigned>.offset), lasts = _mm256_loadu_ps(kDecades<kSigned>.last);
  const __m256i choice = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kChoice<kSigned>.decade)));
  const __m256 scale;
  explicit Encoder(float inverse) : scale(_mm256_set1_ps(inverse)) {}

  FA_HD __m256i operator()(const float* values) const {
    const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(values), scale);
    const __m256i bits = _mm256_castps_si256(x);
    __m256 a = kSigned ? _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff))) : x;
    a = _mm256_max_ps(a, _mm256_set1_ps(kLeastChosen));  // of a NaN too
    __m256i e = _mm256_shuffle_epi8(choice, _mm256_srli_epi32(_mm256_castps_si256(a), 24));
    e = _mm256_sub_epi32(e, _mm256_castps_si256(_mm256_cmp_ps(a, _mm256_permutevar8x32_ps(ends, e), _CMP_GT_OQ)));
    const __m256 y = _mm256_add_ps(_mm256_mul_ps(a, _mm256_permutevar8x32_ps(slopes, e)), _mm256_permutevar8x32_ps(offsets, e));
    const __m256 m = _mm256_min_ps(y, _mm256_permutevar8x32_ps(lasts, e));
    const __m256i code = _mm256_cvttps_epi32(m);
    if (kSigned) return _mm256_add_epi32(_mm256_sign_epi32(code, bits), _mm256_set1_epi32(kSignedZero));  // the pack makes 0 of -1
    const __m256i some = _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ));
    return _mm256_and_si256(_mm256_sub_epi32(code, _mm256_set1_epi32(1)), some);
  }
};

template <bool kSigned>
void encode_dynamic(const float* values, int n, float inverse, uint8_t* codes) {
  const Encoder<kSigned> encode(inverse);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs work within halves
  for (int i = 0; i < n; i += 32) {
    const __m256i a = _mm256_packs_epi32(encode(values + i), encode(values + i + 8));
    const __m256i b = _mm256_packs_epi32(encode(values + i + 16), encode(values + i + 24));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), _mm256_permutevar8x32_epi32(_mm256_packus_epi16(a, b), order));
  }
}

constexpr int kStep = 32;
#else
template <bool kSigned>
void encode_dynamic(const float* values, int n, float inverse, uint8_t* codes) {
  for (int i = 0; i < n; ++i) codes[i] = dynamic_code<kSigned>(values[i] * inverse);
}

constexpr int kStep = 1;
#endif

// A few elements at a time in words: a loop over bytes would be vectorised by 32, and spill.
constexpr int kWords = 64;

void encode_expanded(const float* values, int n, float absmax, float inverse, uint8_t* codes, float* scale) {
  uint32_t least = ~0u;
  for (int i = 0; i < n; ++i) {
    const uint32_t mine = (as_bits(values[i]) & 0x7fffffffu) - 1u;  // zeros wrap around to the top
    least = mine < least ? mine : least;
  }
  const float k = inverse != 0.f ? expansion(as_float(least + 1u) * inverse) : 1.f;
  alignas(64) uint32_t words[kWords];
  for (int first = 0; first < n; first += kWords) {
    const int m = n - first < kWords ? n - first : kWords;
    const float* in = values + first;
    for (int i = 0; i < m; ++i) words[i] = expanded_code(in[i], inverse, k);
    for (int i = 0; i < m; ++i) codes[first + i] = uint8_t(words[i]);
  }
  scale[0] = absmax;
  scale[1] = k;
}

void decode_expanded(const uint8_t* codes, int n, const float* scale, float* out) {
  const float *level = levels(), absmax = scale[0], inverse_k = 1.f / scale[1];
  alignas(64) uint32_t words[kWords];
  alignas(64) float at[kWords];
  for (int first = 0; first < n; first += kWords) {
    const int m = n - first < kWords ? n - first : kWords;
    for (int i = 0; i < m; ++i) words[i] = codes[first + i];
    for (int i = 0; i < m; ++i) at[i] = level[words[i] & 127u];
    float* to = out + first;
    for (int i = 0; i < m; ++i) to[i] = expanded_value(words[i], at[i], absmax, inverse_k);
  }
}

void decode(int kind, const uint8_t* codes, const float* scale, int n, float* out) {
  if (kind == kF8X) return decode_expanded(codes, n, scale, out);
  kind == kD8S ? decode_dynamic<true>(codes, n, scale[0], out) : decode_dynamic<false>(codes, n, scale[0], out);
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

// Positions of the set bits of a mask, and elements by them. Compiled once per instruction set: counting bits is an instruction or a call, and AVX-512
// moves sixteen elements by a mask at once.
#include "optim.h"
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#define FA_CAT2(a, b) a##b
#define FA_CAT(a, b) FA_CAT2(a, b)

namespace fa::cpu {
namespace {

// Where the set bits of a byte are, and how many; the rest is 0.
struct Bytes {
  uint8_t at[256][8] = {}, n[256] = {};
  constexpr Bytes() {
    for (int b = 0; b < 256; ++b)
      for (int k = 0; k < 8; ++k)
        if (b >> k & 1) at[b][n[b]++] = uint8_t(k);
  }
};
constexpr Bytes kBytes;

// Sparse words bit by bit, in steps: some more positions than there are are written, since a loop over the very number of bits mispredicts its end in
// every word (10 % of 33 M: 3 of 12 ms). Dense ones byte by byte.
int positions(uint64_t word, int64_t base, int64_t* out) {
  const int n = __builtin_popcountll(word);
  if (n > 16) {
    for (int b = 0; b < 8; ++b, base += 8) {
      const int byte = int(word >> 8 * b & 255);
      for (int k = 0; k < 8; ++k) out[k] = base + kBytes.at[byte][k];
      out += kBytes.n[byte];
    }
    return n;
  }
  const auto some = [&](int from, int to) {
    for (int j = from; j < to; ++j, word &= word - 1) out[j] = base + __builtin_ctzll(word | uint64_t(1) << 63);
  };
  some(0, 4);
  if (n > 4) some(4, 8);
  if (n > 8) some(8, 16);
  return n;
}

#if defined(__AVX512BW__)
// Sixteen elements in 32-bit lanes; of memory only those with a bit are touched. (Loads by a mask do not tell the hardware what to fetch ahead: read
// by them alone, 33 M elements took three times as long.)
template <int size>
inline __m512i load_some(__mmask16 k, const char* at) {
  if constexpr (size == 4) return _mm512_maskz_loadu_epi32(k, at);
  return _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(k, at));
}

template <int size>
inline __m512i load_all(const char* at) {
  if constexpr (size == 4) return _mm512_loadu_si512(at);
  return _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

template <int size>
void pick(const uint64_t* words, int count, int whole, const char* from, char* to) {
  for (int w = 0; w < count; ++w)
    for (int part = 0; part < 4; ++part, from += 16 * size) {
      const auto k = __mmask16(words[w] >> 16 * part);
      const __m512i some = _mm512_maskz_compress_epi32(k, w < whole ? load_all<size>(from) : load_some<size>(k, from));
      if constexpr (size == 4)
        _mm512_storeu_si512(to, some);
      else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(0xffff, some));
      to += __builtin_popcount(k) * size;
    }
}

template <int size>
void put(const uint64_t* words, int count, char* to, const char* from) {
  for (int w = 0; w < count; ++w)
    for (int part = 0; part < 4; ++part, to += 16 * size) {
      const auto k = __mmask16(words[w] >> 16 * part);
      const __m512i apart = _mm512_maskz_expand_epi32(k, load_all<size>(from));
      if constexpr (size == 4)
        _mm512_mask_storeu_epi32(to, k, apart);
      else
        _mm256_mask_storeu_epi16(to, k, _mm512_maskz_cvtepi32_epi16(0xffff, apart));
      from += __builtin_popcount(k) * size;
    }
}

void pick_words(const uint64_t* words, int count, int whole, const void* from, int size, void* packed) {
  (size == 4 ? pick<4> : pick<2>)(words, count, whole, static_cast<const char*>(from), static_cast<char*>(packed));
}
void put_words(const uint64_t* words, int count, void* to, int size, const void* packed) {
  (size == 4 ? put<4> : put<2>)(words, count, static_cast<char*>(to), static_cast<const char*>(packed));
}
constexpr WordsFns kWords = {pick_words, put_words};
#else
constexpr WordsFns kWords = {nullptr, nullptr};
#endif

}  // namespace

extern const PositionsFn FA_CAT(positions_, FA_ISA);
const PositionsFn FA_CAT(positions_, FA_ISA) = positions;
extern const WordsFns FA_CAT(words_, FA_ISA);
const WordsFns FA_CAT(words_, FA_ISA) = kWords;

}  // namespace fa::cpu

// Keys of |x - base|, and which of them are near a threshold. Compiled once per instruction set (FA_ISA).
#include "merge_tile.h"

namespace fa::cpu {
namespace {

FA_HD int32_t key_of(float d) {
  const int32_t magnitude = int32_t(as_bits(d) & ~kSign), nan = -int32_t(magnitude > kInf);
  return (magnitude & ~nan) | (INT32_MAX & nan);
}

void key_tile(const Band& b, int64_t offset, int n, int32_t* __restrict out) {
  alignas(64) float base[kTile], d[kTile];
  subtract(b.x, b.dtype, offset, n, b.base ? widen(b.base, b.base_dtype, offset, n, base) : nullptr, d);
  convert(out, d, n, key_of);
}

void keys(const Band& b, int64_t begin, int64_t end, int32_t* out) {
  for (int64_t offset = begin; offset < end; offset += kTile) key_tile(b, offset, int(least(kTile, end - offset)), out + (offset - begin));
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// Which lanes of eight are chosen, moved to the front.
struct Front {
  uint64_t lanes[256];
  constexpr Front() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int to = 0;
      for (int lane = 0; lane < 8; ++lane)
        if (mask >> lane & 1) lanes[mask] |= uint64_t(lane) << 8 * to++;
    }
  }
};
constexpr Front kFront;
#endif

// Keys strictly between low and high, in order, to the front of `found`. Without a branch: whether a key is near the threshold is a toss.
FA_HD int64_t between(const int32_t* k, int n, int32_t low, int32_t high, int32_t* found) {
  int64_t count = 0;
  int i = 0;
#if defined(__AVX512F__)
  const __m512i l = _mm512_set1_epi32(low), h = _mm512_set1_epi32(high);
  for (; i + 16 <= n; i += 16) {
    const __m512i v = _mm512_loadu_si512(k + i);
    const __mmask16 in = _mm512_cmpgt_epi32_mask(v, l) & _mm512_cmpgt_epi32_mask(h, v);
    _mm512_storeu_si512(found + count, _mm512_maskz_compress_epi32(in, v));
    count += __builtin_popcount(in);
  }
#elif defined(__AVX2__)
  const __m256i l = _mm256_set1_epi32(low), h = _mm256_set1_epi32(high);
  for (; i + 8 <= n; i += 8) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(k + i));
    const unsigned in =
        unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_and_si256(_mm256_cmpgt_epi32(v, l), _mm256_cmpgt_epi32(h, v)))));
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kFront.lanes[in])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(found + count), _mm256_permutevar8x32_epi32(v, order));
    count += __builtin_popcount(in);
  }
#endif
  for (; i < n; ++i) {
    found[count] = k[i];
    count += (k[i] > low) & (k[i] < high);
  }
  return count;
}

BandCounts band(const Band& b, int64_t begin, int64_t end, int32_t* found) {
  alignas(64) int32_t k[kTile];
  BandCounts c{};
  const int32_t low = b.low, high = b.high;
  for (int64_t offset = begin; offset < end; offset += kTile) {
    const int n = int(least(kTile, end - offset));
    key_tile(b, offset, n, k);
    int32_t above = 0, at_high = 0, at_low = 0;
    for (int i = 0; i < n; ++i) {
      above += k[i] > high;
      at_high += k[i] == high;
      at_low += k[i] == low;
    }
    c.above += above;
    c.high += at_high;
    c.low += at_low;
    c.between += between(k, n, low, high, found + c.between);
  }
  return c;
}

}  // namespace

extern const BandKernels FA_CAT(band_, FA_ISA);
const BandKernels FA_CAT(band_, FA_ISA) = {band, keys};

}  // namespace fa::cpu

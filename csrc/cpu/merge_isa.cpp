// Merging a tile at a time: widen, subtract, drop, add up, round. Compiled once per instruction set (FA_ISA).
// Bytes per element: those of every model and of the base read once, those of the result written once. The operations and their order are those of
// fusedadapt/reference/merge.py. No function of the standard library's templates here: the linker might pick the AVX copy for every set.
#include "../core/philox.h"
#include "merge_tile.h"

namespace fa::cpu {
namespace {

void narrow(void* base, int dtype, int64_t offset, int n, const float* tile) {
  if (dtype == kF32) return convert(static_cast<float*>(base) + offset, tile, n, [](float f) { return f; });
  uint16_t* out = static_cast<uint16_t*>(base) + offset;
  if (dtype == kBF16) return convert(out, tile, n, [](float f) { return float_to_bf16(f); });
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(tile + i), 0));
#endif
  convert(out + i, tile + i, n - i, [](float f) { return float_to_half(f); });
}

FA_HD float only_if(bool keep, float f) { return as_float(as_bits(f) & (0u - uint32_t(keep))); }

void keep_words(float* __restrict d, const uint32_t* words, int n) {
  for (int i = 0; i < n; i += 32) {
    const uint32_t word = words[i / 32];
    const int m = n - i < 32 ? n - i : 32;
    if (word == ~0u) continue;
    for (int j = 0; j < m; ++j) d[i + j] = only_if(word >> j & 1u, d[i + j]);
  }
}

// Keeps |d| above the number with these bits.
FA_HD void keep_above(float* __restrict d, int n, int32_t bits) {
  for (int i = 0; i < n; ++i) d[i] = only_if(int32_t(as_bits(d[i]) & ~kSign) > bits, d[i]);
}

void keep_cut(float* d, const MergePart& part, int64_t offset, int n) {
  // NaN is one key whatever its bits: above infinity.
  const int32_t with = part.cut == INT32_MAX ? kInf : part.cut - 1;
  const int64_t ties = part.last - offset + 1;
  const int first = int(ties < 0 ? 0 : least(ties, n));
  keep_above(d, first, with);
  keep_above(d + first, n - first, part.cut);
}

// Philox for the blocks of one tile, eight numbers each.
#if defined(__AVX2__)
// A block's words in the low halves of 64-bit lanes: a product is the next word as it is, since only low halves are multiplied. 2.5 instructions per
// number; GCC's own way with 32-bit lanes takes three times as long.
struct Blocks {
  __m256i c0, c1, c2, c3;
};

FA_HD void philox_round(Blocks& s, __m256i k0, __m256i k1) {
  const __m256i a = _mm256_mul_epu32(s.c0, _mm256_set1_epi64x(0xD2511F53)), b = _mm256_mul_epu32(s.c2, _mm256_set1_epi64x(0xCD9E8D57));
  s.c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(b, 32), s.c1), k0);
  s.c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), s.c3), k1);
  s.c1 = b;
  s.c3 = a;
}

FA_HD void store_blocks(uint16_t* out, const Blocks& s) {
  const __m256i low = _mm256_blend_epi32(s.c0, _mm256_slli_epi64(s.c1, 32), 0xaa),
                high = _mm256_blend_epi32(s.c2, _mm256_slli_epi64(s.c3, 32), 0xaa);
  const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_permute2x128_si256(even, odd, 0x31));
}

void random_tile(uint16_t* __restrict out, uint64_t seed, uint64_t first, uint32_t tensor, uint32_t step) {
  constexpr int kSets = 2;  // side by side: a multiplication takes five cycles
  for (int b = 0; b < kTile / 8; b += 4 * kSets) {
    Blocks sets[kSets];
    for (int i = 0; i < kSets; ++i) {
      const long long at = (long long)(first + uint64_t(b + 4 * i));
      const __m256i block = _mm256_add_epi64(_mm256_set1_epi64x(at), _mm256_setr_epi64x(0, 1, 2, 3));
      sets[i] = {block, _mm256_srli_epi64(block, 32), _mm256_set1_epi64x(tensor), _mm256_set1_epi64x(step)};
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
      for (Blocks& s : sets) philox_round(s, _mm256_set1_epi64x(k0), _mm256_set1_epi64x(k1));
    for (int i = 0; i < kSets; ++i) store_blocks(out + 8 * (b + 4 * i), sets[i]);
  }
}
#else
void random_tile(uint16_t* __restrict out, uint64_t seed, uint64_t first, uint32_t tensor, uint32_t step) {
  for (int b = 0; b < kTile / 8; ++b) {
    const Philox4 r = philox(seed, first + uint64_t(b), tensor, step);
    for (int k = 0; k < 4; ++k) {
      out[8 * b + 2 * k] = uint16_t(r.v[k]);
      out[8 * b + 2 * k + 1] = uint16_t(r.v[k] >> 16);
    }
  }
}
#endif

void keep_chance(float* __restrict d, const MergeJob& job, const MergePart& part, int64_t offset, int n) {
  alignas(64) uint16_t random[kTile];
  random_tile(random, job.seed, uint64_t(offset) / 8, part.model, job.stream);
  const int32_t chance = part.chance;
  for (int i = 0; i < n; ++i) d[i] = only_if(int32_t(random[i]) < chance, d[i]);
}

// factor * keep * (x - base) of a tile.
void delta(const MergeJob& job, const MergePart& part, int64_t offset, int n, const float* base, float* __restrict d) {
  subtract(part.x, part.dtype, offset, n, base, d);
  if (part.words) keep_words(d, part.words + offset / 32, n);
  if (part.cut >= 0) keep_cut(d, part, offset, n);
  if (part.chance >= 0) keep_chance(d, job, part, offset, n);
  const float factor = part.factor;
  if (factor == 1.f) return;
  for (int i = 0; i < n; ++i) d[i] *= factor;
}

const float* base_tile(const MergeJob& job, int64_t offset, int n, float* buffer) {
  return job.base ? widen(job.base, job.base_dtype, offset, n, buffer) : nullptr;
}

// ---- combining

// total = sum of w d. Nothing dropped and bf16: one loop, without a tile between.
bool add_plain(const MergePart& part, int64_t offset, int n, const float* base, bool first, float* __restrict total) {
#if defined(__AVX2__)
  if (part.dtype != kBF16 || !base || part.words || part.cut >= 0 || part.chance >= 0 || part.factor != 1.f || n % 8) return false;
  const uint16_t* x = static_cast<const uint16_t*>(part.x) + offset;
  const __m256 weight = _mm256_set1_ps(part.weight);
  for (int i = 0; i < n; i += 8) {
    const __m256 d = _mm256_mul_ps(_mm256_sub_ps(load_bf16(x + i), _mm256_loadu_ps(base + i)), weight);
    _mm256_storeu_ps(total + i, first ? d : _mm256_add_ps(_mm256_loadu_ps(total + i), d));
  }
  return true;
#else
  (void)part, (void)offset, (void)n, (void)base, (void)first, (void)total;
  return false;
#endif
}

void sum_tile(const MergeJob& job, int64_t offset, int n, const float* base, float* __restrict d, float* __restrict total) {
  for (int k = 0; k < job.count; ++k) {
    const MergePart& part = job.parts[k];
    if (add_plain(part, offset, n, base, k == 0, total)) continue;
    delta(job, part, offset, n, base, d);
    const float w = part.weight;
    if (k == 0)
      for (int i = 0; i < n; ++i) total[i] = d[i] * w;
    else
      for (int i = 0; i < n; ++i) total[i] += d[i] * w;
  }
  if (!job.normalize) return;
  const float divisor = job.divisor;
  for (int i = 0; i < n; ++i) total[i] /= divisor;
}

// What a voter counts for: itself, or its sign.
template <bool kByCount>
FA_HD float vote(float v) {
  return kByCount ? float(int32_t(v > 0.f) - int32_t(v < 0.f)) : v;
}

// Where the sum of the votes is positive (or 0, if that counts so): 0; elsewhere the sign bit.
template <bool kByCount>
void elect(const MergeJob& job, int n, const float* voters, uint32_t* __restrict flip) {
  alignas(64) float votes[kTile];
  convert(votes, voters, n, vote<kByCount>);
  for (int k = 1; k < job.count; ++k) {
    const float* __restrict v = voters + k * kTile;
    for (int i = 0; i < n; ++i) votes[i] += vote<kByCount>(v[i]);
  }
  if (job.zero_is_positive)
    for (int i = 0; i < n; ++i) flip[i] = (uint32_t(votes[i] >= 0.f) - 1u) & kSign;
  else
    for (int i = 0; i < n; ++i) flip[i] = (uint32_t(votes[i] > 0.f) - 1u) & kSign;
}

void elect_tile(const MergeJob& job, int64_t offset, int n, const float* base, float* __restrict voters, float* __restrict total) {
  alignas(64) uint32_t flip[kTile];
  alignas(64) float divisor[kTile];
  const bool weighted = job.combine == kMergekit;
  for (int k = 0; k < job.count; ++k) {
    float* __restrict d = voters + k * kTile;
    const float w = job.parts[k].weight;
    delta(job, job.parts[k], offset, n, base, d);
    if (weighted && w != 1.f)
      for (int i = 0; i < n; ++i) d[i] *= w;
  }
  job.by_count ? elect<true>(job, n, voters, flip) : elect<false>(job, n, voters, flip);
  for (int i = 0; i < n; ++i) total[i] = divisor[i] = 0.f;
  for (int k = 0; k < job.count; ++k) {
    const float* __restrict d = voters + k * kTile;
    const float w = weighted ? 1.f : job.parts[k].weight, share = weighted ? job.parts[k].weight : 1.f;
    for (int i = 0; i < n; ++i) {
      const bool agrees = !(as_float(as_bits(d[i]) ^ flip[i]) <= 0.f);  // NaN with every sign: it must not get lost
      total[i] += only_if(agrees, d[i] * w);
      divisor[i] += only_if(agrees, share);
    }
  }
  if (weighted && !job.normalize) return;
  for (int i = 0; i < n; ++i) total[i] /= divisor[i] == 0.f ? 1.f : divisor[i];
}

void merge(const MergeJob& job, int64_t begin, int64_t end, float* scratch) {
  float *buffer = scratch, *total = scratch + kTile, *deltas = scratch + 2 * kTile;
  for (int64_t offset = begin; offset < end; offset += kTile) {
    const int n = int(least(kTile, end - offset));
    const float* base = base_tile(job, offset, n, buffer);
    if (job.combine == kSum)
      sum_tile(job, offset, n, base, deltas, total);
    else
      elect_tile(job, offset, n, base, deltas, total);
    const float lambda = job.lambda;
    if (lambda != 1.f)
      for (int i = 0; i < n; ++i) total[i] *= lambda;
    if (base)
      for (int i = 0; i < n; ++i) total[i] = base[i] + total[i];
    narrow(job.out, job.out_dtype, offset, n, total);
  }
}

template <bool kByCount>
int64_t votes_of(const MergeJob& job, int64_t begin, int64_t end, float* scratch) {
  float *buffer = scratch, *total = scratch + kTile, *d = scratch + 2 * kTile;
  int64_t count = 0;
  for (int64_t offset = begin; offset < end; offset += kTile) {
    const int n = int(least(kTile, end - offset));
    const float* base = base_tile(job, offset, n, buffer);
    std::fill_n(total, n, 0.f);
    for (int k = 0; k < job.count; ++k) {
      delta(job, job.parts[k], offset, n, base, d);
      for (int i = 0; i < n; ++i) total[i] += vote<kByCount>(d[i]);
    }
    int32_t part = 0;
    for (int i = 0; i < n; ++i) part += int32_t(total[i] > 0.f) - int32_t(total[i] < 0.f);
    count += part;
  }
  return count;
}

int64_t votes(const MergeJob& job, int64_t begin, int64_t end, float* scratch) {
  return job.by_count ? votes_of<true>(job, begin, end, scratch) : votes_of<false>(job, begin, end, scratch);
}

// ---- norms

FA_HD void add_absolute(double* __restrict lanes, const float* __restrict d, int n) {
  for (int i = 0; i < n; ++i) lanes[i] += double(as_float(as_bits(d[i]) & ~kSign));
}

FA_HD double halved(double* lanes) {
  for (int half = kTile / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// One running sum per position in the tile, added in halves at the end: an order that vectorises and that the truth can follow.
void norms(const MergeJob& job, int64_t begin, int64_t end, double* every, double* some) {
  alignas(64) float buffer[kTile], d[kTile];
  alignas(64) double all[kTile] = {}, kept[kTile] = {};
  MergePart whole = job.parts[0];
  whole.words = nullptr;
  whole.cut = whole.chance = -1;
  whole.factor = 1.f;
  for (int64_t offset = begin; offset < end; offset += kTile) {
    const int n = int(least(kTile, end - offset));
    const float* base = base_tile(job, offset, n, buffer);
    delta(job, whole, offset, n, base, d);
    add_absolute(all, d, n);
    delta(job, job.parts[0], offset, n, base, d);
    add_absolute(kept, d, n);
  }
  *every = halved(all);
  *some = halved(kept);
}

}  // namespace

extern const MergeKernels FA_CAT(merge_, FA_ISA);
const MergeKernels FA_CAT(merge_, FA_ISA) = {merge, votes, norms};

}  // namespace fa::cpu

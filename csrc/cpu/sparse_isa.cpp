// Keys of a tile, and what is done with them: count, compare, rank, sum. Compiled once per instruction set (FA_ISA).
// A tile's scores become signed keys in an L1 buffer (plain loops, vectorised by the compiler); only comparing to a bit per element is written
// with intrinsics. No function of the standard library's templates here: the linker might pick the AVX copy for every set.
#include "../core/dtypes.h"
#include "sparse.h"
#include "sparse_keys.h"

#define FA_CAT2(a, b) a##b
#define FA_CAT(a, b) FA_CAT2(a, b)

namespace fa::cpu {
namespace {

FA_HD uint32_t low_bits(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1u; }

// The lowest `budget` set bits of w; takes them off the budget.
FA_HD uint32_t first_bits(uint32_t w, int64_t* budget) {
  const int count = __builtin_popcount(w);
  if (count <= *budget) {
    *budget -= count;
    return w;
  }
  uint32_t kept = 0;
  for (; *budget > 0; --*budget, w &= w - 1) kept |= w & (0u - w);
  return kept;
}

// ---- histogram

FA_HD uint32_t slot(int32_t key, int shift, uint32_t mask) { return (((uint32_t(key) ^ kSign) >> shift) & mask) * kCopies; }

FA_HD void count_slots(const uint32_t* slots, int n, uint32_t* counts) {
  int i = 0;
  for (; i + 4 <= n; i += 4) {
    ++counts[slots[i]];
    ++counts[slots[i + 1] + 1];
    ++counts[slots[i + 2] + 2];
    ++counts[slots[i + 3] + 3];
  }
  for (; i < n; ++i) ++counts[slots[i]];
}

// The keys of a group of at most 32 that are in `hits`.
FA_HD void count_hits(const int32_t* keys, int n, uint32_t hits, int shift, int bits, uint32_t* counts) {
  const uint32_t mask = (1u << bits) - 1u;
  if (__builtin_popcount(hits) <= 8) {
    for (; hits; hits &= hits - 1) ++counts[slot(keys[__builtin_ctz(hits)], shift, mask)];
    return;
  }
  alignas(64) uint32_t slots[32];
  for (int i = 0; i < n; ++i) {
    const uint32_t miss = (hits >> i & 1u) - 1u;  // all ones: counted beyond the last bin
    slots[i] = (slot(keys[i], shift, mask) & ~miss) | (((mask + 1) * kCopies) & miss);
  }
  count_slots(slots, n, counts);
}

void histogram(const Source& s, int64_t begin, int64_t end, int shift, int bits, bool filtered, int32_t prefix, uint32_t* counts) {
  alignas(64) int32_t keys[kTile];
  alignas(64) uint32_t slots[kTile];
  const uint32_t mask = (1u << bits) - 1u;
  const int above_bits = shift + bits;
  for (int64_t offset = begin; offset < end; offset += kTile) {
    const int n = int(least(kTile, end - offset));
    tile_keys(s, offset, n, keys);
    if (!filtered) {
      for (int i = 0; i < n; ++i) slots[i] = slot(keys[i], shift, mask);
      count_slots(slots, n, counts);
      continue;
    }
    for (int i = n; i < (n + 31) / 32 * 32; ++i) keys[i] = 0;
    for (int i = 0; i < n; i += 32) {
      const uint32_t hits = same(keys + i, above_bits, prefix >> above_bits) & low_bits(n - i);
      if (hits) count_hits(keys + i, int(least(32, n - i)), hits, shift, bits, counts);
    }
  }
}

// ---- mark

int64_t mark(const Source& s, int64_t begin, int64_t end, int32_t threshold, uint32_t* words) {
  alignas(64) int32_t keys[kTile];
  int64_t equal = 0;
  for (int64_t offset = begin; offset < end; offset += kTile) {
    const int n = int(least(kTile, end - offset));
    tile_keys(s, offset, n, keys);
    int count = 0;
    for (int i = 0; i < n; ++i) count += keys[i] == threshold;
    equal += count;
    for (int i = n; i < (n + 31) / 32 * 32; ++i) keys[i] = kLowest;  // above nothing
    for (int i = 0; i < n; i += 32) words[(offset + i) / 32] = above(keys + i, threshold);
  }
  return equal;
}

void mark_equal(const Source& s, int64_t begin, int64_t end, int32_t threshold, int64_t budget, uint32_t* words) {
  alignas(64) int32_t keys[kTile];
  for (int64_t offset = begin; offset < end && budget > 0; offset += kTile) {
    const int n = int(least(kTile, end - offset));
    tile_keys(s, offset, n, keys);
    for (int i = n; i < (n + 31) / 32 * 32; ++i) keys[i] = 0;
    for (int i = 0; i < n; i += 32) words[(offset + i) / 32] |= first_bits(same(keys + i, 0, threshold) & low_bits(n - i), &budget);
  }
}

// ---- runs

struct Cut {
  int32_t threshold;
  int64_t equal;  // how many of those that equal it are kept
};

int64_t at_least(const int32_t* keys, int64_t n, int32_t t) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 4096) {
    int32_t part = 0;
    for (int64_t j = i, stop = least(n, i + 4096); j < stop; ++j) part += keys[j] >= t;
    count += part;
  }
  return count;
}

// The k-th largest of n keys, 0 < k < n: bit by bit from the top, counting. SIMD makes a count cost 1/8 cycle per key, and once exactly k
// are left, the smallest of them is the answer.
int32_t kth_largest(const int32_t* keys, int64_t n, int64_t k) {
  uint32_t found = 0;
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t next = found | 1u << bit;
    const int64_t count = at_least(keys, n, int32_t(next ^ kSign));
    if (count < k) continue;
    found = next;
    if (count > k) continue;
    const int32_t floor = int32_t(next ^ kSign);
    int32_t smallest = INT32_MAX;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t key = keys[i] >= floor ? keys[i] : INT32_MAX;
      smallest = key < smallest ? key : smallest;
    }
    return smallest;
  }
  return int32_t(found ^ kSign);
}

Cut cut_of(const int32_t* keys, int64_t n, int64_t k, int ties) {
  if (k <= 0) return {INT32_MAX, 0};
  if (k >= n) return {kLowest, n};
  const int32_t threshold = kth_largest(keys, n, k);
  const int64_t with = at_least(keys, n, threshold);
  const int64_t over = threshold == INT32_MAX ? 0 : at_least(keys, n, threshold + 1);
  if (ties == kLowestIndex) return {threshold, k - over};
  return {threshold, ties == kInclusive || with <= k ? with - over : 0};
}

// Writes runs of bits one after the other.
struct BitWriter {
  uint32_t* out;
  uint64_t pending = 0;
  int filled = 0;
  FA_HD void put(uint32_t word, int bits) {
    pending |= uint64_t(word) << filled;
    filled += bits;
    if (filled >= 32) {
      *out++ = uint32_t(pending);
      pending >>= 32;
      filled -= 32;
    }
  }
  FA_HD void finish() {
    if (filled) *out++ = uint32_t(pending);
    pending = 0;
    filled = 0;
  }
};

void read_keys(const Source& s, int64_t begin, int64_t n, int32_t* keys) {
  for (int64_t i = 0; i < n; i += kTile) tile_keys(s, begin + i, int(least(kTile, n - i)), keys + i);
}

void middle_rows(const Rows32& job, int64_t first, int64_t last, int32_t* keys) {
  const int64_t n = job.length, per_row = (n + 31) / 32;
  BitWriter writer{job.words + (job.aligned ? first * per_row : first * n / 32)};
  for (int64_t row = first; row < last; ++row) {
    read_keys(job.source, row * n, n, keys);
    Cut cut = cut_of(keys, n, job.k, job.ties);
    for (int64_t i = n; i < per_row * 32; ++i) keys[i] = kLowest;
    for (int64_t i = 0; i < n; i += 32) {
      uint32_t word = above(keys + i, cut.threshold);
      if (cut.equal > 0) word |= first_bits(same(keys + i, 0, cut.threshold) & low_bits(n - i), &cut.equal);
      writer.put(word, int(least(32, n - i)));
    }
    if (job.aligned) writer.finish();
  }
  writer.finish();
}

// As wide as the registers: the compiler takes wider vectors apart into scalars.
typedef int32_t Lanes4 __attribute__((vector_size(16)));
#if defined(__AVX2__)
typedef int32_t Lanes __attribute__((vector_size(32)));
#else
typedef Lanes4 Lanes;
#endif

// The table of which lanes an equal element j goes before, and how many may come before one that is kept.
template <class Vector, int kParts>
struct Order {
  static constexpr int kWidth = int(sizeof(Vector) / 4), kLanes = kWidth * kParts;
  Vector before[kLanes][kParts];
  int32_t room;

  explicit Order(const Rows32& job) : room(int32_t(least(job.k, job.length)) + (job.ties == kExclusive)) {
    for (int j = 0; j < kLanes; ++j)
      for (int i = 0; i < kLanes; ++i)
        before[j][i / kWidth][i % kWidth] = -int32_t(job.ties == kExclusive || (job.ties == kLowestIndex && j < i));
  }

  // left[i] > 0 where element i of a run of m is kept. Reads and writes kLanes numbers.
  FA_HD void rank(const int32_t* keys, int m, int32_t* left) const {
    Vector mine[kParts], rest[kParts];
    for (int p = 0; p < kParts; ++p) {
      Vector v;  // arrays whose address is taken would live in memory, not in registers
      memcpy(&v, keys + p * kWidth, sizeof v);
      mine[p] = v;
      rest[p] = Vector{} + room;
    }
    for (int j = 0; j < m; ++j)
      for (int p = 0; p < kParts; ++p) rest[p] += (keys[j] > mine[p]) | ((keys[j] == mine[p]) & before[j][p]);
    for (int p = 0; p < kParts; ++p) {
      const Vector v = rest[p];
      memcpy(left + p * kWidth, &v, sizeof v);
    }
  }
};

// Runs that fit a few vectors: how many of its run come before each element, all of them side by side.
template <class Vector, int kParts>
void small_rows(const Rows32& job, int64_t first, int64_t last, int32_t* keys) {
  const Order<Vector, kParts> order(job);
  const int m = int(job.length);
  const int64_t batch = 1024 / (32 * m) * 32;  // runs at a time: a whole number of words
  int32_t* left = keys + 1024 + 32;
  BitWriter writer{job.words + (job.aligned ? first : first * m / 32)};
  for (int64_t row = first; row < last; row += batch) {
    const int runs = int(least(batch, last - row)), n = runs * m;
    read_keys(job.source, row * m, n, keys);
    for (int r = 0; r < runs; ++r) {
      order.rank(keys + r * m, m, left + r * m);  // the lanes beyond the run are the next run's, written next
      if (job.aligned) writer.put(above(left + r * m, 0) & low_bits(m), 32);
    }
    for (int i = 0; i < n && !job.aligned; i += 32) writer.put(above(left + i, 0) & low_bits(n - i), int(least(32, n - i)));
  }
  writer.finish();
}

void rows(const Rows32& job, int64_t first, int64_t last, int32_t* keys) {
  constexpr int kEight = int(32 / sizeof(Lanes));
  const auto run = job.length <= 4    ? small_rows<Lanes4, 1>
                   : job.length <= 8  ? small_rows<Lanes, kEight>
                   : job.length <= 16 ? small_rows<Lanes, 2 * kEight>
                   : job.length <= 32 ? small_rows<Lanes, 4 * kEight>
                                      : middle_rows;
  run(job, first, last, keys);
}

// ---- sums

void energy(const Source& s, int64_t begin, int64_t end, uint64_t* sums) {
  alignas(64) float scores[kTile];
  for (int64_t offset = begin; offset < end; offset += kTile) {
    const int n = int(least(kTile, end - offset));
    tile_scores(s, offset, n, scores);
    for (int i = 0; i < n; ++i) {
      const uint32_t size = as_bits(scores[i]) & 0x7fffffffu;
      const uint64_t significand = (size & 0x7fffffu) | uint32_t(size > 0x7fffffu) << 23;
      uint64_t* bin = sums + 4 * ((uint32_t(key_of(scores[i], kLowest)) ^ kSign) >> (32 - kEnergyBits));
      ++bin[0];
      bin[1] += significand;
      bin[2] += significand * significand;
    }
  }
}

void colstat(const void* x, int dtype, int64_t columns, int64_t t0, int64_t t1, int64_t c0, int64_t c1, double* __restrict acc) {
  alignas(64) float buffer[kTile];
  for (int64_t t = t0; t < t1; ++t)
    for (int64_t c = c0; c < c1; c += kTile) {
      const int n = int(least(kTile, c1 - c));
      const float* row = widen(x, dtype, t * columns + c, n, buffer);
      double* out = acc + (c - c0);
      for (int i = 0; i < n; ++i) out[i] += double(row[i]) * double(row[i]);
    }
}

void pack(const uint8_t* mask, int64_t n, uint32_t* words) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 32 <= n; i += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + i));
    words[i / 32] = ~uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())));
  }
#elif defined(__SSE2__)
  for (; i + 32 <= n; i += 32) {
    uint32_t empty = 0;
    for (int half = 0; half < 2; ++half) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + i + 16 * half));
      empty |= uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(v, _mm_setzero_si128()))) << 16 * half;
    }
    words[i / 32] = ~empty;
  }
#endif
  for (; i < n; i += 32) {
    uint32_t word = 0;
    for (int64_t j = 0; j < least(32, n - i); ++j) word |= uint32_t(mask[i + j] != 0) << j;
    words[i / 32] = word;
  }
}

int64_t popcount(const uint32_t* words, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
#if defined(__POPCNT__)
    count += __builtin_popcount(words[i]);
#else  // the library's table look-up does not vectorise
    uint32_t v = words[i] - ((words[i] >> 1) & 0x55555555u);
    v = (v & 0x33333333u) + ((v >> 2) & 0x33333333u);
    count += ((v + (v >> 4)) & 0x0f0f0f0fu) * 0x01010101u >> 24;
#endif
  }
  return count;
}

}  // namespace

extern const SparseKernels FA_CAT(sparse_, FA_ISA);
const SparseKernels FA_CAT(sparse_, FA_ISA) = {histogram, mark, mark_equal, rows, energy, pack, popcount, colstat};

}  // namespace fa::cpu

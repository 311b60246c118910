// Selection within runs of consecutive elements: rows, blocks, N:M. Reads x once (a long row that shared memory does not hold: once for every
// digit, from the cache), writes n / 8.
//
// Short runs by rank: how many of its run come before each element. Longer ones by radix: a thread block finds the cut of its row digit by digit,
// eight bits of the key at a time, and looks no further once all that are left over fit.
#include "sparse_bins.cuh"

namespace fa::cuda {
namespace {

constexpr int kWarps = kThreads / int(kWarp), kShort = 32;  // by rank up to here

// ---- by rank

// Whether another element takes a place that `own` might have had. With exclusive ties its equals do, and it does so to them: they stay only
// where all of them fit.
FA_DEVICE bool ahead(uint32_t other, uint32_t own, bool earlier, int ties) {
  return other > own || (other == own && (ties == kExclusive || (ties == kLowestIndex && earlier)));
}

// Which of the eight are among the k largest of their m neighbours: m of them are this thread's.
template <int m>
FA_DEVICE uint32_t best_of(const uint32_t (&key)[kEach], int k, int ties) {
  uint32_t kept = 0;
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) {
    int rank = 0;
    FA_UNROLL
    for (int o = 0; o < m; ++o) {
      const int i = j / m * m + o;
      if (i != j) rank += ahead(key[i], key[j], i < j, ties);
    }
    kept |= uint32_t(rank < k) << j;
  }
  return kept;
}

FA_DEVICE uint32_t best_of_group(const uint32_t (&key)[kEach], int k, int m, int ties) {
  return m == 2 ? best_of<2>(key, k, ties) : m == 4 ? best_of<4>(key, k, ties) : best_of<8>(key, k, ties);
}

// m is 2, 4 or 8.
__global__ void __launch_bounds__(kThreads) nm_kernel(Selection s, int k, int m, int ties) {
  const SparseItem item = s.items[0];
  const int64_t begin = (int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kRun;
  if (begin >= item.n) return;
  Loaded l;
  load_item(l, item, s.score, begin);
  uint32_t key[kEach], kept = 0;
  keys_of(key, l, item, s.score, s.nan_key);
  if (l.run.vector) {
    kept = best_of_group(key, k, m, ties);
  } else {
    // Strided: element j of a lane has its group in the lanes around.
    const unsigned lane = lane_id(), base = lane / unsigned(m) * unsigned(m);
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) {
      int rank = 0;
      for (int o = 0; o < m; ++o) {
        const uint32_t other = shfl(key[j], base + unsigned(o));
        rank += base + unsigned(o) != lane && ahead(other, key[j], base + unsigned(o) < lane, ties);
      }
      kept |= uint32_t(rank < k) << j;
    }
    kept &= l.run.valid;
  }
  store_bits(item.words, begin, item.n, in_order(kept, l.run.vector));
}

FA_DEVICE uint32_t key_at(const SparseItem& item, const Selection& s, int64_t i) {
  Loaded l;
  l.run = {i, 1u, false};
  load_run(l.x, item.x, item.dtype == kF32, l.run);
  if (s.score == kAbsScaled)
    l.other[0] = as_bits(static_cast<const float*>(item.other)[i % item.columns]);
  else if (s.score != kAbs && s.score != kGiven)
    load_run(l.other, item.other, item.other_dtype == kF32, l.run);
  uint32_t key[kEach];
  keys_of(key, l, item, s.score, s.nan_key);
  return key[0];
}

// Any other m: a lane an element, its neighbours from memory (the cache has them).
__global__ void __launch_bounds__(kThreads) nm_any_kernel(Selection s, int k, int m, int ties) {
  const SparseItem item = s.items[0];
  const int64_t word = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp, i = word * kWarp + lane_id();
  if (word * kWarp >= item.n) return;
  int rank = k;
  if (i < item.n) {
    const uint32_t own = key_at(item, s, i);
    const int64_t group = i / m * m;
    rank = 0;
    for (int64_t o = group; o < group + m; ++o)
      if (o != i) rank += ahead(key_at(item, s, o), own, o < i, ties);
  }
  const uint32_t kept = ballot(rank < k);
  if (lane_id() == 0) reinterpret_cast<uint32_t*>(item.words)[word] = kept;
}

// ---- by radix

constexpr int kRowThreads = 512, kRowWarps = kRowThreads / int(kWarp), kDigits = 256, kPasses = 4;

// Where a row's bits go: rows are whole words; each begins on a new one; neighbours share words (zeros before).
enum Layout : int { kWhole, kOnNew, kShared };

struct RowJob {
  uint32_t k, length;
  int ties, passes;  // passes: digits that keys of this kind differ in
  Layout layout;
  bool kept;  // keys stay in shared memory
  uint8_t* words;
};

// A warp's share of a row: runs [from, to) from `origin` on; elements outside [first, first + length) are neighbours'.
struct Share {
  int64_t origin, first, end;
  int from, to;
};

// Of a run: its keys and which of them are the row's. `kept`: where this thread keeps its keys, or null; `again`: it has them there.
template <bool kOther>
FA_DEVICE unsigned row_keys(uint32_t (&key)[kEach], bool& vector, const SparseItem& item, const Selection& s, const Share& share, int run,
                            uint32_t* kept, bool again) {
  const int64_t begin = share.origin + int64_t(run) * kRun;
  Loaded l;
  if (again) {
    l.run = run_at(begin, item.n, item.aligned != 0);
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) key[j] = kept[run * kRun + j * int(kWarp)];
  } else {
    const int32_t score = kOther ? s.score : s.score == kGiven ? int32_t(kGiven) : int32_t(kAbs);
    load_item(l, item, score, begin);
    keys_of(key, l, item, score, s.nan_key);
    if (kept) {
      FA_UNROLL
      for (int j = 0; j < kEach; ++j) kept[run * kRun + j * int(kWarp)] = key[j];
    }
  }
  vector = l.run.vector;
  unsigned mine = l.run.valid;
  if (begin < share.first || begin + kRun > share.end) {
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) {
      const int64_t i = index(l.run, j);
      if (i < share.first || i >= share.end) mine &= ~(1u << j);
    }
  }
  return mine;
}

struct Digit {
  uint32_t digit, above, same;  // above: keys with a larger digit; same: with this one
};

// The digit of the k-th largest. Each warp for itself: every lane has eight of the digits, lane 0 the largest.
FA_DEVICE Digit find_digit(const uint32_t* counts, uint32_t k) {
  uint32_t sum = 0;
  const int top = kDigits - 1 - int(lane_id()) * kEach;
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) sum += counts[top - j];
  const uint32_t reached = warp_scan(sum);
  const unsigned leader = unsigned(lowest_bit(ballot(reached >= k)));
  Digit d{uint32_t(top), reached - sum, counts[top]};
  for (int j = 1; j < kEach && d.above + d.same < k; ++j) d = {uint32_t(top - j), d.above + d.same, counts[top - j]};
  return {shfl(d.digit, leader), shfl(d.above, leader), shfl(d.same, leader)};
}

// As store_bits, into words that neighbouring rows share: `begin` is a multiple of 32.
FA_DEVICE void or_bits(uint8_t* words, int64_t begin, uint32_t byte) {
  uint32_t word = byte << lane_id() % 4 * 8;
  word |= shfl_xor(word, 1);
  word |= shfl_xor(word, 2);
  if (lane_id() % 4 == 0 && word) atomic_or(reinterpret_cast<uint32_t*>(words) + begin / int(kWarp) + lane_id() / 4, word);
}

// kOther: the score has a second operand, and its registers.
template <bool kOther>
__global__ void __launch_bounds__(kRowThreads, kOther ? 1 : 2) rows_kernel(Selection s, RowJob job) {
  FA_SHARED(uint32_t, counts, [kPasses * kDigits]);
  FA_SHARED(uint32_t, ties_of, [kRowWarps]);
  uint32_t* kept = job.kept ? dynamic_shared<uint32_t>() + lane_id() : nullptr;
  SparseItem item = s.items[0];
  const int warps = int(blockDim.x / kWarp), warp = int(threadIdx.x / kWarp);
  Share share;
  share.first = int64_t(blockIdx.x) * job.length;
  share.origin = job.layout == kShared ? share.first / int(kWarp) * int(kWarp) : share.first;
  share.end = share.first + job.length;
  item.aligned = item.aligned && share.origin % kEach == 0;
  const int runs = int((share.end - share.origin + kRun - 1) / kRun), each = (runs + warps - 1) / warps;
  share.from = warp * each < runs ? warp * each : runs;
  share.to = share.from + each < runs ? share.from + each : runs;
  for (int i = int(threadIdx.x); i < kPasses * kDigits; i += int(blockDim.x)) counts[i] = 0;
  syncthreads();

  uint32_t key[kEach], prefix = 0, left = job.k, same = 0;
  int shift = 32;
  bool vector;
  for (int pass = 0; pass < job.passes && same != left; ++pass) {
    uint32_t* bins = counts + pass * kDigits;
    shift -= 8;
    for (int run = share.from; run < share.to; ++run) {
      const unsigned mine = row_keys<kOther>(key, vector, item, s, share, run, kept, kept && pass);
      FA_UNROLL
      for (int j = 0; j < kEach; ++j) {
        const bool wanted = (mine >> j & 1u) && key[j] >> shift >> 8 == prefix;  // a shift by 32 is undefined, so in two
        key[j] = wanted ? key[j] >> shift & (kDigits - 1u) : kNoBin;
      }
      tally(key, [bins](uint32_t digit, uint32_t n) { atomic_add(bins + digit, n); });
    }
    syncthreads();
    const Digit d = find_digit(bins, left);
    prefix = prefix << 8 | d.digit;
    left -= d.above;
    same = d.same;
  }

  // Keys above the prefix, and of those at it the first so many.
  uint32_t room = job.ties == kLowestIndex ? left : job.ties == kInclusive || same == left ? same : 0u;
  if (room && room < same) {
    uint32_t mine = 0;
    for (int run = share.from; run < share.to; ++run) {
      const unsigned row = row_keys<kOther>(key, vector, item, s, share, run, kept, kept != nullptr);
      FA_UNROLL
      for (int j = 0; j < kEach; ++j) mine += (row >> j & 1u) && key[j] >> shift == prefix;
    }
    mine = warp_sum(mine);
    if (lane_id() == 0) ties_of[warp] = mine;
    syncthreads();
    for (int w = 0; w < warp; ++w) room -= ties_of[w] < room ? ties_of[w] : room;
  }
  uint8_t* words = job.words + (job.layout == kOnNew ? int64_t(blockIdx.x) * ((int64_t(job.length) + 31) / 32 * 4) : share.origin / 8);
  for (int run = share.from; run < share.to; ++run) {
    const unsigned row = row_keys<kOther>(key, vector, item, s, share, run, kept, kept != nullptr);
    uint32_t above = 0, tie = 0;
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) {
      above |= uint32_t(key[j] >> shift > prefix) << j;
      tie |= uint32_t(key[j] >> shift == prefix) << j;
    }
    above = in_order(above & row, vector);
    tie = in_order(tie & row, vector);
    const uint32_t own = uint32_t(bits_set(tie)), upto = warp_scan(own);
    tie = upto - own < room ? first_bits(tie, int64_t(room) - (upto - own)) : 0u;
    const uint32_t met = shfl(upto, kWarp - 1);
    room -= met < room ? met : room;
    if (job.layout == kShared)
      or_bits(words, int64_t(run) * kRun, above | tie);
    else
      store_bits(words, int64_t(run) * kRun, job.length, above | tie);
  }
}

// Digits in which keys can differ: sixteen-bit numbers have no bits below.
int passes_of(const Selection& s, int dtype) {
  if (s.score != kAbs && s.score != kGiven) return kPasses;
  return dtype == kBF16 ? 2 : dtype == kF16 ? 3 : kPasses;
}

template <bool kOther>
void launch_rows(const Selection& s, RowJob job, int64_t count, int most_shared, Place place) {
  const int64_t runs = (int64_t(job.length) + (job.layout == kShared ? kShort - 1 : 0) + kRun - 1) / kRun;
  const int64_t bytes = runs * kRun * int64_t(sizeof(uint32_t)), warps = runs / 2 < 1 ? 1 : runs / 2 < kRowWarps ? runs / 2 : kRowWarps;
  job.kept = bytes <= shared_limit(place.device, most_shared);
  allow_shared(rows_kernel<kOther>, place.device);
  FA_LAUNCH(rows_kernel<kOther>, blocks_for(count), unsigned(warps) * kWarp, job.kept ? size_t(bytes) : 0,
            static_cast<cudaStream_t>(place.stream), s, job);
}

}  // namespace

void rows(const Selection& s, const Rows& r, int most_shared, Place place) {
  if (!s.tiles) return;
  const DeviceGuard guard(place.device, "sparse.rows");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const bool whole = r.length % int(kWarp) == 0;
  if (r.length <= kShort && (whole || !r.aligned)) {
    const bool in_registers = r.length == 2 || r.length == 4 || r.length == 8;
    const int64_t elements = s.tiles * kTile, a_block = in_registers ? kWarps * kRun : kThreads;
    FA_LAUNCH(in_registers ? nm_kernel : nm_any_kernel, blocks_for(elements / a_block), kThreads, 0, stream, s, int(r.k), int(r.length),
              r.ties);
    return check(cudaGetLastError(), "sparse.rows");
  }
  const RowJob job{uint32_t(r.k),
                   uint32_t(r.length),
                   r.ties,
                   passes_of(s, r.dtype),
                   whole       ? kWhole
                   : r.aligned ? kOnNew
                               : kShared,
                   false,
                   reinterpret_cast<uint8_t*>(r.words)};
  if (!r.k || job.layout == kShared) check(cudaMemsetAsync(r.words, 0, size_t(r.bytes), stream), "sparse.rows");
  if (!r.k) return;
  const auto launch = s.score == kAbs || s.score == kGiven ? launch_rows<false> : launch_rows<true>;
  launch(s, job, r.count, most_shared, place);
  check(cudaGetLastError(), "sparse.rows");
}

}  // namespace fa::cuda

// Exact selection over a list of tensors: histograms of key bits and the bin search. See reference/sparse.py for what a key is.
//
// Bytes: one read of x per level. bf16 and fp16 |x| need one level (15 bits are the whole key), fp32
// two of 16 bits. Everything is integer arithmetic: sums in any order are the same, so atomics are deterministic here.
#include "sparse_bins.cuh"

namespace fa::cuda {
namespace {

// How a histogram keeps its counters.
//   kNative  15 bits straight from the 16-bit |x|, 32 bits a counter
//   kWide    32 bits a counter; of 16-bit levels of keys that are all of numbers >= 0, the upper half alone (32,768: 128 KiB)
//   kPacked  16 bits a counter, 65,536 in 128 KiB; added to the totals before one can overflow
enum Counters { kNative, kWide, kPacked };

struct Bins {
  int first, count;  // those this launch counts
  int64_t* totals;   // [2^bits]
  bool folded;       // bin b is 0x8000 + b, the last is NaN's
  bool lowest;       // NaN's is bin 0 of the totals
};

template <Counters kKind>
FA_DEVICE void find_bins(uint32_t (&bin)[kEach], Loaded& l, const SparseItem& item, const Selection& s, const Level& level, int64_t prefix,
                         const Bins& bins) {
  if (kKind == kNative) {
    const uint32_t infinity = level.native == kBF16 ? 0x7f80u : 0x7c00u;
    if (l.run.vector) unpack(l.x);
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) {
      const uint32_t size = l.x[j] & 0x7fffu;
      bin[j] = size > infinity ? 0x7fffu : size;
    }
  } else {
    keys_of(bin, l, item, s.score, s.nan_key);
    const int above = level.shift + level.bits;
    const uint32_t wanted = uint32_t(prefix), mask = (1u << level.bits) - 1u;
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) {
      const uint32_t key = bin[j];
      // a shift by 32 is undefined, so in two
      const bool mine = prefix < 0 || (key >> (above - 1) >> 1) == wanted;
      uint32_t b = key >> level.shift & mask;
      if (bins.folded) b = key ? b & 0x7fffu : 0x7fffu;
      bin[j] = mine ? b : kNoBin;
    }
  }
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) {
    const uint32_t b = bin[j] - uint32_t(bins.first);
    bin[j] = (l.run.valid >> j & 1u) && bin[j] != kNoBin && b < uint32_t(bins.count) ? b : kNoBin;
  }
}

// Adds the block's counters to the totals and clears them.
template <Counters kKind>
FA_DEVICE void flush(uint32_t* counters, const Bins& bins) {
  const int words = kKind == kPacked ? (bins.count + 1) / 2 : bins.count;
  for (int i = int(threadIdx.x); i < words; i += kHistogramThreads) {
    const uint32_t both = counters[i];
    if (!both) continue;
    counters[i] = 0;
    for (int half = 0; half < (kKind == kPacked ? 2 : 1); ++half) {
      const uint32_t count = kKind == kPacked ? both >> (16 * half) & 0xffffu : both;
      const int b = bins.first + (kKind == kPacked ? 2 * i + half : i);
      const int to = !bins.folded ? b : b != 0x7fff ? 0x8000 + b : bins.lowest ? 0 : 0xffff;
      if (count) atomic_add(reinterpret_cast<unsigned long long*>(bins.totals + to), static_cast<unsigned long long>(count));
    }
  }
}

template <Counters kKind>
FA_DEVICE void add_to(uint32_t* counters, uint32_t bin, uint32_t n) {
  if (kKind == kPacked)
    atomic_add(counters + (bin >> 1), bin & 1u ? n << 16 : n);
  else
    atomic_add(counters + bin, n);
}

template <Counters kKind>
__global__ void __launch_bounds__(kHistogramThreads, 1) histogram_kernel(Selection s, Level level, Bins bins) {
  uint32_t* counters = dynamic_shared<uint32_t>();
  for (int i = int(threadIdx.x); i < bins.count; i += kHistogramThreads) counters[i] = 0;
  syncthreads();
  const int64_t prefix = level.prefix ? *level.prefix : -1;
  const auto add = [counters](uint32_t b, uint32_t n) { add_to<kKind>(counters, b, n); };
  Cursor cursor{};
  Loaded now, next;
  bool more = cursor.at_tile(s, blockIdx.x);
  if (kKind == kNative && more) cursor.load(next, s);
  while (more) {
    // Sixteen-bit elements leave registers for the next tile's: two loads in flight a thread, and no barrier in the loop.
    if (kKind == kNative)
      now = next;
    else
      cursor.load(now, s);
    uint32_t bin[kEach];
    if (kKind == kNative) {
      more = cursor.at_tile(s, cursor.tile + gridDim.x);
      if (more) cursor.load(next, s);
    }
    find_bins<kKind>(bin, now, cursor.item, s, level, prefix, bins);
    tally(bin, add);
    if (kKind != kNative) more = cursor.at_tile(s, cursor.tile + gridDim.x);
  }
  syncthreads();
  flush<kKind>(counters, bins);
}

// Packed counters hold 65,535: seven tiles at most between two looks at how many elements were counted.
__global__ void __launch_bounds__(kHistogramThreads, 1) packed_histogram_kernel(Selection s, Level level, Bins bins) {
  constexpr int kTurns = 7;
  constexpr uint32_t kFull = 65535 - kTurns * uint32_t(kTile);
  uint32_t* counters = dynamic_shared<uint32_t>();
  FA_SHARED(uint32_t, counted);
  for (int i = int(threadIdx.x); i < (bins.count + 1) / 2; i += kHistogramThreads) counters[i] = 0;
  if (threadIdx.x == 0) counted = 0;
  syncthreads();
  const int64_t prefix = level.prefix ? *level.prefix : -1;
  const auto add = [counters](uint32_t b, uint32_t n) { add_to<kPacked>(counters, b, n); };
  Cursor cursor{};
  for (bool more = cursor.at_tile(s, blockIdx.x); more;) {
    uint32_t mine = 0;
    for (int turn = 0; more && turn < kTurns; ++turn) {
      Loaded l;
      cursor.load(l, s);
      uint32_t bin[kEach];
      find_bins<kPacked>(bin, l, cursor.item, s, level, prefix, bins);
      tally(bin, add);
      FA_UNROLL
      for (int j = 0; j < kEach; ++j) mine += bin[j] != kNoBin;
      more = cursor.at_tile(s, cursor.tile + gridDim.x);
    }
    if (mine) atomic_add(&counted, mine);
    syncthreads();
    const bool full = counted > kFull;
    syncthreads();
    if (!full) continue;
    flush<kPacked>(counters, bins);
    if (threadIdx.x == 0) counted = 0;
    syncthreads();
  }
  syncthreads();
  flush<kPacked>(counters, bins);
}

// The bits of the key at the end of the search, widened to 32.
FA_DEVICE int64_t whole_key(int64_t prefix, const Level& level) {
  if (level.shift == 0) return prefix;
  const uint32_t top = uint32_t(prefix);
  if (top == 0xffffu || top == 0u) return top ? 0xffffffffll : 0ll;  // NaN's key has all its bits equal, a number's never
  return level.native == kF16 ? int64_t(as_bits(half_to_float(uint16_t(top & 0x7fffu))) | 0x80000000u) : prefix << level.shift;
}

// One block of 32 warps; each adds up its share of the counts, the one with the k-th looks closer, 32 counts at a time.
__global__ void __launch_bounds__(kHistogramThreads, 1)
    find_bin_kernel(const int64_t* counts, Level level, int64_t k, bool first, bool last, int ties, Search* search) {
  FA_SHARED(int64_t, shares, [kWarp]);
  const int n = 1 << level.bits, share = n >= int(kWarp * kWarp) ? n / int(kWarp) : int(kWarp);
  const int warp = int(threadIdx.x / kWarp), lane = int(lane_id()), begin = warp * share;
  int64_t sum = 0;
  for (int i = begin + lane; i < begin + share; i += int(kWarp)) sum += i < n ? counts[i] : 0;
  sum = warp_sum(sum);
  if (lane == 0) shares[warp] = sum;
  const int64_t wanted = first ? k : search->left, key = first ? 0 : search->prefix, over = first ? 0 : search->above;
  syncthreads();
  int64_t above = 0;
  for (int w = int(kWarp) - 1; w > warp; --w) above += shares[w];
  if (!(above < wanted && wanted <= above + sum)) return;
  for (int i = begin + share - int(kWarp); i >= begin; i -= int(kWarp)) {
    const int bin = i + int(kWarp) - 1 - lane;  // lane 0 has the largest key
    const int64_t count = bin < n ? counts[bin] : 0, reached = above + warp_scan(count);
    const unsigned enough = ballot(reached >= wanted);
    if (!enough) {
      above = shfl(reached, kWarp - 1);
      continue;
    }
    if (lane == lowest_bit(enough)) {
      const int64_t left = wanted - (reached - count), prefix = first ? bin : key << level.bits | bin;
      *search = {prefix, left, over + reached - count, count, 0, 0};
      if (last) {
        search->threshold = whole_key(prefix, level);
        search->equal = ties == kLowestIndex ? left : ties == kInclusive || left == count ? count : 0;
      }
    }
    return;
  }
}

template <Counters kKind>
void count(const Selection& s, const Level& level, Bins bins, int all, int limit, Place place) {
  const auto kernel = kKind == kPacked ? packed_histogram_kernel : histogram_kernel < kKind == kPacked ? kWide : kKind > ;
  const int at_most = limit / 4 * (kKind == kPacked ? 2 : 1);
  for (bins.first = 0; bins.first < all; bins.first += at_most) {
    bins.count = all - bins.first < at_most ? all - bins.first : at_most;
    const size_t bytes = size_t(kKind == kPacked ? (bins.count + 1) / 2 : bins.count) * 4;
    allow_shared(kernel, place.device);
    FA_LAUNCH(kernel, counting_blocks(s, place.device), kHistogramThreads, bytes, static_cast<cudaStream_t>(place.stream), s, level, bins);
    check(cudaGetLastError(), "sparse.histogram");
  }
}

}  // namespace

void histogram(const Selection& s, const Level& level, int64_t* counts, int most_shared, Place place) {
  const DeviceGuard guard(place.device, "sparse.histogram");
  check(cudaMemsetAsync(counts, 0, sizeof(int64_t) << level.bits, static_cast<cudaStream_t>(place.stream)), "sparse.histogram");
  if (!s.tiles) return;
  const int limit = shared_limit(place.device, most_shared);
  const bool sizes = s.score == kAbs || s.score == kAbsDiff || s.score == kAbsProduct;
  const Bins bins{0, 0, counts, level.bits == 16 && level.shift == 16 && sizes && !level.prefix, s.nan_key == 0};
  if (level.native) return count<kNative>(s, level, bins, 1 << 15, limit, place);
  if (bins.folded) return count<kWide>(s, level, bins, 1 << 15, limit, place);
  if (level.bits < 16) return count<kWide>(s, level, bins, 1 << level.bits, limit, place);
  count<kPacked>(s, level, bins, 1 << level.bits, limit, place);
}

void find_bin(const int64_t* counts, const Level& level, int64_t k, bool first, bool last, int ties, Search* search, Place place) {
  const DeviceGuard guard(place.device, "sparse.find_bin");
  FA_LAUNCH(find_bin_kernel, 1, kHistogramThreads, 0, static_cast<cudaStream_t>(place.stream), counts, level, k, first, last, ties, search);
  check(cudaGetLastError(), "sparse.find_bin");
}

}  // namespace fa::cuda

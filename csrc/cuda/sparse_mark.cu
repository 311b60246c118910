// The mask of a selection: bits of the keys above a threshold, and of the first so many that equal it, over a list of tensors.
//
// Bytes: one read of x, n / 8 written. Which ties come first is settled in the same pass: a block learns how many there are before its tile from
// the blocks before it (decoupled look-back: Merrill and Garland, NVR-2016-002). Where all or none of the ties are kept, no block waits.
#include "sparse_keys.cuh"

namespace fa::cuda {
namespace {

// A tile's word in the look-back: how many ties it has, or how many there are up to its end.
constexpr unsigned long long kOwn = 1ull << 62, kUpTo = 2ull << 62, kCount = kOwn - 1;

// Ties before tile t (at least `enough` suffices). The first warp alone. Tiles are numbered in the order in which blocks begin, so a block
// waits only for blocks that run already; flag and count share a word, so no fence is needed.
FA_DEVICE int64_t look_back(unsigned long long* tiles, int64_t t, int64_t own, int64_t enough) {
  if (lane_id() == 0 && t) atomic_exch(tiles + t, kOwn | static_cast<unsigned long long>(own));
  int64_t before = 0;
  for (int64_t at = t - 1; at >= 0 && before < enough; at -= kWarp) {
    const int64_t mine = at - int64_t(lane_id());
    unsigned long long word = kUpTo;
    do {
      if (mine >= 0) word = *static_cast<volatile unsigned long long*>(tiles + mine);
    } while (any(word < kOwn));
    const unsigned done = ballot(word >= kUpTo);
    const bool counts = !done || int(lane_id()) <= lowest_bit(done);
    before += warp_sum(counts ? int64_t(word & kCount) : int64_t(0));
    if (done) break;
  }
  if (lane_id() == 0) atomic_exch(tiles + t, kUpTo | static_cast<unsigned long long>(before + own));
  return before;
}

constexpr int kMarkRuns = int(kTile) / (kThreads * kEach), kMarkWarps = kThreads / int(kWarp);

struct Cut {
  uint32_t key;
  bool all, none, every_tie, no_tie;  // all, none: of the numbers, because no key is on that side of the threshold
};

FA_DEVICE Cut cut_of(int64_t threshold, int64_t equal, const int64_t* same) {
  Cut c{uint32_t(threshold), threshold < 0, threshold > 0xffffffffll, false, equal <= 0};
  if (c.all || c.none) c.no_tie = true;
  c.every_tie = same && equal >= *same;
  return c;
}

// Four runs a warp, the first two loaded before either is looked at. Bits above the threshold and of its ties, eight a lane and run.
template <bool kOther>
FA_DEVICE void look(uint32_t (&above)[kMarkRuns], uint32_t (&tie)[kMarkRuns], const SparseItem& item, const Selection& s, const Cut& c,
                    int64_t begin) {
  const int32_t score = kOther ? s.score : s.score == kGiven ? int32_t(kGiven) : int32_t(kAbs);
  FA_UNROLL
  for (int pair = 0; pair < kMarkRuns; pair += 2) {
    Loaded l[2];
    FA_UNROLL
    for (int r = 0; r < 2; ++r) load_item(l[r], item, score, begin + (pair + r) * kRun);
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t key[kEach], over = 0, same = 0;
      keys_of(key, l[r], item, score, s.nan_key);
      FA_UNROLL
      for (int j = 0; j < kEach; ++j) {
        over |= uint32_t(key[j] > c.key) << j;
        same |= uint32_t(key[j] == c.key) << j;
      }
      over = c.none ? 0u : c.all ? 0xffu : over;
      above[pair + r] = in_order(over & l[r].run.valid, l[r].run.vector);
      tie[pair + r] = c.no_tie ? 0u : in_order(same & l[r].run.valid, l[r].run.vector);
    }
  }
}

// Of a warp's ties the first `room`, in the order of the elements.
FA_DEVICE void keep_first(uint32_t (&tie)[kMarkRuns], int64_t room) {
  FA_UNROLL
  for (int r = 0; r < kMarkRuns; ++r) {
    const int mine = bits_set(tie[r]), upto = warp_scan(mine);
    tie[r] = first_bits(tie[r], room - (upto - mine));
    room -= shfl(upto, kWarp - 1);
  }
}

// kOther: the score has a second operand, and its registers.
template <bool kOther>
__global__ void __launch_bounds__(kThreads, kOther ? 2 : 4)
    mark_kernel(Selection s, const int64_t* threshold, const int64_t* equal, const int64_t* same, unsigned long long* scratch) {
  FA_SHARED(int64_t, my_tile);
  FA_SHARED(int64_t, ties_before);
  FA_SHARED(int, ties_of, [kMarkWarps]);
  const int64_t room = *equal;
  const Cut cut = cut_of(*threshold, room, same);
  const bool ordered = !cut.no_tie && !cut.every_tie;
  const int warp = int(threadIdx.x / kWarp);
  int64_t tile = blockIdx.x;
  if (ordered) {
    if (threadIdx.x == 0) my_tile = int64_t(atomic_add(scratch + s.tiles, 1ull));
    syncthreads();
    tile = my_tile;
  }
  const SparseItem item = s.items[find_item(s.items, s.count, tile)];
  const int64_t begin = (tile - item.first) * kTile + warp * kMarkRuns * kRun;
  uint32_t above[kMarkRuns], tie[kMarkRuns];
  look<kOther>(above, tie, item, s, cut, begin);
  if (ordered) {
    int mine = 0;
    FA_UNROLL
    for (int r = 0; r < kMarkRuns; ++r) mine += bits_set(tie[r]);
    mine = warp_sum(mine);
    if (lane_id() == 0) ties_of[warp] = mine;
    syncthreads();
    int64_t earlier = 0, total = 0;
    for (int w = 0; w < kMarkWarps; ++w) {
      earlier += w < warp ? ties_of[w] : 0;
      total += ties_of[w];
    }
    if (warp == 0) {
      const int64_t before = look_back(scratch, tile, total, room);
      if (lane_id() == 0) ties_before = before;
    }
    syncthreads();
    const int64_t left = room - ties_before - earlier;
    if (left < mine) keep_first(tie, left);
  }
  FA_UNROLL
  for (int r = 0; r < kMarkRuns; ++r) store_bits(item.words, begin + r * kRun, item.n, above[r] | tie[r]);
}

}  // namespace

void mark(const Selection& s, const int64_t* threshold, const int64_t* equal, const int64_t* same, uint64_t* scratch, Place place) {
  if (!s.tiles) return;
  const DeviceGuard guard(place.device, "sparse.mark");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  check(cudaMemsetAsync(scratch, 0, size_t(s.tiles + 1) * 8, stream), "sparse.mark");
  const auto kernel = s.score == kAbs || s.score == kGiven ? mark_kernel<false> : mark_kernel<true>;
  FA_LAUNCH(kernel, blocks_for(s.tiles), kThreads, 0, stream, s, threshold, equal, same, reinterpret_cast<unsigned long long*>(scratch));
  check(cudaGetLastError(), "sparse.mark");
}

}  // namespace fa::cuda

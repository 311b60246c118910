// Counters in shared memory, for kernels that count by bits of keys: adding to them, walking over tiles, how much of it there is.
#pragma once
#include "sparse_keys.cuh"

namespace fa::cuda {

constexpr uint32_t kNoBin = ~0u;

// One more in each of the lanes' bins. Where many lanes meet in a bin (runs of zeros, few values), lanes of a kind add once: an atomic that
// 32 lanes send to one address takes 32 turns. One look per eight elements decides, so that ordinary data pay little for it.
template <class Add>
FA_DEVICE void tally(const uint32_t (&bin)[kEach], Add add) {
  const unsigned present = ballot(bin[0] != kNoBin);
  bool crowded = false;
  if (present) {
    const uint32_t theirs = shfl(bin[0], unsigned(lowest_bit(present)));
    crowded = bits_set(ballot(bin[0] == theirs)) >= 8;
  }
  if (!crowded) {
    FA_UNROLL
    for (int j = 0; j < kEach; ++j)
      if (bin[j] != kNoBin) add(bin[j], 1u);
    return;
  }
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) {
    unsigned left = ballot(bin[j] != kNoBin);
    for (int turn = 0; left && turn < 4; ++turn) {
      const unsigned leader = unsigned(lowest_bit(left));
      const uint32_t theirs = shfl(bin[j], leader);
      const unsigned same = ballot(bin[j] == theirs);
      if (lane_id() == leader) add(theirs, uint32_t(bits_set(same)));
      left &= ~same;
    }
    if (left >> lane_id() & 1u) add(bin[j], 1u);
  }
}

constexpr int kHistogramThreads = 1024;  // one block per SM: its counters fill the shared memory
// The tiles of a block, one after another: which tensor each is in is looked up only when the tensor ends.
struct Cursor {
  SparseItem item;
  int64_t tile, end;  // the tile after the item's last

  FA_DEVICE bool at_tile(const Selection& s, int64_t next) {
    tile = next;
    if (tile >= s.tiles) return false;
    if (tile >= end) {
      item = s.items[find_item(s.items, s.count, tile)];
      end = item.first + (item.n + kTile - 1) / kTile;
    }
    return true;
  }
  FA_DEVICE void load(Loaded& l, const Selection& s) const {
    load_item(l, item, s.score, (tile - item.first) * kTile + threadIdx.x / kWarp * kRun);
  }
};

// Bytes of dynamic shared memory that a block may ask for (allow_shared), beside 5 KiB of its own variables. most: no more than these, or 0.
inline int shared_limit(int device, int most) {
  int bytes = 48 << 10;
#if defined(FA_EMULATE)
  (void)device;
#else
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "sparse");
#endif
  bytes -= 6 << 10;
  return most > 0 && most < bytes ? most : bytes;
}

// Always the device's most, whatever this launch takes: with less, another thread's larger launch would fail between its own two calls.
template <class Kernel>
void allow_shared(Kernel kernel, int device) {
#if defined(FA_EMULATE)
  (void)kernel, (void)device;
#else
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit(device, 0)), "sparse");
#endif
}

// As many blocks as take all tiles, one on each multiprocessor. In the emulator few, so that each takes several tiles.
inline unsigned counting_blocks(const Selection& s, int device) {
#if defined(FA_EMULATE)
  const int64_t most = sm_count(device) < 3 ? sm_count(device) : 3;
#else
  const int64_t most = sm_count(device);
#endif
  return unsigned(s.tiles < most ? s.tiles : most);
}

}  // namespace fa::cuda

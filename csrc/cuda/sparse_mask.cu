// Bitmasks: packing, ranks, positions, N:M. All move bytes and little else: expect the copy rate.
#include "sparse_keys.cuh"

namespace fa::cuda {
namespace {

constexpr int kWarps = kThreads / int(kWarp);

struct alignas(8) Pair {
  uint32_t v[2];
};

// Eight bools, one a byte, as eight bits.
FA_DEVICE uint32_t gather_bits(uint32_t low, uint32_t high) {
  return ((low & 0x01010101u) * 0x01020408u >> 24 & 0xfu) | ((high & 0x01010101u) * 0x01020408u >> 24 & 0xfu) << 4;
}

// A bool for each of four bits.
FA_DEVICE uint32_t spread_bits(uint32_t four) { return (four * 0x00204081u) & 0x01010101u; }

// Reads n bytes, writes n / 8. A thread has eight elements.
__global__ void __launch_bounds__(kThreads) pack_kernel(const uint8_t* mask, int64_t n, uint8_t* words, bool aligned) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, first = at * kEach;
  if (at >= (n + 31) / 32 * 4) return;
  uint32_t byte = 0;
  if (aligned && first + kEach <= n) {
    const Pair p = vec_load<Pair>(mask + first);
    byte = gather_bits(p.v[0], p.v[1]);
  } else {
    for (int j = 0; j < kEach; ++j)
      if (first + j < n && mask[first + j]) byte |= 1u << j;
  }
  words[at] = uint8_t(byte);
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(const uint8_t* words, int64_t n, uint8_t* mask, bool aligned) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, first = at * kEach;
  if (first >= n) return;
  const uint32_t byte = words[at];
  if (aligned && first + kEach <= n) {
    vec_store(mask + first, Pair{{spread_bits(byte & 15u), spread_bits(byte >> 4)}});
    return;
  }
  for (int j = 0; j < kEach; ++j)
    if (first + j < n) mask[first + j] = uint8_t(byte >> j & 1u);
}

// Popcounts of 32 words each, a warp a group.
__global__ void __launch_bounds__(kThreads) group_counts_kernel(const uint32_t* words, int64_t n, int64_t groups, int64_t* counts) {
  const int64_t group = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (group >= groups) return;
  const int64_t at = group * kWarp + lane_id();
  const int count = warp_sum(at < n ? bits_set(words[at]) : 0);
  if (lane_id() == 0) counts[group] = count;
}

constexpr int kScan = 4096;  // counts a block adds up

FA_DEVICE int64_t block_scan(int64_t mine, int64_t* total) {  // exclusive, over the block
  FA_SHARED(int64_t, sums, [kWarps]);
  const int64_t upto = warp_scan(mine);
  if (lane_id() == kWarp - 1) sums[threadIdx.x / kWarp] = upto;
  syncthreads();
  int64_t before = 0;
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += w < int(threadIdx.x / kWarp) ? sums[w] : 0;
    *total += sums[w];
  }
  syncthreads();
  return before + upto - mine;
}

__global__ void __launch_bounds__(kThreads) share_sums_kernel(const int64_t* counts, int64_t groups, int64_t* sums) {
  int64_t mine = 0, total;
  for (int64_t i = int64_t(blockIdx.x) * kScan + threadIdx.x; i < int64_t(blockIdx.x + 1) * kScan; i += kThreads)
    mine += i < groups ? counts[i] : 0;
  block_scan(mine, &total);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// In place, one block: 4,194,304 elements a number, so a thousand numbers for 4e9.
__global__ void __launch_bounds__(kThreads) scan_sums_kernel(int64_t* sums, int64_t n, int64_t* total) {
  int64_t before = 0;
  for (int64_t first = 0; first < n; first += kThreads) {
    const int64_t i = first + threadIdx.x, mine = i < n ? sums[i] : 0;
    int64_t all;
    const int64_t at = before + block_scan(mine, &all);
    if (i < n) sums[i] = at;
    before += all;
  }
  if (threadIdx.x == 0) *total = before;
}

__global__ void __launch_bounds__(kThreads) scan_kernel(int64_t* counts, int64_t groups, const int64_t* sums) {
  int64_t before = sums[blockIdx.x];
  for (int64_t first = int64_t(blockIdx.x) * kScan; first < int64_t(blockIdx.x + 1) * kScan; first += kThreads) {
    const int64_t i = first + threadIdx.x, mine = i < groups ? counts[i] : 0;
    int64_t all;
    const int64_t at = before + block_scan(mine, &all);
    if (i < groups) counts[i] = at;
    before += all;
  }
}

// A warp has 32 words, a lane one of them.
template <class Index>
__global__ void __launch_bounds__(kThreads)
    indices_kernel(const uint32_t* words, int64_t n, int64_t groups, const int64_t* prefix, Index* out) {
  const int64_t group = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (group >= groups) return;
  const int64_t at = group * kWarp + lane_id();
  uint32_t word = at < n ? words[at] : 0u;
  const int mine = bits_set(word);
  int64_t to = prefix[group] + warp_scan(mine) - mine;
  for (; word; word &= word - 1) out[to++] = Index(at * kWarp + lowest_bit(word));
}

template <class Index>
__global__ void __launch_bounds__(kThreads) check_kernel(const Index* index, int64_t count, int64_t n, bool ordered, int32_t* bad) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t at = index[i];
  if (at < 0 || at >= n || (ordered && i && int64_t(index[i - 1]) >= at)) *bad = 1;  // all who write, write the same
}

template <class Index>
__global__ void __launch_bounds__(kThreads) set_kernel(const Index* index, int64_t count, int64_t words_n, uint32_t* words) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t at = index[i];
  if (at >= 0 && at < words_n * kWarp) atomic_or(words + at / kWarp, 1u << at % kWarp);
}

int64_t groups_of(int64_t words) { return (words + kWarp - 1) / kWarp; }
cudaStream_t stream_of(const Place& p) { return static_cast<cudaStream_t>(p.stream); }

}  // namespace

void pack(const uint8_t* mask, int64_t n, uint32_t* words, Place place) {
  if (!n) return;
  const DeviceGuard guard(place.device, "sparse.pack");
  FA_LAUNCH(pack_kernel, blocks_for(((n + 31) / 32 * 4 + kThreads - 1) / kThreads), kThreads, 0, stream_of(place), mask, n,
            reinterpret_cast<uint8_t*>(words), reinterpret_cast<uintptr_t>(mask) % sizeof(Pair) == 0);
  check(cudaGetLastError(), "sparse.pack");
}

void unpack(const uint32_t* words, int64_t n, uint8_t* mask, Place place) {
  if (!n) return;
  const DeviceGuard guard(place.device, "sparse.unpack");
  FA_LAUNCH(unpack_kernel, blocks_for((n + kSpan - 1) / kSpan), kThreads, 0, stream_of(place), reinterpret_cast<const uint8_t*>(words), n,
            mask, reinterpret_cast<uintptr_t>(mask) % sizeof(Pair) == 0);
  check(cudaGetLastError(), "sparse.unpack");
}

int64_t prefix_scratch(int64_t n) { return groups_of(n) / kScan + 1; }

void prefix_counts(const uint32_t* words, int64_t n, int64_t* out, uint64_t* scratch, Place place) {
  const DeviceGuard guard(place.device, "sparse.prefix");
  const int64_t groups = groups_of(n), shares = (groups + kScan - 1) / kScan;
  if (!groups) return check(cudaMemsetAsync(out, 0, sizeof(int64_t), stream_of(place)), "sparse.prefix");
  const auto sums = reinterpret_cast<int64_t*>(scratch);
  FA_LAUNCH(group_counts_kernel, blocks_for((groups + kWarps - 1) / kWarps), kThreads, 0, stream_of(place), words, n, groups, out);
  FA_LAUNCH(share_sums_kernel, blocks_for(shares), kThreads, 0, stream_of(place), out, groups, sums);
  FA_LAUNCH(scan_sums_kernel, 1, kThreads, 0, stream_of(place), sums, shares, out + groups);
  FA_LAUNCH(scan_kernel, blocks_for(shares), kThreads, 0, stream_of(place), out, groups, sums);
  check(cudaGetLastError(), "sparse.prefix");
}

void list_indices(const uint32_t* words, int64_t n, const int64_t* prefix, void* out, bool wide, Place place) {
  const int64_t groups = groups_of(n);
  if (!groups) return;
  const DeviceGuard guard(place.device, "sparse.indices");
  const unsigned blocks = blocks_for((groups + kWarps - 1) / kWarps);
  if (wide)
    FA_LAUNCH(indices_kernel<int64_t>, blocks, kThreads, 0, stream_of(place), words, n, groups, prefix, static_cast<int64_t*>(out));
  else
    FA_LAUNCH(indices_kernel<int32_t>, blocks, kThreads, 0, stream_of(place), words, n, groups, prefix, static_cast<int32_t*>(out));
  check(cudaGetLastError(), "sparse.indices");
}

void check_indices(const void* index, int64_t count, bool wide, int64_t n, bool ordered, int32_t* bad, Place place) {
  const DeviceGuard guard(place.device, "sparse.check_indices");
  check(cudaMemsetAsync(bad, 0, sizeof *bad, stream_of(place)), "sparse.check_indices");
  if (!count) return;
  const unsigned blocks = blocks_for((count + kThreads - 1) / kThreads);
  if (wide)
    FA_LAUNCH(check_kernel<int64_t>, blocks, kThreads, 0, stream_of(place), static_cast<const int64_t*>(index), count, n, ordered, bad);
  else
    FA_LAUNCH(check_kernel<int32_t>, blocks, kThreads, 0, stream_of(place), static_cast<const int32_t*>(index), count, n, ordered, bad);
  check(cudaGetLastError(), "sparse.check_indices");
}

void set_indices(const void* index, int64_t count, bool wide, int64_t words_n, uint32_t* words, Place place) {
  if (!count) return;
  const DeviceGuard guard(place.device, "sparse.set_indices");
  const unsigned blocks = blocks_for((count + kThreads - 1) / kThreads);
  if (wide)
    FA_LAUNCH(set_kernel<int64_t>, blocks, kThreads, 0, stream_of(place), static_cast<const int64_t*>(index), count, words_n, words);
  else
    FA_LAUNCH(set_kernel<int32_t>, blocks, kThreads, 0, stream_of(place), static_cast<const int32_t*>(index), count, words_n, words);
  check(cudaGetLastError(), "sparse.set_indices");
}

}  // namespace fa::cuda

// Statistics in one read: the energy histogram and the sums of squares of columns, the reference's bits (reference/sparse.py).
//
// Energy: elements of a bin share their exponent, so integers hold its sums exactly and atomics may add them in any order. Columns: fp64 sums in
// an order that the shape alone decides.
#include "sparse_bins.cuh"

namespace fa::cuda {
namespace {

// Sixteen bits at a time, so that 32-bit counters (atomics on 64 bits are loops in shared memory) hold the sums of eight tiles: 65,536 elements.
constexpr int kBins = 2048, kBinBits = 11, kWordsABin = 6, kTurns = 8;
static_assert(kTurns * kTile <= 1 << 16, "sums of 16-bit parts must fit 32 bits");

FA_DEVICE void add_total(int64_t* total, uint64_t n) {
  if (n) atomic_add(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(n));
}

// sums [6][2048]: counts, significands (2 parts), their squares (3). totals [4][2048]: counts, significands, squares' lower 32 bits, upper ones.
__global__ void __launch_bounds__(kHistogramThreads, 1) energy_kernel(Selection s, int64_t* totals) {
  uint32_t* sums = dynamic_shared<uint32_t>();
  for (int i = int(threadIdx.x); i < kWordsABin * kBins; i += kHistogramThreads) sums[i] = 0;
  syncthreads();
  const auto add = [sums](uint32_t bin, uint32_t n) { atomic_add(sums + bin, n); };
  const auto add_part = [sums](int part, uint32_t bin, uint32_t n) {
    if (n) atomic_add(sums + part * kBins + bin, n);
  };
  Cursor cursor{};
  for (bool more = cursor.at_tile(s, blockIdx.x); more;) {
    for (int turn = 0; more && turn < kTurns; ++turn) {
      Loaded l;
      cursor.load(l, s);
      uint32_t key[kEach], bin[kEach];
      keys_of(key, l, cursor.item, s.score, 0u);
      FA_UNROLL
      for (int j = 0; j < kEach; ++j) bin[j] = l.run.valid >> j & 1u ? key[j] >> (32 - kBinBits) : kNoBin;
      tally(bin, add);
      FA_UNROLL
      for (int j = 0; j < kEach; ++j) {
        if (bin[j] == kNoBin) continue;
        const uint32_t size = (key[j] >> 31 ? key[j] : ~key[j]) & 0x7fffffffu;
        const uint32_t significand = (size & 0x7fffffu) | uint32_t(size > 0x7fffffu) << 23;
        const uint64_t square = uint64_t(significand) * significand;
        add_part(1, bin[j], significand & 0xffffu);
        add_part(2, bin[j], significand >> 16);
        add_part(3, bin[j], uint32_t(square) & 0xffffu);
        add_part(4, bin[j], uint32_t(square) >> 16);
        add_part(5, bin[j], uint32_t(square >> 32));
      }
      more = cursor.at_tile(s, cursor.tile + gridDim.x);
    }
    syncthreads();
    for (int b = int(threadIdx.x); b < kBins; b += kHistogramThreads) {
      uint64_t part[kWordsABin];
      FA_UNROLL
      for (int i = 0; i < kWordsABin; ++i) {
        part[i] = sums[i * kBins + b];
        sums[i * kBins + b] = 0;
      }
      add_total(totals + b, part[0]);
      add_total(totals + kBins + b, part[1] + (part[2] << 16));
      add_total(totals + 2 * kBins + b, part[3] + (part[4] << 16));
      add_total(totals + 3 * kBins + b, part[5]);
    }
    syncthreads();
  }
}

constexpr int kStrip = 128, kAhead = 16;  // columns a block has; rows whose loads are in flight together

// sums[slice, column] = squares of one slice's rows, one after the other.
__global__ void __launch_bounds__(kStrip)
    column_squares_kernel(const void* x, int dtype, int64_t rows, int64_t columns, int64_t slices, int64_t strips, double* sums) {
  const int64_t slice = blockIdx.x / strips, column = blockIdx.x % strips * kStrip + threadIdx.x;
  if (column >= columns) return;
  const int64_t end = rows * (slice + 1) / slices;
  double total = 0;
  for (int64_t row = rows * slice / slices; row < end; row += kAhead) {
    uint32_t raw[kAhead];
    FA_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int64_t at = (row + i) * columns + column;
      raw[i] = row + i >= end  ? 0u
               : dtype == kF32 ? in_global(static_cast<const uint32_t*>(x))[at]
                               : in_global(static_cast<const uint16_t*>(x))[at];
    }
    FA_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const double v = dtype == kF32 ? as_float(raw[i]) : dtype == kBF16 ? as_float(raw[i] << 16) : half_to_float(uint16_t(raw[i]));
      total += v * v;  // of rows past the end +0, which changes no sum of squares
    }
  }
  sums[slice * columns + column] = total;
}

// out[column] = the slices' sums, one after the other, rounded once.
__global__ void __launch_bounds__(kStrip) add_slices_kernel(const double* sums, int64_t columns, int64_t slices, float* out) {
  const int64_t column = int64_t(blockIdx.x) * kStrip + threadIdx.x;
  if (column >= columns) return;
  double total = 0;
  for (int64_t i = 0; i < slices; ++i) total += sums[i * columns + column];
  out[column] = float(total);
}

}  // namespace

void energy(const Selection& s, int64_t* totals, Place place) {
  const DeviceGuard guard(place.device, "sparse.energy");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  check(cudaMemsetAsync(totals, 0, 4 * kBins * sizeof *totals, stream), "sparse.energy");
  if (!s.tiles) return;
  FA_LAUNCH(energy_kernel, counting_blocks(s, place.device), kHistogramThreads, kWordsABin * kBins * sizeof(uint32_t), stream, s, totals);
  check(cudaGetLastError(), "sparse.energy");
}

void column_squares(const void* x, int dtype, int64_t rows, int64_t columns, int64_t slices, double* sums, float* out, Place place) {
  if (!columns) return;
  const DeviceGuard guard(place.device, "sparse.colstat");
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const int64_t strips = (columns + kStrip - 1) / kStrip;
  FA_LAUNCH(column_squares_kernel, blocks_for(slices * strips), kStrip, 0, stream, x, dtype, rows, columns, slices, strips, sums);
  FA_LAUNCH(add_slices_kernel, blocks_for(strips), kStrip, 0, stream, sums, columns, slices, out);
  check(cudaGetLastError(), "sparse.colstat");
}

}  // namespace fa::cuda

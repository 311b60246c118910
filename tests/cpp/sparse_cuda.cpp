// The CUDA kernels that select within runs and measure (on the emulator) against sorting and plain sums, under AddressSanitizer and UBSan.
// Every array ends where its allocation ends.
//   cmake -S . -B build/asan -G Ninja -DFA_PYTHON=OFF -DFA_TESTS=ON && cmake --build build/asan --target sparse_cuda
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "core/dtypes.h"
#include "core/launch.h"
#include "cuda/sparse.h"
#include "exact.h"

namespace {

namespace gpu = fa::cuda;

// n numbers, many of them equal, `gap` bytes into their allocation.
struct Numbers {
  int dtype;
  int64_t n, gap;
  Exact<uint8_t> bytes;
  std::vector<float> wide;

  Numbers(int dtype_, int64_t n_, int64_t gap_)
      : dtype(dtype_), n(n_), gap(gap_), bytes(n_ * fa::dtype_size(dtype_) + gap_), wide(size_t(n_)) {
    for (int64_t i = 0; i < n; ++i) {
      const float f = random_bits() % 3 ? uniform() : float(int(random_bits() % 5) - 2);
      const uint32_t u = dtype == fa::kBF16 ? fa::float_to_bf16(f) : dtype == fa::kF16 ? fa::float_to_half(f) : fa::as_bits(f);
      wide[size_t(i)] = dtype == fa::kBF16  ? fa::bf16_to_float(uint16_t(u))
                        : dtype == fa::kF16 ? fa::half_to_float(uint16_t(u))
                                            : fa::as_float(u);
      std::memcpy(bytes.get() + gap + i * fa::dtype_size(dtype), &u, size_t(fa::dtype_size(dtype)));
    }
  }
  gpu::SparseItem item(uint32_t* words) const {
    return {bytes.get() + gap, nullptr, reinterpret_cast<uint8_t*>(words), n, n, 0, dtype, 0, gap % 16 == 0};
  }
};

gpu::Selection selection(const gpu::SparseItem& item, gpu::Score score) {
  return {&item, 1, (item.n + gpu::kTile - 1) / gpu::kTile, score, ~0u};
}

void check_rows(int64_t length, int64_t k, int dtype, int64_t gap, gpu::Ties ties, bool aligned, int most_shared) {
  const int64_t count = std::max<int64_t>(3, 100 / length), a_row = aligned ? (length + 31) / 32 * 32 : length;
  const Numbers x(dtype, count * length, gap);
  const Exact<uint32_t> words((count * a_row + 31) / 32);
  for (int64_t i = 0; i < words.size; ++i) words[i] = 0xdeadbeef;
  std::vector<uint32_t> expected(size_t(words.size));
  for (int64_t r = 0; r < count; ++r) {
    const float* row = x.wide.data() + r * length;
    std::vector<int64_t> order(static_cast<size_t>(length));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row[a] > row[b]; });
    int64_t kept = k;
    const auto equal = [&](int64_t i) { return k && i >= 0 && i < length && row[order[size_t(i)]] == row[order[size_t(k - 1)]]; };
    if (ties == gpu::kInclusive)
      while (equal(kept)) ++kept;
    if (ties == gpu::kExclusive && equal(k))
      while (equal(kept - 1)) --kept;
    for (int64_t i = 0; i < kept; ++i) expected[size_t((r * a_row + order[size_t(i)]) / 32)] |= 1u << (r * a_row + order[size_t(i)]) % 32;
  }
  const gpu::SparseItem item = x.item(words.get());
  gpu::rows(selection(item, gpu::kGiven), {count, length, k, ties, dtype, aligned, words.get(), words.size * 4}, most_shared, {0, nullptr});
  require(std::equal(expected.begin(), expected.end(), words.get()), "rows of " + std::to_string(length) + ", k " + std::to_string(k) +
                                                                         ", dtype " + std::to_string(dtype) + ", ties " +
                                                                         std::to_string(ties));
}

void check_energy(int64_t n, int dtype, int64_t gap) {
  const Numbers x(dtype, n, gap);
  const Exact<int64_t> totals(4 * 2048);
  std::vector<int64_t> expected(4 * 2048);
  for (float f : x.wide) {
    const uint32_t size = fa::as_bits(f) & 0x7fffffffu;
    const uint64_t significand = (size & 0x7fffffu) | uint64_t(size > 0x7fffffu) << 23, square = significand * significand;
    int64_t* bin = expected.data() + ((size | 0x80000000u) >> 21);
    bin[0] += 1, bin[2048] += int64_t(significand), bin[4096] += int64_t(square & 0xffffffffu), bin[6144] += int64_t(square >> 32);
  }
  const gpu::SparseItem item = x.item(nullptr);
  gpu::energy(selection(item, gpu::kAbs), totals.get(), {0, nullptr});
  require(std::equal(expected.begin(), expected.end(), totals.get()), "energy of " + std::to_string(n));
}

void check_columns(int64_t rows, int64_t columns, int64_t slices, int dtype) {
  const Numbers x(dtype, rows * columns, 0);
  const Exact<double> sums(slices * columns);
  const Exact<float> out(columns);
  gpu::column_squares(x.bytes.get(), dtype, rows, columns, slices, sums.get(), out.get(), {0, nullptr});
  for (int64_t c = 0; c < columns; ++c) {
    double total = 0;
    for (int64_t s = 0; s < slices; ++s) {
      double part = 0;
      for (int64_t r = rows * s / slices; r < rows * (s + 1) / slices; ++r) {
        const double v = x.wide[size_t(r * columns + c)];
        part += v * v;
      }
      total += part;
    }
    require(out[c] == float(total), "column " + std::to_string(c) + " of " + std::to_string(columns));
  }
}

}  // namespace

int main() {
  const int dtypes[] = {fa::kF32, fa::kBF16, fa::kF16};
  int number = 0;
  for (int64_t length : {1, 2, 3, 4, 7, 8, 31, 32, 33, 64, 100, 256, 1025, 4097})
    for (int64_t k : {int64_t(0), int64_t(1), length / 2, length})
      for (int turn = 0; turn < 4; ++turn, ++number) {
        const int dtype = dtypes[number % 3];
        fa::emulator::set_seed(uint64_t(number));
        check_rows(length, k, dtype, number % 5 ? 0 : fa::dtype_size(dtype), gpu::Ties((number / 3 + turn) % 3), turn % 2 == 1,
                   turn < 2 ? 0 : 4096);
      }
  for (int64_t n : {1, 33, 8192, 100003})
    for (int dtype : dtypes) check_energy(n, dtype, n % 2 ? 0 : fa::dtype_size(dtype));
  for (int dtype : dtypes) check_columns(100, 131, 3, dtype), check_columns(1, 1, 1, dtype), check_columns(2, 300, 1, dtype);
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures ? 1 : 0;
}

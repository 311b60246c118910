// The CPU's masks and selection against a sort, under AddressSanitizer and UBSan: every array ends where its allocation ends.
//   cmake -S . -B build/asan -G Ninja -DFA_PYTHON=OFF -DFA_TESTS=ON && cmake --build build/asan --target sparse_select
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <vector>

#include "core/dtypes.h"
#include "cpu/optim.h"
#include "cpu/sparse.h"

namespace {

using namespace fa::cpu;

int failures = 0;
void require(bool ok, const char* what, int64_t n, int64_t k) {
  if (!ok && ++failures <= 20) std::printf("FAIL %s: n %lld, k %lld, %s\n", what, (long long)n, (long long)k, kernels().name);
}

uint32_t state = 1;
uint32_t next() { return (state = state * 1664525u + 1013904223u) >> 8; }

std::vector<float> numbers(int64_t n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = next() % 3 ? float(int(next() % 2001) - 1000) / 64.f : (next() % 2 ? 0.f : -0.f);
  if (n > 5) x[3] = NAN, x[4] = -INFINITY;
  return x;
}

uint32_t key(float f) {
  const uint32_t u = fa::as_bits(f) & 0x7fffffffu;
  return u > 0x7f800000u ? ~0u : u | 0x80000000u;
}

// Bits of the k largest of every run of `length`, the first of equals first.
std::vector<uint32_t> oracle(const std::vector<float>& x, int64_t length, int64_t k) {
  std::vector<uint32_t> words((x.size() + 31) / 32);
  std::vector<size_t> order(static_cast<size_t>(length));
  for (size_t run = 0; run < x.size(); run += size_t(length)) {
    std::iota(order.begin(), order.end(), run);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return key(x[a]) > key(x[b]); });
    for (int64_t i = 0; i < k; ++i) words[order[size_t(i)] / 32] |= 1u << (order[size_t(i)] % 32);
  }
  return words;
}

Source source(const std::vector<float>& x) { return {x.data(), nullptr, int64_t(x.size()), 1, fa::kF32, 0, kAbs, INT32_MAX, 0}; }

void selection(int64_t n, int64_t k, int threads) {
  const std::vector<float> x = numbers(n);
  const Kth at = kth_key({source(x)}, k, threads);
  std::vector<uint32_t> words((x.size() + 31) / 32, 0xdeadbeef);
  mark({source(x)}, at.key, k - at.above, {words.data()}, threads);
  require(words == oracle(x, n, k), "mark", n, k);
}

void runs(int64_t length, int64_t k, int threads) {
  const std::vector<float> x = numbers(length * std::max<int64_t>(3, 3000 / length));
  std::vector<uint32_t> words((x.size() + 31) / 32, 0xdeadbeef);
  rows({source(x), k, length, kLowestIndex, false, words.data()}, threads);
  require(words == oracle(x, length, k), "rows", length, k);
}

void moves(int64_t n, int threads) {
  std::vector<uint8_t> mask(static_cast<size_t>(n)), back(mask.size());
  for (uint8_t& m : mask) m = next() % 3 == 0;
  std::vector<uint32_t> words((mask.size() + 31) / 32), again(words.size());
  const int64_t words_n = int64_t(words.size());
  pack(mask.data(), n, words.data(), threads);
  unpack(words.data(), n, back.data(), threads);
  std::vector<int64_t> prefix((words.size() + 31) / 32 + 1);
  prefix_counts(words.data(), words_n, prefix.data(), threads);
  std::vector<int32_t> index(static_cast<size_t>(prefix.back()));
  list_indices(words.data(), words_n, prefix.data(), index.data(), threads);
  require(valid_indices(index.data(), prefix.back(), n, true, threads), "valid", n, 0);
  set_indices(index.data(), prefix.back(), words_n, again.data(), threads);
  require(mask == back && words == again && prefix.back() == std::count(mask.begin(), mask.end(), 1), "mask", n, 0);
  std::vector<float> x = numbers(n), was = x, values(index.size(), 1.f);
  const MoveJob job{x.data(), values.data(), index.data(), prefix.back(), fa::kF32, fa::kF32, false};
  for (int turn = 0; turn < 2; ++turn) move_all(kSwap, {job}, 1.f, threads);
  require(n == 0 || !std::memcmp(x.data(), was.data(), x.size() * 4), "swap", n, 0);
}

}  // namespace

int main() {
  for (const char* isa : {"base", "avx2", "avx512"}) {
    if (!use_isa(isa)) continue;
    for (int threads : {1, 3}) {
      for (int64_t n : {1, 31, 32, 33, 1025, 70001})
        for (int64_t k : {int64_t(1), n / 2, n})
          if (k) selection(n, k, threads);
      for (int64_t length : {1, 3, 4, 7, 8, 15, 32, 33, 100, 4097, 65537})
        for (int64_t k : {int64_t(0), int64_t(1), length / 2, length}) runs(length, k, threads);
      for (int64_t n : {0, 1, 32, 1023, 1024, 200001}) moves(n, threads);
    }
    std::printf("%s: done\n", isa);
  }
  std::printf(failures ? "%d FAILURES\n" : "all equal\n", failures);
  return failures != 0;
}

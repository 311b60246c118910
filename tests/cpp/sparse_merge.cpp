// The CPU's merging under AddressSanitizer and UBSan: every array ends where its allocation ends; cuts against a sort, sums against plain loops.
//   cmake -S . -B build/asan -G Ninja -DFA_PYTHON=OFF -DFA_TESTS=ON && cmake --build build/asan --target sparse_merge
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <vector>

#include "core/dtypes.h"
#include "cpu/merge.h"
#include "cpu/optim.h"

namespace {

using namespace fa::cpu;

int failures = 0;
void require(bool ok, const char* what, int64_t n, int64_t k) {
  if (!ok && ++failures <= 20) std::printf("FAIL %s: n %lld, k %lld, %s\n", what, (long long)n, (long long)k, kernels().name);
}

uint32_t state = 1;
uint32_t next() { return (state = state * 1664525u + 1013904223u) >> 8; }

std::vector<float> numbers(int64_t n, uint32_t kinds) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = float(int(next() % kinds) - int(kinds / 2)) / 64.f;
  if (n > 5) x[3] = NAN, x[4] = -INFINITY;
  return x;
}

int32_t key(float f) {
  const uint32_t u = fa::as_bits(f) & 0x7fffffffu;
  return u > 0x7f800000u ? INT32_MAX : int32_t(u);
}

void test_cuts(int64_t n, uint32_t kinds) {
  const std::vector<float> x = numbers(n, kinds), base = numbers(n, kinds);
  std::vector<int32_t> keys(x.size());
  for (size_t i = 0; i < x.size(); ++i) keys[i] = key(x[i] - base[i]);
  std::vector<int64_t> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[size_t(a)] > keys[size_t(b)]; });
  for (int64_t k : {int64_t(1), n / 5, n / 2, n - 1}) {
    if (k <= 0 || k >= n) continue;
    const Cut cut = merge_cuts({{{x.data(), base.data(), fa::kF32, fa::kF32, 0, 0}, n, k}}, 2)[0];
    std::vector<char> wanted(x.size());
    for (int64_t i = 0; i < k; ++i) wanted[size_t(order[size_t(i)])] = 1;
    bool same = true;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t mine = keys[size_t(i)];
      same &= (mine > cut.key || (mine == cut.key && i <= cut.last)) == bool(wanted[size_t(i)]);
    }
    require(same, "cut", n, k);
  }
}

void test_merge(int64_t n, int combine, bool by_count) {
  const std::vector<float> base = numbers(n, 1000), first = numbers(n, 1000);
  std::vector<uint16_t> second(static_cast<size_t>(n)), out(static_cast<size_t>(n));
  for (uint16_t& h : second) h = fa::float_to_bf16(float(next() % 100) / 8.f);
  std::vector<uint32_t> words(size_t(n + 31) / 32, 0x5a5a5a5au);
  const MergePart parts[] = {{first.data(), words.data(), 0, 0.5f, 2.f, fa::kF32, -1, -1, 0},
                             {second.data(), nullptr, n / 2, 1.f, 1.f, fa::kBF16, key(0.25f), 40000, 1}};
  const MergeJob job{out.data(), base.data(), n, parts, 2, fa::kBF16, fa::kF32, combine, true, true, by_count, 0.5f, 1.5f, 7, 9};
  merge(job, 2);
  merge_votes(job, 2);
  MergeJob one = job;
  one.count = 1;
  double every = 0, some = 0, wanted = 0;
  merge_norms(one, 2, &every, &some);
  for (size_t i = 0; i < first.size(); ++i) wanted += std::fabs(double(first[i] - base[i]));
  require(every == wanted || std::isnan(wanted) || std::isinf(wanted) || std::fabs(every - wanted) < 1e-9 * wanted, "norms", n, combine);
  require(every >= 0 || std::isnan(every), "norms are not negative", n, combine);
}

}  // namespace

int main() {
  for (const char* isa : {"base", "avx2", "avx512"}) {
    if (!use_isa(isa)) continue;
    for (int64_t n : {2, 31, 33, 513, 4097, 40001, 70001, 140003})
      for (uint32_t kinds : {1u, 3u, 1000u, 1u << 20}) test_cuts(n, kinds);
    for (int64_t n : {1, 7, 31, 33, 511, 513, 65537})
      for (int combine : {int(kSum), int(kPaper), int(kPeft), int(kMergekit)})
        for (bool by_count : {false, true}) test_merge(n, combine, by_count);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}

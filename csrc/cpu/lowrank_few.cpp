// The low-rank products of a few rows: see lowrank_few_isa.cpp.
#include <cstring>

#include "../core/dtypes.h"
#include "lowrank_host.h"
#include "pool.h"

namespace fa::cpu::lowrank {
namespace {

constexpr int64_t kChunk = 256, kGrain = 1 << 16;  // columns of y at a time; elements of an adapter that are worth a thread
constexpr int64_t kWhole = 16;  // a row of fp32 is filled up to a multiple of it

int64_t padded(int64_t columns) { return ceil_div(columns, kWhole) * kWhole; }

const FewKernels& few() {
#if defined(__x86_64__)
  if (!strcmp(kernels().name, "avx512")) return few_avx512;
  if (!strcmp(kernels().name, "avx2")) return few_avx2;
#endif
  return few_base;
}

bool drops(const std::vector<Segment>& segments) {
  return std::any_of(segments.begin(), segments.end(), [](const Segment& s) { return s.threshold != 0; });
}

}  // namespace

bool few_to_shrink(const Matrix& x, const Matrix& a, const std::vector<Segment>& segments) {
  return x.rows <= kFewRows && a.step == 1 && !drops(segments);
}

bool few_to_write(const Matrix& y, const Matrix& b, const std::vector<Segment>& segments) {
  return b.columns >= kWhole && y.rows <= std::clamp<int64_t>(b.columns / 4, 4, kFewRows) && b.step == 1 && !drops(segments);
}

void few_shrink(const Matrix& x, const Matrix& a, float* u, int threads) {
  const FewKernels& k = few();
  const int64_t stride = padded(x.columns);
  float* wide = memory().others.get(x.rows * stride);
  k.widen(x, 1.f, wide, stride);
  parallel_for(a.rows, std::max<int64_t>(1, kGrain / x.columns), threads,
               [&](int64_t first, int64_t last) { k.dots(a, first, last, wide, stride, x.rows, u + first, a.rows); });
}

void few_write(const Matrix& y, bool adds, const float* bias, const float* u, float scale, const Matrix& b, int threads) {
  const FewKernels& k = few();
  const int64_t stride = padded(b.columns);
  float* wide = memory().others.get(y.rows * stride);
  k.widen({const_cast<float*>(u), kF32, y.rows, b.columns, b.columns}, scale, wide, stride);
  parallel_for(ceil_div(b.rows, kChunk), std::max<int64_t>(1, kGrain / (kChunk * b.columns)), threads, [&](int64_t first, int64_t last) {
    alignas(64) float sums[kFewRows * kChunk];
    for (int64_t n = first * kChunk; n < std::min(last * kChunk, b.rows); n += kChunk) {
      const int64_t end = std::min(n + kChunk, b.rows);
      k.dots(b, n, end, wide, stride, y.rows, sums, kChunk);
      k.put(y, adds, bias, n, end, sums, kChunk);
    }
  });
}

}  // namespace fa::cpu::lowrank

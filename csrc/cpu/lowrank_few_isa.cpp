// Products of a few rows with adapters, compiled once per instruction set (FA_ISA; the avx2 one with FMA): out[t][i] = m[i] . x[t]. Every row of m is read
// once, where it lies: panels, of which many rows make up for the making, would cost several times as much as the product.
// Bytes: m once; x, T rows in fp32, stays in the cache.
#include "lowrank_vector.h"

#include "lowrank.h"
#include "prefetch.h"

#define FA_CAT2(a, b) a##b
#define FA_CAT(a, b) FA_CAT2(a, b)

namespace fa::cpu::lowrank {
namespace {

FA_INLINE float total(F f) {
#if defined(__AVX2__)
  __m256 half, other = {};
  memcpy(&half, &f, sizeof half);
  if (kLanes == 16) memcpy(&other, reinterpret_cast<const char*>(&f) + (kLanes - 8) * sizeof(float), sizeof other);
  half = _mm256_add_ps(half, other);
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
#else
  return (f[0] + f[2]) + (f[1] + f[3]);
#endif
}

// The last `left` < kLanes elements of a row, in the upper lanes, zeros below: the last whole vector of it, masked.
template <class Format>
FA_INLINE F tail(const typename Format::E* row, int64_t columns, int64_t left) {
  if (columns < kLanes) return widen_at<Format>(row, left);
  I keep;
  for (int i = 0; i < kLanes; ++i) keep[i] = i < kLanes - left ? 0 : -1;
  return F(I(Format::widen(load<typename Format::V>(row + columns - kLanes))) & keep);
}

template <class Format, int T>
void dots_of(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t stride, float* out, int64_t out_stride) {
  constexpr int kChains = T == 1 ? 4 : 2;
  constexpr int64_t kAhead = 4096;  // bytes that memory is asked for in advance: the hardware stops where pages end
  using E = typename Format::E;
  for (int64_t i = first; i < last; ++i) {
    const E* row = static_cast<const E*>(m.data) + i * m.stride;
    F sum[T][kChains] = {};
    const auto add = [&](F v, int chain, int64_t j) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sum[t][chain] = fma(v, load<F>(x + t * stride + j), sum[t][chain]);
    };
    int64_t j = 0;
    for (; j + kChains * kLanes <= m.columns; j += kChains * kLanes)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const E* p = row + j + c * kLanes;
        prefetch_line(reinterpret_cast<const char*>(p) + kAhead);
        add(Format::widen(load<typename Format::V>(p)), c, j + c * kLanes);
      }
    for (; j + kLanes <= m.columns; j += kLanes) add(Format::widen(load<typename Format::V>(row + j)), 0, j);
    if (j < m.columns) add(tail<Format>(row, m.columns, m.columns - j), 0, j);
    for (int t = 0; t < T; ++t) {
      F all = sum[t][0] + sum[t][1];
      if (kChains == 4) all += sum[t][2 % kChains] + sum[t][3 % kChains];
      out[t * out_stride + i - first] = total(all);
    }
  }
}

void dots(const Matrix& m, int64_t first, int64_t last, const float* x, int64_t stride, int64_t rows, float* out, int64_t out_stride) {
  with_format(m.dtype, [&](auto format) {
    using Format = decltype(format);
    constexpr void (*kOf[])(const Matrix&, int64_t, int64_t, const float*, int64_t, float*, int64_t) = {
        dots_of<Format, 1>, dots_of<Format, 2>, dots_of<Format, 3>, dots_of<Format, 4>};
    for (int64_t t = 0; t < rows; t += 4)
      kOf[(rows - t < 4 ? rows - t : 4) - 1](m, first, last, x + t * stride, stride, out + t * out_stride, out_stride);
  });
}

void widen(const Matrix& x, float scale, float* to, int64_t stride) {
  with_format(x.dtype, [&](auto format) {
    using Format = decltype(format);
    for (int64_t t = 0; t < x.rows; ++t) {
      const auto* row = static_cast<const typename Format::E*>(x.data) + t * x.stride;
      for (int64_t j = 0; j < x.columns; j += kLanes) {
        const int64_t left = x.columns - j;
        store(to + t * stride + j, (left < kLanes ? tail<Format>(row, x.columns, left) : widen_at<Format>(row + j, left)) * splat(scale));
      }
    }
  });
}

void put(const Matrix& y, bool adds, const float* bias, int64_t first, int64_t last, const float* sums, int64_t stride) {
  with_format(y.dtype, [&](auto format) {
    using Format = decltype(format);
    for (int64_t t = 0; t < y.rows; ++t) {
      auto* row = static_cast<typename Format::E*>(y.data) + t * y.stride + first;
      for (int64_t j = 0; j < last - first; j += kLanes) {
        F f = widen_at<F32>(sums + t * stride + j, last - first - j);
        if (adds) f += widen_at<Format>(row + j, last - first - j);
        if (bias) f += widen_at<F32>(bias + first + j, last - first - j);
        narrow_at<Format>(row + j, f, last - first - j);
      }
    }
  });
}

}  // namespace

extern const FewKernels FA_CAT(few_, FA_ISA);
const FewKernels FA_CAT(few_, FA_ISA) = {widen, dots, put};

}  // namespace fa::cpu::lowrank

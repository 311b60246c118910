// Products with a low-bit weight for a few rows, compiled once per instruction set (FA_ISA; the avx2 one with FMA). The codes are read once; numbers are
// made in registers and scales are applied once per group. In which order things are added depends on shapes alone.
#include "quant_pairs.h"

#define FA_CAT2(a, b) a##b
#define FA_CAT(a, b) FA_CAT2(a, b)
#define FA_STR2(a) #a
#define FA_STR(a) FA_STR2(a)

namespace fa::cpu::quant {
namespace {

void size(const Weight& w, int64_t* row, int64_t* sums) {
  const Layout a = layout_of(w);
  *row = a.padded() + 144;  // rows of x 2^n bytes apart would share few cache sets
  *sums = a.units * kLanes;
}

// Codes are at most 16 * 255, so sums of 2^20 products with numbers below 2^96 stay finite. What underflows in a row that holds 2^96 or more is less
// than 2^-110 of its largest number.
constexpr float kHuge = 0x1p96f, kShrink = 0x1p-64f;

float factor(const Product& p, int64_t t, int64_t columns) {
  float largest = 0;
  with_format(p.dtype, [&](auto format) {
    using Format = decltype(format);
    const auto* x = static_cast<const typename Format::E*>(p.x) + t * p.stride;
    F most = {};
    for (int64_t i = 0; i < columns; i += kLanes) {
      const F m = F(I(widen_at<Format>(x + i, columns - i)) & 0x7fffffff);
      most = m > most ? m : most;
    }
    for (int lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  });
  return largest == as_float(0x7f800000u) ? 0.f : largest >= kHuge ? kShrink : 1.f;
}

#if defined(__AVX512BW__)
void arrange_pairs(const Weight& w, const Product& p, int64_t t, const Operand& to) {
  const Turns turns(p);
  const Layout a = layout_of(w);
  const int64_t first = t / turns.tokens * turns.tokens, count = turns.count(p, first), pairs = a.per / 2;
  const auto* from = static_cast<const uint16_t*>(p.x) + t * p.stride;
  uint16_t* x = reinterpret_cast<uint16_t*>(to.x + first * to.stride) + (t - first) * 2 * kLanes;
  F sum = {};
  for (int64_t c = 0; c < a.padded(); c += a.block) {
    if (c % a.unit == 0) sum = F{};
    for (int64_t j = 0; j < pairs; ++j, x += count * 2 * kLanes) {
      U pair = {};
      for (int lane = 0; lane < kLanes; ++lane)
        for (int half = 0; half < 2; ++half)
          if (const int64_t column = c + lane * a.per + pair_column(w, a, j, half); column < w.k)
            pair[lane] |= uint32_t(from[column]) << (16 * half);
      store(x, pair);
      sum += F(pair << 16) + F(pair & 0xffff0000u);
    }
    if (a.zeros && (c + a.block) % a.unit == 0) store(to.sums + t * to.sums_stride + c / a.unit * kLanes, sum);
  }
}
#endif

void arrange(const Weight& w, const Product& p, int64_t t, const Operand& to) {
#if defined(__AVX512BW__)
  if (to.pairs) return arrange_pairs(w, p, t, to);
#endif
  const Turns turns(p);
  const Layout a = layout_of(w, turns.tokens);
  const Places places(w, a);
  const int64_t first = t / turns.tokens * turns.tokens, count = turns.count(p, first);
  float* const x = to.x + first * to.stride + (t - first) * kLanes;
  F sum = {};
  with_format(p.dtype, [&](auto format) {
    using Format = decltype(format);
    const auto* from = static_cast<const typename Format::E*>(p.x) + t * p.stride;
    const float factor = to.factor[t] * (a.sixteenfold ? 16.f : 1.f);
    for (int64_t c = 0; c < a.padded(); c += kLanes) {
      F v = {};
      for (int lane = 0; lane < kLanes; ++lane)
        if (const int64_t column = c / a.block * a.block + places.column[c % a.block + lane]; column < w.k)
          v[lane] = Format::widen_one(from[column]) * factor;
      store(x + c * count, a.sixteenfold && c / kLanes % 2 ? v * splat(0.0625f) : v);
      sum = c % a.unit ? sum + v : v;
      if (a.zeros && turns.tokens <= kFew && (c + kLanes) % a.unit == 0) store(to.sums + t * to.sums_stride + c / a.unit * kLanes, sum);
    }
  });
}

FA_INLINE float total(F f) {
  float sum = f[0];
  for (int lane = 1; lane < kLanes; ++lane) sum += f[lane];
  return sum;
}

// ---- y = x W^T ----

// to[n - n0, t] += W[n] . x[t]
void add_up(const Weight& w, const Layout& a, const Product& p, const Operand& o, int64_t n0, int64_t n1, F* to) {
#if defined(__AVX512BW__)
  if (o.pairs) return (w.bits == 4 ? linear_pairs<PairLane<4>> : linear_pairs<PairLane<2>>)(w, a, p, o, n0, n1, to);
#endif
  if (!a.direct) return linear_decoded(w, p, o, n0, n1, to);
  with_lane(w, a,
            [&](auto lane) { (a.wide ? linear_as<decltype(lane), true> : linear_as<decltype(lane), false>)(w, a, p, o, n0, n1, to); });
}

void linear(const Weight& w, const Product& p, const Operand& o, int64_t n0, int64_t n1) {
  const Layout a = layout_of(w, Turns(p).tokens);
  for (int64_t n = n0; n < n1; n += kRows) {
    const int64_t end = least(n + kRows, n1);
    F sums[kRows * kMostRows];  // of the rows of x one after another, for every row of W
    for (F& sum : sums) sum = F{};
    add_up(w, a, p, o, n, end, sums);
    with_format(p.dtype, [&](auto format) {
      using Format = decltype(format);
      for (int64_t t = 0; t < p.t; ++t)
        for (int64_t i = n; i < end; ++i) {
          const float y = total(sums[(i - n) * p.t + t]) / (a.sixteenfold ? 16.f * o.factor[t] : o.factor[t]) + (p.bias ? p.bias[i] : 0.f);
          static_cast<typename Format::E*>(p.y)[t * w.n + i] = Format::narrow_one(y);
        }
    });
  }
}

// ---- dx = dy W ----

constexpr int64_t kHigh = 4;  // rows of W that are added to the sums at once

template <class Format>
FA_INLINE float dy_at(const Product& p, int64_t t, int64_t n) {
  return Format::widen_one(static_cast<const typename Format::E*>(p.x)[t * p.stride + n]);
}

float dy_at(const Product& p, int64_t t, int64_t n) {
  float f = 0;
  with_format(p.dtype, [&](auto format) { f = dy_at<decltype(format)>(p, t, n); });
  return f;
}

// to += sum over kHigh rows of dy * S * (code - zero), for T rows of dy.
template <class D, int T, bool wide>
__attribute__((noinline)) void add_chunk(const D& d, const Layout& a, const Chunk* rows, const float (*dy)[kMostRows], int64_t blocks,
                                         float* to, int64_t stride) {
  const int64_t most = a.most;
  for (int64_t u = 0; u * most < blocks; ++u) {
    const I place = a.place + int(u * a.step);
    F factor[T][kHigh], zero[kHigh];
#pragma GCC unroll 4
    for (int r = 0; r < kHigh; ++r) {
      zero[r] = a.zeros ? granules_at<wide>(rows[r].z, u, a.step, place) : F{};
      const F s = granules_at<wide>(rows[r].s, u, a.step, place);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) factor[t][r] = s * splat(dy[r][t]);
    }
    for (int64_t b = u * most; b < least((u + 1) * most, blocks); ++b) {
      U word[kHigh];
#pragma GCC unroll 4
      for (int r = 0; r < kHigh; ++r) word[r] = words_at<D>(rows[r].codes + b * D::kBytes);
#pragma GCC unroll 16
      for (int part = 0; part < D::kPer / D::kStep; ++part) {
        float* at = to + b * a.block + part * D::kStep * kLanes;
        F sum[T][D::kStep];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
          for (int i = 0; i < D::kStep; ++i) sum[t][i] = load<F>(at + t * stride + i * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kHigh; ++r) {
          F v[D::kStep];
          D::part(d, word[r], part, v);
#pragma GCC unroll 4
          for (int i = 0; i < D::kStep; ++i) {
            v[i] -= zero[r];
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) sum[t][i] = fma(factor[t][r], v[i], sum[t][i]);
          }
        }
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
          for (int i = 0; i < D::kStep; ++i) store(at + t * stride + i * kLanes, sum[t][i]);
      }
    }
  }
}

template <class D, bool wide>
FA_INLINE void add_rows(int64_t count, const D& d, const Layout& a, const Chunk* rows, const float (*dy)[kMostRows], int64_t blocks,
                        float* to, int64_t stride) {
  if (count == 1) return add_chunk<D, 1, wide>(d, a, rows, dy, blocks, to, stride);
  if (count == 2) return add_chunk<D, 2, wide>(d, a, rows, dy, blocks, to, stride);
  if (count == 3) return add_chunk<D, 3, wide>(d, a, rows, dy, blocks, to, stride);
  add_chunk<D, 4, wide>(d, a, rows, dy, blocks, to, stride);
}

template <class D>
void dx_direct(const Weight& w, const Layout& a, const Product& p, int64_t n0, int64_t n1, const Operand& o) {
  D d;
  D::set(d, w);
  Chunk rows[kHigh];
  for (int64_t n = n0; n < n1; n += kHigh)
    for (int64_t c = 0; c < w.k; c += kChunk) {
      const Span span(w, a, c, c + kChunk);
      float dy[kHigh][kMostRows];
      for (int64_t r = 0; r < kHigh; ++r) {
        const bool given = n + r < n1;
        if (given)
          rows[r].read(w, a, span, n + r);
        else
          rows[r].clear();
        for (int64_t t = 0; t < p.t; ++t) dy[r][t] = given ? dy_at(p, t, n + r) * o.factor[t] : 0.f;
      }
      for (int64_t t = 0; t < p.t; t += 4) {
        float* to = o.x + t * o.stride + c;
        const auto* some = reinterpret_cast<const float (*)[kMostRows]>(dy[0] + t);
        if (a.wide)
          add_rows<D, true>(least(4, p.t - t), d, a, rows, some, span.blocks, to, o.stride);
        else
          add_rows<D, false>(least(4, p.t - t), d, a, rows, some, span.blocks, to, o.stride);
      }
    }
}

void dx_decoded(const Weight& w, const Product& p, int64_t n0, int64_t n1, const Operand& o) {
  Numbers numbers;
  for (int64_t n = n0; n < n1; ++n)
    for (int64_t c = 0; c < w.k; c += kDecoded) {
      const int64_t end = least(c + kDecoded, w.k);
      const float* const row = numbers.read(w, n, c, end);
      for (int64_t t = 0; t < p.t; ++t) {
        float* to = o.x + t * o.stride + c;
        const F dy = splat(dy_at(p, t, n) * o.factor[t]);
        for (int64_t i = 0; i < end - c; i += kLanes) store(to + i, fma(dy, load<F>(row + i), load<F>(to + i)));
      }
    }
}

void linear_dx(const Weight& w, const Product& p, int64_t n0, int64_t n1, const Operand& o) {
  const Layout a = layout_of(w);
  memset(o.x, 0, size_t(p.t * o.stride) * sizeof(float));
  if (a.direct)
    with_lane(w, a, [&](auto lane) { dx_direct<decltype(lane)>(w, a, p, n0, n1, o); });
  else
    dx_decoded(w, p, n0, n1, o);
}

void finish_dx(const Weight& w, const Product& p, int64_t t, const Operand& all, int64_t step, int64_t count) {
  const Layout a = layout_of(w);
  const float* const sums = all.x + t * all.stride;
  const Places places(w, a);
  with_format(p.dtype, [&](auto format) {
    using Format = decltype(format);
    auto* y = static_cast<typename Format::E*>(p.y) + t * w.k;
    for (int64_t c = 0; c < a.padded(); c += a.block)
      for (int64_t i = 0; i < a.block; i += kLanes) {
        F sum = load<F>(sums + c + i);
        for (int64_t slot = 1; slot < count; ++slot) sum += load<F>(sums + slot * step + c + i);
        for (int lane = 0; lane < kLanes; ++lane)
          if (const int64_t column = c + places.column[i + lane]; column < w.k) y[column] = Format::narrow_one(sum[lane] / all.factor[t]);
      }
  });
}

}  // namespace

extern const ProductKernels FA_CAT(product_, FA_ISA) = {FA_STR(FA_ISA), size, factor, pairs_fit, arrange, linear, linear_dx, finish_dx};

}  // namespace fa::cpu::quant

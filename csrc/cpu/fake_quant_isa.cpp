// Fake quantization of a piece, one pass forward and one backward. Compiled once per instruction set (FA_ISA).
// Bytes per element: x read, y written; backward x and dy read, dx written. The operations and their order are those of
// fusedadapt/reference/fake_quant.py; sums are taken in 16 lanes whatever the instruction set, so that they are the same bits on all of them.
// No function of the standard library's templates here: the linker might pick the AVX copy for every set.
#include "fake_quant.h"

#include "lowrank_vector.h"

#define FA_CAT2(a, b) a##b
#define FA_CAT(a, b) FA_CAT2(a, b)

namespace fa::cpu {
namespace {

using namespace lowrank;

constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to whole numbers, to nearest even, and leaves no -0
constexpr float kTiny = 0x1p-120f, kInfinity = __builtin_inff();
constexpr int kSumLanes = 16, kSumParts = kSumLanes / kLanes;
constexpr int64_t kSumBlock = 512;  // elements added up in fp32: 32 in a lane, then fp64
constexpr int64_t kSumRows = 64;  // the same down a column

FA_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The first where it is the smaller (larger) one; the second otherwise, also where that is NaN.
FA_INLINE F smaller(F a, F b) {
#if defined(__AVX512F__)
  return F(_mm512_maskz_min_ps(0xffff, __m512(a), __m512(b)));
#elif defined(__AVX2__)
  return F(_mm256_min_ps(__m256(a), __m256(b)));
#elif defined(__x86_64__)
  return F(_mm_min_ps(__m128(a), __m128(b)));
#else
  return a < b ? a : b;
#endif
}
FA_INLINE F larger(F a, F b) {
#if defined(__AVX512F__)
  return F(_mm512_maskz_max_ps(0xffff, __m512(a), __m512(b)));
#elif defined(__AVX2__)
  return F(_mm256_max_ps(__m256(a), __m256(b)));
#elif defined(__x86_64__)
  return F(_mm_max_ps(__m128(a), __m128(b)));
#else
  return a > b ? a : b;
#endif
}

FA_INLINE float nearest(float f) { return (f + kRounder) - kRounder; }
// The neighbour of a number other than 0.
FA_INLINE float next_up(float f) { return as_float(as_bits(f) + (f > 0.f ? 1u : ~0u)); }
FA_INLINE float next_down(float f) { return -next_up(-f); }

// What one group's elements need. step: 1 / scale, or the scale itself to divide by. from, to: the values of u that a gradient passes.
template <class T>
struct Group {
  T step, scale, low, high, offset, from, to;
};

FA_INLINE Group<float> group_at(const FakeQuant& job, int64_t g) {
  Group<float> out;
  const float least_ = job.low ? job.low[g * job.bound_step] : job.quant_min;
  const float most = job.high ? job.high[g * job.bound_step] : job.quant_max;
  float zero = 0.f;  // none given is 0, also where the range excludes it
  if (job.zero) {
    zero = job.zero[g * job.zero_step];
    zero = zero < least_ ? least_ : zero;
    zero = nearest(zero > most ? most : zero);
  }
  out.low = least_ - zero;
  out.high = most - zero;
  out.scale = job.scale[g] + ((out.low - out.low) + (out.high - out.high));  // NaN or infinite bounds must not pass unseen
  out.offset = job.offset ? job.offset[g * job.offset_step] : 0.f;
  const float magnitude = as_float(as_bits(out.scale) & 0x7fffffffu), step = magnitude < kTiny ? kInfinity : out.scale;
  out.step = job.divide ? step : 1.f / step;
  out.from = out.low;
  out.to = out.high;
  if (job.inside == kRound) {  // rounded: half a step more, and the tie itself where it rounds to the even bound
    const float below = out.low - 0.5f, above = out.high + 0.5f;
    out.from = nearest(below) == out.low ? below : next_up(below);
    out.to = nearest(above) == out.high ? above : next_down(above);
  }
  return out;
}

FA_INLINE Group<F> everywhere(const Group<float>& g) {
  return {splat(g.step), splat(g.scale), splat(g.low), splat(g.high), splat(g.offset), splat(g.from), splat(g.to)};
}

// The value in steps. x - 0 is x, so that an absent offset costs no branch.
template <bool kDivide>
FA_INLINE F in_steps(F x, const Group<F>& g) {
  return kDivide ? (x - g.offset) / g.step : (x - g.offset) * g.step;
}
FA_INLINE F level(F u, const Group<F>& g) { return (smaller(g.high, larger(g.low, u)) + kRounder) - kRounder; }
FA_INLINE I inside(F u, const Group<F>& g, I all) { return ((g.from <= u) & (u <= g.to)) | all; }
FA_INLINE F only(I mask, F f) { return F(I(f) & mask); }

template <bool kDivide, bool kOffset>
FA_INLINE F faked(F x, const Group<F>& g) {
  const F y = level(in_steps<kDivide>(x, g), g) * g.scale;
  return kOffset ? y + g.offset : y;
}

struct Gradients {
  F x, scale, outside;
};
template <bool kDivide>
FA_INLINE Gradients gradients(F x, F dy, const Group<F>& g, I all) {
  const F u = in_steps<kDivide>(x, g);
  const I in = inside(u, g, all);
  return {only(in, dy), dy * (level(u, g) - only(in, u)), only(~in, dy)};
}

// ---- runs

template <class Format, bool kDivide, bool kOffset>
void forward_run(const FakeQuant& job, void* out, int64_t group, int64_t begin, int64_t end) {
  using E = typename Format::E;
  const E* x = static_cast<const E*>(job.x) + begin;
  E* y = static_cast<E*>(out) + begin;
  const Group<F> g = everywhere(group_at(job, group));
  const int64_t n = end - begin;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(y + i, Format::narrow(faked<kDivide, kOffset>(Format::widen(load<typename Format::V>(x + i)), g)));
  if (i < n) narrow_at<Format>(y + i, faked<kDivide, kOffset>(widen_at<Format>(x + i, n - i), g), n - i);
}

// Sums of a block, lane by lane.
struct LaneSums {
  F scale[kSumParts] = {}, outside[kSumParts] = {};

  FA_HD static double total(const F* parts) {
    float lanes[kSumLanes];
    memcpy(lanes, parts, sizeof lanes);
    for (int width = kSumLanes / 2; width; width /= 2)
      for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return double(lanes[0]);
  }
};

template <class Format, bool kDivide, bool kSums>
void backward_run(const FakeQuant& job, const void* grad, void* out, int64_t group, int64_t begin, int64_t end, FakeSums* sums) {
  using E = typename Format::E;
  using V = typename Format::V;
  const E *x = static_cast<const E*>(job.x) + begin, *dy = static_cast<const E*>(grad) + begin;
  E* dx = static_cast<E*>(out) + begin;
  const Group<F> g = everywhere(group_at(job, group));
  const I all = I{} - int32_t(job.inside == kIdentity);
  FakeSums total{0, 0};
  for (int64_t block = 0; block < end - begin; block += kSumBlock) {
    const int64_t n = least(block + kSumBlock, end - begin);
    LaneSums lanes;
    int64_t i = block;
    for (; i + kSumLanes <= n; i += kSumLanes)
      for (int p = 0; p < kSumParts; ++p) {
        const int64_t at = i + p * kLanes;
        const Gradients d = gradients<kDivide>(Format::widen(load<V>(x + at)), Format::widen(load<V>(dy + at)), g, all);
        store(dx + at, Format::narrow(d.x));
        if (kSums) lanes.scale[p] += d.scale, lanes.outside[p] += d.outside;
      }
    for (int p = 0; p < kSumParts && i + p * kLanes < n; ++p) {
      const int64_t at = i + p * kLanes, left = n - at;
      const Gradients d = gradients<kDivide>(widen_at<Format>(x + at, left), widen_at<Format>(dy + at, left), g, all);
      narrow_at<Format>(dx + at, d.x, left);
      if (kSums) lanes.scale[p] += d.scale, lanes.outside[p] += d.outside;
    }
    if (kSums) total.scale += lanes.total(lanes.scale), total.outside += lanes.total(lanes.outside);
  }
  if (kSums) *sums = total;
}

// ---- columns

// The numbers of a block of columns; beyond its end those of its last column.
struct Columns {
  alignas(64) Group<float[kFakeColumns]> of;

  FA_HD Columns(const FakeQuant& job, int64_t c0, int64_t c1) {
    Group<float> g{};
    int64_t known = -1;
    for (int64_t c = c0; c < c0 + kFakeColumns && c < c1 + kLanes; ++c) {
      const int i = int(c - c0);
      if (c < c1 && c / job.run != known) g = group_at(job, known = c / job.run);
      of.step[i] = g.step, of.scale[i] = g.scale, of.low[i] = g.low, of.high[i] = g.high, of.offset[i] = g.offset, of.from[i] = g.from,
      of.to[i] = g.to;
    }
  }
  FA_HD Group<F> at(int64_t i) const {
    return {load<F>(of.step + i),   load<F>(of.scale + i), load<F>(of.low + i), load<F>(of.high + i),
            load<F>(of.offset + i), load<F>(of.from + i),  load<F>(of.to + i)};
  }
};

template <class Format, bool kDivide, bool kOffset>
void forward_columns(const FakeQuant& job, void* out, int64_t row0, int64_t row1, int64_t c0, int64_t c1) {
  using E = typename Format::E;
  const Columns columns(job, c0, c1);
  const int64_t width = job.groups * job.run, n = c1 - c0;
  for (int64_t row = row0; row < row1; ++row) {
    const E* x = static_cast<const E*>(job.x) + row * width + c0;
    E* y = static_cast<E*>(out) + row * width + c0;
    for (int64_t i = 0; i < n; i += kLanes)
      narrow_at<Format>(y + i, faked<kDivide, kOffset>(widen_at<Format>(x + i, n - i), columns.at(i)), n - i);
  }
}

template <class Format, bool kDivide, bool kSums>
void backward_columns(const FakeQuant& job, const void* grad, void* out, int64_t row0, int64_t row1, int64_t c0, int64_t c1,
                      FakeSums* sums) {
  using E = typename Format::E;
  const Columns columns(job, c0, c1);
  const int64_t width = job.groups * job.run, n = c1 - c0;
  const I all = I{} - int32_t(job.inside == kIdentity);
  alignas(64) float scale[kFakeColumns] = {}, outside[kFakeColumns] = {};
  if (kSums)
    for (int64_t i = 0; i < n; ++i) sums[i] = {0, 0};
  for (int64_t row = row0; row < row1; ++row) {
    const int64_t at = row * width + c0;
    const E *x = static_cast<const E*>(job.x) + at, *dy = static_cast<const E*>(grad) + at;
    E* dx = static_cast<E*>(out) + at;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Gradients d = gradients<kDivide>(widen_at<Format>(x + i, n - i), widen_at<Format>(dy + i, n - i), columns.at(i), all);
      narrow_at<Format>(dx + i, d.x, n - i);
      if (kSums) store(scale + i, load<F>(scale + i) + d.scale), store(outside + i, load<F>(outside + i) + d.outside);
    }
    if (kSums && ((row - row0 + 1) % kSumRows == 0 || row + 1 == row1))
      for (int64_t i = 0; i < n; ++i) {
        sums[i].scale += double(scale[i]), sums[i].outside += double(outside[i]);
        scale[i] = outside[i] = 0.f;
      }
  }
}

// ---- choosing among the compiled variants

template <bool v>
struct Flag {
  static constexpr bool value = v;
};
using Yes = Flag<true>;
using No = Flag<false>;

template <class Call>
FA_INLINE void with_flags(bool a, bool b, Call call) {
  if (a)
    b ? call(Yes{}, Yes{}) : call(Yes{}, No{});
  else
    b ? call(No{}, Yes{}) : call(No{}, No{});
}

void forward(const FakeQuant& job, void* y, int64_t group, int64_t begin, int64_t end) {
  with_format(job.dtype, [&](auto format) {
    with_flags(job.divide, job.offset != nullptr, [&](auto divide, auto offset) {
      forward_run<decltype(format), decltype(divide)::value, decltype(offset)::value>(job, y, group, begin, end);
    });
  });
}

void backward(const FakeQuant& job, const void* dy, void* dx, int64_t group, int64_t begin, int64_t end, FakeSums* sums) {
  with_format(job.dtype, [&](auto format) {
    with_flags(job.divide, sums != nullptr, [&](auto divide, auto wanted) {
      backward_run<decltype(format), decltype(divide)::value, decltype(wanted)::value>(job, dy, dx, group, begin, end, sums);
    });
  });
}

void forward_by_columns(const FakeQuant& job, void* y, int64_t row0, int64_t row1, int64_t c0, int64_t c1) {
  with_format(job.dtype, [&](auto format) {
    with_flags(job.divide, job.offset != nullptr, [&](auto divide, auto offset) {
      forward_columns<decltype(format), decltype(divide)::value, decltype(offset)::value>(job, y, row0, row1, c0, c1);
    });
  });
}

void backward_by_columns(const FakeQuant& job, const void* dy, void* dx, int64_t row0, int64_t row1, int64_t c0, int64_t c1,
                         FakeSums* sums) {
  with_format(job.dtype, [&](auto format) {
    with_flags(job.divide, sums != nullptr, [&](auto divide, auto wanted) {
      backward_columns<decltype(format), decltype(divide)::value, decltype(wanted)::value>(job, dy, dx, row0, row1, c0, c1, sums);
    });
  });
}

}  // namespace

extern const FakeKernels FA_CAT(fake_, FA_ISA);
const FakeKernels FA_CAT(fake_, FA_ISA) = {forward, backward, forward_by_columns, backward_by_columns};

}  // namespace fa::cpu

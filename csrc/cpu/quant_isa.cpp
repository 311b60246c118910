// The codec, compiled once per instruction set (FA_ISA). quant.h says what it computes; its bytes are the reference's, so nothing here may be fused or
// approximated.
#include "quant_decode.h"

#define FA_CAT2(a, b) a##b
#define FA_CAT(a, b) FA_CAT2(a, b)

namespace fa::cpu::quant {
namespace {

// ---- statistics ----

// Least and largest so far; a NaN stays.
struct Range {
  F lo, hi;
};

FA_INLINE void widen_range(Range& r, F x) {
  const I nan = x != x;
  r.lo = (x < r.lo) | nan ? x : r.lo;
  r.hi = (x > r.hi) | nan ? x : r.hi;
}

FA_INLINE void widen_range(float* lo, float* hi, float x) {
  *lo = x < *lo || x != x ? x : *lo;
  *hi = x > *hi || x != x ? x : *hi;
}

template <class Format>
void range_of_run(const typename Format::E* x, int64_t n, float* lo, float* hi) {
  Range r = {splat(*lo), splat(*hi)};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) widen_range(r, Format::widen(load<typename Format::V>(x + i)));
  if (i > 0) {
#pragma GCC unroll 4
    for (int step = kLanes / 2; step > 0; step /= 2) {
      I other;
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) other[lane] = lane ^ step;
      const F l = __builtin_shuffle(r.lo, other), h = __builtin_shuffle(r.hi, other);
      r.lo = (l < r.lo) | (l != l) ? l : r.lo;
      r.hi = (h > r.hi) | (h != h) ? h : r.hi;
    }
    *lo = r.lo[0], *hi = r.hi[0];
  }
  for (; i < n; ++i) widen_range(lo, hi, Format::widen_one(x[i]));
}

template <class Format>
void range_of_columns(const typename Format::E* x, int64_t n, float* lo, float* hi) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Range r = {load<F>(lo + i), load<F>(hi + i)};
    widen_range(r, Format::widen(load<typename Format::V>(x + i)));
    store(lo + i, r.lo);
    store(hi + i, r.hi);
  }
  for (; i < n; ++i) widen_range(lo + i, hi + i, Format::widen_one(x[i]));
}

void stats(const Statistics& a, int64_t row0, int64_t row1, int64_t tile0, int64_t tile1, float* lo, float* hi) {
  const int64_t side = a.grid.columns;
  for (int64_t t = tile0; t < tile1; ++t) lo[t - tile0] = as_float(0x7f800000u), hi[t - tile0] = as_float(0xff800000u);
  with_format(a.dtype, [&](auto format) {
    using Format = decltype(format);
    for (int64_t r = row0; r < row1; ++r) {
      const auto* x = static_cast<const typename Format::E*>(a.w) + r * a.k;
      if (side == 1)
        range_of_columns<Format>(x + tile0, tile1 - tile0, lo, hi);
      else
        for (int64_t t = tile0; t < tile1; ++t)
          range_of_run<Format>(x + t * side, least(side, a.k - t * side), lo + t - tile0, hi + t - tile0);
    }
  });
}

// ---- encoding ----

// Nearest even.
FA_INLINE I nearest(F f) {
#if defined(__AVX512F__)
  return I(_mm512_maskz_cvtps_epi32(0xffff, __m512(f)));
#elif defined(__AVX2__)
  return I(_mm256_cvtps_epi32(__m256(f)));
#elif defined(__x86_64__)
  return I(_mm_cvtps_epi32(__m128(f)));
#else
  I out;
  for (int i = 0; i < kLanes; ++i) out[i] = int32_t(__builtin_nearbyintf(f[i]));
  return out;
#endif
}

FA_INLINE I within(I v, int32_t low, int32_t high) {
  const I least = I{} + low, most = I{} + high;
  v = v < least ? least : v;
  return v > most ? most : v;
}

struct Codes {
  alignas(64) float v[kPiece + kLanes], groups[kPiece + kLanes], f[kPiece + kLanes];
  alignas(64) uint8_t codes[kPiece + 64];
};

// v = w * factor or w / factor; 0 where the factor is 0 or not finite, or v is NaN.
template <class Format>
void scale_values(const Encoding& e, int64_t row, int64_t c0, int64_t n, Codes& p) {
  const auto* x = static_cast<const typename Format::E*>(e.w) + row * e.k + c0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F w = widen_at<Format>(x + i, n - i), f = load<F>(p.f + i);
    const F v = e.divide ? w / f : w * f;
    const I good = (f != F{}) & (f - f == F{}) & (v == v);
    store(p.v + i, F(I(v) & good));
  }
}

// Far beyond any code, yet exact as an integer.
constexpr float kFar = 1 << 20;

void integers(const Encoding& e, int64_t n, Codes& p) {
  for (int64_t i = 0; i < n; i += kLanes) {
    F v = load<F>(p.v + i);
    const F z = e.zero ? load<F>(p.f + i) : splat(float(e.bias));
    if (e.round_last) v += z;
    const I number = v == v;
    v = v < splat(-kFar) ? splat(-kFar) : v > splat(kFar) ? splat(kFar) : v;
    const I q = nearest(v) + (e.round_last ? I{} : __builtin_convertvector(z, I));
    store_bytes(p.codes + i, U(within(q, e.low, e.high) & number));
  }
}

FA_INLINE I half_of(const Encoding& e, F v) {
  if (!e.magnitude) return I{};
  return (e.sign_bit ? I(v) < I{} : v < F{}) & (1 << (e.bits - 1));
}

FA_INLINE F magnitude_of(const Encoding& e, F v) { return e.magnitude ? F(I(v) & 0x7fffffff) : v; }

void few_cuts(const Encoding& e, int64_t n, Codes& p) {
  F cuts[15];
  float order[16] = {};
  for (int i = 0; i < e.cut_count; ++i) cuts[i] = splat(e.cuts[i]);
  for (int i = 0; i <= e.cut_count; ++i) order[i] = as_float(e.order[i]);
  Lookup<4> code;
  Lookup<4>::set(code, order);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F v = load<F>(p.v + i), m = magnitude_of(e, v);
    I count = {};
    for (int k = 0; k < e.cut_count; ++k) count -= I(m > cuts[k]);
    store_bytes(p.codes + i, U(Lookup<4>::at(code, U(count))) + U(half_of(e, v)));
  }
}

// From a bucket of neighbouring numbers on, past the few cuts that lie in it.
void many_cuts(const Encoding& e, int64_t n, Codes& p) {
  alignas(64) float cuts[257], order[256] = {};
  for (int i = 0; i < 257; ++i) cuts[i] = i < e.cut_count ? e.cuts[i] : as_float(0x7f800000u);
  for (int i = 0; i <= e.cut_count; ++i) order[i] = as_float(e.order[i]);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F v = load<F>(p.v + i), m = magnitude_of(e, v);
    const I bucket =
        within((I(m) & 0x7fffffff) >> CutIndex::kShift, CutIndex::kFirst, CutIndex::kFirst + CutIndex::kSize - 1) - CutIndex::kFirst;
    U count = U(picked(e.index->start, U(bucket + ((I(m) >> 31) & CutIndex::kSize))));
    for (int step = 0; step < e.index->steps; ++step) count -= U(m > picked(cuts, count));
    store_bytes(p.codes + i, U(picked(order, count)) + U(half_of(e, v)));
  }
}

template <int exponent>
void floats(int64_t n, Codes& p) {
  for (int64_t i = 0; i < n; i += kLanes) store_bytes(p.codes + i, U(Float8<exponent>::code(load<F>(p.v + i))));
}

// Codes, filled up to whole eights, into bytes.
void pack(const Encoding& e, int64_t n, const uint8_t* codes, uint8_t* out) {
  const int64_t bytes = (n * e.bits + 7) / 8;
  if (e.bits == 8) {
    memcpy(out, codes, size_t(n));
  } else if (e.bits == 4) {
    const int high = e.flat ? 0 : 4, low = 4 - high;
    for (int64_t i = 0; i < bytes; ++i) out[i] = uint8_t(codes[2 * i + 1] << high | codes[2 * i] << low);
  } else if (e.bits == 2) {
    for (int64_t i = 0; i < bytes; ++i)
      out[i] = uint8_t(codes[4 * i] | codes[4 * i + 1] << 2 | codes[4 * i + 2] << 4 | codes[4 * i + 3] << 6);
  } else {
    for (int64_t i = 0; i < n; i += 8) {
      uint32_t word = 0;
      for (int j = 0; j < 8; ++j) word |= uint32_t(codes[i + j]) << 3 * j;
      memcpy(out + i / 8 * 3, &word, size_t(least(3, bytes - i / 8 * 3)));
    }
  }
}

void encode(const Encoding& e, int64_t row, int64_t c0, int64_t c1) {
  Codes p;
  int64_t count;
  const int64_t n = c1 - c0, g = groups_of(e.grid, row, c0, c1, &count);
  spread(e.factor + g, c0, n, e.grid.columns, p.f);
  with_format(e.dtype, [&](auto format) { scale_values<decltype(format)>(e, row, c0, n, p); });
  if (e.zero) spread(e.zero + g, c0, n, e.grid.columns, p.f);
  if (!e.cut_count)
    integers(e, n, p);
  else if (e.kind == Values::kE4M3)
    floats<4>(n, p);
  else if (e.kind == Values::kE5M2)
    floats<5>(n, p);
  else if (e.cut_count <= 15)
    few_cuts(e, n, p);
  else
    many_cuts(e, n, p);
  for (int64_t i = n; i % 8; ++i) p.codes[i] = uint8_t(e.pad);
  pack(e, n, p.codes, e.out + row * e.row_bytes + c0 * e.bits / 8);
}

void decode(const Weight& w, int64_t row, int64_t c0, int64_t c1, int dtype, void* out) {
  with_format(dtype, [&](auto format) { decode_as<decltype(format)>(w, row, c0, c1, static_cast<typename decltype(format)::E*>(out)); });
}

}  // namespace

extern const CodecKernels FA_CAT(codec_, FA_ISA) = {stats, encode, decode};

}  // namespace fa::cpu::quant

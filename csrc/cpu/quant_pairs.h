// x W^T for x in bf16 and codes whose numbers bf16 holds exactly: two products an instruction and lane (AVX512_BF16), with sums in fp32. Only for *_isa.cpp
// files: everything is in an unnamed namespace.
//
// The instruction takes denormals for zeros, so `pairs_fit` leaves out every x with which a product or a sum could become one.
#pragma once
#include "quant_dot.h"

namespace fa::cpu::quant {
namespace {

#if defined(__AVX512BW__)
// Pair j of a word: the codes j of its two halves. Which of x stand beside them.
FA_INLINE int64_t pair_column(const Weight& w, const Layout& a, int64_t j, int64_t half) {
  return (w.flat && w.bits == 4 ? j ^ 1 : j) + half * (a.per / 2);
}

// Numbers of a half's codes, as pairs: a lane's index is shifted out of the half, and what lies above it does not count in a table that repeats itself.
template <int bits>
struct PairLane {
  static constexpr int kPer = 32 / bits, kPairs = kPer / 2, kBytes = 4 * kLanes;
  __m512i table;

  FA_INLINE void set(PairLane& d, const Weight& w) {
    uint16_t numbers[32];
    for (int i = 0; i < 32; ++i) numbers[i] = uint16_t(as_bits(w.values[i % (1 << bits)]) >> 16);
    d.table = load<__m512i>(numbers);
  }
  FA_INLINE F at(const PairLane& d, U word, int j) {
    return F(_mm512_maskz_permutexvar_epi16(~0u, _mm512_maskz_srli_epi16(~0u, __m512i(word), unsigned(bits * j)), d.table));
  }
};

// sum += the products of the upper halves and of the lower ones. In assembly, because this file is compiled for processors without it, too.
FA_INLINE void add_pairs(F& sum, F w, const uint16_t* x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const __m512*>(x)));
}

// Whose scale a sum is multiplied by: each lane's its own, one for each block, one for the blocks of a unit.
enum class Scaled { kLanes, kBlock, kUnit };

// to[t] += W[row, chunk] . x[t, chunk] for T rows of x: codes are summed, and scales applied to the sums of a unit.
template <class D, int T, Scaled scaled>
__attribute__((noinline)) void dot_pairs(const D& reader, const Layout& a, const Rows& row, const Operand& o, int64_t t0) {
  constexpr bool wide = scaled != Scaled::kLanes, single = scaled != Scaled::kUnit;
  constexpr int kChains = T == 1 ? 4 : T <= 4 ? 2 : 1;  // additions in flight for each
  const D d = reader;  // and the like: what is read through a reference is read again after every store
  const int64_t most = single ? 1 : a.most, step = a.step, x_step = o.sums_stride;
  const I on = I{} + int(step);
  I place = a.place + int(row.in_chunk * step);
  const bool zeros = a.zeros;
  const float *s_of = row.chunk[0]->s, *z_of = row.chunk[0]->z;
  const uint8_t *codes = row.chunk[0]->codes + row.in_chunk * most * D::kBytes, *later = row.later;
  const uint16_t* x = reinterpret_cast<const uint16_t*>(o.x + t0 * o.stride) + row.unit * a.unit * T;
  const float* x_sums = o.sums + t0 * o.sums_stride + row.unit * kLanes;
  F total[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) total[t] = row.to[t];
  for (int64_t u = row.in_chunk, left = row.blocks; left > 0; ++u, left -= most, x_sums += kLanes, place += on) {
    F sum[T][kChains] = {};
    for (int64_t b = single ? 1 : least(most, left); b > 0; --b, codes += D::kBytes, later += D::kBytes, x += 2 * D::kPairs * kLanes * T) {
      prefetch_line(later);
      U word = load<U>(codes);
      keep(word);
#pragma GCC unroll 8
      for (int j = 0; j < D::kPairs; ++j) {
        const F numbers = D::at(d, word, j);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) add_pairs(sum[t][j % kChains], numbers, x + (j * T + t) * 2 * kLanes);
      }
    }
    const F s = granules_at<wide>(s_of, u, step, place), z = zeros ? granules_at<wide>(z_of, u, step, place) : F{};
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      F all = sum[t][0];
      if constexpr (kChains == 2) all += sum[t][1];
      if constexpr (kChains == 4) all = (sum[t][0] + sum[t][1]) + (sum[t][2] + sum[t][3]);
      if (zeros) all = fma(-z, load<F>(x_sums + t * x_step), all);
      total[t] = fma(s, all, total[t]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) row.to[t] = total[t];
}

template <class D, Scaled scaled>
void pairs_as(const Weight& w, const Layout& a, const Product& p, const Operand& o, int64_t n0, int64_t n1, F* to) {
  static constexpr Dot<D> kDots[kTokens] = {dot_pairs<D, 1, scaled>, dot_pairs<D, 2, scaled>, dot_pairs<D, 3, scaled>,
                                            dot_pairs<D, 4, scaled>, dot_pairs<D, 5, scaled>, dot_pairs<D, 6, scaled>,
                                            dot_pairs<D, 7, scaled>, dot_pairs<D, 8, scaled>};
  if (Turns(p).tokens <= kFew) return linear_few(kDots, w, a, p, o, n0, n1, to);
  linear_many(kDots, 1, sizeof(uint16_t), w, a, p, o, n0, n1, to);
}

template <class D>
void linear_pairs(const Weight& w, const Layout& a, const Product& p, const Operand& o, int64_t n0, int64_t n1, F* to) {
  (!a.wide ? pairs_as<D, Scaled::kLanes> : a.most == 1 ? pairs_as<D, Scaled::kBlock> : pairs_as<D, Scaled::kUnit>)(w, a, p, o, n0, n1, to);
}
#endif

// Whether this product may be made of pairs, on a processor that can. x: zeros, numbers from 2^-100 up to kHuge, and what is not finite.
bool pairs_fit([[maybe_unused]] const Weight& w, [[maybe_unused]] const Product& p) {
#if defined(__AVX512BW__)
  constexpr uint16_t kLeast = (127 - 100) << 7, kMost = (127 + 96) << 7, kInfinity = 0x7f80;
  const Layout a = layout_of(w);
  if (p.dtype != kBF16 || !a.direct || !a.table || (w.bits != 4 && w.bits != 2)) return false;
  for (int i = 0; i < 1 << w.bits; ++i) {
    const float magnitude = w.values[i] < 0 ? -w.values[i] : w.values[i];
    if (as_bits(w.values[i]) & 0xffff || (magnitude != 0.f && !(magnitude >= 0x1p-8f && magnitude <= 0x1p8f))) return false;
  }
  uint16_t strange = 0;
  for (int64_t t = 0; t < p.t; ++t) {
    const auto* x = static_cast<const uint16_t*>(p.x) + t * p.stride;
    for (int64_t i = 0; i < w.k; ++i) {
      const uint16_t m = x[i] & 0x7fff;
      strange |= uint16_t(m != 0 && m < kInfinity && uint16_t(m - kLeast) >= kMost - kLeast);
    }
  }
  return !strange;
#else
  return false;
#endif
}

}  // namespace
}  // namespace fa::cpu::quant

// The sweep over bf16 arrays, two neighbours in a word. Only for *_isa.cpp: everything is in their unnamed namespace, a copy for each instruction set.
#pragma once
#include "../core/dtypes.h"
#include "optim.h"

namespace fa::cpu {
namespace {

constexpr int kTile = 512;

// Two neighbouring bf16 in one word. Taking them apart and together costs two cheap operations each and keeps all lanes 32 bits wide; a loop over
// single elements spends a quarter of its instructions on packing.
using Pair = uint32_t __attribute__((aligned(2), may_alias));
FA_HD float first_of(Pair w) { return as_float(w << 16); }
FA_HD float second_of(Pair w) { return as_float(w & 0xffff0000u); }
FA_HD Pair pair_of(float a, float b) { return (round_bf16_high(a) >> 16) | (round_bf16_high(b) & 0xffff0000u); }

FA_HD Pair choose_pair(Pair keep, Pair fresh, Pair old) { return (fresh & keep) | (old & ~keep); }

// The common 16-bit case (everything bf16, no unscaling, no L2): some pairs at a time, the rule over their first elements, over their second ones, and
// each array rounded. In one loop the rounding, half of all instructions, waits behind roots and divisions (Adam: 0.79 for 0.64 ns an element).
constexpr int kPairs = 128;
struct alignas(64) Fresh {
  float p[kPairs], s[kMaxStates][kPairs];
};

template <class Rule, class Half>
void rule_over(Fresh& fresh, const Pair* p, const Pair* g, Pair* const* s, int n, const Row& row, float factor, Half half) {
  const Row r = row;
  const Pair *s0 = s[0], *s1 = s[1], *s2 = s[2], *s3 = s[3];
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    float st[kMaxStates];
    if (Rule::kStates > 0) st[0] = half(s0[i]);
    if (Rule::kStates > 1) st[1] = half(s1[i]);
    if (Rule::kStates > 2) st[2] = half(s2[i]);
    if (Rule::kStates > 3) st[3] = half(s3[i]);
    fresh.p[i] = Rule::step(half(p[i]) * r.decay, half(g[i]) * factor, st, r);
    if (Rule::kStored > 0) fresh.s[0][i] = st[0];
    if (Rule::kStored > 1) fresh.s[1][i] = st[1];
    if (Rule::kStored > 2) fresh.s[2][i] = st[2];
    if (Rule::kStored > 3) fresh.s[3][i] = st[3];
  }
}

// `keep`: a word per pair, ones where trainable; null: all of it.
void store_pairs(Pair* __restrict out, const float* __restrict a, const float* __restrict b, const Pair* __restrict keep, int n) {
  if (keep)
    for (int i = 0; i < n; ++i) out[i] = choose_pair(keep[i], pair_of(a[i], b[i]), out[i]);
  else
    for (int i = 0; i < n; ++i) out[i] = pair_of(a[i], b[i]);
}

template <class Rule>
void run_bf16(const Piece& w, const Row& r, const Pair* keep, int64_t begin, int64_t pairs) {
  const TensorDesc& t = *w.tensor;
  Fresh a, b;
  for (int64_t first = 0; first < pairs; first += kPairs) {
    const auto at = [&](const void* base) {
      return reinterpret_cast<Pair*>(static_cast<uint16_t*>(const_cast<void*>(base)) + begin) + first;
    };
    const int n = int(pairs - first < kPairs ? pairs - first : kPairs);
    Pair *p = at(t.param), *g = at(t.grad), *s[kMaxStates] = {};
    for (int k = 0; k < Rule::kStates; ++k) s[k] = at(t.state[k]);
    rule_over<Rule>(a, p, g, s, n, r, w.clip * r.sign, first_of);
    rule_over<Rule>(b, p, g, s, n, r, w.clip * r.sign, second_of);
    const Pair* mine = keep ? keep + first : nullptr;
    store_pairs(p, a.p, b.p, mine, n);
    for (int k = 0; k < Rule::kStored; ++k) store_pairs(s[k], a.s[k], b.s[k], mine, n);
  }
}

// A tile at a time under a mask, else all at once; returns where the last, odd element remains to be done.
template <class Rule>
int64_t update_bf16(const Piece& w, const Row& r) {
  const uint32_t* mask = w.tensor->mask;
  if (!mask) {
    run_bf16<Rule>(w, r, nullptr, w.begin, (w.end - w.begin) / 2);
    return w.end - (w.end - w.begin) % 2;
  }
  alignas(64) Pair keep[kTile / 2];
  int64_t begin = w.begin;
  for (; begin + 1 < w.end; begin += kTile) {
    const int n = int(w.end - begin < kTile ? w.end - begin : kTile);
    for (int k = 0; 32 * k < n; ++k) {
      const uint32_t word = mask[begin / 32 + k];
      for (int j = 0; j < 16; ++j) keep[16 * k + j] = ((0u - (word >> 2 * j & 1u)) & 0xffffu) | ((0u - (word >> (2 * j + 1) & 1u)) << 16);
    }
    run_bf16<Rule>(w, r, keep, begin, n / 2);
  }
  return w.end - (w.end - w.begin) % 2;
}

}  // namespace
}  // namespace fa::cpu

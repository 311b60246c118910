// What the sweeps over a grid share: masks, random bits, the way back to the parameter.
#pragma once
#include "../core/philox.h"
#include "../core/table.h"
#include "elements.cuh"

namespace fa::cuda {
namespace {

// Two blocks per SM: at most 128 registers and no spills. At three (80 registers) Adam, RMSprop and all larger rules spill.
constexpr int kBlocks = 2;

// What a turn needs beside the eight elements; the same for a whole block. `t` is a copy: through the pointer every store might change it,
// and it would be read again and again. What only some options need is read through the pointers, so that it holds no register meanwhile.
struct Job {
  TensorDesc t;
  const TensorDesc* source;
  const Row* row;
  bool masked, plain_gradient;
};

FA_DEVICE float value_or_1(const float* p) { return p ? *p : 1.f; }

template <class E>
FA_DEVICE unsigned trainable(const Job& w, const E& e) {
  if (!w.masked || !e.valid) return e.valid;
  const uint32_t* mask = in_global(w.source->mask);
  if (e.vector) return mask[e.first >> 5] >> (e.first & 31) & 0xffu;
  unsigned keep = 0;
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) {
    const int64_t i = index(e, j);
    if (e.valid >> j & 1u) keep |= (mask[i >> 5] >> (i & 31) & 1u) << j;
  }
  return keep;
}

// Sixteen random bits per element, two elements a word. One Philox block serves eight neighbours. `at`: where scattered elements lie.
template <bool kScattered, class E>
FA_DEVICE Philox4 random_bits(const Job& w, const E& e, uint64_t seed, const int64_t* at) {
  const uint32_t step = uint32_t(w.row->step);
  const TensorDesc& t = *w.source;
  const bool identity = !kScattered && t.index_inner == t.numel;
  if (identity && e.vector && t.index_base % kEach == 0)
    return philox(seed, uint64_t(t.index_base + e.first) >> 3, uint32_t(t.ordinal), step);
  Philox4 out{};
  FA_NO_UNROLL
  for (int j = 0; j < kEach; ++j) {
    const uint64_t local = uint64_t(kScattered ? at[j] : index(e, j)), inner = uint64_t(t.index_inner);
    const uint64_t element = identity ? t.index_base + local : t.index_base + local / inner * t.index_outer + local % inner;
    // Shifting in from above and selecting, instead of indexing, keeps the words in registers.
    out.v[0] = out.v[0] >> 16 | out.v[1] << 16;
    out.v[1] = out.v[1] >> 16 | out.v[2] << 16;
    out.v[2] = out.v[2] >> 16 | out.v[3] << 16;
    const Philox4 r = philox(seed, element >> 3, uint32_t(t.ordinal), step);
    const uint32_t low = element & 2 ? r.v[1] : r.v[0], high = element & 2 ? r.v[3] : r.v[2], word = element & 4 ? high : low;
    out.v[3] = out.v[3] >> 16 | (element & 1 ? word & 0xffff0000u : word << 16);
  }
  return out;
}

// `at`: where scattered elements of the parameter lie; its master weight is stored in the order of the entry either way.
template <bool kScattered, class E>
FA_DEVICE void store_param(const Job& w, const Globals& globals, const E& e, unsigned keep, const float (&p)[kEach], const int64_t* at) {
  const TensorDesc& t = w.t;
  const auto put = [&](bool wide, const Raw& r) {
    kScattered ? store_at(t.param, wide, at, keep, r) : store_raw(t.param, wide, e, keep, r);
  };
  if (t.extra_dtype == kI16) {
    Raw high, low;
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) {
      uint16_t h;
      int16_t l;
      split(p[j], &h, &l);
      high[j] = h;
      low[j] = uint16_t(l);
    }
    put(false, high);
    store_raw(w.source->extra, false, e, keep, low);
    return;
  }
  if (t.extra_dtype == kF32) store(w.source->extra, kF32, e, keep, p);
  if (!globals.stochastic || t.param_dtype != kBF16) return put(t.param_dtype == kF32, narrow(t.param_dtype, p));
  const Philox4 random = random_bits<kScattered>(w, e, globals.seed, at);
  Raw r;
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) r[j] = float_to_bf16_stochastic(p[j], random.v[j / 2] >> (j & 1 ? 16 : 0));
  put(false, r);
}

// Where the parameter's elements lie; of a dense entry, where the entry's do.
template <class E>
FA_DEVICE void positions(int64_t (&at)[kEach], const TensorDesc& t, const E& e) {
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) {
    const int64_t i = index(e, j);
    at[j] = !t.index || !(e.valid >> j & 1u) ? i
            : t.index_dtype == kI64          ? vec_load<int64_t>(in_global(static_cast<const int64_t*>(t.index) + i))
                                             : int64_t(vec_load<int32_t>(in_global(static_cast<const int32_t*>(t.index) + i)));
  }
}

// The decays: L2 into the gradient, the decoupled one into the parameter.
template <class E>
FA_DEVICE void apply_decay(float (&p)[kEach], float (&g)[kEach], const Job& w, const Globals& globals, const E& e, unsigned keep) {
  const TensorDesc& t = *w.source;
  float a[kEach] = {};
  if (t.anchor) {
    Raw raw;
    load(raw, t.anchor, t.anchor_dtype == kF32, e, keep);
    widen(a, raw, t.anchor_dtype, e.vector);
  }
  if (!w.plain_gradient) {
    const float scale = value_or_1(globals.grad_scale), clip = value_or_1(globals.clip), sign = w.row->sign, l2 = w.row->l2;
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) g[j] = g[j] / scale * clip * sign;
    if (l2 != 0.f) {
      FA_UNROLL
      for (int j = 0; j < kEach; ++j) g[j] = g[j] + l2 * (t.anchor ? p[j] - a[j] : p[j]);
    }
  }
  const float decay = w.row->decay, pull = w.row->pull;
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) p[j] = !t.anchor ? p[j] * decay : pull != 0.f ? p[j] - pull * (p[j] - a[j]) : p[j];
}

FA_DEVICE int64_t chunk_end(int64_t numel, int64_t offset, int32_t chunk) { return numel - offset < chunk ? numel : offset + chunk; }

#if defined(FA_EMULATE)
constexpr int64_t kMaxGrid = 64;  // small, so that tests see blocks that take several chunks
#else
constexpr int64_t kMaxGrid = 0x7fffffff;
#endif
unsigned grid_for(int64_t n_chunks) { return unsigned(n_chunks < kMaxGrid ? n_chunks : kMaxGrid); }

}  // namespace
}  // namespace fa::cuda

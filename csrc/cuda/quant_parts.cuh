// What a code and a stored scale are worth, where a group's numbers are, and sums over a block.
#pragma once
#include "elements.cuh"
#include "quant.h"

namespace fa::cuda {
namespace {

constexpr float kTwo23 = 8388608.f;  // as_float(0x4b000000 | code) = 2^23 + code

FA_DEVICE float e4m3(uint32_t c) {
  const float v = as_float((c & 127u) << 20 | (c & 128u) << 24) * 0x1p120f;  // brings the exponent, and subnormals, to their place
  return (c & 127u) == 127u ? as_float(0x7fc00000u) : v;
}
FA_DEVICE float e8m0(uint32_t c) { return as_float(c == 0 ? 1u << 22 : c == 255 ? 0x7fc00000u : c << 23); }
FA_DEVICE float e5m2(uint32_t c) { return half_to_float(uint16_t(c << 8)); }

FA_DEVICE float load_float(const void* p, int64_t i, int dtype) {
  if (dtype == kF32) return vec_load<float>(in_global(static_cast<const float*>(p)) + i);
  const uint16_t h = vec_load<uint16_t>(in_global(static_cast<const uint16_t*>(p)) + i);
  return dtype == kBF16 ? bf16_to_float(h) : half_to_float(h);
}
FA_DEVICE uint32_t load_byte(const void* p, int64_t i) { return vec_load<uint8_t>(in_global(static_cast<const uint8_t*>(p)) + i); }

template <class T, int kCount>
FA_DEVICE void load_each(uint32_t (&raw)[kCount], const void* base, const int64_t (&at)[kCount]) {
  const T* p = in_global(static_cast<const T*>(base));
  FA_UNROLL
  for (int i = 0; i < kCount; ++i) raw[i] = uint32_t(vec_load<T>(p + at[i]));
}

template <int kCount, class F>
FA_DEVICE void set_each(float (&out)[kCount], const F& f) {
  FA_UNROLL
  for (int i = 0; i < kCount; ++i) out[i] = f(i);
}

// Scales and zeros of groups g. The switches are outside, so that all loads are under way before the first is waited for.
template <int kCount>
FA_DEVICE void load_numbers(float (&scale)[kCount], float (&zero)[kCount], const QuantWeight& w, const int64_t (&g)[kCount]) {
  uint32_t s[kCount], z[kCount];
  if (w.coding != kStored)
    load_each<uint8_t>(s, w.scale, g);
  else if (w.scale_dtype == kF32)
    load_each<uint32_t>(s, w.scale, g);
  else
    load_each<uint16_t>(s, w.scale, g);
  if (w.zero_dtype == kU8)
    load_each<uint8_t>(z, w.zero, g);
  else if (w.zero_dtype == kF32)
    load_each<uint32_t>(z, w.zero, g);
  if (w.coding == kPower) {
    set_each(scale, [&](int i) { return e8m0(s[i]); });
  } else if (w.coding == kRowPower) {
    set_each(scale, [&](int i) { return e8m0(s[i]) * in_global(w.above)[g[i] / w.wide]; });
  } else if (w.coding == kSmallFloat) {
    const float above = *in_global(w.above);
    set_each(scale, [&](int i) { return e4m3(s[i]) * above; });
  } else if (w.coding == kNestedScale) {
    const float offset = *in_global(w.offset);
    set_each(scale, [&](int i) { return in_global(w.dynamic)[s[i]] * in_global(w.above)[g[i] / 256] + offset; });
  } else if (w.scale_dtype == kF16) {
    set_each(scale, [&](int i) { return half_to_float(uint16_t(s[i])); });
  } else {
    const int shift = w.scale_dtype == kBF16 ? 16 : 0;
    set_each(scale, [&](int i) { return as_float(s[i] << shift); });
  }
  if (w.zero_dtype == kU8)
    set_each(zero, [&](int i) { return float(z[i]); });
  else
    set_each(zero, [&](int i) { return w.zero_dtype == kF32 ? as_float(z[i]) : 0.f; });
}

// Sums `v` over the warp: where there is more than one, each half of the lanes goes on with half of them, so that the whole takes kCount - 1
// shuffles and a few, not 5 * kCount. v[0] of a lane is then the sum of `v[held(lane)]`.
template <int kCount>
FA_DEVICE void sum_lanes(float (&v)[kCount]) {
  int count = kCount;
  FA_UNROLL
  for (unsigned d = kWarp / 2; d; d /= 2) {
    if (count > 1) {
      count /= 2;
      const bool upper = lane_id() & d;
      FA_UNROLL
      for (int i = 0; i < kCount / 2; ++i) {
        if (i >= count) continue;
        const float mine = upper ? v[i + count] : v[i], other = upper ? v[i] : v[i + count];
        v[i] = mine + shfl_xor(other, d);
      }
    } else {
      v[0] += shfl_xor(v[0], d);
    }
  }
}
template <int kCount>
FA_DEVICE int held(int lane) {
  int at = 0, d = int(kWarp) / 2;
  for (int count = kCount / 2; count; count /= 2, d /= 2) at += lane & d ? count : 0;
  return at;
}

FA_DEVICE void store_float(void* p, int64_t i, int dtype, float f) {
  if (dtype == kF32)
    vec_store(in_global(static_cast<float*>(p)) + i, f);
  else
    vec_store(in_global(static_cast<uint16_t*>(p)) + i, dtype == kBF16 ? float_to_bf16(f) : float_to_half(f));
}

// y[t, row0 + r] from every thread's v[r * kTokens + t]. Every thread of the block must come here.
template <int kRowCount, int kTokens>
FA_DEVICE void finish(const QuantWeight& w, const QuantProduct& p, int64_t row0, float (&v)[kRowCount * kTokens]) {
  constexpr int kCount = kRowCount * kTokens;
  FA_SHARED(float, sums, [kThreads / kWarp][kCount]);
  sum_lanes(v);
  // Of the lanes that hold the same sum one writes it.
  if (lane_id() % (kWarp / kCount) == 0) sums[threadIdx.x / kWarp][held<kCount>(int(lane_id()))] = v[0];
  syncthreads();
  const int r = int(threadIdx.x) / kTokens, t = int(threadIdx.x) % kTokens;
  if (r >= kRowCount || row0 + r >= w.n || t >= p.t) return;
  float total = sums[0][threadIdx.x];
  for (unsigned i = 1; i < blockDim.x / kWarp; ++i) total += sums[i][threadIdx.x];
  if (p.bias) total += load_float(p.bias, row0 + r, p.bias_dtype);
  store_float(p.y, t * w.n + row0 + r, p.dtype, total);
}

}  // namespace
}  // namespace fa::cuda

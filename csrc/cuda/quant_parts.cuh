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
FA_DEVICE float e5m2(uint32_t c) { return half_to_float(uint16_t(c << 8)); }

FA_DEVICE float load_float(const void* p, int64_t i, int dtype) {
  if (dtype == kF32) return vec_load<float>(in_global(static_cast<const float*>(p)) + i);
  const uint16_t h = vec_load<uint16_t>(in_global(static_cast<const uint16_t*>(p)) + i);
  return dtype == kBF16 ? bf16_to_float(h) : half_to_float(h);
}
FA_DEVICE uint32_t load_byte(const void* p, int64_t i) { return vec_load<uint8_t>(in_global(static_cast<const uint8_t*>(p)) + i); }

FA_DEVICE float scale_of(const QuantWeight& w, int64_t g) {
  if (w.coding == kStored) return load_float(w.scale, g, w.scale_dtype);
  const uint32_t b = load_byte(w.scale, g);
  if (w.coding == kPower) return as_float(b == 0 ? 1u << 22 : b == 255 ? 0x7fc00000u : b << 23);
  if (w.coding == kSmallFloat) return e4m3(b) * *in_global(w.above);
  return in_global(w.dynamic)[b] * in_global(w.above)[g / 256] + *in_global(w.offset);
}

FA_DEVICE float zero_of(const QuantWeight& w, int64_t g) {
  if (w.zero_dtype == kF32) return load_float(w.zero, g, kF32);
  return w.zero_dtype == kU8 ? float(load_byte(w.zero, g)) : 0.f;
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

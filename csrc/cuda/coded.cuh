// Coded states (core/lowbit.h) over a grid: eight neighbours per thread, 2^block_log2 / 8 threads per block of elements.
#pragma once
#include "../core/lowbit.h"
#include "optim_parts.cuh"

namespace fa::cuda {
namespace {

using Neighbours = EightApart<1>;

// The thread's part of a turn at `at`. Unlike a Walk's, the eight are neighbours even where they are no vector: a block of elements must not
// be spread over more threads than a turn has.
FA_DEVICE Neighbours neighbours(int64_t at, int64_t end, bool aligned) {
  const int64_t first = at + int64_t(threadIdx.x) * kEach, left = end - first;
  const unsigned valid = left >= kEach ? 0xffu : left <= 0 ? 0u : (1u << int(left)) - 1u;
  return {first, valid, aligned && valid == 0xffu};
}

// A decade of the dynamic map; 16 bytes, eight of them in 32 banks.
struct alignas(16) Decade {
  float end, slope, offset, last;
};

// What decoding and encoding look up, in shared memory: 32 threads ask for different entries. [0]: signed, [1]: unsigned.
struct Tables {
  Decade decade[2][8];
  float map[2][256];
  float level[128];
};

__device__ const DynamicMap kMaps[2] = {dynamic_map(true), dynamic_map(false)};
__device__ const Decades kDecades[2] = {decades(true), decades(false)};

FA_DEVICE void fill(Tables& t) {
  for (int i = int(threadIdx.x); i < 256; i += kThreads) {
    t.map[0][i] = kMaps[0].value[i];
    t.map[1][i] = kMaps[1].value[i];
    if (i < 128) t.level[i] = level_of(uint32_t(i));
    const Decades& d = kDecades[i / 8 % 2];
    if (i < 16) t.decade[i / 8][i % 8] = {d.end[i % 8], d.slope[i % 8], d.offset[i % 8], d.last[i % 8]};
  }
  syncthreads();
}

// core/lowbit.h's dynamic_code in 20 instructions instead of 40, both maps by one path: an octave holds at most one end of a decade, so the
// exponent leaves a choice of two.
struct DynamicCode {
  const Decade* decade;
  float negative;
  uint32_t magnitude;
  int bias, zero;

  FA_DEVICE DynamicCode(const Tables& t, bool has_sign)
      : decade(t.decade[!has_sign]),
        negative(has_sign ? 0.f : as_float(0xff800000u)),
        magnitude(has_sign ? 0x7fffffffu : 0xffffffffu),
        bias(has_sign ? kSignedZero : -1),
        zero(has_sign ? kSignedZero : kUnsignedZero) {}

  FA_DEVICE uint32_t operator()(float x) const {
    const uint32_t u = as_bits(x) & magnitude;
    const float a = as_float(u);
    int e = (int(u >> 23) * 5 - 531) >> 4;
    e = e < 0 ? 0 : e > 6 ? 6 : e;
    const Decade d = decade[e + (a > decade[e].end)];
    const float y = fminf(a * d.slope + d.offset, d.last);
    const int code = a > 0.f ? int32_t(y) + bias : zero;
    return uint32_t(x < negative ? 2 * kSignedZero - (code < 2 * kSignedZero ? code : 2 * kSignedZero) : code);
  }
};

FA_DEVICE bool is_coded(int dtype) { return dtype >= kD8S; }

// The largest word among `lanes` neighbouring threads (a power of two). Every thread of the block must come here.
FA_DEVICE uint32_t largest(uint32_t v, int lanes) {
  FA_SHARED(uint32_t, warps, [kThreads / kWarp]);
  for (int d = (lanes < int(kWarp) ? lanes : int(kWarp)) / 2; d; d /= 2) {
    const uint32_t other = shfl_xor(v, unsigned(d));
    v = v > other ? v : other;
  }
  if (lanes <= int(kWarp)) return v;
  syncthreads();  // the previous result may still be read
  if (lane_id() == 0) warps[threadIdx.x / kWarp] = v;
  syncthreads();
  const int many = lanes / int(kWarp), mine = int(threadIdx.x / kWarp) / many * many;
  for (int k = 0; k < many; ++k) v = v > warps[mine + k] ? v : warps[mine + k];
  return v;
}

struct alignas(8) Codes {
  uint32_t v[2];
};

// Eight bytes into the first two words of `r`.
FA_DEVICE void load_codes(Raw& r, const void* base, const Neighbours& e) {
  const uint8_t* p = in_global(static_cast<const uint8_t*>(base) + e.first);
  Codes c{};
  if (e.vector) {
    c = vec_load<Codes>(p);
  } else {
    FA_UNROLL
    for (int j = 0; j < kEach; ++j)
      if (e.valid >> j & 1u) c.v[j / 4] |= uint32_t(p[j]) << 8 * (j % 4);
  }
  r.a.v[0] = c.v[0];
  r.a.v[1] = c.v[1];
}

FA_DEVICE void store_codes(void* base, const Neighbours& e, const Codes& c) {
  uint8_t* p = in_global(static_cast<uint8_t*>(base) + e.first);
  if (e.vector) return vec_store(p, c);
  FA_UNROLL
  for (int j = 0; j < kEach; ++j)
    if (e.valid >> j & 1u) p[j] = uint8_t(c.v[j / 4] >> 8 * (j % 4));
}

// s[j] = f(s[j]), in order, two at a time: eight logarithms and powers side by side would double the kernel. Registers have no index at run
// time, so the array moves instead.
template <class F>
FA_DEVICE void rotate(float (&s)[kEach], const F& f) {
  FA_NO_UNROLL
  for (int turn = 0; turn < kEach / 2; ++turn) {
    const float a = f(s[0]), b = f(s[1]);
    FA_UNROLL
    for (int j = 0; j < kEach - 2; ++j) s[j] = s[j + 2];
    s[kEach - 2] = a;
    s[kEach - 1] = b;
  }
}

FA_DEVICE void decode(float (&s)[kEach], const Raw& r, int dtype, const float* scale, int64_t block, const Tables& tables) {
  if (dtype == kF8X) {
    const float absmax = scale[2 * block], inverse_k = 1.f / scale[2 * block + 1];
    uint32_t low = r.a.v[0], high = r.a.v[1];
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) s[j] = 0.f;
    rotate(s, [&](float) {
      const uint32_t code = low & 0xffu;
      low = low >> 8 | high << 24;
      high >>= 8;
      return expanded_value(code, tables.level[code & 127u], absmax, inverse_k);
    });
    return;
  }
  const float* map = tables.map[dtype == kD8U];
  const float factor = scale[block];
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) s[j] = map[r[j / 4] >> 8 * (j % 4) & 0xffu] * factor;
}

template <class F>
FA_DEVICE Codes each(const float (&s)[kEach], const F& code) {
  Codes c{};
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) c.v[j / 4] |= uint32_t(code(s[j])) << 8 * (j % 4);
  return c;
}

// Writes scale and codes of the blocks, but of those where nothing may change. Every thread of the block must come here.
FA_DEVICE void encode(void* codes, float* scale, int dtype, const Neighbours& e, int lanes, bool changes, float (&s)[kEach],
                      const Tables& tables) {
  uint32_t key = 0, least = 0x7f800000u;
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) {
    const uint32_t mine = e.valid >> j & 1u ? extreme_key(s[j]) : 0u, magnitude = mine >> 1;
    key = key > mine ? key : mine;
    least = magnitude && magnitude < least ? magnitude : least;
  }
  const float top = scale_of(largest(key, lanes), dtype == kD8S), inverse = inverse_of(top);
  const int64_t block = e.first / kEach / lanes;
  const bool first = changes && threadIdx.x % unsigned(lanes) == 0 && e.valid;
  if (dtype == kF8X) {
    least = ~largest(~least, lanes);
    const float k = inverse != 0.f ? expansion(as_float(least) * inverse) : 1.f;
    Codes c{};
    rotate(s, [&](float v) {
      c.v[0] = c.v[0] >> 8 | c.v[1] << 24;
      c.v[1] = c.v[1] >> 8 | uint32_t(expanded_code(v, inverse, k)) << 24;
      return v;
    });
    if (changes) store_codes(codes, e, c);
    if (first) in_global(scale)[2 * block] = top, in_global(scale)[2 * block + 1] = k;
    return;
  }
  if (first) in_global(scale)[block] = top;
  if (!changes) return;
  const DynamicCode code(tables, dtype == kD8S);
  store_codes(codes, e, each(s, [&](float v) { return code(v * inverse); }));
}

}  // namespace
}  // namespace fa::cuda

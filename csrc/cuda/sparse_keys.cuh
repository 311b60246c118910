// What the sparse kernels share: which tensor a tile belongs to, a warp's elements, scores, keys.
//
// A warp takes a run of 256 elements, eight a lane. Vector mode: the eight are consecutive and move as 16 bytes (fp32: twice). Strided mode
// (misaligned tensors, tails): element j of a lane lies 32 j further on.
#pragma once
#include "elements.cuh"
#include "sparse.h"

namespace fa::cuda {

constexpr int kRun = int(kWarp) * kEach;

FA_DEVICE int bits_set(uint32_t v) {
#if defined(__CUDA_ARCH__)
  return __popc(v);
#else
  return __builtin_popcount(v);
#endif
}
FA_DEVICE int lowest_bit(uint32_t v) {  // v != 0
#if defined(__CUDA_ARCH__)
  return __ffs(int(v)) - 1;
#else
  return __builtin_ctz(v);
#endif
}

template <class T>
FA_DEVICE T warp_sum(T v) {
  FA_UNROLL
  for (unsigned d = kWarp / 2; d; d /= 2) v += shfl_xor(v, d);
  return v;
}

// Inclusive, over the lanes.
template <class T>
FA_DEVICE T warp_scan(T v) {
  FA_UNROLL
  for (unsigned d = 1; d < kWarp; d *= 2) {
    const T before = shfl_up(v, d);
    v += lane_id() >= d ? before : T(0);
  }
  return v;
}

// The last of `count` items whose `first` is at most `at`; the whole warp asks together. 32 probes a round: two rounds up to 1,024 items.
template <class Item>
FA_DEVICE int64_t find_item(const Item* items, int64_t count, int64_t at) {
  int64_t low = 0, span = count;
  while (span > 1) {
    const int64_t step = (span + kWarp - 1) / kWarp, probe = low + int64_t(lane_id()) * step;
    const unsigned below = ballot(int64_t(lane_id()) * step < span && items[probe].first <= at);
    const int64_t hits = bits_set(below), left = span - (hits - 1) * step;
    low += (hits - 1) * step;
    span = left < step ? left : step;
  }
  return low;
}

struct Run {
  int64_t first;  // index of the lane's first element
  unsigned valid;  // bit j: element j exists
  bool vector;  // the same for the whole warp
};

FA_DEVICE Run run_at(int64_t begin, int64_t n, bool aligned) {
  Run r{begin, 0xffu, aligned && begin + kRun <= n};
  r.first += r.vector ? lane_id() * kEach : lane_id();
  if (!r.vector) {
    const int64_t left = n - r.first;
    const int count = left <= 0 ? 0 : left > kRun - int(kWarp) ? kEach : int(left + kWarp - 1) / int(kWarp);
    r.valid = (1u << count) - 1u;
  }
  return r;
}

template <class T>
FA_DEVICE void load_lanes(Raw& raw, const char* p, unsigned valid) {
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) raw[j] = valid >> j & 1u ? uint32_t(vec_load<T>(p + j * int(kWarp * sizeof(T)))) : 0u;
}

FA_DEVICE void load_run(Raw& raw, const void* base, bool wide, const Run& r) {
  const char* p = in_global(static_cast<const char*>(base) + r.first * (wide ? 4 : 2));
  if (r.vector) {
    raw.a = vec_load<Words>(p);
    if (wide) raw.b = vec_load<Words>(p + 16);
  } else if (wide) {
    load_lanes<uint32_t>(raw, p, r.valid);
  } else {
    load_lanes<uint16_t>(raw, p, r.valid);
  }
}

FA_DEVICE int64_t index(const Run& r, int j) { return r.first + (r.vector ? j : j * int(kWarp)); }

// One element and what belongs to it, still as stored.
struct Loaded {
  Run run;
  Raw x, other;
};

FA_DEVICE void load_item(Loaded& l, const SparseItem& item, int32_t score, int64_t begin) {
  l.run = run_at(begin, item.n, item.aligned != 0);
  load_run(l.x, item.x, item.dtype == kF32, l.run);
  if (score == kAbsDiff || score == kAbsProduct) {
    load_run(l.other, item.other, item.other_dtype == kF32, l.run);
  } else if (score == kAbsScaled) {
    const float* factors = in_global(static_cast<const float*>(item.other));
    // One division a lane, and another per element only where a row is shorter than a run; 64-bit ones are a hundred instructions.
    const int64_t n = item.columns, at = l.run.first;
    const int64_t column = (at | n) >> 32 ? at % n : int64_t(uint32_t(at) % uint32_t(n));
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) {
      int64_t c = column + (l.run.vector ? j : j * int(kWarp));
      c = n >= kRun ? (c < n ? c : c - n) : int64_t(uint32_t(c) % uint32_t(n));
      l.other[j] = l.run.valid >> j & 1u ? as_bits(factors[c]) : 0u;
    }
  }
}

FA_DEVICE uint32_t key_of(float score, uint32_t nan_key) {
  const uint32_t u = as_bits(score);
  const uint32_t order = u == 0x80000000u ? u : u ^ (uint32_t(int32_t(u) >> 31) | 0x80000000u);
  return (u & 0x7fffffffu) > 0x7f800000u ? nan_key : order;
}

FA_DEVICE void keys_of(uint32_t (&key)[kEach], Loaded& l, const SparseItem& item, int32_t score, uint32_t nan_key) {
  float x[kEach], y[kEach];
  widen(x, l.x, int(item.dtype), l.run.vector);
  if (score == kAbs) {
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) {
      const uint32_t size = as_bits(x[j]) & 0x7fffffffu;
      key[j] = size > 0x7f800000u ? nan_key : size | 0x80000000u;
    }
    return;
  }
  if (score == kAbsScaled) {
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) x[j] = fabsf(x[j]) * as_float(l.other[j]);
  } else if (score != kGiven) {
    widen(y, l.other, int(item.other_dtype), l.run.vector);
    const bool diff = score == kAbsDiff;
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) x[j] = fabsf(diff ? x[j] - y[j] : x[j] * y[j]);
  }
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) key[j] = key_of(x[j], nan_key);
}

// Bit j of each lane's `bits`, run order: out of strided mode into eight neighbours a lane, as vector mode has them.
FA_DEVICE uint32_t in_order(uint32_t bits, bool vector) {
  if (vector) return bits;
  uint32_t mine = 0;
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) {
    const uint32_t word = ballot(bits >> j & 1u);
    if (int(lane_id() / 4) == j) mine = word >> (lane_id() % 4 * 8) & 0xffu;
  }
  return mine;
}

// The first `room` of a lane's bits.
FA_DEVICE uint32_t first_bits(uint32_t byte, int64_t room) {
  uint32_t kept = 0;
  for (int j = 0; j < kEach && room > 0; ++j) {
    kept |= byte & 1u << j;
    room -= byte >> j & 1u;
  }
  return kept;
}

// A lane's eight bits of the run at `begin`; lanes past the last word of n elements write nothing.
FA_DEVICE void store_bits(uint8_t* words, int64_t begin, int64_t n, uint32_t byte) {
  const int64_t at = begin / 8 + lane_id();
  if (at < (n + 31) / 32 * 4) in_global(words)[at] = uint8_t(byte);
}

inline unsigned blocks_for(int64_t n) { return unsigned(n < 0x7fffffff ? n : 0x7fffffff); }

}  // namespace fa::cuda

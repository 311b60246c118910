// Eight elements per thread, of any storage type, as fp32: the memory side of every streaming kernel.
//
// Vector mode: the eight are consecutive and 16-byte aligned; fp32 moves as 2 x 16 bytes, a 16-bit type as 1 x 16.
// Strided mode (misaligned tensors, tails): element j of a thread lies j blocks further on, so that each of the eight accesses of a warp
// still covers consecutive addresses, and eight of them are in flight.
//
// Loading and widening are two calls: a kernel first issues the loads of all its arrays and only then waits for one of them.
#pragma once
#include "../core/dtypes.h"
#include "../core/launch.h"

namespace fa::cuda {

constexpr int kThreads = 256, kEach = 8, kSpan = kThreads * kEach;  // kSpan: elements per block and turn

// Addresses read from a table are generic to the compiler, and generic accesses (LD, ST) are slower than global ones (LDG, STG).
template <class T>
FA_DEVICE T* in_global(T* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

struct alignas(16) Words {
  uint32_t v[4];
};

// Vector mode: 8 fp32 in eight words, 8 16-bit elements in the first four. Strided mode: one element per word.
struct Raw {
  Words a, b;
  FA_DEVICE uint32_t& operator[](int j) { return j < 4 ? a.v[j] : b.v[j - 4]; }
  FA_DEVICE uint32_t operator[](int j) const { return j < 4 ? a.v[j] : b.v[j - 4]; }
};

template <int kApart>
struct EightApart {
  static constexpr int kStride = kApart;  // between a thread's elements where they are not a vector
  int64_t first;                          // index of the thread's first element in the tensor
  unsigned valid;                         // bit j: element j exists
  bool vector;                            // the same for the whole block where elements are strided
};
using Eight = EightApart<kThreads>;

// Piece [begin, end) of a tensor, turn by turn: at < end; at = next(at).
struct Walk {
  int64_t whole, end;  // vector mode up to `whole`
  FA_DEVICE Walk(int64_t begin, int64_t end_, bool aligned)
      : whole(aligned && begin % kEach == 0 ? end_ / kEach * kEach : begin), end(end_) {}
  FA_DEVICE int64_t next(int64_t at) const {
    const int64_t limit = at < whole ? whole : end;
    return limit - at < kSpan ? limit : at + kSpan;
  }
  FA_DEVICE Eight eight(int64_t at) const {
    Eight e{at, 0, at < whole};
    if (e.vector) {
      e.first += int64_t(threadIdx.x) * kEach;
      e.valid = e.first < whole ? 0xffu : 0u;
      return e;
    }
    e.first += threadIdx.x;
    const int64_t left = end - e.first;
    const int n = left <= 0 ? 0 : left > kSpan - kThreads ? kEach : int(left + kThreads - 1) / kThreads;
    e.valid = (1u << n) - 1u;
    return e;
  }
};

template <class E>
FA_DEVICE int64_t index(const E& e, int j) {
  return e.first + (e.vector ? j : j * E::kStride);
}

template <class T, int kStride>
FA_DEVICE void load_strided(Raw& r, const char* p, unsigned wanted) {
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) r[j] = wanted >> j & 1u ? uint32_t(vec_load<T>(p + j * kStride * int(sizeof(T)))) : 0u;
}

template <class E>
FA_DEVICE void load(Raw& r, const void* base, bool wide, const E& e, unsigned wanted) {
  const char* p = in_global(static_cast<const char*>(base) + e.first * (wide ? 4 : 2));
  if (e.vector) {
    r.a = vec_load<Words>(p);
    if (wide) r.b = vec_load<Words>(p + 16);
  } else if (wide) {
    load_strided<uint32_t, E::kStride>(r, p, wanted);
  } else {
    load_strided<uint16_t, E::kStride>(r, p, wanted);
  }
}

// One 16-bit element per word.
FA_DEVICE void unpack(Raw& r) {
  FA_UNROLL
  for (int j = kEach - 1; j >= 0; --j) r[j] = j & 1 ? r[j / 2] >> 16 : r[j / 2] & 0xffffu;
}

FA_DEVICE void widen(float (&f)[kEach], Raw& r, int dtype, bool vector) {
  if (dtype != kF32) {
    if (vector) unpack(r);
    if (dtype == kBF16) {
      FA_UNROLL
      for (int j = 0; j < kEach; ++j) r[j] <<= 16;
    } else {
      FA_UNROLL
      for (int j = 0; j < kEach; ++j) r[j] = as_bits(half_to_float(uint16_t(r[j])));
    }
  }
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) f[j] = as_float(r[j]);
}

template <class T, int kStride>
FA_DEVICE void store_strided(char* p, const Raw& r, unsigned keep) {
  FA_UNROLL
  for (int j = 0; j < kEach; ++j)
    if (keep >> j & 1u) vec_store<T>(p + j * kStride * int(sizeof(T)), T(r[j]));
}

// r: one element per word, narrowed already. Elements outside `keep` keep their bits: in vector mode they are read again (a cache hit),
// because sixteen-bit NaNs do not survive the way through fp32.
template <class E>
FA_DEVICE void store_raw(void* base, bool wide, const E& e, unsigned keep, Raw r) {
  char* p = in_global(static_cast<char*>(base) + e.first * (wide ? 4 : 2));
  if (!e.vector) return wide ? store_strided<uint32_t, E::kStride>(p, r, keep) : store_strided<uint16_t, E::kStride>(p, r, keep);
  if (keep != 0xffu) {
    Raw old;
    load(old, base, wide, e, 0xffu);
    if (!wide) unpack(old);
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) r[j] = keep >> j & 1u ? r[j] : old[j];
  }
  if (!wide) {
    FA_UNROLL
    for (int j = 0; j < 4; ++j) r[j] = r[2 * j] | r[2 * j + 1] << 16;
  }
  vec_store(p, r.a);
  if (wide) vec_store(p + 16, r.b);
}

// Rounded once, one element per word.
FA_DEVICE Raw narrow(int dtype, const float (&f)[kEach]) {
  Raw r;
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) r[j] = as_bits(f[j]);
  if (dtype == kBF16) {
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) r[j] = float_to_bf16(as_float(r[j]));
  } else if (dtype == kF16) {
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) r[j] = float_to_half(as_float(r[j]));
  }
  return r;
}

template <class E>
FA_DEVICE void store(void* base, int dtype, const E& e, unsigned keep, const float (&f)[kEach]) {
  store_raw(base, dtype == kF32, e, keep, narrow(dtype, f));
}

// Elements that lie anywhere: `at` are their positions.
template <class T>
FA_DEVICE void load_at(Raw& r, const void* base, const int64_t* at, unsigned wanted) {
  const T* p = in_global(static_cast<const T*>(base));
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) r[j] = wanted >> j & 1u ? uint32_t(vec_load<T>(p + at[j])) : 0u;
}

FA_DEVICE void load_at(Raw& r, const void* base, bool wide, const int64_t* at, unsigned wanted) {
  wide ? load_at<uint32_t>(r, base, at, wanted) : load_at<uint16_t>(r, base, at, wanted);
}

FA_DEVICE void store_at(void* base, bool wide, const int64_t* at, unsigned keep, const Raw& r) {
  FA_UNROLL
  for (int j = 0; j < kEach; ++j)
    if (keep >> j & 1u) {
      if (wide)
        vec_store<uint32_t>(in_global(static_cast<uint32_t*>(base) + at[j]), r[j]);
      else
        vec_store<uint16_t>(in_global(static_cast<uint16_t*>(base) + at[j]), uint16_t(r[j]));
    }
}

}  // namespace fa::cuda

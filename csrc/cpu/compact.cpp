// Compact entries: a chosen element's states are contiguous, its parameter and gradient are not. A block of them is gathered, updated by
// the ordinary sweep as if it were a small tensor of its own, and scattered back.
// Bytes per element at low density: a cache line each of p (read, written) and g (read), and the states; the reads are prefetched.
#include <algorithm>
#include <cstring>

#include "../core/dtypes.h"
#include "optim.h"

namespace fa::cpu {
namespace {

constexpr int kBlock = 1024;  // lines of p and g that a block touches at low density: 128 KB, to be written back from L2
constexpr int kAhead = 48;    // elements between a prefetch and its use

// `left`: how many positions may be read from `at` on. One array at a time: two at once took a third longer (measured, 1 % of 33 M).
template <class T, class Index>
void gather(void* to, const void* from, const Index* at, int n, int64_t left) {
  const T* base = static_cast<const T*>(from);
  T* __restrict out = static_cast<T*>(to);
  const int ahead = int(std::max<int64_t>(std::min<int64_t>(n, left - kAhead), 0));
  for (int i = 0; i < ahead; ++i) {
    __builtin_prefetch(base + at[i + kAhead], 1);
    out[i] = base[at[i]];
  }
  for (int i = ahead; i < n; ++i) out[i] = base[at[i]];
}

template <class Index>
void gather(void* to, const void* from, int dtype, const Index* at, int n, int64_t left) {
  dtype_size(dtype) == 4 ? gather<uint32_t>(to, from, at, n, left) : gather<uint16_t>(to, from, at, n, left);
}

template <class P, class Index>
void scatter(void* base, const void* values, const Index* at, int n) {
  P* out = static_cast<P*>(base);
  const P* in = static_cast<const P*>(values);
  for (int i = 0; i < n; ++i) out[at[i]] = in[i];
}

template <class Index>
void run(UpdateFn update, const Piece& w) {
  const TensorDesc& t = *w.tensor;
  alignas(64) uint32_t p[kBlock], g[kBlock];
  const bool wide = dtype_size(t.param_dtype) == 4;
  TensorDesc block = t;
  block.param = p;
  Piece part = w;
  part.tensor = &block;
  part.begin = 0;
  for (int64_t offset = w.begin; offset < w.end; offset += kBlock) {
    const int n = int(std::min<int64_t>(kBlock, w.end - offset));
    const Index* at = static_cast<const Index*>(t.index) + offset;
    const auto shifted = [&](auto* base, int dtype) {
      return base ? reinterpret_cast<decltype(base)>(uintptr_t(base) + uintptr_t(offset * dtype_size(dtype))) : base;
    };
    for (int k = 0; k < kMaxStates; ++k) block.state[k] = shifted(t.state[k], t.state_dtype[k]);
    block.extra = shifted(t.extra, t.extra_dtype);
    block.anchor = shifted(t.anchor, t.anchor_dtype);
    block.index = at;
    block.grad = t.compact_grad ? shifted(t.grad, t.grad_dtype) : g;
    block.numel = part.end = n;
    const int64_t left = t.numel - offset;
    gather(p, t.param, t.param_dtype, at, n, left);
    if (!t.compact_grad) gather(g, t.grad, t.grad_dtype, at, n, left);
    update(part);
    wide ? scatter<uint32_t>(t.param, p, at, n) : scatter<uint16_t>(t.param, p, at, n);
  }
}

}  // namespace

void update_compact(UpdateFn update, const Piece& piece) {
  piece.tensor->index_dtype == kI64 ? run<int64_t>(update, piece) : run<int32_t>(update, piece);
}

}  // namespace fa::cpu

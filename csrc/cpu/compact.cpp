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

template <class T, class Index>
void gather(T* __restrict out, const T* base, const Index* at, int n) {
  for (int i = 0; i < n; ++i) out[i] = base[at[i]];
}

// p and, unless the gradient is compact, g. `left`: how many positions may be read from `at` on.
template <class P, class G, class Index>
void gather_block(void* p, void* g, const TensorDesc& t, const Index* at, int n, int64_t left) {
  const P* param = static_cast<const P*>(t.param);
  const G* grad = static_cast<const G*>(t.grad);
  P* __restrict p_out = static_cast<P*>(p);
  G* __restrict g_out = static_cast<G*>(g);
  const int ahead = int(std::max<int64_t>(std::min<int64_t>(n, left - kAhead), 0));
  for (int i = 0; i < ahead; ++i) {
    __builtin_prefetch(param + at[i + kAhead], 1);
    __builtin_prefetch(grad + at[i + kAhead]);
    p_out[i] = param[at[i]];
    g_out[i] = grad[at[i]];
  }
  gather(p_out + ahead, param, at + ahead, n - ahead);
  gather(g_out + ahead, grad, at + ahead, n - ahead);
}

template <class P, class Index>
void gather_param(void* p, const TensorDesc& t, const Index* at, int n, int64_t left) {
  const P* param = static_cast<const P*>(t.param);
  P* __restrict out = static_cast<P*>(p);
  const int ahead = int(std::max<int64_t>(std::min<int64_t>(n, left - kAhead), 0));
  for (int i = 0; i < ahead; ++i) {
    __builtin_prefetch(param + at[i + kAhead], 1);
    out[i] = param[at[i]];
  }
  gather(out + ahead, param, at + ahead, n - ahead);
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
  const bool wide_p = dtype_size(t.param_dtype) == 4, wide_g = dtype_size(t.grad_dtype) == 4;
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
    if (t.compact_grad)
      wide_p ? gather_param<uint32_t>(p, t, at, n, left) : gather_param<uint16_t>(p, t, at, n, left);
    else if (wide_p)
      wide_g ? gather_block<uint32_t, uint32_t>(p, g, t, at, n, left) : gather_block<uint32_t, uint16_t>(p, g, t, at, n, left);
    else
      wide_g ? gather_block<uint16_t, uint32_t>(p, g, t, at, n, left) : gather_block<uint16_t, uint16_t>(p, g, t, at, n, left);
    update(part);
    wide_p ? scatter<uint32_t>(t.param, p, at, n) : scatter<uint16_t>(t.param, p, at, n);
  }
}

}  // namespace

void update_compact(UpdateFn update, const Piece& piece) {
  piece.tensor->index_dtype == kI64 ? run<int64_t>(update, piece) : run<int32_t>(update, piece);
}

}  // namespace fa::cpu

// Compact entries: a chosen element's states are contiguous, its parameter and gradient are not. A block of them is gathered, updated by
// the ordinary sweep as if it were a small tensor of its own, and scattered back.
// Bytes per element at low density: a cache line each of p (read, written) and g (read), and the states; the reads are prefetched.
#include <algorithm>
#include <cstring>

#include "../core/dtypes.h"
#include "optim.h"

namespace fa::cpu {
namespace {

constexpr int kBlock = 64;  // small: the lines of p are in L1 when they are written, and the next block's arrive while this one is computed
constexpr int kAhead = 48;  // elements between a prefetch and its use

// The chosen elements of p and, unless it is null, of g, side by side: their cache misses overlap (one array after the other took 40 % longer). `left`:
// how many positions may be read from `at` on.
template <class P, class G, class Index>
void gather(void* p_to, const void* p_from, void* g_to, const void* g_from, const Index* at, int n, int64_t left) {
  const P* p = static_cast<const P*>(p_from);
  const G* g = static_cast<const G*>(g_from);
  P* __restrict p_out = static_cast<P*>(p_to);
  G* __restrict g_out = static_cast<G*>(g_to);
  const auto both = [&](auto with_g) {
    const int ahead = int(std::max<int64_t>(std::min<int64_t>(n, left - kAhead), 0));
    for (int i = 0; i < n; ++i) {
      if (i < ahead) {
        __builtin_prefetch(p + at[i + kAhead], 1);
        if constexpr (with_g.value) __builtin_prefetch(g + at[i + kAhead], 0);
      }
      p_out[i] = p[at[i]];
      if constexpr (with_g.value) g_out[i] = g[at[i]];
    }
  };
  g ? both(std::true_type{}) : both(std::false_type{});
}

template <class Index>
void gather(void* p_to, const TensorDesc& t, void* g_to, const Index* at, int n, int64_t left) {
  const void* g = t.compact_grad ? nullptr : t.grad;
  const bool wide_p = dtype_size(t.param_dtype) == 4, wide_g = dtype_size(t.grad_dtype) == 4;
  const auto run = wide_p ? (wide_g ? gather<uint32_t, uint32_t, Index> : gather<uint32_t, uint16_t, Index>)
                          : (wide_g ? gather<uint16_t, uint32_t, Index> : gather<uint16_t, uint16_t, Index>);
  run(p_to, t.param, g_to, g, at, n, left);
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
    gather(p, t, g, at, n, left);
    update(part);
    wide ? scatter<uint32_t>(t.param, p, at, n) : scatter<uint16_t>(t.param, p, at, n);
  }
}

}  // namespace

void update_compact(UpdateFn update, const Piece& piece) {
  piece.tensor->index_dtype == kI64 ? run<int64_t>(update, piece) : run<int32_t>(update, piece);
}

}  // namespace fa::cpu

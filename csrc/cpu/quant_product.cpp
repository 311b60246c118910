// Products over threads: rows of W, cut by their number alone.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "../core/dtypes.h"
#include "optim.h"
#include "pool.h"
#include "quant.h"

namespace fa::cpu::quant {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

Floats floats(int64_t count) {
  Floats p(static_cast<float*>(std::aligned_alloc(64, (size_t(count) * sizeof(float) + 63) / 64 * 64)));
  if (!p) throw std::bad_alloc();
  return p;
}

// Rows [t, t + rows) of a product.
Product some_rows(const Product& p, int64_t t, int64_t width) {
  Product out = p;
  out.t = std::min(kMostRows, p.t - t);
  out.x = static_cast<const char*>(p.x) + t * p.stride * dtype_size(p.dtype);
  out.y = static_cast<char*>(p.y) + t * width * dtype_size(p.dtype);
  return out;
}

constexpr int64_t kGrain = 1 << 16;  // elements of W that are worth a turn of a thread
constexpr int64_t kRows = 16;
constexpr int64_t kSlots = 16;

}  // namespace

const ProductKernels& products() {
#if defined(__x86_64__)
  const char* name = cpu::kernels().name;
  if (!std::strcmp(name, "avx512")) return product_avx512;
  if (!std::strcmp(name, "avx2") && __builtin_cpu_supports("fma")) return product_avx2;
#endif
  return product_base;
}

void linear(const Weight& w, const Product& whole, int threads) {
  const ProductKernels& k = products();
  Operand o;
  k.size(w, &o.stride, &o.sums_stride);
  const int64_t most = std::min(kMostRows, whole.t);
  const Floats memory = floats(most * (o.stride + o.sums_stride + 1));
  o.x = memory.get();
  o.sums = o.x + most * o.stride;
  o.factor = o.sums + most * o.sums_stride;
  for (int64_t t = 0; t < whole.t; t += kMostRows) {
    const Product p = some_rows(whole, t, w.n);
    o.pairs = has_bf16() && k.pairs_fit(w, p);
    bool infinite[kMostRows];
    parallel_for(p.t, std::max<int64_t>(1, kGrain / w.k), threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const float factor = k.factor(p, i, w.k);
        infinite[i] = factor == 0.f;
        o.factor[i] = infinite[i] ? 1.f : factor;
        k.arrange(w, p, i, o);
      }
    });
    const int64_t grain = ceil_div(std::max<int64_t>(kRows, kGrain / w.k), kRows);
    parallel_for(ceil_div(w.n, kRows), grain, threads,
                 [&](int64_t first, int64_t last) { k.linear(w, p, o, first * kRows, std::min(last * kRows, w.n)); });
    // Codes and zeros that are summed apart make infinity less infinity of what is an infinity: once more, number by number.
    for (int64_t i = 0; i < p.t && !w.decoded; ++i) {
      if (!infinite[i]) continue;
      Weight numbers = w;
      numbers.decoded = true;
      Product row = some_rows(p, i, w.n);
      row.t = 1;
      linear(numbers, row, threads);
    }
  }
}

// Rows of W are cut into at most kSlots, each with sums of its own.
void linear_dx(const Weight& w, const Product& whole, int threads) {
  const ProductKernels& k = products();
  Operand o;
  k.size(w, &o.stride, &o.sums_stride);
  const int64_t rows = ceil_div(ceil_div(w.n, std::min(kSlots, ceil_div(w.n * w.k, kGrain))), 4) * 4, slots = ceil_div(w.n, rows);
  const int64_t most = std::min(kMostRows, whole.t), step = most * o.stride;
  const Floats memory = floats(slots * step + most);
  o.factor = memory.get() + slots * step;
  for (int64_t t = 0; t < whole.t; t += kMostRows) {
    const Product p = some_rows(whole, t, w.k);
    for (int64_t i = 0; i < p.t; ++i) {
      o.factor[i] = k.factor(p, i, w.n);
      if (o.factor[i] == 0.f) o.factor[i] = 1.f;
    }
    parallel_for(slots, 1, threads, [&](int64_t first, int64_t last) {
      for (int64_t s = first; s < last; ++s) {
        Operand own = o;
        own.x = memory.get() + s * step;
        k.linear_dx(w, p, s * rows, std::min((s + 1) * rows, w.n), own);
      }
    });
    parallel_for(p.t, std::max<int64_t>(1, kGrain / (w.k * slots)), threads, [&](int64_t first, int64_t last) {
      Operand all = o;
      all.x = memory.get();
      for (int64_t i = first; i < last; ++i) k.finish_dx(w, p, i, all, step, slots);
    });
  }
}

}  // namespace fa::cpu::quant

// p', s' = rule(p * decay, g / scale * clip * sign (+ l2 p), s): one pass over memory for any rule, storage type and option.
// Bytes per fp32 Adam parameter: reads p, g, m, v (16), writes p, m, v (12); bf16: 8 + 6. Memory bound: expect the copy rate.
//
// Templates: the rule only. Types, masks, master weights and stochastic rounding are switches that are the same for a whole block
// (all combinations as templates would be thousands of kernels). Equal bits with csrc/cpu/optim_isa.cpp: same functors, -fmad=false.
#include "../core/rules.h"
#include "optim.h"
#include "optim_parts.cuh"

namespace fa::cuda {
namespace {

template <class Rule>
FA_DEVICE void update(const Job& w, const Globals& globals, const Row& r, const Eight& e) {
  const TensorDesc& t = w.t;
  const unsigned keep = trainable(w, e);
  if (!keep) return;
  constexpr int kS = Rule::kStates, kArrays = kS ? kS : 1;
  const bool split_master = t.extra_dtype == kI16, master = t.extra_dtype == kF32;
  const int p_dtype = master ? int(kF32) : t.param_dtype;
  Raw raw_p, raw_low, raw_g, raw_s[kArrays];
  load(raw_p, master ? w.source->extra : t.param, p_dtype == kF32, e, keep);
  if (split_master && e.vector) load(raw_low, w.source->extra, false, e, keep);
  load(raw_g, t.grad, t.grad_dtype == kF32, e, keep);
  FA_UNROLL
  for (int k = 0; k < kS; ++k) load(raw_s[k], t.state[k], t.state_dtype[k] == kF32, e, keep);

  float p[kEach], g[kEach], s[kArrays][kEach];
  widen(p, raw_p, p_dtype, e.vector);
  if (split_master) {
    // Strided, the remainder would hold eight registers instead of four since the loads began: it comes late there.
    e.vector ? unpack(raw_low) : load(raw_low, w.source->extra, false, e, keep);
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) p[j] = join_split(uint16_t(as_bits(p[j]) >> 16), int16_t(uint16_t(raw_low[j])));
  }
  widen(g, raw_g, t.grad_dtype, e.vector);
  if (!w.plain_gradient) {
    const float scale = value_or_1(globals.grad_scale), clip = value_or_1(globals.clip), sign = w.row->sign, l2 = w.row->l2;
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) g[j] = g[j] / scale * clip * sign;
    if (l2 != 0.f) {  // not "+ 0 * p": that is NaN where p is infinite
      FA_UNROLL
      for (int j = 0; j < kEach; ++j) g[j] = g[j] + l2 * p[j];
    }
  }
  FA_UNROLL
  for (int k = 0; k < kS; ++k) widen(s[k], raw_s[k], t.state_dtype[k], e.vector);
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) {
    float own[kArrays];
    FA_UNROLL
    for (int k = 0; k < kS; ++k) own[k] = s[k][j];
    p[j] = Rule::step(p[j] * r.decay, g[j], own, r);
    FA_UNROLL
    for (int k = 0; k < Rule::kStored; ++k) s[k][j] = own[k];
  }
  FA_UNROLL
  for (int k = 0; k < Rule::kStored; ++k) store(t.state[k], t.state_dtype[k], e, keep, s[k]);
  store_param<false>(w, globals, e, keep, p, nullptr);
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sweep_kernel(const TensorDesc* tensors, const Chunk* chunks, int64_t n_chunks, const Row* rows, Globals g) {
  if (g.found_inf && *g.found_inf != 0.f) return;
  const bool plain = value_or_1(g.grad_scale) == 1.f && value_or_1(g.clip) == 1.f;
  for (int64_t c = blockIdx.x; c < n_chunks; c += gridDim.x) {
    const Chunk piece = chunks[c];
    Job w;
    w.source = tensors + piece.tensor;
    w.t = *w.source;
    w.row = rows + w.t.row;
    w.masked = w.t.mask != nullptr;
    const Row r = *w.row;
    w.plain_gradient = plain && r.sign == 1.f && r.l2 == 0.f;
    const Walk walk(piece.offset, chunk_end(w.t.numel, piece.offset, g.chunk), w.t.aligned != 0);
    for (int64_t at = piece.offset; at < walk.end; at = walk.next(at)) update<Rule>(w, g, r, walk.eight(at));
  }
}

// A fixed tree: lanes, then warps. Every thread of the block must come here.
FA_DEVICE double block_sum(double v) {
  FA_SHARED(double, warps, [kThreads / kWarp]);
  FA_UNROLL
  for (unsigned d = kWarp / 2; d; d /= 2) v += shfl_xor(v, d);
  syncthreads();  // the previous chunk's sums may still be read
  if (lane_id() == 0) warps[threadIdx.x / kWarp] = v;
  syncthreads();
  double total = 0;
  for (unsigned k = 0; k < kThreads / kWarp; ++k) total += warps[k];
  return total;
}

// Bytes: reads g, writes 8 per chunk. The square of a float is exact in double, so fma rounds as * and + would, at half the cost.
__global__ void __launch_bounds__(kThreads) squares_kernel(const TensorDesc* tensors, const Chunk* chunks, int64_t n_chunks, int32_t chunk,
                                                           double* partial, const float* grad_scale) {
  const float scale = grad_scale ? *grad_scale : 1.f;
  for (int64_t c = blockIdx.x; c < n_chunks; c += gridDim.x) {
    const Chunk piece = chunks[c];
    const TensorDesc t = tensors[piece.tensor];
    const Walk walk(piece.offset, chunk_end(t.grad_numel, piece.offset, chunk), uintptr_t(t.grad) % 16 == 0);
    double sum[2] = {};
    for (int64_t at = piece.offset; at < walk.end; at = walk.next(at)) {
      const Eight e = walk.eight(at);
      if (!e.valid) continue;
      Raw raw;
      float g[kEach];
      load(raw, t.grad, t.grad_dtype == kF32, e, e.valid);
      widen(g, raw, t.grad_dtype, e.vector);
      FA_UNROLL
      for (int j = 0; j < kEach; ++j) {
        const double x = double(scale == 1.f ? g[j] : g[j] / scale);
        sum[j & 1] = fma(x, x, sum[j & 1]);
      }
    }
    const double total = block_sum(sum[0] + sum[1]);
    if (threadIdx.x == 0) partial[c] = total;
  }
}

enum RuleNumber : int {
#define X(name, type) kRule_##name,
  FA_RULES(X)
#undef X
      kRules
};

FA_DEVICE void make_row(int rule, const Hyper& h, Clock& c, Row& r) {
  switch (rule) {
#define X(name, type) \
  case kRule_##name: return type::row(h, c, r);
    FA_RULES(X)
#undef X
  }
}

// One block. Tensors may share a step count, so nobody may advance one before everybody has read it; clocks[i] carries the new value
// across.
__global__ void __launch_bounds__(kThreads)
    prologue_kernel(int rule, const TensorDesc* tensors, int64_t n, const Hyper* hypers, Row* rows, Clock* clocks, const float* found_inf) {
  if (found_inf && *found_inf != 0.f) return;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const TensorDesc& t = tensors[i];
    Clock c{double(*t.step) + 1.0, {t.aux[0] ? *t.aux[0] : 0.0, t.aux[1] ? *t.aux[1] : 0.0}};
    Row r;
    make_row(rule, hypers[t.group], c, r);
    rows[i] = r;
    clocks[i] = c;
  }
  syncthreads();
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    const TensorDesc& t = tensors[i];
    *t.step = float(clocks[i].step);
    if (t.aux[0]) *t.aux[0] = clocks[i].aux[0];
    if (t.aux[1]) *t.aux[1] = clocks[i].aux[1];
  }
}

using SweepFn = void (*)(const TensorDesc*, const Chunk*, int64_t, const Row*, Globals);
const SweepFn kSweeps[] = {
#define X(name, type) sweep_kernel<type>,
    FA_RULES(X)
#undef X
};

}  // namespace

void sweep(int rule, const TensorDesc* tensors, const Chunk* chunks, int64_t n_chunks, const Row* rows, const Globals& globals,
           Place place) {
  if (n_chunks == 0) return;
  const DeviceGuard guard(place.device, "cuda_sweep");
  FA_LAUNCH(kSweeps[rule], grid_for(n_chunks), kThreads, 0, static_cast<cudaStream_t>(place.stream), tensors, chunks, n_chunks, rows,
            globals);
  check(cudaGetLastError(), "cuda_sweep");
}

void squares(const TensorDesc* tensors, const Chunk* chunks, int64_t n_chunks, int32_t chunk, double* partial, const float* grad_scale,
             Place place) {
  if (n_chunks == 0) return;
  const DeviceGuard guard(place.device, "cuda_squares");
  FA_LAUNCH(squares_kernel, grid_for(n_chunks), kThreads, 0, static_cast<cudaStream_t>(place.stream), tensors, chunks, n_chunks, chunk,
            partial, grad_scale);
  check(cudaGetLastError(), "cuda_squares");
}

void prologue(int rule, const TensorDesc* tensors, int64_t n, const Hyper* hypers, Row* rows, Clock* clocks, const float* found_inf,
              Place place) {
  if (n == 0) return;
  const DeviceGuard guard(place.device, "cuda_prologue");
  FA_LAUNCH(prologue_kernel, 1, kThreads, 0, static_cast<cudaStream_t>(place.stream), rule, tensors, n, hypers, rows, clocks, found_inf);
  check(cudaGetLastError(), "cuda_prologue");
}

}  // namespace fa::cuda

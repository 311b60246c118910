// p', s' = rule(p * decay, g / scale * clip * sign (+ l2 p), s): one pass over memory for any rule, storage type and option.
// Bytes per fp32 Adam parameter: reads p, g, m, v (16), writes p, m, v (12); bf16: 8 + 6. Memory bound: expect the copy rate.
//
// Templates: the rule only. Types, masks, master weights and stochastic rounding are switches that are the same for a whole block
// (all combinations as templates would be thousands of kernels). Equal bits with csrc/cpu/optim_isa.cpp: same functors, -fmad=false.
#include "../core/philox.h"
#include "../core/rules.h"
#include "elements.cuh"
#include "optim.h"

#if defined(__CUDACC__)
#define FA_NO_UNROLL _Pragma("unroll 1")
#else
#define FA_NO_UNROLL
#endif

namespace fa::cuda {
namespace {

// What a turn needs beside the eight elements; the same for a whole block. `t` is a copy: through the pointer every store might change it,
// and it would be read again and again. What only some options need is read through the pointers, so that it holds no register meanwhile.
struct Job {
  TensorDesc t;
  const TensorDesc* source;
  const Row* row;
  bool masked, plain_gradient;
};

FA_DEVICE float value_or_1(const float* p) { return p ? *p : 1.f; }

FA_DEVICE unsigned trainable(const Job& w, const Eight& e) {
  if (!w.masked || !e.valid) return e.valid;
  const uint32_t* mask = in_global(w.source->mask);
  if (e.vector) return mask[e.first >> 5] >> (e.first & 31) & 0xffu;
  unsigned keep = 0;
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) {
    const int64_t i = e.first + j * kThreads;
    if (e.valid >> j & 1u) keep |= (mask[i >> 5] >> (i & 31) & 1u) << j;
  }
  return keep;
}

// Sixteen random bits per element, two elements a word. One Philox block serves eight neighbours.
FA_DEVICE Philox4 random_bits(const Job& w, const Eight& e, uint64_t seed) {
  const uint32_t step = uint32_t(w.row->step);
  const TensorDesc& t = *w.source;
  const bool identity = t.index_inner == t.numel;
  if (identity && e.vector && t.index_base % kEach == 0)
    return philox(seed, uint64_t(t.index_base + e.first) >> 3, uint32_t(t.ordinal), step);
  Philox4 out{};
  FA_NO_UNROLL
  for (int j = 0; j < kEach; ++j) {
    const uint64_t local = uint64_t(index(e, j)), inner = uint64_t(t.index_inner);
    const uint64_t element = identity ? t.index_base + local : t.index_base + local / inner * t.index_outer + local % inner;
    // Shifting in from above and selecting, instead of indexing, keeps the words in registers.
    out.v[0] = out.v[0] >> 16 | out.v[1] << 16;
    out.v[1] = out.v[1] >> 16 | out.v[2] << 16;
    out.v[2] = out.v[2] >> 16 | out.v[3] << 16;
    const Philox4 r = philox(seed, element >> 3, uint32_t(t.ordinal), step);
    const uint32_t low = element & 2 ? r.v[1] : r.v[0], high = element & 2 ? r.v[3] : r.v[2], word = element & 4 ? high : low;
    out.v[3] = out.v[3] >> 16 | (element & 1 ? word & 0xffff0000u : word << 16);
  }
  return out;
}

FA_DEVICE void store_param(const Job& w, const Globals& globals, const Eight& e, unsigned keep, const float (&p)[kEach]) {
  const TensorDesc& t = w.t;
  if (t.extra_dtype == kI16) {
    Raw high, low;
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) {
      uint16_t h;
      int16_t l;
      split(p[j], &h, &l);
      high[j] = h;
      low[j] = uint16_t(l);
    }
    store_raw(t.param, false, e, keep, high);
    store_raw(w.source->extra, false, e, keep, low);
    return;
  }
  if (t.extra_dtype == kF32) store(w.source->extra, kF32, e, keep, p);
  if (!globals.stochastic || t.param_dtype != kBF16) return store(t.param, t.param_dtype, e, keep, p);
  const Philox4 random = random_bits(w, e, globals.seed);
  Raw r;
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) r[j] = float_to_bf16_stochastic(p[j], random.v[j / 2] >> (j & 1 ? 16 : 0));
  store_raw(t.param, false, e, keep, r);
}

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
  store_param(w, globals, e, keep, p);
}

FA_DEVICE int64_t chunk_end(const TensorDesc& t, int64_t offset, int32_t chunk) {
  return t.numel - offset < chunk ? t.numel : offset + chunk;
}

// Two blocks per SM: at most 128 registers and no spills. At three (80 registers) Adam, RMSprop and all larger rules spill.
constexpr int kBlocks = 2;

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
    const Walk walk(piece.offset, chunk_end(w.t, piece.offset, g.chunk), w.t.aligned != 0);
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
    const Walk walk(piece.offset, chunk_end(t, piece.offset, chunk), uintptr_t(t.grad) % 16 == 0);
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

class DeviceGuard {
 public:
  DeviceGuard(int device, const char* what) {
    check(cudaGetDevice(&previous_), what);
    if (previous_ == device) return;
    check(cudaSetDevice(device), what);
    moved_ = true;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (moved_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool moved_ = false;
};

#if defined(FA_EMULATE)
constexpr int64_t kMaxGrid = 64;  // small, so that tests see blocks that take several chunks
#else
constexpr int64_t kMaxGrid = 0x7fffffff;
#endif
unsigned grid_for(int64_t n_chunks) { return unsigned(n_chunks < kMaxGrid ? n_chunks : kMaxGrid); }

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

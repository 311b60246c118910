// The sweep over entries that the plain one does not take: compact ones, whose parameter and gradient are scattered, and those whose
// decay pulls towards an anchor. Kept apart so that the plain sweep's registers are its own.
// Bytes per compact fp32 Adam element: states 16 and index 4, coalesced; p and g one sector of 32 each, read and (p) written.
#include "../core/rules.h"
#include "optim.h"
#include "optim_parts.cuh"

namespace fa::cuda {
namespace {

// The parameter in fp32, from wherever its full precision lies.
FA_DEVICE void load_param(float (&p)[kEach], const Job& w, const Eight& e, unsigned keep, const int64_t* at) {
  const TensorDesc& t = w.t;
  Raw raw;
  if (t.extra_dtype == kF32) {
    load(raw, w.source->extra, true, e, keep);
    return widen(p, raw, kF32, false);
  }
  load_at(raw, t.param, t.param_dtype == kF32, at, keep);
  widen(p, raw, t.param_dtype, false);
  if (t.extra_dtype != kI16) return;
  load(raw, w.source->extra, false, e, keep);
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) p[j] = join_split(uint16_t(as_bits(p[j]) >> 16), int16_t(uint16_t(raw[j])));
}

template <class Rule>
FA_DEVICE void update(const Job& w, const Globals& globals, const Eight& e) {
  const TensorDesc& t = w.t;
  const unsigned keep = trainable(w, e);
  if (!keep) return;
  constexpr int kS = Rule::kStates, kArrays = kS ? kS : 1;
  int64_t at[kEach];
  positions(at, t, e);
  float p[kEach], g[kEach];
  Raw raw_g;
  if (t.compact_grad)
    load(raw_g, t.grad, t.grad_dtype == kF32, e, keep);
  else
    load_at(raw_g, t.grad, t.grad_dtype == kF32, at, keep);
  load_param(p, w, e, keep, at);
  widen(g, raw_g, t.grad_dtype, false);
  apply_decay(p, g, w, globals, e, keep);
  float s[kArrays][kEach];
  FA_UNROLL
  for (int k = 0; k < kS; ++k) {
    Raw raw;
    load(raw, t.state[k], t.state_dtype[k] == kF32, e, keep);
    widen(s[k], raw, t.state_dtype[k], false);
  }
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) {
    float own[kArrays];
    FA_UNROLL
    for (int k = 0; k < kS; ++k) own[k] = s[k][j];
    p[j] = Rule::step(p[j], g[j], own, *w.row);
    FA_UNROLL
    for (int k = 0; k < Rule::kStored; ++k) s[k][j] = own[k];
  }
  FA_UNROLL
  for (int k = 0; k < Rule::kStored; ++k) store(t.state[k], t.state_dtype[k], e, keep, s[k]);
  positions(at, t, e);  // again, from the cache: they would hold sixteen registers through the rule
  store_param<true>(w, globals, e, keep, p, at);
}

// One block asked for, not two: in 128 registers the rules with three states spill on sm_100.
template <class Rule>
__global__ void __launch_bounds__(kThreads, 1)
    scattered_kernel(const TensorDesc* tensors, const Chunk* chunks, int64_t n_chunks, const Row* rows, Globals g) {
  if (g.found_inf && *g.found_inf != 0.f) return;
  const bool plain = value_or_1(g.grad_scale) == 1.f && value_or_1(g.clip) == 1.f;
  for (int64_t c = blockIdx.x; c < n_chunks; c += gridDim.x) {
    const Chunk piece = chunks[c];
    Job w;
    w.source = tensors + piece.tensor;
    w.t = *w.source;
    w.row = rows + w.t.row;
    w.masked = w.t.mask != nullptr;
    w.plain_gradient = plain && w.row->sign == 1.f && w.row->l2 == 0.f;
    const Walk walk(piece.offset, chunk_end(w.t.numel, piece.offset, g.chunk), false);
    for (int64_t at = piece.offset; at < walk.end; at = walk.next(at)) update<Rule>(w, g, walk.eight(at));
  }
}

using SweepFn = void (*)(const TensorDesc*, const Chunk*, int64_t, const Row*, Globals);
const SweepFn kSweeps[] = {
#define X(name, type) scattered_kernel<type>,
    FA_RULES(X)
#undef X
};

}  // namespace

void sweep_scattered(int rule, const TensorDesc* tensors, const Chunk* chunks, int64_t n_chunks, const Row* rows, const Globals& globals,
                     Place place) {
  if (n_chunks == 0) return;
  const DeviceGuard guard(place.device, "cuda_sweep");
  FA_LAUNCH(kSweeps[rule], grid_for(n_chunks), kThreads, 0, static_cast<cudaStream_t>(place.stream), tensors, chunks, n_chunks, rows,
            globals);
  check(cudaGetLastError(), "cuda_sweep");
}

}  // namespace fa::cuda

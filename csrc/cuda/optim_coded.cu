// The sweep over entries with coded states (core/lowbit.h): decode, rule, largest magnitude of each block of elements, encode, one pass.
// A turn holds whole blocks (up to 2048 elements): what is decoded and updated stays in registers until the block's scale is known.
// Bytes per Adam parameter with int8 states in blocks of 256: bf16 6 read, 4 written; fp32 10 and 6. Memory bound in theory; the codes'
// arithmetic (some 35 instructions a state) is about as long as the transfer in bf16.
#include <string>
#include <type_traits>

#include "../core/rules.h"
#include "coded.cuh"
#include "optim.h"

namespace fa::cuda {
namespace {

// Where elements lie that are no vector: scattered ones, those of misaligned tensors and the last few.
FA_DEVICE void places(int64_t (&at)[kEach], const TensorDesc& t, const Neighbours& e) {
  if (t.index) return positions(at, t, e);
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) at[j] = index(e, j);
}

// Gradient, and parameter from wherever its full precision lies, in fp32.
FA_DEVICE void load_inputs(float (&p)[kEach], float (&g)[kEach], const Job& w, const Neighbours& e, unsigned keep) {
  const TensorDesc& t = *w.source;
  const bool master = t.extra_dtype == kF32, whole = e.vector && !t.index;
  const int p_dtype = master ? int(kF32) : t.param_dtype;
  Raw raw_p, raw_g, low;
  if (whole) {
    const Neighbours all{e.first, 0xffu, true};
    load(raw_p, master ? w.source->extra : w.source->param, p_dtype == kF32, all, 0xffu);
    load(raw_g, w.source->grad, t.grad_dtype == kF32, all, 0xffu);
  } else {
    int64_t at[kEach], other[kEach];  // chosen one by one: a choice between two arrays would put both into local memory
    places(at, t, e);
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) other[j] = t.compact_grad ? index(e, j) : at[j];
    load_at(raw_g, w.source->grad, t.grad_dtype == kF32, other, keep);
    FA_UNROLL
    for (int j = 0; j < kEach; ++j) at[j] = master ? index(e, j) : at[j];
    load_at(raw_p, master ? w.source->extra : w.source->param, p_dtype == kF32, at, keep);
  }
  widen(p, raw_p, p_dtype, whole);
  widen(g, raw_g, t.grad_dtype, whole);
  if (t.extra_dtype != kI16) return;
  load(low, w.source->extra, false, e, keep);
  if (e.vector) unpack(low);
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) p[j] = join_split(uint16_t(as_bits(p[j]) >> 16), int16_t(uint16_t(low[j])));
}

template <class Rule>
FA_DEVICE void update(const Job& w, const Globals& globals, const Neighbours& e, const Tables& tables) {
  const TensorDesc& t = *w.source;  // not the copy, which would take the registers of a second block
  constexpr int kS = Rule::kStates, kArrays = kS ? kS : 1;
  const int lanes = (1 << t.block_log2) / kEach;
  const int64_t block = e.valid ? e.first >> t.block_log2 : 0;
  const unsigned keep = trainable(w, e);
  Raw raw_s[kArrays];
  FA_UNROLL
  for (int k = 0; k < kS; ++k)
    is_coded(t.state_dtype[k]) ? load_codes(raw_s[k], t.state[k], e) : load(raw_s[k], t.state[k], t.state_dtype[k] == kF32, e, keep);
  float p[kEach], g[kEach], s[kArrays][kEach];
  load_inputs(p, g, w, e, keep);
  apply_decay(p, g, w, globals, e, keep);
  FA_UNROLL
  for (int k = 0; k < kS; ++k)
    is_coded(t.state_dtype[k]) ? decode(s[k], raw_s[k], t.state_dtype[k], in_global(w.source->scale[k]), block, tables)
                               : widen(s[k], raw_s[k], t.state_dtype[k], e.vector);
  FA_UNROLL
  for (int j = 0; j < kEach; ++j) {
    float own[kArrays];
    FA_UNROLL
    for (int k = 0; k < kS; ++k) own[k] = s[k][j];
    p[j] = Rule::step(p[j], g[j], own, *w.row);
    FA_UNROLL
    for (int k = 0; k < Rule::kStored; ++k) s[k][j] = keep >> j & 1u ? own[k] : s[k][j];
  }
  const bool changes = !w.masked || largest(keep, lanes) != 0;
  FA_UNROLL
  for (int k = 0; k < Rule::kStored; ++k)
    is_coded(t.state_dtype[k]) ? encode(w.source->state[k], w.source->scale[k], t.state_dtype[k], e, lanes, changes, s[k], tables)
                               : store(t.state[k], t.state_dtype[k], e, keep, s[k]);
  if (!keep) return;
  if (e.vector && !t.index) return store_param<false>(w, globals, Neighbours{e.first, 0xffu, true}, keep, p, nullptr);
  int64_t at[kEach];
  places(at, t, e);
  store_param<true>(w, globals, Neighbours{e.first, e.valid, false}, keep, p, at);
}

// Two blocks an SM where 128 registers are enough without spills.
template <class Rule>
constexpr int blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  return Rule::kStates > 1 ? 1 : kBlocks;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return Rule::kStates > 2 ? 1 : kBlocks;
#else
  return kBlocks;
#endif
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, blocks<Rule>())
    coded_kernel(const TensorDesc* tensors, const Chunk* chunks, int64_t n_chunks, const Row* rows, Globals g) {
  if (g.found_inf && *g.found_inf != 0.f) return;
  FA_SHARED(Tables, tables);
  fill(tables);
  const bool plain = value_or_1(g.grad_scale) == 1.f && value_or_1(g.clip) == 1.f;
  for (int64_t c = blockIdx.x; c < n_chunks; c += gridDim.x) {
    const Chunk piece = chunks[c];
    Job w;
    w.source = tensors + piece.tensor;
    w.t = *w.source;
    w.row = rows + w.t.row;
    w.masked = w.t.mask != nullptr;
    w.plain_gradient = plain && w.row->sign == 1.f && w.row->l2 == 0.f;
    const int64_t end = chunk_end(w.t.numel, piece.offset, g.chunk);
    for (int64_t at = piece.offset; at < end; at += kSpan) update<Rule>(w, g, neighbours(at, end, w.t.aligned != 0), tables);
  }
}

using SweepFn = void (*)(const TensorDesc*, const Chunk*, int64_t, const Row*, Globals);

// Rules without states, and those that take the difference of two (optim/spec.py, UNCODABLE), never get here.
template <class Rule>
constexpr SweepFn sweep_of() {
  constexpr bool difference = std::is_same_v<Rule, RMSpropCentered> || std::is_same_v<Rule, RMSpropCenteredMomentum>;
  if constexpr (Rule::kStates != 0 && !difference) return coded_kernel<Rule>;
  return nullptr;
}

const SweepFn kSweeps[] = {
#define X(name, type) sweep_of<type>(),
    FA_RULES(X)
#undef X
};

}  // namespace

void sweep_coded(int rule, const TensorDesc* tensors, const Chunk* chunks, int64_t n_chunks, const Row* rows, const Globals& globals,
                 Place place) {
  if (n_chunks == 0) return;
  if (!kSweeps[rule])
    throw std::invalid_argument("cuda_sweep: expected a rule that can have coded states; got rule " + std::to_string(rule));
  const DeviceGuard guard(place.device, "cuda_sweep");
  FA_LAUNCH(kSweeps[rule], grid_for(n_chunks), kThreads, 0, static_cast<cudaStream_t>(place.stream), tensors, chunks, n_chunks, rows,
            globals);
  check(cudaGetLastError(), "cuda_sweep");
}

}  // namespace fa::cuda

// One description of "what to update", read by the CPU sweep, the CUDA sweep and the Triton sweep alike.
#pragma once
#include <cstdint>

#include "macros.h"

namespace fa {

constexpr int kMaxStates = 4;

// One tensor: twenty-six 64-bit words, so that Triton can read it as int64[26] (kernels/common.py names the words).
//
// Compact entries (index != null) hold `numel` chosen elements of a larger parameter: element i of states, extra and anchor belongs to
// element index[i] of param and grad. A parameter is one such entry per cohort (elements that joined together), each with its own step.
struct TensorDesc {
  void* param;
  const void* grad;
  void* state[kMaxStates];
  void* extra;            // fp32 master weight or int16 remainder of the split, null without master_weights
  const uint32_t* mask;   // one bit per element in memory order, 1 = trainable; null = all
  float* step;            // 0-d fp32: updates made so far
  double* aux[2];         // 0-d fp64 scalars a rule carries from step to step (NAdam's mu_product, ...)
  int64_t numel;
  int32_t row;            // index into the rows
  int32_t group;          // index into the hyper-parameters
  uint8_t param_dtype, grad_dtype, state_dtype[kMaxStates], extra_dtype, aligned;  // aligned: every address a multiple of 16
  int64_t ordinal;        // position of the parameter in the optimizer: keys the random numbers
  int64_t index_base, index_inner, index_outer;  // local element i is global element base + (i / inner) * outer + i % inner
  const void* index;  // positions in the parameter's memory, in no order; null = dense, element i is element i; or, of type kBits, int64
  // [numel of param / 1024, rounded up, + 1]: how many bits of `mask` are set before each 1,024: these are the positions
  const void* anchor;  // decay and L2 pull towards these values; null = towards zero
  int64_t grad_numel;  // elements of grad that count in the gradient norm (all of them, whatever the mask says)
  // compact_grad: grad has numel elements, in the order of the index. block_log2: elements per block of the coded states, 5..11
  uint8_t index_dtype, anchor_dtype, compact_grad, block_log2, spare[4];
  float* scale[kMaxStates];  // of coded states: block i // 2^block_log2 of element i of the entry has [absmax] or [absmax, k]; else null
};
static_assert(sizeof(TensorDesc) == 26 * 8, "kernels/common.py reads this as int64[26]");

// One piece of one tensor, the unit of work: a launch walks a flat list of these, so 1 tensor or 10,000 cost one launch.
struct Chunk {
  int64_t tensor;
  int64_t offset;
};

// clang-format off
// Hyper-parameters of one param group, in double, as the rules' row functions read them. fusedadapt/optim/rules.py repeats the list.
#define FA_HYPER_FIELDS(X)                                                                                                         \
  X(lr) X(beta1) X(beta2) X(beta3) X(eps) X(l2) X(decoupled) X(fixed) X(sign) X(momentum) X(dampening) X(nesterov) X(lr_decay)     \
  X(rectify) X(degenerated) X(amsgrad) X(mu_base) X(alpha) X(alpha_warmup) X(beta3_warmup) X(half1) X(half3) X(clip) X(rho)        \
  X(power) X(warmup) X(r) X(weight_lr_power)
// clang-format on

// Scalars of one group at one step, computed in double and rounded once (1 - 0.999f in fp32 is already 1e-5 off).
// clang-format off
// sign, l2, decay and pull (1 - decay, towards an anchor) are applied by the sweep; the rest belongs to the rule. kernels/common.py repeats the list.
#define FA_ROW_FIELDS(X)                                                                                                           \
  X(sign) X(l2) X(decay) X(step) X(step_size) X(beta1) X(alpha1) X(beta2) X(alpha2) X(beta3) X(alpha3) X(eps) X(eps_state) X(mix)  \
  X(wd) X(clip) X(corr1) X(corr2) X(pow1) X(pow2) X(mode) X(pull) X(spare1) X(spare2)
// clang-format on

struct Hyper {
#define X(name) double name;
  FA_HYPER_FIELDS(X)
#undef X
};

struct Row {
#define X(name) float name;
  FA_ROW_FIELDS(X)
#undef X
};
static_assert(sizeof(Row) == 24 * 4, "rows are fp32[24]");

// What a rule carries from step to step beside its per-element states. On entry of a row function `step` already counts this update.
struct Clock {
  double step;
  double aux[2];
};

// What the whole launch shares. The scalars live where the launch runs (host or device): nobody waits for their value.
struct Globals {
  const float* grad_scale;  // GradScaler's scale: gradients are divided by it; null = 1
  const float* found_inf;   // nonzero: nothing changes; null = never
  const float* clip;        // coefficient of global-norm clipping; null = 1
  uint64_t seed;
  int32_t stochastic;       // round bf16 parameters stochastically
  int32_t chunk;            // elements per chunk
};

}  // namespace fa

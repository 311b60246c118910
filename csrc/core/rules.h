// Update rules: one element, one step. The same names and the same few lines stand in fusedadapt/reference/optim.py and
// kernels/optim.py; the gates in tests/test_parity.py demand equal bits from all of them.
//
//   row(h, c, r)       scalars of one param group at step c.step (the update under way, counted from 1), in double
//   step(p, g, s, r)   p: decayed parameter, g: final gradient (unscaled, clipped, maximize and L2 applied), s: states, in place
//   kStates/kStored    states read / leading states written back
//
// Decoupled decay, masks, rounding, master weights and low-precision storage belong to the sweep, not to a rule.
#pragma once
#include "numbers.h"

namespace fa {

struct SGD {
  static constexpr int kStates = 0, kStored = 0;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) { common_row(h, c, r); }
  static FA_HD float step(float p, float g, float*, const Row& r) { return p - r.step_size * g; }
};

// torch: the first step copies the gradient into the buffer, dampening acts from the second on.
struct SGDMomentum {
  static constexpr int kStates = 1, kStored = 1;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    r.beta1 = c.step == 1.0 ? 0.f : float(h.momentum);
    r.alpha1 = c.step == 1.0 ? 1.f : float(1.0 - h.dampening);
    r.mix = float(h.momentum);
    r.mode = float(h.nesterov);
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta1 * s[0] + r.alpha1 * g;
    return p - r.step_size * (r.mode != 0.f ? g + r.mix * s[0] : s[0]);
  }
};

// signSGD / Signum (arXiv 1802.04434).
struct SignSGD {
  static constexpr int kStates = 0, kStored = 0;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) { common_row(h, c, r); }
  static FA_HD float step(float p, float g, float*, const Row& r) { return p - r.step_size * sign_of(g); }
};
struct Signum {
  static constexpr int kStates = 1, kStored = 1;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    r.beta1 = float(h.momentum);
    r.alpha1 = float(1.0 - h.momentum);
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta1 * s[0] + r.alpha1 * g;
    return p - r.step_size * sign_of(s[0]);
  }
};

// Lion (arXiv 2302.06675): the sign of an interpolation of the old momentum and the gradient.
struct Lion {
  static constexpr int kStates = 1, kStored = 1;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) { common_row(h, c, r); }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    const float direction = r.beta1 * s[0] + r.alpha1 * g;
    s[0] = r.beta2 * s[0] + r.alpha2 * g;
    return p - r.step_size * sign_of(direction);
  }
};

struct Adagrad {
  static constexpr int kStates = 1, kStored = 1;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    r.step_size = float(h.lr / (1.0 + (c.step - 1.0) * h.lr_decay));
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = s[0] + g * g;
    return p - r.step_size * g / (sqrtf(s[0]) + r.eps);
  }
};

// States: square_avg, [grad_avg], [momentum_buffer]. v - ga^2 is a variance: where rounding makes it negative it counts as 0
// (torch takes the root of it and gets NaN).
template <bool kCentered, bool kMomentum>
struct RMSprop {
  static constexpr int kStates = 1 + kCentered + kMomentum, kStored = kStates;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    r.beta1 = float(h.momentum);
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta2 * s[0] + r.alpha2 * g * g;
    float q = s[0];
    if (kCentered) {
      s[1] = r.beta2 * s[1] + r.alpha2 * g;
      q = s[0] - s[1] * s[1];
      q = q < 0.f ? 0.f : q;
    }
    const float u = g / (sqrtf(q) + r.eps);
    if (!kMomentum) return p - r.step_size * u;
    float& buf = s[kStates - 1];
    buf = r.beta1 * buf + u;
    return p - r.step_size * buf;
  }
};

struct Adadelta {
  static constexpr int kStates = 2, kStored = 2;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) { common_row(h, c, r); }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta2 * s[0] + r.alpha2 * g * g;
    const float u = sqrtf(s[1] + r.eps) / sqrtf(s[0] + r.eps) * g;
    s[1] = r.beta2 * s[1] + r.alpha2 * u * u;
    return p - r.step_size * u;
  }
};

// Sophia-G (arXiv 2305.14342), apply step: the Hessian estimate (second state) is refreshed outside, every few steps.
struct SophiaG {
  static constexpr int kStates = 2, kStored = 1;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    r.mix = float(h.rho);
    r.eps = 1e-15f;
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta1 * s[0] + r.alpha1 * g;
    const float ratio = fabsf(s[0]) / (r.mix * s[1] + r.eps);
    return p - r.step_size * sign_of(s[0]) * (ratio > 1.f ? 1.f : ratio);
  }
};

// Schedule-Free AdamW (arXiv 2405.15682). States: z, exp_avg_sq; p holds y. aux: sum of weights, largest learning rate so far.
struct ScheduleFreeAdamW {
  static constexpr int kStates = 2, kStored = 2;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    const double warm = c.step < h.warmup ? c.step / h.warmup : 1.0;
    const double lr = h.lr * warm, root2 = sqrt(1.0 - ipow(h.beta2, c.step));
    c.aux[1] = lr > c.aux[1] ? lr : c.aux[1];
    const double weight = power(c.step, h.r) * power(c.aux[1], h.weight_lr_power);
    c.aux[0] += weight;
    const double mix = c.aux[0] > 0.0 ? weight / c.aux[0] : 0.0;
    r.step_size = float(lr);
    r.mix = float(mix);
    r.alpha1 = float(lr * (h.beta1 * (1.0 - mix) - 1.0));
    r.corr1 = float(root2);
    r.eps = float(h.eps * root2);
    r.wd = float(h.alpha);
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[1] = r.beta2 * s[1] + r.alpha2 * g * g;
    const float u = r.corr1 * g / (sqrtf(s[1]) + r.eps) + r.wd * p;
    const float y = p + r.mix * (s[0] - p) + r.alpha1 * u;
    s[0] = s[0] - r.step_size * u;
    return y;
  }
};

using RMSpropPlain = RMSprop<false, false>;
using RMSpropMomentum = RMSprop<false, true>;
using RMSpropCentered = RMSprop<true, false>;
using RMSpropCenteredMomentum = RMSprop<true, true>;

}  // namespace fa

#include "rules_adam.h"

// clang-format off
// The registry: CPU, CUDA and bindings iterate this list; a rule's number is its position. The name is the rule's name everywhere.
#define FA_RULES(X)                                                                                                              \
  X(sgd, SGD) X(sgd_momentum, SGDMomentum) X(sign_sgd, SignSGD) X(signum, Signum) X(lion, Lion) X(adagrad, Adagrad)              \
  X(rmsprop, RMSpropPlain) X(rmsprop_momentum, RMSpropMomentum) X(rmsprop_centered, RMSpropCentered)                             \
  X(rmsprop_centered_momentum, RMSpropCenteredMomentum) X(adadelta, Adadelta) X(adam, Adam) X(amsgrad, AMSGrad)                  \
  X(nadam, NAdam) X(radam, RAdam) X(adabelief, AdaBelief) X(adabelief_amsgrad, AdaBeliefAMSGrad) X(diffgrad, DiffGrad)           \
  X(exadam, EXAdam) X(ademamix, AdEMAMix) X(ademamix_slow, AdEMAMixSlow) X(adopt, ADOPT) X(grams, Grams)                         \
  X(sophia_g, SophiaG) X(adahessian, AdaHessian) X(schedule_free_adamw, ScheduleFreeAdamW)
// clang-format on

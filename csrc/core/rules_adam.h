// Rules with a first and a second moment. Both published placements of eps are one form, u = A m / (sqrt(v) + eps'):
//   E1 (torch)             (m / bc1) / (sqrt(v / bc2) + eps)         A = lr sqrt(bc2) / bc1, eps' = eps sqrt(bc2)
//   E2 (RAdam, diffGrad..) sqrt(bc2) / bc1 * m / (sqrt(v) + eps)     same A,                 eps' = eps
#pragma once
#include "numbers.h"

namespace fa {

struct Adam {
  static constexpr int kStates = 2, kStored = 2;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    const Correction k = correction(h, c);
    r.step_size = float(h.lr * k.root2 / k.bc1);
    r.eps = float(h.eps * k.root2);
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta1 * s[0] + r.alpha1 * g;
    s[1] = r.beta2 * s[1] + r.alpha2 * g * g;
    return p - r.step_size * s[0] / (sqrtf(s[1]) + r.eps);
  }
};

// The maximum is of the raw second moment, as torch's code (its older docstrings say otherwise).
struct AMSGrad {
  static constexpr int kStates = 3, kStored = 3;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) { Adam::row(h, c, r); }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta1 * s[0] + r.alpha1 * g;
    s[1] = r.beta2 * s[1] + r.alpha2 * g * g;
    s[2] = max_nan(s[1], s[2]);
    return p - r.step_size * s[0] / (sqrtf(s[2]) + r.eps);
  }
};

// aux[0]: product of the momentum schedule so far (torch's mu_product). 0.96^(t psi) = mu_base^t, mu_base = 0.96^psi from the host.
struct NAdam {
  static constexpr int kStates = 2, kStored = 2;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    const Correction k = correction(h, c);
    const double power = ipow(h.mu_base, c.step);
    const double mu = h.beta1 * (1.0 - 0.5 * power), mu_next = h.beta1 * (1.0 - 0.5 * power * h.mu_base);
    const double product = (c.aux[0] *= mu);
    r.mix = float(h.lr * (1.0 - mu) / (1.0 - product) * k.root2);
    r.step_size = float(h.lr * mu_next / (1.0 - product * mu_next) * k.root2);
    r.eps = float(h.eps * k.root2);
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta1 * s[0] + r.alpha1 * g;
    s[1] = r.beta2 * s[1] + r.alpha2 * g * g;
    return p - (r.mix * g + r.step_size * s[0]) / (sqrtf(s[1]) + r.eps);
  }
};

// Modes of the rectified rules: the variance is tractable (adaptive), or it is not yet (momentum step, or none).
constexpr float kNoStep = 0.f, kMomentumStep = 1.f, kAdaptive = 2.f, kAdaptiveMax = 3.f;

struct RAdam {
  static constexpr int kStates = 2, kStored = 2;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    const Correction k = correction(h, c);
    double rho;
    const double rect = rectification(h, c, k.bc2, &rho);
    r.mode = rho > 5.0 ? kAdaptive : kMomentumStep;
    r.step_size = float(h.lr / k.bc1 * (rho > 5.0 ? rect * k.root2 : 1.0));
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta1 * s[0] + r.alpha1 * g;
    s[1] = r.beta2 * s[1] + r.alpha2 * g * g;
    const float d = r.mode == kAdaptive ? sqrtf(s[1]) + r.eps : 1.f;
    return p - r.step_size * s[0] / d;
  }
};

// AdaBelief (arXiv 2010.07468), semantics of the official 0.2.1: eps is added to the *stored* variance each step and, unrectified,
// again outside the root; the threshold is rho >= 5; rectified, amsgrad only stores its maximum.
// The surprise g - m_new is beta1 * (g - m_old): that form keeps full precision where the difference would cancel.
struct AdaBelief {
  static constexpr int kStates = 2, kStored = 2;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    const Correction k = correction(h, c);
    r.eps_state = float(h.eps);
    if (h.rectify == 0.0) {
      r.mode = h.amsgrad != 0.0 ? kAdaptiveMax : kAdaptive;
      r.step_size = float(h.lr * k.root2 / k.bc1);
      r.eps = float(h.eps * k.root2);
      return;
    }
    double rho;
    const double rect = rectification(h, c, k.bc2, &rho);
    r.mode = rho >= 5.0 ? kAdaptive : h.degenerated != 0.0 ? kMomentumStep : kNoStep;
    r.step_size = float(h.lr / k.bc1 * (rho >= 5.0 ? rect * k.root2 : 1.0));
  }
  static FA_HD float apply(float p, const float* s, float variance, const Row& r) {
    const float d = r.mode >= kAdaptive ? sqrtf(variance) + r.eps : 1.f;
    const float moved = p - r.step_size * s[0] / d;
    return r.mode == kNoStep ? p : moved;
  }
  static FA_HD void moments(float g, float* s, const Row& r) {
    const float surprise = r.beta1 * (g - s[0]);
    s[0] = r.beta1 * s[0] + r.alpha1 * g;
    s[1] = r.beta2 * s[1] + r.alpha2 * surprise * surprise + r.eps_state;
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    moments(g, s, r);
    return apply(p, s, s[1], r);
  }
};

struct AdaBeliefAMSGrad {
  static constexpr int kStates = 3, kStored = 3;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) { AdaBelief::row(h, c, r); }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    AdaBelief::moments(g, s, r);
    s[2] = max_nan(s[1], s[2]);
    return AdaBelief::apply(p, s, r.mode == kAdaptiveMax ? s[2] : s[1], r);
  }
};

// diffGrad v2 (arXiv 1909.11015): E2, scaled by the sigmoid of how much the gradient changed. Third state: the previous gradient.
struct DiffGrad {
  static constexpr int kStates = 3, kStored = 3;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    const Correction k = correction(h, c);
    r.step_size = float(h.lr * k.root2 / k.bc1);
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta1 * s[0] + r.alpha1 * g;
    s[1] = r.beta2 * s[1] + r.alpha2 * g * g;
    const float friction = 1.f / (1.f + exp_neg(-fabsf(s[2] - g)));
    s[2] = g;
    return p - r.step_size * (s[0] * friction) / (sqrtf(s[1]) + r.eps);
  }
};

// EXAdam (arXiv 2412.20302), the official code's constant learning rate.
struct EXAdam {
  static constexpr int kStates = 2, kStored = 2;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    r.pow1 = float(ipow(h.beta1, c.step));
    r.pow2 = float(ipow(h.beta2, c.step));
    const Correction k = correction(h, c);
    r.corr1 = float(1.0 / k.bc1);
    r.corr2 = float(1.0 / k.bc2);
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta1 * s[0] + r.alpha1 * g;
    s[1] = r.beta2 * s[1] + r.alpha2 * g * g;
    const float m2 = s[0] * s[0];
    const float d1 = 1.f + s[1] / (s[1] + r.eps) * r.pow2;
    const float d2 = 1.f + m2 / (m2 + r.eps) * r.pow1;
    return p - r.step_size * ((s[0] + g) * r.corr1 * d1) / (sqrtf(s[1] * r.corr2 * d2) + r.eps);
  }
};

// AdEMAMix (arXiv 2409.03137): a second, slow momentum without bias correction. States: fast, slow, square.
struct AdEMAMix {
  static constexpr int kStates = 3, kStored = 3;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    const Correction k = correction(h, c);
    const bool alpha_warm = h.alpha_warmup > 0.0 && c.step < h.alpha_warmup, beta3_warm = h.beta3_warmup > 0.0 && c.step < h.beta3_warmup;
    // beta3 is interpolated in half-life: half(b) = ln .5 / ln b - 1 comes from the host, 2^(-1/(t+1)) inverts it.
    const double a = beta3_warm ? c.step / h.beta3_warmup : 1.0;
    const double beta3 = beta3_warm ? exp2_neg(1.0 / ((1.0 - a) * h.half1 + a * h.half3 + 1.0)) : h.beta3;
    r.beta3 = float(beta3);
    r.alpha3 = float(1.0 - beta3);
    r.mix = float(alpha_warm ? h.alpha * c.step / h.alpha_warmup : h.alpha);
    r.corr1 = float(1.0 / k.bc1);
    r.step_size = float(h.lr * k.root2);
    r.eps = float(h.eps * k.root2);
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta1 * s[0] + r.alpha1 * g;
    s[1] = r.beta3 * s[1] + r.alpha3 * g;
    s[2] = r.beta2 * s[2] + r.alpha2 * g * g;
    return p - r.step_size * (s[0] * r.corr1 + r.mix * s[1]) / (sqrtf(s[2]) + r.eps);
  }
};

// beta1 = 0: the fast momentum is the gradient and is not stored.
struct AdEMAMixSlow {
  static constexpr int kStates = 2, kStored = 2;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) { AdEMAMix::row(h, c, r); }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta3 * s[0] + r.alpha3 * g;
    s[1] = r.beta2 * s[1] + r.alpha2 * g * g;
    return p - r.step_size * (g + r.mix * s[0]) / (sqrtf(s[1]) + r.eps);
  }
};

// ADOPT (arXiv 2411.02853): normalises by the *previous* second moment. The first call only fills it (no decay, no move).
struct ADOPT {
  static constexpr int kStates = 2, kStored = 2;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    const bool first = c.step == 1.0;
    r.mode = first ? kNoStep : kAdaptive;
    if (first) r.decay = 1.f, r.pull = 0.f;
    // clip: bound given by the host; 0 = the default k^(1/4), k = earlier calls
    r.clip = float(h.clip > 0.0 ? h.clip : sqrt(sqrt(c.step - 1.0)));
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    const bool first = r.mode == kNoStep;
    const float root = sqrtf(s[1]), n = g / (root < r.eps ? r.eps : root);
    const float clipped = n > r.clip ? r.clip : n < -r.clip ? -r.clip : n;
    const float m = r.beta1 * s[0] + r.alpha1 * clipped;
    s[0] = first ? s[0] : m;
    s[1] = first ? g * g : r.beta2 * s[1] + r.alpha2 * g * g;
    return first ? p : p - r.step_size * m;
  }
};

// Grams (arXiv 2412.17107): the gradient's sign, Adam's magnitude (E2).
struct Grams {
  static constexpr int kStates = 2, kStored = 2;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) { DiffGrad::row(h, c, r); }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta1 * s[0] + r.alpha1 * g;
    s[1] = r.beta2 * s[1] + r.alpha2 * g * g;
    return p - r.step_size * (sign_of(g) * fabsf(s[0])) / (sqrtf(s[1]) + r.eps);
  }
};

// AdaHessian (arXiv 2006.00719), apply step. States: m, squared Hessian diagonal; read only: this step's diagonal estimate.
struct AdaHessian {
  static constexpr int kStates = 3, kStored = 2;
  static FA_HD void row(const Hyper& h, Clock& c, Row& r) {
    common_row(h, c, r);
    const Correction k = correction(h, c);
    const double scale = power(k.root2, h.power);
    r.mode = h.power == 1.0 ? 0.f : 1.f;
    r.pow1 = float(h.power);
    r.step_size = float(h.lr * scale / k.bc1);
    r.eps = float(h.eps * scale);
  }
  static FA_HD float step(float p, float g, float* s, const Row& r) {
    s[0] = r.beta1 * s[0] + r.alpha1 * g;
    s[1] = r.beta2 * s[1] + r.alpha2 * s[2] * s[2];
    const float root = sqrtf(s[1]);
    return p - r.step_size * s[0] / ((r.mode != 0.f ? powf(root, r.pow1) : root) + r.eps);
  }
};

}  // namespace fa

// Small helpers of the rules. Row functions use only + - * / and sqrt (exact in IEEE double), so host and device agree on every bit (but for `power`).
#pragma once
#include <cmath>

#include "dtypes.h"
#include "macros.h"
#include "table.h"

namespace fa {

// b^n by repeated squaring: libm's pow differs between host and device.
FA_HD double ipow(double b, double n) {
  double out = 1.0;
  for (int64_t k = int64_t(n); k > 0; k >>= 1) {
    if (k & 1) out *= b;
    b *= b;
  }
  return out;
}

// x^y, exactly as every device computes it where y is a multiple of one half; other exponents have the last bit of the library there.
FA_HD double power(double x, double y) {
  const double whole = floor(y), rest = y - whole;
  if (!(whole >= 0.0 && whole <= 64.0 && (rest == 0.0 || rest == 0.5))) return pow(x, y);
  return rest == 0.0 ? ipow(x, whole) : ipow(x, whole) * sqrt(x);
}

// 2^-y: its whole part by halving, the rest by the Taylor series of exp(-y ln 2), whose first 22 terms are within half an ulp of double below 1.
FA_HD double exp2_neg(double y) {
  const double whole = y < 1.0 ? 0.0 : floor(y), x = -(y - whole) * 0.693147180559945309417232121458;
  double term = 1.0, sum = 1.0;
  for (int k = 1; k <= 22; ++k) {
    term *= x / k;
    sum += term;
  }
  return ipow(0.5, whole) * sum;
}

// e^x of x <= 0 within 1 ulp, 0 below -87: products and sums alone, which every device rounds alike and compilers turn into vectors.
FA_HD float exp_neg(float x) {
  const int n = int((x >= -87.f ? x : -87.f) * 1.44269504f - 0.5f);
  // ln 2 in two parts, the first with so few bits that n times it is exact; a NaN goes this way
  const float r = (x - float(n) * 0.693359375f) - float(n) * -2.12194440e-4f;
  float e = float(1.0 / 5040.0);
  e = e * r + float(1.0 / 720.0);
  e = e * r + float(1.0 / 120.0);
  e = e * r + float(1.0 / 24.0);
  e = e * r + float(1.0 / 6.0);
  e = e * r + 0.5f;
  e = (e * (r * r) + r) + 1.f;
  e *= as_float(uint32_t(n + 127) << 23);
  return x < -87.f ? 0.f : e;
}

FA_HD float sign_of(float x) { return float(x > 0.f) - float(x < 0.f); }  // sign(0) = 0, sign(NaN) = 0, as torch
FA_HD float max_nan(float a, float b) { return a >= b || a != a ? a : b; }  // maximum that keeps a NaN of either side

// What every row shares: weight decay, maximize.
FA_HD void common_row(const Hyper& h, const Clock& c, Row& r) {
  r = Row{};
  r.sign = float(h.sign);
  r.l2 = float(h.l2);
  r.decay = float(1.0 - h.lr * h.decoupled - h.fixed);
  r.pull = float(h.lr * h.decoupled + h.fixed);
  r.step = float(c.step);
  r.step_size = float(h.lr);
  r.beta1 = float(h.beta1);
  r.alpha1 = float(1.0 - h.beta1);
  r.beta2 = float(h.beta2);
  r.alpha2 = float(1.0 - h.beta2);
  r.eps = float(h.eps);
}

struct Correction {
  double bc1, bc2, root2;
};
FA_HD Correction correction(const Hyper& h, const Clock& c) {
  const double bc2 = 1.0 - ipow(h.beta2, c.step);
  return {1.0 - ipow(h.beta1, c.step), bc2, sqrt(bc2)};
}

// RAdam's and AdaBelief's variance rectification; rho is returned so that each can apply its own threshold.
FA_HD double rectification(const Hyper& h, const Clock& c, double bc2, double* rho) {
  const double rho_inf = 2.0 / (1.0 - h.beta2) - 1.0;
  *rho = rho_inf - 2.0 * c.step * ipow(h.beta2, c.step) / bc2;
  return sqrt(((*rho - 4.0) * (*rho - 2.0) * rho_inf) / ((rho_inf - 4.0) * (rho_inf - 2.0) * *rho));
}

}  // namespace fa

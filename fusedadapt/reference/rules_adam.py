"""Rules with a first and a second moment (see csrc/core/rules_adam.h for the two placements of eps)."""

from __future__ import annotations

from torch import where

from .rules import (
    ADAPTIVE,
    ADAPTIVE_MAX,
    MOMENTUM_STEP,
    NO_STEP,
    common_row,
    correction,
    exp2_neg,
    exp_neg,
    ipow,
    max_nan,
    moments,
    power,
    rectification,
    rule,
    sqrt,
)


def adam_row(h, c):
    r, (bc1, _, root2) = common_row(h, c), correction(h, c)
    r.step_size, r.eps = h.lr * root2 / bc1, h.eps * root2
    return r


@rule("adam", adam_row)
def adam(p, g, s, r):
    moments(g, s, r)
    return p - r.step_size * s[0] / (sqrt(s[1]) + r.eps)


@rule("amsgrad", adam_row)
def amsgrad(p, g, s, r):
    moments(g, s, r)
    s[2] = max_nan(s[1], s[2])
    return p - r.step_size * s[0] / (sqrt(s[2]) + r.eps)


def nadam_row(h, c):
    r, (_, _, root2) = common_row(h, c), correction(h, c)
    power = ipow(h.mu_base, c.step)
    mu, mu_next = h.beta1 * (1.0 - 0.5 * power), h.beta1 * (1.0 - 0.5 * power * h.mu_base)
    c.aux[0] = product = c.aux[0] * mu
    r.mix = h.lr * (1.0 - mu) / (1.0 - product) * root2
    r.step_size = h.lr * mu_next / (1.0 - product * mu_next) * root2
    r.eps = h.eps * root2
    return r


@rule("nadam", nadam_row)
def nadam(p, g, s, r):
    moments(g, s, r)
    return p - (r.mix * g + r.step_size * s[0]) / (sqrt(s[1]) + r.eps)


def radam_row(h, c):
    r, (bc1, bc2, root2) = common_row(h, c), correction(h, c)
    rho, rect = rectification(h, c, bc2)
    r.mode = where(rho > 5.0, ADAPTIVE, MOMENTUM_STEP)
    r.step_size = h.lr / bc1 * where(rho > 5.0, rect * root2, 1.0)
    return r


@rule("radam", radam_row)
def radam(p, g, s, r):
    moments(g, s, r)
    return p - r.step_size * s[0] / (sqrt(s[1]) + r.eps if r.mode == ADAPTIVE else 1.0)


def adabelief_row(h, c):
    r, (bc1, bc2, root2) = common_row(h, c), correction(h, c)
    rho, rect = rectification(h, c, bc2)
    plain = h.rectify == 0
    rectified = where(rho >= 5.0, ADAPTIVE, where(h.degenerated != 0, MOMENTUM_STEP, NO_STEP))
    r.mode = where(plain, where(h.amsgrad != 0, ADAPTIVE_MAX, ADAPTIVE), rectified)
    r.step_size = where(plain, h.lr * root2 / bc1, h.lr / bc1 * where(rho >= 5.0, rect * root2, 1.0))
    r.eps_state, r.eps = h.eps, where(plain, h.eps * root2, h.eps)
    return r


def _adabelief(p, g, s, r, amsgrad: bool):
    surprise = r.beta1 * (g - s[0])
    s[0] = r.beta1 * s[0] + r.alpha1 * g
    s[1] = r.beta2 * s[1] + r.alpha2 * surprise * surprise + r.eps_state
    if amsgrad:
        s[2] = max_nan(s[1], s[2])
    if r.mode == NO_STEP:
        return p
    variance = s[2] if r.mode == ADAPTIVE_MAX else s[1]
    return p - r.step_size * s[0] / (sqrt(variance) + r.eps if r.mode >= ADAPTIVE else 1.0)


@rule("adabelief", adabelief_row)
def adabelief(p, g, s, r):
    return _adabelief(p, g, s, r, amsgrad=False)


@rule("adabelief_amsgrad", adabelief_row)
def adabelief_amsgrad(p, g, s, r):
    return _adabelief(p, g, s, r, amsgrad=True)


def e2_row(h, c):
    r, (bc1, _, root2) = common_row(h, c), correction(h, c)
    r.step_size = h.lr * root2 / bc1
    return r


@rule("diffgrad", e2_row)
def diffgrad(p, g, s, r):
    moments(g, s, r)
    friction = 1.0 / (1.0 + exp_neg(-(s[2] - g).abs()))
    s[2] = g
    return p - r.step_size * (s[0] * friction) / (sqrt(s[1]) + r.eps)


@rule("grams", e2_row)
def grams(p, g, s, r):
    moments(g, s, r)
    return p - r.step_size * (g.sign() * s[0].abs()) / (sqrt(s[1]) + r.eps)


def exadam_row(h, c):
    r, (bc1, bc2, _) = common_row(h, c), correction(h, c)
    r.pow1, r.pow2, r.corr1, r.corr2 = ipow(h.beta1, c.step), ipow(h.beta2, c.step), 1.0 / bc1, 1.0 / bc2
    return r


@rule("exadam", exadam_row)
def exadam(p, g, s, r):
    moments(g, s, r)
    m2 = s[0] * s[0]
    d1 = 1.0 + s[1] / (s[1] + r.eps) * r.pow2
    d2 = 1.0 + m2 / (m2 + r.eps) * r.pow1
    return p - r.step_size * ((s[0] + g) * r.corr1 * d1) / (sqrt(s[1] * r.corr2 * d2) + r.eps)


def ademamix_row(h, c):
    r, (bc1, _, root2) = common_row(h, c), correction(h, c)
    alpha_warm, beta3_warm = c.step < h.alpha_warmup, c.step < h.beta3_warmup
    a = where(beta3_warm, c.step / h.beta3_warmup, 1.0)
    beta3 = where(beta3_warm, exp2_neg(1.0 / ((1.0 - a) * h.half1 + a * h.half3 + 1.0)), h.beta3)
    r.beta3, r.alpha3 = beta3, 1.0 - beta3
    r.mix = where(alpha_warm, h.alpha * c.step / h.alpha_warmup, h.alpha)
    r.corr1, r.step_size, r.eps = 1.0 / bc1, h.lr * root2, h.eps * root2
    return r


@rule("ademamix", ademamix_row)
def ademamix(p, g, s, r):
    s[0] = r.beta1 * s[0] + r.alpha1 * g
    s[1] = r.beta3 * s[1] + r.alpha3 * g
    s[2] = r.beta2 * s[2] + r.alpha2 * g * g
    return p - r.step_size * (s[0] * r.corr1 + r.mix * s[1]) / (sqrt(s[2]) + r.eps)


@rule("ademamix_slow", ademamix_row)
def ademamix_slow(p, g, s, r):
    s[0] = r.beta3 * s[0] + r.alpha3 * g
    s[1] = r.beta2 * s[1] + r.alpha2 * g * g
    return p - r.step_size * (g + r.mix * s[0]) / (sqrt(s[1]) + r.eps)


def adopt_row(h, c):
    r, first = common_row(h, c), c.step == 1.0
    r.mode, r.decay, r.pull = where(first, NO_STEP, ADAPTIVE), where(first, 1.0, r.decay), where(first, 0.0, r.pull)
    r.clip = where(h.clip > 0, h.clip, sqrt(sqrt(c.step - 1.0)))
    return r


@rule("adopt", adopt_row)
def adopt(p, g, s, r):
    if r.mode == NO_STEP:
        s[1] = g * g
        return p
    root = sqrt(s[1])
    n = g / where(root < r.eps, r.eps, root)
    n = where(n > r.clip, r.clip, where(n < -r.clip, -r.clip, n))
    s[0] = r.beta1 * s[0] + r.alpha1 * n
    s[1] = r.beta2 * s[1] + r.alpha2 * g * g
    return p - r.step_size * s[0]


def adahessian_row(h, c):
    r, (bc1, _, root2) = common_row(h, c), correction(h, c)
    scale = power(root2, h.power)
    r.mode, r.pow1 = where(h.power == 1, 0.0, 1.0), h.power
    r.step_size, r.eps = h.lr * scale / bc1, h.eps * scale
    return r


@rule("adahessian", adahessian_row)
def adahessian(p, g, s, r):
    s[0] = r.beta1 * s[0] + r.alpha1 * g
    s[1] = r.beta2 * s[1] + r.alpha2 * s[2] * s[2]
    root = sqrt(s[1])
    return p - r.step_size * s[0] / ((root**r.pow1 if r.mode else root) + r.eps)

"""Update rules in pure PyTorch, the text that C++, CUDA and Triton are held against.

A rule is two functions. ``row(h, c)`` computes the scalars of one step in fp64 from hyper-parameters ``h`` and the clock ``c`` (``c.step`` counts
from 1; ``c.aux`` are scalars carried along) — every value is an fp64 tensor, so the same text serves one group or thousands at once.
``step(p, g, s, r)`` updates elements: ``p`` decayed parameter, ``g`` final gradient, ``s`` list of states (replaced in place), and returns the new p.
In fp32 the results equal the other backends bit for bit (rules with exp or pow: within 2 ulp), in fp64 they are the published equations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace as Row

import numpy as np
import torch
from torch import Tensor, where

NO_STEP, MOMENTUM_STEP, ADAPTIVE, ADAPTIVE_MAX = 0.0, 1.0, 2.0, 3.0


StepFunction = Callable[[Tensor, Tensor, list[Tensor], Row], Tensor]


@dataclass(frozen=True)
class Rule:
    name: str
    row: Callable[[Row, Row], Row]
    step: StepFunction


RULES: dict[str, Rule] = {}


def rule(name: str, row: Callable[[Row, Row], Row]) -> Callable[[StepFunction], StepFunction]:
    def register(step: StepFunction) -> StepFunction:
        RULES[name] = Rule(name, row, step)
        return step

    return register


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded root: torch's on a CPU may come from a vector library that is an ulp off, in fp64 (1.4 % of them) as in fp32."""
    wide = x if x.dtype == torch.float64 else x.double()
    if wide.device.type != "cpu":
        return wide.sqrt().to(x.dtype)
    with np.errstate(invalid="ignore"):
        return torch.as_tensor(np.sqrt(wide.numpy())).to(x.dtype)


def ipow(b: Tensor, n: Tensor, bits: int = 25) -> Tensor:
    """b^n for whole n < 2^bits (fp32 step counters end at 2^24) by repeated squaring, the order of multiplications csrc/core/numbers.h uses."""
    b, out, n = torch.as_tensor(b, dtype=torch.float64, device=n.device), torch.ones_like(n), n.to(torch.int64)
    for _ in range(bits):
        out = where(n % 2 == 1, out * b, out)
        b, n = b * b, n // 2
    return out


def power(x: Tensor, y: Tensor) -> Tensor:
    """x^y, as every device computes it where y is a multiple of one half (csrc/core/numbers.h); other exponents have the library's last bit."""
    whole = torch.floor(y)
    rest = y - whole
    exact = ipow(x, whole, 7) * where(rest == 0, 1.0, sqrt(x))
    return where((whole >= 0) & (whole <= 64) & ((rest == 0) | (rest == 0.5)), exact, x**y)


def exp2_neg(y: Tensor) -> Tensor:
    whole = where(y < 1.0, 0.0, torch.floor(y))
    x = -(y - whole) * math.log(2.0)
    term, total = torch.ones_like(x), torch.ones_like(x)
    for k in range(1, 23):
        term = term * (x / k)
        total = total + term
    return ipow(torch.full_like(y, 0.5), whole, 7) * total


def exp_neg(x: Tensor) -> Tensor:
    """e^x of x <= 0. In fp32 by products and sums alone, which every device rounds alike: within 1 ulp, 0 below -87."""
    if x.dtype != torch.float32:
        return torch.exp(x)
    y = where(x >= -87.0, x, -87.0)
    n = (y * 1.44269504 - 0.5).trunc()
    r = (y - n * 0.693359375) - n * -2.12194440e-4
    e = torch.full_like(r, 1.0 / 5040.0)
    for factor in (720.0, 120.0, 24.0, 6.0):
        e = e * r + 1.0 / factor
    e = ((e * r + 0.5) * (r * r) + r) + 1.0
    power = e * ((n.int() + 127) << 23).view(torch.float32)
    return where(x < -87.0, 0.0, where(x.isnan(), x, power))


def max_nan(a: Tensor, b: Tensor) -> Tensor:
    return where((a >= b) | a.isnan(), a, b)


def common_row(h: Row, c: Row) -> Row:
    return Row(
        sign=h.sign, l2=h.l2, decay=1.0 - h.lr * h.decoupled - h.fixed, pull=h.lr * h.decoupled + h.fixed, step=c.step, step_size=h.lr,
        eps=h.eps, mode=torch.zeros_like(h.lr), beta1=h.beta1, alpha1=1.0 - h.beta1, beta2=h.beta2, alpha2=1.0 - h.beta2,
    )  # fmt: skip


def correction(h: Row, c: Row) -> tuple[Tensor, Tensor, Tensor]:
    bc2 = 1.0 - ipow(h.beta2, c.step)
    return 1.0 - ipow(h.beta1, c.step), bc2, sqrt(bc2)


def rectification(h: Row, c: Row, bc2: Tensor) -> tuple[Tensor, Tensor]:
    rho_inf = 2.0 / (1.0 - h.beta2) - 1.0
    rho = rho_inf - 2.0 * c.step * ipow(h.beta2, c.step) / bc2
    return rho, sqrt(((rho - 4.0) * (rho - 2.0) * rho_inf) / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))


def moments(g: Tensor, s: list[Tensor], r: Row, m: int = 0, v: int = 1) -> None:
    s[m] = r.beta1 * s[m] + r.alpha1 * g
    s[v] = r.beta2 * s[v] + r.alpha2 * g * g


@rule("sgd", common_row)
def sgd(p, g, s, r):
    return p - r.step_size * g


def sgd_momentum_row(h, c):
    r, first = common_row(h, c), c.step == 1.0
    r.beta1, r.alpha1 = where(first, 0.0, h.momentum), where(first, 1.0, 1.0 - h.dampening)
    r.mix, r.mode = h.momentum, h.nesterov
    return r


@rule("sgd_momentum", sgd_momentum_row)
def sgd_momentum(p, g, s, r):
    s[0] = r.beta1 * s[0] + r.alpha1 * g
    return p - r.step_size * (g + r.mix * s[0] if r.mode else s[0])


@rule("sign_sgd", common_row)
def sign_sgd(p, g, s, r):
    return p - r.step_size * g.sign()


def signum_row(h, c):
    r = common_row(h, c)
    r.beta1, r.alpha1 = h.momentum, 1.0 - h.momentum
    return r


@rule("signum", signum_row)
def signum(p, g, s, r):
    s[0] = r.beta1 * s[0] + r.alpha1 * g
    return p - r.step_size * s[0].sign()


@rule("lion", common_row)
def lion(p, g, s, r):
    direction = r.beta1 * s[0] + r.alpha1 * g
    s[0] = r.beta2 * s[0] + r.alpha2 * g
    return p - r.step_size * direction.sign()


def adagrad_row(h, c):
    r = common_row(h, c)
    r.step_size = h.lr / (1.0 + (c.step - 1.0) * h.lr_decay)
    return r


@rule("adagrad", adagrad_row)
def adagrad(p, g, s, r):
    s[0] = s[0] + g * g
    return p - r.step_size * g / (sqrt(s[0]) + r.eps)


def rmsprop_row(h, c):
    r = common_row(h, c)
    r.beta1 = h.momentum
    return r


def _rmsprop(centered: bool, momentum: bool):
    def step(p, g, s, r):
        s[0] = r.beta2 * s[0] + r.alpha2 * g * g
        q = s[0]
        if centered:
            s[1] = r.beta2 * s[1] + r.alpha2 * g
            q = s[0] - s[1] * s[1]
            q = where(q < 0, 0.0, q)
        u = g / (sqrt(q) + r.eps)
        if not momentum:
            return p - r.step_size * u
        s[-1] = r.beta1 * s[-1] + u
        return p - r.step_size * s[-1]

    return step


for _centered in (False, True):
    for _momentum in (False, True):
        rule("rmsprop" + "_centered" * _centered + "_momentum" * _momentum, rmsprop_row)(_rmsprop(_centered, _momentum))


@rule("adadelta", common_row)
def adadelta(p, g, s, r):
    s[0] = r.beta2 * s[0] + r.alpha2 * g * g
    u = sqrt(s[1] + r.eps) / sqrt(s[0] + r.eps) * g
    s[1] = r.beta2 * s[1] + r.alpha2 * u * u
    return p - r.step_size * u


def sophia_row(h, c):
    r = common_row(h, c)
    r.mix, r.eps = h.rho, torch.full_like(h.rho, 1e-15)
    return r


@rule("sophia_g", sophia_row)
def sophia_g(p, g, s, r):
    s[0] = r.beta1 * s[0] + r.alpha1 * g
    ratio = s[0].abs() / (r.mix * s[1] + r.eps)
    return p - r.step_size * s[0].sign() * where(ratio > 1, 1.0, ratio)


def schedule_free_row(h, c):
    r = common_row(h, c)
    warm = where(c.step < h.warmup, c.step / h.warmup, 1.0)
    lr, root2 = h.lr * warm, sqrt(1.0 - ipow(h.beta2, c.step))
    c.aux[1] = torch.maximum(lr, c.aux[1])
    weight = power(c.step, h.r) * power(c.aux[1], h.weight_lr_power)
    c.aux[0] = c.aux[0] + weight
    mix = where(c.aux[0] > 0, weight / c.aux[0], 0.0)
    r.step_size, r.mix, r.alpha1 = lr, mix, lr * (h.beta1 * (1.0 - mix) - 1.0)
    r.corr1, r.eps, r.wd = root2, h.eps * root2, h.alpha
    return r


@rule("schedule_free_adamw", schedule_free_row)
def schedule_free_adamw(p, g, s, r):
    s[1] = r.beta2 * s[1] + r.alpha2 * g * g
    u = r.corr1 * g / (sqrt(s[1]) + r.eps) + r.wd * p
    y = p + r.mix * (s[0] - p) + r.alpha1 * u
    s[0] = s[0] - r.step_size * u
    return y


from . import rules_adam  # noqa: E402, F401  (registers the Adam family)

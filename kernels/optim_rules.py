"""Update rules: one element, one step. The same names and lines stand in csrc/core/rules*.h, which says where each comes from.

`rule(p, g, s0, s1, s2, s3, row) -> p, s0, s1, s2, s3`, all fp32: p is the decayed parameter, g the final gradient (unscaled, clipped,
maximize and L2 applied). The order of the operations is part of the definition: other backends produce the same bits.
`tl.div_rn` and `tl.sqrt_rn` are IEEE; Triton's `/` and `tl.sqrt` are not.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import (
    ALPHA1,
    ALPHA2,
    ALPHA3,
    BETA1,
    BETA2,
    BETA3,
    CLIP,
    CORR1,
    CORR2,
    EPS,
    EPS_STATE,
    MIX,
    MODE,
    POW1,
    POW2,
    STEP_SIZE,
    WD,
    exp_neg,
    max_nan,
    pow_f32,
    sign_of,
)

# Values of row[MODE] for the rectified rules.
NO_STEP, MOMENTUM_STEP, ADAPTIVE, ADAPTIVE_MAX = (tl.constexpr(float(mode)) for mode in range(4))


@triton.jit
def first_moment(m, g, row):
    return row[BETA1] * m + row[ALPHA1] * g


@triton.jit
def second_moment(v, g, row):
    return row[BETA2] * v + row[ALPHA2] * g * g


@triton.jit
def sgd(p, g, s0, s1, s2, s3, row):
    return p - row[STEP_SIZE] * g, s0, s1, s2, s3


@triton.jit
def sgd_momentum(p, g, s0, s1, s2, s3, row):
    s0 = first_moment(s0, g, row)
    u = s0
    if row[MODE] != 0.0:
        u = g + row[MIX] * s0
    return p - row[STEP_SIZE] * u, s0, s1, s2, s3


@triton.jit
def sign_sgd(p, g, s0, s1, s2, s3, row):
    return p - row[STEP_SIZE] * sign_of(g), s0, s1, s2, s3


@triton.jit
def signum(p, g, s0, s1, s2, s3, row):
    s0 = first_moment(s0, g, row)
    return p - row[STEP_SIZE] * sign_of(s0), s0, s1, s2, s3


@triton.jit
def lion(p, g, s0, s1, s2, s3, row):
    direction = row[BETA1] * s0 + row[ALPHA1] * g
    return p - row[STEP_SIZE] * sign_of(direction), row[BETA2] * s0 + row[ALPHA2] * g, s1, s2, s3


@triton.jit
def adagrad(p, g, s0, s1, s2, s3, row):
    s0 = s0 + g * g
    return p - tl.div_rn(row[STEP_SIZE] * g, tl.sqrt_rn(s0) + row[EPS]), s0, s1, s2, s3


@triton.jit
def centered_moments(s0, s1, g, row):
    s0 = second_moment(s0, g, row)
    s1 = row[BETA2] * s1 + row[ALPHA2] * g
    q = s0 - s1 * s1
    return s0, s1, tl.where(q < 0.0, 0.0, q)


@triton.jit
def rmsprop(p, g, s0, s1, s2, s3, row):
    s0 = second_moment(s0, g, row)
    u = tl.div_rn(g, tl.sqrt_rn(s0) + row[EPS])
    return p - row[STEP_SIZE] * u, s0, s1, s2, s3


@triton.jit
def rmsprop_momentum(p, g, s0, s1, s2, s3, row):
    s0 = second_moment(s0, g, row)
    s1 = row[BETA1] * s1 + tl.div_rn(g, tl.sqrt_rn(s0) + row[EPS])
    return p - row[STEP_SIZE] * s1, s0, s1, s2, s3


@triton.jit
def rmsprop_centered(p, g, s0, s1, s2, s3, row):
    s0, s1, q = centered_moments(s0, s1, g, row)
    u = tl.div_rn(g, tl.sqrt_rn(q) + row[EPS])
    return p - row[STEP_SIZE] * u, s0, s1, s2, s3


@triton.jit
def rmsprop_centered_momentum(p, g, s0, s1, s2, s3, row):
    s0, s1, q = centered_moments(s0, s1, g, row)
    s2 = row[BETA1] * s2 + tl.div_rn(g, tl.sqrt_rn(q) + row[EPS])
    return p - row[STEP_SIZE] * s2, s0, s1, s2, s3


@triton.jit
def adadelta(p, g, s0, s1, s2, s3, row):
    s0 = second_moment(s0, g, row)
    u = tl.div_rn(tl.sqrt_rn(s1 + row[EPS]), tl.sqrt_rn(s0 + row[EPS])) * g
    s1 = row[BETA2] * s1 + row[ALPHA2] * u * u
    return p - row[STEP_SIZE] * u, s0, s1, s2, s3


@triton.jit
def adam(p, g, s0, s1, s2, s3, row):
    s0 = first_moment(s0, g, row)
    s1 = second_moment(s1, g, row)
    return p - tl.div_rn(row[STEP_SIZE] * s0, tl.sqrt_rn(s1) + row[EPS]), s0, s1, s2, s3


@triton.jit
def amsgrad(p, g, s0, s1, s2, s3, row):
    s0 = first_moment(s0, g, row)
    s1 = second_moment(s1, g, row)
    s2 = max_nan(s1, s2)
    return p - tl.div_rn(row[STEP_SIZE] * s0, tl.sqrt_rn(s2) + row[EPS]), s0, s1, s2, s3


@triton.jit
def nadam(p, g, s0, s1, s2, s3, row):
    s0 = first_moment(s0, g, row)
    s1 = second_moment(s1, g, row)
    return p - tl.div_rn(row[MIX] * g + row[STEP_SIZE] * s0, tl.sqrt_rn(s1) + row[EPS]), s0, s1, s2, s3


@triton.jit
def radam(p, g, s0, s1, s2, s3, row):
    s0 = first_moment(s0, g, row)
    s1 = second_moment(s1, g, row)
    u = row[STEP_SIZE] * s0
    if row[MODE] == ADAPTIVE:
        u = tl.div_rn(u, tl.sqrt_rn(s1) + row[EPS])
    return p - u, s0, s1, s2, s3


@triton.jit
def belief_moments(s0, s1, g, row):
    surprise = row[BETA1] * (g - s0)
    s1 = second_moment(s1, surprise, row) + row[EPS_STATE]
    return first_moment(s0, g, row), s1


@triton.jit
def belief_apply(p, s0, variance, row):
    u = row[STEP_SIZE] * s0
    if row[MODE] >= ADAPTIVE:
        u = tl.div_rn(u, tl.sqrt_rn(variance) + row[EPS])
    return tl.where(row[MODE] == NO_STEP, p, p - u)


@triton.jit
def adabelief(p, g, s0, s1, s2, s3, row):
    s0, s1 = belief_moments(s0, s1, g, row)
    return belief_apply(p, s0, s1, row), s0, s1, s2, s3


@triton.jit
def adabelief_amsgrad(p, g, s0, s1, s2, s3, row):
    s0, s1 = belief_moments(s0, s1, g, row)
    s2 = max_nan(s1, s2)
    return belief_apply(p, s0, tl.where(row[MODE] == ADAPTIVE_MAX, s2, s1), row), s0, s1, s2, s3


@triton.jit
def diffgrad(p, g, s0, s1, s2, s3, row):
    s0 = first_moment(s0, g, row)
    s1 = second_moment(s1, g, row)
    friction = tl.div_rn(tl.full(g.shape, 1.0, tl.float32), 1.0 + exp_neg(-tl.abs(s2 - g)))
    return p - tl.div_rn(row[STEP_SIZE] * (s0 * friction), tl.sqrt_rn(s1) + row[EPS]), s0, s1, g, s3


@triton.jit
def exadam(p, g, s0, s1, s2, s3, row):
    s0 = first_moment(s0, g, row)
    s1 = second_moment(s1, g, row)
    m2 = s0 * s0
    d1 = 1.0 + tl.div_rn(s1, s1 + row[EPS]) * row[POW2]
    d2 = 1.0 + tl.div_rn(m2, m2 + row[EPS]) * row[POW1]
    u = tl.div_rn(row[STEP_SIZE] * ((s0 + g) * row[CORR1] * d1), tl.sqrt_rn(s1 * row[CORR2] * d2) + row[EPS])
    return p - u, s0, s1, s2, s3


@triton.jit
def ademamix(p, g, s0, s1, s2, s3, row):
    s0 = first_moment(s0, g, row)
    s1 = row[BETA3] * s1 + row[ALPHA3] * g
    s2 = second_moment(s2, g, row)
    u = tl.div_rn(row[STEP_SIZE] * (s0 * row[CORR1] + row[MIX] * s1), tl.sqrt_rn(s2) + row[EPS])
    return p - u, s0, s1, s2, s3


@triton.jit
def ademamix_slow(p, g, s0, s1, s2, s3, row):
    s0 = row[BETA3] * s0 + row[ALPHA3] * g
    s1 = second_moment(s1, g, row)
    return p - tl.div_rn(row[STEP_SIZE] * (g + row[MIX] * s0), tl.sqrt_rn(s1) + row[EPS]), s0, s1, s2, s3


@triton.jit
def adopt(p, g, s0, s1, s2, s3, row):
    first = row[MODE] == NO_STEP
    root = tl.sqrt_rn(s1)
    n = tl.div_rn(g, tl.where(root < row[EPS], row[EPS], root))
    clipped = tl.where(n > row[CLIP], row[CLIP], tl.where(n < -row[CLIP], -row[CLIP], n))
    m = first_moment(s0, clipped, row)
    v = tl.where(first, g * g, second_moment(s1, g, row))
    return tl.where(first, p, p - row[STEP_SIZE] * m), tl.where(first, s0, m), v, s2, s3


@triton.jit
def grams(p, g, s0, s1, s2, s3, row):
    s0 = first_moment(s0, g, row)
    s1 = second_moment(s1, g, row)
    u = tl.div_rn(row[STEP_SIZE] * (sign_of(g) * tl.abs(s0)), tl.sqrt_rn(s1) + row[EPS])
    return p - u, s0, s1, s2, s3


@triton.jit
def sophia_g(p, g, s0, s1, s2, s3, row):
    s0 = first_moment(s0, g, row)
    ratio = tl.div_rn(tl.abs(s0), row[MIX] * s1 + row[EPS])
    return p - row[STEP_SIZE] * sign_of(s0) * tl.where(ratio > 1.0, 1.0, ratio), s0, s1, s2, s3


@triton.jit
def adahessian(p, g, s0, s1, s2, s3, row):
    s0 = first_moment(s0, g, row)
    s1 = second_moment(s1, s2, row)
    root = tl.sqrt_rn(s1)
    if row[MODE] != 0.0:
        root = pow_f32(root, row[POW1])
    return p - tl.div_rn(row[STEP_SIZE] * s0, root + row[EPS]), s0, s1, s2, s3


@triton.jit
def schedule_free_adamw(p, g, s0, s1, s2, s3, row):
    s1 = second_moment(s1, g, row)
    u = tl.div_rn(row[CORR1] * g, tl.sqrt_rn(s1) + row[EPS]) + row[WD] * p
    y = p + row[MIX] * (s0 - p) + row[ALPHA1] * u
    return y, s0 - row[STEP_SIZE] * u, s1, s2, s3


class Rule(NamedTuple):
    """A rule's device function, how many states it reads, how many leading ones it writes back."""

    fn: Any
    states: int
    stored: int


# In the order of FA_RULES in csrc/core/rules.h.
RULES = {
    rule.fn.__name__: rule
    for rule in (
        Rule(sgd, 0, 0),
        Rule(sgd_momentum, 1, 1),
        Rule(sign_sgd, 0, 0),
        Rule(signum, 1, 1),
        Rule(lion, 1, 1),
        Rule(adagrad, 1, 1),
        Rule(rmsprop, 1, 1),
        Rule(rmsprop_momentum, 2, 2),
        Rule(rmsprop_centered, 2, 2),
        Rule(rmsprop_centered_momentum, 3, 3),
        Rule(adadelta, 2, 2),
        Rule(adam, 2, 2),
        Rule(amsgrad, 3, 3),
        Rule(nadam, 2, 2),
        Rule(radam, 2, 2),
        Rule(adabelief, 2, 2),
        Rule(adabelief_amsgrad, 3, 3),
        Rule(diffgrad, 3, 3),
        Rule(exadam, 2, 2),
        Rule(ademamix, 3, 3),
        Rule(ademamix_slow, 2, 2),
        Rule(adopt, 2, 2),
        Rule(grams, 2, 2),
        Rule(sophia_g, 2, 1),
        Rule(adahessian, 3, 2),
        Rule(schedule_free_adamw, 2, 2),
    )
}

"""Distances between floating-point results in units in the last place (ulp)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: distance between a NaN and a number, or an infinity and anything else
INCOMPARABLE = 2**63 - 1

_WHOLE = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _ordered(t: Tensor) -> Tensor:
    """int64 numbers of which neighbouring floats differ by one; both zeros are 0."""
    bits = t.contiguous().view(_WHOLE[t.element_size()]).long()
    lowest = -(2 ** (8 * t.element_size() - 1))
    return torch.where(bits < 0, lowest - bits, bits)


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """Number of representable values between two tensors of one dtype, elementwise.

    Args:
        a, b: same shape and dtype (float64, float32, bfloat16 or float16).

    Returns:
        int64 of their shape. NaN and NaN: 0, +0 and -0: 0; a NaN or an infinity and anything else: INCOMPARABLE.

    Raises:
        ValueError: shapes or dtypes differ, or the dtype has no ulp here.
    """
    if a.shape != b.shape or a.dtype != b.dtype or not a.is_floating_point() or a.element_size() not in _WHOLE:
        raise ValueError(
            f"ulp_distance: expected two tensors of one shape and 16-, 32- or 64-bit floating dtype; got {a.dtype} {tuple(a.shape)} and "
            f"{b.dtype} {tuple(b.shape)}; convert one of them"
        )
    x, y = _ordered(a), _ordered(b)
    distance = (x - y).abs()
    # float64 of opposite signs can be more than 2^63 apart
    distance = torch.where((x < 0) != (y < 0), (x.abs() + y.abs()).where(x.abs() <= INCOMPARABLE - 1 - y.abs(), INCOMPARABLE - 1), distance)
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0, torch.where(a.isfinite() & b.isfinite(), distance, INCOMPARABLE))


def ulp_size(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of ``dtype`` at the float64 values ``x`` (the subnormal spacing near 0), as float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.double().abs().clamp(min=info.tiny, max=info.max))
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent - 1)


class Error(NamedTuple):
    """Elementwise float64 errors. ``ulp``: in ulp of the result's dtype at the truth; ``update``: as a share of the true change, or None."""

    absolute: Tensor
    ulp: Tensor
    update: Tensor | None


def error_vs_truth(result: Tensor, truth64: Tensor, before: Tensor | None = None) -> Error:
    """How far a result is from the truth.

    Args:
        result: any floating dtype.
        truth64: float64 of the same shape.
        before: the value before the update, same shape, any dtype; without it ``update`` is None.

    Returns:
        Error. Equal NaN and equal infinities count as 0, also an infinity where the truth lies beyond the dtype's range; any other NaN or
        infinity counts as infinite.
    """
    if result.shape != truth64.shape or truth64.dtype != torch.float64:
        raise ValueError(f"error_vs_truth: expected a float64 truth of shape {tuple(result.shape)}; got {truth64.dtype} {tuple(truth64.shape)}")
    got = result.double()
    rounded = truth64.to(result.dtype).double()
    same = (got == truth64) | (got.isnan() & truth64.isnan()) | (got.isinf() & (got == rounded))
    absolute = torch.where(same, 0.0, (got - truth64).abs().nan_to_num(nan=torch.inf, posinf=torch.inf))
    absolute = torch.where(~same & ~got.isfinite(), torch.inf, absolute)
    update = None
    if before is not None:
        change = (truth64 - before.double()).abs()
        update = torch.where(absolute == 0, 0.0, absolute / change)
    return Error(absolute, absolute / ulp_size(truth64.nan_to_num(), result.dtype), update)


def within_a_step(a: Tensor, b: Tensor, old: Tensor) -> Tensor:
    """Elementwise, whether a is b, which a step made of ``old``: within 2 ulp of the step, which an inexact function scales, and one of the larger of
    the old and the new value, as their sum is rounded. a, b, old: one shape and dtype; NaN is NaN; whole numbers may differ by 2."""
    if not a.is_floating_point():
        return (a.long() - b.long()).abs() <= 2
    eps, least = torch.finfo(a.dtype).eps, torch.finfo(a.dtype).smallest_normal * torch.finfo(a.dtype).eps
    wide = [x.double() for x in (a, b, old)]
    new, before = wide[1], torch.nan_to_num(wide[2])
    bound = ((2 * (new - before).abs() + torch.maximum(new.abs(), before.abs())) * eps).clamp(min=2 * least)
    bound = torch.where(bound.isfinite(), bound, 0)
    return ((wide[0] - wide[1]).abs() <= bound) | (a == b) | (a.isnan() & b.isnan())

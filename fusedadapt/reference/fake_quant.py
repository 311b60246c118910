"""Fake quantization, defined: values are rounded to the grid of a few bits and stay floating point. For every element, with the numbers of its group,

    u = (x - offset) / scale                     or times 1 / scale, which is not the same number at ties
    q = rne(clamp(u, low, high))                 low, high = quant_min - z, quant_max - z;  z = rne(clamp(zero, quant_min, quant_max))
    y = q * scale + offset                       fp32 (fp64 for fp64), one rounding to x's dtype

and its derivatives, where I says which elements count as inside the range (``ste``):

    dx = dy * I        dscale = sum dy * (q - I * u)        doffset = sum dy * (1 - I)        dzero = -scale * doffset

A group whose |scale| is below 2^-120 is a group of zeros (u = 0). NaN in x, or in any number of its group, gives NaN; infinities are clamped.
Every backend has `fake` and `fake_backward` with these signatures; y and dx are the same bits on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TINY = 2.0**-120
#: largest |quant_min|, |quant_max|: rounding by adding 1.5 * 2^23 is exact up to here
LIMIT = 1 << 22


class Rule(NamedTuple):
    """Which number belongs to which element, and what is done with it.

    x in memory order is cut into lines of ``line`` elements, every line into runs of ``run`` (the last of a line may be short). Run r takes number
    r % groups of ``scale`` [groups], ``zero`` and ``offset`` ([groups] or [1] or None), all fp32 (fp64 for fp64) and contiguous.
    ``bounds``: quant_min and quant_max as a tensor, [2, groups] or [2, 1]; None: the two whole numbers.
    """

    line: int
    run: int
    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    bounds: Tensor | None
    quant_min: int
    quant_max: int
    divide: bool


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def spread(t: Tensor, x: Tensor, rule: Rule) -> Tensor:
    """A number per group as something that broadcasts against x.view(-1, line)."""
    lines, per_line = x.numel() // rule.line, -(-rule.line // rule.run)
    at = torch.arange(lines, device=x.device)[:, None] * per_line
    if per_line > 1:
        at = at + torch.arange(rule.line, device=x.device) // rule.run
    return t[at % t.numel()]


def gather(terms: Tensor, rule: Rule) -> Tensor:
    """Sums per group of a term per element, lines x line; added up in fp64."""
    lines, per_line, groups = terms.shape[0], -(-rule.line // rule.run), rule.scale.numel()
    padded = torch.nn.functional.pad(terms.double(), (0, per_line * rule.run - rule.line))
    return padded.view(lines * per_line, rule.run).sum(1).view(-1, groups).sum(0).to(rule.scale.dtype)


class Levels(NamedTuple):
    """Of every element: the value in steps, the level it is rounded to, and its group's numbers."""

    u: Tensor
    q: Tensor
    scale: Tensor
    offset: Tensor | None
    low: Tensor
    high: Tensor


def levels(x: Tensor, rule: Rule) -> Levels:
    """x: lines x line."""
    dtype = rule.scale.dtype
    if rule.bounds is None:
        least, most = (torch.full((1,), float(b), dtype=dtype, device=x.device) for b in (rule.quant_min, rule.quant_max))
    else:
        least, most = rule.bounds
    zero = torch.zeros_like(least) if rule.zero is None else torch.minimum(torch.maximum(rule.zero, least), most).round()
    low, high = least - zero, most - zero
    scale = rule.scale + ((low - low) + (high - high))  # NaN or infinite bounds must not pass unseen
    step = torch.where(scale.abs() < TINY, torch.inf, scale)
    if not rule.divide:
        step = 1.0 / step
    low, high, scale, step = (spread(t, x, rule) for t in (low, high, scale, step))
    offset = None if rule.offset is None else spread(rule.offset, x, rule)
    u = x.to(dtype) if offset is None else x.to(dtype) - offset
    u = u / step if rule.divide else u * step
    return Levels(u, torch.minimum(torch.maximum(u, low), high).round() + 0.0, scale, offset, low, high)  # + 0: no level is -0


def fake(x: Tensor, rule: Rule) -> Tensor:
    """y of x's shape and dtype. x: contiguous, not empty."""
    v = levels(x.view(-1, rule.line), rule)
    y = v.q * v.scale
    return (y if v.offset is None else y + v.offset).to(x.dtype).view(x.shape)


#: what counts as inside: LSQ's clamping first, torch's rounding first (half a step wider), everything
INSIDE: dict[str, Callable[[Levels], Tensor]] = {
    "clamp": lambda v: (v.low <= v.u) & (v.u <= v.high),
    "round": lambda v: (v.low <= v.u.round()) & (v.u.round() <= v.high),
    "identity": lambda v: torch.ones_like(v.u, dtype=torch.bool),
}


def fake_backward(dy: Tensor, x: Tensor, rule: Rule, ste: str, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in x's dtype, dscale [groups], doffset [groups]), the last two empty without ``sums``. dy, x: contiguous, of one shape and dtype."""
    v = levels(x.view(-1, rule.line), rule)
    inside, grad = INSIDE[ste](v), dy.view(-1, rule.line)
    dx = torch.where(inside, grad, 0.0).to(x.dtype).view(x.shape)
    if not sums:
        return dx, rule.scale.new_empty(0), rule.scale.new_empty(0)
    grad = grad.to(v.u.dtype)
    d_scale = gather(grad * (v.q - torch.where(inside, v.u, 0.0)), rule)
    return dx, d_scale, gather(torch.where(inside, 0.0, grad), rule)

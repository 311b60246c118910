"""One optimizer step of one tensor in pure PyTorch: what every sweep does, in the order every sweep does it.

unscale -> clip -> negate (maximize) -> L2 -> decoupled decay -> rule -> mask -> one rounding per stored array.
Both decays pull towards zero, or towards an anchor.
fp64 parameters compute in fp64; everything else in fp32.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from .random import philox, random16
from .rules import RULES

__all__ = ["RULES", "make_rows", "philox", "random16", "round_bf16_stochastic", "join_split", "split", "step_"]


def make_rows(rule: str, hyper: dict[str, Tensor], step: Tensor, aux: list[Tensor]) -> tuple[SimpleNamespace, list[Tensor]]:
    """Rows for fp64 ``hyper`` (name -> values) and ``step`` (the update under way, from 1); returns the fields and the advanced ``aux``."""
    clock = SimpleNamespace(step=step, aux=list(aux))
    row = RULES[rule].row(SimpleNamespace(**hyper), clock)
    return row, clock.aux


def scalar_row(row: SimpleNamespace) -> SimpleNamespace:
    """The row of a single group as Python floats (a 0-d tensor would promote 0-d parameters to fp64)."""
    return SimpleNamespace(**{k: float(v) for k, v in vars(row).items()})


def round_bf16_stochastic(x: Tensor, random: Tensor) -> Tensor:
    """fp32 -> bf16 by adding 16 random bits and truncating; infinities and NaN stay, finite values never become infinite."""
    u = x.contiguous().view(torch.int32)
    carried = u + random.to(u.device)
    keep = ~x.isfinite() | ((carried & 0x7F800000) == 0x7F800000)
    bits = torch.where(keep, u, carried) >> 16 | torch.where(x.isnan(), 0x40, 0)
    return bits.to(torch.int16).view(torch.bfloat16)


def join_split(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 master of a bf16 parameter and its int16 remainder."""
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)
    return bits.view(torch.float32)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16 rounded to nearest, ties away from zero; int16 difference of the bit patterns)."""
    u = x.contiguous().view(torch.int32)
    high = torch.where(x.isnan(), u >> 16 | 0x40, (u + 0x8000) >> 16)
    return high.to(torch.int16).view(torch.bfloat16), torch.where(x.isnan(), 0, u).to(torch.int16)


def step_(
    rule: str,
    param: Tensor,
    grad: Tensor,
    states: list[Tensor],
    row: SimpleNamespace,
    *,
    stored: int | None = None,
    grad_scale: Tensor | None = None,
    clip: Tensor | None = None,
    keep: Tensor | None = None,
    extra: Tensor | None = None,
    random: Tensor | None = None,
    anchor: Tensor | None = None,
) -> None:
    """Updates ``param``, ``states`` and ``extra`` in place. All arrays have the parameter's shape.

    ``row``: Python floats. ``keep``: bool, True = trainable. ``extra``: fp32 master weight, or int16 remainder of a bf16 parameter.
    ``random``: 16 random bits per element (int32) to round a bf16 parameter stochastically. ``anchor``: what decay and L2 pull towards (None: zero).
    """
    compute = torch.float64 if param.dtype == torch.float64 else torch.float32
    if extra is None:
        p = param.to(compute)
    else:
        p = join_split(param, extra) if extra.dtype == torch.int16 else extra.clone()
    g = grad.to(compute)
    if grad_scale is not None:
        g = g / grad_scale.to(compute)
    if clip is not None:
        g = g * clip.to(compute)
    g = g * row.sign
    a = None if anchor is None else anchor.to(compute)
    if row.l2:
        g = g + row.l2 * (p if a is None else p - a)
    s = [x.to(compute) for x in states]
    if a is None:
        p = p * row.decay
    elif row.pull:
        p = p - row.pull * (p - a)
    p = RULES[rule].step(p, g, s, row)

    def store(out: Tensor, value: Tensor) -> None:
        out.copy_(value.to(out.dtype) if keep is None else torch.where(keep, value.to(out.dtype), out))

    for out, value in list(zip(states, s, strict=True))[: len(states) if stored is None else stored]:
        store(out, value)
    if extra is not None and extra.dtype == torch.int16:
        high, low = split(p)
        store(param, high)
        store(extra, low)
        return
    if extra is not None:
        store(extra, p)
    store(param, round_bf16_stochastic(p, random) if random is not None and param.dtype == torch.bfloat16 else p)

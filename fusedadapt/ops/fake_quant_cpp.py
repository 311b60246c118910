"""Fake quantization on a CPU in C++ (`csrc/cpu/fake_quant*.cpp`): the functions of `reference.fake_quant`, on as many threads as torch uses.

Inputs are checked by `ops.fake_quant`. Sums are taken in fp32 over 512 elements, then in fp64, in an order that depends on the shape alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _core
from ..reference.fake_quant import INSIDE, Rule
from .address import address

_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_INSIDE = {name: code for code, name in enumerate(INSIDE)}
_address = functools.partial(address, "q_fake*")


def _numbers(t: Tensor | None) -> tuple[int, int]:
    """(address, step from group to group)."""
    return (0, 0) if t is None else (_address(t), int(t.shape[-1] > 1))


def _job(x: Tensor, rule: Rule) -> tuple[int, ...]:
    groups, bounds = rule.scale.numel(), rule.bounds
    low, step = _numbers(bounds)
    high = 0 if bounds is None else low + bounds.shape[-1] * bounds.element_size()
    parts = (*_numbers(rule.zero), *_numbers(rule.offset), low, high, step, rule.quant_min, rule.quant_max, int(rule.divide))
    return (_address(x), _CODES[x.dtype], x.numel(), rule.line, rule.run, groups, _address(rule.scale), *parts)


def fake(x: Tensor, rule: Rule) -> Tensor:
    """y of x's shape and dtype. x: contiguous, not empty."""
    y = torch.empty_like(x)
    _core.fake_quant(_job(x, rule), y.data_ptr(), torch.get_num_threads())
    return y


def fake_backward(dy: Tensor, x: Tensor, rule: Rule, ste: str, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in x's dtype, dscale [groups], doffset [groups]), the last two empty without ``sums``. dy, x: contiguous, of one shape and dtype.

    Scratch: 16 bytes per run and 16,384 elements of it; where runs are below 16 elements, 16 bytes per column and 256 rows.
    """
    dx = torch.empty_like(x)
    d_scale, d_offset = (torch.empty(rule.scale.numel() if sums else 0, dtype=torch.float32, device="cpu") for _ in range(2))
    out = (d_scale.data_ptr(), d_offset.data_ptr()) if sums else (0, 0)
    _core.fake_quant_backward(_job(x, rule), _INSIDE[ste], _address(dy), dx.data_ptr(), *out, torch.get_num_threads())
    return dx, d_scale, d_offset

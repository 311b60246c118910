"""dW at chosen elements only: dW[i] = sum_t dy[t, row(i)] x[t, column(i)], without the dense dW in memory.

Tiles of dW (4 MB) come from the library's GEMM and are gathered at once: at 1 % to 10 % density a matrix product that throws most of its
result away is faster than one dot product per element, whose operands it would read again and again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils.flop_counter import register_flop_formula

from ..autocast import autocasting
from . import dense

_TILE = 1 << 20  # elements of a tile of dW: 4 MB in fp32
_WIDE = 1 << 18  # elements of 16-bit operands widened at a time where the CPU cannot multiply them
_lib = Library("fusedadapt", "FRAGMENT")
_lib.define("masked_wgrad(Tensor dy, Tensor x, Tensor index) -> Tensor")


def _check(dy: Tensor, x: Tensor, index: Tensor) -> None:
    if dy.dim() != 2 or x.dim() != 2 or dy.shape[0] != x.shape[0]:
        raise ValueError(
            f"fusedadapt.masked_wgrad: expected dy [T, N] and x [T, K]; got {tuple(dy.shape)} and {tuple(x.shape)}; flatten them to rows"
        )
    if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"fusedadapt.masked_wgrad: expected sorted flat positions, int32 or int64; got {index.dtype} of shape {tuple(index.shape)}")
    if dy.dtype != x.dtype:
        raise ValueError(f"fusedadapt.masked_wgrad: expected dy and x in one dtype; got {dy.dtype} and {x.dtype}; convert one")
    if not dy.device == x.device == index.device:
        raise ValueError(f"fusedadapt.masked_wgrad: expected one device; got {dy.device}, {x.device}, {index.device}; move them together")


def _wgrad(dy: Tensor, x: Tensor, index: Tensor) -> Tensor:
    _check(dy, x, index)
    with torch.autocast(x.device.type, enabled=False) if autocasting(x.device.type) else contextlib.nullcontext():
        return _at(dy, x, index)


def _at(dy: Tensor, x: Tensor, index: Tensor) -> Tensor:
    (_, n), k = dy.shape, x.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.zeros(index.numel(), dtype=wide, device=x.device)
    if index.numel() == 0 or x.numel() == 0:
        return out
    rows = max(1, min(n, _TILE // max(1, k)))
    starts = torch.arange(0, n + rows, rows, device=index.device).clamp(max=n) * k
    cuts = torch.searchsorted(index, starts.to(index.dtype) if n * k < 1 << 31 else starts).tolist()
    for i in range(len(cuts) - 1):
        first, last = cuts[i], cuts[i + 1]
        if first < last:
            tile = _tile(dy[:, i * rows : (i + 1) * rows], x, wide)
            # torch's own gather: its threads are awake from the product, and ours would share the cores with them while they spin (5 %: 0.73 of the
            # dense product's speed, against 1.0).
            out[first:last] = tile.view(-1).index_select(0, index[first:last] - i * rows * k)
            del tile  # before the next one is made
    return out


def _tile(dy: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
    """dy^T x, contiguous, at least in the operands' precision."""
    if not dense.widens(x):
        return dy.t() @ x
    total = torch.zeros(dy.shape[1], x.shape[1], dtype=wide, device=x.device)
    step = max(16, _WIDE // max(1, x.shape[1]))
    for t in range(0, x.shape[0], step):
        total.addmm_(dy[t : t + step].t().to(wide), x[t : t + step].to(wide))
    return total


def _fake(dy: Tensor, x: Tensor, index: Tensor) -> Tensor:
    _check(dy, x, index)
    return x.new_empty(index.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _flops(dy: Sequence[int], x: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * dy[0] * dy[1] * x[1]


_lib.impl("masked_wgrad", _wgrad, "CompositeExplicitAutograd")
torch.library.register_fake("fusedadapt::masked_wgrad", _fake, lib=_lib)
register_flop_formula(torch.ops.fusedadapt.masked_wgrad)(_flops)

"""The product of a dense base and what a low-rank branch adds to it.

Two steps, except where the product goes through widened tiles (`dense`): there the branch joins a tile before its rounding, in the pass that rounds.
16-bit results are then rounded once, and the branch costs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dense, lowrank
from .register import op


class Low(NamedTuple):
    """drop(u a), as `torch.ops.fusedadapt.lr_add_` takes it; ``p``: numbers where ops are called directly."""

    u: Tensor
    a: Tensor
    seed: Tensor | None
    p: Any
    ranks: Sequence[int]


def linear(x: Tensor, w: Tensor, bias: Tensor | None, low: Low | None) -> Tensor:
    """x W^T + bias + low. x: T x K; w: N x K."""
    if low is None:
        return dense.linear(x, w, bias)
    if dense.widens(x):
        return _fused(x, w, bias, False, low)
    return add(dense.linear(x, w, bias), low)


def linear_dx(dy: Tensor, w: Tensor, low: Low | None) -> Tensor:
    """dy W + low. dy: T x N; w: N x K."""
    if low is None:
        return dense.linear_dx(dy, w)
    if dense.widens(dy):
        return _fused(dy, w, None, True, low)
    return add(dense.linear_dx(dy, w), low)


def add(y: Tensor, low: Low) -> Tensor:
    """y, after low is added to it."""
    lowrank.ops_for(y).lr_add_(y, *low)
    return y


def _fused(x: Tensor, w: Tensor, bias: Tensor | None, transposed: bool, low: Low) -> Tensor:
    run = _widened_add if lowrank.is_direct(x) else torch.ops.fusedadapt.dense_widened_add
    y: Tensor = run(x, w, bias, transposed, *low)
    return y


def _shape(x: Tensor, w: Tensor, transposed: bool) -> tuple[Any, Any]:
    return x.shape[0], w.shape[1 if transposed else 0]


def _check(
    x: Tensor, w: Tensor, bias: Tensor | None, transposed: bool, u: Tensor, a: Tensor, seed: Tensor | None, p: Tensor | None, ranks: Sequence[int]
) -> None:
    dense.check(x, w, transposed)
    lowrank.check_low("dense_widened_add", x, _shape(x, w, transposed), u, a, seed, p, ranks)


def _flops(x: Any, w: Any, bias: Any, transposed: Any, u: Any, a: Any, *_: Any, **__: Any) -> int:
    return 2 * int(x[0]) * (int(w[0]) * int(w[1]) + int(a[0]) * int(a[1]))


@op(
    "dense_widened_add(Tensor x, Tensor w, Tensor? bias, bool transposed, Tensor u, Tensor a, Tensor? seed, Tensor? p, SymInt[] ranks) -> Tensor",
    _check,
    lambda x, w, bias, transposed, *low: x.new_empty(_shape(x, w, transposed)),
    _flops,
)
def _widened_add(
    x: Tensor, w: Tensor, bias: Tensor | None, transposed: bool, u: Tensor, a: Tensor, seed: Tensor | None, p: Any, ranks: Sequence[int]
) -> Tensor:
    thresholds = lowrank.thresholds("dense_widened_add", seed, p, ranks)
    round_add = getattr(lowrank.backend_of("add_", x), "round_add", None)  # the C++ backend has it
    if round_add is None or not x.shape[0]:
        wide = torch.matmul(x.float(), w.float() if transposed else w.float().t())
        return add(wide if bias is None else wide.add_(bias), Low(u, a, seed, p, ranks)).to(x.dtype)
    width, u = a.shape[1], u.contiguous()

    def finish(tile: Tensor, out: Tensor, row: int, column: int) -> None:
        rows, columns = tile.shape
        round_add(tile, out, (row, column, width), u[row : row + rows], a[:, column : column + columns], seed, thresholds, ranks)

    return dense.widened(x, w, bias, transposed, finish)

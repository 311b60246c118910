"""The product of a dense base and what a low-rank branch adds to it.

On a CPU the branch comes first: it is written where the product goes, and the GEMM adds to it. MKL with beta = 1 takes no longer than with beta = 0
(2048 x 1024 x 1024, two EPYC cores: 21.3 ms and 21.9), so that the branch costs one pass that only writes, and the bias none. Where the product goes
through widened tiles (`dense`), the same happens in each tile, and 16-bit results are rounded once. Elsewhere: two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dense, lowrank
from .register import op


class Low(NamedTuple):
    """drop(u a), as `torch.ops.fusedadapt.lr_add_` takes it; ``p``: numbers where ops are called directly. ``ops``: `lowrank.ops_for` what it is
    added to, which is dear to ask for twice a pass."""

    u: Tensor
    a: Tensor
    seed: Tensor | None
    p: Any
    ranks: Sequence[int]
    ops: Any


def _joined(x: Tensor) -> bool:
    """Whether a low-rank branch becomes part of the product, so that their sum is rounded once and costs no pass."""
    return x.device.type == "cpu" and (x.dtype == torch.float32 or dense.widens(x))


def linear(x: Tensor, w: Tensor, bias: Tensor | None, low: Low | None) -> Tensor:
    """x W^T + bias + low. x: T x K; w: N x K."""
    if low is None:
        return dense.linear(x, w, bias)
    return _add_to(x, w, bias, False, low) if _joined(x) else add(dense.linear(x, w, bias), low)


def linear_dx(dy: Tensor, w: Tensor, low: Low | None) -> Tensor:
    """dy W + low. dy: T x N; w: N x K."""
    if low is None:
        return dense.linear_dx(dy, w)
    return _add_to(dy, w, None, True, low) if _joined(dy) else add(dense.linear_dx(dy, w), low)


def add(y: Tensor, low: Low) -> Tensor:
    """y, after low is added to it."""
    low.ops.lr_add_(y, *low[:5])
    return y


def _add_to(x: Tensor, w: Tensor, bias: Tensor | None, transposed: bool, low: Low) -> Tensor:
    y: Tensor = low.ops.dense_add(x, w, bias, transposed, *low[:5])
    return y


def _shape(x: Tensor, w: Tensor, transposed: bool) -> tuple[Any, Any]:
    return x.shape[0], w.shape[1 if transposed else 0]


def _check(
    x: Tensor, w: Tensor, bias: Tensor | None, transposed: bool, u: Tensor, a: Tensor, seed: Tensor | None, p: Tensor | None, ranks: Sequence[int]
) -> None:
    dense.check(x, w, transposed)
    lowrank.check_low("dense_add", x, _shape(x, w, transposed), u, a, seed, p, ranks)
    lowrank.check_vector("dense_add", "bias", bias, _shape(x, w, transposed)[1], x)


def _flops(x: Any, w: Any, bias: Any, transposed: Any, u: Any, a: Any, *_: Any, **__: Any) -> int:
    return 2 * int(x[0]) * (int(w[0]) * int(w[1]) + int(a[0]) * int(a[1]))


@op(
    "dense_add(Tensor x, Tensor w, Tensor? bias, bool transposed, Tensor u, Tensor a, Tensor? seed, Tensor? p, SymInt[] ranks) -> Tensor",
    _check,
    lambda x, w, bias, transposed, *low: x.new_empty(_shape(x, w, transposed)),
    _flops,
)
def _dense_add(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    transposed: bool,
    u: Tensor,
    a: Tensor,
    seed: Tensor | None,
    p: Any,
    ranks: Sequence[int],
    backend: ModuleType | None = None,
) -> Tensor:
    thresholds = lowrank.thresholds("dense_add", seed, p, ranks)
    fill_ = getattr(backend or lowrank.backend_of("add_", x), "fill_", None)  # the C++ backend has it
    if fill_ is None or not x.shape[0] or not a.shape[1]:
        wide = torch.matmul(x.float(), w.float() if transposed else w.float().t())
        return add(wide if bias is None else wide.add_(bias), Low(u, a, seed, p, ranks, lowrank.ops_for(wide))).to(x.dtype)
    width, u = a.shape[1], u.contiguous()
    if x.dtype == w.dtype == torch.float32:
        y = x.new_empty(x.shape[0], width)
        fill_(y, bias, (0, 0, width), u, a, seed, thresholds, ranks)
        return y.addmm_(x, w if transposed else w.t())

    def start(tile: Tensor, under: Tensor | None, row: int, column: int) -> None:
        rows, columns = tile.shape
        fill_(tile, under, (row, column, width), u[row : row + rows], a[:, column : column + columns], seed, thresholds, ranks)

    return dense.widened(x, w, bias, transposed, start)


lowrank.RUNS["dense_add"] = (_dense_add, "add_")

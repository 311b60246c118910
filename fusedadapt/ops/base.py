"""The product with a frozen base weight, dense or packed: what adapters are added to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dense_low
from . import quant as _quant  # noqa: F401 - defines torch.ops.fusedadapt.q_*
from .dense_low import Low


class Base(NamedTuple):
    """A weight N x K. ``spec`` is "" for a dense one; otherwise ``weight`` holds packed bytes, and the others what else a quantized tensor has."""

    weight: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    super: Tensor | None = None
    offset: Tensor | None = None
    spec: str = ""
    n: int = 0
    k: int = 0

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        """The tensors of a packed weight, as ops take them."""
        return self[:5]

    @property
    def rows(self) -> int:
        """N."""
        return self.n if self.spec else self.weight.shape[0]


_PIECE = 1 << 20  # elements of W dequantized at a time
#: names of the tensors of a `Base`
TENSORS = Base._fields[:5]


def linear(x: Tensor, base: Base, bias: Tensor | None = None, low: Low | None = None) -> Tensor:
    """x W^T + bias, and what a low-rank branch adds. x: T x K."""
    if not base.spec:
        return dense_low.linear(x, base.weight, bias, low)
    y: Tensor = torch.ops.fusedadapt.q_linear(x, *base.parts, bias, base.spec, base.n)
    return y if low is None else dense_low.add(y, low)


def linear_dx(dy: Tensor, base: Base, low: Low | None = None) -> Tensor:
    """dy W, and what a low-rank branch adds. dy: T x N."""
    if not base.spec:
        return dense_low.linear_dx(dy, base.weight, low)
    dx: Tensor = torch.ops.fusedadapt.q_linear_dx(dy, *base.parts, base.spec, base.n, base.k)
    return dx if low is None else dense_low.add(dx, low)


def skinny_w(base: Base, a: Tensor, ops: Any) -> tuple[Tensor, Tensor]:
    """(W a^T, squared norms of W's rows). A packed weight is dequantized to fp32 some rows at a time. ``ops``: `lowrank.ops_for` them."""
    if not base.spec:
        c, rowsq = ops.lr_skinny_w(base.weight, a)
        return c, rowsq
    step, found = max(1, _PIECE // max(1, base.k)), []
    for row in range(0, base.n, step):
        w = torch.ops.fusedadapt.q_dequantize(*base.parts, base.spec, base.n, base.k, row, min(base.n, row + step), torch.float32)
        found.append(ops.lr_skinny_w(w.to(a.dtype) if a.dtype == torch.float64 else w, a))
    return torch.cat([c for c, _ in found]), torch.cat([rowsq for _, rowsq in found])

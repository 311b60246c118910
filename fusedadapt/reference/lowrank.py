"""The low-rank linear layer in pure PyTorch: the truth every kernel is held against. Dtype-generic; runs in fp64.

    x' = x * col_scale                        (columns of x; all ones if absent)
    U  = drop(x') A^T                         (T x R)
    V  = s * token_gate * act((U * rank_gate) core)
    y0 = x' W^T + V B^T                       (+ b here if scale_bias)
    y  = row_scale * y0 + b                   (the last only if not scale_bias)

Backward, W frozen (dY0 = row_scale * dy):
    dB = dY0^T V,  dV = dY0 B,  dU = mid^T(dV),  dA = dU^T drop(x'),  dx' = dY0 W + drop(dU A),
    d row_scale = sum_t dy * y0,  db = sum_t dy,  d col_scale = sum_t dx' * x.

drop keeps element (t, k) iff 16 random bits of element t K + k (Philox, key = seed, one stream per segment) are >= round(65536 p), and scales what it
keeps by 65536 / (65536 - round(65536 p)).

A *segment* is one (A, B) pair; several may read the same x, their A stacked: `ranks` holds their heights, `thresholds` their round(65536 p).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .random import random16

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def threshold_of(p: float) -> int:
    """round(65536 p), below 65536: something is always kept."""
    return min(round(p * 65536), 65535)


def dropout_mask(rows: int, columns: int, seed: Tensor | int, threshold: int, stream: int = 0, *, first: int = 0, device=None) -> Tensor:
    """Keep-mask (bool, rows x columns) of one segment; ``first``: the global index of its first element."""
    element = np.arange(first, first + rows * columns, dtype=np.uint64).reshape(rows, columns)
    return (random16(int(seed) & 0xFFFFFFFFFFFFFFFF, element, stream, 0) >= threshold).to(device)


def drop(x: Tensor, seed: Tensor | None, threshold: int, stream: int = 0) -> Tensor:
    """x in `wide` precision with dropout applied; a matrix of rows x columns."""
    x = x.to(wide(x.dtype))
    if threshold == 0:
        return x
    assert seed is not None
    keep = dropout_mask(x.shape[0], x.shape[1], seed, threshold, stream, device=x.device)
    return torch.where(keep, x * (65536 / (65536 - threshold)), 0)


def _segments(ranks: Sequence[int], thresholds: Sequence[int]):
    start = 0
    for stream, (rank, threshold) in enumerate(zip(ranks, thresholds, strict=True)):
        yield stream, slice(start, start + rank), threshold
        start += rank


def shrink(x: Tensor, a: Tensor, seed: Tensor | None, thresholds: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """U = drop(x) A^T. x: T x K; a: R x K. Returns T x R, fp32 (fp64 for fp64)."""
    return torch.cat([drop(x, seed, t, i) @ a[r].to(wide(x.dtype)).T for i, r, t in _segments(ranks, thresholds)], 1)


def bwd_x(x: Tensor, u: Tensor, seed: Tensor | None, thresholds: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """M = u^T drop(x). x: T x K; u: T x R. Returns R x K, fp32 (fp64)."""
    return torch.cat([u[:, r].to(wide(x.dtype)).T @ drop(x, seed, t, i) for i, r, t in _segments(ranks, thresholds)], 0)


def add_(y: Tensor, u: Tensor, a: Tensor, seed: Tensor | None, thresholds: Sequence[int], ranks: Sequence[int]) -> None:
    """y += drop(u a), rounded once. y: T x K; u: T x R; a: R x K."""
    total = y.to(wide(y.dtype))
    for i, r, t in _segments(ranks, thresholds):
        total = total + drop(u[:, r].to(total.dtype) @ a[r].to(total.dtype), seed, t, i)
    y.copy_(total)


def scale_add_(y0: Tensor, v: Tensor | None, a: Tensor | None, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    """y0 += v a (rounded once, in place); returns row_scale * y0 + bias, computed before that rounding. y0: T x N; v: T x R; a: R x N."""
    total = y0.to(wide(y0.dtype))
    if v is not None and a is not None:
        total = total + v.to(total.dtype) @ a.to(total.dtype)
        y0.copy_(total)
    y = total * row_scale.to(total.dtype)
    return (y if bias is None else y + bias.to(total.dtype)).to(y0.dtype)


def bwd_dy(
    dy: Tensor, v: Tensor | None, b: Tensor | None, row_scale: Tensor | None, y0: Tensor | None, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything one read of dy gives: (dY0 in dy's dtype, dV = dY0 B, M_B = dY0^T V, sum_t dy, sum_t dy * y0).

    dy, y0: T x N; v: T x R; b: N x R; row_scale: N. A part that is not asked for (argument None, need_bias False) comes back with no elements; dY0
    only exists with row_scale. dV and M_B use dY0 before its rounding.
    """
    d = dy.to(wide(dy.dtype))
    db = d.sum(0) if need_bias else d.new_empty(0)
    dg = d.new_empty(0) if y0 is None else (d * y0.to(d.dtype)).sum(0)
    scaled = dy.new_empty(0)
    if row_scale is not None:
        d = d * row_scale.to(d.dtype)
        scaled = d.to(dy.dtype)
    dv = d.new_empty(0) if b is None else d @ b.to(d.dtype)
    mb = d.new_empty(0) if v is None else d.T @ v.to(d.dtype)
    return scaled, dv, mb, db, dg


def dropout(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """drop(x) of segment 0, in x's dtype."""
    return drop(x, seed, threshold).to(x.dtype)


def skinny_w(w: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(C = W A^T, squared norms of W's rows) from one read of W. w: N x K; a: R x K. Returns N x R and N, fp32 (fp64)."""
    w = w.to(wide(w.dtype))
    return w @ a.to(w.dtype).T, w.square().sum(1)


def merge_(w: Tensor, v: Tensor, a: Tensor, row_scale: Tensor | None) -> Tensor:
    """W <- round(row_scale * (W + v a)), computed wide and rounded once. w: N x K; v: N x R; a: R x K; row_scale: N.

    Returns fp64 [2]: (sum D * (W' - W), sum D * D) for the wanted change D: their ratio is the share of the change that the rounding kept.
    """
    old = w.to(torch.float64, copy=True)
    new = old + v.double() @ a.double()
    if row_scale is not None:
        new = new * row_scale.double()[:, None]
    wanted = new - old
    w.copy_(new.to(wide(w.dtype)))
    return torch.stack([(wanted * (w.double() - old)).sum(), wanted.square().sum()]).cpu()


def mid(u: Tensor, scaling, rank_gate=None, token_gate=None, core=None, activation=None) -> Tensor:
    """V = scaling * token_gate * act((U * rank_gate) core). u: T x R; rank_gate: R; token_gate: T; core: R x R2. Differentiable."""
    v = u if rank_gate is None else u * rank_gate.to(u.dtype)
    v = v if core is None else v @ core.to(u.dtype)
    v = v if activation is None else ACTIVATIONS[activation](v)
    v = v if token_gate is None else v * token_gate.to(u.dtype).reshape(-1, 1)
    return v * scaling


def linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    *,
    bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    rank_gate: Tensor | None = None,
    token_gate: Tensor | None = None,
    core: Tensor | None = None,
    activation: str | None = None,
    row_scale: Tensor | None = None,
    scale_bias: bool = False,
    col_scale: Tensor | None = None,
) -> Tensor:
    """The equation at the top, differentiable by autograd, in the arguments' own dtypes: run it in fp64 for the truth.

    x: [..., K]; weight: N x K. ``keep``: the dropout mask to use (bool, as many elements as x), with ``dropout_p`` its probability.
    """
    x2 = x.reshape(-1, x.shape[-1])
    if col_scale is not None:
        x2 = x2 * col_scale
    y = x2 @ weight.T
    if lora_A is not None and lora_B is not None:
        dropped = x2
        if keep is not None:
            dropped = x2 * keep.reshape(x2.shape) * (65536 / (65536 - threshold_of(dropout_p)))
        v = mid(dropped.to(lora_A.dtype) @ lora_A.T, scaling, rank_gate, token_gate, core, activation)
        y = y + (v.to(lora_B.dtype) @ lora_B.T).to(y.dtype)
    if bias is not None and scale_bias:
        y = y + bias
    if row_scale is not None:
        y = y * row_scale
    if bias is not None and not scale_bias:
        y = y + bias
    return y.reshape(*x.shape[:-1], weight.shape[0])

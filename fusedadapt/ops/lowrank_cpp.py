"""The backend "cpp" of the low-rank family: the functions of `reference.lowrank` on CPU tensors, computed by `_core` from addresses.

Inputs are checked by `ops.lowrank`. Matrices of data: fp32, bf16 or fp16, unit stride inside a row; adapters may have any strides.
Results repeat bit for bit, for any number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _core
from .address import address


class _Codes(dict[torch.dtype, int]):
    def __missing__(self, dtype: torch.dtype) -> int:
        raise TypeError(f"lowrank: expected matrices in fp32, bf16 or fp16; got {dtype}; do saved-tensor hooks bring tensors back in another dtype?")


_CODES = _Codes({torch.float32: 1, torch.bfloat16: 2, torch.float16: 3})
_ABSENT = (0, 0, 0, 0, 0, 1)
_Matrix = tuple[int, int, int, int, int, int]
_address = functools.partial(address, "lr_*")


def _matrix(t: Tensor | None) -> _Matrix:
    if t is None:
        return _ABSENT
    (rows, columns), (stride, step) = t.shape, t.stride()
    return _address(t), _CODES[t.dtype], rows, columns, stride, step


def _adapter(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dtype in _CODES else t.float()


def _fp32(t: Tensor) -> Tensor:
    """t itself where it is what the kernels read: fp32, contiguous."""
    return (t if t.dtype == torch.float32 else t.float()).contiguous()


def _key(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF


def shrink(x: Tensor, a: Tensor, seed: Tensor | None, thresholds: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """U = drop(x) A^T. x: T x K; a: R x K. Returns T x R, fp32."""
    a_ = _adapter(a)
    u = torch.empty(x.shape[0], a.shape[0], dtype=torch.float32, device="cpu")
    _core.lr_shrink(_matrix(x), _matrix(a_), u.data_ptr(), _key(seed), thresholds, ranks, torch.get_num_threads())
    return u


def bwd_x(x: Tensor, u: Tensor, seed: Tensor | None, thresholds: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """M = u^T drop(x). x: T x K; u: T x R. Returns R x K, fp32."""
    u = _fp32(u)
    m = torch.empty(u.shape[1], x.shape[1], dtype=torch.float32, device="cpu")
    _core.lr_bwd_x(_matrix(x), _address(u), u.shape[1], m.data_ptr(), _key(seed), thresholds, ranks, torch.get_num_threads())
    return m


def add_(y: Tensor, u: Tensor, a: Tensor, seed: Tensor | None, thresholds: Sequence[int], ranks: Sequence[int]) -> None:
    """y += drop(u a), rounded once. y: T x K; u: T x R; a: R x K."""
    u, a_ = _fp32(u), _adapter(a)
    _core.lr_add(_matrix(y), _address(u), _matrix(a_), _key(seed), thresholds, ranks, torch.get_num_threads())


def fill_(
    y: Tensor,
    bias: Tensor | None,
    origin: tuple[int, int, int],
    u: Tensor,
    a: Tensor,
    seed: Tensor | None,
    thresholds: Sequence[int],
    ranks: Sequence[int],
) -> None:
    """y = bias + drop(u a), for an fp32 tile of a larger matrix: what a GEMM then adds its product to.

    ``origin``: the tile's first row and column there, and that matrix's width. y: t x k; bias: k; u: t x R; a: R x k.
    """
    u, a_, bias = _fp32(u), _adapter(a), None if bias is None else _fp32(bias)
    _core.lr_fill(_matrix(y), _address(bias), origin, _address(u), _matrix(a_), _key(seed), thresholds, ranks, torch.get_num_threads())


def scale_add_(y0: Tensor, v: Tensor | None, a: Tensor | None, row_scale: Tensor, bias: Tensor | None) -> Tensor:
    """y0 += v a (rounded once, in place); returns row_scale * y0 + bias, computed before that rounding. y0: T x N; v: T x R; a: R x N."""
    v, a, row_scale = None if v is None else _fp32(v), _adapter(a), _fp32(row_scale)
    bias = None if bias is None else _fp32(bias)
    y = torch.empty(y0.shape, dtype=y0.dtype, device="cpu")
    _core.lr_scale_add(_matrix(y0), _address(v), _matrix(a), _address(row_scale), _address(bias), _matrix(y), torch.get_num_threads())
    return y


def bwd_dy(
    dy: Tensor, v: Tensor | None, b: Tensor | None, row_scale: Tensor | None, y0: Tensor | None, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dY0 in dy's dtype, dV = dY0 B, M_B = dY0^T V, sum_t dy, sum_t dy * y0) from one read of dy; what is not asked for has no elements.

    dy, y0: T x N; v: T x R; b: N x R; row_scale: N. Sums and products are fp32 and use dY0 before its rounding.
    """
    (t, n), none = dy.shape, torch.empty(0, dtype=torch.float32, device="cpu")
    v, b, row_scale = None if v is None else _fp32(v), _adapter(b), None if row_scale is None else _fp32(row_scale)
    rank = 0 if v is None else v.shape[1]
    scaled = none.to(dy.dtype) if row_scale is None else torch.empty(t, n, dtype=dy.dtype, device="cpu")
    dv = none if b is None else none.new_empty(t, b.shape[1])
    mb = none if v is None else none.new_empty(n, rank)
    db = none.new_empty(n) if need_bias else none
    dg = none if y0 is None else none.new_empty(n)
    out = [part.data_ptr() for part in (dv, mb, db, dg)]
    scaled_ = _ABSENT if row_scale is None else _matrix(scaled)
    _core.lr_bwd_dy(_matrix(dy), _address(v), rank, _matrix(b), _address(row_scale), _matrix(y0), scaled_, out, torch.get_num_threads())
    return scaled, dv, mb, db, dg


def checked(
    x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, u: Tensor, y: Tensor, da: Tensor, db: Tensor, dx: Tensor
) -> tuple[Callable[..., bool], Callable[..., bool]]:
    """(start, back): one segment's branch, forward and backward, of what has been checked, as start(x, a, b, bias, u, y, seed, scaling, threshold,
    threads) and back(dy, x, a, b, u, da, db, dx, seed, ...) -> whether all of it looks as it did; if not, nothing is written. All contiguous."""
    sizes = x.numel() // a.shape[1], a.shape[1], b.shape[0], a.shape[0]
    start, back = _core.lr_checked(x, a, b, bias, u, y, da, db, dx, sizes=sizes, data=_CODES[x.dtype], adapters=_CODES[a.dtype])
    return start, back


def dropout(x: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """drop(x) of segment 0, in x's dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    _core.lr_dropout(_matrix(x), _matrix(out), _key(seed), threshold, torch.get_num_threads())
    return out


def skinny_w(w: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(C = W A^T, squared norms of W's rows) from one read of W. w: N x K; a: R x K. Returns N x R and N, fp32."""
    a_ = _adapter(a)
    c, squares = torch.empty(w.shape[0], a.shape[0], dtype=torch.float32, device="cpu"), torch.empty(w.shape[0], dtype=torch.float32, device="cpu")
    _core.lr_skinny_w(_matrix(w), _matrix(a_), c.data_ptr(), squares.data_ptr(), torch.get_num_threads())
    return c, squares


def merge_(w: Tensor, v: Tensor, a: Tensor, row_scale: Tensor | None) -> Tensor:
    """W <- round(row_scale * (W + v a)), rounded once. w: N x K; v: N x R; a: R x K; row_scale: N.

    Returns fp64 [2]: (sum D * (W' - W), sum D * D) for the wanted change D.
    """
    v, a_, row_scale = _fp32(v), _adapter(a), None if row_scale is None else _fp32(row_scale)
    stats = torch.empty(2, dtype=torch.float64, device="cpu")
    _core.lr_merge(_matrix(w), _address(v), _matrix(a_), _address(row_scale), stats.data_ptr(), torch.get_num_threads())
    return stats

"""The frozen product of a dense base layer, x W^T + b and dY W: torch's GEMM, except where torch has none worth the name.

A CPU without bf16/fp16 arithmetic runs torch's 16-bit GEMM element by element: 4.6 s instead of 48 ms for 2048 x 1024 x 1024 forward and back (EPYC,
AVX2). There tiles of both operands are widened to fp32 scratch of bounded size, multiplied by the fp32 GEMM and rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library
from torch.utils.flop_counter import register_flop_formula

_SCRATCH = 1 << 22  # elements widened at a time, of the weight and of the rows: 16 MB each
_lib = Library("fusedadapt", "FRAGMENT")
_lib.define("dense_widened(Tensor x, Tensor w, Tensor? bias, bool transposed) -> Tensor")


@functools.cache
def _probe(dtype: torch.dtype) -> bool:
    probe = torch.ops.mkldnn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else torch.ops.mkldnn._is_mkldnn_fp16_supported
    return bool(probe())


@torch.compiler.assume_constant_result  # type: ignore[no-untyped-call, untyped-decorator]
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU's torch has a GEMM for a 16-bit dtype. The same throughout a process: a compiled graph takes the answer as a constant."""
    return _probe(dtype)


def widens(x: Tensor) -> bool:
    """True where the product of 16-bit matrices goes through fp32 tiles."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and not multiplies(x.dtype)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias. x: T x K; w: N x K."""
    if widens(w):
        out: Tensor = torch.ops.fusedadapt.dense_widened(x, w, bias, False)
        return out
    return F.linear(x, w, bias)


def linear_dx(dy: Tensor, w: Tensor) -> Tensor:
    """dy W. dy: T x N, in fp32 where W `widens` too; w: N x K."""
    if widens(w):
        out: Tensor = torch.ops.fusedadapt.dense_widened(dy, w, None, True)
        return out
    return dy @ w


def check(x: Tensor, w: Tensor, transposed: bool) -> None:
    """Raises ValueError where x does not fit the weight."""
    inner = w.shape[0 if transposed else -1]
    if x.dim() != 2 or w.dim() != 2 or x.shape[1] != inner:
        raise ValueError(f"fusedadapt.dense_widened: expected x of {inner} columns; got {tuple(x.shape)}; pass matching shapes")


def widened(
    x: Tensor, w: Tensor, bias: Tensor | None, transposed: bool, start: Callable[[Tensor, Tensor | None, int, int], None] | None = None
) -> Tensor:
    """x W^T + bias, or x W where ``transposed``. ``start`` fills an fp32 tile with what its product is added to: it gets the tile, the bias's part
    (fp32) and the tile's first row and column; none: the bias, or nothing."""
    check(x, w, transposed)
    inner, width = (w.shape[0], w.shape[1]) if transposed else (w.shape[1], w.shape[0])
    y = x.new_empty(x.shape[0], width)
    block = max(64, _SCRATCH // max(1, inner))
    wide_bias = None if bias is None else bias.float()
    for j in range(0, width, block):
        right = (w[:, j : j + block] if transposed else w[j : j + block].t()).float()
        under = None if wide_bias is None else wide_bias[j : j + block]
        for i in range(0, x.shape[0], block):
            rows, out = x[i : i + block].float(), y[i : i + block, j : j + block]
            tile = out if out.dtype == torch.float32 else right.new_empty(out.shape)
            if start is not None:
                start(tile, under, i, j)
                tile.addmm_(rows, right)
            elif under is None:
                torch.mm(rows, right, out=tile)
            else:
                torch.addmm(under, rows, right, out=tile)
            if tile is not out:
                out.copy_(tile)
    return y


def _fake(x: Tensor, w: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1] if transposed else w.shape[0])


def _flops(x: Any, w: Any, *_: Any, **__: Any) -> int:
    return 2 * int(x[0]) * int(w[0]) * int(w[1])


_lib.impl("dense_widened", lambda x, w, bias, transposed: widened(x, w, bias, transposed), "CompositeExplicitAutograd")
torch.library.register_fake("fusedadapt::dense_widened", _fake, lib=_lib)
register_flop_formula(torch.ops.fusedadapt.dense_widened)(_flops)

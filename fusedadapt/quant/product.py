"""What products with a packed weight share, activations coded or not: the check of their input, and the way back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..autocast import autocasting
from ..derivatives import remember
from ..ops.quant import misfit
from ..reference.quant import Parts
from .tensor import QuantizedTensor

#: the gradients of a packed weight, the last inputs of a function. (Saved tensors may be asked for once only: checkpointing computes them anew.)
NO_PARTS = (None,) * len(Parts._fields)


def checked_input(x: Tensor, qw: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """x as [T, K], cast under autocast as nn.Linear's input is. ValueError, TypeError where it or the bias does not fit the weight."""
    name = "fusedadapt.quantized_linear"
    for what, t in (("x", x), ("bias", bias)):
        if not isinstance(t, Tensor) and (t is not None or what == "x"):
            raise TypeError(f"{name}: expected {what}: a tensor; got {type(t).__name__}; convert it")
        if t is not None and (got := misfit(t)) is not None:
            raise ValueError(f"{name}: expected {what}: dense, in float32, bfloat16, float16 or float64; got {got}; convert it")
    if not isinstance(qw, QuantizedTensor):
        raise TypeError(f"{name}: expected a QuantizedTensor; got {type(qw).__name__}; make one with fusedadapt.quantize")
    if len(qw.shape) != 2 or x.dim() < 1 or x.shape[-1] != qw.columns:
        shapes = f"x {tuple(x.shape)}, weight {tuple(qw.shape)}"
        raise ValueError(f"{name}: expected x of {qw.shape[-1]} columns and a weight of two dimensions; got {shapes}; pass matching shapes")
    kind = x.device.type
    if autocasting(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    return x.reshape(math.prod(x.shape[:-1]), qw.columns)


def save(ctx: Any, x: Tensor, bias: Tensor | None, spec: str, n: int, parts: tuple[Tensor | None, ...]) -> None:
    """Keeps the packed weight by reference, and nothing else."""
    remember(ctx)
    ctx.spec, ctx.shape = spec, (n, x.shape[1])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*parts)


def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dbias), as far as they are needed; the first two inputs of the function are x and the bias."""
    dx = d_bias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.fusedadapt.q_linear_dx(dy, *ctx.saved_tensors, ctx.spec, *ctx.shape)
    if ctx.needs_input_grad[1]:
        wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
        d_bias = dy.sum(0, dtype=wide).to(ctx.bias_dtype)
    return dx, d_bias

"""`quantized_linear`: y = x W^T + b and dx = dy W from the same packed weight. Nothing dequantized is saved, and x is not needed at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..autocast import autocasting
from ..ops import quant as ops
from .activations import quantized_linear_act
from .tensor import QuantizedTensor


class QuantizedMatmul(torch.autograd.Function):
    """(x [T, K], bias [N] | None, spec, n, *parts) -> y [T, N]. Saved: the packed weight, by reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, spec: str, n: int, *parts: Tensor | None) -> Tensor:
        ctx.spec, ctx.shape = spec, (n, x.shape[1])
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(*parts)
        y: Tensor = torch.ops.fusedadapt.q_linear(x, *parts, bias, spec, n)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = d_bias = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.fusedadapt.q_linear_dx(dy, *ctx.saved_tensors, ctx.spec, *ctx.shape)
        if ctx.needs_input_grad[1]:
            wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
            d_bias = dy.sum(0, dtype=wide).to(ctx.bias_dtype)
        return dx, d_bias, None, None, *([None] * len(ctx.saved_tensors))


_apply: Any = QuantizedMatmul.apply


def quantized_linear(x: Tensor, qw: QuantizedTensor, bias: Tensor | None = None, *, activations: str | None = None) -> Tensor:
    """x W^T + bias with a weight in few bits, forward and backward from the packed bytes.

    Sums in fp32 and rounds once to x's dtype. Any number of tokens, any N and K; few tokens take a kernel that reads the packed weight once, many
    take the library's GEMM over dequantized pieces of bounded size.

    Args:
        x: [..., K] in fp32, bf16, fp16 or fp64; under autocast it is cast as nn.Linear's input is.
        qw: a weight [N, K], see `fusedadapt.quantize`. Gets no gradient.
        bias: [N].
        activations: "int8" or "fp8_e4m3": x is coded on the fly, too, and multiplied in 8 bits; see `fusedadapt.quant.quantized_linear_act`.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, before anything is computed. TypeError: ``qw`` is not a `QuantizedTensor`.
    """
    if activations is not None:
        return quantized_linear_act(x, qw, bias, activations)
    if not isinstance(qw, QuantizedTensor):
        raise TypeError(f"fusedadapt.quantized_linear: expected a QuantizedTensor; got {type(qw).__name__}; make one with fusedadapt.quantize")
    if len(qw.shape) != 2 or x.dim() < 1 or x.shape[-1] != qw.columns:
        raise ValueError(
            f"fusedadapt.quantized_linear: expected x of {qw.shape[-1]} columns and a weight of two dimensions; got x {tuple(x.shape)}, "
            f"weight {tuple(qw.shape)}; pass matching shapes"
        )
    if x.dtype not in ops.DTYPES:
        raise ValueError(f"fusedadapt.quantized_linear: expected x in float32, bfloat16, float16 or float64; got {x.dtype}; convert it")
    kind = x.device.type
    if autocasting(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    y: Tensor = _apply(x.reshape(-1, qw.columns), bias, qw.format.spec, qw.rows, *qw.parts)
    return y.view(*x.shape[:-1], qw.rows)

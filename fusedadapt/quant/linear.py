"""`quantized_linear`: y = x W^T + b and dx = dy W from the same packed weight. Nothing dequantized is saved, and x is not needed at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..derivatives import first_order, refuse_transforms
from ..ops import quant as _quant  # noqa: F401 - defines torch.ops.fusedadapt.q_*
from . import plain, product
from .activations import quantized_linear_act
from .tensor import QuantizedTensor


class QuantizedMatmul(torch.autograd.Function):
    """(x [T, K], bias [N] | None, spec, n, *parts) -> y [T, N]. Saved: the packed weight, by reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, spec: str, n: int, *parts: Tensor | None) -> Tensor:
        product.save(ctx, x, bias, spec, n, parts)
        y: Tensor = torch.ops.fusedadapt.q_linear(x, *parts, bias, spec, n)
        return y

    @staticmethod
    @first_order("fusedadapt.quantized_linear")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *product.gradients(ctx, dy), None, None, *product.NO_PARTS


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
    if (few := plain.product(x, qw, bias)) is not None:
        return few
    refuse_transforms("fusedadapt.quantized_linear")
    y: Tensor = _apply(product.checked_input(x, qw, bias), bias, qw.format.spec, qw.rows, *qw.parts)
    return y.view(*x.shape[:-1], qw.rows)

"""Linear layers with weights and activations in 8 bits: x is coded as it arrives, dx comes from the packed weight as if x had not been."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..derivatives import first_order, refuse_transforms
from ..ops import quant_act as ops
from . import product
from .tensor import QuantizedTensor


class QuantizedActMatmul(torch.autograd.Function):
    """(x [T, K], bias [N] | None, act, spec, n, *parts) -> y [T, N]. Saved: the packed weight, by reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, act: str, spec: str, n: int, *parts: Tensor | None) -> Tensor:
        product.save(ctx, x, bias, spec, n, parts)
        codes, scale = torch.ops.fusedadapt.q_act_quant(x, act)
        y: Tensor = torch.ops.fusedadapt.q_linear8(codes, scale, *parts, bias, act, spec, n, x.dtype)
        return y

    @staticmethod
    @first_order("fusedadapt.quant.quantized_linear_act")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *product.gradients(ctx, dy), None, None, None, *product.NO_PARTS


_apply: Any = QuantizedActMatmul.apply


def quantized_linear_act(x: Tensor, qw: QuantizedTensor, bias: Tensor | None = None, activations: str = "int8") -> Tensor:
    """x W^T + bias in 8 bits on both sides: W8A8 with activations coded on the fly.

    "int8": every row of x by its own scale absmax / 127, codes to nearest even, sums exact in integers (LLM.int8 without outliers, Dettmers et al.,
    arXiv:2208.07339). "fp8_e4m3": every row by absmax / 448; beside a weight in 128 x 128 blocks every 128 elements of a row, as DeepSeek-V3 does
    (arXiv:2412.19437); sums in fp32. A weight in "fp4_e2m1" goes with it (W4A8, ZeroQuant-FP, Wu et al., arXiv:2307.09782): its codes become E4M3
    numbers exactly. Scales are multiplied in fp32 and y is rounded once to x's dtype. A row of zeros gives exactly the bias; a row
    with a NaN or an infinity gives NaN.

    Gradients: dx = dy W and dbias; the coding of x counts as the identity, W is frozen.

    Args:
        x: [..., K] in fp32, bf16 or fp16 (fp64 is read as fp32); under autocast it is cast as nn.Linear's input is.
        qw: a weight [N, K] in the format that ``activations`` names: "int8" with a scale per row or ``group_axis="tensor"``, "fp8_e4m3" with a scale
            per row, ``group_axis="tensor"`` or ``group_axis="block"``, or "fp4_e2m1" beside "fp8_e4m3".
        bias: [N].
        activations: "int8" or "fp8_e4m3".

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or formats that do not fit, before anything is computed. TypeError: ``qw`` is not a `QuantizedTensor`.
    """
    refuse_transforms("fusedadapt.quant.quantized_linear_act")
    rows = product.checked_input(x, qw, bias)
    act = ops.activation_spec(activations, qw.format)
    y: Tensor = _apply(rows, bias, act, qw.format.spec, qw.rows, *qw.parts)
    return y.view(*x.shape[:-1], qw.rows)

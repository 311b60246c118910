"""Products with quantized activations, defined. x is coded row by row (fp8 beside 128 x 128 blocks of W: 1 x 128 blocks) as the format of its codes
says (`fusedadapt.quant.formats`), then

    int8   y = (sum_k qx qw) * s_w * s_x + bias       the sum exact in integers, up to CHUNK columns at a time; in fp32 from there on, in this order
                                                  (x may be as large as its dtype is: s_x comes last, so only what is too large itself overflows)
    fp8    y = sum_k (qx s_x) (qw s_w) + bias         summed in fp32, in any order; W in fp8, or in fp4_e2m1

rounded once to x's dtype. A row of zeros gives exactly 0 + bias, a row with a NaN or an infinity gives NaN, a group below 2^-120 counts as zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant.formats import QFormat
from .quant import Parts, dequantize, encode, scales, stats
from .quant_rules import RULES

#: columns whose products of 8-bit codes are added up in int32: 127 * 128 * CHUNK < 2^31
CHUNK = 1 << 17


def act_quant(x: Tensor, fmt: QFormat) -> tuple[Tensor, Tensor]:
    """(codes, uint8 of x's shape; scales, fp32 of `fmt.grid`). x: T x K."""
    lo, hi = stats(x, fmt)
    found = RULES[fmt.rule](x, lo, hi, fmt)
    return encode(x, found.factor, None, fmt), found.scale


def int8_sums(codes: Tensor, w: Tensor) -> Tensor:
    """sum_k codes[t, k] w[n, k] of int8 codes as fp32: exact integers per CHUNK columns, rounded, added in order. T x K, N x K."""
    total = torch.zeros(codes.shape[0], w.shape[0], device=codes.device, dtype=torch.float32)
    for k in range(0, w.shape[1], CHUNK):
        exact = codes[:, k : k + CHUNK].double() @ w[:, k : k + CHUNK].double().t()  # below 2^53: exact in any order
        total += exact.float()
    return total


def row_scales(parts: Parts, fmt: QFormat, n: int) -> Tensor:
    """One fp32 scale per row of W, of a format that has one per row or one for all."""
    return scales(parts, fmt).reshape(-1).expand(n)


def int8_linear(codes: Tensor, x_scale: Tensor, parts: Parts, fmt: QFormat, n: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y, T x N, from int8 codes (T x K, bytes) and scales of x. W: int8, one scale per row or for all."""
    y = int8_sums(codes.view(torch.int8), parts.qdata.view(torch.int8).view(n, -1))
    y = (y * row_scales(parts, fmt, n)) * x_scale.view(-1, 1)
    return (y if bias is None else y + bias.float()).to(dtype)


def fp8_linear(
    codes: Tensor, x_scale: Tensor, act: QFormat, parts: Parts, fmt: QFormat, n: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """y, T x N, from fp8 codes (T x K, bytes) and scales of x, coded as ``act``."""
    t, k = codes.shape
    x = dequantize(Parts(codes, x_scale), act, t, k, 0, t, torch.float32)
    y = x @ dequantize(parts, fmt, n, k, 0, n, torch.float32).t()
    return (y if bias is None else y + bias.float()).to(dtype)

"""The backend "cpp" of products with quantized activations: the functions of `reference.quant_act` on CPU tensors.

Codes and int8 products are computed by `_core` from addresses, the same bits for any number of threads. fp8 codes are widened: no CPU here has an
instruction for them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _core
from ..quant.formats import QFormat
from ..reference.quant import Parts
from ..reference.quant_act import row_scales
from .address import address
from .quant_act import widened_fp8_linear as fp8_linear

__all__ = ["act_quant", "fp8_linear", "int8_linear"]
_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_KINDS = {"int8": 0, "fp8_e4m3": 1}
_address = functools.partial(address, "q_*")


def act_quant(x: Tensor, fmt: QFormat) -> tuple[Tensor, Tensor]:
    """(codes, uint8 of x's shape; scales, fp32 of `fmt.grid`) from one pass over x. x: T x K, unit stride inside a row."""
    t, k = x.shape
    q, scale = torch.empty(t, k, dtype=torch.uint8, device="cpu"), torch.empty(fmt.grid(t, k), dtype=torch.float32, device="cpu")
    spec = (_address(x), _CODES[x.dtype], t, k, x.stride(0))
    _core.qa_quantize(spec, fmt.sides(t, k)[1], _KINDS[fmt.name], q.data_ptr(), scale.data_ptr(), torch.get_num_threads())
    return q, scale


def int8_linear(codes: Tensor, x_scale: Tensor, parts: Parts, fmt: QFormat, n: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y, T x N, from int8 codes (T x K, bytes) and scales of x."""
    t, k = codes.shape
    y, w_scale = torch.empty(t, n, dtype=dtype, device="cpu"), row_scales(parts, fmt, n).contiguous()
    bias_ = None if bias is None else bias.float().contiguous()
    _core.qa_int8_product(
        (_address(codes), _address(parts.qdata)), (_address(x_scale), _address(w_scale)), _address(bias_),
        (y.data_ptr(), _CODES[dtype]), (t, n, k), torch.get_num_threads(),
    )  # fmt: skip
    return y

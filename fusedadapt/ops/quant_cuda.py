"""Products of the quant family on a GPU in CUDA C++ (`csrc/cuda/quant_gemv.cu`), for a few tokens: `linear` of `reference.quant`. On CPU tensors the
same kernels run in the emulator (tests only).

Inputs are checked by `ops.quant`: fp32, bf16 or fp16, nothing empty. Sums are fp32, in an order that N, K and the format decide: results repeat bit
for bit, and a token's do not depend on the others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..quant.formats import QFormat
from ..quant.tables import table
from ..reference.quant import Parts

#: tokens of a product; csrc/cuda/quant.h, kMostTokens
FEW = 8
_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 6}
_VALUES = {"": 0, "e4m3": 2, "e5m2": 3}  # Value; other tables are looked up
_LOOKED_UP = 1
_SCALES = {"e8m0": 1, "e4m3": 2, "nested": 3, "e8m0_row": 4}  # ScaleCoding


def _core(device: torch.device) -> Any:
    module = dispatch.core() if device.type == "cuda" else dispatch.core_emulated()
    if module is None or not dispatch.has_cuda(module):
        raise RuntimeError(f"fusedadapt quant: expected a core with CUDA kernels for tensors on {device}; there is none; use another backend")
    return module.quant_cuda


@functools.lru_cache(maxsize=256)
def _numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """A table on a device, put there once."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def prepare(fmt: QFormat, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(values of the codes, of the codes of nested scales or None): what the kernels look up, on the device."""
    return _numbers(fmt.values, device), _numbers(table("dynamic").values, device) if fmt.scale == "nested" else None


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _weight(parts: Parts, fmt: QFormat, n: int, k: int) -> tuple[int, ...]:
    """Order: csrc/bindings_cuda_quant.cpp, `weight`."""
    values, dynamic = prepare(fmt, parts.qdata.device)
    tensors = (parts.qdata, values, parts.scale, dynamic, parts.super, parts.offset, parts.zero)
    grid = (1, fmt.block[1], 0) if fmt.flat else (*fmt.sides(n, k), fmt.grid(n, k)[1])
    coding = _SCALES.get(fmt.scale, 0)
    dtypes = (0 if coding else _CODES[parts.scale.dtype], 0 if parts.zero is None else _CODES[parts.zero.dtype])
    kinds = (fmt.bits, _VALUES.get(fmt.table, _LOOKED_UP), coding, *dtypes, -1 if fmt.signed else fmt.bias, fmt.flat)
    return *map(_address, tensors), n, k, fmt.row_bytes(k), *grid, *kinds


def takes(t: int, n: int, k: int, dtype: torch.dtype, fmt: QFormat) -> str:
    """Why `linear` does not take this product; "" if it does."""
    if t > FEW:
        return f"takes {FEW} tokens at most"
    return "" if n < 1 << 31 else "takes fewer than 2^31 outputs"


def small(t: int, n: int, k: int, dtype: torch.dtype, fmt: QFormat, transposed: bool) -> bool:
    """Whether this kernel beats dequantizing and the library's product: it reads a fraction of the bytes that those write and read."""
    return not transposed and not takes(t, n, k, dtype, fmt)


def linear(x: Tensor, parts: Parts, fmt: QFormat, n: int, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias, summed in fp32, rounded once. x: T x K, T at most `FEW`, unit stride inside a row."""
    t, k = x.shape
    if why := takes(t, n, k, x.dtype, fmt):
        raise ValueError(f"fusedadapt quant.linear: expected at most {FEW} tokens; got {t} x {k} and {n} outputs ({why}); use another backend")
    size = x.element_size()
    if k * size % 16 == 0 and (x.data_ptr() % 16 or x.stride(0) * size % 16):
        # A copy of a few rows is cheaper than taking the whole weight element by element.
        x = x.clone(memory_format=torch.contiguous_format)
    if bias is not None and (bias.dtype not in _CODES or not bias.is_contiguous()):
        bias = bias.to(torch.float32).contiguous()
    y = torch.empty(t, n, dtype=x.dtype, device=x.device)
    product = (x.data_ptr(), _address(bias), y.data_ptr(), t, x.stride(0), _CODES[x.dtype], 0 if bias is None else _CODES[bias.dtype])
    place = (x.device.index or 0, torch.cuda.current_stream(x.device).cuda_stream) if x.device.type == "cuda" else (0, 0)
    _core(x.device).gemv(_weight(parts, fmt, n, k), product, *place)
    return y

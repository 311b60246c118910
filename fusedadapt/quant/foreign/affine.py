"""Integer codes, scales and zeros on their way between other packings and `QuantizedTensor`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import format_of
from ..tensor import QuantizedTensor
from .parts import FLOATS, Affine, fault, refuse


def to_quantized(a: Affine, dtype: torch.dtype | None) -> QuantizedTensor:
    """The same codes. Below 8 bits zeros that are all 2^(bits - 1) become the symmetric format, which stores none."""
    middle = 1 << (a.bits - 1)
    symmetric = a.bits < 8 and bool((a.zeros == middle).all())
    fmt = format_of(f"int{a.bits}", -1 if a.group >= a.k else a.group, symmetric=symmetric, scale_dtype=a.scales.dtype)
    zero = None if symmetric else a.zeros.contiguous()
    return QuantizedTensor(a.qdata, a.scales.contiguous(), zero, None, None, fmt, torch.Size((a.n, a.k)), dtype or a.scales.dtype)


def from_quantized(qt: QuantizedTensor, op: str, name: str, widths: tuple[int, ...]) -> Affine:
    """What `to_quantized` was given. ValueError for formats without integer codes in groups along a row."""
    fmt, n, k = qt.format, qt.rows, qt.columns
    if fmt.table or fmt.bits not in widths or fmt.zero == "fp32" or fmt.rule == "absmean" or FLOATS.get(qt.scale.dtype) != fmt.scale:
        refuse(op, fault(name, f"integers of {', '.join(map(str, widths))} bits, with zeros that are integers", fmt.spec, "quantize in one of these"))
    if fmt.block[0] != 1 or len(qt.shape) != 2 or 0 in qt.shape:
        refuse(op, fault(name, "a matrix with elements and groups along its rows", f"{fmt.spec}, shape {tuple(qt.shape)}", "quantize it so"))
    qdata = qt.parts.qdata ^ 0x80 if fmt.signed else qt.parts.qdata  # two's complement to offset binary
    if qt.zero is None:
        zeros = torch.full_like(qt.scale, 128 if fmt.signed else fmt.bias, dtype=torch.uint8)
    else:
        zeros = qt.zero
    return Affine(qdata, qt.scale, zeros, fmt.bits, min(fmt.block[1] or k, k), n, k)


def pack4(codes: Tensor) -> Tensor:
    """4-bit codes [N, K], the first in the low nibble -> bytes [N, ceil(K / 2)]."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).contiguous()
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack4(qdata: Tensor, k: int) -> Tensor:
    """The inverse of `pack4`."""
    return torch.stack([qdata & 15, qdata >> 4], -1).view(len(qdata), -1)[:, :k]

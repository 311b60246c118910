"""HQQ layers: ``W_q``, ``scale``, ``zero`` and one tensor for each of nbits, axis, group_size and shape. w = (q - zero) * scale, the zero a float.

The weight is read as rows of group_size (axis 1), of which ``W_q`` packs several into a byte: with p rows in all, byte row i holds rows i, i + p / 2
(4 bits), i + p / 4, ... (2 bits), the first in the highest bits. 8 bits: as they are. Views as floating point are taken back.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...reference import quant as reference
from ..formats import FORMATS, QFormat
from ..tensor import QuantizedTensor
from .parts import FLOATS, Faults, Tensors, fault, finite, key, missing, raise_first

WIDTHS = (2, 4, 8)


def _number(tensors: Tensors, name: str, part: str) -> list[int] | None:
    t = tensors.get(key(name, part))
    return None if t is None or t.is_floating_point() or t.is_complex() else [int(v) for v in t.reshape(-1).tolist()]


def shape(tensors: Tensors, name: str) -> tuple[int, ...] | None:
    """(outputs, inputs), from the small tensor that says them; None without one."""
    found = _number(tensors, name, "shape")
    return None if found is None or len(found) != 2 else tuple(found)


def format_of(bits: int, group: int, k: int, scales: torch.dtype) -> QFormat:
    """`hqq4` at another width."""
    return replace(FORMATS["hqq4"], bits=bits, high=(1 << bits) - 1, block=(1, 0 if group >= k else group), scale=FLOATS[scales])


def faults(tensors: Tensors, name: str) -> Faults:
    """What makes a layer unreadable."""
    packed, scale, zero = (key(name, part) for part in ("W_q", "scale", "zero"))
    described = [key(name, part) for part in ("nbits", "shape")]
    if found := [*missing(tensors, (packed, scale, zero, *described))]:
        yield from found
        return
    bits, axis, shape = (_number(tensors, name, part) for part in ("nbits", "axis", "shape"))
    if bits is None or len(bits) != 1 or bits[0] not in WIDTHS:
        yield fault(described[0], f"one of {', '.join(map(str, WIDTHS))}", bits, "quantize with one of these widths")
        return
    if axis not in (None, [1]):
        yield fault(key(name, "axis"), "1: groups along the inputs", axis, "quantize with axis=1; groups of axis 0 are strewn over the outputs")
        return
    if shape is None or len(shape) != 2 or min(shape) < 1:
        yield fault(described[1], "outputs and inputs", shape, "the file is damaged: get it again")
        return
    groups, count = tensors[scale].numel(), shape[0] * shape[1]
    if groups == 0 or count % groups or shape[1] % (count // groups):
        expected = f"a number of scales that cuts rows of {shape[1]} into equal groups, {shape[0]} rows"
        yield fault(scale, expected, groups, "the file is cut off, or the group size divides no row: quantize with one that does")
        return
    for each in (scale, zero):
        if tensors[each].dtype not in FLOATS or tensors[each].numel() != groups:
            got = f"{tensors[each].dtype}, {tensors[each].numel()} elements"
            yield fault(each, f"{groups} floating-point numbers", got, "quantize without quant_scale and quant_zero")
            return
    if tensors[packed].nbytes * 8 != count * bits[0]:
        yield fault(packed, f"{count * bits[0] // 8} bytes for shape {tuple(shape)}", tensors[packed].nbytes, "the file is cut off")
    yield from finite(scale, tensors[scale])
    yield from finite(zero, tensors[zero])


def from_hqq(tensors: Tensors, name: str = "", *, dtype: torch.dtype | None = None) -> QuantizedTensor:
    """An HQQ layer of 2, 4 or 8 bits with axis 1, exactly.

    Args:
        tensors, name: the layer's tensors, as ``name.W_q`` and so on.
        dtype: of the weight; default the scales'.

    Raises:
        ValueError: names the tensor at fault, what was expected and what to do.
    """
    raise_first("from_hqq", faults(tensors, name))
    bits, shape = _number(tensors, name, "nbits"), _number(tensors, name, "shape")
    assert bits is not None and shape is not None
    (b,), (n, k) = bits, shape
    scale, zero = tensors[key(name, "scale")], tensors[key(name, "zero")]
    side = n * k // scale.numel()
    fmt = format_of(b, side, k, scale.dtype)
    data = tensors[key(name, "W_q")].contiguous().view(torch.uint8).view(-1)
    codes = torch.cat([(data >> shift) & (1 << b) - 1 for shift in range(8 - b, -1, -b)]) if b < 8 else data
    qdata = reference.pack(codes.view(n, k), fmt)
    grid = fmt.grid(n, k)
    scale, zero = scale.reshape(grid).contiguous(), zero.float().reshape(grid).contiguous()
    return QuantizedTensor(qdata, scale, zero, None, None, fmt, torch.Size((n, k)), dtype or scale.dtype)

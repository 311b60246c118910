"""AWQ checkpoints: 4-bit integers with a zero per group, "gemm" both ways, "gemv" for reading.

"gemm": ``qweight`` int32 [K, N / 8] and ``qzeros`` int32 [K / G, N / 8], eight outputs a word, nibble i being output ORDER[i]; ``scales`` [K / G, N].
"gemv": ``qweight`` int32 [N, K / 8], eight inputs a word in order; ``qzeros`` int32 [N, W] and ``scales`` [N, 8 W] filled up with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensor import QuantizedTensor
from .affine import from_quantized, pack4, to_quantized, unpack4
from .parts import (
    Affine,
    Faults,
    Tensors,
    bytes_to_words,
    check_group,
    fault,
    finite,
    key,
    raise_first,
    refuse,
    shaped,
    stream,
    word_faults,
    words,
    words_to_bytes,
)

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUPS = (32, 64, 128)


def layout(tensors: Tensors, name: str) -> str | None:
    """ "gemm" or "gemv", by the shapes; None if neither fits. As many rows of scales as of codes are outputs: groups of one there are none."""
    qweight, scales = tensors[key(name, "qweight")], tensors[key(name, "scales")]
    if scales.shape[0] == qweight.shape[0]:
        return "gemv"
    return "gemm" if scales.shape[1] == 8 * qweight.shape[1] else None


def shape(tensors: Tensors, name: str) -> tuple[int, int] | None:
    """(outputs, inputs), by the shapes of the tensors alone; None where they do not tell."""
    if [*word_faults(tensors, name)] or (kind := layout(tensors, name)) is None:
        return None
    rows, columns = tensors[key(name, "qweight")].shape
    return (8 * columns, rows) if kind == "gemm" else (rows, 8 * columns)


def faults(tensors: Tensors, name: str, group_size: int | None = None) -> Faults:
    """What makes a layer unreadable."""
    qweight, qzeros, scales = (key(name, part) for part in ("qweight", "qzeros", "scales"))
    if found := [*word_faults(tensors, name)]:
        yield from found
        return
    kind, rows, columns = layout(tensors, name), *tensors[qweight].shape
    if kind is None:
        got = f"{tuple(tensors[scales].shape)} beside qweight {(rows, columns)}"
        expected = f"shape (groups, {8 * columns}) or ({rows}, groups)"
        yield fault(scales, expected, got, "the file is cut off, or its tensors are those of different layers")
    elif kind == "gemm":
        groups = tensors[scales].shape[0]
        if rows % groups:
            yield fault(scales, f"a number of groups that divides {rows} inputs", groups, "the file is cut off")
        yield from shaped(qzeros, tensors[qzeros], (groups, columns), f"{groups} groups, {8 * columns} zeros of 4 bits")
    elif (side := _gemv_group(tensors, name, group_size)) is None:
        got = f"scales {tuple(tensors[scales].shape)}"
        sizes = group_size or f"{', '.join(map(str, GROUPS))}, one of them alone"
        yield fault(scales, f"as many columns as {8 * columns} inputs have in groups of {sizes}", got, "pass group_size=")
    else:
        wide = _width(8 * columns, side)
        yield from shaped(qzeros, tensors[qzeros], (rows, wide), f"groups of {side}")
    yield from finite(scales, tensors[scales])


def _width(k: int, group: int) -> int:
    """W: words of zeros in a row of the gemv layout."""
    multiple, groups = {32: 4, 64: 2}.get(group, 1), -(-k // group)
    needed = -(-groups // 8)
    return -(-needed // multiple) * multiple


def _gemv_group(tensors: Tensors, name: str, group_size: int | None) -> int | None:
    k, wide = 8 * tensors[key(name, "qweight")].shape[1], tensors[key(name, "scales")].shape[1]
    sizes = (k if group_size == -1 else group_size,) if group_size else GROUPS
    fitting = [g for g in sizes if k % g == 0 and 8 * _width(k, g) == wide]
    return fitting[0] if len(fitting) == 1 else None


def used_scales(tensors: Tensors, name: str, group_size: int | None) -> Tensor:
    """The scales of a layer without faults, less what fills up the "gemv" layout."""
    scales, group = tensors[key(name, "scales")], _gemv_group(tensors, name, group_size)
    return scales if group is None or layout(tensors, name) == "gemm" else scales[:, : 8 * tensors[key(name, "qweight")].shape[1] // group]


def from_awq(tensors: Tensors, name: str = "", *, group_size: int | None = None, dtype: torch.dtype | None = None) -> QuantizedTensor:
    """An AWQ layer ("gemm" or "gemv", by the shapes), exactly.

    Args:
        tensors, name: the layer's tensors, as ``name.qweight`` and so on.
        group_size: only for "gemv", where several sizes fit its padded scales; -1: a whole row.
        dtype: of the weight; default the scales'.

    Raises:
        ValueError: names the tensor at fault, what was expected and what to do.
    """
    check_group("from_awq", name, group_size)
    raise_first("from_awq", faults(tensors, name, group_size))
    qweight, qzeros = (words(tensors[key(name, part)]) for part in ("qweight", "qzeros"))
    scales = used_scales(tensors, name, group_size)
    if layout(tensors, name) == "gemm":
        k, n = qweight.shape[0], scales.shape[1]
        codes, zeros = _unshuffled(qweight).t(), _unshuffled(qzeros).t()
        return to_quantized(Affine(pack4(codes), scales.t(), zeros, 4, k // scales.shape[0], n, k), dtype)
    n, k = qweight.shape[0], 8 * qweight.shape[1]
    groups = scales.shape[1]
    return to_quantized(Affine(words_to_bytes(qweight), scales, stream(qzeros, 4, groups), 4, k // groups, n, k), dtype)


def to_awq(qt: QuantizedTensor, name: str = "") -> dict[str, Tensor]:
    """The tensors of an AWQ layer in the "gemm" layout; `from_awq` gives ``qt`` back.

    Raises:
        ValueError: a format without 4-bit integers in groups along a row; outputs in no multiple of 8, or inputs in no multiple of the group.
    """
    op = "to_awq"
    a = from_quantized(qt, op, name, (4,))
    if a.n % 8:
        refuse(op, fault(name, "outputs in multiples of 8, which share a word", a.n, "pad the layer to a multiple of 8, or leave it unquantized"))
    if a.k % a.group:
        refuse(op, fault(name, f"inputs in multiples of the group size {a.group}", a.k, "choose a group size that divides them"))
    if int(a.zeros.max()) > 15:
        refuse(op, fault(name, "zeros up to 15", int(a.zeros.max()), "read the GPTQ file again with wrap=True"))
    return {
        key(name, "qweight"): _shuffled(unpack4(a.qdata, a.k).t()),
        key(name, "qzeros"): _shuffled(a.zeros.t()),
        key(name, "scales"): a.scales.t().contiguous(),
    }


def _unshuffled(packed: Tensor) -> Tensor:
    """int32 [rows, N / 8] -> codes, uint8 [rows, N]."""
    codes = packed.new_empty(*packed.shape, 8, dtype=torch.uint8)
    for nibble, output in enumerate(ORDER):
        codes[..., output] = ((packed >> (4 * nibble)) & 15).to(torch.uint8)
    return codes.view(packed.shape[0], -1)


def _shuffled(codes: Tensor) -> Tensor:
    """The inverse of `_unshuffled`."""
    rows = codes.shape[0]
    return bytes_to_words(pack4(codes.reshape(rows, -1, 8)[..., list(ORDER)].reshape(rows, -1)))

"""What the converters share: finding tensors, naming faults, and words of packed codes.

Faults are generated one by one, each a text "tensor: expected ...; got ...; how to fix": a converter raises the first, `diagnose` collects all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ...reference import quant as reference
from ..formats import QFormat

Tensors = Mapping[str, Tensor]
Faults = Iterator[str]
FLOATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_INTEGERS = (torch.int32, torch.uint32)


def fault(name: str, expected: str, got: object, fix: str) -> str:
    """One fault, in the order in which it is read: where, what it should be, what it is, what to do."""
    return f"{name or 'the weight'}: expected {expected}; got {got}; {fix}"


def refuse(op: str, text: str) -> NoReturn:
    """ValueError of a converter."""
    raise ValueError(f"{op}: {text}")


def raise_first(op: str, faults: Iterable[str]) -> None:
    """ValueError with the first fault, if there is one."""
    for text in faults:
        refuse(op, text)


def key(name: str, part: str) -> str:
    """The name of a module's tensor; an empty ``name`` is a dict without prefixes."""
    return f"{name}.{part}" if name else part


def missing(tensors: Tensors, names: Iterable[str]) -> Faults:
    for name in names:
        if name not in tensors:
            yield fault(name, "this tensor beside the others of its layer", "none", "load the shard that holds it, or write the checkpoint again")


def matrix(tensors: Tensors, name: str, dtypes: Iterable[torch.dtype]) -> Faults:
    """Faults of a tensor that must have two dimensions, elements, and one of these dtypes."""
    t, wanted = tensors[name], tuple(dtypes)
    if t.dim() != 2 or 0 in t.shape:
        yield fault(name, "a matrix with elements", f"shape {tuple(t.shape)}", "it is cut off or of another format")
    if t.dtype not in wanted:
        yield fault(name, " or ".join(str(d).removeprefix("torch.") for d in wanted), str(t.dtype).removeprefix("torch."), "convert it")


def word_faults(tensors: Tensors, name: str) -> Faults:
    """Faults of qweight, qzeros and scales as such, which GPTQ and AWQ layers share; what their shapes mean is another matter."""
    names = [key(name, part) for part in ("qweight", "qzeros", "scales")]
    if found := [*missing(tensors, names)]:
        yield from found
        return
    for each, dtypes in zip(names, (_INTEGERS, _INTEGERS, FLOATS), strict=True):
        yield from matrix(tensors, each, dtypes)


def shaped(name: str, got: Tensor, wanted: tuple[int, ...], why: str) -> Faults:
    if tuple(got.shape) != wanted:
        yield fault(name, f"shape {wanted} ({why})", tuple(got.shape), "the file is cut off, or its tensors are those of different layers")


def finite(name: str, scales: Tensor) -> Faults:
    """A scale that is NaN or infinite makes its whole group so."""
    bad = ~scales.float().isfinite()
    if count := int(bad.sum()):
        at = tuple(int(i) for i in bad.nonzero()[0])
        yield fault(name, "finite scales", f"{count} of {bad.numel()} NaN or infinite, the first at {at}", "quantize this layer again")


#: how the texts of `zero_scales` end
ALL_ZERO = "all weights of these groups are 0 (scales too small for the dtype look like this)"


def zero_scales(name: str, scales: Tensor) -> Faults:
    """Not wrong by itself: every weight of the group is 0."""
    if count := int((scales == 0).sum()):
        yield f"{name}: {count} of {scales.numel()} scales are 0: {ALL_ZERO}"


def check_group(op: str, name: str, group_size: object) -> None:
    """ValueError if that is no group size: -1 is a whole row, None is not known."""
    if group_size is not None and (type(group_size) is not int or group_size < 1 and group_size != -1):
        refuse(op, fault(name, "group_size: a positive number, -1 or None", repr(group_size), "pass that of config.json"))


def words(t: Tensor) -> Tensor:
    """Packed words as int32."""
    return t.view(torch.int32) if t.dtype == torch.uint32 else t


def stream(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, words], each row a stream of codes from the lowest bit up -> codes, uint8 [rows, count]."""
    fmt = plain_bits(bits)
    data = words_to_bytes(packed)[:, : fmt.row_bytes(count)]
    return reference.unpack(data.contiguous(), fmt, packed.shape[0], count)


def to_stream(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `stream`; spare bits are 0."""
    return bytes_to_words(reference.pack(codes, plain_bits(bits)))


def bytes_to_words(data: Tensor) -> Tensor:
    """uint8 [rows, bytes] -> int32 [rows, words], filled up with zeros."""
    filled = torch.nn.functional.pad(data, (0, -data.shape[1] % 4)).contiguous()
    return filled.view(-1).view(torch.int32).view(len(data), -1)  # flat in between: the stride of a side of 1 may be anything


def words_to_bytes(packed: Tensor) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, bytes]."""
    return packed.contiguous().view(-1).view(torch.uint8).view(len(packed), -1)


def plain_bits(bits: int) -> QFormat:
    """A format for packing alone."""
    return QFormat(f"int{bits}", bits, "affine", (1, 0), high=(1 << bits) - 1)


def permuted(qdata: Tensor, bits: int, k: int, order: Tensor) -> Tensor:
    """Packed rows with their columns in another order: column j of the result is column order[j]. 256 rows at a time."""
    fmt, done = plain_bits(bits), []
    for piece in qdata.split(256):
        done.append(reference.pack(reference.unpack(piece, fmt, len(piece), k)[:, order].contiguous(), fmt))
    return torch.cat(done) if done else qdata


class Affine(NamedTuple):
    """Integer codes with a scale and a zero per row and group of columns: what GPTQ and AWQ files hold, however they pack it.

    ``qdata``: bytes of `plain_bits`, [N, bytes]; ``scales``, ``zeros``: [N, groups], the zeros uint8 values of the code that means 0.
    """

    qdata: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group: int
    n: int
    k: int

"""GPTQ checkpoints: qweight, qzeros, scales, g_idx of 2, 3, 4 or 8 bits, versions 1 and 2, with and without act-order.

``qweight`` int32 [ceil(K b / 32), N] and ``qzeros`` int32 [groups, ceil(N b / 32)] are streams of codes from the lowest bit up, along K and along N;
``scales`` [groups, N]; ``g_idx`` int32 [K], the group of every input. Version 1 stores a zero z as z - 1 modulo 2^b, version 2 as z. Files name their
version in config.json ("checkpoint_format": "gptq" or "gptq_v2"), and some name the wrong one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..tensor import QuantizedTensor
from .affine import from_quantized, to_quantized
from .parts import (
    Affine,
    Faults,
    Tensors,
    bytes_to_words,
    check_group,
    fault,
    finite,
    key,
    permuted,
    plain_bits,
    raise_first,
    refuse,
    shaped,
    stream,
    to_stream,
    word_faults,
    words,
    words_to_bytes,
)

WIDTHS = (2, 3, 4, 8)
VERSIONS = {1: 1, 2: 2, "gptq": 1, "gptq_v2": 2}
_ENOUGH = 16  # zeros, before that they are all the same says anything
_REST = ("qzeros", "scales")


def zeros_version(qzeros: Tensor, bits: int, n: int) -> int | None:
    """The version that symmetric zeros betray: all 2^(b-1) - 1 as in 0x77777777 is 1, all 2^(b-1) as in 0x88888888 is 2; others say nothing."""
    stored, middle = stream(words(qzeros), bits, n), 1 << (bits - 1)
    if stored.numel() < _ENOUGH:
        return None
    return 1 if bool((stored == middle - 1).all()) else 2 if bool((stored == middle).all()) else None


def guess_bits(tensors: Tensors, name: str) -> int | None:
    """The width the shapes allow; None if they allow several or none."""
    qweight, qzeros = tensors[key(name, "qweight")], tensors[key(name, "qzeros")]
    g_idx, n = tensors.get(key(name, "g_idx")), qweight.shape[1]
    fitting = [b for b in WIDTHS if -(-n * b // 32) == qzeros.shape[1] and (g_idx is None or -(-g_idx.numel() * b // 32) == qweight.shape[0])]
    return fitting[0] if len(fitting) == 1 else None


def faults(tensors: Tensors, name: str, bits: int | None = None, group_size: int | None = None) -> Faults:
    """What makes a layer unreadable. Stops where the rest cannot be judged."""
    qweight, qzeros, scales = (key(name, part) for part in ("qweight", *_REST))
    if found := [*word_faults(tensors, name)]:
        yield from found
        return
    if (bits or guess_bits(tensors, name)) not in WIDTHS:
        got = bits or f"qweight {tuple(tensors[qweight].shape)}, qzeros {tuple(tensors[qzeros].shape)}"
        yield fault(
            qweight, f"codes of {', '.join(map(str, WIDTHS))} bits, by the shapes", got, "pass bits=, or convert from the planar format first"
        )
        return
    bits = bits or guess_bits(tensors, name) or 4
    n, k = tensors[qweight].shape[1], inputs(tensors, name, bits)
    groups = tensors[scales].shape[0]
    yield from shaped(scales, tensors[scales], (groups, n), f"a column for each of qweight's {n}")
    yield from shaped(qzeros, tensors[qzeros], (groups, -(-n * bits // 32)), f"{groups} groups, {n} zeros of {bits} bits")
    yield from shaped(qweight, tensors[qweight], (-(-k * bits // 32), n), f"{k} inputs of {bits} bits")
    if groups > k:
        yield fault(scales, f"at most {k} groups, one per input", groups, "the tensors are those of different layers")
    yield from _index_faults(tensors, name, k, groups, group_size)
    yield from finite(scales, tensors[scales])


def side(k: int, groups: int, group_size: int | None) -> int:
    """Inputs that share a scale, of a layer without g_idx."""
    return k if group_size == -1 else group_size or -(-k // groups)


def _index_faults(tensors: Tensors, name: str, k: int, groups: int, group_size: int | None) -> Faults:
    index = tensors.get(key(name, "g_idx"))
    if index is None:
        if not group_size and k % groups:
            yield fault(key(name, "g_idx"), f"g_idx, as {k} inputs are no multiple of {groups} groups", "none", "pass group_size=")
        elif (wanted := -(-k // side(k, groups, group_size))) != groups:
            expected = f"{wanted} groups, which {k} inputs have in groups of {group_size}"
            yield fault(key(name, "scales"), expected, groups, "pass the group size of this file, or the shard with its g_idx")
        return
    if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
        got = f"{index.dtype}, shape {tuple(index.shape)}"
        yield fault(key(name, "g_idx"), "integers, one per input", got, "write it as int32")
    elif index.numel() and not (0 <= int(index.min()) and int(index.max()) < groups):
        yield fault(
            key(name, "g_idx"), f"groups from 0 to {groups - 1}", f"{int(index.min())} to {int(index.max())}", "the file is damaged: get it again"
        )


def inputs(tensors: Tensors, name: str, bits: int) -> int:
    """K: as many as g_idx has, or as qweight holds."""
    index = tensors.get(key(name, "g_idx"))
    return tensors[key(name, "qweight")].shape[0] * 32 // bits if index is None else index.numel()


def shape(tensors: Tensors, name: str, bits: int | None) -> tuple[int, int] | None:
    """(outputs, inputs), by the shapes of the tensors alone; None where they do not tell."""
    if [*word_faults(tensors, name)] or (width := bits or guess_bits(tensors, name)) not in WIDTHS or width is None:
        return None
    return tensors[key(name, "qweight")].shape[1], inputs(tensors, name, width)


def _version(op: str, tensors: Tensors, name: str, bits: int, n: int, version: int | str | None, trust: bool) -> int:
    if version is not None and version not in VERSIONS:
        expected = "version 1 (gptq) or 2 (gptq_v2)"
        refuse(op, fault(key(name, "qweight"), expected, repr(version), "convert the file to one of these, e.g. with the tool that wrote it"))
    said = None if version is None else VERSIONS[version]
    seen = zeros_version(tensors[key(name, "qzeros")], bits, n)
    if said is None and seen is None:
        expected = "version=1 (checkpoint_format gptq) or 2 (gptq_v2), as the zeros are not symmetric and do not tell"
        refuse(op, fault(key(name, "qzeros"), expected, None, "see quantization_config in config.json"))
    if said is not None and seen not in (None, said) and not trust:
        refuse(op, mislabelled(tensors, name, said, seen))
    return said or seen or 1


def mislabelled(tensors: Tensors, name: str, said: int, seen: int | None) -> str:
    """The fault of zeros that are those of the other version: every weight would be off by one step of its group."""
    word = int(words(tensors[key(name, "qzeros")])[0, 0]) & 0xFFFFFFFF
    fix = f"the label is wrong: pass version={seen} (or trust=True)"
    return fault(key(name, "qzeros"), f"zeros of version {said}, as labelled", f"0x{word:08x}, symmetric zeros of version {seen}", fix)


def from_gptq(
    tensors: Tensors,
    name: str = "",
    *,
    bits: int | None = None,
    version: int | str | None = None,
    group_size: int | None = None,
    trust: bool = False,
    wrap: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[QuantizedTensor, Tensor | None]:
    """A GPTQ layer, exactly, and the order of its inputs.

    With act-order (``g_idx`` not ascending) groups are scattered over the columns, which our formats cannot say: the columns are then put into the
    order of their groups. Returns (weight, order): column j of the weight is input order[j], so y = x[:, order] @ weight.T; None if nothing moved.
    Groups of unequal length are cut into equal ones (the greatest common divisor), their scales repeated.

    Args:
        tensors, name: the layer's tensors, as ``name.qweight`` and so on.
        bits: 2, 3, 4 or 8; None: by the shapes.
        version: 1 or "gptq", 2 or "gptq_v2"; None: by symmetric zeros.
        group_size: only needed without ``g_idx``, where the last group is short; -1: a whole row.
        trust: take ``version`` even where the zeros contradict it.
        wrap: version 1's stored 2^b - 1 means 0, as quantizers mean it; False: 2^b, as kernels that do not wrap read it.
        dtype: of the weight; default the scales'.

    Raises:
        ValueError: names the tensor at fault, what was expected and what to do.
    """
    op = "from_gptq"
    check_group(op, name, group_size)
    raise_first(op, faults(tensors, name, bits, group_size))
    bits = bits or guess_bits(tensors, name) or 4
    qweight, scales = words(tensors[key(name, "qweight")]), tensors[key(name, "scales")]
    n, k, groups = qweight.shape[1], inputs(tensors, name, bits), scales.shape[0]
    seen = _version(op, tensors, name, bits, n, version, trust)
    zeros = stream(words(tensors[key(name, "qzeros")]), bits, n).to(torch.int16)
    if seen == 1:
        zeros = (zeros + 1) % (1 << bits) if wrap else zeros + 1
    if int(zeros.max()) > 255:
        refuse(op, fault(key(name, "qzeros"), "zeros up to 255", int(zeros.max()), "pass wrap=True"))
    qdata = words_to_bytes(qweight.t())[:, : plain_bits(bits).row_bytes(k)].contiguous()
    index = tensors.get(key(name, "g_idx"))
    ids = torch.arange(k, device=scales.device) // side(k, groups, group_size) if index is None else index.long()
    order = None if bool((ids.diff() >= 0).all()) else ids.argsort(stable=True)
    if order is not None:
        qdata, ids = permuted(qdata, bits, k, order), ids[order]
    group, at = _grouping(ids, groups)
    parts = scales.t()[:, at], zeros.t()[:, at].to(torch.uint8)
    return to_quantized(Affine(qdata, *parts, bits, group, n, k), dtype), order


def _grouping(ids: Tensor, groups: int) -> tuple[int, Tensor]:
    """(G, the file's group of each of ours) for ascending group numbers of the columns."""
    k = len(ids)
    starts = (ids.diff() != 0).nonzero().view(-1) + 1
    first = int(starts[0]) if len(starts) else k
    if len(starts) + 1 == groups and bool((starts == torch.arange(1, groups, device=ids.device) * first).all()) and k - first * (groups - 1) <= first:
        return first, torch.arange(groups, device=ids.device)
    side = math.gcd(*starts.tolist()) if len(starts) else k
    return side, ids[::side]


def to_gptq(qt: QuantizedTensor, name: str = "", *, order: Tensor | None = None, version: int | str = 1) -> dict[str, Tensor]:
    """The tensors of a GPTQ layer; `from_gptq` gives ``qt`` and ``order`` back. Scales keep their dtype (readers expect fp16: ``scale_dtype``).

    Raises:
        ValueError: a format without integers of 2, 3, 4 or 8 bits in groups along a row, or zeros that this version cannot store.
    """
    op = "to_gptq"
    a = from_quantized(qt, op, name, WIDTHS)
    if version not in VERSIONS:
        refuse(op, fault(name, "version 1 (gptq) or 2 (gptq_v2)", repr(version), "choose one"))
    most = (1 << a.bits) - 1
    if int(a.zeros.max()) > most + int(VERSIONS[version] == 1):
        refuse(op, fault(name, f"zeros up to {most}", int(a.zeros.max()), "read the file again with wrap=True"))
    zeros = (a.zeros.to(torch.int16) - int(VERSIONS[version] == 1)) & most
    ids = torch.arange(a.k, dtype=torch.int32, device=qt.device) // a.group
    qdata = a.qdata
    if order is not None:
        if order.shape != (a.k,) or not torch.equal(order.sort().values, torch.arange(a.k, device=order.device)):
            refuse(op, fault(name, f"order: every input from 0 to {a.k - 1} once", tuple(order.shape), "pass what from_gptq gave"))
        back = order.argsort()
        qdata, ids = permuted(qdata, a.bits, a.k, back), ids[back]
    return {
        key(name, "qweight"): bytes_to_words(qdata).t().contiguous(),
        key(name, "qzeros"): to_stream(zeros.t().contiguous().to(torch.uint8), a.bits),
        key(name, "scales"): a.scales.t().contiguous(),
        key(name, "g_idx"): ids,
    }

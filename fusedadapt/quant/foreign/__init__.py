"""Quantized layers of other libraries' checkpoints and ours: exact converters both ways, and what is wrong with a layer.

| | read | written |
|---|---|---|
| bitsandbytes nf4, fp4, any block size, double quantization, any quant_storage | `from_bitsandbytes` | `to_bitsandbytes` |
| GPTQ versions 1 and 2, 2, 3, 4 and 8 bits, act-order | `from_gptq` | `to_gptq` |
| bitsandbytes Linear8bitLt | `from_bitsandbytes` | - |
| HQQ of 2, 4 and 8 bits, axis 1 | `from_hqq` | - |
| AWQ "gemm"; "gemv" | `from_awq` | `to_awq`; - |
| fp8 with scales per tile, row or tensor | `from_fp8` | `to_fp8` |
| ours: plain tensors and a line of metadata | `from_plain` | `to_plain` |

Codes are moved, never requantized: reading what was written gives the same `QuantizedTensor`, writing what was read the same bytes.
Every function runs on the device of its tensors and raises ValueError that names the tensor, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...reference import quant as reference
from . import awq, bnb, gptq, hqq, plain
from .awq import from_awq, to_awq
from .bnb import from_bitsandbytes, to_bitsandbytes
from .gptq import VERSIONS, from_gptq, guess_bits, mislabelled, to_gptq, zeros_version
from .hqq import from_hqq
from .parts import Faults, Tensors, fault, finite, key, stream, words, zero_scales
from .plain import METADATA, from_fp8, from_plain, to_fp8, to_plain

__all__ = [
    "diagnose",
    "from_awq",
    "from_bitsandbytes",
    "from_fp8",
    "from_gptq",
    "from_hqq",
    "from_plain",
    "to_awq",
    "to_bitsandbytes",
    "to_fp8",
    "to_gptq",
    "to_plain",
    "zeros_version",
]
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def diagnose(
    tensors: Tensors,
    name: str,
    *,
    metadata: Mapping[str, str] | None = None,
    label: int | str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    block: tuple[int, int] = (128, 128),
) -> list[str]:
    """Everything wrong with a quantized layer, one line each, the tensor first; empty if nothing is.

    Shapes that do not fit each other, missing tensors, damaged descriptions, NaN, infinite and zero scales, codes out of range, groups that do not
    exist, GPTQ zeros of another version than the label says. Reads only.

    Args:
        tensors: of the layer, e.g. ``name.weight`` and ``name.weight.absmax``, or ``name.qweight``; others are ignored.
        name: of the module, e.g. "model.layers.0.mlp.up_proj".
        metadata: of the safetensors file, for our own layout: without it only the scales are looked at.
        label: config.json's checkpoint_format for GPTQ: "gptq" (1) or "gptq_v2" (2).
        bits, group_size, block: as `from_gptq`, `from_awq` and `from_fp8` take them, where shapes do not say.
    """
    weight = key(name, "weight")
    if key(name, "W_q") in tensors:
        return [*hqq.faults(tensors, name)]
    if bnb.row_key(weight) in tensors or any(other.startswith(f"{weight}.") for other in tensors):
        return [*bnb.faults(tensors, weight)]
    if any(key(name, part) in tensors for part in _PARTS):
        return [*_packed_faults(tensors, name, label, bits, group_size)]
    if metadata is not None and f"{METADATA}{weight}" in metadata:
        return [*_our_faults(tensors, metadata, weight)]
    if weight in tensors and tensors[weight].dtype in plain._FP8:
        return [*plain.fp8_faults(tensors, weight, block), *_zeros(tensors, f"{weight}_scale_inv", f"{weight}_scale")]
    return [*_scale_faults(tensors, weight)]


def _our_faults(tensors: Tensors, metadata: Mapping[str, str], weight: str) -> Faults:
    if found := [*plain.faults(tensors, metadata, weight)]:
        yield from found
        yield from _scale_faults(tensors, weight)
        return
    q = from_plain(tensors, metadata, weight)
    yield from finite(f"{weight}_scale", reference.scales(q.parts, q.format))
    if q.zero is not None:
        yield from finite(f"{weight}_zero", q.zero)


def _scale_faults(tensors: Tensors, weight: str) -> Faults:
    """Scales of our layout, as far as they can be read without its format."""
    for each in (f"{weight}_scale", f"{weight}_super", f"{weight}_offset"):
        if each in tensors and tensors[each].dtype.is_floating_point:
            yield from finite(each, tensors[each])


def _zeros(tensors: Tensors, *names: str) -> Faults:
    for each in names:
        if each in tensors and tensors[each].dtype.is_floating_point:
            yield from zero_scales(each, tensors[each].float())


def _packed_faults(tensors: Tensors, name: str, label: int | str | None, bits: int | None, group_size: int | None) -> Faults:
    """GPTQ or AWQ: GPTQ's words run along the inputs, so qweight has as many columns as scales."""
    shapes = [tensors[each].shape[-1:] for part in ("qweight", "scales") if (each := key(name, part)) in tensors]
    if key(name, "g_idx") not in tensors and len(shapes) == 2 and shapes[0] != shapes[1]:
        found = [*awq.faults(tensors, name, group_size)]
        yield from found or zero_scales(key(name, "scales"), awq.used_scales(tensors, name, group_size))
        return
    if found := [*gptq.faults(tensors, name, bits, group_size)]:
        yield from found
        return
    yield from _zeros(tensors, key(name, "scales"))
    bits, n, said = bits or guess_bits(tensors, name) or 4, tensors[key(name, "qweight")].shape[1], VERSIONS.get(label) if label else None
    seen = zeros_version(tensors[key(name, "qzeros")], bits, n)
    if said is not None and seen not in (None, said):
        yield mislabelled(tensors, name, said, seen)
    elif said is not None and seen is None:
        yield from _shifted(tensors, name, bits, n, said, group_size)


def _shifted(tensors: Tensors, name: str, bits: int, n: int, said: int, group_size: int | None) -> Faults:
    """Weights have a mean near 0, so codes and zeros have near means; read as the other version every one of them moves by a whole step.

    Looks at the first 256 outputs.
    """
    qweight, qzeros = (words(tensors[key(name, part)]) for part in ("qweight", "qzeros"))
    zeros, k = stream(qzeros, bits, n)[:, :256].float(), gptq.inputs(tensors, name, bits)
    codes, index = stream(qweight[:, :256].t(), bits, k).t().float(), tensors.get(key(name, "g_idx"))
    ids = torch.arange(k, device=codes.device) // gptq.side(k, len(zeros), group_size) if index is None else index.long()
    means = torch.zeros_like(zeros).index_add_(0, ids, codes) / ids.bincount(minlength=len(zeros)).clamp(min=1)[:, None]
    gaps = means - zeros
    gap, error = float(gaps.mean()), float(gaps.std()) / gaps.numel() ** 0.5
    seen = 1 if abs(gap - 1) < 0.25 else 2 if abs(gap) < 0.25 else said
    if seen != said and 4 * error < 0.25:
        got = f"zeros that lie {gap:.2f} below the codes on average, as version {seen} has them"
        yield fault(key(name, "qzeros"), f"zeros of version {said}, as labelled", got, f"if the model talks nonsense, read it with version={seen}")

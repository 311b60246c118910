"""Our own layout in safetensors files, and fp8 weights with a scale beside them.

Ours: ``name``, ``name_scale`` and, where the format has them, ``name_zero``, ``name_super``, ``name_offset`` (and ``name_order``, which is the
layer's: `QuantizedLinear.weight_order`); the file's metadata holds
"fusedadapt." + ``name``: JSON with the format's text, the weight's shape and its dtype, and "activations" where the layer has them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...ops.quant_act import ACTIVATIONS
from ..formats import FORMATS, MOST_STEPS, QFormat
from ..tensor import QuantizedTensor
from .parts import FLOATS, Faults, Tensors, fault, finite, missing, raise_first, refuse, shaped

METADATA = "fusedadapt."
#: end of the name of a `QuantizedLinear`'s weight_order, beside the weight's own tensors
ORDER = "_order"
_ENDS = {"qdata": "", "scale": "_scale", "zero": "_zero", "super": "_super", "offset": "_offset"}
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
_FP8 = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}


def to_plain(qt: QuantizedTensor, name: str = "weight", *, activations: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) for a safetensors file; `from_plain` gives ``qt`` back. ``name``: of the weight, e.g. "layers.0.up.weight";
    ``activations``: of its layer, which `load_model_` restores."""
    text = {"format": qt.format.spec, "shape": list(qt.shape), "dtype": str(qt.dtype).removeprefix("torch.")}
    text |= {} if activations is None else {"activations": activations}
    tensors = {f"{name}{end}": t for part, end in _ENDS.items() if (t := getattr(qt, part)) is not None}
    return tensors, {f"{METADATA}{name}": json.dumps(text)}


def _described(metadata: Mapping[str, str], name: str) -> tuple[QFormat, torch.Size, torch.dtype] | str:
    """Format, shape and dtype; or the fault."""
    where, damaged = f"metadata {METADATA}{name}", "the file is damaged: get it again"
    try:
        text = json.loads(metadata[f"{METADATA}{name}"])
        fmt = QFormat.parse(text["format"])
    except KeyError as error:
        return fault(where, "a description of the weight", f"none of {error}", "write the file with to_plain, its metadata included")
    except (ValueError, TypeError, AttributeError) as error:
        return fault(where, "JSON with a format's text", error, damaged)
    shape, dtype = text.get("shape"), _DTYPES.get(str(text.get("dtype")))
    if not isinstance(shape, list) or not shape or not all(isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in shape):
        return fault(where, "shape: a list of whole numbers", shape, damaged)
    if dtype is None:
        return fault(where, f"dtype among {', '.join(_DTYPES)}", text.get("dtype"), damaged)
    act = text.get("activations")
    if act is not None and act not in ACTIVATIONS:
        return fault(where, f"activations among {', '.join(ACTIVATIONS)}, or none", act, damaged)
    return fmt, torch.Size(shape), dtype


def shape(metadata: Mapping[str, str], name: str) -> torch.Size | None:
    """Of the weight; None if its description is damaged."""
    described = _described(metadata, name)
    return None if isinstance(described, str) else described[1]


def activations(metadata: Mapping[str, str], name: str) -> str | None:
    """What the layer of a weight whose description is sound codes x to."""
    found: str | None = json.loads(metadata[f"{METADATA}{name}"]).get("activations")
    return found


def _wanted(fmt: QFormat, shape: torch.Size) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part that the format has."""
    n, k = math.prod(shape[:-1]), shape[-1]
    grid = fmt.grid(n, k)
    parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"qdata": (fmt.packed(n, k), fmt.storage_dtype), "scale": (grid, fmt.scale_dtype)}
    if fmt.zero:
        parts["zero"] = grid, torch.uint8 if fmt.zero == "uint8" else torch.float32
    if (above := fmt.above(n, k)) is not None:
        parts["super"] = above, torch.float32
    if fmt.scale == "nested":
        parts["offset"] = (), torch.float32
    return parts


def faults(tensors: Tensors, metadata: Mapping[str, str], name: str) -> Faults:
    """What makes a weight of ours unreadable."""
    described = _described(metadata, name)
    if isinstance(described, str):
        yield described
        return
    fmt, shape, _ = described
    wanted = _wanted(fmt, shape)
    if found := [*missing(tensors, (f"{name}{_ENDS[part]}" for part in wanted))]:
        yield from found
        return
    for part, (size, dtype) in wanted.items():
        t, where = tensors[f"{name}{_ENDS[part]}"], f"{name}{_ENDS[part]}"
        if t.dtype != dtype:
            yield fault(where, f"{dtype} for {fmt.spec}", t.dtype, "the file is damaged, or its tensors are those of different weights")
        yield from shaped(where, t, size, f"{fmt.spec}, {tuple(shape)}")
    for part, end in _ENDS.items():
        if part not in wanted and f"{name}{end}" in tensors:
            yield fault(f"{name}{end}", f"no such tensor for {fmt.spec}", "one", "the file's tensors are those of different weights")
    if tensors[name].dtype == fmt.storage_dtype:
        yield from code_faults(name, tensors[name], fmt)
    t = tensors[f"{name}_scale"]
    if fmt.scale == "e8m0_row" and t.dtype == torch.uint8:
        if count := int(((t < 127 - MOST_STEPS) | (t > 127)).sum()):
            yield fault(f"{name}_scale", f"bytes from {127 - MOST_STEPS} to 127", f"{count} others", "the file is damaged: get it again")
    order = tensors.get(f"{name}{ORDER}")
    if order is not None and not (order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(shape[-1], device=order.device))):
        got = f"{order.dtype}, shape {tuple(order.shape)}"
        yield fault(f"{name}{ORDER}", f"int64, every input from 0 to {shape[-1] - 1} once", got, "the file is damaged: get it again")


def code_faults(name: str, qdata: Tensor, fmt: QFormat) -> Faults:
    """Codes that no quantizer writes: 3 in ternary, -128 in symmetric int8, those of NaN and infinity in fp8."""
    data = qdata.view(torch.uint8)
    if fmt.rule == "absmean":
        bad = (data & (data >> 1) & 0x55) != 0
    elif fmt.signed:
        bad = data == 0x80
    elif fmt.table in ("e4m3", "e5m2"):
        bad = (data & 0x7F) > (0x7E if fmt.table == "e4m3" else 0x7B)
    else:
        return
    if count := int(bad.sum()):
        yield fault(name, f"codes of {fmt.name}", f"{count} bytes out of range", "the file is damaged, or the codes are another format's")


def from_plain(tensors: Tensors, metadata: Mapping[str, str], name: str = "weight") -> QuantizedTensor:
    """The weight that `to_plain` wrote. Sharing its tensors.

    Raises:
        ValueError: names the tensor at fault, what was expected and what to do.
    """
    raise_first("from_plain", faults(tensors, metadata, name))
    described = _described(metadata, name)
    assert not isinstance(described, str)
    fmt, shape, dtype = described
    parts: dict[str, Any] = {part: tensors.get(f"{name}{end}") for part, end in _ENDS.items()}
    contiguous: dict[str, Any] = {part: None if t is None else t.contiguous() for part, t in parts.items()}
    return QuantizedTensor(**contiguous, format=fmt, shape=shape, dtype=dtype)


def _fp8_scale(tensors: Tensors, name: str) -> str | None:
    return next((k for end in ("_scale_inv", "_scale") if (k := f"{name}{end}") in tensors), None)


def _fp8_block(scale: Tensor, n: int, k: int, block: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns that share a scale (0: all of them), by the scale's shape: one number, one per row, or one per tile."""
    if scale.numel() == 1:
        return (0, 0)
    if scale.shape in ((n,), (n, 1)):
        return (1, 0)
    return block if scale.shape == (-(-n // block[0]), -(-k // block[1])) else None


def fp8_faults(tensors: Tensors, name: str, block: tuple[int, int] = (128, 128)) -> Faults:
    """What makes an fp8 weight unreadable."""
    where = _fp8_scale(tensors, name)
    if found := [*missing(tensors, (name, where or f"{name}_scale_inv"))]:
        yield from found
        return
    assert where is not None
    w, scale = tensors[name], tensors[where]
    if w.dtype not in _FP8 or w.dim() != 2 or 0 in w.shape:
        expected = "a matrix in float8_e4m3fn or float8_e5m2"
        yield fault(name, expected, f"{w.dtype}, shape {tuple(w.shape)}", "the checkpoint is not fp8, or its bytes need a view as one of these")
        return
    if scale.dtype not in FLOATS and scale.dtype != torch.float8_e8m0fnu:
        yield fault(where, "float32, float16, bfloat16 or float8_e8m0fnu", scale.dtype, "convert it")
    if _fp8_block(scale, w.shape[0], w.shape[1], block) is None:
        expected = f"1, {len(w)} or {-(-w.shape[0] // block[0])} x {-(-w.shape[1] // block[1])} scales for {tuple(w.shape)} in tiles of {block}"
        yield fault(where, expected, tuple(scale.shape), "pass the model's weight_block_size as block=; or the file is cut off")
    yield from finite(where, scale)
    yield from code_faults(name, w, FORMATS[_FP8[w.dtype]])


def from_fp8(tensors: Tensors, name: str = "weight", *, block: tuple[int, int] = (128, 128), dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    """An fp8 weight with ``name_scale_inv`` (tiles, as DeepSeek-V3 has them: w = code * scale) or ``name_scale`` (tiles, rows or the whole tensor).

    Args:
        tensors: a state dict; ``name`` in float8_e4m3fn or float8_e5m2.
        block: rows and columns of a tile (config.json's weight_block_size); edges may be short.
        dtype: of the weight.

    Raises:
        ValueError: names the tensor at fault, what was expected and what to do.
    """
    raise_first("from_fp8", fp8_faults(tensors, name, block))
    where = _fp8_scale(tensors, name)
    assert where is not None
    w, scale = tensors[name].contiguous(), tensors[where].contiguous()
    n, k = w.shape
    sides = _fp8_block(scale, n, k, block)
    assert sides is not None
    coded = scale.dtype == torch.float8_e8m0fnu
    fmt = replace(FORMATS[_FP8[w.dtype]], block=sides, scale="e8m0" if coded else FLOATS[scale.dtype])
    stored = (scale.view(torch.uint8) if coded else scale).view(fmt.grid(n, k))
    return QuantizedTensor(w, stored, None, None, None, fmt, w.shape, dtype)


def to_fp8(qt: QuantizedTensor, name: str = "weight") -> dict[str, Tensor]:
    """``name`` and ``name_scale_inv`` for tiles, ``name_scale`` for rows ([N, 1]) and whole tensors ([1]); `from_fp8` gives ``qt`` back.

    Raises:
        ValueError: another format, or groups that are none of these.
    """
    fmt = qt.format
    if fmt.name not in _FP8.values() or len(qt.shape) != 2 or fmt.block[1] == 1:
        got = f"{fmt.spec}, shape {tuple(qt.shape)}"
        refuse("to_fp8", fault(name, "a matrix in fp8_e4m3 or fp8_e5m2 with a scale per row, tile or tensor", got, "quantize it so"))
    scale = qt.scale.view(torch.float8_e8m0fnu) if fmt.scale == "e8m0" else qt.scale
    tiles = fmt.block not in ((0, 0), (1, 0))
    return {name: qt.qdata, f"{name}_scale_inv" if tiles else f"{name}_scale": scale if tiles or fmt.block == (1, 0) else scale.view(1)}

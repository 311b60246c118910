"""bitsandbytes layers. 4 bits: the tensors that its Linear4bit writes into a state dict.

``name`` the packed codes under any dtype, ``name.absmax``, ``name.quant_map``, with double quantization ``name.nested_absmax`` and
``name.nested_quant_map``, and ``name.quant_state.bitsandbytes__nf4`` (or fp4): JSON as bytes.

8-bit ones (Linear8bitLt): ``weight`` int8 [N, K], ``SCB`` beside it, the largest magnitude of every row, and ``weight_format``, 0 for rows in order.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from ..formats import FORMATS, NESTED_BLOCK, format_of
from ..tables import table
from ..tensor import QuantizedTensor
from .parts import FLOATS, Faults, Tensors, fault, finite, matrix, missing, raise_first, refuse, shaped
from .plain import code_faults

KINDS = ("nf4", "fp4")
_FIELDS = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TEXTS = {dtype: text for text, dtype in _DTYPES.items()}


def state_key(tensors: Tensors, name: str) -> str | None:
    """The tensor with the JSON of the layer ``name``."""
    return next((k for kind in KINDS if (k := f"{name}.quant_state.bitsandbytes__{kind}") in tensors), None)


def _state(t: Tensor) -> dict[str, Any] | None:
    try:
        state = json.loads(bytes(t.cpu().tolist())) if t.dtype == torch.uint8 and t.dim() == 1 else None
    except ValueError:
        return None
    return state if isinstance(state, dict) else None


def _state_faults(state: dict[str, Any] | None, name: str) -> Faults:
    if state is None:
        yield fault(name, "the bytes of a JSON object, uint8", "something else", "the file is damaged: get it again")
        return
    for field, kind in _FIELDS.items():
        if not isinstance(state.get(field), kind):
            yield fault(name, f"{field}: {kind.__name__}", repr(state.get(field)), "the file is damaged: get it again")
            return
    if state["quant_type"] not in KINDS or not name.endswith(state["quant_type"]):
        yield fault(name, "quant_type nf4 or fp4, as the tensor's name says", state["quant_type"], "the file is damaged: get it again")
    if state["dtype"] not in _DTYPES:
        yield fault(name, f"dtype among {', '.join(_DTYPES)}", state["dtype"], "convert the weight first")
    if not state["shape"] or not all(isinstance(side, int) and side >= 0 for side in state["shape"]):
        yield fault(name, "a shape of whole numbers", state["shape"], "the file is damaged: get it again")
    block = state["blocksize"]
    if block < 32 or block > 4096 or block & (block - 1):
        yield fault(name, "blocksize: a power of two from 32 to 4096", block, "quantize with one of these")


def shape(tensors: Tensors, name: str) -> tuple[int, ...] | None:
    """The shape of a layer of 4 bits, from its description; None if that is missing or damaged."""
    kind = state_key(tensors, name)
    state = None if kind is None else _state(tensors[kind])
    return None if kind is None or state is None or [*_state_faults(state, kind)] else tuple(state["shape"])


def row_key(name: str) -> str:
    """The scales of an 8-bit layer whose weight is ``name``."""
    return f"{name.removesuffix('weight')}SCB"


def _row_faults(tensors: Tensors, name: str) -> Faults:
    scale, form = row_key(name), f"{name}_format"
    if found := [*missing(tensors, (name,)), *(matrix(tensors, name, (torch.int8,)) if name in tensors else ())]:
        yield from found
        return
    if tensors[scale].dtype not in FLOATS:
        yield fault(scale, "floating-point numbers", tensors[scale].dtype, "the file is damaged: get it again")
    yield from shaped(scale, tensors[scale].reshape(-1), (len(tensors[name]),), "one number per output")
    if form in tensors and (said := tensors[form].reshape(-1)[:1].tolist()) != [0]:
        yield fault(form, "0, rows in their order", said[0] if said else "nothing", "save the model with bitsandbytes 0.45 or later")
    yield from finite(scale, tensors[scale])
    yield from code_faults(name, tensors[name], FORMATS["int8"])


def faults(tensors: Tensors, name: str) -> Faults:
    """What makes a layer unreadable."""
    if row_key(name) in tensors:
        yield from _row_faults(tensors, name)
        return
    kind = state_key(tensors, name)
    if found := [*missing(tensors, (name, f"{name}.absmax", kind or f"{name}.quant_state.bitsandbytes__nf4"))]:
        yield from found
        return
    assert kind is not None
    state = _state(tensors[kind])
    if wrong := [*_state_faults(state, kind)]:
        yield from wrong
        return
    assert state is not None
    count = math.prod(state["shape"])
    groups, size = -(-count // state["blocksize"]), tensors[name].nbytes
    if size != -(-count // 2):
        got = f"{size} bytes"
        yield fault(
            name, f"{-(-count // 2)} bytes for shape {tuple(state['shape'])}", got, "the file is cut off, or its tensors are of different layers"
        )
    absmax = tensors[f"{name}.absmax"]
    nested = f"{name}.nested_absmax" in tensors
    if (absmax.dtype == torch.uint8) != nested or not nested and absmax.dtype not in FLOATS:
        yield fault(f"{name}.absmax", "uint8 beside nested_absmax, or else float32", absmax.dtype, "load the shard that holds the rest of the layer")
        return
    yield from shaped(f"{name}.absmax", absmax.reshape(-1), (groups,), f"{count} weights in blocks of {state['blocksize']}")
    maps = {f"{name}.quant_map": state["quant_type"], f"{name}.nested_quant_map": "dynamic"}
    for each, wanted in maps.items():
        if each in tensors and not _is_table(tensors[each], wanted):
            yield fault(each, f"the {wanted} values", f"others: {tensors[each].reshape(-1)[:4].tolist()}, ...", "quantize with the standard ones")
    if nested:
        yield from _nested_faults(tensors, name, kind, state, groups)
    else:
        yield from finite(f"{name}.absmax", absmax)


def _is_table(t: Tensor, name: str) -> bool:
    values = torch.tensor(table(name).values, device=t.device)
    return t.shape == values.shape and bool(((t.float() - values).abs() <= 1e-6).all())


def _nested_faults(tensors: Tensors, name: str, kind: str, state: dict[str, Any], groups: int) -> Faults:
    above = tensors[f"{name}.nested_absmax"]
    if state.get("nested_blocksize") != NESTED_BLOCK:
        yield fault(kind, f"nested_blocksize {NESTED_BLOCK}", state.get("nested_blocksize"), "quantize with the standard one")
    elif above.dtype != torch.float32:
        yield fault(f"{name}.nested_absmax", "float32", above.dtype, "convert it")
    else:
        yield from shaped(f"{name}.nested_absmax", above.reshape(-1), (-(-groups // NESTED_BLOCK),), f"{groups} scales in blocks of {NESTED_BLOCK}")
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float) or not math.isfinite(offset):
        yield fault(kind, "nested_offset: a finite number", offset, "quantize this layer again")
    yield from finite(f"{name}.nested_absmax", above)


def from_bitsandbytes(tensors: Tensors, name: str = "weight") -> QuantizedTensor:
    """A layer of bitsandbytes, sharing its bytes where their dtype allows. Of 8 bits: w = code * (SCB / 127), "int8" with a scale per row.

    Args:
        tensors: a state dict, or the part of it that belongs to the layer.
        name: of the weight, e.g. "model.layers.0.mlp.up_proj.weight".

    Raises:
        ValueError: names the tensor at fault, what was expected and what to do.
    """
    raise_first("from_bitsandbytes", faults(tensors, name))
    if row_key(name) in tensors:
        w, scale = tensors[name].contiguous(), tensors[row_key(name)].reshape(-1, 1)
        return QuantizedTensor(w, (scale.float() / 127.0).contiguous(), None, None, None, FORMATS["int8"], w.shape, torch.float16)
    kind = state_key(tensors, name)
    assert kind is not None
    state = _state(tensors[kind])
    assert state is not None
    nested = f"{name}.nested_absmax" in tensors
    fmt = format_of(state["quant_type"], state["blocksize"], double_quant=nested)
    qdata = tensors[name].contiguous().view(-1).view(torch.uint8).view(-1, 1)
    scale = tensors[f"{name}.absmax"].reshape(-1).contiguous()
    above = tensors[f"{name}.nested_absmax"].reshape(-1).contiguous() if nested else None
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=scale.device) if nested else None
    shape = torch.Size(state["shape"])
    return QuantizedTensor(qdata, scale if nested else scale.float(), None, above, offset, fmt, shape, _DTYPES[state["dtype"]])


def to_bitsandbytes(qt: QuantizedTensor, name: str = "weight", *, quant_storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The tensors of a bitsandbytes layer; `from_bitsandbytes` gives ``qt`` back (``compat`` is not written: the codes mean the same).

    Args:
        qt: in nf4 or fp4, of any group size, with or without double quantization.
        name: of the weight.
        quant_storage: the dtype under which the bytes go, e.g. torch.bfloat16 for FSDP.

    Raises:
        ValueError: another format, or bytes that do not fill ``quant_storage``.
    """
    op, fmt = "to_bitsandbytes", qt.format
    if fmt.name not in KINDS or qt.dtype not in _TEXTS:
        refuse(op, fault(name, "nf4 or fp4 of float32, float16 or bfloat16", f"{fmt.spec} of {qt.dtype}", "quantize in one of these"))
    size = quant_storage.itemsize
    if qt.qdata.numel() % size:
        refuse(op, fault(name, f"bytes in multiples of {size} for {quant_storage}", qt.qdata.numel(), "pass quant_storage=torch.uint8"))
    nested = fmt.scale == "nested"
    state: dict[str, Any] = {"quant_type": fmt.name, "blocksize": fmt.block[1], "dtype": _TEXTS[qt.dtype], "shape": list(qt.shape)}
    found = {
        name: qt.parts.qdata.view(-1).view(quant_storage).view(-1, 1),
        f"{name}.absmax": qt.scale,
        f"{name}.quant_map": torch.tensor(table(fmt.name).values, device=qt.device) + 0.0,  # theirs has +0 for fp4's code of -0, too
    }
    if nested:
        assert qt.super is not None and qt.offset is not None
        found |= {f"{name}.nested_absmax": qt.super, f"{name}.nested_quant_map": torch.tensor(table("dynamic").values, device=qt.device)}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(qt.offset)}
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8).to(qt.device)
    return found | {f"{name}.quant_state.bitsandbytes__{fmt.name}": text}

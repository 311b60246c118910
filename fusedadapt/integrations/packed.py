"""Quantized base layers of this library and of others as `QuantizedTensor`s that share their bytes. Imports none of those libraries.

QuantizedLinear          ours
bitsandbytes Linear4bit  NF4 and FP4, with and without double quantization: the packed bytes, block scales and nested scales are taken as they are
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..quant.formats import NESTED_BLOCK, QFormat, format_of
from ..quant.layer import QuantizedLinear
from ..quant.tables import dynamic_map
from ..quant.tensor import QuantizedTensor


def is_packed(base: Any) -> bool:
    """Whether the layer's weight is one that this module can read."""
    return type(base) is QuantizedLinear or _is_linear4bit(base)


def _is_linear4bit(base: Any) -> bool:
    return type(base).__name__ == "Linear4bit" and type(base).__module__ == "bitsandbytes.nn.modules"


def why_not(base: Any) -> str:
    """What keeps this layer off the fast path; "" if nothing does."""
    if "forward" in vars(base):
        return f"{type(base).__name__} has a forward of its own"
    if type(base) is QuantizedLinear:
        return ""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return "Linear4bit is not quantized yet: move it to its device first"
    if state.quant_type not in ("nf4", "fp4"):
        return f"Linear4bit in {state.quant_type!r}"
    if getattr(state, "packing_format_for_cpu", False):
        return "Linear4bit was repacked for bitsandbytes' CPU inference"
    if state.nested and (state.state2.blocksize != NESTED_BLOCK or not _is_dynamic(state.state2.code)):
        return "Linear4bit with a nested map or block size that is not bitsandbytes' own"
    if not _same(state.code, format_of(state.quant_type).values):
        return f"Linear4bit with a code table that is not {state.quant_type}'s"
    return ""


def weight_of(base: Any) -> QuantizedTensor:
    """The layer's weight; every tensor shares memory with it."""
    if type(base) is QuantizedLinear:
        return base.quantized
    weight, state = base.weight, base.weight.quant_state
    fmt = _format(state.quant_type, state.blocksize, bool(state.nested))
    qdata = weight.detach().as_subclass(Tensor).view(torch.uint8).view(-1, 1)  # quant_storage may be any dtype
    if not state.nested:
        return QuantizedTensor(qdata, state.absmax, None, None, None, fmt, torch.Size(state.shape), state.dtype)
    inner = state.state2
    return QuantizedTensor(qdata, state.absmax, None, inner.absmax, state.offset.float().reshape(()), fmt, torch.Size(state.shape), state.dtype)


def _format(kind: str, block: int, nested: bool) -> QFormat:
    return format_of(kind, block, double_quant=nested)


# The tables of a layer are tensors on its device: comparing them in every call would wait for the device. Once for each tensor.
_compared: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _same(code: Tensor, values: tuple[float, ...]) -> bool:
    if code not in _compared:
        _compared[code] = code.detach().float().cpu().tolist() == list(values)
    return bool(_compared[code])


def _is_dynamic(code: Tensor) -> bool:
    return _same(code, tuple(torch.tensor(dynamic_map()).tolist()))

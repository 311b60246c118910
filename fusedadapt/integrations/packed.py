"""Quantized base layers of this library and of others as `QuantizedTensor`s that share their bytes. Imports none of those libraries.

QuantizedLinear          ours
bitsandbytes Linear4bit  NF4 and FP4, with and without double quantization: the packed bytes, block scales and nested scales are taken as they are
GPTQ, AWQ                layers that keep the checkpoint's own packing. It runs down the columns, ours along the rows, so these are packed anew, once:
                         half a byte per weight more while the model is patched. With act-order x is read in the order of the groups.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..quant.foreign import from_awq, from_gptq
from ..quant.formats import NESTED_BLOCK, QFormat, format_of
from ..quant.layer import QuantizedLinear
from ..quant.tables import dynamic_map
from ..quant.tensor import QuantizedTensor

# Classes that keep qweight, qzeros and scales as the checkpoint has them; the others of these libraries shuffle them for their kernels.
_WORDS = {
    "TorchQuantLinear": "gptq",
    "TritonV2QuantLinear": "gptq",
    "QuantLinear": "gptq",
    "WQLinear_GEMM": "awq",
    "WQLinear_GEMV": "awq",
    "AwqTorchQuantLinear": "awq",
}


_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Weight(NamedTuple):
    """A base layer's weight; ``order``: column j belongs to input order[j] (GPTQ's act-order), None: to input j."""

    packed: QuantizedTensor
    order: Tensor | None = None


def is_packed(base: Any) -> bool:
    """Whether the layer's weight is one that this module can read."""
    return type(base) is QuantizedLinear or _is_linear4bit(base) or bool(_words_kind(base))


def anchor(base: Any) -> Tensor:
    """The tensor that says where the layer lives."""
    found: Tensor = base.qweight if _words_kind(base) else base.weight
    return found


def _words_kind(base: Any) -> str:
    library = type(base).__module__.split(".")[0]
    return _WORDS.get(type(base).__name__, "") if library in ("gptqmodel", "auto_gptq", "awq") else ""


def _is_linear4bit(base: Any) -> bool:
    return type(base).__name__ == "Linear4bit" and type(base).__module__ == "bitsandbytes.nn.modules"


def returns_input_dtype(base: Any) -> bool:
    """Whether the layer's result has its input's dtype, under autocast too: with other libraries' layers, unlike ours and F.linear."""
    return _is_linear4bit(base) or bool(_words_kind(base))


def is_wrapped(module: Any) -> bool:
    """Whether the instance's forward is not its class's. accelerate's hooks, once removed, leave the class's own behind on the instance."""
    forward = vars(module).get("forward")
    return forward is not None and (getattr(forward, "__func__", None), getattr(forward, "__self__", None)) != (type(module).forward, module)


def no_form(base: Any) -> str:
    """Why a quantized layer of another kind than those above is left to its library."""
    name = type(base).__name__
    if name != "Linear8bitLt":
        return f"quantized base layer ({name}): no fused form"
    threshold = getattr(getattr(base, "state", None), "threshold", 0.0)
    more = f" and multiplies columns beyond {threshold:g} in 16 bits (llm_int8_threshold)" if threshold else ""
    return f"quantized base layer (Linear8bitLt): bitsandbytes codes x to int8{more}; the fused layer multiplies x as it is, which is another model"


def why_not(base: Any) -> str:
    """What keeps this layer off the fast path; "" if nothing does."""
    if is_wrapped(base):
        return f"{type(base).__name__} has a forward of its own"
    if type(base) is QuantizedLinear:
        codes = base.activations
        return "" if codes is None else f"QuantizedLinear codes x to {codes}; the fused layer multiplies x as it is, which is another model"
    if _words_kind(base):
        try:
            weight_of(base)
        except ValueError as error:
            return str(error)
        return ""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return "Linear4bit is not quantized yet: move it to its device first"
    if state.quant_type not in ("nf4", "fp4"):
        return f"Linear4bit in {state.quant_type!r}"
    if getattr(state, "packing_format_for_cpu", False):
        return "Linear4bit was repacked for bitsandbytes' CPU inference"
    if state.nested and (state.state2.blocksize != NESTED_BLOCK or not _is_table(state.state2.code, "dynamic")):
        return "Linear4bit with a nested map or block size that is not bitsandbytes' own"
    if not _is_table(state.code, state.quant_type):
        return f"Linear4bit with a code table that is not {state.quant_type}'s"
    return ""


def weight_of(base: Any) -> Weight:
    """The layer's weight; every tensor shares memory with it, but those of GPTQ and AWQ. ValueError if it is damaged."""
    if type(base) is QuantizedLinear:
        return Weight(base.quantized, base.weight_order)
    if _words_kind(base):
        return _repacked(base)
    weight, state = base.weight, base.weight.quant_state
    fmt = _format(state.quant_type, state.blocksize, bool(state.nested))
    with torch._C.DisableTorchFunctionSubclass():  # a plain tensor, which compilers follow where they refuse as_subclass
        qdata = weight.detach().view(torch.uint8).view(-1, 1)  # quant_storage may be any dtype
    if not state.nested:
        return Weight(QuantizedTensor(qdata, state.absmax, None, None, None, fmt, torch.Size(state.shape), state.dtype))
    inner, offset = state.state2, state.offset.float().reshape(())
    return Weight(QuantizedTensor(qdata, state.absmax, None, inner.absmax, offset, fmt, torch.Size(state.shape), state.dtype))


_repacks: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _repacked(base: Any) -> Weight:
    """Packed anew once for each qweight, and again if it was written to or moved."""
    key = (base.qweight.data_ptr(), *(0 if t.is_inference() else t._version for t in (base.qweight, base.scales, base.qzeros)))
    known = _repacks.get(base.qweight)
    if known is None or known[0] != key:
        tensors = {name: t for name in ("qweight", "qzeros", "scales", "g_idx") if isinstance(t := getattr(base, name, None), Tensor)}
        group = getattr(base, "group_size", None)
        group = base.in_features if group == -1 else group
        if _words_kind(base) == "awq":
            weight = Weight(from_awq(tensors, group_size=group))
        else:
            # The label says what a module holds in memory, which may not be what its file held.
            version = base.qzero_format() if hasattr(base, "qzero_format") else None
            weight = Weight(*from_gptq(tensors, bits=base.bits, version=version, group_size=group))
        known = _repacks[base.qweight] = (key, weight)
    found: Weight = known[1]
    return found


# bitsandbytes' block sizes. Made here: a compiler follows the attributes of a record that is there, not of one that a graph makes.
_FORMATS = {
    (kind, block, nested): format_of(kind, block, double_quant=nested) for kind in ("nf4", "fp4") for block in _BLOCKS for nested in (False, True)
}


def _format(kind: str, block: int, nested: bool) -> QFormat:
    block = operator.index(block)  # of a compiler's symbol, too
    return _FORMATS.get((kind, block, nested)) or format_of(kind, block, double_quant=nested)


# The tables of a layer are tensors on its device: comparing them in every call would wait for the device. Once for each tensor.
_compared: WeakIdKeyDictionary = WeakIdKeyDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_table(code: Tensor, kind: str) -> bool:
    """Whether a layer's code table is that of ``kind``: nf4, fp4, or "dynamic", the map of nested scales. A compiler asks once and traces nothing."""
    if code not in _compared:
        _compared[code] = code.detach().float().cpu().tolist()
    values = torch.tensor(dynamic_map(), dtype=torch.float32, device="cpu").tolist() if kind == "dynamic" else list(format_of(kind).values)
    return bool(_compared[code] == values)

"""PEFT's layers in this library's terms: what keeps a layer off the fast path, and its forward through one fused function.

Everything is read from the layer at every call and inside that call: adapters may be added, switched, scaled, merged or deleted between two of them,
and a sharded base holds its full weight only then. Nothing here imports PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..autocast import autocasting
from ..derivatives import transforming
from ..lowrank.dora import dora_linear_peft, dora_scale
from ..lowrank.functional import Output, Segment, lora_linear, lora_linear_group
from ..quant.tensor import QuantizedTensor
from . import packed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, nn.Parameter)
DISTRIBUTED = "the weight is distributed (DTensor)"
#: (scaling, dropout p): floats, or 0-d tensors in a compiled graph
Numbers = Sequence[tuple[float | Tensor, float | Tensor]]


class Kind(NamedTuple):
    """One of PEFT's layer classes. ``adapters``, ``dropouts``: the attributes that hold, by adapter name, its matrices and its dropout modules."""

    home: str  # the module that defines the class
    cls: str
    label: str
    adapters: str
    dropouts: str
    why_not: Callable[[Any, Sequence[str]], str]
    run: Callable[[Any, Tensor, Sequence[str], Numbers, bool], Tensor]


def names_of(layer: Any, kind: Kind) -> list[str]:
    """The active adapters that this layer has, in PEFT's order."""
    present = getattr(layer, kind.adapters)
    return [name for name in layer.active_adapters if name in present]


def idle(layer: Any, kind: Kind) -> str:
    """Why PEFT runs the base layer alone now; "" if adapters act."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "adapters are merged into the weight"
    return "" if names_of(layer, kind) else "none of the active adapters is on this layer"


def structural(layer: Any) -> str:
    """What rules the layer out for good: its base. "" if nothing does."""
    base = layer.base_layer
    if packed.is_packed(base):
        return packed.why_not(base)
    if getattr(layer, "quantization_backend", None) is not None or _is_quantized(base):
        return packed.no_form(base)
    if hasattr(base, "base_layer"):
        return "the base layer is itself an adapter layer"
    if type(base).__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads the weight of its out_proj and never calls that layer"
    if packed.is_wrapped(base):
        return f"base layer, a {type(base).__name__}, has a forward of its own, set by another library (a device map's or offloading hook?)"
    if not (_is_linear(base) or is_conv1d(base)):
        return f"base layer is a {type(base).__name__}; only nn.Linear and Conv1D have a fused form"
    return ""


def _is_quantized(base: Any) -> bool:
    packed = any(hasattr(base, name) for name in ("qweight", "quant_state", "qdata", "W_q"))
    return packed or type(base).__module__.startswith(("bitsandbytes", "hqq", "awq", "gptqmodel", "auto_gptq", "eetq", "aqlm"))


def _is_linear(module: Any) -> bool:
    """nn.Linear's own forward: a subclass may have another. A parametrized weight is computed at each reading, and may be another then."""
    own = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and not packed.is_wrapped(module)
    return own and not hasattr(module, "parametrizations")


def is_conv1d(module: Any) -> bool:
    """transformers' linear layer with a K x N weight (GPT-2)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils" and not packed.is_wrapped(module)


def weight_of(base: Any) -> Tensor | QuantizedTensor:
    """N x K."""
    if packed.is_packed(base):
        return packed.weight_of(base).packed
    weight: Tensor = base.weight
    return weight.t() if is_conv1d(base) else weight


def _is_dense(t: Any) -> bool:
    """A tensor whose memory holds its elements one by one: neither a subclass, nor sparse, nested or in a layout of another library."""
    return type(t) in _PLAIN and t.layout is torch.strided and not t.is_nested


def base_reason(layer: Any) -> str:
    """What keeps this call off the fast path, on the side of the base layer."""
    base = layer.base_layer
    if packed.is_packed(base):
        return packed.why_not(base) or _hooked("base layer", base)
    if not (_is_linear(base) or is_conv1d(base)):
        return f"base layer is a {type(base).__name__} or has a forward of its own"
    if not _is_dense(base.weight):
        kind = type(base.weight).__name__
        return DISTRIBUTED if kind == "DTensor" else f"base weight is a {kind} ({base.weight.layout}; quantized?): not yet on the fast path"
    if base.weight.dtype not in DTYPES or base.weight.dim() != 2:
        return f"base weight is {base.weight.dtype} with {base.weight.dim()} dimensions"
    return _hooked("base layer", base)


def _hooked(what: str, module: nn.Module) -> str:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return f"{what} has hooks: they fire only if it is called" if hooks else ""


def _dropout_reason(dropout: Any) -> str:
    if type(dropout) is nn.Dropout:
        if not torch.compiler.is_compiling() and dropout.p >= 1 and dropout.training:  # a graph must not depend on p; its op refuses 1
            return "dropout p = 1"
        return _hooked("dropout", dropout)
    return _hooked("dropout", dropout) if type(dropout) is nn.Identity else f"dropout is a {type(dropout).__name__}"


def _factor_reason(weight: Any, like: Tensor) -> str:
    if not _is_dense(weight):
        return f"adapter weight is a {type(weight).__name__} ({weight.layout})"
    if weight.device != like.device:
        return f"adapter weight on {weight.device}, base weight on {like.device}"
    if weight.dtype not in DTYPES or (weight.dtype == torch.float64) != (like.dtype == torch.float64):
        return f"{weight.dtype} adapter on a {like.dtype} base"
    return ""


def input_reason(layer: Any, x: Tensor) -> str:
    """What keeps this call off the fast path, on the side of x."""
    weight = packed.anchor(layer.base_layer)
    if not _is_dense(x):
        return f"input is a {type(x).__name__}, not a plain dense tensor"
    if not x.dtype.is_floating_point or x.dim() < 1:
        return f"input of {x.dtype} with {x.dim()} dimensions"
    if x.device != weight.device or x.device.type == "meta":
        return f"input on {x.device}, base weight on {weight.device}"
    if transforming() or forward_ad._current_level >= 0:
        return "a torch.func transform or forward-mode differentiation is active"
    if x.dtype == weight.dtype or autocasting(x.device.type) or packed.is_packed(layer.base_layer):
        return ""
    return f"{x.dtype} input to a {weight.dtype} base layer outside autocast"


def numbers_of(layer: Any, kind: Kind, name: str) -> tuple[float, float]:
    """(scaling, dropout p) of one adapter as PEFT has them now; p = 0 where its dropout does nothing."""
    scaling = layer.scaling[name] if hasattr(layer, "scaling") else 1.0
    return float(scaling), float(getattr(layer, kind.dropouts)[name].p) if drops(layer, kind, name) else 0.0


def scaling_reason(layer: Any, name: str) -> str:
    """A number is what the fused layer takes. A compiled graph must not look at it, and asks when it runs."""
    scaling = None if torch.compiler.is_compiling() else getattr(layer, "scaling", {}).get(name)
    if isinstance(scaling, Tensor) and (scaling.requires_grad or scaling.numel() != 1):
        return f"the scaling of adapter {name!r} is a tensor that " + ("needs a gradient" if scaling.requires_grad else "is no single number")
    return ""


def drops(layer: Any, kind: Kind, name: str) -> bool:
    """Whether a mask is drawn. PEFT's DoRA asks its layer's mode, too: dropouts that train in an eval model (Monte Carlo) do nothing."""
    dropout = getattr(layer, kind.dropouts)[name] if kind.dropouts else None
    return type(dropout) is nn.Dropout and dropout.training and (layer.training or not _is_dora(layer, name))


# ---- LoRA, rsLoRA, DoRA


def _is_dora(layer: Any, name: str) -> bool:
    return type(getattr(layer, "lora_variant", {}).get(name)).__name__ == "DoraLinearVariant"


def _lora_why_not(layer: Any, names: Sequence[str]) -> str:
    for name in names:
        variant = type(layer.lora_variant.get(name)).__name__
        # MiCA is a variant for its initialization only: its forward is LoRA's.
        if variant not in ("NoneType", "DoraLinearVariant", "MiCALinearVariant"):
            return f"adapter {name!r} is the variant {variant.removesuffix('LinearVariant')}"
        if variant == "DoraLinearVariant":
            if len(names) > 1:
                return "several active adapters of which one is DoRA: PEFT scales the results of those before it"
            if reason := _dora_why_not(layer, name):
                return reason
        a, b = layer.lora_A[name], layer.lora_B[name]
        if not (_is_linear(a) and _is_linear(b)) or a.bias is not None:
            return f"adapter {name!r} is made of {type(a).__name__} and {type(b).__name__}, not two plain linear layers"
        like = packed.anchor(layer.base_layer)
        reason = _hooked("lora_A", a) or _hooked("lora_B", b) or _dropout_reason(layer.lora_dropout[name])
        reason = reason or _factor_reason(a.weight, like) or _factor_reason(b.weight, like) or scaling_reason(layer, name)
        if not reason and not layer.cast_input_dtype_enabled and a.weight.dtype != like.dtype and not packed.is_packed(layer.base_layer):
            reason = f"casting of the input is disabled, and the adapter is {a.weight.dtype}"
        if reason:
            return reason
    return ""


def _dora_why_not(layer: Any, name: str) -> str:
    magnitude = layer.lora_magnitude_vector[name]
    if type(magnitude).__name__ != "DoraLinearLayer" or packed.is_wrapped(magnitude):
        return f"DoRA magnitude is a {type(magnitude).__name__}"
    if bool(magnitude.fan_in_fan_out) != is_conv1d(layer.base_layer):
        return "fan_in_fan_out does not match the base layer"
    return _hooked("DoRA magnitude", magnitude) or _factor_reason(magnitude.weight, packed.anchor(layer.base_layer))


def _lora_run(layer: Any, x: Tensor, names: Sequence[str], numbers: Numbers, paper_dora: bool) -> Tensor:
    base = layer.base_layer
    weight, bias = weight_of(base), base.bias
    if _is_dora(layer, names[0]):
        (s, p), name = numbers[0], names[0]
        a, b, magnitude = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.lora_magnitude_vector[name].weight
        if paper_dora:
            scale = dora_scale(weight, a, b, s, magnitude)
            return lora_linear(x, weight, a, b, bias=bias, scaling=s, dropout_p=p, row_scale=scale)
        return dora_linear_peft(x, weight, a, b, magnitude, bias=bias, scaling=s, dropout_p=p)
    order = packed.weight_of(base).order if packed.is_packed(base) else None
    if order is not None:
        x = x[..., order]
    segments, extra, ones = [], None, None
    for name, (s, p) in zip(names, numbers, strict=True):
        a = layer.lora_A[name].weight
        segments.append(Segment(a if order is None else a[:, order], layer.lora_B[name].weight, s, p))
        own = layer.lora_B[name].bias
        if own is not None:
            extra = own * s if extra is None else extra + own * s
    if extra is not None:
        bias = extra if bias is None else bias + extra
        if bias.dtype != weight.dtype and not packed.is_packed(base):  # only after a row scale is a bias wider than the weight added unrounded
            ones = torch.ones(bias.shape[0], dtype=bias.dtype, device=bias.device)
    return lora_linear_group(x, (Output(weight, bias, segments, ones),))[0]


# ---- AdaLoRA: E gates the ranks


def _adalora_why_not(layer: Any, names: Sequence[str]) -> str:
    like = packed.anchor(layer.base_layer)
    for name in names:
        a = layer.lora_A[name]
        if a.shape[0] == 0:
            return f"adapter {name!r} has rank 0"
        parts = (a, layer.lora_B[name], layer.lora_E[name], layer.ranknum[name])
        reasons = [_dropout_reason(layer.lora_dropout[name]), *(_factor_reason(part, like) for part in parts)]
        reasons.append(scaling_reason(layer, name))
        if reason := next(filter(None, reasons), ""):
            return reason
        if not layer.cast_input_dtype_enabled and a.dtype != like.dtype and not packed.is_packed(layer.base_layer):
            return f"casting of the input is disabled, and the adapter is {a.dtype}"
    return ""


def _adalora_run(layer: Any, x: Tensor, names: Sequence[str], numbers: Numbers, paper_dora: bool) -> Tensor:
    segments = []
    for name, (s, p) in zip(names, numbers, strict=True):
        # ranknum is a tensor on the device: it joins the gate, because reading it here would wait for the device.
        gate = layer.lora_E[name].reshape(-1) / (layer.ranknum[name] + 1e-5)
        segments.append(Segment(layer.lora_A[name], layer.lora_B[name], s, p, rank_gate=gate))
    return lora_linear_group(x, (Output(weight_of(layer.base_layer), layer.base_layer.bias, segments),))[0]


# ---- VeRA: shared frozen A and B, two trained vectors


def _vera_why_not(layer: Any, names: Sequence[str]) -> str:
    like = packed.anchor(layer.base_layer)
    for name in names:
        parts = (layer.vera_lambda_d[name], layer.vera_lambda_b[name])
        reasons = [_dropout_reason(layer.vera_dropout[name]), *(_factor_reason(part, like) for part in parts)]
        if reason := next(filter(None, reasons), ""):
            return reason
        for shared in (layer.vera_A[name], layer.vera_B[name]):
            if shared.dtype not in DTYPES or (shared.dtype == torch.float64) != (like.dtype == torch.float64):
                return f"{shared.dtype} projections on a {like.dtype} base"
    return ""


def _vera_run(layer: Any, x: Tensor, names: Sequence[str], numbers: Numbers, paper_dora: bool) -> Tensor:
    segments = []
    for name, (s, p) in zip(names, numbers, strict=True):
        a = layer.vera_A[name][:, : layer.in_features].to(x.device)
        b = layer.vera_B[name][: layer.out_features, :].to(x.device)
        segments.append(Segment(a, layer.vera_lambda_b[name].unsqueeze(1) * b, s, p, rank_gate=layer.vera_lambda_d[name]))
    y = lora_linear_group(x, (Output(weight_of(layer.base_layer), layer.base_layer.bias, segments),))[0]
    return y.to(x.dtype)  # under autocast too, unlike the other layers


# ---- IA3: a scale on the input or the output, no low-rank part


def _ia3_why_not(layer: Any, names: Sequence[str]) -> str:
    return next(filter(None, (_factor_reason(layer.ia3_l[name], packed.anchor(layer.base_layer)) for name in names)), "")


def _ia3_run(layer: Any, x: Tensor, names: Sequence[str], numbers: Numbers, paper_dora: bool) -> Tensor:
    base, scale = layer.base_layer, layer.ia3_l[names[0]].flatten()
    for name in names[1:]:
        scale = scale * layer.ia3_l[name].flatten()
    weight = weight_of(base)
    if not layer.is_feedforward:
        return lora_linear(x, weight, None, None, bias=base.bias, row_scale=scale, scale_bias=True)
    if scale.dtype == x.dtype and not autocasting(x.device.type):
        return lora_linear(x, weight, None, None, bias=base.bias, col_scale=scale)
    # A scale in a wider dtype: one rounding of the product, as in PEFT; col_scale would round the scale, too.
    return lora_linear((x * scale).to(x.dtype), weight, None, None, bias=base.bias)


KINDS = {
    "lora": Kind("peft.tuners.lora.layer", "Linear", "LoRA", "lora_A", "lora_dropout", _lora_why_not, _lora_run),
    "adalora": Kind("peft.tuners.adalora.layer", "SVDLinear", "AdaLoRA", "lora_A", "lora_dropout", _adalora_why_not, _adalora_run),
    "vera": Kind("peft.tuners.vera.layer", "Linear", "VeRA", "vera_lambda_d", "vera_dropout", _vera_why_not, _vera_run),
    "ia3": Kind("peft.tuners.ia3.layer", "Linear", "IA3", "ia3_l", "", _ia3_why_not, _ia3_run),
}
# PEFT has classes of their own for other libraries' layers, and we one for QuantizedLinear (it merges); what they compute is the same.
_ON_PACKED = {
    "lora": (
        ("peft.tuners.lora.bnb", "Linear4bit"),
        ("peft.tuners.lora.gptq", "GPTQLoraLinear"),
        ("peft.tuners.lora.awq", "AwqLoraLinear"),
        ("fusedadapt.integrations.peft_quantized", "Linear"),
    ),
    "adalora": (("peft.tuners.adalora.bnb", "SVDLinear4bit"),),
    "vera": (("peft.tuners.vera.bnb", "Linear4bit"),),
    "ia3": (("peft.tuners.ia3.bnb", "Linear4bit"),),
}
KINDS |= {f"{method} in {home}": KINDS[method]._replace(home=home, cls=cls) for method, places in _ON_PACKED.items() for home, cls in places}


def why_not(layer: Any, kind: Kind) -> str:
    """What keeps the layer off the fast path as it stands, whatever its input; "" if nothing does."""
    return structural(layer) or base_reason(layer) or order_reason(layer, kind) or kind.why_not(layer, names_of(layer, kind))


def order_reason(layer: Any, kind: Kind) -> str:
    """Only `_lora_run` reads x in the order of an act-order weight's columns."""
    base = layer.base_layer
    if not packed.is_packed(base) or packed.weight_of(base).order is None:
        return ""
    names = names_of(layer, kind)
    return "" if kind.run is _lora_run and not any(_is_dora(layer, name) for name in names) else f"{kind.label} on an act-order weight"

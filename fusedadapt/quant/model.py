"""`quantize_model_`: a model's nn.Linear layers, one after the other, in few bits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .formats import QFormat, format_of
from .layer import QuantizedLinear, replaced_forward
from .linears import kept_in_fp32, module_matches
from .report import LayerReport, Patterns, QuantizationReport, check_finite, checked_device, measured
from .tensor import QuantizedTensor, quantize

DEFAULT_SKIP = ("lm_head",)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_FIX_PLACED = "load the model without a device map, or accelerate.hooks.remove_hook_from_submodules(model)"


def quantize_model_(
    model: nn.Module,
    format: str | QFormat = "nf4",
    skip: str | Iterable[str] = DEFAULT_SKIP,
    device: torch.device | str | None = None,
    group_size: int | None = None,
    **options: Any,
) -> QuantizationReport:
    """Replaces a model's nn.Linear layers by `QuantizedLinear`, in place. There is no way back.

    One layer at a time: at most one layer's weight is held beside the model. (A state dict or an optimizer of yours that refers to the old weights
    keeps them alive.) Biases are shared, forward and backward hooks carried over.

    Args:
        model: on any device. What is exactly an nn.Linear is replaced. Left alone, with the reason in the report: subclasses, adapters' own layers,
            layers whose weight is tied to another module's, layers that torch's own modules read past their forward, and those that a model of
            transformers keeps in fp32.
        format, group_size, options: as `fusedadapt.quantize` takes them.
        skip: layers to leave alone: names ("lm_head"), ends of names ("q_proj"), globs ("model.layers.0.*"), or names of modules, with all inside.
        device: quantize there, e.g. "cuda"; the bytes come back to where the weight was. None: where the weight is.

    Returns:
        A report: per layer bits, error, SQNR, bytes and seconds; what was left alone and why; totals. ``str()`` of it is a table.

    Raises:
        ValueError: unknown format or option, weights that are NaN, infinite, too large for the format's scales, on the meta device, sharded or placed
            by hooks (named), no layer to quantize. TypeError: not a module. All of this before anything is replaced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model_: expected a torch.nn.Module; got {type(model).__name__}; for a tensor there is fusedadapt.quantize")
    if type(model) is nn.Linear:
        raise ValueError("quantize_model_: expected a model with layers inside; got a lone nn.Linear; use QuantizedLinear.from_linear")
    fmt, patterns, device = format_of(format, group_size, **options), Patterns(skip, "skip"), checked_device(device)
    report = QuantizationReport(fmt.spec)
    chosen = _choose(model, patterns, report)
    if patterns.patterns != DEFAULT_SKIP and (unused := patterns.unused()):
        report.notes.append(f"skip: no layer of that name: {', '.join(unused)}")
    for names, linear in chosen:
        if _check(names[0], linear) > _safe(fmt):
            _quantized(names[0], linear, fmt, device)  # to learn in time that a scale overflows; no usual weight is that large
    while chosen:  # taken from the list: a reference left behind would keep the old weight in memory
        names, linear = chosen.popleft()
        qt, layer = _quantized(names[0], linear, fmt, device)
        new = _like(linear, QuantizedLinear.from_quantized(qt.to(linear.weight.device), linear.bias))
        for name in names:
            model.set_submodule(name, new)
        report.layers.append(layer)
    return report


def _quantized(name: str, linear: nn.Linear, fmt: QFormat, device: torch.device | None) -> tuple[QuantizedTensor, LayerReport]:
    w = linear.weight.detach().to(device or linear.weight.device)
    return measured(name, w, lambda: quantize(w, fmt))


def _safe(fmt: QFormat) -> float:
    """Weights up to here overflow nothing: no rule's scale is above twice the largest of them, no code times its scale above that."""
    stored = fmt.scale_dtype if fmt.scale_dtype.is_floating_point else torch.float32
    return torch.finfo(stored).max / 8


def _choose(model: nn.Module, patterns: Patterns, report: QuantizationReport) -> deque[tuple[list[str], nn.Linear]]:
    """The layers to replace, each with all its names; the others go to the report with the reason."""
    owners, keep = _owners(model), kept_in_fp32(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            names.setdefault(module, []).append(name)
    chosen: deque[tuple[list[str], nn.Linear]] = deque()
    for module, every in names.items():
        matched = next((p for name in every if (p := patterns.match(name)) is not None), None)
        why = f"skip={matched!r}" if matched else _unfit(model, module, every[0], owners)
        if not why and module_matches(keep, every[0]):
            why = f"{type(model).__name__} keeps it in fp32"
        if why:
            report.left |= dict.fromkeys(every, why)
        elif isinstance(module, nn.Linear):
            chosen.append((every, module))
    if not chosen:
        fix = "; ".join(f"{name}: {why}" for name, why in list(report.left.items())[:3]) or "it has none at all"
        if not any(isinstance(module, QuantizedLinear) for module in names):
            raise ValueError(f"quantize_model_: expected at least one nn.Linear to quantize; got none ({fix}); check the model and skip=")
        report.notes.append(f"nothing was quantized ({fix})")
    return chosen


class _Owner(NamedTuple):
    """A parameter, its module and its name there."""

    module: nn.Module
    name: str
    parameter: Tensor


def _span(t: Tensor) -> tuple[Any, int, int]:
    """(equal for tensors that may share memory, the first byte, the one after the last)."""
    if t.is_meta or type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided or not t.untyped_storage().nbytes():
        return id(t), 0, 1
    count = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (t.device, t.untyped_storage().data_ptr()), t.data_ptr(), t.data_ptr() + count * t.itemsize


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common. Columns of a matrix side by side have not."""
    (_, begin, end), (_, other, last) = _span(a), _span(b)
    if not (begin < last and other < end):
        return False
    if a.dim() != 2 or b.dim() != 2 or a.dtype != b.dtype or a.stride() != b.stride() or a.stride(0) < 1 or a.stride(1) != 1:
        return True
    row, (i, j) = a.stride(0), (t.storage_offset() % a.stride(0) for t in (a, b))
    return max(i + a.shape[1], j + b.shape[1]) > row or (i < j + b.shape[1] and j < i + a.shape[1])


def _owners(model: nn.Module) -> dict[Any, list[_Owner]]:
    """Storage -> the parameters in it."""
    owners: dict[Any, list[_Owner]] = {}
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                owners.setdefault(_span(p)[0], []).append(_Owner(module, f"{path}.{name}".lstrip("."), p))
    return owners


def _unfit(model: nn.Module, linear: nn.Module, name: str, owners: dict[Any, list[_Owner]]) -> str:
    """Why a layer cannot be exchanged without breaking something; "" if it can."""
    if isinstance(linear, QuantizedLinear):
        return "already quantized"
    if type(linear) is not nn.Linear:
        kind = f"{type(linear).__module__.partition('.')[0]}'s {type(linear).__name__}"
        quantized = not linear.weight.is_floating_point() or hasattr(linear.weight, "quant_state")  # type: ignore[operator]
        return f"already quantized: {kind}" if quantized else f"not exactly an nn.Linear but {kind}"
    weight = linear._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook (weight_norm and the like)"
    if not weight.is_floating_point() or weight.itemsize < 2:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}: quantized already"
    if more := sorted({*linear._parameters, *linear._buffers, *linear._modules} - {"weight", "bias"}):
        return f"it holds more than weight and bias: {', '.join(more)}"
    others = [other.name for other in owners[_span(weight)[0]] if other.module is not linear and _meet(weight, other.parameter)]
    if others:
        return f"its weight is tied to {others[0]}"
    parts = name.split(".")
    above = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    for i, parent in enumerate(above):
        if hasattr(parent, "base_layer") and parts[i] != "base_layer":
            return "an adapter's own weight"
    if isinstance(above[-1], nn.TransformerEncoderLayer):  # its fast path hands weights to a kernel of torch's, without calling the layers
        return "nn.TransformerEncoderLayer reads it past its forward"
    return ""


def _check(name: str, linear: nn.Linear) -> float:
    """The weight's largest magnitude. Raises what would stop the replacement half way."""
    w = linear.weight
    if replaced_forward(linear):
        raise ValueError(f"quantize_model_: expected plain layers; the forward of {name} has been replaced by another library; {_FIX_PLACED}")
    if w.is_meta:
        fix = "load the weights first; for files larger than memory: python -m fusedadapt quantize, then fusedadapt.quant.load_model_"
        raise ValueError(f"quantize_model_: expected weights; {name}.weight {tuple(w.shape)} is on the meta device; {fix}")
    if type(w) is not nn.Parameter:
        kind = type(w).__name__
        raise ValueError(f"quantize_model_: expected plain parameters; {name}.weight is a {kind}; quantize before the model is sharded or wrapped")
    return check_finite(w, f"{name}.weight")


def _like(old: nn.Linear, new: QuantizedLinear) -> QuantizedLinear:
    """The new layer with the old one's mode and hooks. The dicts themselves are handed over: what removes a hook refers to them."""
    for kind in _HOOKS:
        setattr(new, kind, getattr(old, kind))
    new._is_full_backward_hook = old._is_full_backward_hook
    return new.train(old.training)

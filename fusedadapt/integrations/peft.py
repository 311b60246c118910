"""`patch`: PEFT's layers run through the fused functions, on any architecture; `unpatch` takes it back.

A patched layer has a `FusedForward` as its instance's ``forward``; its class, its source, its parameters and its place in the model stay as they are.
At every call that object looks at the layer: what PEFT would do without an adapter (disabled, merged) and what has no fused form is left to PEFT.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library

from .. import config, dispatch
from ..ops import lowrank
from . import packed, peft_quantized
from . import peft_layers as layers

_live: weakref.WeakValueDictionary[int, FusedForward] = weakref.WeakValueDictionary()
_keys = itertools.count(1)

# A compiled graph must not hold scaling and p as constants (a change would compile again), and PEFT keeps them as floats in dicts and modules, where
# no change can be seen. So the graph asks: its input is the forward's key, and this op reads what PEFT has at that moment.
_lib = Library("fusedadapt", "FRAGMENT")
_lib.define("peft_numbers(Tensor key, str[] names) -> Tensor")


def _numbers(key: Tensor, names: Sequence[str]) -> Tensor:
    forward = _live[int(key)]
    if reason := next(filter(None, (layers.scaling_reason(forward.layer, name) for name in names)), ""):
        raise ValueError(
            f"fusedadapt.patch: {forward.name}: expected a number in a compiled model; got none: {reason}; run it uncompiled, or set one"
        )
    found = torch.tensor([layers.numbers_of(forward.layer, forward.kind, name) for name in names], dtype=torch.float64, device="cpu")
    if (found[:, 1] >= 1).any():
        raise ValueError(f"fusedadapt.patch: {forward.name}: expected dropout p below 1 in a compiled model; got 1; disable the adapter instead")
    return found


_lib.impl("peft_numbers", _numbers, "CompositeExplicitAutograd")
torch.library.register_fake("fusedadapt::peft_numbers", lambda key, names: torch.empty((len(names), 2), dtype=torch.float64, device="cpu"), lib=_lib)


class FusedForward:
    """The forward of one patched layer. Copied and pickled together with it."""

    layer: Any

    def __init__(self, layer: Any, method: str, name: str, paper_dora: bool) -> None:
        self.layer, self.method, self.name, self.paper_dora = layer, method, name, paper_dora
        self._register()

    def _register(self) -> None:
        number = next(_keys)
        _live[number] = self
        self.key = torch.full((), number, dtype=torch.int64, device="cpu")

    @property
    def kind(self) -> layers.Kind:
        return layers.KINDS[self.method]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "key"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._register()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer, kind = self.layer, self.kind
        if layers.idle(layer, kind):
            return type(layer).forward(layer, x, *args, **kwargs)
        reason = _call_reason(args, kwargs) or layers.base_reason(layer)
        names = layers.names_of(layer, kind)
        reason = reason or layers.order_reason(layer, kind) or kind.why_not(layer, names) or layers.input_reason(layer, x)
        if reason:
            self._note(reason)
            return type(layer).forward(layer, x, *args, **kwargs)
        y = kind.run(layer, x, names, self._values(names), self.paper_dora)
        return y.to(x.dtype) if packed.returns_input_dtype(layer.base_layer) else y

    def replicate(self) -> Any:
        """As nn.DataParallel asks for it, which a Trainer on several GPUs takes unasked: a shallow copy would run this layer, not the replica."""
        replica = type(self.layer)._replicate_for_data_parallel(self.layer)
        FusedForward(replica, self.method, self.name, self.paper_dora).attach()
        return replica

    def attach(self) -> None:
        """From here on the layer runs through this forward."""
        self.layer.forward, self.layer._replicate_for_data_parallel = self, self.replicate

    def _values(self, names: Sequence[str]) -> layers.Numbers:
        kind = self.kind
        if not torch.compiler.is_compiling() or not kind.dropouts:
            return [layers.numbers_of(self.layer, kind, name) for name in names]
        found = torch.ops.fusedadapt.peft_numbers(self.key, names)
        return [(found[i, 0], found[i, 1] if layers.drops(self.layer, kind, name) else 0.0) for i, name in enumerate(names)]

    def _note(self, reason: str) -> None:
        """Says that PEFT's forward runs, once for each reason; raises where that is not wanted."""
        if torch.compiler.is_compiling():
            return
        if config.is_strict():
            raise RuntimeError(f"fusedadapt.patch: {self.name}: expected no fallback (strict); {reason}; mend that, or leave strict()")
        dispatch.say_once("patch", f"fusedadapt: patched {self.kind.label} layers run PEFT's forward because {reason}")


def _call_reason(args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    if kwargs.get("adapter_names") is not None:
        return "adapter_names: a batch that mixes adapters"
    if args or any(value is not None for value in kwargs.values()):
        return f"the call has more arguments than the input ({', '.join(kwargs) or len(args)})"
    return ""


def _path(layer: Any, kind: layers.Kind, sharded: bool) -> tuple[str, str]:
    if reason := layers.idle(layer, kind):
        return "base", reason
    reason, weight = layers.why_not(layer, kind), packed.anchor(layer.base_layer)
    gathered = sharded and reason == layers.DISTRIBUTED
    if reason and not gathered:
        return "peft", reason
    choice = lowrank.choose("shrink", weight.device.type, weight.dtype)
    later = "; sharded by FSDP: looked at again in each call, when the weight is whole" if gathered else ""
    return "fused", f"{choice.backend}: {choice.reason}{later}"


def _is_sharded(model: nn.Module) -> bool:
    """Whether fully_shard holds parts of the model: their weights are then pieces between calls and whole inside."""
    return any(base.__name__ == "FSDPModule" for module in model.modules() for base in type(module).__mro__)


@dataclass(frozen=True)
class LayerReport:
    """One adapter layer. ``path``: "fused"; "base" (the base layer alone: disabled, merged); "peft" (PEFT's forward; ``reason`` says why)."""

    name: str
    kind: str
    path: str
    reason: str


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did, layer by layer; printed, a table."""

    layers: tuple[LayerReport, ...]

    @property
    def fused(self) -> tuple[LayerReport, ...]:
        """Layers on the fast path, or on it once their adapters act again."""
        return tuple(layer for layer in self.layers if layer.path != "peft")

    @property
    def left(self) -> tuple[LayerReport, ...]:
        """Layers that run PEFT's own forward."""
        return tuple(layer for layer in self.layers if layer.path == "peft")

    def __str__(self) -> str:
        rows = [("layer", "kind", "path", "reason"), *((r.name, r.kind, r.path, r.reason) for r in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(text.ljust(width) for text, width in zip(row[:3], widths, strict=True)), row[3]]).rstrip() for row in rows]
        return "\n".join([*lines, f"{len(self.fused)} of {len(self.layers)} adapter layers on the fast path"])


def _tuner_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """PEFT's layers by name; none if PEFT was never imported, for then no model can hold one."""
    if "peft" not in sys.modules or not isinstance(model, nn.Module):
        return
    tuner_layer = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, tuner_layer))


def _method(layer: Any) -> str:
    """Which of `KINDS` the layer is; "" if none."""
    for method, kind in layers.KINDS.items():
        if type(layer).__module__ == kind.home and type(layer).__name__ == kind.cls:
            return method
    return ""


def _label(layer: Any) -> str:
    """As PEFT's repr has it: lora.Linear."""
    package = type(layer).__module__.removeprefix("peft.tuners.").split(".")[0]
    return f"{package}.{type(layer).__name__}"


def _judge(layer: Any, sharded: bool) -> tuple[str, str]:
    """(path, reason) of a layer, were it patched."""
    method, forward = _method(layer), vars(layer).get("forward")
    if not method:
        reason = layers.structural(layer) if isinstance(getattr(layer, "base_layer", None), nn.Module) else ""
        return "peft", reason if reason.startswith("quantized") else f"{_label(layer)} has no fused form"
    if forward is not None and not isinstance(forward, FusedForward):
        return "peft", "the layer has a forward of its own, set by another library"
    if reason := layers.structural(layer):
        return "peft", reason
    return _path(layer, layers.KINDS[method], sharded)


def patch(model: nn.Module, *, strict: bool = False, dora: str = "peft") -> PatchReport:
    """Runs the adapter layers of a PEFT model (LoRA, rsLoRA, DoRA, AdaLoRA, VeRA, IA3 on nn.Linear and Conv1D) through fused kernels, in place.

    PEFT's meaning is kept in every state: active, switched, disabled, merged, added and deleted adapters, dropout, autocast, fp32 adapters on a
    16-bit base. What has no fused form keeps PEFT's forward; the report has the reason. Patching again is harmless and covers layers added since.

    Args:
        model: any module with PEFT layers in it.
        strict: raise instead of leaving a layer to PEFT; `fusedadapt.strict()` and FUSEDADAPT_STRICT=1 do the same, and hold for later calls, too.
        dora: "peft": PEFT's DoRA, which with dropout multiplies by W twice; "paper": dropout in the low-rank branch only, one product.

    Returns:
        One entry per adapter layer; print it.

    Raises:
        ValueError: no adapter layers in ``model``; an unknown ``dora``.
        RuntimeError: strict, and a layer has no fused form. Nothing has been changed then.
    """
    if dora not in ("peft", "paper"):
        raise ValueError(f"fusedadapt.patch: expected dora 'peft' or 'paper'; got {dora!r}; correct it or leave it out")
    found = list(_tuner_layers(model))
    if not found:
        raise ValueError(
            f"fusedadapt.patch: expected a model with PEFT adapter layers; got {type(model).__name__} without any; "
            "call peft.get_peft_model or add_adapter first"
        )
    sharded = _is_sharded(model)
    report = PatchReport(tuple(LayerReport(name, _label(layer), *_judge(layer, sharded)) for name, layer in found))
    if report.left and (strict or config.is_strict()):
        listed = "; ".join(f"{entry.name}: {entry.reason}" for entry in report.left)
        raise RuntimeError(f"fusedadapt.patch: expected every layer on the fast path (strict); {listed}; mend those, or leave strict out")
    for name, layer in found:
        method, forward = _method(layer), vars(layer).get("forward")
        if isinstance(forward, FusedForward):
            forward.paper_dora = dora == "paper"
        elif method and forward is None and not layers.structural(layer):
            FusedForward(layer, method, name, dora == "paper").attach()
    return report


def unpatch(model: nn.Module) -> int:
    """Gives every patched layer its class's forward back; returns how many there were (0: the model was not patched).

    Raises:
        ValueError: not a module. RuntimeError: another library has wrapped a patched forward since. Nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"fusedadapt.unpatch: expected a torch.nn.Module; got {type(model).__name__}; pass the model that was patched")
    patched = [module for module in model.modules() if isinstance(vars(module).get("forward"), FusedForward)]
    for name, module in model.named_modules():
        if isinstance(vars(module).get("_old_forward"), FusedForward):
            raise RuntimeError(
                f"fusedadapt.unpatch: {name}: expected the forward that patch set; got one wrapped around it; remove that hook first "
                "(accelerate.hooks.remove_hook_from_module)"
            )
    for module in patched:
        del module.forward, module._replicate_for_data_parallel
    return len(patched)


def explain_layers(model: Any) -> list[tuple[str, str, str]]:
    """(name, path, reason) of each PEFT layer in ``model``, patched or not."""
    rows = []
    for name, layer in _tuner_layers(model):
        path, reason = _judge(layer, _is_sharded(model))
        if path != "peft" and not isinstance(vars(layer).get("forward"), FusedForward):
            path, reason = "peft", "not patched: call fusedadapt.patch(model)"
        rows.append((name or _label(layer), path, f"{_label(layer)}, {reason}"))
    return rows


peft_quantized.register()

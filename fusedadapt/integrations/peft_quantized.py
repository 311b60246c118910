"""PEFT on `QuantizedLinear`: the methods that `peft_methods` lists are accepted, saved and merged like on any other layer, others are refused.

`register` tells PEFT.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import torch

from ..quant.layer import QuantizedLinear
from ..quant.tensor import QuantizedTensor, quantize
from .peft_methods import refuse_unfit


def register() -> None:
    """Makes PEFT merge into `QuantizedLinear` layers, from now on; does nothing if PEFT is not imported, or the second time."""
    if "peft" not in sys.modules:
        return
    model: Any = importlib.import_module("peft.tuners.lora.model")
    utils: Any = importlib.import_module("peft.tuners.tuners_utils")
    if getattr(model.dispatch_default, "__fusedadapt__", False):
        return
    model.dispatch_default = _dispatching(model.dispatch_default)
    utils.BaseTuner.inject_adapter = _injecting(utils.BaseTuner.inject_adapter, utils)


def _dispatching(original: Any) -> Any:
    """PEFT's choice of a LoRA layer: ours for packed weights."""

    @functools.wraps(original)
    def dispatch(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if type(base) is not QuantizedLinear or kwargs.get("parameter_name") is not None:
            return original(target, adapter_name, config, **kwargs)
        return linear_class()(target, adapter_name, config=config, **kwargs)

    dispatch.__fusedadapt__ = True  # type: ignore[attr-defined]
    return dispatch


def _injecting(original: Any, utils: Any) -> Any:
    """What does not fit is refused. Layers of other methods than LoRA add to or multiply `weight` when they merge, whatever its bytes stand for: they
    learn to merge."""

    @functools.wraps(original)
    def inject(self: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        refuse_unfit(original, utils, self, model, *args, **kwargs)
        result = original(self, model, *args, **kwargs)
        packed = (module for module in model.modules() if type(getattr(module, "base_layer", None)) is QuantizedLinear)
        kinds: set[Any] = {type(module) for module in packed if isinstance(module, utils.BaseTunerLayer)}
        for kind in kinds:
            if not hasattr(kind.merge, "__fusedadapt__"):
                kind.merge, kind.unmerge = _merging(kind.merge), _unmerging(kind.unmerge)
        return result

    return inject


def _merging(original: Any) -> Any:
    """`merge` of an adapter's layer: on a packed weight it is done in fp32, and the result is quantized anew."""

    @functools.wraps(original)
    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        base = self.base_layer
        if type(base) is not QuantizedLinear:
            return original(self, *args, **kwargs)
        names, dense, done = list(self.merged_adapters), base.to_linear(torch.float32), False
        if dense.bias is not None:
            dense.bias = torch.nn.Parameter(dense.bias.clone(), requires_grad=False)
        self.base_layer = dense
        try:
            original(self, *args, **kwargs)
            if not torch.isfinite(dense.weight).all():
                raise ValueError(f"QuantizedLinear: merge expected finite adapters; got inf or nan from {self.merged_adapters}; nothing was changed")
            done = True
        finally:
            self.base_layer = base
            if not done:
                self.merged_adapters[:] = names
        if self.merged_adapters == names:
            return
        if not names:
            self._fusedadapt_before = (base.quantized.clone(), None if base.bias is None else base.bias.detach().clone())
        base.write(quantize(base.stored(dense.weight), base.format))
        if dense.bias is not None:
            base.bias.data.copy_(dense.bias)

    merge.__fusedadapt__ = True  # type: ignore[attr-defined]
    return torch.no_grad()(merge)


def _unmerging(original: Any) -> Any:
    """`unmerge` of an adapter's layer: a packed weight gets its former bytes back."""

    @functools.wraps(original)
    def unmerge(self: Any) -> None:
        base = self.base_layer
        if type(base) is not QuantizedLinear or not self.merged:
            return original(self)
        before: tuple[QuantizedTensor, torch.Tensor | None] = self._fusedadapt_before
        base.write(before[0])
        if before[1] is not None:
            base.bias.data.copy_(before[1])
        self.merged_adapters.clear()
        del self._fusedadapt_before

    return torch.no_grad()(unmerge)


@functools.cache
def linear_class() -> Any:
    """PEFT's lora.Linear whose `merge` quantizes the sum anew, and whose `unmerge` brings the former bytes back."""
    plain = importlib.import_module("peft.tuners.lora.layer").Linear
    # The name is what pickle looks up here, see __getattr__.
    return type("Linear", (plain,), {"merge": _merging(plain.merge), "unmerge": _unmerging(plain.unmerge), "__module__": __name__})


def __getattr__(name: str) -> Any:
    if name == "Linear":
        return linear_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

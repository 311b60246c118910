"""PEFT's LoRA on `QuantizedLinear`: accepted, saved and merged like on any other layer. Registered with PEFT by `register`."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import torch

from ..quant.layer import QuantizedLinear
from ..quant.tensor import QuantizedTensor, quantize


def register() -> None:
    """Makes PEFT use this module's class for `QuantizedLinear` layers, from now on; does nothing if PEFT is not imported, or the second time."""
    if "peft" not in sys.modules:
        return
    model: Any = importlib.import_module("peft.tuners.lora.model")
    if getattr(model.dispatch_default, "__fusedadapt__", False):
        return
    original = model.dispatch_default

    @functools.wraps(original)
    def dispatch(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if type(base) is not QuantizedLinear or kwargs.get("parameter_name") is not None:
            return original(target, adapter_name, config, **kwargs)
        return linear_class()(target, adapter_name, config=config, **kwargs)

    dispatch.__fusedadapt__ = True  # type: ignore[attr-defined]
    model.dispatch_default = dispatch


@functools.cache
def linear_class() -> Any:
    """PEFT's lora.Linear whose `merge` quantizes the sum anew, and whose `unmerge` brings the former bytes back."""
    layer, merging = (importlib.import_module(f"peft.tuners.{name}") for name in ("lora.layer", "tuners_utils"))

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = merging.check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.lora_A]
        if not names:
            return
        base = self.get_base_layer()
        weight = base.dequantize(torch.float32)
        bias = None if base.bias is None else base.bias.detach().clone()
        for name in names:
            if name in self.lora_variant:
                weight = self.lora_variant[name].merge_safe(self, name, weight)
            else:
                weight += self.get_delta_weight(name).float()
            if self.lora_bias[name]:
                if bias is None:
                    raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
                bias += self.lora_B[name].bias * self.scaling[name]
        if not torch.isfinite(weight).all():
            raise ValueError(f"QuantizedLinear: merge expected finite adapters; got inf or nan from {', '.join(names)}; nothing was changed")
        if not self.merged_adapters:
            self._fusedadapt_before = (base.quantized.clone(), None if base.bias is None else base.bias.detach().clone())
        base.write(quantize(base.stored(weight), base.format))
        if bias is not None:
            base.bias.data.copy_(bias)
        self.merged_adapters += names

    def unmerge(self: Any) -> None:
        if not self.merged:
            return
        before: tuple[QuantizedTensor, torch.Tensor | None] = self._fusedadapt_before
        base = self.get_base_layer()
        base.write(before[0])
        if before[1] is not None:
            base.bias.data.copy_(before[1])
        self.merged_adapters.clear()
        del self._fusedadapt_before

    # The name is what pickle looks up here, see __getattr__.
    return type("Linear", (layer.Linear,), {"merge": torch.no_grad()(merge), "unmerge": torch.no_grad()(unmerge), "__module__": __name__})


def __getattr__(name: str) -> Any:
    if name == "Linear":
        return linear_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

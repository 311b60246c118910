"""Which of PEFT's methods fit on packed weights: those that call the layer and leave its `weight` alone, whose bytes are no numbers.

Asked before PEFT replaces a layer. The list is of what was tried (tests/test_peft_methods.py); what PEFT adds later is refused until it has been.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..quant.layer import QuantizedLinear

#: PEFT's names of the methods; XLORA is made of LoRA's layers
METHODS = (
    *("LORA", "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "FOURIERFT", "GRALORA", "IA3", "LILY", "MISS", "OFT", "POLY", "PVERA", "RANDLORA", "ROAD"),
    *("VBLORA", "VERA", "WAVEFT", "XLORA"),
)
# Others start from the weight, or have its dtype.
_LORA_STARTS = (True, False, None, "gaussian", "eva")
_LORA_VARIANTS = ("kasa_config", "use_bdlora", "velora_config")


def why_not(config: Any) -> str:
    """What in an adapter's configuration calculates with the weight; "" if nothing does."""
    method = str(config.peft_type.value)
    if method not in METHODS:
        return method
    if method == "DEFT" and not config.para:
        return "DEFT without para=True"
    if method == "MISS" and config.init_weights == "bat":
        return "MISS with init_weights='bat'"
    if method == "LORA":
        if config.init_lora_weights not in _LORA_STARTS:
            return f"LORA with init_lora_weights={config.init_lora_weights!r}"
        return next((f"LORA with {name}" for name in _LORA_VARIANTS if getattr(config, name, None)), "")
    return ""


def refuse_unfit(original: Any, utils: Any, tuner: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Raises TypeError, naming the layer, if PEFT's ``original(tuner, model, ...)`` (inject_adapter) would put what does not fit on a packed weight.

    ``utils``: the module peft.tuners.tuners_utils.
    """
    packed = dict(_packed(model, utils.BaseTunerLayer))
    if not packed:
        return
    given = inspect.signature(original).bind(tuner, model, *args, **kwargs).arguments
    config, state = tuner.peft_config[given["adapter_name"]], given.get("state_dict")
    unfit = why_not(config)
    stacked = {name: over for name, layer in packed.items() if (over := _method_of(layer)) and over != _home(config)}
    if unfit or stacked:
        for name in _targeted(utils, tuner, model, config, list(packed), state):
            if unfit or name in stacked:
                raise _error(name, unfit or f"{config.peft_type.value} on top of {stacked[name].upper()}, whose merging would not reach the weight")
    for name in packed:
        wrapped = [target for target in getattr(config, "target_parameters", None) or () if f".{name}.weight".endswith(f".{target}")]
        if wrapped:
            raise _error(name, f"target_parameters={wrapped}")


def _error(name: str, got: str) -> TypeError:
    return TypeError(
        f"peft: {name}: expected a method that leaves the weight of a QuantizedLinear alone, whose bytes are no numbers; got {got}; "
        f"choose one of {', '.join(METHODS)}, or exchange the layer for its to_linear(); nothing was changed"
    )


def _packed(model: nn.Module, layers: type) -> Iterator[tuple[str, Any]]:
    """Packed layers by name, or the outermost adapter on each."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if name.startswith(tuple(inside)):
            continue
        if isinstance(module, layers):
            inside.append(f"{name}.")
        base = module.get_base_layer() if isinstance(module, layers) and hasattr(module, "base_layer") else module  # type: ignore[attr-defined]
        if type(base) is QuantizedLinear:
            yield name, module


def _method_of(layer: Any) -> str:
    """PEFT's package of an adapter layer's class, its method in small letters; "" of any other layer."""
    homes = (cls.__module__.removeprefix("peft.tuners.") for cls in type(layer).__mro__ if cls.__module__.startswith("peft.tuners."))
    return next(homes, "").partition(".")[0]


def _home(config: Any) -> str:
    method = str(config.peft_type.value).lower()
    return "lora" if method == "xlora" else method


def _targeted(utils: Any, tuner: Any, model: nn.Module, config: Any, names: list[str], state: Mapping[str, Any] | None) -> list[str]:
    """Those of ``names`` that PEFT would adapt, found as it finds them."""
    if state is not None:
        ending = "." + utils.PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
        known = {key.rsplit(ending, 1)[0].removeprefix("_orig_mod.") for key in state}
        return [name for name in names if name.removeprefix("_orig_mod.") in known]
    config = tuner._prepare_adapter_config(copy.copy(config), tuner.get_model_config(model))
    config = utils._maybe_include_all_linear_layers(config, model)
    return [name for name in names if tuner._check_target_module_exists(config, name)]

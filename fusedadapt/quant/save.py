"""`save_pretrained`: a model that was quantized in memory, as a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..files import checked_target, new_folder
from . import foreign
from .foreign.plain import ORDER
from .formats import QFormat
from .layer import PackedWeight, QuantizedLinear
from .linears import skip_list
from .stream import MAX_SHARD, Shards, checked_limit, is_bitsandbytes, quantization_config


def save_pretrained(model: nn.Module, out: str | Path, *, max_shard_bytes: int = MAX_SHARD) -> Path:
    """Writes a model with `QuantizedLinear` layers; codes are moved, not made anew. Returns the folder.

    Layers that are all in nf4, or all in fp4, make a bitsandbytes checkpoint, which transformers' `from_pretrained` loads; others files of ours,
    and so do layers with an order of inputs or with `activations`, which both are kept.
    `load_model_` loads either. config.json is written where the model has a transformers `config`. The folder appears when everything is written and
    synced, by one rename.

    Raises:
        TypeError: not a module. ValueError: no packed layer, adapters on packed layers, weights on the meta device, ``max_shard_bytes`` that is no
            positive whole number: nothing is written.
        FileExistsError: ``out`` has something in it. OSError while writing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_pretrained: expected a torch.nn.Module; got {type(model).__name__}; quantize a model with quantize_model_")
    limit = checked_limit("save_pretrained", max_shard_bytes)
    target, layers = checked_target("save_pretrained", out), dict(_packed(model))
    plain = dict(_plain(model, layers))
    if absent := [name for name, t in plain.items() if t.is_meta]:
        raise ValueError(f"save_pretrained: expected weights; {', '.join(absent[:3])} are on the meta device; load them first")
    formats = {layer.format for layer in layers.values()}
    # bitsandbytes' files have no place for either
    more = any(layer.weight_order is not None or layer.activations is not None for layer in layers.values())
    shared = formats.pop() if len(formats) == 1 and is_bitsandbytes(next(iter(formats))) and not more else None
    with new_folder(target) as folder:
        shards = Shards(folder, limit)
        for name, layer in layers.items():
            qt = layer.quantized.to("cpu")
            if shared is None:
                order = {} if layer.weight_order is None else {f"{name}.weight{ORDER}": layer.weight_order.cpu()}
                tensors, metadata = foreign.to_plain(qt, f"{name}.weight", activations=layer.activations)
                shards.add(tensors | order, metadata)
            else:
                qt = qt if qt.dtype != torch.float64 else replace(qt, dtype=torch.float32)  # bitsandbytes has no fp64
                shards.add(foreign.to_bitsandbytes(qt, f"{name}.weight"), {})
        for name, t in plain.items():
            shards.add({name: t.detach().cpu()}, {})
        shards.close()
        config: Any = getattr(model, "config", None)
        if hasattr(config, "to_dict"):
            adapted = _config(model, config.to_dict(), layers, shared)
            with files.atomic_open(folder / "config.json") as file:
                file.write(json.dumps(adapted, indent=2, default=str).encode() + b"\n")
    return target


def _packed(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The packed layers, each under its first name."""
    found = False
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            found = True
            yield name, module
        elif isinstance(module, PackedWeight) and module.format is not None:
            fix = "save the adapters by their state dict, or merge them and save"
            raise ValueError(f"save_pretrained: expected QuantizedLinear layers; {name} is a {type(module).__name__} on packed bytes; {fix}")
    if not found:
        raise ValueError("save_pretrained: expected a model with QuantizedLinear layers; got none; call quantize_model_ first")


def _plain(model: nn.Module, layers: Mapping[str, QuantizedLinear]) -> Iterator[tuple[str, Tensor]]:
    """Everything else that a state dict holds; tied tensors once."""
    packed, seen = {id(t) for layer in layers.values() for t in (layer.weight, *layer.buffers())}, set[int]()
    for path, module in model.named_modules():
        own = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, t in {**module._parameters, **own}.items():
            if t is not None and id(t) not in packed and id(t) not in seen:
                seen.add(id(t))
                yield f"{path}.{name}".lstrip("."), t


def _config(model: nn.Module, config: dict[str, Any], layers: Mapping[str, QuantizedLinear], shared: QFormat | None) -> dict[str, Any]:
    kinds = [str(layer.weight_dtype).removeprefix("torch.") for layer in layers.values()]
    usual = max(set(kinds), key=kinds.count)
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    fmt = next(iter(layers.values())).format
    ours = all(layer.format == fmt for layer in layers.values()) and not is_bitsandbytes(fmt)
    adapted = config | {"architectures": [type(model).__name__]}
    if not adapted.get("dtype") and not adapted.get("torch_dtype"):
        adapted["torch_dtype"] = usual
    adapted["quantization_config"] = quantization_config(fmt if ours else shared, usual, skip_list(modules, set(layers)))
    return adapted

"""`load_model_`: a quantized checkpoint into a model built in floating point."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .archive import Archive, Entry, opened, read_tensor
from .layer import QuantizedLinear
from .linears import read_config, renamer
from .packed import Packed, activations, packed_layers, read_packed, shape
from .report import checked_device, some

_MOST = 10


def load_model_(model: nn.Module, source: str | Path, device: torch.device | str | None = None) -> list[str]:
    """Loads a quantized checkpoint into a model of the same architecture, in place: what is packed in the files becomes a `QuantizedLinear`.

    Reads files of `python -m fusedadapt quantize` in any format, and bitsandbytes, GPTQ, AWQ, HQQ and fp8 checkpoints. One tensor at a time is held
    beside the model, which may be on the meta device.

    Args:
        model: its nn.Linear layers are replaced where the files hold packed ones; other parameters and buffers are filled (and cast). Of a model
            of transformers the files may have the names that it renames when it loads; tensors that it joins have to be joined already.
        source: a folder (model.safetensors, or shards with an index) or one .safetensors file.
        device: where packed weights and what was on the meta device go. None: where the layer is; the CPU for the meta device.

    Returns:
        The names of the quantized layers.

    Raises:
        ValueError: damaged files, names or shapes that differ from the model's (listed), buffers on the meta device that no file holds: all of this
            before anything is loaded. A packed weight with impossible contents, or whose shape only its contents tell, raises when it is met and
            before its layer is replaced. FileNotFoundError.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_model_: expected a torch.nn.Module; got {type(model).__name__}; build the model first")
    device, archive = checked_device(device), opened(Path(source))
    config = read_config(archive.folder)
    layers = packed_layers(archive, config)
    taken = {name for layer in layers for name in layer.tensors}
    slots, renamed = _slots(model), renamer(model)
    plain = {name if name in slots else renamed(name): entry for name, entry in archive.entries.items() if name not in taken}
    modules = dict(model.named_modules(remove_duplicate=False))
    homes = [layer.prefix if layer.prefix in modules else renamed(f"{layer.prefix}.weight").removesuffix(".weight") for layer in layers]
    sizes = [shape(archive, layer, config) for layer in layers]
    _check(archive, [*zip(homes, layers, sizes, strict=True)], plain, slots, modules)
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    del slots, modules  # they keep what is replaced in memory
    for home, layer in zip(homes, layers, strict=True):
        linear = model.get_submodule(home)
        assert isinstance(linear, nn.Linear)
        where = device or (torch.device("cpu") if linear.weight.is_meta else linear.weight.device)
        weight, order = read_packed(archive, layer, config)
        if weight.shape != (own := (linear.out_features, linear.in_features)):
            raise ValueError(f"load_model_: expected {layer.prefix}.weight of shape {own}; got {tuple(weight.shape)}; build the model it was made of")
        new = QuantizedLinear.from_quantized(weight.to(where), linear.bias, None if order is None else order.to(where))
        new.activations = activations(archive, layer)
        for name in places.pop(linear):
            model.set_submodule(name, new.train(linear.training))
        del linear
    slots = _slots(model)
    with torch.no_grad():
        for name in plain:
            _fill(model, slots, name, read_tensor(plain[name], name), device)
    return homes


Slots = dict[str, tuple[bool, Tensor]]


def _slots(model: nn.Module) -> Slots:
    """name -> (whether a checkpoint holds it, the tensor), of parameters and buffers under all their names."""
    return {name: (kept, t) for name, kept, t in _walk(model)}


def _walk(model: nn.Module) -> Iterator[tuple[str, bool, Tensor]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for name, p in module._parameters.items():
            if p is not None:
                yield f"{path}.{name}".lstrip("."), True, p
        for name, b in module._buffers.items():
            if b is not None:
                yield f"{path}.{name}".lstrip("."), name not in module._non_persistent_buffers_set, b


def _check(
    archive: Archive,
    layers: list[tuple[str, Packed, tuple[int, ...] | None]],
    plain: dict[str, Entry],
    slots: Slots,
    modules: dict[str, nn.Module],
) -> None:
    homes = [home for home, _, _ in layers]
    faults = [f"{home}: packed in the file more than once" for home in sorted({home for home in homes if homes.count(home) > 1})]
    given = {id(slots[name][1]) for name in plain if name in slots}
    for home, layer, size in layers:
        found = modules.get(home)
        if type(found) not in (nn.Linear, QuantizedLinear):
            faults.append(f"{layer.prefix}: packed in the file; in the model it is {'missing' if found is None else type(found).__name__}")
            continue
        assert isinstance(found, nn.Linear)
        given |= {id(t) for t in [*found._buffers.values(), found.weight] if t is not None}
        if size is not None and size != (found.out_features, found.in_features):
            faults.append(f"{layer.prefix}.weight: {tuple(size)} in the file, {(found.out_features, found.in_features)} in the model")
    for name, entry in plain.items():
        if name not in slots:
            faults.append(f"{name}: not in the model")
        elif tuple(slots[name][1].shape) != entry.shape:
            faults.append(f"{name}: {entry.shape} in the file, {tuple(slots[name][1].shape)} in the model")
    faults += [f"{name}: not in the file" for name, (kept, t) in slots.items() if kept and id(t) not in given]
    faults += [f"{name}: a buffer on the meta device that no file holds" for name, (kept, t) in slots.items() if not kept and t.is_meta]
    if faults:
        fix = "build the model from the config.json beside the weights, buffers on the CPU"
        raise ValueError(f"load_model_: expected {archive.path} to fit the model; {len(faults)} differ: {some(faults, _MOST)}; {fix}")


def _fill(model: nn.Module, slots: Slots, name: str, tensor: Tensor, device: torch.device | str | None) -> None:
    """Copies into a tensor, or puts one in the place of a tensor without memory, under all its names."""
    old = slots[name][1]
    if not old.is_meta:
        old.copy_(tensor)
        return
    tensor = tensor.to(device or "cpu", old.dtype if old.is_floating_point() else tensor.dtype)
    new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    for other, (_, t) in slots.items():
        if t is old:
            path, _, leaf = other.rpartition(".")
            module = model.get_submodule(path)
            (module._parameters if isinstance(new, nn.Parameter) else module._buffers)[leaf] = new  # type: ignore[assignment]

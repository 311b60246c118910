"""Models as names of tensors, wherever these lie: state dicts, safetensors files, folders with an index. Tensors are read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import atomic_open, header, tensor_bytes

Source = str | Path | Mapping[str, Tensor]


class Model:
    """name -> tensor, read when asked for. ``about``: name -> (dtype, shape) without reading."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.path = None if isinstance(source, Mapping) else Path(source)
        self._tensors = source if isinstance(source, Mapping) else None
        self.shards: dict[str, Path] = {}
        self.about: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self._tensors is not None:
            self.about = {name: (t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}
        else:
            assert self.path is not None
            for file in _files(self.path):
                self._read_header(file)
        self.label = "state dict" if self.path is None else str(self.path)

    def _read_header(self, file: Path) -> None:
        from safetensors import safe_open

        with safe_open(str(file), "pt") as handle:
            for name in handle.keys():
                part = handle.get_slice(name)
                self.shards[name] = file
                self.about[name] = (_DTYPES[part.get_dtype()], tuple(part.get_shape()))

    def __getitem__(self, name: str) -> Tensor:
        if self._tensors is not None:
            return self._tensors[name].detach()
        from safetensors import safe_open

        with safe_open(str(self.shards[name]), "pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
            return tensor


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def _files(path: Path) -> list[Path]:
    """The safetensors files of a model: the file itself, or all of a folder (those its index names, if it has one)."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"merge: expected a safetensors file or a folder of them; got {path}; convert the checkpoint first")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"merge: expected a model at {path}; nothing is there; check the path")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise FileNotFoundError(f"merge: expected safetensors files in {path}; there are none; convert the checkpoint first")
    return found


class Writer:
    """Writes a model the way another one lies on disk: one file, or shards with an index. Each file appears when it is complete."""

    def __init__(self, out: Path, like: Model, about: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.out = out
        single = out.suffix == ".safetensors"
        groups: dict[str, list[str]] = {}
        for name in about:
            shard = like.shards[name].name if name in like.shards and not single else "model.safetensors"
            groups.setdefault(shard, []).append(name)
        self.groups = {shard: {name: about[name] for name in names} for shard, names in groups.items()}
        self.single = single

    def write(self, compute: Any) -> None:
        """``compute(name)`` gives each tensor, in the order of the file."""
        for shard, about in self.groups.items():
            head, order = header(about, {"format": "pt"})
            with atomic_open(self.out if self.single else self.out / shard) as file:
                file.write(head)
                for name in order:
                    file.write(tensor_bytes(compute(name)))
        if len(self.groups) > 1:
            sizes = {name: dtype.itemsize * _numel(shape) for about in self.groups.values() for name, (dtype, shape) in about.items()}
            weight_map = {name: shard for shard, about in self.groups.items() for name in about}
            with atomic_open(self.out / "model.safetensors.index.json") as file:
                file.write(json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}, indent=2).encode())


def _numel(shape: tuple[int, ...]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n


def check_alike(models: list[Model], labels: list[str]) -> None:
    """Raises one ValueError that lists every difference in names, shapes and dtypes from the first model."""
    first, faults = models[0], []
    for model, label in zip(models[1:], labels[1:], strict=True):
        faults += [f"{label}: {name} is missing" for name in first.about if name not in model.about]
        faults += [f"{label}: {name} is not in {labels[0]}" for name in model.about if name not in first.about]
        for name, (dtype, shape) in first.about.items():
            if name in model.about and model.about[name] != (dtype, shape):
                faults.append(f"{label}: {name} is {model.about[name][0]} {model.about[name][1]}, in {labels[0]} {dtype} {shape}")
    if faults:
        more = f" (and {len(faults) - 20} more)" if len(faults) > 20 else ""
        raise ValueError(f"merge: expected models with the same tensors; {len(faults)} differ: " + "; ".join(faults[:20]) + more)


def floating(model: Model) -> Iterator[str]:
    """Names of the tensors that are merged; others are copied from the first model."""
    return (name for name, (dtype, _) in model.about.items() if dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64))

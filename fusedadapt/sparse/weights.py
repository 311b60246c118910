"""Models as names of tensors, wherever these lie: state dicts, safetensors files, folders with an index. Tensors are read one at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..files import DTYPES, atomic_open, checked_target, header, new_folder, tensor_bytes

_INDEX = "model.safetensors.index.json"
#: last parts of names under which packed weights lie, ours and others'
_PACKED = ("weight", "qweight", "W_q")
Source = str | Path | Mapping[str, Tensor]
#: what a model's folder holds beside its weights: configurations, tokenizer, the model's own code (which is not run here)
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "*.py",
    "tokenizer*",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "?_*/config.json",
)


class Model:
    """name -> tensor, read when asked for and moved to `device` if one is given. ``about``: name -> (dtype, shape) without reading."""

    def __init__(self, source: Source, device: torch.device | str | None = None) -> None:
        if not isinstance(source, str | Path | Mapping):
            raise TypeError(f"merge: expected a state dict or a path; got {type(source).__name__}; pass model.state_dict()")
        self.path = None if isinstance(source, Mapping) else Path(source)
        self.device = None if device is None else torch.device(device)
        self._tensors = source if isinstance(source, Mapping) else None
        self.shards: dict[str, Path] = {}
        self.about: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self._tensors is not None:
            strange = [
                f"{name!r} ({type(t).__name__})" for name, t in self._tensors.items() if not isinstance(t, Tensor) or not isinstance(name, str)
            ]
            strange += [f"{name!r} ({t.layout})" for name, t in self._tensors.items() if isinstance(t, Tensor) and t.layout != torch.strided]
            strange += [f"{name!r} ({type(t).__name__})" for name, t in self._tensors.items() if is_traceable_wrapper_subclass(t)]
            if strange:
                raise ValueError(f"merge: expected name -> dense tensor; got {', '.join(strange[:5])}; pass model.state_dict() without them")
            self.about = {name: (t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}
        else:
            assert self.path is not None
            for file in _files(self.path):
                self._read_header(file)
            self._check_index(self.path / _INDEX)
        packed = [name for name, (dtype, _) in self.about.items() if name.rpartition(".")[2] in _PACKED and not dtype.is_floating_point]
        if packed:
            got = f"the bytes of packed ones: {', '.join(packed[:5])}" + (f" in {self.path}" if self.path else "")
            raise ValueError(
                f"merge: expected weights as numbers; got {got}; dequantize the model first (QuantizedLinear.to_linear), or merge before"
            )
        unknown = sorted({str(dtype) for dtype, _ in self.about.values()} - {str(dtype) for dtype in COPIED + MERGED})
        if unknown:
            got = ", ".join(unknown) + (f" in {self.path}" if self.path else "")
            raise ValueError(f"merge: expected float32, bfloat16, float16 or float64 weights, or integers; got {got}; convert them")

    def _read_header(self, file: Path) -> None:
        with _opened(file) as handle:
            for name in handle.keys():
                part = handle.get_slice(name)
                if name in self.shards:
                    raise ValueError(f"merge: expected each tensor once; {name} is in {self.shards[name].name} and {file.name}; remove one")
                if part.get_dtype() not in DTYPES:
                    raise ValueError(f"merge: expected known dtypes; {name} in {file} is {part.get_dtype()}; convert it")
                self.shards[name] = file
                self.about[name] = (DTYPES[part.get_dtype()], tuple(part.get_shape()))

    def _check_index(self, index: Path) -> None:
        """A tensor that the index names and no file has means a damaged checkpoint, not a smaller model."""
        absent = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"]) - set(self.about)) if index.is_file() else []
        if absent:
            raise ValueError(f"merge: expected all tensors that {index} names; no file has {', '.join(absent[:5])}; copy the checkpoint again")

    def __getitem__(self, name: str) -> Tensor:
        if self._tensors is not None:
            tensor = self._tensors[name].detach().contiguous().resolve_neg()
        else:
            # Opened anew each time: an open file keeps every page mapped that was ever read.
            with _opened(self.shards[name]) as handle:
                tensor = handle.get_tensor(name)
        return tensor if self.device is None else tensor.to(self.device)

    def device_of(self, name: str) -> torch.device:
        """Where `self[name]` will be."""
        if self.device is not None:
            return self.device
        return torch.device("cpu") if self._tensors is None else self._tensors[name].device


def open_all(sources: Sequence[Source], device: torch.device | str | None) -> list[Model]:
    """The models of all sources, or one error that says what is wrong with each that is none."""
    opened, faults = list[Model](), list[OSError | ValueError]()
    for source in sources:
        try:
            opened.append(Model(source, device))
        except (FileNotFoundError, ValueError) as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        kind = FileNotFoundError if all(isinstance(fault, FileNotFoundError) for fault in faults) else ValueError
        raise kind("merge: " + "; ".join(dict.fromkeys(str(fault).removeprefix("merge: ") for fault in faults)))
    return opened


#: dtypes that are merged, and those that are copied from the first model
MERGED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COPIED = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as handle:
            yield handle
    except FileNotFoundError as error:
        raise FileNotFoundError(f"merge: expected {file}; it is not there; the index beside it names it") from error
    except OSError as error:
        if file.is_file():
            raise
        raise ValueError(f"merge: expected a safetensors file; {file} is none; the index beside it names it") from error
    except SafetensorError as error:
        raise ValueError(f"merge: expected a safetensors file; {file} is none ({error}); is it complete?") from error


def _files(path: Path) -> list[Path]:
    """The safetensors files of a model: the file itself, or all of a folder (those its index names, if it has one)."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"merge: expected a safetensors file or a folder of them; got {path}; convert the checkpoint first")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"merge: expected a model at {path}; nothing is there; check the path")
    index = path / _INDEX
    if index.is_file():
        try:
            return [path / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(f'merge: expected an index with a "weight_map"; {index} has none ({error}); mend or remove it') from error
    found = sorted(file for file in path.glob("*.safetensors") if file.is_file())
    if not found:
        raise FileNotFoundError(f"merge: expected safetensors files in {path}; there are none; convert the checkpoint first")
    return found


class Writer:
    """Writes a model the way another one lies on disk: one file, or a folder with its shards, index, configuration and tokenizer. Either appears when
    it is complete."""

    def __init__(self, out: Path, like: Model, about: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], inputs: Sequence[Model]) -> None:
        self.out, self.single, self.like = out, out.suffix == ".safetensors", like.path
        in_folder = not self.single and like.path is not None and like.path.is_dir()  # one file may have any name, a folder's are looked for
        groups: dict[str, list[str]] = {} if about else {"model.safetensors": []}
        for name in about:
            shard = like.shards[name].name if in_folder else "model.safetensors"
            groups.setdefault(shard, []).append(name)
        self.groups = {shard: {name: about[name] for name in names} for shard, names in groups.items()}
        self.target = self._checked({file.resolve() for model in inputs for file in model.shards.values()})

    def _checked(self, inputs: set[Path]) -> Path:
        if self.out.exists() and self.out.is_dir() == self.single:
            kind = "a folder" if self.single else "a file without the suffix .safetensors"
            raise ValueError(f"merge: expected out to be a .safetensors file or a folder; {self.out} is {kind}; choose another name")
        targets = {self.out.resolve()} if self.single else {(self.out / shard).resolve() for shard in self.groups}
        if shared := sorted(str(path) for path in targets & inputs):
            raise ValueError(f"merge: expected out to be none of the inputs; got {shared[0]}; write elsewhere")
        if not self.single:
            return checked_target("merge", self.out)
        if self.out.exists():
            raise FileExistsError(f"merge: expected {self.out} to be a new file; it is there already; choose another or remove it")
        return self.out

    def write(self, compute: Callable[[str], Tensor]) -> Path:
        """``compute(name)`` gives each tensor, in the order of the files. Returns where they are."""
        if self.single:
            (about,) = self.groups.values()
            self._file(self.target, about, compute)
            return self.out
        with new_folder(self.target) as folder:
            for shard, about in self.groups.items():
                self._file(folder / shard, about, compute)
            if len(self.groups) > 1:
                self._index(folder / _INDEX)
            if self.like is not None and self.like.is_dir():
                _copy_companions(self.like, folder)
        return self.out

    def _file(self, path: Path, about: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], compute: Callable[[str], Tensor]) -> None:
        head, order = header(about, {"format": "pt"})
        with atomic_open(path) as file:
            file.write(head)
            for name in order:
                file.write(tensor_bytes(compute(name).cpu()))

    def _index(self, path: Path) -> None:
        sizes = [dtype.itemsize * math.prod(shape) for about in self.groups.values() for dtype, shape in about.values()]
        weight_map = {name: shard for shard, about in self.groups.items() for name in about}
        with atomic_open(path) as file:
            file.write(json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}, indent=2).encode())


def _copy_companions(source: Path, folder: Path) -> None:
    """config.json, the tokenizer and the like."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not (folder / file.relative_to(source)).exists():
                with open(file, "rb") as original, atomic_open(folder / file.relative_to(source)) as copy:
                    shutil.copyfileobj(original, copy)


def check_alike(models: Sequence[Model], labels: Sequence[str]) -> None:
    """Raises one ValueError that lists every difference in names, shapes and dtypes from the first model."""
    first, faults = models[0], []
    for model, label in zip(models[1:], labels[1:], strict=True):
        faults += [f"{label}: {name} is missing" for name in first.about if name not in model.about]
        faults += [f"{label}: {name} is not in {labels[0]}" for name in model.about if name not in first.about]
        for name, (dtype, shape) in first.about.items():
            if name in model.about and model.about[name] != (dtype, shape):
                faults.append(f"{label}: {name} is {model.about[name][0]} {model.about[name][1]}, in {labels[0]} {dtype} {shape}")
    _refuse(faults)


def check_fishers(model: Model, fishers: Sequence[Model]) -> None:
    """Raises one ValueError that lists every merged tensor for which a fisher has none of its shape. Any floating dtype will do."""
    faults = []
    for i, fisher in enumerate(fishers):
        for name in floating(model):
            dtype, shape = fisher.about.get(name, (None, None))
            if shape != model.about[name][1] or dtype not in MERGED:
                faults.append(f"fisher {i}: {name} is {'missing' if shape is None else f'{dtype} {shape}'}, in model 0 {model.about[name][1]}")
    _refuse(faults)


def _refuse(faults: list[str]) -> None:
    if faults:
        more = f" (and {len(faults) - 20} more)" if len(faults) > 20 else ""
        raise ValueError(f"merge: expected models with the same tensors; {len(faults)} differ: " + "; ".join(faults[:20]) + more)


def floating(model: Model) -> list[str]:
    """Names of the tensors that are merged; others are copied from the first model."""
    return [name for name, (dtype, _) in model.about.items() if dtype in MERGED]

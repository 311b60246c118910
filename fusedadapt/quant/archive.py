"""Weights on disk, read one tensor at a time by our own reader of safetensors headers, which can say *which* tensor a damaged file lacks.

Nothing is mapped (a mapped file keeps every page that was ever read) and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import DTYPES
from .report import some

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000  # the format's own bound
#: bits of an element of the format's other dtypes, which are checked, not read
_OTHER_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: the dtype's code in the file, shape, and where its bytes begin and end in the file."""

    file: Path
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None for a dtype that torch has no plain type for."""
        return DTYPES.get(self.code)

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass
class Header:
    """What a file says it holds, and what is wrong with that. Damaged tensors are not among ``entries``."""

    path: Path
    size: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def read_header(path: Path) -> Header:
    """The header of a safetensors file; whatever is wrong is in ``faults``, each naming the tensor. OSError if the file cannot be read."""
    found = Header(path)
    with open(path, "rb") as file:
        found.size = file.seek(0, 2)
        file.seek(0)
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or length > min(found.size - 8, _MAX_HEADER):
            found.faults.append(f"cut or no safetensors file: {found.size} bytes, of which the first eight announce a header of {length}")
            return found
        text = file.read(length)
    try:
        table: Any = json.loads(text.decode(), object_pairs_hook=_unique)
        if not isinstance(table, dict):
            raise ValueError("not an object")
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        found.faults.append(f"its header is not the JSON of a safetensors file ({error})")
        return found
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        found.faults.append("__metadata__: expected text for text")
        metadata = {}
    found.metadata = metadata
    for name, entry in table.items():
        _read_entry(found, name, entry, 8 + length)
    _check_layout(found, 8 + length)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return table


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _read_entry(found: Header, name: str, entry: Any, start: int) -> None:
    """Adds one tensor, or what is wrong with its description."""
    given = entry if isinstance(entry, dict) else {}
    code, shape, span = given.get("dtype"), given.get("shape"), given.get("data_offsets")
    if not isinstance(code, str) or not _whole(shape) or not _whole(span) or len(span) != 2:  # type: ignore[arg-type]
        found.faults.append(f"tensor {name}: expected dtype, shape and data_offsets in the header; got {json.dumps(entry)[:120]}")
        return
    assert isinstance(shape, list) and isinstance(span, list)
    bits = DTYPES[code].itemsize * 8 if code in DTYPES else _OTHER_BITS.get(code)
    if bits is None:
        found.faults.append(f"tensor {name}: expected a dtype of the safetensors format; got {code!r}")
        return
    nbytes = -(-math.prod(shape) * bits // 8)
    if span[1] - span[0] != nbytes:
        found.faults.append(f"tensor {name}: {code} {shape} takes {nbytes} bytes; the header gives it {span[1] - span[0]}")
        return
    if start + span[1] > found.size:
        found.faults.append(f"tensor {name}: cut: it needs bytes up to {start + span[1]}, the file has {found.size}")
        return
    found.entries[name] = Entry(found.path, code, tuple(shape), start + span[0], start + span[1])


def _check_layout(found: Header, start: int) -> None:
    """Tensors lie side by side: an overlap is damage, and so are bytes that belong to none."""
    position, before = start, ""
    for name, entry in sorted(found.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < position:
            found.faults.append(f"tensor {name}: its bytes overlap those of {before}")
        elif entry.begin > position and not found.faults:
            found.faults.append(f"{entry.begin - position} bytes before tensor {name} belong to no tensor")
        position, before = max(position, entry.end), name
    if not found.faults and position != found.size:
        found.faults.append(f"{found.size - position} bytes after the last tensor belong to none")


def read_tensor(entry: Entry, name: str) -> Tensor:
    """The tensor, in memory of its own. ValueError if the file ends early or torch has no such dtype; OSError."""
    if entry.dtype is None:
        raise ValueError(f"checkpoint: expected a dtype that torch has; {name} in {entry.file.name} is {entry.code}; convert it")
    flat = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
    view, done = flat.numpy().data, 0
    with open(entry.file, "rb", buffering=0) as file:
        file.seek(entry.begin)
        while done < entry.nbytes:  # one read gives at most 2 GiB
            count = file.readinto(view[done:])
            if not count:
                raise ValueError(f"checkpoint: expected {entry.nbytes} bytes of {name} in {entry.file.name}; got {done}; the file is cut")
            done += count
    return flat.view(entry.dtype).view(entry.shape)


@dataclass
class Archive:
    """The weights of a model: one file, or all shards of a folder. ``entries``: name -> where it is; ``faults``: everything that is wrong."""

    path: Path
    headers: list[Header]
    entries: dict[str, Entry] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self.entries[name], name)

    @property
    def folder(self) -> Path | None:
        """Where config.json lies; None for a file by itself."""
        return self.path if self.path.is_dir() else None


def find(path: Path) -> Archive:
    """The weights at a path with everything that is wrong about them listed. FileNotFoundError if there are none."""
    found = Archive(path, [])
    files, mapping = _files(path, found.faults)
    for file in files:
        try:
            header = read_header(file)
        except FileNotFoundError:
            missing = sorted(name for name, shard in mapping.items() if shard == file.name)
            found.faults.append(f"{file.name}: this shard is missing; the index puts {some(missing)} there")
            continue
        except OSError as error:
            found.faults.append(f"{file.name}: cannot be read ({error.strerror})")
            continue
        found.headers.append(header)
        found.faults += [f"{file.name}: {fault}" for fault in header.faults]
        found.metadata |= header.metadata
        for name, entry in header.entries.items():
            if name in found.entries:
                found.faults.append(f"tensor {name}: it is in {found.entries[name].file.name} and in {file.name}")
            found.entries[name] = entry
    if mapping:
        _check_mapping(found, mapping)
    return found


def opened(path: Path) -> Archive:
    """`find`, for reading: ValueError that lists the faults if there are any."""
    found = find(path)
    if found.faults:
        more = f" (and {len(found.faults) - 10} more)" if len(found.faults) > 10 else ""
        raise ValueError(f"checkpoint: expected intact weights in {path}; got " + "; ".join(found.faults[:10]) + f"{more}; fetch or save it again")
    return found


def _files(path: Path, faults: list[str]) -> tuple[list[Path], dict[str, str]]:
    """The files, and the index's name -> shard."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise FileNotFoundError(f"checkpoint: expected a safetensors file or a folder with some; got {path}; convert the weights first")
        return [path], {}
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint: expected a model at {path}; nothing is there; check the path")
    if (path / SINGLE).is_file():
        return [path / SINGLE], {}
    if (path / INDEX).is_file():
        try:
            mapping = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            if not mapping or not all(isinstance(file, str) and Path(file).name == file and "\0" not in file for file in mapping.values()):
                raise ValueError("its shards are not names of files beside it" if mapping else "no tensor in it")
            return [path / name for name in sorted(set(mapping.values()))], mapping
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            faults.append(f'{INDEX}: expected {{"weight_map": {{tensor: file}}}}; got {type(error).__name__}: {error}')
    if found := sorted(path.glob("*.safetensors")):
        return found, {}
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if faults:
        raise FileNotFoundError(f"checkpoint: expected safetensors files in {path}; got none, and {faults[-1]}; fetch or save it again")
    got = f"{pickled[0]}, which holds pickled objects and is not read" if pickled else "none"
    raise FileNotFoundError(f"checkpoint: expected safetensors files in {path}; got {got}; save the model with safe_serialization=True")


def _check_mapping(found: Archive, mapping: dict[str, str]) -> None:
    present = {header.path.name for header in found.headers if not header.faults}
    for name, shard in mapping.items():
        if shard in present and (name not in found.entries or found.entries[name].file.name != shard):
            found.faults.append(f"{INDEX}: it puts {name} into {shard}, which does not hold it")
    if extra := sorted(set(found.entries) - set(mapping)):
        found.faults.append(f"{INDEX}: it does not name {some(extra)}")

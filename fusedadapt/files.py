"""Files and folders that are either complete or absent: written under another name beside the target, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

#: torch's dtypes under the names that safetensors files use
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
#: names for what this process has open, an ordinary file if the shell sent it there
_OPEN = {"/dev/stdout": 1, "/dev/stderr": 2}


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` when the block ends without an error, and leaves nothing behind when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_replaceable(path)
    _remove_stale(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_folder(path.parent)


def checked_target(op: str, out: str | Path) -> Path:
    """A folder to be, where a link leads: FileExistsError if there is something in it, or no rename can put a folder in its place."""
    target = Path(out).resolve() if Path(out).is_symlink() else Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{op}: expected {target} to be a new or empty folder; it is there already; choose another or remove it")
    if target.is_dir() and (os.path.ismount(target) or target.samefile(Path.cwd())):
        what = "a mount point" if os.path.ismount(target) else "the working folder"
        raise FileExistsError(f"{op}: expected a folder that can be replaced by a rename; {target} is {what}; choose a new folder in it")
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that takes the name `target` when the block ends without an error, and is gone when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        pid = stale.name.split(".")[-2]
        # One of this number was killed: in a container every process may have the same.
        if stale.is_dir() and pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(stale)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        _fsync_folder(temporary)
        os.replace(temporary, target)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    _fsync_folder(target.parent)


def write_text(path: Path, text: str) -> None:
    """A report, atomically; into a device, a pipe or what is open already (/dev/stdout) as it is."""
    if str(path) in _OPEN:
        sys.stdout.flush()
        with open(os.dup(_OPEN[str(path)]), "w", encoding="utf-8") as file:  # goes on where that one stands
            file.write(text)
        return
    if _is_special(path):
        path.write_text(text, encoding="utf-8")
        return
    with atomic_open(path) as file:
        file.write(text.encode())


def check_writable(path: Path) -> None:
    """OSError now, rather than after the work whose result was to go to `path`. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_special(path):
        return
    _check_replaceable(path)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _is_special(path: Path) -> bool:
    """A device, a pipe or a name of what is open, which a rename would turn into a file."""
    return str(path) in _OPEN or (path.exists() and not path.is_file() and not path.is_dir())


def _check_replaceable(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if _is_special(path):
        raise FileExistsError(errno.EEXIST, "expected a file or nothing there, not a device or pipe", str(path))


def header(entries: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The head of a safetensors file and the order in which its tensors follow: wide types first, which keeps every tensor aligned. ValueError for
    names that would make a file that nobody can read, and dtypes that it has no code for."""
    if wrong := [name for name in entries if name == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in name)]:
        raise ValueError(f"safetensors: expected names in Unicode other than __metadata__, which the format has for itself; got {wrong}; rename them")
    if strange := [f"{name} ({dtype})" for name, (dtype, _) in entries.items() if dtype not in CODES]:
        raise ValueError(f"safetensors: expected dtypes among {', '.join(CODES.values())}; got {', '.join(strange[:3])}; convert or leave them out")
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    order = sorted(entries, key=lambda name: -entries[name][0].itemsize)
    position = 0
    for name in order:
        dtype, shape = entries[name]
        end = position + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, order


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order."""
    flat = tensor.detach().contiguous().resolve_neg().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # one element is contiguous with any stride, which a view as bytes refuses
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def checksum(about: Any, *tensors: Tensor) -> int:
    """CRC-32 of what JSON can hold and of the bytes and dtypes of CPU tensors: a flipped bit in a shape must not pass either."""
    crc = zlib.crc32(json.dumps([about, [CODES[t.dtype] for t in tensors]]).encode())
    for tensor in tensors:
        crc = zlib.crc32(tensor_bytes(tensor), crc)
    return crc


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes CPU tensors as one safetensors file, atomically. (The library's own writer leaves its temporary file behind when killed.)"""
    head, order = header({name: (t.dtype, t.shape) for name, t in tensors.items()}, metadata)
    with atomic_open(path) as file:
        file.write(head)
        for name in order:
            file.write(tensor_bytes(tensors[name]))


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    """Delete temporary files of processes that were killed while saving: each is as large as the file."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = stale.name.split(".")[-2]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            stale.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

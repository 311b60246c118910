"""Reading tensors: the pure-Python twin of the compiled table, and the words for what the table refuses."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from .spec import DTYPE_CODES

KEPT, MISSING_STATE, STRIDED_GRADIENT = 0, 1, 2
DEVICE_TYPES = {"cpu": 1, "cuda": 2}
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


class TableError(ValueError):
    """(entry number, code): Refusal.text turns it into a message that names the tensor."""


def local(t: Any) -> Tensor:
    """The shard of a DTensor that this process holds; any other tensor itself."""
    return getattr(t, "_local_tensor", t)


def read(t: Tensor) -> tuple[int, int, int, int, tuple[int, ...], tuple[int, ...]]:
    """Address, dtype code, device type, device index, shape, strides: what the compiled table asks for where torch has no exchange table."""
    return t.data_ptr(), DTYPE_CODES.get(t.dtype, 0), DEVICE_TYPES.get(t.device.type, 0), t.device.index or 0, tuple(t.shape), tuple(t.stride())


def is_dense(t: Tensor) -> bool:
    """Whether the tensor fills a gap-free range of memory, each element once (in any order of dimensions)."""
    expected = 1
    for stride, size in sorted((st, sz) for sz, st in zip(t.shape, t.stride(), strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_order(a: Tensor, b: Tensor) -> bool:
    return all(n <= 1 or x == y for n, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))


def memory_order(t: Tensor, like: Tensor) -> Tensor:
    """``t`` copied into the memory order of the dense tensor ``like``."""
    return torch.empty_strided(like.shape, like.stride(), dtype=t.dtype, device=t.device).copy_(t)


class Table:
    """Same interface as ``_core.Table``, for machines without the compiled core. Reads everything anew each step."""

    def __init__(self, exchange: Any, reader: Any, states: list[str], aux: list[str], extra: str, device_type: int, device_id: int):
        self._keys, self._aux, self._extra = states, aux, extra
        self._device = (device_type, device_id)
        self._entries: list[tuple[Any, ...]] = []
        self._override: dict[int, Tensor] = {}
        self.missing: list[int] = []
        self.strided: list[int] = []
        self.active: list[int] = []
        self.active_params: list[Tensor] = []
        self.tensors: list[tuple[Any, ...]] = []
        self.version = self.structure = self.placement = 0

    def add(self, param: Tensor, state: dict[str, Any], group: int, ordinal: int, base: int, inner: int, outer: int) -> None:
        self._entries.append((param, state, group, ordinal, base, inner, outer))

    def use_gradient(self, entry: int, grad: Tensor) -> None:
        self._override[entry] = grad

    def bump_versions(self, threads: int) -> bool:
        return False

    def scan(self, threads: int = 1) -> int:
        self.missing, self.strided, active, tensors = [], [], [], []
        for i, entry in enumerate(self._entries):
            grad = self._override.pop(i, entry[0].grad)
            if grad is not None and (words := self._scan_entry(i, entry, grad)):
                active.append(i)
                tensors.append(words)
        if self.missing or self.strided:
            return MISSING_STATE if self.missing else STRIDED_GRADIENT
        if tensors != self.tensors or not self.version:
            self.version += 1
            self.placement = self.version
            if active != self.active or [t[11] for t in tensors] != [t[11] for t in self.tensors]:
                self.structure = self.version
            self.active, self.tensors = active, tensors
            self.active_params = [self._entries[i][0] for i in active]
        return KEPT

    def _scan_entry(self, i: int, entry: tuple[Any, ...], grad: Tensor) -> tuple[Any, ...] | None:
        param, state, group, ordinal, base, inner, outer = entry
        p, g = local(param.detach()), local(grad)
        required = [*self._keys, *self._aux, "step"]
        if any(state.get(k) is None for k in required):
            self.missing.append(i)
            return None
        found = {k: local(state[k]) for k in (*required, self._extra, "mask") if state.get(k) is not None}
        _validate(i, p, g, found, self._keys, self._extra, self._device)
        if not same_order(p, g) and p.numel():
            self.strided.append(i)
            return None
        states = [found[k] for k in self._keys]
        extra, mask = found.get(self._extra), found.get("mask")
        pad = [0] * (4 - len(states))
        aux = [found[k].data_ptr() for k in self._aux] + [0] * (2 - len(self._aux))
        codes = [DTYPE_CODES[t.dtype] for t in (p, g, *states)] + pad + [DTYPE_CODES[extra.dtype] if extra is not None else 0]
        addresses = [p.data_ptr(), g.data_ptr(), *(s.data_ptr() for s in states), *pad, extra.data_ptr() if extra is not None else 0]
        codes.append(int(all(a % 16 == 0 for a in addresses)))
        return (*addresses, mask.data_ptr() if mask is not None else 0, found["step"].data_ptr(), *aux, p.numel(), group,
                struct.unpack("<q", bytes(codes))[0], ordinal, base, inner if inner > 0 else p.numel(), outer)  # fmt: skip

    def check_overlap(self) -> None:
        sizes = {1: 4, 2: 2, 3: 2}
        spans = sorted((t[0], t[0] + t[11] * sizes[t[13] & 0xFF], i) for t, i in zip(self.tensors, self.active, strict=True) if t[11])
        for (_, end, other), (start, _, i) in zip(spans, spans[1:], strict=False):
            if start < end:
                raise TableError(i, f"overlap:{other}")

    def chunk_for(self, workers: int) -> int:
        total, chunk = sum(t[11] for t in self.tensors), 2048
        while chunk < 65536 and chunk * workers * 8 < total:
            chunk *= 2
        return chunk

    def chunk_list(self, chunk: int) -> bytes:
        return b"".join(struct.pack("<qq", k, o) for k, t in enumerate(self.tensors) for o in range(0, t[11], chunk))

    def descriptors(self, row_per_tensor: bool = False) -> bytes:
        rows = range(len(self.tensors)) if row_per_tensor else [0] * len(self.tensors)
        return b"".join(struct.pack("<18q", *t[:12], r | t[12] << 32, *t[13:]) for r, t in zip(rows, self.tensors, strict=True))


def _validate(i: int, p: Tensor, g: Tensor, found: dict[str, Tensor], states: list[str], extra: str, device: tuple[int, int]) -> None:
    def refuse(bad: bool, code: str) -> None:
        if bad:
            raise TableError(i, code)

    def elsewhere(t: Tensor) -> bool:
        return (DEVICE_TYPES.get(t.device.type, 0), t.device.index or 0) != device

    refuse(g.layout != torch.strided, "read:grad")
    for name, t in (("param", p), ("grad", g)):
        refuse(elsewhere(t), f"device:{name}")
        refuse(t.dtype not in _FLOATING, f"dtype:{name}")
    refuse(not is_dense(p) and p.numel() > 0, "strides:param")
    refuse(p.shape != g.shape, "shape:grad")
    for name, t in found.items():
        refuse(elsewhere(t), f"device:{name}")
        if name in states or name == extra:
            refuse(t.shape != p.shape, f"shape:{name}")
            refuse(not same_order(p, t) and p.numel() > 0, f"strides:{name}")
            refuse(t.dtype not in ((torch.float32, torch.int16) if name == extra else _FLOATING), f"dtype:{name}")
        elif name == "mask":
            refuse(t.dtype != torch.int32 or t.numel() != (p.numel() + 31) // 32, "shape:mask")
        else:
            refuse(t.numel() != 1 or t.dtype != (torch.float32 if name == "step" else torch.float64), f"dtype:{name}")


def _describe(t: Any) -> str:
    if not isinstance(t, Tensor):
        return repr(t)
    strides = tuple(t.stride()) if t.layout == torch.strided else t.layout
    return f"shape {tuple(t.shape)}, {t.dtype}, strides {strides}, on {t.device}"


_EXPECTED = {
    "read": ("a dense strided tensor", "convert a sparse gradient with .to_dense() (sparse=False in nn.Embedding)"),
    "device": ("all tensors of a parameter on its device", "move it with .to(param.device), or build the optimizer after model.to(device)"),
    "dtype": ("float32, bfloat16 or float16 (step: float32; scalars: float64)", "convert it, or load the state with load_state_dict"),
    "strides": (
        "a parameter that fills its memory without gaps, and states in its memory order",
        "pass a contiguous parameter (p.data = p.data.contiguous())",
    ),
    "shape": ("the parameter's shape", "gradient and states must have been made for this parameter"),
    "null": ("memory behind the tensor", "the tensor was freed or lives in a subclass that hides its data"),
    "overlap": ("parameters in separate memory", "two parameters share storage: pass one of them, or clone one"),
}


def refusal(op: str, name: str, code: str, param: Tensor, state: dict[str, Any], other: str = "") -> ValueError:
    """The error for a TableError: what was expected, what arrived, how to fix."""
    kind, _, what = code.partition(":")
    expected, fix = _EXPECTED[kind]
    if kind == "overlap":
        return ValueError(f"{op}: expected {expected}; {name} overlaps {other}; {fix}. Nothing was changed.")
    tensor = param if what == "param" else param.grad if what == "grad" else state.get(what)
    return ValueError(
        f"{op}: expected {expected}; got {what} of {name} with {_describe(tensor)} (parameter: {_describe(param)}); {fix}. Nothing was changed."
    )

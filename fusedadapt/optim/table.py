"""Reading tensors: the pure-Python twin of the compiled table, and the words for what the table refuses."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from ..ops import sparse as ops
from .spec import BITS, CODED_CODES, DTYPE_CODES

KEPT, MISSING_STATE, STRIDED_GRADIENT = 0, 1, 2
DEVICE_TYPES = {"cpu": 1, "cuda": 2}
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)
# Words of a descriptor (csrc/core/table.h, TensorDesc).
WORDS, MASK, NUMEL, INDEX, ANCHOR, GRAD_NUMEL, KINDS, SCALE0 = 26, 7, 11, 18, 19, 20, 21, 22
EXPANDED = CODED_CODES["expanded"]


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


def has_order(t: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether elements lie as these strides say; those of sides of one element say nothing, and so do an empty tensor's."""
    return not t.numel() or all(n <= 1 or x == y for n, x, y in zip(t.shape, t.stride(), strides, strict=True))


def memory_order(t: Tensor, like: Tensor) -> Tensor:
    """``t`` copied into the memory order of the dense tensor ``like``."""
    return torch.empty_strided(like.shape, like.stride(), dtype=t.dtype, device=t.device).copy_(t)


def flat(t: Tensor) -> Tensor:
    """The memory of a gap-free tensor as a vector, shared."""
    return t.as_strided((t.numel(),), (1,)) if t.numel() else t.view(0)


class Table:
    """Same interface as ``_core.Table``, for machines without the compiled core. Reads everything anew each step."""

    def __init__(self, exchange: Any, reader: Any, states: list[str], aux: list[str], extra: str, device_type: int, device_id: int,
                 maps: list[int] | None = None):  # fmt: skip
        self._maps = dict(zip(states, maps or [0] * len(states), strict=True))
        self._keys, self._aux, self._extra = states, aux, extra
        self._device = (device_type, device_id)
        self._entries: list[tuple[Any, ...]] = []
        self._override: dict[int, Tensor] = {}
        self.missing: list[int] = []
        self.strided: list[int] = []
        self.active: list[int] = []
        self.active_params: list[Tensor] = []
        self.tensors: list[tuple[Any, ...]] = []
        self.owners: list[int] = []
        self.version = self.structure = self.placement = 0

    def add(self, param: Tensor, state: dict[str, Any], group: int, ordinal: int, base: int, inner: int, outer: int, compact: bool = False) -> None:
        self._entries.append((param, state, group, ordinal, base, inner, outer, compact))

    def use_gradient(self, entry: int, grad: Tensor) -> None:
        self._override[entry] = grad

    def bump_versions(self, threads: int) -> bool:
        return False

    def scan(self, threads: int = 1) -> int:
        self.missing, self.strided, active, owners, tensors = [], [], [], [], []
        for i, entry in enumerate(self._entries):
            grad, packed = gradient(entry[0], entry[7])
            if grad is not None and (words := self._scan_entry(i, entry, self._override.pop(i, grad), packed)):
                active.append(i)
                owners += [i] * len(words)
                tensors += words
        if self.missing or self.strided:
            return MISSING_STATE if self.missing else STRIDED_GRADIENT
        if tensors != self.tensors or not self.version:
            self.version += 1
            self.placement = self.version
            if _sizes(owners, tensors) != _sizes(self.owners, self.tensors):
                self.structure = self.version
            self.active, self.owners, self.tensors = active, owners, tensors
            self.active_params = [self._entries[i][0] for i in active]
        return KEPT

    def _scan_entry(self, i: int, entry: tuple[Any, ...], grad: Tensor, packed: bool) -> list[tuple[Any, ...]]:
        param, state, group, ordinal, base, inner, outer, compact = entry
        p, g = local(param.detach()), local(grad)
        which = "prefix" if state.get("index") is None else "index"  # the mask is the index, or there is a list
        required = [*self._keys, *self._aux, "step", *([which] if compact else [])]
        if any(state.get(k) is None for k in required):
            self.missing.append(i)
            return []
        known = (*required, self._extra, "mask", "anchor", *(["cohorts"] if compact else []), *(f"{k}_scale" for k in self._keys))
        found = {k: local(state[k]) for k in known if state.get(k) is not None}
        _validate(i, p, g, found, self._keys, self._extra, self._device, packed)
        self._coded(i, found)
        if p.is_neg():
            raise TableError(i, "negated:param")
        if p.numel() and (g.is_neg() or (not packed and not has_order(p, g.stride()))):
            self.strided.append(i)
            return []
        place = (group, ordinal, base, inner if inner > 0 else p.numel(), outer)
        if not compact:
            return [self._words(p, g, found, place, None, 0, False)]
        starts = found["cohorts"].tolist() if "cohorts" in found else [0]
        ends = [*starts[1:], _chosen(found, self._keys)]
        return [self._words(p, g, found, place, slice(a, b), c, packed) for c, (a, b) in enumerate(zip(starts, ends, strict=True))]

    def _coded(self, i: int, found: dict[str, Tensor]) -> tuple[dict[str, int], int]:
        """Dtype codes of the coded states, and log2 of the elements in their blocks: the size that gives as many blocks as there are scales."""
        codes, sizes = {}, set()
        for k in self._keys:
            if (scale := found.get(f"{k}_scale")) is None:
                continue
            good = scale.dtype == torch.float32 and found[k].dtype == torch.uint8 and self._maps[k] and scale.is_contiguous()
            lengths = _lengths(found, k)
            fit = [b for b in range(5, 12) if good and scale.dim() > 0 and _blocks(lengths, b) == scale.shape[0] and scale.shape[1:] in ((), (2,))]
            sizes.add(fit[0] if fit else 0)
            if sizes == {0} or len(sizes) > 1:
                raise TableError(i, f"scale:{k}_scale")
            codes[k] = self._maps[k] if scale.dim() == 1 else EXPANDED
        return codes, sizes.pop() if sizes else 0

    def _scales(self, found: dict[str, Tensor], cohort: int, log2: int) -> list[int]:
        """Addresses of the scales of a cohort's first block."""
        out = []
        for k in self._keys:
            scale = found.get(f"{k}_scale")
            out.append(0 if scale is None else scale.data_ptr() + scale[:1].nbytes * _blocks(_lengths(found, k)[:cohort], log2))
        return out + [0] * (4 - len(out))

    def _words(
        self, p: Tensor, g: Tensor, found: dict[str, Tensor], place: tuple[int, ...], part: slice | None, cohort: int, packed: bool
    ) -> tuple[Any, ...]:
        """One descriptor; ``part``: the elements of a cohort of a compact entry."""
        arrays = {k: t if part is None else t[part] for k, t in found.items() if k in (*self._keys, self._extra, "anchor", "index")}
        states, extra, anchor, index = [arrays[k] for k in self._keys], *(arrays.get(k) for k in (self._extra, "anchor", "index"))
        mask = found.get("mask") if part is None or "prefix" in found else None
        index = found.get("prefix", index)
        step, *aux = (found[k].view(-1)[cohort:] for k in ("step", *self._aux))
        grad = g[part] if packed else g
        counted = grad.numel() if part is None or packed or cohort == 0 else 0
        pad = [0] * (4 - len(states))
        coded, log2 = self._coded(0, found)
        codes = [*map(_code, (p, g)), *(coded.get(k) or _code(t) for k, t in zip(self._keys, states, strict=True)), *pad, _code(extra)]
        addresses = [p.data_ptr(), grad.data_ptr(), *map(_address, states), *pad, _address(extra)]
        mine = [*(addresses[:2] if part is None else addresses[1:2] if packed else []), *addresses[2:], _address(anchor), _address(index)]
        codes.append(int(all(a % 16 == 0 for a in mine)))
        numel = p.numel() if part is None else part.stop - part.start
        kinds = [BITS if "prefix" in found else _code(index), _code(anchor), int(packed), log2, 0, 0, 0, 0]
        return (*addresses, _address(mask), step.data_ptr(), *map(_address, aux), *[0] * (2 - len(aux)), numel, place[0], _word(codes), *place[1:],
                _address(index), _address(anchor), counted, _word(kinds), *self._scales(found, cohort, log2))  # fmt: skip

    def check_overlap(self) -> None:
        refuse_overlap({i: self._entries[i][0] for i in self.owners})

    def chunk_for(self, workers: int, by_gradient: bool = False) -> int:
        total, chunk = sum(t[GRAD_NUMEL if by_gradient else NUMEL] for t in self.tensors), 2048
        while chunk < 65536 and chunk * workers * 8 < total:
            chunk *= 2
        return chunk

    def chunk_list(self, chunk: int, by_gradient: bool = False) -> bytes:
        length = GRAD_NUMEL if by_gradient else NUMEL
        return b"".join(struct.pack("<qq", k, o) for k, t in enumerate(self.tensors) for o in range(0, t[length], chunk))

    def descriptors(self, row_per_tensor: bool = False) -> bytes:
        rows = range(len(self.tensors)) if row_per_tensor else [0] * len(self.tensors)
        return b"".join(struct.pack(f"<{WORDS}q", *t[:12], r | t[12] << 32, *t[13:]) for r, t in zip(rows, self.tensors, strict=True))


def refuse_overlap(params: dict[int, Tensor]) -> None:
    """Raises TableError if two of the parameters, given by their entries' numbers, share memory."""
    held = {i: local(p.detach()) for i, p in params.items()}
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, i) for i, p in held.items() if p.numel())
    for (_, end, other), (start, _, i) in zip(spans, spans[1:], strict=False):
        if start < end:
            raise TableError(i, f"overlap:{other}")


def gradient(p: Tensor, compact: bool) -> tuple[Any, bool]:
    """The gradient a step uses, and whether it is compact (the attribute ``compact_grad``)."""
    given = getattr(p, "compact_grad", None) if compact else None
    return (p.grad, False) if given is None else (given, True)


def _sizes(owners: list[int], tensors: list[tuple[Any, ...]]) -> list[tuple[int, ...]]:
    return [(i, t[NUMEL], t[GRAD_NUMEL]) for i, t in zip(owners, tensors, strict=True)]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _code(t: Tensor | None) -> int:
    return 0 if t is None else DTYPE_CODES[t.dtype]


def _lengths(found: dict[str, Tensor], name: str) -> list[int]:
    """Elements of each cohort of a state."""
    starts = found["cohorts"].tolist() if "cohorts" in found else [0]
    return [end - first for first, end in zip(starts, [*starts[1:], found[name].numel()], strict=True)]


def _blocks(lengths: list[int], log2: int) -> int:
    return sum(-(-n >> log2) for n in lengths)


def _word(values: list[int]) -> int:
    return int(struct.unpack("<q", bytes(values))[0])


def _validate(i: int, p: Tensor, g: Tensor, found: dict[str, Tensor], states: list[str], extra: str, device: tuple[int, int], packed: bool) -> None:
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
    refuse(not packed and p.shape != g.shape, "shape:grad")
    index = found.get("index", found.get("prefix"))
    count = found["cohorts"].numel() if "cohorts" in found else 1
    if index is not None:
        chosen = _chosen(found, states)
        _validate_compact(refuse, p, g, found, chosen, packed)
    for name, t in found.items():
        refuse(name != "cohorts" and elsewhere(t), f"device:{name}")
        if name in ("index", "prefix", "cohorts"):
            continue
        if name in states or name in (extra, "anchor"):
            refuse(index is None and t.shape != p.shape, f"shape:{name}")
            refuse(index is None and not has_order(p, t.stride()), f"strides:{name}")
            refuse(index is not None and not _vector(t, chosen), f"compact:{name}")
            coded = name in states and t.dtype == torch.uint8 and f"{name}_scale" in found
            refuse(t.dtype not in ((torch.float32, torch.int16) if name == extra else _FLOATING) and not coded, f"dtype:{name}")
        elif name == "mask":
            refuse(t.dtype != torch.int32 or t.numel() != (p.numel() + 31) // 32, "shape:mask")
        elif name.removesuffix("_scale") not in states:
            refuse(t.numel() != count or t.dtype != (torch.float32 if name == "step" else torch.float64), f"dtype:{name}")


def _vector(t: Tensor, n: int) -> bool:
    return t.shape == (n,) and (n <= 1 or t.stride() == (1,))


def _chosen(found: dict[str, Tensor], states: list[str]) -> int:
    """Elements of a compact entry."""
    return found["index" if "index" in found else states[0]].numel()


def _validate_compact(refuse: Any, p: Tensor, g: Tensor, found: dict[str, Tensor], n: int, packed: bool) -> None:
    refuse(packed and not _vector(g, n), "compact:compact_grad")
    if "prefix" in found:
        prefix, words = found["prefix"], found.get("mask")
        refuse(words is None or "cohorts" in found, "compact:prefix")
        refuse(prefix.dtype != torch.int64, "dtype:prefix")
        refuse(not _vector(prefix, (p.numel() + 1023) // 1024 + 1), "compact:prefix")
        assert words is not None
        refuse(prefix.device.type == "cpu" and (not torch.equal(prefix, ops.run("prefix", words)(words)) or int(prefix[-1]) != n), "compact:prefix")
        return
    index = found["index"]
    refuse(index.dtype not in (torch.int32, torch.int64), "dtype:index")
    refuse(not _vector(index, index.numel()) or index.numel() > p.numel(), "compact:index")
    if (starts := found.get("cohorts")) is not None:
        good = starts.dtype == torch.int64 and starts.device.type == "cpu" and _vector(starts, starts.numel()) and starts.numel() > 0
        order = starts.tolist() if good else [-1]
        refuse(order[0] != 0 or order != sorted(order) or order[-1] > n, "compact:cohorts")
    if index.device.type == "cpu" and index.numel():
        refuse(int(index.min()) < 0 or int(index.max()) >= p.numel(), "compact:index")


def describe(t: Any) -> str:
    if not isinstance(t, Tensor):
        return repr(t)
    strides = tuple(t.stride()) if t.layout == torch.strided else t.layout
    return f"shape {tuple(t.shape)}, {t.dtype}, strides {strides}, on {t.device}"


_EXPECTED = {
    "read": (
        "a dense strided tensor",
        "convert a sparse gradient with .to_dense() (sparse=False in nn.Embedding); leave states the tensors the optimizer made",
    ),
    "device": ("all tensors of a parameter on its device", "move it with .to(param.device), or build the optimizer after model.to(device)"),
    "dtype": ("float32, bfloat16 or float16 (step: float32; scalars: float64)", "convert it, or load the state with load_state_dict"),
    "strides": (
        "a parameter that fills its memory without gaps, and states in its memory order",
        "pass a contiguous parameter (p.data = p.data.contiguous())",
    ),
    "order": (
        "a masked parameter in the memory order it had when the mask was given",
        "change its layout (memory_format) before the optimizer is built, or load the optimizer's state dict after that",
    ),
    "shape": ("the parameter's shape", "gradient and states must have been made for this parameter"),
    "scale": (
        "fp32 scales of a coded state (uint8): one per block of 32 to 2048 elements, or a pair, and one size of block for all states",
        "keep <state> and <state>_scale together as the optimizer made them, or load them with load_state_dict",
    ),
    "negated": ("a parameter whose memory holds its values, not their negatives", "pass p.data = p.data.resolve_neg()"),
    "null": ("memory behind the tensor", "the tensor was freed or lives in a subclass that hides its data"),
    "compact": (
        "vectors as long as the index of the chosen elements (a step and scalars per cohort), positions inside the parameter or the mask's counts",
        "give compact_grad one contiguous value per trainable element; change masks with fusedadapt.sparse.grow_prune",
    ),
    "overlap": ("parameters in separate memory", "two parameters share storage: pass one of them, or clone one"),
}


def refusal(op: str, name: str, code: str, param: Tensor, state: dict[str, Any], other: str = "") -> ValueError:
    """The error for a TableError: what was expected, what arrived, how to fix."""
    kind, _, what = code.partition(":")
    expected, fix = _EXPECTED[kind]
    if kind == "overlap":
        return ValueError(f"{op}: expected {expected}; {name} overlaps {other}; {fix}. Nothing was changed.")
    tensor = param if what == "param" else param.grad if what == "grad" else state.get(what, getattr(param, what, None))
    return ValueError(
        f"{op}: expected {expected}; got {what} of {name} with {describe(tensor)} (parameter: {describe(param)}); {fix}. Nothing was changed."
    )

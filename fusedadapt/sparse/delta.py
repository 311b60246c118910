"""A sparse change of a model's weights: positions and values per tensor, applied, swapped and undone in place; about three bytes an entry."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..derivatives import refuse_transforms
from ..files import checksum, write_safetensors
from ..ops import sparse as ops
from . import coding
from .mask import Mask
from .select import topk_mask

Weights = nn.Module | Mapping[str, Tensor]
FORMAT = "fusedadapt.delta"
KINDS = ("add", "set")


@dataclass(frozen=True)
class Entry:
    """One tensor's part. ``indices``: sorted flat row-major positions (int32 below 2^31 elements, else int64); ``values``: as many; ``shape``: the
    tensor's."""

    indices: Tensor
    values: Tensor
    shape: torch.Size


Job = tuple[str, Tensor, Entry]


class SparseDelta:
    """name -> `Entry`. With ``kind="add"`` the values are differences, which compose (LT-SFT, arXiv 2110.07560; SHiRA, arXiv 2406.13175); with
    "set" they are the new weights themselves, which arrive bit for bit.

    `apply_` remembers what it overwrote: `revert_` puts back the very bits (subtracting would not). A copy, also a pickled one, is not applied.
    """

    def __init__(self, entries: Mapping[str, Entry], kind: str = "add") -> None:
        if kind not in KINDS:
            raise ValueError(f'SparseDelta: expected kind "add" or "set"; got {kind!r}')
        self.entries = dict(entries)
        self.kind = kind
        self._undo: list[tuple[Tensor, str, Tensor]] | None = None
        self._module: nn.Module | None = None
        for name, e in self.entries.items():
            if not isinstance(name, str):
                raise ValueError(f"SparseDelta: expected names of tensors; got {name!r}; use a parameter's name")
            if not isinstance(e.indices, Tensor) or not isinstance(e.values, Tensor):
                raise ValueError(
                    f"SparseDelta: expected tensors of positions and values for {name!r}; got {type(e.indices).__name__}, {type(e.values).__name__}"
                )
            if not e.values.dtype.is_floating_point:
                raise ValueError(f"SparseDelta: expected floating-point values for {name!r}; got {e.values.dtype}; convert them")
            n = math.prod(e.shape)
            if not (isinstance(e.shape, torch.Size) and e.indices.is_contiguous() and e.values.is_contiguous()):
                e = self.entries[name] = Entry(e.indices.contiguous(), e.values.contiguous(), torch.Size(e.shape))
            if e.indices.shape != e.values.shape or e.indices.dim() != 1 or e.indices.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"SparseDelta: expected as many positions (int32 or int64) as values for {name!r}; got {_about(e)}")
            if e.indices.numel() and (int(e.indices[0]) < 0 or int(e.indices[-1]) >= n or not bool((e.indices[1:] > e.indices[:-1]).all())):
                raise ValueError(f"SparseDelta: expected sorted positions in [0, {n}) without repeats for {name!r}; got {_about(e)}")

    @classmethod
    def from_diff(
        cls,
        base: Weights,
        tuned: Weights,
        *,
        density: float | None = None,
        k: int | None = None,
        masks: Mapping[str, Mask | Tensor] | None = None,
        kind: str = "add",
        dtype: torch.dtype | None = None,
    ) -> SparseDelta:
        """What `tuned` changed. With ``density`` or ``k``: its largest changes over all tensors together (exact, ties to the first); with ``masks``
        those elements; with none of them every element that differs (kind "set": in its bits).

        ``dtype`` of the values: the tensor's own by default. Tensors that ``masks`` (Masks or bool tensors) does not name have no part.

        Raises:
            ValueError: tensors missing on one side or of another shape, masks of another shape or without a tensor (all named), several of
                ``density``, ``k`` and ``masks``.
        """
        old, new = _tensors(base), _tensors(tuned)
        _same("SparseDelta.from_diff", old, new)
        if sum(given is not None for given in (density, k, masks)) > 1:
            raise ValueError("SparseDelta.from_diff: expected one of density, k and masks; got several; masks say already which elements count")
        names = [name for name in old if old[name].dtype.is_floating_point]
        chosen = None if masks is None else _fitting(masks, {name: old[name] for name in names})
        if density is not None or k is not None:
            chosen = topk_mask({n: new[n] for n in names}, density=density, k=k, score="abs_diff", other={n: old[n] for n in names})
        entries = {}
        for name in names:
            mask = Mask.from_bool(_differ(old[name], new[name], kind)) if chosen is None else chosen.get(name)
            if mask is None or mask.nnz == 0:
                continue
            index = mask.indices()
            a, b = _take_all([(old[name], index), (new[name], index)])
            values = b if kind == "set" else (b.double() - a.double() if b.dtype == torch.float64 else b.float() - a.float())
            entries[name] = Entry(index, values.to(dtype or old[name].dtype), old[name].shape)
        return cls(entries, kind)

    def __getstate__(self) -> dict[str, Any]:
        # Another object must not write into these weights, nor carry a model's tensors into a file.
        return {**self.__dict__, "_undo": None, "_module": None}

    @property
    def nnz(self) -> int:
        """Entries in all."""
        return sum(e.indices.numel() for e in self.entries.values())

    @property
    def applied(self) -> bool:
        return self._undo is not None

    def masks(self) -> dict[str, Mask]:
        """Which elements each tensor's part touches."""
        return {name: Mask.from_indices(e.indices, e.shape) for name, e in self.entries.items()}

    def to(self, device: torch.device | str) -> SparseDelta:
        return SparseDelta({n: Entry(e.indices.to(device), e.values.to(device), e.shape) for n, e in self.entries.items()}, self.kind)

    @torch.no_grad()
    def apply_(self, weights: Weights, alpha: float = 1.0) -> SparseDelta:
        """w[positions] += alpha * values (in fp32, of fp64 weights in fp64; 16-bit weights are rounded once, at the end), or = values with
        kind "set". Returns self.

        Tied weights, which a state dict has under several names, change once.

        Raises:
            RuntimeError: applied already. ValueError: a tensor is missing or of another shape (all named), tied weights with different changes,
                alpha with kind "set": nothing changed.
        """
        if self._undo is not None:
            raise RuntimeError("SparseDelta.apply_: expected a delta that is not applied; this one is; revert_() first, or copy it")
        if not isinstance(alpha, Real | Tensor) or not math.isfinite(alpha) or (self.kind == "set" and alpha != 1.0):
            raise ValueError(f'SparseDelta.apply_: expected a finite alpha, with kind "set" alpha 1; got {alpha!r}')
        jobs, _ = self._matched("apply_", weights)
        self._undo, self._module = [], weights if isinstance(weights, nn.Module) else None
        with ExitStack() as failed:
            failed.callback(self.revert_)
            for batch in _apart(jobs):
                old = _take_all([(w, e.indices) for _, w, e in batch])
                self._undo += [(w, name, kept) for (name, w, _), kept in zip(batch, old, strict=True)]
                _move("scatter" if self.kind == "set" else "add", [(w, e.indices, e.values) for _, w, e in batch], float(alpha))
            failed.pop_all()
        return self

    @torch.no_grad()
    def revert_(self) -> None:
        """Puts back the bits that `apply_` found. Deltas applied on top of each other are reverted in the opposite order.

        Raises:
            RuntimeError: not applied. ValueError: a module whose parameters are of another dtype or shape by now, or gone; nothing changed.
        """
        if self._undo is None:
            raise RuntimeError("SparseDelta.revert_: expected an applied delta; this one is not; apply_() it first")
        # A module may have moved to another device meanwhile; its old tensors would take the bits and nobody would see them.
        found = {name: w for w, name, _ in self._undo} if self._module is None else _tensors(self._module, every=True)
        changed = [n for w, n, _ in self._undo if n not in found or found[n].dtype != w.dtype or found[n].shape != w.shape]
        if changed:
            raise ValueError(
                f"SparseDelta.revert_: expected the module's tensors as apply_ found them; converted or gone: {changed}; convert them back"
            )
        for batch in _apart([(name, found[name], Entry(self.entries[name].indices, old, w.shape)) for w, name, old in reversed(self._undo)]):
            _move("scatter", [(w, e.indices, e.values) for _, w, e in batch])
        self._undo = self._module = None

    @torch.no_grad()
    def swap_(self, weights: Weights) -> None:
        """Exchanges the weights and the values (kind "set"): doing it twice changes nothing.

        Raises:
            ValueError: as `apply_`; kind "add"; values of another dtype than the weights'; two values for one element: nothing changed.
        """
        if self.kind != "set":
            raise ValueError('SparseDelta.swap_: expected kind "set"; got "add"; use apply_ and revert_')
        matched, twins = self._matched("swap_", weights)
        narrow = [f"{name}: {e.values.dtype} for {w.dtype}" for name, w, e in matched if e.values.dtype != w.dtype]
        if narrow:
            raise ValueError(f"SparseDelta.swap_: expected values of the weights' dtypes, so that an exchange loses nothing; got {narrow}")
        if len(_apart(matched)) > 1:
            _swap_shared(matched)
        else:
            _move("swap", [(w, e.indices, e.values) for _, w, e in matched])
        for e, twin in twins:
            twin.values.copy_(e.values)

    def _matched(self, op: str, weights: Weights) -> tuple[list[Job], list[tuple[Entry, Entry]]]:
        """What is to be written where, tied weights once; and the entries that were left out for it, each behind its like."""
        refuse_transforms(f"SparseDelta.{op}")
        found = _tensors(weights, every=True)
        bad = [n for n, e in self.entries.items() if n not in found or found[n].shape != e.shape or not found[n].dtype.is_floating_point]
        if bad:
            raise ValueError(f"SparseDelta.{op}: expected weights with the delta's tensors; missing, of another shape or not floating-point: {bad}")
        if absent := [n for n in self.entries if found[n].is_meta]:
            raise ValueError(f"SparseDelta.{op}: expected tensors with elements; on the meta device: {absent}; materialise them first, e.g. to_empty")
        if folded := [n for n in self.entries if any(s == 0 < d - 1 for s, d in zip(found[n].stride(), found[n].shape, strict=True))]:
            raise ValueError(f"SparseDelta.{op}: expected tensors whose elements have memory of their own; expanded: {folded}; clone them")
        jobs, twins, turned = dict[tuple[Any, ...], Job](), list[tuple[Entry, Entry]](), dict[tuple[Any, ...], tuple[str, tuple[int, ...]]]()
        for name, e in self.entries.items():
            w = found[name]
            layout = (w.device, w.data_ptr(), w.dtype, *sorted((step, side) for step, side in zip(w.stride(), w.shape, strict=True) if side > 1))
            if self.kind == "add" and w.numel() and turned.setdefault(layout, (name, w.stride()))[1] != w.stride():
                names = f"{turned[layout][0]!r} and {name!r} are one tensor, transposed"
                raise ValueError(f"SparseDelta.{op}: expected one change of each tensor; {names}; leave one name out of the delta")
            tied = jobs.setdefault((w.device, w.data_ptr(), w.shape, w.stride(), w.dtype) if w.numel() else (name,), (name, w, e))
            if tied[0] == name:
                continue
            twins.append((tied[2], e))
            if not _alike(tied[2], e):
                names = f"{tied[0]!r} and {name!r} are one tensor, with two changes"
                raise ValueError(f"SparseDelta.{op}: expected one change of each tensor; {names}; leave one name out of the delta, or untie them")
        return list(jobs.values()), twins

    def save(self, path: str | Path) -> None:
        """One safetensors file, written atomically: gap-coded positions (about 1.02 bytes at 1 %) and values."""
        tensors, about = {}, {}
        for name, e in self.entries.items():
            code, shift = coding.encode(e.indices)
            tensors[f"{name}.gaps"], tensors[f"{name}.values"] = code, e.values.cpu()
            coded: dict[str, Any] = {"shape": list(e.shape), "shift": shift}
            about[name] = coded | {"crc": _crc(name, self.kind, coded, code, tensors[f"{name}.values"])}
        write_safetensors(Path(path), tensors, {"format": FORMAT, "kind": self.kind, "entries": json.dumps(about, separators=(",", ":"))})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> SparseDelta:
        """Reads what `save` wrote.

        Raises:
            ValueError: another kind of file, or a damaged one.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ValueError(f"SparseDelta.load: expected a delta's file; {path} is none; write one with SparseDelta.save")
                entries, listed = {}, coding.contents(about["entries"])
                if {f"{name}.{part}" for name in listed for part in ("gaps", "values")} != set(file.keys()):
                    raise KeyError("names")
                for name, e in listed.items():
                    entry = read_entry(name, about["kind"], e, file.get_tensor(f"{name}.gaps"), file.get_tensor(f"{name}.values"))
                    entries[name] = Entry(entry.indices.to(device), entry.values.to(device), entry.shape)
                return cls(entries, about["kind"])
        except (SafetensorError, KeyError, TypeError, coding.Damaged) as error:
            raise ValueError(f"SparseDelta.load: expected a whole file; {path} is damaged ({error}); copy it again") from error

    def __repr__(self) -> str:
        total = sum(math.prod(e.shape) for e in self.entries.values())
        return f"SparseDelta({len(self.entries)} tensors, {self.nnz} of {total} elements, kind={self.kind!r})"


def _differ(a: Tensor, b: Tensor, kind: str) -> Tensor:
    """Where b is another number than a; for "set", which brings bits, also where it is another zero, and not where it is the same NaN."""
    if kind == "add" or a.dtype != b.dtype:
        return a != b
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size(), torch.uint8)
    x, y = (t.contiguous().resolve_neg().view(bits) for t in (a, b))
    return x != y


def _crc(name: str, kind: str, e: Mapping[str, Any], *tensors: Tensor) -> int:
    coded = e["width"] if "width" in e else ["shift", e["shift"]]
    return checksum([name, kind, e["shape"], coded], *tensors)


def read_entry(name: str, kind: str, e: Mapping[str, Any], gaps: Tensor, values: Tensor) -> Entry:
    """One tensor's part, from what a file has of it. KeyError, TypeError, or `coding.Damaged`, which names the tensor."""
    if _crc(name, kind, e, gaps, values) != e["crc"]:
        raise coding.Damaged(f"{name!r} is not as it was saved: another checksum")
    shape = e["shape"]
    if not coding.is_shape(shape) or gaps.dtype != torch.uint8 or gaps.dim() != 1 or values.dim() != 1:
        got = f"shape {shape}, {gaps.dtype} gaps of shape {tuple(gaps.shape)}, values of shape {tuple(values.shape)}"
        raise coding.Damaged(f"{name!r} is no part of a delta: {got}")
    size = math.prod(shape)
    decoder, how = (coding.decode_bytes, e["width"]) if "width" in e else (coding.decode, e["shift"])
    try:
        if type(how) is not int:
            raise coding.Damaged(f"gaps coded with {how!r}")
        at = decoder(gaps, how, len(values), size)
    except coding.Damaged as error:
        raise coding.Damaged(f"{name!r}: {error}") from error
    return Entry(at.to(torch.int32 if size < 1 << 31 else torch.int64), values, torch.Size(shape))


def _alike(a: Entry, b: Entry) -> bool:
    """The same change, to the bit."""
    if a.values.dtype != b.values.dtype or a.shape != b.shape or not torch.equal(a.indices, b.indices.to(a.indices)):
        return False
    return not bool(_differ(a.values, b.values.to(a.values.device), "set").any())


def _about(e: Entry) -> str:
    return f"{tuple(e.indices.shape)} {e.indices.dtype} positions, {tuple(e.values.shape)} values, shape {tuple(e.shape)}"


def _tensors(weights: Weights, every: bool = False) -> dict[str, Tensor]:
    """With ``every`` a module's buffers too, and each name of tied weights, as its state dict has them."""
    if isinstance(weights, nn.Module):
        named = [*weights.named_parameters(remove_duplicate=not every), *(weights.named_buffers(remove_duplicate=False) if every else ())]
        return {name: p.detach() for name, p in named}
    if not isinstance(weights, Mapping) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise TypeError(
            f"SparseDelta: expected a module or name -> tensor; got {type(weights).__name__}; of a state dict leave out what is no tensor"
        )
    return {name: t.detach() for name, t in weights.items()}


def _fitting(masks: Mapping[str, Mask | Tensor], weights: Mapping[str, Tensor]) -> dict[str, Mask]:
    if strange := [n for n, m in masks.items() if not isinstance(m, Mask | Tensor)]:
        raise ValueError(f"SparseDelta.from_diff: expected Masks or bool tensors; got others for {strange}; convert them")
    bad = [f"{n}: {tuple(m.shape)}" for n, m in masks.items() if n not in weights or m.shape != weights[n].shape]
    if bad:
        raise ValueError(f"SparseDelta.from_diff: expected masks in the shapes of floating-point tensors; got others: {bad}")
    return {n: m if isinstance(m, Mask) else Mask.from_bool(m) for n, m in masks.items()}


def _same(op: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    bad = sorted(set(a) ^ set(b)) + [f"{n}: {tuple(a[n].shape)} and {tuple(b[n].shape)}" for n in a if n in b and a[n].shape != b[n].shape]
    if bad:
        raise ValueError(f"{op}: expected the same tensors on both sides; these are missing on one, or differ in shape: {bad}")


def _apart(jobs: list[Job]) -> list[list[Job]]:
    """What may be written side by side: all together, or one by one where tensors share memory (tied weights under two names)."""
    spans = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) if not w.is_contiguous() else (w.data_ptr(), w.data_ptr() + w.nbytes)
                   for _, w, _ in jobs for s in (w.untyped_storage(),))  # fmt: skip
    apart = all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    return [jobs] if apart else [[job] for job in jobs]


def _swap_shared(jobs: list[Job]) -> None:
    """Exchange where tensors share memory: an element that has several names gives its old value to all, or the second exchange brings a new one."""
    places = [(w, e.indices) for _, w, e in jobs]
    old = _take_all(places)
    for _, w, e in jobs:
        _move("scatter", [(w, e.indices, e.values)])
    if any(bool(_differ(found, e.values.to(found.device), "set").any()) for found, (_, _, e) in zip(_take_all(places), jobs, strict=True)):
        for (_, w, e), kept in zip(jobs, old, strict=True):
            _move("scatter", [(w, e.indices, kept)])
        names = [name for name, _, _ in jobs]
        raise ValueError(f"SparseDelta.swap_: expected one value for each element; some of {names} share one, with two; leave a name out, or untie")
    for (_, _, e), kept in zip(jobs, old, strict=True):
        e.values.copy_(kept)


def _take_all(jobs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The chosen elements of every tensor, in one launch for each device."""
    out = [torch.empty(index.numel(), dtype=w.dtype, device=w.device) for w, index in jobs]
    _move("gather", [(w, index, kept) for (w, index), kept in zip(jobs, out, strict=True)])
    return out


def _move(op: str, jobs: Sequence[tuple[Tensor, Tensor, Tensor]], alpha: float = 1.0) -> None:
    """gather, scatter, add or swap for every (tensor, positions, values), in one launch for each device. Tensors that are not contiguous go through a
    copy; so do values elsewhere or of a type that kernels do not read."""
    moves, back = [], []
    for w, index, values in jobs:
        own = w.is_contiguous() and not w.is_neg()
        flat = w.view(-1) if own else w.contiguous().resolve_neg().view(-1)
        dtype = values.dtype
        if dtype != w.dtype and dtype not in ops.DTYPES:
            dtype = w.dtype if op == "scatter" else torch.float32
        near = values.to(w.device, dtype).resolve_neg()
        moves.append((flat, index.to(w.device), near))
        if op != "gather" and not own:
            back.append((w, flat.view(w.shape)))
        if op == "swap" and near is not values:
            back.append((values, near))
    ops.move_all(op, moves, alpha)
    for to, moved in back:
        to.copy_(moved)

"""A sparse change of a model's weights: positions and values per tensor, applied, swapped and undone in place; about three bytes an entry."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_safetensors
from ..ops import sparse as ops
from . import coding
from .mask import Mask
from .select import topk_mask

Weights = nn.Module | Mapping[str, Tensor]
_FORMAT = "fusedadapt.delta"


@dataclass(frozen=True)
class Entry:
    """One tensor's part. ``indices``: sorted flat row-major positions (int32 below 2^31 elements, else int64); ``values``: as many; ``shape``: the
    tensor's."""

    indices: Tensor
    values: Tensor
    shape: torch.Size


class SparseDelta:
    """name -> `Entry`. With ``kind="add"`` the values are differences, which compose (LT-SFT, arXiv 2110.07560; SHiRA, arXiv 2406.13175); with
    "set" they are the new weights themselves, which arrive bit for bit.

    `apply_` remembers what it overwrote: `revert_` puts back the very bits (subtracting would not).
    """

    def __init__(self, entries: Mapping[str, Entry], kind: str = "add") -> None:
        if kind not in ("add", "set"):
            raise ValueError(f'SparseDelta: expected kind "add" or "set"; got {kind!r}')
        self.entries = dict(entries)
        self.kind = kind
        self._undo: list[tuple[Tensor, str, Tensor]] = []
        for name, e in self.entries.items():
            n = math.prod(e.shape)
            if e.indices.shape != e.values.shape or e.indices.dim() != 1 or e.indices.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"SparseDelta: expected as many positions (int32 or int64) as values for {name!r}; got {_about(e)}")
            if e.indices.numel() and (int(e.indices[0]) < 0 or int(e.indices[-1]) >= n):
                raise ValueError(f"SparseDelta: expected sorted positions in [0, {n}) for {name!r}; got {_about(e)}")

    @classmethod
    def from_diff(
        cls,
        base: Weights,
        tuned: Weights,
        *,
        density: float | None = None,
        k: int | None = None,
        masks: Mapping[str, Mask] | None = None,
        kind: str = "add",
        dtype: torch.dtype | None = None,
    ) -> SparseDelta:
        """What `tuned` changed. With ``density`` or ``k``: its largest changes over all tensors together (exact, ties to the first); with ``masks``
        those elements; with none of them every element that differs.

        ``dtype`` of the values: the tensor's own by default.

        Raises:
            ValueError: tensors missing on one side or of another shape (all named).
        """
        old, new = _tensors(base), _tensors(tuned)
        _same("SparseDelta.from_diff", old, new)
        names = [name for name in old if old[name].dtype.is_floating_point]
        if masks is None and (density is not None or k is not None):
            masks = topk_mask({n: new[n] for n in names}, density=density, k=k, score="abs_diff", other={n: old[n] for n in names})
        entries = {}
        for name in names:
            mask = Mask.from_bool(old[name] != new[name]) if masks is None else masks.get(name)
            if mask is None or mask.nnz == 0:
                continue
            index = mask.indices()
            a, b = _take(old[name], index), _take(new[name], index)
            values = b if kind == "set" else (b.double() - a.double() if b.dtype == torch.float64 else b.float() - a.float())
            entries[name] = Entry(index, values.to(dtype or old[name].dtype), old[name].shape)
        return cls(entries, kind)

    @property
    def nnz(self) -> int:
        """Entries in all."""
        return sum(e.indices.numel() for e in self.entries.values())

    @property
    def applied(self) -> bool:
        return bool(self._undo)

    def masks(self) -> dict[str, Mask]:
        """Which elements each tensor's part touches."""
        return {name: Mask.from_indices(e.indices, e.shape) for name, e in self.entries.items()}

    def to(self, device: torch.device | str) -> SparseDelta:
        return SparseDelta({n: Entry(e.indices.to(device), e.values.to(device), e.shape) for n, e in self.entries.items()}, self.kind)

    @torch.no_grad()
    def apply_(self, weights: Weights, alpha: float = 1.0) -> SparseDelta:
        """w[positions] += alpha * values (computed wide, rounded once), or = values with kind "set". Returns self.

        Raises:
            RuntimeError: applied already. ValueError: a tensor is missing or of another shape (all named), alpha with kind "set": nothing changed.
        """
        if self._undo:
            raise RuntimeError("SparseDelta.apply_: expected a delta that is not applied; this one is; revert_() first, or copy it")
        if self.kind == "set" and alpha != 1.0:
            raise ValueError(f'SparseDelta.apply_: expected alpha 1 with kind "set"; got {alpha}')
        for name, w, e in self._matched("apply_", weights):
            old = _take(w, e.indices)
            wide = torch.float64 if w.dtype == torch.float64 else torch.float32
            new = e.values.to(w.device, w.dtype) if self.kind == "set" else (old.to(wide) + alpha * e.values.to(w.device, wide)).to(w.dtype)
            _put_(w, e.indices, new)
            self._undo.append((w, name, old))
        return self

    @torch.no_grad()
    def revert_(self) -> None:
        """Puts back the bits that `apply_` found. Deltas applied on top of each other are reverted in the opposite order."""
        if not self._undo:
            raise RuntimeError("SparseDelta.revert_: expected an applied delta; this one is not; apply_() it first")
        for w, name, old in reversed(self._undo):
            _put_(w, self.entries[name].indices, old)
        self._undo = []

    @torch.no_grad()
    def swap_(self, weights: Weights) -> None:
        """Exchanges the weights and the values (kind "set"): doing it twice changes nothing."""
        if self.kind != "set":
            raise ValueError('SparseDelta.swap_: expected kind "set"; got "add"; use apply_ and revert_')
        for _, w, e in self._matched("swap_", weights):
            old = _take(w, e.indices)
            _put_(w, e.indices, e.values.to(w.device, w.dtype))
            e.values.copy_(old)

    def _matched(self, op: str, weights: Weights) -> Iterator[tuple[str, Tensor, Entry]]:
        found = _tensors(weights)
        bad = [n for n, e in self.entries.items() if n not in found or found[n].shape != e.shape]
        if bad:
            raise ValueError(f"SparseDelta.{op}: expected weights with the delta's tensors; missing or of another shape: {bad}")
        return ((name, found[name], e) for name, e in self.entries.items())

    def save(self, path: str | Path) -> None:
        """One safetensors file, written atomically: gap-coded positions (about 1.1 bytes at 1 %) and values."""
        tensors, about = {}, {}
        for name, e in self.entries.items():
            code = coding.encode(e.indices)
            width = 1 if coding.decode(code, 1).numel() == e.indices.numel() else 2
            tensors[f"{name}.gaps"], tensors[f"{name}.values"] = code, e.values.cpu()
            about[name] = {"shape": list(e.shape), "width": width}
        write_safetensors(Path(path), tensors, {"format": _FORMAT, "kind": self.kind, "entries": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> SparseDelta:
        """Reads what `save` wrote.

        Raises:
            ValueError: another kind of file, or a damaged one.
        """
        from safetensors import safe_open

        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise ValueError(f"SparseDelta.load: expected a delta's file; {path} is none; write one with SparseDelta.save")
            entries = {}
            for name, e in json.loads(about["entries"]).items():
                index = coding.decode(file.get_tensor(f"{name}.gaps"), int(e["width"]))
                small = math.prod(e["shape"]) < 1 << 31
                values = file.get_tensor(f"{name}.values").to(device)
                entries[name] = Entry(index.to(device, torch.int32 if small else torch.int64), values, torch.Size(e["shape"]))
        return cls(entries, about["kind"])

    def __repr__(self) -> str:
        total = sum(math.prod(e.shape) for e in self.entries.values())
        return f"SparseDelta({len(self.entries)} tensors, {self.nnz} of {total} elements, kind={self.kind!r})"


def _about(e: Entry) -> str:
    return f"{tuple(e.indices.shape)} {e.indices.dtype} positions, {tuple(e.values.shape)} values, shape {tuple(e.shape)}"


def _tensors(weights: Weights) -> dict[str, Tensor]:
    if isinstance(weights, nn.Module):
        return {name: p.detach() for name, p in weights.named_parameters()}
    return {name: t.detach() for name, t in weights.items()}


def _same(op: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    bad = sorted(set(a) ^ set(b)) + [f"{n}: {tuple(a[n].shape)} and {tuple(b[n].shape)}" for n in a if n in b and a[n].shape != b[n].shape]
    if bad:
        raise ValueError(f"{op}: expected the same tensors on both sides; these are missing on one, or differ in shape: {bad}")


def _take(w: Tensor, index: Tensor) -> Tensor:
    at = index.to(w.device)
    if not w.is_contiguous():
        return torch.take(w, at.long())
    out: Tensor = ops.run("gather_at", w)(w.view(-1), at)
    return out


def _put_(w: Tensor, index: Tensor, values: Any) -> None:
    at = index.to(w.device)
    if not w.is_contiguous():
        w.put_(at.long(), values)
        return
    ops.run("put_at_", w)(w.view(-1), at, values)
    torch.autograd.graph.increment_version(w)

"""A set of elements of a tensor, one bit each."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import checksum, write_safetensors
from ..ops import sparse as ops
from . import coding

FORMAT = "fusedadapt.masks"


class Mask:
    """Which elements of a tensor of `shape` are chosen: packed bits in row-major order.

    ``words``: int32, 32 elements each, lowest bit first, spare bits 0; 1/8 byte per element. With ``row_aligned`` every row (last dimension)
    starts on a new word. ``prefix``: exclusive counts per 1,024 elements (computed when first needed): the slot of a chosen element in a compact
    array is a table look-up and a popcount: no index list.

    Make one with `Mask.from_bool`, `Mask.from_indices`, `topk_mask`, `nm_mask`, `wanda_mask`. Masks are values: operators give new ones.
    """

    def __init__(self, words: Tensor, shape: Sequence[int], *, row_aligned: bool = False) -> None:
        self.shape = _size(shape)
        self.row_aligned = row_aligned and len(self.shape) > 0
        expected = self._words_needed()
        if not isinstance(words, Tensor) or words.dtype != torch.int32 or words.dim() != 1 or words.numel() != expected:
            got = f"{words.dtype} of shape {tuple(words.shape)}" if isinstance(words, Tensor) else type(words).__name__
            raise ValueError(f"Mask: expected {expected} int32 words for shape {tuple(shape)}; got {got}; make it with Mask.from_bool")
        if type(words) is Tensor and words.device.type == "cpu" and self._spare_bits(words):  # elsewhere it would be a wait
            raise ValueError(f"Mask: expected words with no bits beyond the {self.numel()} elements; got some; clear them (~mask does it itself)")
        self.words = words.contiguous()
        self._prefix: Tensor | None = None

    def _words_needed(self) -> int:
        n = math.prod(self.shape)
        if not self.row_aligned:
            return (n + 31) // 32
        length = self.shape[-1]
        return 0 if n == 0 else n // length * ((length + 31) // 32)

    def _spare_bits(self, words: Tensor) -> bool:
        """Whether bits are set that stand for no element."""
        length = self.shape[-1] if self.row_aligned else self.numel()
        return bool(words.numel() and length % 32 and (words.reshape(-1, (length + 31) // 32)[:, -1] >> length % 32).any())

    @classmethod
    def from_bool(cls, mask: Tensor, *, row_aligned: bool = False) -> Mask:
        """From a bool tensor of any shape and strides."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"Mask.from_bool: expected a bool tensor; got {got}; compare first, e.g. x != 0")
        packed = mask
        if row_aligned and mask.dim() and mask.numel():
            packed = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 32))
        return cls(ops.run("pack", mask)(packed.contiguous()), mask.shape, row_aligned=row_aligned)

    @classmethod
    def from_indices(cls, indices: Tensor, shape: Sequence[int]) -> Mask:
        """From flat row-major positions (int32 or int64), sorted and without repeats.

        Raises:
            ValueError: positions out of range, unsorted or repeated.
        """
        if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
            got = f"{indices.dtype} of shape {tuple(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
            raise ValueError(f"Mask.from_indices: expected a vector of int32 or int64; got {got}; make it a tensor of flat positions")
        size = _size(shape)
        return cls(ops.run("from_indices", indices)(indices.contiguous(), math.prod(size)), size)

    @classmethod
    def full(cls, shape: Sequence[int], value: bool, device: torch.device | str = "cpu") -> Mask:
        """All elements, or none."""
        return cls.from_bool(torch.full(_size(shape), value, dtype=torch.bool, device=device))

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def prefix(self) -> Tensor:
        """int64 [ceil(words / 32) + 1]: how many are chosen before each 1,024 elements; the last entry is `nnz`."""
        if self._prefix is None:
            self._prefix = ops.run("prefix", self.words)(self.words)
        return self._prefix

    @property
    def nnz(self) -> int:
        """How many elements are chosen (waits for the device)."""
        return int(self.prefix[-1])

    @property
    def density(self) -> float:
        """nnz / number of elements; 0 for an empty shape."""
        n = math.prod(self.shape)
        return self.nnz / n if n else 0.0

    def numel(self) -> int:
        return math.prod(self.shape)

    def to_bool(self) -> Tensor:
        """bool tensor of `shape`."""
        if not self.row_aligned or self.numel() == 0:
            flat: Tensor = ops.run("unpack", self.words)(self.words, self.numel())
            return flat.reshape(self.shape)
        length = self.shape[-1]
        padded: Tensor = ops.run("unpack", self.words)(self.words, self.words.numel() * 32)
        return padded.view(-1, (length + 31) // 32 * 32)[:, :length].reshape(self.shape)

    def indices(self) -> Tensor:
        """Sorted flat positions of the chosen elements: int32 below 2^31 elements, else int64."""
        found: Tensor = ops.run("indices", self.words)(self.flat().words, self.numel())
        return found

    def flat(self) -> Mask:
        """The same set without row alignment."""
        return Mask.from_bool(self.to_bool()) if self.row_aligned else self

    def aligned(self) -> Mask:
        """The same set with row alignment."""
        return self if self.row_aligned else Mask.from_bool(self.to_bool(), row_aligned=True)

    def to(self, device: torch.device | str) -> Mask:
        return self._with(self.words.to(device))

    def reshape(self, *shape: int | Sequence[int]) -> Mask:
        """The same bits under another shape of as many elements, -1 for what is left, as `torch.Tensor.reshape` (not for row-aligned masks)."""
        sides = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if self.row_aligned:
            raise ValueError(f"Mask.reshape: expected a flat mask; got {self!r}; use .flat()")
        try:
            wanted = torch.empty(self.shape, dtype=torch.bool, device="meta").reshape(sides).shape  # type: ignore[arg-type]
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"Mask.reshape: expected a shape of {self.numel()} elements; got {tuple(sides)} for {self!r}") from error  # type: ignore[arg-type]
        return Mask(self.words, wanted)

    def _with(self, words: Tensor) -> Mask:
        made = copy.copy(self)
        made.words, made._prefix = words, None
        return made

    def _like(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            raise TypeError(f"Mask: expected another Mask; got {type(other).__name__}; convert it with Mask.from_bool")
        if other.shape != self.shape:
            raise ValueError(f"Mask: expected a mask of shape {tuple(self.shape)}; got {tuple(other.shape)}")
        return other if other.row_aligned == self.row_aligned else (other.aligned() if self.row_aligned else other.flat())

    def __and__(self, other: Mask) -> Mask:
        return self._with(self.words & self._like(other).words)

    def __or__(self, other: Mask) -> Mask:
        return self._with(self.words | self._like(other).words)

    def __xor__(self, other: Mask) -> Mask:
        return self._with(self.words ^ self._like(other).words)

    def __sub__(self, other: Mask) -> Mask:
        return self._with(self.words & ~self._like(other).words)

    def __invert__(self) -> Mask:
        return self ^ Mask.full(self.shape, True, self.device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and self.shape == other.shape and torch.equal(self.words, self._like(other).words)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        kind = ", row_aligned" if self.row_aligned else ""
        nnz = "?" if self.words.is_meta else self.nnz
        return f"Mask(shape={tuple(self.shape)}, nnz={nnz}, device={self.device}{kind})"

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, atomically."""
        save_masks(path, {"mask": self})

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Reads what `save` wrote. ValueError: as `load_masks`, or a file of other masks."""
        masks = load_masks(path)
        if list(masks) != ["mask"]:
            raise ValueError(f"Mask.load: expected a file of one mask; {path} holds {', '.join(masks) or 'none'}; read it with load_masks")
        return masks["mask"]


def _size(shape: Sequence[int]) -> torch.Size:
    try:
        size = torch.Size(shape)
    except TypeError:  # a number, or sides that are none
        size = torch.Size([-1])
    if any(side < 0 for side in size):
        raise ValueError(f"Mask: expected a shape of sides from 0 up; got {shape!r}; pass e.g. tuple(weight.shape)")
    return size


torch.serialization.add_safe_globals([Mask])  # for torch.load(weights_only=True)


def save_masks(path: str | Path, masks: Mapping[str, Mask | Tensor]) -> None:
    """Writes name -> Mask (or bool tensor) as one safetensors file: temporary file, fsync, rename.

    Raises:
        ValueError: names that are no text, or "__metadata__", which the format has for itself; what is no mask. OSError: nothing was written.
    """
    if wrong := [name for name in masks if not isinstance(name, str)]:
        raise ValueError(f"save_masks: expected names; got {wrong}; use a parameter's name")
    made = {name: mask if isinstance(mask, Mask) else Mask.from_bool(mask) for name, mask in masks.items()}
    tensors = {name: mask.words.cpu() for name, mask in made.items()}
    about = {
        name: {"shape": list(m.shape), "row_aligned": m.row_aligned, "crc": checksum([name, list(m.shape), m.row_aligned], tensors[name])}
        for name, m in made.items()
    }
    write_safetensors(Path(path), tensors, {"format": FORMAT, "masks": json.dumps(about)})


def load_masks(path: str | Path) -> dict[str, Mask]:
    """Reads what `save_masks` wrote.

    Raises:
        ValueError: another kind of file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError(f"load_masks: expected a file of masks; {path} is none; write one with save_masks")
            masks, entries = {}, coding.contents(about["masks"])
            if set(entries) != set(file.keys()):
                raise KeyError("names")
            for name, e in entries.items():
                masks[name] = read_mask(name, e, file.get_tensor(name))
            return masks
    except (SafetensorError, KeyError, TypeError, coding.Damaged) as error:
        raise ValueError(f"load_masks: expected a whole file; {path} is damaged ({error}); copy it again") from error


def read_mask(name: str, e: Mapping[str, Any], words: Tensor) -> Mask:
    """One mask, from what a file has of it. KeyError, TypeError, or `coding.Damaged`, which names the mask."""
    shape, row_aligned = e["shape"], e["row_aligned"]
    if checksum([name, shape, row_aligned], words) != e["crc"]:
        raise coding.Damaged(f"{name!r} is not as it was saved: another checksum")
    if not coding.is_shape(shape):
        raise coding.Damaged(f"{name!r} is no mask: shape {shape}")
    try:
        return Mask(words, shape, row_aligned=bool(row_aligned))
    except ValueError as error:
        raise coding.Damaged(f"{name!r} is no mask: {error}") from error

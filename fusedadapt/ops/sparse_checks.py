"""What the GPU backends of the sparse family check before anything is written, and how they hand tables to kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..reference.sparse import SCORES

Item = tuple[Tensor, Tensor | None]
# As DType in csrc/core/dtypes.h.
CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
TIES = ("lowest_index", "inclusive", "exclusive")
PLAIN = ("abs", "given")  # scores of x alone
_facts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def refuse(op: str, expected: str, got: object, fix: str) -> NoReturn:
    raise ValueError(f"{op}: expected {expected}; got {got}; {fix}")


def flat(op: str, name: str, t: Tensor, dtypes: Sequence[torch.dtype] = tuple(CODES), device: torch.device | None = None) -> Tensor:
    if t.dtype not in dtypes or not t.is_contiguous() or (device is not None and t.device != device):
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = f"{t.dtype} on {t.device}, shape {tuple(t.shape)}, strides {t.stride()}"
        refuse(op, f"{name} to be a contiguous tensor of {kinds}{f' on {device}' if device else ''}", got, "convert it, call .contiguous()")
    return t


def words(op: str, words: Tensor, n: int, device: torch.device) -> Tensor:
    flat(op, "words", words, (torch.int32,), device)
    if words.numel() != (n + 31) // 32:
        refuse(op, f"{(n + 31) // 32} words for {n} elements", words.numel(), "pass the mask of this tensor")
    return words


def empty_words(n: int, device: torch.device) -> Tensor:
    return torch.empty((n + 31) // 32, dtype=torch.int32, device=device)


def table(rows: list[list[int]], device: torch.device) -> Tensor:
    """On the device without waiting: pinned memory is kept by torch until the copy has run."""
    table = torch.tensor(rows, dtype=torch.int64, device="cpu")
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def known(key: Tensor, what: tuple[Any, ...], find: Callable[[], Any]) -> Any:
    """find(), remembered until the tensor is written or gone: the device is asked once."""
    if key.is_inference():
        return find()
    now = (key._version, key.data_ptr())
    held: tuple[tuple[int, int], dict[tuple[Any, ...], Any]] | None = _facts.get(key)
    if held is None or held[0] != now:
        held = _facts[key] = (now, {})
    if what not in held[1]:
        held[1][what] = find()
    return held[1][what]


def listed(op: str, items: Sequence[Item], score: str, nan: str, words: bool) -> tuple[torch.device, list[Tensor], list[list[int]]]:
    """(device, words of each item if asked for, rows of those that have elements; their sixth number is the caller's)."""
    if score not in SCORES or nan not in ("highest", "lowest"):
        refuse(op, f"a score of {', '.join(SCORES)} and nan highest or lowest", f"{score!r}, {nan!r}", "choose among these")
    if not items:
        refuse(op, "at least one tensor", "none", "pass some")
    device, rows = items[0][0].device, []
    made = [empty_words(x.numel(), device) for x, _ in items] if words else []
    for i, item in enumerate(items):
        found = row(op, item, score, device)
        if found[3]:
            found[2] = made[i].data_ptr() if words else 0
            rows.append(found)
    return device, made, rows


def selection(k: int, n: int, ties: str) -> None:
    """How many of n elements `select` takes, and what becomes of ties."""
    if ties not in TIES or not 0 <= k <= n:
        refuse("select", f"k in 0..{n} and ties of {', '.join(TIES)}", f"{k}, {ties!r}", "choose among these")


def runs(x: Tensor, length: int, ties: str, below: int = 1 << 31) -> None:
    """Runs of consecutive elements, within which `rows` selects."""
    if not 0 < length < below or x.numel() % length or ties not in TIES:
        refuse("rows", f"a length that divides {x.numel()} elements and ties of {', '.join(TIES)}", f"{length}, {ties!r}", "pass whole runs")


def groups(x: Tensor, m: int) -> None:
    """Groups of neighbours in a row, among which `nm` selects."""
    if m <= 0 or (x.numel() and x.shape[-1] % m):
        refuse("nm", f"rows of a multiple of {m} elements", tuple(x.shape), "pad them or choose another m")


def matrix(op: str, x: Tensor, device: torch.device | None = None) -> None:
    if flat(op, "x", x, device=device).dim() != 2:
        refuse(op, "a matrix [T, K]", tuple(x.shape), "flatten it to rows")


def row(op: str, item: Item, score: str, device: torch.device) -> list[int]:
    """SparseItem of csrc/cuda/sparse.h: x, other, words, n, columns, first, dtype, other's dtype, aligned."""
    x, other = item
    flat(op, "x", x, device=device)
    columns, address, code = x.shape[-1] if x.dim() else 1, 0, 0
    aligned = x.data_ptr() % 16 == 0
    if score not in PLAIN:
        if other is None:
            refuse(op, f"a second tensor for score '{score}'", None, "pass it")
        if score == "abs_scaled":
            flat(op, "the factors", other, (torch.float32,), device)
            if other.numel() != columns:
                refuse(op, f"one factor per column, {columns}", other.numel(), "its length is x.shape[-1]")
        elif flat(op, "other", other, device=device).shape != x.shape:
            refuse(op, f"other of x's shape {tuple(x.shape)}", tuple(other.shape), "pass one value per element")
        address, code = other.data_ptr(), CODES[other.dtype]
        aligned = aligned and (score == "abs_scaled" or address % 16 == 0)
    return [x.data_ptr(), address, 0, x.numel(), max(columns, 1), 0, CODES[x.dtype], code, aligned]


def vector(op: str, index: Tensor, device: torch.device) -> None:
    flat(op, "positions", index, (torch.int32, torch.int64), device)
    if index.dim() != 1:
        refuse(op, "a vector of positions", tuple(index.shape), "flatten it")


def bad_positions(op: str, n: int, ordered: bool) -> NoReturn:
    how = "sorted positions without repeats" if ordered else "positions"
    refuse(op, f"{how} in [0, {n})", "others", "sort them, drop repeats" if ordered else "drop those out of range")


def positions(op: str, index: Tensor, n: int, ordered: bool, device: torch.device, find: Callable[[], bool] | None = None) -> None:
    """Refuses positions outside [0, n) or, if `ordered`, not sorted or with repeats. Waits for the device the first time it sees them.
    find: whether they are good, computed otherwise than here."""
    vector(op, index, device)

    def good() -> bool:
        bad = (index < 0) | (index >= n)
        if ordered:
            bad[1:] |= index[1:] <= index[:-1]
        return not bool(bad.any())

    if not known(index, ("positions", n, ordered), find or good):
        bad_positions(op, n, ordered)


def move(op: str, x: Tensor, index: Tensor, values: Tensor, device: torch.device) -> int:
    """Refuses a move that does not fit (its positions are the caller's to check). x's dtype | values' << 8 | 64-bit positions << 16."""
    flat(op, "x", x, device=device)
    flat(op, "values", values, device=device)
    vector(op, index, device)
    if values.numel() != index.numel():
        refuse(op, f"{index.numel()} values, one per position", values.numel(), "pass the values of these positions")
    if op in ("gather", "swap") and x.dtype != values.dtype:
        refuse(op, f"values of x's dtype {x.dtype}", values.dtype, "an exchange must lose nothing")
    return CODES[x.dtype] | CODES[values.dtype] << 8 | (index.dtype == torch.int64) << 16


def moved(op: str, jobs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Tells autograd what a move wrote."""
    torch.autograd.graph.increment_version([t for x, _, values in jobs for t in {"gather": [values], "swap": [x, values]}.get(op, [x])])

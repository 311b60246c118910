"""The primitives of the sparse family on a GPU in CUDA C++ (`csrc/cuda/sparse*.cu`): the functions of `reference.sparse_parts`, bit for bit. On CPU
tensors the same kernels run in the emulator (tests only).

Tensors are contiguous, on one device, in float32, bfloat16 or float16, of any size and alignment; words are int32. Anything else is a ValueError
before something is written. Nothing waits for the device except where a result's size or a check of positions needs it; what a check found is
remembered per tensor, so that the second call with the same positions does not wait. Scratch of a selection: 0.5 MiB + 8 bytes per 8,192 elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..reference.sparse import SCORES, column_slices, energy_of
from . import sparse_checks as checks
from .sparse_checks import Item

LEVELS = ((16, 16), (0, 16))
LEVELS16 = ((16, 16),)
_MOVES = ("gather", "scatter", "add", "swap")
_SEARCH = ("prefix", "left", "above", "same", "threshold", "equal")  # csrc/cuda/sparse.h, Search
# Tests: less than the device has, as if it were a smaller one.
_shared_limit = 0


def _core(device: torch.device) -> Any:
    module = dispatch.core() if device.type == "cuda" else dispatch.core_emulated()
    if module is None or not dispatch.has_cuda(module):
        raise RuntimeError(f"fusedadapt sparse: expected a core with CUDA kernels for tensors on {device}; there is none; use another backend")
    return module.sparse_cuda


def _place(device: torch.device) -> tuple[int, int]:
    """What every kernel ends with: device number and stream."""
    if device.type != "cuda":
        return 0, 0
    return device.index or 0, torch.cuda.current_stream(device).cuda_stream


# ---- selection


class _List:
    """A list of items as the kernels take it. Only tensors with elements: the others have no words."""

    def __init__(self, op: str, items: Sequence[Item], score: str, nan: str, words: bool = False):
        self.device, self.words, rows = checks.listed(op, items, score, nan, words)
        self.core, self.place = _core(self.device), _place(self.device)
        self.elements, self.tiles = sum(row[3] for row in rows), 0
        for row in rows:
            row[5] = self.tiles
            self.tiles += (row[3] + self.core.TILE - 1) // self.core.TILE
        # bf16 and fp16 |x| of their own width: a single level, a single read
        types = {x.dtype for x, _ in items}
        self.native = checks.CODES[types.pop()] if score == "abs" and len(types) == 1 and torch.float32 not in types else 0
        self.table = checks.table(rows or [[0] * 9], self.device)
        self.given = (self.table.data_ptr(), len(rows), self.tiles, SCORES.index(score), nan == "lowest")

    def empty(self, n: int) -> Tensor:
        return torch.empty(n, dtype=torch.int64, device=self.device)


def histogram(items: Sequence[Item], score: str, nan: str, shift: int, bits: int, prefix: Tensor | None) -> Tensor:
    """Counts by `bits` bits (at most 16) of the key from `shift` up, among the keys whose higher bits are `prefix` (int64 [1]; None: all): int64
    [2^bits]."""
    if not 0 < bits <= 16 or shift < 0 or shift + bits > 32:
        checks.refuse("histogram", "0 < bits <= 16 and shift + bits <= 32", f"shift {shift}, bits {bits}", "use LEVELS")
    given = _List("histogram", items, score, nan)
    of = None if prefix is None else prefix.to(given.device)
    native = given.native if given.native == checks.CODES[torch.bfloat16] and (shift, bits, prefix) == (16, 16, None) else 0
    out = given.empty(1 << bits)
    given.core.histogram(*given.given, shift, bits, 0 if of is None else of.data_ptr(), native, out.data_ptr(), _shared_limit, *given.place)
    return out


def _search(given: _List, k: int, ties: str) -> Tensor:
    """The k-th largest key, found on the device: int64, `_SEARCH`."""
    counts, found = given.empty(1 << 16), given.empty(len(_SEARCH))
    native = given.native
    levels = LEVELS16 if native else LEVELS
    for number, (shift, bits) in enumerate(levels):
        prefix = found.data_ptr() if number else 0
        given.core.histogram(*given.given, shift, bits, prefix, native, counts.data_ptr(), _shared_limit, *given.place)
        last = number == len(levels) - 1
        given.core.find_bin(counts.data_ptr(), shift, bits, native, k, number == 0, last, checks.TIES.index(ties), found.data_ptr(), *given.place)
    return found


def select(items: Sequence[Item], score: str, nan: str, k: int, ties: str = "lowest_index") -> list[Tensor]:
    """Words of the k largest keys over all tensors together, k in 0..n: search and mask in one go, the host waits for nothing."""
    given = _List("select", items, score, nan, words=True)
    checks.selection(k, given.elements, ties)
    if k == 0:
        return [w.zero_() for w in given.words]
    found = _search(given, k, ties)
    _mark(given, *(found.data_ptr() + 8 * _SEARCH.index(name) for name in ("threshold", "equal", "same")))
    return given.words


def kth_key(items: Sequence[Item], score: str, nan: str, k: int) -> tuple[int, int, int]:
    """(the k-th largest key, how many are above it, how many equal it); k in 1..n. Waits for the device once; `select` does not."""
    given = _List("kth_key", items, score, nan)
    if not 0 < k <= given.elements:
        checks.refuse("kth_key", f"0 < k <= {given.elements}", k, "pass a k in range")
    found = dict(zip(_SEARCH, _search(given, k, "inclusive").tolist(), strict=True))
    return found["threshold"], found["above"], found["same"]


def _mark(given: _List, threshold: int, equal: int, same: int) -> None:
    scratch = given.empty(given.tiles + 1)
    given.core.mark(*given.given, threshold, equal, same, scratch.data_ptr(), *given.place)


def mark(items: Sequence[Item], score: str, nan: str, threshold: Tensor, equal: Tensor) -> list[Tensor]:
    """Words of the keys above `threshold` (int64 [1]) and of the first `equal` (int64 [1]) that are equal to it, in order through the list."""
    given = _List("mark", items, score, nan, words=True)
    at, room = (t.to(given.device, torch.int64) for t in (threshold, equal))
    _mark(given, at.data_ptr(), room.data_ptr(), 0)
    return given.words


def rows(x: Tensor, other: Tensor | None, score: str, nan: str, k: int, length: int, ties: str, aligned: bool) -> Tensor:
    """Words that keep the k largest of every run of `length` elements (below 2^31); aligned: each run starts on a new word."""
    checks.runs(x, length, ties)
    given = _List("rows", [(x, other)], score, nan, words=True)
    words, count = given.words[0], x.numel() // length
    if aligned and length % 32:
        words = checks.empty_words(count * ((length + 31) // 32 * 32), x.device)
    row = (count, length, min(max(k, 0), length), checks.TIES.index(ties), checks.CODES[x.dtype], aligned, words.data_ptr(), words.numel() * 4)
    given.core.rows(*given.given, *row, _shared_limit, *given.place)
    return words


def nm(x: Tensor, other: Tensor | None, score: str, nan: str, n: int, m: int) -> Tensor:
    """Words that keep n of every m neighbours of a row (last dimension, a multiple of m); ties: lowest index."""
    checks.groups(x, m)
    return rows(x, other, score, nan, n, m, "lowest_index", False)


# ---- statistics


def energy(items: Sequence[Item], score: str) -> tuple[Tensor, Tensor, Tensor]:
    """(counts int64, sums fp64, sums of squares fp64), each [2048] on the CPU, of the scores by the top 11 bits of their keys, NaN in bin 0. The sums
    are exact, then rounded once (`reference.sparse.energy_of`). Waits for the device; scratch 64 KiB."""
    given = _List("energy", items, score, "lowest")
    totals = given.empty(4 * 2048)
    given.core.energy(*given.given, totals.data_ptr(), *given.place)
    return energy_of(totals.view(4, 2048))


def colstat(x: Tensor) -> Tensor:
    """Sum of squares of each column of x [T, K], added in fp64 in the order of `reference.sparse.column_slices`: fp32 [K]."""
    checks.matrix("colstat", x)
    height, columns = x.shape
    slices = column_slices(height, columns)
    out = torch.empty(columns, dtype=torch.float32, device=x.device)
    sums = torch.empty(slices, columns, dtype=torch.float64, device=x.device)
    given = (x.data_ptr(), checks.CODES[x.dtype], height, columns, slices, sums.data_ptr(), out.data_ptr())
    _core(x.device).column_squares(*given, *_place(x.device))
    return out


# ---- masks


def pack(mask: Tensor) -> Tensor:
    """bool, any shape, contiguous -> words."""
    words = checks.empty_words(checks.flat("pack", "mask", mask, (torch.bool,)).numel(), mask.device)
    _core(mask.device).pack(mask.data_ptr(), mask.numel(), words.data_ptr(), *_place(mask.device))
    return words


def unpack(words: Tensor, n: int) -> Tensor:
    """bool [n]."""
    mask = torch.empty(n, dtype=torch.bool, device=words.device)
    _core(words.device).unpack(checks.words("unpack", words, n, words.device).data_ptr(), n, mask.data_ptr(), *_place(words.device))
    return mask


def prefix(words: Tensor) -> Tensor:
    """Exclusive popcounts per 32 words (1,024 elements), the total last: int64 [ceil(words / 32) + 1]."""
    core, n = _core(words.device), checks.flat("prefix", "words", words, (torch.int32,)).numel()
    out = torch.empty((n + 31) // 32 + 1, dtype=torch.int64, device=words.device)
    scratch = torch.empty(core.prefix_scratch(n), dtype=torch.int64, device=words.device)
    core.prefix(words.data_ptr(), n, out.data_ptr(), scratch.data_ptr(), *_place(words.device))
    return out


def indices(words: Tensor, n: int, known: tuple[Tensor, int] | None = None) -> Tensor:
    """Sorted flat positions of the set bits: int32 below 2^31 elements, else int64. Waits for the device, for how many they are, unless (prefix,
    number) is known."""
    checks.words("indices", words, n, words.device)
    before, count = known or (found := prefix(words), int(found[-1]))
    out = torch.empty(count, dtype=torch.int64 if n >> 31 else torch.int32, device=words.device)
    wide = out.element_size() == 8
    _core(words.device).indices(words.data_ptr(), words.numel(), before.data_ptr(), out.data_ptr(), wide, *_place(words.device))
    return out


def _check_index(op: str, index: Tensor, n: int, ordered: bool, device: torch.device) -> None:
    def find() -> bool:
        bad = torch.empty(1, dtype=torch.int32, device=device)
        wide = index.element_size() == 8
        _core(device).check_indices(index.data_ptr(), index.numel(), wide, n, ordered, bad.data_ptr(), *_place(device))
        return not int(bad)

    checks.positions(op, index, n, ordered, device, find)


def from_indices(index: Tensor, n: int) -> Tensor:
    """Words with these bits set; `index`: int32 or int64, sorted, without repeats, in [0, n)."""
    _check_index("from_indices", index, n, True, index.device)
    words = checks.empty_words(n, index.device).zero_()
    wide = index.element_size() == 8
    _core(index.device).set_indices(index.data_ptr(), index.numel(), wide, words.numel(), words.data_ptr(), *_place(index.device))
    return words


# ---- between a dense tensor and its chosen elements


def move_all(op: str, jobs: Sequence[tuple[Tensor, Tensor, Tensor]], alpha: float = 1.0) -> None:
    """gather, scatter, add or swap for any number of (x, positions, values) in one launch. Positions of what is written: sorted, no repeats."""
    if not jobs:
        return
    device, rows, groups = jobs[0][0].device, [], 0
    core = _core(device)
    for x, index, values in jobs:
        codes = checks.move(op, x, index, values, device)
        _check_index(op, index, x.numel(), op != "gather", x.device)
        if index.numel():
            rows.append([x.data_ptr(), values.data_ptr(), index.data_ptr(), index.numel(), groups, codes, x.numel()])
            groups += (index.numel() + core.MOVE_GROUP - 1) // core.MOVE_GROUP
    if rows:
        table = checks.table(rows, device)
        core.move(_MOVES.index(op), table.data_ptr(), len(rows), groups, alpha, *_place(device))
    checks.moved(op, jobs)

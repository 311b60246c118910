"""The primitives of the sparse family on a CPU in C++ (`csrc/cpu/sparse*.cpp`): the functions of `reference.sparse_parts`, bit for bit, on as many
threads as torch uses; results do not depend on their number.

Tensors are contiguous CPU tensors in float32, bfloat16 or float16 of any size and alignment; words are int32, 32 elements each, row-major, lowest
bit first. Anything else is a ValueError before something is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..reference.sparse import TOP, column_slices, energy_of, kept_ties
from .sparse_checks import CODES, Item, bad_positions, empty_words, flat, groups, matrix, move, moved, refuse, row, runs, vector
from .sparse_checks import words as words_of

LEVELS = ((16, 16), (0, 16))
LEVELS16 = ((16, 16),)
CPU = torch.device("cpu")


def _core() -> Any:
    module = dispatch.core()
    if module is None:
        raise RuntimeError(f"fusedadapt sparse: expected the compiled core; {dispatch.core_reason()}; build it, or use backend 'reference'")
    return module.sparse


def _item(op: str, item: Item, score: str) -> tuple[int, int, int, int, int, int]:
    """(address, other's address, elements, columns, dtype, other's dtype) as the core takes it."""
    x, other, _, n, columns, _, code, other_code, _ = row(op, item, score, CPU)
    return x, other, n, columns, code, other_code


def _flat(op: str, name: str, t: Tensor, dtypes: Sequence[torch.dtype] = tuple(CODES)) -> Tensor:
    return flat(op, name, t, dtypes, CPU)


# ---- selection


def histogram(items: Sequence[Item], score: str, nan: str, shift: int, bits: int, prefix: Tensor | None) -> Tensor:
    """Counts by `bits` bits (at most 20) of the key from `shift` up, among the keys whose higher bits are `prefix` (int64 [1]; None: all): int64
    [2^bits]. Scratch: 16 bytes per bin and thread."""
    if not 0 < bits <= 20 or shift < 0 or shift + bits > 32:
        refuse("histogram", "0 < bits <= 20 and shift + bits <= 32", f"shift {shift}, bits {bits}", "use LEVELS")
    out = torch.empty(1 << bits, dtype=torch.int64, device="cpu")
    of = -1 if prefix is None else int(prefix)
    sources = [_item("histogram", item, score) for item in items]
    _core().histogram(sources, score, nan, shift, bits, of, out.data_ptr(), torch.get_num_threads())
    return out


def kth_key(items: Sequence[Item], score: str, nan: str, k: int) -> tuple[int, int, int]:
    """(the k-th largest key, how many are above it, how many equal it): all levels of `histogram` in one call; k in 1..n."""
    n = sum(x.numel() for x, _ in items)
    if not 0 < k <= n:
        refuse("kth_key", f"0 < k <= {n}", k, "pass a k in range")
    key, above, same = _core().kth_key([_item("kth_key", item, score) for item in items], score, nan, k, torch.get_num_threads())
    return key, above, same


def select(items: Sequence[Item], score: str, nan: str, k: int, ties: str = "lowest_index") -> list[Tensor]:
    """Words of the k largest keys over all tensors together, k in 0..n."""
    key, equal = TOP + 1, 0
    if k:
        key, above, same = kth_key(items, score, nan, k)
        equal = kept_ties(ties, k - above, same)
    return mark(items, score, nan, *(torch.tensor([v], dtype=torch.int64, device="cpu") for v in (key, equal)))


def mark(items: Sequence[Item], score: str, nan: str, threshold: Tensor, equal: Tensor) -> list[Tensor]:
    """Words of the keys above `threshold` (int64 [1]) and of the first `equal` (int64 [1]) that are equal to it, in order through the list."""
    words = [empty_words(x.numel(), CPU) for x, _ in items]
    sources = [_item("mark", item, score) for item in items]
    _core().mark(sources, score, nan, int(threshold), int(equal), [w.data_ptr() for w in words], torch.get_num_threads())
    return words


def rows(x: Tensor, other: Tensor | None, score: str, nan: str, k: int, length: int, ties: str, aligned: bool) -> Tensor:
    """Words that keep the k largest of every run of `length` elements; aligned: each run starts on a new word."""
    source = _item("rows", (x, other), score)
    runs(x, length, ties, below=1 << 62)
    n = x.numel() // length * ((length + 31) // 32 * 32) if aligned else x.numel()
    words = empty_words(n, CPU)
    _core().rows(source, score, nan, k, length, ties, aligned, words.data_ptr(), torch.get_num_threads())
    return words


def nm(x: Tensor, other: Tensor | None, score: str, nan: str, n: int, m: int) -> Tensor:
    """Words that keep n of every m neighbours of a row (last dimension, a multiple of m); ties: lowest index."""
    groups(x, m)
    return rows(x, other, score, nan, n, m, "lowest_index", False)


def energy(items: Sequence[Item], score: str) -> tuple[Tensor, Tensor, Tensor]:
    """(counts int64, sums fp64, sums of squares fp64), each [2048], of the scores by the top 11 bits of their keys, NaN in bin 0. The sums are exact,
    then rounded once (`reference.sparse.energy_of`)."""
    parts = torch.empty(4, 2048, dtype=torch.int64, device="cpu")
    _core().energy([_item("energy", item, score) for item in items], score, parts.data_ptr(), torch.get_num_threads())
    return energy_of(parts)


def colstat(x: Tensor) -> Tensor:
    """Sum of squares of each column of x [T, K], added in fp64 in the order of `reference.sparse.column_slices`: fp32 [K]."""
    matrix("colstat", x, CPU)
    out = torch.empty(x.shape[1], dtype=torch.float32, device="cpu")
    slices = column_slices(*x.shape)
    _core().colstat(x.data_ptr(), CODES[x.dtype], x.shape[0], x.shape[1], slices, out.data_ptr(), torch.get_num_threads())
    return out


# ---- masks


def pack(mask: Tensor) -> Tensor:
    """bool, any shape, contiguous -> words."""
    words = empty_words(_flat("pack", "mask", mask, (torch.bool,)).numel(), CPU)
    _core().pack(mask.data_ptr(), mask.numel(), words.data_ptr(), torch.get_num_threads())
    return words


def unpack(words: Tensor, n: int) -> Tensor:
    """bool [n]."""
    mask = torch.empty(n, dtype=torch.bool, device="cpu")
    _core().unpack(words_of("unpack", words, n, CPU).data_ptr(), n, mask.data_ptr(), torch.get_num_threads())
    return mask


def prefix(words: Tensor) -> Tensor:
    """Exclusive popcounts per 32 words (1,024 elements), the total last: int64 [ceil(words / 32) + 1]."""
    out = torch.empty((_flat("prefix", "words", words, (torch.int32,)).numel() + 31) // 32 + 1, dtype=torch.int64, device="cpu")
    _core().prefix(words.data_ptr(), words.numel(), out.data_ptr(), torch.get_num_threads())
    return out


def indices(words: Tensor, n: int, known: tuple[Tensor, int] | None = None) -> Tensor:
    """Sorted flat positions of the set bits: int32 below 2^31 elements, else int64. `known`: their prefix and number, where the caller has them."""
    words_of("indices", words, n, CPU)
    before, count = known or (found := prefix(words), int(found[-1]))
    out = torch.empty(count, dtype=torch.int64 if n >> 31 else torch.int32, device="cpu")
    _core().indices(words.data_ptr(), words.numel(), before.data_ptr(), out.data_ptr(), out.element_size() == 8, torch.get_num_threads())
    return out


def _check_index(op: str, index: Tensor, n: int, ordered: bool) -> None:
    """As `sparse_checks.positions`, but looked at every time: numpy may share the memory, and a bad position is a write anywhere."""
    vector(op, index, CPU)
    if not _core().valid_indices(index.data_ptr(), index.numel(), index.element_size() == 8, n, ordered, torch.get_num_threads()):
        bad_positions(op, n, ordered)


def from_indices(index: Tensor, n: int) -> Tensor:
    """Words with these bits set; `index`: int32 or int64, sorted, without repeats, in [0, n)."""
    _check_index("from_indices", index, n, True)
    words = empty_words(n, CPU)
    wide = index.element_size() == 8
    _core().set_indices(index.data_ptr(), index.numel(), wide, words.numel(), words.data_ptr(), torch.get_num_threads())
    return words


# ---- between a dense tensor and its chosen elements


def move_all(op: str, jobs: Sequence[tuple[Tensor, Tensor, Tensor]], alpha: float = 1.0) -> None:
    """gather, scatter, add or swap for any number of (x, positions, values) in one call, its threads sharing all of them. Positions of what is
    written: sorted, no repeats."""
    rows = []
    for x, index, values in jobs:
        codes = move(op, x, index, values, CPU)
        # What is written must be written once: threads share the list. Reading may go in any order.
        _check_index(op, index, x.numel(), op != "gather")
        rows.append((x.data_ptr(), codes & 0xFF, values.data_ptr(), codes >> 8 & 0xFF, index.data_ptr(), index.numel(), bool(codes >> 16)))
    _core().move_all(op, rows, alpha, torch.get_num_threads())
    moved(op, jobs)

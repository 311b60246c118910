"""Exact selection over lists of tensors in Triton: histograms of key bits, the search among their bins, the words.

Bytes: one read of x per level (bf16 two, fp32 three), one to count ties, one for the mask; scratch 16 bytes per chunk. Integer sums are exact in any
order, so the atomics of the histogram always give the same counts. The host waits for nothing (`cuts` returns numbers, and waits once).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedadapt.ops import sparse_checks as checks
from fusedadapt.ops.sparse_checks import Item
from fusedadapt.reference.merge import Cut, cut_of

from .common import program
from .sparse_parts import OPTIONS, List, chosen, find_digit, kept_ties, keys, piece, store_words

LEVELS = ((21, 11), (10, 11), (0, 10))
LEVELS16 = ((21, 11), (16, 5))
# tl.histogram clears and reads its bins once per tile: the larger the better, until registers run out.
COUNT_TILE, MARK_TILE = 4096, 2048
_SELECT = ["items", "chunks", "out", "prefix", "threshold", "equal", "before", "ties", "chunk", "shift", "bits", "nan_key"]
_LEFT, _SAME, _THRESHOLD, _EQUAL = 1, 3, 4, 5  # of what `find_bin_kernel` keeps from level to level


@triton.jit
def tile_counts(item, start, count, prefix, shift, bits, nan_key, SCORE: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    lane = tl.arange(0, TILE)
    valid = lane < count
    key = keys(item, start, lane, valid, nan_key, SCORE, WIDE).to(tl.int64)
    mine = valid & ((prefix < 0) | ((key >> (shift + bits)) == prefix))
    return tl.histogram(((key >> shift) & ((1 << bits) - 1)).to(tl.int32), BINS, mask=mine)


@triton.jit(do_not_specialize=_SELECT)
def histogram_kernel(
    items, chunks, out, prefix, chunk: tl.int64, shift: tl.int64, bits: tl.int64, nan_key: tl.uint32,
    SCORE: tl.constexpr, BINS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out[b] += how many of this chunk's elements are in bin b. prefix: one int64, -1 for all."""
    item, begin, narrow, end = piece(items, chunks, chunk)
    wanted = tl.load(prefix)
    total = tl.zeros([BINS], tl.int32)
    for start in range(begin, narrow, TILE):
        count = tl.multiple_of(tl.minimum(narrow - start, TILE).to(tl.int32), 8)
        total += tile_counts(item, start, count, wanted, shift, bits, nan_key, SCORE, BINS, TILE, True)
    for start in range(narrow, end, TILE):
        count = tl.minimum(end - start, TILE).to(tl.int32)
        total += tile_counts(item, start, count, wanted, shift, bits, nan_key, SCORE, BINS, TILE, False)
    tl.atomic_add(out + tl.arange(0, BINS), total.to(tl.int64), total != 0, sem="relaxed")


@triton.jit(do_not_specialize=["counts", "found", "shift", "bits", "last", "ties"])
def find_bin_kernel(counts, found, shift: tl.int64, bits: tl.int64, last: tl.int32, ties: tl.int32, BINS: tl.constexpr):
    """One program. found: int64 [6]: the key's bits so far (-1: none), the rank left, how many are above, how many in the bin; on the last level
    also the whole key and how many that equal it stay."""
    count = tl.load(counts + BINS - 1 - tl.arange(0, BINS))
    known = tl.load(found)
    left = tl.load(found + 1)
    at, above, same = find_digit(count, left)
    prefix = (tl.maximum(known, 0) << bits) | (BINS - 1 - at)
    tl.store(found, prefix)
    tl.store(found + 1, left - above)
    tl.store(found + 2, tl.load(found + 2) + above)
    tl.store(found + 3, same)
    if last != 0:  # the key of NaN has ones in its lower bits too
        top = tl.full([], 0xFFFFFFFF, tl.int64)
        tl.store(found + 4, tl.where(prefix == (top >> shift), top, prefix << shift))
        tl.store(found + 5, kept_ties(left - above, same, ties))


@triton.jit
def tile_ties(item, start, count, limit, nan_key, SCORE: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    lane = tl.arange(0, TILE)
    valid = lane < count
    return tl.sum((valid & (keys(item, start, lane, valid, nan_key, SCORE, WIDE).to(tl.int64) == limit)).to(tl.int32), 0)


@triton.jit(do_not_specialize=_SELECT)
def ties_kernel(
    items, chunks, threshold, equal, out, chunk: tl.int64, nan_key: tl.uint32, SCORE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """out[c] = keys of chunk c that equal the threshold; 0 where none of them is to be kept."""
    item, begin, narrow, end = piece(items, chunks, chunk)
    limit = tl.load(threshold)
    if tl.load(equal) <= 0:  # not `return`: an early exit ends Triton's alignment analysis
        narrow = begin
        end = begin
    total = tl.load(equal).to(tl.int32) * 0
    for start in range(begin, narrow, TILE):
        total += tile_ties(item, start, tl.multiple_of(tl.minimum(narrow - start, TILE).to(tl.int32), 8), limit, nan_key, SCORE, TILE, True)
    for start in range(narrow, end, TILE):
        total += tile_ties(item, start, tl.minimum(end - start, TILE).to(tl.int32), limit, nan_key, SCORE, TILE, False)
    tl.store(out + program(), total.to(tl.int64))


@triton.jit
def mark_tile(item, start, count, limit, room, nan_key, SCORE: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Writes a tile's words; returns how many of its ties there are."""
    lane = tl.arange(0, TILE)
    valid = lane < count
    key = keys(item, start, lane, valid, nan_key, SCORE, WIDE).to(tl.int64)
    keep, found = chosen(key, valid, limit, room)
    store_words(tl.load(item + 2), start, count, keep, TILE)
    return found


@triton.jit(do_not_specialize=_SELECT)
def mark_kernel(
    items, chunks, threshold, equal, before, chunk: tl.int64, nan_key: tl.uint32, SCORE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """before[c]: ties in the chunks before c."""
    item, begin, narrow, end = piece(items, chunks, chunk)
    limit = tl.load(threshold)
    room = tl.load(equal) - tl.load(before + program())
    narrow = narrow // 32 * 32  # a word is written once
    for start in range(begin, narrow, TILE):
        count = tl.multiple_of(tl.minimum(narrow - start, TILE).to(tl.int32), 32)
        room -= mark_tile(item, start, count, limit, room, nan_key, SCORE, TILE, True)
    for start in range(narrow, end, TILE):
        room -= mark_tile(item, start, tl.minimum(end - start, TILE).to(tl.int32), limit, room, nan_key, SCORE, TILE, False)


@triton.jit
def tie_place(item, start, count, limit, room, nan_key, SCORE: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """(where the room-th tie of a tile is, or 0; how many there are)."""
    lane = tl.arange(0, TILE)
    valid = lane < count
    tie = valid & (keys(item, start, lane, valid, nan_key, SCORE, WIDE).to(tl.int64) == limit)
    number = tl.cumsum(tie.to(tl.int32), 0)
    return tl.sum(tl.where(tie & (number == room), start + lane, 0), 0), tl.sum(tie.to(tl.int32), 0)


@triton.jit(do_not_specialize=_SELECT)
def place_kernel(
    items, chunks, threshold, equal, before, ties, out, chunk: tl.int64, nan_key: tl.uint32, SCORE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """out[0] = the element that is the equal-th (from 1) of those that equal the threshold: found in one chunk, which alone is read again."""
    item, begin, narrow, end = piece(items, chunks, chunk)
    limit = tl.load(threshold)
    room = tl.load(equal) - tl.load(before + program())
    mine = (room > 0) & (room <= tl.load(ties + program()))
    if mine == 0:
        narrow = begin
        end = begin
    place = room * 0
    for start in range(begin, narrow, TILE):
        at, found = tie_place(item, start, tl.multiple_of(tl.minimum(narrow - start, TILE).to(tl.int32), 8), limit, room, nan_key, SCORE, TILE, True)
        place += at
        room -= found
    for start in range(narrow, end, TILE):
        at, found = tie_place(item, start, tl.minimum(end - start, TILE).to(tl.int32), limit, room, nan_key, SCORE, TILE, False)
        place += at
        room -= found
    if mine:
        tl.store(out, place)


# ---- launches


def histogram(items: Sequence[Item], score: str, nan: str, shift: int, bits: int, prefix: Tensor | None) -> Tensor:
    """Counts by `bits` bits (at most 12: they are in registers) of the key from `shift` up, among the keys whose higher bits are `prefix` (int64 [1];
    None: all): int64 [2^bits]."""
    if not 0 < bits <= 12 or shift < 0 or shift + bits > 32:
        checks.refuse("histogram", "0 < bits <= 12 and shift + bits <= 32", f"shift {shift}, bits {bits}", "use LEVELS")
    given = List("histogram", items, score, nan)
    out = torch.zeros(1 << bits, dtype=torch.int64, device=given.device)
    of = torch.full((1,), -1, dtype=torch.int64, device=given.device) if prefix is None else prefix.to(given.device)
    if given.count:
        with torch.cuda.device_of(out):
            _count(given, out, of, shift, bits)
    return out


def _count(given: List, out: Tensor, prefix: Tensor, shift: int, bits: int) -> None:
    histogram_kernel[(given.count,)](
        given.items, given.chunks, out, prefix, given.chunk, shift, bits, given.nan_key, given.score, 1 << bits, COUNT_TILE, **OPTIONS
    )  # fmt: skip


def _search(given: List, short: bool, k: int, ties: str) -> Tensor:
    """The k-th largest key, found on the device: `find_bin_kernel`'s int64 [6]."""
    found = checks.table([[-1, k, 0, 0, 0, 0]], given.device).view(-1)
    levels = LEVELS16 if short else LEVELS
    with torch.cuda.device_of(found):
        for number, (shift, bits) in enumerate(levels):
            counts = torch.zeros(1 << bits, dtype=torch.int64, device=given.device)
            _count(given, counts, found, shift, bits)
            find_bin_kernel[(1,)](counts, found, shift, bits, int(number == len(levels) - 1), checks.TIES.index(ties), 1 << bits, **OPTIONS)
    return found


def _short(items: Sequence[Item], score: str) -> bool:
    """Whether all keys end with their 16th bit."""
    return score == "abs" and all(x.dtype == torch.bfloat16 for x, _ in items)


def select(items: Sequence[Item], score: str, nan: str, k: int, ties: str = "lowest_index") -> list[Tensor]:
    """Words of the k largest keys over all tensors together, k in 0..n: search and mask in one go, the host waits for nothing."""
    given = List("select", items, score, nan, words=True)
    checks.selection(k, given.elements, ties)
    if k == 0:
        return [w.zero_() for w in given.words]
    found = _search(given, _short(items, score), k, ties)
    _mark(given, found[_THRESHOLD:], found[_EQUAL:])
    return given.words


def _ties(given: List, at: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """(ties in each chunk, in those before it)."""
    ties = torch.empty(given.count, dtype=torch.int64, device=given.device)
    ties_kernel[(given.count,)](
        given.items, given.chunks, at, room, ties, given.chunk, given.nan_key, given.score, MARK_TILE, **OPTIONS
    )  # fmt: skip
    return ties, torch.cumsum(ties, 0) - ties


def _mark(given: List, at: Tensor, room: Tensor) -> None:
    with torch.cuda.device_of(at):
        _, before = _ties(given, at, room)
        mark_kernel[(given.count,)](
            given.items, given.chunks, at, room, before, given.chunk, given.nan_key, given.score, MARK_TILE, **OPTIONS
        )  # fmt: skip


def mark(items: Sequence[Item], score: str, nan: str, threshold: Tensor, equal: Tensor) -> list[Tensor]:
    """Words of the keys above `threshold` (int64 [1]) and of the first `equal` (int64 [1]) that are equal to it, in order through the list."""
    given = List("mark", items, score, nan, words=True)
    if given.count:
        at, room = (t.to(given.device, torch.int64) for t in (threshold, equal))
        _mark(given, at, room)
    return given.words


def cuts(base: Tensor | None, tensors: Sequence[Tensor], counts: Sequence[int]) -> list[Cut]:
    """Where the `counts[i]` largest |tensors[i] - base| end; ties: lowest index. Flat tensors of one length. Waits for the device once."""
    answers: list[Cut | None] = [cut_of(t.numel(), k) for t, k in zip(tensors, counts, strict=True)]
    rows = []
    for i, (tensor, k) in enumerate(zip(tensors, counts, strict=True)):
        if answers[i] is not None:
            continue
        items = [(tensor, base)]
        score = "abs" if base is None else "abs_diff"
        given = List("cuts", items, score, "highest")
        found = _search(given, _short(items, score), k, "lowest_index")
        at, room = found[_THRESHOLD:], found[_EQUAL:]
        with torch.cuda.device_of(found):
            ties, before = _ties(given, at, room)
            place_kernel[(given.count,)](
                given.items, given.chunks, at, room, before, ties, found, given.chunk, given.nan_key, given.score, MARK_TILE, **OPTIONS
            )  # fmt: skip
        rows.append(found)
    for i, row in zip((i for i, cut in enumerate(answers) if cut is None), torch.stack(rows).tolist() if rows else (), strict=True):
        last = row[0] if row[_LEFT] < row[_SAME] else tensors[i].numel() - 1
        answers[i] = Cut(row[_THRESHOLD], last)
    return [cut for cut in answers if cut is not None]

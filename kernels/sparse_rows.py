"""Selection within rows, blocks and groups of neighbours in Triton.

Short runs by rank: how many of its run come before each element. Longer ones by radix: a program finds its row's cut in four passes of 8 bits; a row
up to 16,384 elements is read once and stays in registers, a longer one is read from the cache for each pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedadapt.ops import sparse_checks as checks
from fusedadapt.reference.sparse import SCORES

from .common import program
from .sparse_parts import OPTIONS, List, chosen, find_digit, kept_ties, keys, store_words

NM_TILE = 2048
_SHORT = 32  # runs up to here by rank
_TILES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_LONG = 2048  # of a row that fits none


def warps(tile: int) -> int:
    """At most 32 keys a thread: they stay in registers through five looks at them."""
    return min(max(tile // 128, 1), 8) if tile < 16384 else 16


@triton.jit
def ahead_of(other, own, earlier, ties):
    """Whether a neighbour's key comes before one's own, and takes a place that it might have had."""
    return (other > own) | ((other == own) & ((ties == 2) | ((ties == 0) & earlier)))


@triton.jit
def best_of_rows(key, n, ties, M: tl.constexpr, TILE: tl.constexpr):
    """Which of every M neighbours are among their n largest: by rank, without sorting."""
    rows = tl.reshape(key, [TILE // M, M])
    own, other = rows[:, :, None], rows[:, None, :]
    earlier = tl.arange(0, M)[None, None, :] < tl.arange(0, M)[None, :, None]
    better = ahead_of(other, own, earlier, ties)
    return tl.reshape(tl.sum(better.to(tl.int32), 2), [TILE]) < n


@triton.jit(do_not_specialize=["items", "nan_key", "n", "m", "ties"])
def nm_kernel(items, nan_key: tl.uint32, n: tl.int64, m: tl.int64, ties: tl.int32, M: tl.constexpr, SCORE: tl.constexpr, TILE: tl.constexpr):
    """Keeps the elements of which fewer than n of their m neighbours are ahead; with exclusive ties an element is ahead of itself. M: m where it is a
    power of two and small (groups are rows of registers), else 0 (neighbours are read again, from the cache)."""
    start = program() * TILE
    left = tl.load(items + 3) - start
    count = tl.minimum(left, TILE).to(tl.int32)
    lane = tl.arange(0, TILE)
    valid = lane < count
    if M > 0:
        if (left >= TILE) & (tl.load(items + 8) != 0):
            keep = best_of_rows(keys(items, start, lane, lane < TILE, nan_key, SCORE, True), n, ties, M, TILE)
        else:
            keep = best_of_rows(keys(items, start, lane, valid, nan_key, SCORE, False), n, ties, M, TILE)
    else:
        key = keys(items, start, lane, valid, nan_key, SCORE, False)
        group = (start + lane) // m * m - start  # of whole groups only, as m divides the number of elements
        rank = lane * 0
        for o in range(0, m):
            other = keys(items, start, group + o, valid, nan_key, SCORE, False)
            rank += ahead_of(other, key, group + o < lane, ties).to(tl.int32)
        keep = rank < n
    store_words(tl.load(items + 2), start, count, valid & keep, TILE)


@triton.jit
def or_words(address, start, keep, TILE: tl.constexpr):
    """As `store_words`, into words that neighbouring rows share and that are 0 before."""
    bit = tl.arange(0, 32)
    packed = tl.sum(tl.reshape(keep.to(tl.uint32), [TILE // 32, 32]) << bit[None, :].to(tl.uint32), 1)
    pointer = address.to(tl.pointer_type(tl.int32)) + start // 32 + tl.arange(0, TILE // 32)
    tl.atomic_or(pointer, packed.to(tl.int32, bitcast=True), packed != 0, sem="relaxed")


@triton.jit
def row_keys(item, origin, at, row, lead, end, nan_key, SCORE: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr, PART: tl.constexpr):
    """(keys, which of them are the row's) of the tile that begins `at` lanes after `origin`."""
    lane = tl.arange(0, TILE)
    left = (end - at).to(tl.int32)
    if WIDE:
        left = tl.multiple_of(left, 32)
    valid = lane < left
    if not WIDE:
        valid = valid & (lane + at >= lead)
    if PART:
        return keys(item, origin + at, lane, valid, nan_key, SCORE, WIDE, row), valid
    else:
        return keys(item, origin + at, lane, valid, nan_key, SCORE, WIDE), valid


@triton.jit
def count_digits(key, valid, prefix, PASS: tl.constexpr):
    """Of the keys whose higher bits are `prefix`: how many have each of the 256 digits of this pass, from the largest down."""
    if PASS > 0:
        valid = valid & ((key >> (32 - 8 * PASS)) == prefix)
    return tl.histogram((255 - ((key >> (24 - 8 * PASS)) & 255)).to(tl.int32), 256, mask=valid)


@triton.jit(do_not_specialize=["items", "nan_key", "k", "length", "ties", "columns"])
def rows_kernel(
    items, nan_key: tl.uint32, k: tl.int64, length: tl.int64, ties: tl.int32, columns: tl.int64, SCORE: tl.constexpr, TILE: tl.constexpr,
    ONE: tl.constexpr, WIDE: tl.constexpr, PART: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """A row a program: four passes of 8 bits find the k-th largest key, one more writes the bits. ONE: the row fits a tile and is read once. PART:
    the row lies in one of x's rows of `columns`. LAYOUT: 0 rows are whole words, 1 each begins on a new word, 2 neighbours share words (zeros
    before)."""
    row = program()
    first = row * length
    if WIDE:
        first = tl.multiple_of(first, 32)  # on the product itself: a hint on what folds away is lost
    origin = first
    end = length
    if LAYOUT == 2:
        origin = first // 32 * 32
        end = first - origin + length
    lead = end - length
    whole = first - first % columns if PART else first  # where x's own row begins
    prefix = tl.load(items + 3).to(tl.uint32) * 0
    left = k.to(tl.int32)
    same = left
    if ONE:
        key, valid = row_keys(items, origin, 0, whole, lead, end, nan_key, SCORE, TILE, WIDE, PART)
    for turn in tl.static_range(4):
        counts = tl.zeros([256], tl.int32)
        if ONE:
            counts += count_digits(key, valid, prefix, turn)
        else:
            for at in range(0, end, TILE):
                key, valid = row_keys(items, origin, at, whole, lead, end, nan_key, SCORE, TILE, WIDE, PART)
                counts += count_digits(key, valid, prefix, turn)
        digit, above, same = find_digit(counts, left)
        prefix = (prefix << 8) | (255 - digit).to(tl.uint32)
        left -= above
    room = kept_ties(left, same, ties)
    to = origin
    if LAYOUT == 1:
        to = row * ((length + 31) // 32 * 32)
    for at in range(0, end, TILE):
        if not ONE:
            key, valid = row_keys(items, origin, at, whole, lead, end, nan_key, SCORE, TILE, WIDE, PART)
        keep, found = chosen(key, valid, prefix, room)
        room -= found
        if LAYOUT == 2:
            or_words(tl.load(items + 2), to + at, keep, TILE)
        else:
            store_words(tl.load(items + 2), to + at, (end - at).to(tl.int32), keep, TILE)


# ---- launches


def rows(x: Tensor, other: Tensor | None, score: str, nan: str, k: int, length: int, ties: str, aligned: bool) -> Tensor:
    """Words that keep the k largest of every run of `length` elements (below 2^31); aligned: each run starts on a new word."""
    checks.row("rows", (x, other), score, x.device)
    checks.runs(x, length, ties)
    k, count, straight = min(k, length), x.numel() // length, length % 32 == 0
    if length <= _SHORT and (straight or not aligned):
        return _ranked(x, other, score, nan, k, length, ties)
    n = count * ((length + 31) // 32 * 32) if aligned else x.numel()
    layout = 0 if straight else 1 if aligned else 2
    words = checks.empty_words(n, x.device)
    if k <= 0 or layout == 2:
        words.zero_()
    if k <= 0 or not count:
        return words
    item = checks.row("rows", (x, other), score, x.device)
    item[2] = words.data_ptr()
    wide, part = bool(item[8]) and straight, score == "abs_scaled" and item[4] % length == 0
    size = length + (31 if layout == 2 else 0)
    tile = next((t for t in _TILES if t >= size and (wide or t < 16384)), 0)  # at 16 warps only the wide loads leave registers for the keys
    one, tile = tile > 0, tile or _LONG
    nan_key = 0 if nan == "lowest" else 0xFFFFFFFF
    with torch.cuda.device_of(x):
        rows_kernel[(count,)](
            checks.table([item], x.device), nan_key, k, length, checks.TIES.index(ties), item[4], SCORES.index(score), tile, one, wide, part, layout,
            num_warps=warps(tile), enable_fp_fusion=False,
        )  # fmt: skip
    return words


def _ranked(x: Tensor, other: Tensor | None, score: str, nan: str, n: int, m: int, ties: str) -> Tensor:
    """Short runs: how many of its run come before each element."""
    given = List("rows", [(x, other)], score, nan, words=True)
    if given.count:
        room, registers = n + (ties == "exclusive"), m if m in (2, 4, 8) else 0
        with torch.cuda.device_of(x):
            nm_kernel[(triton.cdiv(x.numel(), NM_TILE),)](
                given.items, given.nan_key, room, m, checks.TIES.index(ties), registers, given.score, NM_TILE, **OPTIONS
            )  # fmt: skip
    return given.words[0]


def nm(x: Tensor, other: Tensor | None, score: str, nan: str, n: int, m: int) -> Tensor:
    """Words that keep n of every m neighbours of a row (last dimension, a multiple of m); ties: lowest index."""
    checks.groups(x, m)
    return rows(x, other, score, nan, n, m, "lowest_index", False)

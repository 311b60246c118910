"""Sparse masks and selection in Triton: the functions of `reference.sparse_parts`, bit for bit, for what has no CUDA build.

Bytes of a selection: one read of x per level (bf16 two, fp32 three), one to count ties, one for the mask; scratch 16 bytes per chunk. Integer sums
are exact in any order, so the atomics of the histogram always give the same counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedadapt.ops import sparse_checks as checks
from fusedadapt.ops.sparse_checks import Item
from fusedadapt.reference.sparse import SCORES

from .common import as_bits, at, load_f32, program, store_rounded
from .sparse_merge import merge_, norms, votes

__all__ = ["LEVELS", "LEVELS16", "add_at_", "gather_at", "histogram", "mark", "merge_", "nm", "norms", "pack", "prefix", "scatter_at_", "swap_at_",
           "unpack", "votes"]  # fmt: skip

LEVELS = ((21, 11), (10, 11), (0, 10))
LEVELS16 = ((21, 11), (16, 5))
ABS, DIFF, SCALED, PRODUCT, GIVEN = (tl.constexpr(i) for i in range(5))
# An item of `checks.row`: address, other's address, words, elements, columns, first chunk, dtype, other's dtype, aligned.
WIDTH = tl.constexpr(9)
# tl.histogram clears and reads its bins once per tile: the larger the better, until registers run out.
COUNT_TILE, MARK_TILE, MOVE_TILE = 4096, 2048, 1024
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_SELECT = ["items", "chunks", "out", "prefix", "threshold", "equal", "before", "chunk", "shift", "bits", "nan_key"]


@triton.jit
def key_of(s, nan_key):
    """Score -> unsigned integer of the same order (reference.sparse)."""
    u = as_bits(s)
    order = tl.where(u == 0x80000000, u, tl.where(u > 0x7FFFFFFF, u ^ 0xFFFFFFFF, u | 0x80000000))
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, nan_key, order)


@triton.jit
def keys(item, start, lane, valid, nan_key, SCORE: tl.constexpr, WIDE: tl.constexpr):
    """Keys of elements start + lane of an item. WIDE promises 16-byte alignment of x and of a second tensor."""
    s = load_f32(tl.load(item), tl.load(item + 6).to(tl.int32), start, lane, valid, WIDE)
    other = tl.load(item + 1)
    if SCORE == SCALED:
        column = (start + lane) % tl.load(item + 4)
        s = tl.abs(s) * tl.load(other.to(tl.pointer_type(tl.float32)) + column, valid, 0.0)
    elif SCORE == DIFF:
        s = tl.abs(s - load_f32(other, tl.load(item + 7).to(tl.int32), start, lane, valid, WIDE))
    elif SCORE == PRODUCT:
        s = tl.abs(s * load_f32(other, tl.load(item + 7).to(tl.int32), start, lane, valid, WIDE))
    elif SCORE == ABS:
        s = tl.abs(s)
    return key_of(s, nan_key)


@triton.jit
def piece(items, chunks, chunk):
    """This program's share: item, first element, where the narrow path begins, end."""
    mine = chunks + 2 * program()
    item = items + WIDTH * tl.load(mine)
    begin = tl.multiple_of(tl.load(mine + 1), 32)
    end = tl.minimum(begin + chunk, tl.load(item + 3))
    aligned = tl.load(item + 8) != 0
    return item, begin, tl.where(aligned, begin + (end - begin) // 8 * 8, begin), end


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
def store_words(address, start, count, keep, TILE: tl.constexpr):
    """Bits of `start` (a multiple of 32) on, packed; bits at and past `count` are 0 already."""
    bit = tl.arange(0, 32)
    packed = tl.sum(tl.reshape(keep.to(tl.uint32), [TILE // 32, 32]) << bit[None, :].to(tl.uint32), 1)
    word = tl.arange(0, TILE // 32)
    pointer = address.to(tl.pointer_type(tl.int32)) + start // 32
    tl.store(pointer + word, packed.to(tl.int32, bitcast=True), word * 32 < count)


@triton.jit
def mark_tile(item, start, count, limit, room, nan_key, SCORE: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Writes a tile's words; returns how many of its ties there are."""
    lane = tl.arange(0, TILE)
    valid = lane < count
    key = keys(item, start, lane, valid, nan_key, SCORE, WIDE).to(tl.int64)
    tie = valid & (key == limit)
    found = tl.sum(tie.to(tl.int32), 0)
    keep = valid & (key > limit)
    if room >= found:
        keep = keep | tie
    elif room > 0:
        keep = keep | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= room))
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
def best_of_rows(key, n, M: tl.constexpr, TILE: tl.constexpr):
    """Which of every M neighbours are among their n largest: by rank, without sorting."""
    rows = tl.reshape(key, [TILE // M, M])
    own, other = rows[:, :, None], rows[:, None, :]
    earlier = tl.arange(0, M)[None, None, :] < tl.arange(0, M)[None, :, None]
    better = (other > own) | ((other == own) & earlier)
    return tl.reshape(tl.sum(better.to(tl.int32), 2), [TILE]) < n


@triton.jit(do_not_specialize=["items", "nan_key", "n", "m"])
def nm_kernel(items, nan_key: tl.uint32, n: tl.int64, m: tl.int64, M: tl.constexpr, SCORE: tl.constexpr, TILE: tl.constexpr):
    """M: m where it is a power of two and small (groups are rows of registers), else 0 (neighbours are read again, from the cache)."""
    start = program() * TILE
    left = tl.load(items + 3) - start
    count = tl.minimum(left, TILE).to(tl.int32)
    lane = tl.arange(0, TILE)
    valid = lane < count
    if M > 0:
        if (left >= TILE) & (tl.load(items + 8) != 0):
            keep = best_of_rows(keys(items, start, lane, lane < TILE, nan_key, SCORE, True), n, M, TILE)
        else:
            keep = best_of_rows(keys(items, start, lane, valid, nan_key, SCORE, False), n, M, TILE)
    else:
        key = keys(items, start, lane, valid, nan_key, SCORE, False)
        group = (start + lane) // m * m - start  # of whole groups only, as m divides the number of elements
        rank = lane * 0
        for o in range(0, m):
            other = keys(items, start, group + o, valid, nan_key, SCORE, False)
            rank += ((other > key) | ((other == key) & (group + o < lane))).to(tl.int32)
        keep = rank < n
    store_words(tl.load(items + 2), start, count, valid & keep, TILE)


@triton.jit(do_not_specialize=["mask", "words", "n"])
def pack_kernel(mask: tl.int64, words: tl.int64, n: tl.int64, TILE: tl.constexpr):
    start = program() * TILE
    lane = tl.arange(0, TILE)
    if (n - start >= TILE) & (mask % 16 == 0):
        keep = tl.load(at(mask, start, tl.uint8, True) + lane)
    else:
        keep = tl.load(at(mask, start, tl.uint8, False) + lane, lane < n - start, 0)
    store_words(words, start, tl.minimum(n - start, TILE).to(tl.int32), keep != 0, TILE)


@triton.jit(do_not_specialize=["words", "mask", "n"])
def unpack_kernel(words, mask: tl.int64, n: tl.int64, TILE: tl.constexpr):
    """New tensors are aligned, so the mask is."""
    start = program() * TILE
    lane = tl.arange(0, TILE)
    word = tl.load(words + start // 32 + lane // 32, lane < n - start, 0).to(tl.uint32, bitcast=True)
    bits = ((word >> (lane % 32).to(tl.uint32)) & 1).to(tl.uint8)
    if n - start >= TILE:
        tl.store(at(mask, start, tl.uint8, True) + lane, bits)
    else:
        tl.store(at(mask, start, tl.uint8, False) + lane, bits, lane < n - start)


@triton.jit
def popcount(v):
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    v = v + (v >> 8)
    return (v + (v >> 16)) & 63


@triton.jit(do_not_specialize=["words", "counts", "n", "groups"])
def counts_kernel(words, counts, n: tl.int64, groups: tl.int64, GROUPS: tl.constexpr):
    """counts[g] = bits of words 32 g .. 32 g + 31."""
    group = program() * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    word = tl.load(words + at, at < n, 0).to(tl.uint32, bitcast=True)
    tl.store(counts + group, tl.sum(popcount(word).to(tl.int32), 1).to(tl.int64), group < groups)


@triton.jit(do_not_specialize=["x", "values", "index", "count", "n", "alpha"])
def move_kernel(x, values, index, count: tl.int64, n: tl.int64, alpha: tl.float32, OP: tl.constexpr, TILE: tl.constexpr):
    """OP: 0 gather, 1 scatter, 2 add, 3 swap. Same types are moved as integers, bit for bit."""
    i = program() * TILE + tl.arange(0, TILE)
    valid = i < count
    at = tl.load(index + i, valid, 0).to(tl.int64)
    valid = valid & (at >= 0) & (at < n)
    if OP == 0:
        tl.store(values + i, tl.load(x + at, valid, 0), valid)
    elif OP == 3:
        old = tl.load(x + at, valid, 0)
        tl.store(x + at, tl.load(values + i, valid, 0), valid)
        tl.store(values + i, old, valid)
    elif OP == 1:
        value = tl.load(values + i, valid, 0)
        if values.dtype.element_ty == x.dtype.element_ty:
            tl.store(x + at, value, valid)
        else:
            store_rounded(x + at, value.to(tl.float32), valid)
    else:
        by = alpha * tl.load(values + i, valid, 0.0).to(tl.float32)
        store_rounded(x + at, tl.load(x + at, valid, 0.0).to(tl.float32) + by, valid)


# ---- launches


class _List:
    """Items and chunks on the device. Chunks as long as leave some thousand programs."""

    def __init__(self, op: str, items: Sequence[Item], score: str, nan: str, words: bool = False):
        self.device, self.words, rows = checks.listed(op, items, score, nan, words)
        total = sum(row[3] for row in rows)
        self.chunk = min(max(1 << (total // 4096 + 1).bit_length(), 1 << 13), 1 << 20)
        chunks = [[i, at] for i, row in enumerate(rows) for at in range(0, row[3], self.chunk)]
        self.count = len(chunks)
        self.items = checks.table(rows or [[0] * 9], self.device)
        self.chunks = checks.table(chunks or [[0, 0]], self.device)
        self.score, self.nan_key = SCORES.index(score), 0 if nan == "lowest" else 0xFFFFFFFF


def histogram(items: Sequence[Item], score: str, nan: str, shift: int, bits: int, prefix: Tensor | None) -> Tensor:
    """Counts by `bits` bits (at most 12: they are in registers) of the key from `shift` up, among the keys whose higher bits are `prefix` (int64 [1];
    None: all): int64 [2^bits]."""
    if not 0 < bits <= 12 or shift < 0 or shift + bits > 32:
        checks.refuse("histogram", "0 < bits <= 12 and shift + bits <= 32", f"shift {shift}, bits {bits}", "use LEVELS")
    given = _List("histogram", items, score, nan)
    out = torch.zeros(1 << bits, dtype=torch.int64, device=given.device)
    of = torch.full((1,), -1, dtype=torch.int64, device=given.device) if prefix is None else prefix.to(given.device)
    if given.count:
        with torch.cuda.device_of(out):
            histogram_kernel[(given.count,)](
                given.items, given.chunks, out, of, given.chunk, shift, bits, given.nan_key, given.score, 1 << bits, COUNT_TILE, **OPTIONS
            )  # fmt: skip
    return out


def mark(items: Sequence[Item], score: str, nan: str, threshold: Tensor, equal: Tensor) -> list[Tensor]:
    """Words of the keys above `threshold` (int64 [1]) and of the first `equal` (int64 [1]) that are equal to it, in order through the list."""
    given = _List("mark", items, score, nan, words=True)
    if not given.count:
        return given.words
    at, room = (t.to(given.device, torch.int64) for t in (threshold, equal))
    ties = torch.empty(given.count, dtype=torch.int64, device=given.device)
    where = (given.items, given.chunks, at, room)
    with torch.cuda.device_of(ties):
        ties_kernel[(given.count,)](*where, ties, given.chunk, given.nan_key, given.score, MARK_TILE, **OPTIONS)
        before = torch.cumsum(ties, 0) - ties
        mark_kernel[(given.count,)](*where, before, given.chunk, given.nan_key, given.score, MARK_TILE, **OPTIONS)
    return given.words


def nm(x: Tensor, other: Tensor | None, score: str, nan: str, n: int, m: int) -> Tensor:
    """Words that keep n of every m neighbours of a row (last dimension, a multiple of m); ties: lowest index."""
    if m <= 0 or (x.numel() and x.shape[-1] % m):
        checks.refuse("nm", f"rows of a multiple of {m} elements", tuple(x.shape), "pad them or choose another m")
    given = _List("nm", [(x, other)], score, nan, words=True)
    if given.count:
        rows = m if m in (2, 4, 8) else 0
        with torch.cuda.device_of(x):
            nm_kernel[(triton.cdiv(x.numel(), MARK_TILE),)](given.items, given.nan_key, n, m, rows, given.score, MARK_TILE, **OPTIONS)
    return given.words[0]


def pack(mask: Tensor) -> Tensor:
    """bool, any shape, contiguous -> words."""
    words = checks.empty_words(checks.flat("pack", "mask", mask, (torch.bool,)).numel(), mask.device)
    if mask.numel():
        with torch.cuda.device_of(mask):
            pack_kernel[(triton.cdiv(mask.numel(), 4096),)](mask.data_ptr(), words.data_ptr(), mask.numel(), 4096, **OPTIONS)
    return words


def unpack(words: Tensor, n: int) -> Tensor:
    """bool [n]."""
    checks.words("unpack", words, n, words.device)
    mask = torch.empty(n, dtype=torch.bool, device=words.device)
    if n:
        with torch.cuda.device_of(words):
            unpack_kernel[(triton.cdiv(n, 4096),)](words, mask.data_ptr(), n, 4096, **OPTIONS)
    return mask


def prefix(words: Tensor) -> Tensor:
    """Exclusive popcounts per 32 words (1,024 elements), the total last: int64 [ceil(words / 32) + 1]."""
    groups = (checks.flat("prefix", "words", words, (torch.int32,)).numel() + 31) // 32
    out = torch.zeros(groups + 1, dtype=torch.int64, device=words.device)
    if groups:
        with torch.cuda.device_of(words):
            counts_kernel[(triton.cdiv(groups, 64),)](words, out[1:], words.numel(), groups, 64, **OPTIONS)
    return torch.cumsum(out, 0)


_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def _move(op: int, x: Tensor, index: Tensor, values: Tensor, alpha: float = 1.0) -> None:
    name = ("gather", "scatter", "add", "swap")[op]
    checks.flat(name, "x", x)
    checks.flat(name, "values", values, device=x.device)
    checks.positions(name, index, x.numel(), op != 0, x.device)
    if values.numel() != index.numel():
        checks.refuse(name, f"{index.numel()} values, one per position", values.numel(), "pass the values of these positions")
    if op in (0, 3) and x.dtype != values.dtype:
        checks.refuse(name, f"values of x's dtype {x.dtype}", values.dtype, "an exchange must lose nothing")
    if index.numel():
        to, of = (x, values) if op == 2 or x.dtype != values.dtype else (x.view(_BITS[x.dtype]), values.view(_BITS[x.dtype]))
        with torch.cuda.device_of(x):
            move_kernel[(triton.cdiv(index.numel(), MOVE_TILE),)](to, of, index, index.numel(), x.numel(), alpha, op, MOVE_TILE, **OPTIONS)
    torch.autograd.graph.increment_version(((values,), (x,), (x,), (x, values))[op])


def gather_at(x: Tensor, index: Tensor) -> Tensor:
    """x[index] of a flat x, in x's dtype; `index`: int32 or int64, any order."""
    values = torch.empty(index.numel(), dtype=x.dtype, device=x.device)
    _move(0, x, index, values)
    return values


def scatter_at_(x: Tensor, index: Tensor, values: Tensor) -> None:
    """x[index] = values, rounded to x's dtype; `index`: int32 or int64, sorted, without repeats."""
    _move(1, x, index, values)


def add_at_(x: Tensor, index: Tensor, values: Tensor, alpha: float) -> None:
    """x[index] += alpha * values in fp32, rounded once; `index`: int32 or int64, sorted, without repeats."""
    _move(2, x, index, values, alpha)


def swap_at_(x: Tensor, index: Tensor, values: Tensor) -> None:
    """Exchanges x[index] and values (of x's dtype), bit for bit; `index`: int32 or int64, sorted, without repeats."""
    _move(3, x, index, values)

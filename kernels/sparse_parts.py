"""What the selecting kernels share: scores and keys of a list's elements, words, the search for a digit, the tables of a launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from fusedadapt.ops import sparse_checks as checks
from fusedadapt.ops.sparse_checks import Item
from fusedadapt.reference.sparse import SCORES

from .common import as_bits, load_f32, program

ABS, DIFF, SCALED, PRODUCT, GIVEN = (tl.constexpr(i) for i in range(5))
# An item of `checks.row`: address, other's address, words, elements, columns, first chunk, dtype, other's dtype, aligned.
WIDTH = tl.constexpr(9)
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def key_of(s, nan_key):
    """Score -> unsigned integer of the same order (reference.sparse)."""
    u = as_bits(s)
    order = tl.where(u == 0x80000000, u, tl.where(u > 0x7FFFFFFF, u ^ 0xFFFFFFFF, u | 0x80000000))
    return tl.where((u & 0x7FFFFFFF) > 0x7F800000, nan_key, order)


@triton.jit
def score_at(item, start, lane, valid, SCORE: tl.constexpr, WIDE: tl.constexpr, row=None):
    """Scores of elements start + lane of an item. WIDE promises 16-byte alignment of x and of a second tensor. row: where the row of x that holds
    all these elements begins; without, every element divides to find its column."""
    s = load_f32(tl.load(item), tl.load(item + 6).to(tl.int32), start, lane, valid, WIDE)
    other = tl.load(item + 1)
    if SCORE == SCALED:
        if row is None:
            column = (start + lane) % tl.load(item + 4)
        else:
            column = start - row + lane
        s = tl.abs(s) * tl.load(other.to(tl.pointer_type(tl.float32)) + column, valid, 0.0)
    elif SCORE == DIFF:
        s = tl.abs(s - load_f32(other, tl.load(item + 7).to(tl.int32), start, lane, valid, WIDE))
    elif SCORE == PRODUCT:
        s = tl.abs(s * load_f32(other, tl.load(item + 7).to(tl.int32), start, lane, valid, WIDE))
    elif SCORE == ABS:
        s = tl.abs(s)
    return s


@triton.jit
def keys(item, start, lane, valid, nan_key, SCORE: tl.constexpr, WIDE: tl.constexpr, row=None):
    """Keys of elements start + lane of an item; the rest as `score_at`."""
    return key_of(score_at(item, start, lane, valid, SCORE, WIDE, row), nan_key)


@triton.jit
def chosen(key, valid, limit, room):
    """(which keys are above `limit` or among the first `room` that equal it, how many equal it)."""
    tie = valid & (key == limit)
    found = tl.sum(tie.to(tl.int32), 0)
    keep = valid & (key > limit)
    if room >= found:
        keep = keep | tie
    elif room > 0:
        keep = keep | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= room))
    return keep, found


@triton.jit
def find_digit(counts, left):
    """counts: of digits from the largest down. (which of them has the left-th element, how many are in those before it, how many in it)."""
    reached = tl.cumsum(counts, 0)
    before = reached < left
    above = tl.max(tl.where(before, reached, 0), 0)
    return tl.sum(before.to(tl.int32), 0), above, tl.sum(tl.where(reached - counts == above, tl.where(before, 0, counts), 0), 0)


@triton.jit
def kept_ties(left, same, ties):
    """How many of `same` equal elements stay where `left` would fit. ties: 0 lowest_index, 1 inclusive, 2 exclusive."""
    return tl.where(ties == 0, left, tl.where((ties == 1) | (left == same), same, 0))


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
def store_words(address, start, count, keep, TILE: tl.constexpr):
    """Bits of `start` (a multiple of 32) on, packed; bits at and past `count` are 0 already."""
    bit = tl.arange(0, 32)
    packed = tl.sum(tl.reshape(keep.to(tl.uint32), [TILE // 32, 32]) << bit[None, :].to(tl.uint32), 1)
    word = tl.arange(0, TILE // 32)
    pointer = address.to(tl.pointer_type(tl.int32)) + start // 32
    tl.store(pointer + word, packed.to(tl.int32, bitcast=True), word * 32 < count)


# ---- launches


class List:
    """Items and chunks on the device. Chunks as long as leave some thousand programs."""

    def __init__(self, op: str, items: Sequence[Item], score: str, nan: str, words: bool = False):
        self.device, self.words, rows = checks.listed(op, items, score, nan, words)
        self.elements = sum(row[3] for row in rows)
        self.chunk = min(max(1 << (self.elements // 4096 + 1).bit_length(), 1 << 13), 1 << 20)
        chunks = [[i, at] for i, row in enumerate(rows) for at in range(0, row[3], self.chunk)]
        self.count = len(chunks)
        self.items = checks.table(rows or [[0] * 9], self.device)
        self.chunks = checks.table(chunks or [[0, 0]], self.device)
        self.score, self.nan_key = SCORES.index(score), 0 if nan == "lowest" else 0xFFFFFFFF

"""Bitmasks in Triton, and moves between dense tensors and their chosen elements: any number of tensors in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedadapt.ops import sparse_checks as checks

from .common import F32, at, load_f32, program, store_f32
from .sparse_parts import OPTIONS, store_words

MOVES = ("gather", "scatter", "add", "swap")
MOVE_TILE = 1024


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


@triton.jit(do_not_specialize=["words", "before", "out", "n"])
def indices_kernel(words, before, out, n: tl.int64, TILE: tl.constexpr):
    """out[before[group] + rank in the group] = place of each set bit; a program a group of TILE = 1,024 elements."""
    start = program() * TILE
    lane = tl.arange(0, TILE)
    word = tl.load(words + start // 32 + lane // 32, lane < n - start, 0).to(tl.uint32, bitcast=True)
    bit = ((word >> (lane % 32).to(tl.uint32)) & 1).to(tl.int32)
    slot = tl.load(before + program()) + tl.cumsum(bit, 0) - 1
    tl.store(out + slot, (start + lane).to(out.dtype.element_ty), bit != 0)


@triton.jit(do_not_specialize=["index", "words", "count", "words_n"])
def set_indices_kernel(index, words, count: tl.int64, words_n: tl.int64, TILE: tl.constexpr):
    """words: zeros."""
    i = program() * TILE + tl.arange(0, TILE)
    place = tl.load(index + i, i < count, -1).to(tl.int64)
    inside = (place >= 0) & (place < words_n * 32)
    bit = (tl.full([TILE], 1, tl.uint32) << (place % 32).to(tl.uint32)).to(tl.int32, bitcast=True)
    tl.atomic_or(words + place // 32, bit, inside, sem="relaxed")


# A row of a move: x, values, positions, its first program, how many positions, elements of x, x's dtype | values' << 8 | 64-bit positions << 16.
_ROW = tl.constexpr(7)


@triton.jit
def row_of(rows, count, number):
    """The last of `count` rows whose first program is at most `number`."""
    low = number * 0
    span = count
    while span > 1:
        half = span // 2
        later = tl.load(rows + (low + half) * _ROW + 3) <= number
        low = tl.where(later, low + half, low)
        span = tl.where(later, span - half, half)
    return rows + low * _ROW


@triton.jit
def move_bits(x, values, place, i, valid, DTYPE: tl.constexpr, OP: tl.constexpr):
    """Gather, scatter or swap of one type: bits, whatever NaN they are."""
    to = x.to(tl.pointer_type(DTYPE)) + place
    of = values.to(tl.pointer_type(DTYPE)) + i
    if OP == 1:
        tl.store(to, tl.load(of, valid, 0), valid)
    elif OP == 0:
        tl.store(of, tl.load(to, valid, 0), valid)
    else:
        old = tl.load(to, valid, 0)
        tl.store(to, tl.load(of, valid, 0), valid)
        tl.store(of, old, valid)


@triton.jit(do_not_specialize=["rows", "count", "alpha"])
def move_kernel(rows, count: tl.int64, alpha: tl.float32, OP: tl.constexpr, TILE: tl.constexpr):
    """OP: 0 gather, 1 scatter, 2 add, 3 swap."""
    row = row_of(rows, count, program())
    i = (program() - tl.load(row + 3)) * TILE + tl.arange(0, TILE)
    valid = i < tl.load(row + 4)
    x = tl.load(row)
    values = tl.load(row + 1)
    codes = tl.load(row + 6)
    x_code = (codes & 0xFF).to(tl.int32)
    v_code = (codes >> 8 & 0xFF).to(tl.int32)
    if codes >> 16 != 0:
        place = tl.load(tl.load(row + 2).to(tl.pointer_type(tl.int64)) + i, valid, 0)
    else:
        place = tl.load(tl.load(row + 2).to(tl.pointer_type(tl.int32)) + i, valid, 0).to(tl.int64)
    valid = valid & (place >= 0) & (place < tl.load(row + 5))
    if OP == 2:
        by = alpha * load_f32(values, v_code, 0, i, valid, False)
        new = load_f32(x, x_code, 0, place, valid, False) + by
        store_f32(x, x_code, 0, place, valid, False, valid, new, False)
    elif x_code != v_code:  # a scatter
        store_f32(x, x_code, 0, place, valid, False, valid, load_f32(values, v_code, 0, i, valid, False), False)
    elif x_code == F32:
        move_bits(x, values, place, i, valid, tl.uint32, OP)
    else:
        move_bits(x, values, place, i, valid, tl.uint16, OP)


# ---- launches


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


def indices(words: Tensor, n: int, known: tuple[Tensor, int] | None = None) -> Tensor:
    """Sorted flat positions of the set bits: int32 below 2^31 elements, else int64. Waits for the device, for how many they are, unless (prefix,
    number) is known."""
    checks.words("indices", words, n, words.device)
    before, count = known or (found := prefix(words), int(found[-1]))
    out = torch.empty(count, dtype=torch.int64 if n >> 31 else torch.int32, device=words.device)
    if out.numel():
        with torch.cuda.device_of(words):
            indices_kernel[(triton.cdiv(n, 1024),)](words, before, out, n, 1024, **OPTIONS)
    return out


def from_indices(index: Tensor, n: int) -> Tensor:
    """Words with these bits set; `index`: int32 or int64, sorted, without repeats, in [0, n)."""
    checks.positions("from_indices", index, n, True, index.device)
    words = checks.empty_words(n, index.device).zero_()
    if index.numel():
        with torch.cuda.device_of(index):
            set_indices_kernel[(triton.cdiv(index.numel(), MOVE_TILE),)](index, words, index.numel(), words.numel(), MOVE_TILE, **OPTIONS)
    return words


def move_all(op: str, jobs: Sequence[tuple[Tensor, Tensor, Tensor]], alpha: float = 1.0) -> None:
    """gather, scatter, add or swap for any number of (x, positions, values) in one launch. Positions of what is written: sorted, no repeats."""
    rows, programs = [], 0
    for x, index, values in jobs:
        code = checks.move(op, x, index, values, jobs[0][0].device)
        checks.positions(op, index, x.numel(), op != "gather", x.device)
        if index.numel():
            rows.append([x.data_ptr(), values.data_ptr(), index.data_ptr(), programs, index.numel(), x.numel(), code])
            programs += triton.cdiv(index.numel(), MOVE_TILE)
    if rows:
        with torch.cuda.device_of(jobs[0][0]):
            table = checks.table(rows, jobs[0][0].device)
            move_kernel[(programs,)](table, len(rows), alpha, MOVES.index(op), MOVE_TILE, **OPTIONS)
    checks.moved(op, jobs)

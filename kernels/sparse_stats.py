"""Statistics in one read, in Triton: the energy histogram and the sums of squares of columns, the reference's bits.

Energy: all elements of a bin share their exponent, so integers hold its sums exactly and atomics may add them in any order; `COPIES` of the bins keep
programs from waiting for each other. Columns: fp64 sums in the reference's order, which depends on the shape alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedadapt.ops import sparse_checks as checks
from fusedadapt.ops.sparse_checks import Item
from fusedadapt.reference.sparse import column_slices, energy_of

from .common import as_bits, load_f32, program
from .sparse_parts import OPTIONS, List, key_of, piece, score_at

ENERGY_TILE, COLUMNS, COPIES = 2048, 256, 64
STRIP = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def add_tile(item, start, count, out, SCORE: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Adds a tile's significands and their squares to out [3, 2048]; returns how many elements each bin has."""
    lane = tl.arange(0, TILE)
    valid = lane < count
    s = score_at(item, start, lane, valid, SCORE, WIDE)
    b = (key_of(s, 0) >> 21).to(tl.int32)
    size = as_bits(s) & 0x7FFFFFFF
    significand = ((size & 0x7FFFFF) | tl.where(size > 0x7FFFFF, 0x800000, 0)).to(tl.int64)
    square = significand * significand
    tl.atomic_add(out + b, significand, valid, sem="relaxed")
    tl.atomic_add(out + 2048 + b, square & 0xFFFFFFFF, valid, sem="relaxed")
    tl.atomic_add(out + 4096 + b, square >> 32, valid, sem="relaxed")
    return tl.histogram(b, 2048, mask=valid)


@triton.jit(do_not_specialize=["items", "chunks", "out", "chunk", "copies"])
def energy_kernel(items, chunks, out, chunk: tl.int64, copies: tl.int64, SCORE: tl.constexpr, TILE: tl.constexpr):
    """out: int64 [copies, 4, 2048], zeros before."""
    item, begin, narrow, end = piece(items, chunks, chunk)
    mine = out + program() % copies * 8192
    counts = tl.zeros([2048], tl.int32)
    for start in range(begin, narrow, TILE):
        count = tl.multiple_of(tl.minimum(narrow - start, TILE).to(tl.int32), 8)
        counts += add_tile(item, start, count, mine + 2048, SCORE, TILE, True)
    for start in range(narrow, end, TILE):
        counts += add_tile(item, start, tl.minimum(end - start, TILE).to(tl.int32), mine + 2048, SCORE, TILE, False)
    tl.atomic_add(mine + tl.arange(0, 2048), counts.to(tl.int64), counts != 0, sem="relaxed")


@triton.jit(do_not_specialize=["x", "out", "height", "columns", "slices", "strips", "code"])
def colstat_kernel(x: tl.int64, out, height: tl.int64, columns: tl.int64, slices: tl.int64, strips: tl.int64, code: tl.int32, BLOCK: tl.constexpr):
    """out[slice, column] = squares of one slice's rows, one after the other."""
    part = program() // strips
    lane = program() % strips * BLOCK + tl.arange(0, BLOCK)
    valid = lane < columns
    total = tl.zeros([BLOCK], tl.float64)
    for row in range(height * part // slices, height * (part + 1) // slices):
        value = load_f32(x, code, row * columns, lane, valid, False).to(tl.float64)
        total += value * value
    tl.store(out + part * columns + lane, total, valid)


@triton.jit(do_not_specialize=["parts", "out", "columns", "slices"])
def add_slices_kernel(parts, out, columns: tl.int64, slices: tl.int64, BLOCK: tl.constexpr):
    """out[column] = the slices' sums, one after the other, rounded once."""
    lane = program() * BLOCK + tl.arange(0, BLOCK)
    valid = lane < columns
    total = tl.zeros([BLOCK], tl.float64)
    for part in range(0, slices):
        total += tl.load(parts + part * columns + lane, valid, 0.0)
    tl.store(out + lane, total.to(tl.float32), valid)


# ---- launches


def energy(items: Sequence[Item], score: str) -> tuple[Tensor, Tensor, Tensor]:
    """(counts int64, sums fp64, sums of squares fp64), each [2048] on the CPU, of the scores by the top 11 bits of their keys, NaN in bin 0. The sums
    are exact, then rounded once (`reference.sparse.energy_of`). Waits for the device; scratch 4 MiB."""
    given = List("energy", items, score, "lowest")
    out = torch.zeros(COPIES, 4, 2048, dtype=torch.int64, device=given.device)
    if given.count:
        with torch.cuda.device_of(out):
            energy_kernel[(given.count,)](given.items, given.chunks, out, given.chunk, COPIES, given.score, ENERGY_TILE, **OPTIONS)
    return energy_of(out.sum(0))


def colstat(x: Tensor) -> Tensor:
    """Sum of squares of each column of x [T, K], added in fp64 in the order of `reference.sparse.column_slices`: fp32 [K]."""
    checks.matrix("colstat", x)
    rows, columns = x.shape
    slices, strips = column_slices(rows, columns), triton.cdiv(columns, COLUMNS)
    out = torch.empty(columns, dtype=torch.float32, device=x.device)
    parts = torch.empty(slices, columns, dtype=torch.float64, device=x.device)
    if columns:
        with torch.cuda.device_of(x):
            colstat_kernel[(slices * strips,)](
                x.data_ptr(), parts, rows, columns, slices, strips, checks.CODES[x.dtype], COLUMNS, **STRIP
            )  # fmt: skip
            add_slices_kernel[(strips,)](parts, out, columns, slices, COLUMNS, **STRIP)
    return out

"""Quantizing and back: least and largest of every group, codes from factors, weights from codes.

    lo[g], hi[g] = min, max of w in g        code = encode(w * factor[g] or w / factor[g])        w = (value[code] - zero[g]) * S[g]

Bytes per weight: `stats` reads w, `encode` reads w and writes bits / 8, `dequantize` reads bits / 8 and writes a weight; a group adds its scale.
All three are bound by bandwidth: expect nine tenths of a copy's, `encode` of 8-bit tables less (eight dependent steps of a binary search in a
1 KiB table). Arithmetic is IEEE, without fused multiply-adds: the bytes are those of every other backend.

A flat format is one row of N K elements here.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedadapt.quant.formats import QFormat
from fusedadapt.reference.quant import Parts, zero_code

from .common import as_bits, program
from .lowrank_parts import unit
from .quant_parts import constants, group_tile, known, load_units, narrow, operands, scale_of, stored, value_of

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
TILE, WIDEST = 2048, 1024
# Scalars whose value must never cost a compilation.
RUN_TIME = "high wide rows cols side_r side_c subs_r subs_c across N K row0 row1 col0 col1 start skip stride row_bytes width".split()


# ---- stats


@triton.jit
def part_of(first, lane, subs):
    """(group, part of it) of parts first + lane; 64-bit division of vectors is slow and takes a stack."""
    rest = (first % subs).to(tl.int32) + lane
    return first // subs + rest // subs, rest % subs


@triton.jit(do_not_specialize=RUN_TIME)
def stats_kernel(
    w, lo, hi, N: tl.int64, K: tl.int64, high: tl.int64, wide: tl.int64, rows: tl.int64, cols: tl.int64,
    side_r: tl.int32, side_c: tl.int32, subs_r: tl.int32, subs_c: tl.int32, across: tl.int64,
    DENSE: tl.constexpr, K_UNIT: tl.constexpr, PR: tl.constexpr, PC: tl.constexpr, MR: tl.constexpr, MC: tl.constexpr,
):  # fmt: skip
    """A program takes MR x MC parts of groups, each padded to PR x PC. A group has rows x cols elements in subs_r x subs_c parts of at most
    side_r x side_c; there are high x wide parts. DENSE: parts lie side by side without padding."""
    K = K * K_UNIT
    i, j = tl.arange(0, MR * PR), tl.arange(0, MC * PC)
    top, left = program() // across * MR, program() % across * MC
    group_r, in_r = part_of(top, i // PR, subs_r)
    group_c, in_c = part_of(left, j // PC, subs_c)
    in_r, in_c = in_r * side_r + i % PR, in_c * side_c + j % PC
    row, col = group_r * rows + in_r, group_c * cols + in_c
    if DENSE:
        col = left * PC + j
        inside = col < K
    else:
        inside = (j % PC < side_c) & (in_c < cols) & (col < K)
    valid = ((i % PR < side_r) & (in_r < rows) & (row < N))[:, None] & inside[None, :]
    v = tl.load(w + row[:, None] * K + col[None, :], valid, 0.0).to(tl.float32)
    nan = tl.max(tl.max(tl.reshape((v != v).to(tl.int32), [MR, PR, MC, PC]), 3), 1) != 0
    number = valid & (v == v)
    least = tl.min(tl.min(tl.reshape(tl.where(number, v, float("inf")), [MR, PR, MC, PC]), 3), 1)
    most = tl.max(tl.max(tl.reshape(tl.where(number, v, -float("inf")), [MR, PR, MC, PC]), 3), 1)
    part_r, part_c = top + tl.arange(0, MR), left + tl.arange(0, MC)
    at, wanted = part_r[:, None] * wide + part_c[None, :], (part_r < high)[:, None] & (part_c < wide)[None, :]
    tl.store(lo + at, tl.where(nan, float("nan"), least), wanted)
    tl.store(hi + at, tl.where(nan, float("nan"), most), wanted)


def _power(n: int, most: int) -> int:
    return min(triton.next_power_of_2(n), most)


def stats(w: Tensor, fmt: QFormat) -> tuple[Tensor, Tensor]:
    """(least, largest) element of every group, fp32 of shape `fmt.grid`; NaN where a group has one. w: N x K, contiguous."""
    grid = fmt.grid(*w.shape)
    n, k = (1, w.numel()) if fmt.flat else w.shape
    rows, cols = fmt.block if fmt.flat else fmt.sides(n, k)
    rows, cols = min(rows, n), min(cols, k)
    pc = _power(cols, WIDEST)
    pr = _power(rows, TILE // pc)
    side_r, side_c = min(rows, pr), min(cols, pc)
    subs_r, subs_c = triton.cdiv(rows, side_r), triton.cdiv(cols, side_c)
    shape = triton.cdiv(n, rows), subs_r, triton.cdiv(k, cols), subs_c
    high, wide = shape[0] * subs_r, shape[2] * subs_c
    mc = _power(wide, max(1, min(WIDEST // pc, TILE // (pc * pr))))
    mr = _power(high, max(1, TILE // (pc * pr * mc)))
    dense = side_c == pc and (cols % side_c == 0 or shape[2] == 1)
    lo, hi = (w.new_empty(high, wide, dtype=torch.float32) for _ in range(2))
    k_unit, across = unit([k], 64), triton.cdiv(wide, mc)
    with torch.cuda.device_of(w):  # Triton launches on the current device
        stats_kernel[(triton.cdiv(high, mr) * across,)](
            w, lo, hi, n, k // k_unit, high, wide, rows, cols, side_r, side_c, subs_r, subs_c, across, dense, k_unit, pr, pc, mr, mc, **OPTIONS
        )  # fmt: skip
    if subs_r * subs_c > 1:  # a few thousandths of w are left, and least and largest are exact in any order
        lo, hi = lo.view(shape).amin((1, 3)), hi.view(shape).amax((1, 3))
    return lo.view(grid), hi.view(grid)


# ---- encode


class Encoding(NamedTuple):
    """How `encode_kernel` finds a code. ``cuts``: 0 for integers, else the number of cuts rounded up to a power of two less one."""

    cuts: int
    magnitude: bool
    sign_bit: bool
    mapped: bool  # the code is not the number of cuts passed, but codes[number]
    divide: bool
    zero_first: bool  # the zero is added before rounding
    bias: int
    low: int
    high: int
    pad: int  # code with which the last byte is filled up


@functools.lru_cache(maxsize=256)
def encoding(fmt: QFormat) -> Encoding:
    t, pad = fmt.codes, zero_code(fmt) if fmt.flat else 0
    if t is None:
        return Encoding(0, False, False, False, fmt.divide, fmt.zero == "fp32", fmt.bias, fmt.low, fmt.high, pad)
    mapped = t.codes != tuple(range(len(t.codes)))
    return Encoding(triton.next_power_of_2(len(t.cuts) + 1) - 1, t.magnitude, t.sign_bit, mapped, fmt.divide, False, 0, 0, 0, pad)


@triton.jit
def cuts_below(v, cuts, CUTS: tl.constexpr):
    """How many of CUTS = 2^m - 1 ascending cuts are strictly below v."""
    count = tl.zeros(v.shape, tl.int32)
    if CUTS <= 15:
        for i in tl.static_range(CUTS):
            count += (v > tl.load(cuts + i)).to(tl.int32)
    else:
        step: tl.constexpr = (CUTS + 1) // 2
        for i in tl.static_range(8):
            if step >> i > 0:
                count += tl.where(tl.load(cuts + count + ((step >> i) - 1)) < v, step >> i, 0)
    return count


@triton.jit
def integer_code(v, z, E: tl.constexpr):
    """clamp(rne(v) + zero), or of rne(v + zero). Clamped first to what rounds by adding and taking away 1.5 * 2^23."""
    if E.zero_first:
        v = v + z
    v = tl.where(v > -1024.0, v, -1024.0)
    v = tl.where(v < 1024.0, v, 1024.0)
    q = (v + 12582912.0) - 12582912.0
    if not E.zero_first:
        q = q + z
    q = tl.where(q > E.low, q, E.low)
    return tl.where(q < E.high, q, E.high).to(tl.int32)


@triton.jit(do_not_specialize=RUN_TIME)
def encode_kernel(
    w, factor, zero, cuts, codes, out, N: tl.int64, K: tl.int64, width: tl.int64, row_bytes: tl.int64, across: tl.int64,
    F: tl.constexpr, E: tl.constexpr, K_UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    K = K * K_UNIT
    if K_UNIT > 1:
        row_bytes = K * F.bits // 8
    UNITS: tl.constexpr = COLS // F.per
    top, first = program() // across * ROWS, program() % across * COLS
    row = top + tl.arange(0, ROWS)
    col = first + tl.arange(0, COLS)
    here, inside = row < N, col < K
    valid = here[:, None] & inside[None, :]
    v = tl.load(w + row[:, None] * K + col[None, :], valid, 0.0).to(tl.float32)
    group = group_tile(row, top, first, 0, K, width, ROWS, COLS, 1, F)
    some = known(group, here, inside)
    f = tl.load(factor + group, some, 1.0)
    v = tl.div_rn(v, tl.broadcast_to(f, [ROWS, COLS])) if E.divide else v * f
    v = tl.where((f == 0.0) | (tl.abs(f) == float("inf")) | (f != f) | (v != v), 0.0, v)
    if E.cuts > 0:
        code = cuts_below(tl.abs(v) if E.magnitude else v, cuts, E.cuts)
        if E.mapped:
            code = tl.load(codes + code)
        if E.magnitude:
            negative = as_bits(v) > 0x7FFFFFFF if E.sign_bit else v < 0.0
            code += tl.where(negative, 1 << (F.bits - 1), 0)
    elif zero is not None:
        code = integer_code(v, tl.load(zero + group, some, 0.0), E)
    else:
        code = integer_code(v, float(E.bias), E)
    if F.per > 1:
        code = tl.where(valid, code, E.pad)
        shift = tl.arange(0, F.per) * F.bits
        if F.high_first:
            shift = (F.per - 1) * F.bits - shift
        code = tl.sum(tl.reshape(code & ((1 << F.bits) - 1), [ROWS, UNITS, F.per]) << shift[None, None, :], 2)
    BYTES: tl.constexpr = F.bits * F.per // 8  # by name: to Triton 3.6 a field of a record is no constant
    for b in tl.static_range(BYTES):
        byte = first // F.per * BYTES + tl.arange(0, UNITS) * BYTES + b
        to = out + row[:, None] * row_bytes + byte[None, :]
        tl.store(to, ((code >> (8 * b)) & 255).to(tl.uint8), here[:, None] & (byte < row_bytes)[None, :])


def _tile(n: int, k: int) -> tuple[int, int]:
    cols = max(16, _power(k, WIDEST if n > 1 else TILE))
    return _power(n, TILE // cols), cols


def encode(w: Tensor, factor: Tensor, zero: Tensor | None, fmt: QFormat) -> Tensor:
    """Packed codes, uint8 of shape `fmt.packed`. w: N x K, contiguous; factor, zero: fp32 of shape `fmt.grid`, contiguous."""
    out = w.new_empty(fmt.packed(*w.shape), dtype=torch.uint8)
    n, k = (1, w.numel()) if fmt.flat else w.shape
    f, e, t = stored(fmt, 0), encoding(fmt), fmt.codes
    cuts = None if t is None else constants((*t.cuts, *[torch.inf] * (e.cuts - len(t.cuts))), w.device)
    codes = constants(t.codes, w.device, torch.int32) if t is not None and e.mapped else None
    (rows, cols), k_unit = _tile(n, k), unit([k], 64)
    across = triton.cdiv(k, cols)
    with torch.cuda.device_of(w):
        encode_kernel[(triton.cdiv(n, rows) * across,)](
            w, factor.contiguous(), None if zero is None else zero.contiguous(), cuts, codes, out,
            n, k // k_unit, 1 if fmt.flat else fmt.grid(n, k)[1], fmt.row_bytes(k), across, f, e, k_unit, rows, cols, **OPTIONS,
        )  # fmt: skip
    return out


# ---- dequantize


@triton.jit(do_not_specialize=RUN_TIME)
def dequantize_kernel(
    qdata, scale, zero, above, offset, values, dynamic, out,
    row0: tl.int64, row1: tl.int64, col0: tl.int64, col1: tl.int64, start: tl.int64, K: tl.int64, width: tl.int64, row_bytes: tl.int64,
    across: tl.int64,
    F: tl.constexpr, K_UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Elements row0 .. row1 x col0 .. col1 of rows of K; `start` is col0 rounded down to whole tiles. out: (row1 - row0) rows of K."""
    K, col0, col1 = K * K_UNIT, col0 * K_UNIT, col1 * K_UNIT
    if K_UNIT > 1:
        row_bytes = K * F.bits // 8
    UNITS: tl.constexpr = COLS // F.per
    row, first = row0 + program() // across * ROWS + tl.arange(0, ROWS), (start + program() % across) * COLS
    col = first + tl.arange(0, COLS)
    here, inside = row < row1, (col >= col0) & (col < col1)
    valid = here[:, None] & inside[None, :]
    code = load_units(qdata, row, here, first, row_bytes, UNITS, F).to(tl.int32)
    if F.per > 1:
        shift = tl.arange(0, F.per) * F.bits
        if F.high_first:
            shift = (F.per - 1) * F.bits - shift
        code = tl.reshape((code[:, :, None] >> shift[None, None, :]) & ((1 << F.bits) - 1), [ROWS, COLS])
    v = value_of(code, values, F.kind, F.bias)
    group = group_tile(row, 0, first, 0, K, width, 1 << 62, COLS, 1, F)  # rows begin in the middle of groups: no two share one
    some = known(group, here, inside)
    if zero is not None:
        v = v - tl.load(zero + group, some, 0).to(tl.float32)
    v = v * scale_of(scale, above, offset, dynamic, group, some, width, F)
    to = out + (row - row0)[:, None] * K + (col - col0)[None, :]
    tl.store(to, narrow(v, out.dtype.element_ty), valid)


def dequantize(parts: Parts, fmt: QFormat, n: int, k: int, row0: int, row1: int, dtype: torch.dtype) -> Tensor:
    """Rows row0..row1 of the n x k weight: (value - zero) * S in fp32, rounded once to ``dtype``."""
    out = parts.qdata.new_empty(row1 - row0, k, dtype=dtype)
    if fmt.flat:
        rows, cols, first, last, width = (0, 1), n * k, row0 * k, row1 * k, 1
    else:
        rows, cols, first, last, width = (row0, row1), k, 0, k, fmt.grid(n, k)[1]
    tile_rows, tile_cols = _tile(rows[1] - rows[0], cols)
    start, k_unit = first // tile_cols, unit([k], 64)
    across = triton.cdiv(last, tile_cols) - start
    with torch.cuda.device_of(out):
        dequantize_kernel[(triton.cdiv(rows[1] - rows[0], tile_rows) * across,)](
            *operands(parts, fmt), out, *rows, first // k_unit, last // k_unit, start, cols // k_unit, width, fmt.row_bytes(cols), across,
            stored(fmt, 0), k_unit, tile_rows, tile_cols, **OPTIONS,
        )  # fmt: skip
    return out

"""Fake quantization in Triton: the functions of `reference.fake_quant`, y and dx bit for bit, one pass forward and one backward.

Bytes per element: x read, y written; backward x and dy read, dx written. A program works on tiles of runs (rows of registers) or, where runs are
short and their numbers change from column to column, of columns. Partial sums are fp32, one a program and run (or column), added up in fp64 in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedadapt.reference.fake_quant import INSIDE, Rule

from .common import program, store_rounded

TILE = 2048
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
TINY = tl.constexpr(2.0**-120)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to whole numbers, to nearest even, and leaves no -0
CLAMP, ROUND = (tl.constexpr(list(INSIDE).index(name)) for name in ("clamp", "round"))
# What a tile is: elements of one run, of ROWS runs (rows of a matrix), of ROWS columns.
ONE_RUN, RUNS, COLUMNS = (tl.constexpr(i) for i in range(3))
# How many numbers an optional tensor has.
NONE, ONE, EACH = (tl.constexpr(i) for i in range(3))
_FIXED = ["x", "y", "dy", "dx", "partial", "scale", "zero", "offset", "bounds", "lines", "line", "run", "groups", "quant_min", "quant_max", "tiles"]


@triton.jit
def nearest(v):
    return (v + ROUNDER) - ROUNDER


@triton.jit
def clamped(v, low, high):
    """NaN stays."""
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def number(pointer, group, known, COUNT: tl.constexpr):
    """The group's number of a tensor of one or of as many as there are groups."""
    return tl.load(pointer + (group if COUNT == EACH else group * 0), known, 0.0)


@triton.jit
def numbers(scale, zero, offset, bounds, groups, group, known, quant_min, quant_max, DIVIDE: tl.constexpr,
            ZERO: tl.constexpr, OFFSET: tl.constexpr, BOUNDS: tl.constexpr):  # fmt: skip
    """(scale or 1 / scale, scale, low, high, offset) of each of `group`; without an offset the last is not to be read."""
    s = tl.load(scale + group, known, 0.0)
    least = tl.full(s.shape, quant_min, tl.float32) if BOUNDS == NONE else number(bounds, group, known, BOUNDS)
    most = tl.full(s.shape, quant_max, tl.float32) if BOUNDS == NONE else number(bounds + (groups if BOUNDS == EACH else 1), group, known, BOUNDS)
    low, high = least, most
    if ZERO != NONE:
        z = nearest(clamped(number(zero, group, known, ZERO), least, most))
        low, high = least - z, most - z
    s += (low - low) + (high - high)  # NaN or infinite bounds must not pass unseen
    step = tl.where(tl.abs(s) < TINY, float("inf"), s)
    if not DIVIDE:
        step = tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)
    return step, s, low, high, s if OFFSET == NONE else number(offset, group, known, OFFSET)


@triton.jit
def in_steps(v, step, offset, DIVIDE: tl.constexpr, OFFSET: tl.constexpr):
    if OFFSET != NONE:
        v = v - offset
    if DIVIDE:
        v = tl.div_rn(v, tl.broadcast_to(step, v.shape))
    else:
        v = v * step
    return v


@triton.jit
def passes(u, low, high, INSIDE: tl.constexpr):
    """Which elements a gradient passes."""
    if INSIDE == CLAMP:
        inside = (low <= u) & (u <= high)
    elif INSIDE == ROUND:
        r = nearest(clamped(u, low - 1.0, high + 1.0))
        inside = (low <= r) & (r <= high)
    else:
        inside = (u == u) | (u != u)
    return inside


@triton.jit
def place(block, lines, line, run, groups, LAYOUT: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Of ROWS runs (columns) from `block` on: where the first begins, each from there on, lengths, groups, which there are; a row's width."""
    width = groups * run
    if LAYOUT == COLUMNS:
        c = block + tl.arange(0, ROWS)
        begin, start, length, group, known = block, tl.arange(0, ROWS), lines // groups, c // run, c < width
        if WIDE:
            width = tl.multiple_of(width, 16)
            known = c < width
    else:
        per_line = (line + run - 1) // run
        begin = block // per_line * line + block % per_line * run
        r = block + tl.arange(0, ROWS)
        within = r % per_line * run
        start = (r // per_line * line + within - begin).to(tl.int32)
        length, group, known = tl.minimum(line - within, run), r % groups, r < lines * per_line
        if WIDE:
            begin = tl.multiple_of(begin, 16)
            start = tl.multiple_of(start, [16])
            length = tl.multiple_of(length, [16])
    return begin, start, length, group, known, width


@triton.jit
def tile_at(begin, start, length, known, first, width, LAYOUT: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr):
    """(offset of a tile, of its elements from there on, which there are): elements `first` ... of every run, rows `first` ... of every column."""
    j = tl.arange(0, COLS)
    left = tl.minimum(length - first, COLS).to(tl.int32)
    if LAYOUT == COLUMNS:
        base = begin + first * width
        at = j[:, None] * width + start[None, :]
        valid = (j[:, None] < left) & known[None, :]
    else:
        if WIDE:
            left = tl.multiple_of(left, [16])
        base = begin + first
        if LAYOUT == ONE_RUN:
            at = j
            valid = j < left
        else:
            at = start[:, None] + j[None, :]
            valid = (j[None, :] < left[:, None]) & known[:, None]
    return base, at, valid


@triton.jit
def moved(pointer, by, WIDE: tl.constexpr):
    """WIDE promises 16-byte alignment: the compiler takes no hint on an argument itself."""
    pointer = pointer + by
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def shaped(v, LAYOUT: tl.constexpr):
    """A number per run or column against a tile: [1], [ROWS, 1] or [1, ROWS]."""
    if LAYOUT == RUNS:
        v = v[:, None]
    elif LAYOUT == COLUMNS:
        v = v[None, :]
    return v


@triton.jit(do_not_specialize=_FIXED)
def forward_kernel(
    x, y, scale, zero, offset, bounds, lines: tl.int64, line: tl.int64, run: tl.int64, groups: tl.int64, quant_min: tl.float32,
    quant_max: tl.float32, tiles: tl.int64, DIVIDE: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, BOUNDS: tl.constexpr,
    LAYOUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Program b * tiles + t: STEPS tiles, from t * STEPS on, of block b of ROWS runs."""
    begin, start, length, group, known, width = place(program() // tiles * ROWS, lines, line, run, groups, LAYOUT, ROWS, WIDE)
    step, s, low, high, shift = numbers(
        scale, zero, offset, bounds, groups, group, known, quant_min, quant_max, DIVIDE, ZERO, OFFSET, BOUNDS
    )  # fmt: skip
    step, s, low, high = shaped(step, LAYOUT), shaped(s, LAYOUT), shaped(low, LAYOUT), shaped(high, LAYOUT)
    shift = shaped(shift, LAYOUT)
    first = program() % tiles * (STEPS * COLS)
    for k in range(STEPS):
        base, at, valid = tile_at(begin, start, length, known, first + k * COLS, width, LAYOUT, COLS, WIDE)
        u = in_steps(tl.load(moved(x, base, WIDE) + at, valid, 0.0).to(tl.float32), step, shift, DIVIDE, OFFSET)
        v = nearest(clamped(u, low, high)) * s
        if OFFSET != NONE:
            v = v + shift
        store_rounded(moved(y, base, WIDE) + at, v, valid)


@triton.jit(do_not_specialize=_FIXED)
def backward_kernel(
    x, dy, dx, partial, scale, zero, offset, bounds, lines: tl.int64, line: tl.int64, run: tl.int64, groups: tl.int64, quant_min: tl.float32,
    quant_max: tl.float32, tiles: tl.int64, DIVIDE: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, BOUNDS: tl.constexpr,
    LAYOUT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, WIDE: tl.constexpr,
    INSIDE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """partial: [2, tiles, runs or columns], the sums of dy (q - I u) and of dy (1 - I)."""
    block, tile = program() // tiles * ROWS, program() % tiles
    begin, start, length, group, known, width = place(block, lines, line, run, groups, LAYOUT, ROWS, WIDE)
    step, s, low, high, shift = numbers(
        scale, zero, offset, bounds, groups, group, known, quant_min, quant_max, DIVIDE, ZERO, OFFSET, BOUNDS
    )  # fmt: skip
    step, low, high, shift = shaped(step, LAYOUT), shaped(low, LAYOUT), shaped(high, LAYOUT), shaped(shift, LAYOUT)
    SHAPE: tl.constexpr = [COLS] if LAYOUT == ONE_RUN else [ROWS, COLS] if LAYOUT == RUNS else [COLS, ROWS]
    by_scale, outside = tl.zeros(SHAPE, tl.float32), tl.zeros(SHAPE, tl.float32)
    for k in range(STEPS):
        base, at, valid = tile_at(begin, start, length, known, (tile * STEPS + k) * COLS, width, LAYOUT, COLS, WIDE)
        u = in_steps(tl.load(moved(x, base, WIDE) + at, valid, 0.0).to(tl.float32), step, shift, DIVIDE, OFFSET)
        given = tl.load(moved(dy, base, WIDE) + at, valid, 0.0)
        inside = passes(u, low, high, INSIDE)
        tl.store(moved(dx, base, WIDE) + at, tl.where(inside, given, 0.0), valid)
        if SUMS:
            grad = given.to(tl.float32)
            term = grad * (nearest(clamped(u, low, high)) - tl.where(inside, u, 0.0))
            by_scale += tl.where(valid, term, 0.0)
            outside += tl.where(inside, 0.0, grad)
    if SUMS:
        count = groups * run if LAYOUT == COLUMNS else lines * ((line + run - 1) // run)
        to = partial + tile * count + block + tl.arange(0, ROWS)
        AXIS: tl.constexpr = 1 if LAYOUT == RUNS else 0
        tl.store(to, tl.sum(by_scale, AXIS), known)
        tl.store(to + tiles * count, tl.sum(outside, AXIS), known)


# ---- launches


class _Launch:
    """How a problem is cut; what both kernels take after their arrays."""

    def __init__(self, x: Tensor, rule: Rule, *others: Tensor):
        lines, per_line, groups = x.numel() // rule.line, triton.cdiv(rule.line, rule.run), rule.scale.numel()
        columns = rule.run < 16 and rule.run == rule.line and groups > 1
        if columns:
            self.layout, self.outer, inner, self.rows, self.cols, steps = 2, groups * rule.run, lines // groups, 128, 8, 32
        else:
            self.outer, inner, steps = lines * per_line, rule.run, 4
            self.layout = int(rule.run < 1024)
            self.cols = max(16, triton.next_power_of_2(rule.run)) if self.layout else TILE
            self.rows = TILE // self.cols
        self.steps = min(steps, triton.next_power_of_2(triton.cdiv(inner, self.cols)))
        self.tiles = triton.cdiv(inner, self.cols * self.steps)
        self.grid = (triton.cdiv(self.outer, self.rows) * self.tiles,)
        aligned = all(t.data_ptr() % 16 == 0 for t in (x, *others))
        wide = aligned and (self.outer % 16 == 0 if columns else rule.line % 16 == 0 and rule.run % 16 == 0)
        s = rule.scale
        small = [rule.zero, rule.offset, rule.bounds]
        counts = [0 if t is None else 2 if t.shape[-1] == groups > 1 else 1 for t in small]
        self.args = (
            s, *(s if t is None else t for t in small), lines, rule.line, rule.run, groups, float(rule.quant_min), float(rule.quant_max), self.tiles,
            rule.divide, *counts, self.layout, self.rows, self.cols, self.steps, wide,
        )  # fmt: skip


def fake(x: Tensor, rule: Rule) -> Tensor:
    """y of x's shape and dtype. x: contiguous, not empty."""
    y = torch.empty_like(x)
    launch = _Launch(x, rule)
    with torch.cuda.device_of(x):
        forward_kernel[launch.grid](x, y, *launch.args, **OPTIONS)
    return y


def fake_backward(dy: Tensor, x: Tensor, rule: Rule, ste: str, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in x's dtype, dscale [groups], doffset [groups]), the last two empty without ``sums``. dy, x: contiguous, of one shape and dtype."""
    dx, launch = torch.empty_like(x), _Launch(x, rule, dy)
    partial = rule.scale.new_empty((2, launch.tiles, launch.outer) if sums else 1)
    with torch.cuda.device_of(x):
        backward_kernel[launch.grid](x, dy, dx, partial, *launch.args, list(INSIDE).index(ste), sums, **OPTIONS)
    if not sums:
        return dx, partial[:0], partial[:0].clone()
    total = partial.sum(1, dtype=torch.float64)
    total = total.view(2, -1, rule.run).sum(2) if launch.layout == 2 else total.view(2, -1, rule.scale.numel()).sum(1)
    return dx, *total.to(rule.scale.dtype).unbind(0)

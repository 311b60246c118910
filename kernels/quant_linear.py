"""Products with a packed weight, for few tokens.

    y[t, n] = sum_k x[t, k] (value[code[n, k]] - zero[g]) S[g] + bias[n]           dx[t, k] = sum_n dy[t, n] (value[code[n, k]] - zero[g]) S[g]

Bytes: the packed weight once for every 64 tokens, N K bits / 8; x and y are small beside it. Bound by bandwidth while T is small: expect eight
tenths of the read bandwidth for integers and small floats, less for tables (one more load per weight, from the cache), less again where a step of
columns crosses groups (a scale per weight). All of it reasoned for an H100, not yet measured.

y takes S in one of three places. Where a step's columns lie in one group and values are exact in 16 bits, the step's sum is multiplied by it (LAST:
all columns share it, so the whole sum is); else the weight is, in fp32, and rounded once to x's dtype: the numbers of `dequantize`. dx always does
that. Up to `FEW` tokens the product is plain fp32 multiply-adds in registers, beyond it goes through the matrix units with fp32 sums.

Programs: (weight rows or columns x token tiles, shares of the summed dimension). Shares leave fp32 partial sums, added in order by a second kernel:
no atomics, and shapes alone decide the shares, so the same call always gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedadapt.quant.formats import QFormat
from fusedadapt.reference.quant import Parts

from .common import dot
from .lowrank_parts import unit
from .lowrank_tiles import PROGRAMS
from .quant_parts import (
    TABLE,
    Stored,
    code_plane,
    group_tile,
    known,
    load_single,
    load_units,
    narrow,
    operands,
    planes,
    scale_of,
    stored,
    value_of,
    woven,
)

EARLY, STEP, LAST = (tl.constexpr(place) for place in range(3))
FEW = 2
# Scalars whose value must never cost a compilation.
RUN_TIME = "T N K x_stride width row_bytes blocks steps splits".split()


@triton.jit
def load_codes(qdata, row, here, first, K, row_bytes, UNITS: tl.constexpr, F: tl.constexpr):
    """Words from which `code_of` takes the codes; with rows that begin inside a byte, the codes."""
    if F.bits < 8 and F.per == 1:
        word = load_single(qdata, row, here, first, K, UNITS, F)
    else:
        word = load_units(qdata, row, here, first, row_bytes, UNITS, F)
    return word


@triton.jit
def weight_plane(
    word, p: tl.constexpr, scale, zero, above, offset, values, dynamic, row, top, here, first, K, width,
    ROWS: tl.constexpr, UNITS: tl.constexpr, SCALED: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Weights p of every unit, fp32 [rows, UNITS]; without S unless SCALED."""
    code = word.to(tl.int32) if F.per == 1 else code_plane(word, p, F)
    w = value_of(code, values, F.kind, F.bias)
    if SCALED or zero is not None:
        group = group_tile(row, top, first, p, K, width, ROWS, UNITS, F.per, F)
        some = known(group, here, first + tl.arange(0, UNITS) * F.per + p < K)
        if zero is not None:
            w = w - tl.load(zero + group, some, 0).to(tl.float32)
        if SCALED:
            w = w * scale_of(scale, above, offset, dynamic, group, some, width, F)
    return w


@triton.jit
def row_scale(
    scale, above, offset, dynamic, row, top, here, first, K, width, ROWS: tl.constexpr, UNITS: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """S of a step whose columns are in one group: [rows, 1], or [1, 1]."""
    group = group_tile(row, top, first, 0, K, width, ROWS, UNITS, F.per, F)
    return scale_of(scale, above, offset, dynamic, group, known(group, here, first + tl.arange(0, UNITS) < K), width, F)


@triton.jit
def finish(out, total, token, col, T, width, share, bias, WHOLE: tl.constexpr):
    """Stores [cols, tokens]: into y, with the bias and rounded, if there is one share, else into that share's partial sums."""
    valid = (col < width)[:, None] & (token < T)[None, :]
    if WHOLE and bias is not None:
        total += tl.load(bias + col, col < width, 0.0).to(tl.float32)[:, None]
    to = out + (share.to(tl.int64) * T + token)[None, :] * width + col[:, None]
    tl.store(to, narrow(total, out.dtype.element_ty), valid)


@triton.jit(do_not_specialize=RUN_TIME)
def linear_kernel(
    x, qdata, scale, zero, above, offset, values, dynamic, bias, out,
    T: tl.int32, N: tl.int32, K: tl.int32, x_stride: tl.int64, width: tl.int64, row_bytes: tl.int64, blocks: tl.int32, steps: tl.int32,
    F: tl.constexpr, PLACE: tl.constexpr, WHOLE: tl.constexpr, K_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """ROWS weight rows by TOKENS tokens, over `steps` times DEEP columns. The sum stands upright, [ROWS, TOKENS]: weights are the left operand."""
    K = K * K_UNIT
    if K_UNIT > 1:
        row_bytes = K.to(tl.int64) * F.bits // 8
    PER: tl.constexpr = F.per  # by name: to Triton 3.6 a field of a record is no constant
    UNITS: tl.constexpr = DEEP // PER
    top = tl.program_id(0) // blocks * ROWS
    row = top + tl.arange(0, ROWS)
    here = row < N
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    lane = tl.arange(0, DEEP)
    begin = tl.program_id(1) * (steps * DEEP)
    for first in range(begin, tl.minimum(begin + steps * DEEP, K), DEEP):
        word = load_codes(qdata, row, here, first, K, row_bytes, UNITS, F)
        to = x + token.to(tl.int64)[:, None] * (x_stride * X_UNIT) + (first + lane)[None, :]
        xs = planes(tl.load(to, (token < T)[:, None] & (first + lane < K)[None, :], 0.0), F.per)
        part = tl.zeros([ROWS, TOKENS], tl.float32) if PLACE == STEP else acc
        for p in tl.static_range(PER):
            w = weight_plane(word, p, scale, zero, above, offset, values, dynamic, row, top, here, first, K, width, ROWS, UNITS, PLACE == EARLY, F)
            if PLACE != EARLY:
                w = narrow(w, tl.float16 if x.dtype.element_ty == tl.float16 else tl.bfloat16)
            elif x.dtype.element_ty != tl.float32:
                w = narrow(w, x.dtype.element_ty)
            part = dot(w, tl.trans(xs[p]), part)
        if PLACE == STEP:
            part = acc + part * row_scale(scale, above, offset, dynamic, row, top, here, first, K, width, ROWS, UNITS, F)
        acc = part
    if PLACE == LAST:
        acc = acc * row_scale(scale, above, offset, dynamic, row, top, here, 0, K, width, ROWS, UNITS, F)
    finish(out, acc, token, row, T, N, tl.program_id(1), bias, WHOLE)


@triton.jit(do_not_specialize=RUN_TIME)
def few_kernel(
    x, qdata, scale, zero, above, offset, values, dynamic, bias, out,
    T: tl.int32, N: tl.int32, K: tl.int32, x_stride: tl.int64, width: tl.int64, row_bytes: tl.int64, blocks: tl.int32, steps: tl.int32,
    F: tl.constexpr, PLACE: tl.constexpr, WHOLE: tl.constexpr, K_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """The same in registers, for one block of at most TOKENS tokens; sums stay spread over columns until the end."""
    K = K * K_UNIT
    if K_UNIT > 1:
        row_bytes = K.to(tl.int64) * F.bits // 8
    PER: tl.constexpr = F.per
    UNITS: tl.constexpr = DEEP // PER
    top = tl.program_id(0) * ROWS
    row = top + tl.arange(0, ROWS)
    here = row < N
    lane = tl.arange(0, DEEP)
    acc = ()
    for _ in tl.static_range(TOKENS):
        acc = acc + (tl.zeros([ROWS, UNITS], tl.float32),)
    begin = tl.program_id(1) * (steps * DEEP)
    for first in range(begin, tl.minimum(begin + steps * DEEP, K), DEEP):
        word = load_codes(qdata, row, here, first, K, row_bytes, UNITS, F)
        if PLACE == STEP:
            s = row_scale(scale, above, offset, dynamic, row, top, here, first, K, width, ROWS, UNITS, F)
        w = ()
        for p in tl.static_range(PER):
            w += (
                weight_plane(word, p, scale, zero, above, offset, values, dynamic, row, top, here, first, K, width, ROWS, UNITS, PLACE == EARLY, F),
            )
        after = ()
        for t in tl.static_range(TOKENS):
            token = t + tl.arange(0, 1)
            to = x + token.to(tl.int64)[:, None] * (x_stride * X_UNIT) + (first + lane)[None, :]
            xs = planes(tl.load(to, (token < T)[:, None] & (first + lane < K)[None, :], 0.0).to(tl.float32), F.per)
            part = w[0] * xs[0]
            for p in tl.static_range(1, PER):
                part += w[p] * xs[p]
            if PLACE == STEP:
                part = part * s
            after = after + (acc[t] + part,)
        acc = after
    for t in tl.static_range(TOKENS):
        total = tl.sum(acc[t], 1)[:, None]
        if PLACE == LAST:
            total = total * row_scale(scale, above, offset, dynamic, row, top, here, 0, K, width, ROWS, UNITS, F)
        finish(out, total, t + tl.arange(0, 1), row, T, N, tl.program_id(1), bias, WHOLE)


@triton.jit(do_not_specialize=RUN_TIME)
def dx_kernel(
    x, qdata, scale, zero, above, offset, values, dynamic, out,
    T: tl.int32, N: tl.int32, K: tl.int32, x_stride: tl.int64, width: tl.int64, row_bytes: tl.int64, blocks: tl.int32, steps: tl.int32,
    F: tl.constexpr, WHOLE: tl.constexpr, K_UNIT: tl.constexpr, N_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """x: dy. TOKENS tokens by DEEP columns, over `steps` times ROWS weight rows; one sum per plane, woven at the end."""
    K, N = K * K_UNIT, N * N_UNIT
    if K_UNIT > 1:
        row_bytes = K.to(tl.int64) * F.bits // 8
    PER: tl.constexpr = F.per
    UNITS: tl.constexpr = DEEP // PER
    first = tl.program_id(0) // blocks * DEEP
    token = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, ROWS)
    acc = ()
    for _ in tl.static_range(PER):
        acc = acc + (tl.zeros([TOKENS, UNITS], tl.float32),)
    begin = tl.program_id(1) * (steps * ROWS)
    for top in range(begin, tl.minimum(begin + steps * ROWS, N), ROWS):
        row = top + lane
        here = row < N
        word = load_codes(qdata, row, here, first, K, row_bytes, UNITS, F)
        dy = tl.load(x + token.to(tl.int64)[:, None] * (x_stride * X_UNIT) + row[None, :], (token < T)[:, None] & here[None, :], 0.0)
        after = ()
        for p in tl.static_range(PER):
            w = weight_plane(word, p, scale, zero, above, offset, values, dynamic, row, top, here, first, K, width, ROWS, UNITS, True, F)
            after = after + (dot(dy, narrow(w, dy.dtype), acc[p]),)
        acc = after
    col = first + tl.arange(0, DEEP)
    to = out + (tl.program_id(1).to(tl.int64) * T + token)[:, None] * K + col[None, :]
    tl.store(to, narrow(woven(acc, F.per), out.dtype.element_ty), (token < T)[:, None] & (col < K)[None, :])


@triton.jit(do_not_specialize=RUN_TIME)
def sum_kernel(part, bias, out, T: tl.int32, N: tl.int32, splits: tl.int32, blocks: tl.int32, N_UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """out[t, n] = bias[n] + sum over s of part[s, t, n] in the order of s, rounded."""
    N = N * N_UNIT
    t = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(splits):
        total += tl.load(part + (tl.cast(s, tl.int64) * T + t) * N + col, col < N, 0.0)
    if bias is not None:
        total += tl.load(bias + col, col < N, 0.0).to(tl.float32)
    tl.store(out + t * N + col, narrow(total, out.dtype.element_ty), col < N)


# ---- launches


class Plan(NamedTuple):
    """Tiles from shapes and format alone; `splits` shares of the summed dimension, `steps` tiles each."""

    place: int
    tokens: int
    rows: int
    deep: int
    stages: int
    splits: int
    steps: int


def _shares(length: int, programs: int, wanted: int, least: int) -> tuple[int, int]:
    """(splits, steps) of `length` tiles: about `wanted` programs in all, but at least `least` tiles in each."""
    splits = min(max(wanted // programs, 1), max(length // least, 1))
    steps = triton.cdiv(length, splits)
    return triton.cdiv(length, steps), steps


def _deep(f: Stored) -> int:
    """Columns of a step: a divisor of the group's where one is long enough for the matrix units (16 units), so that a step has one scale a row."""
    fits = [d for d in (128, 64, 32) if d >= 16 * f.per and f.cols % d == 0 and not f.runs]
    return fits[0] if fits else max(64, 16 * f.per)


def _tokens(t: int, x_bytes: int) -> int:
    """fp32 tokens are cut into three terms: 64 of them do not fit into the registers."""
    return 16 if t <= 16 else 32 if t <= 32 or x_bytes == 4 else 64


def linear_plan(t: int, n: int, k: int, f: Stored, exact: bool, x_bytes: int) -> Plan:
    """exact: values less zeros are numbers of 16 bits, so that S can wait."""
    deep, few = _deep(f), t <= FEW
    waits = (exact or few) and not f.runs and f.cols % deep == 0
    place = (EARLY if not waits else LAST if f.cols == 0 else STEP).value
    length = triton.cdiv(k, deep)
    if few:  # 16 bytes of codes per thread and step; four programs per multiprocessor keep as many loads under way as its memory needs
        rows = max(16, (1024 if f.per == 8 else 4096) * f.per // deep)
        return Plan(place, triton.next_power_of_2(t), rows, deep, 1, *_shares(length, triton.cdiv(n, rows), 2 * PROGRAMS, 2))
    tokens, rows = _tokens(t, x_bytes), 64
    stages = 4 if tokens * deep * x_bytes <= 8192 else 3
    return Plan(place, tokens, rows, deep, stages, *_shares(length, triton.cdiv(n, rows) * triton.cdiv(t, tokens), PROGRAMS, 4))


def dx_plan(t: int, n: int, k: int, f: Stored, x_bytes: int) -> Plan:
    deep, tokens, rows = _deep(f), _tokens(t, 2), 64
    if x_bytes == 4:  # cut into three terms: 128 columns of them do not fit into the registers
        deep = min(deep, max(64, 16 * f.per))
    return Plan(EARLY.value, tokens, rows, deep, 3, *_shares(triton.cdiv(n, rows), triton.cdiv(k, deep) * triton.cdiv(t, tokens), PROGRAMS, 4))


def _sum(part: Tensor, bias: Tensor | None, out: Tensor) -> None:
    (t, n), n_unit = out.shape, unit([out.shape[1]], 4)
    blocks = triton.cdiv(n, 256)
    sum_kernel[(t * blocks,)](part, bias, out, t, n // n_unit, part.shape[0], blocks, n_unit, 256, num_warps=2)


def linear(x: Tensor, parts: Parts, fmt: QFormat, n: int, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias, summed in fp32, rounded once to x's dtype. x: T x K, unit stride inside a row. Returns T x N."""
    (t, k), f = x.shape, stored(fmt, x.shape[1])
    p = linear_plan(t, n, k, f, f.kind != TABLE.value and fmt.zero != "fp32", x.element_size())
    k_unit, x_unit, blocks = unit([k], 64), unit([x.stride(0)], 8), triton.cdiv(t, p.tokens)
    y = x.new_empty(t, n)
    out = y if p.splits == 1 else x.new_empty(p.splits, t, n, dtype=torch.float32)
    width = k // f.cols if fmt.flat and not f.runs else fmt.grid(n, k)[-1]
    kernel = few_kernel if t <= FEW else linear_kernel
    warps = 8 if t <= FEW else 4
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[(triton.cdiv(n, p.rows) * blocks, p.splits)](
            x, *operands(parts, fmt), bias, out,
            t, n, k // k_unit, x.stride(0) // x_unit, width, fmt.row_bytes(k), blocks, p.steps,
            f, p.place, p.splits == 1, k_unit, x_unit, p.tokens, p.rows, p.deep, num_warps=warps, num_stages=p.stages, enable_fp_fusion=True,
        )  # fmt: skip
        if p.splits > 1:
            _sum(out, bias, y)
    return y


def linear_dx(dy: Tensor, parts: Parts, fmt: QFormat, n: int, k: int) -> Tensor:
    """dx = dy W, summed in fp32, rounded once to dy's dtype. dy: T x N, unit stride inside a row. Returns T x K."""
    t, f = dy.shape[0], stored(fmt, k)
    p = dx_plan(t, n, k, f, dy.element_size())
    k_unit, n_unit, x_unit, blocks = unit([k], 64), unit([n], 8), unit([dy.stride(0)], 8), triton.cdiv(t, p.tokens)
    dx = dy.new_empty(t, k)
    out = dx if p.splits == 1 else dy.new_empty(p.splits, t, k, dtype=torch.float32)
    width = k // f.cols if fmt.flat and not f.runs else fmt.grid(n, k)[-1]
    with torch.cuda.device_of(dy):
        dx_kernel[(triton.cdiv(k, p.deep) * blocks, p.splits)](
            dy, *operands(parts, fmt), out,
            t, n // n_unit, k // k_unit, dy.stride(0) // x_unit, width, fmt.row_bytes(k), blocks, p.steps,
            f, p.splits == 1, k_unit, n_unit, x_unit, p.tokens, p.rows, p.deep, num_warps=4, num_stages=p.stages, enable_fp_fusion=True,
        )  # fmt: skip
        if p.splits > 1:
            _sum(out, None, dx)
    return dx


def small(t: int, n: int, k: int, dtype: torch.dtype, fmt: QFormat, transposed: bool) -> bool:
    """Whether these kernels beat dequantizing and the library's product. By bytes: the packed weight is read once per 64 tokens here, there a
    weight of 2 bytes is written and read besides; the matrix units' share grows with T. Not yet measured."""
    return t <= (64 if fmt.flat or dtype == torch.float32 else 128)

"""What writes a large matrix in place, v a the low-rank product in fp32, one rounding each:

    add_:       y += drop(u a), a mask per segment
    scale_add_: y0 += v a;  returns row_scale * y0 + bias, of y0 before its rounding
    merge_:     W <- row_scale * (W + v a), with fp64 sums that tell what the rounding kept of the change
    dropout:    drop(x)

Bytes per 16-bit element: 4 (one read, one write); scale_add_ 6. u and a come from the cache, 4 R / 64 and 2 R / 64 bytes an element.
Expect nine tenths of the copy bandwidth; with dropout Philox costs about as much time as the copy, expect two thirds.
"""

import math

import torch
import triton
import triton.language as tl

from . import lowrank_parts as parts
from .common import dot, program, round_like, store_rounded
from .lowrank_parts import MAX_SEGMENTS, RUN_TIME, drop_case, drop_tile, keep_tile, kept_scale, padded, unit
from .lowrank_tiles import expand_tile

# Ranks multiplied at once; larger ones take a loop.
MAX_RANK = 64
# What ptxas may use anyway; unless told, it stops at 80 for sm_100 and spills.
OPTIONS = parts.OPTIONS | {"maxnreg": 255}


@triton.jit
def place(width, ROWS: tl.constexpr, COLS: tl.constexpr):
    """First row and column of this program's tile; `width` tiles side by side."""
    return (tl.program_id(0) // width * ROWS).to(tl.int32), (tl.program_id(0) % width * COLS).to(tl.int32)


@triton.jit
def product_step(acc, u, a, row, here, col, inside, R, start, done, n, a_row, a_col, RANK: tl.constexpr):
    """acc + u[:, done : done + RANK] a[done : done + RANK, :] of the segment that starts at `start` and has n ranks."""
    rank = done + tl.arange(0, RANK)
    some = rank < n
    us = tl.load(u + row.to(tl.int64)[:, None] * R + (start + rank)[None, :], here[:, None] & some[None, :], 0.0)
    where = (start + rank).to(tl.int64)[:, None] * a_row + col.to(tl.int64)[None, :] * a_col
    return dot(us, tl.load(a + where, some[:, None] & inside[None, :], 0.0), acc)


@triton.jit
def product(u, a, row, here, col, inside, R, start, n, a_row, a_col, ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr, DEEP: tl.constexpr):
    """u a on one tile, fp32. DEEP: more than RANK ranks."""
    acc = tl.zeros([ROWS, COLS], tl.float32)
    if DEEP:
        for done in range(0, n, RANK):
            acc = product_step(acc, u, a, row, here, col, inside, R, start, done, n, a_row, a_col, RANK)
    else:
        acc = product_step(acc, u, a, row, here, col, inside, R, start, 0, n, a_row, a_col, RANK)
    return acc


@triton.jit(do_not_specialize=RUN_TIME)
def add_kernel(
    y, u, a, seed, a_row, a_col,
    T: tl.int32, K: tl.int32, R: tl.int32, y_stride: tl.int64, start: tl.int32, stream: tl.int32,
    n0: tl.int32, n1: tl.int32, n2: tl.int32, n3: tl.int32, h0: tl.int32, h1: tl.int32, h2: tl.int32, h3: tl.int32, width: tl.int32,
    SEGMENTS: tl.constexpr, DROP: tl.constexpr, K_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, R_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    K = K * K_UNIT
    R = R * R_UNIT
    n = (n0 * R_UNIT, n1 * R_UNIT, n2 * R_UNIT, n3 * R_UNIT)
    h = (h0, h1, h2, h3)
    first_row, first = place(width, ROWS, COLS)
    row = first_row + tl.arange(0, ROWS)
    col = first + tl.arange(0, COLS)
    here, inside = row < T, col < K
    valid = here[:, None] & inside[None, :]
    y += row.to(tl.int64)[:, None] * (y_stride * Y_UNIT) + col[None, :]
    if DROP:
        key = tl.load(seed)
    total = tl.load(y, valid, 0.0).to(tl.float32)
    top = start * R_UNIT
    for i in tl.static_range(SEGMENTS):
        part = product(u, a, row, here, col, inside, R, top, n[i], a_row, a_col, ROWS, COLS, RANK, DEEP)
        if DROP:
            part = drop_tile(part * kept_scale(h[i]), key, first_row, first, K, stream + i, h[i], DROP, ROWS, COLS, K_UNIT == 8)
        total += part
        top += n[i]
    store_rounded(y, total, valid)


def add_(y: torch.Tensor, u: torch.Tensor, a: torch.Tensor, seed: torch.Tensor | None, thresholds: list[int], ranks: list[int]) -> None:
    """y += drop(u a) in place, rounded once. y: T x K; u: T x R, fp32, contiguous; a: R x K, any strides.

    More than four segments of a 16-bit y go through an fp32 copy of it.
    """
    if not any(thresholds):
        ranks, thresholds = [sum(ranks)], [0]
    (T, K), R = y.shape, a.shape[0]
    out = y if len(ranks) <= MAX_SEGMENTS or y.dtype == torch.float32 else y.float()
    t = expand_tile(T, K)
    k_unit, y_unit, r_unit = unit([K], 8), unit([out.stride(0)], 8), unit([R, *ranks], 4)
    across = triton.cdiv(K, t.cols)
    with torch.cuda.device_of(y):
        for at in range(0, len(ranks), MAX_SEGMENTS):
            n, h = ranks[at : at + MAX_SEGMENTS], thresholds[at : at + MAX_SEGMENTS]
            more = [0] * (MAX_SEGMENTS - len(n))
            drop = drop_case(h)
            rank = min(padded(max(n)), MAX_RANK)
            add_kernel[(triton.cdiv(T, t.rows) * across,)](
                out, u, a, seed if drop else None, a.stride(0), a.stride(1),
                T, K // k_unit, R // r_unit, out.stride(0) // y_unit, sum(ranks[:at]) // r_unit, at,
                *(rank // r_unit for rank in n), *more, *h, *more, across,
                len(n), drop, k_unit, y_unit, r_unit, t.rows, t.cols, rank, max(n) > rank,
                num_warps=t.warps, num_stages=t.stages, **OPTIONS,
            )  # fmt: skip
    if out is not y:
        y.copy_(out)


@triton.jit(do_not_specialize=RUN_TIME)
def scale_add_kernel(
    y0, v, a, row_scale, bias, out, a_row, a_col,
    T: tl.int32, N: tl.int32, R: tl.int32, y_stride: tl.int64, width: tl.int32,
    N_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, R_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    N = N * N_UNIT
    R = R * R_UNIT
    first_row, first = place(width, ROWS, COLS)
    row = first_row + tl.arange(0, ROWS)
    col = first + tl.arange(0, COLS)
    here, inside = row < T, col < N
    valid = here[:, None] & inside[None, :]
    wide_row = row.to(tl.int64)[:, None]
    y0 += wide_row * (y_stride * Y_UNIT) + col[None, :]
    total = tl.load(y0, valid, 0.0).to(tl.float32)
    if v is not None:
        total += product(v, a, row, here, col, inside, R, 0, R, a_row, a_col, ROWS, COLS, RANK, DEEP)
        store_rounded(y0, total, valid)
    total = total * tl.load(row_scale + col, inside, 0.0).to(tl.float32)[None, :]
    if bias is not None:
        total += tl.load(bias + col, inside, 0.0).to(tl.float32)[None, :]
    store_rounded(out + wide_row * N + col[None, :], total, valid)


def scale_add_(y0: torch.Tensor, v: torch.Tensor | None, a: torch.Tensor | None, row_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y0 += v a in place, rounded once; returns row_scale * y0 + bias, computed before that rounding. y0: T x N; v: T x R, fp32; a: R x N."""
    T, N = y0.shape
    y = y0.new_empty((T, N))
    R, strides = (0, (0, 0)) if v is None or a is None else (a.shape[0], a.stride())
    t = expand_tile(T, N)
    n_unit, y_unit, r_unit = unit([N], 8), unit([y0.stride(0)], 8), unit([R], 4)
    rank = min(padded(R), MAX_RANK)
    across = triton.cdiv(N, t.cols)
    with torch.cuda.device_of(y0):
        scale_add_kernel[(triton.cdiv(T, t.rows) * across,)](
            y0, v, a, row_scale, bias, y, *strides, T, N // n_unit, R // r_unit, y0.stride(0) // y_unit, across,
            n_unit, y_unit, r_unit, t.rows, t.cols, rank, rank < R, num_warps=t.warps, num_stages=t.stages, **OPTIONS,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=RUN_TIME)
def merge_kernel(
    w, v, a, row_scale, sums, a_row, a_col,
    N: tl.int32, K: tl.int32, R: tl.int32, x_stride: tl.int64, width: tl.int32,
    K_UNIT: tl.constexpr, X_UNIT: tl.constexpr, R_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """sums: fp64 [programs, 2]."""
    K = K * K_UNIT
    R = R * R_UNIT
    first_row, first = place(width, ROWS, COLS)
    row = first_row + tl.arange(0, ROWS)
    col = first + tl.arange(0, COLS)
    here, inside = row < N, col < K
    valid = here[:, None] & inside[None, :]
    w += row.to(tl.int64)[:, None] * (x_stride * X_UNIT) + col[None, :]
    old = tl.load(w, valid, 0.0).to(tl.float32)
    change = product(v, a, row, here, col, inside, R, 0, R, a_row, a_col, ROWS, COLS, RANK, DEEP)
    if row_scale is not None:
        factor = tl.load(row_scale + row, here, 0.0).to(tl.float32)[:, None]
        change = change * factor + old * (factor - 1.0)  # the difference itself: small against `old`, it keeps its digits
    new = old + change
    store_rounded(w, new, valid)
    kept = round_like(w, new).to(tl.float64) - old.to(tl.float64)
    wanted = tl.where(valid, change, 0.0).to(tl.float64)
    tl.store(sums + 2 * program(), tl.sum(tl.sum(wanted * kept, 1), 0))
    tl.store(sums + 2 * program() + 1, tl.sum(tl.sum(wanted * wanted, 1), 0))


def merge_(w: torch.Tensor, v: torch.Tensor, a: torch.Tensor, row_scale: torch.Tensor | None) -> torch.Tensor:
    """W <- round(row_scale * (W + v a)), in fp32 and rounded once. w: N x K; v: N x R, fp32, contiguous; a: R x K; row_scale: N.

    Returns fp64 [2] on the CPU: (sum D * (W' - W), sum D * D) for the wanted change D. Waits for the device.
    """
    (N, K), R = w.shape, a.shape[0]
    t = expand_tile(N, K)
    k_unit, x_unit, r_unit = unit([K], 8), unit([w.stride(0)], 8), unit([R], 4)
    rank = min(padded(R), MAX_RANK)
    across = triton.cdiv(K, t.cols)
    sums = torch.empty((triton.cdiv(N, t.rows) * across, 2), dtype=torch.float64, device=w.device)
    with torch.cuda.device_of(w):
        merge_kernel[(len(sums),)](
            w, v, a, row_scale, sums, a.stride(0), a.stride(1), N, K // k_unit, R // r_unit, w.stride(0) // x_unit, across,
            k_unit, x_unit, r_unit, t.rows, t.cols, rank, rank < R, num_warps=t.warps, num_stages=t.stages, **OPTIONS,
        )  # fmt: skip
    kept, wanted = sums.cpu().T.tolist()
    return torch.tensor([exact_sum(kept), exact_sum(wanted)], dtype=torch.float64, device="cpu")


def exact_sum(values: list[float]) -> float:
    """Rounded once, so that no order matters; fsum refuses infinities of both signs and sums that overflow."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return sum(values)


@triton.jit(do_not_specialize=RUN_TIME)
def dropout_kernel(
    x, seed, out, T: tl.int32, K: tl.int32, x_stride: tl.int64, h0: tl.int32, width: tl.int32,
    K_UNIT: tl.constexpr, X_UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    K = K * K_UNIT
    first_row, first = place(width, ROWS, COLS)
    row = first_row + tl.arange(0, ROWS)
    col = first + tl.arange(0, COLS)
    valid = (row < T)[:, None] & (col < K)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    xs = tl.load(x + wide_row * (x_stride * X_UNIT) + col[None, :], valid, 0.0).to(tl.float32)
    keep = keep_tile(tl.load(seed), first_row, first, K, 0, h0, ROWS, COLS, K_UNIT == 8)
    store_rounded(out + wide_row * K + col[None, :], tl.where(keep, xs * kept_scale(h0), 0.0), valid)


def dropout(x: torch.Tensor, seed: torch.Tensor, threshold: int) -> torch.Tensor:
    """drop(x) of segment 0, in x's dtype, contiguous. x: T x K; threshold: round(65536 p)."""
    T, K = x.shape
    out = x.new_empty((T, K))
    t = expand_tile(T, K)
    k_unit, x_unit = unit([K], 8), unit([x.stride(0)], 8)
    across = triton.cdiv(K, t.cols)
    with torch.cuda.device_of(x):
        dropout_kernel[(triton.cdiv(T, t.rows) * across,)](
            x, seed, out, T, K // k_unit, x.stride(0) // x_unit, threshold, across, k_unit, x_unit, t.rows, t.cols, num_warps=t.warps, **OPTIONS
        )  # fmt: skip
    return out

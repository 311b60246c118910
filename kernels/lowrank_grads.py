"""The backward's products, each from one read of its large operand (dY0 = row_scale * dy):

    bwd_x:  M = u^T drop(x)   (R x K), the masks drawn again
    bwd_dy: dV = dY0 B (T x R),  M_B = dY0^T V (N x R),  db = sum_t dy,  dg = sum_t dy * y0,  and dY0 itself if there is a row_scale

Bytes: 2 T K of a 16-bit x; 2 T N of dy, another 2 T N for each of y0 and dY0. Partial sums come on top: 8 R K per share of the rows, and dV's 8 T R
per block of 256 columns, a quarter of dy's bytes for R = 16. Expect nine tenths of the read bandwidth over the sum of these, two thirds where
bwd_x draws masks. The scale is kept off the large operand: dV = dy (row_scale B), M_B = row_scale * (dy^T V).

Every program sums over its own share and leaves the sum; `fold` adds the shares in order. No atomics.
"""

import torch
import triton
import triton.language as tl

from .common import dot, program, store_rounded
from .lowrank_parts import FOLD_BLOCK, OPTIONS, RUN_TIME, Group, drop_case, drop_tile, fold, fold_block, group_segments, kept_scale, padded, unit
from .lowrank_shrink import launch_shrink
from .lowrank_tiles import bwd_dy_tile, bwd_x_tile

# Beyond the first, dV's partial sums cost about the bytes of the second read of dy that a product of its own takes; beyond the second, M_B's
# accumulator costs the registers of everything else.
FUSED_DV, FUSED_MB = 32, 64


@triton.jit(do_not_specialize=RUN_TIME)
def bwd_x_kernel(
    x, u, seed, out,
    T: tl.int32, K: tl.int32, R: tl.int32, x_stride: tl.int64, start: tl.int32, stream: tl.int32,
    n0: tl.int32, n1: tl.int32, n2: tl.int32, n3: tl.int32, h0: tl.int32, h1: tl.int32, h2: tl.int32, h3: tl.int32,
    tiles: tl.int32, steps: tl.int32,
    SEGMENTS: tl.constexpr, DROP: tl.constexpr, UPRIGHT: tl.constexpr, K_UNIT: tl.constexpr, X_UNIT: tl.constexpr, R_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """UPRIGHT: out is [share, K, R], else [share, R, K]."""
    K = K * K_UNIT
    R = R * R_UNIT
    n = (n0 * R_UNIT, n1 * R_UNIT, n2 * R_UNIT, n3 * R_UNIT)
    h = (h0, h1, h2, h3)
    first = tl.program_id(0) // tiles * COLS
    tile = tl.program_id(0) % tiles * RANK  # not 0 only where there is one segment
    col = first + tl.arange(0, COLS)
    inside = col < K
    rank = tl.arange(0, RANK)
    if DROP:
        key = tl.load(seed)
    acc = ()
    for _ in tl.static_range(SEGMENTS):
        acc = acc + (tl.zeros([COLS, RANK], tl.float32),)
    begin = tl.program_id(1) * (steps * ROWS)
    for first_row in range(begin, tl.minimum(begin + steps * ROWS, T), ROWS):
        row = first_row + tl.arange(0, ROWS)
        here = row < T
        wide_row = row.to(tl.int64)[:, None]
        xs = tl.load(x + wide_row * (x_stride * X_UNIT) + col[None, :], here[:, None] & inside[None, :], 0.0)
        top = start * R_UNIT + tile
        after = ()
        for i in tl.static_range(SEGMENTS):
            some = tl.load(u + wide_row * R + (top + rank)[None, :], here[:, None] & (tile + rank < n[i])[None, :], 0.0)
            kept = xs
            if DROP:
                kept = drop_tile(xs, key, first_row, first, K, stream + i, h[i], DROP, ROWS, COLS, K_UNIT == 8)
            after = after + (dot(tl.trans(kept), some, acc[i]),)
            top += n[i]
        acc = after
    share = tl.program_id(1).to(tl.int64)
    top = start * R_UNIT + tile
    for i in tl.static_range(SEGMENTS):
        m = acc[i]
        if DROP:
            m = m * kept_scale(h[i])
        if UPRIGHT:
            where = (share * K + col)[:, None] * R + (top + rank)[None, :]
        else:
            where = (share * R + top + rank)[None, :] * K + col[:, None]
        tl.store(out + where, m, inside[:, None] & (tile + rank < n[i])[None, :])
        top += n[i]


def launch_bwd_x(x: torch.Tensor, u: torch.Tensor, seed: torch.Tensor | None, groups: list[Group], upright: bool) -> torch.Tensor:
    """The shares of M, fp32 [shares, R, K], or [shares, K, R] if upright. u: contiguous T x R, fp32."""
    (T, K), R = x.shape, u.shape[1]
    widest = max(group.width * len(group.ranks) for group in groups)
    t = bwd_x_tile(T, K, widest, x.element_size(), max(group.tiles for group in groups))
    k_unit, x_unit, r_unit = unit([K], 8), unit([x.stride(0)], 8), unit([R, *(n for group in groups for n in group.ranks)], 4)
    part = x.new_empty((t.splits, K, R) if upright else (t.splits, R, K), dtype=torch.float32)
    for group in groups:
        drop = drop_case(group.thresholds)
        bwd_x_kernel[(triton.cdiv(K, t.cols) * group.tiles, t.splits)](
            x, u, seed if drop else None, part,
            T, K // k_unit, R // r_unit, x.stride(0) // x_unit, *group.scalars(r_unit), group.tiles, t.steps,
            len(group.ranks), drop, upright, k_unit, x_unit, r_unit, t.rows, t.cols, group.width,
            num_warps=t.warps, num_stages=t.stages, **OPTIONS,
        )  # fmt: skip
    return part


def bwd_x(x: torch.Tensor, u: torch.Tensor, seed: torch.Tensor | None, thresholds: list[int], ranks: list[int]) -> torch.Tensor:
    """M = u^T drop(x). x: T x K; u: T x R, fp32, contiguous. Returns R x K, fp32."""
    with torch.cuda.device_of(x):
        part = launch_bwd_x(x, u, seed, group_segments(ranks, thresholds, 128, 128), False)
        if len(part) == 1:
            return part[0]
        m = torch.empty_like(part[0])
        fold(part, m)
    return m


@triton.jit(do_not_specialize=RUN_TIME)
def bwd_dy_kernel(
    dy, y0, row_scale, v, b, scaled, dv_part, mb_part, db_part, dg_part, b_row, b_col,
    T: tl.int32, N: tl.int32, RV: tl.int32, RB: tl.int32, x_stride: tl.int64, y_stride: tl.int64, steps: tl.int32,
    N_UNIT: tl.constexpr, X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, R_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Rows begin .. begin + steps * ROWS of one block of columns. What is None is not computed; the strides are dy's and y0's."""
    N = N * N_UNIT
    RV = RV * R_UNIT
    RB = RB * R_UNIT
    block = tl.program_id(0)
    col = block * COLS + tl.arange(0, COLS)
    inside = col < N
    rank = tl.arange(0, RANK)
    factor = tl.full([COLS], 1.0, tl.float32)
    if row_scale is not None:
        factor = tl.load(row_scale + col, inside, 0.0).to(tl.float32)
    if b is not None:
        where_b = col.to(tl.int64)[:, None] * b_row + rank.to(tl.int64)[None, :] * b_col
        bs = tl.load(b + where_b, inside[:, None] & (rank < RB)[None, :], 0.0)
        if row_scale is not None:
            bs = bs.to(tl.float32) * factor[:, None]
    mb = tl.zeros([COLS, RANK], tl.float32)
    db = tl.zeros([COLS], tl.float32)
    dg = tl.zeros([COLS], tl.float32)
    begin = tl.program_id(1) * (steps * ROWS)
    for first_row in range(begin, tl.minimum(begin + steps * ROWS, T), ROWS):
        row = first_row + tl.arange(0, ROWS)
        here = row < T
        wide_row = row.to(tl.int64)[:, None]
        valid = here[:, None] & inside[None, :]
        d = tl.load(dy + wide_row * (x_stride * X_UNIT) + col[None, :], valid, 0.0)
        if v is not None:
            vs = tl.load(v + wide_row * RV + rank[None, :], here[:, None] & (rank < RV)[None, :], 0.0)
            mb = dot(tl.trans(d), vs, mb)
        if b is not None:
            dv = dot(d, bs, tl.zeros([ROWS, RANK], tl.float32))
            where_dv = (block.to(tl.int64) * T + wide_row) * RB + rank[None, :]
            tl.store(dv_part + where_dv, dv, here[:, None] & (rank < RB)[None, :])
        wide = d.to(tl.float32)
        if db_part is not None:
            db += tl.sum(wide, 0)
        if y0 is not None:
            old = tl.load(y0 + wide_row * (y_stride * Y_UNIT) + col[None, :], valid, 0.0)
            dg += tl.sum(wide * old.to(tl.float32), 0)
        if row_scale is not None:
            store_rounded(scaled + wide_row * N + col[None, :], wide * factor[None, :], valid)
    at = tl.program_id(1).to(tl.int64) * N + col
    if v is not None:
        if row_scale is not None:
            mb = mb * factor[:, None]
        tl.store(mb_part + at[:, None] * RV + rank[None, :], mb, inside[:, None] & (rank < RV)[None, :])
    if db_part is not None:
        tl.store(db_part + at, db, inside)
    if y0 is not None:
        tl.store(dg_part + at, dg, inside)


@triton.jit(do_not_specialize=RUN_TIME)
def fold_all_kernel(
    dv_part, dv, mb_part, mb, db_part, db, dg_part, dg,
    count: tl.int64, elements: tl.int64, N: tl.int64, splits: tl.int32, bias_splits: tl.int32, BLOCK: tl.constexpr,
):  # fmt: skip
    """First programs: dv, `count` elements in `splits` shares. Then mb, `elements`, and db and dg, N, in `bias_splits` shares."""
    block = program()
    dv_blocks = tl.cdiv(count, BLOCK)
    mb_blocks = tl.cdiv(elements, BLOCK)
    if dv is not None:
        if block < dv_blocks:
            fold_block(dv_part, dv, count, splits, block, BLOCK)
    if mb is not None:
        if (block >= dv_blocks) & (block < dv_blocks + mb_blocks):
            fold_block(mb_part, mb, elements, bias_splits, block - dv_blocks, BLOCK)
    if block >= dv_blocks + mb_blocks:
        if db is not None:
            fold_block(db_part, db, N, bias_splits, block - dv_blocks - mb_blocks, BLOCK)
        if dg is not None:
            fold_block(dg_part, dg, N, bias_splits, block - dv_blocks - mb_blocks, BLOCK)


def launch_bwd_dy(
    dy: torch.Tensor, v: torch.Tensor | None, b: torch.Tensor | None, row_scale: torch.Tensor | None, y0: torch.Tensor | None, need_bias: bool
) -> tuple[torch.Tensor | None, ...]:
    """(dY0, dV, M_B, db, dg), None where not asked for."""
    T, N = dy.shape
    rv, rb = 0 if v is None else v.shape[1], 0 if b is None else b.shape[1]
    width = padded(max(rv, rb))
    t = bwd_dy_tile(T, N, width, dy.element_size(), row_scale is not None or y0 is not None or need_bias)
    blocks = triton.cdiv(N, t.cols)
    n_unit, x_unit, r_unit = unit([N], 8), unit([dy.stride(0)], 8), unit([rv, rb], 4)
    y_stride = 0 if y0 is None else y0.stride(0)
    y_unit = unit([y_stride], 8)

    def new(wanted: bool, *shape: int) -> torch.Tensor | None:
        return dy.new_empty(shape, dtype=torch.float32) if wanted else None

    scaled = None if row_scale is None else dy.new_empty((T, N))
    dv, mb, db, dg = new(b is not None, T, rb), new(v is not None, N, rv), new(need_bias, N), new(y0 is not None, N)
    parts = new(b is not None, blocks, T, rb), new(v is not None, t.splits, N, rv), new(need_bias, t.splits, N), new(y0 is not None, t.splits, N)
    bwd_dy_kernel[(blocks, t.splits)](
        dy, y0, row_scale, v, b, scaled, *parts, 0 if b is None else b.stride(0), 0 if b is None else b.stride(1),
        T, N // n_unit, rv // r_unit, rb // r_unit, dy.stride(0) // x_unit, y_stride // y_unit, t.steps,
        n_unit, x_unit, y_unit, r_unit, t.rows, t.cols, width,
        num_warps=t.warps, num_stages=t.stages, **OPTIONS,
    )  # fmt: skip
    programs = triton.cdiv(T * rb, FOLD_BLOCK) + triton.cdiv(N * rv, FOLD_BLOCK) + (triton.cdiv(N, FOLD_BLOCK) if need_bias or y0 is not None else 0)
    if programs:
        fold_all_kernel[(programs,)](
            parts[0], dv, parts[1], mb, parts[2], db, parts[3], dg, T * rb, N * rv, N, blocks, t.splits, FOLD_BLOCK, **OPTIONS
        )  # fmt: skip
    return scaled, dv, mb, db, dg


def bwd_dy(
    dy: torch.Tensor, v: torch.Tensor | None, b: torch.Tensor | None, row_scale: torch.Tensor | None, y0: torch.Tensor | None, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dY0 in dy's dtype, dV = dY0 B, M_B = dY0^T V, sum_t dy, sum_t dy * y0); a part that is not asked for has no elements.

    dy, y0: T x N; v: T x R, fp32, contiguous; b: N x R, any strides; row_scale: N. The last four are fp32.
    """
    with torch.cuda.device_of(dy):
        b_fused = b is not None and b.shape[1] <= FUSED_DV
        v_fused = v is not None and v.shape[1] <= FUSED_MB
        scaled = dv = mb = db = dg = None
        if b_fused or v_fused or need_bias or y0 is not None or row_scale is not None:
            scaled, dv, mb, db, dg = launch_bwd_dy(dy, v if v_fused else None, b if b_fused else None, row_scale, y0, need_bias)
        if b is not None and not b_fused:
            dv = launch_shrink(dy, b.T, None, group_segments([b.shape[1]], [0], 128, 128), gain=row_scale)[0]
        if v is not None and not v_fused:
            part = launch_bwd_x(dy, v, None, group_segments([v.shape[1]], [0], 128, 128), True)
            mb = torch.empty_like(part[0])
            fold(part, mb)
            if row_scale is not None:
                mb *= row_scale.float()[:, None]
    empty = lambda dtype: dy.new_empty(0, dtype=dtype)
    rest = (empty(torch.float32) if part is None else part for part in (dv, mb, db, dg))
    return (empty(dy.dtype) if scaled is None else scaled, *rest)  # type: ignore[return-value]

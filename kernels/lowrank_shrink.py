"""U = drop(x) A^T (T x R), and with it sum_k x^2: one read of x, A in tiles from the cache.

Bytes: 2 T K read of a 16-bit x (4 of an fp32 one); U and its partial sums 4 T R (1 + 2 splits). Bound by bandwidth up to a rank of about 64 in
16 bits: expect nine tenths of the read bandwidth. Dropout costs ten rounds of Philox per eight elements and stream, about 15 integer
instructions an element, more than an H100 finds time for while reading 16-bit x: expect two thirds there.

Programs: (rows x rank tiles, shares of K). Shares leave fp32 partial sums, added in order by a second kernel: no atomics, the same bits always.
"""

import torch
import triton
import triton.language as tl

from .common import dot
from .lowrank_parts import OPTIONS, RUN_TIME, Group, drop_case, drop_tile, fold, group_segments, kept_scale, unit
from .lowrank_tiles import shrink_tile


@triton.jit(do_not_specialize=RUN_TIME)
def shrink_kernel(
    x, a, gain, seed, out, squares, a_row, a_col,
    T: tl.int32, K: tl.int32, R: tl.int32, x_stride: tl.int64, start: tl.int32, stream: tl.int32,
    n0: tl.int32, n1: tl.int32, n2: tl.int32, n3: tl.int32, h0: tl.int32, h1: tl.int32, h2: tl.int32, h3: tl.int32,
    tiles: tl.int32, steps: tl.int32,
    SEGMENTS: tl.constexpr, DROP: tl.constexpr, K_UNIT: tl.constexpr, X_UNIT: tl.constexpr, R_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    K = K * K_UNIT
    R = R * R_UNIT
    n = (n0 * R_UNIT, n1 * R_UNIT, n2 * R_UNIT, n3 * R_UNIT)
    h = (h0, h1, h2, h3)
    first_row = tl.program_id(0) // tiles * ROWS
    tile = tl.program_id(0) % tiles * RANK  # not 0 only where there is one segment
    row = first_row + tl.arange(0, ROWS)
    here = row < T
    rank = tl.arange(0, RANK)
    x += row.to(tl.int64)[:, None] * (x_stride * X_UNIT)
    if DROP:
        key = tl.load(seed)
    acc = ()
    for _ in tl.static_range(SEGMENTS):
        acc = acc + (tl.zeros([ROWS, RANK], tl.float32),)
    square = tl.zeros([ROWS], tl.float32)
    begin = tl.program_id(1) * (steps * COLS)
    for first in range(begin, tl.minimum(begin + steps * COLS, K), COLS):
        col = first + tl.arange(0, COLS)
        inside = col < K
        xs = tl.load(x + col[None, :], here[:, None] & inside[None, :], 0.0)
        if squares is not None:
            wide = xs.to(tl.float32)
            square += tl.sum(wide * wide, 1)
        top = start * R_UNIT + tile
        after = ()
        for i in tl.static_range(SEGMENTS):
            rows_a = (top + rank).to(tl.int64)[None, :] * a_row
            some = tl.load(a + rows_a + col.to(tl.int64)[:, None] * a_col, (tile + rank < n[i])[None, :] & inside[:, None], 0.0)
            if gain is not None:
                some = some.to(tl.float32) * tl.load(gain + col, inside, 0.0).to(tl.float32)[:, None]
            kept = xs
            if DROP:
                kept = drop_tile(xs, key, first_row, first, K, stream + i, h[i], DROP, ROWS, COLS, K_UNIT == 8)
            after = after + (dot(kept, some, acc[i]),)
            top += n[i]
        acc = after
    share = tl.program_id(1).to(tl.int64) * T
    top = start * R_UNIT + tile
    for i in tl.static_range(SEGMENTS):
        u = acc[i]
        if DROP:
            u = u * kept_scale(h[i])
        where = (share + row)[:, None] * R + (top + rank)[None, :]
        tl.store(out + where, u, here[:, None] & (tile + rank < n[i])[None, :])
        top += n[i]
    if squares is not None:
        if tile == 0:
            tl.store(squares + share + row, square, here)


def launch_shrink(
    x: torch.Tensor, a: torch.Tensor, seed: torch.Tensor | None, groups: list[Group], *,
    gain: torch.Tensor | None = None, squares: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """(U, row squares if asked for). a: R x K of any strides; gain: K factors for the columns of a."""
    (T, K), R = x.shape, a.shape[0]
    widest = max(group.width * len(group.ranks) for group in groups)
    t = shrink_tile(T, K, widest, x.element_size(), a.element_size() if gain is None else 4, max(group.tiles for group in groups))
    k_unit, x_unit, r_unit = unit([K], 8), unit([x.stride(0)], 8), unit([R, *(n for group in groups for n in group.ranks)], 4)
    blocks = triton.cdiv(T, t.rows)
    u = x.new_empty((T, R), dtype=torch.float32)
    norms = x.new_empty(T, dtype=torch.float32) if squares else None
    u_part = u if t.splits == 1 else x.new_empty((t.splits, T, R), dtype=torch.float32)
    norms_part = norms if norms is None or t.splits == 1 else x.new_empty((t.splits, T), dtype=torch.float32)
    for number, group in enumerate(groups):
        drop = drop_case(group.thresholds)
        shrink_kernel[(blocks * group.tiles, t.splits)](
            x, a, gain, seed if drop else None, u_part, norms_part if number == 0 else None, a.stride(0), a.stride(1),
            T, K // k_unit, R // r_unit, x.stride(0) // x_unit, *group.scalars(r_unit), group.tiles, t.steps,
            len(group.ranks), drop, k_unit, x_unit, r_unit, t.rows, t.cols, group.width,
            num_warps=t.warps, num_stages=t.stages, **OPTIONS,
        )  # fmt: skip
    if t.splits > 1:
        fold(u_part, u)
        if norms is not None and norms_part is not None:
            fold(norms_part, norms)
    return u, norms


def shrink(x: torch.Tensor, a: torch.Tensor, seed: torch.Tensor | None, thresholds: list[int], ranks: list[int]) -> torch.Tensor:
    """U = drop(x) A^T. x: T x K; a: R x K. Returns T x R, fp32."""
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return launch_shrink(x, a, seed, group_segments(ranks, thresholds, 128, 128))[0]


def skinny_w(w: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(C = W A^T, squared norms of W's rows) from one read of W. w: N x K; a: R x K. Returns N x R and N, fp32."""
    with torch.cuda.device_of(w):
        c, squares = launch_shrink(w, a, None, group_segments([a.shape[0]], [0], 128, 128), squares=True)
    assert squares is not None
    return c, squares

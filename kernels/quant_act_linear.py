"""Products of 8-bit codes, y = x W^T: T x K by N x K, both with k innermost.

    int8   y = (sum_k qx qw) * s_x * s_w + bias          exact in int32 up to 2^17 columns, in fp32 beyond; equal to the reference to the bit
    fp8    y = sum over blocks of 128 columns of (sum_k qx qw) * s_x * s_w, + bias

Hopper's fp8 matrix instruction keeps about 14 bits while it adds up: its sums are handed over to fp32 every 128 columns, whatever the scales are.
2 T N K operations; codes are read once per tile of the other operand: bound by the matrix units from about 300 tokens on an H100, by the bytes of W
below. No atomics, no split of K: the same bits always.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusedadapt.quant.formats import QFormat
from fusedadapt.reference import quant_act as truth
from fusedadapt.reference.quant import Parts

from .common import INTERPRETED, as_float, store_rounded
from .lowrank_parts import unit

OPTIONS = {"enable_fp_fusion": False}  # int8: a fused multiply-add would round once where the reference rounds twice
SWIZZLE = tl.constexpr(8)
RUN_TIME = ["T", "N", "K"]


class Tile(NamedTuple):
    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


def product_tile(t: int, even: bool) -> Tile:
    """From the number of tokens, and whether rows are aligned; not yet measured. 96 KiB under way at most, which every GPU since 2020 has."""
    if t <= 16:
        return Tile(16, 32, 256, 4, 4)
    if t <= 64:
        return Tile(32 if t <= 32 else 64, 64, 128, 4, 4)
    return Tile(128, 128, 128, 8, 3) if even else Tile(64, 64, 128, 8, 2)  # byte by byte, loads take the registers


@triton.jit
def tile_origin(T, N, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(first row, first column) of this program: columns of SWIZZLE tiles one below the other, which share rows of W in the cache."""
    tall, wide = tl.cdiv(T, ROWS), tl.cdiv(N, COLS)
    number = tl.program_id(0)
    band = number // (SWIZZLE * wide)
    height = tl.minimum(tall - band * SWIZZLE, SWIZZLE)
    inside = number % (SWIZZLE * wide)
    return (band * SWIZZLE + inside % height) * ROWS, inside // height * COLS


@triton.jit
def load_tile(p, rows_here, first, K, DEPTH: tl.constexpr):
    """DEPTH columns from `first` of rows p, zeros beyond K."""
    col = first + tl.arange(0, DEPTH)
    return tl.load(p + col[None, :], rows_here[:, None] & (col < K)[None, :], 0.0)


@triton.jit
def store_tile(y, acc, bias, row, col, here, N):
    if bias is not None:
        acc = acc + tl.load(bias + col, col < N, 0.0)[None, :]
    store_rounded(y + row.to(tl.int64)[:, None] * N + col[None, :], acc, here)


@triton.jit(do_not_specialize=RUN_TIME)
def int8_kernel(
    x, w, x_scale, w_scale, bias, y, T: tl.int32, N: tl.int32, K: tl.int32,
    N_UNIT: tl.constexpr, K_UNIT: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """CHUNK: columns whose sum is exact in int32; 0 where K is not beyond that."""
    N, K = N * N_UNIT, K * K_UNIT
    first_row, first_col = tile_origin(T, N, ROWS, COLS)
    row, col = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS)
    x += row.to(tl.int64)[:, None] * K
    w += col.to(tl.int64)[:, None] * K
    acc = tl.zeros([ROWS, COLS], tl.int32)
    if CHUNK > 0:
        total = tl.zeros([ROWS, COLS], tl.float32)
        for first in range(0, K, DEPTH):
            acc = tl.dot(load_tile(x, row < T, first, K, DEPTH), tl.trans(load_tile(w, col < N, first, K, DEPTH)), acc, out_dtype=tl.int32)
            if (first + DEPTH) % CHUNK == 0:
                total += acc.to(tl.float32)
                acc = tl.zeros([ROWS, COLS], tl.int32)
        total += acc.to(tl.float32)  # + 0 where a chunk has just ended
    else:
        for first in range(0, K, DEPTH):
            acc = tl.dot(load_tile(x, row < T, first, K, DEPTH), tl.trans(load_tile(w, col < N, first, K, DEPTH)), acc, out_dtype=tl.int32)
        total = acc.to(tl.float32)
    total = (total * tl.load(x_scale + row, row < T, 0.0)[:, None]) * tl.load(w_scale + col, col < N, 0.0)[None, :]
    store_tile(y, total, bias, row, col, (row < T)[:, None] & (col < N)[None, :], N)


@triton.jit
def widened(x):
    """fp8 (E4M3) as fp32, for the interpreter, whose own product of fp8 is not to be relied on."""
    u = x.to(tl.uint8, bitcast=True).to(tl.uint32)
    magnitude = as_float((u & 0x7F) << 20) * 1.329227995784916e36  # 2^120
    magnitude = tl.where((u & 0x7F) == 0x7F, float("nan"), magnitude)
    return tl.where(u >= 0x80, -magnitude, magnitude)


@triton.jit
def dot_fp8(x, w, acc):
    """acc + x w^T, summed in fp32 at least every 128 columns."""
    if INTERPRETED:
        acc = tl.dot(widened(x), tl.trans(widened(w)), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, tl.trans(w), acc, max_num_imprecise_acc=128)
    return acc


@triton.jit(do_not_specialize=[*RUN_TIME, "groups"])
def fp8_kernel(
    x, w, x_scale, w_scale, bias, y, T: tl.int32, N: tl.int32, K: tl.int32, groups: tl.int32,
    BLOCKS: tl.constexpr, N_UNIT: tl.constexpr, K_UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """BLOCKS: scales of 1 x 128 and 128 x 128 elements, `groups` of them along K; DEPTH is 128. Else a scale per row of x and per row of W."""
    N, K = N * N_UNIT, K * K_UNIT
    first_row, first_col = tile_origin(T, N, ROWS, COLS)
    row, col = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS)
    x += row.to(tl.int64)[:, None] * K
    w += col.to(tl.int64)[:, None] * K
    if BLOCKS:
        x_scale += row.to(tl.int64) * groups
        w_scale += (col // 128).to(tl.int64) * groups
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, K, DEPTH):
        xs, ws = load_tile(x, row < T, first, K, DEPTH), load_tile(w, col < N, first, K, DEPTH)
        if BLOCKS:
            part = dot_fp8(xs, ws, tl.zeros([ROWS, COLS], tl.float32))
            s_x, s_w = tl.load(x_scale + first // 128, row < T, 0.0), tl.load(w_scale + first // 128, col < N, 0.0)
            acc += part * s_x[:, None] * s_w[None, :]
        else:
            acc = dot_fp8(xs, ws, acc)
    if not BLOCKS:
        acc = (acc * tl.load(x_scale + row, row < T, 0.0)[:, None]) * tl.load(w_scale + col, col < N, 0.0)[None, :]
    store_tile(y, acc, bias, row, col, (row < T)[:, None] & (col < N)[None, :], N)


def aligned_unit(k: int, *operands: torch.Tensor) -> int:
    """16 if rows of all operands start on 16-byte boundaries, else 1. A weight may be a view into a file."""
    return unit([k, *(t.data_ptr() for t in operands)], 16)


def int8_linear(
    codes: torch.Tensor, x_scale: torch.Tensor, parts: Parts, fmt: QFormat, n: int, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    """y, T x N, from int8 codes (T x K, bytes) and scales of x. W: int8, one scale per row or for all."""
    (T, K), y = codes.shape, torch.empty((codes.shape[0], n), dtype=dtype, device=codes.device)
    n_unit, k_unit = unit([n], 16), aligned_unit(K, codes, parts.qdata)
    t = product_tile(T, k_unit > 1)
    with torch.cuda.device_of(codes):
        int8_kernel[(triton.cdiv(T, t.rows) * triton.cdiv(n, t.cols),)](
            codes.view(torch.int8), parts.qdata.view(torch.int8), x_scale, truth.row_scales(parts, fmt, n).contiguous(),
            None if bias is None else bias.float().contiguous(), y, T, n // n_unit, K // k_unit,
            n_unit, k_unit, truth.CHUNK if K > truth.CHUNK else 0, t.rows, t.cols, t.depth, num_warps=t.warps, num_stages=t.stages, **OPTIONS,
        )  # fmt: skip
    return y


def fp8_linear(
    codes: torch.Tensor, x_scale: torch.Tensor, act: QFormat, parts: Parts, fmt: QFormat, n: int, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:  # fmt: skip
    """y, T x N, from fp8 codes (T x K, bytes) and scales of x, coded as ``act``."""
    (T, K), y, blocks = codes.shape, torch.empty((codes.shape[0], n), dtype=dtype, device=codes.device), act.block[1] == 128
    w_scale = parts.scale.float() if blocks else truth.row_scales(parts, fmt, n).contiguous()
    n_unit, k_unit = unit([n], 16), aligned_unit(K, codes, parts.qdata)
    t = product_tile(T, k_unit > 1)
    with torch.cuda.device_of(codes):
        fp8_kernel[(triton.cdiv(T, t.rows) * triton.cdiv(n, t.cols),)](
            codes.view(torch.float8_e4m3fn), parts.qdata.view(torch.float8_e4m3fn), x_scale, w_scale,
            None if bias is None else bias.float().contiguous(), y, T, n // n_unit, K // k_unit, x_scale.shape[1],
            blocks, n_unit, k_unit, t.rows, t.cols, 128, num_warps=t.warps, num_stages=t.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return y

"""Products of 8-bit codes, y = x W^T: T x K by N x K, both with k innermost.

    int8   y = (sum_k qx qw) * s_w * s_x + bias          exact in int32 up to 2^17 columns, in fp32 beyond; equal to the reference to the bit
    fp8    y = sum over blocks of 128 columns of (sum_k qx qw) * s_x * s_w, + bias
    fp4    y = (sum_k qx (qw 2^(6 - d))) * 2^-6 * s_x * s_row + bias          E2M1 beside fp8: a group's 2^-d goes into the exponents, exactly

Hopper's fp8 matrix instruction keeps about 14 bits while it adds up: its sums are handed over to fp32 every 128 columns, whatever the scales are.
2 T N K operations; codes are read once per tile of the other operand: bound by the matrix units from about 300 tokens on an H100, by the bytes of W
below. E2M1 is half the bytes of W, and 1.5 instructions a weight. No atomics, no split of K: the same bits always.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fusedadapt.quant.formats import MOST_STEPS, QFormat
from fusedadapt.reference import quant_act as truth
from fusedadapt.reference.quant import Parts

from .common import INTERPRETED, as_float, store_rounded
from .lowrank_parts import unit
from .quant_parts import join_last

OPTIONS = {"enable_fp_fusion": False}  # int8: a fused multiply-add would round once where the reference rounds twice
SWIZZLE = tl.constexpr(8)
MOST = tl.constexpr(MOST_STEPS)
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
    total = (total * tl.load(w_scale + col, col < N, 0.0)[None, :]) * tl.load(x_scale + row, row < T, 0.0)[:, None]
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
        acc = tl.dot(x, tl.trans(w), acc, max_num_imprecise_acc=min(128, x.shape[1]))
    return acc


#: Of four bytes of E2M1 codes ($2) and four times 8 (12 - d) ($3) the E4M3 bytes of the low codes ($0) and of the high ones ($1). The eight
#: magnitudes make a table in two registers, from which `prmt` takes four codes at a time; the largest is 96 + 28, so no byte carries into the next.
WIDEN = tl.constexpr("""{
.reg .b32 few, many, code, low, high, sign;
and.b32 few, $3, 0xFFFFFF00;
add.u32 few, few, 0x0C080000;
add.u32 many, $3, 0x1C181410;
and.b32 code, $2, 0x77777777;
prmt.b32 low, few, many, code;
shr.u32 code, code, 16;
prmt.b32 high, few, many, code;
prmt.b32 $0, low, high, 0x6420;
shl.b32 sign, $2, 4;
and.b32 sign, sign, 0x80808080;
or.b32 $0, $0, sign;
prmt.b32 $1, low, high, 0x7531;
and.b32 sign, $2, 0x80808080;
or.b32 $1, $1, sign;
}""")


@triton.jit
def widened_code(code, exponent):
    """What `WIDEN` makes of one code."""
    magnitude = code & 7
    byte = tl.where(magnitude > 1, 4 * magnitude + exponent, tl.where(magnitude == 1, exponent, 0))
    return (byte | (code & 8) << 4).to(tl.uint8)


@triton.jit
def widened_tile(byte, exponent):
    """E2M1 codes, two a byte and the first one low, as E4M3 numbers: [r, c] -> [r, 2 c]. exponent: 8 (12 - d), int32 [r, 1]."""
    if INTERPRETED:
        code = byte.to(tl.int32)
        low, high = widened_code(code & 15, exponent), widened_code(code >> 4, exponent)
    else:
        low, high = tl.inline_asm_elementwise(WIDEN, "=&r,=&r,r,r", [byte, exponent.to(tl.uint8)], (tl.uint8, tl.uint8), is_pure=True, pack=4)
    return join_last(low, high).to(tl.float8e4nv, bitcast=True)


@triton.jit(do_not_specialize=[*RUN_TIME, "groups"])
def fp8_kernel(
    x, w, steps, x_scale, w_scale, bias, y, T: tl.int32, N: tl.int32, K: tl.int32, groups: tl.int32,
    BLOCKS: tl.constexpr, SIDE: tl.constexpr, N_UNIT: tl.constexpr, K_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """BLOCKS: scales of 1 x 128 and 128 x 128 elements, `groups` of them along K; DEPTH is 128. Else a scale per row of x and per row of W. steps:
    E8M0, W is E2M1, `groups` of SIDE columns (0: all) in a row, a multiple of DEPTH; a step that is none gives NaN."""
    row_bytes = K * K_UNIT if steps is None else K * (K_UNIT // 2) if K_UNIT > 1 else (K + 1) // 2
    N, K = N * N_UNIT, K * K_UNIT
    first_row, first_col = tile_origin(T, N, ROWS, COLS)
    row, col = first_row + tl.arange(0, ROWS), first_col + tl.arange(0, COLS)
    x += row.to(tl.int64)[:, None] * K
    w += col.to(tl.int64)[:, None] * row_bytes
    if steps is not None:
        steps += col.to(tl.int64) * groups
        broken = tl.zeros([COLS], tl.int32)
    if BLOCKS:
        x_scale += row.to(tl.int64) * groups
        w_scale += (col // 128).to(tl.int64) * groups
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, K, DEPTH):
        xs = load_tile(x, row < T, first, K, DEPTH)
        if steps is None:
            ws = load_tile(w, col < N, first, K, DEPTH)
        else:
            exponent = 8 * tl.load(steps + (first // SIDE if SIDE > 0 else 0), col < N, 127).to(tl.int32) - 8 * (127 - 12)
            broken |= ((exponent < 8 * (12 - MOST)) | (exponent > 8 * 12)).to(tl.int32)
            ws = widened_tile(load_tile(w, col < N, first // 2, row_bytes, DEPTH // 2), exponent[:, None])
        if BLOCKS:
            part = dot_fp8(xs, ws, tl.zeros([ROWS, COLS], tl.float32))
            s_x, s_w = tl.load(x_scale + first // 128, row < T, 0.0), tl.load(w_scale + first // 128, col < N, 0.0)
            acc += part * s_x[:, None] * s_w[None, :]
        else:
            acc = dot_fp8(xs, ws, acc)
    if steps is not None:
        acc = tl.where(broken == 0, 0.015625, float("nan"))[None, :] * acc
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
    n_unit, k_unit = unit([n], 16), aligned_unit(K, codes, parts.qdata)
    if fmt.scale == "e8m0_row":
        w, steps, w_scale, groups, side = parts.qdata.view(torch.uint8), parts.scale, parts.super, fmt.grid(n, K)[1], fmt.block[1]
        k_unit = 32 if k_unit > 1 and K % 32 == 0 else 1  # bytes of two codes
    else:
        w, steps, groups, side = parts.qdata.view(torch.float8_e4m3fn), None, x_scale.shape[1], 0
        w_scale = parts.scale.float() if blocks else truth.row_scales(parts, fmt, n).contiguous()
    t = product_tile(T, k_unit > 1)
    with torch.cuda.device_of(codes):
        fp8_kernel[(triton.cdiv(T, t.rows) * triton.cdiv(n, t.cols),)](
            codes.view(torch.float8_e4m3fn), w, steps, x_scale, w_scale,
            None if bias is None else bias.float().contiguous(), y, T, n // n_unit, K // k_unit, groups,
            blocks, side, n_unit, k_unit, t.rows, t.cols, math.gcd(side, 128), num_warps=t.warps, num_stages=t.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return y

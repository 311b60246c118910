"""Quantized activations: codes and scales of x by row, or by run of 128 in a row; the functions of `reference.quant_act`, codes to the bit.

    s = absmax / L     q = to nearest even, by integers alone, of x * ((1 / absmax) * 127), or of x * (1 / s) for fp8     L = 127 or 448

Bytes per element of x: its own read once, 1 written; expect nine tenths of the copy bandwidth. A program holds whole groups in registers; rows of
more than 16,384 are read twice, the second time from the cache. The products are in `quant_act_linear`.
"""

import torch
import triton
import triton.language as tl

from fusedadapt.quant.formats import QFormat

from .common import as_bits, as_float, program
from .lowrank_parts import unit
from .quant_act_linear import fp8_linear, int8_linear

__all__ = ["act_quant", "fp8_linear", "int8_linear"]

INT8, E4M3 = (tl.constexpr(kind) for kind in range(2))
KINDS = {"int8": INT8.value, "fp8_e4m3": E4M3.value}
TILE, LONGEST = 4096, 16384
OPTIONS = {"enable_fp_fusion": False}
RUN_TIME = ["T", "K", "x_stride", "size", "groups"]


@triton.jit
def scale_and_factor(most, KIND: tl.constexpr):
    """(scale, factor) of groups from the bits of their largest magnitude. The factor is 0 where all codes are 0: a group of zeros (below 2^-120), or
    one with anything not finite, whose scale is NaN."""
    finite = most < 0x7F800000
    live = finite & (most >= 0x03800000)
    absmax = tl.where(live, as_float(most), 1.0)
    if KIND == INT8:
        scale = tl.div_rn(absmax, 127.0)
        factor = tl.div_rn(1.0, absmax) * 127.0
    else:
        scale = tl.div_rn(absmax, 448.0)
        factor = tl.div_rn(1.0, scale)
    factor = tl.where(live & (as_bits(factor) < 0x7F800000), factor, 0.0)
    return tl.where(finite, tl.where(live, scale, 0.0), float("nan")), factor


@triton.jit
def code(v, KIND: tl.constexpr):
    """Code bytes of scaled elements, |v| at most the largest code's value and a rounding error."""
    if KIND == INT8:
        byte = as_bits(v + 12582912.0) - 0x4B400000  # the sum's last bit is 1: rounded to nearest even
    else:
        bits = as_bits(v)
        most = bits & 0x7FFFFFFF
        normal = ((most + 0x7FFFF + ((most >> 20) & 1)) >> 20) - 960
        small = as_bits(as_float(most) + 16384.0) - 0x46800000  # below 2^-6: the sum's last bit is 2^-9
        byte = tl.where(most < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)
    return (byte & 0xFF).to(tl.uint8)


@triton.jit
def scaled(x, factor):
    return tl.where(factor != 0.0, x * factor, 0.0)  # infinity times 0


@triton.jit(do_not_specialize=RUN_TIME)
def groups_kernel(
    x, q, scale, T: tl.int32, K: tl.int32, x_stride: tl.int64, size: tl.int32, groups: tl.int32,
    KIND: tl.constexpr, K_UNIT: tl.constexpr, X_UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One group of each of ROWS rows."""
    K, size = K * K_UNIT, size * K_UNIT
    number = program()
    row = number // groups * ROWS + tl.arange(0, ROWS)
    group = number % groups
    col = tl.arange(0, COLS)
    first = group * size
    here = (row < T)[:, None] & ((col < size) & (first + col < K))[None, :]
    xs = tl.load(x + row[:, None] * (x_stride * X_UNIT) + (first + col)[None, :], here, 0.0).to(tl.float32)
    s, factor = scale_and_factor(tl.max(as_bits(xs) & 0x7FFFFFFF, 1), KIND)
    tl.store(q + row[:, None] * K + (first + col)[None, :], code(scaled(xs, factor[:, None]), KIND), here)
    tl.store(scale + row * groups + group, s, row < T)


@triton.jit(do_not_specialize=RUN_TIME)
def long_rows_kernel(
    x, q, scale, K: tl.int32, x_stride: tl.int64,
    KIND: tl.constexpr, K_UNIT: tl.constexpr, X_UNIT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One row, of any length."""
    K = K * K_UNIT
    row = program()
    x += row * (x_stride * X_UNIT)
    most = tl.zeros([COLS], tl.uint32)
    for first in range(0, K, COLS):
        col = first + tl.arange(0, COLS)
        xs = tl.load(x + col, col < K, 0.0).to(tl.float32)
        most = tl.maximum(most, as_bits(xs) & 0x7FFFFFFF)
    s, factor = scale_and_factor(tl.max(most, 0), KIND)
    for first in range(0, K, COLS):
        col = first + tl.arange(0, COLS)
        xs = tl.load(x + col, col < K, 0.0).to(tl.float32)
        tl.store(q + row * K + col, code(scaled(xs, factor), KIND), col < K)
    tl.store(scale + row, s)


def act_quant(x: torch.Tensor, fmt: QFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, uint8 of x's shape; scales, fp32 of `fmt.grid`). x: T x K, unit stride inside a row."""
    T, K = x.shape
    q = torch.empty((T, K), dtype=torch.uint8, device=x.device)
    scale = torch.empty(fmt.grid(T, K), dtype=torch.float32, device=x.device)
    size = min(fmt.sides(T, K)[1], K)
    k_unit, x_unit, kind = unit([K, size], 16), unit([x.stride(0)], 16), KINDS[fmt.name]
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if size > LONGEST:
            long_rows_kernel[(T,)](
                x, q, scale, K // k_unit, x.stride(0) // x_unit, kind, k_unit, x_unit, TILE, num_warps=8, **OPTIONS,
            )  # fmt: skip
            return q, scale
        cols = max(16, triton.next_power_of_2(size))
        rows, groups = max(1, TILE // cols), scale.shape[1]
        groups_kernel[(triton.cdiv(T, rows) * groups,)](
            x, q, scale, T, K // k_unit, x.stride(0) // x_unit, size // k_unit, groups,
            kind, k_unit, x_unit, rows, cols, num_warps=8 if cols > 4096 else 4, **OPTIONS,
        )  # fmt: skip
    return q, scale

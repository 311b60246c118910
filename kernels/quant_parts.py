"""What the low-bit kernels share: how a format looks to a kernel, what a code and a stored scale are worth, where a group's numbers are.

    w[n, k] = (value[code[n, k]] - zero[g]) * S[g]

A format reaches a kernel as one compiled-in record (`Stored`), made from its `QFormat`. Codes of a row are read in *units*: the fewest codes that
fill whole bytes (one 8-bit code, two of 4 bits, four of 2, eight of 3). A unit's codes come apart as `per` *planes*, code p of every unit: a
product sums over k, so planes need no interleaving as long as x is taken apart the same way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedadapt.quant.formats import NESTED_BLOCK, QFormat
from fusedadapt.quant.tables import table
from fusedadapt.reference.quant import Parts

from .common import INTERPRETED, as_float, to_bf16

# What a code is worth: an integer less its bias (SIGNED: two's complement), a small float by arithmetic, or an entry of a table.
INT, SIGNED, E2M1, E4M3, E5M2, TABLE = (tl.constexpr(kind) for kind in range(6))
# How a scale is stored.
PLAIN, E8M0, CODED, NESTED, STEPS = (tl.constexpr(scale) for scale in range(5))
KINDS = {"e2m1": E2M1.value, "e4m3": E4M3.value, "e5m2": E5M2.value}
SCALES = {"e8m0": E8M0.value, "e4m3": CODED.value, "nested": NESTED.value, "e8m0_row": STEPS.value}
ABOVE = tl.constexpr(NESTED_BLOCK)


class Stored(NamedTuple):
    """A format as kernels see it; another one is another compilation.

    ``rows`` x ``cols``: a group's sides, 0 for the whole dimension. ``runs``: groups are runs of ``cols`` elements that cross rows.
    ``per`` is 1 although ``bits`` is 4 where rows begin inside a byte: then every code is found by itself.
    """

    bits: int
    per: int
    kind: int
    bias: int
    high_first: bool
    scale: int
    rows: int
    cols: int
    runs: bool

    @property
    def exact(self) -> bool:
        """Values, and their differences from a uint8 zero, are numbers of bf16 and of fp16."""
        return self.kind != TABLE.value


@functools.lru_cache(maxsize=1024)
def stored(fmt: QFormat, k: int) -> Stored:
    """For products with rows of k weights. Runs that fit into the rows are groups of a grid."""
    kind = KINDS.get(fmt.table, TABLE.value) if fmt.table else (SIGNED if fmt.signed else INT).value
    per = 8 // math.gcd(8, fmt.bits)
    if fmt.bits * per > 24:
        raise ValueError(f"quant: expected codes of 1, 2, 3, 4, 6 or 8 bits; got {fmt.bits}; use the reference backend")
    if fmt.flat and fmt.bits < 8 and k % per:
        per = 1
    rows, cols = (1, fmt.block[1]) if fmt.flat else fmt.block
    return Stored(fmt.bits, per, kind, fmt.bias, fmt.high_first, SCALES.get(fmt.scale, 0), rows, cols, fmt.flat and k % fmt.block[1] != 0)


@functools.lru_cache(maxsize=256)
def constants(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A table on a device, put there once."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def prepare(fmt: QFormat, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """(values of the codes, of the codes of nested scales): what the kernels look up, on the device; None where the format has no use for it."""
    values = constants(fmt.values, device) if fmt.table and fmt.table not in KINDS else None
    return values, constants(table("dynamic").values, device) if fmt.scale == "nested" else None


def operands(parts: Parts, fmt: QFormat) -> tuple[Tensor | None, ...]:
    """(qdata, scale, zero, super, offset, values, dynamic): what the kernels read; None where the format has no use for it."""
    q, (values, dynamic) = parts.qdata, prepare(fmt, parts.qdata.device)
    return q if q.dtype == torch.uint8 else q.view(torch.uint8), parts.scale, parts.zero, parts.super, parts.offset, values, dynamic


@triton.jit
def value_of(code, values, KIND: tl.constexpr, BIAS: tl.constexpr):
    """fp32 value of a code (int32). Exact; a product with a power of two brings subnormals of the small floats to their place."""
    if KIND == TABLE:
        if INTERPRETED:
            v = tl.load(values + code)
        else:  # not as a load: pipelined, every value would take a detour through shared memory
            v = tl.inline_asm_elementwise("ld.global.nc.f32 $0, [$1];", "=f,l", [(values + code).to(tl.int64)], tl.float32, is_pure=True, pack=1)
    elif KIND == E2M1:
        v = as_float((((code & 7) << 22) | ((code & 8) << 28)).to(tl.uint32)) * 8.507059173023462e37  # 2^126
    elif KIND == E4M3:
        v = as_float((((code & 127) << 20) | ((code & 128) << 24)).to(tl.uint32)) * 1.329227995784916e36  # 2^120
        v = tl.where((code & 127) == 127, float("nan"), v)
    elif KIND == E5M2:
        v = (code << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == SIGNED:  # 2^23 + code has the code in its last bits: two cheap instructions, where a conversion is a slow one
        v = as_float(((code ^ 128) | 0x4B000000).to(tl.uint32)) - 8388736.0
    else:
        v = as_float((code | 0x4B000000).to(tl.uint32)) - (8388608.0 + BIAS)
    return v


@triton.jit
def scale_of(scale, above, offset, dynamic, group, valid, width, F: tl.constexpr):
    """S of these groups, fp32; 0 or anything where not `valid`. width: groups in a row."""
    s = tl.load(scale + group, valid, 0)
    if F.scale == E8M0 or F.scale == STEPS:
        byte = s.to(tl.uint32)
        s = as_float(tl.where(byte == 0, 1 << 22, tl.where(byte == 255, 0x7FC00000, byte << 23)))
        if F.scale == STEPS:
            s = s * tl.load(above + group // width, valid, 0.0)
    elif F.scale == CODED:
        s = value_of(s.to(tl.int32), None, E4M3, 0) * tl.load(above)
    elif F.scale == NESTED:
        s = tl.load(dynamic + s.to(tl.int32)) * tl.load(above + group // ABOVE, valid, 0.0) + tl.load(offset)
    return s.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 -> dtype to nearest even, by the hardware's own conversion; the interpreter's truncates to bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        x = to_bf16(x).to(tl.bfloat16, bitcast=True)
    else:
        x = x.to(dtype)
    return x


@triton.jit
def split_last(x):
    """[r, c] -> [r, c/2] of the even and of the odd columns."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def planes(x, PER: tl.constexpr):
    """[r, c] -> PER tensors [r, c / PER]: column u * PER + p is column u of the p-th."""
    if PER == 1:
        out = (x,)
    elif PER == 2:
        a, b = split_last(x)
        out = (a, b)
    elif PER == 4:
        a, b = split_last(x)
        a0, a1 = split_last(a)
        b0, b1 = split_last(b)
        out = (a0, b0, a1, b1)
    else:
        a, b = split_last(x)
        a = planes(a, 4)
        b = planes(b, 4)
        out = (a[0], b[0], a[1], b[1], a[2], b[2], a[3], b[3])
    return out


@triton.jit
def join_last(a, b):
    return tl.reshape(tl.join(a, b), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def woven(x, PER: tl.constexpr):
    """The inverse of `planes`."""
    if PER == 1:
        out = x[0]
    elif PER == 2:
        out = join_last(x[0], x[1])
    elif PER == 4:
        out = join_last(join_last(x[0], x[2]), join_last(x[1], x[3]))
    else:
        out = join_last(woven((x[0], x[2], x[4], x[6]), 4), woven((x[1], x[3], x[5], x[7]), 4))
    return out


@triton.jit
def load_units(qdata, row, here, first, row_bytes, UNITS: tl.constexpr, F: tl.constexpr):
    """Units [rows, UNITS] from element `first` (a multiple of F.per) of each row on; bytes past a row's end are 0."""
    lane = tl.arange(0, UNITS)
    start = qdata + row.to(tl.int64)[:, None] * row_bytes
    BYTES: tl.constexpr = F.bits * F.per // 8
    byte = first // F.per * BYTES + lane * BYTES
    word = tl.load(start + byte[None, :], here[:, None] & (byte < row_bytes)[None, :], 0)
    for b in tl.static_range(1, BYTES):
        more = tl.load(start + byte[None, :] + b, here[:, None] & (byte + b < row_bytes)[None, :], 0)
        word = word.to(tl.int32) | (more.to(tl.int32) << (8 * b))
    return word


@triton.jit
def code_plane(word, p: tl.constexpr, F: tl.constexpr):
    """Code p of every unit, int32."""
    shift: tl.constexpr = (F.per - 1 - p if F.high_first else p) * F.bits
    return (word.to(tl.int32) >> shift) & ((1 << F.bits) - 1)


@triton.jit
def load_single(qdata, row, here, first, K, UNITS: tl.constexpr, F: tl.constexpr):
    """Codes [rows, UNITS] of a matrix that is packed through, two codes a byte, the first one high."""
    col = first + tl.arange(0, UNITS)
    element = row.to(tl.int64)[:, None] * K + col[None, :]
    byte = tl.load(qdata + (element >> 1), here[:, None] & (col < K)[None, :], 0).to(tl.int32)
    return (byte >> (((element & 1) ^ 1) * 4).to(tl.int32)) & 15


@triton.jit
def group_tile(row, top, first, p: tl.constexpr, K, width, ROWS: tl.constexpr, UNITS: tl.constexpr, PER: tl.constexpr, F: tl.constexpr):
    """Groups of elements (row, first + u * PER + p): [rows, UNITS]; [1, ...] where these rows are in one group, [..., 1] where these columns are.

    `first` is a multiple of UNITS * PER, the first row `top` one of ROWS; width: groups in a row. Divides in 64 bits once per row, in 32 bits per
    element.
    """
    row = row.to(tl.int64)[:, None]
    lane = (tl.arange(0, UNITS) * PER + p)[None, :]
    if F.runs:
        start = row * K + first
        group = start // F.cols + ((start % F.cols).to(tl.int32) + lane) // F.cols
    else:
        if F.rows == 0:
            row = tl.zeros([1, 1], tl.int64)
        elif F.rows % ROWS == 0:
            row = tl.zeros([1, 1], tl.int64) + top // F.rows
        else:
            row = row // F.rows
        group = row * width
        if F.cols != 0:
            group += first // F.cols
            if F.cols % (UNITS * PER) != 0:
                group = group + (tl.cast(first % F.cols, tl.int32) + lane) // F.cols
    return group


@triton.jit
def known(group, here, inside):
    """Which of a `group_tile` are groups of the weight: rows `here`, columns `inside`. The first row of a program always is."""
    mask = tl.full([1, 1], 1, tl.int1)
    if group.shape[0] == here.shape[0]:
        mask = here[:, None]
    if group.shape[1] == inside.shape[0]:
        mask = mask & inside[None, :]
    return mask

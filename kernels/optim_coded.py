"""The sweep over entries with coded states (csrc/core/lowbit.h): decode, rule, extreme of each block of elements, encode, in one pass. A kernel of
its own, so that the plain sweep's registers and access widths stay as they are.

Bytes per Adam parameter with int8 states in blocks of 256: bf16 6 read, 4 written; fp32 10 and 6.

A program owns whole blocks: a tile is a multiple of them. One compilation per rule and block size, and one more each for stochastic rounding and
for compact entries and anchors. Logarithm and power are sums and products: codes are equal on every backend.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from fusedadapt.reference import lowbit

from . import optim_scattered
from .common import (
    CODES,
    COMPACT_GRAD,
    D8S,
    D8U,
    DECAY,
    F8X,
    FIELDS,
    GRAD,
    GRAD_CODE,
    KINDS,
    MASK,
    PULL,
    ROW_GROUP,
    SCALE0,
    STATE0,
    STATE_CODE,
    STEP,
    as_bits,
    as_float,
    at,
    load_f32,
    load_row,
    put,
    store_f32,
    trainable,
)
from .optim import _NOT_SPECIALIZED, OPTIONS, code_of, eights, load_param, piece, prepare_gradient, store_param

# Where the tables lie in `tables`: of the decades the ends, slopes, offsets and last magnitudes, signed and unsigned; the maps; fp8's levels.
SLOPE, OFFSET, LAST, MAP, LEVEL = (tl.constexpr(first) for first in (16, 32, 48, 64, 576))
LEAST = tl.constexpr(lowbit.LEAST)
EXPAND_RANGE = tl.constexpr(lowbit.EXPAND_RANGE)


@triton.jit
def of_blocks(x, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The largest element of each block."""
    return tl.max(tl.reshape(x, [BLOCK // GROUP, GROUP]), 1)


@triton.jit
def of_elements(x, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """What a block has, for each of its elements."""
    return tl.reshape(tl.broadcast_to(x[:, None], [BLOCK // GROUP, GROUP]), [BLOCK])


@triton.jit
def log2_series(x):
    u = as_bits(x).to(tl.int32, bitcast=True) - 0x3F3504F3
    m = ((u & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    t = tl.div_rn(m - 1.0, m + 1.0)
    s = t * t
    p = s * 0.111111112 + 0.142857149
    p = p * s + 0.2
    p = p * s + 0.333333343
    p = p * s + 1.0
    return (u >> 23).to(tl.float32) + t * 2.88539004 * p


@triton.jit
def exp2_series(y):
    n = (y - 0.5).to(tl.int32)
    f = y - n.to(tl.float32)
    p = f * 1.52527336e-5 + 1.54035297e-4
    p = p * f + 1.33335579e-3
    p = p * f + 9.61812865e-3
    p = p * f + 5.55041097e-2
    p = p * f + 0.240226507
    p = p * f + 0.693147182
    p = p * f + 1.0
    return (p.to(tl.int32, bitcast=True) + (n << 23)).to(tl.float32, bitcast=True)


@triton.jit
def expansion(ratio):
    span = 0.0 - log2_series(tl.where(ratio > LEAST, ratio, LEAST))
    near = span * 8.0 <= EXPAND_RANGE
    k = (tl.div_rn(tl.full(span.shape, EXPAND_RANGE, tl.float32), tl.where(near, 1.0, span)) * 16.0).to(tl.int32).to(tl.float32) * 0.0625
    return tl.where(near, 8.0, tl.where(k > 0.0625, k, 0.0625))


@triton.jit
def expanded_code(v, inverse, k):
    x = tl.abs(v) * inverse
    q = 448.0 * exp2_series(k * log2_series(tl.where(x > LEAST, x, LEAST)))
    u = as_bits(q)
    normal = ((u + 0x7FFFF + ((u >> 20) & 1)) >> 20) - 960
    subnormal = as_bits(q + 16384.0) - 0x46800000  # the add rounds at 2^-9
    c = tl.where(q < 0.015625, subnormal, tl.where(normal < 126, normal, 126))
    return tl.where(x > 0.0, c | (as_bits(v) >> 31 << 7), 0).to(tl.uint8)


@triton.jit
def dynamic_code(x, tables, has_sign):
    """An octave holds at most one end of a decade: the exponent leaves a choice of two."""
    u = as_bits(x)
    a = tl.where(has_sign, tl.abs(x), x)
    u = tl.where(has_sign, u & 0x7FFFFFFF, u)
    rows = tables + tl.where(has_sign, 0, 8)
    e = ((u >> 23).to(tl.int32) * 5 - 531) >> 4
    e = tl.minimum(tl.maximum(e, 0), 6)
    e += (a > tl.load(rows + e)).to(tl.int32)
    y = a * tl.load(rows + SLOPE + e) + tl.load(rows + OFFSET + e)
    last = tl.load(rows + LAST + e)
    m = tl.where(a > 0.0, tl.where(y < last, y, last).to(tl.int32), 0)
    signed = tl.where(x < 0.0, 127 - tl.minimum(m, 127), 127 + m)
    return tl.where(has_sign, signed, tl.maximum(m - 1, 0)).to(tl.uint8)


@triton.jit
def load_coded(entry, codes, tables, start, lane, valid, count, K: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """A state in fp32, 0 where not `valid`."""
    code = code_of(codes, STATE_CODE + K)
    address = tl.load(entry + STATE0 + K)
    if code < D8S:
        s = load_f32(address, code, start, lane, valid, WIDE)
    else:
        c = tl.load(at(address, start, tl.uint8, WIDE) + lane, valid, 0).to(tl.int32)
        block = tl.arange(0, BLOCK // GROUP)
        here = block * GROUP < count
        scales = tl.load(entry + SCALE0 + K).to(tl.pointer_type(tl.float32))
        if code == F8X:
            scales += start // GROUP * 2
            absmax = tl.load(scales + block * 2, here, 0.0)
            inverse_k = tl.div_rn(tl.full([BLOCK // GROUP], 1.0, tl.float32), tl.load(scales + block * 2 + 1, here, 1.0))
            y = tl.load(tables + LEVEL + (c & 127)) * of_elements(inverse_k, GROUP, BLOCK)
            size = exp2_series(tl.where(y > -120.0, y, -120.0))
            size = tl.where((c & 127) != 0, size, 0.0) * of_elements(absmax, GROUP, BLOCK)
            s = as_float(as_bits(size) ^ (c.to(tl.uint32) >> 7 << 31))
        else:
            extreme = tl.load(scales + start // GROUP + block, here, 0.0)
            s = tl.load(tables + MAP + tl.where(code == D8U, 256, 0) + c) * of_elements(extreme, GROUP, BLOCK)
        s = tl.where(valid, s, 0.0)
    return s


@triton.jit
def store_coded(
    entry, codes, tables, start, lane, valid, count, masked, keep, s,
    K: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rounds `s`, 0 where not `valid`; blocks without a trainable element keep codes and scale."""
    code = code_of(codes, STATE_CODE + K)
    address = tl.load(entry + STATE0 + K)
    if code < D8S:
        store_f32(address, code, start, lane, valid, masked, keep, s, WIDE)
    else:
        u = as_bits(s)
        key = of_blocks(((u << 1) | (u >> 31)) ^ 1, GROUP, BLOCK)
        size = key >> 1
        sign = tl.where(code == D8S, (key ^ 1) << 31, 0)
        live = (size >= 0x03800000) & (size < 0x7F800000)
        extreme = tl.where(live, as_float(size | sign), tl.where(size >= 0x7F800000, float("nan"), 0.0))
        inverse = tl.where(live, tl.div_rn(tl.full([BLOCK // GROUP], 1.0, tl.float32), tl.where(live, extreme, 1.0)), 0.0)
        block = tl.arange(0, BLOCK // GROUP)
        here = block * GROUP < count
        changes = keep
        if masked:
            block_changes = of_blocks(keep.to(tl.int32), GROUP, BLOCK)
            here = here & (block_changes != 0)
            changes = of_elements(block_changes, GROUP, BLOCK) != 0
        scales = tl.load(entry + SCALE0 + K).to(tl.pointer_type(tl.float32))
        each = of_elements(inverse, GROUP, BLOCK)
        target = at(address, start, tl.uint8, WIDE) + lane
        if code == F8X:
            rest = of_blocks(tl.where((u & 0x7FFFFFFF) != 0, 0x7F800000 - (u & 0x7FFFFFFF).to(tl.int32), 0), GROUP, BLOCK)
            least = (0x7F800000 - rest).to(tl.float32, bitcast=True)
            k = tl.where(live, expansion(tl.where(live, least * inverse, 1.0)), 1.0)
            put(target, expanded_code(s, each, of_elements(k, GROUP, BLOCK)), valid, masked, changes)
            scales += start // GROUP * 2
            tl.store(scales + block * 2, extreme, here)
            tl.store(scales + block * 2 + 1, k, here)
        else:
            put(target, dynamic_code(s * each, tables, code == D8S), valid, masked, changes)
            tl.store(scales + start // GROUP + block, extreme, here)


@triton.jit
def load_inputs(entry, codes, row, scale, clip, start, lane, valid, SCATTERED: tl.constexpr, WIDE: tl.constexpr):
    """(p, g, positions) as the rule sees them."""
    place = start + lane
    if SCATTERED:
        kinds = tl.load(entry + KINDS)
        place = optim_scattered.positions(entry, kinds, start, lane, valid)
        p = optim_scattered.load_param(entry, codes, start, lane, place, valid)
        if code_of(kinds, COMPACT_GRAD) != 0:
            g = load_f32(tl.load(entry + GRAD), code_of(codes, GRAD_CODE), start, lane, valid, False)
        else:
            g = load_f32(tl.load(entry + GRAD), code_of(codes, GRAD_CODE), 0, place, valid, False)
        p, g = optim_scattered.decayed(entry, kinds, p, g, start, lane, valid, row, scale, clip)
    else:
        p = load_param(entry, codes, start, lane, valid, WIDE)
        g = prepare_gradient(load_f32(tl.load(entry + GRAD), code_of(codes, GRAD_CODE), start, lane, valid, WIDE), p, row, scale, clip)
        p = p * row[DECAY]
    return p, g, place


@triton.jit
def update_tile(
    entry, codes, tables, row, scale, clip, seed, start, count, RULE: tl.constexpr, STATES: tl.constexpr, STORED: tl.constexpr,
    STOCHASTIC: tl.constexpr, SCATTERED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Elements start .. start + count - 1, count <= BLOCK. WIDE: every address is 16-byte aligned and count a multiple of GROUP."""
    lane = tl.arange(0, BLOCK)
    valid = lane < count
    p, g, place = load_inputs(entry, codes, row, scale, clip, start, lane, valid, SCATTERED, WIDE)
    mask = tl.load(entry + MASK)
    masked = mask != 0
    keep = valid
    if masked:
        keep = trainable(mask, start, lane, count, BLOCK, WIDE)
    s0, s1, s2, s3 = g, g, g, g  # what a rule does not read
    if STATES > 0:
        s0 = load_coded(entry, codes, tables, start, lane, valid, count, 0, GROUP, BLOCK, WIDE)
    if STATES > 1:
        s1 = load_coded(entry, codes, tables, start, lane, valid, count, 1, GROUP, BLOCK, WIDE)
    if STATES > 2:
        s2 = load_coded(entry, codes, tables, start, lane, valid, count, 2, GROUP, BLOCK, WIDE)
    if STATES > 3:
        s3 = load_coded(entry, codes, tables, start, lane, valid, count, 3, GROUP, BLOCK, WIDE)
    p, n0, n1, n2, n3 = RULE(p, g, s0, s1, s2, s3, row)
    if STORED > 0:
        store_coded(entry, codes, tables, start, lane, valid, count, masked, keep, tl.where(keep, n0, s0), 0, GROUP, BLOCK, WIDE)
    if STORED > 1:
        store_coded(entry, codes, tables, start, lane, valid, count, masked, keep, tl.where(keep, n1, s1), 1, GROUP, BLOCK, WIDE)
    if STORED > 2:
        store_coded(entry, codes, tables, start, lane, valid, count, masked, keep, tl.where(keep, n2, s2), 2, GROUP, BLOCK, WIDE)
    if STORED > 3:
        store_coded(entry, codes, tables, start, lane, valid, count, masked, keep, tl.where(keep, n3, s3), 3, GROUP, BLOCK, WIDE)
    if SCATTERED:
        optim_scattered.store_param(entry, codes, start, lane, place, valid, masked, keep, p, seed, row[STEP], STOCHASTIC)
    else:
        store_param(entry, codes, start, lane, valid, masked, keep, p, seed, row[STEP], STOCHASTIC, BLOCK, WIDE)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED + ["tables"])
def sweep(
    desc, chunks, rows, grad_scale, found_inf, clip, seed: tl.int64, chunk: tl.int64, tables, RULE: tl.constexpr, STATES: tl.constexpr,
    STORED: tl.constexpr, STOCHASTIC: tl.constexpr, SCATTERED: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `optim.sweep`. GROUP: elements per block, the same for all of these entries. SCATTERED: any of them; else no compact ones and no anchors."""
    scale = tl.load(grad_scale)
    factor = tl.load(clip)
    entry, begin, narrow, end = piece(desc, chunks, chunk)
    narrow = begin + (narrow - begin) // GROUP * GROUP  # the last, short block goes to one tile
    if SCATTERED:
        narrow = begin
    if tl.load(found_inf) != 0.0:
        narrow = begin
        end = begin
    codes = tl.load(entry + CODES)
    mine = tl.load(entry + ROW_GROUP) & 0xFFFFFFFF
    row = load_row(rows, mine) + (tl.load(rows + mine * FIELDS + PULL),)
    if not SCATTERED:
        for start in range(begin, narrow, BLOCK):
            count = eights(narrow - start, BLOCK)
            update_tile(
                entry, codes, tables, row, scale, factor, seed, start, count, RULE, STATES, STORED, STOCHASTIC, False, GROUP, BLOCK, True
            )  # fmt: skip
    for start in range(narrow, end, BLOCK):
        count = tl.minimum(end - start, BLOCK).to(tl.int32)
        update_tile(
            entry, codes, tables, row, scale, factor, seed, start, count, RULE, STATES, STORED, STOCHASTIC, SCATTERED, GROUP, BLOCK, False
        )  # fmt: skip


def tile(group: int) -> tuple[int, dict[str, Any]]:
    """Elements of a tile, and the options of a launch. Four elements a thread: with eight, two states, their codes and scales spill; in 128 registers
    four do on sm_100, so programs that leave room for others get 144. Never two blocks: for pairs of bytes Triton leaves a stack frame behind."""
    block = max(group, 256)
    if block == 2 * group:
        block *= 2
    warps = block // 128
    return block, OPTIONS | {"num_warps": warps, "maxnreg": 144 if warps <= 4 else 128}


_tables: dict[torch.device, torch.Tensor] = {}


def tables(device: torch.device) -> torch.Tensor:
    """What decoding and encoding look up: fp32 [704], made at the first step on a device."""
    if device not in _tables:
        decades = torch.zeros(4, 2, 8, dtype=torch.float32, device="cpu")
        for signed in (True, False):
            for table, row in zip(decades[:, int(not signed)], lowbit.decades(signed), strict=True):
                table[: len(row)] = row
        _tables[device] = torch.cat([decades.flatten(), lowbit.dynamic_map(True), lowbit.dynamic_map(False), lowbit.levels()]).to(device)
    return _tables[device]

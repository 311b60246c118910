"""The sweep over entries that `optim.sweep` does not take: compact ones, whose parameter and gradient are scattered, and those whose decay pulls
towards an anchor. A kernel of its own, so that the plain sweep's registers and access widths stay as they are.

Bytes per compact fp32 Adam element: states 16 and index 4, coalesced; p and g one sector of 32 each, read and (p) written.
"""

import triton
import triton.language as tl

from .common import (
    ANCHOR,
    ANCHOR_CODE,
    BF16,
    CODES,
    COMPACT_GRAD,
    DECAY,
    EXTRA,
    EXTRA_CODE,
    F32,
    FIELDS,
    GRAD,
    GRAD_CODE,
    I16,
    I64,
    INDEX,
    INDEX_BASE,
    INDEX_CODE,
    INDEX_INNER,
    INDEX_OUTER,
    KINDS,
    L2,
    MASK,
    ORDINAL,
    PARAM,
    PARAM_CODE,
    PULL,
    ROW_GROUP,
    SIGN,
    STEP,
    at,
    join_split,
    load_f32,
    load_row,
    put,
    random16,
    store_f32,
    to_bf16_split,
    to_bf16_stochastic,
    trainable,
)
from .optim import _NOT_SPECIALIZED, code_of, load_state, piece, store_state

# Four elements per thread: with eight, positions and anchor beside four states spill.
BLOCK = 512


@triton.jit
def positions(entry, kinds, start, lane, valid):
    """Where the parameter's elements lie; of a dense entry, where the entry's do."""
    index = tl.load(entry + INDEX)
    place = start + lane
    if index != 0:
        if code_of(kinds, INDEX_CODE) == I64:
            place = tl.load(at(index, start, tl.int64, False) + lane, valid, 0)
        else:
            place = tl.load(at(index, start, tl.int32, False) + lane, valid, 0).to(tl.int64)
    return place


@triton.jit
def load_param(entry, codes, start, lane, place, valid):
    """The parameter in fp32: from the fp32 master, from bf16 + 16-bit remainder, or itself."""
    extra = tl.load(entry + EXTRA)
    extra_code = code_of(codes, EXTRA_CODE)
    if extra_code == F32:
        p = load_f32(extra, extra_code, start, lane, valid, False)
    else:
        p = load_f32(tl.load(entry + PARAM), code_of(codes, PARAM_CODE), 0, place, valid, False)
        if extra_code == I16:
            p = join_split(p, tl.load(at(extra, start, tl.int16, False) + lane, valid, 0))
    return p


@triton.jit
def random_bits(entry, seed, step, place):
    """16 random bits per element, keyed by its number in the whole (unsharded) tensor."""
    inner = tl.load(entry + INDEX_INNER)
    element = tl.load(entry + INDEX_BASE) + place // inner * tl.load(entry + INDEX_OUTER) + place % inner
    return random16(seed, element, (tl.load(entry + ORDINAL) & 0xFFFFFFFF).to(tl.uint32), step.to(tl.int32).to(tl.uint32))


@triton.jit
def store_param(entry, codes, start, lane, place, valid, masked, keep, p, seed, step, STOCHASTIC: tl.constexpr):
    """Parameter and master copy. A split master decides the rounding itself; else bf16 is rounded stochastically on request."""
    extra = tl.load(entry + EXTRA)
    extra_code = code_of(codes, EXTRA_CODE)
    address = tl.load(entry + PARAM)
    code = code_of(codes, PARAM_CODE)
    if extra_code == F32:
        put(at(extra, start, tl.float32, False) + lane, p, valid, masked, keep)
    if extra_code == I16:
        high, low = to_bf16_split(p)
        put(at(address, 0, tl.uint16, False) + place, high, valid, masked, keep)
        put(at(extra, start, tl.int16, False) + lane, low, valid, masked, keep)
    elif STOCHASTIC:
        if code == BF16:
            bits = to_bf16_stochastic(p, random_bits(entry, seed, step, place))
            put(at(address, 0, tl.uint16, False) + place, bits, valid, masked, keep)
        else:
            store_f32(address, code, 0, place, valid, masked, keep, p, False)
    else:
        store_f32(address, code, 0, place, valid, masked, keep, p, False)


@triton.jit
def decayed(entry, kinds, p, g, start, lane, valid, row, scale, clip):
    """(p, g) as the rule sees them: unscaled, clipped, negated; both decays applied, towards the anchor if there is one."""
    anchor = tl.load(entry + ANCHOR)
    if scale != 1.0:
        g = tl.div_rn(g, scale)
    g = g * clip * row[SIGN]
    if anchor != 0:
        apart = p - load_f32(anchor, code_of(kinds, ANCHOR_CODE), start, lane, valid, False)
        if row[L2] != 0.0:
            g = g + row[L2] * apart
        if row[PULL] != 0.0:
            p = p - row[PULL] * apart
    else:
        if row[L2] != 0.0:
            g = g + row[L2] * p
        p = p * row[DECAY]
    return p, g


@triton.jit
def update_tile(
    entry, codes, row, scale, clip, seed, start, count,
    RULE: tl.constexpr, STATES: tl.constexpr, STORED: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements start .. start + count - 1 of the entry, count <= BLOCK."""
    lane = tl.arange(0, BLOCK)
    valid = lane < count
    kinds = tl.load(entry + KINDS)
    place = positions(entry, kinds, start, lane, valid)
    p = load_param(entry, codes, start, lane, place, valid)
    if code_of(kinds, COMPACT_GRAD) != 0:
        g = load_f32(tl.load(entry + GRAD), code_of(codes, GRAD_CODE), start, lane, valid, False)
    else:
        g = load_f32(tl.load(entry + GRAD), code_of(codes, GRAD_CODE), 0, place, valid, False)
    p, g = decayed(entry, kinds, p, g, start, lane, valid, row, scale, clip)
    s0, s1, s2, s3 = g, g, g, g  # what a rule does not read
    if STATES > 0:
        s0 = load_state(entry, codes, start, lane, valid, 0, False)
    if STATES > 1:
        s1 = load_state(entry, codes, start, lane, valid, 1, False)
    if STATES > 2:
        s2 = load_state(entry, codes, start, lane, valid, 2, False)
    if STATES > 3:
        s3 = load_state(entry, codes, start, lane, valid, 3, False)
    p, s0, s1, s2, s3 = RULE(p, g, s0, s1, s2, s3, row)
    mask = tl.load(entry + MASK)
    masked = mask != 0
    keep = valid
    if masked:
        keep = trainable(mask, start, lane, count, BLOCK, False)
    store_param(entry, codes, start, lane, place, valid, masked, keep, p, seed, row[STEP], STOCHASTIC)
    if STORED > 0:
        store_state(entry, codes, start, lane, valid, masked, keep, s0, 0, False)
    if STORED > 1:
        store_state(entry, codes, start, lane, valid, masked, keep, s1, 1, False)
    if STORED > 2:
        store_state(entry, codes, start, lane, valid, masked, keep, s2, 2, False)
    if STORED > 3:
        store_state(entry, codes, start, lane, valid, masked, keep, s3, 3, False)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def sweep(
    desc, chunks, rows, grad_scale, found_inf, clip, seed: tl.int64, chunk: tl.int64,
    RULE: tl.constexpr, STATES: tl.constexpr, STORED: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `optim.sweep`."""
    scale = tl.load(grad_scale)
    factor = tl.load(clip)
    entry, begin, _, end = piece(desc, chunks, chunk)
    if tl.load(found_inf) != 0.0:
        end = begin
    codes = tl.load(entry + CODES)
    mine = tl.load(entry + ROW_GROUP) & 0xFFFFFFFF
    row = load_row(rows, mine) + (tl.load(rows + mine * FIELDS + PULL),)
    for start in range(begin, end, BLOCK):
        count = tl.minimum(end - start, BLOCK).to(tl.int32)
        update_tile(entry, codes, row, scale, factor, seed, start, count, RULE, STATES, STORED, STOCHASTIC, BLOCK)

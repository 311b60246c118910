"""Merging fine-tuned models in Triton: the functions of `reference.merge`, bit for bit, for any number of models in one launch.

Bytes per element: reads every model and the base once (with election the models twice, the second time from the cache), writes the result once;
nothing is kept in between. Adding and multiplying without fusion, dividing to nearest: what the reference does.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedadapt.ops import sparse_checks as checks
from fusedadapt.reference.merge import COMBINE, LANES, PIECE, Part, Recipe

from .common import as_bits, as_float, load_f32, program, random16_run, store_f32

BLOCK = 1024
# Left to itself ptxas stops at 96 registers and spills two of them with election.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, "maxnreg": 128}
SUM, PAPER, PEFT, MERGEKIT = (tl.constexpr(i) for i in range(4))
_LANES, _ROWS = tl.constexpr(LANES), tl.constexpr(PIECE // LANES)
# A part: address, words or 0, dtype, chance or -1, model, the cut's key or -1, its last element, weight | factor << 32 as fp32 bits.
WIDTH = tl.constexpr(8)
_FIXED = ["out", "base", "parts", "count", "n", "out_code", "base_code", "seed", "stream", "lambda_", "divisor", "normalize", "zero_is_positive"]


@triton.jit
def kept(part, d, seed, stream, start, lane, valid, BLOCK: tl.constexpr):
    """Which of the elements are kept: by words, by the size of the change, by chance."""
    keep = valid
    words = tl.load(part + 1)
    if words != 0:
        word = tl.load(words.to(tl.pointer_type(tl.uint32)) + start // 32 + lane // 32, valid, 0)
        keep = keep & (((word >> (lane % 32).to(tl.uint32)) & 1) != 0)
    cut = tl.load(part + 5)
    if cut >= 0:
        size = as_bits(tl.abs(d))
        key = tl.where(size > 0x7F800000, 0xFFFFFFFF, size | 0x80000000).to(tl.int64)
        keep = keep & ((key > cut) | ((key == cut) & (start + lane <= tl.load(part + 6))))
    chance = tl.load(part + 3)
    if chance >= 0:
        model = (tl.load(part + 4) & 0xFFFFFFFF).to(tl.uint32)
        # interpreted, a number from 2^31 on arrives as 64 bits, whatever the kernel's signature says
        random = random16_run(seed, start, model, stream.to(tl.uint32), BLOCK) & 0xFFFF
        keep = keep & (random.to(tl.int64) < chance)
    return keep


@triton.jit
def factor_of(part):
    return as_float((tl.load(part + 7) >> 32).to(tl.uint32))


@triton.jit
def weight_of(part):
    return as_float((tl.load(part + 7) & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def delta(part, base, seed, stream, start, lane, valid, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """factor * keep * (theta - theta_0)."""
    d = load_f32(tl.load(part), tl.load(part + 2).to(tl.int32), start, lane, valid, WIDE)
    if HAS_BASE:
        d = d - base
    d = tl.where(kept(part, d, seed, stream, start, lane, valid, BLOCK), d, 0.0)
    factor = factor_of(part)
    if factor != 1.0:
        d = d * factor
    return d


@triton.jit
def sign_of(x):
    return (x > 0.0).to(tl.float32) - (x < 0.0).to(tl.float32)


@triton.jit
def summed(
    parts, count, base, seed, stream, start, lane, valid, WEIGHTED: tl.constexpr, BY_COUNT: tl.constexpr, HAS_BASE: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """sum_i d_i, or sum_i w_i d_i, in the models' order; or of their signs."""
    total = delta(parts, base, seed, stream, start, lane, valid, HAS_BASE, BLOCK, WIDE)
    if WEIGHTED:
        total = total * weight_of(parts)
    if BY_COUNT:
        total = sign_of(total)
    for i in range(1, count):
        d = delta(parts + i * WIDTH, base, seed, stream, start, lane, valid, HAS_BASE, BLOCK, WIDE)
        if WEIGHTED:
            d = d * weight_of(parts + i * WIDTH)
        if BY_COUNT:
            d = sign_of(d)
        total = total + d
    return total


@triton.jit
def elected(
    parts, count, base, seed, stream, start, lane, valid, normalize, zero_is_positive,
    COMBINE: tl.constexpr, BY_COUNT: tl.constexpr, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The changes that have the elected sign, averaged as COMBINE does."""
    votes = summed(parts, count, base, seed, stream, start, lane, valid, COMBINE == MERGEKIT, BY_COUNT, HAS_BASE, BLOCK, WIDE)
    positive = (votes > 0.0) | ((votes == 0.0) & (zero_is_positive != 0))
    total = tl.zeros([BLOCK], tl.float32)
    divisor = tl.zeros([BLOCK], tl.float32)
    for i in range(0, count):
        d = delta(parts + i * WIDTH, base, seed, stream, start, lane, valid, HAS_BASE, BLOCK, WIDE)
        weight = weight_of(parts + i * WIDTH)
        v = d * weight
        share = 1.0
        if COMBINE == MERGEKIT:
            d = v
            share = weight
        agrees = tl.where(positive, d > 0.0, d < 0.0) | (d != d)  # NaN with every sign: it must not get lost
        total = total + tl.where(agrees, v, 0.0)
        divisor = divisor + tl.where(agrees, share, 0.0)
    if (COMBINE != MERGEKIT) | (normalize != 0):
        total = tl.div_rn(total, tl.where(divisor == 0.0, 1.0, divisor))
    return total


@triton.jit
def merge_tile(
    out, base, parts, count, start, some, out_code, base_code, seed, stream, lambda_, divisor, normalize, zero_is_positive,
    COMBINE: tl.constexpr, BY_COUNT: tl.constexpr, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    valid = lane < some
    theta = tl.zeros([BLOCK], tl.float32)
    if HAS_BASE:
        theta = load_f32(base, base_code, start, lane, valid, WIDE)
    if COMBINE == SUM:
        merged = summed(parts, count, theta, seed, stream, start, lane, valid, True, False, HAS_BASE, BLOCK, WIDE)
        if normalize != 0:
            merged = tl.div_rn(merged, tl.zeros([BLOCK], tl.float32) + divisor)
    else:
        merged = elected(
            parts, count, theta, seed, stream, start, lane, valid, normalize, zero_is_positive, COMBINE, BY_COUNT, HAS_BASE,
            BLOCK, WIDE,
        )  # fmt: skip
    if lambda_ != 1.0:
        merged = merged * lambda_
    if HAS_BASE:
        merged = theta + merged
    store_f32(out, out_code, start, lane, valid, False, valid, merged, WIDE)


@triton.jit(do_not_specialize=[*_FIXED, "aligned"])
def merge_kernel(
    out: tl.int64, base: tl.int64, parts, count: tl.int64, n: tl.int64, out_code: tl.int32, base_code: tl.int32, seed: tl.int64, stream: tl.uint32,
    lambda_: tl.float32, divisor: tl.float32, normalize: tl.int32, zero_is_positive: tl.int32, aligned: tl.int32,
    COMBINE: tl.constexpr, BY_COUNT: tl.constexpr, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile a program."""
    start = program() * BLOCK
    if (aligned != 0) & (start + BLOCK <= n):
        merge_tile(
            out, base, parts, count, start, BLOCK, out_code, base_code, seed, stream, lambda_, divisor, normalize, zero_is_positive,
            COMBINE, BY_COUNT, HAS_BASE, BLOCK, True,
        )  # fmt: skip
    else:
        merge_tile(
            out, base, parts, count, start, tl.minimum(n - start, BLOCK).to(tl.int32), out_code, base_code, seed, stream, lambda_, divisor,
            normalize, zero_is_positive, COMBINE, BY_COUNT, HAS_BASE, BLOCK, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=_FIXED)
def votes_kernel(
    out, base: tl.int64, parts, count: tl.int64, n: tl.int64, base_code: tl.int32, seed: tl.int64, stream: tl.uint32,
    BY_COUNT: tl.constexpr, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[tile] = sum of sgn(sum_i d_i), or of sgn(sum_i sgn(d_i))."""
    start = program() * BLOCK
    lane = tl.arange(0, BLOCK)
    valid = lane < n - start
    theta = tl.zeros([BLOCK], tl.float32)
    if HAS_BASE:
        theta = load_f32(base, base_code, start, lane, valid, False)
    total = summed(parts, count, theta, seed, stream, start, lane, valid, False, BY_COUNT, HAS_BASE, BLOCK, False)
    sign = (total > 0.0).to(tl.int32) - (total < 0.0).to(tl.int32)
    tl.store(out + program(), tl.sum(tl.where(valid, sign, 0), 0).to(tl.int64))


@triton.jit
def halves(x):
    """Lanes added in halves: lane i + lane i + half, to the last."""
    size: tl.constexpr = x.shape[0]
    x = tl.sum(tl.reshape(x, [2, size // 2]), 0)
    if size > 2:
        x = halves(x)
    return x


@triton.jit(do_not_specialize=_FIXED)
def norms_kernel(
    out, base: tl.int64, parts, n: tl.int64, base_code: tl.int32, seed: tl.int64, stream: tl.uint32, HAS_BASE: tl.constexpr
):  # fmt: skip
    """out[piece] = (sum |d|, sum |d| of those kept) in the order of the reference: every 512th element in a lane, lanes in halves."""
    first = program() * (_LANES * _ROWS)
    lane = tl.arange(0, _LANES)
    every = tl.zeros([_LANES], tl.float64)
    some = tl.zeros([_LANES], tl.float64)
    code = tl.load(parts + 2).to(tl.int32)
    factor = factor_of(parts)
    for row in range(0, _ROWS):
        start = first + row * _LANES
        valid = lane < n - start
        d = load_f32(tl.load(parts), code, start, lane, valid, False)
        if HAS_BASE:
            d = d - load_f32(base, base_code, start, lane, valid, False)
        mine = tl.where(kept(parts, d, seed, stream, start, lane, valid, _LANES), d, 0.0)
        if factor != 1.0:
            mine = mine * factor
        every += tl.abs(d).to(tl.float64)
        some += tl.abs(mine).to(tl.float64)
    where = out + 2 * program() + tl.arange(0, 1)
    tl.store(where, halves(every))
    tl.store(where + 1, halves(some))


# ---- launches


def _array(op: str, what: str, t: Tensor | None, n: int, device: torch.device) -> tuple[int, int]:
    """(address, dtype) of a flat tensor of n elements; (0, 0) for none."""
    if t is None:
        return 0, 0
    checks.flat(op, what, t, device=device)
    if t.numel() != n:
        checks.refuse(op, f"{what} of {n} elements", t.numel(), "pass tensors of one size")
    return t.data_ptr(), checks.CODES[t.dtype]


def _fp32(x: float) -> int:
    return int.from_bytes(struct.pack("<f", x), "little")


def _table(op: str, parts: Sequence[Part], n: int, device: torch.device) -> Tensor:
    if not parts:
        checks.refuse(op, "at least one part", "none", "pass the models' tensors")
    rows = []
    for part in parts:
        address, code = _array(op, "a model's tensor", part.tensor, n, device)
        words = 0 if part.words is None else checks.words(op, part.words, n, device).data_ptr()
        key, last = (-1, 0) if part.cut is None else part.cut
        both = _fp32(part.weight) | _fp32(part.factor) << 32
        chance = -1 if part.chance is None else part.chance
        rows.append([address, words, code, chance, part.model, key, last, both - (both >> 63 << 64)])
    return checks.table(rows, device)


def _seed(recipe: Recipe) -> int:
    seed = recipe.seed & 0xFFFFFFFFFFFFFFFF
    return seed - (seed >> 63 << 64)


def merge_(out: Tensor, base: Tensor | None, parts: Sequence[Part], recipe: Recipe) -> None:
    """Writes the merged tensor into ``out`` (flat), which may be the base or a model itself. ``base``: flat, or None."""
    n, device = out.numel(), out.device
    target, of = _array("merge_", "out", out, n, device), _array("merge_", "the base", base, n, device)
    table = _table("merge_", parts, n, device)
    divisor = sum(part.weight for part in parts)
    normalize = recipe.normalize and (recipe.combine != "sum" or abs(divisor) >= 1e-8)
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (out, base, *(part.tensor for part in parts)))
    positive = recipe.combine != "paper" or recipe.majority > 0
    if n:
        with torch.cuda.device_of(out):
            merge_kernel[(triton.cdiv(n, BLOCK),)](
                target[0], of[0], table, len(parts), n, target[1], of[1], _seed(recipe), recipe.stream, recipe.lambda_, divisor, int(normalize),
                int(positive), int(aligned), COMBINE.index(recipe.combine), recipe.by_count, base is not None, BLOCK, **OPTIONS,
            )  # fmt: skip
    torch.autograd.graph.increment_version((out,))


def votes(base: Tensor | None, parts: Sequence[Part], recipe: Recipe) -> int:
    """sum over the elements of sgn(sum_i d_i). Waits for the device."""
    n, device = parts[0].tensor.numel(), parts[0].tensor.device
    table, of = _table("votes", parts, n, device), _array("votes", "the base", base, n, device)
    out = torch.zeros(triton.cdiv(n, BLOCK), dtype=torch.int64, device=device)
    if n:
        with torch.cuda.device_of(out):
            votes_kernel[(out.numel(),)](
                out, of[0], table, len(parts), n, of[1], _seed(recipe), recipe.stream, recipe.by_count, base is not None, BLOCK, **OPTIONS
            )  # fmt: skip
    return int(out.sum())


def norms(base: Tensor | None, part: Part, recipe: Recipe) -> tuple[float, float]:
    """(sum |d| of all elements, sum |d| of those kept), in fp64 and the reference's order. Waits for the device."""
    n, device = part.tensor.numel(), part.tensor.device
    table, of = _table("norms", [part], n, device), _array("norms", "the base", base, n, device)
    out = torch.zeros(triton.cdiv(n, PIECE), 2, dtype=torch.float64, device=device)
    if n:
        with torch.cuda.device_of(out):
            norms_kernel[(out.shape[0],)](out, of[0], table, n, of[1], _seed(recipe), recipe.stream, base is not None, **OPTIONS)
    every = some = 0.0
    for a, b in out.tolist():
        every, some = every + a, some + b
    return every, some

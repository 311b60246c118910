"""Exact selection and bitmasks in pure PyTorch: the truth of the sparse family.

An element's *score* is an fp32 number made from it (and a second tensor, or a factor per column); its *key* is that score as an unsigned integer with
the same order:

    key(s) = s's bits with the sign bit flipped if s >= 0, all bits flipped if s < 0;  -0 counts as +0;
             NaN is above everything (below, with nan="lowest")

The k largest keys are kept; among equal keys those that come first: lower flat index, and in a list the earlier tensor. So exactly k are kept, always
the same ones, whatever computes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SCORES = ("abs", "abs_diff", "abs_scaled", "abs_product", "given")
KEY_BITS = 32
TOP = 0xFFFFFFFF  # the key of NaN that ranks highest; 0 where it ranks lowest: no number has either


def count_of(n: int, density: float, rounding: str = "floor") -> int:
    """How many of n elements a density keeps: floor, ceil or round (half to even) of density * n computed in fp64."""
    exact = density * n
    k = math.floor(exact) if rounding == "floor" else math.ceil(exact) if rounding == "ceil" else round(exact)
    return min(max(k, 0), n)


def score_of(x: Tensor, score: str, other: Tensor | None = None) -> Tensor:
    """fp32 score of each element. abs: |x|; abs_diff: |x - other|; abs_scaled: |x| * other (a factor per column, last dimension); abs_product:
    |x * other|; given: x itself."""
    x = x.to(torch.float32)
    if score == "given":
        return x
    if score == "abs":
        return x.abs()
    assert other is not None
    y = other.to(torch.float32)
    if score == "abs_diff":
        return (x - y).abs()
    if score == "abs_scaled":
        return x.abs() * y
    return (x * y).abs()


def key_of(score: Tensor, nan: str = "highest") -> Tensor:
    """Keys (int64 in [0, 2^32)) of fp32 scores."""
    bits = (score + 0.0).contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    bits = torch.where(bits == 0x80000000, 0, bits)
    key = torch.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return torch.where(score.isnan(), TOP if nan == "highest" else 0, key)


def score_at(key: int) -> float:
    """The score whose key this is."""
    if key in (0, TOP):
        return math.nan
    bits = key ^ 0x80000000 if key & 0x80000000 else key ^ 0xFFFFFFFF
    return float(torch.tensor(bits - (1 << 32) if bits >> 31 else bits, dtype=torch.int64, device="cpu").to(torch.int32).view(torch.float32))


def histogram(keys: Sequence[Tensor], shift: int, bits: int, prefix: int | None) -> Tensor:
    """Counts (int64, 2^bits) of (key >> shift) % 2^bits over the elements whose key >> (shift + bits) is `prefix` (None: all)."""
    total = torch.zeros(1 << bits, dtype=torch.int64, device="cpu")
    for key in keys:
        flat = key.reshape(-1)
        if prefix is not None:
            flat = flat[flat >> (shift + bits) == prefix]
        total += torch.bincount((flat >> shift) & ((1 << bits) - 1), minlength=1 << bits).cpu()
    return total


def kth_key(keys: Sequence[Tensor], k: int) -> tuple[int, int, int]:
    """(the k-th largest key, how many are above it, how many equal it). k in 1..n."""
    every = torch.cat([key.reshape(-1) for key in keys])
    at = int(torch.sort(every, descending=True).values[k - 1])
    return at, int((every > at).sum()), int((every == at).sum())


def mark(keys: Sequence[Tensor], threshold: int, equal: int) -> list[Tensor]:
    """Bool masks of the keys above `threshold` and of the first `equal` that are equal to it, in order through the list."""
    masks = []
    for key in keys:
        flat = key.reshape(-1)
        same = flat == threshold
        chosen = same & (torch.cumsum(same, 0) <= equal)
        equal -= min(equal, int(same.sum()))
        masks.append(((flat > threshold) | chosen).reshape(key.shape))
    return masks


def topk(keys: Sequence[Tensor], k: int, ties: str = "lowest_index") -> list[Tensor]:
    """Masks of the k largest keys over all tensors together. ties: "lowest_index" keeps exactly k, "inclusive" every one that equals the k-th,
    "exclusive" none of them unless all fit."""
    total = sum(key.numel() for key in keys)
    if k <= 0:
        return [torch.zeros_like(key, dtype=torch.bool) for key in keys]
    threshold, above, same = kth_key(keys, min(k, total))
    return mark(keys, threshold, kept_ties(ties, min(k, total) - above, same))


def kept_ties(ties: str, left: int, same: int) -> int:
    """How many of `same` equal elements stay where `left` more would fit."""
    return {"lowest_index": left, "inclusive": same, "exclusive": same if same == left else 0}[ties]


def pack(mask: Tensor) -> Tensor:
    """bool, any shape -> int32 words of 32 elements in row-major order, lowest bit first; the last word's spare bits are 0."""
    flat = mask.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 32)).view(-1, 4, 8)
    weights = (1 << torch.arange(8, device=mask.device)).to(torch.uint8)
    return (padded * weights).sum(-1, dtype=torch.uint8).contiguous().view(torch.int32).reshape(-1)


def unpack(words: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack`."""
    bits = words.contiguous().view(torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8, device=words.device) & 1
    return bits.reshape(-1)[: math.prod(shape)].bool().reshape(tuple(shape))


def popcount(words: Tensor) -> Tensor:
    """Bits set in each int32 word (int64)."""
    v = words.to(torch.int64) & 0xFFFFFFFF
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    return ((v + (v >> 4) & 0x0F0F0F0F) * 0x01010101 & 0xFFFFFFFF) >> 24


def nm(keys: Tensor, n: int, m: int) -> Tensor:
    """Keeps the n largest keys of every m neighbours of a row (last dimension, a multiple of m); ties: lowest index."""
    groups = keys.reshape(-1, m)
    # Stable, so that among equal keys the first stays first.
    order = torch.sort(groups, dim=1, descending=True, stable=True).indices[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).reshape(keys.shape)


def energy_parts(scores: Sequence[Tensor]) -> Tensor:
    """int64 [4, 2048], by the top 11 bits of the keys (NaN's is 0): how many, the sum of their significands as integers, the sums of the lower and of
    the upper 32 bits of those squared. All elements of a bin share their exponent, so these sums are exact, in any order."""
    parts = torch.zeros(4, 2048, dtype=torch.int64, device=scores[0].device)
    for s in scores:
        flat = s.reshape(-1)
        at = key_of(flat, "lowest") >> 21
        bits = flat.contiguous().view(torch.int32).to(torch.int64) & 0x7FFFFFFF
        significand = (bits & 0x7FFFFF) | torch.where(bits >> 23 > 0, 1 << 23, 0)
        square = significand * significand
        for part, value in zip(parts, (torch.ones_like(at), significand, square & 0xFFFFFFFF, square >> 32), strict=True):
            part.index_add_(0, at, value)
    return parts


def energy_of(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`energy_parts` -> (counts int64, sums fp64, sums of squares fp64), each rounded once, on the CPU. Infinities sum to themselves."""
    counts, significands, low, high = parts.tolist()
    sums, squares = [0.0] * 2048, [0.0] * 2048
    for b, count in enumerate(counts):
        if not count:
            continue
        size = b - 1024 if b >= 1024 else 1023 - b  # of |s|: its exponent and the first two bits of its fraction
        scale, sign = max(size >> 2, 1) - 150, 1.0 if b >= 1024 else -1.0
        if b == 0 or size >> 2 == 255:
            sums[b], squares[b] = (math.nan, math.nan) if b == 0 else (sign * math.inf, math.inf)
        else:
            sums[b] = sign * math.ldexp(float(significands[b]), scale)
            squares[b] = math.ldexp(float((high[b] << 32) + low[b]), 2 * scale)
    first, second = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (sums, squares))
    return torch.tensor(counts, dtype=torch.int64, device="cpu"), first, second


def column_slices(rows: int, columns: int) -> int:
    """Into how many slices of its rows a sum over columns is cut: slice i has the rows from rows * i // slices on. By the shape alone, so that the
    order of the sums depends on nothing else."""
    return min(max(min(rows // 64, (1 << 17) // max(columns, 1)), 1), 16)


def column_squares(x: Tensor) -> Tensor:
    """Sum of squares of each column of x [T, K], fp32 [K]: in fp64, row by row in each slice, then slice by slice, rounded once."""
    rows, columns = x.shape
    slices = column_slices(rows, columns)
    first = torch.tensor([rows * i // slices for i in range(slices + 1)], dtype=torch.int64, device=x.device)
    sums = torch.zeros(slices, columns, dtype=torch.float64, device=x.device)
    for step in range(int((first[1:] - first[:-1]).max())):
        some = first[:-1] + step < first[1:]
        sums[some] += x[first[:-1][some] + step].double().square()
    total = torch.zeros(columns, dtype=torch.float64, device=x.device)
    for part in sums:
        total = total + part
    return total.float()

"""Merging fine-tuned models, element by element, in pure PyTorch.

    d_i = factor_i * keep_i * (theta_i - theta_0)          keep_i: chosen by size, by chance, or all

    sum       out = theta_0 + lambda * sum_i w_i d_i                                   (/ sum_i w_i if normalize)
    paper     s = sgn(sum_i d_i) (0: the model's majority);  mean of the w_i d_i that are not 0 and have sign s
    peft      s = + if sum_i d_i >= 0 else -;                sum of the w_i d_i whose d_i has sign s / how many (at least 1)
    mergekit  s = + if sum_i w_i d_i >= 0 else -;            sum of the w_i d_i with sign s (/ sum of their w_i if normalize)

With ``by_count`` the sums that s is taken of are of signs: as many votes as models, however large. NaN has every sign, so that it stays NaN.
Everything in fp32 (fp64 for fp64), sums in the models' order, one rounding at the end. Without theta_0, d_i = factor_i * theta_i and nothing is
added.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .division import over
from .random import random16
from .sparse import TOP, key_of, kth_key, score_of, unpack

COMBINE = ("sum", "paper", "peft", "mergekit")
PIECE, LANES = 1 << 16, 512  # what `norms` adds up together, and side by side


class Cut(NamedTuple):
    """Where the k largest |theta - theta_0| of a tensor end: those with a larger key (`reference.sparse.key_of`) are kept, and those with this one up
    to element ``last``: exactly k, without a bit per element."""

    key: int
    last: int


@dataclass(frozen=True)
class Part:
    """One model's share of one tensor. ``tensor``: flat; ``words``: packed bits of the elements kept, or None; ``cut``: keeps the largest changes, or
    None; ``chance``: keep where 16 random bits are below it, or None; ``model``: its number, which keys those bits."""

    tensor: Tensor
    weight: float = 1.0
    factor: float = 1.0
    words: Tensor | None = None
    chance: int | None = None
    model: int = 0
    cut: Cut | None = None


@dataclass(frozen=True)
class Recipe:
    """How the parts of one tensor combine. ``majority``: the sign of a zero sum with "paper"; ``seed`` and ``stream`` (`stream_of` its
    name) key the random bits; ``by_count``: elect the sign most have, not the one of the sum."""

    combine: str = "sum"
    lambda_: float = 1.0
    normalize: bool = False
    majority: int = 1
    seed: int = 0
    stream: int = 0
    by_count: bool = False


def stream_of(name: str) -> int:
    """The number that stands for a tensor's name in the random bits: its CRC-32."""
    return zlib.crc32(name.encode())


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _keys(base: Tensor | None, tensor: Tensor) -> Tensor:
    return key_of(score_of(tensor, "abs") if base is None else score_of(tensor, "abs_diff", base))


def kept(base: Tensor | None, part: Part, recipe: Recipe, first: int, last: int) -> Tensor | None:
    """Which of the elements first..last-1 are kept (bool), or None for all. ``first``: a multiple of 32."""
    n = last - first
    keep = None if part.words is None else unpack(part.words[first // 32 : (last + 31) // 32], (n,))
    if part.cut is not None:
        key = _keys(None if base is None else base[first:last], part.tensor[first:last])
        tie = torch.arange(first, last, device=key.device) <= part.cut.last
        large = (key > part.cut.key) | ((key == part.cut.key) & tie)
        keep = large if keep is None else keep & large
    if part.chance is not None:
        element = np.arange(first, last, dtype=np.uint64)
        lucky = (random16(recipe.seed & 0xFFFFFFFFFFFFFFFF, element, part.model, recipe.stream) < part.chance).to(part.tensor.device)
        keep = lucky if keep is None else keep & lucky
    return keep


def delta(base: Tensor | None, part: Part, recipe: Recipe, first: int, last: int) -> Tensor:
    """factor * keep * (theta - theta_0) of the elements first..last-1."""
    d = part.tensor[first:last].to(wide(part.tensor.dtype))
    if base is not None:
        d = d - base[first:last].to(d.dtype)
    keep = kept(base, part, recipe, first, last)
    if keep is not None:
        d = torch.where(keep, d, 0)
    return d if part.factor == 1.0 else d * part.factor


def _elected(voters: Sequence[Tensor], recipe: Recipe) -> Tensor:
    """The sums of which the signs are taken."""
    votes = torch.zeros_like(voters[0])
    for v in voters:
        votes = votes + ((v > 0).to(v.dtype) - (v < 0).to(v.dtype) if recipe.by_count else v)
    return votes


def combine(deltas: Sequence[Tensor], weights: Sequence[float], recipe: Recipe) -> Tensor:
    """The merged change, before lambda."""
    if recipe.combine == "sum":
        total = deltas[0] * weights[0]
        for d, w in zip(deltas[1:], weights[1:], strict=True):
            total = total + d * w
        weight = sum(weights)
        return over(total, weight) if recipe.normalize and abs(weight) >= 1e-8 else total
    weighted = [d * w for d, w in zip(deltas, weights, strict=True)]
    voters = weighted if recipe.combine == "mergekit" else deltas
    votes = _elected(voters, recipe)
    zero = recipe.majority if recipe.combine == "paper" else 1
    positive = votes >= 0 if zero > 0 else votes > 0
    total, divisor = torch.zeros_like(votes), torch.zeros_like(votes)
    for d, v, w in zip(voters, weighted, weights, strict=True):
        agrees = torch.where(positive, d > 0, d < 0) | d.isnan()  # NaN with every sign: it must not get lost
        total = total + torch.where(agrees, v, 0)
        divisor = divisor + torch.where(agrees, votes.new_tensor(w if recipe.combine == "mergekit" else 1.0), 0)
    if recipe.combine == "mergekit" and not recipe.normalize:
        return total
    return total / torch.where(divisor == 0, 1, divisor)


def votes(base: Tensor | None, parts: Sequence[Part], recipe: Recipe, chunk: int = 1 << 20) -> int:
    """sum over the elements of sgn(sum_i d_i): its sign is the majority that a zero sum takes with "paper"."""
    n, count = parts[0].tensor.numel(), 0
    for first in range(0, n, chunk):
        last = min(first + chunk, n)
        total = _elected([delta(base, part, recipe, first, last) for part in parts], recipe)
        count += int((total > 0).sum()) - int((total < 0).sum())  # NaN has no vote
    return count


def merge_(out: Tensor, base: Tensor | None, parts: Sequence[Part], recipe: Recipe, chunk: int = 1 << 20) -> None:
    """Writes the merged tensor into ``out`` (flat). ``base``: flat, or None."""
    for first in range(0, out.numel(), chunk):
        last = min(first + chunk, out.numel())
        deltas = [delta(base, part, recipe, first, last) for part in parts]
        merged = combine(deltas, [part.weight for part in parts], recipe)
        if recipe.lambda_ != 1.0:
            merged = merged * recipe.lambda_
        out[first:last] = (merged if base is None else base[first:last].to(merged.dtype) + merged).to(out.dtype)


def norms(base: Tensor | None, part: Part, recipe: Recipe) -> tuple[float, float]:
    """(sum |d| of all elements, sum |d| of those kept), in fp64: mergekit's DARE scales by their ratio. The order of the sums is part of the truth:
    every `LANES`-th element of a piece, then the lanes in halves, then the pieces."""
    every = some = 0.0
    whole = Part(part.tensor)
    for first in range(0, part.tensor.numel(), PIECE):
        last = min(first + PIECE, part.tensor.numel())
        every += _absolute_sum(delta(base, whole, recipe, first, last))
        some += _absolute_sum(delta(base, part, recipe, first, last))
    return every, some


def _absolute_sum(d: Tensor) -> float:
    lanes = torch.zeros(LANES, dtype=torch.float64, device=d.device)
    for row in torch.nn.functional.pad(d.abs().double(), (0, -d.numel() % LANES)).view(-1, LANES):
        lanes = lanes + row
    while lanes.numel() > 1:
        lanes = lanes[: lanes.numel() // 2] + lanes[lanes.numel() // 2 :]
    return float(lanes)


def cut_of(n: int, k: int) -> Cut | None:
    """The cut that keeps nothing or everything, or None where it depends on the tensor."""
    return Cut(TOP, -1) if k <= 0 else Cut(1 << 31, n - 1) if k >= n else None


def cuts(base: Tensor | None, tensors: Sequence[Tensor], counts: Sequence[int]) -> list[Cut]:
    """Where the `counts[i]` largest |tensors[i] - base| end; ties: lowest index. Flat tensors of one length."""
    found = []
    for tensor, k in zip(tensors, counts, strict=True):
        cut = cut_of(tensor.numel(), k)
        if cut is None:
            keys = _keys(base, tensor)
            key, above, same = kth_key([keys], k)
            last = int((keys == key).nonzero()[k - above - 1]) if k - above < same else tensor.numel() - 1
            cut = Cut(key, last)
        found.append(cut)
    return found

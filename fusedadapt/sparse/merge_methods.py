"""Merge methods as data, and how each prepares the parts of one tensor: which elements stay, and by what they are scaled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ..ops import sparse as ops
from ..reference import merge as truth
from ..reference.division import over
from ..reference.merge import Cut, Part, Recipe
from ..reference.random import random16
from ..reference.sparse import key_of
from .select import Item, Threshold, find_threshold, topk_mask
from .weights import Model, floating

COMPAT = ("paper", "peft", "mergekit")
_BLOCK = 1 << 17  # elements of each model that are ranked at a time: some 100 bytes for each in sorts and random numbers


@dataclass(frozen=True)
class Method:
    """``trim``: keep the largest changes ("top"), or those left when the largest are gone too ("middle"); ``drop``: keep by chance, the same for all
    ("chance") or growing with the rank in the row ("rank"); ``elect``: only the changes with the elected sign count; ``paper``: where it is from."""

    paper: str
    trim: str | None = None
    drop: str | None = None
    elect: bool = False
    base: bool = True


METHODS: dict[str, Method] = {
    "linear": Method("arXiv 2203.05482", base=False),
    "task_arithmetic": Method("arXiv 2212.04089"),
    "ties": Method("arXiv 2306.01708", trim="top", elect=True),
    "magnitude_prune": Method("PEFT", trim="top"),
    "dare_linear": Method("arXiv 2311.03099", drop="chance"),
    "dare_ties": Method("arXiv 2311.03099", drop="chance", elect=True),
    "darex": Method("arXiv 2410.09344", drop="chance"),
    "breadcrumbs": Method("arXiv 2312.06795", trim="middle"),
    "breadcrumbs_ties": Method("arXiv 2312.06795", trim="middle", elect=True),
    "della": Method("arXiv 2406.11617", drop="rank", elect=True),
    "della_linear": Method("arXiv 2406.11617", drop="rank"),
}


@dataclass
class Job:
    """One merge: the models and what the user asked for."""

    name: str
    base: Model | None
    models: list[Model]
    weights: list[float]
    density: list[float]
    lambda_: float
    seed: int
    compat: str
    normalize: bool
    gamma: float
    epsilon: float
    q: float | None
    cuts: list[Threshold | None] = field(default_factory=list)
    majority: int = 1
    by_count: bool = False
    rescale: bool | None = None

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    @property
    def rescales(self) -> bool:
        """Whether what stays is scaled for what went: after a drop unless told otherwise, after a cut only in mergekit, on demand. (darex has q.)"""
        return self.name != "darex" and (self.method.drop is not None if self.rescale is None else self.rescale)

    def recipe(self, name: str) -> Recipe:
        combine = self.compat if self.method.elect else "sum"
        return Recipe(combine, self.lambda_, self.normalize, self.majority, self.seed, truth.stream_of(name), self.by_count)


def prepare(job: Job) -> None:
    """What takes a look at whole models first: TIES as published cuts each model's change over all its tensors together."""
    if job.name == "ties" and job.compat == "paper":
        assert job.base is not None
        job.cuts = [_model_cut(job.base, model, d) for model, d in zip(job.models, job.density, strict=True)]
    if job.method.elect and job.compat == "paper":
        assert job.base is not None
        total = 0
        for name in floating(job.base):
            base, parts, recipe = parts_of(job, name)
            total += ops.run("votes", parts[0].tensor)(base, parts, recipe)
        job.majority = 1 if total > 0 else -1  # the official code, too, takes the negative ones when both are as many


def _model_cut(base: Model, model: Model, density: float) -> Threshold | None:
    """The official code keeps everything from the (int(density n) + 1)-th largest change on, ties included; None: everything."""

    def batches() -> Iterator[list[Item]]:
        return ([(ops.readable(model[name].reshape(-1)), ops.readable(base[name].reshape(-1)))] for name in floating(base))

    n = sum(math.prod(base.about[name][1]) for name in floating(base))
    k = min(int(density * n) + 1, n)
    return None if k == n or n == 0 else find_threshold(batches, "abs_diff", k, "inclusive", "highest")


def parts_of(job: Job, name: str) -> tuple[Tensor | None, list[Part], Recipe]:
    """The base's tensor (flat), the parts of all models, and how they combine."""
    base = None if job.base is None else job.base[name].reshape(-1)
    recipe, shape = job.recipe(name), job.models[0].about[name][1]
    parts = [Part(model[name].reshape(-1), w, model=i) for i, (model, w) in enumerate(zip(job.models, job.weights, strict=True))]
    if job.method.trim == "top" and base is not None:
        parts = _trim(job, base, parts)
    if job.method.trim == "middle" and base is not None:
        row = shape[-1] if len(shape) > 1 else base.numel()
        parts = [replace(part, words=_middle(job, base, part, row)) for part in parts]
    if job.method.drop == "chance":
        parts = [_drop(job, part) for part in parts]
    if job.compat == "mergekit" and job.rescales:
        parts = [_rescaled(base, part, recipe) for part in parts]
    return base, parts, recipe


def _trim(job: Job, base: Tensor, parts: list[Part]) -> list[Part]:
    """Keeps the largest changes: of the model by its cut, else exactly so many of this tensor."""
    n = base.numel()
    if job.cuts:
        return [part if cut is None else replace(part, cut=Cut(int(cut.key), n)) for part, cut in zip(parts, job.cuts, strict=True)]
    least = 1 if job.compat == "mergekit" else 0
    # density 0 keeps nothing, in mergekit too
    counts = [n if d >= 1 else max(least, int(d * n)) if d > 0 else 0 for d in job.density]
    found = ops.run("cuts", base)(base, [part.tensor for part in parts], counts)
    return [part if k >= n else replace(part, cut=cut) for part, cut, k in zip(parts, found, counts, strict=True)]


def _middle(job: Job, base: Tensor, part: Part, row: int) -> Tensor | None:
    """Words of what breadcrumbs keep, of the tensor (mergekit) or of every row; None for all."""
    density = job.density[part.model]
    if density >= 1 or base.numel() == 0:
        return None
    scope, length = ("tensor", base.numel()) if job.compat == "mergekit" else ("row", row)
    target, above = int(density * length), int(job.gamma * length)
    upper = min(length, target + above)
    rows, of = part.tensor.view(-1, length), base.view(-1, length)
    outer, inner = (topk_mask(rows, k=k, score="abs_diff", other=of, scope=scope) for k in (upper, upper - target))
    words: Tensor = (outer - inner).words
    return words


def _drop(job: Job, part: Part) -> Part:
    density = job.density[part.model]
    if density >= 1:
        return part
    part = replace(part, chance=round(density * 65536))
    if job.name == "darex":
        return replace(part, factor=1.0 / (density if job.q is None else job.q))
    if job.compat == "mergekit" or not job.rescales:
        return part
    return replace(part, factor=1.0 / density if density > 0 else 1.0)


def _rescaled(base: Tensor | None, part: Part, recipe: Recipe) -> Part:
    """To the L1 norm of the whole change, if anything is left out."""
    if part.cut is None and part.words is None and part.chance is None:
        return part
    return replace(part, factor=_ratio(*ops.run("norms", part.tensor)(base, part, recipe)))


def _ratio(every: float, some: float) -> float:
    """mergekit's rescaling to the L1 norm before; none where there is next to nothing."""
    return 1.0 if every < 1e-7 or some < 1e-7 else every / some


def rank_drop(job: Job, name: str, out: Tensor, shape: Sequence[int]) -> None:
    """DELLA: the chance to stay grows with the rank of the change in its row, from density - epsilon to density + epsilon. Rows in blocks.

    A vector is one row. Of more than two dimensions mergekit ranks along the second, here it is the last.
    """
    assert job.base is not None
    base, tensors = job.base[name].reshape(-1), [model[name].reshape(-1) for model in job.models]
    row = _ranked_along(shape, job.compat)
    recipe, block = job.recipe(name), max(1, _BLOCK // (row[0] * row[1])) * row[0] * row[1]
    factors = [1.0] * len(tensors)
    if job.compat == "mergekit" and job.rescales:
        sums = torch.zeros(len(tensors), 2, dtype=torch.float64, device="cpu")
        for first in range(0, out.numel(), block):
            for i, tensor in enumerate(tensors):
                every, some = _ranked(job, i, base, tensor, row, first, min(first + block, out.numel()), recipe)
                sums[i] += torch.stack([every.abs().sum(dtype=torch.float64), some.abs().sum(dtype=torch.float64)])
        factors = [1.0 if d >= 1 else _ratio(float(every), float(some)) for d, (every, some) in zip(job.density, sums, strict=True)]
    for first in range(0, out.numel(), block):
        last = min(first + block, out.numel())
        deltas = [_ranked(job, i, base, t, row, first, last, recipe)[1] * factors[i] for i, t in enumerate(tensors)]
        merged = truth.combine(deltas, job.weights, recipe) * job.lambda_
        out[first:last] = (base[first:last].to(merged.dtype) + merged).to(out.dtype)


def _ranked_along(shape: Sequence[int], compat: str) -> tuple[int, int]:
    """(length of a row, how far apart its elements are)."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return (shape[1], math.prod(shape[2:])) if compat == "mergekit" else (shape[-1], 1)


def _ranked(job: Job, i: int, base: Tensor, tensor: Tensor, row: tuple[int, int], first: int, last: int, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(the changes of whole rows, the changes that stay: scaled by 1/p as published, or not yet as mergekit does)."""
    d = truth.delta(base, Part(tensor), recipe, first, last)
    density, epsilon = job.density[i], job.epsilon
    if density >= 1 or density == 0:
        return d, d if density else torch.zeros_like(d)
    length, apart = row
    order = torch.argsort(key_of(d.abs().float()).view(-1, length, apart), dim=1, stable=True)
    places = torch.arange(length, device=d.device)[:, None].expand_as(order).contiguous()
    rank = torch.empty_like(order).scatter_(1, order, places).reshape(-1)
    p = (density - epsilon + over(2 * epsilon * rank.double(), length - 1)) if length > 1 else torch.full_like(d, density, dtype=torch.float64)
    lanes = random16(job.seed & 0xFFFFFFFFFFFFFFFF, np.arange(first, last, dtype=np.uint64), i, recipe.stream).to(d.device)
    stays = lanes < (p.clamp(0, 1) * 65536).round()
    return d, torch.where(stays, d if job.compat == "mergekit" or not job.rescales else d / p.to(d.dtype), 0)


def slerp(base: Tensor, other: Tensor, t: float, out: Tensor) -> None:
    """Spherical interpolation of two flat tensors; nearly parallel ones linearly."""
    wide, step = truth.wide(base.dtype), 1 << 18
    blocks = [slice(i, i + step) for i in range(0, base.numel(), step)]
    norms = [sum(float(x[b].double().square().sum()) for b in blocks) ** 0.5 for x in (base, other)]
    dot = sum(float((base[b].double() * other[b].double()).sum()) for b in blocks)
    cosine = max(-1.0, min(1.0, dot / ((norms[0] if norms[0] > 1e-8 else 1.0) * (norms[1] if norms[1] > 1e-8 else 1.0))))
    first, second = 1 - t, t
    if abs(cosine) <= 0.9995:
        angle = float(np.arccos(cosine))
        first, second = float(np.sin((1 - t) * angle) / np.sin(angle)), float(np.sin(t * angle) / np.sin(angle))
    for b in blocks:
        out[b] = (base[b].to(wide) * first + other[b].to(wide) * second).to(out.dtype)


def fisher(tensors: Sequence[Tensor], information: Sequence[Tensor], weights: Sequence[float], out: Tensor, floor: float = 1e-6) -> None:
    """theta = sum c F theta / sum c F, F at least `floor`. Flat tensors."""
    step, wide = 1 << 20, torch.promote_types(truth.wide(tensors[0].dtype), truth.wide(out.dtype))
    for i in range(0, out.numel(), step):
        b = slice(i, i + step)
        top = bottom = torch.zeros((), dtype=wide, device=out.device)
        for x, f, c in zip(tensors, information, weights, strict=True):
            share = c * f[b].to(wide).clamp(min=floor)
            top, bottom = top + share * x[b].to(share.dtype), bottom + share
        out[b] = (top / bottom).to(out.dtype)

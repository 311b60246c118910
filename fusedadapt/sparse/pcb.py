"""PCB-Merging (arXiv 2410.02396): each change counts by how large it is in its own model and how far it agrees with the others.

Over the whole flattened model: clamp |d_i| to its [1e-4, 1 - 1e-4] quantiles; intra = exp(n minmax(|d_i|)^2); inter = tanh(d_i sum_j d_j);
score = intra * inter, cut below its (1 - density) quantile, scaled to [0, 1]; out = theta_0 + lambda sum_i s_i d_i / max(sum_i s_i, 1e-12).

The models are read several times over, a block at a time: twice for every quantile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..reference.division import over
from ..reference.merge import wide
from .merge_methods import Job
from .select import Item, find_threshold
from .weights import floating

_STEP = 1 << 18  # elements of each model at a time


class _Flat:
    """The changes of all models, a block at a time, clamped once the limits are known."""

    def __init__(self, job: Job) -> None:
        assert job.base is not None
        self.job, self.base = job, job.base
        self.sizes = {name: math.prod(self.base.about[name][1]) for name in floating(self.base)}
        self.total = sum(self.sizes.values())
        self.limits: list[tuple[float, float]] = []
        self.cuts: list[float] = []
        self.tops: list[float] = []

    def change(self, i: int, name: str, at: slice) -> Tensor:
        theta = self.base[name].reshape(-1)[at]
        kind = wide(theta.dtype)
        d = self.job.models[i][name].reshape(-1)[at].to(kind) - theta.to(kind)
        if not self.limits:
            return d
        low, high = self.limits[i]
        return d.sign() * d.abs().clamp(low, high)

    def changes(self, name: str, at: slice) -> tuple[list[Tensor], Tensor]:
        """Those of all models, and their sum."""
        d = [self.change(j, name, at) for j in range(len(self.job.models))]
        total = d[0].clone()
        for other in d[1:]:
            total += other
        return d, total

    def score(self, i: int, d: Tensor, total: Tensor) -> Tensor:
        """In fp64, rounded once: exp and tanh of CPUs and GPUs differ in the last bit, and the cut would then fall elsewhere."""
        low, high = self.limits[i]
        x = d.double()
        relative = over(x.abs() - low, high - low) if high > low else torch.zeros_like(x)
        return (torch.exp(len(self.job.models) * relative.square()) * torch.tanh(x * total.double())).to(d.dtype)

    def scale(self, i: int, d: Tensor, total: Tensor) -> Tensor:
        cut, top = self.cuts[i], self.tops[i]
        score = self.score(i, d, total)
        return over(score.clamp(min=cut) - cut, top - cut) if top > cut else torch.ones_like(score)

    def kth(self, value: Callable[[str, slice], Tensor], k: int) -> float:
        """The k-th largest of value(block) over the model."""

        def batches() -> Iterator[list[Item]]:
            for name, size in self.sizes.items():
                for i in range(0, size, _STEP):
                    yield [(value(name, slice(i, i + _STEP)).float().contiguous(), None)]

        return find_threshold(batches, "given", min(max(k, 1), self.total), "inclusive", "lowest").value


def computer(job: Job) -> Callable[[str, Tensor, tuple[int, ...]], None]:
    """(name, flat result, shape) -> the merged tensor in `result`, after the passes over whole models."""
    flat, n = _Flat(job), len(job.models)
    if flat.total:
        _measure(flat, n)

    def compute(name: str, result: Tensor, shape: tuple[int, ...]) -> None:
        for first in range(0, result.numel(), _STEP):
            at = slice(first, first + _STEP)
            d, total = flat.changes(name, at)
            top, bottom = torch.zeros_like(total), torch.zeros_like(total)
            for i in range(n):
                scale = flat.scale(i, d[i], total)
                top, bottom = top + scale * d[i] * job.weights[i], bottom + scale
            merged = job.lambda_ * top / bottom.clamp(min=1e-12)
            result[at] = (flat.base[name].reshape(-1)[at].to(merged.dtype) + merged).to(result.dtype)

    return compute


def _measure(flat: _Flat, n: int) -> None:
    edge = int(1e-4 * flat.total)

    def size(i: int) -> Callable[[str, slice], Tensor]:
        return lambda name, at: flat.change(i, name, at).abs()

    def score(i: int) -> Callable[[str, slice], Tensor]:
        def value(name: str, at: slice) -> Tensor:
            d, total = flat.changes(name, at)
            return flat.score(i, d[i], total)

        return value

    flat.limits = [(flat.kth(size(i), flat.total - edge), flat.kth(size(i), edge + 1)) for i in range(n)]
    flat.cuts = [flat.kth(score(i), round(density * flat.total)) for i, density in enumerate(flat.job.density)]
    flat.tops = [flat.kth(score(i), 1) for i in range(n)]

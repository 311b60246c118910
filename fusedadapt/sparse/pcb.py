"""PCB-Merging (arXiv 2410.02396): each change counts by how large it is in its own model and how far it agrees with the others.

Over the whole flattened model: clamp |d_i| to its [1e-4, 1 - 1e-4] quantiles; intra = exp(n minmax(|d_i|)^2); inter = tanh(d_i sum_j d_j);
score = intra * inter, cut below its (1 - density) quantile, scaled to [0, 1]; out = theta_0 + lambda sum_i s_i d_i / max(sum_i s_i, 1e-12).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .merge_methods import Job
from .select import Item, find_threshold
from .weights import floating

_STEP = 1 << 20


class _Flat:
    """The changes of all models, a block at a time, clamped once the limits are known."""

    def __init__(self, job: Job) -> None:
        assert job.base is not None
        self.job, self.base = job, job.base
        self.total = sum(self.base[name].numel() for name in floating(self.base))
        self.limits: list[tuple[float, float]] = []
        self.cuts: list[float] = []
        self.tops: list[float] = []

    def blocks(self) -> Iterator[tuple[str, slice]]:
        for name in floating(self.base):
            for i in range(0, self.base[name].numel(), _STEP):
                yield name, slice(i, i + _STEP)

    def change(self, i: int, name: str, at: slice) -> Tensor:
        d = self.job.models[i][name].reshape(-1)[at].float() - self.base[name].reshape(-1)[at].float()
        if not self.limits:
            return d
        low, high = self.limits[i]
        return d.sign() * d.abs().clamp(low, high)

    def score(self, i: int, name: str, at: slice) -> Tensor:
        d = [self.change(j, name, at) for j in range(len(self.job.models))]
        low, high = self.limits[i]
        relative = (d[i].abs() - low) / (high - low) if high > low else torch.zeros_like(d[i])
        total = torch.stack(d).sum(0)
        return torch.exp(len(d) * relative.square()) * torch.tanh(d[i] * total)

    def kth(self, value: Callable[[str, slice], Tensor], k: int) -> float:
        """The k-th largest of value(block) over the model."""

        def batches() -> Iterator[list[Item]]:
            return ([(value(name, at).contiguous(), None)] for name, at in self.blocks())

        return find_threshold(batches, "given", min(max(k, 1), self.total), "inclusive", "lowest").value

    def scale(self, i: int, name: str, at: slice) -> Tensor:
        cut, top = self.cuts[i], self.tops[i]
        if top <= cut:
            return torch.ones_like(self.score(i, name, at))
        return (self.score(i, name, at).clamp(min=cut) - cut) / (top - cut)


def computer(job: Job) -> Callable[[str, Tensor, tuple[int, ...]], None]:
    """(name, flat result, shape) -> the merged tensor in `result`, after the passes over whole models."""
    flat, n = _Flat(job), len(job.models)
    if flat.total:
        edge = int(1e-4 * flat.total)
        sizes = [lambda name, at, i=i: flat.change(i, name, at).abs() for i in range(n)]  # type: ignore[misc]
        flat.limits = [(flat.kth(size, flat.total - edge), flat.kth(size, edge + 1)) for size in sizes]
        scores = [lambda name, at, i=i: flat.score(i, name, at) for i in range(n)]  # type: ignore[misc]
        flat.cuts = [flat.kth(score, round(d * flat.total)) for score, d in zip(scores, job.density, strict=True)]
        flat.tops = [flat.kth(score, 1) for score in scores]

    def compute(name: str, result: Tensor, shape: tuple[int, ...]) -> None:
        for i in range(0, result.numel(), _STEP):
            at = slice(i, i + _STEP)
            changes, scales = [flat.change(j, name, at) for j in range(n)], [flat.scale(j, name, at) for j in range(n)]
            total = sum(s * d * w for s, d, w in zip(scales, changes, job.weights, strict=True))
            merged = job.lambda_ * total / torch.stack(scales).sum(0).clamp(min=1e-12)
            result[at] = (flat.base[name].reshape(-1)[at].float() + merged).to(result.dtype)

    return compute

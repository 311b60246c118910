"""How dense each layer should be, and the energy histogram that tells what any density costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..ops import sparse as ops
from ..reference.sparse import count_of
from .select import Tensors

METHODS = ("uniform", "er", "erk", "rate_distortion")
Source = nn.Module | Mapping[str, Any]
_ZERO, _BINS = 1024, 1020  # histogram index of |x| = 0 and how many bins hold finite magnitudes
_EDGES = np.minimum((np.arange(_BINS + 1, dtype=np.uint32) << 21).view(np.float32).astype(np.float64), 3.4028236e38)


@dataclass(frozen=True)
class EnergyHistogram:
    """What magnitude pruning keeps of a tensor at every k, from one pass over it: elements, sum and sum of squares of |x| by its leading bits (four
    bins per power of two, so a bin's ends differ by at most 25 %).

    ``counts``, ``sums``, ``squares``: fp64 numpy arrays [1020], from zero up.
    """

    counts: np.ndarray[Any, np.dtype[np.float64]]
    sums: np.ndarray[Any, np.dtype[np.float64]]
    squares: np.ndarray[Any, np.dtype[np.float64]]

    @property
    def numel(self) -> int:
        return int(self.counts.sum())

    def kept(self, k: int) -> tuple[float, float]:
        """(sum of |x|, sum of x^2) over the k largest. Exact where k ends at a bin's end; inside a bin its mean stands for its
        elements, a lower bound that misses at most a quarter (of the squares 9/16) of what that bin contributes.

        Raises:
            ValueError: k outside 0..numel.
        """
        if not 0 <= k <= self.numel:
            raise ValueError(f"EnergyHistogram.kept: expected k in 0..{self.numel}; got {k}")
        taken = np.minimum(self.counts, np.maximum(k - self._from_here[1:], 0.0))
        share = np.divide(taken, self.counts, out=np.zeros_like(taken), where=self.counts > 0)
        return float(share @ self.sums), float(share @ self.squares)

    def count_for(self, share: float, norm: int = 2) -> int:
        """A k whose largest elements hold at least `share` of the whole: of the sum of squares (norm 2) or of the sum of |x| (norm 1). The smallest
        such k or, inside a bin, a little more.

        Raises:
            ValueError: a share outside [0, 1], another norm.
        """
        if not 0.0 <= share <= 1.0 or norm not in (1, 2):
            raise ValueError(f"EnergyHistogram.count_for: expected a share in [0, 1] and norm 1 or 2; got {share} and {norm}")
        low, high = 0, self.numel
        goal = share * self.kept(high)[norm - 1]
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.kept(middle)[norm - 1] >= goal * (1 - 1e-12) else (middle + 1, high)
        return low

    def above(self, t: float) -> float:
        """About how many elements are larger than `t`: exact at a bin's end, elements evenly spread within a bin."""
        return float(np.interp(t, _EDGES, self._from_here))

    @cached_property
    def _from_here(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.concatenate((np.cumsum(self.counts[::-1])[::-1], [0.0]))


def energy_histogram(w: Tensors) -> EnergyHistogram:
    """The histogram of |w| of a tensor, or of a list or dict together; fp32, bf16, fp16 (other floating-point types rounded to fp32).

    Raises:
        ValueError: NaN or infinity among the elements; a dtype that is not floating-point.
    """
    tensors = [w] if isinstance(w, Tensor) else list(w.values() if isinstance(w, Mapping) else w)
    bad = [str(x.dtype) for x in tensors if not x.dtype.is_floating_point]
    if bad:
        raise ValueError(f"energy_histogram: expected floating-point tensors; got {bad}; convert them")
    total = np.zeros((3, 2048))
    for x in tensors:
        if x.numel():
            x = ops.readable(x)
            total += np.stack([part.double().cpu().numpy() for part in ops.run("energy", x)([(x, None)], "abs")])
    if total[0, :_ZERO].any() or total[0, _ZERO + _BINS :].any():
        raise ValueError("energy_histogram: expected finite elements; got NaN or infinity; repair them first")
    return EnergyHistogram(*total[:, _ZERO : _ZERO + _BINS])


def densities(
    shapes_or_model: Source,
    density: float,
    method: str = "uniform",
    *,
    fixed: Mapping[str, float] | None = None,
    power: float = 1.0,
    importance: Mapping[str, float] | str | None = None,
    minimum: float = 0.0,
) -> dict[str, float]:
    """name -> density of each tensor so that together they keep `density` of their elements. Feed it to ``topk_mask(..., scope="tensor")``.

    Args:
        shapes_or_model: a model (its parameters of two and more dimensions), or name -> shape or tensor. "rate_distortion" reads the values.
        method: "uniform": the same everywhere. "erk": Erdős–Rényi-kernel of RigL (arXiv 1911.11134): density_l = eps * (sum of dims / product of
            dims) ** power, with layers that would exceed 1 dense and eps solved again over the rest; "er": the first two dimensions only (SET,
            arXiv 1707.04780). "rate_distortion": minimises the sum over layers of importance_l * (sum of squared dropped weights) with counts
            that add up to exactly floor(density * total): layers are filled along their marginal curves up to one level, read from `EnergyHistogram`
            (in the spirit of arXiv 2308.10438, whose measured output distortion enters as `importance`). Layers whose weights were dropped by their
            own top-k then lose no more than one bin's resolution against the exact optimum, which for importance None is ``topk_mask`` with
            scope "global".
        fixed: name -> density of layers set by hand (a dense first layer, say); they stay out of the budget, as in RigL's code.
        importance: rate_distortion only: name -> positive factor, or "relative": one over the layer's sum of squares. None: 1.
        minimum: rate_distortion only: no layer below this density.

    Returns:
        Densities whose floor(density * n) is the count meant.

    Raises:
        ValueError: densities outside [0, 1], unknown names or methods, shapes with rate_distortion, values that are not finite.
    """
    given = _sources(shapes_or_model)
    fixed = dict(fixed or {})
    if method not in METHODS:
        raise ValueError(f"densities: expected one of {', '.join(METHODS)}; got {method!r}")
    wrong = {name: d for name, d in {"density": density, "minimum": minimum, **fixed}.items() if not 0.0 <= d <= 1.0}
    if wrong or minimum > density:
        raise ValueError(f"densities: expected values in [0, 1], minimum <= density; got {wrong or (minimum, density)}")
    if not math.isfinite(power):
        raise ValueError(f"densities: expected a finite power; got {power}")
    unknown = sorted((set(fixed) | set(importance if isinstance(importance, Mapping) else ())) - set(given))
    if unknown:
        raise ValueError(f"densities: expected names among the given tensors; unknown: {unknown}")
    free = {name: x for name, x in given.items() if name not in fixed}
    shapes = {name: tuple(x.shape) if isinstance(x, Tensor) else tuple(x) for name, x in free.items()}
    if method == "uniform":
        found = dict.fromkeys(free, float(density))
    elif method == "rate_distortion":
        found = _rate_distortion(free, density, importance, minimum)
    else:
        found = _erk(shapes, density, power, 2 if method == "er" else None)
    return {name: float(fixed[name]) if name in fixed else found[name] for name in given}


def _sources(source: Source) -> dict[str, Any]:
    if isinstance(source, nn.Module):
        return {name: p.detach() for name, p in source.named_parameters() if p.dim() >= 2}
    return dict(source)


def _erk(shapes: dict[str, tuple[int, ...]], density: float, power: float, dims: int | None) -> dict[str, float]:
    raw = {name: (sum(s[:dims]) / math.prod(s[:dims])) ** power if math.prod(s) else 0.0 for name, s in shapes.items()}
    size = {name: math.prod(s) for name, s in shapes.items()}
    dense: set[str] = {name for name in shapes if density == 1.0}
    while True:
        rest = [name for name in shapes if name not in dense and size[name]]
        budget = density * sum(size.values()) - sum(size[name] for name in dense)
        weight = sum(raw[name] * size[name] for name in rest)
        eps = max(budget, 0.0) / weight if weight else 0.0
        over = {name for name in rest if eps * raw[name] > 1.0}
        if not over:
            return {name: 1.0 if name in dense else eps * raw[name] for name in shapes}
        dense |= over


def _rate_distortion(tensors: dict[str, Any], density: float, importance: Mapping[str, float] | str | None, minimum: float) -> dict[str, float]:
    shapes = [name for name, x in tensors.items() if not isinstance(x, Tensor)]
    if shapes:
        raise ValueError(f"densities: expected tensors with rate_distortion, which reads the values; got shapes for {shapes}")
    curves = [energy_histogram(x) for x in tensors.values()]
    sizes = np.array([c.numel for c in curves], dtype=np.int64)
    scale = np.sqrt(np.array(_importances(list(tensors), curves, importance)))
    target = count_of(int(sizes.sum()), density)
    least = np.array([min(count_of(int(n), minimum, "ceil"), n) for n in sizes], dtype=np.int64)
    if least.sum() > target:
        least = np.array([count_of(int(n), minimum) for n in sizes], dtype=np.int64)
    if len(curves) == 0:
        return {}

    # One level for all: a layer keeps what is above level / scale. Halving in the exponent reaches fp64 resolution in 70 steps.
    def at(level: float) -> Any:
        return np.clip([c.above(level / s) for c, s in zip(curves, scale, strict=True)], least, sizes)

    low, high = 1e-46 * float(scale.min()), 4e38 * float(scale.max())
    for _ in range(70):
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = (middle, high) if at(middle).sum() > target else (low, middle)
    counts = _whole(at(low), at(high), least, sizes, target)
    return {name: _density_of(int(k), int(n)) for name, k, n in zip(tensors, counts, sizes, strict=True)}


def _importances(names: list[str], curves: list[EnergyHistogram], importance: Mapping[str, float] | str | None) -> list[float]:
    if isinstance(importance, str):
        if importance != "relative":
            raise ValueError(f'densities: expected importance "relative", name -> factor, or None; got {importance!r}')
        return [1.0 / (float(c.squares.sum()) or 1.0) for c in curves]
    out = [1.0 if importance is None else float(importance.get(name, math.nan)) for name in names]
    bad = [name for name, s in zip(names, out, strict=True) if not (s > 0 and math.isfinite(s))]
    if bad:
        raise ValueError(f"densities: expected a positive importance for every layer; missing, or not positive and finite: {bad}")
    return out


def _whole(more: Any, fewer: Any, least: Any, sizes: Any, target: int) -> Any:
    """Whole counts that add up to the target: the larger of two nearly equal splits, rounded down, then filled by largest remainder (ties: first)."""
    spread = more.sum() - fewer.sum()
    exact = fewer + (more - fewer) * ((target - fewer.sum()) / spread if spread > 0 else 0.0)
    counts = np.clip(np.floor(exact + 1e-9).astype(np.int64), least, sizes)
    order = np.argsort(counts - exact, kind="stable")
    while (left := target - int(counts.sum())) != 0:
        step = 1 if left > 0 else -1
        room = [i for i in (order if left > 0 else order[::-1]) if (counts[i] < sizes[i] if left > 0 else counts[i] > least[i])]
        if not room:
            raise AssertionError("densities: the counts cannot reach their total")
        each = max(1, abs(left) // len(room))
        for i in room[: abs(left)]:
            counts[i] += step * min(each, sizes[i] - counts[i] if left > 0 else counts[i] - least[i])
    return counts


def _density_of(k: int, n: int) -> float:
    """A density that keeps exactly k of n under floor."""
    d = k / n if n else 0.0
    while count_of(n, d) < k:
        d = math.nextafter(d, 1.0)
    return d

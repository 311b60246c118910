"""Pruning by |weight| times the norm of its input column (Wanda, arXiv 2306.11695): streaming column statistics and the masks made from them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from decimal import Decimal
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..ops import sparse as ops
from .mask import Mask
from .select import nm_mask, topk_mask

TIES = ("highest_index", "lowest_index")


class ColumnStats:
    """Sums of squares of the columns of an activation matrix that arrives in batches.

    ``sum_squares``: fp64 [K]; ``rows``: how many rows (tokens) it covers. Each batch is summed in one read (fp64 partial sums on the CPU; one fp32
    rounding per batch) and added in fp64, so batches may come in any number and two `ColumnStats` add up with ``+``.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.sum_squares = torch.zeros(features, dtype=torch.float64, device=device)
        self.rows = 0

    @classmethod
    def of(cls, x: Tensor) -> ColumnStats:
        """The statistics of one batch, x: [..., K]."""
        if x.dim() == 0:
            raise ValueError("ColumnStats.of: expected activations [..., K]; got a scalar")
        return cls(x.shape[-1], x.device).update(x)

    @torch.no_grad()
    def update(self, x: Tensor) -> ColumnStats:
        """Adds a batch, x: [..., K] of any floating dtype and strides. Returns self. Leave padding tokens out: they would count.

        Raises:
            ValueError: another number of columns, or another dtype.
        """
        features = self.sum_squares.numel()
        if x.dim() == 0 or x.shape[-1] != features or not x.dtype.is_floating_point:
            raise ValueError(f"ColumnStats.update: expected floating-point activations [..., {features}]; got {x.dtype} of shape {tuple(x.shape)}")
        if x.numel():
            rows = x.detach().reshape(-1, features).contiguous()
            self.sum_squares += ops.run("colstat", rows)(rows).to(self.sum_squares)
        self.rows += math.prod(x.shape[:-1])
        return self

    def __add__(self, other: ColumnStats) -> ColumnStats:
        if other.sum_squares.shape != self.sum_squares.shape:
            raise ValueError(f"ColumnStats: expected {self.sum_squares.numel()} columns on both sides; got {other.sum_squares.numel()}")
        out = ColumnStats(self.sum_squares.numel(), self.sum_squares.device)
        out.sum_squares = self.sum_squares + other.sum_squares.to(self.sum_squares.device)
        out.rows = self.rows + other.rows
        return out

    def all_reduce_(self, group: Any = None) -> ColumnStats:
        """Sums over a torch process group whose members saw different data. Returns self."""
        count = torch.tensor([self.rows], dtype=torch.int64, device=self.sum_squares.device)
        torch.distributed.all_reduce(self.sum_squares, group=group)
        torch.distributed.all_reduce(count, group=group)
        self.rows = int(count)
        return self

    @property
    def norm(self) -> Tensor:
        """L2 norm of each column, fp32 [K]. The published code divides by the number of samples first: the same ranks within a layer."""
        return self.sum_squares.sqrt().float()

    @staticmethod
    @contextlib.contextmanager
    def collect(model: nn.Module, names: Collection[str] | None = None) -> Iterator[dict[str, ColumnStats]]:
        """While open, gathers the statistics of what enters the model's Linear layers (or the modules `names`): module name -> ColumnStats.

        Example::

            with ColumnStats.collect(model) as stats, torch.no_grad():
                for batch in calibration:
                    model(batch)
            prune_model_(model, 0.5, method="wanda", stats=stats)

        Raises:
            ValueError: unknown names.
        """
        found = dict(model.named_modules())
        missing = sorted(set(names or ()) - set(found))
        if missing:
            raise ValueError(f"ColumnStats.collect: expected names of modules; unknown: {missing}")
        stats: dict[str, ColumnStats] = {}

        def hook(name: str) -> Any:
            def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                if name in stats:
                    stats[name].update(x)
                else:
                    stats[name] = ColumnStats.of(x)

            return add

        if convolutions := [n for n in names or () if isinstance(found.get(n), _ConvNd)]:
            fix = "unfold their input and use ColumnStats.of"
            raise ValueError(f"ColumnStats.collect: expected modules whose input has its features last; {convolutions} are convolutions; {fix}")
        chosen = [n for n, module in found.items() if (isinstance(module, nn.Linear) if names is None else n in names)]
        handles = [found[n].register_forward_pre_hook(hook(n), with_kwargs=True) for n in chosen]
        try:
            yield stats
        finally:
            for handle in handles:
                handle.remove()

    def __repr__(self) -> str:
        return f"ColumnStats({self.sum_squares.numel()} columns, {self.rows} rows)"


def wanda_mask(
    w: Tensor,
    activations_or_stats: Tensor | ColumnStats,
    density: float | None = None,
    *,
    n: int | None = None,
    m: int | None = None,
    scope: str = "row",
    ties: str = "highest_index",
    nan: str = "highest",
) -> Mask:
    """The weights to keep by the score |w_ij| * ||X_j||_2, computed in fp32 (arXiv 2306.11695). True = kept.

    Of each row of K weights the int(K * s) of smallest score are dropped, s = 1 - density (taken in decimal, so that density 0.9 is s = 0.1, not
    0.0999…): the published count.

    Args:
        w: [N, K], fp32, bf16, fp16 (fp64 scores are rounded to fp32), any strides.
        activations_or_stats: `ColumnStats`; or activations [..., K] with at least two dimensions; or column norms, a vector [K].
        density: share to keep, in [0, 1]. Or ``n`` and ``m``: keep n of every m neighbours of a row. (The published script's "2:4" drops its first
            number of every second; here, as everywhere in this package, n are kept.)
        scope: "row": the paper's comparison group; "tensor": int(N * K * s) over the whole matrix, as some ports do.
        ties: the published code sorts stably and drops from the front, so that of equal scores the lowest column goes: "highest_index" keeps the
            later ones likewise. "lowest_index" is the rule of `topk_mask`. With n and m always "lowest_index" (the published choice is unspecified).
        nan: scores of NaN rank "highest" (as the published sort), "lowest", or "raise".

    Raises:
        ValueError: shapes that do not fit, statistics that are not finite or cover no rows, a density outside [0, 1], m that does not divide K.
    """
    norm = _norm(w, activations_or_stats)
    if ties not in TIES or scope not in ("row", "tensor"):
        raise ValueError(f"wanda_mask: expected ties of {', '.join(TIES)} and scope row or tensor; got {ties!r} and {scope!r}")
    if (n is None) != (m is None) or (density is None) == (n is None):
        raise ValueError(f"wanda_mask: expected a density, or n and m; got density={density}, n={n}, m={m}")
    if n is not None and m is not None:
        return nm_mask(w, n, m, score="abs_scaled", other=norm, nan=nan)
    assert density is not None
    length = w.shape[1] if scope == "row" else w.numel()
    k = length - dropped_count(length, density)

    def select(x: Tensor, columns: Tensor, rule: str) -> Mask:
        mask: Mask = topk_mask(x, k=k, score="abs_scaled", other=columns, scope=scope, ties=rule, nan=nan)
        return mask

    if ties == "lowest_index":
        return select(w, norm, ties)
    # Ties at the cut are rare: one pass that keeps all of them says whether there are any; only then is the matrix copied in reverse.
    loose = select(w, norm, "inclusive")
    if k == 0 or loose.nnz == k * (w.numel() // length if length else 0):
        return loose
    kept = select(ops.readable(w).flip(0, 1), norm.flip(0), "lowest_index")
    return Mask.from_bool(kept.to_bool().flip(0, 1))


def dropped_count(n: int, density: float) -> int:
    """int(n * s) with s = 1 - density in decimal arithmetic: how many of n the published pruning codes drop.

    Raises:
        ValueError: a density outside [0, 1].
    """
    if not isinstance(density, Real) or not 0.0 <= density <= 1.0:
        raise ValueError(f"dropped_count: expected a density in [0, 1]; got {density!r}")
    return int(n * float(1 - Decimal(repr(float(density)))))


def _norm(w: Tensor, given: Tensor | ColumnStats) -> Tensor:
    if w.dim() != 2:
        raise ValueError(f"wanda_mask: expected a weight [N, K]; got shape {tuple(w.shape)}; flatten a convolution's input dimensions first")
    if not isinstance(given, Tensor | ColumnStats):
        raise TypeError(f"wanda_mask: expected activations or ColumnStats; got {type(given).__name__}; run calibration data through the layer")
    if isinstance(given, ColumnStats) or given.dim() > 1:
        given = given if isinstance(given, ColumnStats) else ColumnStats.of(given)
        if given.rows == 0:
            raise ValueError("wanda_mask: expected statistics of at least one row; these are empty; run calibration data through the layer")
        norm = given.norm
    else:
        norm = given.detach().float()
    if norm.numel() != w.shape[1]:
        raise ValueError(f"wanda_mask: expected statistics of {w.shape[1]} columns; got {norm.numel()}; they belong to another layer")
    good = norm.isfinite() & (norm >= 0)
    if not bool(good.all()):
        at = int((~good).nonzero()[0])
        raise ValueError(
            f"wanda_mask: expected finite column norms from 0 on; got {float(norm[at])} for column {at}; look for overflow in the calibration"
        )
    return norm.to(w.device)

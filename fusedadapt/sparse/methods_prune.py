"""Pruning of a whole model, at once or along a schedule."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layers import MaskedLinear
from .mask import Mask
from .select import nm_mask, topk_mask
from .wanda import ColumnStats, wanda_mask

_LINEAR = (nn.Linear,)
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_INPUTS_FIRST = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class PruneReport:
    """``masks``: parameter name -> `Mask` (True = kept). Printing it lists each tensor's density."""

    masks: dict[str, Mask]

    @property
    def densities(self) -> dict[str, float]:
        """Parameter name -> share kept."""
        return {name: mask.density for name, mask in self.masks.items()}

    @property
    def density(self) -> float:
        """Share kept of all these tensors together."""
        total = sum(mask.numel() for mask in self.masks.values())
        return sum(mask.nnz for mask in self.masks.values()) / total if total else 0.0

    def __str__(self) -> str:
        width = max((len(name) for name in self.masks), default=0)
        lines = [f"{name:{width}}  {mask.density:8.4%}  {mask.nnz} of {mask.numel()}" for name, mask in self.masks.items()]
        return "\n".join([*lines, f"{'all':{width}}  {self.density:8.4%}"])


@torch.no_grad()
def prune_model_(
    model: nn.Module,
    density: float | Mapping[str, float] | None = None,
    *,
    method: str = "magnitude",
    stats: Mapping[str, ColumnStats] | None = None,
    scope: str | None = None,
    n: int | None = None,
    m: int | None = None,
    skip: Collection[str] = (),
) -> PruneReport:
    """Sets the least important weights of a model's layers to +0, in place; all masks are made before the first weight changes.

    Args:
        density: share to keep, or parameter name -> share (from `densities`), or none with ``n`` and ``m``: n of every m neighbours of a row.
        method: "magnitude": |w|, of Linear and convolution layers and transformers' Conv1D; "wanda": |w| * ||x||, of Linear layers, with
            ``stats`` from `ColumnStats.collect` (arXiv 2306.11695).
        scope: magnitude: "global" (the default: one cut through all layers), "tensor" or "row"; wanda: "row" (default) or "tensor".
        skip: names of modules to leave alone, and all inside them, such as "lm_head".

    A weight that several modules share (tied) is one weight, under the name that ``named_parameters()`` has for it: magnitude prunes it once, and
    so in all of them, unless one of them is in skip. Wanda refuses it: one layer's statistics say nothing about the others' use.

    The published Wanda goes block by block, each one calibrated on the outputs of the pruned blocks before it::

        for block in model.blocks:
            with ColumnStats.collect(block) as stats:
                calibrate(model)
            prune_model_(block, 0.5, method="wanda", stats=stats)

    Raises:
        ValueError: unknown names in skip, no layer to prune, layers without statistics, rows or groups asked of layers that keep inputs first
            (Conv1D, transposed convolutions), a weight that two modules share (wanda), weights that follow other parameters (`MaskedLinear`,
            parametrizations), what the selection refuses; nothing was changed.
    """
    if method not in ("magnitude", "wanda"):
        raise ValueError(f"prune_model_: expected method magnitude or wanda; got {method!r}")
    layers = _layers(model, method, skip, rows=scope == "row" or n is not None)
    if method == "wanda":
        refuse_tied("prune_model_", model, layers, "skip those modules")
    names = tied_names(model)
    weights = {names[id(layer.weight)][0]: layer.weight for layer in layers.values()}
    if method == "wanda":
        masks = _wanda(layers, weights, density, stats, scope or "row", n, m)
    else:
        masks = _magnitude(weights, density, scope or "global", n, m)
    for name, mask in masks.items():
        keep_only_(weights[name], mask)
    return PruneReport(masks)


def keep_only_(w: Tensor, mask: Mask | Tensor) -> None:
    """w = +0 outside the mask, in place; the kept elements keep their bits (a product would make -0.0 and NaN)."""
    keep = mask.to_bool() if isinstance(mask, Mask) else mask
    w.detach().masked_fill_(~keep.to(w.device), 0)


def _below(p: Tensor, kept: Mask) -> Tensor:
    """|p|, and -1 outside the mask."""
    return torch.where(kept.to_bool().to(p.device), p.detach().abs(), -1.0)


def tied_names(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> its names, one for each module that holds it; the first is the one of ``named_parameters()``."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for last, p in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(id(p), []).append(f"{name}.{last}" if name else last)
    return names


def refuse_tied(op: str, model: nn.Module, layers: Mapping[str, Any], fix: str) -> None:
    """ValueError if a layer's weight is another module's too, with all names of each such weight."""
    names = tied_names(model)
    if tied := [also for layer in layers.values() if len(also := names.get(id(layer.weight), [])) > 1]:
        raise ValueError(f"{op}: expected a weight of its own for each layer; these share one: {tied}; {fix}, or untie them")


def distinct(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """name -> tensor; one that stands under several names (tied) under its first alone."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, t in named:
        found.setdefault(id(t), (name, t))
    return dict(found.values())


def _layers(model: nn.Module, method: str, skip: Collection[str], rows: bool) -> dict[str, Any]:
    every: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    unknown = sorted(set(skip) - set(every))
    if unknown:
        raise ValueError(f"prune_model_: expected names of modules in skip; unknown: {unknown}")
    done = {id(p) for name in skip for p in every[name].parameters()}
    within = tuple(f"{name}." for name in skip)
    found: dict[str, Any] = {}
    for name, layer in every.items():
        if name in skip or name.startswith(within) or not _prunable(layer, method) or id(layer.weight) in done:
            continue
        if rows and _inputs_first(layer):
            got = f"{type(layer).__name__} {name!r}, whose weight has one input a row"
            raise ValueError(f'prune_model_: expected layers of one output a row for scope "row", n and m; got {got}; skip it, or take another scope')
        if isinstance(layer, MaskedLinear) or not isinstance(layer.weight, nn.Parameter):
            got = f"{type(layer).__name__} {name!r}, whose weight follows other parameters"
            raise ValueError(f"prune_model_: expected layers with weights of their own; got {got}; make it a plain layer, or skip it")
        done.add(id(layer.weight))
        found[name] = layer
    if not found and not skip:
        kinds = "Linear, convolution or Conv1D" if method == "magnitude" else "Linear"
        raise ValueError(f"prune_model_: expected at least one {kinds} layer; got {type(model).__name__} without; pass a model that has one")
    return found


def _inputs_first(layer: nn.Module) -> bool:
    conv1d = type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"  # of GPT-2: K x N
    return conv1d or isinstance(layer, _INPUTS_FIRST)


def _prunable(layer: nn.Module, method: str) -> bool:
    return isinstance(layer, _LINEAR) if method == "wanda" else isinstance(layer, _WEIGHTED) or _inputs_first(layer)


def _magnitude(weights: dict[str, Tensor], density: Any, scope: str, n: int | None, m: int | None) -> dict[str, Mask]:
    if n is not None or m is not None:
        if density is not None or n is None or m is None:
            raise ValueError(f"prune_model_: expected a density, or n and m; got density={density}, n={n}, m={m}")
        return {name: nm_mask(w.flatten(1), n, m).reshape(*w.shape) for name, w in weights.items()}
    if scope not in ("global", "tensor", "row"):
        raise ValueError(f"prune_model_: expected scope global, tensor or row; got {scope!r}")
    if isinstance(density, Mapping):
        missing = sorted(set(weights) - set(density))
        if missing or scope == "row":
            raise ValueError(f'prune_model_: expected a density for each weight, scope "tensor"; missing: {missing}, scope {scope!r}')
        scope = "tensor"
    flat = {name: w.flatten(1) for name, w in weights.items()}  # a row is one output
    masks: dict[str, Mask] = topk_mask(flat, density=density, scope=scope)
    return {name: mask.reshape(*weights[name].shape) for name, mask in masks.items()}


def _wanda(layers: dict[str, Any], weights: dict[str, Tensor], density: Any, stats: Any, scope: str, n: Any, m: Any) -> dict[str, Mask]:
    missing = sorted(set(layers) - set(stats or ()))
    if missing:
        raise ValueError(f"prune_model_: expected statistics (ColumnStats.collect) for every Linear layer; missing: {missing}; or skip them")
    by_name = density if isinstance(density, Mapping) else dict.fromkeys(weights, density)
    absent = sorted(set(weights) - set(by_name))
    if absent:
        raise ValueError(f"prune_model_: expected a density for each weight; missing: {absent}")
    return {
        weight: wanda_mask(w, stats[layer], by_name[weight], n=n, m=m, scope=scope)
        for layer, (weight, w) in zip(layers, weights.items(), strict=True)
    }


def cubic_sparsity(step: int, *, start: int, end: int, initial: float = 0.0, final: float) -> float:
    """Share pruned at a step: final + (initial - final) * (1 - (step - start) / (end - start))^3, `initial` before start, `final` from end on
    (arXiv 1710.01878).

    Raises:
        ValueError: end not after start, shares outside [0, 1].
    """
    if end <= start or not (0.0 <= initial <= 1.0 and 0.0 <= final <= 1.0):
        raise ValueError(f"cubic_sparsity: expected start < end, shares in [0, 1]; got {start}, {end}, {initial}, {final}")
    if step < start:
        return initial
    left = 1.0 - min(1.0, (step - start) / (end - start))
    return final + (initial - final) * left**3


class GradualMagnitudePruning:
    """Prunes the smallest weights more and more along a cubic schedule (arXiv 1710.01878). What was pruned stays pruned.

    Call ``step()`` after each optimizer step: between updates it sets pruned weights back to zero (one pass). When the schedule has ended, an
    optimizer with ``masks=pruner.masks`` saves that pass and their state's update.

    Args:
        params: name -> parameter. start, end, initial, final: as `cubic_sparsity`. every: steps between updates. scope: "tensor" (the paper's) or
            "global".
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        *,
        start: int = 0,
        end: int,
        final: float,
        initial: float = 0.0,
        every: int = 100,
        scope: str = "tensor",
    ) -> None:
        cubic_sparsity(0, start=start, end=end, initial=initial, final=final)
        if every < 1 or scope not in ("tensor", "global"):
            raise ValueError(f"GradualMagnitudePruning: expected every >= 1, scope tensor or global; got {every} and {scope!r}")
        self.params = distinct(params.items())
        self.start, self.end, self.initial, self.final, self.every, self.scope = start, end, initial, final, every, scope
        self.steps = 0
        self._masks: dict[str, Mask] = {}

    @property
    def masks(self) -> dict[Tensor, Mask]:
        """parameter -> Mask, as optimizers take them."""
        return {self.params[name]: mask for name, mask in self._masks.items()}

    @torch.no_grad()
    def step(self) -> bool:
        """Counts a step and prunes. True when the masks changed by schedule: every `every` steps from start on, and at end."""
        self.steps += 1
        due = self.start <= self.steps <= self.end and ((self.steps - self.start) % self.every == 0 or self.steps == self.end)
        for name, mask in self._masks.items():
            keep_only_(self.params[name], mask)
        if due:
            share = 1.0 - cubic_sparsity(self.steps, start=self.start, end=self.end, initial=self.initial, final=self.final)
            # Pruned elements rank below all others, zeros that are trained included: of equals the lower position would win, and be gone already.
            ranks = {name: p.detach().abs() if (old := self._masks.get(name)) is None else _below(p, old) for name, p in self.params.items()}
            new = topk_mask(ranks, density=share, scope=self.scope, score="given", rounding="round")
            self._masks = {name: mask & self._masks[name] if name in self._masks else mask for name, mask in new.items()}
            for name, mask in self._masks.items():
                keep_only_(self.params[name], mask)
        return due

"""Sparse fine-tuning with a chosen mask: SaRA and LT-SFT. Both are a mask, an optimizer with ``masks=`` and, for LT-SFT, a `SparseDelta`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .delta import Entry, SparseDelta
from .mask import Mask
from .methods_prune import distinct
from .select import topk_mask

Params = nn.Module | Mapping[str, Tensor]


def _trainable(params: Params) -> dict[str, Tensor]:
    named = params.named_parameters() if isinstance(params, nn.Module) else params.items()
    return {name: p for name, p in distinct(named).items() if p.requires_grad and p.dtype.is_floating_point}


class SaRA:
    """Trains only the weights that hardly matter: those with |w| below a threshold (SaRA, arXiv 2409.06633). Progressively: after some steps the
    ones that have grown beyond it are kept as they are, and those still below go on.

    Example::

        sara = SaRA(model, lambda masks: fa.optim.AdamW(list(masks), lr=sara_lr(2e-3), masks=masks), threshold=2e-3, progressive_step=2500)
        loss.backward(); sara.step(); sara.zero_grad()

    ``masks``: parameter -> `Mask`; ``optimizer``: what `make_optimizer` made (made anew at the progressive step, as published: schedulers belong in
    there); ``steps``: steps taken.

    The published code differs in what look like slips, which are not repeated: its first forward pass sees |w| instead of w at the trained places,
    and it loses the step at which it selects again. It applies one threshold to biases and norms too; so does this, unless `params` leaves them out.

    Args:
        params: a model or name -> parameter; those that require a gradient. make_optimizer: {parameter: Mask} -> optimizer.
        threshold: |w| < threshold is trained (compared in fp32 or wider; NaN is not). progressive_step: select again after this many steps, or None.

    Raises:
        ValueError: a threshold that is not positive, or below every weight.
    """

    def __init__(
        self,
        params: Params,
        make_optimizer: Callable[[dict[Tensor, Mask]], Optimizer],
        *,
        threshold: float = 2e-3,
        progressive_step: int | None = None,
    ) -> None:
        if not threshold > 0 or (progressive_step is not None and progressive_step < 1):
            raise ValueError(f"SaRA: expected threshold > 0, progressive_step >= 1 or None; got {threshold} and {progressive_step}")
        self.threshold, self.progressive_step = threshold, progressive_step
        self._make = make_optimizer
        self.steps = 0
        self._every = list(_trainable(params).values())
        self._select(dict.fromkeys(self._every))

    @torch.no_grad()
    def _select(self, within: Mapping[Tensor, Mask | None]) -> None:
        masks = {}
        for p, old in within.items():
            wide = p.detach() if p.dtype == torch.float64 else p.detach().float()
            mask = Mask.from_bool(wide.abs() < self.threshold)
            masks[p] = mask if old is None else mask & old
        masks = {p: mask for p, mask in masks.items() if mask.nnz}
        if not masks:
            raise ValueError(f"SaRA: expected weights below the threshold; none is smaller than {self.threshold}; raise it")
        self.masks: dict[Tensor, Mask] = masks
        self.optimizer = self._make(dict(masks))

    @property
    def nnz(self) -> int:
        """How many weights are trained."""
        return sum(mask.nnz for mask in self.masks.values())

    def step(self) -> None:
        """One step; after step number `progressive_step` the masks are chosen again among their own elements."""
        self.optimizer.step()
        self.steps += 1
        if self.steps == self.progressive_step:
            self.reselect()

    def reselect(self) -> None:
        """Keeps on training what is trained now and still below the threshold."""
        self._select(self.masks)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self._every:
            p.grad = None if set_to_none or p.grad is None else p.grad.zero_()

    def low_rank_penalty(self, generator: torch.Generator | None = None, smallest: int = 64) -> Tensor:
        """Nuclear norm of w * mask for one random matrix with both sides above `smallest`: the paper's regulariser, to be scaled (5e-4) and added to
        the loss. 0 if no matrix is that large. A full SVD: dear for large layers."""
        found = [p for p in self.masks if p.dim() == 2 and min(p.shape) > smallest]
        if not found:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        p = found[int(torch.randint(len(found), (1,), generator=generator, device="cpu"))]
        return torch.linalg.matrix_norm(p * self.masks[p].to_bool(), "nuc")


def sara_lr(threshold: float) -> float:
    """The published default learning rate: 1e-3 * exp(-350 * threshold)."""
    return 1e-3 * math.exp(-350.0 * threshold)


class LTSFT:
    """Lottery-ticket sparse fine-tuning (LT-SFT, arXiv 2110.07560): tune everything, keep only where it moved furthest, start again and tune those.

    Example::

        sft = LTSFT(model, density=0.01)
        train(model, fa.optim.AdamW(model.parameters()))                               # phase 1: everything
        masks = sft.select_()                                                          # the largest changes; the model is rewound, bit for bit
        train(model, fa.optim.AdamW(list(masks), masks=masks))                         # phase 2: frozen weights keep their bits
        delta = sft.delta()                                                            # a SparseDelta against the start
        sft.restore_()                                                                 # the original model; delta.apply_(model) tunes it again

    Several deltas compose by applying one after the other (or `compose`); `SparseDelta.revert_` brings the original bits back, where the published
    code subtracts and is left with rounding errors. It also unfreezes every tie of the cut and fails for an empty selection; here exactly k are
    chosen, of equals those that come first, and k = 0 selects nothing.

    Args:
        params: a model or name -> parameter; those that require a gradient. Their start values are kept (a copy of the model).
        density or k: how many to tune of all of them together. iterations: how many rounds of both phases share that number evenly.

    Raises:
        ValueError: both or neither of density and k, or out of range.
    """

    def __init__(self, params: Params, *, density: float | None = None, k: int | None = None, iterations: int = 1) -> None:
        self.params = _trainable(params)
        n = sum(p.numel() for p in self.params.values())
        if (density is None) == (k is None) or iterations < 1 or not isinstance(k, Integral | None):
            raise ValueError(f"LTSFT: expected density or an integer k, iterations >= 1; got density={density}, k={k}, iterations={iterations}")
        if not (0.0 <= density <= 1.0 if density is not None else 0 <= (k or 0) <= n):
            raise ValueError(f"LTSFT: expected a density in [0, 1], k in 0..{n}; got density={density}, k={k}")
        total = int(density * n) if density is not None else int(k or 0)
        self._shares = [total // iterations + (i < total % iterations) for i in range(iterations)]
        self.start = {name: p.detach().clone() for name, p in self.params.items()}
        self._round_start = self.start
        self.chosen: dict[str, Mask] = {}

    @torch.no_grad()
    def select_(self) -> dict[Tensor, Mask]:
        """Ends phase 1: adds the k / iterations largest |w - start| over all tensors that are not chosen yet, and rewinds to where the phase began.

        Returns parameter -> Mask of all chosen so far (tensors with none are left out). NaN counts as the largest change.

        Raises:
            RuntimeError: every round was used.
        """
        if not self._shares:
            raise RuntimeError("LTSFT.select_: expected at most as many selections as iterations; this is one more; raise iterations")
        k = self._shares.pop(0)
        if not self.chosen:
            self.chosen = topk_mask(self.params, k=k, score="abs_diff", other=self.start)
        else:
            scores = {name: _moved(p, self.start[name]).masked_fill_(self.chosen[name].to_bool(), -1.0) for name, p in self.params.items()}
            self.chosen = {name: mask | self.chosen[name] for name, mask in topk_mask(scores, k=k, score="given").items()}
        self.rewind_()
        return {p: self.chosen[name] for name, p in self.params.items() if self.chosen[name].nnz}

    @torch.no_grad()
    def rewind_(self) -> None:
        """Puts back the weights of this round's beginning."""
        for name, p in self.params.items():
            p.copy_(self._round_start[name])

    def next_round(self) -> None:
        """Begins another phase 1 at the present weights (with iterations above 1)."""
        self._round_start = {name: p.detach().clone() for name, p in self.params.items()}

    @torch.no_grad()
    def restore_(self) -> None:
        """Puts back the original weights."""
        for name, p in self.params.items():
            p.copy_(self.start[name])

    def delta(self, kind: str = "add") -> SparseDelta:
        """What phase 2 changed, at the chosen elements: differences (kind "add", which compose) or the new weights themselves ("set")."""
        tuned = {name: p.detach() for name, p in self.params.items()}
        return SparseDelta.from_diff(self.start, tuned, masks=self.chosen, kind=kind)

    def l1_penalty(self) -> Tensor:
        """Mean |w - start| over all parameters: the published regulariser of phase 1, to be scaled and added to the loss."""
        n = sum(p.numel() for p in self.params.values())
        total = torch.stack([(p - self.start[name]).abs().sum() for name, p in self.params.items()]).sum()
        return total / max(1, n)


def _moved(p: Tensor, start: Tensor) -> Tensor:
    wide = torch.promote_types(p.dtype, torch.float32)
    return (p.detach().to(wide) - start.to(wide)).abs()


def compose(deltas: Iterable[SparseDelta]) -> SparseDelta:
    """The sum of deltas of kind "add" as one: positions united, values added in fp32 (fp64) in the given order and rounded once,
    to the dtype that torch adds theirs in.

    Raises:
        ValueError: no delta, kind "set", or tensors whose shapes differ.
    """
    every = list(deltas)
    if not every or any(d.kind != "add" for d in every):
        raise ValueError('compose: expected at least one delta, all of kind "add"; "set" values do not add up; use from_diff(kind="add")')
    entries: dict[str, Entry] = {}
    for name in dict.fromkeys(name for d in every for name in d.entries):
        parts = [d.entries[name] for d in every if name in d.entries]
        if len({tuple(e.shape) for e in parts}) > 1:
            raise ValueError(f"compose: expected one shape for {name!r}; got {[tuple(e.shape) for e in parts]}; the deltas are of different models")
        index = torch.unique(torch.cat([e.indices.long() for e in parts]))
        dtype = functools.reduce(torch.promote_types, (e.values.dtype for e in parts))
        values = torch.zeros(index.numel(), dtype=torch.promote_types(dtype, torch.float32), device=index.device)
        for e in parts:
            values[torch.searchsorted(index, e.indices.long())] += e.values.to(values)
        entries[name] = Entry(index.to(parts[0].indices.dtype), values.to(dtype), parts[0].shape)
    return SparseDelta(entries)

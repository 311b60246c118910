"""AdaLoRA (arXiv 2303.10512): which ranks of which layers may stay, decided from smoothed sensitivities under a shrinking budget."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..reference.lowrank import wide
from .layer import LoRALinear

_PARTS = ("lora_A", "lora_E", "lora_B")


def adalora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every `LoRALinear` of method "adalora", by name. Raises ValueError if there is none."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear) and m.method == "adalora"}
    if not found:
        raise ValueError("adalora: expected a model with LoRALinear(method='adalora') layers; got none; adapt it first")
    return found


def orthogonal_penalty(model: nn.Module) -> Tensor:
    """Mean over all A and B of ‖A A^T - I‖_F, ‖B^T B - I‖_F: times a weight (0.5 in PEFT, 0.1 in the official code), added to the loss.

    A 0-d tensor in fp32 (fp64). Its gradient is 0, not nan, where a matrix is exactly orthonormal. r x r products only.
    """
    terms = []
    for layer in adalora_layers(model).values():
        for rows in (layer.lora_A, layer.lora_B.t()):
            rows = rows.to(wide(rows.dtype))
            gram = rows @ rows.t()
            square = (gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)).square().sum()
            safe = torch.where(square > 0, square, torch.ones_like(square))
            terms.append(torch.where(square > 0, safe.sqrt(), torch.zeros_like(square)))
    device = terms[0].device
    return torch.stack([term.to(device) for term in terms]).mean()


class RankAllocator:
    """Smooths sensitivities and zeroes the least important lora_E under a cubic budget, as the official code and PEFT do.

    Call `step` once per optimizer step, after backward and before the gradients are cleared; not on steps that a gradient scaler skips.

    Args:
        total_step: optimizer steps of the whole run. tinit: steps before pruning starts. tfinal: steps at the end without change of the budget.
        target_r: mean rank per layer at the end. delta_t: steps between prunings. beta1, beta2: smoothing of sensitivity and of its uncertainty.

    A pruned rank has its lora_E set to 0 and may grow again between prunings: it is not a structural mask.

    Raises:
        ValueError: no AdaLoRA layers, betas outside (0, 1), a schedule that does not fit in total_step, a target below 0 or above what there is.
    """

    def __init__(
        self,
        model: nn.Module,
        total_step: int,
        *,
        target_r: int = 8,
        tinit: int = 0,
        tfinal: int = 0,
        delta_t: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        self.layers = adalora_layers(model)
        given: Any = target_r
        if isinstance(given, bool) or not isinstance(given, Integral) or target_r < 0:
            raise ValueError(f"RankAllocator: expected target_r: an integer of at least 0; got {target_r!r}; choose the mean rank to end with")
        self.total_step, self.tinit, self.tfinal, self.delta_t = total_step, tinit, tfinal, delta_t
        self.beta1, self.beta2 = beta1, beta2
        self.initial_budget = sum(layer.r for layer in self.layers.values())
        self.target_budget = int(target_r) * len(self.layers)
        if not (0 < beta1 < 1 and 0 < beta2 < 1):
            raise ValueError(f"RankAllocator: expected betas inside (0, 1); got {beta1} and {beta2}; 0.85 is usual")
        if not 0 <= tinit or not 0 <= tfinal or tinit + tfinal >= total_step or delta_t < 1:
            raise ValueError(f"RankAllocator: expected tinit + tfinal < total_step; got {tinit} + {tfinal}, {total_step}; shorten the phases")
        if self.target_budget > self.initial_budget:
            raise ValueError(f"RankAllocator: expected target_r x layers <= {self.initial_budget}; got {self.target_budget}; lower target_r")
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}

    def budget(self, step: int) -> tuple[int, bool]:
        """(total rank allowed at this step, whether the ranks are pruned to it now)."""
        if step <= self.tinit:
            return self.initial_budget, False
        if step > self.total_step - self.tfinal:
            return self.target_budget, True
        left = 1 - (step - self.tinit) / (self.total_step - self.tfinal - self.tinit)
        return int((self.initial_budget - self.target_budget) * left**3 + self.target_budget), step % self.delta_t == 0

    @torch.no_grad()
    def step(self, step: int, *, force: bool = False) -> tuple[int, dict[str, Tensor] | None]:
        """Updates the scores with the current gradients and prunes if it is time (or ``force``).

        Returns:
            (budget, layer name -> bool [r], True for the ranks that stay; None if nothing was pruned).

        Raises:
            RuntimeError: no parameter of any AdaLoRA layer has a gradient.
        """
        if step < self.total_step - self.tfinal:
            self._update()
        allowed, now = self.budget(step)
        return allowed, self._prune(allowed) if now or force else None

    def _update(self) -> None:
        parts = [(f"{name}.{part}", getattr(layer, part)) for name, layer in self.layers.items() for part in _PARTS]
        if all(p.grad is None for _, p in parts):
            raise RuntimeError("RankAllocator: expected gradients; got none; call step() after backward() and before zero_grad()")
        for key, p in parts:
            # a layer that took no part in this step was not sensitive in it
            now = torch.zeros_like(p, dtype=wide(p.dtype)) if p.grad is None else (p.to(wide(p.dtype)) * p.grad).abs()
            mean = self._sensitivity.setdefault(key, torch.zeros_like(now))
            spread = self._uncertainty.setdefault(key, torch.zeros_like(now))
            mean.mul_(self.beta1).add_(now, alpha=1 - self.beta1)
            spread.mul_(self.beta2).add_((now - mean).abs_(), alpha=1 - self.beta2)

    def scores(self) -> dict[str, Tensor]:
        """Layer name -> importance [r] of each rank: its lora_E's score plus the means of those of its row of A and column of B."""
        if not self._sensitivity:
            raise RuntimeError("RankAllocator: expected a step with gradients before the first pruning; got none; call step() from the start")
        found = {}
        for name in self.layers:
            a, e, b = (self._sensitivity[f"{name}.{part}"] * self._uncertainty[f"{name}.{part}"] for part in _PARTS)
            found[name] = e.view(-1) + (a.mean(1) + b.mean(0))
        return found

    def _prune(self, allowed: int) -> dict[str, Tensor]:
        drop = self.initial_budget - allowed
        if drop == 0:
            return {name: torch.ones(layer.r, dtype=torch.bool, device="cpu") for name, layer in self.layers.items()}
        scores = self.scores()
        # everything at or below the threshold goes: ties with it can push the total below the budget. A score that is no number stays, as in PEFT.
        threshold = torch.cat([score.cpu() for score in scores.values()]).kthvalue(drop).values
        keep = {name: ~(score.cpu() <= threshold) for name, score in scores.items()}
        self.apply(keep)
        return keep

    @torch.no_grad()
    def apply(self, keep: dict[str, Tensor]) -> None:
        """Zeroes lora_E where ``keep`` (layer name -> bool [r]) is False: the pattern of an earlier pruning, after it has grown again."""
        for name, kept in keep.items():
            e = self.layers[name].lora_E
            e.masked_fill_(~kept.to(e.device).view(-1, 1), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """The smoothed scores: tensors by parameter name."""
        return {"sensitivity": dict(self._sensitivity), "uncertainty": dict(self._uncertainty)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over `state_dict`'s, copied to where the parameters are. Raises ValueError, with nothing changed, if it is of other layers."""
        shapes = {f"{name}.{part}": getattr(layer, part) for name, layer in self.layers.items() for part in _PARTS}
        for kind in ("sensitivity", "uncertainty"):
            got = {key: tuple(value.shape) for key, value in state[kind].items()}
            if got and got != {key: tuple(p.shape) for key, p in shapes.items()}:
                raise ValueError("RankAllocator: expected the state of the same layers and ranks; got another's; load it into the same model")
        self._sensitivity, self._uncertainty = (
            {key: value.to(shapes[key].device, copy=True) for key, value in state[kind].items()} for kind in ("sensitivity", "uncertainty")
        )

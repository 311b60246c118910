"""Schedule-Free AdamW: averaging instead of a learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..reference.optim import join_split, split
from . import compact
from .base import FusedOptimizer, Params
from .options import Extras
from .state import complete, not_negative, number, unpack_mask
from .table import local

_SCALARS = ("weight_sum", "lr_max")


class ScheduleFreeAdamW(FusedOptimizer):
    """Schedule-Free AdamW (arXiv 2405.15682), equal to schedulefree 1.4.1's AdamWScheduleFree.

    Call ``train()`` before training and ``eval()`` before evaluating or saving the model: the parameter holds y while training (where gradients are
    taken) and the average x while evaluating. States: ``z``, ``exp_avg_sq``; scalars ``weight_sum``, ``lr_max``. The decay acts at y.
    The official code counts steps and keeps the scalars per group: checkpoints carry both forms.
    """

    examples = ({}, {"warmup_steps": 10, "r": 0.5, "betas": (0.95, 0.98)}, {"weight_lr_power": 1.0})
    official_group = frozenset(("k", "weight_sum", "lr_max", "scheduled_lr"))
    decay = "alpha"  # the rule applies it itself, at y
    _step_rule = "schedule_free_adamw"

    def __init__(
        self, params: Params, lr: float | Tensor = 0.0025, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0,
        warmup_steps: int = 0, r: float = 0.0, weight_lr_power: float = 2.0, **extras: Unpack[Extras],
    ):  # fmt: skip
        options = dict(warmup_steps=warmup_steps, r=r, weight_lr_power=weight_lr_power, weight_decay=weight_decay, train_mode=False)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, **options), extras)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        fields = super()._hyper(group)
        if not number(fields["beta1"]):
            raise ValueError(
                f"ScheduleFreeAdamW: expected betas[0] in (0, 1); got {fields['beta1']!r}; at 0 the parameters hold z, and the average is lost"
            )
        not_negative("ScheduleFreeAdamW", "weight_decay", group["weight_decay"])
        return fields | {
            "warmup": not_negative("ScheduleFreeAdamW", "warmup_steps", group["warmup_steps"]),
            "r": group["r"],
            "weight_lr_power": group["weight_lr_power"],
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's. A group that joins a run is in the mode of the others: left behind, it would be averaged by neither `eval` nor `train`."""
        super().add_param_group(param_group)
        self.param_groups[-1]["train_mode"] = self.param_groups[0]["train_mode"]

    def _initial(self, name: str, p: Tensor, group: dict[str, Any]) -> Tensor | float:
        return p if name == "z" else 0.0

    def _saved(self) -> dict[str, Any]:
        """Loads into schedulefree, too, where all parameters of a group have made the same steps."""
        saved = super()._saved()
        for group in saved["param_groups"]:
            states = [saved["state"][i] for i in group["params"] if i in saved["state"]]
            scalars = {tuple(float(s[name]) for name in ("step", *_SCALARS)) for s in states if s["step"].dim() == 0} or {(0.0, 0.0, -1.0)}
            if len(scalars) == 1:
                steps, weight_sum, lr_max = scalars.pop()
                group |= {"k": int(steps), "weight_sum": weight_sum, "lr_max": lr_max, "scheduled_lr": 0.0}
        return saved

    def _own_form(self, state: dict[Any, Any], groups: list[dict[str, Any]]) -> dict[Any, Any]:
        """Of schedulefree's state, each parameter takes over its group's step count and scalars."""
        state = dict(state)
        for group in groups:
            for i in group["params"]:
                if "k" in group and state.get(i) and "step" not in state[i]:
                    state[i] = state[i] | {"step": group["k"]} | {name: group[name] for name in _SCALARS}
        return state

    def _check_mode(self) -> None:
        if not self.param_groups[0]["train_mode"]:
            raise RuntimeError("ScheduleFreeAdamW.step: expected train mode; the parameters hold the average; call optimizer.train() first")

    def update_(self) -> None:
        self._check_mode()
        super().update_()

    def step_one_(self, p: Tensor) -> None:
        self._check_mode()
        super().step_one_(p)

    @torch.no_grad()
    def train(self) -> None:
        """Puts y, where gradients are taken, into the parameters."""
        self._interpolate(True)

    @torch.no_grad()
    def eval(self) -> None:
        """Puts the average x into the parameters."""
        self._interpolate(False)

    def _interpolate(self, training: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == training:
                continue
            beta1 = float(group["betas"][0])
            weight = 1 - beta1 if training else 1 - 1 / beta1
            for p in group["params"]:
                if "z" in self.state.get(p, {}):
                    complete(self, p, self.state[p])  # a loaded state may lack its master weight
                    _lerp_to_z(local(p.detach()), self.state[p], weight)
            group["train_mode"] = training


def _lerp_to_z(p: Tensor, state: dict[str, Any], weight: float) -> None:
    """p + weight (z - p) where the parameter, with its master weight or remainder, is trainable; the rest keeps its bits."""
    index = compact.chosen(state, p)
    here = p if index is None else compact.take(p, p, index)
    keep = unpack_mask(state["mask"], p) if index is None and "mask" in state else None
    master, low = (local(state[k]) if k in state else None for k in ("master", "remainder"))
    full = join_split(here, low) if low is not None else here if master is None else master
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    moved = full.to(wide).lerp(local(state["z"]).to(wide), weight)

    def store(out: Tensor, value: Tensor) -> None:
        out.copy_(value if keep is None else torch.where(keep, value.to(out.dtype), out))

    if master is not None:
        store(master, moved)
    if low is not None:
        moved, rest = split(moved)
        store(low, rest)
    if index is None:
        store(p, moved)
    else:
        compact.flat(p)[index.long()] = moved.to(p.dtype)

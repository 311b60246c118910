"""SGD, Signum, Lion, Adagrad, RMSprop, Adadelta: rules without bias-corrected moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from .base import FusedOptimizer, Params
from .options import Extras
from .plans import Entry
from .saved import to_save
from .spec import RULES
from .state import fresh_states, names, not_negative


class SGD(FusedOptimizer):
    """torch.optim.SGD. buf = momentum buf + (1 - dampening) g (the first step copies g); p -= lr (g + momentum buf if nesterov else buf).

    States: ``momentum_buffer`` (only with momentum). Bytes per fp32 parameter: 12 without, 20 with momentum. Weight decay: L2.
    """

    examples = ({}, {"momentum": 0.9}, {"momentum": 0.8, "dampening": 0.1}, {"momentum": 0.9, "nesterov": True})

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, momentum: float = 0, dampening: float = 0, weight_decay: float = 0,
        nesterov: bool = False, **extras: Unpack[Extras],
    ):  # fmt: skip
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(f"SGD: expected momentum > 0 and dampening = 0 with nesterov; got momentum {momentum}, dampening {dampening}")
        super().__init__(params, dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov), extras)

    def _rule(self, group: dict[str, Any]) -> str:
        return "sgd_momentum" if group["momentum"] else "sgd"

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        options = {"momentum": group["momentum"], "dampening": group["dampening"], "nesterov": float(group["nesterov"])}
        return super()._hyper(group) | options

    def _init_states(self, entries: list[Entry], rule: str) -> None:
        for e in entries:  # the buffer's first step copies the gradient, whenever momentum is switched on: the steps before it do not count
            state = self.state[e.param]
            if rule == "sgd_momentum" and "step" in state and "momentum_buffer" not in state:
                state["step"] = torch.zeros_like(state["step"])
        super()._init_states(entries, rule)


class Signum(FusedOptimizer):
    """signSGD with momentum (arXiv 1802.04434). m = momentum m + (1 - momentum) g; p -= lr sign(m). momentum 0: signSGD, no state.

    Weight decay is decoupled (``weight_decouple=False``: L2). Bytes per fp32 parameter: 20, signSGD 12.
    """

    examples = ({}, {"momentum": 0.0}, {"momentum": 0.95, "weight_decouple": False})

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, momentum: float = 0.9, weight_decay: float = 0, weight_decouple: bool = True,
        **extras: Unpack[Extras],
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, weight_decouple=weight_decouple), extras)

    def _rule(self, group: dict[str, Any]) -> str:
        return "signum" if group["momentum"] else "sign_sgd"

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return coupling(super()._hyper(group), group, group["weight_decouple"]) | {"momentum": group["momentum"]}


class Lion(FusedOptimizer):
    """Lion (arXiv 2302.06675). p -= lr (sign(beta1 m + (1 - beta1) g) + weight_decay p); m = beta2 m + (1 - beta2) g.

    ``decoupled_weight_decay``: as in lion-pytorch, decay by weight_decay lr / (the lr given here), so that it does not depend on the learning
    rate chosen. ``use_triton``: accepted for lion-pytorch's sake; see ``backend``. States: ``exp_avg``. Bytes per fp32 parameter: 20.
    Equal to google/automl's code and lion-pytorch 0.2.5.
    """

    examples = ({}, {"betas": (0.95, 0.98)}, {"decoupled_weight_decay": True})
    closed_betas = True
    decay = "decoupled"
    _step_rule = "lion"

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0,
        use_triton: bool = False, decoupled_weight_decay: bool = False, **extras: Unpack[Extras],
    ):  # fmt: skip
        if decoupled_weight_decay and not lr > 0:
            raise ValueError(f"Lion: expected lr > 0 with decoupled_weight_decay, which divides by it; got {lr}")
        self._first_lr = float(lr) if decoupled_weight_decay else 0.0  # a number: a scheduler writes into a Tensor lr
        options = dict(betas=betas, weight_decay=weight_decay, decoupled_weight_decay=decoupled_weight_decay)
        super().__init__(params, dict(lr=lr, **options), extras)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        found = super()._hyper(group)
        if group.get("decoupled_weight_decay"):
            found["decoupled"] = found["decoupled"] / (self._first_lr or float(self.defaults["lr"]))
        return found


class Adagrad(FusedOptimizer):
    """torch.optim.Adagrad. sum += g²; p -= lr / (1 + (t-1) lr_decay) g / (sqrt(sum) + eps). States: ``sum``. Weight decay: L2."""

    examples = ({}, {"lr_decay": 0.01, "initial_accumulator_value": 0.1})
    _step_rule = "adagrad"

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-2, lr_decay: float = 0, weight_decay: float = 0, initial_accumulator_value: float = 0,
        eps: float = 1e-10, **extras: Unpack[Extras],
    ):  # fmt: skip
        not_negative("Adagrad", "initial_accumulator_value", initial_accumulator_value)
        options = dict(lr_decay=lr_decay, initial_accumulator_value=initial_accumulator_value, eps=eps)
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, **options), extras)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return super()._hyper(group) | {"lr_decay": group["lr_decay"]}

    def _initial(self, name: str, p: Tensor, group: dict[str, Any]) -> Tensor | float:
        return group["initial_accumulator_value"]

    def _unbegun(self) -> dict[int, dict[str, Tensor]]:
        """Parameter number -> state of those that had no gradient yet. torch's has its states from the start; a master weight or an anchor, which are
        copies of the parameter, are none of them."""
        label = names(self.param_groups)
        numbered = enumerate((p, i) for i, group in enumerate(self.param_groups) for p in group["params"])
        entries = [Entry(p, i, n, label[n]) for n, (p, i) in numbered if not self.state.get(p) and p.is_floating_point() and not p.is_meta]
        fresh = fresh_states(self, entries, RULES[self._step_rule], whole=False)
        return {e.ordinal: state for e, state in zip(entries, fresh, strict=True)}

    def _saved(self) -> dict[str, Any]:
        """With the states of parameters that had no gradient yet: torch's Adagrad would start them at another value. They are not kept here."""
        unbegun = to_save(self, self._unbegun())
        saved = super()._saved()
        saved["state"] |= unbegun
        return saved

    def share_memory(self) -> None:
        """Moves all states into shared memory, for processes that train the same parameters (torch.optim.Adagrad has this method). A master weight or
        an anchor is made at a parameter's first step, by each process for itself: take that step before, or do without them."""
        params = [p for group in self.param_groups for p in group["params"]]
        for n, fresh in self._unbegun().items():
            self.state[params[n]].update(fresh)
        self._reset()
        for state in self.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.share_memory_()


class RMSprop(FusedOptimizer):
    """torch.optim.RMSprop. States: ``square_avg``, ``grad_avg`` (centered), ``momentum_buffer`` (momentum). Weight decay: L2.

    Centered, a variance that rounding made negative counts as 0; torch takes its root and gets NaN.
    """

    examples = ({}, {"momentum": 0.9}, {"centered": True, "alpha": 0.9}, {"centered": True, "momentum": 0.8})
    closed_betas = True

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0, momentum: float = 0,
        centered: bool = False, **extras: Unpack[Extras],
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, momentum=momentum, alpha=alpha, eps=eps, centered=centered, weight_decay=weight_decay), extras)

    def _rule(self, group: dict[str, Any]) -> str:
        return "rmsprop" + "_centered" * bool(group["centered"]) + "_momentum" * bool(group["momentum"])

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return super()._hyper(group) | {"beta2": group["alpha"], "momentum": group["momentum"]}


class Adadelta(FusedOptimizer):
    """torch.optim.Adadelta. States: ``square_avg``, ``acc_delta``. Weight decay: L2."""

    examples = ({}, {"rho": 0.95, "eps": 1e-5})
    closed_betas = True
    _step_rule = "adadelta"

    def __init__(
        self, params: Params, lr: float | Tensor = 1.0, rho: float = 0.9, eps: float = 1e-6, weight_decay: float = 0, **extras: Unpack[Extras],
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, rho=rho, eps=eps, weight_decay=weight_decay), extras)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return super()._hyper(group) | {"beta2": group["rho"]}


def coupling(fields: dict[str, float], group: dict[str, Any], decoupled: bool) -> dict[str, float]:
    """Moves weight_decay between L2 (added to the gradient) and decoupled (scales the parameter)."""
    decay = group["weight_decay"]
    return fields | {"l2": 0.0 if decoupled else decay, "decoupled": decay if decoupled else 0.0}

"""The Adam family. Bytes per fp32 parameter and step: 28 with two states, 36 with three (csrc/core/rules_adam.h has the equations)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from .base import FusedOptimizer, Params
from .first_order import coupling
from .options import Extras
from .state import not_negative, number

Betas = tuple[float, float]


class Adam(FusedOptimizer):
    """torch.optim.Adam (arXiv 1412.6980): m / (sqrt(v / bc2) + eps), weight decay L2 (``decoupled_weight_decay=True``: as AdamW).

    States: ``exp_avg``, ``exp_avg_sq``, with amsgrad ``max_exp_avg_sq`` (the maximum of the raw second moment, as torch's code).
    """

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({}, {"amsgrad": True, "betas": (0.8, 0.95)}, {"decoupled_weight_decay": True})

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0,
        amsgrad: bool = False, *, decoupled_weight_decay: bool = False, **extras: Unpack[Extras],
    ):  # fmt: skip
        options = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, decoupled_weight_decay=decoupled_weight_decay)
        super().__init__(params, options, extras)

    def _rule(self, group: dict[str, Any]) -> str:
        return "amsgrad" if group["amsgrad"] else "adam"

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return coupling(super()._hyper(group), group, group["decoupled_weight_decay"])


class AdamW(Adam):
    """torch.optim.AdamW (arXiv 1711.05101): Adam with decoupled weight decay, p *= 1 - lr weight_decay before the step."""

    examples = ({}, {"amsgrad": True, "betas": (0.8, 0.95)})

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2,
        amsgrad: bool = False, **extras: Unpack[Extras],
    ):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **extras)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `FusedOptimizer.load_state_dict`. The decay stays decoupled, whatever the groups say: they may be Adam's, as in torch."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


class NAdam(FusedOptimizer):
    """torch.optim.NAdam. States: ``exp_avg``, ``exp_avg_sq``, scalar ``mu_product`` (kept in fp64; torch keeps fp32)."""

    examples = ({}, {"momentum_decay": 0.01, "decoupled_weight_decay": True})
    _step_rule = "nadam"

    def __init__(
        self, params: Params, lr: float | Tensor = 2e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0,
        momentum_decay: float = 4e-3, decoupled_weight_decay: bool = False, **extras: Unpack[Extras],
    ):  # fmt: skip
        options = dict(weight_decay=weight_decay, momentum_decay=momentum_decay, decoupled_weight_decay=decoupled_weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, **options), extras)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        fields = coupling(super()._hyper(group), group, group["decoupled_weight_decay"])
        not_negative("NAdam", "momentum_decay", group["momentum_decay"])
        return fields | {"mu_base": 0.96 ** group["momentum_decay"]}


class RAdam(FusedOptimizer):
    """torch.optim.RAdam (arXiv 1908.03265): adaptive once rho_t > 5, a momentum step before. eps stands outside the corrected root (E2)."""

    examples = ({}, {"decoupled_weight_decay": True, "betas": (0.9, 0.98)})
    _step_rule = "radam"

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0,
        decoupled_weight_decay: bool = False, **extras: Unpack[Extras],
    ):  # fmt: skip
        options = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decoupled_weight_decay=decoupled_weight_decay)
        super().__init__(params, options, extras)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return coupling(super()._hyper(group), group, group["decoupled_weight_decay"])


class AdaBelief(FusedOptimizer):
    """AdaBelief (arXiv 2010.07468), the official 0.2.1 in full.

    s = beta2 s + (1 - beta2)(g - m)² + eps: the eps is *stored*, so s never falls below eps / (1 - beta2) in the long run; without ``rectify`` eps is
    added a second time outside the root (the paper adds it once). ``rectify`` (threshold rho_t >= 5): before it, a momentum step
    (``degenerated_to_sgd``) or none; amsgrad then only stores its maximum. ``fixed_decay``: p *= 1 - weight_decay, without lr.
    The surprise g - m_new is computed as beta1 (g - m_old), the same number without its cancellation.
    States: ``exp_avg``, ``exp_avg_var``, with amsgrad ``max_exp_avg_var``. ``print_change_log``: accepted for the official code's sake; nothing is
    printed.
    """

    official_group = frozenset(("buffer",))

    examples = (
        {}, {"rectify": False, "eps": 1e-8}, {"amsgrad": True}, {"amsgrad": True, "rectify": False, "eps": 1e-10}, {"degenerated_to_sgd": False},
        {"fixed_decay": True}, {"weight_decouple": False, "betas": (0.8, 0.95)},
    )  # fmt: skip

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-16, weight_decay: float = 0,
        amsgrad: bool = False, weight_decouple: bool = True, fixed_decay: bool = False, rectify: bool = True, degenerated_to_sgd: bool = True,
        print_change_log: bool = False, **extras: Unpack[Extras],
    ):  # fmt: skip
        flags = dict(weight_decouple=weight_decouple, fixed_decay=fixed_decay, rectify=rectify, degenerated_to_sgd=degenerated_to_sgd)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, **flags), extras)

    def _saved(self) -> dict[str, Any]:
        """Loads into adabelief-pytorch, too: it keeps a cache in its groups (here an empty one), and takes powers of the step count, which must
        therefore be wide: from an fp32 one its rho_t has three digits."""
        saved = super()._saved()
        for group in saved["param_groups"]:
            group["buffer"] = [[None, None, None] for _ in range(10)]
        saved["state"] = {i: s | {"step": s["step"].double()} if s["step"].dim() == 0 else s for i, s in saved["state"].items()}
        return saved

    def _rule(self, group: dict[str, Any]) -> str:
        return "adabelief_amsgrad" if group["amsgrad"] else "adabelief"

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        fields = coupling(super()._hyper(group), group, group["weight_decouple"])
        if group["weight_decouple"] and group["fixed_decay"]:
            fields |= {"decoupled": 0.0, "fixed": group["weight_decay"]}
        flags = {"rectify": "rectify", "degenerated": "degenerated_to_sgd", "amsgrad": "amsgrad"}
        return fields | {k: float(group[v]) for k, v in flags.items()}


class DiffGrad(FusedOptimizer):
    """diffGrad v2 (arXiv 1909.11015): Adam's step (E2) times sigmoid(|g_prev - g|). States: moments and ``previous_grad`` (a copy, zero at first:
    the paper's v1 kept a reference that in-place gradients silently turn into the gradient itself). Weight decay: L2."""

    examples = ({}, {"betas": (0.8, 0.95)})
    _step_rule = "diffgrad"

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0,
        **extras: Unpack[Extras],
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), extras)


class EXAdam(FusedOptimizer):
    """EXAdam (arXiv 2412.20302) as the official code steps: cross-debiased moments, constant lr (the abstract's growing step size is not in it).
    The first step is about 16 lr for any gradient: use warm-up. Weight decay: decoupled."""

    examples = ({}, {"betas": (0.8, 0.95), "eps": 1e-6})
    decay = "decoupled"
    _step_rule = "exadam"

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
        **extras: Unpack[Extras],
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), extras)


class AdEMAMix(FusedOptimizer):
    """AdEMAMix (arXiv 2409.03137): Adam plus alpha times a slow momentum without bias correction.

    ``alpha_warmup`` raises alpha linearly, ``beta3_warmup`` raises beta3 in half-life, both over that many steps (None: at once).
    States: ``exp_avg_fast`` (not stored if beta1 = 0), ``exp_avg_slow``, ``exp_avg_sq``. Weight decay: decoupled.
    """

    examples = ({}, {"alpha": 5.0, "alpha_warmup": 20, "beta3_warmup": 20}, {"betas": (0.0, 0.99, 0.999)})
    n_betas = 3
    decay = "decoupled"

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, betas: tuple[float, float, float] = (0.9, 0.999, 0.9999), alpha: float = 2.0,
        beta3_warmup: int | None = None, alpha_warmup: int | None = None, eps: float = 1e-8, weight_decay: float = 0, **extras: Unpack[Extras],
    ):  # fmt: skip
        options = dict(alpha=alpha, beta3_warmup=beta3_warmup, alpha_warmup=alpha_warmup, eps=eps, weight_decay=weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, **options), extras)

    def _rule(self, group: dict[str, Any]) -> str:
        return "ademamix" if group["betas"][0] else "ademamix_slow"

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        def half_life(given: Any) -> float:
            beta = number(given)
            if beta is None or not 0.0 <= beta < 1.0:
                return 0.0  # of a beta that is refused, by its name, later
            return math.log(0.5) / math.log(min(beta + 1e-8, math.nextafter(1.0, 0.0))) - 1.0

        fields = super()._hyper(group)  # checks the betas, too
        beta1, _, beta3 = group["betas"]
        return fields | {
            "alpha": not_negative("AdEMAMix", "alpha", group["alpha"]), "half1": half_life(beta1), "half3": half_life(beta3),
            **{name: not_negative("AdEMAMix", name, group[name] or 0) for name in ("alpha_warmup", "beta3_warmup")},
        }  # fmt: skip


class ADOPT(FusedOptimizer):
    """ADOPT (arXiv 2411.02853): normalises the gradient by the *previous* second moment, then takes the momentum of that.

    The first step only fills the second moment (no move, no decay). ``clip_lambda``: bound on the normalised gradient as a function of the earlier
    steps k; the default is the official k^(1/4), None turns it off; any other function is called on the host, once per group and step.
    ``decouple``: decoupled weight decay, otherwise L2. States: ``exp_avg``, ``exp_avg_sq``.
    """

    examples = ({}, {"decouple": True, "betas": (0.8, 0.95)}, {"clip_lambda": None})
    _step_rule = "adopt"

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, betas: Betas = (0.9, 0.9999), eps: float = 1e-6,
        clip_lambda: Callable[[int], float] | None | str = "k**0.25", weight_decay: float = 0.0, decouple: bool = False, **extras: Unpack[Extras],
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, clip_lambda=clip_lambda, weight_decay=weight_decay, decouple=decouple), extras)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        given = group["clip_lambda"]
        if given is not None and given != "k**0.25" and not callable(given):
            raise ValueError(f"ADOPT: expected clip_lambda to be None, 'k**0.25' or a function of the earlier steps; got {given!r}")
        clip = math.inf if given is None else 0.0
        if callable(given):
            steps = {int(self.state[p]["step"]) for p in group["params"] if "step" in self.state.get(p, {})} or {0}
            if len(steps) > 1:
                raise ValueError(f"ADOPT: expected one step count per group with a clip_lambda of your own; got {sorted(steps)}; use separate groups")
            clip = max(float(given(max(steps.pop(), 1))), 1e-300)  # the first step does not clip: the official code asks from 1 on
        return coupling(super()._hyper(group), group, group["decouple"]) | {"clip": clip}

    def _saved(self) -> dict[str, Any]:
        """Without a ``clip_lambda`` of the user's: a file cannot hold a function, and the optimizer that loads keeps its own."""
        saved = super()._saved()
        for group in saved["param_groups"]:
            if callable(group["clip_lambda"]):
                del group["clip_lambda"]
        return saved

    def _key(self, group: dict[str, Any]) -> Any:
        return None if callable(group["clip_lambda"]) else super()._key(group)  # the bound may change at every step


class Grams(FusedOptimizer):
    """Grams (arXiv 2412.17107): p -= lr |Adam's step (E2)| sign(g). States: ``exp_avg``, ``exp_avg_sq``. Weight decay: decoupled."""

    examples = ({}, {"betas": (0.8, 0.95)})
    decay = "decoupled"
    _step_rule = "grams"

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0,
        **extras: Unpack[Extras],
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay), extras)

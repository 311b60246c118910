"""What every language agrees on: the rules' states, the hyper-parameter fields and the row fields (csrc/core/table.h, kernels/common.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# Order of csrc/core/table.h FA_HYPER_FIELDS; tests/test_spec.py holds the two lists together.
HYPER_FIELDS = (
    "lr", "beta1", "beta2", "beta3", "eps", "l2", "decoupled", "fixed", "sign", "momentum", "dampening", "nesterov", "lr_decay", "rectify",
    "degenerated", "amsgrad", "mu_base", "alpha", "alpha_warmup", "beta3_warmup", "half1", "half3", "clip", "rho", "power", "warmup", "r",
    "weight_lr_power",
)  # fmt: skip
ROW_FIELDS = (
    "sign", "l2", "decay", "step", "step_size", "beta1", "alpha1", "beta2", "alpha2", "beta3", "alpha3", "eps", "eps_state", "mix", "wd", "clip",
    "corr1", "corr2", "pow1", "pow2", "mode", "pull", "spare1", "spare2",
)  # fmt: skip

DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.int16: 4, torch.float64: 5, torch.uint8: 6, torch.int8: 7,
               torch.int64: 8, torch.bool: 9, torch.int32: 10}  # fmt: skip
# Coded states (csrc/core/lowbit.h): state_dtype -> elements per block; codes of the table.
CODED = {"int8": 256, "fp8": 128}
CODED_CODES = {"signed": 11, "unsigned": 12, "expanded": 13}
BITS = 14  # type code of an index that is the mask


def is_compact(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state holds its trainable elements only: with a list of them, or with their mask as the index."""
    return "index" in state or "prefix" in state


# States that are never negative, and states that stay fp32: inputs that the rule does not write, and a weight.
UNSIGNED = frozenset(("exp_avg_sq", "max_exp_avg_sq", "exp_avg_var", "max_exp_avg_var", "sum", "square_avg", "acc_delta", "exp_hessian_diag_sq"))
UNCODED = frozenset(("z", "hessian", "hessian_diag"))
_CENTERED = "centered=True takes the difference of two states: coded, it would be rounding noise, and the step its reciprocal"
UNCODABLE = {"rmsprop_centered": _CENTERED, "rmsprop_centered_momentum": _CENTERED}
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Rule:
    """One update rule: the names of its states in the order its functors index them.

    ``stored``: leading states the rule writes (the rest are inputs). ``aux``: fp64 scalars carried from step to step, with their start value.
    """

    states: tuple[str, ...] = ()
    stored: int = -1
    aux: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stored < 0:
            object.__setattr__(self, "stored", len(self.states))


_ADAM = ("exp_avg", "exp_avg_sq")

RULES: dict[str, Rule] = {
    "sgd": Rule(),
    "sgd_momentum": Rule(("momentum_buffer",)),
    "sign_sgd": Rule(),
    "signum": Rule(("momentum_buffer",)),
    "lion": Rule(("exp_avg",)),
    "adagrad": Rule(("sum",)),
    "rmsprop": Rule(("square_avg",)),
    "rmsprop_momentum": Rule(("square_avg", "momentum_buffer")),
    "rmsprop_centered": Rule(("square_avg", "grad_avg")),
    "rmsprop_centered_momentum": Rule(("square_avg", "grad_avg", "momentum_buffer")),
    "adadelta": Rule(("square_avg", "acc_delta")),
    "adam": Rule(_ADAM),
    "amsgrad": Rule((*_ADAM, "max_exp_avg_sq")),
    "nadam": Rule(_ADAM, aux={"mu_product": 1.0}),
    "radam": Rule(_ADAM),
    "adabelief": Rule(("exp_avg", "exp_avg_var")),
    "adabelief_amsgrad": Rule(("exp_avg", "exp_avg_var", "max_exp_avg_var")),
    "diffgrad": Rule((*_ADAM, "previous_grad")),
    "exadam": Rule(_ADAM),
    "ademamix": Rule(("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")),
    "ademamix_slow": Rule(("exp_avg_slow", "exp_avg_sq")),
    "adopt": Rule(_ADAM),
    "grams": Rule(_ADAM),
    "sophia_g": Rule(("exp_avg", "hessian"), stored=1),
    "adahessian": Rule(("exp_avg", "exp_hessian_diag_sq", "hessian_diag"), stored=2),
    "schedule_free_adamw": Rule(("z", "exp_avg_sq"), aux={"weight_sum": 0.0, "lr_max": -1.0}),
}


def hyper(**fields: float) -> list[float]:
    """A full hyper-parameter vector from the fields a rule reads."""
    return [float(v.item() if hasattr(v, "item") else v) for v in (fields.pop(name, 0.0) for name in HYPER_FIELDS)]

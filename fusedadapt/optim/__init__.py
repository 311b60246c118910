"""Fused optimizers: drop-in for torch.optim and the official implementations."""

from .adam import ADOPT, AdaBelief, Adam, AdamW, AdEMAMix, DiffGrad, EXAdam, Grams, NAdam, RAdam
from .base import FusedOptimizer
from .first_order import SGD, Adadelta, Adagrad, Lion, RMSprop, Signum
from .interop import from_torch, to_torch
from .release import release_gradients
from .schedule_free import ScheduleFreeAdamW
from .second_order import AdaHessian, SophiaG
from .spec import RULES

_CLASSES = (
    SGD, Signum, Adam, AdamW, Adagrad, RMSprop, Adadelta, NAdam, RAdam, AdaBelief, Lion, DiffGrad, EXAdam, AdEMAMix, ADOPT, Grams, SophiaG,
    AdaHessian, ScheduleFreeAdamW,
)  # fmt: skip

#: every public optimizer by name
OPTIMIZERS: dict[str, type[FusedOptimizer]] = {c.__name__: c for c in _CLASSES}

__all__ = [
    "OPTIMIZERS", "RULES", "FusedOptimizer", "from_torch", "to_torch", "release_gradients", "SGD", "Signum", "Adam", "AdamW", "Adagrad",
    "RMSprop", "Adadelta", "NAdam", "RAdam", "AdaBelief", "Lion", "DiffGrad", "EXAdam", "AdEMAMix", "ADOPT", "Grams", "SophiaG", "AdaHessian",
    "ScheduleFreeAdamW",
]  # fmt: skip

"""Options that every optimizer takes: their names, their checks, and the arithmetic of one of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from .. import config
from . import coded
from .spec import CODED, STATE_DTYPES
from .state import number, one_of

if TYPE_CHECKING:
    from .base import FusedOptimizer


class Extras(TypedDict, total=False):
    """Keyword-only options every optimizer of ours takes; :class:`FusedOptimizer` documents them."""

    maximize: bool
    capturable: bool
    state_dtype: str | None
    state_block: int | None
    stochastic_rounding: bool
    master_weights: str | None
    masks: dict[Tensor, Tensor] | None
    mask_state: str
    decay_to: str
    max_grad_norm: float | None
    backend: str | None
    seed: int
    foreach: bool | None
    fused: bool | None
    differentiable: bool


def take(opt: FusedOptimizer, extras: Extras) -> None:
    """Sets the attributes of ``opt`` that hold options; raises TypeError or ValueError on what is no option, or not one of its values."""
    name = type(opt).__name__
    if unknown := set(extras) - set(Extras.__annotations__):
        raise TypeError(f"{name}: unexpected arguments {sorted(unknown)}; see FusedOptimizer for the shared options")
    opt.state_dtype = one_of(name, "state_dtype", extras.get("state_dtype"), (None, *STATE_DTYPES, *CODED))
    opt.state_block = coded.check_options(name, opt.state_dtype, extras.get("state_block"))
    opt.master_weights = one_of(name, "master_weights", extras.get("master_weights"), (None, "fp32", "split"))
    opt.mask_state = one_of(name, "mask_state", extras.get("mask_state", "dense"), ("dense", "compact"))
    opt.decay_to = one_of(name, "decay_to", extras.get("decay_to", "zero"), ("zero", "init"))
    opt.stochastic_rounding = bool(extras.get("stochastic_rounding", False))
    opt.max_grad_norm = extras.get("max_grad_norm")
    if opt.max_grad_norm is not None and not (number(opt.max_grad_norm) or 0.0) > 0:
        raise ValueError(f"{name}: expected max_grad_norm > 0; got {opt.max_grad_norm!r}; None turns clipping off")
    opt.backend = extras.get("backend")
    if opt.backend is not None:
        config.checked_backend(opt.backend, f"{name} backend")


#: options that a group may have for itself, as in torch
_OF_A_GROUP = {"maximize", "capturable", "seed", "foreach", "fused", "differentiable"}


def check_group(opt: FusedOptimizer, group: dict[str, Any]) -> None:
    """Raises ValueError on an option of the whole optimizer that a group wants otherwise: it would be ignored. (Other keys are their owner's.)"""
    for k in sorted(set(Extras.__annotations__) - _OF_A_GROUP):
        if group.get(k) is not None and group[k] != getattr(opt, k, None):  # ZeroRedundancyOptimizer writes its options into every group
            raise ValueError(f"{type(opt).__name__}: expected {k} for the whole optimizer; got {group[k]!r} in a group; pass it beside params")


def clip_factor(total: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The norm whose square is ``total`` (0-d, fp64) and the factor min(1, limit / (norm + 1e-6)) of torch's clip_grad_norm_, both 0-d, fp64."""
    if total.device.type != "cpu":
        norm = total.sqrt()
        return norm, (limit / (norm + 1e-6)).clamp(max=1.0)
    # The same in numbers: after a pass over all gradients, torch's six operations take 0.1 ms.
    root = math.sqrt(total.item())
    factor = 1.0 / (root + 1e-6) * float(limit)  # torch divides a number by a tensor like this
    return torch.tensor(root, dtype=torch.float64, device="cpu"), torch.tensor(1.0 if factor > 1.0 else factor, dtype=torch.float64, device="cpu")

"""From and to torch's optimizers, state and all."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from . import coded
from .base import FusedOptimizer

# Options that official optimizers keep as attributes under another name.
_KEPT_ASIDE = {"decoupled_weight_decay": "decoupled_wd"}
# Ours that have another name there.
_NAMED = {"AdamWScheduleFree": "ScheduleFreeAdamW"}


def from_torch(optimizer: torch.optim.Optimizer, **extras: Any) -> FusedOptimizer:
    """Our optimizer of the same name on the same parameters, with the hyper-parameters and the state of a running torch optimizer, or an official
    one (adabelief-pytorch, lion-pytorch, schedulefree), with the options it keeps outside its groups.

    ``extras``: our keyword-only options; the state that comes over takes ``state_dtype``, if one is given. Raises TypeError if we have no
    optimizer of that name.
    """
    from . import OPTIMIZERS

    name = _NAMED.get(given := type(optimizer).__name__, given)
    cls = OPTIMIZERS.get(name)
    if cls is None or isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"from_torch: expected a torch optimizer we have ({', '.join(OPTIMIZERS)}); got {given}")
    known = inspect.signature(cls.__init__).parameters
    groups = []
    for group in optimizer.param_groups:
        keep = {k: v for k, v in group.items() if k in known or k in ("params", "maximize", "capturable", "initial_lr", "decoupled_weight_decay")}
        if name == "AdamW":
            keep["decoupled_weight_decay"] = True
        if "param_names" in group:
            keep["params"] = list(zip(group["param_names"], group["params"], strict=True))
        groups.append(keep)
    defaults = {k: v for k, v in optimizer.defaults.items() if k in known or k in ("maximize", "capturable")}
    defaults |= {k: getattr(optimizer, _KEPT_ASIDE.get(k, k)) for k in known if k not in defaults and hasattr(optimizer, _KEPT_ASIDE.get(k, k))}
    ours = cls(groups, **{**defaults, **extras})  # the defaults are what a group added later takes
    ours.load_state_dict(optimizer.state_dict())
    coded.encode_loaded(ours)
    return ours


def to_torch(optimizer: FusedOptimizer) -> torch.optim.Optimizer:
    """torch's optimizer of the same name on the same parameters, with our hyper-parameters and state; coded states become full ones. Masks, master
    weights, ``max_grad_norm`` and ``stochastic_rounding`` have no counterpart there and are refused."""
    cls = getattr(torch.optim, type(optimizer).__name__, None)
    if cls is None:
        raise TypeError(f"to_torch: torch has no {type(optimizer).__name__}")
    kept = any({"mask", "master", "remainder", "anchor"} & s.keys() for s in optimizer.state.values())
    to_come = optimizer._masks or (optimizer.master_weights and any(p.dtype.itemsize == 2 for g in optimizer.param_groups for p in g["params"]))
    if kept or to_come or optimizer.decay_to != "zero":
        raise ValueError(f"to_torch: expected a {type(optimizer).__name__} without masks, master weights and anchors; torch cannot carry them on")
    if optimizer.max_grad_norm is not None or optimizer.stochastic_rounding:
        given = f"max_grad_norm={optimizer.max_grad_norm!r}" if optimizer.max_grad_norm is not None else "stochastic_rounding=True"
        raise ValueError(f"to_torch: expected a {type(optimizer).__name__} without options torch lacks; got {given}; turn it off before")
    known = set(inspect.signature(cls.__init__).parameters)
    groups = [{k: v for k, v in g.items() if k in known or k == "params"} for g in optimizer.param_groups]
    theirs = cls(groups, **{k: v for k, v in optimizer.defaults.items() if k in known})
    theirs.load_state_dict(coded.decoded(optimizer.state_dict()))
    return theirs

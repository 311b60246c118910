"""An optimizer's state on its way through checkpoints: what is written, and what is checked before anything is taken."""

from __future__ import annotations

import copy
import inspect
import math
import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import coded, compact
from .spec import RULES, Rule, is_compact
from .state import check_hypers, check_seeds, distributed, names, pack_mask, reorder_mask, state_dtype, unpack_mask
from .table import describe, has_order, local

if TYPE_CHECKING:
    from .base import FusedOptimizer

# Options that only some versions or libraries write: their absence in a saved group is no sign of another rule. The last ones are no group options
# in the official AdaBelief, ADOPT and Sophia.
_OPTIONAL = {
    "foreach", "fused", "capturable", "differentiable", "maximize", "seed", "param_names", "initial_lr", "decoupled_weight_decay",
    "weight_decouple", "fixed_decay", "rectify", "degenerated_to_sgd", "clip_lambda", "bs",
}  # fmt: skip


_STATES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _all_options() -> set[str]:
    """Names of the options of all our optimizers. (Other names in a saved group are its owner's.)"""
    from . import OPTIMIZERS

    return {name for cls in OPTIMIZERS.values() for name in inspect.signature(cls.__init__).parameters} - {"self", "params", "extras"}


def to_save(opt: FusedOptimizer, states: dict[Any, Any]) -> dict[Any, Any]:
    """Without the empty states of parameters that never had a gradient; with the order a mask's bits are in, where that is not the row-major one."""
    out = {k: state for k, state in states.items() if state}
    for i, p in enumerate(p for group in opt.param_groups for p in group["params"]):
        if p in opt._orders and "mask" in out.get(i, {}) and not local(p.detach()).is_contiguous():
            out[i] = {"strides": torch.tensor(opt._orders[p], dtype=torch.int64, device="cpu")} | out[i]  # a coded state has them already
        if hasattr(p, "_local_tensor") and i in out:
            out[i] = _gatherable(p, out[i])
    return out


def _gatherable(p: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A shard's state as torch.distributed can gather it and cut it anew. A mask is a bool DTensor: it takes plain words for the same in every
    process, and keeps one process's. A remainder is the bf16 number of the same bits: no collective takes int16."""
    out = {k: v for k, v in state.items() if k != "strides"}
    if "mask" in state:
        out["mask"] = distributed().cut_as(unpack_mask(state["mask"], local(p.detach())), p)
    if "remainder" in state:
        out["remainder"] = distributed().cut_as(local(state["remainder"]).view(torch.bfloat16), p)
    return out


def _as_kept(p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
    """The state with what `_gatherable` wrote, gathered or not, as words and int16 again."""

    def plain(v: Any, dtype: torch.dtype) -> bool:
        return isinstance(v, Tensor) and v.dtype == dtype and v.layout == torch.strided and not v.is_meta

    mask, low, here = saved.get("mask"), saved.get("remainder"), local(p.detach())
    if mask is not None and plain(mask, torch.bool) and local(mask).shape == here.shape:
        saved = saved | {"mask": pack_mask(local(mask), here), "strides": tuple(here.stride())}
    if low is not None and plain(low, torch.bfloat16):
        bits = local(low).view(torch.int16)
        saved = saved | {"remainder": distributed().cut_as(bits, low) if hasattr(low, "_local_tensor") else bits}
    return saved


def _is_group(given: Any) -> bool:
    return isinstance(given, dict) and isinstance(given.get("params"), list | tuple)


def _parts(op: str, saved: Any) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    """Groups and states of a state dict; raises ValueError if it is none."""
    groups, state = (saved.get("param_groups"), saved.get("state")) if isinstance(saved, dict) else (None, None)
    if not isinstance(groups, list | tuple) or not isinstance(state, dict) or not all(map(_is_group, groups)):
        got = f"keys {sorted(map(str, saved))}" if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(
            f"{op}.load_state_dict: expected a dict with 'state' (a dict) and 'param_groups' (dicts with a list 'params'); got {got}; "
            "pass what an optimizer's state_dict() gave"
        )
    return list(groups), state


def load(opt: FusedOptimizer, state_dict: dict[str, Any]) -> None:
    """Checks everything, converts everything, then swaps it in."""
    state_dict = copy.copy(state_dict)  # what hooks change in it stays here, as in torch
    for hook in opt._optimizer_load_state_dict_pre_hooks.values():
        given = hook(opt, state_dict)
        state_dict = state_dict if given is None else given
    fresh, groups = read(opt, state_dict)
    params = [p for g in opt.param_groups for p in g["params"]]
    opt.state.clear()
    opt.state.update(fresh)
    opt._orders.update({p: tuple(local(p.detach()).stride()) for p in params if "mask" in fresh.get(p, {})})
    opt.param_groups[:] = groups
    for after in opt._optimizer_load_state_dict_post_hooks.values():
        after(opt)


def read(opt: FusedOptimizer, state_dict: Any) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """States and groups as ``opt`` would keep them. Raises ValueError if they do not fit; changes nothing."""
    op = type(opt).__name__
    saved_groups, saved_state = _parts(op, state_dict)
    saved_state = opt._own_form(saved_state, saved_groups)
    sizes, wanted = [len(g["params"]) for g in saved_groups], [len(g["params"]) for g in opt.param_groups]
    if sizes != wanted:
        raise ValueError(f"{op}.load_state_dict: expected param groups of sizes {wanted}; got {sizes}; build the optimizer on the same parameters")
    groups = []
    for old, new in zip(opt.param_groups, saved_groups, strict=True):
        absent = {k for k in old if k not in new and k not in _OPTIONAL and k != "params"}
        if absent:
            raise ValueError(f"{op}.load_state_dict: expected groups with {sorted(absent)}; they are not there: another rule saved this state")
        foreign = _all_options() & new.keys() - old.keys() - _OPTIONAL - opt.official_group
        if foreign:
            raise ValueError(f"{op}.load_state_dict: expected groups without {sorted(foreign)}, no options of {op}: another rule saved this state")
        kept = {k: v for k, v in old.items() if k in _OPTIONAL and k != "initial_lr"}
        given = {k: v for k, v in new.items() if k != "params" and k not in opt.official_group}
        groups.append({**kept, **copy.deepcopy(given), "params": old["params"]})
        check_hypers(opt, groups[-1], opt._hyper(groups[-1]))
    check_seeds(opt, groups)
    ids = [i for g in saved_groups for i in g["params"]]
    params = [p for g in opt.param_groups for p in g["params"]]
    labels = names(opt.param_groups)
    group_of = [g for g in groups for _ in g["params"]]
    fresh: dict[Any, Any] = {k: copy.deepcopy(v) for k, v in saved_state.items() if k not in ids}  # a user's own, as torch
    for i, p, label, group in zip(ids, params, labels, group_of, strict=True):
        state = saved_state.get(i)
        if state is not None and not isinstance(state, dict):
            raise ValueError(f"{op}.load_state_dict: expected the state of {label} as a dict; got {type(state).__name__}; the state dict is damaged")
        if state:
            fresh[p] = _convert(opt, label, p, group, state)
    return fresh, groups


def _convert(opt: FusedOptimizer, label: str, p: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    rule, op = RULES[opt._rule(group)], f"{type(opt).__name__}.load_state_dict"
    saved = _as_kept(p, saved)
    _check_values(op, label, p, rule, saved)
    inputs = rule.states[rule.stored :]
    lacking = [k for k in rule.states if k not in saved and k not in inputs]
    if lacking:
        raise ValueError(f"{op}: expected {lacking} in the state of {label}; got {sorted(map(str, saved))}; another rule or other options saved it")
    device = local(p.detach()).device
    out: dict[str, Any] = {}
    packed = is_compact(saved)
    order = coded.saved_order(saved, local(p))
    coded.check_saved(op, label, saved)
    if packed and not has_order(local(p), order):
        given = tuple(local(p).stride())
        raise ValueError(f"{op}: expected {label} with strides {order}, in whose order its compact state lies; got {given}; change its layout later")
    if packed:
        compact.check_saved(op, label, p, saved, rule)
    for k, v in saved.items():
        if k == "step" or k in rule.aux:
            wide = torch.float32 if k == "step" else torch.float64
            v = torch.as_tensor(v if packed else float(v), dtype=wide, device=device).clone()
        elif k == "cohorts":
            v = v.cpu().clone()
        elif isinstance(v, Tensor):
            if k in (*rule.states, "master", "remainder", "anchor") and v.shape != p.shape and not packed:
                raise ValueError(f"{op}: expected {k} of {label} with shape {tuple(p.shape)}; got {tuple(v.shape)}; it belongs to other parameters")
            v = _place(v, p, not packed and k in (*rule.states, "master", "remainder", "anchor"))
            if v.is_floating_point() and torch.float64 in (v.dtype, p.dtype) and k in (*rule.states, "anchor"):
                v = v.to(state_dtype(opt, p) if k in rule.states else p.dtype)  # fp64 arithmetic has fp64 states and no other has
        else:
            v = copy.deepcopy(v)
        if v is not None:
            out[k] = v
    # torch's SGD counts no steps; a momentum buffer means there was at least one.
    out.setdefault("step", torch.ones((), dtype=torch.float32, device=device))
    for k, start in rule.aux.items():
        out.setdefault(k, torch.tensor(start, dtype=torch.float64, device=device))
    if isinstance(out.get("mask"), Tensor):
        out["mask"] = reorder_mask(out["mask"], local(p.detach()), order)
    elif p in opt._masks:
        out["mask"] = reorder_mask(opt._masks[p], local(p.detach()), opt._orders[p])
    coded.place(out, saved, local(p.detach()))
    out = compact.convert(opt, label, p, group, out)
    coded.note_order(out, local(p.detach()))
    _check_master(opt, op, label, p, out)
    return out


def _check_values(op: str, label: str, p: Tensor, rule: Rule, saved: dict[str, Any]) -> None:
    """Raises ValueError on what no step leaves behind: states that are no dense tensors of numbers, counts that are none, other masks."""

    def require(good: bool, name: str, expected: str) -> None:
        if not good:
            raise ValueError(f"{op}: expected {name} of {label} to be {expected}; got {describe(saved[name])}; it is damaged: load another")

    for name, v in saved.items():
        plain = isinstance(v, Tensor) and v.layout == torch.strided and not v.is_meta
        if name == "step" or name in rule.aux:
            require(_finite(v, is_compact(saved), 0.0 if name == "step" else -math.inf), name, "a finite number")
        elif name == "mask":
            fits = plain and v.dtype == torch.int32 and v.numel() == (local(p.detach()).numel() + 31) // 32
            require(fits, name, "int32, a bit per element, or bool and cut as the parameter is")
        elif name in rule.states and v is not None:  # torch up to 2.7 wrote momentum_buffer None
            require(plain and (v.dtype in _STATES or coded.scale_key(name) in saved), name, "a dense floating-point tensor")
        elif name in ("index", "prefix", "cohorts") or (name.endswith("_scale") and name.removesuffix("_scale") in rule.states):
            require(plain and v.dim() > 0, name, "a dense tensor of at least one dimension")
        elif name == "strides":
            counted = v.tolist() if plain and v.dim() == 1 else v
            require(isinstance(counted, list | tuple) and len(counted) == p.dim() and all(isinstance(n, int) for n in counted), name, "p.stride()")
        elif name in ("master", "anchor", "remainder"):
            require(plain and (v.dtype == torch.int16 if name == "remainder" else v.dtype in _STATES), name, "a dense tensor of its dtype")


def _finite(v: Any, several: bool, least: float) -> bool:
    """Whether it is a finite number from ``least`` on, or a tensor of one (``several``: or more)."""
    if not isinstance(v, Tensor):
        return isinstance(v, numbers.Real) and math.isfinite(v) and float(v) >= least
    real = v.layout == torch.strided and not v.is_meta and not v.is_complex()
    return real and (v.numel() == 1 or several) and bool((v.isfinite() & (v >= least)).all())


def _check_master(opt: FusedOptimizer, op: str, label: str, p: Tensor, out: dict[str, Any]) -> None:
    """Raises ValueError on a master weight in the form this optimizer does not keep: it would be lost without a word."""
    key, other = ("remainder", "master") if opt._extra_key == "remainder" else ("master", "remainder")
    if p.dtype not in (torch.bfloat16, torch.float16):
        out.pop("remainder", None)  # half of another parameter's fp32 value
        return
    if other in out:
        form = "fp32" if other == "master" else "split"
        raise ValueError(
            f'{op}: expected {label} saved with master_weights={opt.master_weights!r}; got its {other}, of master_weights="{form}"; '
            f'build the optimizer with master_weights="{form}"'
        )


def _place(v: Tensor, p: Tensor, like_param: bool) -> Tensor:
    """A private copy on the parameter's device in its memory order, in the dtype it was saved with."""
    if hasattr(v, "_local_tensor") or not like_param:
        return v.detach().to(local(p.detach()).device, copy=True)
    t = local(p.detach())
    if v.shape == t.shape and t.numel():
        return torch.empty_strided(t.shape, t.stride(), dtype=v.dtype, device=t.device).copy_(v.detach())
    return v.detach().to(t.device, copy=True)

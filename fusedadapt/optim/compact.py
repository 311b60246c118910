"""States that hold only the trainable elements of a masked parameter, and the anchors that decay may pull towards.

A compact parameter's state dict has ``index``: flat positions in the parameter's memory (int32; int64 from 2^31 elements on). Where a list takes
more than a bit per element of the parameter, the ``mask`` is the index, and ``prefix`` says how many of its bits are set before each 1,024 elements.
Its states, master weight or remainder and anchor are vectors in the order of the index. Elements that joined later (`fusedadapt.sparse.grow_prune`)
form a cohort with a step count of its own: ``cohorts`` (int64, on the CPU) holds the first element of each, and ``step`` and the rule's scalars have
one value per cohort; such a state has a list. Without ``cohorts`` there is one, and ``step`` is 0-d as ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import sparse as ops
from . import coded
from .spec import RULES, Rule, is_compact
from .table import flat as flat
from .table import gradient as gradient
from .table import local, memory_order

if TYPE_CHECKING:
    from .base import FusedOptimizer


def in_order(t: Tensor, like: Tensor) -> Tensor:
    """``t``'s elements as a vector in the memory order of ``like``."""
    return flat(t if t.stride() == like.stride() else memory_order(t, like))


def wanted(opt: FusedOptimizer, p: Tensor) -> bool:
    """Whether this parameter's states are to be compact."""
    return opt.mask_state == "compact" and (p in opt._masks or "mask" in opt.state.get(p, {}))


def positions(words: Tensor, p: Tensor) -> Tensor:
    """The index of a fresh mask: its positions in order."""
    found: Tensor = ops.run("indices", words)(words, local(p.detach()).numel())
    return found


def fresh_index(opt: FusedOptimizer, p: Tensor) -> Tensor | None:
    """The index of a parameter whose states are to be compact, else None."""
    if not wanted(opt, p):
        return None
    state = opt.state.get(p, {})
    return index_of(state, p) if is_compact(state) else positions(state.get("mask", opt._masks.get(p)), p)


def index_of(state: dict[str, Any], p: Tensor) -> Tensor:
    """Positions of a compact state's elements, in its order; made anew where the mask is the index."""
    found: Tensor = state["index"] if "index" in state else positions(state["mask"], p)
    return found


def chosen(state: dict[str, Any], p: Tensor) -> Tensor | None:
    """Which elements of the parameter a state holds, in its order; None: all of them, it is dense."""
    return index_of(state, p) if is_compact(state) else None


def count(state: dict[str, Any]) -> int:
    """How many elements a compact state has."""
    return int(state["index"].numel() if "index" in state else state["prefix"][-1])


def by_mask(index: Tensor, p: Tensor, rule: Rule) -> bool:
    """Whether the mask, kept in any case, is to be the index: 4 bytes an element are then more than it (above 1/32). A rule without states keeps
    the list: nothing else would say on a device, without waiting for it, how long it is."""
    return len(rule.states) > 0 and index.numel() * 32 > local(p.detach()).numel()


def squeeze(state: dict[str, Any], p: Tensor, rule: Rule) -> None:
    """Drops the list where the mask says as much: rising positions, a single cohort."""
    index = state["index"]
    if "mask" in state and "cohorts" not in state and by_mask(index, p, rule) and torch.equal(index, positions(state["mask"], p).to(index.dtype)):
        state["prefix"] = ops.run("prefix", state["mask"])(state["mask"])
        del state["index"]


def unsqueeze(state: dict[str, Any], p: Tensor) -> None:
    """The list in place of the mask, for elements in an order of their own."""
    state["index"] = index_of(state, p)
    state.pop("prefix", None)


def take(t: Tensor, p: Tensor, index: Tensor | None) -> Tensor:
    """The chosen elements of a tensor of the parameter's shape, or all of it (index None); a copy."""
    return t.clone(memory_format=torch.preserve_format) if index is None else in_order(t, local(p.detach()))[index]


def cohorts(state: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(number, first element, end) of each cohort of a compact state."""
    n = count(state)
    starts = state["cohorts"].tolist() if state.get("cohorts") is not None else [0]
    return [(i, first, end) for i, (first, end) in enumerate(zip(starts, [*starts[1:], n], strict=True))]


def check_options(opt: FusedOptimizer, masks: dict[Tensor, Tensor]) -> None:
    """Raises ValueError where compact states or anchors cannot be."""
    op = type(opt).__name__
    if not isinstance(masks, dict):
        raise ValueError(f"{op}: expected masks as a dict {{parameter: mask}}; got {type(masks).__name__}; say which parameter each mask is for")
    if opt.decay_to == "init" and opt.decay not in ("l2", "decoupled"):
        raise ValueError(f'{op}: expected decay_to="zero"; got "init"; this rule applies its decay itself, at the point where gradients are taken')
    if opt.mask_state != "compact":
        return
    if not masks:
        raise ValueError(f'{op}: expected masks with mask_state="compact"; got none; pass masks={{param: bool tensor}}')
    if any(hasattr(p, "_local_tensor") for p in masks):
        raise ValueError(f'{op}: expected plain tensors with mask_state="compact"; got a DTensor; use mask_state="dense" for sharded parameters')


# --- between the two forms of a state ----------------------------------------------------------------------------------------------------


def _names(rule: Rule) -> tuple[str, ...]:
    return (*rule.states, "master", "remainder", "anchor")


def check_saved(op: str, label: str, p: Tensor, saved: dict[str, Any], rule: Rule) -> None:
    """Raises ValueError unless a saved compact state fits the parameter and itself."""

    def require(good: bool, expected: str, got: Any) -> None:
        if not good:
            raise ValueError(f"{op}: expected {expected} in the compact state of {label}; got {got}; it belongs to other parameters or is damaged")

    words, numel = saved.get("mask"), local(p.detach()).numel()
    require(words is not None and words.dtype == torch.int32 and words.numel() == (numel + 31) // 32, "the packed mask", _shape(words))
    assert words is not None
    ordered = positions(words, p)
    index = saved.get("index", ordered)
    if "index" not in saved:
        counts = ops.run("prefix", words)(words)
        given = saved["prefix"]
        good = given.dtype == torch.int64 and given.shape == counts.shape and torch.equal(given.to(counts.device), counts)
        require(good and "cohorts" not in saved, "the mask's counts as prefix", _shape(given))
    good = index.dtype in (torch.int32, torch.int64) and index.shape == ordered.shape
    require(good and torch.equal(index.sort().values.to(ordered.device), ordered.to(index.dtype)), "the mask's positions as index", _shape(index))
    for k in _names(rule):
        if k in saved:
            require(saved[k].shape == index.shape, f"{k} of shape {tuple(index.shape)}", _shape(saved[k]))
    starts = saved.get("cohorts")
    count = 1
    if starts is not None:
        count = starts.numel()
        order = starts.tolist()
        good = starts.dtype == torch.int64 and count > 0 and order[:1] == [0] and order == sorted(order) and order[-1] <= index.numel()
        require(good, "cohorts as rising starts", order)
    for k in ("step", *rule.aux):
        n = torch.as_tensor(saved.get(k, 0.0)).numel()
        require(n == count, f"{k} with {count} values", n)


def _shape(t: Any) -> Any:
    return tuple(t.shape) if isinstance(t, Tensor) else t


def gather(opt: FusedOptimizer, p: Tensor, state: dict[str, Any], rule: Rule) -> dict[str, Any]:
    """A dense state as a compact one of a single cohort."""
    index = positions(state["mask"], p)
    out = {k: take(local(v), p, index) if k in _names(rule) else v for k, v in state.items()}
    return out | {"index": index}


def spread(opt: FusedOptimizer, label: str, p: Tensor, group: dict[str, Any], state: dict[str, Any], rule: Rule) -> dict[str, Any]:
    """A compact state as a dense one; frozen elements start as they would without training. Cohorts of different ages have no dense form."""
    op, ages = f"{type(opt).__name__}.load_state_dict", state["step"].view(-1).tolist()
    if len(set(ages)) > 1:
        raise ValueError(
            f"{op}: expected one step count for the dense state of {label}; got cohorts of ages {sorted(set(ages))}; keep "
            'mask_state="compact" for masks that changed'
        )
    out = {k: v for k, v in state.items() if k not in ("index", "prefix", "cohorts")}
    for k in ("step", *rule.aux):
        out[k] = out[k].view(-1)[0].clone()
    for k in _names(rule):
        if k in state:
            v = state[k]
            full = start(opt, k, p, group, v.dtype)
            flat(full)[index_of(state, p)] = v
            out[k] = full
    return out


def start(opt: FusedOptimizer, name: str, p: Tensor, group: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """What a state, master weight, remainder or anchor is before the first step: dense, in the parameter's memory order."""
    q = p.detach()
    if name in ("master", "anchor"):
        return torch.empty_like(q, dtype=dtype, memory_format=torch.preserve_format).copy_(q)
    value = 0.0 if name == "remainder" else opt._initial(name, p, group)
    full = torch.empty_like(q, dtype=dtype, memory_format=torch.preserve_format)
    return full.copy_(value.detach()) if isinstance(value, Tensor) else full.fill_(value)


def convert(opt: FusedOptimizer, label: str, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """A loaded state in the form that this optimizer wants. (An anchor it lacks is made where it is used.)"""
    rule = RULES[opt._rule(group)]
    if is_compact(state) != (opt.mask_state == "compact" and "mask" in state):
        forms = coded.formats(state)
        scales = {coded.scale_key(k) for k in forms}
        state = {k: coded.decode(state, k) if k in forms else v for k, v in state.items() if k not in scales}
        state = spread(opt, label, p, group, state, rule) if is_compact(state) else gather(opt, p, state, rule)
        for k, form in forms.items():
            state.update(coded.encode(state, k, state[k], form))
    if opt.decay_to == "zero":
        state.pop("anchor", None)
    if "index" in state:
        squeeze(state, p, rule)
    return state

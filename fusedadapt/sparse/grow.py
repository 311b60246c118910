"""Changing a mask while training: drop the least important weights, grow as many others, and move the optimizer's state along."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..optim import FusedOptimizer, coded
from ..optim import compact as states
from ..optim.plans import Entry
from ..optim.spec import RULES, is_compact
from ..optim.state import complete, names, pack_mask, unpack_mask
from ..optim.table import has_order
from .mask import Mask
from .select import topk_mask

Candidates = Tensor | tuple[Tensor, Tensor]
_SEEDED = ("exp_avg", "exp_avg_sq")


class _Change(NamedTuple):
    """What changes, in the parameter's memory order. ``kept``: bool [numel]; ``grown``: rising positions; ``gradient``: at those, or None."""

    kept: Tensor
    grown: Tensor
    gradient: Tensor | None


@torch.no_grad()
def grow_prune(
    optimizer: FusedOptimizer,
    param: Tensor,
    *,
    fraction: float | None = None,
    score: str | Tensor = "magnitude",
    grow: str = "gradient",
    gradient: Candidates | None = None,
    new_value: float | None = 0.0,
    state: str = "zero",
    k: int | None = None,
    seed: int = 0,
) -> Mask:
    """Drops a share of the mask and grows as many elements elsewhere: mask, values and optimizer state change together. No sort.

    Args:
        optimizer, param: one of ours and a parameter of it that has a mask; dense or compact state.
        fraction: share of the mask to exchange, rounded down; or ``k``: how many elements.
        score: "magnitude" drops the smallest |w|; a tensor of the parameter's shape drops the smallest of its values.
        grow: "gradient": the largest |gradient| (RigL, arXiv 1911.11134; elements dropped just now may come back); "momentum": the largest first
            moment (dense state); "random": any (SET, arXiv 1707.04780), a pure function of ``seed``.
        gradient: in place of ``param.grad``: a tensor of the parameter's shape, or candidates as (flat row-major positions, values), as SpIEL
            (arXiv 2401.16405) gathers them: only these may grow.
        new_value: of grown elements; None keeps what stands there. Dropped elements become 0, or what they were at first with decay_to="init".
        state: of grown elements: "zero": as before the first step; "seed": the moments of an Adam-like rule as if their gradient had been the first
            step's: m = (1 - beta1) g, v = (1 - beta2) g². In a compact state they are a cohort with a step count of its own; a dense state has one
            step count for all.

    Returns:
        The new `Mask`. Ties fall to the lower position in the parameter's memory; the number of elements never changes.

    Raises:
        ValueError: whatever does not fit, before anything has changed.
    """
    words = _checked(optimizer, param, fraction, k, grow, state, new_value, seed)
    p = param.detach()
    active = states.positions(words, param).long()
    n = int(fraction * active.numel()) if fraction is not None else int(k or 0)
    if not 0 <= n <= active.numel():
        raise ValueError(f"grow_prune: expected k in 0..{active.numel()}, the mask's elements; got {n}")
    rule = RULES[_rule(optimizer, param)]
    if state == "seed" and (rule.states != _SEEDED or rule.aux):
        raise ValueError(f'grow_prune: expected an Adam-like rule (states {", ".join(_SEEDED)}) with state="seed"; use state="zero"')
    kept = _keep(p, active, n, score)
    change = _grow(optimizer, param, kept, n, grow, gradient, state, seed)
    if n:
        held = _begun(optimizer, param)
        with coded.unpacked(held):
            words = _apply(optimizer, param, held, change, new_value, state == "seed")
    return Mask.from_bool(unpack_mask(words, p))


def _checked(
    optimizer: FusedOptimizer, param: Tensor, fraction: float | None, k: int | None, grow: str, state: str, new_value: float | None, seed: int
) -> Tensor:
    """The packed mask."""
    if not isinstance(optimizer, FusedOptimizer) or not any(param is q for g in optimizer.param_groups for q in g["params"]):
        raise ValueError(f"grow_prune: expected an optimizer of fusedadapt and a parameter of it; got {type(optimizer).__name__}")
    if hasattr(param, "_local_tensor"):
        raise ValueError("grow_prune: expected a plain parameter; got a DTensor; each process would choose its own share")
    if (fraction is None) == (k is None):
        raise ValueError(f"grow_prune: expected fraction or k; got {'both' if k is not None else 'neither'}")
    if k is not None and (isinstance(k, bool) or not isinstance(k, Integral)):
        raise ValueError(f"grow_prune: expected an integer k; got {k!r}; a share is fraction=")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ValueError(f"grow_prune: expected an integer seed; got {seed!r}")
    if fraction is not None and not (isinstance(fraction, Real) and 0.0 <= fraction <= 1.0):
        raise ValueError(f"grow_prune: expected a fraction in [0, 1]; got {fraction!r}")
    if new_value is not None and (isinstance(new_value, bool) or not isinstance(new_value, int | float)):
        raise ValueError(f"grow_prune: expected a number or None as new_value; got {new_value!r}")
    for name, value, choices in (("grow", grow, ("gradient", "random", "momentum")), ("state", state, ("zero", "seed"))):
        if value not in choices:
            raise ValueError(f"grow_prune: expected {name} to be one of {', '.join(choices)}; got {value!r}")
    words: Tensor | None = optimizer.state.get(param, {}).get("mask", optimizer._masks.get(param))
    if words is None:
        raise ValueError("grow_prune: expected a parameter with a mask; it has none; pass masks={param: ...} to the optimizer")
    if param in optimizer._orders and not has_order(param.detach(), optimizer._orders[param]):
        got = f"strides {param.stride()}, then {optimizer._orders[param]}"
        raise ValueError(f"grow_prune: expected the memory order that the parameter had when its mask was given; got {got}; change its layout before")
    return words


def _begun(optimizer: FusedOptimizer, param: Tensor) -> dict[str, Any]:
    """The parameter's state, as before the first step if there is none yet: the changed mask is saved with it, moments are seeded in it, and its
    anchor holds what dropped elements go back to."""
    if "step" not in optimizer.state[param]:
        listed = [(q, i) for i, g in enumerate(optimizer.param_groups) for q in g["params"]]
        number = next(n for n, (q, _) in enumerate(listed) if q is param)
        entry = Entry(param, listed[number][1], number, names(optimizer.param_groups)[number])
        optimizer._init_states([entry], _rule(optimizer, param))
    held: dict[str, Any] = optimizer.state[param]
    complete(optimizer, param, held)  # a loaded one may lack its master weight or anchor
    return held


def _rule(optimizer: FusedOptimizer, param: Tensor) -> str:
    return optimizer._rule(_group(optimizer, param))


def _group(optimizer: FusedOptimizer, param: Tensor) -> dict[str, Any]:
    return next(g for g in optimizer.param_groups if any(param is q for q in g["params"]))


def _keep(p: Tensor, active: Tensor, n: int, score: str | Tensor) -> Tensor:
    """bool [numel]: the mask without the ``n`` smallest scores."""
    if isinstance(score, Tensor):
        if score.shape != p.shape:
            raise ValueError(f"grow_prune: expected scores of shape {tuple(p.shape)}; got {tuple(score.shape)}")
        values, kind = states.in_order(score.detach().to(p.device), p)[active], "given"
    elif score == "magnitude":
        values, kind = states.flat(p)[active], "abs"
    else:
        raise ValueError(f'grow_prune: expected score "magnitude" or a tensor; got {score!r}')
    stay = topk_mask(values, k=active.numel() - n, score=kind).to_bool()
    kept = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
    kept[active[stay]] = True
    return kept


def _grow(optimizer: FusedOptimizer, param: Tensor, kept: Tensor, n: int, grow: str, gradient: Candidates | None, state: str, seed: int) -> _Change:
    p = param.detach()
    given = None if grow != "gradient" and state != "seed" else _dense_gradient(param, gradient)
    if grow == "random":
        draw = torch.rand(p.numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu").to(p.device)
        scores = torch.where(kept, -1.0, draw)
    else:
        source = given[0] if grow == "gradient" and given is not None else _momentum(optimizer, param)
        scores = torch.where(kept, -1.0, source.abs().float().nan_to_num(nan=0.0, posinf=3e38))
    if given is not None and given[1] is not None:
        scores = torch.where(given[1], scores, -1.0)
        eligible = int((given[1] & ~kept).sum())
        if eligible < n:
            raise ValueError(f"grow_prune: expected at least {n} candidates outside what stays; got {eligible}; give more, or exchange less")
    grown = topk_mask(scores, k=n, score="given").indices().long()
    return _Change(kept, grown, None if given is None else given[0][grown])


def _dense_gradient(param: Tensor, gradient: Candidates | None) -> tuple[Tensor, Tensor | None]:
    """(gradient in memory order, which elements are candidates or None for all)."""
    p = param.detach()
    if isinstance(gradient, tuple):
        if len(gradient) != 2 or not all(isinstance(part, Tensor) for part in gradient):
            raise ValueError(f"grow_prune: expected candidates as two tensors, positions and values; got {[type(g).__name__ for g in gradient]}")
        at, values = gradient
        if at.dim() != 1 or at.shape != values.shape or at.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"grow_prune: expected candidates as positions and as many values; got {tuple(at.shape)} and {tuple(values.shape)}")
        if at.numel() and not 0 <= int(at.min()) <= int(at.max()) < p.numel():
            raise ValueError(f"grow_prune: expected candidates in 0..{p.numel() - 1}; got {int(at.min())}..{int(at.max())}")
        dense, chosen = torch.zeros(p.numel(), dtype=values.dtype, device=p.device), torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
        dense[at.long().to(p.device)] = values.to(p.device)
        chosen[at.long().to(p.device)] = True
        return states.in_order(dense.view(p.shape), p), states.in_order(chosen.view(p.shape), p)
    g = param.grad if gradient is None else gradient
    if not isinstance(g, Tensor) or g.shape != p.shape or g.layout != torch.strided:
        got = "none" if g is None else f"shape {tuple(g.shape)} ({g.layout})" if isinstance(g, Tensor) else type(g).__name__
        raise ValueError(f"grow_prune: expected a gradient of shape {tuple(p.shape)}; got {got}; call it after backward(), or pass gradient=")
    return states.in_order(g.detach(), p), None


def _momentum(optimizer: FusedOptimizer, param: Tensor) -> Tensor:
    held = optimizer.state.get(param, {})
    name = next((k for k in ("exp_avg", "momentum_buffer", "exp_avg_slow") if k in held), None)
    if name is None or is_compact(held):
        raise ValueError('grow_prune: expected a dense state with a first moment for grow="momentum"; there is none; use "gradient"')
    return states.in_order(coded.decode(held, name), param.detach())


def _apply(optimizer: FusedOptimizer, param: Tensor, held: dict[str, Any], change: _Change, new_value: float | None, seeded: bool) -> Tensor:
    """The new packed mask."""
    p = param.detach()
    dropped = states.flat(memory(unpack_mask(held["mask"], p), p)) & ~change.kept
    now = change.kept.clone()
    now[change.grown] = True
    rule, group = RULES[_rule(optimizer, param)], _group(optimizer, param)
    betas = group.get("betas", (0.0, 0.0))
    memory_of_p = states.flat(p)
    memory_of_p[dropped] = 0.0 if "anchor" not in held else _anchors(held, p, dropped)
    rest = memory_of_p[change.grown].clone()  # what stands there without training: the anchor of what grows
    if new_value is not None:
        memory_of_p[change.grown] = new_value

    def fresh(name: str, dtype: torch.dtype) -> Tensor:
        if name == "anchor":
            return rest
        if name == "master":
            return memory_of_p[change.grown].to(dtype)
        if seeded and name in _SEEDED and change.gradient is not None:
            g = change.gradient.float()
            return ((1 - betas[0]) * g if name == "exp_avg" else (1 - betas[1]) * g * g).to(dtype)
        return states.in_order(states.start(optimizer, name, param, group, dtype), p)[change.grown]

    moved = [k for k in (*rule.states, "master", "remainder", "anchor") if k in held]
    if is_compact(held):
        states.unsqueeze(held, p)
        _move_compact(held, moved, fresh, change, rule.aux, 1.0 if seeded else 0.0)
    else:
        for name in (k for k in moved if k != "anchor"):  # a dense anchor never changes
            whole = states.flat(held[name])
            if name == "master":
                whole[dropped] = memory_of_p[dropped].to(whole.dtype)
            else:
                whole[dropped] = states.in_order(states.start(optimizer, name, param, group, whole.dtype), p)[dropped]
            whole[change.grown] = fresh(name, whole.dtype)
    packed = pack_mask(now.as_strided(p.shape, p.stride()) if p.numel() else now.view(p.shape), p)
    optimizer._masks[param] = held["mask"] = packed
    return packed


def memory(t: Tensor, like: Tensor) -> Tensor:
    """``t`` in the memory order of ``like``."""
    return t if t.stride() == like.stride() else torch.empty_strided(like.shape, like.stride(), dtype=t.dtype, device=t.device).copy_(t)


def _anchors(held: dict[str, Any], p: Tensor, where: Tensor) -> Tensor:
    """Anchor values of the elements where `where` is set, in memory order."""
    if not is_compact(held):
        return states.flat(held["anchor"])[where]
    whole = states.flat(p).clone()
    whole[states.index_of(held, p).long()] = held["anchor"]
    return whole[where]


def _move_compact(
    held: dict[str, Any], names: list[str], fresh: Callable[[str, torch.dtype], Tensor], change: _Change, aux: dict[str, float], step: float
) -> None:
    """Drops and appends in the compact arrays; what grew joins as the last cohort, or the last one if that is as old."""
    stay = change.kept[held["index"].long()]
    counts = [(i, int(stay[first:end].sum())) for i, first, end in states.cohorts(held)]
    clocks = {k: held[k].view(-1).tolist() for k in ("step", *aux)}
    ages = [(tuple(clocks[k][i] for k in clocks), count) for i, count in counts if count]
    new_age = (step, *aux.values())
    if ages and ages[-1][0] == new_age:
        ages[-1] = (new_age, ages[-1][1] + change.grown.numel())
    else:
        ages.append((new_age, change.grown.numel()))
    for name in names:
        held[name] = torch.cat([held[name][stay], fresh(name, held[name].dtype)])
    held["index"] = torch.cat([held["index"][stay], change.grown.to(held["index"].dtype)])
    one = len(ages) == 1
    for j, k in enumerate(clocks):
        values = torch.tensor([age[j] for age, _ in ages], dtype=held[k].dtype, device=held[k].device)
        held[k] = values.view(()) if one else values
    held.pop("cohorts", None)
    if not one:
        held["cohorts"] = torch.tensor([0, *[count for _, count in ages[:-1]]], dtype=torch.int64, device="cpu").cumsum(0)

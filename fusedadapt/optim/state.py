"""What an optimizer keeps between steps: states, masks, master weights."""

from __future__ import annotations

import importlib
import math
import numbers
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import coded, compact
from .spec import CODED, RULES, STATE_DTYPES, Rule
from .table import has_order, is_dense, local, memory_order

if TYPE_CHECKING:
    from .base import FusedOptimizer
    from .plans import Entry


def distributed() -> ModuleType:
    return importlib.import_module("fusedadapt.integrations.distributed")


def one_of(op: str, name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{op}: expected {name} to be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return value


def is_flat(p: Tensor) -> bool:
    """Whether FSDP1 flattened the parameter, or it is the flat one: its gradient is a shard that does not say so, and in backward not reduced."""
    return bool(getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False))


def _several() -> bool:
    """Whether there are other processes, which could hold shards."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def names(groups: list[dict[str, Any]]) -> list[str]:
    out = []
    for i, group in enumerate(groups):
        given = group.get("param_names")
        out += [given[k] if given else f"parameter {k} of group {i}" for k in range(len(group["params"]))]
    return out


# --- checks before anything is written ---------------------------------------------------------------------------------------------------


def check_params(opt: FusedOptimizer, group: dict[str, Any]) -> None:
    op = type(opt).__name__
    coded.check_group(opt, group)
    for k, p in enumerate(group["params"]):
        name = group["param_names"][k] if "param_names" in group else f"parameter {k}"
        if not p.requires_grad and not p.is_floating_point():
            continue  # packed weights among model.parameters(), which never get a gradient
        if p.is_complex():
            raise ValueError(f"{op}: expected real parameters; got {name} with {p.dtype}; pass torch.view_as_real of it as the parameter")
        if not p.is_floating_point():
            raise ValueError(f"{op}: expected floating-point parameters; got {name} with {p.dtype}; leave it out of the optimizer")
        check_half(opt, p, name, RULES[opt._rule(group)])
        if opt.max_grad_norm is not None and is_flat(p) and _several():
            raise ValueError(
                f"{op}: expected max_grad_norm=None with FSDP1; got {opt.max_grad_norm} and {name}, flattened: each process would clip by the norm "
                "of its own shards; call FullyShardedDataParallel.clip_grad_norm_ before the step, or use fully_shard (FSDP2)"
            )


def check_half(opt: FusedOptimizer, p: Tensor, name: str, rule: Rule) -> None:
    """Raises ValueError where an fp16 parameter would get states, or lose a master weight, that nobody chose."""
    op = type(opt).__name__
    if p.dtype == torch.float16 and opt.state_dtype is None and rule.states:
        raise ValueError(
            f"{op}: expected a state dtype for the fp16 parameter {name}; fp16 states underflow and give infinite steps; "
            'pass state_dtype="fp32" (or "fp16" if that is really meant)'
        )
    if p.dtype == torch.float16 and opt.master_weights == "split":
        raise ValueError(f'{op}: expected bf16 parameters with master_weights="split"; got {name} with {p.dtype}; use "fp32"')


def number(value: Any) -> float | None:
    """What a hyper-parameter says: a number of Python's or NumPy's, or a tensor or array that holds one. None for anything else."""
    if isinstance(value, Tensor | np.ndarray):
        value = value.item() if math.prod(value.shape) == 1 else None
    return float(value) if isinstance(value, numbers.Real) else None


def not_negative(op: str, name: str, value: Any) -> float:
    """What a hyper-parameter says; raises ValueError unless it is a finite number >= 0."""
    found = number(value)
    if found is None or not 0.0 <= found < math.inf:
        raise ValueError(f"{op}: expected {name} >= 0 and finite; got {value!r}")
    return found


def may_change_in_place(group: dict[str, Any]) -> bool:
    """Whether a hyper-parameter is a tensor, an array or a list, so that it must be read at every step (a Tensor lr is in any case)."""
    kept = ((k, v) for k, given in group.items() if k not in ("params", "param_names") for v in (given, *(given if k == "betas" else ())))
    return any(isinstance(v, Tensor | np.ndarray | list) and not (k == "lr" and isinstance(v, Tensor)) for k, v in kept)


def check_hypers(opt: FusedOptimizer, group: dict[str, Any], fields: dict[str, float]) -> None:
    op = type(opt).__name__
    labels = {"l2": "weight_decay", "decoupled": "weight_decay", "fixed": "weight_decay"}
    if "betas" not in group:
        labels["beta2"] = "rho" if "rho" in group else "alpha"

    def refuse(what: str, value: Any, expected: str) -> None:
        raise ValueError(f"{op}: expected {what} {expected}; got {value!r}")

    if group.get("differentiable"):
        raise ValueError(f"{op}: expected differentiable=False; a fused step has no autograd graph; use torch.optim for that")
    seed = group.get("seed", 0)
    if not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < 2**64:
        refuse("seed", seed, "to be an integer from 0 to 2^64 - 1")
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        refuse("a Tensor lr", tuple(lr.shape), "with one element")
    for name, given in fields.items():
        if name in ("sign", "rectify", "degenerated", "amsgrad", "nesterov"):
            continue
        label, value = labels.get(name, name), number(given)
        if value is None or math.isnan(value) or (math.isinf(value) and name != "clip"):
            refuse(label, given, "to be a finite number")
        elif name in ("beta1", "beta2", "beta3") and not (0.0 <= value < 1.0 or (value == 1.0 and opt.closed_betas)):
            refuse(label, value, "in [0, 1]" if opt.closed_betas else "in [0, 1)")
        elif name in ("lr", "eps", "l2", "decoupled", "momentum", "rho", "lr_decay") and value < 0:
            refuse(label, value, ">= 0")


def check_seeds(opt: FusedOptimizer, groups: list[dict[str, Any]]) -> None:
    """Raises ValueError unless groups that belong together have one seed, where it decides anything."""
    seeds = [group.get("seed", 0) for group in groups] if opt.stochastic_rounding else []
    for i, seed in enumerate(seeds):
        if seed != seeds[0]:
            raise ValueError(
                f"{type(opt).__name__}: expected one seed for all groups: a parameter's bits come from it and the parameter's number; got {seed} in "
                f"group {i}, and {seeds[0]} in group 0; give all groups the same"
            )


def check_held(opt: FusedOptimizer, p: Any, name: str) -> None:
    """Raises ValueError on what cannot be among parameters and states; of a state that somebody put in place without `load_state_dict` (torch's
    ZeroRedundancyOptimizer does), makes the step count one as we keep it."""
    if not isinstance(p, Tensor):
        raise ValueError(f"{type(opt).__name__}: expected tensors in param_groups; got {p!r} as {name}; use add_param_group, or take it out")
    state = opt.state.get(p, {})
    if not isinstance(state, dict):
        got = type(state).__name__
        raise ValueError(f"{type(opt).__name__}: expected the state of {name} as a dict; got {got}; use load_state_dict, or dict() of it")
    step = state.get("step")
    if isinstance(step, numbers.Real) or (isinstance(step, Tensor) and step.dtype == torch.float64):
        state["step"] = torch.as_tensor(step, dtype=torch.float32, device=local(p.detach()).device)


# --- states ------------------------------------------------------------------------------------------------------------------------------


class Arena:
    """Memory for the states of small tensors, one after the other: a step over thousands of them then reads a stream, which the hardware fetches
    ahead, and not thousands of places. Each is a tensor of its own, no view of another; some share a storage, at most ``BLOCK`` bytes."""

    LARGEST = 2**16  # bytes of a state that comes here
    BLOCK = 2**20
    ALIGN = 64  # a cache line belongs to one state

    def __init__(self, sizes: list[int]) -> None:
        """``sizes``: bytes of the states to come; a block is no longer than what they need."""
        self._left = sum(self._room(size) for size in sizes if size <= self.LARGEST)
        self._blocks: dict[tuple[torch.device, torch.dtype], tuple[Tensor, int]] = {}

    def _room(self, size: int) -> int:
        return -(-size // self.ALIGN) * self.ALIGN

    def full_like(self, p: Tensor, start: float, dtype: torch.dtype) -> Tensor:
        """`torch.full_like` in the memory order of ``p``."""
        room = self._room(p.numel() * dtype.itemsize)
        if type(p) is not Tensor or not p.is_contiguous() or not 0 < room <= self.LARGEST:
            return torch.full_like(p, start, dtype=dtype, memory_format=torch.preserve_format)
        block, used = self._blocks.get((p.device, dtype), (None, 0))
        if block is None or used + room > block.nbytes:
            block, used = torch.zeros(max(room, min(self._left, self.BLOCK)) // dtype.itemsize, dtype=dtype, device=p.device), 0
        self._blocks[p.device, dtype] = (block, used + room)
        self._left -= room
        state = torch.empty(0, dtype=dtype, device=p.device).set_(block.untyped_storage(), used // dtype.itemsize, p.shape, p.stride())
        return state.fill_(start) if start else state


def fresh_states(opt: FusedOptimizer, entries: list[Entry], rule: Rule, whole: bool = True) -> list[dict[str, Tensor]]:
    """Start values for parameters that meet their first gradient. 0-d scalars of one call are views of one buffer: thousands of them would
    otherwise be thousands of allocations. ``whole=False``: without copies of the parameters, which may have other values when that gradient comes."""
    for e in entries:  # again: the model may have been converted since the optimizer was built
        check_half(opt, e.param, e.name, rule)
    steps: dict[torch.device, Tensor] = {}
    arena, out = Arena([e.param.numel() * state_dtype(opt, e.param).itemsize for e in entries for _ in rule.states]), []
    for device in {local(e.param.detach()).device for e in entries}:
        steps[device] = torch.zeros(len(entries), dtype=torch.float32, device=device)
    for k, e in enumerate(entries):
        p, group = e.param.detach(), opt.param_groups[e.group]
        dtype = state_dtype(opt, p)
        new: dict[str, Tensor] = {"step": steps[local(p).device][k]}
        index = compact.fresh_index(opt, e.param)
        for name in rule.states:
            start = opt._initial(name, e.param, group)
            like = p if index is None else index
            if (form := coded.wanted(opt, name, p, like.numel())) and isinstance(start, float | int) and start == 0:
                new.update(coded.zeros(name, like, form))
                continue
            if isinstance(start, Tensor):
                new[name] = compact.take(start.detach(), p, index if start.shape == p.shape else None).to(dtype)
            elif index is not None:
                new[name] = torch.full(index.shape, start, dtype=dtype, device=p.device)
            else:
                new[name] = arena.full_like(p, start, dtype)
            if form:
                new.update(coded.encode({}, name, new[name], form))
        for name, value in rule.aux.items():
            new[name] = torch.tensor(value, dtype=torch.float64, device=local(p).device)
        if e.param in opt._masks:
            new["mask"] = opt._masks[e.param]
        if index is not None:
            new["index"] = index
        if whole:
            complete(opt, p, new)
        if index is not None:
            compact.squeeze(new, p, rule)
        coded.note_order(new, local(p))
        out.append(new)
    return out


def lacking(opt: FusedOptimizer, p: Tensor, state: dict[str, Any]) -> list[str]:
    """What a state has not that holds the parameter's own values: its master weight or remainder, its anchor."""
    wanted = [opt._extra_key] if opt.master_weights and p.dtype in (torch.bfloat16, torch.float16) else []
    wanted += ["anchor"] if opt.decay_to == "init" else []
    return [k for k in wanted if k not in state] if "step" in state else []


def complete(opt: FusedOptimizer, p: Tensor, state: dict[str, Any]) -> None:
    """Makes what is `lacking`: in a fresh state, and in one that was saved without, or whose model was converted in mid-run. Where states are used,
    and not where they are loaded: the model may be loaded after its optimizer."""
    q = p.detach()
    for name in lacking(opt, p, state):
        index = compact.chosen(state, q)
        mine = q if index is None and name != "anchor" else compact.take(q, q, index)
        state[name] = mine if name == "anchor" else mine.float() if name == "master" else torch.zeros_like(mine, dtype=torch.int16)


def state_dtype(opt: FusedOptimizer, p: Tensor) -> torch.dtype:
    if p.dtype == torch.float64:
        return torch.float64
    if opt.state_dtype in CODED:  # what is not coded: small tensors, and states a rule must have in full
        return torch.float32
    return p.dtype if opt.state_dtype is None else STATE_DTYPES[opt.state_dtype]


# --- masks: one bit per element, in the parameter's memory order, words of 32, lowest bit first ------------------------------------------


def pack_masks(opt: FusedOptimizer, masks: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    op, mine = type(opt).__name__, [p for g in opt.param_groups for p in g["params"]]
    out = {}
    for p, mask in masks.items():
        if not isinstance(p, Tensor):
            raise ValueError(f"{op}: expected masks={{parameter: mask}}; got {p!r} as a key; pass the parameter itself")
        k = next((i for i, q in enumerate(mine) if q is p), None)
        if k is None:
            raise ValueError(f"{op}: expected masks for this optimizer's parameters; got one for another tensor of shape {tuple(p.shape)}")
        mask = mask.to_bool() if hasattr(mask, "to_bool") else mask
        if not isinstance(mask, Tensor):
            raise ValueError(f"{op}: expected masks of bool tensors or sparse.Mask; got {type(mask).__name__} for {names(opt.param_groups)[k]}")
        if mask.dtype != torch.bool or mask.shape != p.shape:
            name = names(opt.param_groups)[k]
            raise ValueError(f"{op}: expected a bool mask of shape {tuple(p.shape)} for {name}; got {mask.dtype} of shape {tuple(mask.shape)}")
        out[p] = pack_mask(local(mask), local(p.detach()))
        opt._orders[p] = tuple(local(p.detach()).stride())
    return out


def pack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """bool of ``like``'s shape -> int32 words on ``like``'s device."""
    if like.numel() and not is_dense(like):
        raise ValueError(f"mask: expected a parameter without gaps in memory; got strides {tuple(like.stride())}")
    flat = memory_order(mask.to(like.device), like).as_strided((like.numel(),), (1,))
    words = (like.numel() + 31) // 32
    padded = torch.zeros(words * 32, dtype=torch.int64, device=like.device)
    padded[: like.numel()] = flat
    packed = (padded.view(words, 32) << torch.arange(32, device=like.device)).sum(1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def reorder_mask(words: Tensor, p: Tensor, order: tuple[int, ...]) -> Tensor:
    """Words that were packed when ``p`` had the strides ``order``, for the ones it has now."""
    return words if has_order(p, order) else pack_mask(unpack_mask(words, torch.empty_strided(p.shape, order, device="meta")), p)


def unpack_mask(words: Tensor, like: Tensor) -> Tensor:
    bits = (words[:, None] >> torch.arange(32, device=words.device, dtype=torch.int32)) & 1
    flat = bits.reshape(-1)[: like.numel()].bool()
    return flat.as_strided(like.shape, like.stride()) if like.numel() else flat.view(like.shape)


# --- where the elements of a local tensor stand in the global one: keys the random bits --------------------------------------------------


def index_map(p: Tensor) -> tuple[int, int, int]:
    """(base, inner, outer): element i of this process's memory is global element base + (i // inner) * outer + i % inner. inner 0: all of it."""
    if not hasattr(p, "_local_tensor"):
        return 0, 0, 0
    return distributed().index_map(p)


def global_index(p: Tensor, index: Tensor | None = None) -> np.ndarray:
    """uint64 global element number of each element of the local tensor, in the order of its memory, arranged as the local tensor is; with ``index``,
    of these positions in its memory."""
    base, inner, outer = index_map(p)
    t = local(p.detach())
    i = torch.arange(t.numel(), device="cpu") if index is None else index.cpu()
    element = base + i if inner <= 0 else base + i // inner * outer + i % inner
    if index is not None:
        return element.numpy().astype(np.uint64)
    return element.as_strided(t.shape, t.stride()).contiguous().view(-1).numpy().astype(np.uint64) if t.numel() else element.numpy().astype(np.uint64)

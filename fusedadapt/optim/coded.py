"""States of one byte an element: ``state_dtype="int8"`` and ``"fp8"`` (formats: `fusedadapt.reference.lowbit`).

A coded state ``exp_avg`` is uint8 in the shape and memory order of its parameter (or a vector, where states are compact), with ``exp_avg_scale``
beside it: fp32, one number a block (int8) or two (fp8). Blocks run over the memory of the local tensor; in a compact state each cohort starts a block
of its own. The size of a block is not stored: it is the power of two that gives as many blocks as there are scales. ``strides`` is kept with the
state of a parameter that is not contiguous: a file may hold the codes in another order than the blocks run over them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..reference import lowbit
from .spec import CODED, RULES, STATE_DTYPES, UNCODABLE, UNCODED, UNSIGNED, is_compact
from .table import flat, local

if TYPE_CHECKING:
    from .base import FusedOptimizer

LEAST_NUMEL = 4096
BLOCKS = tuple(2**k for k in range(5, 12))  # words of a mask; the smallest chunk of a sweep


class Format(NamedTuple):
    kind: str  # of fusedadapt.reference.lowbit
    block: int


def scale_key(name: str) -> str:
    return f"{name}_scale"


def names(state: dict[str, Any]) -> list[str]:
    """The coded states of a parameter."""
    return [k for k in state if scale_key(k) in state]


def check_options(op: str, state_dtype: str | None, block: int | None) -> int:
    """The block size to use; raises ValueError."""
    if block is None:
        return CODED.get(state_dtype or "", 0)
    if state_dtype not in CODED:
        raise ValueError(f'{op}: expected state_dtype "int8" or "fp8" with state_block; got {state_dtype!r}; other states have no blocks')
    if block not in BLOCKS:
        raise ValueError(f"{op}: expected state_block to be one of {', '.join(map(str, BLOCKS))}; got {block!r}")
    return block


def check_group(opt: FusedOptimizer, group: dict[str, Any]) -> None:
    """Raises ValueError where a rule or a parameter cannot have coded states."""
    if opt.state_dtype not in CODED:
        return
    op, rule = type(opt).__name__, opt._rule(group)
    if rule in UNCODABLE:
        raise ValueError(f'{op}: expected state_dtype=None, "fp32" or "bf16" here; got "{opt.state_dtype}"; {UNCODABLE[rule]}')
    for p in group["params"]:
        if hasattr(p, "_local_tensor"):
            raise ValueError(
                f'{op}: expected plain tensors with state_dtype="{opt.state_dtype}"; got a DTensor; its scales would belong to one shard: use "bf16"'
            )


def _kind(name: str, fp8: bool) -> str:
    return "expanded" if fp8 else "unsigned" if name in UNSIGNED else "signed"


def _sizes(state: dict[str, Any], numel: int) -> list[int]:
    """Elements of the stretches that start a block of their own."""
    starts = state["cohorts"].tolist() if state.get("cohorts") is not None else [0]
    return [end - first for first, end in zip(starts, [*starts[1:], numel], strict=True)]


def _count(sizes: Iterable[int], block: int) -> int:
    return sum(-(-n // block) for n in sizes)


def format_of(state: dict[str, Any], name: str) -> Format | None:
    """How a state is coded, None if it is not; raises ValueError if its scales do not fit it."""
    scale = state.get(scale_key(name))
    if scale is None:
        return None
    sizes = _sizes(state, state[name].numel())
    block = next((b for b in BLOCKS if _count(sizes, b) == scale.shape[0]), 0)
    if not block or scale.dtype != torch.float32 or state[name].dtype != torch.uint8 or scale.shape[1:] not in ((), (2,)) or name in UNCODED:
        raise ValueError(f"{scale.dtype} scales of shape {tuple(scale.shape)} beside {state[name].dtype} codes of shape {tuple(state[name].shape)}")
    return Format(_kind(name, scale.dim() == 2), block)


def formats(state: dict[str, Any]) -> dict[str, Format]:
    """Of all coded states of a parameter."""
    return {k: form for k in names(state) if (form := format_of(state, k)) is not None}


def decode(state: dict[str, Any], name: str, part: tuple[int, slice] | None = None) -> Tensor:
    """A coded state, or cohort ``part[0]`` of it (elements ``part[1]``), as fp32 in the same memory order; any other state as it is."""
    form, codes = format_of(state, name), state[name]
    if form is None:
        return codes if part is None else codes[part[1]]
    pieces, at, first = [], 0, 0
    for c, n in enumerate(_sizes(state, codes.numel())):
        rows = slice(at, at + _count([n], form.block))
        if part is None or part[0] == c:
            pieces.append(lowbit.decode(flat(codes)[first : first + n], state[scale_key(name)][rows], *form))
        at, first = rows.stop, first + n
    out = torch.cat(pieces) if len(pieces) != 1 else pieces[0]
    return out if part is not None else out.as_strided(codes.shape, codes.stride()) if codes.numel() else out.view(codes.shape)


def encode(state: dict[str, Any], name: str, values: Tensor, form: Format) -> dict[str, Tensor]:
    """The two entries of the state dict for fp32 ``values``, which fill their memory."""
    parts = [lowbit.encode(piece, *form) for piece in flat(values).split(_sizes(state, values.numel()))]
    codes = torch.cat([c for c, _ in parts])
    codes = codes.as_strided(values.shape, values.stride()) if values.numel() else codes.view(values.shape)
    return {name: codes, scale_key(name): torch.cat([s for _, s in parts])}


def write_(state: dict[str, Any], name: str, values: Tensor, part: tuple[int, slice] | None, keep: Tensor | None) -> None:
    """Encodes what a step made of a state, in place; blocks that hold no trainable element keep codes and scales."""
    form, scale = format_of(state, name), state[scale_key(name)]
    assert form is not None
    codes, first = flat(state[name]), 0
    if part is not None:
        codes = codes[part[1]]
        first = _count(_sizes(state, state[name].numel())[: part[0]], form.block)
    fresh, scales = lowbit.encode(flat(values), *form)
    if keep is not None:
        where = flat(keep)
        live = torch.zeros(len(scales) * form.block, dtype=torch.bool, device=codes.device)
        live[: where.numel()] = where
        live = live.view(-1, form.block).any(1)
        fresh = torch.where(live.repeat_interleave(form.block)[: codes.numel()], fresh, codes)
        old = scale[first : first + len(scales)]
        scales = torch.where(live.view(-1, *[1] * (scales.dim() - 1)), scales, old)
    codes.copy_(fresh)
    scale[first : first + len(scales)].copy_(scales)


# --- making them, and their way through checkpoints --------------------------------------------------------------------------------------


def wanted(opt: FusedOptimizer, name: str, p: Tensor, numel: int) -> Format | None:
    """How a fresh state of so many elements is to be coded."""
    if opt.state_dtype not in CODED or name in UNCODED or numel < LEAST_NUMEL or p.dtype == torch.float64:
        return None
    return Format(_kind(name, opt.state_dtype == "fp8"), opt.state_block)


def zeros(name: str, like: Tensor, form: Format) -> dict[str, Tensor]:
    """A state of zeros, of the shape and memory order of ``like``."""
    blocks = _count([like.numel()], form.block)
    scale = torch.zeros(blocks, dtype=torch.float32, device=like.device)
    if form.kind == "expanded":
        scale = torch.stack([scale, torch.ones_like(scale)], 1)
    return {name: torch.full_like(like, lowbit.zero_code(form.kind), dtype=torch.uint8, memory_format=torch.preserve_format), scale_key(name): scale}


def note_order(state: dict[str, Any], p: Tensor) -> None:
    """Keeps the parameter's strides where blocks of a dense state follow another order than a file's."""
    state.pop("strides", None)
    if names(state) and not is_compact(state) and not p.is_contiguous():
        state["strides"] = tuple(p.stride())


def check_saved(op: str, label: str, saved: dict[str, Any]) -> None:
    for name in names(saved):
        try:
            if not isinstance(saved.get(name), Tensor):
                raise ValueError("scales without codes")
            format_of(saved, name)
        except ValueError as error:
            raise ValueError(f"{op}: expected one scale per block for {name} of {label}; got {error}; it is damaged or of another kind") from None


def saved_order(saved: dict[str, Any], p: Tensor) -> tuple[int, ...]:
    """The strides ``p`` had when its state was saved: row-major ones unless the state says others."""
    return tuple(int(n) for n in saved.get("strides", torch.empty(p.shape, dtype=p.dtype, device="meta").stride()))


def place(state: dict[str, Any], saved: dict[str, Any], p: Tensor) -> None:
    """After loading: codes whose blocks ran over another memory order than ``p`` has are coded anew."""
    order = saved_order(saved, p)
    if not is_compact(state) and names(state) and order != tuple(p.stride()) and p.numel():
        for name, form in formats(state).items():
            before = torch.empty_strided(p.shape, order, dtype=torch.uint8, device=p.device).copy_(state[name])
            values = decode(state | {name: before}, name)
            state.update(encode(state, name, torch.empty_strided(p.shape, p.stride(), dtype=values.dtype, device=p.device).copy_(values), form))
    note_order(state, p)


@contextmanager
def unpacked(state: dict[str, Any]) -> Iterator[None]:
    """Inside, the coded states are fp32 ones; they may be replaced, and are coded again at the end."""
    forms = formats(state)
    for name in forms:
        state[name] = decode(state, name)
    for name in forms:
        del state[scale_key(name)]
    try:
        yield
    finally:
        for name, form in forms.items():
            state.update(encode(state, name, state[name], form))


def encode_loaded(opt: FusedOptimizer) -> None:
    """Gives the states that another optimizer kept in full the dtype, or the code, that was asked for."""
    plain = STATE_DTYPES.get(opt.state_dtype or "")
    for group in opt.param_groups:
        for p in group["params"]:
            state = opt.state.get(p, {})
            for name in RULES[opt._rule(group)].states:
                form = wanted(opt, name, p, state[name].numel()) if name in state and scale_key(name) not in state else None
                if form is not None:
                    state.update(encode(state, name, state[name].float(), form))
                elif plain is not None and name in state and p.dtype != torch.float64:
                    state[name] = state[name].to(plain)
            if state:
                note_order(state, local(p.detach()))
    opt._reset()


def decoded(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with fp32 states in place of coded ones."""
    out = {}
    for i, state in state_dict["state"].items():
        dropped = {scale_key(k) for k in names(state)} | {"strides"}
        out[i] = {k: decode(state, k) if scale_key(k) in state else v for k, v in state.items() if k not in dropped}
    return state_dict | {"state": out}

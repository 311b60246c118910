"""`--sparse DENSITY`: train a share of the encoder's weights and leave the others' bits alone. Which ones is decided once, before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import compact
from ..optim.spec import is_compact
from ..sparse import Mask, SparseDelta, topk_mask
from .errors import FinetuneError

#: what a user may name -> what it keeps
SELECT = {"magnitude": "the largest weights", "gradient": "the largest |weight x gradient| on the first batch"}
#: a share of the weights learns like the whole model does only at a larger step
LR_FACTOR = 4.0
MASK_STATE = "compact"
DELTA = "delta.safetensors"

Masks = dict[str, Mask]


def choose(model: nn.Module, density: float, select: str) -> Masks:
    """Masks of all parameters: exactly floor(density * their number) elements of all of them together. "gradient" reads ``.grad`` and drops it.

    Raises:
        FinetuneError: that is none.
    """
    params = dict(model.named_parameters())
    if not int(density * (n := sum(p.numel() for p in params.values()))):
        raise FinetuneError(f"finetune: expected --sparse to choose at least one of {n} weights; got {density:g}; use {1 / n:.1g} or more")
    weights = {name: p.detach() for name, p in params.items()}
    if select == "magnitude":
        return dict(topk_mask(weights, density=density))
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in params.items()}
    masks = dict(topk_mask(weights, density=density, score="abs_product", other=grads))
    model.zero_grad(set_to_none=True)
    return masks


def options(model: nn.Module, masks: Mapping[str, Mask]) -> dict[str, Any]:
    """The optimizer's arguments. Tensors of which nothing is chosen are frozen, so that they cost neither gradient nor state."""
    chosen = {name: p for name, p in model.named_parameters() if masks[name].nnz}
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    return {"masks": {p: masks[name] for name, p in chosen.items()}, "mask_state": MASK_STATE}


def packed(masks: Mapping[str, Mask]) -> dict[str, Any]:
    """What a checkpoint keeps of them."""
    return {name: (mask.words.cpu(), tuple(mask.shape)) for name, mask in masks.items()}


def unpacked(stored: Mapping[str, Any], device: str) -> Masks:
    """The inverse of `packed`."""
    return {name: Mask(words, shape).to(device) for name, (words, shape) in stored.items()}


@dataclass
class Summary:
    """Elements trained and in all; bytes of the optimizer's state, and what it would take with states of its tensors' shapes; the delta's
    entries and bytes on disk; elements outside the masks whose bits changed (0, or something is wrong)."""

    trained: int
    parameters: int
    state_bytes: int
    dense_state_bytes: int
    delta_entries: int
    delta_bytes: int
    frozen_changed: int


def state_bytes(optimizer: Any) -> tuple[int, int]:
    """Bytes of all tensors in the optimizer's state, masks included: as they are, and as they would be in the shapes of their parameters."""
    held = dense = 0
    for p, state in optimizer.state.items():
        chosen = (compact.count(state),) if is_compact(state) else None
        for name, t in state.items():
            if isinstance(t, Tensor):
                held += t.nbytes
                dense += 0 if name in ("index", "prefix") else p.numel() * t.itemsize if t.shape == chosen else t.nbytes
    return held, dense


def finish(base: Mapping[str, Tensor], final: Mapping[str, Tensor], masks: Mapping[str, Mask], optimizer: Any, folder: Path) -> Summary:
    """Saves what was trained as a `SparseDelta` beside the model, and counts. ``base``, ``final``: weights before and after, on the CPU."""
    on_cpu = {name: mask.to("cpu") for name, mask in masks.items()}
    delta = SparseDelta.from_diff(base, final, masks=on_cpu, kind="set")
    delta.save(folder / DELTA)
    changed = SparseDelta.from_diff(base, final, kind="set").masks()
    outside = sum((mask - on_cpu[name]).nnz for name, mask in changed.items())
    trained, every = sum(mask.nnz for mask in on_cpu.values()), sum(mask.numel() for mask in on_cpu.values())
    return Summary(trained, every, *state_bytes(optimizer), delta.nnz, (folder / DELTA).stat().st_size, outside)

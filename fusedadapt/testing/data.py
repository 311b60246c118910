"""The tensors of a case: parameters, gradients, masks, with the memory layout the case asks for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .cases import Case, TensorSpec
from .hostile import Shape, hostile_gradient


def _strides(shape: Shape, order: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a gap-free tensor whose dimensions lie in memory in this order, outermost first."""
    out, step = [0] * len(shape), 1
    for dim in reversed(order):
        out[dim] = step
        step *= max(shape[dim], 1)
    return tuple(out)


def _place(values: Tensor, strides: tuple[int, ...], span: int, offset: int, device: torch.device) -> Tensor:
    """``values`` with these strides, starting ``offset`` elements past a 16-byte boundary."""
    room = torch.zeros(span + offset + 16, dtype=values.dtype, device=device)
    start = -room.data_ptr() % 16 // room.element_size() + offset
    return room.as_strided(values.shape, strides, start).copy_(values)


def parameter(case: Case, index: int, device: torch.device) -> Tensor:
    """The start value: normal numbers with zeros, tiny and large ones among them."""
    spec = case.tensors[index]
    draw = torch.Generator().manual_seed(case.seed * 31 + index)
    flat = torch.randn(math.prod(spec.shape), generator=draw)
    for k, value in enumerate((0.0, -0.0, 1e-30, 300.0)):
        flat[k + 3 :: 13] = value
    values = flat.to(spec.dtype).view(spec.shape)
    return _place(values, _strides(spec.shape, spec.order), values.numel(), spec.offset, device)


def gradient(case: Case, index: int, step: int, device: torch.device) -> Tensor | None:
    """The gradient of step ``step`` (from 0), None where the case leaves it out."""
    spec = case.tensors[index]
    if step in spec.absent:
        return None
    values = hostile_gradient(spec.kind, spec.shape, spec.grad_dtype, (case.seed * 31 + index) * 64 + step)
    if spec.grad_layout == "gapped":
        strides = tuple(2 * s for s in _strides(spec.shape, spec.order))
        return _place(values, strides, 2 * values.numel(), spec.offset, device)
    order = spec.order if spec.grad_layout == "same" else spec.order[::-1]
    return _place(values, _strides(spec.shape, order), values.numel(), spec.offset, device)


def hessian(case: Case, index: int, step: int) -> Tensor:
    """A contiguous fp32 estimate of the Hessian's diagonal, for the rules that want one."""
    draw = torch.Generator().manual_seed((case.seed * 37 + index) * 64 + step)
    return torch.randn(case.tensors[index].shape, generator=draw)


def mask(case: Case, index: int) -> Tensor | None:
    """bool, True = trainable; None without one."""
    spec: TensorSpec = case.tensors[index]
    if not spec.masked:
        return None
    draw = torch.Generator().manual_seed(case.seed * 41 + index)
    return torch.rand(spec.shape, generator=draw) < 0.5


def groups(case: Case, params: list[Any]) -> list[dict[str, Any]]:
    """torch's param groups; every parameter is named by its number."""
    out = []
    for k, options in enumerate(case.groups):
        mine = [i for i, spec in enumerate(case.tensors) if spec.group == k]
        if mine:
            out.append({"params": [(f"tensor {i}", params[i]) for i in mine], **options})
    return out

"""The commonest layer the shortest way: on a CPU, in a dtype its library multiplies, one frozen dense base, one adapter with nothing between A and B.

What lies between the kernels costs 0.16 ms of Python where it is repeated alone, and 1.4 ms after a GEMM has swept the caches, for every line of it
is fetched from memory again: half of what a branch at 1536 -> 384 costs. So this case has a check, a forward and a backward of a few calls each. They
run the kernels that `LowRankLinear` runs otherwise, on the same numbers, and save what it saves: who meets such a node with a compiler or a dispatch
mode in between takes the general way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autocast import autocasting
from ..ops.address import PLAIN, readable
from ..ops.dense import multiplies
from ..ops.lowrank import cpp, cpp_ops, is_direct, native
from ..reference.lowrank import threshold_of

_HALF = (torch.bfloat16, torch.float16)
_fp32 = torch.float32
#: where `LowRankLinear`'s tensors begin among its arguments, and among them those of such a plan
FIRST = 5
_WEIGHT, _BIAS, _A, _B = 0, 1, 7, 8


class PlainPlan(tuple):  # type: ignore[type-arg]
    """A `Plan` of one such output. x and dy then keep their leading dimensions: views cost autograd a node each."""

    __slots__ = ()


def _readable(t: Any, dtype: torch.dtype, *shape: int) -> bool:
    return readable(t) and t.dtype is dtype and t.shape == shape


def plan_of(x: Any, outputs: Sequence[Any], col_scale: Any) -> PlainPlan | None:
    """The plan, if the call is such a one; None leaves it, and what may be wrong with it, to the general way."""
    if torch.compiler.is_compiling() or len(outputs) != 1 or col_scale is not None:
        return None
    weight, bias, segments, row_scale, _ = outputs[0]
    if len(segments) != 1 or row_scale is not None or type(weight) not in PLAIN:
        return None
    a, b, scaling, p, rank_gate, token_gate, core, activation = segments[0]
    if rank_gate is not None or token_gate is not None or core is not None or activation is not None:
        return None
    if type(scaling) is not float or type(p) is not float or not 0.0 <= p < 1.0 or type(a) not in PLAIN or type(x) not in PLAIN:
        return None
    if weight.dim() != 2 or a.dim() != 2 or weight.requires_grad or not x.dim() or not x.numel() or not a.shape[0] or not weight.shape[0]:
        return None
    n, k, rank = weight.shape[0], weight.shape[1], a.shape[0]
    data, adapters = x.dtype, a.dtype
    if data is not _fp32 and (data not in _HALF or not multiplies(data)) or adapters is not _fp32 and adapters is not data or x.shape[-1] != k:
        return None
    if not (_readable(x, data, *x.shape) and _readable(weight, data, n, k) and _readable(a, adapters, rank, k) and _readable(b, adapters, n, rank)):
        return None
    if bias is not None and (bias.requires_grad or not _readable(bias, data, n)):
        return None
    if autocasting("cpu") or not native(x):
        return None
    return PlainPlan((((None,), False, "", n, k),))


def factors(tensors: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """weight, bias, A, B."""
    return tensors[_WEIGHT], tensors[_BIAS], tensors[_A], tensors[_B]


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.view(-1, t.shape[-1])


def forward(ctx: Any, plan: PlainPlan, x: Tensor, seed: Tensor | None, numbers: Any, tensors: Sequence[Tensor | None]) -> tuple[Tensor]:
    """`LowRankLinear.forward` of such a plan. x: [..., K], contiguous."""
    ((scaling, p),), weight, bias, a, b = numbers, *factors(tensors)
    y, u = x.new_empty(*x.shape[:-1], b.shape[0]), x.new_empty(x.numel() // x.shape[-1], a.shape[0], dtype=_fp32)
    rows, out, adapter = _rows(x), _rows(y), (a, b, scaling, 0 if seed is None else threshold_of(p))
    if y.dtype is _fp32:
        cpp().branch_start(rows, adapter, seed, bias, u, out)
        out.addmm_(rows, weight.t())
    else:
        if bias is None:
            torch.mm(rows, weight.t(), out=out)
        else:
            torch.addmm(bias, rows, weight.t(), out=out)
        cpp().branch_start(rows, adapter, seed, None, u, out)
    wanted = ctx.needs_input_grad
    ctx.plan, ctx.device_type, ctx.ops, ctx.numbers = plan, "cpu", cpp_ops(), numbers
    ctx.save_for_backward(x if True in wanted and wanted[FIRST + _A] else None, None, seed, None, u, None, *tensors)
    ctx.set_materialize_grads(False)
    return (y,)


def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...] | None:
    """`LowRankLinear.backward`, or None where it must go the general way."""
    wanted = ctx.needs_input_grad
    if not (wanted[FIRST + _A] and wanted[FIRST + _B]) or not is_direct(dy) or not _readable(dy, dy.dtype, *dy.shape):
        return None
    x, _, seed, _, u, _, *tensors = ctx.saved_tensors
    ((scaling, p),), weight, _, a, b = ctx.numbers, *factors(tensors)
    if not (x.is_contiguous() and u.is_contiguous() and a.is_contiguous() and b.is_contiguous()):
        return None  # a saved-tensor hook may bring them back in another order
    da, db, dx = torch.empty_like(a, dtype=_fp32), torch.empty_like(b, dtype=_fp32), torch.empty_like(x) if wanted[1] else None
    rows, into, before = _rows(dy), None if dx is None else _rows(dx), dy.dtype is not _fp32
    if into is not None and before:
        torch.mm(rows, weight, out=into)
    cpp().branch_back(rows, _rows(x), (a, b, scaling, 0 if seed is None else threshold_of(p)), seed, u, da, db, into)
    if into is not None and not before:
        into.addmm_(rows, weight)
    found: list[Tensor | None] = [None] * len(wanted)
    found[1], found[FIRST + _A], found[FIRST + _B] = dx, *(t if a.dtype is _fp32 else t.to(a.dtype) for t in (da, db))
    return tuple(found)

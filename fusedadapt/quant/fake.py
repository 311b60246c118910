"""Fake quantization with gradients: rounding to the levels of a few bits while training in floating point."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..derivatives import first_order, refuse_transforms, remember
from ..ops import fake_quant as ops
from ..ops.quant import misfit
from ..reference.fake_quant import INSIDE, wide
from .formats import whole


class _Plan(NamedTuple):
    """What a call has beside tensors: hashable, so that a compiled graph can be guarded by it."""

    quant_min: int
    quant_max: int
    line: int
    run: int
    divide: bool
    ste: str
    scale_min: float


def _numbers(t: Tensor, x: Tensor) -> Tensor:
    """One a group, as the ops take them."""
    return t.detach().to(wide(x.dtype)).reshape(-1).contiguous()


def _rule(x: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, bounds: Tensor | None, plan: _Plan) -> tuple[Any, ...]:
    s = _numbers(scale, x)
    s = s.clamp(min=plan.scale_min) if plan.scale_min > 0 else s
    others = (None if t is None else _numbers(t, x) for t in (zero, offset))
    return (s, *others, bounds, *plan[:5])


class FakeQuantize(torch.autograd.Function):
    """(plan, x, scale, zero | None, offset | None, bounds | None, grad_scale: tensor | number) -> y. Saves x by reference and the small tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        x: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        offset: Tensor | None,
        bounds: Tensor | None,
        grad_scale: Tensor | float,
    ) -> Tensor:
        remember(ctx)
        ctx.plan, ctx.like_x = plan, (x.dtype, x.shape)
        ctx.number = None if isinstance(grad_scale, Tensor) else grad_scale
        small = any(ctx.needs_input_grad[2:5])
        # Only the mask and the sums read x again.
        kept = x if small or plan.ste != "identity" else None
        ctx.save_for_backward(kept, scale, zero, offset, bounds, grad_scale if isinstance(grad_scale, Tensor) else None)
        y: Tensor = torch.ops.fusedadapt.q_fake(x, *_rule(x, scale, zero, offset, bounds, plan))
        return y

    @staticmethod
    @first_order("fusedadapt.quant.fake_quantize")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero, offset, bounds, factor = ctx.saved_tensors
        _, want_x, want_scale, want_zero, want_offset, _, _ = ctx.needs_input_grad
        plan, sums = ctx.plan, want_scale or want_zero or want_offset
        if not sums and plan.ste == "identity":
            return None, dy, None, None, None, None, None
        rule = _rule(x, scale, zero, offset, bounds, plan)
        dx, d_scale, outside = torch.ops.fusedadapt.q_fake_backward(dy.to(x.dtype), x, *rule, plan.ste, sums)
        factor = ctx.number if factor is None else factor

        def grad(total: Tensor, like: Tensor) -> Tensor:
            total = total * factor
            return (total.sum() if like.numel() == 1 else total).reshape(like.shape).to(like.dtype)

        return (
            None,
            dx if want_x else None,
            grad(d_scale, scale) if want_scale else None,
            grad(-rule[0] * outside, zero) if want_zero else None,
            grad(outside, offset) if want_offset else None,
            None,
            None,
        )


class _Groups(NamedTuple):
    """How x is cut (`fusedadapt.reference.fake_quant.Rule`), how many scales that takes, and how many elements share the last of a line's runs."""

    line: int
    run: int
    scales: int
    last: int


def _groups(x: Tensor, axis: int | None, group_size: int | None) -> _Groups:
    if axis is not None and group_size is not None:
        ops.refuse("axis or group_size, not both", f"axis={axis}, group_size={group_size}", "groups run along the last dimension: leave axis out")
    if (axis is not None or group_size is not None) and x.dim() == 0:
        ops.refuse("at least one dimension with axis or group_size", "a scalar", "leave them out")
    axis = None if axis is None else _whole("axis", axis, "None")
    if group_size is not None:
        group_size = _whole("group_size", group_size, "None")
        if group_size < 1:
            ops.refuse("group_size of at least 1", group_size, "choose how many elements share a scale")
        k = x.shape[-1]
        run = min(group_size, k)
        per_row = -(-k // run) if k else 0
        return _Groups(k, run, math.prod(x.shape[:-1]) * per_row, k - (per_row - 1) * run)
    if axis is None:
        return _Groups(x.numel(), x.numel(), 1, x.numel())
    if not -x.dim() <= axis < x.dim():
        ops.refuse(f"axis within -{x.dim()}..{x.dim() - 1}", axis, "choose a dimension of x")
    inner = math.prod(x.shape[axis % x.dim() + 1 :])
    return _Groups(inner, inner, x.shape[axis], inner)


def _whole(name: str, value: Any, other: str) -> int:
    found = whole(value)
    if found is None:
        ops.refuse(f"{name}: a whole number or {other}", repr(value), "convert it")
    return found


def _number(name: str, value: Any) -> float:
    if isinstance(value, int | float):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        ops.refuse(f"{name}: a number or a tensor", type(value).__name__, "convert it with torch.as_tensor")


def _needed(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """A number or tensor on x's device."""
    return value if isinstance(value, Tensor) else x.new_full((), _number(name, value), dtype=wide(x.dtype))


def _tensor(name: str, value: Tensor | float | None, x: Tensor) -> Tensor | None:
    return None if value is None else _needed(name, value, x)


def _bounds(quant_min: int | Tensor, quant_max: int | Tensor, x: Tensor) -> Tensor | None:
    """The ends of the range as a tensor, if one of them is; whole numbers are checked."""
    if not isinstance(quant_min, Tensor) and not isinstance(quant_max, Tensor):
        ops.check_range(quant_min, quant_max)
        return None
    ends = [torch.as_tensor(b, dtype=wide(x.dtype), device=x.device).detach().reshape(-1) for b in (quant_min, quant_max)]
    return torch.stack(torch.broadcast_tensors(*ends))


def _end(name: str, value: int | Tensor) -> int | Tensor:
    """One end of the range."""
    _check_dense(name, value)
    return value if isinstance(value, Tensor) else _whole(name, value, "a tensor")


def _grad_scale(given: str | float | Tensor | None, x: Tensor, quant_max: int | Tensor, groups: _Groups) -> Tensor | float:
    """What the gradients of scale, zero and offset are multiplied by."""
    if given is None:
        return 1.0
    if isinstance(given, Tensor):
        _check_dense("grad_scale", given)
        if given.numel() not in (1, groups.scales):
            wanted = f"grad_scale: 1 or {groups.scales} elements"
            ops.refuse(wanted, tuple(given.shape), "pass one number, or one for each scale")
        return given.detach().to(x.device, wide(x.dtype)).reshape(-1)
    if given != "lsq":
        if isinstance(given, str):
            ops.refuse('grad_scale "lsq", a number or a tensor', repr(given), "choose one of them")
        return _number("grad_scale", given)
    if isinstance(quant_max, int) and quant_max < 1:
        ops.refuse('quant_max of at least 1 with grad_scale="lsq"', quant_max, "pass a number instead")
    if groups.last == groups.run:
        count: Tensor | float = x.numel() / max(1, groups.scales)
    else:
        sizes = torch.full((-(-groups.line // groups.run),), float(groups.run), dtype=wide(x.dtype), device=x.device)
        sizes[-1] = groups.last
        count = sizes.repeat(groups.scales // sizes.numel())
    total = max(1.0, count) * quant_max if isinstance(count, float) else count * quant_max
    if isinstance(total, Tensor):
        return total.to(x.device, wide(x.dtype)).rsqrt().reshape(-1)
    return total**-0.5


def _checked(x: Tensor, ste: str, scale_min: float) -> float:
    """``scale_min`` as a number."""
    if (got := misfit(x)) is not None:
        ops.refuse("x: a dense tensor in float32, bfloat16, float16 or float64", got, "convert it")
    if not isinstance(ste, str) or ste not in INSIDE:
        ops.refuse(f"ste among {', '.join(INSIDE)}", repr(ste), "choose one of them")
    scale_min = _number("scale_min", scale_min)
    if not 0 <= scale_min < math.inf:
        ops.refuse("scale_min: a number from 0 up", scale_min, "0 uses scales as they are")
    return scale_min


def _check_dense(name: str, t: Any) -> None:
    if isinstance(t, Tensor) and (t.is_nested or t.layout != torch.strided or t.is_complex()):
        ops.refuse(f"{name}: a dense tensor of real numbers", misfit(t), "convert it")


def _check_sizes(x: Tensor, scales: int, s: Tensor, z: Tensor | None, o: Tensor | None) -> None:
    for name, t, sizes in (("scale", s, (scales,)), ("zero_point", z, (1, scales)), ("offset", o, (1, scales))):
        _check_dense(name, t)
        if t is not None and (t.numel() not in sizes or t.device != x.device):
            wanted = f"{name}: {' or '.join(str(n) for n in sizes)} elements on {x.device}"
            ops.refuse(wanted, f"{tuple(t.shape)} on {t.device}", "pass one number a scale, moved there")


def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int | None = None,
    *,
    quant_min: int | Tensor,
    quant_max: int | Tensor,
    axis: int | None = None,
    group_size: int | None = None,
    ste: str = "clamp",
    grad_scale: str | float | Tensor | None = None,
    offset: Tensor | float | None = None,
    divide: bool = False,
    scale_min: float = 0.0,
) -> Tensor:
    """x rounded to the levels scale * (quant_min ... quant_max), in x's dtype, with straight-through gradients for training.

    y = (q - z) * scale + offset with q = clamp(rne((x - offset) / scale) + z, quant_min, quant_max), in fp32 (fp64 for fp64) and rounded once. One
    pass forward, one backward; kept in between are x itself and the small tensors.

    Args:
        x: fp32, bf16, fp16 or fp64, of any shape.
        scale: step between levels: a number or tensor of one element for all of x; with ``axis`` x.shape[axis] elements; with ``group_size``
            x.shape[:-1] + (ceil(x.shape[-1] / group_size),) elements. A scale of 0 gives zeros, NaN gives NaN.
        zero_point: level that stands for 0, rounded to the nearest whole number (ties to even) in the range; an integer, or a tensor of one element
            or of as many as ``scale``. A floating point tensor can be trained.
        quant_min, quant_max: the range, whole numbers up to 2^22. As tensors (of one element, or as many as ``scale``) they may change from call to
            call without compiling again; they get no gradient, and their values are not looked at: an empty range, or ends that are no
            whole numbers, are yours to avoid.
        axis: dimension along which scales differ. None: one scale, or groups.
        group_size: neighbours along the last dimension that share a scale; the last group of a row may be short.
        ste: which elements a gradient passes. "clamp": those with quant_min <= x / scale + z <= quant_max (LSQ, LSQ+, PACT). "round": those whose
            rounded level is in the range, half a step wider (torch.fake_quantize_*). "identity": all (BitNet, StatsQ, AdaDFQ).
        grad_scale: factor on the gradients of scale, zero_point and offset: "lsq" is 1 / sqrt(elements that share a scale * quant_max), else a
            number, or a tensor of one element or as many as ``scale``. None: 1.
        offset: value of level 0 (LSQ+'s beta; y = q * scale + offset), shaped like ``zero_point``; can be trained. A zero point that is not whole
            is the offset -zero_point * scale; levels half a step off zero are the offset scale / 2.
        divide: x / scale is a division, as LSQ's and GPTQ's formulas have it. False: a multiplication by 1 / scale, as torch's ops have it. They
            differ by one level where x / scale is within rounding of a tie.
        scale_min: smaller scales count as this, and their gradient passes; keeps trained scales off zero. 0: scales are used as they are.

    Gradients (I: 1 where it passes, u = (x - offset) / scale, c = q - z): dx = dy I, dscale = sum dy (c - I u), doffset = sum dy (1 - I),
    dzero_point = -scale * sum dy (1 - I); sums in an order that depends on shapes alone. No second derivatives.

    Raises:
        ValueError: shapes that do not match, a range of numbers that is empty or beyond 2^22, an unknown ``ste``, a dtype that is not floating point.
    Esser et al., "Learned Step Size Quantization" (2020); Bhalgat et al., "LSQ+" (2020).
    """
    refuse_transforms("fusedadapt.quant.fake_quantize")
    scale_min = _checked(x, ste, scale_min)
    groups = _groups(x, axis, group_size)
    quant_min, quant_max = _end("quant_min", quant_min), _end("quant_max", quant_max)
    s, z, o = _needed("scale", scale, x), _tensor("zero_point", zero_point, x), _tensor("offset", offset, x)
    _check_sizes(x, groups.scales, s, z, o)
    bounds = _bounds(quant_min, quant_max, x)
    low, high = (0, 1) if bounds is not None else (quant_min, quant_max)
    plan = _Plan(low, high, groups.line, groups.run, bool(divide), ste, scale_min)  # type: ignore[arg-type]
    factor = _grad_scale(grad_scale, x, quant_max, groups)
    y: Tensor = FakeQuantize.apply(plan, x, s, z, o, bounds, factor)  # type: ignore[no-untyped-call]
    return y

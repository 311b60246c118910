"""The one autograd function of the family: any number of linear outputs of one x, each with any number of low-rank segments.

Saved for backward: x by reference, U (T x R, fp32), the seed, and y0 where a row scale is trained. The dropout mask is computed again, V too.
x is read once forward for all segments together and once backward; each dy once; dx is one chain of products into one buffer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autocast import autocasting
from ..derivatives import first_order, remember
from ..ops import base as base_ops
from ..ops.base import Base
from ..ops.dense import widens
from ..ops.dense_low import Low
from ..ops.lowrank import is_direct, ops_for
from . import mid as middle
from .mid import Mid

#: tensors of an output and of a segment, in the order in which `LowRankLinear` takes them
OUTPUT = ("weight", "bias", "row_scale", "scale", "zero", "super", "offset")
SEGMENT = ("A", "B", "rank_gate", "token_gate", "core")
_BIAS, _ROW_SCALE = OUTPUT.index("bias"), OUTPUT.index("row_scale")
_BASE = [OUTPUT.index(name) for name in ("weight", "scale", "zero", "super", "offset")]
_A, _B, *_BETWEEN = range(len(SEGMENT))
#: (activation of each segment, scale_bias, format of a packed weight or "", its N, its K) of each output: hashable, so that a compiled graph can be
#: guarded by it
Entry = tuple[tuple[str | None, ...], bool, str, int, int]
Plan = tuple[Entry, ...]
#: (scaling, p) of each segment
Numbers = tuple[tuple[float, float], ...]


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device_type, enabled=False) if autocasting(device_type) else contextlib.nullcontext()


def _stack(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Factors side by side; of different dtypes, in fp32."""
    if len(parts) == 1:
        return parts[0]
    same = all(part.dtype == parts[0].dtype for part in parts)
    return torch.cat([part if same else part.float() for part in parts], dim)


def _columns(t: Tensor, first: int, count: int) -> Tensor:
    return t if t.shape[1] == count else t[:, first : first + count]


def _rows(t: Tensor, first: int, count: int) -> Tensor:
    return t if t.shape[0] == count else t[first : first + count]


class _Output:
    """One output's tensors and those of its segments; `at`: where in the argument list each stands."""

    def __init__(self, tensors: Sequence[Tensor | None], start: int, plan: Entry, scales: Any, first: int) -> None:
        self.activations, self.scale_bias, spec, n, k = plan
        self.start, self.first, self.segments = start, first, start + len(OUTPUT)
        self.end = self.segments + len(SEGMENT) * len(self.activations)
        weight: Any  # None in a backward pass that does not read it
        weight, self.bias, self.row_scale, scale, zero, above, offset = tensors[start : self.segments]
        self.base = Base(weight, scale, zero, above, offset, spec, n, k)
        self.A, self.B, self.mids = [], [], []
        for j, activation in enumerate(self.activations):
            at = self.segments + len(SEGMENT) * j
            a, b, rank_gate, token_gate, core = tensors[at : at + 5]
            assert a is not None and b is not None
            self.A.append(a)
            self.B.append(b)
            self.mids.append(Mid(scales[first + j], rank_gate, token_gate, core, activation))
        self.ranks = [a.shape[0] for a in self.A]

    def any_of(self, wanted: Sequence[bool], *names: int) -> bool:
        """Whether a segment's gradient by one of these names is wanted. ``wanted``: needs_input_grad of the tensors."""
        return any(True in wanted[self.segments + name : self.end : len(SEGMENT)] for name in names)


def resolved(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Memory that holds the tensors' values: of the imaginary part of a conjugate, say, it holds the negatives, which only torch's own ops know (and
    its dispatcher, through which compiled graphs go); of zeros that autograd makes up there is none."""
    if torch.compiler.is_compiling():
        return list(tensors)
    return [t if t is None else t.resolve_neg() if t.is_neg() else t.clone() if t._is_zerotensor() else t for t in tensors]


def _in(dtype: torch.dtype, t: Tensor) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)  # a conversion that does nothing takes 1.4 us


def _unrounded(x: Tensor) -> Tensor:
    """x in fp32 where its products are made of fp32 tiles anyway: then so are their results."""
    return x.float() if widens(x) else x


def as_tensor(scalars: Tensor | Numbers) -> Tensor:
    """fp64 CPU [segments, 2]."""
    return scalars if isinstance(scalars, Tensor) else torch.tensor(scalars, dtype=torch.float64, device="cpu").view(-1, 2)


def _numbers(direct: bool, scalars: Tensor | Numbers) -> tuple[Any, Any]:
    """(scaling, p) of all segments: numbers where ops are called directly, else tensors: a compiler must not see their values."""
    if not direct:
        given = as_tensor(scalars)
        return given[:, 0], given[:, 1]
    rows = scalars.tolist() if isinstance(scalars, Tensor) else scalars
    return [row[0] for row in rows], tuple([row[1] for row in rows])


def _outputs(tensors: Sequence[Tensor | None], plan: Plan, scales: Any) -> list[_Output]:
    outputs, start, first = [], 0, 0
    for entry in plan:
        outputs.append(_Output(tensors, start, entry, scales, first))
        start += len(OUTPUT) + len(SEGMENT) * len(entry[0])
        first += len(entry[0])
    return outputs


class LowRankLinear(torch.autograd.Function):
    """(plan, x [T, K], col_scale [K] | None, seed int64 [1] | None, scalars: Numbers or fp64 CPU [segments, 2], *tensors) -> one y an output."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, x: Tensor, col_scale: Tensor | None, seed: Tensor | None, scalars: Tensor | Numbers, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        remember(ctx)
        x, *tensors = resolved((x, *tensors))  # type: ignore[assignment]
        direct, device_type = is_direct(x), x.device.type
        with _no_autocast(device_type):
            ops, (scales, p) = ops_for(x), _numbers(direct, scalars)
            outputs = _outputs(tensors, plan, scales)
            xs = x if col_scale is None else (x * col_scale).to(x.dtype)
            ranks = [rank for output in outputs for rank in output.ranks]
            u = ops.lr_shrink(xs, _stack([a for o in outputs for a in o.A], 0), seed, p, ranks) if ranks else None
            results, kept, column = [], [], 0
            for output in outputs:
                v = b = y0 = low = None
                if output.A:
                    assert u is not None
                    v, b = _values(u, output, column), _stack(output.B, 1).t()
                    low = Low(v, b, None, None, [v.shape[1]], ops)
                    column += sum(output.ranks)
                if output.row_scale is None:
                    y = base_ops.linear(xs, output.base, output.bias, low)
                else:
                    # Where the product is made of fp32 tiles anyway, it stays so until it is scaled, and for the gradient of the scale.
                    y0 = base_ops.linear(_unrounded(xs), output.base, output.bias if output.scale_bias else None)
                    y = _in(x.dtype, ops.lr_scale_add_(y0, v, b, output.row_scale, None if output.scale_bias else output.bias))
                    y0 = y0 if output.row_scale.requires_grad else None
                kept.append(y0)
                results.append(y)
            ctx.plan, ctx.device_type, ctx.ops = plan, device_type, ops if direct else None
            ctx.numbers, given = (None, scalars) if isinstance(scalars, Tensor) else (scalars, None)
            needs_x = _needs_x(ctx.needs_input_grad[_FIRST:], outputs) or ctx.needs_input_grad[2]
            ctx.save_for_backward(x if needs_x else None, col_scale, seed, given, u, *kept, *_needed(tensors, outputs, ctx.needs_input_grad))
            ctx.set_materialize_grads(False)
            return tuple(results)

    @staticmethod
    @first_order("fusedadapt.lora_linear")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grads, ctx.saved_tensors)


def _backward(ctx: Any, grads: Sequence[Tensor | None], saved: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments of `LowRankLinear`. dys: T x N_i."""
    x, col_scale, seed, given, u, *rest = saved
    kept, tensors = rest[: len(ctx.plan)], rest[len(ctx.plan) :]
    _, want_x, want_col, _, _, *wanted = ctx.needs_input_grad
    scalars = ctx.numbers if given is None else given
    with _no_autocast(ctx.device_type):
        sample = next((dy for dy in grads if dy is not None), None)
        if sample is None:
            return (None,) * (_FIRST + len(tensors))
        # Forward's backend, where ops are called directly both times.
        direct = is_direct(sample)
        ops = ctx.ops if ctx.ops is not None and direct else ops_for(sample)
        scales, p = _numbers(direct, scalars)
        outputs = _outputs(tensors, ctx.plan, scales)
        xs = x if x is None or col_scale is None else (x * col_scale).to(x.dtype)
        found: list[Tensor | None] = [None] * len(tensors)
        into_x, dy0s, dus, column = want_x or want_col, [], [], 0
        for output, given_dy, y0 in zip(outputs, resolved(grads), kept, strict=True):
            # the gradient of col_scale gets dx before its rounding
            dy = _unrounded(given_dy) if want_col and given_dy is not None else given_dy
            width = sum(output.ranks)
            dy0 = None
            if dy is None:
                dus.append(None if u is None or not width else torch.zeros_like(_columns(u, column, width)))
            else:
                dy0, du = _through_output(ops, output, dy, y0, u, column, wanted, found, into_x)
                dus.append(du)
                if wanted[output.start]:
                    found[output.start] = (dy0.t() @ xs.to(dy0.dtype)).to(output.base.weight.dtype)
            dy0s.append(dy0)
            column += width
        dx = _through_x(ops, outputs, xs, seed, p, dus, wanted, found, dy0s if into_x else ())
        d_col = None
        if want_col and dx is not None:
            d_col = ops.lr_bwd_dy(dx, None, None, None, x, False)[4].to(col_scale.dtype)  # sum over the tokens of dx * x, in fp32
        if dx is not None and col_scale is not None:
            dx = (dx * col_scale).to(sample.dtype)
        return None, dx if want_x else None, d_col, None, None, *found


#: where `LowRankLinear`'s tensors begin among its arguments
_FIRST = 5


class _NoBackward:
    """The context of a forward pass whose backward nobody can ask for."""

    needs_input_grad = (False,) * _FIRST

    def save_for_backward(self, *_: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def forward_only(*args: Any) -> tuple[Tensor, ...]:
    """`LowRankLinear` without autograd's share of the time, where it is off (8 x 64 -> 64, EPYC: 90 us for 132)."""
    return LowRankLinear.forward(_NoBackward(), *args)


class _Given(NamedTuple):
    """The context of a forward pass that another function made."""

    plan: Plan
    ops: Any
    numbers: Numbers
    needs_input_grad: tuple[bool, ...]
    device_type: str


def general_gradients(
    plan: Plan, ops: Any, numbers: Numbers, wanted: Sequence[bool], dy: Tensor, saved: Sequence[Any]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, A and B of one output with one segment, of what `LowRankLinear` would have saved. ``wanted``: which of the three."""
    x, a, b = wanted
    at_a, at_b = (_FIRST + len(OUTPUT) + which for which in (_A, _B))
    needed = [False] * (_FIRST + len(OUTPUT) + len(SEGMENT))
    needed[1], needed[at_a], needed[at_b] = x, a, b
    found = _backward(_Given(plan, ops, numbers, tuple(needed), dy.device.type), (dy,), saved)
    return found[1], found[at_a], found[at_b]


def _values(u: Tensor, output: _Output, column: int) -> Tensor:
    """V of all segments of one output, side by side."""
    parts = []
    for rank, mid in zip(output.ranks, output.mids, strict=True):
        parts.append(middle.forward(_columns(u, column, rank), mid))
        column += rank
    return _stack(parts, 1)


def _needs_x(wanted: Sequence[bool], outputs: list[_Output]) -> bool:
    """A's gradient and a trained weight's are the only ones that read x again."""
    return True in wanted and any([wanted[o.start] or o.any_of(wanted, _A) for o in outputs])


def _needed(tensors: Sequence[Tensor | None], outputs: list[_Output], wanted: Sequence[bool]) -> Sequence[Tensor | None]:
    """What backward reads: W only for dx, or for the dtype of its own gradient; no bias made in inference mode, which cannot be saved."""
    if True not in wanted:
        return tensors
    needed = list(tensors)
    for output in outputs:
        if not (wanted[1] or wanted[2] or wanted[_FIRST + output.start]):
            for name in _BASE:
                needed[output.start + name] = None
        if output.bias is not None and not torch.compiler.is_compiling() and output.bias.is_inference():
            needed[output.start + _BIAS] = None
    return needed


def _through_output(
    ops: Any,
    output: _Output,
    dy: Tensor,
    y0: Tensor | None,
    u: Tensor | None,
    column: int,
    wanted: Sequence[bool],
    found: list[Tensor | None],
    into_x: bool,
) -> tuple[Tensor, Tensor | None]:
    """From dy to dY0 and dU of one output, leaving the gradients met on the way in `found`."""
    upstream = into_x or any((output.any_of(wanted, _A), output.any_of(wanted, *_BETWEEN)))
    v = _values(u, output, column) if u is not None and output.any_of(wanted, _B) else None
    b = _stack(output.B, 1) if output.B and upstream else None
    want_bias, want_scale = wanted[output.start + _BIAS], wanted[output.start + _ROW_SCALE]
    scaled, dv, mb, db, dg = ops.lr_bwd_dy(dy, v, b, output.row_scale, y0 if want_scale else None, want_bias)
    if want_bias:
        assert output.bias is not None
        db = db * output.row_scale.to(db.dtype) if output.row_scale is not None and output.scale_bias else db
        found[output.start + _BIAS] = _in(output.bias.dtype, db)
    if want_scale:
        assert output.row_scale is not None
        found[output.start + _ROW_SCALE] = _in(output.row_scale.dtype, dg)
    dus: list[Tensor] = []
    r = r2 = 0
    for j, (b_j, mid) in enumerate(zip(output.B, output.mids, strict=True)):
        at, inner, rank = output.segments + len(SEGMENT) * j, b_j.shape[1], output.A[j].shape[0]
        if wanted[at + _B]:
            found[at + _B] = _in(b_j.dtype, _columns(mb, r2, inner))
        if upstream:
            assert u is not None
            part = middle.backward(_columns(u, column + r, rank), _columns(dv, r2, inner), mid)
            dus.append(part.u)
            for i, (own, grad) in enumerate(((mid.rank_gate, part.rank_gate), (mid.token_gate, part.token_gate), (mid.core, part.core))):
                if own is not None and grad is not None and wanted[at + _BETWEEN[i]]:
                    found[at + _BETWEEN[i]] = _in(own.dtype, grad)
        r, r2 = r + rank, r2 + inner
    return dy if output.row_scale is None else scaled, _stack(dus, 1) if dus else None


def _through_x(
    ops: Any,
    outputs: list[_Output],
    xs: Tensor | None,
    seed: Tensor | None,
    p: Any,
    dus: list[Tensor | None],
    wanted: Sequence[bool],
    found: list[Tensor | None],
    dy0s: Sequence[Tensor | None],
) -> Tensor | None:
    """A's gradients from one read of x, and dx: the products of ``dy0s`` (none: not asked for) and drop(dU A)."""
    known = next((du for du in dus if du is not None), None)
    du, low, ranks = None, None, [rank for output in outputs for rank in output.ranks]
    if known is not None:
        # An output that needs nothing upstream has no dU, but its segments keep their places in the stack, which number the masks.
        width = [sum(output.ranks) for output in outputs]
        du = _stack([known.new_zeros(known.shape[0], w) if d is None else d for d, w in zip(dus, width, strict=True) if w], 1)
        if dy0s:
            low = Low(du, _stack([a for output in outputs for a in output.A], 0), seed, p, ranks, ops)
    # Before dx, which has the same masks.
    if du is not None and any([output.any_of(wanted, _A) for output in outputs]):
        ma, row = ops.lr_bwd_x(xs, du, seed, p, ranks), 0
        for output in outputs:
            for j, a in enumerate(output.A):
                at = output.segments + len(SEGMENT) * j
                if wanted[at]:
                    found[at] = _in(a.dtype, _rows(ma, row, a.shape[0]))
                row += a.shape[0]
    dx = None
    for output, dy0 in zip(outputs, dy0s, strict=False):
        if dy0 is not None:
            dx = base_ops.linear_dx(dy0, output.base, low) if dx is None else dx.add_(base_ops.linear_dx(dy0, output.base))
    return dx

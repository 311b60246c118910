"""The one autograd function of the family: any number of linear outputs of one x, each with any number of low-rank segments.

Saved for backward: x by reference, U (T x R, fp32), the seed, and y0 where a row scale is trained. The dropout mask is computed again, V too.
x is read once forward for all segments together and once backward; each dy once; dx is one chain of products into one buffer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import base as base_ops
from ..ops.base import Base
from ..ops.lowrank import is_direct, ops_for
from . import mid as middle
from .mid import Mid

#: tensors of an output and of a segment, in the order in which `LowRankLinear` takes them
OUTPUT = ("weight", "bias", "row_scale", "scale", "zero", "super", "offset")
SEGMENT = ("A", "B", "rank_gate", "token_gate", "core")
#: (activation of each segment, scale_bias, format of a packed weight or "", its N, its K) of each output: hashable, so that a compiled graph can be
#: guarded by it
Entry = tuple[tuple[str | None, ...], bool, str, int, int]
Plan = tuple[Entry, ...]


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    enabled = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else contextlib.nullcontext()


def _stack(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Factors side by side; of different dtypes, in fp32."""
    if len(parts) == 1:
        return parts[0]
    same = all(part.dtype == parts[0].dtype for part in parts)
    return torch.cat([part if same else part.float() for part in parts], dim)


class _Output:
    """One output's tensors and those of its segments; `at`: where in the argument list each stands."""

    def __init__(self, tensors: Sequence[Tensor | None], start: int, plan: Entry, scales: Any, first: int) -> None:
        self.activations, self.scale_bias, spec, n, k = plan
        self.start, self.first, self.segments = start, first, start + len(OUTPUT)
        weight, self.bias, self.row_scale, scale, zero, above, offset = tensors[start : self.segments]
        assert weight is not None
        self.base = Base(weight, scale, zero, above, offset, spec, n, k)
        self.A, self.B, self.mids = [], [], []
        for j, activation in enumerate(self.activations):
            at = self.segments + len(SEGMENT) * j
            a, b, rank_gate, token_gate, core = tensors[at : at + 5]
            assert a is not None and b is not None
            self.A.append(a)
            self.B.append(b)
            self.mids.append(Mid(scales[first + j], rank_gate, token_gate, core, activation))

    @property
    def ranks(self) -> list[int]:
        return [a.shape[0] for a in self.A]

    def needs(self, wanted: Sequence[bool]) -> dict[str, Any]:
        """``wanted``: needs_input_grad of the tensors. By name: of the output's own; of the segments a list."""
        own = {name: wanted[self.start + i] for i, name in enumerate(OUTPUT)}
        starts = [self.segments + len(SEGMENT) * j for j in range(len(self.A))]
        return own | {name: [wanted[s + i] for s in starts] for i, name in enumerate(SEGMENT)}


def _numbers(x: Tensor, scalars: Tensor) -> tuple[Any, Any]:
    """(scaling, p) of all segments: numbers, or tensors where a compiler must not see their values."""
    if not is_direct(x):
        return scalars[:, 0], scalars[:, 1]
    rows = scalars.tolist()
    return [row[0] for row in rows], [row[1] for row in rows]


def _outputs(tensors: Sequence[Tensor | None], plan: Plan, scales: Any) -> list[_Output]:
    outputs, start, first = [], 0, 0
    for entry in plan:
        outputs.append(_Output(tensors, start, entry, scales, first))
        start += len(OUTPUT) + len(SEGMENT) * len(entry[0])
        first += len(entry[0])
    return outputs


class LowRankLinear(torch.autograd.Function):
    """(plan, x [T, K], col_scale [K] | None, seed int64 [1] | None, scalars fp64 CPU [segments, 2]: scaling and p, *tensors) -> one y an output."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, x: Tensor, col_scale: Tensor | None, seed: Tensor | None, scalars: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        with _no_autocast(x.device.type):
            ops, (scales, p) = ops_for(x), _numbers(x, scalars)
            outputs = _outputs(tensors, plan, scales)
            xs = x if col_scale is None else (x * col_scale).to(x.dtype)
            ranks = [rank for output in outputs for rank in output.ranks]
            u = ops.lr_shrink(xs, _stack([a for o in outputs for a in o.A], 0), seed, p, ranks) if ranks else None
            results, kept, column = [], [], 0
            for output in outputs:
                bias_first = output.row_scale is None or output.scale_bias
                y = base_ops.linear(xs, output.base, output.bias if bias_first else None)
                v = b = None
                if output.A:
                    assert u is not None
                    v, b = _values(u, output, column), _stack(output.B, 1).t()
                    column += sum(output.ranks)
                if output.row_scale is not None:
                    y0, y = y, ops.lr_scale_add_(y, v, b, output.row_scale, None if bias_first else output.bias)
                    kept.append(y0 if output.row_scale.requires_grad else None)
                else:
                    kept.append(None)
                    if v is not None:
                        ops.lr_add_(y, v, b, None, None, [v.shape[1]])
                results.append(y)
            ctx.plan, ctx.device_type = plan, x.device.type
            needs_x = _needs_x(ctx.needs_input_grad[5:], outputs) or ctx.needs_input_grad[2]
            ctx.save_for_backward(x if needs_x else None, col_scale, seed, scalars, u, *kept, *tensors)
            ctx.set_materialize_grads(False)
            return tuple(results)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, col_scale, seed, scalars, u, *rest = ctx.saved_tensors
        kept, tensors = rest[: len(ctx.plan)], rest[len(ctx.plan) :]
        _, want_x, want_col, _, _, *wanted = ctx.needs_input_grad
        with _no_autocast(ctx.device_type):
            sample = next((dy for dy in grads if dy is not None), scalars)
            ops, (scales, p) = ops_for(sample), _numbers(sample, scalars)
            outputs = _outputs(tensors, ctx.plan, scales)
            xs = x if x is None or col_scale is None else (x * col_scale).to(x.dtype)
            found: list[Tensor | None] = [None] * len(tensors)
            into_x, dx, dus, column = want_x or want_col, None, [], 0
            for output, dy, y0 in zip(outputs, grads, kept, strict=True):
                width = sum(output.ranks)
                if dy is None:
                    dus.append(None if u is None or not width else torch.zeros_like(u[:, column : column + width]))
                else:
                    dy0, du = _through_output(ops, output, dy, y0, u, column, wanted, found, into_x)
                    dus.append(du)
                    if wanted[output.start]:
                        found[output.start] = (dy0.t() @ xs).to(output.base.weight.dtype)
                    if into_x:
                        dx = base_ops.linear_dx(dy0, output.base) if dx is None else dx.add_(base_ops.linear_dx(dy0, output.base))
                column += width
            dx = _through_x(ops, outputs, xs, seed, p, dus, wanted, found, dx)
            d_col = None
            if want_col and dx is not None:
                d_col = ops.lr_bwd_dy(dx, None, None, None, x, False)[4].to(col_scale.dtype)  # sum over the tokens of dx * x, in fp32
            if dx is not None and col_scale is not None:
                dx = (dx * col_scale).to(dx.dtype)
            return None, dx if want_x else None, d_col, None, None, *found


def _values(u: Tensor, output: _Output, column: int) -> Tensor:
    """V of all segments of one output, side by side."""
    parts = []
    for rank, mid in zip(output.ranks, output.mids, strict=True):
        parts.append(middle.forward(u[:, column : column + rank], mid))
        column += rank
    return _stack(parts, 1)


def _needs_x(wanted: Sequence[bool], outputs: list[_Output]) -> bool:
    """A's gradient and a trained weight's are the only ones that read x again."""
    return any(any(needs["A"]) or needs["weight"] for needs in (o.needs(wanted) for o in outputs))


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
    needs = output.needs(wanted)
    upstream = into_x or any(any(needs[name]) for name in ("A", "rank_gate", "token_gate", "core"))
    v = _values(u, output, column) if u is not None and any(needs["B"]) else None
    b = _stack(output.B, 1) if output.B and upstream else None
    want_scale = needs["row_scale"]
    scaled, dv, mb, db, dg = ops.lr_bwd_dy(dy, v, b, output.row_scale, y0 if want_scale else None, needs["bias"])
    if needs["bias"]:
        assert output.bias is not None
        db = db * output.row_scale.to(db.dtype) if output.row_scale is not None and output.scale_bias else db
        found[output.start + 1] = db.to(output.bias.dtype)
    if want_scale:
        assert output.row_scale is not None
        found[output.start + 2] = dg.to(output.row_scale.dtype)
    dus, r, r2 = [], 0, 0
    for j, (b_j, mid) in enumerate(zip(output.B, output.mids, strict=True)):
        at, inner, rank = output.segments + len(SEGMENT) * j, b_j.shape[1], output.A[j].shape[0]
        if needs["B"][j]:
            found[at + 1] = mb[:, r2 : r2 + inner].to(b_j.dtype)
        if upstream:
            assert u is not None
            part = middle.backward(u[:, column + r : column + r + rank], dv[:, r2 : r2 + inner], mid)
            dus.append(part.u)
            for i, (own, grad) in enumerate(((mid.rank_gate, part.rank_gate), (mid.token_gate, part.token_gate), (mid.core, part.core))):
                if own is not None and grad is not None and wanted[at + 2 + i]:
                    found[at + 2 + i] = grad.to(own.dtype)
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
    dx: Tensor | None,
) -> Tensor | None:
    """A's gradients from one read of x, and dx += drop(dU A)."""
    known = next((du for du in dus if du is not None), None)
    if known is None:
        return dx
    # An output that needs nothing upstream has no dU, but its segments keep their places in the stack, which number the masks.
    width = [sum(output.ranks) for output in outputs]
    du = _stack([known.new_zeros(known.shape[0], w) if d is None else d for d, w in zip(dus, width, strict=True) if w], 1)
    ranks = [rank for output in outputs for rank in output.ranks]
    if any(any(output.needs(wanted)["A"]) for output in outputs):
        ma, row = ops.lr_bwd_x(xs, du, seed, p, ranks), 0
        for output in outputs:
            for j, a in enumerate(output.A):
                at = output.segments + len(SEGMENT) * j
                if wanted[at]:
                    found[at] = ma[row : row + a.shape[0]].to(a.dtype)
                row += a.shape[0]
    if dx is not None:
        ops.lr_add_(dx, du, _stack([a for output in outputs for a in output.A], 0), seed, p, ranks)
    return dx

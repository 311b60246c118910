"""DoRA (arXiv 2402.09353): a trained magnitude per output, over the norm of the adapted weight's row. The norm takes no gradient, as in the paper.

g = magnitude / ||W + s B A||_row
paper:   y = g * (x W^T + s B A drop(x)) + b                          lora_linear(row_scale=g): one product with W
PEFT:    y = x W^T + b + (g - 1) * (x_d W^T) + g * s B A x_d          x_d = drop(x): two; the same thing where nothing is dropped
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autocast import autocasting
from ..derivatives import first_order, refuse_transforms, remember
from ..ops import base as base_ops
from ..ops.base import Base
from ..ops.lowrank import ops_for
from ..ops.onlookers import tracing
from ..quant.tensor import QuantizedTensor
from ..reference.lowrank import wide
from .function import _no_autocast, _unrounded, as_tensor, resolved
from .functional import Output, Segment, _cast, _check_dtypes, _check_outputs, _check_seed, _is_trained, _scalars, _seed, lora_linear

ops = torch.ops.fusedadapt


def _error(op: str, expected: str, got: object, fix: str) -> ValueError:
    return ValueError(f"fusedadapt.{op}: expected {expected}; got {got}; {fix}")


def dora_scale(
    weight: Tensor | QuantizedTensor, A: Tensor, B: Tensor, scaling: float | Tensor, magnitude: Tensor, rowsq: Tensor | None = None
) -> Tensor:
    """magnitude / ||W + s B A||_row, from one read of W and without the dense B A. Only ``magnitude`` gets a gradient.

    The squared norm is w2 + 2 s C.B + s^2 (B A A^T).B with C = W A^T, in fp32. What falls below the rounding error of those three terms (W close to
    -s B A) is raised to it: a norm that is all noise must not become a huge scale.

    Args:
        weight: [N, K], or a `QuantizedTensor`. A: [R, K]. B: [N, R]. magnitude: [N]. Any of fp32, bf16, fp16 (all fp64: computed in fp64).
        scaling: s, a number or a 0-d tensor.
        rowsq: [N], the squared norms of W's rows as `torch.ops.fusedadapt.lr_skinny_w` gives them, for callers that know W has not changed (same
            data_ptr and _version, and nobody writes through .data).

    Returns:
        [N] in fp32 (fp64).

    Raises:
        ValueError: shapes that do not fit.
    """
    if len(weight.shape) != 2 or A.dim() != 2 or A.shape[1] != weight.shape[1] or tuple(B.shape) != (weight.shape[0], A.shape[0]):
        shapes = f"{tuple(weight.shape)}, {tuple(A.shape)}, {tuple(B.shape)}"
        raise _error("dora_scale", "weight (N, K), A (R, K), B (N, R)", shapes, "pass one adapter's matrices and the weight they adapt")
    for name, vector in (("magnitude", magnitude), ("rowsq", rowsq)):
        if vector is not None and tuple(vector.shape) != (weight.shape[0],):
            raise _error("dora_scale", f"{name} of shape ({weight.shape[0]},)", tuple(vector.shape), "give one number per row of W")
    base = Output(weight).base
    with torch.no_grad():
        norm: Tensor = _node(scaling, A, B, rowsq, *base) if tracing() else _row_norm(ops, base, A, B, scaling, rowsq)
    return magnitude.to(norm.dtype) / norm


class _RowNorm(torch.autograd.Function):
    """`_row_norm` as one node of a trace, computed anew at every call of it: torch.jit's tracer cannot record ops with lists of sizes."""

    @staticmethod
    def forward(ctx: Any, scaling: float | Tensor, A: Tensor, B: Tensor, rowsq: Tensor | None, *fields: Any) -> Tensor:
        A, B = resolved((A, B))
        norm = _row_norm(ops_for(A), Base(*fields), A, B, scaling, rowsq)
        ctx.mark_non_differentiable(norm)  # the trace does not know that this was under no_grad
        return norm


_node: Any = _RowNorm.apply


def _row_norm(ops: Any, base: Base, A: Tensor, B: Tensor, scaling: float | Tensor, rowsq: Tensor | None) -> Tensor:
    rank = [A.shape[0]]
    if rowsq is None or base.spec:
        c, rowsq = base_ops.skinny_w(base, A, ops)
    else:
        c = ops.lr_shrink(base.weight, A, None, None, rank)
    # These products, too, by lr_shrink: torch's would follow autocast and TF32 down to three digits.
    gram = ops.lr_shrink(A, A, None, None, rank)
    mixed = ops.lr_shrink(B, gram, None, None, rank)
    b = B.to(c.dtype)
    square = (mixed * b).sum(1) * scaling * scaling
    total = rowsq + (c * b).sum(1) * scaling * 2 + square
    limits = torch.finfo(total.dtype)
    return torch.maximum(total, (rowsq + square) * limits.eps).clamp(min=limits.tiny).sqrt()


class DoraDropout(torch.autograd.Function):
    """PEFT's form with a mask. (x [T, K], bias | None, A, B, row_scale [N], seed, scalars fp64 CPU [1, 2]: scaling and p, *base) -> y [T, N].

    ``base``: the fields of a `Base`. Saves x by reference, U (T x R), the seed, and x_d W^T where the scale is trained; not x_d.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, row_scale: Tensor, seed: Tensor, scalars: Tensor, *fields: Any
    ) -> Tensor:
        remember(ctx)
        x, A, B, row_scale = resolved((x, A, B, row_scale))
        base = Base(*fields)
        with _no_autocast(x.device.type):
            s, p = scalars[0, 0], scalars[:, 1]
            y = base_ops.linear(x, base, bias)
            z = base_ops.linear(ops.lr_dropout(_unrounded(x), seed, p), base)
            u = ops.lr_shrink(x, A, seed, p, [A.shape[0]])
            # In fp32 until the last rounding: y takes two corrections, and rounding after each would cost more than eager does.
            # Not in place, and no conversion to its own dtype at the end: torch 2.11 compiles a result made so into one whose gradients are zero.
            kind = wide(y.dtype)
            total = torch.addcmul(y.to(kind), z.to(kind), (row_scale - 1).to(kind))
            ops.lr_add_(total, u * s, _scaled(B, row_scale).t(), None, None, [A.shape[0]])
            need = ctx.needs_input_grad
            parts = base.parts if need[0] or need[7] else [None] * len(base.parts)
            ctx.save_for_backward(x if need[2] or need[7] else None, A, B, row_scale, seed, scalars, u, z if need[4] else None, *parts)
            ctx.bias_dtype, ctx.shape = None if bias is None else bias.dtype, (base.spec, base.n, base.k)
            return total if kind == y.dtype else total.to(y.dtype)

    @staticmethod
    @first_order("fusedadapt.lowrank.dora_linear_peft")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, row_scale, seed, scalars, u, z, *packed = ctx.saved_tensors
        base, dy = Base(*packed, *ctx.shape), resolved((dy,))[0]
        want_x, want_bias, want_a, want_b, want_g, _, _, want_w, *_ = ctx.needs_input_grad
        with _no_autocast(dy.device.type):
            s, p, rank = scalars[0, 0], scalars[:, 1], [A.shape[0]]
            v = u * s if want_b or want_g else None
            _, dv, mb, db, dg = ops.lr_bwd_dy(dy, v, _scaled(B, row_scale) if want_x or want_a else None, None, z, want_bias)
            d_a = d_x = d_w = d_b = d_g = d_u = None
            if want_x or want_a:
                d_u = dv * s
            if want_a:
                d_a = ops.lr_bwd_x(x, d_u, seed, p, rank).to(A.dtype)
            if want_b:
                d_b = (mb * row_scale.to(mb.dtype)[:, None]).to(B.dtype)
            if want_g:
                d_g = (dg + (mb * B.to(mb.dtype)).sum(1)).to(row_scale.dtype)
            if want_x or want_w:
                dz = (dy * (row_scale - 1)).to(dy.dtype)
                if want_x:
                    branch = base_ops.linear_dx(dz, base)
                    ops.lr_add_(branch, d_u, A, None, None, rank)
                    d_x = base_ops.linear_dx(dy, base).add_(ops.lr_dropout(branch, seed, p))
                if want_w:
                    d_w = (dy.t() @ x + dz.t() @ ops.lr_dropout(x, seed, p)).to(base.weight.dtype)
            return d_x, db.to(ctx.bias_dtype) if want_bias else None, d_a, d_b, d_g, None, None, d_w, *([None] * (len(Base._fields) - 1))


def _scaled(B: Tensor, row_scale: Tensor) -> Tensor:
    """row_scale * B in fp32 (fp64): N x R, small enough to make anew."""
    dtype = torch.promote_types(wide(B.dtype), row_scale.dtype)
    return B.to(dtype) * row_scale.to(dtype)[:, None]


_apply: Any = DoraDropout.apply


def dora_linear_peft(
    x: Tensor,
    weight: Tensor | QuantizedTensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    *,
    bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float | Tensor = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """DoRA as PEFT computes it: y = x W^T + b + (g - 1) * (x_d W^T) + g * s B A x_d, g = `dora_scale`, x_d = drop(x).

    PEFT drops the input of the scaled base product too: a second product with W in each direction while dropout is on. The paper's form is
    ``lora_linear(..., row_scale=dora_scale(...), dropout_p=p)``.

    Args:
        x: [..., K]; weight: [N, K]; A: [R, K]; B: [N, R]; magnitude, bias: [N]. Dtypes as in `lora_linear`.
        scaling: a number, or a 0-d tensor, which may be trained. dropout_p: in [0, 1), rounded to a multiple of 1/65536.
        seed: as in `lora_linear`.

    Returns:
        [..., N] in x's dtype. Gradients for x, weight, bias, A, B, magnitude and scaling, those that somebody needs; none through the norm.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, p outside [0, 1), a seed that is none. RuntimeError: dropout inside torch.jit.trace.
    """
    refuse_transforms("fusedadapt.lora_linear")
    output = Output(weight, bias, (Segment(A, B, scaling, dropout_p),))
    _check_outputs(x, (output,), None)
    _check_seed(seed, x)
    scale = dora_scale(weight, A, B, scaling, magnitude)
    p = dropout_p if training else 0.0
    if not isinstance(p, Tensor) and p == 0:
        return lora_linear(x, weight, A, B, bias=bias, scaling=scaling, row_scale=scale)
    if tracing():
        fix = "trace it in eval mode, or take the paper's form"
        raise RuntimeError(f"fusedadapt.dora_linear_peft: expected a call without dropout inside torch.jit.trace; got one with; {fix}")
    device_type = x.device.type
    if autocasting(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x, output = x.to(dtype), _cast(output, dtype)
    _check_dtypes(x, (output,))
    x2 = x.reshape(-1, x.shape[-1])
    if isinstance(scaling, Tensor) and _is_trained(scaling):  # `_scalars` puts a 1 in its place
        B = B.to(wide(B.dtype)) * scaling.to(B.device, wide(B.dtype)).reshape(())
    scalars, _ = _scalars(output.segments, training)
    y: Tensor = _apply(x2, output.bias, A, B, scale, _seed(seed, x2), as_tensor(scalars), *output.base)
    return y.reshape(*x.shape[:-1], weight.shape[0])

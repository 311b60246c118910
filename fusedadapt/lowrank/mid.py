"""What happens between A and B: V = s * token_gate * act((U * rank_gate) core), and its gradient. All T x R, so plain torch is fast enough."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.lowrank import ACTIVATIONS

aten: Any = torch.ops.aten


class Mid(NamedTuple):
    """One segment's middle. ``scaling``: a number or a 0-d CPU tensor; ``rank_gate``: R; ``token_gate``: T; ``core``: R x R2;
    ``activation``: a name or None."""

    scaling: float | Tensor
    rank_gate: Tensor | None
    token_gate: Tensor | None
    core: Tensor | None
    activation: str | None


class MidGrads(NamedTuple):
    """Gradients of a `Mid` in the precision of U; None where there is no such part."""

    u: Tensor
    rank_gate: Tensor | None
    token_gate: Tensor | None
    core: Tensor | None


def activate(activation: str, u: Tensor) -> Tensor:
    """act(u)."""
    v: Tensor = ACTIVATIONS[activation](u)  # type: ignore[no-untyped-call]
    return v


def _slope(activation: str, d: Tensor, u: Tensor) -> Tensor:
    """d * act'(u)."""
    slope: Tensor
    if activation == "relu":
        slope = aten.threshold_backward(d, u, 0)
    elif activation == "gelu":
        slope = aten.gelu_backward(d, u)
    elif activation == "gelu_tanh":
        slope = aten.gelu_backward(d, u, approximate="tanh")
    elif activation == "silu":
        slope = aten.silu_backward(d, u)
    elif activation == "tanh":
        slope = aten.tanh_backward(d, torch.tanh(u))
    else:
        slope = aten.sigmoid_backward(d, torch.sigmoid(u))
    return slope


def forward(u: Tensor, mid: Mid) -> Tensor:
    """V of U (T x R, fp32 or fp64)."""
    v = u
    if mid.rank_gate is not None:
        v = v * mid.rank_gate.to(u.dtype)
    if mid.core is not None:
        v = v @ mid.core.to(u.dtype)
    if mid.activation is not None:
        v = activate(mid.activation, v)
    if mid.token_gate is not None:
        v = v * mid.token_gate.to(u.dtype)[:, None]
    return _scaled(v, mid)


def _scaled(v: Tensor, mid: Mid) -> Tensor:
    return v if isinstance(mid.scaling, float) and mid.scaling == 1.0 else v * mid.scaling


def backward(u: Tensor, dv: Tensor, mid: Mid) -> MidGrads:
    """Gradients of U and of the parts, given dV."""
    gated = u if mid.rank_gate is None else u * mid.rank_gate.to(u.dtype)
    mixed = gated if mid.core is None else gated @ mid.core.to(u.dtype)
    d, d_token, d_core, d_rank = _scaled(dv, mid), None, None, None
    if mid.token_gate is not None:
        active = mixed if mid.activation is None else activate(mid.activation, mixed)
        d_token = (d * active).sum(1)
        d = d * mid.token_gate.to(u.dtype)[:, None]
    if mid.activation is not None:
        d = _slope(mid.activation, d, mixed)
    if mid.core is not None:
        d_core = gated.T @ d
        d = d @ mid.core.to(u.dtype).T
    if mid.rank_gate is not None:
        d_rank = (d * u).sum(0)
        d = d * mid.rank_gate.to(u.dtype)
    return MidGrads(d, d_rank, d_token, d_core)

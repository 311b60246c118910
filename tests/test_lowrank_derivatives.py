"""Derivatives of the whole low-rank function in fp64: against finite differences, and against autograd through the plain equation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_lowrank_contract import layer, values
from torch import Tensor
from torch.autograd import forward_ad

import fusedadapt as fa
from fusedadapt.lowrank import Output, Segment, lora_linear, lora_linear_group
from fusedadapt.reference import lowrank as reference

ACTIVATIONS = list(reference.ACTIVATIONS)


@pytest.fixture(autouse=True)
def on_reference() -> Iterator[None]:
    with fa.backend("reference"):
        yield


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout_p": 0.3},
    "rank gate": {"rank_gate": values(3)},
    "token gate": {"token_gate": values(5)},
    "core": {"core": values(3, 4), "inner": 4},
    **{name: {"activation": name} for name in ACTIVATIONS},
    "row scale": {"row_scale": values(6)},
    "row scale and bias": {"row_scale": values(6), "bias": values(6, seed=4)},
    "scaled bias": {"row_scale": values(6), "bias": values(6, seed=4), "scale_bias": True},
    "col scale": {"col_scale": values(8)},
    "trained scaling": {"scaling": values(), "token_gate": values(5)},
    "everything": {
        "dropout_p": 0.5, "rank_gate": values(3), "token_gate": values(5), "core": values(3, 4), "inner": 4, "activation": "gelu",
        "row_scale": values(6), "bias": values(6, seed=4), "scale_bias": True, "col_scale": values(8), "scaling": 1.7,
    },
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_derivatives(option: str) -> None:
    """fp64: against finite differences, and against autograd through the plain equation with the mask exported."""
    options = dict(OPTIONS[option])
    x, _, a, b = layer(dtype=torch.float64)
    weight, b = values(6, 8, seed=1), values(6, options.pop("inner", 3), seed=3)
    trained = {name: value for name, value in options.items() if isinstance(value, Tensor)}
    fixed = {name: value for name, value in options.items() if name not in trained}

    def ours(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        return lora_linear(x, weight, a, b, seed=7, **fixed, **dict(zip(trained, rest)))

    inputs = (x, weight, a, b, *trained.values())
    assert torch.autograd.gradcheck(ours, inputs, eps=1e-6, atol=1e-6)
    keep = reference.dropout_mask(5, 8, 7, reference.threshold_of(options["dropout_p"])) if "dropout_p" in options else None
    y, true = ours(*inputs), reference.linear(x, weight, a, b, keep=keep, **options)
    torch.testing.assert_close(y, true, rtol=1e-12, atol=1e-12)
    dy = values(5, 6, seed=9, grad=False)
    for mine, theirs in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(true, inputs, dy), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_derivatives_of_a_group(on_reference: None) -> None:
    """Three outputs of one x with two, one and no segments, masks of their own."""
    x, gate, scale, core = values(4, 7), values(2, seed=5), values(5, seed=6), values(3, 2, seed=7)
    weights, factors = [values(n, 7, seed=1) for n in (5, 6, 3)], [values(*s, seed=2) for s in ((2, 7), (5, 2), (1, 7), (5, 1), (3, 7), (6, 2))]

    def outputs(weights: Any, factors: Any, gate: Tensor, scale: Tensor, core: Tensor) -> list[Output]:
        a0, b0, a1, b1, a2, b2 = factors
        first = (Segment(a0, b0, 0.5, 0.4, rank_gate=gate), Segment(a1, b1, 2.0, 0.2, activation="tanh"))
        return [Output(weights[0], None, first, scale), Output(weights[1], None, (Segment(a2, b2, 1.0, 0.6, core=core),)), Output(weights[2])]

    def ours(x: Tensor, *rest: Tensor) -> list[Tensor]:
        return lora_linear_group(x, outputs(rest[:3], rest[3:9], *rest[9:]), seed=3)

    def plain(x: Tensor, *rest: Tensor) -> list[Tensor]:
        ys, stream = [], 0
        for o in outputs(rest[:3], rest[3:9], *rest[9:]):
            y = x @ o.weight.T
            for s in o.segments:
                keep = reference.dropout_mask(4, 7, 3, reference.threshold_of(s.dropout_p), stream)
                parts = {"rank_gate": s.rank_gate, "core": s.core, "activation": s.activation, "scaling": s.scaling}
                zero = torch.zeros_like(o.weight)
                y, stream = y + reference.linear(x, zero, s.A, s.B, keep=keep, dropout_p=s.dropout_p, **parts), stream + 1
            ys.append(y if o.row_scale is None else y * o.row_scale)
        return ys

    inputs = (x, *weights, *factors, gate, scale, core)
    assert torch.autograd.gradcheck(lambda *t: torch.cat(ours(*t), 1), inputs, eps=1e-6, atol=1e-6)
    for mine, theirs in zip(ours(*inputs), plain(*inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", ["one of two A", "B of one, A of the other", "unused output", "no segments"])
def test_partly_frozen_groups(wanted: str) -> None:
    """Outputs of a group that need different parts: the segments keep their places (and masks)."""
    x, a, b = values(4, 8), [values(r, 8, seed=r) for r in (2, 3)], [values(6, r, seed=r + 5) for r in (2, 3)]
    weights = [values(6, 8, seed=s, grad=False) for s in (1, 2)]
    frozen = {"one of two A": [x, a[0], b[0]], "B of one, A of the other": [x, a[0], b[1]], "unused output": [], "no segments": [x, b[0]]}[wanted]
    for t in frozen:
        t.requires_grad_(False)
    segments = [[Segment(a[i], b[i], 1.0, 0.5)] for i in (0, 1)]
    if wanted == "no segments":
        segments[0] = []
    ys = lora_linear_group(x, [Output(w, None, s) for w, s in zip(weights, segments)], seed=3)
    true, stream = [], 0
    for w, parts in zip(weights, segments):
        y = x @ w.T
        for s in parts:
            keep = reference.dropout_mask(4, 8, 3, reference.threshold_of(0.5), stream)
            y, stream = reference.linear(x, w, s.A, s.B, keep=keep, dropout_p=0.5), stream + 1
        true.append(y)
    used = slice(1, 2) if wanted == "unused output" else slice(0, 2)
    inputs = [t for t in (x, *a, *b) if t.requires_grad]
    mine, theirs = (torch.autograd.grad(sum(y.sin().sum() for y in out[used]), inputs, allow_unused=True) for out in (ys, true))
    for m, t in zip(mine, theirs):
        torch.testing.assert_close(torch.zeros(()) if m is None or not m.any() else m, torch.zeros(()) if t is None else t, check_dtype=False)


@pytest.mark.parametrize("recording", [True, False])
def test_forward_mode_is_refused_not_dropped(recording: bool) -> None:
    """no_grad leaves forward-mode derivatives on: a tangent may not vanish."""
    x, weight, a, b = layer(dtype=torch.float64)
    with forward_ad.dual_level(), torch.set_grad_enabled(recording):
        dual = forward_ad.make_dual(x.detach(), values(*x.shape, grad=False))
        with pytest.raises(RuntimeError, match="jvp"):
            lora_linear(dual, weight.detach(), a.detach(), b.detach())

"""Tensors whose memory holds something else than their values in order: the imaginary part of a conjugate holds the negatives (`Tensor.is_neg`), two
elements apart. Every family gives what it gives for a plain copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fusedadapt as fa
from fusedadapt import sparse


def imaginary(t: Tensor) -> Tensor:
    """``t`` as a strided view of negatives."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def dense(t: Tensor) -> Tensor:
    """``t`` as a contiguous view of negatives."""
    return torch._neg_view((-t).contiguous())


def lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor, dy: Tensor, **options: Tensor) -> list[Tensor]:
    x, a, b = (t.detach().requires_grad_() for t in (x, a, b))
    y = fa.lora_linear(x, w, a, b, dropout_p=0.25, seed=3, **options)
    return [y, *torch.autograd.grad(y, (x, a, b), dy)]


def dora(x: Tensor, w: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        layer = fa.LoRALinear.from_linear(torch.nn.Linear(16, 8, bias=False), r=4, lora_dropout=0.25, method="dora")
        layer.lora_B.copy_(b)
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, (x, layer.lora_A), dy)]


def low_bit(x: Tensor, w: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    packed = [fa.quantize(w, name) for name in ("nf4", "int8", "mxfp4")]
    products = [fa.quantized_linear(x, q) for q in packed]
    return [*(q.dequantize() for q in packed), *products, *torch.autograd.grad(sum(y.sum() for y in products), x)]  # type: ignore[attr-defined]


def fake(x: Tensor, scale: Tensor) -> list[Tensor]:
    x, scale = (t.detach().requires_grad_() for t in (x, scale))
    y = fa.quant.fake_quantize(x, scale, quant_min=-8, quant_max=7)
    return [y, *torch.autograd.grad(y.square().sum(), (x, scale))]


def select(x: Tensor, w: Tensor) -> list[Tensor]:
    masks = sparse.topk_mask([x, w], density=0.3)
    return [*(m.to_bool() for m in masks), sparse.topk_mask(x, density=0.3, score="given").to_bool(), sparse.nm_mask(w, 2, 4).to_bool()]


def gradient(x: Tensor, dy: Tensor) -> list[Tensor]:
    mask = sparse.Mask.from_bool(torch.arange(128).view(8, 16) % 3 == 0)
    return [sparse.masked_wgrad(dy, x, mask)]


def exchange(a: Tensor, b: Tensor) -> list[Tensor]:
    delta = sparse.SparseDelta.from_diff({"w": a}, {"w": b}, kind="set")
    weights = {"w": a}
    delta.swap_(weights)
    there = weights["w"].clone()
    delta.swap_(weights)
    return [there, weights["w"].clone()]


def merged(a: Tensor, b: Tensor) -> list[Tensor]:
    ways = {"ties": {"density": 0.5}, "dare_linear": {"density": 0.5}, "task_arithmetic": {}, "slerp": {"t": 0.3}}
    return [sparse.merge({"w": a}, [{"w": b}], method, **options)["w"] for method, options in ways.items()]


CASES: list[tuple[Callable[..., list[Tensor]], list[tuple[int, ...]]]] = [
    (lora, [(6, 16), (8, 16), (4, 16), (8, 4), (6, 8)]),
    (dora, [(6, 16), (8, 16), (4, 16), (8, 4), (6, 8)]),
    (low_bit, [(6, 64), (8, 64)]),
    (fake, [(6, 16), (1,)]),
    (select, [(6, 16), (8, 16)]),
    (gradient, [(6, 16), (6, 8)]),
    (exchange, [(6, 16), (6, 16)]),
    (merged, [(6, 16), (6, 16)]),
]


@pytest.mark.parametrize("stored", [imaginary, dense], ids=["strided", "contiguous"])
@pytest.mark.parametrize(("function", "shapes"), CASES, ids=[f.__name__ for f, _ in CASES])
def test_a_view_of_negatives_is_read_right(
    function: Callable[..., list[Tensor]], shapes: list[tuple[int, ...]], stored: Callable[..., Tensor]
) -> None:
    gen = torch.Generator().manual_seed(0)
    plain = [torch.randn(shape, generator=gen).abs() + 0.1 if shape == (1,) else torch.randn(shape, generator=gen) for shape in shapes]
    expected = function(*(t.clone() for t in plain))
    for i in range(len(plain)):
        given = [stored(t) if i == j else t.clone() for j, t in enumerate(plain)]
        assert given[i].is_neg() and torch.equal(given[i], plain[i])
        found = function(*given)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True)), f"{function.__name__}: argument {i}"

"""Shapes and gradients that break kernels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Shape = tuple[int, ...]


def hostile_shapes(largest: int = 70_000) -> list[Shape]:
    """Zero sizes, every size around vector widths, blocks and chunks, and several dimensions; at most ``largest`` elements each."""
    flat = [0, *range(1, 18), 31, 32, 33, 63, 64, 65, 255, 256, 257, 1000, 2047, 2048, 2049, 4095, 4097, 65535, 65537]
    shapes: list[Shape] = [(), *((n,) for n in flat)]
    shapes += [(3, 0, 2), (1, 1, 1), (7, 5), (1, 129), (129, 1), (64, 33), (2, 3, 5, 7), (16, 3, 3, 3), (5, 1, 4, 1, 3)]
    return [s for s in shapes if math.prod(s) <= largest]


def _huge(dtype: torch.dtype) -> float:
    """Large, yet its square is finite in fp32, in which every rule computes."""
    return min(1e15, torch.finfo(dtype).max / 4)


def _normal(n: int, draw: torch.Generator) -> Tensor:
    return torch.randn(n, generator=draw, dtype=torch.float64)


def _sparse(n: int, draw: torch.Generator) -> Tensor:
    return _normal(n, draw) * (torch.rand(n, generator=draw) < 0.05)


def _alternating(n: int, draw: torch.Generator) -> Tensor:
    return _normal(n, draw).abs() * (1 - 2 * (torch.arange(n) % 2))


def _wide(n: int, draw: torch.Generator) -> Tensor:
    return _normal(n, draw) * 10.0 ** (torch.rand(n, generator=draw, dtype=torch.float64) * 24 - 14)


def _some(value: float) -> Callable[[int, torch.Generator], Tensor]:
    def make(n: int, draw: torch.Generator) -> Tensor:
        out = _normal(n, draw)
        out[::3] = value * (1 - 2 * (torch.arange(len(out[::3])) % 2))
        return out

    return make


_MAKERS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "normal": _normal,
    "zeros": lambda n, draw: torch.zeros(n, dtype=torch.float64),
    "negative zeros": lambda n, draw: -torch.zeros(n, dtype=torch.float64),
    "denormal": lambda n, draw: _normal(n, draw) * 1e-39,
    "tiny": lambda n, draw: _normal(n, draw) * 1e-20,
    "huge": lambda n, draw: _normal(n, draw).clamp(-4, 4),
    "constant": lambda n, draw: torch.full((n,), 0.1, dtype=torch.float64),
    "sparse": _sparse,
    "alternating": _alternating,
    "wide": _wide,
    "inf": _some(math.inf),
    "nan": _some(math.nan),
    "overflow": _some(3e38),
}
#: names of every kind of gradient
KINDS = tuple(_MAKERS)
#: kinds that leave fp32's range: fp64 is no truth for them, only whether a result is NaN, infinite or finite
SPECIAL = frozenset({"inf", "nan", "overflow"})


def hostile_gradient(kind: str, shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    """One contiguous gradient of a kind in KINDS. An odd ``seed`` turns the sign of "alternating", so that consecutive steps flip it."""
    draw = torch.Generator().manual_seed(seed)
    flat = _MAKERS[kind](math.prod(shape), draw)
    if kind == "huge":
        flat = flat * (_huge(dtype) / 4)
    if kind == "alternating" and seed % 2:
        flat = -flat
    return flat.to(dtype).view(shape)


def hostile_gradients(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Every kind of gradient in KINDS for a parameter of this shape: name -> contiguous tensor, a pure function of the arguments."""
    return {kind: hostile_gradient(kind, shape, dtype, seed) for kind in KINDS}

"""Problems of fake quantization: shapes, layouts and values that cover every path of every backend."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fusedadapt as fa
from fusedadapt import dispatch
from fusedadapt.quant import fake_quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STES = ("clamp", "round", "identity")
BACKENDS = ["reference", pytest.param("cpp", marks=pytest.mark.skipif(dispatch.core() is None, reason="no compiled core"))]
FOUR = {"quant_min": -8, "quant_max": 7}
# shape, how it is cut, numbers that takes
LAYOUTS: tuple[tuple[tuple[int, ...], dict[str, int], int], ...] = (
    ((), {}, 1),
    ((1,), {}, 1),
    ((3, 7), {}, 1),
    ((5, 1100), {}, 1),  # more than one tile
    ((3, 1040), {"axis": 0}, 3),
    ((2, 3, 17), {"axis": 1}, 3),  # runs of a vector and one
    ((2, 5, 3, 3), {"axis": 1}, 5),  # runs of 9: by columns
    ((11, 37), {"axis": -1}, 37),
    ((300, 18), {"axis": 1}, 18),  # more than one block of rows
    ((33, 32), {"axis": 1}, 32),
    ((2, 200, 3), {"axis": 1}, 200),  # a block of columns that begins within a run
    ((9,), {"axis": 0}, 9),
    ((3, 64), {"group_size": 32}, 6),
    ((3, 100), {"group_size": 32}, 12),  # short tail
    ((2, 2, 50), {"group_size": 16}, 16),
    ((4, 7), {"group_size": 3}, 12),
    ((4, 7), {"group_size": 128}, 4),  # wider than the row
)


def new(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grads(y: Tensor, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The gradients of the inputs, as a list."""
    return list(torch.autograd.grad(y, inputs, dy))


class Case(NamedTuple):
    """Tensors and options of one call."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    dy: Tensor


def case(number: int, dtype: torch.dtype, special: bool = False) -> Case:
    """Case `number` of `count()`: the layouts, with options that vary along. Values: on every half step, beyond the range, random."""
    shape, cut, groups = LAYOUTS[number % len(LAYOUTS)]
    g = torch.Generator().manual_seed(number + 1000 * DTYPES.index(dtype))
    n = math.prod(shape)
    scale = 2.0 ** torch.randint(-4, 2, (groups,), generator=g) if number % 3 else torch.rand(groups, generator=g) + 0.05
    x = torch.randint(-20, 21, (n,), generator=g) * scale[torch.arange(n) % groups] * 0.5
    x = torch.where(torch.rand(n, generator=g) < 0.5, x, torch.randn(n, generator=g)).view(shape)
    tensors = {"x": x.to(dtype), "scale": scale}
    if number % 2:
        tensors["zero_point"] = (torch.rand(1 if number % 4 == 1 else groups, generator=g) - 0.5) * 12
    if number % 5 in (1, 2):
        tensors["offset"] = torch.randn(groups if number % 5 == 1 else 1, generator=g)
    if special and n > 20:
        x = tensors["x"].view(-1)
        x[::7], x[1::11], x[2::13], x[3::17] = math.nan, math.inf, -math.inf, -0.0
        if groups > 4:
            scale[0], scale[1], scale[2], scale[3] = 0.0, -0.25, math.nan, 1e-40
    low, high = ((-8, 7), (0, 15), (-1, 1), (-128, 127), (3, 9))[number // 3 % 5]
    options: dict[str, Any] = {"quant_min": low, "quant_max": high, "ste": STES[number % 3], "divide": number % 7 in (1, 4, 6), **cut}
    if number % 6 == 5:  # a range per group
        options["quant_min"] = torch.full((groups,), low)
        options["quant_max"] = max(low, 0) + torch.randint(1, 16, (groups,), generator=g)
    return Case(tensors, options, torch.randn(shape, generator=g).to(dtype))


def count() -> int:
    """Every layout with every kind of mask, range and offset it is given."""
    return 3 * len(LAYOUTS)


def run(given: Case, backend: str) -> dict[str, Tensor]:
    """y, dx and the gradients of everything else, by name."""
    leaves = {name: t.clone().requires_grad_() for name, t in given.tensors.items()}
    with fa.backend(backend):
        y = fake_quantize(**leaves, **given.options)
        grads = torch.autograd.grad(y, list(leaves.values()), given.dy)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, all NaN alike."""
    wide_a, wide_b = a.float(), b.float()
    equal = (wide_a == wide_b) & (wide_a.signbit() == wide_b.signbit())
    return a.dtype == b.dtype and a.shape == b.shape and bool((equal | (wide_a.isnan() & wide_b.isnan())).all())


def check_against_reference(number: int, dtype: torch.dtype, special: bool, backend: str) -> None:
    """y and dx are the reference's bits; sums are within fp32 rounding of what was added up."""
    given = case(number, dtype, special)
    mine, truth = run(given, backend), run(given, "reference")
    for name, expected in truth.items():
        if name in ("y", "dx"):
            assert same_bits(mine[name], expected), (name, number)
        else:
            torch.testing.assert_close(mine[name], expected, rtol=2e-5, atol=2e-4, equal_nan=True)


def pairs() -> list[tuple[int, torch.dtype]]:
    """(case, dtype): every case in one type, the types in turn."""
    return list(zip(range(count()), itertools.cycle(DTYPES)))

"""16-bit elements that are widened on their way into a product, or meet their sum in a register, give the bits of the same numbers in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fusedadapt import _core
from fusedadapt.ops import lowrank_cpp as cpp

ISAS = [isa for isa in ("base", "avx2", "avx512") if _core.use_isa(isa)]
_core.use_isa(ISAS[-1])
HALF = [torch.bfloat16, torch.float16]
#: tokens around the heights of tiles and blocks, columns that are whole panels and others, ranks around the width of a vector
TOKENS, COLUMNS, RANKS = (1, 2, 7, 11, 12, 13, 47, 48, 49, 61, 97), (32, 64, 96, 160, 1, 31, 40, 129), (1, 3, 12, 13, 16, 17, 33)
CASES = [(t, COLUMNS[i % len(COLUMNS)], RANKS[(i * 3 + j) % len(RANKS)]) for i, t in enumerate(TOKENS * 2) for j in range(3)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(ISAS[-1])


def data(t: int, k: int, dtype: torch.dtype, padding: int = 0) -> Tensor:
    """Rows ``padding`` elements apart from each other, NaN between them."""
    gen = torch.Generator().manual_seed(t * 1000 + k)
    x = torch.full((t, k + padding), torch.nan, dtype=dtype)
    x[:, :k] = torch.randn(t, k, generator=gen).to(dtype)
    return x[:, :k]


def factor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit; any NaN is like any other."""
    return (
        torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        and torch.equal(one.isnan(), other.isnan())
        and torch.equal(one.signbit() & ~one.isnan(), other.signbit() & ~other.isnan())
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("padding", [0, 3])
def test_reading(dtype: torch.dtype, padding: int, isa: str) -> None:
    for t, k, r in CASES:
        x, a, u = data(t, k, dtype, padding), factor(r, k), factor(t, r)
        wide = x.float()
        assert same(cpp.shrink(x, a, None, [0], [r]), cpp.shrink(wide, a, None, [0], [r])), (t, k, r)
        assert same(cpp.bwd_x(x, u, None, [0], [r]), cpp.bwd_x(wide, u, None, [0], [r])), (t, k, r)
        b = factor(k, r + 1)
        _, dv, mb, _, _ = cpp.bwd_dy(x, u, b, None, None, False)
        _, true_dv, true_mb, _, _ = cpp.bwd_dy(wide, u, b, None, None, False)
        assert same(dv, true_dv) and same(mb, true_mb), (t, k, r)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("padding", [0, 3])
def test_adding(dtype: torch.dtype, padding: int, isa: str) -> None:
    for t, k, r in CASES:
        y, u, a = data(t, k, dtype, padding), factor(t, r), factor(r, k)
        wide = y.float()
        around = y.as_strided((t, k + padding), y.stride())
        cpp.add_(y, u, a, None, [0], [r])
        cpp.add_(wide, u, a, None, [0], [r])
        assert same(y, wide.to(dtype)), (t, k, r)
        assert around[:, k:].isnan().all(), "what lies between the rows"


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_special_numbers(dtype: torch.dtype, isa: str) -> None:
    """Subnormal numbers are numbers; a NaN stays in its row, with or without a payload; infinities and signs of zero arrive."""
    special = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 64)  # every one there is
    zero, one = torch.zeros(special.shape[0], 3), torch.zeros(3, 64)
    y = special.clone()
    cpp.add_(y, zero, one, None, [0], [3])
    assert same(y, special + torch.zeros((), dtype=dtype))
    eye = torch.eye(64)
    finite = special[special.isfinite().all(1)]
    assert torch.equal(cpp.shrink(finite, eye, None, [0], [64]), finite.float())
    nan = cpp.shrink(special, torch.ones(1, 64), None, [0], [1]).isnan().flatten()
    assert torch.equal(nan, special.float().sum(1).isnan())


def test_sums_are_rounded_to_nearest_even(isa: str) -> None:
    """From every number of bf16 to the middle of its neighbour and a little to both sides."""
    bits = torch.arange(0x0080, 0x7F00, dtype=torch.int32).to(torch.int16)
    y = bits.view(torch.bfloat16).view(-1, 64)[: bits.numel() // 64 // 2 * 2]
    half = ((y.view(torch.int16) + 1).view(torch.bfloat16).float() - y.float()) / 2
    for change in (half, half * (1 - 2**-20), half * (1 + 2**-20), -half):
        for row in range(0, y.shape[0], 37):
            got = y[row : row + 1].clone()
            cpp.add_(got, torch.ones(1, 1), change[row : row + 1], None, [0], [1])
            assert torch.equal(got, (y[row : row + 1].float() + change[row : row + 1]).bfloat16())

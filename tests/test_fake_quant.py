"""Fake quantization against torch's ops, the papers' formulas and itself: values, masks, gradients, layouts, edge cases."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import fake_quant_cases as cases
import pytest
import torch
from fake_quant_cases import BACKENDS, DTYPES, FOUR, STES, grads, new, same_bits
from torch import Tensor

import fusedadapt as fa
from fusedadapt import dispatch
from fusedadapt.quant import fake_quantize


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fa.backend(request.param):
        yield request.param


def around_ties(scale: float, n: int = 4001) -> Tensor:
    """Every half step and its neighbours, then random numbers."""
    ties = torch.arange(-12, 12.5, 0.5) * scale
    near = torch.cat([ties, torch.nextafter(ties, torch.tensor(9e9)), torch.nextafter(ties, torch.tensor(-9e9))])
    return torch.cat([near, new(n - near.numel())])


# ---- torch's ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale, zero, low, high", [(0.1, 0, -8, 7), (0.25, 3, 0, 15), (1 / 3, 128, 0, 255), (7.3e-3, -7, -128, 127)])
def test_torch_per_tensor(backend: str, dtype: torch.dtype, scale: float, zero: int, low: int, high: int) -> None:
    x, dy = around_ties(scale).to(dtype), new(4001, seed=1).to(dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine = fake_quantize(a, scale, zero, quant_min=low, quant_max=high, ste="round")
    theirs = torch.fake_quantize_per_tensor_affine(b, scale, zero, low, high)
    assert same_bits(mine, theirs)
    assert torch.equal(*grads(mine, [a], dy), *grads(theirs, [b], dy))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_torch_per_channel(backend: str, axis: int) -> None:
    x, dy = new(5, 7, 19), new(5, 7, 19, seed=1)
    channels = x.shape[axis]
    scale, zero = torch.rand(channels) * 0.2 + 0.02, torch.arange(channels) % 5 - 2
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine = fake_quantize(a, scale, zero, axis=axis, ste="round", **FOUR)
    theirs = torch.fake_quantize_per_channel_affine(b, scale, zero.int(), axis % 3, -8, 7)
    assert same_bits(mine, theirs)
    assert torch.equal(*grads(mine, [a], dy), *grads(theirs, [b], dy))


@pytest.mark.parametrize("zero", [0.0, 2.0, -3.0, 4.4, -1.7, 99.0])
@pytest.mark.parametrize("factor", [1.0, 0.03])
def test_torch_learnable(backend: str, zero: float, factor: float) -> None:
    """torch's per-tensor op truncates zero + 1/2 in its backward pass, and rounds x / scale + zero there: compared where that changes nothing."""
    for x, axis, op in (
        (new(4001), None, lambda x, s, z: torch._fake_quantize_learnable_per_tensor_affine(x, s, z, -8, 7, factor)),
        (new(6, 50), 0, lambda x, s, z: torch._fake_quantize_learnable_per_channel_affine(x, s, z, 0, -8, 7, factor)),
        (new(50, 6), 1, lambda x, s, z: torch._fake_quantize_learnable_per_channel_affine(x, s, z, 1, -8, 7, factor)),
    ):
        if axis is None and (zero < 0 or zero != round(zero)):
            continue
        groups = 1 if axis is None else 6
        scale, zeros, dy = torch.linspace(0.1, 0.3, groups), torch.full((groups,), zero), new(*x.shape, seed=1)
        a, b = ([t.clone().requires_grad_() for t in (x, scale, zeros)] for _ in range(2))
        mine, theirs = fake_quantize(*a, axis=axis, ste="round", grad_scale=factor, **FOUR), op(*b)
        assert same_bits(mine, theirs)
        for i, (one, other) in enumerate(zip(grads(mine, a, dy), grads(theirs, b, dy), strict=True)):
            assert torch.equal(one, other) if i == 0 else torch.allclose(one, other, rtol=1e-5, atol=1e-5 * math.sqrt(x.numel())), i


# ---- the papers' formulas


def lsq(x: Tensor, s: Tensor, low: int, high: int, g: float, beta: Tensor | None = None) -> Tensor:
    """As the papers' listings have it: gradients scaled, rounding passed through."""

    def scaled(t: Tensor) -> Tensor:
        return (t - t * g).detach() + t * g

    s, beta = scaled(s), None if beta is None else scaled(beta)
    u = ((x if beta is None else x - beta) / s).clamp(low, high)
    q = (u.round() - u).detach() + u
    return q * s if beta is None else q * s + beta


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("plus", [False, True])
def test_lsq(backend: str, plus: bool, dtype: torch.dtype) -> None:
    x, dy = around_ties(0.25).to(dtype), new(4001, seed=1).to(dtype)
    first = [x, torch.tensor([0.25], dtype=dtype)] + [torch.tensor([0.125], dtype=dtype)] * plus
    a, b = ([t.clone().requires_grad_() for t in first] for _ in range(2))
    mine = fake_quantize(*a[:2], offset=a[2] if plus else None, grad_scale="lsq", divide=True, **FOUR)
    theirs = lsq(*b[:2], -8, 7, 1 / math.sqrt(4001 * 7), *b[2:])
    assert same_bits(mine.detach(), theirs.detach() + 0.0)
    got, expected = grads(mine, a, dy), grads(theirs, b, dy)
    assert torch.equal(got[0], expected[0])
    for one, other in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_mid_rise_levels_are_an_offset(backend: str) -> None:
    """StatsQ: s (rne(c n - 1/2) + 1/2) / n with c = clamp(w / s, -1, 1), every gradient passed."""
    w = new(6, 40).requires_grad_()
    s, n = 2 * w.detach().abs().mean(1, keepdim=True), 4
    expected = s * ((((w.detach() / s).clamp(-1, 1 - 1e-6) * n - 0.5).round() + 0.5) / n)
    got = fake_quantize(w, s / n, quant_min=-n, quant_max=n - 1, axis=0, offset=s / (2 * n), ste="identity", divide=True)
    torch.testing.assert_close(got.detach(), expected)
    assert torch.equal(*grads(got, [w], torch.ones_like(w)), torch.ones_like(w))


def test_lsq_factor_counts_the_elements_of_each_scale(backend: str) -> None:
    """The last group of a row is short; a range given as a tensor counts its own end."""
    x, scale = new(3, 10), torch.full((3, 3), 0.2)
    for high in (7, torch.tensor(7)):
        plain, scaled = (
            grads(
                fake_quantize(x, s := scale.clone().requires_grad_(), quant_min=-8, quant_max=high, group_size=4, grad_scale=g),
                [s],
                torch.ones(3, 10),
            )[0]
            for g in (None, "lsq")
        )
        torch.testing.assert_close(scaled, plain / (torch.tensor([4.0, 4.0, 2.0]) * 7).sqrt())


# ---- derivatives


def surrogate(x: Tensor, s: Tensor, beta: Tensor, ste: str, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """A smooth function that straight-through gradients are the derivatives of: what rounding and clamping did at a point is held fixed."""
    u0 = (at[0] - at[2]) / at[1]
    q0 = u0.clamp(-8, 7).round()
    inside = {"clamp": (u0 >= -8) & (u0 <= 7), "round": (u0.round() >= -8) & (u0.round() <= 7), "identity": u0 == u0}[ste]
    u = (x - beta) / s
    return torch.where(inside, u + (q0 - u0), q0) * s + beta


@pytest.mark.parametrize("ste", STES)
@pytest.mark.parametrize("cut, groups", [({}, 1), ({"axis": 0}, 3), ({"axis": 1}, 7), ({"group_size": 4}, 6)])
def test_gradients_in_fp64(ste: str, cut: dict[str, int], groups: int) -> None:
    x = (new(3, 7) * 3).double()
    scale, beta = torch.rand(groups, dtype=torch.float64) * 0.2 + 0.3, torch.rand(groups, dtype=torch.float64)

    def wide(t: Tensor) -> Tensor:
        if "group_size" in cut:
            return t.view(3, 2).repeat_interleave(4, 1)[:, :7]
        return t.view(-1, 1) if cut.get("axis") == 0 else t

    mine = [t.clone().requires_grad_() for t in (x, scale, beta)]
    theirs = [t.clone().requires_grad_() for t in (x, scale, beta)]
    at = (x, wide(scale), wide(beta))
    y = fake_quantize(*mine[:2], offset=mine[2], ste=ste, **cut, **FOUR)
    smooth = surrogate(theirs[0], wide(theirs[1]), wide(theirs[2]), ste, at)
    torch.testing.assert_close(y, smooth, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *t: surrogate(t[0], wide(t[1]), wide(t[2]), ste, at), theirs)
    dy = new(3, 7, seed=2).double()
    for one, other in zip(grads(y, mine, dy), grads(smooth, theirs, dy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_zero_point_is_an_offset_in_steps() -> None:
    """dzero = -scale doffset, also for one zero point over many channels."""
    x, scale = new(4, 30).double(), torch.linspace(0.05, 0.2, 4).double()
    zero = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    offset = (-2.0 * scale).requires_grad_()
    (d_zero,) = grads(fake_quantize(x, scale, zero, axis=0, ste="round", **FOUR), [zero], x)
    (d_offset,) = grads(fake_quantize(x, scale, offset=offset, axis=0, ste="round", **FOUR), [offset], x)
    assert d_zero.abs() > 0.1
    torch.testing.assert_close(d_zero, -(scale * d_offset).sum().view(1))


@pytest.mark.parametrize("low, high", [(-8, 7), (-7, 8), (0, 15), (-1, 1)])
def test_masks_on_the_half_step_band(backend: str, low: int, high: int) -> None:
    """Half a step beyond the range LSQ passes nothing; torch passes what still rounds into it, ties to even."""
    edges = torch.tensor([low - 0.5, low, high, high + 0.5])
    edges = torch.stack([torch.nextafter(edges, torch.tensor(-9e9)), edges, torch.nextafter(edges, torch.tensor(9e9))]).flatten()
    u = torch.cat([edges, torch.tensor([low - 0.49, high + 0.49, high + 0.51, low - 1.0, 0.0])])
    for ste, expected in (
        ("clamp", (u >= low) & (u <= high)),
        ("round", (u.round() >= low) & (u.round() <= high)),
        ("identity", torch.ones(u.numel(), dtype=torch.bool)),
    ):
        x, scale = u.clone().requires_grad_(), torch.ones(1, requires_grad=True)  # with sums and without
        for wanted in ([x, scale], [x]):
            y = fake_quantize(x, scale if len(wanted) > 1 else 1.0, quant_min=low, quant_max=high, ste=ste)
            assert torch.equal(grads(y, wanted, torch.ones_like(u))[0], expected.float()), ste


def test_division_and_reciprocal_differ_at_ties(backend: str) -> None:
    """0.35 / 0.1 is 3.5 and rounds to 4; by 0.1's reciprocal, rounded up, some other tie goes the other way."""
    scale = torch.tensor(0.1)
    x = torch.arange(0.05, 3000, 0.1)[: 1 << 14]
    divided, multiplied = (fake_quantize(x, scale, quant_min=-(1 << 20), quant_max=1 << 20, divide=d) for d in (True, False))
    assert same_bits(divided, (x / scale).round() * scale) and same_bits(multiplied, (x * (1 / scale)).round() * scale)
    differ = divided != multiplied
    assert differ.any() and torch.allclose((divided - multiplied)[differ].abs(), scale, rtol=1e-2)


# ---- layouts, backends, edge cases


@pytest.mark.skipif(dispatch.core() is None, reason="no compiled core")
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("number, dtype", cases.pairs())
def test_cpp_is_the_reference(number: int, dtype: torch.dtype, special: bool) -> None:
    cases.check_against_reference(number, dtype, special, "cpp")


@pytest.mark.parametrize("cut", [{}, {"axis": 0}, {"axis": 1}, {"group_size": 5}])
def test_strides_of_x_and_dy(backend: str, cut: dict[str, int]) -> None:
    base, scale = new(12, 12), torch.rand({0: 12, 1: 12}.get(cut.get("axis", -1), 36 if cut.get("group_size") else 1)) + 0.1
    for x in (base.t(), base[::2].repeat_interleave(2, 0), base.flip(0), new(12, 24)[:, ::2]):
        a, b = (t.clone().requires_grad_() for t in (x, x.contiguous()))
        a = x.detach().requires_grad_()
        dy = torch.ones(1).expand(12, 12)
        one, other = fake_quantize(a, scale, **cut, **FOUR), fake_quantize(b, scale, **cut, **FOUR)
        assert same_bits(one, other) and torch.equal(*grads(one, [a], dy), *grads(other, [b], dy.contiguous()))


@pytest.mark.parametrize("shape, cut", [((0,), {}), ((0, 3), {"axis": 1}), ((3, 0), {"axis": 0}), ((2, 0), {"group_size": 4}), ((0,), {"axis": 0})])
def test_nothing(backend: str, shape: tuple[int, ...], cut: dict[str, int]) -> None:
    groups = {(0,): 1, (0, 3): 3, (3, 0): 3, (2, 0): 0}[shape] if cut != {"axis": 0} or shape != (0,) else 0
    x, scale = torch.zeros(shape, requires_grad=True), torch.ones(groups, requires_grad=True)
    y = fake_quantize(x, scale, grad_scale="lsq", **cut, **FOUR)
    dx, d_scale = grads(y, [x, scale], torch.zeros(shape))
    assert y.shape == dx.shape == shape and torch.equal(d_scale, torch.zeros(groups))


@pytest.mark.parametrize("cut, count", [({}, 1), ({"axis": 0}, 2), ({"axis": 1}, 3), ({"group_size": 2}, 4)])
def test_no_zero_point_is_0_also_where_the_range_excludes_it(backend: str, cut: dict[str, int], count: int) -> None:
    x = torch.tensor([[1.0, 4.0, 9.0], [0.0, 2.0, -9.0]], requires_grad=True)
    for bounds in ({"quant_min": 3, "quant_max": 9}, {"quant_min": torch.tensor(3), "quant_max": torch.full((count,), 9)}):
        scale = torch.full((count,), 0.5, requires_grad=True)
        y = fake_quantize(x, scale, **bounds, **cut)
        assert torch.equal(y, torch.tensor([[1.5, 4.0, 4.5], [1.5, 2.0, 1.5]]))
        dx, d_scale = grads(y, [x, scale], torch.ones(2, 3))
        assert torch.equal(dx, torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])) and float(d_scale.sum()) == 3 + 0 + 9 + 3 + 0 + 3
    assert torch.equal(fake_quantize(x.detach(), 0.5, 0, quant_min=3, quant_max=9), torch.tensor([[1.0, 3.0, 3.0], [0.0, 2.0, 0.0]]))


def test_special_values(backend: str) -> None:
    nan, inf = math.nan, math.inf
    x = torch.tensor([nan, inf, -inf, -0.1, -0.0, 0.1])
    assert same_bits(fake_quantize(x, 0.5, **FOUR), torch.tensor([nan, 3.5, -4.0, 0.0, 0.0, 0.0]))
    zeros = torch.zeros(5)
    for scale in (0.0, 1e-40, -1e-38):  # a group of zeros: no NaN from 0 / 0
        assert torch.equal(fake_quantize(x[1:], scale, **FOUR).nan_to_num(9.0), zeros.masked_fill(x[1:].isinf(), 9.0))
    finite = x[3:]
    for bad in (
        {"scale": nan},
        {"zero_point": torch.tensor(nan)},
        {"offset": nan},
        {"quant_max": torch.tensor(nan)},
        {"quant_min": torch.tensor(-inf)},
    ):
        assert fake_quantize(finite, **{"scale": 0.5, **FOUR, **bad}).isnan().all(), bad
    assert same_bits(fake_quantize(finite, -0.5, **FOUR), torch.tensor([-0.0, -0.0, -0.0]))


def test_nan_reaches_the_scale_but_not_its_neighbours(backend: str) -> None:
    x = new(2, 40)
    x[1, 3] = math.nan
    for ste in STES:
        a, scale = x.clone().requires_grad_(), torch.full((2,), 0.2, requires_grad=True)
        dx, d_scale = grads(fake_quantize(a, scale, axis=0, ste=ste, **FOUR), [a, scale], torch.ones_like(x))
        assert dx.isfinite().all() and d_scale[0].isfinite() and d_scale[1].isnan()


def test_small_scales_count_as_the_least_and_keep_their_gradient(backend: str) -> None:
    x, scale = new(3, 40), torch.tensor([1e-9, -1.0, 0.5], requires_grad=True)
    y = fake_quantize(x, scale, axis=0, scale_min=0.25, **FOUR)
    floored = torch.tensor([0.25, 0.25, 0.5], requires_grad=True)
    expected = fake_quantize(x, floored, axis=0, **FOUR)
    assert same_bits(y, expected) and torch.equal(*grads(y, [scale], x), *grads(expected, [floored], x))


@pytest.mark.skipif(dispatch.core() is None, reason="no compiled core")
@pytest.mark.parametrize("shape, cut, groups", [((300_000,), {}, 1), ((700, 260), {"axis": 1}, 260), ((40, 5000), {"axis": 0}, 40)])
def test_sums_are_accurate_and_do_not_depend_on_threads_or_instructions(shape: Any, cut: Any, groups: int) -> None:
    """Error below 1e-6 of what is added up, before signs cancel; the same bits for any number of threads and on every instruction set."""
    x, dy, scale = new(*shape), new(*shape, seed=1), torch.full((groups,), 0.13)

    def sums(dtype: torch.dtype, over: Tensor) -> list[Tensor]:
        s, beta = scale.to(dtype).requires_grad_(), torch.zeros(groups, dtype=dtype, requires_grad=True)
        return grads(fake_quantize(x.to(dtype), s, offset=beta, **cut, **FOUR), [s, beta], over.to(dtype))

    core, threads, isa = dispatch.core(), torch.get_num_threads(), dispatch.core().isa()  # type: ignore[union-attr]
    exact, size = sums(torch.float64, dy), sums(torch.float64, dy.abs())
    found = []
    try:
        for count in (1, 2, 3, 2):
            for name in ("base", "avx2", "avx512"):
                if core.use_isa(name):  # type: ignore[union-attr]
                    torch.set_num_threads(count)
                    found.append(sums(torch.float32, dy))
    finally:
        torch.set_num_threads(threads)
        core.use_isa(isa)  # type: ignore[union-attr]
    for i in range(2):
        assert all(torch.equal(found[0][i], other[i]) for other in found)
        assert ((found[0][i] - exact[i]).abs() <= 1e-6 * (size[1].abs() + exact[i].abs() + x.numel() / groups)).all()

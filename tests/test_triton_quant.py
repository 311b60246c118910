"""Interpreted low-bit kernels against the reference: equal bytes and bits for every format and hostile shape, products against fp64.

A product may be off by 1.2 times what the weight rounded to x's dtype, multiplied in fp64, is off by, and an fp32 sum's own error.
"""

import dataclasses

import pytest
import torch
import triton
from quant_cases import FLOATS, KINDS, SPECS, same, ties, weight

import fusedadapt as fa
from fusedadapt.kernels import quant as gpu
from fusedadapt.kernels import quant_linear
from fusedadapt.quant import QFormat, format_of
from fusedadapt.reference import quant as reference
from fusedadapt.reference.quant import Parts
from fusedadapt.reference.quant_rules import RULES

# Of the last, rows begin inside a byte where a format is packed through.
SHAPES = ((1, 1), (7, 65), (130, 17), (2, 1100), (33, 131))
# T, N, K: few tokens and many, splits, tails
PRODUCTS = ((1, 33, 257), (2, 3, 600), (17, 70, 260), (3, 130, 64), (65, 5, 131))
FP32_SUM = 2e-7

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("quick_calls")]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a launcher allocates is full of NaN, or of ones and zeros: nothing may be read before it is written, nothing left unwritten."""
    new_empty = torch.Tensor.new_empty
    fill = lambda t: t.fill_(float("nan") if t.is_floating_point() else 0xA5)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: fill(new_empty(*args, **options)))


def test_runs_interpreted():
    assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before triton is imported (tests/conftest.py does)"


def quantized(w: torch.Tensor, fmt: QFormat) -> Parts:
    """The reference's, after making sure that every step of ours gives the same."""
    lo, hi = reference.stats(w, fmt)
    for got, want in zip(gpu.stats(w, fmt), (lo, hi), strict=True):
        assert got.shape == want.shape and ((got == want) | (got.isnan() & want.isnan())).all(), "stats"
    found = RULES[fmt.rule](w, lo, hi, fmt)
    zero = None if found.zero is None else found.zero.float()
    parts = Parts(reference.encode(w, found.factor, zero, fmt), found.scale, found.zero, found.super, found.offset)
    assert same(gpu.encode(w, found.factor, zero, fmt), parts.qdata), "encode"
    return parts


def check_back(parts: Parts, fmt: QFormat, n: int, k: int, dtype: torch.dtype) -> None:
    for row0, row1 in {(0, n), (n // 3, n // 2 + 1)}:
        got, want = (m.dequantize(parts, fmt, n, k, row0, row1, dtype) for m in (gpu, reference))
        assert same(got, want), (row0, row1)


def case(spec: str, i: int) -> int:
    return list(SPECS).index(spec) + i


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_and_back(spec):
    for i, (n, k) in enumerate(SHAPES):
        turn = case(spec, i)
        w = weight(KINDS[turn * 4 % len(KINDS)], n, k, FLOATS[turn % 3])
        check_back(quantized(w, SPECS[spec]), SPECS[spec], n, k, FLOATS[(turn + i) % 3])


@pytest.mark.parametrize("spec", SPECS)
def test_not_finite(spec):
    w = weight("normal", 9, 130, torch.float32)
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"), 1e-40, -0.0)):
        w[2 * i, 7 * i] = value
    check_back(quantized(w, SPECS[spec]), SPECS[spec], 9, 130, torch.float32)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if SPECS[spec].table and SPECS[spec].scale != "nested"])
def test_ties(spec):
    fmt = SPECS[spec]
    w = ties(fmt)
    factor = torch.ones(fmt.grid(*w.shape))
    assert same(gpu.encode(w, factor, None, fmt), reference.encode(w, factor, None, fmt))


@pytest.mark.parametrize("spec", SPECS)
def test_every_byte_means_the_same(spec):
    """Random codes, also those that nothing writes, and random scales, zeros and scales of scales."""
    fmt, draw = SPECS[spec], torch.Generator().manual_seed(case(spec, 0))
    n, k = 10, 131
    grid = fmt.grid(n, k)
    bytes_of = lambda shape: torch.randint(0, 256, shape, generator=draw).to(torch.uint8)
    coded = fmt.scale_dtype == torch.uint8
    above = None if fmt.above(n, k) is None else torch.randn(fmt.above(n, k), generator=draw)
    parts = Parts(
        bytes_of(fmt.packed(n, k)),
        bytes_of(grid) if coded else torch.randn(grid, generator=draw).to(fmt.scale_dtype),
        None if not fmt.zero else bytes_of(grid) if fmt.zero == "uint8" else torch.randn(grid, generator=draw),
        above,
        torch.tensor(0.11) if fmt.scale == "nested" else None,
    )
    check_back(parts, fmt, n, k, FLOATS[case(spec, 0) % 3])


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


@pytest.mark.parametrize("spec", SPECS)
def test_products(spec):
    for i in {case(spec, 0) % 5, case(spec, 2) % 5}:
        check_products(SPECS[spec], *PRODUCTS[i], FLOATS[case(spec, i) % 3])


def check_products(fmt: QFormat, t: int, n: int, k: int, dtype: torch.dtype) -> None:
    w = weight("small", n, k)
    found = RULES[fmt.rule](w, *reference.stats(w, fmt), fmt)
    zero = None if found.zero is None else found.zero.float()
    parts = Parts(reference.encode(w, found.factor, zero, fmt), found.scale, found.zero, found.super, found.offset)
    exact = reference.dequantize(parts, fmt, n, k, 0, n, torch.float32)
    # rows further apart than long, NaN between them
    x, dy = (torch.nn.functional.pad(weight("normal", t, c, dtype, 3), (0, 3), value=float("nan"))[:, :c] for c in (k, n))
    bias = weight("normal", 1, n, dtype, 4)[0] if t != 2 else None
    added = 0.0 if bias is None else bias.double()
    for call, product in (
        (lambda: gpu.linear(x, parts, fmt, n, bias), lambda m: x.double() @ m.double().T + added),
        (lambda: gpu.linear_dx(dy, parts, fmt, n, k), lambda m: dy.double() @ m.double()),
    ):
        got, want = call(), product(exact)
        assert got.dtype == dtype and (t > 3 or torch.equal(got, call()))
        allowed = 1.2 * off(product(exact.to(dtype)).to(dtype), want) + FP32_SUM
        assert off(got, want) <= allowed, (t, n, k, dtype, off(got, want), allowed)


def test_a_broken_weight_shows():
    """NaN in a group's scale reaches the outputs of its rows, and of no others."""
    fmt = format_of("int4", 128)
    w = weight("normal", 40, 256)
    w[5, 130] = float("nan")
    parts = quantized(w, fmt)
    for t in (1, 5):
        y = gpu.linear(torch.ones(t, 256, dtype=torch.bfloat16), parts, fmt, 40, None)
        assert y[:, 5].isnan().all() and y.isnan().sum() == t


@pytest.mark.parametrize("t", [1, 9])
def test_a_bias_may_be_a_view(t):
    qw, x, bias = fa.quantize(weight("normal", 17, 64), "int4", 32), weight("normal", t, 64), weight("normal", 17, 2)[:, 0]
    with fa.backend("triton"):
        assert same(fa.quantized_linear(x, qw, bias), fa.quantized_linear(x, qw, bias.clone()))


def test_plans_do_not_depend_on_anything_but_shapes():
    """More programs for small weights, shares that cover the sum, and no share without a tile."""
    for spec, fmt in SPECS.items():
        for t, n, k in ((1, 4096, 4096), (2, 1, 1), (16, 1024, 4096), (64, 28672, 8192), (7, 5, 100_000)):
            f = quant_linear.stored(fmt, k)
            p, q = quant_linear.linear_plan(t, n, k, f, True, 2), quant_linear.dx_plan(t, n, k, f, 2)
            for length, size, plan in ((k, p.deep, p), (n, q.rows, q)):
                tiles = triton.cdiv(length, size)
                assert plan.splits * plan.steps >= tiles > (plan.splits - 1) * plan.steps, (spec, t, n, k, plan)
    assert quant_linear.linear_plan(1, 4096, 4096, quant_linear.stored(format_of("int4"), 4096), True, 2).splits > 1


def test_refuses_odd_bits():
    with pytest.raises(ValueError, match="1, 2, 3, 4, 6 or 8 bits"):
        gpu.encode(torch.ones(2, 8), torch.ones(2, 1), None, dataclasses.replace(format_of("int4"), bits=5))

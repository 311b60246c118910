"""The C++ quant kernels against the reference: equal bytes, equal numbers, products against fp64, on formats and shapes chosen to hurt."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fusedadapt as fa
from fusedadapt.quant.formats import FORMATS, QFormat, format_of
from fusedadapt.reference import quant as reference
from fusedadapt.reference.quant import Parts
from fusedadapt.reference.quant_rules import RULES
from fusedadapt.testing import poisoned_memory

_core = pytest.importorskip("fusedadapt._core")
from fusedadapt.ops import quant_cpp as cpp  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = [isa for isa in ("base", "avx2", "avx512") if _core.use_isa(isa)]
_core.use_isa(ISAS[-1])
SHAPES = [(1, 1), (3, 2), (1, 7), (5, 33), (7, 64), (2, 129), (33, 96), (4, 256), (6, 1000), (130, 40), (3, 2081), (64, 64), (40, 520)]


def _formats() -> dict[str, QFormat]:
    """Every format, then every way in which groups, scales and zeros can differ."""
    found = dict(FORMATS)
    for name in ("nf4", "fp4"):
        found |= {f"{name} nested": format_of(name, double_quant=True), f"{name} as on a CPU": format_of(name, compat="bnb_cpu")}
        found[f"{name} 256"] = format_of(name, 256)
    for bits in (2, 3, 4, 8):
        name = f"int{bits}"
        for axis, size in (("n", 8), ("n", None), ("row", None), ("tensor", None), ("block", None)):
            found[f"{name} {axis} {size}"] = format_of(name, size, group_axis=axis)
        for size in (1, 3, 8, 16, 20, 32, 64):
            found[f"{name} {size}"] = format_of(name, size)
        found[f"{name} other zero"] = format_of(name, 32, symmetric=bits != 8)
        found |= {f"{name} {dtype}": format_of(name, 32, scale_dtype=dtype) for dtype in DTYPES[1:]}
    found["fp8 block"] = format_of("fp8_e4m3", group_axis="block")
    found |= {f"mxfp4 {rule}": format_of("mxfp4", scale_rule=rule) for rule in ("ceil", "even", "rceil")}
    found |= {f"fp4_e2m1 {size}": format_of("fp4_e2m1", size, scale_rule="m2") for size in (32, 96, -1)}
    found["int4 tiles"] = replace(FORMATS["int4"], block=(3, 5))
    return found


CASES = _formats()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(ISAS[-1])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other by spinning, which on a busy machine takes longer than these small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weight(n: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers; every third case has a group of zeros, numbers of both extremes or some that are no numbers."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=gen)
    flat = w.view(-1)
    if seed % 4 == 1:
        w[n // 2] = 0
        flat[0] = -0.0
    if seed % 4 == 2:
        flat[::7] *= torch.finfo(dtype).tiny * 0.3
        flat[3::7] *= 1e4
    if seed % 4 == 3:
        for at, value in zip(torch.randint(n * k, (3,), generator=gen).tolist(), (torch.nan, torch.inf, -torch.inf)):
            flat[at] = value
    return w.to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included, the sign of zero too."""
    nan = a.isnan()
    return bool((nan == b.isnan()).all() and a[~nan].equal(b[~nan]) and a[~nan].signbit().equal(b[~nan].signbit()))


@functools.lru_cache(maxsize=2000)
def quantized(name: str, n: int, k: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Parts]:
    """(w, lo, hi, factor, zero, parts), all by the reference."""
    fmt, w = CASES[name], weight(n, k, dtype, seed)
    lo, hi = reference.stats(w, fmt)
    found = RULES[fmt.rule](w, lo, hi, fmt)
    zero = None if found.zero is None else found.zero.float()
    parts = Parts(reference.encode(w, found.factor, zero, fmt), found.scale, found.zero, found.super, found.offset)
    return w, lo, hi, found.factor, zero, parts


@pytest.mark.parametrize("name", CASES)
def test_the_codec_is_the_reference(name: str, isa: str) -> None:
    fmt, rng = CASES[name], random.Random(name)
    for number, (n, k) in enumerate(SHAPES):
        dtype = DTYPES[(number + len(name)) % 3]
        w, lo, hi, factor, zero, parts = quantized(name, n, k, dtype, number)
        with poisoned_memory():
            got = cpp.stats(w, fmt)
            assert torch.equal(got[0].nan_to_num(9e9), lo.nan_to_num(9e9)) and torch.equal(got[1].nan_to_num(9e9), hi.nan_to_num(9e9)), (n, k)
            qdata = cpp.encode(w, factor, zero, fmt)
            assert torch.equal(qdata, parts.qdata), (n, k, dtype)
            for out in DTYPES:
                row0 = 0 if out == torch.float32 else rng.randrange(n)
                row1 = n if out == torch.float32 else rng.randrange(row0, n) + 1
                rows = cpp.dequantize(parts, fmt, n, k, row0, row1, out)
                assert same(rows, reference.dequantize(parts, fmt, n, k, row0, row1, out)), (n, k, row0, row1, out)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "mxfp8_e4m3", "mxfp8_e5m2", "dynamic8", "dynamic8_unsigned", "mxfp4"])
def test_every_code_and_tie(name: str, isa: str) -> None:
    """Codes of NaN and infinity, subnormal numbers, both zeros; numbers beside every cut, and fp32 numbers of all magnitudes."""
    fmt, draw = FORMATS[name], torch.Generator().manual_seed(5)
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 2)
    k = 2 * 256 * 8 // fmt.bits
    grid = fmt.grid(3, k)
    scale = torch.randint(0, 256, grid, generator=draw, dtype=torch.uint8) if fmt.scale == "e8m0" else torch.randn(grid, generator=draw)
    parts = Parts(codes, scale, None, None, None)
    for dtype in DTYPES:
        assert same(cpp.dequantize(parts, fmt, 3, k, 0, 3, dtype), reference.dequantize(parts, fmt, 3, k, 0, 3, dtype)), dtype
    finite = torch.tensor(sorted(v for v in fmt.values if math.isfinite(v)))
    cuts = torch.tensor(fmt.codes.cuts)  # type: ignore[union-attr]
    points = torch.cat([finite, (finite[:-1] + finite[1:]) / 2, cuts, -cuts])
    beside = [torch.nextafter(points, torch.tensor(side)) for side in (torch.inf, -torch.inf)]
    random_bits = torch.randint(-(1 << 31), (1 << 31) - 1, (20000,), generator=draw).to(torch.int32).view(torch.float32)
    near_one = (torch.rand(20000, generator=draw) * 2 - 1) * float(finite[-1])
    w = torch.cat([points, *beside, random_bits, near_one, torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])])[None]
    factor = torch.ones(fmt.grid(1, w.shape[1]))
    got, wanted = cpp.encode(w, factor, None, fmt), reference.encode(w, factor, None, fmt)
    assert torch.equal(got, wanted), w.view(-1)[(got.view(-1) != wanted.view(-1)).nonzero().view(-1)[:5]]


PRODUCTS = [(1, 5, 33), (2, 17, 64), (3, 4, 256), (4, 40, 129), (5, 9, 1030), (7, 1, 2), (1, 33, 4200), (17, 6, 96), (2, 130, 520), (1, 300, 512)]


def torch_error(x: Tensor, parts: Parts, fmt: QFormat, n: int, k: int, transposed: bool) -> Tensor:
    """|error| of torch's fp32 product of the weight rounded to x's dtype."""
    exact = reference.dequantize(parts, fmt, n, k, 0, n, torch.float32).double()
    rounded = reference.dequantize(parts, fmt, n, k, 0, n, x.dtype).float()
    a, b = (exact, rounded) if transposed else (exact.t(), rounded.t())
    return ((x.float() @ b).to(x.dtype).double() - x.double() @ a).abs()


@pytest.mark.parametrize("name", CASES)
def test_products_are_as_exact_as_torch_and_repeat(name: str, isa: str) -> None:
    fmt = CASES[name]
    gen = torch.Generator().manual_seed(len(name))
    for number, (t, n, k) in enumerate(PRODUCTS):
        dtype = DTYPES[(number + len(name)) % 3]
        parts = quantized(name, n, k, DTYPES[number % 3], 4 * number)[-1]
        exact = reference.dequantize(parts, fmt, n, k, 0, n, torch.float32).double()
        bias = torch.randn(n, generator=gen).to(dtype) if number % 2 else None
        for width, transposed in ((k, False), (n, True)):
            x = torch.randn(t, width + number % 3, generator=gen).to(dtype)[:, :width]
            with poisoned_memory():
                y = cpp.linear_dx(x, parts, fmt, n, k) if transposed else cpp.linear(x, parts, fmt, n, bias)
            true, size = (x.double() @ m for m in ((exact, exact.abs()) if transposed else (exact.t(), exact.t().abs())))
            size = x.double().abs() @ (exact.abs() if transposed else exact.abs().t())
            if bias is not None and not transposed:
                true, size = true + bias.double(), size + bias.double().abs()
            error = (y.double() - true).abs()
            limit = 1.5 * float(torch_error(x, parts, fmt, n, k, transposed).max()) + 8 * 2.0**-24 * size + torch.finfo(dtype).eps * true.abs()
            assert y.dtype == dtype and bool((error <= limit).all()), (name, t, n, k, dtype, transposed, float((error / limit).max()))
            torch.set_num_threads(3)
            again = cpp.linear_dx(x, parts, fmt, n, k) if transposed else cpp.linear(x, parts, fmt, n, bias)
            torch.set_num_threads(1)
            assert torch.equal(again, y), (name, t, n, k, dtype, transposed)


PAIRED = "int4, int4 20, int4 row None, int4 n 8, int4 16, int4 other zero, int2, int2 other zero, ternary, mxfp4, nvfp4, fp4_e2m1 96".split(", ")


@pytest.mark.parametrize("name", PAIRED)
def test_codes_in_pairs(name: str) -> None:
    """bf16 beside numbers that bf16 holds: every number of rows in a turn, columns beyond a chunk, units of one block and of several."""
    fmt, gen = CASES[name], torch.Generator().manual_seed(7)
    for n, k in ((18, 264), (3, 4100), (5, 8240)):
        parts = fa.quantize(weight(n, k, torch.float32, 0).nan_to_num(1, 1, 1), fmt).parts
        exact = reference.dequantize(parts, fmt, n, k, 0, n, torch.float32).double()
        for t in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33):
            x = torch.randn(t, k, generator=gen).bfloat16()
            y = cpp.linear(x, parts, fmt, n, None)
            true, size = x.double() @ exact.t(), x.double().abs() @ exact.abs().t()
            assert bool(((y.double() - true).abs() <= 2.0**-8 * true.abs() + 64 * 2.0**-24 * size).all()), (n, k, t)


@pytest.mark.parametrize("name", PAIRED)
def test_small_numbers_count(name: str) -> None:
    """Denormals of x, differences of tiny numbers: an instruction that takes such for zeros must not see them."""
    fmt, n, k = CASES[name], 9, 480
    gen = torch.Generator().manual_seed(1)
    parts = fa.quantize(torch.randn(n, k, generator=gen) * 2.0**60, fmt).parts
    exact = reference.dequantize(parts, fmt, n, k, 0, n, torch.float32).double()
    for t in (1, 2, 5):
        for power in (-133, -127, -124, -101, -99, -90):
            x = (torch.randn(t, k, generator=gen).double() * 2.0**power).bfloat16()
            x[:, 1::2] = -x[:, ::2]
            y = cpp.linear(x, parts, fmt, n, None)
            true, size = x.double() @ exact.t(), x.double().abs() @ exact.abs().t()
            assert bool(((y.double() - true).abs() <= 2.0**-8 * true.abs() + 16 * 2.0**-24 * size).all()), (t, power)


@pytest.mark.parametrize("name", [*FORMATS, "int8 asym", "fp8 block"])
def test_sums_of_codes_do_not_overflow(name: str, isa: str) -> None:
    """Codes are summed before they are scaled, and may be a thousand times the weight; a row of small numbers keeps its bits beside a huge one."""
    fmt, gen = CASES[name] if name in CASES else format_of("int8", 64, symmetric=False), torch.Generator().manual_seed(3)
    n, k = 20, 260
    w = torch.randn(n, k, generator=gen) * 1e-3
    q = fa.quantize(w, fmt)
    exact = q.dequantize(torch.float64)
    for t in (1, 3, 7):
        for width, transposed in ((k, False), (n, True)):
            x = torch.randn(t, width, generator=gen)
            x[0] *= 2e37 / float(x[0].abs().max())
            y = cpp.linear_dx(x, q.parts, fmt, n, k) if transposed else cpp.linear(x, q.parts, fmt, n, None)
            true = x.double() @ (exact if transposed else exact.t())
            size = x.double().abs() @ (exact.abs() if transposed else exact.abs().t())
            assert bool(y.isfinite().all()) and bool(((y.double() - true).abs() <= 2e-6 * size + 1e-6 * float(w.abs().max())).all()), (t, transposed)


@pytest.mark.parametrize(
    "name", [*FORMATS, "int4 other zero", "int2 other zero", "int8 other zero", "int4 row None", "int4 n 8", "int4 20", "nf4 nested"]
)
def test_infinities_are_where_the_reference_has_them(name: str, isa: str) -> None:
    """And NaN: infinity times a weight of zero, infinities of both signs, NaN itself. Other rows keep their bits."""
    fmt, n, k = CASES[name], 21, 260
    parts = fa.quantize(weight(n, k, torch.float32, 0), fmt).parts
    w = reference.dequantize(parts, fmt, n, k, 0, n, torch.float32)
    for t in (1, 2, 3, 7, 18):
        for width, right, transposed in ((k, w.t(), False), (n, w, True)):
            clean = torch.randn(t, width, generator=torch.Generator().manual_seed(t)).to(DTYPES[t % 3])
            x = clean.clone()
            x[-1, 3] = torch.inf
            if t > 2:
                x[1, 5], x[1, 7] = -torch.inf, 1e4
                x[0, 2], x[0, 9] = torch.inf, -torch.inf
            if t > 5:
                x[5, 1], x[6, :2] = torch.nan, torch.inf
            got, before = (cpp.linear_dx(a, parts, fmt, n, k) if transposed else cpp.linear(a, parts, fmt, n, None) for a in (x, clean))
            want = (x.float() @ right).to(x.dtype)
            broken = ~want.isfinite()
            assert same(got[broken], want[broken]) and bool(got[~broken].isfinite().all()), (t, transposed)
            untouched = (x == clean).all(1)
            assert torch.equal(got[untouched], before[untouched]), (t, transposed)


@pytest.mark.parametrize(("lost", "tokens"), [("x", 2), ("bias", 2), *((part, tokens) for part in ("qdata", "scale", "zero") for tokens in (2, 200))])
def test_tensors_without_memory_are_refused(lost: str, tokens: int) -> None:
    """What FSDP has given back has a shape and no address, which for the kernels means that there is no such part, or is read all the same."""
    q = fa.quantize(torch.randn(24, 64), "int4").clone()
    tensors = {"x": torch.randn(tokens, 64), "bias": torch.randn(24)} | q.parts._asdict()
    tensors[lost].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="expected tensors with memory; got"):
        fa.quantized_linear(tensors["x"], q, tensors["bias"])


def test_an_infinite_weight_is_counted_once(isa: str) -> None:
    """fp8_e5m2 files may hold infinities. Rows are taken by fours, and what stands in for rows beyond the last must not multiply them by zero."""
    for name, k in (("fp8_e5m2", 70), ("mxfp8_e5m2", 96)):
        for n in (1, 2, 3, 5):
            parts = fa.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(n)), name).parts
            parts.qdata.view(-1)[-3:] = torch.tensor([0x7C, 0xFC, 0x7C], dtype=torch.uint8)
            dx = cpp.linear_dx(torch.ones(2, n), parts, CASES[name], n, k)
            assert dx[0, -3:].tolist() == [torch.inf, -torch.inf, torch.inf] and bool(dx[:, :-3].isfinite().all()), (name, n)

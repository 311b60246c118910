"""The CUDA product with low-bit weights, run by the emulator: against fp64, in any order of threads and blocks, and when it is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import fusedadapt as fa
from fusedadapt import dispatch
from fusedadapt.ops import quant as ops
from fusedadapt.ops import quant_cuda as gpu
from fusedadapt.quant.formats import FORMATS, QFormat
from fusedadapt.reference import quant as reference
from fusedadapt.reference.quant import Parts
from fusedadapt.testing import poisoned_memory

try:
    from fusedadapt import _core_emulated as core
except ImportError as error:
    raise ImportError(f"tests/test_cuda_quant.py: fusedadapt._core_emulated is missing ({error}); run: python setup.py build_emulated") from error

from test_quant_cpp import CASES, DTYPES, quantized  # noqa: E402

# (t, n, k): whole chunks of 16 bytes of every width; then rows that end inside a chunk, a piece, a byte
WHOLE = [(1, 5, 64), (2, 17, 128), (3, 4, 256), (8, 9, 1088), (5, 1, 2112), (4, 39, 64)]
ODD = [(1, 5, 33), (2, 17, 48), (3, 4, 8), (4, 20, 129), (5, 9, 1030), (7, 1, 2), (8, 1, 1), (1, 9, 300)]


def check(y: Tensor, x: Tensor, parts: Parts, fmt: QFormat, n: int, bias: Tensor | None = None) -> None:
    """One rounding of the exact sum, and what 2^-20 of the sum of the absolute products allows an fp32 sum: less than one product of any size."""
    w = reference.dequantize(parts, fmt, n, x.shape[1], 0, n, torch.float32).double()
    true, size = x.double() @ w.t(), x.double().abs() @ w.abs().t()
    if bias is not None:
        true, size = true + bias.double(), size + bias.double().abs()
    info = torch.finfo(y.dtype)
    limit = 0.51 * info.eps * true.abs() + 2.0**-20 * size + info.smallest_normal * info.eps
    assert y.dtype == x.dtype and y.shape == true.shape
    assert bool(((y.double() - true).abs() <= limit).all()), float(((y.double() - true).abs() / limit).max())


def operand(t: int, k: int, dtype: torch.dtype, seed: int, wider: int = 0, past: int = 0) -> Tensor:
    """t x k numbers; rows `wider` elements further apart, the first one `past` elements behind a 16-byte address."""
    room = torch.randn(t * (k + wider) + 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
    start = -room.data_ptr() % 16 // room.element_size() + past
    return room[start : start + t * (k + wider)].view(t, k + wider)[:, :k]


@pytest.mark.parametrize("shapes", [WHOLE, ODD], ids=["whole", "odd"])
@pytest.mark.parametrize("name", CASES)
def test_products(name: str, shapes: list[tuple[int, int, int]]) -> None:
    fmt = CASES[name]
    for number, (t, n, k) in enumerate(shapes):
        dtype = DTYPES[(number + len(name)) % 3]
        parts = quantized(name, n, k, DTYPES[number % 3], 4 * number)[-1]
        x = operand(t, k, dtype, number, wider=8 * (number % 2))
        bias = operand(1, n, DTYPES[number // 2 % 3], 99)[0] if number % 2 else None
        with poisoned_memory():
            y = gpu.linear(x, parts, fmt, n, bias)
        check(y, x, parts, fmt, n, bias)


SOME = ["nf4 nested", "int4", "int4 tensor None", "int8", "int2", "int3", "nvfp4", "fp8_e4m3", "dynamic8", "hqq4", "int8 n 8"]


@pytest.mark.parametrize("name", SOME)
def test_bits_repeat_and_do_not_depend_on_other_tokens(name: str) -> None:
    for n, k in ((7, 1088), (5, 65)):
        parts, x = quantized(name, n, k, torch.float32, 0)[-1], operand(8, k, torch.bfloat16, 5)
        found = []
        for seed in range(3):
            core.emulator_seed(seed)
            found.append(gpu.linear(x, parts, CASES[name], n, None))
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        for t in (1, 2, 3, 4, 5):
            assert torch.equal(gpu.linear(x[:t], parts, CASES[name], n, None), found[0][:t])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "int4", "int3", "int8", "mxfp8_e5m2"])
def test_addresses_that_16_bytes_do_not_fit(name: str, dtype: torch.dtype) -> None:
    n, k, fmt = 6, 192, CASES[name]
    parts = quantized(name, n, k, torch.float32, 0)[-1]
    for past, wider in ((1, 0), (0, 1), (3, 5), (0, 0)):
        x = operand(3, k, dtype, 1, wider, past)
        y = gpu.linear(x, parts, fmt, n, None)
        assert torch.equal(y, gpu.linear(x.clone(memory_format=torch.contiguous_format), parts, fmt, n, None))
        check(y, x, parts, fmt, n)
        moved = torch.zeros(parts.qdata.numel() + 1, dtype=torch.uint8)[1:].view(parts.qdata.shape).copy_(parts.qdata)
        check(gpu.linear(x, parts._replace(qdata=moved), fmt, n, None), x, parts, fmt, n)


@pytest.mark.parametrize("name", ["int2 32", "int3 32", "int4 32", "int8 32", "nf4", "fp8_e4m3", "int4 20"])
def test_more_chunks_than_threads(name: str) -> None:
    parts, x = quantized(name, 3, 17472, torch.float32, 0)[-1], operand(1, 17472, torch.float16, 1)
    with poisoned_memory():
        y = gpu.linear(x, parts, CASES[name], 3, None)
    check(y, x, parts, CASES[name], 3)


def test_many_rows_and_the_last_ones() -> None:
    for n, k in ((2049, 64), (2048, 64), (2047, 64), (2051, 40)):
        parts, x = quantized("int4 32", n, k, torch.float32, 0)[-1], operand(2, k, torch.float32, 1)
        with poisoned_memory():
            y = gpu.linear(x, parts, CASES["int4 32"], n, None)
        check(y, x, parts, CASES["int4 32"], n)


@pytest.mark.parametrize("k", [64, 70])
def test_codes_that_are_no_numbers(k: int) -> None:
    x = operand(2, k, torch.float32, 1)
    nan, inf = torch.nan, torch.inf
    for name, code, value in (("fp8_e4m3", 0x7F, nan), ("fp8_e4m3", 0xFF, nan), ("fp8_e5m2", 0x7C, inf), ("fp8_e5m2", 0xFD, nan)):
        parts = quantized(name, 4, k, torch.float32, 0)[-1]
        parts = parts._replace(qdata=parts.qdata.clone())
        parts.qdata.view(torch.uint8)[1, 3] = code
        y = gpu.linear(x, parts, CASES[name], 4, None)
        assert y[:, [0, 2, 3]].isfinite().all()
        assert y[:, 1].isnan().all() if value != value else torch.equal(y[:, 1], value * x[:, 3].sign())
    for byte, lowest in ((255, nan), (0, 2.0**-127)):
        parts = quantized("mxfp4", 4, k, torch.float32, 0)[-1]
        parts = parts._replace(scale=torch.full_like(parts.scale, byte))
        y, scaled = (gpu.linear(x, parts._replace(scale=torch.full_like(parts.scale, b)), CASES["mxfp4"], 4, None) for b in (byte, 127))
        assert torch.equal(y.isnan(), torch.full_like(y, lowest != lowest).bool())
        assert lowest != lowest or torch.allclose(y.double(), scaled.double() * lowest, rtol=1e-5, atol=2.0**-148)


# ---- the choice


@pytest.fixture
def fresh_choices() -> Iterator[None]:
    for cached in (ops._choose, ops._lacks):
        cached.cache_clear()
    yield
    for cached in (ops._choose, ops._lacks):
        cached.cache_clear()


def test_eight_tokens_on_a_gpu(monkeypatch: pytest.MonkeyPatch, fresh_choices: None) -> None:
    others = SimpleNamespace(**dict.fromkeys(("stats", "encode", "dequantize", "linear", "linear_dx")))
    monkeypatch.setattr(dispatch, "_unavailable", lambda name, device_type: "" if name in ("cuda", "triton", "reference") else "elsewhere")
    monkeypatch.setattr(ops, "_module", lambda name: gpu if name == "cuda" else others)
    fmt = FORMATS["nf4"]
    for t in (1, 8):
        assert ops.choose("linear", "cuda", torch.bfloat16, (t, 64, 64, fmt)) == ("cuda", "first choice")
    with fa.strict():  # the table of kernels, not a fallback
        assert ops.choose("linear", "cuda", torch.bfloat16, (9, 64, 64, fmt)) == ("triton", "cuda: takes 8 tokens at most")
        for function in ("linear_dx", "dequantize", "stats", "encode"):
            assert ops.choose(function, "cuda", torch.bfloat16) == ("triton", f"cuda: has no kernel for {function}")
    assert ops.choose("linear", "cuda", torch.float64, (1, 64, 64, fmt)).backend == "reference"
    assert gpu.small(8, 64, 64, torch.bfloat16, fmt, False) and not gpu.small(9, 64, 64, torch.bfloat16, fmt, False)
    assert not gpu.small(1, 64, 64, torch.bfloat16, fmt, True)


def test_as_asked_for(fresh_choices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    q, calls = fa.quantize(torch.randn(24, 64), "nf4", double_quant=True), []
    linear = gpu.linear
    monkeypatch.setattr(gpu, "linear", lambda x, *rest: (calls.append(len(x)), linear(x, *rest))[1])
    with fa.backend("emulated"):
        for t in (1, 8, 9):
            x = torch.randn(t, 64, requires_grad=True)
            y = fa.quantized_linear(x, q, torch.ones(24))
            check(y.detach(), x.detach(), q.parts, q.format, 24, torch.ones(24))
            y.sum().backward()
            torch.testing.assert_close(x.grad, q.dequantize().sum(0).expand(t, 64))
        assert calls == [1, 8]
        ((_, backend, why),) = fa.explain(fa.QuantizedLinear(q))
        assert backend == "emulated" and "takes 8 tokens at most" in why
        with fa.strict(), pytest.raises(RuntimeError, match="takes 8 tokens at most"):
            fa.quantized_linear(torch.randn(9, 64), q)


def test_refusals() -> None:
    q = fa.quantize(torch.randn(24, 64), "nf4")
    with pytest.raises(ValueError, match="at most 8 tokens; got 9 x 64"):
        gpu.linear(torch.randn(9, 64), q.parts, q.format, 24, None)
    spec, product = list(gpu._weight(q.parts, q.format, 24, 64)), [0, 0, 0, 1, 64, 1, 0]
    for at, bad, text in ((13, 9, "bits of a code"), (14, 4, "a kind of value"), (15, -1, "a coding of scales"), (7, 0, "rows of the weight")):
        with pytest.raises(ValueError, match=f"expected {text} in"):
            core.quant_cuda.gemv([*spec[:at], bad, *spec[at + 1 :]], product, 0, 0)
    for at, bad, text in ((3, 0, "tokens"), (3, 9, "tokens"), (5, 5, "x's dtype"), (6, 4, "the bias's dtype")):
        with pytest.raises(ValueError, match=f"expected {text} in"):
            core.quant_cuda.gemv(spec, [*product[:at], bad, *product[at + 1 :]], 0, 0)
    assert core.quant_cuda.MOST_TOKENS == gpu.FEW

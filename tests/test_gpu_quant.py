"""Low-bit weights on a GPU: the reference's bytes for every format, products against fp64 for any number of tokens, repeatable, without waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import DEVICE, DTYPES, GPU, MANY, cases, needs_gpu, no_sync, room_for, same
from quant_cases import FLOATS, KINDS, SHAPES, SPECS, weight
from torch import Tensor

import fusedadapt as fa
from fusedadapt.bench.runner import captured
from fusedadapt.quant import QuantizedTensor, fake_quantize

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("compiled_triton", "quick_calls")]
#: None: the first choice, which on a GPU is CUDA for a few tokens and Triton beyond
BACKENDS = (None, "triton") if GPU else ("triton",)
# tokens, outputs, inputs: around the sizes where another kernel takes over, tails and odd rows
PRODUCTS = ((0, 5, 64), (1, 33, 257), (2, 64, 128), (3, 130, 63), (8, 96, 1088), (9, 17, 70), (17, 40, 256), (33, 64, 512), (65, 130, 96))
LARGE = ((1, 4096, 4096), (16, 1024, 4096), (300, 768, 1024), (2100, 512, 640))


@pytest.fixture(params=BACKENDS, ids=str, autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    with fa.backend(request.param) if request.param else fa.strict():
        yield request.param


def by_reference(w: Tensor, spec: str) -> QuantizedTensor:
    with fa.backend("reference"):
        return fa.quantize(w, SPECS[spec])


def new(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_and_back(spec: str) -> None:
    shapes = (*SHAPES, (700, 1030), (64, 4096)) if MANY else SHAPES[5:6]
    kinds = KINDS if MANY else KINDS[:1]
    for i, shape in enumerate(shapes):
        for kind in kinds:
            dtype = FLOATS[i % 3]  # one a shape: every one is three more kernels to compile
            w = weight(kind, *shape, dtype)
            mine, theirs = fa.quantize(w.to(DEVICE), SPECS[spec]), by_reference(w, spec)
            for a, b in zip(mine.parts, theirs.parts, strict=True):
                assert (a is None) == (b is None) and (a is None or same(a, b)), (shape, kind, dtype)
            with fa.backend("reference"):
                want = theirs.dequantize(FLOATS[(i + 1) % 3])
            assert same(mine.dequantize(FLOATS[(i + 1) % 3]), want), (shape, kind, dtype)


def product(spec: str, t: int, n: int, k: int, dtype: torch.dtype) -> None:
    """y and dx: within 1.2 times what the weight rounded to x's dtype, multiplied in fp64 and rounded once, is off by, and an fp32 sum's error."""
    qw = by_reference(new(n, k, seed=1), spec)
    with fa.backend("reference"):
        w = qw.dequantize(torch.float64)
    x, dy, bias = new(t, k, seed=2, dtype=dtype), new(t, n, seed=3, dtype=dtype), new(n, seed=4, dtype=dtype)
    mine = x.to(DEVICE).requires_grad_()
    y = fa.quantized_linear(mine, qw.to(DEVICE), bias.to(DEVICE))
    y.backward(dy.to(DEVICE))
    assert mine.grad is not None and y.dtype == dtype == mine.grad.dtype
    for got, left, right, extra in ((y, x, w.t(), bias.double()), (mine.grad, dy, w, 0.0)):
        true, size = left.double() @ right + extra, left.double().abs() @ right.abs() + abs(extra)
        rounded = left.double() @ right.to(dtype).double() + extra
        limit = 1.2 * (rounded - true).norm() + torch.finfo(dtype).eps / 2 * true.norm() + 1e-6 * size.norm()
        assert float((got.detach().double().cpu() - true).norm()) <= float(limit), (t, n, k, dtype)


@pytest.mark.parametrize("spec", SPECS)
def test_products(spec: str) -> None:
    turn = list(SPECS).index(spec)
    for i, shape in enumerate(PRODUCTS) if MANY else [(0, PRODUCTS[1 + turn % 3])]:
        product(spec, *shape, DTYPES[(turn + i) % 3])  # one dtype a shape: each is two or three kernels to compile, a second each
    if MANY:
        product(spec, *LARGE[turn % len(LARGE)], DTYPES[turn % 3])


@pytest.mark.parametrize("spec", ["nf4 nested", "int4", "fp8_e4m3", "mxfp4"])
def test_products_repeat_bit_for_bit(spec: str) -> None:
    n, k = (4096, 4096) if MANY else (9, 140)
    qw = by_reference(new(n, k, seed=1), spec).to(DEVICE)
    for t in (1, 5, 16, 200) if MANY else (2,):
        x = new(t, k, seed=2, dtype=torch.bfloat16).to(DEVICE)
        first = fa.quantized_linear(x, qw)
        assert all(same(fa.quantized_linear(x, qw), first) for _ in range(cases(20, 1)))


@pytest.mark.parametrize(("activations", "format"), [("int8", "int8"), ("fp8_e4m3", "fp8_e4m3"), ("fp8_e4m3", "fp4_e2m1")])
def test_coded_activations(activations: str, format: str) -> None:
    """The bits of the reference: integer sums are exact, fp8 ones are sums of exact products in fp32."""
    n, k = (768, 1024) if MANY else (17, 70)
    qw = by_reference(new(n, k, seed=1), format)
    for t in (1, 16, 300) if MANY else (3,):
        x = new(t, k, seed=2, dtype=torch.bfloat16)
        y = fa.quantized_linear(x.to(DEVICE), qw.to(DEVICE), activations=activations)
        with fa.backend("reference"):
            want = fa.quantized_linear(x, qw, activations=activations)
        torch.testing.assert_close(y.cpu(), want, rtol=2**-7, atol=2e-3 * float(want.float().abs().max()))


@pytest.mark.parametrize("ste", ["clamp", "round"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_quantize(dtype: torch.dtype, ste: str) -> None:
    shape = (513, 1030) if MANY else (9, 70)
    results = []
    for device in (DEVICE, torch.device("cpu")):
        x = new(*shape, seed=1, dtype=dtype).to(device).requires_grad_()
        scale = (new(shape[0], seed=2).abs() * 0.1 + 0.01).to(device).requires_grad_()
        with fa.backend("reference") if device.type == "cpu" and GPU else fa.backend("triton"):
            y = fake_quantize(x, scale, quant_min=-8, quant_max=7, axis=0, ste=ste)
            y.backward(new(*shape, seed=3, dtype=dtype).to(device))
        results.append((y, x.grad, scale.grad))
    assert same(results[0][0], results[1][0]) and same(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2].cpu(), results[1][2].cpu(), rtol=1e-4, atol=1e-4)


def test_operators_pass_torchs_checks() -> None:
    ops, w = torch.ops.fusedadapt, new(24, 64).to(DEVICE)
    qw = fa.quantize(w, "nf4", double_quant=True)
    parts = (qw.parts.qdata, qw.parts.scale, qw.parts.zero, qw.parts.super, qw.parts.offset)
    checks = [
        (ops.q_quantize, (w, qw.format.spec)),
        (ops.q_dequantize, (*parts, qw.format.spec, 24, 64, 0, 24, torch.float32)),
        (ops.q_linear, (new(3, 64).to(DEVICE), *parts, None, qw.format.spec, 24)),
        (ops.q_linear_dx, (new(3, 24).to(DEVICE), *parts, qw.format.spec, 24, 64)),
    ]
    for op, arguments in checks:
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_gpu
@pytest.mark.parametrize("t", [1, 16, 600])
def test_a_product_does_not_wait_and_can_be_captured(t: int) -> None:
    qw = fa.quantize(new(1024, 1024).to(DEVICE), "nf4", double_quant=True)
    x = new(t, 1024, seed=1, dtype=torch.bfloat16).to(DEVICE).requires_grad_()
    out: dict[str, Tensor] = {}

    def step() -> None:
        x.grad = None
        y = fa.quantized_linear(x, qw)
        y.backward(torch.ones_like(y))
        out.update(y=y.detach(), dx=x.grad)

    step()
    want = {k: v.clone() for k, v in out.items()}
    with no_sync():
        step()
    replay = captured(step)
    for v in out.values():
        v.zero_()
    replay()
    assert all(same(out[k], want[k]) for k in want)


@needs_gpu
def test_beyond_two_to_the_31_elements() -> None:
    with room_for(30):
        n, k = 2**31 // 8192 + 5, 8192
        w = torch.zeros(n, k, dtype=torch.bfloat16, device=DEVICE)
        w[0] = w[-1] = new(k, dtype=torch.bfloat16).to(DEVICE)
        qw = fa.quantize(w, "int4")
        del w
        for t in (1, 24):
            y = fa.quantized_linear(new(t, k, seed=1, dtype=torch.bfloat16).to(DEVICE), qw)
            assert same(y[:, 0], y[:, -1]) and not bool(y[:, 1:-1].any()), t


@needs_gpu
def test_qlora_compiles_whole() -> None:
    base = fa.QuantizedLinear.from_linear(torch.nn.Linear(256, 192), "nf4", double_quant=True)
    model = fa.LoRALinear.from_linear(base, r=8).to(DEVICE)
    x = new(40, 256).to(DEVICE)
    results = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        y = run(x)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)

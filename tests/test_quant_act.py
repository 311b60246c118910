"""Products with quantized activations: codes, exact sums, hostile rows, gradients, independent libraries; bits that backends share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import fusedadapt as fa
from fusedadapt import _core
from fusedadapt.ops import quant_act as act_ops
from fusedadapt.quant.activations import quantized_linear_act
from fusedadapt.quant.formats import FORMATS, QFormat
from fusedadapt.reference.quant import Parts
from fusedadapt.reference.quant_act import CHUNK

ops = torch.ops.fusedadapt
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = "fp8_e4m3,block=1x128"
#: activations, group axis of W (or W's format, where it is another), how x is coded
KINDS = (
    ("int8", "row", "int8"), ("int8", "tensor", "int8"),
    ("fp8_e4m3", "row", "fp8_e4m3"), ("fp8_e4m3", "tensor", "fp8_e4m3"), ("fp8_e4m3", "block", BLOCKS), ("fp8_e4m3", "fp4_e2m1", "fp8_e4m3"),
)  # fmt: skip
SHAPES = ((1, 1, 1), (3, 5, 17), (1, 130, 129), (17, 9, 255), (50, 67, 300), (5, 66, 3100))


def new(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + 100 * sum(shape))
    return (torch.randn(shape, generator=g) * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=g).mul(9).exp()).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits; one NaN is as good as another."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def coded(w: Tensor, kind: str, axis: str) -> fa.QuantizedTensor:
    return fa.quantize(w, axis) if axis in FORMATS else fa.quantize(w, kind, group_axis=axis)


USUAL = _core.isa()
SETS = [name for name in ("base", "avx2", "avx512") if _core.use_isa(name)]
_core.use_isa(USUAL)


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Any:
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(USUAL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["int8", "fp8_e4m3", BLOCKS])
def test_codes_are_those_of_the_format(spec: str, dtype: torch.dtype, isa: str) -> None:
    for t, _, k in SHAPES:
        x = new(t, k, dtype=dtype)
        q, scale = ops.q_act_quant(x, spec)
        with fa.backend("reference"):
            want = fa.quantize(x, QFormat.parse(spec))
            again = ops.q_act_quant(x, spec)
        assert torch.equal(q, want.qdata.view(torch.uint8)) and torch.equal(scale, want.scale)
        assert torch.equal(q, again[0]) and torch.equal(scale, again[1])


@pytest.mark.parametrize("spec", ["int8", "fp8_e4m3", BLOCKS])
def test_hostile_rows(spec: str, isa: str) -> None:
    """Every tie and every fp32 neighbour of one, signed zeros, magnitudes from subnormal to the largest, NaN and infinities."""
    largest = 127.0 if spec == "int8" else 448.0
    ties = torch.arange(-largest, largest + 0.5, 0.5) if spec == "int8" else torch.arange(-448, 448.5, 0.25)
    small = torch.arange(0, 40) * 2.0**-10  # ties of fp8's subnormals
    inf = torch.tensor(torch.inf)
    row = torch.cat([torch.tensor([largest, -0.0, 0.0]), ties, small, -small, torch.nextafter(ties, inf), torch.nextafter(ties, -inf)])
    rows = [row.clamp(-largest, largest), -row.clamp(-largest, largest), torch.zeros_like(row), -torch.zeros_like(row)]
    rows += [row / largest * m for m in (3e38, 2.0**-119, 2.0**-121, 1e-40, 1.0, 1e30, 2.0**-126 * 448)]
    for bad in (torch.nan, torch.inf, -torch.inf):
        rows.append(torch.where(torch.arange(row.numel()) == 200, bad, row))
    x = torch.stack(rows)
    q, scale = ops.q_act_quant(x, spec)
    with fa.backend("reference"):
        want = ops.q_act_quant(x, spec)
    assert torch.equal(q, want[0]) and same(scale, want[1])
    assert bool((scale[2:4] == 0).all() and (q[2:4] == 0).all()) and bool(scale[-3:].isnan().any(1).all())


@pytest.mark.parametrize("axis", ["row", "tensor"])
def test_int8_bits(axis: str, isa: str) -> None:
    for number, (t, n, k) in enumerate((*SHAPES, (49, 65, 33), (4, 4, 64), (1, 1, CHUNK + 5))):
        x, qw = new(t, k, dtype=DTYPES[number % 3]), fa.quantize(new(n, k, seed=1), "int8", group_axis=axis)
        for bias in (None, new(n, seed=2), new(n, seed=2, dtype=torch.bfloat16)):
            y = quantized_linear_act(x, qw, bias)
            with fa.backend("reference"):
                assert same(y, quantized_linear_act(x, qw, bias)), (t, n, k)


def test_sums_are_exact_at_their_largest(isa: str) -> None:
    """All codes at the ends of their range, -128 among W's: no instruction may saturate, no sum may wrap."""
    for k in (64, 95, CHUNK, CHUNK + 64):
        x = torch.tensor([[127], [-127], [127], [-127], [-127]], dtype=torch.int8).expand(5, k).contiguous()
        w = torch.tensor([[-128], [127], [-127]], dtype=torch.int8).expand(3, k).contiguous()
        one = torch.ones(5, 1)
        y = ops.q_linear8(x.view(torch.uint8), one, w, torch.ones(3, 1), None, None, None, None, "int8", "int8", 3, torch.float32)
        chunks = torch.zeros(5, 3)
        for first in range(0, k, CHUNK):
            chunks += (x[:, first : first + CHUNK].long() @ w[:, first : first + CHUNK].long().t()).float()
        assert torch.equal(y, chunks), k


def test_int8_sums_are_torchs(isa: str) -> None:
    """torch._int_mm on the same codes."""
    g = torch.Generator().manual_seed(0)
    for t, n, k in ((17, 8, 16), (50, 72, 200), (1, 3, 999)):
        x, w = (torch.randint(-127, 128, (rows, k), generator=g, dtype=torch.int8) for rows in (t, n))
        args = (x.view(torch.uint8), torch.ones(t, 1), w, torch.ones(n, 1), None, None, None, None, "int8", "int8", n, torch.float32)
        assert torch.equal(ops.q_linear8(*args).int(), torch._int_mm(x, w.t()))


def test_the_librarys_gemm_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x, qw, bias = new(30, 64), fa.quantize(new(48, 64, seed=1), "int8"), new(48, seed=2)
    ours = quantized_linear_act(x, qw, bias)
    monkeypatch.setattr(act_ops, "library_int8", lambda *_: True)
    assert torch.equal(ours, quantized_linear_act(x, qw, bias))


def test_results_do_not_depend_on_threads() -> None:
    x, qw = new(101, 700), fa.quantize(new(130, 700, seed=1), "int8")
    usual, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append((*ops.q_act_quant(x, "int8"), quantized_linear_act(x, qw)))
    torch.set_num_threads(usual)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def truth(x: Tensor, qw: Any, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor]:
    """(y, sum |x||w|) of the coded operands in fp64."""
    t, k = x.shape
    with fa.backend("reference"):
        q, scale = ops.q_act_quant(x, spec)
        xs = ops.q_dequantize(q, scale, None, None, None, spec, t, k, 0, t, torch.float64)
        w = qw.dequantize(torch.float64)
    y = xs @ w.t()
    return y if bias is None else y + bias.double(), xs.abs() @ w.abs().t()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "axis", "spec"), KINDS)
def test_close_to_fp64(kind: str, axis: str, spec: str, dtype: torch.dtype) -> None:
    for t, n, k in SHAPES:
        x, qw, bias = new(t, k, dtype=dtype).clamp(-500, 500), coded(new(n, k, seed=1) / 1e5, kind, axis), new(n, seed=2)
        want, size = truth(x, qw, bias, spec)
        y = quantized_linear_act(x, qw, bias, kind)
        # sums of k terms in fp32, and two roundings of each coded element where scales are multiplied in
        bound = torch.finfo(dtype).eps * want.abs() / 2 + 2.0**-24 * (k**0.5 * 4 + 4) * (size + bias.abs())
        assert bool(((y.double() - want).abs() <= bound + torch.finfo(dtype).smallest_normal).all()), (t, n, k)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(("kind", "axis", "spec"), KINDS)
def test_zero_and_nan_rows(kind: str, axis: str, spec: str, backend: str) -> None:
    x, bias = new(6, 200), new(9, seed=2)
    x[1] = 0.0
    x[2] = -0.0
    x[3, 150], x[4, 7] = torch.nan, -torch.inf
    with fa.backend(backend):
        qw = coded(new(9, 200, seed=1), kind, axis)
        y, biased = quantized_linear_act(x, qw, None, kind), quantized_linear_act(x, qw, bias, kind)
    assert bool((y[1:3] == 0).all() and y[3:5].isnan().all() and y[[0, 5]].isfinite().all())
    assert torch.equal(biased[1], bias) and torch.equal(biased[2], bias)


def test_strides_dimensions_fp64_and_empty() -> None:
    qw, wide = fa.quantize(new(7, 20, seed=1), "int8"), new(6, 44)
    y = quantized_linear_act(wide[:, 3:23].contiguous(), qw)
    assert torch.equal(y, quantized_linear_act(wide[:, 3:23], qw))
    assert torch.equal(y, quantized_linear_act(wide.t().contiguous().t()[:, 3:23], qw))
    assert torch.equal(y, quantized_linear_act(wide[:, 3:23].view(2, 3, 20), qw).view(6, 7))
    assert torch.equal(y, quantized_linear_act(wide[:, 3:23].double(), qw).float())
    assert torch.equal(quantized_linear_act(wide[0, 3:23], qw), y[0])
    assert quantized_linear_act(wide[:0, :20], qw).shape == (0, 7)
    assert bool((quantized_linear_act(wide[:, :0], fa.quantize(new(7, 0), "int8")) == 0).all())
    bias = new(7)
    assert torch.equal(quantized_linear_act(wide[:2, :0], fa.quantize(new(7, 0), "int8"), bias), bias.expand(2, 7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "axis", "spec"), KINDS)
def test_gradients(kind: str, axis: str, spec: str, dtype: torch.dtype) -> None:
    x, bias = new(5, 140, dtype=dtype).requires_grad_(), new(9, seed=2).requires_grad_()
    qw, dy = coded(new(9, 140, seed=1) / 1e4, kind, axis), (new(5, 9, seed=3) / 1e3).to(dtype)
    quantized_linear_act(x, qw, bias, kind).backward(dy)
    assert torch.equal(x.grad, ops.q_linear_dx(dy, *qw.parts, qw.format.spec, 9, 140)) and x.grad.dtype == dtype
    assert torch.equal(bias.grad, dy.sum(0, dtype=torch.float32))
    want = dy.double() @ qw.dequantize(torch.float64)
    assert float((x.grad.double() - want).norm() / want.norm()) < 2 * torch.finfo(dtype).eps
    saved = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t)
    sizes: list[int] = []
    with saved:
        quantized_linear_act(x, qw, bias, kind)
    assert sum(sizes) == qw.nbytes


def test_autocast_and_flops() -> None:
    x, qw = new(6, 32), fa.quantize(new(8, 32, seed=1), "int8")
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized_linear_act(x, qw)
    assert torch.equal(y, quantized_linear_act(x.bfloat16(), qw))
    with FlopCounterMode(display=False) as counter:
        quantized_linear_act(x, qw)
    assert counter.get_total_flops() == 2 * 6 * 32 * 8


@pytest.mark.parametrize(("kind", "axis", "spec"), KINDS)
def test_opcheck(kind: str, axis: str, spec: str) -> None:
    x, qw, bias = new(5, 140), coded(new(9, 140, seed=1), kind, axis), new(9)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for some in (x, x.bfloat16(), x[:0], new(5, 280)[:, ::2]):
        torch.library.opcheck(ops.q_act_quant.default, (some, spec), test_utils=tests)
    q, scale = ops.q_act_quant(x, spec)
    for some in (None, bias):
        torch.library.opcheck(ops.q_linear8.default, (q, scale, *qw.parts, some, spec, qw.format.spec, 9, torch.bfloat16), test_utils=tests)


@pytest.mark.parametrize(("kind", "axis", "spec"), KINDS)
def test_compiles_whole(kind: str, axis: str, spec: str) -> None:
    torch._dynamo.reset()
    qw, counter = coded(new(9, 140, seed=1), kind, axis), CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, bias: Tensor) -> Tensor:
        return quantized_linear_act(x, qw, bias, kind).square().sum()

    fast = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for t in (5, 6, 31):
        eager, x = new(t, 140).requires_grad_(), new(t, 140).requires_grad_()
        a, b = step(eager, new(9)), fast(x, new(9))
        a.backward(), b.backward()
        assert torch.equal(a, b) and torch.equal(eager.grad, x.grad)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_refusals() -> None:
    x, int8, blocks = new(4, 256), fa.quantize(new(6, 256), "int8"), fa.quantize(new(6, 256), "fp8_e4m3", group_axis="block")
    bad = [
        (lambda: quantized_linear_act(x, int8, None, "int4"), "activations among"),
        (lambda: quantized_linear_act(x, int8, None, "fp8_e4m3"), 'a weight in "fp8_e4m3"'),
        (lambda: quantized_linear_act(x, fa.quantize(new(6, 256), "nf4")), 'a weight in "int8"'),
        (lambda: quantized_linear_act(x, fa.quantize(new(6, 256), "int8", symmetric=False)), "without zero points"),
        (lambda: quantized_linear_act(x, fa.quantize(new(6, 256), "int8", group_size=32)), "one scale per row"),
        (lambda: quantized_linear_act(x[:, :5], int8), "x of 256 columns"),
        (lambda: quantized_linear_act(x.int(), int8), "x: dense, in float32"),
        (lambda: quantized_linear_act(x, int8, new(5)), r"bias of shape \(6,\)"),
        (lambda: ops.q_act_quant(x, "nf4"), "x coded as"),
        (lambda: ops.q_linear8(x, new(4, 1), *int8.parts, None, "int8", "int8", 6, torch.float32), "contiguous bytes"),
        (lambda: ops.q_linear8(*ops.q_act_quant(x, "fp8_e4m3"), *blocks.parts, None, "fp8_e4m3", blocks.format.spec, 6, x.dtype), "x coded as"),
        (lambda: ops.q_linear8(ops.q_act_quant(x, "int8")[0], new(4, 2), *int8.parts, None, "int8", "int8", 6, x.dtype), "x_scale of shape"),
    ]
    for call, text in bad:
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match="QuantizedTensor"):
        quantized_linear_act(x, new(6, 256))


def test_bitsandbytes_codes() -> None:
    """Codes and absmax of bitsandbytes' row-wise int8, which rounds x * (127 / absmax) as we do."""
    functional = pytest.importorskip("bitsandbytes.functional")
    x = new(64, 257, dtype=torch.float16).clamp(-1e4, 1e4)
    codes, absmax, _ = functional.int8_vectorwise_quant(x)
    q, scale = ops.q_act_quant(x, "int8")
    assert torch.equal(q.view(torch.int8), codes)
    assert torch.equal(scale.view(-1), absmax.float() / 127)


def test_scaled_mm() -> None:
    """torch._scaled_mm on the same fp8 codes and scales."""
    x, qw = new(16, 64), fa.quantize(new(32, 64, seed=1), "fp8_e4m3", group_axis="tensor")
    q, scale = ops.q_act_quant(x, "fp8_e4m3")
    y = ops.q_linear8(q, scale, *qw.parts, None, "fp8_e4m3", qw.format.spec, 32, torch.float32)
    one = torch.ones(())
    codes = q.view(torch.float8_e4m3fn), Parts(*qw.parts).qdata.view(torch.float8_e4m3fn)
    sums = torch._scaled_mm(codes[0], codes[1].t(), one, one, out_dtype=torch.float32)
    want = sums * scale * qw.scale
    assert float((y - want).norm() / want.norm()) < 1e-6


def test_where_nothing_multiplies_fp8_codes_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs before 8.9; a bounded piece of x at a time."""
    for axis in ("row", "block", "fp4_e2m1"):
        x, qw, bias = new(7, 140), coded(new(9, 140, seed=1) / 1e4, "fp8_e4m3", axis), new(9, seed=2)
        with fa.backend("reference"), monkeypatch.context() as patch:
            want = quantized_linear_act(x, qw, bias, "fp8_e4m3")
            patch.setattr(act_ops, "multiplies_fp8", lambda device: False)
            patch.setattr(act_ops, "_SCRATCH", 4 * 140 * 3)
            found = quantized_linear_act(x, qw, bias, "fp8_e4m3")
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_explain_says_what_x_is_coded_to() -> None:
    layer = fa.QuantizedLinear.from_linear(torch.nn.Linear(64, 8), "fp4_e2m1")
    layer.activations = "fp8_e4m3"
    ((what, _, _),) = layer.__fusedadapt_explain__()
    assert "fp4_e2m1" in what and what.endswith("x in fp8_e4m3")


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_near_the_largest_give_what_is_finite(dtype: torch.dtype, backend: str) -> None:
    """A sum of 64 int8 products times x's scale alone would be beyond fp32."""
    x, qw = (torch.ones(3, 64) * 3e38).to(dtype), fa.quantize(torch.full((5, 64), 2.0**-8), "int8")
    with fa.backend(backend):
        y = quantized_linear_act(x, qw)
    torch.testing.assert_close(y.double(), x.double() @ qw.dequantize(torch.float64).T, rtol=1e-2, atol=0)


@pytest.mark.parametrize("lost", ["x", "qdata", "bias"])
def test_tensors_without_memory_are_refused(lost: str) -> None:
    """A bias that FSDP has given back is none to the kernel."""
    qw = fa.quantize(torch.randn(24, 64), "int8").clone()
    tensors = {"x": torch.randn(2, 64), "qdata": qw.qdata, "bias": torch.randn(24)}
    tensors[lost].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="expected tensors with memory; got"):
        fa.quantized_linear(tensors["x"], qw, tensors["bias"], activations="int8")

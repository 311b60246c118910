"""`quantized_linear` and `QuantizedLinear`: products and gradients against fp64, pieces, compilers, states, refusals."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedadapt as fa
from fusedadapt import dispatch
from fusedadapt.quant import FORMATS, QFormat, QuantizedTensor, format_of
from fusedadapt.testing.saved import SavedBytes

BACKENDS = [name for name, reason in dispatch.available_backends("cpu").items() if name in ("reference", "cpp") and not reason]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "nf4 nested": ("nf4", None, {"double_quant": True}),
    "nf4 of 256": ("nf4", 256, {}),
    "int4 symmetric": ("int4", 32, {"symmetric": True}),
    "int4 per input": ("int4", 16, {"group_axis": "n"}),
    "int4 fp16 scales": ("int4", -1, {"scale_dtype": torch.float16}),
    "int8 asymmetric": ("int8", 64, {"symmetric": False}),
    "fp8 blocks": ("fp8_e4m3", None, {"group_axis": "block"}),
    "fp8 tensor": ("fp8_e5m2", None, {"group_axis": "tensor"}),
}
CASES = {name: (name, None, {}) for name in FORMATS} | OPTIONS


@pytest.fixture(params=BACKENDS, autouse=True)
def on_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fa.backend(request.param):
        yield request.param


def new(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(case: str, n: int, k: int) -> QuantizedTensor:
    name, group, options = CASES[case]
    return fa.quantize(new(n, k, seed=3), name, group, **options)


def check(mine: Tensor, truth: Tensor, magnitude: Tensor, bound: float) -> None:
    """Every element within its own bound: ``magnitude`` is the sum of the absolute products."""
    assert ((mine.double() - truth).abs() <= bound * magnitude + 1e-30).all()


# One rounding of the result, and of the weight where a 16-bit GEMM multiplies it; fp32 sums.
BOUND = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 3 * 2**-8, torch.float16: 3 * 2**-11}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case: str, dtype: torch.dtype) -> None:
    for t, n, k in ((1, 33, 70), (3, 16, 256), (40, 130, 65)):
        q, bias = packed(case, n, k), new(n, seed=4, dtype=dtype).requires_grad_()
        x, dy = new(t, k, seed=5, dtype=dtype).requires_grad_(), new(t, n, seed=6, dtype=dtype)
        y = fa.quantized_linear(x, q, bias)
        dx, db = torch.autograd.grad(y, [x, bias], dy)
        w, x64, dy64, b64 = q.dequantize(torch.float64), x.detach().double(), dy.double(), bias.detach().double()
        assert y.dtype == dx.dtype == dtype and y.shape == (t, n)
        check(y.detach(), x64 @ w.t() + b64, x64.abs() @ w.t().abs() + b64.abs(), BOUND[dtype])
        check(dx, dy64 @ w, dy64.abs() @ w.abs(), BOUND[dtype])
        check(db, dy64.sum(0), dy64.abs().sum(0), BOUND[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tokens_go_through_bounded_pieces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q = packed("nf4 nested", 150, 96)
    x, dy = new(300, 96, seed=5, dtype=dtype), new(300, 150, seed=6, dtype=dtype)
    monkeypatch.setitem(fa.ops.quant._SCRATCH, "cpu", 16 * 96 * 4)
    monkeypatch.setattr(fa.ops.quant, "_takes", lambda *args: False)
    y = torch.ops.fusedadapt.q_linear(x, *q.parts, None, q.format.spec, 150)
    dx = torch.ops.fusedadapt.q_linear_dx(dy, *q.parts, q.format.spec, 150, 96)
    w = q.dequantize(torch.float64)
    check(y, x.double() @ w.t(), x.double().abs() @ w.t().abs(), BOUND[dtype])
    check(dx, dy.double() @ w, dy.double().abs() @ w.abs(), BOUND[dtype])


@pytest.mark.parametrize("case", ["nf4", "int4", "int8", "mxfp4"])
def test_results_repeat_bit_for_bit_and_do_not_depend_on_threads(case: str, on_backend: str) -> None:
    if on_backend == "reference":  # the library's own product
        return
    q = packed(case, 96, 512)
    found = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        found += [torch.ops.fusedadapt.q_linear(new(t, 512, seed=5), *q.parts, None, q.format.spec, 96) for t in (1, 2, 7)]
    torch.set_num_threads(2)
    for a, b, c in zip(found[:3], found[3:6], found[6:]):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_shapes_of_x() -> None:
    q = packed("nf4", 24, 64)
    w = q.dequantize()
    x = new(2, 3, 128, seed=5)[..., ::2]
    assert not x.is_contiguous()
    torch.testing.assert_close(fa.quantized_linear(x, q), x @ w.t())
    torch.testing.assert_close(fa.quantized_linear(x[0, 0], q), w @ x[0, 0])
    empty = torch.zeros(0, 64, requires_grad=True)
    y = fa.quantized_linear(empty, q, torch.ones(24))
    y.sum().backward()
    assert y.shape == (0, 24) and empty.grad is not None and empty.grad.shape == (0, 64)
    torch.testing.assert_close(fa.quantized_linear(x.transpose(0, 1), q), x.transpose(0, 1) @ w.t())


def test_nothing_dequantized_is_saved() -> None:
    layer = fa.QuantizedLinear.from_linear(nn.Linear(256, 128), "nf4", double_quant=True)
    x = new(32, 256, seed=5).requires_grad_()
    with SavedBytes([*layer.parameters(), *layer.buffers()]) as saved:
        layer(x)
    assert saved.total == 0


def test_autocast() -> None:
    layer = fa.QuantizedLinear.from_linear(nn.Linear(64, 24), "nf4")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(new(3, 64, seed=5)).dtype == torch.bfloat16
        assert layer(new(3, 64, seed=5, dtype=torch.float64)).dtype == torch.float64


def test_compiles_whole(on_backend: str) -> None:
    layer = fa.QuantizedLinear.from_linear(nn.Linear(64, 24), "int4", 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for t in (5, 9):
        x, x2 = (new(t, 64, seed=5).requires_grad_() for _ in range(2))
        y, y2 = compiled(x), layer(x2)
        assert torch.equal(y, y2)
        y.sum().backward()
        y2.sum().backward()
        assert torch.equal(x.grad, x2.grad)


@pytest.mark.parametrize("name", FORMATS)
def test_quantizing_compiles_whole(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """Formats that nobody has named yet in this process, made from records and options inside the graph and outside."""
    torch._dynamo.reset()
    w, x, own = new(24, 64, seed=1), new(3, 64, seed=5), dataclasses.replace(FORMATS[name])

    def product(x: Tensor, w: Tensor, fmt: str | QFormat) -> tuple[Tensor, QuantizedTensor]:
        q = fa.quantize(w, fmt)
        return fa.quantized_linear(x, q), q

    for fmt in (name, own):
        (y, q), (y2, q2) = torch.compile(product, fullgraph=True, backend="aot_eager")(x, w, fmt), product(x, w, fmt)
        assert torch.equal(y, y2) and q.format == q2.format and torch.equal(q.dequantize(), q2.dequantize())
    assert not [each for each in recwarn if "alias" in str(each.message)]  # an op may not return one tensor twice


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_options_may_change_from_call_to_call(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    w, options = new(24, 64, seed=1), {"symmetric": True, "group_axis": "n", "scale_dtype": torch.float16}

    def there_and_back(w: Tensor, group: int | None, options: dict[str, Any]) -> Tensor:
        return fa.quantize(w, "int4", group, **options).dequantize()

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for group, given in ((16, {}), (32, {}), (64, {}), (24, {}), (8, options), (None, options)):
        assert torch.equal(compiled(w, group, given), there_and_back(w, group, given))
    own = torch.compile(lambda w: fa.quantize(w, "int4", w.shape[1]).scale, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert [tuple(own(w[:, :k]).shape) for k in (64, 32, 48)] == [(24, 1)] * 3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("act", [None, "int8"])
def test_gradient_checkpointing(act: str | None, reentrant: bool) -> None:
    layer = fa.QuantizedLinear.from_linear(nn.Linear(64, 24), "int8")
    layer.activations = act
    layer.bias.requires_grad_()
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        x, layer.bias.grad = new(3, 64, seed=5).requires_grad_(), None
        run(x).square().sum().backward()
        found.append((x.grad, layer.bias.grad))
    assert all(torch.equal(mine, other) for mine, other in zip(*found, strict=True))


def test_opcheck() -> None:
    q = packed("nf4 nested", 12, 64)
    args, spec = list(q.parts), q.format.spec
    torch.library.opcheck(torch.ops.fusedadapt.q_quantize, (new(12, 64, seed=1), spec))
    torch.library.opcheck(torch.ops.fusedadapt.q_dequantize, (*args, spec, 12, 64, 2, 9, torch.bfloat16))
    torch.library.opcheck(torch.ops.fusedadapt.q_linear, (new(3, 64, seed=1), *args, None, spec, 12))
    torch.library.opcheck(torch.ops.fusedadapt.q_linear_dx, (new(3, 12, seed=1), *args, spec, 12, 64))


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    q, x = packed("nf4", 24, 64), new(5, 64, seed=5).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        fa.quantized_linear(x, q).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 5 * 24 * 64


@pytest.mark.parametrize("case", CASES)
def test_layer_state(case: str) -> None:
    name, group, options = CASES[case]
    layer = fa.QuantizedLinear.from_linear(nn.Linear(64, 24), name, group, **options)
    x = new(3, 64, seed=5)
    other = fa.QuantizedLinear.from_linear(nn.Linear(64, 24), name, group, **options)
    assert not torch.equal(other(x), layer(x))
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    other.load_state_dict(torch.load(stored, weights_only=True))
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x)) and twin.quantized.format == layer.format
    half = copy.deepcopy(layer).to(torch.bfloat16)
    typed = copy.deepcopy(layer).type(torch.bfloat16)
    for twin in (half, typed):
        assert twin.bias.dtype == torch.bfloat16
        assert all(torch.equal(a, b) for a, b in zip(twin.quantized.parts, layer.quantized.parts) if a is not None)
    assert torch.equal(layer.to_linear().weight, layer.dequantize())


@pytest.mark.parametrize("name", ["nf4", "int4", "nvfp4", "fp8_e4m3"])
def test_saved_by_torch_and_loaded_without_pickles_of_strangers(name: str, tmp_path: Path) -> None:
    q = fa.quantize(new(8, 64, seed=1), name)
    torch.save({"w": q}, tmp_path / "file")
    for back in (torch.load(tmp_path / "file", weights_only=True)["w"], pickle.loads(pickle.dumps(q)), copy.deepcopy(q)):
        assert repr(back) == repr(q) and back.qdata.dtype == q.qdata.dtype and torch.equal(back.dequantize(), q.dequantize())


_FRESH = """
import sys, torch, fusedadapt as fa
fa.QuantizedTensor
for name, q in torch.load(sys.argv[1], weights_only=True).items():
    x = torch.randn(3, 256)
    y = torch.compile(lambda t: fa.quantized_linear(t, q), fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, fa.quantized_linear(x, q)), name
"""


def test_loaded_and_compiled_before_anything_has_run(tmp_path: Path) -> None:
    """Code tables are built on first use, which may be while torch traces with tensors that hold no numbers."""
    names = ("nf4", "mxfp4", "dynamic8", "fp8_e4m3")
    torch.save({name: fa.quantize(torch.randn(33, 256), name) for name in names}, tmp_path / "q.pt")
    done = subprocess.run([sys.executable, "-c", _FRESH, str(tmp_path / "q.pt")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_bytes_are_moved_and_not_converted() -> None:
    q = fa.quantize(torch.randn(5, 64), "nf4", double_quant=True)
    assert torch.equal(q.to(device="cpu").dequantize(), q.dequantize()) and q.to("meta").device.type == "meta"
    for other in (torch.float16, torch.zeros(1, dtype=torch.float16), float, bool, 3.0, True):  # torch takes float and 3.0 for float64
        with pytest.raises(TypeError, match="expected a device; got"):
            q.to(other)  # type: ignore[arg-type]


def test_another_format_is_not_loaded() -> None:
    a, b = (fa.QuantizedLinear.from_linear(nn.Linear(64, 24), name) for name in ("nf4", "fp4"))
    before, own = b.dequantize(), b.state_dict()
    extra, state = "_extra_state", a.state_dict()
    damaged = torch.tensor([200, *b"fp4"], dtype=torch.uint8)
    for bad, match in (
        (state, "expected a state in fp4; got nf4"),
        (state | {extra: damaged}, "expected a state in fp4; got \ufffdfp4"),
        (state | {extra: torch.tensor([*b"fp4;serialization"], dtype=torch.uint8)}, "expected the dtype of a weight"),
        (state | {extra: own[extra], "weight_scale": state["weight_scale"].half()}, "weight_scale: expected torch.float32"),
        (state | {extra: own[extra], "weight": state["weight"].float()}, "weight: expected torch.uint8; got torch.float32"),
    ):
        for options in ({}, {"strict": False}, {"assign": True}):
            with pytest.raises(RuntimeError, match=match):
                b.load_state_dict(bad, **options)
            assert torch.equal(b.dequantize(), before) and b.weight_dtype == torch.float32  # nothing is taken over


def test_refusals() -> None:
    q, x = packed("nf4", 24, 64), new(3, 64, seed=5)
    with pytest.raises(TypeError, match="expected a QuantizedTensor; got Tensor"):
        fa.quantized_linear(x, q.dequantize())
    with pytest.raises(ValueError, match=r"x of 64 columns.*got x \(3, 65\)"):
        fa.quantized_linear(new(3, 65, seed=1), q)
    for wrong, name in ((x.int(), "torch.int32"), (x.to_sparse(), "torch.sparse_coo")):
        with pytest.raises(ValueError, match=f"expected x: dense.*got {name}"):
            fa.quantized_linear(wrong, q)
    with pytest.raises(ValueError, match=r"expected bias: dense.*got torch.int64"):
        fa.quantized_linear(x, q, torch.zeros(24, dtype=torch.int64))
    for what, args in (("x", (x.tolist(), q)), ("bias", (x, q, [0.0] * 24))):
        with pytest.raises(TypeError, match=f"expected {what}: a tensor; got list"):
            fa.quantized_linear(*args)
    with pytest.raises(ValueError, match="activations among"):
        fa.quantized_linear(x, q, activations=["int8"])
    with pytest.raises(ValueError, match="dtype float32.*got 'float16'"):
        q.dequantize("float16")
    with pytest.raises(ValueError, match=r"bias of shape \(24,\)"):
        fa.quantized_linear(x, q, torch.zeros(25))
    with pytest.raises(ValueError, match="qdata of"):
        torch.ops.fusedadapt.q_linear(x, q.qdata[:-1], q.scale, None, None, None, None, "nf4", 24)
    with pytest.raises(ValueError, match="scale: 24 elements"):
        torch.ops.fusedadapt.q_linear(x, q.qdata, q.scale[:-1], None, None, None, None, "nf4", 24)
    with pytest.raises(ValueError, match="zero: none"):
        torch.ops.fusedadapt.q_linear(x, q.qdata, q.scale, q.scale, None, None, None, "nf4", 24)
    with pytest.raises(ValueError, match="text form"):
        torch.ops.fusedadapt.q_linear(x, *q.parts, None, "nf4,colour=3", 24)
    mask = torch.ones(4, 4, dtype=torch.bool)
    for other in (nn.Conv1d(1, 1, 1), fa.LoRALinear(4, 4), fa.MaskedLinear(4, 4, mask=mask), fa.QuantizedLinear.from_linear(nn.Linear(4, 4))):
        with pytest.raises(TypeError, match="from_linear: expected a torch.nn.Linear"):  # their weight is not all they compute
            fa.QuantizedLinear.from_linear(other)
    assert q == q and q != packed("nf4", 24, 64) and q in {q: 1}
    with pytest.raises(ValueError, match="unknown|one of the formats"):
        fa.quantize(x, "nf5")


def test_spec_is_a_round_trip() -> None:
    for name, group, options in CASES.values():
        fmt = format_of(name, group, **options)
        assert type(fmt).parse(fmt.spec) == fmt

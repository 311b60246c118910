"""The short way of products with few tokens gives the general way's bits, is taken where it may be, and leaves everything else to the general way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fusedadapt as fa
from fusedadapt import config
from fusedadapt.ops import quant as ops
from fusedadapt.ops import quant_cpp
from fusedadapt.quant import plain

FORMATS = {"nf4": {}, "int4": {}, "int8": {}, "fp8_e4m3": {}, "mxfp4": {}, "nvfp4": {}, "fp4_e2m1": {}, "ternary": {}, "hqq4": {}, "int3": {}}


def new(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each call took the short way."""
    taken: list[bool] = []

    def watched(*args: object) -> torch.Tensor | None:
        y = product(*args)
        taken.append(y is not None)
        return y

    product = plain.product
    monkeypatch.setattr(plain, "product", watched)
    yield taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_same_bits(name: str, dtype: torch.dtype, ways: list[bool]) -> None:
    for options in [{}, {"double_quant": True}] if name == "nf4" else [{}]:
        q = fa.quantize(new(33, 96, seed=1), name, **options)
        for shape, bias in (((96,), None), ((1, 96), new(33, seed=2, dtype=dtype)), ((2, 3, 96), new(33, seed=3))):
            x = new(*shape, seed=4, dtype=dtype)
            general = torch.ops.fusedadapt.q_linear(x.view(-1, 96), *q.parts, bias, q.format.spec, 33)
            got = fa.quantized_linear(x, q, bias)
            assert torch.equal(got, general.view(*shape[:-1], 33)) and got.shape == (*shape[:-1], 33)
    assert all(ways)


def test_who_looks_on_or_wants_gradients_gets_the_general_way(ways: list[bool]) -> None:
    q, x = fa.quantize(new(24, 64, seed=1), "nf4"), new(2, 64, seed=2)
    want = fa.quantized_linear(x, q)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return func(*args, **(kwargs or {}))

    with FlopCounterMode(display=False) as flops:
        assert torch.equal(fa.quantized_linear(x, q), want)
    assert flops.get_total_flops() == 2 * 2 * 24 * 64
    with Mode():
        assert torch.equal(fa.quantized_linear(x, q), want)
    with torch.profiler.profile() as profile:
        assert torch.equal(fa.quantized_linear(x, q), want)
    assert any(event.key == "fusedadapt::q_linear" for event in profile.key_averages())
    with torch.autocast("cpu", torch.bfloat16):
        assert fa.quantized_linear(x, q).dtype == torch.bfloat16
    with config.backend("reference"):
        assert torch.allclose(fa.quantized_linear(x, q), want, rtol=1e-5, atol=1e-5)
    y = fa.quantized_linear(x.requires_grad_(), q)
    assert y.requires_grad
    assert ways == [True] + [False] * 6
    with torch.no_grad():
        assert torch.equal(fa.quantized_linear(x, q), want) and ways[-1]
    with torch.inference_mode():
        assert torch.equal(fa.quantized_linear(x.detach(), q), want) and ways[-1]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracers_write_the_product_down(ways: list[bool]) -> None:
    """Without it their graph would be an allocation, and its results whatever lies there."""
    q, x = fa.quantize(new(24, 64, seed=1), "nf4"), new(2, 64, seed=2)
    other = new(2, 64, seed=3)
    want = fa.quantized_linear(other, q)
    for pre_dispatch in (False, True):
        graph = make_fx(lambda t: fa.quantized_linear(t, q), pre_dispatch=pre_dispatch)(x)
        assert torch.equal(graph(other), want)
    seen: list[str] = []

    class Listener(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Listener():
        assert fa.quantized_linear(x, q).shape == (2, 24)
    assert "fusedadapt.q_linear" in seen
    with pytest.raises(RuntimeError):  # torch.jit has no view as bytes
        torch.jit.trace(lambda t: fa.quantized_linear(t, q), x, check_trace=False)
    assert ways == [True, False, False, False, False]


def test_forward_mode_is_refused_as_before(ways: list[bool]) -> None:
    """Its derivative would be lost without a word, under no_grad, too."""
    q, x = fa.quantize(new(24, 64, seed=1), "nf4"), new(2, 64, seed=2)
    for block in (torch.enable_grad(), torch.no_grad()):
        with forward_ad.dual_level(), block, pytest.raises(NotImplementedError, match="jvp"):
            fa.quantized_linear(forward_ad.make_dual(x, torch.ones_like(x)), q)
    assert not any(ways)


def test_tensors_that_only_stand_for_others_go_the_general_way(ways: list[bool]) -> None:
    """They look plain and have no address: zeros that autograd makes up, tensors of torch's functionalization."""
    q, x = fa.quantize(new(24, 64, seed=1), "nf4"), new(2, 64, seed=2)
    assert not fa.quantized_linear(torch._efficientzerotensor(2, 64), q).any()
    assert torch.equal(fa.quantized_linear(x, q, torch._efficientzerotensor(24)), fa.quantized_linear(x, q))
    wrapped = fa.quantized_linear(torch._to_functional_tensor(x), q)
    assert torch.equal(torch._from_functional_tensor(wrapped), fa.quantized_linear(x, q))
    assert ways == [False, False, True, False, True]


def test_many_tokens_and_odd_memory_are_left_to_the_general_way(ways: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_small", lambda t, *_: t <= 48)
    q = fa.quantize(new(24, 64, seed=1), "nf4")
    for x in (new(100, 64, seed=2), new(4, 128, seed=2)[:, ::2], new(64, 4, seed=2).t(), new(0, 64, seed=2), new(3, 64, seed=2).double()):
        y = fa.quantized_linear(x, q)
        w = q.dequantize(torch.float64)
        assert torch.allclose(y.double(), x.double() @ w.t(), rtol=1e-4, atol=1e-4)
    assert not any(ways)


def test_parts_that_do_not_fit_are_refused_as_before(ways: list[bool]) -> None:
    q, x = fa.quantize(new(24, 64, seed=1), "nf4"), new(1, 64, seed=2)
    with pytest.raises(ValueError, match="scale: 24 elements"):
        fa.quantized_linear(x, q._map(lambda t: t[:12] if t.dtype == torch.float32 else t))
    with pytest.raises(ValueError, match="expected x of 64 columns"):
        fa.quantized_linear(x[:, :32], q)
    with pytest.raises(ValueError, match="bias of shape"):
        fa.quantized_linear(x, q, torch.zeros(5))
    assert not any(ways)


def test_layers_and_compiled_layers(ways: list[bool]) -> None:
    layer = fa.QuantizedLinear.from_linear(torch.nn.Linear(64, 24), "int4").requires_grad_(False)
    x = new(2, 64, seed=2)
    want = layer(x)
    assert ways == [True]
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), want)


def test_pieces_live_in_one_piece_of_memory_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops._SCRATCH, "cpu", 16 * 96 * 4)
    q, x = fa.quantize(new(150, 96, seed=1), "nf4"), new(70, 96, seed=2)
    want = x.double() @ q.dequantize(torch.float64).t()
    faults: list[float] = []

    def run() -> None:
        for _ in range(30):
            y = fa.quantized_linear(x, q)
            faults.append(float((y.double() - want).abs().max()))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(faults) == 90 and max(faults) < 1e-4


def test_a_product_within_another_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler, a finalizer or a debugger may multiply while a piece waits for its product."""
    monkeypatch.setitem(ops._SCRATCH, "cpu", 16 * 96 * 4)
    q, other = (fa.quantize(new(150, 96, seed=seed), "nf4") for seed in (1, 2))
    x = new(70, 96, seed=3)
    inside: list[bool] = []
    dequantized = quant_cpp._dequantized

    def interrupted(*args: Any) -> torch.Tensor:
        w = dequantized(*args)
        if not inside:
            inside.append(True)
            fa.quantized_linear(x, other)
            inside.clear()
        return w

    want = fa.quantized_linear(x.requires_grad_(), q)
    (want_dx,) = torch.autograd.grad(want.sum(), x)
    monkeypatch.setattr(quant_cpp, "_dequantized", interrupted)
    y = fa.quantized_linear(x, q)
    assert torch.equal(y, want) and torch.equal(torch.autograd.grad(y.sum(), x)[0], want_dx)

"""The short way of the commonest layer gives the bits of the general one, and leaves to it whatever it does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import fusedadapt as fa
from fusedadapt.lowrank import functional, lora_linear, plain
from fusedadapt.ops.dense import multiplies

CASES = [
    # leading shape, K, N, r, scaling, p, bias, x wants a gradient
    ((7,), 12, 20, 3, 2.0, 0.0, True, True),
    ((129,), 384, 96, 16, 0.5, 0.1, True, True),
    ((3, 17), 65, 33, 5, 1.0, 0.3, False, True),
    ((2, 3, 5), 16, 1, 20, -1.5, 0.9, True, False),
    ((1,), 1, 1, 1, 0.0, 0.0, False, True),
    ((), 24, 8, 4, 2.0, 0.0, True, True),
]


FP32 = torch.float32
#: data and adapters
DTYPES = [(FP32, FP32), *((d, a) for d in (torch.bfloat16, torch.float16) for a in (FP32, d) if multiplies(d))]


def tensors(lead: tuple[int, ...], k: int, n: int, r: int, bias: bool, into_x: bool, data=FP32, adapters=FP32) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x, w, own = torch.randn(*lead, k).to(data).requires_grad_(into_x), torch.randn(n, k).to(data), torch.randn(n).to(data)
    a, b = (torch.randn(shape).to(adapters).requires_grad_() for shape in ((r, k), (n, r)))
    return x, w, a, b, own if bias else None


def results(x, w, a, b, bias, **options) -> list[Tensor]:
    y = lora_linear(x, w, a, b, bias=bias, **options)
    wanted = [t for t in (x, a, b) if t.requires_grad]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad(y, wanted, dy)]


def count_short(monkeypatch) -> list[str]:
    taken = []
    for name, function in (("forward", "_run"), ("backward", "_short_back")):
        whole = getattr(plain, function)
        monkeypatch.setattr(plain, function, lambda *args, whole=whole, name=name: taken.append(name) or whole(*args))
    return taken


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_are_those_of_the_general_way(monkeypatch, case, dtypes):
    *shape, scaling, p, bias, into_x = case
    given, options = tensors(*shape, bias, into_x, *dtypes), {"scaling": scaling, "dropout_p": p, "seed": 11}
    taken = count_short(monkeypatch)
    short = results(*given, **options)
    assert taken == ["forward", "backward"]
    monkeypatch.setattr(functional, "known", lambda *_: None)
    names = ("y", "dx", "dA", "dB") if into_x else ("y", "dA", "dB")
    for name, one, other in zip(names, short, results(*given, **options), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    assert len(taken) == 2


def test_masks_are_drawn_from_torchs_generator():
    given = tensors((33,), 40, 24, 4, True, True)
    torch.manual_seed(5)
    one = results(*given, dropout_p=0.5)
    torch.manual_seed(5)
    again, other = results(*given, dropout_p=0.5), results(*given, dropout_p=0.5)
    assert all(map(torch.equal, one, again)) and not torch.equal(one[0], other[0])


@pytest.mark.parametrize("wanted", ["A", "B", "x", "weight", "bias"])
def test_one_gradient_alone(wanted):
    x, w, a, b, bias = tensors((9,), 16, 12, 4, True, True)
    every = {"x": x, "weight": w, "A": a, "B": b, "bias": bias}
    for name, t in every.items():
        t.requires_grad_(name == wanted)
    y = lora_linear(x, w, a, b, bias=bias, scaling=2.0)
    truth = {name: t.detach().double().requires_grad_() for name, t in every.items()}
    true_y = truth["x"] @ truth["weight"].T + 2.0 * (truth["x"] @ truth["A"].T) @ truth["B"].T + truth["bias"]
    dy = torch.randn(y.shape)
    (found,), (true,) = torch.autograd.grad(y, every[wanted], dy), torch.autograd.grad(true_y, truth[wanted], dy.double())
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5)


def other_ways(x, w, a, b, bias):
    """Calls that the short way does not fit, as changes of the arguments."""
    yield "a transposed x", {"x": x.detach().t().contiguous().t().requires_grad_()}
    yield "a strided A", {"a": a.detach().repeat(1, 2)[:, ::2].requires_grad_()}
    yield "a transposed weight", {"w": w.t().contiguous().t()}
    yield "a trained weight", {"w": w.clone().requires_grad_()}
    yield "negatives of an imaginary part", {"x": torch.view_as_complex(torch.randn(*x.shape, 2)).conj().imag}
    yield "fp64", {name: t.detach().double().requires_grad_() for name, t in (("x", x), ("w", w), ("a", a), ("b", b), ("bias", bias))}
    yield "no tokens", {"x": torch.empty(0, x.shape[1])}


def test_what_does_not_fit_goes_the_general_way(monkeypatch):
    given = dict(zip(("x", "w", "a", "b", "bias"), tensors((9,), 16, 12, 4, True, True), strict=True))
    taken = count_short(monkeypatch)
    for what, change in other_ways(**given):
        arguments = given | change
        y = lora_linear(arguments["x"], arguments["w"], arguments["a"], arguments["b"], bias=arguments["bias"])
        x, w, a, b, bias = (arguments[name].detach().double() for name in ("x", "w", "a", "b", "bias"))
        torch.testing.assert_close(y.double(), x @ w.T + (x @ a.T) @ b.T + bias, rtol=1e-5, atol=1e-5, msg=what)
        assert not taken, what
    for block in (fa.backend("reference"), torch.autocast("cpu", torch.bfloat16)):
        with block:
            lora_linear(given["x"], given["w"], given["a"], given["b"])
    assert not taken


def test_errors_stay_those_of_the_general_way():
    x, w, a, b, bias = tensors((9,), 16, 12, 4, True, True)
    for wrong in ({"x": x[:, :8]}, {"lora_B": b[:5]}, {"bias": bias[:3]}, {"lora_A": a.to("meta")}, {"seed": 1.5}):
        arguments = {"x": x, "weight": w, "lora_A": a, "lora_B": b, "bias": bias} | wrong
        with pytest.raises(ValueError, match="fusedadapt.lora_linear: expected"):
            lora_linear(**arguments)


def test_backward_under_a_dispatch_mode_takes_the_ops(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode

    given = tensors((2, 9), 16, 12, 4, True, True)
    expected = results(*given, seed=3, dropout_p=0.25)
    taken = count_short(monkeypatch)
    y = lora_linear(*given[:4], bias=given[4], seed=3, dropout_p=0.25)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter:
        found = torch.autograd.grad(y, [given[0], given[2], given[3]], dy)
    assert taken == ["forward", "backward"] and counter.get_total_flops() == 2 * 18 * (16 * 12 + 4 * (2 * 16 + 2 * 12))
    for one, other in zip(found, expected[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_tracers_before_autograd_write_the_adapter_down(monkeypatch):
    """make_fx with pre_dispatch=True: the kernels, called by address, would be missing from its graph."""
    x, w, a, b, _ = tensors((9,), 16, 12, 4, False, False)
    taken = count_short(monkeypatch)
    graph = make_fx(lambda t: lora_linear(t, w, a.detach(), b.detach()), pre_dispatch=True)(torch.zeros_like(x))
    torch.testing.assert_close(graph(x), x @ w.T + (x @ a.T.detach()) @ b.T.detach(), rtol=1e-5, atol=1e-5)
    assert not taken


def test_a_second_derivative_is_refused():
    x, w, a, b, _ = tensors((9,), 16, 12, 4, False, True)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(lora_linear(x, w, a, b).sum(), a, create_graph=True)


def test_a_result_may_be_changed_in_place():
    x, w, a, b, _ = tensors((2, 9), 16, 12, 4, False, True)
    y = lora_linear(x, w, a, b)
    y += 1
    y.sum().backward()
    assert torch.isfinite(a.grad).all()

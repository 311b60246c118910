"""DoRA: the scale from one read of W, and PEFT's form with dropout on both products, against fp64, PEFT's own layer and the FLOPs it may take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fusedadapt as fa
from fusedadapt import dispatch
from fusedadapt.lowrank import lora_linear
from fusedadapt.lowrank.dora import DoraDropout, dora_linear_peft, dora_scale
from fusedadapt.ops.base import Base
from fusedadapt.reference.lowrank import dropout_mask, threshold_of
from fusedadapt.testing.saved import SavedBytes

T, K, N, R = 12, 24, 20, 3
BACKENDS = [name for name, reason in dispatch.available_backends("cpu").items() if name in ("reference", "cpp") and not reason]


@pytest.fixture(params=BACKENDS, autouse=True)
def on_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these products are too small for two, and on a busy machine they wait for the second
    with fa.backend(request.param):
        yield
    torch.set_num_threads(threads)


def new(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)), dtype=torch.float64).to(dtype)


def parts(dtype: torch.dtype = torch.float64, factors: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """x, W, bias, A, B, magnitude."""
    f = factors or dtype
    weight, a, b = new(N, K, seed=1, dtype=dtype), new(R, K, seed=2, dtype=f), new(N, R, seed=3, dtype=f)
    magnitude = (weight.double().norm(dim=1) * (1 + 0.1 * new(N, seed=4))).to(f)
    return new(T, K, seed=0, dtype=dtype), weight, new(N, seed=5, dtype=dtype), a, b, magnitude


def peft_form(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, g: Tensor, s: float, keep: Tensor, p: float) -> Tensor:
    dropped = x * keep * (65536 / (65536 - threshold_of(p)))
    y = x @ w.T + (g - 1) * (dropped @ w.T) + g * s * (dropped @ a.T @ b.T)
    return y if bias is None else y + bias


@pytest.mark.parametrize("dtype,factors", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
@pytest.mark.parametrize("cached", [False, True])
def test_scale_is_exact(dtype: torch.dtype, factors: torch.dtype, cached: bool) -> None:
    _, w, _, a, b, magnitude = parts(dtype, factors)
    rowsq = torch.ops.fusedadapt.lr_skinny_w(w, a)[1] if cached else None
    g = dora_scale(w, a, b, 1.7, magnitude, rowsq)
    truth = magnitude.double() / (w.double() + 1.7 * b.double() @ a.double()).norm(dim=1)
    assert g.dtype == torch.float32
    assert torch.allclose(g.double(), truth, rtol=2e-6)


def test_scale_survives_cancellation_and_zero_rows() -> None:
    w, a, b = torch.zeros(4, 8), torch.randn(2, 8), torch.randn(4, 2)
    w[2:] = -(b @ a)[2:]  # W + B A = 0 up to rounding
    b[0] = 0
    g = dora_scale(w, a, b, 1.0, torch.ones(4))
    assert torch.isfinite(g).all()
    assert (g[2:] * (b @ a).norm(dim=1)[2:] < 1e4).all()  # not 1 / rounding noise
    assert torch.allclose(g[1], 1 / (b @ a)[1].norm())


def test_scale_trains_the_magnitude_only() -> None:
    _, w, _, a, b, magnitude = (t.requires_grad_() for t in parts())
    dora_scale(w, a, b, 2.0, magnitude).sum().backward()
    assert magnitude.grad is not None and w.grad is None and a.grad is None and b.grad is None
    assert torch.allclose(magnitude.grad, 1 / (w + 2.0 * b @ a).norm(dim=1))


def test_scale_refuses_shapes() -> None:
    _, w, _, a, b, magnitude = parts()
    with pytest.raises(ValueError, match=r"fusedadapt.dora_scale: expected weight \(N, K\)"):
        dora_scale(w.T, a, b, 1.0, magnitude)
    with pytest.raises(ValueError, match=r"dora_scale: expected magnitude of shape \(20,\); got \(3,\)"):
        dora_scale(w, a, b, 1.0, magnitude[:3])


def test_gradcheck_with_dropout() -> None:
    x, w, bias, a, b, magnitude = (t.requires_grad_() for t in parts())
    seed, scalars = torch.tensor([11]), torch.tensor([[1.5, 0.4]], dtype=torch.float64)
    g = (magnitude / 3).detach().requires_grad_()
    few = x[:4].detach().requires_grad_()

    def call(x: torch.Tensor, w: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return DoraDropout.apply(x, *rest, seed, scalars, *Base(w))

    assert torch.autograd.gradcheck(call, (few, w, bias, a, b, g))


@pytest.mark.parametrize("p", [0.0, 0.35])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_its_equation(p: float, with_bias: bool) -> None:
    given = [t.requires_grad_() for t in parts()]
    x, w, bias, a, b, magnitude = given
    keep = dropout_mask(T, K, 5, threshold_of(p))
    bias_ = bias if with_bias else None
    y = dora_linear_peft(x, w, a, b, magnitude, bias=bias_, scaling=0.7, dropout_p=p, seed=5)
    truth = peft_form(x, w, bias_, a, b, magnitude / (w + 0.7 * b @ a).norm(dim=1).detach(), 0.7, keep, p)
    assert torch.allclose(y, truth)
    dy, wanted = new(T, N, seed=9), given if with_bias else [x, w, a, b, magnitude]
    for ours, right in zip(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(truth, wanted, dy)):
        assert torch.allclose(ours, right)


def test_eval_mode_drops_nothing() -> None:
    x, w, bias, a, b, magnitude = parts()
    y = dora_linear_peft(x, w, a, b, magnitude, bias=bias, dropout_p=0.5, training=False)
    assert torch.equal(y, lora_linear(x, w, a, b, bias=bias, row_scale=dora_scale(w, a, b, 1.0, magnitude)))


def peft_layer(dtype: torch.dtype, p: float) -> tuple[nn.Module, Any]:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N)).to(dtype)
    config = peft.LoraConfig(r=R, lora_alpha=5, lora_dropout=p, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1 + 0.1 * torch.randn(N))
    return model, layer


class Injected(nn.Module):
    """A dropout layer with a mask from outside."""

    def __init__(self, keep: Tensor, p: float) -> None:
        super().__init__()
        self.keep, self.scale = keep, 65536 / (65536 - threshold_of(p))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.keep * self.scale


def grads_of(y: Tensor, x: Tensor, layer: Any) -> list[Tensor]:
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_magnitude_vector["default"].weight]
    return [y.detach(), *torch.autograd.grad(y, [x, *weights], new(*y.shape, seed=3, dtype=torch.bfloat16).to(y.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_no_further_from_the_truth_than_peft(dtype: torch.dtype, p: float) -> None:
    import copy

    model, layer = peft_layer(dtype, p)
    rows = 96
    x = new(rows, K, seed=0, dtype=dtype).requires_grad_()
    a, b, magnitude = (m["default"].weight for m in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    bias = layer.base_layer.bias
    y = dora_linear_peft(x, layer.base_layer.weight, a, b, magnitude, bias=bias, scaling=layer.scaling["default"], dropout_p=p, seed=4)
    ours = grads_of(y, x, layer)
    if p:
        layer.lora_dropout["default"] = Injected(dropout_mask(rows, K, 4, threshold_of(p)), p)
    eager = grads_of(model(x), x, layer)
    exact = copy.deepcopy(model).double()
    x64 = x.detach().double().requires_grad_()
    truth = grads_of(exact(x64), x64, exact.base_model.model[0])
    for name, mine, theirs, right in zip(("y", "dx", "dA", "dB", "dm"), ours, eager, truth, strict=True):
        error, limit = (mine.double() - right).norm() / right.norm(), (theirs.double() - right).norm() / right.norm()
        if name == "dm" and p and dtype == torch.bfloat16:
            limit = max(limit, 2.0**-9)  # PEFT multiplies by W in fp32 here; ours is rounded once, like every product of 16-bit matrices
        assert error <= 1.2 * limit + 3e-7, (name, float(error), float(limit))


def test_two_products_each_way_and_nothing_saved_beside_x() -> None:
    x, w, bias, a, b, magnitude = parts(torch.float32)
    x.requires_grad_()
    for t in (a, b):
        t.requires_grad_()
    product = 2 * T * K * N
    with SavedBytes([x, w, bias, a, b, magnitude]) as saved, FlopCounterMode(display=False) as forward:
        y = dora_linear_peft(x, w, a, b, magnitude, bias=bias, dropout_p=0.2)
    assert saved.total <= 4 * (T * R + N) + 128  # U, the scale, the seed and two numbers
    counts = forward.get_flop_counts()["Global"]
    assert sum(n for op, n in counts.items() if "linear" in str(op) or "mm" in str(op)) == 2 * product
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert sum(n for op, n in backward.get_flop_counts()["Global"].items() if str(op).split(".")[-1] in ("mm", "addmm")) == 2 * product


def test_mask_replays_under_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    x, w, bias, a, b, magnitude = (t.requires_grad_() for t in parts(torch.float32))

    def layer(x: Tensor) -> Tensor:
        return dora_linear_peft(x, w, a, b, magnitude, bias=bias, dropout_p=0.5)

    torch.manual_seed(2)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, a, b, magnitude])
    for reentrant in (True, False):
        torch.manual_seed(2)
        y = checkpoint(layer, x, use_reentrant=reentrant)
        again = torch.autograd.grad(y.square().sum(), [x, a, b, magnitude]) if not reentrant else None
        if again is None:
            y.square().sum().backward()
            again = tuple(t.grad for t in (x, a, b, magnitude))
        assert all(torch.equal(u, v) for u, v in zip(plain, again))


def test_autocast_runs_in_its_dtype() -> None:
    x, w, bias, a, b, magnitude = parts(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for p in (0.0, 0.3):
            y = dora_linear_peft(x, w, a, b, magnitude, bias=bias, dropout_p=p, seed=1)
            exact = dora_linear_peft(*(t.double() for t in (x, w, a, b, magnitude)), bias=bias.double(), dropout_p=p, seed=1)
            assert y.dtype == torch.bfloat16
            assert (y.double() - exact).norm() < 0.01 * exact.norm()


def test_compiles_as_one_graph() -> None:
    x, w, bias, a, b, magnitude = (t.requires_grad_() for t in parts(torch.float32))

    def layer(x: Tensor) -> Tensor:
        return dora_linear_peft(x, w, a, b, magnitude, bias=bias, dropout_p=0.5)

    torch._dynamo.reset()
    torch.manual_seed(1)
    plain = layer(x)
    torch.manual_seed(1)
    assert torch.allclose(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), plain)


def test_bad_input() -> None:
    x, w, bias, a, b, magnitude = parts()
    with pytest.raises(ValueError, match=r"dropout_p in \[0, 1\)"):
        dora_linear_peft(x, w, a, b, magnitude, dropout_p=1.0)
    with pytest.raises(ValueError, match="weight in x's dtype"):
        dora_linear_peft(x.float(), w, a.float(), b.float(), magnitude.float(), dropout_p=0.1)
    with pytest.raises(ValueError, match="magnitude of shape"):
        dora_linear_peft(x, w, a, b, magnitude[:-1])


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_trained_scaling_is_one_and_gets_its_gradient(p: float) -> None:
    x, w, bias, a, b, magnitude = parts()
    s = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    y = dora_linear_peft(x, w, a, b, magnitude, bias=bias, scaling=s, dropout_p=p, seed=3)
    torch.testing.assert_close(y, dora_linear_peft(x, w, a, b, magnitude, bias=bias, scaling=4.0, dropout_p=p, seed=3))
    keep = dropout_mask(T, K, 3, threshold_of(p)) if p else torch.ones(T, K)
    g = (magnitude / (w + 4 * b @ a).norm(dim=1)).detach()
    dropped = x * keep * (65536 / (65536 - threshold_of(p)))
    weights = new(T, N, seed=6)
    (got,) = torch.autograd.grad((y * weights).sum(), [s])
    torch.testing.assert_close(got, (g * (dropped @ a.T @ b.T) * weights).sum())
    half = dora_linear_peft(*(t.bfloat16() for t in (x, w, a, b, magnitude)), scaling=s, dropout_p=p, seed=3)
    assert half.dtype == torch.bfloat16 and torch.autograd.grad(half.float().sum(), [s])[0].dtype == torch.float64


def test_a_seed_that_is_none_is_refused() -> None:
    x, w, _, a, b, magnitude = parts()
    for seed in ("a", 1.5, True, 2**63, torch.tensor(5, dtype=torch.int32), torch.tensor([5, 6])):
        with pytest.raises(ValueError, match="expected seed as"):
            dora_linear_peft(x, w, a, b, magnitude, dropout_p=0.5, seed=seed)  # type: ignore[arg-type]

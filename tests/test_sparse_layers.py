"""MaskedLinear, SparseDeltaLinear, masked_wgrad: gradients against the dense layer, dtypes, autocast, compile, states, memory, refusals."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fusedadapt as fa
from fusedadapt.sparse import Mask, MaskedLinear, SparseDeltaLinear, masked_wgrad
from fusedadapt.sparse.layers import _apply

N, K = 12, 20
LAYERS = (MaskedLinear, SparseDeltaLinear)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def mask(density: float = 0.3, seed: int = 1, shape: tuple[int, int] = (N, K)) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def bits(t: Tensor) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def dense_run(linear: nn.Linear, x: Tensor) -> tuple[Tensor, ...]:
    """y, dx, dW, db of a loss that weighs every output differently."""
    x, twin = x.detach().clone().requires_grad_(), copy.deepcopy(linear).requires_grad_()
    y = twin(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    return y.detach(), x.grad, twin.weight.grad, None if twin.bias is None else twin.bias.grad


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", LAYERS)
def test_against_the_dense_layer_in_fp64(cls: Any, bias: bool, backend: str) -> None:
    for chosen in (mask(), mask(0.0), mask(1.0), Mask.from_bool(mask(0.1), row_aligned=True)):
        for shape in ((7, K), (2, 3, K), (K,), (0, K)):
            linear = nn.Linear(K, N, bias, dtype=torch.float64)
            x = torch.randn(shape, dtype=torch.float64)
            y0, dx0, dw0, db0 = dense_run(linear, x)
            with fa.backend(backend):
                layer = cls.from_linear(linear, chosen)
                x.requires_grad_()
                y = layer(x)
                (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
            at = chosen if isinstance(chosen, Tensor) else chosen.to_bool()
            torch.testing.assert_close(y, y0, atol=1e-12, rtol=0)
            torch.testing.assert_close(x.grad, dx0, atol=1e-12, rtol=0)
            torch.testing.assert_close(layer.values.grad, dw0[at], atol=1e-12, rtol=0)
            if bias:
                torch.testing.assert_close(layer.bias.grad, db0, atol=1e-12, rtol=0)
            assert layer.weight.grad is None and layer.mask == Mask.from_bool(at)


def test_gradcheck_with_alpha() -> None:
    layer = SparseDeltaLinear.from_linear(nn.Linear(5, 4, dtype=torch.float64), mask(shape=(4, 5)), alpha=0.5)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        weight = layer.weight.detach().clone()
        weight.view(-1)[layer.index.long()] = layer._base + layer.alpha * values.detach()
        return _apply(x, weight, bias, values, layer.index, layer.alpha, False)

    values = torch.randn(layer.values.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, values, layer.bias.detach().clone().requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", LAYERS)
def test_sixteen_bits(cls: Any, dtype: torch.dtype) -> None:
    linear, x = nn.Linear(K, N).to(dtype), torch.randn(33, K).to(dtype)
    y0, dx0, dw0, db0 = dense_run(copy.deepcopy(linear).double(), x.double())
    layer = cls.from_linear(linear, mask())
    x.requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 2, y.numel()).reshape(y.shape).to(dtype)).sum().backward()
    assert y.dtype == x.grad.dtype == dtype and layer.values.grad.dtype == layer.values.dtype
    assert layer.values.dtype == (dtype if cls is MaskedLinear else torch.float32)
    for got, wanted in ((y, y0), (x.grad, dx0), (layer.values.grad, dw0[mask()]), (layer.bias.grad, db0)):
        assert (got.double() - wanted).abs().max() <= 2e-2 * wanted.abs().max()


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", LAYERS)
def test_autocast_is_that_of_linear(cls: Any, amp: torch.dtype) -> None:
    linear, x = nn.Linear(K, N), torch.randn(9, K)
    with torch.autocast("cpu", amp):
        y0, dx0, dw0, _ = dense_run(linear, x)
    layer = cls.from_linear(linear, mask())
    x.requires_grad_()
    with torch.autocast("cpu", amp):
        y = layer(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    assert y.dtype == amp and x.grad.dtype == layer.values.grad.dtype == torch.float32 and layer.bias.grad.dtype == torch.float32
    torch.testing.assert_close(y, y0, atol=1e-2, rtol=2e-2)
    torch.testing.assert_close(x.grad, dx0, atol=3e-2, rtol=2e-2)
    torch.testing.assert_close(layer.values.grad, dw0[mask()], atol=1e-1, rtol=2e-2)


def optimizers() -> list[Any]:
    return [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5), lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: fa.optim.AdamW(p, lr=0.1, weight_decay=0.5), lambda p: fa.optim.Lion(p, lr=0.1, backend="reference"),
    ]  # fmt: skip


@pytest.mark.parametrize("make", range(5))
@pytest.mark.parametrize("cls", LAYERS)
def test_training_moves_the_chosen_elements_alone(cls: Any, make: int) -> None:
    linear = nn.Linear(K, N)
    before, chosen = linear.weight.detach().clone(), mask()
    layer = cls.from_linear(linear, chosen)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"values", "bias"} and layer.weight is linear.weight
    optimizer = optimizers()[make]([p for p in layer.parameters() if p.requires_grad])
    x = torch.randn(9, K)
    for _ in range(3):
        optimizer.zero_grad()
        y = layer(x)
        expected = before.clone()
        expected[chosen] = layer.values.detach() if cls is MaskedLinear else before[chosen] + layer.values.detach()
        assert torch.equal(layer.weight, expected), "the weight follows the values"
        torch.testing.assert_close(y, torch.nn.functional.linear(x, expected, layer.bias))
        y.square().sum().backward()
        optimizer.step()
    layer.sync_()
    assert bits(layer.weight[~chosen]) == bits(before[~chosen]) and bool((layer.weight[chosen] != before[chosen]).all())
    plain = layer.to_linear()
    assert type(plain) is nn.Linear and torch.equal(plain(x), layer(x)) and plain.weight.data_ptr() != layer.weight.data_ptr()
    if isinstance(layer, SparseDeltaLinear):
        layer.disable()
        assert bits(layer.weight) == bits(before)
        torch.testing.assert_close(layer(x), plain(x), msg="forward puts the change back")


@pytest.mark.parametrize("cls", LAYERS)
def test_states_and_copies(cls: Any) -> None:
    layer, x = cls.from_linear(nn.Linear(K, N), mask()), torch.randn(4, K)
    with torch.no_grad():
        layer.values.add_(torch.randn_like(layer.values))
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), y) and twin.weight.data_ptr() != layer.weight.data_ptr()
    with torch.no_grad():
        twin.values.add_(1.0)
    assert not torch.equal(twin(x), y) and torch.equal(layer(x), y)
    other = cls(K, N, mask=mask(seed=1))
    other(x)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    if cls is SparseDeltaLinear:
        other.disable()
        layer.disable()
        assert bits(other.weight) == bits(layer.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        cls(K, N, mask=mask(0.9)).load_state_dict(layer.state_dict())
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), y, atol=0.1, rtol=0.1)
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
    assert "trained=" in repr(layer)


@pytest.mark.parametrize("cls", LAYERS)
def test_used_twice_before_one_backward_pass(cls: Any) -> None:
    linear = nn.Linear(K, K)
    layer, x = cls.from_linear(linear, mask(shape=(K, K))), torch.randn(4, K)
    layer(layer(x)).sum().backward()
    twin = copy.deepcopy(linear).requires_grad_()
    twin(twin(x)).sum().backward()
    torch.testing.assert_close(layer.values.grad, twin.weight.grad[mask(shape=(K, K))])
    y = layer(x).square().sum()
    with torch.no_grad():
        layer.values.add_(1.0)
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, [layer.bias, layer.values])  # x needs no gradient, but the weight is saved: told, as by any layer


@pytest.mark.parametrize("cls", [MaskedLinear, SparseDeltaLinear])
def test_made_on_the_meta_device_and_filled_later(cls: Any) -> None:
    whole = cls(K, N, mask=mask())
    layer = cls(K, N, mask=mask(), device="meta")
    assert layer(torch.empty(3, K, device="meta")).shape == (3, N)
    layer.to_empty(device="cpu").load_state_dict(whole.state_dict())
    x = torch.randn(3, K)
    assert torch.equal(layer(x), whole(x))


def test_in_inference_mode() -> None:
    """Made there, and used there between two steps of training."""
    layer, x = MaskedLinear(K, N, mask=mask()), torch.randn(3, K)
    with torch.inference_mode():
        made = MaskedLinear(K, N, mask=mask())
        assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias)) and torch.equal(made(x), made.to_linear()(x))
        layer(x)
    layer(x).sum().backward()
    assert layer.values.grad is not None


def test_pruning_and_making_new() -> None:
    layer = MaskedLinear(K, N, mask=mask(), prune=True)
    assert bool((layer.weight[~mask()] == 0).all()) and bool((layer.weight[mask()] != 0).all())
    assert SparseDeltaLinear(K, N, False, mask=mask(), alpha=2.0, dtype=torch.float64).alpha == 2.0
    with torch.no_grad():
        delta = SparseDeltaLinear.from_linear(nn.Linear(K, N), mask(), alpha=2.0)
        before = delta.weight.clone()
        delta.values.fill_(0.5)
        delta(torch.randn(1, K))
    torch.testing.assert_close(delta.weight - before, mask().float())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("cls", LAYERS)
def test_compiled_with_one_break(cls: Any) -> None:
    """Bringing the weight up to date is ordinary Python (it looks at versions and addresses): a graph before it, a graph after it."""
    layer, x = cls.from_linear(nn.Linear(K, N), mask()), torch.randn(4, K, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager")
    optimizer = torch.optim.SGD([layer.values], lr=0.1)
    for _ in range(3):
        twin = copy.deepcopy(layer)
        y, want = compiled(x), twin(x)
        assert torch.equal(y, want)
        got, wanted = torch.autograd.grad(y.square().sum(), [x, layer.values]), torch.autograd.grad(want.square().sum(), [x, twin.values])
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))
        layer.values.grad = got[1]
        optimizer.step()
    with pytest.raises(Exception, match="(?i)disable|graph break|skip"):  # noqa: B017 - dynamo's own class, not public
        torch.compile(layer, backend="eager", fullgraph=True)(x)


# --- masked_wgrad -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_wgrad(dtype: torch.dtype) -> None:
    for (t, n, k), density in (((5, 7, 9), 0.3), ((64, 33, 65), 0.05), ((1, 1, 1), 1.0), ((0, 4, 4), 0.5), ((6, 4, 4), 0.0), ((3, 2100, 1100), 0.01)):
        dy, x, chosen = torch.randn(t, n).to(dtype), torch.randn(t, k).to(dtype), mask(density, 2, (n, k))
        wanted = (dy.double().t() @ x.double())[chosen]
        for m in (
            Mask.from_bool(chosen),
            Mask.from_bool(chosen, row_aligned=True),
            Mask.from_bool(chosen).indices(),
            Mask.from_bool(chosen).indices().long(),
            chosen,
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=m is chosen):  # which must not narrow it
                got = masked_wgrad(dy, x, m)
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and got.shape == wanted.shape
            torch.testing.assert_close(got.double(), wanted, atol={torch.float64: 1e-10}.get(dtype, 1e-3) if dtype.itemsize > 2 else 0.1, rtol=2e-2)
    batched = masked_wgrad(torch.randn(2, 3, 7), torch.randn(2, 3, 9), mask(shape=(7, 9)).reshape(-1).nonzero().reshape(-1))
    assert batched.shape == (int(mask(shape=(7, 9)).sum()),)
    with FlopCounterMode(display=False) as flops:
        masked_wgrad(torch.randn(8, 7), torch.randn(8, 9), Mask.full((7, 9), True))
    assert flops.get_total_flops() == 2 * 8 * 7 * 9


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("cls", LAYERS)
def test_no_features_and_no_rows(cls: Any) -> None:
    """As torch's own layer."""
    for rows, k, n in ((3, 0, 4), (3, 4, 0), (0, 4, 5), (0, 0, 0)):
        dense = nn.Linear(k, n)
        layer = cls.from_linear(dense, torch.ones(n, k, dtype=torch.bool))
        x = torch.randn(2, rows, k, requires_grad=True)
        y = layer(x)
        assert torch.equal(y, nn.functional.linear(x, dense.weight, dense.bias))
        y.sum().backward()
        assert x.grad is not None and layer.values.grad is not None and layer.values.grad.shape == (n * k,)
        assert torch.equal(masked_wgrad(torch.zeros(2, rows, n), x, torch.ones(n, k, dtype=torch.bool)), torch.zeros(n * k))


def peak(call: Any) -> int:
    """Largest sum of bytes that torch's CPU allocator held during the call, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = call()
    held = top = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            top = max(top, held)
    assert top >= out.untyped_storage().nbytes()
    return top


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wgrad_holds_no_dense_gradient(dtype: torch.dtype) -> None:
    t, n, k = 64, 4096, 1024
    dy, x = torch.randn(t, n).to(dtype), torch.randn(t, k).to(dtype)
    for density in (0.01, 0.1):
        chosen = Mask.from_bool(mask(density, 3, (n, k)))
        index = chosen.indices()
        extra = peak(lambda index=index: masked_wgrad(dy, x, index))
        assert extra <= 1.1 * index.numel() * 4 + 8e6, f"{extra / 1e6:.1f} MB at {density}"


def test_bad_input() -> None:
    linear = nn.Linear(K, N)
    before = bits(linear.weight)
    sheared = nn.Linear(N, K)
    sheared.weight = nn.Parameter(sheared.weight.detach().t())
    for call, said in (
        (lambda: MaskedLinear.from_linear(linear, mask(shape=(K, N))), r"mask of shape \(12, 20\); got \(20, 12\)"),
        (lambda: MaskedLinear.from_linear(linear, torch.ones(N, K)), "expected a bool tensor"),
        (lambda: SparseDeltaLinear(K, N, mask=mask(shape=(3, 4))), "SparseDeltaLinear: expected a mask"),
        (lambda: SparseDeltaLinear(K, N, mask=mask(), alpha=math.nan), "SparseDeltaLinear: expected a finite alpha; got nan"),
        (lambda: SparseDeltaLinear.from_linear(linear, mask(), alpha=-math.inf), "SparseDeltaLinear: expected a finite alpha; got -inf"),
        (lambda: MaskedLinear.from_linear(sheared, mask()), "contiguous weight"),
        (lambda: masked_wgrad(torch.zeros(3, N), torch.zeros(3, K), Mask.full((K, N), True)), r"mask of shape \(12, 20\)"),
        (lambda: masked_wgrad(torch.zeros(3, N), torch.zeros(4, K), Mask.full((N, K), True)), "expected dy"),
        (lambda: masked_wgrad(torch.zeros(2, 6, N), torch.zeros(3, 4, K), Mask.full((N, K), True)), "same leading dimensions"),
        (lambda: masked_wgrad(torch.zeros(3, N), torch.zeros(3, K), torch.zeros(3)), "int32 or int64"),
        (lambda: masked_wgrad(torch.zeros(3, N).int(), torch.zeros(3, K).int(), torch.tensor([0])), "floating-point dy"),
        (lambda: masked_wgrad(torch.tensor(1.0), torch.zeros(K), torch.tensor([0])), r"dy \[..., N\]"),
        (lambda: masked_wgrad(torch.zeros(3, N), torch.zeros(3, K), torch.tensor([2, 1])), "sorted"),
        (lambda: masked_wgrad(torch.zeros(3, N), torch.zeros(3, K), torch.tensor([0, N * K])), "sorted"),
        (lambda: masked_wgrad(torch.zeros(3, N, dtype=torch.bfloat16), torch.zeros(3, K), torch.tensor([0])), "one dtype"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert sheared.weight.requires_grad
    for layer in (nn.Conv1d(1, 1, 1), fa.LoRALinear(K, N), fa.QuantizedLinear.from_linear(linear), MaskedLinear(K, N, mask=mask())):
        with pytest.raises(TypeError, match=r"MaskedLinear.from_linear: expected a torch.nn.Linear; got"):
            MaskedLinear.from_linear(layer, mask())
    with pytest.raises(TypeError, match="bool tensor as mask; got NoneType"):
        MaskedLinear.from_linear(linear, None)
    for x in (torch.zeros(2, K + 1), torch.tensor(1.0), torch.zeros(2, K, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"MaskedLinear: expected x of shape \[..., 20\] in torch.float32"):
            MaskedLinear(K, N, mask=mask())(x)
    assert bits(linear.weight) == before and linear.weight.requires_grad and math.isfinite(float(linear.weight.detach().sum()))


@pytest.mark.parametrize("cls", [MaskedLinear, SparseDeltaLinear])
def test_a_state_dict_holds_the_weight_as_trained(cls: type[MaskedLinear]) -> None:
    """Not as the last forward pass saw it; after `disable` the base's."""
    mask = torch.eye(4, 6) > 0
    layer = cls(6, 4, mask=mask)
    start = layer.state_dict()["weight"].clone()
    layer(torch.randn(3, 6)).sum().backward()
    fa.optim.SGD([layer.values], lr=0.5).step()
    saved = layer.state_dict()["weight"]
    assert torch.equal(saved, layer.to_linear().weight) and not torch.equal(saved, start) and torch.equal(saved[~mask], start[~mask])
    if isinstance(layer, SparseDeltaLinear):
        layer.disable()
        assert torch.equal(layer.state_dict()["weight"], start)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_threads_may_share_a_layer(backend: str) -> None:
    """Forward writes the weight each time; another thread's backward pass must not take that for a change."""
    for cls in (MaskedLinear, SparseDeltaLinear) * 3:
        layer, failed = cls(60, 40, mask=torch.rand(40, 60) > 0.5), list[RuntimeError]()

        def work(layer: MaskedLinear = layer, failed: list[RuntimeError] = failed) -> None:
            try:
                with fa.backend(backend):
                    for _ in range(30):
                        layer(torch.randn(3, 60)).sum().backward()
            except RuntimeError as error:
                failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed


def test_wgrad_has_no_gradient_of_its_own() -> None:
    """Autograd would have gone through the tiles of some paths and not of others."""
    dy, x = torch.randn(3, 4, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    assert not masked_wgrad(dy, x, torch.eye(4, 6) > 0).requires_grad
    with pytest.raises(TypeError, match="sorted positions; got list"):
        masked_wgrad(dy, x, [1, 2])


def test_explain_knows_the_layers() -> None:
    first = MaskedLinear.from_linear(nn.Linear(6, 4), torch.ones(4, 6) > 0)
    rows = fa.explain(nn.Sequential(first, SparseDeltaLinear.from_linear(nn.Linear(4, 4), torch.eye(4) > 0)))
    assert [what for what, _, _ in rows] == ["0.MaskedLinear 24 of 24 float32 cpu", "1.SparseDeltaLinear 4 of 16 float32 cpu"]
    assert all(backend in ("cpp", "reference") and "dW in tiles" in why for _, backend, why in rows)

"""What `lora_linear` promises on every backend: dropout, repeatability, work done, autograd's rules, shapes and modes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear as dense
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedadapt as fa
from fusedadapt import dispatch
from fusedadapt.lowrank import Output, Segment, lora_linear, lora_linear_group
from fusedadapt.reference import lowrank as reference
from fusedadapt.reference.random import random16

ops = torch.ops.fusedadapt


@pytest.fixture(params=["reference", "cpp", "triton"])
def backend(request: pytest.FixtureRequest, quick_calls: None) -> Iterator[str]:
    if absent := dispatch.available_backends("cpu")[request.param]:
        pytest.skip(absent)
    with fa.backend(request.param), fa.strict():
        yield request.param


@pytest.fixture
def on_reference() -> Iterator[None]:
    with fa.backend("reference"):
        yield


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    g = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)


def layer(t: int = 5, k: int = 8, n: int = 6, r: int = 3, dtype: torch.dtype = torch.float32, adapters: torch.dtype | None = None) -> list[Tensor]:
    """x, weight, A, B; the weight frozen."""
    adapters = adapters or dtype
    weight = values(n, k, seed=1, dtype=dtype, grad=False)
    return [values(t, k, dtype=dtype), weight, values(r, k, seed=2, dtype=adapters), values(n, r, seed=3, dtype=adapters)]


def results(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, **options: Any) -> list[Tensor]:
    """y, dx, dA, dB for a fixed dy."""
    y = lora_linear(x, weight, a, b, **options)
    return [y.detach(), *torch.autograd.grad(y, [x, a, b], values(*y.shape, seed=9, dtype=y.dtype, grad=False))]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(p, q) for p, q in zip(one, other))


def test_gradient_of_a_trained_scaling(backend: str) -> None:
    """One number for all tokens, on top of a token gate; also in 16 bits, where its sum is rounded once."""
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, a, b = layer(40, dtype=torch.float32)
        scaling, gate = torch.tensor(1.5, dtype=dtype, requires_grad=True), values(40, dtype=torch.float32)
        lora_linear(x, weight, a, b, scaling=scaling, token_gate=gate).square().sum().backward()
        wide = scaling.detach().double().requires_grad_()
        reference.linear(x.double(), weight.double(), a.double(), b.double(), scaling=wide, token_gate=gate.double()).square().sum().backward()
        assert scaling.grad is not None and wide.grad is not None and scaling.grad.dtype == dtype
        assert (scaling.grad.double() - wide.grad).abs() <= torch.finfo(dtype).eps * 8 * wide.grad.abs()


# ---- dropout


SHAPES = [(1, 1), (3, 8), (5, 13), (33, 70), (7, 257)]


@pytest.mark.parametrize(("t", "k"), SHAPES)
def test_masks_are_the_same_bits_everywhere(backend: str, t: int, k: int) -> None:
    """Each op's mask, of every stream, is `reference.dropout_mask`'s: U of unit vectors, M of unit tokens, dX of ones, and plain dropout."""
    seed = torch.tensor([2**40 + 5])
    row, tokens = min(k, 20), min(t, 20)
    for p in (0.1, 0.5, 0.9):
        threshold = reference.threshold_of(p)
        masks = [reference.dropout_mask(t, k, seed, threshold, stream) for stream in range(3)]
        ps = torch.tensor([p] * 3).double()

        def check(got: Tensor, mask: Tensor, factor: float = 65536 / (65536 - threshold)) -> None:
            assert torch.equal(got != 0, mask)
            torch.testing.assert_close(got, mask * factor, rtol=2e-7, atol=0)

        check(ops.lr_dropout(torch.ones(t, k), seed, ps[0]), masks[0])
        u = ops.lr_shrink(torch.ones(t, k), torch.eye(k)[:row].repeat(3, 1), seed, ps, [row] * 3)
        check(u, torch.cat([m[:, :row] for m in masks], 1))
        m = ops.lr_bwd_x(torch.ones(t, k), torch.eye(t)[:, :tokens].repeat(1, 3), seed, ps, [tokens] * 3)
        check(m, torch.cat([m[:tokens] for m in masks]))
        for stream in range(3):
            y, u = torch.zeros(t, k), torch.eye(3)[stream].repeat(t, 1)
            ops.lr_add_(y, u, torch.ones(3, k), seed, ps, [1, 1, 1])
            check(y, masks[stream])


def test_the_edge_of_a_mask(backend: str) -> None:
    """An element is kept iff its 16 bits are >= the threshold: equal is kept, one more drops it."""
    bits = random16(9, np.arange(8), 0, 0)
    for i, value in enumerate(bits.tolist()):
        at, above = (ops.lr_dropout(torch.ones(1, 8), torch.tensor([9]), torch.tensor(n / 65536).double())[0, i] for n in (value, value + 1))
        assert at != 0 and above == 0


def test_masks_do_not_know_strides_or_leading_dimensions(backend: str) -> None:
    x = values(24, 13, dtype=torch.float32)
    options = {"dropout_p": 0.5, "seed": 11}
    _, weight, a, b = layer(k=13)
    expected = results(x, weight, a, b, **options)
    wide = torch.zeros(24, 29)[:, 3:16].copy_(x.detach()).requires_grad_()
    for mine, theirs in zip(results(wide, weight, a, b, **options), expected):
        torch.testing.assert_close(mine, theirs)
    cube = x.detach().view(2, 3, 4, 13).requires_grad_()
    y = lora_linear(cube, weight, a, b, **options)
    assert torch.equal(y.view(24, 6), expected[0]) and y.shape == (2, 3, 4, 6)
    first = lora_linear(x[:5], weight, a, b, **options)
    torch.testing.assert_close(first, expected[0][:5])


def test_dropout_statistics(backend: str) -> None:
    """Rate and independence of neighbours, rows and seeds, within five standard errors; the mean is kept."""
    t, k = (64, 256) if backend == "triton" else (256, 1024)
    n = t * k
    for p in (0.1, 0.5, 0.9):
        drops = [ops.lr_dropout(torch.ones(t, k), torch.tensor([s]), torch.tensor(p)) for s in (1, 2)]
        one, two = ((d == 0).double() for d in drops)
        error = (p * (1 - p) / n) ** 0.5
        assert abs(one.mean() - p) < 5 * error + 1e-5 and abs(drops[0].double().mean() - 1) < 6 * error / (1 - p) + 1e-4
        for other, mine in ((two, one), (one[:, 1:], one[:, :-1]), (one[1:], one[:-1]), (one[:, 8:], one[:, :-8])):
            assert abs(((other - p) * (mine - p)).mean()) < 6 * p * (1 - p) / n**0.5


def test_seeds(backend: str) -> None:
    tensors = layer()
    torch.manual_seed(5)
    first, second = results(*tensors, dropout_p=0.5), results(*tensors, dropout_p=0.5)
    assert not same(first, second), "two calls draw two masks"
    torch.manual_seed(5)
    assert same(results(*tensors, dropout_p=0.5), first) and same(results(*tensors, dropout_p=0.5), second)
    by_int, by_tensor = (results(*tensors, dropout_p=0.5, seed=s) for s in (-3, torch.tensor(-3)))
    assert same(by_int, by_tensor)
    assert not same(by_int, results(*tensors, dropout_p=0.5, seed=4))
    plain = results(*tensors)
    state = torch.get_rng_state()
    assert same(results(*tensors, dropout_p=0.5, training=False), plain) and same(results(*tensors, dropout_p=0.0), plain)
    assert torch.equal(torch.get_rng_state(), state), "no mask, no draw"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_mask(backend: str, reentrant: bool) -> None:
    x, weight, a, b = layer(40)

    def block(x: Tensor) -> Tensor:
        return lora_linear(torch.tanh(lora_linear(x, weight, a, b, dropout_p=0.4)), weight.T, b.T, a.T, dropout_p=0.2)

    found = []
    for call in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        y = call(x)
        for t in (x, a, b):
            t.grad = None
        y.sum().backward()
        found.append([y.detach(), *(t.grad.clone() for t in (x, a, b))])
    assert same(*found)


# ---- repeatability


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_repeat(backend: str, dtype: torch.dtype) -> None:
    """20 runs, and any number of threads in our kernels (torch's own GEMM may differ there: compared are the ops)."""
    t, k, n = (40, 70, 33) if backend == "triton" else (300, 257, 129)
    tensors = layer(t, k, n, 5, dtype, torch.float32)
    options = {"dropout_p": 0.3, "seed": 1}
    first = results(*tensors, **options)
    assert all(same(results(*tensors, **options), first) for _ in range(2 if backend == "triton" else 19))
    if backend != "cpp":
        return
    x, _, a, b = (t.detach() for t in tensors)
    seed, p, u, dy = torch.tensor([1]), torch.tensor([0.3]), values(t, 5, dtype=torch.float32, grad=False), values(t, n, dtype=dtype, grad=False)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            y = x.clone()
            ops.lr_add_(y, u, a, seed, p, [5])
            parts = ops.lr_bwd_dy(dy, u, b, torch.ones(n), dy, True)
            found.append([y, ops.lr_shrink(x, a, seed, p, [5]), ops.lr_bwd_x(x, u, seed, p, [5]), *parts])
    finally:
        torch.set_num_threads(threads)
    assert all(same(f, found[0]) for f in found[1:])


# ---- the work done


class Calls(TorchDispatchMode):
    """Counts ops by name; `mm`: shapes of all products, as (rows, inner, columns); `products`: whether lr_bwd_dy was asked for M_B and for dV."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.mm: list[tuple[int, ...]] = []
        self.products = (False, False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        self.count[name] += 1
        if name == "dense_add":
            x, w, _, transposed = args[:4]
            self.mm.append((*x.shape, w.shape[1 if transposed else 0]))
            self.count["lr_add_"] += 1
        if name in ("mm", "addmm"):
            one, two = args[-2:]
            self.mm.append((*one.shape, two.shape[1]))
        if name == "lr_bwd_dy" and args:
            self.products = args[1] is not None, args[2] is not None
        return func(*args, **(kwargs or {}))


def backward_calls(trained: str, **options: Any) -> Calls:
    x, weight, a, b = layer(t=11, k=13, n=17)
    named = {"x": x, "A": a, "B": b, **{n: v for n, v in options.items() if isinstance(v, Tensor)}}
    for name, t in named.items():
        t.requires_grad_(name in trained.split())
    y = lora_linear(x, weight, a, b, **options)
    with Calls() as calls:
        y.backward(torch.ones_like(y))
    assert {n for n, t in named.items() if t.grad is not None} == set(trained.split())
    return calls


def test_only_what_is_needed_is_computed(on_reference: None) -> None:
    dx = (11, 17, 13)
    calls = backward_calls("x A B")
    assert calls.mm == [dx] and calls.count["lr_bwd_dy"] == calls.count["lr_bwd_x"] == calls.count["lr_add_"] == 1
    assert calls.products == (True, True)
    calls = backward_calls("A B")
    assert calls.mm == [] and calls.count["lr_bwd_x"] == 1 and calls.count["lr_add_"] == 0
    calls = backward_calls("x B")
    assert calls.mm == [dx] and calls.count["lr_bwd_x"] == 0 and calls.count["lr_add_"] == 1
    calls = backward_calls("B")
    assert calls.products == (True, False) and calls.mm == [] and calls.count["lr_bwd_x"] == calls.count["lr_add_"] == 0
    calls = backward_calls("rank_gate", rank_gate=values(3, dtype=torch.float32))
    assert calls.products == (False, True) and calls.mm == [] and calls.count["lr_bwd_x"] == calls.count["lr_add_"] == 0
    calls = backward_calls("bias", bias=values(17, dtype=torch.float32))
    assert calls.products == (False, False) and calls.mm == [] and calls.count["lr_bwd_dy"] == 1 and calls.count["lr_bwd_x"] == 0


# ---- autograd's rules


def test_in_place_ops_are_seen_by_autograd(backend: str) -> None:
    u, a = values(4, 2, dtype=torch.float32, grad=False), values(2, 6, dtype=torch.float32, grad=False)
    calls = (
        lambda y: ops.lr_add_(y, u, a, None, None, [2]),
        lambda y: ops.lr_scale_add_(y, u, a, torch.ones(6), None),
        lambda y: ops.lr_merge_(y, u, a, None),
    )
    for call in calls:
        for strided in (False, True):
            x = torch.ones(4, 6, requires_grad=True)
            y = (x.t() * 1).t() if strided else x * 1
            z, before = y * y, y._version
            with torch.no_grad():
                call(y)
            assert y._version > before
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                z.sum().backward()


def test_inputs_stay_as_they_are(backend: str) -> None:
    tensors = [*layer(9, dtype=torch.bfloat16, adapters=torch.float32), values(6, dtype=torch.float32), values(8, seed=3, dtype=torch.float32)]
    before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    y = lora_linear(*tensors[:4], row_scale=tensors[4], col_scale=tensors[5], dropout_p=0.3)
    dy = torch.ones_like(y)
    y.backward(dy)
    assert same([t.detach() for t in tensors], before) and [t._version for t in tensors] == versions and (dy == 1).all()


def test_changed_parameters_between_the_passes_are_noticed(on_reference: None) -> None:
    x, weight, a, b = layer()
    y = lora_linear(x, weight, a, b)
    with torch.no_grad():
        a.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- shapes and modes


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (3, 0)])
@pytest.mark.parametrize("rank", [1, 3])
def test_leading_shapes(backend: str, lead: tuple[int, ...], rank: int) -> None:
    _, weight, a, b = layer(r=rank)
    scale, gate, x = values(6, dtype=torch.float32), values(*lead, dtype=torch.float32), values(*lead, 8, dtype=torch.float32)
    y = lora_linear(x, weight, a, b, row_scale=scale, token_gate=gate, dropout_p=0.2, seed=1)
    assert y.shape == (*lead, 6)
    y.sum().backward()
    keep = reference.dropout_mask(gate.numel(), 8, 1, reference.threshold_of(0.2))
    inputs = (x, a, b, scale, gate)
    true = reference.linear(x, weight, a, b, keep=keep, dropout_p=0.2, row_scale=scale, token_gate=gate)
    torch.testing.assert_close(y, true, rtol=1e-4, atol=1e-5)
    for t, d in zip(inputs, torch.autograd.grad(true.sum(), inputs)):
        torch.testing.assert_close(t.grad, d, rtol=1e-4, atol=1e-5)


def test_without_a_branch(backend: str) -> None:
    """IA3 and SSF: A and B absent."""
    x, weight, _, _ = layer()
    scale, bias, columns = values(6, dtype=torch.float32), values(6, seed=3, dtype=torch.float32), values(8, dtype=torch.float32)
    for scale_bias in (False, True):
        y = lora_linear(x, weight, None, None, bias=bias, row_scale=scale, scale_bias=scale_bias, col_scale=columns)
        true = reference.linear(x, weight, None, None, bias=bias, row_scale=scale, scale_bias=scale_bias, col_scale=columns)
        inputs = (x, scale, bias, columns)
        torch.testing.assert_close(y, true)
        for mine, theirs in zip(torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(true.square().sum(), inputs)):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(lora_linear(x, weight, None, None), dense(x, weight))


def test_a_group_equals_separate_calls(backend: str) -> None:
    """q, k, v of one x without dropout: the calls one by one; gradients of x add up."""
    x = values(9, 8, dtype=torch.float32)
    parts = [layer(n=n, r=r)[1:] for n, r in ((6, 3), (5, 1), (7, 4))]
    ys = lora_linear_group(x, [Output(w, None, (Segment(a, b, 0.5),)) for w, a, b in parts])
    alone = [lora_linear(x, w, a, b, scaling=0.5) for w, a, b in parts]
    for mine, theirs in zip(ys, alone, strict=True):
        torch.testing.assert_close(mine, theirs)
    inputs = [x, *(t for _, a, b in parts for t in (a, b))]
    grads = [torch.autograd.grad(sum(y.sin().sum() for y in out), inputs) for out in (ys, alone)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_several_adapters_on_one_output(backend: str) -> None:
    """Different ranks, scalings, dropout rates and dtypes, each with its own stream of the seed."""
    x, weight, a, b = layer(9)
    a2, b2 = values(2, 8, seed=7, dtype=torch.bfloat16), values(6, 2, seed=8, dtype=torch.bfloat16)
    (y,) = lora_linear_group(x, [Output(weight, None, (Segment(a, b, 2.0, 0.3), Segment(a2, b2, 0.5, 0.6)))], seed=4)
    masks = [reference.dropout_mask(9, 8, 4, reference.threshold_of(p), i) for i, p in enumerate((0.3, 0.6))]
    true = reference.linear(x, weight, a, b, scaling=2.0, keep=masks[0], dropout_p=0.3)
    true = true + reference.linear(x, torch.zeros_like(weight), a2.float(), b2.float(), scaling=0.5, keep=masks[1], dropout_p=0.6)
    torch.testing.assert_close(y, true, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(y.sum(), (x, a, b2)), torch.autograd.grad(true.sum(), (x, a, b2))):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-2 if mine.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


def test_autocast(backend: str) -> None:
    """x and weight in bf16, the adapters as they are: what plain bf16 tensors give, and gradients in the inputs' own dtypes."""
    x, weight, a, b = layer(9)
    options = {"dropout_p": 0.3, "seed": 1, "bias": values(6, dtype=torch.float32, grad=False)}
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, weight, a, b, **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert lora_linear(x, weight, a, b).dtype == torch.float32
    half = x.detach().bfloat16().requires_grad_()
    cast = {**options, "bias": options["bias"].bfloat16()}
    expected = results(half, weight.bfloat16(), a, b, **cast)
    dy = values(9, 6, seed=9, dtype=torch.bfloat16, grad=False)
    got = [y.detach(), *torch.autograd.grad(y, (x, a, b), dy)]
    assert [t.dtype for t in got] == [torch.bfloat16, *[torch.float32] * 3]
    assert same([got[0], got[1].bfloat16(), *got[2:]], expected)


def test_skinny_w(backend: str) -> None:
    """W A^T and the squared norms of W's rows, in fp32."""
    for n, k, dtype in ((5, 7, torch.float32), (65, 130, torch.bfloat16)):
        w, a = values(n, k, dtype=dtype, grad=False), values(3, k, seed=1, dtype=torch.float32, grad=False)
        for got, true in zip(ops.lr_skinny_w(w, a), reference.skinny_w(w.double(), a.double()), strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), true, rtol=2e-6, atol=2e-5)


def test_modes_without_gradients(backend: str) -> None:
    x, weight, a, b = layer()
    scale = values(6, dtype=torch.float32)
    expected = [lora_linear(x, weight, a, b).detach(), lora_linear(x, weight, a, b, row_scale=scale).detach()]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = [lora_linear(x, weight, a, b), lora_linear(x, weight, a, b, row_scale=scale)]
        assert same(y, expected) and not any(t.requires_grad for t in y) and y[0].is_inference() == (mode is torch.inference_mode)

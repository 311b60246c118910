"""A product whose tensors look and lie as they did is run without a second check: whatever is done to them in between must be seen."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import fusedadapt as fa
from fusedadapt import config
from fusedadapt.ops import looks
from fusedadapt.ops import quant as ops
from fusedadapt.quant import plain
from fusedadapt.quant.layer import _KNOWN
from fusedadapt.quant.tensor import CHECKED, QuantizedTensor

N, K = 24, 64


def new(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An element for each call that was checked from the start."""
    if looks.core() is None:
        pytest.skip("this torch has no functions to read with")
    found: list[None] = []
    first = plain._first

    def counted(*args: Any) -> Tensor | None:
        found.append(None)
        return first(*args)

    monkeypatch.setattr(plain, "_first", counted)
    return found


def expected(x: Tensor, q: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.fusedadapt.q_linear(x.reshape(-1, K).contiguous(), *q.parts, bias, q.format.spec, N)
    return y.view(*x.shape[:-1], N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_one_check_serves_all_numbers(dtype: torch.dtype, bias: torch.dtype | None, checks: list[None]) -> None:
    q = fa.quantize(new(N, K, seed=1), "nf4", double_quant=True)
    b = None if bias is None else new(N, seed=2, dtype=bias)
    for seed in range(3, 7):
        x = new(2, 3, K, seed=seed, dtype=dtype)
        assert torch.equal(fa.quantized_linear(x, q, b), expected(x, q, b))
    assert len(checks) == (4 if bias == torch.float64 else 1)  # a sum in fp32 has no use for it: converted, and not kept


def test_what_lay_in_a_tensors_memory_before_it_plays_no_part(checks: list[None]) -> None:
    q = fa.quantize(new(N, K, seed=1), "int4")
    for byte in (0, 255, 85, 0, 170):
        looks.core().Shim.soil(byte)
        fa.quantized_linear(new(2, K, seed=2), q)
    assert len(checks) == 1


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "another shape": lambda x: x[:1],
    "another number of dimensions": lambda x: x.view(2, 1, K),
    "another dtype": lambda x: x.to(torch.bfloat16),
    "fp64": lambda x: x.double(),
    "columns apart": lambda x: torch.stack([x, x], -1).flatten(1)[:, ::2],
    "columns first": lambda x: x.t().contiguous().t(),
    "the negative of what is there": lambda x: torch._neg_view(-x),
    "a lazy copy": lambda x: torch._lazy_clone(x),
    "zeros without memory": lambda x: torch._efficientzerotensor(*x.shape),
    "a subclass": lambda x: x.as_subclass(type("Own", (Tensor,), {})),
    "made in inference mode": lambda x: inference(x),
    "an offset into larger memory": lambda x: torch.cat([x, x])[1:3],
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "six dimensions": lambda x: x.view(1, 1, 1, 1, 2, K),
}


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


@pytest.mark.parametrize("change", CHANGES)
def test_another_x(change: str, checks: list[None]) -> None:
    q = fa.quantize(new(N, K, seed=1), "int4")
    x = new(2, K, seed=2)
    fa.quantized_linear(x, q)
    for t in (CHANGES[change](x), x):
        y = fa.quantized_linear(t, q)
        assert torch.allclose(y.double(), t.double() @ q.dequantize(torch.float64).t(), rtol=1e-2, atol=1e-2) and y.shape == (*t.shape[:-1], N)
        assert y.dtype == t.dtype


def test_nested_and_sparse_x_are_refused_as_before(checks: list[None]) -> None:
    q, x = fa.quantize(new(N, K, seed=1), "int4"), new(2, K, seed=2)
    fa.quantized_linear(x, q)
    for t in (torch.nested.nested_tensor([x, x]), torch.nested.nested_tensor([x, x], layout=torch.jagged), x.to_sparse()):
        with pytest.raises(ValueError, match="dense|nested|sparse"):
            fa.quantized_linear(t, q)
    for wrong in (x.tolist(), None, x.numpy()):
        with pytest.raises((ValueError, TypeError)):
            fa.quantized_linear(wrong, q)  # type: ignore[arg-type]


@pytest.mark.parametrize("part", ["qdata", "scale", "zero"])
def test_a_weight_that_moves_or_changes(part: str, checks: list[None]) -> None:
    q, other = (fa.quantize(new(N, K, seed=seed), "hqq4") for seed in (1, 2))
    x = new(2, K, seed=3)
    fa.quantized_linear(x, q)
    t, given = getattr(q, part), getattr(other, part)
    t.copy_(given)  # in place: the same memory
    assert torch.equal(fa.quantized_linear(x, q), expected(x, q)) and len(checks) == 1
    t.data = given.clone() + (part == "scale")
    assert torch.equal(fa.quantized_linear(x, q), expected(x, q)) and len(checks) == 2
    t.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="memory"):
        fa.quantized_linear(x, q)


def test_another_bias(checks: list[None]) -> None:
    q, x, b = fa.quantize(new(N, K, seed=1), "int4"), new(2, K, seed=2), new(N, seed=3)
    for bias in (b, None, b, b.half(), b + 1, b.clone(), torch.stack([b, b], 1)[:, 0], b.clone().requires_grad_(), b):
        y = fa.quantized_linear(x, q, bias)
        assert torch.allclose(y, expected(x, q, None if bias is None else bias.contiguous().detach()))
        assert y.requires_grad == (bias is not None and bias.requires_grad)
    with pytest.raises(ValueError, match="bias"):
        fa.quantized_linear(x, q, b[:-1])
    with pytest.raises(ValueError, match="bias"):
        fa.quantized_linear(x, q, b.long())


def test_who_asks_for_a_backend_gets_it(checks: list[None]) -> None:
    q, x = fa.quantize(new(N, K, seed=1), "int4"), new(2, K, seed=2)
    want = fa.quantized_linear(x, q)
    with config.backend("reference"):
        assert plain.product(x, q, None) is None
        rows = fa.explain(lambda: fa.quantized_linear(x, q))
    assert rows[0][1] == "reference"
    assert fa.explain(lambda: fa.quantized_linear(x, q))[0][1] == "cpp"
    with config.strict(), config.backend("cpp"):
        assert torch.equal(fa.quantized_linear(x, q), want)
    assert torch.equal(fa.quantized_linear(x, q), want)


def test_a_backend_that_the_environment_asks_for_later(checks: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = fa.quantize(new(N, K, seed=1), "int4"), new(2, K, seed=2)
    fa.quantized_linear(x, q)
    before = len(checks)
    monkeypatch.setenv("FUSEDADAPT_BACKEND", "reference")
    fa.quantized_linear(x, q)
    assert len(checks) > before, "it runs on what it was not asked for"
    monkeypatch.setenv("FUSEDADAPT_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FUSEDADAPT_BACKEND: expected one of"):
        fa.quantized_linear(x, q)


def test_copies_check_for_themselves(checks: list[None]) -> None:
    q, x = fa.quantize(new(N, K, seed=1), "int4"), new(2, K, seed=2)
    want = fa.quantized_linear(x, q)
    assert CHECKED in q.__dict__
    for other in (copy.copy(q), copy.deepcopy(q), pickle.loads(pickle.dumps(q)), q.to("cpu"), q._map(torch.clone)):
        assert CHECKED not in other.__dict__
        assert torch.equal(fa.quantized_linear(x, other), want)
        if other.qdata.data_ptr() != q.qdata.data_ptr():
            other.qdata.view(torch.uint8).zero_()
            assert not torch.equal(fa.quantized_linear(x, other), want) and torch.equal(fa.quantized_linear(x, q), want)


def test_other_instruction_sets_and_thread_counts(checks: list[None]) -> None:
    core = looks.core()
    q, x, before = fa.quantize(new(N, K, seed=1), "int4"), new(2, K, seed=2), core.isa()
    fa.quantized_linear(x, q)
    threads = torch.get_num_threads()
    try:
        core.use_isa("base")
        torch.set_num_threads(1)
        assert torch.equal(fa.quantized_linear(x, q), expected(x, q))
    finally:
        core.use_isa(before)
        torch.set_num_threads(threads)
    assert len(checks) == 1


def test_products_too_large_for_the_kernel_are_left_to_the_library(checks: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_small", lambda t, *_: t <= 48)
    q = fa.quantize(new(N, K, seed=1), "int4")
    for tokens in (1, 200, 1, 200):
        x = new(tokens, K, seed=2)
        assert torch.allclose(fa.quantized_linear(x, q), x @ q.dequantize(torch.float32).t(), rtol=1e-4, atol=1e-4)
    assert len(checks) == 3, "one for each x that is not the one before"


# ---- layers ----


def layer(seed: int = 1, fmt: str = "nf4", **options: Any) -> fa.QuantizedLinear:
    linear = torch.nn.Linear(K, N)
    with torch.no_grad():
        linear.weight.copy_(new(N, K, seed=seed))
        linear.bias.copy_(new(N, seed=seed + 10))
    return fa.QuantizedLinear.from_linear(linear, fmt, **options).requires_grad_(False)


def truth(made: fa.QuantizedLinear, x: Tensor) -> Tensor:
    return x.double() @ made.dequantize(torch.float64).t() + made.bias.double()


def move(made: fa.QuantizedLinear) -> None:
    made.weight.data = made.weight.data.clone().roll(1)


def replace_parameter(made: fa.QuantizedLinear) -> None:
    made.weight = torch.nn.Parameter(made.weight.detach().roll(3), requires_grad=False)


def replace_buffer(made: fa.QuantizedLinear) -> None:
    made.weight_scale = made.weight_scale * 2


def write(made: fa.QuantizedLinear) -> None:
    made.write(fa.quantize(new(N, K, seed=5), made.format))


def load(made: fa.QuantizedLinear) -> None:
    made.load_state_dict(layer(seed=6).state_dict())


def assign(made: fa.QuantizedLinear) -> None:
    made.load_state_dict(layer(seed=7).state_dict(), assign=True)


def swap(made: fa.QuantizedLinear) -> None:
    torch.utils.swap_tensors(made.weight, torch.nn.Parameter(made.weight.detach().roll(5), requires_grad=False))


def to_and_back(made: fa.QuantizedLinear) -> None:
    made.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("change", [move, replace_parameter, replace_buffer, write, load, assign, swap, to_and_back], ids=lambda f: f.__name__)
def test_a_layer_that_changes(change: Callable[[fa.QuantizedLinear], None], checks: list[None]) -> None:
    made, x = layer(), new(2, K, seed=2)
    assert torch.allclose(made(x).double(), truth(made, x), rtol=1e-4, atol=1e-4)
    assert made.quantized is made.quantized
    change(made)
    for _ in range(2):
        assert torch.allclose(made(x).double(), truth(made, x), rtol=1e-4, atol=1e-4)
    assert made.quantized.qdata.data_ptr() == made.weight.data_ptr()


def test_a_layer_that_is_called_again_checks_nothing(checks: list[None]) -> None:
    made = layer(double_quant=True)
    for seed in range(4):
        made(new(2, K, seed=seed))
    assert len(checks) == 1


def test_copies_of_a_layer_hold_no_second_weight(checks: list[None]) -> None:
    made, x = layer(), new(2, K, seed=2)
    want = made(x)
    plain_size = len(pickle.dumps(layer()))
    assert len(pickle.dumps(made)) == plain_size
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x), want) and other.quantized is not made.quantized
        other.weight.zero_()
        assert not torch.equal(other(x), want) and torch.equal(made(x), want)
    shallow = copy.copy(made)
    assert torch.equal(shallow(x), want)


@pytest.mark.parametrize("change", [lambda made: made.to("meta"), lambda made: made.float(), replace_parameter], ids=["to", "float", "replaced"])
def test_a_layer_holds_no_weight_that_it_has_left(change: Callable[[fa.QuantizedLinear], Any]) -> None:
    made = layer()
    made(new(2, K, seed=2))
    first = StorageWeakRef(made.weight.untyped_storage())
    assert not first.expired()
    change(made)
    made.weight = torch.nn.Parameter(made.weight.detach().clone(), requires_grad=False)
    _ = made.quantized
    gc.collect()
    assert first.expired()


def test_what_is_offloaded_is_not_held() -> None:
    """accelerate brings a layer's weight for each call and takes it back: a model larger than the memory would have stayed there."""
    accelerate = pytest.importorskip("accelerate")
    made, x = layer(), new(2, K, seed=2)
    want = made(x)
    accelerate.cpu_offload(made, execution_device=torch.device("cpu"), state_dict={name: t.clone() for name, t in made.state_dict().items()})
    for _ in range(2):
        assert torch.equal(made(x), want) and made.weight.is_meta
    assert _KNOWN not in made.__dict__


def test_what_inference_mode_found_trains_afterwards(checks: list[None]) -> None:
    made, x = layer(), new(2, K, seed=2)
    with torch.inference_mode():
        want = made(x)
    x.requires_grad_()
    y = made(x)
    assert torch.allclose(y, want, atol=1e-5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(dx.double(), torch.ones(2, N, dtype=torch.float64) @ made.dequantize(torch.float64), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_another_weight_dtype_is_noticed(checks: list[None]) -> None:
    made = layer()
    assert made.quantized.dtype == torch.float32
    other = fa.QuantizedLinear.from_linear(torch.nn.Linear(K, N).bfloat16(), "nf4").float()
    made.load_state_dict(other.state_dict())
    assert made.quantized.dtype == torch.bfloat16


def test_the_op_is_what_it_was(checks: list[None]) -> None:
    """Without a way to look at tensors (another torch), every call is checked and the results are the same."""
    q, x = fa.quantize(new(N, K, seed=1), "int4"), new(2, K, seed=2)
    want = fa.quantized_linear(x, q)
    looks.core.cache_clear()
    module = ops._module("cpp")
    original, looks.core = looks.core, lambda: None  # type: ignore[assignment]
    try:
        fresh = q._map(torch.clone)
        assert torch.equal(fa.quantized_linear(x, fresh), want) and torch.equal(fa.quantized_linear(x, fresh), want)
        assert CHECKED not in fresh.__dict__ and module is not None
        made = layer()
        assert torch.equal(made(x), made(x)) and made.quantized is not made.quantized
    finally:
        looks.core = original

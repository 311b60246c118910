"""The low-rank ops under torch.library's checks, and `lora_linear` under torch.compile: whole graphs, equal results, no recompiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fusedadapt as fa
from fusedadapt import dispatch
from fusedadapt.lowrank import Output, Segment, functional, lora_linear, lora_linear_group

ops = torch.ops.fusedadapt
T, K, N, R = 6, 9, 7, 3


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with fa.backend("reference"):
        yield
    torch._dynamo.reset()


def new(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, trained: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(seed + 100 * sum(shape))
    return torch.randn(shape, generator=g).to(dtype).requires_grad_(trained)


def op_calls(dtype: torch.dtype) -> list[tuple[str, tuple[Any, ...]]]:
    """Every op, with and without its optional parts, on plain and strided tensors."""
    x, y, u, a, b = new(T, K, dtype=dtype), new(T, N, dtype=dtype), new(T, R), new(R, K), new(N, R)
    seed, p, none = torch.tensor([3]), torch.tensor([0.5]).double(), (None, None)
    strided = new(T, 2 * K, dtype=dtype)[:, ::2]
    w = new(N, K, dtype=dtype)
    return [
        ("lr_shrink", (x, a, seed, p, [R])), ("lr_shrink", (strided, a, *none, [R])), ("lr_shrink", (x, a, seed, p.repeat(2), [1, R - 1])),
        ("lr_shrink", (x[:0], a, seed, p, [R])), ("lr_bwd_x", (x, u, seed, p, [R])), ("lr_bwd_x", (strided, u, *none, [R])),
        ("lr_add_", (x, u, a, seed, p, [R])), ("lr_add_", (strided, u, a, *none, [R])), ("lr_scale_add_", (y, u, b.T, new(N), new(N))),
        ("lr_scale_add_", (y, None, None, new(N), None)), ("lr_bwd_dy", (y, u, b, new(N), new(T, N, dtype=dtype), True)),
        ("lr_bwd_dy", (y, u, None, None, None, False)), ("lr_bwd_dy", (y, None, b, None, None, True)),
        ("lr_bwd_dy", (y[:0], u[:0], b, None, None, True)),
        ("lr_dropout", (x, seed, p)), ("lr_skinny_w", (w, a)), ("lr_merge_", (w, b, a, new(N))), ("lr_merge_", (w, b, a, None)),
        ("dense_widened", (x, w, new(N, dtype=dtype), False)), ("dense_widened", (y, w, None, True)),
        ("dense_add", (x, w, new(N, dtype=dtype), False, u, b.T, *none, [R])),
        ("dense_add", (y, w, None, True, u, a, seed, p.repeat(2), [1, R - 1])),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", range(22))
def test_opcheck(number: int, dtype: torch.dtype) -> None:
    name, given = op_calls(dtype)[number]
    torch.library.opcheck(getattr(ops, name).default, given, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_schemas(backend: str, quick_calls: None) -> None:
    """No other backend returns parts that share memory, or writes to what it may only read."""
    if absent := dispatch.available_backends("cpu")[backend]:
        pytest.skip(absent)
    with fa.backend(backend):
        for name, given in op_calls(torch.float32):
            torch.library.opcheck(getattr(ops, name).default, given, test_utils=("test_schema",))


def test_every_op_is_checked() -> None:
    names = [name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()]
    defined = {name.split("::")[1] for name in names if name.startswith(("fusedadapt::lr_", "fusedadapt::dense"))}
    assert defined == {name for name, _ in op_calls(torch.float32)}


def everything(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trained tensors by name and the other options."""
    trained = {
        "x": new(T, K, dtype=dtype), "lora_A": new(R, K), "lora_B": new(N, 2), "bias": new(N, dtype=dtype), "rank_gate": new(R), "token_gate": new(T),
        "core": new(R, 2), "row_scale": new(N, seed=2), "col_scale": new(K, seed=2),
    }  # fmt: skip
    return trained, {"weight": new(N, K, dtype=dtype), "activation": "gelu", "scale_bias": True, "scaling": 0.7, "dropout_p": 0.4, "seed": 5}


def simple(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    trained = {"x": new(T, K, dtype=dtype), "lora_A": new(R, K), "lora_B": new(N, R)}
    return trained, {"weight": new(N, K, dtype=dtype), "scaling": 2.0, "dropout_p": 0.4}


def run(call: Callable[..., Tensor], tensors: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    leaves = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    torch.manual_seed(1)
    y = call(**leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))]


def assert_close(mine: list[Tensor], theirs: list[Tensor], eps: float = 1.0) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        tolerance = 4 * eps * torch.finfo(one.dtype).eps
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [simple, everything])
def test_one_graph_forward_and_backward(build: Callable[..., Any], dtype: torch.dtype) -> None:
    """fullgraph=True through aot_eager: the eager results, the mask drawn inside the graph included."""
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, *build(dtype)), run(lora_linear, *build(dtype)))


@pytest.mark.slow
def test_inductor() -> None:
    compiled = torch.compile(lora_linear, fullgraph=True, backend="inductor")
    tensors, options = everything(torch.float32)
    assert_close(run(compiled, tensors, options), run(lora_linear, tensors, options), 16)


def test_an_int_seed_is_filled_in_where_x_is() -> None:
    """Not copied there: on a GPU the host would wait, and a graph could not be captured."""
    met: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            met.append(func.name())
            return func(*args, **(kwargs or {}))

    for seed in (0, -1, -(2**63), 2**63 - 1, np.int64(5)):
        met.clear()
        with Watch():
            found = functional._seed(seed, new(T, K))
        assert found.dtype == torch.int64 and found.tolist() == [int(seed)] and "aten::full" in met and "aten::lift_fresh" not in met


def test_a_group_in_one_graph() -> None:
    weights, factors = [new(n, K, seed=n) for n in (N, N + 1)], [new(R, K, seed=s) for s in (1, 2)]

    def call(x: Tensor, b0: Tensor, b1: Tensor) -> Tensor:
        segments = [(Segment(a, b, 0.5, 0.3),) for a, b in zip(factors, (b0, b1))]
        return torch.cat(lora_linear_group(x, [Output(w, None, s) for w, s in zip(weights, segments)]), 1)

    tensors = {"x": new(T, K), "b0": new(N, R), "b1": new(N + 1, R)}
    assert_close(run(torch.compile(call, fullgraph=True, backend="aot_eager"), tensors, {}), run(call, tensors, {}))


def count(backend: str = "aot_eager") -> tuple[CompileCounterWithBackend, Callable[..., Tensor]]:
    counter = CompileCounterWithBackend(backend)
    return counter, torch.compile(lora_linear, fullgraph=True, backend=counter)


@pytest.mark.parametrize("trained", [False, True])
def test_another_scaling_or_probability_in_a_tensor(trained: bool) -> None:
    """Zero recompiles, and the values are read anew."""
    counter, compiled = count()
    tensors, options = simple(torch.float32)
    for scaling, p in ((2.0, 0.4), (0.5, 0.1), (1.0, 0.9), (1.0, 0.0)):
        now = {**options, "scaling": torch.tensor(scaling, requires_grad=trained), "dropout_p": torch.tensor(p)}
        assert_close(run(compiled, tensors, now), run(lora_linear, tensors, now))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["scaling", "dropout_p"])
def test_another_scaling_or_probability_as_a_number(name: str) -> None:
    """Dynamo compiles once for the first value and once for all others."""
    counter, compiled = count()
    tensors, options = simple(torch.float32)
    for value in (0.4, 0.1, 0.7, 0.25, 0.9):
        now = {**options, name: value}
        assert_close(run(compiled, tensors, now), run(lora_linear, tensors, now))
    assert counter.frame_count <= 2


def test_another_number_of_tokens() -> None:
    counter, compiled = count()
    tensors, options = simple(torch.float32)
    for tokens in (6, 11, 5, 64, 33, 2):
        now = tensors | {"x": new(tokens, K)}
        assert_close(run(compiled, now, options), run(lora_linear, now, options))
    assert counter.frame_count <= 2


def test_bad_values_are_refused_in_a_graph() -> None:
    """The value of a tensor p is not known to the graph: the op that reads it refuses."""
    _, compiled = count()
    tensors, options = simple(torch.float32)
    with pytest.raises(ValueError, match=r"expected p in \[0, 1\); got \[1.5\]"):
        run(compiled, tensors, {**options, "dropout_p": torch.tensor(1.5)})


def test_optional_draws_do_not_share_graphs() -> None:
    """Training and evaluation are two graphs; each keeps its own dropout."""
    counter, compiled = count()
    tensors, options = simple(torch.float32)
    for training in (True, False, True, False):
        now = {**options, "training": training}
        assert_close(run(compiled, tensors, now), run(lora_linear, tensors, now))
    assert counter.frame_count == 2

"""Fake quantization under autograd, torch.library's checks and torch.compile, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fake_quant_cases as cases
import numpy as np
import pytest
import torch
from fake_quant_cases import BACKENDS, FOUR, grads, new
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fusedadapt as fa
from fusedadapt.quant import fake_quantize
from fusedadapt.testing.saved import SavedBytes


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with fa.backend(request.param):
        yield request.param


def test_what_is_kept_for_backward(backend: str) -> None:
    """x itself and the small tensors; nothing of x where every gradient passes."""
    x, scale = new(64, 64).requires_grad_(), torch.tensor([0.1], requires_grad=True)
    for ste, s in (("clamp", scale), ("round", scale), ("identity", scale)):
        with SavedBytes([x]) as saved:
            fake_quantize(x, s, torch.tensor(2), ste=ste, **FOUR)
        assert saved.total <= 16
    with SavedBytes() as saved:
        fake_quantize(x, scale.detach(), ste="identity", **FOUR)
    assert saved.total <= 16


def test_only_what_is_needed(backend: str) -> None:
    x, scale = new(5, 5), torch.tensor([0.1], requires_grad=True)
    (d_scale,) = grads(fake_quantize(x, scale, **FOUR), [scale], x)
    a = x.clone().requires_grad_()
    assert torch.equal(grads(fake_quantize(a, scale, **FOUR), [a, scale], x)[1], d_scale)


def test_gradients_have_the_dtypes_and_shapes_of_their_tensors(backend: str) -> None:
    x = new(4, 8, dtype=torch.bfloat16).requires_grad_()
    scale = torch.full((4, 1), 0.25, dtype=torch.bfloat16, requires_grad=True)
    zero, offset = torch.zeros((), requires_grad=True), torch.zeros(1, 1, dtype=torch.float16, requires_grad=True)
    found = grads(fake_quantize(x, scale, zero, offset=offset, axis=0, **FOUR), [x, scale, zero, offset], torch.ones_like(x))
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in (x, scale, zero, offset)]


@pytest.mark.parametrize("number", range(0, cases.count(), 5))
def test_opcheck(number: int) -> None:
    given = cases.case(number, torch.float32)
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Listen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "fusedadapt":
                calls.append((func, torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, args)))
            return func(*args, **(kwargs or {}))

    with Listen():
        cases.run(given, "reference")
    assert len(calls) == 2
    for func, args in calls:
        torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_compiled_once_for_every_width() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return fake_quantize(x, scale, quant_min=low, quant_max=high, axis=0, grad_scale="lsq")

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for bits in (8, 4, 3, 2):
        low, high = torch.tensor(-(1 << (bits - 1))), torch.tensor((1 << (bits - 1)) - 1)
        found = []
        for call in (compiled, step):
            x, scale = new(6, 9).requires_grad_(), torch.full((6,), 0.2, requires_grad=True)
            y = call(x, scale, low, high)
            found.append([y.detach(), *grads(y, [x, scale], torch.ones_like(x))])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "change, match",
    [
        ({"x": torch.ones(2, dtype=torch.int32)}, "float32, bfloat16"), ({"ste": "soft"}, "ste among"), ({"quant_max": -8}, "quant_min < quant_max"),
        ({"quant_max": 1 << 23}, "2\\^22"), ({"scale": torch.ones(2)}, "1 elements"), ({"scale": torch.ones(3), "axis": 0}, "scale: 4 elements"),
        ({"axis": 2}, "axis within"), ({"axis": 0, "group_size": 4}, "not both"), ({"group_size": 0}, "group_size of at least 1"),
        ({"zero_point": torch.ones(3)}, "zero_point"), ({"grad_scale": "lqs"}, "grad_scale"), ({"quant_max": 0, "grad_scale": "lsq"}, "of at least"),
        ({"x": torch.tensor(1.0), "axis": 0}, "scalar"), ({"offset": torch.ones(3)}, "offset"),
        ({"x": torch.eye(4).to_sparse()}, "a dense tensor"), ({"ste": ["clamp"]}, "ste among"), ({"scale": [0.1]}, "scale: a number or a tensor"),
        ({"scale": None}, "scale: a number"), ({"axis": 0.0}, "axis: a whole number"), ({"group_size": 2.0}, "group_size: a whole number"),
        ({"quant_min": -8.0}, "quant_min: a whole number"), ({"quant_max": "7"}, "quant_max: a whole number"),
        ({"zero_point": "a"}, "zero_point: a number"), ({"grad_scale": torch.ones(3)}, "grad_scale: 1 or 1 elements"),
        ({"grad_scale": [1.0]}, "grad_scale: a number"), ({"scale_min": -1.0}, "scale_min"), ({"scale_min": float("nan")}, "scale_min"),
        ({"scale_min": "a"}, "scale_min"), ({"quant_min": True}, "quant_min: a whole number"), ({"axis": np.bool_(True)}, "axis: a whole number"),
        ({"axis": torch.tensor(0)}, "axis: a whole number"), ({"quant_max": np.float32(7)}, "quant_max: a whole number"),
        ({"scale": torch.ones(1).to_sparse()}, "scale: a dense tensor of real numbers; got torch.sparse_coo"),
        ({"offset": torch.ones(1).to_sparse()}, "offset: a dense tensor"), ({"zero_point": torch.ones(1).cfloat()}, "zero_point: a dense"),
        ({"quant_max": torch.ones(1).to_sparse()}, "quant_max: a dense"), ({"grad_scale": torch.ones(1).to_sparse()}, "grad_scale: a dense"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fake_quantize(**{"x": torch.ones(4, 4), "scale": 0.1, **FOUR, **change})


def test_whole_numbers_of_numpy_are_whole_numbers(backend: str) -> None:
    x, whole = new(4, 6), np.int64
    for cut, count in (({"axis": 1}, 6), ({"group_size": 3}, 8)):
        scale = torch.rand(count) + 0.1
        mine = fake_quantize(x, scale, quant_min=whole(-8), quant_max=np.int8(7), **{name: whole(n) for name, n in cut.items()})
        assert torch.equal(mine, fake_quantize(x, scale, **cut, **FOUR))


def test_the_op_refuses_what_does_not_fit() -> None:
    x, s = torch.ones(4, 4), torch.ones(4)
    rest = (None, None, None, -8, 7, 4, 4, False)
    for bad, match in (
        ((x, torch.ones(3), *rest), "scales"), ((x, s.double(), *rest), "scale in"), ((x, s, None, None, torch.ones(2), *rest[3:]), "bounds"),
        ((x, s, *rest[:3], -8, 7, 3, 3, False), "whole lines"), ((x.int(), s, *rest), "x in"), ((x, torch.ones(8)[::2], *rest), "contiguous"),
        ((x, s, None, None, torch.ones(2, 4).half(), *rest[3:]), "bounds in"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            torch.ops.fusedadapt.q_fake(*bad)
    for dy, ste, match in ((x.half(), "clamp", "dy like x"), (x, "none", "ste among")):
        with pytest.raises(ValueError, match=match):
            torch.ops.fusedadapt.q_fake_backward(dy, x, s, *rest, ste, True)


@pytest.mark.parametrize("lost", range(3), ids=["x", "scale", "zero"])
def test_tensors_without_memory_are_refused(lost: int) -> None:
    """What FSDP has given back; a zero point without an address is none to the kernel."""
    tensors = new(4, 8), torch.tensor([0.1]), torch.tensor([2.0])
    tensors[lost].untyped_storage().resize_(0)
    with fa.backend("cpp"), pytest.raises(ValueError, match="expected tensors with memory; got"):
        fake_quantize(*tensors, **FOUR)

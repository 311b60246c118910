"""`quantize_model_` and the from_linear's: whose memory is shared, what computes more than it says, hooks, scales that overflow; hqq4's scales."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fusedadapt as fa
from fusedadapt.quant import quantize_model_
from fusedadapt.quant.model import _safe

MASK = torch.ones(8, 8, dtype=torch.bool)
FROM_LINEAR: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "QuantizedLinear": fa.QuantizedLinear.from_linear,
    "LoRALinear": fa.LoRALinear.from_linear,
    "MaskedLinear": lambda linear: fa.MaskedLinear.from_linear(linear, MASK),
}


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.children()]


def replaced() -> nn.Linear:
    linear, own = nn.Linear(8, 8), nn.Linear(8, 8)
    linear.forward = lambda x: 2 * own(x)  # type: ignore[method-assign]
    return linear


def hooked() -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear._hf_hook = object()  # type: ignore[assignment]
    return linear


def with_buffer() -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear.register_buffer("mask", torch.ones(8, 8))
    return linear


def without_weight() -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear.weight = None  # type: ignore[assignment]
    return linear


@pytest.mark.parametrize("make", FROM_LINEAR)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_layers_whose_weight_does_not_say_what_they_compute_are_refused(make: str) -> None:
    for given, got in (
        (nn.utils.weight_norm(nn.Linear(8, 8)), "weight of a Linear, which follows other parameters; remove weight_norm"),
        (prune.random_unstructured(nn.Linear(8, 8), "weight", amount=0.5), "weight of a Linear, which follows"),
        (prune.random_unstructured(nn.Linear(8, 8), "bias", amount=0.5), "bias of a Linear, which follows"),
        (parametrizations.orthogonal(nn.Linear(8, 8)), "weight of a ParametrizedLinear, which follows"),
        (replaced(), "one whose forward has been replaced"),
        (hooked(), "one whose forward has been replaced"),
        (with_buffer(), "one that holds mask too"),
        (without_weight(), "a weight that is None"),
    ):
        with pytest.raises(TypeError, match=f"from_linear: expected a torch.nn.Linear .*got {got}"):
            FROM_LINEAR[make](given)


@pytest.mark.parametrize("make", FROM_LINEAR)
def test_a_layers_own_forward_and_a_subclass_without_one_are_plain(make: str) -> None:
    class Named(nn.Linear):
        pass

    given = nn.Linear(8, 8)
    given.forward = given.forward  # type: ignore[method-assign] # as accelerate leaves it when it takes its hook away
    assert FROM_LINEAR[make](given) is not None and FROM_LINEAR[make](Named(8, 8)) is not None
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].forward = model[0].forward
    quantize_model_(model, "int8")
    assert kinds(model) == [fa.QuantizedLinear]


@pytest.mark.parametrize(
    ("register", "call"),
    [
        ("register_forward_hook", {}), ("register_forward_hook", {"with_kwargs": True, "always_call": True}), ("register_forward_pre_hook", {}),
        ("register_forward_pre_hook", {"with_kwargs": True}), ("register_full_backward_hook", {}), ("register_full_backward_pre_hook", {}),
    ],
)  # fmt: skip
def test_the_handle_of_a_hook_removes_it_from_the_new_layer(register: str, call: dict[str, Any]) -> None:
    model, seen = nn.Sequential(nn.Linear(8, 8)), []
    handle = getattr(model[0], register)(lambda *args: seen.append(type(args[0])), **call)
    quantize_model_(model, "int8")
    x = torch.ones(2, 8, requires_grad=True)
    model(x).sum().backward()
    assert seen == [fa.QuantizedLinear]
    handle.remove()
    model(x).sum().backward()
    assert seen == [fa.QuantizedLinear]


@pytest.mark.parametrize(
    ("value", "format", "options", "fix"),
    [
        (1e9, "int4", {"scale_dtype": torch.float16}, "use scale_dtype=torch.float32 or another format"),
        (3.3e38, "int4", {}, "use another format, or skip the layer"),
        (3.3e38, "int4", {"symmetric": True}, "use another format"),
        (3.4e38, "mxfp4", {"scale_rule": "ceil"}, "use another format"),
        (3.3e38, "hqq4", {}, "use another format"),
    ],
)  # fmt: skip
def test_a_scale_that_overflows_stops_before_anything_is_replaced(value: float, format: str, options: dict[str, Any], fix: str) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(64, 8))
    model[2].weight.data[0, :2] = torch.tensor([value, -value])
    with pytest.raises(ValueError, match=f"2 comes back with NaN: a scale overflows; {re.escape(fix)}"):
        quantize_model_(model, format, **options)
    assert kinds(model) == [nn.Linear] * 3
    quantize_model_(model, "nf4")


def test_large_weights_that_fit_are_quantized() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    model[0].weight.data.mul_(5e37)
    assert float(model[0].weight.detach().abs().max()) < _safe(fa.quant.format_of("int4"))
    quantize_model_(model, "int4")
    other = nn.Sequential(nn.Linear(64, 8))
    other[0].weight.data[0, 0] = 3.3e38  # beyond what is safe for every rule, within this one
    assert quantize_model_(other, "nf4").layers


def test_a_weight_that_is_a_view_of_another_parameter_is_tied() -> None:
    table = nn.Parameter(torch.randn(192, 64))
    model = nn.ModuleDict({name: nn.Linear(64, 128, bias=False) for name in ("front", "back", "apart", "own")})
    model["emb"] = nn.Embedding(192, 64)
    model["emb"].weight = table
    model["front"].weight, model["back"].weight = nn.Parameter(table.data[:128]), nn.Parameter(table.data[64:])
    both = torch.randn(256, 64)
    model["own"].weight, model["apart"].weight = nn.Parameter(both[:128]), nn.Parameter(both[128:])  # one storage, other bytes
    report = quantize_model_(model, "nf4")
    assert {layer.name for layer in report.layers} == {"apart", "own"}
    assert report.left.keys() == {"front", "back"} and all(why.startswith("its weight is tied to ") for why in report.left.values())


def test_order_and_bias_that_are_no_tensors_are_refused() -> None:
    q = fa.quantize(torch.randn(4, 32), "int4")
    for name in ("bias", "order"):
        with pytest.raises(TypeError, match=f"QuantizedLinear: expected {name}: a tensor or None; got list"):
            fa.QuantizedLinear(q, **{name: [0, 1]})  # type: ignore[arg-type]


def rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-5, 0.01, 1.0])
def test_hqq_codes_are_those_for_the_scale_as_it_is_stored(dtype: torch.dtype, size: float) -> None:
    w = 1 + size * torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    plain, narrow = fa.quantize(w, "hqq4"), fa.quantize(w, "hqq4", scale_dtype=dtype)
    assert narrow.scale.dtype == dtype and rms(narrow.dequantize() - w) < 1.1 * rms(plain.dequantize() - w)
    assert torch.equal(narrow.scale, plain.scale.to(dtype))


def test_columns_of_one_matrix_side_by_side_are_not_tied() -> None:
    big = torch.randn(64, 128)
    model = nn.ModuleDict({name: nn.Linear(64, 64, bias=False) for name in "abc"})
    for name, part in (("a", big[:, :64]), ("b", big[:, 64:]), ("c", torch.randn(64, 64))):
        model[name].weight = nn.Parameter(part)
    assert len(fa.quantize_model_(model, "int8").layers) == 3
    tied = nn.ModuleDict({name: nn.Linear(64, 64, bias=False) for name in "abc"})
    for name, part in (("a", big[:, :64]), ("b", big[:, 32:96]), ("c", torch.randn(64, 64))):
        tied[name].weight = nn.Parameter(part)
    assert set(fa.quantize_model_(tied, "int8").left) == {"a", "b"}

"""What a `QuantizedLinear` takes over from a state dict, and that a state which does not fit changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedadapt as fa
from fusedadapt.quant import format_of

WAYS: tuple[dict[str, Any], ...] = ({}, {"strict": False}, {"assign": True})


def layer(n: int, k: int, name: str = "int4", bias: bool = False, **options: Any) -> fa.QuantizedLinear:
    return fa.QuantizedLinear.from_linear(nn.Linear(k, n, bias), name, **options)


def everything(made: nn.Module) -> tuple[Any, ...]:
    """Tensors and what stands beside them."""
    return {key: t.clone() for key, t in made.state_dict().items()}, getattr(made, "weight_dtype", None), getattr(made, "activations", None)


def unchanged(made: nn.Module, before: tuple[Any, ...]) -> bool:
    tensors, *rest = everything(made)
    same = all(torch.equal(t, before[0][key]) for key, t in tensors.items()) and tensors.keys() == before[0].keys()
    return same and rest == [*before[1:]]


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("nf4", (128, 64), (64, 128)), ("int4", (8, 64), (8, 63)), ("int2", (8, 64), (8, 61)), ("int3", (8, 64), (8, 63)), ("hqq4", (8, 64), (8, 63)),
        ("mxfp4", (8, 64), (8, 63)), ("nvfp4", (8, 64), (8, 63)), ("fp4_e2m1", (8, 64), (8, 63)), ("ternary", (8, 64), (8, 62)),
    ],
)  # fmt: skip
def test_bytes_of_another_shape_are_not_loaded(name: str, ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    mine, other = layer(*ours, name), layer(*theirs, name)
    assert mine.weight.shape == other.weight.shape and mine.weight_scale.shape == other.weight_scale.shape
    before = everything(mine)
    for way in WAYS:
        with pytest.raises(RuntimeError, match=f"expected a state of {ours[0]} x {ours[1]}; got {theirs[0]} x {theirs[1]}; build"):
            mine.load_state_dict(other.state_dict(), **way)
        assert unchanged(mine, before)


def test_a_part_of_another_size_leaves_all_of_the_layer_as_it_was() -> None:
    half = layer(64, 32, bias=True).half()
    half.weight_dtype = torch.float16
    for other in (half.state_dict(), layer(96, 32).state_dict() | {"bias": torch.zeros(5)}):
        mine = layer(96, 32, bias=True)
        before = everything(mine)
        for way in WAYS:
            with pytest.raises(RuntimeError, match=r"size mismatch for bias: expected shape \(96,\); got"):
                mine.load_state_dict(other, **way)
            assert unchanged(mine, before)
    adapted, wide = (fa.LoRALinear.from_linear(layer(64, 32), r=r) for r in (2, 3))
    before = everything(adapted)
    for way in WAYS:
        with pytest.raises(RuntimeError, match=r"size mismatch for lora_A: expected shape \(2, 32\); got \(3, 32\)"):
            adapted.load_state_dict(wide.state_dict(), **way)
        assert unchanged(adapted, before)


def test_columns_in_another_order_are_not_loaded() -> None:
    plain = layer(8, 32)
    ordered = fa.QuantizedLinear(plain.quantized.clone(), None, torch.randperm(32))
    for mine, other in ((layer(8, 32), ordered), (ordered, layer(8, 32))):
        before = everything(mine)
        for way in WAYS:
            with pytest.raises(RuntimeError, match="weight_order: expected (none|an order of the inputs); got"):
                mine.load_state_dict(other.state_dict(), **way)
            assert unchanged(mine, before)


def test_activations_arrive_with_the_state() -> None:
    mine, other = layer(16, 32, "int8"), layer(16, 32, "int8")
    other.activations = "int8"
    state = copy.deepcopy(other.state_dict())
    x = torch.randn(3, 32)
    for way in WAYS:
        mine.activations = None
        mine.load_state_dict(state, **way)
        assert mine.activations == "int8" and torch.equal(mine(x), other(x))
    other.activations = None
    mine.load_state_dict(other.state_dict())
    assert mine.activations is None


def text(state: dict[str, Tensor], said: bytes) -> dict[str, Tensor]:
    return state | {"_extra_state": torch.tensor([*said], dtype=torch.uint8)}


def test_states_of_earlier_releases_load_and_keep_the_layers_activations() -> None:
    mine, other = layer(16, 32, "int8"), layer(16, 32, "int8")
    mine.activations = "int8"
    mine.load_state_dict(text(other.state_dict(), b"int8;bfloat16"))
    assert mine.activations == "int8" and mine.weight_dtype == torch.bfloat16 and torch.equal(mine.weight, other.weight)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (b"int8;float32;16x32;int9", "activations among int8, fp8_e4m3 or none"), (b"int8;float32;16x32", "activations among"),
        (b"int8;float32;16x32;;more", "activations among"), (b"int8;float32;16;", "expected a state of 16 x 32; got 16"),
        (b"int8;float99;16x32;", "expected the dtype of a weight"),
    ],
)  # fmt: skip
def test_damaged_descriptions_are_named(said: bytes, match: str) -> None:
    mine = layer(16, 32, "int8")
    before = everything(mine)
    for way in WAYS:
        with pytest.raises(RuntimeError, match=match):
            mine.load_state_dict(text(layer(16, 32, "int8").state_dict(), said), **way)
        assert unchanged(mine, before)
    with pytest.raises(RuntimeError, match="expected text in bytes in _extra_state; got torch.float64"):
        mine.load_state_dict(mine.state_dict() | {"_extra_state": torch.zeros(2, dtype=torch.float64)})


def test_what_describes_the_weight_may_be_set_between_calls() -> None:
    """The layer keeps its `QuantizedTensor` from call to call."""
    made, x = layer(16, 32, "int4", symmetric=True), torch.randn(1, 32)
    with torch.no_grad():
        y, first = made(x), made.quantized
        assert made.quantized is first
        made.format = format_of("int4", symmetric=True, group_size=32)
        assert made.quantized.format == made.format and torch.equal(made(x), y)
        made.weight_dtype = torch.bfloat16
        assert made.quantized.dtype == torch.bfloat16
        made.out_features = 15
        with pytest.raises(ValueError, match="for a weight of 15 x 32"):
            made(x)
        made.out_features, made.in_features = 16, 31
        with pytest.raises(ValueError, match="x of 31 columns"):
            made(x)


def test_states_have_one_size_whatever_the_activations() -> None:
    """torch.distributed.checkpoint loads into tensors of the saved sizes alone."""
    layer = fa.QuantizedLinear.from_linear(nn.Linear(64, 32), "int8")
    sizes = []
    for layer.activations in (None, "int8", "fp8_e4m3"):
        sizes.append(layer.get_extra_state().shape)
        twin = fa.QuantizedLinear.from_linear(nn.Linear(64, 32), "int8")
        twin.load_state_dict(layer.state_dict())
        assert twin.activations == layer.activations
    assert len(set(sizes)) == 1

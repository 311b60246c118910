"""Merging and unmerging every adapter method: values, rounding, what is reported, and what is refused."""

import pytest
import torch
from lowrank_layers import CASES, IDS, K, N, build, parameters, relative, truth
from torch import nn

from fusedadapt.lowrank import LoRALinear, merge_adapters, unmerge_adapters


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backup", [True, False])
def test_merge_and_unmerge(method, options, dtype, backup):
    layer = build(method, options, 3, dtype=dtype).eval()
    x = torch.randn(50, K, dtype=dtype)
    weight, bias, before = layer.weight.detach().clone(), layer.bias.detach().clone(), layer(x)
    plain = layer.to_linear()
    report = layer.merge(backup=backup, name="block.0")
    assert layer.merged and report.layer.startswith("block.0") and report.exact is backup
    assert torch.equal(plain.weight, layer.weight) and torch.equal(plain.bias, layer.bias)
    limit = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert relative(layer(x), before.double()) <= limit
    assert abs(report.retained - 1) <= limit
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    undone = layer.unmerge()
    assert undone.exact is backup and not layer.merged
    if backup:
        assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias) and torch.equal(layer(x), before)
    else:
        assert relative(layer.weight, weight.double()) <= 4 * limit and torch.equal(layer.bias, bias)
        assert abs(undone.retained - 1) <= 4 * limit
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
def test_merge_rounds_once(method, options):
    """A bf16 weight takes the fp64 result rounded to nearest, not one of a chain of bf16 steps."""
    layer = build(method, options, 3, dtype=torch.bfloat16)
    x = torch.eye(K, dtype=torch.float64)
    exact = (truth(layer, x)[0] - truth(layer, x * 0)[0]).T
    layer.merge()
    ulp = exact.abs().to(torch.bfloat16).double() * 2**-8
    # fp32 arithmetic may land on the other side of a tie; nothing may be further off than half a step and that
    assert bool(((layer.weight.double() - exact).abs() <= ulp * 0.5 * 1.01 + exact.abs() * 2**-9 * 1.01).all())


def test_retained_tells_a_delta_that_bf16_cannot_hold():
    torch.manual_seed(0)
    layer = LoRALinear(256, 256, r=8, dtype=torch.bfloat16, init=False)
    with torch.no_grad():
        layer.lora_B.mul_(1e-4)
    report = layer.merge()
    assert report.retained < 0.5
    kept = layer.weight.double()
    layer.unmerge()
    wanted = layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    got = kept - layer.weight.double()
    assert report.retained == pytest.approx(float((wanted * got).sum() / (wanted * wanted).sum()), rel=1e-3, abs=1e-6)
    assert LoRALinear(4, 4).merge().retained == 1.0  # nothing to keep


def test_merge_of_a_model_is_all_or_nothing():
    good, bad = build("lora", {}, 3), LoRALinear(K, N, dtype=torch.float32)
    bad.weight = nn.Parameter(torch.zeros(N, K, dtype=torch.int8), requires_grad=False)
    model = nn.ModuleDict({"a": good, "deep": nn.ModuleDict({"b": bad})})
    weight = good.weight.detach().clone()
    with pytest.raises(ValueError, match=r"deep\.b .*floating-point weight.*int8"):
        merge_adapters(model)
    assert torch.equal(good.weight, weight) and not good.merged
    del model["deep"]
    assert set(merge_adapters(model)) == {"a"} and good.merged
    assert merge_adapters(model) == {} and unmerge_adapters(model)["a"].exact
    with pytest.raises(ValueError, match="without any"):
        merge_adapters(nn.Linear(2, 2))
    base = nn.Linear(K, N)
    tied = nn.ModuleDict({"a": LoRALinear.from_linear(base, r=2), "b": LoRALinear.from_linear(base, r=2)})
    with pytest.raises(ValueError, match=r"^b .*that a adapts too"):
        merge_adapters(tied)


@pytest.mark.parametrize("backup", [True, False])
def test_an_overflow_in_the_middle_of_a_model_changes_nothing(backup):
    model = nn.Sequential(*(build("lora", {}, dtype=torch.float16) for _ in range(3)))
    before = [layer.weight.detach().clone() for layer in model]
    assert not merge_adapters(model, backup=False)["0"].exact
    unmerge_adapters(model)
    with torch.no_grad():
        for layer, weight in zip(model, before):
            layer.weight.copy_(weight)
        model[1].lora_B.fill_(1e4)
        model[1].lora_A.fill_(1e4)
    with pytest.raises(ValueError, match=r"^1 .*overflow"):
        merge_adapters(model, backup=backup)
    assert all(torch.equal(layer.weight, weight) and not layer.merged for layer, weight in zip(model, before))


@pytest.mark.parametrize("backup", [True, False])
@pytest.mark.parametrize("dtype,size", [(torch.float16, 1e4), (torch.bfloat16, 1e20), (torch.float32, 1e20), (torch.float64, 1e160)], ids=str)
def test_what_overflows_is_refused_and_changes_nothing(dtype, size, backup):
    layer = build("lora", {}, dtype=dtype)
    with torch.no_grad():
        layer.lora_B.fill_(size)
        layer.lora_A.fill_(size)
    weight = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=f"within {dtype}'s range; got an overflow"):
        layer.merge(backup=backup)
    assert torch.equal(layer.weight, weight) and not layer.merged
    with pytest.raises(ValueError, match=f"within {dtype}'s range; got an overflow"):
        layer.to_linear()
    with torch.no_grad():  # what was no number before is no overflow
        layer.lora_B.zero_()
        layer.weight[0, 0] = float("inf")
    assert layer.merge(backup=backup) and layer.merged and layer.to_linear().weight[0, 0] == float("inf")


@pytest.mark.parametrize("method,vector", [("ssf", "ssf_shift"), ("ia3", "ia3_l")])
def test_a_bias_that_overflows_is_refused_and_changes_nothing(method, vector):
    layer = build(method, {}, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(1.0)
        getattr(layer, vector).fill_(1e6)
    for merging in (layer.merge, layer.to_linear):
        with pytest.raises(ValueError, match="bias: merge expected a result within torch.float16's range"):
            merging()
    assert not layer.merged and not layer.weight.any() and bool((layer.bias == 1).all())


def test_merge_refuses_what_it_cannot_do():
    shift = build("ssf", {}, bias=False)
    with pytest.raises(ValueError, match="expected a bias"):
        shift.merge(name="head")
    x = torch.randn(5, K, dtype=torch.float64)
    torch.testing.assert_close(shift.to_linear()(x), shift(x))
    for method in ("ia3", "ia3_ff", "ssf", "dora"):
        layer = build(method, {})
        with torch.no_grad():
            getattr(layer, parameters(layer)[-1 if method == "dora" else 0]).view(-1)[0] = 0
        weight = layer.weight.detach().clone()
        with pytest.raises(ValueError, match="without zeros"):
            layer.merge(backup=False)
        assert torch.equal(layer.weight, weight)
        layer.merge()
        layer.unmerge()
        assert torch.equal(layer.weight, weight)
    broken = build("lora", {}, dtype=torch.float32)
    with torch.no_grad():
        broken.lora_A[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite factors"):
        broken.merge()

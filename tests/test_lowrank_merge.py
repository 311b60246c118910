"""Merging and unmerging every adapter method: values, rounding, what is reported, and what is refused."""

import copy
import pickle

import pytest
import torch
from lowrank_layers import CASES, IDS, K, N, build, parameters, relative, truth
from torch import nn
from torch.nn.utils import prune

import fusedadapt as fa
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


@pytest.mark.parametrize("backup", [True, False])
@pytest.mark.parametrize("kind", ["parametrized", "weight_norm", "spectral_norm", "pruned"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_weight_that_is_computed_is_not_merged_into(kind, backup):
    layer = build("lora", {}, dtype=torch.float32).eval()
    x = torch.randn(5, K)
    wrap = {
        "parametrized": nn.utils.parametrizations.weight_norm,
        "weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.spectral_norm,
        "pruned": lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
    }[kind]
    wrap(layer)
    before = layer(x)
    for merging in (lambda: layer.merge(backup=backup), lambda: merge_adapters(nn.ModuleList([layer]), backup=backup)):
        with pytest.raises(ValueError, match="merge expected a weight that is the layer's own parameter; got one computed"):
            merging()
    assert not layer.merged and torch.equal(layer(x), before)
    torch.testing.assert_close(layer.to_linear()(x), before)


def test_unmerging_out_of_a_weight_that_is_computed_by_now_is_refused():
    layer = build("lora", {}, dtype=torch.float32)
    layer.merge()
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match="unmerge expected a weight that is the layer's own parameter"):
        layer.unmerge()
    assert layer.merged


@pytest.mark.parametrize("backup", [True, False])
@pytest.mark.parametrize("kind", ["inference", "expanded", "expanded bias"])
def test_a_weight_that_cannot_be_written_leaves_the_whole_model_unmerged(kind, backup):
    good, bad = build("ssf", {}, dtype=torch.float32), build("ssf", {}, dtype=torch.float32)
    if kind == "inference":
        with torch.inference_mode():
            bad.weight = nn.Parameter(torch.randn(N, K), requires_grad=False)
    elif kind == "expanded":
        bad.weight = nn.Parameter(torch.randn(1, K).expand(N, K), requires_grad=False)
    else:
        bad.bias = nn.Parameter(torch.randn(1).expand(N), requires_grad=False)
    model = nn.Sequential(good, bad)
    kept = [(layer.weight.clone(), layer.bias.clone()) for layer in model]
    with pytest.raises((ValueError, RuntimeError)):
        merge_adapters(model, backup=backup)
    for layer, (weight, bias) in zip(model, kept):
        assert not layer.merged
        torch.testing.assert_close(layer.weight, weight)
        torch.testing.assert_close(layer.bias, bias)


@pytest.mark.parametrize("packed", [False, True])
def test_adapters_that_share_a_weight_unmerge_in_reverse(packed):
    linear = nn.Linear(64, 32)
    base = fa.QuantizedLinear.from_linear(linear, "int8") if packed else linear
    a, b = (LoRALinear.from_linear(base, r=2, init=False) for _ in range(2))
    codes = a.weight.detach().clone()
    a.merge()
    b.merge()
    both = a.weight.detach().clone()
    with pytest.raises(RuntimeError, match="it has been written to since.*last merged is the first to unmerge"):
        a.unmerge()
    assert a.merged and torch.equal(a.weight, both)
    b.unmerge()
    b.merge()
    b.unmerge()
    assert a.unmerge().exact and torch.equal(a.weight, codes)


def test_what_others_wrote_into_a_merged_weight_is_not_undone():
    for method in ("lora", "ia3"):
        layer = build(method, {}, dtype=torch.float32)
        twin = copy.deepcopy(layer)
        kept = layer.weight.clone()
        layer.merge()
        again = pickle.loads(pickle.dumps(layer))
        clone = copy.deepcopy(layer)
        with torch.no_grad():
            layer.weight.mul_(2)
        written = layer.weight.clone()
        with pytest.raises(RuntimeError, match="unmerge expected the weight that merge left"):
            layer.unmerge()
        assert layer.merged and torch.equal(layer.weight, written)
        for other in (again, clone):  # their weights are as merge left them
            other.unmerge()
            assert torch.equal(other.weight, kept)
        layer.load_state_dict(twin.state_dict())
        assert not layer.merged and layer.merge().exact
        layer.to(torch.float64).to(torch.float32)  # the same numbers
        layer.unmerge()
        assert torch.equal(layer.weight, kept)
    added = build("lora", {}, dtype=torch.float32)
    added.merge(backup=False)
    kept = added.weight.clone()
    with torch.no_grad():
        added.weight.add_(1)
    added.unmerge()  # takes out what it added
    assert float((added.weight - kept).mean()) == pytest.approx(1, abs=0.5)


@pytest.mark.parametrize("reset", ["reset_adapter", "reset_parameters"])
def test_a_merged_adapter_is_not_drawn_anew(reset):
    layer = build("lora", {})
    layer.merge()
    kept = {name: p.clone() for name, p in layer.named_parameters()}
    with pytest.raises(RuntimeError, match=f"LoRALinear.{reset}: expected an unmerged layer"):
        getattr(layer, reset)()
    assert all(torch.equal(p, kept[name]) for name, p in layer.named_parameters())
    layer.unmerge()
    getattr(layer, reset)()


def test_what_wrote_the_same_bits_since_does_not_stand_in_the_way_of_unmerging():
    """DDP's first broadcast; an adapter merged without a backup and taken out again; and torch's swap_tensors wants no reference to the weight."""
    linear = nn.Linear(12, 9)
    before = linear.weight.detach().clone()
    a, b = (LoRALinear.from_linear(linear, r=2, init=False) for _ in "ab")
    a.merge()
    with torch.no_grad():
        linear.weight.copy_(linear.weight.clone())
    a.unmerge()
    assert torch.equal(linear.weight, before)
    a.merge()
    b.merge(backup=False)
    b.unmerge()
    a.unmerge()
    assert torch.equal(linear.weight, before)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        a.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert a.weight.dtype == torch.float64

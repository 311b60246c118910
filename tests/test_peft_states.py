"""`fa.patch` through the life of a PEFT model: switching, merging, deleting, copying, saving; what it leaves to PEFT, and how it says so."""

from __future__ import annotations

import copy
import importlib
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_models import (
    Block,
    build,
    layer_of,
    lora,
    on_reference,  # noqa: F401 - a fixture
    one_thread,  # noqa: F401 - a fixture
    peft,
    results,
    tokens,
)
from torch import Tensor, nn
from torch.autograd import forward_ad

import fusedadapt as fa

pytestmark = pytest.mark.usefixtures("one_thread", "on_reference")


def same_as_unpatched(model: Any, x: Tensor | None = None, exactly: bool = False) -> None:
    x = tokens() if x is None else x
    ours = model(x)
    twin = copy.deepcopy(model)
    fa.unpatch(twin)
    eager = twin(x)
    if exactly:
        assert torch.equal(ours, eager)
    else:
        assert (ours - eager).norm() <= 3e-6 * eager.norm()


def test_every_state_transition() -> None:
    model = build(lora())
    fa.patch(model)
    same_as_unpatched(model)
    model.add_adapter("second", lora(r=2, use_rslora=True))
    model.add_adapter("magnitude", lora(r=3, use_dora=True))
    same_as_unpatched(model)
    for chosen in ("second", "magnitude", "default", ["default", "second"]):
        model.base_model.set_adapter(chosen)
        same_as_unpatched(model)
    model.base_model.set_adapter(["default", "magnitude"])
    assert {row[1] for row in fa.explain(model)} == {"peft"}
    same_as_unpatched(model, exactly=True)
    model.base_model.set_adapter("second")
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("second", 0.3)
    same_as_unpatched(model)
    before = model(tokens())
    model.merge_adapter()
    same_as_unpatched(model, exactly=True)
    assert {row[1] for row in fa.explain(model)} == {"base"}
    model.unmerge_adapter()
    assert torch.allclose(model(tokens()), before, atol=1e-5)
    with model.disable_adapter():
        same_as_unpatched(model, exactly=True)
    model.delete_adapter("second")
    same_as_unpatched(model)
    with peft.helpers.rescale_adapter_scale(model, 0.5):
        same_as_unpatched(model)
    same_as_unpatched(model)


def test_disabling_a_merged_model_unmerges_it() -> None:
    model = build(lora())
    base = copy.deepcopy(layer_of(model).base_layer.weight)
    fa.patch(model)
    model.merge_adapter()
    with model.disable_adapter():
        model(tokens())
        assert torch.allclose(layer_of(model).base_layer.weight, base, atol=1e-6)


def test_mixed_batches_go_to_peft_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model = build(lora())
    model.add_adapter("second", lora(r=2))
    model.eval()
    names = ["default", "second", "__base__"]
    eager = model(tokens(), adapter_names=names)
    fa.patch(model)
    with caplog.at_level(logging.WARNING, "fusedadapt"):
        assert torch.equal(model(tokens(), adapter_names=names), eager)
        model(tokens(), adapter_names=names)
    assert sum("adapter_names: a batch that mixes adapters" in message for message in caplog.messages) == 1
    with fa.strict(), pytest.raises(RuntimeError, match=r"0.q_proj: expected no fallback \(strict\); adapter_names"):
        model(tokens(), adapter_names=names)


def test_patch_twice_and_unpatch() -> None:
    model = build(lora())
    eager = results(model, tokens())
    fa.patch(model)
    forward = vars(layer_of(model))["forward"]
    assert fa.patch(model) == fa.patch(model) and vars(layer_of(model))["forward"] is forward
    results(model, tokens())
    assert fa.unpatch(model) == 12 and fa.unpatch(model) == 0
    again = results(model, tokens())
    assert all(torch.equal(again[name], eager[name]) for name in eager)
    assert "forward" not in vars(layer_of(model))


def test_layers_added_later_are_named_and_patched_by_the_next_patch() -> None:
    model = build(lora(target_modules=["q_proj"]))
    fa.patch(model)
    model.add_adapter("wider", lora(target_modules=["q_proj", "up"]))
    model.set_adapter("wider")
    rows = {name: (path, why) for name, path, why in fa.explain(model)}
    assert rows["base_model.model.0.up"] == ("peft", "lora.Linear, not patched: call fusedadapt.patch(model)")
    assert rows["base_model.model.0.q_proj"][0] == "fused"
    fa.patch(model)
    assert {row[1] for row in fa.explain(model)} == {"fused"}
    same_as_unpatched(model)


def test_copies_and_pickles_are_their_own() -> None:
    model = build(lora())
    fa.patch(model)
    y = model(tokens())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert vars(layer_of(twin))["forward"].layer is layer_of(twin)
        with torch.no_grad():
            layer_of(twin).lora_B["default"].weight.add_(1)
        assert not torch.allclose(twin(tokens()), y)
    assert torch.equal(model(tokens()), y)


def test_replicas_of_data_parallel_run_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.DataParallel without its GPUs: each replica computes with its own copies of the parameters, and their gradients arrive."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", lambda ts, devices, detach=False: [[t * (i + 1) for t in ts] for i in devices])
    model = build(lora())
    fa.patch(model)
    replicas = replicate.replicate(model, [0, 1])
    assert fa.unpatch(copy.deepcopy(model)) == 12
    assert torch.equal(replicas[0](tokens()), model(tokens())) and not torch.allclose(replicas[1](tokens()), model(tokens()))
    replicas[1](tokens()).sum().backward()
    assert float(layer_of(model).lora_A["default"].weight.grad.abs().sum()) > 0
    fa.unpatch(model)
    plain = replicate.replicate(model, [0, 1])
    assert all((r(tokens()) - p(tokens())).norm() <= 3e-6 * p(tokens()).norm() for r, p in zip(replicas, plain, strict=True))


def test_save_and_load(tmp_path: Any) -> None:
    model = build(lora(use_dora=True))
    keys = list(model.state_dict())
    y = model(tokens())
    fa.patch(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(nn.Sequential(Block(), Block()), tmp_path)
    fa.patch(loaded)
    assert torch.allclose(loaded(tokens()), y, atol=1e-5)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert torch.allclose(model(tokens()), y, atol=1e-5)
    merged = model.merge_and_unload()
    assert not any("forward" in vars(module) for module in merged.modules())
    assert torch.allclose(merged(tokens()), y, atol=1e-4)


def test_hooks_fire() -> None:
    model = build(lora(lora_dropout=0.1))
    fa.patch(model)
    seen: list[str] = []
    layer = layer_of(model)
    outer = layer.register_forward_hook(lambda *_: seen.append("layer"))
    model(tokens())
    assert seen == ["layer"]
    outer.remove()
    for part in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"], layer.lora_dropout["default"]):
        handle = part.register_forward_hook(lambda *_: seen.append("inner"))
        assert "has hooks" in dict((row[0], row[2]) for row in fa.explain(model))["base_model.model.0.q_proj"]
        model(tokens())
        handle.remove()
    assert seen == ["layer"] + 4 * ["inner"]


def test_other_layers_keep_pefts_forward() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    model = peft.get_peft_model(base, lora(target_modules=["0", "1"]))
    x = torch.arange(6)
    y = model(x)
    report = fa.patch(model)
    assert [(r.kind, r.path) for r in report.layers] == [("lora.Embedding", "peft"), ("lora.Linear", "fused")]
    assert report.left[0].reason == "lora.Embedding has no fused form"
    assert "1 of 2 adapter layers on the fast path" in str(report) and "base_model.model.0" in str(report)
    assert torch.allclose(model(x), y, atol=1e-6)


def test_the_report_claims_no_layer_that_is_never_called() -> None:
    model = peft.get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), lora(target_modules=["0"]))
    report = fa.patch(model)
    assert [(r.kind, r.path) for r in report.layers] == [("lora.MultiheadAttention", "peft"), ("lora.Linear", "peft")]
    assert "never calls that layer" in report.left[1].reason


class Doubled(nn.Module):
    """Twice the weight, and how often it was asked for."""

    reads = 0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        self.reads += 1
        return 2 * weight


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default"])
def test_a_parametrized_weight_is_read_as_often_as_by_peft(part: str) -> None:
    model, doubled = build(lora(target_modules=["q_proj"])), Doubled()
    nn.utils.parametrize.register_parametrization(layer_of(model).get_submodule(part), "weight", doubled)
    doubled.reads = 0  # registering reads, too
    y, reads = model(tokens()), doubled.reads
    assert "Parametrized" in dict((r.name, r.reason) for r in fa.patch(model).left)["base_model.model.0.q_proj"]
    doubled.reads = 0
    assert torch.equal(model(tokens()), y)
    assert doubled.reads == reads


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_strict_raises_before_anything_changes(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft.get_peft_model(nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8)), lora(target_modules=["0", "1"]))
    if how == "environment":
        monkeypatch.setenv("FUSEDADAPT_STRICT", "1")
    with fa.strict(True) if how == "context" else fa.strict(False) if how == "argument" else fa.backend("reference"):
        with pytest.raises(RuntimeError, match="base_model.model.0: lora.Embedding has no fused form"):
            fa.patch(model, strict=how == "argument")
    assert not any("forward" in vars(module) for module in model.modules())


def test_no_adapters_is_an_error() -> None:
    for model in (nn.Linear(3, 3), Block()):
        with pytest.raises(ValueError, match=f"expected a model with PEFT adapter layers; got {type(model).__name__} without any"):
            fa.patch(model)
        with pytest.raises(TypeError, match="explain: expected"):
            fa.explain(model)


class Linear4bit(nn.Linear):
    """What a quantized layer looks like to PEFT's dispatcher when its own backend is not installed."""

    quant_state = None


def test_quantized_bases_and_foreign_forwards_are_reported() -> None:
    model = peft.get_peft_model(nn.Sequential(Linear4bit(8, 8), nn.Linear(8, 8)), lora(target_modules=["0", "1"]))
    foreign = model.base_model.model[1]
    foreign.forward = lambda x: type(foreign).forward(foreign, x)
    reasons = [entry.reason for entry in fa.patch(model).left]
    assert reasons == ["quantized base layer (Linear4bit): no fused form", "the layer has a forward of its own, set by another library"]


def test_unpatch_refuses_under_a_foreign_wrapper() -> None:
    model = build(lora())
    fa.patch(model)
    layer = layer_of(model)
    layer._old_forward, layer.forward = vars(layer)["forward"], lambda x: layer._old_forward(x)
    with pytest.raises(RuntimeError, match="0.q_proj: expected the forward that patch set"):
        fa.unpatch(model)
    assert "forward" in vars(layer_of(model, "1.up"))


def test_hooks_of_accelerate_on_a_base_layer_run_and_leave_no_trace() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = build(lora())
    base = layer_of(model).base_layer
    hooks.add_hook_to_module(base, hooks.ModelHook())
    reason = fa.patch(model).left[0].reason
    assert "base layer, a Linear, has a forward of its own" in reason
    same_as_unpatched(model)
    hooks.remove_hook_from_module(base)
    assert not fa.patch(model).left
    same_as_unpatched(model)


@pytest.mark.parametrize("config", [lambda: lora(lora_dropout=1.0), lambda: lora(alora_invocation_tokens=[1])])
def test_variants_and_corner_values_fall_back_with_a_reason(config: Callable[[], Any]) -> None:
    model = build(config())
    report = fa.patch(model)
    assert len(report.left) == len(report.layers)
    assert {entry.reason for entry in report.left} <= {"dropout p = 1", "adapter 'default' is the variant ALora"}
    same_as_unpatched(model, exactly=True)


def test_wrong_input_gets_pefts_own_error() -> None:
    model = build(lora())
    fa.patch(model)
    with pytest.raises(RuntimeError, match="dtype"):
        layer_of(model)(tokens(torch.float64))


def _nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[0, :2], x[1]])


@pytest.mark.parametrize("layout", [_nested, lambda x: x[0].to_sparse()], ids=["nested", "sparse"])
def test_inputs_that_are_not_dense_run_pefts_forward(layout: Callable[[Tensor], Tensor]) -> None:
    model, x = build(lora()), layout(tokens())
    eager = layer_of(model)(x)
    fa.patch(model)
    ours = layer_of(model)(x)
    parts = zip(ours.unbind(), eager.unbind(), strict=True) if x.is_nested else [(ours, eager)]
    assert all(torch.equal(mine, right) for mine, right in parts)
    for wrong in (None, [1.0]):
        with pytest.raises(TypeError, match="must be Tensor"):  # torch's own words
            layer_of(model)(wrong)


def test_a_sparse_weight_runs_pefts_forward() -> None:
    model, x = build(lora()), tokens()[0]
    layer = layer_of(model)
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().to_sparse_csr(), requires_grad=False)
    eager = layer(x)
    assert "torch.sparse_csr" in fa.patch(model).left[0].reason
    assert torch.equal(layer(x), eager)


def test_forward_mode_runs_pefts_forward() -> None:
    model, x, direction = build(lora()), tokens(), torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(3))

    def tangent() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer_of(model)(forward_ad.make_dual(x, direction))).tangent

    eager = tangent()
    fa.patch(model)
    assert torch.equal(tangent(), eager)


def test_function_transforms_run_pefts_forward() -> None:
    """Our functions have no rules for them; PEFT's layers are plain operations."""
    model, x = build(lora()), tokens()
    fa.patch(model)
    name, p = next((name, p.detach()) for name, p in model.named_parameters() if "lora_B" in name)

    def loss(p: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: p}, (x,)).square().sum()

    eager = torch.autograd.grad(loss(q := p.clone().requires_grad_()), q)[0]
    assert torch.allclose(torch.func.grad(loss)(p), eager, rtol=1e-4, atol=1e-5)
    with fa.strict(), pytest.raises(RuntimeError, match=r"torch\.func transform"):
        torch.func.grad(loss)(p)


@pytest.mark.parametrize("thing", [None, 5, "model"])
def test_what_is_no_module_is_refused(thing: Any) -> None:
    for call in (fa.patch, fa.unpatch):
        with pytest.raises(ValueError, match="fusedadapt.*expected"):
            call(thing)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ranks", [(4, 4), (6, 3), (3, 6)])
def test_hotswap(ranks: tuple[int, int], compiled: bool, tmp_path: Any) -> None:
    """PEFT's exchange of one adapter's values for another's, of any rank and scaling, under a patched model and under a graph of it."""
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
    from torch._dynamo.testing import CompileCounter

    x, saved = torch.randn(5, 8), []
    for i, rank in enumerate(ranks):
        torch.manual_seed(0)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)), lora(r=rank, lora_alpha=4 + 9 * i, target_modules=["0", "1"]))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.normal_(0, 0.3, generator=torch.Generator().manual_seed(i))
        saved.append((str(tmp_path / str(i)), model.eval()))
        model.save_pretrained(saved[i][0])
    torch.manual_seed(0)
    model = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)), saved[0][0]).eval()
    if compiled:
        prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
    fa.patch(model, strict=True)
    torch._dynamo.reset()
    counter = CompileCounter()
    run = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
    with fa.strict(), torch.no_grad():
        for i in (0, 1, 0):
            hotswap_adapter(run, saved[i][0], "default", torch_device="cpu")
            torch.testing.assert_close(run(x), saved[i][1](x), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == int(compiled)

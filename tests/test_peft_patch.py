"""`fa.patch` in numbers: PEFT's models against themselves unpatched and against fp64; dropout, checkpointing, torch.compile, whole models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft_models import (
    CONFIGS,
    WIDTH,
    Injected,
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

import fusedadapt as fa
from fusedadapt.reference.lowrank import dropout_mask, threshold_of

pytestmark = pytest.mark.usefixtures("one_thread", "on_reference")


def assert_as_good(model: Any, x: Tensor) -> None:
    """The patched model is no further from fp64 than the unpatched one (in total over each kind of gradient: single ones scatter)."""
    ours = results(model, x)
    assert fa.unpatch(model)
    eager = results(model, x)
    exact = results(copy.deepcopy(model).double(), x.double())
    assert ours.keys() == eager.keys() == exact.keys()
    sums: dict[str, list[float]] = {}
    largest = max(float(truth.norm()) for truth in exact.values())
    for name, truth in exact.items():
        if truth.norm() < 1e-9 * largest:  # a bias added to all keys: softmax does not see it
            continue
        assert ours[name].dtype == eager[name].dtype and ours[name].shape == eager[name].shape, name
        size = truth.norm()
        pair = sums.setdefault(name.split(".")[-3] if "." in name else name, [0.0, 0.0])
        pair[0] += float((ours[name].double() - truth).norm() / size)
        pair[1] += float((eager[name].double() - truth).norm() / size)
    for name, (mine, theirs) in sums.items():
        assert mine <= 1.2 * theirs + 3e-6, (name, mine, theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_fp32_parity(name: str) -> None:
    model = build(CONFIGS[name]())
    report = fa.patch(model)
    assert not report.left and len(report.fused) == len(report.layers) > 0
    model.eval()  # what is dropped has a test of its own
    assert_as_good(model, tokens())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp32_adapters", [True, False])
@pytest.mark.parametrize("name", ["lora", "bias", "dora", "vera", "ia3", "adalora"])
def test_16_bit_parity_of_layers(name: str, fp32_adapters: bool, dtype: torch.dtype) -> None:
    """y, dx and every gradient, the last of fp32 grade with fp32 adapters."""
    errors: dict[str, list[float]] = {}
    for seed in range(4):
        model = build(CONFIGS[name](), dtype, autocast_adapter_dtype=fp32_adapters)
        for layer in (layer_of(model, n) for n in ("0.q_proj", "0.k_proj", "0.o_proj", "0.down")):
            if not hasattr(layer, "base_layer"):
                continue
            x = torch.randn(200, layer.base_layer.in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
            eager, exact = results(layer, x), results(copy.deepcopy(layer).double(), x.double())
            fa.patch(model)
            ours = results(layer, x)
            fa.unpatch(model)
            for key, truth in exact.items():
                pair = errors.setdefault(key.split(".")[0], [0.0, 0.0])
                for found, i in ((ours, 0), (eager, 1)):
                    assert found[key].dtype == (dtype if key in "xy" or not fp32_adapters else torch.float32)
                    pair[i] += float((found[key].double() - truth).norm() / truth.norm())
    for key, (mine, theirs) in errors.items():
        # The magnitude's gradient meets y0, which has been rounded twice by then: as W's product and with the low-rank part.
        assert mine <= (1.6 if "magnitude" in key else 1.2) * theirs + 2e-5, (key, mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_adapter_bias_is_not_rounded_before_it_is_added(dtype: torch.dtype) -> None:
    model = build(CONFIGS["bias"](), dtype)
    layer = layer_of(model)
    with torch.no_grad():
        layer.lora_B["default"].bias.normal_(std=30)
    exact = results(copy.deepcopy(layer).double(), tokens().double())
    eager = results(layer, tokens(dtype))
    fa.patch(model)
    ours = results(layer, tokens(dtype))
    assert ours["y"].dtype == dtype and ours.keys() == eager.keys()
    for key, truth in exact.items():
        mine, theirs = (float((found[key].double() - truth).norm() / truth.norm()) for found in (ours, eager))
        assert mine <= 1.2 * theirs + 1e-5, (key, mine, theirs)


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "ia3", "adalora"])
def test_autocast_parity(name: str) -> None:
    model = build(CONFIGS[name]())
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(tokens())
        assert not fa.patch(model).left
        ours = model(tokens())
    assert ours.dtype == eager.dtype
    exact = copy.deepcopy(model).double()
    fa.unpatch(exact)
    truth = exact(tokens().double())
    assert (ours - truth).norm() <= 1.3 * (eager - truth).norm()


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_equals_peft_under_our_mask(dora: bool) -> None:
    p, x = 0.3, tokens()
    model = build(lora(lora_dropout=p, use_dora=dora, target_modules=["q_proj"]))
    layer = layer_of(model)
    fa.patch(model)
    torch.manual_seed(7)
    ours = results(layer, x)
    torch.manual_seed(7)
    seed = torch.randint(1 << 62, (1,), dtype=torch.int64)
    fa.unpatch(model)
    layer.lora_dropout["default"] = Injected(dropout_mask(15, WIDTH, seed, threshold_of(p)), p)
    eager = results(layer, x)
    for name, right in eager.items():
        assert torch.allclose(ours[name], right, atol=1e-5, rtol=1e-5), name


def test_dropout_drops_in_training_only_and_at_its_rate() -> None:
    model = build(lora(lora_dropout=0.25, target_modules=["q_proj"]))
    layer, x = layer_of(model), torch.eye(WIDTH).repeat(500, 1)
    fa.patch(model)
    delta = layer(x) - layer.base_layer(x)
    kept = (delta.abs().sum(1) > 1e-6).float().mean()
    assert abs(kept - 0.75) < 5 * (0.25 * 0.75 / len(x)) ** 0.5
    assert not torch.equal(layer(x), layer(x))
    model.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_modules_that_train_in_an_eval_model(dora: bool) -> None:
    """Monte Carlo dropout: PEFT's LoRA drops then, its DoRA does not."""
    model = build(lora(lora_dropout=0.5, use_dora=dora, target_modules=["q_proj"])).eval()
    layer, x = layer_of(model), tokens()
    layer.lora_dropout.train()
    eager = layer(x)
    fa.patch(model)
    assert torch.equal(layer(x), layer(x)) == dora
    if dora:
        assert torch.allclose(layer(x), eager, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_mask(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = build(lora(lora_dropout=0.5))
    fa.patch(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    for wrapped in (False, True):
        torch.manual_seed(5)
        x = tokens().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if wrapped else model(x)
        y.square().sum().backward()
        found.append([x.grad, *(p.grad for p in trained)])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_paper_form_of_dora_is_opt_in() -> None:
    model = build(lora(use_dora=True, lora_dropout=0.5, target_modules=["q_proj"]))
    layer, x = layer_of(model), tokens()
    with pytest.raises(ValueError, match="expected dora 'peft' or 'paper'; got 'papers'"):
        fa.patch(model, dora="papers")
    fa.patch(model, dora="paper")
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    keep = dropout_mask(15, WIDTH, torch.randint(1 << 62, (1,), dtype=torch.int64), threshold_of(0.5))
    a, b, magnitude = (m["default"].weight for m in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    w, s = layer.base_layer.weight, layer.scaling["default"]
    g = magnitude / (w + s * b @ a).norm(dim=1)
    right = g * (x @ w.T + s * (x * keep.reshape(x.shape) * 2) @ a.T @ b.T) + layer.base_layer.bias
    assert torch.allclose(y, right, atol=1e-5)


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids).tanh())

    model, ids = peft.get_peft_model(Tied(), lora(target_modules=["head"])), torch.arange(6)
    model.base_model.model.embed.weight.requires_grad_()
    weights = [p for p in model.parameters() if p.requires_grad]
    eager = torch.autograd.grad(model(ids).square().sum(), weights)
    assert not fa.patch(model).left
    for ours, right in zip(torch.autograd.grad(model(ids).square().sum(), weights), eager, strict=True):
        assert torch.allclose(ours, right, rtol=1e-4, atol=1e-4)


def test_fully_sharded(tmp_path: Any) -> None:
    """FSDP2: weights are pieces except inside the forward, where they are read."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model, x = build(lora()), tokens()
    eager = results(model, x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for block in model.base_model.model:
            fully_shard(block, mesh=dist.init_device_mesh("cpu", (1,)))
        report = fa.patch(model, strict=True)
        assert all("sharded by FSDP" in entry.reason for entry in report.fused)
        with fa.strict():
            y = model(x)
        y.backward(torch.ones_like(y))
        assert torch.allclose(y, eager["y"], atol=1e-4, rtol=1e-4)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dora", [False, True])
def test_compiles_whole_and_once(dora: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    model = peft.get_peft_model(mlp, lora(target_modules=["0", "2"], lora_dropout=0.2, use_dora=dora))
    fa.patch(model)
    layer, x = model.base_model.model[0], torch.randn(7, 8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for scaling, p in ((2.0, 0.2), (0.5, 0.2), (0.25, 0.8)):
        layer.scaling["default"], layer.lora_dropout["default"].p = scaling, p
        torch.manual_seed(4)
        graph = results(compiled, x)
        torch.manual_seed(4)
        eager = results(model, x)
        assert all(torch.allclose(graph[name], eager[name], atol=1e-6) for name in eager)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def huggingface(name: str) -> tuple[Any, list[str]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        )
        return transformers.LlamaForCausalLM(config), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if name == "bert":
        config = transformers.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        return transformers.BertForSequenceClassification(config), ["query", "key", "value", "dense"]
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config), ["c_attn", "c_proj", "c_fc"]


@pytest.mark.parametrize("name,dora", [("llama", False), ("llama", True), ("bert", False), ("gpt2", False), ("gpt2", True)])
def test_transformers_models_train_alike(name: str, dora: bool) -> None:
    base, targets = huggingface(name)
    model = peft.get_peft_model(base, lora(target_modules=targets, use_dora=dora, fan_in_fan_out=name == "gpt2"))
    model.eval()  # the models have dropout of their own
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1]) if name == "bert" else ids

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        out = model(input_ids=ids, labels=labels)
        out.loss.backward()
        return {"logits": out.logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    eager = step()
    report = fa.patch(model, strict=True)
    assert not report.left
    ours = step()
    assert ours.keys() == eager.keys()
    for key, right in eager.items():
        assert torch.allclose(ours[key], right, atol=1e-5 * float(right.abs().max()) + 1e-7, rtol=1e-4), key
    if name == "llama":
        model.train()
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        checkpointed = step()
        assert all(torch.allclose(checkpointed[key], ours[key], atol=1e-6) for key in ours if key in checkpointed)


@pytest.mark.parametrize("name", ["lora", "adalora"])
@pytest.mark.parametrize("kind", ["trained", "one per output"])
def test_a_scaling_that_is_no_number_keeps_pefts_forward(name: str, kind: str) -> None:
    config = {"lora": peft.LoraConfig(r=4, target_modules=["0"]), "adalora": peft.AdaLoraConfig(init_r=4, target_modules=["0"], total_step=10)}[name]
    model, x = peft.get_peft_model(nn.Sequential(nn.Linear(16, 12)), config), torch.randn(3, 16)
    layer = model.base_model.model[0]
    for p in model.parameters():
        p.data += 0.1
    assert fa.patch(model).fused
    scale = nn.Parameter(torch.tensor(2.0)) if kind == "trained" else torch.linspace(1, 2, 12)
    layer.scaling["default"] = scale
    fused = model(x)
    (entry,) = fa.patch(model).layers
    assert entry.path == "peft" and "the scaling of adapter 'default' is a tensor that" in entry.reason
    with pytest.raises(RuntimeError, match="no fallback .strict.; the scaling of adapter"), fa.strict():
        model(x)
    with pytest.raises(ValueError, match="expected a number in a compiled model; got none: the scaling of adapter"):
        torch.compile(model, backend="eager")(x)
    torch._dynamo.reset()
    fa.unpatch(model)
    torch.testing.assert_close(fused, model(x))
    if kind == "trained":
        (got,) = torch.autograd.grad(fused.sum(), [scale])
        torch.testing.assert_close(got, torch.autograd.grad(model(x).sum(), [scale])[0])

"""PEFT on quantized bases, ours and bitsandbytes': accepted, fused by `patch`, saved, merged and unmerged."""

from __future__ import annotations

import copy
import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedadapt as fa
from fusedadapt.quant import foreign
from fusedadapt.testing.saved import SavedBytes

peft = pytest.importorskip("peft")

K, N = 64, 128  # whole blocks of 64 in both layers' rows: bitsandbytes' AVX-512 kernel reads a wrong scale where one straddles two rows


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(K, N), nn.Linear(N, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def ours(model: nn.Module, format: str = "nf4", **options: Any) -> nn.Module:
    for name, child in list(model.named_children()):
        setattr(model, name, fa.QuantizedLinear.from_linear(child, format, **options))
    return model


def bitsandbytes(model: nn.Module, kind: str, nested: bool) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    for name, child in list(model.named_children()):
        new = bnb.nn.Linear4bit(
            child.in_features, child.out_features, child.bias is not None, torch.float32, compress_statistics=nested, quant_type=kind
        )
        new.load_state_dict(child.state_dict())
        setattr(model, name, new.to("cpu"))
    return model


def adapted(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


BASES: dict[str, Any] = {
    "ours nf4": lambda: ours(Net()),
    "ours nf4 nested": lambda: ours(Net(), double_quant=True),
    "ours int4": lambda: ours(Net(), "int4", group_size=32),
    "ours fp8": lambda: ours(Net(), "fp8_e4m3"),
    "bitsandbytes nf4": lambda: bitsandbytes(Net(), "nf4", False),
    "bitsandbytes nf4 nested": lambda: bitsandbytes(Net(), "nf4", True),
    "bitsandbytes fp4": lambda: bitsandbytes(Net(), "fp4", False),
}


def run(model: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_patched_equals_unpatched(base: str, use_dora: bool) -> None:
    model = adapted(BASES[base](), use_dora=use_dora)
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(2))
    before = run(model, x)
    report = fa.patch(model)
    assert [layer.path for layer in report.layers] == ["fused", "fused"], str(report)
    after = run(model, x)
    assert len(before) == len(after) >= 6
    for old, new in zip(before, after):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5 * float(old.abs().max()))
    fa.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(before, run(model, x)))


@pytest.mark.parametrize("base", ["ours nf4 nested", "bitsandbytes nf4 nested", "bitsandbytes fp4"])
def test_patch_shares_the_bytes_and_saves_no_weight(base: str) -> None:
    model = adapted(BASES[base]())
    fa.patch(model)
    x = torch.randn(5, K, requires_grad=True)
    own = [x, *model.parameters(), *model.buffers()]
    with SavedBytes(own) as saved:
        model.base_model.model.first(x)
    layer = fa.integrations.peft_layers.packed.weight_of(model.base_model.model.first.base_layer).packed
    assert saved.total <= 5 * 4 * 4 + 64 + layer.nbytes  # bitsandbytes keeps its scales outside parameters and buffers
    assert layer.qdata.data_ptr() == model.base_model.model.first.base_layer.weight.data_ptr()


def test_merge_and_unmerge_restore_the_bytes() -> None:
    model = adapted(BASES["ours int4"]())
    layer = model.base_model.model.first
    x = torch.randn(9, K)
    before, bytes_before = model(x).detach(), layer.base_layer.quantized.clone()
    model.merge_adapter(safe_merge=True)
    assert layer.merged and not torch.equal(layer.base_layer.weight, bytes_before.qdata)
    assert (model(x) - before).norm() < 0.3 * before.norm()
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(bytes_before.parts, layer.base_layer.quantized.parts) if a is not None)
    assert torch.equal(model(x), before)


def test_merging_broken_adapters_changes_nothing() -> None:
    model = adapted(BASES["ours nf4"]())
    layer = model.base_model.model.first
    kept = layer.base_layer.quantized.clone()
    layer.lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="nothing was changed"):
        layer.merge()
    assert not layer.merged and torch.equal(kept.qdata, layer.base_layer.quantized.qdata)


@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("kind", ["IA3", "Vera", "OFT", "FourierFT"])
def test_other_methods_merge_what_the_bytes_stand_for(kind: str, format: str) -> None:
    """They work on `weight` in place: on bytes of the weight's own shape that went wrong without a word, on others it failed."""
    own = {"IA3": {"feedforward_modules": ["second"]}, "Vera": {"r": 4}, "OFT": {"r": 4, "oft_block_size": 0}, "FourierFT": {"n_frequency": 10}}[kind]
    base = ours(Net(), format)
    dense = copy.deepcopy(base)
    for name in ("first", "second"):
        setattr(dense, name, getattr(base, name).to_linear())
    kept, models = base.first.quantized.clone(), []
    targets = ["first"] if kind == "Vera" else ["first", "second"]
    for each in (base, dense):
        torch.manual_seed(3)
        models.append(peft.get_peft_model(each, getattr(peft, f"{kind}Config")(target_modules=targets, **own)).eval())
        for p in (p for p in models[-1].parameters() if p.requires_grad):
            p.data += 0.05 * torch.randn(p.shape)
    packed, plain = models
    packed.merge_adapter()
    packed.unmerge_adapter()
    layer = packed.base_model.model.first
    assert not layer.merged and all(torch.equal(a, b) for a, b in zip(kept.parts, layer.base_layer.quantized.parts) if a is not None)
    merged, truth = packed.merge_and_unload(), plain.merge_and_unload()
    for name in targets:
        wanted = fa.quantize(getattr(truth, name).weight, getattr(merged, name).format)
        assert all(torch.equal(a, b) for a, b in zip(wanted.parts, getattr(merged, name).quantized.parts) if a is not None)


def test_saved_adapters_load_onto_a_fresh_base(tmp_path: Path) -> None:
    model = adapted(BASES["ours nf4"]())
    x = torch.randn(3, K)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(BASES["ours nf4"](), tmp_path)
    assert torch.equal(model(x), again(x))
    merged = again.merge_and_unload()
    assert type(merged.first) is fa.QuantizedLinear


def test_copies_and_pickles() -> None:
    model = adapted(BASES["ours nf4"]())
    fa.patch(model)
    x = torch.randn(3, K)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("kind", ["ia3", "vera", "adalora"])
@pytest.mark.parametrize("base", ["ours nf4", "bitsandbytes nf4"])
def test_other_adapters(base: str, kind: str) -> None:
    configs = {
        "ia3": lambda: peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
        "vera": lambda: peft.VeraConfig(r=4, target_modules=["first"]),
        "adalora": lambda: peft.AdaLoraConfig(target_modules=["first", "second"], init_r=4, total_step=10),
    }
    model = peft.get_peft_model(BASES[base](), configs[kind]())
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(2))
    before = run(model, x)
    assert all(layer.path == "fused" for layer in fa.patch(model).layers)
    for old, new in zip(before, run(model, x)):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5 * float(old.abs().max()))


def test_bf16_activations_on_a_packed_base() -> None:
    model = adapted(BASES["ours nf4"]()).to(torch.bfloat16)
    fa.patch(model)
    assert model.base_model.model.first.base_layer.weight_scale.dtype == torch.float32
    x = torch.randn(9, K).bfloat16()
    assert model(x).dtype == torch.bfloat16


class Words(nn.Module):
    """A layer that holds a checkpoint's qweight, qzeros and scales, as GPTQ's and AWQ's plain torch layers do, and multiplies by what they mean."""

    def __init__(self, linear: nn.Linear, kind: str, act_order: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = K, N, 4, 16
        packed = fa.quantize(linear.weight, "int4", 16, scale_dtype=torch.float16)
        order = torch.randperm(K, generator=torch.Generator().manual_seed(3)) if act_order else None
        tensors = foreign.to_awq(packed) if kind == "awq" else foreign.to_gptq(packed, order=order, version=2)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.bias = linear.bias
        inputs = torch.arange(K) if order is None else order
        self.truth = torch.empty(N, K)
        self.truth[:, inputs] = packed.dequantize()

    def qzero_format(self) -> int:
        return 2

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.truth.to(x.dtype), self.bias)


@pytest.mark.parametrize(("kind", "act_order"), [("gptq", False), ("gptq", True), ("awq", False)])
def test_gptq_and_awq_layers(kind: str, act_order: bool) -> None:
    home, name = {"gptq": ("gptqmodel.torch", "TorchQuantLinear"), "awq": ("awq.modules.linear.gemm", "WQLinear_GEMM")}[kind]
    base = type(name, (Words,), {"__module__": home})(Net().first, kind, act_order)
    tuner = importlib.import_module(f"peft.tuners.lora.{kind}")
    cls = tuner.GPTQLoraLinear if kind == "gptq" else tuner.AwqLoraLinear
    torch.manual_seed(1)
    layer = cls(base, "default", peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False), r=4, lora_alpha=8)
    model = nn.Sequential(layer)
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(2))
    before = run(model, x)
    assert [entry.path for entry in fa.patch(model).layers] == ["fused"]
    for old, new in zip(before, run(model, x), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5 * float(old.abs().max()))
    with torch.inference_mode():  # a model made there has tensors without versions
        twin = copy.deepcopy(model)
        assert fa.patch(twin).layers[0].path == "fused" and torch.equal(twin(x), model(x))
    base.scales[0, 0] = torch.nan  # written to: read again, and refused
    report = fa.patch(model).layers[0]
    assert report.path == "peft" and "scales" in report.reason


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "vera"])
def test_act_order_weights_of_our_layers(method: str) -> None:
    """LoRA reads x in the columns' order; the other methods stay with PEFT and say so; merging quantizes in that order and gives the bytes back."""
    torch.manual_seed(2)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(3))
    net = Net()
    w = net.first.weight.detach()
    net.first = fa.QuantizedLinear(fa.quantize(w[:, order], "int4", 16), net.first.bias, order)
    config = {
        "lora": peft.LoraConfig(target_modules=["first"], r=4, init_lora_weights=False),
        "dora": peft.LoraConfig(target_modules=["first"], r=4, init_lora_weights=False, use_dora=True),
        "ia3": peft.IA3Config(target_modules=["first"], feedforward_modules=[], init_ia3_weights=False),
        "vera": peft.VeraConfig(target_modules=["first"], r=4, init_weights=False),
    }[method]
    model = peft.get_peft_model(net, config)
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(2))
    before = run(model, x)
    entry = fa.patch(model).layers[0]
    assert entry.path == ("fused" if method == "lora" else "peft") and (method == "lora" or "act-order" in entry.reason)
    for old, new in zip(before, run(model, x), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5 * float(old.abs().max()))
    if method == "lora":
        base = model.base_model.model.first.base_layer
        bytes_before, y = base.quantized.clone(), model(x)
        model.merge_adapter()
        assert (model(x) - y).norm() < 0.2 * y.norm() and not torch.equal(base.quantized.qdata, bytes_before.qdata)
        model.unmerge_adapter()
        assert torch.equal(base.quantized.qdata, bytes_before.qdata)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_8_bit_layers_of_bitsandbytes_stay_and_say_why(threshold: float) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    net = Net()
    layer = bnb.nn.Linear8bitLt(K, net.first.out_features, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(net.first.state_dict())
    net.first, net.is_loaded_in_8bit = layer.to("cpu"), True
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["first"], r=4))
    entry = fa.patch(model).layers[0]
    assert entry.path == "peft" and "codes x to int8" in entry.reason and ("beyond 6" in entry.reason) == bool(threshold)


@pytest.mark.parametrize(("format", "codes"), [("int8", "int8"), ("fp4_e2m1", "fp8_e4m3")])
def test_layers_that_code_their_input_keep_doing_so(format: str, codes: str) -> None:
    """The fused layer multiplies x as it is: PEFT's forward goes on, an adapter of ours is refused."""
    net = ours(Net(), format)
    for layer in (net.first, net.second):
        layer.activations = codes
    model, x = adapted(net), torch.randn(9, K, generator=torch.Generator().manual_seed(2))
    before = run(model, x)
    report = fa.patch(model)
    assert all(entry.path == "peft" and f"codes x to {codes}" in entry.reason for entry in report.layers)
    assert all(torch.equal(a, b) for a, b in zip(before, run(model, x), strict=True))
    with pytest.raises(ValueError, match=f"got activations='{codes}'; set its activations to None"):
        fa.LoRALinear.from_linear(net.first.base_layer, r=4)


@pytest.mark.parametrize(("nested", "use_dora"), [(False, False), (True, True)])
def test_bitsandbytes_layers_compile_whole(nested: bool, use_dora: bool) -> None:
    """PEFT's LoRA on them does; the look at their tables must not break the graph (nested, it broke the compiler)."""
    model = adapted(bitsandbytes(Net(), "nf4", nested), use_dora=use_dora)
    fa.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (9, 5):
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows))
        for old, new in zip(run(model, x), run(compiled, x), strict=True):
            torch.testing.assert_close(new, old)
    torch._dynamo.reset()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "vera"])
def test_bitsandbytes_layers_return_the_inputs_dtype_under_autocast(kind: str, x_dtype: torch.dtype) -> None:
    """Linear4bit does, unlike F.linear: a residual stream in fp32 stays so."""
    targets = ["first", "second"]
    config = {
        "lora": peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False),
        "dora": peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, use_dora=True),
        "adalora": peft.AdaLoraConfig(target_modules=targets, init_r=4, total_step=10),
        "vera": peft.VeraConfig(r=4, target_modules=["first"], init_weights=False),
    }[kind]
    model, x = peft.get_peft_model(bitsandbytes(Net(), "nf4", True), config), torch.randn(9, K).to(x_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = model(x)
        fa.patch(model, strict=True)
        fused = model(x)
    assert eager.dtype == fused.dtype == x_dtype
    torch.testing.assert_close(fused, eager, rtol=0.05, atol=0.02 * float(eager.abs().max()))

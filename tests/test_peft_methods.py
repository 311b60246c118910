"""PEFT's methods on packed weights: those that are listed do what they do on `to_linear()`, the others are refused before anything changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedadapt as fa
from fusedadapt.integrations import peft_methods

peft = pytest.importorskip("peft")

K, N = 64, 128
ALL = {"target_modules": ["0", "2"]}
FIT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("Lora", {"r": 4}),
    "lora gaussian": ("Lora", {"r": 4, "init_lora_weights": "gaussian"}),
    "lora eva": ("Lora", {"r": 4, "init_lora_weights": "eva"}),
    "rslora": ("Lora", {"r": 4, "use_rslora": True, "init_lora_weights": False}),
    "dora": ("Lora", {"r": 4, "use_dora": True}),
    "adalora": ("AdaLora", {"init_r": 4, "total_step": 10}),
    "beft": ("Beft", {}),
    "boft": ("BOFT", {"boft_block_size": 4}),
    "c3a": ("C3A", {"block_size": 16}),
    "deft para": ("Deft", {"r": 4, "para": True}),
    "fourierft": ("FourierFT", {"n_frequency": 16}),
    "gralora": ("Gralora", {"r": 4, "hybrid_r": 2}),
    "ia3": ("IA3", {"feedforward_modules": ["2"]}),
    "lily": ("Lily", {"r": 4}),
    "miss": ("Miss", {"r": 4}),
    "miss mini": ("Miss", {"r": 4, "init_weights": "mini", "mini_r": 2}),
    "oft": ("OFT", {"oft_block_size": 8, "r": 0}),
    "poly": ("Poly", {"r": 4, "n_tasks": 2, "n_skills": 2}),
    "pvera": ("Pvera", {"r": 4}),
    "randlora": ("RandLora", {"r": 4}),
    "road": ("Road", {"group_size": 8}),
    "vblora": ("VBLoRA", {"num_vectors": 8, "vector_length": 16}),
    "vera": ("Vera", {"r": 4}),
    "waveft": ("WaveFT", {"n_frequency": 16}),
}
UNFIT: dict[str, tuple[str, dict[str, Any]]] = {
    "DEFT without para=True": ("Deft", {"r": 4}),
    "DELORA": ("Delora", {"r": 4}),
    "GLORA": ("Glora", {"r": 4}),
    "HIRA": ("Hira", {"r": 4}),
    "HRA": ("HRA", {"r": 4}),
    "LN_TUNING": ("LNTuning", {}),
    "LOHA": ("LoHa", {"r": 4}),
    "LOKR": ("LoKr", {"r": 4}),
    "LORA with init_lora_weights='pissa'": ("Lora", {"init_lora_weights": "pissa"}),
    "LORA with init_lora_weights='olora'": ("Lora", {"init_lora_weights": "olora"}),
    "LORA with init_lora_weights='orthogonal'": ("Lora", {"init_lora_weights": "orthogonal"}),
    "LORA with velora_config": ("Lora", {"velora_config": {}}),
    "MISS with init_weights='bat'": ("Miss", {"r": 4, "init_weights": "bat"}),
    "OSF": ("OSF", {"effective_rank": 8}),
    "PEANUT": ("Peanut", {"r": 4}),
    "PSOFT": ("Psoft", {"r": 4}),
    "SHIRA": ("Shira", {"r": 4}),
    "SUPERTUNING": ("Supertuning", {}),
    "TINYLORA": ("TinyLora", {}),
    "UNILORA": ("UniLora", {}),
}


def net(format: str) -> nn.Sequential:
    """A dense layer between two packed ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, N), nn.Linear(N, K))
    for i in (0, 2):
        model[i] = fa.QuantizedLinear.from_linear(model[i], format)
    return model


def config_of(kind: str, options: dict[str, Any]) -> Any:
    found = getattr(peft, f"{kind}Config", None)
    if found is None:
        pytest.skip(f"this PEFT has no {kind}")
    return found(**ALL | options)


def run(model: Any, method: str) -> dict[str, Tensor]:
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(5)).requires_grad_()
    torch.manual_seed(1)  # PVeRA samples
    y = model.base_model(x[None], task_ids=torch.zeros(1, dtype=torch.long))[0] if method == "poly" else model(x)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads and x.grad is not None
    return {"y": y.detach(), "x": x.grad, **grads}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["int8", "nf4"])
@pytest.mark.parametrize("method", FIT)
def test_a_method_that_fits_does_what_it_does_on_dense_weights(method: str, format: str) -> None:
    base = net(format)
    config, dense = config_of(*FIT[method]), copy.deepcopy(base)
    assert config.peft_type.value in peft_methods.METHODS
    for i in (0, 2):
        dense[i] = dense[i].to_linear()
    layer, kept, models = base[2], base[2].quantized.clone(), []
    for each in (base, dense):
        torch.manual_seed(3)
        models.append(peft.get_peft_model(each, copy.deepcopy(config)))
        noise = torch.Generator().manual_seed(9)
        for p in (p for p in models[-1].parameters() if p.requires_grad):
            p.data += 0.05 * torch.randn(p.shape, generator=noise)
    packed, plain = (run(model, method) for model in models)
    assert packed.keys() == plain.keys()
    for name, want in plain.items():
        torch.testing.assert_close(packed[name], want, rtol=1e-4, atol=1e-5 * max(1.0, float(want.abs().max())))
    if method in ("lily", "poly"):  # PEFT itself cannot merge them
        return
    for model in models:
        model.eval()
        model.merge_adapter()
    truth = fa.quantize(models[1].base_model.model[2].base_layer.weight.detach(), layer.format)
    same = (truth.dequantize() - layer.dequantize()).abs() <= 1e-5 * float(layer.dequantize().abs().max())
    assert same.float().mean() > 0.99  # of a tie either code
    models[0].unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(kept.parts, layer.quantized.parts) if a is not None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["int8", "nf4"])
@pytest.mark.parametrize("method", UNFIT)
def test_a_method_that_reads_the_weight_is_refused_before_anything_changes(method: str, format: str) -> None:
    model = net(format)
    before = list(model)
    config = config_of(UNFIT[method][0], UNFIT[method][1] | {"target_modules": ["1", "2"]})
    with pytest.raises(TypeError, match=f"peft: 2: .*; got {method.replace('(', '.')}; choose one of LORA, .*to_linear"):
        peft.get_peft_model(model, config)
    assert list(model) == before and all(p.requires_grad for p in model[1].parameters())


@pytest.mark.parametrize("target", [["1"], "all-linear", r"[02]", None])
def test_refusal_is_about_the_layers_that_the_adapter_is_for(target: Any) -> None:
    config = peft.HRAConfig(r=4, target_modules=target or ["0", "1"], exclude_modules=None if target else ["0"])
    if target in (["1"], None):
        assert "hra" in str(type(peft.get_peft_model(net("int8"), config).base_model.model[1]))
        return
    with pytest.raises(TypeError, match="got HRA"):
        peft.get_peft_model(net("int8"), config)


def test_single_parameters_of_a_packed_layer_are_refused() -> None:
    with pytest.raises(TypeError, match=r"peft: 2: .*target_parameters=\['2.weight'\]"):
        peft.get_peft_model(net("int8"), peft.LoraConfig(target_modules=[], target_parameters=["1.weight", "2.weight"]))


def test_an_unfit_adapter_added_later_or_from_a_state_is_refused() -> None:
    model = peft.get_peft_model(net("int8"), peft.LoraConfig(target_modules=["0"]))
    layers = list(model.base_model.model)
    for target in (["0"], ["2"]):
        with pytest.raises(TypeError, match=f"peft: {target[0]}: .*got LORA with init_lora_weights='pissa'"):
            model.add_adapter("b", peft.LoraConfig(target_modules=target, init_lora_weights="pissa"))
    state = {"2.hra_u": torch.zeros(1)}
    with pytest.raises(TypeError, match="peft: 2: .*got HRA"):
        peft.inject_adapter_in_model(peft.HRAConfig(target_modules=["1"]), net("int8"), state_dict=state)
    assert list(model.base_model.model) == layers and set(layers[0].lora_A) == {"default"}
    model.add_adapter("b", peft.LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize("first,second", [("Lora", "OFT"), ("OFT", "Lora"), ("Lora", "AdaLora")])
def test_methods_are_not_stacked_on_a_packed_weight(first: str, second: str) -> None:
    options = {"Lora": {"r": 4}, "OFT": {"r": 0, "oft_block_size": 8}, "AdaLora": {"init_r": 4, "total_step": 10}}
    base = net("int8")
    layer, code = base[0], base[0].weight.clone()
    model = peft.get_peft_model(base, config_of(first, options[first]), mixed=True)
    outer = list(model.base_model.model)
    with pytest.raises(TypeError, match=f"peft: .*0: .*got {second.upper()} on top of {first.upper()}"):
        model.add_adapter("b", config_of(second, options[second]))
    assert list(model.base_model.model) == outer
    model.add_adapter("b", config_of(second, options[second] | {"target_modules": ["1"]}))
    model.add_adapter("c", config_of(first, options[first]))
    model.set_adapter(["default", "b"])
    x = torch.randn(3, K)
    y = model(x)
    model.base_model.merge_adapter()
    model.base_model.unmerge_adapter()
    assert torch.equal(layer.weight, code) and torch.allclose(model(x), y, atol=1e-5)

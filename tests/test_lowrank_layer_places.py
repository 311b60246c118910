"""LoRALinear where it stands and what it is given: torch's encoder layers and attention, bases made in inference mode, damaged states, arguments."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fusedadapt as fa
from fusedadapt.lowrank import LoRALinear, lora_linear
from fusedadapt.lowrank.dora import dora_linear_peft

K, N = 10, 7


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_encoder_layers_of_torch_call_it_in_eval_mode_too(method):
    """Their fast path reads weights past the layers."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False)
    x, padding = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    plain = encoder.eval()(x, src_key_padding_mask=padding)
    for layer in encoder.layers:
        for name in ("linear1", "linear2"):
            adapted = LoRALinear.from_linear(getattr(layer, name), r=2, method=method)
            for p in (p for p in adapted.parameters() if p.requires_grad):
                p.data += 0.3
            setattr(layer, name, adapted)
    wanted = encoder.train()(x, src_key_padding_mask=padding)
    for model in (encoder, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x, src_key_padding_mask=padding), wanted, rtol=1e-4, atol=1e-5)
    assert float((wanted - plain).detach().abs().max()) > 0.1
    assert not any("aside" in name for name in encoder.state_dict())


def test_the_output_projection_of_torchs_attention_is_refused():
    attention = nn.MultiheadAttention(16, 2)
    with pytest.raises(TypeError, match="out_proj of nn.MultiheadAttention, which reads its weight"):
        LoRALinear.from_linear(attention.out_proj)
    assert attention.out_proj.weight.requires_grad


@pytest.mark.parametrize("case", ["plain", "general", "packed", "dora"])
def test_a_base_is_saved_for_the_gradient_of_x_only(case):
    """One made in inference mode, which cannot be saved, is trained on then, and one may change in place before backward."""
    torch.manual_seed(0)
    with torch.inference_mode():
        weight, bias = torch.randn(64, 64), torch.randn(64)
        weight = fa.quantize(weight, "nf4") if case == "packed" else weight
    x, a, b = torch.randn(5, 64), torch.randn(2, 64).requires_grad_(), torch.randn(64, 2).requires_grad_()
    options = {"general": {"rank_gate": torch.rand(2)}}.get(case, {})

    def run(x, weight, bias):
        if case == "dora":
            return dora_linear_peft(x, weight, a, b, torch.ones(64), bias=bias, dropout_p=0.3, seed=1)
        return lora_linear(x, weight, a, b, bias=bias, dropout_p=0.3, seed=1, **options)

    got = torch.autograd.grad(run(x, weight, bias).square().sum(), [a, b])
    weight, bias = weight.clone(), bias.clone()
    wanted = torch.autograd.grad(run(x.requires_grad_(), weight, bias).square().sum(), [a, b, x])
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one, other)
    if case != "packed":
        y = run(x.detach(), weight, bias)
        weight.zero_()
        torch.autograd.grad(y.sum(), [a, b])
        y = run(x, weight, bias)
        weight.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), [a, b])


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_layer_on_a_base_of_inference_mode_trains(method):
    torch.manual_seed(0)
    with torch.inference_mode():
        base = nn.Linear(K, N)
    layer = LoRALinear.from_linear(base, r=2, method=method, init=False)
    layer(torch.randn(4, K)).square().sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "extra",
    [
        torch.tensor([float("nan"), 0.0], dtype=torch.float64),
        torch.tensor([float("inf"), 0.0], dtype=torch.float64),
        torch.tensor([1.0, 0.5], dtype=torch.float64),
        torch.tensor([1.0], dtype=torch.float64),
        torch.tensor(1.0, dtype=torch.float64),
        torch.zeros(2, 2, dtype=torch.float64),
        torch.tensor([1.0, 0.0, float("nan")], dtype=torch.float64),
        torch.zeros(3, dtype=torch.uint8),
        (1.0, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_damaged_state_is_refused_before_anything_is_written(extra, assign):
    layer = LoRALinear(K, N, r=2)
    kept = {name: p.clone() for name, p in layer.named_parameters()}
    state = {name: p + 1 for name, p in kept.items()} | {"_extra_state": extra}
    with pytest.raises(RuntimeError, match="_extra_state: expected a finite scaling, and 0 or 1 for merged; got .*; the state is damaged"):
        nn.ModuleDict({"a": layer}).load_state_dict({f"a.{name}": t for name, t in state.items()}, assign=assign)
    assert layer.scaling == 4 and all(torch.equal(p, kept[name]) for name, p in layer.named_parameters())


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"method": ["lora"]}, ValueError, r"expected a method of lora, rslora.*; got \['lora'\]"),
        ({"method": None}, ValueError, "expected a method of lora"),
        ({"method": "vera", "projection": 3}, TypeError, "expected projection: a VeraProjection; got int"),
        ({"method": "vera", "projection_key": "a"}, ValueError, "expected projection_key: an integer; got 'a'"),
        ({"method": "vera", "d_initial": "x"}, ValueError, "expected d_initial: a finite number; got 'x'"),
        ({"method": "vera", "d_initial": float("nan")}, ValueError, "expected d_initial: a finite number; got nan"),
    ],
    ids=str,
)
def test_arguments_of_another_type_are_named(options, error, text):
    base = nn.Linear(K, N)
    with pytest.raises(error, match=text):
        LoRALinear.from_linear(base, r=2, **options)
    assert base.weight.requires_grad

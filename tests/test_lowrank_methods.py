"""Every adapter method against its paper's formula and PEFT's layer: values and all gradients. Iterates the registry."""

import copy
from collections import OrderedDict

import pytest
import torch
from lowrank_layers import CASES, IDS, K, N, build, parameters, randomise, relative, truth
from torch import nn

from fusedadapt.lowrank import METHODS, LoRALinear, VeraProjection
from fusedadapt.reference.lowrank import dropout_mask, threshold_of

#: our parameter -> where PEFT keeps it
PEFT_NAMES = {
    "lora": {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"},
    "dora": {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight", "lora_magnitude": "lora_magnitude_vector.default.weight"},
    "adalora": {name: f"{name}.default" for name in ("lora_A", "lora_E", "lora_B")},
    "vera": {name: f"{name}.default" for name in ("vera_lambda_b", "vera_lambda_d")},
    "ia3": {"ia3_l": "ia3_l.default"},
    "ia3_ff": {"ia3_l": "ia3_l.default"},
}
PEFT_NAMES["rslora"] = PEFT_NAMES["lora"]


def drawn_keep(x, p):
    """The mask the layer's next forward will draw, if torch's generator is seeded the same before it."""
    state = torch.get_rng_state()
    seed = torch.randint(1 << 62, (1,))
    torch.set_rng_state(state)
    return dropout_mask(x.shape[:-1].numel(), x.shape[-1], seed, threshold_of(p))


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize(("shape", "bias"), [((7,), True), ((2, 3), False), ((1,), True), ((), True), ((0,), True)], ids=str)
def test_equals_the_papers_formula(method, options, r, shape, bias):
    layer = build(method, options, r, bias)
    x = torch.randn(*shape, K, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    want, leaf, x64 = truth(layer, x)
    assert y.shape == want.shape and y.dtype == x.dtype
    dy = torch.randn_like(want)
    y.backward(dy)
    want.backward(dy)
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(x.grad, x64.grad, rtol=1e-11, atol=1e-12)
    for name, at in leaf.items():
        torch.testing.assert_close(getattr(layer, name).grad, at.grad, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    assert layer.weight.grad is None


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lower_precision_and_dropout(method, options, dtype, p):
    """16-bit weights with fp32 adapters: y and dx within their own rounding, the adapters' gradients as good as fp32's."""
    layer = build(method, options, 3, dtype=dtype, p=p)
    assert all(getattr(layer, name).dtype == torch.float32 for name in parameters(layer))
    x = torch.randn(40, K).to(dtype).requires_grad_()
    torch.manual_seed(11)
    keep = drawn_keep(x, p) if p and METHODS[method].ranked else None
    want, leaf, x64 = truth(layer, x, keep, p)
    y = layer(x)
    dy = torch.randn(want.shape).to(dtype)
    y.backward(dy)
    want.backward(dy.double())
    own = 1e-6 if dtype == torch.float32 else 4e-3
    assert relative(y, want) <= own and relative(x.grad, x64.grad) <= own * 1.5
    for name, at in leaf.items():
        rounded = dtype == torch.bfloat16 and name in ("lora_magnitude", "ia3_l", "ssf_scale", "ssf_shift")  # from a 16-bit y0, x' or bias
        assert relative(getattr(layer, name).grad, at.grad) <= (4e-3 if rounded else 1e-5), name


def peft_twin(layer, p=0.0):
    """PEFT's layer with the same weights and factors."""
    peft = pytest.importorskip("peft")
    base = nn.Linear(K, N, bias=layer.bias is not None, dtype=layer.weight.dtype)
    base.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")})
    shared = {"target_modules": ["lin"]}
    lora = dict(shared, r=layer.r, lora_alpha=6, lora_dropout=p)
    config = {
        "lora": lambda: peft.LoraConfig(**lora),
        "rslora": lambda: peft.LoraConfig(use_rslora=True, **lora),
        "dora": lambda: peft.LoraConfig(use_dora=True, **lora),
        "adalora": lambda: peft.AdaLoraConfig(init_r=layer.r, lora_alpha=6, lora_dropout=p, total_step=10, **shared),
        "vera": lambda: peft.VeraConfig(r=layer.r, vera_dropout=p, **shared),
        "ia3": lambda: peft.IA3Config(feedforward_modules=[], **shared),
        "ia3_ff": lambda: peft.IA3Config(feedforward_modules=["lin"], **shared),
    }[layer.method]()
    model = peft.get_peft_model(nn.Sequential(OrderedDict(lin=base)), config)
    twin = model.base_model.model.lin
    with torch.no_grad():
        for ours, theirs in PEFT_NAMES[layer.method].items():
            twin.get_parameter(theirs).data = getattr(layer, ours).detach().clone()
    if layer.method == "vera":
        layer.projection.A, layer.projection.B = (t["default"].to(layer.weight.dtype) for t in (twin.vera_A, twin.vera_B))
        twin.vera_A["default"], twin.vera_B["default"] = layer.projection.A, layer.projection.B
    return twin


class Fixed(nn.Module):
    """A dropout whose mask is given."""

    def __init__(self, keep, p):
        super().__init__()
        self.factor = keep.double() * (65536 / (65536 - threshold_of(p)))

    def forward(self, x):
        return x * self.factor.reshape(x.shape).to(x.dtype)


@pytest.mark.parametrize(("method", "options"), [case for case in CASES if case[0] in PEFT_NAMES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_equals_peft(method, options, dtype, p):
    if method == "dora" and p and not options:
        pytest.skip("PEFT has no paper form: dropout in its second dense product too")
    if p and not METHODS[method].ranked:
        pytest.skip("no dropout")
    layer = build(method, options, 3, dtype=dtype, p=p)
    twin = peft_twin(layer, p)
    x = torch.randn(2, 9, K, dtype=dtype, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    torch.manual_seed(5)
    if p:
        dropouts = twin.vera_dropout if method == "vera" else twin.lora_dropout
        dropouts["default"] = Fixed(drawn_keep(x, p), p)
    y, want = layer(x), twin(x2)
    dy = torch.randn_like(want)
    y.backward(dy)
    want.backward(dy)
    limit = {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(y, want, **limit)
    torch.testing.assert_close(x.grad, x2.grad, **limit)
    for ours, theirs in PEFT_NAMES[method].items():
        torch.testing.assert_close(getattr(layer, ours).grad, twin.get_parameter(theirs).grad, **limit, msg=lambda text, n=ours: f"{n}: {text}")
    twin.merge()
    layer.merge()
    torch.testing.assert_close(layer.weight, twin.get_base_layer().weight, **limit)
    torch.testing.assert_close(layer.bias, twin.get_base_layer().bias, **limit)


def test_scaling_laws_are_pefts():
    for method in ("lora", "rslora", "dora"):
        layer = build(method, {}, 5)
        assert layer.scaling == pytest.approx(peft_twin(layer).scaling["default"], rel=1e-15)
    twin = peft_twin(adalora := build("adalora", {}, 5))
    assert adalora.scaling == pytest.approx(twin.scaling["default"] / (5 + 1e-5), rel=1e-15)


def test_vera_projection_is_pefts_and_shared():
    layer = LoRALinear(K, N, r=4, method="vera")
    twin = peft_twin(build("vera", {}, 4, dtype=torch.float32))
    assert torch.equal(layer.projection.A, twin.vera_A["default"]) and torch.equal(layer.projection.B, twin.vera_B["default"])
    shared = VeraProjection(4, 20, 16, key=3)
    model = nn.Sequential(*(LoRALinear(k, 16, r=r, method="vera", projection=shared) for k, r in ((8, 4), (16, 3))))
    twin_model = copy.deepcopy(model).double()
    assert twin_model[0].projection is twin_model[1].projection and twin_model[0].projection.A.dtype == torch.float64
    assert not any("projection" in key for key in model.state_dict())
    with pytest.raises(ValueError, match="make it for the largest layer"):
        LoRALinear(32, 16, r=4, method="vera", projection=shared)
    with torch.device("meta"):
        empty = LoRALinear(K, N, r=4, method="vera")
    for module in empty.to_empty(device="cpu").modules():  # as frameworks fill what they built without memory
        module.reset_parameters()
    assert torch.equal(empty.projection.A, layer.projection.A) and torch.equal(empty.projection.B, layer.projection.B)


@pytest.mark.parametrize(("method", "options"), CASES, ids=IDS)
@pytest.mark.parametrize(("k", "n", "r"), [(1, 1, 1), (1, 5, 4), (7, 1, 2), (3, 2, 9)])
def test_odd_sizes(method, options, k, n, r):
    """One input, one output, a rank above both."""
    torch.manual_seed(2)
    layer = randomise(LoRALinear(k, n, r=r, lora_alpha=6, method=method, dtype=torch.float32, **options))
    x = torch.randn(4, k).requires_grad_()
    want, leaf, x64 = truth(layer, x)
    y = layer(x)
    y.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    for name, at in leaf.items():
        torch.testing.assert_close(getattr(layer, name).grad.double(), at.grad, rtol=1e-4, atol=1e-4)
    layer.merge()
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-4, atol=1e-4)
    layer.unmerge()

"""Initialisations against PEFT's and against what defines them: residual + s B A is the weight, and some factor learns from the first step."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from fusedadapt.lowrank import METHODS, Covariance, Factors, IncrementalPCA, LoRALinear, corda, eva, olora, pissa
from fusedadapt.lowrank.pca import redistribute

K, N = 12, 10
PLAIN = [True, "kaiming", "gaussian", "orthogonal"]
FROM_WEIGHT = ["pissa", "pissa_niter_8", "olora"]
STEP = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # unit roundoff


def peft_layer(base, init, r=4, alpha=6, **more):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["lin"], init_lora_weights=init, **more)
    return peft.get_peft_model(nn.Sequential(OrderedDict(lin=base)), config).base_model.model.lin


def twins(bias=True):
    torch.manual_seed(2)
    base = nn.Linear(K, N, bias=bias)
    twin = nn.Linear(K, N, bias=bias)
    twin.load_state_dict(base.state_dict())
    return base, twin


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"], ids=str)
def test_random_inits_draw_what_peft_draws(init):
    """Same generator, same order of draws. (PEFT's nn.Linear constructors draw first; the last draws decide.)"""
    base, twin = twins()
    layer = LoRALinear.from_linear(base, r=4, lora_alpha=6, init=init)
    theirs = peft_layer(twin, init)
    assert torch.equal(layer.weight, theirs.get_base_layer().weight)
    for ours, other in ((layer.lora_A, theirs.lora_A["default"].weight), (layer.lora_B, theirs.lora_B["default"].weight)):
        assert bool(ours.any()) == bool(other.any())
        if other.any():
            assert float(ours.detach().std()) == pytest.approx(float(other.detach().std()), rel=0.6)
    if init in (True, "gaussian"):
        torch.manual_seed(9)
        layer.reset_adapter(init)
        torch.manual_seed(9)
        theirs.reset_lora_parameters("default", init)
        assert torch.equal(layer.lora_A, theirs.lora_A["default"].weight)
    elif init == "orthogonal":
        torch.manual_seed(9)
        layer.reset_adapter(init)
        torch.manual_seed(9)
        theirs.orthogonal_init("default")
        torch.testing.assert_close(layer.lora_A, theirs.lora_A["default"].weight)
        torch.testing.assert_close(layer.lora_B, theirs.lora_B["default"].weight)


@pytest.mark.parametrize("r", [1, 2, 3, 5])
def test_orthogonal_starts_at_zero_with_both_factors_alive(r):
    layer = LoRALinear(K, N, r=r, init="orthogonal", dtype=torch.float64)
    assert float((layer.lora_B @ layer.lora_A).detach().abs().max()) < 1e-14
    assert layer.lora_A.any() and (r == 1 or layer.lora_B.any())


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("r", [1, 4, 10])
def test_weight_inits_are_pefts(init, r):
    base, twin = twins()
    layer = LoRALinear.from_linear(base, r=r, lora_alpha=6, init=init)
    theirs = peft_layer(twin, init, r)
    a, b = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    torch.testing.assert_close(layer.lora_A, a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.lora_B, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight, theirs.get_base_layer().weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", FROM_WEIGHT)
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.inits])
@pytest.mark.parametrize("dtype", list(STEP), ids=str)
def test_residual_and_adapter_make_the_weight(init, method, dtype):
    torch.manual_seed(0)
    base = nn.Linear(K, N, dtype=dtype)
    weight = base.weight.detach().double().clone()
    layer = LoRALinear.from_linear(base, r=3, lora_alpha=5, method=method, init=init)
    assert base.weight is layer.weight and not torch.equal(layer.weight.double(), weight)
    whole = layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    arithmetic = 1e-14 if dtype == torch.float64 else 1e-6
    one_rounding = float(layer.weight.detach().abs().max()) * STEP[dtype] * 1.01
    assert float((whole - weight).detach().abs().max()) <= one_rounding + arithmetic
    x = torch.randn(5, K, dtype=dtype)
    want = x.double() @ weight.T + base.bias.double()
    assert float((layer(x).double() - want).detach().abs().max()) <= 20 * STEP[dtype] + arithmetic


def test_16_bit_factors_lose_nothing():
    """The residual is taken from the rounded factors, so that their rounding stays in the sum."""
    torch.manual_seed(0)
    weight = torch.randn(N, K)
    for factors in (pissa(weight, 3, 2.0, dtype=torch.bfloat16), olora(weight, 3, 2.0, dtype=torch.bfloat16)):
        assert factors.A.dtype == factors.B.dtype == torch.bfloat16
        torch.testing.assert_close(factors.residual + 2.0 * factors.B.float() @ factors.A.float(), weight, rtol=1e-6, atol=1e-6)


def test_pissa_is_the_best_rank_r_part():
    weight = torch.randn(20, 15, dtype=torch.float64) @ torch.diag(0.6 ** torch.arange(15, dtype=torch.float64))
    full, quick = pissa(weight, 4, 2.0), pissa(weight, 4, 2.0, niter=30)
    singular = torch.linalg.svdvals(weight)
    assert float(full.residual.norm()) == pytest.approx(float(singular[4:].norm()), rel=1e-12)
    torch.testing.assert_close(quick.residual, full.residual, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", list(METHODS))
def test_something_learns_from_the_first_step(name):
    """A product of two zeros has no gradient at all, ever."""
    torch.manual_seed(0)
    inits = [*PLAIN, *FROM_WEIGHT] if METHODS[name].inits else [True]
    for init in inits:
        layer = LoRALinear(K, N, r=4, method=name, init=init)
        layer(torch.randn(6, K)).square().sum().backward()
        assert any(p.grad is not None and bool(p.grad.any()) for p in layer.parameters()), init


@pytest.mark.parametrize("name", [name for name in METHODS if name != "ssf"])
def test_starts_as_what_it_wraps(name):
    torch.manual_seed(0)
    base = nn.Linear(K, N, dtype=torch.float64)
    x = torch.randn(6, K, dtype=torch.float64)
    want = base(x)
    torch.testing.assert_close(LoRALinear.from_linear(base, r=4, method=name)(x), want, rtol=1e-12, atol=1e-12)


# --- CorDA -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_pefts(mode):
    peft = pytest.importorskip("peft")
    pytest.importorskip("attr", reason="PEFT's corda imports attrs without requiring it")
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    base, twin = twins()
    torch.manual_seed(3)
    samples = [torch.randn(1, 40, K) + 0.5 for _ in range(4)]
    samples = [x * torch.where(x.max() < x.abs().max(), -1, 1) for x in samples]  # PEFT divides by the signed maximum
    model = nn.Sequential(OrderedDict(lin=twin))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["lin"], init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode))
    preprocess_corda(model, config, run_model=lambda: [model(x) for x in samples])
    theirs = peft.get_peft_model(model, config).base_model.model.lin
    covariance = Covariance()
    for x in samples:
        covariance.add(x)
    weight = base.weight.detach().clone()
    layer = LoRALinear.from_linear(base, r=4, lora_alpha=6, init=corda(base.weight, covariance.value, 4, 1.5, mode=mode))
    a, b = theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach()
    torch.testing.assert_close(layer.lora_B @ layer.lora_A, b @ a, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(layer.lora_A.abs(), a.abs(), rtol=2e-3, atol=2e-3)  # singular vectors' signs are free
    torch.testing.assert_close(layer.weight, theirs.get_base_layer().weight, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(layer.weight + 1.5 * layer.lora_B @ layer.lora_A, weight, rtol=1e-5, atol=1e-6)


def test_corda_at_its_edges():
    torch.manual_seed(0)
    weight = torch.randn(N, K)
    low = torch.randn(3, K)
    factors = corda(weight, low.T @ low, 3, 2.0)  # a covariance of rank 3: damped until it inverts
    torch.testing.assert_close(factors.residual + 2.0 * factors.B @ factors.A, weight, rtol=1e-4, atol=1e-5)
    assert float((low @ factors.residual.T).norm() / (low @ weight.T).norm()) < 0.1  # the inputs' directions went into the adapter
    for bad in (torch.zeros(K, K), torch.full((K, K), float("nan")), torch.eye(K + 1)):
        with pytest.raises(ValueError, match="corda: expected a finite covariance"):
            corda(weight, bad, 3, 2.0)
    with pytest.raises(ValueError, match="mode"):
        corda(weight, torch.eye(K), 3, 2.0, mode="x")
    collected = Covariance()
    with pytest.raises(ValueError, match="at least one sample"):
        _ = collected.value
    with pytest.raises(ValueError, match="finite inputs"):
        collected.add(torch.tensor([[float("inf")]]))
    one, two = Covariance(), Covariance()
    batch = torch.randn(3, 5, K)
    one.add(batch)
    for x in batch:
        two.add(x)
    torch.testing.assert_close(one.value, two.value)


# --- EVA -------------------------------------------------------------------------------------------------------------------------------------


def test_incremental_pca_is_pca():
    torch.manual_seed(0)
    x = torch.randn(300, 20, dtype=torch.float64) * torch.linspace(5, 0.1, 20, dtype=torch.float64) + 3
    pca = IncrementalPCA(20)
    for part in x.split([7, 50, 13, 130, 100]):  # 7 rows: wait for the next
        pca.update(part)
    _, s, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    torch.testing.assert_close(pca.singular, s, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((pca.components * vh).sum(1).abs(), torch.ones(20, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pca.variance_ratio, s.square() / s.square().sum(), rtol=1e-9, atol=1e-12)


def test_incremental_pca_of_too_few_directions_stays_orthonormal():
    torch.manual_seed(0)
    x = torch.randn(50, 2, dtype=torch.float64) @ torch.randn(2, 16, dtype=torch.float64)
    for rows in (8, 50):
        pca = IncrementalPCA(6)
        pca.update(x[:rows])
        torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(6, dtype=torch.float64))
        assert float(pca.variance_ratio[:2].sum()) == pytest.approx(1) and float(pca.variance_ratio[2:].max()) < 1e-12
    pca.update(torch.zeros(6, 16))
    assert torch.isfinite(pca.components).all()


def test_redistribute():
    ratios = {"a": torch.tensor([0.5, 0.1]), "b": torch.tensor([0.9, 0.5, 0.2]), "c": torch.tensor([0.01])}
    assert redistribute(ratios, 4) == {"a": 1, "b": 3, "c": 0}
    assert redistribute(ratios, 2) == {"a": 1, "b": 1, "c": 0}  # a tie at 0.5: the earlier layer


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 16)

    def forward(self, x):
        return self.out(torch.tanh(self.q(x) * self.k(x)))


@pytest.mark.parametrize(("rho", "whiten"), [(1.0, False), (2.0, False), (2.0, True)])
def test_eva_is_pefts(rho, whiten):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.config import EvaConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    torch.manual_seed(1)
    model = Block().eval()
    scale = 4 * 0.6 ** torch.arange(16)  # PEFT's SVD is a randomised one: a fast decay makes it exact
    names = ["q", "out"] if whiten else ["q", "k", "out"]  # PEFT whitens components that two layers share twice
    batches = [torch.randn(4, 32, 16) * scale + 0.3 for _ in range(3)]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, init_lora_weights="eva", eva_config=EvaConfig(rho=rho, tau=0.99, whiten=whiten))
    want = get_eva_state_dict(
        model, batches, config, forward_fn=lambda m, x: m(x), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
    )
    layers = {name: getattr(model, name) for name in names}
    got = eva(layers, model, batches, 3, 6, rho=rho, whiten=whiten)
    assert sum(len(init.A) for init in got.values()) == 3 * len(names)
    for name, init in got.items():
        assert len(init.A) == len(want[name]), name
        assert init.lora_alpha == pytest.approx(6 * len(init.A) / 3)
        torch.testing.assert_close(init.A, want[name].float(), rtol=1e-3, atol=1e-3)
        if len(init.A):
            layer = LoRALinear.from_linear(layers[name], r=len(init.A), lora_alpha=init.lora_alpha, init=init.A)
            assert layer.scaling == pytest.approx(2) and torch.equal(layer.lora_A, init.A) and not layer.lora_B.any()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_eva_says_what_is_wrong():
    model = Block()
    with pytest.raises(ValueError, match="layers and batches"):
        eva({"q": model.q}, model, [], 2, 2)
    with pytest.raises(ValueError, match="saw no input"):
        eva({"q": model.q, "other": nn.Linear(3, 3)}, model, [torch.randn(9, 16)], 2, 2)
    with pytest.raises(ValueError, match="input rows"):
        eva({"q": model.q}, model, [torch.randn(3, 16)], 4, 4)
    with pytest.warns(UserWarning, match="not converged"):
        eva({"q": model.q}, model, [torch.randn(32, 16), torch.randn(32, 16)], 4, 4, tau=1.1, max_steps=3)
    assert not model.q._forward_pre_hooks


# --- errors ----------------------------------------------------------------------------------------------------------------------------------


def test_errors_change_nothing():
    base = nn.Linear(K, N)
    weight = base.weight.detach().clone()
    for init in ("svd", "pissa_niter_x", None, 3, torch.zeros(2, 2), Factors(torch.zeros(4, K), torch.zeros(N, 3), weight)):
        with pytest.raises(ValueError, match="LoRALinear: expected"):
            LoRALinear.from_linear(base, r=4, init=init)
    with pytest.raises(ValueError, match="rank of 1 to 10"):
        LoRALinear.from_linear(base, r=11, init="pissa")
    with pytest.raises(ValueError, match="rank of 1 to 10"):
        olora(base.weight, 0, 1.0)
    for alpha in (0, -2):  # the root of S / s: the layer and the weight it shares would be nan
        with pytest.raises(ValueError, match="pissa: expected a positive scaling"):
            LoRALinear.from_linear(base, r=4, lora_alpha=alpha, init="pissa")
    for scaling in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="corda: expected a positive scaling"):
            corda(base.weight, torch.eye(K), 3, scaling)
    with pytest.raises(ValueError, match="floating-point matrix"):
        pissa(torch.zeros(4, 4, dtype=torch.int8), 2, 1.0)
    with pytest.raises(ValueError, match="expected init=True"):
        LoRALinear.from_linear(base, method="adalora", init="pissa")
    assert torch.equal(base.weight, weight) and base.weight.requires_grad

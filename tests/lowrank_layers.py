"""Adapted layers for tests: every method of the registry, randomised, and what it should compute by its paper's formula."""

import torch
from torch import nn

from fusedadapt.lowrank import METHODS, LoRALinear
from fusedadapt.reference.lowrank import threshold_of

CASES = [(method, {}) for method in METHODS] + [("dora", {"dropout_form": "peft"})]
IDS = [method + "".join(f"-{v}" for v in options.values()) for method, options in CASES]
K, N = 12, 10


def randomise(layer, seed=3):
    """Non-zero everywhere: what starts at zero hides errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in parameters(layer):
            p = getattr(layer, name)
            spread = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3
            p.copy_(spread + (1 if name in ("lora_magnitude", "ia3_l", "ssf_scale") else 0))
    return layer


def parameters(layer):
    return [part.name for part in METHODS[layer.method].parts]


def build(method, options, r=3, bias=True, dtype=torch.float64, p=0.0, **more):
    torch.manual_seed(1)
    base = nn.Linear(K, N, bias=bias, dtype=dtype)
    return randomise(LoRALinear.from_linear(base, r=r, lora_alpha=6, lora_dropout=p, method=method, **options, **more))


def truth(layer, x, keep=None, p=0.0):
    """The layer by its paper's formula, in fp64, from the parameters' dense products. Returns (y, fp64 leaves of its parameters, fp64 x)."""
    leaf = {name: getattr(layer, name).detach().double().requires_grad_() for name in parameters(layer)}
    x = x.detach().double().requires_grad_()
    w = layer.weight.detach().double()
    b = torch.zeros(w.shape[0], dtype=w.dtype) if layer.bias is None else layer.bias.detach().double()
    flat = x.reshape(-1, x.shape[-1])
    xd = flat if keep is None else flat * keep * (65536 / (65536 - threshold_of(p)))
    kind, s = layer.method, {"lora": 6 / max(layer.r, 1), "dora": 6 / max(layer.r, 1), "rslora": 6 / max(layer.r, 1) ** 0.5}.get(layer.method, 1.0)
    if kind in ("lora", "rslora"):
        y = flat @ w.T + s * xd @ leaf["lora_A"].T @ leaf["lora_B"].T + b
    elif kind == "dora":
        delta = s * leaf["lora_B"] @ leaf["lora_A"]
        g = leaf["lora_magnitude"] / (w + delta).norm(dim=1).detach()
        if layer.options["dropout_form"] == "peft":
            y = flat @ w.T + b + (g - 1) * (xd @ w.T) + g * (xd @ delta.T)
        else:
            y = g * (flat @ w.T + xd @ delta.T) + b
    elif kind == "adalora":
        y = flat @ w.T + 6 / (layer.r + 1e-5) * xd @ (leaf["lora_B"] @ (leaf["lora_A"] * leaf["lora_E"])).T + b
    elif kind == "vera":
        a, m = (t.double() for t in (layer.projection.A[: layer.r, : w.shape[1]], layer.projection.B[: w.shape[0], : layer.r]))
        y = flat @ w.T + leaf["vera_lambda_b"] * ((leaf["vera_lambda_d"] * (xd @ a.T)) @ m.T) + b
    elif kind == "ia3":
        y = leaf["ia3_l"].flatten() * (flat @ w.T + b)
    elif kind == "ia3_ff":
        y = (flat * leaf["ia3_l"].flatten()) @ w.T + b
    else:
        y = leaf["ssf_scale"] * (flat @ w.T + b) + leaf["ssf_shift"]
    return y.reshape(*x.shape[:-1], w.shape[0]), leaf, x


def relative(got, want):
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm().clamp_min(1e-30))

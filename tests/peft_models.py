"""Small PEFT models and what the tests of `fa.patch` measure on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedadapt as fa
from fusedadapt.reference.lowrank import threshold_of

peft = pytest.importorskip("peft")
WIDTH = 16


@pytest.fixture
def on_reference() -> Iterator[None]:
    with fa.backend("reference"):
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and on a busy machine they wait for it: minutes instead of seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    """Attention and an MLP with the module names of a Llama layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=i % 2 == 0) for i in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up", "down"]


def lora(**changes: Any) -> Any:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "init_lora_weights": False} | changes
    return peft.LoraConfig(**options)


def build(config: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(Block(), Block()).to(dtype), config, **options)
    return shaken(model)


def shaken(model: Any) -> Any:
    """Gives zero-initialized adapter vectors values that matter."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("lora_E", "lambda", "ia3_l", "magnitude")):
                p.add_(0.1 * torch.randn_like(p))
    return model


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def layer_of(model: Any, name: str = "0.q_proj") -> Any:
    return model.get_submodule(f"base_model.model.{name}")


def results(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of everything trained, and of x."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    named = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters() if p.requires_grad}
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).to(y.dtype)
    grads = torch.autograd.grad(y, [x, *named.values()], dy, allow_unused=True)
    found = {"y": y.detach(), "x": grads[0]} | dict(zip(named, grads[1:], strict=True))
    return {name: g for name, g in found.items() if g is not None}


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "rslora": lambda: lora(use_rslora=True),
    "bias": lambda: lora(lora_bias=True),
    "dora": lambda: lora(use_dora=True),
    "mixed ranks": lambda: lora(rank_pattern={"up": 1, "down": 7}, alpha_pattern={"q_proj": 3}),
    "dropout": lambda: lora(lora_dropout=0.3),
    "dora dropout": lambda: lora(use_dora=True, lora_dropout=0.3),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_modules=ALL, total_step=10),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"], init_weights=False),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down"], feedforward_modules=["down"]),
}


class Injected(nn.Module):
    """Dropout with a mask from outside, in the place of PEFT's."""

    def __init__(self, keep: Tensor, p: float) -> None:
        super().__init__()
        self.keep, self.scale = keep, 65536 / (65536 - threshold_of(p))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.keep.reshape(x.shape) * self.scale

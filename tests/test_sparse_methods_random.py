"""Random masks, SHiRA, HFT, RigL and SET: schedules and selections against references written from the papers, frozen weights bit for bit."""

from __future__ import annotations

import importlib.util
import math
import sys
import types

import pytest
import torch
from torch import nn

import fusedadapt as fa
from fusedadapt.sparse import (
    SET,
    RigL,
    cosine_fraction,
    densities,
    half_fine_tuning_,
    random_mask,
    shira_,
    shira_delta,
    sparse_init_,
)


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def backward(model: nn.Module, seed: int = 0) -> None:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(seed))
    (model(x) - 1.0).square().mean().backward()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# ---- random masks


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 5), (64, 33), ()])
def test_random_mask_is_exact_and_repeatable(shape):
    n = math.prod(shape)
    for k in {0, 1 if n else 0, n // 2, n * 3 // 4, n}:
        mask = random_mask(shape, k=k, seed=3, name="a")
        assert mask.nnz == k and tuple(mask.shape) == shape
        assert torch.equal(mask.words, random_mask(shape, k=k, seed=3, name="a").words)
    if n > 30:
        assert random_mask(shape, k=n // 2, seed=3, name="a") != random_mask(shape, k=n // 2, seed=4, name="a")
        assert random_mask(shape, k=n // 2, seed=3, name="a") != random_mask(shape, k=n // 2, seed=3, name="b")
    for bad in ({"density": 1.5}, {"k": n + 1}, {}, {"k": 0, "density": 0.0}):
        with pytest.raises(ValueError, match="random_mask"):
            random_mask(shape, **bad)


def test_random_mask_is_uniform():
    counts = sum(random_mask((20,), k=6, seed=s).to_bool().int() for s in range(2000))
    assert counts.sum() == 12000
    # 600 expected each, standard deviation sqrt(2000 * 0.3 * 0.7) = 20.5
    assert ((counts - 600).abs() < 5 * 20.5).all()
    chi2 = float(((counts - 600.0) ** 2 / 600.0).sum())
    assert chi2 < 19 * 0.7 + 5 * (2 * 19) ** 0.5


# ---- SHiRA and HFT


def test_shira():
    model = small_model(4)
    x, start = torch.randn(5, 12), snapshot(model)
    y = model(x)
    layers = shira_(model, 2, seed=1, target=lambda name, layer: layer.in_features == 12)
    assert list(layers) == ["0"] and model[0] is layers["0"] and layers["0"].values.numel() == 2 * (12 + 20)
    assert torch.equal(model(x), y)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.values"]
    optimizer = fa.optim.AdamW([layer.values for layer in layers.values()], lr=0.05)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    tuned = model(x)
    keep = layers["0"].mask.to_bool()
    assert not torch.equal(tuned, y) and same_bits(model[0].weight.detach()[~keep], start["0.weight"][~keep])
    fresh = small_model(4)
    delta = shira_delta(layers)
    delta.apply_(fresh)
    torch.testing.assert_close(fresh(x), tuned)
    layers["0"].disable()
    assert same_bits(model[0].weight.detach(), start["0.weight"])
    again = shira_(small_model(4), 2, seed=1, target=lambda name, layer: name == "0")
    assert again["0"].mask == layers["0"].mask


def test_shira_bad_input_changes_nothing():
    model = small_model()
    for kwargs, words in (({"r": 5}, r"2: \(6, 20\)"), ({"r": 0}, "r=0"), ({"target": lambda n, x: False}, "chose none"), ({"masks": {}}, "'0'")):
        with pytest.raises(ValueError, match=words):
            shira_(model, **kwargs)
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())
    masks = {n: random_mask(model.get_parameter(f"{n}.weight").shape, k=3) for n in ("0", "2")}
    assert shira_(model, masks=masks)["2"].values.numel() == 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({n: nn.Linear(4, 4, bias=False) for n in "qkvo"})
        self.mlp = nn.ModuleDict({n: nn.Linear(4, 4, bias=False) for n in ("gate", "up", "down")})


def test_half_fine_tuning():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "blocks": nn.ModuleList([Block() for _ in range(6)])})
    seen = set()
    for stage in range(3):
        model.blocks[0].attn["q"].weight.grad = torch.ones(4, 4)
        trained = half_fine_tuning_(model, stage, seed=5, always=["embed.weight"])
        assert trained == half_fine_tuning_(model, stage, seed=5, always=["embed.weight"])
        assert trained == [n for n, p in model.named_parameters() if p.requires_grad] and "embed.weight" in trained
        assert len(trained) == 1 + 21  # half of 6 * 7
        for i in range(6):
            assert sum(n.startswith(f"blocks.{i}.attn") for n in trained) == 2
            assert sum(n.startswith(f"blocks.{i}.mlp") for n in trained) == (2 if i % 2 == 0 else 1)
        assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
        seen.add(tuple(trained))
    assert len(seen) == 3
    with pytest.raises(ValueError, match="head"):
        half_fine_tuning_(model, always=["head.weight"])


def test_half_fine_tuning_freezes_bits():
    model = small_model()
    optimizer = fa.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for stage in range(3):
        trained, before = half_fine_tuning_(model, stage), snapshot(model)
        backward(model, stage)
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            assert same_bits(p.detach(), before[name]) != (name in trained)


# ---- RigL and SET


def test_cosine_fraction():
    for step in range(0, 120, 7):
        expected = 0.15 * (1 + math.cos(math.pi * step / 100)) if step < 100 else 0.0
        assert cosine_fraction(step, until=100, fraction=0.3) == pytest.approx(expected, abs=1e-15)
    for bad in ({"until": 0}, {"until": 5, "fraction": 1.5}):
        with pytest.raises(ValueError, match="cosine_fraction"):
            cosine_fraction(0, **bad)


def test_sparse_init():
    model = small_model(5)
    masks = sparse_init_(model, 0.3, seed=2)
    share = densities({"0.weight": (20, 12), "2.weight": (6, 20)}, 0.3, "erk")
    for name in share:
        p = model.get_parameter(name)
        assert masks[p].nnz == math.floor(share[name] * p.numel())
        assert torch.equal(p != 0, masks[p].to_bool()) and not p[~masks[p].to_bool()].signbit().any()
    other = small_model(5)
    assert all(a == b for a, b in zip(masks.values(), sparse_init_(other, 0.3, seed=2).values(), strict=True))


@pytest.mark.parametrize(("kind", "grow"), [(RigL, "gradient"), (SET, "random")])
def test_exchange_schedule(monkeypatch, kind, grow):
    """Which calls the schedule makes, without the exchange itself."""
    calls = []
    stub = types.ModuleType("fusedadapt.sparse.grow")
    stub.grow_prune = lambda optimizer, p, **options: calls.append((optimizer, p, options))
    monkeypatch.setitem(sys.modules, "fusedadapt.sparse.grow", stub)
    model = small_model()
    masks = sparse_init_(model, 0.4)
    optimizer = fa.optim.SGD(model.parameters(), lr=0.1, masks=masks)
    with pytest.raises(ValueError, match="got none"):
        kind(optimizer, [], until=10)
    with pytest.raises(ValueError, match="anneal"):
        kind(optimizer, masks, until=10, anneal="linear")
    schedule = kind(optimizer, masks, until=9, every=3, seed=1)
    exchanged = []
    for step in range(1, 13):
        backward(model, step)
        before = snapshot(model)
        if schedule.step():
            exchanged.append(step)
            assert torch.equal(model[0].weight, before["0.weight"]) == (kind is RigL)  # RigL's exchange replaces the step
        else:
            assert not torch.equal(model[0].weight, before["0.weight"])
        optimizer.zero_grad()
        assert all(not p[~m.to_bool()].any() for p, m in masks.items())
    assert exchanged == [3, 6] and len(calls) == 4
    assert all(c[0] is optimizer and c[2]["grow"] == grow and c[2]["score"] == "magnitude" for c in calls)
    assert [c[1] for c in calls[:2]] == list(masks) and len({c[2]["seed"] for c in calls}) == 4
    expected = [cosine_fraction(s, until=9) if kind is RigL else 0.3 for s in (3, 3, 6, 6)]
    assert [c[2]["fraction"] for c in calls] == pytest.approx(expected)
    copied = kind(optimizer, masks, until=9, every=3)
    copied.load_state_dict(schedule.state_dict())
    assert copied.steps == 12
    if kind is RigL:
        with pytest.raises(RuntimeError, match="gradient"):
            schedule.exchange()


@pytest.mark.skipif(importlib.util.find_spec("fusedadapt.sparse.grow") is None, reason="grow_prune is not there")
@pytest.mark.parametrize("kind", [RigL, SET])
def test_exchange_keeps_the_count_and_zero_outside(kind):
    model = small_model()
    masks = sparse_init_(model, 0.4)
    optimizer = fa.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, masks=masks)
    schedule, active = kind(optimizer, masks, until=50, every=2), {p: m.nnz for p, m in masks.items()}
    first = {p: p.detach() != 0 for p in masks}
    for step in range(10):
        backward(model, step)
        schedule.step()
        optimizer.zero_grad()
    backward(model)
    optimizer.step()
    for p, k in active.items():
        assert int((p != 0).sum()) <= k
        assert not torch.equal(p != 0, first[p])

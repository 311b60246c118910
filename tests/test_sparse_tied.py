"""Methods on models whose layers share weights, stand in several places, or follow other parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fusedadapt as fa
from fusedadapt.sparse import (
    LTSFT,
    ColumnStats,
    GradualMagnitudePruning,
    MaskedLinear,
    prune_model_,
    random_mask,
    shira_,
    sparse_init_,
)


class Tied(nn.Module):
    """An output layer tied to the embedding, and one layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.head = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 20, bias=False)
        self.b = self.a
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.embed(x)).relu()))


def test_pruning_tied_weights() -> None:
    """Once, in all places, under the name that `named_parameters` has; not at all when one of the places is skipped."""
    model = Tied()
    report = prune_model_(model, 0.5)
    assert set(report.masks) == {"embed.weight", "a.weight"} and report.density == 0.5
    assert {n for n, p in model.named_parameters() if n in report.masks} == set(report.masks)
    assert bool((model.embed.weight[~report.masks["embed.weight"].to_bool()] == 0).all()) and model.head.weight is model.embed.weight
    for skip in (["head"], ["embed"], ["embed", "b"], ["b"]):
        model = Tied()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        names = set() if len(skip) > 1 else {"embed.weight"} if skip == ["b"] else {"a.weight"}
        assert set(prune_model_(model, 0.5, skip=skip).masks) == names
        assert all(torch.equal(p, start[n]) == (n not in names) for n, p in model.named_parameters())
    model, x = Tied(), torch.arange(20)
    with ColumnStats.collect(model) as stats, torch.no_grad():
        model(x)
    with pytest.raises(ValueError, match=r"share one: \[\['embed.weight', 'head.weight'\]\]; skip"):
        prune_model_(model, 0.5, method="wanda", stats=stats)
    assert set(prune_model_(model, 0.5, method="wanda", stats=stats, skip=["head"]).masks) == {"a.weight"}


def test_skipping_a_module_skips_what_is_inside() -> None:
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "blocks": nn.Linear(4, 4)})
    assert set(prune_model_(model, 0.5, skip=["block"]).masks) == {"blocks.weight"}
    assert not prune_model_(model, 0.5, skip=[""]).masks


def test_weights_that_follow_other_parameters_are_not_pruned() -> None:
    """It would not last: the next forward pass writes them again."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    start = model[0].weight.detach().clone()
    for made in (torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), MaskedLinear(4, 4, mask=torch.eye(4) > 0)):
        model[1] = made
        with pytest.raises(ValueError, match="'1', whose weight follows other parameters"):
            prune_model_(model, 0.5)
        assert torch.equal(model[0].weight, start) and set(prune_model_(copy.deepcopy(model), 0.5, skip=["1"]).masks) == {"0.weight"}


def test_a_tensor_under_two_names_counts_once() -> None:
    w, v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
    named = {"a": w, "b": v, "c": w}
    assert LTSFT(named, density=0.5)._shares == [64] and set(LTSFT(named, k=3).params) == {"a", "b"}
    pruner = GradualMagnitudePruning(named, end=1, final=0.5)
    assert pruner.step() and [m.nnz for m in pruner.masks.values()] == [32, 32]
    masks = sparse_init_(named, 0.25, method="uniform")
    assert len(masks) == 2 and all(int((p != 0).sum()) <= m.nnz == 16 for p, m in masks.items())


def test_shira_and_tied_weights() -> None:
    model, x = Tied(), torch.arange(20)
    kept = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"share one: \[\['embed.weight', 'head.weight'\]\]; leave them out with target="):
        shira_(model, 2)
    assert kept == {n: p.requires_grad for n, p in model.named_parameters()}
    layers = shira_(model, 2, target=lambda name, layer: name != "head")
    assert list(layers) == ["a"] and model.b is model.a is layers["a"], "a layer that stands in two places is one layer"
    model(x).square().sum().backward()
    fresh = copy.deepcopy(model.a.to_linear())
    w = fresh.weight
    fresh_model = Tied()
    fresh_model.embed.weight, fresh_model.a, fresh_model.b = model.embed.weight, fresh, fresh
    fresh_model.head.weight = model.embed.weight
    fresh_model(x).square().sum().backward()
    torch.testing.assert_close(layers["a"].values.grad, w.grad.flatten()[layers["a"].mask.indices().long()])


def test_shira_leaves_a_model_as_it_was_when_a_layer_does_not_fit() -> None:
    model = nn.Sequential(nn.Linear(12, 12), fa.QuantizedLinear.from_linear(nn.Linear(64, 64)))
    for kwargs in ({}, {"masks": {"0": random_mask((12, 12), k=3), "1": random_mask((3, 3), k=3)}}):
        with pytest.raises((TypeError, ValueError)):
            shira_(model, 2, **kwargs)
        assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    with pytest.raises(TypeError, match="weight and bias are its parameters.*parametrization"):
        MaskedLinear.from_linear(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), torch.eye(4) > 0)

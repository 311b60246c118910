"""The published methods: schedules and selections against references written from the papers, frozen weights bit for bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fusedadapt as fa
from fusedadapt.sparse import (
    LTSFT,
    ColumnStats,
    GradualMagnitudePruning,
    Mask,
    SaRA,
    SparseDelta,
    compose,
    cubic_sparsity,
    densities,
    nm_mask,
    prune_model_,
    random_mask,
    sara_lr,
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


# ---- magnitude pruning


@pytest.mark.parametrize("amount", [0.0, 0.25, 0.5, 1.0])
def test_global_magnitude_equals_torch_prune(amount):
    model, oracle = small_model(), small_model()
    layers = [(m, "weight") for m in oracle if isinstance(m, nn.Linear)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=amount)
    report = prune_model_(model, 1 - amount)
    for (layer, _), name in zip(layers, ("0.weight", "2.weight"), strict=True):
        assert torch.equal(report.masks[name].to_bool(), layer.weight_mask.bool())
        assert torch.equal(model.get_parameter(name), layer.weight)


def test_local_magnitude_densities_convolutions_and_n_of_m():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 5))
    oracle = copy.deepcopy(model)
    prune.l1_unstructured(oracle[0], "weight", amount=0.75)
    prune.l1_unstructured(oracle[2], "weight", amount=0.5)
    pruned = copy.deepcopy(model)
    report = prune_model_(pruned, {"0.weight": 0.25, "2.weight": 0.5})
    assert torch.equal(pruned[0].weight, oracle[0].weight) and torch.equal(pruned[2].weight, oracle[2].weight)
    assert report.densities == {"0.weight": 0.25, "2.weight": 0.5}
    assert prune_model_(copy.deepcopy(model), densities(model, 0.4, "erk")).density == pytest.approx(0.4, abs=0.01)
    rows = prune_model_(copy.deepcopy(model), 0.5, scope="row", skip=["2"]).masks["0.weight"].to_bool()
    assert (rows.flatten(1).sum(1) == 18).all()
    two = prune_model_(model, n=2, m=4).masks["0.weight"]
    assert torch.equal(two.to_bool().flatten(1), nm_mask(oracle[0].weight_orig.flatten(1), 2, 4).to_bool())


def test_layers_that_keep_inputs_first_are_pruned_or_refused_by_name():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(1)
    model = nn.ModuleDict({"a": transformers.Conv1D(12, 8), "up": nn.ConvTranspose2d(4, 6, 3), "b": nn.Linear(12, 5)})
    w = torch.cat([p.detach().abs().flatten() for name, p in model.named_parameters() if name.endswith("weight")])
    for name in ("a", "up"):
        with pytest.raises(ValueError, match=f"'{name}', whose weight has one input a row"):
            prune_model_(nn.ModuleDict({name: model[name]}), 0.5, scope="row")
    with pytest.raises(ValueError, match="Conv1D 'a'"):
        prune_model_(model, n=2, m=4)
    for method in ("magnitude", "wanda"):
        with pytest.raises(ValueError, match="at least one"):
            prune_model_(nn.LayerNorm(4), 0.5, method=method, stats={})
    report = prune_model_(model, 0.5)
    assert set(report.masks) == {"a.weight", "up.weight", "b.weight"} and report.density == 0.5
    assert all(model.get_parameter(name).detach().abs()[mask.to_bool()].min() >= w.median() for name, mask in report.masks.items())


def test_prune_keeps_bits_and_zeroes_nan_outside():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, math.nan, -3.0, 4.0], [-0.0, 0.0, 1e-40, 5.0]]))
    report = prune_model_(model, 0.5)
    assert report.masks["weight"].to_bool().tolist() == [[False, True, True, True], [False, False, False, True]]
    assert model.weight[0, 1].isnan() and not model.weight[1, 0].signbit() and not model.weight[0, 0].signbit()


def test_cubic_sparsity():
    for step in range(-3, 30):
        t = min(max(step - 4, 0), 20)
        expected = 0.9 + (0.1 - 0.9) * (1 - t / 20) ** 3 if step >= 4 else 0.1
        assert cubic_sparsity(step, start=4, end=24, initial=0.1, final=0.9) == pytest.approx(expected, abs=1e-15)
    assert cubic_sparsity(24, start=4, end=24, final=0.9) == 0.9
    for bad in ({"start": 5, "end": 5, "final": 0.5}, {"start": 0, "end": 5, "final": 1.5}):
        with pytest.raises(ValueError, match="cubic_sparsity"):
            cubic_sparsity(0, **bad)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_gradual_magnitude_pruning(scope):
    model = small_model()
    params = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = GradualMagnitudePruning(params, start=2, end=10, final=0.8, every=4, scope=scope)
    changed, previous = [], {n: Mask.full(p.shape, True) for n, p in params.items()}
    for step in range(1, 14):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        if pruner.step():
            changed.append(step)
        for name, p in params.items():
            if p in pruner.masks:
                mask = pruner.masks[p]
                assert not p[~mask.to_bool()].any() and (mask - previous[name]).nnz == 0
                previous[name] = mask
    assert changed == [2, 6, 10]
    kept, n = sum(m.nnz for m in pruner.masks.values()), sum(p.numel() for p in params.values())
    assert kept == round(0.2 * n)
    final = fa.optim.AdamW(list(params.values()), lr=0.01, weight_decay=0.1, masks=pruner.masks)
    backward(model)
    final.step()
    assert all(not p[~pruner.masks[p].to_bool()].any() for p in params.values())
    with pytest.raises(ValueError, match="every"):
        GradualMagnitudePruning(params, end=5, final=0.5, every=0)


# ---- SaRA


def test_sara_trains_the_small_weights_only():
    model = small_model(2)
    start = snapshot(model)
    sara = SaRA(model, lambda masks: fa.optim.AdamW(list(masks), lr=0.02, weight_decay=0.1, masks=masks), threshold=0.1, progressive_step=4)
    by_name = {n: sara.masks[p].to_bool() for n, p in model.named_parameters() if p in sara.masks}
    assert all(torch.equal(by_name[n], start[n].abs() < 0.1) for n in by_name)
    first, middle = sara.optimizer, {}
    for step in range(1, 9):
        backward(model, step)
        sara.step()
        sara.zero_grad()
        if step == 4:
            middle = snapshot(model)
            assert sara.optimizer is not first
            for n, p in model.named_parameters():
                expected = by_name.get(n, torch.zeros_like(p, dtype=torch.bool)) & (middle[n].abs() < 0.1)
                got = sara.masks[p].to_bool() if p in sara.masks else torch.zeros_like(expected)
                assert torch.equal(got, expected)
    assert sara.nnz < sum(int(m.sum()) for m in by_name.values())
    for n, p in model.named_parameters():
        frozen = ~by_name.get(n, torch.zeros_like(p, dtype=torch.bool))
        assert same_bits(p.detach()[frozen], start[n][frozen])
        later = ~sara.masks[p].to_bool() if p in sara.masks else torch.ones_like(frozen)
        assert same_bits(p.detach()[later], middle[n][later])
        assert p.grad is None
    assert not torch.equal(model[0].weight, start["0.weight"])


def test_sara_edges():
    make = lambda masks: torch.optim.SGD(list(masks), lr=0.1)
    p = nn.Parameter(torch.tensor([0.0, -0.0, math.nan, 0.1, -0.1, 0.05], dtype=torch.bfloat16))
    assert SaRA({"p": p}, make, threshold=0.1).masks[p].to_bool().tolist() == [True, True, False, False, False, True]  # bf16(0.1) > 0.1
    again = SaRA({"p": p}, make, threshold=0.1)
    with torch.no_grad():
        p[3] = 0.0  # frozen, and moved by someone else: not taken in
    again.reselect()
    assert again.masks[p].to_bool().tolist() == [True, True, False, False, False, True]
    with pytest.raises(ValueError, match="none is smaller"):
        SaRA({"p": nn.Parameter(torch.ones(3))}, make)
    with pytest.raises(ValueError, match="threshold"):
        SaRA({"p": p}, make, threshold=0.0)
    assert sara_lr(2e-3) == pytest.approx(1e-3 * math.exp(-0.7))
    w = nn.Parameter(torch.randn(70, 66) * 1e-3)
    sara = SaRA({"w": w, "b": nn.Parameter(torch.zeros(3))}, make, threshold=1e-3)
    penalty = sara.low_rank_penalty()
    masked = (w * sara.masks[w].to_bool()).detach()
    assert penalty.item() == pytest.approx(float(torch.linalg.svdvals(masked).sum()), rel=1e-4)
    penalty.backward()
    assert not w.grad[~sara.masks[w].to_bool()].any()
    assert float(sara.low_rank_penalty(smallest=100)) == 0.0


# ---- LT-SFT


def test_lt_sft_selects_rewinds_trains_and_reverts():
    model = small_model(3)
    start = snapshot(model)
    n = sum(p.numel() for p in model.parameters())
    sft = LTSFT(model, density=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(4):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    moved = torch.cat([(p.detach() - start[name]).abs().reshape(-1) for name, p in model.named_parameters()])
    masks = sft.select_()
    expected = torch.zeros(n, dtype=torch.bool).index_fill_(0, moved.topk(int(0.05 * n)).indices, True)
    assert torch.equal(torch.cat([sft.chosen[name].to_bool().reshape(-1) for name in start]), expected)
    assert all(same_bits(p.detach(), start[name]) for name, p in model.named_parameters())  # rewound
    second = fa.optim.AdamW(list(masks), lr=0.02, weight_decay=0.1, masks=masks)
    for step in range(4):
        backward(model, step)
        second.step()
        second.zero_grad()
        model.zero_grad()
    tuned = snapshot(model)
    for name in start:
        keep = sft.chosen[name].to_bool()
        assert same_bits(tuned[name][~keep], start[name][~keep])
    for kind in ("add", "set"):
        delta = sft.delta(kind)
        assert delta.nnz == int(0.05 * n)
        sft.restore_()
        delta.apply_(model)
        equal = same_bits if kind == "set" else lambda a, b: torch.allclose(a, b, atol=1e-6)
        assert all(equal(p.detach(), tuned[name]) for name, p in model.named_parameters())
        delta.revert_()
        assert all(same_bits(p.detach(), start[name]) for name, p in model.named_parameters())
        with torch.no_grad():
            [p.copy_(tuned[name]) for name, p in model.named_parameters()]
    with pytest.raises(RuntimeError, match="iterations"):
        sft.select_()


def test_lt_sft_rounds_add_up():
    p = nn.Parameter(torch.zeros(10))
    sft = LTSFT({"p": p}, k=5, iterations=2)
    with torch.no_grad():
        p.copy_(torch.arange(10.0))
    sft.select_()
    assert sft.chosen["p"].indices().tolist() == [7, 8, 9] and not p.any()
    with torch.no_grad():
        p[7:] = torch.tensor([70.0, 80.0, 90.0])
    sft.next_round()
    with torch.no_grad():
        p += torch.tensor([0, 0, 5.0, 0, 6.0, 0, 0, 9.0, 9.0, 9.0])
    masks = sft.select_()
    assert masks[p].indices().tolist() == [2, 4, 7, 8, 9]
    assert p.tolist() == [0.0] * 7 + [70.0, 80.0, 90.0]
    sft.restore_()
    assert not p.any()


def test_lt_sft_edges():
    p = nn.Parameter(torch.ones(6))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    sft = LTSFT({"p": p, "frozen": frozen}, k=0)
    assert sft.select_() == {} and sft.delta().nnz == 0
    ties = LTSFT({"p": p}, k=2)
    with torch.no_grad():
        p += 1
    assert ties.select_()[p].indices().tolist() == [0, 1] and "frozen" not in ties.params  # equal changes: the first
    for kwargs in ({}, {"k": 7}, {"k": 1, "density": 0.5}, {"density": 1.2}, {"density": math.nan}, {"k": 2.5}, {"k": 1, "iterations": 0}):
        with pytest.raises(ValueError, match="LTSFT"):
            LTSFT({"p": p}, **kwargs)
    with torch.no_grad():
        p.copy_(torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 4.0]))
    assert ties.l1_penalty().item() == pytest.approx(4 / 6)


def test_compose_sums_deltas():
    base = {"w": torch.zeros(4, 5), "v": torch.zeros(3)}
    one, two = {n: torch.randn_like(t) for n, t in base.items()}, {n: torch.randn_like(t) for n, t in base.items()}
    a = SparseDelta.from_diff(base, one, masks={"w": random_mask((4, 5), k=7, seed=1)})
    b = SparseDelta.from_diff(base, two, masks={"w": random_mask((4, 5), k=9, seed=2), "v": Mask.full((3,), True)})
    together, in_turn = copy.deepcopy(base), copy.deepcopy(base)
    compose([a, b]).apply_(together)
    a.apply_(in_turn)
    b.apply_(in_turn)
    assert all(torch.equal(together[n], in_turn[n]) for n in base)
    assert torch.equal(compose([a]).entries["w"].values, a.entries["w"].values)
    narrow = SparseDelta.from_diff(base, one, masks={"w": random_mask((4, 5), k=7, seed=1)}, dtype=torch.bfloat16)
    for order in ([narrow, b], [b, narrow]):  # the first one's dtype decided
        assert torch.equal(compose(order).entries["w"].values, compose([b, narrow]).entries["w"].values)
        assert {e.values.dtype for e in compose(order).entries.values()} == {torch.float32}
    with pytest.raises(ValueError, match="at least one"):
        compose([])
    with pytest.raises(ValueError, match="one shape"):
        compose([a, SparseDelta.from_diff({"w": torch.zeros(3)}, {"w": torch.ones(3)})])


def test_determinism_of_whole_runs():
    def run() -> dict[str, torch.Tensor]:
        model = small_model(7)
        with ColumnStats.collect(model) as stats:
            backward(model)
        prune_model_(model, 0.5, method="wanda", stats=stats)
        sara = SaRA(model, lambda masks: fa.optim.AdamW(list(masks), lr=0.01, masks=masks), threshold=0.2, progressive_step=2)
        for step in range(4):
            backward(model, step)
            sara.step()
            sara.zero_grad()
        return snapshot(model)

    a, b = run(), run()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_gradual_pruning_keeps_its_count_where_trained_weights_are_zero() -> None:
    """Zeros that are trained tied with pruned ones, of lower position, which had left the mask already."""
    p = nn.Parameter(torch.arange(1.0, 11.0))
    pruner = fa.sparse.GradualMagnitudePruning({"w": p}, end=4, initial=0.5, final=0.5, every=1)
    pruner.step()
    p.data[7:] = 0.0
    pruner.step()
    assert pruner.masks[p].indices().tolist() == [5, 6, 7, 8, 9]

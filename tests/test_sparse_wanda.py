"""Wanda against a small reference written from the paper (sorting)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fusedadapt.sparse import (
    ColumnStats,
    prune_model_,
    topk_mask,
    wanda_mask,
)
from fusedadapt.sparse.wanda import dropped_count


def published_wanda(w: torch.Tensor, norm: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The paper's algorithm 1: sort each row's scores stably, drop the first int(K * s). True = kept."""
    metric = w.abs().float() * norm.reshape(1, -1)
    order = torch.sort(metric, dim=-1, stable=True).indices[:, : int(w.shape[1] * sparsity)]
    return torch.ones_like(w, dtype=torch.bool).scatter_(1, order, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 7), (5, 33), (16, 128), (3, 1)])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.5, 0.71, 1.0])
def test_wanda_equals_the_published_rule(shape, dtype, sparsity):
    torch.manual_seed(0)
    w, x = torch.randn(shape).to(dtype), torch.randn(20, shape[1])
    stats = ColumnStats.of(x)
    got = wanda_mask(w, stats, 1 - sparsity if sparsity != 0.1 else 0.9)
    assert torch.equal(got.to_bool(), published_wanda(w, stats.norm, sparsity))


@pytest.mark.parametrize("make", [torch.zeros, torch.ones, lambda *s: torch.randint(-2, 3, s).float()])
def test_wanda_ties_drop_the_lowest_column(make):
    torch.manual_seed(1)
    w, norm = make(9, 37), torch.randint(0, 3, (37,)).float()
    for density in (0.0, 0.25, 0.5, 0.9, 1.0):
        expected = published_wanda(w, norm, 1 - density if density != 0.9 else 0.1)
        assert torch.equal(wanda_mask(w, norm, density).to_bool(), expected)
        ours = wanda_mask(w, norm, density, ties="lowest_index").to_bool()
        assert torch.equal(ours.sum(1), expected.sum(1))
        assert torch.equal(ours, topk_mask(w, k=int(expected[0].sum()), score="abs_scaled", other=norm, scope="row").to_bool())


def test_wanda_zero_columns_nan_and_whole_tensor_scope():
    w = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    x = torch.randn(10, 8)
    x[:, [1, 5]] = 0
    kept = wanda_mask(w, x, 0.75).to_bool()
    assert not kept[:, [1, 5]].any() and kept.sum() == 24
    assert wanda_mask(w, torch.zeros(10, 8), 0.5).nnz == 16
    w[2, 3] = math.nan
    assert wanda_mask(w, x, 1 / 8).to_bool()[2, 3]
    assert not wanda_mask(w, x, 0.75, nan="lowest").to_bool()[2, 3]
    with pytest.raises(ValueError, match="NaN"):
        wanda_mask(w, x, 0.5, nan="raise")
    w[2, 3] = 1.0
    order = torch.sort((w.abs() * ColumnStats.of(x).norm).reshape(-1), stable=True).indices[:16]
    assert torch.equal(wanda_mask(w, x, 0.5, scope="tensor").to_bool().reshape(-1), torch.ones(32, dtype=torch.bool).scatter_(0, order, False))


def test_wanda_n_of_m_and_strides():
    torch.manual_seed(2)
    w, norm = torch.randn(12, 6).t(), torch.rand(12) + 0.1
    score = (w.abs() * norm).reshape(6, 3, 4)
    expected = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(2, -1).indices, True).reshape(6, 12)
    assert torch.equal(wanda_mask(w, norm, n=2, m=4).to_bool(), expected)
    assert torch.equal(wanda_mask(w, norm, 0.5).to_bool(), published_wanda(w, norm, 0.5))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_wanda_of_nothing(shape):
    for activations in (torch.ones(shape[1]), torch.ones(3, shape[1])):
        assert wanda_mask(torch.zeros(shape), activations, 0.5).nnz == 0


def test_wanda_bad_input():
    w, norm = torch.randn(4, 8), torch.ones(8)
    for args, kwargs, words in (
        ((w, norm, 1.5), {}, "density"),
        ((w, norm), {}, "n and m"),
        ((w, norm, 0.5), {"n": 2, "m": 4}, "n and m"),
        ((w, norm, 0.5), {"n": 2}, "n and m"),
        ((w, norm[:3], 0.5), {}, "8 columns; got 3"),
        ((w, norm * math.inf, 0.5), {}, "finite"),
        ((w, -norm, 0.5), {}, "norms from 0 on; got -1.0"),
        ((w, ColumnStats(8), 0.5), {}, "empty"),
        ((w, torch.zeros(0, 8), 0.5), {}, "empty"),
        ((w[0], norm, 0.5), {}, r"\[N, K\]"),
        ((w, norm, 0.5), {"ties": "inclusive"}, "ties"),
        ((w, norm, 0.5), {"scope": "global"}, "scope"),
        ((w, norm), {"n": 1, "m": 3}, "multiple of 3"),
    ):
        with pytest.raises(ValueError, match=words):
            wanda_mask(*args, **kwargs)


def test_dropped_count_is_decimal():
    for tenths in range(11):
        assert dropped_count(10, (10 - tenths) / 10) == tenths
    assert dropped_count(100, 0.71) == int(100 * 0.29) == 28  # the published truncation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_column_stats(dtype):
    torch.manual_seed(3)
    x = torch.randn(3, 50, 17).to(dtype)
    x[..., 4] = 0
    exact = x.double().square().sum((0, 1))
    whole = ColumnStats.of(x)
    assert whole.rows == 150 and torch.allclose(whole.sum_squares, exact, rtol=2e-7)
    parts = ColumnStats.of(x[:1]) + ColumnStats.of(x[1, :7]) + ColumnStats.of(x[1, 7:]).update(x[2].t().contiguous().t())
    assert parts.rows == 150 and torch.allclose(parts.sum_squares, exact, rtol=2e-7)
    assert parts.norm.dtype == torch.float32 and parts.norm[4] == 0
    assert torch.equal(ColumnStats.of(x).sum_squares, whole.sum_squares)
    # the published running mean, scaled back
    running, seen = torch.zeros(17), 0
    for sample in x:
        running = running * (seen / (seen + 1)) + sample.float().norm(dim=0) ** 2 / (seen + 1)
        seen += 1
    assert torch.allclose(running.double() * seen, exact, rtol=1e-5)


def test_column_stats_bad_input():
    stats = ColumnStats(4)
    assert stats.update(torch.zeros(0, 4)).rows == 0
    for x in (torch.zeros(3, 5), torch.zeros(()), torch.zeros(3, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="expected"):
            stats.update(x)
    with pytest.raises(ValueError, match="4 columns"):
        stats + ColumnStats(5)


def test_collect_and_prune_a_model():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    batches = [torch.randn(5, 12) for _ in range(3)]
    with ColumnStats.collect(model) as stats, torch.no_grad():
        for x in batches:
            model(x)
    model(batches[0])  # the hooks are gone
    assert {n: s.rows for n, s in stats.items()} == {"0": 15, "2": 15}
    assert torch.allclose(stats["0"].norm, torch.cat(batches).norm(dim=0))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = prune_model_(model, 0.5, method="wanda", stats=stats)
    assert report.densities == {"0.weight": 0.5, "2.weight": 0.5} and report.density == 0.5 and "0.weight" in str(report)
    for layer in ("0", "2"):
        keep = published_wanda(before[f"{layer}.weight"], stats[layer].norm, 0.5)
        w = model.get_submodule(layer).weight
        assert torch.equal(w[keep], before[f"{layer}.weight"][keep]) and not w[~keep].any() and not w[~keep].signbit().any()
        assert torch.equal(model.get_submodule(layer).bias, before[f"{layer}.bias"])
    assert prune_model_(model, method="wanda", stats=stats, n=1, m=4).density == 0.25


def test_block_by_block_as_published():
    """Each block is calibrated on what the pruned blocks before it put out."""
    torch.manual_seed(9)
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(10, 10), nn.Tanh()) for _ in range(3)])
    x = torch.randn(40, 10)
    weights, h = [], x
    for block in blocks:  # the oracle, on copies
        w = block[0].weight.detach().clone()
        w[~published_wanda(w, h.norm(dim=0), 0.4)] = 0
        weights.append(w)
        h = torch.tanh(nn.functional.linear(h, w, block[0].bias.detach()))
    for block in blocks:
        with ColumnStats.collect(block) as stats, torch.no_grad():
            h = x
            for other in blocks:
                h = other[1](other[0](input=h))
        prune_model_(block, 0.6, method="wanda", stats=stats)
    assert all(torch.equal(block[0].weight, w) for block, w in zip(blocks, weights, strict=True))


def test_prune_model_bad_input_changes_nothing():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = [p.detach().clone() for p in model.parameters()]
    stats = {"0": ColumnStats.of(torch.randn(3, 4)), "1": ColumnStats.of(torch.full((3, 4), math.nan))}
    for kwargs, words in (
        ({"method": "wanda", "stats": {"0": stats["0"]}}, "missing: \\['1'\\]"),
        ({"method": "wanda", "stats": stats}, "finite"),
        ({"method": "obs"}, "method"),
        ({"skip": ["head"]}, "head"),
        ({"scope": "block"}, "scope"),
        ({"density": 1.1}, "density"),
        ({"density": None, "n": 2}, "n and m; got density=None, n=2, m=None"),
        ({"density": {"0.weight": 0.5}}, "1.weight"),
    ):
        with pytest.raises(ValueError, match=words):
            prune_model_(model, **({"density": 0.5} | kwargs))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="share one"):
        prune_model_(tied, 0.5, method="wanda", stats=stats)
    assert list(prune_model_(tied, 0.5).masks) == ["0.weight"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="unknown: \\['7'\\]"), ColumnStats.collect(model, ["7"]):
        pass


def test_convolutions_have_no_columns() -> None:
    with pytest.raises(ValueError, match=r"\['0'\] are convolutions"):
        with ColumnStats.collect(nn.Sequential(nn.Conv1d(3, 4, 3)), ["0"]):
            pass

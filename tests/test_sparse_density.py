"""Layer densities and 2:4, against small references written from the papers (sorting) and against torch's own functions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fusedadapt.sparse import (
    Mask,
    densities,
    energy_histogram,
    nm_mask,
    pack_semi_structured,
    to_semi_structured,
    topk_mask,
    unpack_semi_structured,
    validate_semi_structured,
)

# ---- layer densities


SHAPES = {"conv": (64, 3, 3, 3), "mid": (128, 64, 3, 3), "wide": (512, 512), "head": (10, 512), "norm": (7, 1)}


def naive_erk(shapes, density, dims=None):
    """RigL's loop as its paper words it: one most demanding layer at a time is made dense."""
    size = {n: math.prod(s) for n, s in shapes.items()}
    raw = {n: sum(s[:dims]) / math.prod(s[:dims]) for n, s in shapes.items()}
    dense: set[str] = set()
    while True:
        rest = [n for n in shapes if n not in dense]
        eps = (density * sum(size.values()) - sum(size[n] for n in dense)) / sum(raw[n] * size[n] for n in rest)
        worst = max(rest, key=raw.__getitem__)
        if eps * raw[worst] <= 1:
            return {n: 1.0 if n in dense else eps * raw[n] for n in shapes}
        dense.add(worst)


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.3, 0.6])
@pytest.mark.parametrize("method", ["erk", "er"])
def test_erk(density, method):
    got = densities(SHAPES, density, method)
    expected = naive_erk(SHAPES, density, 2 if method == "er" else None)
    assert got == pytest.approx(expected, rel=1e-12) and max(got.values()) <= 1.0
    total = sum(math.prod(s) for s in SHAPES.values())
    assert sum(got[n] * math.prod(s) for n, s in SHAPES.items()) == pytest.approx(density * total)


def test_densities_uniform_fixed_and_ends():
    assert densities(SHAPES, 0.3) == dict.fromkeys(SHAPES, 0.3)
    assert densities(SHAPES, 0.3, fixed={"conv": 1.0})["conv"] == 1.0
    rest = {n: s for n, s in SHAPES.items() if n != "conv"}
    assert densities(SHAPES, 0.1, "erk", fixed={"conv": 1.0}) == {"conv": 1.0} | densities(rest, 0.1, "erk")
    for end in (0.0, 1.0):
        assert densities(SHAPES, end, "erk") == dict.fromkeys(SHAPES, end)
    assert list(densities(nn.Linear(3, 4), 0.5)) == ["weight"] and densities({}, 0.5, "erk") == densities({}, 0.5, "rate_distortion") == {}


def dropped_energy(tensors, by_name, importance):
    masks = topk_mask(tensors, density=by_name, scope="tensor")
    return sum(importance[n] * float(w.double()[~masks[n].to_bool()].square().sum()) for n, w in tensors.items())


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9])
def test_rate_distortion_is_near_the_exact_optimum(density):
    torch.manual_seed(6)
    tensors = {f"w{i}": torch.randn(40, 30 + i) * 3.0 ** (i - 2) for i in range(5)}
    importance = {f"w{i}": 10.0 ** (2 - i) for i in range(5)}
    got = densities(tensors, density, "rate_distortion", importance=importance)
    n = sum(w.numel() for w in tensors.values())
    assert sum(math.floor(got[name] * w.numel()) for name, w in tensors.items()) == math.floor(density * n)
    scaled = {name: w * importance[name] ** 0.5 for name, w in tensors.items()}
    exact = topk_mask(scaled, density=density)  # the exact optimum: one cut through the scaled weights
    best = sum(float(w.double()[~exact[name].to_bool()].square().sum()) for name, w in scaled.items())
    assert best * (1 - 1e-6) <= dropped_energy(tensors, got, importance) <= best * 1.005 + 1e-9
    assert dropped_energy(tensors, densities(tensors, density), importance) > best


@pytest.mark.parametrize(
    "tensors", [{"a": torch.zeros(10), "b": torch.zeros(3)}, {"a": torch.ones(9), "b": torch.ones(5) * 1e-30}, {"a": torch.ones(0)}]
)
@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_rate_distortion_degenerate(tensors, density):
    got = densities(tensors, density, "rate_distortion")
    n = sum(w.numel() for w in tensors.values())
    assert sum(math.floor(got[name] * w.numel()) for name, w in tensors.items()) == math.floor(density * n)


def test_rate_distortion_minimum_relative_and_brute_force():
    tensors = {"big": torch.randn(50, 20) * 100, "small": torch.randn(50, 20)}
    plain = densities(tensors, 0.3, "rate_distortion")
    assert plain["small"] < 0.01 and densities(tensors, 0.3, "rate_distortion", minimum=0.2)["small"] == 0.2
    relative = densities(tensors, 0.3, "rate_distortion", importance="relative")
    assert abs(relative["big"] - 0.3) < 0.03
    few = {"a": torch.tensor([8.0, 4.0, 2.0, 1.0]), "b": torch.tensor([7.0, 0.5, 0.25])}
    got = densities(few, 4 / 7, "rate_distortion")
    assert (math.floor(got["a"] * 4), math.floor(got["b"] * 3)) == (3, 1)


def test_densities_bad_input():
    w = {"a": torch.randn(4, 4)}
    for source, args, kwargs, words in (
        (w, (1.5,), {}, "density"),
        (w, (0.5, "lamp"), {}, "one of"),
        (w, (0.5,), {"fixed": {"b": 1.0}}, "unknown: \\['b'\\]"),
        (w, (0.5,), {"fixed": {"a": 2.0}}, "'a': 2.0"),
        (SHAPES, (0.5, "rate_distortion"), {}, "shapes"),
        (w, (0.5, "rate_distortion"), {"importance": {}}, "'a'"),
        (w, (0.5, "rate_distortion"), {"importance": "lamp"}, "relative"),
        (w, (0.5, "rate_distortion"), {"minimum": 0.6}, "minimum"),
        ({"a": torch.tensor([1.0, math.nan])}, (0.5, "rate_distortion"), {}, "NaN"),
        ({"a": torch.tensor([1.0, math.inf])}, (0.5, "rate_distortion"), {}, "NaN"),
        ({"a": torch.tensor([1, 2])}, (0.5, "rate_distortion"), {}, "int64"),
    ):
        with pytest.raises(ValueError, match=words):
            densities(source, *args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energy_histogram_against_sorting(dtype):
    x = torch.randn(4000, generator=torch.Generator().manual_seed(7)).to(dtype)
    h = energy_histogram([x[:1500], x[1500:]])
    down = x.float().abs().double().sort(descending=True).values.numpy()
    assert h.numel == 4000
    for k in (0, 1, 17, 400, 3999, 4000):
        l1, l2 = h.kept(k)
        for got, exact, most in ((l1, down[:k].sum(), 1.25), (l2, (down[:k] ** 2).sum(), 1.5625)):
            assert got <= exact * (1 + 1e-12) and exact <= (most if k < 100 else 1.05) * got
    ends = np.cumsum(h.counts[::-1])
    k = int(ends[ends > 700][0])  # a bin's end: exact
    assert h.kept(k) == pytest.approx((down[:k].sum(), (down[:k] ** 2).sum()), rel=1e-12)
    share = np.cumsum(down**2) / (down**2).sum()
    for part in (0.1, 0.5, 0.9):
        least = int(np.searchsorted(share, part)) + 1
        assert least <= h.count_for(part) <= least * 1.2 + 1
    assert h.count_for(1.0) <= 4000 and h.count_for(0.0) == 0
    with pytest.raises(ValueError, match="k in"):
        h.kept(4001)
    with pytest.raises(ValueError, match="share"):
        h.count_for(1.1)


# ---- 2:4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.float32])
def test_semi_structured_round_trip(dtype):
    from torch.sparse import _semi_structured_conversions as oracle

    torch.manual_seed(8)
    w = (torch.randn(32, 64) * 20).round().to(dtype)
    n, m = (1, 2) if dtype == torch.float32 else (2, 4)
    mask = nm_mask(w.float(), n, m)
    clean = validate_semi_structured(w, mask)
    assert torch.equal(clean, torch.where(mask.to_bool(), w, torch.zeros_like(w)))
    values, metadata = pack_semi_structured(w, mask)
    expected = oracle.sparse_semi_structured_from_dense_cutlass(clean)
    assert torch.equal(values, expected[0]) and torch.equal(metadata, expected[1])
    assert torch.equal(unpack_semi_structured(values, metadata), clean)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_semi_structured_keeps_every_bit(dtype):
    """Also of fp32 numbers of which a half would be NaN."""
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(torch.iinfo(integer).min, torch.iinfo(integer).max, (64, 128), generator=generator, dtype=integer)
    w, (n, m) = bits.view(dtype), (1, 2) if dtype == torch.float32 else (2, 4)
    mask = nm_mask(torch.rand(64, 128, generator=generator), n, m)
    w[(w == 0) | w.isnan()] = 1
    dense = unpack_semi_structured(*pack_semi_structured(w, mask))
    assert torch.equal(dense.view(integer), w.masked_fill(~mask.to_bool(), 0).view(integer))


def test_semi_structured_raises_where_torch_drops():
    w = torch.zeros(32, 64, dtype=torch.float16)
    w[3, 8:11] = torch.tensor([1.0, 2.0, 3.0])
    w[5, 0:4] = 1
    from torch.sparse import _semi_structured_conversions as oracle

    assert oracle.sparse_semi_structured_from_dense_cutlass(w)[0].count_nonzero() == 4  # 7 went in
    with pytest.raises(ValueError, match=r"row 3, columns 8\.\.11 \(2 such groups\)"):
        pack_semi_structured(w)
    with pytest.raises(ValueError, match="row 3"):
        to_semi_structured(w, Mask.full(w.shape, True))
    mask = torch.zeros(32, 64, dtype=torch.bool)
    mask[3, 9:11] = True
    assert validate_semi_structured(w, mask).count_nonzero() == 2


def test_semi_structured_negative_zero_and_nan():
    w = torch.full((32, 64), -0.0, dtype=torch.bfloat16)
    w[0, :4] = torch.tensor([-0.0, 1.0, -0.0, 2.0])
    w[1, 0] = math.nan
    clean = validate_semi_structured(w)
    assert not clean[clean == 0].signbit().any() and clean[1, 0].isnan()
    values, metadata = pack_semi_structured(w)
    assert not values[values == 0].signbit().any()
    w[1, 1:3] = math.nan
    with pytest.raises(ValueError, match="row 1"):
        pack_semi_structured(w)


def test_semi_structured_bad_input():
    for w, mask, words in (
        (torch.zeros(32, 64, dtype=torch.float64), None, "float64"),
        (torch.zeros(64, dtype=torch.float16), None, "matrix"),
        (torch.zeros(32, 62, dtype=torch.float16), None, "multiple of 4"),
        (torch.zeros(31, 64, dtype=torch.float16), None, "multiples of 32"),
        (torch.zeros(0, 64, dtype=torch.float16), None, "positive"),
        (torch.zeros(32, 64), torch.ones(32, 64), "bool mask"),
        (torch.zeros(32, 64), torch.ones(32, 63, dtype=torch.bool), "bool mask"),
    ):
        with pytest.raises(ValueError, match=words):
            pack_semi_structured(w, mask)
    with pytest.raises(ValueError, match="NVIDIA"):
        to_semi_structured(torch.zeros(32, 64, dtype=torch.float16))


def test_semi_structured_names_what_torch_lacks(monkeypatch):
    from torch.sparse import _semi_structured_conversions as oracle

    monkeypatch.delattr(oracle, "sparse_semi_structured_from_dense_cutlass")
    with pytest.raises(RuntimeError, match="expected a torch with"):
        pack_semi_structured(torch.zeros(32, 64, dtype=torch.float16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_semi_structured_product_on_a_gpu():
    w = torch.randn(128, 128, device="cuda", dtype=torch.float16)
    mask = nm_mask(w, 2, 4)
    sparse = to_semi_structured(w, mask)
    x = torch.randn(128, 128, device="cuda", dtype=torch.float16)
    torch.testing.assert_close(sparse @ x, (w * mask.to_bool()) @ x, rtol=1e-2, atol=1e-2)

"""topk_mask and topk_threshold against a stable sort, by torch.equal: every score, scope, rule for ties and NaN, on the reference and in C++."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusedadapt as fa
from fusedadapt.reference.sparse import key_of
from fusedadapt.sparse import Mask, SparseDelta, energy_histogram, merge, nm_mask, prune_model_, topk_mask, topk_threshold, wanda_mask

BACKENDS = ("reference", "cpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 2, 31, 32, 33, 255, 1023, 1024, 1025)
KINDS = ("random", "equal", "zeros", "few values", "special", "denormal", "all nan")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def data(kind: str, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(1000 * seed + n)
    x = torch.randn(n, generator=g)
    if kind == "equal":
        x = torch.full((n,), -1.5)
    elif kind == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "few values":
        x = torch.randint(-2, 3, (n,), generator=g).float()
    elif kind == "special":
        some = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1.0, -1.0, 65504.0])
        x = some[torch.randint(len(some), (n,), generator=g)]
    elif kind == "denormal":
        x = torch.randint(-3, 4, (n,), generator=g).float() * torch.finfo(dtype).smallest_normal / 8
    elif kind == "all nan":
        x = torch.full((n,), math.nan)
    return x.to(dtype)


def scores(x: Tensor, score: str, other: Tensor | None) -> Tensor:
    """fp32 scores as their definition says."""
    x = x.float()
    if other is None:
        return x.abs() if score == "abs" else x
    y = other.float()
    return {"abs_diff": lambda: (x - y).abs(), "abs_product": lambda: (x * y).abs(), "abs_scaled": lambda: x.abs() * y}[score]()


def brute(every: list[Tensor], k: int, ties: str, nan: str) -> list[Tensor]:
    """Masks by a stable sort of the scores, as doubles in which infinity and NaN are numbers."""
    flat = torch.cat([s.reshape(-1) for s in every]).double()
    flat = torch.where(flat.isnan(), 1e50 if nan == "highest" else -1e50, flat.clamp(-1e40, 1e40))
    values, order = torch.sort(flat, descending=True, stable=True)
    mask = torch.zeros(flat.numel(), dtype=torch.bool)
    if k:
        mask[order[:k]] = True
        same = flat == values[k - 1]
        if ties == "inclusive":
            mask |= same
        elif ties == "exclusive" and not bool(mask[same].all()):
            mask &= ~same
    return [part.reshape(s.shape) for part, s in zip(mask.split([s.numel() for s in every]), every)]


def same(got: Any, expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(torch.equal(m.to_bool(), e) and m.nnz == int(e.sum()) for m, e in zip(got, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor(backend: str, kind: str, dtype: torch.dtype) -> None:
    with fa.backend(backend):
        for n, ties, nan in itertools.product(SIZES, ("lowest_index", "inclusive", "exclusive"), ("highest", "lowest")):
            x = data(kind, n, dtype)
            for k in {0, 1, n // 2, n - 1, n} & set(range(n + 1)):
                mask = topk_mask(x, k=k, ties=ties, nan=nan)
                assert same([mask], brute([x.float().abs()], k, ties, nan)), (n, k, ties, nan)
                assert ties != "lowest_index" or mask.nnz == k


@pytest.mark.parametrize("score", ["abs", "given", "abs_diff", "abs_product", "abs_scaled"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_and_dicts_of_mixed_tensors_count_as_one(backend: str, score: str) -> None:
    shapes = [(0,), (7,), (3, 40), (), (5, 5, 13), (33,), (2, 0, 3), (1025,)]
    with fa.backend(backend):
        for seed, kind in enumerate(("random", "few values", "special", "zeros")):
            xs = [data(kind, math.prod(s), DTYPES[(i + seed) % 3], i).reshape(s) for i, s in enumerate(shapes)]
            others = None
            if score == "abs_scaled":
                others = [data("random", s[-1], torch.float32, 9).abs() if s else torch.tensor(0.5) for s in shapes]
            elif score not in ("abs", "given"):
                others = [data(kind, math.prod(s), DTYPES[i % 3], i + 20).reshape(s) for i, s in enumerate(shapes)]
            want = [scores(x, score, y) for x, y in zip(xs, others or [None] * len(xs))]
            n = sum(x.numel() for x in xs)
            for k, ties, nan in itertools.product((0, 1, n // 3, n), ("lowest_index", "inclusive", "exclusive"), ("highest", "lowest")):
                expected = brute(want, k, ties, nan)
                assert same(topk_mask(xs, k=k, score=score, other=others, ties=ties, nan=nan), expected), (kind, k, ties, nan)
            names = [f"layer.{i}" for i in range(len(xs))]
            by_name = topk_mask(dict(zip(names, xs)), k=n // 3, score=score, other=others and dict(reversed(list(zip(names, others)))))
            assert list(by_name) == names and same(list(by_name.values()), brute(want, n // 3, "lowest_index", "highest"))


@pytest.mark.parametrize("kind", ["random", "few values", "special"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_blocks_and_tensors_of_their_own(backend: str, kind: str) -> None:
    with fa.backend(backend):
        for shape, dtype, ties, nan in itertools.product(
            [(6, 40), (2, 3, 32), (5, 1), (40,), (0, 4)], DTYPES, ("lowest_index", "inclusive"), ("highest", "lowest")
        ):
            x, factors = data(kind, math.prod(shape), dtype).reshape(shape), data("random", shape[-1], torch.float32, 3).abs()
            for score, other in (("abs", None), ("abs_scaled", factors)):
                s = scores(x, score, other)
                for length, scope in ((shape[-1], "row"), (8, "block")):
                    if shape[-1] % length:
                        continue
                    k = max(1, length // 3)
                    runs = s.reshape(-1, length)
                    expected = torch.stack([brute([run], k, ties, nan)[0] for run in runs]) if len(runs) else runs.bool()
                    got = topk_mask(x, k=k, scope=scope, block_size=8 if scope == "block" else None, score=score, other=other, ties=ties, nan=nan)
                    assert torch.equal(got.to_bool(), expected.reshape(shape)), (shape, dtype, scope, ties, nan)
        xs = {"a": data(kind, 100, torch.float32), "b": data(kind, 33, torch.bfloat16), "c": data(kind, 0, torch.float16)}
        for densities in ({"a": 0.5, "b": 0.1, "c": 1.0}, [0.5, 0.1, 1.0]):
            masks = topk_mask(xs, density=densities, scope="tensor")
            assert all(same([masks[n]], brute([xs[n].float().abs()], k, "lowest_index", "highest")) for n, k in (("a", 50), ("b", 3), ("c", 0)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_offsets_and_other_dtypes(backend: str) -> None:
    base = data("random", 41 * 26, torch.float32).reshape(41, 26)
    views = [base.t(), base[:, 1::2], base[3:, 5:], base.flip(0), base.expand(3, 41, 26), torch.empty_strided((5, 7), (1, 5)).copy_(base[:5, :7])]
    with fa.backend(backend):
        for view in views:
            assert same([topk_mask(view, k=view.numel() // 4)], brute([view.abs().contiguous()], view.numel() // 4, "lowest_index", "highest"))
        wide = base.double() + 1e-12  # fp64 scores are rounded to fp32 first: ties appear
        assert same([topk_mask(wide, k=77)], brute([wide.float().abs()], 77, "lowest_index", "highest"))
        mixed = [base.bfloat16(), wide, base.half()]
        assert same(topk_mask(mixed, k=500), brute([x.float().abs() for x in mixed], 500, "lowest_index", "highest"))
        with fa.strict():
            topk_mask(wide, k=3)


def test_density_rounds_the_exact_product_of_doubles() -> None:
    x = torch.arange(100.0)
    assert 0.29 * 100 < 29
    assert [topk_mask(x, density=0.29, rounding=r).nnz for r in ("floor", "ceil", "round")] == [28, 29, 29]
    for n, density in itertools.product((0, 1, 3, 10, 1000), (0.0, 0.1, 0.25, 0.5, 0.7, 1 / 3, 1.0)):
        exact = Fraction(density * n)
        found = [topk_mask(torch.arange(float(n)), density=density, rounding=r).nnz for r in ("floor", "ceil", "round")]
        assert found == [math.floor(exact), math.ceil(exact), round(exact)], (n, density)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold_says_where_it_cuts(backend: str, dtype: torch.dtype) -> None:
    with fa.backend(backend):
        for kind, nan, ties in itertools.product(
            ("random", "few values", "special", "all nan"), ("highest", "lowest"), ("lowest_index", "inclusive", "exclusive")
        ):
            xs = [data(kind, n, dtype, n) for n in (40, 0, 301)]
            flat = torch.cat([x.float().abs() for x in xs])
            rank = torch.where(flat.isnan(), 1e50 if nan == "highest" else -1e50, flat.double().clamp(max=1e40))
            for k in (1, 17, 200, 341):
                t = topk_threshold(xs, k=k, ties=ties, nan=nan)
                at = torch.sort(rank, descending=True).values[k - 1]
                assert t.above == int((rank > at).sum()) and t.ties == int((rank == at).sum()) and t.nan == int(flat.isnan().sum())
                expected = math.nan if abs(at) == 1e50 else math.inf if at == 1e40 else float(at)
                assert t.value == expected or math.isnan(t.value) and math.isnan(expected), (kind, k, t)
                kept = sum(m.nnz for m in topk_mask(xs, k=k, ties=ties, nan=nan))
                assert t.above + t.equal == kept, (kind, nan, ties, k)
                assert int(t.key) == (0xFFFFFFFF if at == 1e50 else 0 if at == -1e50 else int(key_of(at.clamp(max=3.5e38).float()))), (kind, nan, k)


@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholds_of_tensors_and_rows(backend: str) -> None:
    with fa.backend(backend):
        xs = {"a": data("few values", 60, torch.bfloat16).view(6, 10), "b": data("special", 40, torch.float32).view(2, 2, 10)}
        whole = topk_threshold(xs, density=0.3, scope="tensor")
        assert {n: t.value for n, t in whole.items()} == {n: topk_threshold(x, density=0.3).value for n, x in xs.items()}
        for name, cuts in topk_threshold(xs, k=3, scope="row").items():
            for row, cut in zip(xs[name].reshape(-1, 10), cuts.reshape(-1), strict=True):
                expected = topk_threshold(row, k=3).value
                finite = sorted((v for v in row.float().abs().tolist() if not math.isnan(v)), reverse=True)
                left = 3 - int(row.isnan().sum())
                assert float(cut) == (finite[left - 1] if left > 0 else expected) or math.isnan(cut) and left <= 0
        assert topk_threshold(xs["a"], k=3, scope="row").shape == (6,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk_mask([1, 2], k=1), "expected a dense tensor; got int for tensor 0"),
        (lambda: topk_mask(torch.eye(3).to_sparse(), k=1), "expected a dense tensor; got a torch.sparse_coo one"),
        (lambda: topk_mask(None, k=1), "name -> tensor; got NoneType"),
        (lambda: nm_mask(torch.ones(2, 4), 1.5, 4), "n in 0..m|expected"),
        (lambda: topk_threshold(torch.ones(4), k=1, scope="block"), "expected scope global, tensor or row"),
        (lambda: topk_threshold(torch.ones(2, 4), k=0, scope="row"), "at least one element of each row"),
        (lambda: topk_threshold([torch.ones(4)], density=[0.1], scope="tensor"), "at least one element"),
    ],
)
def test_what_cannot_be_selected_from(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_n_of_m(backend: str) -> None:
    with fa.backend(backend):
        for kind, dtype, (n, m) in itertools.product(
            ("random", "few values", "special"), DTYPES, ((2, 4), (1, 4), (0, 4), (4, 4), (3, 7), (1, 1), (5, 40))
        ):
            x = data(kind, 6 * 7 * 40, dtype).reshape(6, 280)
            for nan in ("highest", "lowest"):
                expected = torch.stack([brute([run], n, "lowest_index", nan)[0] for run in x.float().abs().reshape(-1, m)[:60]])
                got = nm_mask(x, n, m, nan=nan).to_bool().reshape(-1, m)
                assert torch.equal(got[:60], expected[: len(got)]) and bool((got.sum(1) == n).all())


A = torch.arange(12.0).reshape(3, 4)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"density": -0.1}, r"density in \[0, 1\]; got -0.1"), ({"density": 1.5}, "got 1.5"), ({"density": math.nan}, "got nan"),
    ({}, "density or k; got neither"), ({"density": 0.1, "k": 1}, "got both"), ({"k": 13}, r"k in 0..12; got 13"), ({"k": -1}, "got -1"),
    ({"k": 2.5}, "integer k"), ({"k": 1, "score": "l2"}, "score to be one of abs, abs_diff"), ({"k": 1, "ties": "first"}, "ties to be one of"),
    ({"k": 1, "nan": "ignore"}, "nan to be one of"), ({"density": 0.1, "rounding": "up"}, "rounding floor, ceil or round"),
    ({"k": 1, "scope": "column"}, "scope global, tensor, row or block"), ({"k": 1, "scope": "block"}, "block_size to divide rows of 4; got None"),
    ({"k": 1, "scope": "block", "block_size": 3}, "divide rows of 4; got 3"), ({"k": 1, "block_size": 2}, 'block_size with scope "block"'),
    ({"k": 1, "block_size": 2, "scope": "row"}, 'block_size with scope "block"'), ({"density": [0.1]}, "one density"),
    ({"density": [0.1, 0.2], "scope": "tensor"}, "one density for each of 1"), ({"density": {"a": 0.1}, "scope": "tensor"}, "names"),
    ({"k": 1, "score": "abs_diff"}, "other=a tensor"), ({"k": 1, "other": A}, "other=None"),
    ({"k": 1, "score": "abs_diff", "other": A[:2]}, r"other of shape \(3, 4\)"),
    ({"k": 1, "score": "abs_scaled", "other": A}, r"other of shape \(4,\)"),
    ({"k": 1, "score": "abs_diff", "other": [A, A]}, "1 tensors in other; got 2"), ({"k": 5, "scope": "row"}, "k in 0..4; got 5"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_input(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        topk_mask(A, **options)
    assert torch.equal(A, torch.arange(12.0).reshape(3, 4))


def test_more_bad_input() -> None:
    for call, said in (
        (lambda: topk_mask({"a": A, "b": A.int()}, k=1), "'b'"),
        (lambda: topk_mask(A.to(torch.complex64), k=1), "floating-point tensor; got torch.complex64"),
        (lambda: topk_mask({"w": A, "v": A / 0}, k=1, nan="raise"), r"some in \['v'\]"),
        (lambda: topk_mask({"w": A}, k=1, score="abs_diff", other={"v": A}), r"missing: \['w'\]"),
        (lambda: topk_mask([A, A.to("meta")], k=1), "one device"),
        (lambda: topk_mask(A, density=torch.tensor(0.5), scope="tensor"), "a density in"),
        (lambda: topk_mask(A[:0], density=7.0, scope="row"), r"density in \[0, 1\]; got 7.0"),
        (lambda: topk_mask(A[:0], k=9, scope="row"), "k in 0..4; got 9"),
        (lambda: topk_threshold(A, k=0), "nothing|at least one element"),
        (lambda: topk_threshold([], k=0), "at least one element"),
        (lambda: nm_mask(A, 5, 4), "0 <= n <= m"),
        (lambda: nm_mask(A, 1, 3), "multiple of 3"),
        (lambda: nm_mask(torch.tensor(1.0), 1, 1), "multiple of 1"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert topk_mask([], k=0) == [] and topk_mask({}, density=0.5) == {}


@pytest.mark.parametrize("backend", ["emulated", "triton"])
@pytest.mark.parametrize("ties", ["lowest_index", "inclusive", "exclusive"])
def test_a_list_on_the_kernels_of_a_gpu(backend: str, ties: str, monkeypatch: pytest.MonkeyPatch, quick_calls: None) -> None:
    """One selection over the whole list: nothing is joined, sorted or fetched to the host on the way."""
    tensors = [data(kind, n, dtype, 3) for kind, n, dtype in zip(KINDS, (700, 0, 33, 1025, 400, 64), itertools.cycle(DTYPES))]
    n = sum(t.numel() for t in tensors)
    expected = [brute([scores(t, "abs", None) for t in tensors], k, ties, "highest") for k in (0, 1, n // 3, n)]
    with fa.backend(backend), fa.strict(), monkeypatch.context() as patch:
        for name in ("cat", "sort", "topk", "argsort"):
            patch.setattr(torch, name, None)
        got = [topk_mask(tensors, k=k, ties=ties) for k in (0, 1, n // 3, n)]
        words = [[m.words.clone() for m in masks] for masks in got]
    for masks, w, wanted in zip(got, words, expected):
        assert same(masks, wanted) and all(torch.equal(m.words, x) for m, x in zip(masks, w))


@pytest.mark.parametrize("backend", ["emulated", "triton"])
@pytest.mark.parametrize("scope", ["row", "block"])
def test_rows_on_the_kernels_of_a_gpu(backend: str, scope: str, quick_calls: None) -> None:
    x, factors = data("few values", 6 * 96, torch.float32).view(6, 96), data("random", 96, torch.float32).abs()
    options = {"k": 7, "scope": scope, "block_size": 24 if scope == "block" else None, "score": "abs_scaled", "other": factors}
    with fa.backend(backend), fa.strict():
        got = topk_mask(x, **options)
    assert got == topk_mask(x, **options)


def test_numpy_numbers_are_numbers() -> None:
    x = torch.arange(10.0)
    for given in ({"k": np.int64(5)}, {"density": np.float32(0.5)}, {"density": np.float64(0.5)}):
        assert topk_mask(x, **given) == topk_mask(x, k=5) and topk_threshold(x, **given).above == 4
        assert topk_mask([x], scope="tensor", **given) == [topk_mask(x, k=5)]
    for shares in ([0.5, 0.2], np.array([0.5, 0.2]), torch.tensor([0.5, 0.2])):
        assert [m.nnz for m in topk_mask([x, x], density=shares, scope="tensor")] == [5, 2]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: topk_mask(x, density="half"), r"density in \[0, 1\]; got half"),
        (lambda x: topk_mask([x], density="half", scope="tensor"), r"density in \[0, 1\]; got half"),
        (lambda x: topk_threshold(x, density=[0.5]), r"density in \[0, 1\]; got \[0.5\]"), (lambda x: topk_mask([], k=1), r"k in 0..0; got 1"),
        (lambda x: topk_mask([], density=2), r"density in \[0, 1\]"),
        (lambda x: topk_mask(x, k=1, scope="block", block_size=2.5), "block_size to divide"),
    ],
)  # fmt: skip
def test_what_is_no_count_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(torch.arange(10.0))
    assert topk_mask([], density=0.5) == [] and topk_mask({}, k=0) == {}


def test_tensors_without_elements_to_read_are_refused() -> None:
    """On the meta device."""
    w = torch.empty(4, 8, device="meta")
    for call in (
        lambda: topk_mask(w, k=3), lambda: topk_mask({"a": w, "b": w}, density=0.5, scope="row"), lambda: topk_threshold(w, k=3),
        lambda: nm_mask(w, 2, 4), lambda: Mask.from_bool(w > 0), lambda: energy_histogram(w),
        lambda: merge({"w": w}, [{"w": w}], "ties", density=0.5),
        lambda: SparseDelta.from_diff({"w": w}, {"w": w}), lambda: prune_model_(nn.Linear(4, 4, device="meta"), 0.5),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="got one on the meta device"):
            call()


def test_narrow_floats_and_numbers_of_numpy() -> None:
    w = torch.randn(6, 8).to(torch.float8_e4m3fn)
    assert wanda_mask(w, torch.ones(8), 0.5) == wanda_mask(w.float(), torch.ones(8), 0.5)
    assert np.array_equal(energy_histogram({"a": w, "b": w}).squares, 2 * energy_histogram(w.float()).squares)
    assert nm_mask(w, np.int64(2), np.int32(4)) == nm_mask(w.float(), 2, 4)


def test_nan_that_two_infinities_make_is_found() -> None:
    """Only what came in was looked at: inf - inf and inf * 0 passed as the largest scores."""
    x, y = torch.tensor([math.inf, 1.0, 2.0, 3.0]), torch.tensor([math.inf, 0.0, 0.0, 0.0])
    for score, other in (("abs_diff", y), ("abs_product", 1.0 - y.isinf().float()), ("abs_scaled", 1.0 - y.isinf().float())):
        for scope in ("global", "tensor", "row"):
            with pytest.raises(ValueError, match="expected no NaN"):
                topk_mask(x, k=2, score=score, other=other, scope=scope, nan="raise")
        with pytest.raises(ValueError, match="expected no NaN"):
            nm_mask(x, 2, 4, score=score, other=other, nan="raise")
    assert topk_mask(x, k=2, score="abs_diff", other=torch.zeros(4), nan="raise").nnz == 2


def test_what_other_may_be() -> None:
    x = torch.randn(4)
    for other, words in (
        (x + 1j, "real numbers; got a torch.strided one of torch.complex64"),
        (x.to_sparse(), "sparse_coo"),
        ([1.0] * 4, "1 tensors in other"),
    ):
        with pytest.raises(ValueError, match=words):
            topk_mask(x, k=2, score="abs_product", other=other)

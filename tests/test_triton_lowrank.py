"""Interpreted low-rank kernels against the reference in fp64: every function, storage type and hostile shape; masks to the bit.

Bounds are derived, not chosen: an fp32 sum of n products of either sign is off by at most (n + 8) 2^-24 times the sum of their magnitudes, which the
reference computes too, on absolute values; a 16-bit result adds half a unit in the last place. The interpreter cannot show how a GPU's matrix
instructions accumulate; the exactness of the bf16 and tf32 terms it does show.
"""

import pytest
import torch
import triton
import triton.language as tl

from fusedadapt.kernels import lowrank, lowrank_expand, lowrank_grads, lowrank_shrink, lowrank_tiles
from fusedadapt.kernels.lowrank_parts import group_segments, keep_tile
from fusedadapt.reference import lowrank as reference

F, B, H = torch.float32, torch.bfloat16, torch.float16
SEED = torch.tensor([-7_000_000_000_000_000_001])
# T, K, N, ranks, dropout probabilities, dtype of x and y, dtype of A and B
CASES = (
    (1, 1, 7, [1], [0.5], B, F),
    (1, 384, 130, [16], [0.0], B, B),
    (2, 7, 1, [3], [0.1], H, F),
    (2, 130, 33, [16], [0.9], F, F),
    (17, 16, 16, [24], [0.1], H, H),
    (17, 33, 130, [16, 16, 16], [0.1, 0.5, 0.9], B, F),
    (17, 384, 7, [1, 16, 3], [0.0, 0.5, 0.1], B, B),
    (65, 130, 33, [3], [0.0], F, B),
    (65, 384, 16, [24, 3], [0.1, 0.0], H, F),
    (65, 33, 384, [1, 3, 1, 16, 2], [0.1] * 5, B, F),
    (17, 130, 130, [130], [0.0], B, F),
    (2, 33, 33, [130, 3], [0.5, 0.1], F, H),
    (33, 384, 130, [16], [0.5], B, H),
    (17, 16, 384, [40], [0.0], B, F),
)
IDS = [f"T{t} K{k} N{n} {'+'.join(map(str, r))} p{'/'.join(map(str, p))} {str(x)[6:]} {str(a)[6:]}" for t, k, n, r, p, x, a in CASES]
EPS = {F: 2.0**-24, B: 2.0**-8, H: 2.0**-11}
SMALLEST = {F: 2.0**-149, B: 2.0**-133, H: 2.0**-24}

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), pytest.mark.usefixtures("quick_calls")]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a launcher allocates is full of NaN: nothing may be read before it is written, nothing left unwritten."""
    empty, new_empty, empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like
    fill = lambda t: t.fill_(float("nan")) if t.is_floating_point() else t
    poison = lambda make: lambda *args, **options: fill(make(*args, **options))
    monkeypatch.setattr(torch, "empty", poison(empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(empty_like))


def wide_rows(t: torch.Tensor) -> torch.Tensor:
    """The same matrix with rows further apart, the gaps full of NaN; not 16-byte aligned if that was not either."""
    rows, columns = t.shape
    storage = torch.full((rows, columns + 3 + columns % 2 * 5), float("nan"), dtype=t.dtype)
    storage[:, :columns] = t
    return storage[:, :columns]


class Problem:
    def __init__(self, t, k, n, ranks, p, dtype, small):
        random = torch.Generator().manual_seed(t * 1000 + k + n + sum(ranks))
        draw = lambda *shape: torch.randn(shape, generator=random)
        r = sum(ranks)
        self.ranks, self.h, self.dtype = ranks, [reference.threshold_of(v) for v in p], dtype
        self.x, self.y, self.y0 = (wide_rows(draw(*shape).to(dtype)) for shape in ((t, k), (t, n), (t, n)))
        self.a, self.b = draw(r, k).to(small), draw(n, r).to(small)
        self.u, self.v = draw(t, r), draw(t, r)
        self.g, self.bias = draw(n).to(small), draw(n)


@pytest.fixture(params=CASES, ids=IDS)
def problem(request):
    return Problem(*request.param)


def exact(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def magnitude(t):
    return t.double().abs() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def check(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor, terms: int) -> None:
    """got against fp64 `want`, a sum of `terms` terms whose magnitudes add up to `size`."""
    assert got.shape == want.shape and not got.isnan().any()
    bound = (terms + 8) * 2.0**-24 * size + EPS[got.dtype] * want.abs() * (1 + 2.0**-7) + SMALLEST[got.dtype]
    off = (got.double() - want).abs() - bound
    assert (off <= 0).all(), f"{(off > 0).sum()} of {off.numel()} elements, worst by {off.max():.3g} at {want.flatten()[off.argmax()]:.3g}"


def twice(call, *inputs):
    """The result, after making sure that a second call on the same bits gives the same bits; `inputs` are what it writes."""
    before = [t.clone() for t in inputs]
    first = call(*inputs)
    second = call(*before)
    everything = lambda result, written: [*(result if isinstance(result, tuple) else (result,)), *written]
    for one, other in zip(everything(first, inputs), everything(second, before), strict=True):
        assert one is None or torch.equal(one, other)
    return first


def test_runs_interpreted():
    assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before triton is imported (tests/conftest.py does)"


def test_shrink(problem):
    p = problem
    args = (p.x, p.a, SEED, p.h, p.ranks)
    check(twice(lambda: lowrank.shrink(*args)), reference.shrink(*map(exact, args)), reference.shrink(*map(magnitude, args)), p.x.shape[1])


def test_bwd_x(problem):
    p = problem
    args = (p.x, p.u, SEED, p.h, p.ranks)
    check(twice(lambda: lowrank.bwd_x(*args)), reference.bwd_x(*map(exact, args)), reference.bwd_x(*map(magnitude, args)), p.x.shape[0])


def test_add(problem):
    p = problem
    rest = (p.u, p.a, SEED, p.h, p.ranks)
    y, want, size = p.x.clone(), exact(p.x), magnitude(p.x)
    y = wide_rows(y)
    twice(lambda out: lowrank.add_(out, *rest), y)
    reference.add_(want, *map(exact, rest))
    reference.add_(size, *map(magnitude, rest))
    check(y, want, size, sum(p.ranks) + len(p.ranks))


@pytest.mark.parametrize("with_product", [True, False])
def test_scale_add(problem, with_product):
    p = problem
    rest = (p.v, p.b.T, p.g, p.bias) if with_product else (None, None, p.g, None)
    y0, want0, size0 = wide_rows(p.y0), exact(p.y0), magnitude(p.y0)
    got = twice(lambda out: lowrank.scale_add_(out, *rest), y0)
    want, size = reference.scale_add_(want0, *map(exact, rest)), reference.scale_add_(size0, *map(magnitude, rest))
    check(got, want, size, sum(p.ranks) + 2)
    if with_product:
        check(y0, want0, size0, sum(p.ranks) + 1)
    else:
        assert torch.equal(y0, p.y0)


@pytest.mark.parametrize("parts", ["v b g y0 bias", "v b", "v", "b bias", "b g", "g y0"])
def test_bwd_dy(problem, parts):
    p, asked = problem, parts.split()
    if parts not in ("v b g y0 bias", "v b") and p.y.shape[0] == 65:
        pytest.skip("the large ones in full only")
    given = lambda name, value: value if name in asked else None
    args = (p.y, given("v", p.v), given("b", p.b), given("g", p.g), given("y0", p.y0), "bias" in asked)
    got = twice(lambda: lowrank.bwd_dy(*args))
    want, size = reference.bwd_dy(*map(exact, args)), reference.bwd_dy(*map(magnitude, args))
    t, n = p.y.shape
    assert got[0].dtype == p.dtype and all(part.dtype == F for part in got[1:])
    for one, truth, total, terms in zip(got, want, size, (1, n + 1, t + 1, t, t + 1), strict=True):
        check(one, truth, total, terms)


def test_skinny_w(problem):
    p = problem
    got = twice(lambda: lowrank.skinny_w(p.x, p.a))
    for one, want, size in zip(got, reference.skinny_w(exact(p.x), exact(p.a)), reference.skinny_w(magnitude(p.x), magnitude(p.a)), strict=True):
        check(one, want, size, p.x.shape[1])


@pytest.mark.parametrize("scaled", [True, False])
def test_merge(problem, scaled):
    p = problem
    g = torch.linspace(0.9, 1.2, len(p.x)) if scaled else None
    w, want, size = wide_rows(p.x), exact(p.x), magnitude(p.x)
    got = twice(lambda out: lowrank.merge_(out, p.u, p.a, g), w)
    reference.merge_(want, exact(p.u), exact(p.a), exact(g))
    reference.merge_(size, magnitude(p.u), magnitude(p.a), magnitude(g))
    terms = sum(p.ranks) + 4
    check(w, want, size, terms)
    # both sums, from what was stored: each factor D is off as an fp32 result is
    wanted, kept = want - exact(p.x), w.double() - exact(p.x)
    error = (terms + 8) * 2.0**-24 * size
    truth = torch.stack([(wanted * kept).sum(), wanted.square().sum()])
    slack = torch.stack([(error * kept.abs()).sum(), (error * (2 * wanted.abs() + error)).sum()])
    assert got.dtype == torch.float64 and ((got - truth).abs() <= slack + 1e-300).all(), (got, truth, slack)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (17, 33), (65, 130), (65, 384), (17, 16)])
@pytest.mark.parametrize("dtype", [F, B, H])
def test_dropout_to_the_bit(shape, p, dtype):
    x = wide_rows(torch.randn(shape).to(dtype))
    x[0, 0] = float("inf")
    threshold = reference.threshold_of(p)
    assert torch.equal(twice(lambda: lowrank.dropout(x, SEED, threshold)), reference.dropout(x, SEED, threshold))


def seen_masks(t, k, thresholds):
    """The keep-masks that shrink, bwd_x and add_ apply, each read off a product with unit vectors or ones."""
    s = len(thresholds)
    ones = torch.ones(t, k)
    u = lowrank.bwd_x(ones, torch.eye(t).repeat(1, s), SEED, thresholds, [t] * s).reshape(s, t, k) != 0
    added = torch.zeros(t, k)
    lowrank.add_(added, (2.0 ** torch.arange(s)).expand(t, s).contiguous() / 64, torch.ones(s, k), SEED, thresholds, [1] * s)
    return u, added, lowrank.shrink(ones, torch.ones(s, k), SEED, thresholds, [1] * s)


@pytest.mark.parametrize("shape", [(3, 16), (5, 33), (17, 40)])
@pytest.mark.parametrize("thresholds", [[32768], [6554, 0, 58982], [1, 65535, 32768, 100, 40000, 7]])
def test_masks_to_the_bit(shape, thresholds):
    t, k = shape
    want = torch.stack([reference.dropout_mask(t, k, SEED, h, i) for i, h in enumerate(thresholds)])
    u, added, shrunk = seen_masks(t, k, thresholds)
    assert torch.equal(u, want)
    scale = torch.tensor([65536 / (65536 - h) for h in thresholds])
    assert torch.allclose(shrunk, want.sum(2).T * scale, rtol=2**-22, atol=0)
    assert torch.allclose(added, torch.einsum("stk,s->tk", want.float(), scale * 2.0 ** torch.arange(len(scale)) / 64), rtol=2**-21, atol=0)


@pytest.mark.parametrize("k", [32, 33])
def test_masks_do_not_depend_on_tiles(monkeypatch, k):
    before = seen_masks(17, k, [6554, 32768])
    small = lowrank_tiles.Tile(16, 16, 4, 2, 3, 1)
    monkeypatch.setattr(lowrank_shrink, "shrink_tile", lambda *_: small)
    monkeypatch.setattr(lowrank_grads, "bwd_x_tile", lambda *_: small._replace(splits=2))
    monkeypatch.setattr(lowrank_expand, "expand_tile", lambda *_: small)
    after = seen_masks(17, k, [6554, 32768])
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert torch.allclose(before[2], after[2], rtol=2**-22, atol=0)


@triton.jit
def probe(seed, out, row, K: tl.int32, EIGHTS: tl.constexpr):
    keep = keep_tile(tl.load(seed), row, 64, K, 3, 32768, 16, 16, EIGHTS)
    tl.store(out + tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :], keep.to(tl.int8))


def test_counter_passes_32_bits():
    """Elements beyond 2^35, block numbers beyond 2^32, without a tensor of that size."""
    columns, row = 1 << 20, 40_000
    want = torch.cat([reference.dropout_mask(1, 16, SEED, 32768, 3, first=(row + i) * columns + 64) for i in range(16)])
    for eights in (True, False):
        out = torch.zeros(16, 16, dtype=torch.int8)
        probe[(1,)](SEED, out, row, columns, eights)
        assert torch.equal(out.bool(), want)


def test_splits_and_partials_change_little_and_repeat(monkeypatch):
    """A cut sum stays within the bound of an uncut one, whatever the tiles."""
    p = Problem(65, 384, 130, [16, 3], [0.1, 0.0], B, F)
    args = (p.x, p.a, SEED, p.h, p.ranks)
    for rows, cols, splits in ((32, 32, 6), (64, 128, 1)):
        steps = triton.cdiv(triton.cdiv(384, cols), splits)
        monkeypatch.setattr(lowrank_shrink, "shrink_tile", lambda *_, tile=(rows, cols, 4, 2, splits, steps): lowrank_tiles.Tile(*tile))
        check(twice(lambda: lowrank.shrink(*args)), reference.shrink(*map(exact, args)), reference.shrink(*map(magnitude, args)), 384)


def test_infinities_and_nan_stay_where_they_are():
    x, a = torch.ones(4, 32, dtype=B), torch.ones(3, 32)
    x[1, 5], a[2, 7] = float("nan"), float("inf")
    u = lowrank.shrink(x, a, None, [0], [3])
    want = reference.shrink(x, a, None, [0], [3])
    assert torch.equal(u.isnan(), want.isnan()) and torch.equal(u.isinf(), want.isinf())
    y = torch.zeros(4, 32, dtype=B)
    lowrank.add_(y, torch.ones(4, 3), a, None, [0], [3])
    assert y[:, 7].isinf().all() and y.isfinite().sum() == 4 * 31


def test_dropped_infinity_is_dropped():
    x = torch.ones(8, 32)
    x[~reference.dropout_mask(8, 32, SEED, 32768)] = float("inf")
    assert lowrank.shrink(x, torch.ones(2, 32), SEED, [32768], [2]).isfinite().all()
    assert lowrank.bwd_x(x, torch.ones(8, 2), SEED, [32768], [2]).isfinite().all()


@pytest.mark.parametrize(
    "ranks, thresholds, groups",
    [
        ([16, 16, 16], [0, 0, 0], [((48,), (0,), 64, 0, 0)]),
        ([16, 16], [1, 0], [((16, 16), (1, 0), 16, 0, 0)]),
        ([64, 64, 64], [1, 1, 1], [((64, 64), (1, 1), 64, 0, 0), ((64,), (1,), 64, 128, 2)]),
        ([1] * 6, [9] * 6, [((1,) * 4, (9,) * 4, 16, 0, 0), ((1,) * 2, (9,) * 2, 16, 4, 4)]),
        ([300, 3], [7, 7], [((300,), (7,), 128, 0, 0), ((3,), (7,), 16, 300, 1)]),
        ([3, 300], [7, 7], [((3,), (7,), 16, 0, 0), ((300,), (7,), 128, 3, 1)]),
    ],
)
def test_groups(ranks, thresholds, groups):
    got = group_segments(ranks, thresholds, 128, 128)
    assert [(g.ranks, g.thresholds, g.width, g.start, g.stream) for g in got] == groups


def test_tiles_cover_the_sum():
    for t in (1, 16, 17, 100, 8192, 131072):
        for k in (1, 64, 384, 4096, 14336):
            for width in (16, 32, 64, 128):
                for size in (2, 4):
                    tile = lowrank_tiles.shrink_tile(t, k, width, size, 4, 1)
                    assert tile.splits * tile.steps * tile.cols >= k > (tile.splits - 1) * tile.steps * tile.cols
                    tile = lowrank_tiles.bwd_x_tile(t, k, width, size, 1)
                    assert tile.splits * tile.steps * tile.rows >= t > (tile.splits - 1) * tile.steps * tile.rows
                    tile = lowrank_tiles.bwd_dy_tile(t, k, width, size, False)
                    assert tile.splits * tile.steps * tile.rows >= t > (tile.splits - 1) * tile.steps * tile.rows


def test_sums_of_merge_are_exact_and_do_not_raise_where_they_overflow():
    inf = float("inf")
    assert lowrank_expand.exact_sum([1e16, 1.0, 1.0]) == 1e16 + 2
    assert lowrank_expand.exact_sum([1.7e308, 1.7e308]) == inf
    assert lowrank_expand.exact_sum([inf, 1.0]) == inf
    assert str(lowrank_expand.exact_sum([inf, -inf])) == "nan"

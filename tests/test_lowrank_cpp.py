"""The C++ low-rank kernels against the reference in fp64, on shapes, strides and values chosen to hurt.

Limit of an error: 1.2 times torch's in fp32 on the same numbers, plus four roundings (2^-24 each) of the sums of absolute values.
"""

import functools
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fusedadapt as fa
from fusedadapt.reference import lowrank as reference
from fusedadapt.testing import poisoned_memory

_core = pytest.importorskip("fusedadapt._core")
from fusedadapt.ops import dense_low  # noqa: E402, F401 - defines torch.ops.fusedadapt.dense_add
from fusedadapt.ops import lowrank_cpp as cpp  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = [isa for isa in ("base", "avx2", "avx512") if _core.use_isa(isa)]
_core.use_isa(ISAS[-1])
HEIGHTS, WIDTHS, RANKS, DROPS = [1, 2, 17, 129], [1, 7, 16, 33, 384, 1025], [1, 3, 8, 16, 24, 130], [0.0, 0.1, 0.5, 0.9]
SEED = torch.tensor([-0x123456789ABCDEF])
U32 = 2.0**-24


@pytest.fixture(autouse=True)
def masks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference draws its masks in numpy, about 5 ms each: the same ones come up again and again."""
    monkeypatch.setattr(reference, "dropout_mask", _mask)


_mask = functools.lru_cache(maxsize=1000)(reference.dropout_mask)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch's threads wait for each other by spinning, which on a busy machine takes longer than these small products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(ISAS[-1])


class Case:
    """Random matrices of one shape: rows apart, adapters of any dtype and orientation."""

    def __init__(self, number: int, dtype: torch.dtype) -> None:
        rng, self.gen = random.Random(f"{number} {dtype}"), torch.Generator().manual_seed(number)
        # each value of each list comes up, in changing company
        self.t, self.k = HEIGHTS[number % 4], WIDTHS[(number + number // 6) % 6]
        self.ranks = [RANKS[(number + number // 4) % 6]] + [rng.choice(RANKS[:4]) for _ in range(rng.choice((0, 0, 1, 2)))]
        self.thresholds = [reference.threshold_of(rng.choice(DROPS)) for _ in self.ranks]
        self.dtype, self.rank = dtype, sum(self.ranks)
        own = rng.choice((torch.float32, dtype, torch.bfloat16))
        self.x, self.y0 = (self.matrix(self.t, self.k + rng.choice((0, 3)))[:, : self.k] for _ in range(2))
        self.a = self.matrix(self.k, self.rank, own).T if rng.random() < 0.5 else self.matrix(self.rank, 2 * self.k, own)[:, ::2]
        self.u = self.matrix(self.t, self.rank, torch.float32)
        self.row, self.column, self.bias = (self.matrix(1, n, torch.float32)[0] for n in (self.t, self.k, self.k))

    def matrix(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(rows, columns, generator=self.gen).to(dtype or self.dtype)

    def __repr__(self) -> str:
        return f"T={self.t} K={self.k} ranks={self.ranks} thresholds={self.thresholds} {self.dtype} A {self.a.dtype} {self.a.stride()}"


def in_place(call: Callable[..., Tensor | None]) -> Callable[..., list[Tensor]]:
    """Changes a copy whose rows lie apart, and checks that what lies between them stays."""

    def on_copy(y: Tensor, *rest: object) -> list[Tensor]:
        home = torch.full((y.shape[0], y.shape[1] + 5), 7.0, dtype=y.dtype)
        work = home[:, : y.shape[1]]
        work.copy_(y)
        out = call(work, *rest)
        assert (home[:, y.shape[1] :] == 7).all(), "wrote outside of y"
        return [work] if out is None else [work, out]

    return on_copy


def fill(bias: Tensor | None, u: Tensor, a: Tensor, *drops: object) -> Tensor:
    """bias + drop(u a), written over NaN into rows that lie apart."""
    t, k = u.shape[0], a.shape[1]
    home = torch.full((t, k + 5), 7.0)
    home[:, :k] = torch.nan
    cpp.fill_(home[:, :k], bias, (0, 0, k), u, a, *drops)  # type: ignore[arg-type]
    assert (home[:, k:] == 7).all(), "wrote outside of the tile"
    return home[:, :k]


def fill_in_steps(bias: Tensor | None, u: Tensor, a: Tensor, *drops: object) -> Tensor:
    y = u.new_zeros(u.shape[0], a.shape[1]) if bias is None else bias.to(u.dtype).expand(u.shape[0], -1).clone()
    reference.add_(y, u, a, *drops)  # type: ignore[arg-type]
    return y


def calls(backend: object, c: Case) -> dict[str, tuple[Callable[..., object], list[Tensor | None], list[object]]]:
    """Function, tensors, other arguments."""
    f = lambda name: getattr(backend, name)
    drops = [SEED, c.thresholds, c.ranks]
    return {
        "shrink": (f("shrink"), [c.x, c.a], drops),
        "bwd_x": (f("bwd_x"), [c.x, c.u], drops),
        "add_": (in_place(f("add_")), [c.x, c.u, c.a], drops),
        "fill_": (fill if backend is cpp else fill_in_steps, [c.bias, c.u, c.a], drops),
        "fill_ plain": (fill if backend is cpp else fill_in_steps, [None, c.u, c.a], drops),
        "scale_add_": (in_place(f("scale_add_")), [c.x, c.u, c.a, c.column, c.bias], []),
        "scale_add_ alone": (in_place(f("scale_add_")), [c.x, None, None, c.column, None], []),
        "bwd_dy": (f("bwd_dy"), [c.x, c.u, c.a.T, c.column, c.y0], [True]),
        "bwd_dy products": (f("bwd_dy"), [c.x, c.u, c.a.T, None, None], [False]),
        "bwd_dy v": (f("bwd_dy"), [c.x, c.u, None, None, None], [False]),
        "bwd_dy b": (f("bwd_dy"), [c.x, None, c.a.T, c.column, None], [False]),
        "bwd_dy sums": (f("bwd_dy"), [c.x, None, None, None, c.y0], [True]),
        "skinny_w": (f("skinny_w"), [c.x, c.a], []),
        "merge_": (in_place(f("merge_")), [c.x, c.u, c.a, c.row], []),
        "merge_ plain": (in_place(f("merge_")), [c.x, c.u, c.a, None], []),
    }


NAMES = list(calls(cpp, Case(0, torch.float32)))


def run(backend: object, name: str, c: Case, change: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
    call, tensors, rest = calls(backend, c)[name]
    out = call(*(t if t is None else change(t) for t in tensors), *rest)
    return list(out) if isinstance(out, (list, tuple)) else [out]  # type: ignore[list-item]


def norm(t: Tensor) -> float:
    return float(t.double().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_error_against_fp64(name: str, dtype: torch.dtype, isa: str) -> None:
    for number in range(0, 24) if isa == ISAS[-1] else range(0, 24, 3):
        c = Case(number, dtype)
        with poisoned_memory():
            ours = run(cpp, name, c)
        exact = run(reference, name, c, Tensor.double)
        torch32 = run(reference, name, c, Tensor.float)
        size = run(reference, name, c, lambda t: t.double().abs())
        assert len(ours) == len(exact)
        for k, (got, true, eager, terms) in enumerate(zip(ours, exact, torch32, size, strict=True)):
            assert got.shape == true.shape and got.dtype in (dtype, torch.float32, torch.float64)
            limit = 1.2 * norm(eager.double() - true) + 4 * U32 * norm(terms)
            if got.dtype in (torch.bfloat16, torch.float16):
                limit += norm(true.to(got.dtype).double() - true)  # the one rounding
            if name.startswith("merge_") and k == 1:
                # of a change far below the rounding of W only the order of magnitude survives a different last bit
                limit = (1e-5 if dtype == torch.float32 else 1e-2) * norm(true) + norm(run(reference, name, c)[1] - true) * 1.2
            assert norm(got.double() - true) <= limit, (c, k, norm(got.double() - true), limit)
            if got.dtype == torch.float32 and got.numel() >= 1000:  # fp32 adapters on 16-bit data: fp32 grade
                assert norm(got.double() - true) <= 1e-5 * norm(true), (c, k)


@pytest.mark.parametrize("name", NAMES)
def test_repeats_and_does_not_depend_on_threads(name: str, isa: str) -> None:
    for number, dtype in ((3, torch.float32), (11, torch.bfloat16), (19, torch.float16), (21, torch.float32)):
        c = Case(number, dtype)
        results = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(cpp, name, c))
        for other in results[1:]:
            assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True)), (c, threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_the_reference_bit_for_bit(dtype: torch.dtype, isa: str) -> None:
    for number in range(12):
        c = Case(number, dtype)
        for p in (0.0, 0.1, 0.5, 0.9, 1.0):
            threshold = reference.threshold_of(p)
            with poisoned_memory():
                ours = cpp.dropout(c.x, SEED, threshold)
            assert torch.equal(ours, reference.dropout(c.x, SEED, threshold)), (c, p)


@pytest.mark.parametrize("first", [0, 5, 2**32 - 3, 2**35 - 77, 2**35 + 2**34 - 9, 2**52 + 1])
def test_masks_anywhere_in_the_element_index(first: int, isa: str) -> None:
    for stream, threshold, seed in ((0, 6554, 1), (1, 32768, -1), (7, 65535, 2**62 + 12345), (2, 1, 0)):
        keep = torch.empty(1000, dtype=torch.int16)
        _core.lr_mask(keep.data_ptr(), first, 1000, seed & (2**64 - 1), stream, threshold)
        true = reference.dropout_mask(1, 1000, seed, threshold, stream, first=first)[0]
        assert torch.equal(keep == -1, true) and torch.equal(keep == 0, ~true)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["shrink", "bwd_x", "add_", "fill_", "scale_add_", "bwd_dy", "skinny_w", "merge_"])
def test_nan_and_infinity(name: str, dtype: torch.dtype, isa: str) -> None:
    """Where the reference gives NaN or an infinity the kernels do, and nowhere else; what is dropped is gone whatever it was."""
    for number in (3, 7, 10):
        c = Case(number, dtype)
        c.x[c.t // 2, c.k // 2], c.x[0, c.k - 1] = float("nan"), float("inf")
        c.u[-1, 0] = -float("inf")
        for got, true in zip(run(cpp, name, c), run(reference, name, c), strict=True):
            assert torch.equal(got.isnan(), true.isnan()), (c, name)
            assert torch.equal(got.isinf(), true.isinf()) and torch.equal(got[got.isinf()], true[true.isinf()].to(got.dtype)), (c, name)


def test_one_mask_for_all_functions(isa: str) -> None:
    """The mask of shrink, bwd_x and add_ read off through unit vectors."""
    t, k, ranks, thresholds = 51, 300, [2, 1], [6554, 52429]
    x, y = torch.ones(t, k), torch.zeros(t, k)
    both = [reference.drop(x, SEED, threshold, i) for i, threshold in enumerate(thresholds)]
    m = cpp.bwd_x(x, torch.eye(t)[:, :1].repeat(1, 3), SEED, thresholds, ranks)
    assert torch.equal(m[0] != 0, both[0][0] != 0) and torch.equal(m[2] != 0, both[1][0] != 0)
    cpp.add_(y, torch.tensor([[0.0, 0.0, 1.0]]).repeat(t, 1), torch.ones(3, k), SEED, thresholds, ranks)
    assert torch.equal(y != 0, both[1] != 0)
    u = cpp.shrink(x, torch.eye(k)[[4, 299, 7]], SEED, thresholds, ranks)
    assert torch.equal(u != 0, torch.stack([both[0][:, 4], both[0][:, 299], both[1][:, 7]], 1) != 0)


def test_masks_are_drawn_once_for_both_uses(isa: str) -> None:
    """`bwd_x` leaves its masks to the next `fill_` or `add_` of the same matrix, and to no other: bits are those of masks drawn anew."""
    t, k, ranks, thresholds, gen = 75, 1160, [3, 2, 16], [6554, 0, 32768], torch.Generator().manual_seed(1)
    x, u, a = (torch.randn(*shape, generator=gen) for shape in ((t, k), (t, 21), (21, k)))
    other = torch.tensor([5])

    def results(seed: Tensor, thresholds: list[int], rows: int = t, columns: int = k) -> list[Tensor]:
        whole, part, sum_ = torch.empty(rows, columns), torch.empty(rows - 50, columns - 640), x[:rows, :columns].clone()
        cpp.fill_(whole, None, (0, 0, columns), u[:rows], a[:, :columns], seed, thresholds, ranks)
        cpp.fill_(part, None, (50, 640, columns), u[50:rows], a[:, 640:columns], seed, thresholds, ranks)
        cpp.add_(sum_, u[:rows], a[:, :columns], seed, thresholds, ranks)
        return [whole, part, sum_]

    def same(left: list[Tensor], right: list[Tensor]) -> bool:
        return all(torch.equal(p, q) for p, q in zip(left, right, strict=True))

    cpp.bwd_x(x[:1, :1].clone(), u[:1], other, thresholds, ranks)  # leaves masks of a matrix that is nobody's
    changed = ((SEED, [6554, 0, 32769]), (other, thresholds), (SEED, [0, 6554, 32768]), (SEED, thresholds, t, 1000))
    drawn, others = results(SEED, thresholds), [results(*case) for case in changed]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        m = cpp.bwd_x(x, u, SEED, thresholds, ranks)
        assert same(results(SEED, thresholds), drawn)
        assert all(same(results(*case), anew) for case, anew in zip(changed, others, strict=True))
        assert torch.equal(m, cpp.bwd_x(x, u, SEED, thresholds, ranks))
    cpp.bwd_x(x[:60].clone(), u[:60], SEED, thresholds, ranks)  # fewer rows than are asked for next
    assert same(results(SEED, thresholds), drawn)


def test_tiles_of_a_product_are_the_whole(isa: str) -> None:
    """A tile takes its masks from where it lies in the matrix: bits do not depend on the cut."""
    t, k, ranks, thresholds, gen = 75, 1160, [3, 16], [6554, 0], torch.Generator().manual_seed(1)
    bias, u, a = (torch.randn(*shape, generator=gen) for shape in ((k,), (t, 19), (19, k)))
    whole, parts = torch.empty(t, k), torch.empty(t, k)
    cpp.fill_(whole, bias, (0, 0, k), u, a, SEED, thresholds, ranks)
    for i in (slice(0, 51), slice(51, t)):
        for j in (slice(0, 5), slice(5, 1100), slice(1100, k)):
            cpp.fill_(parts[i, j], bias[j], (i.start, j.start, k), u[i], a[:, j], SEED, thresholds, ranks)
    assert torch.equal(whole, parts)


def test_a_branch_joins_an_fp32_product() -> None:
    """One buffer for branch, bias and product, no less exact than one after the other; operands with any strides."""
    t, k, n, gen = 150, 90, 130, torch.Generator().manual_seed(1)
    p, ops = torch.tensor([0.1, 0.0], dtype=torch.float64), torch.ops.fusedadapt
    for transposed in (False, True):
        x, w = (torch.randn(rows, 2 * columns, generator=gen)[:, ::2] for rows, columns in ((t, n if transposed else k), (n, k)))
        width = k if transposed else n
        bias = None if transposed else torch.randn(2 * n, generator=gen)[::2]
        u, a = torch.randn(5, t, generator=gen).T, torch.randn(width, 5, generator=gen).T
        ours = ops.dense_add(x, w, bias, transposed, u, a, SEED, p, [4, 1])
        steps = x @ (w if transposed else w.T) + (0 if bias is None else bias)
        ops.lr_add_(steps, u, a, SEED, p, [4, 1])
        exact = x.double() @ (w.double() if transposed else w.double().T) + (0 if bias is None else bias.double())
        reference.add_(exact, u.double(), a.double(), SEED, [6554, 0], [4, 1])
        assert norm(ours.double() - exact) <= 1.2 * norm(steps.double() - exact)
        assert torch.equal(ours, ops.dense_add(x, w, bias, transposed, u, a, SEED, p, [4, 1]))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_branch_joins_widened_tiles(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of tiles; rounded once on every backend, so never less exact than product and branch one after the other."""
    monkeypatch.setattr("fusedadapt.ops.dense._SCRATCH", 1)  # tiles of 64 x 64
    t, k, n, gen = 150, 90, 130, torch.Generator().manual_seed(1)
    x, w = (torch.randn(*shape, generator=gen).bfloat16() for shape in ((t, n if transposed else k), (n, k)))
    width = k if transposed else n
    bias = None if transposed else torch.randn(n, generator=gen).bfloat16()
    u, a = torch.randn(t, 5, generator=gen), torch.randn(5, width, generator=gen)
    p = torch.tensor([0.1, 0.0], dtype=torch.float64)
    ops = torch.ops.fusedadapt
    ours = ops.dense_add(x, w, bias, transposed, u, a, SEED, p, [4, 1])
    steps = ops.dense_widened(x, w, bias, transposed)
    ops.lr_add_(steps, u, a, SEED, p, [4, 1])
    exact = x.double() @ (w.double() if transposed else w.double().T) + (0 if bias is None else bias.double())
    reference.add_(exact, u.double(), a.double(), SEED, [6554, 0], [4, 1])
    assert norm(ours.double() - exact) <= norm(exact.bfloat16().double() - exact) + 1e-6 * norm(exact)
    assert norm(ours.double() - exact) < norm(steps.double() - exact)
    with fa.backend("reference"):
        other = ops.dense_add(x, w, bias, transposed, u, a, SEED, p, [4, 1])
    assert norm(other.double() - exact) <= norm(exact.bfloat16().double() - exact) + 1e-6 * norm(exact)


def test_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="starts from fp32"):
        cpp.fill_(torch.ones(2, 2).half(), None, (0, 0, 2), torch.ones(2, 1), torch.ones(1, 2), None, [0], [1])
    with pytest.raises(TypeError, match="fp32, bf16 or fp16; got torch.int32"):
        cpp.shrink(torch.ones(2, 2, dtype=torch.int32), torch.ones(1, 2), None, [0], [1])
    with pytest.raises(ValueError, match="add up"):
        cpp.shrink(torch.ones(2, 2), torch.ones(1, 2), None, [0, 0], [1, 1])
    with pytest.raises(ValueError, match="thresholds"):
        cpp.shrink(torch.ones(2, 2), torch.ones(1, 2), SEED, [65536], [1])


@pytest.mark.parametrize("lost", ["x", "a", "bias"])
def test_tensors_without_memory_are_refused(lost: str) -> None:
    """A parameter that FSDP has given back has a shape and no address, which for the kernels means that there is no such argument."""
    tensors = {"x": torch.ones(5, 8), "a": torch.ones(2, 8), "bias": torch.ones(4)}
    tensors[lost].untyped_storage().resize_(0)
    x, a, bias = tensors.values()
    with pytest.raises(ValueError, match="expected tensors with memory; got"):
        if lost == "bias":
            cpp.scale_add_(torch.ones(5, 4), None, None, torch.ones(4), bias)
        else:
            cpp.shrink(x, a, None, (0,), [2])
    with pytest.raises(ValueError, match="expected tensors with memory; got"):
        cpp.shrink(torch._efficientzerotensor(5, 8), torch.ones(2, 8), None, (0,), [2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_take_adapters_as_they_lie(dtype: torch.dtype, isa: str) -> None:
    """Between the rows of all matrices lie NaNs, and in the adapters infinities, which reach their own results alone."""
    gen = torch.Generator().manual_seed(5)

    def matrix(rows: int, columns: int) -> Tensor:
        wide = torch.full((rows, columns + 5), torch.nan, dtype=dtype)
        return wide[:, 1 : columns + 1].copy_(torch.randn(rows, columns, generator=gen))

    for t, k, r, n in ((1, 7, 3, 5), (1, 16, 16, 300), (3, 33, 17, 16), (4, 100, 24, 257), (5, 65, 31, 33), (8, 1025, 130, 70), (48, 40, 200, 9)):
        x, a, b = matrix(t, k), matrix(r, k), matrix(n, r)
        a[r // 2, k - 1], b[n // 2, r - 1] = torch.inf, torch.inf
        u = cpp.shrink(x, a, None, [0], [r])
        want = x.double() @ a.double().t()
        close = {"rtol": 1e-5, "atol": 1e-4, "equal_nan": True}
        torch.testing.assert_close(u.double(), want, **close)
        u[:, r // 2] = 1.0
        y = matrix(t, n)
        want = (y.double() + u.double() @ b.double().t()).to(dtype)
        cpp.add_(y, u, b.t(), None, [0], [r])
        torch.testing.assert_close(y, want, rtol=4 * torch.finfo(dtype).eps, atol=1e-3 if dtype != torch.float32 else 1e-4)

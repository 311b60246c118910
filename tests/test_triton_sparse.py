"""The sparse Triton kernels, interpreted, against the pure PyTorch truth: equal bits."""

import pytest
import torch
import triton
from sparse_cases import DTYPES, KINDS, check_moves, check_swap, generator, item, kind, same
from torch import Tensor

from fusedadapt.kernels import sparse as gpu
from fusedadapt.kernels import sparse_mask, sparse_rows
from fusedadapt.reference import merge as merging
from fusedadapt.reference import sparse as truth
from fusedadapt.reference import sparse_parts as ref
from fusedadapt.reference.merge import Cut, Part, Recipe

SIZES = (0, 1, 31, 32, 33, 1023, 1024, 1025)
SHAPES = [(7, 5), (0,), (1,), (33,), (5, 1025), (3, 0), (2, 3, 16), (1024,)]
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("quick_calls")]


def test_runs_interpreted():
    assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before triton is imported (tests/conftest.py does)"


def selected(items: list[ref.Item], score: str, nan: str, keys: list[Tensor], k: int) -> list[Tensor]:
    key, above, _ = truth.kth_key(keys, k)
    return gpu.mark(items, score, nan, torch.tensor([key]), torch.tensor([k - above]))


def check_levels(items: list[ref.Item], score: str, nan: str, keys: list[Tensor], k: int) -> None:
    """The histograms on the way to the k-th key."""
    key = truth.kth_key(keys, k)[0]
    for shift, bits in gpu.LEVELS:
        prefix = torch.tensor([key >> (shift + bits)]) if shift + bits < 32 else None
        assert same([gpu.histogram(items, score, nan, shift, bits, prefix)], [ref.histogram(items, score, nan, shift, bits, prefix)]), shift


@pytest.mark.parametrize("name", KINDS)
def test_selection_of_every_size(name):
    for n, dtype in zip(SIZES, (*DTYPES, *DTYPES, *DTYPES)):
        items, nan = [item(name, (n,), "abs", dtype, seed=n)], "lowest" if n % 3 == 1 else "highest"
        keys = [ref._keys(items[0], "abs", nan)]
        for k in sorted({1, n // 3, n} - {0}) if n else []:
            assert same(selected(items, "abs", nan, keys, k), [truth.pack(m) for m in truth.topk(keys, k)]), (n, k)
            assert same(gpu.select(items, "abs", nan, k), [truth.pack(m) for m in truth.topk(keys, k)]), (n, k)
        if n >= 1023:
            check_levels(items, "abs", nan, keys, n // 3)
        got = gpu.mark(items, "abs", nan, torch.tensor([truth.TOP + 1]), torch.tensor([0]))
        assert same(got, [truth.pack(torch.zeros(n, dtype=torch.bool))])


@pytest.mark.parametrize("score", truth.SCORES)
def test_lists_of_mixed_sizes_and_every_score(score):
    for turn, name in enumerate(KINDS[truth.SCORES.index(score) % 3 :][:3]):
        items = [item(name, s, score, DTYPES[(turn + seed) % 3], torch.bfloat16, seed) for seed, s in enumerate(SHAPES)]
        keys = [ref._keys(i, score, "highest") for i in items]
        k = sum(x.numel() for x, _ in items) // 2
        assert same(selected(items, score, "highest", keys, k), [truth.pack(m) for m in truth.topk(keys, k)]), name
        for ties in ("lowest_index", "inclusive", "exclusive"):
            assert same(gpu.select(items, score, "highest", k, ties), ref.select(items, score, "highest", k, ties)), (name, ties)
        check_levels(items, score, "highest", keys, k)


def test_ties_cross_chunks_and_tensors():
    items = [(torch.full((n,), 0.25), None) for n in (10000, 31, 20001, 0, 9000)]
    keys = [ref._keys(i, "abs", "highest") for i in items]
    for k in (0, 9999, 10031, 25000, 39032):
        got = gpu.mark(items, "abs", "highest", truth.key_of(torch.tensor([0.25])), torch.tensor([k]))
        assert same(got, [truth.pack(m) for m in truth.mark(keys, int(truth.key_of(torch.tensor(0.25))), k)]), k


@pytest.mark.parametrize("name", KINDS)
def test_a_list_of_bf16_takes_two_levels(name):
    items = [item(name, (n,), "abs", torch.bfloat16, seed=n) for n in (5000, 0, 1025, 33)]
    for k, nan in ((0, "highest"), (1, "lowest"), (2000, "highest"), (2000, "lowest"), (6057, "lowest"), (6058, "highest")):
        assert same(gpu.select(items, "abs", nan, k), ref.select(items, "abs", nan, k)), (k, nan)


@pytest.mark.parametrize("length", [1, 3, 4, 8, 32, 33, 64, 200, 1024])
def test_rows(length):
    """By rank, by radix; rows that are whole words, share words, or begin on new ones."""
    for number, name in enumerate(KINDS):
        score = truth.SCORES[(length + number) % 5]
        columns = length * (2 if number % 2 else 1)  # a row, or a block of one
        x, other = item(name, (3 if length > 32 else 11, columns), score, DTYPES[number % 3], torch.bfloat16, seed=number)
        for turn, k in enumerate((length // 3, 0, 1, length)):
            ties = ("lowest_index", "inclusive", "exclusive")[(turn + number) % 3]
            if turn == 0 or length < 70:
                given = (x, other, score, ("highest", "lowest")[turn % 2], k, length, ties, (number + turn) % 2 == 0)
                assert torch.equal(gpu.rows(*given), ref.rows(*given)), (name, k, ties)


@pytest.mark.parametrize("score", ["abs", "abs_scaled"])
@pytest.mark.parametrize("length", [1000, 1024])
def test_rows_longer_than_a_tile_are_read_again(monkeypatch, score, length):
    monkeypatch.setattr(sparse_rows, "_TILES", (64, 128, 256))
    monkeypatch.setattr(sparse_rows, "_LONG", 256)
    for name, k in (("ties", 400), ("special", 1), ("normal", 999)):
        x, other = item(name, (3, length), score, torch.bfloat16, torch.bfloat16, seed=2)
        for aligned in (False, True):
            given = (x, other, score, "highest", k, length, "lowest_index", aligned)
            assert torch.equal(gpu.rows(*given), ref.rows(*given)), (name, aligned)


def test_rows_over_several_rows_of_x():
    x, factors = kind("normal", 12 * 40, torch.float32).view(12, 40), kind("normal", 40, torch.float32, 3).abs()
    given = (x, factors, "abs_scaled", "highest", 50, 120, "lowest_index", False)
    assert torch.equal(gpu.rows(*given), ref.rows(*given))


@pytest.mark.parametrize("score", ["given", "abs", "abs_scaled"])
def test_energy_is_exact(score):
    for name in KINDS:
        items = [item(name, (n,), score, DTYPES[n % 3], torch.bfloat16, n) for n in (9000, 0, 33, 5)]
        for a, b in zip(gpu.energy(items, score), ref.energy(items, score)):
            assert torch.equal(a.view(torch.int64), b.view(torch.int64)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_colstat(dtype):
    for shape in ((0, 5), (3, 0), (1, 1), (200, 7), (130, 300)):
        x = kind("normal", shape[0] * shape[1], dtype).view(shape)
        assert same([gpu.colstat(x)], [ref.colstat(x)]), shape


@pytest.mark.parametrize("base_dtype", [None, *DTYPES])
def test_cuts(base_dtype):
    for number, name in enumerate(KINDS):
        n = (9000, 1025, 31, 3000, 20001)[number]
        models = [kind(name, n, dtype, i, i % 2 == 0) for i, dtype in enumerate((*DTYPES, torch.bfloat16))]
        base = None if base_dtype is None else kind("ties", n, base_dtype, 9)
        for counts in ([n // 3, 1, n - 1, n // 2], [0, n, n // 5, n + 3]):
            assert gpu.cuts(base, models, counts) == merging.cuts(base, models, counts), (name, counts)
    assert gpu.cuts(None, [], []) == []


def test_one_launch_moves_a_model(monkeypatch):
    """Types, sizes and 32- and 64-bit positions in one table; bits that are NaN in any type survive."""
    launches = []
    kernel = sparse_mask.move_kernel
    monkeypatch.setattr(sparse_mask, "move_kernel", Counted(kernel, launches))
    for op in sparse_mask.MOVES:
        ours, theirs = [], []
        for number, n in enumerate((0, 1, 5000, 37, 2500, 1024)):
            index = (torch.rand(n, generator=generator(n)) < 0.5).nonzero().view(-1)
            x, dtype = kind("special", n, DTYPES[number % 3], number), DTYPES[(number + (op in ("scatter", "add"))) % 3]
            values = kind("special", index.numel(), dtype, number + 5)
            at = index if number % 2 else index.int()
            ours.append((x.clone(), at, values.clone()))
            theirs.append((x, at, values))
        gpu.move_all(op, ours, 0.3)
        ref.move_all(op, theirs, 0.3)
        for a, b in zip(ours, theirs):
            for got, wanted in ((a[0], b[0]), (a[2], b[2])):
                assert ((got == wanted) | (got.isnan() & wanted.isnan())).all(), op
    assert len(launches) == 4
    gpu.move_all("add", [], 1.0)


class Counted:
    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("n, m", [(0, 4), (1, 2), (2, 4), (4, 8), (3, 5), (5, 16)])
def test_nm(n, m):
    for seed, name in enumerate(KINDS):
        x, other = item(name, (37, 8 * m), "abs_product", DTYPES[seed % 3], torch.bfloat16, seed)
        assert same([gpu.nm(x, other, "abs_product", "highest", n, m)], [ref.nm(x, other, "abs_product", "highest", n, m)]), name


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_masks(density):
    for n in (*SIZES, 20001):
        for start in (0, 1):
            mask = (torch.rand(n + start, generator=generator(n)) < density)[start:]
            words = gpu.pack(mask)
            assert same([words, gpu.unpack(words, n), gpu.prefix(words)], [ref.pack(mask), mask, ref.prefix(words)])
            index = gpu.indices(words, n)
            assert same([index, gpu.from_indices(index, n), gpu.from_indices(index.long(), n)], [ref.indices(words, n), words, words])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values_dtype", DTYPES)
def test_moves(dtype, values_dtype):
    check_moves(gpu, dtype, values_dtype, ((0, 0.5), (1, 1.0), (5000, 0.3)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_swap_undoes_itself_bit_by_bit(dtype):
    check_swap(gpu, dtype)


@pytest.mark.parametrize("combine", merging.COMBINE)
def test_merge(combine):
    """Words, cuts, chance, factors, no base, results over a model and over the base."""
    for number, n in enumerate((0, 1, 33, 1100)):
        aligned = number % 2 == 1
        models = [kind("special" if n == 33 else "ties", n, dtype, i, aligned) for i, dtype in enumerate((*DTYPES, torch.bfloat16))]
        base = kind("ties", n, torch.bfloat16, 9, aligned) if number % 3 else None
        words = truth.pack(torch.rand(n, generator=generator(1)) < 0.6)
        stream = merging.stream_of("a.b" if number % 2 else "b.bias")  # the second is beyond 2^31
        recipe = Recipe(combine, 0.6 if number % 2 else 1.0, number > 1, -1 if number == 3 else 1, 2**63 + 77, stream, by_count=n == 33)
        parts = [
            Part(models[0], 0.7, 1.3, words=words),
            Part(models[1], -1.2, chance=30000, model=1),
            Part(models[2], 2.0, cut=Cut(int(truth.key_of(torch.tensor(1.0))), n // 2), model=2),
            Part(models[3], 1.0, 1.5, words=words, chance=50000, model=7),
        ]
        for dtype in DTYPES if n == 1100 else DTYPES[:1]:
            got, expected = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
            gpu.merge_(got, base, parts, recipe)
            merging.merge_(expected, base, parts, recipe)
            assert ((got == expected) | (got.isnan() & expected.isnan())).all(), (n, dtype)
        assert n == 33 or n == 0 or gpu.votes(base, parts, recipe) == merging.votes(base, parts, recipe)
        over = models[1].clone()
        gpu.merge_(over, base, [Part(over, 0.5), Part(models[0], 0.5)], recipe)
        fresh = torch.empty_like(over)
        merging.merge_(fresh, base, [Part(models[1], 0.5), Part(models[0], 0.5)], recipe)
        assert ((over == fresh) | (over.isnan() & fresh.isnan())).all()


def test_norms_add_up_in_the_order_of_the_reference():
    x, base = kind("normal", 65600, torch.float32, 1), kind("normal", 65600, torch.bfloat16, 2)
    part, recipe = Part(x, factor=1.5, chance=20000, model=3), Recipe(seed=5, stream=2**32 - 9)
    assert gpu.norms(base, part, recipe) == merging.norms(base, part, recipe)
    assert gpu.norms(None, Part(x[:700]), recipe) == merging.norms(None, Part(x[:700]), recipe)


def test_refusals():
    x = torch.randn(100)
    for match, call in (
        ("sorted positions", lambda: gpu.move_all("scatter", [(x, torch.tensor([3, 3]), torch.zeros(2))])),
        (r"positions in \[0, 100\)", lambda: gpu.move_all("gather", [(x, torch.tensor([100]), torch.zeros(1))])),
        ("x's dtype", lambda: gpu.move_all("swap", [(x, torch.tensor([3]), torch.zeros(1).half())])),
        ("2 values", lambda: gpu.move_all("scatter", [(x, torch.tensor([3, 4]), torch.zeros(3))])),
        ("bits <= 12", lambda: gpu.histogram([(x, None)], "abs", "highest", 16, 16, None)),
        ("rows of a multiple of 3", lambda: gpu.nm(torch.randn(3, 4), None, "abs", "highest", 1, 3)),
        ("contiguous", lambda: gpu.merge_(x, None, [Part(torch.randn(200)[::2])], Recipe())),
        ("of 100 elements", lambda: gpu.merge_(x, None, [Part(torch.randn(99))], Recipe())),
        ("at least one part", lambda: gpu.merge_(x, None, [], Recipe())),
    ):
        with pytest.raises(ValueError, match=match):
            call()

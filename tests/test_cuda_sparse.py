"""The CUDA kernels of the sparse family, run by the emulator, against `reference.sparse_parts`: equal bits, in any order of threads and blocks."""

from types import SimpleNamespace

import pytest
import torch
from sparse_cases import DTYPES, KINDS, check_moves, check_swap, generator, item, kind, same
from torch import Tensor

from fusedadapt.ops import sparse_cuda as gpu
from fusedadapt.reference import sparse as truth
from fusedadapt.reference import sparse_parts as ref

try:
    from fusedadapt import _core_emulated as core
except ImportError as error:
    raise ImportError(f"tests/test_cuda_sparse.py: fusedadapt._core_emulated is missing ({error}); run: python setup.py build_emulated") from error

SIZES = (0, 1, 31, 32, 33, 1023, 1024, 1025)
SHAPES = [(7, 5), (0,), (1,), (33,), (9, 1025), (3, 0), (2, 3, 16), (1024,)]
pytestmark = pytest.mark.usefixtures("poison")


def threshold_of(keys: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    key, above, _ = truth.kth_key(keys, k)
    return torch.tensor([key]), torch.tensor([k - above])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_selection_of_every_size(name, dtype):
    for n in SIZES:
        core.emulator_seed(n)
        items = [item(name, (n,), "abs", dtype, seed=n)]
        for nan in ("highest", "lowest") if name == "special" else ("highest",):
            keys = [ref._keys(items[0], "abs", nan)]
            for k in sorted({0, n // 3, n} if n > 33 else {0, min(1, n), n // 3, n}):
                assert same(gpu.select(items, "abs", nan, k), [truth.pack(m) for m in truth.topk(keys, k)]), (n, k)
                if k:
                    expected = [truth.pack(m) for m in truth.topk(keys, k)]
                    assert same(gpu.mark(items, "abs", nan, *threshold_of(keys, k)), expected), (n, k)
                    assert gpu.kth_key(items, "abs", nan, k) == truth.kth_key(keys, k)
        for threshold, all_of_them in ((truth.TOP, False), (truth.TOP + 1, False), (-1, True)):
            got = gpu.mark(items, "abs", "highest", torch.tensor([threshold]), torch.tensor([0]))
            if threshold >= 0 or name != "special":
                assert same(got, [truth.pack(torch.full((n,), all_of_them))])


@pytest.mark.parametrize("score", truth.SCORES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_of_mixed_sizes_and_every_score(score, dtype):
    shift = truth.SCORES.index(score) + DTYPES.index(dtype)
    for turn in range(2):
        name = KINDS[(2 * shift + turn) % 5]
        core.emulator_seed(shift + turn)
        others = DTYPES[turn:] if score in ("abs_diff", "abs_product") else (torch.float32,)
        for other in others:
            items = [item(name, s, score, dtype, other, seed) for seed, s in enumerate(SHAPES)]
            keys = [ref._keys(i, score, "lowest") for i in items]
            n = sum(x.numel() for x, _ in items)
            for k, ties in ((1, "exclusive"), (n // 2, "inclusive"), (n // 2, "lowest_index")):
                assert same(gpu.select(items, score, "lowest", k, ties), [truth.pack(m) for m in truth.topk(keys, k, ties)]), (name, k, ties)


@pytest.mark.parametrize("score", ["abs", "given"])
def test_lists_of_mixed_types(score):
    items = [item("ties", (n,), score, dtype, seed=n) for n, dtype in ((3000, torch.bfloat16), (5000, torch.float16), (8193, torch.float32))]
    keys = [ref._keys(i, score, "highest") for i in items]
    for k in (1, 5000, 16000):
        assert same(gpu.select(items, score, "highest", k), [truth.pack(m) for m in truth.topk(keys, k)])


@pytest.mark.parametrize("limit", [0, 4096])
def test_histograms(monkeypatch, limit):
    """Every level and kind of counters; with little shared memory the list is read in several passes."""
    monkeypatch.setattr(gpu, "_shared_limit", limit)
    for score, dtype in (("given", torch.float32), ("abs", torch.bfloat16), ("abs", torch.float16), ("abs_scaled", torch.float32)):
        items = [item("special", (500, 20), score, dtype, seed=2), item("normal", (333,), score, dtype, seed=3)]
        levels = ((16, 16, None), (0, 16, 0xBF80), (21, 11, None), (0, 10, None), (20, 4, 1 << 7), (0, 8, 0xBF8000))
        for shift, bits, prefix in levels if limit == 0 else levels[:3]:
            for nan in ("highest", "lowest") if shift == 16 else ("highest",):
                level = (items, score, nan, shift, bits, None if prefix is None else torch.tensor([prefix]))
                assert same([gpu.histogram(*level)], [ref.histogram(*level)]), (score, dtype, shift)


@pytest.mark.parametrize("name", ["equal", "ties", "special"])
def test_full_counters_are_emptied_in_time(name):
    """More equal elements in a block than a 16-bit counter holds."""
    items = [item(name, (300_000,), "given", torch.float32, seed=2)]
    for level in ((16, 16, None), (0, 16, torch.tensor([0x4100]))):  # the upper half of the key of -0.5
        assert same([gpu.histogram(items, "given", "highest", *level)], [ref.histogram(items, "given", "highest", *level)])


@pytest.mark.parametrize("seed", [1, 2])
def test_ties_cross_tiles_and_tensors(seed):
    """The look-back, whatever the order in which blocks begin."""
    core.emulator_seed(seed)
    items = [(torch.full((n,), 0.25).to(torch.bfloat16), None) for n in (20000, 31, 100001, 0, 13000)]
    items[2][0][50000] = 1.0
    keys = [ref._keys(i, "abs", "highest") for i in items]
    at = truth.key_of(torch.tensor([0.25]))
    for k in (0, 20031, 52799, 133031):
        equal = torch.tensor([k])
        assert same(gpu.mark(items, "abs", "highest", at, equal), [truth.pack(m) for m in truth.mark(keys, int(at), k)]), k


@pytest.mark.parametrize("n, m", [(0, 4), (1, 2), (2, 4), (4, 8), (8, 16), (3, 5), (5, 32), (20, 40), (4, 4)])
def test_nm(n, m):
    for seed, name in enumerate(KINDS):
        for score, nan in (("abs_product", "highest"), ("abs_scaled", "lowest")):
            x, other = item(name, (37, 3 * m), score, torch.bfloat16, torch.float16, seed)
            assert same([gpu.nm(x, other, score, nan, n, m)], [ref.nm(x, other, score, nan, n, m)]), name


@pytest.mark.parametrize("length", [1, 3, 4, 8, 32, 33, 64, 200, 1024, 1300])
def test_rows(length):
    """By rank, by radix; rows that are whole words, share words, or begin on new ones."""
    for number, name in enumerate(KINDS):
        core.emulator_seed(number)
        score = truth.SCORES[(length + number) % 5]
        columns = length * (2 if number % 2 else 1)  # a row, or a block of one
        x, other = item(name, (3 if length > 32 else 11, columns), score, DTYPES[number % 3], torch.bfloat16, seed=number)
        for turn, k in enumerate((length // 3, 0, 1, length, length // 2, length // 2)):
            ties = ("lowest_index", "inclusive", "exclusive")[(turn + number) % 3]
            given = (x, other, score, ("highest", "lowest")[turn % 2], k, length, ties, (number + turn) % 2 == 0)
            assert same([gpu.rows(*given)], [ref.rows(*given)]), (name, k, ties)


@pytest.mark.parametrize("score", ["abs", "abs_scaled"])
@pytest.mark.parametrize("length", [5000, 5120])
def test_rows_beyond_shared_memory_are_read_again(monkeypatch, score, length):
    for limit in (0, 4096):
        monkeypatch.setattr(gpu, "_shared_limit", limit)
        for name, k in (("ties", 400), ("special", 1), ("normal", 999)):
            x, other = item(name, (3, length), score, torch.float32, seed=limit)
            for aligned in (False, True):
                given = (x, other, score, "highest", k, length, "lowest_index", aligned)
                assert same([gpu.rows(*given)], [ref.rows(*given)]), (name, aligned, limit)


def test_rows_over_several_rows_of_x():
    x, factors = kind("normal", 12 * 40, torch.float32).view(12, 40), kind("normal", 40, torch.float32, 3).abs()
    given = (x, factors, "abs_scaled", "highest", 50, 120, "lowest_index", False)
    assert same([gpu.rows(*given)], [ref.rows(*given)])


@pytest.mark.parametrize("score", ["given", "abs", "abs_scaled"])
def test_energy_is_exact(score):
    for name in KINDS:
        items = [item(name, (n,), score, DTYPES[n % 3], torch.bfloat16, n) for n in (9000, 0, 33, 5, 20000)]
        for a, b in zip(gpu.energy(items, score), ref.energy(items, score)):
            assert torch.equal(a.view(torch.int64), b.view(torch.int64)), name


def test_energy_of_more_than_counters_hold():
    """Sums of the largest parts: all elements in one bin, one block, more turns than a counter has room for."""
    items = [(torch.full((900_000,), -1.0).view(torch.int32).add_(0xFFFFF).view(torch.float32), None)]
    for a, b in zip(gpu.energy(items, "abs"), ref.energy(items, "abs")):
        assert torch.equal(a.view(torch.int64), b.view(torch.int64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_colstat(dtype):
    for shape in ((0, 5), (3, 0), (1, 1), (17, 3), (200, 7), (130, 300)):
        x = kind("special" if shape[0] == 17 else "normal", shape[0] * shape[1], dtype).view(shape)
        torch.testing.assert_close(gpu.colstat(x), ref.colstat(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_masks(density):
    for n in (*SIZES, 300001):
        for start in (0, 1):
            mask = (torch.rand(n + start, generator=generator(n)) < density)[start:]
            words = gpu.pack(mask)
            assert same([words], [ref.pack(mask)])
        assert same([gpu.unpack(words, n)], [mask])
        assert same([gpu.prefix(words)], [ref.prefix(words)])
        index = ref.indices(words, n)
        assert same([gpu.indices(words, n)], [index])
        for wide in (index, index.long()):
            assert same([gpu.from_indices(wide, n)], [words])


def test_prefix_of_many_groups():
    words = torch.randint(-(2**31), 2**31 - 1, (32 * 4096 * 2 + 77,), generator=generator(1)).int()
    assert same([gpu.prefix(words)], [ref.prefix(words)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values_dtype", DTYPES)
def test_moves(dtype, values_dtype):
    check_moves(gpu, dtype, values_dtype, ((0, 0.5), (1, 1.0), (33, 0.5), (1025, 1.0), (20000, 0.01), (20000, 0.6)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_swap_undoes_itself_bit_by_bit(dtype):
    check_swap(gpu, dtype)


def test_many_tensors_in_one_launch():
    xs = [kind("normal", n, DTYPES[n % 3], n) for n in (0, 50, 3000, 1, 999)]
    at = [torch.randperm(x.numel(), generator=generator(3))[: x.numel() // 3].sort().values for x in xs]
    values = [kind("ties", i.numel(), x.dtype, 9) for x, i in zip(xs, at)]
    old, old_values = [x.clone() for x in xs], [v.clone() for v in values]
    gpu.move_all("swap", list(zip(xs, at, values)))
    assert same([x[i] for x, i in zip(xs, at)], old_values) and same(values, [x[i] for x, i in zip(old, at)])
    gpu.move_all("swap", list(zip(xs, at, values)))
    assert same(xs, old) and same(values, old_values)


def test_positions_are_checked_once_for_each_kind_of_move(monkeypatch):
    """A delta gathers and adds in turns; each check would wait for a GPU."""
    core, looks = gpu._core(torch.device("cpu")), []
    counting = SimpleNamespace(check_indices=lambda *args: looks.append(core.check_indices(*args)), move=core.move, MOVE_GROUP=core.MOVE_GROUP)
    monkeypatch.setattr(gpu, "_core", lambda device: counting)
    x, index, values = torch.zeros(50), torch.tensor([3, 9, 40]), torch.ones(3)
    for _ in range(3):
        gpu.move_all("gather", [(x, index, values)])
        gpu.move_all("add", [(x, index, values)])
    assert len(looks) == 2


def test_positions_are_checked_again_after_a_change():
    x, index = torch.randn(100), torch.tensor([1, 5, 7])
    gpu.move_all("gather", [(x, index, torch.zeros(3))])
    index[2] = 100
    with pytest.raises(ValueError, match=r"positions in \[0, 100\)"):
        gpu.move_all("gather", [(x, index, torch.zeros(3))])


def test_refusals():
    x, mask = torch.randn(100), torch.ones(100).bool()
    words, at = truth.pack(mask), torch.arange(100)
    for index in ([3, 3], [4, 2], [-1, 4], [5, 100]):
        for dtype in (torch.int32, torch.int64):
            with pytest.raises(ValueError, match="sorted positions"):
                gpu.from_indices(torch.tensor(index, dtype=dtype), 100)
            with pytest.raises(ValueError, match="sorted positions"):
                gpu.move_all("scatter", [(x, torch.tensor(index, dtype=dtype), torch.zeros(2))])
    for match, call in (
        ("100 values", lambda: gpu.move_all("scatter", [(x, at, torch.zeros(99))])),
        ("4 words", lambda: gpu.unpack(words[:3], 100)),
        ("x's dtype", lambda: gpu.move_all("swap", [(x, at, torch.zeros(100, dtype=torch.bfloat16))])),
        ("contiguous", lambda: gpu.histogram([(torch.randn(4, 4).t(), None)], "abs", "highest", 16, 16, None)),
        ("bits <= 16", lambda: gpu.histogram([(x, None)], "abs", "highest", 12, 20, None)),
        ("contiguous", lambda: gpu.pack(mask[::2])),
        ("factor per column", lambda: gpu.select([(torch.randn(3, 4), torch.randn(3))], "abs_scaled", "highest", 1)),
        ("shape", lambda: gpu.select([(torch.randn(3, 4), torch.randn(4, 3))], "abs_diff", "highest", 1)),
        ("rows of a multiple of 3", lambda: gpu.nm(torch.randn(3, 4), None, "abs", "highest", 1, 3)),
        ("a length that divides 100", lambda: gpu.rows(x, None, "abs", "highest", 1, 33, "lowest_index", False)),
        ("ties of lowest_index", lambda: gpu.rows(x, None, "abs", "highest", 1, 50, "first", False)),
        (r"a matrix \[T, K\]", lambda: gpu.colstat(x)),
        ("a score of", lambda: gpu.select([(x, x)], "square", "highest", 1)),
        (r"k in 0\.\.100", lambda: gpu.select([(x, None)], "abs", "highest", 101)),
    ):
        with pytest.raises(ValueError, match=match):
            call()

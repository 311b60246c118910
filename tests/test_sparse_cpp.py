"""The C++ primitives of the sparse family against `reference.sparse_parts`, bit for bit, on every instruction set and any number of threads."""

import pytest
import torch
from sparse_cases import DTYPES, KINDS, check_moves, check_swap, everywhere, generator, item, kind, same
from torch import Tensor

from fusedadapt.ops import sparse_cpp as cpp
from fusedadapt.reference import sparse as truth
from fusedadapt.reference import sparse_parts as ref

SIZES = (0, 1, 31, 32, 33, 1023, 1024, 1025, 70000)
pytestmark = pytest.mark.usefixtures("one_torch_thread", "poison")


def check(expected, call, *args):
    """call(*args) gives the same tensor or list of tensors everywhere."""
    wanted = expected if isinstance(expected, (list, tuple)) else [expected]
    for got in everywhere(lambda: call(*args)):
        assert same(got if isinstance(got, (list, tuple)) else [got], wanted), args


def select(module, items, score, nan, k, levels):
    """Threshold and how many of its equals are kept, by the histograms of a backend (as the callers do), and the histograms."""
    found, prefix, above = [], None, 0
    for shift, bits in levels:
        counts = module.histogram(items, score, nan, shift, bits, prefix)
        found.append(counts)
        reached = above + counts.flip(0).cumsum(0)
        at = int((reached < k).sum())
        above = int(reached[at - 1]) if at else above
        prefix = torch.tensor([(int(prefix) << bits if prefix is not None else 0) | (counts.numel() - 1 - at)])
    return prefix, torch.tensor([k - above]), found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_selection_of_every_size(name, dtype):
    for n in SIZES:
        items = [item(name, (n,), "abs", dtype)]
        for nan in ("highest", "lowest") if name == "special" else ("highest",):
            keys = [ref._keys(items[0], "abs", nan)]
            for k in sorted({1, n // 3, n} - {0}) if n else []:
                threshold, equal, counts = select(ref, items, "abs", nan, k, cpp.LEVELS)
                check(counts, counts_of, items, "abs", nan, k)
                assert kth_everywhere(keys, items, "abs", nan, k)
                check([truth.pack(m) for m in truth.topk(keys, k)], cpp.mark, items, "abs", nan, threshold, equal)
        for threshold, all_of_them in ((truth.TOP, False), (truth.TOP + 1, False), (-1, True)):
            expected = [truth.pack(torch.full((n,), all_of_them))]
            check(expected, cpp.mark, items, "abs", "highest", torch.tensor([threshold]), torch.tensor([0]))


@pytest.mark.parametrize("score", truth.SCORES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_of_mixed_sizes_and_every_score(score, dtype):
    shapes = [(7, 5), (0,), (1,), (33,), (10, 1025), (3, 0), (2, 3, 16), (1024,)]
    for name in KINDS:
        for other in DTYPES if score in ("abs_diff", "abs_product") else (torch.float32,):
            items = [item(name, s, score, dtype, other, seed) for seed, s in enumerate(shapes)]
            keys = [ref._keys(i, score, "highest") for i in items]
            n = sum(x.numel() for x, _ in items)
            for k in (1, n // 2, n):
                threshold, equal, counts = select(ref, items, score, "highest", k, ref.LEVELS)
                check(counts, counts_of, items, score, "highest", k)
                assert kth_everywhere(keys, items, score, "highest", k)
                check([truth.pack(m) for m in truth.topk(keys, k)], cpp.mark, items, score, "highest", threshold, equal)


def test_one_level_is_exact_for_bfloat16():
    items = [item("normal", (70000,), "abs", torch.bfloat16)]
    above, equal, _ = select(cpp, items, "abs", "highest", 12345, cpp.LEVELS16)
    expected = [truth.pack(truth.topk([ref._keys(items[0], "abs", "highest")], 12345)[0])]
    check(expected, cpp.mark, items, "abs", "highest", above << 16, equal)


def test_ties_cross_chunks_and_tensors():
    items = [(torch.full((n,), 0.25), None) for n in (40000, 31, 70001, 0, 33000)]
    items[2][0][50000] = 1.0
    at = truth.key_of(torch.tensor([0.25]))
    for k in (0, 1, 39999, 40000, 40031, 72799, 72800, 100000, 143031):
        equal = torch.tensor([k])
        check(ref.mark(items, "abs", "highest", at, equal), cpp.mark, items, "abs", "highest", at, equal)


def test_histogram_of_odd_levels():
    items = [item("special", (5000,), "given", torch.float32), item("normal", (333,), "given", torch.float32)]
    for shift, bits, prefix in ((21, 11, None), (10, 11, 1543), (0, 10, 3160064), (0, 10, None), (12, 20, 0), (12, 20, 1), (20, 4, 1 << 9)):
        level = (items, "given", "highest", shift, bits, None if prefix is None else torch.tensor([prefix]))
        check(ref.histogram(*level), cpp.histogram, *level)


def counts_of(items, score, nan, k):
    return select(cpp, items, score, nan, k, cpp.LEVELS)[2]


def kth_everywhere(keys, *args):
    return all(got == truth.kth_key(keys, args[-1]) for got in everywhere(lambda: cpp.kth_key(*args)))


def best_of_rows(keys: Tensor, k: int, ties: str, aligned: bool) -> Tensor:
    """`ref.rows` for all rows at once: it takes one at a time."""
    length = keys.shape[1]
    mask = torch.ones_like(keys, dtype=torch.bool)
    if k == 0:
        mask = ~mask
    elif k < length:
        cut = torch.sort(keys, 1, descending=True).values[:, k - 1 : k]
        over, same = keys > cut, keys == cut
        room = k - over.sum(1, keepdim=True)
        if ties == "lowest_index":
            same &= same.cumsum(1) <= room
        if ties == "exclusive":
            same &= same.sum(1, keepdim=True) <= room
        mask = over | same
    return truth.pack(torch.nn.functional.pad(mask, (0, -length % 32)) if aligned else mask)


TIES = ("lowest_index", "inclusive", "exclusive")


def test_the_oracle_of_rows():
    for length in (3, 40):
        x, _ = item("ties", (6, length), "given", torch.float32)
        for k in (0, 1, length // 2, length):
            for ties in TIES:
                expected = ref.rows(x, None, "given", "highest", k, length, ties, True)
                assert torch.equal(best_of_rows(ref._keys((x, None), "given", "highest"), k, ties, True), expected)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 7, 8, 13, 16, 31, 32, 33, 100, 4096, 70001])
def test_rows(length):
    count = max(2, min(130, 3000 // length))
    for name in KINDS:
        for score, nan, dtype in (("abs", "highest", torch.bfloat16), ("abs_scaled", "lowest", torch.float32), ("given", "highest", torch.float32)):
            if length > 5000 and (name, score) not in (("normal", "abs"), ("special", "given")):
                continue
            x, other = item(name, (count, length), score, dtype)
            keys = ref._keys((x, other), score, nan)
            for k in {0, 1, length // 2, length}:
                for ties in TIES:
                    for aligned in (False, True):
                        expected = best_of_rows(keys, k, ties, aligned)
                        check(expected, cpp.rows, x, other, score, nan, k, length, ties, aligned)


def test_runs_shorter_and_longer_than_a_row_of_the_tensor():
    x, other = item("normal", (12, 6000), "abs_scaled", torch.float32)
    for length in (3000, 12000, 72000):
        expected = best_of_rows(ref._keys((x, other), "abs_scaled", "highest").view(-1, length), length // 10, "lowest_index", False)
        check(expected, cpp.rows, x, other, "abs_scaled", "highest", length // 10, length, "lowest_index", False)


@pytest.mark.parametrize("n, m", [(0, 4), (1, 4), (2, 4), (4, 8), (8, 16), (3, 5), (5, 32), (20, 40)])
def test_nm(n, m):
    for name in KINDS:
        x, other = item(name, (37, 3 * m), "abs_product", torch.bfloat16, torch.float16)
        check(ref.nm(x, other, "abs_product", "highest", n, m), cpp.nm, x, other, "abs_product", "highest", n, m)


@pytest.mark.parametrize("name", KINDS)
def test_energy(name):
    items = [item(name, (n,), "given", torch.float32, seed=n) for n in (70000, 0, 200001, 33)]
    check([t.view(torch.int64) for t in ref.energy(items, "given")], lambda: [t.view(torch.int64) for t in cpp.energy(items, "given")])


@pytest.mark.parametrize("dtype", DTYPES)
def test_colstat(dtype):
    for shape in ((0, 5), (3, 0), (1, 1), (1000, 7), (129, 1025), (700, 513)):
        x = kind("normal", shape[0] * shape[1], dtype).view(shape)
        check(ref.colstat(x), cpp.colstat, x)
        torch.testing.assert_close(ref.colstat(x), x.double().square().sum(0).float(), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_masks(density):
    for n in (*SIZES, 300001):
        mask = (torch.rand(n + 1, generator=generator(n)) < density)[1:]
        words = cpp.pack(mask)
        check(ref.pack(mask), cpp.pack, mask)
        check(mask, cpp.unpack, words, n)
        check(ref.prefix(words), cpp.prefix, words)
        index = ref.indices(words, n)
        check(index, cpp.indices, words, n)
        assert cpp.indices(words, n).dtype == torch.int32
        for wide in (index, index.long()):
            check(words, cpp.from_indices, wide, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values_dtype", DTYPES)
def test_moves(dtype, values_dtype):
    sizes = ((0, 0.5), (1, 1.0), (33, 0.5), (1025, 1.0), (70000, 0.01), (70000, 0.6))
    for _ in everywhere(lambda: check_moves(cpp, dtype, values_dtype, sizes)):
        pass


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_swap_undoes_itself_bit_by_bit(dtype):
    check_swap(cpp, dtype)


def test_refusals():
    x, mask = torch.randn(100), torch.ones(100).bool()
    words, at = truth.pack(mask), torch.arange(100)
    for index in ([3, 3], [4, 2], [-1, 4], [5, 100]):
        for dtype in (torch.int32, torch.int64):
            with pytest.raises(ValueError, match="sorted positions"):
                cpp.from_indices(torch.tensor(index, dtype=dtype), 100)
            with pytest.raises(ValueError, match="sorted positions"):
                cpp.move_all("scatter", [(x, torch.tensor(index, dtype=dtype), torch.zeros(2))])
    with pytest.raises(ValueError, match=r"positions in \[0, 100\)"):
        cpp.move_all("gather", [(x, torch.tensor([100]), torch.zeros(1))])
    with pytest.raises(ValueError, match="100 values"):
        cpp.move_all("scatter", [(x, at, torch.zeros(99))])
    with pytest.raises(ValueError, match="4 words"):
        cpp.unpack(words[:3], 100)
    with pytest.raises(ValueError, match="x's dtype"):
        cpp.move_all("swap", [(x, at, torch.zeros(100, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match="contiguous"):
        cpp.histogram([(torch.randn(4, 4).t(), None)], "abs", "highest", 16, 16, None)
    with pytest.raises(ValueError, match="contiguous"):
        cpp.pack(mask[::2])
    with pytest.raises(ValueError, match="factor per column"):
        cpp.energy([(torch.randn(3, 4), torch.randn(3))], "abs_scaled")
    with pytest.raises(ValueError, match="shape"):
        cpp.energy([(torch.randn(3, 4), torch.randn(4, 3))], "abs_diff")
    with pytest.raises(ValueError, match="a length that divides"):
        cpp.rows(x, None, "abs", "highest", 1, 33, "lowest_index", False)
    with pytest.raises(ValueError, match="rows of a multiple of 3"):
        cpp.nm(torch.randn(3, 4), None, "abs", "highest", 1, 3)
    with pytest.raises(ValueError, match="unknown score"):
        cpp.histogram([(x, x)], "square", "highest", 16, 16, None)

"""The C++ of merging against fusedadapt/reference/merge.py, bit for bit: hostile values and sizes, every dtype mix, instruction set, thread count."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

_core = pytest.importorskip("fusedadapt._core")

from sparse_cases import DTYPES, everywhere  # noqa: E402

from fusedadapt.ops import merge_cpp as cpp  # noqa: E402
from fusedadapt.reference import merge as ref  # noqa: E402
from fusedadapt.reference import sparse as truth  # noqa: E402
from fusedadapt.reference.merge import Cut, Part, Recipe  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")
THREADS = (1, 3)


def make(rng: random.Random, n: int, kind: str) -> Tensor:
    x = torch.randn(n)
    if kind == "few":
        x = torch.randint(-2, 3, (n,)).float()
    if kind == "constant":
        x = torch.full((n,), rng.choice([0.0, -0.0, 1.0]))
    if kind == "tiny":
        x = x * 1e-42
    if kind == "hostile" and n:
        for value in (float("nan"), float("inf"), float("-inf"), -0.0, 3e38):
            x[torch.randint(0, n, (max(1, n // 9),))] = value
    return x


def tensors(rng: random.Random, n: int, count: int) -> list[Tensor]:
    kinds = ("plain", "plain", "few", "constant", "tiny", "hostile")
    return [make(rng, n, rng.choice(kinds)).to(rng.choice(DTYPES)) for _ in range(count)]


def same(a: Tensor, b: Tensor) -> bool:
    size = torch.int32 if a.dtype == torch.float32 else torch.int16
    return bool(((a.view(size) == b.view(size)) | (a.isnan() & b.isnan())).all())


def case(rng: random.Random, n: int):
    models = tensors(rng, n, rng.choice([1, 2, 3, 5]))
    base = rng.choice([None, *tensors(rng, n, 2)])
    counts = [rng.choice([0, 1, n // 5, n // 2, n - 1, n, n + 3]) for _ in models]
    cuts = ref.cuts(base, models, counts)
    parts = []
    for i, model in enumerate(models):
        part = Part(model, rng.choice([1.0, 0.5, 0.1, -0.7, 0.0]), rng.choice([1.0, 1 / 0.3]), model=rng.choice([i, 2**31]))
        kept = rng.random()
        if kept < 0.3:
            part = replace(part, words=truth.pack(torch.rand(n) < rng.choice([0.2, 0.9, 1.1])))
        elif kept < 0.6:
            part = replace(part, cut=cuts[i])
        parts.append(replace(part, chance=rng.choice([0, 1, 20000, 65536])) if rng.random() < 0.4 else part)
    scale, seed = rng.choice([1.0, 0.3, 0.0, -1.5]), rng.choice([0, -1, 12345678901234567, 2**40])
    recipe = Recipe(rng.choice(ref.COMBINE), scale, rng.random() < 0.5, rng.choice([1, -1]), seed, rng.choice([0, 4000000000]), rng.random() < 0.3)
    return base, models, counts, cuts, parts, recipe


def check(base, models, counts, cuts, parts, recipe, dtype):
    wanted = torch.empty(models[0].numel(), dtype=dtype)
    ref.merge_(wanted, base, parts, recipe)

    def run():
        out = torch.empty_like(wanted)
        cpp.merge_(out, base, parts, recipe)
        return out

    assert all(same(out, wanted) for out in everywhere(run, THREADS)), recipe
    assert all(found == cuts for found in everywhere(lambda: cpp.cuts(base, models, counts), THREADS)), counts
    votes = ref.votes(base, parts, recipe)
    assert all(found == votes for found in everywhere(lambda: cpp.votes(base, parts, recipe), THREADS))
    for part in parts:
        norms = str(ref.norms(base, part, recipe))  # as text: NaN equals NaN
        assert all(str(found) == norms for found in everywhere(lambda part=part: cpp.norms(base, part, recipe), THREADS))


@pytest.mark.parametrize("sizes, cases", [((0, 1, 2, 31, 33, 511, 512, 513, 1025, 4097), 60), ((32768, 32769, 65536, 65537, 140000), 8)])
def test_everything_equals_the_reference(sizes, cases):
    rng = random.Random(5)
    torch.manual_seed(5)
    for _ in range(cases):
        check(*case(rng, rng.choice(sizes)), rng.choice(DTYPES))


def cut_directly(x: Tensor, k: int) -> Cut:
    """Of x >= 0 without NaN."""
    order = torch.sort(x, descending=True, stable=True)
    key = truth.key_of(order.values[k - 1 : k])
    equal = (x == order.values[k - 1]).nonzero().reshape(-1)
    kept = k - int((x > order.values[k - 1]).sum())
    return Cut(int(key), int(equal[kept - 1]) if kept < equal.numel() else x.numel() - 1)


@pytest.mark.parametrize("kind", ["random", "sorted", "spike", "two values", "mostly zero", "period", "steps"])
def test_cuts_of_what_a_sample_misjudges(kind):
    n = 300_001
    x = torch.rand(n)
    if kind == "sorted":
        x = x.sort().values
    if kind == "spike":  # everything large is where no sample may look
        x[1000:3000] += 10
    if kind == "two values":
        x = (x < 0.3).float()
    if kind == "mostly zero":
        x = torch.where(x < 0.01, x, 0)
    if kind == "period":
        x = (torch.arange(n) % 128 < 16).float() + x * 1e-3
    if kind == "steps":
        x = (x * 40).floor()
    for k in (1, 17, 1500, n // 128, n // 5, n // 2, n - 5):
        assert all(found == [cut_directly(x, k)] for found in everywhere(lambda k=k: cpp.cuts(None, [x], [k]), THREADS)), k


def test_the_output_may_be_an_input():
    torch.manual_seed(1)
    base, models = torch.randn(2000), [torch.randn(2000) for _ in range(3)]
    parts, recipe = [Part(m) for m in models], Recipe("peft")
    wanted = torch.empty(2000)
    cpp.merge_(wanted, base, parts, recipe)
    cpp.merge_(base, base, parts, recipe)
    assert torch.equal(base, wanted)


def test_bad_input_is_refused_before_anything_is_written():
    x, out = torch.zeros(100), torch.ones(100)
    for parts in (
        [],
        [Part(x[::2])],
        [Part(x.double())],
        [Part(x), Part(torch.zeros(99))],
        [Part(x, words=torch.zeros(3, dtype=torch.int32))],
        [Part(x, cut=Cut(5, 0))],
    ):
        with pytest.raises(ValueError, match="merge_: expected"):
            cpp.merge_(out, None, parts, Recipe())
    assert torch.equal(out, torch.ones(100))

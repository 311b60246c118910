"""Masks, deltas and merging on a GPU: the CPU's bits, from lists and for every tie and NaN, and past 32-bit offsets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import BACKENDS, DEVICE, MANY, cases, needs_gpu, no_sync, room_for, same
from torch import Tensor

import fusedadapt as fa
from fusedadapt.sparse import MaskedLinear, SparseDelta, grow_prune, masked_wgrad, merge, nm_mask, topk_mask, topk_threshold, wanda_mask

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("compiled_triton", "quick_calls")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("random", "few values", "equal", "special")
SHAPES = ((1,), (0,), (33,), (65, 1030), (4, 5, 7), (1024, 3000)) if MANY else ((1,), (0,), (33,), (9, 130), (4, 5, 7))
METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "dare_linear", "breadcrumbs", "della", "magnitude_prune", "pcb")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with fa.backend(request.param):
        yield request.param


def data(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    if kind == "few values":
        x = torch.randint(-2, 3, shape, generator=g).float()
    elif kind == "equal":
        x = torch.full(shape, -1.5)
    elif kind == "special":
        some = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0, -1.0, 65504.0])
        x = some[torch.randint(len(some), shape, generator=g)]
    return x.to(dtype)


def on_cpu(call: Any, *args: Any, **options: Any) -> Any:
    with fa.backend("reference"):
        return call(*args, **options)


def equal(mine: Any, theirs: Any) -> bool:
    return len(mine) == len(theirs) and all(torch.equal(a.to_bool().cpu(), b.to_bool()) for a, b in zip(mine, theirs))


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_topk(kind: str, scope: str, backend: str) -> None:
    for dtype in DTYPES if MANY else DTYPES[:2]:
        every = [data(kind, shape, dtype, i) for i, shape in enumerate(SHAPES)]
        for density in (0.0, 0.013, 0.5, 1.0) if MANY else (0.3,):
            for ties in ("lowest_index", "inclusive", "exclusive") if MANY else ("lowest_index",):
                options: dict[str, Any] = {"density": density, "scope": scope, "ties": ties, "nan": "lowest" if kind == "special" else "highest"}
                mine = topk_mask([t.to(DEVICE) for t in every], **options)
                assert equal(mine, on_cpu(topk_mask, every, **options)), (dtype, options)


@pytest.mark.parametrize("score", ["abs_diff", "abs_product", "given"])
def test_scores(score: str, backend: str) -> None:
    w, other = (data("random", SHAPES[3], torch.bfloat16, seed) for seed in (1, 2))
    others = {} if score == "given" else {"other": other}
    mine = topk_mask(w.to(DEVICE), k=77, score=score, **{k: v.to(DEVICE) for k, v in others.items()})
    assert torch.equal(mine.to_bool().cpu(), on_cpu(topk_mask, w, k=77, score=score, **others).to_bool())
    assert float(topk_threshold(w.to(DEVICE), k=77).value) == float(on_cpu(topk_threshold, w, k=77).value)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (3, 5)])
def test_nm_and_wanda(n: int, m: int, backend: str) -> None:
    w, x = data("random", (24, 40), torch.bfloat16), data("random", (17, 40), torch.float32, 1)
    assert torch.equal(nm_mask(w.to(DEVICE), n, m).to_bool().cpu(), on_cpu(nm_mask, w, n, m).to_bool())
    mine = wanda_mask(w.to(DEVICE), x.to(DEVICE), density=0.5)
    assert torch.equal(mine.to_bool().cpu(), on_cpu(wanda_mask, w, x, density=0.5).to_bool())


@pytest.mark.parametrize("kind", ["add", "set"])
def test_deltas(kind: str, backend: str) -> None:
    base = {f"w{i}": data("random", shape, torch.bfloat16, i) for i, shape in enumerate(SHAPES)}
    tuned = {name: (t.float() + 0.01 * data("random", tuple(t.shape), torch.float32, 50 + i)).bfloat16() for i, (name, t) in enumerate(base.items())}
    want = on_cpu(SparseDelta.from_diff, base, tuned, density=0.05, kind=kind)
    weights = {name: t.to(DEVICE, copy=True) for name, t in base.items()}
    mine = SparseDelta.from_diff(weights, {name: t.to(DEVICE) for name, t in tuned.items()}, density=0.05, kind=kind)
    assert mine.nnz == want.nnz and all(
        same(mine.entries[n].indices, e.indices) and same(mine.entries[n].values, e.values) for n, e in want.entries.items()
    )
    mine.apply_(weights)
    expected = {name: t.clone() for name, t in base.items()}
    on_cpu(want.apply_, expected)
    assert all(same(weights[name], expected[name]) for name in base)
    mine.revert_()
    assert all(same(weights[name], base[name]) for name in base)
    if kind == "set":
        mine.swap_(weights)
        assert all(same(weights[name], expected[name]) for name in base)
        mine.swap_(weights)
        assert all(same(weights[name], base[name]) for name in base)


@pytest.mark.parametrize("method", METHODS)
def test_merging(method: str, backend: str) -> None:
    shapes = {f"w{i}": shape for i, shape in enumerate(SHAPES)}
    base = {name: data("random", shape, torch.bfloat16, i) for i, (name, shape) in enumerate(shapes.items())}
    models = [
        {name: (t.float() + 0.02 * data("random", tuple(t.shape), torch.float32, 100 * j + i)).bfloat16() for i, (name, t) in enumerate(base.items())}
        for j in range(1, 4)
    ]
    options: dict[str, Any] = {"seed": 5} | ({} if method in ("linear", "task_arithmetic") else {"density": 0.4})
    mine = merge({n: t.to(DEVICE) for n, t in base.items()}, [{n: t.to(DEVICE) for n, t in m.items()} for m in models], method, **options)
    want = on_cpu(merge, base, models, method, **options)
    assert isinstance(mine, dict) and isinstance(want, dict)
    assert all(same(mine[name], want[name]) for name in base), [name for name in base if not same(mine[name], want[name])]


def test_masked_gradient_and_layer(backend: str) -> None:
    tokens, n, k = (300, 256, 512) if MANY else (9, 8, 20)
    dy, x = data("random", (tokens, n), torch.float32, 1), data("random", (tokens, k), torch.float32, 2)
    mask = on_cpu(topk_mask, data("random", (n, k), torch.float32, 3), density=0.1)
    full = dy.double().t() @ x.double()
    mine = masked_wgrad(dy.to(DEVICE), x.to(DEVICE), mask.to_bool().to(DEVICE))
    torch.testing.assert_close(mine.cpu().double(), full[mask.to_bool()], rtol=1e-4, atol=1e-4)
    layer = MaskedLinear.from_linear(torch.nn.Linear(k, n), mask).to(DEVICE)
    layer(x.to(DEVICE)).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("mask_state", ["dense", "compact"])
def test_grow_prune(mask_state: str) -> None:
    results = []
    start, chosen = data("random", (65, 130), torch.float32, 1), data("random", (65, 130), torch.float32, 2) > 1.0
    for device, backend in ((DEVICE, BACKENDS[0]), (torch.device("cpu"), "reference")):
        p = torch.nn.Parameter(start.clone().to(device))
        opt = fa.optim.AdamW([p], lr=1e-2, masks={p: chosen.to(device)}, mask_state=mask_state, backend=backend)
        for t in range(3):
            p.grad = data("random", (65, 130), torch.float32, 10 + t).to(device)
            opt.step()
            mask = grow_prune(opt, p, fraction=0.3)
        results.append((p.detach(), mask.to_bool()))
    assert same(results[0][0], results[1][0]) and torch.equal(results[0][1].cpu(), results[1][1])


@needs_gpu
def test_the_host_does_not_wait(backend: str) -> None:
    """Not for a selection; for a delta not once its positions are checked."""
    weights = {f"w{i}": data("random", (65, 130), torch.bfloat16, i).to(DEVICE) for i in range(3)}
    tuned = {name: t + 1 for name, t in weights.items()}
    delta = SparseDelta.from_diff(weights, tuned, density=0.1)

    def run() -> None:
        topk_mask(list(weights.values()), density=0.2)
        nm_mask(weights["w0"], 1, 2)
        delta.apply_(weights)
        delta.revert_()

    run()
    with no_sync():
        run()


@needs_gpu
def test_beyond_two_to_the_31_elements(backend: str) -> None:
    with room_for(20):
        n = 2**31 + 4099
        x = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
        at = torch.tensor([0, 5, 2**31 - 1, 2**31, 2**31 + 77, n - 1], device=DEVICE)
        x[at] = torch.arange(1, 7, dtype=torch.bfloat16, device=DEVICE)
        mask = topk_mask(x, k=4)
        assert torch.equal(mask.indices().cpu(), at[2:].cpu()) and mask.nnz == 4
        seven = topk_mask(x, k=7)
        assert torch.equal(seven.indices().cpu().sort().values, torch.tensor(sorted([*at.tolist(), 1]))), "the first of the equal zeros"


@needs_gpu
def test_a_list_takes_little_scratch(backend: str) -> None:
    every = [torch.randn(4_000_000, device=DEVICE) for _ in range(cases(50, 1))]
    topk_mask(every[:1], density=0.1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    masks = topk_mask(every, density=0.01)
    own = sum(t.numel() for t in every) // 8
    assert torch.cuda.max_memory_allocated() - before <= own + 64 * 2**20
    assert sum(m.nnz for m in masks) == sum(t.numel() for t in every) // 100

"""grow_prune: exact counts, the right elements, and training that goes on as if every cohort were a parameter of its own."""

import copy

import pytest
import torch

import fusedadapt as fa
from fusedadapt.optim import OPTIMIZERS, AdamW

N = 400


def setup(mask_state: str, seed: int = 0, shape=(20, 20), cls=AdamW, transposed: bool = False, **options):
    gen = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=gen)
    mask = torch.rand(shape, generator=gen) < 0.2
    p = torch.nn.Parameter(start.clone())
    if transposed:
        p.data = start.t().contiguous().t()
    opt = cls([p], lr=0.01, masks={p: mask}, mask_state=mask_state, **options)
    return p, opt, mask, gen


def grad(p, gen) -> None:
    p.grad = torch.randn(p.shape, generator=gen)


@pytest.mark.parametrize("mask_state", ["dense", "compact"])
@pytest.mark.parametrize("transposed", [False, True])
def test_rigl_takes_the_smallest_and_the_largest(mask_state: str, transposed: bool) -> None:
    p, opt, mask, gen = setup(mask_state, transposed=transposed)
    grad(p, gen)
    opt.step()
    grad(p, gen)
    before, n = p.detach().clone(), int(0.3 * mask.sum())
    new = fa.sparse.grow_prune(opt, p, fraction=0.3).to_bool()
    smallest = before.abs()[mask].kthvalue(n).values
    kept = mask & (before.abs() > smallest)
    largest = p.grad.abs()[~kept].topk(n).values[-1]
    assert torch.equal(new, kept | ~kept & (p.grad.abs() >= largest)) and new.sum() == mask.sum()
    assert torch.equal(p[kept], before[kept]) and not p[mask & ~kept].any() and not p[new & ~kept].any()
    untouched = ~mask & ~new
    assert torch.equal(p[untouched], before[untouched])
    opt.step()
    assert torch.equal(p[untouched], before[untouched]) and p[new].abs().min() > 0 and not p[mask & ~new].any()


def test_dense_and_compact_choose_alike_and_cohorts_have_their_own_age() -> None:
    """Every cohort trains exactly as a parameter of its own would."""
    runs = [setup(kind, max_grad_norm=None, weight_decay=0.1) for kind in ("dense", "compact")]
    twin = torch.nn.Parameter(torch.zeros(0))
    for t in range(4):
        for p, opt, _, gen in runs:
            grad(p, gen)
            opt.step()
        masks = [fa.sparse.grow_prune(opt, p, k=7, grow="gradient" if t % 2 else "random", seed=t) for p, opt, _, _ in runs]
        if t == 0:
            assert masks[0] == masks[1]
    p, opt, _, gen = runs[1]
    state = opt.state[p]
    assert state["cohorts"].numel() == state["step"].numel() and state["step"].tolist()[-1] == 0
    parts = torch.tensor_split(state["index"].long(), state["cohorts"][1:])
    singles = [torch.nn.Parameter(p.detach().flatten()[at].clone()) for at in parts]
    alone = AdamW(singles, lr=0.01, weight_decay=0.1)
    saved = alone.state_dict()
    starts = [*state["cohorts"].tolist(), len(state["index"])]
    saved["state"] = {
        i: {"step": state["step"][i], **{k: state[k][starts[i] : starts[i + 1]] for k in ("exp_avg", "exp_avg_sq")}} for i in range(len(parts))
    }
    alone.load_state_dict(copy.deepcopy(saved))
    for _ in range(3):
        grad(p, gen)
        for q, at in zip(singles, parts):
            q.grad = p.grad.flatten()[at]
        opt.step(), alone.step()
    for q, at in zip(singles, parts):
        assert torch.equal(p.detach().flatten()[at], q)
    del twin


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", "emulated"])
@pytest.mark.parametrize("name", ["NAdam", "SGD", "ScheduleFreeAdamW"])
def test_cohorts_on_every_backend(name: str, backend: str, quick_calls: None) -> None:
    options = {"momentum": 0.9} if name == "SGD" else {}
    ends = []
    for which in (backend, "reference"):
        p, opt, _, gen = setup("compact", cls=OPTIMIZERS[name], backend=which, max_grad_norm=1.0, weight_decay=0.1, **options)
        if hasattr(opt, "train"):
            opt.train()
        for t in range(4):
            grad(p, gen)
            if t == 2 and which == backend:  # a compact gradient in the order of the cohorts
                p.grad[~fa.sparse.Mask.from_indices(opt.state[p]["index"].sort().values, p.shape).to_bool()] = 0
                p.compact_grad = p.grad.flatten()[opt.state[p]["index"].long()]
            elif t == 2:
                p.grad[~fa.sparse.Mask.from_indices(opt.state[p]["index"].sort().values, p.shape).to_bool()] = 0
            opt.step()
            p.compact_grad = None
            if t < 3:
                fa.sparse.grow_prune(opt, p, fraction=0.2)
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        grad(p, gen)
        opt.step()
        ends.append((p.detach(), opt.state[p]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-6, atol=1e-7)
    for key, v in ends[0][1].items():
        torch.testing.assert_close(v, ends[1][1][key], rtol=1e-6, atol=1e-7)


def test_spiel_seeds_the_moments_of_its_candidates() -> None:
    p, opt, mask, gen = setup("compact")
    grad(p, gen)
    opt.step()
    free = (~mask).flatten().nonzero()[:, 0][:30]
    values = torch.linspace(-1, 1, 30)
    new = fa.sparse.grow_prune(opt, p, k=5, gradient=(free, values), state="seed")
    state = opt.state[p]
    g = values[values.abs().argsort(descending=True, stable=True)[:5].sort().values]
    at = free[values.abs().argsort(descending=True, stable=True)[:5].sort().values]
    assert torch.equal(state["index"][-5:].long(), at) and new.to_bool().flatten()[at].all()
    torch.testing.assert_close(state["exp_avg"][-5:], 0.1 * g)
    torch.testing.assert_close(state["exp_avg_sq"][-5:], 0.001 * g * g)
    assert state["step"].tolist() == [1.0] and "cohorts" not in state or state["step"].dim() == 0


def test_decay_to_init_drops_back_to_the_start() -> None:
    for kind in ("dense", "compact"):
        p, opt, mask, gen = setup(kind, decay_to="init", weight_decay=0.1)
        start = p.detach().clone()
        for _ in range(3):
            grad(p, gen)
            opt.step()
            new = fa.sparse.grow_prune(opt, p, fraction=0.5, new_value=None).to_bool()
            assert torch.equal(p[~new], start[~new])
        anchor = opt.state[p]["anchor"]
        at = opt.state[p]["index"].long() if kind == "compact" else slice(None)
        assert torch.equal(anchor.flatten(), start.flatten()[at])


@pytest.mark.parametrize("storage", [{"master_weights": "fp32"}, {"master_weights": "split", "state_dtype": "fp32"}])
@pytest.mark.parametrize("kind", ["dense", "compact"])
def test_master_weights_follow(kind: str, storage: dict) -> None:
    gen = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(N, generator=gen).bfloat16())
    opt = AdamW([p], lr=0.01, masks={p: torch.arange(N) % 4 == 0}, mask_state=kind, **storage)
    for _ in range(3):
        p.grad = torch.randn(N, generator=gen).bfloat16()
        opt.step()
        new = fa.sparse.grow_prune(opt, p, fraction=0.5, new_value=0.25).to_bool()
    p.grad = torch.zeros(N, dtype=torch.bfloat16)
    opt.param_groups[0]["weight_decay"] = 0.0
    before = p.detach().clone()
    state = opt.state[p]
    age = state["step"].view(-1)
    fresh = state["index"][state["cohorts"][-1] :].long() if kind == "compact" else None
    if fresh is not None:
        assert age[-1] == 0 and (before[fresh] == 0.25).all()
    opt.step()
    assert torch.equal(p[~new], before[~new])
    if fresh is not None:
        assert (p[fresh] == 0.25).all(), "no gradient, no state: nothing moves"


def test_before_the_first_step_and_nothing_to_do() -> None:
    p, opt, mask, gen = setup("compact")
    grad(p, gen)
    new = fa.sparse.grow_prune(opt, p, fraction=0.5)
    assert new.nnz == mask.sum() and not opt.state[p]["step"]
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    assert fa.sparse.grow_prune(opt, p, k=0) == new
    assert all(torch.equal(v, before["state"][0][k]) for k, v in opt.state[p].items())


def test_bad_input_changes_nothing() -> None:
    p, opt, mask, gen = setup("compact")
    grad(p, gen)
    opt.step()
    q = torch.nn.Parameter(torch.ones(3))
    before, held = p.detach().clone(), {k: v.clone() for k, v in opt.state[p].items()}
    free = (~mask).flatten().nonzero()[:, 0]
    for options, expected in (
        ({"fraction": 1.5}, "fraction in"), ({"k": 10**6}, "expected k in"), ({}, "fraction or k"), ({"fraction": 0.1, "k": 1}, "fraction or k"),
        ({"k": 1, "grow": "best"}, "grow to be"), ({"k": 1, "state": "old"}, "state to be"), ({"k": 1, "score": "size"}, "score"),
        ({"k": 1, "gradient": torch.ones(3)}, "a gradient of shape"), ({"k": 5, "gradient": (free[:2], torch.ones(2))}, "at least 5 candidates"),
        ({"k": 1, "gradient": (torch.tensor([N]), torch.ones(1))}, "candidates in"), ({"k": 1, "grow": "momentum"}, "dense state"),
        ({"k": 1, "new_value": "x"}, "a number or None as new_value"), ({"fraction": "half"}, "fraction in"),
        ({"k": 1, "gradient": 3}, "a gradient of shape"), ({"k": 1, "gradient": ([1], [2.0])}, "two tensors"),
        ({"k": 1, "gradient": torch.eye(20).to_sparse()}, "a gradient of shape"),
        ({"k": 1, "score": torch.ones(2)}, "scores of shape"), ({"k": 1.5}, "an integer k; got 1.5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=expected):
            fa.sparse.grow_prune(opt, p, **options)
    with pytest.raises(ValueError, match="a parameter of it"):
        fa.sparse.grow_prune(opt, q, k=1)
    with pytest.raises(ValueError, match="with a mask"):
        fa.sparse.grow_prune(AdamW([q]), q, k=1)
    with pytest.raises(ValueError, match="an Adam-like rule"):
        p2, other, _, _ = setup("compact", cls=OPTIMIZERS["Lion"])
        fa.sparse.grow_prune(other, p2, k=1, state="seed")
    assert torch.equal(p, before) and all(torch.equal(v, held[k]) for k, v in opt.state[p].items())


# ---- before the first step, after loading, in another layout


@pytest.mark.parametrize("mask_state", ["dense", "compact"])
def test_a_mask_changed_before_the_first_step_is_saved(mask_state: str) -> None:
    """The state was empty then, and empty states are not written."""
    p, opt, mask, gen = setup(mask_state)
    grad(p, gen)
    changed = fa.sparse.grow_prune(opt, p, fraction=0.5)
    q = torch.nn.Parameter(p.detach().clone())
    twin = AdamW([q], lr=0.01, masks={q: mask}, mask_state=mask_state)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    q.grad = p.grad.clone()
    opt.step(), twin.step()
    assert torch.equal(p, q) and changed.to_bool().ne(mask).any()
    assert fa.sparse.grow_prune(twin, q, k=0) == changed  # it answered with the mask the optimizer was built with


def test_a_loaded_mask_of_an_optimizer_without_masks_is_known() -> None:
    p, opt, mask, gen = setup("dense")
    grad(p, gen)
    opt.step()
    q = torch.nn.Parameter(p.detach().clone())
    twin = AdamW([q], lr=0.01)
    twin.load_state_dict(opt.state_dict())
    assert torch.equal(fa.sparse.grow_prune(twin, q, k=0, gradient=p.grad).to_bool(), mask)  # KeyError


@pytest.mark.parametrize("mask_state", ["dense", "compact"])
def test_before_the_first_step_dropped_elements_go_back_and_moments_are_seeded(mask_state: str) -> None:
    p = torch.nn.Parameter(torch.arange(1.0, 9.0))
    opt = AdamW([p], lr=0.0, masks={p: torch.arange(8) < 4}, decay_to="init", mask_state=mask_state)
    fa.sparse.grow_prune(opt, p, fraction=0.5, gradient=torch.arange(8.0), new_value=None, state="seed")
    assert p.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]  # the dropped two were 0
    p.grad = torch.zeros(8)
    opt.step()
    seeded = opt.state[p]["exp_avg"]
    assert seeded[seeded != 0].tolist() == pytest.approx([0.9 * 0.1 * 6, 0.9 * 0.1 * 7])


@pytest.mark.parametrize("mask_state", ["dense", "compact"])
def test_a_loaded_state_without_anchors_gets_them_before_anything_is_dropped(mask_state: str) -> None:
    p, opt, mask, gen = setup(mask_state)
    grad(p, gen)
    opt.step()
    q = torch.nn.Parameter(p.detach().clone())
    twin = AdamW([q], lr=0.01, masks={q: mask}, mask_state=mask_state, decay_to="init")
    twin.load_state_dict(opt.state_dict())
    fa.sparse.grow_prune(twin, q, fraction=0.5, gradient=p.grad, new_value=None)
    assert torch.equal(p, q)


@pytest.mark.parametrize("mask_state", ["dense", "compact"])
def test_another_memory_order_than_the_masks_is_refused(mask_state: str) -> None:
    """Bits were read in the order of the new layout: wrong weights were dropped, and frozen ones changed."""
    conv = torch.nn.Conv2d(3, 4, 3, bias=False)
    masks = fa.sparse.sparse_init_(conv, 0.3)
    opt = AdamW(conv.parameters(), masks=masks, mask_state=mask_state)
    conv.to(memory_format=torch.channels_last)
    before = conv.weight.detach().clone()
    with pytest.raises(ValueError, match="memory order that the parameter had"):
        fa.sparse.grow_prune(opt, conv.weight, k=3, gradient=torch.randn(4, 3, 3, 3))
    assert torch.equal(conv.weight, before) and not opt.state


def test_a_seed_that_is_none_is_refused() -> None:
    p, opt, _, _ = setup("dense")
    with pytest.raises(ValueError, match="an integer seed; got 'a'"):
        fa.sparse.grow_prune(opt, p, k=3, grow="random", seed="a")

"""Copies of optimizers, and tensors whose memory moves or goes away between steps: found or refused, never written to blindly."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from samples import feed, model
from test_optim_process import equal, in_fork, make
from torch import Tensor, nn

from fusedadapt import optim
from fusedadapt.optim import Adam, AdamW
from fusedadapt.optim import table as tables


def clones(opt: Any) -> list[Any]:
    saved = io.BytesIO()
    torch.save(opt, saved)
    saved.seek(0)
    return [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), torch.load(saved, weights_only=False)]


@pytest.mark.parametrize("when", ["fresh", "after a step", "with a schedule"])
def test_deepcopy_and_pickle_step_on_alone(when):
    opt, params = make(Adam, size=500, max_grad_norm=1.0, masks=None)
    if when != "fresh":
        opt.step()
    if when == "with a schedule":
        torch.optim.lr_scheduler.StepLR(opt, 1)
    for twin in clones(opt):
        theirs = twin.param_groups[0]["params"]
        for p, q in zip(params, theirs, strict=True):
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in params]
        twin.step()
        assert equal(params, before), "the copy stepped the original"
        reference, own = make(Adam, size=500, max_grad_norm=1.0)
        for _ in range(1 if when == "fresh" else 2):
            reference.step()
        assert equal(theirs, own)


def test_a_copy_keeps_masks_and_scalars():
    p = nn.Parameter(torch.ones(40))
    opt = optim.NAdam([p], masks={p: torch.arange(40) % 2 == 0})
    p.grad = torch.ones(40)
    opt.step()
    for twin in clones(opt):
        (q,) = twin.param_groups[0]["params"]
        q.grad = torch.ones(40)
        twin.step()
        assert (q.detach()[1::2] == 1).all() and (q.detach()[::2] < p.detach()[::2]).all()
        assert twin.state[q]["mu_product"] < opt.state[p]["mu_product"]


@pytest.mark.parametrize("which", ["param", "grad", "state"])
def test_freed_storage_is_refused(which):
    """FSDP and offloading free a tensor by shrinking its storage: same object, same shape, no memory."""
    opt, (p, *_) = make(size=1000)
    opt.step()
    t = {"param": p, "grad": p.grad, "state": opt.state[p]["exp_avg"]}[which]
    size = t.untyped_storage().nbytes()
    t.untyped_storage().resize_(0)
    code = in_fork(lambda: outcome(opt))
    assert code == b"refused", code
    t.untyped_storage().resize_(size)


def outcome(opt: Any) -> bytes:
    try:
        opt.step()
    except ValueError as error:
        return b"refused" if "memory behind the tensor" in str(error) else str(error).encode()
    return b"stepped"


def test_moved_storage_is_found_after_a_refused_step():
    """A refused step must not leave half of what it read in the cache: the next one would write to the old address."""
    opt, (p, *_) = make(size=1000)
    opt.step()
    old, grad = p.data, p.grad
    p.data = old.clone()
    p.grad = grad.to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        opt.step()
    p.grad = grad
    kept = old.clone()
    opt.step()
    assert torch.equal(old, kept), "the step wrote to the parameter's former memory"
    assert not torch.equal(p.detach(), kept)


def test_parameters_made_to_overlap_later_are_refused():
    opt, params = make(size=3000)
    opt.step()
    params[2].data = params[0].data
    with pytest.raises(ValueError, match="share storage"):
        opt.step()


@pytest.mark.parametrize("kind", ["rules", "dtypes of one plan", "dtypes of two plans", "reference"])
def test_parameters_of_different_plans_may_not_overlap(kind: str) -> None:
    """Each plan saw its own parameters only."""
    memory = torch.zeros(10, dtype=torch.float64 if kind == "dtypes of two plans" else torch.float32)
    other = memory.view({"dtypes of one plan": torch.bfloat16, "dtypes of two plans": torch.float32}.get(kind, torch.float32))
    a, c = nn.Parameter(memory[:5]), nn.Parameter(other[4:])
    groups = [{"params": [a]}, {"params": [c], "momentum": 0.0 if "dtypes" in kind else 0.9}]
    opt = optim.SGD(groups, lr=0.1, backend="reference" if kind == "reference" else None)
    c.grad = torch.ones_like(c)
    opt.step()  # the other one stands still
    memory.zero_()
    a.grad = torch.ones_like(a)
    with pytest.raises(ValueError, match="parameter 0 of group . overlaps parameter 0 of group .; two parameters share storage"):
        opt.step()
    assert not memory.any()
    with pytest.raises(ValueError, match="share storage"):
        optim.SGD(groups, lr=0.1, momentum=0.5).step()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_replaced_state_is_the_one_that_goes_on(backend):
    """``state[p] = {}`` starts a parameter anew, as in torch; the plan held on to the dict that was there."""
    ends = []
    for cls, options in ((torch.optim.AdamW, {}), (AdamW, {"backend": backend}), (AdamW, {"backend": backend, "release": True})):
        params = model()
        released = options.pop("release", False)
        opt = cls(params, lr=0.01, **options)
        for t in range(6):
            feed(params, t)
            if t == 2:
                opt.state[params[1]] = {}
            if t == 3:
                opt.state[params[0]] = {k: v.clone() * 2 for k, v in opt.state[params[0]].items()}
            if t == 4:
                opt.state = type(opt.state)(dict, {p: {k: v.clone() for k, v in s.items()} for p, s in opt.state.items()})
                opt.state[params[2]]["exp_avg"].zero_()
            if released:
                [opt.step_one_(p) for p in params]
            else:
                opt.step()
        assert [float(opt.state[p]["step"]) for p in params[:3]] == [9, 4, 6]
        ends.append(params)
    for theirs, ours, one_by_one in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)
        assert torch.equal(ours, one_by_one)


def test_groups_may_carry_keys_of_their_own():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = AdamW([{"params": [p], "name": "head"}, {"params": [q], "lr": 0.5}])
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    opt.step()
    opt.param_groups[1]["lr"] = 0.25
    opt.step()
    assert opt.state[q]["step"] == 2


@pytest.mark.parametrize("backend", ["cpp", "reference", "emulated"])
def test_an_optimizer_that_goes_frees_its_states_at_once(backend: str) -> None:
    """It was in a cycle with its plans: two models' worth of memory until the next garbage collection."""
    params = model()
    opt = AdamW(params, backend=backend)
    feed(params, 0)
    opt.step()
    states = [weakref.ref(v) for s in opt.state.values() for v in s.values()]
    gc.disable()
    try:
        del opt
        assert not any(state() is not None for state in states)
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", ["cpp", "emulated", "reference"])
@pytest.mark.parametrize("released", [False, True])
def test_copies_of_gradients_go_after_the_step(released: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stayed until a gradient came in another memory order again, with the graph that made them."""
    made: list[weakref.ref[Tensor]] = []
    real = tables.memory_order
    monkeypatch.setattr(tables, "memory_order", lambda t, like: (out := real(t, like), made.append(weakref.ref(out)))[0])
    p = nn.Parameter(torch.ones(3, 4))
    opt = AdamW([p], backend=backend)
    scale = torch.ones((), requires_grad=True)
    p.grad = (torch.ones(4, 3) * scale).t()
    assert p.grad.requires_grad
    if released:
        opt.step_one_(p)
    else:
        opt.step()
        assert backend == "reference" or "copied" in opt.__fusedadapt_explain__()[0][2]
    assert len(made) == (backend != "reference") and all(copied() is None for copied in made)


def test_groups_and_states_may_be_changed_by_hand() -> None:
    """As torch: parameters in a tuple, lists made anew, states that belong to no parameter."""
    params, twin, ends = model(), model(), []
    for tensors, cls in ((params, AdamW), (twin, torch.optim.AdamW)):
        opt = cls(tensors, lr=0.01)
        feed(tensors, 0)
        opt.step()
        opt.param_groups[0]["params"] = tuple(tensors[:2])
        del opt.state[tensors[2]]
        opt.step()
        opt.param_groups = [dict(group) for group in opt.param_groups]
        opt.state["notes"] = {"seen": 1}
        opt.step()
        other = cls(tensors[:2])
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert other.state["notes"] == {"seen": 1}
        other.step()
        other.param_groups[0]["params"] = []
        other.step()
        ends.append([float(s["step"]) for s in other.state.values() if "step" in s])
    assert ends[0] == ends[1] == [4.0, 4.0]
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["cpp", "reference", "emulated"])
@pytest.mark.parametrize("mask_state", ["dense", "compact"])
@pytest.mark.parametrize("stepped", [False, True])
def test_a_masked_parameter_in_a_new_memory_order_is_refused(backend: str, mask_state: str, stepped: bool) -> None:
    """The mask's bits stand in the order of the memory: those of model.to(memory_format=torch.channels_last) would be other elements."""
    p = nn.Parameter(torch.ones(4, 4))
    opt = optim.SGD([("w", p)], lr=0.1, backend=backend, mask_state=mask_state, masks={p: torch.arange(16).view(4, 4) % 5 < 2})
    for changed in [False] * stepped + [True]:
        p.grad = torch.ones(4, 4)
        before = p.detach().clone()
        if changed:
            p.data = p.data.t()  # the same memory
            before = before.t()
            with pytest.raises(ValueError, match="memory order it had when the mask was given; got param of w"):
                opt.step()
        else:
            opt.step()
    assert torch.equal(p, before)
    p.data = p.data.t()
    opt.step()


@pytest.mark.parametrize("cls", [optim.SGD, AdamW])
def test_masks_are_loaded_into_another_memory_order(cls: Any) -> None:
    mask = torch.rand(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    ends = []
    for formats in ((torch.channels_last, torch.contiguous_format), (torch.contiguous_format, torch.channels_last), (torch.contiguous_format,) * 2):
        value, saved = torch.ones(3, 4, 2, 2), None
        for form, masked in zip(formats, (True, False), strict=True):
            p = nn.Parameter(value.contiguous(memory_format=form))
            opt = cls([p], lr=0.1, masks={p: mask} if masked else None)
            if saved is not None:
                opt.load_state_dict(saved)
            p.grad = torch.ones(3, 4, 2, 2)
            opt.step()
            saved, value = copy.deepcopy(opt.state_dict()), p.detach().clone(memory_format=torch.contiguous_format)
        ends.append(value)
        assert torch.equal(value == 1, ~mask)
    assert torch.equal(ends[0], ends[2]) and torch.equal(ends[1], ends[2])


def test_a_compact_state_of_another_memory_order_is_refused() -> None:
    p, q = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4, 3).t())
    mask = torch.eye(3, 4) > 0
    here, there = AdamW([p], masks={p: mask}, mask_state="compact"), AdamW([q], masks={q: mask}, mask_state="compact")
    p.grad = torch.ones(3, 4)
    here.step()
    with pytest.raises(ValueError, match="in whose order its compact state lies"):
        there.load_state_dict(here.state_dict())


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("master", ["fp32", "split"])
@pytest.mark.parametrize("compact", [False, True])
def test_a_model_converted_in_mid_run_gets_its_master_weights(backend: str, master: str, compact: bool) -> None:
    """Without them steps below half of bf16's last place would be lost from here on, without a word."""
    gen = torch.Generator().manual_seed(0)
    p, q = (torch.nn.Parameter(torch.ones(8, 6)) for _ in range(2))
    mask = torch.rand(8, 6, generator=gen) < 0.5
    options = {"lr": 1e-4, "weight_decay": 0.0, "backend": backend, "state_dtype": "fp32"}
    masked = {"masks": {p: mask}, "mask_state": "compact"} if compact else {}
    opt, truth = AdamW([p], master_weights=master, **options, **masked), AdamW([q], **options)
    for step in range(8):
        if step == 3:
            p.data = p.data.bfloat16()
            q.data = q.data.bfloat16().float()
        g = torch.randn(8, 6, generator=gen).bfloat16()
        p.grad, q.grad = g.to(p.dtype), g.float()
        opt.step(), truth.step()
    state = opt.state[p]
    assert ("master" in state) == (master == "fp32") and ("remainder" in state) == (master == "split")
    moved = mask if compact else torch.ones_like(mask)
    assert torch.equal(p[moved], q.detach().bfloat16()[moved]) and not torch.equal(q.detach(), q.detach().bfloat16().float())
    if master == "fp32":
        assert torch.equal(state["master"], q.detach()[moved] if compact else q.detach())

"""What users of torch.optim rely on, and what must never go wrong silently."""

import copy
import pickle

import pytest
import torch
from samples import feed, model, snapshot, unchanged

from fusedadapt.optim import OPTIMIZERS, AdaBelief, AdamW, from_torch, to_torch

TORCH = ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "NAdam", "RAdam"]


# --- drop-in for torch -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH)
def test_state_dict_interchange_mid_training(name: str) -> None:
    """ours -> torch -> ours and torch -> ours -> torch, switching after three steps, equals torch alone."""
    options = {"lr": 0.01, "weight_decay": 0.1} | ({"momentum": 0.9, "dampening": 0.1} if name == "SGD" else {})
    theirs_cls, ours_cls = getattr(torch.optim, name), OPTIMIZERS[name]
    alone = model()
    opt = theirs_cls(alone, **options)
    for t in range(9):
        feed(alone, t)
        opt.step()
    for order in ((ours_cls, theirs_cls, ours_cls), (theirs_cls, ours_cls, theirs_cls)):
        params, saved = model(), None
        for part, cls in enumerate(order):
            opt = cls(params, **options)
            if saved is not None:
                opt.load_state_dict(saved)
            for t in range(3 * part, 3 * part + 3):
                feed(params, t)
                opt.step()
            saved = opt.state_dict()
        for p, q in zip(params, alone, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", TORCH)
def test_from_and_to_torch(name: str) -> None:
    params, twin = model(), model()
    theirs = getattr(torch.optim, name)(params, lr=0.01)
    reference = getattr(torch.optim, name)(twin, lr=0.01)
    for t in range(6):
        if t == 2:
            theirs = from_torch(theirs)
            assert isinstance(theirs, OPTIMIZERS[name])
        if t == 4:
            theirs = to_torch(theirs) if name == "Adam" else theirs.to_torch()
            assert type(theirs) is getattr(torch.optim, name)
        feed(params, t), feed(twin, t)
        theirs.step(), reference.step()
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)
    with pytest.raises(TypeError, match="from_torch"):
        from_torch(torch.optim.ASGD(model()))
    with pytest.raises(TypeError, match="torch has no AdaBelief"):
        AdaBelief(model()).to_torch()


@pytest.mark.parametrize("name", ["Lion", "AdaBelief", "ScheduleFreeAdamW"])
def test_checkpoints_of_official_packages(name: str) -> None:
    """A run of the official package goes on here, and from here there again, as if nothing had happened."""
    package, theirs = {
        "Lion": ("lion_pytorch", "Lion"), "AdaBelief": ("adabelief_pytorch", "AdaBelief"), "ScheduleFreeAdamW": ("schedulefree", "AdamWScheduleFree")
    }[name]  # fmt: skip
    options = {"lr": 0.01, "weight_decay": 0.1} | ({"print_change_log": False} if name == "AdaBelief" else {})
    official, ours = getattr(pytest.importorskip(package), theirs), OPTIMIZERS[name]
    params, alone = (torch.nn.ParameterList(p.detach().double() for p in model()) for _ in range(2))
    reference, saved = official(alone, **options), None
    optimizers = [official(params, **options), ours(params, **options), official(params, **options)]
    for opt in (reference, *optimizers):
        if hasattr(opt, "train"):
            opt.train()
    for part, opt in enumerate(optimizers):
        if saved is not None:
            opt.load_state_dict(saved)
        for t in range(8 * part, 8 * part + 8):
            feed(params, t), feed(alone, t)
            opt.step(), reference.step()
        saved = copy.deepcopy(opt.state_dict())
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "absent"), [("SophiaG", "bs"), ("ADOPT", "clip_lambda")])
def test_options_that_official_codes_keep_outside_their_groups(name: str, absent: str) -> None:
    opt = OPTIMIZERS[name](model())
    saved = opt.state_dict()
    given = saved["param_groups"][0].pop(absent)
    opt.load_state_dict(saved)
    assert opt.param_groups[0][absent] == given


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_save_load_continues_bit_for_bit(name: str) -> None:
    cls = OPTIMIZERS[name]
    for k, options in enumerate(cls.examples):
        params, other = model(dtype=torch.bfloat16), model(dtype=torch.bfloat16)
        kwargs = options | {"lr": 0.01, "state_dtype": "fp32", "stochastic_rounding": True}
        a = cls(params, **kwargs)

        def step(opt, tensors, t, name=name):
            if hasattr(opt, "train"):
                opt.train()
            feed(tensors, t)
            for p in tensors:
                if name == "AdaHessian":
                    p.hessian_diag = p.grad.float().abs()
            opt.step()

        for t in range(3):
            step(a, params, t)
        saved = copy.deepcopy(a.state_dict())
        for p, q in zip(params, other, strict=True):
            q.data.copy_(p.data)
        b = cls(other, **kwargs)
        b.load_state_dict(saved)
        again = b.state_dict()
        for i in saved["state"]:
            for key, v in saved["state"][i].items():
                assert again["state"][i][key].dtype == v.dtype and torch.equal(again["state"][i][key], v), (name, k, key)
        for t in range(3, 6):
            step(a, params, t), step(b, other, t)
        assert all(torch.equal(p, q) for p, q in zip(params, other, strict=True)), (name, k)


def test_defaults_are_torchs() -> None:
    for name in TORCH:
        theirs, ours = getattr(torch.optim, name)(model()).defaults, OPTIMIZERS[name](model()).defaults
        for key in theirs.keys() & ours.keys() - {"foreach", "fused"}:
            assert theirs[key] == ours[key], (name, key)


def test_scheduler_tensor_lr_and_groups() -> None:
    """Two groups with their own options, a float and a Tensor lr, changed every step."""
    params, twin = model(), model()

    def build(cls, tensors):
        groups = [{"params": tensors[:1], "lr": 0.1, "weight_decay": 0.3}, {"params": tensors[1:], "betas": (0.5, 0.6), "eps": 1e-3}]
        return cls(groups, lr=0.01, weight_decay=0.0)

    ours, theirs = build(AdamW, params), build(torch.optim.AdamW, twin)
    ours.param_groups[1]["lr"] = torch.tensor(0.01)
    for t in range(5):
        feed(params, t), feed(twin, t)
        ours.step(), theirs.step()
        for opt in (ours, theirs):
            opt.param_groups[0]["lr"] *= 0.5
        ours.param_groups[1]["lr"].mul_(0.5)
        theirs.param_groups[1]["lr"] *= 0.5
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert len(ours._plans) == 1, "two groups, one launch"


def test_intermittent_gradients_keep_their_own_step() -> None:
    params = model()
    opt = AdamW(params)
    for t in range(4):
        feed(params, t)
        if t % 2:
            params[1].grad = None
        opt.step()
    assert [int(opt.state[p]["step"]) for p in params] == [4, 2, 4]


def test_add_param_group_and_replaced_parameters() -> None:
    params = model()
    opt = AdamW(params[:2])
    feed(params, 0)
    opt.step()
    opt.add_param_group({"params": [params[2]], "lr": 0.5})
    before = params[2].detach().clone()
    opt.step()
    assert not torch.equal(before, params[2])
    fresh = torch.nn.Parameter(torch.zeros(4))
    fresh.grad = torch.ones(4)
    opt.param_groups[1]["params"][0] = fresh
    opt.step()
    assert fresh.abs().sum() > 0


def test_storage_moved_under_the_table() -> None:
    """p.data = ... and gradients made anew must be seen: a stale address is a write into freed memory."""
    params = model()
    opt = AdamW(params)
    feed(params, 0)
    opt.step()
    kept = params[0].data
    params[0].data = params[0].data.clone()
    frozen = kept.clone()
    feed(params, 1)
    opt.step()
    assert torch.equal(kept, frozen) and not torch.equal(params[0], frozen)
    state = opt.state[params[1]]
    old = state["exp_avg"]
    state["exp_avg"] = old.clone()
    copy_of_old = old.clone()
    opt.step()
    assert torch.equal(old, copy_of_old) and not torch.equal(state["exp_avg"], old)
    old = state["exp_avg_sq"].data
    state["exp_avg_sq"].data = old.clone()
    copy_of_old = old.clone()
    opt.step()
    assert torch.equal(old, copy_of_old)


def test_copies_and_pickles() -> None:
    params = model()
    opt = AdaBelief(params, lr=0.01, amsgrad=True)
    feed(params, 0)
    opt.step()
    holder = copy.deepcopy({"params": params, "opt": opt})
    loaded = pickle.loads(pickle.dumps({"params": params, "opt": opt}))
    for twin in (holder, loaded):
        for p, q in zip(params, twin["params"], strict=True):
            q.grad = torch.ones_like(q)
            assert torch.equal(p, q)
        before = [p.detach().clone() for p in params]
        twin["opt"].step()
        assert all(torch.equal(a, p) for a, p in zip(before, params, strict=True)), "the copy must not touch the original"
        assert all(not torch.equal(p, q) for p, q in zip(params, twin["params"], strict=True))


def test_version_counters_guard_autograd() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    y = (p * p).sum()
    p.grad = torch.ones(3)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_closure_and_hooks() -> None:
    params = model()
    opt = AdamW(params)
    seen = []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        opt.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    first, second = opt.step(closure), opt.step(closure)
    assert second < first and seen == ["pre", "post"] * 2


# --- mixed precision, clipping, masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "Lion", "AdaBelief", "NAdam"])
def test_found_inf_changes_nothing(name: str) -> None:
    params = model()
    opt = OPTIMIZERS[name](params, lr=0.01, weight_decay=0.1, max_grad_norm=1.0)
    feed(params, 0)
    opt.step()
    before = snapshot(params, opt)
    params[1].grad[3] = float("inf")
    opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    opt.step()
    assert unchanged(before, params, opt) and opt.last_step_skipped
    opt.found_inf = torch.tensor(0.0)
    feed(params, 2, scale=4.0)
    opt.step()
    twin = model()
    plain = OPTIMIZERS[name](twin, lr=0.01, weight_decay=0.1, max_grad_norm=1.0)
    for t in (0, 2):
        feed(twin, t)
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True)), "scaling by a power of two is exact"


def test_grad_scaler() -> None:
    params = model()
    opt, scaler = AdamW(params), torch.amp.GradScaler("cpu", init_scale=8.0)
    loss = sum((p * 0.1).square().sum() for p in params)
    scaler.scale(loss).backward()
    grads = [p.grad.clone() for p in params]
    scaler.step(opt)
    scaler.update()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True)), "gradients stay scaled: they are read, not written"
    before = snapshot(params, opt)
    opt.zero_grad()
    scaler.scale(sum((p * float("inf")).sum() for p in params)).backward()
    scaler.step(opt)
    scaler.update()
    assert unchanged(before, params, opt) and scaler.get_scale() == 4.0 and opt.last_step_skipped


def test_max_grad_norm_is_torchs() -> None:
    for scale in (0.01, 100.0):
        params, twin = model(), model()
        ours, theirs = AdamW([{"params": params[:1], "lr": 0.1}, {"params": params[1:]}], max_grad_norm=1.0), torch.optim.AdamW(twin)
        theirs.param_groups[0]["lr"] = 1e-3
        for t in range(3):
            feed(params, t, scale), feed(twin, t, scale)
            ours.param_groups[0]["lr"] = 1e-3
            norm = torch.nn.utils.clip_grad_norm_(twin, 1.0)
            ours.step(), theirs.step()
            torch.testing.assert_close(ours.grad_norm, norm)
        for p, q in zip(params, twin, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_frozen_elements_stay(name: str) -> None:
    """Frozen = parameter and state bit for bit, under decay and L2, for every rule; the rest moves as without a mask."""
    for options in OPTIMIZERS[name].examples:
        params, free = model(dtype=torch.bfloat16), model(dtype=torch.bfloat16)
        gen = torch.Generator().manual_seed(3)
        masks = {p: torch.rand(p.shape, generator=gen) < 0.5 for p in params}
        kwargs = options | {"lr": 0.01, "weight_decay": 0.1, "state_dtype": "fp32"}
        masked, plain = OPTIMIZERS[name](params, masks=masks, **kwargs), OPTIMIZERS[name](free, **kwargs)
        start = [p.detach().clone() for p in params]
        for t in range(3):
            for opt, tensors in ((masked, params), (plain, free)):
                if hasattr(opt, "train"):
                    opt.train()
                feed(tensors, t)
                for p in tensors:
                    if name == "AdaHessian":
                        p.hessian_diag = p.grad.float()
                opt.step()
        for p, q, s, mask in zip(params, free, start, masks.values(), strict=True):
            assert torch.equal(p[~mask], s[~mask]) and torch.equal(p[mask], q[mask])
            for key, v in masked.state[p].items():
                if v.shape == p.shape:
                    assert torch.equal(v[mask], plain.state[q][key][mask])
                    if key != "z":
                        start_value = masked._initial(key, p, masked.param_groups[0]) if key != "hessian_diag" else 0.0
                        assert (v[~mask] == start_value).all(), key
        saved = masked.state_dict()
        assert all("mask" in s for s in saved["state"].values())


def test_split_master_equals_fp32_training() -> None:
    """A bf16 parameter with a 16-bit remainder is the fp32 run exactly; the visible parameter is that value rounded to nearest."""
    full, half = model(), model()
    for p, q in zip(full, half, strict=True):
        p.data = p.data.bfloat16().float()
        q.data = q.data.bfloat16()
    a, b = AdamW(full), AdamW(half, state_dtype="fp32", master_weights="split")
    for t in range(20):
        feed(half, t)
        for p, q in zip(full, half, strict=True):
            p.grad = q.grad.float()
        a.step(), b.step()
    from fusedadapt.reference.optim import join_split

    for p, q in zip(full, half, strict=True):
        assert torch.equal(join_split(q.detach(), b.state[q]["remainder"]), p)
        assert ((q.float() - p).abs() <= p.abs() * 2**-8).all()

"""What callers do around a step: groups that change their rule, hooks, subclasses, contexts, modes, official packages, damaged states."""

import copy
import math

import numpy as np
import pytest
import torch
from samples import feed, model, snapshot, unchanged
from torch.distributed.optim import ZeroRedundancyOptimizer

import fusedadapt as fa
from fusedadapt.optim import OPTIMIZERS, SGD, AdaBelief, Adam, AdamW, Lion, from_torch, release_gradients
from fusedadapt.reference.optim import join_split

# --- groups ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "change"),
    [("SGD", {}, {"momentum": 0.9}), ("RMSprop", {"centered": True}, {"centered": False}), ("Adam", {"amsgrad": True}, {"amsgrad": False})],
)
def test_a_rule_may_change_in_any_group(name: str, options: dict, change: dict, released: bool) -> None:
    """It was looked at in the group of each plan's first parameter: the others went on by the old rule."""
    params, twin = model(), model()
    ours, theirs = (
        cls([{"params": ps[:1]}, {"params": ps[1:]}], lr=0.01, **options)
        for cls, ps in ((OPTIMIZERS[name], params), (getattr(torch.optim, name), twin))
    )
    for t in range(8):
        if t == 4:
            for opt in (ours, theirs):
                opt.param_groups[1].update(change)
        feed(params, t, 1 if t > 2 else 9), feed(twin, t, 1 if t > 2 else 9)
        [ours.step_one_(p) for p in params] if released else ours.step()
        theirs.step()
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


def test_a_group_that_joins_is_in_the_mode_of_the_others() -> None:
    """It was left in evaluation, so that eval() kept y in it and train() took it for x."""
    first, late = model()[:2]
    opt = OPTIMIZERS["ScheduleFreeAdamW"]([first], lr=0.1)
    opt.train()
    opt.add_param_group({"params": [late]})
    for t in range(3):
        feed([first, late], t)
        opt.step()
    y = late.detach().clone()
    opt.eval()
    assert not torch.equal(late, y)
    opt.train()
    torch.testing.assert_close(late.detach(), y)


# --- Schedule-Free: what the modes do to masters and masks --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_state", [None, "dense", "compact"])
def test_modes_keep_the_low_bits_of_a_split_master(mask_state: str | None) -> None:
    """Evaluation wrote the high half and left the remainder of another number beside it."""
    made = {}
    for form in ("fp32", "split"):
        p = torch.nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16())
        masks = {"masks": {p: torch.arange(1000) % 3 > 0}, "mask_state": mask_state} if mask_state else {}
        opt = OPTIMIZERS["ScheduleFreeAdamW"]([p], lr=0.01, state_dtype="fp32", master_weights=form, **masks)
        opt.train()
        for t in range(12):
            feed([p], t)
            opt.step()
            if t % 3 == 2:
                opt.eval(), opt.train()
        state, where = opt.state[p], torch.arange(1000) % 3 > 0 if mask_state == "compact" else slice(None)
        made[form] = state["master"] if form == "fp32" else join_split(p.detach()[where], state["remainder"])
    assert torch.equal(made["fp32"], made["split"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("master", [None, "fp32", "split"])
def test_modes_leave_frozen_elements_alone(dtype: torch.dtype, master: str | None) -> None:
    """An infinity became NaN, and -0.0 became 0.0."""
    special = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 0.0, -1e-45, 3e38, 1.0], dtype=dtype)
    p = torch.nn.Parameter(special.clone())
    opt = OPTIMIZERS["ScheduleFreeAdamW"]([p], lr=0.1, master_weights=master, masks={p: torch.arange(8) == 7})
    opt.train()
    feed([p], 0)
    opt.step(), opt.eval(), opt.train(), opt.eval()
    assert p[7] != special[7]
    assert torch.equal(p.detach()[:7].view(torch.uint8), special[:7].view(torch.uint8))


# --- hooks, subclasses, contexts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AdaBelief, AdamW, OPTIMIZERS["Adagrad"], OPTIMIZERS["ADOPT"], OPTIMIZERS["ScheduleFreeAdamW"]])
def test_state_dict_hooks_see_and_may_replace_all_of_it(cls: type) -> None:
    """They ran before ours was whole; one that returned a dict of its own made a KeyError."""
    params, other = model(), model()
    opt, twin = cls(params), cls(other)
    saved = opt.state_dict()
    seen = []
    opt.register_state_dict_post_hook(lambda _, given: seen.append(copy.deepcopy(given)))
    handle = opt.register_state_dict_post_hook(lambda _, given: {"mine": given})
    assert str(opt.state_dict()) == str({"mine": saved}) and str(seen) == str([saved])
    twin.register_load_state_dict_pre_hook(lambda _, given: given["mine"])
    twin.load_state_dict(opt.state_dict())
    handle.remove()
    assert str(opt.state_dict()) == str(saved)


def test_what_a_hook_puts_into_a_loaded_dict_is_not_the_callers() -> None:
    opt = Lion(model())
    saved = opt.state_dict()
    opt.register_load_state_dict_pre_hook(lambda _, given: given.update(extra=1))
    opt.load_state_dict(saved)
    assert "extra" not in saved


def test_hooks_of_a_subclass_run_once() -> None:
    """torch wraps a step of its own, and ours runs them too."""

    class Averaged(AdamW):
        def step(self, closure=None):  # noqa: ANN001, ANN202
            return super().step(closure)

    ran = []
    opt = Averaged(params := model())
    opt.register_step_pre_hook(lambda *_: ran.append("pre"))
    opt.register_step_post_hook(lambda *_: ran.append("post"))
    feed(params, 0)
    opt.step()
    assert ran == ["pre", "post"]


def test_backend_and_strict_hold_for_an_optimizer_that_has_made_steps() -> None:
    """The first step's choice stayed, within the block and after it."""
    params = model()
    opt = Adam(params)

    def chosen() -> str:
        feed(params, 0)
        opt.step()
        opt.step_one_(params[0])
        assert len({type(plan) for plan in (*opt._plans, opt._single[params[0]][0])}) == 1
        return fa.explain(opt)[0][1]

    usual = chosen()
    with fa.backend("reference"):
        assert chosen() == "reference"
    assert chosen() == usual
    with fa.strict(), fa.backend("cuda"), pytest.raises(RuntimeError, match="no fallback"):
        opt.step()
    assert chosen() == usual


@pytest.mark.parametrize("kind", ["betas", "lr"])
def test_lists_and_arrays_may_change_in_place(kind: str) -> None:
    """As tensors: they were compared with themselves, and the first values stayed."""
    params, twin = model(), model()
    ours, theirs = AdamW(params, lr=0.1), torch.optim.AdamW(twin, lr=0.1)
    for opt in (ours, theirs):
        opt.param_groups[0][kind] = [0.9, 0.99] if kind == "betas" else np.array(0.1)
    for t in range(6):
        feed(params, t), feed(twin, t)
        ours.step(), theirs.step()
        for opt in (ours, theirs):
            if kind == "betas":
                opt.param_groups[0]["betas"][0] *= 0.5
            else:
                opt.param_groups[0]["lr"] *= 0.5
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


# --- options ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("package", "name", "options"), [
    ("adabelief_pytorch", "AdaBelief", {"weight_decouple": False, "rectify": False, "print_change_log": False}),
    ("adabelief_pytorch", "AdaBelief", {"fixed_decay": True, "degenerated_to_sgd": False, "print_change_log": False}),
    ("lion_pytorch", "Lion", {"decoupled_weight_decay": True}),
    ("schedulefree", "ScheduleFreeAdamW", {"warmup_steps": 4, "r": 0.5}),  # it was refused for its name there
])  # fmt: skip
def test_from_torch_takes_what_official_packages_keep_outside_their_groups(package: str, name: str, options: dict) -> None:
    """Their options are attributes: ours took its defaults for them."""
    params, alone = (torch.nn.ParameterList(p.detach().double() for p in model()) for _ in range(2))
    official = getattr(pytest.importorskip(package), {"ScheduleFreeAdamW": "AdamWScheduleFree"}.get(name, name))
    theirs, reference = (official(ps, lr=0.01, weight_decay=0.1, **options) for ps in (params, alone))
    for opt in (theirs, reference):
        opt.param_groups[0]["lr"] = 0.02
        if hasattr(opt, "train"):
            opt.train()
    for t in range(12):
        feed(params, t), feed(alone, t)
        theirs.step(), reference.step()
        theirs = from_torch(theirs) if t == 2 else theirs
    assert type(theirs) is OPTIMIZERS[name]
    for p, q in zip(params, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("extras", [{"masks": True}, {"master_weights": "fp32"}, {"master_weights": "split"}, {"decay_to": "init"}])
@pytest.mark.parametrize("steps", [0, 1])
def test_to_torch_refuses_what_torch_cannot_carry_on(extras: dict, steps: int) -> None:
    """Before the first step masks and master weights were dropped without a word."""
    params = model(dtype=torch.bfloat16)
    opt = AdamW(params, **(extras | ({"masks": {params[0]: torch.ones(7, 5, dtype=torch.bool)}} if "masks" in extras else {})))
    for t in range(steps):
        feed(params, t)
        opt.step()
    with pytest.raises(ValueError, match="without masks"):
        opt.to_torch()
    assert type(AdamW(model(), master_weights="fp32").to_torch()) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("state_dtype", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), (None, torch.bfloat16)]
)
def test_from_torch_gives_states_the_dtype_asked_for(state_dtype: str | None, dtype: torch.dtype) -> None:
    """Only coded ones were converted: a bf16 run carried over with fp32 states went on with bf16 ones."""
    params = model(dtype=torch.bfloat16)
    theirs = torch.optim.AdamW(params)
    for t in range(2):
        feed(params, t)
        theirs.step()
    ours = from_torch(theirs, state_dtype=state_dtype)
    assert {ours.state[p][k].dtype for p in params for k in ("exp_avg", "exp_avg_sq")} == {dtype}
    assert all(torch.equal(ours.state[p]["exp_avg"], theirs.state[p]["exp_avg"].to(dtype)) for p in params)
    ours.step()


def test_adopt_asks_a_function_for_its_bound_from_one_earlier_step_on() -> None:
    """As the official code; one that divides by the number failed when the optimizer was made."""
    asked = []
    opt = OPTIMIZERS["ADOPT"](params := model(), clip_lambda=lambda k: asked.append(k) or 1 / k)
    for t in range(3):
        feed(params, t)
        opt.step()
    assert 0 not in asked and asked[-1] == 2


def test_the_bound_of_a_function_is_asked_again_for_a_parameter_alone() -> None:
    """A parameter stepped alone kept the first bound; released ones, which do not step together, are refused."""
    params, twin = model()[:1], model()[:1]
    opt, one_by_one = (OPTIMIZERS["ADOPT"](ps, lr=0.1, clip_lambda=lambda k: 0.01 * k) for ps in (params, twin))
    for t in range(5):
        feed(params, t), feed(twin, t)
        opt.step(), one_by_one.step_one_(twin[0])
    assert torch.equal(params[0], twin[0])
    with pytest.raises(ValueError, match="clip_lambda"):
        release_gradients(opt)


def test_released_gradients_wait_for_train_mode() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    opt = OPTIMIZERS["ScheduleFreeAdamW"]([p])
    release_gradients(opt)
    with pytest.raises(RuntimeError, match=r"train\(\)"):
        p.square().sum().backward()
    assert torch.equal(p, torch.ones(3)) and not opt.state


def test_release_leaves_frozen_parameters_alone() -> None:
    """As with a frozen base among model.parameters(): torch refuses a hook on what needs no gradient. Thawed later, it waits for step()."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    net[0].requires_grad_(False)
    opt = AdamW(net.parameters())
    release_gradients(opt)
    for steps in ([0, 1], [1, 2]):
        net(torch.ones(1, 3)).sum().backward()
        opt.step()
        assert [int(opt.state[layer.weight].get("step", 0)) for layer in net] == steps
        net.requires_grad_(True)


def test_lions_decoupled_decay_divides_by_the_lr_it_was_given() -> None:
    """Not by what a scheduler has made of that tensor since."""
    params, twin = model(), model()
    for ps, lr in ((params, 0.125), (twin, torch.tensor(0.125))):
        opt = Lion(ps, lr=lr, weight_decay=0.1, decoupled_weight_decay=True)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        for t in range(4):
            feed(ps, t)
            opt.step(), scheduler.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))


def test_a_refused_number_of_tokens_changes_nothing() -> None:
    opt = OPTIMIZERS["SophiaG"](params := model(), bs=7)
    feed(params, 0)
    with pytest.raises(ValueError, match="bs >= 0 and finite; got nan"):
        opt.step(bs=math.nan)
    assert opt.param_groups[0]["bs"] == 7
    opt.step()


@pytest.mark.parametrize(("name", "option", "value"), [
    ("AdamW", "max_grad_norm", "1.0"), ("AdamW", "max_grad_norm", [1.0]), ("SophiaG", "rho", None), ("SophiaG", "bs", "x"), ("SophiaG", "bs", -1),
    ("NAdam", "momentum_decay", "x"), ("Adagrad", "initial_accumulator_value", None), ("AdEMAMix", "alpha", -1.0), ("AdEMAMix", "alpha_warmup", "x"),
    ("AdEMAMix", "beta3_warmup", -1), ("ScheduleFreeAdamW", "warmup_steps", None), ("ADOPT", "clip_lambda", 0.5),
    ("AdaHessian", "hessian_power", -1.0), ("AdEMAMix", "betas", None), ("SGD", "momentum", torch.ones(2)), ("RMSprop", "momentum", torch.ones(2)),
])  # fmt: skip
def test_options_of_a_wrong_kind_are_named(name: str, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected {option} .*got"):
        OPTIMIZERS[name](model(), **{option: value})


@pytest.mark.parametrize(("name", "options"), [("AdaBelief", {}), ("AdamW", {"state_dtype": "int8"}), ("ADOPT", {})])
def test_zero_redundancy_puts_states_and_options_in_place_itself(name: str, options: dict, tmp_path) -> None:
    """It passes load_state_dict by: AdaBelief's step count, saved in fp64 for the official package, was refused by the next step."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        params, twin = model(), model()
        sharded = ZeroRedundancyOptimizer(params, OPTIMIZERS[name], lr=0.01, **options)
        alone = OPTIMIZERS[name](twin, lr=0.01, **options)
        for t in range(4):
            feed(params, t), feed(twin, t)
            sharded.step(), alone.step()
            sharded.consolidate_state_dict()
            sharded.load_state_dict(copy.deepcopy(sharded.state_dict()))
        assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["cpp", "reference", "emulated"])
def test_a_step_count_put_in_place_by_hand_may_be_a_number(backend: str) -> None:
    opt = Adam(params := model()[:1], backend=backend)
    feed(params, 0)
    opt.step()
    opt.state[params[0]] = opt.state[params[0]] | {"step": 7}
    opt.step()
    assert opt.state[params[0]]["step"] == 8


# --- damaged states -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [
    {"step": math.nan}, {"step": -1.0}, {"step": None}, {"step": torch.tensor([1.0, 2.0])}, {"step": "3"}, {"exp_avg": [1.0, 2.0]},
    {"exp_avg": torch.ones(3, 5, dtype=torch.int64)}, {"exp_avg": torch.ones(3, 5, dtype=torch.complex64)}, {"exp_avg": torch.ones(3, 5).to_sparse()},
    {"exp_avg": torch.ones(3, 5, device="meta")}, {"mask": torch.ones(5, 3, dtype=torch.bool)}, {"mask": torch.zeros(9, dtype=torch.int32)},
    {"index": [1]}, {"prefix": None}, {"cohorts": "x"}, {"exp_avg_scale": torch.tensor(1.0)}, {"exp_avg_scale": 2.0},
    {"strides": 5}, {"strides": (1,)},
], ids=str)  # fmt: skip
def test_a_damaged_state_is_refused_when_it_is_loaded(entry: dict) -> None:
    """Most were taken and refused by the next step, when the good state was gone; a step that is NaN made every parameter NaN."""
    params = [torch.nn.Parameter(torch.ones(3, 5))]
    opt = AdamW([("net.weight", params[0])])
    feed(params, 0)
    opt.step()
    before, saved = snapshot(params, opt), copy.deepcopy(opt.state_dict())
    saved["state"][0] |= entry
    with pytest.raises(ValueError, match=rf"expected {next(iter(entry))} of net.weight .*damaged"):
        opt.load_state_dict(saved)
    assert unchanged(before, params, opt)


@pytest.mark.parametrize("given", [None, [], {"state": [], "param_groups": []}, {"state": {}, "param_groups": [{}]}])
def test_what_is_no_state_dict_is_said_to_be_none(given: object) -> None:
    with pytest.raises(ValueError, match="expected a dict with 'state'"):
        SGD(model()).load_state_dict(given)


def test_fp64_is_refused_what_others_are() -> None:
    """Shared memory was updated twice, integer states took the integers of their values."""
    memory = torch.ones(10, dtype=torch.float64)
    halves = [torch.nn.Parameter(memory[:6]), torch.nn.Parameter(memory[4:])]
    halves[1].data = memory[4:]
    opt = AdamW(halves)
    feed(halves, 0)
    with pytest.raises(ValueError, match="separate memory"):
        opt.step()
    assert torch.equal(memory, torch.ones_like(memory))
    alone = AdamW(halves[:1])
    alone.step()
    alone.state[halves[0]]["exp_avg"] = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match="exp_avg"):
        alone.step()


def test_a_default_device_elsewhere_changes_nothing() -> None:
    """A checkpoint may be loaded while a model's skeleton is made on the meta device."""
    opt = AdamW(params := model())
    feed(params, 0)
    with torch.device("meta"):
        opt.step()
        opt.load_state_dict(opt.state_dict())
        opt.step()
    assert all(v.device.type == "cpu" for state in opt.state.values() for v in state.values())

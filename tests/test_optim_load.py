"""Loading into another configuration, before and after the model: what is missing is made at the first step, of the weights there are then."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import feed, model

from fusedadapt import checkpoint
from fusedadapt.optim import OPTIMIZERS, Adam, AdamW, from_torch, plans_device

B = torch.bfloat16


def weight(value: float, dtype: torch.dtype = B) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((4,), value, dtype=dtype))


def stepped(opt: Any, p: torch.nn.Parameter) -> Any:
    p.grad = torch.ones_like(p)
    opt.step()
    return opt


# --- seeds -------------------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_brings_its_seed() -> None:
    """It was compared with the seed of the optimizer it was loaded into."""
    p, q = weight(1.0), weight(1.0)
    saved = stepped(AdamW([p], stochastic_rounding=True, seed=5), p).state_dict()
    twin = AdamW([q], stochastic_rounding=True)
    twin.load_state_dict(saved)
    assert twin.param_groups[0]["seed"] == 5
    stepped(twin, q)
    theirs = torch.optim.AdamW([p])
    kept = AdamW([q], stochastic_rounding=True, seed=7)
    kept.load_state_dict(theirs.state_dict())  # without a seed: its own stays
    assert kept.param_groups[0]["seed"] == 7


def test_loaded_groups_need_one_seed() -> None:
    two = [{"params": [weight(1.0)]}, {"params": [weight(1.0)]}]
    opt = AdamW(two, stochastic_rounding=True)
    saved = opt.state_dict()
    saved["param_groups"][1]["seed"] = 3
    with pytest.raises(ValueError, match="one seed for all groups: .* got 3 in group 1, and 0 in group 0"):
        opt.load_state_dict(saved)
    assert [g["seed"] for g in opt.param_groups] == [0, 0]
    opt.param_groups[1]["seed"] = 3
    feed([g["params"][0] for g in opt.param_groups], 0)
    with pytest.raises(ValueError, match="one seed for all groups"):
        opt.step()


# --- states before weights ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpp", "reference", "emulated"])
@pytest.mark.parametrize("source", ["ours", "torch"])
@pytest.mark.parametrize("options", [{"master_weights": "fp32"}, {"master_weights": "split"}, {"decay_to": "init"}], ids=str)
def test_the_optimizer_may_be_loaded_before_the_model(options: dict, source: str, backend: str) -> None:
    """Master weights and anchors were copies of the weights that were there before."""
    p, q = weight(5.0), weight(1.0)
    saved = stepped((AdamW if source == "ours" else torch.optim.AdamW)([p], lr=0.0), p).state_dict()
    opt = AdamW([q], backend=backend, **options)
    opt.load_state_dict(saved)
    assert opt.state_dict()["state"][0].keys() >= {"step", "exp_avg"}
    q.data.copy_(p.data)
    again = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(again)
    stepped(opt, q)
    assert torch.equal(q, p)
    made = {"fp32": "master", "split": "remainder", None: "anchor"}[options.get("master_weights")]
    assert made in opt.state[q] and (made == "remainder" or (opt.state[q][made] == 5).all())


def test_released_gradients_find_their_master_weights_after_loading() -> None:
    p, q = weight(5.0), weight(1.0)
    opt = AdamW([q], lr=0.0, master_weights="fp32")
    opt.load_state_dict(stepped(AdamW([p], lr=0.0), p).state_dict())
    q.data.copy_(p.data)
    q.grad = torch.ones_like(q)
    opt.step_one_(q)
    assert torch.equal(q, p) and (opt.state[q]["master"] == 5).all()


def test_schedule_free_moves_a_master_weight_it_was_loaded_without() -> None:
    p = torch.nn.Parameter(torch.linspace(-1, 1, 8).to(B))
    opt, twin = (OPTIMIZERS["ScheduleFreeAdamW"]([p], lr=0.1, state_dtype="fp32", master_weights=kind) for kind in (None, "fp32"))
    opt.train()
    stepped(opt, p)
    opt.eval()
    x = p.detach().float()
    twin.load_state_dict(opt.state_dict())
    twin.train()
    y = x.lerp(twin.state[p]["z"], 1 - 0.9)
    assert torch.equal(p, y.to(B)) and not torch.equal(y, y.to(B).float())
    torch.testing.assert_close(twin.state[p]["master"], y, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{"master_weights": "fp32"}, {"decay_to": "init"}], ids=str)
def test_a_checkpoint_loads_into_an_optimizer_with_master_weights(options: dict, tmp_path: Path) -> None:
    old, new = (torch.nn.Linear(2, 2, bias=False).to(B) for _ in range(2))
    old.weight.data.fill_(5.0), new.weight.data.fill_(1.0)
    opt = stepped(AdamW(old.parameters(), lr=0.0), old.weight)
    checkpoint.save(tmp_path / "c", old, opt)
    twin = AdamW(new.parameters(), **options)
    checkpoint.load(tmp_path / "c", new, twin)
    stepped(twin, new.weight)
    assert (new.weight == 5).all() and all((twin.state[new.weight][k] == 5).all() for k in {"master", "anchor"} & twin.state[new.weight].keys())


def test_a_state_that_does_not_fit_leaves_the_model_alone(tmp_path: Path) -> None:
    """Models are loaded first; an optimizer's refusal still comes before."""
    old, new = (torch.nn.Linear(2, 2, bias=False).to(B) for _ in range(2))
    new.weight.data.fill_(1.0)
    checkpoint.save(tmp_path / "c", old, stepped(AdamW(old.parameters(), master_weights="split"), old.weight))
    with pytest.raises(ValueError, match='master_weights="split"'):
        checkpoint.load(tmp_path / "c", new, AdamW(new.parameters(), master_weights="fp32"))
    assert (new.weight == 1).all()


def test_master_weights_do_not_begin_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replay would copy the parameter anew."""
    p = weight(5.0)
    saved = stepped(AdamW([p], lr=0.0), p).state_dict()
    opt = AdamW([p], master_weights="fp32", backend="emulated")
    opt.load_state_dict(saved)
    monkeypatch.setattr(plans_device.DevicePlan, "_capturing", lambda self: True)
    monkeypatch.setattr(plans_device.DevicePlan, "set_hypers", lambda self, hypers: None)
    with pytest.raises(RuntimeError, match="expected a step before the CUDA graph capture"):
        opt.step()
    assert "master" not in opt.state[p]


# --- what saving and loading must not do -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_adagrads_state_dict_changes_nothing(backend: str) -> None:
    """It made master weights and anchors of the weights there were."""
    p, twin = weight(1.0), weight(1.0)
    opt = OPTIMIZERS["Adagrad"]([p], lr=0.0, master_weights="fp32", decay_to="init", initial_accumulator_value=0.5, backend=backend)
    saved = opt.state_dict()
    assert saved["state"][0].keys() == {"step", "sum"} and (saved["state"][0]["sum"] == 0.5).all()
    assert not any(opt.state.values())
    loaded = OPTIMIZERS["Adagrad"]([twin], master_weights="fp32", decay_to="init")
    loaded.load_state_dict(saved)
    for o, q in ((opt, p), (loaded, twin)):
        q.data.fill_(5.0)
        stepped(o, q)
        assert (q == 5).all() and (o.state[q]["master"] == 5).all() and (o.state[q]["anchor"] == 5).all()


def test_adagrad_shares_no_copies_of_the_weights() -> None:
    p = weight(1.0)
    opt = OPTIMIZERS["Adagrad"]([p], lr=0.0, master_weights="fp32")
    opt.share_memory()
    assert opt.state[p].keys() == {"step", "sum"} and all(v.is_shared() for v in opt.state[p].values())
    p.data.fill_(5.0)
    stepped(opt, p)
    assert (p == 5).all()


def test_adamw_stays_decoupled_whoever_saved() -> None:
    """As torch's does with an Adam's state dict: the decay would be part of the gradient."""
    (params, twin), saver = (model(), model()), model()
    opt, theirs = AdamW(params, lr=0.1, weight_decay=0.5), torch.optim.AdamW(twin, lr=0.1, weight_decay=0.5)
    adam = torch.optim.Adam(saver, lr=0.1, weight_decay=0.5)
    feed(saver, 0)
    adam.step()
    for o, held in ((opt, params), (theirs, twin)):
        o.load_state_dict(adam.state_dict())
        assert o.param_groups[0]["decoupled_weight_decay"]
        feed(held, 1)
        o.step()
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p, q)
    coupled = Adam(model(), decoupled_weight_decay=True)
    coupled.load_state_dict(adam.state_dict())
    assert not coupled.param_groups[0]["decoupled_weight_decay"]


@pytest.mark.parametrize("params", [None, "ab", 3])
def test_loaded_groups_list_their_parameters(params: object) -> None:
    opt = AdamW(model()[:2])
    saved = opt.state_dict()
    saved["param_groups"][0]["params"] = params
    with pytest.raises(ValueError, match="dicts with a list 'params'"):
        opt.load_state_dict(saved)


def test_torchs_states_get_their_master_weights() -> None:
    p = weight(1.0)
    opt = from_torch(stepped(torch.optim.AdamW([p], lr=0.0), p), master_weights="fp32")
    p.data.fill_(5.0)
    stepped(opt, p)
    assert (p == 5).all()


def test_a_new_group_takes_the_seed_that_a_checkpoint_brought() -> None:
    first, other = (torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in "ab")
    saved = AdamW([first], stochastic_rounding=True, seed=7).state_dict()
    opt = AdamW([first], stochastic_rounding=True)
    opt.load_state_dict(saved)
    opt.add_param_group({"params": [other]})
    assert [group["seed"] for group in opt.param_groups] == [7, 7]


def test_a_refusal_leaves_the_model_where_hooks_may_change_the_state(tmp_path: Path) -> None:
    def made(value: float, form: str):
        model = torch.nn.Linear(2, 2, bias=False).bfloat16()
        torch.nn.init.constant_(model.weight, value)
        return model, AdamW(model.parameters(), master_weights=form)

    model, opt = made(5.0, "split")
    model.weight.grad = torch.ones_like(model.weight)
    opt.step()
    checkpoint.save(tmp_path / "c", model, opt)
    model, opt = made(1.0, "fp32")
    opt.register_load_state_dict_pre_hook(lambda optimizer, state: None)
    with pytest.raises(ValueError, match='master_weights="split"'):
        checkpoint.load(tmp_path / "c", model, opt)
    assert bool((model.weight == 1).all())

"""Options in every form that torch and the official codes take them in, and their way through checkpoints."""

import numpy as np
import pytest
import torch
from samples import feed, model

from fusedadapt.optim import OPTIMIZERS, AdamW, Lion


def test_hyper_parameters_may_be_tensors_and_numpy_numbers() -> None:
    """As torch takes them; a tensor may change in place between steps."""
    params, twin = model(), model()
    betas = torch.tensor(0.9), torch.tensor(0.99)
    ours = AdamW(params, lr=0.01, betas=betas, eps=np.float32(2**-20), weight_decay=np.float64(0.25))
    theirs = torch.optim.AdamW(twin, lr=torch.tensor(0.01), betas=betas, eps=2**-20, weight_decay=0.25)
    released = model()
    one_by_one = AdamW(released, lr=0.01, betas=betas, eps=2**-20, weight_decay=0.25)
    for t in range(4):
        feed(params, t), feed(twin, t), feed(released, t)
        ours.step(), theirs.step()
        for p in released:
            one_by_one.step_one_(p)
        betas[0].mul_(0.5)
    for p, q, r in zip(params, twin, released, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)
        assert torch.equal(p, r)
    averaged = OPTIMIZERS["ScheduleFreeAdamW"](model(), betas=betas)
    averaged.train(), averaged.step(), averaged.eval()


def test_a_function_as_an_option_stays_out_of_checkpoints(tmp_path) -> None:
    """torch.save cannot pickle a lambda; the optimizer that loads has its own."""
    runs = []
    for again in (False, True):
        params = model()
        opt = OPTIMIZERS["ADOPT"](params, clip_lambda=lambda k: 0.5 + k)
        for t in range(4):
            if again and t == 2:
                torch.save(opt.state_dict(), tmp_path / "state.pt")
                opt = OPTIMIZERS["ADOPT"](params, clip_lambda=lambda k: 0.5 + k)
                opt.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            feed(params, t)
            opt.step()
        runs.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.bfloat16)])
def test_states_of_fp64_parameters_move_to_others(dtypes: tuple) -> None:
    """A step wants fp64 states for fp64 parameters and no others; a state that was loaded must be one that can go on."""
    old, new = ([torch.nn.Parameter(p.detach().to(dtype)) for p in model()] for dtype in dtypes)
    before, after = AdamW(old, decay_to="init"), AdamW(new, decay_to="init")
    feed(old, 0)
    before.step()
    after.load_state_dict(before.state_dict())
    for name in ("exp_avg", "exp_avg_sq", "anchor"):
        assert after.state[new[0]][name].dtype == dtypes[1]
        assert torch.equal(after.state[new[0]][name], before.state[old[0]][name].to(dtypes[1]))
    feed(new, 1)
    after.step()


@pytest.mark.parametrize("forms", [("split", "fp32"), ("fp32", "split"), ("split", None)], ids=str)
def test_master_weights_in_another_form_are_not_lost(forms: tuple) -> None:
    """The low bits of the fp32 weights would be gone, and nobody would know."""
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in model()]
    opt = AdamW(params, master_weights=forms[0])
    feed(params, 0)
    opt.step()
    saved = opt.state_dict()
    with pytest.raises(ValueError, match=f'load_state_dict: expected .*build the optimizer with master_weights="{forms[0]}"'):
        AdamW([torch.nn.Parameter(p.detach().clone()) for p in params], master_weights=forms[1]).load_state_dict(saved)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    other = AdamW(wide)
    other.load_state_dict(saved)  # the parameters are fp32 themselves now
    feed(wide, 1)
    other.step()


def test_lion_takes_the_packages_arguments() -> None:
    """lion-pytorch's, in its order; whether its Triton kernel is to run means nothing here."""
    package = pytest.importorskip("lion_pytorch")
    params, twin = model(), model()
    ours, theirs = Lion(params, 0.01, (0.9, 0.99), 0.1, False, True), package.Lion(twin, 0.01, (0.9, 0.99), 0.1, False, True)
    for t in range(3):
        feed(params, t), feed(twin, t)
        ours.step(), theirs.step()
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)

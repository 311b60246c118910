"""Quick tests that the mutants of mutants.py must turn red; tests/test_mutation.py runs them (the name keeps them out of the ordinary run)."""

from __future__ import annotations

import numpy as np
import pytest
import test_lowrank_fuzz as lowrank_fuzz
import test_optim_fuzz as fuzz
import torch
from torch import nn

from fusedadapt import dispatch, optim
from fusedadapt.reference import optim as reference

NAMES = list(optim.OPTIMIZERS)


def seeds(name: str, count: int, salt: int = 0) -> list[int]:
    """Fuzz cases of one optimizer."""
    return [salt + k * len(NAMES) + (NAMES.index(name) - salt) % len(NAMES) for k in range(count)]


@pytest.mark.parametrize("name", NAMES)
def test_cpp(name: str) -> None:
    for seed in seeds(name, 16):
        fuzz.run_case("cpp", seed)


@pytest.mark.parametrize("name", NAMES)
def test_triton(name: str, quick_calls: None) -> None:
    for seed in seeds(name, 3, 300_000):
        fuzz.run_case("triton", seed, small=True)


def test_philox() -> None:
    for seed, block, tensor, step in ((0, 0, 0, 0), (2**63 + 5, 2**35 + 1, 7, 99)):
        assert list(dispatch.core().philox(seed, block, tensor, step)) == reference.philox(seed, np.array(block), tensor, step).tolist()


@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
def test_bf16_ties_go_to_even(backend: str) -> None:
    p = nn.Parameter(torch.tensor([1.0, 1.0 + 2**-7, -1.0], dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    p.grad = torch.tensor([-(2.0**-8), -(2.0**-8), 2.0**-8])
    optim.SGD([p], lr=1.0, backend=backend).step()
    assert p.tolist() == [1.0, 1.0 + 2**-6, -1.0]


@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
def test_split_master_is_the_fp32_run(backend: str) -> None:
    start, grads = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.linspace(-1, 1, 64)
    exact, halves = nn.Parameter(start.float()), nn.Parameter(start.clone())
    opts = optim.SGD([exact], lr=0.01), optim.SGD([halves], lr=0.01, master_weights="split", backend=backend)
    for _ in range(2):
        for p, opt in zip((exact, halves), opts):
            p.grad_dtype = torch.float32
            p.grad = grads
            opt.step()
    joined = (halves.detach().view(torch.int16).int() << 16) + opts[1].state[halves]["remainder"].int()
    assert torch.equal(joined.view(torch.float32), exact.detach())


@pytest.mark.parametrize("backend", ["cpp", "triton", "reference"])
def test_frozen_elements_stay(backend: str) -> None:
    p, keep = nn.Parameter(torch.ones(200)), torch.arange(200) % 3 == 0
    opt = optim.AdamW([p], masks={p: keep}, backend=backend)
    p.grad = torch.ones(200)
    opt.step()
    assert torch.equal(p.detach() != 1, keep) and torch.equal(opt.state[p]["exp_avg"] != 0, keep)


def test_frozen_elements_beside_fp32_states_stay() -> None:
    p, keep = nn.Parameter(torch.ones(200, dtype=torch.bfloat16)), torch.arange(200) % 3 == 0
    opt = optim.AdamW([p], lr=0.1, masks={p: keep}, state_dtype="fp32", backend="cpp")
    p.grad = torch.ones_like(p)
    opt.step()
    assert torch.equal(p.detach() != 1, keep) and torch.equal(opt.state[p]["exp_avg"] != 0, keep)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adagrad", "RMSprop", "Adadelta"])
def test_as_torch(name: str) -> None:
    options = {"weight_decay": 0.1, "lr": 0.05} | ({"momentum": 0.9, "dampening": 0.2} if name == "SGD" else {})
    results = []
    for cls in (getattr(optim, name), getattr(torch.optim, name)):
        p = nn.Parameter(torch.linspace(-1, 1, 40, dtype=torch.float64))
        opt = cls([p], **options)
        for k in range(8):
            p.grad = torch.cos(p.detach() * (k + 1))
            opt.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("size", [0.01, 10.0])
def test_clips_as_torch(size: float) -> None:
    grads = torch.linspace(-1, 1, 33) * size
    p, q = nn.Parameter(torch.ones(33)), nn.Parameter(torch.ones(33))
    p.grad, q.grad = grads.clone(), grads.clone()
    optim.SGD([p], lr=1.0, max_grad_norm=1.0).step()
    torch.nn.utils.clip_grad_norm_([q], 1.0)
    torch.optim.SGD([q], lr=1.0).step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert torch.equal(p.grad, grads), "a gradient was modified"


def test_a_gradient_in_another_memory_order() -> None:
    p, values = nn.Parameter(torch.zeros(3, 5)), torch.arange(15.0).view(3, 5)
    p.grad = values.t().contiguous().t()
    optim.SGD([p], lr=1.0).step()
    assert torch.equal(p.detach(), -values)


def test_a_changed_learning_rate_counts() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    opt = optim.SGD([p], lr=1.0)
    opt.step()
    opt.param_groups[0]["lr"] = 0.5
    opt.step()
    assert p.tolist() == [-1.5] * 4


def test_a_moved_parameter_is_found() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    opt = optim.SGD([p], lr=1.0)
    opt.step()
    old = p.data
    p.data = old.clone()
    opt.step()
    assert old.tolist() == [-1.0] * 4 and p.tolist() == [-2.0] * 4


def test_a_wrong_gradient_is_refused() -> None:
    p = nn.Parameter(torch.zeros(4, 6))
    opt = optim.SGD([p], lr=1.0)
    p.grad = torch.ones(4, 6)
    p.grad.data = torch.ones(6, 4)
    with pytest.raises(ValueError, match="the parameter's shape"):
        opt.step()


def test_a_mask_survives_a_checkpoint() -> None:
    p = nn.Parameter(torch.ones(40))
    opt = optim.AdamW([p], masks={p: torch.arange(40) < 20})
    p.grad = torch.ones(40)
    opt.step()
    saved = opt.state_dict()
    twin = optim.AdamW([p], lr=1e-3)
    twin.load_state_dict(saved)
    twin.step()
    assert (p.detach()[20:] == 1).all() and (p.detach()[:20] < 1).all()


def test_released_gradients_are_freed() -> None:
    model = nn.Linear(3, 2)
    optim.release_gradients(optim.AdamW(model.parameters()))
    model(torch.ones(3)).sum().backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_a_skipped_step_does_not_count(backend: str) -> None:
    p = nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    opt = optim.AdamW([p], backend=backend)
    opt.found_inf = torch.tensor(1.0)
    opt.step()
    assert p.tolist() == [1.0] * 4 and float(opt.state[p]["step"]) == 0


def test_groups_keep_their_own_rows() -> None:
    """Parameters of one group that joined later stand at earlier steps, in the same launch."""

    def alone(lr: float, steps: int) -> torch.Tensor:
        p = nn.Parameter(torch.zeros(3))
        opt = optim.AdamW([p], lr=lr)
        for k in range(steps):
            p.grad = torch.full((3,), 1.0 + k)
            opt.step()
        return p.detach()

    params = [nn.Parameter(torch.zeros(3)) for _ in range(6)]
    opt = optim.AdamW([{"params": params[:3]}, {"params": params[3:], "lr": 0.5}], lr=0.1)
    for step in range(4):
        for k, p in enumerate(params):
            p.grad = torch.full((3,), 1.0 + step - k % 3) if step >= k % 3 else None
        opt.step()
    for k, p in enumerate(params):
        assert torch.equal(p.detach(), alone(0.5 if k >= 3 else 0.1, 4 - k % 3)), k


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_negative_variance_counts_as_zero(backend: str) -> None:
    """A constant gradient: square_avg - grad_avg² is 0 up to rounding, and below it for some elements."""
    p = nn.Parameter(torch.zeros(2000))
    opt = optim.RMSprop([p], lr=1e-9, alpha=0.9, eps=1e-3, centered=True, backend=backend)
    p.grad = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        opt.step()
    v, m = opt.state[p]["square_avg"], opt.state[p]["grad_avg"]
    assert (v - m * m < 0).any(), "the case does not arise"
    before = p.detach().clone()
    opt.param_groups[0]["lr"] = 1.0
    opt.step()
    v, m = opt.state[p]["square_avg"], opt.state[p]["grad_avg"]
    q = (v - m * m).clamp(min=0)
    assert torch.equal(p.detach(), before - p.grad / (q.double().sqrt().float() + torch.tensor(1e-3)))


def test_lowrank_cpp() -> None:
    for seed in range(40):
        lowrank_fuzz.run_case("cpp", seed)


@pytest.mark.parametrize("seed", [100_001, 100_004])
def test_lowrank_triton(seed: int, quick_calls: None) -> None:
    lowrank_fuzz.run_case("triton", seed, small=True)


def test_lowrank_in_place() -> None:
    for seed in range(12):
        lowrank_fuzz.in_place("cpp", seed)

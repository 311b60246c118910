"""fp64 parity with the published semantics over 40 steps: torch, official packages, and independent implementations of the rest."""

import contextlib
import importlib
import io

import oracles
import pytest
import torch

from fusedadapt.optim import OPTIMIZERS

STEPS, LR, DECAY = 40, 1e-2, 0.1
TORCH = ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "NAdam", "RAdam"]


def gradients(seed: int = 0, n: int = 64) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A start point and gradients over many magnitudes, some zero."""
    gen = torch.Generator().manual_seed(seed)
    p = torch.randn(n, generator=gen, dtype=torch.float64)
    scale = 10 ** torch.linspace(-4, 3, n, dtype=torch.float64)
    grads = [torch.randn(n, generator=gen, dtype=torch.float64) * scale * (torch.rand(n, generator=gen) > 0.1) for _ in range(STEPS)]
    return p, grads


def options(cls: type, chosen: dict) -> dict:
    return {"lr": LR, "weight_decay": DECAY} | chosen


def run_ours(cls: type, chosen: dict, p: torch.Tensor, grads: list[torch.Tensor], before_step=None) -> torch.Tensor:
    param = torch.nn.Parameter(p.clone())
    opt = cls([param], **options(cls, chosen))
    if hasattr(opt, "train"):
        opt.train()
    for t, g in enumerate(grads):
        param.grad = g.clone()
        if before_step:
            before_step(opt, param, t)
        param.grad = g.clone()
        opt.step()
        assert torch.equal(param.grad, g), "the gradient must stay as it was"
    return param.detach()


def assert_same(ours: torch.Tensor, truth: torch.Tensor, start: torch.Tensor, bound: float) -> None:
    """Largest difference relative to how far the parameter travelled."""
    travelled = (truth - start).abs().clamp(min=LR)
    worst = ((ours - truth).abs() / travelled).max().item()
    assert worst <= bound, f"off by {worst:.1e} of the update"


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("name", "k"), [(n, k) for n in TORCH for k in range(len(OPTIMIZERS[n].examples))])
def test_torch(name: str, k: int, maximize: bool) -> None:
    cls, chosen = OPTIMIZERS[name], {**OPTIMIZERS[name].examples[k], "maximize": maximize}
    p, grads = gradients()
    theirs = torch.nn.Parameter(p.clone())
    opt = getattr(torch.optim, name)([theirs], **options(cls, chosen))
    for g in grads:
        theirs.grad = g.clone()
        opt.step()
    # torch keeps NAdam's product of momenta in fp32 even for fp64 parameters
    assert_same(run_ours(cls, chosen, p, grads), theirs.detach(), p, 1e-6 if name == "NAdam" else 1e-10)


ORACLES = {
    "Signum": oracles.signum, "DiffGrad": oracles.diffgrad, "EXAdam": oracles.exadam, "AdEMAMix": oracles.ademamix, "ADOPT": oracles.adopt,
    "Grams": oracles.grams, "AdaBelief": oracles.adabelief, "ScheduleFreeAdamW": oracles.schedule_free,
}  # fmt: skip
DEFAULTS = {"betas": (0.9, 0.999), "eps": 1e-8, "momentum": 0.9}
OWN = {
    "AdEMAMix": {"betas": (0.9, 0.999, 0.9999)}, "ADOPT": {"betas": (0.9, 0.9999), "eps": 1e-6}, "Grams": {"eps": 1e-6},
    "AdaBelief": {"eps": 1e-16},
}  # fmt: skip


@pytest.mark.parametrize(("name", "k"), [(n, k) for n in ORACLES for k in range(len(OPTIMIZERS[n].examples))])
def test_published_equations(name: str, k: int) -> None:
    cls, chosen = OPTIMIZERS[name], OPTIMIZERS[name].examples[k]
    p, grads = gradients()
    given = {k: v for k, v in (DEFAULTS | OWN.get(name, {}) | options(cls, chosen)).items() if name != "AdaBelief" or k != "momentum"}
    assert_same(run_ours(cls, chosen, p, grads), ORACLES[name](p, grads, **given), p, 1e-10)


@pytest.mark.parametrize("k", range(len(OPTIMIZERS["SophiaG"].examples)))
def test_sophia(k: int) -> None:
    chosen = OPTIMIZERS["SophiaG"].examples[k]
    p, grads = gradients()
    _, hessian_grads = gradients(seed=1)

    def refresh(opt, param, t):
        if t % 10 == 0:
            param.grad = hessian_grads[t].clone()
            opt.update_hessian()

    given = {"betas": (0.965, 0.99), "rho": 0.04} | options(None, chosen)
    truth = oracles.sophia(p, grads, hessian_grads=hessian_grads, every=10, bs=5120, **given)
    assert_same(run_ours(OPTIMIZERS["SophiaG"], chosen, p, grads, refresh), truth, p, 1e-10)


@pytest.mark.parametrize("k", range(len(OPTIMIZERS["AdaHessian"].examples)))
def test_adahessian_with_a_given_diagonal(k: int) -> None:
    chosen = OPTIMIZERS["AdaHessian"].examples[k]
    p, grads = gradients()
    _, diagonals = gradients(seed=1)

    def give(opt, param, t):
        param.hessian_diag = diagonals[t].abs()

    given = {"betas": (0.9, 0.999), "eps": 1e-4} | options(None, chosen)
    truth = oracles.adahessian(p, grads, diagonals=diagonals, **given)
    assert_same(run_ours(OPTIMIZERS["AdaHessian"], chosen, p, grads, give), truth, p, 1e-10)


def test_adahessian_estimates_a_quadratic_exactly() -> None:
    """For f = 1/2 sum h p² the diagonal is h whatever the random vector: z H z = h z² = h."""
    h = torch.tensor([1.0, 4.0, 9.0])
    p = torch.nn.Parameter(torch.ones(3))
    opt = OPTIMIZERS["AdaHessian"]([p], lr=0.1)
    (0.5 * (h * p * p).sum()).backward(create_graph=True)
    opt.step()
    assert torch.allclose(opt.state[p]["exp_hessian_diag_sq"], 0.001 * h * h)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        p.grad = torch.ones(3)
        opt.step()


OFFICIAL = {
    "Lion": ("lion_pytorch", "Lion", OPTIMIZERS["Lion"].examples),
    "AdaBelief": ("adabelief_pytorch", "AdaBelief", OPTIMIZERS["AdaBelief"].examples),
    "ScheduleFreeAdamW": ("schedulefree", "AdamWScheduleFree", OPTIMIZERS["ScheduleFreeAdamW"].examples),
}


@pytest.mark.parametrize(("name", "k"), [(n, k) for n, (_, _, examples) in OFFICIAL.items() for k in range(len(examples))])
def test_official_packages(name: str, k: int) -> None:
    package, theirs_name, examples = OFFICIAL[name]
    module = pytest.importorskip(package)
    cls, chosen = OPTIMIZERS[name], examples[k]
    p, grads = gradients()
    theirs = torch.nn.Parameter(p.clone())
    extra = {"print_change_log": False} if name == "AdaBelief" else {}
    with contextlib.redirect_stdout(io.StringIO()):  # adabelief-pytorch prints its options
        opt = getattr(importlib.import_module(module.__name__), theirs_name)([theirs], **options(cls, chosen), **extra)
    if hasattr(opt, "train"):
        opt.train()
    for g in grads:
        theirs.grad = g.clone()
        opt.step()
    assert_same(run_ours(cls, chosen, p, grads), theirs.detach(), p, 1e-10)


def test_schedule_free_modes_round_trip() -> None:
    p, grads = gradients()
    param = torch.nn.Parameter(p.clone())
    opt = OPTIMIZERS["ScheduleFreeAdamW"]([param], lr=LR)
    param.grad = grads[0]
    with pytest.raises(RuntimeError, match=r"train\(\)"):
        opt.step()
    opt.train()
    for g in grads[:5]:
        param.grad = g
        opt.step()
    y = param.detach().clone()
    opt.eval()
    assert not torch.equal(param, y)
    opt.train()
    assert torch.allclose(param, y, rtol=1e-12)

"""Options in every form that torch and the official codes take them in, and their way through checkpoints."""

import math

import numpy as np
import oracles
import pytest
import torch
from samples import feed, model

from fusedadapt.optim import OPTIMIZERS, SGD, AdamW, Lion, from_torch, to_torch
from fusedadapt.optim.options import clip_factor
from fusedadapt.optim.plans import Scalars


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


@pytest.mark.parametrize("back", [False, True])
def test_a_group_added_after_the_change_takes_the_old_defaults(back: bool) -> None:
    """They were those of the class: a group added to a run at lr 0.5 learned at 0.001."""
    params, late = model(), torch.nn.Parameter(torch.ones(3))
    opt = from_torch(torch.optim.AdamW(params, lr=0.5, betas=(0.5, 0.6), maximize=True))
    opt = to_torch(opt) if back else opt
    opt.add_param_group({"params": [late]})
    added = opt.param_groups[1]
    assert (added["lr"], added["betas"], added["maximize"]) == (0.5, (0.5, 0.6), True)
    assert from_torch(torch.optim.AdamW(params, maximize=True), maximize=False).defaults["maximize"] is False


@pytest.mark.parametrize("start", ["plain steps", "torch's None"])
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_switched_on_late_starts_with_the_gradient(start: str, dampening: float) -> None:
    """torch's first step of a buffer copies the gradient, undamped, whatever came before."""
    params, twin = model(), model()
    ours, theirs = SGD(params, lr=0.1), torch.optim.SGD(twin, lr=0.1)
    for t in range(6):
        if t == 3:
            if start == "torch's None":  # as torch up to 2.7 saved it
                ours.load_state_dict(theirs.state_dict() | {"state": {i: {"momentum_buffer": None} for i in range(3)}})
            for opt in (ours, theirs):
                opt.param_groups[0].update(momentum=0.9, dampening=dampening)
        feed(params, t), feed(twin, t)
        ours.step(), theirs.step()
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "options"), [("RMSprop", {"alpha": 1.0}), ("Adadelta", {"rho": 1.0}), ("RMSprop", {"alpha": 1.0, "momentum": 0.9})])
def test_averages_may_stand_still(name: str, options: dict) -> None:
    params, twin = ([torch.nn.Parameter(p.detach().double()) for p in model()] for _ in range(2))
    ours, theirs = OPTIMIZERS[name](params, lr=1e-6, **options), getattr(torch.optim, name)(twin, lr=1e-6, **options)
    for t in range(3):
        feed(params, t), feed(twin, t)
        ours.step(), theirs.step()
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=0.0)
    Lion(model(), betas=(1.0, 1.0))


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float64, None), (torch.float32, "reference"), (torch.float32, "cpp"), (torch.float32, "emulated")]
)
@pytest.mark.parametrize("betas", [(0.0, 0.99, 0.5), (1e-4, 0.99, 0.0), (0.03, 0.99, 0.01), (0.3, 0.99, 0.9999)], ids=str)
def test_ademamix_warms_beta3_up_from_any_beta(betas: tuple, dtype: torch.dtype, backend: str | None) -> None:
    """Half-lives are inverted by a series, which was right for betas from a half on: below 0.05 the slow momentum exploded."""
    p = torch.nn.Parameter(model()[0].detach().to(dtype))
    start = p.detach().to(torch.float64, copy=True)
    opt = OPTIMIZERS["AdEMAMix"]([p], lr=0.01, betas=betas, beta3_warmup=20, backend=backend)
    grads = []
    for t in range(24):
        feed([p], t)
        grads.append(p.grad.double())
        opt.step()
    truth = oracles.ademamix(start, grads, lr=0.01, betas=betas, eps=1e-8, weight_decay=0, beta3_warmup=20)
    torch.testing.assert_close(p.detach().double(), truth, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("beta3", [1 - 1e-8, 1 - 1e-12])
def test_ademamix_takes_a_beta3_next_to_one(beta3: float) -> None:
    """A logarithm of 1 was divided by."""
    opt = OPTIMIZERS["AdEMAMix"](params := model(), betas=(0.9, 0.999, beta3), beta3_warmup=10)
    for t in range(12):
        feed(params, t)
        opt.step()
    assert all(p.isfinite().all() for p in params)


def test_adagrad_has_all_its_states_as_torchs() -> None:
    """torch starts a state it does not find at the value its constructor was given, not at the group's."""
    params, twin = model(), model()
    ours, alone = OPTIMIZERS["Adagrad"](params, initial_accumulator_value=0.5), torch.optim.Adagrad(twin, initial_accumulator_value=0.5)
    for t, opt in enumerate((ours, torch.optim.Adagrad(params))):
        if t:
            opt.load_state_dict(ours.state_dict())
        feed(params, t), feed(twin, t)
        if t == 0:
            params[1].grad = twin[1].grad = None
        opt.step(), alone.step()
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p, q)
    ours.share_memory()
    assert len(ours.state) == 3 and all(v.is_shared() for s in ours.state.values() for v in s.values())
    ours.step()


@pytest.mark.parametrize("option", [{"max_grad_norm": 1.0}, {"stochastic_rounding": True}], ids=str)
def test_options_torch_lacks_do_not_go_there_without_a_word(option: dict) -> None:
    with pytest.raises(ValueError, match=f"to_torch: expected .*got {next(iter(option))}="):
        to_torch(AdamW(model(), **option))


@pytest.mark.parametrize("square", [0.0, 1e-300, 0.25, 0.489999, 7.3, 1e30, math.inf, math.nan])
def test_the_factor_of_clipping_is_torchs(square: float) -> None:
    total = torch.tensor(square, dtype=torch.float64)
    norm, factor = clip_factor(total, 0.7)
    expected = (0.7 / (total.sqrt() + 1e-6)).clamp(max=1.0)
    assert norm.dtype == factor.dtype == torch.float64
    assert torch.equal(torch.stack([norm, factor]).nan_to_num(-1.0), torch.stack([total.sqrt(), expected]).nan_to_num(-1.0))


def test_fp64_is_clipped_in_fp64() -> None:
    """The factor was rounded to fp32."""
    params, twin = ([torch.nn.Parameter(p.detach().double()) for p in model()] for _ in range(2))
    ours, theirs = SGD(params, lr=0.1, max_grad_norm=0.1), torch.optim.SGD(twin, lr=0.1)
    feed(params, 0), feed(twin, 0)
    norm = torch.nn.utils.clip_grad_norm_(twin, 0.1)
    ours.step(), theirs.step()
    torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-14, atol=0.0)
    for p, q in zip(params, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("scale", [None, 4.0])
def test_sums_of_squares_do_not_depend_on_their_neighbours(scale: float | None) -> None:
    """Several gradients are read side by side, some of which end before the others (each in one chunk here: their size goes by the total)."""
    gen = torch.Generator().manual_seed(0)
    sizes = [(1, torch.float32), (1999, torch.float32), (0, torch.float32), (63, torch.bfloat16), (64, torch.float32), (65, torch.float16), (2048,
             torch.float32), (2000, torch.bfloat16), (17, torch.float32)]  # fmt: skip
    params = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in sizes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)

    def squares(tensors: list) -> list[float]:
        opt = SGD(tensors, backend="cpp")
        plan = opt._current_plans()[0]
        plan.prepare()
        return plan.squares(Scalars(None if scale is None else torch.tensor(scale), None, None, 0, False)).tolist()

    together = squares(params)
    assert together == [squares([p])[0] for p in params] and together[::-1] == squares(params[::-1])
    exact = [(p.grad.double() / (scale or 1.0)).square().sum() for p in params]
    torch.testing.assert_close(torch.tensor(together, dtype=torch.float64), torch.stack(exact), rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"AdaHessian"}))  # whose gradients need a graph; the check is the same
def test_frozen_packed_weights_are_left_alone(name: str) -> None:
    """`model.parameters()` of a quantized model with an adapter: torch takes the bytes too, which never have a gradient."""
    packed = torch.nn.Parameter(torch.arange(64, dtype=torch.uint8), requires_grad=False)
    p = torch.nn.Parameter(torch.ones(8))
    twin = torch.nn.Parameter(torch.ones(8))
    opt, alone = OPTIMIZERS[name]([packed, p], lr=0.1), OPTIMIZERS[name]([twin], lr=0.1)
    for each, q in ((opt, p), (alone, twin)):
        if name == "ScheduleFreeAdamW":
            each.train()
        q.square().sum().backward()
        each.step()
    assert torch.equal(p, twin) and torch.equal(packed, torch.arange(64, dtype=torch.uint8))
    opt.load_state_dict(opt.state_dict())
    p.grad = None
    packed.grad = packed.detach().clone()
    with pytest.raises(ValueError, match="uint8"):
        opt.step()
    assert torch.equal(p, twin)


# --- Hessians under a GradScaler, refused ones; averages that would be lost ------------------------------------------------------------------


def test_adahessian_unscales_the_hessian() -> None:
    """The estimate came from the scaled loss: at a scale of 1,024 the step was that much too small."""
    after = []
    for scale in (None, 1024.0):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        opt = OPTIMIZERS["AdaHessian"](net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for t in range(3):
            torch.manual_seed(t)
            opt.zero_grad()
            scaler.scale(net(torch.randn(8, 3)).square().mean()).backward(create_graph=True)
            torch.manual_seed(t)
            scaler.step(opt)
            scaler.update()
        after.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(after[1], after[0], rtol=1e-5, atol=1e-6)


def test_a_refused_step_leaves_no_hessian_behind() -> None:
    """The next step took it for one the caller had set, though its gradients were others."""
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = OPTIMIZERS["AdaHessian"]([p, q])
    for t in range(2):
        opt.zero_grad()
        (p.square().sum() + q.square().sum()).backward(create_graph=True)
        if t:
            opt.state[q]["exp_avg"] = torch.zeros(4)
            with pytest.raises(ValueError, match="exp_avg of parameter 1"):
                opt.step()
        else:
            opt.step()
    assert not hasattr(p, "hessian_diag") and not hasattr(q, "hessian_diag") and "hessian_diag" not in opt.state[p]


@pytest.mark.parametrize("given", [2.0, torch.ones(4), torch.ones(3, 3), torch.ones(3, dtype=torch.int64), torch.ones(3).to_sparse()])
def test_a_diagonal_that_does_not_fit_is_named(given: object) -> None:
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = OPTIMIZERS["AdaHessian"]([p, q])
    p.grad, q.grad, p.hessian_diag, q.hessian_diag = torch.ones(3), torch.ones(3), torch.ones(1), given
    with pytest.raises(ValueError, match="hessian_diag of parameter 1 of group 0"):
        opt.step()
    assert not opt.state_dict()["state"] and torch.equal(p.detach(), torch.ones(3))
    q.hessian_diag = torch.ones(())
    opt.step()
    assert torch.equal(p, q) and not hasattr(p, "hessian_diag")


def test_the_hessian_of_frozen_elements_stands_still() -> None:
    """``update_hessian`` forgot masks: dense states were not what compact ones are."""
    p, q = (torch.nn.Parameter(model()[0].detach().T.contiguous().T) for _ in range(2))
    keep = torch.arange(p.numel()).view(p.shape) % 3 > 0
    dense, compact = (OPTIMIZERS["SophiaG"]([x], masks={x: keep}, mask_state=form) for x, form in ((p, "dense"), (q, "compact")))
    for t in range(3):
        for opt, x in ((dense, p), (compact, q)):
            feed([x], t)
            opt.update_hessian()
            opt.step()
    h = dense.state[p]["hessian"]
    assert (h[~keep] == 0).all() and (h[keep] > 0).all() and torch.equal(p, q)
    assert torch.equal(h.T.flatten()[keep.T.flatten()], compact.state[q]["hessian"])


def test_schedule_free_needs_a_momentum() -> None:
    """At 0 the parameters hold z, from which the average does not come back: eval() divided by zero after the training."""
    with pytest.raises(ValueError, match=r"betas\[0\] in \(0, 1\)"):
        OPTIMIZERS["ScheduleFreeAdamW"](model(), betas=(0.0, 0.9))

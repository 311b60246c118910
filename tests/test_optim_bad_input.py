"""Memory layouts a step must handle, and bad input: one clear error that names the tensor, and nothing changed."""

from collections import UserDict

import pytest
import torch
from samples import feed, model, snapshot, unchanged

import fusedadapt as fa
from fusedadapt.optim import OPTIMIZERS, AdaBelief, Adam, AdamW, Lion
from fusedadapt.optim import state as states

# --- layouts -----------------------------------------------------------------------------------------------------------------------------


def test_gradient_in_another_memory_order() -> None:
    """torch's fused CPU AdamW is silently wrong here; the gradient must be read by index, not by position in memory."""
    base = torch.randn(32, 64)
    p, q = torch.nn.Parameter(base.t().contiguous().t()), torch.nn.Parameter(base.clone())
    assert p.stride() != q.stride()
    a, b = AdamW([p]), AdamW([q])
    for t in range(3):
        g = torch.randn(32, 64, generator=torch.Generator().manual_seed(t))
        p.grad, q.grad = g, g.clone()
        a.step(), b.step()
    assert torch.equal(p, q)
    assert "copied" in fa.explain(a)[0][2]


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 7, 1, 3)])
def test_channels_last(shape: tuple) -> None:
    base = torch.randn(shape)
    p, q = torch.nn.Parameter(base.to(memory_format=torch.channels_last)), torch.nn.Parameter(base.clone())
    mask = torch.rand(shape) < 0.5
    a, b = AdamW([p], masks={p: mask}), AdamW([q], masks={q: mask})
    for _ in range(2):
        p.grad = q.grad = torch.randn(shape)
        a.step(), b.step()
    assert torch.equal(p, q)


def test_misaligned_views_and_neighbours() -> None:
    for offset in range(1, 5):
        storage = torch.full((100,), 7.0)
        p = torch.nn.Parameter(storage[offset : offset + 33])
        q = torch.nn.Parameter(torch.full((33,), 7.0))
        p.grad = q.grad = torch.linspace(-1, 1, 33)
        AdamW([p]).step(), AdamW([q]).step()
        assert torch.equal(p, q)
        assert (storage[:offset] == 7).all() and (storage[offset + 33 :] == 7).all()


# --- bad input: one clear error, nothing changed -----------------------------------------------------------------------------------------


def broken(kind: str, params: list, opt) -> None:
    p = params[1]
    if kind == "sparse gradient":
        p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([1.0]), (33,))
    elif kind == "state shape":
        opt.state[p]["exp_avg"] = torch.zeros(5)
    elif kind == "state dtype":
        opt.state[p]["exp_avg"] = torch.zeros(33, dtype=torch.int64)
    elif kind == "strided parameter":
        p.data = torch.zeros(66)[::2]
        p.grad = torch.ones(33)
    elif kind == "step dtype":
        opt.state[p]["step"] = torch.zeros((), dtype=torch.int64)
    elif kind == "overlap":
        p.data = params[0].data.view(-1)[:33]
    elif kind == "nan lr":
        opt.param_groups[0]["lr"] = float("nan")
    elif kind == "beta":
        opt.param_groups[0]["betas"] = (0.9, 1.0)


@pytest.mark.parametrize("kind", ["sparse gradient", "state shape", "state dtype", "strided parameter", "step dtype", "overlap", "nan lr", "beta"])
def test_bad_input_is_refused_before_anything_changes(kind: str) -> None:
    params = [torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.randn(33))]
    opt = AdamW([("first", params[0]), ("second", params[1])])
    feed(params, 0)
    opt.step()
    feed(params, 1)
    broken(kind, params, opt)
    before = params[0].detach().clone(), opt.state[params[0]]["exp_avg"].clone(), float(opt.state[params[0]]["step"])
    with pytest.raises(ValueError, match=r"AdamW.*expected .*got|overlaps"):
        opt.step()
    assert torch.equal(before[0], params[0]) and torch.equal(before[1], opt.state[params[0]]["exp_avg"])
    assert float(opt.state[params[0]]["step"]) == before[2]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("state", [UserDict(), None, [1]], ids=str)
def test_a_state_that_is_no_dict_is_named(state: object, backend: str) -> None:
    """A UserDict was a SystemError."""
    params = model()
    opt = AdamW(params, backend=backend)
    feed(params, 0)
    opt.step()
    before = [p.detach().clone() for p in params]
    kept, opt.state[params[1]] = opt.state[params[1]], state
    with pytest.raises(ValueError, match="AdamW: expected the state of parameter 1 of group 0 as a dict; got"):
        opt.step()
    assert all(torch.equal(a, p) for a, p in zip(before, params, strict=True))
    opt.state[params[1]] = kept
    opt.step()


@pytest.mark.parametrize("given", [None, "weight"])
def test_what_is_no_parameter_is_named(given: object) -> None:
    params = model()
    opt = AdamW(params)
    opt.param_groups[0]["params"].append(given)
    with pytest.raises(ValueError, match=f"AdamW: expected tensors in param_groups; got {given!r} as parameter 3 of group 0"):
        opt.step()


def test_errors_name_the_tensor() -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    opt = AdamW([("encoder.weight", p)])
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([1.0]), (4,))
    with pytest.raises(ValueError, match="encoder.weight"):
        opt.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdamW([p], lr=-1.0), "lr .*>= 0"),
        (lambda p: AdamW([p], betas=(1.0, 0.9)), "beta1"),
        (lambda p: AdamW([p], betas=(0.9,)), "betas as a tuple of 2"),  # the second was 0 without a word
        (lambda p: AdamW([p], betas=(0.9, 0.99, 0.999)), "betas as a tuple of 2"),
        (lambda p: AdamW([p], betas=None), "betas as a tuple of 2"),
        (lambda p: OPTIMIZERS["AdEMAMix"]([p], betas=(0.9, 0.99)), "betas as a tuple of 3"),
        (lambda p: OPTIMIZERS["AdEMAMix"]([p], betas=(-0.5, 0.9, 0.99)), "beta1 in"),  # half-lives were taken of what was not checked yet
        (lambda p: OPTIMIZERS["AdEMAMix"]([p], betas=(0.5, 0.9, "x")), "beta3 to be a finite number"),
        (lambda p: AdamW([p], eps=float("nan")), "eps"),
        (lambda p: AdamW([p], weight_decay=-0.1), "weight_decay"),
        (lambda p: OPTIMIZERS["ScheduleFreeAdamW"]([p], weight_decay=-0.1), "weight_decay >= 0"),  # it alone took it
        (lambda p: AdamW([p], weight_decay="0.1"), "weight_decay to be a finite number"),
        (lambda p: AdamW([p], lr="1e-3"), "lr to be a finite number"),  # a YAML file's; it was read as a number, and schedulers then failed on it
        (lambda p: AdamW([p], betas=(torch.tensor([0.9, 0.9]), 0.99)), "beta1 to be a finite number"),
        (lambda p: AdamW([p], differentiable=True), "differentiable"),
        (lambda p: AdamW([p], backend="typo"), "AdamW backend: expected one of reference, cpp, triton, cuda; got 'typo'"),  # the first step said so
        (lambda p: AdamW([p], backend=3), "AdamW backend"),
        (lambda p: AdamW([p], seed=-1), "seed to be an integer from 0"),  # the first step failed in C++
        (lambda p: AdamW([p], seed=2**64), "seed to be an integer from 0"),
        (lambda p: AdamW([{"params": [p], "seed": 1.0}]), "seed to be an integer from 0"),
        (lambda p: AdamW([{"params": [p], "seed": 3}, {"params": [torch.ones(4)], "seed": 4}], stochastic_rounding=True), "one seed for all groups"),
        (lambda p: AdamW([p], max_grad_norm=0.0), "max_grad_norm"),
        (lambda p: AdamW([p], state_dtype="int3"), "state_dtype"),
        (lambda p: AdamW([p], masks={p: torch.ones(3, dtype=torch.bool)}), "mask"),
        (lambda p: AdamW([p], masks={torch.nn.Parameter(torch.ones(2)): torch.ones(2, dtype=torch.bool)}), "masks"),
        (lambda p: AdamW([p], masks=[torch.ones(4, dtype=torch.bool)]), "masks as a dict"),
        (lambda p: AdamW([("w", p)], masks={"w": torch.ones(4, dtype=torch.bool)}), "'w' as a key"),
        (lambda p: AdamW([p], masks={p: [True] * 4}), "got list"),
        (lambda p: Adam([torch.nn.Parameter(p.detach() + 0j)]), "real parameters"),
        (lambda p: AdamW([torch.nn.Parameter(p.detach().half())]), "fp16"),
        (lambda p: AdamW([torch.nn.Parameter(p.detach().half())], state_dtype="fp32", master_weights="split"), "bf16 parameters"),
        (lambda p: OPTIMIZERS["SGD"]([p], nesterov=True), "nesterov"),
        (lambda p: OPTIMIZERS["NAdam"]([p], momentum_decay=-1.0), "momentum_decay >= 0"),
        (lambda p: OPTIMIZERS["RMSprop"]([p], alpha=1.5), r"alpha in \[0, 1\]"),  # it was called beta2
        (lambda p: OPTIMIZERS["Adadelta"]([p], rho=-0.5), r"rho in \[0, 1\]"),
        (lambda p: AdamW([{"params": [p], "differentiable": True}]), "differentiable=False"),  # of a group, or a loaded one: was ignored
        (lambda p: AdamW([{"params": [p], "max_grad_norm": 1.0}]), "max_grad_norm for the whole optimizer"),  # was ignored
        (lambda p: AdamW([{"params": [p], "state_dtype": "int8"}]), "state_dtype for the whole optimizer"),
        (lambda p: fa.optim.from_torch(torch.optim.Adam([p], differentiable=True)), "differentiable=False"),
    ],
)
def test_bad_options(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(torch.nn.Parameter(torch.ones(2, 2)))


def test_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="momentum"):
        Lion([torch.nn.Parameter(torch.ones(2))], momentum=0.9)


def test_foreign_state_dicts_are_refused() -> None:
    params = model()
    opt = AdamW(params)
    feed(params, 0)
    opt.step()
    before = snapshot(params, opt)
    sgd = torch.optim.SGD(model(), momentum=0.9)
    other = AdamW(model()[:2])
    belief = AdaBelief(model())
    feed(belief.param_groups[0]["params"], 0)
    belief.step()
    shapes = AdamW([torch.nn.Parameter(torch.zeros(2)) for _ in range(3)])
    feed(shapes.param_groups[0]["params"], 0)
    shapes.step()
    for saved in (sgd.state_dict(), other.state_dict(), belief.state_dict(), shapes.state_dict(), {"state": {}}):
        with pytest.raises(ValueError, match="load_state_dict"):
            opt.load_state_dict(saved)
        assert unchanged(before, params, opt)
    for cls in (Lion, OPTIMIZERS["SophiaG"], OPTIMIZERS["RAdam"], OPTIMIZERS["Grams"]):  # their options and states are all there, and more
        with pytest.raises(ValueError, match="another rule"):
            cls(model()).load_state_dict(opt.state_dict())
    own = Lion([{"params": params, "eps": 1.0, "mine": 2}])  # a group may carry what it likes
    own.load_state_dict(own.state_dict())


def test_parameters_without_values_are_refused() -> None:
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    opt = AdamW([p])
    p.grad = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match="meta device"):
        opt.step()


def test_empty_optimizer_states() -> None:
    params = model()
    opt = AdamW(params)
    opt.step()
    assert opt.state_dict()["state"] == {}
    empty = torch.nn.Parameter(torch.zeros(0, 4))
    empty.grad = torch.zeros(0, 4)
    alone = AdamW([empty], max_grad_norm=1.0)
    alone.step()
    assert int(alone.state[empty]["step"]) == 1 and alone.grad_norm == 0


def test_out_of_memory_leaves_no_half_state(monkeypatch: pytest.MonkeyPatch) -> None:
    params = model()
    opt = AdamW(params)
    feed(params, 0)
    real, calls = states.Arena.full_like, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("out of memory")
        return real(*args, **kwargs)

    before = [p.detach().clone() for p in params]
    monkeypatch.setattr(states.Arena, "full_like", failing)
    with pytest.raises(torch.OutOfMemoryError):
        opt.step()
    monkeypatch.undo()
    assert all(torch.equal(a, p) for a, p in zip(before, params, strict=True)) and not opt.state_dict()["state"]
    opt.step()
    twin = model()
    clean = AdamW(twin)
    feed(twin, 0)
    clean.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twin, strict=True))


@pytest.mark.parametrize("backend", ["cpp", "emulated"])
def test_a_tensor_lr_elsewhere_is_refused_in_any_group(backend: str) -> None:
    """The host sends 0 in place of a learning rate that lives on a device: a group that is then forgotten would stand still silently."""
    params = model()
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": torch.tensor(0.1, device="meta")}]
    opt = AdamW(groups, lr=0.01, backend=backend)
    feed(params, 0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="Tensor lr of group 1"):
        opt.step()
    assert all(torch.equal(a, p) for a, p in zip(before, params, strict=True))
    with pytest.raises(ValueError, match="Tensor lr of group 1"):
        opt.step_one_(params[2])


@pytest.mark.parametrize("master", [None, "split"])
def test_a_model_converted_after_its_optimizer_was_built(master: str | None) -> None:
    """``model.half()`` goes round the check of the constructor: the first step gave fp16 states, or no master weight, without a word."""
    layer = torch.nn.Linear(4, 3)
    opt = AdamW(layer.parameters(), master_weights=master, state_dtype="fp32" if master else None)
    layer.half()
    feed(list(layer.parameters()), 0)
    before = [p.detach().clone() for p in layer.parameters()]
    with pytest.raises(ValueError, match="master_weights" if master else "state dtype for the fp16 parameter parameter 0 of group 0"):
        opt.step()
    assert all(torch.equal(a, p) for a, p in zip(before, layer.parameters(), strict=True)) and not opt.state_dict()["state"]

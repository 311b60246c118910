"""Whatever happens to a tensor between two steps is seen by the next one, whichever way the table reads: the words of a torch tensor, or DLPack."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_optim_process import in_fork
from torch import Tensor, nn

from fusedadapt import _core, dispatch
from fusedadapt.ops import shim
from fusedadapt.optim import SGD, AdamW

PATHS = ("shim", "dlpack")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "dlpack":
        monkeypatch.setattr(shim, "shim", lambda: None)
    elif shim.shim() is None:
        pytest.skip("this torch has no functions to read with")
    return request.param


def make(n: int = 3, shape: tuple[int, ...] = (4, 6), **options: Any) -> tuple[AdamW, list[nn.Parameter]]:
    gen = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=gen)) for _ in range(n)]
    for p in params:
        p.grad = torch.randn(shape, generator=gen)
    opt = AdamW(params, lr=0.1, **options)
    opt.step()
    opt.step()
    return opt, params


def tensor(opt: AdamW, p: nn.Parameter, which: str) -> Tensor:
    found = p if which == "param" else p.grad if which == "grad" else opt.state[p][which]
    assert found is not None
    return found


def move(t: Tensor) -> None:
    t.data = t.data.clone()


def set_(t: Tensor) -> None:
    with torch.no_grad():
        t.set_(t.detach().clone())


def swap(t: Tensor) -> None:
    torch.utils.swap_tensors(t, type(t)(t.detach().clone()) if type(t) is nn.Parameter else t.clone())


def grow_storage(t: Tensor) -> None:
    t.untyped_storage().resize_(1 << 20)


MOVES: tuple[Callable[[Tensor], None], ...] = (move, set_, swap, grow_storage)


@pytest.mark.parametrize("which", ["param", "grad", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("change", MOVES, ids=lambda f: f.__name__)
def test_moved_memory_is_found(path: str, which: str, change: Callable[[Tensor], None]) -> None:
    opt, params = make()
    twin, theirs = make()
    p = params[1]
    grad = p.grad
    if change is swap and which == "grad":
        grad = grad.clone()  # torch refuses to swap a tensor that another one holds
    else:
        change(tensor(opt, p, which))
    p.grad = grad  # swap_tensors takes it away
    old = torch.full_like(p, 7.0)  # takes the freed memory, if any
    for o in (opt, twin):
        o.step()
    assert (old == 7).all()
    assert all(torch.equal(a, b) for a, b in zip(params, theirs, strict=True))
    assert all(torch.equal(opt.state[a][k], twin.state[b][k]) for a, b in zip(params, theirs, strict=True) for k in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("which", ["param", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize(
    "change",
    [lambda t: t.view(6, 4), lambda t: t.view(24), lambda t: t[:2], lambda t: t.view(torch.int32), lambda t: t.double(), lambda t: t.to("meta"),
     lambda t: t.as_strided((4, 6), (1, 4)), lambda t: t[:0]],
    ids=["reshaped", "flattened", "shortened", "integers", "fp64", "meta", "strides", "emptied"],
)  # fmt: skip
def test_a_tensor_that_no_longer_fits_is_refused(path: str, which: str, change: Callable[[Tensor], Tensor]) -> None:
    """Most of these keep the address: shape, strides and dtype must be read, too."""
    opt, params = make()
    t = tensor(opt, params[1], which)
    before = [p.detach().clone() for p in params]
    try:
        t.data = change(t.data)
    except RuntimeError:
        return  # torch itself refuses
    with pytest.raises(ValueError):
        opt.step()
    assert all(torch.equal(p, b) for k, (p, b) in enumerate(zip(params, before, strict=True)) if k != 1)


@pytest.mark.parametrize("which", ["exp_avg", "exp_avg_sq"])
def test_another_state_object_is_found(path: str, which: str) -> None:
    opt, params = make()
    old = opt.state[params[1]][which]
    kept = old.clone()
    opt.state[params[1]][which] = new = old.clone()
    opt.step()
    assert torch.equal(old, kept) and not torch.equal(new, kept)


@pytest.mark.parametrize("change", [lambda g: g.to_sparse(), lambda g: g.view(6, 4), lambda g: g.double(), lambda g: g.to("meta")])
@pytest.mark.parametrize("same_object", [False, True])
def test_a_gradient_that_does_not_fit_is_refused(path: str, change: Callable[[Tensor], Tensor], same_object: bool, capfd) -> None:
    opt, params = make()
    p = params[1]
    assert p.grad is not None
    new = change(p.grad)
    if same_object and new.layout == torch.strided and new.device == p.device:
        p.grad.data = new
    elif new.shape == p.shape and new.dtype == p.dtype and new.device == p.device:
        p.grad = new
    else:
        pytest.skip("torch forbids it")
    with pytest.raises(ValueError):
        opt.step()
    assert "aoti" not in capfd.readouterr().err


def test_gradients_come_and_go(path: str) -> None:
    """Enough tensors for several threads."""
    opt, params = make(3000, (3,))
    twin, theirs = make(3000, (3,), backend="reference")
    for t in range(3):
        for k, (p, q) in enumerate(zip(params, theirs, strict=True)):
            g = None if k % 7 == t else torch.full((3,), float(k))
            p.grad, q.grad = g, None if g is None else g.clone()
        opt.step()
        twin.step()
        assert len(opt._plans[0].table.active) == sum(k % 7 != t for k in range(3000))
    torch.testing.assert_close(torch.stack(list(params)), torch.stack(list(theirs)), rtol=0, atol=0)


def test_versions_advance_by_one(path: str) -> None:
    opt, params = make()
    before = [p._version for p in params]
    opt.step()
    assert [p._version - v for p, v in zip(params, before, strict=True)] == [1, 1, 1]
    assert opt._plans[0].table.bump_versions(1) == (path == "shim"), "not the path under test"


def test_an_inference_tensor_has_no_version(path: str) -> None:
    with torch.inference_mode():
        p = torch.ones(3)
    q = nn.Parameter(torch.ones(3))
    opt = SGD([q], lr=1.0)
    q.grad = torch.ones(3)
    opt.step()
    q.data = p
    opt.step()
    assert p.tolist() == [0.0] * 3


def test_reading_holds_no_tensor(path: str) -> None:
    opt, params = make()
    assert params[0]._use_count() == 1 and opt.state[params[0]]["exp_avg"]._use_count() == 1
    gone = [weakref.ref(p) for p in params]
    del opt, params
    gc.collect()
    assert all(r() is None for r in gone)


def test_groups_loads_and_copies(path: str) -> None:
    opt, params = make()
    more = nn.Parameter(torch.ones(5))
    more.grad = torch.ones(5)
    opt.add_param_group({"params": [more]})
    opt.step()
    twin = copy.deepcopy(opt)
    opt.load_state_dict(twin.state_dict())
    theirs = [p for g in twin.param_groups for p in g["params"]]
    for p, q in zip([*params, more], theirs, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    opt.step()
    twin.step()
    assert all(torch.equal(p, q) for p, q in zip([*params, more], theirs, strict=True))


def test_a_forked_child_reads_too(path: str) -> None:
    opt, params = make(600)

    def child() -> bytes:
        params[0].data = params[0].data.clone()
        opt.step()
        return str([round(p.sum().item(), 4) for p in params]).encode()

    out = in_fork(child)
    opt.step()
    assert out == str([round(p.sum().item(), 4) for p in params]).encode()


class Renamed(nn.Parameter):
    """A type with a gradient of its own."""

    own = torch.full((3,), 2.0)

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        return self.own

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        raise AssertionError("read only")


def test_a_type_that_overrides_grad_is_asked(path: str) -> None:
    p = Renamed(torch.zeros(3))
    opt = SGD([p], lr=1.0)
    for _ in range(3):
        opt.step()
    assert p.tolist() == [-6.0] * 3


def test_a_torch_without_the_functions_is_read_through_dlpack(caplog: pytest.LogCaptureFixture) -> None:
    class Core:
        SHIM_NAMES = (*_core.SHIM_NAMES[:-1], "no_such_function")
        Shim = _core.Shim

    with caplog.at_level(logging.WARNING):
        assert shim._make(Core) is None

    class Wrong(Core):
        SHIM_NAMES = _core.SHIM_NAMES[1:]

    assert shim._make(Wrong) is None


def test_inference_mode_at_the_first_step(path: str) -> None:
    """The functions are looked for at the first step, wherever that happens; parameters made there step, too."""
    core = dispatch.core()
    with torch.inference_mode():
        assert path == "dlpack" or shim._make(core) is not None
        _, params = make()
    assert all(torch.equal(p, q) for p, q in zip(params, make()[1], strict=True))


def test_words_that_do_not_tell_are_not_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    core = dispatch.core()
    if shim.shim() is None:
        pytest.skip("this torch has no functions to read with")
    examples = shim._examples()
    same, other = examples
    for wrong in ((same, [*other, same[1]]), ([*same, other[-3]], other), ([t.flatten() for t in same], other)):
        monkeypatch.setattr(shim, "_examples", lambda wrong=wrong: wrong)
        assert shim._make(core) is None


@pytest.mark.skipif(not hasattr(torch, "_lazy_clone"), reason="this torch has no lazy copies")
@pytest.mark.parametrize("which", ["param", "exp_avg"])
def test_a_lazy_copy_keeps_its_values(path: str, which: str) -> None:
    opt, params = make()
    opt.step()
    t = tensor(opt, params[0], which).detach()
    copy_, before = torch._lazy_clone(t), t.clone()
    opt.step()
    assert not torch.equal(t, before)
    if path == "shim":  # not DLPack, whose exchange table hands out the shared memory itself
        assert torch.equal(copy_, before)


@pytest.mark.parametrize("shape", [(4, 6), (2, 1, 2, 1, 2, 3)])
@pytest.mark.parametrize("flips", [(0,), (2,), (0, 1, 2), (1, 3)])
def test_a_gradient_stored_as_its_negative_is_read_right(path: str, flips: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """The imaginary part of a conjugate is such a view: memory holds the negatives."""
    (opt, params), (twin, others) = make(shape=shape), make(shape=shape)
    for step in range(4):
        for p, q in zip(params, others, strict=True):
            grad = torch.full_like(p, float(step + 1))
            p.grad = torch._neg_view(-grad) if step in flips else grad
            q.grad = grad.clone()
        opt.step()
        twin.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    params[0].data = torch._neg_view(params[0].data.clone())
    with pytest.raises(ValueError, match="resolve_neg"):
        opt.step()

"""Optimizers among processes, threads, compilers, scalers, schedulers and hooks."""

from __future__ import annotations

import multiprocessing
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fusedadapt import optim
from fusedadapt.optim import AdaBelief, AdamW, Lion

SIZE = 200_000  # several chunks: the pool has work to hand out


def make(cls: Any = AdamW, seed: int = 0, size: int = SIZE, **options: Any) -> tuple[Any, list[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(n, generator=g)) for n in (size, 7, 3000)]
    for p in params:
        p.grad = torch.randn(p.shape, generator=g)
    return cls(params, lr=0.01, weight_decay=0.1, **options), params


def stepped(steps: int = 3, **options: Any) -> list[Tensor]:
    opt, params = make(**options)
    for _ in range(steps):
        opt.step()
    return [p.detach() for p in params]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x.detach(), y.detach()) for x, y in zip(a, b, strict=True))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- forks -------------------------------------------------------------------------------------------------------------------------------


def in_fork(body: Any, seconds: float = 30) -> bytes:
    """What ``body()`` returns in a forked child; fails if the child hangs."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(False)
    child = context.Process(target=lambda: send.send_bytes(body()))
    child.start()
    send.close()
    try:
        assert receive.poll(seconds), "the forked child hangs"
        return receive.recv_bytes()
    except EOFError:
        child.join(5)
        return f"died with exit code {child.exitcode}".encode()
    finally:
        child.join(5)
        if child.is_alive():
            child.kill()


def as_bytes(params: list[Tensor]) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in params)


def test_a_forked_child_steps_after_the_parent_used_the_pool(threads):
    opt, params = make()
    opt.step()  # starts the parent's pool threads, which do not exist in the child

    def child() -> bytes:
        torch.set_num_threads(2)
        opt.step()
        opt.step()
        return as_bytes(params)

    got = in_fork(child)
    assert got == as_bytes(stepped(3))
    assert equal(params, stepped(1)), "the child's steps reached the parent"
    opt.step()
    opt.step()
    assert got == as_bytes(params)


def test_a_forked_child_has_its_own_optimizer_and_norm(threads):
    make(max_grad_norm=1.0)[0].step()

    def child() -> bytes:
        torch.set_num_threads(1)  # torch's own parallel regions hang in a fork: making tensors is its work
        opt, params = make(Lion, seed=5, max_grad_norm=1.0)
        opt.step()
        torch.set_num_threads(2)
        opt.step()
        return as_bytes([*params, opt.grad_norm])

    opt, params = make(Lion, seed=5, max_grad_norm=1.0)
    opt.step()
    opt.step()
    assert in_fork(child) == as_bytes([*params, opt.grad_norm])


class Squares(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> Tensor:
        return torch.full((16,), float(i)) ** 2


def test_dataloader_workers_fork_while_the_optimizer_is_in_use(threads):
    model = nn.Linear(16, 4096)
    opt = AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    for _ in range(2):
        for batch in torch.utils.data.DataLoader(Squares(), batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=30):
            opt.zero_grad()
            model(batch).sum().backward()
            opt.step()
    assert opt.state[model.weight]["step"] == 12 and model.weight.isfinite().all()


# --- threads -----------------------------------------------------------------------------------------------------------------------------


def test_two_threads_step_two_optimizers(threads):
    work = [make(AdamW, 1), make(AdaBelief, 2)]
    errors: list[BaseException] = []

    def run(opt: Any) -> None:
        try:
            for _ in range(20):
                opt.step()
        except BaseException as error:  # noqa: BLE001  (raised again below, in the thread that can fail the test)
            errors.append(error)

    pool = [threading.Thread(target=run, args=(opt,)) for opt, _ in work]
    for t in pool:
        t.start()
    for t in pool:
        t.join(60)
        assert not t.is_alive()
    if errors:
        raise errors[0]
    for (_, params), (cls, seed) in zip(work, ((AdamW, 1), (AdaBelief, 2)), strict=True):
        assert equal(params, stepped(20, cls=cls, seed=seed))


@pytest.mark.parametrize("cls", [AdamW, Lion, AdaBelief])
def test_the_number_of_threads_changes_no_bit(threads, cls):
    """Sizes at which one and two threads would be given chunks of different lengths."""
    results = []
    for count in (1, 2):
        threads(count)
        opt, params = make(cls, size=300_001, max_grad_norm=0.5)
        opt.step()
        squares = torch.stack([opt._plans[0].squares(NO_SCALARS).sum(), opt.grad_norm.double()])
        results.append((squares, [p.detach() for p in params]))
    assert torch.equal(results[0][0], results[1][0]), "the norm depends on the number of threads"
    assert equal(results[0][1], results[1][1])


NO_SCALARS = optim.base.Scalars(None, None, None, 0, False)


def test_runs_repeat_bit_for_bit(threads):
    assert equal(stepped(5, max_grad_norm=0.1), stepped(5, max_grad_norm=0.1))


# --- torch.compile -----------------------------------------------------------------------------------------------------------------------


def train(compiled: str | None, inside: bool) -> list[Tensor]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    opt, x = AdamW(model.parameters(), lr=0.05), torch.randn(32, 8)

    def whole() -> None:
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()

    forward = model if compiled is None or inside else torch.compile(model, backend=compiled)
    step = torch.compile(whole, backend=compiled) if compiled and inside else None
    for _ in range(4):
        if step is not None:
            step()
            continue
        opt.zero_grad()
        forward(x).square().mean().backward()
        opt.step()
    return list(model.parameters())


@pytest.mark.parametrize("backend, inside", [("eager", False), ("eager", True), ("aot_eager", False), ("aot_eager", True)])
def test_compiled_training(backend, inside):
    for a, b in zip(train(backend, inside), train(None, False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- gradient release --------------------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 12), nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 6)))
        self.b = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.b(self.a(x))))  # b is used twice: its gradient is complete only after both


@pytest.mark.parametrize("cls", [AdamW, Lion, AdaBelief])
@pytest.mark.parametrize("extras", [{}, {"stochastic_rounding": True, "seed": 3}])
def test_released_gradients_step_alike(cls, extras):
    dtype = torch.bfloat16 if extras else torch.float32

    def build() -> tuple[nn.Module, Any]:
        torch.manual_seed(1)
        model = Nested().to(dtype)
        groups = [{"params": model.a.parameters()}, {"params": model.b.parameters(), "lr": 0.02}]
        return model, cls(groups, lr=0.01, weight_decay=0.1, **extras)

    (one, plain), (two, released) = build(), build()
    handle = optim.release_gradients(released)
    for step in range(5):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        plain.zero_grad()
        one(x).float().square().sum().backward()
        plain.step()
        two(x).float().square().sum().backward()
        assert all(p.grad is None for p in two.parameters())
        released.step()  # nothing is left to do
        assert equal(list(one.parameters()), list(two.parameters())), f"step {step}"
        for opt in (plain, released):
            opt.param_groups[0]["lr"] *= 0.9
    handle.remove()
    two(x).float().sum().backward()
    assert all(p.grad is not None for p in two.parameters())


def test_release_refuses_what_needs_all_gradients():
    opt, _ = make(max_grad_norm=1.0)
    with pytest.raises(ValueError, match="max_grad_norm"):
        optim.release_gradients(opt)


@pytest.mark.parametrize("mark", ["_fsdp_flattened", "_is_flat_param"])
def test_flattened_parameters_of_fsdp1_are_refused(mark, monkeypatch):
    """Each process would clip by its own shards' norm; released, step on a gradient that is not reduced yet."""
    p = nn.Parameter(torch.ones(3))
    setattr(p, mark, True)
    AdamW([p], max_grad_norm=1.0)  # a process alone has all of them
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="outside FSDP1"):
        optim.release_gradients(AdamW([p]))
    with pytest.raises(ValueError, match=r"max_grad_norm=None with FSDP1; got 1\.0 and parameter 0"):
        AdamW([p], max_grad_norm=1.0)


def test_release_refuses_a_rule_that_prepares_its_step():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="AdaHessian"):
        optim.release_gradients(optim.AdaHessian([p]))


# --- GradScaler, schedulers, hooks, profiler ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(clip, unscale):
    torch.manual_seed(0)
    model, plain = nn.Linear(5, 3), nn.Linear(5, 3)
    plain.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
    opt, truth = AdamW(model.parameters(), max_grad_norm=clip), AdamW(plain.parameters(), max_grad_norm=clip)
    skipped, scales = 0, []
    for step in range(6):
        x = torch.randn(4, 5)
        if step == 2:
            x[0, 0] = float("inf")
        before = [p.detach().clone() for p in model.parameters()]
        opt.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        if step == 2:
            skipped += 1
            assert equal(list(model.parameters()), before) and opt.state[model.weight]["step"] == 2
            continue
        truth.zero_grad()
        plain(x).square().mean().backward()
        truth.step()
        assert equal(list(model.parameters()), list(plain.parameters())), f"step {step}"
    assert skipped == 1 and scales == [2.0**16, 2.0**17, 2.0**16, 2.0**16, 2.0**17, 2.0**17]
    assert opt.state[model.weight]["step"] == 5 and not hasattr(opt, "found_inf")


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("ours, torchs", [(AdamW, torch.optim.AdamW), (optim.SGD, torch.optim.SGD)])
def test_one_cycle_lr_cycles_lr_and_momentum(ours, torchs, tensor_lr):
    def run(cls: Any) -> tuple[Tensor, list[Any]]:
        p = nn.Parameter(torch.linspace(-1, 1, 33))
        extra = {"momentum": 0.9} if "SGD" in cls.__name__ else {}
        opt = cls([p], lr=torch.tensor(0.1) if tensor_lr else 0.1, **extra)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=12, cycle_momentum=True)
        seen = []
        for k in range(11):
            p.grad = torch.cos(p.detach() * (k + 1))
            opt.step()
            schedule.step()
            group = opt.param_groups[0]
            seen.append((float(group["lr"]), group.get("momentum", group.get("betas", (0,))[0])))
        return p.detach(), seen

    (mine, my_schedule), (theirs, their_schedule) = run(ours), run(torchs)
    assert my_schedule == their_schedule and len({m for _, m in my_schedule}) > 5
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)


def test_hooks_see_and_change_the_step():
    """As torch: pre hooks may replace (args, kwargs), post hooks see them; global hooks run too; a removed hook is gone."""
    calls: list[tuple[str, tuple, dict]] = []

    def note(name: str) -> Any:
        return lambda opt, args, kwargs: calls.append((name, args, dict(kwargs)))

    def drive(cls: Any) -> list[tuple[str, tuple, dict]]:
        calls.clear()
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        opt = cls([p])
        handles = [opt.register_step_pre_hook(note("pre")), opt.register_step_post_hook(note("post")),
                   register_optimizer_step_pre_hook(note("global pre")), register_optimizer_step_post_hook(note("global post"))]  # fmt: skip
        try:
            closure = lambda: torch.tensor(2.5)
            assert opt.step(closure) == 2.5
            assert [args[1:] for _, args, _ in calls] == [(closure,)] * 4
            opt.step()
            handles.pop(0).remove()
            handles.append(opt.register_step_pre_hook(lambda o, args, kwargs: ((*args[:1], lambda: torch.tensor(7.0)), {})))
            assert opt.step() == 7.0
        finally:
            for handle in handles:
                handle.remove()
        assert all(args[0] is opt for _, args, _ in calls)
        count = len(calls)
        opt.step()
        assert len(calls) == count
        return [(name, len(args), sorted(kwargs)) for name, args, kwargs in calls]

    assert drive(AdamW) == drive(torch.optim.AdamW)


@pytest.mark.parametrize("returned", [1, (1, 2, 3)])
def test_a_pre_hook_that_returns_something_else_is_refused(returned: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    for cls in (AdamW, torch.optim.AdamW):
        opt = cls([p])
        opt.register_step_pre_hook(lambda o, args, kwargs: returned)
        with pytest.raises(RuntimeError, match="returned|must return"):
            opt.step()
    assert torch.equal(p, torch.ones(3))


def test_post_hook_alone_sees_the_same_arguments():
    """No pre hook and no profiler: the short way through step."""
    seen = []
    for cls in (AdamW, torch.optim.AdamW):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        opt = cls([p])
        opt.register_step_post_hook(lambda o, args, kwargs: seen.append((args[0] is o, len(args), kwargs)))
        opt.step()
    assert seen[0] == seen[1]


def test_the_profiler_shows_the_step():
    opt, _ = make(size=100)
    opt.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}

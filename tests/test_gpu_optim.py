"""The optimizers on a GPU: the bits of the CPU reference, without waiting or allocating, from graphs and streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from gpu_cases import BACKENDS, DEVICE, GPU, MANY, allocations, cases, needs_gpu, no_sync, room_for, same

import fusedadapt as fa
from fusedadapt import testing
from fusedadapt.bench.runner import captured
from fusedadapt.optim import OPTIMIZERS

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("compiled_triton", "quick_calls")]
INEXACT = ("AdaHessian",)  # pow is not correctly rounded: within 2 ulp
F, B = torch.float32, torch.bfloat16
SHAPES = ((4200,), (33, 130), (7,))
# tests/test_optim_coded_device.py has more of these for machines without a GPU
CODED = ("AdamW", "AdaBelief", "Lion", "AdEMAMix", "Adagrad", "SGD") if MANY else ("AdamW", "Lion")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_bits_of_the_reference(name: str, backend: str) -> None:
    """Random options, dtypes, layouts, masks and scalers."""
    for case in testing.fuzz_cases(7000, cases(30, 1), name):
        wrong = [f for f in testing.compare_case(case, testing.Ours(backend), DEVICE) if f.mismatches]
        assert not wrong, (case.repro, wrong[0])
        if name not in INEXACT:
            got, want = testing.run_case(case, backend, DEVICE), testing.run_case(case, "reference")
            assert not [k for k in want if not same(got[k], want[k])], case.repro


class Pair:
    """The same optimizer on the GPU backend and, in the reference, on the CPU, fed with the same gradients."""

    def __init__(self, name: str, backend: str, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = F, **options: Any):
        g = torch.Generator().manual_seed(5)
        start = [torch.randn(shape, generator=g).to(dtype) for shape in shapes]
        density, self.t = options.pop("density", None), 0
        chosen = [torch.rand(shape, generator=g) < density for shape in shapes] if density is not None else []
        self.params, self.opts = [], []
        for device, backend_ in ((DEVICE, backend), (torch.device("cpu"), "reference")):
            params = [torch.nn.Parameter(s.clone().to(device)) for s in start]
            masks = {p: m.to(device) for p, m in zip(params, chosen)} or None
            opt = OPTIMIZERS[name](params, backend=backend_, masks=masks, **options)
            opt.train() if hasattr(opt, "train") else None
            self.params.append(params)
            self.opts.append(opt)

    def gradients(self) -> None:
        g = torch.Generator().manual_seed(900 + self.t)
        self.t += 1
        for p, q in zip(*self.params):
            grad = (torch.randn(q.shape, generator=g) * 10.0 ** torch.randint(-3, 1, q.shape, generator=g)).to(q.dtype)
            p.grad, q.grad = grad.to(DEVICE), grad
            for r in (p, q):
                r.hessian_diag = r.grad.abs()  # type: ignore[attr-defined]  # AdaHessian's

    def step(self) -> None:
        self.gradients()
        for opt in self.opts:
            opt.step()

    def check(self) -> None:
        for i, (p, q) in enumerate(zip(*self.params)):
            assert same(p, q), i
            mine, theirs = (opt.state[r] for opt, r in zip(self.opts, (p, q)))
            assert mine.keys() == theirs.keys()
            for k, v in theirs.items():
                assert not isinstance(v, torch.Tensor) or same(mine[k], v), (i, k)


@pytest.mark.parametrize("backend", BACKENDS if GPU else BACKENDS[:1])
@pytest.mark.parametrize("state_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("name", CODED)
def test_one_byte_states(name: str, state_dtype: str, backend: str) -> None:
    shapes = ((4200,), (33, 130), (4096 * 33 + 5,), (100,))
    pair = Pair(name, backend, shapes[: cases(4, 2)], B, lr=1e-2, state_dtype=state_dtype, **({"momentum": 0.9} if name == "SGD" else {}))
    for _ in range(3):
        pair.step()
    pair.check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask_state", ["dense", "compact"])
@pytest.mark.parametrize("density", [0.01, 0.4])
def test_masks(density: float, mask_state: str, backend: str) -> None:
    pair = Pair("AdamW", backend, ((cases(300_000, 5000),), (65, 63)), lr=1e-2, weight_decay=0.1, density=density, mask_state=mask_state)
    before = [p.detach().clone() for p in pair.params[0]]
    for _ in range(3):
        pair.step()
    pair.check()
    for p, was in zip(pair.params[0], before):
        assert 0 < int((p != was).sum()) <= p.numel() * density * 1.5 + 20


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["AdamW", "AdaBelief", "Lion", "ScheduleFreeAdamW", "NAdam"])
def test_a_graph_replays_the_steps(name: str, backend: str) -> None:
    pair = Pair(name, backend, lr=1e-2, capturable=True, max_grad_norm=1.0)
    pair.step()  # tables are built; what follows is what a graph may hold
    pair.gradients()
    static = [p.grad for p in pair.params[0]]
    replay = captured(pair.opts[0].step)  # runs it once
    pair.opts[1].step()
    for _ in range(3):
        pair.gradients()
        for buffer, p in zip(static, pair.params[0]):
            buffer.copy_(p.grad)
            p.grad = buffer
        replay()
        pair.opts[1].step()
    pair.check()


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"state_dtype": "int8"}, {"density": 0.3}], ids=str)
def test_a_step_neither_waits_nor_allocates(options: dict[str, Any], backend: str) -> None:
    pair = Pair("AdamW", backend, lr=1e-2, **options)
    for _ in range(2):
        pair.step()
    pair.gradients()
    with no_sync():
        pair.opts[0].step()
    blocks, from_cuda = allocations(pair.opts[0].step)
    assert from_cuda == 0
    if backend == "cuda" and "max_grad_norm" not in options:  # the norm, and the Triton backend's rows, are small tensors of torch's
        assert blocks == 0


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_follow_the_current_stream(backend: str) -> None:
    """Gradients come late on a side stream; the step is enqueued behind them there, not on the default stream."""
    pair, side = Pair("AdamW", backend, ((1 << 20,),), lr=1e-2), torch.cuda.Stream()
    late = torch.zeros_like(pair.params[0][0])
    for _ in range(3):
        pair.gradients()  # their way to the device is a copy that the host waits for: it must not be what delays them
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            late.zero_()
            torch.cuda._sleep(20_000_000)
            late.copy_(pair.params[0][0].grad)
            pair.params[0][0].grad = late
            pair.opts[0].step()
        side.synchronize()
        pair.opts[1].step()
    pair.check()


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scaler(backend: str) -> None:
    pair = Pair("AdamW", backend, lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for bad in (False, True, False):
        pair.gradients()
        scale = scaler.scale(torch.ones((), device=DEVICE)).item()
        for p, q in zip(*pair.params):
            p.grad *= scale
            if bad:
                p.grad.view(-1)[0] = float("inf")
            q.grad = (p.grad / scale).cpu()
        scaler.step(pair.opts[0])
        scaler.update()
        if not bad:
            pair.opts[1].step()
    pair.check()


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_two_to_the_31_elements(backend: str) -> None:
    """The last elements of a tensor whose offsets do not fit 32 bits, against a small tensor with the same values."""
    with room_for(20):
        n, tail = 2**31 + 5003, 4099
        p = torch.nn.Parameter(torch.zeros(n, dtype=B, device=DEVICE))
        q = torch.nn.Parameter(torch.randn(tail, generator=torch.Generator().manual_seed(0)).to(B).to(DEVICE))
        p.data[-tail:] = q.data
        opts = [OPTIMIZERS["Lion"]([t], lr=1e-2, weight_decay=0.1, backend=backend) for t in (p, q)]
        p.grad = torch.zeros_like(p)
        for t in range(2):
            q.grad = torch.randn(tail, generator=torch.Generator().manual_seed(t + 1)).to(B).to(DEVICE)
            p.grad[-tail:] = q.grad
            for opt in opts:
                opt.step()
        assert same(p.data[-tail:], q.data) and not bool(p.data[: n - tail].any())
        assert same(opts[0].state[p]["exp_avg"][-tail:], opts[1].state[q]["exp_avg"])


@needs_gpu
def test_with_a_compiled_model() -> None:
    """forward and backward compiled, our step between: the losses of the eager run within what torch's own compiler changes."""
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 8)).to(DEVICE)
        opt = fa.optim.AdamW(model.parameters(), lr=1e-2)
        run = torch.compile(model) if compiled else model
        x, y = torch.randn(32, 64, device=DEVICE), torch.randn(32, 8, device=DEVICE)
        for _ in range(5):
            opt.zero_grad()
            loss = (run(x) - y).square().mean()
            loss.backward()
            opt.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@needs_gpu
def test_dispatch_prefers_cuda() -> None:
    p = torch.nn.Parameter(torch.zeros(8, device=DEVICE))
    p.grad = torch.ones_like(p)
    with fa.strict():
        opt = fa.optim.AdamW([p])
        opt.step()
    assert fa.explain(opt)[0][1] == "cuda"

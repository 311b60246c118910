"""Low-rank layers on a GPU: random cases against fp64, the reference's masks, operators as torch's checker wants them, graphs, compilers, waiting."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gpu_cases import DEVICE, GPU, cases, needs_gpu, no_sync, room_for, same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedadapt as fa
from fusedadapt import testing
from fusedadapt.bench.runner import captured
from fusedadapt.reference import lowrank as reference
from fusedadapt.testing.lowrank import judge_case, lowrank_case

ops = torch.ops.fusedadapt
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("compiled_triton", "quick_calls")]
B, F, H = torch.bfloat16, torch.float32, torch.float16


def new(*shape: int, seed: int = 0, dtype: torch.dtype = F) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def layer(k: int = 64, n: int = 96, r: int = 8, dtype: torch.dtype = F, p: float = 0.1, **options: Any) -> fa.LoRALinear:
    torch.manual_seed(3)
    made = fa.LoRALinear.from_linear(nn.Linear(k, n, dtype=dtype), r=r, lora_alpha=2 * r, lora_dropout=p, **options).to(DEVICE)
    for name, q in made.named_parameters():
        if q.requires_grad:
            q.data = q.data + new(*q.shape, seed=len(name), dtype=q.dtype) * 0.02
    return made


@pytest.fixture(autouse=True)
def on_triton() -> Any:
    """A GPU's first choice here; elsewhere by name."""
    with fa.backend("triton"), fa.strict():
        yield


@pytest.mark.parametrize("share", range(12))
def test_no_worse_than_eager(share: int) -> None:
    # In shares, for as many processes: a case compiles four kernels that no other has, most of a second each.
    # cuBLAS would otherwise be judged by TF32 of other kernels: torch's default is IEEE fp32
    assert not torch.backends.cuda.matmul.allow_tf32
    for seed in range(300_000 + share, 300_000 + cases(144, 4), 12):
        case = lowrank_case(seed, small=not GPU)
        wrong = [f for f in judge_case(case, "triton", DEVICE) if not f.ours <= f.limit]
        assert not wrong, (seed, wrong, case)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masks_are_those_of_the_reference(p: float) -> None:
    threshold = reference.threshold_of(p)
    for tokens, k in ((1, 1), (3, 77), (cases(300, 9), cases(1030, 130))):
        dropped = ops.lr_dropout(torch.ones(tokens, k, device=DEVICE), torch.tensor([1234567890123], device=DEVICE), torch.tensor([p]))
        keep = reference.dropout_mask(tokens, k, 1234567890123, threshold, 0).view(tokens, k)
        assert torch.equal(dropped.cpu() != 0, keep)


def test_operators_pass_torchs_checks() -> None:
    x, a, b, w = new(9, 32), new(4, 32, seed=1), new(24, 4, seed=2), new(24, 32, seed=3)
    u, v, dy = new(9, 4, seed=4), new(9, 4, seed=5), new(9, 24, seed=6)
    seed, p = torch.tensor([7], device=DEVICE), torch.tensor([0.25])
    checks = [
        (ops.lr_shrink, (x, a, seed, p, [4])),
        (ops.lr_bwd_x, (x, u, seed, p, [4])),
        (ops.lr_add_, (x.clone(), u, a, seed, p, [4])),
        (ops.lr_scale_add_, (dy.clone(), v, b.t().contiguous(), new(24), None)),
        (ops.lr_bwd_dy, (dy, v, b, None, None, True)),
        (ops.lr_dropout, (x, seed, p)),
        (ops.lr_skinny_w, (w, a)),
        (ops.lr_merge_, (w.clone(), b, a, None)),
    ]
    for op, arguments in checks:
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = model(x)
    y.float().square().mean().backward()
    found = {name: q.grad for name, q in model.named_parameters() if q.grad is not None}
    return {"y": y.detach(), "dx": x.grad, **found}  # type: ignore[dict-item]


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "ia3"])
def test_gradients_repeat_bit_for_bit(method: str) -> None:
    model = layer(dtype=B, method=method)
    runs = []
    for _ in range(cases(20, 2)):
        torch.manual_seed(11)
        twin, x = copy.deepcopy(model), new(cases(2048, 5), 64, dtype=B).requires_grad_()
        runs.append(trained(twin, x))
    for run in runs[1:]:
        assert run.keys() == runs[0].keys() and all(same(run[k], runs[0][k]) for k in run)


def test_checkpointing_replays_the_dropout() -> None:
    model, results = layer(p=0.5), []
    for again in (False, True):
        torch.manual_seed(5)
        twin, x = copy.deepcopy(model), new(6, 64).requires_grad_()
        y = checkpoint(twin, x, use_reentrant=False) if again else twin(x)
        y.square().mean().backward()
        results.append([y.detach(), x.grad, *(q.grad for q in twin.parameters() if q.grad is not None)])
    assert all(same(a, b) for a, b in zip(*results))


@needs_gpu
def test_a_training_step_does_not_wait() -> None:
    model, x = layer(256, 256, dtype=B), new(512, 256, dtype=B)
    trained(model, x.clone().requires_grad_())
    with no_sync():
        trained(model, x.clone().requires_grad_())


@needs_gpu
def test_graph_of_a_training_step() -> None:
    """Each replay draws new dropout masks from torch's generator, and the gradients belong to them: dA of a linear layer is known from y."""
    model, x = layer(256, 256, p=0.5), new(64, 256)
    out: dict[str, Tensor] = {}

    def step() -> None:
        for q in model.parameters():
            q.grad = None
        y = model(x)
        y.square().mean().backward()
        out.update(y=y.detach(), da=model.lora_A.grad if hasattr(model, "lora_A") else next(q.grad for q in model.parameters() if q.grad is not None))

    replay = captured(step)
    seen = []
    for _ in range(3):
        replay()
        seen.append((out["y"].clone(), out["da"].clone()))
    assert not same(seen[0][0], seen[1][0]) and not same(seen[1][0], seen[2][0]), "the mask must change from replay to replay"
    assert all(bool(t.isfinite().all()) for pair in seen for t in pair)


@needs_gpu
@pytest.mark.parametrize("dtype", [F, B], ids=str)
def test_compiles_whole(dtype: torch.dtype) -> None:
    model = layer(128, 128, dtype=dtype)
    for tokens in (7, 64, 33):
        results = []
        # inductor draws other random numbers than torch does, hence other masks, unless told not to
        for run in (model, torch.compile(model, fullgraph=True, options={"fallback_random": True})):
            torch.manual_seed(5)
            model.zero_grad()
            results.append(trained(run, new(tokens, 128, dtype=dtype).requires_grad_()))
        for eager, compiled in zip(results[0].values(), results[1].values()):
            torch.testing.assert_close(eager, compiled, rtol=2e-2 if dtype == B else 1e-4, atol=2e-2 if dtype == B else 1e-5)


@needs_gpu
def test_autocast() -> None:
    model, x = layer(128, 128), new(32, 128).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = model(x)
    y.float().square().mean().backward()
    assert y.dtype == B and x.grad is not None and all(q.grad.dtype == F for q in model.parameters() if q.requires_grad)


@needs_gpu
def test_beyond_two_to_the_31_elements() -> None:
    """A token whose elements lie past the 32-bit offsets has the result of a token of the same values near the start."""
    with room_for(30):
        k, n, r = 4096, 64, 4
        tokens = 2**31 // k + 3
        x = torch.zeros(tokens, k, dtype=B, device=DEVICE)
        x[0] = x[-1] = new(k, dtype=B)
        weight, a, b = new(n, k, seed=1, dtype=B) * 0.02, new(r, k, seed=2) * 0.02, new(n, r, seed=3)
        y = fa.lora_linear(x, weight, a.requires_grad_(), b.requires_grad_(), scaling=2.0)
        assert same(y[0], y[-1]) and not bool(y[1:-1].any())
        y[-1].float().sum().backward()
        dy = torch.ones(n, device=DEVICE)
        torch.testing.assert_close(a.grad, 2.0 * torch.outer(dy @ b.detach(), x[-1].float()), rtol=1e-2, atol=1e-2)


@needs_gpu
def test_nothing_of_x_is_copied() -> None:
    """Peak memory of forward and backward with dropout, fp32 adapters on a 16-bit base: y, dy and dx, and less than a quarter of x beside them."""
    tokens, k = 8192, 4096
    model, x = layer(k, k, r=16, dtype=B), new(tokens, k, dtype=B).requires_grad_()
    dy = new(tokens, k, dtype=B, seed=9)
    model(x).backward(dy)
    x.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(x).backward(dy)
    size = x.numel() * x.element_size()
    assert torch.cuda.max_memory_allocated() - before <= 2.25 * size


def test_toolkit_sees_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge of this file can fail."""
    real = testing.lowrank.ours
    monkeypatch.setattr(testing.lowrank, "ours", lambda *a: {k: v + 1 for k, v in real(*a).items()})
    assert [f for f in judge_case(lowrank_case(300_001, small=True), "reference") if not f.ours <= f.limit]

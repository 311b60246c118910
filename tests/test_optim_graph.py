"""What a CUDA graph and several GPUs ask of the optimizers' plans, as far as it shows without a GPU."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedadapt.optim import OPTIMIZERS, plans_device
from fusedadapt.optim.spec import HYPER_FIELDS, RULES

KERNELS = sorted((Path(__file__).resolve().parents[1] / "kernels").glob("*.py"))


class Crossings(TorchDispatchMode):
    """Notes what makes the host wait: copies between it and a device, and values that it asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        if len(devices) > 1 or "local_scalar" in str(op):
            self.found.append(str(op))
        return out


@pytest.mark.parametrize("rule", RULES)
def test_rows_are_made_on_the_device(rule: str) -> None:
    with FakeTensorMode(), Crossings() as crossings:
        hypers = torch.empty(3, len(HYPER_FIELDS), dtype=torch.float64, device="cuda:0")
        rows, after = plans_device.next_rows(rule, hypers, torch.empty(3, 3, dtype=torch.float64, device="cuda:0"))
    assert rows.shape == (3, plans_device.ROW_WIDTH) and rows.dtype == torch.float32 and after.shape == (3, 3)
    assert not crossings.found


def tables(plan: plans_device.DevicePlan) -> list[torch.Tensor]:
    rows = [] if isinstance(plan, plans_device.TritonPlan) else [plan._rows, plan._clocks]  # Triton's are made in the graph
    return [plan._desc, plan._hypers, plan._gradient_chunks, *rows, *(share.chunks for share in plan._shares)]


@pytest.mark.parametrize("backend", ["emulated", "triton"])
def test_what_a_graph_reads_outlives_the_steps_around_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients come to lie elsewhere in the graph: it keeps the tables it reads, and the step after it uses none that only a replay fills."""
    capturing = False
    monkeypatch.setattr(plans_device.DevicePlan, "_capturing", lambda self: capturing)
    params = [torch.nn.Parameter(torch.ones(n)) for n in (40, 7)]
    opt = OPTIMIZERS["AdamW"](params, backend=backend)

    def step(*present: torch.nn.Parameter) -> plans_device.DevicePlan:
        for p in params:
            p.grad = torch.ones_like(p) if p in set(present) else None
        opt.step()
        (plan,) = opt._plans
        assert isinstance(plan, plans_device.DevicePlan)
        return plan

    step(*params)
    capturing = True
    opt.param_groups[0]["lr"] = 0.5
    plan = step(params[0])
    read = tables(plan)
    capturing = False
    opt.step()  # same gradients, same lr
    now = tables(plan)
    kept = {id(t) for t in plan._captured}
    assert all(id(t) in kept for t in read) and not kept & set(map(id, now))
    assert torch.equal(plan._desc, read[0]) and torch.equal(plan._hypers, read[1])


@pytest.mark.parametrize("backend", ["emulated", "triton"])
def test_tables_stay_for_the_stream_that_reads_them(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploaded on one stream, read on another, replaced: the allocator must hear of the second one, once for each table."""
    told: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: told.append((t.data_ptr(), stream)))
    p = torch.nn.Parameter(torch.ones(40))
    opt = OPTIMIZERS["AdamW"]([p], backend=backend, max_grad_norm=1.0)

    def step() -> plans_device.DevicePlan:
        p.grad = torch.ones_like(p)
        opt.step()
        [plan] = opt._plans
        assert isinstance(plan, plans_device.DevicePlan)
        return plan

    for stream in ("main", "side"):
        plan = step()
        told.clear()
        plan._keep_for(stream)  # type: ignore[arg-type]
        assert {(t.data_ptr(), stream) for t in tables(plan)} <= set(told)
        told.clear()
        plan._keep_for(stream)  # type: ignore[arg-type]
        assert not told
    plan._version += 1
    plan._keep_for("side")  # type: ignore[arg-type]
    assert told


@pytest.mark.parametrize("backend", ["emulated", "triton"])
def test_states_do_not_begin_in_a_graph(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replay would set them to zero again."""
    params = [torch.nn.Parameter(torch.ones(8)) for _ in range(2)]
    opt = OPTIMIZERS["AdamW"](params, backend=backend)
    params[0].grad = torch.ones(8)
    opt.step()
    monkeypatch.setattr(plans_device.DevicePlan, "_capturing", lambda self: True)
    before = params[0].detach().clone()
    params[1].grad = torch.ones(8)
    with pytest.raises(RuntimeError, match="AdamW.step: expected a step before the CUDA graph capture, with all parameters"):
        opt.step()
    assert torch.equal(params[0].detach(), before) and not opt.state[params[1]]


def test_pinned_buffers_are_the_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight for a plan, however many parameters have one of their own; a capture uses them up, the next step outside makes new ones."""
    params = [torch.nn.Parameter(torch.ones(8)) for _ in range(20)]
    opt = OPTIMIZERS["AdamW"](params, backend="emulated")
    for p in params:
        p.grad = torch.ones(8)
        opt.step_one_(p)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    host = torch.arange(6.0, dtype=torch.float64)
    plans = [entry[0] for entry in opt._single.values()]
    assert len(plans) == 20
    for plan in plans:
        assert torch.equal(plan._pin(host), host)
    (spare,) = (buffers for of, buffers in plans_device._spare.items() if of is opt)
    assert len(spare) == plans_device.SPARE
    monkeypatch.setattr(plans_device.DevicePlan, "_capturing", lambda self: True)
    kept = [plans[0]._pin(host) for _ in range(plans_device.SPARE)]
    assert not spare and all(torch.equal(k, host) for k in kept) and len({k.data_ptr() for k in kept}) == plans_device.SPARE
    with pytest.raises(RuntimeError, match="before the CUDA graph capture"):
        plans[0]._pin(host)
    monkeypatch.setattr(plans_device.DevicePlan, "_capturing", lambda self: False)
    plans[0]._pin(host)
    assert len(spare) == plans_device.SPARE


def launches(tree: ast.AST, guarded: bool = False) -> Iterator[tuple[ast.Call, bool]]:
    """Calls, and whether they stand under `with torch.cuda.device_of(...)`."""
    for node in ast.iter_child_nodes(tree):
        inside = guarded or isinstance(node, ast.With) and any("torch.cuda.device_of" in ast.unparse(item.context_expr) for item in node.items)
        if isinstance(node, ast.Call):
            yield node, inside
        yield from launches(node, inside)


def test_kernels_are_launched_on_their_tensors_device() -> None:
    """Triton launches on the current device, whatever the tensors': whoever launches `kernel[grid](...)` has chosen it, or all its callers have."""
    functions = [f for path in KERNELS for f in ast.parse(path.read_text()).body if isinstance(f, ast.FunctionDef) and not f.decorator_list]
    calls = {f.name: [(call.func, guarded) for call, guarded in launches(f)] for f in functions}
    launchers = {name for name, made in calls.items() if any(isinstance(f, ast.Subscript) and not guarded for f, guarded in made)}
    named = {name: {(ast.unparse(f).rpartition(".")[2], guarded) for f, guarded in made} for name, made in calls.items()}
    assert len(launchers) > 3 and "_read" not in launchers
    while more := {name for name, made in named.items() if any((k, False) in made for k in launchers)} - launchers:
        launchers |= more
    assert not {k for k in launchers if not any((k, True) in made or (k, False) in made for made in named.values())}


def test_neutral_scalars_are_fp32_whatever_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedadapt.kernels import optim

    monkeypatch.setattr(optim, "_neutral", {})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert optim._scalar(None, 1, torch.device("cpu")).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)

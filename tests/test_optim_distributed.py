"""Two processes with gloo: DDP, DTensor and FSDP2 shards (uneven and empty ones too) against one process, bit for bit."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from fusedadapt.optim import OPTIMIZERS, SGD, AdaBelief, AdamW, FusedOptimizer, Lion

RULES: dict[str, type[FusedOptimizer]] = {"AdamW": AdamW, "Lion": Lion, "AdaBelief": AdaBelief}
SHAPES = [(5, 3), (1, 6), (8, 4), (7,), (2, 3, 5)]  # cut in two: uneven (5, 7), one process left with nothing (1)
B = torch.bfloat16


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for shape in SHAPES]


def whole(cls: Any, dtype: torch.dtype = torch.float32, **extras: Any) -> tuple[FusedOptimizer, list[Tensor]]:
    params = [nn.Parameter(t) for t in tensors(0, dtype)]
    return cls(params, lr=0.05, weight_decay=0.1, **extras), params


def sharded(cls: Any, dim: int, dtype: torch.dtype = torch.float32, **extras: Any) -> tuple[FusedOptimizer, list[Any]]:
    params = [nn.Parameter(shard(t, dim)) for t in tensors(0, dtype)]
    return cls(params, lr=0.05, weight_decay=0.1, **extras), params


def mesh() -> Any:
    return dist.device_mesh.init_device_mesh("cpu", (2,))


def shard(t: Tensor, dim: int) -> Any:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    return distribute_tensor(t, mesh(), [Shard(dim) if t.dim() > dim >= 0 else Replicate()])


def run_both(cls: Any, dim: int, dtype: torch.dtype = torch.float32, steps: int = 3, **extras: Any) -> tuple[Any, list[Any], Any, list[Tensor]]:
    ours, shards = sharded(cls, dim, dtype, **extras)
    truth, params = whole(cls, dtype, **extras)
    for step in range(steps):
        for p, q, g in zip(params, shards, tensors(step + 1, dtype), strict=True):
            p.grad, q.grad = g, shard(g, dim)
        ours.step()
        truth.step()
    return ours, shards, truth, params


def assert_equal(shards: list[Any], params: list[Tensor], what: str) -> None:
    for k, (a, b) in enumerate(zip(shards, params, strict=True)):
        full = a.detach().full_tensor() if hasattr(a, "full_tensor") else a.detach()
        assert torch.equal(full, b.detach()), f"{what}: tensor {k} {tuple(b.shape)} differs by {(full.float() - b.float()).abs().max()}"


# --- checks: each runs in both processes -------------------------------------------------------------------------------------------------


def check_ddp(rank: int) -> None:
    for cls in RULES.values():
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        model.load_state_dict(plain.state_dict())
        replica = nn.parallel.DistributedDataParallel(model)
        ours, truth = cls(replica.parameters(), lr=0.05, max_grad_norm=0.1), cls(plain.parameters(), lr=0.05, max_grad_norm=0.1)
        for step in range(3):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            ours.zero_grad()
            replica(x[rank * 4 : rank * 4 + 4]).square().mean().backward()
            truth.zero_grad()
            halves = [torch.autograd.grad(plain(x[i * 4 : i * 4 + 4]).square().mean(), list(plain.parameters())) for i in range(2)]
            for p, a, b in zip(plain.parameters(), *halves, strict=True):
                p.grad = (a / 2 + b / 2).reshape(p.shape)
            ours.step()
            truth.step()
            torch.testing.assert_close(ours.grad_norm, truth.grad_norm, rtol=1e-6, atol=0)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            others = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(others, p.detach())
            assert torch.equal(*others), "the replicas drifted apart"


def check_shards(rank: int) -> None:
    for dim in (0, 1, -1):
        for name, cls in RULES.items():
            ours, shards, truth, params = run_both(cls, dim)
            assert_equal(shards, params, f"{name} Shard({dim})")
            for p, q in zip(params, shards, strict=True):
                for key in sorted(truth.state[p].keys() - {"step"}):
                    assert_equal([ours.state[q][key]], [truth.state[p][key]], f"{name} {key}")


def check_norm(rank: int) -> None:
    for dim in (0, 1, -1):
        ours, shards, truth, params = run_both(AdamW, dim, max_grad_norm=0.5)
        norms = [torch.empty(()) for _ in range(2)]
        dist.all_gather(norms, ours.grad_norm)
        assert torch.equal(*norms), f"the processes have different norms: {norms}"
        want = torch.stack([g.double().square().sum() for g in tensors(3)]).sum().sqrt().float()
        torch.testing.assert_close(ours.grad_norm, want, rtol=2e-7, atol=0)
        for p, q in zip(shards, params, strict=True):
            torch.testing.assert_close(p.detach().full_tensor(), q.detach(), rtol=1e-5, atol=1e-6)


def check_gradients_cut_otherwise(rank: int) -> None:
    """A sum that is still to be made was read as if it were one; other cuts, and parts still on their way, likewise."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    def gradient(kind: str) -> Any:
        mine = torch.full((4, 4), rank + 1.0)
        if kind == "partial":
            return DTensor.from_local(mine, mesh(), [Partial()])
        if kind == "sharded":
            return shard(torch.full((4, 4), 3.0), 1)
        if kind == "on its way":
            part = all_reduce(mine, "sum", mesh())
            assert isinstance(part, AsyncCollectiveTensor)
            return DTensor.from_local(part, mesh(), [Replicate()], run_check=False)
        return DTensor.from_local(mine.t().contiguous().t(), mesh(), [Partial()])

    def run(kind: str, dim: int, backend: str | None, **options: Any) -> tuple[Any, Any]:
        p = nn.Parameter(shard(torch.ones(4, 4), dim))
        p.grad = gradient(kind)
        opt = SGD([p], lr=0.1, backend=backend, **options)
        return p, opt

    for kind in ("partial", "sharded", "on its way", "strided"):
        for dim in (-1, 0):
            for backend in ("cpp", "reference"):
                p, opt = run(kind, dim, backend, max_grad_norm=1e9)
                opt.step()
                full = p.detach().full_tensor()
                torch.testing.assert_close(full, torch.full((4, 4), 0.7), msg=f"{kind} {dim} {backend}: {full}")
                torch.testing.assert_close(opt.grad_norm, torch.tensor(12.0))
                p, opt = run(kind, dim, backend)
                opt.step_one_(p)
                torch.testing.assert_close(p.detach().full_tensor(), torch.full((4, 4), 0.7))
    p, _ = run("partial", 0, None)
    opt = OPTIMIZERS["SophiaG"]([p], betas=(0.9, 0.5))
    opt.update_hessian()
    torch.testing.assert_close(opt.state[p]["hessian"].full_tensor(), torch.full((4, 4), 4.5))
    assert isinstance(p.placements[0], Shard)


def check_norm_with_missing_gradients(rank: int) -> None:
    """Processes whose shards are empty, and parameters nobody has a gradient for, must not make the reduction wait for ever."""
    ours, shards = sharded(Lion, 0, max_grad_norm=1.0)
    grads = tensors(1)
    for p, g in list(zip(shards, grads, strict=True))[:2]:
        p.grad = shard(g, 0)
    ours.step()
    want = torch.stack([g.double().square().sum() for g in grads[:2]]).sum().sqrt().float()
    torch.testing.assert_close(ours.grad_norm, want, rtol=2e-7, atol=0)
    for p in shards:
        p.grad = None
    ours.step()
    assert ours.grad_norm == 0


def check_found_inf(rank: int) -> None:
    for infected in (0, 1):
        ours, shards = sharded(AdamW, 0, max_grad_norm=1.0)
        for p, g in zip(shards, tensors(1), strict=True):
            p.grad = shard(g, 0)
        ours.step()
        before = [p.detach().full_tensor().clone() for p in shards]
        ours.grad_scale, ours.found_inf = torch.tensor(2.0), torch.tensor(float(rank == infected))
        ours.step()
        assert ours.found_inf == float(rank == infected), "the caller's tensor was written"
        assert_equal(shards, before, f"found_inf on process {infected}")
        assert all(ours.state[p]["step"] == 1 for p in shards)
        ours.found_inf = torch.tensor(0.0)
        ours.step()
        assert all(ours.state[p]["step"] == 2 for p in shards)


def check_stochastic_rounding(rank: int) -> None:
    for dim in (0, 1, -1):
        ours, shards, _, params = run_both(AdamW, dim, B, stochastic_rounding=True, seed=11)
        assert_equal(shards, params, f"stochastic rounding, Shard({dim})")
        *_, nearest = run_both(AdamW, dim, B)
        assert any(not torch.equal(p, q) for p, q in zip(params, nearest, strict=True)), "nothing was rounded stochastically"


def check_master_weights(rank: int) -> None:
    for kind in ("fp32", "split"):
        _, shards, _, params = run_both(Lion, 0, B, master_weights=kind)
        assert_equal(shards, params, f"master_weights={kind}")


def check_masks(rank: int) -> None:
    """A mask is a bool DTensor cut as its parameter is."""
    keep = [t > 0 for t in tensors(99)]
    truth, params = whole(AdamW)
    truth = AdamW(params, lr=0.05, weight_decay=0.1, masks=dict(zip(params, keep, strict=True)))
    shards = [nn.Parameter(shard(t, 0)) for t in tensors(0)]
    ours = AdamW(shards, lr=0.05, weight_decay=0.1, masks={p: shard(m, 0) for p, m in zip(shards, keep, strict=True)})
    for p, q, g in zip(params, shards, tensors(1), strict=True):
        p.grad, q.grad = g, shard(g, 0)
    ours.step()
    truth.step()
    assert_equal(shards, params, "masks")
    for p, m, start in zip(shards, keep, tensors(0), strict=True):
        assert torch.equal(p.detach().full_tensor()[~m], start[~m])


def check_state_dict_reshards(rank: int) -> None:
    """Saved from shards, gathered, cut the other way, loaded: goes on as the unsharded run does."""
    ours, shards, truth, params = run_both(AdaBelief, 0)
    saved = ours.state_dict()
    for state in saved["state"].values():
        for key, t in state.items():
            if hasattr(t, "full_tensor"):
                state[key] = shard(t.full_tensor(), 1)
    again = [nn.Parameter(shard(p.detach().full_tensor(), 1)) for p in shards]
    twin = AdaBelief(again, lr=0.05, weight_decay=0.1)
    twin.load_state_dict(saved)
    for p, q, g in zip(params, again, tensors(7), strict=True):
        p.grad, q.grad = g, shard(g, 1)
    twin.step()
    truth.step()
    assert_equal(again, params, "resharded")


def check_checkpoints_of_torch(rank: int) -> None:
    """Through torch.distributed.checkpoint.state_dict, gathered or not. Masks are words of each process's own: it took one process's for all. The low
    halves of split masters are int16, which no collective takes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

    keep = torch.rand(8, 4, generator=torch.Generator().manual_seed(2)) > 0.5
    for full, master in ((True, "split"), (True, "fp32"), (False, "split")):

        def build(values: Any, kind: str | None = master) -> tuple[Any, FusedOptimizer]:
            module = nn.Linear(4, 8, bias=False)
            module.weight = nn.Parameter(values)
            mask = shard(keep, 0) if hasattr(values, "_local_tensor") else keep
            return module, AdamW(module.parameters(), lr=0.05, master_weights=kind, masks={module.weight: mask})

        (module, ours), (plain, truth) = build(shard(tensors(0, B)[2], 0)), build(tensors(0, B)[2])
        for step in (1, 2):
            module.weight.grad, plain.weight.grad = shard(tensors(step, B)[2], 0), tensors(step, B)[2]
            ours.step(), truth.step()
        options = StateDictOptions(full_state_dict=full)
        saved = get_optimizer_state_dict(module, ours, options=options)
        if full:  # it is the state of a run in one process, too
            state = saved["state"]["weight"]
            assert torch.equal(state["mask"], keep)
            alone, one = build(plain.weight.detach().clone())
            one.load_state_dict({"state": {0: state}, "param_groups": truth.state_dict()["param_groups"]})
            assert all(torch.equal(one.state[alone.weight][k], v) for k, v in truth.state[plain.weight].items())
        again, twin = build(module.weight.detach().clone())
        set_optimizer_state_dict(again, twin, saved, options=options)
        for m, opt in ((again, twin), (plain, truth)):
            m.weight.grad = shard(tensors(3, B)[2], 0) if m is again else tensors(3, B)[2]
            opt.step()
        assert_equal([again.weight], [plain.weight], f"full={full} master_weights={master}")
        assert torch.equal(again.weight.detach().full_tensor()[~keep], tensors(0, B)[2][~keep]), "frozen elements moved"


def check_reference_backend(rank: int) -> None:
    ours, shards, _, params = run_both(AdamW, 1, B, backend="reference", stochastic_rounding=True, max_grad_norm=None)
    assert_equal(shards, params, "reference backend")


def check_fsdp2(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))  # 5 rows and 1 row over two processes

    for cls in RULES.values():
        model, plain = build(), build()
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh())
        fully_shard(model, mesh=mesh())
        ours, truth = cls(model.parameters(), lr=0.05, max_grad_norm=0.1), cls(plain.parameters(), lr=0.05, max_grad_norm=0.1)
        for step in range(3):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))  # both see the same batch: the mean of two equal gradients is exact
            for m, opt in ((model, ours), (plain, truth)):
                opt.zero_grad()
                m(x).square().mean().backward()
                opt.step()
            torch.testing.assert_close(ours.grad_norm, truth.grad_norm, rtol=2e-7, atol=0)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.detach().full_tensor(), q.detach(), rtol=1e-5, atol=1e-6)


CHECKS = {name[6:]: check for name, check in list(globals().items()) if name.startswith("check_")}


# --- one spawn for all of them -----------------------------------------------------------------------------------------------------------


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, check in CHECKS.items():
        try:
            check(rank)
            text = ""
        except Exception:  # noqa: BLE001  (reported by the test)
            text = traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(text)
        failed = torch.tensor([float(bool(text))])
        dist.all_reduce(failed)
        if failed and not text and rank == 0:
            sys.stderr.write(f"{name} failed in the other process\n")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test for all checks: starting two processes costs more than running them."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    processes = mp.get_context("spawn")
    pair = [processes.Process(target=worker, args=(rank, str(tmp_path))) for rank in range(2)]
    for p in pair:
        p.start()
    for p in pair:
        p.join(120)
    for p in pair:
        if p.is_alive():
            p.kill()
    faults = []
    for name in CHECKS:
        for rank in range(2):
            outcome = tmp_path / f"{name}.{rank}"
            text = outcome.read_text() if outcome.exists() else "did not get to its end: the process hung or died"
            if text:
                faults.append(f"{name}, process {rank}: {text}")
    assert not faults, "\n\n".join(faults)

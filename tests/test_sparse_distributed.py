"""topk_mask(group=...) in two processes with gloo: the masks of the shards together are those of the whole, ties and NaN included."""

from __future__ import annotations

import itertools
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fusedadapt.sparse import topk_mask, topk_threshold

B, F, H = torch.bfloat16, torch.float32, torch.float16
#: tensors of rank 0, tensors of rank 1: other counts, other dtypes, nothing at all
CUTS = {
    "like": ([(100, F), (33, F)], [(70, F), (5, F)]), "other dtypes": ([(100, B)], [(70, F), (5, H)]), "only 16 bits": ([(100, B)], [(301, B)]),
    "one has empty tensors": ([(0, F)], [(70, F)]), "one has none": ([(40, B), (3, B)], []), "the first has none": ([], [(50, F)]),
    "nobody": ([], []),
}  # fmt: skip


def data(n: int, dtype: torch.dtype, seed: int, kind: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.randn(n, generator=g).to(dtype)
    x = torch.randint(-2, 3, (n,), generator=g).float()
    return torch.where(x == 2, torch.nan, x).to(dtype) if kind == "nan" else x.to(dtype)


def check_masks(rank: int) -> None:
    for (name, cut), kind in itertools.product(CUTS.items(), ("random", "ties", "nan")):
        shards = [[data(n, d, 10 * r + i, kind) for i, (n, d) in enumerate(part)] for r, part in enumerate(cut)]
        others = [[data(n, d, 50 + 10 * r + i, kind) for i, (n, d) in enumerate(part)] for r, part in enumerate(cut)]
        whole, beside = shards[0] + shards[1], others[0] + others[1]
        first = 0 if rank == 0 else len(shards[0])
        total = sum(x.numel() for x in whole)
        options = [(0, "lowest_index", "highest", "abs"), (total, "exclusive", "lowest", "abs")]
        options += [(total // 3, ties, nan, "abs") for ties in ("lowest_index", "inclusive", "exclusive") for nan in ("highest", "lowest")]
        options += [(total // 3, "lowest_index", "highest", "abs_diff")]
        for k, ties, nan, score in options:
            second: dict[str, Any] = {} if score == "abs" else {"other": others[rank]}
            every: dict[str, Any] = {} if score == "abs" else {"other": beside}
            mine = topk_mask(shards[rank], k=k, ties=ties, nan=nan, score=score, group=dist.group.WORLD, **second)
            truth = topk_mask(whole, k=k, ties=ties, nan=nan, score=score, **every)[first : first + len(shards[rank])]
            assert len(mine) == len(truth) and all(a == b for a, b in zip(mine, truth)), (name, kind, k, ties, nan, score)
            if k:
                found, expected = (
                    topk_threshold(x, k=k, ties=ties, nan=nan, score=score, **more)
                    for x, more in ((shards[rank], {"group": dist.group.WORLD} | second), (whole, every))
                )
                assert str(found[:5]) == str(expected[:5]), (name, kind, k)
    x = torch.arange(10.0) + 100 * rank
    assert topk_mask(x, density=0.25, group=dist.group.WORLD).nnz == (0, 5)[rank]


def check_refusals(rank: int) -> None:
    """What one process alone can see is refused by both: nobody waits for the other."""
    x = torch.tensor([1.0, float("nan")]) if rank == 1 else torch.ones(3)
    for call in (lambda: topk_mask(x, k=1, nan="raise", group=dist.group.WORLD), lambda: topk_mask(x, k=6, group=dist.group.WORLD)):
        with pytest.raises(ValueError, match="NaN|k in 0..5"):
            call()
    with pytest.raises(ValueError, match='scope "global"'):
        topk_mask(x, k=1, scope="tensor", group=dist.group.WORLD)


CHECKS = {f.__name__: f for f in (check_masks, check_refusals)}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name, check in CHECKS.items():
        try:
            check(rank)
        except BaseException:  # noqa: BLE001 - told by the parent
            (Path(folder) / f"{name}.{rank}").write_text(traceback.format_exc())
            sys.exit(1)
        dist.barrier()
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    context = mp.spawn(worker, (str(tmp_path),), nprocs=2, join=False)
    try:
        until, done = time.monotonic() + 60, False
        while not done and time.monotonic() < until:
            done = context.join(timeout=1)
    except mp.ProcessExitedException:
        done = True
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    failures = {path.name: path.read_text() for path in tmp_path.glob("check_*")}
    assert not failures, "\n".join(failures.values())
    assert done, "the processes hang"

"""Tensors that only stand for others (a DTensor, a quantized weight) have no memory of their own: their address is 0, and reading there crashed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

from fusedadapt.sparse import (
    ColumnStats,
    Mask,
    MaskedLinear,
    SparseDelta,
    energy_histogram,
    merge,
    nm_mask,
    prune_model_,
    topk_mask,
    topk_threshold,
    wanda_mask,
)
from fusedadapt.sparse.delta import Entry


@pytest.fixture(scope="module", params=["DTensor", "TwoTensor"])
def wrap(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Tensor], Tensor]]:
    if request.param == "TwoTensor":
        yield lambda t: TwoTensor(t, t.clone())
        return
    store: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        yield lambda t: distribute_tensor(t, mesh, [Shard(0)])
    finally:
        dist.destroy_process_group()


def linear(weight: Tensor) -> nn.Sequential:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(weight)
    return nn.Sequential(layer)


DELTA = SparseDelta({"0.weight": Entry(torch.tensor([1, 5]), torch.tensor([1.0, 2.0]), torch.Size([8, 8]))}, "set")
CALLS: dict[str, Callable[[Any], Any]] = {
    "topk_mask": lambda w: topk_mask(w, k=5),
    "topk_mask of a list": lambda w: topk_mask([torch.randn(3), w], k=5),
    "topk_mask, other": lambda w: topk_mask(torch.randn(8, 8), k=5, score="abs_diff", other=w),
    "topk_mask of rows": lambda w: topk_mask(w, k=5, scope="row"),
    "topk_threshold": lambda w: topk_threshold(w, k=5),
    "nm_mask": lambda w: nm_mask(w, 2, 4),
    "wanda_mask": lambda w: wanda_mask(w, torch.ones(8), 0.5),
    "energy_histogram": energy_histogram,
    "ColumnStats": ColumnStats.of,
    "Mask.from_bool": lambda w: Mask.from_bool(w > 0),
    "prune_model_": lambda w: prune_model_(linear(w), 0.5),
    "MaskedLinear": lambda w: MaskedLinear.from_linear(linear(w)[0], torch.ones(8, 8, dtype=torch.bool)),
    "from_diff": lambda w: SparseDelta.from_diff({"w": w}, {"w": w + 1}),
    "from_diff, masks": lambda w: SparseDelta.from_diff({"w": w}, {"w": w + 1}, masks={"w": torch.ones(8, 8, dtype=torch.bool)}),
    "apply_": lambda w: DELTA.apply_(linear(w)),
    "swap_": lambda w: DELTA.swap_({"0.weight": w}),
    "merge": lambda w: merge({"w": torch.ones(8, 8)}, [{"w": w}], "task_arithmetic"),
}


@pytest.mark.parametrize("name", CALLS)
def test_wrapped_tensors_are_refused(wrap: Callable[[Tensor], Tensor], name: str) -> None:
    w = wrap(torch.randn(8, 8))
    with pytest.raises(ValueError, match="expected (tensors with memory of their own|name -> dense tensor)"):
        CALLS[name](w)
    assert not DELTA.applied

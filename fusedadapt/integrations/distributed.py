"""Sharded parameters (DTensor, FSDP2): what must be known of all shards before one is stepped.

Element-wise rules act on each process's shard alone. Global norms and found_inf are reduced over the mesh; every process that holds the parameters
must call ``step`` (an empty shard takes part with nothing).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Shard

if TYPE_CHECKING:
    from ..optim.base import FusedOptimizer
    from ..optim.plans import Plan


def _sharded_dims(t: DTensor) -> tuple[int, ...]:
    """Mesh dimensions over which the tensor is cut (the others hold copies)."""
    for placement in t.placements:
        if placement.is_partial():
            raise ValueError(f"optimizer: expected sharded or replicated tensors; got placements {t.placements}; reduce it first with redistribute()")
    return tuple(i for i, placement in enumerate(t.placements) if not placement.is_replicate())


def index_map(p: DTensor) -> tuple[int, int, int]:
    """(base, inner, outer): element i of the local shard is global row-major element base + (i // inner) * outer + i % inner."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    cut = [placement for placement in p.placements if not placement.is_replicate()]
    dims = {getattr(placement, "dim", -1) for placement in cut}
    if not dims:
        return 0, 0, 0
    if len(dims) > 1 or any(type(placement) is not Shard for placement in cut):
        raise ValueError(
            f"stochastic_rounding: expected a parameter cut along one dimension; got placements {p.placements}; "
            'use master_weights="split", which needs no random numbers'
        )
    (d,) = dims
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    below = math.prod(p.shape[d + 1 :])
    return offset[d] * below, shape[d] * below, p.shape[d] * below


def cut_gradient(p: DTensor, name: str) -> Tensor | None:
    """This process's part of a gradient that is not cut as its parameter is (a sum that is still to be made, say), redistributed: every process must
    call this for it. None: the gradient can be read as it lies."""
    g = p.grad
    if not isinstance(g, DTensor):
        return None
    if g.device_mesh != p.device_mesh:
        raise ValueError(f"optimizer: expected the gradient of {name} on its mesh {p.device_mesh}; got {g.device_mesh}; use one mesh for both")
    alike = g.placements == p.placements
    with torch.no_grad():
        here = (g if alike else g.redistribute(placements=p.placements))._local_tensor
    if isinstance(here, AsyncCollectiveTensor):
        return here.wait()
    return None if alike else here


def cut_as(values: Tensor, like: DTensor) -> DTensor:
    """A DTensor of this process's values, cut as ``like`` is."""
    return DTensor.from_local(values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def sum_squares(plan: Plan, squares: Tensor) -> Tensor:
    """The sum over all shards: copies are counted once."""
    totals: dict[tuple[Any, tuple[int, ...]], Tensor] = {}
    for e, value in zip(plan.owners(), squares, strict=True):
        key = (e.param.device_mesh, _sharded_dims(e.param)) if isinstance(e.param, DTensor) else (None, ())
        totals[key] = totals[key] + value if key in totals else value.clone()
    total = torch.zeros((), dtype=torch.float64, device=plan.device)
    for (mesh, dims), part in totals.items():
        for dim in dims:
            dist.all_reduce(part, group=mesh.get_group(dim))
        total = total + part
    return total


def any_rank(opt: FusedOptimizer, found_inf: Tensor) -> Tensor:
    """found_inf, nonzero if any process that shares a mesh with us found one."""
    found = getattr(found_inf, "_local_tensor", found_inf).clone()
    meshes = {p.device_mesh: None for g in opt.param_groups for p in g["params"] if isinstance(p, DTensor)}
    for mesh in meshes:
        for dim in range(mesh.ndim):
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=mesh.get_group(dim))
    return found

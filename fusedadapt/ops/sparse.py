"""Which backend runs a primitive of the sparse family. The backends share the functions of `ops.sparse_cpp`; `reference.sparse_parts` has them in
pure PyTorch for any device."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import config, dispatch
from ..derivatives import refuse_transforms, transforming

# A primitive may be in any of a backend's modules.
_MODULES = {
    "reference": ("reference.sparse_parts",),
    "cpp": ("ops.sparse_cpp", "ops.merge_cpp"),
    "triton": ("kernels.sparse",),
    "cuda": ("ops.sparse_cuda",),
    "emulated": ("ops.sparse_cuda",),
}
#: whose result, or its size, depends on the elements
_READERS = (
    "pack", "from_indices", "indices", "prefix", "histogram", "select", "mark", "rows", "nm", "energy", "cuts", "merge_", "votes", "norms",
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"fusedadapt.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"fusedadapt.{name}":
            raise
        return None


@functools.cache
def _find(backend: str, op: str) -> Any:
    """What a backend calls `op`, or None."""
    modules = (_module(name) for name in _MODULES[backend])
    return next((getattr(m, op) for m in modules if hasattr(m, op)), None)


@functools.lru_cache(maxsize=256)
def _choose(op: str, device_type: str, fp64: bool, wish: str | None, strict: bool) -> dispatch.Choice:
    unfit = {name: f"it has no kernel for {op}" for name in _MODULES if _find(name, op) is None}
    if fp64:
        unfit |= {name: "float64 tensors" for name in _MODULES if name != "reference"}
    return dispatch.pick(f"sparse.{op}", device_type, unfit=unfit)


def choose(op: str, device_type: str, dtype: torch.dtype = torch.float32) -> dispatch.Choice:
    """The backend of one primitive for tensors of this device and dtype, and why."""
    return _choose(op, device_type, dtype == torch.float64, config.current_backend(), config.is_strict())


def run(op: str, data: Tensor) -> Callable[..., Any]:
    """The primitive `op` of the backend chosen for `data`.

    Raises:
        RuntimeError: a torch.func transform holds the tensor: it has no memory to read. ValueError: it is on the meta device, and `op` depends on it;
            or a subclass without memory (`check_memory`).
    """
    if data.device.type == "meta" and op in _READERS:
        raise ValueError(f"fusedadapt.sparse: expected tensors with elements; got one on the meta device ({op}); materialise it first, e.g. to_empty")
    if transforming() and torch._C._functorch.is_functorch_wrapped_tensor(data):
        refuse_transforms("fusedadapt.sparse")
    check_memory(data)
    return _find(choose(op, data.device.type, data.dtype).backend, op)


def check_memory(t: Tensor) -> None:
    """ValueError for a subclass that only stands for other tensors (a DTensor, torchao's quantized weights, a FakeTensor): its address is 0."""
    if type(t) in (Tensor, Parameter) or t.device.type == "meta":
        return
    if is_traceable_wrapper_subclass(t) or (t.numel() and t.data_ptr() == 0):
        raise ValueError(
            f"fusedadapt.sparse: expected tensors with memory of their own; got a {type(t).__name__} of shape {tuple(t.shape)}; of a DTensor pass "
            "to_local() or full_tensor(), of a quantized weight the dense one"
        )


def move_all(op: str, jobs: Sequence[tuple[Tensor, Tensor, Tensor]], alpha: float = 1.0) -> None:
    """gather, scatter, add or swap for any number of (x, positions, values): one launch for each device, whatever the number of tensors."""
    groups: dict[tuple[torch.device, bool], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for job in jobs:
        check_memory(job[0])
        check_memory(job[2])
        groups.setdefault((job[0].device, job[0].dtype == torch.float64), []).append(job)
    for group in groups.values():
        run("move_all", group[0][0])(op, group, alpha)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x[index] of a flat x, in x's dtype."""
    values = torch.empty(index.numel(), dtype=x.dtype, device=x.device)
    move_all("gather", [(x, index, values)])
    return values


def readable(x: Tensor) -> Tensor:
    """Contiguous, in a dtype that kernels read: scores are fp32, so rounding to it first changes none."""
    check_memory(x)
    x = x.detach()
    return (x if x.dtype in DTYPES else x.float()).contiguous().resolve_neg()


def levels(data: Tensor, score: str) -> tuple[tuple[int, int], ...]:
    """(shift, bits) of the histogram passes that resolve keys of `data` exactly, from the top down."""
    sixteen = score == "abs" and data.dtype == torch.bfloat16
    backend = choose("histogram", data.device.type, data.dtype).backend
    found: tuple[tuple[int, int], ...] = _find(backend, "LEVELS16" if sixteen else "LEVELS")
    return found

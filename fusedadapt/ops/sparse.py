"""Which backend runs a primitive of the sparse family. The backends share the functions of `ops.sparse_cpp`; `reference.sparse_parts` has them in
pure PyTorch for any device."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import config, dispatch

_MODULES = {
    "reference": "reference.sparse_parts",
    "cpp": "ops.sparse_cpp",
    "triton": "kernels.sparse",
    "cuda": "ops.sparse_cuda",
    "emulated": "ops.sparse_cuda",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _module(backend: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"fusedadapt.{_MODULES[backend]}")
    except ModuleNotFoundError as error:
        if error.name != f"fusedadapt.{_MODULES[backend]}":
            raise
        return None


@functools.lru_cache(maxsize=256)
def _choose(op: str, device_type: str, fp64: bool, wish: str | None, strict: bool) -> dispatch.Choice:
    unfit = {name: f"it has no kernel for {op}" for name in _MODULES if not hasattr(_module(name), op)}
    if not hasattr(dispatch.core(), "sparse"):
        unfit["cpp"] = "the compiled core has no sparse part"
    if fp64:
        unfit |= {name: "float64 tensors" for name in _MODULES if name != "reference"}
    return dispatch.pick(f"sparse.{op}", device_type, unfit=unfit)


def choose(op: str, device_type: str, dtype: torch.dtype = torch.float32) -> dispatch.Choice:
    """The backend of one primitive for tensors of this device and dtype, and why."""
    return _choose(op, device_type, dtype == torch.float64, config.current_backend(), config.is_strict())


def run(op: str, data: Tensor) -> Callable[..., Any]:
    """The primitive `op` of the backend chosen for `data`."""
    return getattr(_module(choose(op, data.device.type, data.dtype).backend), op)


def levels(data: Tensor, score: str) -> tuple[tuple[int, int], ...]:
    """(shift, bits) of the histogram passes that resolve keys of `data` exactly, from the top down."""
    module = _module(choose("histogram", data.device.type, data.dtype).backend)
    sixteen = score == "abs" and data.dtype in (torch.bfloat16,)
    found: tuple[tuple[int, int], ...] = getattr(module, "LEVELS16" if sixteen else "LEVELS")
    return found

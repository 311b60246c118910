"""Where torch's C functions are: what the compiled table needs to read tensors without asking Python for each."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from .. import dispatch

_known: dict[int, Any] = {}


def shim() -> Any:
    """``_core.Shim``, or None where there is no compiled core or this torch lacks a function: tensors are then read through DLPack."""
    core = dispatch.core()
    if core is None:
        return None
    if id(core) not in _known:
        _known[id(core)] = _make(core)
    return _known[id(core)]


def _make(core: Any) -> Any:
    try:
        library = ctypes.CDLL(torch._C.__file__)  # loaded already; a name is searched in the libraries it depends on, too
        addresses = [ctypes.cast(library[name], ctypes.c_void_p).value for name in core.SHIM_NAMES]
        with torch.inference_mode(False):  # the probe's version is looked for; tensors made in inference mode have none
            return core.Shim(addresses, torch.nn.Parameter(torch.zeros(0, dtype=torch.float32, device="cpu"), requires_grad=False))
    except (OSError, AttributeError, ValueError):
        return None

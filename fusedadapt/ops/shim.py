"""Where torch's C functions are: what the compiled table needs to read tensors without asking Python for each."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

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


def torch_library() -> ctypes.CDLL:
    """Loaded already; a name is searched in the libraries it depends on, too."""
    return ctypes.CDLL(torch._C.__file__)


def _make(core: Any) -> Any:
    try:
        library = torch_library()
        addresses = [ctypes.cast(library[name], ctypes.c_void_p).value for name in core.SHIM_NAMES]
        with torch.inference_mode(False):  # the probe's version is looked for; tensors made in inference mode have none
            shim = core.Shim(addresses, torch.nn.Parameter(torch.zeros(0, dtype=torch.float32, device="cpu"), requires_grad=False))
            return shim if shim.learn(*_examples()) else None
    except (OSError, AttributeError, ValueError):
        return None


def _examples() -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that differ only in what they went through, and tensors that differ from them in what the table must notice."""
    shape = (2, 3, 4, 5, 6)

    def new(*sizes: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        return torch.zeros(sizes, dtype=dtype, device=device)

    with torch.enable_grad():
        leaf = torch.nn.Parameter(new(*shape))
        graph = leaf * 2
        graph.sum().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        # (a version counter, a graph, a gradient, a shared counter, an in-place write, a gradient of its own, a beginning within its storage)
        same = [new(*shape), leaf, leaf.grad, leaf.detach(), leaf.data, graph.detach(), new(*shape).add_(1), new(*shape).requires_grad_()]
        same.append(new(3, *shape)[1])
        core: Any = dispatch.core()
        for byte in () if core is None else (0, 255):  # between the members of a tensor lies what was there before
            core.Shim.soil(byte)
            same += [new(*shape) for _ in range(4)]
    dtypes = [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
    other = [new(*shape, dtype=dtype) for dtype in dtypes]
    other += [new(*sizes) for sizes in ((6, 3, 4, 5, 2), (2, 3, 4, 30), (720,), (), (0,), (2, 3, 4, 5, 7))]
    other += [new(*shape).transpose(0, 1), new(6, 5, 4, 3, 2).permute(4, 3, 2, 1, 0), new(2, *shape[1:], 2)[..., 1]]
    other += [new(*shape, device="meta"), new(4, 4).to_sparse()]
    # Not for users, hence not in every torch: a view that stands for its negative, a copy that shares its memory until it is written to.
    other += [getattr(torch, name)(new(*shape)) for name in ("_neg_view", "_lazy_clone") if hasattr(torch, name)]
    return same, other

"""Where a tensor lies, for the backends in C++, and whether it may be read there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)
_strided = torch.strided


def readable(t: Any) -> bool:
    """Whether kernels may take t by its address: on a CPU, nobody's subclass, row-major, in memory as its values are. (Zeros that autograd makes up
    and tensors of torch's functionalization have no address.)"""
    plain = type(t) in PLAIN and t.is_cpu and t.layout is _strided and t.is_contiguous() and not t.is_neg() and not t.is_nested
    return plain and t.data_ptr() != 0


def shaped(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What torch.empty_like makes row-major tensors of this shape from, which takes half the time of torch.empty. One element of memory."""
    return torch.empty(1, dtype=dtype, device="cpu").expand(shape)


def address(op: str, t: Tensor | None) -> int:
    """0 for None. ValueError for a tensor that has lost its memory (a parameter that FSDP has given back, a zero tensor of autograd's): it would pass
    for None, or be read all the same."""
    if t is None:
        return 0
    found = t.data_ptr()
    if not found and t.numel():
        raise ValueError(
            f"fusedadapt.{op}: expected tensors with memory; got {t.dtype} {tuple(t.shape)} without; use it where its storage is there (of a sharded "
            "parameter: inside the forward that gathers it)"
        )
    return found

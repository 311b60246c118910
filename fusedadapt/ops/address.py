"""Where a tensor lies, for the backends in C++."""

from __future__ import annotations

from torch import Tensor


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

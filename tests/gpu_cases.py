"""Where the GPU tests run: on a GPU if there is one (`bench/gpu.sh`). Elsewhere the same tests take a few cases to the CUDA kernels under the
emulator and to the Triton kernels under the interpreter; what only a GPU has (streams, graphs, its memory) is skipped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
GPU = DEVICE.type == "cuda"
#: under a sanitizer a few cases are enough: GPU_CASES=few
MANY = GPU and os.environ.get("GPU_CASES", "many") != "few"
BACKENDS = ("cuda", "triton") if GPU else ("emulated", "triton")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases(on_gpu: int, elsewhere: int) -> int:
    return on_gpu if MANY else elsewhere


def same(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, dtypes and bits, wherever they are; a NaN equals a NaN."""
    a, b = a.detach().cpu(), b.detach().cpu()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or a.dtype.itemsize == 1:
        return torch.equal(a.view(torch.uint8) if a.dtype.itemsize == 1 else a, b.view(torch.uint8) if b.dtype.itemsize == 1 else b)
    equal = (a == b) & (a.signbit() == b.signbit()) | a.isnan() & b.isnan()
    return bool(equal.all())


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def allocations(step: Callable[[], None]) -> tuple[int, int]:
    """Blocks the step takes from torch's GPU allocator, and how often that has to ask CUDA for memory."""

    def counts() -> tuple[int, int]:
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        return stats["allocation.all.allocated"], stats["segment.all.allocated"]

    before = counts()
    step()
    after = counts()
    return after[0] - before[0], after[1] - before[1]


@contextlib.contextmanager
def room_for(gibibytes: float) -> Iterator[None]:
    """One test at a time, of all processes, takes this much GPU memory; skipped where less is free."""
    with open(os.path.join(tempfile.gettempdir(), "fusedadapt-large.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gibibytes:
            pytest.skip(f"needs {gibibytes} GiB of free GPU memory; {free:.1f} there")
        yield
        torch.cuda.empty_cache()

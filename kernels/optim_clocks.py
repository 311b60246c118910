"""Step counts and carried scalars of all tensors, gathered through the table into one array and written back.

clocks[i] = (step, aux0, aux1) of tensor i, in fp64. Bytes moved: a few per tensor; one launch for any number of tensors.
"""

import torch
import triton
import triton.language as tl

from .common import AUX0, AUX1, STEP_AT, WORDS, program

BLOCK = 256


@triton.jit
def _read(desc, clocks, n, BLOCK: tl.constexpr):
    i = program() * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    step = tl.load(tl.load(desc + i * WORDS + STEP_AT, here, 0).to(tl.pointer_type(tl.float32)), here, 0.0)
    tl.store(clocks + i * 3, step.to(tl.float64), here)
    aux0, aux1 = tl.load(desc + i * WORDS + AUX0, here, 0), tl.load(desc + i * WORDS + AUX1, here, 0)
    tl.store(clocks + i * 3 + 1, tl.load(aux0.to(tl.pointer_type(tl.float64)), here & (aux0 != 0), 0.0), here)
    tl.store(clocks + i * 3 + 2, tl.load(aux1.to(tl.pointer_type(tl.float64)), here & (aux1 != 0), 0.0), here)


@triton.jit
def _write(desc, clocks, n, BLOCK: tl.constexpr):
    i = program() * BLOCK + tl.arange(0, BLOCK)
    here = i < n
    step = tl.load(clocks + i * 3, here, 0.0).to(tl.float32)
    tl.store(tl.load(desc + i * WORDS + STEP_AT, here, 0).to(tl.pointer_type(tl.float32)), step, here)
    aux0, aux1 = tl.load(desc + i * WORDS + AUX0, here, 0), tl.load(desc + i * WORDS + AUX1, here, 0)
    tl.store(aux0.to(tl.pointer_type(tl.float64)), tl.load(clocks + i * 3 + 1, here, 0.0), here & (aux0 != 0))
    tl.store(aux1.to(tl.pointer_type(tl.float64)), tl.load(clocks + i * 3 + 2, here, 0.0), here & (aux1 != 0))


def read_clocks(desc: torch.Tensor) -> torch.Tensor:
    """fp64 [n, 3] for an int64 [n, 26] table; absent scalars read as 0."""
    clocks = torch.empty(len(desc), 3, dtype=torch.float64, device=desc.device)
    with torch.cuda.device_of(desc):  # Triton launches on the current device
        _read[(triton.cdiv(len(desc), BLOCK),)](desc, clocks, len(desc), BLOCK)
    return clocks


def write_clocks(desc: torch.Tensor, clocks: torch.Tensor) -> None:
    """Writes ``clocks`` (as :func:`read_clocks` returns them) through the table. Tensors may share a clock if they agree on its value."""
    with torch.cuda.device_of(desc):
        _write[(triton.cdiv(len(desc), BLOCK),)](desc, clocks, len(desc), BLOCK)

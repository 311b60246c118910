"""A tensor of more than 2^31 elements: sizes and offsets are 64-bit all the way down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusedadapt.optim import SGD

ELEMENTS = 2**31 + 4096 + 5  # past every 32-bit count, and no multiple of anything
NEEDED = 12e9  # bytes: parameter and gradient in bf16 are 8.6e9, the rest is what the machine may be doing beside


def available() -> int:
    """Bytes that can be had without swapping, from Linux's own estimate."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    if not Path("/proc/meminfo").exists():
        pytest.skip("no /proc/meminfo to read the free memory from")
    if (free := available()) < NEEDED:
        pytest.skip(f"needs {NEEDED / 1e9:.0f} GB of free memory; {free / 1e9:.1f} GB are there, {(NEEDED - free) / 1e9:.1f} GB are missing")
    p = torch.nn.Parameter(torch.zeros(ELEMENTS, dtype=torch.bfloat16))
    p.grad = torch.zeros(ELEMENTS, dtype=torch.bfloat16)  # zeroed pages: they cost memory only once they are written
    spots = [0, 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, ELEMENTS - 6, ELEMENTS - 1]
    marks = torch.arange(1.0, len(spots) + 1)
    p.grad[spots] = marks.bfloat16()
    opt = SGD([p], lr=0.5, max_grad_norm=1e9)
    opt.step()
    with torch.no_grad():
        assert p[spots].tolist() == (-0.5 * marks).tolist()
        p[spots] = 0
        for start in (0, 2**31 - 2**20, ELEMENTS - 2**20):  # a wrapped offset would have written somewhere near the ends
            assert not p[start : start + 2**20].any(), f"elements near {start} were written"
        assert p.count_nonzero() == 0
    assert opt.grad_norm == marks.double().square().sum().sqrt().float()
    assert opt.state[p]["step"] == 1

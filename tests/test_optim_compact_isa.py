"""Compact states behind a mask: every instruction set moves the same elements, and none beside them."""

import pytest
import torch

from fusedadapt.optim import AdamW


def some_of(n: int) -> torch.Tensor:
    """Full words, empty ones, single bits, and a tenth or a half at random."""
    mask = torch.rand(n, generator=torch.Generator().manual_seed(3)) < (0.1 if n % 2 else 0.5)
    mask[100:300], mask[1024:8192], mask[8500:8600] = True, False, True
    mask[min(2000, n - 1)] = mask[-1] = True
    return mask


@pytest.mark.parametrize("given", [False, True], ids=["dense gradient", "compact gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set_moves_the_same_elements(dtype: torch.dtype, given: bool) -> None:
    core = pytest.importorskip("fusedadapt._core")
    before, found = core.isa(), {}
    for n in (33, 64, 65, 127, 1000, 9001, 300001):
        try:
            for isa in ("base", "avx2", "avx512"):
                if not core.use_isa(isa):
                    continue
                memory = torch.full((n + 16,), 7.0, dtype=dtype)  # what lies beside the parameter must stay, too
                p = torch.nn.Parameter(memory[8 : n + 8])
                p.data.copy_(torch.randn(n, generator=torch.Generator().manual_seed(1)))
                mask = some_of(n)
                opt = AdamW([p], lr=0.01, masks={p: mask}, mask_state="compact", backend="cpp")
                for t in range(3):
                    p.grad = torch.randn(n, generator=torch.Generator().manual_seed(t)).to(dtype)
                    p.compact_grad = p.grad[mask] if given else None
                    opt.step()
                assert "prefix" in opt.state[p]
                kept = {k: v for k, v in opt.state[p].items() if isinstance(v, torch.Tensor)}
                found.setdefault(n, []).append((memory, kept))
        finally:
            core.use_isa(before)
    for runs in found.values():
        for memory, kept in runs[1:]:
            assert torch.equal(memory, runs[0][0]) and all(torch.equal(v, runs[0][1][k]) for k, v in kept.items())
        assert (runs[0][0][:8] == 7).all() and (runs[0][0][-8:] == 7).all()

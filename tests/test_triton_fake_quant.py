"""The Triton kernels of fake quantization, interpreted, against the pure PyTorch truth: equal bits, sums within rounding."""

import fake_quant_cases as cases
import pytest
import torch
import triton

import fusedadapt as fa
from fusedadapt.quant import fake_quantize

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("quick_calls")]


def test_runs_interpreted():
    assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before triton is imported (tests/conftest.py does)"


@pytest.mark.parametrize("number, dtype", cases.pairs())
def test_triton_is_the_reference(number, dtype):
    cases.check_against_reference(number, dtype, number % 2 == 0, "triton")


def test_unaligned_x_and_more_than_one_program():
    for x, cut, groups in (
        (torch.randn(20_001)[1:], {}, 1),
        (torch.randn(300, 130), {"axis": 1}, 130),
        (torch.randn(20_001)[1:].view(2, -1), {"axis": 0}, 2),
    ):
        scale, found = torch.rand(groups) + 0.1, {}
        for backend in ("triton", "reference"):
            with fa.backend(backend):
                leaves = [x.clone().requires_grad_() if cut.get("axis") == 1 else x.detach().requires_grad_(), scale.clone().requires_grad_()]
                y = fake_quantize(*leaves, quant_min=-8, quant_max=7, **cut)
                found[backend] = [y, *torch.autograd.grad(y, leaves, x)]
        for i, (one, other) in enumerate(zip(*found.values(), strict=True)):
            assert cases.same_bits(one, other) if i < 2 else torch.allclose(one, other, rtol=1e-5, atol=1e-3), (i, cut)


def test_repeats_to_the_bit():
    given = cases.case(4, torch.float32)
    first, second = cases.run(given, "triton"), cases.run(given, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)

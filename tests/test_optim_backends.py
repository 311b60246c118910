"""Every rule on every backend present, against the reference in fp32: the same bits in parameters and states."""

import numpy as np
import pytest
import torch

from fusedadapt import dispatch
from fusedadapt.optim import OPTIMIZERS
from fusedadapt.reference.random import random16

BACKENDS = ["cpp", "triton", "emulated"]
# pow comes from different libraries: within 2 ulp there, equal bits everywhere else
TRANSCENDENTAL = {("AdaHessian", 1)}
CASES = [(name, k) for name, cls in OPTIMIZERS.items() for k in range(len(cls.examples))]
SHAPES = [(), (0,), (1,), (3, 5), (16,), (17,), (2, 3, 4), (521,)]


def parameters(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in SHAPES]


def gradients(params: list, seed: int) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [(torch.randn(p.shape, generator=gen) * 10 ** torch.empty(p.shape).uniform_(-6, 2, generator=gen)).to(p.dtype) for p in params]


def run(name: str, options: dict, dtype: torch.dtype, backend: str, steps: int = 3, masks: bool = False) -> tuple[list, list]:
    params = parameters(dtype)
    if masks:
        gen = torch.Generator().manual_seed(7)
        options = options | {"masks": {p: torch.rand(p.shape, generator=gen) < 0.5 for p in params[2:]}}
    opt = OPTIMIZERS[name](params, lr=0.01, weight_decay=0.1, backend=backend, **options)
    if hasattr(opt, "train"):
        opt.train()
    for t in range(steps):
        for k, (p, g) in enumerate(zip(params, gradients(params, t), strict=True)):
            p.grad = None if (t + k) % 5 == 4 else g
            if name == "AdaHessian":
                p.hessian_diag = g.float().abs()
        opt.step()
    assert {plan.choice.backend for plan in opt._plans} == {backend}, "the backend asked for must be the one that ran"
    return [p.detach() for p in params], [opt.state[p] for p in params]


def assert_equal_runs(a: tuple, b: tuple, ulp: int = 0) -> None:
    for x, y in zip(a[0], b[0], strict=True):
        assert_bits(x, y, ulp)
    for s, r in zip(a[1], b[1], strict=True):
        assert s.keys() == r.keys()
        for k in s:
            assert_bits(s[k], r[k], ulp)


def assert_bits(x: torch.Tensor, y: torch.Tensor, ulp: int) -> None:
    assert x.dtype == y.dtype
    if ulp == 0:
        assert torch.equal(x, y) or torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())
    else:
        torch.testing.assert_close(x, y, rtol=ulp * torch.finfo(x.dtype).eps, atol=1e-30, equal_nan=True)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, quick_calls: None) -> str:
    absent = dispatch.available_backends("cpu")[request.param]
    assert not absent, f"{request.param}: {absent} (python setup.py build_emulated builds the emulated one)"
    return request.param


@pytest.mark.parametrize(("name", "k"), CASES)
def test_fp32(name: str, k: int, backend: str) -> None:
    options = OPTIMIZERS[name].examples[k]
    # a power that is 2 ulp off feeds the next steps: allow for three of them
    ulp = 8 if (name, k) in TRANSCENDENTAL else 0
    assert_equal_runs(run(name, options, torch.float32, backend), run(name, options, torch.float32, "reference"), ulp)


MIXES = {
    "bf16": (torch.bfloat16, {}),
    "bf16-fp32-states": (torch.bfloat16, {"state_dtype": "fp32"}),
    "fp16-fp16-states": (torch.float16, {"state_dtype": "fp16"}),
    "fp16-fp32-states": (torch.float16, {"state_dtype": "fp32"}),
    "fp32-bf16-states": (torch.float32, {"state_dtype": "bf16"}),
    "bf16-split": (torch.bfloat16, {"state_dtype": "fp32", "master_weights": "split"}),
    "bf16-master": (torch.bfloat16, {"master_weights": "fp32"}),
    "fp16-master": (torch.float16, {"state_dtype": "fp32", "master_weights": "fp32"}),
    "bf16-stochastic": (torch.bfloat16, {"stochastic_rounding": True, "seed": 1234567890123}),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("masks", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", ["AdamW", "AdaBelief", "Lion", "SGD"])
def test_storage(name: str, mix: str, masks: bool, backend: str) -> None:
    dtype, options = MIXES[mix]
    options = options | {"max_grad_norm": 0.5, "maximize": name == "SGD"}
    a, b = (run(name, options, dtype, which, masks=masks) for which in (backend, "reference"))
    assert_equal_runs(a, b)


def test_every_instruction_set_gives_the_same_bits() -> None:
    from fusedadapt import _core

    best, ran = _core.isa(), 0
    truth = run("AdamW", {}, torch.float32, "reference"), run("Adam", MIXES["fp16-fp16-states"][1], torch.float16, "reference")
    try:
        for isa in ("base", "avx2", "avx512"):
            if _core.use_isa(isa):
                ran += 1
                assert_equal_runs(run("AdamW", {}, torch.float32, "cpp"), truth[0])
                assert_equal_runs(run("Adam", MIXES["fp16-fp16-states"][1], torch.float16, "cpp"), truth[1])
    finally:
        _core.use_isa(best)
    assert ran >= 1


def test_stochastic_rounding_is_unbiased() -> None:
    """Over many seeds the mean of the rounded parameter is the fp32 one, within three standard errors per element, for both signs and all sizes."""
    n, seeds = 64, 1024
    start = torch.cat([torch.linspace(-2, 2, n // 2), torch.logspace(-30, 30, n // 2)]).to(torch.bfloat16)
    g = torch.full((n,), 1e-3) * start.float().abs()
    exact = start.float() - 0.37 * g
    ulp = torch.maximum(start.float().abs(), torch.tensor(1e-38)) * 2**-7
    total = torch.zeros(n, dtype=torch.float64)
    for seed in range(seeds):
        p = torch.nn.Parameter(start.clone())
        p.grad = g.to(torch.bfloat16)
        OPTIMIZERS["SGD"]([p], lr=0.37, stochastic_rounding=True, seed=seed).step()
        total += p.detach().double()
    exact = start.double() - torch.tensor(0.37, dtype=torch.float32).double() * g.to(torch.bfloat16).double()
    error = (total / seeds - exact).abs() / ulp
    assert error.max() < 3 * 0.5 / seeds**0.5 + 2**-15, error.max()
    assert torch.unique(total / seeds).numel() > n // 2


def test_stochastic_rounding_keeps_special_values() -> None:
    from fusedadapt import _core

    top = torch.finfo(torch.bfloat16).max
    for value, expected in ((float("inf"), 0x7F80), (float("-inf"), 0xFF80), (3.39e38, 0x7F7F), (-3.39e38, 0xFF7F), (0.0, 0), (-0.0, 0x8000)):
        assert _core.float_to_bf16_stochastic(value, 0xFFFF) == expected, value
    assert _core.float_to_bf16_stochastic(float("nan"), 0xFFFF) & 0x7FFF > 0x7F80
    assert _core.float_to_bf16(top) == 0x7F7F


def test_philox_known_answers() -> None:
    """The published test vectors of Philox4x32-10 (Random123 kat_vectors), mapped to (seed, block, tensor, step)."""
    from fusedadapt import _core
    from fusedadapt.reference.optim import philox

    ones = 2**32 - 1
    assert _core.philox(0, 0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert _core.philox(2**64 - 1, 2**64 - 1, ones, ones) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = _core.philox(0x299F31D0A4093822, 0x85A308D3243F6A88, 0x13198A2E, 0x03707344)
    assert pi == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    assert tuple(philox(0x299F31D0A4093822, np.uint64(0x85A308D3243F6A88), 0x13198A2E, 0x03707344)) == pi


@pytest.mark.parametrize("first", [0, 5, 2**63 - 9, 2**64 - 24])
def test_neighbours_in_order_have_the_bits_that_each_has_alone(first: int) -> None:
    from fusedadapt import _core

    element = np.arange(24, dtype=np.uint64) + np.uint64(first)
    together = random16(9, element.reshape(4, 6), 3, 4)
    assert together.shape == (4, 6) and together.view(-1).tolist() == [_core.random16(9, int(e), 3, 4) & 0xFFFF for e in element]
    assert torch.equal(random16(9, element[::-1], 3, 4), together.view(-1).flip(0))

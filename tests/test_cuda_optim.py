"""The CUDA kernels, run by the emulator, against the C++ CPU sweep through the same table: equal bits; NaN payloads aside."""

import itertools
import math

import numpy as np
import pytest
import torch

try:
    from fusedadapt import _core_emulated as core
except ImportError as error:
    raise ImportError(f"tests/test_cuda_optim.py: fusedadapt._core_emulated is missing ({error}); run: python setup.py build_emulated") from error

F, B, H = torch.float32, torch.bfloat16, torch.float16
CHUNK = 2048
SIZES = (0, 1, 7, 8, 9, 17, 1000, 4097)
# parameter, gradient, states, master
STORAGE = (
    (F, F, (F, F, F), None),
    (B, B, (B, B, B), None),
    (H, H, (H, H, H), None),
    (B, B, (F, F, F), None),
    (F, B, (B, F, H), None),
    (B, F, (F, B, H), "fp32"),
    (B, B, (F, F, F), "split"),
    (H, H, (F, F, F), "fp32"),
)
BASE = dict(
    lr=3e-3, beta1=0.87, beta2=0.98, beta3=0.995, eps=1e-7, sign=1.0, momentum=0.85, dampening=0.1, lr_decay=0.01, mu_base=0.9998, alpha=4.0,
    alpha_warmup=50, beta3_warmup=50, half1=4.0, half3=130.0, rho=0.04, power=1.0, warmup=10, weight_lr_power=2.0, degenerated=1.0,
)  # fmt: skip
GROUPS = ({}, dict(l2=0.03, sign=-1.0, rectify=1.0, nesterov=1.0), dict(decoupled=0.2, rectify=1.0, degenerated=0.0, clip=0.3, power=0.5))
CLOCKS = (0.0, 3.0, 200.0)
PLACES = ((0, 0, 0), (48, 0, 0), (5, 0, 0), (2**33 + 3, 7, 20))  # base, inner, outer: how a shard lies in its whole tensor
HOSTILE = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 3e38, -7e4, 1e-30])
RULES = [name for name, _, _ in core.RULES]
SCALED = dict(grad_scale=torch.tensor(3.0), clip=torch.tensor(0.7), found_inf=torch.tensor(0.0), seed=2**63 + 12345, stochastic=True)


def place(values: torch.Tensor, dtype: torch.dtype, misaligned: bool) -> torch.Tensor:
    storage = torch.full((values.numel() + 17,), 0, dtype=dtype)
    start = -storage.data_ptr() % 16 // storage.element_size() + misaligned
    return storage[start : start + values.numel()].copy_(values)


def address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()]).clone()


def configure(rule: str) -> tuple[list[list[float]], int]:
    hypers = [[float({**BASE, **group}.get(name, 0.0)) for name in core.HYPER_FIELDS] for group in GROUPS]
    return hypers, RULES.index(rule)


class Fleet:
    """Parameters with gradients and states in a table. The same arguments give the same bits at other addresses."""

    def __init__(self, rule: str, cases: list, share_clock: bool = False):
        self.hypers, self.index = configure(rule)
        self.states = core.RULES[self.index][1]
        self.table = core.Table(torch.Tensor.__dlpack_c_exchange_api__, None, [f"s{k}" for k in range(self.states)], ["aux0", "aux1"], "master", 1, 0)
        self.table.set_hypers(self.hypers)
        self.cases, self.tensors = cases, []
        shared = (torch.tensor(5.0), torch.tensor(0.7, dtype=torch.float64), torch.tensor(1e-3, dtype=torch.float64))
        for number, (size, (p, g, s, master), masked, misaligned) in enumerate(cases):
            random = torch.Generator().manual_seed(number)
            param, grad = torch.randn(size, generator=random), torch.randn(size, generator=random) * 10.0 ** (number % 5 - 3)
            if size >= 16 and number % 3 == 0:
                grad[:8], param[4:12] = HOSTILE, HOSTILE.flip(0)
            state = {f"s{k}": place(torch.randn(size, generator=random).abs() * 0.1, s[k], misaligned) for k in range(self.states)}
            own = (torch.tensor(CLOCKS[number % 3]), shared[1].clone(), shared[2].clone())
            state["step"], state["aux0"], state["aux1"] = shared if share_clock else own
            if master == "split":
                param[param.isnan()] = 1.0
                state["master"] = place(torch.randint(-32768, 32767, (size,), generator=random), torch.int16, misaligned)
            elif master:
                state["master"] = place(param, F, misaligned)
            if masked:
                state["mask"] = torch.randint(-(2**31), 2**31 - 1, ((size + 31) // 32,), generator=random).to(torch.int32)
            weight = torch.nn.Parameter(place(param, p, misaligned))
            weight.grad_dtype = None  # any
            weight.grad = place(grad, g, misaligned)
            self.table.add(weight, state, 0 if share_clock else number % len(GROUPS), 7 + number * 200_000_003, *PLACES[number // 2 % 4])
            self.tensors.append((weight, state))
        assert self.table.scan() == 0
        n = len(cases)
        self.desc = torch.frombuffer(bytearray(self.table.descriptors(True)), dtype=torch.int64).clone()
        self.chunks = torch.frombuffer(bytearray(self.table.chunk_list(CHUNK)), dtype=torch.int64).clone()
        self.groups = torch.tensor(self.hypers, dtype=torch.float64)
        self.rows, self.clocks = torch.full((n, len(core.ROW_FIELDS)), -7.0), torch.full((n, 3), -7.0, dtype=torch.float64)

    def everything(self) -> list[torch.Tensor]:
        """Bits of all tensors but the masks."""
        return [bits(t) for w, state in self.tensors for t in (w.data, w.grad, *(v for k, v in state.items() if k != "mask"))]

    def prologue(self, found_inf=None):
        core.cuda_prologue(
            self.index, address(self.desc), len(self.cases), address(self.groups), address(self.rows), address(self.clocks), address(found_inf), 0, 0
        )  # fmt: skip

    def step_cuda(self, grad_scale=None, found_inf=None, clip=None, seed=0, stochastic=False):
        self.prologue(found_inf)
        pointers = (address(self.rows), address(grad_scale), address(found_inf), address(clip))
        n_chunks = self.chunks.numel() // 2
        core.cuda_sweep(
            self.index, address(self.desc), len(self.cases), address(self.chunks), n_chunks, CHUNK, *pointers, seed, stochastic, 0, 0
        )  # fmt: skip

    def step_cpp(self, grad_scale=None, found_inf=None, clip=None, seed=0, stochastic=False):
        return self.table.cpu_step(self.index, 2, address(grad_scale), address(found_inf), address(clip), seed, stochastic)


def assert_equal(gpu: Fleet, cpu: Fleet, before: Fleet, name: str):
    for number, (case, (w, state), (cpu_w, cpu_state), (old_w, old_state)) in enumerate(zip(gpu.cases, gpu.tensors, cpu.tensors, before.tensors)):
        mine, theirs, old = ({"param": x.data, "grad": x.grad, **s} for x, s in ((w, state), (cpu_w, cpu_state), (old_w, old_state)))
        frozen = torch.zeros(case[0], dtype=torch.bool)
        if "mask" in mine:
            frozen = (mine.pop("mask")[:, None] >> torch.arange(32) & 1).flatten()[: case[0]] == 0
        for key, value in mine.items():
            what = f"{name} tensor {number} {key} {case}"
            if key in ("step", "aux0", "aux1"):
                assert torch.equal(bits(value), bits(theirs[key])), what
                continue
            same = (bits(value) == bits(theirs[key])) | (value.isnan() & theirs[key].isnan())
            assert same.all(), f"{what}: element {int((~same).nonzero()[0])}"
            assert torch.equal(bits(value)[frozen], bits(old[key])[frozen]), f"{what}: frozen bits changed"


def spread(shift: int) -> list:
    """Every storage type masked and not, aligned and not; the sizes take turns."""
    sizes = itertools.cycle(SIZES[shift % 8 :] + SIZES[: shift % 8])
    return [(next(sizes), *rest) for rest in itertools.product(STORAGE, (False, True), (False, True)) for _ in range(2)]


@pytest.mark.parametrize("rule", RULES)
def test_rule_equals_cpp(rule):
    cases = spread(RULES.index(rule))
    before, ours, theirs = (Fleet(rule, cases) for _ in range(3))
    core.emulator_seed(RULES.index(rule))
    for number, options in enumerate(({}, SCALED, SCALED)):
        ours.step_cuda(**options)
        assert theirs.step_cpp(**options)
        assert_equal(ours, theirs, before, f"{rule} launch {number}")


def test_steps_change_something():
    before, after = Fleet("adam", spread(0)), Fleet("adam", spread(0))
    after.step_cuda()
    for (w, _), (old, _), case in zip(after.tensors, before.tensors, after.cases):
        assert case[0] < 17 or not torch.equal(bits(w), bits(old)), case


@pytest.mark.parametrize("rule", RULES)
def test_prologue_writes_make_row(rule):
    fleet = Fleet(rule, [(1, STORAGE[0], False, False)] * 600)  # more tensors than the block has threads
    before = [(s["step"].item(), [s["aux0"].item(), s["aux1"].item()]) for _, s in fleet.tensors]
    fleet.prologue()
    for number, (step, aux) in enumerate(before):
        row, carried = core.make_row(fleet.index, fleet.hypers[number % len(GROUPS)], step + 1, aux)
        state = fleet.tensors[number][1]
        assert torch.equal(bits(fleet.rows[number]), bits(torch.tensor(row))), f"tensor {number}"
        assert (state["step"].item(), state["aux0"].item(), state["aux1"].item()) == (step + 1, *carried)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_tensors_sharing_a_step_advance_it_once(seed):
    core.emulator_seed(seed)
    fleet = Fleet("nadam", [(5, STORAGE[0], False, False)] * 400, share_clock=True)
    row, carried = core.make_row(fleet.index, fleet.hypers[0], 6.0, [0.7, 1e-3])
    fleet.prologue()
    state = fleet.tensors[0][1]
    assert (state["step"].item(), state["aux0"].item()) == (6.0, carried[0])
    assert torch.equal(bits(fleet.rows), bits(torch.tensor([row] * 400)))


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_found_inf_changes_nothing(value):
    fleet = Fleet("adam", spread(3))
    before, rows, clocks = fleet.everything(), fleet.rows.clone(), fleet.clocks.clone()
    fleet.step_cuda(found_inf=torch.tensor(value), stochastic=True)
    assert all(torch.equal(a, b) for a, b in zip(fleet.everything(), before))
    assert torch.equal(fleet.rows, rows) and torch.equal(fleet.clocks, clocks)


@pytest.mark.parametrize("scale", [None, 3.0])
def test_squares(scale):
    cases = [(size, storage, False, misaligned) for size in (*SIZES, 70001) for storage in STORAGE[:4] for misaligned in (False, True)]
    fleet = Fleet("sgd", cases)
    factor = None if scale is None else torch.tensor(scale)
    owners = fleet.chunks.view(-1, 2)[:, 0].numpy()
    runs = []
    for seed in (1, 2, 3):
        core.emulator_seed(seed)
        partial = torch.full((len(owners),), -1.0, dtype=torch.float64)
        core.cuda_squares(address(fleet.desc), address(fleet.chunks), len(owners), CHUNK, address(partial), address(factor), 0, 0)
        runs.append(partial)
    assert all(torch.equal(bits(r), bits(runs[0])) for r in runs), "another order of the threads gave other bits"
    for number, (weight, _) in enumerate(fleet.tensors):
        g = weight.grad.float() if scale is None else weight.grad.float() / scale
        exact = (g.double().numpy() ** 2).tolist()
        got = runs[0].numpy()[owners == number].sum()
        if np.isfinite(exact).all():
            assert abs(got - math.fsum(exact)) <= 1e-14 * math.fsum(exact), number
        else:
            assert not np.isfinite(got), number


def test_results_do_not_depend_on_the_order_of_threads():
    bits_of = []
    for seed in (1, 2):
        core.emulator_seed(seed)
        fleet = Fleet("adabelief", spread(1))
        fleet.step_cuda(**SCALED)
        bits_of.append(fleet.everything())
    assert all(torch.equal(a, b) for a, b in zip(*bits_of))


def test_arguments_are_checked():
    fleet = Fleet("adam", [(9, STORAGE[0], False, False)])
    desc, chunks, rows = address(fleet.desc), address(fleet.chunks), address(fleet.rows)
    with pytest.raises(ValueError, match="cuda_sweep: expected a rule number"):
        core.cuda_sweep(len(RULES), desc, 1, chunks, 1, CHUNK, rows, 0, 0, 0, 0, False, 0, 0)
    with pytest.raises(ValueError, match="cuda_sweep: expected the address of 1 rows"):
        core.cuda_sweep(0, desc, 1, chunks, 1, CHUNK, 0, 0, 0, 0, 0, False, 0, 0)
    with pytest.raises(ValueError, match="cuda_squares: expected 1 to 2.30 elements per chunk"):
        core.cuda_squares(desc, chunks, 1, 0, rows, 0, 0, 0)
    with pytest.raises(RuntimeError, match="cuda_sweep: CUDA call failed; invalid device"):
        core.cuda_sweep(0, desc, 1, chunks, 1, CHUNK, rows, 0, 0, 0, 0, False, 99, 0)
    core.cuda_sweep(0, 0, 0, 0, 0, CHUNK, 0, 0, 0, 0, 0, False, 0, 0)
    core.cuda_squares(0, 0, 0, CHUNK, 0, 0, 0, 0)
    core.cuda_prologue(0, 0, 0, 0, 0, 0, 0, 0, 0)

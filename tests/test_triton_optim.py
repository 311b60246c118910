"""Interpreted Triton sweep against the C++ CPU sweep: the same table, the same bits, for every rule, storage type and option.

conftest.py sets TRITON_INTERPRET=1 before anything imports triton. One launch holds many tensors: the interpreter costs about a
millisecond per tensor and 0.5 s per million elements.
"""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from fusedadapt import _core
from fusedadapt.kernels import common, optim
from fusedadapt.kernels.optim_rules import RULES

F, B, H = torch.float32, torch.bfloat16, torch.float16
CHUNK = 2048
SIZES = (0, 1, 3, 15, 16, 17, 1000, 4097)
# parameter, gradient, states, master
STORAGE = (
    (F, F, (F, F, F), None),
    (B, B, (B, B, B), None),
    (H, H, (F, F, F), None),
    (B, B, (F, F, F), None),
    (F, B, (B, B, B), None),
    (B, F, (F, B, H), "fp32"),
    (B, B, (F, F, F), "split"),
    (H, H, (H, H, H), "fp32"),
    (B, H, (H, F, B), "split"),
)
BASE = dict(
    lr=3e-3, beta1=0.87, beta2=0.98, beta3=0.995, eps=1e-7, sign=1.0, momentum=0.85, dampening=0.1, lr_decay=0.01, mu_base=0.9998,
    alpha=4.0, alpha_warmup=50, beta3_warmup=50, half1=4.0, half3=130.0, rho=0.04, power=1.0, warmup=10, weight_lr_power=2.0,
    degenerated=1.0,
)  # fmt: skip
GROUPS = (
    {},
    dict(l2=0.03, sign=-1.0, rectify=1.0, nesterov=1.0),
    dict(decoupled=0.2, rectify=1.0, degenerated=0.0, clip=0.3),
    dict(l2=0.01, fixed=0.002, amsgrad=1.0),
)
CLOCKS = (0.0, 3.0, 200.0)
PLACES = ((0, 0, 0), (48, 0, 0), (5, 0, 0), (2**33 + 3, 7, 20))  # base, inner, outer: how a shard lies in its whole tensor
HOSTILE = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 3e38, -7e4, 1e-30])
# infinities and NaN are meant
# expf and powf differ between libraries: a few units in the last place of the parameter, states exact


pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), pytest.mark.usefixtures("quick_calls")]


def test_runs_interpreted():
    assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before triton is imported (tests/conftest.py does)"


def place(values: torch.Tensor, dtype: torch.dtype, misaligned: bool) -> torch.Tensor:
    storage = torch.empty(values.numel() + 9, dtype=dtype)
    start = -storage.data_ptr() % 16 // storage.element_size() + misaligned
    return storage[start : start + values.numel()].copy_(values)


def hyper(rule: str, group: int, **change: float) -> list[float]:
    values = {**BASE, **GROUPS[group], **change}
    if rule == "sophia_g":
        values["eps"] = 1e-15
    return [float(values.get(name, 0.0)) for name in _core.HYPER_FIELDS]


class Fleet:
    """Parameters with gradients and states in a `_core.Table`. The same arguments give the same bits at other addresses."""

    def __init__(self, rule, cases, **change):
        self.rule, self.index = rule, [name for name, _, _ in _core.RULES].index(rule)
        self.states = RULES[rule].states
        self.hypers = [hyper(rule, group, **change) for group in range(len(GROUPS))]
        names = [f"s{k}" for k in range(self.states)]
        self.table = _core.Table(torch.Tensor.__dlpack_c_exchange_api__, None, names, ["aux0", "aux1"], "master", 1, 0)
        self.table.set_hypers(self.hypers)
        self.cases, self.tensors = cases, []
        for number, (size, (p, g, s, master), masked, misaligned) in enumerate(cases):
            random = torch.Generator().manual_seed(number)
            draw = lambda random=random, size=size: torch.randn(size, generator=random)
            param, grad = draw(), draw() * 10.0 ** (number % 5 - 3)
            if size >= 16 and number % 3 == 0:
                grad[:8], param[4:12] = HOSTILE, HOSTILE.flip(0)
            state = {}
            positive = rule.startswith(("rms", "ada")) and not rule.startswith(("adam", "adab", "adahessian"))
            for k in range(self.states):
                values = draw() * 0.1
                state[f"s{k}"] = place(values.abs() if k or positive else values, s[k], misaligned)
            state["step"] = torch.tensor(CLOCKS[number % 3])
            state["aux0"], state["aux1"] = torch.tensor(0.7, dtype=torch.float64), torch.tensor(1e-3, dtype=torch.float64)
            if master:
                param[param.isnan()] = 1.0
                low = torch.randint(-32768, 32767, (size,), generator=random)
                state["master"] = place(low, torch.int16, misaligned) if master == "split" else place(param, F, misaligned)
            if masked:
                state["mask"] = torch.randint(-(2**31), 2**31 - 1, ((size + 31) // 32,), generator=random).to(torch.int32)
            weight = torch.nn.Parameter(place(param, p, misaligned))
            weight.grad_dtype = None  # any
            weight.grad = place(grad, g, misaligned)
            self.table.add(weight, state, number % 4, 7 + number * 200_000_003, *PLACES[number // 2 % 4])
            self.tensors.append((weight, state))
        assert self.table.scan() == 0

    def arrays(self, number):
        weight, state = self.tensors[number]
        kept = {key: value for key, value in state.items() if key in ("s0", "s1", "s2", "master")}
        return {"param": weight.data, "grad": weight.grad, **kept}

    def device_table(self):
        assert self.table.scan() == 0
        desc = torch.frombuffer(bytearray(self.table.descriptors()), dtype=torch.int64).view(-1, 26)
        chunks = torch.frombuffer(bytearray(self.table.chunk_list(CHUNK)), dtype=torch.int64).view(-1, 2)
        rows = []
        for number, (_, state) in enumerate(self.tensors):
            aux = [state["aux0"].item(), state["aux1"].item()]
            rows.append(_core.make_row(self.index, self.hypers[number % 4], state["step"].item() + 1, aux)[0])
            desc[number, 12] = number + (desc[number, 12] >> 32 << 32)
        return desc, chunks, torch.tensor(rows)

    def step_triton(self, **options):
        desc, chunks, rows = self.device_table()
        optim.step_(desc, chunks, rows, self.rule, chunk=CHUNK, **options)

    def step_cpp(self, grad_scale=None, found_inf=None, clip=None, seed=0, stochastic=False):
        address = lambda t: 0 if t is None else t.data_ptr()
        return self.table.cpu_step(self.index, 2, address(grad_scale), address(found_inf), address(clip), seed, stochastic)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int32 if t.element_size() == 4 else torch.int16).clone()


def trainable(state: dict, size: int) -> torch.Tensor:
    if "mask" not in state:
        return torch.ones(size, dtype=torch.bool)
    return (state["mask"][:, None] >> torch.arange(32) & 1).flatten()[:size].bool()


def ordered(t: torch.Tensor) -> torch.Tensor:
    """Numbers such that neighbouring floats differ by 1; every NaN the same."""
    whole = bits(t).long()
    if not t.is_floating_point():
        return whole
    size = 2 ** (8 * t.element_size() - 1)
    whole = torch.where(whole < 0, -size - whole, whole)
    return torch.where(t.isnan(), 2**40, whole)


def joined(arrays: dict) -> torch.Tensor:
    return ((arrays["param"].view(torch.int16).int() << 16) + arrays["master"].int()).view(F)


def check(fleet, other, before, name, tolerance=0):
    """`fleet` (Triton) equals `other` (C++): trainable elements up to NaN payloads, frozen ones bit for bit as they were."""
    for number, case in enumerate(fleet.cases):
        keep = trainable(fleet.tensors[number][1], case[0])
        mine, theirs = fleet.arrays(number), other.arrays(number)
        for key in mine:
            assert torch.equal(bits(mine[key])[~keep], before[number][key][~keep]), f"{name} tensor {number} {key}: frozen {case}"
            a, b = mine[key], theirs[key]
            if case[1][3] == "split" and key == "master" and tolerance:  # the pair is the number: its halves may well differ
                a, b = joined(mine), joined(theirs)
            distance = (ordered(a) - ordered(b)).abs()[keep]
            allowed = 0 if key.startswith("s") else tolerance
            worst = int(distance.max()) if distance.numel() else 0
            assert worst <= allowed, f"{name} tensor {number} {key}: {worst} ulp at {int(distance.argmax())} {case}"


def sync(source, target):
    """Both fleets go on from the same bits."""
    for number in range(len(source.cases)):
        for (_, a), (_, b) in zip(source.arrays(number).items(), target.arrays(number).items()):
            b.copy_(a)
        for key in ("step", "aux0", "aux1"):
            target.tensors[number][1][key].copy_(source.tensors[number][1][key])


def compare(rule, cases, launches, tolerance=0, **change):
    ours, theirs = Fleet(rule, cases, **change), Fleet(rule, cases, **change)
    for number, options in enumerate(launches):
        before = [{k: bits(v) for k, v in ours.arrays(i).items()} for i in range(len(cases))]
        ours.step_triton(**options)
        assert theirs.step_cpp(**options)
        check(ours, theirs, before, f"{rule} launch {number}", tolerance)
        sync(theirs, ours)
    return ours


def spread(shift: int):
    """Half the combinations of storage, mask and alignment, the other half at the next shift; the sizes take turns."""
    sizes = itertools.cycle(SIZES[shift % 8 :] + SIZES[: shift % 8])
    return [(next(sizes), *rest) for rest in list(itertools.product(STORAGE, (False, True), (False, True)))[shift % 2 :: 2]]


SCALED = dict(grad_scale=torch.tensor(3.0), clip=torch.tensor(0.7), found_inf=torch.tensor(0.0), seed=2**63 + 12345, stochastic=True)


def test_registry_is_the_core_s():
    assert [(name, rule.states, rule.stored) for name, rule in RULES.items()] == _core.RULES
    assert tuple(common.ROW_FIELDS) == _core.ROW_FIELDS and common.WORDS.value == _core.DESC_WORDS
    for field in set(common.ROW_FIELDS) - {"spare1", "spare2"}:
        assert getattr(common, field.upper()).value == common.ROW_FIELDS.index(field)


@pytest.mark.parametrize("rule", RULES)
def test_rule_equals_cpp(rule):
    compare(rule, spread(list(RULES).index(rule)), [{}, SCALED])


def test_every_size_with_every_storage():
    cases = list(itertools.product(SIZES, STORAGE, (False, True), (False,)))
    cases += itertools.product((17, 1000), STORAGE, (True,), (True,))
    compare("adam", cases, [dict(seed=9, stochastic=True)])


def test_hessian_power_within_two_ulp():
    cases = [(1000, (F, F, (F, F, F), None), False, False), (17, STORAGE[6], True, True)]
    compare("adahessian", cases, [{}], tolerance=2, power=0.7)


@pytest.mark.parametrize("value", [1.0, float("inf"), float("nan")])
def test_found_inf_writes_nothing(value):
    fleet = Fleet("adam", spread(0)[:8])
    before = [{k: bits(v) for k, v in fleet.arrays(i).items()} for i in range(len(fleet.cases))]
    fleet.step_triton(found_inf=torch.tensor(value), seed=1, stochastic=True)
    for number, saved in enumerate(before):
        for key, now in fleet.arrays(number).items():
            assert torch.equal(bits(now), saved[key]), (number, key)


def test_neighbours_stay_untouched():
    """Sentinels beside misaligned arrays of awkward sizes survive."""
    cases = [(size, storage, True, True) for size in (1, 15, 17) for storage in (STORAGE[0], STORAGE[1], STORAGE[6])]
    fleet = Fleet("adam", cases)
    around = []
    for number, case in enumerate(cases):
        for array in fleet.arrays(number).values():
            whole = torch.empty(0, dtype=array.dtype).set_(array.untyped_storage())
            outside = torch.ones(whole.numel(), dtype=torch.bool)
            outside[array.storage_offset() : array.storage_offset() + case[0]] = False
            around.append((whole, outside, bits(whole)))
    fleet.step_triton()
    for whole, outside, saved in around:
        assert torch.equal(bits(whole)[outside], saved[outside])


def test_offsets_beyond_two_to_the_31():
    """A chunk at element 2^33: the addresses are moved down so that its elements are where the small tensors lie."""
    cases = [(100, STORAGE[0], True, False), (100, STORAGE[1], True, True), (100, STORAGE[6], False, False)]
    ours, theirs = Fleet("adam", cases), Fleet("adam", cases)
    desc, chunks, rows = ours.device_table()
    far = 2**33
    sizes = {F: 4, B: 2, H: 2}
    for number, (_, (p, g, s, master), masked, _) in enumerate(cases):
        for word, dtype in ((0, p), (1, g), (2, s[0]), (3, s[1])):
            desc[number, word] -= far * sizes[dtype]
        desc[number, 6] -= far * 2 if master else 0
        desc[number, 7] -= far // 8 if masked else 0
        desc[number, 11] += far
        chunks[number, 1] += far
    optim.step_(desc, chunks, rows, "adam", chunk=CHUNK)
    assert theirs.step_cpp()
    check(ours, theirs, [{k: bits(v) for k, v in Fleet("adam", cases).arrays(i).items()} for i in range(3)], "far")


def test_squares():
    fleet = Fleet("sgd", [(size, storage, False, size % 2 == 1) for size in SIZES for storage in STORAGE[:3]])
    desc, chunks, _ = fleet.device_table()
    scale = torch.tensor(3.0)
    for options, divisor in (({}, 1.0), (dict(grad_scale=scale), 3.0)):
        got = optim.squares(desc, chunks, chunk=CHUNK, **options)
        want = []
        for tensor, offset in chunks.tolist():
            piece = fleet.tensors[fleet.table.active[tensor]][0].grad.flatten()[offset : offset + CHUNK].float() / divisor
            want.append((piece.double() ** 2).sum())
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-14, atol=0.0, equal_nan=True)
        assert torch.equal(got.view(torch.int64), optim.squares(desc, chunks, chunk=CHUNK, **options).view(torch.int64))


def test_empty_and_refused_input():
    desc, chunks, rows = torch.zeros(0, 26, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 24)
    optim.step_(desc, chunks, rows, "adam", chunk=64)
    assert optim.squares(desc, chunks, chunk=64).shape == (0,)
    with pytest.raises(ValueError, match="multiple of 16"):
        optim.step_(desc, chunks, rows, "adam", chunk=8)
    with pytest.raises(ValueError, match=r"rows as contiguous float32 \[r, 24\]"):
        optim.step_(desc, chunks, rows.double(), "adam", chunk=64)
    with pytest.raises(ValueError, match="desc"):
        optim.squares(desc.int(), chunks, chunk=64)
    with pytest.raises(KeyError):
        optim.step_(desc, chunks, rows, "adamw", chunk=64)


@triton.jit
def helpers(x, out, random, e, N: tl.constexpr):
    lane = tl.arange(0, N)
    value = tl.load(x + lane)
    high, low = common.to_bf16_split(value)
    tl.store(out + lane, common.to_bf16(value).to(tl.int32))
    tl.store(out + N + lane, common.to_bf16_stochastic(value, tl.load(random + lane).to(tl.uint32)).to(tl.int32))
    tl.store(out + 2 * N + lane, value.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32))
    tl.store(out + 3 * N + lane, common.join_split((high.to(tl.uint32) << 16).to(tl.float32, bitcast=True), low).to(tl.int32, bitcast=True))
    tl.store(e + lane, common.exp_neg(-tl.abs(value)))


def test_rounding_helpers_and_exp():
    n = 4096
    random = torch.Generator().manual_seed(3)
    words = torch.randint(-(2**31), 2**31 - 1, (n,), generator=random).int()
    edges = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F7F8000, 0x7F800000, 0x7F800001, 0x7FC00001]  # ties, limits, infinity, NaN
    edges += [0x477FF000, 0x477FEFFF, 0x38800000, 0x33000000, 0x33000001, 1]  # half's limits, subnormals
    words[: len(edges)] = torch.tensor(edges)
    words[len(edges) : 2000] = (torch.randn(2000 - len(edges), generator=random) * 20).view(torch.int32)
    x = words.view(F)
    noise = torch.randint(0, 65536, (n,), generator=random).int()
    out, e = torch.empty(4, n, dtype=torch.int32), torch.empty(n)
    helpers[(1,)](x, out, noise, e, n)
    for i, value in enumerate(x.tolist()):
        if value != value:
            assert all(int(out[k, i]) & 0x7FFF > infinity for k, infinity in ((0, 0x7F80), (1, 0x7F80), (2, 0x7C00))), hex(words[i])
            continue
        assert int(out[0, i]) == _core.float_to_bf16(value) and int(out[2, i]) == _core.float_to_half(value), value
        assert int(out[1, i]) == _core.float_to_bf16_stochastic(value, int(noise[i])), value
    real = ~x.isnan()
    assert torch.equal(out[3][real], words[real])
    true = (-x.abs().double()).exp()
    near = real & (x.abs() < 80)
    assert ((e.double() - true).abs() / true)[near].max() <= 1.2e-7
    assert (e[real & (x.abs() > 100)] == 0).all() and e[~real].isnan().all()


@triton.jit
def draws(out, seed: tl.int64, first: tl.int64, tensor, step, N: tl.constexpr):
    lane = tl.arange(0, N)
    first = first.to(tl.int64)
    tensor = tensor.to(tl.uint32)
    step = step.to(tl.uint32)
    tl.store(out + lane, (common.random16(seed, first + lane, tensor, step) & 0xFFFF).to(tl.int32))
    tl.store(out + N + lane, (common.random16_run(seed, first, tensor, step, N) & 0xFFFF).to(tl.int32))


COUNTERS = [(0, 0, 0, 0), (2**64 - 3, 2**35 + 8, 2**31 + 5, 77), (12345678901, 2**31 - 16, 9, 2**24)]


@pytest.mark.parametrize("seed, first, tensor, step", COUNTERS)
def test_random_bits(seed, first, tensor, step):
    out = torch.empty(2, 64, dtype=torch.int32)
    draws[(1,)](out, seed - (seed >> 63 << 64), first, tensor, step, 64)
    want = [_core.random16(seed, first + i, tensor, step) for i in range(64)]
    assert out[0].tolist() == want and out[1].tolist() == want

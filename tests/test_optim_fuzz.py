"""Random optimizer configurations: every backend against the fp32 reference, bit for bit, with guard bytes around every parameter.

A case is a pure function of its seed. A failure prints the line that repeats it: ``PYTHONPATH=. python tests/test_optim_fuzz.py BACKEND SEED``.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import random
import sys
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from fusedadapt import dispatch  # noqa: E402
from fusedadapt.optim import OPTIMIZERS, FusedOptimizer, compact  # noqa: E402
from fusedadapt.testing.ulp import within_a_step  # noqa: E402

F, B, H = torch.float32, torch.bfloat16, torch.float16
GUARD = 24  # elements on each side of a parameter
SHAPES = [(), (0,), (1,), (2,), (3,), (7,), (8,), (15,), (16,), (17,), (31,), (33,), (64,)]
SHAPES += [(3, 0), (5, 3), (1, 9), (4, 8), (2, 3, 5), (2, 4, 3, 3), (1, 1, 7, 1), (600,), (2500,)]
HOSTILE = ("normal", "normal", "normal", "tiny", "huge", "zero", "minus zero", "constant", "denormal", "sparse", "special")
# pow: not one correctly rounded result on every backend, within 2 ulp
INEXACT = ("adahessian",)

HYPERS: dict[str, Any] = {
    "lr": lambda r: 10 ** r.uniform(-4, -0.5),
    "eps": lambda r: 10 ** r.uniform(-12, -3),
    "weight_decay": lambda r: 10 ** r.uniform(-3, -0.3),
    "momentum": lambda r: r.uniform(0.1, 0.95),
    "dampening": lambda r: r.uniform(0.05, 0.5),
    "lr_decay": lambda r: r.uniform(0.001, 0.1),
    "initial_accumulator_value": lambda r: r.uniform(0.01, 1.0),
    "rho": lambda r: r.uniform(0.01, 0.99),
    "alpha": lambda r: r.uniform(0.3, 0.999),
    "momentum_decay": lambda r: r.uniform(0.001, 0.05),
    "alpha_warmup": lambda r: r.choice([None, 1, 2, 3, 50]),
    "beta3_warmup": lambda r: r.choice([None, 1, 2, 3, 50]),
    "clip_lambda": lambda r: r.choice([None, "k**0.25", "k**0.25", lambda k: 0.1 + k]),
    "warmup_steps": lambda r: r.choice([0, 1, 3, 10]),
    "r": lambda r: r.choice([0.0, 0.5, 2.0]),
    "weight_lr_power": lambda r: r.choice([2.0, 1.0, 0.5]),
    "hessian_power": lambda r: r.choice([1.0, 1.0, 0.5]),
    "bs": lambda r: r.choice([1.0, 37.0, 5120.0]),
}


def options(cls: type[FusedOptimizer], r: random.Random) -> dict[str, Any]:
    """Every hyper-parameter of the class away from its default; zeros and flags of the chosen example select the rule and stay."""
    example, out = r.choice(cls.examples), {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name in ("self", "params", "extras"):
            continue
        if name == "betas":
            first = r.uniform(0.05, 0.95) if example.get(name, (1,))[0] else 0.0
            out[name] = (first, *(r.uniform(0.3, 0.9999) for _ in parameter.default[1:]))
        elif isinstance(parameter.default, bool):
            out[name] = example.get(name, r.random() < 0.5)
        elif name in ("momentum", "dampening") and not example.get(name, parameter.default):
            out[name] = parameter.default
        else:
            out[name] = HYPERS[name](r)
    if out.get("nesterov"):
        out["nesterov"] = out["momentum"] > 0
        out["dampening"] = 0 if out["nesterov"] else out["dampening"]
    return out


def dense(buffer: Tensor, offset: int, shape: tuple[int, ...], layout: str, r: random.Random) -> Tensor:
    """A gap-free view of ``shape`` in ``buffer``, its dimensions in some order of memory."""
    order = list(range(len(shape)))
    if layout == "shuffled":
        r.shuffle(order)
    elif layout == "channels_last" and len(shape) == 4:
        order = [0, 2, 3, 1]
    stride, strides = 1, [1] * len(shape)
    for d in reversed(order):
        strides[d] = stride
        stride *= max(shape[d], 1)
    return buffer.as_strided(shape, strides, offset)


def values(kind: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=g)
    if kind == "tiny":
        return x * 1e-12
    if kind == "huge":
        return x * 1e25
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "minus zero":
        return -torch.zeros(shape)
    if kind == "constant":
        return torch.full(shape, 0.25)
    if kind == "denormal":
        return x * 1e-41
    pick = torch.rand(shape, generator=g)
    if kind == "sparse":
        return torch.where(pick < 0.8, 0.0, x)
    if kind == "special":
        special = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38, 1e-45, -0.0])
        return torch.where(pick < 0.3, special[torch.randint(6, shape, generator=g)], x)
    return x


class Case:
    """A configuration, and two equal sets of parameters to run it on."""

    def __init__(self, seed: int, small: bool = False):
        self.r, self.g, self.small = random.Random(seed), torch.Generator().manual_seed(seed), small
        r = self.r
        self.cls = list(OPTIMIZERS.values())[seed % len(OPTIMIZERS)]
        self.steps = r.randint(1, 2 if small else 4)
        self.extras: dict[str, Any] = {
            "maximize": r.random() < 0.3,
            "stochastic_rounding": r.random() < 0.3,
            "state_dtype": r.choice([None, None, "fp32", "bf16", "fp16"]),
            "master_weights": r.choice([None, None, None, "fp32", "split"]),
            "max_grad_norm": r.choice([None, None, 10 ** r.uniform(-2, 2)]),
            "seed": r.choice([0, 7, 2**40 + 3]),
        }
        half = self.extras["state_dtype"] in ("fp32", "fp16") and self.extras["master_weights"] != "split"
        groups = r.choice([1, 1, 2, 3])
        self.groups = [options(self.cls, r) for _ in range(groups)]
        self.tensor_lr = [r.choice([None, None, None, F, torch.float64]) for _ in range(groups)]
        self.specs = [self._spec(half, k % groups) for k in range(max(groups, r.randint(1, 2 if small else 4)))]
        self.start = [values(r.choice(("normal", "normal", "tiny", "zero", "special")), s["shape"], self.g) for s in self.specs]
        apart = random.Random(f"masking {seed}")  # so that older seeds keep their cases
        self.mask_state, self.compact_grads = apart.choice(("dense", "compact")), apart.random() < 0.4
        if self.cls.__name__ != "ScheduleFreeAdamW" and apart.random() < 0.2:
            self.extras["decay_to"] = "init"
        self.masks = [torch.rand(s["shape"], generator=self.g) < r.choice([0.0, 0.5, 1.0]) if r.random() < 0.25 else None for s in self.specs]

    def _spec(self, half: bool, group: int) -> dict[str, Any]:
        r = self.r
        layouts = ("plain", "shuffled", "channels_last")
        return {
            "shape": r.choice(SHAPES[:-2] if self.small else SHAPES), "dtype": r.choice([F, F, B, B, H] if half else [F, B]), "group": group,
            "layout": r.choice(layouts), "grad_layout": r.choice(layouts), "grad_dtype": r.choice([None, None, F, B, H]),
            "shift": r.choice([0, 0, 1, 3]),
        }  # fmt: skip

    def build(self, backend: str) -> Run:
        return Run(self, backend)

    def describe(self) -> str:
        return f"{self.cls.__name__} groups={self.groups} lr={self.tensor_lr} {self.extras} steps={self.steps} params={self.specs}"


class Run:
    """One optimizer on one backend, its parameters lying inside guarded buffers."""

    def __init__(self, case: Case, backend: str):
        r = random.Random(1)
        self.buffers, self.params = [], []
        for spec, start in zip(case.specs, case.start):
            buffer = torch.empty(start.numel() + 2 * GUARD + 4, dtype=spec["dtype"]).view(torch.int8).fill_(0x5A).view(spec["dtype"])
            view = dense(buffer, GUARD + spec["shift"], spec["shape"], spec["layout"], r)
            view.copy_(start)
            self.buffers.append(buffer)
            self.params.append(torch.nn.Parameter(view))
        groups = []
        for i, (given, dtype) in enumerate(zip(case.groups, case.tensor_lr)):
            lr = given["lr"] if dtype is None else torch.tensor(given["lr"], dtype=dtype)
            groups.append({**given, "lr": lr, "params": [p for p, s in zip(self.params, case.specs) if s["group"] == i]})
        masks = {p: m for p, m in zip(self.params, case.masks) if m is not None}
        plain = {k: v for k, v in case.groups[0].items() if k != "params"}
        # the truth keeps its states dense: a compact state must give the same bits
        self.packed = case.mask_state == "compact" and backend != "reference" and bool(masks)
        self.opt = case.cls(groups, **plain, **case.extras, masks=masks, backend=backend, mask_state="compact" if self.packed else "dense")
        if hasattr(self.opt, "train"):
            self.opt.train()

    def feed(self, case: Case, grads: list[Tensor | None], diagonals: list[Tensor], seed: int) -> None:
        for p, spec, grad, diagonal in zip(self.params, case.specs, grads, diagonals):
            p.grad = p.compact_grad = None  # type: ignore[attr-defined]
            if grad is None:
                continue
            dtype = spec["grad_dtype"] or spec["dtype"]
            p.grad_dtype = dtype
            buffer = torch.empty(grad.numel() + 8, dtype=dtype)
            p.grad = dense(buffer, spec["shift"], spec["shape"], spec["grad_layout"], random.Random(seed)).copy_(grad)
            if case.cls.__name__ == "AdaHessian":
                p.hessian_diag = diagonal.to(spec["dtype"])  # type: ignore[attr-defined]
            if case.compact_grads and compact.wanted(self.opt, p):
                p.compact_grad, p.grad = compact.take(p.grad, p, compact.fresh_index(self.opt, p)), None  # type: ignore[attr-defined]

    def arrays(self, k: int) -> dict[str, Tensor]:
        """What the step may change of parameter ``k``; a split pair is one fp32 number."""
        p, state = self.params[k], self.opt.state.get(self.params[k], {})
        return {"param": p.detach(), **{n: t for n, t in state.items() if isinstance(t, Tensor) and n not in ("mask", "index", "prefix")}}

    def like_mine(self, k: int, arrays: dict[str, Tensor], always: tuple[str, ...] = ("param", "step")) -> dict[str, Tensor]:
        """Arrays of a run with dense states as this one keeps them."""
        p, index = self.params[k], compact.fresh_index(self.opt, self.params[k])
        return {n: t if index is None or n in always or t.shape != p.shape else compact.take(t, p, index) for n, t in arrays.items()}

    def guards(self, case: Case, k: int) -> Tensor:
        outside = torch.ones(len(self.buffers[k]), dtype=torch.bool)
        first = GUARD + case.specs[k]["shift"]
        outside[first : first + self.params[k].numel()] = False
        return self.buffers[k].view(torch.int16 if self.buffers[k].element_size() == 2 else torch.int32)[outside]


def ordered(t: Tensor) -> Tensor:
    """int64 numbers that count floats; -0 and 0 differ by nothing but their bits, every NaN is the same."""
    if not t.is_floating_point():
        return t.long()
    bits = t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]).long()
    return torch.where(t.isnan(), 2**62, bits)


def compare(case: Case, ours: Run, truth: Run, before: list[dict[str, Tensor]], step: int, exact: bool) -> None:
    for k, spec in enumerate(case.specs):
        mine, theirs, old_arrays = ours.arrays(k), ours.like_mine(k, truth.arrays(k)), ours.like_mine(k, before[k])
        assert mine.keys() == theirs.keys(), f"step {step} parameter {k}: states {sorted(mine)} instead of {sorted(theirs)}"
        if not exact and "remainder" in mine:  # the two halves are one number
            mine, theirs = (x | ours.like_mine(k, {"param": x["param"]}, ()) for x in (mine, theirs))
            both = [(x.pop("param").view(torch.int16).int() << 16) + x.pop("remainder").int() for x in (mine, theirs)]
            mine["param"], theirs["param"] = (x.view(F) for x in both)
        begun = ours.like_mine(k, {"param": before[k]["param"]}, ())["param"]
        for name in mine:
            a, b = mine[name], theirs[name]
            candidates = [old_arrays.get(name), begun if name in ("param", "master") else None]  # a master weight begins as the parameter
            old = next((t for t in candidates if t is not None and t.shape == a.shape), torch.zeros(()))
            same = ordered(a) == ordered(b) if exact else within_a_step(a, b, old.to(a.dtype).expand_as(a))
            if not bool(same.all()):
                at = (~same).nonzero()[0].tolist()
                i = tuple(at)
                raise AssertionError(f"step {step} parameter {k} {name}{at}: {a[i].item()!r} instead of {b[i].item()!r} ({spec})")
        assert torch.equal(ours.guards(case, k), truth.guards(case, k)), f"step {step} parameter {k}: memory beside it was written"
        if case.masks[k] is not None:
            frozen = ~case.masks[k]
            for name in ("param",) if before[k] else ():
                old, new = before[k][name][frozen], ours.arrays(k)[name][frozen]
                assert torch.equal(ordered(old), ordered(new)), f"step {step} parameter {k}: a frozen element changed"


def sync(ours: Run, truth: Run) -> None:
    for k in range(len(ours.params)):
        mine = ours.arrays(k)
        for name, t in ours.like_mine(k, truth.arrays(k)).items():
            mine[name].copy_(t)


def check_norm(ours: Run, grads: list[Tensor | None], case: Case, scale: float) -> None:
    total = torch.zeros((), dtype=torch.float64)
    for p in ours.params:
        for g in (p.grad, p.compact_grad):
            total += 0.0 if g is None else (g.float() / scale).double().square().sum()
    torch.testing.assert_close(ours.opt.grad_norm, total.sqrt().float(), rtol=3e-7, atol=0, equal_nan=True)


def between(case: Case, runs: tuple[Run, Run]) -> None:
    """What users do between steps: schedules, checkpoints, moved storage."""
    what = case.r.choice(("nothing", "nothing", "lr", "option", "reload", "copy", "move"))
    for run in runs:
        opt = run.opt
        if what == "lr":
            for group in opt.param_groups:
                group["lr"] = group["lr"].mul_(0.5) if isinstance(group["lr"], Tensor) else group["lr"] * 0.5
        elif what == "option":
            opt.param_groups[0]["weight_decay"] = 0.123
            opt.param_groups[-1]["maximize"] = not opt.param_groups[-1]["maximize"]
        elif what == "reload":
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        elif what == "move":
            for k, p in enumerate(run.params):
                at = p.storage_offset()
                run.buffers[k] = run.buffers[k].clone()
                p.data = run.buffers[k].as_strided(p.shape, p.stride(), at)
        elif what == "copy":
            masks = opt._masks
            run.opt = type(opt).__new__(type(opt))
            run.opt.__setstate__(opt.__getstate__())
            assert run.opt._masks == masks


def run_case(backend: str, seed: int, small: bool = False) -> None:
    case = Case(seed, small)
    ours, truth = case.build(backend), case.build("reference")
    for step in range(case.steps):
        absent = 0.0 if any(callable(g.get("clip_lambda")) for g in case.groups) else 0.15  # such a bound needs equal step counts: documented
        grads: list[Tensor | None] = [None if case.r.random() < absent else values(case.r.choice(HOSTILE), s["shape"], case.g) for s in case.specs]
        diagonals = [values("normal", s["shape"], case.g).abs() for s in case.specs]
        # one value for both: the backends add the squares in different orders (their norms are compared with fp64 below)
        coefficient: list[Tensor] = []
        scale, found = case.r.choice([None, None, 1.0, 8.0, 3.0]), case.r.choice([None, 0.0, 0.0, 0.0, 1.0])
        layout_seed, hessian = case.r.randrange(1000), case.cls.__name__ == "SophiaG" and case.r.random() < 0.5
        before = [{n: t.clone() for n, t in truth.arrays(k).items()} for k in range(len(case.specs))]
        for run in (ours, truth):
            run.feed(case, grads, diagonals, layout_seed)
            if hessian:
                run.opt.update_hessian()
            if scale is not None:
                run.opt.grad_scale = torch.tensor(scale)
            if found is not None:
                run.opt.found_inf = torch.tensor(found)
            if run is truth and coefficient:
                run.opt._clip = lambda *_, c=coefficient[0]: c  # type: ignore[method-assign]
            elif run is ours:
                record(run.opt, coefficient)
            run.opt.step()
            for name in ("grad_scale", "found_inf", "_clip"):
                run.opt.__dict__.pop(name, None)
        if case.extras["max_grad_norm"] is not None:
            check_norm(ours, grads, case, scale or 1.0)
        exact = not any(case_rule(ours.opt, g) in INEXACT for g in ours.opt.param_groups)
        compare(case, ours, truth, before, step, exact)
        if not exact:
            sync(ours, truth)
        between(case, (ours, truth))


def record(opt: FusedOptimizer, into: list[Tensor]) -> None:
    original = type(opt)._clip

    def clip(plans: Any, grad_scale: Tensor | None) -> Tensor:
        into.append(original(opt, plans, grad_scale))
        return into[-1]

    opt._clip = clip  # type: ignore[method-assign]


def case_rule(opt: FusedOptimizer, group: dict[str, Any]) -> str:
    rule = opt._rule(group)
    return "adahessian_exact" if rule == "adahessian" and group["hessian_power"] == 1.0 else rule


def repeatable(backend: str, seed: int, small: bool = False) -> None:
    try:
        run_case(backend, seed, small)
    except Exception as error:  # noqa: BLE001  (whatever it is, it must say how to see it again)
        where = f"repeat: PYTHONPATH=. python tests/test_optim_fuzz.py {backend} {seed}\n{Case(seed, small).describe()}"
        raise AssertionError(f"{type(error).__name__}: {error}\n{where}") from error


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(4))
def test_cpp_equals_reference(part: int, fuzz_count: int) -> None:
    for seed in range(part, fuzz_count, 4):
        repeatable("cpp", seed)


@pytest.mark.fuzz
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set(isa: str, fuzz_count: int) -> None:
    core = dispatch.core()
    assert core is not None
    chosen = core.isa()
    if not core.use_isa(isa):
        pytest.skip(f"this processor has no {isa}")
    try:
        for seed in range(100_000, 100_000 + max(len(OPTIMIZERS), fuzz_count // 20)):
            repeatable("cpp", seed)
    finally:
        core.use_isa(chosen)


@pytest.mark.fuzz
def test_emulated_cuda_equals_reference(fuzz_count: int) -> None:
    if dispatch.core_emulated() is None:
        pytest.skip("fusedadapt._core_emulated is not built (make emulated)")
    for seed in range(200_000, 200_000 + max(len(OPTIMIZERS), fuzz_count // 20)):
        repeatable("emulated", seed)


@pytest.mark.fuzz
def test_triton_equals_reference(fuzz_count: int, quick_calls: None) -> None:
    pytest.importorskip("triton")
    for seed in range(300_000, 300_000 + max(len(OPTIMIZERS), fuzz_count // 20)):
        repeatable("triton", seed, small=True)


def test_a_failure_says_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count()
    monkeypatch.setattr(Run, "guards", lambda self, case, k: torch.tensor(next(count)))
    with pytest.raises(AssertionError, match=r"repeat: PYTHONPATH=. python tests/test_optim_fuzz.py cpp 3\n"):
        repeatable("cpp", 3)


if __name__ == "__main__":
    print(Case(int(sys.argv[2]), sys.argv[1] == "triton").describe())
    run_case(sys.argv[1], int(sys.argv[2]), small=sys.argv[1] == "triton")
    print("equal")

"""Running a case, and the truth beside it.

The truth is the reference in float64 on the same values. Before each step it takes over parameters and states of the optimizer under test, so
that every error is that of one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..optim import OPTIMIZERS, RULES, compact
from ..optim.spec import is_compact
from ..optim.state import state_dtype
from ..reference.optim import join_split
from . import data
from .cases import SHORT, Case
from .ulp import error_vs_truth, ulp_size

CPU = torch.device("cpu")
# fp32 arithmetic overflows beyond, float64 does not: such elements have no truth here.
LARGEST_GRADIENT, LARGEST_STATE = 1e18, 1e33
# Sign patterns for nudging up to seven inputs: every pair of inputs moves apart and together.
_HADAMARD = torch.tensor([[(-1) ** bin(i & j).count("1") for j in range(8)] for i in range(8)], dtype=torch.float64)


class Subject(Protocol):
    """An optimizer library under test."""

    name: str
    exact_steps: bool

    def build(self, case: Case, params: list[Tensor]) -> Any: ...
    def step(self, case: Case, optimizer: Any, step: int) -> None: ...
    def states(self, optimizer: Any, p: Tensor) -> Mapping[str, Any]: ...


class Ours:
    """Our optimizers on one backend (None: the one that dispatch picks)."""

    exact_steps = True

    def __init__(self, backend: str | None = None):
        self.backend, self.name = backend, backend or "default"

    def build(self, case: Case, params: list[Tensor]) -> Any:
        masks = {p: m.to(p.device) for i, p in enumerate(params) if (m := data.mask(case, i)) is not None}
        cls: Any = OPTIMIZERS[case.optimizer]
        optimizer = cls(data.groups(case, params), **case.shared, masks=masks, backend=self.backend)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    def step(self, case: Case, optimizer: Any, step: int) -> None:
        if hasattr(optimizer, "update_hessian") and step % 2 == 0:
            optimizer.update_hessian()
        scale_for(case, optimizer, step)
        optimizer.step()

    def states(self, optimizer: Any, p: Tensor) -> Mapping[str, Any]:
        state = optimizer.state.get(p, {})
        if not is_compact(state):
            return state
        group = next(g for g in optimizer.param_groups if any(p is q for q in g["params"]))
        return compact.spread(optimizer, "", p, group, state, RULES[optimizer._rule(group)])


def wide(t: Tensor) -> Tensor:
    """A contiguous float64 copy on the CPU, never the tensor itself: the subject writes in place."""
    return t.detach().to(CPU, torch.float64, copy=True).contiguous()


def scale_for(case: Case, optimizer: Any, step: int) -> None:
    """What GradScaler hands over before a step."""
    if case.grad_scale is not None:
        device = optimizer.param_groups[0]["params"][0].device
        optimizer.grad_scale = torch.tensor(case.grad_scale, device=device)
        optimizer.found_inf = torch.tensor(float(step in case.found_inf), device=device)


class Input(NamedTuple):
    """One tensor before a step, all float64 on the CPU: parameter (the master weight if there is one), gradient, states, clock."""

    p: Tensor
    g: Tensor | None
    states: dict[str, Tensor]
    clock: dict[str, float]


class Output(NamedTuple):
    """One tensor after a step, in float64."""

    p: Tensor
    states: dict[str, Tensor]
    clock: dict[str, float]


class Truth:
    """The reference in float64, one step at a time."""

    def __init__(self, case: Case):
        self.case = case
        self.params = [torch.nn.Parameter(data.parameter(case, i, CPU).double().contiguous()) for i in range(len(case.tensors))]
        masks = {p: m for i, p in enumerate(self.params) if (m := data.mask(case, i)) is not None}
        extras = {k: v for k, v in case.shared.items() if k in ("max_grad_norm", "decay_to")}
        self.anchors = [p.detach().clone() for p in self.params]
        cls: Any = OPTIMIZERS[case.optimizer]
        self.opt = cls(data.groups(case, self.params), **extras, masks=masks)
        if hasattr(self.opt, "train"):
            self.opt.train()
        numbers = {id(p): i for i, p in enumerate(self.params)}
        self.rules = [""] * len(self.params)
        for group in self.opt.param_groups:
            for p in group["params"]:
                self.rules[numbers[id(p)]] = self.opt._rule(group)
        self.group_of = {numbers[id(p)]: g for g in self.opt.param_groups for p in g["params"]}

    def fresh(self, index: int, p: Tensor, stored: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
        """States and clock before the first step; a state that starts as a copy of something is rounded to the dtype it is stored in."""
        rule, states = RULES[self.rules[index]], {}
        for name in rule.states[: rule.stored]:
            start = self.opt._initial(name, p, self.group_of[index])
            value = start.detach() if isinstance(start, Tensor) else torch.full_like(p, start)
            states[name] = value.to(stored).double()
        return states, {"step": 0.0, **rule.aux}

    def step(self, inputs: list[Input], step: int) -> list[Output]:
        """Every tensor after the step."""
        for i, (q, given) in enumerate(zip(self.params, inputs)):
            q.data.copy_(given.p)
            q.grad = None if given.g is None else given.g.clone()
            state = self.opt.state[q]
            state.update({k: v.clone() for k, v in given.states.items()})
            state["step"] = torch.tensor(given.clock["step"], dtype=torch.float32)
            state.update({k: torch.tensor(v, dtype=torch.float64) for k, v in given.clock.items() if k != "step"})
            if q in self.opt._masks:
                state["mask"] = self.opt._masks[q]
            if self.opt.decay_to == "init":
                state["anchor"] = self.anchors[i]
            if "hessian_diag" in RULES[self.rules[i]].states and q.grad is not None:
                q.hessian_diag = data.hessian(self.case, i, step).double()  # type: ignore[attr-defined]
        scale_for(self.case, self.opt, step)
        self.opt.step()
        out = []
        for i, q in enumerate(self.params):
            rule, state = RULES[self.rules[i]], self.opt.state[q]
            states = {k: state[k].clone() for k in rule.states[: rule.stored]}
            out.append(Output(q.detach().clone(), states, {k: float(state[k]) for k in ("step", *rule.aux)}))
        return out


@dataclass
class Finding:
    """How one quantity of one tensor came out of one step.

    ``ulp``: worst error in ulp of its dtype at the larger of its values before and after (a sum that cancels is no less exact for it).
    ``update``: where a parameter is off by more than 2 ulp of itself, the worst error beyond 1 ulp as a share of its true change.
    ``excused``: elements beyond the bound whose value is the exact one for inputs moved by a few fp32 roundings (a sign flip of a vanishing
    sum), or beyond fp32's range; they count in neither maximum. ``first``: the first mismatch in words.
    """

    tensor: int
    step: int
    quantity: str
    dtype: str
    kind: str
    elements: int
    ulp: float = 0.0
    update: float = 0.0
    excused: int = 0
    mismatches: int = 0
    first: str = ""


def allowed_error(before: Tensor, truth: Tensor, dtype: torch.dtype, parameter: bool) -> Tensor:
    """The bound on the absolute error, float64 elementwise.

    A parameter in fp32: 2 ulp, or 2e-6 of its change + 1 ulp; in 16 bits: 1 ulp + 2e-6 of its change. A state: 8 ulp (16 bits: 1 ulp) of
    the larger of its values before and after: what it was made of may have cancelled, and Adadelta's second one squares what five
    roundings made.
    """
    whole, t = dtype in (torch.float32, torch.float64), truth.nan_to_num()
    if not parameter:
        widest = torch.maximum(t.abs(), before.nan_to_num().abs())
        return ulp_size(widest, dtype) * (8.0 if whole else 1.001)
    ulp, change = ulp_size(t, dtype), (t - before.nan_to_num()).abs()
    if whole:
        return torch.maximum(2 * ulp, 2e-6 * change + ulp)
    return ulp + 2e-6 * change + ulp_size(t, torch.float32) * 2


class Comparison:
    """One subject on one case, beside the truth."""

    def __init__(self, case: Case, subject: Subject, device: torch.device = CPU):
        self.case, self.subject, self.device = case, subject, device
        self.params = [torch.nn.Parameter(data.parameter(case, i, device)) for i in range(len(case.tensors))]
        for p in self.params:
            if hasattr(p, "grad_dtype"):
                p.grad_dtype = None  # type: ignore[attr-defined]  # any
        self.truth = Truth(case)
        self.counts = [0.0] * len(self.params)
        self._moved: tuple[int, list[tuple[list[Input], list[Output]]]] = -1, []
        self.opt = subject.build(case, list(self.params))

    def prepare(self, step: int) -> None:
        for i, p in enumerate(self.params):
            p.grad = data.gradient(self.case, i, step, self.device)
            if p.grad is not None and "hessian_diag" in RULES[self.truth.rules[i]].states:
                p.hessian_diag = data.hessian(self.case, i, step).to(self.device)  # type: ignore[attr-defined]

    def _wide(self, i: int) -> Tensor:
        """The parameter as the rule sees it: its master weight if it has one."""
        p, states = self.params[i].detach(), self.subject.states(self.opt, self.params[i])
        if "master" in states:
            p = states["master"]
        elif "remainder" in states:
            p = join_split(p, states["remainder"])
        return wide(p)

    def inputs(self) -> list[Input]:
        out = []
        for i, p in enumerate(self.params):
            known = self.subject.states(self.opt, p)
            stored = state_dtype(self.opt, p) if isinstance(self.subject, Ours) else p.dtype
            states, clock = self.truth.fresh(i, self._wide(i), stored)
            states |= {k: wide(known[k]) for k in states if isinstance(known.get(k), Tensor)}
            clock["step"] = self.counts[i]
            clock |= {k: float(known[k]) for k in clock if known.get(k) is not None}
            out.append(Input(self._wide(i), None if p.grad is None else wide(p.grad), states, clock))
        return out

    def step(self, step: int) -> list[Finding]:
        """Runs one step on both sides and compares everything it should and should not have changed."""
        self.prepare(step)
        grads = [None if p.grad is None else p.grad.clone() for p in self.params]
        frozen = [p.detach().clone() for p in self.params]
        inputs = self.inputs()
        if hasattr(self.opt, "update_hessian"):  # it runs inside the subject's step and its result is an input of the truth's
            self.subject.step(self.case, self.opt, step)
            for i, before in enumerate(inputs):
                known = self.subject.states(self.opt, self.params[i])
                before.states.update({k: wide(known[k]) for k in ("hessian",) if k in known})
        else:
            self.subject.step(self.case, self.opt, step)
        outputs = self.truth.step(inputs, step)
        findings = []
        for i, p in enumerate(self.params):
            if p.grad is None or step in self.case.found_inf and self.case.grad_scale is not None:
                findings.append(self._untouched(i, step, "p (no step)", frozen[i], p.detach()))
            else:
                self.counts[i] += 1
                findings += self._compare(i, step, inputs, outputs[i], frozen[i])
            if (given := grads[i]) is not None and p.grad is not None:
                findings.append(self._untouched(i, step, "gradient", given, p.grad))
        return findings

    def _finding(self, i: int, step: int, quantity: str, dtype: torch.dtype, elements: int) -> Finding:
        return Finding(i, step, quantity, SHORT.get(dtype, str(dtype)), self.case.tensors[i].kind, elements)

    def _untouched(self, i: int, step: int, what: str, before: Tensor, after: Tensor, where: Tensor | None = None) -> Finding:
        """Nothing, or nothing outside the mask, may have changed by a single bit (NaN payloads aside)."""
        changed = ~((before == after) & (before.signbit() == after.signbit()) | before.isnan() & after.isnan()).cpu()
        if where is not None:
            changed &= where
        found = self._finding(i, step, what, before.dtype, before.numel())
        found.mismatches = int(changed.sum())
        if found.mismatches:
            at = tuple(changed.nonzero()[0].tolist())
            found.first = f"{what}{list(at)}: expected {before[at].item()!r} unchanged; got {after[at].item()!r}"
        return found

    def _compare(self, i: int, step: int, inputs: list[Input], output: Output, frozen: Tensor) -> list[Finding]:
        p, (true_p, true_states, true_clock), given = self.params[i], output, inputs[i]
        known = self.subject.states(self.opt, p)
        results = {"p": (p.detach(), true_p, given.p)}
        if "master" in known or "remainder" in known:
            results["master"] = (self._wide(i).float(), true_p, given.p)
        for k, t in true_states.items():
            if isinstance(known.get(k), Tensor):
                results[k] = (known[k].detach(), t, given.states[k])
        keep = data.mask(self.case, i) if self.case.tensors[i].masked else None
        findings = [self._judge(i, step, k, *v, inputs, keep) for k, v in results.items()]
        if keep is not None:
            findings.append(self._untouched(i, step, "p (frozen)", frozen, p.detach(), ~keep))
        if self.subject.exact_steps:
            found = self._finding(i, step, "clock", torch.float32, 1)
            wrong = {k: (float(known[k]), v) for k, v in true_clock.items() if abs(float(known[k]) - v) > 1e-12 * abs(v)}
            found.mismatches = len(wrong)
            found.first = "; ".join(f"{k}: expected {v!r}; got {got!r}" for k, (got, v) in wrong.items())
            findings.append(found)
        return findings

    def _judge(
        self, i: int, step: int, quantity: str, got: Tensor, truth: Tensor, before: Tensor, inputs: list[Input], keep: Tensor | None
    ) -> Finding:
        found, got = self._finding(i, step, quantity, got.dtype, got.numel()), got.cpu().contiguous()
        whole = quantity in ("p", "master")
        error = error_vs_truth(got, truth)
        bound = allowed_error(before, truth, got.dtype, whole)
        beyond = beyond_range(inputs[i])
        bad = (error.absolute > bound) & ~beyond
        if keep is not None:
            bad &= keep  # frozen elements are held to more than this bound
        if bool(bad.any()):
            excused = bad & (error.absolute <= bound + self._spread(i, step, quantity, inputs, truth))
            bad, beyond = bad & ~excused, beyond | excused
        found.excused, found.mismatches = int(beyond.sum()), int(bad.sum())
        if got.numel():
            absolute = torch.where(beyond, 0.0, error.absolute)
            size = torch.maximum(truth.nan_to_num().abs(), before.nan_to_num().abs())
            found.ulp = float((absolute / ulp_size(size, got.dtype)).max())
            own = ulp_size(truth.nan_to_num(), got.dtype)
            found.update = float(torch.where(absolute > 2 * own, (absolute - own) / (truth - before).abs(), 0.0).max()) if whole else 0.0
        if found.mismatches:
            at = tuple(bad.nonzero()[0].tolist())
            grad = inputs[i].g
            found.first = (
                f"{quantity}{list(at)}: expected {truth[at].item():.9g}; got {got[at].item():.9g} ({float(error.ulp[at]):.3g} ulp); "
                f"before {before[at].item():.9g}, gradient {'none' if grad is None else format(grad[at].item(), '.9g')}"
            )
        return found

    def _spread(self, i: int, step: int, quantity: str, inputs: list[Input], truth: Tensor) -> Tensor:
        """How far the truth moves when its inputs move by four fp32 roundings: what no fp32 arithmetic in another order can promise."""
        if self._moved[0] != step:
            self._moved = step, [(moved, self.truth.step(moved, step)) for moved in self._nudged(inputs)]
        spread = torch.zeros_like(truth)
        for moved, outputs in self._moved[1]:
            p, states, _ = outputs[i]
            # of the parameter its change counts: moved is not what a rounded one would be
            apart = (p - moved[i].p) - (truth - inputs[i].p) if quantity in ("p", "master") else states[quantity] - truth
            spread = torch.maximum(spread, apart.abs().nan_to_num(nan=0.0, posinf=0.0))
        return spread

    @staticmethod
    def _nudged(inputs: list[Input]) -> Iterator[list[Input]]:
        for signs in _HADAMARD.tolist():
            moved = []
            for v in inputs:
                states = {k: _nudge(s, signs[2 + n]) for n, (k, s) in enumerate(v.states.items())}
                moved.append(v._replace(p=_nudge(v.p, signs[0]), g=None if v.g is None else _nudge(v.g, signs[1]), states=states))
            yield moved


def beyond_range(given: Input) -> Tensor:
    """bool: elements with an input so large that fp32 overflows where float64 does not."""
    assert given.g is not None
    out = given.g.isfinite() & (given.g.abs() > LARGEST_GRADIENT)
    for s in given.states.values():
        out |= s.isfinite() & (s.abs() > LARGEST_STATE)
    return out


def _nudge(x: Tensor, sign: float) -> Tensor:
    # 2^-134: a product with a learning rate of 1e-4 that lands among fp32's subnormal numbers loses that much of its factor
    moved = x * (1 + sign * 2.0**-22) + sign * 2.0**-134
    return torch.where((x >= 0) & (moved < 0), 0.0, moved)  # a second moment stays one


def compare_case(case: Case, subject: Subject, device: torch.device | str = CPU) -> list[Finding]:
    """Runs the case step by step beside the truth; a Finding per step, tensor and quantity.

    Raises whatever the subject raises: a case of fuzz_case is valid for every optimizer of ours.
    """
    comparison = Comparison(case, subject, torch.device(device))
    with torch.no_grad():
        return [finding for step in range(case.steps) for finding in comparison.step(step)]


def run_case(case: Case, backend: str | None = None, device: torch.device | str = CPU) -> dict[str, Tensor]:
    """All steps of the case on one backend, no truth beside it: "p0", "p0.exp_avg", … -> tensors. Backends must agree on these bit for bit."""
    comparison = Comparison(case, Ours(backend), torch.device(device))
    for step in range(case.steps):
        comparison.prepare(step)
        comparison.subject.step(case, comparison.opt, step)
    out = {}
    for i, p in enumerate(comparison.params):
        out[f"p{i}"] = p.detach()
        out |= {f"p{i}.{k}": v for k, v in comparison.subject.states(comparison.opt, p).items() if isinstance(v, Tensor)}
    return out


def truth_of_case(case: Case) -> dict[str, Tensor]:
    """All steps of the case in float64, no rounding between them, same names as run_case (parameters, rule states)."""
    truth = Truth(case)
    given = [Input(q.detach().clone(), None, *truth.fresh(i, q.detach(), torch.float64)) for i, q in enumerate(truth.params)]
    for step in range(case.steps):
        grads = [data.gradient(case, i, step, CPU) for i in range(len(given))]
        inputs = [v._replace(g=None if g is None else wide(g)) for v, g in zip(given, grads)]
        given = [Input(p, None, states, clock) for p, states, clock in truth.step(inputs, step)]
    out: dict[str, Tensor] = {}
    for i, v in enumerate(given):
        out |= {f"p{i}": v.p, **{f"p{i}.{k}": s for k, s in v.states.items()}}
    return out

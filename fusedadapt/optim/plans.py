"""A plan updates the parameters of one device and one rule, with one launch, through one backend."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..ops import shim as shims
from ..reference import optim as reference
from . import coded, compact
from . import table as tables
from .spec import CODED_CODES, HYPER_FIELDS, RULES, UNCODED, UNSIGNED, is_compact
from .state import complete, distributed, lacking

if TYPE_CHECKING:
    from .base import FusedOptimizer


VERSIONS_TO_ADVANCE = 1  # what cpu_step returns where it has not done so itself


class Entry(NamedTuple):
    param: Tensor
    group: int
    ordinal: int
    name: str


class Scalars(NamedTuple):
    """What one step shares; tensors are 0-d fp32 (``clip`` of a wide plan: fp64) on the plan's device, or None."""

    grad_scale: Tensor | None
    found_inf: Tensor | None
    clip: Tensor | None
    seed: int
    stochastic: bool


def on(t: Tensor | None, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor | None:
    if t is None or (t.device == device and t.dtype == dtype):
        return t
    return t.to(device=device, dtype=dtype)


def choose(opt: FusedOptimizer, device: torch.device, dtype: torch.dtype) -> dispatch.Choice:
    """The backend for parameters of this device and dtype; raises where there is none."""
    op = f"optim.{type(opt).__name__}"
    if device.type == "meta":
        raise ValueError(f"{op}: expected parameters with values; got one on the meta device; materialise the model first (Module.to_empty)")
    if dtype == torch.float64:
        return dispatch.Choice("reference", "fp64 parameters: the reference is the fp64 path")
    return dispatch.pick(op, device.type, requested=opt.backend)


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _map(name: str) -> int:
    """The table's code of the dynamic map a state is in, if it is coded with one number a block; 0: it may not be coded."""
    return 0 if name in UNCODED else CODED_CODES["unsigned" if name in UNSIGNED else "signed"]


class Plan:
    """Common part: the table, state on demand, gradients in the parameter's memory order."""

    wide = False  # whether parameters are updated in fp64
    _checked = -1  # placement of the table when it was last checked

    def __init__(self, opt: FusedOptimizer, rule: str, device: torch.device, choice: dispatch.Choice, entries: list[Entry]):
        self._opt = weakref.ref(opt)  # it holds its plans: in a cycle, its states would outlive it until the next garbage collection
        self.rule, self.device, self.choice, self.entries = rule, device, choice, entries
        self.spec = RULES[rule]
        self.hypers: list[list[float]] = []
        self._begin()
        core = dispatch.core()
        make: Any = tables.Table if core is None else core.Table
        exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
        self.table = make(exchange, tables.read, list(self.spec.states), list(self.spec.aux), opt._extra_key,
                          tables.DEVICE_TYPES[device.type], device.index or 0, [_map(k) for k in self.spec.states])  # fmt: skip
        self._error = (tables.TableError,) if core is None else (tables.TableError, core.TableError)
        if (shim := shims.shim()) is not None:
            self.table.use_shim(shim)
        for e in entries:
            self.table.add(e.param, opt._state_of(e.param), e.group, e.ordinal, *opt._index_map(e.param), compact.wanted(opt, e.param))

    @property
    def opt(self) -> FusedOptimizer:
        opt = self._opt()
        assert opt is not None
        return opt

    def _begin(self) -> None:
        self.copied: list[int] = []  # entries whose gradient had to be copied this step
        self.given: dict[Tensor, Tensor] = {}  # parameter -> what this step takes in place of its gradient
        self._shards = [i for i, e in enumerate(self.entries) if hasattr(e.param, "_local_tensor")]

    def explain(self) -> tuple[str, str, str]:
        name = f"{type(self.opt).__name__}[{self.rule}] {self.device}"
        copied = f"; {len(self.copied)} gradients copied into the parameter's memory order" if self.copied else ""
        return name, self.choice.backend, f"{len(self.entries)} tensors; {self.choice.reason}{copied}"

    def prepare(self) -> None:
        """Reads every tensor and checks it. Writes nothing but missing states."""
        threads = torch.get_num_threads()
        scan = self._scan_given if self._shards else self.table.scan
        if self.copied or self._shards:
            self._redistribute()
        try:
            if self._checked < 0:
                self._check_orders()
            status = scan(threads)
            if status == tables.MISSING_STATE:
                self._make_states([self.entries[i] for i in self.table.missing])
                status = scan(threads)
            if self.table.placement != self._checked and self._complete_states():
                status = scan(threads)
            if status == tables.STRIDED_GRADIENT:
                self.copied = list(self.table.strided)
                for i in self.copied:
                    p = self.entries[i].param
                    g = self.given.get(p, tables.local(p.grad))
                    self.given[p] = tables.memory_order(g.detach(), tables.local(p.detach()))
                status = self._scan_given(threads)
            if self.table.placement != self._checked:
                self.table.check_overlap()
                self._check_apart()
                self._check_orders()
                self._checked = self.table.placement
        except self._error as error:
            raise self._refusal(*error.args) from None

    def _redistribute(self) -> None:
        """Gradients of sharded parameters, cut as these are; forgets the last step's."""
        self.copied, self.given = [], {}
        for e in (self.entries[i] for i in self._shards):
            if (g := distributed().cut_gradient(e.param, e.name)) is not None:
                self.given[e.param] = g

    def _scan_given(self, threads: int) -> int:
        for i in (*self._shards, *self.copied):
            if (g := self.given.get(self.entries[i].param)) is not None:
                self.table.use_gradient(i, g)
        status: int = self.table.scan(threads)
        return status

    def release(self) -> None:
        """After the step: its copies of gradients go."""
        self.given = {}

    def _make_states(self, entries: list[Entry]) -> None:
        self.opt._init_states(entries, self.rule)

    def _complete_states(self) -> bool:
        """Makes the master weights and anchors that are not there; whether there were such."""
        opt = self.opt
        entries = [e for e in (self.entries if opt.master_weights or opt.decay_to == "init" else ()) if lacking(opt, e.param, opt._state_of(e.param))]
        if entries:
            self._complete(entries)
        return bool(entries)

    def _complete(self, entries: list[Entry]) -> None:
        for e in entries:
            complete(self.opt, e.param, self.opt._state_of(e.param))

    def _check_apart(self) -> None:
        """Raises ValueError where a parameter with a gradient shares memory with one of another plan. (Each table sees its own alone.)"""
        opt = self.opt
        if self not in opt._plans:  # of one parameter, in a backward hook: looking at all others for each would take the square of their number
            return
        others = [e for plan in opt._plans if plan is not self and plan.device == self.device for e in plan.entries]
        live = {id(e.param): e for e in others if compact.gradient(e.param, compact.wanted(opt, e.param))[0] is not None}
        if not live:
            return
        both = list((live | {id(e.param): e for e in self.active_entries()}).values())
        try:
            tables.refuse_overlap({i: e.param for i, e in enumerate(both)})
        except tables.TableError as error:
            i, code = error.args
            e, other = both[i], both[int(code.partition(":")[2])]
            raise tables.refusal(f"{type(opt).__name__}.step", e.name, code, e.param, {}, other.name) from None

    def _check_orders(self) -> None:
        orders = self.opt._orders
        for i, e in enumerate(self.entries if orders else ()):
            if e.param in orders and not tables.has_order(tables.local(e.param.detach()), orders[e.param]):
                raise tables.TableError(i, "order:param")

    def _refusal(self, index: int, code: str) -> ValueError:
        e = self.entries[index]
        other = self.entries[int(code.partition(":")[2])].name if code.startswith("overlap") else ""
        return tables.refusal(f"{type(self.opt).__name__}.step", e.name, code, e.param, self.opt._state_of(e.param), other)

    def active_entries(self) -> list[Entry]:
        return [self.entries[i] for i in self.table.active]

    def owners(self) -> list[Entry]:
        """The entry of each tensor of the table: a parameter with cohorts has several."""
        return [self.entries[i] for i in self.table.owners]

    def set_hypers(self, hypers: list[list[float]]) -> None:
        self.hypers = hypers

    def bump_versions(self) -> None:
        if self.table.bump_versions(torch.get_num_threads()):
            return
        params = self.table.active_params
        torch.autograd.graph.increment_version(params)
        if self.opt._sharded:
            torch.autograd.graph.increment_version([tables.local(p) for p in params if hasattr(p, "_local_tensor")])

    def squares(self, scalars: Scalars) -> Tensor:
        """fp64, one per `owners`: sum of squares of each unscaled gradient (all its elements, whatever the mask says)."""
        raise NotImplementedError

    def run(self, scalars: Scalars) -> None:
        raise NotImplementedError


class CpuPlan(Plan):
    """C++ over threads and SIMD."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        core = dispatch.core()
        assert core is not None
        self._index = [name for name, _, _ in core.RULES].index(self.rule)

    def set_hypers(self, hypers: list[list[float]]) -> None:
        super().set_hypers(hypers)
        self.table.set_hypers(hypers)

    def squares(self, scalars: Scalars) -> Tensor:
        out = torch.empty(self.table.count, dtype=torch.float64, device="cpu")
        self.table.cpu_squares(torch.get_num_threads(), address(scalars.grad_scale), out.data_ptr())
        return out

    def run(self, scalars: Scalars) -> None:
        scale, found, clip, seed, stochastic = scalars
        done = self.table.cpu_step(self._index, torch.get_num_threads(), address(scale), address(found), address(clip), seed, stochastic)
        if done == VERSIONS_TO_ADVANCE:
            self.bump_versions()


class ReferencePlan(Plan):
    """Pure PyTorch, tensor by tensor: the truth, and the only one that takes fp64."""

    def __init__(self, opt: FusedOptimizer, rule: str, device: torch.device, choice: dispatch.Choice, entries: list[Entry]):
        self._opt = weakref.ref(opt)
        self.rule, self.device, self.choice, self.entries = rule, device, choice, entries
        self.spec = RULES[rule]
        self._begin()
        self.wide = any(e.param.dtype == torch.float64 for e in entries)
        self.active: list[Entry] = []

    def prepare(self) -> None:
        self._redistribute()
        active = {i: e for i, e in enumerate(self.entries) if self._gradient(e)[0] is not None}
        self.active = list(active.values())
        missing = [e for e in self.active if any(self.opt._state_of(e.param).get(k) is None for k in (*self.spec.states, *self.spec.aux, "step"))]
        if missing:
            self.opt._init_states(missing, self.rule)
        self._complete_states()
        try:
            self._check_orders()
            for e in self.active:
                self._check(e)
            tables.refuse_overlap({i: e.param for i, e in active.items()})
            self._check_apart()
        except tables.TableError as error:
            raise self._refusal(*error.args) from None

    def _gradient(self, e: Entry) -> tuple[Any, bool]:
        g, packed = compact.gradient(e.param, compact.wanted(self.opt, e.param))
        return None if g is None else self.given.get(e.param, tables.local(g)), packed

    def _check(self, e: Entry) -> None:
        p, (g, packed), state = tables.local(e.param), self._gradient(e), self.opt._state_of(e.param)
        chosen = (compact.count(state),) if compact.wanted(self.opt, e.param) else tuple(p.shape)
        bad = ""
        if g.layout != torch.strided:
            bad = "read:grad"
        elif p.device != g.device:
            bad = "device:grad"
        elif packed and g.shape != chosen:
            bad = "compact:compact_grad"
        elif not packed and p.shape != g.shape:
            bad = "shape:grad"
        elif not tables.is_dense(p) and p.numel():
            bad = "strides:param"
        for k in self.spec.states:
            if tables.local(state[k]).shape != chosen:
                bad = f"shape:{k}" if chosen == p.shape else f"compact:{k}"
            elif state[k].device != p.device:
                bad = f"device:{k}"
            elif not state[k].is_floating_point() and k not in coded.names(state):
                bad = f"dtype:{k}"
        if bad:
            raise tables.refusal(f"{type(self.opt).__name__}.step", e.name, bad, e.param, state)

    def active_entries(self) -> list[Entry]:
        return self.active

    def owners(self) -> list[Entry]:
        return self.active

    def squares(self, scalars: Scalars) -> Tensor:
        out = []
        for e in self.active:
            g = self._gradient(e)[0]
            g = g if g.dtype == torch.float64 else g.float()
            g = g if scalars.grad_scale is None else g / scalars.grad_scale
            out.append(g.double().square().sum())
        return torch.stack(out) if out else torch.zeros(0, dtype=torch.float64, device=self.device)

    def run(self, scalars: Scalars) -> None:
        if scalars.found_inf is not None and scalars.found_inf.item() != 0:
            return
        rows: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        commits = []
        for e in self.active:
            state = self.opt._state_of(e.param)
            for c, first, end in compact.cohorts(state) if is_compact(state) else [(0, 0, -1)]:
                aux = [float(state[k].view(-1)[c]) for k in self.spec.aux]
                key = (e.group, float(state["step"].view(-1)[c]), *aux)
                if key not in rows:
                    rows[key] = self._row(e.group, *key[1:])
                self._update(e, state, rows[key][0], scalars, (c, slice(first, end)) if end >= 0 else None)
                commits.append((state, c, *rows[key][1:]))
        for state, c, step, after in commits:
            state["step"].view(-1)[c] = step
            for k, a in zip(self.spec.aux, after, strict=True):
                state[k].view(-1)[c] = a

    def _row(self, group: int, step: float, *aux: float) -> tuple[Any, float, list[float]]:
        """The row of a group at the step after ``step``; that step, and the scalars after it."""
        fields = {k: torch.tensor(v, dtype=torch.float64, device="cpu") for k, v in zip(HYPER_FIELDS, self.hypers[group], strict=True)}
        now = torch.tensor(step + 1.0, dtype=torch.float64, device="cpu")
        row, after = reference.make_rows(self.rule, fields, now, [torch.tensor(a, dtype=torch.float64, device="cpu") for a in aux])
        return reference.scalar_row(row), float(now), [float(a) for a in after]

    @torch.no_grad()
    def _update(self, e: Entry, state: dict[str, Any], row: Any, scalars: Scalars, cohort: tuple[int, slice] | None) -> None:
        """One parameter, or a cohort (its number, its elements) of its compact arrays: gathered, updated, put back."""
        part = None if cohort is None else cohort[1]
        p, (g, packed), opt = tables.local(e.param), self._gradient(e), self.opt
        index = None if part is None else compact.index_of(state, e.param)[part].long()

        def cut(name: str) -> Any:
            v = state.get(name)
            return None if v is None else tables.local(v) if part is None else v[part]

        keep = random = None
        if index is None and state.get("mask") is not None:
            keep = opt._unpack_mask(state["mask"], p)
        if scalars.stochastic and p.dtype == torch.bfloat16 and opt.master_weights != "split":
            element = opt._global_index(e.param, index)
            random = reference.random16(scalars.seed, element, e.ordinal, int(row.step)).view(p.shape if index is None else index.shape)
        here = p if index is None else compact.flat(p)[index]
        if index is not None:
            g = g[part] if packed else compact.in_order(g, p)[index]
        packed_states = coded.names(state)
        values = [coded.decode(state, k, cohort) if k in packed_states else cut(k) for k in self.spec.states]
        reference.step_(
            self.rule, here, g, values, row, stored=self.spec.stored, grad_scale=scalars.grad_scale,
            clip=scalars.clip, keep=keep, extra=cut(opt._extra_key), random=random, anchor=cut("anchor"),
        )  # fmt: skip
        for k, value in list(zip(self.spec.states, values, strict=True))[: self.spec.stored]:
            if k in packed_states:
                coded.write_(state, k, value, cohort, keep)
        if index is not None:
            compact.flat(p)[index] = here

"""Other libraries' optimizers as subjects of the same cases: what each class is called, what it calls its options and states."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..optim import OPTIMIZERS
from ..testing import Case
from ..testing import data as case_data


@dataclass(frozen=True)
class Adapter:
    """``cls``: "module:Class". ``fixed``: arguments that select the equation or the code path; ``states``: our state's name -> theirs;
    ``group``: our clock's name -> the key of their param group that holds it; ``global_options``: options they take once, not per group."""

    cls: str
    fixed: dict[str, Any] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    group: dict[str, str] = field(default_factory=dict)
    global_options: tuple[str, ...] = ()


_TORCH = ("Adadelta", "Adagrad", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")
_BNB = {"exp_avg": "state1", "exp_avg_sq": "state2", "momentum_buffer": "state1", "square_avg": "state1", "sum": "state1"}


def _torch(names: tuple[str, ...], **fixed: Any) -> dict[str, Adapter]:
    return {name: Adapter(f"torch.optim:{name}", fixed) for name in names}


def _bnb(*names: str) -> dict[str, Adapter]:
    # its 32-bit kernels: one state or two, always in fp32
    return {name: Adapter(f"bitsandbytes.optim:{name}", {"optim_bits": 32}, _BNB) for name in names}


#: library -> our optimizer's name -> how to run theirs
LIBS: dict[str, dict[str, Adapter]] = {
    "torch": _torch(_TORCH, foreach=False, fused=False),
    "torch-foreach": _torch(_TORCH, foreach=True),
    "torch-fused": _torch(("Adagrad", "Adam", "AdamW", "SGD"), fused=True),
    "adabelief_pytorch": {
        "AdaBelief": Adapter(
            "adabelief_pytorch:AdaBelief",
            {"print_change_log": False},
            global_options=("weight_decouple", "fixed_decay", "rectify", "degenerated_to_sgd"),
        )
    },
    "lion_pytorch": {"Lion": Adapter("lion_pytorch:Lion", {"decoupled_weight_decay": False})},
    "schedulefree": {
        "ScheduleFreeAdamW": Adapter("schedulefree:AdamWScheduleFree", group={"step": "k", "weight_sum": "weight_sum", "lr_max": "lr_max"})
    },
    "bitsandbytes": _bnb("Adam", "AdamW", "Lion", "SGD", "RMSprop", "Adagrad"),
}


class Foreign:
    """A library's optimizers as a testing.Subject; the options of a case that it does not know are dropped if they are off."""

    exact_steps = False

    def __init__(self, lib: str):
        if lib not in LIBS:
            raise ValueError(f"parity --lib: expected one of {', '.join(LIBS)}; got {lib!r}")
        self.name, self._adapters = lib, LIBS[lib]
        self._classes = {name: load(a.cls) for name, a in self._adapters.items()}

    @property
    def optimizers(self) -> list[str]:
        """Names of those of ours that the library has too."""
        return list(self._adapters)

    def adapt(self, case: Case) -> Case:
        """The case without what the library has no argument for: a truth of the same options."""
        known = inspect.signature(self._classes[case.optimizer]).parameters
        ours = inspect.signature(OPTIMIZERS[case.optimizer]).parameters
        defaults = {k: p.default for k, p in ours.items() if p.default is not p.empty}
        # Options they lack go back to our default. Those a group leaves out are spelled out: their defaults come from the first group.
        groups = [defaults | {k: v for k, v in options.items() if k in known} for options in case.groups]
        adapter = self._adapters[case.optimizer]
        for options in groups:
            options |= {k: groups[0][k] for k in adapter.global_options} | {k: v for k, v in adapter.fixed.items() if k in options}
        return Case(case.seed, case.optimizer, tuple(groups), {}, case.tensors, case.steps)

    def build(self, case: Case, params: list[Tensor]) -> Any:
        adapter, cls = self._adapters[case.optimizer], self._classes[case.optimizer]
        known = inspect.signature(cls).parameters
        groups = case_data.groups(case, params)
        for group in groups:
            group["params"] = [p for _, p in group["params"]]
            for key in [k for k in group if k != "params" and k not in known]:
                del group[key]
        # constructors check their own defaults before they look at the groups, and adabelief_pytorch greets on stdout
        arguments = {k: v for k, v in groups[0].items() if k != "params"} | adapter.fixed
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = cls(groups, **{k: v for k, v in arguments.items() if k in known})
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    def step(self, case: Case, optimizer: Any, step: int) -> None:
        optimizer.step()

    def states(self, optimizer: Any, p: Tensor) -> Mapping[str, Any]:
        adapter = next(a for name, a in self._adapters.items() if type(optimizer) is self._classes[name])
        out = dict(optimizer.state.get(p, {}))
        out |= {ours: out[theirs] for ours, theirs in adapter.states.items() if theirs in out}
        group = next(g for g in optimizer.param_groups if any(q is p for q in g["params"]))
        return out | {ours: group[theirs] for ours, theirs in adapter.group.items() if theirs in group}


def load(path: str) -> Any:
    """The class "module:Class".

    Raises:
        ModuleNotFoundError: the library is not installed.
    """
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)

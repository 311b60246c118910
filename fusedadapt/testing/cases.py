"""Random optimizer configurations, each a pure function of its seed."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..optim import OPTIMIZERS
from .hostile import KINDS, SPECIAL, Shape, hostile_shapes

Options = dict[str, Any]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SHORT = {FP32: "fp32", BF16: "bf16", FP16: "fp16", torch.float64: "fp64"}

# Hyper-parameters by name; those whose default means "off" come from each class's own examples, because they select another rule.
_SAMPLERS: dict[str, Any] = {
    "lr": lambda r: 10 ** r.uniform(-4, -1),
    "eps": lambda r: 10 ** r.uniform(-10, -4),
    "weight_decay": lambda r: r.choice([0.0, 0.01, 0.3]) or 10 ** r.uniform(-4, -1),
    "lr_decay": lambda r: r.uniform(0.001, 0.1),
    "initial_accumulator_value": lambda r: r.uniform(0.01, 1),
    "momentum_decay": lambda r: r.uniform(0.001, 0.05),
    "weight_lr_power": lambda r: r.choice([1.0, 2.0, 1.5]),
    "hessian_power": lambda r: r.choice([1.0, 0.5, 0.7]),
    "bs": lambda r: r.randint(16, 4096),
}
_SPECIFIC: dict[tuple[str, str], Any] = {
    ("RMSprop", "alpha"): lambda r: r.choice([0.5, 0.9, 0.97]),
    ("AdEMAMix", "alpha"): lambda r: r.uniform(1, 8),
    ("Adadelta", "rho"): lambda r: r.uniform(0.5, 0.97),
    ("SophiaG", "rho"): lambda r: r.uniform(0.01, 0.2),
    ("Signum", "momentum"): lambda r: r.uniform(0.5, 0.98),
}
_BETAS = (0.5, 0.8, 0.87, 0.9, 0.95, 0.98, 0.993)


@dataclass(frozen=True)
class TensorSpec:
    """One parameter. ``order``: its dimensions from the outermost in memory to the innermost; ``offset``: elements past a 16-byte boundary;
    ``grad_layout``: "same" memory order as the parameter, "other", or "gapped"; ``absent``: steps (from 0) without a gradient."""

    shape: Shape
    order: tuple[int, ...]
    offset: int
    group: int
    dtype: torch.dtype
    grad_dtype: torch.dtype
    grad_layout: str
    kind: str
    masked: bool
    absent: frozenset[int]


@dataclass(frozen=True)
class Case:
    """An optimizer with its options and data. ``groups``: options of each param group; ``shared``: keyword-only extras of the optimizer."""

    seed: int
    optimizer: str
    groups: tuple[Options, ...]
    shared: Options
    tensors: tuple[TensorSpec, ...]
    steps: int
    grad_scale: float | None = None
    found_inf: frozenset[int] = field(default_factory=frozenset)

    @property
    def repro(self) -> str:
        """A command line that runs this case alone."""
        return f"python -m fusedadapt parity optim --optimizer {self.optimizer} --seed {self.seed} --cases 1"

    def plain(self, dtype: torch.dtype | None = None) -> Case:
        """The part of the case that any optimizer library takes: one dtype per parameter, no options of ours."""
        tensors = []
        for t in self.tensors:
            chosen = dtype or t.dtype
            tensors.append(replace(t, dtype=chosen, grad_dtype=chosen, masked=False))
        return replace(self, shared={}, tensors=tuple(tensors), grad_scale=None, found_inf=frozenset())


def _options(name: str, example: Options, draw: random.Random) -> Options:
    """Every numeric hyper-parameter away from its default, under the structure that ``example`` chooses."""
    out: Options = {}
    for key, parameter in inspect.signature(OPTIMIZERS[name]).parameters.items():
        sampler = _SPECIFIC.get((name, key)) or _SAMPLERS.get(key)
        if key == "betas":
            out[key] = tuple(draw.choice(_BETAS) for _ in parameter.default)
        elif sampler is not None:
            out[key] = sampler(draw)
    if name in ("SGD", "Lion", "Signum", "Adadelta"):
        out["lr"] = 10 ** draw.uniform(-4, -2)
    if example.get("fixed_decay"):
        out["weight_decay"] = 10 ** draw.uniform(-4, -2)
    structure = {k: v for k, v in example.items() if k not in _SAMPLERS and (k != "betas" or v[0] == 0.0)}
    return out | structure | {"maximize": draw.random() < 0.3}


def _shape(draw: random.Random, shapes: list[Shape], budget: int) -> Shape:
    return draw.choice([s for s in shapes if math.prod(s) <= budget])


def _tensor(draw: random.Random, shapes: list[Shape], groups: int, steps: int, dtypes: tuple[torch.dtype, ...], kinds: list[str]) -> TensorSpec:
    shape = _shape(draw, shapes, 2100)
    order = list(range(len(shape)))
    if draw.random() < 0.4:
        draw.shuffle(order)
    dtype = draw.choice(dtypes)
    absent = frozenset(k for k in range(steps) if draw.random() < 0.3) if draw.random() < 0.3 else frozenset()
    return TensorSpec(
        shape, tuple(order), draw.choice([0, 0, 1, 3]), draw.randrange(groups), dtype, draw.choice([dtype, dtype, FP32, BF16]),
        draw.choice(["same", "same", "other", "gapped"]), draw.choice(kinds), draw.random() < 0.3, absent,
    )  # fmt: skip


def _shared(name: str, draw: random.Random, dtypes: tuple[torch.dtype, ...]) -> Options:
    half = FP16 in dtypes
    out: Options = {"state_dtype": draw.choice(["fp32", "bf16", "fp16"] if half else [None, None, "fp32", "bf16"])}
    out["master_weights"] = draw.choice([None, None, "fp32"] if half else [None, None, "fp32", "split"])
    if draw.random() < 0.3:
        out["max_grad_norm"] = 10 ** draw.uniform(-2, 1)
    if draw.random() < 0.3:
        out |= {"stochastic_rounding": True, "seed": draw.randrange(2**63)}
    return out


def _masking(case: Case) -> Options:
    """The form of masked states and what decay pulls towards; drawn apart, so that older seeds keep their cases."""
    draw, out = random.Random(f"masking {case.seed}"), Options()
    if any(t.masked for t in case.tensors) and draw.random() < 0.5:
        out["mask_state"] = "compact"
    if case.optimizer != "ScheduleFreeAdamW" and draw.random() < 0.25:
        out["decay_to"] = "init"
    return out


def fuzz_case(seed: int, optimizer: str | None = None) -> Case:
    """The case of this seed; without a name the seed also chooses the optimizer. Small: at most 6 tensors of 2,100 elements, 5 steps."""
    draw = random.Random(seed)
    chosen = draw.choice(sorted(OPTIMIZERS))
    name = optimizer or chosen
    if name not in OPTIMIZERS:
        raise ValueError(f"fuzz_case: expected one of {', '.join(OPTIMIZERS)}; got {name!r}")
    examples = OPTIMIZERS[name].examples
    base, mixed = examples[seed % len(examples)], draw.random() < 0.2
    groups = tuple(_options(name, draw.choice(examples) if mixed else base, draw) for _ in range(draw.randint(1, 3)))
    dtypes = draw.choice([(FP32,), (FP32,), (BF16,), (BF16,), (FP16,), (FP32, BF16), (FP32, BF16, FP16)])
    steps = draw.randint(2, 5)
    special = draw.random() < 0.15
    kinds = [k for k in KINDS if special or k not in SPECIAL]
    shapes = hostile_shapes()
    tensors = tuple(_tensor(draw, shapes, len(groups), steps, dtypes, kinds) for _ in range(draw.randint(1, 6)))
    case = Case(seed, name, groups, _shared(name, draw, dtypes), tensors, steps)
    if draw.random() < 0.2:
        case = replace(case, grad_scale=draw.choice([1024.0, 3.0]), found_inf=frozenset({draw.randrange(steps)}))
    return replace(case, shared=case.shared | _masking(case))


def fuzz_cases(seed: int, n: int, optimizer: str | None = None) -> Iterator[Case]:
    """The cases of seeds seed … seed + n - 1."""
    return (fuzz_case(seed + i, optimizer) for i in range(n))

"""From ``--optimizer NAME`` to a constructed optimizer, and from ours to torch's twin of it.

``NAME`` is a class of ``fusedadapt.optim.OPTIMIZERS`` or ``torch:CLASS``, in any case. Rules that need more than ``step()`` are recognised
by what they have (``train``/``eval``, ``update_hessian``, ``step(bs=…)``), so a new rule needs no line here unless its learning rate must
differ.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .errors import FinetuneError

FINETUNE_SCALE = 0.05  # AdamW: 1e-3 from scratch -> 5e-5 for fine-tuning; the same share of every other rule's own default
# Of torch's, what cannot step these models alone: it needs a closure, matrices only, or sparse gradients.
UNFIT = frozenset({"lbfgs", "muon", "sparseadam"})
NOT_HYPER = frozenset({"foreach", "fused", "capturable", "differentiable", "maximize"})


@dataclass(frozen=True)
class Recipe:
    """What a rule needs here beyond its defaults. ``lr=None`` is FINETUNE_SCALE times the class's default."""

    lr: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    constant_lr: bool = False  # averaging rules take warm-up but no decay
    create_graph: bool = False
    hessian_every: int = 10


# Where 5 % of the class's default is no sensible start: sign rules move every weight by lr at each step, the root-mean-square rules without
# bias correction by several lr at the first ones, and SGD by whatever the gradient is.
RECIPES: dict[str, Recipe] = {
    "sgd": Recipe(lr=2e-2, options={"momentum": 0.9}),
    "signum": Recipe(lr=1e-5),
    "lion": Recipe(lr=1e-5),
    "rmsprop": Recipe(lr=2e-5),
    "adagrad": Recipe(lr=2e-4),
    "exadam": Recipe(lr=1e-5),  # its first step is 16 times lr
    "sophiag": Recipe(lr=1e-5),
    "adahessian": Recipe(lr=1e-3, create_graph=True),
    "schedulefreeadamw": Recipe(lr=1e-4, constant_lr=True),
}


@dataclass
class Rule:
    """A chosen optimizer class with its arguments, before it meets parameters."""

    label: str  # "fusedadapt AdamW", "torch AdamW"
    cls: type[torch.optim.Optimizer]
    recipe: Recipe
    lr: float
    arguments: dict[str, Any]
    clip: float | None = None  # clip outside step(); ours clips inside
    note: str | None = None

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """One group for matrices and embeddings, one without weight decay for biases, norms and scales."""
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim > 1 and 1 not in p.shape]  # N x 1: the scales of an adapter
        vectors = [p for p in trained if p.ndim <= 1 or 1 in p.shape]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors}]
        if "weight_decay" in inspect.signature(self.cls).parameters:
            groups[1]["weight_decay"] = 0.0
        make: Any = self.cls
        return make([group for group in groups if group["params"]], lr=self.lr, **self.arguments)


def _torch_classes() -> dict[str, type[torch.optim.Optimizer]]:
    found = (value for value in vars(torch.optim).values() if isinstance(value, type) and issubclass(value, torch.optim.Optimizer))
    return {cls.__name__.lower(): cls for cls in found if cls is not torch.optim.Optimizer and cls.__name__.lower() not in UNFIT}


def _our_classes() -> dict[str, type[torch.optim.Optimizer]]:
    if importlib.util.find_spec("fusedadapt.optim") is None:
        raise FinetuneError("finetune: expected fusedadapt.optim; this installation lacks it; reinstall fusedadapt, or use --optimizer torch:AdamW")
    classes: dict[str, type[torch.optim.Optimizer]] = importlib.import_module("fusedadapt.optim").OPTIMIZERS
    return {name.lower(): cls for name, cls in classes.items()}


def _find(name: str, classes: dict[str, type[torch.optim.Optimizer]], what: str) -> type[torch.optim.Optimizer]:
    if name.lower() not in classes:
        known = ", ".join(sorted(cls.__name__ for cls in classes.values()))
        raise FinetuneError(f"finetune: expected --optimizer to be {what}; got {name!r}; use one of: {known}")
    return classes[name.lower()]


def _default(cls: type, name: str) -> Any:
    parameter = inspect.signature(cls).parameters.get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def resolve(name: str, *, lr: float | None, weight_decay: float | None, max_grad_norm: float | None, extras: dict[str, Any]) -> Rule:
    """The rule a user named. ``extras`` (master_weights, stochastic_rounding) exist on our rules only. FinetuneError for anything
    unknown."""
    from_torch = name.lower().startswith("torch:")
    cls = _find(name[6:], _torch_classes(), "one of torch's after 'torch:'") if from_torch else _find(name, _our_classes(), "one of our rules")
    if from_torch and extras:
        raise FinetuneError(f"finetune: expected one of our rules with {', '.join(extras)}; got {name!r}; drop the option or the 'torch:'")
    recipe = RECIPES.get(cls.__name__.lower(), Recipe())
    default = _default(cls, "lr")
    if lr is None:
        lr = recipe.lr if recipe.lr is not None else FINETUNE_SCALE * float(default)
    arguments = dict(recipe.options) | extras
    if weight_decay is not None:
        if "weight_decay" not in inspect.signature(cls).parameters:
            raise FinetuneError(f"finetune: expected a rule with weight decay for --weight-decay; {cls.__name__} has none; drop the option")
        arguments["weight_decay"] = weight_decay
    if from_torch:
        return Rule(f"torch {cls.__name__}", cls, recipe, lr, arguments | _fused(cls), clip=max_grad_norm)
    if max_grad_norm is not None:
        arguments["max_grad_norm"] = max_grad_norm
    return Rule(f"fusedadapt {cls.__name__}", cls, recipe, lr, arguments)


def torch_twin(rule: Rule, optimizer: torch.optim.Optimizer, max_grad_norm: float | None) -> Rule:
    """Torch's optimizer of the same name with the same hyper-parameters as ``optimizer``, or its AdamW, with a note, where it has none."""
    name = rule.cls.__name__
    classes = _torch_classes()
    twin = classes.get(name.lower())
    if twin is None:
        stand_in = torch.optim.AdamW
        lr = FINETUNE_SCALE * float(_default(stand_in, "lr"))
        note = f"torch has no {name}: compared with torch AdamW at lr {lr:g}"
        return Rule("torch AdamW", stand_in, Recipe(), lr, _fused(stand_in), clip=max_grad_norm, note=note)
    accepted = inspect.signature(twin).parameters.keys() - NOT_HYPER - {"lr"}
    hyper = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    return Rule(f"torch {twin.__name__}", twin, rule.recipe, rule.lr, hyper | _fused(twin), clip=max_grad_norm)


def _fused(cls: type[torch.optim.Optimizer]) -> dict[str, Any]:
    return {"fused": True} if "fused" in inspect.signature(cls).parameters else {}

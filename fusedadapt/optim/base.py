"""FusedOptimizer: a torch.optim.Optimizer whose step is one sweep over memory, whatever the rule."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .. import config, dispatch
from . import compact, options
from . import saved as checkpoints
from . import state as states
from .options import Extras
from .plans import CpuPlan, Entry, Plan, ReferencePlan, Scalars, choose, on
from .plans_device import PLANS, DevicePlan
from .spec import RULES, hyper
from .table import local

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class FusedOptimizer(Optimizer):
    """Base of every optimizer here: torch's interface, one launch per device and rule for any number of tensors.

    Shared keyword-only options:

    - ``maximize``: ascend. The L2 term (coupled decay) still decays, as in torch.
    - ``capturable``: accepted for torch's sake; on GPUs step counts always live on the device.
    - ``state_dtype``: ``None`` (the parameter's dtype, as torch), ``"fp32"``, ``"bf16"`` or ``"fp16"``. fp16 states must be asked for by name:
      a second moment of small gradients underflows there. ``"int8"`` and ``"fp8"`` keep one byte an element and a scale per block of
      ``state_block`` elements (32 to 2048; 256 and 128 if not given): the dynamic map of 8-bit Adam (arXiv 2110.02861), or e4m3 of a range that is
      expanded block by block (COAT, arXiv 2410.19313). Tensors under 4,096 elements keep fp32 states. See `fusedadapt.reference.lowbit`.
      A gradient that makes a state infinite or NaN (inf, or 1e30, squared) makes that of its whole block NaN, not its element's alone.
    - ``stochastic_rounding``: bf16 parameters are rounded up or down with the probability that makes the expectation exact. The random bits are
      a pure function of (``seed``, step, parameter number, global element index): a replay, another backend or another sharding gives the same.
    - ``master_weights``: ``"fp32"`` keeps an fp32 copy of each 16-bit parameter in the state; ``"split"`` keeps the low 16 bits of it beside a
      bf16 parameter (2 bytes, exact).
    - ``masks``: ``{param: bool tensor}``, True = trainable. Frozen elements keep parameter and state bit for bit, also under weight decay.
    - ``mask_state``: ``"dense"`` keeps states of the parameter's shape; ``"compact"`` keeps states and master weights for the trainable
      elements of each masked parameter only, and gives the same bits; below one element in 32 with a list of positions. With it a parameter's
      attribute ``compact_grad`` replaces ``.grad``: [nnz], by rising positions in memory (`fusedadapt.sparse.Mask.indices`), until
      `fusedadapt.sparse.grow_prune` changes the mask: then in the order of ``state["index"]``.
    - ``decay_to``: what weight decay pulls towards: ``"zero"``, or ``"init"``: the values the parameter had at its first step, kept as
      ``anchor``. Decoupled: p -= (1 - factor) (p - anchor); coupled: g += weight_decay (p - anchor).
    - ``max_grad_norm``: clip to this global L2 norm of the unscaled gradients, inside the step; ``opt.grad_norm`` holds the norm (0-d tensor, fp32;
      with fp64 parameters fp64). Frozen elements' gradients count, as without masks; of a compact gradient its own elements. Not with FSDP1.
    - ``backend``: ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``; raises if it cannot run. ``None`` chooses (see ``fusedadapt.explain``).
    - ``foreach``, ``fused``: accepted and ignored (every step is fused); ``differentiable=True`` is refused.

    Gradients are never modified. A parameter must be dense (any memory order); a gradient in another memory order is copied first.
    docs/optimizers.md has what an option cannot do, and what holds among several processes.
    """

    #: variant of the options -> keyword arguments that select it; tests, parity, benches and tables iterate these
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    #: entries of the official code's parameter groups that ours do without: written by `state_dict`, left out by `load_state_dict`
    official_group: ClassVar[frozenset[str]] = frozenset()
    #: how many betas the rule has, if any
    n_betas: ClassVar[int] = 2
    #: whether a beta may be 1, as in torch and the official codes: no bias correction divides by 1 - beta
    closed_betas: ClassVar[bool] = False
    #: hyper-parameters that weight_decay feeds: "l2" (coupled) or "decoupled"
    decay: ClassVar[str] = "l2"
    # what `options.take` sets
    state_dtype: str | None
    state_block: int
    master_weights: str | None
    mask_state: str
    decay_to: str
    stochastic_rounding: bool
    max_grad_norm: float | None
    backend: str | None
    _step_supports_amp_scaling = True
    _step_rule: ClassVar[str] = ""

    def __init__(self, params: Params, defaults: dict[str, Any], extras: Extras):
        options.take(self, extras)
        self.grad_norm: Tensor | None = None
        self._found_inf: Tensor | None = None
        self._reset()
        shared = {"maximize": False, "foreach": None, "capturable": False, "differentiable": False, "fused": None, "seed": 0}
        compact.check_options(self, extras.get("masks") or {})
        super().__init__(params, defaults | {k: extras.get(k, v) for k, v in shared.items()})  # type: ignore[arg-type]
        self._orders: dict[Tensor, tuple[int, ...]] = {}  # strides of masked parameters: the order of their masks' bits
        self._masks: dict[Tensor, Tensor] = states.pack_masks(self, extras.get("masks") or {})

    def _reset(self) -> None:
        """Forgets everything that is derived from param_groups and state."""
        self._plans: list[Plan] = []
        self._fingerprint: Any = None
        self._group_keys: list[Any] = []
        self._sharded = False
        self._single: dict[Tensor, tuple[Plan, int, Any, dict[str, Any]]] = {}

    # --- what a rule defines -----------------------------------------------------------------------------------------------------------

    def _rule(self, group: dict[str, Any]) -> str:
        """Name of the rule (spec.RULES) this group's options select."""
        return self._step_rule

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        """Hyper-parameter fields of the group; a rule with more options extends this."""
        lr = group["lr"]
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"  # read there, by the prologue: the host would have to wait
        fields = {"lr": 0.0 if on_device else lr, "sign": -1.0 if group["maximize"] else 1.0, "eps": group.get("eps", 0.0)}
        fields[self.decay] = group.get("weight_decay", 0.0)
        if "betas" in group:
            betas = group["betas"]
            if not isinstance(betas, Sequence) or len(betas) != self.n_betas:
                raise ValueError(f"{type(self).__name__}: expected betas as a tuple of {self.n_betas} numbers; got {betas!r}")
            fields |= {f"beta{i + 1}": beta for i, beta in enumerate(betas)}
        return fields

    def _initial(self, name: str, p: Tensor, group: dict[str, Any]) -> Tensor | float:
        """Start value of a state: a number, or a tensor of the parameter's shape."""
        return 0.0

    # --- the step ----------------------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Either all of them change, or, on an error, none.

        Raises ValueError (naming the tensor) on gradients or states that do not fit, RuntimeError if the requested backend cannot run.
        """
        hooks = _global_optimizer_pre_hooks or self._optimizer_step_pre_hooks or _global_optimizer_post_hooks or self._optimizer_step_post_hooks
        if hooks or torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
            return self._step_with_hooks(closure)
        return self._step(closure)

    # A graph break for torch.compile: raw addresses cannot be traced. (torch.compiler.disable would import the compiler with this module.)
    step = torch._disable_dynamo(step)  # type: ignore[attr-defined]
    # torch wraps the step of classes that do not say they handle hooks themselves; its wrapper costs more than our step of a small tensor.
    step.hooked = True  # type: ignore[attr-defined]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "step" in cls.__dict__:  # it calls ours, which runs the hooks: wrapped by torch as well, each would run twice
            cls.step.hooked = True  # type: ignore[attr-defined]

    def _step_with_hooks(self, closure: Callable[[], Any] | None) -> Any:
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)  # as torch's hooks see them
        kwargs: dict[str, Any] = {}
        with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
            for pre in (*_global_optimizer_pre_hooks.values(), *self._optimizer_step_pre_hooks.values()):
                if (result := pre(self, args, kwargs)) is None:  # type: ignore[func-returns-value]
                    continue
                if not isinstance(result, tuple) or len(result) != 2:
                    raise RuntimeError(f"{type(self).__name__}.step: expected None or (args, kwargs) of the pre-hook {pre}; it returned {result!r}")
                args, kwargs = result
            loss = self._step(*args[1:], **kwargs)
            for post in (*self._optimizer_step_post_hooks.values(), *_global_optimizer_post_hooks.values()):
                post(self, args, kwargs)
        return loss

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_()
        return loss

    def update_(self) -> None:
        """The step without closure and hooks."""
        plans = self._current_plans()
        for plan in plans:
            plan.prepare()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and self._sharded:
            found_inf = states.distributed().any_rank(self, found_inf)
        self._found_inf = found_inf  # GradScaler takes its own away after the step
        clip = self._clip(plans, grad_scale) if self.max_grad_norm is not None else None
        seed = self.param_groups[0]["seed"] if self.stochastic_rounding else 0
        for plan in plans:
            device = plan.device
            factor = on(clip, device, torch.float64 if plan.wide else torch.float32)
            plan.run(Scalars(on(grad_scale, device), on(found_inf, device), factor, seed, self.stochastic_rounding))
            if plan.given:
                plan.release()

    def step_one_(self, p: Tensor) -> None:
        """The step of one parameter alone (used inside backward hooks); its gradient must be there."""
        plan, i, key, state = self._single.get(p, (None, 0, None, None))
        if plan is None or state is not self.state[p] or self._rule(self.param_groups[i]) != plan.rule or config.asked() != self._asked:
            self._current_plans()
            home = next(plan for plan in self._plans if any(e.param is p for e in plan.entries))
            entry = next(e for e in home.entries if e.param is p)
            plan, i, key = type(home)(self, home.rule, home.device, home.choice, [entry]), entry.group, None
        now = self._getter(self.param_groups[i])
        if now != key or isinstance(self.param_groups[i]["lr"], Tensor):
            plan.set_hypers(self._hypers())
            self._send_lr([plan])
        self._single[p] = (plan, i, self._key(self.param_groups[i]), self.state[p])
        plan.prepare()
        seed = self.param_groups[0]["seed"] if self.stochastic_rounding else 0
        plan.run(Scalars(None, None, None, seed, self.stochastic_rounding))
        plan.release()

    def _clip(self, plans: list[Plan], grad_scale: Tensor | None) -> Tensor:
        """Leaves the global norm in grad_norm and returns the factor min(1, max_norm / (norm + 1e-6)) of torch's clip_grad_norm_, in fp64."""
        home = plans[0].device if plans else torch.device("cpu")
        parts = []
        for plan in plans:
            squares = plan.squares(Scalars(on(grad_scale, plan.device), None, None, 0, False))
            parts.append((states.distributed().sum_squares(plan, squares) if self._sharded else squares.sum()).to(home))
        total = sum(parts[1:], start=parts[0]) if parts else torch.zeros((), dtype=torch.float64, device=home)
        assert self.max_grad_norm is not None
        norm, factor = options.clip_factor(total, self.max_grad_norm)
        self.grad_norm = norm if any(plan.wide for plan in plans) else norm.float()
        return factor

    # --- plans -------------------------------------------------------------------------------------------------------------------------

    def _current_plans(self) -> list[Plan]:
        if self._identities() != self._fingerprint or config.asked() != self._asked:
            self._build()
        stale = any_tensor = False
        for group, known in zip(self.param_groups, self._group_keys):
            lr = group["lr"]
            is_tensor = isinstance(lr, Tensor)
            any_tensor |= is_tensor
            stale |= self._getter(group) != known or (is_tensor and lr.device.type == "cpu")
        if stale:
            self._refresh_hypers()
        if any_tensor:
            self._send_lr(self._plans)
        return self._plans

    def _identities(self) -> Any:
        """Of all parameters and their states: what the plans hold on to. (``state[p] = {}`` starts a parameter anew, in torch and here.)"""
        if (core := dispatch.core()) is not None:
            return core.fingerprint(self.param_groups, self.state)
        return [list(map(id, g["params"])) for g in self.param_groups], list(map(id, self.state.values()))

    def _build(self) -> None:
        self._reset()
        self._names, self._asked = states.names(self.param_groups), config.asked()
        hidden = ("params", "param_names", "initial_lr")
        self._getter = itemgetter(*[k for k in self.defaults if k not in hidden])
        buckets: dict[tuple[str, torch.device, str], list[Entry]] = {}
        choices: dict[tuple[str, torch.device, str], dispatch.Choice] = {}
        ordinal = 0
        self._rules = [self._rule(group) for group in self.param_groups]
        for i, (group, rule) in enumerate(zip(self.param_groups, self._rules, strict=True)):
            for p in group["params"]:
                states.check_held(self, p, self._names[ordinal])
                self._sharded |= hasattr(p, "_local_tensor")
                device = local(p.detach()).device
                choice = choose(self, device, p.dtype)
                key = (rule, device, choice.backend)
                choices[key] = choice
                buckets.setdefault(key, []).append(Entry(p, i, ordinal, self._names[ordinal]))
                ordinal += 1
        for key, entries in buckets.items():
            kind = {"cpp": CpuPlan, "reference": ReferencePlan}.get(key[2]) or PLANS[key[2]]
            self._plans.append(kind(self, key[0], key[1], choices[key], entries))
        self._fingerprint = self._identities()  # after the plans, which add the states that are not there yet
        self._group_keys = [None] * len(self.param_groups)

    def _hypers(self) -> list[list[float]]:
        """Every group's hyper-parameters, checked."""
        out = []
        for group in self.param_groups:
            fields = self._hyper(group)
            states.check_hypers(self, group, fields)
            out.append(hyper(**fields))
        states.check_seeds(self, self.param_groups)
        return out

    def _refresh_hypers(self) -> None:
        hypers = self._hypers()
        if [self._rule(group) for group in self.param_groups] != self._rules:
            self._build()
        for plan in self._plans:
            plan.set_hypers(hypers)
        self._group_keys = [self._key(g) for g in self.param_groups]

    def _key(self, group: dict[str, Any]) -> Any:
        """What tells whether the group's hyper-parameters have changed; None: nothing does, look at every step."""
        return None if states.may_change_in_place(group) else self._getter(group)

    def _send_lr(self, plans: list[Plan]) -> None:
        """Tensor learning rates on a device: copied into that device's hyper-parameters without the host looking."""
        for i, group in enumerate(self.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                for plan in plans:
                    if lr.device != plan.device or not isinstance(plan, DevicePlan):
                        raise ValueError(
                            f"{type(self).__name__}: expected the Tensor lr of group {i} on {plan.device} or on the CPU; got {lr.device}; move it"
                        )
                    plan.set_lr(i, lr)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and self.param_groups:
            param_group.setdefault("seed", self.param_groups[0]["seed"])  # which a checkpoint may have brought
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            options.check_group(self, group)
            states.check_hypers(self, group, self._hyper(group))  # before a parameter is asked for its rule, which the options decide
            states.check_seeds(self, self.param_groups)
            states.check_params(self, group)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise
        self._reset()

    def __fusedadapt_explain__(self) -> list[tuple[str, str, str]]:
        return [plan.explain() for plan in self._current_plans()]

    # --- state -------------------------------------------------------------------------------------------------------------------------

    @property
    def _extra_key(self) -> str:
        return "remainder" if self.master_weights == "split" else "master"

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        return self.state[p]

    def _init_states(self, entries: list[Entry], rule: str) -> None:
        fresh = states.fresh_states(self, entries, RULES[rule])  # all or nothing: an allocation that fails leaves no half state
        for e, new in zip(entries, fresh, strict=True):
            self.state[e.param].update({k: v for k, v in new.items() if k not in self.state[e.param]})

    _unpack_mask = staticmethod(states.unpack_mask)
    _global_index = staticmethod(states.global_index)

    def _index_map(self, p: Tensor) -> tuple[int, int, int]:
        return states.index_map(p) if self.stochastic_rounding else (0, 0, 0)

    @property
    def last_step_skipped(self) -> bool:
        """Whether GradScaler's found_inf made the last step change nothing (waits for the device)."""
        return self._found_inf is not None and bool(self._found_inf.item())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """torch's; compact gradients go the same way."""
        super().zero_grad(set_to_none)
        if self.mask_state == "compact":
            for p in self._masks:
                given = getattr(p, "compact_grad", None)
                if given is not None:
                    p.compact_grad = None if set_to_none else given.zero_()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """torch's format and names; states keep their dtypes. Loads into torch's optimizer of the same name, and the other way round; AdaBelief's
        and ScheduleFreeAdamW's into the official packages'. A function given as an option stays out."""
        hooks, self._optimizer_state_dict_post_hooks = self._optimizer_state_dict_post_hooks, OrderedDict()
        try:
            saved = self._saved()
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        for hook in hooks.values():  # they see, and may replace, the whole of it
            given = hook(self, saved)
            saved = saved if given is None else given
        return saved

    def _saved(self) -> dict[str, Any]:
        """The state dict before hooks; a rule whose official code writes more extends this."""
        saved = super().state_dict()
        saved["state"] = checkpoints.to_save(self, saved["state"])
        return saved

    def _own_form(self, state: dict[Any, Any], groups: list[dict[str, Any]]) -> dict[Any, Any]:
        """A loaded state as ours would be; a rule whose official code keeps it otherwise extends this. ``groups`` are saved ones."""
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of ours or of torch's optimizer of the same name, keeping every state's dtype.

        Raises ValueError, with nothing changed, if it belongs to other parameters, or to a rule with other states or options. (RAdam, EXAdam and
        Grams, which take DiffGrad's too, have the same names of both: they are not told apart.) A master weight or an anchor that it lacks is made
        at the next step, of the values the parameter then has. What a dense state has of frozen elements, and a compact one lacks, is filled in at
        once: load the model before.
        """
        checkpoints.load(self, state_dict)
        self._reset()

    def to_torch(self) -> Optimizer:
        """torch's optimizer of the same name on the same parameters, state and all: see `fusedadapt.optim.to_torch`."""
        from .interop import to_torch

        return to_torch(self)

    def __getstate__(self) -> dict[str, Any]:
        # as torch, without hooks, and without the `step` a learning-rate scheduler wraps around ours: neither can be pickled
        derived = ("_plans", "_getter", "_group_keys", "_fingerprint", "_single", "step")
        return {k: v for k, v in self.__dict__.items() if k not in derived and not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

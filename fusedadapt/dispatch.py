"""Which backend runs an op, and why. There is no silent fallback: the first one of each (op, reason) is logged, and inside `strict()` it
raises.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

from . import config

log = logging.getLogger("fusedadapt")

# Tried left to right when nobody asks for one. The interpreter ("triton" on CPU) and the emulator are thousands of times slower than the
# reference: only by name.
_ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
_said: set[tuple[str, str]] = set()
# What `explain` of a callable writes down, and the modules that remember what was picked.
_heard: ContextVar[list[tuple[str, str, str]] | None] = ContextVar("fusedadapt_heard", default=None)
_CHOOSERS = tuple(f"fusedadapt.ops.{name}" for name in ("lowrank", "quant", "quant_act", "fake_quant", "sparse"))


class Choice(NamedTuple):
    """A backend and one line on why it was chosen."""

    backend: str
    reason: str


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"fusedadapt.{name}"), ""
    except ImportError as error:
        return None, (_why_unbuilt() if name == "_core" else "") or str(error)


def _why_unbuilt() -> str:
    """What the build recorded if it left the core out on purpose, else ""."""
    try:
        return str(getattr(importlib.import_module("fusedadapt._build_info"), "CORE_ABSENT", ""))
    except ModuleNotFoundError:
        return ""


def core() -> ModuleType | None:
    """The compiled module `fusedadapt._core`, or None (see `core_reason`); its absence is logged once."""
    module, reason = _load("_core")
    if module is None:
        say_once("core", f"fusedadapt: compiled core not available ({reason}): using pure Python + Triton")
    return module


def core_reason() -> str:
    """Why `core()` is None; "" when it is there."""
    return _load("_core")[1]


def core_emulated() -> ModuleType | None:
    """The test-only module with the CUDA kernels built for the CPU (`python setup.py build_emulated`), or None."""
    return _load("_core_emulated")[0]


def has_cuda(module: ModuleType) -> bool:
    """True if this `_core` was built with its CUDA part."""
    return bool(getattr(module, "CUDA", False))


@functools.cache
def _triton_missing() -> str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not import: {error}"
    return ""


def _no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


def _unavailable(name: str, device_type: str) -> str:
    """Why `name` cannot run on tensors of this device type; "" if it can."""
    if name == "reference":
        return ""
    if name == "triton":
        if device_type == "cuda":
            return _triton_missing() or _no_gpu()
        if device_type != "cpu":
            return f"has no kernels for {device_type} tensors"
        if missing := _triton_missing():
            return missing
        # Triton's own switch, not the environment: it can be set from Python too, and it is what decides how a kernel launches.
        interpret = importlib.import_module("triton").knobs.runtime.interpret
        return "" if interpret else "runs on GPUs; CPU tensors need its interpreter (TRITON_INTERPRET=1)"
    home = {"cpp": "cpu", "cuda": "cuda", "emulated": "cpu"}[name]
    if device_type != home:
        return f"runs on {home} tensors; these are on {device_type}"
    if name == "emulated":
        module, reason = _load("_core_emulated")
        return reason or ("" if module is not None and has_cuda(module) else "the emulated core was built without the CUDA kernels")
    module = core()
    if module is None:
        return f"compiled core not available ({core_reason()})"
    if name == "cuda":
        return _no_gpu() if has_cuda(module) else "the compiled core was built without CUDA"
    return ""


def available_backends(device_type: str) -> dict[str, str]:
    """Every backend's name -> why it cannot run on tensors of `device_type` ("cpu", "cuda", …), or "" if it can."""
    return {name: _unavailable(name, device_type) for name in config.BACKENDS}


def pick(op: str, device_type: str, requested: str | None = None, *, unfit: Mapping[str, str] | None = None) -> Choice:
    """`_pick`, heard by `explain`."""
    choice, heard = _pick(op, device_type, requested, unfit), _heard.get()
    if heard is not None and (row := (f"{op} {device_type}", *choice)) not in heard:
        heard.append(row)
    return choice


def listening() -> bool:
    """Whether an `explain` wants to hear what is picked: who keeps a choice makes it anew then."""
    return _heard.get() is not None


def _pick(op: str, device_type: str, requested: str | None, unfit: Mapping[str, str] | None) -> Choice:
    """The backend for `op` on tensors of `device_type`.

    Args:
        op: name used in messages, e.g. "optim.AdamW".
        requested: the caller's own `backend=` argument. It is obeyed or it raises. `backend(...)` and FUSEDADAPT_BACKEND are wishes: an op
            that cannot grant one falls back and says so.
        unfit: backend -> why it cannot take these very tensors or options (e.g. {"cpp": "float64 parameters"}).

    Raises:
        ValueError: `requested` is not a backend's name.
        RuntimeError: `requested` cannot run, or a fallback inside `strict()`.
    """
    refused = unfit or {}

    def why_not(name: str) -> str:
        return refused.get(name) or _unavailable(name, device_type)

    if requested is not None:
        reason = why_not(config.checked_backend(requested, f"{op} backend"))
        if reason:
            raise RuntimeError(
                f"{op}: expected backend {requested!r}, as asked for; {requested}: {reason}; leave backend= out or change what it names"
            )
        return Choice(requested, "asked for by argument")
    skipped = []
    wish = config.current_backend()
    if wish is not None:
        if not (reason := why_not(wish)):
            return Choice(wish, "asked for by backend() or FUSEDADAPT_BACKEND")
        skipped.append(f"{wish}: {reason}")
    for name in _ORDER.get(device_type, ("reference",)):
        if name == wish:
            continue
        if not (reason := why_not(name)):
            return _settle(op, name, skipped, fell=wish is not None or (name == "reference" and bool(skipped)))
        skipped.append(f"{name}: {reason}")
    # Only a refused reference gets here: the caller's options exist in no backend at all.
    raise RuntimeError(f"{op}: expected a backend that can run; none can; " + "; ".join(skipped))


def _settle(op: str, name: str, skipped: list[str], *, fell: bool) -> Choice:
    reason = "; ".join(skipped) if skipped else "first choice"
    if fell:
        if config.is_strict():
            raise RuntimeError(f"{op}: expected no fallback (strict); would run on {name} because {reason}; mend that, or leave strict()")
        # An absent core has had its own line from core() already; one more for every op would only repeat it.
        if len(skipped) > 1 or "compiled core not available" not in reason:
            say_once(op, f"fusedadapt: {op} runs on {name} because {reason}")
    return Choice(name, reason)


def say_once(key: str, text: str) -> None:
    """Logs a line the first time it comes up for this key."""
    if (key, text) not in _said:
        _said.add((key, text))
        log.warning("%s", text)


def explain(obj: Any) -> list[tuple[str, str, str]]:
    """Prints and returns what runs where for an optimizer or module of ours, or a PEFT model: rows (what, backend or path, why).

    A `torch.nn.Module` is searched for parts of ours and for PEFT's adapter layers, patched (see `fusedadapt.patch`) or not. Any other callable is
    called, without arguments, and every op of ours that it runs is a row, in order: ``explain(lambda: lora_linear(x, w, a, b))``. (An optimizer that
    has made a step chooses nothing anew: explain it by itself.)

    Raises:
        TypeError: nothing of either in `obj`, a callable that needs arguments, or one that runs no op of ours.
    """
    if callable(obj) and not isinstance(obj, type) and not hasattr(obj, "named_modules") and not hasattr(obj, "__fusedadapt_explain__"):
        return _printed(_listen(obj))
    parts = [("", obj)] if hasattr(obj, "__fusedadapt_explain__") else list(getattr(obj, "named_modules", tuple)())
    rows: list[tuple[str, str, str]] = []
    for prefix, part in parts:
        if hasattr(part, "__fusedadapt_explain__"):
            rows += [(f"{prefix}.{what}" if prefix else what, backend, why) for what, backend, why in part.__fusedadapt_explain__()]
    if "peft" in sys.modules:
        rows += importlib.import_module("fusedadapt.integrations.peft").explain_layers(obj)
    if not rows:
        raise TypeError(f"explain: expected an optimizer or module of fusedadapt's; got {type(obj).__name__}; pass what fusedadapt made")
    return _printed(rows)


def _listen(call: Callable[..., Any]) -> list[tuple[str, str, str]]:
    """One row for each choice of a backend that the call makes."""
    name = getattr(call, "__name__", type(call).__name__)
    needed = [p.name for p in inspect.signature(call).parameters.values() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        raise TypeError(
            f"explain: expected a callable without arguments; {name} needs {', '.join(needed)}; wrap the call: explain(lambda: {name}(...))"
        )
    for module in _CHOOSERS:
        for remembered in ("_choose", "_direct"):
            if hasattr(sys.modules.get(module), remembered):
                getattr(sys.modules[module], remembered).cache_clear()
    rows: list[tuple[str, str, str]] = []
    token = _heard.set(rows)
    try:
        call()
    finally:
        _heard.reset(token)
    if not rows:
        raise TypeError(f"explain: expected a callable that runs ops of fusedadapt's; {name} ran none; explain an optimizer or a module by itself")
    return rows


def _printed(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    for what, backend, why in rows:
        print(f"{what:<{widths[0]}}  {backend:<{widths[1]}}  {why}".rstrip())
    return rows

"""Settings: the only place that reads FUSEDADAPT_* environment variables, and only when asked, never at import.

    FUSEDADAPT_BACKEND   reference | cpp | triton | cuda: what `backend(...)` would choose for the whole process
    FUSEDADAPT_STRICT    1: what `strict()` would choose for the whole process

(FUSEDADAPT_CORE, FUSEDADAPT_CUDA and FUSEDADAPT_CUDA_ARCHS steer the build; setup.py reads those.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

# "emulated" is the CUDA kernels on the test suite's CPU stand-in: selectable by name, never chosen, not in wheels.
BACKENDS = ("reference", "cpp", "triton", "cuda", "emulated")

# Threads start without their creator's ContextVars, so a hook that autograd runs on a GPU's backward thread sees the process-wide
# setting only: pass backend= to an optimizer that steps inside backward hooks.
_backend: ContextVar[str | None] = ContextVar("fusedadapt_backend", default=None)
_strict: ContextVar[bool | None] = ContextVar("fusedadapt_strict", default=None)


def checked_backend(name: str, source: str) -> str:
    """`name` itself if it is a backend's name.

    Raises:
        ValueError: it is not; the text names `source`, where it came from.
    """
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS[:4])}; got {name!r}; correct the name or leave it out")
    return name


def current_backend() -> str | None:
    """The backend asked for by the innermost `backend(...)`, else by FUSEDADAPT_BACKEND, else None: each op chooses."""
    chosen = _backend.get()
    if chosen is not None:
        return chosen
    name = os.environ.get("FUSEDADAPT_BACKEND", "")
    return checked_backend(name, "FUSEDADAPT_BACKEND") if name else None


def is_strict() -> bool:
    """True inside `strict()`, or with FUSEDADAPT_STRICT=1: a fallback raises instead of being logged."""
    chosen = _strict.get()
    if chosen is not None:
        return chosen
    value = os.environ.get("FUSEDADAPT_STRICT", "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"FUSEDADAPT_STRICT: expected 0 or 1; got {value!r}; set one of them or unset it")
    return value == "1"


_VARIABLES = {"FUSEDADAPT_BACKEND": current_backend, "FUSEDADAPT_STRICT": is_strict}


def from_environment() -> dict[str, str]:
    """The variables that are set -> their value."""
    return {name: value for name in _VARIABLES if (value := os.environ.get(name))}


def faults() -> dict[str, str]:
    """Those whose value is none -> what is wrong with it."""
    found = {}
    for name in from_environment():
        try:
            _VARIABLES[name]()
        except ValueError as error:
            found[name] = str(error)
    return found


def asked() -> tuple[str | None, bool | None]:
    """What the innermost `backend(...)` and `strict(...)` say: for who keeps a choice, to see that it must be made anew."""
    return _backend.get(), _strict.get()


# os.environ's own mapping of bytes: what Python puts around it encodes and decodes, 0.5 us a look.
_environment: Any = getattr(os.environ, "_data", os.environ)
_NAMES = tuple([name if _environment is os.environ else os.environ.encodekey(name) for name in _VARIABLES])


def unread() -> tuple[object, ...]:
    """The variables as they stand there: `asked` for the whole process, which may be changed at any time, too."""
    return tuple([_environment.get(name) for name in _NAMES])


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Every op in the block runs on this backend: "reference" | "cpp" | "triton" | "cuda".

    An op that cannot falls back, saying so once, or raises inside `strict()`. Holds for the current thread and async task. Nests; the
    innermost wins.

    Raises:
        ValueError: not a backend's name.
    """
    token = _backend.set(checked_backend(name, "backend"))
    try:
        yield
    finally:
        _backend.reset(token)


@contextmanager
def strict(enabled: bool = True) -> Iterator[None]:
    """An op in the block that would fall back raises RuntimeError, before it touches anything. `strict(False)` lifts an outer one."""
    token = _strict.set(enabled)
    try:
        yield
    finally:
        _strict.reset(token)


@contextmanager
def as_asked(asked: tuple[str | None, bool | None]) -> Iterator[None]:
    """The block runs as where `asked` was called: on a GPU autograd runs backward in a thread of its own, which knows of no context."""
    tokens = _backend.set(asked[0]), _strict.set(asked[1])
    try:
        yield
    finally:
        _backend.reset(tokens[0])
        _strict.reset(tokens[1])


def interpret_triton() -> None:
    """Lets Triton kernels run on CPU tensors, unless TRITON_INTERPRET says otherwise already. Triton's functions become interpreted ones when they
    are defined: call this before triton is first imported."""
    os.environ.setdefault("TRITON_INTERPRET", "1")

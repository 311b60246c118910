"""Who wants to see an op before its kernel runs: ways that leave the dispatcher out ask here first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from .. import dispatch
from .shim import torch_library

# Bound once: looked up through torch at every call they are a third of what a short way costs where caches are cold.
_c: Any = torch._C
_dispatch_modes, _function_mode = _c._len_torch_dispatch_stack, _c._is_torch_function_mode_enabled
_includes, _PRE_DISPATCH = _c._dispatch_tls_is_dispatch_key_included, _c.DispatchKey.PreDispatch
_tracing_state, _transforming = _c._get_tracing_state, _c._are_functorch_transforms_active
_profiling, _autocasting = _c._autograd._profiler_enabled, torch.is_autocast_enabled


def modes() -> bool:
    """Whether a dispatch mode is active, after autograd (FLOP counters, fakes, make_fx) or before it (make_fx with pre_dispatch=True)."""
    return _dispatch_modes() > 0 or _includes(_PRE_DISPATCH)


# What `changed` is in every state of torch's dispatcher that was met (csrc/looks.cpp): one look instead of six calls, 10 us where caches are cold.
_MOST = 256
_verdicts: dict[int, bool] = {}
_state: Callable[[], int] | None = None


def _look() -> int:
    """The state's number; 0 where this torch does not tell it."""
    global _state
    if _state is None:
        core = dispatch.core()
        found = None if core is None else core.calls_through(torch_library()._handle)
        _state = found or (lambda: 0)
    return _state()


def changed() -> bool:
    """Whether a call on a CPU means another one than it says: under a mode of either kind, inside a transform, under autocast, for torch.jit.trace,
    which runs it again for other tensors."""
    state = _look() if _state is None else _state()
    known = _verdicts.get(state)
    if known is None:
        known = _asked_for()
        if state and len(_verdicts) < _MOST:
            _verdicts[state] = known
    return known


def _asked_for() -> bool:
    """`changed`, asked one by one. All of them but the function mode are keys of the dispatcher, included or excluded."""
    if _dispatch_modes() > 0 or _includes(_PRE_DISPATCH) or _function_mode():
        return True
    return _transforming() or _autocasting("cpu") or _tracing_state() is not None


def tracing() -> bool:
    """Inside torch.jit.trace."""
    return _tracing_state() is not None


def watched() -> bool:
    """Whether somebody wants to see an op on a CPU: `changed`, and autograd's forward mode, which no_grad leaves on, and a profiler."""
    return changed() or forward_ad._current_level >= 0 or _profiling()

"""Who wants to see an op before its kernel runs: ways that leave the dispatcher out ask here first."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

# Bound once: looked up through torch at every call they are a third of what a short way costs where caches are cold.
_c: Any = torch._C
_dispatch_modes, _function_mode = _c._len_torch_dispatch_stack, _c._is_torch_function_mode_enabled
_includes, _PRE_DISPATCH = _c._dispatch_tls_is_dispatch_key_included, _c.DispatchKey.PreDispatch
_tracing_state, _transforming = _c._get_tracing_state, _c._are_functorch_transforms_active
_profiling, _autocasting = _c._autograd._profiler_enabled, torch.is_autocast_enabled


def modes() -> bool:
    """Whether a dispatch mode is active, after autograd (FLOP counters, fakes, make_fx) or before it (make_fx with pre_dispatch=True)."""
    return _dispatch_modes() > 0 or _includes(_PRE_DISPATCH)


def changed() -> bool:
    """Whether a call on a CPU means another one than it says: under a mode of either kind, inside a transform, under autocast, for torch.jit.trace,
    which runs it again for other tensors."""
    if _dispatch_modes() > 0 or _includes(_PRE_DISPATCH) or _function_mode():
        return True
    return _transforming() or _autocasting("cpu") or _tracing_state() is not None


def tracing() -> bool:
    """Inside torch.jit.trace."""
    return _tracing_state() is not None


def watched() -> bool:
    """Whether somebody wants to see an op on a CPU: a mode (FLOP counters, fakes, tracers), a transform, autograd's forward mode, which no_grad
    leaves on, a profiler; or autocast changes its input."""
    if _dispatch_modes() > 0 or _includes(_PRE_DISPATCH) or _function_mode() or _tracing_state() is not None:
        return True
    return forward_ad._current_level >= 0 or _transforming() or _profiling() or _autocasting("cpu")

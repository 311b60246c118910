"""Who wants to see an op before its kernel runs: ways that leave the dispatcher out ask here first."""

from __future__ import annotations

import torch


def modes() -> bool:
    """Whether a dispatch mode is active, after autograd (FLOP counters, fakes, make_fx) or before it (make_fx with pre_dispatch=True)."""
    c = torch._C
    return c._len_torch_dispatch_stack() > 0 or c._dispatch_tls_is_dispatch_key_included(c.DispatchKey.PreDispatch)


def tracing() -> bool:
    """Inside torch.jit.trace."""
    return torch._C._get_tracing_state() is not None

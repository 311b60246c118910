"""The commonest call of decoding the shortest way: few tokens on a CPU, no gradient asked for, nobody looking on.

One such product of 4096 x 4096 takes the kernel 0.2 ms. Autograd's node, the dispatcher and the checks of the op cost 0.015 ms more, and 0.1 ms
where other weights have swept the caches since. Here they are one check and one call, with the same kernel on the same numbers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..autocast import autocasting
from ..ops import quant as ops
from ..ops.address import readable
from ..ops.onlookers import modes, tracing
from ..reference.quant import Parts
from .formats import QFormat
from .tensor import QuantizedTensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BIASES = frozenset(ops.DTYPES)


@functools.lru_cache(maxsize=1024)
def _sizes(spec: str, n: int, k: int) -> Parts:
    return ops.sizes_of(QFormat.parse(spec), n, k)


@functools.lru_cache(maxsize=1024)
def _small(t: int, n: int, k: int, dtype: torch.dtype, spec: str) -> bool:
    return ops._takes(ops._module("cpp"), t, n, k, dtype, QFormat.parse(spec), False)


def _watched() -> bool:
    """Whether somebody wants to see an op: a mode (FLOP counters, fakes, tracers), a transform, autograd's forward mode, which no_grad leaves on, a
    profiler; or autocast changes its input."""
    return bool(
        modes()
        or torch._C._is_torch_function_mode_enabled()
        or tracing()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
        or torch._C._autograd._profiler_enabled()
        or autocasting("cpu")
    )


def product(x: Any, qw: Any, bias: Any) -> Tensor | None:
    """x W^T + bias, if the call is such a one; None leaves it, and what may be wrong with it, to the general way. x: [..., K]."""
    if torch.compiler.is_compiling() or _watched() or type(qw) is not QuantizedTensor or not readable(x) or x.dtype not in _DTYPES:
        return None
    if bias is not None and (not readable(bias) or bias.dtype not in _BIASES):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    if not x.dim() or not x.numel() or len(qw.shape) != 2 or x.shape[-1] != qw.shape[1] or not qw.shape[0]:
        return None
    fmt, (n, k) = qw.format, qw.shape
    parts: Any = Parts(qw.qdata, qw.scale, qw.zero, qw.super, qw.offset)
    sizes: Any = _sizes(fmt.spec, n, k)
    for t, size in zip(parts, sizes, strict=True):
        if t is None and size is None:
            continue
        if size is None or not readable(t) or t.numel() != size[0] or t.dtype is not size[1]:
            return None
    if bias is not None and bias.shape != (n,):
        return None
    if ops.choose("linear", "cpu", x.dtype).backend != "cpp" or not _small(x.numel() // k, n, k, x.dtype, fmt.spec):
        return None
    cpp: Any = ops._module("cpp")
    y: Tensor = cpp.linear(x if x.dim() == 2 else x.view(-1, k), parts, fmt, n, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)

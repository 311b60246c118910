"""The commonest call of decoding the shortest way: few tokens on a CPU, no gradient asked for, nobody looking on.

One such product of 4096 x 4096 takes the kernel 0.2 ms. Autograd's node, the dispatcher and the checks of the op cost 0.015 ms more, and 0.1 ms
where other weights have swept the caches since. Here they are one check and one call, with the same kernel on the same numbers; and a call whose
tensors look and lie as they did the last time needs no second check (cold, 0.12 ms before, 0.05 with that).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import asked, unread
from ..dispatch import listening
from ..ops import looks
from ..ops import quant as ops
from ..ops.address import readable, shaped
from ..ops.onlookers import watched
from ..reference.quant import Parts
from .formats import QFormat
from .tensor import CHECKED, QuantizedTensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BIASES = frozenset(ops.DTYPES)
# Bound once, as in `onlookers`.
_empty_like, _threads, _is_grad_enabled, _is_compiling = torch.empty_like, torch.get_num_threads, torch.is_grad_enabled, torch.compiler.is_compiling


class _Known(NamedTuple):
    """A call that was found in order: (x, bias, y, threads) -> whether it still is, and y then is written; what y is
    made like; `config.asked` and `config.unread` then."""

    run: Callable[[Any, Any, Tensor, int], bool]
    like: Tensor
    asked: tuple[str | None, bool | None]
    unread: tuple[object, ...]


@functools.lru_cache(maxsize=1024)
def _sizes(spec: str, n: int, k: int) -> Parts:
    return ops.sizes_of(QFormat.parse(spec), n, k)


@functools.lru_cache(maxsize=1024)
def _small(t: int, n: int, k: int, dtype: torch.dtype, spec: str) -> bool:
    return ops._takes(ops._module("cpp"), t, n, k, dtype, QFormat.parse(spec), False)


def product(x: Any, qw: Any, bias: Any) -> Tensor | None:
    """x W^T + bias, if the call is such a one; None leaves it, and what may be wrong with it, to the general way. x: [..., K]."""
    if _is_compiling() or watched() or type(qw) is not QuantizedTensor or _is_grad_enabled() and _wants_gradient(x, bias):
        return None
    known: _Known | None = qw.__dict__.get(CHECKED)
    if known is not None and not listening() and asked() == known.asked and unread() == known.unread:
        y = _empty_like(known.like)
        if known.run(x, bias, y, _threads()):
            return y
    return _first(x, qw, bias)


def _wants_gradient(x: Any, bias: Any) -> bool:
    return getattr(x, "requires_grad", False) or getattr(bias, "requires_grad", False)


def _first(x: Any, qw: QuantizedTensor, bias: Any) -> Tensor | None:
    """Checks everything, and leaves with the weight what may be run again for tensors like these."""
    if not readable(x) or x.dtype not in _DTYPES or (bias is not None and (not readable(bias) or bias.dtype not in _BIASES)):
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
    if looks.core() is not None and (bias is None or bias.dtype in _DTYPES):
        like = shaped((*x.shape[:-1], n), x.dtype)
        known = _Known(cpp.checked(x, parts, fmt, n, bias), like, asked(), unread())
        y = _empty_like(like)
        if known.run(x, bias, y, _threads()):
            qw.__dict__[CHECKED] = known
            return y
    out: Tensor = cpp.linear(x if x.dim() == 2 else x.view(-1, k), parts, fmt, n, bias)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], n)

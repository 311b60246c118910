"""The commonest layer the shortest way: on a CPU, in a dtype its library multiplies, one frozen dense base, one adapter with nothing between A and B.

What lies between the kernels costs 0.16 ms of Python where it is repeated alone, and 1.4 ms after a GEMM has swept the caches, for every line of it
is fetched from memory again: half of what a branch at 1536 -> 384 costs. So this case has a check, a forward and a backward of a few calls each, and
tensors that look as others did that were checked (csrc/looks.h) are not checked again. They run the kernels that `LowRankLinear` runs otherwise, on
the same numbers, and save what it saves: who meets such a node with a compiler or a dispatch mode in between takes the general way back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import asked, unread
from ..derivatives import first_order
from ..dispatch import listening
from ..ops import looks
from ..ops.address import readable, shaped
from ..ops.dense import multiplies
from ..ops.lowrank import checked, cpp_ops, native
from ..ops.onlookers import changed
from ..reference.lowrank import threshold_of
from .function import Plan, general_gradients

_HALF = (torch.bfloat16, torch.float16)
_fp32 = torch.float32
_MOST = 512  # calls that are remembered
# Bound once, as in `onlookers`.
_empty_like, _threads, _linear, _matmul = torch.empty_like, torch.get_num_threads, torch.nn.functional.linear, torch.matmul
_is_compiling = torch.compiler.is_compiling


class Known(NamedTuple):
    """What is known of calls whose tensors look like these. ``start``, ``back``: the kernels, which see for themselves that they do; ``y`` to ``dx``:
    what results are made like; ``look(dy) == dy``: dy lies as y does; ``plan``: the general way's; ``asked``, ``unread``: `config`'s at the check."""

    start: Callable[..., bool]
    back: Callable[..., bool]
    y: Tensor
    u: Tensor
    da: Tensor
    db: Tensor
    dx: Tensor
    look: Callable[..., int]
    dy: int
    half: bool
    plan: Plan
    asked: tuple[str | None, bool | None]
    unread: tuple[object, ...]


_known: dict[int, Known] = {}


def _fits(t: Tensor, dtype: torch.dtype, *shape: int) -> bool:
    return t.dtype is dtype and t.shape == shape


def known(x: Any, outputs: Sequence[Any], col_scale: Any) -> Known | None:
    """What is known of the call, if it is such a one; None leaves it, and what may be wrong with it, to the general way."""
    if _is_compiling() or len(outputs) != 1 or col_scale is not None:
        return None
    weight, bias, segments, row_scale, _ = outputs[0]
    if len(segments) != 1 or row_scale is not None:
        return None
    a, b, scaling, p, rank_gate, token_gate, core, activation = segments[0]
    if rank_gate is not None or token_gate is not None or core is not None or activation is not None:
        return None
    return known_of(x, weight, bias, a, b, scaling, p)


def known_of(x: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: Any, p: Any) -> Known | None:
    """`known` of one output and one segment that has nothing else."""
    if _is_compiling() or type(scaling) is not float or type(p) is not float or not 0.0 <= p < 1.0 or changed():
        return None
    module = looks.core()
    key = 0 if module is None else module.look(x, weight, a, b, bias)
    if not key or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    found = _known.get(key)
    if found is None or found.asked != asked() or found.unread != unread() or listening():
        found = _first(x, weight, a, b, bias)
        if found is not None:
            if len(_known) >= _MOST:
                _known.clear()
            _known[module.look(x, weight, a, b, bias)] = found  # a lazy copy has become a real one by now
    return found


def _first(x: Any, weight: Any, a: Any, b: Any, bias: Any) -> Known | None:
    """Checks everything."""
    if not (readable(x) and readable(weight) and readable(a) and readable(b)):  # first of all: a nested tensor has no shape to be asked for
        return None
    if weight.dim() != 2 or a.dim() != 2 or not x.dim() or not x.numel() or not a.shape[0] or not weight.shape[0]:
        return None
    n, k, rank = weight.shape[0], weight.shape[1], a.shape[0]
    data, adapters = x.dtype, a.dtype
    if data is not _fp32 and (data not in _HALF or not multiplies(data)) or adapters is not _fp32 and adapters is not data or x.shape[-1] != k:
        return None
    if not (_fits(weight, data, n, k) and _fits(a, adapters, rank, k) and _fits(b, adapters, n, rank)):
        return None
    if bias is not None and not (readable(bias) and _fits(bias, data, n)) or not native(x):
        return None
    tokens = x.numel() // k
    shapes = {"y": (*x.shape[:-1], n), "u": (tokens, rank), "da": (rank, k), "db": (n, rank), "dx": x.shape}
    with torch.inference_mode(False):
        like = {name: shaped(shape, data if name in ("y", "dx") else _fp32) for name, shape in shapes.items()}
        results = [_empty_like(like[name]) for name in ("u", "y", "da", "db", "dx")]  # as backward, which inference mode has none of, finds them
    start, back = checked(x, a, b, bias, *results)
    if x.dim() != 2:  # saved as a matrix
        back = checked(_rows(x), a, b, bias, *results)[1]
    look = looks.core().look
    plan: Plan = (((None,), False, "", n, k),)
    return Known(start, back, **like, look=look, dy=look(results[1]), half=data is not _fp32, plan=plan, asked=asked(), unread=unread())


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.view(-1, t.shape[-1])


def _run(
    of: Known, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, s: float, p: float
) -> tuple[Tensor, Tensor]:
    """y and u. fp32 comes before its product, 16 bits after it."""
    threshold = 0 if seed is None else threshold_of(p)
    u = _empty_like(of.u)
    if of.half:
        y = _linear(x, weight, bias)
        ran = of.start(x, a, b, None, u, y, seed, s, threshold, _threads())
    else:
        y = _empty_like(of.y)
        ran = of.start(x, a, b, bias, u, y, seed, s, threshold, _threads())
        _rows(y).addmm_(_rows(x), weight.t())
    if not ran:
        raise RuntimeError(
            "fusedadapt.lora_linear: expected its tensors to stay as they are during a call; one changed; let no other thread resize it"
        )
    return y, u


class PlainLinear(torch.autograd.Function):
    """(x [..., K], A, B, (weight, bias | None, seed int64 [1] | None, known, scaling, p)) -> y [..., N]; x, A, B and weight contiguous. What has no
    gradient comes as one, which autograd does not look into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, call: tuple[Tensor, Tensor | None, Tensor | None, Known, float, float]) -> Tensor:
        weight, bias, seed, of, s, p = call
        y, u = _run(of, x, a, b, weight, bias, seed, s, p)
        ctx.call, ctx.asked = (of, s, p), of.asked
        # What `LowRankLinear` saves, in its order: activation checkpointing compares the two where somebody looks on one time only. (A bias made in
        # inference mode cannot be saved, and is of no use here.)
        kept = None if bias is None or bias.is_inference() else bias
        want_x, want_a, *_ = ctx.needs_input_grad
        ctx.save_for_backward(_rows(x) if want_a else None, seed, u, weight if want_x else None, kept, a, b)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    @first_order("fusedadapt.lora_linear")
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        saved, wanted, (of, s, p) = ctx.saved_tensors, ctx.needs_input_grad, ctx.call
        if (short := _short_back(of, s, p, saved, wanted, dy)) is not None:
            return short
        x, seed, u, weight, _, a, b = saved
        general = (x, None, seed, None, u, None, weight, None, None, None, None, None, None, a, b, None, None, None)
        dx, da, db = general_gradients(of.plan, cpp_ops(), ((s, p),), wanted[:3], dy.reshape(-1, dy.shape[-1]), general)
        return None if dx is None else dx.reshape(*dy.shape[:-1], dx.shape[-1]), da, db, None


def _short_back(of: Known, s: float, p: float, saved: Sequence[Any], wanted: Sequence[bool], dy: Tensor) -> tuple[Tensor | None, ...] | None:
    """None where it must go the general way: not both factors are trained, somebody looks on, or a tensor lies otherwise than forward's (dy; what
    saved-tensor hooks bring back)."""
    if not (wanted[1] and wanted[2]) or _is_compiling() or changed() or of.look(dy) != of.dy:
        return None
    x, seed, u, weight, _, a, b = saved
    threshold = 0 if seed is None else threshold_of(p)
    da, db, dx = _empty_like(of.da), _empty_like(of.db), None
    if wanted[0]:
        dx = _matmul(dy, weight) if of.half else _empty_like(of.dx)
    if not of.back(dy, x, a, b, u, da, db, dx, seed, s, threshold, _threads()):
        return None
    if dx is not None and not of.half:
        _rows(dx).addmm_(_rows(dy), weight)
    if a.dtype is not _fp32:
        da, db = da.to(a.dtype), db.to(b.dtype)
    return dx, da, db, None


# Without what torch.autograd.Function does before: it asks for transforms, which `changed` has done, and unwraps what they have left behind, which no
# look is had at.
_apply: Any = super(torch.autograd.Function, PlainLinear).apply


def run(
    of: Known, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, s: Any, p: float, watched: bool
) -> Tensor:
    """y [..., N]. ``watched``: through autograd."""
    if watched:
        y: Tensor = _apply(x, a, b, (weight, bias, seed, of, s, p))
        return y
    return _run(of, x, a, b, weight, bias, seed, s, p)[0]

"""The low-rank family's ops, torch.ops.fusedadapt.lr_*: thin over the backends, which all have the functions of `reference.lowrank`.

All matrices are 2-D; rank-space results (U, V, dV, gradients of A and B) are fp32, fp64 where the data is. `p` is a CPU tensor of one dropout
probability per segment and `seed` an int64 tensor of one element on the data's device: run-time values, so that a compiled graph serves them all.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import config, dispatch
from ..reference import lowrank as reference
from .address import PLAIN
from .onlookers import modes
from .register import op

_is_compiling = torch.compiler.is_compiling  # bound once, as in `onlookers`
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FP64 = {"cpp": "float64 tensors", "triton": "float64 tensors"}
_NO_KERNEL = {"cuda": "this op's GPU kernels are Triton's", "emulated": "this op's GPU kernels are Triton's"}
_MODULES = {"reference": "reference.lowrank", "cpp": "ops.lowrank_cpp", "triton": "kernels.lowrank"}


@functools.cache
def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"fusedadapt.{_MODULES[backend]}")


@functools.lru_cache(maxsize=256)
def _choose(op: str, device_type: str, fp64: bool, wish: str | None, strict: bool) -> dispatch.Choice:
    """`choose`, once for each of what it depends on: a layer asks five times a pass, and its backward may do so where other wishes hold."""
    with config.as_asked((wish, strict)):
        return dispatch.pick(f"lowrank.{op}", device_type, unfit=_NO_KERNEL | (_FP64 if fp64 else {}))


def choose(op: str, device_type: str, dtype: torch.dtype) -> dispatch.Choice:
    """The backend of one op of this family for tensors of this device and dtype, and why."""
    return _choose(op, device_type, dtype == torch.float64, config.current_backend(), config.is_strict())


def backend_of(op: str, data: Tensor) -> ModuleType:
    """The module of the backend that `choose` names."""
    return _module(choose(op, data.device.type, data.dtype).backend)


def _refuse(op: str, expected: str, got: object, fix: str) -> NoReturn:
    raise ValueError(f"fusedadapt.lr_{op}: expected {expected}; got {got}; {fix}")


def _matrix(op: str, name: str, t: Tensor, rows: Any = None, columns: Any = None, like: Tensor | None = None) -> None:
    if t.dim() != 2:
        _refuse(op, f"{name} of two dimensions", f"shape {tuple(t.shape)}", "flatten it to rows")
    if t.dtype not in DTYPES:
        _refuse(op, f"{name} in float32, bfloat16, float16 or float64", t.dtype, "convert it")
    shape = t.shape
    if (rows is not None and shape[0] != rows) or (columns is not None and shape[1] != columns):
        wanted = f"({'any' if rows is None else rows}, {'any' if columns is None else columns})"
        _refuse(op, f"{name} of shape {wanted}", f"shape {tuple(shape)}", "pass matching shapes")
    if like is not None and t.device != like.device:
        _refuse(op, f"{name} on {like.device}", t.device, "move it there")


def check_vector(op: str, name: str, t: Tensor | None, length: Any, like: Tensor) -> None:
    if t is None:
        return
    if t.dim() != 1 or t.shape[0] != length:
        _refuse(op, f"{name} of shape ({length},)", tuple(t.shape), "pass matching shapes")
    if t.device != like.device:
        _refuse(op, f"{name} on {like.device}", t.device, "move it there")


def _segments(op: str, seed: Tensor | None, p: Tensor | None, ranks: Sequence[int], total: Any, like: Tensor) -> None:
    if not ranks or sum(ranks) != total or any(rank < 1 for rank in ranks):
        _refuse(op, f"ranks of at least 1 that add up to {total}", list(ranks), "give the height of each segment")
    if seed is None:
        return
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != like.device:
        _refuse(op, f"seed: one int64 on {like.device}", f"{seed.dtype} {tuple(seed.shape)} on {seed.device}", "convert or move it")
    if p is None or p.numel() != len(ranks) or p.device.type != "cpu":
        _refuse(op, f"p: {len(ranks)} probabilities on the CPU", None if p is None else f"{tuple(p.shape)} on {p.device}", "give one a segment")


def thresholds(op: str, seed: Tensor | None, p: Tensor | tuple[float, ...] | None, ranks: Sequence[int]) -> tuple[int, ...]:
    """Of each segment. The values of p are known only here, not when a compiler traces the checks."""
    if p is None:
        return (0,) * len(ranks)
    return _checked_thresholds(op, seed is not None, p if isinstance(p, tuple) else tuple(p.flatten().tolist()))


@functools.lru_cache(maxsize=256)
def _checked_thresholds(op: str, seeded: bool, values: tuple[float, ...]) -> tuple[int, ...]:
    if not all(0 <= v < 1 for v in values):
        _refuse(op, "p in [0, 1)", list(values), "choose probabilities below 1")
    if not seeded and any(values):
        _refuse(op, "a seed with p > 0", None, "pass one int64")
    return tuple(reference.threshold_of(v) for v in values)


def _rows(x: Tensor) -> Tensor:
    """x itself where kernels can read it: unit stride inside a row, rows apart; a copy otherwise."""
    return x if x.stride(1) == 1 and (x.stride(0) >= x.shape[1] or x.shape[0] == 1) else x.contiguous()


def _dense(t: Tensor | None) -> Tensor | None:
    """Rank-space matrices and vectors, which kernels read without strides."""
    return None if t is None else t.contiguous()


def _in_place(call: Callable[[Tensor], Any], y: Tensor) -> Any:
    work = _rows(y)
    result = call(work)
    if work is not y:
        y.copy_(work)
    elif not y.is_inference():
        torch.autograd.graph.increment_version(y)
    return result


def _fp32(t: Tensor, rows: Any, columns: Any = None) -> Tensor:
    return t.new_empty((rows,) if columns is None else (rows, columns), dtype=reference.wide(t.dtype))


def _check_shrink(x: Tensor, a: Tensor, seed: Tensor | None, p: Tensor | None, ranks: Sequence[int]) -> None:
    _matrix("shrink", "x", x)
    _matrix("shrink", "a", a, columns=x.shape[1], like=x)
    _segments("shrink", seed, p, ranks, a.shape[0], x)


def _flops_shrink(x: Any, a: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * a[0]


@op(
    "lr_shrink(Tensor x, Tensor a, Tensor? seed, Tensor? p, SymInt[] ranks) -> Tensor",
    _check_shrink,
    lambda x, a, seed, p, ranks: _fp32(x, x.shape[0], a.shape[0]),
    _flops_shrink,
)
def _shrink(x: Tensor, a: Tensor, seed: Tensor | None, p: Tensor | None, ranks: Sequence[int], backend: ModuleType | None = None) -> Tensor:
    if x.numel() == 0:
        return _fp32(x, x.shape[0], a.shape[0]).zero_()
    return (backend or backend_of("shrink", x)).shrink(_rows(x), a, seed, thresholds("shrink", seed, p, ranks), ranks)


def _check_bwd_x(x: Tensor, u: Tensor, seed: Tensor | None, p: Tensor | None, ranks: Sequence[int]) -> None:
    _matrix("bwd_x", "x", x)
    _matrix("bwd_x", "u", u, rows=x.shape[0], like=x)
    _segments("bwd_x", seed, p, ranks, u.shape[1], x)


def _flops_bwd_x(x: Any, u: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * u[1]


@op(
    "lr_bwd_x(Tensor x, Tensor u, Tensor? seed, Tensor? p, SymInt[] ranks) -> Tensor",
    _check_bwd_x,
    lambda x, u, seed, p, ranks: _fp32(x, u.shape[1], x.shape[1]),
    _flops_bwd_x,
)
def _bwd_x(x: Tensor, u: Tensor, seed: Tensor | None, p: Tensor | None, ranks: Sequence[int], backend: ModuleType | None = None) -> Tensor:
    if x.numel() == 0:
        return _fp32(x, u.shape[1], x.shape[1]).zero_()
    return (backend or backend_of("bwd_x", x)).bwd_x(_rows(x), u.contiguous(), seed, thresholds("bwd_x", seed, p, ranks), ranks)


def check_low(op: str, y: Tensor, shape: Sequence[Any], u: Tensor, a: Tensor, seed: Tensor | None, p: Tensor | None, ranks: Sequence[int]) -> None:
    """Whether drop(u a) can be added to a matrix of that shape, where y is."""
    _matrix(op, "u", u, rows=shape[0], like=y)
    _matrix(op, "a", a, rows=u.shape[1], columns=shape[1], like=y)
    _segments(op, seed, p, ranks, u.shape[1], y)


def _check_add(y: Tensor, u: Tensor, a: Tensor, seed: Tensor | None, p: Tensor | None, ranks: Sequence[int]) -> None:
    _matrix("add_", "y", y)
    check_low("add_", y, y.shape, u, a, seed, p, ranks)


def _flops_add(y: Any, u: Any, *_: Any, **__: Any) -> int:
    return 2 * y[0] * y[1] * u[1]


@op(
    "lr_add_(Tensor(a!) y, Tensor u, Tensor a, Tensor? seed, Tensor? p, SymInt[] ranks) -> ()",
    _check_add,
    lambda y, u, a, seed, p, ranks: None,
    _flops_add,
)
def _add_(y: Tensor, u: Tensor, a: Tensor, seed: Tensor | None, p: Tensor | None, ranks: Sequence[int], backend: ModuleType | None = None) -> None:
    if y.numel():
        _in_place(lambda out: (backend or backend_of("add_", y)).add_(out, u.contiguous(), a, seed, thresholds("add_", seed, p, ranks), ranks), y)


def _check_scale_add(y0: Tensor, v: Tensor | None, a: Tensor | None, row_scale: Tensor, bias: Tensor | None) -> None:
    _matrix("scale_add_", "y0", y0)
    if (v is None) != (a is None):
        _refuse("scale_add_", "v and a together", "one of them", "pass both or neither")
    if v is not None and a is not None:
        _matrix("scale_add_", "v", v, rows=y0.shape[0], like=y0)
        _matrix("scale_add_", "a", a, rows=v.shape[1], columns=y0.shape[1], like=y0)
    check_vector("scale_add_", "row_scale", row_scale, y0.shape[1], y0)
    check_vector("scale_add_", "bias", bias, y0.shape[1], y0)


def _flops_scale_add(y0: Any, v: Any, *_: Any, **__: Any) -> int:
    return 2 * y0[0] * y0[1] * v[1] if v is not None else 0


@op(
    "lr_scale_add_(Tensor(a!) y0, Tensor? v, Tensor? a, Tensor row_scale, Tensor? bias) -> Tensor",
    _check_scale_add,
    lambda y0, v, a, row_scale, bias: y0.new_empty(y0.shape),
    _flops_scale_add,
)
def _scale_add_(y0: Tensor, v: Tensor | None, a: Tensor | None, row_scale: Tensor, bias: Tensor | None, backend: ModuleType | None = None) -> Tensor:
    if y0.numel() == 0:
        return y0.new_empty(y0.shape)
    result: Tensor = _in_place(
        lambda out: (backend or backend_of("scale_add_", y0)).scale_add_(out, _dense(v), a, row_scale.contiguous(), _dense(bias)), y0
    )
    return result


def _check_bwd_dy(dy: Tensor, v: Tensor | None, b: Tensor | None, row_scale: Tensor | None, y0: Tensor | None, need_bias: bool) -> None:
    _matrix("bwd_dy", "dy", dy)
    if v is not None:
        _matrix("bwd_dy", "v", v, rows=dy.shape[0], like=dy)
    if b is not None:
        _matrix("bwd_dy", "b", b, rows=dy.shape[1], like=dy)
    check_vector("bwd_dy", "row_scale", row_scale, dy.shape[1], dy)
    if y0 is not None:
        _matrix("bwd_dy", "y0", y0, rows=dy.shape[0], columns=dy.shape[1], like=dy)


def _fake_bwd_dy(dy: Tensor, v: Tensor | None, b: Tensor | None, row_scale: Tensor | None, y0: Tensor | None, need_bias: bool) -> tuple[Tensor, ...]:
    (t, n), none = dy.shape, _fp32(dy, 0)
    return (
        dy.new_empty((0,) if row_scale is None else (t, n)),
        none if b is None else _fp32(dy, t, b.shape[1]),
        none.clone() if v is None else _fp32(dy, n, v.shape[1]),
        _fp32(dy, n if need_bias else 0),
        _fp32(dy, 0 if y0 is None else n),
    )


def _flops_bwd_dy(dy: Any, v: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * dy[0] * dy[1] * ((v[1] if v is not None else 0) + (b[1] if b is not None else 0))


def _bwd_dy(
    dy: Tensor, v: Tensor | None, b: Tensor | None, row_scale: Tensor | None, y0: Tensor | None, need_bias: bool, backend: ModuleType | None = None
) -> tuple[Tensor, ...]:
    if dy.numel() == 0:
        return tuple(part.zero_() for part in _fake_bwd_dy(dy, v, b, row_scale, y0, need_bias))
    y0 = y0 if y0 is None else _rows(y0)
    out: tuple[Tensor, ...] = (backend or backend_of("bwd_dy", dy)).bwd_dy(_rows(dy), _dense(v), b, _dense(row_scale), y0, need_bias)
    return out


@op(
    "lr_bwd_dy(Tensor dy, Tensor? v, Tensor? b, Tensor? row_scale, Tensor? y0, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _check_bwd_dy,
    _fake_bwd_dy,
    _flops_bwd_dy,
)
def _bwd_dy_apart(*args: Any) -> tuple[Tensor, ...]:
    """Backends may return one tensor for all parts that have no elements; results of an op may not be the same tensor."""
    return tuple(part if part.numel() else part.clone() for part in _bwd_dy(*args))


def _check_dropout(x: Tensor, seed: Tensor, p: Tensor) -> None:
    _matrix("dropout", "x", x)
    _segments("dropout", seed, p, [1], 1, x)


@op("lr_dropout(Tensor x, Tensor seed, Tensor p) -> Tensor", _check_dropout, lambda x, seed, p: x.new_empty(x.shape), None)
def _dropout(x: Tensor, seed: Tensor, p: Tensor) -> Tensor:
    if x.numel() == 0:
        return x.new_empty(x.shape)
    out: Tensor = backend_of("dropout", x).dropout(_rows(x), seed, thresholds("dropout", seed, p, [1])[0])
    return out


def _check_skinny_w(w: Tensor, a: Tensor) -> None:
    _matrix("skinny_w", "w", w)
    _matrix("skinny_w", "a", a, columns=w.shape[1], like=w)


@op(
    "lr_skinny_w(Tensor w, Tensor a) -> (Tensor, Tensor)",
    _check_skinny_w,
    lambda w, a: (_fp32(w, w.shape[0], a.shape[0]), _fp32(w, w.shape[0])),
    lambda w, a, **_: 2 * w[0] * w[1] * (a[0] + 1),
)
def _skinny_w(w: Tensor, a: Tensor, backend: ModuleType | None = None) -> tuple[Tensor, Tensor]:
    if w.numel() == 0:
        return _fp32(w, w.shape[0], a.shape[0]).zero_(), _fp32(w, w.shape[0]).zero_()
    out: tuple[Tensor, Tensor] = (backend or backend_of("skinny_w", w)).skinny_w(_rows(w), a)
    return out


def _check_merge(w: Tensor, v: Tensor, a: Tensor, row_scale: Tensor | None) -> None:
    _matrix("merge_", "w", w)
    _matrix("merge_", "v", v, rows=w.shape[0], like=w)
    _matrix("merge_", "a", a, rows=v.shape[1], columns=w.shape[1], like=w)
    check_vector("merge_", "row_scale", row_scale, w.shape[0], w)


@op(
    "lr_merge_(Tensor(a!) w, Tensor v, Tensor a, Tensor? row_scale) -> Tensor",
    _check_merge,
    lambda w, v, a, row_scale: torch.empty(2, dtype=torch.float64, device="cpu"),
    lambda w, v, a, *_, **__: 2 * w[0] * w[1] * v[1],
)
def _merge_(w: Tensor, v: Tensor, a: Tensor, row_scale: Tensor | None) -> Tensor:
    if w.numel() == 0:
        return torch.zeros(2, dtype=torch.float64, device="cpu")
    result: Tensor = _in_place(lambda out: backend_of("merge_", w).merge_(out, v.contiguous(), a, _dense(row_scale)), w)
    return result


class _Direct:
    """The ops without the dispatcher and without their checks (70 us of a forward and backward pass), on a backend that is looked up once: for
    callers that have checked, where nobody listens at the dispatcher. `p` is a tuple of numbers here."""

    def __init__(self, *key: Any) -> None:
        self._key = key

    @functools.cached_property
    def native(self) -> bool:
        """Whether all of them are C++ functions."""
        return all(_choose(op, *self._key).backend == "cpp" for _, op in RUNS.values())

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function, op = RUNS[name]
        run = functools.partial(function, backend=_module(_choose(op, *self._key).backend))
        setattr(self, name, run)
        return run


#: the functions behind the ops that are called directly, and whose backend each takes
RUNS: dict[str, tuple[Callable[..., Any], str]] = {
    "lr_shrink": (_shrink, "shrink"),
    "lr_bwd_x": (_bwd_x, "bwd_x"),
    "lr_add_": (_add_, "add_"),
    "lr_scale_add_": (_scale_add_, "scale_add_"),
    "lr_bwd_dy": (_bwd_dy, "bwd_dy"),
    "lr_skinny_w": (_skinny_w, "skinny_w"),
}
_direct = functools.lru_cache(maxsize=64)(_Direct)


def is_direct(x: Tensor) -> bool:
    """Whether nothing but the kernels wants to see an op on `x`: no compiler, no dispatch mode (FLOP counters, fakes), no tensor subclass, no
    meta tensor (whose seed has no value)."""
    return type(x) in PLAIN and not x.is_meta and not _is_compiling() and not modes()


def native(x: Tensor) -> bool:
    """Whether ops on x, a plain CPU tensor, are calls of C++ functions."""
    return not modes() and _direct("cpu", x.dtype == torch.float64, config.current_backend(), config.is_strict()).native


def checked(*tensors: Any) -> tuple[Callable[..., bool], Callable[..., bool]]:
    """`lowrank_cpp.checked`, where that backend is (`native`)."""
    found: tuple[Callable[..., bool], Callable[..., bool]] = _module("cpp").checked(*tensors)
    return found


def cpp_ops() -> Any:
    """The C++ functions behind the ops, where they are (`native`)."""
    return _direct("cpu", False, "cpp", False)


def ops_for(x: Tensor) -> Any:
    """torch.ops.fusedadapt, or the functions behind it where `is_direct`."""
    if not is_direct(x):
        return torch.ops.fusedadapt
    return _direct(x.device.type, x.dtype == torch.float64, config.current_backend(), config.is_strict())

"""The quant family's ops, torch.ops.fusedadapt.q_*: thin over the backends, which all have the functions of `reference.quant`.

A format travels as its text (`QFormat.spec`). Weights are 2-D, N x K. Products take a backend's own kernel while it is the faster one (`small` says
so); beyond, a bounded piece of W is dequantized at a time and multiplied by the library's GEMM, so no shape falls off.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .. import config, dispatch
from ..quant.formats import QFormat
from ..reference.quant import Parts
from ..reference.quant_rules import RULES, Found
from . import dense
from .register import op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MODULES = {"reference": "reference.quant", "cpp": "ops.quant_cpp", "triton": "kernels.quant", "cuda": "ops.quant_cuda", "emulated": "ops.quant_cuda"}
_FP64 = {name: "float64 tensors" for name in ("cpp", "triton", "cuda", "emulated")}
#: bytes of W dequantized at a time: on a CPU a piece stays in the cache, on a GPU it must be large enough to fill the GEMM
_SCRATCH = {"cpu": 2 << 20}
_SCRATCH_GPU = 64 << 20


def misfit(t: object) -> Any:
    """What stands in the place of a dense tensor in one of DTYPES: its type's name, its kind, its layout or its dtype; None if it is one."""
    if not isinstance(t, Tensor):
        return type(t).__name__
    if t.is_nested or t.layout != torch.strided:
        return "a nested tensor" if t.is_nested else t.layout
    return None if t.dtype in DTYPES else t.dtype


@functools.cache
def _module(backend: str) -> ModuleType | None:
    name = f"fusedadapt.{_MODULES[backend]}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


@functools.cache
def _lacks(name: str, function: str) -> str:
    module = _module(name)
    return "" if module is not None and hasattr(module, function) else f"has no kernel for {function}"


Refused = tuple[tuple[str, str], ...]  # (backend, why)


@functools.lru_cache(maxsize=256)
def _choose(function: str, device_type: str, fp64: bool, wish: str | None, strict: bool, refused: Refused = ()) -> dispatch.Choice:
    unfit = (_FP64 if fp64 else {}) | dict(refused)
    for name in config.BACKENDS:
        # A backend that cannot run here is not imported to find out what it has.
        if name not in unfit and not dispatch.available_backends(device_type)[name] and (why := _lacks(name, function)):
            unfit[name] = why
    return dispatch.pick(f"quant.{function}", device_type, unfit=unfit)


def choose(function: str, device_type: str, dtype: torch.dtype, product: tuple[int, int, int, QFormat] | None = None) -> dispatch.Choice:
    """The backend of one function of this family for tensors of this device and dtype, and why.

    ``product``: (T, N, K, format) of `linear`. A backend whose module has `takes(t, n, k, dtype, fmt) -> why not` is asked, and passed over if it
    declines; without ``product`` nobody is asked.
    """
    refused: Refused = ()
    while True:
        choice = _choose(function, device_type, dtype == torch.float64, config.current_backend(), config.is_strict(), refused)
        takes = None if product is None else getattr(_module(choice.backend), "takes", None)
        if takes is None or product is None or not (why := takes(*product[:3], dtype, product[3])):
            return choice
        refused += ((choice.backend, why),)


def run(function: str, t: Tensor) -> Any:
    """The function of the chosen backend for tensors like ``t``."""
    return getattr(_module(choose(function, t.device.type, t.dtype).backend), function)


def ready(spec: str, device: torch.device) -> None:
    """Puts what GPU kernels look up on the device while a compiler traces. At the first run it could be too late: in the memory of a CUDA graph
    (mode="reduce-overhead"), or inside a capture, which forbids the copy."""
    if device.type != "cuda":
        return
    for name, reason in dispatch.available_backends("cuda").items():
        prepare = None if reason else getattr(_module(name), "prepare", None)
        if prepare is not None:
            with unset_fake_temporarily():
                prepare(QFormat.parse(spec), device)


def _refuse(name: str, expected: str, got: object, fix: str) -> NoReturn:
    raise ValueError(f"fusedadapt.q_{name}: expected {expected}; got {got}; {fix}")


def _check_matrix(name: str, what: str, t: Tensor, columns: Any = None) -> None:
    if t.dim() != 2 or (columns is not None and t.shape[1] != columns):
        _refuse(name, f"{what} of shape (any, {'any' if columns is None else columns})", tuple(t.shape), "pass matching shapes")
    if t.dtype not in DTYPES:
        _refuse(name, f"{what} in float32, bfloat16, float16 or float64", t.dtype, "convert it")


def sizes_of(fmt: QFormat, n: Any, k: Any) -> Parts:
    """(elements, dtype) of every part of a weight in this format, None of those it has not; the codes are counted in bytes."""
    above, zero = fmt.above(n, k), {"uint8": torch.uint8, "fp32": torch.float32}.get(fmt.zero)
    groups = math.prod(fmt.grid(n, k))
    found: Any = (
        (math.prod(fmt.packed(n, k)), fmt.storage_dtype),
        (groups, fmt.scale_dtype),
        None if zero is None else (groups, zero),
        None if above is None else (math.prod(above), torch.float32),
        (1, torch.float32) if fmt.scale == "nested" else None,
    )
    return Parts(*found)


def _check_parts(name: str, like: Tensor | None, parts: Parts, spec: str, n: Any, k: Any) -> None:
    fmt = QFormat.parse(spec)
    sizes: Any = sizes_of(fmt, n, k)
    if parts.qdata.numel() * parts.qdata.element_size() != sizes.qdata[0]:
        _refuse(name, f"qdata of {fmt.packed(n, k)} bytes for a weight of {n} x {k} in {fmt.name}", tuple(parts.qdata.shape), "pass matching shapes")
    for part in Parts._fields[1:]:
        t, size = getattr(parts, part), getattr(sizes, part)
        if (t is None) != (size is None) or (t is not None and t.numel() != size[0]):
            got = None if t is None else tuple(t.shape)
            _refuse(
                name, f"{part}: {'none' if size is None else f'{size[0]} elements'} for {fmt.spec}, {n} x {k}", got, "pass the parts of one weight"
            )
    for part in Parts._fields:
        t = getattr(parts, part)
        if t is None:
            continue
        if not t.is_contiguous():
            _refuse(name, f"{part}: contiguous", t.stride(), "call .contiguous()")
        if part != "qdata" and t.dtype != getattr(sizes, part)[1]:
            _refuse(name, f"{part} in {getattr(sizes, part)[1]}", t.dtype, "pass the parts of one weight")
        if like is not None and t.device != like.device:
            _refuse(name, f"{part} on {like.device}", t.device, "move it there")


def _check_quantize(w: Tensor, spec: str) -> None:
    _check_matrix("quantize", "w", w)
    QFormat.parse(spec)


def _empty_parts(w: Tensor, spec: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    fmt, (n, k) = QFormat.parse(spec), w.shape
    grid, above = fmt.grid(n, k), fmt.above(n, k)
    return (
        w.new_empty(fmt.packed(n, k), dtype=torch.uint8),
        w.new_empty(grid, dtype=fmt.scale_dtype),
        w.new_empty(grid if fmt.zero else 0, dtype=torch.uint8 if fmt.zero == "uint8" else torch.float32),
        w.new_empty(0 if above is None else above, dtype=torch.float32),
        w.new_empty(() if fmt.scale == "nested" else 0, dtype=torch.float32),
    )


@op("q_quantize(Tensor w, str spec) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _check_quantize, _empty_parts, None)
def _quantize(w: Tensor, spec: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Absent parts have no elements: an op returns tensors only."""
    fmt = QFormat.parse(spec)
    if w.numel() == 0:
        a, b, c, d, e = (t.zero_() for t in _empty_parts(w, spec))
        return a, b, c, d, e
    w = w.float().contiguous() if w.dtype == torch.float64 else w.contiguous()
    lo, hi = run("stats", w)(w, fmt)
    found = RULES[fmt.rule](w, lo, hi, fmt)
    encode = run("encode", w)
    zero = None if found.zero is None else found.zero.float()
    if fmt.compat and w.numel() % fmt.block[1]:
        qdata = _with_divided_tail(encode, w, found, fmt)
    else:
        qdata = encode(w, found.factor, zero, fmt)
    rest = [w.new_empty(0, dtype=torch.float32) if t is None else t for t in (found.zero, found.super, found.offset)]
    return qdata, found.scale, rest[0], rest[1], rest[2]


def _with_divided_tail(encode: Any, w: Tensor, found: Found, fmt: QFormat) -> Tensor:
    """bitsandbytes' CPU code multiplies whole blocks by a factor and divides the short one at the end; the rule's last factor is that divisor."""
    flat, whole = w.view(1, -1), w.numel() // fmt.block[1] * fmt.block[1]
    tail = encode(flat[:, whole:], found.factor[-1:], None, dataclasses.replace(fmt, divide=True))
    return torch.cat([encode(flat[:, :whole], found.factor[:-1], None, fmt), tail]) if whole else tail


def _fake_dequantize(qdata: Tensor, *rest: Any) -> Tensor:
    *_, spec, _n, k, row0, row1, dtype = rest
    ready(spec, qdata.device)
    return qdata.new_empty(row1 - row0, k, dtype=dtype)


def _check_dequantize(qdata: Any, scale: Any, zero: Any, sup: Any, offset: Any, spec: str, n: Any, k: Any, row0: Any, row1: Any, dtype: Any) -> None:
    _check_parts("dequantize", qdata, Parts(qdata, scale, zero, sup, offset), spec, n, k)
    if dtype not in DTYPES:
        _refuse("dequantize", "dtype float32, bfloat16, float16 or float64", dtype, "choose one of them")
    if not 0 <= row0 <= row1 <= n:
        _refuse("dequantize", f"rows within 0..{n}", (row0, row1), "choose rows of the weight")


@op(
    "q_dequantize(Tensor qdata, Tensor scale, Tensor? zero, Tensor? super, Tensor? offset, str spec, SymInt n, SymInt k, SymInt row0, SymInt row1, "
    "ScalarType dtype) -> Tensor",
    _check_dequantize,
    _fake_dequantize,
    None,
)
def _dequantize(*args: Any) -> Tensor:
    *tensors, spec, n, k, row0, row1, dtype = args
    if row0 == row1 or k == 0:
        return tensors[0].new_empty(row1 - row0, k, dtype=dtype)
    fp64, parts, fmt = dtype == torch.float64, Parts(*tensors), QFormat.parse(spec)
    w: Tensor = run("dequantize", parts.qdata)(parts, fmt, n, k, row0, row1, torch.float32 if fp64 else dtype)
    return w.double() if fp64 else w


def _check_linear(x: Tensor, *args: Any) -> None:
    *tensors, bias, spec, n = args
    _check_matrix("linear", "x", x)
    _check_parts("linear", x, Parts(*tensors), spec, n, x.shape[1])
    if bias is not None and (bias.shape != (n,) or bias.device != x.device):
        _refuse("linear", f"bias of shape ({n},) on {x.device}", f"{tuple(bias.shape)} on {bias.device}", "pass one number per output")


def _fake_linear(x: Tensor, *rest: Any) -> Tensor:
    ready(rest[-2], x.device)
    return x.new_empty(x.shape[0], rest[-1])


def _takes(module: Any, t: int, n: int, k: int, dtype: torch.dtype, fmt: QFormat, transposed: bool) -> bool:
    """Whether the backend's own product is the faster one here; the reference's is the only one it has."""
    return not hasattr(module, "small") or module.small(t, n, k, dtype, fmt, transposed)


def _pieces(x: Tensor, parts: Parts, fmt: QFormat, n: int, k: int, wide: torch.dtype) -> Iterator[tuple[Tensor, int, int]]:
    """(rows of W in ``wide``, their first, the one after their last) for a product with x. The next piece may overwrite one."""
    module: Any = _module(choose("dequantize", x.device.type, x.dtype).backend)
    rows = max(16, _SCRATCH.get(x.device.type, _SCRATCH_GPU) // max(1, k * wide.itemsize))
    starts = range(0, n, rows)
    ends = [min(n, row + rows) for row in starts]
    if hasattr(module, "pieces"):
        return zip(module.pieces(parts, fmt, n, k, rows, wide), starts, ends)
    return ((module.dequantize(parts, fmt, n, k, row, end, wide), row, end) for row, end in zip(starts, ends, strict=True))


@op(
    "q_linear(Tensor x, Tensor qdata, Tensor scale, Tensor? zero, Tensor? super, Tensor? offset, Tensor? bias, str spec, SymInt n) -> Tensor",
    _check_linear,
    _fake_linear,
    lambda x, *rest, **_: 2 * x[0] * x[1] * rest[-1],
)
def _linear(x: Tensor, *args: Any) -> Tensor:
    *tensors, bias, spec, n = args
    parts, fmt, (t, k) = Parts(*tensors), QFormat.parse(spec), x.shape
    if t == 0 or n == 0 or k == 0:
        y = x.new_zeros(t, n)
        return y if bias is None else y + bias.to(x.dtype)
    x = x if x.stride(1) == 1 and x.stride(0) >= k else x.contiguous()
    module = _module(choose("linear", x.device.type, x.dtype, (t, n, k, fmt)).backend)
    bias = None if bias is None else bias.contiguous()  # kernels read it without a stride
    if _takes(module, t, n, k, x.dtype, fmt, False):
        out: Tensor = module.linear(x, parts, fmt, n, bias)  # type: ignore[union-attr]
        return out
    wide = torch.float32 if dense.widens(x) else x.dtype
    xs, y = x.to(wide), x.new_empty(t, n)
    for w, row, end in _pieces(x, parts, fmt, n, k, wide):
        y[:, row:end] = xs @ w.t() if bias is None else torch.addmm(bias[row:end].to(wide), xs, w.t())
    return y


def _fake_linear_dx(dy: Tensor, *rest: Any) -> Tensor:
    ready(rest[-3], dy.device)
    return dy.new_empty(dy.shape[0], rest[-1])


def _check_linear_dx(dy: Tensor, *args: Any) -> None:
    *tensors, spec, n, k = args
    _check_matrix("linear_dx", "dy", dy, n)
    _check_parts("linear_dx", dy, Parts(*tensors), spec, n, k)


@op(
    "q_linear_dx(Tensor dy, Tensor qdata, Tensor scale, Tensor? zero, Tensor? super, Tensor? offset, str spec, SymInt n, SymInt k) -> Tensor",
    _check_linear_dx,
    _fake_linear_dx,
    lambda dy, *rest, **_: 2 * dy[0] * dy[1] * rest[-1],
)
def _linear_dx(dy: Tensor, *args: Any) -> Tensor:
    *tensors, spec, n, k = args
    parts, fmt, t = Parts(*tensors), QFormat.parse(spec), dy.shape[0]
    if t == 0 or n == 0 or k == 0:
        return dy.new_zeros(t, k)
    dy = dy if dy.stride(1) == 1 and dy.stride(0) >= n else dy.contiguous()
    module = _module(choose("linear_dx", dy.device.type, dy.dtype).backend)
    if _takes(module, t, n, k, dy.dtype, fmt, True):
        out: Tensor = module.linear_dx(dy, parts, fmt, n, k)  # type: ignore[union-attr]
        return out
    wide = torch.float32 if dense.widens(dy) else dy.dtype
    dys = dy.to(wide)
    total: Tensor | None = None  # fp32 over several pieces: a 16-bit sum would be rounded at each
    for w, row, end in _pieces(dy, parts, fmt, n, k, wide):
        if total is None:
            total = dys[:, row:end] @ w
            total = total.float() if end < n else total
        elif wide == total.dtype:
            total.addmm_(dys[:, row:end], w)
        else:
            total += dys[:, row:end] @ w
    assert total is not None
    return total.to(dy.dtype)

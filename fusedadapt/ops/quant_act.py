"""The ops of products with quantized activations, torch.ops.fusedadapt.q_act_quant and q_linear8: thin over the backends, which all have the
functions of `reference.quant_act`.

How x is coded travels as a format's text (`QFormat.spec`), like W's. Codes of x may be shared by several products, as those of q, k and v are.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import config, dispatch
from ..quant.formats import WHOLE, QFormat
from ..reference.quant import Parts
from ..reference.quant_act import CHUNK, row_scales
from . import quant
from .quant import DTYPES, _check_parts
from .register import op

_MODULES = {"reference": "reference.quant_act", "cpp": "ops.quant_act_cpp", "triton": "kernels.quant_act"}
_NO_KERNEL = {"cuda": "has no kernels of its own for 8-bit products", "emulated": "has no kernels of its own for 8-bit products"}
_BLOCK = 128
_ROW, _TENSOR, _TILE = (1, WHOLE), (WHOLE, WHOLE), (_BLOCK, _BLOCK)
_WEIGHTS = {"int8": (_ROW, _TENSOR), "fp8_e4m3": (_ROW, _TENSOR, _TILE)}
#: what x may be coded to
ACTIVATIONS = tuple(_WEIGHTS)
#: bytes of x widened to fp32 at a time; every piece of x reads and widens all of W once
_SCRATCH = 64 << 20


@functools.cache
def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"fusedadapt.{_MODULES[backend]}")


@functools.lru_cache(maxsize=64)
def _choose(function: str, device_type: str, wish: str | None, strict: bool) -> dispatch.Choice:
    unfit = dict(_NO_KERNEL)
    if importlib.util.find_spec("fusedadapt.kernels") is None:
        unfit["triton"] = "kernels are not installed"
    return dispatch.pick(f"quant.{function}", device_type, unfit=unfit)


def choose(function: str, device_type: str) -> dispatch.Choice:
    """The backend of one function of `reference.quant_act` for tensors of this device, and why."""
    return _choose(function, device_type, config.current_backend(), config.is_strict())


def _run(function: str, t: Tensor) -> Any:
    return getattr(_module(choose(function, t.device.type).backend), function)


def library_int8(device_type: str, t: int, n: int, k: int) -> bool:
    """Whether int8 sums come from the library's GEMM, `torch._int_mm`, and not from our kernels: equal bits either way, and this is the one place
    that decides.

    On CPUs: with AMX, whose tiles only the library drives. Without it our kernel is the faster one by far (EPYC Milan, AVX2, two threads, 2048 x 4096
    x 4096: the library has no vector code there). On GPUs: never, until a measurement says where.
    """
    amx = device_type == "cpu" and bool(torch.cpu._is_amx_tile_supported())
    return amx and t >= 64 and n % 16 == 0 and k % 64 == 0 and k <= CHUNK


def _library_linear(codes: Tensor, x_scale: Tensor, parts: Parts, fmt: QFormat, n: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`reference.quant_act.int8_linear` by way of `torch._int_mm`. K at most CHUNK."""
    y = torch._int_mm(codes.view(torch.int8), parts.qdata.view(torch.int8).view(n, -1).t()).float()
    y = y.mul_(row_scales(parts, fmt, n)).mul_(x_scale.view(-1, 1))
    return (y if bias is None else y.add_(bias.float())).to(dtype)


def widened_fp8_linear(
    codes: Tensor, x_scale: Tensor, act: QFormat, parts: Parts, fmt: QFormat, n: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """`reference.quant_act.fp8_linear` where nothing multiplies fp8: x is widened a bounded piece at a time and multiplied as fp32."""
    t, k = codes.shape
    y, rows = torch.empty(t, n, dtype=dtype, device=codes.device), max(1, _SCRATCH // (4 * k))
    widen, bias = quant.run("dequantize", codes), None if bias is None else bias.float()
    for row in range(0, t, rows):
        end = min(t, row + rows)
        x = widen(Parts(codes, x_scale), act, t, k, row, end, torch.float32)
        y[row:end] = torch.ops.fusedadapt.q_linear(x, *parts, bias, fmt.spec, n)
    return y


def multiplies_fp8(device: torch.device) -> bool:
    """Whether a GPU's matrix units take fp8: compute capability 8.9 and later."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def _goes_with(activations: str, weight: QFormat) -> bool:
    if weight.scale == "e8m0_row":
        return activations == "fp8_e4m3" and weight.table == "e2m1"
    return weight.name == activations and weight.block in _WEIGHTS[activations] and not weight.zero


def activation_spec(activations: str, weight: QFormat) -> str:
    """How x is coded for a product with a weight of this format, as a format's text.

    Raises:
        ValueError: unknown ``activations``, or a weight whose codes and scales do not go with them.
    """
    if not isinstance(activations, str) or activations not in _WEIGHTS:
        _refuse("linear8", f"activations among {', '.join(_WEIGHTS)}", repr(activations), "choose one of them")
    if not _goes_with(activations, weight):
        kinds = "one scale per row or for the whole weight" + (", per 128 x 128 block, or in fp4_e2m1" if activations == "fp8_e4m3" else "")
        _refuse("linear8", f'a weight in "{activations}" without zero points, {kinds}', weight.spec, "quantize it so, or leave activations out")
    return f"{activations},block=1x{_BLOCK}" if weight.block == _TILE else activations


def _refuse(name: str, expected: str, got: object, fix: str) -> NoReturn:
    raise ValueError(f"fusedadapt.q_{name}: expected {expected}; got {got}; {fix}")


def _check_act(name: str, act: QFormat) -> None:
    if act.name not in _WEIGHTS or act.block not in (_ROW, (1, _BLOCK)) or (act.name == "int8" and act.block != _ROW):
        _refuse(name, 'x coded as "int8", "fp8_e4m3" or "fp8_e4m3,block=1x128"', act.spec, "take it from activation_spec")


def _check_act_quant(x: Tensor, spec: str) -> None:
    if x.dim() != 2:
        _refuse("act_quant", "x of two dimensions", tuple(x.shape), "reshape it")
    if x.dtype not in DTYPES:
        _refuse("act_quant", "x in float32, bfloat16, float16 or float64", x.dtype, "convert it")
    _check_act("act_quant", QFormat.parse(spec))


def _empty_codes(x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    fmt = QFormat.parse(spec)
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(fmt.grid(x.shape[0], x.shape[1]), dtype=torch.float32)


@op("q_act_quant(Tensor x, str spec) -> (Tensor, Tensor)", _check_act_quant, _empty_codes, None)
def _act_quant(x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """(codes as bytes, T x K; scales, T x groups of a row)"""
    if x.numel() == 0:
        q, scale = _empty_codes(x, spec)
        return q, scale.zero_()
    x = x.float() if x.dtype == torch.float64 else x
    x = x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
    found: tuple[Tensor, Tensor] = _run("act_quant", x)(x, QFormat.parse(spec))
    return found


def _check_linear8(x: Tensor, x_scale: Tensor, *args: Any) -> None:
    *tensors, bias, act, spec, n, dtype = args
    if x.dim() != 2 or x.dtype != torch.uint8 or not x.is_contiguous():
        _refuse("linear8", "x: codes of two dimensions, contiguous bytes", f"{tuple(x.shape)} {x.dtype}", "take them from q_act_quant")
    x_fmt, w_fmt = QFormat.parse(act), QFormat.parse(spec)
    _check_act("linear8", x_fmt)
    if activation_spec(x_fmt.name, w_fmt) != x_fmt.spec:
        _refuse("linear8", f"x coded as {activation_spec(x_fmt.name, w_fmt)} beside {spec}", act, "take it from activation_spec")
    _check_parts("linear8", x, Parts(*tensors), spec, n, x.shape[1])
    grid = x_fmt.grid(x.shape[0], x.shape[1])
    if tuple(x_scale.shape) != grid or x_scale.dtype != torch.float32 or x_scale.device != x.device or not x_scale.is_contiguous():
        got = f"{tuple(x_scale.shape)} {x_scale.dtype} on {x_scale.device}"
        _refuse("linear8", f"x_scale of shape {grid}, float32, contiguous, on {x.device}", got, "take it from q_act_quant")
    if bias is not None and (bias.shape != (n,) or bias.device != x.device):
        _refuse("linear8", f"bias of shape ({n},) on {x.device}", f"{tuple(bias.shape)} on {bias.device}", "pass one number per output")
    if dtype not in DTYPES:
        _refuse("linear8", "dtype float32, bfloat16, float16 or float64", dtype, "choose one of them")


@op(
    "q_linear8(Tensor x, Tensor x_scale, Tensor qdata, Tensor scale, Tensor? zero, Tensor? super, Tensor? offset, Tensor? bias, str act, str spec, "
    "SymInt n, ScalarType dtype) -> Tensor",
    _check_linear8,
    lambda x, *rest: x.new_empty(x.shape[0], rest[-2], dtype=rest[-1]),
    lambda x, *rest, **_: 2 * x[0] * x[1] * rest[-2],
)
def _linear8(x: Tensor, x_scale: Tensor, *args: Any) -> Tensor:
    *tensors, bias, act, spec, n, dtype = args
    parts, fmt, (t, k) = Parts(*tensors), QFormat.parse(spec), x.shape
    if t == 0 or n == 0 or k == 0:
        y = x.new_zeros(t, n, dtype=dtype)
        return y if bias is None else y + bias.to(dtype)
    narrow = torch.float32 if dtype == torch.float64 else dtype
    if act != "int8":
        ours = _run("fp8_linear", x) if multiplies_fp8(x.device) else widened_fp8_linear
        y = ours(x, x_scale, QFormat.parse(act), parts, fmt, n, bias, narrow)
    else:
        ours = _library_linear if library_int8(x.device.type, t, n, k) else _run("int8_linear", x)
        y = ours(x, x_scale, parts, fmt, n, bias, narrow)
    return y.to(dtype)

"""The ops of fake quantization, torch.ops.fusedadapt.q_fake and q_fake_backward: thin over the backends, which have the functions of
`reference.fake_quant`. The range is two whole numbers or a tensor of them: a compiled graph serves every width.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import config, dispatch
from ..reference.fake_quant import INSIDE, LIMIT, Rule, wide
from .register import op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MODULES = {"reference": "reference.fake_quant", "cpp": "ops.fake_quant_cpp", "triton": "kernels.fake_quant"}
_FP64 = {"cpp": "float64 tensors", "triton": "float64 tensors"}
_NO_KERNEL = {"cuda": "this op's GPU kernels are Triton's", "emulated": "this op's GPU kernels are Triton's"}
_RULE = "Tensor scale, Tensor? zero, Tensor? offset, Tensor? bounds, SymInt quant_min, SymInt quant_max, SymInt line, SymInt run, bool divide"


@functools.cache
def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"fusedadapt.{_MODULES[backend]}")


@functools.lru_cache(maxsize=64)
def _choose(device_type: str, fp64: bool, wish: str | None, strict: bool) -> dispatch.Choice:
    return dispatch.pick("quant.fake_quantize", device_type, unfit=_NO_KERNEL | (_FP64 if fp64 else {}))


def choose(device_type: str, dtype: torch.dtype) -> dispatch.Choice:
    """The backend of fake quantization for tensors of this device and dtype, and why."""
    return _choose(device_type, dtype == torch.float64, config.current_backend(), config.is_strict())


def _backend(x: Tensor) -> Any:
    return _module(choose(x.device.type, x.dtype).backend)


def refuse(expected: str, got: object, fix: str) -> NoReturn:
    raise ValueError(f"fake_quantize: expected {expected}; got {got}; {fix}")


def check_range(quant_min: Any, quant_max: Any) -> None:
    """Two whole numbers."""
    if not -LIMIT <= quant_min < quant_max <= LIMIT:
        refuse(f"-2^22 <= quant_min < quant_max <= 2^22 = {LIMIT}", (quant_min, quant_max), "choose a range within")


def _rule(scale: Tensor, zero: Any, offset: Any, bounds: Any, quant_min: Any, quant_max: Any, line: Any, run: Any, divide: bool) -> Rule:
    return Rule(line, run, scale, zero, offset, bounds, quant_min, quant_max, divide)


def _check(x: Tensor, *args: Any) -> None:
    rule = _rule(*args)
    if x.dtype not in DTYPES:
        refuse("x in float32, bfloat16, float16 or float64", x.dtype, "convert it")
    groups = rule.scale.shape[0] if rule.scale.dim() == 1 else 0
    for name, t, sizes in (("scale", rule.scale, (groups,)), ("zero", rule.zero, (1, groups)), ("offset", rule.offset, (1, groups))):
        if t is None:
            continue
        if t.dim() != 1 or t.shape[0] not in sizes or not t.is_contiguous():
            refuse(f"{name}: one dimension of {' or '.join(map(str, sizes))}, contiguous", f"{tuple(t.shape)}, {t.stride()}", "reshape it")
        if t.dtype != wide(x.dtype) or t.device != x.device:
            refuse(f"{name} in {wide(x.dtype)} on {x.device}", f"{t.dtype} on {t.device}", "convert or move it")
    if rule.bounds is None:
        check_range(rule.quant_min, rule.quant_max)
    else:
        b = rule.bounds
        if b.dim() != 2 or b.shape[0] != 2 or b.shape[1] not in (1, groups) or not b.is_contiguous():
            refuse(f"bounds of shape (2, 1) or (2, {groups}), contiguous", f"{tuple(b.shape)}, {b.stride()}", "stack the two ends of the range")
        if b.dtype != wide(x.dtype) or b.device != x.device:
            refuse(f"bounds in {wide(x.dtype)} on {x.device}", f"{b.dtype} on {b.device}", "convert or move it")
    if x.numel() == 0:
        return
    if rule.run < 1 or rule.line < rule.run or x.numel() % rule.line:
        refuse(f"1 <= run <= line, line a divisor of {x.numel()} elements", f"run {rule.run}, line {rule.line}", "cut whole lines")
    runs = x.numel() // rule.line * -(-rule.line // rule.run)
    if groups < 1 or runs % groups:
        refuse(f"numbers for {runs} runs", f"{groups} scales", "pass one scale a run, or a divisor of that")


@op(
    f"q_fake(Tensor x, {_RULE}) -> Tensor",
    _check,
    lambda x, *rule: torch.empty_like(x, memory_format=torch.contiguous_format),
    None,
)
def _fake(x: Tensor, *args: Any) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    y: Tensor = _backend(x).fake(x.contiguous(), _rule(*args))
    return y


def _check_backward(dy: Tensor, x: Tensor, *args: Any) -> None:
    *rule, ste, _ = args
    _check(x, *rule)
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device:
        got = f"{dy.dtype} {tuple(dy.shape)} on {dy.device}"
        refuse(f"dy like x: {x.dtype} {tuple(x.shape)} on {x.device}", got, "pass y's gradient")
    if ste not in INSIDE:
        refuse(f"ste among {', '.join(INSIDE)}", repr(ste), "choose one of them")


def _empty_backward(dy: Tensor, x: Tensor, scale: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    groups = scale.shape[0] if args[-1] else 0
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, scale.new_empty(groups), scale.new_empty(groups)


@op(
    f"q_fake_backward(Tensor dy, Tensor x, {_RULE}, str ste, bool sums) -> (Tensor, Tensor, Tensor)",
    _check_backward,
    _empty_backward,
    None,
)
def _fake_backward(dy: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        dx, d_scale, d_offset = _empty_backward(dy, x, *args)
        return dx, d_scale.zero_(), d_offset.zero_()
    *rule, ste, sums = args
    found: tuple[Tensor, Tensor, Tensor] = _backend(x).fake_backward(dy.contiguous(), x.contiguous(), _rule(*rule), ste, sums)
    return found

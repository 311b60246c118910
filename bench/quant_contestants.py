"""The contestants of `bench quant`: for every way to do a row's job, a function without arguments."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedadapt as fa
from fusedadapt.ops import dense

from .quant import RANK, Row

Call = Callable[[], object]


class Absent(Exception):
    """This contestant cannot run here; says why."""


@dataclass
class Problem:
    """A row's weight [N, K], its quantized form, and activations."""

    row: Row
    weight: Tensor
    packed: Any
    x: Tensor
    dy: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]


def problem(row: Row, device: str, quick: bool) -> Problem:
    n, k = (row.n // 4, row.k // 4) if quick else (row.n, row.k)
    g = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device).to(row.dtype)

    weight = draw(n, k)
    packed = None if row.job in ("fake", "code") else fa.quantize(weight, row.format, **dict(row.options))
    return Problem(row, weight, packed, draw(max(row.tokens, 1), k), draw(max(row.tokens, 1), n))


def build(kind: str, given: Problem) -> Call:
    """Raises Absent, or ModuleNotFoundError for a library that is not installed."""
    return _BUILDERS[kind](given)


def _trained(call: Callable[[Tensor], Tensor], given: Problem, adapter: Sequence[Tensor] = ()) -> Call:
    """Forward and dX, and the gradients of an adapter."""
    x = given.x.clone().requires_grad_()

    def step() -> None:
        for t in (x, *adapter):
            t.grad = None
        call(x).backward(given.dy)

    return step


def _ours(given: Problem) -> Call:
    row, w, q, x = given.row, given.weight, given.packed, given.x
    if row.job == "linear":
        return lambda: fa.quantized_linear(x, q)
    if row.job == "train":
        return _trained(lambda t: fa.quantized_linear(t, q), given)
    if row.job == "act":
        return lambda: fa.quantized_linear(x, q, activations="fp8_e4m3" if row.format == "fp4_e2m1" else row.format)
    if row.job == "qlora":
        adapted = fa.LoRALinear.from_linear(fa.QuantizedLinear(q), r=RANK).to(row.dtype)
        return _trained(adapted, given, [p for p in adapted.parameters() if p.requires_grad])
    if row.job == "code":
        return lambda: torch.ops.fusedadapt.q_act_quant(x, row.format)
    if row.job == "dx":
        parts, spec, (n, k) = q.parts, q.format.spec, given.shape
        return lambda: torch.ops.fusedadapt.q_linear_dx(given.dy, *parts, spec, n, k)
    if row.job == "quantize":
        return lambda: fa.quantize(w, row.format, **dict(row.options))
    if row.job == "dequantize":
        return lambda: q.dequantize()
    return _fake(given, lambda t, s: fa.quant.fake_quantize(t, s, quant_min=-8, quant_max=7, ste=row.format))


def _fake(given: Problem, call: Callable[[Tensor, Tensor], Tensor]) -> Call:
    x = given.weight.clone().requires_grad_()
    s = torch.full((1,), 0.3, device=x.device, requires_grad=True)
    dy = torch.ones_like(x)

    def step() -> None:
        x.grad = s.grad = None
        call(x, s).backward(dy)

    return step


def _composed(given: Problem) -> Call:
    """LSQ as papers' code has it; with the rounding's mask for "round"."""

    def lsq(x: Tensor, s: Tensor) -> Tensor:
        u = x / s
        if given.row.format == "clamp":
            u = u.clamp(-8, 7)
            return (u + (u.round() - u).detach()) * s
        q = u + (u.round() - u).detach()
        return q.clamp(-8, 7) * s

    return _fake(given, lsq)


def _fused(given: Problem) -> Call:
    zero = torch.zeros(1, device=given.weight.device)
    op = torch.ops.aten._fake_quantize_learnable_per_tensor_affine
    return _fake(given, lambda x, s: op(x, s, zero, -8, 7, 1.0))


def _dense(given: Problem) -> Call:
    w = given.weight
    if given.row.job == "dx":
        return lambda: dense.linear_dx(given.dy, w)
    if given.row.job == "train":
        return lambda: (dense.linear(given.x, w), dense.linear_dx(given.dy, w))
    return lambda: dense.linear(given.x, w)


def _dense_fp32(given: Problem) -> Call:
    x, w = given.x.float(), given.weight.float()
    return lambda: F.linear(x, w)


def _whole(given: Problem) -> Call:
    q = given.packed
    return lambda: F.linear(given.x, q.dequantize())


def _torch_int4(given: Problem) -> Call:
    if given.weight.device.type != "cpu":
        raise Absent("torch's CPU op")
    w, (n, k), group = given.weight.float(), given.shape, 128
    scale = w.view(n, -1, group).abs().amax(-1) / 7.5
    codes = ((w.view(n, -1, group) / scale[..., None]).round() + 8).clamp(0, 15).to(torch.int32).view(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    both = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous().to(given.x.dtype)
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(given.x, packed, group, both)


def _linear4bit(bnb: Any, given: Problem, nested: bool) -> Any:
    w = given.weight
    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], False, given.row.dtype, compress_statistics=nested, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(w, requires_grad=False, compress_statistics=nested, quant_type="nf4")
    return layer.to(w.device)


def _with_peft(layer: Any, given: Problem) -> Call:
    peft = importlib.import_module("peft")
    model = torch.nn.Sequential(layer)
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]), model)
    return _trained(model, given, [p for p in model.parameters() if p.requires_grad])


def _bitsandbytes(given: Problem) -> Call:
    with contextlib.redirect_stdout(io.StringIO()):
        bnb = importlib.import_module("bitsandbytes")
    row, w = given.row, given.weight
    nested = bool(dict(row.options).get("double_quant"))
    if row.job == "quantize":
        return lambda: bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
    packed, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
    if row.job == "dequantize":
        return lambda: bnb.functional.dequantize_4bit(packed, state)
    if row.job == "dx":
        return lambda: given.dy @ bnb.functional.dequantize_4bit(packed, state)
    layer = _linear4bit(bnb, given, nested)
    if row.job == "qlora":
        return _with_peft(layer, given)
    if row.job == "train":
        return _trained(layer, given)
    layer.eval()

    def forward() -> Tensor:
        with torch.no_grad():
            out: Tensor = layer(given.x)
            return out

    return forward


def _fp8(given: Problem) -> Call:
    q = fa.quantize(given.weight, "fp8_e4m3")
    return lambda: fa.quantized_linear(given.x, q, activations="fp8_e4m3")


def _int_mm(given: Problem) -> Call:
    a, b = given.x.to(torch.int8), given.weight.to(torch.int8).t()
    return lambda: torch._int_mm(a, b)


_BUILDERS: dict[str, Callable[[Problem], Call]] = {
    "ours": _ours,
    "dense": _dense,
    "dense_fp32": _dense_fp32,
    "whole": _whole,
    "torch_int4": _torch_int4,
    "bitsandbytes": _bitsandbytes,
    "composed": _composed,
    "fused": _fused,
    "int_mm": _int_mm,
    "fp8": _fp8,
}

"""The adapter methods as data: what each trains, how it scales, and which arguments of `lora_linear` it is.

A new method is one `Method` record in `METHODS` and one short function that returns its `Arguments`; forward, backward, merge and unmerge follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..reference.lowrank import wide
from .dora import dora_linear_peft, dora_scale
from .functional import lora_known

if TYPE_CHECKING:
    from .layer import LoRALinear


class Arguments(NamedTuple):
    """What a method hands to `lora_linear` beside x, weight, scaling and dropout; see there."""

    A: Tensor | None = None
    B: Tensor | None = None
    bias: Tensor | None = None
    rank_gate: Tensor | None = None
    row_scale: Tensor | None = None
    scale_bias: bool = False
    col_scale: Tensor | None = None


class Part(NamedTuple):
    """One trained parameter: its name, its shape in the letters r, K (inputs), N (outputs) and 1, and what fills it in place."""

    name: str
    shape: str
    fill: Callable[[Tensor], Any]


@dataclass(frozen=True)
class Method:
    """One adapter method.

    ``arguments(layer, dtype)``: its `Arguments`; a bias it computes is in ``dtype``. ``law(alpha, r)``: the scaling. ``options``: keyword -> default,
    extra keywords of `LoRALinear`. ``inits``: takes the initialisations of `fusedadapt.lowrank.inits` for lora_A and lora_B. ``prepare(layer)`` runs
    before the parameters are filled, ``finish(layer)`` after. ``call(layer, x)``: replaces the one fused call where it returns a tensor.
    """

    name: str
    paper: str
    parts: tuple[Part, ...]
    arguments: Callable[[LoRALinear, torch.dtype], Arguments]
    law: Callable[[float, int], float] = lambda alpha, r: 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    inits: bool = False
    prepare: Callable[[LoRALinear], None] | None = None
    finish: Callable[[LoRALinear], None] | None = None
    call: Callable[[LoRALinear, Tensor], Tensor | None] | None = None

    @property
    def ranked(self) -> bool:
        """Whether it has a rank."""
        return any("r" in part.shape for part in self.parts)


class VeraProjection(nn.Module):
    """The frozen random pair that all VeRA layers of a model share (arXiv 2310.11454): A, r x K and B, N x r, for the largest K and N among them.

    Kaiming-uniform values that depend on ``key`` and the sizes alone, drawn on the CPU in fp32. Buffers; in the state dict only with ``save``.
    """

    A: Tensor
    B: Tensor

    def __init__(self, r: int, in_features: int, out_features: int, *, key: int = 0, save: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.key = key
        for name, shape in (("A", (r, in_features)), ("B", (out_features, r))):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="cpu"), persistent=save)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the values again: after `to_empty`, which leaves none in buffers that no state dict brings."""
        generator = torch.Generator().manual_seed(self.key)
        for t in (self.A, self.B):
            bound = math.sqrt(6 / t.shape[1])
            t.copy_(torch.empty(t.shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator))


def _normal(mean: float, std: float) -> Callable[[Tensor], Any]:
    return lambda t: nn.init.normal_(t, mean, std)


def _lora(layer: LoRALinear, dtype: torch.dtype) -> Arguments:
    return Arguments(layer.lora_A, layer.lora_B, layer.bias)


def _lora_call(layer: LoRALinear, x: Tensor) -> Tensor | None:
    """The commonest layer past `nn.Module`'s search for its parameters and past arguments it does not have, 30 us where caches are cold."""
    found = layer._parameters
    try:
        weight, bias, a, b = found["weight"], found["bias"], found["lora_A"], found["lora_B"]
    except KeyError:  # parametrized, pruned or a replica's: they are found another way
        return None
    if layer.format is not None:
        return None
    return lora_known(x, weight, bias, a, b, layer._scaling_value, layer._dropout_value if layer.training else 0.0)


def _dora(layer: LoRALinear, dtype: torch.dtype) -> Arguments:
    scale = dora_scale(layer.base_weight, layer.lora_A, layer.lora_B, layer.scaling_argument(), layer.lora_magnitude)
    return Arguments(layer.lora_A, layer.lora_B, layer.bias, row_scale=scale)


def _dora_magnitude(layer: LoRALinear) -> None:
    """‖W + s B A‖ of each row, so that the layer starts as what it wraps."""
    weight = layer.weight.to(wide(layer.weight.dtype)) if layer.format is None else layer.dequantize(torch.float32)
    full = weight + layer.scaling * (layer.lora_B.to(weight.dtype) @ layer.lora_A.to(weight.dtype))
    layer.lora_magnitude.copy_(torch.linalg.vector_norm(full, dim=1))


def _dora_call(layer: LoRALinear, x: Tensor) -> Tensor | None:
    if layer.options["dropout_form"] != "peft" or not layer.training:
        return None
    y: Tensor = dora_linear_peft(
        x, layer.base_weight, layer.lora_A, layer.lora_B, layer.lora_magnitude,
        bias=layer.bias, scaling=layer.scaling_argument(), dropout_p=layer.dropout_argument(), training=True, seed=None,
    )  # fmt: skip
    return y


def _dora_options(layer: LoRALinear) -> None:
    if layer.options["dropout_form"] not in ("paper", "peft"):
        raise ValueError(f"LoRALinear[dora]: expected dropout_form 'paper' or 'peft'; got {layer.options['dropout_form']!r}; choose one")


def _adalora(layer: LoRALinear, dtype: torch.dtype) -> Arguments:
    return Arguments(layer.lora_A, layer.lora_B, layer.bias, rank_gate=layer.lora_E.view(-1))


def _vera(layer: LoRALinear, dtype: torch.dtype) -> Arguments:
    shared = layer.projection
    a, b = shared.A[: layer.r, : layer.in_features], shared.B[: layer.out_features, : layer.r]
    return Arguments(a, layer.vera_lambda_b[:, None] * b, layer.bias, rank_gate=layer.vera_lambda_d)


def _vera_projection(layer: LoRALinear) -> None:
    shared, key, start = layer.options.pop("projection"), layer.options["projection_key"], layer.options["d_initial"]
    if shared is not None and not isinstance(shared, VeraProjection):
        raise TypeError(f"LoRALinear[vera]: expected projection: a VeraProjection; got {type(shared).__name__}; make one, or leave it out")
    if isinstance(key, bool) or not isinstance(key, int):
        raise ValueError(f"LoRALinear[vera]: expected projection_key: an integer; got {key!r}; choose any")
    if not isinstance(start, Real | Tensor) or not math.isfinite(start):
        raise ValueError(f"LoRALinear[vera]: expected d_initial: a finite number; got {start!r}; 0.1 is usual")
    if shared is None:
        shared = VeraProjection(layer.r, layer.in_features, layer.out_features, key=key, dtype=layer.adapter_dtype).to(layer.weight.device)
    if shared.A.shape[0] < layer.r or shared.A.shape[1] < layer.in_features or shared.B.shape[0] < layer.out_features:
        raise ValueError(
            f"LoRALinear[vera]: expected a projection of at least rank {layer.r}, {layer.in_features} inputs and {layer.out_features} outputs; "
            f"got A {tuple(shared.A.shape)}, B {tuple(shared.B.shape)}; make it for the largest layer"
        )
    layer.projection = shared


def _vera_fill(layer: LoRALinear) -> None:
    nn.init.constant_(layer.vera_lambda_d, layer.options["d_initial"])


def _ia3(layer: LoRALinear, dtype: torch.dtype) -> Arguments:
    return Arguments(bias=layer.bias, row_scale=layer.ia3_l.view(-1), scale_bias=True)


def _ia3_ff(layer: LoRALinear, dtype: torch.dtype) -> Arguments:
    return Arguments(bias=layer.bias, col_scale=layer.ia3_l.view(-1))


def _ssf(layer: LoRALinear, dtype: torch.dtype) -> Arguments:
    bias = layer.ssf_shift if layer.bias is None else layer.ssf_scale * layer.bias + layer.ssf_shift
    return Arguments(bias=bias.to(dtype), row_scale=layer.ssf_scale)


def _per_rank(alpha: float, r: int) -> float:
    return alpha / r


_AB = (Part("lora_A", "rK", nn.init.zeros_), Part("lora_B", "Nr", nn.init.zeros_))  # filled by `inits`
_SVD = (Part("lora_A", "rK", _normal(0, 0.02)), Part("lora_E", "r1", nn.init.zeros_), Part("lora_B", "Nr", _normal(0, 0.02)))
_VERA = {"projection": None, "projection_key": 0, "d_initial": 0.1}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("lora", "arXiv 2106.09685", _AB, _lora, _per_rank, inits=True, call=_lora_call),
        Method("rslora", "arXiv 2312.03732", _AB, _lora, lambda alpha, r: alpha / math.sqrt(r), inits=True, call=_lora_call),
        Method("dora", "arXiv 2402.09353", (*_AB, Part("lora_magnitude", "N", nn.init.ones_)), _dora, _per_rank, {"dropout_form": "paper"}, True,
               prepare=_dora_options, finish=_dora_magnitude, call=_dora_call),
        # 1e-5 and the rank it started with, also after pruning: the official code's
        Method("adalora", "arXiv 2303.10512", _SVD, _adalora, lambda alpha, r: (alpha if alpha > 0 else float(r)) / (r + 1e-5)),
        Method("vera", "arXiv 2310.11454", (Part("vera_lambda_b", "N", nn.init.zeros_), Part("vera_lambda_d", "r", nn.init.ones_)), _vera,
               options=_VERA, prepare=_vera_projection, finish=_vera_fill),
        Method("ia3", "arXiv 2205.05638 (keys, values)", (Part("ia3_l", "N1", nn.init.ones_),), _ia3),
        Method("ia3_ff", "arXiv 2205.05638 (feed-forward)", (Part("ia3_l", "1K", nn.init.ones_),), _ia3_ff),
        Method("ssf", "arXiv 2210.08823", (Part("ssf_scale", "N", _normal(1, 0.02)), Part("ssf_shift", "N", _normal(0, 0.02))), _ssf),
    )
}  # fmt: skip

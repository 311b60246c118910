"""`lora_linear` and its grouped form: arguments checked, flattened, and handed to the one autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..autocast import autocasting
from ..derivatives import refuse_transforms
from ..ops.base import Base
from ..ops.lowrank import DTYPES, is_direct
from ..ops.onlookers import tracing
from ..quant.tensor import QuantizedTensor
from ..reference.lowrank import ACTIVATIONS, wide
from .function import Entry, LowRankLinear, Numbers, forward_only
from .plain import Known, known, known_of
from .plain import run as run_known

_is_grad_enabled = torch.is_grad_enabled  # bound once, as in `onlookers`


class Segment(NamedTuple):
    """One low-rank branch: scaling * token_gate * act((drop(x) A^T * rank_gate) core) B^T.

    ``A``: R x K; ``B``: N x R (N x R2 with a core); ``rank_gate``: R; ``token_gate``: one number per token, x's leading shape; ``core``: R x R2;
    ``activation``: one of `fusedadapt.reference.lowrank.ACTIVATIONS`. ``scaling`` and ``dropout_p``: a number, or a 0-d CPU tensor, which a compiled
    graph reads anew at every call.
    """

    A: Tensor
    B: Tensor
    scaling: float | Tensor = 1.0
    dropout_p: float | Tensor = 0.0
    rank_gate: Tensor | None = None
    token_gate: Tensor | None = None
    core: Tensor | None = None
    activation: str | None = None


class Output(NamedTuple):
    """One linear output of a shared x: row_scale * (x W^T + segments) + bias, or row_scale * (... + bias) with ``scale_bias``.

    ``weight``: N x K, a tensor or a `QuantizedTensor`; ``bias``, ``row_scale``: N.
    """

    weight: Tensor | QuantizedTensor
    bias: Tensor | None = None
    segments: Sequence[Segment] = ()
    row_scale: Tensor | None = None
    scale_bias: bool = False

    @property
    def base(self) -> Base:
        """The weight as the products take it."""
        if isinstance(self.weight, Tensor):
            return Base(self.weight)
        return Base(*self.weight.parts, self.weight.format.spec, self.weight.rows, self.weight.columns)


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedTensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    *,
    bias: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    dropout_p: float | Tensor = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    rank_gate: Tensor | None = None,
    token_gate: Tensor | None = None,
    core: Tensor | None = None,
    activation: str | None = None,
    row_scale: Tensor | None = None,
    scale_bias: bool = False,
    col_scale: Tensor | None = None,
) -> Tensor:
    """A linear layer with a low-rank branch, fused forward and backward (LoRA, arXiv 2106.09685, and what has its shape).

        x' = x * col_scale
        y  = row_scale * (x' W^T + scaling * token_gate * act((drop(x') A^T * rank_gate) core) B^T) + bias

    Saves x by reference, T x R numbers and a seed for backward (y too if row_scale is trained); computes only the gradients somebody needs.

    Args:
        x: [..., K] in fp32, bf16, fp16 or fp64, any strides, any number of tokens, none included.
        weight: [N, K] in x's dtype (under autocast: any), or a `QuantizedTensor`, frozen, beside any dtype of x (QLoRA).
        lora_A, lora_B: [R, K] and [N, R], any R >= 1; in x's dtype or a wider one: fp32 adapters on a 16-bit x get fp32-grade gradients. Both None:
            no low-rank branch (IA3, SSF).
        bias: [N].
        scaling: s, a number or 0-d tensor.
        dropout_p: in [0, 1), rounded to a multiple of 1/65536; applied to the branch's input only, and only if ``training``.
        seed: makes the dropout mask reproducible (an int or an int64 tensor of one element). Default: drawn from torch's generator of x's device,
            so that activation checkpointing replays it.
        rank_gate: [R] (AdaLoRA, VeRA). token_gate: [...], x's leading shape. core: [R, R2]; lora_B is then [N, R2].
        activation: "relu", "gelu", "gelu_tanh", "silu", "tanh" or "sigmoid".
        row_scale: [N] (DoRA, IA3, SSF); scale_bias: it multiplies the bias too. col_scale: [K] (IA3 on the input), for both branches.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, p outside [0, 1): before anything is computed.
        RuntimeError: inside a torch.func transform; in backward, under create_graph=True: there are first derivatives only.
    """
    segments: tuple[Segment, ...] = ()
    if lora_A is not None and lora_B is not None:
        segments = (Segment(lora_A, lora_B, scaling, dropout_p, rank_gate, token_gate, core, activation),)
    elif lora_A is not None or lora_B is not None:
        raise _error("lora_A and lora_B together", "only one of them", "pass both, or None for both")
    elif rank_gate is not None or token_gate is not None or core is not None or activation is not None:
        raise _error("lora_A and lora_B with rank_gate, token_gate, core or activation", "neither", "these act between A and B: pass those too")
    else:
        _check_numbers(scaling, dropout_p)
    output = Output(weight, bias, segments, row_scale, scale_bias)
    return lora_linear_group(x, (output,), training=training, seed=seed, col_scale=col_scale)[0]


def lora_linear_group(
    x: Tensor, outputs: Sequence[Output], *, training: bool = True, seed: int | Tensor | None = None, col_scale: Tensor | None = None
) -> list[Tensor]:
    """Several linear outputs of one x (q, k, v; gate, up), and several adapters on each: x is read once for all their A, and dx is one chain.

    Each segment has a dropout mask of its own: stream i of ``seed`` for the i-th segment, counted through all outputs.

    Args and errors: as `lora_linear`. Returns one [..., N_i] per output.
    """
    if (of := known(x, outputs, col_scale)) is not None:
        return [_run_known(of, x, outputs[0], training, seed)]
    refuse_transforms("fusedadapt.lora_linear")
    _check_outputs(x, outputs, col_scale)
    _check_seed(seed, x)
    lead, segments = x.shape[:-1], [s for output in outputs for s in output.segments]
    device_type = x.device.type
    if autocasting(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        if x.dtype != torch.float64:
            x = x.to(dtype)
            outputs = [_cast(output, dtype) for output in outputs]
    _check_dtypes(x, outputs)
    flat_x = x.dim() == 2  # then no views, which cost autograd a node each
    x2 = x if flat_x else x.reshape(-1, x.shape[-1])
    scalars, dropping = _scalars(segments, training)
    flat: list[Tensor | None] = []
    plan: list[Entry] = []
    for output in outputs:
        base = output.base
        plan.append((tuple([s.activation for s in output.segments]), output.scale_bias, base.spec, base.n, base.k))
        flat += [base.weight, output.bias, output.row_scale, *base.parts[1:]]
        for s in output.segments:
            flat += [s.A, s.B, s.rank_gate, _token_gate(s, x2), s.core]
    run: Any = LowRankLinear.apply if _is_watched(x2) else forward_only
    results = run(tuple(plan), x2, col_scale, _seed(seed, x2) if dropping else None, scalars, *flat)
    return list(results) if flat_x else [y.reshape(*lead, y.shape[-1]) for y in results]


def _run_known(of: Known, x: Tensor, output: Output, training: bool, seed: int | Tensor | None) -> Tensor:
    if seed is not None:
        _check_seed(seed, x)
        seed = int(seed)  # of a tensor the value: the kernels read a seed by its address, wherever it comes from
    (s,) = output.segments
    p: Any = s.dropout_p if training else 0.0
    weight: Any = output.weight
    return run_known(of, x, s.A, s.B, weight, output.bias, _seed(seed, x) if p else None, s.scaling, p, _is_watched(x))


def lora_known(x: Tensor, weight: Any, bias: Any, a: Any, b: Any, scaling: float, p: float) -> Tensor | None:
    """`lora_linear` of just these where `plain` knows the call; else None, and nothing has been done."""
    of = known_of(x, weight, bias, a, b, scaling, p)
    return None if of is None else run_known(of, x, a, b, weight, bias, _seed(None, x) if p else None, scaling, p, _is_watched(x))


def _is_watched(x: Tensor) -> bool:
    """Whether anybody but the caller wants to know of a call: autograd (whose forward mode no_grad leaves on), a tracer, who `is_direct` names."""
    return _is_grad_enabled() or forward_ad._current_level >= 0 or tracing() or not is_direct(x)


def _scalars(segments: Sequence[Segment], training: bool) -> tuple[Tensor | Numbers, bool]:
    """(scaling, p) of each segment, as numbers or as an fp64 CPU tensor, and whether a mask is drawn: a tensor p counts as one."""
    values: list[tuple[float | Tensor, float | Tensor]] = []
    dropping = False
    for s in segments:
        p = _dropping(s, training)
        dropping = dropping or isinstance(p, Tensor) or p > 0
        values.append((1.0 if _is_trained(s.scaling) else s.scaling, p))
    if not torch.compiler.is_compiling() and not any([isinstance(value, Tensor) for pair in values for value in pair]):
        return tuple([(float(s), float(p)) for s, p in values]), dropping
    if not values:
        return torch.zeros(0, 2, dtype=torch.float64, device="cpu"), False
    return torch.stack([_scalar(value) for pair in values for value in pair]).view(-1, 2), dropping


def _dropping(s: Segment, training: bool) -> float | Tensor:
    return s.dropout_p if training else 0.0


def _scalar(value: float | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64).reshape(())
    # A product with a tensor, because a compiler then treats the number as a value; torch.tensor(number) would be a constant of the graph.
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def _is_trained(scaling: float | Tensor) -> bool:
    return isinstance(scaling, Tensor) and (scaling.requires_grad or scaling.device.type != "cpu")


def _token_gate(s: Segment, x2: Tensor) -> Tensor | None:
    """One number per row of x2. A scaling that is trained, or lives on a device, joins in here: wide, so that its gradient is rounded once."""
    gate = None if s.token_gate is None else s.token_gate.reshape(-1)
    if isinstance(s.scaling, Tensor) and _is_trained(s.scaling):
        scale = s.scaling.to(x2.device, wide(x2.dtype)).reshape(1).expand(x2.shape[0])
        return scale if gate is None else gate.to(scale.dtype) * scale
    return gate


def _seed(seed: int | Tensor | None, x: Tensor) -> Tensor:
    if seed is None:
        return torch.randint(1 << 62, (1,), dtype=torch.int64, device=x.device)
    # torch.tensor would copy it there and wait for the GPU, which a graph being captured forbids
    return seed.reshape(1) if isinstance(seed, Tensor) else torch.full((1,), seed, dtype=torch.int64, device=x.device)


def _check_seed(seed: int | Tensor | None, x: Tensor) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            raise _error(f"seed as an int or one int64 on {x.device}", f"{seed.dtype} {tuple(seed.shape)} on {seed.device}", "convert or move it")
    elif seed is not None and (not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63):
        raise _error("seed as an int of 64 bits, with a sign", repr(seed), "pass such a number, or none to draw one from torch's generator")


def _cast(output: Output, dtype: torch.dtype) -> Output:
    bias = None if output.bias is None else output.bias.to(dtype)
    weight = output.weight.to(dtype) if isinstance(output.weight, Tensor) else output.weight
    return Output(weight, bias, output.segments, output.row_scale, output.scale_bias)


def _error(expected: str, got: str, fix: str) -> ValueError:
    return ValueError(f"fusedadapt.lora_linear: expected {expected}; got {got}; {fix}")


def _check_outputs(x: Tensor, outputs: Sequence[Output], col_scale: Tensor | None) -> None:
    _check_tensor("x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise _error("x of shape [..., K] with K >= 1", str(tuple(x.shape)), "pass activations")
    if not outputs:
        raise _error("at least one output", "none", "pass weights")
    k, tokens = x.shape[-1], x.numel() // x.shape[-1]
    _check("col_scale", col_scale, (k,), x)
    for output in outputs:
        n = _check_weight(output.weight, x, k)
        _check("bias", output.bias, (n,), x)
        _check("row_scale", output.row_scale, (n,), x)
        for s in output.segments:
            _check_segment(s, x, n, k, tokens)


def _check_weight(weight: Tensor | QuantizedTensor, x: Tensor, k: int) -> int:
    """N."""
    if not isinstance(weight, QuantizedTensor):
        _check_tensor("weight", weight)
    if len(weight.shape) != 2:
        raise _error(f"weight of shape (N, {k})", str(tuple(weight.shape)), "pass a matrix")
    n = weight.shape[0]
    if weight.shape[1] != k:
        raise _error(f"weight of shape {(n, k)}", str(tuple(weight.shape)), f"make it fit x of shape {tuple(x.shape)} and the other arguments")
    if weight.device != x.device:
        raise _error(f"weight on {x.device}, where x is", str(weight.device), "move one of them")
    return n


def _check_segment(s: Segment, x: Tensor, n: int, k: int, tokens: int) -> None:
    _check_tensor("lora_A", s.A)
    if s.A.dim() != 2 or s.A.shape[0] < 1:
        raise _error(f"lora_A of shape (R, {k}) with R >= 1", str(tuple(s.A.shape)), "pass a matrix")
    rank = s.A.shape[0]
    _check("lora_A", s.A, (rank, k), x)
    if s.core is not None:
        _check_tensor("core", s.core)
        if s.core.dim() != 2 or s.core.shape[1] < 1:
            raise _error(f"core of shape ({rank}, R2) with R2 >= 1", str(tuple(s.core.shape)), "pass a matrix")
    inner = rank if s.core is None else s.core.shape[1]
    _check("core", s.core, (rank, inner), x)
    _check("lora_B", s.B, (n, inner), x)
    _check("rank_gate", s.rank_gate, (rank,), x)
    if s.token_gate is not None:
        _check_tensor("token_gate", s.token_gate)
        if s.token_gate.numel() != tokens or (x.dim() > 1 and s.token_gate.shape[: x.dim() - 1] != x.shape[:-1]):
            raise _error(f"token_gate of x's leading shape {tuple(x.shape[:-1])}", str(tuple(s.token_gate.shape)), "pass one number per token")
        _check("token_gate", s.token_gate, tuple(s.token_gate.shape), x)
    if s.activation is not None and (not isinstance(s.activation, str) or s.activation not in ACTIVATIONS):
        raise _error(f"activation to be one of {', '.join(ACTIVATIONS)}", repr(s.activation), "name one of them, or leave it out")
    _check_numbers(s.scaling, s.dropout_p)


def _check_numbers(scaling: float | Tensor, dropout_p: float | Tensor) -> None:
    for name, value in (("dropout_p", dropout_p), ("scaling", scaling)):
        if not isinstance(value, (int, float, np.number, Tensor)):
            raise _error(f"{name} as a number or a tensor of one element", type(value).__name__, "pass one number")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise _error(f"{name} as a number or a tensor of one element", f"shape {tuple(value.shape)}", "pass one number")
    if isinstance(dropout_p, Tensor):
        if dropout_p.device.type != "cpu":
            raise _error("dropout_p on the CPU", str(dropout_p.device), "move it there: kernels take it as an argument")
        if torch.compiler.is_compiling():
            return  # its value is not known yet: the op that meets it checks
    if not 0.0 <= float(dropout_p) < 1.0:
        raise _error("dropout_p in [0, 1)", str(float(dropout_p)), "choose a probability below 1")


def _check_tensor(name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise _error(f"{name} as a tensor", type(t).__name__, "pass a tensor")
    if t.layout is not torch.strided or t.is_nested:
        raise _error(f"a dense {name}", "a nested tensor" if t.is_nested else str(t.layout), "convert it: to_dense(), or to_padded_tensor()")
    if t.dtype not in DTYPES:
        raise _error(f"floating-point {name}: float32, bfloat16, float16 or float64", str(t.dtype), "convert it")


def _check(name: str, t: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if t is None:
        return
    _check_tensor(name, t)
    if tuple(t.shape) != shape:
        raise _error(f"{name} of shape {shape}", str(tuple(t.shape)), f"make it fit x of shape {tuple(x.shape)} and the other arguments")
    if t.device != x.device:
        raise _error(f"{name} on {x.device}, where x is", str(t.device), "move one of them")


def _check_dtypes(x: Tensor, outputs: Sequence[Output]) -> None:
    for output in outputs:
        # A bias that comes last, after a row scale, is added in fp32 by our own kernel: it may be wider (SSF's shift).
        own_kernel = output.row_scale is not None and not output.scale_bias
        packed = isinstance(output.weight, QuantizedTensor)  # multiplies in any dtype, and adds the bias in fp32
        for name, t in (("weight", output.weight), ("bias", None if own_kernel or packed else output.bias)):
            if isinstance(t, Tensor) and t.dtype != x.dtype:
                raise _error(f"{name} in x's dtype {x.dtype}", str(t.dtype), f"convert one of them (x.to({t.dtype})), or use torch.autocast")

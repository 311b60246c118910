"""`QuantizedLinear`: a frozen nn.Linear whose weight is packed."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import looks, quant_act
from ..ops import quant as ops
from ..ops.address import readable
from .formats import QFormat
from .linear import quantized_linear
from .tensor import QuantizedTensor, quantize

_BUFFERS = ("scale", "zero", "super", "offset")
_DESCRIBED = frozenset(("format", "in_features", "out_features", "weight_dtype"))  # what a `QuantizedTensor` says beside its tensors
_KNOWN = "_known_quantized"  # in a layer's __dict__: whether its tensors are as they were, and the `QuantizedTensor` of them


def replaced_forward(linear: nn.Linear) -> bool:
    """Whether another library runs the layer in a way of its own. (accelerate leaves the layer's own forward there when it takes its hooks away.)"""
    forward = linear.__dict__.get("forward")
    own = getattr(forward, "__func__", None) is type(linear).forward and getattr(forward, "__self__", None) is linear
    return "_hf_hook" in linear.__dict__ or "forward" in linear.__dict__ and not own


def check_plain(op: str, linear: object) -> None:
    """Raises TypeError for what is no nn.Linear, or computes more than its weight and bias say (adapters, weights that follow other parameters)."""
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        fix = "call its to_linear() first" if hasattr(linear, "to_linear") else "pass the plain layer"
        raise TypeError(f"{op}: expected a torch.nn.Linear; got {type(linear).__name__}; {fix}")
    if replaced_forward(linear):
        fix = "take that away first (accelerate: hooks.remove_hook_from_module)"
        raise TypeError(f"{op}: expected a torch.nn.Linear that runs its own forward; got one whose forward has been replaced; {fix}")
    followed = [name for name in ("weight", "bias") if name not in linear._parameters]
    if followed or linear._parameters["weight"] is None:
        got = f"{' and '.join(followed) or 'a weight that is None'} of a {type(linear).__name__}"
        got += ", which follows other parameters" if followed else ""
        fix = "remove weight_norm, pruning or the parametrization first"
        raise TypeError(f"{op}: expected a torch.nn.Linear whose weight and bias are its parameters; got {got}; {fix}")
    if more := sorted({*linear._parameters, *linear._buffers, *linear._modules} - {"weight", "bias"}):
        raise TypeError(
            f"{op}: expected a torch.nn.Linear with weight and bias alone; got one that holds {', '.join(more)} too; pass the plain layer"
        )


class PackedWeight(nn.Linear):
    """A linear layer whose ``weight`` may be packed bytes: then ``format`` says which, and buffers weight_* hold the rest of the quantized tensor."""

    format: QFormat | None = None
    weight_dtype: torch.dtype

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _DESCRIBED:
            self._forget()
        super().__setattr__(name, value)

    def _hold(self, qw: QuantizedTensor) -> None:
        self._forget()
        self.format, self.weight_dtype = qw.format, qw.dtype
        self.weight = nn.Parameter(qw.parts.qdata, requires_grad=False)
        for name in _BUFFERS:
            self.register_buffer(f"weight_{name}", getattr(qw, name))

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight; shares memory with the layer. A layer with a dense one does not have the attribute, which torch.jit asks all of them for."""
        if self.format is None:
            raise AttributeError(f"{type(self).__name__}.quantized: expected a packed weight; got a dense one; see QuantizedLinear.from_linear")
        # The same object for as long as the layer's tensors stay where they are: `quant.plain` keeps with it what it has checked.
        given = self.weight, self.weight_scale, self.weight_zero, self.weight_super, self.weight_offset
        known = None if torch.compiler.is_compiling() else self.__dict__.get(_KNOWN)
        if known is not None:
            if known[0](*given):
                found: QuantizedTensor = known[1]
                return found
            self._forget()
        return self._quantized(*given)

    def _forget(self) -> None:
        """What is kept holds memory."""
        self.__dict__.pop(_KNOWN, None)

    def _quantized(self, weight: Tensor, *others: Any) -> QuantizedTensor:
        assert self.format is not None
        shape, compiling = torch.Size((self.out_features, self.in_features)), torch.compiler.is_compiling()
        with contextlib.nullcontext() if compiling else torch.inference_mode(False):  # what is kept may be used outside of it
            qw = QuantizedTensor(weight.detach().view(self.format.storage_dtype), *others, self.format, shape, self.weight_dtype)  # type: ignore[call-arg]
        # Not for accelerate's hooks, which bring the weight for a call and take it back: it would stay here.
        keeps = not compiling and "_hf_hook" not in self.__dict__
        if keeps and (core := looks.core()) is not None and all([readable(t) for t in (weight, *others) if t is not None]):
            self.__dict__[_KNOWN] = core.keep(weight, *others), qw
        return qw

    def __getstate__(self) -> dict[str, Any]:
        """Without what is only true of this very object."""
        return {name: value for name, value in self.__dict__.items() if name != _KNOWN}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in ``dtype`` (default: the one it was quantized from)."""
        return self.quantized.dequantize(dtype)

    @torch.no_grad()
    def write(self, qw: QuantizedTensor) -> None:
        """Copies a weight of the same format and shape into the layer's own memory."""
        own = self.quantized
        if (qw.format, qw.shape) != (own.format, own.shape):
            raise ValueError(f"{type(self).__name__}.write: expected {own!r}; got {qw!r}; quantize to the layer's format and shape")
        for mine, new in zip(own.parts, qw.parts, strict=True):
            if mine is not None and new is not None:
                mine.copy_(new)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        packed = [t for t in self._buffers.values() if t is not None]
        packed += [] if self.format is None else [self.weight]

        def moved(t: Tensor) -> Tensor:  # codes and scales move between devices; .to(dtype), .half() and .type() must not convert them
            new = fn(t)
            return t.to(new.device) if new.dtype != t.dtype and any(t is part for part in packed) else new

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self._forget()
        return self

    def _misfits(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """What stands against loading a state; changes nothing. torch's copy would convert bytes of another dtype as if they were numbers,
        and takes over the tensors that fit where others do not."""
        saved = {name: t for name in (*self._parameters, *self._buffers) if isinstance(t := state_dict.get(prefix + name), Tensor)}
        pairs = [(f"{prefix}{name}", own, t) for name, t in saved.items() if (own := self._own(name)) is not None]
        packed = [] if self.format is None else [f"{prefix}{name}" for name in ("weight", *self._buffers)]
        dtypes = [
            f"{key}: expected {own.dtype}; got {t.dtype}; load the state as it was saved, unconverted"
            for key, own, t in pairs
            if key in packed and t.dtype != own.dtype
        ]
        return dtypes + [
            f"size mismatch for {key}: expected shape {tuple(own.shape)}; got {tuple(t.shape)}; build the layer with the sizes of the state"
            for key, own, t in pairs
            if t.shape != own.shape and not (own.dim() == 0 and t.shape == (1,))  # torch takes one element for a scalar
        ]

    def _own(self, name: str) -> Tensor | None:
        """A parameter or persistent buffer of this name."""
        return None if name in self._non_persistent_buffers_set else self._parameters.get(name, self._buffers.get(name))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if faults := self._misfits(state_dict, prefix):
            rest[-1].extend(faults)  # torch raises RuntimeError with them
        else:
            super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]


class QuantizedLinear(PackedWeight):
    """x W^T + b with W in few bits: drop-in for a frozen nn.Linear, and a base layer for adapters (QLoRA, arXiv:2305.14314).

    ``weight``: the packed codes, a uint8 Parameter that is never trained; ``weight_scale``, ``weight_zero``, ``weight_super``, ``weight_offset``:
    buffers (None where the format has none). The bias stays an ordinary parameter. ``.to(dtype)`` and ``.half()`` change the bias only. The state
    dict holds the bytes, the format, the shape and `activations`; loading another format or shape into the layer is refused before anything of it
    is written. Made by `from_linear` and `from_quantized`.

    Attributes:
        format: the `QFormat`. quantized: the weight as a `QuantizedTensor` that shares its memory. in_features, out_features: K and N.
        weight_order: None, or int64 [K]: column j of ``quantized`` belongs to input weight_order[j] (GPTQ's act-order); `dequantize` puts them back.
        activations: None, or "int8" | "fp8_e4m3": what x is coded to on the fly, see `fusedadapt.quantized_linear`.
    """

    format: QFormat
    activations: str | None = None
    weight_order: Tensor | None

    def __init__(self, qw: QuantizedTensor, bias: Tensor | None = None, order: Tensor | None = None) -> None:
        if not isinstance(qw, QuantizedTensor) or len(qw.shape) != 2:
            got = f"shape {tuple(qw.shape)}" if isinstance(qw, QuantizedTensor) else type(qw).__name__
            raise TypeError(f"QuantizedLinear: expected a QuantizedTensor of two dimensions; got {got}; make one with fusedadapt.quantize")
        for name, t in (("bias", bias), ("order", order)):
            if t is not None and not isinstance(t, Tensor):
                raise TypeError(f"QuantizedLinear: expected {name}: a tensor or None; got {type(t).__name__}; convert it with torch.tensor")
        if bias is not None and bias.shape != (qw.rows,):
            raise ValueError(f"QuantizedLinear: expected a bias of shape ({qw.rows},); got {tuple(bias.shape)}; pass one number per output")
        if order is not None and (order.dtype != torch.int64 or not torch.equal(order.sort().values, torch.arange(qw.columns, device=order.device))):
            got = f"{order.dtype}, shape {tuple(order.shape)}"
            raise ValueError(f"QuantizedLinear: expected order: int64, every input from 0 to {qw.columns - 1} once; got {got}; take from_gptq's")
        super().__init__(qw.columns, qw.rows, bias=False, device="meta")
        self._hold(qw)
        self.register_buffer("weight_order", order)
        if "peft" in sys.modules:  # its own class for linear layers cannot merge into packed bytes
            importlib.import_module("fusedadapt.integrations.peft_quantized").register()
        if bias is not None:
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, format: str | QFormat = "nf4", group_size: int | None = None, **options: Any) -> QuantizedLinear:
        """The layer with its weight quantized; its bias is shared. Arguments and errors as `fusedadapt.quantize`; TypeError if it
        is not a plain nn.Linear."""
        check_plain("QuantizedLinear.from_linear", linear)
        return cls(quantize(linear.weight, format, group_size, **options), linear.bias).train(linear.training)

    @classmethod
    def from_quantized(cls, qw: QuantizedTensor, bias: Tensor | None = None, order: Tensor | None = None) -> QuantizedLinear:
        """A layer around a quantized weight, whose memory it shares; ``order``: what `foreign.from_gptq` gave beside it."""
        return cls(qw, bias, order)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in ``dtype`` (default: the one it was quantized from), column j of input j."""
        w = super().dequantize(dtype)
        return w if self.weight_order is None else w[:, self.weight_order.argsort()]

    def stored(self, w: Tensor) -> Tensor:
        """A weight [N, K] with its columns as ``quantized`` has them."""
        return w if self.weight_order is None else w[:, self.weight_order]

    @property
    def W_q(self) -> Tensor:
        """The packed weight. PEFT (DoRA, merging, initialisations) asks layers that have this name for `dequantize()` and reads others' weight."""
        return self.weight

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain nn.Linear with the dequantized weight; this layer is left as it is."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().to(plain.weight.dtype), requires_grad=False)
        return plain.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        input = input if self.weight_order is None else input[..., self.weight_order]
        return quantized_linear(input, self.quantized, self.bias, activations=self.activations)

    def reset_parameters(self) -> None:
        """Nothing to draw: the weight is given."""

    def get_extra_state(self) -> Tensor:
        """The format, the weight's dtype and shape, and how x is coded ("" for None) as text, in bytes."""
        shape = f"{self.out_features}x{self.in_features}"
        # Of one length with any activations: torch.distributed.checkpoint loads tensors into tensors of the same size.
        text = ";".join([self.format.spec, str(self.weight_dtype).removeprefix("torch."), shape, f"{self.activations or '':8}"])
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over the dtype and `activations`. Refuses (RuntimeError) a state of another format or shape, and one that is damaged."""
        self.weight_dtype, self.activations = self._read_extra(state)

    def _read_extra(self, state: Tensor) -> tuple[torch.dtype, str | None]:
        """(dtype, activations) of a state that fits. Earlier releases saved format and dtype alone: the layer keeps its own activations then."""
        damaged = "the state is damaged: save it again"
        if state.dtype != torch.uint8 or state.dim() != 1:
            raise RuntimeError(f"QuantizedLinear: expected text in bytes in _extra_state; got {state.dtype}, shape {tuple(state.shape)}; {damaged}")
        fields = bytes(state.tolist()).decode(errors="replace").split(";")
        spec, dtype, shape, activations = (field.rstrip() for field in [*fields, "", "", ""][:4])
        if spec != self.format.spec:
            raise RuntimeError(f"QuantizedLinear: expected a state in {self.format.spec}; got {spec}; quantize the layer to that format first")
        found = {str(each).removeprefix("torch."): each for each in ops.DTYPES}.get(dtype)
        if found is None:
            raise RuntimeError(f"QuantizedLinear: expected the dtype of a weight in _extra_state; got {dtype!r}; {damaged}")
        if len(fields) <= 2:
            return found, self.activations
        own = f"{self.out_features}x{self.in_features}"
        if shape != own:  # bytes of one size may be weights of several
            got = f"expected a state of {own.replace('x', ' x ')}; got {shape.replace('x', ' x ')}"
            raise RuntimeError(f"QuantizedLinear: {got}; build the layer with the sizes of the state")
        if len(fields) != 4 or activations not in ("", *quant_act.ACTIVATIONS):
            known = ", ".join(quant_act.ACTIVATIONS)
            raise RuntimeError(f"QuantizedLinear: expected activations among {known} or none in _extra_state; got {fields[3:]}; {damaged}")
        return found, activations or None

    def _misfits(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        faults, extra = super()._misfits(state_dict, prefix), state_dict.get(f"{prefix}_extra_state")
        if not faults and isinstance(extra, Tensor):
            try:  # torch asks set_extra_state when the codes have been overwritten
                self._read_extra(extra)
            except RuntimeError as error:
                faults.append(f"{prefix}_extra_state: {error}")
        key, ordered = f"{prefix}weight_order", self.weight_order is not None
        if f"{prefix}weight" in state_dict and (key in state_dict) != ordered:  # codes whose columns stand in another order
            wanted, got = ("an order of the inputs", "none") if ordered else ("none", "an order of the inputs")
            faults.append(f"{key}: expected {wanted}; got {got}; build the layer {'without' if ordered else 'with'} order=, as the saved one was")
        return faults

    def extra_repr(self) -> str:
        """nn.Linear's, and the format."""
        return f"{super().extra_repr()}, {self.format.spec}"

    def __fusedadapt_explain__(self) -> list[tuple[str, str, str]]:
        device = self.weight.device.type
        what = f"QuantizedLinear[{self.format.spec}] {self.out_features}x{self.in_features} {self.weight.device}"
        shape = (self.out_features, self.in_features, self.format)
        if self.activations is not None:
            fp8 = self.activations != "int8"
            coded = quant_act.choose("fp8_linear" if fp8 else "int8_linear", device)
            how = "; fp8 is widened: this GPU has no product of it" if fp8 and not quant_act.multiplies_fp8(self.weight.device) else ""
            return [(f"{what}, x in {self.activations}", coded.backend, f"{coded.reason}{how}")]
        choice, other = (ops.choose("linear", device, torch.float32, (tokens, *shape)) for tokens in (1, 64))
        more = "" if other == choice else f"; 64 tokens: {other.backend} ({other.reason})"
        pieces = ops.choose("dequantize", device, torch.float32).backend
        more += "" if self.weight_order is None else "; act-order: x is gathered first"
        return [(what, choice.backend, f"{choice.reason}{more}; many tokens: dequantized in pieces by {pieces}, torch's GEMM")]

"""`LoRALinear`: a frozen nn.Linear with any adapter of `METHODS`, run by the one fused call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import lowrank as ops
from ..quant.layer import PackedWeight, QuantizedLinear, check_plain
from ..quant.tensor import QuantizedTensor
from ..reference.lowrank import wide
from . import inits, merge
from .functional import lora_linear
from .inits import Factors
from .merge import MergeReport
from .methods import METHODS, Method, VeraProjection

Init = bool | str | Tensor | Factors


def _aside(module: nn.Module, args: Any) -> None:
    """A hook is what makes nn.TransformerEncoderLayer call its layers in eval mode; otherwise it hands their weights to a kernel of torch's."""


class FastPathAside(nn.Module):
    """Never called; its hook counts as one of the encoder layer that it is somewhere in. (A hook of the adapter's own would cost it time.)"""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(_aside)

    def reset_parameters(self) -> None:
        """Nothing to draw; whoever makes a model on the meta device asks all modules."""


class LoRALinear(PackedWeight):
    """A frozen linear layer with a trained adapter, fused forward and backward: LoRA (arXiv 2106.09685) and its relatives.

    ``method`` names a record of `fusedadapt.lowrank.METHODS`. Trained parameters:

        lora, rslora   lora_A [r, K], lora_B [N, r]
        dora           those and lora_magnitude [N]; ``dropout_form``: "paper" (in the low-rank branch only) or "peft" (two dense products)
        adalora        those and lora_E [r, 1]; see `fusedadapt.lowrank.RankAllocator`
        vera           vera_lambda_b [N], vera_lambda_d [r]; ``projection``: a shared `VeraProjection`, or ``projection_key``; ``d_initial``
        ia3, ia3_ff    ia3_l [N, 1] on the output (keys, values) or [1, K] on the input (feed-forward)
        ssf            ssf_scale, ssf_shift [N]; not the identity at the start

    weight [N, K] and bias [N] are frozen. Scaling and dropout are run-time values: changing them recompiles nothing.

    Args:
        r, lora_alpha: rank (any >= 1) and alpha; scaling is alpha / r, alpha / sqrt(r) for rslora, alpha / (r + 1e-5) for adalora.
        lora_dropout: in [0, 1), on the low-rank branch's input.
        init: True (the method's own: A kaiming-uniform, B zero), False (both random), "kaiming", "gaussian", "orthogonal", "pissa", "olora",
            "pissa_niter_<n>"; a tensor [r, K] for A with B zero (EVA); or `Factors` (CorDA). "pissa", "olora" and `Factors` rewrite the weight.
        adapter_dtype: of the trained parameters. Default: fp32 on a 16-bit weight, else the weight's.

    The state dict has the parameters and one extra fp64 tensor, (scaling, merged). Loading never rounds: a saved tensor that the layer's dtype cannot
    hold is refused.

    Raises:
        ValueError: unknown method or init, r < 1, dropout outside [0, 1). TypeError: unknown options.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_E: nn.Parameter
    lora_magnitude: nn.Parameter
    vera_lambda_b: nn.Parameter
    vera_lambda_d: nn.Parameter
    ia3_l: nn.Parameter
    ssf_scale: nn.Parameter
    ssf_shift: nn.Parameter
    projection: VeraProjection

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        method: str = "lora",
        init: Init = True,
        adapter_dtype: torch.dtype | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        record = _checked(method, r, lora_dropout, options)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._adapt(record, r, lora_alpha, lora_dropout, init, adapter_dtype, options)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        *,
        lora_dropout: float = 0.0,
        method: str = "lora",
        init: Init = True,
        adapter_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> LoRALinear:
        """The same layer with an adapter. Shares ``linear``'s weight and bias, which are frozen from here on; ``init`` and `merge` write to them.

        A `QuantizedLinear` stays packed (QLoRA); `merge` then quantizes the sum anew, and `unmerge` brings the former bytes back.

        Arguments and errors as the class; TypeError if ``linear`` is neither that nor a plain nn.Linear, or the out_proj of nn.MultiheadAttention;
        ValueError if it codes or reorders x.
        """
        if type(linear).__name__ == "NonDynamicallyQuantizableLinear":
            got = "out_proj of nn.MultiheadAttention, which reads its weight"
            raise TypeError(f"LoRALinear.from_linear: expected a layer that is called; got {got}; leave it out, or use an attention of plain layers")
        if not isinstance(linear, QuantizedLinear):
            check_plain("LoRALinear.from_linear", linear)
        if getattr(linear, "weight_order", None) is not None:
            fix = "use PEFT with fusedadapt.patch, or LoRALinear on linear.to_linear()"
            raise ValueError(f"LoRALinear.from_linear: expected columns in the order of the inputs; got an act-order weight; {fix}")
        if (codes := getattr(linear, "activations", None)) is not None:
            fix = "set its activations to None first, or use PEFT, which keeps the coding"
            raise ValueError(f"LoRALinear.from_linear: expected a layer that multiplies x as it is; got activations={codes!r}; {fix}")
        record = _checked(method, r, lora_dropout, options)
        self = cls.__new__(cls)
        nn.Linear.__init__(self, linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        if isinstance(linear, QuantizedLinear):
            self._hold(linear.quantized)
        self.weight, self.bias = linear.weight, linear.bias
        self._adapt(record, r, lora_alpha, lora_dropout, init, adapter_dtype, options)
        return self.train(linear.training)

    def _adapt(
        self, record: Method, r: int, alpha: float, dropout: float, init: Init, adapter_dtype: torch.dtype | None, options: dict[str, Any]
    ) -> None:
        if not _is_number(alpha) or not math.isfinite(alpha):
            raise ValueError(f"LoRALinear[{record.name}]: expected a finite lora_alpha; got {alpha!r}; choose a number, often r or 2 r")
        if adapter_dtype is not None and adapter_dtype not in ops.DTYPES:
            kinds = "floating-point adapter_dtype: float32, bfloat16, float16 or float64"
            raise ValueError(f"LoRALinear[{record.name}]: expected a {kinds}; got {adapter_dtype!r}; choose torch.float32")
        self.method, self.r, self.lora_alpha = record.name, r if record.ranked else 0, alpha
        self.options = dict(record.options) | options
        base = self.weight.dtype if self.format is None else torch.float32
        self.adapter_dtype = adapter_dtype or wide(base)
        # neither parameters nor buffers: .to() (and a torch.device context) must leave them on the CPU in fp64, where a compiled graph reads them;
        # and as numbers for everybody else
        self._scaling_value, self._dropout_value = float(record.law(alpha, max(r, 1))), float(dropout)
        self.lora_scaling = torch.tensor(self._scaling_value, dtype=torch.float64, device="cpu")
        self._dropout = torch.tensor(self._dropout_value, dtype=torch.float64, device="cpu")
        self.merged = False
        self._before: merge.Before | None = None
        self.aside = FastPathAside()
        if record.prepare is not None:
            record.prepare(self)
        sizes = {"r": r, "K": self.in_features, "N": self.out_features, "1": 1}
        for part in record.parts:
            empty = torch.empty([sizes[letter] for letter in part.shape], device=self.weight.device, dtype=self.adapter_dtype)
            self.register_parameter(part.name, nn.Parameter(empty))
        self.reset_adapter(init)
        for frozen in (self.weight, self.bias):
            if frozen is not None:
                frozen.requires_grad_(False)

    @torch.no_grad()
    def reset_adapter(self, init: Init = True) -> None:
        """Fills the trained parameters anew. ``init``: as the class. RuntimeError on a merged layer, with nothing changed."""
        self._check_unmerged("reset_adapter")
        record = METHODS[self.method]
        if init is not True and not record.inits:
            raise ValueError(f"LoRALinear[{self.method}]: expected init=True, its own; got {init!r}; other initialisations are for lora_A and lora_B")
        for part in record.parts:
            if not (record.inits and part.name in ("lora_A", "lora_B")):
                part.fill(getattr(self, part.name))
        if record.inits:
            inits.initialise(self, init)
        if record.finish is not None:
            record.finish(self)

    def reset_parameters(self) -> None:
        """Draws weight and bias as nn.Linear does, and the adapter. RuntimeError as `reset_adapter`."""
        adapted = "method" in self.__dict__  # not while nn.Linear is made
        if adapted:
            self._check_unmerged("reset_parameters")
        super().reset_parameters()
        if adapted:
            self.reset_adapter()

    def _check_unmerged(self, what: str) -> None:
        if self.merged:
            raise RuntimeError(f"LoRALinear.{what}: expected an unmerged layer; the adapter is merged into its weight; unmerge it first")

    @property
    def base_weight(self) -> Tensor | QuantizedTensor:
        """The weight as `lora_linear` takes it."""
        return self.weight if self.format is None else self.quantized

    # --- run-time values ---------------------------------------------------------------------------------------------------------------

    @property
    def scaling(self) -> float:
        """s, what the low-rank branch is multiplied by; may be set at any time. ValueError if it is not finite."""
        return self._scaling_value

    @scaling.setter
    def scaling(self, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(f"LoRALinear: expected a finite scaling; got {value!r}; set a number, often lora_alpha / r")
        self._scaling_value = float(value)
        self.lora_scaling.fill_(value)

    @property
    def lora_dropout(self) -> float:
        """p in [0, 1); may be set at any time."""
        return self._dropout_value

    @lora_dropout.setter
    def lora_dropout(self, p: float) -> None:
        _check_dropout(p)
        self._dropout_value = float(p)
        self._dropout.fill_(p)

    def scaling_argument(self) -> float | Tensor:
        """s as `lora_linear` wants it: to a compiler a tensor, so that one graph serves every s; otherwise a number, which costs less."""
        return self.lora_scaling if torch.compiler.is_compiling() else self._scaling_value

    def dropout_argument(self) -> float | Tensor:
        """p, likewise; a plain 0 draws no seed."""
        return self._dropout if torch.compiler.is_compiling() else self._dropout_value

    # --- forward -----------------------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], in x's dtype. Errors: as `lora_linear`."""
        if self.merged:
            return lora_linear(x, self.base_weight, None, None, bias=self.bias)
        record = METHODS[self.method]
        if record.call is not None and (y := record.call(self, x)) is not None:
            return y
        a = record.arguments(self, self.weight.dtype if self.format is None else self.weight_dtype)
        return lora_linear(
            x, self.base_weight, a.A, a.B,
            bias=a.bias, scaling=self.scaling_argument(), dropout_p=self.dropout_argument(), training=self.training,
            rank_gate=a.rank_gate, row_scale=a.row_scale, scale_bias=a.scale_bias, col_scale=a.col_scale,
        )  # fmt: skip

    # --- merge -------------------------------------------------------------------------------------------------------------------------

    def merge(self, *, backup: bool = True, name: str = "") -> MergeReport:
        """Puts the adapter into the weight (and bias): computed in fp32 or wider, rounded once to the weight's dtype.

        The report's ``retained`` is the share of the change that the rounding kept: bf16 cannot hold a small one. With ``backup`` (default) the
        weight as it was is kept, one more copy in memory, and `unmerge` brings back the same bits. Without, `unmerge` computes the weight back from
        a copy of the rank-r factors: some elements then differ in their last bits, and its report says what was lost. Everyone who shares the weight
        sees it changed. ``name``: the layer's, for messages.

        Raises:
            RuntimeError: already merged. ValueError: a weight that cannot hold the result or is computed from other parameters, factors that are not
                finite; nothing is changed.
        """
        return merge.merge_layer(self, backup, name)

    def unmerge(self, *, name: str = "") -> MergeReport:
        """Takes the adapter out of the weight again: bit for bit if `merge` kept a backup.

        Raises:
            RuntimeError: not merged; merged before it was loaded from a state dict, which has no backup; the weight has been written to since (of
                adapters that share a weight the last merged is the first to unmerge). Nothing is changed.
        """
        return merge.unmerge_layer(self, name)

    def to_linear(self) -> nn.Linear:
        """A plain nn.Linear that computes what this layer does in eval mode; this layer is left as it is."""
        return merge.merged_linear(self)

    # --- state -------------------------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """(scaling, merged), and the bytes of a packed weight's format and shape, for the state dict."""
        return torch.tensor([self.scaling, float(self.merged), *self._packed_as.encode()], dtype=torch.float64, device="cpu")

    @property
    def _packed_as(self) -> str:
        return "" if self.format is None else f"{self.format.spec};{self.out_features}x{self.in_features}"

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over the scaling; `merged` goes with the weight."""
        self.scaling = float(state[0])

    def _misfits(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        faults, extra = super()._misfits(state_dict, prefix), state_dict.get(f"{prefix}_extra_state")
        if extra is None:
            return faults
        own, earlier = self._packed_as, self._packed_as.partition(";")[0]  # earlier releases saved the format alone
        # torch asks set_extra_state when the parameters have been overwritten
        sound = isinstance(extra, Tensor) and extra.dim() == 1 and len(extra) >= 2 and extra.is_floating_point() and bool(extra.isfinite().all())
        if not sound or extra[1] not in (0, 1):
            got = f"{extra.dtype} {extra.view(-1)[:2].tolist()} of shape {tuple(extra.shape)}" if isinstance(extra, Tensor) else type(extra).__name__
            faults.append(f"{prefix}_extra_state: expected a finite scaling, and 0 or 1 for merged; got {got}; the state is damaged: save it again")
        elif (saved := bytes(int(n) & 0xFF for n in extra[2:]).decode(errors="replace")) and saved not in (own, earlier):
            faults.append(f"{prefix}weight: expected {own or 'dense weights'}; got {saved}; build the layer on a base of that format")
        return faults

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        lossy = [
            f"{prefix}{name}: expected a dtype that {own.dtype} holds exactly; got {saved.dtype}; convert one, or load with assign=True"
            for name, own in self._parameters.items()
            if own is not None and isinstance(saved := state_dict.get(prefix + name), Tensor) and _rounds(saved.dtype, own.dtype)
        ]
        if lossy and not local_metadata.get("assign_to_params_buffers", False):
            error_msgs += lossy
            return
        known = len(error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if len(error_msgs) > known:
            return
        extra = prefix + "_extra_state"
        if extra in missing_keys:  # a checkpoint of the parameters alone
            missing_keys.remove(extra)
        if prefix + "weight" in state_dict:
            self.merged, self._before = bool(extra in state_dict and state_dict[extra][1] > 0), None

    def extra_repr(self) -> str:
        """nn.Linear's, and the adapter's settings."""
        rank = f", r={self.r}, scaling={self.scaling:g}, dropout={self.lora_dropout:g}" if self.r else ""
        return f"{super().extra_repr()}, method={self.method}{rank}{', merged' if self.merged else ''}"

    def __fusedadapt_explain__(self) -> list[tuple[str, str, str]]:
        held = self.weight.dtype if self.format is None else self.format.spec
        what = f"{type(self).__name__}[{self.method}] {held} {self.weight.device}".replace("torch.", "")
        if self.merged:
            return [(what, "torch", "merged: one dense product")]
        choice = ops.choose("shrink", self.weight.device.type, self.weight.dtype if self.format is None else self.weight_dtype)
        note = "; dense product: torch's GEMM" if self.format is None else "; product with W: from the packed bytes"
        if METHODS[self.method].call is not None and self.options.get("dropout_form") == "peft":
            note += "; dropout_form='peft': a second dense product while training with dropout"
        return [(what, choice.backend, choice.reason + note)]


def _checked(method: str, r: int, dropout: float, options: dict[str, Any]) -> Method:
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"LoRALinear: expected a method of {', '.join(METHODS)}; got {method!r}; name one of them")
    record = METHODS[method]
    if record.ranked and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise ValueError(f"LoRALinear[{method}]: expected a rank r >= 1; got {r!r}; choose a positive integer")
    _check_dropout(dropout)
    if unknown := sorted(set(options) - set(record.options)):
        raise TypeError(f"LoRALinear[{method}]: expected options {sorted(record.options)}; got {unknown}; leave them out")
    return record


def _is_number(value: object) -> bool:
    """A function, because mypy takes no float for a Real and what follows for unreachable."""
    return isinstance(value, Real)


def _check_dropout(p: float) -> None:
    if not _is_number(p) or not 0.0 <= p < 1.0:
        raise ValueError(f"LoRALinear: expected lora_dropout in [0, 1); got {p!r}; choose a probability below 1")


def _rounds(saved: torch.dtype, own: torch.dtype) -> bool:
    """Whether some value of `saved` has no equal in `own`."""
    return saved != own and torch.promote_types(saved, own) != own

"""`--quant`: the encoder's linear layers in few bits under the adapter (QLoRA, arXiv:2305.14314), and what that saves and costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..quant import FORMATS, QuantizedLinear
from .data import Pair
from .lane import kept_for_backward
from .metrics import Quality
from .model import Encoder
from .tokens import Tokens

#: what a user may name; "-dq": 8-bit scales of scales. The dynamic maps are for optimizer states.
CHOICES = (*(name for name in FORMATS if not name.startswith("dynamic")), "nf4-dq", "fp4-dq")


@dataclass(frozen=True)
class Summary:
    """Bytes of the quantized layers' weights and of the whole model, each before and after; bytes a batch keeps for backward when the whole
    dense model is trained; quality right after quantizing."""

    format: str
    layers: int
    weight_bytes: tuple[int, int]
    model_bytes: tuple[int, int]
    kept_dense: int
    quality: Quality

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` is the way back."""
        return asdict(self)

    @staticmethod
    def from_dict(found: dict[str, Any]) -> Summary:
        pairs = {name: tuple(found[name]) for name in ("weight_bytes", "model_bytes")}
        return Summary(**found | pairs | {"quality": Quality(**found["quality"])})


def apply(encoder: Encoder, choice: str) -> None:
    """Quantizes every linear of the encoder's layers, in place."""
    name, _, nested = choice.partition("-")
    options: dict[str, Any] = {"double_quant": True} if nested else {}
    for path, module in list(encoder.named_modules()):
        if isinstance(module, nn.Linear) and path.startswith("encoder.layer."):
            parent, _, child = path.rpartition(".")
            setattr(encoder.get_submodule(parent), child, QuantizedLinear.from_linear(module, name, **options))


def summarise(choice: str, plain: Encoder, packed: Encoder, quality: Quality, tokens: Tokens, batch: list[Pair]) -> Summary:
    """``plain``: the encoder as it came; ``packed``: the same quantized, with or without an adapter."""
    layers = {name: module for name, module in packed.named_modules() if getattr(module, "format", None) is not None}
    before = sum(plain.get_parameter(f"{name}.weight").nbytes for name in layers)
    after = sum(module.quantized.nbytes for module in layers.values())
    whole = sum(p.nbytes for p in plain.parameters())
    return Summary(choice, len(layers), (before, after), (whole, whole - before + after), kept_for_backward(plain, tokens, batch), quality)


def notes(summary: Summary, before: Quality, after: Quality, kept: int) -> list[str]:
    """Sentences under the table. ``after``: with the adapter; ``kept``: bytes a batch keeps for backward."""
    (dense, packed), (whole, small) = summary.weight_bytes, summary.model_bytes
    return [
        f"{summary.layers} linear layers in {summary.format}: weights {dense / 1e6:,.1f} -> {packed / 1e6:,.1f} MB ({dense / packed:.2f}x smaller), "
        f"the whole model {whole / 1e6:,.1f} -> {small / 1e6:,.1f} MB",
        f"MRR {before.mrr:.4f} before, {summary.quality.mrr:.4f} quantized, {after.mrr:.4f} adapted; a batch keeps {kept / 1e6:,.0f} MB for "
        f"backward; training the whole dense model {summary.kept_dense / 1e6:,.0f} MB",
    ]

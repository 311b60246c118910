"""Low-bit weights: one table of formats, exact bytes, products and gradients from the packed weight.

Names arrive on first use: ops import the formats, and what is public here imports the ops.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    from .activations import quantized_linear_act as quantized_linear_act
    from .fake import fake_quantize as fake_quantize
    from .formats import FORMATS as FORMATS
    from .formats import QFormat as QFormat
    from .formats import format_of as format_of
    from .layer import QuantizedLinear as QuantizedLinear
    from .linear import quantized_linear as quantized_linear
    from .load import load_model_ as load_model_
    from .model import quantize_model_ as quantize_model_
    from .save import save_pretrained as save_pretrained
    from .stream import quantize_checkpoint as quantize_checkpoint
    from .tensor import QuantizedTensor as QuantizedTensor
    from .tensor import quantize as quantize

_HOMES = {
    "FORMATS": "formats",
    "QFormat": "formats",
    "QuantizedLinear": "layer",
    "QuantizedTensor": "tensor",
    "fake_quantize": "fake",
    "format_of": "formats",
    "load_model_": "load",
    "quantize": "tensor",
    "quantize_checkpoint": "stream",
    "quantize_model_": "model",
    "quantized_linear": "linear",
    "quantized_linear_act": "activations",
    "save_pretrained": "save",
}
__all__ = [*_HOMES]  # noqa: PLE0604 - names, all of them


def __getattr__(name: str) -> _Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

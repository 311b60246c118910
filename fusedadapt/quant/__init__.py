"""Low-bit weights: one table of formats, exact bytes, products and gradients from the packed weight."""

from .activations import quantized_linear_act
from .fake import fake_quantize
from .formats import FORMATS, QFormat, format_of
from .layer import QuantizedLinear
from .linear import quantized_linear
from .load import load_model_
from .model import quantize_model_
from .stream import quantize_checkpoint
from .tensor import QuantizedTensor, quantize

__all__ = [
    "FORMATS",
    "QFormat",
    "QuantizedLinear",
    "QuantizedTensor",
    "fake_quantize",
    "format_of",
    "load_model_",
    "quantize",
    "quantize_checkpoint",
    "quantize_model_",
    "quantized_linear",
    "quantized_linear_act",
]

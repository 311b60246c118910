"""Low-bit weights: one table of formats, exact bytes, products and gradients from the packed weight."""

from .fake import fake_quantize
from .formats import FORMATS, QFormat, format_of
from .layer import QuantizedLinear
from .linear import quantized_linear
from .tensor import QuantizedTensor, quantize

__all__ = ["FORMATS", "QFormat", "QuantizedLinear", "QuantizedTensor", "fake_quantize", "format_of", "quantize", "quantized_linear"]

"""Low-bit weights: one table of formats, exact bytes, products and gradients from the packed weight."""

from .fake import fake_quantize
from .formats import FORMATS, QFormat, format_of
from .tensor import QuantizedTensor, quantize

__all__ = ["FORMATS", "QFormat", "QuantizedTensor", "fake_quantize", "format_of", "quantize"]

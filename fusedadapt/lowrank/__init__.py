"""Low-rank adapters: one primitive, y = g * (x W^T + s mid(drop(x) A^T) B^T) + b, fused forward and backward."""

from .functional import Output as Output
from .functional import Segment as Segment
from .functional import lora_linear as lora_linear
from .functional import lora_linear_group as lora_linear_group

"""Division by a number, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def over(t: Tensor, number: float) -> Tensor:
    """t / number, one IEEE division: on a GPU torch multiplies by the reciprocal of a Python number, which is an ulp off now and then."""
    return t / torch.full((), number, device=t.device, dtype=torch.promote_types(t.dtype, torch.float32))

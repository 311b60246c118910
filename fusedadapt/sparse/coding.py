"""Sorted positions as bytes: the gap to the previous one in a byte (or two), the largest value meaning "that many further, and go on"."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def encode(indices: Tensor, width: int | None = None) -> Tensor:
    """Sorted unique positions -> uint8 bytes, of one-byte or two-byte (little-endian) gaps: the shorter, unless `width` says which.

    About 1.1 bytes an entry at 1 % density, 1.03 at 3 %.
    """
    at = indices.cpu().numpy().astype(np.int64)
    gaps = np.diff(at, prepend=-1) - 1
    if width is None:
        sizes = {w: w * int((gaps // (256**w - 1) + 1).sum()) for w in (1, 2)}
        width = min(sizes, key=lambda w: sizes[w])
    escape = 256**width - 1
    ends = np.cumsum(gaps // escape + 1)
    out = np.full(int(ends[-1]) if len(ends) else 0, escape, dtype="<u1" if width == 1 else "<u2")
    out[ends - 1] = gaps % escape
    return torch.from_numpy(out.view(np.uint8).copy())


def decode(data: Tensor, width: int) -> Tensor:
    """The inverse of `encode`: int64 positions."""
    raw = data.cpu().numpy().view("<u1" if width == 1 else "<u2").astype(np.int64)
    escape = 256**width - 1
    ends = raw != escape
    return torch.from_numpy(np.cumsum(raw + ends)[ends] - 1)

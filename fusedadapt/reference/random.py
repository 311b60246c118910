"""Philox4x32-10 (Salmon et al., SC 2011) in numpy: the random bits of every backend, as a pure function of their counter."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def philox(seed: int, block: np.ndarray, tensor: int, step: int) -> np.ndarray:
    """Philox4x32-10 as csrc/core/philox.h: uint32 [..., 4] for uint64 ``block`` counters."""
    u64, low = np.uint64, np.uint64(0xFFFFFFFF)
    block = np.asarray(block, dtype=u64)
    c0, c1 = block & low, block >> u64(32)
    c2, c3 = np.full_like(block, tensor & 0xFFFFFFFF), np.full_like(block, step & 0xFFFFFFFF)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = u64(0xD2511F53) * c0, u64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> u64(32)) ^ c1 ^ u64(k0), b & low, (a >> u64(32)) ^ c3 ^ u64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1).astype(np.uint32)


def random16(seed: int, element: np.ndarray, tensor: int, step: int) -> Tensor:
    """16 random bits (int32) for each global element index; neighbours in order share a counter in eights, and its rounds."""
    element = np.asarray(element, dtype=np.uint64)
    flat = element.reshape(-1)
    if flat.size and bool((np.diff(flat) == 1).all()):
        first, last = int(flat[0]), int(flat[-1])
        words = philox(seed, np.arange(first >> 3, (last >> 3) + 1, dtype=np.uint64), tensor, step)
        halves = words.astype("<u4").view("<u2").reshape(-1)[first & 7 :][: flat.size]
        return torch.from_numpy(halves.astype(np.int32).reshape(element.shape))
    words = philox(seed, element >> np.uint64(3), tensor, step)
    lane = (element & np.uint64(7)).astype(np.int64)
    word = np.take_along_axis(words, (lane >> 1)[..., None], -1)[..., 0]
    return torch.from_numpy(((word >> ((lane & 1) * 16).astype(np.uint32)) & 0xFFFF).astype(np.int32))

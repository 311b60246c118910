"""States of 8 bits in pure PyTorch: what the sweeps read and write where ``state_dtype`` is "int8" or "fp8" (csrc/core/lowbit.h is the same text).

``block`` neighbouring elements share a scale; an element is one byte. The last block of an array may be short.

- "signed", "unsigned": the dynamic map of arXiv 2110.02861: x = map[code] extreme, scale fp32 [blocks]. The code is that of the nearest value of
  the map, the extreme the element of the largest magnitude, with its sign ("signed"; + where both signs have it). Decoding and encoding again
  therefore changes no bit; with absmax alone a negative extreme would lose 0.7 % each time, because the map has no -1.
- "expanded": e4m3 of an expanded range (COAT, arXiv 2410.19313): \\|x\\| = absmax (q / 448)^(1/k), scale fp32 [blocks, 2] = (absmax, k). COAT's form,
  with c = sqrt(max min) and (\\|x\\| / c)^k scaled to 448, is this one after c has cancelled. k = log2(448² / 2) / log2(max / min nonzero), rounded
  down to a sixteenth, in [1/16, 8].

A block with no magnitude of 2^-120 or more is a block of zeros (scale 0, k 1); one with an infinity or a NaN has the scale NaN (k 1) and codes of
zero: all of it decodes to NaN. A positive element of an unsigned state never gets the code of zero, so that a root in a denominator is never of 0
where the exact one was not (AdaBelief's state never falls below its eps). Everything is + - x / in fp32: codes and values are equal bit for bit on
every backend. Near the middle between two values of the map either may be taken: within 1e-4 of their distance.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LEAST = 2.0**-120
EXPAND_RANGE = 16.6147098
_DECADES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def _cells(e: int, signed: bool) -> int:
    return 1 << e if signed else 2 << e


def zero_code(kind: str) -> int:
    return 127 if kind == "signed" else 0


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 ascending values, fp32: decade 10^(e-6) [0.1, 1], e = 0..6, in 2^e cells (unsigned: twice as many), a cell's middle each; 0; 1."""
    positive = [d * (0.1 + 0.9 * (j + 0.5) / n) for e, d in enumerate(_DECADES) for n in [_cells(e, signed)] for j in range(n)]
    return torch.tensor([*([-v for v in reversed(positive)] if signed else []), 0.0, *positive, 1.0], dtype=torch.float32, device="cpu")


@functools.cache
def decades(signed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per decade: its end (halfway to the first value of the next), slope, offset and last magnitude; the eighth is 1 itself."""
    cells = [_cells(e, signed) for e in range(7)]
    end = [d * (1.0 + 0.9 / n) for d, n in zip(_DECADES[:6], cells, strict=False)] + [1.0 - 0.225 / cells[6]]
    slope = [n / (0.9 * d) for d, n in zip(_DECADES, cells, strict=True)] + [0.0]
    slope[0] = 1.0 / (0.5 * 0.55 * _DECADES[0]) if signed else 1.0 / (0.55 * _DECADES[0])  # cells that zero or a positive remainder stretches
    top = float(2 * cells[6])
    offset = [0.0 if signed else 2.0, *(n * 8.0 / 9.0 for n in cells[1:]), top]
    last = [*(2.0 * n - 1.0 for n in cells), top]
    return (
        torch.tensor(end, dtype=torch.float32, device="cpu"),
        torch.tensor(slope, dtype=torch.float32, device="cpu"),
        torch.tensor(offset, dtype=torch.float32, device="cpu"),
        torch.tensor(last, dtype=torch.float32, device="cpu"),
    )


def dynamic_code(x: Tensor, signed: bool) -> Tensor:
    """x in [-1, 1] fp32 -> uint8: the nearest value of the map."""
    end, slope, offset, last = (t.to(x.device) for t in decades(signed))
    a = x.abs() if signed else x
    e = (a.unsqueeze(-1) > end).sum(-1)
    y = torch.minimum(a * slope[e] + offset[e], last[e])
    m = torch.where(a > 0, y.int(), 0)
    if not signed:
        return torch.where(a > 0, m - 1, 0).to(torch.uint8)
    return torch.where(x < 0, 127 - m.clamp(max=127), 127 + m).to(torch.uint8)


def log2_series(x: Tensor) -> Tensor:
    """log2 of normal positive fp32 numbers by the atanh series of the mantissa, within 2e-7."""
    u = x.contiguous().view(torch.int32) - 0x3F3504F3
    m = ((u & 0x7FFFFF) + 0x3F3504F3).view(torch.float32)
    t = (m - 1.0) / (m + 1.0)
    s = t * t
    p = s * 0.111111112 + 0.142857149
    p = p * s + 0.2
    p = p * s + 0.333333343
    p = p * s + 1.0
    return (u >> 23).float() + t * 2.88539004 * p


def exp2_series(y: Tensor) -> Tensor:
    """2^y for y in [-120, 0], fp32, within 2e-7 of it."""
    n = (y - 0.5).int()  # cut towards zero
    f = y - n.float()
    p = f * 1.52527336e-5 + 1.54035297e-4
    for c in (1.33335579e-3, 9.61812865e-3, 5.55041097e-2, 0.240226507, 0.693147182, 1.0):
        p = p * f + c
    return (p.view(torch.int32) + (n << 23)).view(torch.float32)


def expansion(ratio: Tensor) -> Tensor:
    """k of blocks whose smallest nonzero magnitude is ``ratio`` times the largest."""
    span = -log2_series(ratio.clamp(min=LEAST))
    k = (torch.full_like(span, EXPAND_RANGE) / span * 16.0).clamp(max=2.0**30).int().float() * 0.0625
    return torch.where(span * 8.0 <= EXPAND_RANGE, 8.0, k.clamp(min=0.0625))


def e4m3_code(q: Tensor) -> Tensor:
    """q in [0, 448] -> the nearest e4m3, ties to even, as int32 without a sign."""
    u = q.contiguous().view(torch.int32)
    normal = ((u + 0x7FFFF + ((u >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (q + 16384.0).view(torch.int32) - 0x46800000  # the add rounds at 2^-9
    return torch.where(q < 0.015625, subnormal, normal.clamp(max=126))


def e4m3_magnitude(code: Tensor) -> Tensor:
    c = code.int() & 127
    return torch.where(c < 8, c.float() * 2.0**-9, ((c << 20) + (120 << 23)).view(torch.float32))


def _expanded_code(v: Tensor, inverse: Tensor, k: Tensor) -> Tensor:
    x = v.abs() * inverse
    c = e4m3_code(448.0 * exp2_series(k * log2_series(torch.where(x > LEAST, x, LEAST))))
    return torch.where(x > 0, c | torch.where(v < 0, 128, 0), 0).to(torch.uint8)


@functools.cache
def levels() -> Tensor:
    """log2(q / 448) of the 128 magnitudes, fp32; 0 for the first, which is 0."""
    c = torch.arange(128, dtype=torch.int32, device="cpu")
    return torch.where(c == 0, 0.0, log2_series(e4m3_magnitude(c.clamp(min=1)) / 448.0))


def _expanded_value(code: Tensor, absmax: Tensor, k: Tensor) -> Tensor:
    c = code.int() & 127
    y = (levels().to(code.device)[c.long()] * (torch.ones_like(k) / k)).clamp(min=-120.0)
    magnitude = torch.where(c == 0, 0.0, exp2_series(y)) * absmax
    return torch.where(code >= 128, -magnitude, magnitude)


def encode(values: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """fp32 [n] in memory order -> uint8 codes [n], fp32 scale [ceil(n / block)], or [.., 2] if ``kind`` is "expanded"."""
    n = values.numel()
    blocks = -(-n // block)
    v = torch.zeros(blocks * block, dtype=torch.float32, device=values.device)
    v[:n] = values
    v = v.view(blocks, block)
    magnitude = v.abs()
    absmax = magnitude.amax(1, keepdim=True)  # keeps a NaN
    extreme = torch.where(v.amax(1, keepdim=True) == absmax, absmax, -absmax) if kind == "signed" else absmax
    scale = torch.where(absmax.isfinite(), torch.where(absmax >= LEAST, extreme, 0.0), torch.nan)
    live = scale.abs() > 0
    inverse = torch.where(live, torch.ones_like(scale) / torch.where(live, scale, 1.0), 0.0)
    if kind != "expanded":
        return dynamic_code(v * inverse, kind == "signed").view(-1)[:n].clone(), scale.view(-1)
    least = torch.where(magnitude > 0, magnitude, torch.inf).amin(1, keepdim=True)
    k = torch.where(live, expansion(torch.where(live, least * inverse, 1.0)), 1.0)
    return _expanded_code(v, inverse, k).view(-1)[:n].clone(), torch.cat([scale, k], 1)


def decode(codes: Tensor, scale: Tensor, kind: str, block: int) -> Tensor:
    """uint8 [n] and its scale -> fp32 [n]."""
    n = codes.numel()
    per_element = scale.repeat_interleave(block, 0)[:n]
    if kind == "expanded":
        return _expanded_value(codes, per_element[:, 0], per_element[:, 1])
    return dynamic_map(kind == "signed").to(codes.device)[codes.long()] * per_element

"""Low-bit formats, defined. Whatever the format (`fusedadapt.quant.formats`):

    w[n, k] = (value[code[n, k]] - zero[g]) * S[g]        fp32, one rounding to the wanted dtype

Quantizing is three steps: `stats` of every group, the format's rule (`fusedadapt.reference.quant_rules`), which turns them into stored scales
and factors, and `encode`. Every backend has `stats`, `encode`, `dequantize`, `linear` and `linear_dx` with these signatures, and writes equal bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..quant.formats import NESTED_BLOCK, QFormat
from ..quant.tables import Table, table


class Parts(NamedTuple):
    """The tensors of a quantized weight: packed codes (bytes), stored scales, and what the format has beside them.

    ``super``: fp32, the tensor's own scale (scalar, NVFP4), its rows' (fp4_e2m1) or the scales of the scales (nested). ``offset``: fp32 scalar, the
    mean of the scales.
    """

    qdata: Tensor
    scale: Tensor
    zero: Tensor | None = None
    super: Tensor | None = None
    offset: Tensor | None = None


def stats(w: Tensor, fmt: QFormat) -> tuple[Tensor, Tensor]:
    """(least, largest) element of every group, fp32 of shape `fmt.grid`; NaN where a group has one. w: N x K."""
    found = groups(w, fmt)
    return found.amin(-1), found.amax(-1)


def groups(w: Tensor, fmt: QFormat, fill: float | None = None) -> Tensor:
    """w's elements by group: `fmt.grid` x elements of a group, fp32, perhaps w itself. A short group is filled up with its last element, or with
    ``fill``."""
    n, k = w.shape
    w = w.float()
    if fmt.flat:
        flat, size = w.reshape(-1), fmt.block[1]
        if flat.numel() % size == 0:
            return flat.view(-1, size)
        at = torch.arange(fmt.grid(n, k)[0] * size, device=w.device)
        found = flat[at.clamp(max=flat.numel() - 1)]
        return (found if fill is None else found.masked_fill(at >= flat.numel(), fill)).view(-1, size)
    rows, columns = fmt.sides(n, k)
    high, wide = fmt.grid(n, k)
    if n % rows == 0 and k % columns == 0:
        return w.reshape(high, rows, wide, columns).transpose(1, 2).reshape(high, wide, rows * columns)
    i = torch.arange(high * rows, device=w.device)
    j = torch.arange(wide * columns, device=w.device)
    found = w[i.clamp(max=n - 1)][:, j.clamp(max=k - 1)]
    if fill is not None:
        found = found.masked_fill((i >= n)[:, None] | (j >= k), fill)
    return found.view(high, rows, wide, columns).transpose(1, 2).reshape(high, wide, rows * columns)


def spread(t: Tensor, fmt: QFormat, n: int, k: int, row0: int = 0, row1: int | None = None) -> Tensor:
    """A number per group as a number per element of rows row0..row1."""
    row1 = n if row1 is None else row1
    if fmt.flat:
        at = torch.arange(row0 * k, row1 * k, device=t.device) // fmt.block[1]
        return t.reshape(-1)[at].view(row1 - row0, k)
    rows, columns = fmt.sides(n, k)
    t = t.view(fmt.grid(n, k))
    return t[torch.arange(row0, row1, device=t.device) // rows][:, torch.arange(k, device=t.device) // columns]


def encode(w: Tensor, factor: Tensor, zero: Tensor | None, fmt: QFormat) -> Tensor:
    """Packed codes, uint8 of shape `fmt.packed`. w: N x K; factor, zero: fp32 of shape `fmt.grid`.

    v = w * factor, or w / factor with ``fmt.divide``, is 0 where the factor is 0 or not finite, or v is NaN.
    """
    n, k = w.shape
    f = spread(factor, fmt, n, k)
    v = w.float() / f if fmt.divide else w.float() * f
    v = torch.where((f == 0) | ~f.isfinite() | v.isnan(), torch.zeros((), device=w.device, dtype=torch.float32), v)
    if fmt.table:
        codes = _lookup(v, table(fmt.table))
    elif zero is None:
        codes = _integers(v.round() + fmt.bias, fmt)
    else:
        z = spread(zero, fmt, n, k)
        codes = _integers((v + z).round() if fmt.zero == "fp32" else v.round() + z, fmt)
    return pack(codes, fmt)


def _integers(q: Tensor, fmt: QFormat) -> Tensor:
    return q.clamp(fmt.low, fmt.high).to(torch.int16).to(torch.uint8)


def _lookup(v: Tensor, t: Table) -> Tensor:
    cuts = torch.tensor(t.cuts, dtype=torch.float32, device=v.device)
    codes = torch.tensor(t.codes, dtype=torch.uint8, device=v.device)
    found = codes[torch.bucketize(v.abs() if t.magnitude else v, cuts)]  # bucketize counts cuts < v
    if not t.magnitude:
        return found
    negative = torch.signbit(v) if t.sign_bit else v < 0
    return found + negative.to(torch.uint8) * (len(t.values) // 2)


def zero_code(fmt: QFormat) -> int:
    """The code of 0.0, with which a packed byte of a flat format is filled up."""
    return fmt.values.index(0.0)


def pack(codes: Tensor, fmt: QFormat) -> Tensor:
    """Codes (uint8, N x K) -> bytes of shape `fmt.packed`."""
    n, k = codes.shape
    if fmt.bits == 8:
        return codes.contiguous()
    if fmt.flat:  # two codes a byte, the first one high
        flat = codes.reshape(-1)
        if flat.numel() % 2:
            flat = torch.cat([flat, flat.new_full((1,), zero_code(fmt))])
        return ((flat[0::2] << 4) | flat[1::2]).view(-1, 1)
    shifts = torch.arange(fmt.bits, device=codes.device, dtype=torch.uint8)
    bits = ((codes[..., None] >> shifts) & 1).view(n, k * fmt.bits)
    bits = torch.nn.functional.pad(bits, (0, fmt.row_bytes(k) * 8 - k * fmt.bits)).view(n, -1, 8)
    return (bits << torch.arange(8, device=codes.device, dtype=torch.uint8)).sum(-1, dtype=torch.int32).to(torch.uint8)


def unpack(qdata: Tensor, fmt: QFormat, n: int, k: int) -> Tensor:
    """Bytes -> codes, uint8 of n x k. The inverse of `pack`."""
    if fmt.bits == 8:
        return qdata.view(torch.uint8).view(n, k)
    if fmt.flat:
        flat = qdata.reshape(-1)
        return torch.stack([flat >> 4, flat & 15], 1).reshape(-1)[: n * k].view(n, k)
    bits = (qdata[..., None] >> torch.arange(8, device=qdata.device, dtype=torch.uint8)) & 1
    bits = bits.view(n, -1)[:, : k * fmt.bits].reshape(n, k, fmt.bits)
    return (bits << torch.arange(fmt.bits, device=qdata.device, dtype=torch.uint8)).sum(-1, dtype=torch.int32).to(torch.uint8)


def scales(parts: Parts, fmt: QFormat) -> Tensor:
    """S, fp32: what every group's values are multiplied by."""
    if fmt.scale in ("e8m0", "e8m0_row"):
        b = parts.scale.to(torch.int32)
        power = torch.where(b == 0, 1 << 22, b << 23).view(torch.float32)
        power = torch.where(b == 255, torch.nan, power)
        if parts.super is None:
            return power
        return power * parts.super.repeat_interleave(power.numel() // max(1, parts.super.numel())).view(power.shape)
    if fmt.scale == "e4m3":
        assert parts.super is not None
        return parts.scale.view(torch.float8_e4m3fn).float() * parts.super
    if fmt.scale == "nested":
        assert parts.super is not None and parts.offset is not None
        values = torch.tensor(table("dynamic").values, device=parts.scale.device, dtype=torch.float32)
        codes = parts.scale.reshape(-1)
        above = parts.super.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
        return (values[codes.long()] * above + parts.offset).view(parts.scale.shape)
    return parts.scale.float()


def dequantize(parts: Parts, fmt: QFormat, n: int, k: int, row0: int, row1: int, dtype: torch.dtype) -> Tensor:
    """Rows row0..row1 of the n x k weight: (value - zero) * S in fp32, rounded once to ``dtype``."""
    codes = unpack(parts.qdata, fmt, n, k)[row0:row1]
    value = torch.tensor(fmt.values, device=codes.device, dtype=torch.float32)[codes.long()]
    if parts.zero is not None:
        value = value - spread(parts.zero.float(), fmt, n, k, row0, row1)
    return (value * spread(scales(parts, fmt), fmt, n, k, row0, row1)).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear(x: Tensor, parts: Parts, fmt: QFormat, n: int, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias, summed in fp32 (fp64 for fp64 x), rounded once. x: T x K."""
    wide = _wide(x.dtype)
    w = dequantize(parts, fmt, n, x.shape[1], 0, n, torch.float32).to(wide)
    y = x.to(wide) @ w.t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def linear_dx(dy: Tensor, parts: Parts, fmt: QFormat, n: int, k: int) -> Tensor:
    """dx = dy W. dy: T x N."""
    wide = _wide(dy.dtype)
    return (dy.to(wide) @ dequantize(parts, fmt, n, k, 0, n, torch.float32).to(wide)).to(dy.dtype)

"""How scales are found: one function a rule, on the grid of groups, in torch on any device. The big tensor is read by `stats` and `encode` only.

A group whose largest magnitude is below 2^-120 is a group of zeros (1 / absmax could overflow): scale 0, codes of zero. A group with a NaN or an
infinity gets the scale NaN (MX: 255), so that nothing that comes back is silently finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..quant.formats import MOST_STEPS, NESTED_BLOCK, QFormat
from ..quant.tables import table
from .division import over
from .quant import groups

_TINY = 2.0**-120
_BNB_FLOOR = 1e-38
_MEAN_FLOOR = 1e-5
_E4M3_FLOOR, _E4M3_MAX, _E2M1_MAX = 2.0**-6, 448.0, 6.0


class Found(NamedTuple):
    """What a rule finds: stored scale, the factor that `encode` takes, and what else the format stores."""

    scale: Tensor
    factor: Tensor
    zero: Tensor | None = None
    super: Tensor | None = None
    offset: Tensor | None = None


Rule = Callable[[Tensor, Tensor, Tensor, QFormat], Found]


def _absmax(lo: Tensor, hi: Tensor, *, keep_tiny: bool = False) -> Tensor:
    """Largest magnitude; 0 for groups of zeros, NaN where the group has anything not finite."""
    amax = torch.maximum(-lo, hi).abs()  # of -0.0 and 0.0 either may be the least: scales of zeros are +0.0
    amax = torch.where(amax.isfinite(), amax, torch.nan)
    return amax if keep_tiny else torch.where(amax < _TINY, 0.0, amax)


def _stored(scale: Tensor, fmt: QFormat) -> Tensor:
    """The scale in its storage dtype; NaN where that dtype has no room for it (too large)."""
    kept = scale.to(fmt.scale_dtype)
    return torch.where(kept.isinf(), torch.nan, kept)


def absmax(w: Tensor, lo: Tensor, hi: Tensor, fmt: QFormat) -> Found:
    """S = absmax, v = w * (1 / S): bitsandbytes' blockwise formats; 8-bit scales of scales if ``fmt.scale`` is nested.

    bitsandbytes' CPU code (``fmt.compat``) floors absmax at 1e-38, and the short block at the end it divides: there the factor is the divisor.
    """
    s = _absmax(lo, hi, keep_tiny=bool(fmt.compat))
    short = bool(fmt.compat) and w.numel() % fmt.block[1] != 0
    if short:
        s[-1].clamp_(min=_BNB_FLOOR)
    kept = s if fmt.scale == "nested" else _stored(s, fmt)
    divisor = kept.float().clamp(min=_BNB_FLOOR) if fmt.compat else kept.float()
    factor = 1.0 / divisor
    if short:
        factor[-1] = divisor[-1]
    if fmt.scale != "nested":
        return Found(kept, factor)
    offset = s.double().mean().float()
    rest = s - offset
    blocks = torch.nn.functional.pad(rest, (0, -rest.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    above = blocks.abs().amax(-1)
    t = table("dynamic")
    v = (blocks * torch.where(above < _TINY, 0.0, 1.0 / above)[:, None]).view(-1)[: rest.numel()]
    codes = torch.bucketize(v, torch.tensor(t.cuts, device=v.device, dtype=torch.float32)).to(torch.uint8)
    return Found(codes, factor, super=above, offset=offset)


def absmax_int(w: Tensor, lo: Tensor, hi: Tensor, fmt: QFormat) -> Found:
    """S = absmax / 127, v = w * (127 / absmax), where 127 / t is (1 / t) * 127 as torch evaluates it."""
    s = _absmax(lo, hi)
    return Found(_stored(over(s, fmt.high), fmt), (1.0 / s) * fmt.high)


def absmax_float(w: Tensor, lo: Tensor, hi: Tensor, fmt: QFormat) -> Found:
    """S = absmax / largest code, v = w * (1 / S): fp8."""
    s = _stored(over(_absmax(lo, hi), table(fmt.table).values[table(fmt.table).codes[-1]]), fmt)
    return Found(s, 1.0 / s.float())


def affine(w: Tensor, lo: Tensor, hi: Tensor, fmt: QFormat) -> Found:
    """S = (max(hi, 0) - min(lo, 0)) / (2^bits - 1), zero = rne(-lo / S), v = w / S: asymmetric integers as GPTQ and AWQ store them."""
    finite = lo.isfinite() & hi.isfinite()
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    span = torch.where(finite, hi - lo, torch.nan)
    s = _stored(over(torch.where(span < _TINY, 0.0, span), fmt.high), fmt)
    z = (-lo / s.float()).round().clamp(fmt.low, fmt.high).nan_to_num(0.0)
    return Found(s, s.float(), zero=z.to(torch.uint8))


def affine_sym(w: Tensor, lo: Tensor, hi: Tensor, fmt: QFormat) -> Found:
    """S = 2 absmax / (2^bits - 1), v = w / S, the zero point fixed at 2^(bits - 1): GPTQ's and Marlin's symmetric integers."""
    s = _stored(over(_absmax(lo, hi) * 2, fmt.high), fmt)
    return Found(s, s.float())


def absmean(w: Tensor, lo: Tensor, hi: Tensor, fmt: QFormat) -> Found:
    """S = mean |w|, at least 1e-5: BitNet b1.58 (Ma et al., arXiv:2402.17764). The mean is summed in fp64."""
    x = groups(w, fmt)
    mean = torch.linalg.vector_norm(x, 1, dim=-1, dtype=torch.float64) / x.shape[-1]
    s = _stored(torch.where(mean.isfinite(), mean, torch.nan).float().clamp(min=_MEAN_FLOOR), fmt)
    return Found(s, s.float())


def mx(w: Tensor, lo: Tensor, hi: Tensor, fmt: QFormat) -> Found:
    """S = 2^E, E from absmax by ``fmt.scale_rule``: OCP "Microscaling Formats (MX)" v1.0 ("floor") and its variants."""
    amax = torch.maximum(-lo, hi)
    t = table(fmt.table)
    largest = t.values[t.codes[-1]]
    exponent = int(torch.tensor(largest, dtype=torch.float32, device="cpu").log2().floor())
    bits = amax.view(torch.int32) & 0x7FFFFFFF
    if fmt.scale_rule == "rceil":
        bits = over(amax, largest).view(torch.int32)
        subnormal = bits < (1 << 23)
        byte = torch.where(subnormal, (bits > (1 << 22)).int(), (bits >> 23) + ((bits & 0x7FFFFF) > 0).int())
    elif fmt.scale_rule == "even":
        mantissa = {"e2m1": 1, "e4m3": 3, "e5m2": 2}[fmt.table]
        byte = ((bits + (1 << (22 - mantissa))) >> 23) - exponent
    else:
        up = ((bits & 0x7FFFFF) > 0).int() if fmt.scale_rule == "ceil" else 0
        byte = (bits >> 23) + up - exponent
    byte = byte.clamp(0, 254)
    inverse = torch.where(byte == 254, 1 << 22, (254 - byte) << 23).to(torch.int32).view(torch.float32)
    finite = amax.isfinite()
    return Found(torch.where(finite, byte, 255).to(torch.uint8), torch.where(finite, inverse, torch.nan))


def nvfp4(w: Tensor, lo: Tensor, hi: Tensor, fmt: QFormat) -> Found:
    """S = e4m3(absmax / 6 / g) * g with g = tensor absmax / (448 * 6), v = w * ((1 / g) / s8): NVFP4, two levels."""
    amax = _absmax(lo, hi, keep_tiny=True)
    g = over(amax.nan_to_num(0.0).amax(), _E4M3_MAX * _E2M1_MAX)
    g = torch.where(g < _TINY, 1.0, g)
    s8 = (over(amax, _E2M1_MAX) / g).clamp(_E4M3_FLOOR, _E4M3_MAX).to(torch.float8_e4m3fn)
    return Found(s8.view(torch.uint8), (1.0 / g) / s8.float(), super=g)


def row_steps(w: Tensor, lo: Tensor, hi: Tensor, fmt: QFormat) -> Found:
    """S = R 2^-d, d at most `MOST_STEPS`, R the largest absmax / 6 of the row: ZeroQuant-FP (Wu et al., arXiv:2307.09782), of whose codes E4M3
    numbers are made by adding to exponents.

    "m2", as published: d = ceil(log2(R / (absmax / 6))), so absmax / S is in [6, 12) and saturates. "floor": absmax / S is in [4, 8), as OCP's rule
    for MX has it: 1.9 (kurtotic weights) to 2.4 dB (normal ones) better in groups of 128. Anything not finite makes R, and so the row, NaN.
    """
    amax = _absmax(lo, hi)
    s = over(amax, _E2M1_MAX)
    row = s.amax(1)
    published = fmt.scale_rule == "m2"
    large, small = (t.nan_to_num(0.0).view(torch.int32) for t in (row[:, None], s if published else amax / 8))
    above = (large & 0x7FFFFF) - (small & 0x7FFFFF)  # of the mantissas
    d = (large >> 23) - (small >> 23) + ((above > 0).int() if published else -(above <= 0).int())
    byte = 127 - torch.where(s > 0, d.clamp(0, MOST_STEPS), 0)
    scale = (byte << 23).view(torch.float32) * row[:, None]
    return Found(byte.to(torch.uint8), torch.where(s > 0, 1.0 / scale, 0.0), super=row)


def _cuts(x: Tensor) -> list[slice]:
    """Rows of ``x`` that are worked on at a time: what a step makes of them stays in the caches, on a GPU in a gigabyte."""
    rows = max(1, (1 << 24 if x.is_cuda else 1 << 17) // max(1, x.shape[-1]))
    return [slice(i, i + rows) for i in range(0, x.shape[0], rows)]


def _hqq_step(x: Tensor, inv: Tensor, z: Tensor, beta: float, fmt: QFormat) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the errors' magnitudes, their number, the next zeros) of some groups. x: groups x elements, NaN where there is none."""
    q = (x * inv + z).round_().clamp_(fmt.low, fmt.high)
    rest = x - (q - z) / inv
    wide = rest.abs().double()
    sums, counts = wide.nansum(), wide.isfinite().sum()
    power = wide.pow_(-0.3).float()  # in fp32 every device has another last bit, and with it another zero
    e = rest.sign() * (rest.abs() - over(power, beta)).clamp_(min=0)
    return sums, counts, (q - (x - e) * inv).double().nanmean(-1).float()


def hqq(w: Tensor, lo: Tensor, hi: Tensor, fmt: QFormat) -> Found:
    """S = (hi - lo) / (2^bits - 1) and a float zero, refined by half-quadratic splitting: HQQ (Badri and Shaji, 2023), 20 steps at most."""
    span = hi - lo
    inv = torch.where(span.abs() <= 1e-4, 1.0, fmt.high / span).clamp(max=2e4)
    inv = torch.where(lo.isfinite() & hi.isfinite(), inv, torch.nan)
    s = _stored(1.0 / inv, fmt)
    if fmt.scale != "fp32":  # codes and zeros for the scale that they will be multiplied by
        inv = 1.0 / s.float()
    x, inverse = groups(w, fmt, torch.nan).flatten(0, -2), inv.flatten()
    z, beta, best = 0.0 - lo.flatten() * inverse, 10.0, torch.inf
    kept, parts = z, _cuts(x)
    for _ in range(20):
        steps = [_hqq_step(x[part], inverse[part, None], z[part, None], beta, fmt) for part in parts]
        error = float(sum(error for error, _, _ in steps) / sum(count for _, count, _ in steps))
        if not error < best:
            break
        best, kept = error, z
        z = torch.cat([fresh for _, _, fresh in steps])
        beta *= 1.01
    return Found(s, inv, zero=kept.view(lo.shape))


#: rule name of a `QFormat` -> the function
RULES: dict[str, Rule] = {rule.__name__: rule for rule in (absmax, absmax_int, absmax_float, affine, affine_sym, absmean, mx, nvfp4, row_steps, hqq)}

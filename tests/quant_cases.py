"""Weights on which low-bit formats go wrong, and a plain second look at bytes: used by the quant tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fusedadapt as fa
from fusedadapt.quant import QFormat, format_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: one spec for every format and every option that changes bytes
SPECS: dict[str, QFormat] = {
    name: format_of(base, size, **options)
    for name, base, size, options in (
        ("int8", "int8", None, {}),
        ("int8 groups", "int8", 32, {"scale_dtype": torch.float16}),
        ("int8 asym", "int8", 64, {"symmetric": False}),
        ("int8 tensor", "int8", None, {"group_axis": "tensor"}),
        ("int8 block", "int8", None, {"group_axis": "block"}),
        ("int2", "int2", 64, {}),
        ("int3", "int3", None, {}),
        ("int4", "int4", None, {}),
        ("int4 sym", "int4", 32, {"symmetric": True, "scale_dtype": torch.float16}),
        ("int4 row", "int4", -1, {"scale_dtype": torch.bfloat16}),
        ("int4 per input", "int4", 32, {"group_axis": "n"}),
        ("hqq4", "hqq4", None, {}),
        ("nf4", "nf4", None, {}),
        ("nf4 nested", "nf4", None, {"double_quant": True}),
        ("nf4 bnb_cpu", "nf4", 128, {"compat": "bnb_cpu"}),
        ("fp4", "fp4", None, {}),
        ("fp4 bnb_cpu", "fp4", None, {"compat": "bnb_cpu"}),
        ("dynamic8", "dynamic8", None, {}),
        ("dynamic8_unsigned", "dynamic8_unsigned", None, {}),
        ("fp8_e4m3", "fp8_e4m3", None, {}),
        ("fp8_e4m3 block", "fp8_e4m3", None, {"group_axis": "block"}),
        ("fp8_e5m2", "fp8_e5m2", None, {"group_axis": "tensor"}),
        ("mxfp8_e4m3", "mxfp8_e4m3", None, {}),
        ("mxfp8_e5m2", "mxfp8_e5m2", None, {"scale_rule": "ceil"}),
        ("mxfp4", "mxfp4", None, {}),
        ("mxfp4 even", "mxfp4", None, {"scale_rule": "even"}),
        ("mxfp4 rceil", "mxfp4", None, {"scale_rule": "rceil"}),
        ("nvfp4", "nvfp4", None, {}),
        ("fp4_e2m1", "fp4_e2m1", None, {}),
        ("fp4_e2m1 m2", "fp4_e2m1", 32, {"scale_rule": "m2"}),
        ("ternary", "ternary", None, {}),
    )
}
#: shapes around a group's size, tails, odd sizes, single rows and columns
SHAPES = ((1, 1), (1, 2), (3, 5), (1, 63), (2, 64), (7, 65), (65, 63), (5, 129), (33, 31), (130, 17), (129, 130), (4, 257))


def _mixed(w: Tensor) -> Tensor:
    """Whole runs of zeros beside others, so that some groups are zero and some are not."""
    flat = w.reshape(-1)
    flat[torch.arange(flat.numel()) // 48 % 3 == 1] = 0.0
    return w


def _outlier(w: Tensor) -> Tensor:
    w.view(-1)[:: max(1, w.numel() // 3)] = 1e4
    return w


_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda w: w,
    "small": lambda w: w * 0.02,
    "outlier": _outlier,
    "alternating": lambda w: w.abs().amax() * (1.0 - 2.0 * (torch.arange(w.numel()) % 2)).view(w.shape),
    "constant": lambda w: torch.full_like(w, 0.1),
    "negative constant": lambda w: torch.full_like(w, -3.0),
    "positive": lambda w: w.abs() + 0.5,
    "negative": lambda w: -w.abs() - 0.5,
    "some zero groups": _mixed,
    "zeros": torch.zeros_like,
    "negative zeros": lambda w: -torch.zeros_like(w),
    "sparse": lambda w: w * (torch.arange(w.numel()) % 13 == 3).view(w.shape),
    "powers": lambda w: torch.sign(w) * 2.0 ** (w * 4).round().clamp(max=15),
    "wide": lambda w: w * 10.0 ** (torch.arange(w.numel()) % 9 - 6).view(w.shape).float(),
    "integers": lambda w: (w * 40).round(),
}
KINDS = tuple(_KINDS)


def weight(kind: str, n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """One weight of a kind in KINDS: a pure function of its arguments."""
    draw = torch.Generator().manual_seed(seed * 1009 + n * 131 + k)
    return _KINDS[kind](torch.randn(n, k, generator=draw)).to(dtype)


def weights(
    count: int,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    multiple: int = 1,
    kinds: tuple[str, ...] = KINDS,
) -> Iterator[tuple[str, Tensor]]:
    """(description, weight) ``count`` times, through kinds, shapes and dtypes; columns are rounded up to a ``multiple``."""
    for i, (shape, kind, dtype) in zip(range(count), itertools.cycle(itertools.product(SHAPES, kinds, dtypes)), strict=False):
        n, k = shape[0], -(-shape[1] // multiple) * multiple
        yield f"{kind} {n}x{k} {dtype} #{i}", weight(kind, n, k, dtype, i)


def ties(fmt: QFormat, columns: int | None = None) -> Tensor:
    """Every tie between neighbouring values and the fp32 numbers beside it, in groups whose largest element makes the scale a power of two.

    Four times over: times 1, 2, 1/2 and 2^-20. ``columns``: elements of a group.
    """
    finite = sorted({v for v in fmt.values if math.isfinite(v)})
    top = max(abs(v) for v in finite)
    v = torch.tensor(finite)
    middle = (v[:-1] + v[1:]) / 2
    points = torch.stack([middle, *(torch.nextafter(middle, torch.tensor(side)) for side in (torch.inf, -torch.inf))], 1).reshape(-1)
    size = columns or (fmt.block[1] if fmt.block[1] > 1 else points.numel() + 1)
    room = size - 1
    padded = torch.nn.functional.pad(points, (0, -points.numel() % room)).view(-1, room)
    rows = torch.nn.functional.pad(padded, (1, 0), value=top)
    return torch.cat([rows, 2 * rows, rows / 2, rows * 2.0**-20])


def value_bits(t: Tensor) -> Tensor:
    """The bits of a tensor, every NaN alike and the zeros kept apart."""
    t = torch.where(t.isnan(), torch.full_like(t, torch.nan), t)
    return t.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[t.element_size()])


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal to the bit, NaN equal to NaN; None equals None."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.is_floating_point and a.element_size() == 1:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(value_bits(a), value_bits(b)) if a.dtype.is_floating_point else torch.equal(a, b)


def equal(a: fa.QuantizedTensor, b: fa.QuantizedTensor) -> bool:
    """Same format, shape, dtype and bytes."""
    parts = all(same(p, q) for p, q in zip(a.parts, b.parts, strict=True))
    return parts and (a.format, a.shape, a.dtype) == (b.format, b.shape, b.dtype) and a.qdata.dtype == b.qdata.dtype


def sqnr(w: Tensor, back: Tensor) -> float:
    """Signal to quantization noise, dB."""
    w, back = w.double(), back.double()
    return float(10 * torch.log10(w.square().sum() / (w - back).square().sum()))


#: the module whose tensors foreign layers are
NAME = "model.layers.0.up"


def signed32(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def packed(rows: list[list[int]], bits: int) -> Tensor:
    """Rows of codes as rows of int32 words, lowest bits first: one big integer a row."""
    words = []
    for row in rows:
        number = sum(code << bits * i for i, code in enumerate(row))
        words.append([signed32(number >> 32 * w & 0xFFFFFFFF) for w in range(-(-len(row) * bits // 32))])
    return torch.tensor(words, dtype=torch.int32)


def drawn(n: int, k: int, groups: int, bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes [K, N], zeros and scales [groups, N]."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (k, n), generator=draw)
    zeros = torch.randint(1, 1 << bits, (groups, n), generator=draw)
    return codes, zeros, (torch.rand(groups, n, generator=draw) + 0.1).half()


def gptq(codes: Tensor, zeros: Tensor, scales: Tensor, index: Tensor, bits: int, version: int) -> dict[str, Tensor]:
    """A GPTQ layer as its papers' loops would write it, names and all."""
    stored = (zeros - int(version == 1)) % (1 << bits)
    parts = {"qweight": packed(codes.t().tolist(), bits).t().contiguous(), "qzeros": packed(stored.tolist(), bits), "scales": scales, "g_idx": index}
    return {f"{NAME}.{part}": t for part, t in parts.items()}


def grouped(k: int, size: int) -> Tensor:
    return torch.arange(k, dtype=torch.int32) // size


def truth(codes: Tensor, zeros: Tensor, scales: Tensor, index: Tensor) -> Tensor:
    """W [N, K] in fp32."""
    return ((codes - zeros[index.long()]).float() * scales[index.long()].float()).t()

"""Code tables: what every code of a format is worth, and which code a number gets.

Encoding is one rule for all tables: count the cuts strictly below v (below |v| with ``magnitude``), look the code up. Which way a tie goes is part of
the cuts: a tie that goes up has its cut one fp32 step lower. No table is written twice: kernels are handed these numbers.

Built on first use without tensors: that may be while torch traces, where a tensor has no numbers to read.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """2^bits values in code order, ascending cuts, and the code for every count of cuts passed.

    ``magnitude``: the cuts are those of |v|; a negative v gets the code plus half the table. ``sign_bit``: -0.0 counts as negative.
    """

    values: tuple[float, ...]
    cuts: tuple[float, ...]
    codes: tuple[int, ...]
    magnitude: bool = False
    sign_bit: bool = False

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()


def _fp32(v: float) -> float:
    """The nearest fp32 number."""
    return float(struct.unpack("<f", struct.pack("<f", v))[0])


def _down(v: float) -> float:
    """The fp32 number below one that is not 0."""
    (bits,) = struct.unpack("<i", struct.pack("<f", v))
    return float(struct.unpack("<f", struct.pack("<i", bits - (1 if v > 0 else -1)))[0])


def _between(points: Sequence[float], codes: Sequence[int], ties: str) -> tuple[float, ...]:
    """Cuts halfway between ascending points, in fp32. Ties go to the lower point ("low") or to the even code ("even")."""
    middle = [_fp32(a + b) * 0.5 for a, b in zip(points, points[1:])]
    return tuple(_down(v) if ties == "even" and code % 2 == 1 else v for v, code in zip(middle, codes))


def minifloat(exponent: int, mantissa: int, bias: int, largest: float, ieee: bool = False) -> Table:
    """A small float, sign bit first: codes in magnitude order, nearest even, saturating at ``largest``. Codes beyond it decode to NaN, the first
    of them to infinity with ``ieee``; none is ever written.

    Open Compute Project, "Microscaling Formats (MX)" v1.0 (E2M1, E4M3, E5M2); Micikevicius et al., arXiv:2209.05433 (E4M3, E5M2).
    """
    half = 1 << (exponent + mantissa)
    values = []
    for code in range(half):
        e, m = code >> mantissa, code & ((1 << mantissa) - 1)
        v = m * 2.0 ** (1 - bias - mantissa) if e == 0 else ((1 << mantissa) + m) * 2.0 ** (e - bias - mantissa)
        values.append(v if v <= largest else math.inf if ieee and m == 0 else math.nan)
    finite = [v for v in values if v <= largest]
    codes = tuple(range(len(finite)))
    return Table(tuple(values + [-v for v in values]), _between(finite, codes, "even"), codes, magnitude=True, sign_bit=True)


_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_NF4_CUTS = (
    -0.8480964004993439,
    -0.6106329262256622,
    -0.4599952697753906,
    -0.33967943489551544,
    -0.23460740596055984,
    -0.13791173323988914,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552504837513,
    0.2035212516784668,
    0.2920137718319893,
    0.3893125355243683,
    0.5016634166240692,
    0.6427869200706482,
    0.8614784181118011,
)
# bitsandbytes' own order of magnitudes, in twelfths; not OCP's E2M1
_FP4 = tuple(v / 12 for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
_FP4_CUTS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(map(_fp32, values))


def nf4() -> Table:
    """NF4 of QLoRA (Dettmers et al., arXiv:2305.14314): values and cuts as the CUDA code of bitsandbytes has them."""
    return Table(_rounded(_NF4), _rounded(_NF4_CUTS), tuple(range(16)))


def fp4() -> Table:
    """The FP4 of bitsandbytes' CUDA code."""
    magnitudes = _rounded(_FP4)
    codes = tuple(sorted(range(8), key=lambda code: magnitudes[code]))
    return Table(magnitudes + tuple(-v for v in magnitudes), _rounded(_FP4_CUTS), codes, magnitude=True)


def as_on_cpu(table: Table) -> Table:
    """The table as bitsandbytes' CPU code applies it: cuts are fp32 midpoints of the values in order, a tie goes to the lower value."""
    codes = tuple(sorted(range(len(table.values)), key=lambda code: table.values[code]))
    return Table(table.values, _between([table.values[code] for code in codes], codes, "low"), codes)


def dynamic_map(signed: bool = True) -> tuple[float, ...]:
    """The 256 ascending values of bitsandbytes' dynamic 8-bit map (Dettmers et al., arXiv:2110.02861).

    Decade e = 0..6 covers 10^(e-6) times [0.1, 1], cut into 2^e equal cells (2^(e+1) of them unsigned, where no sign is spent); a code is worth its
    cell's middle. 0 and 1 are added. Rounded to fp32 where torch rounds while it builds a linspace, so that the last bits agree.
    """
    found = []
    for e in range(7):
        cells, first = 2**e if signed else 2 ** (e + 1), _fp32(0.1)
        step = _fp32((1.0 - first) / cells)
        edges = [_fp32(first + step * i if i < (cells + 1) // 2 else 1.0 - step * (cells - i)) for i in range(cells + 1)]
        positive = [_fp32(_fp32(10.0 ** (e - 6)) * (_fp32(a + b) / 2.0)) for a, b in zip(edges, edges[1:])]
        found += positive + ([-v for v in positive] if signed else [])
    return tuple(sorted([*found, 0.0, 1.0]))


def dynamic(signed: bool = True) -> Table:
    """`dynamic_map` with nearest codes; a tie goes to the even one, as in bitsandbytes' CUDA search."""
    values = _rounded(dynamic_map(signed))
    codes = tuple(range(len(values)))
    return Table(values, _between(values, codes, "even"), codes)


#: name -> what makes the table; tables are built on first use
TABLES: dict[str, Callable[[], Table]] = {
    "nf4": nf4,
    "nf4_cpu": lambda: as_on_cpu(nf4()),
    "fp4": fp4,
    "fp4_cpu": lambda: as_on_cpu(fp4()),
    "e2m1": lambda: minifloat(2, 1, 1, 6.0),
    "e4m3": lambda: minifloat(4, 3, 7, 448.0),
    "e5m2": lambda: minifloat(5, 2, 15, 57344.0, ieee=True),
    "dynamic": dynamic,
    "dynamic_unsigned": lambda: dynamic(signed=False),
}


@functools.cache
def table(name: str) -> Table:
    """The table of this name, one of `TABLES`."""
    return TABLES[name]()

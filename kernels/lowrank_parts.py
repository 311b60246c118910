"""What the low-rank kernels share: segments, dropout masks, and the kernel that adds partial results in a fixed order.

A launch serves up to four *segments*: pairs (A, B) that read the same x, their A stacked. Their ranks and dropout thresholds are run-time
scalars; compiled in are only the number of segments, the rank rounded up to a power of two, and which numbers are multiples of 8 or 4: such
numbers arrive divided and are multiplied here, which is what tells the compiler that a row starts on a 16-byte boundary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import program, random16, random_block, spread16

MAX_SEGMENTS = 4
FOLD_BLOCK = 256
# These products are held to an error, not to bits: one rounding less and half the instructions. Said at every launch, as the environment may change
# Triton's default.
OPTIONS = {"enable_fp_fusion": True}
# Scalars whose value must never cost a compilation. Strides of the small operands and the pointers' alignment may.
RUN_TIME = (
    "T K N R RV RB x_stride y_stride stride2 stride3 start stream n0 n1 n2 n3 h0 h1 h2 h3 tiles steps count splits elements bias_splits width".split()
)


@triton.jit
def keep_tile(seed, first_row, first, K, stream, threshold, ROWS: tl.constexpr, COLS: tl.constexpr, EIGHTS: tl.constexpr):
    """Keep-mask [ROWS, COLS] of elements (t, k), t from first_row, k from first (a multiple of 8). EIGHTS: K is a multiple of 8."""
    origin = (first_row + tl.arange(0, ROWS)).to(tl.int64) * K + first
    if EIGHTS:
        r0, r1, r2, r3 = random_block(seed, (origin >> 3)[:, None] + tl.arange(0, COLS // 8)[None, :], stream, 0)
        bits = tl.reshape(spread16(r0, r1, r2, r3), [ROWS, COLS])
    else:
        bits = random16(seed, origin[:, None] + tl.arange(0, COLS)[None, :], stream, 0)
    return (bits & 0xFFFF).to(tl.int32) >= threshold


# Which segments of a launch have dropout. Told that all have, the compiler need not keep x in the layout of the other case as well.
NONE, SOME, ALL = (tl.constexpr(case) for case in range(3))


@triton.jit
def drop_tile(x, seed, first_row, first, K, stream, threshold, DROP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EIGHTS: tl.constexpr):
    """x with what the segment drops set to 0; unscaled. Arguments as for `keep_tile`."""
    if DROP == ALL:
        x = tl.where(keep_tile(seed, first_row, first, K, stream, threshold, ROWS, COLS, EIGHTS), x, 0.0)
    elif DROP == SOME:
        if threshold != 0:
            x = tl.where(keep_tile(seed, first_row, first, K, stream, threshold, ROWS, COLS, EIGHTS), x, 0.0)
    return x


def drop_case(thresholds: Sequence[int]) -> int:
    return (ALL if all(thresholds) else SOME if any(thresholds) else NONE).value


@triton.jit
def kept_scale(threshold):
    """1 / (1 - p), exact to the bit for p = threshold / 65536."""
    return tl.div_rn(65536.0, (65536 - threshold).to(tl.float32))


@triton.jit
def fold_block(part, out, elements, splits, block, BLOCK: tl.constexpr):
    i = block * BLOCK + tl.arange(0, BLOCK)
    here = i < elements
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(splits):
        total += tl.load(part + tl.cast(s, tl.int64) * elements + i, here, 0.0)
    tl.store(out + i, total, here)


@triton.jit(do_not_specialize=RUN_TIME)
def fold_kernel(part, out, elements: tl.int64, splits: tl.int32, BLOCK: tl.constexpr):
    """out[i] = sum over s of part[s, i], in the order of s."""
    fold_block(part, out, elements, splits, program(), BLOCK)


def fold(part: torch.Tensor, out: torch.Tensor) -> None:
    """out = part.sum(0), always in the same order. part: contiguous fp32 [s, ...]; out: contiguous fp32 [...]."""
    n = out.numel()
    fold_kernel[(triton.cdiv(n, FOLD_BLOCK),)](part, out, n, part.shape[0], FOLD_BLOCK, **OPTIONS)


def unit(numbers: Sequence[int], size: int) -> int:
    """`size` if it divides all the numbers, else 1."""
    return size if all(n % size == 0 for n in numbers) else 1


def padded(rank: int) -> int:
    """The power of two that holds `rank`, at least the 16 that matrix instructions take."""
    return max(16, triton.next_power_of_2(rank))


class Group(NamedTuple):
    """Neighbouring segments for one launch; more ranks than `width` (then it is one segment) are cut into tiles of `width`."""

    start: int  # rows of A before the first
    stream: int  # number of the first
    ranks: tuple[int, ...]
    thresholds: tuple[int, ...]
    width: int

    @property
    def tiles(self) -> int:
        return triton.cdiv(max(self.ranks), self.width)

    def scalars(self, rank_unit: int) -> tuple[int, ...]:
        """start, stream, n0 .. n3, h0 .. h3: starts and ranks in units."""
        more = (0,) * (MAX_SEGMENTS - len(self.ranks))
        return (self.start // rank_unit, self.stream, *(n // rank_unit for n in self.ranks), *more, *self.thresholds, *more)


def group_segments(ranks: Sequence[int], thresholds: Sequence[int], limit: int, budget: int) -> list[Group]:
    """Cuts the segments into launches: at most four in each, padded ranks of at most `budget` in sum. Without dropout they are one segment."""
    if not any(thresholds):
        ranks, thresholds = [sum(ranks)], [0]
    groups: list[Group] = []
    start = 0
    for stream, (rank, threshold) in enumerate(zip(ranks, thresholds, strict=True)):
        width = min(padded(rank), limit)
        if groups:
            last = groups[-1]
            both = max(width, last.width)
            if len(last.ranks) < MAX_SEGMENTS and both * (len(last.ranks) + 1) <= budget and max(rank, *last.ranks) <= both:
                groups[-1] = Group(last.start, last.stream, (*last.ranks, rank), (*last.thresholds, threshold), both)
                start += rank
                continue
        groups.append(Group(start, stream, (rank,), (threshold,), width))
        start += rank
    return groups

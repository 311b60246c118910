"""Tile sizes of the low-rank kernels, from shapes and element sizes alone: the same call gives the same programs, hence the same bits.

Reasoned for an H100 (132 multiprocessors, 227 KiB of shared memory each) and not yet measured. Two programs per multiprocessor, each with 48 KiB
or more of loads under way, cover the memory's latency; 96 KiB each also fits every GPU since 2020. A tile of 64 rows is what one warp group's
matrix instruction takes; fewer tokens take the smaller instructions.
"""

from typing import NamedTuple

import triton

PROGRAMS = 264  # two for each of 132 multiprocessors; a number, not a question to the device: results must not depend on it
SHARED = 96 * 1024


class Tile(NamedTuple):
    rows: int
    cols: int
    warps: int
    stages: int
    splits: int = 1  # shares of the dimension that is summed over
    steps: int = 1  # tiles in a share


def _rows(t: int) -> int:
    return 16 if t <= 16 else 32 if t <= 32 else 64


def _shares(length: int, programs: int) -> tuple[int, int]:
    """(splits, steps) of `length` tiles: enough programs, but at least four tiles in each."""
    splits = min(max(PROGRAMS // programs, 1), max(length // 4, 1))
    steps = triton.cdiv(length, splits)
    return triton.cdiv(length, steps), steps


def shrink_tile(t: int, k: int, width: int, x_bytes: int, a_bytes: int, rank_tiles: int) -> Tile:
    """x tile rows x cols, A tile width x cols in each stage; an fp32 A is cut into three bf16 terms beside that."""
    rows, terms = _rows(t), 6 if a_bytes == 4 else 0
    row_bytes = rows * x_bytes + width * a_bytes
    for cols, stages in ((128 if rows < 64 else 64, 4), (64, 4), (64, 3), (32, 4), (32, 3)):  # 128 columns of 64 rows take twice the registers
        if cols * (row_bytes * stages + width * terms) <= SHARED:
            break
    splits, steps = _shares(triton.cdiv(k, cols), triton.cdiv(t, rows) * rank_tiles)
    return Tile(rows, cols, 4, stages, splits, steps)


def bwd_x_tile(t: int, k: int, width: int, x_bytes: int, rank_tiles: int) -> Tile:
    """Sums over rows. x tile rows x cols, u tile rows x width in each stage; the product stands upright, cols x width."""
    for rows, cols, stages in ((64, 128, 4), (64, 128, 3), (64, 64, 3), (32, 64, 3), (32, 64, 2)):
        if rows * ((cols * x_bytes + width * 4) * stages + width * 6) <= SHARED:
            break
    rows = min(rows, _rows(t))
    splits, steps = _shares(triton.cdiv(t, rows), triton.cdiv(k, cols) * rank_tiles)
    return Tile(rows, cols, 4, stages, splits, steps)


def bwd_dy_tile(t: int, n: int, width: int, dy_bytes: int, elementwise: bool) -> Tile:
    """Wide, because every block of columns writes a T x R partial sum of dV: 8 R / (cols * dy_bytes) of dy's own bytes, written and read.

    elementwise: dy also passes through registers. Whatever fills those more than a bare product of rank 16 gets fewer rows: tiles of twice the
    size spill (read off the compiler's output for sm_80 and sm_90).
    """
    cols = 128 if dy_bytes == 4 or elementwise or width > 32 else 256
    rows = min(_rows(t), 32 if dy_bytes == 4 or width > 16 else 64)
    splits, steps = _shares(triton.cdiv(t, rows), triton.cdiv(n, cols))
    return Tile(rows, cols, 8, 3, splits, steps)


def expand_tile(t: int, k: int) -> Tile:
    """One output tile per program, no loop but over ranks beyond 64. One warp group: with two, Triton gives the terms of a product different
    layouts and carries the sum from one to the other through shared memory.
    """
    return Tile(_rows(t), 64 if t > 32 else 128, 4, 2)

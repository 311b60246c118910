"""The backend "cpp" of the quant family: the functions of `reference.quant` on CPU tensors, computed by `_core` from addresses.

Inputs are checked by `ops.quant`: fp32, bf16 or fp16, nothing empty. Results repeat bit for bit, for any number of threads.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..quant.formats import NESTED_BLOCK, QFormat
from ..quant.tables import Table, table
from ..reference.quant import Parts, zero_code
from . import dense
from .address import address

_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 6}
_PLAIN, _POWERS, _TABLE = 0, 1, 2
_SCALE_TABLES = {"e4m3": "e4m3", "nested": "dynamic"}
_NO_BLOCKS = 1 << 62
_SCRATCH = 2 << 20
_address = functools.partial(address, "q_*")


def _fp32(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


@functools.cache
def _numbers(fmt: QFormat) -> Tensor:
    """What the codes are worth, where the kernels can read it; kept for as long as the process lives."""
    return _fp32(fmt.values)


@functools.cache
def _scale_numbers(scale: str) -> Tensor:
    """What the bytes of coded scales are worth."""
    return _fp32([2.0 ** (b - 127) for b in range(255)] + [torch.nan] if scale == "e8m0_row" else table(_SCALE_TABLES[scale]).values)


@functools.cache
def _cuts(t: Table) -> tuple[Tensor, Tensor]:
    return _fp32(t.cuts), torch.tensor(t.codes, dtype=torch.uint8, device="cpu")


def _grid(fmt: QFormat, n: int, k: int) -> tuple[int, int, int]:
    """(rows, columns) of a tile, tiles side by side; a flat format is one row."""
    if fmt.flat:
        return 1, fmt.block[1], fmt.grid(n, k)[0]
    return *fmt.sides(n, k), fmt.grid(n, k)[1]


def _scales(parts: Parts, fmt: QFormat, wide: int) -> tuple[int, ...]:
    if parts.super is not None:
        block = {"nested": NESTED_BLOCK, "e4m3": _NO_BLOCKS, "e8m0_row": wide}[fmt.scale]
        return _TABLE, _address(parts.scale), 0, _scale_numbers(fmt.scale).data_ptr(), _address(parts.super), _address(parts.offset), block
    coding = _POWERS if fmt.scale == "e8m0" else _PLAIN
    return coding, _address(parts.scale), _CODES[parts.scale.dtype], 0, 0, 0, 1


def _weight(parts: Parts, fmt: QFormat, n: int, k: int) -> tuple[int, ...]:
    zero = (0, 0) if parts.zero is None else (_address(parts.zero), _CODES[parts.zero.dtype])
    codes = (_address(parts.qdata), n, k, fmt.row_bytes(k), fmt.bits, fmt.flat)
    grid = _grid(fmt, n, k)
    return *codes, *grid, _numbers(fmt).data_ptr(), *zero, *_scales(parts, fmt, grid[2])


def stats(w: Tensor, fmt: QFormat) -> tuple[Tensor, Tensor]:
    """(least, largest) element of every group, fp32 of shape `fmt.grid`; NaN where a group has one. w: N x K, contiguous."""
    n, k = w.shape
    lo, hi = (torch.empty(fmt.grid(n, k), dtype=torch.float32, device="cpu") for _ in range(2))
    rows, columns = (1, n * k) if fmt.flat else (n, k)
    _core.q_stats(_address(w), _CODES[w.dtype], rows, columns, _grid(fmt, n, k), lo.data_ptr(), hi.data_ptr(), torch.get_num_threads())
    return lo, hi


def encode(w: Tensor, factor: Tensor, zero: Tensor | None, fmt: QFormat) -> Tensor:
    """Packed codes, uint8 of shape `fmt.packed`. w: N x K, contiguous; factor, zero: fp32 of shape `fmt.grid`."""
    n, k = w.shape
    factor, zero = factor.contiguous(), None if zero is None else zero.contiguous()
    out = torch.empty(fmt.packed(n, k), dtype=torch.uint8, device="cpu")
    codes = fmt.codes
    cuts, order = (None, None) if codes is None else _cuts(codes)
    flags = fmt.divide, fmt.zero == "fp32", codes is not None and codes.magnitude, codes is not None and codes.sign_bit
    integers, found = (fmt.low, fmt.high, fmt.bias), (0 if cuts is None else cuts.numel(), _address(cuts), _address(order))
    shape, factors = (n, k, fmt.row_bytes(k), fmt.bits, fmt.flat, *_grid(fmt, n, k)), (_address(factor), _address(zero))
    spec = (_address(w), _CODES[w.dtype], *shape, *factors, *flags, *integers, *found, zero_code(fmt) if fmt.flat else 0, out.data_ptr())
    _core.q_encode(spec, torch.get_num_threads())
    return out


def dequantize(parts: Parts, fmt: QFormat, n: int, k: int, row0: int, row1: int, dtype: torch.dtype) -> Tensor:
    """Rows row0..row1 of the n x k weight: (value - zero) * S in fp32, rounded once to ``dtype``."""
    return _dequantized(parts, fmt, n, k, row0, row1, torch.empty(row1 - row0, k, dtype=dtype, device="cpu"))


def _dequantized(parts: Parts, fmt: QFormat, n: int, k: int, row0: int, row1: int, out: Tensor) -> Tensor:
    _core.q_dequantize(_weight(parts, fmt, n, k), row0, row1, _CODES[out.dtype], out.data_ptr(), torch.get_num_threads())
    return out


class _Kept(threading.local):
    """Bytes that a thread keeps for its next product: memory that is allocated for every piece may be given back after each, and its pages then cost
    10 times what is written to them."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []


_kept = _Kept()


def _memory(size: int) -> Tensor:
    """Nobody else's until it is put back: a signal handler or a finalizer may multiply within a product."""
    if size <= _SCRATCH and _kept.free:
        return _kept.free.pop()
    with torch.inference_mode(False):
        return torch.empty(max(size, _SCRATCH), dtype=torch.uint8, device="cpu")


def pieces(parts: Parts, fmt: QFormat, n: int, k: int, rows: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """`dequantize` of so many rows after so many, each in the memory of the one before."""
    memory = _memory(min(rows, n) * k * dtype.itemsize)
    for row in range(0, n, rows):
        end = min(n, row + rows)
        out = memory[: (end - row) * k * dtype.itemsize].view(dtype).view(end - row, k)
        yield _dequantized(parts, fmt, n, k, row, end, out)
    if memory.numel() == _SCRATCH:
        _kept.free[:] = [memory]


def _matrix(x: Tensor) -> tuple[int, int, int, int]:
    return _address(x), _CODES[x.dtype], x.shape[0], x.stride(0)


def linear(x: Tensor, parts: Parts, fmt: QFormat, n: int, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias, summed in fp32, rounded once. x: T x K, unit stride inside a row."""
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    y = torch.empty(x.shape[0], n, dtype=x.dtype, device="cpu")
    _core.q_linear(_matrix(x), _weight(parts, fmt, n, x.shape[1]), _address(bias), y.data_ptr(), torch.get_num_threads())
    return y


def checked(x: Tensor, parts: Parts, fmt: QFormat, n: int, bias: Tensor | None) -> Callable[[Any, Any, Tensor, int], bool]:
    """`linear` of what has been checked, as run(x, bias, y, threads) -> whether all of it looks as it did; if not, nothing is written.

    x: contiguous.
    """
    k = x.shape[-1]
    found: Callable[[Any, Any, Tensor, int], bool] = _core.q_checked(
        _weight(parts, fmt, n, k), tuple(parts), x, _CODES[x.dtype], x.numel() // k, bias, 0 if bias is None else _CODES[bias.dtype]
    )
    return found


def linear_dx(dy: Tensor, parts: Parts, fmt: QFormat, n: int, k: int) -> Tensor:
    """dx = dy W, summed in fp32, rounded once. dy: T x N, unit stride inside a row."""
    dx = torch.empty(dy.shape[0], k, dtype=dy.dtype, device="cpu")
    _core.q_linear_dx(_matrix(dy), _weight(parts, fmt, n, k), dx.data_ptr(), torch.get_num_threads())
    return dx


#: rows of x up to which the own product is the faster one, at 4096 x 4096, and for weights that are slow to read: where the processor multiplies in
#: 16 bits (x W^T; dY W); where its fp32 GEMM stays far below what it can (all but the slow); else, on AVX2: x W^T; dY W of integers and of tables
_FEW_16_BIT, _FEW_DX_16_BIT, _SLOW_16_BIT, _SLOW_ALL = 24, 16, 10, 40
#: the same of x W^T in bf16 where codes are multiplied in pairs
_FEW_PAIRS = 40
_FEW, _SLOW, _FEW_DX_INTEGERS, _FEW_DX_LOOKUPS, _SLOW_DX = 48, 24, 48, 20, 12


def _outruns() -> bool:
    """Whether the own product is faster than the library's fp32 GEMM whatever the number of rows: on AMD's processors torch's GEMM makes 200 GFLOP/s
    of two cores (Zen 5) where the AVX-512 kernels make 270."""
    return bool(_core.q_isa() == "avx512" and _core.is_amd())


@functools.cache
def _exact(fmt: QFormat) -> bool:
    """Whether bf16 holds what the codes are worth."""
    return torch.equal(_numbers(fmt), _numbers(fmt).to(torch.bfloat16).float())


def _pairs(dtype: torch.dtype, fmt: QFormat) -> bool:
    """Whether the kernel multiplies two codes at a time (csrc/cpu/quant_pairs.h)."""
    return bool(dtype == torch.bfloat16 and fmt.bits in (2, 4) and _core.q_isa() == "avx512" and _core.has_bf16()) and _exact(fmt)


def small(t: int, n: int, k: int, dtype: torch.dtype, fmt: QFormat, transposed: bool) -> bool:
    """Whether `linear` (`linear_dx` if ``transposed``) beats a dequantized piece and the library's GEMM."""
    decoded = fmt.block[1] == 1 or (fmt.flat and k % fmt.block[1] != 0 and k % 8 != 0)  # before it is multiplied
    slow = decoded or (transposed and fmt.bits == 8 and bool(fmt.table))
    if dtype != torch.float32 and dense.multiplies(dtype):
        if not transposed and not decoded and t > _FEW_16_BIT:
            return t <= _FEW_PAIRS and _pairs(dtype, fmt)
        return t <= (_SLOW_16_BIT if slow else _FEW_DX_16_BIT if transposed else _FEW_16_BIT)
    if _outruns():
        return not slow or t <= _SLOW_ALL
    if decoded or fmt.table.startswith("dynamic"):
        return t <= (_SLOW_DX if transposed else _SLOW)
    return t <= (_FEW if not transposed else _FEW_DX_LOOKUPS if fmt.table else _FEW_DX_INTEGERS)

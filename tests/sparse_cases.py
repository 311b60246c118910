"""What the tests of the sparse kernels share: elements of every kind at awkward addresses, and every instruction set on one thread and on several."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fusedadapt.reference import sparse_parts as ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("normal", "ties", "equal", "zero", "special")


def everywhere(call: Callable[[], Any], threads: tuple[int, ...] = (1, 2)) -> Iterator[Any]:
    """What `call` gives on every instruction set this processor has, on each number of threads."""
    from fusedadapt import _core

    before, count = _core.isa(), torch.get_num_threads
    try:
        for isa in ("base", "avx2", "avx512"):
            for number in threads if _core.use_isa(isa) else ():
                torch.get_num_threads = lambda number=number: number  # type: ignore[assignment]
                yield call()
    finally:
        torch.get_num_threads = count
        _core.use_isa(before)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kind(name: str, n: int, dtype: torch.dtype, seed: int = 0, aligned: bool = False) -> Tensor:
    """n elements, at an address that is 16-byte aligned or one element past that."""
    g = generator(seed + n)
    x = torch.randn(n, generator=g)
    if name == "ties":
        x = torch.randint(-3, 4, (n,), generator=g).float()
    elif name == "equal":
        x = torch.full((n,), -0.5)
    elif name == "zero":
        x = torch.where(torch.rand(n, generator=g) < 0.5, 0.0, -0.0)
    elif name == "special":
        values = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-42, 1.2e-38, 3e-6, -1.0, 1.0, 65504.0])
        x = values[torch.randint(len(values), (n,), generator=g)]
        x = torch.where(torch.rand(n, generator=g) < 0.1, torch.randn(n, generator=g), x)
    room = torch.zeros(n + 17, dtype=dtype)
    start = -room.data_ptr() % 16 // room.element_size() + (not aligned)
    return room[start : start + n].copy_(x)


def item(name: str, shape: tuple[int, ...], score: str, dtype: torch.dtype, other: torch.dtype = torch.float32, seed: int = 1) -> ref.Item:
    """A tensor and what its score compares it with; aligned where the seed is even."""
    aligned, n = seed % 2 == 0, math.prod(shape)
    x = kind(name, n, dtype, seed, aligned).view(shape)
    if score in ("abs", "given"):
        return x, None
    if score == "abs_scaled":
        return x, kind("normal", shape[-1], torch.float32, seed + 7)
    return x, kind(name, n, other, seed + 7, aligned).view(shape)


def same(a: list[Tensor] | tuple[Tensor, ...], b: list[Tensor] | tuple[Tensor, ...]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b))


def check_moves(backend: Any, dtype: torch.dtype, values_dtype: torch.dtype, sizes: tuple[tuple[int, float], ...]) -> None:
    """gather, scatter and add of one tensor, by positions of 32 and 64 bits, against the reference; what is written counts as written."""
    for n, density in sizes:
        x, index = kind("normal", n, dtype), (torch.rand(n, generator=generator(n)) < density).nonzero().reshape(-1)
        values, got = kind("normal", index.numel(), values_dtype, 5), torch.empty(index.numel(), dtype=dtype)
        backend.move_all("gather", [(x, index.flip(0), got)])
        assert same([got], [x[index.flip(0)]])
        for op in ("scatter", "add"):
            expected = x.clone()
            ref.move_all(op, [(expected, index, values)], 0.3)
            for at in (index, index.int()):
                mine = torch.cat([x[:1], x])[1:]
                version = mine._version
                backend.move_all(op, [(mine, at, values)], 0.3)
                assert same([mine], [expected]) and mine._version > version


def check_swap(backend: Any, dtype: torch.dtype) -> None:
    """A swap exchanges bits, NaN of every payload among them, and undoes itself."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(bits)
    x, values = (torch.randint(info.min, info.max, (n,), generator=generator(n), dtype=bits) for n in (5000, 1700))
    index = torch.randperm(5000, generator=generator(1))[:1700].sort().values
    was, values_were, swapped = x.clone(), values.clone(), x.clone()
    swapped[index] = values
    job = (x.view(dtype), index, values.view(dtype))
    backend.move_all("swap", [job])
    assert torch.equal(x, swapped) and torch.equal(values, was[index])
    backend.move_all("swap", [job])
    assert torch.equal(x, was) and torch.equal(values, values_were)

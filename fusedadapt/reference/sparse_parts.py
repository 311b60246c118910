"""The primitives of the sparse family in pure PyTorch, on any device: the same functions as every backend, built on `reference.sparse`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import merge as merging
from . import sparse as truth

LEVELS = ((16, 16), (0, 16))
LEVELS16 = ((16, 16),)
Item = tuple[Tensor, Tensor | None]


def _keys(item: Item, score: str, nan: str) -> Tensor:
    return truth.key_of(truth.score_of(item[0], score, item[1]), nan)


def histogram(items: Sequence[Item], score: str, nan: str, shift: int, bits: int, prefix: Tensor | None) -> Tensor:
    """Counts by `bits` bits of the key from `shift` up, among the keys whose higher bits are `prefix`."""
    found = truth.histogram([_keys(item, score, nan) for item in items], shift, bits, None if prefix is None else int(prefix))
    return found.to(items[0][0].device)


def mark(items: Sequence[Item], score: str, nan: str, threshold: Tensor, equal: Tensor) -> list[Tensor]:
    """Words of the keys above `threshold` and of the first `equal` that are equal to it."""
    return [truth.pack(m) for m in truth.mark([_keys(item, score, nan) for item in items], int(threshold), int(equal))]


def select(items: Sequence[Item], score: str, nan: str, k: int, ties: str = "lowest_index") -> list[Tensor]:
    """Words of the k largest keys over all tensors together, k in 0..n."""
    return [truth.pack(m) for m in truth.topk([_keys(item, score, nan) for item in items], k, ties)]


def rows(x: Tensor, other: Tensor | None, score: str, nan: str, k: int, length: int, ties: str, aligned: bool) -> Tensor:
    """Words that keep the k largest of every run of `length` elements."""
    keys = _keys((x, other), score, nan).reshape(-1, length)
    mask = torch.stack([truth.topk([row], k, ties)[0] for row in keys]) if len(keys) else keys.bool()
    if aligned:
        mask = torch.nn.functional.pad(mask, (0, -length % 32))
    return truth.pack(mask)


def energy(items: Sequence[Item], score: str) -> tuple[Tensor, Tensor, Tensor]:
    """(counts, sums, sums of squares) of the scores by the top 11 bits of their keys, NaN in bin 0; exact, rounded once, on the CPU."""
    return truth.energy_of(truth.energy_parts([truth.score_of(x, score, other) for x, other in items]))


def nm(x: Tensor, other: Tensor | None, score: str, nan: str, n: int, m: int) -> Tensor:
    """Words that keep n of every m neighbours of a row."""
    return truth.pack(truth.nm(_keys((x, other), score, nan), n, m))


pack = truth.pack


def unpack(words: Tensor, n: int) -> Tensor:
    """bool [n]."""
    return truth.unpack(words, (n,))


def prefix(words: Tensor) -> Tensor:
    """Exclusive popcounts per 32 words (1,024 elements), the total last: int64 [ceil(words / 32) + 1]."""
    counts = torch.nn.functional.pad(truth.popcount(words), (0, -words.numel() % 32)).view(-1, 32).sum(1)
    return torch.nn.functional.pad(torch.cumsum(counts, 0), (1, 0))


def indices(words: Tensor, n: int, known: tuple[Tensor, int] | None = None) -> Tensor:
    """Sorted flat positions of the set bits: int32 below 2^31 elements, else int64. `known` (prefix, number): for backends that need them."""
    found = unpack(words, n).nonzero().reshape(-1)
    return found.to(torch.int32) if n < 1 << 31 else found


def from_indices(index: Tensor, n: int) -> Tensor:
    """Words with these bits set; `index`: sorted, without repeats, in [0, n)."""
    wide = index.to(torch.int64)
    if wide.numel() and (int(wide[0]) < 0 or int(wide[-1]) >= n or not bool((wide[1:] > wide[:-1]).all())):
        raise ValueError(f"from_indices: expected sorted positions in [0, {n}) without repeats; got others; sort them, drop repeats")
    mask = torch.zeros(n, dtype=torch.bool, device=index.device)
    mask[wide] = True
    return truth.pack(mask)


def colstat(x: Tensor) -> Tensor:
    """Sum of squares of each column of x [T, K], fp32."""
    return truth.column_squares(x)


def move_all(op: str, jobs: Sequence[tuple[Tensor, Tensor, Tensor]], alpha: float = 1.0) -> None:
    """gather, scatter, add or swap for any number of (x, positions, values): values = x[at], x[at] = values, x[at] += alpha * values (in fp32, or
    fp64, rounded once), or both exchanged bit for bit."""
    for x, index, values in jobs:
        at = index.to(torch.int64)
        old = x[at]
        if op == "add":
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            x[at] = (old.to(wide) + alpha * values.to(wide)).to(x.dtype)
        elif op != "gather":
            x[at] = values.to(x.dtype)
        if op in ("gather", "swap"):
            values.copy_(old)


merge_, votes, norms, cuts = merging.merge_, merging.votes, merging.norms, merging.cuts


def kth_key(items: Sequence[Item], score: str, nan: str, k: int) -> tuple[int, int, int]:
    """(the k-th largest key, how many are above it, how many equal it)."""
    return truth.kth_key([_keys(item, score, nan) for item in items], k)

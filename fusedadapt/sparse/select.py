"""Exact top-k without sorting: a histogram of the leading bits of the keys says where the k-th lies, a second one says it exactly, one more pass
writes the bits. Histograms add up over tensors and over processes, so a list needs no concatenation and shards need no gathering."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import sparse as ops
from ..reference.sparse import SCORES, TOP, count_of, kept_ties, score_at, score_of
from .mask import Mask

TIES = ("lowest_index", "inclusive", "exclusive")
NAN = ("highest", "lowest", "raise")
Tensors = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Item = tuple[Tensor, Tensor | None]


class Threshold(NamedTuple):
    """Where a selection cuts. ``value``: the smallest score kept; ``above``: elements above it; ``equal``: how many equal to it are kept, of
    ``ties`` in all; ``nan``: NaN scores met. ``key`` and ``keep``: the cut as kernels take it, int64 [1] on the device."""

    value: float
    above: int
    equal: int
    ties: int
    nan: int
    key: Tensor
    keep: Tensor


def topk_threshold(
    w: Tensors,
    *,
    density: float | None = None,
    k: int | None = None,
    score: str = "abs",
    other: Tensors | None = None,
    scope: str = "global",
    ties: str = "lowest_index",
    nan: str = "highest",
    rounding: str = "floor",
    group: Any = None,
) -> Any:
    """The k-th largest score over a tensor, or over all tensors of a list or dict together. Exact; no sort, no concatenation.

    Args: as `topk_mask`. With ``group`` (a torch process group) every process passes its own shards of the same model and k counts over all of
    them: only histograms travel.

    Returns:
        A `Threshold`; with scope "tensor" one for each tensor, in a list or dict as w is; with scope "row" for each tensor the smallest score kept
        in each row, fp32 in w's shape without the last dimension (NaN where only NaN is kept).

    Raises:
        ValueError: as `topk_mask`; an empty selection (k = 0 or no elements), which has no threshold.
    """
    if scope not in ("global", "tensor", "row"):
        raise ValueError(f"topk_threshold: expected scope global, tensor or row; got {scope!r}")
    names, items = _items("topk_threshold", w, score, other, ties, nan, group)
    if scope != "global":
        if group is not None:
            raise ValueError(f'topk_threshold: expected scope "global" with a process group; got {scope!r}; select locally instead')
        several = _densities(density, names, len(items))
        cuts = _tensor_cut if scope == "tensor" else _row_cuts
        return _as(w, names, [cuts(item, score, d, k, ties, nan, rounding) for item, d in zip(items, several, strict=True)])
    n = _total(sum(x.numel() for x, _ in items), group)
    k = wanted_count("topk_threshold", n, density, k, rounding)
    if k == 0:
        raise ValueError(f"topk_threshold: expected at least one element to keep; got k = 0 of {n}; raise k or density")
    items = items or [_nothing(score, group)]
    return find_threshold(lambda: [items], score, k, ties, nan, group)


def _tensor_cut(item: Item, score: str, density: float | None, k: int | None, ties: str, nan: str, rounding: str) -> Threshold:
    count = wanted_count("topk_threshold", item[0].numel(), density, k, rounding)
    if count == 0:
        raise ValueError(f"topk_threshold: expected at least one element to keep; got k = 0 of {item[0].numel()}; raise k or density")
    return find_threshold(lambda: [[item]], score, count, ties, nan)


def _row_cuts(item: Item, score: str, density: float | None, k: int | None, ties: str, nan: str, rounding: str) -> Tensor:
    x, other = item
    if not x.dim() or wanted_count("topk_threshold", x.shape[-1], density, k, rounding) == 0:
        raise ValueError(f"topk_threshold: expected at least one element of each row to keep; got none of {tuple(x.shape)}; raise k or density")
    scores = score_of(x, score, other)
    kept = _local(item, score, density, k, "row", None, "lowest_index", nan, rounding).to_bool() & ~scores.isnan()
    return torch.where(kept.any(-1), torch.where(kept, scores, torch.inf).amin(-1), torch.nan)


def topk_mask(
    w: Tensors,
    *,
    density: float | Sequence[float] | Mapping[str, float] | None = None,
    k: int | None = None,
    score: str = "abs",
    other: Tensors | None = None,
    scope: str = "global",
    block_size: int | None = None,
    ties: str = "lowest_index",
    nan: str = "highest",
    rounding: str = "floor",
    group: Any = None,
) -> Any:
    """Masks of the largest scores: exactly k of them, always the same ones.

    Args:
        w: a tensor, a list of tensors, or name -> tensor; fp32, bf16 or fp16, any shape and strides. Scores are fp32: fp64 is rounded first.
        density: share to keep, in [0, 1]; one per tensor (list or dict) with scope "tensor" or "row". Or ``k``: how many.
        score: "abs": |w|; "abs_diff": |w - other|; "abs_product": |w * other|; "abs_scaled": |w| * other, a factor per column;
            "given": w itself.
        scope: "global": k of all elements of all tensors; "tensor": of each tensor; "row": of each row (last dimension); "block": of each run of
            ``block_size`` columns in a row.
        ties: among equal scores at the cut, "lowest_index" keeps those that come first, so that exactly k are kept; "inclusive" keeps all of them,
            "exclusive" none, unless all of them fit.
        nan: NaN scores rank "highest" (as torch.topk) or "lowest", or "raise".
        rounding: of density * n: "floor", "ceil" or "round" (half to even).
        group: a torch process group; scope "global" only. Every process passes its shards; ties go to the lower rank.

    Returns:
        A `Mask` of w's shape; for a list or dict, the same of Masks.

    Raises:
        ValueError: a density outside [0, 1], a k that does not fit, unknown words, shapes that differ, NaN with nan="raise".
    """
    names, items = _items("topk_mask", w, score, other, ties, nan, group)
    if scope not in ("global", "tensor", "row", "block"):
        raise ValueError(f"topk_mask: expected scope global, tensor, row or block; got {scope!r}")
    if block_size is not None and scope != "block":
        raise ValueError(f'topk_mask: expected block_size with scope "block" only; got {block_size} with scope {scope!r}; leave one out')
    if scope == "global":
        if isinstance(density, Sequence | Mapping) and not isinstance(density, str):
            raise ValueError('topk_mask: expected one density with scope "global"; got several; use scope="tensor"')
        words = _global(items, score, density, k, ties, nan, rounding, group)[: len(items)]
        masks = [Mask(m, x.shape) for m, (x, _) in zip(words, items, strict=True)]
    else:
        if group is not None:
            raise ValueError(f'topk_mask: expected scope "global" with a process group; got {scope!r}; select locally instead')
        masks = [
            _local(item, score, d, k, scope, block_size, ties, nan, rounding)
            for item, d in zip(items, _densities(density, names, len(items)), strict=True)
        ]
    return _as(w, names, masks)


def _items(op: str, w: Tensors, score: str, other: Tensors | None, ties: str, nan: str, group: Any = None) -> tuple[list[str] | None, list[Item]]:
    for name, value, choices in (("score", score, SCORES), ("ties", ties, TIES), ("nan", nan, NAN)):
        if value not in choices:
            raise ValueError(f"{op}: expected {name} to be one of {', '.join(choices)}; got {value!r}")
    names = list(w) if isinstance(w, Mapping) else None
    tensors = _listed(w, names)
    needs = score not in ("abs", "given")
    if needs != (other is not None):
        raise ValueError(f"{op}: expected other={'a tensor' if needs else 'None'} with score {score!r}; got {'none' if needs else 'one'}")
    others: list[Tensor | None] = [None] * len(tensors) if other is None else list(_listed(other, names))
    if len(others) != len(tensors):
        raise ValueError(f"{op}: expected {len(tensors)} tensors in other; got {len(others)}")
    out = []
    for i, (x, y) in enumerate(zip(tensors, others, strict=True)):
        where = repr(names[i]) if names else f"tensor {i}"
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            got = f"a {x.layout} one" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{op}: expected a dense tensor; got {got} for {where}; convert it")
        if not x.dtype.is_floating_point or x.is_complex():
            raise ValueError(f"{op}: expected a floating-point tensor; got {x.dtype} for {where}; convert it")
        if y is not None:
            wanted = (x.shape[-1],) if score == "abs_scaled" and x.dim() else tuple(x.shape)
            if not isinstance(y, Tensor) or y.layout != torch.strided or y.is_complex():
                got = f"a {y.layout} one of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(f"{op}: expected other to be a dense tensor of real numbers; got {got} for {where}; convert it")
            if tuple(y.shape) != wanted or y.device != x.device:
                raise ValueError(f"{op}: expected other of shape {wanted} on {x.device} for {where}; got {tuple(y.shape)} on {y.device}")
            y = y.float() if score == "abs_scaled" else y
        out.append((ops.readable(x), None if y is None else ops.readable(y)))
    if len({x.device for x, _ in out}) > 1:
        raise ValueError(f"{op}: expected tensors on one device; got {sorted({str(x.device) for x, _ in out})}; move them together")
    if nan == "raise" and group is None:  # a group counts together, so that no process waits for one that has raised
        bad = [names[i] if names else i for i, item in enumerate(out) if _has_nan(item, score)]
        if bad:
            raise ValueError(f'{op}: expected no NaN (nan="raise"); got some in {bad}; repair them or choose nan="highest" or "lowest"')
    return names, out


def _has_nan(item: Item, score: str) -> bool:
    """Whether a score is NaN: two infinities may make one of numbers that are none."""
    x, other = item
    if other is None:
        return bool(x.isnan().any())
    shift, bits = ops.levels(x, score)[0]
    return bool(ops.run("histogram", x)([item], score, "highest", shift, bits, None)[-1])


def _nothing(score: str, group: Any) -> Item:
    """Stands for the tensors of a process that has none: it still takes part in the sums."""
    empty = torch.empty(0, dtype=torch.float32, device=_wire(group))
    return empty, None if score in ("abs", "given") else empty


def _listed(w: Tensors, names: list[str] | None) -> list[Tensor]:
    if isinstance(w, Tensor):
        return [w]
    if isinstance(w, Mapping):
        missing = [name for name in names or [] if name not in w]
        if missing:
            raise ValueError(f"topk: expected the same names in other; missing: {missing}")
        return [w[name] for name in names or []]
    if not isinstance(w, Iterable):
        raise ValueError(f"topk: expected a tensor, a list of tensors or name -> tensor; got {type(w).__name__}")
    return list(w)


def _as(w: Tensors, names: list[str] | None, found: list[Any]) -> Any:
    if isinstance(w, Tensor):
        return found[0]
    return dict(zip(names, found, strict=True)) if names is not None else found


def wanted_count(op: str, n: int, density: float | None, k: int | None, rounding: str) -> int:
    """How many of n elements are asked for: `k`, or `density` of them."""
    if (density is None) == (k is None):
        raise ValueError(f"{op}: expected density or k; got {'both' if k is not None else 'neither'}")
    if rounding not in ("floor", "ceil", "round"):
        raise ValueError(f"{op}: expected rounding floor, ceil or round; got {rounding!r}")
    if k is not None:
        if not isinstance(k, Integral) or not 0 <= k <= n:
            raise ValueError(f"{op}: expected an integer k in 0..{n}; got {k}")
        return int(k)
    if not isinstance(density, Real) or not 0.0 <= density <= 1.0:
        raise ValueError(f"{op}: expected a density in [0, 1]; got {density}")
    return count_of(n, float(density), rounding)


def _densities(density: Any, names: list[str] | None, count: int) -> list[float | None]:
    if density is None or isinstance(density, str) or not isinstance(density, Iterable) or getattr(density, "ndim", 1) == 0:
        return [density] * count  # type: ignore[list-item]  # what is no number is refused where it is used
    if isinstance(density, Mapping):
        wrong = sorted(map(repr, set(density) ^ set(names or [])))
        if names is None or wrong:
            raise ValueError(f"topk_mask: expected densities under the names of the tensors; missing or unknown: {', '.join(wrong) or 'all'}")
        density = [density[name] for name in names]
    values = density.tolist() if isinstance(density, Tensor) else list(density)
    if len(values) != count:
        raise ValueError(f"topk_mask: expected one density for each of {count} tensors; got {len(values)}")
    return values


def _total(n: int, group: Any) -> int:
    if group is None:
        return n
    total = torch.tensor([n], dtype=torch.int64, device=_wire(group))
    torch.distributed.all_reduce(total, group=group)
    return int(total)


def _wire(group: Any) -> torch.device:
    """Where tensors must be for the group to send them."""
    return torch.device("cuda" if group is not None and torch.distributed.get_backend(group) == "nccl" else "cpu")


def find_threshold(batches: Callable[[], Iterable[list[Item]]], score: str, k: int, ties: str, nan: str, group: Any = None) -> Threshold:
    """The cut over everything that `batches` yields: it is called once for each pass, so that tensors may be read from a disk again and again and
    never be in memory together. k in 1..n."""
    order = "highest" if nan == "raise" else nan
    sample = _sample(batches())
    # All processes must take the same passes, whatever the dtypes of their shards: in a group never the short one of 16-bit tensors.
    shifts = ops.levels(sample, score if group is None else "given")
    prefix, left, above, nans, key = None, k, 0, 0, 0
    counts = torch.zeros(1, dtype=torch.int64, device="cpu")
    for level, (shift, bits) in enumerate(shifts):
        counts = torch.zeros(1 << bits, dtype=torch.int64, device=sample.device)
        for items in batches():
            counts += ops.run("histogram", sample)(items, score, order, shift, bits, prefix)
        if group is not None:
            counts = counts.to(_wire(group))
            torch.distributed.all_reduce(counts, group=group)
        counts = counts.cpu()
        if level == 0:
            nans = int(counts[-1] if order == "highest" else counts[0])
            if nan == "raise" and nans:
                raise ValueError(f'topk: expected no NaN (nan="raise"); got {nans} scores; repair them or choose nan="highest" or "lowest"')
        from_top = torch.cumsum(counts.flip(0), 0)
        at = int(torch.searchsorted(from_top, left))
        over = int(from_top[at - 1]) if at else 0
        above, left = above + over, left - over
        key = key << bits | (1 << bits) - 1 - at
        prefix = torch.tensor([key], dtype=torch.int64, device=sample.device)
    same = int(counts[key & (counts.numel() - 1)])
    # NaN's key has ones below its upper half too.
    key = TOP if key == TOP >> shifts[-1][0] else key << shifts[-1][0]
    equal = kept_ties(ties, left, same)
    scalars = torch.tensor([[key], [equal]], dtype=torch.int64, device=sample.device)
    return Threshold(score_at(key), above, equal, same, nans, scalars[0], scalars[1])


def _sample(batches: Iterable[list[Item]]) -> Tensor:
    """A tensor that stands for all: of another dtype than bf16, if there is one (bf16 keys are resolved by their upper half)."""
    found = None
    for items in batches:
        for x, _ in items:
            if x.dtype != torch.bfloat16:
                return x
            found = x
    assert found is not None
    return found


def _global(items: list[Item], score: str, density: float | None, k: int | None, ties: str, nan: str, rounding: str, group: Any) -> list[Tensor]:
    items = items or [_nothing(score, group)]
    k = wanted_count("topk_mask", _total(sum(x.numel() for x, _ in items), group), density, k, rounding)
    if k == 0:
        return [torch.zeros((x.numel() + 31) // 32, dtype=torch.int32, device=x.device) for x, _ in items]
    order, words = "highest" if nan == "raise" else nan, list[Tensor]()
    if group is None:
        words = ops.run("select", items[0][0])(items, score, order, k, ties)
        return words
    found = find_threshold(lambda: [items], score, k, ties, nan, group)
    keep = _own_share(items, score, order, found.key, found.keep, group) if ties == "lowest_index" else found.keep
    words = ops.run("mark", items[0][0])(items, score, order, found.key, keep)
    return words


def _own_share(items: list[Item], score: str, nan: str, key: Tensor, keep: Tensor, group: Any) -> Tensor:
    """How many of the kept ties are this process's: lower ranks are served first."""
    mine = ops.run("histogram", items[0][0])(items, score, nan, 0, 8, key >> 8)[key & 255].to(_wire(group))
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    every = [torch.zeros_like(mine) for _ in range(size)]
    torch.distributed.all_gather(every, mine, group=group)
    before = sum(int(count) for count in every[:rank])
    return (keep - before).clamp(min=0)


def _local(
    item: Item,
    score: str,
    density: float | None,
    k: int | None,
    scope: str,
    block_size: int | None,
    ties: str,
    nan: str,
    rounding: str,
) -> Mask:
    x, other = item
    if scope == "tensor":
        return Mask(_global([item], score, density, k, ties, nan, rounding, None)[0], x.shape)
    length = x.shape[-1] if x.dim() else 1
    if scope == "block":
        if not isinstance(block_size, Integral) or block_size < 1 or length % block_size:
            raise ValueError(f"topk_mask: expected block_size to divide rows of {length}; got {block_size}")
        length = int(block_size)
    k = wanted_count("topk_mask", length, density, k, rounding)
    if x.numel() == 0:
        return Mask(torch.zeros(0, dtype=torch.int32, device=x.device), x.shape)
    return Mask(ops.run("rows", x)(x, other, score, "highest" if nan == "raise" else nan, k, length, ties, False), x.shape)


def nm_mask(w: Tensor, n: int, m: int, *, score: str = "abs", other: Tensor | None = None, nan: str = "highest") -> Mask:
    """Keeps the ``n`` largest of every ``m`` neighbours of a row (2:4 is n=2, m=4); ties: lowest index.

    Raises:
        ValueError: rows that m does not divide; n outside 0..m.
    """
    _, ((x, y),) = _items("nm_mask", w, score, other, "lowest_index", nan)
    if not (isinstance(n, Integral) and isinstance(m, Integral)) or not 0 <= n <= m or m < 1:
        raise ValueError(f"nm_mask: expected 0 <= n <= m; got n={n}, m={m}")
    if x.dim() == 0 or x.shape[-1] % m:
        raise ValueError(f"nm_mask: expected rows of a multiple of {m} elements; got shape {tuple(x.shape)}; pad the last dimension")
    return Mask(ops.run("nm", x)(x, y, score, "highest" if nan == "raise" else nan, int(n), int(m)), x.shape)

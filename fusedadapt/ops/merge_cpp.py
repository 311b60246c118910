"""Merging on a CPU in C++ (`csrc/cpu/merge*.cpp`): the functions of `reference.merge`, bit for bit, on as many threads as torch uses; results do not
depend on their number.

Tensors are flat and contiguous, float32, bfloat16 or float16 in any mix. Scratch: a few thousand numbers per thread (`cuts`: 24 MiB at most, of keys
near the thresholds). Anything else is a ValueError before something is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..reference.merge import COMBINE, Cut, Part, Recipe, cut_of

# As DType in csrc/core/dtypes.h.
_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_KEY_ZERO = 1 << 31  # the key of |d| = 0: no |d| has a lower one


def _core() -> Any:
    module = dispatch.core()
    if module is None:
        raise RuntimeError(f"fusedadapt merge: expected the compiled core; {dispatch.core_reason()}; build it, or use backend 'reference'")
    return module.merge


def _array(op: str, what: str, t: Tensor | None, n: int) -> tuple[int, int]:
    """(address, dtype) of a flat tensor of n elements; (0, 0) for none."""
    if t is None:
        return 0, 0
    if t.device.type != "cpu" or t.dtype not in _CODES or not t.is_contiguous() or t.numel() != n:
        got = f"{t.dtype} on {t.device}, shape {tuple(t.shape)}, strides {t.stride()}"
        raise ValueError(f"{op}: expected {what} to be {n} contiguous float32, bfloat16 or float16 on the CPU; got {got}; convert it")
    return t.data_ptr(), _CODES[t.dtype]


def _part(op: str, part: Part, n: int) -> tuple[int, int, int, int, int, int, int, float, float]:
    """What csrc/bindings_merge.cpp calls a Part."""
    words = 0
    if part.words is not None:
        w = part.words
        if w.device.type != "cpu" or w.dtype != torch.int32 or not w.is_contiguous() or w.numel() != (n + 31) // 32:
            raise ValueError(f"{op}: expected {(n + 31) // 32} int32 words for {n} elements; got {w.dtype} of shape {tuple(w.shape)}; pass its mask")
        words = w.data_ptr()
    key, last = (-1, 0) if part.cut is None else (part.cut.key - _KEY_ZERO, part.cut.last)
    if part.cut is not None and not 0 <= key < _KEY_ZERO:
        raise ValueError(f"{op}: expected the key of an absolute value, 2^31 or more; got {part.cut.key}; use cuts()")
    chance = -1 if part.chance is None else min(max(part.chance, 0), 1 << 16)
    return *_array(op, "a model's tensor", part.tensor, n), words, key, last, chance, part.model, part.weight, part.factor


def _recipe(parts: Sequence[Part], recipe: Recipe) -> tuple[int, float, bool, float, bool, bool, int, int]:
    """What csrc/bindings_merge.cpp calls a Recipe."""
    divisor = sum(part.weight for part in parts)
    normalize = recipe.normalize and (recipe.combine != "sum" or abs(divisor) >= 1e-8)
    positive = recipe.combine != "paper" or recipe.majority > 0
    seed = recipe.seed & 0xFFFFFFFFFFFFFFFF
    return COMBINE.index(recipe.combine), recipe.lambda_, normalize, divisor, positive, recipe.by_count, seed, recipe.stream


def merge_(out: Tensor, base: Tensor | None, parts: Sequence[Part], recipe: Recipe) -> None:
    """Writes the merged tensor into ``out`` (flat), which may be the base or a model itself. ``base``: flat, or None."""
    n = out.numel()
    if not parts:
        raise ValueError("merge_: expected at least one part; got none; pass the models' tensors")
    target, theta, given = _array("merge_", "out", out, n), _array("merge_", "the base", base, n), [_part("merge_", part, n) for part in parts]
    _core().merge(target, theta, n, given, _recipe(parts, recipe), torch.get_num_threads())
    torch.autograd.graph.increment_version((out,))


def votes(base: Tensor | None, parts: Sequence[Part], recipe: Recipe) -> int:
    """sum over the elements of sgn(sum_i d_i)."""
    n = parts[0].tensor.numel()
    given = [_part("votes", part, n) for part in parts]
    return int(_core().votes(_array("votes", "the base", base, n), n, given, _recipe(parts, recipe), torch.get_num_threads()))


def norms(base: Tensor | None, part: Part, recipe: Recipe) -> tuple[float, float]:
    """(sum |d| of all elements, sum |d| of those kept), in fp64."""
    n = part.tensor.numel()
    theta, given = _array("norms", "the base", base, n), [_part("norms", part, n)]
    every, some = _core().norms(theta, n, given, _recipe([part], recipe), torch.get_num_threads())
    return float(every), float(some)


def cuts(base: Tensor | None, tensors: Sequence[Tensor], counts: Sequence[int]) -> list[Cut]:
    """Where the `counts[i]` largest |tensors[i] - base| end; ties: lowest index. Flat tensors of one length; one pass over memory for all of them."""
    n = tensors[0].numel() if tensors else 0
    theta = _array("cuts", "the base", base, n)
    given = [_array("cuts", "a model's tensor", tensor, n) for tensor in tensors]
    found = [cut_of(n, k) for k in counts]
    open_ = [i for i, cut in enumerate(found) if cut is None]
    result = _core().cuts(theta, n, [(given[i], counts[i]) for i in open_], torch.get_num_threads())
    for i, (key, last) in zip(open_, result, strict=True):
        found[i] = Cut(key + _KEY_ZERO, last)
    return [cut for cut in found if cut is not None]

"""The contestants of `bench sparse`: each job's tensors, and for every way to do it a function without arguments."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusedadapt import optim, sparse
from fusedadapt.optim import compact

from .sparse import Contestant, Row


class Absent(Exception):
    """This contestant cannot run here; says why."""


@dataclass
class Built:
    """``call`` does the job once; ``result``: bytes of what it returns or leaves, which are no scratch."""

    call: Callable[[], object]
    result: int = 0


@dataclass
class Problem:
    """The tensors of a row."""

    row: Row
    tensors: list[Tensor]
    device: str

    @property
    def elements(self) -> int:
        return sum(t.numel() for t in self.tensors)

    def draw(self, *shape: int, seed: int = 2) -> Tensor:
        g = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=g, device=self.device).to(self.row.dtype)

    def mask(self, i: int) -> Tensor:
        """bool, of the row's density."""
        g = torch.Generator(self.device).manual_seed(100 + i)
        return torch.rand(self.tensors[i].shape, generator=g, device=self.device) < self.row.density


def problem(row: Row, device: str, quick: bool) -> Problem:
    g = torch.Generator(device).manual_seed(1)
    make = (lambda s: torch.full(s, 0.5, device=device)) if row.fill == "equal" else (lambda s: torch.randn(s, generator=g, device=device))
    return Problem(row, [make(s).to(row.dtype) for s in (row.quick if quick else row.shapes)], device)


def build(c: Contestant, given: Problem) -> Built:
    """Raises Absent, or ModuleNotFoundError for a library that is not installed."""
    if c.kind == "ours":
        return _OURS[given.row.job](c, given)
    return _OTHERS[c.kind](c, given)


# --- ours ---------------------------------------------------------------------------------------------------------------------------------


def _mask(c: Contestant, given: Problem) -> Built:
    k = int(given.row.density * given.elements)
    return Built(lambda: sparse.topk_mask(given.tensors, k=k), given.elements // 8)


def _models(given: Problem) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base = {"w": given.tensors[0]}
    return base, [{"w": base["w"] + 0.1 * given.draw(*base["w"].shape, seed=3 + i)} for i in range(given.row.models)]


def _merge(c: Contestant, given: Problem) -> Built:
    base, models = _models(given)
    density = {} if given.row.method == "task_arithmetic" else {"density": given.row.density}
    call = lambda: sparse.merge(base, models, given.row.method, compat="peft", **density)
    return Built(call, given.elements * given.row.dtype.itemsize)


def _wgrad(c: Contestant, given: Problem) -> Built:
    (n, k), t = given.tensors[0].shape, given.row.tokens
    dy, x = given.draw(t, n, seed=4), given.draw(t, k, seed=5)
    index = sparse.Mask.from_bool(given.mask(0)).indices()
    return Built(lambda: torch.ops.fusedadapt.masked_wgrad(dy, x, index), int(1.1 * 4 * index.numel()))


def _adamw(c: Contestant, given: Problem) -> Built:
    p = nn.Parameter(given.tensors[0].clone())
    options = dict(c.options)
    compact_grad = options.pop("compact_grad", False)
    if options:
        options["masks"] = {p: given.mask(0)}
    try:
        optimizer = optim.AdamW([p], lr=1e-8, weight_decay=0.01, **options)
    except ValueError as error:
        raise Absent(str(error)) from error
    p.grad = given.draw(*p.shape)
    optimizer.step()
    if compact_grad:
        p.compact_grad = p.grad.view(-1)[compact.index_of(optimizer.state[p], p).long()]  # type: ignore[attr-defined]
        p.grad = None
    return Built(optimizer.step)


def _pieces(given: Problem) -> tuple[dict[str, Tensor], Any]:
    weights = {str(i): t.clone() for i, t in enumerate(given.tensors)}
    masks = {str(i): sparse.Mask.from_bool(given.mask(i)) for i in range(len(weights))}
    delta = sparse.SparseDelta.from_diff(weights, {n: t + 1 for n, t in weights.items()}, masks=masks, kind="set")
    return weights, delta


def _delta(c: Contestant, given: Problem) -> Built:
    weights, delta = _pieces(given)
    added = sparse.SparseDelta(delta.entries, "add")

    def call() -> None:
        added.apply_(weights)
        added.revert_()

    return Built(call)


def _wanda(c: Contestant, given: Problem) -> Built:
    factors = given.draw(given.tensors[0].shape[-1]).float().abs()
    call = lambda: sparse.topk_mask(given.tensors[0], density=given.row.density, score="abs_scaled", other=factors, scope="row")
    return Built(call, given.elements // 8)


def _layer(c: Contestant, given: Problem) -> Built:
    w = given.tensors[0]
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(w.clone())
    return _pass(sparse.SparseDeltaLinear.from_linear(linear, given.mask(0)), given)


def _pass(layer: nn.Module, given: Problem) -> Built:
    n, k = given.tensors[0].shape
    x, dy = given.draw(given.row.tokens, k, seed=5).requires_grad_(), given.draw(given.row.tokens, n, seed=4)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return Built(lambda: torch.autograd.grad(layer(x), wanted, dy))


def _drop(c: Contestant, given: Problem) -> Built:
    return _merge(c, given)


def _grow_prune(c: Contestant, given: Problem) -> Built:
    p = nn.Parameter(given.tensors[0])
    optimizer: Any = optim.AdamW([p], lr=1e-8, masks={p: given.mask(0)})
    p.grad = given.draw(*p.shape)
    optimizer.step()
    return Built(lambda: sparse.grow_prune(optimizer, p, fraction=0.1))


def _compress(c: Contestant, given: Problem) -> Built:
    """The k largest and what is left over, as error feedback keeps it."""
    x, k = given.tensors[0], int(given.row.density * given.elements)

    def call() -> None:
        mask = sparse.topk_mask(x, k=k)
        x.view(-1).gather(0, mask.indices().long())

    return Built(call, given.elements // 8 + k * 12)


def _energy(c: Contestant, given: Problem) -> Built:
    return Built(lambda: sparse.energy_histogram(given.tensors))


_OURS: dict[str, Callable[[Contestant, Problem], Built]] = {
    "mask": _mask, "merge": _merge, "wgrad": _wgrad, "adamw": _adamw, "delta": _delta, "wanda": _wanda, "layer": _layer, "drop": _drop,
    "grow_prune": _grow_prune, "compress": _compress, "energy": _energy,
}  # fmt: skip

# --- others -------------------------------------------------------------------------------------------------------------------------------


def _concatenation(given: Problem) -> tuple[Tensor, int]:
    """|w| in one piece, made beforehand: the others are not billed for it."""
    return torch.cat([t.reshape(-1) for t in given.tensors]).abs(), int(given.row.density * given.elements)


def _topk(c: Contestant, given: Problem) -> Built:
    flat, k = _concatenation(given)
    return Built(lambda: torch.topk(flat, k, sorted=False))


def _partition(c: Contestant, given: Problem) -> Built:
    flat, k = _concatenation(given)
    if flat.dtype == torch.bfloat16:
        raise Absent("numpy has no bfloat16")
    array = flat.cpu().numpy()
    return Built(lambda: np.partition(array, len(array) - k))


def _peft(c: Contestant, given: Problem) -> Built:
    functions: Any = importlib.import_module("peft.utils.merge_utils")
    base, models = _models(given)
    ones = torch.ones(len(models), device=given.device)
    more = {} if given.row.method == "task_arithmetic" else {"density": given.row.density}

    def call() -> Tensor:
        start = base["w"].float()
        merged = getattr(functions, given.row.method)([m["w"].float() - start for m in models], ones, **more)
        return (start + merged).to(given.row.dtype)

    return Built(call, given.elements * given.row.dtype.itemsize)


def _dense(c: Contestant, given: Problem, gathered: bool = False) -> Built:
    (n, k), t = given.tensors[0].shape, given.row.tokens
    dy, x = given.draw(t, n, seed=4), given.draw(t, k, seed=5)
    index = given.mask(0).view(-1).nonzero().view(-1)
    return Built(lambda: (dy.t() @ x).view(-1)[index]) if gathered else Built(lambda: dy.t() @ x)


def _swap(c: Contestant, given: Problem) -> Built:
    weights, delta = _pieces(given)
    return Built(lambda: delta.swap_(weights))


def _clone(c: Contestant, given: Problem) -> Built:
    """A copy to come back to, and index_add: how adapters of this kind are usually switched."""
    weights, delta = _pieces(given)
    parts = [(weights[n].view(-1), e.indices.long(), e.values) for n, e in delta.entries.items()]

    def call() -> None:
        for w, at, values in parts:
            kept = w.clone()
            w.index_add_(0, at, values)
            w.copy_(kept)

    return Built(call)


class _Scattered(nn.Module):
    def __init__(self, w: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("w", w)
        self.register_buffer("at", mask.view(-1).nonzero().view(-1))
        self.values = nn.Parameter(torch.zeros(int(mask.sum()), dtype=w.dtype, device=w.device))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w.view(-1).index_add(0, self.at, self.values).view_as(self.w))


def _sort(c: Contestant, given: Problem) -> Built:
    w, k = given.tensors[0], int((1 - given.row.density) * given.tensors[0].shape[1])
    factors = given.draw(w.shape[1]).float().abs()

    def call() -> Tensor:
        metric = w.abs() * factors
        return torch.zeros_like(metric, dtype=torch.bool).scatter_(1, torch.sort(metric, dim=-1, stable=True).indices[:, :k], True)

    return Built(call, given.elements)


_OTHERS: dict[str, Callable[[Contestant, Problem], Built]] = {
    "topk": _topk, "partition": _partition, "peft": _peft, "dense": _dense, "gathered": lambda c, given: _dense(c, given, True), "swap": _swap,
    "clone": _clone, "eager": lambda c, given: _pass(_Scattered(given.tensors[0].clone(), given.mask(0)), given), "sort": _sort,
}  # fmt: skip


def differing(given: Problem) -> int:
    """Elements of the merge that differ from the reference's on a CPU."""
    import fusedadapt

    base, models = _models(given)
    more = {"density": given.row.density, "compat": "peft"}
    ours = sparse.merge(base, models, given.row.method, **more)
    with fusedadapt.backend("reference"):
        on_cpu = ({n: t.cpu() for n, t in m.items()} for m in _each(base, models))
        truth = sparse.merge(next(on_cpu), list(on_cpu), given.row.method, **more)
    assert isinstance(ours, dict) and isinstance(truth, dict)
    return sum(int((ours[n].cpu() != truth[n]).sum()) for n in truth)


def _each(base: dict[str, Tensor], models: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    yield base
    yield from models

"""EVA (arXiv 2410.07170): A from the principal components of a layer's inputs, ranks shared out by explained variance."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .inits import watch_inputs


class IncrementalPCA:
    """The leading components of rows that come in batches (Ross et al., IJCV 2008), in fp64.

    ``components`` [c, K], orthonormal, the element of largest magnitude of each positive; ``variance_ratio`` [c]; None before the first update.
    ``converged`` [c]: |cosine| to the update before was at least ``tau``. Batches of fewer than c rows wait until there are enough.
    """

    def __init__(self, components: int, tau: float = 0.99) -> None:
        self.count, self.tau, self.rows, self.squares = components, tau, 0, 0.0
        self.components: Tensor | None = None
        self.singular: Tensor | None = None
        self.variance_ratio: Tensor | None = None
        self.converged = torch.zeros(components, dtype=torch.bool, device="cpu")
        self._mean: Tensor | None = None
        self._waiting: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """x: [T, K] of any floating dtype."""
        self._waiting.append(x.double())
        if sum(len(part) for part in self._waiting) < self.count:
            return
        x, self._waiting = torch.cat(self._waiting), []
        total, mean = self.rows + len(x), x.mean(0)
        stack = x - mean
        self.squares += float(stack.square().sum())
        before = self.components
        if before is not None and self._mean is not None and self.singular is not None:
            shift = (self.rows * len(x) / total) ** 0.5 * (self._mean - mean)
            self.squares += float(shift.square().sum())
            mean = (self.rows * self._mean + len(x) * mean) / total
            stack = torch.cat([self.singular[:, None] * before, stack, shift[None]])
        self.components, self.singular = _leading(stack, self.count)
        self.rows, self._mean = total, mean
        self.variance_ratio = self.singular.square() / max(self.squares, torch.finfo(torch.float64).tiny)
        if before is not None:
            self.converged = ((self.components * before).sum(1).abs() >= self.tau).cpu()


def _leading(m: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(right singular vectors as rows, singular values) of the ``count`` largest; eigenvectors of the smaller Gram matrix, which GEMMs dominate."""
    rows, columns = m.shape
    gram = m @ m.T if rows < columns else m.T @ m
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]
    directions = m.T @ vectors if rows < columns else vectors
    # QR: a direction without variance would otherwise be zero or any, and a zero row of A next to B = 0 never trains
    v = torch.linalg.qr(directions)[0].T.contiguous()
    v = v * torch.where(v.gather(1, v.abs().argmax(1, keepdim=True)) < 0, -1.0, 1.0)
    return v, torch.linalg.vector_norm(m @ v.T, dim=0)


class EvaInit(NamedTuple):
    """``A`` [rank, K]; ``lora_alpha``, changed so that alpha / rank is what it was. Rank 0: leave the layer as it is."""

    A: Tensor
    lora_alpha: float


def redistribute(ratios: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks that sum to ``budget``, given to the components of largest explained variance over all layers; ties go to earlier layers."""
    candidates = [(-float(value), i, name) for i, (name, ratio) in enumerate(ratios.items()) for value in ratio]
    ranks = dict.fromkeys(ratios, 0)
    for _, _, name in sorted(candidates)[:budget]:
        ranks[name] += 1
    return ranks


@torch.no_grad()
def eva(
    layers: Mapping[str, nn.Module],
    forward: Callable[[Any], Any],
    batches: Sequence[Any] | Iterable[Any],
    r: int | Mapping[str, int],
    lora_alpha: float | Mapping[str, float],
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    whiten: bool = False,
    adjust_alpha: bool = True,
    max_steps: int = 10_000,
) -> dict[str, EvaInit]:
    """Ranks and A of every layer from the inputs it sees: pass each to ``LoRALinear.from_linear(layer, r=len(A), lora_alpha=..., init=A)``.

    Args:
        layers: name -> module of the model that ``forward(batch)`` runs; inputs are [..., K]. Put the model in eval mode.
        batches: run through again and again until all components in use stand still (cosine >= ``tau``), at most ``max_steps`` of them.
        r, lora_alpha: one for all layers, or by name. The budget is the sum of r; a layer gets at most round(``rho`` r). ``rho`` = 1 keeps r.
        whiten: divide each component by the square root of its singular value. adjust_alpha: see `EvaInit`.

    Returns:
        Layer name -> `EvaInit`, A in fp32 on the inputs' device. Layers with equal inputs share one analysis.

    Raises:
        ValueError: no batches; a layer that saw no input, or fewer rows than components.
    """
    rank = dict.fromkeys(layers, r) if isinstance(r, int) else dict(r)
    alpha = dict.fromkeys(layers, lora_alpha) if isinstance(lora_alpha, (int, float)) else dict(lora_alpha)
    batches = list(batches)
    if not batches or not layers:
        raise ValueError(f"eva: expected layers and batches; got {len(layers)} and {len(batches)}; pass some of each")
    most = {name: max(1, round(rank[name] * rho)) for name in layers}
    leader = _equal_inputs(layers, forward, batches[0])
    width = {name: max(most[other] for other in layers if leader[other] == leader[name]) for name in layers}
    pcas: dict[str, IncrementalPCA] = {}
    ranks = dict(width)

    def see(name: str, x: Tensor) -> None:
        pca = pcas.setdefault(name, IncrementalPCA(min(width[name], x.shape[-1]), tau))
        pca.update(x.reshape(-1, x.shape[-1]))

    for step, batch in enumerate(itertools.cycle(batches)):
        needed = {name: max(ranks[other] for other in layers if leader[other] == name) for name in set(leader.values())}
        open_ = {n: layers[n] for n in needed if n not in pcas or not pcas[n].converged[: needed[n]].all()}
        if not open_:
            break
        if step >= max_steps:
            warnings.warn(f"eva: {len(open_)} layers not converged after {max_steps} batches, e.g. {next(iter(open_))}", stacklevel=3)
            break
        with watch_inputs(open_, see):
            forward(batch)
        found = {name: pcas[leader[name]].variance_ratio for name in layers if leader[name] in pcas}
        known = {name: ratio for name, ratio in found.items() if ratio is not None}
        if len(known) == len(layers):
            ranks = redistribute({name: ratio[: most[name]] for name, ratio in known.items()}, sum(rank.values()))
        elif step + 1 >= len(batches):
            missing = sorted(set(layers) - set(known))[0]
            raise ValueError(f"eva: expected at least {width[missing]} input rows for {missing}; got fewer from all batches; pass more, or lower rho")
    return {name: _result(pcas[leader[name]], ranks[name], rank[name], alpha[name], whiten, adjust_alpha) for name in layers}


def _result(pca: IncrementalPCA, rank: int, old: int, alpha: float, whiten: bool, adjust: bool) -> EvaInit:
    assert pca.components is not None and pca.singular is not None
    a = pca.components[:rank]
    if whiten:
        a = a / pca.singular[:rank, None].sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return EvaInit(a.float().contiguous(), alpha * rank / old if adjust else alpha)


def _equal_inputs(layers: Mapping[str, nn.Module], forward: Callable[[Any], Any], batch: Any) -> dict[str, str]:
    """Layer -> the first layer that sees the same input (q, k and v do)."""
    leader: dict[str, str] = {}
    seen: dict[Any, list[tuple[str, Tensor]]] = {}

    def see(name: str, x: Tensor) -> None:
        if name in leader:  # a layer that runs twice is told by its first input
            return
        same = seen.setdefault((x.shape, x.dtype, x.device), [])
        leader[name] = next((other for other, y in same if y is x or torch.equal(x, y)), name)
        if leader[name] == name:
            same.append((name, x.clone()))

    with watch_inputs(layers, see):
        forward(batch)
    if missing := sorted(set(layers) - set(leader)):
        raise ValueError(f"eva: expected every layer to run; {missing[0]} saw no input; leave it out")
    return leader

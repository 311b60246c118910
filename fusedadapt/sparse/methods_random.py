"""Random masks with an exact count, and what starts from them: sparse initialisation, SHiRA, half fine-tuning."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from .delta import Entry, SparseDelta
from .density import densities
from .layers import MaskedLinear, SparseDeltaLinear
from .mask import Mask
from .methods_prune import distinct, keep_only_, refuse_tied
from .select import wanted_count


def seed_of(*parts: object) -> int:
    """A 31-bit seed that is a pure function of its parts, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little") & 0x7FFFFFFF


def random_mask(
    shape: Sequence[int],
    *,
    density: float | None = None,
    k: int | None = None,
    seed: int = 0,
    name: str = "",
    device: torch.device | str = "cpu",
) -> Mask:
    """k elements of `shape` (or floor(density * n)), every such set equally likely. The choice depends on (seed, name, n, k) alone, not on the
    device. Memory: proportional to the smaller of k and n - k, beside the mask.

    Raises:
        ValueError: a density outside [0, 1], a k that does not fit, both or neither.
    """
    n = math.prod(shape)
    k = wanted_count("random_mask", n, density, k, "floor")
    few = min(k, n - k)
    generator = torch.Generator().manual_seed(seed_of("random_mask", seed, name))
    # Draws with repeats until there are enough different ones. The set is symmetric in its elements, so any of the surplus may go.
    chosen = torch.zeros(0, dtype=torch.int64, device="cpu")
    while chosen.numel() < few:
        more = torch.randint(n, (2 * (few - chosen.numel()) + 16,), generator=generator, device="cpu")
        chosen = torch.unique(torch.cat((chosen, more)))
    if chosen.numel() > few:
        chosen = chosen[torch.randperm(chosen.numel(), generator=generator, device="cpu")[:few]].sort().values
    mask = Mask.from_indices(chosen, tuple(shape))
    return (mask if few == k else ~mask).to(device)


@torch.no_grad()
def sparse_init_(params: nn.Module | Mapping[str, Tensor], density: float, *, method: str = "erk", seed: int = 0) -> dict[Tensor, Mask]:
    """Makes a dense network sparse for sparse training: random masks at the densities of `densities` (RigL's start, arXiv 1911.11134), weights
    outside them +0.

    Args:
        params: name -> parameter, or a model (its parameters of two and more dimensions).

    Returns:
        parameter -> Mask, as optimizers' ``masks=`` takes them.
    """
    chosen = {n: p for n, p in params.named_parameters() if p.dim() >= 2} if isinstance(params, nn.Module) else distinct(params.items())
    share = densities(chosen, density, method)
    masks = {name: random_mask(p.shape, density=share[name], seed=seed, name=name, device=p.device) for name, p in chosen.items()}
    for name, p in chosen.items():
        keep_only_(p, masks[name])
    return {p: masks[name] for name, p in chosen.items()}


def shira_(
    model: nn.Module,
    r: int = 32,
    *,
    alpha: float = 1.0,
    seed: int = 0,
    target: Callable[[str, nn.Linear], bool] | None = None,
    masks: Mapping[str, Mask] | None = None,
) -> dict[str, SparseDeltaLinear]:
    """SHiRA (arXiv 2406.13175): freezes the model and gives each Linear layer [N, K] a sparse trainable change of r * (N + K) elements, as many as a
    LoRA of rank r has. Replaces the layers in place and returns them by name; train their ``values``.

    The published code copies the weight and adds the change in every forward pass; `SparseDeltaLinear` writes it into the weight when it changed.

    Args:
        target: which layers (name, layer) -> bool; all Linear layers by default. masks: name -> Mask to use instead of random ones (SHiRA's
            magnitude and SNIP variants).

    Raises:
        ValueError: r * (N + K) above N * K (named), no layer chosen, or one whose weight another module uses too (an output layer tied to the
            embedding: leave it out with `target`). TypeError: layers that are no plain nn.Linear. Nothing was changed.
    """
    found = {
        name: layer
        for name, layer in model.named_modules()
        if name and isinstance(layer, nn.Linear) and not isinstance(layer, MaskedLinear) and (target is None or target(name, layer))
    }
    if not found:
        raise ValueError("shira_: expected Linear layers inside the model; the target chose none; check its names")
    refuse_tied("shira_", model, found, "leave them out with target=")
    missing = [name for name in found if masks is not None and name not in masks]
    too_small = [f"{n}: {tuple(x.weight.shape)}" for n, x in found.items() if masks is None and not 0 < r * sum(x.weight.shape) <= x.weight.numel()]
    if too_small or missing:
        raise ValueError(f"shira_: expected 0 < r * (N + K) <= N * K and a mask for each layer; not so with r={r} for {too_small or missing}")
    chosen = {
        name: random_mask(x.weight.shape, k=r * sum(x.weight.shape), seed=seed, name=name, device=x.weight.device) if masks is None else masks[name]
        for name, x in found.items()
    }
    trained = {p: p.requires_grad for p in model.parameters()}
    try:
        layers = {name: SparseDeltaLinear.from_linear(layer, chosen[name], alpha=alpha) for name, layer in found.items()}
    except (TypeError, ValueError):
        for p, was in trained.items():
            p.requires_grad_(was)
        raise
    for p in trained:
        p.requires_grad_(False)
    new = {id(layer): layers[name] for name, layer in found.items()}
    for name, old in [(n, m) for n, m in model.named_modules(remove_duplicate=False) if id(m) in new]:  # one layer may stand in several places
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new[id(old)])
    return layers


def shira_delta(layers: Mapping[str, SparseDeltaLinear]) -> SparseDelta:
    """What SHiRA learned, as a `SparseDelta` (kind "add") on the original model's weights: save it, apply it, mix it with others."""
    entries = {}
    for name, layer in layers.items():
        entries[f"{name}.weight"] = Entry(layer.mask.indices(), layer.alpha * layer.values.detach().clone(), layer.weight.shape)
    return SparseDelta(entries)


def half_fine_tuning_(
    model: nn.Module,
    stage: int = 0,
    *,
    seed: int = 0,
    group: Callable[[str], str] | None = None,
    always: Collection[str] = (),
) -> list[str]:
    """Half fine-tuning (HFT, arXiv 2404.18466): freezes half of the tensors, chosen anew at each stage, and trains the others.

    Of each group of tensors a random half is trained; groups of an odd size round up and down in turn, so that the whole stays at half. Frozen
    tensors get ``requires_grad=False`` and lose their gradient, so no optimizer touches them (torch's and ours skip a parameter without one, decay
    included). Whole tensors cost nothing; for half of the elements of each tensor use `random_mask` with an optimizer's ``masks=``.

    Args:
        stage: 0, 1, … (a dataset, a round of instructions): another half each. group: parameter name -> group; by default the module two levels up
            (the attention's projections, the MLP's, a block's norms), as the paper balances them. always: parameter names trained at every stage and
            not counted (the paper trains embeddings and head throughout).

    Returns:
        The names of the trained parameters.

    Raises:
        ValueError: unknown names in always.
    """
    params = dict(model.named_parameters())
    unknown = sorted(set(always) - set(params))
    if unknown:
        raise ValueError(f"half_fine_tuning_: expected names of parameters in always; unknown: {unknown}")
    group = group or (lambda name: ".".join(name.split(".")[:-2]))
    groups: dict[str, list[str]] = {}
    for name in params:
        if name not in always:
            groups.setdefault(group(name), []).append(name)
    trained, up = set(always), True
    for key, names in groups.items():
        odd = len(names) % 2
        count = len(names) // 2 + (odd and up)
        up = up != bool(odd)
        generator = torch.Generator().manual_seed(seed_of("hft", seed, stage, key))
        trained |= {names[i] for i in torch.randperm(len(names), generator=generator, device="cpu")[:count].tolist()}
    for name, p in params.items():
        p.requires_grad_(name in trained)
        if name not in trained:
            p.grad = None
    return [name for name in params if name in trained]

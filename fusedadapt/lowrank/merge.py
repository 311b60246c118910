"""Merging an adapter into its layer's weight, and taking it out again. What is merged follows from the method's `Arguments`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.lowrank import DTYPES
from ..quant.tensor import QuantizedTensor, quantize
from ..reference.lowrank import wide
from .methods import METHODS

if TYPE_CHECKING:
    from .layer import LoRALinear


class MergeReport(NamedTuple):
    """``retained``: the share of the wanted change of the weight that its dtype's rounding kept (1: all). ``exact``: unmerging gives, or gave, the
    weight's former bits."""

    layer: str
    retained: float
    exact: bool


class Change(NamedTuple):
    """W <- row_scale * (W + v a) * col_scale, b <- bias; wide, detached. v: N x R; a: R x K."""

    v: Tensor
    a: Tensor
    row_scale: Tensor | None
    col_scale: Tensor | None
    bias: Tensor | None


@dataclass
class Before:
    """What unmerge needs: the weight as it was, or the change to take back; the bias as it was.

    ``left``: the weight's `_version` after the merge; ``at``: where it lay then. (No reference to it, not even a weak one: torch's swap_tensors
    refuses tensors that have such.)
    """

    weight: Tensor | QuantizedTensor | None
    change: Change
    bias: Tensor | None
    left: int = 0
    at: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Versions start anew in a copy."""
        return vars(self) | {"at": None}


def merge_adapters(model: nn.Module, *, backup: bool = True) -> dict[str, MergeReport]:
    """Merges every unmerged `LoRALinear` of a model; see `LoRALinear.merge`. Returns layer name -> report.

    Raises ValueError, naming the layer and with nothing changed, if any of them cannot hold the result, or two share one weight. An error of torch's
    in the middle, too, leaves no layer merged (without backups the weights come back up to rounding).
    """
    layers = {name: layer for name, layer in _layers(model).items() if not layer.merged}
    owners: dict[int, str] = {}
    keep = backup  # what may overflow may do so in the middle of the model: then backups until all is done
    for name, layer in layers.items():
        keep = _may_overflow(layer, _change(layer, backup, name)) or keep
        if (other := owners.setdefault(id(layer.weight), name)) != name:
            raise ValueError(f"{_label(layer, name)}: merge expected a weight of its own; got one that {other} adapts too; untie them first")
    reports: dict[str, MergeReport] = {}
    try:
        for name, layer in layers.items():
            reports[name] = layer.merge(backup=keep, name=name)
    finally:
        if len(reports) < len(layers):
            for name in reports:
                layers[name].unmerge(name=name)
    for name, layer in layers.items():
        if not backup and layer._before is not None:
            layer._before.weight, reports[name] = None, reports[name]._replace(exact=False)
    return reports


def unmerge_adapters(model: nn.Module) -> dict[str, MergeReport]:
    """Unmerges every merged `LoRALinear` of a model; see `LoRALinear.unmerge`. Returns layer name -> report."""
    return {name: layer.unmerge(name=name) for name, layer in _layers(model).items() if layer.merged}


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    from .layer import LoRALinear  # it imports this module

    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    if not found:
        raise ValueError(f"merge: expected a model with LoRALinear layers; got a {type(model).__name__} without any; adapt it first")
    return found


@torch.no_grad()
def merge_layer(layer: LoRALinear, backup: bool, name: str) -> MergeReport:
    """`LoRALinear.merge`."""
    label = _label(layer, name)
    if layer.merged:
        raise RuntimeError(f"{label}: merge expected an unmerged layer; it is merged already; unmerge it first")
    change = _change(layer, backup, name)
    backup = backup or layer.format is not None  # of packed bytes: small, and there is no other way back
    risky = _may_overflow(layer, change)
    kept = _copy(layer) if backup or risky else None  # only the result shows an overflow: the copy makes it undoable
    old_bias = None if layer.bias is None else layer.bias.detach().clone()
    counted, done = not layer.weight.is_inference(), False
    if layer.bias is not None and change.bias is not None:
        layer.bias.copy_(change.bias)
    try:
        retained = _apply(layer.weight, change) if layer.format is None else _requantize(layer, change)
        if risky and isinstance(kept, Tensor) and _overflowed(layer.weight, kept):
            layer.weight.copy_(kept)
            raise _overflow(label, layer.weight.dtype)
        done = True
    finally:
        if not done and layer.bias is not None and old_bias is not None:
            layer.bias.copy_(old_bias)
    before = Before(kept if backup else None, change, old_bias)
    if counted:
        before.left, before.at = layer.weight._version, layer.weight.data_ptr()
    layer.merged, layer._before = True, before
    return MergeReport(label, retained, backup)


@torch.no_grad()
def unmerge_layer(layer: LoRALinear, name: str) -> MergeReport:
    """`LoRALinear.unmerge`."""
    label, before = _label(layer, name), layer._before
    if not layer.merged:
        raise RuntimeError(f"{label}: unmerge expected a merged layer; it is not merged; nothing to do")
    if before is None:
        raise RuntimeError(f"{label}: unmerge expected the weight of before the merge; a state dict holds the merged one only; load an unmerged one")
    _check_own(layer, f"{label}: unmerge")
    _check_left(layer, before, label)
    retained = 1.0
    if isinstance(before.weight, Tensor):
        layer.weight.copy_(before.weight)
    elif before.weight is not None:
        layer.write(before.weight)
    else:
        retained = _apply(layer.weight, _inverse(before.change))
    if layer.bias is not None and before.bias is not None:
        layer.bias.copy_(before.bias)
    layer.merged, layer._before = False, None
    return MergeReport(label, retained, before.weight is not None)


@torch.no_grad()
def merged_linear(layer: LoRALinear) -> nn.Linear:
    """`LoRALinear.to_linear`."""
    weight = layer.weight.detach().clone() if layer.format is None else layer.dequantize()
    bias: Tensor | None = None if layer.bias is None else layer.bias.detach().clone()
    if not layer.merged:
        change = _change(layer, True, "", bias=False)
        _apply(weight, change)
        if _overflowed(weight, layer.weight if layer.format is None else torch.zeros_like(weight)):
            raise _overflow(_label(layer, ""), weight.dtype)
        bias = None if change.bias is None else change.bias.to(weight.dtype)
    plain = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    return plain.train(layer.training)


def _check_own(layer: LoRALinear, what: str) -> None:
    """What is computed from other parameters (weight_norm, prune, parametrizations) is a temporary: writing to it changes nothing."""
    for name in ("weight", "bias"):
        if name not in layer._parameters:
            fix = "make it one first (remove_parametrizations, prune.remove), or use to_linear()"
            raise ValueError(f"{what} expected a {name} that is the layer's own parameter; got one computed from others; {fix}")
        p = layer._parameters[name]
        if p is not None and p.is_inference() and not torch.is_inference_mode_enabled():
            fix = "merge under torch.inference_mode() too, or use to_linear()"
            raise ValueError(f"{what} expected a {name} that may be written to; got one made in inference mode; {fix}")


def _check_left(layer: LoRALinear, before: Before, label: str) -> None:
    """Refuses to bring back a weight that lacks what others did to it since. A change that was only added may be taken out of any weight."""
    if before.at != layer.weight.data_ptr() or layer.weight._version == before.left:
        return
    added = before.weight is None and before.change.row_scale is None and before.change.col_scale is None
    if not added and not _as_left(layer, before):
        fix = "undo that first (of adapters that share a weight the last merged is the first to unmerge), or keep the merged weight"
        raise RuntimeError(f"{label}: unmerge expected the weight that merge left; it has been written to since; {fix}; nothing was changed")


def _as_left(layer: LoRALinear, before: Before) -> bool:
    """Whether the merge, done again, gives the weight: who wrote it since wrote the same (DDP's first broadcast; another adapter, merged and taken
    out again, which without a backup leaves its rounding)."""
    if before.weight is None:
        return False
    if isinstance(before.weight, QuantizedTensor):
        assert layer.format is not None
        again = before.weight.dequantize(torch.float32)
        _apply(again, before.change)
        pairs = zip(quantize(again, layer.format).parts, layer.quantized.parts, strict=True)
        return all(one is None or other is None or torch.equal(one, other) for one, other in pairs)
    again = before.weight.clone()
    _apply(again, before.change)
    kind = wide(again.dtype)
    slack = 4 * torch.finfo(again.dtype).eps * again.to(kind).abs().max()
    return not again.numel() or bool((again.to(kind) - layer.weight.to(kind)).abs().max() <= slack)


def _copy(layer: LoRALinear) -> Tensor | QuantizedTensor:
    return layer.weight.detach().clone() if layer.format is None else layer.quantized.clone()


def _requantize(layer: LoRALinear, change: Change) -> float:
    """Quantizes the changed weight; returns the share of the change that is there afterwards."""
    assert layer.format is not None
    old = layer.dequantize(torch.float32)
    new = old.clone()
    _apply(new, change)
    layer.write(quantize(new, layer.format))
    wanted = (new - old).double()
    kept, total = (wanted * (layer.dequantize(torch.float32) - old)).sum().item(), wanted.square().sum().item()
    return kept / total if total > 0 else 1.0


def _label(layer: LoRALinear, name: str) -> str:
    return f"{name or 'layer'} ({type(layer).__name__}[{layer.method}])"


def _check(layer: LoRALinear, name: str) -> None:
    weight, shape = layer.weight, (layer.out_features, layer.in_features)
    if layer.format is not None:
        return
    if weight.dtype not in DTYPES or tuple(weight.shape) != shape or weight.device.type == "meta":
        raise ValueError(
            f"{_label(layer, name)}: merge expected a floating-point weight of shape {shape}; got {weight.dtype} {tuple(weight.shape)} on "
            f"{weight.device}; dequantize or load it first, or keep the adapter apart"
        )


def _may_overflow(layer: LoRALinear, change: Change) -> bool:
    """Whether the changed weight could leave its dtype's range: a bound that reads W once and copies nothing. Packed weights widen their scales."""
    if layer.format is not None or not layer.weight.numel():
        return False
    v, a, row, col, _ = (0.0 if part is None else float(torch.linalg.vector_norm(part, torch.inf)) for part in change)
    bound = float(torch.linalg.vector_norm(layer.weight, torch.inf)) + change.v.shape[1] * v * a
    for scale, largest in ((change.row_scale, row), (change.col_scale, col)):
        bound *= 1.0 if scale is None else max(1.0, largest)
    return not bound <= torch.finfo(layer.weight.dtype).max


def _overflowed(new: Tensor, old: Tensor) -> bool:
    """Whether something finite became inf or nan."""
    finite = torch.isfinite(new)
    return not bool(finite.all()) and bool((~finite & torch.isfinite(old)).any())


def _overflow(label: str, dtype: torch.dtype) -> ValueError:
    return ValueError(f"{label}: merge expected a result within {dtype}'s range; got an overflow; nothing was changed; merge in a wider dtype")


@torch.no_grad()
def _change(layer: LoRALinear, backup: bool, name: str, *, bias: bool = True) -> Change:
    """The change that merging means, checked. ``bias``: the layer itself must be able to take it, a bias too."""
    _check(layer, name)
    if bias:
        _check_own(layer, f"{_label(layer, name)}: merge")
    dtype = wide(layer.weight.dtype if layer.format is None else torch.float32)
    args = METHODS[layer.method].arguments(layer, dtype)
    if args.A is not None and args.B is not None:
        v = args.B.to(dtype) * layer.scaling
        v, a = (v if args.rank_gate is None else v * args.rank_gate.to(dtype)), args.A.detach().clone()
    else:
        v, a = layer.weight.new_zeros(layer.out_features, 1, dtype=dtype), layer.weight.new_zeros(1, layer.in_features, dtype=dtype)
    row, col = (None if scale is None else scale.detach().to(dtype, copy=True) for scale in (args.row_scale, args.col_scale))
    b = None if args.bias is None else args.bias.detach().to(dtype, copy=True)
    b = b * row if b is not None and row is not None and args.scale_bias else b
    change = Change(v, a, row, col, b)
    label = _label(layer, name)
    if bias and b is not None and layer.bias is None:
        raise ValueError(f"{label}: merge expected a bias to add its shift to; the layer has none; give it one of zeros, or use to_linear()")
    for part in change:
        if part is not None and not torch.isfinite(part).all():
            raise ValueError(f"{label}: merge expected finite factors; got inf or nan; nothing was changed; load sound ones")
    held = layer.weight.dtype if layer.format is None else layer.weight_dtype
    if b is not None and not torch.isfinite(b.to(held if layer.bias is None else layer.bias.dtype)).all():
        raise _overflow(f"{label}: bias", held)
    if not backup and any(scale is not None and bool((scale == 0).any()) for scale in (row, col)):
        raise ValueError(f"{label}: merge expected scales without zeros, to be undone without a backup; got zeros; merge with backup=True")
    return change


def _apply(weight: Tensor, change: Change) -> float:
    """Changes the weight, rounding once; returns the share of the change that was kept."""
    target: Tensor = weight.detach()
    if change.col_scale is None:
        sums = torch.ops.fusedadapt.lr_merge_(target, change.v, change.a, change.row_scale)
    else:
        sums = torch.zeros(2, dtype=torch.float64, device="cpu")
        step = max(1, (1 << 22) // max(1, target.shape[1]))  # rows at a time: fp64 scratch of 32 MB
        for i in range(0, target.shape[0], step):
            old = target[i : i + step].double()
            new = old + change.v[i : i + step].double() @ change.a.double()
            new = (new if change.row_scale is None else new * change.row_scale[i : i + step].double()[:, None]) * change.col_scale.double()
            target[i : i + step] = new
            wanted = new - old
            sums += torch.stack([(wanted * (target[i : i + step].double() - old)).sum(), wanted.square().sum()]).cpu()
    kept, wanted = sums.tolist()
    return kept / wanted if wanted > 0 else 1.0


def _inverse(change: Change) -> Change:
    """row (W + v a) col = W', hence W = (W' - row v a col) / (row col)."""
    v, a, row, col, _ = change
    v = -v if row is None else -v * row[:, None]
    return Change(v, a if col is None else a * col, None if row is None else 1 / row, None if col is None else 1 / col, None)

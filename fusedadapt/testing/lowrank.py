"""The low-rank layer's part of the parity toolkit: random layers, the truth in fp64, and what an eager implementation makes of the same layer.

    case = lowrank_case(7)
    for found in judge_case(case, "cpp"):
        assert found.ours <= found.limit, (case.repro("cpp"), found)

Errors are norms over a whole result: single elements can be exact in either implementation by luck.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import backend as use_backend
from ..lowrank import Output, Segment, lora_linear_group
from ..ops.dense import multiplies
from ..reference import lowrank as reference
from .poison import poisoned_memory
from .ulp import ulp_size

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
#: (x and W, adapters and everything else that is trained beside them)
DTYPES = ((FP32, FP32), (FP32, FP32), (BF16, BF16), (BF16, FP32), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, BF16))
LAYOUTS = ("plain", "plain", "rows apart", "every second column", "transposed", "offset", "broadcast")
#: gradients that have fp32 grade with fp32 adapters on a 16-bit x. Those of row_scale and col_scale meet y0 and dx, which a library's 16-bit GEMM
#: rounds to x's dtype and widened tiles (`ops.dense`) do not.
TIGHT = ("A", "B", "rank_gate", "token_gate", "core", "scaling")
U32 = 2.0**-24
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class SegmentSpec:
    """One low-rank branch. ``inner``: the columns of a core, or None; ``scaling_kind``: "float", "tensor" or "trained"."""

    rank: int
    p: float
    scaling: float
    scaling_kind: str
    inner: int | None
    rank_gate: bool
    token_gate: bool
    activation: str | None


@dataclass(frozen=True)
class OutputSpec:
    """One linear output of ``columns`` features."""

    columns: int
    bias: bool
    row_scale: bool
    scale_bias: bool
    segments: tuple[SegmentSpec, ...]


@dataclass(frozen=True)
class LowRankCase:
    """A layer and its inputs. ``layouts``: by tensor name, the way it lies in memory; ``trained``: names that want a gradient; ``skipped``: outputs
    that the loss does not use."""

    seed: int
    small: bool
    lead: tuple[int, ...]
    k: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    col_scale: bool
    outputs: tuple[OutputSpec, ...]
    layouts: Mapping[str, str]
    trained: frozenset[str]
    skipped: frozenset[int]

    @property
    def tokens(self) -> int:
        return prod(self.lead)

    @property
    def tight(self) -> bool:
        """fp32 adapters on a 16-bit base: their gradients must be fp32-grade."""
        return self.dtype in (BF16, FP16) and self.adapter_dtype == FP32

    def repro(self, backend: str) -> str:
        """A command line that runs this case alone."""
        return f"PYTHONPATH=. python tests/test_lowrank_fuzz.py {backend} {self.seed}" + (" small" if self.small else "")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor of the case: "x", "col_scale", "0.weight", "0.bias", "0.row_scale", "0.1.A" (output 0, segment 1) and so on."""
        found: dict[str, tuple[int, ...]] = {"x": (*self.lead, self.k)}
        if self.col_scale:
            found["col_scale"] = (self.k,)
        for i, o in enumerate(self.outputs):
            own = {"weight": (o.columns, self.k), "bias": (o.columns,) if o.bias else None, "row_scale": (o.columns,) if o.row_scale else None}
            found |= {f"{i}.{name}": shape for name, shape in own.items() if shape is not None}
            for j, s in enumerate(o.segments):
                parts: dict[str, tuple[int, ...] | None] = {
                    "A": (s.rank, self.k),
                    "B": (o.columns, s.inner or s.rank),
                    "rank_gate": (s.rank,) if s.rank_gate else None,
                    "token_gate": self.lead if s.token_gate else None,
                    "core": (s.rank, s.inner) if s.inner else None,
                    "scaling": () if s.scaling_kind == "trained" else None,
                }
                found |= {f"{i}.{j}.{name}": shape for name, shape in parts.items() if shape is not None}
        return found

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtype if name == "x" or name.endswith(("weight", "bias")) or name.startswith("dy") else self.adapter_dtype


def _segment(r: random.Random, small: bool) -> SegmentSpec:
    rank = r.choice([1, 2, 3, 4, 5] if small else [1, 1, 2, 3, 4, 7, 8, 8, 13, 16, 16, 17, 24, 32, 40])
    return SegmentSpec(
        rank, r.choice([0.0, 0.05, 0.1, 0.5, 0.9]), r.choice([1.0, 2.0, 0.25, -0.7]), r.choice(["float", "float", "tensor", "trained"]),
        r.choice([None, None, rank, r.randint(1, 9)]), r.random() < 0.3, r.random() < 0.3, r.choice([None, None, None, *reference.ACTIVATIONS]),
    )  # fmt: skip


def _output(r: random.Random, small: bool) -> OutputSpec:
    segments = tuple(_segment(r, small) for _ in range(r.choice([0, 1, 1, 1, 1, 2, 3])))
    return OutputSpec(r.choice([1, 3, 8, 10] if small else [1, 2, 5, 16, 31, 33, 64]), r.random() < 0.5, r.random() < 0.4, r.random() < 0.5, segments)


def lowrank_case(seed: int, *, small: bool = False) -> LowRankCase:
    """The case of this seed. At most 63 tokens, 70 columns, three outputs of three segments; ``small`` (for interpreted kernels): 6, 20, two."""
    r = random.Random(seed)
    dtype, adapter_dtype = r.choice(DTYPES)
    outputs = tuple(_output(r, small) for _ in range(r.choice([1, 1, 2] if small else [1, 1, 1, 2, 3])))
    leads = [(1,), (5,), (2, 3), (0,)] if small else [(), (1,), (2,), (7,), (16,), (33,), (63,), (3, 5), (2, 3, 4), (1, 1, 9), (0,), (2, 0)]
    k = r.choice([1, 8, 9, 20] if small else [1, 3, 8, 16, 17, 31, 32, 64, 70])
    case = LowRankCase(seed, small, r.choice(leads), k, dtype, adapter_dtype, r.random() < 0.25, outputs, {}, frozenset(), frozenset())
    names = list(case.shapes())
    share = r.choice([1.0, 1.0, 0.7, 0.3])
    trained = {n for n in names if r.random() < (share if not n.endswith("weight") else 0.1)} | {r.choice(names)}
    trained |= {n for n in names if n.endswith("scaling")}
    skipped = {i for i in range(1, len(outputs)) if r.random() < 0.1}
    trained -= {n for n in trained if n.split(".")[0] in map(str, skipped)}
    return replace(
        case, trained=frozenset(trained or {"x"}), skipped=frozenset(skipped),
        layouts={n: r.choice(LAYOUTS) for n in (*names, *(f"dy{i}" for i in range(len(outputs)))) if not n.endswith("scaling")},
    )  # fmt: skip


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The values in another place: a view of ``layout`` into memory of its own. "broadcast" repeats the first row for all of them."""
    if values.dim() < 1 or layout == "plain":
        return values.clone()
    shape = values.shape
    if layout == "rows apart":
        return values.new_full((*shape[:-1], shape[-1] + 5), torch.nan)[..., : shape[-1]].copy_(values)
    if layout == "every second column":
        return values.new_full((*shape[:-1], shape[-1] * 2), torch.nan)[..., ::2].copy_(values)
    if layout == "transposed":
        return values.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "offset":
        return values.new_full((values.numel() + 3,), torch.nan)[3:].view(shape).copy_(values)
    return values[:1].clone().expand(shape) if values.numel() else values.clone()


def tensors_of(case: LowRankCase, device: torch.device | str = "cpu") -> Tensors:
    """All tensors of the case by name, and "dy0", … the gradients of its outputs; values of order one, the same on every device."""
    g = torch.Generator().manual_seed(case.seed)
    wanted = case.shapes() | {f"dy{i}": (*case.lead, o.columns) for i, o in enumerate(case.outputs)}
    found = {}
    for name, shape in wanted.items():
        values = torch.randn(shape, generator=g)
        if name.endswith(("weight", ".A", ".B", "core")):
            values = values / max(shape[-1], 1) ** 0.5
        elif name.endswith(("scale", "gate", "scaling")):
            values = 1 + 0.5 * values
        found[name] = laid_out(values.to(case.dtype_of(name)).to(device), case.layouts.get(name, "plain"))
    return found


def _leaves(case: LowRankCase, tensors: Tensors, convert: Callable[[Tensor], Tensor]) -> Tensors:
    return {n: convert(t).detach().requires_grad_(n in case.trained) for n, t in tensors.items()}


def _gradients(case: LowRankCase, leaves: Tensors, ys: list[Tensor]) -> Tensors:
    """The results by name: y0, …, and dx, d0.weight, … of what is trained."""
    used = [i for i, y in enumerate(ys) if i not in case.skipped and y.requires_grad]
    names = [n for n in leaves if n in case.trained]
    grads: tuple[Tensor | None, ...] = (None,) * len(names)
    if used:
        dys = [leaves[f"dy{i}"].to(ys[i].dtype) for i in used]
        grads = torch.autograd.grad([ys[i] for i in used], [leaves[n] for n in names], dys, allow_unused=True)
    found = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return found | {f"d{n}": torch.zeros_like(leaves[n]) if d is None else d for n, d in zip(names, grads, strict=True)}


def _scaling(s: SegmentSpec, leaves: Tensors, at: str) -> float | Tensor:
    if s.scaling_kind == "trained":
        return leaves[f"{at}.scaling"]
    return torch.tensor(s.scaling, dtype=FP64) if s.scaling_kind == "tensor" else s.scaling


def ours(case: LowRankCase, tensors: Tensors, backend: str) -> Tensors:
    """What `lora_linear_group` makes of the case; memory it allocates starts as NaN."""
    leaves = _leaves(case, tensors, lambda t: t)
    outputs = []
    for i, o in enumerate(case.outputs):
        segments = []
        for j, s in enumerate(o.segments):
            at = f"{i}.{j}"
            parts: dict[str, Any] = {n: leaves.get(f"{at}.{n}") for n in ("rank_gate", "token_gate", "core")}
            segments.append(Segment(leaves[f"{at}.A"], leaves[f"{at}.B"], _scaling(s, leaves, at), s.p, activation=s.activation, **parts))
        outputs.append(Output(leaves[f"{i}.weight"], leaves.get(f"{i}.bias"), segments, leaves.get(f"{i}.row_scale"), o.scale_bias))
    with use_backend(backend), poisoned_memory():
        ys = lora_linear_group(leaves["x"], outputs, seed=case.seed, col_scale=leaves.get("col_scale"))
        return _gradients(case, leaves, ys)


def _masks(case: LowRankCase) -> list[tuple[Tensor, float]]:
    """Of every segment, (the mask in x's shape, the factor of what it keeps)."""
    found = []
    for stream, s in enumerate(s for o in case.outputs for s in o.segments):
        threshold = reference.threshold_of(s.p)
        keep = reference.dropout_mask(case.tokens, case.k, case.seed, threshold, stream)
        found.append((keep.view(*case.lead, case.k), 65536 / (65536 - threshold)))
    return found


def eager(case: LowRankCase, tensors: Tensors) -> Tensors:
    """The case in separate torch ops, as PEFT's layers are written: x cast to the adapters' dtype for their branch, every op rounds to its dtype."""
    leaves = _leaves(case, tensors, lambda t: t)
    masks, ys, x = iter(_masks(case)), [], leaves["x"]
    if case.col_scale:
        x = (x * leaves["col_scale"]).to(x.dtype)
    for i, o in enumerate(case.outputs):
        bias, g = leaves.get(f"{i}.bias"), leaves.get(f"{i}.row_scale")
        first = g is None or o.scale_bias
        y = F.linear(x, leaves[f"{i}.weight"], bias if first else None)
        for j, s in enumerate(o.segments):
            at = f"{i}.{j}"
            keep, factor = next(masks)
            v = x.to(case.adapter_dtype)
            if s.p:
                v = v * (keep * factor).to(v.dtype)  # torch's dropout multiplies by a mask that is scaled in v's dtype
            v = F.linear(v, leaves[f"{at}.A"])
            v = v * leaves[f"{at}.rank_gate"] if s.rank_gate else v
            v = v @ leaves[f"{at}.core"] if s.inner else v
            v = reference.ACTIVATIONS[s.activation](v) if s.activation else v  # type: ignore[no-untyped-call]
            v = v * leaves[f"{at}.token_gate"][..., None] if s.token_gate else v
            y = y + F.linear(v, leaves[f"{at}.B"]) * _scaling(s, leaves, at)
        if g is not None:
            y = y * g
            y = y if first or bias is None else y + bias
        ys.append(y.to(case.dtype))
    return _gradients(case, leaves, ys)


def _mid(u: Tensor, scaling: Any, rank_gate: Tensor | None, token_gate: Tensor | None, core: Tensor | None, activation: Any) -> Tensor:
    v = u if rank_gate is None else u * rank_gate
    v = v if core is None else v @ core
    if activation is not None:
        v = activation(v) if callable(activation) else reference.ACTIVATIONS[activation](v)  # type: ignore[no-untyped-call]
    return v * scaling * (1.0 if token_gate is None else token_gate.reshape(-1, 1))


def truth(case: LowRankCase, tensors: Tensors, *, magnitude: bool = False) -> Tensors:
    """The results in fp64. x * col_scale counts as rounded to x's dtype, in which every implementation stores it.

    ``magnitude``: of all absolute values instead, what rounding errors of the sums are to be measured by. Beside the results, as "rounded <name>":
    what half a unit in the last place does to them where any implementation with a library's GEMM rounds on the way. That is the base products
    x W^T and dY0 W for y and dx; y0 for the gradient of row_scale; the products dY0 W and dx' after each of them for that of col_scale.
    """
    leaves = _leaves(case, tensors, (lambda t: t.double().abs()) if magnitude else Tensor.double)
    masks, ys, x = iter(_masks(case)), [], leaves["x"].reshape(case.tokens, case.k)
    rounded: Tensors = {}
    half = torch.finfo(case.dtype).eps / 2
    products: list[Tensor] = []  # squares of the base products that make dx
    if case.col_scale:
        exact = x * leaves["col_scale"]
        x = exact + (exact.detach().to(reference.wide(case.dtype)).to(case.dtype).double() - exact.detach())
        if x.requires_grad:
            plain = leaves["x"].detach().reshape(x.shape)
            x.register_hook(
                lambda dx: rounded.update({"rounded dcol_scale": half * (sum(products, len(products) * dx**2).sqrt() * plain).norm(dim=0)})
            )
    for i, o in enumerate(case.outputs):
        g, dy = leaves.get(f"{i}.row_scale"), leaves[f"dy{i}"].reshape(-1, o.columns)
        y = x @ leaves[f"{i}.weight"].T
        rounded[f"rounded y{i}"] = half * y.detach() * (1 if g is None else g)
        base = half * (dy if g is None else dy * g) @ leaves[f"{i}.weight"]
        products.append(((dy if g is None else dy * g) @ leaves[f"{i}.weight"]).detach() ** 2)
        rounded["rounded dx"] = (rounded.get("rounded dx", torch.zeros(()).double()) + base.abs()).detach()
        for j, s in enumerate(o.segments):
            at = f"{i}.{j}"
            keep, factor = next(masks)
            dropped = x * keep.view(x.shape) * factor
            scaling = _scaling(s, leaves, at)
            parts: dict[str, Any] = {n: leaves.get(f"{at}.{n}") for n in ("rank_gate", "token_gate", "core")}
            activation = (lambda u: u + 1) if magnitude and s.activation else s.activation
            v = _mid(dropped @ leaves[f"{at}.A"].T, abs(scaling) if magnitude else scaling, activation=activation, **parts)
            y = y + v @ leaves[f"{at}.B"].T
        bias = leaves.get(f"{i}.bias")
        y = y + bias if bias is not None and (g is None or o.scale_bias) else y
        if g is not None:
            rounded[f"rounded d{i}.row_scale"] = half * (y.detach() * dy).norm(dim=0)
            y = y * g
            y = y if o.scale_bias or bias is None else y + bias
        ys.append(y.reshape(*case.lead, o.columns))
    return _gradients(case, leaves, ys) | rounded


class Found(NamedTuple):
    """Norms of one result's errors against the truth; ``limit``: the largest ``ours`` allowed; ``size``: norm of the sums of absolute values."""

    name: str
    ours: float
    eager: float
    limit: float
    size: float


def judge(case: LowRankCase, name: str, result: Tensor, rival: Tensor, true: Tensor, size: Tensor, rounded: Tensor | None, tight: bool) -> Found:
    """One result against its limit.

    ``tight``: 1e-5 of the truth. Everything else: 1.2 times the eager error,
    plus half a unit in the last place of the result's own dtype and of what it is made of (``rounded``, see `truth`). Both plus the rounding of fp32
    sums: four units of 2^-24 of the absolute values summed, what 64 additions in sequence come to at random, and 16 where equal rows round alike.
    """
    errors = [float((r.double() - true).norm()) for r in (result, rival)]
    sums = (16 if "broadcast" in case.layouts.values() else 4) * U32 * float(size.norm())
    if tight:
        limit = 1e-5 * float(true.norm()) + sums
    else:
        limit = 1.2 * errors[1] + float(ulp_size(true, result.dtype).norm()) / 2 + sums
        limit += 0.0 if rounded is None else float(rounded.detach().norm())
    return Found(name, errors[0], errors[1], limit, float(size.norm()))


def judge_case(case: LowRankCase, backend: str, device: torch.device | str = "cpu") -> list[Found]:
    """Every result of the case on a backend, against its limit. A NaN or a wrong shape or dtype counts as an infinite error."""
    tensors = tensors_of(case)
    mine = {name: t.cpu() for name, t in ours(case, tensors_of(case, device), backend).items()}
    results: list[Any] = [mine, eager(case, tensors), truth(case, tensors), truth(case, tensors, magnitude=True)]
    tiles = torch.device(device).type == "cpu" and case.dtype in (BF16, FP16) and not multiplies(case.dtype)
    names = (*TIGHT, "row_scale", "dcol_scale") if tiles else TIGHT
    found = []
    for name, got in mine.items():
        tight = case.tight and name.split(".")[-1] in names
        row = judge(case, name, got, results[1][name], results[2][name], results[3][name], results[2].get(f"rounded {name}"), tight)
        want = results[1][name]
        sound = got.shape == want.shape and got.dtype == want.dtype and bool(got.isfinite().all())
        found.append(row if sound else row._replace(ours=float("inf")))
    return found

"""The contestants of `bench lowrank`, built over the same frozen weights: each is a forward function and what it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lowrank import Contestant, Row

ALPHA = 16


@dataclass
class Problem:
    """A row's tensors. ``x``: T x K, wants a gradient; ``dys``: the gradient of each output; ``linears``: frozen layers without an adapter."""

    row: Row
    x: Tensor
    dys: list[Tensor]
    linears: list[nn.Linear]

    def bases(self, base: str) -> list[nn.Linear]:
        """Layers of that kind over the same weights; modules of their own, because PEFT and `patch` change them.

        Raises ModuleNotFoundError for a quantized base where there is none."""
        return [_base(linear, base) for linear in self.linears]


@dataclass
class Built:
    """``forward()`` returns one tensor per output. ``trained``: what gets a gradient besides x. ``known``: tensors that exist anyway and are not
    counted as saved."""

    forward: Callable[[], Sequence[Tensor]]
    trained: list[Tensor]
    known: list[Tensor]


def problem(row: Row, device: str, quick: bool) -> Problem:
    """``quick``: a quarter of the tokens."""
    draw = torch.Generator(device).manual_seed(1)
    tokens = max(1, row.tokens // 4) if quick else row.tokens

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device).to(row.dtype)

    linears = []
    for n in row.outputs:
        linear = nn.Linear(row.inputs, n, bias=False, device="meta")
        linear.weight = nn.Parameter(normal(n, row.inputs) / row.inputs**0.5, requires_grad=False)
        linears.append(linear)
    return Problem(row, normal(tokens, row.inputs).requires_grad_(), [normal(tokens, n) for n in row.outputs], linears)


class _WidenedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        from fusedadapt.ops import dense

        ctx.save_for_backward(weight)
        return dense.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        from fusedadapt.ops import dense

        return dense.linear_dx(dy, *ctx.saved_tensors), None


class WidenedLinear(nn.Linear):
    """A frozen layer whose 16-bit products go through fp32 tiles, where torch has no GEMM for them: what our layers use underneath."""

    def forward(self, x: Tensor) -> Tensor:
        return _WidenedProduct.apply(x, self.weight)


def _base(linear: nn.Linear, base: str) -> nn.Linear:
    if base not in ("torch", "widened"):
        import fusedadapt

        quantized = getattr(fusedadapt, "QuantizedLinear", None)
        if quantized is None:
            raise ModuleNotFoundError(f"{base} base: this version has no quantized layers")
        return quantized.from_linear(linear, format=base)
    made = (WidenedLinear if base == "widened" else nn.Linear)(linear.in_features, linear.out_features, bias=False, device="meta")
    made.weight = linear.weight
    return made


class Fan(nn.Module):
    """Layers that read the same x, named p0, p1, …"""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(f"p{i}", layer)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.children())


def build(contestant: Contestant, given: Problem) -> Built:
    """Raises ModuleNotFoundError where its library is not installed."""
    return _BUILDERS[contestant.kind](contestant, given)


def _finish(model: nn.Module, given: Problem, compiled: bool = False) -> Built:
    """Zero-initialised factors are filled: a product with zeros may be faster."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and not p.any():
                p.normal_(0.0, 0.02)
    run: Any = torch.compile(model) if compiled else model
    trained = [p for p in model.parameters() if p.requires_grad]
    return Built(lambda: run(given.x), trained, [given.x, *model.parameters(), *model.buffers()])


def _frozen(c: Contestant, given: Problem) -> Built:
    return _finish(Fan(given.bases(c.base)).requires_grad_(False), given)


def _layer(c: Contestant, given: Problem) -> Built:
    from fusedadapt import LoRALinear

    row = given.row
    keywords: dict[str, Any] = {"r": row.rank, "lora_alpha": ALPHA, "lora_dropout": row.p, "method": c.method or row.method} | c.options
    return _finish(Fan([LoRALinear.from_linear(base, **keywords) for base in given.bases(c.base)]), given)


def _factors(given: Problem, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator(given.x.device).manual_seed(2)
    row = given.row
    shapes = [((row.rank, row.inputs), (n, row.rank)) for n in row.outputs]
    return [
        tuple((0.02 * torch.randn(s, generator=draw, device=given.x.device)).to(dtype).requires_grad_() for s in pair)  # type: ignore[misc]
        for pair in shapes
    ]


def _adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype  # PEFT's default


def _functional(c: Contestant, given: Problem) -> Built:
    from fusedadapt.lowrank import Output, Segment, lora_linear, lora_linear_group

    row, pairs = given.row, _factors(given, _adapter_dtype(given.row.dtype))
    weights, s = [linear.weight for linear in given.linears], ALPHA / row.rank
    known = [given.x, *weights, *(t for pair in pairs for t in pair)]
    trained = [t for pair in pairs for t in pair]
    if len(pairs) == 1:
        (a, b), weight = pairs[0], weights[0]
        return Built(lambda: (lora_linear(given.x, weight, a, b, scaling=s, dropout_p=row.p),), trained, known)
    outputs = [Output(w, None, (Segment(a, b, s, row.p),)) for w, (a, b) in zip(weights, pairs, strict=True)]
    return Built(lambda: lora_linear_group(given.x, outputs), trained, known)


class EagerLoRA(nn.Module):
    """LoRA as PEFT's layer computes it, in plain torch: the branch in the adapter's dtype, the sum rounded to x's."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scaling: float, p: float):
        super().__init__()
        self.base, self.scaling, self.dropout = base, scaling, nn.Dropout(p) if p else nn.Identity()
        self.lora_A, self.lora_B = nn.Parameter(a.detach()), nn.Parameter(b.detach())

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y + F.linear(F.linear(self.dropout(x.to(self.lora_A.dtype)), self.lora_A), self.lora_B) * self.scaling).to(x.dtype)


def _eager(c: Contestant, given: Problem) -> Built:
    pairs = _factors(given, _adapter_dtype(given.row.dtype))
    layers = [EagerLoRA(base, a, b, ALPHA / given.row.rank, given.row.p) for base, (a, b) in zip(given.bases(c.base), pairs, strict=True)]
    return _finish(Fan(layers), given)


class _Addmm(torch.autograd.Function):
    """LoRA by GEMMs alone, no dropout, adapters in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
        u = x @ a.t()
        ctx.save_for_backward(x, weight, a, b, u)
        ctx.s = s
        return F.linear(x, weight).addmm_(u, b.t(), alpha=s)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, u = ctx.saved_tensors
        du = (dy @ b) * ctx.s
        return (dy @ weight).addmm_(du, a), None, du.t() @ x, (dy.t() @ u) * ctx.s, None


def _addmm(c: Contestant, given: Problem) -> Built:
    pairs, s = _factors(given, given.row.dtype), ALPHA / given.row.rank
    weights = [linear.weight for linear in given.linears]

    def forward() -> list[Tensor]:
        return [_Addmm.apply(given.x, w, a, b, s) for w, (a, b) in zip(weights, pairs, strict=True)]

    trained = [t for pair in pairs for t in pair]
    return Built(forward, trained, [given.x, *weights, *trained])


def peft_model(layers: nn.Module, method: str, rank: int, p: float) -> Any:
    """``layers`` (a `Fan`) under PEFT's ``method``, as `get_peft_model` leaves it: fp32 adapters. Raises ModuleNotFoundError without PEFT."""
    import peft

    targets = r"p\d+"
    shared: dict[str, Any] = {"target_modules": targets}
    config: Any
    if method == "vera":
        config = peft.VeraConfig(r=rank, vera_dropout=p, **shared)
    elif method == "ia3":
        config = peft.IA3Config(feedforward_modules=[], **shared)
    elif method == "adalora":
        config = peft.AdaLoraConfig(init_r=rank, target_r=rank, lora_alpha=ALPHA, lora_dropout=p, total_step=1000, **shared)
    else:
        options = {"use_dora": method == "dora", "use_rslora": method == "rslora"}
        config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=p, **options, **shared)
    return peft.get_peft_model(layers, config)


def _peft(c: Contestant, given: Problem) -> Built:
    model = peft_model(Fan(given.bases(c.base)), c.method or given.row.method, given.row.rank, given.row.p)
    # the layers themselves: the wrapper's microseconds are not the layer's
    return _finish(model.base_model.model.train(), given, c.compiled)


def _patched(c: Contestant, given: Problem) -> Built:
    import fusedadapt

    model = peft_model(Fan(given.bases(c.base)), c.method or given.row.method, given.row.rank, given.row.p)
    fusedadapt.patch(model)
    return _finish(model.base_model.model.train(), given)


_BUILDERS: dict[str, Callable[[Contestant, Problem], Built]] = {
    "frozen": _frozen, "layer": _layer, "functional": _functional, "patched": _patched, "peft": _peft, "eager": _eager, "addmm": _addmm,
}  # fmt: skip

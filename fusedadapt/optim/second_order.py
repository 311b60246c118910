"""Rules fed by a Hessian estimate: Sophia-G and AdaHessian. The estimate is autograd's work, the step is ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import compact
from .base import FusedOptimizer, Params
from .options import Extras
from .state import names, not_negative, unpack_mask
from .table import describe, local


class SophiaG(FusedOptimizer):
    """Sophia-G (arXiv 2305.14342): p -= lr sign(m) min(1, |m| / (rho bs h)).

    Call ``update_hessian()`` every k steps (the authors use 10) with gradients of a loss on *sampled* labels in ``.grad``:
    h = beta2 h + (1 - beta2) g². ``step(bs=...)`` takes the number of tokens per batch, as the official code. While h = 0 the step is lr sign(m).
    States: ``exp_avg``, ``hessian``. Weight decay: decoupled.
    """

    examples = ({}, {"rho": 0.1, "betas": (0.9, 0.95)})
    decay = "decoupled"
    _step_rule = "sophia_g"

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.965, 0.99), rho: float = 0.04, weight_decay: float = 1e-1,
        *, bs: float = 5120, **extras: Unpack[Extras],
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay, bs=bs), extras)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return super()._hyper(group) | {"rho": not_negative("SophiaG", "rho", group["rho"]) * not_negative("SophiaG", "bs", group["bs"])}

    @torch.no_grad()
    def update_hessian(self) -> None:
        """h = beta2 h + (1 - beta2) g² for every parameter that has a gradient, and every trainable element of it."""
        plans = self._current_plans()
        for plan in plans:
            plan.prepare()
            for e in plan.active_entries():
                beta2 = self.param_groups[e.group]["betas"][1]
                h, index = local(self.state[e.param]["hessian"]), compact.fresh_index(self, e.param)
                g, packed = compact.gradient(e.param, index is not None)
                assert g is not None
                g = local(g) if packed else compact.take(plan.given.get(e.param, local(g)), e.param, index)
                wide = h.dtype if h.dtype == torch.float64 else torch.float32
                new = (h.to(wide) * beta2 + (1 - beta2) * g.to(wide).square()).to(h.dtype)
                mask = self.state[e.param].get("mask") if index is None else None
                h.copy_(new if mask is None else torch.where(unpack_mask(mask, local(e.param.detach())), new, h))
            plan.release()

    def step(self, closure: Callable[[], Any] | None = None, bs: float | None = None) -> Any:  # type: ignore[override]
        """One step; ``bs``: tokens per batch (kept until changed)."""
        if bs is not None:
            not_negative("SophiaG.step", "bs", bs)
            for group in self.param_groups:
                group["bs"] = bs
        return super().step(closure)


class AdaHessian(FusedOptimizer):
    """AdaHessian (arXiv 2006.00719): Adam whose second moment is the square of a spatially averaged Hessian diagonal.

    Backpropagate with ``create_graph=True``; ``step()`` draws a Rademacher vector z, lets autograd compute H z and averages |z H z| over the kernel
    dimensions of 4-D parameters, as the official image code (1-D to 3-D parameters: elementwise; the official code leaves 3-D undefined).
    To use an estimate of your own, set ``param.hessian_diag`` before the step. With a GradScaler the estimate is unscaled as the gradient is, in the
    step (leave ``scaler.unscale_`` out: after it nothing says by how much); one of your own comes unscaled. States: ``exp_avg``,
    ``exp_hessian_diag_sq``. Weight decay: decoupled (lr times decay, the ADD form of the official code).
    """

    examples = ({}, {"hessian_power": 0.5})
    decay = "decoupled"
    _step_rule = "adahessian"

    def __init__(
        self, params: Params, lr: float | Tensor = 0.15, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-4, weight_decay: float = 0.0,
        hessian_power: float = 1.0, **extras: Unpack[Extras],
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, hessian_power=hessian_power), extras)

    def _hyper(self, group: dict[str, Any]) -> dict[str, float]:
        return super()._hyper(group) | {"power": not_negative("AdaHessian", "hessian_power", group["hessian_power"])}

    def update_(self) -> None:
        params = [p for g in self.param_groups for p in g["params"]]
        labels = dict(zip(map(id, params), names(self.param_groups), strict=True))
        live = [p for p in params if compact.gradient(p, compact.wanted(self, p))[0] is not None]
        needed = [p for p in live if not hasattr(p, "hessian_diag")]
        for p in live:
            if hasattr(p, "hessian_diag"):
                _check_diagonal(labels[id(p)], p)
        try:
            self._estimate(live, needed)
            super().update_()
            needed = params
        finally:  # after a refused step, too: the next one has a Hessian of its own; what the caller set is still there for it
            for p in params:
                self.state.get(p, {}).pop("hessian_diag", None)
            for p in needed:
                if hasattr(p, "hessian_diag"):
                    del p.hessian_diag

    def _estimate(self, live: list[Tensor], needed: list[Tensor]) -> None:
        """Leaves |z H z| in ``hessian_diag`` of the needed parameters, and in the states of all that have a gradient."""
        if any(p.grad is None or not p.grad.requires_grad for p in needed):
            raise RuntimeError(
                "AdaHessian.step: expected gradients with a graph; got one without; call loss.backward(create_graph=True), or set param.hessian_diag"
            )
        if needed:
            z = [torch.randint_like(p, 2) * 2 - 1 for p in needed]
            with torch.enable_grad():
                products = torch.autograd.grad([p.grad for p in needed], needed, grad_outputs=z, retain_graph=False, allow_unused=True)  # type: ignore[arg-type]
            scale = getattr(self, "grad_scale", None)  # GradScaler's: a scaled loss has a scaled Hessian
            for p, v, hv in zip(needed, z, products, strict=True):
                hz = torch.zeros_like(p) if hv is None else (hv * v).detach()
                p.hessian_diag = average_diagonal(hz if scale is None else hz / scale.to(hz.device))  # type: ignore[attr-defined]
        for p in live:
            given = p.hessian_diag.detach()  # type: ignore[attr-defined]
            full = torch.empty_like(p, dtype=given.dtype).copy_(given.expand_as(p))
            index = compact.fresh_index(self, p)
            self.state[p]["hessian_diag"] = full if index is None else compact.take(full, p, index)

    def _initial(self, name: str, p: Tensor, group: dict[str, Any]) -> Tensor | float:
        return self.state[p]["hessian_diag"] if name == "hessian_diag" else 0.0


def _check_diagonal(name: str, p: Tensor) -> None:
    """Raises ValueError unless the ``hessian_diag`` a caller set fits its parameter."""
    given: Any = p.hessian_diag  # type: ignore[attr-defined]
    good = isinstance(given, Tensor) and given.layout == torch.strided and given.is_floating_point() and given.device == p.device
    if not good or given.dim() > p.dim() or any(n not in (1, m) for n, m in zip(reversed(given.shape), reversed(p.shape), strict=False)):
        raise ValueError(
            f"AdaHessian.step: expected hessian_diag of {name} to be a dense floating-point tensor of shape {tuple(p.shape)}, or one that expands to "
            f"it, on {p.device}; got {describe(given)}; set it anew, or delete it to have it estimated. Nothing was changed."
        )


def average_diagonal(hz: Tensor) -> Tensor:
    """|z H z|, averaged over the kernel of a 4-D parameter [out, in, h, w]."""
    return hz.abs().mean(dim=(2, 3), keepdim=True).expand_as(hz) if hz.dim() == 4 else hz.abs()

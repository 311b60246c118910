"""Gradient release: each parameter is stepped, and its gradient freed, as soon as backward has finished with it."""

from __future__ import annotations

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .base import FusedOptimizer
from .second_order import AdaHessian
from .state import is_flat


class GradientRelease:
    """Handle of :func:`release_gradients`; ``remove()`` ends it."""

    def __init__(self, handles: list[RemovableHandle]):
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def release_gradients(optimizer: FusedOptimizer) -> GradientRelease:
    """Makes ``loss.backward()`` step every parameter of ``optimizer`` the moment its gradient is complete, and set the gradient to None.

    Peak memory then holds one gradient instead of all. ``optimizer.step()`` finds nothing left to do and may stay where it is: parameters that are
    frozen now, or join later, are left to it. Gradients must not be accumulated over several backward calls. Scaled losses (GradScaler) are not for
    this: the scale is removed in ``step``. Nor are models in DistributedDataParallel, which cannot be told from others: it adds the processes'
    gradients up later, so that each would step on its own. Raises ValueError with ``max_grad_norm``: the global norm is not known before the last
    gradient, with AdaHessian, with a function as ADOPT's ``clip_lambda``, and with FSDP1, whose gradients come as DDP's.
    """
    if optimizer.max_grad_norm is not None:
        raise ValueError("release_gradients: expected max_grad_norm=None; the global norm is known only when every gradient is there; turn one off")

    def hook(p: Tensor) -> None:
        optimizer.step_one_(p)
        p.grad = None
        if getattr(p, "compact_grad", None) is not None:
            p.compact_grad = None  # type: ignore[attr-defined]

    if isinstance(optimizer, AdaHessian):
        raise ValueError("release_gradients: expected a rule that needs its own gradient only; AdaHessian estimates the Hessian from all of them")
    if any(callable(g.get("clip_lambda")) for g in optimizer.param_groups):
        raise ValueError('release_gradients: expected clip_lambda="k**0.25" or None; a function is asked once per group and step; use step() with it')
    params = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    if any(is_flat(p) for p in params):
        raise ValueError("release_gradients: expected parameters outside FSDP1; got flattened ones: it reduces gradients later; use step() with it")
    return GradientRelease([p.register_post_accumulate_grad_hook(hook) for p in params])

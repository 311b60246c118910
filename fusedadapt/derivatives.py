"""What our autograd functions cannot be asked for: second derivatives and function transforms. Both are refused where they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import config

# Bound once: see `ops.onlookers`.
_transforming: Any = torch._C._are_functorch_transforms_active  # type: ignore[attr-defined]
_Tensor, _is_grad_enabled, _is_compiling = torch.Tensor, torch.is_grad_enabled, torch.compiler.is_compiling
_is_batch: Any = torch._C._functorch.is_legacy_batchedtensor  # what stands for one of many gradients: it has no memory to read


def remember(ctx: Any) -> None:
    """In forward: the backward, in whatever thread, runs on the backend that forward's caller asked for (`first_order` sees to it)."""
    ctx.asked = None if torch.compiler.is_compiling() else config.asked()


def first_order(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks the backward of an autograd function as one that has no derivative itself: under create_graph=True it raises RuntimeError.

    torch's `once_differentiable` alone waits until the second pass meets the function. Where dy is a constant (a sum as the loss), or the second
    pass asks for gradients by name (autograd.grad with allow_unused, as a Hessian product does), it never does, and terms go missing without a word.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        once = once_differentiable(backward)  # type: ignore[no-untyped-call]

        @functools.wraps(backward)
        def checked(ctx: Any, *grads: Any) -> Any:
            if _is_compiling():  # a compiled backward refuses by itself
                return once(ctx, *grads)
            if _is_grad_enabled():
                raise RuntimeError(
                    f"{op}: expected a backward pass without create_graph=True; got one with it; the fused backward cannot be differentiated again: "
                    "use the plain operations there (of a patched model: fusedadapt.unpatch)"
                )
            for g in grads:
                if isinstance(g, _Tensor) and _is_batch(g):
                    raise RuntimeError(
                        f"{op}: expected one gradient at a time; got a batch of them (is_grads_batched=True, or vectorize=True of a Jacobian); leave "
                        "that out, or use the plain operations there (of a patched model: fusedadapt.unpatch)"
                    )
            asked = getattr(ctx, "asked", None)
            # who runs backward in a block of their own asks for themselves
            if asked is None or asked == (None, None) or config.asked() != (None, None):
                return backward(ctx, *grads)
            with config.as_asked(asked):
                return backward(ctx, *grads)

        return checked

    return decorate


def transforming() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp, ...) is active: our autograd functions have no rules for these."""
    return not _is_compiling() and bool(_transforming())


def refuse_transforms(op: str) -> None:
    """RuntimeError inside a transform, in our words: autograd's own speak of the function's insides."""
    if transforming():
        raise RuntimeError(
            f"{op}: expected a call outside torch.func transforms (vmap, grad, jvp); got one inside; use the plain operations there "
            "(of a patched model: fusedadapt.unpatch)"
        )

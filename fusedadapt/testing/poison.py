"""Allocations that show a read before the first write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_PLACES: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
)


def _poison(t: Tensor) -> Tensor:
    if type(t) is Tensor and t.layout == torch.strided and t.device.type != "meta":
        # All bits set is NaN in every floating dtype, 8-bit ones included; a bool must stay 0 or 1.
        byte = 0xFF if t.is_floating_point() or t.is_complex() else 0x01 if t.dtype == torch.bool else 0xCB
        t.untyped_storage().fill_(byte)  # type: ignore[attr-defined]  # it is there, made by setattr
    return t


def _poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        t = make(*args, **kwargs)
        return t if kwargs.get("out") is not None else _poison(t)

    return poisoned


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty, empty_like, empty_strided, new_empty and new_empty_strided give NaN (floating) or bytes of 0xCB.

    It patches the Python names, for all threads: allocations that torch or a kernel makes internally stay as they are.
    """
    kept = [(owner, name, owner.__dict__[name] if name in vars(owner) else None, getattr(owner, name)) for owner, name in _PLACES]
    for owner, name, _, make in kept:
        setattr(owner, name, _poisoning(make))
    try:
        yield
    finally:
        for owner, name, own, _ in kept:
            if own is None:
                delattr(owner, name)  # it was inherited
            else:
                setattr(owner, name, own)

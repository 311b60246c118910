"""How an op enters torch: schema, checks that run before anything is written, a fake for compilers, a FLOP formula. Thin on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library
from torch.utils.flop_counter import register_flop_formula

_lib = Library("fusedadapt", "FRAGMENT")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)


def op(
    schema: str, check: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int] | None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Defines fusedadapt::<schema>; the decorated function is what runs, `check` comes before it, and before `fake`."""

    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        _lib.define(schema, tags=_TAGS)

        def checked(*args: Any) -> Any:
            check(*args)
            return run(*args)

        def faked(*args: Any) -> Any:
            check(*args)
            return fake(*args)

        _lib.impl(name, checked, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fusedadapt::{name}", faked, lib=_lib)
        if flops is not None:
            register_flop_formula(getattr(torch.ops.fusedadapt, name))(flops)
        return run

    return register

"""Whether calls may be handed tensors as they are (csrc/looks.h): a call that was checked once runs again for tensors that look the same."""

from __future__ import annotations

import functools
from typing import Any

from .. import dispatch
from .address import PLAIN
from .shim import shim


@functools.cache
def core() -> Any:
    """The compiled core, ready to look at tensors; None where there is none, or where it has not found out how."""
    module, through = dispatch.core(), shim()
    if module is None or through is None:
        return None
    module.look_through(through, *PLAIN)
    return module

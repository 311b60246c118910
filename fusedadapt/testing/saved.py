"""How many bytes autograd keeps between a forward and its backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class SavedBytes:
    """Counts the storages that autograd saves inside the block, each once, except those of ``known`` (inputs, parameters): `total`, in bytes.

        with SavedBytes([x, *model.parameters()]) as saved:
            y = model(x)
        print(saved.total)

    A storage counts whole, also if only a view of it was saved: it stays alive whole. What is freed again before the block ends still counts.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self._seen: dict[int, Any] = {storage.data_ptr(): storage for storage in (t.untyped_storage() for t in known)}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self.total = 0

    def _pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self._seen:
            # The storage itself is kept: its address would otherwise be given to the next one.
            self._seen[storage.data_ptr()] = storage
            self.total += storage.nbytes()
        return t

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.__exit__(kind, value, trace)
        self._seen.clear()

"""Whether a call means what it says is asked of torch's dispatcher in one look; every way in which it may mean something else must show there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fusedadapt.ops import onlookers


class Listening(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


Note = Callable[[], None]


def _inside(context: Any, note: Note) -> None:
    with context:
        note()


def _noting(note: Note) -> Callable[[torch.Tensor], torch.Tensor]:
    def call(x: torch.Tensor) -> torch.Tensor:
        note()
        return x.sum()

    return call


X = torch.ones(3)
DISTURBED: dict[str, Callable[[Note], Any]] = {
    "autocast": lambda note: _inside(torch.autocast("cpu"), note),
    "a dispatch mode": lambda note: _inside(FlopCounterMode(display=False), note),
    "a function mode": lambda note: _inside(Listening(), note),
    "vmap": lambda note: torch.func.vmap(_noting(note))(X),
    "grad": lambda note: torch.func.grad(_noting(note))(X),
    "jvp": lambda note: torch.func.jvp(_noting(note), (X,), (X,)),
    "jit.trace": lambda note: torch.jit.trace(_noting(note), X, check_trace=False),
    "make_fx": lambda note: make_fx(_noting(note))(X),
    "make_fx before autograd": lambda note: make_fx(_noting(note), pre_dispatch=True)(X),
}
CALM: dict[str, Callable[[Note], Any]] = {
    "nothing": lambda note: note(),
    "no_grad": lambda note: _inside(torch.no_grad(), note),
    "inference mode": lambda note: _inside(torch.inference_mode(), note),
    "autocast elsewhere": lambda note: _inside(torch.autocast("cuda", enabled=False), note),
}


def _seen(way: Callable[[Note], Any]) -> list[tuple[int, bool]]:
    seen: list[tuple[int, bool]] = []

    def note() -> None:
        for known in (False, True):  # asked one by one, then remembered
            if not known:
                onlookers._verdicts.pop(onlookers._look(), None)
            assert onlookers.changed() == onlookers._asked_for()
            seen.append((onlookers._look(), onlookers.changed()))

    way(note)
    assert seen
    return seen


@pytest.mark.parametrize("way", DISTURBED)
def test_what_changes_a_call_is_noticed(way: str) -> None:
    plain = onlookers._look()
    assert all(changed and (state != plain or not state) for state, changed in _seen(DISTURBED[way]))
    assert not onlookers.changed() and onlookers._look() == plain


@pytest.mark.parametrize("way", CALM)
def test_what_does_not_change_it(way: str) -> None:
    assert not any(changed for _, changed in _seen(CALM[way]))


def test_every_thread_has_a_state_of_its_own() -> None:
    found: list[bool] = []
    with FlopCounterMode(display=False):
        thread = threading.Thread(target=lambda: found.append(onlookers.changed()))
        thread.start()
        thread.join()
        assert onlookers.changed()
    assert found == [False]


def test_a_torch_that_does_not_tell_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onlookers, "_state", lambda: 0)
    monkeypatch.setattr(onlookers, "_verdicts", {})
    assert not onlookers.changed()
    with torch.autocast("cpu"):
        assert onlookers.changed()
    assert onlookers._verdicts == {}

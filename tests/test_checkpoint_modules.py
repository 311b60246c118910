"""Checkpoints of models whose modules say more of their state than shapes and dtypes do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fusedadapt as fa
from fusedadapt.checkpoint import CheckpointError, load, save


def test_a_model_of_another_packed_format_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    """Their bytes look alike; torch noticed after the layers before had been overwritten."""

    def made(form: str) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), fa.QuantizedLinear.from_linear(nn.Linear(64, 64), form))

    save(tmp_path / "c", made("nf4"))
    other = made("fp4")
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="expected a state in fp4; got nf4"):
        load(tmp_path / "c", other)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_extra_states_need_not_be_tensors(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        count = 0

        def get_extra_state(self) -> dict[str, int]:
            return {"count": self.count}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    first, second = Counting(2, 2), Counting(2, 2)
    first.count = 5
    save(tmp_path / "c", first)
    load(tmp_path / "c", second)  # AttributeError
    assert second.count == 5

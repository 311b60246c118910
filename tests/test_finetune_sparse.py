"""`finetune --sparse` on the tiny encoder: what is chosen, what moves, resume to the bit, the saved delta, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fusedadapt.checkpoint import load_tree
from fusedadapt.finetune import data, lane, model, report, sparse, train
from fusedadapt.finetune.cli import main
from fusedadapt.sparse import SparseDelta

SMALL = ["--quick", "--steps", "6", "--batch", "4", "--save-every", "2", "--threads", "1", "--sparse", "0.05"]


@pytest.fixture(scope="module")
def pairs() -> Any:
    return data.split(data.collect(data.library_files(limit=20)), train.QUICK_HELD_OUT)


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch, pairs: Any) -> Any:
    monkeypatch.setattr(train, "load_data", lambda config: pairs)
    monkeypatch.setattr(report, "plot", lambda result, paths: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bits(tensors: Any) -> list[bytes]:
    return [t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    for node in (tree[key] for key in sorted(tree, key=str)) if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ():
        yield from [node] if isinstance(node, torch.Tensor) else tensors(node)


def nodes(tree: Any) -> Iterator[dict[Any, Any]]:
    if isinstance(tree, dict):
        yield tree
    for node in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ():
        yield from nodes(node)


def test_the_largest_of_all_weights_together_are_chosen() -> None:
    encoder = model.tiny(0)
    flat = torch.cat([p.detach().abs().reshape(-1) for p in encoder.parameters()])
    masks = sparse.choose(encoder, 0.1, "magnitude")
    k, chosen = int(0.1 * flat.numel()), torch.cat([m.to_bool().reshape(-1) for m in masks.values()])
    assert int(chosen.sum()) == k and flat[chosen].min() >= flat[~chosen].max()
    for p in encoder.parameters():
        p.grad = torch.randn(p.shape)
    scores = torch.cat([(p.detach() * p.grad).abs().reshape(-1) for p in encoder.parameters()])
    by_gradient = torch.cat([m.to_bool().reshape(-1) for m in sparse.choose(encoder, 0.1, "gradient").values()])
    assert int(by_gradient.sum()) == k and scores[by_gradient].min() >= scores[~by_gradient].max()
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize(
    "options", [[], ["--select", "gradient", "--optimizer", "Lion"], ["--dtype", "bf16", "--master-weights", "split"]], ids=" ".join
)
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*SMALL, *options, "--out", str(whole)]) == 0
    step = lane.Lane.step

    def interrupt(self: lane.Lane, pairs: Any, index: int, factor: float) -> None:
        if index == 5:
            raise KeyboardInterrupt
        step(self, pairs, index, factor)

    with monkeypatch.context() as patch:
        patch.setattr(lane.Lane, "step", interrupt)
        assert main([*SMALL, *options, "--out", str(broken)]) == 130
    with monkeypatch.context() as patch:
        patch.setattr(sparse, "choose", None)  # the masks are those of the checkpoint
        assert main(["--resume", str(broken)]) == 0
    for name in ("model/model.safetensors", "delta.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    trees = [load_tree(folder / train.CHECKPOINT) for folder in (whole, broken)]
    states = [list(tensors(tree["optimizer"])) for tree in trees]
    compact = [state for state in nodes(trees[0]["optimizer"]) if "index" in state]
    assert compact and all(t.numel() <= state["index"].numel() for state in compact for name, t in state.items() if name != "mask")
    assert states[0] and bits(states[0]) == bits(states[1])
    assert trees[0]["extra"]["history"][0]["loss"] == trees[1]["extra"]["history"][0]["loss"]


def test_the_delta_makes_the_model_of_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--weight-decay", "0.5", "--lr", "0.01", "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / train.REPORT).read_text())["sparse"]
    before = dict(model.tiny(0).named_parameters())
    after = load_file(tmp_path / "model" / "model.safetensors")
    delta = SparseDelta.load(tmp_path / sparse.DELTA)
    assert facts["frozen_changed"] == 0 and facts["trained"] == delta.nnz == int(0.05 * facts["parameters"])
    # AdamW: two states an element, a mask and a step a tensor, and up to 1/32 a position an element, above a count for each 1,024 bits of the mask;
    # dense: two states of every element. The pooler has no gradient.
    used = {name: e for name, e in delta.entries.items() if "pooler" not in name}
    chosen, whole = (sum(sizes) for sizes in zip(*((e.values.numel(), before[name].numel()) for name, e in used.items())))
    listed = 8 * chosen + 4 * sum(n for name, e in used.items() if 32 * (n := e.values.numel()) <= before[name].numel())
    assert listed <= facts["state_bytes"] <= listed + whole / 8 + whole / 128 + 64 * len(used) < 12 * chosen + whole / 8
    assert 8 * whole <= facts["dense_state_bytes"] <= 8 * whole + whole / 8 + 64 * len(used)
    assert facts["delta_bytes"] == (tmp_path / sparse.DELTA).stat().st_size
    moved = sum(int((after[name] != p).sum()) for name, p in before.items())
    assert 0.9 * delta.nnz < moved <= delta.nnz
    weights = {name: p.detach().clone() for name, p in before.items()}
    delta.apply_(weights)
    assert all(bits([weights[name]]) == bits([after[name]]) for name in weights)
    printed = " ".join(capsys.readouterr().out.split())
    assert "weights trained (5.00%), 0 others changed; optimizer state" in printed and "less than of whole tensors" in printed
    assert "as a delta" in printed and "MRR" in printed


def test_tensors_without_a_chosen_element_cost_nothing() -> None:
    (run,) = train.build_lanes(train.Config(sparse=0.0005, quick=True, threads=1))
    assert run.masks is not None
    idle = [name for name, mask in run.masks.items() if mask.nnz == 0]
    assert idle and all(p.requires_grad == (name not in idle) for name, p in run.model.named_parameters())
    assert run.rule.lr == pytest.approx(5e-5 * sparse.LR_FACTOR)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sparse", "0.1", "--adapter", "lora"], "no --adapter"), (["--sparse", "0.1", "--compare", "torch"], "no --compare"),
        (["--sparse", "0.1", "--optimizer", "torch:AdamW"], "has no masks"), (["--select", "gradient"], "add --sparse"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", *arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("select", ["magnitude", "gradient"])
def test_a_share_of_no_weight_is_refused(select: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How many weights there are is known when the encoder is there only."""
    assert main(["--quick", "--sparse", "1e-12", "--select", select, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected --sparse to choose at least one of" in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("density", ["0", "1.5", "-1", "nan"])
def test_densities_are_shares(density: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quick", f"--sparse={density}"])
    assert "at most 1" in capsys.readouterr().err

"""The main job through its command line, on the tiny encoder: resume to the bit, results, refusals."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fusedadapt.checkpoint import load_tree
from fusedadapt.finetune import data, lane, model, train
from fusedadapt.finetune.cli import main

SMALL = ["--quick", "--steps", "6", "--batch", "8", "--save-every", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def small_data(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(train, "QUICK_FILES", 20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on a busy machine wait for each other: 10 times slower here
    yield
    torch.set_num_threads(threads)


def outcome(folder: Path) -> tuple[Any, ...]:
    """Everything that must be bit-equal: weights as bytes, optimizer states, losses."""
    tree = load_tree(folder / train.CHECKPOINT)
    states = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            for key in sorted(node, key=str):  # loading a state dict may reorder a group's keys
                states.append(key)
                walk(node[key])
        elif isinstance(node, (list, tuple)):
            for value in node:
                walk(value)
        elif isinstance(node, torch.Tensor):
            states.append((node.dtype, node.shape, node.reshape(-1).view(torch.uint8).numpy().tobytes()))
        else:
            states.append(node)

    walk(tree["optimizer"])
    walk(tree["model"])
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("model", "model-compared") if (folder / name).exists()]
    return weights, states, [h["loss"] for h in tree["extra"]["history"]]


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer", "torch:AdamW", "--max-grad-norm", "1"],
        ["--optimizer", "AdamW", "--max-grad-norm", "1"],
        ["--optimizer", "AdamW", "--compare", "torch"],
        ["--optimizer", "AdaBelief"],
        ["--optimizer", "Lion", "--dtype", "bf16", "--stochastic-rounding"],
        ["--optimizer", "AdamW", "--dtype", "bf16", "--master-weights", "split"],
        ["--optimizer", "AdamW", "--dtype", "bf16", "--master-weights", "fp32"],
        ["--optimizer", "SophiaG"],
        ["--optimizer", "AdaHessian"],
        ["--optimizer", "ScheduleFreeAdamW"],
    ],
    ids=" ".join,
)
def test_interrupted_and_resumed_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
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
    assert load_tree(broken / train.CHECKPOINT)["extra"]["step"] == 4 and not (broken / train.REPORT).exists()
    torch.manual_seed(12345)
    assert main(["--resume", str(broken)]) == 0
    found, expected = outcome(broken), outcome(whole)
    for part in range(3):
        assert found[part] == expected[part], ("weights", "optimizer states", "losses")[part]


def test_killed_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    options = ["--quick", "--steps", "400", "--batch", "8", "--save-every", "1", "--optimizer", "torch:AdamW", "--threads", "1"]
    command = [sys.executable, "-m", "fusedadapt", "finetune", *options, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    kept = tmp_path / "killed" / train.CHECKPOINT
    deadline = time.monotonic() + 120
    while not (kept.exists() and kept.stat().st_size and load_tree(kept)["extra"]["step"] >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = load_tree(kept)["extra"]["step"]
    assert 3 <= stopped < 400
    # The same number of steps as the stored run would take too long; its first steps are what the other run is stopped after.
    killed = load_tree(kept)
    config = train.stored_config(kept)
    pairs, held_out = quick_data(40)
    lanes = train.build_lanes(config)
    _, _, done = train.restore(kept, config, lanes, data.digest(pairs, held_out))
    again = train.build_lanes(config)
    for index in range(stopped + 2):
        batch = [pairs[i] for i in data.batch_indices(len(pairs), config.batch, config.seed, index)]
        for run in again if index < done else [*again, *lanes]:
            run.step(batch, index, train.lr_factor(index, config.steps, False))
    assert again[0].history.loss == lanes[0].history.loss and killed["extra"]["history"][0]["loss"] == again[0].history.loss[:stopped]
    for a, b in zip(again[0].model.state_dict().values(), lanes[0].model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def quick_data(files: int) -> tuple[list[data.Pair], list[data.Pair]]:
    torch.set_num_threads(1)
    return data.split(data.collect(data.library_files(limit=files)), train.QUICK_HELD_OUT)


def test_it_learns_and_leaves_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--optimizer", "AdamW", "--compare", "torch", "--steps", "25", "--threads", "1", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / train.REPORT).read_text())
    ours, theirs = report["lanes"]
    assert [ours["label"], theirs["label"]] == ["fusedadapt AdamW", "torch AdamW"]
    assert len(ours["loss"]) == len(ours["compute_s"]) == len(ours["optimizer_s"]) == 25
    assert sum(ours["loss"][-5:]) < 0.8 * sum(ours["loss"][:5]) and ours["after"]["mrr"] > report["before"]["mrr"]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3) and ours["loss"][0] == theirs["loss"][0]
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and b"</svg>" in (tmp_path / "curves.svg").read_bytes()
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == model.tiny(0).state_dict().keys()
    assert load_tree(tmp_path / train.CHECKPOINT)["extra"]["step"] == 25
    printed = capsys.readouterr().out
    assert "before" in printed and "MRR" in printed and "largest difference of the two loss curves" in printed


def test_seed_decides(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main([*SMALL, "--optimizer", "torch:AdamW", "--steps", "2", "--seed", seed, "--out", str(tmp_path / name)]) == 0
    a, b, c = (outcome(tmp_path / name)[0] for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("seed", ["20261122123456", str(2**63 - 1), str(-(2**63))])
def test_any_seed_that_torch_takes_lasts_the_whole_run(seed: str, tmp_path: Path) -> None:
    """A step's seed is made of it and the step's number, and must fit, too."""
    options = ["--quick", "--steps", "2", "--batch", "8", "--threads", "1", "--adapter", "lora", "--optimizer", "sophiag"]
    assert main([*options, "--seed", seed, "--out", str(tmp_path)]) == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.match(r"(finetune|checkpoint\.\w+): expected .*; .*; ", error), error
    return error


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    assert "--optimizer" in refused(capsys, "--quick", "--optimizer", "nope", "--out", out)
    assert "add --dtype bf16" in refused(capsys, "--quick", "--master-weights", "split", "--out", out)
    assert "drop the 'torch:'" in refused(capsys, "--quick", "--optimizer", "torch:SGD", "--compare", "torch", "--out", out)
    assert "No such file" in refused(capsys, "--resume", str(tmp_path / "absent"))
    assert "weight decay" in refused(capsys, "--quick", "--optimizer", "torch:Rprop", "--weight-decay", "1", "--out", out)
    assert "lower --lr" in refused(capsys, *SMALL, "--optimizer", "torch:SGD", "--lr", "1e30", "--out", out)
    if not torch.cuda.is_available():
        assert "--device cpu" in refused(capsys, "--quick", "--device", "cuda", "--out", out)
    for option, value in (("--steps", "0"), ("--seed", str(2**63)), ("--seed", "1.5")):
        with pytest.raises(SystemExit):
            main(["--quick", option, value, "--out", out])


def test_where_it_cannot_write_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert main([*SMALL, "--out", str(tmp_path / "file" / "run")]) == 1

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fusedadapt.finetune.cli.run", full)
    assert main([*SMALL, "--out", str(tmp_path / "run")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("finetune: expected to write into ") for line in errors) and "No space left" in errors[1]


def test_resume_takes_the_stored_configuration_and_refuses_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    assert main([*SMALL, "--optimizer", "torch:SGD", "--lr", "0.5", "--out", out]) == 0
    assert "--lr 0.5; got 0.25" in refused(capsys, "--resume", "--out", out, "--lr", "0.25")
    (tmp_path / "run" / train.REPORT).unlink()
    assert "unfinished run" in refused(capsys, *SMALL, "--optimizer", "torch:SGD", "--out", out)
    assert main(["--resume", "--out", out, "--lr", "0.5"]) == 0
    assert main([*SMALL, "--optimizer", "torch:SGD", "--out", out]) == 0, "a finished run may be replaced"
    kept = tmp_path / "run" / train.CHECKPOINT
    damaged = bytearray(kept.read_bytes())
    damaged[-5] ^= 4
    kept.write_bytes(damaged)
    assert re.search(r"tensor \S+ .* does not match its hash", refused(capsys, "--resume", "--out", out))


def test_a_refused_run_leaves_a_finished_one_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once a new run replaces it, its checkpoint is gone too: --resume would go on with the old settings."""
    out, small = tmp_path / "run", [*SMALL, "--optimizer", "torch:SGD"]
    assert main([*small, "--out", str(out)]) == 0
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    refused(capsys, *small, "--optimizer", "nope", "--out", str(out))
    refused(capsys, *small, "--batch", "100000", "--out", str(out))
    refused(capsys, "--resume", str(out), "--out", str(tmp_path / "other"))
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before
    assert not (tmp_path / "other").exists()

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt  # as the signal does, which a test runner's workers may ignore

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane.Lane, "step", stopped)
        assert main([*small, "--seed", "5", "--out", str(out)]) == 130
    assert "before the first checkpoint" in capsys.readouterr().err and not (out / train.CHECKPOINT).exists()


def test_other_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*SMALL, "--optimizer", "torch:SGD", "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(train, "QUICK_FILES", 19)
    assert "use the same Python" in refused(capsys, "--resume", str(tmp_path))

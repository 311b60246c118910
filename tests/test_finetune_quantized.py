"""`finetune --quant` on the tiny encoder: what is packed, what is reported, resume to the bit, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fusedadapt.checkpoint import load_tree
from fusedadapt.finetune import data, lane, model, quantized, report, train
from fusedadapt.finetune.cli import main
from fusedadapt.lowrank import LoRALinear

RUN = ["--quick", "--steps", "4", "--batch", "4", "--save-every", "2", "--threads", "1", "--rank", "4", "--adapter", "lora"]


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


def test_every_linear_of_the_layers_is_packed_and_the_rest_is_not() -> None:
    (run,) = train.build_lanes(train.Config(adapter="lora", rank=4, quant="int8", quick=True, threads=1))
    layers = [m for m in run.model.modules() if isinstance(m, LoRALinear)]
    assert layers and all(layer.format is not None and layer.format.name == "int8" for layer in layers)
    assert {p.dtype for name, p in run.model.named_parameters() if "embeddings" in name} == {torch.float32}
    plain = train.build_lanes(train.Config(quick=True, threads=1))[0]
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert run.parameters() == (trained, plain.parameters()[1] + trained)


@pytest.mark.parametrize("choice", ["nf4-dq", "int4"])
def test_a_run_says_what_it_saved_and_leaves_a_dense_model(choice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--quant", choice, "--out", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"linear layers in {choice}" in printed and "before" in printed and "quantized" in printed and "adapted" in printed
    written = json.loads((tmp_path / train.REPORT).read_text())
    facts = written["quantized"]
    assert facts["weight_bytes"][0] > 6 * facts["weight_bytes"][1] and facts["kept_dense"] > 0
    assert facts["model_bytes"][0] - facts["model_bytes"][1] == facts["weight_bytes"][0] - facts["weight_bytes"][1]
    assert facts["quality"] != written["before"]
    merged = load_file(tmp_path / "model" / "model.safetensors")
    assert merged.keys() == model.tiny(0).state_dict().keys() and all(t.dtype == torch.float32 for name, t in merged.items() if "weight" in name)
    assert written["adapted"][0]["merged"]["mrr"] == pytest.approx(written["lanes"][0]["after"]["mrr"], abs=0.02)


def test_interrupted_and_resumed_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*RUN, "--quant", "nf4", "--out", str(whole)]) == 0
    step = lane.Lane.step

    def interrupt(self: lane.Lane, pairs: Any, index: int, factor: float) -> None:
        if index == 3:
            raise KeyboardInterrupt
        step(self, pairs, index, factor)

    with monkeypatch.context() as patch:
        patch.setattr(lane.Lane, "step", interrupt)
        assert main([*RUN, "--quant", "nf4", "--out", str(broken)]) == 130
    assert main(["--resume", str(broken)]) == 0
    files = [[path.read_bytes() for path in sorted(folder.glob("*/*.safetensors"))] for folder in (whole, broken)]
    assert files[0] == files[1]
    extra = [load_tree(folder / train.CHECKPOINT)["extra"] for folder in (whole, broken)]
    assert extra[0]["quantized"] == extra[1]["quantized"] and extra[0]["history"][0]["loss"] == extra[1]["history"][0]["loss"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--quant", "nf4"], "--adapter with --quant"),
        (["--quant", "nf4", "--adapter", "lora", "--compare", "peft"], "no --compare peft with --quant"),
    ],
)
def test_refusals(options: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", *options, "--out", str(tmp_path)]) == 2
    assert text in " ".join(capsys.readouterr().err.split())


def test_choices_are_formats() -> None:
    assert "nf4" in quantized.CHOICES and not any(name.startswith("dynamic") for name in quantized.CHOICES)

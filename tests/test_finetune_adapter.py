"""`finetune --adapter` on the tiny encoder: what is trained, resume to the bit, merge, the saved adapter, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fusedadapt.checkpoint import load_tree
from fusedadapt.finetune import adapters, data, lane, model, report, train
from fusedadapt.finetune.cli import main
from fusedadapt.lowrank import LoRALinear
from fusedadapt.lowrank.methods import METHODS

SMALL = ["--quick", "--steps", "6", "--batch", "4", "--save-every", "2", "--threads", "1", "--rank", "4", "--dropout", "0.2"]
RANK = 4


@pytest.fixture(scope="module")
def pairs() -> Any:
    return data.split(data.collect(data.library_files(limit=20)), train.QUICK_HELD_OUT)


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch, pairs: Any) -> Any:
    monkeypatch.setattr(train, "load_data", lambda config: pairs)  # reading the library takes five times as long as a run here
    monkeypatch.setattr(report, "plot", lambda result, paths: None)  # two seconds of every run, and tested elsewhere
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def adapted(method: str, **options: Any) -> tuple[model.Encoder, adapters.Adapter]:
    encoder = model.tiny(3)
    return encoder, adapters.Adapter(encoder, adapters.Options(method, RANK, 8.0, 0.0, **options), steps=10, seed=0)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 1024, (3, 9), generator=torch.Generator().manual_seed(5))
    return ids, torch.ones(3, 9, dtype=torch.bool)


def stirred(adapter: adapters.Adapter) -> None:
    """Away from the identity."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in adapter.layers.values():
            for part in METHODS[layer.method].parts:
                p = getattr(layer, part.name)
                p.add_(0.1 * torch.randn(p.shape, generator=draw))


def outcome(folder: Path) -> tuple[Any, ...]:
    tree = load_tree(folder / train.CHECKPOINT)
    found: list[Any] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            for key in sorted(node, key=str):
                walk((key, node[key]))
        elif isinstance(node, (list, tuple)):
            for value in node:
                walk(value)
        else:
            found.append(node.reshape(-1).view(torch.uint8).numpy().tobytes() if isinstance(node, torch.Tensor) else node)

    walk((tree["model"], tree["optimizer"], tree["extra"]["adapter"]))
    files = [path.read_bytes() for path in sorted(folder.glob("*/*.safetensors"))]
    return files, found, [h["loss"] for h in tree["extra"]["history"]]


@pytest.mark.parametrize("method", adapters.ADAPTERS)
def test_starts_as_the_model_and_trains_the_adapter_alone(method: str) -> None:
    encoder, adapter = adapted(method)
    names = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[0] for name in names} == set(adapter.layers)
    assert len(adapter.layers) == (6 if method == "ia3" else 12)
    assert names == {f"{name}.{part.name}" for name, layer in adapter.layers.items() for part in METHODS[layer.method].parts}
    if method != "ssf":  # starts near, not at, the identity
        torch.testing.assert_close(encoder(*batch()), model.tiny(3)(*batch()), atol=1e-6, rtol=0)
    assert all(re.fullmatch(adapters.TARGETS, name) for name in adapter.layers)
    other, _ = adapted(method)
    assert all(torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", adapters.ADAPTERS)
def test_merged_weights_are_a_plain_encoder(method: str) -> None:
    encoder, adapter = adapted(method)
    stirred(adapter)
    before = encoder.eval()(*batch())
    assert (before - model.tiny(3)(*batch())).abs().max() > 1e-3
    retained = adapter.merge()
    assert retained.keys() == adapter.layers.keys() and all(0.99 < kept <= 1.01 for kept in retained.values())
    plain = model.tiny(4)
    plain.load_state_dict(adapters.plain_weights(encoder))
    torch.testing.assert_close(plain(*batch()), before, atol=2e-6, rtol=0)


@pytest.mark.parametrize("method", [m for m in adapters.ADAPTERS if m != "ssf"])
def test_peft_loads_the_saved_adapter(method: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    encoder, adapter = adapted(method)
    stirred(adapter)
    assert [path.name for path in adapter.save(tmp_path)] == ["adapter_model.safetensors", "adapter_config.json"]
    loaded = peft.PeftModel.from_pretrained(model.tiny(3), tmp_path)
    torch.testing.assert_close(loaded.base_model.model.eval()(*batch()), encoder.eval()(*batch()), atol=3e-6, rtol=0)


def test_ssf_is_saved_without_a_configuration_of_peft(tmp_path: Path) -> None:
    _, adapter = adapted("ssf")
    assert [path.name for path in adapter.save(tmp_path)] == ["adapter_model.safetensors"]
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 24


RESUMED = [["lora"], ["dora", "--dtype", "bf16"], ["adalora"], ["vera", "--optimizer", "ScheduleFreeAdamW"]]


@pytest.mark.parametrize("options", RESUMED, ids=" ".join)
def test_interrupted_and_resumed_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*SMALL, "--adapter", *options, "--out", str(whole)]) == 0
    step = lane.Lane.step

    def interrupt(self: lane.Lane, pairs: Any, index: int, factor: float) -> None:
        if index == 5:
            raise KeyboardInterrupt
        step(self, pairs, index, factor)

    with monkeypatch.context() as patch:
        patch.setattr(lane.Lane, "step", interrupt)
        assert main([*SMALL, "--adapter", *options, "--out", str(broken)]) == 130
    torch.manual_seed(12345)
    assert main(["--resume", str(broken)]) == 0
    found, expected = outcome(broken), outcome(whole)
    for part in range(3):
        assert found[part] == expected[part], ("files", "weights and states", "losses")[part]


@pytest.mark.parametrize(("method", "decayed"), [("lora", 24), ("dora", 24), ("adalora", 24), ("vera", 0), ("ia3", 0), ("ssf", 0)])
def test_scales_are_not_decayed_towards_zero(method: str, decayed: int) -> None:
    (run,) = train.build_lanes(train.Config(adapter=method, rank=RANK, weight_decay=0.1, quick=True, threads=1))
    assert sum(len(group["params"]) for group in run.optimizer.param_groups if group["weight_decay"]) == decayed
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == sum(p.requires_grad for p in run.model.parameters())
    assert run.rule.lr == pytest.approx(5e-5 * adapters.ADAPTERS[method])


def test_dropout_masks_change_with_the_step_and_not_with_the_lane(pairs: Any) -> None:
    config = train.Config(adapter="lora", rank=RANK, dropout=0.5, quick=True, threads=1)
    (a,), (b,) = train.build_lanes(config), train.build_lanes(config)
    stirred(a.adapter)
    stirred(b.adapter)
    batch = pairs[0][:4]
    for run in (a, b):
        torch.manual_seed(id(run))  # whatever the generator held before
        run.step(batch, 0, 0.0)
        run.step(batch, 1, 0.0)
    assert a.history.loss == b.history.loss and a.history.loss[0] != a.history.loss[1]
    assert a.evaluate(batch) == a.evaluate(batch), "no dropout while judging"


def test_it_learns_and_leaves_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--quick", "--steps", "25", "--threads", "1", "--adapter", "lora", "--rank", "8", "--lr", "2e-2"]
    assert main([*run, "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / train.REPORT).read_text())
    loss, facts = written["lanes"][0]["loss"], written["adapted"][0]
    assert sum(loss[-5:]) < 0.95 * sum(loss[:5])
    assert facts["trained"] < 0.3 * facts["parameters"] and facts["kept_for_backward"] > 0
    assert facts["merged"]["mrr"] == pytest.approx(written["lanes"][0]["after"]["mrr"], abs=0.02)
    assert min(facts["retained"].values()) > 0.999
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == model.tiny(0).state_dict().keys()
    printed = capsys.readouterr().out
    assert "parameters trained" in printed and "merged into the weights" in printed and "for backward" in printed


def test_side_by_side_with_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    arguments = [*SMALL, "--adapter", "dora", "--dropout", "0", "--compare", "peft"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    ours, theirs = json.loads((tmp_path / train.REPORT).read_text())["lanes"]
    assert theirs["label"].startswith("PEFT") and ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert ours["loss"][0] != ours["loss"][-1]
    merged = [load_file(tmp_path / name / "model.safetensors") for name in ("model", "model-compared")]
    for name, tensor in merged[0].items():
        torch.testing.assert_close(tensor, merged[1][name], atol=1e-3, rtol=0)
    assert "times our forward and backward" in capsys.readouterr().out


def test_a_new_run_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    """An adapter, or its configuration, or a delta beside a model that they are not of would be loaded as if they were. Own files stay."""
    pytest.importorskip("peft")
    short = ["--quick", "--steps", "2", "--batch", "4", "--threads", "1"]
    runs = [["--adapter", "lora", "--compare", "peft"], ["--adapter", "ssf"], ["--sparse", "0.1"], ["--optimizer", "SGD"]]
    files = lambda folder: {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    used = tmp_path / "used"
    (used / "model").mkdir(parents=True)
    (used / "model" / "notes.txt").write_text("mine")
    (used / "adapter.txt").write_text("mine")
    for i, options in enumerate(runs):
        for out in (used, tmp_path / str(i)):
            assert main([*short, *options, "--out", str(out)]) == 0
        assert files(used) - files(tmp_path / str(i)) == {"model/notes.txt", "adapter.txt"}, options
    assert not (used / "adapter").exists() and not (used / "model-compared").exists()


def test_absent_peft_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    find = adapters.importlib.util.find_spec
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    assert main([*SMALL, "--adapter", "lora", "--compare", "peft", "--out", str(tmp_path)]) == 2
    assert "pip install peft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rank", "4"], "add --adapter lora"),
        (["--adapter", "lora", "--dropout", "1"], "below 1"),
        (["--adapter", "vera", "--compare", "peft"], "got --adapter vera"),
        (["--compare", "peft"], "got no adapter"),
        (["--adapter", "ia3", "--init", "pissa"], "drop --init"),
        (["--adapter", "ia3", "--rank", "4"], "got --rank 4; drop --rank"),
        (["--adapter", "ssf", "--dropout", "0.5"], "which has no rank"),
        (["--adapter", "adalora", "--steps", "1"], "got 1; train longer"),
        (["--adapter", "lora", "--dtype", "bf16", "--master-weights", "split"], "adapters are fp32"),
        (["--adapter", "lora", "--optimizer", "AdaHessian"], "second derivatives"),  # its estimate was 0, and its steps lr / eps
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", *arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.match(r"finetune: expected .*; .*; ", error) and said in error
    assert not (tmp_path / "run").exists()


def test_a_rank_beyond_the_weights_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Known once the model is."""
    assert main([*SMALL, "--adapter", "lora", "--rank", "1000", "--init", "pissa", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("finetune: expected --rank of at most 48 with --init pissa; got 1000;")
    assert not list((tmp_path / "run").iterdir())


def test_layers_run_through_the_fused_call() -> None:
    _, adapter = adapted("lora")
    assert all(isinstance(layer, LoRALinear) for layer in adapter.layers.values())

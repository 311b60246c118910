"""`python -m fusedadapt merge`."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusedadapt import cli
from fusedadapt.sparse import merge


@pytest.fixture(autouse=True)
def one_torch_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    torch.manual_seed(0)
    for name in ("base", "m0", "m1"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.randn(20, 30).bfloat16(), "b": torch.randn(30)}, tmp_path / name / "model.safetensors")
    for file, text in {
        "config.json": "{}",
        "tokenizer.json": "[]",
        "README.md": "of the base",
        "1_Pooling/config.json": "[1]",
        "modeling_own.py": "#",
    }.items():
        (tmp_path / "base" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / file).write_text(text)
    return [str(tmp_path / name) for name in ("base", "m0", "m1")]


def test_merges_and_brings_the_companions(folders, tmp_path, capsys):
    out = tmp_path / "out"
    base, *models = folders
    options = ["--base", base, "--method", "ties", "--density", "0.2", "--weights", "0.5", "1", "--lambda", "0.8", "--compat", "peft"]
    assert cli.main(["merge", *models, *options, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert re.search(r"out: 2 models, ties, [\d.]+ s, peak memory \d+ MiB", printed.out)
    assert "merge ties" in printed.err  # the progress bar
    expected = merge(base, models, "ties", density=0.2, weights=[0.5, 1], lambda_=0.8, compat="peft")
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    there = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert there == {"model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json", "modeling_own.py"}


def test_every_option_arrives(folders, tmp_path, capsys):
    base, *models = folders
    out = tmp_path / "o.safetensors"

    def run(*arguments):
        out.unlink(missing_ok=True)
        return cli.main(["merge", *models, *arguments, "--quiet", "--out", str(out)])

    read = lambda: load_file(out)
    assert run("--base", base, "--density", "0.5", "--compat", "mergekit", "--rescale", "--majority-sign-method", "frequency") == 0
    options = {"density": 0.5, "compat": "mergekit", "rescale": True, "majority_sign_method": "frequency"}
    assert torch.equal(read()["b"], merge(base, models, "ties", **options)["b"])
    assert run("--method", "linear", "--dtype", "float16", "--no-normalize") == 0
    assert torch.equal(read()["w"], merge(None, models, "linear", dtype=torch.float16, normalize=False)["w"])
    assert run("--base", base, "--method", "dare_linear", "--density", "0.3", "0.6", "--seed", "5", "--compat", "mergekit") == 0
    assert torch.equal(read()["b"], merge(base, models, "dare_linear", density=[0.3, 0.6], seed=5, compat="mergekit")["b"])
    assert run("--base", base, "--method", "della", "--density", "0.5", "--epsilon", "0.2", "--device", "cpu") == 0
    assert torch.equal(read()["b"], merge(base, models, "della", density=0.5, epsilon=0.2)["b"])
    assert run("--base", base, "--method", "breadcrumbs", "--density", "0.5", "--gamma", "0.2") == 0
    assert torch.equal(read()["b"], merge(base, models, "breadcrumbs", density=0.5, gamma=0.2)["b"])
    assert run("--base", base, "--method", "darex", "--density", "0.5", "--q", "0.2") == 0
    assert torch.equal(read()["b"], merge(base, models, "darex", density=0.5, q=0.2)["b"])
    assert run("--method", "fisher", "--fishers", *models) == 0
    assert torch.equal(read()["b"], merge(None, models, "fisher", fishers=models)["b"])
    assert cli.main(["merge", models[0], "--base", base, "--method", "slerp", "--t", "0.3", "--quiet", "--out", str(tmp_path / "s")]) == 0
    assert torch.equal(load_file(tmp_path / "s" / "model.safetensors")["b"], merge(base, models[:1], "slerp", t=0.3)["b"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--density", "0.2", "--method", "tyes"], "tyes"),
        ([], "density"),
        (["--density", "2"], "density in [0, 1]"),
        (["--density", "0.2", "--weights", "1"], "2 finite weights"),
        (["--density", "0.2", "--base", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--density", "0.2", "--device", "nowhere"], "'nowhere'"),
    ],
)
def test_errors_are_one_line(folders, tmp_path, capsys, arguments, words):
    base, *models = folders
    chosen = arguments if "--base" in arguments else ["--base", base, *arguments]
    assert cli.main(["merge", *models, *chosen, "--quiet", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("merge: expected") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()


def test_an_empty_name_is_no_place_to_write_to(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["merge", *folders[1:], "--method", "linear", "--quiet", "--out", ""]) == 2
    assert "expected --out to name a file or a folder" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


def test_a_failing_write_is_one_line(folders, tmp_path, capsys, monkeypatch):
    from fusedadapt.sparse import weights

    def full(tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "tensor_bytes", full)
    base, *models = folders
    assert cli.main(["merge", *models, "--base", base, "--density", "0.2", "--quiet", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "No space left on device; nothing was written" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_companion_that_fails_leaves_nothing(folders, tmp_path, capsys, monkeypatch):
    """Weights without a tokenizer would be found complete by the next who looks."""
    real = shutil.copyfileobj

    def full(source, target):
        if source.name.endswith("tokenizer.json"):
            target.write(source.read()[:1])
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(shutil, "copyfileobj", full)
    base, *models = folders
    before = sorted(tmp_path.rglob("*"))
    arguments = ["merge", *models, "--base", base, "--density", "0.2", "--quiet", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "No space left on device; nothing was written" in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    assert cli.main(arguments) == 0 and (tmp_path / "out" / "tokenizer.json").read_text() == "[]"


def test_what_is_there_already_is_not_overwritten(folders, tmp_path, capsys):
    """A finished model is worth more than a run with the wrong --out; `quantize` refuses likewise."""
    base, *models = folders
    single = tmp_path / "other.safetensors"
    save_file({"w": torch.ones(3)}, single)
    finished = tmp_path / "finished"
    shutil.copytree(base, finished)
    configured = tmp_path / "configured"
    configured.mkdir()
    (configured / "config.json").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out, wanted in ((single, "a new file"), (finished, "a new or empty folder"), (configured, "a new or empty folder")):
        assert cli.main(["merge", *models, "--base", base, "--density", "0.2", "--quiet", "--out", str(out)]) == 2
        assert capsys.readouterr().err == f"merge: expected {out} to be {wanted}; it is there already; choose another or remove it\n"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    assert cli.main(["merge", *models, "--base", base, "--density", "0.2", "--quiet", "--out", str(tmp_path / "empty")]) == 0


def test_where_it_cannot_write(folders, tmp_path, capsys):
    base, *models = folders
    (tmp_path / "file").write_text("")
    for out in ("/proc/nowhere", "/proc/x.safetensors", str(tmp_path / "file" / "out")):
        assert cli.main(["merge", *models, "--base", base, "--density", "0.2", "--quiet", "--out", out]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"merge: expected to write {out}; ") and error.count("\n") == 1

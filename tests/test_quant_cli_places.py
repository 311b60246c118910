"""`python -m fusedadapt quantize` where a file or folder cannot be: one line, a code that says whose fault it is, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
import quant_models as models

from fusedadapt import cli
from fusedadapt.quant import linears


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(linears, "_installed", lambda: False)
    return models.write(tmp_path / "model", models.state())


def run(*arguments: object) -> int:
    return cli.main(["quantize", *map(str, arguments), "--quiet"])


@pytest.mark.parametrize("out", ["/proc/nowhere/out", "/proc/out", "{}/model/config.json/out"])
def test_where_no_folder_can_be_is_a_failed_write(out, folder, tmp_path, capsys):
    """Not a fault of the command line, and not the operating system's words alone."""
    assert run(folder, out.format(tmp_path)) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"quantize: expected to read {folder} and write {out.format(tmp_path)}; ") and said.endswith("nothing was written\n")
    assert said.count("\n") == 1 and "Errno" not in said


def test_where_no_report_can_be_is_said_before_the_model_is_quantized(folder, tmp_path, capsys):
    """An hour later is too late."""
    (tmp_path / "file").write_text("")
    for report in (Path("/proc/report.json"), tmp_path / "file" / "report.json", folder):
        assert run(folder, tmp_path / "out", "--json", report) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"quantize: expected to write the report to {report}; ") and said.endswith("; nothing was written\n")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model"]


def test_the_report_may_lie_in_folders_that_are_not_there_yet(folder, tmp_path):
    assert run(folder, tmp_path / "a" / "out", "--json", tmp_path / "a" / "out" / "report.json") == 0
    assert run(folder, tmp_path / "b", "--json", tmp_path / "reports" / "new" / "b.json") == 0
    for report in (tmp_path / "a" / "out" / "report.json", tmp_path / "reports" / "new" / "b.json"):
        assert report.read_text().startswith("{")

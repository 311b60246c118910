"""`python -m fusedadapt`: the command line's own behaviour, and the doctor's report."""

from __future__ import annotations

import re
import subprocess
import sys
import types

import pytest

import fusedadapt
from fusedadapt import cli, dispatch, doctor


def test_no_command_prints_help_and_an_unknown_one_is_an_error(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 2
    said = capsys.readouterr().out
    assert said.startswith("usage: python -m fusedadapt") and all(name in said for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as ended:
        cli.main(["heal"])
    assert ended.value.code == 2 and "invalid choice: 'heal'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"fusedadapt {fusedadapt.__version__}\n"


def test_a_command_gets_the_rest_of_the_line_and_gives_the_exit_code(monkeypatch: pytest.MonkeyPatch):
    seen = []
    fake = types.SimpleNamespace(main=lambda argv: seen.append(argv) or 3)
    monkeypatch.setitem(sys.modules, "fusedadapt.doctor", fake)
    assert cli.main(["doctor", "--help", "x"]) == 3
    assert seen == [["--help", "x"]]


@pytest.mark.parametrize(
    ("module", "fix"), [("fusedadapt.nowhere", "reinstall fusedadapt"), ("fusedadapt.lacking", r"pip install 'fusedadapt\[demo\]'")]
)
def test_a_missing_module_is_named_with_its_cure(module, fix, monkeypatch, tmp_path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "lacking.py").write_text("import a_package_that_is_not_here\n")
    monkeypatch.setattr(fusedadapt, "__path__", [*fusedadapt.__path__, str(tmp_path)])
    monkeypatch.setitem(cli.COMMANDS, "doctor", (module, ""))
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert re.search(fix, said) and ("a_package_that_is_not_here" in said) == ("lacking" in module)


def test_ctrl_c_ends_any_command_with_one_line(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("fusedadapt.doctor.main", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "fusedadapt doctor: interrupted\n"


def test_ctrl_c_while_a_command_is_imported_is_one_line_too(monkeypatch, tmp_path, capsys):
    """That takes two seconds: torch comes with it."""
    (tmp_path / "slow.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.setattr(fusedadapt, "__path__", [*fusedadapt.__path__, str(tmp_path)])
    monkeypatch.setitem(cli.COMMANDS, "doctor", ("fusedadapt.slow", ""))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "fusedadapt doctor: interrupted\n"


def test_a_setting_that_is_none_ends_commands_in_one_line_and_the_doctor_names_it(monkeypatch, capsys):
    monkeypatch.setenv("FUSEDADAPT_BACKEND", "cdua")
    monkeypatch.setitem(cli.COMMANDS, "bench", ("fusedadapt.nowhere", ""))
    assert cli.main(["bench", "optim"]) == 2
    expected = "FUSEDADAPT_BACKEND: expected one of reference, cpp, triton, cuda; got 'cdua'; correct the name or leave it out"
    assert capsys.readouterr().err == f"fusedadapt bench: {expected}\n"
    monkeypatch.setattr(doctor, "self_test", lambda seconds: [("AdamW on cpu/reference", "ok")])
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert expected in said and said.endswith("but nothing else runs with this value of FUSEDADAPT_BACKEND\n")
    monkeypatch.setenv("FUSEDADAPT_BACKEND", "cpp")
    monkeypatch.setenv("FUSEDADAPT_STRICT", "1")
    assert cli.main(["doctor"]) == 0
    assert re.search(r"settings\n  FUSEDADAPT_BACKEND  cpp\n  FUSEDADAPT_STRICT   1\n", capsys.readouterr().out)
    monkeypatch.delenv("FUSEDADAPT_BACKEND")
    monkeypatch.delenv("FUSEDADAPT_STRICT")
    assert doctor.main(["--no-self-test"]) == 0 and "FUSEDADAPT_" not in capsys.readouterr().out


def test_every_command_has_a_module():
    # In a process of its own: importing all of them here would hide what one of them forgets to import.
    code = "import importlib, fusedadapt.cli as c; [getattr(importlib.import_module(m), 'main') for m, _ in c.COMMANDS.values()]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_report_names_versions_backends_and_passes_here(capsys: pytest.CaptureFixture[str]):
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    core = "instruction set" if dispatch.core() else dispatch.core_reason()
    for piece in ("python", "torch", "numpy", core, "backends for cpu tensors", "reference", "AdamW on cpu/reference"):
        assert piece in said, piece
    assert "verdict: everything run here works" in said
    assert said.isascii() and "\x1b" not in said, "it is to be pasted"


def test_every_backend_present_is_tested_and_every_absent_one_has_a_reason():
    results = dict(doctor.self_test())
    for name, reason in dispatch.available_backends("cpu").items():
        tested = [what for what in results if what.endswith(f"cpu/{name}")]
        assert len(tested) == (0 if reason else len(doctor.RULES)), (name, reason)


def test_looking_only_runs_nothing(monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(doctor, "self_test", lambda *_: pytest.fail("it ran"))
    assert doctor.main(["--no-self-test"]) == 0
    assert "self-test" not in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["shifted", "nan", "raises"])
def test_a_faulty_backend_is_found(fault, monkeypatch, capsys: pytest.CaptureFixture[str]):
    good = doctor._run

    def faulty(rule, backend, device_type, dtype):
        found = good(rule, "reference", device_type, dtype)
        if backend == "reference" or rule != "Lion":
            return found
        if fault == "raises":
            raise RuntimeError("Lion: expected a working kernel; none; mend it")
        found[-1][-1] += float("nan") if fault == "nan" else 1e-3
        return found

    monkeypatch.setattr(doctor, "_run", faulty)
    monkeypatch.setattr(
        dispatch,
        "available_backends",
        lambda _: dict.fromkeys(("reference", "cpp"), "") | dict.fromkeys(("triton", "cuda", "emulated"), "no"),
    )
    assert doctor.main([]) == 1
    said = capsys.readouterr().out
    assert {"raises": "FAILED to run: RuntimeError: Lion", "nan": "WRONG: off by nan", "shifted": "WRONG: off by 1.0e-03"}[fault] in said
    assert "verdict: FAULT in 1 of 6: Lion on cpu/cpp" in said


def test_time_is_bounded_but_no_backend_goes_unseen():
    results = list(doctor.self_test(seconds=-1.0))
    assert {verdict.startswith("not run") for what, verdict in results if not what.startswith(doctor.RULES[0])} == {True}
    assert not [what for what, verdict in results if what.startswith(doctor.RULES[0]) and verdict.startswith("not run")]

"""`bench/gpu.sh` beside a Python that only says what it was asked: which parts run, and what is left of one whose time is up."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  "-m pytest"*) exec {sys.executable} -c '
import time
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("what was found")
    raise SystemExit(2)' ;;
  *" doctor"*) exit 3 ;;
esac
echo "asked: $*"
"""


@pytest.fixture
def run(tmp_path):
    """gpu.sh in a checkout of its own, where nothing is built."""
    for name, text in (("python", PYTHON), ("nvidia-smi", '#!/usr/bin/env bash\n[[ "$*" == *compute_cap* ]] && echo 9.0 || echo Some GPU\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for folder in ("bench", "tests"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "bench" / "gpu.sh", tmp_path / "bench")
    (tmp_path / "tests" / "test_one.py").write_text("pytestmark = pytest.mark.gpu\n")

    def call(*parts, total=530):
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "TOTAL": str(total)}
        command = ["bash", str(tmp_path / "bench" / "gpu.sh"), *parts]
        done = subprocess.run(command, env=env | {"OUT": str(tmp_path / "out")}, capture_output=True, text=True, timeout=100)
        summary = tmp_path / "out" / "summary.txt"
        return done, [line.split(" after")[0] for line in summary.read_text().splitlines()] if summary.exists() else []

    return call


def test_an_interrupted_part_says_what_it_found(run):
    done, summary = run("tests", total=9)
    assert summary == ["build: exit 0", "tests: exit 124"] and done.returncode == 124
    assert "what was found" in done.stdout


def test_only_the_parts_asked_for(run):
    done, summary = run("quant", "doctor")
    assert summary == ["build: exit 0", "doctor: exit 3", "quant: exit 0"] and done.returncode == 3
    [asked] = [line for line in done.stdout.splitlines() if line.startswith("asked: -m fusedadapt bench")]
    assert "bench quant --device cuda" in asked and 490 <= int(asked.split("--within ")[1].split()[0]) <= 500


def test_unknown_parts(run):
    done, summary = run("tests", "speed")
    assert done.returncode == 2 and summary == [] and "expected parts among doctor tests bench lowrank quant sparse" in done.stderr

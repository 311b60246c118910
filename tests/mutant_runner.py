"""Runs tests of another copy of the package in a process forked from one that has already imported what every test imports: 1 s instead of 4."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = ["torch", "torch._dynamo", "numpy", "triton.language", "pytest", "hypothesis", "safetensors.torch"]
CPU_SECONDS, SECONDS = 120, 900  # a busy machine is slow, not hanging
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(PRELOAD)


def run_tests(tree: Path, nodes: list[str]) -> tuple[int, str]:
    """pytest's exit code and the end of its output for ``nodes``, run on the package in ``tree``; -1 if it does not end."""
    output = tree / "output.txt"
    process = server.Process(target=child, args=(str(tree), nodes, str(output)))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return -1, f"it hangs: no end after {SECONDS} s"
    assert process.exitcode is not None
    if process.exitcode < 0:
        return -1, f"signal {-process.exitcode} ended it; the time of a processor is limited to {CPU_SECONDS} s"
    return process.exitcode, output.read_text(errors="replace")[-4000:]


def child(tree: str, nodes: list[str], output: str) -> None:
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    os.chdir(tree)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    os.environ.update(PYTHONPATH=f"{tree}{os.pathsep}{tree}/tests", PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    sys.dont_write_bytecode = True
    ours = (str(ROOT), str(ROOT / "tests"), "")
    sys.path[:] = [tree, f"{tree}/tests", *(p for p in sys.path if p not in ours)]
    assert not any(name.partition(".")[0] == "fusedadapt" for name in sys.modules), "the sound package is loaded already"
    import torch

    torch.set_num_threads(1)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", *nodes]))

"""The CUDA stand-in: right kernels run rightly, and each seeded GPU bug is reported (the cases are in cpp/test_emulator.cpp)."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["tests/cpp/test_emulator.cpp", "csrc/emulator/emulator.cpp"]
FLAGS = "-std=c++17 -g -O1 -Wall -Wextra -Werror -DFA_EMULATE -Icsrc -fsanitize=address,undefined -fno-sanitize-recover=all".split()

# Named here as well as in the C++ file, so that a case deleted there is missed here.
CASES = """
block_reduction coordinates_1d_2d_3d dynamic_shared_memory warp_operations vector_access_and_bug_misaligned
launch_configuration seeded_order recovers_after_an_error many_deep_stacks bug_missing_barrier
bug_missing_second_barrier bug_missing_syncwarp bug_uninitialised_shared bug_shared_of_another_block
bug_divergent_barrier bug_barrier_of_two_kinds bug_barrier_after_exit bug_barrier_in_uneven_loop
bug_shuffle_after_exit bug_shuffle_in_branches bug_shuffle_without_self bug_shuffle_from_outside
bug_shuffle_in_part_warp bug_vote_against_barrier bug_too_much_shared bug_write_out_of_bounds
bug_shared_out_of_bounds
""".split()


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++: the emulator is built by the test")
    binary = tmp_path_factory.mktemp("emulator") / "test_emulator"
    done = subprocess.run([compiler, *FLAGS, *SOURCES, "-o", str(binary)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return binary


def test_every_case_is_listed(program: Path) -> None:
    listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    assert sorted(listed) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_case(program: Path, case: str) -> None:
    done = subprocess.run([program, case], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ok   {case}" in done.stdout


def test_a_failing_case_fails_the_program(program: Path) -> None:
    assert subprocess.run([program, "no_such_case"], capture_output=True).returncode != 0

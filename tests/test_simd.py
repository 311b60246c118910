"""What the compiler made of the CPU code, read from the object code: vector division and roots; fused multiply-adds in low-rank products only."""

import itertools
import platform
import re
import shutil
import subprocess
from collections import Counter

import pytest

from fusedadapt import _core

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="reads x86-64 code with objdump")


@pytest.fixture(scope="module")
def code() -> list[str]:
    """All instructions in the order of their addresses, each with the width of its operands."""
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", _core.__file__], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s+[0-9a-f]+:\s+(\w+)\s*(.*)$", listing, re.M)
    return [f"{name} {'zmm' if '%zmm' in operands else 'ymm' if '%ymm' in operands else 'xmm'}" for name, operands in found]


@pytest.fixture(scope="module")
def instructions(code: list[str]) -> dict[str, int]:
    return Counter(code)


@pytest.mark.parametrize("width", ["ymm", "zmm"])
def test_the_rules_are_vectorised(instructions: dict[str, int], width: str) -> None:
    """Sixteen rules take a root and divide by it, in the plain, the masked and the bf16 loop."""
    assert instructions.get(f"vsqrtps {width}", 0) >= 16
    assert instructions.get(f"vdivps {width}", 0) >= 16


def test_no_fused_multiply_add_in_the_sweep_and_no_approximation(code: list[str], instructions: dict[str, int]) -> None:
    """The binary has no symbols, so the sweep is known by its roots and divisions: the low-rank products, which may fuse, lie apart from those, one
    stretch of code for each instruction set that can fuse.
    """
    banned = [name for name in instructions if re.match(r"v?rsqrt|v?rcp", name)]
    assert not banned, banned
    marks = ["fused" if re.match(r"vf(n)?m(add|sub)", name) else "sweep" for name in code if re.match(r"vf(n)?m(add|sub)|vsqrtps|vdivps", name)]
    stretches = [mark for mark, _ in itertools.groupby(marks)]
    assert stretches.count("fused") == 2, stretches

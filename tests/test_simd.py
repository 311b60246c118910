"""What the compiler made of the CPU sweep, read from the object code: vector division and roots, and never a fused multiply-add."""

import platform
import re
import shutil
import subprocess

import pytest

from fusedadapt import _core

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="reads x86-64 code with objdump")


@pytest.fixture(scope="module")
def instructions() -> dict[str, int]:
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", _core.__file__], capture_output=True, text=True, check=True).stdout
    counts: dict[str, int] = {}
    for name, operands in re.findall(r"^\s+[0-9a-f]+:\s+(\w+)\s*(.*)$", listing, re.M):
        width = "zmm" if "%zmm" in operands else "ymm" if "%ymm" in operands else "xmm"
        counts[f"{name} {width}"] = counts.get(f"{name} {width}", 0) + 1
    return counts


@pytest.mark.parametrize("width", ["ymm", "zmm"])
def test_the_rules_are_vectorised(instructions: dict[str, int], width: str) -> None:
    """Sixteen rules take a root and divide by it, in the plain, the masked and the bf16 loop."""
    assert instructions.get(f"vsqrtps {width}", 0) >= 16
    assert instructions.get(f"vdivps {width}", 0) >= 16


def test_no_fused_multiply_add_and_no_approximation(instructions: dict[str, int]) -> None:
    banned = [name for name in instructions if re.match(r"v?f(n)?m(add|sub)|v?rsqrt|v?rcp", name)]
    assert not banned, banned

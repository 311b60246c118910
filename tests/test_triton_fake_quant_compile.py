"""The Triton kernels of fake quantization to machine code, no GPU needed: fused or approximate arithmetic, access widths, spills, registers.

python tests/test_triton_fake_quant_compile.py --write     compiles everything for every architecture and rewrites the register table
"""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import triton_gate as gate  # noqa: E402

TABLE = ROOT / "bench" / "results" / "registers_triton_fake_quant.json"
ARCHS = (80, 90, 100)
# Numbers of the optional tensors, division.
PLAIN = dict(DIVIDE=False, ZERO=0, OFFSET=0, BOUNDS=0)
FULL = dict(DIVIDE=True, ZERO=2, OFFSET=2, BOUNDS=2)
RUN = dict(LAYOUT=0, ROWS=1, COLS=2048, STEPS=4, WIDE=True)
GROUPS = dict(LAYOUT=1, ROWS=16, COLS=128, STEPS=1, WIDE=True)
NARROW = dict(LAYOUT=1, ROWS=64, COLS=32, STEPS=1, WIDE=False)
COLUMNS = dict(LAYOUT=2, ROWS=128, COLS=8, STEPS=32, WIDE=True)
FORWARD, BACKWARD = "forward_kernel", "backward_kernel"
CLAMP, ROUND, ALL = (dict(INSIDE=i, SUMS=True) for i in range(3))
# kernel: (function, element type, constants)
KERNELS = {
    "forward fp32": (FORWARD, "fp32", {**PLAIN, **RUN}),
    "forward bf16": (FORWARD, "bf16", {**PLAIN, **RUN}),
    "forward fp16 full": (FORWARD, "fp16", {**FULL, **RUN}),
    "forward bf16 groups": (FORWARD, "bf16", {**FULL, **GROUPS}),
    "forward fp32 narrow": (FORWARD, "fp32", {**FULL, **NARROW}),
    "forward fp32 columns": (FORWARD, "fp32", {**FULL, **COLUMNS}),
    "backward fp32": (BACKWARD, "fp32", {**PLAIN, **RUN, **CLAMP}),
    "backward bf16": (BACKWARD, "bf16", {**PLAIN, **RUN, **ROUND}),
    "backward fp16 full": (BACKWARD, "fp16", {**FULL, **RUN, **ROUND}),
    "backward bf16 groups": (BACKWARD, "bf16", {**FULL, **GROUPS, **CLAMP}),
    "backward fp32 narrow": (BACKWARD, "fp32", {**FULL, **NARROW, **ROUND}),
    "backward bf16 columns": (BACKWARD, "bf16", {**FULL, **COLUMNS, **ROUND}),
    "backward fp32 identity": (BACKWARD, "fp32", {**PLAIN, **RUN, **ALL}),
    "backward fp32 dx only": (BACKWARD, "fp32", {**PLAIN, **RUN, **CLAMP, "SUMS": False}),
}
EVERYWHERE = ("forward fp32", "backward bf16 groups", "backward bf16 columns")
# 128-bit loads; four bf16 a thread are 64 bits
WIDE = {name: 1 if name.startswith("forward") else 2 for name, kernel in KERNELS.items() if kernel[2]["WIDE"] and name != "backward bf16 columns"}


def compile_one(job: str) -> tuple[str, dict]:
    from fusedadapt.kernels import fake_quant

    kernel, arch = job.split("/sm_")
    name, element, constants = KERNELS[kernel]
    types = {array: f"*{element}" for array in ("x", "y", "dy", "dx")} | dict.fromkeys(("scale", "zero", "offset", "bounds", "partial"), "*fp32")
    built = gate.compiled_by_type(getattr(fake_quant, name), int(arch), fake_quant.OPTIONS, types, constants)
    return job, gate.figures(built)


@pytest.fixture(scope="module")
def built():
    return gate.compile_all(__file__, [f"{kernel}/sm_{arch}" for kernel in KERNELS for arch in ARCHS if arch == 90 or kernel in EVERYWHERE])


@pytest.mark.slow
def test_no_spill_and_no_generic_access(built):
    assert {job: r["spilled"] for job, r in built.items() if r["spilled"]} == {}
    assert {job: r["generic"] for job, r in built.items() if r["generic"]} == {}


@pytest.mark.slow
def test_arithmetic_is_ieee(built):
    for job, result in built.items():
        assert (result["fused"], result["approximate"], result["unrounded"]) == (0, 0, 0), (job, result)


@pytest.mark.slow
def test_aligned_path_moves_sixteen_bytes(built):
    for kernel, loads in WIDE.items():
        found = built[f"{kernel}/sm_90"]
        assert found["wide_loads"] >= loads and found["wide_stores"] >= 1, (kernel, found)


@pytest.mark.slow
def test_register_table(built):
    gate.check_table(TABLE, built, __file__)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    if sys.argv[1] == "--compile":
        print(json.dumps([compile_one(job) for job in sys.argv[2:]]))
    elif sys.argv[1] == "--write":
        gate.write_table(TABLE, gate.compile_all(__file__, [f"{kernel}/sm_{arch}" for kernel in KERNELS for arch in ARCHS]))


if __name__ == "__main__":
    main()

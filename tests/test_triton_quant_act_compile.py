"""The launches of products with quantized activations to machine code, no GPU needed: matrix instructions, access widths, spills, registers.

    python tests/test_triton_quant_act_compile.py --write     rewrites the register table

As in test_triton_lowrank_compile.py: the launchers run on empty CPU tensors with every kernel replaced by a recorder, in child processes that do
not interpret.
"""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import triton_gate as gate  # noqa: E402

TABLE = ROOT / "bench" / "results" / "registers_triton_quant_act.json"
ARCHS = (80, 90, 100)
# call: (codes of x, T, K, dtype of x and y); N is 4096
CALLS = {
    "codes int8 bf16": ("int8", 4096, 4096, "bfloat16"),
    "codes int8 fp32": ("int8", 4096, 4096, "float32"),
    "codes int8 row of 16384": ("int8", 4096, 16384, "bfloat16"),
    "codes int8 row of 53248": ("int8", 4096, 53248, "bfloat16"),
    "codes int8 odd": ("int8", 4096, 4095, "bfloat16"),
    "codes fp8 bf16": ("fp8_e4m3", 4096, 4096, "bfloat16"),
    "codes fp8 blocks": ("fp8_e4m3,block=1x128", 4096, 4096, "bfloat16"),
    "int8": ("int8", 2048, 4096, "bfloat16"),
    "int8 odd": ("int8", 2048, 4095, "bfloat16"),
    "int8 fp32": ("int8", 2048, 4096, "float32"),
    "int8 64 tokens": ("int8", 64, 4096, "bfloat16"),
    "int8 32 tokens": ("int8", 32, 4096, "bfloat16"),
    "int8 one token": ("int8", 1, 4096, "bfloat16"),
    "int8 beyond a chunk": ("int8", 128, 1 << 18, "bfloat16"),
    "fp8": ("fp8_e4m3", 2048, 4096, "bfloat16"),
    "fp8 odd": ("fp8_e4m3", 2048, 4095, "bfloat16"),
    "fp8 64 tokens": ("fp8_e4m3", 64, 4096, "bfloat16"),
    "fp8 one token": ("fp8_e4m3", 1, 4096, "bfloat16"),
    "fp8 blocks": ("fp8_e4m3,block=1x128", 2048, 4096, "bfloat16"),
    "fp8 blocks one token": ("fp8_e4m3,block=1x128", 1, 4096, "bfloat16"),
    "fp4": ("fp8_e4m3", 2048, 4096, "bfloat16"),
    "fp4 odd": ("fp8_e4m3", 2048, 4095, "bfloat16"),
    "fp4 64 tokens": ("fp8_e4m3", 64, 4096, "bfloat16"),
    "fp4 64 tokens in groups of 32": ("fp8_e4m3", 64, 4096, "bfloat16"),
    "fp4 one token": ("fp8_e4m3", 1, 4096, "bfloat16"),
}
EVERYWHERE = ("codes int8 bf16", "int8", "int8 one token", "codes fp8 blocks", "fp8", "fp8 blocks", "fp4", "fp4 64 tokens")
FP8 = ("fp8", "fp4")  # calls that multiply fp8


def runs_on(call: str, arch: int) -> bool:
    """Products of fp8 need sm_89; what is not in EVERYWHERE is compiled for sm_90 only."""
    return arch == 90 or (call in EVERYWHERE and (arch > 80 or not call.startswith(FP8)))


def record(call: str) -> tuple:
    """The one launch of a call."""
    import torch

    from fusedadapt.kernels import quant_act, quant_act_linear
    from fusedadapt.ops.quant_act import activation_spec
    from fusedadapt.quant import format_of
    from fusedadapt.quant.formats import QFormat
    from fusedadapt.reference.quant import Parts

    spec, t, k, dtype = CALLS[call]
    act, n, y = QFormat.parse(spec), 64 if k > 1 << 17 else 4096, getattr(torch, dtype)
    if call.startswith("codes"):
        return gate.record([quant_act], lambda: quant_act.act_quant(torch.empty(t, k, dtype=y), act))[0]
    if call.startswith("fp4"):
        fmt = format_of("fp4_e2m1", 32 if "32" in call else None)
    else:
        fmt = format_of(act.name, group_axis="block" if act.block[1] else "row")
    assert activation_spec(act.name, fmt) == act.spec
    above = None if fmt.above(n, k) is None else torch.empty(fmt.above(n, k))
    parts = Parts(torch.empty(fmt.packed(n, k), dtype=torch.uint8), torch.empty(fmt.grid(n, k), dtype=fmt.scale_dtype), super=above)
    codes, scale, bias = torch.empty(t, k, dtype=torch.uint8), torch.empty(act.grid(t, k)), torch.empty(n)
    launchers = {
        "int8": lambda: quant_act.int8_linear(codes, scale, parts, fmt, n, bias, y),
        "fp8_e4m3": lambda: quant_act.fp8_linear(codes, scale, act, parts, fmt, n, bias, y),
    }
    return gate.record([quant_act, quant_act_linear], launchers[act.name])[0]


def compile_one(job: str) -> tuple[str, dict]:
    call, arch = job.split("/sm_")
    built = gate.build(record(call), int(arch))
    ptx = built.asm["ptx"]
    found = {**gate.figures(built), "wide_copies": gate.wide_copies(ptx)}
    # tcgen05's are of the matrix units' own memory
    found["generic"] = len(re.findall(r"(?<!tcgen05\.)(?<!wait::)\b(?:ld|st)\.(?!global|shared|param)", ptx))
    return job, {**found, "machine": gate.machine(built.asm["cubin"], "[HIQ]G?MMA|UTC.MMA")}


def jobs() -> list[str]:
    return [f"{call}/sm_{arch}" for call in CALLS for arch in ARCHS if runs_on(call, arch)]


@pytest.fixture(scope="module")
def built():
    return gate.compile_all(__file__, jobs())


@pytest.mark.slow
def test_no_spill_and_no_generic_access(built):
    assert {job: r["spilled"] for job, r in built.items() if r["spilled"]} == {}
    assert {job: r["generic"] for job, r in built.items() if r["generic"]} == {}
    limits = {"80": 163, "90": 227, "100": 227}
    assert all(r["shared"] <= limits[job.split("sm_")[1]] * 1024 for job, r in built.items())


@pytest.mark.slow
def test_arithmetic_is_ieee(built):
    """Codes and int8 products are promised to the bit; sums of fp8 products may fuse."""
    for job, r in built.items():
        if not job.startswith(FP8):
            assert (r["fused"], r["approximate"], r["unrounded"]) == (0, 0, 0), (job, r)


@pytest.mark.slow
def test_matrix_instructions(built):
    for job, r in built.items():
        if not job.startswith("codes"):
            assert r["machine"], (job, r)
            if job.endswith("sm_90") and CALLS[job.split("/")[0]][1] >= 64:
                assert any("GMMA" in name for name in r["machine"]), (job, r)


@pytest.mark.slow
def test_large_operands_move_sixteen_bytes(built):
    for job, r in built.items():
        if "odd" not in job:
            assert r["wide_loads"] + r["wide_copies"] >= 2, (job, r)


@pytest.mark.slow
def test_register_table(built):
    gate.check_table(TABLE, built, __file__)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    if sys.argv[1] == "--compile":
        print(json.dumps([compile_one(job) for job in sys.argv[2:]]))
    elif sys.argv[1] == "--write":
        gate.write_table(TABLE, gate.compile_all(__file__, jobs()))


if __name__ == "__main__":
    main()

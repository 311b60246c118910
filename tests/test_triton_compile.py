"""Every Triton optimizer kernel to machine code, no GPU needed, and what the interpreter cannot show: fused or approximate arithmetic,
access widths, spills, registers.

    python tests/test_triton_compile.py --write     compiles everything for every architecture and rewrites the register table

The compiler runs in child processes: this one may have been told to interpret.
"""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import triton_gate as gate  # noqa: E402

TABLE = ROOT / "bench" / "results" / "registers_triton.json"
ARCHS = (80, 90, 100)
EVERYWHERE = ("sgd", "lion", "adam", "adabelief", "diffgrad", "adahessian")  # these for every architecture, the others for sm_90
# Coded states: the rules of one, two and three states; blocks of int8's and fp8's own size, the largest, and compact entries.
CODED = ("lion+coded256", "adam+coded256", "adam+coded128", "adam+coded2048", "adam+coded256s", "adabelief+coded256", "ademamix+coded256")
LIBRARY_MATH = ("adahessian",)  # its power goes through libdevice's fp64, which fuses
POINTERS = {"desc": "*i64", "chunks": "*i64", "rows": "*fp32", "grad_scale": "*fp32", "found_inf": "*fp32", "clip": "*fp32", "out": "*fp64"}
POINTERS["tables"] = "*fp32"


def compile_one(job: str) -> tuple[str, dict]:
    """job: kernel/sm_arch; a kernel is a rule, a rule with "+scattered", "+coded" and its block ("+coded256s": scattered, too),
    "+stochastic" or "+fused" (must fail the gate), or "square_sums"."""
    from fusedadapt.kernels import optim, optim_coded, optim_scattered

    kernel, arch = job.split("/sm_")
    rule, _, variant = kernel.partition("+")
    fn, constants, options = optim.square_sums, {"BLOCK": optim.BLOCK}, optim.OPTIONS
    if rule != "square_sums":
        home, record = optim_scattered if variant == "scattered" else optim, optim.RULES[rule]
        fn, constants = home.sweep, {"BLOCK": home.BLOCK}
        if coded := re.fullmatch(r"coded(\d+)(s?)", variant):
            home, scattered = optim_coded, bool(coded[2])
            size, options = optim_coded.tile(int(coded[1]))
            fn, constants = home.sweep, {"BLOCK": size, "GROUP": int(coded[1]), "SCATTERED": scattered}
        constants.update(RULE=record.fn, STATES=record.states, STORED=record.stored, STOCHASTIC=variant == "stochastic")
    options = {**options, "enable_fp_fusion": variant == "fused"}
    return job, gate.figures(gate.compiled_by_type(fn, int(arch), options, POINTERS, constants))


def rules() -> list[str]:
    from fusedadapt import _core

    return [name for name, _, _ in _core.RULES]


@pytest.fixture(scope="module")
def built():
    jobs = [f"{rule}/sm_{arch}" for rule in rules() for arch in ARCHS if arch == 90 or rule in EVERYWHERE]
    apart = [f"{rule}+scattered/sm_90" for rule in EVERYWHERE]
    coded = [f"{kernel}/sm_90" for kernel in CODED]
    return gate.compile_all(__file__, [*jobs, *apart, *coded, "adam+stochastic/sm_90", "adam+fused/sm_90", "square_sums/sm_90"])


@pytest.mark.slow
def test_no_spill_and_no_generic_access(built):
    assert {job: r["spilled"] for job, r in built.items() if r["spilled"]} == {}
    assert {job: r["generic"] for job, r in built.items() if r["generic"]} == {}


@pytest.mark.slow
def test_arithmetic_is_ieee(built):
    for job, result in built.items():
        kernel = job.split("/")[0]
        if kernel.partition("+")[0] not in LIBRARY_MATH and not kernel.endswith("+fused"):
            assert (result["fused"], result["approximate"], result["unrounded"]) == (0, 0, 0), (job, result)
    assert built["adam+fused/sm_90"]["fused"] > 0, "the gate sees no fma even where there must be some"


@pytest.mark.slow
def test_aligned_path_moves_sixteen_bytes(built):
    from fusedadapt import _core

    for rule, states, stored in _core.RULES:
        result = built[f"{rule}/sm_90"]
        # an fp32 array takes two accesses per thread, a bf16 and an fp16 one share theirs or have one each
        assert result["wide_loads"] >= 3 * (2 + states) and result["wide_stores"] >= 3 * (1 + stored), (rule, result)
        if f"{rule}+coded256" in CODED:  # four elements a thread: sixteen bytes of fp32 alone; codes go four at a time
            assert built[f"{rule}+coded256/sm_90"]["wide_loads"] >= 2 and built[f"{rule}+coded256/sm_90"]["wide_stores"] >= 1
    assert built["square_sums/sm_90"]["wide_loads"] >= 3


@pytest.mark.slow
def test_register_table(built):
    gate.check_table(TABLE, {job: result for job, result in built.items() if not job.split("/")[0].endswith("+fused")}, __file__)


def test_static_ranges_are_named_constants():
    """The oldest Triton we support takes a field of a record for a plain number there, and refuses the kernel."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.static_range":
                assert all(isinstance(arg, ast.Name | ast.Constant) for arg in node.args), f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def main() -> None:
    sys.path.insert(0, str(ROOT))
    if sys.argv[1] == "--compile":
        print(json.dumps([compile_one(job) for job in sys.argv[2:]]))
    elif sys.argv[1] == "--write":
        scattered = [f"{rule}+scattered" for rule in rules()]
        jobs = [f"{kernel}/sm_{arch}" for kernel in (*rules(), *scattered, *CODED, "adam+stochastic", "square_sums") for arch in ARCHS]
        gate.write_table(TABLE, gate.compile_all(__file__, jobs), threads=128)


if __name__ == "__main__":
    main()

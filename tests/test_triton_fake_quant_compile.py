"""The Triton kernels of fake quantization to machine code, no GPU needed: fused or approximate arithmetic, access widths, spills, registers.

python tests/test_triton_fake_quant_compile.py --write     compiles everything for every architecture and rewrites the register table
"""

import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from test_triton_compile import measure, resources  # noqa: E402

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
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fusedadapt.kernels import fake_quant

    kernel, arch = job.split("/sm_")
    name, element, constants = KERNELS[kernel]
    fn = getattr(fake_quant, name)
    loose = [p.name for p in fn.params if not p.is_constexpr and not p.do_not_specialize]
    assert not loose, f"{kernel}: arguments whose value would force a new compilation: {loose}"
    types = {array: f"*{element}" for array in ("x", "y", "dy", "dx")} | dict.fromkeys(("scale", "zero", "offset", "bounds", "partial"), "*fp32")
    signature = {p.name: "constexpr" if p.is_constexpr else types.get(p.name, p.annotation_type) for p in fn.params}
    built = triton.compile(ASTSource(fn, signature, constants), target=GPUTarget("cuda", int(arch), 32), options=fake_quant.OPTIONS)
    return job, {**measure(built.asm["ptx"]), **resources(built.asm["cubin"], built.hash), "shared": built.metadata.shared}


def compile_all(jobs: list[str]) -> dict[str, dict]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    shares = [jobs[k :: os.cpu_count() or 1] for k in range(os.cpu_count() or 1)]

    def run(share):
        child = subprocess.run([sys.executable, __file__, "--compile", *share], env=env, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr[-4000:]
        return json.loads(child.stdout)

    with concurrent.futures.ThreadPoolExecutor(len(shares)) as pool:
        return dict(pair for part in pool.map(run, filter(None, shares)) for pair in part)


@pytest.fixture(scope="module")
def built():
    return compile_all([f"{kernel}/sm_{arch}" for kernel in KERNELS for arch in ARCHS if arch == 90 or kernel in EVERYWHERE])


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
    """The committed table, exact for the compiler it was made with; any other must not need many more registers."""
    import triton

    committed = json.loads(TABLE.read_text())
    for job, result in built.items():
        known = committed["kernels"][job]
        if committed["triton"] == triton.__version__:
            assert result == known, f"{job}: after a change that is meant, python tests/test_triton_fake_quant_compile.py --write"
        else:
            assert result["registers"] <= known["registers"] + 32, (job, result, known)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    if sys.argv[1] == "--compile":
        print(json.dumps([compile_one(job) for job in sys.argv[2:]]))
    elif sys.argv[1] == "--write":
        import triton

        kernels = dict(sorted(compile_all([f"{kernel}/sm_{arch}" for kernel in KERNELS for arch in ARCHS]).items()))
        lines = ",\n".join(f'    "{job}": {json.dumps(result)}' for job, result in kernels.items())
        TABLE.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "kernels": {{\n{lines}\n  }}\n}}\n')


if __name__ == "__main__":
    main()

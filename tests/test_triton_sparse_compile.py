"""The sparse Triton kernels to machine code, no GPU needed: fused or approximate arithmetic, access widths, spills, registers.

python tests/test_triton_sparse_compile.py --write     compiles everything for every architecture and rewrites the register table
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

TABLE = ROOT / "bench" / "results" / "registers_triton_sparse.json"
ARCHS = (80, 90, 100)
POINTERS = {"items": "*i64", "chunks": "*i64", "prefix": "*i64", "threshold": "*i64", "equal": "*i64", "before": "*i64", "parts": "*i64"}
# kernel: (function, constants, pointers of other types)
KERNELS = {
    "histogram abs": ("histogram_kernel", dict(SCORE=0, BINS=2048, TILE=4096), dict(out="*i64")),
    "histogram product": ("histogram_kernel", dict(SCORE=3, BINS=2048, TILE=4096), dict(out="*i64")),
    "ties abs": ("ties_kernel", dict(SCORE=0, TILE=2048), dict(out="*i64")),
    "mark abs": ("mark_kernel", dict(SCORE=0, TILE=2048), {}),
    "mark scaled": ("mark_kernel", dict(SCORE=2, TILE=2048), {}),
    "mark diff": ("mark_kernel", dict(SCORE=1, TILE=2048), {}),
    "nm 4": ("nm_kernel", dict(SCORE=0, M=4, TILE=2048), {}),
    "nm any": ("nm_kernel", dict(SCORE=0, M=0, TILE=2048), {}),
    "pack": ("pack_kernel", dict(TILE=4096), {}),
    "unpack": ("unpack_kernel", dict(TILE=4096), dict(words="*i32")),
    "counts": ("counts_kernel", dict(GROUPS=64), dict(words="*i32", counts="*i64")),
    "gather bf16": ("move_kernel", dict(OP=0, TILE=1024), dict(x="*i16", values="*i16", index="*i32")),
    "scatter bf16 fp32": ("move_kernel", dict(OP=1, TILE=1024), dict(x="*bf16", values="*fp32", index="*i32")),
    "add bf16": ("move_kernel", dict(OP=2, TILE=1024), dict(x="*bf16", values="*bf16", index="*i32")),
    "swap fp32": ("move_kernel", dict(OP=3, TILE=1024), dict(x="*i32", values="*i32", index="*i64")),
    "merge sum": ("merge_kernel", dict(COMBINE=0, HAS_BASE=True, BLOCK=1024), {}),
    "merge paper": ("merge_kernel", dict(COMBINE=1, HAS_BASE=True, BLOCK=1024), {}),
    "merge mergekit": ("merge_kernel", dict(COMBINE=3, HAS_BASE=True, BLOCK=1024), {}),
    "votes": ("votes_kernel", dict(HAS_BASE=True, BLOCK=1024), dict(out="*i64")),
    "norms": ("norms_kernel", dict(HAS_BASE=True), dict(out="*fp64")),
}
EVERYWHERE = ("histogram abs", "mark abs", "merge paper", "add bf16")
WIDE = {
    "nm 4": 3,
    "pack": 1,
    "histogram abs": 3,
    "histogram product": 6,
    "ties abs": 3,
    "mark abs": 3,
    "mark diff": 6,
    "merge sum": 6,
    "merge paper": 9,
}  # 128-bit loads


def compile_one(job: str) -> tuple[str, dict]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fusedadapt.kernels import sparse, sparse_merge

    kernel, arch = job.split("/sm_")
    name, constants, pointers = KERNELS[kernel]
    home = sparse if hasattr(sparse, name) else sparse_merge
    fn = getattr(home, name)
    loose = [p.name for p in fn.params if not p.is_constexpr and not p.do_not_specialize]
    assert not loose, f"{kernel}: arguments whose value would force a new compilation: {loose}"
    signature = {p.name: "constexpr" if p.is_constexpr else {**POINTERS, **pointers}.get(p.name, p.annotation_type) for p in fn.params}
    built = triton.compile(ASTSource(fn, signature, constants), target=GPUTarget("cuda", int(arch), 32), options=home.OPTIONS)
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
        assert built[f"{kernel}/sm_90"]["wide_loads"] >= loads, (kernel, built[f"{kernel}/sm_90"])


@pytest.mark.slow
def test_register_table(built):
    """The committed table, exact for the compiler it was made with; any other must not need many more registers."""
    import triton

    committed = json.loads(TABLE.read_text())
    for job, result in built.items():
        known = committed["kernels"][job]
        if committed["triton"] == triton.__version__:
            assert result == known, f"{job}: after a change that is meant, python tests/test_triton_sparse_compile.py --write"
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

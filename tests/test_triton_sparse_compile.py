"""The sparse Triton kernels to machine code, no GPU needed: fused or approximate arithmetic, access widths, spills, registers.

python tests/test_triton_sparse_compile.py --write     compiles everything for every architecture and rewrites the register table
"""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import triton_gate as gate  # noqa: E402

TABLE = ROOT / "bench" / "results" / "registers_triton_sparse.json"
ARCHS = (80, 90, 100)
POINTERS = {"items": "*i64", "chunks": "*i64", "prefix": "*i64", "threshold": "*i64", "equal": "*i64", "before": "*i64", "parts": "*i64"}
POINTERS["rows"] = "*i64"
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
    "indices": ("indices_kernel", dict(TILE=1024), dict(words="*i32", out="*i32")),
    "set indices": ("set_indices_kernel", dict(TILE=1024), dict(words="*i32", index="*i32")),
    "gather": ("move_kernel", dict(OP=0, TILE=1024), {}),
    "scatter": ("move_kernel", dict(OP=1, TILE=1024), {}),
    "add": ("move_kernel", dict(OP=2, TILE=1024), {}),
    "swap": ("move_kernel", dict(OP=3, TILE=1024), {}),
    "find bin": ("find_bin_kernel", dict(BINS=2048), dict(counts="*i64", found="*i64")),
    "place diff": ("place_kernel", dict(SCORE=1, TILE=2048), dict(ties="*i64", out="*i64")),
    "rows 64": ("rows_kernel", dict(SCORE=0, TILE=64, ONE=True, WIDE=False, PART=False, LAYOUT=2), {}),
    "rows 4096": ("rows_kernel", dict(SCORE=0, TILE=4096, ONE=True, WIDE=True, PART=False, LAYOUT=0), {}),
    "rows scaled 4096": ("rows_kernel", dict(SCORE=2, TILE=4096, ONE=True, WIDE=True, PART=True, LAYOUT=0), {}),
    "rows scaled 8192": ("rows_kernel", dict(SCORE=2, TILE=8192, ONE=True, WIDE=True, PART=True, LAYOUT=0), {}),
    "rows scaled 16384": ("rows_kernel", dict(SCORE=2, TILE=16384, ONE=True, WIDE=True, PART=True, LAYOUT=0), {}),
    "rows diff 16384": ("rows_kernel", dict(SCORE=1, TILE=16384, ONE=True, WIDE=True, PART=False, LAYOUT=0), {}),
    "rows diff 8192": ("rows_kernel", dict(SCORE=1, TILE=8192, ONE=True, WIDE=False, PART=False, LAYOUT=1), {}),
    "rows long": ("rows_kernel", dict(SCORE=3, TILE=2048, ONE=False, WIDE=True, PART=False, LAYOUT=0), {}),
    "energy": ("energy_kernel", dict(SCORE=0, TILE=2048), dict(out="*i64")),
    "colstat": ("colstat_kernel", dict(BLOCK=256), dict(out="*fp64")),
    "add slices": ("add_slices_kernel", dict(BLOCK=256), dict(parts="*fp64", out="*fp32")),
    "merge sum": ("merge_kernel", dict(COMBINE=0, BY_COUNT=False, HAS_BASE=True, BLOCK=1024), {}),
    "merge paper": ("merge_kernel", dict(COMBINE=1, BY_COUNT=False, HAS_BASE=True, BLOCK=1024), {}),
    "merge mergekit": ("merge_kernel", dict(COMBINE=3, BY_COUNT=False, HAS_BASE=True, BLOCK=1024), {}),
    "merge peft by count": ("merge_kernel", dict(COMBINE=2, BY_COUNT=True, HAS_BASE=True, BLOCK=1024), {}),
    "votes": ("votes_kernel", dict(BY_COUNT=False, HAS_BASE=True, BLOCK=1024), dict(out="*i64")),
    "norms": ("norms_kernel", dict(HAS_BASE=True), dict(out="*fp64")),
}
EVERYWHERE = ("histogram abs", "mark abs", "merge paper", "add", "rows scaled 16384", "energy")
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
    "rows 4096": 6,
    "rows scaled 16384": 6,
    "energy": 3,
}  # 128-bit loads


def compile_one(job: str) -> tuple[str, dict]:
    from fusedadapt.kernels import sparse_mask, sparse_merge, sparse_parts, sparse_rows, sparse_select, sparse_stats

    kernel, arch = job.split("/sm_")
    name, constants, pointers = KERNELS[kernel]
    home = next(m for m in (sparse_mask, sparse_merge, sparse_rows, sparse_select, sparse_stats) if hasattr(m, name))
    options = sparse_merge.OPTIONS if home is sparse_merge else sparse_parts.OPTIONS
    if name == "rows_kernel":
        options = options | {"num_warps": sparse_rows.warps(constants["TILE"])}
    elif name in ("colstat_kernel", "add_slices_kernel"):
        options = sparse_stats.STRIP
    built = gate.compiled_by_type(getattr(home, name), int(arch), options, POINTERS | pointers, constants)
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
        assert built[f"{kernel}/sm_90"]["wide_loads"] >= loads, (kernel, built[f"{kernel}/sm_90"])


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

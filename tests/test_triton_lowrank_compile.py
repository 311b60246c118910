"""The low-rank launchers' own launches to machine code, no GPU needed: matrix instructions, access widths, spills, registers, recompilation.

    python tests/test_triton_lowrank_compile.py --write     rewrites the register table

The launchers run on empty CPU tensors with every kernel replaced by a recorder, in child processes that do not interpret: what is compiled is
exactly what a GPU would be asked to run, tile sizes and alignment included.
"""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import triton_gate as gate  # noqa: E402

TABLE = ROOT / "bench" / "results" / "registers_triton_lowrank.json"
ARCHS = (80, 90, 100)
MODULES = ("parts", "shrink", "grads", "expand")
# call: (function, T, K or N, ranks, thresholds, dtype of the large operand, dtype of A and B, extras); the first kernel it launches is measured
CALLS = {
    "shrink": ("shrink", 8192, 4096, [16], [0], "bf16", "bf16", ""),
    "shrink fp32 A": ("shrink", 8192, 4096, [16], [0], "bf16", "fp32", ""),
    "shrink fp16 fp32 A": ("shrink", 8192, 4096, [16], [0], "fp16", "fp32", ""),
    "shrink fp32": ("shrink", 8192, 4096, [16], [0], "fp32", "fp32", ""),
    "shrink dropout": ("shrink", 8192, 4096, [16], [6554], "bf16", "fp32", ""),
    "shrink qkv dropout": ("shrink", 8192, 4096, [16] * 3, [6554] * 3, "bf16", "fp32", ""),
    "shrink qkv some dropout": ("shrink", 8192, 4096, [16] * 3, [6554, 0, 6554], "bf16", "bf16", ""),
    "shrink rank 256": ("shrink", 8192, 4096, [256], [0], "bf16", "fp32", ""),
    "shrink one token": ("shrink", 1, 4096, [16], [0], "bf16", "bf16", ""),
    "skinny_w": ("skinny_w", 4096, 4096, [16], [0], "bf16", "fp32", ""),
    "bwd_x": ("bwd_x", 8192, 4096, [16], [0], "bf16", "", ""),
    "bwd_x dropout": ("bwd_x", 8192, 4096, [16], [6554], "bf16", "", ""),
    "bwd_x qkv dropout": ("bwd_x", 8192, 4096, [16] * 3, [6554] * 3, "bf16", "", ""),
    "bwd_x fp32": ("bwd_x", 8192, 4096, [64], [0], "fp32", "", ""),
    "bwd_dy": ("bwd_dy", 8192, 4096, [16], [0], "bf16", "bf16", ""),
    "bwd_dy fp32 B": ("bwd_dy", 8192, 4096, [16], [0], "bf16", "fp32", ""),
    "bwd_dy rank 32": ("bwd_dy", 8192, 4096, [32], [0], "bf16", "fp32", ""),
    "bwd_dy rank 64": ("bwd_dy", 8192, 4096, [64], [0], "bf16", "fp32", ""),
    "bwd_dy everything": ("bwd_dy", 8192, 4096, [16], [0], "bf16", "fp32", "all"),
    "bwd_dy rank 32 everything": ("bwd_dy", 8192, 4096, [32], [0], "bf16", "fp32", "all"),
    "bwd_dy rank 64 everything": ("bwd_dy", 8192, 4096, [64], [0], "bf16", "fp32", "all"),
    "bwd_dy fp32": ("bwd_dy", 8192, 4096, [16], [0], "fp32", "fp32", ""),
    "add_": ("add_", 8192, 4096, [16], [0], "bf16", "bf16", ""),
    "add_ B transposed": ("add_", 8192, 4096, [16], [0], "bf16", "fp32", "transposed"),
    "add_ dropout": ("add_", 8192, 4096, [16], [6554], "bf16", "fp32", ""),
    "add_ qkv dropout": ("add_", 8192, 4096, [16] * 3, [6554] * 3, "bf16", "fp32", ""),
    "add_ rank 256": ("add_", 8192, 4096, [256], [0], "bf16", "bf16", ""),
    "scale_add_": ("scale_add_", 8192, 4096, [16], [0], "bf16", "bf16", "transposed"),
    "merge_": ("merge_", 4096, 4096, [16], [0], "bf16", "fp32", ""),
    "dropout": ("dropout", 8192, 4096, [1], [6554], "bf16", "", ""),
}
EVERYWHERE = ("shrink fp32 A", "bwd_x dropout", "bwd_dy fp32 B", "add_ dropout")  # these for every architecture, the others for sm_90
NO_PRODUCT = ("dropout",)
# tf32 operands lie in shared memory in another order, which takes copies of 8 and 4 bytes; scale_add_ reads row_scale a value at a time
NARROW = ("shrink fp16 fp32 A", "bwd_x fp32", "scale_add_")


def record(call: str, change: dict | None = None) -> list:
    """[(kernel, grid, arguments, options)] of one call; `change` replaces T, ranks or thresholds."""
    import torch

    import fusedadapt.kernels.lowrank  # noqa: F401

    modules = [sys.modules[f"fusedadapt.kernels.lowrank_{name}"] for name in MODULES]
    given = {**dict(zip(("op", "t", "k", "ranks", "h", "big", "small", "extra"), CALLS[call], strict=True)), **(change or {})}
    return gate.record(modules, lambda: run(torch, *given.values()))


def run(torch, op, t, k, ranks, h, big, small, extra):
    from fusedadapt.kernels import lowrank

    named = {short: getattr(torch, name) for name, short in gate.TYPES.items()}
    r = sum(ranks)
    x, u, seed = torch.empty(t, k, dtype=named[big]), torch.empty(t, r), torch.zeros(1, dtype=torch.int64)
    a = torch.empty((k, r) if extra == "transposed" or op == "bwd_dy" else (r, k), dtype=named[small or "fp32"])
    a = a.T if extra == "transposed" else a
    g = torch.empty(k) if extra == "all" else None
    calls = {
        "shrink": lambda: lowrank.shrink(x, a, seed, h, ranks),
        "skinny_w": lambda: lowrank.skinny_w(x, a),
        "bwd_x": lambda: lowrank.bwd_x(x, u, seed, h, ranks),
        "bwd_dy": lambda: lowrank.bwd_dy(x, u, a, g, None if g is None else x, g is not None),
        "add_": lambda: lowrank.add_(x, u, a, seed, h, ranks),
        "scale_add_": lambda: lowrank.scale_add_(x, u, a, torch.empty(k), None),
        "merge_": lambda: lowrank.merge_(x, u, a, None),
        "dropout": lambda: lowrank.dropout(x, seed, h[0]),
    }
    calls[op]()


@pytest.mark.parametrize("call", CALLS)
def test_fusion_is_chosen_at_every_launch(call):
    assert all(options.get("enable_fp_fusion") for *_, options in record(call)), [(fn.__name__, options) for fn, *_, options in record(call)]


def compile_one(job: str) -> tuple[str, dict]:
    call, arch = job.split("/sm_")
    built = gate.build(record(call)[0], int(arch))
    ptx = built.asm["ptx"]
    count = lambda pattern: len(re.findall(pattern, ptx))
    measured = {
        "threads": 32 * built.metadata.num_warps,
        "shared": built.metadata.shared,
        "wgmma": count(r"wgmma\.mma_async"),
        "tcgen05": count(r"tcgen05\.mma"),
        "mma": count(r"\bmma\.sync"),
        "wide_loads": count(r"\bld\.global[.\w:]*\.v4\.b32") + count(r"cp\.async\.c[ga]\.shared\.global[^;]*?, (?:0x10|16),"),
        "narrow_loads": count(r"\bld\.global(?![.\w:]*\.v4\.b32)") + count(r"cp\.async\.ca\.shared\.global[^;]*?, (?:0x)?[48],"),
        "wide_stores": count(r"\bst\.global[.\w:]*\.v4\.b32"),
        "local": count(r"\b(?:ld|st)\.local"),
    }
    measured["machine"] = gate.machine(built.asm["cubin"])
    return job, {**gate.resources(built.asm["cubin"], built.hash), **measured}


def compile_launches(calls: list[str]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for call in calls:
        for change in ({}, {"t": 8191, "k": 4095}):
            for launch in record(call, change)[0 if change else 1 :]:  # the first even one is measured above
                built = gate.build(launch, 90)
                result = {"kernel": launch[0].__name__, "even": not change, **gate.resources(built.asm["cubin"], built.hash)}
                found.setdefault(call, []).append(result)
    return found


def jobs(archs=ARCHS) -> list[str]:
    return [f"{call}/sm_{arch}" for call in CALLS for arch in archs if arch == 90 or call in EVERYWHERE]


@pytest.fixture(scope="module")
def built():
    return gate.compile_all(__file__, jobs())


@pytest.mark.slow
def test_no_spill(built):
    assert {job: r["spilled"] for job, r in built.items() if r["spilled"] or r["local"]} == {}
    limits = {"80": 163, "90": 227, "10": 227}
    assert all(r["shared"] <= limits[job.split("sm_")[1][:2]] * 1024 for job, r in built.items())


@pytest.mark.slow
def test_matrix_instructions(built):
    """wgmma wherever a program has the 64 rows for it."""
    for job, r in built.items():
        call, arch = job.split("/sm_")
        if call in NO_PRODUCT:
            continue
        if arch == "90" and CALLS[call][1] >= 64:
            assert r["wgmma"] > 0 and r["machine"].get("HGMMA", 0) > 0, (job, r)
        elif arch == "100" and CALLS[call][1] >= 64:
            assert r["tcgen05"] + r["mma"] > 0, (job, r)
        else:
            assert r["mma"] > 0 and r["machine"].get("HMMA", 0) > 0, (job, r)


@pytest.mark.slow
def test_large_operands_move_sixteen_bytes(built):
    for job, r in built.items():
        call = job.split("/")[0]
        assert r["wide_loads"] >= 4, (job, r)
        assert r["wide_stores"] >= 2 or CALLS[call][1] == 1, (job, r)
        if call not in NARROW:
            assert r["narrow_loads"] <= r["wide_loads"] // 2, (job, r)


@pytest.mark.slow
def test_register_table(built):
    gate.check_table(TABLE, built, __file__)


@pytest.mark.slow
def test_everything_launched_compiles():
    """All kernels of a call, not only the first, and the paths for odd sizes, whose rows start anywhere."""
    calls = ("shrink dropout", "bwd_x qkv dropout", "bwd_dy rank 64 everything", "add_ dropout", "scale_add_", "merge_", "dropout")
    for call, kernels in gate.child(__file__, "--launches", *calls).items():
        assert kernels and all(r["spilled"] == 0 for r in kernels if r["even"]), (call, kernels)


def test_values_cost_no_compilation():
    """Other p, T, ranks within the same power of two, and scale of course: the same kernel. Others: dropout in none, some or all segments."""
    for call, keys in gate.child(__file__, "--keys").items():
        assert len(set(keys)) == 1, (call, keys)


def keys() -> dict[str, list[str]]:
    """Per call, what its compilation depends on, for several values of everything that may change from call to call."""
    found = {}
    for call in ("shrink qkv dropout", "bwd_x qkv dropout", "add_ qkv dropout", "bwd_dy", "merge_", "dropout"):
        ranks, h = CALLS[call][3:5]
        key = lambda change, call=call: [(fn.__name__, gate.specialized(fn, args), options) for fn, _, args, options in record(call, change)]
        changes: list[dict] = [{"t": 8191}, {"t": 4097}, {"h": [v and v + 1 for v in h]}]
        if call not in ("dropout", "bwd_dy"):  # B's row is R long: a rank that is not a multiple of 16 costs one more compilation
            changes += [{"ranks": [12] * len(ranks)}] + ([{"ranks": [16, 8, 12], "h": [9, 7, 1]}] if len(ranks) == 3 else [])
        found[call] = [repr(key(change)[0]) for change in ({}, *changes)]
    return found


def main() -> None:
    sys.path.insert(0, str(ROOT))
    if sys.argv[1] == "--compile":
        print(json.dumps([compile_one(job) for job in sys.argv[2:]]))
    elif sys.argv[1] == "--launches":
        print(json.dumps(compile_launches(sys.argv[2:])))
    elif sys.argv[1] == "--keys":
        print(json.dumps(keys()))
    elif sys.argv[1] == "--write":
        gate.write_table(TABLE, gate.compile_all(__file__, jobs()))


if __name__ == "__main__":
    main()

"""The low-bit launchers' own launches to machine code, no GPU needed: fused or approximate arithmetic, access widths, matrix instructions, spills.

python tests/test_triton_quant_compile.py --write     rewrites the register table
"""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import triton_gate as gate  # noqa: E402

TABLE = ROOT / "bench" / "results" / "registers_triton_quant.json"
ARCHS = (80, 90, 100)
N = K = 4096
FORMATS = {
    "int8": ("int8", None, {}),
    "int8 per input": ("int8", 128, {"group_axis": "n"}),
    "int3": ("int3", None, {}),
    "int4": ("int4", None, {}),
    "hqq4": ("hqq4", None, {}),
    "nf4": ("nf4", None, {}),
    "nf4 nested": ("nf4", None, {"double_quant": True}),
    "fp4": ("fp4", None, {}),
    "dynamic8": ("dynamic8", None, {}),
    "fp8_e4m3": ("fp8_e4m3", None, {}),
    "fp8_e5m2 block": ("fp8_e5m2", None, {"group_axis": "block"}),
    "mxfp4": ("mxfp4", None, {}),
    "nvfp4": ("nvfp4", None, {}),
    "fp4_e2m1": ("fp4_e2m1", None, {}),
    "ternary": ("ternary", None, {}),
}
CODECS = {
    "stats": ("int8", "int8 per input", "int4", "nf4"),
    "encode": ("int8", "int3", "int4", "hqq4", "nf4", "fp4", "fp8_e4m3", "nvfp4"),
    "dequantize": ("int3", "int4", "nf4 nested", "dynamic8", "fp8_e5m2 block", "mxfp4", "fp4_e2m1"),
}
# "linear 16 int4 bf16": function, tokens, format, dtype of x
PRODUCTS = [
    *(f"linear {t} {name} bf16" for t in (1, 64) for name in ("int8 per input", "int3", "int4", "nf4 nested", "fp8_e4m3", "mxfp4", "nvfp4")),
    *(f"linear {t} {name} bf16" for t in (2, 16) for name in ("int4", "nf4", "ternary", "dynamic8")),
    *(f"dx 64 {name} bf16" for name in ("int3", "int4", "hqq4", "nf4", "nvfp4", "fp8_e5m2 block")),
    *(f"{what} {name} {dtype}" for what in ("linear 64", "dx 64") for name in ("int4", "nf4") for dtype in ("fp16", "fp32")),
    "linear 2 fp4_e2m1 bf16",
    "linear 64 fp4_e2m1 bf16",
    "dx 64 fp4_e2m1 bf16",
    "dx 16 nf4 bf16",
    "linear 2 int4 fp32",
]
CALLS = [f"{what} 0 {name} bf16" for what, names in CODECS.items() for name in names] + PRODUCTS
EVERYWHERE = (
    "encode 0 int4 bf16",
    "dequantize 0 nf4 nested bf16",
    "linear 2 int4 bf16",
    "linear 16 int4 bf16",
    "linear 64 nf4 nested bf16",
    "dx 64 nf4 bf16",
)


def launches(call: str, n: int = N, k: int = K) -> list:
    import torch

    from fusedadapt.kernels import quant_codec, quant_linear
    from fusedadapt.quant import format_of

    what, t, rest = call.split(" ", 2)
    name, dtype = rest.rsplit(" ", 1)
    base, size, options = FORMATS[name]
    fmt = format_of(base, size, **options)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    parts = empty_parts(fmt, n, k)
    w, factor = torch.empty(n, k, dtype=dtype), torch.empty(fmt.grid(n, k))
    x, dy, bias = torch.empty(int(t), k, dtype=dtype), torch.empty(int(t), n, dtype=dtype), torch.empty(n, dtype=dtype)
    calls = {
        "stats": lambda: quant_codec.stats(w, fmt),
        "encode": lambda: quant_codec.encode(w, factor, factor if fmt.zero else None, fmt),
        "dequantize": lambda: quant_codec.dequantize(parts, fmt, n, k, 0, n, dtype),
        "linear": lambda: quant_linear.linear(x, parts, fmt, n, bias),
        "dx": lambda: quant_linear.linear_dx(dy, parts, fmt, n, k),
    }
    return gate.record([quant_codec, quant_linear], calls[what])


def empty_parts(fmt, n: int, k: int):
    import torch

    from fusedadapt.reference.quant import Parts

    grid = fmt.grid(n, k)
    zero = {"": None, "uint8": torch.empty(grid, dtype=torch.uint8), "fp32": torch.empty(grid)}[fmt.zero]
    above = None if fmt.above(n, k) is None else torch.empty(fmt.above(n, k))
    offset = torch.empty(()) if fmt.scale == "nested" else None
    return Parts(torch.empty(fmt.packed(n, k), dtype=torch.uint8), torch.empty(grid, dtype=fmt.scale_dtype), zero, above, offset)


def compile_one(job: str) -> tuple[str, dict]:
    call, arch = job.split("/sm_")
    return job, gate.measured(gate.build(launches(call)[0], int(arch)))


def odd(calls: list[str]) -> dict[str, list[int]]:
    """Bytes spilled by every kernel of each call where no size divides anything."""
    found = {}
    for call in calls:
        built = [gate.build(launch, 90) for launch in launches(call, 4095, 4097)]
        found[call] = [gate.resources(b.asm["cubin"], b.hash)["spilled"] for b in built]
    return found


def keys() -> dict[str, list[str]]:
    """What the compilation of a call's first kernel depends on, for several shapes."""
    found = {}
    for call in ("stats 0 int8 bf16", "encode 0 nf4 bf16", "dequantize 0 int4 bf16", "linear 2 int4 bf16", "linear 64 nf4 bf16", "dx 64 int4 bf16"):
        key = lambda n, k, call=call: [repr((fn.__name__, gate.specialized(fn, args), options)) for fn, _, args, options in launches(call, n, k)][0]
        found[call] = [key(n, k) for n, k in ((4096, 4096), (8192, 4096), (4096, 14336), (4800, 11008))]
    return found


@pytest.fixture(scope="module")
def built():
    return gate.compile_all(__file__, [f"{call}/sm_{arch}" for call in CALLS for arch in ARCHS if arch == 90 or call in EVERYWHERE])


@pytest.mark.slow
def test_no_spill_and_no_generic_access(built):
    assert {job: r["spilled"] for job, r in built.items() if r["spilled"]} == {}
    limits = {"80": 163, "90": 227, "100": 227}
    assert all(r["shared"] <= limits[job.split("sm_")[1]] * 1024 for job, r in built.items())


@pytest.mark.slow
def test_codecs_are_ieee(built):
    for job, r in built.items():
        if job.split()[0] in CODECS:
            assert (r["fused"], r["approximate"], r["unrounded"], r["generic"]) == (0, 0, 0, 0), (job, r)


@pytest.mark.slow
def test_large_operands_move_sixteen_bytes(built):
    """Weights being quantized, weights being written, packed bytes and x. Codes of 3 bits are read byte by byte."""
    for job, r in built.items():
        what = job.split()[0]
        if what == "dequantize":
            assert r["wide_stores"] >= 1, (job, r)
        elif " int3 " not in job or what in CODECS:
            assert r["wide_loads"] + r["wide_copies"] >= 1, (job, r)


@pytest.mark.slow
def test_matrix_instructions(built):
    """Warp-group instructions from the first token on that is not multiplied in registers: weights stand upright."""
    for job, r in built.items():
        what, t = job.split()[:2]
        if what in CODECS or int(t) < 16:
            assert not r["machine"], (job, r)
        elif job.endswith("sm_90") and "fp32" not in job and (what == "linear" or t == "64"):
            assert r["machine"].get("HGMMA", 0) > 0, (job, r)
        else:
            assert sum(r["machine"].values()) > 0, (job, r)


@pytest.mark.slow
def test_register_table(built):
    gate.check_table(TABLE, built, __file__)


@pytest.mark.slow
def test_odd_sizes_compile():
    """Rows that start anywhere, rows that begin inside a byte: an address per element, for which registers may run short. And what adds shares."""
    calls = ("stats 0 int4 bf16", "encode 0 int3 bf16", "dequantize 0 nf4 bf16", "linear 2 nf4 bf16", "linear 16 int4 bf16", "dx 64 nf4 bf16")
    for call, spilled in gate.child(__file__, "--odd", *calls).items():
        assert spilled and spilled[0] <= 400 and not any(spilled[1:]), (call, spilled)


def test_shapes_cost_no_compilation():
    for call, found in gate.child(__file__, "--keys").items():
        assert len(set(found)) == 1, (call, found)


def main() -> None:
    if sys.argv[1] == "--compile":
        print(json.dumps([compile_one(job) for job in sys.argv[2:]]))
    elif sys.argv[1] == "--odd":
        print(json.dumps(odd(sys.argv[2:])))
    elif sys.argv[1] == "--keys":
        print(json.dumps(keys()))
    elif sys.argv[1] == "--write":
        gate.write_table(
            TABLE, gate.compile_all(__file__, [f"{call}/sm_{arch}" for call in CALLS for arch in ARCHS if arch == 90 or call in EVERYWHERE])
        )


if __name__ == "__main__":
    main()

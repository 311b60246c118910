"""The launches of products with quantized activations to machine code, no GPU needed: matrix instructions, access widths, spills, registers.

    python tests/test_triton_quant_act_compile.py --write     rewrites the register table

As in test_triton_lowrank_compile.py: the launchers run on empty CPU tensors with every kernel replaced by a recorder, in child processes that do
not interpret.
"""

import concurrent.futures
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from test_triton_compile import measure, resources  # noqa: E402
from test_triton_lowrank_compile import TYPES, machine, specialized  # noqa: E402

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
}
EVERYWHERE = ("codes int8 bf16", "int8", "int8 one token", "codes fp8 blocks", "fp8", "fp8 blocks")


def runs_on(call: str, arch: int) -> bool:
    """Products of fp8 need sm_89; what is not in EVERYWHERE is compiled for sm_90 only."""
    return arch == 90 or (call in EVERYWHERE and (arch > 80 or not call.startswith("fp8")))


def record(call: str) -> tuple:
    """(kernel, arguments, options) of the one launch of a call."""
    import torch

    from fusedadapt.kernels import quant_act, quant_act_linear
    from fusedadapt.ops.quant_act import activation_spec
    from fusedadapt.quant import format_of
    from fusedadapt.quant.formats import QFormat
    from fusedadapt.reference.quant import Parts

    launches: list[tuple] = []

    class Recorder:
        def __init__(self, fn):
            self.fn = fn

        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((self.fn, args, options))

    spec, t, k, dtype = CALLS[call]
    act, n, y = QFormat.parse(spec), 64 if k > 1 << 17 else 4096, getattr(torch, dtype)
    with pytest.MonkeyPatch.context() as patch:
        for module in (quant_act, quant_act_linear):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Recorder(getattr(module, name)))
        if call.startswith("codes"):
            quant_act.act_quant(torch.empty(t, k, dtype=y), act)
            return launches[0]
        fmt = format_of(act.name, group_axis="block" if act.block[1] else "row")
        assert activation_spec(act.name, fmt) == act.spec
        parts = Parts(torch.empty(n, k, dtype=torch.uint8), torch.empty(fmt.grid(n, k)))
        codes, scale, bias = torch.empty(t, k, dtype=torch.uint8), torch.empty(act.grid(t, k)), torch.empty(n)
        if act.name == "int8":
            quant_act.int8_linear(codes, scale, parts, fmt, n, bias, y)
        else:
            quant_act.fp8_linear(codes, scale, act, parts, fmt, n, bias, y)
    return launches[0]


def compile_one(job: str) -> tuple[str, dict]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    TYPES.update(int8="i8", uint8="u8", float8_e4m3fn="fp8e4nv")
    call, arch = job.split("/sm_")
    fn, args, options = record(call)
    built = triton.compile(ASTSource(fn, *specialized(fn, args)), target=GPUTarget("cuda", int(arch), 32), options=options)
    ptx = built.asm["ptx"]
    count = lambda pattern: len(re.findall(pattern, ptx))
    found = {**resources(built.asm["cubin"], built.hash), **measure(ptx), "shared": built.metadata.shared}
    found["wide_copies"] = count(r"cp\.async\.c[ga]\.shared\.global[^;]*?, (?:0x10|16),")
    found["generic"] = count(r"(?<!tcgen05\.)(?<!wait::)\b(?:ld|st)\.(?!global|shared|param)")  # tcgen05's are of the matrix units' own memory
    return job, {**found, "machine": machine(built.asm["cubin"], "[HIQ]G?MMA|UTC.MMA")}


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


def jobs() -> list[str]:
    return [f"{call}/sm_{arch}" for call in CALLS for arch in ARCHS if runs_on(call, arch)]


@pytest.fixture(scope="module")
def built():
    return compile_all(jobs())


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
        if not job.startswith("fp8"):
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
    """The committed table, exact for the compiler it was made with; any other must not need many more registers."""
    import triton

    committed = json.loads(TABLE.read_text())
    for job, result in built.items():
        known = committed["kernels"][job]
        if committed["triton"] == triton.__version__:
            assert result == known, f"{job}: after a change that is meant, python tests/test_triton_quant_act_compile.py --write"
        else:
            assert result["registers"] <= known["registers"] + 32, (job, result, known)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    if sys.argv[1] == "--compile":
        print(json.dumps([compile_one(job) for job in sys.argv[2:]]))
    elif sys.argv[1] == "--write":
        import triton

        kernels = dict(sorted(compile_all(jobs()).items()))
        lines = ",\n".join(f'    "{job}": {json.dumps(result)}' for job, result in kernels.items())
        TABLE.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "kernels": {{\n{lines}\n  }}\n}}\n')


if __name__ == "__main__":
    main()

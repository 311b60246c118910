"""Triton kernels to machine code without a GPU: what the compile gates share.

A gate names calls of launchers. They run on empty CPU tensors with every kernel replaced by a recorder; the launches they would have made are
compiled with the tile sizes and the alignment a GPU would see. The compiler runs in child processes: this one may have been told to interpret.
"""

import collections
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))

from test_triton_compile import measure, resources  # noqa: E402

TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int64": "i64", "float64": "fp64", "uint8": "u8", "int8": "i8", "int32": "i32"}


class Recorder:
    def __init__(self, fn, launches: list):
        self.fn, self.launches = fn, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.fn, grid, args, options))


def record(modules: list[ModuleType], call: Callable[[], object]) -> list:
    """[(kernel, grid, arguments, options)] of one call."""
    launches: list = []
    places = [(module, name, fn) for module in modules for name, fn in vars(module).items() if name.endswith("_kernel")]
    try:
        for module, name, fn in places:
            setattr(module, name, Recorder(fn, launches))
        call()
    finally:
        for module, name, fn in places:
            setattr(module, name, fn)
    return launches


def specialized(fn, args) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) as Triton's launcher would derive them."""
    signature, constants, attributes = {}, {}, {}
    for number, (p, value) in enumerate(zip(fn.params, args, strict=True)):
        if p.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not p.do_not_specialize):
            signature[p.name], constants[p.name] = "constexpr", value
        elif isinstance(value, int):
            signature[p.name] = p.annotation_type or ("i32" if abs(value) < 2**31 else "i64")
            if value % 16 == 0 and not p.do_not_specialize:
                attributes[(number,)] = [["tt.divisibility", 16]]
        else:
            signature[p.name] = "*" + TYPES[str(value.dtype).split(".")[1]]
            attributes[(number,)] = [["tt.divisibility", 16]]  # torch's allocations are
    return signature, constants, attributes


def build(launch, arch: int):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn, _, args, options = launch
    return triton.compile(ASTSource(fn, *specialized(fn, args)), target=GPUTarget("cuda", arch, 32), options=options)


def measured(built) -> dict:
    """Arithmetic, memory accesses, matrix instructions, registers of a compiled kernel."""
    ptx = built.asm["ptx"]
    copies = len(re.findall(r"cp\.async\.c[ga]\.shared\.global[^;]*?, (?:0x10|16),", ptx))
    found = {**resources(built.asm["cubin"], built.hash), **measure(ptx), "threads": 32 * built.metadata.num_warps, "shared": built.metadata.shared}
    return {**found, "wide_copies": copies, "machine": machine(built.asm["cubin"])}


def machine(cubin: bytes) -> dict[str, int]:
    """Matrix instructions in the machine code, by name."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    return dict(sorted(collections.Counter(re.findall(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", text)).items()))


def child(file: str, *arguments: str):
    """What a gate's file prints when run with `arguments`, by an interpreter that does not interpret."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, file, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def compile_all(file: str, jobs: list[str]) -> dict[str, dict]:
    shares = [jobs[k :: os.cpu_count() or 1] for k in range(os.cpu_count() or 1)]
    with concurrent.futures.ThreadPoolExecutor(len(shares)) as pool:
        return dict(pair for part in pool.map(lambda share: child(file, "--compile", *share), filter(None, shares)) for pair in part)


def check_table(table: Path, built: dict[str, dict], file: str) -> None:
    """Against the committed table: exact for the compiler it was made with; any other must not need many more registers."""
    import triton

    committed = json.loads(table.read_text())
    for job, result in built.items():
        known = committed["kernels"][job]
        if committed["triton"] == triton.__version__:
            assert result == known, f"{job}: after a change that is meant, python {Path(file).relative_to(ROOT)} --write"
        else:
            assert result["registers"] <= known["registers"] + 32, (job, result, known)


def write_table(table: Path, built: dict[str, dict]) -> None:
    import triton

    lines = ",\n".join(f'    "{job}": {json.dumps(result)}' for job, result in sorted(built.items()))
    table.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "kernels": {{\n{lines}\n  }}\n}}\n')

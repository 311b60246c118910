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
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int64": "i64", "float64": "fp64", "uint8": "u8", "int8": "i8", "int32": "i32"}
TYPES["float8_e4m3fn"] = "fp8e4nv"


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
    """A recorded launch, compiled."""
    fn, _, args, options = launch
    return compiled(fn, arch, options, *specialized(fn, args))


def compiled(fn, arch: int, options: dict, signature: dict, constants: dict, attributes: dict | None = None):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    return triton.compile(ASTSource(fn, signature, constants, attributes), target=GPUTarget("cuda", arch, 32), options=options)


def compiled_by_type(fn, arch: int, options: dict, types: dict[str, str], constants: dict):
    """A kernel whose arguments are named by type: no value of theirs may force a new compilation."""
    loose = [p.name for p in fn.params if not p.is_constexpr and not p.do_not_specialize]
    assert not loose, f"{fn.__name__}: arguments whose value would force a new compilation: {loose}"
    signature = {p.name: "constexpr" if p.is_constexpr else types.get(p.name, p.annotation_type) for p in fn.params}
    return compiled(fn, arch, options, signature, constants)


def figures(built) -> dict:
    """Arithmetic, memory accesses, registers and shared memory of a compiled kernel."""
    return {**measure(built.asm["ptx"]), **resources(built.asm["cubin"], built.hash), "shared": built.metadata.shared}


def measure(ptx: str) -> dict:
    count = lambda pattern: len(re.findall(pattern, ptx))
    return {
        "fused": count(r"\bfma\."),
        "approximate": count(r"\.approx|\.full|\.ftz"),
        "unrounded": count(r"\b(?:add|sub|mul|div|sqrt)\.f(?:32|64)\b"),
        "generic": count(r"\b(?:ld|st)\.(?!global|shared|param)"),
        "wide_loads": count(r"\bld\.global[.\w:]*\.v4\.b32"),
        "wide_stores": count(r"\bst\.global[.\w:]*\.v4\.b32"),
    }


def resources(cubin: bytes, name: str) -> dict:
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name[:16]}.cubin"
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def wide_copies(ptx: str) -> int:
    return len(re.findall(r"cp\.async\.c[ga]\.shared\.global[^;]*?, (?:0x10|16),", ptx))


def measured(built) -> dict:
    """Arithmetic, memory accesses, matrix instructions, registers of a compiled kernel."""
    found = {**resources(built.asm["cubin"], built.hash), **measure(built.asm["ptx"])}
    found.update(threads=32 * built.metadata.num_warps, shared=built.metadata.shared, wide_copies=wide_copies(built.asm["ptx"]))
    return {**found, "machine": machine(built.asm["cubin"])}


def machine(cubin: bytes, names: str = r"HGMMA|HMMA|UTC\w*MMA") -> dict[str, int]:
    """Matrix instructions in the machine code, by name."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    return dict(sorted(collections.Counter(re.findall(rf"\b({names})\b", text)).items()))


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


def write_table(table: Path, built: dict[str, dict], threads: int | None = None) -> None:
    import triton

    head = f'  "triton": "{triton.__version__}",\n' + (f'  "threads": {threads},\n' if threads else "")
    lines = ",\n".join(f'    "{job}": {json.dumps(result)}' for job, result in sorted(built.items()))
    table.write_text(f'{{\n{head}  "kernels": {{\n{lines}\n  }}\n}}\n')

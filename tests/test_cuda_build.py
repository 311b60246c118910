"""Compile gate of the CUDA kernels, no GPU needed: no spills, the committed register table, 128-bit accesses, no contraction of a * b + c, a build
that stays short and small.

python tests/test_cuda_build.py --write     writes bench/results/registers_cuda.json anew
"""

import concurrent.futures
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "bench" / "results" / "registers_cuda.json"
ARCHS = ("sm_80", "sm_90", "sm_100")
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-I", str(ROOT / "csrc")]  # as CMakeLists.txt
BUILD_BYTES = 60 << 20
PTX_BYTES = 14 << 20  # of sm_90; the whole build took 4.6 minutes on two cores at 12.3 (docs/architecture.md) and would take 5 at this
LIMIT = 128  # registers per thread for two blocks of 256 threads on an SM
SCATTERED = 255  # compact entries: one block; their positions and anchors leave 128 too few for three states
ONE_BLOCK = {"sm_80": 142, "sm_100": 166}  # coded states: where ptxas spills in 128 (on sm_80 three states, on sm_100 two)
WIDE = ("Adam", "Lion", "AdaBelief", "SGDMomentum")
LIBM = ("AdaHessian",)  # powf: fma inside, not promised bit for bit


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_nvcc() is None, reason="needs a missing compiler: nvcc (CUDA toolkit)")]


def cuobjdump() -> str | None:
    """CUDA's, or the one in Triton's wheel (found without importing Triton)."""
    spec = importlib.util.find_spec("triton")
    inside = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return shutil.which("cuobjdump") or (str(inside) if inside and inside.exists() else None)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return done.stdout + done.stderr


def short(mangled: str) -> str:
    """sweep<Adam> from _ZN2fa4cuda...12sweep_kernelINS_4AdamEEEvPK...; template arguments of RMSprop as digits. Likewise scattered<Adam>; move<2>
    from a template over numbers, set<l> from one over types."""
    kernel = re.search(r"\d+(\w+?)_kernel", mangled)
    assert kernel, mangled
    rule = re.search(r"_kernelI(.*?)EEv", mangled)
    what = re.sub(r".*\d", "", kernel[1])
    if not rule:
        return what
    name = re.search(r"\d+([A-Z][A-Za-z]+?)(?:I|E|$)(.*)", rule[1] + "E")
    plain = re.match(r"NS_(\d+)(.*)", rule[1])
    if not plain:
        numbers = re.findall(r"E(\d+)|L[bi](\d+)", rule[1] + "E")
        return f"{re.sub(r'.*[0-9]', '', kernel[1])}<{','.join(a or b for a, b in numbers) or rule[1]}>"
    assert name, mangled
    word, rest = plain[2][: int(plain[1])], plain[2][int(plain[1]) :]
    flags = "".join(re.findall(r"Lb([01])", rest))
    return f"{what}<{word}{'_' + flags if flags else ''}>"


def usage(report: str) -> dict[str, tuple[int, int]]:
    """ptxas -v: kernel -> (registers, spilled bytes)."""
    found, kernel, spilled = {}, None, 0
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            kernel, spilled = short(entry[1]), 0
        elif spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled += int(spill[1]) + int(spill[2])
        elif (registers := re.search(r"Used (\d+) registers", line)) and kernel:
            found[kernel] = (int(registers[1]), spilled)
    return found


def compile_all(folder: Path) -> dict[str, dict[str, tuple[int, int]]]:
    nvcc, sources = find_nvcc(), sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    assert nvcc and sources

    def job(arch: str) -> dict[str, tuple[int, int]]:
        kernels = {}
        for source in sources:
            keep = ["--keep", "--keep-dir", str(folder)] if arch == "sm_90" else []  # leaves the PTX there
            kernels |= usage(
                run(nvcc, *FLAGS, *keep, "-Xptxas", "-v", f"-arch={arch}", "-cubin", "-o", f"{folder}/{source.stem}.{arch}", str(source))
            )
        return kernels

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(ARCHS, pool.map(job, ARCHS)))


def compiler_version() -> str:
    return re.findall(r"release [\d.]+, V([\d.]+)", run(str(find_nvcc()), "--version"))[0]


def table_of(kernels: dict[str, dict[str, tuple[int, int]]]) -> dict[str, dict[str, int]]:
    return {name: {arch: kernels[arch][name][0] for arch in ARCHS} for name in sorted(kernels[ARCHS[0]])}


class Built(NamedTuple):
    folder: Path
    kernels: dict[str, dict[str, tuple[int, int]]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cuda")
    return Built(folder, compile_all(folder))


def architectures() -> dict[str, list[str]]:
    """Of a release, from CMakeLists.txt: what the front end compiles for -> what its PTX becomes."""
    listed = re.findall(r"arch=(compute_\d+),code=\[([\w,]+)\]", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    return {virtual: [name for name in codes.split(",") if name.startswith("sm_")] for virtual, codes in listed}


def test_a_release_holds_every_architecture():
    codes = architectures()
    assert sum(codes.values(), []) == ["sm_80", "sm_90", "sm_100", "sm_120"]
    assert all(arch in codes[f"compute_{arch[3:]}"] for arch in ARCHS), "what is compiled here is what a release compiles"


def test_the_whole_build_is_short_and_small(built):
    """In bytes, which no other load of the machine changes: those of the PTX decide the time."""
    assert sum(f.stat().st_size for f in built.folder.glob("*.ptx")) <= PTX_BYTES
    share = sum(map(len, architectures().values())) / len(ARCHS)
    code = sum(f.stat().st_size for arch in ARCHS for f in built.folder.glob(f"*.{arch}"))  # more than with line numbers, compressed
    host = sum(f.stat().st_size for f in (ROOT / "fusedadapt").glob("_core.*.so"))
    assert code and host and code * share + host <= BUILD_BYTES


def test_nothing_spills(built):
    kernels = built.kernels
    rules = (ROOT / "csrc/core/rules.h").read_text(encoding="utf-8")
    count = len(re.findall(r"X\(\w+, \w+\)", rules[rules.index("#define FA_RULES") :]))
    expected = 3 * count - 4 + 2  # three sweeps per rule, but two rules have no states and two none that may be coded; squares, prologue
    for arch, found in kernels.items():
        assert len(found) >= expected, f"{arch}: {sorted(found)}"
        most = {"scattered": SCATTERED, "coded": ONE_BLOCK.get(arch, LIMIT)}
        over = {k: v for k, v in found.items() if v[1] or v[0] > most.get(k.split("<")[0], LIMIT)}
        assert over == {}, f"{arch}: spills or more than {LIMIT} registers (registers, bytes)"


def test_register_table_is_current(built):
    committed = json.loads(TABLE.read_text(encoding="utf-8"))
    if committed["nvcc"] != compiler_version():
        pytest.skip(f"the table is nvcc {committed['nvcc']}'s; that compiler is missing here ({compiler_version()})")
    assert table_of(built.kernels) == committed["registers"], "registers changed; look at why, then: python tests/test_cuda_build.py --write"


@functools.cache
def sass_of(folder: Path, source: str) -> dict[str, str]:
    """Kernel -> its machine code on sm_90."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs a missing tool: cuobjdump (CUDA toolkit or Triton's wheel)")
    functions = re.split(r"Function : ", run(tool, "-sass", f"{folder}/{source}.sm_90"))[1:]
    return {short(f.split()[0]): f for f in functions}


def test_aligned_accesses_are_128_bits_and_global(built):
    sass = sass_of(built.folder, "optim")
    for rule in WIDE:
        body = sass[f"sweep<{rule}>"]
        states = 2 if rule in ("Adam", "AdaBelief") else 1
        assert len(re.findall(r"\bLDG\.E\.128", body)) >= 2 * (2 + states), rule
        assert len(re.findall(r"\bSTG\.E\.128", body)) >= 2 * (1 + states), rule
        generic = re.findall(r"\b(?:LD|ST)\.E\S*", body)
        assert not generic, f"{rule}: accesses through generic addresses: {generic}"
        assert not re.findall(r"\b(?:LDL|STL)\b", body), f"{rule}: local memory"


def test_coded_accesses_are_wide_and_global(built):
    sass = sass_of(built.folder, "optim_coded")
    for rule in WIDE:
        body, states = sass[f"coded<{rule}>"], 2 if rule in ("Adam", "AdaBelief") else 1
        assert len(re.findall(r"\bLDG\.E\.128", body)) >= 4 and len(re.findall(r"\bSTG\.E\.128", body)) >= 2, rule
        assert len(re.findall(r"\bLDG\.E\.64", body)) >= states and len(re.findall(r"\bSTG\.E\.64", body)) >= states, f"{rule}: codes"
        generic = re.findall(r"\b(?:LD|ST)\.E\S*", body)
        assert not generic, f"{rule}: accesses through generic addresses: {generic}"


@pytest.mark.parametrize("kernel", ["histogram<0>", "histogram<1>", "packed_histogram", "mark<0>", "mark<1>", "nm", "rows<0>", "rows<1>", "energy"])
def test_selection_reads_128_bits(built, kernel):
    source = {"mark": "sparse_mark", "nm": "sparse_rows", "rows": "sparse_rows", "energy": "sparse_stats"}.get(kernel.split("<")[0], "sparse_select")
    body = sass_of(built.folder, source)[kernel]
    # bf16 takes one access, fp32 two; of a score's second operand again. `mark` reads two runs at a time, twice.
    wanted = {"histogram<0>": 2, "mark<0>": 8, "mark<1>": 16}.get(kernel, 4)
    assert len(re.findall(r"\bLDG\.E\.128", body)) >= wanted
    assert not re.findall(r"\b(?:LDL|STL)\b", body), "local memory"


@pytest.mark.parametrize("kernel", [f"gemv<{t},{how}>" for t in (1, 2, 4, 8) for how in ("2,0", "4,0", "4,1", "8,0", "8,1")])
def test_products_read_128_bits(built, kernel):
    body = sass_of(built.folder, "quant_gemv")[kernel]
    # codes of four rows, before the loop and in it, and x
    assert len(re.findall(r"\bLDG\.E\.128", body)) >= 2 * 4 + int(kernel[5])
    assert re.search(r"\bFFMA\b", body), "products may be contracted"
    assert not re.findall(r"\b(?:LD|ST)\.E\S*", body), "accesses through generic addresses"
    assert not re.findall(r"\b(?:LDL|STL)\b", body), "local memory"


@pytest.mark.parametrize(
    "source", ["optim", "optim_coded", "sparse_select", "sparse_mark", "sparse_rows", "sparse_stats", "sparse_mask", "sparse_move"]
)
def test_arithmetic_is_ieee(built, source):
    """In PTX, because ptxas expands div.rn and sqrt.rn into exactly rounding fma sequences."""
    functions = re.split(r"\.entry ", (built.folder / f"{source}.ptx").read_text(encoding="utf-8"))[1:]
    for text in functions:
        name, text = short(re.match(r"\w+", text)[0]), text[: text.index("\n}")]
        approximate = re.findall(r"(?:div|sqrt|rcp|rsqrt)\.(?:approx|full)\S*|\S+\.ftz\S*", text)
        fused = re.findall(r"fma\S*\.f32", text)
        if not any(f"<{rule}>" in name for rule in LIBM):
            assert not approximate and not fused, f"{name}: {set(approximate)} {set(fused)}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        now = {"nvcc": compiler_version(), "flags": " ".join(FLAGS[:3]), "registers": table_of(compile_all(Path(scratch)))}
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(now, indent=1)
    TABLE.write_text(re.sub(r"\{\s+(\"sm_[^}]*?)\s+\}", lambda m: "{" + " ".join(m[1].split()) + "}", text) + "\n", encoding="utf-8")

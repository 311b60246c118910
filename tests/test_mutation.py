"""Can the tests fail? Every line of mutants.py breaks a copy of the package; the test it names must go red there, and green on the sound copy."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock
from mutant_runner import run_tests
from mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
# CMakeLists.txt marks a checkout: only there is kernels/ found beside fusedadapt/
COPIED = ("fusedadapt", "kernels", "csrc", "tests", "CMakeLists.txt", "pyproject.toml")
FLAGS = ["-std=c++17", "-O0", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-DFA_MODULE_NAME=_core"]
# Only the baseline instruction set is compiled: the others' tables point to it.
OTHER_SETS = """#include "cpu/fake_quant.h"
#include "cpu/lowrank.h"
#include "cpu/merge.h"
#include "cpu/optim.h"
#include "cpu/quant.h"
#include "cpu/quant_act.h"
#include "cpu/sparse.h"
#if defined(__x86_64__)
namespace fa::cpu {
extern const Kernels kernels_avx2 = kernels_base, kernels_avx512 = kernels_base;
extern const SparseKernels sparse_avx2 = sparse_base, sparse_avx512 = sparse_base;
extern const MergeKernels merge_avx2 = merge_base, merge_avx512 = merge_base;
extern const FakeKernels fake_avx2 = fake_base, fake_avx512 = fake_base;
extern const BandKernels band_avx2 = band_base, band_avx512 = band_base;
namespace lowrank {
extern const Kernels kernels_avx2 = kernels_base, kernels_avx512 = kernels_base;
extern const FewKernels few_avx2 = few_base, few_avx512 = few_base;
}
namespace quant_act {
extern const Kernels kernels_avx2 = kernels_base, kernels_avx512 = kernels_base, kernels_vnni = kernels_base;
}
namespace quant {
extern const CodecKernels codec_avx2 = codec_base, codec_avx512 = codec_base;
extern const ProductKernels product_avx2 = product_base, product_avx512 = product_base;
}
}
#endif
"""
UNITS = (
    "csrc/cpu/optim_isa.cpp", "csrc/cpu/optim.cpp", "csrc/cpu/compact.cpp", "csrc/cpu/positions_isa.cpp", "csrc/cpu/pool.cpp",
    "csrc/table_host.cpp", "csrc/table_warm.cpp", "csrc/table_compact.cpp",
    "csrc/table_coded.cpp", "csrc/torch_shim.cpp", "csrc/looks.cpp", "csrc/cpu/lowbit.cpp", "csrc/cpu/lowbit_isa.cpp",
    "csrc/bindings.cpp", "csrc/bindings_cuda.cpp",
    "csrc/cpu/lowrank.cpp", "csrc/cpu/lowrank_branch.cpp", "csrc/cpu/lowrank_few.cpp", "csrc/cpu/lowrank_isa.cpp", "csrc/cpu/lowrank_few_isa.cpp",
    "csrc/bindings_lowrank.cpp",
    "csrc/cpu/sparse.cpp", "csrc/cpu/sparse_mask.cpp", "csrc/cpu/sparse_move.cpp", "csrc/cpu/sparse_isa.cpp", "csrc/bindings_sparse.cpp",
    "csrc/cpu/merge.cpp", "csrc/cpu/merge_cut.cpp", "csrc/cpu/merge_isa.cpp", "csrc/cpu/merge_band_isa.cpp", "csrc/bindings_merge.cpp",
    "csrc/cpu/fake_quant.cpp", "csrc/cpu/fake_quant_isa.cpp", "csrc/bindings_fake_quant.cpp",
    "csrc/cpu/quant_act.cpp", "csrc/cpu/quant_act_isa.cpp", "csrc/bindings_quant_act.cpp",
    "csrc/cpu/quant.cpp", "csrc/cpu/quant_product.cpp", "csrc/cpu/quant_isa.cpp", "csrc/cpu/quant_product_isa.cpp", "csrc/bindings_quant.cpp",
)  # fmt: skip
# A shared header is always inlined, so the units that merely show it to Python keep working with the sound objects.
SWEEPS = ("csrc/cpu/optim_isa.cpp", "csrc/cpu/optim.cpp")
SHOWN = {
    "csrc/core/lowbit.h": ("csrc/cpu/lowbit.cpp", "csrc/cpu/lowbit_isa.cpp"),
    "csrc/core/philox.h": ("csrc/bindings.cpp",),
    "csrc/cpu/lowrank_parts.h": ("csrc/cpu/lowrank_isa.cpp",),
    "csrc/cpu/lowrank_vector.h": ("csrc/cpu/lowrank_isa.cpp",),
    "csrc/cpu/float8.h": ("csrc/cpu/quant_isa.cpp", "csrc/cpu/quant_act_isa.cpp"),
    "csrc/cpu/quant_dot.h": ("csrc/cpu/quant_product_isa.cpp",),
}
SHOWN |= {f"csrc/cpu/quant_{name}.h": ("csrc/cpu/quant_isa.cpp", "csrc/cpu/quant_product_isa.cpp") for name in ("vector", "decode", "lanes")}


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "") or "c++") or shutil.which("g++") or shutil.which("clang++")


def compile_unit(tree: Path, unit: str, out: Path) -> Path:
    """One object file of the copy in ``tree``."""
    extra = ["-DFA_ISA=base"] if unit.endswith("_isa.cpp") else []
    includes = [f"-I{tree / 'csrc'}", f"-I{sysconfig.get_paths()['include']}", f"-I{importlib.import_module('pybind11').get_include()}"]
    target = object_file(out, unit)
    call([str(compiler()), *FLAGS, *extra, *includes, "-c", str(tree / unit), "-o", str(target)])
    return target


def object_file(folder: Path, unit: str) -> Path:
    return folder / (unit.replace("/", "_") + ".o")


def link(objects: list[Path], tree: Path) -> None:
    module = tree / "fusedadapt" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    call([str(compiler()), "-shared", "-pthread", *map(str, objects), "-o", str(module)])


def call(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stderr[-3000:]}"


def copy_tree(out: Path) -> Path:
    out.mkdir(parents=True)
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.json", "tuned")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, out / name, ignore=skip)
        else:
            shutil.copy2(source, out / name)
    return out


def run_targets(tree: Path, targets: list[str]) -> tuple[int, str]:
    return run_tests(tree, [f"tests/{t if '.py' in t else 'mutation_targets.py::' + t}" for t in targets])


class Workshop:
    """The sound copy, its objects, and a place for each mutant. A folder that another worker has prepared is taken as it is."""

    def __init__(self, folder: Path):
        self.folder, self.sound = folder, folder / "sound"
        units = ("csrc/bindings.cpp", *(u for u in UNITS if u != "csrc/bindings.cpp"), "csrc/other_sets.cpp")
        self.objects = {unit: object_file(folder / "objects", unit) for unit in units}
        with FileLock(f"{folder}.lock"):
            if not self.sound.exists():
                self.prepare(folder / "preparing")

    def prepare(self, tree: Path) -> None:
        copy_tree(tree)
        (self.folder / "objects").mkdir()
        (tree / "csrc" / "other_sets.cpp").write_text(OTHER_SETS)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda unit: compile_unit(tree, unit, self.folder / "objects"), self.objects))
        link(list(self.objects.values()), tree)
        tree.rename(self.sound)

    def judge(self, number: int) -> str:
        """What became of a mutant: "" if its target went red, else what is wrong. Number -1: no mutant, every target must be green."""
        if number < 0:
            code, text = run_targets(self.sound, sorted({m.target for m in MUTANTS}))
            return "" if code == 0 else text
        mutant = MUTANTS[number]
        tree = copy_tree(self.folder / str(number))
        try:
            if fault := apply(mutant, tree):
                return fault
            if mutant.file.startswith("csrc"):
                units = (mutant.file,) if mutant.file in UNITS else SHOWN.get(mutant.file, SWEEPS)
                rebuilt = {unit: compile_unit(tree, unit, tree) for unit in units}
                link(list((self.objects | rebuilt).values()), tree)
            else:
                module = next((self.sound / "fusedadapt").glob("_core*.so"))
                os.link(module, tree / "fusedadapt" / module.name)
            code, text = run_targets(tree, [mutant.target])
        finally:
            shutil.rmtree(tree)
        if code == 1:
            return ""
        return "survived: its target stays green" if code == 0 else f"pytest ended with {code} instead of a failed test:\n{text}"


def apply(mutant: Mutant, tree: Path) -> str:
    path = tree / mutant.file
    text = path.read_text()
    if (count := text.count(mutant.old)) != 1:
        return f"stale: {mutant.old!r} stands {count} times in {mutant.file}"
    path.write_text(text.replace(mutant.old, mutant.new))
    return ""


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], str]]:
    """number -> verdict. Alone, the chosen mutants are judged two at a time; under xdist its workers share them out."""
    if compiler() is None:
        pytest.skip("no C++ compiler to build mutants with")
    pytest.importorskip("triton")
    if run := getattr(request.config, "workerinput", {}).get("testrunuid"):
        yield Workshop(tmp_path_factory.getbasetemp().parent / f"mutants-{run}").judge
        return
    shop = Workshop(tmp_path_factory.mktemp("mutants"))
    chosen = [item.callspec.params["number"] for item in request.session.items if item.function is test_mutant_is_caught]
    with ThreadPoolExecutor(2) as pool:
        futures = {n: pool.submit(shop.judge, n) for n in chosen}
        yield lambda n: futures[n].result()
        for future in futures.values():
            future.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(-1, len(MUTANTS)), ids=lambda n: "none" if n < 0 else f"{MUTANTS[n].file}: {MUTANTS[n].old}"[:70].strip())
def test_mutant_is_caught(verdicts: Callable[[int], str], number: int) -> None:
    verdict = verdicts(number)
    assert not verdict, f"{MUTANTS[number] if number >= 0 else 'no mutant'}: {verdict}"


def test_every_mutant_still_applies() -> None:
    """Quick, and part of every run: a mutant whose text is gone is to be rewritten, not forgotten."""
    assert len(MUTANTS) >= 20
    stale = [m for m in MUTANTS if (ROOT / m.file).read_text().count(m.old) != 1]
    assert not stale, f"these texts do not stand exactly once in their files any more: {stale}"

"""What is shipped and how it is written: sdist, wheel, editable install, checkout, and the budgets of the source itself."""

from __future__ import annotations

import ast
import glob
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("fusedadapt", "kernels", "bench")
CODE = (*SHIPPED, "csrc", "tests", "setup.py")
LOCAL = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "*.so", "_build_info.py", "__pycache__", ".*_cache", "runs", "results")


def files(*suffixes: str, under: tuple[str, ...] = CODE) -> list[Path]:
    places = [ROOT / name for name in under]
    found = [p for place in places for p in ([place] if place.is_file() else sorted(place.rglob("*"))) if p.suffix in suffixes]
    return [p for p in found if p.name != "_build_info.py"]


def parsed(*under: str) -> Iterator[tuple[str, ast.AST]]:
    for path in files(".py", under=under or CODE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


# --- budgets of the source -------------------------------------------------------------------------------------------------------------


def test_files_stay_within_400_lines():
    sizes = {p: p.read_text(encoding="utf-8").count("\n") for p in files(".py", ".cpp", ".cu", ".cuh", ".h")}
    assert len(sizes) > 10
    assert {str(p.relative_to(ROOT)): n for p, n in sizes.items() if n > 400} == {}


def test_functions_stay_within_60_lines():
    functions = [(at, n) for at, n in parsed() if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert len(functions) > 20
    assert [f"{at} {n.name}: {n.end_lineno - n.lineno + 1} lines" for at, n in functions if n.end_lineno - n.lineno + 1 > 60] == []


def test_only_config_reads_the_environment():
    readers = [at for at, n in parsed(*SHIPPED) if isinstance(n, ast.Attribute) and n.attr in ("environ", "environb", "getenv", "getenvb")]
    readers += [at for at, n in parsed(*SHIPPED) if isinstance(n, ast.ImportFrom) and n.module == "os" for a in n.names if "env" in a.name]
    assert [at for at in readers if not at.startswith("fusedadapt/config.py:")] == []
    assert readers, "config.py reads it, so a scan that finds nothing is broken"


def test_tensors_say_what_and_where_they_are():
    """torch's default dtype and device are the user's (test_defaults.py): scratch that follows them is of another size, or elsewhere."""
    typed = {"empty", "zeros", "ones", "full", "tensor", "linspace", "rand", "randn", "eye"}
    makers = typed | {"arange", "randint", "randperm", "empty_strided"}
    apart = ("fusedadapt/finetune", "fusedadapt/parity", "fusedadapt/testing", "fusedadapt/quant/foreign")
    found = []
    for at, n in parsed("fusedadapt", "kernels"):
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and ast.unparse(n.func.value) == "torch" and n.func.attr in makers:
            given = {keyword.arg for keyword in n.keywords}
            if not at.startswith(apart) and not (({"dtype", "device"} if n.func.attr in typed else {"device"}) <= given):
                found.append(f"{at} {ast.unparse(n)}")
    assert found == []


def test_no_handler_catches_everything():
    def catches_all(handler: ast.ExceptHandler) -> bool:
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        return any(kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException")) for kind in kinds)

    # tests may: what fails in another process or thread has to be carried into the one that can report it
    assert [at for at, n in parsed(*SHIPPED, "setup.py") if isinstance(n, ast.ExceptHandler) and catches_all(n)] == []


def test_nothing_is_autotuned():
    # An in-place kernel run to be timed has already changed its parameters.
    names = [(at, n.attr if isinstance(n, ast.Attribute) else n.id) for at, n in parsed() if isinstance(n, (ast.Attribute, ast.Name))]
    assert [at for at, name in names if name in ("autotune", "Autotuner")] == []


# --- importing -------------------------------------------------------------------------------------------------------------------------


def run(code: str, *, python: str | Path = sys.executable, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` with no FUSEDADAPT_*, PYTHON* or TRITON_* variable of the caller's."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FUSEDADAPT_", "PYTHON", "TRITON_"))}
    return subprocess.run([str(python), "-c", code], cwd=cwd, env=clean | env, capture_output=True, text=True, check=False, timeout=300)


def output(code: str, **options: object) -> str:
    done = run(code, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_lazy_and_asks_no_gpu():
    code = (
        "import sys, fusedadapt; assert 'torch' not in sys.modules and 'triton' not in sys.modules\n"
        "import torch\n"
        "def asked(*a, **k): raise AssertionError('a GPU was queried at import')\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_properties = torch.cuda._lazy_init = asked\n"
        "for name in fusedadapt.__all__: getattr(fusedadapt, name)\n"
        "import fusedadapt.kernels.optim\n"
        "print(len(fusedadapt.__all__))"
    )
    assert int(output(code)) <= 40


def test_import_takes_at_most_150_ms_beyond_torch():
    code = "import time, torch; began = time.perf_counter(); import fusedadapt; fusedadapt.optim; print(time.perf_counter() - began)"
    output(code)  # writes the bytecode
    assert min(float(output(code)) for _ in range(5)) <= 0.150


def test_checkout_reaches_its_kernels():
    assert Path(output("import fusedadapt.kernels; print(fusedadapt.kernels.__file__)")).is_relative_to(ROOT / "kernels")


# --- installing ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the checkout, so that building leaves nothing behind in it."""
    place = tmp_path_factory.mktemp("tree") / "checkout"
    shutil.copytree(ROOT, place, ignore=LOCAL)
    return place


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sdist")
    output(f"import setuptools.build_meta as b; b.build_sdist({str(place)!r})", cwd=tree)
    (found,) = place.glob("*.tar.gz")
    return found


def pip(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build_wheel(sdist: Path, place: Path, **env: str) -> tuple[Path, str]:
    # "None" adds no flags to the compiler's own, so no optimisation: what is tested is what gets packed, and -O3 takes two minutes.
    done = pip("wheel", str(sdist), "-v", "--no-build-isolation", "-w", str(place), CMAKE_BUILD_TYPE="None", FUSEDADAPT_CUDA="off", **env)
    (found,) = place.glob("*.whl")
    return found, done.stdout + done.stderr


def empty_environment(place: Path) -> Path:
    """A new environment's Python. It sees this one's packages (torch) through a .pth line, so no editable install shines through."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    (site,) = glob.glob(str(place / "lib" / "python*" / "site-packages"))
    Path(site, "torch_from_outside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return place / "bin" / "python"


def install(python: Path, *what: str, **env: str) -> None:
    pip("--python", str(python), "install", "--no-build-isolation", *what, **env)


USE = """
import logging, pathlib, torch, fusedadapt as fa
from fusedadapt import dispatch
import fusedadapt.kernels.optim, fusedadapt.bench
try:
    import kernels
except ModuleNotFoundError:
    pass
else:
    raise AssertionError(f"a top-level kernels: {kernels.__file__}")
p = torch.nn.Parameter(torch.ones(5))
p.grad = torch.ones(5)
for _ in range(3):
    fa.optim.AdamW([p], lr=0.1).step()
assert p.max() < 1
print(dispatch.core() is not None, pathlib.Path(fa.__file__).parent, pathlib.Path(fusedadapt.kernels.__file__).parent, sep="\\n")
"""


@pytest.mark.slow
def test_wheel_from_sdist_in_an_empty_environment(sdist: Path, tmp_path: Path):
    wheel, _ = build_wheel(sdist, tmp_path / "wheel", FUSEDADAPT_CORE="on")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fusedadapt"}
    assert not [name for name in names if "_core_emulated" in name or "/tests/" in name or name.endswith((".cu", ".cpp", ".h"))]
    assert [name for name in names if name.startswith("fusedadapt/_core.")] and "fusedadapt/py.typed" in names
    assert [name for name in names if name.endswith("LICENSE")]
    python = empty_environment(tmp_path / "env")
    install(python, str(wheel))
    core, package, kernels = output(USE, python=python, cwd=tmp_path).splitlines()
    assert core == "True" and str(tmp_path) in package
    assert Path(kernels) == Path(package, "kernels")
    assert "usage: python -m fusedadapt" in output("import fusedadapt.cli; fusedadapt.cli.main([])", python=python, cwd=tmp_path)


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_says_so_once(sdist: Path, tmp_path: Path):
    wheel, said = build_wheel(sdist, tmp_path / "wheel", CC="/bin/false", CXX="/bin/false")
    assert said.count("fusedadapt: compiled core not built (C++ compiler /bin/false does not work") == 1
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    python = empty_environment(tmp_path / "env")
    install(python, str(wheel))
    done = run(USE, python=python, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False\n")
    assert done.stderr.count("using pure Python + Triton") == 1
    assert done.stderr.count("fusedadapt:") == 1 and "/bin/false does not work" in done.stderr


@pytest.mark.slow
def test_editable_install(tree: Path, tmp_path: Path):
    python = empty_environment(tmp_path / "env")
    install(python, "-e", str(tree), FUSEDADAPT_CORE="off")
    core, package, kernels = output(USE, python=python, cwd=tmp_path).splitlines()
    assert core == "False" and Path(package) == tree / "fusedadapt"
    assert Path(kernels) == tree / "kernels"


def test_a_required_core_that_cannot_be_built_is_an_error(tree: Path):
    # From a copy: a failing build must not touch this checkout's module.
    code = "import sys, runpy; sys.argv = ['setup.py', '-q', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')"
    done = run(code, cwd=tree, FUSEDADAPT_CORE="on", CXX="/bin/false")
    assert done.returncode != 0
    assert "FUSEDADAPT_CORE=on: expected a working toolchain; C++ compiler /bin/false does not work" in done.stderr


def test_a_misspelt_build_switch_is_an_error(tree: Path):
    code = "import sys, runpy; sys.argv = ['setup.py', '-q', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')"
    done = run(code, cwd=tree, FUSEDADAPT_CORE="yes")
    assert done.returncode != 0 and "FUSEDADAPT_CORE: expected auto, on or off; got 'yes'" in done.stderr


@pytest.mark.parametrize(
    ("options", "other"), [([], False), (["c++"], False), (["g++"], True), (["c++", "/b/nvcc"], True), (["c++", "/a/nvcc"], False)]
)
def test_another_compiler_gets_another_build_folder(options, other):
    """CMake starts over then, without pybind11's folder and Python's: the build failed at what it had found before."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    cache = "CMAKE_CXX_COMPILER:FILEPATH=c++\nCMAKE_CUDA_COMPILER:UNINITIALIZED=/a/nvcc\nCMAKE_CUDA_COMPILER_AR:FILEPATH=/usr/bin/ar\n"
    given = [f"-D{name}={path}" for name, path in zip(("CMAKE_CXX_COMPILER", "CMAKE_CUDA_COMPILER"), options)]
    assert setup.names_another_compiler(["-DFA_CUDA=ON", *given, "-DFA_OUT=x"], cache) is other

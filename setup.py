"""Builds the compiled core with CMake and Ninja; everything else about the package is in pyproject.toml.

FUSEDADAPT_CORE=auto|on|off    auto (default): without a working C++ compiler install pure Python and say so; on: that is an error;
                               off: do not compile
FUSEDADAPT_CUDA=auto|on|off    auto (default): CUDA part if nvcc and an NVIDIA device are here; on: nvcc is enough, and required
CMAKE_BUILD_TYPE=Release       or any other of CMake's, as CMake itself takes it
FUSEDADAPT_CUDA_ARCHS="80;90"  with CUDA: the architectures; default: this machine's device, else 80 (also for 86, 89) 90 100 120

python setup.py build_ext --inplace     fusedadapt/_core*.so in the checkout
python setup.py build_emulated          fusedadapt/_core_emulated*.so there: the .cu files on a CPU stand-in for CUDA, for the tests
"""

from __future__ import annotations

import glob
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "fusedadapt"


def choice(name: str) -> str:
    value = os.environ.get(name, "auto").lower() or "auto"
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"{name}: expected auto, on or off; got {value!r}; set one of them or unset it")
    return value


def tool(name: str, module: str, folder: str) -> str | None:
    """The pip package's executable if that package is here (a build environment's own), else the one on PATH."""
    try:
        return shutil.which(name, path=getattr(importlib.import_module(module), folder)) or shutil.which(name)
    except (ModuleNotFoundError, AttributeError):
        return shutil.which(name)


def cxx() -> str | None:
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        if found := shutil.which(name):
            return found
    return None


def compiler_fault() -> str:
    """Why no extension module can be compiled here; "" if one can. Compiles a real one: a compiler without Python.h or the standard library
    is no compiler.
    """
    compiler = cxx()
    if compiler is None:
        return f"no C++ compiler found (CXX={os.environ.get('CXX', '')!r})"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <vector>\nint probe(std::vector<int> v) { return int(v.size()) + PY_MAJOR_VERSION; }\n")
        command = [compiler, "-std=c++17", "-I", sysconfig.get_paths()["include"], "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode == 0 and Path(folder, "probe.o").exists():
            return ""
        last = (run.stderr.strip().splitlines() or ["no message"])[0]
        return f"C++ compiler {compiler} does not work (exit {run.returncode}: {last})"


def build_fault() -> str:
    """Why the core cannot be built here; "" if it can."""
    if choice("FUSEDADAPT_CORE") == "off":
        return "left out by FUSEDADAPT_CORE=off"
    for name, module, folder in (("cmake", "cmake", "CMAKE_BIN_DIR"), ("ninja", "ninja", "BIN_DIR")):
        if tool(name, module, folder) is None:
            return f"{name} not found (pip install {name})"
    try:
        importlib.import_module("pybind11")
    except ModuleNotFoundError:
        return "pybind11 not found (pip install pybind11)"
    return compiler_fault()


def cuda_options() -> list[str]:
    wish = choice("FUSEDADAPT_CUDA")
    here = bool(glob.glob("/dev/nvidia[0-9]*"))
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if wish == "on" and not nvcc:
        raise CompileError(
            "FUSEDADAPT_CUDA=on: expected nvcc; it is neither on PATH nor in /usr/local/cuda/bin; "
            "install the CUDA toolkit, set CUDACXX, or set FUSEDADAPT_CUDA=auto"
        )
    if wish == "off" or not nvcc or (wish == "auto" and not here):
        return ["-DFA_CUDA=OFF"]
    archs = os.environ.get("FUSEDADAPT_CUDA_ARCHS") or ("native" if here else "")  # "": those of a release, CMakeLists.txt
    return ["-DFA_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={archs}"]


def names_another_compiler(options: list[str], cache: str) -> bool:
    """Told of another compiler, of C++ or of CUDA, CMake starts over and loses the other -D options: another compiler gets a new folder instead."""
    known = dict(re.findall(r"^(CMAKE_\w+_COMPILER):\w+=(.*)$", cache, re.M))
    wanted = dict(re.findall(r"^-D(CMAKE_\w+_COMPILER)=(.*)$", "\n".join(options), re.M))
    return any(known.get(name, path) != path for name, path in wanted.items())


def cmake_build(folder: Path, target: str) -> Path:
    """Configures and builds one target; returns the module built."""
    cmake, ninja = tool("cmake", "cmake", "CMAKE_BIN_DIR"), tool("ninja", "ninja", "BIN_DIR")
    pybind11 = importlib.import_module("pybind11")
    # Paths into a build environment vanish with it but would stay in CMake's cache: all are given afresh each time.
    configure = [
        str(cmake),
        "-S",
        str(ROOT),
        "-B",
        str(folder),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_BUILD_TYPE={os.environ.get('CMAKE_BUILD_TYPE') or 'Release'}",
    ]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DFA_PYBIND11_INCLUDE={pybind11.get_include()}", f"-DFA_OUT={folder / 'out'}"]
    configure += [*cuda_options(), f"-DCMAKE_CXX_COMPILER={cxx()}"]
    cache = folder / "CMakeCache.txt"
    if cache.exists() and names_another_compiler(configure, cache.read_text(encoding="utf-8")):
        shutil.rmtree(folder)
    for command in (configure, [str(cmake), "--build", str(folder), "--target", target]):
        run = subprocess.run(command, check=False)
        if run.returncode != 0:
            raise CompileError(
                f"building {target} failed (exit {run.returncode}, output above): {' '.join(command)}\n"
                "FUSEDADAPT_CUDA=off leaves the CUDA part out, FUSEDADAPT_CORE=off installs pure Python."
            )
    (found,) = glob.glob(str(folder / "out" / f"_{target}.*{sysconfig.get_config_var('EXT_SUFFIX')}")) or glob.glob(
        str(folder / "out" / f"_{target}.*")
    )
    return Path(found)


def place(built: Path, target: Path) -> None:
    """Copies by rename: writing into a module that some process has loaded would crash that process."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    shutil.copy2(built, partial)
    os.replace(partial, target)


def write_build_info(path: Path, absent: str, info: dict[str, str]) -> None:
    stamp = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    values = {"CORE_ABSENT": absent, "TIME": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(stamp))}
    values |= {name.upper(): info.get(name, "") for name in ("compiler", "flags", "isas", "cmake", "cuda", "cuda_archs")}
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    path.write_text('"""Written by setup.py: how this copy\'s compiled core was built, or why it was not."""\n\n' + body, encoding="utf-8")


def in_place_folder() -> Path:
    return ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def build_in_place() -> None:
    """`build_ext --inplace` without setuptools' reading of pyproject.toml: before 77 it refuses the licence field (bench/gpu.sh)."""
    folder = in_place_folder()
    built = cmake_build(folder, "core")
    place(built, PACKAGE / built.name)
    write_build_info(PACKAGE / "_build_info.py", "", json.loads((folder / "build_info.json").read_text(encoding="utf-8")))


class BuildCore(build_ext):
    def build_extension(self, ext: Extension) -> None:
        local = bool(self.inplace or getattr(self, "editable_mode", False) or self._keeps_source)
        info_path = (PACKAGE if local else Path(self.build_lib, "fusedadapt")) / "_build_info.py"
        target = Path(self.get_ext_fullpath(ext.name))
        if fault := build_fault():
            if choice("FUSEDADAPT_CORE") == "on":
                raise CompileError(f"FUSEDADAPT_CORE=on: expected a working toolchain; {fault}; install one, or set FUSEDADAPT_CORE=auto")
            for stale in (target, PACKAGE / target.name) if local else (target,):
                stale.unlink(missing_ok=True)
            write_build_info(info_path, fault, {})
            # Else setuptools looks for the file it now expects. Set only here, so that a failing compilation still fails.
            ext.optional = True
            print(f"fusedadapt: compiled core not built ({fault}): installing pure Python + Triton", file=sys.stderr)
            return
        folder = in_place_folder() if local else Path(self.build_temp, "cmake").resolve()
        place(cmake_build(folder, "core"), target)
        write_build_info(info_path, "", json.loads((folder / "build_info.json").read_text(encoding="utf-8")))

    def run(self) -> None:
        # setuptools clears `inplace` while it builds and copies afterwards; this remembers what was asked.
        self._keeps_source = bool(self.inplace)
        super().run()

    _keeps_source = False


class BuildEmulated(Command):
    description = "build fusedadapt/_core_emulated*.so in the checkout (tests only)"
    user_options: list[tuple[str, str, str]] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        if fault := build_fault():
            raise CompileError(f"build_emulated: expected a working toolchain; {fault}")
        built = cmake_build(in_place_folder(), "core_emulated")
        place(built, PACKAGE / built.name)


def packages() -> tuple[list[str], dict[str, str]]:
    """kernels/ and bench/ ship inside fusedadapt: another project owns the import name `kernels`."""
    names, places = find_packages(include=["fusedadapt", "fusedadapt.*"]), {}
    for top in ("kernels", "bench"):
        if (ROOT / top / "__init__.py").exists():
            places[f"fusedadapt.{top}"] = top
            names += [f"fusedadapt.{name}" for name in (top, *(f"{top}.{sub}" for sub in find_packages(top)))]
    return names, places


if __name__ == "__main__":
    names, places = packages()
    setup(
        packages=names,
        package_dir=places,
        package_data={"fusedadapt": ["py.typed"], "fusedadapt.kernels": ["tuned/*.json"]},
        ext_modules=[Extension("fusedadapt._core", sources=[])],
        cmdclass={"build_ext": BuildCore, "build_emulated": BuildEmulated},
    )

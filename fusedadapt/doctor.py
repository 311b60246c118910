"""`python -m fusedadapt doctor`: what is installed, which backends work and why others do not, and a short self-test.

Plain text, ready to paste into a bug report: versions and device names only, no paths of yours, no host name.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

from . import __version__, config, dispatch

RULES = ("AdamW", "AdaBelief", "Lion")
# A backend's own device, and the reference on every device.
BACKENDS = {"cpu": ("reference", "cpp", "triton", "emulated"), "cuda": ("reference", "triton", "cuda")}
# Sizes around the vector width and one that spans several tiles; small enough for the interpreter and the emulator.
SIZES = (1, 7, 64, 2051)
STEPS = 5

# The self-test asks "is this machine sane", not "is the rule exact" (that is `parity`). A float32 parameter of size 4 rounds by 2.4e-7 a
# step; Lion moves by lr whatever the gradient's size, so one flipped sign shows as 2e-3.
TOLERANCE = 2e-6


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns 0 if every backend found passed its self-test (or the checkpoint named is sound), else 1."""
    parser = argparse.ArgumentParser(prog="python -m fusedadapt doctor", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "checkpoint", nargs="?", help="look at this file (a delta, masks, quantized weights) or folder instead of at the installation"
    )
    parser.add_argument("--no-self-test", action="store_true", help="only look, do not run anything")
    parser.add_argument("--seconds", type=float, default=5.0, help="start no further self-test after this long (default 5)")
    options = parser.parse_args(argv)
    print(f"fusedadapt {__version__} doctor")
    if options.checkpoint is not None:
        return _checkpoint(options.checkpoint)
    _section("versions", versions())
    wrong = config.faults()
    settings = config.from_environment() | wrong
    if settings:
        _section("settings", list(settings.items()))
    _section("compiled core", compiled_core())
    _section("devices", devices())
    for device_type, names in BACKENDS.items():
        reasons = dispatch.available_backends(device_type)
        _section(f"backends for {device_type} tensors", [(name, reasons[name] or "yes") for name in names])
    if options.no_self_test:
        return 0
    results = list(self_test(options.seconds))
    _section(f"self-test: {STEPS} steps against the float64 reference", results)
    bad = [what for what, verdict in results if not verdict.startswith(("ok", "not run"))]
    left = sum(verdict.startswith("not run") for _, verdict in results)
    rest = f" ({left} not run: --seconds)" if left else ""
    print("\nverdict: " + (f"FAULT in {len(bad)} of {len(results)}: {', '.join(bad)}" if bad else f"everything run here works{rest}"))
    if wrong:
        print(f"but nothing else runs with this value of {' and '.join(wrong)}")
    return 1 if bad or wrong else 0


def _checkpoint(path: str) -> int:
    """Prints what is wrong with a quantized model, a delta or masks on disk; 0 nothing, 1 something, 2 there is no such file or folder."""
    from .quant import checkup
    from .sparse import checkup as sparse

    try:
        result = sparse.examine(path) or checkup.examine(path)
    except FileNotFoundError as error:
        print(error)
        return 1 if os.path.exists(path) else 2
    print("\n".join(checkup.text(path, result)))
    return 1 if result.faults else 0


def _section(title: str, rows: Sequence[tuple[str, str]]) -> None:
    print(f"\n{title}")
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        first, *more = text.splitlines() or [""]
        print(f"  {name:<{width}}  {first}".rstrip())
        for line in more:
            print(f"  {'':<{width}}  {line}".rstrip())


def versions() -> list[tuple[str, str]]:
    """Rows (package, version) of what matters to a bug report."""
    rows = [("python", f"{platform.python_version()} ({platform.python_implementation()})")]
    rows.append(("system", f"{platform.system()} {platform.release()} {platform.machine()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}"))
    for name in ("torch", "triton", "numpy", "safetensors", "tokenizers"):
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def compiled_core() -> list[tuple[str, str]]:
    """Rows on `fusedadapt._core`: how it was built and what it chose on this CPU, or why it is absent."""
    module = dispatch.core()
    rows = [("core", "present" if module is not None else f"absent: {dispatch.core_reason()}")]
    if module is not None:
        rows.append(("instruction set", str(module.isa())))
        rows.append(("CUDA part", "built" if dispatch.has_cuda(module) else "not built"))
    rows.append(("emulated CUDA", "present" if dispatch.core_emulated() is not None else "absent (only the test suite needs it)"))
    try:
        info: Any = importlib.import_module("fusedadapt._build_info")
    except ModuleNotFoundError:
        return [*rows, ("built", "not recorded (no fusedadapt/_build_info.py)")]
    rows.append(("built", f"{info.TIME} by {info.COMPILER}, cmake {info.CMAKE}" if info.COMPILER else f"{info.TIME} as pure Python"))
    if info.FLAGS:
        rows.append(("flags", info.FLAGS))
    if info.CUDA:
        rows.append(("nvcc", f"{info.CUDA} for {info.CUDA_ARCHS}"))
    return rows


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return file.readline().strip().removeprefix("NVRM version:").strip()
    except OSError:
        return "no NVIDIA kernel driver"


def devices() -> list[tuple[str, str]]:
    """Rows on the CPU, torch's threads, and each GPU."""
    import torch

    rows = [("cpu", f"{_cpu_name()}; torch uses {torch.get_num_threads()} threads")]
    rows.append(("driver", _driver()))
    rows.append(("torch's CUDA", str(torch.version.cuda or "torch was built without CUDA")))
    if not torch.cuda.is_available():
        return [*rows, ("gpu", "none visible to torch")]
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        rows.append((f"gpu {index}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} SMs"))
    return rows


def _run(rule: str, backend: str, device_type: str, dtype: Any) -> list[Any]:
    """Parameters after STEPS steps on seeded data, as float64 on the CPU."""
    import torch

    from . import optim

    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(n, generator=generator, dtype=torch.float32, device="cpu") for n in SIZES]
    params = [torch.nn.Parameter(t.to(device_type, dtype)) for t in start]
    optimizer = getattr(optim, rule)(params, lr=1e-3, weight_decay=0.01, backend=backend)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.numel(), generator=generator, dtype=torch.float32, device="cpu").to(device_type, dtype)
        optimizer.step()
    return [p.detach().double().cpu() for p in params]


def self_test(seconds: float = 5.0) -> Iterator[tuple[str, str]]:
    """Yields (rule on device/backend, "ok …", "not run …" or what is wrong) for every backend present.

    After `seconds` only each further backend's first rule is run: a GPU's first compilations must not leave the others unseen.
    """
    import torch

    _verdict(RULES[0], "reference", "cpu")  # torch's first step imports its compiler: seconds that say nothing about a backend
    deadline = time.monotonic() + seconds
    for device_type, names in BACKENDS.items():
        if device_type == "cuda" and not torch.cuda.is_available():
            continue
        reasons = dispatch.available_backends(device_type)
        for backend in (name for name in names if not reasons[name]):
            for rule in RULES:
                late = rule != RULES[0] and time.monotonic() > deadline
                yield f"{rule} on {device_type}/{backend}", "not run: time was up" if late else _verdict(rule, backend, device_type)


def _verdict(rule: str, backend: str, device_type: str) -> str:
    import torch

    began = time.monotonic()
    try:
        truth = _run(rule, "reference", "cpu", torch.float64)
        found = _run(rule, backend, device_type, torch.float32)
    except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"FAILED to run: {type(error).__name__}: {error}"
    # torch's max, unlike Python's, keeps a NaN; and a NaN is not within any tolerance.
    worst = float((torch.cat(truth) - torch.cat(found)).abs().max())
    if not worst <= TOLERANCE:
        return f"WRONG: off by {worst:.1e}, expected at most {TOLERANCE:.0e}"
    return f"ok, off by {worst:.1e} at most ({1e3 * (time.monotonic() - began):.0f} ms)"

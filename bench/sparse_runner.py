"""Times the rows of `bench sparse` and measures what each contestant allocates beyond its inputs."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .runner import _COPY_BYTES, COPY, Clock, Settings, copier, take_turns
from .sparse import Row, least_bytes
from .sparse_contestants import Absent, build, differing, problem


@dataclass
class Timing:
    """Seconds of the job: median and quintiles over rounds; ``ratio``: median over rounds of its time over the subject's. ``extra``: peak bytes
    beyond inputs; ``result``: bytes of that which are the result; ``copy_share``: of the copy bandwidth; ``differ``: elements unlike the
    reference's."""

    name: str
    median: float
    low: float
    high: float
    ratio: float
    extra: int | None = None
    result: int = 0
    copy_share: float | None = None
    differ: int | None = None


@dataclass
class Result:
    row: str
    job: str
    dtype: str
    elements: int
    tensors: int
    density: float
    rounds: int = 0
    timings: list[Timing] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def of(self, name: str) -> Timing | None:
        return next((t for t in self.timings if t.name == name), None)


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def extra_memory(call: Callable[[], object], device: str) -> int | None:
    """Peak bytes during the call beyond what was there before it: torch's count on a GPU, the process's resident memory on a CPU (Linux only)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call()
        torch.cuda.synchronize()
        del out
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed pages that the allocator keeps would be reused unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    out = call()
    del out
    return max(0, _status("VmHWM") - before)


def measure(row: Row, settings: Settings) -> Result:
    """All contestants of a row in turns until the time is up."""
    given = problem(row, settings.device, settings.quick)
    result = Result(row.name, row.job, str(row.dtype).removeprefix("torch."), given.elements, len(given.tensors), row.density)
    steps: dict[str, Callable[[], object]] = {}
    sizes: dict[str, tuple[int | None, int]] = {}
    for c in row.contestants:
        try:
            built = build(c, given)
            built.call()
        except (Absent, ImportError) as error:
            result.absent[c.name] = str(error)
            continue
        except torch.OutOfMemoryError as error:
            result.absent[c.name] = f"out of memory: {str(error).splitlines()[0]}"
            continue
        steps[c.name], sizes[c.name] = built.call, (extra_memory(built.call, settings.device), built.result)
    if not steps:
        return result
    traffic = least_bytes(row, given.elements)
    names = list(steps)
    if traffic is not None:
        steps[COPY] = copier(settings.device)
    samples = take_turns(steps, Clock(settings, host=False), settings)
    result.rounds = len(samples[names[0]])
    copied = samples.get(COPY)
    for name in names:
        times = samples[name]
        low, *_, high = statistics.quantiles(times, n=5)
        ratio = statistics.median(t / s for t, s in zip(times, samples[names[0]]))
        timing = Timing(name, statistics.median(times), low, high, ratio, *sizes[name])
        if traffic is not None and copied is not None and name == row.contestants[0].name:
            timing.copy_share = statistics.median((traffic / t) / (2 * _COPY_BYTES / c) for t, c in zip(times, copied))
        if row.job == "drop":
            timing.differ = differing(given)
        result.timings.append(timing)
    return result

"""Timing: every contestant of a row takes turns within one process, so that a drifting clock touches all alike.

On a GPU: CUDA events around the step, the L2 cache overwritten before it; a second figure replays the step from a CUDA graph.
"""

from __future__ import annotations

import functools
import importlib
import io
import math
import statistics
import time
from collections.abc import Callable, Collection
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .registry import MIXES, OFFSETS, Contestant, Row, bytes_per_element

Step = Callable[[], object]
# OpenMP's idle threads spin for about a millisecond after a parallel region and take a core from whoever runs next. Every sample starts with all
# pools asleep, so that a contestant is not billed for its neighbour's.
SETTLE = 5e-3
SLOW = 0.08  # seconds: whoever needs more for a sample takes part in the first rounds only, and leaves the others their time
COPY = "copy"
_COPY_BYTES = 2**27  # far beyond any last-level cache that two threads can fill in a step
_L2_BYTES = 2**28


@dataclass
class Timing:
    """Seconds per step of one contestant: median and quintiles over rounds; ``ratio``: median over rounds of (its time / the subject's)."""

    name: str
    median: float
    low: float
    high: float
    ratio: float
    bytes: float | None = None
    bandwidth: float | None = None
    copy_share: float | None = None


@dataclass
class Result:
    row: str
    mix: str
    dtype: str
    tensors: int
    elements: int
    rounds: int
    host: bool
    timings: list[Timing] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def of(self, name: str) -> Timing | None:
        return next((t for t in self.timings if t.name == name), None)


@dataclass(frozen=True)
class Settings:
    """``seconds``: time for the rounds of one row; ``quick``: the small mixes."""

    device: str = "cpu"
    threads: int = 2
    seconds: float = 6.0
    quick: bool = False
    rounds: tuple[int, int] = (5, 200)


@functools.lru_cache(maxsize=1)
def parameters(mix: str, dtype: torch.dtype, device: str, quick: bool) -> list[torch.nn.Parameter]:
    """Parameters with gradients; the tensors of all contestants of a row are these, only the states are their own."""
    draw, out, off = torch.Generator(device).manual_seed(1), [], OFFSETS.get(mix, 0)

    def normal(shape: tuple[int, ...], scale: float) -> Tensor:
        drawn = torch.randn(math.prod(shape) + off, generator=draw, device=device)
        return drawn.mul_(scale).to(dtype)[off:].view(shape)

    for shape in MIXES[mix][1 if quick else 0]:
        p = torch.nn.Parameter(normal(shape, 1.0))
        p.grad = normal(shape, 1e-2)
        out.append(p)
    return out


def prepare(contestant: Contestant, params: list[torch.nn.Parameter]) -> Step:
    """A warm step function.

    Raises:
        ModuleNotFoundError: its library is not installed.
    """
    module = {"ours": "fusedadapt.optim", "torch": "torch.optim"}.get(contestant.lib, contestant.lib)
    cls, options = getattr(importlib.import_module(module), contestant.cls), dict(contestant.options)
    if contestant.mask is not None:
        draw = torch.Generator().manual_seed(2)
        options["masks"] = {p: (torch.rand(p.shape, generator=draw) < contestant.mask).to(p.device) for p in params}
    if contestant.graph:
        options["capturable"] = True
    given: list[Any] = list(params)
    if contestant.groups > 1:
        given = [{"params": params[k :: contestant.groups], "lr": options["lr"] * (k + 1)} for k in range(contestant.groups)]
    with redirect_stdout(io.StringIO()):  # adabelief_pytorch greets
        optimizer = cls(given, **options)
    step: Step = optimizer.step
    if contestant.clip is not None:
        limit = contestant.clip

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, limit)
            optimizer.step()

    step()
    step()
    return captured(step) if contestant.graph else step


def captured(step: Step) -> Step:
    """Replays the step from a CUDA graph. It has run once by then, on a side stream; being captured does not run it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def copier(device: str) -> Step:
    """Copies _COPY_BYTES: as many are read and written."""
    source, target = (torch.ones(_COPY_BYTES // 4, device=device) for _ in range(2))
    return lambda: target.copy_(source)


class Clock:
    """Times one sample of a step: several calls where one would vanish in the clock's grain."""

    def __init__(self, settings: Settings, host: bool):
        self.cuda, self.host = settings.device == "cuda", host
        self.least = 10 if host else 1  # calls in a sample: a host's time is that of a warm table, not of the first after another optimizer's
        self.scratch: Tensor | None = torch.empty(_L2_BYTES, dtype=torch.uint8, device="cuda") if self.cuda and not host else None

    def calls_for(self, step: Step) -> int:
        if self.scratch is not None:
            return 1  # the cache must be cold for each
        once = self.sample(step, 1)
        return max(self.least, min(1000, math.ceil(2e-3 / max(once, 1e-7))))

    def sample(self, step: Step, calls: int) -> float:
        """Seconds per call."""
        if self.scratch is not None:
            self.scratch.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3
        if self.cuda:
            torch.cuda.synchronize()
        else:
            time.sleep(SETTLE)
        if self.host:
            step()  # the one that finds the table cold
            return statistics.median(single(step) for _ in range(calls))  # of calls: an interruption of the machine's is longer than all of them
        began = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - began) / calls


def single(step: Step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def _contestants(row: Row, settings: Settings) -> list[Contestant]:
    if settings.device != "cuda" or row.host:
        return list(row.contestants)
    # A clip's norm, like a foreach step without `capturable`, is another program in a graph; only the plain pair is compared there.
    pair = [c for c in row.contestants if c.lib in ("ours", "torch") and c.clip is None]
    return [*row.contestants, *(replace(c, name=f"{c.name} (graph)", graph=True) for c in pair)]


def take_turns(steps: dict[str, Step], clock: Clock, settings: Settings, few: Collection[str] = ()) -> dict[str, list[float]]:
    """Seconds per call of every step in each round, until the time is up: at least rounds[0] and at most rounds[1] rounds. Those in ``few`` stop
    after rounds[0] and are not charged for, so that steps of seconds leave the others their time."""
    calls = {name: 1 if name in few else clock.calls_for(step) for name, step in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    deadline = time.perf_counter() + settings.seconds
    done = 0
    while done < settings.rounds[0] or (time.perf_counter() < deadline and done < settings.rounds[1]):
        # every other round backwards: nobody always runs after the same neighbour
        for name in list(steps)[:: -1 if done % 2 else 1]:
            if done < settings.rounds[0] or name not in few:
                began = time.perf_counter()
                samples[name].append(clock.sample(steps[name], calls[name]))
                if name in few:
                    deadline += time.perf_counter() - began
        done += 1
    return samples


def measure(row: Row, settings: Settings) -> Result:
    """All contestants of a row in turns until the time is up, at least rounds[0] and at most rounds[1] times."""
    params = parameters(row.mix, row.dtype, settings.device, settings.quick)
    elements = sum(p.numel() for p in params)
    dtype = str(row.dtype).removeprefix("torch.")
    result = Result(row.name, row.mix, dtype, len(params), elements, 0, row.host)
    steps: dict[str, Step] = {}
    for contestant in _contestants(row, settings):
        try:
            steps[contestant.name] = prepare(contestant, params)
        except ModuleNotFoundError as error:
            result.absent[contestant.name] = str(error)
    if row.copy:
        steps[COPY] = copier(settings.device)
    clock = Clock(settings, row.host)
    slow = {name for name, step in steps.items() if name != row.contestants[0].name and clock.sample(step, 1) * clock.least > SLOW}
    samples = take_turns(steps, clock, settings, slow)
    result.rounds = len(next(iter(samples.values())))
    _summarize(row, result, samples)
    return result


def _summarize(row: Row, result: Result, samples: dict[str, list[float]]) -> None:
    subject = samples[row.contestants[0].name]
    copied = samples.pop(COPY, None)
    by_name = {c.name: c for c in row.contestants}
    for name, times in samples.items():
        low, *_, high = statistics.quantiles(times, n=5)
        ratio = statistics.median(t / s for t, s in zip(times, subject))
        timing = Timing(name, statistics.median(times), low, high, ratio)
        contestant = by_name.get(name.removesuffix(" (graph)"))
        if contestant is not None and not row.host and (per := bytes_per_element(contestant, row.dtype)) is not None:
            timing.bytes, timing.bandwidth = per, per * result.elements / timing.median
            if copied:
                traffic = per * result.elements
                timing.copy_share = statistics.median((traffic / t) / (2 * _COPY_BYTES / c) for t, c in zip(times, copied))
        result.timings.append(timing)

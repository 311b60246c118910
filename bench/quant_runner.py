"""Times the rows of `bench quant`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .quant import Row, flops, traffic
from .quant_contestants import Absent, build, problem
from .runner import _COPY_BYTES, COPY, Clock, Settings, copier, take_turns


@dataclass
class Timing:
    """Seconds of the job: median and quintiles over rounds; ``ratio``: median over rounds of its time over the subject's. Of the subject alone:
    ``copy_share`` of the copy bandwidth, ``flops`` per second."""

    name: str
    median: float
    low: float
    high: float
    ratio: float
    copy_share: float | None = None
    flops: float | None = None


@dataclass
class Result:
    row: str
    job: str
    format: str
    dtype: str
    tokens: int
    shape: tuple[int, int]
    packed_bytes: int = 0
    rounds: int = 0
    timings: list[Timing] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def of(self, name: str) -> Timing | None:
        return next((t for t in self.timings if t.name == name), None)


def measure(row: Row, settings: Settings) -> Result:
    """All contestants of a row in turns until the time is up."""
    given = problem(row, settings.device, settings.quick)
    packed = given.packed.nbytes if given.packed is not None else 0
    result = Result(row.name, row.job, row.format, str(row.dtype).removeprefix("torch."), row.tokens, given.shape, packed)
    steps: dict[str, Callable[[], object]] = {}
    for c in row.contestants:
        try:
            call = build(c.kind, given)
            call()
        except (Absent, ImportError) as error:
            result.absent[c.name] = str(error)
            continue
        except torch.OutOfMemoryError as error:
            result.absent[c.name] = f"out of memory: {str(error).splitlines()[0]}"
            continue
        steps[c.name] = call
    if not steps:
        return result
    names = list(steps)
    steps[COPY] = copier(settings.device)
    samples = take_turns(steps, Clock(settings, host=False), settings)
    result.rounds = len(samples[names[0]])
    least, work = traffic(row, packed, *given.shape), flops(row, *given.shape)
    for name in names:
        times = samples[name]
        low, *_, high = statistics.quantiles(times, n=5)
        timing = Timing(name, statistics.median(times), low, high, statistics.median(t / s for t, s in zip(times, samples[names[0]])))
        if name == row.contestants[0].name:
            timing.copy_share = statistics.median((least / t) / (2 * _COPY_BYTES / c) for t, c in zip(times, samples[COPY]))
            timing.flops = work / timing.median if work else None
        result.timings.append(timing)
    return result

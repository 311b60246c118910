"""Times the rows of `bench lowrank`, counts what each contestant saves for backward, and the FLOPs it issues."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from fusedadapt.ops import dense
from fusedadapt.testing.saved import SavedBytes

from .lowrank import FROZEN, Contestant, Row, least_flops
from .lowrank_contestants import Built, Problem, build, problem
from .runner import Clock, Settings, captured, take_turns

SLOW = 0.5  # seconds of a step from which three samples must do
WIDENED = "widened"
_SMALL = 1 << 12  # bytes of scalars and seeds: not activations


@dataclass
class Timing:
    """Seconds of forward and backward: median and quintiles. ``overhead``: median over rounds of time / frozen time - 1, frozen being the layer with
    the same dense product; ``of_torch``: time over nn.Linear's, where that is another. ``saved``: bytes kept for backward beyond x, over x's;
    ``flops``: over the structured minimum. None: not measured."""

    name: str
    median: float
    low: float
    high: float
    ratio: float
    overhead: float | None = None
    of_torch: float | None = None
    saved: float | None = None
    flops: float | None = None


@dataclass
class Result:
    row: str
    method: str
    tokens: int
    inputs: int
    outputs: tuple[int, ...]
    rank: int
    p: float
    dtype: str
    rounds: int = 0
    widened: bool = False
    timings: list[Timing] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def of(self, name: str) -> Timing | None:
        return next((t for t in self.timings if t.name == name), None)


def contestants(row: Row, settings: Settings, widened: bool) -> list[Contestant]:
    """Where torch has no GEMM for the row's dtype, everyone whose dense product is torch's also comes with a widened one, and alone unless the row is
    ``native``: so that frozen layer, PEFT and ours differ in the low-rank branch alone. Compiling takes a minute: not in a quick run."""
    chosen = [c for c in row.contestants if not (c.compiled and settings.quick)]
    if not widened:
        return chosen
    out = []
    for c in chosen:
        if c.kind in ("layer", "functional", "patched"):  # widened already
            out.append(c)
            continue
        if row.native and not settings.quick and not c.compiled and c.kind in ("frozen", "peft"):
            out.append(c)
        if not c.compiled:
            out.append(replace(c, name=f"{c.name}, {WIDENED}", base=WIDENED))
    return out


def _stepper(made: Built, given: Problem) -> Callable[[], object]:
    inputs = [given.x, *made.trained]
    return lambda: torch.autograd.grad(made.forward(), inputs, given.dys)


def counted(made: Built, given: Problem) -> tuple[float, int]:
    """(bytes saved beyond x, over x's bytes; FLOPs of forward and backward)."""
    with FlopCounterMode(display=False) as flops:
        with SavedBytes(made.known) as saved:
            ys = made.forward()
        torch.autograd.backward(ys, given.dys)  # the counter's module tracker cannot follow autograd.grad
    for t in (given.x, *made.trained):
        t.grad = None
    size = given.x.untyped_storage().nbytes()
    return (saved.total if saved.total > _SMALL else 0) / size, flops.get_total_flops()


def keep_freed_memory() -> None:
    """glibc gives back what is freed beyond twice the largest block it has seen freed, counting up to 32 MB. A process that has trained for a while
    has seen such a one; in a young one it is chance who writes to fresh pages (0.5 ms for a result of 5 MB, a fifth of what an adapter costs there).
    """
    torch.empty((1 << 23) - (1 << 12), dtype=torch.float32, device="cpu")


def measure(row: Row, settings: Settings) -> Result:
    """All contestants of a row in turns until the time is up; the slow ones three times."""
    keep_freed_memory()
    given = problem(row, settings.device, settings.quick)
    widened = dense.widens(given.x)
    dtype = str(row.dtype).removeprefix("torch.")
    result = Result(row.name, row.method, given.x.shape[0], row.inputs, row.outputs, row.rank, row.p, dtype, widened=widened)
    steps: dict[str, Callable[[], object]] = {}
    counts: dict[str, tuple[float, float]] = {}
    slow = set()
    sized = replace(row, tokens=given.x.shape[0])
    chosen = contestants(row, settings, widened)
    for c in chosen:
        try:
            made = build(c, given)
            step = _stepper(made, given)
            if not (c.compiled or c.graph):
                saved, flops = counted(made, given)
                counts[c.name] = saved, flops / least_flops(sized, c.method)
            began = time.perf_counter()
            step()
            if settings.device == "cpu" and time.perf_counter() - began > SLOW and not c.compiled:
                slow.add(c.name)
            else:
                step()
            steps[c.name] = captured(step) if c.graph else step
        except ImportError as error:
            result.absent[c.name] = str(error)
        except RuntimeError as error:
            if not (c.compiled or c.graph):
                raise
            result.absent[c.name] = f"does not {'compile' if c.compiled else 'capture'}: {str(error).splitlines()[0]}"
    if not steps:
        return result
    least = min(3, settings.rounds[0]) if slow else settings.rounds[0]
    turns = replace(settings, seconds=settings.seconds * row.share, rounds=(least, settings.rounds[1]))
    samples = take_turns(steps, Clock(settings, host=False), turns, slow)
    result.rounds = max(len(times) for times in samples.values())
    _summarize(result, chosen, samples, counts)
    return result


def _over(times: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others))


def _frozen_of(c: Contestant, widened: bool) -> str:
    """The frozen layer with the contestant's own dense product."""
    own = WIDENED if c.base == WIDENED or (widened and c.kind in ("layer", "functional", "patched")) else ""
    return f"{FROZEN.name}{f', {own}' if own else ''}{' (graph)' if c.graph else ''}"


def _summarize(result: Result, chosen: list[Contestant], samples: dict[str, list[float]], counts: dict[str, tuple[float, float]]) -> None:
    subject = next((c.name for c in chosen if c.kind in ("layer", "functional") and c.name in samples), next(iter(samples)))
    for c in chosen:
        if c.name not in samples:
            continue
        times = samples[c.name]
        low, *_, high = statistics.quantiles(times, n=5)
        timing = Timing(c.name, statistics.median(times), low, high, _over(times, samples[subject]))
        own = _frozen_of(c, result.widened)
        if own in samples:
            timing.overhead = _over(times, samples[own]) - 1
        if own != FROZEN.name and not c.graph and FROZEN.name in samples:
            timing.of_torch = _over(times, samples[FROZEN.name])
        if c.name in counts:
            timing.saved, timing.flops = counts[c.name]
        result.timings.append(timing)

"""`bench sparse`'s results as tables, a JSON document and plots, and its goals judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import bars, compose, verdict, where
from .runner import Settings
from .sparse import GOALS, Goal
from .sparse_runner import Result, Timing

MB = 1e6


def _scratch(t: Timing) -> float | None:
    return None if t.extra is None else max(0, t.extra - t.result) / MB


def judge(goal: Goal, results: Sequence[Result]) -> dict[str, Any] | None:
    """The goal with what was measured, or None where its row or a contestant was not."""
    rows = {r.row: r for r in results}
    a = rows[goal.row].of(goal.a) if goal.row in rows else None
    b = rows[goal.row].of(goal.b) if a is not None and goal.b else None
    if a is None or (goal.b and b is None):
        return None
    measured: float | None = {"time": a.median * 1e3, "extra": _scratch(a), "copy": a.copy_share, "differ": a.differ}.get(goal.kind)
    if b is not None:
        share = None if a.extra is None or not b.extra else a.extra / b.extra
        measured = {"faster": b.ratio / a.ratio, "cost": a.ratio / b.ratio, "memory": share}[goal.kind]
    if goal.kind == "across":
        other = rows[goal.other].of(goal.a) if goal.other in rows else None
        measured = a.median / other.median if other is not None else None
    return None if measured is None else verdict(goal, measured)


def document(results: Sequence[Result], settings: Settings, goals: Sequence[Goal] = GOALS) -> dict[str, Any]:
    """The JSON document: machine, rows (seconds, bytes), goals."""
    return compose("sparse", results, [judge(g, results) for g in goals], settings)


def results_table(results: Sequence[Result]) -> Any:
    from rich.table import Table

    table = Table(title="median time of the job", title_justify="left", caption_justify="left")
    table.caption = "extra: peak memory beyond the inputs, the result included; of copy: the least traffic over a plain copy's"
    for name in ("row", "contestant"):
        table.add_column(name)
    for name in ("time", "ns/element", "extra MB", "of copy", "x subject"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        for k, t in enumerate(result.timings):
            time = f"{t.median * 1e6:.3g} µs" if t.median < 1e-3 else f"{t.median * 1e3:.4g} ms"
            extra = "" if t.extra is None else f"{t.extra / MB:.1f}"
            share = "" if t.copy_share is None else f"{100 * t.copy_share:.0f} %"
            cells = (time, f"{t.median / result.elements * 1e9:.3g}", extra, share, f"{t.ratio:.2f}")
            table.add_row("" if k else result.row, t.name, *cells, style=None if k else "bold", end_section=k == len(result.timings) - 1)
    return table


def plots(document: dict[str, Any], folder: Path) -> list[Path]:
    """sparse-speedup.png/.svg (subject over the others) and sparse-memory.png/.svg (peak beyond the inputs, MB)."""
    folder.mkdir(parents=True, exist_ok=True)
    speed = [(f"{r['row']}  vs {t['name']}", t["ratio"]) for r in document["rows"] for t in r["timings"][1:]]
    timed = [(r, t) for r in document["rows"] for t in r["timings"] if t["extra"] is not None]
    extra = [(f"{r['row']}  {t['name']}", max(t["extra"] / MB, 0.01)) for r, t in timed]
    ours = {name for name, _ in extra if "  ours" in name}
    machine = where(document)
    written = bars(speed, "times faster than the other (log scale)", machine, folder / "sparse-speedup", mark=1.0, log=True)
    label = "peak memory beyond the inputs, MB (log scale; ours green)"
    return written + bars(extra, label, machine, folder / "sparse-memory", log=True, good=lambda name, value: name in ours)

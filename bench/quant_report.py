"""`bench quant`'s results as tables, a JSON document and plots, and its goals judged. Of the products the worst M is told beside the mean."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .quant import DENSE, GOALS, Goal
from .quant_runner import Result
from .report import bars, compose, verdict, where
from .runner import Settings


def judge(goal: Goal, results: Sequence[Result]) -> dict[str, Any] | None:
    """The goal with what was measured, or None where its row or a contestant was not."""
    rows = {r.row: r for r in results}
    a = rows[goal.row].of(goal.a) if goal.row in rows else None
    b = rows[goal.row].of(goal.b) if a is not None and goal.b else None
    if a is None or (goal.b and b is None):
        return None
    measured = a.copy_share if b is None else b.ratio / a.ratio if goal.kind == "faster" else a.ratio / b.ratio
    return None if measured is None else verdict(goal, measured)


def cliffs(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Of each format, shape and dtype of the products: how much faster than the dense product over all M, in the geometric mean and at the worst."""
    found: dict[tuple[str, tuple[int, int], str], list[tuple[float, int]]] = {}
    for r in results:
        dense = r.of(DENSE.name)
        if r.job == "linear" and dense is not None:
            found.setdefault((r.format, r.shape, r.dtype), []).append((dense.ratio, r.tokens))
    return [
        {"format": key[0], "shape": key[1], "dtype": key[2], "mean": statistics.geometric_mean(x for x, _ in all_), "worst": min(all_)}
        for key, all_ in found.items()
        if len(all_) > 1
    ]


def document(results: Sequence[Result], settings: Settings, goals: Sequence[Goal] = GOALS) -> dict[str, Any]:
    """The JSON document: machine, rows, goals, and `cliffs`."""
    return compose("quant", results, [judge(g, results) for g in goals], settings) | {"cliffs": cliffs(results)}


def results_table(results: Sequence[Result]) -> Any:
    from rich.table import Table

    table = Table(title="median time of the job", title_justify="left", caption_justify="left")
    worst = [
        f"{c['format']} {c['shape'][0]}x{c['shape'][1]} {c['dtype']}: {c['mean']:.2f} x the dense product's speed in the mean over M, "
        f"{c['worst'][0]:.2f} at the worst (M = {c['worst'][1]})"
        for c in cliffs(results)
    ]
    table.caption = "\n".join(["of copy: each tensor moved once, over a plain copy's bandwidth", *worst])
    for name in ("row", "contestant"):
        table.add_column(name)
    for name in ("time", "GFLOP/s", "of copy", "x subject"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        for k, t in enumerate(result.timings):
            time = f"{t.median * 1e6:.3g} µs" if t.median < 1e-3 else f"{t.median * 1e3:.4g} ms"
            rate = "" if t.flops is None else f"{t.flops / 1e9:,.0f}"
            share = "" if t.copy_share is None else f"{100 * t.copy_share:.0f} %"
            last = k == len(result.timings) - 1
            table.add_row("" if k else result.row, t.name, time, rate, share, f"{t.ratio:.2f}", style=None if k else "bold", end_section=last)
    return table


def plots(document: dict[str, Any], folder: Path) -> list[Path]:
    """quant-speedup.png/.svg: the subject over the others."""
    folder.mkdir(parents=True, exist_ok=True)
    speed = [(f"{r['row']}  vs {t['name']}", t["ratio"]) for r in document["rows"] for t in r["timings"][1:]]
    return bars(speed, "times faster than the other (log scale)", where(document), folder / "quant-speedup", mark=1.0, log=True)

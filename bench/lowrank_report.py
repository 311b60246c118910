"""`bench lowrank`'s results as tables, a JSON document and plots, and its goals judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .lowrank import EAGER, FROZEN, GOALS, PEFT, Goal
from .lowrank_runner import WIDENED, Result, Timing
from .report import bars, compose, verdict, where
from .runner import Settings


def named(result: Result, name: str) -> Timing | None:
    """The contestant, or where it was timed over the widened product only, that one."""
    return (result.of(f"{name}, {WIDENED}") if result.widened else None) or result.of(name)


def baseline(result: Result) -> Timing | None:
    """Eager PEFT over the same dense product as ours; the same operations in plain torch where PEFT is not installed."""
    return named(result, PEFT.name) or named(result, EAGER.name)


def share_of_peft(result: Result, timing: Timing) -> float | None:
    """Its overhead over the frozen layer, as a share of eager PEFT's; None where either was not measured, or PEFT's is none."""
    other = baseline(result)
    if timing.overhead is None or other is None or other.overhead is None or other.overhead <= 0:
        return None
    return timing.overhead / other.overhead


def judge(goal: Goal, results: Sequence[Result]) -> dict[str, Any] | None:
    """The goal with what was measured, or None where its row or a contestant was not."""
    result = next((r for r in results if r.row == goal.row), None)
    a = result.of(goal.a) if result else None
    if result is None or a is None:
        return None
    b = baseline(result) if goal.kind == "share" else named(result, goal.b) if goal.b else None
    values = {"overhead": a.overhead, "saved": a.saved, "flops": a.flops, "cost": a.ratio / b.ratio if b else None}
    measured = share_of_peft(result, a) if goal.kind == "share" else values[goal.kind]
    return None if measured is None else verdict(goal, measured) | {"b": b.name if b else ""}


def document(results: Sequence[Result], settings: Settings, goals: Sequence[Goal] = GOALS) -> dict[str, Any]:
    """The JSON document: machine, rows (seconds, shares), goals."""
    return compose("lowrank", results, [judge(g, results) for g in goals], settings)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.1f} %"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def results_table(results: Sequence[Result]) -> Any:
    from rich.table import Table

    table = Table(title="forward and backward with dX: median time", title_justify="left", caption_justify="left")
    table.caption = "overhead: over the frozen layer with the same dense product; saved: for backward beyond x; FLOPs: over the structured minimum"
    table.add_column("row")
    table.add_column("contestant")
    for name in ("ms", "overhead", "of PEFT's", "x nn.Linear", "saved / |x|", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        for k, t in enumerate(result.timings):
            comparable = t.name.startswith("ours") or not result.widened or t.name.endswith(WIDENED)  # else: over another dense product than PEFT's
            share = share_of_peft(result, t) if comparable and not t.name.startswith(FROZEN.name) else None
            cells = (f"{t.median * 1e3:.4g}", _percent(t.overhead), _number(share, 2), _number(t.of_torch), _number(t.saved), _number(t.flops))
            table.add_row("" if k else result.row, t.name, *cells, style="bold" if t.ratio == 1.0 else None, end_section=k == len(result.timings) - 1)
    return table


def plots(document: dict[str, Any], folder: Path) -> list[Path]:
    """overhead.png/.svg (over the frozen layer, %) and saved.png/.svg (bytes for backward beyond x, over x's)."""
    folder.mkdir(parents=True, exist_ok=True)
    timed = [(f"{r['row']}  {t['name']}", t) for r in document["rows"] for t in r["timings"] if not t["name"].startswith(FROZEN.name)]
    over = [(name, 100 * t["overhead"]) for name, t in timed if t["overhead"] is not None]
    saved = [(name, t["saved"]) for name, t in timed if t["saved"] is not None]
    ours = {name for name, t in timed if t["name"].startswith("ours")}
    machine = where(document)
    written = []
    for items, label, name in ((over, "overhead over the frozen layer, %", "overhead"), (saved, "saved for backward beyond x, over x", "saved")):
        written += bars(items, f"{label} (shorter is better; ours green)", machine, folder / name, good=lambda what, value: what in ours)
    return written

"""Results as a table, a JSON document and plots, and the goals judged by them."""

from __future__ import annotations

import datetime
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .registry import GOALS, Goal
from .runner import Result, Settings, Timing

SCHEMA = 1
#: kind of a goal -> (which side of the limit is good, unit)
KINDS = {
    "host": ("≤", " µs"), "faster": ("≥", "x"), "cost": ("≤", "x"),
    "share": ("≤", ""), "overhead": ("≤", ""), "saved": ("≤", " |x|"), "flops": ("≤", "x"),
    "time": ("≤", " ms"), "memory": ("≤", "x"), "extra": ("≤", " MB"), "across": ("≤", "x"), "copy": ("≥", ""), "differ": ("≤", ""),
}  # fmt: skip
_PACKAGES = ("fusedadapt", "torch", "triton", "numpy", "adabelief-pytorch", "lion-pytorch", "peft", "transformers")


def machine(settings: Settings) -> dict[str, Any]:
    """Versions, processor, commit and date: what a number means nothing without."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    from fusedadapt import __version__, dispatch, doctor

    versions["fusedadapt"] = __version__
    core = dispatch.core()
    out = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "commit": _commit(), "versions": versions}
    out |= {"cpu": doctor._cpu_name(), "isa": str(core.isa()) if core is not None else "no compiled core", "threads": settings.threads}
    return out | {"device": torch.cuda.get_device_name() if settings.device == "cuda" else "cpu", "quick": settings.quick}


def _commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if changed else "")


def judge(goal: Goal, results: Sequence[Result]) -> dict[str, Any] | None:
    """The goal with what was measured, or None where a row or a contestant of it was not."""
    rows = {r.row: r for r in results}
    result, other = rows.get(goal.row), rows.get(goal.other or goal.row)
    a = result.of(goal.a) if result else None
    b = other.of(goal.b or goal.a) if other else None
    if result is None or other is None or a is None or b is None:
        return None
    if goal.kind in ("host", "copy"):
        measured = a.median * 1e6 if goal.kind == "host" else a.copy_share or 0.0
    elif goal.kind == "across":
        measured = (a.median / result.elements) / (b.median / other.elements)
    else:
        measured = b.ratio / a.ratio if goal.kind == "faster" else a.ratio / b.ratio
    return verdict(goal, measured)


def verdict(goal: Any, measured: float) -> dict[str, Any]:
    """The goal (a dataclass, of any family) with what was measured and whether that is on the good side of its limit."""
    met = measured <= goal.limit if KINDS[goal.kind][0] == "≤" else measured >= goal.limit
    return {**asdict(goal), "measured": measured, "met": met}


def document(results: Sequence[Result], settings: Settings, goals: Sequence[Goal] = GOALS) -> dict[str, Any]:
    """The JSON document: machine, rows (seconds, bytes per second), goals."""
    return compose("optim", results, [judge(g, results) for g in goals], settings)


def compose(kind: str, results: Sequence[Any], judged: Sequence[dict[str, Any] | None], settings: Settings) -> dict[str, Any]:
    """The JSON document of any family: ``results`` are dataclasses; goals that were not measured are left out."""
    goals = [j for j in judged if j is not None]
    return {"schema": SCHEMA, "kind": kind, **machine(settings), "rows": [asdict(r) for r in results], "goals": goals}


def _cells(result: Result, timing: Timing) -> list[str]:
    per = timing.median / result.elements * 1e9
    time = f"{timing.median * 1e6:.3g} µs" if timing.median < 1e-3 else f"{timing.median * 1e3:.3g} ms"
    bandwidth = f"{timing.bandwidth * 1e-9:.1f}" if timing.bandwidth else ""
    share = f"{100 * timing.copy_share:.0f} %" if timing.copy_share else ""
    return [timing.name, time, f"{per:.3g}", f"{timing.bytes:g}" if timing.bytes else "", bandwidth, share, f"{timing.ratio:.2f}"]


def results_table(results: Sequence[Result]) -> Any:
    from rich.table import Table

    table = Table(title="median time of a step", title_justify="left")
    table.add_column("row")
    table.add_column("contestant")
    for name in ("time", "ns/element", "bytes", "GB/s", "of copy", "x subject"):
        table.add_column(name, justify="right")
    for result in results:
        for k, timing in enumerate(result.timings):
            table.add_row("" if k else result.row, *_cells(result, timing), style="bold" if not k else None, end_section=k == len(result.timings) - 1)
    return table


def goals_table(judged: Sequence[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="goals", title_justify="left")
    for name in ("goal", "row", "limit", "measured", "met"):
        table.add_column(name, justify="right" if name in ("limit", "measured") else "left")
    for j in judged:
        sign, unit = KINDS[j["kind"]]
        text = f"{j['measured']:,.0f}" if j["measured"] >= 100 else f"{j['measured']:.3g}"
        table.add_row(j["text"], j["row"], f"{sign} {j['limit']:,g}{unit}", f"{text}{unit}", "yes" if j["met"] else "[red]no")
    return table


def plots(document: dict[str, Any], folder: Path) -> list[Path]:
    """speedup.png/.svg (subject over each baseline) and bandwidth.png/.svg (share of the copy bandwidth)."""
    folder.mkdir(parents=True, exist_ok=True)
    speed = [(f"{r['row']}  vs {t['name']}", t["ratio"]) for r in document["rows"] for t in r["timings"][1:]]
    share = [(f"{r['row']}  {t['name']}", 100 * t["copy_share"]) for r in document["rows"] for t in r["timings"] if t["copy_share"]]
    written = bars(speed, "times faster than the other (log scale)", where(document), folder / "speedup", mark=1.0, log=True)
    return written + bars(share, "share of the copy bandwidth, %", where(document), folder / "bandwidth", mark=100.0)


def where(document: dict[str, Any]) -> str:
    """The machine, for the title of a plot."""
    return f"{document['cpu'] if document['device'] == 'cpu' else document['device']}, {document['threads']} threads, {document['date'][:10]}"


def bars(
    items: Sequence[tuple[str, float]],
    label: str,
    title: str,
    path: Path,
    *,
    mark: float | None = None,
    log: bool = False,
    good: Callable[[str, float], bool] = lambda name, value: value >= 1.0,
) -> list[Path]:
    """Horizontal bars, green where ``good``, as PNG and SVG; ``mark``: a line to compare with. Returns the files; none without items."""
    if not items:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1 + 0.24 * len(items)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = [value for _, value in items]
    axes.barh(range(len(items)), values, color=["#2a7f62" if good(name, v) else "#b4553a" for name, v in items])
    axes.set_yticks(range(len(items)), [name for name, _ in items], fontsize=8)
    axes.invert_yaxis()
    if log:
        axes.set_xscale("log")
    if mark is not None:
        axes.axvline(mark, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=9)
    out = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in out:
        figure.savefig(file, dpi=130)
    return out

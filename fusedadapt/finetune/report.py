"""What a person sees: progress bar, table, plot; and report.json for programs."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import __version__
from ..files import write_text
from . import quantized
from .lane import Lane
from .metrics import Quality
from .sparse import DELTA
from .train import CHECKPOINT, REPORT, Result

COLOURS = (("#1f5fa8", "#8fb4dc"), ("#c8641a", "#e9b58c"))  # per lane: strong, pale; told apart in grey and by the colour-blind
LINE_EVERY = 10  # steps between printed lines where there is no terminal to draw a bar on


class Screen:
    """The Watcher of ``train.run`` for a console."""

    def __init__(self, console: Console):
        self.console = console
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task: Any = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def begin(self, done: int, total: int) -> None:
        self.task = self.progress.add_task("training", total=total, completed=done, figures="")
        self.progress.start()

    def stepped(self, lanes: list[Lane], done: int) -> None:
        figures = "  |  ".join(_figures(lane) for lane in lanes)
        self.progress.update(self.task, completed=done, figures=figures)
        if not self.console.is_terminal and done % LINE_EVERY == 0:
            self.say(f"step {done}: {figures}")

    def end(self) -> None:
        self.progress.stop()


def _figures(lane: Lane) -> str:
    h = lane.history
    whole, own = h.compute_s[-1] + h.optimizer_s[-1], h.optimizer_s[-1]
    return f"{lane.rule.label}: loss {h.loss[-1]:.3f}, step {whole * 1e3:.0f} ms, optimizer {own * 1e3:.1f} ms"


def medians(lane: Lane) -> tuple[float, float]:
    """Median seconds of (forward and backward, optimizer) per step; the first step allocates state and does not count."""
    h = lane.history
    return statistics.median(h.compute_s[1:] or h.compute_s), statistics.median(h.optimizer_s[1:] or h.optimizer_s)


def table(result: Result) -> Table:
    train, held_out = result.pairs
    shown = Table(
        title=f"code search, {held_out} held-out pairs, {result.config.steps} steps of {result.config.batch}",
        caption="all on held-out pairs; ¹ median time",
    )
    for name in ("", "MRR", "recall@1", "loss", "step¹", "optimizer¹", "share"):
        shown.add_column(name, justify="left" if not name else "right", no_wrap=True)
    shown.add_row("before", f"{result.before.mrr:.4f}", f"{result.before.recall_at_1:.4f}", f"{result.before.loss:.3f}", "", "", "")
    for lane, quality in zip(result.lanes, result.after, strict=True):
        compute, own = medians(lane)
        shown.add_row(
            lane.rule.label,
            f"{quality.mrr:.4f}",
            f"{quality.recall_at_1:.4f}",
            f"{quality.loss:.3f}",
            f"{(compute + own) * 1e3:.0f} ms",
            f"{own * 1e3:.2f} ms",
            f"{own / (compute + own):.1%}",
        )
    return shown


def notes(result: Result) -> list[str]:
    """Sentences under the table: what was compared, and how the two came out."""
    lines = [lane.rule.note for lane in result.lanes if lane.rule.note]
    if len(result.lanes) == 2:
        ours, other = result.lanes
        gap = max(abs(a - b) for a, b in zip(ours.history.loss, other.history.loss, strict=True))
        compute, own = (b / a for a, b in zip(medians(ours), medians(other)))
        lines.append(f"largest difference of the two loss curves: {gap:.3g}; {other.rule.label} takes {own:.2f} times our optimizer time")
        if result.config.compare == "peft":
            lines.append(f"PEFT takes {compute:.2f} times our forward and backward; its dropout masks are others, so the curves differ")
    for lane, adapted in zip(result.lanes, result.adapted, strict=False):
        share = adapted.trained / adapted.parameters
        lines.append(
            f"{lane.rule.label}: {adapted.trained:,} of {adapted.parameters:,} parameters trained ({share:.2%}); "
            f"a batch keeps {adapted.kept_for_backward / 1e6:,.0f} MB for backward"
        )
        kept = f"; {min(adapted.retained.values()):.4%} of the change kept in the worst of {len(adapted.retained)} layers" if adapted.retained else ""
        lines.append(f"merged into the weights: MRR {adapted.merged.mrr:.4f} (apart {quality_of(result, lane).mrr:.4f}){kept}")
    if result.quantized is not None:
        lines += quantized.notes(result.quantized, result.before, result.after[0], result.adapted[0].kept_for_backward)
    if (s := result.sparse) is not None:
        lines.append(
            f"{s.trained:,} of {s.parameters:,} weights trained ({s.trained / s.parameters:.2%}), {s.frozen_changed} others changed; "
            f"optimizer state {s.state_bytes / 1e6:,.1f} MB, {(s.dense_state_bytes - s.state_bytes) / 1e6:,.1f} MB less than of whole tensors"
        )
        per = s.delta_bytes / s.delta_entries if s.delta_entries else 0.0
        lines.append(f"what was trained, as a delta: {s.delta_bytes / 1e6:,.2f} MB ({per:.2f} bytes per weight); MRR {mrrs(result)}")
    return lines


def mrrs(result: Result) -> str:
    return f"{result.before.mrr:.4f} -> {result.after[0].mrr:.4f}"


def quality_of(result: Result, lane: Lane) -> Quality:
    return result.after[result.lanes.index(lane)]


def as_json(result: Result) -> dict[str, Any]:
    lanes = []
    for lane, quality in zip(result.lanes, result.after, strict=True):
        compute, own = medians(lane)
        hyper = {key: value for key, value in lane.optimizer.defaults.items() if isinstance(value, (int, float, str, tuple, type(None)))}
        lanes.append(
            {
                "label": lane.rule.label,
                "hyper": hyper | {"lr": lane.rule.lr},
                "note": lane.rule.note,
                "after": quality.as_dict(),
                "median_compute_s": compute,
                "median_optimizer_s": own,
                **lane.history.as_dict(),
            }
        )
    versions = {"fusedadapt": __version__, "torch": torch.__version__, "python": platform.python_version()}
    cuda = torch.cuda.get_device_name() if result.config.device == "cuda" else None
    return {
        "config": asdict(result.config),
        "versions": versions,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": result.config.threads, "gpu": cuda},
        "data": {"train": result.pairs[0], "held_out": result.pairs[1], "digest": result.data_digest},
        "before": result.before.as_dict(),
        "lanes": lanes,
        "adapted": [asdict(adapted) for adapted in result.adapted],
        "quantized": None if result.quantized is None else result.quantized.as_dict(),
        "sparse": None if result.sparse is None else asdict(result.sparse),
        "seconds": result.seconds,
    }


def write(result: Result, out: Path) -> list[Path]:
    """report.json, curves.png and curves.svg in ``out``; returns everything the run left there."""
    plot(result, [out / "curves.png", out / "curves.svg"])
    write_text(out / REPORT, json.dumps(as_json(result), indent=1) + "\n")  # last: it marks a finished run
    models = [out / folder / "model.safetensors" for folder in ("model", "model-compared")][: len(result.lanes)]
    if result.adapted:
        models.append(out / "adapter" / "adapter_model.safetensors")
    if result.sparse is not None:
        models.append(out / DELTA)
    return [*models, out / CHECKPOINT, out / "curves.png", out / "curves.svg", out / REPORT]


def plot(result: Result, paths: list[Path]) -> None:
    """Loss curves; median time per step, stacked; and the optimizer's part of it alone, which the stack is too coarse to show."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, steps, own = figure.subplots(1, 3, width_ratios=(2.2, 1, 1))
    _draw_losses(losses, result)
    _draw_steps(steps, own, result)
    config = result.config
    name = "tiny random encoder" if config.quick else "all-MiniLM-L6-v2 (22.7 M parameters)"
    where = "GPU" if config.device == "cuda" else f"{config.threads} CPU threads"
    figure.suptitle(
        f"{name}, code search over the Python standard library: {config.steps} steps of {config.batch}, {config.dtype}, {where}",
        fontsize=11,
    )
    for path in paths:
        figure.savefig(path, dpi=150)


def _draw_losses(axes: Any, result: Result) -> None:
    """Batches differ in difficulty by more than 60 steps change the model: the held-out loss before and after shows which way it went."""
    top, steps = 0.0, result.config.steps
    for at, (lane, quality, (strong, pale)) in enumerate(zip(result.lanes, result.after, COLOURS, strict=False)):
        loss = lane.history.loss
        smooth = [statistics.fmean(loss[max(0, i - 7) : i + 8]) for i in range(len(loss))]
        x = range(1, len(loss) + 1)
        top = max(top, max(loss), result.before.loss, quality.loss)
        # Equal curves lie on top of each other: the second one is dashed so that the first shows through.
        style = "-" if at == 0 else (0, (4, 3))
        axes.plot(x, loss, color=pale, linewidth=0.9, linestyle=style)
        axes.plot(
            x,
            smooth,
            color=strong,
            linewidth=2.2,
            linestyle=style,
            label=f"{lane.rule.label}: MRR {result.before.mrr:.3f} → {quality.mrr:.3f}",
        )
        axes.plot([0, steps], [result.before.loss, quality.loss], "o", color=strong, markersize=8 - 3 * at, clip_on=False, zorder=3)
    title = "training loss (thin: a batch, thick: mean of 15; dots: held-out, before and after)"
    axes.set(title=title, xlabel="step", ylabel="InfoNCE loss", ylim=(0, top * 1.05), xlim=(0, steps))
    axes.legend(frameon=False)
    _plain(axes)


def _draw_steps(whole: Any, own: Any, result: Result) -> None:
    names = [lane.rule.label.replace(" ", "\n", 1) for lane in result.lanes]
    times = [medians(lane) for lane in result.lanes]
    for at, ((compute, optimizer), (strong, pale)) in enumerate(zip(times, COLOURS, strict=False)):
        whole.bar(at, compute * 1e3, 0.55, color=pale)
        whole.bar(at, optimizer * 1e3, 0.55, bottom=compute * 1e3, color=strong)
        total = (compute + optimizer) * 1e3
        whole.annotate(
            f"{total:.0f} ms\n({optimizer * 1e3 / total:.1%} optimizer)",
            (at, total),
            ha="center",
            va="bottom",
            fontsize=9,
            xytext=(0, 2),
            textcoords="offset points",
        )
        own.bar(at, optimizer * 1e3, 0.55, color=strong)
        own.annotate(
            f"{optimizer * 1e3:.2f} ms",
            (at, optimizer * 1e3),
            ha="center",
            va="bottom",
            fontsize=9,
            xytext=(0, 2),
            textcoords="offset points",
        )
    whole.set(title="time per step, median\n(pale: forward + backward, dark: optimizer)", ylabel="ms", ylim=(0, max(map(sum, times)) * 1.2e3))
    own.set(title="optimizer alone, median", ylabel="ms", ylim=(0, max(t[1] for t in times) * 1.2e3))
    for axes in (whole, own):
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.7, len(names) - 0.3)
        _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(10)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)

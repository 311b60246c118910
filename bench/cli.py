"""The command line of the benches."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusedadapt.cli import positive
from fusedadapt.files import write_text


class Family(NamedTuple):
    """What the command needs of a family: rows of a device, how one is measured, and what is made of the results."""

    rows: list[Any]
    measure: Callable[..., Any]
    document: Callable[..., dict[str, Any]]
    table: Callable[..., Any]
    plots: Callable[[dict[str, Any], Path], list[Path]]


def family(name: str, device: str) -> Family:
    """Imports only what the family needs."""
    if name == "optim":
        from . import registry, report, runner

        chosen = [row for row in registry.ROWS if row.device == device]
        return Family(chosen, runner.measure, report.document, report.results_table, report.plots)
    if name == "sparse":
        from . import sparse, sparse_report, sparse_runner

        chosen = [row for row in sparse.ROWS if row.device == device]
        return Family(chosen, sparse_runner.measure, sparse_report.document, sparse_report.results_table, sparse_report.plots)
    if name == "quant":
        from . import quant, quant_report, quant_runner

        chosen = [row for row in quant.ROWS if row.device == device]
        return Family(chosen, quant_runner.measure, quant_report.document, quant_report.results_table, quant_report.plots)
    from . import lowrank, lowrank_report, lowrank_runner

    rows = [row for row in lowrank.ROWS if row.device == device]
    return Family(rows, lowrank_runner.measure, lowrank_report.document, lowrank_report.results_table, lowrank_report.plots)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedadapt bench",
        description="Times every row of the family's registry: contestants take turns in one process, medians are compared within the run.",
    )
    parser.add_argument("family", choices=("optim", "lowrank", "quant", "sparse"), help="what to time")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=positive(int), default=2, help="torch.set_num_threads; ours use as many (default 2)")
    parser.add_argument("--quick", action="store_true", help="smaller mixes and less time: a look, not a measurement")
    parser.add_argument("--seconds", type=positive(float), help="for the rounds of one row (default 6, quick 0.5)")
    parser.add_argument("--within", type=positive(float), metavar="S", help="begin no row after so many seconds (default: all rows)")
    parser.add_argument("--filter", type=_pattern, default="", metavar="RE", help="only rows whose name matches, e.g. 'adamw.*fp32'")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and goals there")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write plots there, PNG and SVG")
    parser.add_argument("--list", action="store_true", help="only name the rows")
    return parser


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}; escape what is meant literally") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 once everything asked for was timed (goals missed do not change that), 2 if the command line does not fit here."""
    options = _parser().parse_args(argv)
    import torch
    from rich.console import Console

    from fusedadapt.files import check_writable

    from .runner import Settings

    chosen = family(options.family, options.device)
    console = Console(width=None if sys.stdout.isatty() else 140)
    rows = [row for row in chosen.rows if options.filter.search(row.name)]
    if not rows:
        console.print(f"bench: expected --filter to match a row; {options.filter.pattern!r} matches none; --list names them", markup=False)
        return 2
    if options.list:
        console.print("\n".join(row.name for row in rows), markup=False, highlight=False)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        console.print("bench: expected a CUDA device; torch finds none; use --device cpu")
        return 2
    try:
        for path in filter(None, (options.json, options.plots and options.plots / "plot.png")):
            check_writable(path)
    except OSError as error:
        console.print(f"bench: expected to write {path}; {error.strerror}; choose another place", markup=False)
        return 2
    seconds = options.seconds if options.seconds is not None else 0.5 if options.quick else 6.0
    settings = Settings(options.device, options.threads, seconds, options.quick, (3 if options.quick else 5, 200))
    torch.set_num_threads(options.threads)
    results: list[Any] = []
    late: dict[str, str] = {}
    try:
        _measure(chosen, rows, settings, options.within, results, late, console)
    finally:  # whatever ended the run: a minute of measurements is not thrown away
        _report(chosen, results, late, settings, options, console)
    return 0


def _measure(chosen: Family, rows: list[Any], settings: Any, within: float | None, results: list[Any], late: dict[str, str], console: Any) -> None:
    """Appends to ``results``; rows without one go to ``late``, each with its reason."""
    import torch

    end = time.monotonic() + (math.inf if within is None else within)
    with console.status("…") as status:
        for row in rows:
            if time.monotonic() > end:
                late[row.name] = "--within was over"
                continue
            status.update(row.name)
            try:
                results.append(chosen.measure(row, settings))
            except torch.OutOfMemoryError as error:
                late[row.name] = str(error).splitlines()[0]


def _report(chosen: Family, results: list[Any], late: dict[str, str], settings: Any, options: argparse.Namespace, console: Any) -> None:
    """Tables and files."""
    from .report import goals_table

    report = chosen.document(results, settings)
    console.print(chosen.table(results))
    if report["goals"]:
        console.print(goals_table(report["goals"]))
    absent = {name: why for r in results for name, why in r.absent.items()}
    for name, why in (*sorted(absent.items()), *late.items()):
        console.print(f"not timed: {name} ({why})", markup=False, highlight=False, soft_wrap=True)
    if options.quick:
        console.print("a quick run: mixes are smaller than the goals mean", style="yellow")
    if options.json:
        write_text(options.json, json.dumps(report, indent=1) + "\n")
    if options.plots:
        console.print("\n".join(map(str, chosen.plots(report, options.plots))), markup=False, highlight=False)

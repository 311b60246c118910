"""The command line of the parity suite."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import positive
from ..config import interpret_triton
from ..files import write_text

if TYPE_CHECKING:
    from .suite import Report, Row

_BACKENDS = ("all", "reference", "cpp", "triton", "cuda", "emulated")
_DESCRIPTION = """Runs hostile random cases step by step beside the float64 reference and shows the worst errors.

Ours must meet: fp32 parameters 2 ulp, or 2e-6 of the update + 1 ulp; 16-bit parameters 1 ulp; states 8 ulp (16 bits: 1). An element beyond that is
excused if the exact result for inputs moved by a few fp32 roundings is as far away (signs of vanishing sums, cancelled variances), or where fp32
overflows. Frozen elements, gradients and parameters without a gradient must keep every bit."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedadapt parity", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=("optim",), help="what to check")
    parser.add_argument("--lib", metavar="NAME", help="check another library instead: torch, torch-fused, lion_pytorch, adabelief_pytorch, …")
    parser.add_argument("--backend", default="all", choices=_BACKENDS, help="of ours; all: every one that runs here (default)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the tensors under test are (default cpu)")
    parser.add_argument("--optimizer", action="append", metavar="NAME", help="only this one; may be given more than once")
    parser.add_argument("--cases", type=positive(int), default=20, help="per optimizer and backend; an eighth on interpreted Triton (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default 0)")
    parser.add_argument("--detail", action="store_true", help="a row for every kind of gradient")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row there")
    parser.add_argument("--strict", action="store_true", help="exit with 1 on mismatches of another library too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if ours met the bounds (another library always does, without --strict), 1 if not, 2 if the command line does not fit here."""
    options = _parser().parse_args(argv)
    if options.lib is None and options.device == "cpu" and options.backend in ("all", "triton") and "triton" not in sys.modules:
        interpret_triton()
    from rich.console import Console

    from .. import optim
    from . import suite

    console = Console(width=None if sys.stdout.isatty() else 150)
    unknown = [name for name in options.optimizer or () if name not in optim.OPTIMIZERS]
    if unknown:
        console.print(f"parity: expected --optimizer from {', '.join(optim.OPTIMIZERS)}; got {', '.join(unknown)}", style="red")
        return 2
    try:
        subjects = _subjects(options, console)
    except (ModuleNotFoundError, ValueError) as error:
        console.print(f"parity: {error}; install it, or choose another --lib, --optimizer or --backend", style="red", markup=False)
        return 2
    fault = _fault(options)
    if fault:
        console.print(f"parity: {fault}", style="red", markup=False)
        return 2
    with console.status("…") as status:
        names = options.optimizer or list(optim.OPTIMIZERS)
        report = suite.run(subjects, names, seed=options.seed, cases=options.cases, device=options.device, progress=status.update)
    _show(console, report, options.detail)
    if options.json:
        about = {"seed": options.seed, "lib": options.lib, "device": options.device, **report.as_json()}
        write_text(options.json, json.dumps(about, indent=1))
    return int(not report.clean and (options.lib is None or options.strict))


def _fault(options: argparse.Namespace) -> str:
    """What would stop the run, before it starts."""
    import torch

    from ..files import check_writable

    if abs(options.seed) + options.cases >= 2**63:
        return f"expected a --seed of 63 bits; got {options.seed}; choose a smaller one"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "expected a CUDA device; torch finds none; use --device cpu"
    try:
        if options.json:
            check_writable(options.json)
    except OSError as error:
        return f"expected to write {options.json}; {error.strerror}; choose another place"
    return ""


def _subjects(options: argparse.Namespace, console: Any) -> list[Any]:
    from .. import dispatch
    from .libs import Foreign
    from .suite import SLOW, ours

    if options.lib is not None:
        subject = Foreign(options.lib)
        if options.optimizer and (lacking := [name for name in options.optimizer if name not in subject.optimizers]):
            have = ", ".join(subject.optimizers)
            raise ValueError(f"expected --optimizer from what {options.lib} has here ({have}); got {', '.join(lacking)}")
        return [subject]
    reasons = dispatch.available_backends(options.device)
    if options.backend != "all":
        if reasons[options.backend]:
            raise ValueError(f"expected a backend that runs on {options.device} tensors; {options.backend}: {reasons[options.backend]}")
        return list(ours([options.backend]))
    for name, reason in reasons.items():
        note = reason or (f"every {SLOW[name]}th case or so: slow" if name in SLOW and options.device == "cpu" else "")
        if note:
            console.print(f"{name}: {'not run: ' if reason else ''}{note}", style="dim", markup=False, highlight=False)
    return list(ours([name for name, reason in reasons.items() if not reason]))


def _show(console: Any, report: Report, detail: bool) -> None:
    from rich.table import Table

    rows = list(report.rows.values()) if detail else report.merged()
    table = Table(title="worst error against the float64 truth, per step", title_justify="left")
    for name in ("subject", "optimizer", "parameter"):
        table.add_column(name)
    for name in ("p, ulp", "update", "states, ulp"):
        table.add_column(name, justify="right")
    table.add_column("gradient" if detail else "worst gradient")
    for name in ("elements", "excused", "mismatches"):
        table.add_column(name, justify="right")
    for r in sorted(rows, key=lambda r: (r.optimizer, r.dtype, r.subject, r.kind)):
        update = f"{r.update:.1e}" if r.update else "-"
        table.add_row(r.subject, r.optimizer, r.dtype, f"{r.ulp:.3g}", update, f"{r.state_ulp:.3g}", r.kind, f"{r.elements:,}", f"{r.excused:,}",
                      f"{r.mismatches:,}" if r.mismatches else "0", style="red" if r.mismatches else None)  # fmt: skip
    console.print(table)
    console.print("update: where p is off by more than 2 ulp, the error beyond 1 ulp as a share of the step", style="dim", highlight=False)
    for r in report.merged():
        if r.first:
            _say(console, f"{r.subject} {r.optimizer} {r.dtype}: {r.first}", r)
    alike: dict[tuple[str, str], str] = {}
    for subject, repro, error in report.refused:
        alike.setdefault((subject, error), repro)
    for (subject, error), repro in alike.items():
        console.print(f"{subject} refused a case: {error}\n    {repro}", style="yellow", markup=False, highlight=False)
    wrong = sum(r.mismatches for r in report.rows.values())
    verdict = "every bound met" if report.clean else f"{wrong:,} mismatches, {len(report.refused)} cases refused"
    console.print(f"{report.cases} cases, {sum(r.elements for r in report.rows.values()):,} updates of an element: {verdict}", highlight=False)


def _say(console: Any, text: str, row: Row) -> None:
    foreign = row.subject not in _BACKENDS
    console.print(f"{text}\n    {row.repro}{f' --lib {row.subject}' if foreign else f' --backend {row.subject}'}", markup=False, highlight=False)

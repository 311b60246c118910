"""`python -m fusedadapt quantize`: a model on disk in few bits, streamed tensor by tensor."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .formats import FORMATS, SCALE_RULES

if TYPE_CHECKING:
    from rich.table import Table

    from .report import QuantizationReport

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 2GB or 512MB; got {text!r}")
    return max(1, int(float(found[1]) * _UNITS[found[2].upper()]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedadapt quantize",
        description="Quantizes the linear layers of a safetensors model. nf4 and fp4 become bitsandbytes checkpoints, which transformers' "
        "from_pretrained loads; other formats become files for fusedadapt.quant.load_model_. The new folder appears when it is complete.",
        epilog=f"formats: {', '.join(FORMATS)}",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder with config.json and safetensors (shards with an index too), or one file")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist or is empty")
    parser.add_argument("--format", default="nf4", metavar="NAME", help="one of those below (default nf4)")
    parser.add_argument("--group-size", type=int, metavar="N", help="weights that share a scale; -1: a whole row (default: the format's own)")
    parser.add_argument("--double-quant", action="store_true", help="nf4, fp4: the scales in 8 bits")
    parser.add_argument("--compat", choices=("bnb_cpu",), help="nf4, fp4: cuts and ties of bitsandbytes' CPU code instead of its CUDA code")
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=None, help="integers: without or with zero points")
    rules = [*dict.fromkeys(rule for rules in SCALE_RULES.values() for rule in rules)]
    parser.add_argument("--scale-rule", choices=rules, help="MX formats and fp4_e2m1: which power of two")
    parser.add_argument("--group-axis", choices=("k", "n", "row", "tensor", "block"), help="what shares a scale: part of a row, of a column, ...")
    parser.add_argument("--skip", nargs="+", metavar="NAME", help="layers to leave alone: names, ends of names, globs, modules (default lm_head)")
    parser.add_argument("--include", nargs="+", metavar="NAME", default=(), help="quantize these matrices and no others")
    parser.add_argument("--device", help="quantize there, e.g. cuda (default: cpu)")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16", "float16"), help="nf4, fp4: in which bitsandbytes is to multiply")
    parser.add_argument("--max-shard-size", type=_bytes, default="2GB", metavar="SIZE", help="of an output file (default 2GB)")
    parser.add_argument("--json", metavar="FILE", help="write the report there, too")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if the model was written, 2 if the command line or the model does not fit, 1 if writing failed, 130 if interrupted."""
    options = _parser().parse_args(argv)
    start = time.perf_counter()
    if not options.quiet and importlib.util.find_spec("rich") is None:
        print("quantize: expected the package rich for bar and table; it is not installed; pip install rich, or --quiet", file=sys.stderr)
        return 2
    if options.json and (fault := _no_place(Path(options.json))):
        print(f"quantize: expected to write the report to {options.json}; {fault}; nothing was written", file=sys.stderr)
        return 1
    try:
        report = _quantize(options)
    except KeyboardInterrupt:
        print("quantize: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's; ours have words alone
            at = f" ({error.filename})" if error.filename else ""
            text = f"expected to read {options.model} and write {options.out}; {error.strerror}{at}; nothing was written"
            print(f"quantize: {text}", file=sys.stderr)
            return 1
        text = " ".join(str(error).split())
        print(text if text.startswith(("quantize:", "checkpoint:")) else f"quantize: {text}", file=sys.stderr)
        return 2
    if not options.quiet:
        _show(report)
    total, peak = report.total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    before, after = total.nbytes_before + report.other_nbytes, total.nbytes + report.other_nbytes
    print(
        f"{options.out}: {len(report.layers)} layers in {report.format}, {total.bits_per_weight:.3f} bits/weight, SQNR {total.sqnr:.2f} dB, "
        f"{before / 2**20:.1f} -> {after / 2**20:.1f} MiB, {time.perf_counter() - start:.1f} s, peak memory {peak / 2**20:.0f} MiB"
    )
    return _write_json(Path(options.json), report) if options.json else 0


def _quantize(options: Any) -> QuantizationReport:
    from .model import DEFAULT_SKIP
    from .stream import quantize_checkpoint

    names = ("compat", "symmetric", "scale_rule", "group_axis")
    extra = {name: value for name in names if (value := getattr(options, name)) is not None}
    with _bar(f"quantize {options.format}", not options.quiet) as advance:
        return quantize_checkpoint(
            options.model,
            options.out,
            options.format,
            skip=DEFAULT_SKIP if options.skip is None else options.skip,
            include=options.include,
            group_size=options.group_size,
            device=options.device,
            compute_dtype=options.compute_dtype,
            max_shard_bytes=options.max_shard_size,
            advance=advance,
            **({"double_quant": True} if options.double_quant else {}),
            **extra,
        )


@contextlib.contextmanager
def _bar(title: str, show: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar of bytes read, on stderr."""
    if not show:
        yield lambda name, nbytes, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.fields[name]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, name="")
        yield lambda name, nbytes, total: bar.update(task, advance=nbytes, total=total, name=name)


def _show(report: QuantizationReport) -> None:
    """A table as wide as the terminal; into a file or a pipe, plain text of any width."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        print(report)
        return
    console.print(_table(report, console.width))
    for line in report.remarks:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(report: QuantizationReport, width: int) -> Table:
    from rich import box
    from rich.table import Table

    from .report import COLUMNS, row

    # In a narrow terminal the name is worth more than the sizes and times.
    shown = [i for i in range(len(COLUMNS)) if width >= 110 or i < 5]
    table, total = Table(box=box.SIMPLE_HEAD, show_footer=True), row(report.total)
    for i in shown:
        table.add_column(COLUMNS[i], total[i], justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
    for layer in report.layers:
        table.add_row(*(row(layer)[i] for i in shown))
    return table


def _no_place(path: Path) -> str | None:
    """Why no file can be written there, before the work whose report it is; makes no folder: this may be the one that the model gets."""
    from ..files import check_writable

    there = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        check_writable(path if path.parent.exists() else there / f".{path.name}.tmp")
    except OSError as error:
        return error.strerror or str(error)
    return None


def _write_json(path: Path, report: QuantizationReport) -> int:
    from ..files import write_text

    try:
        write_text(path, json.dumps(report.as_dict(), indent=2, allow_nan=False) + "\n")
    except OSError as error:
        print(f"quantize: expected to write the report to {path}; {error.strerror or error}; the model itself is complete", file=sys.stderr)
        return 1
    return 0

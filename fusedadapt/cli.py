"""`python -m fusedadapt <command>`: finds the command's module and hands it the rest of the line, so that only the named command is
imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__, config

# command -> (module with main(argv) -> exit code, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("fusedadapt.doctor", "versions, backends found and why others are absent, a short self-test; or what is wrong with a checkpoint"),
    "finetune": ("fusedadapt.finetune.cli", "fine-tune a real pretrained encoder for code search, whole or by adapters"),
    "bench": ("fusedadapt.bench", "time optimizers or adapters against torch and PEFT side by side"),
    "quantize": ("fusedadapt.quant.cli", "a model on disk in few bits: nf4, int4, fp8, mxfp4 and others, streamed"),
    "merge": ("fusedadapt.sparse.cli", "merge fine-tuned models on disk: ties, dare, della, slerp and others, out of core"),
    "parity": ("fusedadapt.parity", "worst error against the fp64 truth per rule, dtype and case, for ours or another library"),
}


def positive(kind: type[int] | type[float], zero: bool = False) -> Any:
    """argparse's `type` for finite numbers above 0 (or from 0 on)."""

    def number(text: str) -> int | float:
        value = kind(text)
        if not (0 <= value if zero else 0 < value) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"expected {'0 or more' if zero else 'more than 0'}, got {text}")
        return value

    return number


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m fusedadapt",
        description="Fused kernels for adapting models: what is here, is it right, how fast is it.",
        epilog=f"commands:\n{listing}\n\n`python -m fusedadapt <command> --help` tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="command", help="one of those below; everything after it goes to the command")
    parser.add_argument("--version", action="version", version=f"fusedadapt {__version__}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 fine, 1 the command found a fault, 2 the command line, a setting or the installation has
    one, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        parser = _parser()
        parser.parse_args(arguments)  # --help, --version and an unknown command end here
        parser.print_help()
        return 2
    command, rest = arguments[0], arguments[1:]
    target = COMMANDS[command][0]
    faults = config.faults()
    if faults and command != "doctor":  # which reports them among the rest
        print(f"fusedadapt {command}: {next(iter(faults.values()))}", file=sys.stderr)
        return 2
    try:
        try:
            module = importlib.import_module(target)
        except ModuleNotFoundError as error:
            if error.name is not None and target.startswith(error.name):
                fix = "this installation does not carry it; reinstall fusedadapt or run from a checkout"
            else:
                fix = "pip install 'fusedadapt[demo]'"
            print(f"fusedadapt {command}: expected module {error.name}; it is not installed; {fix}", file=sys.stderr)
            return 2
        return int(module.main(rest) or 0)
    except KeyboardInterrupt:  # of the commands that have nothing to say about what is left, and while one is imported, which takes seconds
        print(f"fusedadapt {command}: interrupted", file=sys.stderr)
        return 130

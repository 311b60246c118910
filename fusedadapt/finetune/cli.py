"""``python -m fusedadapt finetune``: fine-tune a real pretrained encoder on real data with a fused optimizer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..checkpoint import CheckpointError
from ..cli import positive
from ..lowrank.methods import METHODS
from . import report
from .adapters import ADAPTERS, IN_PEFT, INITS
from .errors import FinetuneError
from .optimizers import RECIPES, Recipe
from .quantized import CHOICES
from .sparse import SELECT
from .train import CHECKPOINT, DTYPES, REPORT, Config, run, stored_config

DEFAULT_OUT = Path("runs/finetune")
SAVE_EVERY = 20
QUICK = {"steps": 30, "batch": 16, "lr": 2e-3}  # of --quick, unless given: a random model learns at a pretraining rate


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0, at most 1; got {text}")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer of 64 bits; got {text}")
    return value


def parser() -> argparse.ArgumentParser:
    """Every default is SUPPRESS, so that what was typed can be told from what was not: a resumed run takes the rest from its checkpoint."""
    p = argparse.ArgumentParser(
        prog="python -m fusedadapt finetune",
        description="Fine-tune all-MiniLM-L6-v2 (22.7 M parameters) for code search over the Python standard library.",
        argument_default=argparse.SUPPRESS,
    )
    d = Config()
    p.add_argument("--optimizer", metavar="NAME", help=f"any rule of fusedadapt.optim, or torch:CLASS (default {d.optimizer})")
    p.add_argument("--compare", choices=["torch", "peft"], help="side by side: torch's optimizer of the same name, or PEFT's adapter")
    p.add_argument("--adapter", choices=list(ADAPTERS), help="train a low-rank adapter and freeze the rest; merged at the end")
    p.add_argument("--rank", type=positive(int), help=f"of the adapter (default {d.rank})")
    p.add_argument("--alpha", type=positive(float), help=f"scaling times rank, as LoRA counts it (default {d.alpha:g})")
    p.add_argument("--dropout", type=positive(float, zero=True), help=f"on the adapter's input (default {d.dropout})")
    p.add_argument("--init", choices=INITS, help="of lora_A and lora_B (default: the method's own)")
    p.add_argument(
        "--quant", choices=list(CHOICES), metavar="FORMAT", help="the linear layers in few bits, under an adapter: nf4, int4, fp8_e4m3, ..."
    )
    p.add_argument("--sparse", type=share, metavar="DENSITY", help="train that share of the weights and leave the rest's bits alone")
    p.add_argument("--select", choices=list(SELECT), help=f"which, with --sparse (default {d.select}: {SELECT[d.select]})")
    p.add_argument("--steps", type=positive(int), help=f"default {d.steps}")
    p.add_argument("--batch", type=positive(int), help=f"pairs per step (default {d.batch})")
    p.add_argument("--lr", type=positive(float), help="peak learning rate (default: per rule, AdamW 5e-5)")
    p.add_argument("--weight-decay", type=positive(float, zero=True), help="of matrices and embeddings (default: the rule's)")
    p.add_argument("--max-grad-norm", type=positive(float), help="clip the global gradient norm")
    p.add_argument("--seed", type=seed, metavar="N", help=f"order of the data and all randomness (default {d.seed})")
    p.add_argument("--device", choices=["cpu", "cuda"], help=f"default {d.device}")
    p.add_argument("--dtype", choices=list(DTYPES), help=f"of weights and gradients (default {d.dtype})")
    p.add_argument("--master-weights", choices=["fp32", "split"], help="keep exact weights beside bf16 ones")
    p.add_argument("--stochastic-rounding", action="store_true", help="round bf16 weights stochastically")
    p.add_argument("--threads", type=positive(int), help=f"CPU threads (default: torch's, {d.threads} here)")
    p.add_argument("--quick", action="store_true", help="a tiny random encoder on a part of the data: the whole path in seconds, needs no weights")
    p.add_argument("--out", type=Path, metavar="DIR", help=f"where results go (default {DEFAULT_OUT})")
    p.add_argument("--resume", nargs="?", const=None, type=Path, metavar="DIR", help="continue the run in DIR (default: in --out)")
    p.add_argument(
        "--save-every",
        type=positive(int, zero=True),
        metavar="N",
        help=f"steps between checkpoints, 0: at the end only (default {SAVE_EVERY})",
    )
    return p


def configure(typed: dict[str, Any]) -> tuple[Config, Path, bool]:
    """(configuration, folder, resume?) from what was typed; FinetuneError where it does not fit the stored run or this machine."""
    fields = {key: value for key, value in typed.items() if key in Config.__dataclass_fields__}
    resume = "resume" in typed
    out: Path = typed.get("out") or typed.get("resume") or DEFAULT_OUT
    if resume:
        config = stored_config((typed.get("resume") or out) / CHECKPOINT)
        for key, value in fields.items():
            if value != getattr(config, key):
                flag = key.replace("_", "-")
                raise FinetuneError(
                    f"finetune: expected the stored run's --{flag} {getattr(config, key)}; got {value}; drop the option or start a new run"
                )
    else:
        config = Config(**(QUICK | fields if fields.get("quick") else fields))
        if (out / CHECKPOINT).exists() and not (out / REPORT).exists():
            raise FinetuneError(f"finetune: expected a new folder; {out} holds an unfinished run; add --resume, choose another --out, or delete it")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise FinetuneError("finetune: expected a GPU for --device cuda; torch finds none; use --device cpu")
    if config.dtype == "fp32" and (config.master_weights or config.stochastic_rounding):
        raise FinetuneError(
            "finetune: expected --dtype bf16 with --master-weights or --stochastic-rounding; got fp32, which needs neither; add --dtype bf16"
        )
    _check_adapter(config, fields)
    _check_sparse(config, fields)
    return config, out, resume


def _check_adapter(config: Config, typed: dict[str, Any]) -> None:
    """FinetuneError where the adapter's options do not fit."""
    own = sorted({"rank", "alpha", "dropout", "init"} & typed.keys())
    if config.adapter is None and own:
        raise FinetuneError(f"finetune: expected --adapter with --{own[0]}; got none; add --adapter lora or drop the option")
    if own and config.adapter is not None and not METHODS[config.adapter].ranked:
        got = f"--{own[0]} {typed[own[0]]}"
        raise FinetuneError(f"finetune: expected no --{own[0]} with --adapter {config.adapter}, which has no rank; got {got}; drop --{own[0]}")
    if config.quant is not None and config.adapter is None:
        raise FinetuneError(
            f"finetune: expected --adapter with --quant; got {config.quant} alone; add --adapter lora: packed weights are not trained"
        )
    if config.quant is not None and config.compare == "peft":
        raise FinetuneError("finetune: expected no --compare peft with --quant; got both; drop one of them")
    if config.dropout >= 1:
        raise FinetuneError(f"finetune: expected --dropout below 1; got {config.dropout:g}; use a probability like 0.05")
    if config.compare == "peft" and config.adapter not in IN_PEFT:
        got = f"--adapter {config.adapter}" if config.adapter else "no adapter"
        raise FinetuneError(f"finetune: expected --adapter {'|'.join(IN_PEFT)} with --compare peft; got {got}; choose one of them")
    if config.adapter is not None and (config.master_weights or config.stochastic_rounding):
        raise FinetuneError("finetune: expected no --master-weights or --stochastic-rounding with --adapter; got both; drop them: adapters are fp32")
    if config.adapter is not None and RECIPES.get(config.optimizer.lower(), Recipe()).create_graph:
        raise FinetuneError(
            f"finetune: expected a first-order rule with --adapter; got {config.optimizer}, whose Hessian needs second derivatives; "
            "the fused layers have none; choose another rule or drop --adapter"
        )
    if config.init is not None and config.adapter not in IN_PEFT:
        raise FinetuneError(f"finetune: expected --adapter {'|'.join(IN_PEFT)} with --init; got {config.adapter}, which has its own; drop --init")
    if config.adapter == "adalora" and config.steps < 2:  # ranks are pruned by the scores of earlier steps
        raise FinetuneError(f"finetune: expected at least 2 --steps with --adapter adalora; got {config.steps}; train longer or take lora")


def _check_sparse(config: Config, typed: dict[str, Any]) -> None:
    """FinetuneError where the options of --sparse do not fit."""
    if config.sparse is None:
        if "select" in typed:
            raise FinetuneError("finetune: expected --sparse with --select; got none; add --sparse 0.01 or drop the option")
        return
    for name in ("adapter", "compare"):
        if getattr(config, name) is not None:
            raise FinetuneError(f"finetune: expected no --{name} with --sparse; got {getattr(config, name)}; drop one of them")
    if config.optimizer.lower().startswith("torch:"):
        raise FinetuneError(f"finetune: expected one of our rules with --sparse; got {config.optimizer!r}, which has no masks; drop the 'torch:'")


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: writing failed; 2: bad arguments or a damaged checkpoint, said in one line; 130: interrupted, resumable."""
    typed = vars(parser().parse_args(argv))
    console = Console()
    try:
        config, out, resume = configure(typed)
        if resume and typed.get("resume") and typed["resume"] != out:
            raise FinetuneError(f"finetune: expected one folder; got --resume {typed['resume']} and --out {out}; drop --out")
        out.mkdir(parents=True, exist_ok=True)
        result = run(config, out, report.Screen(console), save_every=typed.get("save_every", SAVE_EVERY), resume=resume)
        paths = report.write(result, out)
    except (FinetuneError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = (out / CHECKPOINT).exists()
        print(f"interrupted; continue with: --resume {out}" if kept else "interrupted before the first checkpoint", file=sys.stderr)
        return 130
    except OSError as error:
        at = f"{error.filename}: " if error.filename else ""
        print(f"finetune: expected to write into {out}; {at}{error.strerror or error}; make room there or choose another --out", file=sys.stderr)
        return 1
    console.print(report.table(result))
    for line in report.notes(result):
        console.print(line, highlight=False)
    for path in paths:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    parts = [(", {}", config.adapter), (" on {}", config.quant), (", {:g} of the weights", config.sparse)]
    name = config.optimizer + "".join(text.format(value) for text, value in parts if value)
    console.print(f"{name}: {result.seconds:.0f} s in all", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

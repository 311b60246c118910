"""`python -m fusedadapt merge`: merges model files, one tensor at a time."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

METHODS = (
    "linear, slerp, task_arithmetic, ties, dare_linear, dare_ties, darex, breadcrumbs, breadcrumbs_ties, della, della_linear, magnitude_prune, "
    "pcb, fisher"
)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedadapt merge",
        description="Merges fine-tuned models of one architecture into one. Each is a .safetensors file or a folder of them. Tensors are read, "
        "merged and written one at a time; the output appears when it is complete.",
        epilog=f"methods: {METHODS}",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="the fine-tuned models")
    parser.add_argument("--base", metavar="MODEL", help="what they were fine-tuned from; not needed for linear and fisher")
    parser.add_argument("--out", required=True, metavar="PATH", help="a new .safetensors file, or a new or empty folder, sharded as the base is")
    parser.add_argument("--method", default="ties", metavar="NAME", help="one of those below (default ties, which needs --density)")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="one per model (default 1)")
    parser.add_argument(
        "--density", type=float, nargs="+", metavar="D", help="share of each change that stays, where a method cuts or drops: one, or one per model"
    )
    parser.add_argument("--lambda", dest="lambda_", type=float, default=1.0, metavar="L", help="scale of the merged change (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of random drops (default 0)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the result (default: the base's)")
    parser.add_argument("--compat", default="paper", choices=("paper", "peft", "mergekit"), help="whose formulas, where they differ (default paper)")
    parser.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=None, help="divide by the sum of weights (default: the method's)"
    )
    parser.add_argument(
        "--rescale", action=argparse.BooleanOptionalAction, default=None, help="scale what stays for what went (default: after random drops)"
    )
    parser.add_argument(
        "--majority-sign-method", default="total", choices=("total", "frequency"), help="ties: the sign of the sum, or of most (default total)"
    )
    parser.add_argument("--t", type=float, help="slerp: 0 is the base, 1 the model")
    parser.add_argument("--gamma", type=float, default=0.01, help="breadcrumbs: share of the largest changes that goes (default 0.01)")
    parser.add_argument("--epsilon", type=float, help="della: spread of the chances around the density")
    parser.add_argument("--q", type=float, help="darex: the divisor (default: the density)")
    parser.add_argument("--fishers", nargs="+", metavar="MODEL", help="fisher: diagonal Fisher information, one per model")
    parser.add_argument("--device", help="compute there, e.g. cuda (default: cpu)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if the merged model was written, 2 if the command line or a model does not fit, 1 if writing failed, 130 if interrupted."""
    options = _parser().parse_args(argv)
    start = time.perf_counter()
    try:
        out = _merge(options)
    except KeyboardInterrupt:
        print("merge: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError) as error:
        print(_one_line(error), file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None:  # ours: a model that is not there, an output that is
            print(_one_line(error), file=sys.stderr)
            return 2
        print(f"merge: expected to write {options.out}; {error.strerror}; nothing was written", file=sys.stderr)
        return 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{out}: {len(options.models)} models, {options.method}, {time.perf_counter() - start:.1f} s, peak memory {peak / 2**20:.0f} MiB")
    return 0


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.startswith("merge:") else f"merge: {text}"


def _merge(options: Any) -> Path:
    from . import merge

    if not options.out:
        raise ValueError("merge: expected --out to name a file or a folder; got an empty name; pass where the merged model goes")
    density = options.density[0] if options.density is not None and len(options.density) == 1 else options.density
    out = merge(
        options.base,
        options.models,
        options.method,
        weights=options.weights,
        density=density,
        lambda_=options.lambda_,
        dtype=_dtype(options.dtype),
        seed=options.seed,
        compat=options.compat,
        normalize=options.normalize,
        rescale=options.rescale,
        majority_sign_method=options.majority_sign_method,
        t=options.t,
        gamma=options.gamma,
        epsilon=options.epsilon,
        q=options.q,
        fishers=options.fishers,
        out=options.out,
        device=options.device,
        progress=not options.quiet,
    )
    assert isinstance(out, Path)
    return out


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype

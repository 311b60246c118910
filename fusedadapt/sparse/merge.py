"""Merging fine-tuned models in one streaming pass per tensor: nothing of a model's size is held beside inputs and output.

Peak memory: the inputs' tensors of one name, the result, and 64 MiB (della sorts whole rows). float64 and backends without kernels of their own go
through the reference, which needs a few times a tensor's size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import sparse as ops
from . import merge_methods as methods
from . import pcb
from .merge_methods import COMPAT, METHODS, Job
from .weights import MERGED, Model, Source, Writer, check_alike, check_fishers, floating, open_all

SPECIAL = ("slerp", "pcb", "fisher")
Compute = Callable[[str, Tensor, tuple[int, ...]], None]
#: methods that normalise by the sum of weights unless told otherwise, by compat
_NORMALIZED = {"linear": COMPAT, "ties": ("mergekit",), "della": ("mergekit",), "fisher": COMPAT}


def merge(
    base: Source | None,
    models: Sequence[Source],
    method: str = "ties",
    *,
    weights: Sequence[float] | None = None,
    density: float | Sequence[float] | None = None,
    lambda_: float = 1.0,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    compat: str = "paper",
    normalize: bool | None = None,
    rescale: bool | None = None,
    majority_sign_method: str = "total",
    t: float | None = None,
    gamma: float = 0.01,
    epsilon: float | None = None,
    q: float | None = None,
    fishers: Sequence[Source] | None = None,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, Tensor] | Path:
    """Merges models of one architecture (task vectors d_i = theta_i - theta_0, in fp32, rounded once).

    Args:
        base: theta_0: a state dict, a safetensors file, or a folder of them. None with "linear" and "fisher"; one end of "slerp".
        models: the fine-tuned ones, likewise: the same names, shapes and dtypes; float32, bfloat16, float16 or float64 (which is computed in fp64).
        method: "linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "darex", "breadcrumbs", "breadcrumbs_ties", "della",
            "della_linear", "magnitude_prune", "pcb" or "fisher".
        weights: one per model (1). density: share of each model's change that stays, one or one per model. lambda_: scale of the merged change.
        dtype: of the result; the base's by default. seed: of the random drops, which depend on (seed, model, tensor name, element) alone.
        compat: where implementations differ, "paper" (the authors' code), "peft" or "mergekit"; docs/sparse.md lists the differences.
        normalize: divide by the sum of weights. rescale: scale what stays of a change for what went: a drop's by 1 / density (mergekit: to the former
            L1 norm), unless False; with True and compat="mergekit" also what ties, magnitude_prune and breadcrumbs leave. majority_sign_method: the
            sign that ties elect: of the sum ("total"), or the one that most models have ("frequency"). t: slerp's position. gamma: share of outliers
            that breadcrumbs removes. epsilon: della's spread. q: darex's divisor (the density by default). fishers: diagonal Fisher information, one
            per model, in any floating dtype; with normalize (the default) each is divided by its L2 norm over all tensors first.
        out: write there, out of core and atomically, instead of returning tensors: a new .safetensors file, or a new or empty folder, sharded as the
            base is, with the configuration and tokenizer of its folder.
        device: compute there, one tensor at a time; by default where the base's tensor is. progress: show a bar.

    Returns:
        name -> tensor, or the path written. Tensors that are not floating-point come from the first model.

    Raises:
        ValueError: unknown method or compat, arguments that do not fit it, models that differ in names, shapes or dtypes (all listed), files that
            are no models, an `out` that is one of the inputs. FileNotFoundError. FileExistsError: `out` is a file that is there, or a folder with
            something in it. OSError while writing; `out` is as before then.
    """
    _check_words(method, compat, majority_sign_method, dtype, device)
    _check_numbers(lambda_=lambda_, seed=seed, gamma=gamma, epsilon=epsilon, q=q, t=t, weights=weights, density=density)
    opened = _open(base, models, method, device)
    job = _job(method, None if base is None else opened[0], opened if base is None else opened[1:], weights, density, compat, normalize)
    job.lambda_, job.seed, job.gamma, job.q = float(lambda_), int(seed), float(gamma), None if q is None else float(q)
    job.epsilon = epsilon if epsilon is not None else 0.15 if compat == "mergekit" else 0.05
    job.rescale, job.by_count = rescale, majority_sign_method == "frequency"
    _check_options(job, t, fishers)
    _check_unused(method, compat, weights, density, normalize, gamma, epsilon)
    return _run(job, opened, open_all(fishers or (), device), dtype, t, None if out is None else Path(out), progress)


def _run(
    job: Job, opened: list[Model], information: list[Model], dtype: torch.dtype | None, t: float | None, out: Path | None, progress: bool
) -> dict[str, Tensor] | Path:
    first = opened[0]
    about = {n: ((dtype if dtype is not None and d in MERGED else d), s) for n, (d, s) in first.about.items()}
    writer = None if out is None else Writer(out, first, about, opened + information)
    with torch.no_grad(), _bar(len(about), job.name, progress) as advance:
        tensor = _tensors(job, first, about, _computer(job, t, information), advance)
        return {name: tensor(name) for name in about} if writer is None else writer.write(tensor)


def _check_words(method: str, compat: str, sign: str, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    if method not in METHODS and method not in SPECIAL:
        raise ValueError(f"merge: expected a method among {', '.join([*METHODS, *SPECIAL])}; got {method!r}")
    if compat not in COMPAT:
        raise ValueError(f"merge: expected compat to be one of {', '.join(COMPAT)}; got {compat!r}")
    if sign not in ("total", "frequency") or (sign == "frequency" and (method in SPECIAL or not METHODS[method].elect)):
        raise ValueError(f'merge: expected majority_sign_method to be "total", or "frequency" where signs are elected; got {sign!r} with {method!r}')
    if dtype is not None and dtype not in MERGED:
        raise ValueError(f"merge: expected dtype to be float32, bfloat16, float16 or float64; got {dtype}")
    try:
        torch.empty(0, dtype=torch.uint8, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"merge: expected a device that torch can use; got {device!r} ({str(error).splitlines()[0]}); leave it out") from error


def _check_numbers(**given: Any) -> None:
    """Numbers, or several of them for weights and density; numpy's and tensors of one element are numbers too."""
    optional = ("epsilon", "q", "t", "weights", "density")
    for name, value in given.items():
        several = name in ("weights", "density") and isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) > 0
        for number in value if several else [value]:
            one = isinstance(number, Real) or (isinstance(number, Tensor) and number.numel() == 1)
            whole = name != "seed" or (one and math.isfinite(number) and int(number) == number)
            if not (one or (number is None and name in optional and not several)) or not whole:
                raise ValueError(f"merge: expected {'an integer' if name == 'seed' else 'a number'} as {name}; got {number!r}; convert it")


def _tensors(
    job: Job,
    first: Model,
    about: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    compute: Callable[[str, Tensor, tuple[int, ...]], None],
    advance: Callable[[], None],
) -> Callable[[str], Tensor]:
    """name -> the merged tensor, or a copy of the first model's where it is not floating-point."""
    chosen = set(floating(first))

    def tensor(name: str) -> Tensor:
        kind, shape = about[name]
        if name in chosen:
            result = torch.empty(shape, dtype=kind, device=first.device_of(name))
            if result.numel():
                compute(name, result.view(-1), shape)
        else:
            result = job.models[0][name].clone()
        advance()
        return result

    return tensor


def _open(base: Source | None, models: Sequence[Source], method: str, device: torch.device | str | None) -> list[Model]:
    needs_base = method not in ("linear", "fisher")
    if needs_base and base is None:
        raise ValueError(f"merge: expected a base with {method!r}; got None; its changes are taken from it")
    models = list(models) if isinstance(models, Iterable) and not isinstance(models, str | Mapping) else models
    if isinstance(models, str | Path | Mapping) or not models:
        raise ValueError(f"merge: expected a list of at least one model; got {'none' if not models else type(models).__name__}; pass [model, ...]")
    if method == "slerp" and len(models) != 1:
        raise ValueError(f'merge: expected the base and one model with "slerp"; got {len(models)} models')
    sources = ([] if base is None else [base]) + list(models)
    labels = ([] if base is None else ["base"]) + [f"model {i}" for i in range(len(models))]
    opened = open_all(sources, device)
    check_alike(opened, [f"{label} ({m.path})" if m.path else label for label, m in zip(labels, opened, strict=True)])
    return opened


def _job(method: str, base: Model | None, models: list[Model], weights: Any, density: Any, compat: str, normalize: bool | None) -> Job:
    if isinstance(weights, Real):
        raise ValueError(f"merge: expected {len(models)} weights, one per model; got the number {weights}; pass a list")
    values = [1.0] * len(models) if weights is None else [float(w) for w in weights]
    if len(values) != len(models) or not all(math.isfinite(w) for w in values):
        raise ValueError(f"merge: expected {len(models)} finite weights, one per model; got {values}")
    wanted: Any = (0.1 if method == "pcb" else 1.0) if density is None else density
    wanted = wanted.tolist() if isinstance(wanted, Tensor | np.ndarray) else wanted
    densities = [float(wanted)] * len(models) if isinstance(wanted, Real) else [float(d) for d in wanted]
    if len(densities) != len(models) or not all(0.0 <= d <= 1.0 for d in densities):
        raise ValueError(f"merge: expected a density in [0, 1], or {len(models)} of them; got {density}")
    spec = METHODS.get(method)
    if density is None and spec is not None and (spec.trim or spec.drop):
        raise ValueError(f"merge: expected density= with {method!r}; got none; 0.2 keeps a fifth of each change")
    normal = compat in _NORMALIZED.get(method, ()) if normalize is None else normalize
    if method == "linear" and normal and abs(sum(values)) < 1e-8:
        raise ValueError(f"merge: expected weights that do not add up to 0, which a mean is divided by; got {values}; normalize=False sums them")
    if method == "fisher" and abs(sum(values)) < 1e-8:
        raise ValueError(f'merge: expected weights of a sum other than 0 with "fisher", which divides by it; got {values}; leave them out')
    base = base if spec is None or spec.base else None
    return Job(method, base, models, values, densities, 1.0, 0, compat, normal, 0.01, 0.0, None)


def _check_options(job: Job, t: float | None, fishers: Sequence[Source] | None) -> None:
    _check_rescale(job)
    if (job.name == "slerp") != (t is not None):
        raise ValueError(f'merge: expected t= with "slerp" and only there; got t={t} with {job.name!r}')
    if (job.name == "fisher") != (fishers is not None):
        raise ValueError(f'merge: expected fishers= with "fisher" and only there; got {"some" if fishers is not None else "none"} with {job.name!r}')
    if fishers is not None and len(fishers) != len(job.models):
        raise ValueError(f"merge: expected {len(job.models)} fishers, one per model; got {len(fishers)}")
    if job.q is not None and (job.name != "darex" or not 0 < job.q < math.inf):
        raise ValueError(f'merge: expected a finite q > 0, with "darex" only; got q={job.q} with {job.name!r}')
    if not math.isfinite(job.lambda_) or (job.lambda_ != 1.0 and job.name in ("linear", "slerp", "fisher")):
        raise ValueError(f"merge: expected a finite lambda_, 1 with linear, slerp and fisher; got {job.lambda_} with {job.name!r}; use weights=")
    if t is not None and not math.isfinite(t):
        raise ValueError(f"merge: expected a finite t; got {t}")
    if not 0.0 <= job.gamma <= 1.0:
        raise ValueError(f"merge: expected gamma in [0, 1], a share of each change; got {job.gamma}")
    if job.name == "pcb" and job.compat != "paper":
        raise ValueError(f'merge: expected compat="paper" with "pcb": nobody else has it; got {job.compat!r}')
    if job.name in METHODS and job.method.drop == "rank":
        none = job.compat == "mergekit"  # there, density 0 keeps nothing without a look at epsilon
        bad = [d for d in job.density if not (d == 1 or (none and d == 0) or (0 < d - job.epsilon and d + job.epsilon < 1))]
        if bad or not job.epsilon >= 0:
            raise ValueError(
                f"merge: expected epsilon >= 0 with density - epsilon and density + epsilon inside (0, 1); got density {bad or job.density}, "
                f"epsilon {job.epsilon}; a smaller epsilon fits"
            )
    scaled = job.q is None and (job.name == "darex" or (job.compat == "peft" and job.rescale is not False))  # by 1 / density, whatever stays
    if scaled and job.name in METHODS and job.method.drop == "chance" and 0.0 in job.density:
        raise ValueError(f"merge: expected a density above 0 with {job.name!r}; got {job.density}: 0 / 0 is no weight; leave those models out")


def _check_rescale(job: Job) -> None:
    spec = METHODS.get(job.name)
    drops = spec is not None and spec.drop is not None and job.name != "darex"
    trims = spec is not None and spec.trim is not None and job.compat == "mergekit"
    if job.rescale is not None and not (drops or trims):
        raise ValueError(
            f'merge: expected rescale= with dare or della, or with compat="mergekit" and ties, magnitude_prune or breadcrumbs; got {job.rescale} '
            f"with {job.name!r} and compat={job.compat!r}; leave it out"
        )


def _check_unused(method: str, compat: str, weights: Any, density: Any, normalize: bool | None, gamma: float, epsilon: float | None) -> None:
    """An argument without effect is a misunderstanding."""
    spec = METHODS.get(method)
    sparse = method == "pcb" if spec is None else spec.trim is not None or spec.drop is not None
    given = {
        "weights": weights is not None and method == "slerp",
        "density": density is not None and not sparse,
        "normalize": normalize is not None and (method in ("slerp", "pcb") or (spec is not None and spec.elect and compat != "mergekit")),
        "gamma": gamma != 0.01 and not (spec is not None and spec.trim == "middle"),
        "epsilon": epsilon is not None and not (spec is not None and spec.drop == "rank"),
    }
    if unused := [f"{name}=" for name, is_unused in given.items() if is_unused]:
        raise ValueError(f'merge: expected only arguments that {method!r} with compat="{compat}" uses; got {", ".join(unused)}; leave it out')


def _computer(job: Job, t: float | None, information: Sequence[Model]) -> Compute:
    """(name, flat result, shape) -> the merged tensor in `result`. Here whole models are looked at, where a method must."""
    if job.name == "slerp":
        assert job.base is not None and t is not None
        start, end, at = job.base, job.models[0], float(t)
        return lambda name, result, shape: methods.slerp(start[name].reshape(-1), end[name].reshape(-1), at, result)
    if job.name == "fisher":
        check_fishers(job.models[0], information)
        scale = [w / _norm(f) if job.normalize else w for w, f in zip(job.weights, information, strict=True)]

        def fisher(name: str, result: Tensor, shape: tuple[int, ...]) -> None:
            methods.fisher([m[name].reshape(-1) for m in job.models], [f[name].reshape(-1) for f in information], scale, result)

        return fisher
    if job.lambda_ == 0.0 and job.base is not None:  # not theta_0 + 0 * change: that turns -0 into 0, and infinite changes into NaN
        theta = job.base

        def unchanged(name: str, result: Tensor, shape: tuple[int, ...]) -> None:
            result.copy_(theta[name].reshape(-1))

        return unchanged
    if job.name == "pcb":
        return pcb.computer(job)
    methods.prepare(job)
    if job.method.drop == "rank":
        return lambda name, result, shape: methods.rank_drop(job, name, result, shape)

    def general(name: str, result: Tensor, shape: tuple[int, ...]) -> None:
        base, parts, recipe = methods.parts_of(job, name)
        # What is computed in follows the models; an fp64 result of narrower ones needs the reference as well.
        ops.run("merge_", result if result.dtype == torch.float64 else parts[0].tensor)(result, base, parts, recipe)

    return general


def _norm(model: Model) -> float:
    """L2 norm over all tensors."""
    blocks = (block for name in floating(model) for block in model[name].reshape(-1).split(1 << 20))
    return max(sum(float(block.double().square().sum()) for block in blocks) ** 0.5, 1e-30)


@contextlib.contextmanager
def _bar(total: int, title: str, show: bool) -> Iterator[Callable[[], None]]:
    if not show:
        yield lambda: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc=f"merge {title}", unit="tensor") as bar:
        yield lambda: bar.update() and None

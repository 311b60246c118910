"""What `bench sparse` measures, as data: jobs, contestants, rows, goals. A row is one job on one set of tensors, all contestants interleaved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .registry import SHORT

FP32, BF16 = torch.float32, torch.bfloat16
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Contestant:
    """``kind``: a builder of `bench.sparse_contestants`; ``options``: what it takes, as (name, value) pairs."""

    name: str
    kind: str
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Row:
    """One ``job`` on tensors of ``shapes`` (``quick``: in a quick run) with a share ``density``. ``fill``: "random", "equal". ``method``: of a merge.
    ``models``: how many are merged. The first contestant is the subject."""

    name: str
    job: str
    shapes: tuple[Shape, ...]
    quick: tuple[Shape, ...]
    dtype: torch.dtype
    density: float
    contestants: tuple[Contestant, ...]
    fill: str = "random"
    method: str = ""
    models: int = 8
    tokens: int = 2048
    device: str = "cpu"


OURS = Contestant("ours", "ours")
TOPK, PARTITION = Contestant("torch.topk", "topk"), Contestant("numpy.partition", "partition")
PEFT = Contestant("peft", "peft")
DENSE, GATHERED = Contestant("dense", "dense"), Contestant("dense, gathered", "gathered")
COMPACT = Contestant("ours, compact", "ours", (("mask_state", "compact"),))
GIVEN = Contestant("ours, compact gradient", "ours", (("mask_state", "compact"), ("compact_grad", True)))
MASKED = Contestant("ours, masked", "ours", (("mask_state", "dense"),))
PLAIN = Contestant("ours, unmasked", "ours")
SWAP, CLONE = Contestant("ours, swap", "swap"), Contestant("clone + index_add", "clone")
EAGER = Contestant("scatter into a dense W", "eager")
WANDA = Contestant("sort per row", "sort")


def _split(total: int, count: int) -> tuple[Shape, ...]:
    """`count` tensors of uneven sizes with `total` elements together: neither multiples of 32 nor alike."""
    sizes = [max(1, total // count + (97 * i) % 193 - 96) for i in range(count - 1)]
    return tuple((n,) for n in (*sizes, total - sum(sizes)))


MILLIONS50, SMALL = _split(50_000_000, 300), _split(1_000_000, 300)
BIG = ((33_554_432,),), ((1_048_576,),)
MATRIX = ((4096, 1024),), ((512, 256),)
LAYER = ((1024, 1024),), ((256, 256),)
METHODS = ("ties", "dare_linear", "task_arithmetic")


def _cpu_rows() -> Iterable[Row]:
    for fill, dtype in (("random", FP32), ("equal", FP32), ("random", BF16)):
        yield Row(f"mask 5e7 in 300 {fill} {SHORT[dtype]}", "mask", MILLIONS50, SMALL, dtype, 0.1, (OURS, TOPK, PARTITION), fill)
    for method in METHODS:
        yield Row(f"merge {method} 8 x 4096x1024 bf16", "merge", *MATRIX, BF16, 0.2, (OURS, PEFT), method=method)
    for percent in (1, 5, 10):
        yield Row(f"wgrad 2048 1024->1024 {percent}% fp32", "wgrad", *LAYER, FP32, percent / 100, (OURS, DENSE, GATHERED))
    for percent in (1, 10):
        yield Row(f"adamw 33M {percent}% fp32", "adamw", *BIG, FP32, percent / 100, (COMPACT, PLAIN, MASKED, GIVEN))
    for dtype in (FP32, BF16):
        yield Row(f"delta 33M 1% {SHORT[dtype]}", "delta", ((4096, 8192),), ((512, 1024),), dtype, 0.01, (OURS, SWAP, CLONE))


# --- on a GPU -----------------------------------------------------------------------------------------------------------------------------

BILLION, SMALL_BILLION = _split(1_000_000_000, 300), _split(4_000_000, 300)
SEVEN_B = tuple((n,) for n in [31_250_000] * 224), tuple((n,) for n in [31_250] * 224)


def _gpu_rows() -> Iterable[Row]:
    def row(
        name: str, job: str, shapes: tuple[Shape, ...], quick: tuple[Shape, ...], dtype: torch.dtype, d: float, *who: Contestant, **more: Any
    ) -> Row:
        return Row(name, job, shapes, quick, dtype, d, who, device="cuda", **more)

    yield row("mask 1e9 in 300 bf16", "mask", BILLION, SMALL_BILLION, BF16, 0.01, OURS)
    yield row("mask 1e9 in 300 fp32", "mask", BILLION, SMALL_BILLION, FP32, 0.01, OURS)
    yield row("mask 1e8 fp32", "mask", ((100_000_000,),), ((1_000_000,),), FP32, 0.01, OURS, TOPK)
    yield row("wanda 4096x14336 bf16", "wanda", ((4096, 14336),), ((256, 1024),), BF16, 0.5, OURS, WANDA)
    yield row("adamw 1e9 1% fp32", "adamw", ((1_000_000_000,),), ((4_000_000,),), FP32, 0.01, COMPACT)
    yield row("delta 7B 1% bf16", "delta", *SEVEN_B, BF16, 0.01, OURS, SWAP)
    for percent in (1, 5):
        yield row(f"wgrad 8192 4096->4096 {percent}% bf16", "wgrad", ((4096, 4096),), ((256, 256),), BF16, percent / 100, OURS, DENSE, tokens=8192)
    yield row("layer 8192 4096->4096 2% bf16", "layer", ((4096, 4096),), ((256, 256),), BF16, 0.02, OURS, EAGER, tokens=8192)
    for method in METHODS:
        yield row(f"merge {method} 8 x 1e9 bf16", "merge", ((1_000_000_000,),), ((4_000_000,),), BF16, 0.2, OURS, method=method)
    yield row("drop 8 x 4M bf16", "drop", ((4_000_000,),), ((100_000,),), BF16, 0.3, OURS, method="dare_linear")
    yield row("grow_prune 1e9 bf16", "grow_prune", ((1_000_000_000,),), ((4_000_000,),), BF16, 0.1, OURS)
    yield row("compress 1e8 fp32", "compress", ((100_000_000,),), ((1_000_000,),), FP32, 0.01, OURS)
    yield row("energy 1e9 bf16", "energy", BILLION, SMALL_BILLION, BF16, 0.01, OURS)


ROWS = [*_cpu_rows(), *_gpu_rows()]


@dataclass(frozen=True)
class Goal:
    """kind "faster": time of b / time of a >= limit; "cost": time of a / time of b <= limit; "time": milliseconds of a <= limit; "memory": bytes of a
    over bytes of b <= limit; "extra": MB of a beyond inputs and result <= limit; "across": time of a over that of the same contestant in ``other``
    <= limit; "copy": share of the copy bandwidth >= limit; "differ": elements that differ from the reference's <= limit."""

    text: str
    row: str
    kind: str
    limit: float
    a: str = OURS.name
    b: str = ""
    other: str = ""


def _goals() -> Iterable[Goal]:
    random = "mask 5e7 in 300 random fp32"
    yield Goal("exact global mask over torch.topk", random, "faster", 10.0, b=TOPK.name)
    yield Goal("exact global mask over numpy.partition", random, "faster", 1.8, b=PARTITION.name)
    yield Goal("all equal, over random", "mask 5e7 in 300 equal fp32", "across", 2.5, other=random)
    yield Goal("extra memory over topk's", random, "memory", 1 / 20, b=TOPK.name)
    for method, limit in zip(METHODS, (25.0, 12.0, 12.0), strict=True):
        yield Goal(f"{method} over PEFT", f"merge {method} 8 x 4096x1024 bf16", "faster", limit, b=PEFT.name)
        yield Goal("memory beyond inputs and output", f"merge {method} 8 x 4096x1024 bf16", "extra", 64.0)
    for percent in (1, 5, 10):
        name = f"wgrad 2048 1024->1024 {percent}% fp32"
        yield Goal("masked wgrad over the dense one's speed", name, "faster", 0.8, b=DENSE.name)
        yield Goal("memory beyond 1.1 x the result", name, "extra", 8.0)
    for percent, limit, given in ((1, 0.10, 0.05), (10, 0.65, 0.50)):
        yield Goal("compact step over the dense step", f"adamw 33M {percent}% fp32", "cost", limit, COMPACT.name, PLAIN.name)
        yield Goal("likewise, with a compact gradient", f"adamw 33M {percent}% fp32", "cost", given, GIVEN.name, PLAIN.name)
    yield from _gpu_goals()


def _gpu_goals() -> Iterable[Goal]:
    yield Goal("M1: bf16, 300 tensors", "mask 1e9 in 300 bf16", "time", 2.0)
    yield Goal("M1: scratch", "mask 1e9 in 300 bf16", "extra", 64.0)
    yield Goal("M2: fp32, 300 tensors", "mask 1e9 in 300 fp32", "time", 4.5)
    yield Goal("M3: over torch.topk", "mask 1e8 fp32", "faster", 20.0, b=TOPK.name)
    yield Goal("M3: scratch over torch.topk's", "mask 1e8 fp32", "memory", 1 / 50, b=TOPK.name)
    yield Goal("M4: Wanda per row", "wanda 4096x14336 bf16", "time", 0.055)
    yield Goal("M4: over the official sort", "wanda 4096x14336 bf16", "faster", 30.0, b=WANDA.name)
    yield Goal("M5: compact AdamW", "adamw 1e9 1% fp32", "time", 0.6, COMPACT.name)
    yield Goal("M6: hot swap", "delta 7B 1% bf16", "time", 2.5, SWAP.name)
    for percent in (1, 5):
        yield Goal("M7: over the dense one's speed", f"wgrad 8192 4096->4096 {percent}% bf16", "faster", 0.85, b=DENSE.name)
        yield Goal("M7: memory beyond 1.1 x the result", f"wgrad 8192 4096->4096 {percent}% bf16", "extra", 8.0)
    yield Goal("M8: layer over the usual one", "layer 8192 4096->4096 2% bf16", "faster", 1.3, b=EAGER.name)
    yield Goal("M9: TIES", "merge ties 8 x 1e9 bf16", "time", 16.0)
    for method in METHODS[1:]:
        yield Goal(f"M9: {method}, share of copy", f"merge {method} 8 x 1e9 bf16", "copy", 0.8)
    yield Goal("M10: random drops as on a CPU", "drop 8 x 4M bf16", "differ", 0.0)
    yield Goal("M11: drop and grow", "grow_prune 1e9 bf16", "time", 6.0)
    yield Goal("M12: compression, share of copy", "compress 1e8 fp32", "copy", 0.7)
    yield Goal("M13: energy histogram, one pass, share of copy", "energy 1e9 bf16", "copy", 0.7)


GOALS = list(_goals())


def least_bytes(row: Row, elements: int) -> float | None:
    """The traffic of a job that reads its inputs once and writes its result once (an exact mask reads twice, fp32 three times); None where that is no
    measure of it."""
    size = row.dtype.itemsize
    reads = {"mask": 2 if size == 2 else 3, "compress": 3, "energy": 1}.get(row.job)
    if row.job in ("merge", "drop"):
        passes = 2 if row.method == "ties" else 1
        return elements * size * (passes * (row.models + 1) + 1)
    return None if reads is None else elements * (reads * size + (0 if row.job == "energy" else 1 / 8))

"""What `bench quant` measures, as data: jobs, contestants, rows, goals. A row is one job on one weight, all contestants interleaved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fusedadapt.quant.formats import FORMATS

from .registry import SHORT

FP32, BF16 = torch.float32, torch.bfloat16
NF4_DQ = ("nf4", (("double_quant", True),))
INT4 = ("int4", (("symmetric", True),))
RANK = 16  # of the adapter of "qlora"


@dataclass(frozen=True)
class Contestant:
    """``kind``: a builder of `bench.quant_contestants`."""

    name: str
    kind: str


@dataclass(frozen=True)
class Row:
    """One ``job`` with ``tokens`` rows of activations on a weight of ``n`` x ``k`` in ``format`` with ``options``; a quarter of either side in a
    quick run. The first contestant is the subject."""

    name: str
    job: str
    format: str
    tokens: int
    n: int
    k: int
    dtype: torch.dtype
    contestants: tuple[Contestant, ...]
    options: tuple[tuple[str, Any], ...] = ()
    device: str = "cpu"


OURS = Contestant("ours", "ours")
#: the product with the dense weight in the activations' dtype, and in fp32
DENSE, FP32_DENSE = Contestant("dense", "dense"), Contestant("dense fp32", "dense_fp32")
WHOLE = Contestant("dequantize + linear", "whole")
TORCH_INT4, BNB = Contestant("torch int4", "torch_int4"), Contestant("bitsandbytes", "bitsandbytes")
COMPOSED, FUSED = Contestant("composed eager", "composed"), Contestant("torch fused", "fused")
INT_MM = Contestant("torch._int_mm alone", "int_mm")
#: the same product with both sides in fp8
FP8 = Contestant("fp8 W8A8", "fp8")

M_CPU = (1, 2, 4, 8, 16, 32, 64, 128, 512)
M_GPU = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
GPU_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672))
G6_SHAPES, M_G6 = ((4096, 4096), (14336, 4096), (8192, 8192)), (64, 128, 256, 512)


def _linear(label: str, job: str, given: tuple[str, Any], m: int, n: int, k: int, dtype: torch.dtype, who: Any, device: str = "cpu") -> Row:
    shape = f"{n}x{k}"
    where = " gpu" if device == "cuda" else ""
    return Row(f"{job} {label} M={m} {shape} {SHORT[dtype]}{where}", job, given[0], m, n, k, dtype, tuple(who), given[1], device)


def _cpu_rows() -> Iterable[Row]:
    for m in M_CPU:
        for dtype in (FP32, BF16):
            who = (OURS, DENSE) if dtype == FP32 else (OURS, DENSE, FP32_DENSE)
            small = (TORCH_INT4, BNB) if m in (1, 4, 16, 128) else ()
            yield _linear("int4", "linear", INT4, m, 4096, 4096, dtype, (*who, *small[:1]))
            yield _linear("nf4", "linear", ("nf4", ()), m, 4096, 4096, dtype, (*who, *small[1:]))
    yield _linear("nf4-dq", "linear", NF4_DQ, 1, 4096, 4096, FP32, (OURS, DENSE, BNB))
    for label in (name for name in FORMATS if name not in ("int4", "nf4")):
        for m in (1, 16, 128):
            yield _linear(label, "linear", (label, ()), m, 4096, 4096, BF16, (OURS, DENSE))
    for dtype in (FP32, BF16):
        yield _linear("nf4", "train", ("nf4", ()), 128, 4096, 4096, dtype, (OURS, DENSE, BNB))
    yield _linear("nf4-dq", "qlora", NF4_DQ, 128, 4096, 4096, FP32, (OURS, BNB))
    yield _linear("int8", "act", ("int8", ()), 512, 4096, 4096, FP32, (OURS, DENSE, INT_MM))
    yield _linear("int8", "code", ("int8", ()), 512, 4096, 4096, FP32, (OURS,))
    for label in ("nf4", "int4", "int8", "fp8_e4m3", "mxfp4", "nvfp4"):
        who = (OURS, BNB) if label == "nf4" else (OURS,)
        for job in ("quantize", "dequantize"):
            yield Row(f"{job} {label} 4096x4096 fp32", job, label, 0, 4096, 4096, FP32, who)
    for ste in ("clamp", "round"):
        yield Row(f"fake quant {ste} 4096x4096 fp32", "fake", ste, 0, 4096, 4096, FP32, (OURS, COMPOSED, FUSED))


def _gpu_rows() -> Iterable[Row]:
    for n, k in GPU_SHAPES:
        for m in M_GPU:
            yield _linear("int4", "linear", INT4, m, n, k, BF16, (OURS, DENSE, WHOLE), "cuda")
            yield _linear("nf4-dq", "linear", NF4_DQ, m, n, k, BF16, (OURS, DENSE, BNB), "cuda")
    for m in (128, 1024, 4096):
        yield _linear("nf4-dq", "dx", NF4_DQ, m, 4096, 4096, BF16, (OURS, DENSE, BNB), "cuda")
        yield _linear("nf4-dq", "train", NF4_DQ, m, 4096, 4096, BF16, (OURS, DENSE, BNB), "cuda")
    yield _linear("nf4-dq", "qlora", NF4_DQ, 4096, 4096, 4096, BF16, (OURS, BNB), "cuda")
    for label in ("int8", "fp8_e4m3"):
        yield _linear(label, "code", (label, ()), 8192, 8192, 8192, BF16, (OURS,), "cuda")
    yield _linear("int8", "act", ("int8", ()), 8192, 8192, 8192, BF16, (OURS, DENSE, INT_MM), "cuda")
    yield _linear("fp8_e4m3", "act", ("fp8_e4m3", ()), 8192, 8192, 8192, BF16, (OURS, DENSE), "cuda")
    for n, k in G6_SHAPES:
        for m in M_G6:
            yield _linear("fp4_e2m1", "act", ("fp4_e2m1", ()), m, n, k, BF16, (OURS, FP8, DENSE), "cuda")
    for label in ("nf4", "int8", "fp8_e4m3", "mxfp4"):
        for job in ("quantize", "dequantize"):
            yield Row(f"{job} {label} 8192x8192 bf16 gpu", job, label, 0, 8192, 8192, BF16, (OURS,), device="cuda")
    yield Row("fake quant clamp 8192x8192 bf16 gpu", "fake", "clamp", 0, 8192, 8192, BF16, (OURS, COMPOSED), device="cuda")


ROWS = [*_cpu_rows(), *_gpu_rows()]


@dataclass(frozen=True)
class Goal:
    """kind "cost": time of a / time of b <= limit; "faster": time of b / time of a >= limit; "copy": share of the copy bandwidth >= limit."""

    text: str
    row: str
    kind: str
    limit: float
    a: str = OURS.name
    b: str = ""


def _goals() -> Iterable[Goal]:
    for dtype in ("fp32", "bf16"):
        yield Goal("M = 1 over torch's int4 op", f"linear int4 M=1 4096x4096 {dtype}", "cost", 0.85, b=TORCH_INT4.name)
        yield Goal("M = 1 over bitsandbytes", f"linear nf4 M=1 4096x4096 {dtype}", "cost", 0.85, b=BNB.name)
        for m, share in ((16, 0.6), (32, 0.6), (64, 0.7), (128, 0.8), (512, 0.8)):
            for label in ("int4", "nf4"):
                yield Goal("share of the dense product's speed", f"linear {label} M={m} 4096x4096 {dtype}", "faster", share, b=DENSE.name)
        yield Goal("forward + dX over the dense layer's", f"train nf4 M=128 4096x4096 {dtype}", "cost", 1.5, b=DENSE.name)
    for ste in ("clamp", "round"):
        yield Goal("forward and backward over composed eager", f"fake quant {ste} 4096x4096 fp32", "faster", 5.0, b=COMPOSED.name)
        yield Goal("forward and backward over torch's fused op", f"fake quant {ste} 4096x4096 fp32", "faster", 2.0, b=FUSED.name)
    yield from _gpu_goals()


def _gpu_goals() -> Iterable[Goal]:
    for n, k in GPU_SHAPES:
        for m in M_GPU:
            limit = 2.8 if m <= 16 else 0.9 if m < 2048 else 0.85
            yield Goal("G1, G3, G4: over the dense product", f"linear int4 M={m} {n}x{k} bf16 gpu", "faster", limit, b=DENSE.name)
            limit = 2.2 if m <= 16 else 0.9 if m < 2048 else 0.85
            yield Goal("G2, G3, G4: over the dense product", f"linear nf4-dq M={m} {n}x{k} bf16 gpu", "faster", limit, b=DENSE.name)
    yield Goal("G5: over the dense product", "act int8 M=8192 8192x8192 bf16 gpu", "faster", 1.35, b=DENSE.name)
    yield Goal("G5: over the dense product", "act fp8_e4m3 M=8192 8192x8192 bf16 gpu", "faster", 1.5, b=DENSE.name)
    for n, k in G6_SHAPES:
        for m in M_G6:
            yield Goal("G6: fp4 beside fp8, over fp8 beside fp8", f"act fp4_e2m1 M={m} {n}x{k} bf16 gpu", "faster", 1.0, b=FP8.name)
    yield Goal("G7: dX over bitsandbytes", "dx nf4-dq M=4096 4096x4096 bf16 gpu", "faster", 1.0, b=BNB.name)
    yield Goal("G8: layer and adapter over bitsandbytes and PEFT", "qlora nf4-dq M=4096 4096x4096 bf16 gpu", "faster", 1.2, b=BNB.name)
    yield Goal("G9: fake quantization over composed eager", "fake quant clamp 8192x8192 bf16 gpu", "faster", 3.0, b=COMPOSED.name)
    yield Goal("G9: fake quantization, share of copy", "fake quant clamp 8192x8192 bf16 gpu", "copy", 0.85)
    for label in ("int8", "fp8_e4m3"):
        yield Goal("G10: coding activations, share of copy", f"code {label} M=8192 8192x8192 bf16 gpu", "copy", 0.85)
    yield Goal("G10: quantizing to MX, share of copy", "quantize mxfp4 8192x8192 bf16 gpu", "copy", 0.85)
    for label in ("nf4", "int8", "fp8_e4m3", "mxfp4"):
        yield Goal("dequantizing, share of copy", f"dequantize {label} 8192x8192 bf16 gpu", "copy", 0.85)


GOALS = list(_goals())


def traffic(row: Row, packed: int, n: int, k: int) -> float:
    """Bytes that the job has to move: each tensor once."""
    size, dense = row.dtype.itemsize, n * k * row.dtype.itemsize
    activations = row.tokens * (n + k) * size
    return {
        "linear": packed + activations,
        "dx": packed + activations,
        "act": packed + activations,
        "train": 2 * (packed + activations),
        "qlora": 2 * (packed + activations + RANK * (n + k) * size),
        "code": row.tokens * (k * (size + 1) + 4),
        "quantize": 2 * dense + packed,  # statistics, then codes
        "dequantize": dense + packed,
        "fake": 5 * dense,  # x, y; x, dy, dx
    }[row.job]


def flops(row: Row, n: int, k: int) -> float:
    """Multiplications and additions of the products."""
    adapter = 6.0 * row.tokens * RANK * (n + k) if row.job == "qlora" else 0.0
    return {"linear": 2.0, "dx": 2.0, "act": 2.0, "train": 4.0, "qlora": 4.0}.get(row.job, 0.0) * row.tokens * n * k + adapter

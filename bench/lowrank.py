"""What `bench lowrank` measures, as data: layers of real models, contestants, rows, goals.

A row is forward and backward of one frozen linear layer (or of several that read the same x), with the gradients of x and of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .registry import SHORT

FP32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Contestant:
    """One way to run the row's layer.

    ``kind``: "frozen" (no adapter), "layer" (LoRALinear), "functional" (lora_linear or its grouped form), "patched" (a PEFT model under fa.patch),
    "peft", "eager" (PEFT's sequence of operations in plain torch), "addmm" (GEMMs with addmm, adapters in x's dtype, no dropout: the usual
    hand-written autograd function). ``base``: "torch" (nn.Linear), "widened" (`fusedadapt.ops.dense`) or a format of `fusedadapt.quantize`.
    ``method``: instead of the row's. ``options``: keyword arguments of LoRALinear.
    """

    name: str
    kind: str
    base: str = "torch"
    method: str = ""
    compiled: bool = False
    graph: bool = False
    options: dict[str, Any] = field(default_factory=dict)


FROZEN, OURS = Contestant("frozen", "frozen"), Contestant("ours", "layer")
GROUP = Contestant("ours", "functional")
FUNCTIONAL, PATCHED = Contestant("ours, lora_linear", "functional"), Contestant("ours, patched PEFT", "patched")
PEFT, EAGER = Contestant("peft", "peft"), Contestant("eager", "eager")
COMPILED = Contestant("peft, compiled", "peft", compiled=True)
ADDMM = Contestant("addmm", "addmm")

EVERYONE = (FROZEN, OURS, FUNCTIONAL, PATCHED, PEFT, EAGER, COMPILED)
MAIN = (FROZEN, OURS, PEFT, EAGER)
GROUPED = (FROZEN, GROUP, PATCHED, PEFT, EAGER)


@dataclass(frozen=True)
class Row:
    """``tokens`` x ``inputs`` -> each of ``outputs``. The first contestant is the frozen layer, the second the subject. ``native``: also time the
    16-bit products of a torch that has no GEMM for them (seconds each); without, only the widened ones stand in such a row."""

    name: str
    tokens: int
    inputs: int
    outputs: tuple[int, ...]
    rank: int
    p: float
    dtype: torch.dtype
    method: str
    contestants: tuple[Contestant, ...]
    device: str = "cpu"
    native: bool = False
    share: float = 1.0  # of --seconds


def _row(
    what: str,
    shape: tuple[int, int, tuple[int, ...]],
    p: float,
    dtype: torch.dtype,
    contestants: tuple[Contestant, ...],
    rank: int = 16,
    method: str = "lora",
    **more: Any,
) -> Row:
    tokens, inputs, outputs = shape
    arrow = f"{inputs}->{'+'.join(map(str, outputs))}"
    return Row(f"{what} {tokens} {arrow} r{rank} p{p:g} {SHORT[dtype]}", tokens, inputs, outputs, rank, p, dtype, method, contestants, **more)


REFERENCE = (2048, 1024, (1024,))
#: the demo's encoder: a batch of 24 codes of 128 tokens
ENCODER = [(3072, 384, (384,)), (3072, 384, (1536,)), (3072, 1536, (384,))]
ENCODER_QKV = (3072, 384, (384, 384, 384))
QWEN_GATE_UP = (512, 896, (4864, 4864))
SAVED = (128, 4096, (4096,))
VARIANTS = ("dora", "adalora", "vera", "ia3")
_DORA_PEFT = Contestant("ours, PEFT's form", "layer", options={"dropout_form": "peft"})


def _cpu_rows() -> Iterable[Row]:
    for dtype in (FP32, BF16):
        for p in (0.1, 0.0):
            yield _row("lora", REFERENCE, p, dtype, EVERYONE, native=True)
    for shape in ENCODER:
        for p, dtype in ((0.1, FP32), (0.0, FP32), (0.1, BF16), (0.0, BF16)):
            yield _row("encoder", shape, p, dtype, MAIN)
    for dtype in (FP32, BF16):
        yield _row("q/k/v", ENCODER_QKV, 0.1, dtype, GROUPED)
        yield _row("gate/up", QWEN_GATE_UP, 0.1, dtype, GROUPED)
    yield _row("lora", SAVED, 0.1, BF16, MAIN)
    for method in VARIANTS:
        more = (_DORA_PEFT,) if method == "dora" else ()
        yield _row(method, REFERENCE, 0.0 if method == "ia3" else 0.1, FP32, (FROZEN, OURS, PEFT, *more), method=method)


# --- on a GPU -----------------------------------------------------------------------------------------------------------------

R0 = (8192, 4096, (4096,))
LLAMA_QKV, LLAMA_GATE_UP = (8192, 4096, (4096, 1024, 1024)), (8192, 4096, (14336, 14336))
#: the layers of Llama-3-8B, Qwen2.5-7B and Qwen2.5-0.5B
GRID = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (3584, 3584), (3584, 512), (3584, 18944), (18944, 3584), (896, 4864), (4864, 896)]


def _graph(c: Contestant) -> Contestant:
    return replace(c, name=f"{c.name} (graph)", graph=True)


def _gpu_rows() -> Iterable[Row]:
    graphs = (_graph(FROZEN), _graph(OURS))
    for p in (0.0, 0.1):
        yield _row("lora", R0, p, BF16, (FROZEN, OURS, *graphs, FUNCTIONAL, PATCHED, PEFT, EAGER, ADDMM, COMPILED), device="cuda")
    yield _row("lora", (8192, 4096, (14336,)), 0.1, BF16, (FROZEN, OURS, *graphs, PEFT, EAGER), device="cuda")
    grouped = (FROZEN, GROUP, _graph(FROZEN), _graph(GROUP), PATCHED, PEFT, EAGER)
    yield _row("q/k/v", LLAMA_QKV, 0.1, BF16, grouped, device="cuda")
    yield _row("gate/up", LLAMA_GATE_UP, 0.1, BF16, grouped, device="cuda")
    lora = Contestant("ours, LoRA", "layer", method="lora")
    yield _row("dora", R0, 0.1, BF16, (FROZEN, OURS, lora, _graph(OURS), _graph(lora), PEFT, _DORA_PEFT), method="dora", device="cuda")
    for kind in ("nf4", "int4", "int8"):
        frozen, ours = Contestant("frozen", "frozen", base=kind), Contestant("ours", "layer", base=kind)
        yield _row(f"lora {kind}", R0, 0.1, BF16, (frozen, ours, _graph(frozen), _graph(ours)), device="cuda")
    for inputs, outputs in GRID:
        for tokens in (1, 128, 1024, 8192, 32768):
            for rank in (4, 16, 64, 256):
                contestants = (FROZEN, OURS, ADDMM)
                yield _row("grid", (tokens, inputs, (outputs,)), 0.0, BF16, contestants, rank, device="cuda", share=0.05)


ROWS = [*_cpu_rows(), *_gpu_rows()]


@dataclass(frozen=True)
class Goal:
    """``a``: a contestant of a row. kind "share": its overhead over the frozen layer, as a share of eager PEFT's (without PEFT: the same in plain
    torch); "overhead": the overhead itself; "cost": its time over ``b``'s; "saved": bytes for backward beyond x, over x's; "flops": over
    the structured minimum. At most ``limit``, all of them."""

    text: str
    row: str
    kind: str
    limit: float
    a: str = OURS.name
    b: str = ""


def _goals() -> Iterable[Goal]:
    for row in ROWS:
        what, bf16 = row.name.split()[0], row.dtype == BF16
        if row.device == "cuda":
            yield from _gpu_goals(row, what)
            continue
        if row.method == "lora" and row.name != _row("lora", SAVED, 0.1, BF16, ()).name:
            limit = {(True, False): 0.3, (True, True): 0.2, (False, False): 0.5, (False, True): 0.25}[row.p > 0, bf16]
            yield Goal("overhead as a share of PEFT's", row.name, "share", limit)
            if row.p > 0 and bf16:
                yield Goal("time over the frozen layer's", row.name, "cost", 2.2, b=FROZEN.name)
        if row.inputs >= 4096:
            yield Goal("saved for backward beyond x", row.name, "saved", 0.01)
        yield Goal("FLOPs over the structured minimum", row.name, "flops", 1.02)


def _gpu_goals(row: Row, what: str) -> Iterable[Goal]:
    graph = f"{OURS.name} (graph)"
    if what == "grid":
        yield Goal("M3: never slower than GEMMs + addmm", row.name, "cost", 1.02, b=ADDMM.name)
    elif what == "dora":
        yield Goal("M4: DoRA over our LoRA", row.name, "cost", 1.15, graph, "ours, LoRA (graph)")
    elif row.contestants[0].base != "torch":
        yield Goal("M5: overhead over the quantized frozen layer", row.name, "overhead", 0.15, graph)
    elif len(row.outputs) > 1:
        yield Goal("M2: overhead, grouped", row.name, "overhead", 0.08, graph)
    elif (row.tokens, row.inputs, row.outputs) == R0:
        yield Goal("M1: overhead", row.name, "overhead", 0.14 if row.p else 0.12, graph)
        yield Goal("saved for backward beyond x", row.name, "saved", 0.01)


GOALS = list(_goals())


def least_flops(row: Row, method: str = "") -> int:
    """Forward and backward (gradients of x and of the adapter), counted as 2 per multiply-add of a matrix product.

    4 T K N for the frozen layer; 2 T r (K + N) for each of: forward, dV and dx, dA and dB. VeRA trains neither A nor B (lambda_b's gradient needs no
    product if T x N is saved for it); DoRA needs W A^T for its norm; IA3 has no product of its own.
    """
    method, t, k, r = method or row.method, row.tokens, row.inputs, row.rank
    total = 0
    for n in row.outputs:
        total += 4 * t * k * n
        if method in ("ia3", "ssf"):
            continue
        total += (4 if method == "vera" else 6) * t * r * (k + n)
        total += 2 * n * k * (r + 1) if method == "dora" else 0
    return total

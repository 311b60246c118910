"""What is measured, as data: shape mixes, contestants, rows, goals. A row is one mix in one dtype with every contestant interleaved.

Bytes per element: G + 2 P + 2 S for each state the rule writes, + 1/8 for a mask, + 8 for an fp32 master (P is then only written), + 4 for a split
one, + G for the norm pass of clipping.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

FP32, BF16 = torch.float32, torch.bfloat16
SHORT = {FP32: "fp32", BF16: "bf16"}


def _minilm(words: int = 30522) -> list[tuple[int, ...]]:
    """all-MiniLM-L6-v2: 22.7 M parameters, half of them the embedding of words."""
    d, wide = 384, 1536
    layer: list[tuple[int, ...]] = [(d, d), (d,)] * 4 + [(d,), (d,), (wide, d), (wide,), (d, wide), (d,), (d,), (d,)]
    return [(words, d), (512, d), (2, d), (d,), (d,), *(layer * 6), (d, d), (d,)]


def _llama_lora(layers: int = 32, rank: int = 16) -> list[tuple[int, ...]]:
    """LoRA on q, k, v, o of Llama-3-8B: 256 tensors, 13.6 M parameters."""
    d, kv = 4096, 1024
    return [shape for _ in range(layers) for out in (d, kv, kv, d) for shape in ((rank, d), (out, rank))]


def _llama_1b(words: int = 128_256, layers: int = 16) -> list[tuple[int, ...]]:
    """Llama-3.2-1B: 146 tensors, 1.24 G parameters."""
    d, wide, kv = 2048, 8192, 512
    layer: list[tuple[int, ...]] = [(d, d), (kv, d), (kv, d), (d, d), (wide, d), (wide, d), (d, wide), (d,), (d,)]
    return [(words, d), *(layer * layers), (d,)]


#: name -> (shapes, shapes of a quick run)
MIXES: dict[str, tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "1x33M": ([(33_554_432,)], [(4_194_304,)]),
    "1B": (_llama_1b(), _llama_1b(256, 1)),
    "1x20M": ([(20_480_000,)], [(2_048_000,)]),
    "5000x4096": ([(4096,)] * 5000, [(4096,)] * 500),
    "5000x4096+1": ([(4096,)] * 5000, [(4096,)] * 500),
    "5000x4099": ([(4099,)] * 5000, [(4099,)] * 500),
    "5000x256": ([(256,)] * 5000, [(256,)] * 1000),
    "minilm": (_minilm(), _minilm(256)),
    "llama-lora": (_llama_lora(), _llama_lora(8)),
    "host-5000": ([(1,)] * 5000, [(1,)] * 5000),
    "host-1": ([(1,)], [(1,)]),
}
#: mixes whose tensors begin so many elements after an address that vectors can be read from
OFFSETS = {"5000x4096+1": 1}


@dataclass(frozen=True)
class Contestant:
    """An optimizer to time. ``lib``: "ours", "torch" or a module; ``cls``: its class; ``options``: keyword arguments; ``mask``: share of trainable
    elements; ``clip``: torch's clip_grad_norm_ before the step; ``groups``: param groups of different learning rates."""

    name: str
    lib: str
    cls: str
    options: dict[str, Any] = field(default_factory=dict)
    mask: float | None = None
    clip: float | None = None
    groups: int = 1
    graph: bool = False


def _ours(cls: str, name: str = "", mask: float | None = None, **options: Any) -> Contestant:
    return Contestant(name or f"ours {cls}", "ours", cls, {"lr": 1e-8, "weight_decay": 0.01} | options, mask)


def _torch(cls: str, kind: str, **options: Any) -> Contestant:
    return Contestant(f"torch {kind}", "torch", cls, {"lr": 1e-8, "weight_decay": 0.01, kind: True} | options)


OURS_ADAMW, TORCH_FUSED, TORCH_FOREACH = _ours("AdamW"), _torch("AdamW", "fused"), _torch("AdamW", "foreach")
OURS_INT8, OURS_FP8 = (_ours("AdamW", f"ours, {kind} states", state_dtype=kind) for kind in ("int8", "fp8"))
BNB_INT8 = Contestant("bitsandbytes AdamW8bit", "bitsandbytes.optim", "AdamW8bit", {"lr": 1e-8, "weight_decay": 0.01})
OURS_BELIEF, OURS_LION = _ours("AdaBelief"), _ours("Lion")
BELIEF = Contestant("adabelief-pytorch", "adabelief_pytorch", "AdaBelief", {"lr": 1e-8, "weight_decay": 0.01, "print_change_log": False})
LION = Contestant("lion-pytorch", "lion_pytorch", "Lion", {"lr": 1e-8, "weight_decay": 0.01})
OURS_CLIP = _ours("AdamW", "ours, clip fused", max_grad_norm=1.0)
OURS_ROUNDING = _ours("AdamW", "ours, stochastic", stochastic_rounding=True)
OURS_GROUPS = replace(_ours("AdamW", "ours, four groups"), groups=4)
TORCH_CLIP = Contestant("torch clip + fused", "torch", "AdamW", {"lr": 1e-8, "weight_decay": 0.01, "fused": True}, clip=1.0)


@dataclass(frozen=True)
class Row:
    """``contestants``: the first is the subject, the second the one its "x" compares with. ``copy``: time a plain copy between them, for the
    share of the copy bandwidth. ``host``: CPU time of the call alone."""

    name: str
    mix: str
    dtype: torch.dtype
    contestants: tuple[Contestant, ...]
    device: str = "cpu"
    copy: bool = False
    host: bool = False


_SMALL = {"5000x256", "host-5000", "host-1"}  # in caches, or no work at all: no copy to compare with


def _row(device: str, what: str, mix: str, dtype: torch.dtype, *contestants: Contestant) -> Row:
    name = f"{what} {mix} {SHORT[dtype]}{' gpu' if device == 'cuda' else ''}"
    return Row(name, mix, dtype, contestants, device, mix not in _SMALL, mix.startswith("host"))


def _common(device: str) -> Iterable[Row]:
    """Rows of either device."""
    row = functools.partial(_row, device)
    for dtype in (FP32, BF16):
        for mix in ("1x33M", "5000x4096", "5000x256", "minilm", "llama-lora"):
            yield row("adamw", mix, dtype, OURS_ADAMW, TORCH_FUSED, TORCH_FOREACH)
        for mix in ("1x33M", "5000x4096", "5000x256") if dtype == FP32 else ("1x33M",):
            yield row("adabelief", mix, dtype, OURS_BELIEF, BELIEF, OURS_ADAMW)
            yield row("lion", mix, dtype, OURS_LION, LION, OURS_ADAMW)
    for mix in ("1x33M", "5000x4096"):
        yield row("mask", mix, FP32, _ours("AdamW", "ours, half masked", mask=0.5), OURS_ADAMW)
        yield row("clip", mix, FP32, OURS_CLIP, TORCH_CLIP, OURS_ADAMW)
    yield row("rounding", "1x33M", BF16, OURS_ROUNDING, OURS_ADAMW)
    for kind in ("fp32", "split"):
        yield row(f"master {kind}", "1x33M", BF16, _ours("AdamW", f"ours, master {kind}", master_weights=kind, state_dtype="fp32"), OURS_ADAMW)
    for mix in ("host-5000", "host-1"):
        yield row("adamw", mix, FP32, OURS_ADAMW, TORCH_FUSED, TORCH_FOREACH)
    yield row("8-bit", "1x33M", FP32, OURS_INT8, BNB_INT8, OURS_ADAMW, OURS_FP8, *([TORCH_FUSED] if device == "cuda" else []))


def _gpu_only() -> Iterable[Row]:
    row = functools.partial(_row, "cuda")
    for dtype in (FP32, BF16):
        yield row("adamw", "1B", dtype, OURS_ADAMW, TORCH_FUSED)
    for mix in ("1x20M", "5000x4096+1", "5000x4099"):
        yield row("adamw", mix, FP32, OURS_ADAMW, TORCH_FUSED)
    yield row("groups", "5000x4096", FP32, OURS_GROUPS, OURS_ADAMW)
    yield row("8-bit", "5000x4096", FP32, OURS_INT8, BNB_INT8)


def _rows() -> list[Row]:
    order = list(MIXES)
    rows = [*_common("cpu"), *_common("cuda"), *_gpu_only()]
    return sorted(rows, key=lambda row: (SHORT[row.dtype], -order.index(row.mix)), reverse=True)  # neighbours share their parameters


ROWS = _rows()


@dataclass(frozen=True)
class Goal:
    """``a`` and ``b``: contestants of a row. kind "faster": time of b / time of a must be >= limit; "cost": time of a / time of b <= limit; "host":
    time of a, in µs, <= limit; "copy": a's share of the copy bandwidth >= limit; "across": a's time per element over its own in the row ``other``
    <= limit."""

    text: str
    row: str
    kind: str
    limit: float
    a: str = "ours AdamW"
    b: str = ""
    other: str = ""


def _cpu_goals() -> Iterable[Goal]:
    limits = {"1x33M": (0.95, 1.2), "5000x4096": (2.5, 2.0), "5000x256": (15.0, 15.0)}
    for dtype, column in ((FP32, 0), (BF16, 1)):
        for mix, pair in limits.items():
            yield Goal("AdamW over torch fused", f"adamw {mix} {SHORT[dtype]}", "faster", pair[column], b=TORCH_FUSED.name)
    for row in ROWS:
        what, names = row.name.split()[0], [c.name for c in row.contestants]
        if row.device == "cpu" and what in ("adabelief", "lion"):
            label = row.contestants[0].cls
            yield Goal(f"{label} within 10 % of AdamW", row.name, "cost", 1.10, names[0], OURS_ADAMW.name)
            yield Goal(f"{label} over {names[1]}", row.name, "faster", 3.0, names[0], names[1])
        if row.device == "cpu" and what in ("mask", "clip"):
            limit = {"mask": 1.05, "clip": 1.25}[what]
            yield Goal(f"{what} over the plain step", row.name, "cost", limit, names[0], OURS_ADAMW.name)
    yield Goal("8-bit AdamW over bitsandbytes", "8-bit 1x33M fp32", "faster", 15.0, OURS_INT8.name, BNB_INT8.name)
    yield Goal("8-bit AdamW over AdamW", "8-bit 1x33M fp32", "cost", 2.0, OURS_INT8.name, OURS_ADAMW.name)
    yield Goal("host time, 5,000 tensors", "adamw host-5000 fp32", "host", 1200.0)
    yield Goal("host time, one tensor", "adamw host-1 fp32", "host", 15.0)


def _gpu_goals() -> Iterable[Goal]:
    graph = f"{OURS_ADAMW.name} (graph)"
    yield Goal("G1: share of copy, Llama-3.2-1B", "adamw 1B fp32 gpu", "copy", 0.92)
    yield Goal("G2: stochastic rounding, share of copy", "rounding 1x33M bf16 gpu", "copy", 0.88, OURS_ROUNDING.name)
    yield Goal("G2: 8-bit states, share of copy", "8-bit 1x33M fp32 gpu", "copy", 0.80, OURS_INT8.name)
    yield Goal("G2: Lion, share of copy", "lion 1x33M fp32 gpu", "copy", 0.90, OURS_LION.name)
    yield Goal("G3: 8-bit over torch fused fp32", "8-bit 1x33M fp32 gpu", "cost", 0.45, OURS_INT8.name, TORCH_FUSED.name)
    yield Goal("G3: 8-bit over bitsandbytes", "8-bit 1x33M fp32 gpu", "cost", 0.8, OURS_INT8.name, BNB_INT8.name)
    yield Goal("G3: 8-bit over bitsandbytes, 5,000 tensors", "8-bit 5000x4096 fp32 gpu", "faster", 5.0, OURS_INT8.name, BNB_INT8.name)
    for text, limit, name in (("device", 1.10, graph), ("wall", 1.25, OURS_ADAMW.name)):
        yield Goal(f"G4: 5,000 tensors over one, {text} time", "adamw 5000x4096 fp32 gpu", "across", limit, name, other="adamw 1x20M fp32 gpu")
    yield Goal("G5: 5,000 small tensors over torch fused", "adamw 5000x256 fp32 gpu", "cost", 0.25, b=TORCH_FUSED.name)
    yield Goal("G6: host time, 5,000 tensors", "adamw host-5000 fp32 gpu", "host", 300.0)
    for mix in ("5000x4096+1", "5000x4099"):
        yield Goal("G7: odd or misaligned over aligned", f"adamw {mix} fp32 gpu", "across", 1.10, graph, other="adamw 5000x4096 fp32 gpu")
    yield Goal("G8: four param groups over one", "groups 5000x4096 fp32 gpu", "cost", 1.03, OURS_GROUPS.name, OURS_ADAMW.name)
    for mix in ("1x33M", "5000x4096"):
        yield Goal("G9: clip over the plain step", f"clip {mix} fp32 gpu", "cost", 1.20, OURS_CLIP.name, OURS_ADAMW.name)
        yield Goal("G9: clip over torch's", f"clip {mix} fp32 gpu", "faster", 1.2, OURS_CLIP.name, TORCH_CLIP.name)
        yield Goal("G11: mask over the plain step", f"mask {mix} fp32 gpu", "cost", 1.02, "ours, half masked", OURS_ADAMW.name)
    yield Goal("G10: graph replay over eager", "adamw 5000x256 fp32 gpu", "cost", 0.98, graph, OURS_ADAMW.name)


GOALS = [*_cpu_goals(), *_gpu_goals()]


def bytes_per_element(contestant: Contestant, dtype: torch.dtype) -> float | None:
    """The floor of the subject's memory traffic; None for other libraries, whose number of passes is theirs."""
    if contestant.lib != "ours":
        return None
    from fusedadapt import optim

    size, options = dtype.itemsize, contestant.options
    probe = getattr(optim, contestant.cls)([torch.nn.Parameter(torch.zeros(1))], **{k: v for k, v in options.items() if k == "lr"})
    rule = optim.RULES[probe._rule(probe.param_groups[0])]
    state = {"fp32": 4, "int8": 1 + 4 / 256, "fp8": 1 + 8 / 128}.get(options.get("state_dtype", ""), size)
    master = options.get("master_weights")
    total = size + 2 * size + 2 * state * rule.stored + state * (len(rule.states) - rule.stored)
    total += {None: 0, "fp32": 8 - size, "split": 4}[master]
    return total + (size if "max_grad_norm" in options else 0) + (0.125 if contestant.mask is not None else 0)

"""What is measured, as data: shape mixes, contestants, rows, goals. A row is one mix in one dtype with every contestant interleaved.

Bytes per element: G + 2 P + 2 S for each state the rule writes, + 1/8 for a mask, + 8 for an fp32 master (P is then only written), + 4 for a split
one, + G for the norm pass of clipping.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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


#: name -> (shapes, shapes of a quick run)
MIXES: dict[str, tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "1x33M": ([(33_554_432,)], [(4_194_304,)]),
    "5000x4096": ([(4096,)] * 5000, [(4096,)] * 500),
    "5000x256": ([(256,)] * 5000, [(256,)] * 1000),
    "minilm": (_minilm(), _minilm(256)),
    "llama-lora": (_llama_lora(), _llama_lora(8)),
    "host-5000": ([(1,)] * 5000, [(1,)] * 5000),
    "host-1": ([(1,)], [(1,)]),
}


@dataclass(frozen=True)
class Contestant:
    """An optimizer to time. ``lib``: "ours", "torch" or a module; ``cls``: its class; ``options``: keyword arguments; ``mask``: share of trainable
    elements; ``clip``: torch's clip_grad_norm_ before the step."""

    name: str
    lib: str
    cls: str
    options: dict[str, Any] = field(default_factory=dict)
    mask: float | None = None
    clip: float | None = None
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
TORCH_CLIP = Contestant("torch clip + fused", "torch", "AdamW", {"lr": 1e-8, "weight_decay": 0.01, "fused": True}, clip=1.0)


@dataclass(frozen=True)
class Row:
    """``contestants``: the first is the subject, the second the one its "x" compares with. ``copy``: time a plain copy between them, for the
    share of the copy bandwidth. ``host``: CPU time of the call alone."""

    name: str
    mix: str
    dtype: torch.dtype
    contestants: tuple[Contestant, ...]
    copy: bool = False
    host: bool = False


def _rows() -> list[Row]:
    big = {"1x33M", "5000x4096", "minilm", "llama-lora"}
    rows = []

    def add(what: str, mix: str, dtype: torch.dtype, *contestants: Contestant, host: bool = False) -> None:
        rows.append(Row(f"{what} {mix} {SHORT[dtype]}", mix, dtype, contestants, mix in big, host))

    for dtype in (FP32, BF16):
        for mix in ("1x33M", "5000x4096", "5000x256", "minilm", "llama-lora"):
            add("adamw", mix, dtype, OURS_ADAMW, TORCH_FUSED, TORCH_FOREACH)
        for mix in ("1x33M", "5000x4096", "5000x256") if dtype == FP32 else ("1x33M",):
            add("adabelief", mix, dtype, OURS_BELIEF, BELIEF, OURS_ADAMW)
            add("lion", mix, dtype, OURS_LION, LION, OURS_ADAMW)
    for mix in ("1x33M", "5000x4096"):
        add("mask", mix, FP32, _ours("AdamW", "ours, half masked", mask=0.5), OURS_ADAMW)
        add("clip", mix, FP32, _ours("AdamW", "ours, clip fused", max_grad_norm=1.0), TORCH_CLIP, OURS_ADAMW)
    add("rounding", "1x33M", BF16, _ours("AdamW", "ours, stochastic", stochastic_rounding=True), OURS_ADAMW)
    add("8-bit", "1x33M", FP32, OURS_INT8, BNB_INT8, OURS_ADAMW, OURS_FP8)
    for kind in ("fp32", "split"):
        add(f"master {kind}", "1x33M", BF16, _ours("AdamW", f"ours, master {kind}", master_weights=kind, state_dtype="fp32"), OURS_ADAMW)
    for mix in ("host-5000", "host-1"):
        add("adamw", mix, FP32, OURS_ADAMW, TORCH_FUSED, TORCH_FOREACH, host=True)
    order = list(MIXES)
    return sorted(rows, key=lambda row: (SHORT[row.dtype], -order.index(row.mix)), reverse=True)  # neighbours share their parameters


ROWS = _rows()


@dataclass(frozen=True)
class Goal:
    """``a`` and ``b``: contestants of a row. kind "faster": time of b / time of a must be >= limit; "cost": time of a / time of b <= limit;
    "host": time of a, in µs, <= limit."""

    text: str
    row: str
    kind: str
    limit: float
    a: str
    b: str = ""


def _goals() -> list[Goal]:
    goals = []
    limits = {"1x33M": (0.95, 1.2), "5000x4096": (2.5, 2.0), "5000x256": (15.0, 15.0)}
    for dtype, column in ((FP32, 0), (BF16, 1)):
        for mix, pair in limits.items():
            row_name = f"adamw {mix} {SHORT[dtype]}"
            goals.append(Goal("AdamW over torch fused", row_name, "faster", pair[column], OURS_ADAMW.name, TORCH_FUSED.name))
    for row in ROWS:
        what = row.name.split()[0]
        if what in ("adabelief", "lion"):
            label = row.contestants[0].cls
            goals.append(Goal(f"{label} within 10 % of AdamW", row.name, "cost", 1.10, row.contestants[0].name, OURS_ADAMW.name))
            other = row.contestants[1].name
            goals.append(Goal(f"{label} over {other}", row.name, "faster", 3.0, row.contestants[0].name, other))
        if what in ("mask", "clip"):
            limit = {"mask": 1.05, "clip": 1.25}[what]
            goals.append(Goal(f"{what} over the plain step", row.name, "cost", limit, row.contestants[0].name, OURS_ADAMW.name))
    goals.append(Goal("8-bit AdamW over bitsandbytes", "8-bit 1x33M fp32", "faster", 15.0, OURS_INT8.name, BNB_INT8.name))
    goals.append(Goal("8-bit AdamW over AdamW", "8-bit 1x33M fp32", "cost", 2.0, OURS_INT8.name, OURS_ADAMW.name))
    goals.append(Goal("host time, 5,000 tensors", "adamw host-5000 fp32", "host", 1200.0, OURS_ADAMW.name))
    goals.append(Goal("host time, one tensor", "adamw host-1 fp32", "host", 15.0, OURS_ADAMW.name))
    return goals


GOALS = _goals()


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

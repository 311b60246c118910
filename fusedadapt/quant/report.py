"""What quantizing did to each layer, and the totals: size, error, time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from .tensor import QuantizedTensor

_PIECE = 1 << 21  # elements compared at a time


@dataclass(frozen=True)
class LayerReport:
    """One quantized weight. ``signal`` and ``noise``: sums of w^2 and (w - dequantized)^2, fp64; ``nbytes_before``, ``nbytes``: of the weight."""

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes_before: int
    nbytes: int
    signal: float
    noise: float
    seconds: float

    @property
    def bits_per_weight(self) -> float:
        """Scales and everything else included."""
        return 8.0 * self.nbytes / max(1, math.prod(self.shape))

    @property
    def error(self) -> float:
        """|w - dequantized| / |w|, Frobenius norms."""
        return math.sqrt(self.noise / self.signal) if self.signal else 0.0

    @property
    def sqnr(self) -> float:
        """10 log10 of signal over noise, in dB; infinite where nothing was lost."""
        return 10.0 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no infinity: an infinite SQNR is None."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "format": self.format,
            "bits_per_weight": self.bits_per_weight,
            "relative_error": self.error,
            "sqnr_db": self.sqnr if math.isfinite(self.sqnr) else None,
            "bytes_before": self.nbytes_before,
            "bytes": self.nbytes,
            "seconds": self.seconds,
        }


@dataclass
class QuantizationReport:
    """``layers``: what was quantized; ``left``: name of a layer that was not -> why; ``notes``: what else there is to know."""

    format: str
    layers: list[LayerReport] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    other_nbytes: int = 0

    @property
    def total(self) -> LayerReport:
        """All layers as one: sums of sizes, errors and times."""
        weights = sum(math.prod(layer.shape) for layer in self.layers)
        sums = [sum(getattr(layer, name) for layer in self.layers) for name in ("nbytes_before", "nbytes", "signal", "noise", "seconds")]
        return LayerReport(f"{len(self.layers)} layers", (weights,), self.format, *sums)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON. ``other_bytes``: of the tensors that were copied as they are, where files were written."""
        total = self.total.as_dict()
        return {
            "format": self.format,
            "layers": [layer.as_dict() for layer in self.layers],
            "total": {name: total[name] for name in total if name not in ("name", "format", "shape")} | {"weights": self.total.shape[0]},
            "left": self.left,
            "notes": self.notes,
            "other_bytes": self.other_nbytes,
        }

    @property
    def remarks(self) -> list[str]:
        """What was left alone, by reason, and the notes, as lines of text."""
        return [*(f"left alone: {why}: {some(names)}" for why, names in by_reason(self.left).items()), *self.notes]

    def __str__(self) -> str:
        rows = [[*row(layer)] for layer in [*self.layers, self.total]]
        widths = [max(len(line[i]) for line in [list(COLUMNS), *rows]) for i in range(len(COLUMNS))]
        lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in [list(COLUMNS), *rows]]
        return "\n".join([*(line.rstrip() for line in lines), *self.remarks])


COLUMNS = ("layer", "shape", "bits/weight", "error", "SQNR dB", "KiB before", "KiB", "ms")


def row(layer: LayerReport) -> tuple[str, ...]:
    """A layer's cells under `COLUMNS`."""
    return (
        layer.name,
        "x".join(map(str, layer.shape)),
        f"{layer.bits_per_weight:.3f}",
        f"{layer.error:.2e}",
        f"{layer.sqnr:.2f}",
        f"{layer.nbytes_before / 1024:.1f}",
        f"{layer.nbytes / 1024:.1f}",
        f"{1e3 * layer.seconds:.1f}",
    )


def by_reason(left: Mapping[str, str]) -> dict[str, list[str]]:
    """why -> the names."""
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(why, []).append(name)
    return reasons


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names, and how many more."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def checked_device(device: torch.device | str | None) -> torch.device | None:
    """The device. ValueError if this machine has none such, or no numbers can be there."""
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, dtype=torch.uint8, device=found)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(
            f"quantize: expected a device that is here; got {device!r} ({str(error).splitlines()[0]}); leave device out for the CPU"
        ) from error
    if found.type == "meta":
        raise ValueError("quantize: expected a device that holds numbers; got 'meta'; leave device out for the CPU")
    return found


def check_finite(w: Tensor, name: str) -> float:
    """Its largest magnitude. ValueError naming the tensor if any of it is NaN or infinite."""
    if not w.numel():
        return 0.0
    lo, hi = torch.aminmax(w.detach())
    if not bool(torch.isfinite(lo) & torch.isfinite(hi)):
        bad = int((~torch.isfinite(w)).sum())
        got = f"{name} {tuple(w.shape)} has {bad} elements that are NaN or infinite"
        raise ValueError(f"quantize: expected finite weights; {got}; mend them or skip the layer")
    return max(-float(lo), float(hi))


def measured(name: str, w: Tensor, make: Callable[[], QuantizedTensor]) -> tuple[QuantizedTensor, LayerReport]:
    """Quantizes by `make` and compares the result with w, a bounded piece at a time."""
    start = time.perf_counter()
    qt = make()
    if w.device.type == "cuda":
        torch.cuda.synchronize(w.device)
    seconds = time.perf_counter() - start
    signal = noise = 0.0
    matrix, (n, k) = w.detach().reshape(qt.rows, qt.columns), (qt.rows, qt.columns)
    step = max(1, _PIECE // max(1, k))
    for first in range(0, n, step):
        last = min(n, first + step)
        piece = matrix[first:last].double()
        found = torch.ops.fusedadapt.q_dequantize(*qt.parts, qt.format.spec, n, k, first, last, torch.float32)
        signal += float(piece.square().sum())
        noise += float((piece - found).square().sum())
    if not math.isfinite(noise):
        narrow = qt.scale.dtype == torch.float16
        fix = "use scale_dtype=torch.float32 or another format" if narrow else "use another format, or skip the layer"
        raise ValueError(f"quantize: expected weights within the range of {qt.format.spec}; {name} comes back with NaN: a scale overflows; {fix}")
    return qt, LayerReport(name, tuple(w.shape), qt.format.spec, w.nbytes, qt.nbytes, signal, noise, seconds)


class Patterns:
    """Which layers are meant: full names ("lm_head"), ends of names ("q_proj"), globs ("model.layers.0.*"), and everything inside a module meant."""

    def __init__(self, patterns: str | Iterable[str], what: str) -> None:
        if not isinstance(patterns, Iterable):
            raise TypeError(f"quantize: expected {what} to be names or globs of layers; got {patterns!r}; pass text, or () for none")
        self.patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        if strange := [p for p in self.patterns if not isinstance(p, str) or not p]:
            raise TypeError(f"quantize: expected {what} to be names or globs of layers; got {strange[0]!r}; pass text")
        self._unused = dict.fromkeys(self.patterns)

    def match(self, name: str) -> str | None:
        """The first pattern that means the layer, or a module that it is part of."""
        parts = name.split(".")
        above = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        for pattern in self.patterns:
            if any(a == pattern or a.endswith(f".{pattern}") or fnmatchcase(a, pattern) for a in above):
                self._unused.pop(pattern, None)
                return pattern
        return None

    def unused(self) -> list[str]:
        """Patterns that meant nothing that was asked about: misspelt, perhaps."""
        return list(self._unused)

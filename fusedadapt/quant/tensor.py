"""A quantized weight as plain tensors, and the way there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import quant as ops
from ..reference.quant import Parts
from .formats import LAYERED, QFormat, format_of

#: where `quant.plain` leaves what it has checked of a weight: addresses, which no copy may take along
CHECKED = "_checked"


@dataclass(frozen=True, eq=False)  # equal is what is the same object, as for modules: == of tensors has no truth value
class QuantizedTensor:
    """A weight stored in few bits; w = (value - zero) * S, see `fusedadapt.quant.formats`.

    ``qdata``: the packed codes, in the bytes the format's other users read (bitsandbytes, OCP MX, ...); ``scale``, ``zero``, ``super``, ``offset``:
    what the format stores beside them; ``shape`` and ``dtype``: the weight's own. A weight of d dimensions is stored as prod(shape[:-1]) rows.
    """

    qdata: Tensor
    scale: Tensor
    zero: Tensor | None
    super: Tensor | None
    offset: Tensor | None
    format: QFormat
    shape: torch.Size
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """N of the N x K matrix."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """K of the N x K matrix."""
        return self.shape[-1]

    @property
    def parts(self) -> Parts:
        """The tensors as ops take them, the codes as bytes."""
        return Parts(self.qdata.view(torch.uint8), self.scale, self.zero, self.super, self.offset)

    @property
    def device(self) -> torch.device:
        return self.qdata.device

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(t.nbytes for t in self.parts if t is not None)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in ``dtype`` (default: the one it came in)."""
        n, k = self.rows, self.columns
        if dtype is not None and dtype not in ops.DTYPES:
            ops._refuse("dequantize", "dtype float32, bfloat16, float16 or float64", repr(dtype), "choose one of them")
        w: Tensor = torch.ops.fusedadapt.q_dequantize(*self.parts, self.format.spec, n, k, 0, n, dtype or self.dtype)
        return w.view(self.shape)

    def __getstate__(self) -> dict[str, Any]:
        """The codes as plain bytes: torch writes fp8 tensors into ordinary pickles that it cannot read."""
        return {name: value for name, value in self.__dict__.items() if name != CHECKED} | {"qdata": self.parts.qdata}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fmt: QFormat = state["format"]
        self.__dict__.update(state, qdata=state["qdata"].view(fmt.storage_dtype))

    def _map(self, change: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        changed: dict[str, Any] = {name: None if (t := getattr(self, name)) is None else change(t) for name in Parts._fields}
        return replace(self, **changed)

    def to(self, device: torch.device | str | int) -> QuantizedTensor:
        """The same bytes on another device. TypeError for anything else: a dtype would convert codes and scales as if they were numbers."""
        if not isinstance(device, torch.device | str | int) or isinstance(device, bool):
            got = device if isinstance(device, torch.dtype) else getattr(device, "__name__", type(device).__name__)
            raise TypeError(f"QuantizedTensor.to: expected a device; got {got}; bytes have no other dtype: see dequantize")
        return self._map(lambda t: t.to(device))

    def clone(self) -> QuantizedTensor:
        """A copy of all its tensors."""
        return self._map(torch.clone)

    def __repr__(self) -> str:
        bits = 8 * self.nbytes / max(1, math.prod(self.shape))
        return f"QuantizedTensor({tuple(self.shape)}, {self.format.spec}, {bits:.3f} bits/weight, device={str(self.device)!r})"


# torch.load(weights_only=True) takes them, once this module is imported, as it takes tensors: they hold nothing else that runs.
torch.serialization.add_safe_globals([QuantizedTensor, QFormat])


def quantize(w: Tensor, format: str | QFormat = "nf4", group_size: int | None = None, **options: Any) -> QuantizedTensor:
    """A weight in few bits.

    Args:
        w: fp32, bf16, fp16 or fp64 (read as fp32), of any shape; groups run along its last dimension.
        format: a key of `fusedadapt.quant.FORMATS`, e.g. "nf4", "int4", "fp8_e4m3", "mxfp4".
        group_size: elements that share a scale; None is the format's own, -1 a whole row. A last group may be short.
        options: see `fusedadapt.quant.format_of`.

    A group with NaN or infinity comes back as NaN (in nested formats the whole tensor): never silently finite.

    Raises:
        ValueError: unknown format or option, a group size that the format does not have, or a dtype that is not floating point.
    """
    if (got := ops.misfit(w)) is not None:
        ops._refuse("quantize", "a dense tensor in float32, bfloat16, float16 or float64", got, "convert it")
    if w.dim() == 0:
        ops._refuse("quantize", "at least one dimension", "a scalar", "reshape it")
    fmt = format_of(format, group_size, **options)
    matrix = w.detach().reshape(math.prod(w.shape[:-1]), w.shape[-1])
    qdata, scale, zero, above, offset = torch.ops.fusedadapt.q_quantize(matrix, fmt.spec)
    return QuantizedTensor(
        qdata.view(fmt.storage_dtype),
        scale,
        zero if fmt.zero else None,
        above if fmt.scale in LAYERED else None,
        offset if fmt.scale == "nested" else None,
        fmt,
        w.shape,
        w.dtype,
    )

"""2:4 sparsity: exact validation and packing in front of torch's own semi-structured kernels.

torch's conversion keeps two elements of each group by their position: a third nonzero is dropped without a word. Here it raises.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from .mask import Mask

# nonzeros allowed in a group, its length: the hardware's pattern per dtype
PATTERNS = {torch.float16: (2, 4), torch.bfloat16: (2, 4), torch.int8: (2, 4), torch.float32: (1, 2)}
_PACK = {torch.float16: (32, 16), torch.bfloat16: (32, 16), torch.int8: (16, 32), torch.float32: (32, 8)}  # rows and columns come in these multiples


def validate_semi_structured(w: Tensor, mask: Mask | Tensor | None = None) -> Tensor:
    """w with everything outside the mask at +0, if it fits the pattern: at most 2 nonzeros in each group of 4 neighbours of a row (fp32: 1 of 2).

    Args:
        w: [N, K], fp16, bf16, int8 or fp32. NaN counts as nonzero, -0.0 does not (and becomes +0.0: sparse kernels have read it as a value).
        mask: bool tensor or `Mask` of w's shape, True = kept.

    Returns:
        A contiguous tensor that does not share w's memory.

    Raises:
        ValueError: too many nonzeros, naming the first place; another shape or dtype.
    """
    if w.dtype not in PATTERNS or w.dim() != 2:
        raise ValueError(f"to_semi_structured: expected a matrix of fp16, bf16, int8 or fp32; got {w.dtype} of shape {tuple(w.shape)}")
    most, group = PATTERNS[w.dtype]
    if w.shape[1] % group:
        raise ValueError(f"to_semi_structured: expected rows of a multiple of {group} elements; got shape {tuple(w.shape)}; pad the last dimension")
    clean = w.detach()
    zero = clean == 0  # -0.0 too
    if mask is not None:
        keep = mask.to_bool() if isinstance(mask, Mask) else mask
        if keep.dtype != torch.bool or keep.shape != w.shape:
            raise ValueError(f"to_semi_structured: expected a bool mask of shape {tuple(w.shape)}; got {keep.dtype} of shape {tuple(keep.shape)}")
        zero |= ~keep.to(w.device)
    clean = clean.masked_fill(zero, 0).contiguous()
    crowded = ((~zero).reshape(w.shape[0], w.shape[1] // group, group).sum(-1) > most).reshape(-1)
    if bool(crowded.any()):
        at = int(crowded.nonzero()[0])
        row, first = divmod(at, w.shape[1] // group)
        values = clean[row, first * group : (first + 1) * group].tolist()
        raise ValueError(
            f"to_semi_structured: expected at most {most} nonzeros in every {group} neighbours of a row; got {values} at row {row}, columns "
            f"{first * group}..{(first + 1) * group - 1} ({int(crowded.sum())} such groups); make a mask with nm_mask(w, {most}, {group}) and pass it"
        )
    return clean


def pack_semi_structured(w: Tensor, mask: Mask | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(values [N, K / 2], metadata) in the layout of torch's CUTLASS kernels; on any device, by torch's own conversion, after validation.

    Raises:
        ValueError: as `validate_semi_structured`, or sizes the layout cannot hold. RuntimeError: this torch has no such conversion.
    """
    clean = validate_semi_structured(w, mask)
    rows, columns = _PACK[w.dtype]
    if not clean.numel() or clean.shape[0] % rows or clean.shape[1] % columns:
        raise ValueError(f"pack_semi_structured: expected positive multiples of {rows} x {columns} for {w.dtype}; got {tuple(w.shape)}; pad it")
    packed: tuple[Tensor, Tensor] = _conversions("sparse_semi_structured_from_dense_cutlass")(clean)
    return packed


def unpack_semi_structured(values: Tensor, metadata: Tensor) -> Tensor:
    """The dense matrix [N, K] that `pack_semi_structured` packed."""
    # torch moves fp32 values as pairs of halves, which quiets those halves that look like signaling NaN: 1 % of random numbers come back changed.
    # The layout is that of as many 16-bit integers, which arrive bit for bit.
    raw = values.contiguous().view(torch.int16) if values.dtype.itemsize in (2, 4) else values
    dense: Tensor = _conversions("sparse_semi_structured_to_dense_cutlass")(raw, metadata)
    return dense.view(values.dtype)


def to_semi_structured(w: Tensor, mask: Mask | Tensor | None = None) -> Tensor:
    """A `torch.sparse.SparseSemiStructuredTensor` of w (on an NVIDIA GPU), for torch's 2:4 matrix products. Nothing is dropped silently.

    Args: as `validate_semi_structured`.

    Raises:
        ValueError: as `validate_semi_structured`; w is not on an NVIDIA GPU. RuntimeError: torch refuses the size or the GPU (its own words).
    """
    clean = validate_semi_structured(w, mask)
    if clean.device.type != "cuda":
        raise ValueError(
            f"to_semi_structured: expected a tensor on an NVIDIA GPU, where torch has the kernels; got one on {clean.device}; "
            "move it there, or use pack_semi_structured for the packed bytes alone"
        )
    sparse: Tensor = torch.sparse.to_sparse_semi_structured(clean)
    return sparse


def _conversions(name: str) -> Any:
    try:
        return getattr(importlib.import_module("torch.sparse._semi_structured_conversions"), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise RuntimeError(f"pack_semi_structured: expected a torch with {name}; {torch.__version__} has none; use torch 2.11 to 2.13") from error

"""Which tensors of a checkpoint belong together as one packed weight, and in whose format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import foreign
from .archive import Archive
from .foreign.gptq import VERSIONS
from .foreign.plain import METADATA, ORDER
from .tensor import QuantizedTensor

_BNB = re.compile(r"^(.*)\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$")
_BNB_ROWS = re.compile(r"^(.*)\.(SCB|weight_format)$")
_WORDS = re.compile(r"^(.*)\.(qweight|qzeros|scales|g_idx)$")
_HQQ = re.compile(r"^(.*)\.(?!bias$|weight$)\w+$")  # whatever lies beside W_q
_FP8 = re.compile(r"^(.*)\.weight(_scale_inv|_scale)$")
#: bytes of a tensor that is read to learn a layer's shape: of a description, no weight
_SMALL = 1 << 14


@dataclass(frozen=True)
class Packed:
    """``prefix``: the module's name. ``kind``: "ours" | "bitsandbytes" | "gptq" | "awq" | "hqq" | "fp8"."""

    prefix: str
    kind: str
    tensors: tuple[str, ...]


def packed_layers(archive: Archive, config: Mapping[str, Any]) -> list[Packed]:
    """The packed weights in the order of the files, complete or not."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key in archive.metadata:
        if key.startswith(METADATA):
            weight = key.removeprefix(METADATA)
            names = [f"{weight}{end}" for end in ("", "_scale", "_zero", "_super", "_offset", ORDER)]
            groups[weight.removesuffix(".weight"), "ours"] = [name for name in names if name in archive.entries]
    taken = {name for names in groups.values() for name in names}
    for name in (name for name in archive.entries if name not in taken):
        if (found := _HQQ.match(name)) and f"{found[1]}.W_q" in archive.entries:
            groups.setdefault((found[1], "hqq"), []).append(name)
        elif found := _BNB.match(name) or _BNB_ROWS.match(name):
            groups.setdefault((found[1], "bitsandbytes"), []).append(name)
        elif found := _WORDS.match(name):
            groups.setdefault((found[1], _whose(archive, found[1], config)), []).append(name)
        elif (found := _FP8.match(name)) and archive.entries.get(f"{found[1]}.weight", archive.entries[name]).code.startswith("F8_E"):
            groups.setdefault((found[1], "fp8"), []).append(name)
    for (prefix, kind), names in groups.items():
        if kind in ("bitsandbytes", "fp8") and f"{prefix}.weight" in archive.entries:
            names.insert(0, f"{prefix}.weight")
    order = {name: i for i, name in enumerate(archive.entries)}
    ordered = sorted(groups.items(), key=lambda item: min((order[name] for name in item[1]), default=0))
    return [Packed(prefix, kind, tuple(names)) for (prefix, kind), names in ordered]


def _method(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Any = config.get("quantization_config")
    return found if isinstance(found, Mapping) else {}


def _whose(archive: Archive, prefix: str, config: Mapping[str, Any]) -> str:
    """GPTQ packs along the inputs, so its words have as many columns as scales; AWQ's have not."""
    method = _method(config).get("quant_method")
    if method in ("gptq", "awq"):
        return str(method)
    words, scales = (archive.entries.get(f"{prefix}.{end}") for end in ("qweight", "scales"))
    narrow = words is not None and scales is not None and words.shape[-1:] != scales.shape[-1:]
    return "awq" if narrow and f"{prefix}.g_idx" not in archive.entries else "gptq"


def shape(archive: Archive, layer: Packed, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """(outputs, inputs) of a layer, so far as headers and small tensors tell; no weight is read. None: the reader says what is wrong with it."""
    prefix, weight = layer.prefix, f"{layer.prefix}.weight"
    if layer.kind == "fp8" or f"{prefix}.SCB" in archive.entries:
        return archive.entries[weight].shape if weight in archive.entries else None
    if layer.kind == "ours":
        return foreign.plain.shape(archive.metadata, weight)
    entries = {name: archive.entries[name] for name in layer.tensors}
    meta = {name: torch.empty(entry.shape, dtype=entry.dtype or torch.uint8, device="meta") for name, entry in entries.items()}
    if layer.kind == "gptq":
        return foreign.gptq.shape(meta, prefix, bits(config))
    if layer.kind == "awq":
        return foreign.awq.shape(meta, prefix)
    told = (".shape", "__nf4", "__fp4")
    small = {name: archive[name] for name, entry in entries.items() if name.endswith(told) and entry.nbytes <= _SMALL and entry.dtype is not None}
    return foreign.hqq.shape(small, prefix) if layer.kind == "hqq" else foreign.bnb.shape(small, weight)


def activations(archive: Archive, layer: Packed) -> str | None:
    """What x is coded to in a layer of ours; other files do not say."""
    return foreign.plain.activations(archive.metadata, f"{layer.prefix}.weight") if layer.kind == "ours" else None


def label(config: Mapping[str, Any]) -> str | None:
    """Which version of GPTQ's zeros config.json claims; files from before there were two do not say."""
    said = _method(config)
    if said.get("quant_method") != "gptq":
        return None
    found = str(said.get("checkpoint_format") or "gptq")
    return found if found in VERSIONS else None


def block(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of an fp8 tile."""
    said = _method(config).get("weight_block_size")
    sides = [side for side in said if type(side) is int and side > 0] if isinstance(said, list) and len(said) == 2 else []
    return (sides[0], sides[1]) if len(sides) == 2 else (128, 128)


def read_packed(archive: Archive, layer: Packed, config: Mapping[str, Any]) -> tuple[QuantizedTensor, Tensor | None]:
    """The weight of one layer, on the CPU, and the order of its inputs (None: as they come). ValueError that names the tensor at fault."""
    tensors, weight = {name: archive[name] for name in layer.tensors}, f"{layer.prefix}.weight"
    if layer.kind == "gptq":
        return foreign.from_gptq(tensors, layer.prefix, bits=bits(config), version=label(config), group_size=group(config))
    if layer.kind == "ours":
        return foreign.from_plain(tensors, archive.metadata, weight), tensors.get(f"{weight}{ORDER}")
    if layer.kind == "bitsandbytes":
        return foreign.from_bitsandbytes(tensors, weight), None
    if layer.kind == "hqq":
        return foreign.from_hqq(tensors, layer.prefix), None
    if layer.kind == "awq":
        return foreign.from_awq(tensors, layer.prefix, group_size=group(config)), None
    return foreign.from_fp8(tensors, weight, block=block(config)), None


def bits(config: Mapping[str, Any]) -> int | None:
    """Of a code; None where config.json does not say."""
    found = _method(config).get("bits")
    return found if type(found) is int and found > 0 else None


def group(config: Mapping[str, Any]) -> int | None:
    """Inputs that share a scale, -1 for all of them; None where config.json does not say."""
    found = _method(config).get("group_size")
    return found if type(found) is int and (found > 0 or found == -1) else None

"""A model on disk, quantized tensor by tensor into a new folder, which appears complete or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..files import checked_target, new_folder
from . import foreign
from .archive import INDEX, SINGLE, Archive, opened
from .formats import QFormat, format_of, whole
from .linears import Linears, choose, read_config, skip_list
from .model import DEFAULT_SKIP
from .report import Patterns, QuantizationReport, check_finite, checked_device, measured
from .tensor import quantize

MAX_SHARD = 2 << 30
#: what is copied beside the weights: configuration, tokenizer, licence, the model's own code (which is not run here)
_COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm", ".md", ".py")
_QUANTIZED = re.compile(r"\.(qweight|qzeros|absmax|weight_scale_inv|weight_scale|SCB|quant_state\.\w+)$")
_COMPUTE = {"F32": "float32", "F64": "float32", "F16": "float16", "BF16": "bfloat16"}

Advance = Callable[[str, int, int], None]


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    format: str | QFormat = "nf4",
    *,
    skip: str | Iterable[str] = DEFAULT_SKIP,
    include: str | Iterable[str] = (),
    group_size: int | None = None,
    device: torch.device | str | None = None,
    compute_dtype: str | torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD,
    advance: Advance | None = None,
    **options: Any,
) -> QuantizationReport:
    """Quantizes the linear layers of a safetensors model on disk. Peak memory: about one tensor and one output shard.

    nf4 and fp4 are written as bitsandbytes checkpoints, which transformers' `from_pretrained` loads; other formats as files of ours, for
    `load_model_`. config.json is adapted, tokenizer and the like are copied. ``out`` appears when everything is written and synced, by one rename;
    after an error, a full disk or a kill there is nothing (a killed run's temporary folder beside it is removed by the next run).

    Args:
        source: a folder (model.safetensors, or shards with an index) or one .safetensors file.
        out: a folder that does not exist or is empty.
        format, group_size, options: as `fusedadapt.quantize` takes them.
        skip, include: names, ends of names or globs of layers; `include` alone decides if it is given. Otherwise the layers are the nn.Linear modules
            of the model that transformers builds from config.json (on the meta device), or, without it, are told by names and shapes.
        device: quantize there. compute_dtype: nf4 and fp4: "float32" | "bfloat16" | "float16", or torch's, in which bitsandbytes multiplies
            (the weights' own).
        max_shard_bytes: of an output file. advance: for a progress bar: called with every tensor's name, its bytes and those of all tensors.

    Returns:
        The report; its notes say how the layers were found.

    Raises:
        ValueError: damaged, already quantized or non-finite weights (named), no linear layers, unknown format, dtype or option. FileNotFoundError.
        FileExistsError: ``out`` has something in it. OSError while writing.
    """
    fmt, skipped, included = format_of(format, group_size, **options), Patterns(skip, "skip"), Patterns(include, "include")
    compute, limit = _checked_compute(compute_dtype), checked_limit("quantize", max_shard_bytes)
    device, archive = checked_device(device), opened(Path(source))
    config = read_config(archive.folder)
    _refuse_quantized(archive, config)
    target = checked_target("quantize", out)
    picked = choose(archive, config, skipped, included)
    report = QuantizationReport(fmt.spec, left=dict(picked.left), notes=[f"layers: {picked.how}"])
    for patterns, word in ((skipped, "skip"), (included, "include")):
        if patterns.patterns != DEFAULT_SKIP and (unused := patterns.unused()):
            report.notes.append(f"{word}: no layer of that name: {', '.join(unused)}")
    with new_folder(target) as folder:
        _write(archive, folder, picked, fmt, device, limit, report, advance)
        if archive.folder is not None:
            _copy_companions(archive.folder, folder)
            adapted = _config(config, fmt, archive, picked, compute)
            with files.atomic_open(folder / "config.json") as file:
                file.write(json.dumps(adapted, indent=2).encode() + b"\n")
    return report


def _write(
    archive: Archive,
    folder: Path,
    picked: Linears,
    fmt: QFormat,
    device: torch.device | None,
    limit: int,
    report: QuantizationReport,
    advance: Advance | None,
) -> None:
    """All tensors, in the order of the source's files."""
    shards, chosen = Shards(folder, limit), set(picked.chosen)
    total = sum(entry.nbytes for entry in archive.entries.values())
    for name, entry in archive.entries.items():
        if name in chosen:
            shards.add(*_quantized(archive[name], name, fmt, device, report))
        else:
            shards.add({name: archive[name]}, {})
            report.other_nbytes += entry.nbytes
        if advance is not None:
            advance(name, entry.nbytes, total)
    shards.close()


def checked_limit(op: str, size: object) -> int:
    """``max_shard_bytes`` as an int. ValueError if it is no positive whole number."""
    found = whole(size)
    if found is None or found < 1:
        raise ValueError(f"{op}: expected max_shard_bytes: a positive whole number; got {size!r}; pass bytes, e.g. 2 << 30")
    return found


def _checked_compute(dtype: str | torch.dtype | None) -> str | None:
    name, known = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype, sorted({*_COMPUTE.values()})
    if name is not None and name not in known:
        raise ValueError(f"quantize: expected compute_dtype among {', '.join(known)}; got {dtype!r}; choose one of them, or None")
    return name


def is_bitsandbytes(fmt: QFormat) -> bool:
    """Whether the format is written as bitsandbytes writes it."""
    return fmt.name in ("nf4", "fp4")


def _refuse_quantized(archive: Archive, config: Mapping[str, Any]) -> None:
    said = config.get("quantization_config")
    method = said.get("quant_method", "unnamed") if isinstance(said, Mapping) else said
    name = next((name for name in archive.entries if _QUANTIZED.search(name)), None)
    if method or name:
        got = f"quant_method {method!r} in config.json" if method else f"the tensor {name}"
        raise ValueError(f"quantize: expected a model in floating point; {archive.path} is quantized already ({got}); start from the original")


def _quantized(
    w: Tensor, name: str, fmt: QFormat, device: torch.device | str | None, report: QuantizationReport
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one quantized weight, on the CPU, and what goes into the file's metadata."""
    check_finite(w, name)
    moved = w if device is None else w.to(device)
    qt, layer = measured(name.removesuffix(".weight"), moved, lambda: quantize(moved, fmt))
    report.layers.append(layer)
    if is_bitsandbytes(fmt):
        qt = qt if qt.dtype != torch.float64 else replace(qt, dtype=torch.float32)  # bitsandbytes has no fp64
        return foreign.to_bitsandbytes(qt.to("cpu"), name), {}
    return foreign.to_plain(qt.to("cpu"), name)


class Shards:
    """Tensors gathered into files of bounded size. How many there are, and so their names, is known at the end."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.tensors: dict[str, Tensor] = {}
        self.metadata: dict[str, str] = {}
        self.nbytes = self.total = 0
        self.written: list[list[str]] = []
        self.names: set[str] = set()

    def add(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Tensors that belong together go into the same file."""
        size = sum(t.nbytes for t in tensors.values())
        if self.tensors and self.nbytes + size > self.limit:
            self.flush()
        if clash := self.names.intersection(tensors):
            raise ValueError(f"quantize: expected no tensor named {clash.pop()} beside the weight it would belong to; there is one; rename it")
        self.names.update(tensors)
        self.tensors |= tensors
        self.metadata |= metadata
        self.nbytes += size

    def _part(self, i: int) -> Path:
        return self.folder / f"part-{i}.safetensors"

    def flush(self) -> None:
        files.write_safetensors(self._part(len(self.written)), self.tensors, {"format": "pt", **self.metadata})
        self.written.append(list(self.tensors))
        self.total += self.nbytes
        self.tensors, self.metadata, self.nbytes = {}, {}, 0

    def close(self) -> None:
        """Writes the rest and gives the files their names; several get an index."""
        if self.tensors or not self.written:
            self.flush()
        count = len(self.written)
        if count == 1:
            os.rename(self._part(0), self.folder / SINGLE)
            return
        mapping: dict[str, str] = {}
        for i, names in enumerate(self.written):
            shard = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self._part(i), self.folder / shard)
            mapping |= dict.fromkeys(names, shard)
        with files.atomic_open(self.folder / INDEX) as file:
            file.write(json.dumps({"metadata": {"total_size": self.total}, "weight_map": mapping}, indent=2).encode() + b"\n")


def _copy_companions(source: Path, folder: Path) -> None:
    """Everything small that a loader reads beside the weights; one level of folders, as sentence-transformers has them."""
    for file in sorted([*source.glob("*"), *source.glob("?_*/config.json"), *source.glob("LICENSE*")]):
        inside = file.relative_to(source)
        if not file.is_file() or file.name.endswith(".index.json") or (folder / inside).exists():
            continue
        if file.suffix in _COPIED or file.name.startswith("LICENSE"):
            with files.atomic_open(folder / inside) as copy, open(file, "rb") as original:
                shutil.copyfileobj(original, copy)


def _config(config: Mapping[str, Any], fmt: QFormat, archive: Archive, picked: Linears, compute: str | None) -> dict[str, Any]:
    """config.json with what a loader must know."""
    adapted = dict(config)
    kinds = [_COMPUTE[archive.entries[name].code] for name in picked.chosen]
    usual = max(set(kinds), key=kinds.count)
    if "dtype" not in adapted and "torch_dtype" not in adapted:
        adapted["torch_dtype"] = usual  # otherwise guessed from the file's first tensors, which are fp32 scales now
    quantized = {picked.names[name] for name in picked.chosen} if is_bitsandbytes(fmt) else set()
    adapted["quantization_config"] = quantization_config(fmt, compute or usual, skip_list(picked.modules, quantized))
    return adapted


def quantization_config(fmt: QFormat | None, compute: str, skipped: list[str]) -> dict[str, Any]:
    """That entry of config.json. ``fmt``: of all layers, or None; ``compute``: in which bitsandbytes multiplies; ``skipped``: what stays as it is."""
    if fmt is None or not is_bitsandbytes(fmt):
        return {"quant_method": "fusedadapt", "format": "mixed" if fmt is None else fmt.spec}
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": fmt.name,
        "bnb_4bit_use_double_quant": fmt.scale == "nested",
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }

"""`python -m fusedadapt doctor CHECKPOINT`: what a quantized file or folder is, and what is wrong with it. Reads, never loads or runs anything."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import foreign
from .archive import INDEX, SINGLE, Archive, find, read_tensor
from .foreign.parts import ALL_ZERO
from .linears import module_matches
from .packed import Packed, bits, block, group, label, packed_layers
from .report import some

#: quant_method in config.json -> kind of layer found in the files
_KINDS = {"bitsandbytes": "bitsandbytes", "gptq": "gptq", "awq": "awq", "hqq": "hqq", "fp8": "fp8", "fusedadapt": "ours"}
_MOST = 50


@dataclass
class Checkup:
    """``rows``: what was found, (name, text); ``faults``: what is wrong, each naming the file or the tensor; ``notes``: what may surprise."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine(path: str | Path) -> Checkup:
    """Looks at a safetensors file or a folder. Peak memory: the tensors of one layer. FileNotFoundError if there is nothing to look at."""
    archive, result = find(Path(path)), Checkup()
    result.faults += archive.faults
    config = _config(archive, result)
    size = sum(header.size for header in archive.headers)
    files = ", ".join(header.path.name for header in archive.headers[:3]) + (" ..." if len(archive.headers) > 3 else "")
    result.rows.append(("files", f"{len(archive.headers)} ({files}), {len(archive.entries)} tensors, {size / 2**20:.1f} MiB"))
    result.rows.append(("dtypes", ", ".join(f"{code} {count}" for code, count in Counter(e.code for e in archive.entries.values()).most_common())))
    if archive.folder is not None and (archive.folder / SINGLE).is_file() and (archive.folder / INDEX).is_file():
        result.notes.append(f"both {SINGLE} and {INDEX} are there; loaders take the single file")
    layers = packed_layers(archive, config)
    for layer in layers:
        _check_layer(archive, layer, config, result)
    kinds = Counter(layer.kind for layer in layers)
    result.rows.append(("quantized", ", ".join(f"{count} layers as {kind}" for kind, count in kinds.items()) or "no layer of a known format"))
    _check_config(config, layers, result)
    return result


def _config(archive: Archive, result: Checkup) -> dict[str, Any]:
    path = None if archive.folder is None else archive.folder / "config.json"
    if path is None or not path.is_file():
        if path is not None:
            result.notes.append("no config.json beside the weights")
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        result.faults.append(f"config.json: not readable as JSON: {error}")
        return {}
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config") or {}, dict):
        result.faults.append("config.json: expected an object, and one under quantization_config")
        return {}
    return config


def _check_layer(archive: Archive, layer: Packed, config: Mapping[str, Any], result: Checkup) -> None:
    tensors = {}
    for name in layer.tensors:
        try:
            tensors[name] = read_tensor(archive.entries[name], name)
        except (OSError, ValueError) as error:
            result.faults.append(str(error))
            return
    said: dict[str, Any] = {"label": label(config), "bits": bits(config), "group_size": group(config), "block": block(config)}
    for text in foreign.diagnose(tensors, layer.prefix, metadata=archive.metadata, **said):
        (result.notes if text.endswith(ALL_ZERO) else result.faults).append(text)  # a group of zeros is unusual, not wrong


def _check_config(config: Mapping[str, Any], layers: list[Packed], result: Checkup) -> None:
    """Whether config.json describes the layers that are there."""
    said = config.get("quantization_config") or {}
    method = said.get("quant_method") or ("bitsandbytes" if said.get("load_in_4bit") or said.get("load_in_8bit") else None)
    if not isinstance(method, str | None):
        result.faults.append(f"config.json: expected quant_method: a name; got {str(method)[:80]}")
        return
    if method is not None:
        result.rows.append(("config.json", f"quant_method {method}"))
    kinds = {layer.kind for layer in layers}
    if config and layers and method is None:
        result.faults.append("config.json: expected a quantization_config; there is none: loaders will take packed bytes for weights")
    elif method in _KINDS and _KINDS[method] not in kinds:
        got = ", ".join(sorted(kinds)) or "no quantized layer"
        result.faults.append(f"config.json: quant_method is {method!r}; the files hold {got}")
    elif method is not None and method not in _KINDS:
        result.notes.append(f"layers of {method} are not looked into")
    if method == "bitsandbytes" and "bitsandbytes" in kinds:
        _check_bitsandbytes(said, [layer for layer in layers if layer.kind == "bitsandbytes"], result)


def _check_bitsandbytes(said: Mapping[str, Any], layers: list[Packed], result: Checkup) -> None:
    kinds = {name.rpartition("bitsandbytes__")[2] for layer in layers for name in layer.tensors if "bitsandbytes__" in name}
    rows = {any(name.endswith(".SCB") for name in layer.tensors) for layer in layers}
    for width, present in ((4, False in rows), (8, True in rows)):
        if present and said.get(f"load_in_{width}bit", said.get(f"_load_in_{width}bit")) is not True:
            result.faults.append(f"config.json: expected load_in_{width}bit: true beside {width}-bit layers")
    if kinds and said.get("bnb_4bit_quant_type") not in kinds:
        result.faults.append(f"config.json: bnb_4bit_quant_type is {said.get('bnb_4bit_quant_type')!r}; the files hold {', '.join(sorted(kinds))}")
    nested = {any(name.endswith(".nested_absmax") for name in layer.tensors) for layer in layers}
    if len(nested) == 1 and bool(said.get("bnb_4bit_use_double_quant", False)) not in nested:
        result.notes.append(f"config.json: bnb_4bit_use_double_quant is {said.get('bnb_4bit_use_double_quant')}; the files say {nested.pop()}")
    skipped = said.get("llm_int8_skip_modules")
    if not isinstance(skipped, list | None) or not all(isinstance(name, str) for name in skipped or ()):
        result.faults.append(f"config.json: expected llm_int8_skip_modules to be a list of names; got {str(skipped)[:80]}")
    elif caught := [layer.prefix for layer in layers if module_matches(skipped or (), layer.prefix)]:
        result.faults.append(f"config.json: llm_int8_skip_modules also names quantized layers, which will not load: {some(caught)}")


def text(path: str | Path, result: Checkup) -> list[str]:
    """The report as lines of plain text, ready to paste: names of files and tensors, no folders of yours."""
    lines = [f"checkpoint {Path(path).name}", ""]
    width = max(len(name) for name, _ in result.rows)
    lines += [f"  {name:<{width}}  {what}".rstrip() for name, what in result.rows]
    lines += [f"  note: {note}" for note in result.notes]
    lines += ["", *(f"  FAULT {fault}" for fault in result.faults[:_MOST])]
    if len(result.faults) > _MOST:
        lines.append(f"  and {len(result.faults) - _MOST} more")
    count = len(result.faults)
    return [*lines, f"verdict: {f'{count} FAULT' + ('S' if count > 1 else '') if count else 'nothing wrong was found'}"]

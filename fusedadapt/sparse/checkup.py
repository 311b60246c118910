"""`python -m fusedadapt doctor FILE` on files of deltas and masks: what they hold, and every tensor that is damaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..quant.archive import Header, read_header, read_tensor
from ..quant.checkup import Checkup
from . import delta, mask
from .coding import Damaged, contents

_KINDS = {delta.FORMAT: ("entries", (".gaps", ".values")), mask.FORMAT: ("masks", ("",))}


def examine(path: str | Path) -> Checkup | None:
    """Looks at a file; None if it is no delta's and no masks'. Peak memory: that of one tensor's part."""
    if not Path(path).is_file():
        return None
    header = read_header(Path(path))
    kind = header.metadata.get("format")
    if kind not in _KINDS:
        return None
    result, (key, parts) = Checkup(faults=list(header.faults)), _KINDS[kind]
    listed = _listed(header.metadata, key, result)
    named = {f"{name}{part}" for name in listed for part in parts}
    result.faults += [f"{name!r}: in the list of contents, and not in the file" for name in sorted(named - set(header.entries))]
    result.faults += [f"{name!r}: in the file, and not in the list of contents" for name in sorted(set(header.entries) - named)]
    whole = {name: e for name, e in listed.items() if all(f"{name}{part}" in header.entries for part in parts)}
    (_delta if kind == delta.FORMAT else _masks)(header, whole, result)
    return result


def _listed(metadata: Mapping[str, str], key: str, result: Checkup) -> dict[str, Any]:
    try:
        return contents(metadata[key])
    except (KeyError, Damaged) as error:
        result.faults.append(f"its list of contents is not readable ({error})")
        return {}


def _read(header: Header, name: str, parts: tuple[str, ...], result: Checkup, made: Callable[..., Any]) -> Any:
    """What `made` makes of a name's tensors, or None and a fault."""
    try:
        tensors: list[Tensor] = [read_tensor(header.entries[f"{name}{part}"], f"{name}{part}") for part in parts]
        return made(*tensors)
    except (KeyError, TypeError) as error:
        result.faults.append(f"{name!r}: its entry in the list of contents is damaged ({type(error).__name__}: {error})")
    except Damaged as error:
        result.faults.append(str(error))
    except (OSError, ValueError) as error:
        result.faults.append(f"{name!r}: {error}")
    return None


def _delta(header: Header, listed: Mapping[str, Any], result: Checkup) -> None:
    kind, count, total = header.metadata.get("kind", ""), 0, 0
    if kind not in delta.KINDS:
        result.faults.append(f"its kind is {kind!r}; expected {' or '.join(delta.KINDS)}")
    for name, e in listed.items():
        entry = _read(header, name, (".gaps", ".values"), result, lambda g, v, name=name, e=e: delta.read_entry(name, kind, e, g, v))
        if entry is not None:
            count, total = count + entry.indices.numel(), total + math.prod(entry.shape)
    result.rows.append(("delta", f"kind {kind}, {len(listed)} tensors, {count} of {total} elements"))
    result.rows.append(("size", f"{header.size / 2**20:.2f} MiB" + (f", {header.size / count:.2f} bytes an entry" if count else "")))


def _masks(header: Header, listed: Mapping[str, Any], result: Checkup) -> None:
    found = [_read(header, name, ("",), result, lambda w, name=name, e=e: mask.read_mask(name, e, w)) for name, e in listed.items()]
    whole = [m for m in found if m is not None]
    result.rows.append(("masks", f"{len(listed)}, {sum(m.nnz for m in whole)} of {sum(m.numel() for m in whole)} elements chosen"))
    result.rows.append(("size", f"{header.size / 2**20:.2f} MiB"))

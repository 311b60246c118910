"""Checkpoints in one safetensors file: exact, atomic, checked, never pickled.

A checkpoint is a tree of dicts, lists, tuples, scalars and tensors. The tensors are the tensors of a plain safetensors file (any
safetensors reader opens it); the tree, with a name in place of each tensor, is JSON in the file's metadata together with dtype, shape and
BLAKE2b hash of every tensor and a hash of that text itself. So a cut or a flipped bit anywhere is found on load, before anything is
changed.

    save("run/ckpt.safetensors", model, optimizer, extra={"step": 40})
    extra = load("run/ckpt.safetensors", model, optimizer)

What comes back is what went in: dtypes of every state (also where ``Optimizer.load_state_dict`` would cast), tuples, ints, bools, None and
Tensor learning rates in the parameter groups, torch's random state. POSIX file systems; any number of readers, one writer per path at a
time is the intended use, two writers cannot damage the file (the last rename wins).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .files import CODES, DTYPES, tensor_bytes, write_safetensors
from .optim import FusedOptimizer
from .optim.saved import read
from .quant.layer import PackedWeight

__all__ = ["CheckpointError", "load", "load_tree", "save", "save_tree"]

VERSION = 1
_META_KEY = "fusedadapt"
_MAX_HEADER = 100_000_000  # the safetensors format's own bound


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, is damaged, or does not fit what it is loaded into. Nothing was changed."""


def save(path: str | os.PathLike[str], model: Any = None, optimizer: Any = None, extra: Any = None, *, rng: bool = True) -> None:
    """Write model, optimizer, ``extra`` and torch's random state to ``path``, replacing it in one step.

    ``model`` and ``optimizer`` are one ``nn.Module`` / ``Optimizer`` or a dict of them. ``extra`` is a tree of dicts (str or int keys),
    lists, tuples, str, int, float, bool, None, ``torch.dtype`` and tensors. A kill at any moment leaves the old file or the new one, whole.
    Raises CheckpointError naming what cannot be stored.
    """
    tree: dict[str, Any] = {
        "model": {key: m.state_dict() for key, m in _named(model).items()},
        "optimizer": {key: {"rule": type(o).__name__, "state_dict": o.state_dict()} for key, o in _named(optimizer).items()},
        "extra": extra,
        "rng": _rng_state() if rng else None,
    }
    save_tree(path, tree)


def load(path: str | os.PathLike[str], model: Any = None, optimizer: Any = None, *, rng: bool = True) -> Any:
    """Read a file written by :func:`save` into ``model`` and ``optimizer`` (in place) and return its ``extra``.

    The whole file is read, hashed and compared with the model and the optimizer first; on CheckpointError (damaged file, missing,
    unexpected or differently shaped or typed tensor, state of another rule, other parameter groups), and on the ValueError of an
    optimizer of ours whose options the state does not fit, nothing has been changed.
    """
    tree = load_tree(path)
    if not isinstance(tree, dict) or not {"model", "optimizer", "extra", "rng"} <= tree.keys():
        raise CheckpointError(f"checkpoint.load: expected a file written by checkpoint.save; {path} holds another tree; use load_tree")
    models, optimizers = _named(model), _named(optimizer)
    for key, m in models.items():
        _check_model(path, key, m, tree["model"].get(key))
    for key, o in optimizers.items():
        _check_optimizer(path, key, o, tree["optimizer"].get(key))
    # Models before the optimizers, whose states may be filled up with values of the parameters; but for those whose hooks may change the state, so
    # that only loading tells whether it fits.
    hooked = [key for key, o in optimizers.items() if o._optimizer_load_state_dict_pre_hooks]
    for key in hooked:
        _load_optimizer(optimizers[key], tree["optimizer"][key]["state_dict"])
    for key, m in models.items():
        m.load_state_dict(tree["model"][key])
    for key in optimizers.keys() - set(hooked):
        _load_optimizer(optimizers[key], tree["optimizer"][key]["state_dict"])
    if rng and tree["rng"] is not None:
        torch.set_rng_state(tree["rng"]["cpu"])
        if tree["rng"]["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(tree["rng"]["cuda"])
    return tree["extra"]


def save_tree(path: str | os.PathLike[str], tree: Any) -> None:
    """Write one tree (see :func:`save` for what it may hold) to ``path`` atomically: temporary file, fsync, rename, fsync of the
    directory."""
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    encoded = _encode(tree, "", tensors)
    table = {name: [CODES[t.dtype], list(t.shape), _hash(t)] for name, t in tensors.items()}
    body = json.dumps({"version": VERSION, "tree": encoded, "tensors": table}, separators=(",", ":"), allow_nan=False)
    digest = hashlib.blake2b(body.encode(), digest_size=16).hexdigest()
    write_safetensors(path, tensors, {_META_KEY: digest + body})


def load_tree(path: str | os.PathLike[str]) -> Any:
    """Read the tree written by :func:`save_tree`; every tensor on the CPU with its own storage. CheckpointError names the damaged
    tensor."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise CheckpointError(f"checkpoint.load: expected a readable checkpoint; {path}: {error.strerror}; check the path") from error
    with file:
        body, offsets = _read_header(path, file)
        tensors = {name: _read_tensor(path, file, name, entry, offsets[name]) for name, entry in body["tensors"].items()}
    return _decode(body["tree"], tensors)


# --- the tree --------------------------------------------------------------------------------------------------------------


def _encode(node: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for ``node``; containers that JSON lacks are one-key objects. ``where`` is the path in the tree and becomes the tensor's
    name."""
    if isinstance(node, torch.Tensor):
        name = where or "tensor"
        while name in tensors:  # {"a/b": x, "a": {"b": y}}
            name += "'"
        tensors[name] = _plain(node, name)
        return {"tensor": name}
    if node is None or type(node) in (bool, str, int):
        return node
    if isinstance(node, float):
        return float(node) if math.isfinite(node) else {"float": repr(float(node))}
    if isinstance(node, torch.dtype):
        return {"dtype": str(node).removeprefix("torch.")}
    if type(node) in (list, tuple):
        items = [_encode(item, f"{where}/{i}".lstrip("/"), tensors) for i, item in enumerate(node)]
        return items if type(node) is list else {"tuple": items}
    if isinstance(node, Mapping) and all(type(key) in (str, int) for key in node):
        return {"dict": [[key, _encode(value, f"{where}/{key}".lstrip("/"), tensors)] for key, value in node.items()]}
    raise CheckpointError(
        f"checkpoint.save: expected dicts with str or int keys, lists, tuples, scalars and tensors; "
        f"{where or 'the root'} is {type(node).__module__}.{type(node).__qualname__}; convert it before saving"
    )


def _decode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in value}
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in value)
    return getattr(torch, value) if kind == "dtype" else float(value)


def _plain(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Contiguous CPU tensor that owns its whole storage. Step counters may all be views of one buffer, which safetensors refuses."""
    if tensor.layout != torch.strided or tensor.dtype not in CODES or tensor.is_meta:
        raise CheckpointError(
            f"checkpoint.save: expected a dense tensor of a plain dtype; {name} is {tensor.layout} {tensor.dtype} on {tensor.device}; "
            f"convert it before saving (DTensor: to_local or full_tensor)"
        )
    plain = tensor.detach().cpu().contiguous()
    whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
    # A tensor that still shares memory with the caller's may be referenced twice in the tree (tied weights): copy then, too.
    return plain if whole and plain.data_ptr() != tensor.data_ptr() else plain.clone()


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(tensor_bytes(tensor), digest_size=16).hexdigest()


# --- the file --------------------------------------------------------------------------------------------------------------


def _damaged(path: Any, what: str) -> CheckpointError:
    return CheckpointError(f"checkpoint.load: expected an intact checkpoint; {path}: {what}; nothing was loaded, use an older checkpoint")


def _read_header(path: Any, file: BinaryIO) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """The checked body and each tensor's absolute byte range. The safetensors reader would not say which tensor a truncated file lacks."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if len(head) < 8 or length > min(size - 8, _MAX_HEADER):
        raise _damaged(path, f"cut or damaged in its header ({size} bytes; the header says {length})")
    try:
        header = json.loads(file.read(length).decode())
        meta = header.pop("__metadata__")[_META_KEY]
        digest, text = meta[:32], meta[32:]
    except (UnicodeDecodeError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise _damaged(path, f"its header is not one of ours or is damaged ({type(error).__name__})") from error
    if not isinstance(text, str) or hashlib.blake2b(text.encode(), digest_size=16).hexdigest() != digest:
        raise _damaged(path, "the description of the tensors in its header does not match its hash")
    body: dict[str, Any] = json.loads(text)
    if body["version"] != VERSION:
        raise CheckpointError(f"checkpoint.load: expected format version {VERSION}; {path} has {body['version']}; use the release that wrote it")
    offsets, start, end = {}, 8 + length, 8 + length
    for name, (code, shape, _) in body["tensors"].items():
        nbytes = math.prod(shape) * DTYPES[code].itemsize
        entry = header.pop(name, None)
        span = entry.get("data_offsets") if isinstance(entry, dict) else None
        if span is None or entry != {"dtype": code, "shape": shape, "data_offsets": [span[0], span[0] + nbytes]}:
            raise _damaged(path, f"tensor {name} ({code} {shape}) is described as {entry} in the header")
        offsets[name] = (start + span[0], start + span[1])
        if offsets[name][1] > size:
            raise _damaged(path, f"the file ends inside or before tensor {name}: it needs bytes up to {offsets[name][1]}, the file has {size}")
        end = max(end, offsets[name][1])
    if header or end != size:
        raise _damaged(path, f"{size - end} bytes after the last tensor" if not header else f"unknown tensors {sorted(header)[:3]}")
    return body, offsets


def _read_tensor(path: Any, file: BinaryIO, name: str, entry: list[Any], span: tuple[int, int]) -> torch.Tensor:
    """Hash exactly the bytes that become the tensor (a memory map could change between the two)."""
    code, shape, expected = entry
    file.seek(span[0])
    data = bytearray(file.read(span[1] - span[0]))
    if len(data) != span[1] - span[0]:
        raise _damaged(path, f"tensor {name} is cut: {len(data)} of {span[1] - span[0]} bytes")
    if hashlib.blake2b(data, digest_size=16).hexdigest() != expected:
        raise _damaged(path, f"tensor {name} ({code} {shape}) does not match its hash")
    if not data:
        return torch.empty(shape, dtype=DTYPES[code], device="cpu")
    return torch.frombuffer(data, dtype=DTYPES[code]).reshape(shape)


# --- models, optimizers, random state --------------------------------------------------------------------------------------


def _named(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {"": value}


def _rng_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []}


def _check_model(path: Any, key: str, model: torch.nn.Module, saved: Any) -> None:
    label = f"model {key!r}" if key else "model"
    if saved is None:
        raise CheckpointError(f"checkpoint.load: expected {label} in {path}; it holds none; load without it")
    own = model.state_dict()
    for name in sorted(own.keys() | saved.keys()):
        if name not in saved or name not in own:
            side = "the file lacks it" if name not in saved else "the model lacks it"
            raise CheckpointError(
                f"checkpoint.load: expected equal tensors in {label} and {path}; {name}: {side}; build the model the file was saved from"
            )
        have, want = saved[name], own[name]
        if not isinstance(want, torch.Tensor) and not isinstance(have, torch.Tensor):
            continue  # a module's own extra state
        if type(have) is not torch.Tensor or not isinstance(want, torch.Tensor):
            got = f"{type(want).__name__}; {path} has {type(have).__name__}"
            raise CheckpointError(f"checkpoint.load: expected {name} of {label} as {got}; build the model the file was saved from")
        if have.shape != want.shape or have.dtype != want.dtype:
            raise CheckpointError(
                f"checkpoint.load: expected {name} of {label} as {want.dtype} {list(want.shape)}; {path} has "
                f"{have.dtype} {list(have.shape)}; build the model the file was saved from"
            )
    for name, module in model.named_modules():  # formats of packed weights, whose bytes look alike
        for fault in module._misfits(saved, f"{name}." if name else "") if isinstance(module, PackedWeight) else ():
            raise CheckpointError(f"checkpoint.load: {label}: {fault}; {path} is another model's")


def _check_optimizer(path: Any, key: str, optimizer: torch.optim.Optimizer, saved: Any) -> None:
    label = f"optimizer {key!r}" if key else "optimizer"
    rule = type(optimizer).__name__
    if saved is None or saved["rule"] != rule:
        found = "none" if saved is None else saved["rule"]
        raise CheckpointError(
            f"checkpoint.load: expected the state of {label}, a {rule}; {path} holds {found}; build the optimizer the file was saved from"
        )
    own = [len(group["params"]) for group in optimizer.param_groups]
    have = [len(group["params"]) for group in saved["state_dict"]["param_groups"]]
    if own != have:
        raise CheckpointError(f"checkpoint.load: expected {label} with parameter groups of {own} tensors; {path} has {have}; build the same groups")
    if isinstance(optimizer, FusedOptimizer) and not optimizer._optimizer_load_state_dict_pre_hooks:  # which would change the state twice
        read(optimizer, saved["state_dict"])


def _load_optimizer(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """``load_state_dict``, then undo its casts: torch's turns every float state but ``step`` into the parameter's dtype (NAdam's fp32
    mu_product). Ours keep dtypes themselves, and choose them where a state dict is written for others (AdaBelief's step)."""
    optimizer.load_state_dict(state_dict)
    if isinstance(optimizer, FusedOptimizer):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [i for group in state_dict["param_groups"] for i in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        for name, value in state_dict["state"].get(index, {}).items():
            loaded = optimizer.state[parameter].get(name)
            if isinstance(value, torch.Tensor) and isinstance(loaded, torch.Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][name] = value.to(loaded.device)

"""Which tensors of a checkpoint are the weights of linear layers. A file does not say: an embedding is a matrix, too."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .archive import Archive, Entry
from .report import Patterns

_FLOATS = ("F64", "F32", "F16", "BF16")
#: parts of names that stand for tables looked up by row, or for what reads the last hidden state
_NOT_LINEAR = re.compile(
    r"(^|[._])(embed\w*|\w*embeddings?|wte|wpe|emb|tokens?_emb\w*|pos\w*_emb\w*|shared|relative_attention_bias|\w*norm\d*|ln_\w+|router|codebooks?)(\.|$)"
)
_HEADS = ("lm_head", "embed_out", "cls.predictions.decoder", "lm_head.decoder")
#: architectures whose matrices are [inputs, outputs]
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass
class Linears:
    """What `choose` found.

    ``chosen``: tensors to quantize; ``names``: their modules' names in the model; ``left``: matrices that are not, and why; ``how``: what decided, in
    words. ``modules``: every module that a loader of 4-bit checkpoints would take for a 4-bit one; ``keep``: names that it leaves alone by itself.
    """

    how: str
    chosen: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """What a model's own code says of its modules, by module name: nn.Linear layers, those whose weight is tied, heads, transposed layers."""

    title: str
    prefix: str
    linear: frozenset[str]
    tied: frozenset[str]
    heads: frozenset[str]
    conv1d: frozenset[str]
    keep: tuple[str, ...]
    renamed: Callable[[str], str]

    def module_of(self, tensor: str) -> str:
        """The module that a tensor `...weight` belongs to. Files saved from the bare model lack its prefix, and the other way round."""
        name = self.renamed(tensor).removesuffix(".weight")
        known = self.linear | self.conv1d
        short = name.removeprefix(f"{self.prefix}.")
        return next((n for n in (name, f"{self.prefix}.{name}", short) if n in known), name)


def choose(archive: Archive, config: Mapping[str, Any], skip: Patterns, include: Patterns) -> Linears:
    """Picks the tensors: by `include` alone if it is given, else by the architecture as transformers builds it, else by names and shapes."""
    found, why = architecture(archive.folder, config)
    if include.patterns:
        picked = Linears("--include alone")
    elif found is not None:
        picked = Linears(f"the nn.Linear modules of {found.title}")
    else:
        picked = Linears(f"names and shapes ({why}); --include and --skip correct it")
    if found is not None:
        picked.modules, picked.keep = set(found.linear | found.conv1d), found.keep
    for name, entry in archive.entries.items():
        if name.endswith(".weight") and len(entry.shape) == 2 and entry.code in _FLOATS:
            reason = _why_not(name, entry, config, found, skip, include)
            if reason:
                picked.left[name] = reason
            else:
                picked.chosen.append(name)
                picked.names[name] = name.removesuffix(".weight") if found is None else found.module_of(name)
    if found is None:
        picked.modules = {name.removesuffix(".weight") for name in [*picked.chosen, *picked.left]}
    if not picked.chosen:
        examples = "; ".join(f"{name}: {reason}" for name, reason in list(picked.left.items())[:3]) or "it has no matrices named *.weight"
        got = f"found none by {picked.how} ({examples})"
        raise ValueError(f"quantize: expected weights of linear layers in {archive.path}; {got}; name them: --include")
    return picked


def _why_not(name: str, entry: Entry, config: Mapping[str, Any], found: Architecture | None, skip: Patterns, include: Patterns) -> str:
    module = found.module_of(name) if found is not None else name.removesuffix(".weight")
    matched = skip.match(module) or skip.match(name)
    if matched:
        return f"skip={matched!r}"
    if include.patterns:
        return "" if include.match(name.removesuffix(".weight")) or include.match(name) else "not in --include"
    if not min(entry.shape):
        return "empty"
    if found is not None:
        return _by_architecture(module, found)
    return _by_name(name, entry, config)


def _by_architecture(module: str, found: Architecture) -> str:
    if module in found.conv1d:
        return "a Conv1D, stored transposed"
    if module not in found.linear:
        return f"not an nn.Linear of {found.title.split(' ')[0]}"
    if module in found.tied:
        return "its weight is tied to another module's"
    if module in found.heads:
        return "output embeddings"
    if module_matches(found.keep, module):
        return f"{found.title.split(' ')[0]} keeps it in fp32"
    return ""


def _by_name(name: str, entry: Entry, config: Mapping[str, Any]) -> str:
    stem = name.removesuffix(".weight")
    if config.get("model_type") in _CONV1D:
        return f"{config['model_type']} stores it transposed"
    if _NOT_LINEAR.search(stem):
        return "its name is an embedding's or a norm's"
    if stem in _HEADS or any(stem.endswith(f".{head}") for head in _HEADS):
        return "output embeddings"
    if entry.shape[0] in (config.get("vocab_size"), config.get("max_position_embeddings")):
        return f"its {entry.shape[0]} rows are as many as the vocabulary or the positions"
    return ""


def _installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def architecture(folder: Path | None, config: Mapping[str, Any]) -> tuple[Architecture | None, str]:
    """The model as transformers builds it from config.json, without memory for weights; or None, and why not. No code of the model is run."""
    if folder is None or not config:
        return None, "no config.json"
    if config.get("auto_map"):
        return None, "the model brings code of its own, which is not run"
    if not _installed():
        return None, "transformers is not installed"
    import torch
    import transformers
    from huggingface_hub import errors

    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else names
    kind = transformers.AutoModel if not names else getattr(transformers, name, None) if isinstance(name, str) else None
    if kind is None:
        return None, f"transformers {transformers.__version__} has no {name}"
    invalid: Any = getattr(errors, "StrictDataclassError", ValueError)  # a field of another type; newer than 2024
    try:
        settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            build: Any = kind.from_config if kind is transformers.AutoModel else kind
            model = build(settings)
    except (
        ValueError, LookupError, ArithmeticError, AssertionError, OSError, ImportError, AttributeError, TypeError, RuntimeError, invalid,
    ) as error:  # fmt: skip
        return None, f"transformers {transformers.__version__} cannot build it: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return _described(model, transformers.__version__), ""


def _described(model: Any, version: str) -> Architecture:
    from torch import nn

    owners: dict[int, list[str]] = {}
    linear, conv1d = set(), set()
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "_parameters", {}).get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
        if type(module) is nn.Linear:
            linear.add(name)
        elif type(module).__name__ == "Conv1D":
            conv1d.add(name)
    shared = {name for names in owners.values() if len(names) > 1 for name in names}
    # On the meta device some versions do not tie: what is declared counts as well.
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    shared |= {key.removesuffix(".weight") for pair in dict(declared).items() for key in pair if isinstance(key, str)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = {name for name, module in model.named_modules() if module is head}
    keep = kept_in_fp32(model)
    title = f"{type(model).__name__} (transformers {version})"
    prefix = getattr(model, "base_model_prefix", "") or "model"
    return Architecture(title, prefix, frozenset(linear), frozenset(shared), frozenset(heads), frozenset(conv1d), keep, renamer(model))


def kept_in_fp32(model: Any) -> tuple[str, ...]:
    """Modules that a model of transformers wants in fp32; some convert their input to the dtype of this weight."""
    return tuple(sorted(getattr(model, "_keep_in_fp32_modules", None) or ()))


def renamer(model: Any) -> Callable[[str], str]:
    """What a tensor of a file is called in the model: transformers renames some when it loads them. Those that it joins or cuts keep their name."""
    if not hasattr(model, "base_model_prefix"):
        return lambda name: name
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:  # transformers before 5 has other ways, for few models
        return lambda name: name
    steps: list[Any] = get_model_conversion_mapping(model)
    joins = [step for step in steps if isinstance(step, WeightConverter)]
    names = [step for step in steps if not isinstance(step, WeightConverter)]

    def renamed(name: str) -> str:
        found, joined = rename_source_key(name, names, joins)
        return name if joined else found

    return renamed


def read_config(folder: Path | None) -> dict[str, Any]:
    """config.json of a folder; {} if there is none. ValueError if it is no JSON object."""
    path = None if folder is None else folder / "config.json"
    if path is None or not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"checkpoint: expected JSON in {path}; got {error}; mend the file") from error
    if not isinstance(config, dict):
        raise ValueError(f"checkpoint: expected a JSON object in {path}; got {type(config).__name__}; mend the file")
    return config


def module_matches(keys: Iterable[str], name: str) -> bool:
    """Whether transformers, given these names of modules to leave alone, leaves this one alone: by its end, or by a regular expression that matches
    its beginning up to a dot."""
    for key in keys:
        if name.endswith(key):
            return True
        try:
            at = re.match(key, name)
        except re.error:
            continue
        if at and re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name):
            return True
    return False


def skip_list(modules: Iterable[str], quantized: set[str]) -> list[str]:
    """Names under which transformers leaves every other module alone and none of the quantized ones. A name that would catch one of these as well is
    written as an anchored expression."""
    found = []
    for name in sorted(set(modules) - quantized):
        clash = any(module_matches([name], other) for other in quantized)
        found.append(f"^{re.escape(name)}$" if clash else name)
    return found

"""`--adapter`: low-rank adapters on every linear of the encoder's layers, what they cost, and what becomes of them at the end.

lora, rslora, dora, adalora, vera, ssf    query, key, value and output of the attention, both layers of the feed-forward part
ia3                                       key, value, and the input of the second feed-forward layer, as in its paper (arXiv 2205.05638)
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_safetensors, write_text
from ..lowrank import LoRALinear, RankAllocator, VeraProjection, orthogonal_penalty
from ..lowrank.methods import METHODS
from .errors import FinetuneError
from .model import PIN, Encoder

#: what a user may name -> how much faster than the whole model it learns (multiplies the optimizer's fine-tuning rate)
ADAPTERS = {"lora": 20.0, "rslora": 10.0, "dora": 20.0, "adalora": 40.0, "vera": 100.0, "ia3": 100.0, "ssf": 20.0}
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")
IN_PEFT = ("lora", "rslora", "dora")  # what --compare peft can set beside ours: same parameters, same start
TARGETS = r"encoder\.layer\.\d+\..*(query|key|value|dense)"
FILES = ("adapter_model.safetensors", "adapter_config.json")  # what `Adapter.save` writes, of SSF without the second
PENALTY = 0.1  # of AdaLoRA's orthogonality, the official code's


@dataclass(frozen=True)
class Options:
    """As typed. ``rank``: AdaLoRA's before pruning; half of it stays."""

    method: str
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.05
    init: str | None = None


def _places(encoder: Encoder, method: str) -> Iterator[tuple[str, str]]:
    """(name of a linear, method on it)."""
    for name, module in encoder.named_modules():
        if not isinstance(module, nn.Linear) or not name.startswith("encoder.layer."):
            continue
        if method != "ia3":
            yield name, method
        elif name.endswith(("self.key", "self.value")):
            yield name, "ia3"
        elif name.endswith("output.dense") and "attention" not in name:
            yield name, "ia3_ff"


class Adapter:
    """The adapter of one encoder during a run; ``encoder`` is changed in place, all but the adapter frozen."""

    def __init__(self, encoder: Encoder, options: Options, steps: int, seed: int) -> None:
        self.model, self.options = encoder, options
        encoder.requires_grad_(False)
        more: dict[str, Any] = {"init": options.init} if options.init else {}
        if options.method == "vera":
            wide = max(encoder.config.hidden_size, encoder.config.intermediate_size)
            self.projection = VeraProjection(options.rank, wide, wide, key=seed).to(encoder.embeddings.word_embeddings.weight.device)
            more["projection"] = self.projection
        places = dict(_places(encoder, options.method))
        most = min(encoder.config.hidden_size, encoder.config.intermediate_size)
        if options.init in ("pissa", "olora") and options.rank > most:
            fix = "lower it or choose another --init"
            raise FinetuneError(f"finetune: expected --rank of at most {most} with --init {options.init}; got {options.rank}; {fix}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # two lanes start from the same adapter
            for name, method in places.items():
                parent, _, child = name.rpartition(".")
                linear = encoder.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                layer = LoRALinear.from_linear(linear, options.rank, options.alpha, lora_dropout=options.dropout, method=method, **more)
                setattr(encoder.get_submodule(parent), child, layer)
        self.layers = {name: module for name, module in encoder.named_modules() if isinstance(module, LoRALinear)}
        self.allocator: RankAllocator | None = None
        if options.method == "adalora":
            target = max(1, options.rank // 2)
            self.allocator = RankAllocator(encoder, steps, target_r=target, tinit=steps // 10, tfinal=steps // 3)

    def penalty(self) -> Tensor | None:
        """What the method adds to the loss."""
        return PENALTY * orthogonal_penalty(self.model) if self.allocator is not None else None

    def stepped(self, index: int) -> None:
        """After step ``index`` (from 0) of the optimizer, gradients still there."""
        if self.allocator is not None:
            self.allocator.step(index + 1)

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint needs beyond the model's own."""
        return None if self.allocator is None else self.allocator.state_dict()

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Takes over `state`'s."""
        if self.allocator is not None and state is not None:
            self.allocator.load_state_dict(state)

    def merge(self) -> dict[str, float]:
        """Puts the adapters into the weights; layer name -> share of the change that the weight's dtype kept.

        Packed layers become dense ones (and are not in the result): quantizing anew would lose most of a small change.
        """
        packed = [name for name, layer in self.layers.items() if layer.format is not None]
        for name in packed:
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, self.layers[name].to_linear())
        return {name: layer.merge(name=name).retained for name, layer in self.layers.items() if name not in packed}

    def save(self, folder: Path) -> list[Path]:
        """adapter_model.safetensors under PEFT's names, and the adapter_config.json that `PeftModel.from_pretrained` reads (not for SSF, which PEFT
        lacks). Before `merge`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, layer in self.layers.items():
            for part in METHODS[layer.method].parts:
                peft_name = {"lora_magnitude": "lora_magnitude_vector"}.get(part.name, part.name)
                weight = ".weight" if part.name in ("lora_A", "lora_B") and layer.method != "adalora" else ""
                tensors[f"base_model.model.{name}.{peft_name}{weight}"] = getattr(layer, part.name).detach().cpu().contiguous().clone()
        if self.options.method == "vera":
            tensors |= {f"base_model.vera_{part}": getattr(self.projection, part).cpu() for part in "AB"}
        paths = [folder / FILES[0]]
        write_safetensors(paths[0], tensors, {"format": "pt"})
        if (config := self._peft_config()) is not None:
            paths.append(folder / FILES[1])
            write_text(paths[1], json.dumps(config, indent=1) + "\n")
        return paths

    def _peft_config(self) -> dict[str, Any] | None:
        o = self.options
        shared = {"base_model_name_or_path": PIN, "bias": "none", "inference_mode": True, "target_modules": TARGETS}
        lora = {"r": o.rank, "lora_alpha": o.alpha, "lora_dropout": o.dropout}
        if o.method == "adalora":
            assert self.allocator is not None
            target = self.allocator.target_budget // len(self.layers)
            del lora["r"]  # PEFT warns of it
            return shared | lora | {"peft_type": "ADALORA", "init_r": o.rank, "target_r": target, "total_step": self.allocator.total_step}
        if o.method in IN_PEFT:
            return shared | lora | {"peft_type": "LORA", "use_rslora": o.method == "rslora", "use_dora": o.method == "dora"}
        if o.method == "vera":
            return shared | {"peft_type": "VERA", "r": o.rank, "vera_dropout": o.dropout, "save_projection": True}
        if o.method == "ia3":
            feedforward = r"encoder\.layer\.\d+\.output\.dense"
            targets = rf"encoder\.layer\.\d+\.attention\.self\.(key|value)|{feedforward}"
            del shared["bias"]
            return shared | {"peft_type": "IA3", "target_modules": targets, "feedforward_modules": feedforward}
        return None


class PeftAdapter:
    """PEFT's own layers on the same encoder with the same start, for `--compare peft`. Raises FinetuneError where PEFT is not installed."""

    allocator = None

    def __init__(self, encoder: Encoder, ours: Adapter) -> None:
        if importlib.util.find_spec("peft") is None:
            raise FinetuneError("finetune: expected PEFT for --compare peft; it is not installed; run: pip install peft")
        peft: Any = importlib.import_module("peft")
        o = ours.options
        config = peft.LoraConfig(
            r=o.rank, lora_alpha=o.alpha, lora_dropout=o.dropout, target_modules=TARGETS, use_rslora=o.method == "rslora", use_dora=o.method == "dora"
        )
        encoder.requires_grad_(False)
        peft.get_peft_model(encoder, config)  # changes the encoder itself; its wrapper is not needed
        self.layers: dict[str, Any] = {name: encoder.get_submodule(name) for name in ours.layers}
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.lora_A["default"].weight.copy_(ours.layers[name].lora_A)
                layer.lora_B["default"].weight.copy_(ours.layers[name].lora_B)
                layer.get_base_layer().weight.copy_(ours.layers[name].weight)  # some initialisations change it
                if o.method == "dora":
                    layer.lora_magnitude_vector["default"].weight.copy_(ours.layers[name].lora_magnitude)

    def penalty(self) -> None:
        """None: its methods add nothing to the loss."""

    def stepped(self, index: int) -> None:
        """Nothing to do."""

    def state(self) -> None:
        """None: all is in the model."""

    def load_state(self, state: Any) -> None:
        """Nothing to do."""

    def merge(self) -> dict[str, float]:
        """PEFT's merge, which reports no loss."""
        for layer in self.layers.values():
            layer.merge()
        return {}


AnyAdapter = Adapter | PeftAdapter


def learning_rate(lr: float, method: str) -> float:
    """The default of an adapter, from that of the whole model."""
    return lr * ADAPTERS[method]


def plain_weights(encoder: Encoder) -> dict[str, Tensor]:
    """A merged encoder's weights under their plain names, on the CPU."""
    with torch.device("meta"):
        wanted = Encoder(encoder.config).state_dict().keys()
    found = {name.replace(".base_layer.", "."): t for name, t in encoder.state_dict().items()}
    return {name: found[name].detach().cpu().clone() for name in wanted}

"""Small models on disk, written by the tests: a Llama as transformers names it, in one file or in shards."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HIDDEN, WIDE, VOCAB, LAYERS = 64, 96, 120, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
LINEARS = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in SHAPES]


def state(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """The state dict, seeded."""
    g = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=g)}
    for i in range(LAYERS):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{i}.{name}.weight"] = torch.randn(shape, generator=g) * 0.1
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(HIDDEN)
    tensors |= {"model.norm.weight": torch.ones(HIDDEN), "lm_head.weight": torch.randn(VOCAB, HIDDEN, generator=g)}
    return {name: t.to(dtype) for name, t in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor], shards: int = 1, config: dict | None = None) -> Path:
    """A folder with config, a tokenizer's file and the weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, mapping = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        mapping |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    return folder


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, (n, k) in SHAPES.items():
            parent, leaf = name.split(".")
            getattr(self, parent).register_module(leaf, nn.Linear(k, n, bias=False))
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(HIDDEN) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        a, m, y = self.self_attn, self.mlp, self.input_layernorm(x)
        x = x + a.o_proj(a.q_proj(y).tanh() * a.k_proj(y) + a.v_proj(y))
        y = self.post_attention_layernorm(x)
        return x + m.down_proj(m.gate_proj(y).sigmoid() * m.up_proj(y))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN)


class Causal(nn.Module):
    """The names of a Llama around a simpler body: what is tested is files, not attention."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))

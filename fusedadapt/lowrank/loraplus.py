"""LoRA+ (arXiv 2402.12354): B learns faster than A."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def loraplus_groups(model: nn.Module, lr: float, ratio: float, *, weight_decay: float = 0.0, lr_embedding: float = 1e-6) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer: A at ``lr``, B and all 1-D parameters at ``ratio`` * ``lr``, adapters of embeddings at ``lr_embedding``.

    Trainable parameters only, of this package's layers or PEFT's, by name. Biases and parameters of norm layers at B's rate have no decay. Groups
    without parameters are left out. Pass the result as the optimizer's ``params``.

    Raises:
        ValueError: ``ratio`` or ``lr`` not positive, or nothing to train.
    """
    if not ratio > 0 or not lr > 0:
        raise ValueError(f"loraplus_groups: expected lr > 0 and ratio > 0; got {lr} and {ratio}; ratios of 2 to 32 are usual")
    norms = (nn.LayerNorm, nn.RMSNorm)
    in_norm = {f"{prefix}.{name}" for prefix, part in model.named_modules() if isinstance(part, norms) for name, _ in part.named_parameters()}
    slow: list[Tensor] = []
    embedding: list[Tensor] = []
    fast: list[Tensor] = []
    fast_bare: list[Tensor] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if "lora_embedding_" in name:
            embedding.append(p)
        elif "lora_B" in name or p.ndim == 1:
            (fast_bare if "bias" in name or name in in_norm else fast).append(p)
        else:
            slow.append(p)
    rows = ((slow, lr, weight_decay), (embedding, lr_embedding, weight_decay), (fast, lr * ratio, weight_decay), (fast_bare, lr * ratio, 0.0))
    groups = [{"params": params, "lr": rate, "weight_decay": decay} for params, rate, decay in rows if params]
    if not groups:
        raise ValueError("loraplus_groups: expected trainable parameters; got none; adapt the model first")
    return groups

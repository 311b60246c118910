"""Texts to padded id batches: the pretrained tokenizer, or a hash of words for the tiny model."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # ids (B, T) int64 and mask (B, T) bool, True = real token


class Tokens(Protocol):
    """Texts -> lists of ids, each at most ``limit`` long and at least one."""

    def __call__(self, texts: list[str], limit: int) -> list[list[int]]: ...


class Pretrained:
    """The model's own WordPiece (tokenizer.json), [CLS] … [SEP] included in ``limit``."""

    def __init__(self, folder: Path):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()

    def __call__(self, texts: list[str], limit: int) -> list[list[int]]:
        self.tokenizer.enable_truncation(limit)
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]


class Hashed:
    """Words to ids by CRC-32: no file, no training, the same everywhere. Id 0 is padding, 1 starts every text."""

    def __init__(self, vocab_size: int):
        self.buckets = vocab_size - 2

    def __call__(self, texts: list[str], limit: int) -> list[list[int]]:
        words = (re.findall(r"[a-z]+|[0-9]+|[^\w\s]", text.lower().replace("_", " "))[: limit - 1] for text in texts)
        return [[1, *(2 + zlib.crc32(word.encode()) % self.buckets for word in line)] for line in words]


def pad(rows: list[list[int]], device: torch.device) -> Batch:
    """Right-pad to the longest row. The padding id is 0 and is masked out."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids.to(device), (torch.arange(width) < lengths[:, None]).to(device)

"""The loss that trains and the numbers that judge a retrieval model. All take unit embeddings; row i of one side belongs to row i of the
other."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.05
GROUP = 24  # candidates per query in the held-out loss: the training batch's default, so that the two compare


@dataclass(frozen=True)
class Quality:
    """Over N queries against N candidates: mean of 1/rank, the share ranked first, and the InfoNCE loss among groups of GROUP."""

    mrr: float
    recall_at_1: float
    loss: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def logits(queries: Tensor, candidates: Tensor) -> Tensor:
    """Cosine similarity over the temperature: (B, d) and (N, d) fp32 -> (B, N) fp32."""
    return queries @ candidates.T / TEMPERATURE


def info_nce(queries: Tensor, candidates: Tensor) -> Tensor:
    """In-batch contrastive loss, scalar fp32: cross-entropy of each query over all candidates of the batch (van den Oord et al. 2018, arXiv
    1807.03748)."""
    scores = logits(queries, candidates)
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def ranks(queries: Tensor, candidates: Tensor) -> Tensor:
    """Rank (from 1) of the right candidate of each query, int64 (N,). Ties count against us, so a collapsed encoder scores 1/N and not
    1."""
    scores = queries @ candidates.T
    return (scores >= scores.diagonal()[:, None]).sum(1)


def quality(queries: Tensor, candidates: Tensor) -> Quality:
    rank = ranks(queries, candidates)
    groups = zip(queries.split(GROUP), candidates.split(GROUP), strict=True)
    loss = sum(info_nce(q, c).item() * len(q) for q, c in groups) / len(queries)
    return Quality(mrr=rank.double().reciprocal().mean().item(), recall_at_1=(rank == 1).double().mean().item(), loss=loss)

"""One model with one optimizer and its measurements. ``--compare`` runs two lanes over the same batches."""

from __future__ import annotations

import contextlib
import inspect
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..quant.layer import PackedWeight
from ..sparse import Mask
from ..testing.saved import SavedBytes
from .adapters import Adapter, AnyAdapter, plain_weights
from .data import Pair
from .errors import FinetuneError
from .metrics import Quality, info_nce, logits, quality
from .model import Encoder
from .optimizers import Rule
from .tokens import Tokens, pad

TEXT_TOKENS, CODE_TOKENS = 64, 128
# Rows are embedded in chunks of near-equal length: chunks of 12 cut the padding of a batch of 24 (forward and backward 2.20 -> 1.67 s
# on 2 cores of an EPYC).
CHUNK = 12


@dataclass
class History:
    """Per step: loss, seconds of forward and backward, seconds of the optimizer."""

    loss: list[float] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, list[float]]:
        return asdict(self)


class Lane:
    """Trains ``model`` with ``rule`` on pairs; every step is a pure function of the weights, the optimizer's state, the batch and (seed,
    step)."""

    def __init__(
        self, model: Encoder, rule: Rule, tokens: Tokens, seed: int, adapter: AnyAdapter | None = None, masks: dict[str, Mask] | None = None
    ):
        self.model, self.rule, self.tokens, self.seed, self.adapter, self.masks = model, rule, tokens, seed, adapter, masks
        self.device = model.embeddings.word_embeddings.weight.device
        self.optimizer: Any = rule.build(model)
        self.base_lr = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.history = History()
        self.step_arguments = {"bs"} & inspect.signature(self.optimizer.step).parameters.keys()
        self._mode("train")

    def step(self, pairs: list[Pair], index: int, factor: float) -> None:
        """Step ``index`` (from 0) at ``factor`` times the base learning rate."""
        for group, lr in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * factor
        if self.adapter is not None:
            torch.manual_seed(self._seed_of(index))  # the dropout masks: a function of (seed, step), also after a resume
        start = self._now()
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH) if self.rule.recipe.create_graph else contextlib.nullcontext():
            queries, candidates = (self.embed([getattr(pair, side) for pair in pairs], side) for side in ("text", "code"))
            loss = info_nce(queries, candidates)
        penalty = None if self.adapter is None else self.adapter.penalty()
        extra = self._update_hessian(queries, candidates, index)
        with warnings.catch_warnings():
            # The cycle of parameter and gradient that torch warns of ends with zero_grad below.
            warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
            (loss if penalty is None else loss + penalty).backward(create_graph=self.rule.recipe.create_graph)
        middle = self._now()
        if self.rule.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.rule.clip)
        self.optimizer.step(**dict.fromkeys(self.step_arguments, len(pairs)))
        end = self._now()
        if self.adapter is not None:
            self.adapter.stepped(index)
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if not math.isfinite(value):
            raise FinetuneError(f"finetune: expected a finite loss; {self.rule.label} got {value} at step {index + 1}; lower --lr ({self.rule.lr:g})")
        self.history.loss.append(value)
        self.history.compute_s.append(middle - start - extra)
        self.history.optimizer_s.append(end - middle + extra)

    def _update_hessian(self, queries: Tensor, candidates: Tensor, index: int) -> float:
        """Sophia's Gauss-Newton-Bartlett estimate: a backward pass from labels drawn from the model itself. Returns the update's own
        seconds."""
        if not hasattr(self.optimizer, "update_hessian") or index % self.rule.recipe.hessian_every:
            return 0.0
        scores = logits(queries, candidates)
        generator = torch.Generator().manual_seed(self._seed_of(index))
        labels = torch.multinomial(scores.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1).to(self.device)
        F.cross_entropy(scores, labels).backward(retain_graph=True)
        start = self._now()
        self.optimizer.update_hessian()
        seconds = self._now() - start
        self.optimizer.zero_grad(set_to_none=True)
        return seconds

    def _seed_of(self, index: int) -> int:
        return (self.seed * 1_000_003 + index) % 2**63  # what a generator takes

    def kept_for_backward(self, pairs: list[Pair]) -> int:
        """Bytes that autograd keeps between the forward and the backward pass of this batch, weights not counted."""
        return kept_for_backward(self.model, self.tokens, pairs)

    def parameters(self) -> tuple[int, int]:
        """(trained, all)."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        packed = [m for m in self.model.modules() if isinstance(m, PackedWeight) and m.format is not None]
        hidden = sum(m.in_features * m.out_features - m.weight.numel() for m in packed)
        return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes) + hidden

    def save_adapter(self, folder: Path) -> None:
        """The adapter alone, for use; see `Adapter.save`."""
        assert isinstance(self.adapter, Adapter)
        with self._for_use():
            self.adapter.save(folder)

    def merge(self) -> dict[str, float]:
        """Puts the adapter into the weights, for good; layer name -> share of the change that was kept (PEFT's reports none)."""
        assert self.adapter is not None
        self._mode("eval")
        return self.adapter.merge()

    def embed(self, texts: list[str], side: str) -> Tensor:
        """Unit embeddings (N, d) fp32 in the order of ``texts``; ``side`` is "text" or "code" and sets the token limit."""
        return embed(self.model, self.tokens, texts, side)

    def evaluate(self, pairs: list[Pair]) -> Quality:
        """Quality over ``pairs``; weights and optimizer are afterwards what they were, to the bit."""
        with self._for_use():
            return self.judge(self.model, pairs)

    def judge(self, model: Encoder, pairs: list[Pair]) -> Quality:
        """Quality of another model over ``pairs``."""
        training = model.training
        model.eval()
        with torch.inference_mode():
            found = quality(*(embed(model, self.tokens, [getattr(pair, side) for pair in pairs], side) for side in ("text", "code")))
        model.train(training)
        return found

    def final_weights(self) -> dict[str, Tensor]:
        """Weights for use, on the CPU."""
        with self._for_use():
            if self.adapter is not None:
                return plain_weights(self.model)
            return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    @contextlib.contextmanager
    def _for_use(self) -> Iterator[None]:
        """Without dropout. Schedule-Free trains at one point and is used at another; the way back is rounded, hence the copy."""
        self.model.eval()
        if not hasattr(self.optimizer, "eval"):
            try:
                yield
            finally:
                self.model.train()
            return
        kept = [parameter.detach().clone() for parameter in self.model.parameters()]
        self._mode("eval")
        try:
            yield
        finally:
            self._mode("train")
            self.model.train()
            with torch.no_grad():
                for parameter, value in zip(self.model.parameters(), kept, strict=True):
                    parameter.copy_(value)

    def _mode(self, mode: str) -> None:
        if hasattr(self.optimizer, mode):
            getattr(self.optimizer, mode)()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def kept_for_backward(model: Encoder, tokens: Tokens, pairs: list[Pair]) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of this batch, weights not counted."""
    with torch.random.fork_rng(), SavedBytes([*model.parameters(), *model.buffers()]) as saved:
        parts = [embed(model, tokens, [getattr(pair, side) for pair in pairs], side) for side in ("text", "code")]
    del parts
    return saved.total


def embed(model: Encoder, tokens: Tokens, texts: list[str], side: str) -> Tensor:
    """Unit embeddings (N, d) fp32 in the order of ``texts``; ``side`` is "text" or "code" and sets the token limit."""
    device = model.embeddings.word_embeddings.weight.device
    rows = tokens(texts, TEXT_TOKENS if side == "text" else CODE_TOKENS)
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    parts = [model(*pad([rows[i] for i in order[at : at + CHUNK]], device)) for at in range(0, len(order), CHUNK)]
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=device)
    return torch.cat(parts)[back]


def gradients(model: Encoder, tokens: Tokens, pairs: list[Pair]) -> None:
    """Leaves the gradients of one batch's loss in the model's parameters."""
    info_nce(*(embed(model, tokens, [getattr(pair, side) for pair in pairs], side) for side in ("text", "code"))).backward()

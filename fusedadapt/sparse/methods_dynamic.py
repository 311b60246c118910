"""Dynamic sparse training: RigL and SET. The exchange of weights is `grow_prune`; here is when, how much and by which rule."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from .methods_random import seed_of


def cosine_fraction(step: int, *, until: int, fraction: float = 0.3) -> float:
    """Share of the active weights to exchange: fraction / 2 * (1 + cos(pi * step / until)), 0 from `until` on (arXiv 1911.11134).

    Raises:
        ValueError: a fraction outside [0, 1], until < 1.
    """
    if not 0.0 <= fraction <= 1.0 or until < 1:
        raise ValueError(f"cosine_fraction: expected a fraction in [0, 1], until >= 1; got {fraction} and {until}")
    return 0.0 if step >= until else fraction / 2.0 * (1.0 + math.cos(math.pi * step / until))


class _DynamicSparseTraining:
    """Shared by `RigL` and `SET`."""

    _grow: ClassVar[str]
    _instead: ClassVar[bool]  # whether an exchange takes the place of the optimizer's step

    def __init__(
        self,
        optimizer: Any,
        params: Iterable[Tensor],
        *,
        until: int,
        every: int = 100,
        fraction: float = 0.3,
        anneal: str = "cosine",
        seed: int = 0,
    ) -> None:
        name = type(self).__name__
        cosine_fraction(0, until=until, fraction=fraction)
        if every < 1 or anneal not in ("cosine", "constant"):
            raise ValueError(f"{name}: expected every >= 1, anneal cosine or constant; got {every} and {anneal!r}")
        self.optimizer, self.params = optimizer, list(params)
        if not self.params:
            raise ValueError(f"{name}: expected parameters; got none; pass those the optimizer has masks for")
        self.until, self.every, self.fraction, self.anneal, self.seed = until, every, fraction, anneal, seed
        self.steps = 0

    @property
    def current_fraction(self) -> float:
        """The share an exchange at this step would drop and grow."""
        if self.anneal == "constant":
            return self.fraction if self.steps < self.until else 0.0
        return cosine_fraction(self.steps, until=self.until, fraction=self.fraction)

    def step(self) -> bool:
        """Call it in place of ``optimizer.step()``. Returns whether weights were exchanged: after every `every` steps, before `until`.

        Raises:
            RuntimeError: a parameter without a gradient where growth needs one; nothing was exchanged.
        """
        self.steps += 1
        due = self.steps % self.every == 0 and self.steps < self.until
        if not due or not self._instead:
            self.optimizer.step()
        if due:
            self.exchange()
        return due

    def exchange(self) -> None:
        """Drops the smallest active weights and grows as many others, now."""
        if self._grow == "gradient" and any(p.grad is None for p in self.params):
            raise RuntimeError(f"{type(self).__name__}.step: expected a gradient for every sparse parameter; some have none; run backward first")
        grow_prune = importlib.import_module(".grow", __package__).grow_prune
        for i, p in enumerate(self.params):
            seed = seed_of("exchange", self.seed, self.steps, i)
            grow_prune(self.optimizer, p, fraction=self.current_fraction, score="magnitude", grow=self._grow, seed=seed)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands; masks are in the optimizer's state."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])


class RigL(_DynamicSparseTraining):
    """RigL (arXiv 1911.11134): every `every` steps the smallest active weights go, and the inactive ones with the largest dense gradient come, at 0.

    Example::

        masks = sparse_init_(model, 0.1, method="erk")
        optimizer = fa.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, masks=masks)
        rigl = RigL(optimizer, masks, until=int(0.75 * total_steps))
        loss.backward(); rigl.step(); optimizer.zero_grad()

    As published, an exchange takes the place of that step's update. Gradients must be dense (of the whole weight); under data parallelism they must
    be averaged first, so that all processes choose alike. The published code breaks ties with noise of 1e-5; here the lower index wins. A weight that
    is dropped and grown in the same exchange keeps value and momentum there; here it starts at 0 as all that grow.

    Args:
        optimizer: one of ours with masks for `params`. until: the last exchange comes before this step. fraction: the share exchanged at first.
        anneal: "cosine" or "constant".
    """

    _grow, _instead = "gradient", True


class SET(_DynamicSparseTraining):
    """Sparse evolutionary training (arXiv 1707.04780): as `RigL`, but grows at random places, after the optimizer's own step; no gradient is needed
    there. The paper exchanges a constant share (0.3) once an epoch, hence anneal "constant"; it drops the smallest magnitudes of each sign, here of
    both together, as in RigL's study."""

    _grow, _instead = "random", False

    def __init__(self, optimizer: Any, params: Iterable[Tensor], *, anneal: str = "constant", **options: Any) -> None:
        super().__init__(optimizer, params, anneal=anneal, **options)

"""The cases to run and what came of them, without printing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..testing import Case, Finding, Ours, Subject, compare_case, fuzz_cases
from .libs import Foreign

# one interpreted or emulated step costs hundreds of compiled ones
SLOW = {"triton": 8, "emulated": 2}
#: what a subject may raise on a case it does not take
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError, KeyError, AttributeError, IndexError, AssertionError)


@dataclass
class Row:
    """Everything seen of one subject, optimizer and parameter dtype (``dtype``), split by the kind of gradient (``kind``)."""

    subject: str
    optimizer: str
    dtype: str
    kind: str
    elements: int = 0
    ulp: float = 0.0
    update: float = 0.0
    state_ulp: float = 0.0
    excused: int = 0
    mismatches: int = 0
    first: str = ""
    repro: str = ""

    def add(self, case: Case, finding: Finding) -> None:
        parameter = finding.quantity in ("p", "master")
        self.elements += finding.elements if parameter else 0
        self.excused += finding.excused if parameter else 0
        self.mismatches += finding.mismatches
        if parameter:
            self.ulp, self.update = max(self.ulp, finding.ulp), max(self.update, finding.update)
        else:
            self.state_ulp = max(self.state_ulp, finding.ulp)
        if finding.mismatches and not self.first:
            self.first = f"tensor {finding.tensor}, step {finding.step + 1}: {finding.first}"
            self.repro = case.repro


@dataclass
class Report:
    """Rows by (subject, optimizer, dtype, kind), and the cases a subject did not take, as (subject, repro, error)."""

    rows: dict[tuple[str, str, str, str], Row] = field(default_factory=dict)
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    cases: int = 0

    def record(self, subject: str, case: Case, findings: Sequence[Finding]) -> None:
        for f in findings:
            spec = case.tensors[f.tensor]
            dtype = next(g.dtype for g in findings if g.tensor == f.tensor and g.quantity in ("p", "p (no step)"))
            key = (subject, case.optimizer, dtype + " master" * (f.quantity == "master"), spec.kind)
            self.rows.setdefault(key, Row(*key)).add(case, f)

    @property
    def clean(self) -> bool:
        return not self.refused and not any(r.mismatches for r in self.rows.values())

    def merged(self) -> list[Row]:
        """Rows over all kinds of gradients, ``kind`` naming the one with the largest error."""
        out: dict[tuple[str, str, str], Row] = {}
        worst: dict[tuple[str, str, str], float] = {}
        for row in self.rows.values():
            key = (row.subject, row.optimizer, row.dtype)
            total = out.setdefault(key, Row(*key, row.kind))
            if row.ulp > worst.get(key, -1.0):
                worst[key], total.kind = row.ulp, row.kind
            for name in ("ulp", "update", "state_ulp"):
                setattr(total, name, max(getattr(total, name), getattr(row, name)))
            for name in ("elements", "excused", "mismatches"):
                setattr(total, name, getattr(total, name) + getattr(row, name))
            if row.first and not total.first:
                total.first, total.repro = row.first, row.repro
        return list(out.values())

    def as_json(self) -> dict[str, Any]:
        # infinity is no JSON number
        rows = [{k: repr(v) if v == float("inf") else v for k, v in asdict(r).items()} for r in self.rows.values()]
        refused = [dict(zip(("subject", "repro", "error"), r)) for r in self.refused]
        return {"clean": self.clean, "cases": self.cases, "rows": rows, "refused": refused}


def work(subject: Subject, optimizers: Sequence[str], seed: int, cases: int) -> Iterator[Case]:
    """The subject's share: every case of ours, every n-th on a slow backend; another library gets the part of a case that it can express, in
    float64 too, where an error shows another equation rather than another rounding."""
    if isinstance(subject, Foreign):
        for name in optimizers:
            if name in subject.optimizers:
                for case in fuzz_cases(seed, cases, name):
                    yield subject.adapt(case.plain(torch.float64 if case.seed % 4 == 0 else None))
        return
    count = max(1, cases // SLOW.get(subject.name, 1))
    for name in optimizers:
        yield from fuzz_cases(seed, count, name)


def run(subjects: Sequence[Subject], optimizers: Sequence[str], *, seed: int = 0, cases: int = 20, device: str = "cpu",
        progress: Callable[[str], None] = lambda text: None) -> Report:  # fmt: skip
    """Every subject on its cases. A case that a subject refuses to run is recorded, not raised."""
    report = Report()
    for subject in subjects:
        for case in work(subject, optimizers, seed, cases):
            progress(f"{subject.name}: {case.optimizer}")
            report.cases += 1
            try:
                findings = compare_case(case, subject, device)
            except REFUSALS as error:
                report.refused.append((subject.name, case.repro, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"))
                continue
            report.record(subject.name, case, findings)
    return report


def ours(names: Sequence[str]) -> list[Subject]:
    return [Ours(name) for name in names]

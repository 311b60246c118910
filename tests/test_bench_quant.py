"""`bench quant`: its registry, bytes and FLOPs, the runner on tiny weights, what it writes. No timing is judged here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fusedadapt import bench
from fusedadapt.bench import quant, quant_contestants, quant_report, quant_runner, runner

TINY = runner.Settings(threads=1, seconds=0.01, quick=False, rounds=(2, 2))
CPU = [row for row in quant.ROWS if row.device == "cpu"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runner, "SETTLE", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(row: quant.Row) -> quant.Row:
    return dataclasses.replace(row, tokens=min(row.tokens, 20), n=96, k=256)


def test_rows_are_distinct_and_every_goal_names_one() -> None:
    rows = {row.name: row for row in quant.ROWS}
    assert len(rows) == len(quant.ROWS)
    for row in quant.ROWS:
        assert row.contestants[0] == quant.OURS and all(c.kind in quant_contestants._BUILDERS for c in row.contestants)
    for goal in quant.GOALS:
        names = {c.name for c in rows[goal.row].contestants}
        assert goal.a in names and (not goal.b or goal.b in names), goal


def test_traffic_and_flops() -> None:
    row = next(r for r in CPU if r.name == "linear nf4 M=16 4096x4096 fp32")
    assert quant.flops(row, 10, 20) == 2 * 16 * 10 * 20
    assert quant.traffic(row, 100, 10, 20) == 100 + 16 * 30 * 4


@pytest.mark.parametrize("job", ["linear", "train", "qlora", "act", "code", "quantize", "dequantize", "fake"])
def test_every_job_is_timed(job: str) -> None:
    row = small(next(r for r in CPU if r.job == job))
    result = quant_runner.measure(row, TINY)
    assert {t.name for t in result.timings} | set(result.absent) == {c.name for c in row.contestants}
    subject = result.of("ours")
    assert subject is not None and subject.median > 0 and subject.ratio == 1 and subject.copy_share is not None


def test_contestants_compute_the_same() -> None:
    row = small(next(r for r in CPU if r.name == "linear int4 M=16 4096x4096 fp32"))
    given = quant_contestants.problem(row, "cpu", False)
    truth = given.x @ given.packed.dequantize().t()
    for kind, tolerance in (("ours", 1e-4), ("whole", 1e-4), ("torch_int4", 0.2), ("dense", 0.2)):
        found = quant_contestants.build(kind, given)()
        assert (found - truth).norm() <= tolerance * truth.norm(), kind


def test_fake_quantizers_agree_on_the_gradient() -> None:
    row = small(next(r for r in CPU if r.job == "fake" and r.format == "round"))
    given = quant_contestants.problem(row, "cpu", False)
    for kind in ("ours", "fused"):
        quant_contestants.build(kind, given)()


def test_the_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [small(r) for r in CPU if r.name in ("linear nf4 M=1 4096x4096 fp32", "linear nf4 M=16 4096x4096 fp32")]
    monkeypatch.setattr(quant, "ROWS", rows)
    assert bench.main(["quant", "--seconds", "0.01", "--threads", "1", "--json", str(tmp_path / "q.json"), "--plots", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "q.json").read_text())
    assert len(document["rows"]) == 2 and document["cliffs"][0]["worst"][1] in (1, 16)
    assert (tmp_path / "quant-speedup.png").stat().st_size > 0
    assert "at the worst" in " ".join(capsys.readouterr().out.split())


def test_goals_are_judged() -> None:
    timing = [quant_runner.Timing("ours", 1.0, 1.0, 1.0, 1.0, 0.5), quant_runner.Timing("dense", 2.0, 2.0, 2.0, 2.0)]
    result = quant_runner.Result("r", "linear", "nf4", "float32", 1, (4, 4), timings=timing)
    judged = [
        quant_report.judge(quant.Goal("t", "r", kind, limit, b=b), [result]) for kind, limit, b in (("faster", 1.9, "dense"), ("cost", 0.4, "dense"))
    ]
    assert [j is not None and j["met"] for j in judged] == [True, False]
    assert quant_report.judge(quant.Goal("t", "r", "copy", 0.6), [result])["met"] is False
    assert quant_report.judge(quant.Goal("t", "absent", "copy", 0.6), [result]) is None

"""`bench sparse`: its registry, every job on tiny tensors, memory, goals, what it writes. No timing is judged here."""

import dataclasses
import json

import pytest
import torch

from fusedadapt import bench
from fusedadapt.bench import runner, sparse, sparse_contestants, sparse_report, sparse_runner

TINY = runner.Settings(threads=1, seconds=0.01, quick=True, rounds=(2, 2))
CPU = [row for row in sparse.ROWS if row.device == "cpu"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(runner, "SETTLE", 0.0)
    monkeypatch.setattr(sparse_runner, "copier", lambda device: lambda: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(row):
    shapes = tuple(row.quick[:5]) if len(row.quick) > 5 else tuple(tuple(min(d, 64 if len(s) > 1 else 5000) for d in s) for s in row.quick)
    return dataclasses.replace(row, quick=shapes, tokens=16)


def test_rows_and_goals_fit_together():
    rows = {row.name: row for row in sparse.ROWS}
    assert len(rows) == len(sparse.ROWS)
    assert sum(n for (n,) in rows["mask 5e7 in 300 random fp32"].shapes) == 50_000_000 and len(rows["mask 5e7 in 300 random fp32"].shapes) == 300
    for goal in sparse.GOALS:
        names = {c.name for c in rows[goal.row].contestants}
        assert goal.a in names and (not goal.b or goal.b in names) and (not goal.other or goal.other in rows), goal
    assert {f"M{i}" for i in range(1, 14)} == {g.text.split(":")[0] for g in sparse.GOALS if g.text[0] == "M"}


@pytest.mark.parametrize("row", sparse.ROWS, ids=lambda row: row.name)
def test_every_row_runs_on_a_cpu(row):
    result = sparse_runner.measure(small(row), TINY)
    assert {t.name for t in result.timings} | set(result.absent) == {c.name for c in row.contestants}
    for name, why in result.absent.items():
        assert "compact" in why or "bfloat16" in why or "peft" in why or "grow_prune" in why, (name, why)
    for t in result.timings:
        assert t.median > 0 and (t.extra is None or t.extra >= 0)
    if row.job == "drop":
        assert result.timings[0].differ == 0


def test_contestants_agree():
    row = small(next(row for row in CPU if row.job == "wgrad"))
    given = sparse_contestants.problem(row, "cpu", True)
    ours, _, gathered = (sparse_contestants.build(c, given).call() for c in row.contestants)
    torch.testing.assert_close(ours, gathered, atol=1e-4, rtol=1e-4)
    row = small(next(row for row in CPU if row.job == "mask"))
    given = sparse_contestants.problem(row, "cpu", True)
    masks, top, parted = (sparse_contestants.build(c, given).call() for c in row.contestants)
    k = int(row.density * given.elements)
    at = torch.cat([m.to_bool().reshape(-1) for m in masks]).nonzero().view(-1)
    assert torch.equal(at, top.indices.sort().values) and sorted(parted[-k:]) == sorted(top.values.tolist())
    pytest.importorskip("peft")
    for method in ("ties", "task_arithmetic"):
        row = small(next(row for row in CPU if row.method == method))
        given = sparse_contestants.problem(row, "cpu", True)
        ours, theirs = (sparse_contestants.build(c, given).call() for c in row.contestants)
        different = (ours["w"] != theirs).double().mean()
        assert different < 0.03, f"{method}: {different:.2%} of the elements"  # torch.topk keeps other ones of equal changes


def test_layers_agree():
    row = dataclasses.replace(small(next(row for row in sparse.ROWS if row.job == "layer")), dtype=torch.float32)
    given = sparse_contestants.problem(row, "cpu", True)
    for a, b in zip(*(sparse_contestants.build(c, given).call() for c in row.contestants)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_memory_is_seen():
    size = 64 << 20
    found = sparse_runner.extra_memory(lambda: torch.ones(size, dtype=torch.uint8), "cpu")
    if found is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 0.9 * size < found < 1.3 * size


def timing(name, seconds, **more):
    return sparse_runner.Timing(name, seconds, seconds, seconds, seconds, **more)


@pytest.mark.parametrize(
    ("kind", "limit", "measured", "met"),
    [("faster", 3.0, 4.0, True), ("cost", 0.2, 0.25, False), ("time", 1000.0, 1000.0, True), ("memory", 0.5, 0.25, True), ("extra", 6.0, 7.0, False),
     ("across", 0.5, 0.5, True), ("copy", 0.7, 0.6, False), ("differ", 0.0, 0, True)],
)  # fmt: skip
def test_goals_are_judged(kind, limit, measured, met):
    rows = [
        sparse_runner.Result("r", "mask", "f", 1, 1, 0.1, 3, [timing("ours", 1.0, extra=10**7, result=3 * 10**6, copy_share=0.6, differ=0),
                                                              timing("b", 4.0, extra=4 * 10**7)]),
        sparse_runner.Result("s", "mask", "f", 1, 1, 0.1, 3, [timing("ours", 2.0)]),
    ]  # fmt: skip
    goal = sparse.Goal("", "r", kind, limit, b="b" if kind in ("faster", "cost", "memory") else "", other="s" if kind == "across" else "")
    judged = sparse_report.judge(goal, rows)
    assert judged["measured"] == pytest.approx(measured) and judged["met"] is met
    assert sparse_report.judge(dataclasses.replace(goal, row="t"), rows) is None
    assert sparse_report.judge(dataclasses.replace(goal, a="x"), rows) is None


def test_command_writes_json_and_plots(tmp_path, capsys, monkeypatch):
    row = next(row for row in CPU if row.job == "merge")
    monkeypatch.setattr(sparse, "ROWS", [small(row)])
    arguments = ["sparse", "--quick", "--seconds", "0.01", "--threads", "1", "--json", str(tmp_path / "out.json"), "--plots", str(tmp_path / "plots")]
    assert bench.main(arguments) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["kind"] == "sparse" and {"versions", "commit", "threads", "rows", "goals"} <= set(document)
    assert {f.name for f in dataclasses.fields(sparse_runner.Timing)} == set(document["rows"][0]["timings"][0])
    assert {p.name for p in (tmp_path / "plots").iterdir()} >= {"sparse-memory.png", "sparse-memory.svg"}
    assert "extra" in capsys.readouterr().out
    assert bench.main(["sparse", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [row.name]

"""`bench lowrank`: its registry, the counts of bytes and FLOPs, the runner on tiny layers, what it writes. No timing is judged here."""

import dataclasses
import json
import time

import pytest
import torch

from fusedadapt import bench
from fusedadapt.bench import lowrank, lowrank_contestants, lowrank_report, lowrank_runner, runner
from fusedadapt.ops import dense
from fusedadapt.testing.saved import SavedBytes

TINY = runner.Settings(threads=1, seconds=0.01, quick=True, rounds=(2, 2))
CPU = [row for row in lowrank.ROWS if row.device == "cpu"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(runner, "SETTLE", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(row, tokens=256):
    return dataclasses.replace(row, tokens=tokens, inputs=48, outputs=tuple(24 + 8 * i for i in range(len(row.outputs))), rank=4)


def row_of(prefix):
    return next(row for row in CPU if row.name.startswith(prefix))


def test_rows_are_distinct_and_known():
    assert len({row.name for row in lowrank.ROWS}) == len(lowrank.ROWS)
    for row in lowrank.ROWS:
        frozen, subject = row.contestants[:2]
        assert frozen.kind == "frozen" and subject.name == lowrank.OURS.name and len({c.name for c in row.contestants}) == len(row.contestants)
    assert sum(row.name.startswith("grid") for row in lowrank.ROWS) >= 200
    assert {row.method for row in CPU} == {"lora", "dora", "vera", "ia3", "adalora"}


def test_goals_name_rows_and_contestants():
    rows = {row.name: row for row in lowrank.ROWS}
    for goal in lowrank.GOALS:
        names = {c.name for c in rows[goal.row].contestants}
        assert goal.a in names and (not goal.b or goal.b in names), goal
    assert {f"M{i}" for i in range(1, 6)} <= {g.text.split(":")[0] for g in lowrank.GOALS}
    share = {g.row: g.limit for g in lowrank.GOALS if g.kind == "share"}
    assert [share[f"lora 2048 1024->1024 r16 {p} {d}"] for d in ("fp32", "bf16") for p in ("p0.1", "p0")] == [0.3, 0.5, 0.2, 0.25]


def test_least_flops_is_the_sum_of_the_products():
    row = small(row_of("lora"), tokens=10)
    t, k, (n,), r = 10, 48, row.outputs, 4
    frozen = [(t, k, n), (t, n, k)]
    branch = [(t, k, r), (t, r, n), (t, n, r), (t, r, k), (r, t, k), (n, t, r)]
    assert lowrank.least_flops(row) == sum(2 * a * b * c for a, b, c in frozen + branch)
    assert lowrank.least_flops(row, "ia3") == sum(2 * a * b * c for a, b, c in frozen)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "vera", "ia3"])
def test_ours_issues_no_more_than_the_least_and_saves_little(method):
    row = dataclasses.replace(row_of("lora"), tokens=512, inputs=256, outputs=(128,), rank=4, method=method)
    given = lowrank_contestants.problem(row, "cpu", False)
    made = lowrank_contestants.build(lowrank.OURS, given)
    saved, flops = lowrank_runner.counted(made, given)
    assert 1.0 <= flops / lowrank.least_flops(row) <= 1.02
    own = {"dora": 0.5, "ia3": 0.5}.get(method, 0.0)  # y, where its scale is trained: half of x here
    extra = {"vera": 128 * 4 * 4}.get(method, 0) + {"dora": 3 * 128 * 4}.get(method, 0)  # factors made for the call
    assert own <= saved <= own + 4 / 256 + extra / (512 * 256 * 4) + 1e-3


def test_counts_of_the_eager_layer_are_those_of_its_operations():
    row = dataclasses.replace(row_of("lora"), tokens=512, inputs=256, outputs=(128,), rank=4, p=0.5)
    given = lowrank_contestants.problem(row, "cpu", False)
    saved, flops = lowrank_runner.counted(lowrank_contestants.build(lowrank.EAGER, given), given)
    assert flops == lowrank.least_flops(row)
    assert saved == pytest.approx(2 + 4 / 256, abs=1e-3), "the mask, the dropped x and U"


def test_saved_bytes_counts_each_storage_once():
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    with SavedBytes([x, w]) as saved:
        y = x @ w.t()
        (y * y.view(16, 64).t() + y.exp()).sum()
    assert saved.total == 2 * y.numel() * 4, "y, of which there are two views, and exp(y)"
    with SavedBytes() as all_of_them:
        x @ w.t()
    assert all_of_them.total == (x.numel() + w.numel()) * 4


def test_contestants_compute_the_same():
    row = dataclasses.replace(small(row_of("lora")), p=0.0)
    given = lowrank_contestants.problem(row, "cpu", False)
    results = [
        torch.autograd.grad(lowrank_contestants.build(c, given).forward(), [given.x], given.dys)[0]
        for c in (lowrank.FUNCTIONAL, lowrank.EAGER, lowrank.ADDMM)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("row", CPU, ids=lambda row: row.name)
def test_every_row_runs(row):
    result = lowrank_runner.measure(small(row), TINY)
    expected = {c.name for c in lowrank_runner.contestants(row, TINY, result.widened)}
    assert {t.name for t in result.timings} | set(result.absent) == expected
    ours = result.of(lowrank.OURS.name)
    assert ours.ratio == 1.0 and ours.median > 0 and ours.overhead is not None and ours.flops >= 1.0
    assert result.widened == dense.widens(torch.zeros(1, dtype=row.dtype))
    for goal in [g for g in lowrank.GOALS if g.row == row.name and g.kind != "share"]:
        assert lowrank_report.judge(goal, [result]) is not None


def fake(widened=False, **overheads):
    timings = [lowrank_runner.Timing(name.replace("_", ", "), 1 + v, 1 + v, 1 + v, 1 + v, v, None, v / 10, 1 + v) for name, v in overheads.items()]
    return lowrank_runner.Result("r", "lora", 1, 1, (1,), 1, 0.1, "float32", 3, widened, timings)


@pytest.mark.parametrize(
    ("kind", "limit", "measured"), [("share", 0.3, 0.25), ("overhead", 0.3, 0.2), ("saved", 0.01, 0.02), ("flops", 1.3, 1.2), ("cost", 1.3, 1.2)]
)
def test_goals_are_judged(kind, limit, measured):
    judged = lowrank_report.judge(lowrank.Goal("", "r", kind, limit, b="frozen"), [fake(frozen=0.0, ours=0.2, peft=0.8)])
    assert judged["measured"] == pytest.approx(measured) and judged["met"] == (measured <= limit)
    assert lowrank_report.judge(lowrank.Goal("", "r", kind, limit), [fake(frozen=0.0)]) is None


def test_the_baseline_is_peft_over_the_same_product_else_eager():
    goal = lowrank.Goal("", "r", "share", 0.3)
    assert lowrank_report.judge(goal, [fake(ours=0.2, eager=0.4)])["b"] == "eager"
    assert lowrank_report.judge(goal, [fake(True, ours=0.2, peft=9.0, peft_widened=0.8)])["b"] == "peft, widened"
    assert lowrank_report.judge(goal, [fake(ours=0.2, peft=-0.01)]) is None, "no share of a negative overhead"


def test_absent_libraries_are_reported_not_timed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    nf4 = lowrank.Contestant("nf4", "frozen", base="nf4")
    row = dataclasses.replace(small(row_of("lora")), contestants=(lowrank.FROZEN, lowrank.OURS, lowrank.PEFT, lowrank.PATCHED, nf4))
    result = lowrank_runner.measure(row, TINY)
    assert {lowrank.PEFT.name, lowrank.PATCHED.name} <= set(result.absent)
    assert [t.name for t in result.timings if t.name != "nf4"] == ["frozen", "ours"]


def test_command_writes_json_and_plots(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lowrank, "ROWS", [dataclasses.replace(small(row_of("lora")), name=row_of("lora").name)])
    arguments = ["lowrank", "--quick", "--seconds", "0.01", "--threads", "1", "--filter", "^lora"]
    assert bench.main([*arguments, "--json", str(tmp_path / "out.json"), "--plots", str(tmp_path / "plots")]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["kind"] == "lowrank" and {"versions", "commit", "threads", "rows", "goals"} <= set(document)
    assert {f.name for f in dataclasses.fields(lowrank_runner.Timing)} == set(document["rows"][0]["timings"][0])
    assert {"text", "row", "kind", "limit", "measured", "met"} <= set(document["goals"][0])
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["overhead.png", "overhead.svg", "saved.png", "saved.svg"]
    assert "overhead" in capsys.readouterr().out


def test_command_lists_the_rows_of_the_device(capsys):
    assert bench.main(["lowrank", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [row.name for row in CPU]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_rows_run_on_gpu():
    row = next(row for row in lowrank.ROWS if row.device == "cuda")
    result = lowrank_runner.measure(small(row), dataclasses.replace(TINY, device="cuda"))
    assert result.of("ours (graph)") is not None


def test_slow_steps_leave_the_others_their_time():
    """Contestants of seconds a step took the whole time of their row, and the rest was compared over three rounds."""

    class Clock:
        def calls_for(self, step):
            return 1

        def sample(self, step, calls):
            return step()

    def wait(seconds):
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            pass
        return seconds

    settings = runner.Settings(threads=1, seconds=0.2, rounds=(3, 50))
    samples = runner.take_turns({"slow": lambda: wait(0.1), "fast": lambda: wait(0.001)}, Clock(), settings, {"slow"})
    assert len(samples["slow"]) == 3 and len(samples["fast"]) > 10

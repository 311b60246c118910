"""The benches: their registry, the runner on tiny mixes, what they write. No timing is judged here."""

import dataclasses
import json
import math
import time

import pytest
import torch

from fusedadapt import bench
from fusedadapt.bench import cli, registry, report, runner

TINY = runner.Settings(threads=1, seconds=0.01, quick=True, rounds=(2, 3))


@pytest.fixture
def tiny_mixes(monkeypatch):
    tiny = {name: (full, [(7,), (33, 3)]) for name, (full, _) in registry.MIXES.items()}
    monkeypatch.setattr(runner, "MIXES", tiny)
    monkeypatch.setattr(runner, "_COPY_BYTES", 4096)
    runner.parameters.cache_clear()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    runner.parameters.cache_clear()


def elements(mix):
    return sum(math.prod(shape) for shape in registry.MIXES[mix][0])


def test_rows_are_distinct_and_known():
    names = [row.name for row in registry.ROWS]
    assert len(set(names)) == len(names)
    for row in registry.ROWS:
        assert row.mix in registry.MIXES
        assert row.contestants[0].lib == "ours" and len({c.name for c in row.contestants}) == len(row.contestants)


def test_mixes_are_what_they_say():
    assert elements("1x33M") == 2**25
    assert elements("minilm") == 22_713_216
    assert elements("1B") == 1_235_814_400
    assert elements("1x20M") == elements("5000x4096")
    assert elements("llama-lora") == 32 * (4 * 16 * 4096 + 16 * (4096 + 1024 + 1024 + 4096))
    assert len(registry.MIXES["5000x256"][0]) == 5000


def test_goals_name_rows_and_contestants():
    rows = {row.name: row for row in registry.ROWS}
    for goal in registry.GOALS:
        row = rows[goal.row]
        names = {c.name for c in runner._contestants(row, runner.Settings(row.device))}
        assert goal.a in names and (not goal.b or goal.b in names), goal
        assert (goal.kind in ("faster", "cost")) == bool(goal.b) and (goal.kind == "across") == bool(goal.other)
        assert row.copy or goal.kind != "copy"
        assert not goal.other or rows[goal.other].device == row.device
    assert {g.limit for g in registry.GOALS if g.kind == "faster" and g.b == "torch fused"} == {0.95, 1.2, 2.5, 2.0, 15.0}


@pytest.mark.parametrize(
    ("cls", "options", "dtype", "mask", "expected"),
    [
        ("SGD", {}, torch.float32, None, 12),
        ("AdamW", {}, torch.float32, None, 28),
        ("AdamW", {}, torch.bfloat16, None, 14),
        ("Lion", {}, torch.float32, None, 20),
        ("AdamW", {"state_dtype": "fp32"}, torch.bfloat16, None, 22),
        ("AdamW", {"state_dtype": "fp32", "master_weights": "fp32"}, torch.bfloat16, None, 28),
        ("AdamW", {"state_dtype": "fp32", "master_weights": "split"}, torch.bfloat16, None, 26),
        ("AdamW", {"state_dtype": "int8"}, torch.float32, None, 16.0625),
        ("AdamW", {"state_dtype": "fp8"}, torch.bfloat16, None, 10.25),
        ("AdamW", {"max_grad_norm": 1.0}, torch.float32, None, 32),
        ("AdamW", {}, torch.float32, 0.5, 28.125),
        ("SophiaG", {}, torch.float32, None, 24),
    ],
)
def test_bytes_per_element(cls, options, dtype, mask, expected):
    assert registry.bytes_per_element(registry._ours(cls, mask=mask, **options), dtype) == expected
    assert registry.bytes_per_element(registry.TORCH_FUSED, dtype) is None


CPU_NAMES = {row.name for row in registry.ROWS if row.device == "cpu"}


# a GPU's row beside a CPU's is the same but for its name
@pytest.mark.parametrize(
    "row", [row for row in registry.ROWS if row.name.removesuffix(" gpu") not in CPU_NAMES - {row.name}], ids=lambda row: row.name
)
def test_every_row_runs(row, tiny_mixes):
    result = runner.measure(row, TINY)
    assert result.rounds >= 2 and result.elements == 7 + 99
    assert {t.name for t in result.timings} | set(result.absent) == {c.name for c in row.contestants}
    subject = result.timings[0]
    assert subject.name == row.contestants[0].name and subject.ratio == 1.0 and subject.median > 0
    assert (subject.copy_share is not None) == row.copy
    assert (subject.bandwidth is None) == row.host


def fake(row, **medians):
    timings = [runner.Timing(name, t, t, t, t) for name, t in medians.items()]
    return runner.Result(row, "", "", 1, 1, 1, False, timings)


@pytest.mark.parametrize(
    ("kind", "limit", "measured", "met"),
    [("faster", 3.0, 4.0, True), ("faster", 5.0, 4.0, False), ("cost", 0.3, 0.25, True), ("cost", 0.2, 0.25, False)],
)
def test_goals_are_judged(kind, limit, measured, met):
    judged = report.judge(registry.Goal("", "r", kind, limit, "a", "b"), [fake("r", a=1.0, b=4.0)])
    assert (judged["measured"], judged["met"]) == (measured, met)
    assert report.judge(registry.Goal("", "r", kind, limit, "a", "absent"), [fake("r", a=1.0)]) is None


def test_goals_across_rows_are_per_element():
    one, many = fake("one", a=2.0), dataclasses.replace(fake("many", a=9.0), elements=3)
    goal = registry.Goal("", "many", "across", 1.4, "a", other="one")
    assert report.judge(goal, [one, many]) == {**dataclasses.asdict(goal), "measured": 1.5, "met": False}
    assert report.judge(goal, [many]) is None


def test_rows_prepare_what_they_say(monkeypatch):
    """Misaligned tensors, and groups that differ."""
    monkeypatch.setitem(runner.MIXES, "5000x4096+1", ([(16,)], [(16,)]))
    monkeypatch.setitem(runner.MIXES, "5000x4096", ([(16,)] * 6, [(16,)] * 6))
    runner.parameters.cache_clear()
    [p] = runner.parameters("5000x4096+1", torch.float32, "cpu", True)
    assert p.data_ptr() % 16 == p.grad.data_ptr() % 16 == 4 and p.shape == (16,)
    step = runner.prepare(registry.OURS_GROUPS, runner.parameters("5000x4096", torch.float32, "cpu", True))
    groups = step.__self__.param_groups
    assert [len(g["params"]) for g in groups] == [2, 2, 1, 1] and len({g["lr"] for g in groups}) == 4
    runner.parameters.cache_clear()


def test_host_goal_is_in_microseconds():
    judged = report.judge(registry.Goal("", "r", "host", 15.0, "a"), [fake("r", a=10e-6)])
    assert judged["met"] and judged["measured"] == pytest.approx(10)


def test_command_writes_json_and_plots(tiny_mixes, tmp_path, capsys):
    arguments = ["optim", "--quick", "--seconds", "0.01", "--threads", "1", "--filter", "^(adamw|clip) 1x33M fp32$"]
    assert bench.main([*arguments, "--json", str(tmp_path / "out.json"), "--plots", str(tmp_path / "plots")]) == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert {"schema", "kind", "date", "commit", "versions", "cpu", "isa", "threads", "device", "quick", "rows", "goals"} == set(document)
    assert [row["row"] for row in document["rows"]] == ["adamw 1x33M fp32", "clip 1x33M fp32"]
    assert {"name", "median", "low", "high", "ratio", "bytes", "bandwidth", "copy_share"} == set(document["rows"][0]["timings"][0])
    assert {"text", "row", "kind", "limit", "measured", "met"} <= set(document["goals"][0])
    written = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert written == ["bandwidth.png", "bandwidth.svg", "speedup.png", "speedup.svg"]
    assert all(path.stat().st_size > 1000 for path in (tmp_path / "plots").iterdir())
    assert "quick run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [(["--filter", "("], "a regular expression"), (["--threads", "0"], "more than 0"), (["--seconds", "nan"], "more than 0")],
)
def test_arguments_are_checked_before_anything_runs(capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["optim", *arguments])
    assert said in capsys.readouterr().err


def run_of_three(monkeypatch, tmp_path, measure, *arguments):
    """What a run over three rows, the second of which is measured by `measure`, writes and returns, or raises."""
    whole, calls = runner.measure, []

    def each(row, settings):
        calls.append(row)
        return (measure if len(calls) == 2 else whole)(row, settings)

    monkeypatch.setattr(runner, "measure", each)
    path, code = tmp_path / "out.json", None
    quick = ["--quick", "--seconds", "0.01", "--threads", "1", "--filter", "^(adamw|clip|mask) 1x33M fp32$"]
    try:
        code = cli.main(["optim", *quick, "--json", str(path), *arguments])
    except (RuntimeError, KeyboardInterrupt) as error:
        code = error
    return [row["row"] for row in json.loads(path.read_text())["rows"]], code


@pytest.mark.parametrize("fault", [RuntimeError("a kernel failed"), KeyboardInterrupt()], ids=repr)
def test_what_was_measured_is_written_whatever_ends_the_run(tiny_mixes, tmp_path, monkeypatch, capsys, fault):
    def fails(row, settings):
        raise fault

    assert run_of_three(monkeypatch, tmp_path, fails) == (["adamw 1x33M fp32"], fault)
    assert "ours AdamW" in capsys.readouterr().out


def test_a_row_without_memory_leaves_the_others(tiny_mixes, tmp_path, monkeypatch, capsys):
    def fails(row, settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    assert run_of_three(monkeypatch, tmp_path, fails) == (["adamw 1x33M fp32", "clip 1x33M fp32"], 0)
    assert "not timed: mask 1x33M fp32 (CUDA out of memory" in capsys.readouterr().out


def test_no_row_begins_late(tiny_mixes, tmp_path, monkeypatch, capsys):
    whole = runner.measure

    def slow(row, settings):
        time.sleep(1.0)
        return whole(row, settings)

    assert run_of_three(monkeypatch, tmp_path, slow, "--within", "1") == (["adamw 1x33M fp32", "mask 1x33M fp32"], 0)
    assert "not timed: clip 1x33M fp32 (--within was over)" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--json", "--plots"])
def test_results_that_could_not_be_written_are_not_measured(tmp_path, capsys, monkeypatch, option):
    monkeypatch.setattr(runner, "measure", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    assert cli.main(["optim", option, str(tmp_path / "file" / "below")]) == 2
    assert "bench: expected to write" in capsys.readouterr().out


def test_command_line_faults(capsys):
    assert cli.main(["optim", "--filter", "no such row"]) == 2
    if not torch.cuda.is_available():
        assert cli.main(["optim", "--device", "cuda"]) == 2
    assert cli.main(["optim", "--list"]) == 0
    assert "adamw 1x33M fp32" in capsys.readouterr().out


def test_absent_library_is_reported_not_timed(tiny_mixes):
    absent = registry.Contestant("nowhere", "no_such_module_here", "Nothing")
    row = dataclasses.replace(registry.ROWS[0], contestants=(registry.OURS_ADAMW, absent))
    result = runner.measure(row, TINY)
    assert set(result.absent) == {"nowhere"} and [t.name for t in result.timings] == [registry.OURS_ADAMW.name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_graph_variant_on_gpu(tiny_mixes):
    result = runner.measure(registry.ROWS[0], dataclasses.replace(TINY, device="cuda"))
    assert result.of("ours AdamW (graph)") is not None

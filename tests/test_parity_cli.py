"""The parity toolkit and its command: it must pass what is right, and above all see what is wrong."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedadapt import parity, testing
from fusedadapt.optim import OPTIMIZERS
from fusedadapt.parity import libs, suite
from fusedadapt.reference.rules import RULES
from fusedadapt.testing import INCOMPARABLE, Ours, error_vs_truth, fuzz_case, ulp_distance, ulp_size

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
finite = st.floats(width=16, allow_nan=False, allow_infinity=False)
anything = st.floats(width=16)


def neighbour(t):
    return torch.nextafter(t, t.new_tensor(math.inf))


@given(anything, anything, st.sampled_from(DTYPES))
def test_ulp_distance_is_symmetric_and_zero_on_equals(a, b, dtype):
    x, y = torch.tensor([a]).to(dtype), torch.tensor([b]).to(dtype)
    distance = ulp_distance(x, y)
    assert torch.equal(distance, ulp_distance(y, x)) and distance.item() >= 0
    same = bool((x == y) | (x.isnan() & y.isnan()))
    assert (distance.item() == 0) == same
    if not same and not (x.isfinite() & y.isfinite()):
        assert distance.item() == INCOMPARABLE


@given(finite, finite, finite, st.sampled_from(DTYPES[:3]))
def test_ulp_distance_adds_up(a, b, c, dtype):
    x, y, z = (torch.tensor([v]).to(dtype) for v in sorted((a, b, c)))
    assert ulp_distance(x, z) == ulp_distance(x, y) + ulp_distance(y, z)


@given(finite, st.sampled_from((torch.float32, torch.float64)))
def test_neighbours_are_one_ulp_apart(a, dtype):
    x = torch.tensor([a]).to(dtype)
    y = neighbour(x)
    assert ulp_distance(x, y).item() == 1
    assert error_vs_truth(y, x.double()).ulp.item() in (0.5, 1.0)  # half: towards zero from a power of two


def test_ulp_distance_extremes():
    big = torch.tensor([torch.finfo(torch.float64).max], dtype=torch.float64)
    assert ulp_distance(big, -big).item() == INCOMPARABLE - 1  # saturates below what means "no number"
    assert ulp_distance(torch.tensor([0.0]), torch.tensor([-0.0])).item() == 0
    with pytest.raises(ValueError, match="ulp_distance: expected"):
        ulp_distance(torch.zeros(2), torch.zeros(3))


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_ulp_size_is_the_spacing(x):
    assert ulp_size(torch.tensor([x], dtype=torch.float64), torch.float32).item() in (
        float(np.spacing(np.float32(x))),
        float(np.spacing(np.float32(x))) / 2,  # float32(x) may have been rounded up to a power of two
    )


def test_error_vs_truth_of_what_is_no_number():
    inf, nan = math.inf, math.nan
    got = torch.tensor([inf, nan, inf, nan, 1.0, inf])
    truth = torch.tensor([inf, nan, 1e39, 1.0, nan, 1.0], dtype=torch.float64)
    assert error_vs_truth(got, truth).ulp.tolist() == [0, 0, 0, inf, inf, inf]


def test_poisoned_memory_poisons_and_restores():
    before = torch.empty, torch.empty_like, torch.Tensor.new_empty
    with testing.poisoned_memory():
        assert torch.empty(5).isnan().all() and torch.empty_strided((3, 3), (0, 1)).isnan().all()
        assert torch.zeros(3).new_empty(2).isnan().all() and torch.empty_like(torch.zeros(3, dtype=torch.bfloat16)).isnan().all()
        assert (torch.empty(4, dtype=torch.int32).view(torch.uint8) == 0xCB).all()
        assert torch.empty(3, dtype=torch.bool).all()
    assert before == (torch.empty, torch.empty_like, torch.Tensor.new_empty)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_steps_write_all_they_allocate(backend):
    with testing.poisoned_memory():
        for seed in range(20):
            poisoned = testing.run_case(fuzz_case(seed), backend)
            for name, t in poisoned.items():
                assert t.isfinite().all() or not is_tame(fuzz_case(seed)), f"{fuzz_case(seed).repro}: {name}"


def is_tame(case):
    return all(t.kind in ("normal", "zeros", "constant", "tiny", "sparse", "alternating") and t.dtype == torch.float32 for t in case.tensors) and (
        case.shared["state_dtype"] != "fp16"
    )


def test_hostile_gradients_cover_their_kinds():
    kinds = testing.hostile_gradients((257,), torch.float32, 3)
    assert set(kinds) == set(testing.KINDS) > testing.SPECIAL
    assert kinds["nan"].isnan().any() and kinds["inf"].isinf().any() and kinds["overflow"].square().isinf().any()
    assert all(kinds[k].isfinite().all() and kinds[k].square().isfinite().all() for k in set(kinds) - testing.SPECIAL)
    assert kinds["negative zeros"].signbit().all() and 0 < kinds["denormal"].abs().max() < torch.finfo(torch.float32).tiny * 10
    assert torch.equal(kinds["alternating"].sign(), -testing.hostile_gradients((257,), torch.float32, 4)["alternating"].sign())
    assert {math.prod(s) for s in testing.hostile_shapes(100)} >= set(range(18))


def test_cases_are_functions_of_their_seed():
    assert fuzz_case(7) == fuzz_case(7) != fuzz_case(8)
    assert [c.seed for c in testing.fuzz_cases(5, 3, "Lion")] == [5, 6, 7]
    with pytest.raises(ValueError, match="fuzz_case: expected one of"):
        fuzz_case(0, "Adamw")


def test_cases_vary_everything():
    cases = list(testing.fuzz_cases(0, 300))
    tensors = [t for c in cases for t in c.tensors]
    assert {c.optimizer for c in cases} == set(OPTIMIZERS)
    assert {t.kind for t in tensors} == set(testing.KINDS)
    assert {t.grad_layout for t in tensors} == {"same", "other", "gapped"}
    assert any(t.offset for t in tensors) and any(t.masked for t in tensors) and any(t.absent for t in tensors)
    assert any(t.dtype != t.grad_dtype for t in tensors) and any(t.order != tuple(sorted(t.order)) for t in tensors)
    assert {c.shared["master_weights"] for c in cases} == {None, "fp32", "split"}
    assert any(c.found_inf for c in cases) and any("max_grad_norm" in c.shared for c in cases) and any(len(c.groups) > 1 for c in cases)
    assert any(g["maximize"] for c in cases for g in c.groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ours_meet_the_bounds(name):
    for case in testing.fuzz_cases(100, 3, name):
        wrong = [f for f in testing.compare_case(case, Ours(None)) if f.mismatches]
        assert not wrong, f"{case.repro}\n{wrong[0]}"


def test_truth_without_resync_is_near():
    case = dataclasses.replace(fuzz_case(0, "AdamW"), shared={}, grad_scale=None, found_inf=frozenset())
    case = dataclasses.replace(
        case, tensors=tuple(dataclasses.replace(t, kind="normal", dtype=torch.float32, grad_dtype=torch.float32) for t in case.tensors)
    )
    truth, found = testing.truth_of_case(case), testing.run_case(case, "reference")
    assert set(truth) <= set(found)
    for name, t in truth.items():
        torch.testing.assert_close(found[name].double(), t, rtol=1e-5, atol=1e-6)


def break_rule(monkeypatch, name, change):
    """The rule goes wrong in fp32 only: the truth is the same text in fp64."""
    right = RULES[name]

    def wrong(p, g, s, r):
        return right.step(p, g, s, r) if p.dtype == torch.float64 else change(right.step, p, g, s, r)

    monkeypatch.setitem(RULES, name, dataclasses.replace(right, step=wrong))


def slightly_long_step(step, p, g, s, r):
    after = step(p, g, s, r)
    return p + (after - p) * 1.0001


def forgotten_state(step, p, g, s, r):
    kept = s[1]
    after = step(p, g, s, r)
    s[1] = kept
    return after


def touched_gradient(step, p, g, s, r):
    return step(p, g * (1 + 1e-5), s, r)


@pytest.mark.parametrize("change", [slightly_long_step, forgotten_state, touched_gradient])
def test_broken_rule_is_seen(monkeypatch, capsys, tmp_path, change):
    break_rule(monkeypatch, "adam", change)
    arguments = ["optim", "--backend", "reference", "--optimizer", "AdamW", "--cases", "4", "--json", str(tmp_path / "out.json")]
    assert parity.main(arguments) == 1
    shown = capsys.readouterr().out
    assert "expected" in shown and "--optimizer AdamW --seed" in shown and "mismatches" in shown
    document = json.loads((tmp_path / "out.json").read_text())
    assert not document["clean"] and any(row["mismatches"] and row["repro"] for row in document["rows"])


def test_one_wrong_element_is_seen():
    class Wrong(Ours):
        def step(self, case, optimizer, step):
            super().step(case, optimizer, step)
            p = next((p for g in optimizer.param_groups for p in g["params"] if p.numel() > 5 and p.grad is not None), None)
            if p is not None and p.dtype == torch.float32:
                p.view(-1)[5] = p.view(-1)[5] * (1 + 1e-5) + 1e-5

    cases = [c for c in testing.fuzz_cases(0, 20, "SGD") if any(t.dtype == torch.float32 and math.prod(t.shape) > 5 for t in c.tensors)]
    contiguous = [dataclasses.replace(c, tensors=tuple(dataclasses.replace(t, order=tuple(range(len(t.shape)))) for t in c.tensors)) for c in cases]
    assert any(f.mismatches for c in contiguous for f in testing.compare_case(c, Wrong("reference")))


def test_changed_frozen_elements_and_gradients_are_seen():
    class Careless(Ours):
        def step(self, case, optimizer, step):
            super().step(case, optimizer, step)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.add_(1.0)
                    if p.grad is not None:
                        p.grad.add_(1.0)

    found = [f for case in testing.fuzz_cases(0, 12, "AdamW") for f in testing.compare_case(case, Careless("reference"))]
    seen = {f.quantity for f in found if f.mismatches}
    assert {"p", "gradient", "p (frozen)", "p (no step)"} <= seen


def test_command_passes_and_writes_json(capsys, tmp_path):
    out = tmp_path / "out.json"
    names = ["--optimizer", "Lion", "--optimizer", "AdaBelief"]
    assert parity.main(["optim", "--backend", "reference", *names, "--cases", "2", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["clean"] and document["cases"] == 4 and {r["optimizer"] for r in document["rows"]} == {"Lion", "AdaBelief"}
    assert "every bound met" in capsys.readouterr().out


def test_torch_has_our_equations():
    """In float64 rounding cannot hide another equation. torch's NAdam keeps a product in fp32."""
    subject = libs.Foreign("torch")
    for name in subject.optimizers:
        for case in testing.fuzz_cases(40, 4, name):
            tame = [dataclasses.replace(t, kind="normal") for t in case.plain(torch.float64).tensors]
            case = subject.adapt(dataclasses.replace(case.plain(torch.float64), tensors=tuple(tame)))
            findings = testing.compare_case(case, subject)
            assert not any(f.mismatches for f in findings), f"{name} {case.seed}"
            assert max(f.update for f in findings) < (1e-5 if name == "NAdam" else 1e-12), f"{name} {case.seed}"


def test_foreign_library_is_shown_not_judged(capsys):
    arguments = ["optim", "--lib", "torch-fused", "--optimizer", "AdamW", "--cases", "12"]
    assert parity.main(arguments) == 0
    assert "torch-fused" in capsys.readouterr().out
    # gradients in another memory order than their parameters: torch 2.13's fused CPU kernel mixes elements up
    if torch.__version__.startswith("2.13"):
        assert parity.main([*arguments, "--strict"]) == 1


def test_command_line_faults(capsys):
    assert parity.main(["optim", "--optimizer", "Adamw"]) == 2
    assert parity.main(["optim", "--lib", "no_such_library"]) == 2
    assert parity.main(["optim", "--lib", "torch", "--optimizer", "Lion"]) == 2  # was: 0 cases, every bound met
    assert parity.main(["optim", "--optimizer", "SGD", "--backend", "reference", "--cases", "1", "--seed", str(2**63)]) == 2
    if not torch.cuda.is_available():
        assert parity.main(["optim", "--backend", "cuda"]) == 2
        assert parity.main(["optim", "--lib", "torch", "--device", "cuda"]) == 2
    assert "expected" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        parity.main(["optim", "--cases", "0"])
    assert "expected more than 0, got 0" in capsys.readouterr().err


def test_a_report_that_could_not_be_written_is_not_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "run", lambda *_, **__: pytest.fail("ran"))
    for place in (tmp_path, tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("")
        assert parity.main(["optim", "--backend", "reference", "--json", str(place)]) == 2
        assert "parity: expected to write" in capsys.readouterr().out


def test_refused_case_is_reported(monkeypatch):
    def refuse(case, subject, device):
        raise RuntimeError("not today")

    monkeypatch.setattr(suite, "compare_case", refuse)
    report = suite.run([Ours("reference")], ["SGD"], cases=1)
    assert not report.clean and report.refused[0][2] == "RuntimeError: not today"

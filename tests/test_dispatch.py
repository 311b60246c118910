"""Choosing a backend: requests are obeyed or refused, wishes fall back aloud, strict mode never falls back."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest

from fusedadapt import config, dispatch


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("FUSEDADAPT_BACKEND", "FUSEDADAPT_STRICT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dispatch, "_said", set())


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The compiled modules that "exist": a test fills it; what it leaves out is absent."""
    present: dict[str, object] = {}
    monkeypatch.setattr(dispatch, "_load", lambda name: (present.get(name), "" if name in present else f"No module named {name}"))
    return present


def test_contexts_nest_and_end():
    assert config.current_backend() is None and not config.is_strict()
    with config.backend("cpp"), config.strict():
        assert config.current_backend() == "cpp" and config.is_strict()
        with config.backend("reference"), config.strict(False):
            assert config.current_backend() == "reference" and not config.is_strict()
        assert config.current_backend() == "cpp" and config.is_strict()
    assert config.current_backend() is None and not config.is_strict()


def test_contexts_end_on_an_error_and_stay_in_their_thread():
    seen = []
    with pytest.raises(KeyError), config.backend("cpp"):
        other = threading.Thread(target=lambda: seen.append(config.current_backend()))
        other.start()
        other.join()
        raise KeyError
    assert seen == [None] and config.current_backend() is None


def test_environment_is_read_on_call_and_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FUSEDADAPT_BACKEND", "reference")
    monkeypatch.setenv("FUSEDADAPT_STRICT", "1")
    assert config.current_backend() == "reference" and config.is_strict()
    with config.backend("cpp"), config.strict(False):
        assert config.current_backend() == "cpp" and not config.is_strict()
    monkeypatch.setenv("FUSEDADAPT_BACKEND", "cup")
    with pytest.raises(ValueError, match="FUSEDADAPT_BACKEND: expected one of reference, cpp, triton, cuda; got 'cup'"):
        config.current_backend()
    monkeypatch.setenv("FUSEDADAPT_STRICT", "yes")
    with pytest.raises(ValueError, match="FUSEDADAPT_STRICT: expected 0 or 1; got 'yes'"):
        config.is_strict()


def test_unknown_backend_is_refused_before_the_block_runs():
    with pytest.raises(ValueError, match="got 'gpu'"), config.backend("gpu"):
        raise AssertionError("the block ran")


def test_first_choices(modules):
    modules["_core"] = SimpleNamespace(CUDA=False)
    assert dispatch.pick("optim.Lion", "cpu") == ("cpp", "first choice")
    assert dispatch.pick("optim.Lion", "cpu", "reference").backend == "reference"
    assert dispatch.pick("optim.Lion", "meta").backend == "reference"


def test_absent_core_is_said_once_whatever_the_op(modules, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "fusedadapt"):
        assert dispatch.core() is None and dispatch.core() is None
        assert {dispatch.pick(op, "cpu").backend for op in ("a", "b")} == {"reference"}
    assert caplog.messages == ["fusedadapt: compiled core not available (No module named _core): using pure Python + Triton"]


def test_fallback_is_said_once_for_each_op_and_reason(modules, caplog: pytest.LogCaptureFixture):
    modules["_core"] = SimpleNamespace(CUDA=False)
    with caplog.at_level(logging.WARNING, "fusedadapt"):
        for op in ("a", "a", "b"):
            choice = dispatch.pick(op, "cpu", unfit={"cpp": "float64 parameters"})
            assert choice == ("reference", "cpp: float64 parameters")
    assert caplog.messages == [f"fusedadapt: {op} runs on reference because cpp: float64 parameters" for op in ("a", "b")]


def test_wish_falls_back_aloud_and_request_raises(modules, caplog: pytest.LogCaptureFixture):
    modules["_core"] = SimpleNamespace(CUDA=False)
    with caplog.at_level(logging.WARNING, "fusedadapt"), config.backend("cuda"):
        assert dispatch.pick("a", "cpu").backend == "cpp"
    assert caplog.messages == ["fusedadapt: a runs on cpp because cuda: runs on cuda tensors; these are on cpu"]
    with pytest.raises(RuntimeError, match="a: expected backend 'cuda', as asked for; cuda: runs on cuda tensors"):
        dispatch.pick("a", "cpu", "cuda")
    with pytest.raises(ValueError, match="a backend: expected one of"):
        dispatch.pick("a", "cpu", "gpu")


def test_strict_raises_instead_of_falling_back(modules):
    with config.strict():
        with pytest.raises(RuntimeError, match="a: expected no fallback .* would run on reference because cpp: compiled core not available"):
            dispatch.pick("a", "cpu")
        with config.backend("reference"):
            assert dispatch.pick("a", "cpu").backend == "reference"
        modules["_core"] = SimpleNamespace(CUDA=False)
        assert dispatch.pick("a", "cpu").backend == "cpp"
        with config.backend("triton"), pytest.raises(RuntimeError, match="would run on cpp because triton: "):
            dispatch.pick("a", "cpu", unfit={"triton": "no kernel for it"})


def test_on_a_gpu_triton_stands_in_for_cuda_without_being_a_fallback(modules, monkeypatch, caplog: pytest.LogCaptureFixture):
    modules["_core"] = SimpleNamespace(CUDA=False)
    monkeypatch.setattr(dispatch, "_no_gpu", lambda: "")
    monkeypatch.setattr(dispatch, "_triton_missing", lambda: "")
    with config.strict(), caplog.at_level(logging.WARNING, "fusedadapt"):
        assert dispatch.pick("a", "cuda") == ("triton", "cuda: the compiled core was built without CUDA")
        modules["_core"] = SimpleNamespace(CUDA=True)
        assert dispatch.pick("a", "cuda").backend == "cuda"
    assert caplog.messages == []


def test_nothing_left_is_an_error(modules):
    with pytest.raises(RuntimeError, match="a: expected a backend that can run; none can; cpp: .*; reference: not written"):
        dispatch.pick("a", "cpu", unfit={"reference": "not written"})


def test_triton_on_cpu_follows_its_own_switch(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert dispatch.available_backends("cpu")["triton"] == ""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert "TRITON_INTERPRET=1" in dispatch.available_backends("cpu")["triton"]


def test_explain_prints_and_returns_rows(capsys: pytest.CaptureFixture[str]):
    import torch

    class Part(torch.nn.Module):
        def __fusedadapt_explain__(self):
            return [("step", "cpp", "first choice")]

    assert dispatch.explain(Part()) == [("step", "cpp", "first choice")]
    assert dispatch.explain(torch.nn.Sequential(torch.nn.ReLU(), Part())) == [("1.step", "cpp", "first choice")]
    assert capsys.readouterr().out == "step  cpp  first choice\n1.step  cpp  first choice\n"
    with pytest.raises(TypeError, match="explain: expected an optimizer or module of fusedadapt's; got ReLU"):
        dispatch.explain(torch.nn.ReLU())


def test_explain_of_a_callable_lists_the_ops_it_runs(capsys: pytest.CaptureFixture[str]):
    import torch

    import fusedadapt as fa

    def call():
        fa.lora_linear(torch.randn(2, 4), torch.randn(3, 4), torch.randn(1, 4), torch.randn(3, 1))
        fa.quantize(torch.randn(4, 64, dtype=torch.float64))
        fa.sparse.topk_mask(torch.randn(9), k=2)
        torch.randn(2) + 1

    for _ in range(2):  # what was remembered from the first time is heard again
        rows = fa.explain(call)
        assert [what.split(".")[0] for what, _, _ in rows[:1]] == ["lowrank"] and len(set(rows)) == len(rows)
        assert {what.split(".")[0] for what, _, _ in rows} == {"lowrank", "quant", "sparse"} and all(why for _, _, why in rows)
    with fa.backend("reference"):
        assert {backend for _, backend, _ in fa.explain(call)} == {"reference"}
    assert "lowrank.shrink cpu" in capsys.readouterr().out
    with pytest.raises(TypeError, match="lora_linear needs x, weight, lora_A, lora_B; wrap the call"):
        fa.explain(fa.lora_linear)
    with pytest.raises(TypeError, match="ran none"):
        fa.explain(lambda: torch.zeros(2) + 1)

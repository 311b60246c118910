"""Without the compiled core everything still works: pure Python reads the tensors, the reference or Triton steps them, and it is said once."""

import logging
import struct

import pytest
import torch

from fusedadapt import _core, dispatch
from fusedadapt.optim import AdamW, NAdam, coded
from fusedadapt.optim import table as tables
from fusedadapt.optim.compact import unsqueeze


@pytest.fixture
def no_core(monkeypatch: pytest.MonkeyPatch, quick_calls: None) -> None:
    monkeypatch.setattr(dispatch, "core", lambda: None)
    monkeypatch.setattr(dispatch, "core_reason", lambda: "not built")


def run(backend: str | None, cls=AdamW, **options) -> tuple[list, object]:
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=gen)) for s in ((3, 5), (17,), (0,))]
    opt = cls(params, lr=0.01, backend=backend, **options)
    for t in range(3):
        gen.manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen)
        params[1].grad = None if t == 1 else params[1].grad
        opt.step()
    return params, opt


@pytest.mark.parametrize("cls", [AdamW, NAdam])
@pytest.mark.parametrize("backend", ["triton", None])
def test_same_bits_without_the_core(backend: str | None, cls, monkeypatch, quick_calls) -> None:
    with_core, _ = run("cpp", cls, max_grad_norm=0.5)
    monkeypatch.setattr(dispatch, "core", lambda: None)
    without, opt = run(backend, cls, max_grad_norm=0.5)
    assert opt._plans[0].choice.backend == (backend or "reference")
    assert all(torch.equal(a, b) for a, b in zip(with_core, without, strict=True))


def test_same_refusals(no_core: None) -> None:
    params, opt = run("triton")
    params[0].grad = torch.ones(3, 5)
    opt.state[params[0]]["exp_avg"] = torch.zeros(2)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match="exp_avg"):
        opt.step()
    assert torch.equal(before, params[0])


def test_tables_describe_the_same_memory() -> None:
    """Every word of the pure-Python descriptors equals the compiled ones, but for the addresses that are padding."""
    p = torch.nn.Parameter(torch.randn(4, 6))
    p.grad = torch.randn(4, 6)
    state = {"step": torch.zeros(()), "exp_avg": torch.zeros(4, 6), "exp_avg_sq": torch.zeros(4, 6, dtype=torch.bfloat16),
             "master": torch.zeros(4, 6), "mask": torch.zeros(1, dtype=torch.int32)}  # fmt: skip
    words = []
    for module, exchange in ((_core, torch.Tensor.__dlpack_c_exchange_api__), (_core, None), (tables, None)):
        table = module.Table(exchange, tables.read, ["exp_avg", "exp_avg_sq"], [], "master", 1, 0)
        table.add(p, state, 3, 5, 7, 11, 13)
        assert table.scan() == 0
        words.append(struct.unpack("<26q", table.descriptors(True)))
        assert table.chunk_list(16) == struct.pack("<4q", 0, 0, 0, 16)
    assert words[0] == words[1] == words[2]


def test_tables_describe_and_refuse_the_same_masks() -> None:
    """Where the mask is the index: its counts must be its own."""
    p = torch.nn.Parameter(torch.randn(3000))
    p.grad = torch.randn(3000)
    opt = AdamW([p], masks={p: torch.arange(3000) % 3 < 2}, mask_state="compact")
    opt.step()
    state, words = opt.state[p], []
    good, step = state["prefix"], torch.tensor([1, 0, 0, 0])
    for module, exchange in ((_core, torch.Tensor.__dlpack_c_exchange_api__), (_core, None), (tables, None)):
        table = module.Table(exchange, tables.read, ["exp_avg", "exp_avg_sq"], [], "master", 1, 0)
        table.add(p, state, 3, 5, 0, 0, 0, True)
        assert table.scan() == 0
        words.append(struct.unpack("<26q", table.descriptors(True)))
        spare = torch.arange(94) // 93 << 30
        for wrong in ({"prefix": good + step}, {"prefix": good + step.flip(0)}, {"prefix": good[:-1]}, {"prefix": good.int()}, {"mask": None},
                      {"mask": state["mask"] ^ 1}, {"mask": state["mask"] | spare.int()}, {"cohorts": torch.tensor([0, 1])}):  # fmt: skip
            before = {k: state.get(k) for k in wrong}
            state.update(wrong)
            with pytest.raises((_core.TableError, tables.TableError), match="prefix"):
                table.scan()
            state.update(before)
        assert table.scan() == 0
    assert words[0] == words[1] == words[2] and (words[0][7], words[0][18]) == (state["mask"].data_ptr(), good.data_ptr())


@pytest.mark.parametrize("state_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("compact", [False, True])
def test_tables_describe_the_same_coded_states(state_dtype: str, compact: bool) -> None:
    p = torch.nn.Parameter(torch.randn(6000))
    p.grad = torch.randn(6000)
    opt = AdamW([p], state_dtype=state_dtype, masks={p: torch.arange(6000) < 5000}, mask_state="compact" if compact else "dense")
    opt.step()
    state = opt.state[p]
    if compact:  # two cohorts: 1,000 elements and the rest, whose first block starts there
        unsqueeze(state, p)
        full = {k: coded.decode(state, k) for k in ("exp_avg", "exp_avg_sq")}
        forms = coded.formats(state)
        state |= {"cohorts": torch.tensor([0, 1000]), "step": torch.ones(2)}
        for k, values in full.items():
            state.update(coded.encode(state, k, values, forms[k]))
    words = []
    for module, exchange in ((_core, torch.Tensor.__dlpack_c_exchange_api__), (_core, None), (tables, None)):
        table = module.Table(exchange, tables.read, ["exp_avg", "exp_avg_sq"], [], "master", 1, 0, [11, 12])
        table.add(p, state, 0, 0, 0, 0, 0, compact)
        assert table.scan() == 0
        words.append(struct.unpack(f"<{26 * len(table.owners)}q", table.descriptors(True)))
    assert words[0] == words[1] == words[2] and len(words[0]) == 26 * (1 + compact)
    wide, block = (2, 128) if state_dtype == "fp8" else (1, 256)
    assert [words[0][21 + 26 * c] >> 24 & 0xFF for c in range(1 + compact)] == [block.bit_length() - 1] * (1 + compact)
    blocks = -(-1000 // block)
    assert not compact or words[0][26 + 22] - words[0][22] == 4 * wide * blocks
    before = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    held, start = dict(state), p.detach().clone()
    opt.step()
    stepped = [p.detach().clone(), *(state[k].clone() for k in before)]
    p.data.copy_(start)
    for k in before:
        held[k].copy_(before[k])
    opt.backend = "reference"
    opt._reset()
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(stepped, [p.detach(), *(state[k] for k in before)]))


def test_absence_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_load", lambda name: (None, "it was left out"))
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.WARNING, logger="fusedadapt"):
        run(None), run(None)
    assert len([r for r in caplog.records if "compiled core not available" in r.message]) == 1

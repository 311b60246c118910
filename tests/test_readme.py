"""What the README says is true: its example runs, its table lists every optimizer with the bytes its states cost."""

import re
from pathlib import Path

import pytest
import torch

from fusedadapt.optim import OPTIMIZERS
from fusedadapt.optim.spec import RULES, UNCODABLE, UNCODED

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = (ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "docs"


def examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_the_examples_run(capsys) -> None:
    for code in examples(README):
        exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "AdaBelief[adabelief] cpu" in printed and "LoRALinear[dora]" in printed


@pytest.mark.parametrize("number", range(4))
def test_the_examples_of_the_adapters_run(number: int) -> None:
    from fusedadapt.lowrank import LoRALinear, methods

    code = examples((DOCS / "lowrank.md").read_text(encoding="utf-8"))[number]
    if "import peft" in code:
        pytest.importorskip("peft")
    known = dict(methods.METHODS)
    exec(compile(code, "lowrank.md", "exec"), {})
    if new := methods.METHODS.keys() - known.keys():
        layer = LoRALinear(8, 8, method=new.pop())
        layer(torch.randn(2, 8)).sum().backward()
        assert layer.gain.grad is not None and layer.merge().retained == 1.0
        methods.METHODS.clear()
        methods.METHODS.update(known)


def test_the_examples_of_the_sparse_masks() -> None:
    first, wanda = examples((DOCS / "sparse.md").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    exec(compile(wanda, "sparse.md", "exec"), names)
    assert names["mask"].nnz == 32 * 32 and names["report"].density == 0.5
    exec(compile(first, "sparse.md", "exec"), names)
    assert all(torch.equal(p, names["before"][name]) for name, p in names["model"].named_parameters())


def test_the_table_of_methods() -> None:
    from fusedadapt.lowrank import METHODS

    for text in (README.split("<!-- methods -->")[1].split("<!-- /methods -->")[0], (DOCS / "lowrank.md").read_text(encoding="utf-8")):
        listed = {name.strip("` ") for line in text.splitlines() if "arXiv" in line and line[0] == "|" for name in line.split("|")[1].split(",")}
        assert listed == set(METHODS)


def bytes_per_parameter(rule: str, width: int, state: int) -> int:
    """p read and written, g read, states read and what is stored written."""
    spec = RULES[rule]
    return 3 * width + state * (len(spec.states) + spec.stored)


def test_the_table_of_optimizers() -> None:
    table = README.split("<!-- rules -->")[1].split("<!-- /rules -->")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")][2:]
    listed = {name.strip(): row for row in rows for name in row[0].split(",")}
    assert set(listed) == set(OPTIMIZERS)
    p = torch.nn.Parameter(torch.zeros(1))
    for name, row in listed.items():
        rules = {opt._rule(opt.param_groups[0]) for chosen in OPTIMIZERS[name].examples for opt in [OPTIMIZERS[name]([p], **chosen)]}
        for cell, (width, state) in zip(row[2:5], ((4, 4), (2, 4), (2, 2)), strict=True):
            assert {int(n) for n in cell.split("/")} == {bytes_per_parameter(r, width, state) for r in rules}, (name, cell)
        # one byte where a state is coded; the scales, 4 or 8 bytes a block, are left out
        specs = [RULES[r] for r in rules - UNCODABLE.keys()]
        coded = {12 + sum((1 + (k < spec.stored)) * (4 if s in UNCODED else 1) for k, s in enumerate(spec.states)) for spec in specs}
        assert {int(n) for n in row[5].split("/")} == coded, (name, row[5], coded)

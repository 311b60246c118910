"""What the README says is true: its example runs, its table lists every optimizer with the bytes its states cost."""

import re
from pathlib import Path

from fusedadapt.optim import OPTIMIZERS
from fusedadapt.optim.spec import RULES

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(code, "README.md", "exec"), {})
    assert "AdaBelief[adabelief] cpu" in capsys.readouterr().out


def bytes_per_parameter(rule: str, width: int, state: int) -> int:
    """p read and written, g read, states read and what is stored written."""
    spec = RULES[rule]
    return 3 * width + state * (len(spec.states) + spec.stored)


def test_the_table_of_optimizers() -> None:
    import torch

    table = README.split("<!-- rules -->")[1].split("<!-- /rules -->")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")][2:]
    listed = {name.strip(): row for row in rows for name in row[0].split(",")}
    assert set(listed) == set(OPTIMIZERS)
    p = torch.nn.Parameter(torch.zeros(1))
    for name, row in listed.items():
        rules = {opt._rule(opt.param_groups[0]) for chosen in OPTIMIZERS[name].examples for opt in [OPTIMIZERS[name]([p], **chosen)]}
        for cell, (width, state) in zip(row[2:5], ((4, 4), (2, 4), (2, 2)), strict=True):
            assert {int(n) for n in cell.split("/")} == {bytes_per_parameter(r, width, state) for r in rules}, (name, cell)

"""The languages agree on rules, states, hyper-parameter and row fields."""

import torch

from fusedadapt import _core
from fusedadapt.kernels import common, optim_rules
from fusedadapt.optim import OPTIMIZERS
from fusedadapt.optim.spec import DTYPE_CODES, HYPER_FIELDS, ROW_FIELDS, RULES, hyper
from fusedadapt.reference import optim as reference


def test_field_lists() -> None:
    assert _core.HYPER_FIELDS == HYPER_FIELDS
    assert _core.ROW_FIELDS == ROW_FIELDS
    for i, name in enumerate(ROW_FIELDS):
        constant = getattr(common, name.upper(), None) or getattr(common, f"ROW_{name.upper()}", None)
        if constant is not None:
            assert getattr(constant, "value", constant) == i, name


def test_rules_have_the_same_names_and_states() -> None:
    in_core = {name: (states, stored) for name, states, stored in _core.RULES}
    assert in_core == {name: (len(rule.states), rule.stored) for name, rule in RULES.items()}
    assert set(reference.RULES) == set(RULES) == set(optim_rules.RULES)


def test_every_rule_is_reached_by_an_example() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    reached = {cls([p], **chosen)._rule(g) for cls in OPTIMIZERS.values() for chosen in cls.examples for g in cls([p], **chosen).param_groups}
    assert reached == set(RULES)


def test_rows_equal_on_host_and_reference() -> None:
    """make_row in C++ and the reference's row functions, every rule, from the first step to large counts, to the last bit of fp32."""
    fields = dict(lr=1e-3, beta1=0.9, beta2=0.98, beta3=0.9999, eps=1e-8, decoupled=0.1, sign=-1.0, momentum=0.9, dampening=0.1, nesterov=1,
                  lr_decay=0.1, rectify=1, degenerated=1, mu_base=0.96**0.004, alpha=5.0, alpha_warmup=50, beta3_warmup=50, half1=5.5, half3=6e3,
                  rho=2.0, power=1.0, warmup=10, r=0.5, weight_lr_power=2)  # fmt: skip
    values = hyper(**fields)
    as_tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in zip(HYPER_FIELDS, values, strict=True)}
    for index, (name, _, _) in enumerate(_core.RULES):
        for t in (1, 2, 3, 4, 5, 6, 7, 10, 49, 50, 51, 1000, 123456):
            aux = [torch.tensor(0.9, dtype=torch.float64)] * 2
            row, after = reference.make_rows(name, as_tensors, torch.tensor(float(t), dtype=torch.float64), aux)
            compiled, compiled_after = _core.make_row(index, values, float(t), [0.9, 0.9])
            for field, value in vars(row).items():
                ours = compiled[ROW_FIELDS.index(field)]
                assert torch.equal(torch.tensor(float(value)), torch.tensor(ours)) or (value.isnan() and ours != ours), (name, t, field)
            assert [float(a) for a in after] == compiled_after, (name, t)


def test_dtype_codes() -> None:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int16: "I16"}
    for dtype, name in names.items():
        constant = getattr(common, name, None) or getattr(common, f"DT_{name}", None) or getattr(common, f"DTYPE_{name}", None)
        if constant is not None:
            assert getattr(constant, "value", constant) == DTYPE_CODES[dtype]

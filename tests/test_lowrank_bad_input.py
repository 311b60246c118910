"""Every refusal of the low-rank family: a ValueError that names the argument, says what came and how to mend it, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_lowrank_contract import Calls

from fusedadapt.lowrank import Output, Segment, lora_linear, lora_linear_group

ops = torch.ops.fusedadapt
T, K, N, R = 5, 8, 6, 3


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def arguments(**changes: Any) -> dict[str, Any]:
    return {"x": ones(T, K), "weight": ones(N, K), "lora_A": ones(R, K), "lora_B": ones(N, R), "dropout_p": 0.5} | changes


def refused(call: Callable[[], Any], *texts: str) -> None:
    """The error has all the texts and three parts, and nothing was multiplied before it."""
    with Calls() as calls, pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert all(text in message for text in texts), message
    head, _, rest = message.partition(": expected ")
    assert head.startswith("fusedadapt.l") and rest.count("; ") >= 2 and "; got " in rest, message
    own = message.partition(":")[0].removeprefix("fusedadapt.")  # an op that refuses was called, of course
    assert not [n for n in calls.count if n != own and n.startswith(("lr_", "mm", "addmm", "mul", "dense"))], calls.count


INT, F8, META = torch.int64, torch.float8_e4m3fn, "meta"
# changed arguments -> what the message must say
REFUSALS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"x": [1.0]}, ("x as a tensor", "list")),
    ({"x": ones()}, ("x of shape [..., K]", "()")),
    ({"x": ones(3, 0)}, ("K >= 1", "(3, 0)")),
    ({"x": ones(T, K, dtype=INT)}, ("floating-point x", "int64")),
    ({"x": ones(T, K, dtype=torch.complex64)}, ("floating-point x", "complex64")),
    ({"x": ones(T, K).to_sparse()}, ("a dense x", "sparse_coo")),
    ({"x": torch.nested.nested_tensor([ones(2, K), ones(3, K)])}, ("a dense x", "a nested tensor", "to_padded_tensor")),
    ({"x": torch.nested.nested_tensor([ones(2, K), ones(3, K)], layout=torch.jagged)}, ("a dense x", "a nested tensor")),
    ({"weight": ones(N, K).to_sparse_csr()}, ("a dense weight", "sparse_csr")),
    ({"lora_A": ones(R, K).to_mkldnn()}, ("a dense lora_A", "mkldnn")),
    ({"rank_gate": ones(R).to_sparse()}, ("a dense rank_gate", "sparse_coo")),
    ({"lora_A": None, "lora_B": None, "dropout_p": 2.0}, ("dropout_p in [0, 1)", "2.0")),
    ({"lora_A": None, "lora_B": None, "scaling": "1"}, ("scaling as a number", "str")),
    ({"x": ones(T, K + 1)}, ("weight", "(6, 9)", "(6, 8)")),
    ({"weight": ones(K)}, ("weight", "(8,)", "matrix")),
    ({"weight": None}, ("weight", "NoneType")),
    ({"weight": ones(N, K - 1)}, ("weight of shape (6, 8)", "(6, 7)")),
    ({"weight": ones(N, K, dtype=torch.bfloat16)}, ("weight in x's dtype torch.float32", "bfloat16", "autocast")),
    ({"weight": ones(N, K, device=META)}, ("weight on cpu", "meta", "move")),
    ({"bias": ones(N + 1)}, ("bias of shape (6,)", "(7,)")),
    ({"bias": ones(N, dtype=torch.float16)}, ("bias in x's dtype", "float16")),
    ({"bias": 0.5}, ("bias as a tensor", "float")),
    ({"lora_A": None}, ("lora_A and lora_B together", "only one")),
    ({"lora_B": None}, ("lora_A and lora_B together", "only one")),
    ({"lora_A": ones(K)}, ("lora_A of shape (R, 8)", "(8,)")),
    ({"lora_A": ones(0, K), "lora_B": ones(N, 0)}, ("R >= 1", "(0, 8)")),
    ({"lora_A": ones(R, K + 1)}, ("lora_A of shape (3, 8)", "(3, 9)")),
    ({"lora_A": ones(R, K, dtype=INT)}, ("floating-point lora_A", "int64")),
    ({"lora_A": ones(R, K).to(F8)}, ("floating-point lora_A", "float8")),
    ({"lora_A": ones(R, K, device=META)}, ("lora_A on cpu", "meta")),
    ({"lora_A": "A"}, ("lora_A as a tensor", "str")),
    ({"lora_B": ones(R, N)}, ("lora_B of shape (6, 3)", "(3, 6)")),
    ({"lora_B": ones(N, R, dtype=torch.bool)}, ("floating-point lora_B", "bool")),
    ({"lora_B": ones(N, R, device=META)}, ("lora_B on cpu", "meta")),
    ({"rank_gate": ones(R + 1)}, ("rank_gate of shape (3,)", "(4,)")),
    ({"rank_gate": ones(R, dtype=INT)}, ("rank_gate", "int64")),
    ({"token_gate": ones(T + 1)}, ("token_gate", "(5,)", "(6,)")),
    ({"token_gate": ones(1)}, ("token_gate", "(1,)")),
    ({"token_gate": ones(T, dtype=INT)}, ("token_gate", "int64")),
    ({"token_gate": ones(T, device=META)}, ("token_gate on cpu", "meta")),
    ({"core": ones(R + 1, R)}, ("core of shape (3, 3)", "(4, 3)")),
    ({"core": ones(R)}, ("core of shape (3, R2)", "(3,)")),
    ({"core": ones(R, 0), "lora_B": ones(N, 0)}, ("core of shape (3, R2)", "(3, 0)")),
    ({"core": ones(R, 2)}, ("lora_B of shape (6, 2)", "(6, 3)")),
    ({"row_scale": ones(K)}, ("row_scale of shape (6,)", "(8,)")),
    ({"row_scale": ones(N, dtype=INT)}, ("row_scale", "int64")),
    ({"col_scale": ones(N)}, ("col_scale of shape (8,)", "(6,)")),
    ({"col_scale": ones(K, device=META)}, ("col_scale on cpu", "meta")),
    ({"activation": "swish"}, ("activation", "'swish'", "gelu_tanh", "leave it out")),
    ({"activation": ["relu"]}, ("activation", "['relu']")),
    ({"activation": torch.relu}, ("activation", "relu")),
    ({"dropout_p": 1.0}, ("dropout_p in [0, 1)", "1.0")),
    ({"dropout_p": -0.1}, ("dropout_p in [0, 1)", "-0.1")),
    ({"dropout_p": float("nan")}, ("dropout_p in [0, 1)", "nan")),
    ({"dropout_p": 1.5, "training": False}, ("dropout_p in [0, 1)", "1.5")),
    ({"dropout_p": torch.tensor(1.0)}, ("dropout_p in [0, 1)", "1.0")),
    ({"dropout_p": torch.tensor(float("nan"))}, ("dropout_p in [0, 1)", "nan")),
    ({"dropout_p": ones(2)}, ("dropout_p", "(2,)", "one element")),
    ({"dropout_p": ones(1, device=META)}, ("dropout_p on the CPU", "meta")),
    ({"dropout_p": "0.5"}, ("dropout_p as a number", "str")),
    ({"scaling": ones(2)}, ("scaling", "(2,)", "one element")),
    ({"scaling": "2"}, ("scaling as a number", "str")),
    ({"scaling": None}, ("scaling as a number", "NoneType")),
    ({"seed": 2**63}, ("seed", "9223372036854775808", "64 bits")),
    ({"seed": 1.5}, ("seed as an int", "1.5")),
    ({"seed": True}, ("seed as an int", "True")),
    ({"seed": "1"}, ("seed as an int", "'1'")),
    ({"seed": ones(1)}, ("seed", "float32", "convert")),
    ({"seed": ones(2, dtype=INT)}, ("seed", "(2,)")),
    ({"seed": ones(1, dtype=INT, device=META)}, ("seed", "meta")),
    ({"seed": "1", "dropout_p": 0.0}, ("seed as an int", "'1'")),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "texts"), REFUSALS, ids=lambda v: ", ".join(v) if isinstance(v, dict) else "")
def test_the_function_refuses(changes: dict[str, Any], texts: tuple[str, ...]) -> None:
    given = arguments(**changes)
    for name in ("x", "weight", "lora_A", "lora_B"):
        if isinstance(given[name], torch.Tensor) and given[name].is_floating_point():
            given[name] = given[name].requires_grad_()
    versions = {n: t._version for n, t in given.items() if isinstance(t, torch.Tensor) and t.device.type == "cpu"}
    state = torch.get_rng_state()
    refused(lambda: lora_linear(**given), "fusedadapt.lora_linear", *texts)
    assert all(given[n]._version == v for n, v in versions.items()) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "part", [{"rank_gate": ones(R)}, {"token_gate": ones(T)}, {"core": ones(R, R)}, {"activation": "relu"}], ids=lambda p: next(iter(p))
)
def test_parts_of_a_branch_need_the_branch(part: dict[str, Any]) -> None:
    refused(lambda: lora_linear(ones(T, K), ones(N, K), None, None, **part), "lora_A and lora_B with", "pass those too")


def test_a_group_is_checked_whole_before_it_starts() -> None:
    x, good = ones(2, 3, K), Segment(ones(R, K), ones(N, R), 1.0, 0.5, token_gate=ones(2, 3))
    refused(lambda: lora_linear_group(x, []), "at least one output", "none")
    bad = [
        (Segment(ones(R, K), ones(N + 1, R)), "lora_B"), (Segment(ones(R, K), ones(N, R), dropout_p=2.0), "dropout_p"),
        (Segment(ones(R, K), ones(N, R), token_gate=ones(3, 2)), "token_gate of x's leading shape (2, 3)"),
    ]  # fmt: skip
    for segment, text in bad:
        refused(lambda s=segment: lora_linear_group(x, [Output(ones(N, K), None, (good,)), Output(ones(N, K), None, (good, s))]), text)
    refused(lambda: lora_linear_group(x, [Output(ones(N, K), None, (good,)), Output(ones(N, K, dtype=torch.float16))]), "weight in x's dtype")


def call(op: str, *given: Any, **changes: Any) -> Any:
    """An op with good arguments, some of them replaced by name."""
    x, y, u, v = ones(T, K), ones(T, N), ones(T, R), ones(T, R)
    seed, p = torch.tensor([1]), torch.tensor([0.5])
    good: dict[str, dict[str, Any]] = {
        "lr_shrink": {"x": x, "a": ones(R, K), "seed": seed, "p": p, "ranks": [R]},
        "lr_bwd_x": {"x": x, "u": u, "seed": seed, "p": p, "ranks": [R]},
        "lr_add_": {"y": y, "u": u, "a": ones(R, N), "seed": seed, "p": p, "ranks": [R]},
        "lr_scale_add_": {"y0": y, "v": v, "a": ones(R, N), "row_scale": ones(N), "bias": ones(N)},
        "lr_bwd_dy": {"dy": y, "v": v, "b": ones(N, R), "row_scale": ones(N), "y0": ones(T, N), "need_bias": True},
        "lr_dropout": {"x": x, "seed": seed, "p": p},
        "lr_skinny_w": {"w": ones(N, K), "a": ones(R, K)},
        "lr_merge_": {"w": ones(N, K), "v": ones(N, R), "a": ones(R, K), "row_scale": ones(N)},
    }
    return getattr(ops, op)(**(good[op] | changes))


MATRICES = {
    "lr_shrink": "x a", "lr_bwd_x": "x u", "lr_add_": "y u a", "lr_scale_add_": "y0 v a", "lr_bwd_dy": "dy v b y0", "lr_dropout": "x",
    "lr_skinny_w": "w a", "lr_merge_": "w v a",
}  # fmt: skip
CASES = [(op, name) for op, names in MATRICES.items() for name in names.split()]


@pytest.mark.parametrize(("op", "name"), CASES)
def test_ops_refuse_matrices(op: str, name: str) -> None:
    for wrong, text in ((ones(T), "two dimensions"), (ones(2, 3, 4), "two dimensions"), (ones(T, K, dtype=INT), "int64")):
        before = ones(T, N)
        refused(lambda w=wrong: call(op, **{name: w}), f"fusedadapt.{op}", f"{name} ", text)
        assert torch.equal(before, ones(T, N))
    if name != MATRICES[op].split()[0]:
        refused(lambda: call(op, **{name: ones(41, 43)}), f"fusedadapt.{op}", f"{name} of shape", "(41, 43)")


@pytest.mark.parametrize(("op", "name"), [(o, n) for o, n in CASES if n != MATRICES[o].split()[0]])
def test_ops_refuse_another_device(op: str, name: str) -> None:
    shape = {"a": (R, K if op in ("lr_shrink", "lr_skinny_w", "lr_merge_") else N), "b": (N, R), "y0": (T, N)}.get(name, (T, R))
    shape = (N, R) if op == "lr_merge_" and name == "v" else shape
    refused(lambda: call(op, **{name: ones(*shape, device=META)}), f"{name} on cpu", "meta", "move")


def test_ops_refuse_vectors() -> None:
    for op, name in (("lr_scale_add_", "row_scale"), ("lr_scale_add_", "bias"), ("lr_bwd_dy", "row_scale"), ("lr_merge_", "row_scale")):
        for wrong in (ones(N + 1), ones(1, N)):
            refused(lambda w=wrong, op=op, name=name: call(op, **{name: w}), f"{name} of shape (6,)", str(tuple(wrong.shape)))
        refused(lambda op=op, name=name: call(op, **{name: ones(N, device=META)}), f"{name} on cpu", "meta")
    refused(lambda: call("lr_scale_add_", v=None), "v and a together", "both or neither")


@pytest.mark.parametrize("op", ["lr_shrink", "lr_bwd_x", "lr_add_"])
def test_ops_refuse_segments(op: str) -> None:
    one = torch.tensor([1])
    for ranks in ([R + 1], [], [R + 1, -1], [R, 0]):
        refused(lambda r=ranks: call(op, ranks=r), "ranks", str(ranks))
    for seed in (one.int(), torch.tensor([1, 2]), ones(1, dtype=INT, device=META)):
        refused(lambda s=seed: call(op, seed=s), "seed: one int64 on cpu", str(tuple(seed.shape)))
    for p in (None, ones(2), ones(1, device=META)):
        refused(lambda p=p: call(op, p=p), "p: 1 probabilities on the CPU")


@pytest.mark.parametrize("op", ["lr_shrink", "lr_bwd_x", "lr_add_", "lr_dropout"])
@pytest.mark.parametrize("p", [1.0, -0.25, float("nan")])
def test_ops_refuse_probabilities(op: str, p: float) -> None:
    """Found when the values are read, which is still before the result or the argument is touched."""
    y = ones(T, N)
    changes = {"y": y} if op == "lr_add_" else {}
    with pytest.raises(ValueError, match=rf"fusedadapt.{op}: expected p in \[0, 1\); got \[{p}\]; choose"):
        call(op, p=torch.tensor([p]), **changes)
    assert torch.equal(y, ones(T, N)) and y._version == 0


@pytest.mark.parametrize("op", ["lr_shrink", "lr_bwd_x", "lr_add_"])
def test_ops_do_not_drop_the_dropout(op: str) -> None:
    with pytest.raises(ValueError, match=rf"fusedadapt.{op}: expected a seed with p > 0; got None; pass one int64"):
        call(op, seed=None)


def test_the_widened_product_refuses() -> None:
    with pytest.raises(ValueError, match=r"fusedadapt.dense_widened: expected x of 8 columns; got \(5, 7\); pass"):
        ops.dense_widened(ones(T, 7), ones(N, K), None, False)
    seed, p = torch.tensor([1]), torch.tensor([0.5])
    for u, a, ranks, text in (
        (ones(T, 3), ones(3, K), [3], rf"expected a of shape \(3, {N}\); got shape \(3, {K}\); pass matching shapes"),
        (ones(T + 1, 3), ones(3, N), [3], rf"expected u of shape \({T}, any\); got shape \({T + 1}, 3\)"),
        (ones(T, 3), ones(3, N), [2], r"expected ranks of at least 1 that add up to 3; got \[2\]"),
    ):
        with pytest.raises(ValueError, match=rf"fusedadapt.lr_dense_add: {text}"):
            ops.dense_add(ones(T, K), ones(N, K), None, False, u, a, seed, p, ranks)

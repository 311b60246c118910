"""What the low-rank layer keeps for backward, and how many multiplications it issues: bytes by saved-tensor hooks, FLOPs by FlopCounterMode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fusedadapt as fa
from fusedadapt import dispatch
from fusedadapt.lowrank import Output, Segment, lora_linear, lora_linear_group
from fusedadapt.ops.dense import widens

T, K, N, R = 24, 4096, 1024, 16
BASE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def on_reference():
    """Neither bytes nor products depend on the backend, whose ops are leaves to both counters."""
    with fa.backend("reference"):
        yield


def new(*shape: int, dtype: torch.dtype = torch.float32, trained: bool = True) -> Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_(trained)


def saved(call: Callable[[], Any], known: Sequence[Tensor]) -> tuple[int, dict[int, int]]:
    """(bytes of all storages that autograd keeps beside those of `known`, how often each of `known` was handed over by its position)."""
    storages: dict[int, int] = {}
    times: dict[int, int] = {}
    places = {t.untyped_storage().data_ptr(): i for i, t in enumerate(known)}

    def pack(t: Tensor) -> Tensor:
        at = t.untyped_storage().data_ptr()
        if at in places:
            times[places[at]] = times.get(places[at], 0) + 1
        else:
            storages[at] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        keep = call()
    del keep
    return sum(storages.values()), times


def size(t: Tensor) -> int:
    return t.numel() * t.element_size()


def variant(name: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """(x, weight, A, B), options, row_scale or an empty tensor."""
    extras: dict[str, Any] = {
        "plain": {}, "dropout": {"dropout_p": 0.1}, "bias": {"bias": new(N, dtype=dtype), "dropout_p": 0.1},
        "gates": {"rank_gate": new(R), "token_gate": new(T), "core": new(R, R), "activation": "gelu", "dropout_p": 0.1},
        "scaling tensor": {"scaling": torch.tensor(1.0, requires_grad=True), "dropout_p": 0.1},
        "frozen row scale": {"row_scale": new(N, trained=False)},
        "row scale": {"row_scale": new(N), "dropout_p": 0.1}, "col scale": {"col_scale": new(K), "dropout_p": 0.1},
    }[name]  # fmt: skip
    return [new(T, K, dtype=dtype), new(N, K, dtype=dtype, trained=False), new(R, K), new(N, R)], extras, extras.get("row_scale", torch.empty(0))


VARIANTS = ["plain", "dropout", "bias", "gates", "scaling tensor", "frozen row scale", "row scale", "col scale"]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("base", BASE)
def test_saved_bytes(name: str, base: str) -> None:
    """At most 0.01 |x| beside x itself, which is kept by reference; and y0 where a row scale is trained: in fp32 where its product was."""
    tensors, extras, scale = variant(name, BASE[base])
    x = tensors[0]
    known = [*tensors, *(t for t in extras.values() if isinstance(t, Tensor))]
    extra, times = saved(lambda: lora_linear(*tensors, **extras), known)
    y = T * N * (4 if widens(x) else x.element_size()) if scale.requires_grad else 0
    assert extra <= 0.01 * size(x) + y, f"{extra} bytes beside x's {size(x)}"
    assert extra >= T * R * 4 + y, "U at least: the hooks see what is kept"
    assert times[0] == 1, "x itself, once"


@pytest.mark.parametrize("backend", ["reference", "cpp"])  # C++ takes the short way
def test_saved_bytes_without_gradients_of_a(backend: str) -> None:
    """x is not kept where nothing reads it again, and once where A does."""
    if absent := dispatch.available_backends("cpu")[backend]:
        pytest.skip(absent)
    tensors, _, _ = variant("plain", torch.float32)
    with fa.backend(backend):
        extra, times = saved(lambda: lora_linear(*tensors, dropout_p=0.1), tensors)
        assert times[0] == 1 and extra <= 0.01 * size(tensors[0])
        tensors[2].requires_grad_(False)
        extra, times = saved(lambda: lora_linear(*tensors, dropout_p=0.1), tensors)
        assert 0 not in times and extra <= 0.01 * size(tensors[0])
        with torch.no_grad():
            assert saved(lambda: lora_linear(*tensors), tensors) == (0, {})


@pytest.mark.parametrize("base", BASE)
def test_a_group_saves_x_once(base: str) -> None:
    x, dtype = new(T, K, dtype=BASE[base]), BASE[base]
    weights, factors = [new(N, K, dtype=dtype, trained=False) for _ in range(3)], [(new(R, K), new(N, R)) for _ in range(3)]
    known = [x, *weights, *(t for pair in factors for t in pair)]
    outputs = [Output(w, None, (Segment(a, b, 1.0, 0.1),)) for w, (a, b) in zip(weights, factors)]
    extra, times = saved(lambda: lora_linear_group(x, outputs), known)
    assert times[0] == 1 and extra <= 3 * 0.01 * size(x)


def test_leading_dimensions_do_not_copy_x() -> None:
    _, weight, a, b = variant("plain", torch.float32)[0]
    x = new(2, T // 2, K)
    extra, times = saved(lambda: lora_linear(x, weight, a, b, dropout_p=0.1), [x, weight, a, b])
    assert times[0] == 1 and extra <= 0.01 * size(x)


# ---- FLOPs

K2, N2 = 768, 1024
PRODUCT = 2 * T * K2 * N2


def counted(trained: str, **options: Any) -> int:
    """FLOPs of forward and backward with these tensors trained."""
    tensors = {"x": new(T, K2), "weight": new(N2, K2), "lora_A": new(R, K2), "lora_B": new(N2, R)} | {
        n: v for n, v in options.items() if isinstance(v, Tensor)
    }
    for name, t in tensors.items():
        t.requires_grad_(name in trained.split())
    with FlopCounterMode(display=False) as counter:
        y = lora_linear(**{**options, **tensors})
        if y.requires_grad:
            y.backward(torch.ones_like(y))
    return int(counter.get_total_flops())


def minimum(trained: str, core: bool = False) -> int:
    """The products that must be issued: x W^T, x A^T, V B^T; dY W, dY B, dU A, dY^T V, dU^T x where wanted; the core's three."""
    wanted, rank_k, rank_n, square = set(trained.split()), 2 * T * K2 * R, 2 * T * N2 * R, 2 * T * R * R
    upstream = bool(wanted - {"lora_B", "row_scale", "bias", "weight"})
    total = PRODUCT + rank_k + rank_n + square * core
    total += rank_n * upstream + rank_n * ("lora_B" in wanted) + rank_k * ("lora_A" in wanted)
    total += (PRODUCT + rank_k) * ("x" in wanted or "col_scale" in wanted) + PRODUCT * ("weight" in wanted)
    return total + core * square * (("core" in wanted) + bool(wanted & {"lora_A", "x", "col_scale", "rank_gate"}))


FLOPS = [
    ("x lora_A lora_B", {}), ("lora_A lora_B", {}), ("x lora_B", {}), ("x lora_A", {}), ("lora_B", {}), ("lora_A", {}), ("x", {}), ("", {}),
    ("x weight lora_A lora_B", {}), ("x lora_A lora_B", {"dropout_p": 0.1}), ("x lora_A lora_B bias", {"bias": new(N2)}),
    ("x lora_A lora_B row_scale", {"row_scale": new(N2), "dropout_p": 0.1}), ("row_scale", {"row_scale": new(N2)}),
    ("x lora_A lora_B rank_gate", {"rank_gate": new(R)}), ("rank_gate", {"rank_gate": new(R)}),
    ("x lora_A lora_B rank_gate token_gate", {"rank_gate": new(R), "token_gate": new(T), "activation": "silu"}),
    ("x lora_A lora_B core", {"core": new(R, R)}), ("core", {"core": new(R, R)}), ("x lora_A lora_B col_scale", {"col_scale": new(K2)}),
]  # fmt: skip


@pytest.mark.parametrize(("trained", "options"), FLOPS, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_flops(trained: str, options: dict[str, Any]) -> None:
    least = minimum(trained, "core" in options)
    assert least <= counted(trained, **options) <= 1.02 * least


@pytest.mark.parametrize("trained", ["x AB", "AB", "x one A", "one A", "x"])
def test_flops_of_a_group(trained: str) -> None:
    x, weights = new(T, K2, trained=trained.startswith("x")), [new(N2, K2, trained=False) for _ in range(3)]
    factors = [(new(R, K2, trained="AB" in trained or ("one A" in trained and i == 0)), new(N2, R, trained="AB" in trained)) for i in range(3)]
    with FlopCounterMode(display=False) as counter:
        ys = lora_linear_group(x, [Output(w, None, (Segment(a, b, 1.0, 0.1),)) for w, (a, b) in zip(weights, factors)])
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    rank_k, rank_n, into_x = 2 * T * K2 * R, 2 * T * N2 * R, x.requires_grad
    how_many_a = sum(a.requires_grad for a, _ in factors)
    least = 3 * (PRODUCT + rank_k + rank_n) + into_x * 3 * (PRODUCT + rank_k) + how_many_a * rank_k + 3 * rank_n * ("AB" in trained)
    least += rank_n * (3 if into_x else how_many_a)
    assert least <= counter.get_total_flops() <= 1.02 * least


def test_flops_of_the_formulas() -> None:
    """Of every op, against the products it stands for."""
    ops, t, k, n, r = torch.ops.fusedadapt, 5, 11, 7, 3
    x, y, u, v, a, b = new(t, k), new(t, n), new(t, r), new(t, r), new(r, k), new(n, r)
    tensors = [z.detach() for z in (x, y, u, v, a, b)]
    x, y, u, v, a, b = tensors
    calls = [
        (2 * t * k * r, lambda: ops.lr_shrink(x, a, None, None, [r])), (2 * t * k * r, lambda: ops.lr_bwd_x(x, u, None, None, [r])),
        (2 * t * k * r, lambda: ops.lr_add_(x, u, a, None, None, [r])), (2 * t * n * r, lambda: ops.lr_scale_add_(y, v, b.T, torch.ones(n), None)),
        (0, lambda: ops.lr_scale_add_(y, None, None, torch.ones(n), None)), (4 * t * n * r, lambda: ops.lr_bwd_dy(y, v, b, None, None, True)),
        (2 * t * n * r, lambda: ops.lr_bwd_dy(y, None, b, torch.ones(n), y, True)), (0, lambda: ops.lr_bwd_dy(y, None, None, None, y, True)),
        (2 * n * k * (r + 1), lambda: ops.lr_skinny_w(torch.ones(n, k), a)), (2 * n * k * r, lambda: ops.lr_merge_(torch.ones(n, k), b, a, None)),
        (2 * t * k * n, lambda: ops.dense_widened(x, torch.ones(n, k), None, False)),
        (2 * t * k * n, lambda: ops.dense_widened(y, torch.ones(n, k), None, True)),
        (2 * t * n * (k + r), lambda: ops.dense_add(x, torch.ones(n, k), None, False, v, b.T, None, None, [r])),
        (2 * t * k * (n + r), lambda: ops.dense_add(y, torch.ones(n, k), None, True, u, a, None, None, [r])),
    ]  # fmt: skip
    for least, call in calls:
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == least

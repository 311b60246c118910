"""A call whose tensors look as others did is not checked again: whatever else a tensor may be must be seen all the same, in forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fusedadapt as fa
from fusedadapt import config
from fusedadapt.lowrank import lora_linear, plain
from fusedadapt.ops import looks

T, K, N, R = 6, 24, 20, 4


@pytest.fixture(autouse=True)
def checks(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An element for each call that was checked from the start."""
    if looks.core() is None:
        pytest.skip("this torch has no functions to read with")
    found: list[None] = []
    first = plain._first
    monkeypatch.setattr(plain, "_known", {})
    monkeypatch.setattr(plain, "_first", lambda *args: found.append(None) or first(*args))
    return found


def tensors(seed: int = 0, bias: bool = True) -> dict[str, Tensor | None]:
    gen = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor | None] = {name: torch.randn(shape, generator=gen) for name, shape in {"x": (T, K), "weight": (N, K)}.items()}
    made |= {name: torch.randn(shape, generator=gen).requires_grad_() for name, shape in {"lora_A": (R, K), "lora_B": (N, R)}.items()}
    made["x"].requires_grad_()
    return made | {"bias": torch.randn(N, generator=gen) if bias else None}


def compare(given: dict[str, Tensor | None], dy: Tensor | None = None) -> None:
    """y and all gradients against fp64."""
    y = lora_linear(**given, scaling=2.0)
    trained = [name for name, t in given.items() if t is not None and t.requires_grad]
    exact = {name: None if t is None else t.detach().double().requires_grad_(name in trained) for name, t in given.items()}
    true = exact["x"] @ exact["weight"].T + 2.0 * (exact["x"] @ exact["lora_A"].T) @ exact["lora_B"].T
    true = true if exact["bias"] is None else true + exact["bias"]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype) if dy is None else dy
    near = {"rtol": 1e-4, "atol": 1e-4} if y.dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-1}
    torch.testing.assert_close(y.double(), true, **near)
    if not y.requires_grad:
        return
    found = torch.autograd.grad(y, [given[name] for name in trained], dy)
    for name, one, other in zip(trained, found, torch.autograd.grad(true, [exact[name] for name in trained], dy.double()), strict=True):
        torch.testing.assert_close(one.double(), other, **near, msg=f"gradient of {name}")


def test_one_check_serves_all_tensors_that_look_alike(checks: list[None]) -> None:
    for seed in range(4):
        compare(tensors(seed))
    assert len(checks) == 1
    compare(tensors(4, bias=False))
    assert len(checks) == 2


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "columns first": lambda t: t.t().contiguous().t() if t.dim() == 2 else t.flip(0),
    "columns apart": lambda t: torch.stack([t, t], -1)[..., 0],
    "the negative of what is there": lambda t: torch._neg_view(-t),
    "a lazy copy": lambda t: torch._lazy_clone(t),
    "an offset into larger memory": lambda t: torch.cat([t, t])[t.shape[0] :],
    "zeros without memory": lambda t: torch._efficientzerotensor(*t.shape),
    "made in inference mode": lambda t: in_inference(t),
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}


def in_inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["x", "weight", "lora_A", "lora_B", "bias"])
def test_one_tensor_is_something_else(which: str, change: str) -> None:
    given = tensors()
    compare(given)
    other = CHANGES[change](given[which].detach())
    if not other.is_inference() and change != "zeros without memory":
        other.requires_grad_(given[which].requires_grad)
    if change == "made in inference mode" and which != "bias":
        with torch.no_grad():  # autograd takes none of them
            compare(given | {which: other})
    else:
        compare(given | {which: other})
    compare(given)


def test_no_two_shapes_look_the_same() -> None:
    """Sums of shapes and offsets times a row of numbers did: [9, 3, 16] that began at element 289 and [7, 6, 16] at 0."""
    memory, found = torch.zeros(4000), {}
    for rows in range(1, 15):
        for tokens in range(1, 15):
            for offset in range(0, 320, 1 if (rows, tokens) == (9, 3) else 64):
                look = looks.core().look(memory.as_strided((rows, tokens, 16), (tokens * 16, 16, 1), offset))
                assert found.setdefault(look, (rows, tokens)) == (rows, tokens)
    assert len(found) == 14 * 14, "where a tensor begins plays no part"


def test_memory_from_elsewhere_and_places_within_it_look_alike(checks: list[None]) -> None:
    """Weights of a file that is mapped, numpy's arrays: each has an owner and an offset of its own."""
    given, memory = tensors(), torch.randn(8, T, K)
    for x in (memory[3], memory[5], *[torch.from_numpy(memory[i].numpy().copy()) for i in range(4)]):
        compare(given | {"x": x.requires_grad_()})
    assert len(checks) <= 2


def test_other_shapes_and_dtypes_are_checked_for_themselves(checks: list[None]) -> None:
    given = tensors()
    compare(given)
    compare(given | {"x": given["x"].detach().view(2, 3, K).requires_grad_()})
    compare(given | {"x": given["x"].detach()[:3].requires_grad_()})
    compare({name: t.detach().double().requires_grad_(t.requires_grad) for name, t in given.items()})
    compare({name: t.detach().bfloat16().requires_grad_(t.requires_grad) for name, t in given.items()})
    for wrong in ({"x": given["x"][:, :8]}, {"lora_B": given["lora_B"][:5]}, {"bias": given["bias"][:3]}, {"lora_A": given["lora_A"].to("meta")}):
        with pytest.raises(ValueError, match=r"fusedadapt.lora_linear: expected"):
            lora_linear(**(given | wrong))
    for wrong in (None, [1.0], "x"):
        with pytest.raises(ValueError, match=r"fusedadapt.lora_linear: expected x as a tensor"):
            lora_linear(**(given | {"x": wrong}))


@pytest.mark.parametrize("which", ["x", "weight", "lora_A", "lora_B", "bias"])
def test_nested_and_sparse_tensors_are_refused_in_our_words(which: str) -> None:
    given = tensors()
    compare(given)
    t = given[which].detach()
    for wrong in (torch.nested.nested_tensor([t, t]), torch.nested.nested_tensor([t, t], layout=torch.jagged), t.to_sparse(), t.to_mkldnn()):
        with pytest.raises(ValueError, match="expected a dense"):
            lora_linear(**(given | {which: wrong}))


DYS: dict[str, Callable[[Tensor], Tensor]] = {
    "of a sum": lambda dy: torch.ones(()).expand(T, N),
    "columns first": lambda dy: dy.t().contiguous().t(),
    "the negative of what is there": lambda dy: torch._neg_view(-dy),
    "zeros without memory": lambda dy: torch._efficientzerotensor(T, N),
    "a lazy copy": lambda dy: torch._lazy_clone(dy),
    "columns apart": lambda dy: torch.stack([dy, dy], -1)[..., 0],
}


@pytest.mark.parametrize("dy", DYS)
def test_gradients_that_lie_otherwise(dy: str) -> None:
    compare(tensors(), DYS[dy](torch.randn(T, N, generator=torch.Generator().manual_seed(3))))


@pytest.mark.parametrize("frozen", [["lora_A"], ["lora_B"], ["x"], ["x", "lora_A"], ["x", "lora_A", "lora_B"]], ids="-".join)
def test_some_gradients(frozen: list[str]) -> None:
    given = tensors()
    compare(given)
    compare({name: t.detach() if name in frozen else t for name, t in given.items()})


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_what_begins_to_be_trained_gets_its_gradient(trained: str) -> None:
    given = tensors()
    compare(given)
    given[trained].requires_grad_()
    compare(given)


def test_saved_tensor_hooks_may_bring_back_other_memory() -> None:
    def back(t: Tensor) -> Tensor:
        return t.t().contiguous().t() if t.dim() == 2 else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, back):
        compare(tensors())


def test_saved_tensor_hooks_that_bring_fp64_are_named() -> None:
    """It was a KeyError; torch's own product says that the dtypes differ."""
    with torch.autograd.graph.saved_tensors_hooks(Tensor.double, lambda t: t):
        y = lora_linear(**tensors())
    with pytest.raises(TypeError, match="expected matrices in fp32, bf16 or fp16; got torch.float64"):
        y.sum().backward()


class Widening(torch.overrides.TorchFunctionMode):
    """Somebody's mode for whom products are in fp32."""

    def __torch_function__(self, function: object, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None) -> object:
        result = function(*args, **(kwargs or {}))
        return result.float() if function is torch.nn.functional.linear else result


def in_16_bits() -> dict[str, Tensor | None]:
    return {name: t.detach().bfloat16().requires_grad_(t.requires_grad) for name, t in tensors().items()}


def test_a_function_mode_may_change_the_product() -> None:
    """The branch was added to its result as if that still were in 16 bits."""
    given = in_16_bits()
    want = lora_linear(**given).double()
    with Widening():
        y = lora_linear(**given)
    torch.testing.assert_close(y.double(), want, rtol=3e-2, atol=1e-1)


def test_backward_alone_under_autocast() -> None:
    """It changed the dtype of dY W, to which the branch was added as if it had not."""
    given = in_16_bits()
    y = lora_linear(**given)
    trained = [t for t in given.values() if t.requires_grad]
    dy = torch.randn(T, N, generator=torch.Generator().manual_seed(3)).bfloat16()
    want = torch.autograd.grad(y, trained, dy, retain_graph=True)
    with torch.autocast("cpu", torch.float16):
        found = torch.autograd.grad(y, trained, dy)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=3e-2, atol=1e-1)


def test_what_inference_mode_found_trains_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors()
    with torch.inference_mode():
        lora_linear(**given)
    monkeypatch.setattr(plain, "general_gradients", None)
    compare(given)


@pytest.mark.parametrize("lead", [(T,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["forward", "backward"])
def test_checkpointing_with_somebody_looking_on_one_time_only(lead: tuple[int, ...], bias: bool, first: bool) -> None:
    """Both ways must save the same."""
    given = tensors(bias=bias)
    given["x"] = torch.randn(*lead, K, generator=torch.Generator().manual_seed(5)).requires_grad_()
    trained = [t for t in given.values() if t is not None and t.requires_grad]
    with FlopCounterMode(display=False) if first else contextlib.nullcontext():
        y = checkpoint(lambda x: lora_linear(**(given | {"x": x}), dropout_p=0.5, seed=3), given["x"], use_reentrant=False)
    with FlopCounterMode(display=False) if not first else contextlib.nullcontext():
        found = torch.autograd.grad(y.sum(), trained)
    for one, other in zip(found, torch.autograd.grad(lora_linear(**given, dropout_p=0.5, seed=3).sum(), trained), strict=True):
        torch.testing.assert_close(one, other)


SEEDS: dict[str, Callable[[Tensor], Tensor]] = {
    "a negative": torch._neg_view,
    "a subclass": lambda t: t.as_subclass(type("Own", (Tensor,), {})),
    "a scalar": lambda t: t.squeeze(),
}


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds_are_what_they_say(seed: str) -> None:
    given, of = tensors(), SEEDS[seed](torch.tensor([7]))
    want = lora_linear(**given, dropout_p=0.5, seed=int(of))
    assert torch.equal(lora_linear(**given, dropout_p=0.5, seed=of), want)


def test_who_asks_for_a_backend_gets_it(checks: list[None]) -> None:
    given = tensors()
    compare(given)
    with config.backend("reference"):
        rows = fa.explain(lambda: lora_linear(**given))
        before = len(checks)
        compare(given)
        assert len(checks) > before, "it runs on what it was not asked for"
    assert {row[1] for row in rows} == {"reference"}
    assert {row[1] for row in fa.explain(lambda: lora_linear(**given))} == {"cpp"}
    compare(given)


def test_a_backend_that_the_environment_asks_for_later(checks: list[None], monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors()
    lora_linear(**given)
    before = len(checks)
    monkeypatch.setenv("FUSEDADAPT_BACKEND", "reference")
    lora_linear(**given)
    assert len(checks) > before, "it runs on what it was not asked for"
    monkeypatch.setenv("FUSEDADAPT_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FUSEDADAPT_BACKEND: expected one of"):
        lora_linear(**given)


def test_no_more_calls_are_remembered_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_MOST", 3)
    given = tensors()
    for tokens in (1, 2, 3, 4, 5, 6, 1):
        compare(given | {"x": given["x"].detach()[:tokens].requires_grad_()})
        assert len(plain._known) <= 3


def test_results_own_their_memory() -> None:
    """They are made like tensors of one element."""
    given = tensors()
    first = lora_linear(**given)
    kept = first.detach().clone()
    for seed in range(1, 5):
        lora_linear(**tensors(seed))
    assert torch.equal(first, kept) and first.untyped_storage().nbytes() == first.nbytes


def test_without_a_way_to_look_the_general_way_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors()
    want = lora_linear(**given)
    monkeypatch.setattr(looks, "core", lambda: None)
    assert plain.known is not None and torch.equal(lora_linear(**given), want)
    compare(given)


@pytest.mark.parametrize("name", ["weight", "bias", "lora_A", "lora_B"])
def test_a_layer_whose_parameter_is_computed(name: str) -> None:
    """The short way of the layer looks for its tensors where `nn.Module` keeps parameters; a parametrized or pruned one is elsewhere."""

    class Doubled(torch.nn.Module):
        def forward(self, a: torch.Tensor) -> torch.Tensor:
            return 2 * a

    layer, x = fa.LoRALinear(64, 48, r=4, init="gaussian"), torch.randn(60, 64)
    with torch.no_grad():
        layer.lora_B.normal_(), layer.bias.normal_()
    given = {part: getattr(layer, part).detach().clone() for part in ("weight", "bias", "lora_A", "lora_B")}

    def want() -> torch.Tensor:
        return lora_linear(x, given["weight"], given["lora_A"], given["lora_B"], bias=given["bias"], scaling=layer.scaling)

    assert torch.equal(layer(x), want())
    parametrize.register_parametrization(layer, name, Doubled())
    given[name] = 2 * given[name]
    assert torch.equal(layer(x), want())
    parametrize.remove_parametrizations(layer, name)
    prune.l1_unstructured(layer, name, 0.5)
    given[name] = getattr(layer, name).detach().clone()
    assert torch.equal(layer(x), want())

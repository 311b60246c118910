"""Second derivatives and function transforms: our autograd functions have none, and must say so instead of leaving terms out."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusedadapt as fa
from fusedadapt import dispatch
from fusedadapt.lowrank.dora import dora_linear_peft
from fusedadapt.optim import AdaHessian
from fusedadapt.sparse import Mask, MaskedLinear, SparseDelta, SparseDeltaLinear, merge, topk_mask

X = torch.linspace(-1, 1, 40).reshape(5, 8)
W = torch.linspace(-2, 1, 48).reshape(6, 8)


def factors() -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 2, 24).reshape(3, 8).requires_grad_(), torch.linspace(1, -1, 18).reshape(6, 3).requires_grad_()


def lora(x: Tensor) -> Tensor:
    return fa.lora_linear(x, W, *factors())


def gated(x: Tensor) -> Tensor:
    return fa.lora_linear(x, W, *factors(), rank_gate=torch.ones(3))


def dora_with_dropout(x: Tensor) -> Tensor:
    return dora_linear_peft(x, W, *factors(), torch.ones(6, requires_grad=True), dropout_p=0.5)


def masked(x: Tensor) -> Tensor:
    return fa.MaskedLinear.from_linear(nn.Linear(8, 6), torch.ones(6, 8, dtype=torch.bool))(x)


def quantized(x: Tensor) -> Tensor:
    return fa.quantized_linear(x, fa.quantize(W, "int8"))


def quantized_act(x: Tensor) -> Tensor:
    return fa.quantized_linear(x, fa.quantize(W, "int8"), activations="int8")


def fake_quantized(x: Tensor) -> Tensor:
    return fa.quant.fake_quantize(x, torch.tensor([0.1], requires_grad=True), torch.tensor(0.0), quant_min=-8, quant_max=7, ste="clamp")


CALLS = pytest.mark.parametrize("call", [lora, gated, dora_with_dropout, masked, quantized, quantized_act, fake_quantized])


@pytest.mark.parametrize("loss", ["constant", "by name"])
@CALLS
def test_second_derivatives_are_refused(call: Callable[[Tensor], Tensor], loss: str) -> None:
    """A gradient penalty on a sum, and a Hessian product that names what it wants: torch's once_differentiable lets both pass without the terms."""
    x = X.clone().requires_grad_()
    y = call(x)
    (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert dx.shape == x.shape
    with pytest.raises(RuntimeError, match=r"fusedadapt\..*create_graph=True"):
        torch.autograd.grad(y.sum() if loss == "constant" else y.square().sum(), x, create_graph=True)


@CALLS
def test_batches_of_gradients_are_refused_by_name(call: Callable[[Tensor], Tensor]) -> None:
    """What stands for many gradients at once has no memory, and a kernel's own complaint about that says nothing to a caller."""
    x = X.clone().requires_grad_()
    y = call(x)
    with pytest.raises(RuntimeError, match=r"fusedadapt\..*expected one gradient at a time"):
        torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True, retain_graph=True)
    assert torch.autograd.grad(y, x, torch.ones_like(y))[0].shape == x.shape


def test_a_hessian_is_not_zero_in_silence() -> None:
    """AdaHessian asks for products by name: without the refusal its estimate was 0, and its step lr / eps."""
    layer = fa.LoRALinear.from_linear(nn.Linear(8, 6), 2)
    opt = AdaHessian([p for p in layer.parameters() if p.requires_grad])
    with pytest.raises(RuntimeError, match="create_graph=True"):
        layer(X).square().sum().backward(create_graph=True)
    assert not opt.state


def test_function_transforms_are_refused() -> None:
    a, b = factors()
    calls = (
        lambda: torch.func.grad(lambda a: fa.lora_linear(X, W, a, b).sum())(a),
        lambda: torch.func.vmap(lambda x: fa.lora_linear(x, W, a, b))(X),
        lambda: torch.func.vmap(lambda x: dora_linear_peft(x, W, a, b, torch.ones(6), dropout_p=0.5, seed=1))(X),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=r"fusedadapt\.lora_linear: expected a call outside torch\.func"):
            call()
    layer = fa.LoRALinear.from_linear(nn.Linear(8, 6), 2)  # a call with other parameters is no transform
    changed = {name: p * 2 for name, p in layer.named_parameters()}
    assert torch.allclose(torch.func.functional_call(layer, changed, (X,)), 2 * layer(X))


def test_function_transforms_are_refused_in_the_sparse_family() -> None:
    """A tensor that a transform holds has no memory; plain ones may be used inside a transform all the same."""
    mask, w = torch.eye(6, 8) > 0, torch.randn(3, 6, 8)
    delta = SparseDelta.from_diff({"w": w[0]}, {"w": w[0] + 1}, k=3)
    for layer in (MaskedLinear(8, 6, mask=mask), SparseDeltaLinear(8, 6, mask=mask)):
        for call in (
            lambda layer=layer: torch.func.vmap(layer)(X),
            lambda layer=layer: torch.func.grad(lambda x: layer(x).sum())(X),
            lambda layer=layer: torch.func.jvp(layer, (X,), (X,)),
        ):
            with pytest.raises(RuntimeError, match=rf"fusedadapt\.{type(layer).__name__}: expected a call outside torch\.func"):
                call()
        changed = {name: p * 1 for name, p in layer.named_parameters()}
        assert torch.equal(torch.func.functional_call(layer, changed, (X,)), layer(X))
    for inner, op in (
        (lambda x: topk_mask(x, k=3).to_bool(), r"fusedadapt\.sparse"), (lambda x: Mask.from_bool(x > 0).to_bool(), r"fusedadapt\.sparse"),
        (lambda x: merge({"w": x}, [{"w": x}], "task_arithmetic")["w"], r"fusedadapt\.sparse"),
        (lambda x: delta.apply_({"w": x}).nnz, r"SparseDelta\.apply_"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"{op}: expected a call outside torch"):
            torch.func.vmap(inner)(w)
    assert not delta.applied
    masked = torch.func.vmap(lambda x: x * topk_mask(w[0], k=3).to_bool())(w)
    assert torch.equal(masked, w * topk_mask(w[0], k=3).to_bool())


@pytest.mark.parametrize("call", [quantized, quantized_act, fake_quantized])
def test_transforms_are_refused_in_our_words(call: Callable[[Tensor], Tensor]) -> None:
    for wrapped in (torch.func.vmap(call), torch.func.grad(lambda x: call(x).sum())):
        with pytest.raises(RuntimeError, match=r"fusedadapt\.quant.*outside torch\.func transforms"):
            wrapped(X)


@pytest.mark.parametrize("call", [lora, gated, dora_with_dropout, quantized, quantized_act, fake_quantized])
def test_backward_in_another_thread_keeps_forwards_backend(call: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's backward runs in a thread of autograd's, where no context of the caller's holds."""
    pick, heard = dispatch.pick, []
    monkeypatch.setattr(dispatch, "pick", lambda *a, **k: heard.append(pick(*a, **k)) or heard[-1])
    chosen = [vars(sys.modules[name])["_choose"] for name in dispatch._CHOOSERS if name in sys.modules]
    for cache in chosen:
        cache.cache_clear()
    with fa.backend("reference"), fa.strict():
        loss = call(X.clone().requires_grad_()).sum()
    heard.clear()
    other = threading.Thread(target=loss.backward)
    other.start()
    other.join()
    for cache in chosen:
        cache.cache_clear()
    assert {choice.backend for choice in heard} <= {"reference"}

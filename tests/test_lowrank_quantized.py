"""Low-rank adapters on packed weights: the same function as on the dequantized ones, and nothing dequantized is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedadapt as fa
from fusedadapt.lowrank import LoRALinear, Output, Segment, lora_linear, lora_linear_group
from fusedadapt.lowrank.dora import dora_linear_peft, dora_scale
from fusedadapt.testing.saved import SavedBytes

T, K, N, R = 7, 70, 36, 4
FORMATS = ["nf4", "int4", "int8", "fp8_e4m3", "mxfp4", "nvfp4", "hqq4", "ternary"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def new(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(call: Callable[..., Tensor], weight: Any, dtype: torch.dtype) -> list[Tensor]:
    """y and the gradients of x, A, B and the scale."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = [new(T, K, seed=1, dtype=dtype), new(R, K, seed=2, dtype=wide), new(N, R, seed=3, dtype=wide), new(N, seed=4, dtype=wide).abs() + 0.5]
    leaves = [t.requires_grad_() for t in given]
    y = call(weight, *leaves)
    grads = torch.autograd.grad(y, leaves, new(T, N, seed=5, dtype=dtype), allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


CALLS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda w, x, a, b, g: lora_linear(x, w, a, b, scaling=0.5),
    "dropout": lambda w, x, a, b, g: lora_linear(x, w, a, b, scaling=0.5, dropout_p=0.3, seed=3),
    "row scale": lambda w, x, a, b, g: lora_linear(x, w, a, b, bias=new(N, seed=6, dtype=x.dtype), row_scale=g, scale_bias=True),
    "no branch": lambda w, x, a, b, g: lora_linear(x, w, None, None, row_scale=g),
    "dora": lambda w, x, a, b, g: dora_linear_peft(x, w, a, b, g, scaling=0.5),
    "dora with dropout": lambda w, x, a, b, g: dora_linear_peft(x, w, a, b, g, scaling=0.5, dropout_p=0.3, seed=3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_the_dequantized_weight(format: str, name: str, dtype: torch.dtype) -> None:
    packed = fa.quantize(new(N, K, seed=0), format)
    truth = results(CALLS[name], packed.dequantize(torch.float64), torch.float64)
    ours = results(CALLS[name], packed, dtype)
    # What the same function makes of the weight rounded to x's dtype bounds the error: the packed weight is not rounded.
    dense = results(CALLS[name], packed.dequantize(dtype), dtype)
    for mine, theirs, right in zip(ours, dense, truth, strict=True):
        assert mine.dtype == theirs.dtype
        scale = right.norm()
        limit = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 0.0)
        assert (mine.double() - right).norm() <= max(limit * scale, 1.5 * (theirs.double() - right).norm())


def test_several_outputs_share_x_and_mix_dense_with_packed() -> None:
    x = new(T, K, seed=1).requires_grad_()
    weights = [fa.quantize(new(N, K, seed=7), "nf4"), new(N, K, seed=8), fa.quantize(new(5, K, seed=9), "int4", 32)]
    factors = [(new(R, K, seed=10 + i), new(w.shape[0], R, seed=20 + i)) for i, w in enumerate(weights)]
    ys = lora_linear_group(x, [Output(w, None, (Segment(a, b, 0.5),)) for w, (a, b) in zip(weights, factors)])
    dense = [w if isinstance(w, Tensor) else w.dequantize() for w in weights]
    for y, w, (a, b) in zip(ys, dense, factors):
        torch.testing.assert_close(y, x @ w.t() + 0.5 * (x @ a.t()) @ b.t())
    (dx,) = torch.autograd.grad(sum(y.sum() for y in ys), x)
    right = sum((w + 0.5 * b @ a).sum(0) for w, (a, b) in zip(dense, factors))
    torch.testing.assert_close(dx, right.expand_as(dx))


def test_nothing_dequantized_is_saved() -> None:
    layer = LoRALinear.from_linear(fa.QuantizedLinear.from_linear(nn.Linear(256, 256), "nf4"), r=4)
    x = new(16, 256, seed=1).requires_grad_()
    with SavedBytes([x, *layer.parameters(), *layer.buffers()]) as saved:
        layer(x)
    assert saved.total <= 16 * 4 * 4 + 64


def test_dora_scale_reads_a_packed_weight_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = fa.quantize(new(N, K, seed=0), "nf4")
    a, b, g = new(R, K, seed=2), new(N, R, seed=3), new(N, seed=4)
    whole = dora_scale(packed.dequantize(), a, b, 0.5, g)
    monkeypatch.setattr("fusedadapt.ops.base._PIECE", 5 * K)
    torch.testing.assert_close(dora_scale(packed, a, b, 0.5, g), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "ia3", "adalora", "ssf"])
def test_layer(method: str) -> None:
    linear = nn.Linear(K, N)
    packed = fa.QuantizedLinear.from_linear(linear, "nf4")
    torch.manual_seed(0)
    layer = LoRALinear.from_linear(packed, r=R, method=method)
    torch.manual_seed(0)
    dense = LoRALinear.from_linear(packed.to_linear(), r=R, method=method)
    x = new(T, K, seed=1)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-6)
    layer(x).sum().backward()
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained) and layer.weight.grad is None
    torch.testing.assert_close(layer.to_linear()(x), dense.to_linear()(x), rtol=1e-5, atol=1e-6)


def test_merge_quantizes_anew_and_unmerge_restores_the_bytes() -> None:
    layer = LoRALinear.from_linear(fa.QuantizedLinear.from_linear(nn.Linear(K, N), "int8"), r=R)
    nn.init.normal_(layer.lora_B, std=0.1)
    before, x = layer.quantized.clone(), new(T, K, seed=1)
    y = layer(x).detach()
    report = layer.merge(backup=False)
    assert 0.9 < report.retained < 1.1 and report.exact
    assert (layer(x) - y).norm() < 0.02 * y.norm()
    layer.unmerge()
    assert all(torch.equal(a, b) for a, b in zip(before.parts, layer.quantized.parts) if a is not None)


def test_pissa_quantizes_the_residual() -> None:
    packed = fa.QuantizedLinear.from_linear(nn.Linear(K, N, bias=False), "int8")
    w = packed.dequantize()
    layer = LoRALinear.from_linear(packed, r=R, init="pissa")
    full = layer.dequantize() + layer.scaling * layer.lora_B @ layer.lora_A
    assert (full - w).norm() < 0.02 * w.norm()


def test_refuses() -> None:
    packed = fa.quantize(new(N, K, seed=0), "nf4")
    a, b = new(R, K, seed=2), new(N, R, seed=3)
    with pytest.raises(ValueError, match=r"expected weight of shape \(36, 71\); got \(36, 70\)"):
        lora_linear(new(T, K + 1, seed=1), packed, new(R, K + 1, seed=2), b)
    with pytest.raises(ValueError, match="pass a matrix"):
        lora_linear(new(T, K, seed=1), fa.quantize(new(2, N, K, seed=0), "nf4"), a, b)
    with pytest.raises(ValueError, match="move one of them"):
        lora_linear(new(T, K, seed=1), packed.to("meta"), a, b)


def test_a_state_of_another_format_is_refused_before_a_byte_is_copied() -> None:
    """FP4 and NF4 have equal shapes and dtypes; only the format in the state tells them apart."""
    layer, other = (LoRALinear.from_linear(fa.QuantizedLinear.from_linear(nn.Linear(64, 64), name), r=R) for name in ("nf4", "fp4"))
    other.merged = True
    before, state = layer.quantized.clone(), other.state_dict()
    with pytest.raises(RuntimeError, match=r"expected nf4\S*; got fp4"):
        layer.load_state_dict(state)
    assert not layer.merged and all(torch.equal(a, b) for a, b in zip(before.parts, layer.quantized.parts) if a is not None)
    with pytest.raises(RuntimeError, match=r"expected dense weights; got fp4"):
        LoRALinear.from_linear(nn.Linear(64, 64), r=R).load_state_dict(state, strict=False)
    layer.load_state_dict(layer.state_dict())
    layer.load_state_dict(layer.state_dict() | {"_extra_state": layer.state_dict()["_extra_state"][:2]})  # as earlier releases saved it


def test_a_state_whose_bytes_are_another_shape_is_refused() -> None:
    """Rows of 63 and of 64 int4 codes are as many bytes, and IA3's vector of the outputs says nothing of the inputs."""
    layers = [LoRALinear.from_linear(fa.QuantizedLinear.from_linear(nn.Linear(k, 32, bias=False), "int4"), method="ia3") for k in (63, 64)]
    before = layers[0].dequantize()
    with pytest.raises(RuntimeError, match=r"expected int4\S*;32x63; got int4\S*;32x64"):
        layers[0].load_state_dict(layers[1].state_dict())
    assert torch.equal(layers[0].dequantize(), before)

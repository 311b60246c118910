"""`load_model_`: packed layers of another shape are found before anything is loaded; what a layer codes x to is kept in our files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fusedadapt as fa
from fusedadapt.quant import foreign, load, load_model_, packed, quantize, quantize_checkpoint, save_pretrained
from fusedadapt.quant.archive import Archive

Tensors = dict[str, Tensor]
N, K = 128, 64


def ints(bits: int = 4) -> fa.QuantizedTensor:
    return quantize(torch.randn(N, K), f"int{bits}", 32, symmetric=True, scale_dtype=torch.float16)


def gptq(bits: int, index: bool) -> Tensors:
    tensors = foreign.to_gptq(ints(bits), "0")
    return tensors if index else {name: t for name, t in tensors.items() if not name.endswith("g_idx")}


def gemv() -> Tensors:
    zeros, scales = torch.zeros(N, 4, dtype=torch.int32), torch.zeros(N, 32, dtype=torch.float16)
    return {"0.qweight": torch.zeros(N, K // 8, dtype=torch.int32), "0.qzeros": zeros, "0.scales": scales}


def hqq() -> Tensors:
    numbers = {name: torch.tensor(value, dtype=torch.int32) for name, value in {"nbits": [4], "axis": [1], "shape": [N, K]}.items()}
    parts = {"W_q": torch.zeros(N * K // 64, 32, dtype=torch.uint8), "scale": torch.ones(N * K // 32, 1), "zero": torch.ones(N * K // 32, 1)}
    return {f"0.{name}": t for name, t in (parts | numbers).items()}


def rows() -> Tensors:
    return {"0.weight": torch.ones(N, K, dtype=torch.int8), "0.SCB": torch.ones(N)}


FILES: dict[str, tuple[Callable[[], Tensors], dict[str, Any]]] = {
    "bitsandbytes nf4": (lambda: foreign.to_bitsandbytes(quantize(torch.randn(N, K), "nf4"), "0.weight"), {}),
    "bitsandbytes nested": (lambda: foreign.to_bitsandbytes(quantize(torch.randn(N, K), "fp4", double_quant=True), "0.weight"), {}),
    "bitsandbytes int8": (rows, {}),
    "gptq": (lambda: gptq(4, True), {"quant_method": "gptq"}),
    "gptq, bits by the shapes": (lambda: gptq(3, False), {}),
    "gptq, bits by the config": (lambda: gptq(8, False), {"quant_method": "gptq", "bits": 8, "group_size": 32}),
    "awq gemm": (lambda: foreign.to_awq(ints(), "0"), {"quant_method": "awq"}),
    "awq gemv": (gemv, {"quant_method": "awq", "group_size": 32}),
    "hqq": (hqq, {"quant_method": "hqq"}),
    "fp8": (lambda: foreign.to_fp8(quantize(torch.randn(N, K), "fp8_e4m3", group_axis="block"), "0.weight"), {"quant_method": "fp8"}),
}


def folder(path: Path, name: str) -> Path:
    make, said = FILES[name]
    path.mkdir()
    save_file({key: t.contiguous() for key, t in make().items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"quantization_config": said}))
    return path


def model(n: int, k: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(k, n, bias=False))


@pytest.mark.parametrize("name", FILES)
def test_another_shape_is_found_before_anything_is_loaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = folder(tmp_path / "m", name), Archive.__getitem__

    def small(self: Archive, key: str) -> Tensor:
        assert not key.endswith(("weight", "qweight", "W_q", "scales", "scale", "absmax")), key
        return read(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(Archive, "__getitem__", small)
        for n, k in ((N, 32), (64, K), (K, N)):
            target = model(n, k)
            with pytest.raises(ValueError, match=rf"0\.weight: \({N}, {K}\) in the file, \({n}, {k}\) in the model"):
                load_model_(target, source)
            assert type(target[0]) is nn.Linear
    fits = model(N, K)
    assert load_model_(fits, source) == ["0"] and fits[0].dequantize().shape == (N, K)


def test_a_shape_that_only_the_contents_tell_is_compared_before_its_layer_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = folder(tmp_path / "m", "gptq"), model(N, 32)
    monkeypatch.setattr(load, "shape", lambda *_: None)
    with pytest.raises(ValueError, match=rf"load_model_: expected 0.weight of shape \({N}, 32\); got \({N}, {K}\)"):
        load_model_(target, source)
    assert type(target[0]) is nn.Linear


@pytest.mark.parametrize("damage", [{"0.shape": torch.ones(2)}, {"0.shape": torch.ones(5000, dtype=torch.int64)}, {"0.shape": torch.tensor(3)}])
def test_a_damaged_shape_is_left_to_the_reader(damage: Tensors, tmp_path: Path) -> None:
    source = folder(tmp_path / "m", "hqq")
    save_file({**load_file(source / "model.safetensors"), **damage}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"from_hqq: 0\.shape: expected outputs and inputs"):
        load_model_(model(N, K), source)


def test_a_damaged_gptq_layer_has_no_shape() -> None:
    meta = {name: t.to("meta") for name, t in gptq(4, True).items()}
    assert foreign.gptq.shape(meta, "0", None) == (N, K) and foreign.gptq.shape(meta, "0", 5) is None
    for part in ("qweight", "scales"):
        assert foreign.gptq.shape(meta | {f"0.{part}": torch.ones(3, device="meta")}, "0", 4) is None
    assert packed.bits({"quantization_config": {"bits": 4}}) == 4


@pytest.mark.parametrize(("format", "act"), [("int8", "int8"), ("fp8_e4m3", "fp8_e4m3"), ("nf4", "int8")])
def test_activations_are_saved_and_loaded(format: str, act: str, tmp_path: Path) -> None:
    """nf4 takes none in a product; a layer that was given some is saved with them all the same, where there is a place."""
    first = nn.Sequential(nn.Linear(K, 32), nn.Linear(32, K))
    fa.quantize_model_(first, format)
    first[0].activations = act
    save_pretrained(first, tmp_path / "out")
    again = nn.Sequential(nn.Linear(K, 32), nn.Linear(32, K))
    load_model_(again, tmp_path / "out")
    assert [layer.activations for layer in again] == [act, None] and torch.equal(again[0].weight, first[0].weight)
    if format != "nf4":
        x = torch.randn(3, K)
        assert torch.equal(again(x), first(x))


@pytest.mark.parametrize("said", ["int9", 3, ["int8"], ""])
def test_damaged_activations_in_a_file_are_named(said: object) -> None:
    tensors, metadata = foreign.to_plain(quantize(torch.randn(8, K), "int8"), activations="int8")
    assert foreign.from_plain(tensors, metadata).format.name == "int8"
    text = json.loads(metadata["fusedadapt.weight"]) | {"activations": said}
    with pytest.raises(ValueError, match="expected activations among int8, fp8_e4m3, or none; got"):
        foreign.from_plain(tensors, {"fusedadapt.weight": json.dumps(text)})


@pytest.mark.parametrize("dtype", ["float99", "bf16", "float64", torch.int8, 16, ["float32"]])
def test_another_compute_dtype_is_refused_before_anything_is_read(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compute_dtype among bfloat16, float16, float32; got"):
        quantize_checkpoint(tmp_path / "missing", tmp_path / "q", compute_dtype=dtype)


def test_a_compute_dtype_may_be_torchs(tmp_path: Path) -> None:
    save_file({"up.weight": torch.randn(32, K)}, tmp_path / "m.safetensors")
    (tmp_path / "m").mkdir()
    (tmp_path / "m.safetensors").rename(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text("{}")
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", compute_dtype=torch.bfloat16)
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert said["bnb_4bit_compute_dtype"] == "bfloat16"


@pytest.mark.parametrize("size", ["2GB", 0, -1, 2.5, True, None])
def test_a_shard_size_that_is_no_positive_number_is_refused(size: Any, tmp_path: Path) -> None:
    made = model(N, K)
    fa.quantize_model_(made, "int8")
    with pytest.raises(ValueError, match="save_pretrained: expected max_shard_bytes: a positive whole number; got"):
        save_pretrained(made, tmp_path / "out", max_shard_bytes=size)
    with pytest.raises(ValueError, match="quantize: expected max_shard_bytes: a positive whole number; got"):
        quantize_checkpoint(tmp_path / "missing", tmp_path / "out", max_shard_bytes=size)
    assert not [*tmp_path.iterdir()]

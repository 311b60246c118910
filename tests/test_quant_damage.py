"""Damaged checkpoints and weights that a packing cannot hold: every refusal names the tensor, what was expected and what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from quant_cases import NAME, drawn, gptq, grouped, weight
from torch import Tensor

import fusedadapt as fa
from fusedadapt.quant import foreign, quantize
from fusedadapt.quant.foreign import diagnose


@pytest.fixture(autouse=True)
def backend() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors
    with fa.backend("reference"):
        yield
    torch.set_num_threads(threads)


def changed(tensors: dict[str, Tensor], name: str, t: Any) -> dict[str, Tensor]:
    return {each: v for each, v in {**tensors, name: t}.items() if v is not None}


def spoil(t: Tensor, value: float, at: int = 3) -> Tensor:
    t = t.clone()
    t.view(-1)[at] = value
    return t


def test_damaged_gptq_layers() -> None:
    q = quantize(weight("normal", 32, 128), "int4", 64, scale_dtype=torch.float16)
    good = foreign.to_gptq(q, NAME, version=2)
    words, zeros, scales, index = (good[f"{NAME}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    for part, t, expected in (
        ("qweight", None, "this tensor"),
        ("qzeros", None, "this tensor"),
        ("scales", None, "this tensor"),
        ("qweight", words[:-1], "128 inputs"),
        ("qweight", words.float(), "int32"),
        ("qweight", words.view(-1), "a matrix"),
        ("qweight", words[:0], "a matrix"),
        ("qzeros", zeros[:1], "2 groups"),
        ("scales", scales[:, :-1], "a column for each"),
        ("scales", scales.int(), "float32 or float16"),
        ("scales", spoil(scales, float("nan")), "finite scales"),
        ("scales", spoil(scales, float("inf")), "finite scales"),
        ("g_idx", spoil(index, 2), "groups from 0 to 1"),
        ("g_idx", spoil(index, -1), "groups from 0 to 1"),
        ("g_idx", index.float(), "integers"),
    ):
        bad = changed(good, f"{NAME}.{part}", t)
        with pytest.raises(ValueError, match=rf"from_gptq: {NAME}.{part}: expected .*{expected}.*; got .*; "):
            foreign.from_gptq(bad, NAME, version=2, bits=4)
        assert any(line.startswith(f"{NAME}.{part}: ") for line in diagnose(bad, NAME)), part
    assert "2 of 64 scales are 0" in diagnose(changed(good, f"{NAME}.scales", spoil(spoil(scales, 0), 0, 9)), NAME)[0]
    for version in ("gptq_p", "marlin", 3):
        with pytest.raises(ValueError, match="version 1"):
            foreign.from_gptq(good, NAME, version=version)
    with pytest.raises(ValueError, match="planar"):
        foreign.from_gptq(good, NAME, bits=5)
    with pytest.raises(ValueError, match="group_size="):
        short = gptq(*drawn(32, 160, 3, 4), grouped(160, 64), 4, 2)
        foreign.from_gptq(changed(short, f"{NAME}.g_idx", None), NAME, version=2)


def test_damaged_awq_layers() -> None:
    q = quantize(weight("normal", 32, 128), "int4", 64, scale_dtype=torch.float16)
    good = foreign.to_awq(q, NAME)
    for part, t, expected in (
        ("qweight", good[f"{NAME}.qweight"][:, :-1], "groups"),
        ("qweight", good[f"{NAME}.qweight"][:-1], "divides 127"),
        ("qzeros", good[f"{NAME}.qzeros"][:1], "2 groups"),
        ("qzeros", None, "this tensor"),
        ("scales", spoil(good[f"{NAME}.scales"], float("nan")), "finite"),
    ):
        bad = changed(good, f"{NAME}.{part}", t)
        with pytest.raises(ValueError, match=rf"from_awq: {NAME}\..*expected .*{expected}.*; got .*; "):
            foreign.from_awq(bad, NAME)
        assert diagnose(bad, NAME)


EXPORTS: list[tuple[Any, Tensor, str, dict[str, Any], str]] = [
    (foreign.to_awq, torch.ones(12, 64), "int4", {"group_size": 64, "scale_dtype": torch.float16}, "multiples of 8"),
    (foreign.to_awq, torch.ones(8, 70), "int4", {"group_size": 64, "scale_dtype": torch.float16}, "multiples of the group"),
    (foreign.to_awq, torch.ones(8, 64), "int3", {"group_size": 64}, "integers of 4 bits"),
    (foreign.to_gptq, torch.ones(8, 64), "nf4", {}, "integers of 2, 3, 4, 8"),
    (foreign.to_gptq, torch.ones(8, 64), "hqq4", {}, "zeros that are integers"),
    (foreign.to_gptq, torch.ones(8, 64), "int4", {"group_size": 8, "group_axis": "n"}, "along its rows"),
    (foreign.to_gptq, torch.ones(8, 64), "ternary", {}, "integers of 2, 3, 4, 8"),
    (foreign.to_bitsandbytes, torch.ones(8, 64), "int4", {}, "nf4 or fp4"),
    (foreign.to_bitsandbytes, torch.ones(8, 64).double(), "nf4", {}, "float32, float16 or bfloat16"),
    (foreign.to_fp8, torch.ones(8, 64), "int8", {}, "fp8_e4m3 or fp8_e5m2"),
    (foreign.to_fp8, torch.ones(8, 64), "fp8_e4m3", {"group_axis": "n"}, "per row, tile or tensor"),
]


@pytest.mark.parametrize("case", EXPORTS, ids=lambda case: f"{case[0].__name__} {case[2]} {case[3]}")
def test_what_cannot_be_written_is_refused(case: Any) -> None:
    write, w, name, options, expected = case
    q = quantize(w, name, **options)
    with pytest.raises(ValueError, match=rf"{write.__name__}: up: expected .*{expected}"):
        write(q, "up")


def with_state(good: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    where = next(name for name in good if "quant_state" in name)
    state = json.loads(bytes(good[where].tolist()))
    text = json.dumps({**state, **changes}).encode()
    return changed(good, where, torch.tensor(list(text), dtype=torch.uint8))


def test_damaged_bitsandbytes_layers() -> None:
    good = foreign.to_bitsandbytes(quantize(weight("normal", 40, 512), "nf4", double_quant=True), f"{NAME}.weight")
    name, where = f"{NAME}.weight", f"{NAME}.weight.quant_state.bitsandbytes__nf4"
    for bad, expected in (
        (changed(good, name, None), rf"{name}: expected this tensor"),
        (changed(good, name, good[name][:-1]), rf"{name}: expected 10240 bytes"),
        (changed(good, f"{name}.absmax", good[f"{name}.absmax"][:-1]), r"absmax: expected shape \(320,\)"),
        (changed(good, f"{name}.absmax", None), "absmax: expected this tensor"),
        (changed(good, f"{name}.nested_absmax", None), "absmax: expected uint8 beside nested_absmax"),
        (changed(good, f"{name}.nested_absmax", good[f"{name}.nested_absmax"][:1]), r"nested_absmax: expected shape \(2,\)"),
        (changed(good, f"{name}.nested_absmax", spoil(good[f"{name}.nested_absmax"], float("nan"), 0)), "finite scales"),
        (changed(good, f"{name}.quant_map", good[f"{name}.quant_map"] * 2), "quant_map: expected the nf4 values"),
        (changed(good, f"{name}.nested_quant_map", good[f"{name}.nested_quant_map"][:-1]), "nested_quant_map: expected the dynamic"),
        (changed(good, where, good[where][:-5]), "the bytes of a JSON object"),
        (changed(good, where, good[where].float()), "the bytes of a JSON object"),
        (changed(good, where, None), "quant_state.bitsandbytes__nf4: expected this tensor"),
        (with_state(good, blocksize=48), "power of two"),
        (with_state(good, blocksize="64"), "blocksize: int"),
        (with_state(good, shape=[40, 511]), "expected 10220 bytes"),
        (with_state(good, shape=[-40, -512]), "whole numbers"),
        (with_state(good, quant_type="fp4"), "as the tensor's name says"),
        (with_state(good, dtype="int8"), "dtype among"),
        (with_state(good, nested_blocksize=128), "nested_blocksize 256"),
        (with_state(good, nested_offset=None), "nested_offset"),
    ):
        with pytest.raises(ValueError, match=rf"from_bitsandbytes: .*{expected}"):
            foreign.from_bitsandbytes(bad, name)
        assert diagnose(bad, NAME), expected


def test_damaged_files_of_ours_and_fp8() -> None:
    q = quantize(weight("normal", 40, 512), "nf4", double_quant=True)
    good, metadata = foreign.to_plain(q, "up.weight")
    said = json.loads(metadata["fusedadapt.up.weight"])
    for bad, described, expected in (
        (changed(good, "up.weight", None), said, "up.weight: expected this tensor"),
        (changed(good, "up.weight", good["up.weight"][:-1]), said, "up.weight: expected shape"),
        (changed(good, "up.weight", good["up.weight"].to(torch.int8)), said, "up.weight: expected torch.uint8"),
        (changed(good, "up.weight_super", None), said, "up.weight_super: expected this tensor"),
        (changed(good, "up.weight_zero", torch.ones(1)), said, "up.weight_zero: expected no such tensor"),
        (good, {**said, "format": "nf5"}, "one of the formats"),
        (good, {**said, "format": "nf4,block=1x0"}, "block cannot be"),
        (good, {**said, "shape": [40, "x"]}, "whole numbers"),
        (good, {**said, "dtype": "int8"}, "dtype among"),
        (good, [], "JSON with"),
        (good, {}, "none of 'format'"),
    ):
        with pytest.raises(ValueError, match=rf"from_plain: .*{expected}"):
            foreign.from_plain(bad, {"fusedadapt.up.weight": json.dumps(described)}, "up.weight")
        assert diagnose(bad, "up", metadata={"fusedadapt.up.weight": json.dumps(described)})
    with pytest.raises(ValueError, match="none of"):
        foreign.from_plain(good, {}, "up.weight")
    for name, value in (("ternary", 0xFF), ("int8", 0x80), ("fp8_e4m3", 0x7F), ("fp8_e5m2", 0xFC)):
        tensors, metadata = foreign.to_plain(quantize(weight("normal", 4, 64), name))
        tensors["weight"].view(torch.uint8)[1, 1] = value
        with pytest.raises(ValueError, match="1 bytes out of range"):
            foreign.from_plain(tensors, metadata)
    for name, byte in (("mxfp4", 255), ("nvfp4", 0x7F), ("int4", None), ("hqq4", None)):
        tensors, metadata = foreign.to_plain(quantize(weight("normal", 4, 64), name), f"{NAME}.weight")
        where = f"{NAME}.weight_scale"
        tensors[where].view(-1)[1] = float("nan") if byte is None else byte
        assert foreign.from_plain(tensors, metadata, f"{NAME}.weight").dequantize().isnan().any()  # a weight of NaN is written and read as such
        (found,) = diagnose(tensors, NAME, metadata=metadata)
        assert found.startswith(f"{where}: expected finite scales; got 1 of ")
    fp8 = foreign.to_fp8(quantize(weight("normal", 200, 300), "fp8_e4m3", group_axis="block"))
    for bad, expected in (
        (changed(fp8, "weight_scale_inv", fp8["weight_scale_inv"][:1]), "weight_scale_inv: expected 1, 200 or 2 x 3 scales"),
        (changed(fp8, "weight_scale_inv", spoil(fp8["weight_scale_inv"], float("nan"))), "finite"),
        (changed(fp8, "weight_scale_inv", None), "weight_scale_inv: expected this tensor"),
        (changed(fp8, "weight", fp8["weight"].float()), "float8_e4m3fn"),
    ):
        with pytest.raises(ValueError, match=rf"from_fp8: .*{expected}"):
            foreign.from_fp8(bad)
        if bad["weight"].dtype != torch.float32:
            assert diagnose(bad, "")


def test_steps_below_a_row_are_checked() -> None:
    tensors, metadata = foreign.to_plain(quantize(weight("normal", 4, 256), "fp4_e2m1"), f"{NAME}.weight")
    for bad in (0, 115, 128, 255):
        broken = changed(tensors, f"{NAME}.weight_scale", spoil(tensors[f"{NAME}.weight_scale"], bad))
        with pytest.raises(ValueError, match="weight_scale: expected bytes from 116 to 127; got 1 others"):
            foreign.from_plain(broken, metadata, f"{NAME}.weight")
        assert any("bytes from 116 to 127" in line for line in diagnose(broken, NAME, metadata=metadata))


def strided(t: Tensor) -> Tensor:
    """The same numbers, every second one in memory."""
    return t.repeat_interleave(2, -1)[..., ::2]


def across(t: Tensor) -> Tensor:
    """Of two dimensions, and no view of one."""
    return torch.stack([t.view(-1), t.view(-1)]).t()


def hqq_layer() -> dict[str, Tensor]:
    w = {"W_q": torch.arange(128, dtype=torch.uint8).view(4, 32), "scale": torch.rand(8, 1) + 1, "zero": torch.rand(8, 1)}
    return {f"{NAME}.{part}": t for part, t in (w | {"nbits": torch.tensor(4), "shape": torch.tensor([8, 32])}).items()}


def int8_layer() -> dict[str, Tensor]:
    return {f"{NAME}.weight": torch.ones(4, 8, dtype=torch.int8), f"{NAME}.SCB": torch.rand(4), f"{NAME}.weight_format": torch.tensor(0)}


def bnb_layer(**options: Any) -> dict[str, Tensor]:
    return foreign.to_bitsandbytes(quantize(weight("normal", 32, 128), "nf4", **options), f"{NAME}.weight")


def test_strided_scales_are_read() -> None:
    for make, read, parts in (
        (bnb_layer, lambda t: foreign.from_bitsandbytes(t, f"{NAME}.weight"), ("weight.absmax",)),
        (lambda: bnb_layer(double_quant=True), lambda t: foreign.from_bitsandbytes(t, f"{NAME}.weight"), ("weight.absmax", "weight.nested_absmax")),
        (int8_layer, lambda t: foreign.from_bitsandbytes(t, f"{NAME}.weight"), ("weight", "SCB")),
        (hqq_layer, lambda t: foreign.from_hqq(t, NAME), ("W_q", "scale", "zero", "shape")),
    ):
        good = make()
        bad = good | {f"{NAME}.{part}": strided(good[f"{NAME}.{part}"]) for part in parts}
        assert torch.equal(read(bad).dequantize(), read(good).dequantize()) and not diagnose(bad, NAME)


@pytest.mark.parametrize(
    ("make", "part", "change", "said"),
    [
        (bnb_layer, "weight.absmax", across, "weight.absmax: expected shape"),
        (bnb_layer, "weight.quant_map", across, "weight.quant_map: expected the nf4 values"),
        (lambda: bnb_layer(double_quant=True), "weight.nested_absmax", across, "weight.nested_absmax: expected shape"),
        (int8_layer, "SCB", across, "SCB: expected shape"),
        (int8_layer, "weight_format", lambda t: t[None][:0], "weight_format: expected 0, rows in their order; got nothing"),
        (int8_layer, "weight_format", lambda t: t + 1, "weight_format: expected 0, rows in their order; got 1"),
        (hqq_layer, "shape", across, "shape: expected outputs and inputs"),
        (hqq_layer, "shape", lambda t: t.to(torch.complex64), "shape: expected outputs and inputs"),
        (hqq_layer, "nbits", lambda t: t.to(torch.complex64), "nbits: expected one of 2, 4, 8"),
    ],
)
def test_parts_of_strange_shapes_are_named(make: Any, part: str, change: Any, said: str) -> None:
    tensors = make()
    tensors[f"{NAME}.{part}"] = change(tensors[f"{NAME}.{part}"])
    read = foreign.from_hqq if make is hqq_layer else foreign.from_bitsandbytes
    assert any(f"{NAME}.{said}" in text for text in diagnose(tensors, NAME))
    with pytest.raises(ValueError, match=f"{NAME}.{said}"):
        read(tensors, NAME if make is hqq_layer else f"{NAME}.weight")


def test_parts_of_ours_in_another_dtype_are_named() -> None:
    for name, part, change in (
        ("int8", "weight", lambda t: strided(t.to(torch.int16))),
        ("ternary", "weight", lambda t: strided(t.to(torch.int32))),
        ("fp4_e2m1", "weight_scale", lambda t: t.to(torch.complex64)),
    ):
        tensors, metadata = foreign.to_plain(quantize(weight("normal", 32, 128), name), f"{NAME}.weight")
        tensors[f"{NAME}.{part}"] = change(tensors[f"{NAME}.{part}"])
        (said,) = diagnose(tensors, NAME, metadata=metadata)
        assert said.startswith(f"{NAME}.{part}: expected torch.")

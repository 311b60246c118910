"""`python -m fusedadapt doctor CHECKPOINT`: every kind of damage is found, named and changes the exit code; sound files pass."""

from __future__ import annotations

import contextlib
import copy
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import quant_models as models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fusedadapt as fa
from fusedadapt import cli
from fusedadapt.quant import foreign, format_of, linears, quantize
from fusedadapt.quant.archive import find, read_header
from fusedadapt.quant.load import load_model_
from fusedadapt.quant.stream import quantize_checkpoint

LAYER = models.LINEARS[3]


def doctor(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(["doctor", str(path)])
    said = capsys.readouterr().out
    assert said.isascii() and "\x1b" not in said and str(path.parent) not in said, "it is to be pasted"
    return code, said


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make(tmp_path, monkeypatch) -> Callable[..., Path]:
    monkeypatch.setattr(linears, "_installed", lambda: False)
    source = models.write(tmp_path / "source", models.state())

    def written(format: str = "nf4", **options: object) -> Path:
        quantize_checkpoint(source, tmp_path / "made", format, **options)  # type: ignore[arg-type]
        return tmp_path / "made"

    return written


def foreign_folder(folder: Path, kind: str, damage: Callable[[dict[str, Tensor]], object] = lambda t: None, **said: object) -> Path:
    """A folder with layers of a GPTQ or AWQ checkpoint."""
    tensors: dict[str, Tensor] = {}
    state = models.state()
    for name in models.LINEARS:
        qt = quantize(state.pop(f"{name}.weight"), "int4", 32, symmetric=kind == "gptq", scale_dtype=torch.float16)
        tensors |= foreign.to_gptq(qt, name) if kind == "gptq" else foreign.to_awq(qt, name)
    damage(tensors)
    config = {**models.CONFIG, "quantization_config": {"quant_method": kind, "bits": 4, "group_size": 32, **said}}
    return models.write(folder, {**state, **{name: t.contiguous() for name, t in tensors.items()}}, config=config)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "int8", "hqq4", "fp8_e4m3", "mxfp4", "nvfp4", "ternary"])
def test_what_we_write_is_sound(format, make, capsys):
    code, said = doctor(make(format), capsys)
    assert code == 0 and "verdict: nothing wrong was found" in said, said
    assert f"{len(models.LINEARS)} layers as {'bitsandbytes' if format in ('nf4', 'fp4') else 'ours'}" in said


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_sound_files_of_others_pass_and_load(kind, tmp_path, capsys):
    folder = foreign_folder(tmp_path / "m", kind)
    code, said = doctor(folder, capsys)
    assert code == 0 and f"{len(models.LINEARS)} layers as {kind}" in said, said
    model = models.Causal()
    assert len(load_model_(model, folder)) == len(models.LINEARS)
    w = models.state()[f"{LAYER}.weight"]
    assert (model.get_submodule(LAYER).dequantize().float() - w).norm() < 0.2 * w.norm()


def described_folder(folder: Path, kind: str) -> tuple[Path, Tensor]:
    """A sound layer that only config.json describes in full, and its weight: fp8 in tiles of 64; GPTQ without g_idx, its last group short; AWQ's
    "gemv", in whose padded scales several group sizes fit."""
    k = {"fp8": 192, "gptq": 160, "awq": 256}[kind]
    w, said = torch.randn(64, k, generator=torch.Generator().manual_seed(0)), {"bits": 4, "group_size": 64}
    if kind == "fp8":
        qt = quantize(w, replace(format_of("fp8_e4m3"), block=(64, 64)))
        tensors, said = foreign.to_fp8(qt, "l.weight"), {"weight_block_size": [64, 64]}
    elif kind == "gptq":
        qt = quantize(w, "int4", 64, scale_dtype=torch.float16)
        tensors = foreign.to_gptq(qt, "l")
        del tensors["l.g_idx"]
    else:
        qt, said["group_size"] = quantize(w, "int4", -1, scale_dtype=torch.float16), -1
        assert qt.zero is not None
        zeros = torch.nn.functional.pad(qt.zero.to(torch.int32), (0, 7))
        tensors = {"l.qweight": qt.qdata.view(torch.int32), "l.qzeros": zeros[:, :1].clone()}
        tensors["l.scales"] = torch.nn.functional.pad(qt.scale, (0, 7))
    config = {"quantization_config": {"quant_method": kind, **said}}
    return models.write(folder, tensors, config=config), qt.dequantize(torch.float32)


@pytest.mark.parametrize("kind", ["fp8", "gptq", "awq"])
def test_the_config_is_asked_where_shapes_do_not_say(kind, tmp_path, capsys):
    folder, w = described_folder(tmp_path / "m", kind)
    code, said = doctor(folder, capsys)
    assert code == 0 and f"1 layers as {kind}" in said, said
    model = torch.nn.ModuleDict({"l": torch.nn.Linear(w.shape[1], 64, bias=False)})
    load_model_(model, folder)
    assert torch.equal(model["l"].dequantize(torch.float32), w)
    config = json.loads((folder / "config.json").read_text())
    for key in ("weight_block_size", "group_size", "bits"):
        config["quantization_config"][key] = [[], "64"]
    (folder / "config.json").write_text(json.dumps(config))
    doctor(folder, capsys)  # whatever it finds, without a traceback
    with contextlib.suppress(ValueError):
        load_model_(torch.nn.ModuleDict({"l": torch.nn.Linear(w.shape[1], 64, bias=False)}), folder)


def hqq_tensors(w: Tensor, name: str, bits: int, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """A layer as HQQ's loops write it, and what it means."""
    rows = w.reshape(-1, group)
    lo, hi = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = ((hi - lo) / ((1 << bits) - 1)).half()
    zero = (-lo / scale.float()).half()
    codes = (rows / scale.float() + zero.float()).round().clamp(0, (1 << bits) - 1).to(torch.uint8)
    per = 8 // bits
    step = len(codes) // per
    packed = sum(codes[i * step : (i + 1) * step].int() << (8 - bits - i * bits) for i in range(per)).to(torch.uint8)  # type: ignore[union-attr]
    numbers = {"nbits": [bits], "axis": [1], "group_size": [group], "shape": list(w.shape), "view_as_float": [0], "packing": list(b"4bit_u8")}
    tensors = {"W_q": packed, "scale": scale, "zero": zero} | {part: torch.tensor(given, dtype=torch.int32) for part, given in numbers.items()}
    return {f"{name}.{part}": t for part, t in tensors.items()}, ((codes.float() - zero.float()) * scale.float()).view(w.shape)


def int8_tensors(w: Tensor, name: str) -> tuple[dict[str, Tensor], Tensor]:
    """A Linear8bitLt as bitsandbytes saves it."""
    largest = w.abs().amax(1)
    codes = (w * (127 / largest)[:, None]).round().to(torch.int8)
    tensors = {f"{name}.weight": codes, f"{name}.SCB": largest, f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes.float() * (largest / 127)[:, None]


def other_folder(folder: Path, method: str, bits: int, damage: Callable[[dict[str, Tensor]], object] = lambda t: None):
    tensors, state, wanted = {}, models.state(), {}
    for name in models.LINEARS:
        w = state.pop(f"{name}.weight").float()
        found, wanted[name] = hqq_tensors(w, name, bits, 16) if method == "hqq" else int8_tensors(w, name)
        tensors |= found
    damage(tensors)
    return models.write(
        folder, {**state, **tensors}, config={**models.CONFIG, "quantization_config": {"quant_method": method, "load_in_8bit": True}}
    ), wanted


@pytest.mark.parametrize(("method", "bits"), [("hqq", 2), ("hqq", 4), ("hqq", 8), ("bitsandbytes", 8)])
def test_hqq_and_8_bit_bitsandbytes_files_load_exactly(method, bits, tmp_path, capsys):
    folder, wanted = other_folder(tmp_path / "m", method, bits)
    code, said = doctor(folder, capsys)
    assert code == 0 and f"{len(models.LINEARS)} layers as {method}" in said, said
    model = models.Causal()
    assert len(load_model_(model, folder)) == len(models.LINEARS)
    for name, w in wanted.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.dequantize(torch.float32), w), name
        x = torch.randn(3, w.shape[1])
        torch.testing.assert_close(layer(x) - (0 if layer.bias is None else layer.bias), x @ w.t(), rtol=1e-4, atol=1e-4)


OTHER_DAMAGE = [
    ("hqq", lambda t: t.pop(f"{LAYER}.scale"), f"{LAYER}.scale"),
    ("hqq", lambda t: t.update({f"{LAYER}.W_q": t[f"{LAYER}.W_q"][:-1].clone()}), f"{LAYER}.W_q: expected"),
    ("hqq", lambda t: t[f"{LAYER}.axis"].fill_(0), f"{LAYER}.axis: expected 1"),
    ("hqq", lambda t: t[f"{LAYER}.nbits"].fill_(3), f"{LAYER}.nbits"),
    ("hqq", lambda t: t[f"{LAYER}.zero"].view(-1)[0:1].fill_(torch.nan), f"{LAYER}.zero: expected finite"),
    ("bitsandbytes", lambda t: t.update({f"{LAYER}.SCB": t[f"{LAYER}.SCB"][:-1].clone()}), f"{LAYER}.SCB: expected shape"),
    ("bitsandbytes", lambda t: t[f"{LAYER}.weight"][0].fill_(-128), f"{LAYER}.weight: expected codes"),
    ("bitsandbytes", lambda t: t[f"{LAYER}.weight_format"].fill_(1), f"{LAYER}.weight_format"),
    ("bitsandbytes", lambda t: t.pop(f"{LAYER}.weight"), f"{LAYER}.weight"),
]


@pytest.mark.parametrize(("method", "damage", "said"), OTHER_DAMAGE)
def test_damaged_hqq_and_8_bit_layers_are_named(method, damage, said, tmp_path, capsys):
    folder, _ = other_folder(tmp_path / "m", method, 4, damage)
    code, text = doctor(folder, capsys)
    assert code == 1 and said in " ".join(text.split()), text
    with pytest.raises(ValueError, match=LAYER):
        load_model_(models.Causal(), folder)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_act_order_files_load_exactly(bits, tmp_path, capsys):
    """desc_act: groups scattered over the inputs. The layer keeps the order; weights, products, gradients, states are the file's."""
    tensors, state, wanted = {}, models.state(), {}
    for i, name in enumerate(models.LINEARS):
        w = state.pop(f"{name}.weight")
        order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(i))
        qt = quantize(w[:, order], f"int{bits}", 32, symmetric=False, scale_dtype=torch.float16)
        tensors |= foreign.to_gptq(qt, name, order=order)
        wanted[name] = qt.dequantize(torch.float32)[:, order.argsort()]
    config = {**models.CONFIG, "quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": True}}
    folder = models.write(tmp_path / "m", {**state, **{name: t.contiguous() for name, t in tensors.items()}}, config=config)
    code, said = doctor(folder, capsys)
    assert code == 0, said
    model = models.Causal()
    assert len(load_model_(model, folder)) == len(models.LINEARS)
    for name, w in wanted.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.dequantize(torch.float32), w) and torch.equal(layer.to_linear(torch.float32).weight, w)
        x = torch.randn(5, w.shape[1], dtype=torch.float64, requires_grad=True)
        y = copy.deepcopy(layer).double()(x)
        torch.testing.assert_close(y, x @ w.double().t() + (0 if layer.bias is None else layer.bias.double()))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], w.double().sum(0).expand_as(x))
    assert "act-order" in str(fa.explain(model))
    again = models.Causal()
    load_model_(again, folder)
    again.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="act-order"):
        fa.LoRALinear.from_linear(model.get_submodule(LAYER))
    with pytest.raises(ValueError, match="every input from 0"):
        fa.QuantizedLinear(qt, None, torch.zeros(w.shape[1], dtype=torch.int64))


def test_floating_point_models_are_no_fault(tmp_path, capsys):
    code, said = doctor(models.write(tmp_path / "m", models.state(), shards=3), capsys)
    assert code == 0 and "no layer of a known format" in said and "3 (model-00001" in said


DAMAGE = {
    "absmax of another layer": (lambda t: t.update({f"{LAYER}.weight.absmax": t[f"{LAYER}.weight.absmax"][:-3].clone()}), f"{LAYER}.weight.absmax"),
    "absmax missing": (lambda t: t.pop(f"{LAYER}.weight.absmax"), f"{LAYER}.weight.absmax"),
    "state missing": (lambda t: t.pop(f"{LAYER}.weight.quant_state.bitsandbytes__nf4"), f"{LAYER}.weight.quant_state"),
    "packed weight cut": (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:-8].clone()}), f"{LAYER}.weight"),
    "scale is NaN": (lambda t: t[f"{LAYER}.weight.absmax"].view(-1).__setitem__(5, torch.nan), f"{LAYER}.weight.absmax"),
    "state is no JSON": (lambda t: t[f"{LAYER}.weight.quant_state.bitsandbytes__nf4"].fill_(7), f"{LAYER}.weight.quant_state"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_layers_are_named(what, make, capsys):
    folder = make()
    damage, name = DAMAGE[what]
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    code, said = doctor(folder, capsys)
    assert code == 1 and f"FAULT {name}" in said and "verdict: 1 FAULT" in said, said
    with pytest.raises(ValueError, match=LAYER.replace(".", r"\.")):
        load_model_(models.Causal(), folder)


def test_damaged_scales_of_ours_are_named(make, capsys):
    folder = make("int4")
    file = folder / "model.safetensors"
    header = read_header(file)
    tensors = load_file(file)
    tensors[f"{LAYER}.weight_scale"] = tensors[f"{LAYER}.weight_scale"][:, :1][:5].clone()
    save_file(tensors, file, metadata=header.metadata)
    code, said = doctor(folder, capsys)
    assert code == 1 and f"FAULT {LAYER}.weight_scale" in said, said


@pytest.mark.parametrize(
    ("kind", "damage", "name"),
    [
        ("gptq", lambda t: t.update({f"{LAYER}.qzeros": t[f"{LAYER}.qzeros"] + 0x11111111}), f"{LAYER}.qzeros"),
        ("gptq", lambda t: t[f"{LAYER}.g_idx"].__setitem__(3, 99), f"{LAYER}.g_idx"),
        ("gptq", lambda t: t.pop(f"{LAYER}.scales"), f"{LAYER}.scales"),
        ("awq", lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"][:, :-8]}), f"{LAYER}.scales"),
        ("awq", lambda t: t[f"{LAYER}.scales"].__setitem__((0, 0), torch.inf), f"{LAYER}.scales"),
    ],
)
def test_damaged_gptq_and_awq_layers_are_named(kind, damage, name, tmp_path, capsys):
    code, said = doctor(foreign_folder(tmp_path / "m", kind, damage), capsys)
    assert code == 1 and f"FAULT {name}" in said, said


def test_config_and_files_must_agree(make, tmp_path, capsys):
    folder = make()
    config = json.loads((folder / "config.json").read_text())
    cases: list[tuple[dict[str, object], str]] = [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; the files hold bitsandbytes"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4'; the files hold nf4"),
        ({"load_in_4bit": False}, "expected load_in_4bit: true"),
        ({"llm_int8_skip_modules": ["up_proj"]}, "also names quantized layers, which will not load: model.layers."),
        ({"llm_int8_skip_modules": "lm_head"}, "a list of names"),
        ({"quant_method": ["bitsandbytes"]}, "quant_method: a name"),
        ({"quant_method": {"a": 1}}, "quant_method: a name"),
    ]
    for change, match in cases:
        changed = {**config, "quantization_config": {**config["quantization_config"], **change}}
        (folder / "config.json").write_text(json.dumps(changed))
        code, said = doctor(folder, capsys)
        assert code == 1 and match in said, said
    for text, match in [("{", "not readable as JSON"), ("[]", "expected an object"), (json.dumps({"a": 1}), "there is none: loaders")]:
        (folder / "config.json").write_text(text)
        code, said = doctor(folder, capsys)
        assert code == 1 and match in said, said


def test_shards_and_their_index(tmp_path, capsys):
    folder = models.write(tmp_path / "m", models.state(), shards=3)
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    mapping = json.loads(text)["weight_map"]
    lost = next(name for name, file in mapping.items() if "00002" in file)
    (folder / "model-00002-of-00003.safetensors").rename(tmp_path / "kept")
    code, said = doctor(folder, capsys)
    assert code == 1 and "model-00002-of-00003.safetensors: this shard is missing; the index puts " in said
    (tmp_path / "kept").rename(folder / "model-00002-of-00003.safetensors")
    index.write_text(json.dumps({"weight_map": {**mapping, lost: "model-00001-of-00003.safetensors", "ghost": "model-00003-of-00003.safetensors"}}))
    code, said = doctor(folder, capsys)
    assert code == 1 and f"it puts {lost} into model-00001" in said and "it puts ghost into" in said
    index.write_text(json.dumps({"weight_map": {name: file for name, file in mapping.items() if name != lost}}))
    assert f"it does not name {lost}" in doctor(folder, capsys)[1]
    for broken in ("{", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": "b\\u0000"}}'):
        index.write_text(broken)
        assert "model.safetensors.index.json: expected" in doctor(folder, capsys)[1]
    index.write_text(text)
    assert doctor(folder, capsys)[0] == 0


def test_headers_that_lie(tmp_path, capsys):
    good = models.write(tmp_path / "m", {"a": torch.arange(6.0), "b": torch.ones(4, dtype=torch.int32)})
    file = good / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])

    def rewritten(change: Callable[[dict], object], tail: bytes = b"") -> bytes:
        new = json.loads(json.dumps(table))
        change(new)
        text = json.dumps(new).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :] + tail

    cases = [
        (data[:5], "cut or no safetensors file: 5 bytes"),
        (data[:20], "cut or no safetensors file"),
        (struct.pack("<Q", 1 << 60) + data[8:], "cut or no safetensors file"),
        (data[:8] + b"\xff" * length + data[8 + length :], "its header is not the JSON"),
        (data[:-4], "cut: it needs bytes up to"),
        (data + b"more", "4 bytes after the last tensor belong to none"),
        (rewritten(lambda t: t["a"].update(shape=[7])), "tensor a: F32 [7] takes 28 bytes; the header gives it 24"),
        (rewritten(lambda t: t["a"].update(dtype="F7")), "tensor a: expected a dtype of the safetensors format; got 'F7'"),
        (rewritten(lambda t: t["a"].update(shape=[-2, -3])), "tensor a: expected dtype, shape and data_offsets"),
        (rewritten(lambda t: t["b"].update(data_offsets=[8, 24])), "its bytes overlap"),
        (rewritten(lambda t: t.pop("b")), "belong to no"),
        (rewritten(lambda t: t.update(b=3)), "tensor b: expected dtype"),
        (data[:8] + data[8 : 8 + length].replace(b'"b"', b'"a"') + data[8 + length :], "'a' is there twice"),
    ]
    for content, match in cases:
        file.write_bytes(content)
        code, said = doctor(good, capsys)
        assert code == 1 and match in said, (match, said)
        with pytest.raises(ValueError, match="checkpoint: expected intact weights"):
            load_model_(models.Causal(), good)
    file.write_bytes(data)
    assert doctor(good, capsys)[0] == 0 and not find(file).faults


def test_a_path_without_weights(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "nowhere")]) == 2 and "nothing is there" in capsys.readouterr().out
    assert cli.main(["doctor", str(tmp_path)]) == 1 and "expected safetensors files" in capsys.readouterr().out


def test_scales_in_powers_of_two_beside_a_layer_are_copied_and_what_has_no_code_is_named(tmp_path: Path) -> None:
    scales = torch.arange(1, 5, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    tensors = {"a.up.weight": torch.ones(32, 64), "b.e8m0": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    quantize_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", "int4")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["b.e8m0"].view(torch.uint8), scales.view(torch.uint8))
    model = torch.nn.Sequential(torch.nn.Linear(64, 8))
    model.register_buffer("turns", torch.ones(3, dtype=torch.complex64))
    fa.quantize_model_(model, "int4")
    with pytest.raises(ValueError, match=r"turns \(torch.complex64\); convert or leave them out"):
        fa.quant.save_pretrained(model, tmp_path / "complex")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "out"]
    model.turns = torch._neg_view(torch.full((3,), -2.0))
    fa.quant.save_pretrained(model, tmp_path / "negated")
    assert load_file(tmp_path / "negated" / "model.safetensors")["turns"].tolist() == [2.0] * 3

"""`quantize_model_`: which layers are exchanged, what the report says, and that an error changes nothing."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator

import pytest
import quant_models as models
import torch
from torch import nn

import fusedadapt as fa
from fusedadapt.quant import FORMATS, QuantizedLinear, foreign, load_model_, quantize, quantize_checkpoint, save_pretrained
from fusedadapt.quant.model import quantize_model_


class Tiny(nn.Module):
    """Embeddings, two blocks, a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(32, 96), "down": nn.Linear(96, 32, bias=False)}) for _ in range(2))
        self.norm = nn.LayerNorm(32)
        self.lm_head = nn.Linear(32, 40, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        return self.lm_head(self.norm(x))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


IDS = torch.arange(12).view(2, 6)
LINEARS = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def kinds(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_every_format_and_what_the_report_says(format, tiny):
    before = {name: module.weight.detach().clone() for name, module in tiny.named_modules() if isinstance(module, nn.Linear)}
    report = quantize_model_(tiny, format)
    assert [layer.name for layer in report.layers] == LINEARS and report.left == {"lm_head": "skip='lm_head'"}
    assert type(tiny.lm_head) is nn.Linear
    for layer in report.layers:
        module, w = tiny.get_submodule(layer.name), before[layer.name].double()
        assert type(module) is QuantizedLinear
        qt = quantize(before[layer.name], format)
        assert torch.equal(module.weight, qt.parts.qdata) and torch.equal(module.weight_scale, qt.scale)
        noise = (w - qt.dequantize().double()).norm()
        assert layer.error == pytest.approx(float(noise / w.norm()), rel=1e-6)
        assert layer.sqnr == pytest.approx(float(20 * (w.norm() / noise).log10()), rel=1e-6)
        assert layer.shape == tuple(w.shape) and layer.format == qt.format.spec and layer.seconds > 0
        assert layer.nbytes == qt.nbytes and layer.bits_per_weight == pytest.approx(FORMATS[format].bits_per_weight(*w.shape))
    total = report.total
    assert total.shape == (4 * 32 * 96,) and total.nbytes == sum(layer.nbytes for layer in report.layers)
    assert min(layer.error for layer in report.layers) <= total.error <= max(layer.error for layer in report.layers)
    assert torch.isfinite(tiny(IDS)).all()


def test_the_report_is_a_table_and_plain_data(tiny):
    report = quantize_model_(tiny, "nf4", double_quant=True)
    lines = str(report).splitlines()
    assert lines[0].split()[:2] == ["layer", "shape"] and lines[1].startswith("blocks.0.up  ") and "96x32" in lines[1]
    assert lines[5].startswith("4 layers") and "lm_head" in lines[6]
    data = report.as_dict()
    assert data["format"] == "nf4,scale=nested" and data["total"]["weights"] == 12288 and data["layers"][0]["shape"] == [96, 32]
    assert set(data["layers"][0]) >= {"name", "bits_per_weight", "relative_error", "sqnr_db", "seconds", "bytes", "bytes_before"}


def test_exact_weights_have_infinite_sqnr_and_valid_json():
    model = nn.Sequential(nn.Linear(64, 4, bias=False))
    model[0].weight.data.zero_()
    (layer,) = quantize_model_(model, "nf4").layers
    assert layer.error == 0 and math.isinf(layer.sqnr) and layer.as_dict()["sqnr_db"] is None


def test_outputs_are_those_of_the_dequantized_model(tiny):
    torch.manual_seed(0)
    plain = Tiny()
    quantize_model_(tiny, "int8")
    for name in LINEARS:
        plain.get_submodule(name).weight.data = tiny.get_submodule(name).dequantize()
    torch.testing.assert_close(tiny(IDS), plain(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("up", {"blocks.0.up", "blocks.1.up"}),
        (["up", "lm_head"], {"blocks.0.up", "blocks.1.up", "lm_head"}),
        (["blocks.0"], {"blocks.0.up", "blocks.0.down"}),
        (["blocks.*.down"], {"blocks.0.down", "blocks.1.down"}),
        (["blocks.1.up"], {"blocks.1.up"}),
        ([], set()),
        (["own", "block", "p"], set()),
    ],
)
def test_skip_takes_names_ends_globs_and_modules(skip, left, tiny):
    report = quantize_model_(tiny, "nf4", skip=skip)
    assert set(report.left) == left == {name for name, kind in kinds(tiny).items() if kind is nn.Linear}
    if not left and skip:
        assert report.notes == ["skip: no layer of that name: own, block, p"]


def test_tied_weights_are_left_alone_and_said_so():
    model = Tiny(tied=True)
    report = quantize_model_(model, "nf4", skip=())
    assert report.left == {"lm_head": "its weight is tied to embed.weight"} and model.lm_head.weight is model.embed.weight
    by_memory = Tiny()
    by_memory.lm_head.weight = nn.Parameter(by_memory.embed.weight.data)
    assert "tied" in quantize_model_(by_memory, "nf4", skip=()).left["lm_head"]


def test_a_layer_in_two_places_stays_one_layer():
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    report = quantize_model_(model, "nf4")
    assert len(report.layers) == 1 and type(model[0]) is QuantizedLinear and model[0] is model[2]


def test_what_is_no_plain_linear_is_left_alone():
    class Mine(nn.Linear):
        pass

    masked = nn.Linear(8, 8)
    masked.register_buffer("mask", torch.ones(8))
    adapter = nn.Module()
    adapter.base_layer, adapter.lora_A = nn.Linear(8, 8), nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
    model = nn.ModuleDict(
        {
            "mine": Mine(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "encoder": nn.TransformerEncoderLayer(8, 2, 16),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "adapted": adapter,
            "masked": masked,
            "plain": nn.Linear(8, 8),
        }
    )
    report = quantize_model_(model, "nf4")
    assert {layer.name for layer in report.layers} == {"plain", "adapted.base_layer"}
    for name, word in {"mine": "Mine", "attention.out_proj": "not exactly", "encoder.linear1": "fast path|past its forward"}.items():
        assert any(part in report.left[name] for part in word.split("|")), report.left[name]
    assert report.left["adapted.lora_A.default"] == "an adapter's own weight" and "normed" in report.left
    assert report.left["masked"] == "it holds more than weight and bias: mask"


def test_a_second_time_is_a_note_and_a_mixture_works(tiny):
    quantize_model_(tiny, "int8", skip=["lm_head", "down"])
    report = quantize_model_(tiny, "nf4")
    assert [layer.name for layer in report.layers] == ["blocks.0.down", "blocks.1.down"] and report.left["blocks.0.up"] == "already quantized"
    again = quantize_model_(tiny, "nf4")
    assert not again.layers and again.total.bits_per_weight == 0 and "nothing was quantized" in again.notes[0] and str(again)


def test_bias_mode_and_hooks_carry_over(tiny):
    layer, seen = tiny.blocks[0]["up"], []
    bias = layer.bias
    layer.register_forward_hook(lambda module, args, out: seen.append(type(module)))
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append("before"), with_kwargs=True)
    tiny.eval()
    quantize_model_(tiny, "nf4")
    new = tiny.blocks[0]["up"]
    assert new.bias is bias and not new.training
    tiny(IDS)
    assert seen == ["before", QuantizedLinear]


def test_old_weights_are_freed_one_by_one(tiny, monkeypatch):
    import fusedadapt.quant.model as module

    old = {name: weakref.ref(tiny.get_submodule(name).weight) for name in LINEARS}
    alive: list[int] = []
    real = module.measured

    def counting(name, w, make):
        gc.collect()
        alive.append(sum(ref() is not None for ref in old.values()))
        return real(name, w, make)

    monkeypatch.setattr(module, "measured", counting)
    quantize_model_(tiny, "nf4")
    assert alive == [4, 3, 2, 1]
    gc.collect()
    assert not any(ref() is not None for ref in old.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_a_device(dtype, tiny):
    tiny.to(dtype)
    report = quantize_model_(tiny, "nf4", device="cpu")
    assert tiny.blocks[0]["up"].weight_dtype == dtype and len(report.layers) == 4
    assert tiny.blocks[0]["up"].dequantize().dtype == dtype


# ---- errors, before anything is replaced


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named_and_nothing_is_replaced(value, tiny):
    tiny.blocks[1]["down"].weight.data[3, 5] = value
    with pytest.raises(ValueError, match=r"blocks\.1\.down\.weight \(32, 96\) has 1 elements"):
        quantize_model_(tiny, "nf4")
    assert set(kinds(tiny).values()) == {nn.Linear}
    quantize_model_(tiny, "nf4", skip=["blocks.1.down"])


def test_bad_arguments(tiny):
    for call, match in [
        (lambda: quantize_model_(tiny, "nf5"), "expected one of the formats"),
        (lambda: quantize_model_(tiny, "nf4", group_size=65), "power of two"),
        (lambda: quantize_model_(tiny, "mxfp4", group_size=64), "group_size=32 or None"),
        (lambda: quantize_model_(tiny, "int8", double_quant=True), "double_quant with nf4 or fp4"),
        (lambda: quantize_model_(tiny, "nf4", colour="red"), "options among"),
        (lambda: quantize_model_(nn.Linear(4, 4), "nf4"), "lone nn.Linear"),
        (lambda: quantize_model_(nn.Sequential(nn.ReLU()), "nf4"), "at least one nn.Linear"),
        (lambda: quantize_model_(tiny, "nf4", skip="*"), "at least one nn.Linear"),
        (lambda: quantize_model_(tiny, "nf4", device="meta"), "a device that holds numbers"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="expected a torch.nn.Module; got Tensor"):
        quantize_model_(torch.ones(2, 2), "nf4")
    for skip in ([3], None, 3):
        with pytest.raises(TypeError, match="names or globs"):
            quantize_model_(tiny, "nf4", skip=skip)
    assert set(kinds(tiny).values()) == {nn.Linear}


def test_meta_placed_and_wrapped_weights_are_refused(tiny):
    with torch.device("meta"), pytest.raises(ValueError, match=r"blocks\.0\.up\.weight .*meta device.*load"):
        quantize_model_(Tiny(), "nf4")
    tiny.blocks[1]["up"].forward = lambda x: x
    with pytest.raises(ValueError, match=r"forward of blocks\.1\.up has been replaced.*device map"):
        quantize_model_(tiny, "nf4")
    del tiny.blocks[1]["up"].forward

    class Wrapped(nn.Parameter):
        pass

    tiny.blocks[1]["up"].weight = Wrapped(torch.ones(96, 32))
    with pytest.raises(ValueError, match=r"blocks\.1\.up\.weight is a Wrapped"):
        quantize_model_(tiny, "nf4")
    assert set(kinds(tiny).values()) == {nn.Linear}


def test_a_scale_out_of_range_is_named():
    model = nn.Sequential(nn.Linear(64, 2))
    model[0].weight.data.fill_(1e30)
    with pytest.raises(ValueError, match="within the range of int4.*0 comes back with NaN"):
        quantize_model_(model, "int4", scale_dtype=torch.float16)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("formats", [["nf4"], ["mxfp4"], ["int4", "nf4"]])
def test_saved_and_loaded(formats, tied, tmp_path):
    """Codes are moved, not made anew; tied weights stand in the files once; shards or not, one format or several."""
    model = Tiny(tied)
    for format, skip in zip(formats, (["blocks.1.*", "lm_head"], ["lm_head"]), strict=False):
        quantize_model_(model, format, skip)
    want = model(IDS)
    assert save_pretrained(model, tmp_path / "out", max_shard_bytes=4000) == tmp_path / "out"
    torch.manual_seed(1)
    other = Tiny(tied)
    load_model_(other, tmp_path / "out")
    assert torch.equal(other(IDS), want) and kinds(other) == kinds(model)
    with pytest.raises(FileExistsError, match="new or empty folder"):
        save_pretrained(model, tmp_path / "out")


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_an_order_of_inputs_is_saved_and_loaded(format, tmp_path):
    """As GPTQ's act-order has it."""
    model, order = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 64)), torch.randperm(64)
    quantize_model_(model, format)
    model[0] = QuantizedLinear.from_quantized(model[0].quantized, model[0].bias, order)
    x = torch.randn(3, 64)
    want = model(x)
    save_pretrained(model, tmp_path / "out")
    other = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 64))
    load_model_(other, tmp_path / "out")
    assert torch.equal(other(x), want) and torch.equal(other[0].weight_order, order) and other[1].weight_order is None
    broken = foreign.to_plain(model[0].quantized, "0.weight")
    for bad in (order[:-1], order.int(), order.clamp(max=60)):
        with pytest.raises(ValueError, match=r"0.weight_order: expected int64, every input from 0 to 63 once"):
            foreign.from_plain(broken[0] | {"0.weight_order": bad}, broken[1], "0.weight")


def test_what_cannot_be_saved_leaves_nothing(tiny, tmp_path):
    with pytest.raises(TypeError, match="expected a torch.nn.Module; got OrderedDict"):
        save_pretrained(tiny.state_dict(), tmp_path / "out")
    with pytest.raises(ValueError, match="got none; call quantize_model_ first"):
        save_pretrained(tiny, tmp_path / "out")
    quantize_model_(tiny, "nf4")
    tiny.norm.to("meta")
    with pytest.raises(ValueError, match=r"norm.weight, norm.bias are on the meta device"):
        save_pretrained(tiny, tmp_path / "out")
    tiny.norm = nn.LayerNorm(32)
    tiny.blocks[1]["up"] = fa.LoRALinear.from_linear(tiny.blocks[1]["up"], r=2)
    with pytest.raises(ValueError, match=r"blocks.1.up is a LoRALinear on packed bytes"):
        save_pretrained(tiny, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_explain_names_the_layers(tiny):
    quantize_model_(tiny, "nf4")
    assert "QuantizedLinear[nf4]" in str(fa.explain(tiny))


# ---- models of transformers


def test_what_a_model_keeps_in_fp32_is_left_alone():
    """T5 converts the input of `wo` to the dtype of its weight, bytes included."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=50)
    model, ids = transformers.T5ForConditionalGeneration(config).eval(), torch.arange(6)[None]
    report = quantize_model_(model, "int8")
    kept = {name for name, why in report.left.items() if why == "T5ForConditionalGeneration keeps it in fp32"}
    assert kept == {"encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.0.layer.2.DenseReluDense.wo"}
    assert model(input_ids=ids, decoder_input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_files_with_names_that_transformers_changes_when_it_loads(format, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 16}
    model, x = transformers.ViTModel(transformers.ViTConfig(**sizes)).eval(), torch.randn(1, 3, 32, 32)
    model.save_pretrained(tmp_path / "m")
    report = quantize_checkpoint(tmp_path / "m", tmp_path / "q", format)
    fresh = transformers.ViTModel(model.config).eval()
    names = load_model_(fresh, tmp_path / "q")
    assert len(report.layers) == 7 and not report.left and all(type(fresh.get_submodule(name)) is QuantizedLinear for name in names)
    quantize_model_(model, format)
    assert torch.equal(fresh(x).last_hidden_state, model(x).last_hidden_state)
    if format == "nf4":
        pytest.importorskip("bitsandbytes")
        theirs = transformers.ViTModel.from_pretrained(tmp_path / "q", device_map="cpu")(x).last_hidden_state
        torch.testing.assert_close(theirs, model(x).last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [{"architectures": 3}, {"architectures": [None]}, {"model_type": "llama", "hidden_size": "x"}, {"model_type": 7}])
def test_a_config_that_builds_nothing_leaves_names_and_shapes(config, tmp_path):
    pytest.importorskip("transformers")
    source = models.write(tmp_path / "m", {"a.weight": torch.randn(32, 64)}, config=config)
    report = quantize_checkpoint(source, tmp_path / "q", "int4")
    assert len(report.layers) == 1 and report.notes[0].startswith("layers: names and shapes (transformers ")


@pytest.mark.parametrize("index", [b"[1]", b"\xff\xfe{", b'{"weight_map": {"a": "../x.safetensors"}}'])
def test_a_damaged_index_is_named(index, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(FileNotFoundError, match=r"got none, and model\.safetensors\.index\.json: expected"):
        quantize_checkpoint(tmp_path, tmp_path / "q", "int4")

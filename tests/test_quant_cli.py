"""`python -m fusedadapt quantize`: models on disk, whole or not at all; and their way back into a model."""

from __future__ import annotations

import errno
import io
import json
import math
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import quant_models as models
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fusedadapt import cli, files
from fusedadapt.quant import FORMATS, QuantizedLinear, linears, quantize
from fusedadapt.quant import cli as quant_cli
from fusedadapt.quant.load import load_model_
from fusedadapt.quant.model import quantize_model_
from fusedadapt.quant.stream import quantize_checkpoint

ROOT = Path(__file__).resolve().parent.parent
IDS = torch.arange(20).view(2, 10)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A model on disk, on a machine without transformers (which takes seconds to import)."""
    monkeypatch.setattr(linears, "_installed", lambda: False)
    return models.write(tmp_path / "model", models.state())


def run(*arguments: object) -> int:
    return cli.main(["quantize", *map(str, arguments)])


def everything(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".tmp"))


# ---- what is written


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_folders_are_bitsandbytes_checkpoints(kind, double, folder, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert run(folder, out, "--format", kind, *(["--double-quant"] if double else []), "--json", tmp_path / "report.json") == 0
    said = capsys.readouterr().out
    assert f"{len(models.LINEARS)} layers in {kind}" in said and "names and shapes (transformers is not installed)" in " ".join(said.split())
    old, new = models.state(), everything(out)
    for name in models.LINEARS:
        w = f"{name}.weight"
        qt = quantize(old[w], kind, double_quant=double)
        assert new[w].dtype == torch.uint8 and torch.equal(new[w].view(-1), qt.parts.qdata.view(-1)) and new[w].shape == (qt.qdata.numel(), 1)
        assert torch.equal(new[f"{w}.absmax"].view(-1), qt.scale.view(-1)) and new[f"{w}.quant_map"].shape == (16,)
        state = json.loads(bytes(new[f"{w}.quant_state.bitsandbytes__{kind}"].tolist()))
        assert (state["quant_type"], state["blocksize"], state["shape"], state["dtype"]) == (kind, 64, list(old[w].shape), "float32")
        assert (f"{w}.nested_absmax" in new) == double == ("nested_offset" in state)
    for name in set(old) - {f"{name}.weight" for name in models.LINEARS}:
        assert torch.equal(old[name], new[name]), name
    config = json.loads((out / "config.json").read_text())
    said = config["quantization_config"]
    assert said["quant_method"] == "bitsandbytes" and said["load_in_4bit"] is True and said["bnb_4bit_quant_type"] == kind
    assert said["bnb_4bit_use_double_quant"] is double and said["bnb_4bit_compute_dtype"] == "float32" and "lm_head" in said["llm_int8_skip_modules"]
    assert config["torch_dtype"] == "float32" and config["hidden_size"] == models.HIDDEN
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert {layer["name"] for layer in report["layers"]} == set(models.LINEARS) and "lm_head.weight" in report["left"]


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"nf4"}))
def test_every_format_comes_back_as_the_model_quantized_in_memory(format, folder, tmp_path):
    quantize_checkpoint(folder, tmp_path / "out", format)
    here = models.Causal()
    here.load_state_dict(models.state())
    quantize_model_(here, format)
    with torch.device("meta"):
        there = models.Causal()
    assert set(load_model_(there, tmp_path / "out")) == set(models.LINEARS)
    for name in models.LINEARS:
        assert type(there.get_submodule(name)) is QuantizedLinear
        a, b = (m.get_submodule(name).quantized for m in (here, there))
        assert a.format == b.format and a.dtype == b.dtype and a.shape == b.shape
        assert all(x is y is None or torch.equal(x, y) for x, y in zip(a.parts, b.parts, strict=True)), name
    assert torch.equal(here(IDS), there(IDS))


def test_shards_in_shards_out_same_bytes(folder, tmp_path):
    sharded = models.write(tmp_path / "sharded", models.state(), shards=3)
    quantize_checkpoint(folder, tmp_path / "one", "int4")
    quantize_checkpoint(sharded, tmp_path / "many", "int4", max_shard_bytes=20_000)
    one, many = everything(tmp_path / "one"), everything(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(t, many[name]) for name, t in one.items())
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors" and set(index["weight_map"].values()) == set(shards)
    assert index["weight_map"].keys() == many.keys() and index["metadata"]["total_size"] == sum(t.nbytes for t in many.values())
    for file in shards:
        held = load_file(tmp_path / "many" / file)
        assert sum(t.nbytes for t in held.values()) <= 20_000 or len(held) == 1
    model = models.Causal()
    load_model_(model, tmp_path / "many")


def test_a_16_bit_model_keeps_its_dtype(folder, tmp_path):
    half = models.write(tmp_path / "half", models.state(torch.bfloat16))
    quantize_checkpoint(half, tmp_path / "out", "nf4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    model = models.Causal().bfloat16()
    load_model_(model, tmp_path / "out")
    assert model.get_submodule(models.LINEARS[0]).weight_dtype == torch.bfloat16 and model(IDS).dtype == torch.bfloat16


def test_skip_and_include(folder, tmp_path):
    report = quantize_checkpoint(folder, tmp_path / "a", "int8", skip=["lm_head", "mlp", "nothing"])
    assert {layer.name for layer in report.layers} == {name for name in models.LINEARS if "mlp" not in name}
    assert "skip: no layer of that name: nothing" in report.notes
    report = quantize_checkpoint(folder, tmp_path / "b", "int8", include=["down_proj", "lm_head"], skip=())
    assert {layer.name for layer in report.layers} == {*(name for name in models.LINEARS if "down" in name), "lm_head"}
    assert report.notes[0] == "layers: --include alone" and set(report.left.values()) == {"not in --include"}


def test_one_file_without_a_folder(folder, tmp_path):
    save_file(models.state(), tmp_path / "w.safetensors")
    assert run(tmp_path / "w.safetensors", tmp_path / "out", "--format", "mxfp4", "--quiet") == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_names_and_shapes_tell_embeddings_from_layers(tmp_path):
    w = torch.ones(8, 6)
    names = ["bert.encoder.layer.0.attention.self.query", "h.0.mlp.fc1", "embeddings.word_embeddings", "wte", "model.embed_tokens", "pos_emb"]
    names += ["shared", "odd_table", "block.0.layer.0.SelfAttention.relative_attention_bias", "cls.predictions.decoder", "encoder.embed_dense.proj"]
    tensors = {f"{name}.weight": w.clone() for name in names} | {"odd_table.weight": torch.ones(77, 6), "conv.weight": torch.ones(2, 2, 2), "bias": w}
    folder = models.write(tmp_path / "m", tensors, config={"model_type": "mystery", "vocab_size": 77, "auto_map": {"AutoModel": "x.Y"}})
    report = quantize_checkpoint(folder, tmp_path / "out", "int8")
    assert {layer.name for layer in report.layers} == {"bert.encoder.layer.0.attention.self.query", "h.0.mlp.fc1"}
    assert "brings code of its own, which is not run" in report.notes[0]


def test_skip_lists_catch_nothing_else():
    quantized = {"model.layers.0.proj", "out.proj", "decoder.lm_head"}
    every = quantized | {"proj", "lm_head", "model.layers.1", "model.layers.10"}
    names = linears.skip_list(every, quantized)
    for name in every:
        assert linears.module_matches(names, name) == (name not in quantized), (name, names)


# ---- through transformers


def test_the_architecture_decides_where_transformers_is_installed(tmp_path):
    pytest.importorskip("transformers")
    tensors = models.state()
    tied = {**models.CONFIG, "tie_word_embeddings": True}
    report = quantize_checkpoint(models.write(tmp_path / "m", tensors, config=tied), tmp_path / "out", "int8", skip=())
    assert {layer.name for layer in report.layers} == set(models.LINEARS)
    assert report.notes[0].startswith("layers: the nn.Linear modules of LlamaForCausalLM (transformers ")
    assert report.left["lm_head.weight"] == "its weight is tied to another module's"
    assert report.left["model.embed_tokens.weight"] == "not an nn.Linear of LlamaForCausalLM"
    bare = {name.removeprefix("model."): t for name, t in tensors.items() if name != "lm_head.weight"}
    report = quantize_checkpoint(models.write(tmp_path / "bare", bare), tmp_path / "out2", "nf4")
    assert len(report.layers) == len(models.LINEARS), "files of the bare model lack the prefix"


@pytest.mark.parametrize("double", [False, True])
def test_a_real_encoder_reloads_through_from_pretrained(double, tmp_path):
    """Weights equal bit for bit (nested scales: within rounding), outputs those of the model with bitsandbytes' own dequantized weights."""
    transformers = pytest.importorskip("transformers")
    bnb = pytest.importorskip("bitsandbytes")
    from fusedadapt.finetune.model import pretrained_dir

    def original() -> torch.nn.Module:
        return transformers.AutoModel.from_pretrained(pretrained_dir()).eval()

    which = {"include": ["encoder.layer.0"]} if double else {"skip": ["pooler"]}
    report = quantize_checkpoint(pretrained_dir(), tmp_path / "out", "nf4", double_quant=double, **which)
    assert len(report.layers) == (6 if double else 36) and 0.08 < report.total.error < 0.12
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    layers = {name: m for name, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert set(layers) == {layer.name for layer in report.layers} and type(theirs.pooler.dense) is torch.nn.Linear
    ours, reference = original(), original()
    query = quantize(ours.encoder.layer[0].attention.self.query.weight, "nf4", double_quant=double)
    assert set(load_model_(ours, tmp_path / "out")) == set(layers)
    for name, m in layers.items():
        reference.get_submodule(name).weight.data = w = bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)
        mine = ours.get_submodule(name).dequantize()
        assert torch.equal(w, mine) if not double else (w - mine).abs().max() <= 1e-6 * mine.abs().max(), name
    assert torch.equal(query.dequantize(), ours.encoder.layer[0].attention.self.query.dequantize())
    ids = torch.arange(1000, 1016).view(2, 8)
    with torch.no_grad():
        truth, found, other = (m(input_ids=ids).last_hidden_state for m in (reference, ours, theirs))
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other, truth, rtol=5e-2, atol=5e-2)  # its CPU kernel multiplies in bfloat16


# ---- nothing half-written


def test_input_faults_name_the_tensor_and_leave_nothing(folder, tmp_path, capsys):
    bad = models.state()
    bad["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    cases = [
        ([models.write(tmp_path / "nan", bad)], "expected finite weights; model.layers.1.mlp.up_proj.weight (96, 64) has 1 elements"),
        ([folder, "--format", "nf5"], "expected one of the formats"),
        ([folder, "--group-size", "100"], "power of two"),
        ([folder, "--format", "int4", "--double-quant"], "double_quant with nf4 or fp4"),
        ([folder, "--skip", "model", "lm_head"], "found none by names and shapes"),
        ([tmp_path / "nowhere"], "nothing is there"),
    ]
    for (source, *options), match in cases:
        assert run(source, tmp_path / "out", "--quiet", *options) == 2
        assert match in capsys.readouterr().err
        assert not (tmp_path / "out").exists() and not leftovers(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    assert run(folder, tmp_path / "full", "--quiet") == 2 and "new or empty folder" in capsys.readouterr().err
    assert run(folder, folder, "--quiet") == 2 and (tmp_path / "full" / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    assert run(folder, tmp_path / "empty", "--quiet") == 0
    assert run(tmp_path / "empty", tmp_path / "again", "--quiet") == 2 and "quantized already" in capsys.readouterr().err


def test_a_link_is_followed_and_what_no_rename_can_replace_is_refused_first(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert run(folder, tmp_path / "link", "--quiet") == 0 and (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "config.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(folder, ".", "--quiet") == 2 and "is the working folder" in capsys.readouterr().err
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "here")
    assert run(folder, tmp_path / "here", "--quiet") == 2 and "is a mount point" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(folder, tmp_path, capsys):
    missing = "cuda" if not torch.cuda.is_available() else "cuda:99"
    for device in (missing, "nonsense"):
        assert run(folder, tmp_path / "out", "--quiet", "--device", device) == 2
        assert "expected a device that is here" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_pickled_weights_are_never_read(tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert run(tmp_path / "m", tmp_path / "out", "--quiet") == 2
    assert "pytorch_model.bin, which holds pickled objects and is not read" in capsys.readouterr().err


def test_a_truncated_file_is_refused_by_name(folder, tmp_path, capsys):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    assert run(folder, tmp_path / "out", "--quiet") == 2
    said = capsys.readouterr().err
    assert "cut: it needs bytes up to" in said and any(name in said for name in models.state()) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ["first shard", "last shard", "config", "rename"])
def test_a_full_disk_leaves_nothing(when, folder, tmp_path, monkeypatch, capsys):
    full, calls = OSError(errno.ENOSPC, "No space left on device"), []
    real_write, real_open, real_replace = files.write_safetensors, files.atomic_open, files.os.replace

    def write(path, tensors, metadata):
        calls.append(path)
        if when == "first shard" or (when == "last shard" and len(calls) > 3):
            path.write_bytes(b"half")
            raise full
        real_write(path, tensors, metadata)

    def opened(path):
        if when == "config" and path.name == "config.json":
            raise full
        return real_open(path)

    def replace(source, target):
        if when == "rename" and Path(target).name == "out":
            raise full
        real_replace(source, target)

    monkeypatch.setattr(files, "write_safetensors", write)
    monkeypatch.setattr(files, "atomic_open", opened)
    monkeypatch.setattr(files.os, "replace", replace)
    assert run(folder, tmp_path / "out", "--quiet", "--max-shard-size", "20KB") == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and "nothing was written" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_a_killed_run_leaves_no_model_and_the_next_one_cleans_up(folder, tmp_path):
    script = """
        import sys, time
        from fusedadapt.quant import linears, stream
        linears._installed = lambda: False
        def advance(name, nbytes, total):
            if "layers.1" in name:
                print("here", flush=True)
                time.sleep(60)
        stream.quantize_checkpoint(sys.argv[1], sys.argv[2], "nf4", max_shard_bytes=10_000, advance=advance)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), folder, tmp_path / "out"], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists() and len(leftovers(tmp_path)) == 1
    quantize_checkpoint(folder, tmp_path / "out", "nf4")
    assert (tmp_path / "out" / "config.json").is_file() and not leftovers(tmp_path)


def test_peak_memory_is_a_tensor_and_a_shard(tmp_path):
    """64 MiB of weights through 4 MiB shards: what the process grows by stays far below the model."""
    big = {f"layers.{i}.weight": torch.full((512, 1024), 0.5 + i) for i in range(32)}
    (tmp_path / "m").mkdir()
    save_file(big, tmp_path / "m" / "model.safetensors")
    save_file({"layers.0.weight": torch.ones(512, 1024)}, tmp_path / "small.safetensors")
    script = """
        import resource, sys
        from pathlib import Path
        import torch
        from fusedadapt.quant.stream import quantize_checkpoint
        torch.set_num_threads(1)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        root = Path(sys.argv[1])
        quantize_checkpoint(root / "small.safetensors", root / "a", "int8")
        before = peak()
        quantize_checkpoint(root / "m", root / "b", "int8", max_shard_bytes=4 << 20)
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), tmp_path], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) <= 24, done.stdout


def test_the_bar_and_help(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("--help")
    assert "mxfp4" in capsys.readouterr().out
    assert run(folder, tmp_path / "out") == 0
    table = capsys.readouterr().out
    assert "SQNR dB" in table and "left alone: its name is an embedding's or a norm's: model.embed_tokens.weight" in table
    report = quantize_checkpoint(folder, tmp_path / "again", "nf4")
    for width, last in ((80, "SQNR dB"), (140, "ms")):
        console = Console(width=width, file=io.StringIO())
        console.print(quant_cli._table(report, width))
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert lines[1].rstrip().endswith(f" {last}") and any(f" {models.LINEARS[0]} " in line for line in lines), width
        assert any("14 layers" in line for line in lines)


# ---- load_model_


def test_what_does_not_fit_is_listed_before_anything_is_loaded(folder, tmp_path):
    quantize_checkpoint(folder, tmp_path / "out", "int4")
    model = models.Causal()
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(models.HIDDEN, 8, bias=False)
    model.model.layers[1].mlp.down_proj = torch.nn.Identity()
    model.extra = torch.nn.Linear(2, 2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError) as raised:
        load_model_(model, tmp_path / "out")
    for part in ("up_proj.weight: (96, 64) in the file, (8, 64) in the model", "down_proj: packed in the file; in the model it is Identity"):
        assert part in str(raised.value)
    assert "extra.weight: not in the file" in str(raised.value)
    after = model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())


def test_a_buffer_on_the_meta_device_that_no_file_holds_is_refused(folder, tmp_path):
    quantize_checkpoint(folder, tmp_path / "out", "int4")
    with torch.device("meta"):
        model = models.Causal()
        model.register_buffer("inverse", torch.ones(3), persistent=False)
    with pytest.raises(ValueError, match="inverse: a buffer on the meta device"):
        load_model_(model, tmp_path / "out")
    model.inverse = torch.ones(3)
    load_model_(model, tmp_path / "out")
    assert not any(t.is_meta for t in model.state_dict().values()) and torch.isfinite(model(IDS)).all()

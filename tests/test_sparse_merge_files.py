"""Merging from files into files: out of core, atomic, within its memory."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import merge_cases as cases
import pytest
import torch
from merge_cases import EVERY, ROOT, assert_same, call
from safetensors.torch import load_file, save_file
from torch import Tensor

import fusedadapt as fa
from fusedadapt.sparse import merge
from fusedadapt.sparse import weights as files

# fixtures
base, tuned, one_torch_thread = cases.base, cases.tuned, cases.one_torch_thread


# ---- files


def sharded(folder: Path, state: dict[str, Tensor]) -> Path:
    folder.mkdir()
    names = list(state)
    parts = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, inside in parts.items():
        save_file({n: state[n] for n in inside}, folder / file)
    mapping = ", ".join(f'"{n}": "{file}"' for file, inside in parts.items() for n in inside)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {' + mapping + "}}")
    return folder


@pytest.fixture
def on_disk(tmp_path, base, tuned) -> tuple[Path, list[Path]]:
    return sharded(tmp_path / "base", base), [sharded(tmp_path / f"m{i}", m) for i, m in enumerate(tuned)]


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("method, compat", EVERY)
def test_out_of_core_equals_in_memory(on_disk, tmp_path, base, tuned, method, compat):
    start, models = on_disk
    expected = call(method, compat, base, tuned)
    out = call(method, compat, start, models, out=tmp_path / "out")
    assert out == tmp_path / "out"
    written = read(out)
    assert_same({n: written[n] for n in expected}, expected)
    if method != "linear":  # which is laid out as its first model, alike
        assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in start.iterdir())
    single = call(method, compat, start, models, out=tmp_path / "one.safetensors")
    assert_same({n: load_file(single)[n] for n in expected}, expected)


def test_out_must_be_elsewhere(on_disk, tmp_path):
    start, models = on_disk
    with pytest.raises(ValueError, match="none of the inputs"):
        merge(start, models, density=0.5, out=start)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="suffix"):
        merge(start, models, density=0.5, out=tmp_path / "file")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "model-00001-of-00009.safetensors").write_text("")
    with pytest.raises(FileExistsError, match="new or empty folder"):
        merge(start, models, density=0.5, out=tmp_path / "used")


def test_a_folder_like_a_single_file_has_the_name_that_loaders_look_for(tmp_path, base, tuned):
    """The base's own file name meant nothing to them."""
    for i, state in enumerate((base, tuned[0])):
        save_file(state, tmp_path / f"run-{i}.safetensors")
    out = merge(tmp_path / "run-0.safetensors", [tmp_path / "run-1.safetensors"], "task_arithmetic", out=tmp_path / "out")
    assert [file.name for file in out.iterdir()] == ["model.safetensors"]
    (tmp_path / "diffusion").mkdir()
    save_file(base, tmp_path / "diffusion" / "diffusion_pytorch_model.safetensors")
    out = merge(tmp_path / "diffusion", [tuned[0]], "task_arithmetic", out=tmp_path / "diffused")
    assert [file.name for file in out.iterdir()] == ["diffusion_pytorch_model.safetensors"]


def test_out_must_be_none_of_the_fishers(on_disk, tmp_path):
    """They are inputs too."""
    _, models = on_disk
    information = tmp_path / "information.safetensors"
    save_file({n: t.abs() for n, t in read(models[0]).items()}, information)
    before = information.read_bytes()
    with pytest.raises(ValueError, match="none of the inputs"):
        merge(None, models[:1], "fisher", fishers=[information], out=information)
    assert information.read_bytes() == before


def test_full_disk_leaves_nothing(on_disk, tmp_path, monkeypatch):
    start, models = on_disk
    calls = []

    def failing(tensor):
        calls.append(tensor)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return original(tensor)

    original = files.tensor_bytes
    monkeypatch.setattr(files, "tensor_bytes", failing)
    with pytest.raises(OSError, match="No space"):
        merge(start, models, density=0.5, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_appear_together(on_disk, tmp_path, monkeypatch):
    """The last bytes of a file may be those that find the disk full, when the next shard has its name already."""
    start, models = on_disk
    synced, real = [], os.fsync

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="No space"):
        merge(start, models, density=0.5, out=tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def in_subprocess(code: str, *arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_killed_while_writing(on_disk, tmp_path):
    start, models = on_disk
    before = {p: p.read_bytes() for folder in (start, *models) for p in folder.iterdir()}
    code = """
        import os, signal, sys
        from fusedadapt.sparse import merge, weights
        left = iter(range(4))
        original = weights.tensor_bytes
        def dying(tensor):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(tensor)
        weights.tensor_bytes = dying
        merge(sys.argv[1], sys.argv[3:], density=0.5, out=sys.argv[2])
    """
    out = tmp_path / "out"
    done = in_subprocess(code, start, out, *models)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists() and len(list(tmp_path.glob(".out.*.tmp"))) == 1  # hidden, and swept up by the next run
    assert all(p.read_bytes() == content for p, content in before.items())
    (stale,) = tmp_path.glob(".out.*.tmp")
    (tmp_path / f".out.{os.getpid()}.tmp").mkdir()  # of one that had this process' number, as all have in some containers
    merge(start, models, density=0.5, out=out)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in start.iterdir())
    assert not stale.exists() and not list(tmp_path.glob(".out.*"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory")
@pytest.mark.skipif(fa.dispatch.core() is None, reason="the reference needs several times a tensor's size")
def test_memory_is_that_of_one_tensor(tmp_path):
    """Models of 104 MiB each; at most the tensors of one name (4 x 8 MiB) and 64 MiB more are ever in memory."""
    elements, count = 4 << 20, 13
    noise = torch.randn(elements // 16).bfloat16().repeat(16)
    for i in range(3):
        save_file({f"t{j}": (noise.roll(j) * (1 + i / 8)).view(2048, -1) for j in range(count)}, tmp_path / f"{i}.safetensors")
    code = """
        import pathlib, sys
        import torch
        from fusedadapt.sparse import merge
        torch.set_num_threads(2)
        folder = sys.argv[1]
        kib = lambda key: int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])
        small = {"x": torch.randn(70000)}
        for method, compat in (("ties", "paper"), ("ties", "peft"), ("dare_ties", "mergekit")):
            merge(small, [small, small], method, density=0.2, compat=compat)
            pathlib.Path("/proc/self/clear_refs").write_text("5")
            before = kib("VmRSS")
            models = [f"{folder}/{i}.safetensors" for i in range(3)]
            merge(models[0], models[1:], method, density=0.2, compat=compat, out=f"{folder}/{method}-{compat}.safetensors")
            print((kib("VmHWM") - before) / 1024)
        merge(small, [small], "slerp", t=0.5)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = kib("VmRSS")
        merge(models[0], models[1:2], "slerp", t=0.5, out=f"{folder}/out.safetensors")
        print((kib("VmHWM") - before) / 1024)
    """
    done = in_subprocess(code, tmp_path)
    assert done.returncode == 0, done.stderr
    *cut, slerp = map(float, done.stdout.split())
    assert max(cut) < 4 * 8 + 64 and slerp < 3 * 8 + 32, done.stdout  # slerp's blocks in fp64 took all of the 64 and more


def test_folders_named_like_files_are_no_models(tmp_path: Path) -> None:
    """OSError 19, without a name."""
    model = {"w": torch.randn(4)}
    (tmp_path / "m" / "x.safetensors").mkdir(parents=True)
    save_file(model, tmp_path / "m" / "model.safetensors")
    assert torch.equal(merge(None, [tmp_path / "m"], "linear")["w"], model["w"])
    (tmp_path / "m" / "model.safetensors.index.json").write_text('{"weight_map": {"w": "."}}')
    with pytest.raises(ValueError, match="the index beside it names it"):
        merge(None, [tmp_path / "m"], "linear")


@pytest.mark.parametrize("form", ["nf4", "int4", "int8"])
def test_packed_models_are_refused(form: str, tmp_path: Path) -> None:
    """Codes came from the first model, scales from all of them: a model of nobody's weights, which loaded."""
    layers = [fa.QuantizedLinear.from_linear(torch.nn.Linear(64, 64, bias=False), form) for _ in range(2)]
    with pytest.raises(ValueError, match="the bytes of packed ones: weight"):
        merge(None, [layer.state_dict() for layer in layers], "linear")
    for i, layer in enumerate(layers):
        fa.quant.save_pretrained(torch.nn.Sequential(layer), tmp_path / str(i))
    with pytest.raises(ValueError, match="the bytes of packed ones: 0.weight in"):
        merge(None, [tmp_path / "0", tmp_path / "1"], "linear")

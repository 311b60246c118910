"""`python -m fusedadapt doctor FILE` on deltas and masks: sound files pass, every damaged tensor is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fusedadapt import cli, files
from fusedadapt.sparse import Mask, SparseDelta, load_masks, save_masks


def doctor(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(["doctor", str(path)])
    said = capsys.readouterr().out
    assert str(path.parent) not in said, "it is to be pasted"
    return code, said


def a_delta(path: Path) -> None:
    base = {"a.weight": torch.zeros(40, 30), "b": torch.zeros(70).bfloat16()}
    SparseDelta.from_diff(base, {n: t + 1 for n, t in base.items()}, k=900, kind="set").save(path)


def some_masks(path: Path) -> None:
    save_masks(path, {"a.weight": Mask.from_bool(torch.eye(40, 33) > 0), "b": Mask.from_bool(torch.ones(3, 5) > 0, row_aligned=True)})


@pytest.mark.parametrize("name", ["d.safetensors", "delta"])
def test_sound_files(tmp_path, capsys, name):
    path = tmp_path / name
    a_delta(path)
    code, said = doctor(path, capsys)
    assert code == 0 and "kind set, 1 tensors, 900 of 1200 elements" in said and "bytes an entry" in said and "nothing wrong" in said
    some_masks(path)
    code, said = doctor(path, capsys)
    assert code == 0 and "2, 48 of 1335 elements chosen" in said and "nothing wrong" in said


@pytest.mark.parametrize("write", [a_delta, some_masks])
def test_a_flipped_bit_in_any_tensor_is_named(tmp_path, capsys, write):
    path = tmp_path / "d"
    write(path)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    for at in (head, head + 60, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        code, said = doctor(path, capsys)
        assert (
            code == 1 and said.count("FAULT ") == 1 and "is not as it was saved: another checksum" in said and ("'a.weight'" in said or "'b'" in said)
        )
    path.write_bytes(whole[:-2])
    code, said = doctor(path, capsys)
    assert code == 1 and "FAULT" in said
    path.write_bytes(whole.replace(b'\\"shape', b'\\"shqpe'))
    code, said = doctor(path, capsys)
    assert code == 1 and "list of contents is damaged (KeyError: 'shape')" in said


def test_every_damaged_tensor_is_listed(tmp_path, capsys):
    path, words = tmp_path / "m", torch.tensor([-1], dtype=torch.int32)
    about = {
        "beyond": {"shape": [5], "row_aligned": False, "crc": files.checksum(["beyond", [5], False], words)},
        "long": {"shape": [50], "row_aligned": False, "crc": files.checksum(["long", [50], False], words)},
        "less": {"shape": [-5, -2], "row_aligned": False, "crc": files.checksum(["less", [-5, -2], False], words)},
        "absent": {"shape": [5], "row_aligned": False, "crc": 1},
    }
    tensors = {name: words for name in ("beyond", "long", "less", "foreign")}
    files.write_safetensors(path, tensors, {"format": "fusedadapt.masks", "masks": json.dumps(about)})
    code, said = doctor(path, capsys)
    assert code == 1 and said.count("FAULT ") == 5
    assert "'beyond' is no mask: Mask: expected words with no bits beyond the 5 elements" in said
    assert "'long' is no mask: Mask: expected 2 int32 words" in said
    assert "'less' is no mask: shape" in said and "'absent': in the list" in said and "'foreign': in the file" in said
    with pytest.raises(ValueError, match="load_masks: expected a whole file"):
        load_masks(path)
    for listed in ("[1]", "{", "7"):
        files.write_safetensors(path, tensors, {"format": "fusedadapt.masks", "masks": listed})
        code, said = doctor(path, capsys)
        assert code == 1 and "list of contents" in said
        with pytest.raises(ValueError, match="load_masks: expected a whole file"):
            load_masks(path)
        files.write_safetensors(path, tensors, {"format": "fusedadapt.delta", "kind": "neither", "entries": listed})
        code, said = doctor(path, capsys)
        assert code == 1 and "its kind is 'neither'" in said
        with pytest.raises(ValueError, match="SparseDelta.load: expected a whole file"):
            SparseDelta.load(path)

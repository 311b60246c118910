"""A `SparseDelta` on disk: its size, positions of every kind, earlier files, damage, full disks."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fusedadapt import files
from fusedadapt.sparse import Mask, SparseDelta, coding, load_masks
from fusedadapt.sparse.checkup import examine
from fusedadapt.sparse.delta import Entry


def bits(t: Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes()


def changed(density: float = 0.05, kind: str = "set") -> SparseDelta:
    g = torch.Generator().manual_seed(1)
    base = {n: torch.randn(s, generator=g) for n, s in (("a", (40, 33)), ("b.c", (1025,)), ("d", ()), ("e", (0, 3)))}
    return SparseDelta.from_diff(base, {n: torch.where(torch.rand(t.shape, generator=g) < density, t + 1, t) for n, t in base.items()}, kind=kind)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 3.05), (torch.float32, 5.05)], ids=str)
def test_bytes_on_disk(tmp_path: Path, dtype: torch.dtype, limit: float) -> None:
    n = 1_000_000
    index = Mask.from_bool(torch.rand(n, generator=torch.Generator().manual_seed(0)) < 0.01).indices()
    delta = SparseDelta({"w": Entry(index, torch.randn(index.numel()).to(dtype), torch.Size([1000, 1000]))}, "set")
    delta.save(tmp_path / "d.safetensors")
    assert (tmp_path / "d.safetensors").stat().st_size / index.numel() <= limit
    loaded = SparseDelta.load(tmp_path / "d.safetensors")
    assert loaded.kind == "set" and loaded.masks() == delta.masks() and bits(loaded.entries["w"].values) == bits(delta.entries["w"].values)


def positions() -> list[Tensor]:
    """Rising positions: none, one, the first and last of large tensors, runs, all alike, random at every density, near every power of two."""
    g = torch.Generator().manual_seed(0)
    cases = [
        torch.arange(5),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([0]),
        torch.tensor([2**40]),
        torch.tensor([0, 2**40]),
        torch.arange(1, 20) * 65301,
    ]
    cases += [torch.cumsum(torch.randint(1, high, (300,), generator=g), 0) for high in (2, 254, 256, 257, 600, 65535, 65538, 70000, 10**6, 2**33)]
    cases += [torch.cumsum(torch.tensor([gap] * 5), 0) for gap in (1, 2, 3, 4, 254, 255, 256, 257, 510, 511, 65535, 65536, 65537)]
    cases += [torch.rand(40_000, generator=g).lt(density).nonzero()[:, 0] for density in (1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.7, 0.99, 1.0)]
    runs = torch.arange(0, 10**9, 10**7)[:, None] + torch.arange(100)  # whole rows
    return [
        *cases,
        runs.reshape(-1),
        runs.reshape(-1) * 2,
        torch.cat([torch.arange(1000), torch.tensor([2**45])]),
        torch.cumsum(2 ** torch.arange(45), 0),
    ]


def test_positions_of_every_kind_come_back() -> None:
    for at in positions():
        data, shift = coding.encode(at)
        n, size = len(at), int(at[-1]) + 1 if len(at) else 0
        gaps = [int(gap) - 1 for gap in at.diff(prepend=torch.tensor([-1]))]
        for shape in (size, size + 1, 2**50):
            assert torch.equal(coding.decode(data, shift, n, shape), at)
        lengths = [(n + sum(gap >> s for gap in gaps) + 7) // 8 + s * ((n + 7) // 8) for s in range(50)]
        assert data.numel() == lengths[shift] <= min(lengths) + 50, "no other shift is shorter, but for bits that fill bytes up"
        if size:
            with pytest.raises(coding.Damaged):
                coding.decode(data, shift, n, size - 1)


@pytest.mark.parametrize("mean", [2, 10, 100, 400, 1000, 10_000])
def test_evenly_spread_positions_take_little_more_than_their_entropy(mean: int) -> None:
    n = 100_000
    at = torch.empty(n, dtype=torch.int64).geometric_(1 / mean, generator=torch.Generator().manual_seed(0)).cumsum(0) - 1
    entropy = math.log2(mean) - (mean - 1) * math.log2(1 - 1 / mean)
    assert 8 * coding.encode(at)[0].numel() <= n * (entropy + 0.1)


def test_bytes_that_are_no_positions_are_refused() -> None:
    """Every byte string, shift, count and size gives rising positions inside the tensor, or an error."""
    g = torch.Generator().manual_seed(0)
    for length in (0, 1, 2, 3, 9, 40):
        for trial in range(300):
            data = torch.randint(0, 256, (length,), generator=g, dtype=torch.uint8) & (255 if trial % 2 else 1)
            count, shift = trial % 23, (trial * 7) % 67 - 3
            for size in (0, 5, 10**3, 2**31, 2**62, -1):
                for decode, how in ((coding.decode, shift), (coding.decode_bytes, shift % 4)):
                    try:
                        at = decode(data, how, count, size)
                    except coding.Damaged:
                        continue
                    assert len(at) == count and bool((at.diff() > 0).all()) and (count == 0 or 0 <= int(at[0]) <= int(at[-1]) < size)
    whole, shift = coding.encode(torch.arange(0, 1000, 10))
    for data in (whole[:-1], whole[:20], whole[:0]):
        with pytest.raises(coding.Damaged):
            coding.decode(data, shift, 100, 1000)


def in_bytes(at: Tensor, width: int) -> Tensor:
    """Positions in the bytes that files had before."""
    most, out = 256**width - 1, bytearray()
    for gap in (int(gap) - 1 for gap in at.diff(prepend=torch.tensor([-1]))):
        out += (b"\xff" * width) * (gap // most) + (gap % most).to_bytes(width, "little")
    return torch.frombuffer(out, dtype=torch.uint8) if out else torch.empty(0, dtype=torch.uint8)


def saved_in_bytes(path: Path, at: Tensor, shape: list[int], width: int, kind: str = "add") -> Tensor:
    """A file as it was before Rice coding; returns its values."""
    gaps, values = in_bytes(at, width), torch.randn(len(at))
    about = {"w": {"shape": shape, "width": width, "crc": files.checksum(["w", kind, shape, width], gaps, values)}}
    entries = {"format": "fusedadapt.delta", "kind": kind, "entries": json.dumps(about)}
    files.write_safetensors(path, {"w.gaps": gaps, "w.values": values}, entries)
    return values


@pytest.mark.parametrize("width", [1, 2])
def test_earlier_files_are_read(tmp_path: Path, width: int) -> None:
    for at in positions():
        if not len(at) or int(at[-1]) < 2**31:
            values = saved_in_bytes(tmp_path / "d", at, [2**20, 2**12], width)
            found = SparseDelta.load(tmp_path / "d").entries["w"]
            assert torch.equal(found.indices, at) and torch.equal(found.values, values) and found.shape == (2**20, 2**12)


def test_files_with_a_right_checksum_and_wrong_contents_are_refused(tmp_path: Path) -> None:
    path, at = tmp_path / "d", torch.tensor([1, 5, 2**32 + 3])  # as 32 bits the last would be 3
    for shape in ([6], [2**32], [-(2**20), -(2**20)], [2**40, 2**40], [1.5], ["6"], [True]):
        saved_in_bytes(path, at, shape, 2)
        with pytest.raises(ValueError, match="SparseDelta.load: expected a whole file"):
            SparseDelta.load(path)
    saved_in_bytes(path, at[:2], [6], 1, "multiply")
    with pytest.raises(ValueError, match='kind "add" or "set"'):
        SparseDelta.load(path)


@pytest.mark.parametrize(
    "listed",
    ["[" * 100_000, '[["w", {}]]', '"w"', '{"w": 5}', '{"w": {"shape": [6], "shift": Infinity}}', '{"w": {"shape": [6], "width": Infinity}}',
     '{"w": {"shape": [6], "shift": "0"}}', '{"w": {"shape": [4611686018427387904, 4, 0], "shift": 0}}'],
)  # fmt: skip
def test_lists_of_contents_that_are_none(tmp_path: Path, listed: str) -> None:
    """An OverflowError, a RecursionError or an AttributeError of Python's own says nothing about the file."""
    path, (code, _) = tmp_path / "d", coding.encode(torch.tensor([], dtype=torch.int64))
    values = torch.zeros(0)
    if '"shape"' in listed:
        about = json.loads(listed)
        e = about["w"]
        e["crc"] = files.checksum(["w", "add", e["shape"], ["shift", e["shift"]] if "shift" in e else e["width"]], code, values)
        listed = json.dumps(about)
    files.write_safetensors(path, {"w.gaps": code, "w.values": values}, {"format": "fusedadapt.delta", "kind": "add", "entries": listed})
    with pytest.raises(ValueError, match="SparseDelta.load: expected a whole file"):
        SparseDelta.load(path)
    result = examine(path)
    assert result is not None and result.faults
    files.write_safetensors(path, {"w": code}, {"format": "fusedadapt.masks", "masks": listed})
    with pytest.raises(ValueError, match="load_masks: expected a whole file"):
        load_masks(path)


def test_a_file_with_far_gaps_comes_back(tmp_path: Path) -> None:
    at = torch.arange(1, 20) * 65301
    SparseDelta({"w": Entry(at, torch.ones(19), torch.Size([2_000_000]))}).save(tmp_path / "d")
    loaded = SparseDelta.load(tmp_path / "d").entries["w"].indices
    assert torch.equal(loaded.long(), at) and loaded.dtype == torch.int32
    SparseDelta({"w": Entry(at + 2**33, torch.ones(19), torch.Size([2**20, 2**20]))}).save(tmp_path / "d")
    assert torch.equal(SparseDelta.load(tmp_path / "d").entries["w"].indices, at + 2**33)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    changed().save(path)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    for at in (head, head + 40, len(whole) - 1, len(whole) - 9):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            SparseDelta.load(path)
    for broken in (whole[:-1], whole[: head - 3], b"", b"\0" * 50, whole + b"x"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="SparseDelta.load: expected"):
            SparseDelta.load(path)
    Mask.full((3,), True).save(path)
    with pytest.raises(ValueError, match="expected a delta's file"):
        SparseDelta.load(path)


@pytest.mark.parametrize("kind", ["add", "set"])
def test_a_flipped_bit_anywhere_is_refused_or_harmless(tmp_path: Path, kind: str) -> None:
    """Also in the shapes, names and kinds of the header, which still parse then."""
    base = {"x": torch.randn(40, 30), "y": torch.randn(70).bfloat16()}
    delta, path = SparseDelta.from_diff(base, {n: t + 1 for n, t in base.items()}, k=9, kind=kind), tmp_path / "d"
    delta.save(path)
    whole, silent = path.read_bytes(), list[int]()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            found = SparseDelta.load(path)
        except ValueError as error:
            assert str(error).startswith("SparseDelta.load: expected"), error
        else:
            same = found.kind == kind and found.entries.keys() == delta.entries.keys()
            if not same or any(found.entries[n].shape != e.shape or found.entries[n].values.dtype != e.values.dtype
                               or not torch.equal(found.entries[n].indices, e.indices)
                               or bits(found.entries[n].values) != bits(e.values) for n, e in delta.entries.items()):  # fmt: skip
                silent.append(at)
    assert not silent


def test_saving_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d"
    changed().save(path)
    whole = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fusedadapt.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        changed(0.5).save(path)
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == ["d"]


def test_one_value_out_of_a_larger_tensor(tmp_path: Path) -> None:
    """One element counts as contiguous whatever its stride, and was refused."""
    value = torch.arange(8.0)[2::4][:1]
    SparseDelta({"w": Entry(torch.tensor([1]), value, torch.Size([6]))}).save(tmp_path / "d")
    assert SparseDelta.load(tmp_path / "d").entries["w"].values.tolist() == [2.0]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="not a device or pipe"):
        changed().save(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        changed().save(tmp_path)
    assert (tmp_path / "pipe").is_fifo() and [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_deep_lists_in_a_description_are_damage(tmp_path: Path) -> None:
    """A depth just below Python's limit was read, and could not be written for its checksum."""
    for depth in (2, 500, 990):
        text = '{"w": {"shape": ' + "[" * depth + "]" * depth + ', "shift": 0, "crc": 0}}'
        with pytest.raises(coding.Damaged, match="deeper lists|RecursionError"):
            coding.contents(text)

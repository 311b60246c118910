"""Mask: bits, algebra, row alignment, positions, rank, files. Truth: the bool tensor it stands for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedadapt as fa
from fusedadapt.sparse import Mask
from fusedadapt.sparse.mask import load_masks, save_masks

SHAPES = [(0,), (1,), (31,), (32,), (33,), (1023,), (1024,), (1025,), (), (3, 0), (0, 5), (5, 7), (4, 32), (3, 33), (2, 3, 65), (70, 1)]


@pytest.fixture(autouse=True, params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> Any:
    with fa.backend(request.param):
        yield


def draw(shape: tuple[int, ...], seed: int = 0, density: float = 0.4) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 7 * math.prod(shape))) < density


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trips(shape: tuple[int, ...], rows: bool) -> None:
    for density in (0.0, 0.02, 0.4, 1.0):
        wanted = draw(shape, density=density)
        mask = Mask.from_bool(wanted, row_aligned=rows)
        assert torch.equal(mask.to_bool(), wanted) and mask.shape == wanted.shape and mask.numel() == wanted.numel()
        assert mask.nnz == int(wanted.sum()) and mask.density == pytest.approx(mask.nnz / max(1, wanted.numel()))
        at = wanted.reshape(-1).nonzero().reshape(-1)
        assert torch.equal(mask.indices(), at.int()) and mask.indices().dtype == torch.int32
        for index in (at, at.int()):
            assert Mask.from_indices(index, shape) == mask.flat()
        flat, aligned = mask.flat(), mask.aligned()
        assert not flat.row_aligned and aligned.row_aligned == bool(shape)
        assert flat == aligned and aligned == flat and torch.equal(aligned.to_bool(), wanted)
        assert flat.words.numel() == (wanted.numel() + 31) // 32
        assert aligned.words.numel() == (math.prod(shape[:-1]) * ((shape[-1] + 31) // 32) if shape else 1)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_algebra(shape: tuple[int, ...], rows: bool) -> None:
    a, b = draw(shape, 1), draw(shape, 2)
    x, y = Mask.from_bool(a, row_aligned=rows), Mask.from_bool(b)
    for got, wanted in ((x & y, a & b), (x | y, a | b), (x ^ y, a ^ b), (x - y, a & ~b), (~x, ~a), (~~x, a), (y - x, b & ~a)):
        assert torch.equal(got.to_bool(), wanted) and got.nnz == int(wanted.sum()), "spare bits count"
    assert x - x == Mask.full(shape, False) and x | ~x == Mask.full(shape, True)
    assert x == Mask.from_bool(a) and (x == y) == torch.equal(a, b) and x != 3
    assert torch.equal(x.to_bool(), a) and torch.equal(y.to_bool(), b), "operands are left alone"


def test_bits_lie_lowest_first_in_row_major_order() -> None:
    mask = Mask.from_bool(torch.tensor([[True, False], [True, True]]))
    assert mask.words.tolist() == [0b1101]
    assert Mask.from_bool(torch.tensor([[True, False], [True, True]]), row_aligned=True).words.tolist() == [0b01, 0b11]
    assert Mask.full((32,), True).words.tolist() == [-1]
    strided = draw((9, 14), 3)
    for view in (strided.t(), strided[:, ::2], strided[2:, 3:]):
        assert torch.equal(Mask.from_bool(view).to_bool(), view)


def test_prefix_is_the_rank() -> None:
    wanted = draw((5000,), 4)
    mask = Mask.from_bool(wanted)
    before = torch.cumsum(wanted, 0)
    assert mask.prefix.tolist() == [int(before[i - 1]) if i else 0 for i in range(0, 5000, 1024)] + [int(wanted.sum())]
    for at in mask.indices().tolist()[::97]:  # the slot in a compact array: a look-up and a popcount
        inside = sum(bin(w & 0xFFFFFFFF).count("1") for w in mask.words[at // 1024 * 32 : at // 32].tolist())
        inside += bin(int(mask.words[at // 32]) & ((1 << at % 32) - 1)).count("1")
        assert int(mask.prefix[at // 1024]) + inside == int(before[at]) - 1


def test_other_shapes_and_devices() -> None:
    mask = Mask.from_bool(draw((6, 10)))
    assert torch.equal(mask.reshape(60).to_bool(), mask.to_bool().reshape(60)) and mask.to("cpu") == mask
    assert "nnz" in repr(mask) and "row_aligned" in repr(mask.aligned())
    with pytest.raises(ValueError, match=r"of 60 elements; got \(59,\)"):
        mask.reshape(59)
    with pytest.raises(ValueError, match="flat"):
        mask.aligned().reshape(60)
    with pytest.raises(TypeError):
        hash(mask)


def test_files(tmp_path: Path) -> None:
    masks = {
        name: Mask.from_bool(draw(shape), row_aligned=rows)
        for name, shape, rows in (("a.b", (3, 40), True), ("format", (), False), ("e", (0, 3), True))
    }
    save_masks(tmp_path / "masks.safetensors", masks)
    loaded = load_masks(tmp_path / "masks.safetensors")
    assert loaded.keys() == masks.keys()
    for name, mask in masks.items():
        assert loaded[name] == mask and loaded[name].row_aligned == mask.row_aligned and torch.equal(loaded[name].words, mask.words)
    masks["a.b"].save(tmp_path / "one")
    assert Mask.load(tmp_path / "one") == masks["a.b"]
    torch.save(masks, tmp_path / "by torch")
    assert torch.load(tmp_path / "by torch", weights_only=True) == masks
    (tmp_path / "by torch").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks.safetensors", "one"], "no temporary file stays"
    whole = (tmp_path / "one").read_bytes()
    for broken in (whole[:-1], whole[:20], b"", b"x" * 100):
        (tmp_path / "one").write_bytes(broken)
        with pytest.raises(ValueError, match="load_masks: expected"):
            Mask.load(tmp_path / "one")


def test_a_flipped_bit_anywhere_is_refused_or_harmless(tmp_path: Path) -> None:
    masks, path = {"a": Mask.from_bool(draw((5, 7))), "b": Mask.from_bool(draw((2, 33)), row_aligned=True)}, tmp_path / "masks"
    save_masks(path, masks)
    whole, silent = path.read_bytes(), list[int]()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            found = load_masks(path)
        except ValueError as error:
            assert str(error).startswith("load_masks: expected"), error
        else:
            silent += [] if found == masks and all(found[n].row_aligned == m.row_aligned for n, m in masks.items()) else [at]
    assert not silent
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="holds a, b; read it with load_masks"):
        Mask.load(path)


BAD = [
    (lambda: Mask(torch.zeros(2, dtype=torch.int32), (32,)), "expected 1 int32 words"),
    (lambda: Mask(torch.zeros(1, dtype=torch.int64), (32,)), "torch.int64"),
    (lambda: Mask.from_bool(torch.zeros(3)), "compare first"),
    (lambda: Mask.from_indices(torch.tensor([3, 2]), (5,)), "sorted"),
    (lambda: Mask.from_indices(torch.tensor([2, 2]), (5,)), "repeats"),
    (lambda: Mask.from_indices(torch.tensor([0, 5]), (5,)), r"\[0, 5\)"),
    (lambda: Mask.from_indices(torch.tensor([-1, 2]), (5,)), r"\[0, 5\)"),
    (lambda: Mask.from_indices(torch.tensor([1.0]), (5,)), "int32 or int64"),
    (lambda: Mask.from_bool([True, False]), "expected a bool tensor; got list"),
    (lambda: Mask.from_indices([1, 2], (5,)), "int32 or int64; got list"),
    (lambda: Mask.full((-1,), True), r"sides from 0 up; got \(-1,\)"),
    (lambda: Mask.full(5, True), "sides from 0 up; got 5"),
    (lambda: Mask.from_indices(torch.tensor([1]), (2.0, 3)), r"sides from 0 up; got \(2.0, 3\)"),
    (lambda: Mask([1], (3,)), "expected 1 int32 words for shape (.*); got list"),
    (lambda: Mask.full((3, 4), True) & Mask.full((4, 3), True), r"mask of shape \(3, 4\); got \(4, 3\)"),
]


@pytest.mark.parametrize(("call", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_input(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_only_masks_combine() -> None:
    with pytest.raises(TypeError, match="Mask.from_bool"):
        Mask.full((3,), True) & torch.ones(3, dtype=torch.bool)


def test_names_that_a_file_cannot_hold(tmp_path: Path) -> None:
    """All others come back, whatever characters they are of; a file that is there stays."""
    mask = Mask.from_bool(torch.rand(4, 6) > 0.5)
    names = ["", " ", "a/b\\\"'\n\0 é.w", "x.gaps", "\u2028", "日本", "a" * 5000]
    save_masks(tmp_path / "m", dict.fromkeys(names, mask))
    assert load_masks(tmp_path / "m") == dict.fromkeys(names, mask)
    for name in ("__metadata__", "\ud800", 1):
        with pytest.raises(ValueError, match="expected names"):
            save_masks(tmp_path / "m", {"a": mask, name: mask})
    assert len(load_masks(tmp_path / "m")) == len(names)
    save_masks(tmp_path / "m", {"a": mask.to_bool()})
    assert load_masks(tmp_path / "m") == {"a": mask}


def test_reshape_as_tensors_do() -> None:
    mask = Mask.from_bool(torch.rand(4, 6) > 0.5)
    for shape in ((6, 4), ((6, 4),), (-1,), (2, -1, 3), ([24],), (torch.Size([2, 12]),)):
        assert torch.equal(mask.reshape(*shape).to_bool(), mask.to_bool().reshape(*shape))
    for shape in ((5, 5), (-1, -1), (-4, -6), (7, -1), ("a",)):
        with pytest.raises(ValueError, match=r"Mask\.reshape: expected a shape of 24 elements"):
            mask.reshape(*shape)
    with pytest.raises(ValueError, match="sides from 0 up"):
        Mask.from_indices(torch.tensor([1]), (-4, -6))


def test_a_mask_on_the_meta_device_can_be_printed() -> None:
    """Errors and debuggers show masks; how many elements are chosen is not known there."""
    assert repr(Mask.full((2, 3), True).to("meta")) == "Mask(shape=(2, 3), nnz=?, device=meta)"


@pytest.mark.parametrize("aligned", [False, True])
def test_words_with_bits_beyond_the_elements_are_refused(aligned: bool) -> None:
    """Words inverted by hand, say: positions beyond the tensor, a density of 6.4, and a file that load calls damaged."""
    mask = Mask.from_bool(torch.rand(3, 37) < 0.5, row_aligned=aligned)
    with pytest.raises(ValueError, match=r"no bits beyond the 111 elements; got some; .*~mask"):
        Mask(~mask.words, mask.shape, row_aligned=aligned)
    assert (~mask).nnz == 111 - mask.nnz and Mask(~torch.zeros(2, dtype=torch.int32), (64,)).nnz == 64

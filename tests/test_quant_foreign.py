"""Checkpoints of other libraries: packed words worked out by hand and by slow packers of their own, and round trips to the byte."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_cases import NAME, SPECS, drawn, equal, gptq, grouped, packed, same, signed32, truth, weight
from torch import Tensor

import fusedadapt as fa
from fusedadapt import files
from fusedadapt.quant import foreign, format_of, quantize
from fusedadapt.quant.foreign import diagnose


@pytest.fixture(autouse=True)
def backend() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors
    with fa.backend("reference"):
        yield
    torch.set_num_threads(threads)


def test_words_of_eight_codes() -> None:
    """Codes 0 to 7 in a word: 0x76543210 along GPTQ's inputs, 0x75316420 along AWQ's outputs; symmetric zeros 0x77777777 and 0x88888888."""
    q = quantize(torch.arange(8.0).view(1, 8), "int4", 8, scale_dtype=torch.float16)
    q = dataclasses.replace(q, qdata=torch.tensor([[0x10, 0x32, 0x54, 0x76]], dtype=torch.uint8))
    assert foreign.to_gptq(q)["qweight"].tolist() == [[0x76543210]]
    column = dataclasses.replace(q, qdata=torch.arange(8, dtype=torch.uint8).view(8, 1), scale=torch.ones(8, 1).half(), shape=torch.Size((8, 1)))
    column = dataclasses.replace(column, zero=torch.zeros(8, 1, dtype=torch.uint8))
    assert foreign.to_awq(column)["qweight"].tolist() == [[0x75316420]]
    sym = quantize(weight("normal", 8, 64), "int4", symmetric=True, scale_dtype=torch.float16)
    assert foreign.to_gptq(sym, version=1)["qzeros"].tolist() == [[0x77777777]]
    assert foreign.to_gptq(sym, version="gptq_v2")["qzeros"].tolist() == [[signed32(0x88888888)]]


def test_three_bits_run_over_words() -> None:
    """32 codes in 3 words: code 10 has 2 bits in the first and 1 in the second, code 21 has 1 in the second and 2 in the third."""
    codes = torch.zeros(32, 32, dtype=torch.int64)
    codes[10], codes[21] = 5, 6
    tensors = gptq(codes, torch.ones(1, 32, dtype=torch.int64), torch.ones(1, 32).half(), grouped(32, 32), 3, 2)
    assert tensors[f"{NAME}.qweight"][:, 0].tolist() == [signed32(0b01 << 30), 0b1 | 0, 0b11]
    q, _ = foreign.from_gptq(tensors, NAME, version=2)
    assert torch.equal(q.dequantize()[:, [10, 21, 0]], torch.tensor([4.0, 5.0, -1.0]).half().expand(32, 3))


@pytest.mark.parametrize("version", (1, 2))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize(("n", "k", "size"), [(32, 64, 32), (64, 96, 96), (32, 160, 64), (96, 32, 16)])
def test_gptq_both_ways(bits: int, version: int, n: int, k: int, size: int) -> None:
    """Numbers as the formula has them, bytes back as they came; a short last group too."""
    codes, zeros, scales = drawn(n, k, -(-k // size), bits)
    tensors = gptq(codes, zeros, scales, grouped(k, size), bits, version)
    q, order = foreign.from_gptq(tensors, NAME, bits=bits, version=version)
    assert order is None and q.format.name == f"int{bits}" and q.dtype == torch.float16
    assert torch.equal(q.dequantize(torch.float32), truth(codes, zeros, scales, grouped(k, size)))
    back = foreign.to_gptq(q, NAME, version=version)
    assert back.keys() == tensors.keys() and all(same(back[each], tensors[each]) for each in tensors)
    assert diagnose(tensors, NAME) == [] and diagnose(back, NAME) == []
    if k % size == 0 or version == 2:  # without g_idx, by shapes or the group size
        rest = {each: t for each, t in tensors.items() if not each.endswith("g_idx")}
        again, _ = foreign.from_gptq(rest, NAME, bits=bits, version=version, group_size=size)
        assert equal(again, q)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_gptq_act_order(bits: int) -> None:
    """Scattered groups: the columns in their groups' order, the order beside them; y = x[:, order] W^T; the file comes back to the byte."""
    n, k, size = 32, 192, 64
    codes, zeros, scales = drawn(n, k, 3, bits, 1)
    index = grouped(k, size)[torch.randperm(k, generator=torch.Generator().manual_seed(5))].contiguous()
    tensors = gptq(codes, zeros, scales, index, bits, 1)
    q, order = foreign.from_gptq(tensors, NAME, version="gptq", bits=bits)
    wanted = truth(codes, zeros, scales, index)
    assert order is not None and q.format.block == (1, 64) and torch.equal(q.dequantize(torch.float32), wanted[:, order])
    x = torch.randn(3, k, dtype=torch.float64)
    torch.testing.assert_close(x[:, order] @ q.dequantize(torch.float64).t(), x @ wanted.double().t())
    back = foreign.to_gptq(q, NAME, order=order, version=1)
    assert all(same(back[each], tensors[each]) for each in tensors)
    with pytest.raises(ValueError, match="every input from 0 to 191 once"):
        foreign.to_gptq(q, NAME, order=order.clone().fill_(0))


@pytest.mark.parametrize("index", [[0] * 5 + [1] * 11 + [2] * 16, [2, 0, 1, 1] * 8, [0] * 16 + [2] * 16, [1] * 32])
def test_gptq_groups_of_any_length(index: list[int]) -> None:
    """Uneven, missing and repeated groups are cut into equal ones: the numbers are exact."""
    codes, zeros, scales = drawn(8, 32, 3, 4, 2)
    at = torch.tensor(index, dtype=torch.int32)
    q, order = foreign.from_gptq(gptq(codes, zeros, scales, at, 4, 2), NAME, version=2)
    wanted = truth(codes, zeros, scales, at)
    assert torch.equal(q.dequantize(torch.float32), wanted if order is None else wanted[:, order])


def test_gptq_zeros_wrap() -> None:
    """Version 1 stores a zero of 0 as 15: read as 0, or as 16 with wrap=False, as kernels do that add 1 and do not wrap. Both are written back."""
    codes, zeros, scales = drawn(32, 64, 2, 4)
    zeros[0, :5] = 0
    tensors = gptq(codes, zeros, scales, grouped(64, 32), 4, 1)
    q, _ = foreign.from_gptq(tensors, NAME, version=1)
    assert torch.equal(q.dequantize(torch.float32), truth(codes, zeros, scales, grouped(64, 32)))
    unwrapped, _ = foreign.from_gptq(tensors, NAME, version=1, wrap=False)
    assert unwrapped.zero is not None and unwrapped.zero[:5, 0].tolist() == [16] * 5
    for each in (q, unwrapped):
        assert all(same(t, tensors[part]) for part, t in foreign.to_gptq(each, NAME, version=1).items())
    with pytest.raises(ValueError, match="zeros up to 15"):
        foreign.to_gptq(unwrapped, NAME, version=2)
    with pytest.raises(ValueError, match="zeros up to 15"):
        foreign.to_awq(unwrapped, NAME)
    eight = gptq(*drawn(32, 64, 2, 8), grouped(64, 32), 8, 2)
    eight[f"{NAME}.qzeros"].fill_(-1)
    with pytest.raises(ValueError, match="wrap=True"):
        foreign.from_gptq(eight, NAME, version=1, wrap=False, trust=True)


def test_gptq_mislabelled_zeros() -> None:
    """Symmetric zeros tell their version: taken without a label, refused against a wrong one, which can be insisted on."""
    q = quantize(weight("normal", 64, 128), "int4", 64, symmetric=True, scale_dtype=torch.float16)
    for version, other in ((1, 2), (2, 1)):
        tensors = foreign.to_gptq(q, NAME, version=version)
        assert foreign.zeros_version(tensors[f"{NAME}.qzeros"], 4, 64) == version
        assert same(foreign.from_gptq(tensors, NAME)[0].dequantize(), q.dequantize().half()) or q.dtype != torch.float16
        with pytest.raises(ValueError, match=rf"qzeros: expected zeros of version {other}.*pass version={version}"):
            foreign.from_gptq(tensors, NAME, version=other)
        assert foreign.from_gptq(tensors, NAME, version=other, trust=True)[0].zero is not None
        assert diagnose(tensors, NAME, label=version) == []
        (found,) = diagnose(tensors, NAME, label=other)
        assert found.startswith(f"{NAME}.qzeros: expected zeros of version {other}, as labelled")
    asymmetric = foreign.to_gptq(quantize(weight("normal", 64, 128), "int4", 64, scale_dtype=torch.float16), NAME, version=2)
    with pytest.raises(ValueError, match="qzeros: expected version=1"):
        foreign.from_gptq(asymmetric, NAME)
    assert diagnose(asymmetric, NAME, label="gptq_v2") == []
    (found,) = diagnose(asymmetric, NAME, label="gptq")
    assert "on average, as version 2 has them" in found


def awq(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """codes [K, N], eight outputs a word in AWQ's order."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    shuffled = [t.view(len(t), -1, 8)[..., list(order)].reshape(len(t), -1) for t in (codes, zeros)]
    parts = {"qweight": packed(shuffled[0].tolist(), 4), "qzeros": packed(shuffled[1].tolist(), 4), "scales": scales}
    return {f"{NAME}.{part}": t for part, t in parts.items()}


@pytest.mark.parametrize(("n", "k", "size"), [(8, 32, 32), (64, 128, 64), (24, 96, 32), (40, 13, 13)])
def test_awq_both_ways(n: int, k: int, size: int) -> None:
    codes, zeros, scales = drawn(n, k, k // size, 4, 3)
    zeros[0, 0] = 0
    tensors = awq(codes, zeros, scales)
    q = foreign.from_awq(tensors, NAME)
    assert torch.equal(q.dequantize(torch.float32), truth(codes, zeros, scales, grouped(k, size)))
    back = foreign.to_awq(q, NAME)
    assert back.keys() == tensors.keys() and all(same(back[each], tensors[each]) for each in tensors)
    assert diagnose(tensors, NAME) == []
    if n % 32 == 0:
        again, _ = foreign.from_gptq(foreign.to_gptq(q, NAME), NAME, version=1)
        assert equal(again, q)


@pytest.mark.parametrize(("k", "size", "wide"), [(256, 128, 1), (512, 64, 2), (256, 32, 4), (2048, 128, 2), (32, 32, 4)])
def test_awq_gemv(k: int, size: int, wide: int) -> None:
    """Rows of inputs in order, scales and zeros filled up to whole words."""
    n, groups = 16, k // size
    codes, zeros, scales = drawn(n, k, groups, 4, 4)
    room = 8 * wide - groups
    tensors = {
        f"{NAME}.qweight": packed(codes.t().tolist(), 4),
        f"{NAME}.qzeros": packed(torch.nn.functional.pad(zeros.t(), (0, room)).tolist(), 4),
        f"{NAME}.scales": torch.nn.functional.pad(scales.t(), (0, room)).contiguous(),
    }
    q = foreign.from_awq(tensors, NAME, group_size=size)
    assert torch.equal(q.dequantize(torch.float32), truth(codes, zeros, scales, grouped(k, size)))
    if k != 64 * wide:  # else the shapes are those of GPTQ, too
        assert diagnose(tensors, NAME, group_size=size) == [], "what fills the scales up is no scale"


def gemv_row(n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
    """A layer with one group a row, and its weight: the scales are filled up to eight, as many as groups of 128 would have."""
    codes, zeros, scales = drawn(n, k, 1, 4, 4)
    tensors = {
        f"{NAME}.qweight": packed(codes.t().tolist(), 4),
        f"{NAME}.qzeros": packed(torch.nn.functional.pad(zeros.t(), (0, 7)).tolist(), 4),
        f"{NAME}.scales": torch.nn.functional.pad(scales.t(), (0, 7)).contiguous(),
    }
    return tensors, truth(codes, zeros, scales, grouped(k, k))


def test_a_group_size_of_a_whole_row() -> None:
    """-1, as config.json has it."""
    tensors, w = gemv_row(16, 256)
    assert torch.equal(foreign.from_awq(tensors, NAME, group_size=-1).dequantize(torch.float32), w)
    assert diagnose(tensors, NAME, group_size=-1) == []
    q = quantize(weight("normal", 32, 64), "int4", -1, scale_dtype=torch.float16)
    rest = {each: t for each, t in foreign.to_gptq(q, NAME).items() if not each.endswith("g_idx")}
    assert equal(foreign.from_gptq(rest, NAME, version=1, group_size=-1, dtype=q.dtype)[0], q)
    readers: list[Any] = [(foreign.from_awq, tensors), (foreign.from_gptq, rest)]
    for (read, layer), size in itertools.product(readers, (-2, 64.0, True, "64")):
        with pytest.raises(ValueError, match="expected group_size: "):
            read(layer, NAME, group_size=size)
    with pytest.raises(ValueError, match="scales: expected 2 groups, which 64 inputs have in groups of 32; got 1"):
        foreign.from_gptq(rest, NAME, version=1, group_size=32)


STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("name", ("nf4", "fp4"))
@pytest.mark.parametrize(("shape", "block"), [((16, 64), 64), ((7, 65), 64), ((300, 130), 128), ((1, 1), 32), ((3, 4, 64), 4096)])
def test_bitsandbytes_both_ways(name: str, nested: bool, shape: tuple[int, ...], block: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), name, block, double_quant=nested)
        for storage in STORAGES:
            if q.qdata.numel() % storage.itemsize:
                with pytest.raises(ValueError, match="multiples of"):
                    foreign.to_bitsandbytes(q, "up.weight", quant_storage=storage)
                continue
            tensors = foreign.to_bitsandbytes(q, "up.weight", quant_storage=storage)
            assert tensors["up.weight"].dtype == storage
            assert equal(foreign.from_bitsandbytes(tensors, "up.weight"), q)
            assert diagnose(tensors, "up") == []
            assert int((tensors["up.weight.quant_map"].view(torch.int32) == 0).sum()) == (2 if name == "fp4" else 1), "+0, as they write it"


@pytest.mark.parametrize("nested", (False, True))
@pytest.mark.parametrize("name", ("nf4", "fp4"))
def test_bitsandbytes_itself_reads_and_writes_the_same(name: str, nested: bool) -> None:
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional as functional

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = weight("normal", 33, 128, dtype)  # whole blocks a row: of others its AVX-512 code multiplies some by their neighbour's scale
        data, state = functional.quantize_4bit(w, quant_type=name, compress_statistics=nested)
        theirs = {"weight": data} | {f"weight.{part}": t for part, t in state.as_dict(packed=True).items()}
        q = foreign.from_bitsandbytes(theirs)
        assert torch.equal(q.dequantize(), functional.dequantize_4bit(data, state))
        ours = foreign.to_bitsandbytes(q)
        assert ours.keys() == theirs.keys()
        for each, t in ours.items():
            assert same(t, theirs[each].view(t.shape)), each
        loaded = functional.QuantState.from_dict(
            {part.removeprefix("weight."): t for part, t in ours.items() if part != "weight"}, torch.device("cpu")
        )
        assert torch.equal(functional.dequantize_4bit(ours["weight"], loaded), q.dequantize())


@pytest.mark.parametrize("axis", ("row", "tensor", "block"))
@pytest.mark.parametrize("name", ("fp8_e4m3", "fp8_e5m2"))
def test_fp8_both_ways(name: str, axis: str) -> None:
    q = quantize(weight("normal", 200, 300).bfloat16(), name, group_axis=axis)
    tensors = foreign.to_fp8(q, f"{NAME}.weight")
    assert set(tensors) == {f"{NAME}.weight", f"{NAME}.weight_scale{'_inv' if axis == 'block' else ''}"}
    assert equal(foreign.from_fp8(tensors, f"{NAME}.weight"), q) and diagnose(tensors, NAME) == []
    tiles = [t.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300] for t in tensors.values() if t.shape == (2, 3)]
    for scale in tiles:
        assert torch.equal(q.dequantize(torch.float32), q.qdata.float() * scale)


def test_fp8_with_power_of_two_scales_and_other_tiles() -> None:
    q = quantize(weight("normal", 96, 80), "fp8_e4m3")
    scales = torch.randint(100, 140, (3, 2), dtype=torch.int32).to(torch.uint8).view(torch.float8_e8m0fnu)
    tensors = {"weight": q.qdata, "weight_scale_inv": scales}
    ours = foreign.from_fp8(tensors, block=(32, 64))
    wide = scales.float().repeat_interleave(32, 0).repeat_interleave(64, 1)[:, :80]
    assert torch.equal(ours.dequantize(torch.float32), q.qdata.float() * wide)
    back = foreign.to_fp8(ours)
    assert all(same(back[each], tensors[each]) for each in tensors)


@pytest.mark.parametrize("name", SPECS)
def test_our_own_files(name: str, tmp_path: Path) -> None:
    """Every format through a safetensors file."""
    from safetensors import safe_open

    for shape in ((33, 70), (5, 64), (2, 3, 32), (0, 8)):
        q = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16(), SPECS[name])
        tensors, metadata = foreign.to_plain(q, "up.weight")
        files.write_safetensors(tmp_path / "w.safetensors", tensors, metadata)
        with safe_open(tmp_path / "w.safetensors", "pt") as file:
            loaded, described = {each: file.get_tensor(each) for each in file.keys()}, file.metadata()  # noqa: SIM118
        assert equal(foreign.from_plain(loaded, described, "up.weight"), q)
        assert diagnose(loaded, "up", metadata=described) == []


def test_symmetric_int8_becomes_gptq() -> None:
    q = quantize(weight("normal", 32, 64), "int8", 32, scale_dtype=torch.float16)
    back, _ = foreign.from_gptq(foreign.to_gptq(q, version=2), version=2)
    assert torch.equal(back.dequantize(torch.float32), q.dequantize(torch.float32)) and back.format == format_of(q.format, symmetric=False)

"""Bytes against the packages that define the formats: bitsandbytes, torchao, ml_dtypes, and torch's own float8.

Every format is compared over 500 weights or more and every tie. Where another package differs, the test says where and why; everything else is equal.
The reference is the side compared: that the other backends write its bytes is tested elsewhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quant_cases import FLOATS, same, ties, weights
from torch import Tensor

import fusedadapt as fa
from fusedadapt.quant import QuantizedTensor, format_of, quantize
from fusedadapt.quant.tables import table
from fusedadapt.reference import quant as reference

COUNT = 540  # every kind, shape and dtype once
#: kinds of weights whose elements spread over the codes: shares of differing codes are counted on these (others repeat one number a thousand times)
SPREAD = ("normal", "small", "positive", "negative")


@pytest.fixture(autouse=True)
def backend() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors
    with fa.backend("reference"):
        yield
    torch.set_num_threads(threads)


def bnb() -> Any:
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional

    return bitsandbytes.functional


def codes(q: QuantizedTensor) -> Tensor:
    return reference.unpack(q.parts.qdata, q.format, q.rows, q.columns)


def with_all_ties(name: str, block: int) -> list[tuple[str, Tensor]]:
    fmt = format_of(name, block, compat="bnb_cpu")
    return [*weights(COUNT), *((f"ties {dtype}", ties(fmt).to(dtype)) for dtype in FLOATS), ("short", ties(fmt)[:, :-3].contiguous())]


@pytest.mark.parametrize("block", (64, 128, 256, 512, 1024, 2048, 4096))
@pytest.mark.parametrize("name", ("nf4", "fp4"))
def test_bitsandbytes_4bit_bytes(name: str, block: int) -> None:
    """No exception: packed codes and scales of every block size, odd lengths and short last blocks included."""
    functional = bnb()
    for what, w in with_all_ties(name, block):
        packed, state = functional.quantize_4bit(w, blocksize=block, quant_type=name)
        ours = quantize(w, name, block, compat="bnb_cpu")
        assert torch.equal(ours.qdata, packed), what
        assert same(ours.scale, state.absmax), what


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ("nf4", "fp4"))
def test_bitsandbytes_4bit_dequantized(name: str, dtype: torch.dtype) -> None:
    """The numbers that come back, to the bit. Exception: for odd rows, or with AVX-512, its code takes fp4's 8 for 0.0, not -0.0."""
    functional = bnb()
    for what, w in weights(COUNT):
        packed, state = functional.quantize_4bit(w, quant_type=name)
        theirs = functional.dequantize_4bit(packed, state).to(w.dtype).view(w.shape)
        ours = quantize(w, name, compat="bnb_cpu").dequantize()
        assert torch.equal(ours, theirs), what
        assert name == "fp4" or same(ours, theirs), what


@pytest.mark.parametrize("name", ("nf4", "fp4"))
def test_bitsandbytes_double_quantization(name: str) -> None:
    """Codes of the weights equal. Exceptions: the mean of the scales depends on the order of summing (relative 1e-6); the 8-bit codes of the scales
    come from a table of 65,536 bins on their side: off by one in at most 0.5 %; and in that table everything below 1.5e-5 of the largest is 7.75e-6.
    """
    functional = bnb()
    total = other = 0
    for what, w in weights(COUNT):
        packed, state = functional.quantize_4bit(w, quant_type=name, compress_statistics=True)
        ours = quantize(w, name, compat="bnb_cpu", double_quant=True)
        assert torch.equal(ours.qdata, packed), what
        assert ours.offset is not None and ours.super is not None
        torch.testing.assert_close(ours.offset, state.offset.reshape(()), rtol=1e-6, atol=0, msg=what)
        # The rest compares on their offset: one step in the mean moves every difference from it.
        absmax = quantize(w, name, compat="bnb_cpu").scale - state.offset
        again = quantize(absmax, "dynamic8", 256)
        real = state.state2.absmax > 2.0**-120  # less is a block of zeros to us
        assert torch.equal(again.scale[real], state.state2.absmax[real]), what
        exact = absmax.abs() > torch.where(real, 1.5e-5 * state.state2.absmax, torch.inf).repeat_interleave(256)[: absmax.numel()]
        step = (again.qdata.view(-1).int() - state.absmax.int()).abs()[exact]
        assert int(step.max() if len(step) else 0) <= 1, what
        if what.split()[0] in SPREAD:
            total, other = total + len(step), other + int((step > 0).sum())
    assert other <= 0.005 * total, (other, total)


@pytest.mark.parametrize("block", (64, 256, 4096))
def test_bitsandbytes_8bit_blocks(block: int) -> None:
    """Exception, as for nested scales, is their table of bins: above 1.5e-5 of absmax at most 0.5 % of the codes differ, by one."""
    functional = bnb()
    total = other = 0
    for what, w in weights(COUNT):
        theirs, state = functional.quantize_blockwise(w, blocksize=block)
        ours = quantize(w, "dynamic8", block)
        whole = state.absmax > 2.0**-120
        assert torch.equal(ours.scale[whole], state.absmax[whole]), what
        v = w.float().reshape(-1).abs() / state.absmax.repeat_interleave(block)[: w.numel()]
        step = (ours.qdata.int() - theirs.int()).abs().reshape(-1)[v > 1.5e-5]
        assert int(step.max() if len(step) else 0) <= 1, what
        if what.split()[0] in SPREAD:
            total, other = total + len(step), other + int((step > 0).sum())
    assert other <= 0.005 * total, (other, total)


def test_bitsandbytes_tables() -> None:
    functional = bnb()
    assert same(functional.create_dynamic_map(), torch.tensor(table("dynamic").values))
    assert same(functional.create_dynamic_map(signed=False), torch.tensor(table("dynamic_unsigned").values))
    for name in ("nf4", "fp4"):
        assert torch.equal(functional.get_4bit_type(name, device="cpu"), torch.tensor(table(name).values))


def test_bitsandbytes_int8_rows() -> None:
    """No exception: codes and row statistics, for fp32, bf16 and fp16."""
    functional = bnb()
    for what, w in [*weights(COUNT), *(("ties", ties(format_of("int8")).to(dtype)) for dtype in FLOATS)]:
        theirs, absmax, _ = functional.int8_vectorwise_quant(w.clone())
        ours = quantize(w, "int8")
        assert torch.equal(ours.qdata, theirs), what
        assert same(ours.scale, (absmax / 127).view(-1, 1)), what


MX_RULES = ("floor", "ceil", "even", "rceil")


def mx() -> Any:
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats import mx_tensor

    return mx_tensor


@pytest.mark.parametrize("rule", MX_RULES)
@pytest.mark.parametrize("name", ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp4"))
def test_torchao_mx(name: str, rule: str) -> None:
    """Exceptions: groups with NaN or infinity (tested with the edge contract); a scale byte of 0, which torchao divides by like 2^-126 (or 1,
    with "rceil") though it means 2^-127; and "rceil" where absmax / largest lies less than 2^-20 above a power of two, which torchao's logarithm
    in fp32 takes for the power itself.
    """
    module = mx()
    dtype = {"mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2, "mxfp4": torch.float4_e2m1fn_x2}[name]
    mode = module.ScaleCalculationMode[rule.upper()]
    fmt = format_of(name, scale_rule=rule)
    cases = list(weights(COUNT, (torch.float32, torch.bfloat16), 32))
    left_out = groups = 0
    for what, w in [*cases, ("ties", ties(fmt)), ("ties", ties(fmt).bfloat16())]:
        byte, data = module.to_mx(w, dtype, 32, mode)
        byte, data = byte.view(torch.uint8), data.view(torch.uint8)
        ours = quantize(w, fmt)
        ratio = w.float().view(len(w), -1, 32).abs().amax(-1) / {"mxfp8_e4m3": 448, "mxfp8_e5m2": 57344, "mxfp4": 6}[name]
        above = torch.frexp(ratio).mantissa - 0.5
        near = (above > 0) & (above < 2.0**-20) & (rule == "rceil")
        assert torch.equal(ours.scale[~near], byte[~near]), what
        plain = (~near & ((ours.scale != 0) | (ratio == 0))).repeat_interleave(32 * fmt.bits // 8, 1)
        assert torch.equal(ours.parts.qdata[plain], data[plain]), what
        left_out, groups = left_out + int((~plain).sum()), groups + plain.numel()
    assert left_out <= 0.02 * groups, (left_out, groups)


def test_torchao_nvfp4() -> None:
    """Both levels. Exception: a tensor of zeros, whose second scale torchao makes 0 and then divides by; ours is 1."""
    mx()
    from torchao.prototype.mx_formats import nvfp4_tensor

    made = ties(format_of("nvfp4"), 16)
    made = torch.cat([torch.full((1, 16), 2688.0), made])  # the second scale is 1 and absmax / 6 its own e4m3
    for what, w in [*weights(COUNT, (torch.float32, torch.bfloat16), 16), ("ties", made), ("ties", made.bfloat16())]:
        ours = quantize(w, "nvfp4")
        if not w.any():
            assert not ours.dequantize().any() and float(ours.super) == 1.0, what  # type: ignore[arg-type]
            continue
        second = nvfp4_tensor.per_tensor_amax_to_scale(w.abs().amax())
        first, data = nvfp4_tensor.nvfp4_quantize(w, 16, second)
        assert same(ours.super, second.float().reshape(())), what
        assert torch.equal(ours.scale, first.view(torch.uint8)), what
        assert torch.equal(ours.qdata, data), what


def scalars(name: str) -> Tensor:
    """Ties of a small float with their neighbours, all signs and scales, some beyond the range."""
    t = table(name)
    v = torch.tensor([v for v in t.values if v == v and abs(v) != torch.inf]).sort().values
    middle = (v[:-1] + v[1:]) / 2
    near = [torch.nextafter(middle, torch.tensor(side)) for side in (torch.inf, -torch.inf)]
    draw = torch.randn(20_000, generator=torch.Generator().manual_seed(3)) * torch.logspace(-12, 6, 20_000, base=2)
    top = float(v.max())
    return torch.cat([v, middle, *near, draw.clamp(-top, top), torch.tensor([0.0, -0.0, 1e-45, -1e-45, top, -top])])


@pytest.mark.parametrize("name", ("e2m1", "e4m3", "e5m2"))
def test_ml_dtypes_rounds_alike(name: str) -> None:
    """Every finite number within range. Beyond it ours saturates; ml_dtypes gives NaN or infinity where the format has one."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    import numpy as np

    theirs = {"e2m1": ml_dtypes.float4_e2m1fn, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[name]
    v = scalars(name)
    wanted = torch.from_numpy(v.numpy().astype(theirs).view(np.uint8).copy())
    assert torch.equal(reference._lookup(v, table(name)), wanted)
    every = np.arange(len(table(name).values), dtype=np.uint8).view(theirs).astype(np.float32)
    assert same(torch.from_numpy(every), torch.tensor(table(name).values))


def test_ml_dtypes_e8m0_values() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    import numpy as np

    every = np.arange(256, dtype=np.uint8)
    ours = reference.scales(reference.Parts(torch.zeros(0), torch.from_numpy(every)), format_of("mxfp4"))
    assert same(ours, torch.from_numpy(every.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)))


@pytest.mark.parametrize("name", ("e4m3", "e5m2"))
def test_torch_float8_casts(name: str) -> None:
    """Rounding and decoding of all 256 bytes. Infinity is left out: ours saturates, torch's e5m2 has an infinity."""
    dtype = torch.float8_e4m3fn if name == "e4m3" else torch.float8_e5m2
    v = scalars(name)
    assert torch.equal(reference._lookup(v, table(name)), v.to(dtype).view(torch.uint8))
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert same(every.view(dtype).float(), torch.tensor(table(name).values))


@pytest.mark.parametrize("axis", ("row", "tensor", "block"))
@pytest.mark.parametrize("name", ("fp8_e4m3", "fp8_e5m2"))
def test_fp8_against_torch(name: str, axis: str) -> None:
    """absmax / largest, one reciprocal, one cast: with torch alone."""
    fmt = format_of(name, group_axis=axis)
    top = 448.0 if name == "fp8_e4m3" else 57344.0
    for what, w in weights(COUNT):
        n, k = w.shape
        rows, columns = fmt.sides(n, k)
        padded = torch.nn.functional.pad(w.float(), (0, -k % columns, 0, -n % rows))
        tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
        scale = tiles.abs().amax((1, 3)) / top
        v = torch.where((scale > 0)[:, None, :, None], tiles * (1 / scale)[:, None, :, None], 0.0).clamp(-top, top)
        wanted = v.view_as(padded)[:n, :k].to(fmt.storage_dtype)
        ours = quantize(w, fmt)
        assert same(ours.scale, scale), what
        assert same(ours.qdata, wanted), what

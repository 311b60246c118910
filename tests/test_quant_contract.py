"""What every format promises about zeros, constants, NaN, tiny and huge numbers, tails, odd and empty sizes; properties; refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from quant_cases import KINDS, SHAPES, SPECS, equal, same, weight
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedadapt as fa
from fusedadapt.ops import quant as quant_ops
from fusedadapt.quant import FORMATS, QFormat, QuantizedTensor, format_of, quantize
from fusedadapt.reference import quant as reference


@pytest.fixture(autouse=True)
def backend() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors
    with fa.backend("reference"):
        yield
    torch.set_num_threads(threads)


def group_of(fmt: QFormat, n: int, k: int) -> Tensor:
    """The number of the group of every element."""
    count = math.prod(fmt.grid(n, k))
    return reference.spread(torch.arange(count), fmt, n, k)


@pytest.mark.parametrize("name", SPECS)
def test_zeros_stay_zeros(name: str) -> None:
    """All of them, and groups of them between others; +0.0 comes back as +0.0."""
    fmt = SPECS[name]
    for shape in SHAPES:
        assert same(quantize(torch.zeros(shape), fmt).dequantize(), torch.zeros(shape)), shape
        assert not quantize(-torch.zeros(shape), fmt).dequantize().any()
    w = weight("normal", 256, 256)
    at = group_of(fmt, 256, 256) == (1 if math.prod(fmt.grid(256, 256)) > 1 else 0)
    w[at] = 0.0
    back = quantize(w, fmt).dequantize()
    nested = fmt.scale == "nested"  # the scale itself is rounded, and the code of 0 is worth 0
    assert not back[at].any() and not back.isnan().any() and (nested or not back[at].signbit().any())


@pytest.mark.parametrize("name", SPECS)
def test_constant_groups(name: str) -> None:
    """Where the scale is free the constant comes back to a rounding; where it is a power of two or coded, within half a step."""
    fmt, back = SPECS[name], {}
    for c in (0.1, -3.0, 1e-3, 77.0):
        w = torch.full((130, 130), c)
        back[c] = quantize(w, fmt).dequantize() / w - 1
    error = max(float(t.abs().max()) for t in back.values())
    largest = {"e8m0": 0.17, "e4m3": 0.07, "fp16": 1e-3, "bf16": 4e-3}.get(fmt.scale, 1e-6)
    if fmt.rule == "affine_sym":  # 2 absmax / 15 puts +-absmax between two codes
        largest = 0.07
    if fmt.scale == "nested":
        largest = 1e-6
    if fmt.table == "dynamic":  # -1.0 is not in the map
        largest = 0.0071
    if fmt.table == "dynamic_unsigned":
        error, largest = float(back[0.1].abs().max()), 1e-6
    assert error <= largest, error


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("name", SPECS)
def test_nan_and_infinity_are_never_silently_finite(name: str, bad: float) -> None:
    """The group becomes NaN as a whole, the others keep their bytes; nested scales share a mean, so there the whole tensor does, or the row
    where it has a scale."""
    fmt = SPECS[name]
    w = weight("normal", 140, 260)
    clean = quantize(w, fmt).dequantize()
    w[3, 17] = bad
    back = quantize(w, fmt).dequantize()
    mine = group_of(fmt, 140, 260)
    mine = mine == mine[3, 17]
    if fmt.scale == "nested":
        mine = torch.ones_like(mine)
    if fmt.scale == "e8m0_row":
        mine = mine.any(1, keepdim=True).expand_as(mine)
    assert bool(back[mine].isnan().all())
    if fmt.rule == "hqq":  # its steps are counted by the error over all groups
        assert bool(back[~mine].isfinite().all())
    else:
        assert same(back[~mine], clean[~mine])


@pytest.mark.parametrize("name", SPECS)
def test_tiny_and_huge(name: str) -> None:
    """Below 2^-120 a group is zeros (MX and bitsandbytes' own rules go on); near fp32's largest the result is right or NaN, never wrong."""
    fmt = SPECS[name]
    for scale in (2.0**-121, 1e-38, 1e-42, 1e-45):
        w = weight("normal", 64, 64).clamp(-1, 1) * scale
        back = quantize(w, fmt).dequantize()
        assert bool(back.isfinite().all()) and bool((back.abs() <= 2 * scale + 1e-40).all() or fmt.compat), scale
        if not fmt.compat and fmt.rule not in ("mx", "nvfp4", "hqq", "absmean") and not fmt.zero:
            assert same(quantize(w, fmt).qdata, quantize(torch.zeros(64, 64), fmt).qdata), scale
    w = weight("normal", 64, 64).clamp(-1, 1) * 3.3e38
    clean = quantize(weight("normal", 64, 64).clamp(-1, 1), fmt).dequantize()
    back = quantize(w, fmt).dequantize()
    good = back.isfinite()
    if fmt.scale in ("fp32", "bf16") and fmt.rule != "hqq":
        assert bool(((back - w).abs()[good] / 3.3e38 <= 1.05 * (clean - w / 3.3e38).abs().max() + 1e-2).all())
    assert not bool(back.isinf().any()) or fmt.rule in ("mx", "nvfp4", "hqq")


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.scale == "fp32"])
def test_scales_in_16_bits(name: str) -> None:
    """Every format whose scales are not coded takes fp16 and bf16 ones, and quantizes with what is stored."""
    w = weight("normal", 64, 256)
    wanted = (quantize(w, name).dequantize() - w).square().mean()
    for dtype in (torch.float16, torch.bfloat16):
        q = quantize(w, name, scale_dtype=dtype)
        assert q.scale.dtype == dtype and float((q.dequantize() - w).square().mean()) < 1.1 * float(wanted) + 1e-4


@pytest.mark.parametrize("name", ["int8 groups", "int4 sym"])
def test_fp16_scales_underflow_to_zeros_and_overflow_to_nan(name: str) -> None:
    small, large = torch.full((1, 64), 1e-8), torch.full((1, 64), 1e9)
    assert not quantize(small, SPECS[name]).dequantize().any()
    assert bool(quantize(large, SPECS[name]).dequantize().isnan().all())


@pytest.mark.parametrize(
    "name", [name for name, fmt in SPECS.items() if not fmt.flat and fmt.block[1] > 1 and fmt.rule not in ("hqq", "nvfp4", "row_steps")]
)
def test_a_short_last_group_is_quantized_by_itself(name: str) -> None:
    fmt = SPECS[name]
    size = fmt.block[1]
    w = weight("normal", 7, 3 * size + 5)
    whole, tail = quantize(w, fmt), quantize(w[:, 3 * size :], fmt)
    assert same(whole.scale[:, 3:], tail.scale)
    assert same(whole.dequantize()[:, 3 * size :], tail.dequantize())


def test_a_short_hqq_group_weighs_its_own_elements_only() -> None:
    """The refined zero point of a tail of 5 is that of these 5 numbers."""
    w = weight("normal", 1, 5)
    fmt = format_of("hqq4")
    alone, exact = quantize(w, fmt), quantize(w, format_of("hqq4", 5))
    assert same(alone.zero, exact.zero) and same(alone.dequantize(), exact.dequantize())


@pytest.mark.parametrize("name", SPECS)
def test_empty_weights(name: str) -> None:
    for shape in ((0, 64), (5, 0), (0, 0), (0,), (2, 0, 3)):
        q = quantize(torch.zeros(shape), SPECS[name])
        assert q.dequantize().shape == shape and q.shape == shape and q.qdata.numel() == 0


@pytest.mark.parametrize("name", SPECS)
def test_any_number_of_dimensions_and_strides(name: str) -> None:
    fmt = SPECS[name]
    w = weight("normal", 12, 96)
    q = quantize(w, fmt)
    assert equal(quantize(w.t().contiguous().t(), fmt), q)
    for shape in ((3, 4, 96), (2, 2, 3, 96)):
        p = quantize(w.view(shape), fmt)
        assert p.shape == shape and all(same(a, b) for a, b in zip(p.parts, q.parts, strict=True))
        assert same(p.dequantize(), q.dequantize().view(shape))
    assert quantize(w[0], fmt).rows == 1 and quantize(w[0], fmt).dequantize().shape == (96,)
    assert quantize(w[:, ::2], fmt).dequantize().shape == (12, 48)


@pytest.mark.parametrize("name", SPECS)
def test_size_is_what_bits_per_weight_says(name: str) -> None:
    q = quantize(weight("normal", 96, 260), SPECS[name])
    assert math.isclose(8 * q.nbytes / (96 * 260), q.format.bits_per_weight(96, 260))
    assert QFormat.parse(q.format.spec) == q.format and q.format.name in repr(q)


STABLE = [
    n
    for n, f in SPECS.items()
    if f.rule in ("absmax", "absmax_int", "absmax_float", "mx", "row_steps") and f.scale != "nested" and f.table != "dynamic_unsigned"
]


@pytest.mark.parametrize("name", STABLE)
def test_quantizing_twice_changes_nothing(name: str) -> None:
    """The values, to a rounding of the scale. Not so: formats whose largest element is no code's value (integers over lo..hi, NVFP4, ternary)."""
    for kind in KINDS:
        once = quantize(weight(kind, 65, 96), SPECS[name]).dequantize()
        twice = quantize(once, SPECS[name]).dequantize()
        tolerance = 1e-3 if SPECS[name].scale == "fp16" else 0.0071 if name == "dynamic8" else 4e-7
        torch.testing.assert_close(twice, once, rtol=tolerance, atol=1e-30, msg=kind)


SYMMETRIC = [n for n, f in SPECS.items() if f.table in ("fp4", "e2m1", "e4m3", "e5m2") or f.rule in ("absmax_int", "absmean")]


@pytest.mark.parametrize("name", SYMMETRIC)
def test_signs_are_symmetric(name: str) -> None:
    for kind in KINDS:
        w = weight(kind, 65, 96)
        assert torch.equal(quantize(-w, SPECS[name]).dequantize(), -quantize(w, SPECS[name]).dequantize()), kind


@pytest.mark.parametrize("name", SPECS)
def test_order_is_kept_within_a_group(name: str) -> None:
    fmt = SPECS[name]
    for kind in KINDS:
        w = weight(kind, 64, 128)
        back, mine = quantize(w, fmt).dequantize(), group_of(fmt, 64, 128)
        for g in (0, int(mine.max())):
            order = w[mine == g].argsort(stable=True)
            assert bool((back[mine == g][order].diff() >= 0).all()), kind


@pytest.mark.parametrize("name", [n for n, f in SPECS.items() if f.scale not in ("fp16", "e4m3", "nested") and f.rule not in ("hqq", "absmean")])
def test_powers_of_two_pass_through(name: str) -> None:
    w = weight("normal", 33, 130)
    back = quantize(w, SPECS[name]).dequantize()
    for power in (2.0**-20, 0.5, 2.0**13):
        assert torch.equal(quantize(w * power, SPECS[name]).dequantize(), back * power)


BAD_FORMATS: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    (("nf5",), {}, "one of the formats"),
    (("nf4",), {"blocksize": 64}, "options among"),
    (("nf4", 48), {}, "power of two"),
    (("nf4", 16), {}, "power of two"),
    (("nf4", 8192), {}, "power of two"),
    (("nf4", -1), {}, "power of two"),
    (("int4", 0), {}, "positive"),
    (("int4", -2), {}, "positive"),
    (("int4", 2.5), {}, "positive"),
    (("int4", True), {}, "positive"),
    (("int4", 1 << 70), {}, "positive"),
    ((["nf4"],), {}, "one of the formats"),
    (("int4",), {"group_axis": ["k"]}, "group_axis among"),
    (("int4",), {"scale_dtype": [1]}, "scale_dtype"),
    (("mxfp4", 64), {}, "group_size=32"),
    (("nvfp4", 32), {}, "group_size=16"),
    (("ternary", 128), {}, "group_size"),
    (("int8", 64), {"group_axis": "block"}, "no group_size"),
    (("int8", 64), {"group_axis": "row"}, "no group_size"),
    (("int8", 64), {"group_axis": "tensor"}, "no group_size"),
    (("int4",), {"group_axis": "z"}, "group_axis among"),
    (("nf4",), {"group_axis": "n"}, "integer or fp8"),
    (("int4",), {"double_quant": True}, "nf4 or fp4"),
    (("nf4",), {"double_quant": "yes"}, "True or False"),
    (("nf4",), {"double_quant": True, "scale_dtype": torch.float16}, "not coded"),
    (("nf4",), {"scale_dtype": torch.float16, "double_quant": True}, "not coded"),
    (("int4",), {"symmetric": "yes"}, "True or False"),
    (("nf4",), {"symmetric": True}, "integer format"),
    (("int4",), {"compat": "bnb_cpu"}, "nf4 or fp4"),
    (("nf4",), {"compat": "cuda"}, "bnb_cpu"),
    (("mxfp4",), {"scale_rule": "round"}, "scale_rule among"),
    (("int4",), {"scale_rule": "floor"}, "scale_rule among"),
    (("mxfp4",), {"scale_dtype": torch.float16}, "not coded"),
    (("int4",), {"scale_dtype": torch.int8}, "scale_dtype"),
]


@pytest.mark.parametrize("case", BAD_FORMATS, ids=lambda case: f"{case[0]} {case[1]}")
def test_unknown_formats_options_and_groups_are_refused(case: Any) -> None:
    args, options, expected = case
    with pytest.raises(ValueError, match=expected):
        quantize(torch.randn(4, 256), *args, **options)


def test_options_can_be_turned_back() -> None:
    for name in ("int2", "int3", "int4", "int8"):
        own = FORMATS[name]
        there = format_of(own, symmetric=not own.signed)
        assert there != own and format_of(there, symmetric=own.signed) == own
    assert format_of(format_of("nf4", double_quant=True), double_quant=False) == FORMATS["nf4"]
    for name in ("int4", "hqq4", "int8"):  # the group is as long along the other axis, and the same along its own
        there = format_of(name, group_axis="n")
        assert format_of(there, group_axis="n") == there and format_of(there, group_axis="k") == FORMATS[name]


@pytest.mark.parametrize(
    "w",
    [torch.ones(4, 4, dtype=torch.int32), torch.ones(4, 4, dtype=torch.bool), [[1.0]], torch.tensor(1.0), None, torch.eye(4).to_sparse()],
    ids=str,
)
def test_what_is_no_weight_is_refused(w: Any) -> None:
    with pytest.raises(ValueError, match="quantize: expected"):
        quantize(w)


def test_nested_tensors_are_refused() -> None:
    for w in (torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout) for layout in (torch.strided, torch.jagged)):
        with pytest.raises(ValueError, match="quantize: expected a dense tensor .* nested"):
            quantize(w)
        with pytest.raises(ValueError, match="quantized_linear: expected x: dense.* nested"):
            fa.quantized_linear(w, quantize(torch.ones(4, 3), "int8"))


SPOILED = [
    "",
    "nf9",
    "nf4,block=1x",
    "nf4,block=1x0",
    "nf4,block=64",
    "int4,block=-1x4",
    "int4,bits=99",
    "int4,bits=x",
    "nf4,table=nf9",
    "nf4,table=e4m3",
]
SPOILED += ["int4,scale=fp64", "int4,zero=int4", "nf4,rule=mx", "int4,name=nf4", "int4,nothing=1", "nf4,bits=3"]


@pytest.mark.parametrize("spec", SPOILED)
def test_spoiled_texts_of_formats_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        QFormat.parse(spec)


def spoiled(q: QuantizedTensor) -> list[tuple[str, dict[str, Any]]]:
    assert q.zero is not None
    return [
        ("qdata", {"qdata": q.qdata[:-1]}),
        ("scale", {"scale": q.scale[:, :-1].contiguous()}),
        ("scale", {"scale": q.scale.double()}),
        ("zero", {"zero": None}),
        ("zero", {"zero": q.zero.float()}),
        ("super", {"super": torch.ones(())}),
        ("scale", {"scale": q.scale.t()}),
    ]


def test_parts_that_do_not_belong_together_are_refused() -> None:
    q = quantize(torch.randn(16, 256), "int4", 64)
    parts = q.parts._asdict()
    for named, change in spoiled(q):
        with pytest.raises(ValueError, match=named):
            torch.ops.fusedadapt.q_dequantize(*{**parts, **change}.values(), q.format.spec, 16, 256, 0, 16, torch.float32)
    for rows in ((0, 17), (-1, 4), (5, 4)):
        with pytest.raises(ValueError, match="rows"):
            torch.ops.fusedadapt.q_dequantize(*parts.values(), q.format.spec, 16, 256, *rows, torch.float32)
    with pytest.raises(ValueError, match="dtype"):
        q.dequantize(torch.int32)


@pytest.mark.parametrize("op", ["q_linear", "q_linear_dx", "q_dequantize"])
def test_tables_are_on_a_gpu_when_it_was_traced(op, monkeypatch):
    """Made at the first run they lay in the memory of a CUDA graph, or were copied inside its capture. The device of the fakes is not here."""
    qw, made = fa.quantize(torch.randn(24, 64), "nf4", double_quant=True), []
    spec, parts = qw.format.spec, qw.parts
    backend = SimpleNamespace(prepare=lambda fmt, device: made.append((fmt.name, device.type, type(torch.zeros(1)))))
    monkeypatch.setattr(quant_ops.dispatch, "available_backends", lambda device: {"triton": "", "cuda": "not built"})
    monkeypatch.setattr(quant_ops, "_module", lambda name: backend)
    with FakeTensorMode():
        held = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in parts]
        x, dy = torch.empty(3, 64, device="cuda"), torch.empty(3, 24, device="cuda")
        calls = {
            "q_linear": lambda: torch.ops.fusedadapt.q_linear(x, *held, None, spec, 24),
            "q_linear_dx": lambda: torch.ops.fusedadapt.q_linear_dx(dy, *held, spec, 24, 64),
            "q_dequantize": lambda: torch.ops.fusedadapt.q_dequantize(*held, spec, 24, 64, 0, 24, torch.float32),
        }
        assert calls[op]().device.type == "cuda"
    assert made == [("nf4", "cuda", torch.Tensor)]


def test_a_record_is_not_turned_into_what_it_contradicts() -> None:
    """By name or by record: what a format has is kept or refused, never dropped."""
    for name, axis in (("int4", "tensor"), ("fp8_e4m3", "tensor"), ("int8", "block")):
        with pytest.raises(ValueError, match=f'no group_size with .*group_axis="{axis}"'):
            format_of(format_of(name, group_axis=axis), 64)
    single = format_of("int4", 1)
    with pytest.raises(ValueError, match='group_axis="k" or "n" beside another group_size of int4,block=1x1'):
        format_of(single, 64)
    assert format_of(single, 1) == single == format_of(single)
    assert format_of(single, 64, group_axis="k").block == (1, 64) and format_of(single, 64, group_axis="n").block == (64, 1)
    column = format_of("int4", 16, group_axis="n")
    assert format_of(column, 64).block == (64, 1) and format_of(format_of("int8"), 64).block == (1, 64)


@pytest.mark.parametrize("size", [np.int64(32), np.uint8(32), np.array(32)])
def test_whole_numbers_of_numpy_are_whole_numbers(size: Any) -> None:
    assert format_of("int4", size) == format_of("int4", 32) and quantize(torch.ones(2, 64), "int4", size).format.block == (1, 32)
    for bad in (True, np.bool_(True), np.float32(32), np.ones(2, dtype=int), "32", torch.tensor(32)):
        with pytest.raises(ValueError, match="group_size: a positive number"):
            format_of("int4", bad)

"""What every format writes, byte by byte: vectors worked out by hand, a second decoder in plain Python integers, nearest codes, ties.

Nothing here needs another package; `test_quant_oracles` repeats the comparison with those that define the formats.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from quant_cases import FLOATS, KINDS, SHAPES, SPECS, same, sqnr, ties, weight
from torch import Tensor

import fusedadapt as fa
from fusedadapt.quant import FORMATS, QFormat, QuantizedTensor, format_of, quantize
from fusedadapt.quant.tables import TABLES, table
from fusedadapt.reference import quant as reference
from fusedadapt.reference import quant_rules


@pytest.fixture(autouse=True)
def backend() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors
    with fa.backend("reference"):
        yield
    torch.set_num_threads(threads)


def hexed(t: Tensor) -> str:
    return t.contiguous().view(torch.uint8).reshape(-1).numpy().tobytes().hex()


def padded(values: list[float], size: int) -> Tensor:
    return torch.tensor([values + [0.0] * (size - len(values))])


T = 1 / 3
ZEROS = [0.0] * 28
#: format, options, the weight's first elements (zeros fill its group), bytes of the codes, bytes of the scales, of the zeros
GOLDEN: list[tuple[str, dict[str, Any], list[float], int, str, list[float] | str, list[float] | None]] = [
    # first element in the high nibble; 1.0 is code 15, -1.0 code 0, 0.0 code 7, 0.5 lies below the cut 0.50166 and is 0.4407, code 12
    ("nf4", {}, [1.0, -1.0, 0.0, 0.5], 64, "f07c" + "77" * 30, [1.0], None),
    ("nf4", {}, [-3.0, 3.0, 1.5, 0.0], 64, "0fc7" + "77" * 30, [3.0], None),
    ("nf4", {"group_size": 32}, [2.0], 1, "f7", [2.0], None),
    # magnitudes 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4 are codes 0..7; + 8 is the sign
    ("fp4", {}, [1.0, -1.0, 0.5, -0.5, 0.0, -0.001, 0.25, -T], 64, "3b5d087c" + "00" * 28, [1.0], None),
    ("fp4", {}, [12.0, -8.0, 2.0, -0.0625], 64, "3a69" + "00" * 30, [12.0], None),
    ("dynamic8", {}, [1.0, -1.0, 0.0, 5.5e-7], 4, "ff007f80", [1.0], None),
    ("dynamic8_unsigned", {}, [1.0, 0.0, -1.0], 3, "ff0000", [1.0], None),
    # low nibble first: 6 is 7, .25 ties to 0, .75 to 1.0 (code 2), 1.25 to 1.0, 1.75 to 2.0 (4), 2.5 to 2.0, 3.5 to 4.0 (6), 5 to 4.0, -0.0 is 8
    ("mxfp4", {}, [6.0, -6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.0], 32, "f720426486" + "00" * 11, "7f", None),
    ("mxfp4", {"scale_rule": "ceil"}, [6.0, -6.0, 2.0, 1.0], 32, "d512" + "00" * 14, "80", None),
    ("mxfp8_e4m3", {}, [448.0, 1.0, -1.0, 2.0**-9, 2.0**-10, 17.0, 19.0, -0.0], 32, "7e38b80100585a80" + "00" * 24, "7f", None),
    ("mxfp8_e5m2", {}, [57344.0, 1.0, -1.0, 2.0**-16, 1.125, 1.375], 32, "7b3cbc013c3e" + "00" * 26, "7f", None),
    # both levels: absmax / 2688, then e4m3 of absmax / 6 over it: 448 (7e), 224 (76), and 2^-6 (08) for zeros
    ("nvfp4", {}, [6.0, -6.0, 1.0, 2.0] + [0.0] * 12 + [3.0, -1.5], 48, "f742000000000000" + "d7" + "00" * 15, "7e7608", None),
    # powers of two below the row's 6 / 6: 3.9 and less take the next, 4 does not, 2^-20 the eleventh, zeros none; 3.9 saturates
    (
        "fp4_e2m1", {"group_size": 32},
        [6.0, -6.0, 1.0, 0.0, *ZEROS, 3.9, 1.0, -0.5, 0.0, *ZEROS, 4.0, 0.0, 0.0, 0.0, *ZEROS, *ZEROS, 0.0, 0.0, 0.0, 0.0, 2.0**-20], 130,
        "f702" + "00" * 14 + "470a" + "00" * 14 + "0600" + "00" * 31, "7f7e7f7f74", None,
    ),
    # as published: whatever is smaller than the row's largest group saturates
    ("fp4_e2m1", {"group_size": 32, "scale_rule": "m2"}, [6.0, *[0.0] * 31, 5.9, 3.0, 1.0], 36, "07" + "00" * 15 + "7704", "7f7e", None),
    ("fp8_e4m3", {}, [448.0, -448.0, 1.0, 17.0, 19.0], 5, "7efe38585a", [1.0], None),
    ("fp8_e5m2", {}, [57344.0, -1.0, 1.125, 1.375], 4, "7bbc3c3e", [1.0], None),
    # ties to even, before the offset is added
    ("int8", {}, [127.0, -127.0, 0.5, 1.5, 2.5, -0.5, 64.0], 7, "7f810002020040", [1.0], None),
    ("int8", {"symmetric": False, "group_size": 4}, [-1.0, 254.0, 0.5, 1.5], 4, "00ff0103", [1.0], [1]),
    ("int4", {"group_size": 4}, [-5.0, 10.0, 0.0, 2.5, 15.0], 5, "f0750f", [1.0, 1.0], [5, 0]),
    ("int4", {"symmetric": True, "group_size": 4}, [7.5, -7.5, 1.0, -3.0], 4, "0f59", [1.0], None),
    # a bit stream, lowest bit first: 0o76543210 in three bytes
    ("int3", {"group_size": 8}, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 7.0], 9, "88c6fa07", [1.0, 1.0], [0, 0]),
    ("int2", {"group_size": 4}, [0.0, 1.0, 2.0, 3.0, 3.0], 5, "e403", [1.0, 1.0], [0, 0]),
    ("hqq4", {"group_size": 4}, [0.0, 15.0, 3.0, 7.0], 4, "f073", [1.0], [0.0]),
    ("ternary", {}, [2.0, -2.0, 0.0, 0.4, -0.6, 1.0], 6, "5208", [1.0], None),
]  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case[0]} {case[1]} {case[3]}")
def test_bytes_worked_out_by_hand(case: Any) -> None:
    name, options, values, size, codes, scale, zero = case
    q = quantize(padded(values, size), name, **options)
    assert hexed(q.qdata) == codes
    if isinstance(scale, str):
        assert hexed(q.scale) == scale
    else:
        assert q.scale.reshape(-1).tolist() == scale
    assert zero is None and q.zero is None or q.zero is not None and q.zero.reshape(-1).tolist() == zero


def test_every_format_has_a_vector() -> None:
    assert {case[0] for case in GOLDEN} == set(FORMATS)


@pytest.mark.parametrize(
    ("absmax", "bytes_"), [(6.1, (127, 128, 127, 128)), (6.0, (127, 128, 127, 127)), (4.0, (127, 127, 127, 127)), (7.5, (127, 128, 128, 128))]
)
def test_the_four_mx_scale_rules(absmax: float, bytes_: tuple[int, ...]) -> None:
    for rule, byte in zip(("floor", "ceil", "even", "rceil"), bytes_, strict=True):
        assert int(quantize(padded([absmax], 32), "mxfp4", scale_rule=rule).scale) == byte, rule


def test_mx_scales_at_the_ends_of_the_range() -> None:
    """Byte 0 is 2^-127, a subnormal number, and exact; nothing finite gets 255."""
    w = padded([2.0**-125, -(2.0**-126)], 32)  # 2^-127 times 4 and -2
    q = quantize(w, "mxfp4")
    assert int(q.scale) == 0 and hexed(q.qdata)[:2] == "c6" and torch.equal(q.dequantize(), w)
    largest = torch.finfo(torch.float32).max
    for rule, byte in (("floor", 252), ("ceil", 253), ("even", 253), ("rceil", 253)):
        assert int(quantize(padded([largest], 32), "mxfp4", scale_rule=rule).scale) == byte


def test_double_quantization_by_hand() -> None:
    """Scales 1 and 3: mean 2, differences -1 and 1, codes 0 (worth -0.99297) and 255 (worth 1)."""
    w = torch.zeros(1, 128)
    w[0, 5], w[0, 70] = -1.0, 3.0
    q = quantize(w, "nf4", double_quant=True)
    assert hexed(q.scale) == "00ff" and float(q.offset) == 2.0 and q.super.tolist() == [1.0]  # type: ignore[arg-type, union-attr]
    low = np.float32(-0.99296873807907104) + np.float32(2.0)
    assert q.dequantize()[0, [5, 70, 1]].tolist() == [-float(low), 3.0, 0.0]


#: SHA-256 (first 16 digits) of values and cuts, fp32, little endian, and of the codes: what `test_quant_oracles` has found equal elsewhere
DIGESTS: dict[str, str] = {
    "nf4": "09ef18e5eef4bafa",
    "nf4_cpu": "09ef18e5eef4bafa",
    "fp4": "ca4a3425ffbee6f9",
    "fp4_cpu": "e736d67e921825af",
    "e2m1": "fcda547bdba9d347",
    "e4m3": "ee0520c363fa5f86",
    "e5m2": "f27d477faa66e305",
    "dynamic": "55f06dac53a983ba",
    "dynamic_unsigned": "1c8a7d39216feebd",
}


def test_tables_are_the_published_ones() -> None:
    """By digest; and what can be said of them in a line."""
    for name, wanted in DIGESTS.items():
        t = table(name)
        text = np.array([*t.values, *t.cuts], "<f4").tobytes() + bytes(t.codes)
        assert hashlib.sha256(text).hexdigest()[:16] == wanted, name
    assert DIGESTS.keys() == TABLES.keys()
    signed = table("dynamic").values
    assert signed[127] == 0 and signed[255] == 1 and signed[0] == np.float32(-0.992968738) and abs(signed[128] - 5.5e-7) < 1e-13
    assert [v for v in table("e4m3").values[120:128] if v == v] == [256, 288, 320, 352, 384, 416, 448]
    assert table("e5m2").values[123] == 57344 and table("e5m2").values[124] == math.inf and math.isnan(table("e5m2").values[125])
    assert table("e2m1").values[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6) and math.copysign(1, table("e2m1").values[8]) == -1


def decoded(q: QuantizedTensor) -> Tensor:
    """w = (value - zero) * S once more, element by element: bytes as Python integers, arithmetic in numpy's fp32."""
    fmt, n, k = q.format, q.rows, q.columns
    data, f32 = hexed(q.qdata), np.float32
    raw = bytes.fromhex(data)
    scales = q.scale.reshape(-1).float().numpy() if q.scale.dtype != torch.uint8 else q.scale.reshape(-1).numpy()
    zeros = None if q.zero is None else q.zero.reshape(-1).numpy()
    across = -(-k // fmt.sides(n, k)[1]) if not fmt.flat else 0
    out = np.zeros((n, k), f32)
    for i in range(n):
        row = int.from_bytes(raw[i * fmt.row_bytes(k) : (i + 1) * fmt.row_bytes(k)], "little") if not fmt.flat else 0
        for j in range(k):
            at = i * k + j
            if fmt.flat:
                code = raw[at] if fmt.bits == 8 else raw[at // 2] >> (4 if at % 2 == 0 else 0) & 15
                g = at // fmt.block[1]
            else:
                code = row >> j * fmt.bits & (1 << fmt.bits) - 1
                g = i // fmt.sides(n, k)[0] * across + j // fmt.sides(n, k)[1]
            value = f32(fmt.values[code])
            if zeros is not None:
                value = value - f32(zeros[g])
            out[i, j] = value * scale_of(q, scales, g)
    return torch.from_numpy(out)


def scale_of(q: QuantizedTensor, scales: Any, g: int) -> np.float32:
    s, kind = scales[g], q.format.scale
    if kind == "e8m0":
        return np.float32(math.nan) if s == 255 else np.float32(2.0 ** (int(s) - 127))
    if kind == "e8m0_row":
        assert q.super is not None
        return np.float32(2.0 ** (int(s) - 127)) * np.float32(float(q.super[g // q.scale.shape[1]]))
    if kind == "e4m3":
        return np.float32(table("e4m3").values[int(s)]) * np.float32(float(q.super))  # type: ignore[arg-type]
    if kind == "nested":
        assert q.super is not None and q.offset is not None
        return np.float32(table("dynamic").values[int(s)]) * np.float32(float(q.super[g // 256])) + np.float32(float(q.offset))
    return np.float32(s)


@pytest.mark.parametrize("name", SPECS)
def test_a_second_decoder_agrees(name: str) -> None:
    """To the bit in fp32; bf16 and fp16 are that number rounded once; rows are pieces of the whole."""
    for i, (shape, kind) in enumerate(
        [((3, 5), "normal"), ((7, 65), "outlier"), ((5, 129), "some zero groups"), ((33, 31), "wide"), ((1, 63), "zeros")]
    ):
        q = quantize(weight(kind, *shape, torch.float32, i), SPECS[name])
        wanted = decoded(q)
        assert same(q.dequantize(), wanted), (shape, kind)
        for dtype in FLOATS:
            assert same(q.dequantize(dtype), wanted.to(dtype))
        middle = reference.dequantize(q.parts, q.format, *shape, shape[0] // 2, shape[0], torch.float32)
        assert same(middle, wanted[shape[0] // 2 :])


@pytest.mark.parametrize("bits", (1, 2, 3, 4, 5, 6, 7, 8))
def test_packing_is_a_bit_stream(bits: int) -> None:
    """Code k of a row is bits [k * bits, (k + 1) * bits), rows start on bytes, spare bits are 0, and nothing is lost."""
    fmt = QFormat("int4", bits, "affine", (1, 32), high=(1 << bits) - 1)
    draw = torch.Generator().manual_seed(bits)
    for k in (1, 2, 3, 7, 8, 9, 31, 32, 33, 100):
        codes = torch.randint(0, 1 << bits, (3, k), generator=draw, dtype=torch.int32).to(torch.uint8)
        packed = reference.pack(codes, fmt)
        for row, wanted in zip(packed, codes, strict=True):
            assert int.from_bytes(bytes(row.tolist()), "little") == sum(code << j * bits for j, code in enumerate(wanted.tolist()))
        assert torch.equal(reference.unpack(packed, fmt, 3, k), codes)


@pytest.mark.parametrize("name", ["nf4", "nf4_cpu", "fp4", "fp4_cpu", "e2m1", "e4m3", "e5m2", "dynamic", "dynamic_unsigned"])
def test_codes_are_the_nearest(name: str) -> None:
    """Over 20,000 numbers: no value is nearer than the code's, but for the fp32 rounding of the cuts themselves."""
    t = table(name)
    finite = torch.tensor([v for v in t.values if math.isfinite(v)], dtype=torch.float64)
    top = float(finite.abs().max())
    v = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * top / 2
    v = torch.cat([v, v / 100, v / 10_000, torch.tensor([0.0, -0.0, top, -top, 2 * top, -2 * top])])
    if name == "dynamic_unsigned":
        v = v.abs()
    got = torch.tensor(t.values, dtype=torch.float64)[reference._lookup(v, t).long()]
    nearest = (v.double()[:, None] - finite).abs().amin(1)
    slack = 2e-8 * top if "4" in name and name[0] != "e" else 1e-7 * v.abs().double()
    assert bool(((v.double() - got).abs() <= nearest + slack).all())


@pytest.mark.parametrize(
    ("name", "odd"), [("e2m1", "even"), ("e4m3", "even"), ("e5m2", "even"), ("dynamic", "even"), ("fp4_cpu", "low"), ("nf4_cpu", "low")]
)
def test_ties(name: str, odd: str) -> None:
    """Exactly between two values: the even code, or the lower value; one fp32 step beside it: the nearer one."""
    t = table(name)
    order = sorted({v: code for code, v in reversed(list(enumerate(t.values))) if math.isfinite(v) and (v >= 0 or not t.magnitude)}.items())
    for (low, a), (high, _) in zip(order, order[1:], strict=False):
        middle = (torch.tensor(low) + torch.tensor(high)) / 2
        exact = (float(middle) * 2 == low + high) or odd == "low"
        below, at, above = reference._lookup(
            torch.stack([torch.nextafter(middle, torch.tensor(-9e9)), middle, torch.nextafter(middle, torch.tensor(9e9))]), t
        )
        values = [t.values[int(code)] for code in (below, at, above)]
        assert values[0] == low and values[2] == high, (name, low, high)
        if exact:
            assert values[1] == (low if odd == "low" or a % 2 == 0 else high), (name, low, high)
    for constant in ("nf4", "fp4") if name == "nf4_cpu" else ():  # bitsandbytes' CUDA constants: the tie goes down
        c = torch.tensor(table(constant).cuts)
        at, above = reference._lookup(c, table(constant)), reference._lookup(torch.nextafter(c, torch.tensor(9e9)), table(constant))
        assert torch.equal(at, torch.tensor(table(constant).codes[:-1], dtype=torch.uint8))
        assert torch.equal(above, torch.tensor(table(constant).codes[1:], dtype=torch.uint8))


F32 = np.float32
INTEGERS = [(f"int{bits}", symmetric) for bits in (2, 3, 4, 8) for symmetric in (False, True) if (bits, symmetric) != (8, True)]


@pytest.mark.parametrize(("name", "symmetric"), INTEGERS)
def test_integers_by_the_formula(name: str, symmetric: bool) -> None:
    """GPTQ's quantizer group by group in numpy: S = (max(hi, 0) - min(lo, 0)) / (2^b - 1), zero = rne(-lo / S), code = clamp(rne(w / S) + zero)."""
    bits = int(name[3:])
    most = (1 << bits) - 1
    for i, kind in enumerate(KINDS):
        w = weight(kind, 5, 70, torch.float32, i)
        q = quantize(w, name, 32, symmetric=symmetric)
        codes = reference.unpack(q.parts.qdata, q.format, 5, 70).numpy()
        for row in range(5):
            for g, at in enumerate((slice(0, 32), slice(32, 64), slice(64, 70))):
                group = w[row, at].numpy()
                lo, hi = min(group.min(), F32(0)), max(group.max(), F32(0))
                largest = max(-lo, hi)
                s = largest * F32(2) / F32(most) if symmetric else (hi - lo) / F32(most)
                zero = F32(1 << (bits - 1)) if symmetric else np.rint(-lo / s) if s else F32(0)
                v = np.rint(group / s) if s else np.zeros_like(group)
                assert float(q.scale[row, g]) == s and (symmetric or float(q.zero[row, g]) == zero)  # type: ignore[index]
                assert (codes[row, at] == np.clip(v + zero, 0, most)).all(), kind


@pytest.mark.parametrize("kind", ["powers", "outlier", "normal"])
def test_hqq_is_the_same_on_every_device(kind: str) -> None:
    """The zeros by numpy, whose one power is rounded from fp64: what a device's own fp32 power makes of it is not."""
    w, f = weight(kind, 64, 1024), np.float32
    x = w.numpy().reshape(-1, 64)
    inv = np.minimum(f(1) / (x.max(1) - x.min(1)) * f(15), f(2e4))[:, None]
    z, beta, best = f(0) - x.min(1)[:, None] * inv, 10.0, np.inf
    kept = z
    for _ in range(20):
        q = np.clip(np.rint(x * inv + z), f(0), f(15))
        rest = x - (q - z) / inv
        if not (error := np.abs(rest).astype(np.float64).mean()) < best:
            break
        best, kept = error, z
        with np.errstate(divide="ignore"):
            power = (np.abs(rest).astype(np.float64) ** -0.3).astype(f)
        e = np.sign(rest) * np.maximum(np.abs(rest) - power / f(beta), f(0))
        z = (q - (x - e) * inv).astype(np.float64).mean(1, keepdims=True).astype(f)
        beta *= 1.01
    zero = quantize(w, "hqq4").parts.zero
    assert zero is not None and np.array_equal(zero.numpy().reshape(-1, 1), kept)


@pytest.mark.parametrize("rows", [1, 5, 1 << 20])
def test_hqq_is_the_same_however_many_groups_are_worked_on_at_a_time(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, k in ((9, 256), (6, 100), (1, 7)):  # whole groups, and short ones that are filled up
        w = weight("outlier", n, k)
        monkeypatch.undo()
        want = quantize(w, "hqq4")
        monkeypatch.setattr(quant_rules, "_cuts", lambda x: [slice(i, i + rows) for i in range(0, x.shape[0], rows)])
        assert all(same(a, b) for a, b in zip(quantize(w, "hqq4").parts, want.parts, strict=True))


def test_ternary_and_hqq_by_the_formula() -> None:
    """BitNet's mean; HQQ's first step where its second does not help: a group of evenly spaced numbers."""
    w = weight("normal", 9, 50)
    mean = F32(max(w.double().abs().mean().item(), 1e-5))
    q = quantize(w, "ternary")
    assert float(q.scale) == mean
    assert (reference.unpack(q.parts.qdata, q.format, 9, 50).numpy() == np.clip(np.rint(w.numpy() / mean), -1, 1) + 1).all()
    spaced = (torch.arange(64.0) % 16).view(1, 64) * 0.25 - 1.0
    h = quantize(spaced, "hqq4")
    assert float(h.scale) == 0.25 and float(h.zero) == 4.0 and torch.equal(h.dequantize(), spaced)  # type: ignore[arg-type]
    plain, refined = quantize(w, "int4", 64), quantize(w, "hqq4", 64)
    assert sqnr(w, refined.dequantize()) > sqnr(w, plain.dequantize()) - 0.5


@pytest.mark.parametrize("name", SPECS)
def test_dtypes_are_read_as_fp32(name: str) -> None:
    """A bf16 or fp16 weight and its fp32 (and fp64) copy have the same bytes, however they lie in memory."""
    fmt = SPECS[name]
    for kind in KINDS[:6]:
        for dtype in (torch.bfloat16, torch.float16):
            w = weight(kind, *SHAPES[5], dtype)
            q = quantize(w, fmt)
            for other in (w.float(), w.double(), w.float().t().contiguous().t()):
                p = quantize(other, fmt)
                assert all(same(a, b) for a, b in zip(q.parts, p.parts, strict=True))


SQNR = {("nf4", 32): 21.18, ("fp4", 32): 18.85, ("int4", 32): 21.86, ("nf4", 64): 20.71, ("fp4", 64): 18.27, ("int4", 64): 20.82}
SQNR |= {("nf4", 128): 20.38, ("fp4", 128): 17.80, ("int4", 128): 19.93}


@pytest.mark.parametrize(("name", "group"), SQNR)
def test_signal_to_noise(name: str, group: int) -> None:
    """Published figures for N(0, 1), dB."""
    w = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    assert abs(sqnr(w, quantize(w, name, group).dequantize()) - SQNR[name, group]) < 0.1


@pytest.mark.parametrize(("rule", "wanted"), [("floor", 18.80), ("ceil", 16.82), ("even", 19.03), ("rceil", 18.76)])
def test_signal_to_noise_of_mxfp4(rule: str, wanted: float) -> None:
    w = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    assert abs(sqnr(w, quantize(w, "mxfp4", scale_rule=rule).dequantize()) - wanted) < 0.1


def test_ties_reach_the_whole_way_through() -> None:
    """`ties` are ties after scaling too: e2m1's seven, twice their sign, at four scales."""
    w = ties(format_of("mxfp4"))
    back = quantize(w, "mxfp4").dequantize()
    inner = w.abs() < 6 * w.abs().amax(1, keepdim=True) / 6
    tie = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    ratio = w.abs() / (w.abs().amax(1, keepdim=True) / 6)
    for number, rounded in zip(tie, (0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0), strict=True):
        at = inner & (ratio == number)
        scale = (w.abs().amax(1, keepdim=True) / 6).expand_as(w)
        assert int(at.sum()) >= 8 and torch.equal(back[at].abs(), rounded * scale[at])

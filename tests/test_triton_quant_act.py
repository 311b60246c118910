"""The Triton kernels of quantized activations under the interpreter: codes and int8 products are the reference's bits, fp8 products its grade."""

from __future__ import annotations

import operator

import pytest
import torch
from test_quant_act import BLOCKS, DTYPES, KINDS, coded, new, same, truth

import fusedadapt as fa
from fusedadapt.quant.activations import quantized_linear_act
from fusedadapt.quant.formats import QFormat, format_of
from fusedadapt.quant.tables import table
from fusedadapt.reference import quant_act as reference
from fusedadapt.reference.quant import Parts, pack

pytest.importorskip("triton")
from fusedadapt.kernels import quant_act, quant_act_linear  # noqa: E402

ops = torch.ops.fusedadapt
E2M1 = table("e2m1").values
SHAPES = ((1, 1, 1), (3, 5, 17), (1, 40, 144), (70, 131, 160), (2, 3, 400))
pytestmark = [pytest.mark.usefixtures("quick_calls"), pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["int8", "fp8_e4m3", BLOCKS])
def test_codes(spec: str, dtype: torch.dtype) -> None:
    for t, k in ((1, 1), (5, 17), (3, 128), (9, 300), (2, 17000)):
        x = new(t, k, dtype=dtype)
        for some in (x, new(t, 2 * k, dtype=dtype)[:, :k]):
            with fa.backend("reference"):
                want = ops.q_act_quant(some, spec)
            with fa.backend("triton"), fa.strict():
                q, scale = ops.q_act_quant(some, spec)
            assert torch.equal(q, want[0]) and torch.equal(scale, want[1]), (t, k)


@pytest.mark.parametrize("spec", ["int8", "fp8_e4m3", BLOCKS])
def test_hostile_codes(spec: str) -> None:
    """Ties, signed zeros, subnormals, the largest numbers, NaN and infinities; also in rows that are read twice."""
    step = 0.5 if spec == "int8" else 0.25
    row = torch.cat([torch.tensor([127.0 if spec == "int8" else 448.0, -0.0]), torch.arange(-120, 120, step), torch.arange(-20, 20) * 2.0**-10])
    x = torch.stack([row, -row, row * 0, row * 2.0**-126, row * 1e-42, row / 448 * 3e38, row / 127 * 2.0**-119, row])
    x[-1, 3] = torch.nan
    for some in (x, torch.where(torch.arange(row.numel()) == 9, torch.inf, x), x.repeat(1, 17000 // row.numel() + 1)):
        with fa.backend("reference"):
            want = ops.q_act_quant(some, spec)
        with fa.backend("triton"):
            q, scale = ops.q_act_quant(some, spec)
        assert torch.equal(q, want[0]) and same(scale, want[1])


@pytest.mark.parametrize("axis", ["row", "tensor"])
def test_int8_bits(axis: str) -> None:
    for number, (t, n, k) in enumerate(SHAPES):
        x, qw, bias = new(t, k, dtype=DTYPES[number % 3]), fa.quantize(new(n, k, seed=1), "int8", group_axis=axis), new(n, seed=2)
        for some in (None, bias):
            with fa.backend("reference"):
                want = quantized_linear_act(x, qw, some)
            with fa.backend("triton"):
                assert same(quantized_linear_act(x, qw, some), want), (t, n, k)


def test_sums_beyond_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 2048 columns, for 2^17 would take the interpreter minutes; their sums are beyond 2^24, so that it shows where they are rounded."""
    monkeypatch.setattr(reference, "CHUNK", 2048)
    g = torch.Generator().manual_seed(0)
    for k in (2047, 2048, 2049, 4096, 6500):
        x, w = (torch.randint(100, 128, (rows, k), generator=g, dtype=torch.int8) for rows in (3, 5))
        args = (x.view(torch.uint8), new(3, 1), w, new(5, 1), None, None, None, None, "int8", "int8", 5, torch.float32)
        with fa.backend("reference"):
            want = ops.q_linear8(*args)
        with fa.backend("triton"):
            assert torch.equal(ops.q_linear8(*args), want), k


@pytest.mark.parametrize(("kind", "axis", "spec"), KINDS[2:])
def test_fp8_close_to_fp64(kind: str, axis: str, spec: str) -> None:
    for number, (t, n, k) in enumerate(SHAPES):
        dtype = DTYPES[number % 3]
        x, qw, bias = new(t, k, dtype=dtype).clamp(-500, 500), coded(new(n, k, seed=1) / 1e5, kind, axis), new(n, seed=2)
        want, size = truth(x, qw, bias, spec)
        with fa.backend("triton"):
            y = quantized_linear_act(x, qw, bias, kind)
        bound = torch.finfo(dtype).eps * want.abs() / 2 + 2.0**-24 * (k**0.5 * 4 + 4) * (size + bias.abs())
        assert bool(((y.double() - want).abs() <= bound + torch.finfo(dtype).smallest_normal).all()), (t, n, k)


def test_every_fp8_code_is_widened() -> None:
    """All 256 codes of W, NaN among them, times one."""
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1)
    one = torch.tensor([[0x38]], dtype=torch.uint8)
    with fa.backend("triton"):
        y = ops.q_linear8(one, torch.ones(1, 1), codes, torch.ones(256, 1), None, None, None, None, "fp8_e4m3", "fp8_e4m3", 256, torch.float32)
    assert same(y.view(-1), codes.view(-1).view(torch.float8_e4m3fn).float())


def steps_and_codes() -> tuple[Parts, QFormat, torch.Tensor]:
    """(a weight of every E2M1 code under every step, its format, its columns): 12 rows of four groups of 32, the steps turned from row to row."""
    fmt = format_of("fp4_e2m1", 32)
    codes = (torch.arange(128) * 5 % 16).to(torch.uint8).expand(12, 128)
    steps = (127 - (torch.arange(12)[:, None] + 3 * torch.arange(4)) % 12).to(torch.uint8)
    return Parts(pack(codes, fmt), steps, super=torch.tensor([1.0, 2.0**-120, 3.0, 2.0**100] * 3)), fmt, torch.eye(128)


def test_codes_of_four_bits_are_exact() -> None:
    """Times one: the weight to the bit."""
    parts, fmt, x = steps_and_codes()
    one = (0x38 * x).to(torch.uint8)
    with fa.backend("reference"):
        want = ops.q_dequantize(*parts, fmt.spec, 12, 128, 0, 12, torch.float32)
    with fa.backend("triton"):
        y = ops.q_linear8(one, torch.ones(128, 1), *parts, None, "fp8_e4m3", fmt.spec, 12, torch.float32)
    assert torch.equal(y, want.t())


@pytest.mark.parametrize("size", [32, 64, 96, 128, 256, -1])
def test_groups_of_four_bit_codes(size: int) -> None:
    for number, (t, n, k) in enumerate(((3, 5, 33), (17, 70, 500), (1, 9, 257))):
        x, qw, bias = new(t, k, dtype=DTYPES[number]).clamp(-500, 500), fa.quantize(new(n, k, seed=1) / 1e5, "fp4_e2m1", size), new(n, seed=2)
        want, _ = truth(x, qw, bias, "fp8_e4m3")
        with fa.backend("triton"):
            y = quantized_linear_act(x, qw, bias, "fp8_e4m3")
        assert float((y.double() - want).norm() / want.norm()) < torch.finfo(DTYPES[number]).eps


def test_steps_that_are_none_show() -> None:
    parts, fmt, x = steps_and_codes()
    q, scale = ops.q_act_quant(x, "fp8_e4m3")
    for bad in (0, 115, 128, 255):
        parts.scale[3, 2] = bad
        with fa.backend("triton"):
            y = ops.q_linear8(q, scale, *parts, None, "fp8_e4m3", fmt.spec, 12, torch.float32)
        assert bool(y[:, 3].isnan().all()) and int(y.isnan().sum()) == 128


def run_ptx(text: str, inputs: dict[str, int]) -> dict[str, int]:
    """What a sequence of `and`, `or`, `add`, `shl`, `shr` and `prmt` leaves in its registers, as PTX defines them."""
    registers = dict(inputs)
    value = lambda name: registers[name] if name in registers else int(name, 0)
    for line in text.strip("{} \n").split(";")[1:]:
        if not line.strip():
            continue
        name, *rest = line.replace(",", " ").split()
        to, (a, b, *c) = rest[0], map(value, rest[1:])
        if name == "prmt.b32":
            both, choice = a | b << 32, c[0]
            assert not choice & 0x8888
            found = sum((both >> 8 * (choice >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        else:
            found = getattr(operator, {"and": "and_", "or": "or_", "add": "add", "shl": "lshift", "shr": "rshift"}[name.split(".")[0]])(a, b)
        registers[to] = found & 0xFFFFFFFF
    return registers


def test_the_packed_decoder() -> None:
    """Its instructions one by one, for every byte in every place and every step: E4M3's own numbers."""
    e4m3 = table("e4m3").values
    for d in range(12):
        for first in range(256):
            given = [(first + 77 * i) % 256 for i in range(4)]
            found = run_ptx(quant_act_linear.WIDEN.value, {"$2": int.from_bytes(given, "little"), "$3": 8 * (12 - d) * 0x01010101})
            for out, shift in (("$0", 0), ("$1", 4)):
                got = [e4m3[byte] for byte in found[out].to_bytes(4, "little")]
                assert got == [E2M1[byte >> shift & 15] * 2.0 ** (6 - d) for byte in given], (d, given)


@pytest.mark.parametrize(("kind", "axis", "spec"), KINDS)
def test_zero_and_nan_rows(kind: str, axis: str, spec: str) -> None:
    x, qw, bias = new(4, 150), coded(new(9, 150, seed=1), kind, axis), new(9, seed=2)
    x[1] = 0.0
    x[2, 140] = torch.nan
    with fa.backend("triton"):
        y = quantized_linear_act(x, qw, bias, kind)
    assert torch.equal(y[1], bias) and bool(y[2].isnan().all()) and bool(y[[0, 3]].isfinite().all())


def test_a_misaligned_weight() -> None:
    """Bytes that lie anywhere in a file: rows are then read one by one."""
    memory, k = torch.zeros(33 * 160 + 16, dtype=torch.int8), 160
    start = 1 - memory.data_ptr() % 16 + 16
    w = memory[start % 16 : start % 16 + 32 * k].view(32, k)
    w.copy_(torch.arange(32 * k).view(32, k) % 255 - 127)
    assert quant_act_linear.aligned_unit(k, w) == 1 and quant_act_linear.aligned_unit(k, w.clone()) == 16
    q, scale = ops.q_act_quant(new(3, k), "int8")
    rest = (torch.ones(32, 1), None, None, None, None, "int8", "int8", 32, torch.float32)
    with fa.backend("triton"):
        assert torch.equal(ops.q_linear8(q, scale, w, *rest), ops.q_linear8(q, scale, w.clone(), *rest))


def test_names_are_the_references() -> None:
    for name in quant_act.__all__:
        assert list(getattr(quant_act, name).__annotations__) == list(getattr(reference, name).__annotations__)

"""Formats as data. One equation covers them all:

    w[n, k] = (value[code[n, k]] - zero[g]) * S[g]        in fp32, then one rounding

`QFormat` says what a code is worth, which elements share a group g, how scales are stored and by which rule they are found. Quantizing, dequantizing,
products, checkpoints and tests read these records; a new format is one of them and, if its scales are found in a new way, a rule in
`fusedadapt.reference.quant_rules`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from .tables import TABLES, Table, table

#: a block side that spans the whole dimension
WHOLE = 0
_SCALES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16} | dict.fromkeys(("e8m0", "e8m0_row", "e4m3", "nested"), torch.uint8)
#: by how scales are stored
SCALE_RULES = {"e8m0": ("floor", "ceil", "even", "rceil"), "e8m0_row": ("floor", "m2")}
#: scales that have fp32 numbers above them
LAYERED = ("nested", "e4m3", "e8m0_row")
NESTED_BLOCK = 256
#: by how many powers of two a group's scale may lie below its row's in "e8m0_row": E2M1 times 2^(6 - d) is then a normal number of E4M3
MOST_STEPS = 11
#: and its groups are multiples of this: the columns that an 8-bit matrix instruction takes
ROW_GROUP = 32


@dataclass(frozen=True)
class QFormat:
    """How a weight [N, K] is stored. Immutable and hashable; `spec` is its text form, `QFormat.parse` the way back.

    ``bits`` of a code. ``table``: name in `fusedadapt.quant.tables`, or "" for integers: value = code - ``bias``, codes from ``low`` to ``high``
    (``signed``: the byte is two's complement). ``flat``: groups are runs of ``block[1]`` elements in row-major order, crossing rows; otherwise they
    are tiles of ``block`` = (rows, columns), `WHOLE` standing for all of them. ``scale``: "fp32" | "fp16" | "bf16" | "e8m0" | "e8m0_row" (E8M0, 1 at
    most, times the row's own fp32 number) | "e4m3" | "nested".
    ``zero``: "" | "uint8" | "fp32". ``rule``: how scales are found, a name in `fusedadapt.reference.quant_rules.RULES`;
    ``scale_rule``: which E8M0 exponent, among `SCALE_RULES` of ``scale``.
    ``divide``: codes come from w / s instead of w * (1 / s). ``high_first``: the first element is in the high nibble.
    """

    name: str
    bits: int
    rule: str
    block: tuple[int, int]
    table: str = ""
    bias: int = 0
    low: int = 0
    high: int = 0
    signed: bool = False
    flat: bool = False
    scale: str = "fp32"
    zero: str = ""
    scale_rule: str = ""
    divide: bool = False
    high_first: bool = False
    compat: str = ""

    @property
    def spec(self) -> str:
        """The name and whatever differs from the record of that name, e.g. "int4,block=1x64,scale=fp16"."""
        found: str | None = self.__dict__.get("_text")
        return found or _spec(self)

    @staticmethod
    def parse(spec: str) -> QFormat:
        """The format of a `spec` text. ValueError if it is none."""
        return _parse(spec)

    @property
    def codes(self) -> Table | None:
        """The code table; None for integers."""
        return table(self.table) if self.table else None

    @property
    def values(self) -> tuple[float, ...]:
        """What each of the 2^bits codes is worth, before zero and scale."""
        return _values(self)

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the stored scale tensor; E8M0, E4M3 and nested scales are bytes."""
        return _SCALES[self.scale]

    @property
    def group_size(self) -> int:
        """Elements along a group's long side; -1 for a whole row, column or tensor."""
        side = self.block[0] if self.block[1] == 1 else self.block[1]
        return side or -1

    def sides(self, n: int, k: int) -> tuple[int, int]:
        """(rows, columns) of a group of a grid format, for a weight of n x k."""
        return self.block[0] or max(n, 1), self.block[1] or max(k, 1)

    def grid(self, n: int, k: int) -> tuple[int, ...]:
        """Shape of the scales of a weight of n x k: (groups,) if flat, else (rows of tiles, columns of tiles)."""
        if self.flat:
            return (-(-n * k // self.block[1]),)
        rows, columns = self.sides(n, k)
        return -(-n // rows), -(-k // columns)

    def above(self, n: int, k: int) -> tuple[int, ...] | None:
        """Shape of the fp32 numbers above the scales: one for the tensor, a row, or a block of nested scales; None if there are none."""
        blocks = -(-self.grid(n, k)[0] // NESTED_BLOCK) if self.scale == "nested" else 0
        return {"nested": (blocks,), "e4m3": (), "e8m0_row": (n,)}.get(self.scale)

    def row_bytes(self, k: int) -> int:
        """Bytes of one packed row of a grid format."""
        return -(-k * self.bits // 8)

    def packed(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the packed bytes of a weight of n x k."""
        if self.flat and self.bits < 8:
            return -(-n * k * self.bits // 8), 1
        return n, self.row_bytes(k)

    @property
    def storage_dtype(self) -> torch.dtype:
        """What `QuantizedTensor.qdata` is typed as: the byte's own type where torch has one, else uint8 (packed codes)."""
        if self.table in ("e4m3", "e5m2"):
            return torch.float8_e4m3fn if self.table == "e4m3" else torch.float8_e5m2
        return torch.int8 if self.signed else torch.uint8

    def bits_per_weight(self, n: int, k: int) -> float:
        """Everything stored, in bits, over n * k."""
        groups, above = math.prod(self.grid(n, k)), self.above(n, k)
        size = math.prod(self.packed(n, k)) + groups * (self.scale_dtype.itemsize + {"": 0, "uint8": 1, "fp32": 4}[self.zero])
        size += 0 if above is None else 4 * math.prod(above)
        size += 4 if self.scale == "nested" else 0
        return 8.0 * size / max(n * k, 1)


@functools.cache
def _values(fmt: QFormat) -> tuple[float, ...]:
    if fmt.table:
        return table(fmt.table).values
    codes = range(1 << fmt.bits)
    if fmt.signed:
        return tuple(float(c - (1 << fmt.bits) if c >> (fmt.bits - 1) else c) for c in codes)
    return tuple(float(c - fmt.bias) for c in codes)


def _int(bits: int, group: int = 128, **changes: Any) -> QFormat:
    return QFormat(f"int{bits}", bits, "affine", (1, group), low=0, high=(1 << bits) - 1, zero="uint8", divide=True, **changes)


def _minifloat(name: str, code: str, bits: int, block: tuple[int, int], scale: str, rule: str, **changes: Any) -> QFormat:
    return QFormat(name, bits, rule, block, table=code, scale=scale, **changes)


_RECORDS = (
    QFormat("int8", 8, "absmax_int", (1, WHOLE), low=-127, high=127, signed=True),
    *(_int(bits) for bits in (2, 3, 4)),
    QFormat("hqq4", 4, "hqq", (1, 64), low=0, high=15, zero="fp32"),
    QFormat("nf4", 4, "absmax", (1, 64), table="nf4", flat=True, high_first=True),
    QFormat("fp4", 4, "absmax", (1, 64), table="fp4", flat=True, high_first=True),
    QFormat("dynamic8", 8, "absmax", (1, 256), table="dynamic", flat=True),
    QFormat("dynamic8_unsigned", 8, "absmax", (1, 256), table="dynamic_unsigned", flat=True),
    _minifloat("fp8_e4m3", "e4m3", 8, (1, WHOLE), "fp32", "absmax_float"),
    _minifloat("fp8_e5m2", "e5m2", 8, (1, WHOLE), "fp32", "absmax_float"),
    _minifloat("mxfp8_e4m3", "e4m3", 8, (1, 32), "e8m0", "mx", scale_rule="floor"),
    _minifloat("mxfp8_e5m2", "e5m2", 8, (1, 32), "e8m0", "mx", scale_rule="floor"),
    _minifloat("mxfp4", "e2m1", 4, (1, 32), "e8m0", "mx", scale_rule="floor"),
    _minifloat("nvfp4", "e2m1", 4, (1, 16), "e4m3", "nvfp4"),
    _minifloat("fp4_e2m1", "e2m1", 4, (1, 128), "e8m0_row", "row_steps", scale_rule="floor"),
    QFormat("ternary", 2, "absmean", (WHOLE, WHOLE), bias=1, low=0, high=2, divide=True),
)
#: name -> record with the format's own defaults
FORMATS: dict[str, QFormat] = {record.name: record for record in _RECORDS}
_FIXED_GROUP = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "nvfp4", "ternary")
_OPTIONS = ("double_quant", "compat", "scale_rule", "symmetric", "group_axis", "scale_dtype")


def _refuse(expected: str, got: object, fix: str) -> NoReturn:
    raise ValueError(f"quantize: expected {expected}; got {got}; {fix}")


def whole(value: object) -> int | None:
    """A whole number as an int, numpy's too; None for anything else, booleans and tensors among it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value  # a compiler's symbol stays one
    if isinstance(value, bool | torch.Tensor) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # numpy's arrays and booleans
        return None


def format_of(name: str | QFormat, group_size: int | None = None, **options: Any) -> QFormat:
    """The record of a format with a group size and options of its own.

    Args:
        name: a key of `FORMATS`, or a `QFormat`.
        group_size: elements that share a scale; None is the format's own, -1 a whole row (column with ``group_axis="n"``).
        options: ``double_quant`` (nf4, fp4: 8-bit scales of scales), ``compat="bnb_cpu"`` (nf4, fp4: cuts and ties of bitsandbytes' CPU code),
            ``scale_rule`` (MX: "floor" | "ceil" | "even" | "rceil"; fp4_e2m1: "floor" | "m2"), ``symmetric`` (integers: without or with a zero point;
            default True for int8, False for int2, int3 and int4), ``group_axis`` ("k": inside an output row; "n": inside an input column, AdaDim;
            "row", "tensor", "block": 128 x 128), ``scale_dtype`` (torch.float32, float16 or bfloat16, where scales are not coded).

    Raises:
        ValueError: unknown format or option, or an option or group size that the format does not have, or that contradicts the `QFormat` given.
    """
    # torch.compile hands over a symbol where numbers differ from call to call; its index is a number that the graph is guarded by.
    size = whole(group_size)
    return _format_of(name, group_size if size is None else operator.index(size), **options)


@torch.compiler.assume_constant_result  # type: ignore[no-untyped-call, untyped-decorator]
def _format_of(name: str | QFormat, group_size: int | None, **options: Any) -> QFormat:
    if isinstance(name, QFormat):
        fmt = name
    elif isinstance(name, str) and name in FORMATS:
        fmt = FORMATS[name]
    else:
        _refuse(f"one of the formats {', '.join(FORMATS)}", repr(name), "choose one of them")
    if unknown := set(options) - set(_OPTIONS):
        _refuse(f"options among {', '.join(_OPTIONS)}", ", ".join(sorted(unknown)), "leave the others out")
    for option in ("double_quant", "symmetric"):
        if not isinstance(options.get(option), (bool, type(None))):
            _refuse(f"{option}=True or False", repr(options[option]), "pass one of them")
    if group_size is not None and options.get("group_axis") in ("row", "tensor", "block"):
        _refuse(f'no group_size with group_axis="{options["group_axis"]}"', group_size, "leave one of them out")
    if options.get("double_quant") and options.get("scale_dtype") is not None:
        _refuse("no scale_dtype with double_quant=True: its scales are not coded", options["scale_dtype"], "leave one of them out")
    for option, value in options.items():
        if value is not None and value is not False or option == "symmetric" and value is False:
            fmt = _APPLY[option](fmt, value)
    if options.get("double_quant") is False and fmt.scale == "nested":
        fmt = replace(fmt, scale="fp32")
    return fmt if group_size is None else _grouped(fmt, group_size, options.get("group_axis"))


def _grouped(fmt: QFormat, size: int, axis: str | None) -> QFormat:
    number = isinstance(size, int) and not isinstance(size, bool)
    if number and size == fmt.group_size:
        return fmt
    if fmt.name in _FIXED_GROUP:
        _refuse(f"group_size={fmt.group_size} or None with {fmt.name}", size, "leave group_size out")
    if not number or size == 0 or size < -1 or size >= 1 << 62:
        _refuse("group_size: a positive number of elements below 2^62, -1 or None", repr(size), "pass one of these")
    if fmt.flat:
        if size < 32 or size & (size - 1) or size > 4096:
            _refuse(f"group_size of {fmt.name}: a power of two from 32 to 4096", size, "choose one")
        return replace(fmt, block=(1, size))
    if fmt.block[0] not in (WHOLE, 1) and fmt.block[1] != 1:
        _refuse('no group_size with group_axis="block"', size, "its tiles are 128 x 128")
    if fmt.block == (WHOLE, WHOLE):
        _refuse(f'no group_size with {fmt.spec}, which has group_axis="tensor"', size, 'leave it out, or pass group_axis="k" or "n" with it')
    if fmt.block == (1, 1) and axis is None:
        _refuse(f'group_axis="k" or "n" beside another group_size of {fmt.spec}', None, "its groups of one element lie along neither")
    if fmt.scale == "e8m0_row" and size != -1 and size % ROW_GROUP:
        _refuse(f"group_size of {fmt.name}: a multiple of {ROW_GROUP}, or -1", size, "choose one")
    side = WHOLE if size == -1 else size
    return replace(fmt, block=(side, 1) if axis == "n" or axis is None and fmt.block[1] == 1 else (1, side))


def _nested(fmt: QFormat, value: Any) -> QFormat:
    if fmt.table not in ("nf4", "fp4", "nf4_cpu", "fp4_cpu"):
        _refuse("double_quant with nf4 or fp4", fmt.name, "leave it out")
    return replace(fmt, scale="nested")


def _compat(fmt: QFormat, value: Any) -> QFormat:
    if value != "bnb_cpu" or fmt.name not in ("nf4", "fp4"):
        _refuse('compat="bnb_cpu" with nf4 or fp4', f"{value!r} with {fmt.name}", "leave it out")
    return replace(fmt, table=f"{fmt.name}_cpu", compat="bnb_cpu")


def _scale_rule(fmt: QFormat, value: Any) -> QFormat:
    if value not in SCALE_RULES.get(fmt.scale, ()):
        rules = " (MX) or ".join(", ".join(names) for names in SCALE_RULES.values())
        _refuse(f"scale_rule among {rules} (fp4_e2m1), in a format that has one", f"{value!r} with {fmt.name}", "choose one of its own")
    return replace(fmt, scale_rule=value)


def _symmetric(fmt: QFormat, value: Any) -> QFormat:
    if fmt.rule not in ("affine", "affine_sym", "absmax_int"):
        _refuse("symmetric= with an integer format", fmt.name, "leave it out")
    if fmt.bits == 8 and value:
        return replace(fmt, rule="absmax_int", low=-127, high=127, signed=True, zero="", divide=False)
    if value:
        return replace(fmt, rule="affine_sym", zero="", bias=1 << (fmt.bits - 1))
    return replace(fmt, rule="affine", low=0, high=(1 << fmt.bits) - 1, signed=False, zero="uint8", bias=0, divide=True)


def _axis(fmt: QFormat, value: Any) -> QFormat:
    if fmt.flat or fmt.name in _FIXED_GROUP or fmt.scale == "e8m0_row":
        _refuse("group_axis with an integer or fp8 format", fmt.name, "leave it out")
    size = fmt.block[0] if fmt.block[1] == 1 else fmt.block[1]
    blocks = {"k": (1, size), "n": (size, 1), "row": (1, WHOLE), "tensor": (WHOLE, WHOLE), "block": (128, 128)}
    if not isinstance(value, str) or value not in blocks:
        _refuse(f"group_axis among {', '.join(blocks)}", repr(value), "choose one of them")
    return replace(fmt, block=blocks[value])


def _scale_dtype(fmt: QFormat, value: Any) -> QFormat:
    names = {dtype: name for name, dtype in _SCALES.items() if name in ("fp32", "fp16", "bf16")}
    if not isinstance(value, torch.dtype) or value not in names or fmt.scale not in names.values():
        _refuse("scale_dtype: torch.float32, float16 or bfloat16, in a format whose scales are not coded", f"{value} with {fmt.name}", "leave it out")
    return replace(fmt, scale=names[value])


_APPLY: dict[str, Callable[[QFormat, Any], QFormat]] = {
    "double_quant": _nested,
    "compat": _compat,
    "scale_rule": _scale_rule,
    "symmetric": _symmetric,
    "group_axis": _axis,
    "scale_dtype": _scale_dtype,
}


@torch.compiler.assume_constant_result  # type: ignore[no-untyped-call, untyped-decorator]
def _spec(fmt: QFormat) -> str:
    own = FORMATS.get(fmt.name)
    if own is None:
        raise ValueError(f"QFormat.spec: expected a format of FORMATS; got {fmt.name!r}; register the record there")
    parts = [fmt.name]
    for field in fmt.__dataclass_fields__:
        value = getattr(fmt, field)
        if field != "name" and value != getattr(own, field):
            parts.append(f"{field}={'x'.join(map(str, value)) if field == 'block' else int(value) if isinstance(value, bool) else value}")
    fmt.__dict__["_text"] = ",".join(parts)  # not functools.cached_property: torch cannot compile its lock
    return ",".join(parts)


@functools.cache
def _parse(spec: str) -> QFormat:
    name, *changes = spec.split(",")
    if name not in FORMATS:
        _refuse(f"one of the formats {', '.join(FORMATS)}", repr(name), "choose one of them")
    own, found = FORMATS[name], {}
    for change in changes:
        field, _, text = change.partition("=")
        if field not in own.__dataclass_fields__ or field == "name":
            _refuse("a format's text form, as QFormat.spec writes it", repr(spec), "take it from there")
        value = getattr(own, field)
        try:
            found[field] = tuple(map(int, text.split("x"))) if field == "block" else type(value)(int(text)) if isinstance(value, int) else text
        except ValueError:
            _refuse("a format's text form, as QFormat.spec writes it", repr(spec), f"{field} takes a number there")
    return _consistent(replace(own, **found), spec)  # type: ignore[arg-type]


def _consistent(fmt: QFormat, spec: str) -> QFormat:
    """``fmt``; ValueError where its fields contradict each other, as those of a damaged file may."""
    wrong = {
        "block": len(fmt.block) != 2 or min(fmt.block) < 0 or fmt.flat and fmt.block[1] == 0,
        "bits": not 1 <= fmt.bits <= 8 or fmt.flat and fmt.bits not in (4, 8) or fmt.bits != 8 and fmt.signed,
        "table": bool(fmt.table) and (fmt.table not in TABLES or table(fmt.table).bits != fmt.bits),
        "scale": fmt.scale not in _SCALES or fmt.scale == "e8m0_row" and (fmt.flat or fmt.block[0] != 1 or fmt.block[1] % ROW_GROUP > 0),
        "zero": fmt.zero not in ("", "uint8", "fp32"),
        "rule": fmt.rule != FORMATS[fmt.name].rule and {fmt.rule, FORMATS[fmt.name].rule} - {"affine", "affine_sym", "absmax_int"} != set(),
    }
    if found := [field for field, bad in wrong.items() if bad]:
        _refuse("a format's text form, as QFormat.spec writes it", f"{spec!r}, in which {found[0]} cannot be", "take it from there")
    return fmt

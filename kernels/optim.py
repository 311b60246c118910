"""p', s' = rule(p, g, s): one launch updates any number of tensors of any dtype, driven by the tensor table the C++ sweeps use.

    g <- g / grad_scale * clip * sign (+ l2 p);  p, s <- rule(p decay, g, s);  frozen elements keep their bits;  one rounding at the store

Bytes per fp32 Adam parameter: reads p, g, m, v (16), writes p, m, v (12); bf16 throughout: 14. The kernel does nothing but move them:
expect about nine tenths of the measured copy bandwidth. Rules and element helpers: optim_rules.py, common.py.

One compilation per rule (and one more for stochastic rounding): dtypes, masks, master weights and all scalars are run-time values.
"""

import torch
import triton
import triton.language as tl

from .common import (
    ALIGNED,
    BF16,
    CODES,
    DECAY,
    EXTRA,
    EXTRA_CODE,
    F32,
    GRAD,
    GRAD_CODE,
    GRAD_NUMEL,
    I16,
    INDEX_BASE,
    INDEX_INNER,
    INDEX_OUTER,
    L2,
    MASK,
    NUMEL,
    ORDINAL,
    PARAM,
    PARAM_CODE,
    ROW_GROUP,
    SIGN,
    STATE0,
    STATE_CODE,
    STEP,
    WORDS,
    at,
    join_split,
    load_f32,
    load_row,
    program,
    put,
    random16,
    random16_run,
    store_f32,
    to_bf16_split,
    to_bf16_stochastic,
    trainable,
)
from .optim_rules import RULES

# Eight elements per thread: 16 bytes of bf16, twice 16 of fp32.
BLOCK = 1024
# At 128 registers four programs fit a multiprocessor, and four is enough; left to itself ptxas goes for five and spills in some rules.
# Fusing a product and a sum into one rounding would break equality with the other backends: for sign rules, whole updates flip.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, "maxnreg": 128}
_NOT_SPECIALIZED = ["desc", "chunks", "rows", "grad_scale", "found_inf", "clip", "seed", "chunk"]


@triton.jit
def code_of(codes, byte: tl.constexpr):
    return ((codes >> (8 * byte)) & 0xFF).to(tl.int32)


@triton.jit
def load_param(entry, codes, start, lane, valid, WIDE: tl.constexpr):
    """The parameter in fp32: from the fp32 master, from bf16 + 16-bit remainder, or itself."""
    extra = tl.load(entry + EXTRA)
    extra_code = code_of(codes, EXTRA_CODE)
    address = tl.load(entry + PARAM)
    code = code_of(codes, PARAM_CODE)
    if extra_code == F32:
        address = extra
        code = extra_code
    p = load_f32(address, code, start, lane, valid, WIDE)
    if extra_code == I16:
        p = join_split(p, tl.load(at(extra, start, tl.int16, WIDE) + lane, valid, 0))
    return p


@triton.jit
def random_bits(entry, seed, step, start, lane, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """16 random bits per element, keyed by its number in the whole (unsharded) tensor."""
    base = tl.load(entry + INDEX_BASE)
    inner = tl.load(entry + INDEX_INNER)
    ordinal = (tl.load(entry + ORDINAL) & 0xFFFFFFFF).to(tl.uint32)
    time = step.to(tl.int32).to(tl.uint32)
    linear = inner == tl.load(entry + NUMEL)
    if linear & (base % 8 == 0) & WIDE:
        bits = random16_run(seed, base + start, ordinal, time, BLOCK)
    else:
        local = start + lane
        element = base + local
        if inner != tl.load(entry + NUMEL):
            element = base + local // inner * tl.load(entry + INDEX_OUTER) + local % inner
        bits = random16(seed, element, ordinal, time)
    return bits


@triton.jit
def store_param(
    entry, codes, start, lane, valid, masked, keep, p, seed, step,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Parameter and master copy. A split master decides the rounding itself; else bf16 is rounded stochastically on request."""
    extra = tl.load(entry + EXTRA)
    extra_code = code_of(codes, EXTRA_CODE)
    address = tl.load(entry + PARAM)
    code = code_of(codes, PARAM_CODE)
    if extra_code == F32:
        put(at(extra, start, tl.float32, WIDE) + lane, p, valid, masked, keep)
    if extra_code == I16:
        high, low = to_bf16_split(p)
        put(at(address, start, tl.uint16, WIDE) + lane, high, valid, masked, keep)
        put(at(extra, start, tl.int16, WIDE) + lane, low, valid, masked, keep)
    elif STOCHASTIC:
        if code == BF16:
            bits = to_bf16_stochastic(p, random_bits(entry, seed, step, start, lane, BLOCK, WIDE))
            put(at(address, start, tl.uint16, WIDE) + lane, bits, valid, masked, keep)
        else:
            store_f32(address, code, start, lane, valid, masked, keep, p, WIDE)
    else:
        store_f32(address, code, start, lane, valid, masked, keep, p, WIDE)


@triton.jit
def load_state(entry, codes, start, lane, valid, K: tl.constexpr, WIDE: tl.constexpr):
    return load_f32(tl.load(entry + STATE0 + K), code_of(codes, STATE_CODE + K), start, lane, valid, WIDE)


@triton.jit
def store_state(entry, codes, start, lane, valid, masked, keep, x, K: tl.constexpr, WIDE: tl.constexpr):
    store_f32(tl.load(entry + STATE0 + K), code_of(codes, STATE_CODE + K), start, lane, valid, masked, keep, x, WIDE)


@triton.jit
def prepare_gradient(g, p, row, scale, clip):
    """Unscaled, clipped, negated for maximize, with the coupled decay added; the branches only skip what would not change a bit."""
    if scale != 1.0:
        g = tl.div_rn(g, scale)
    g = g * clip * row[SIGN]
    if row[L2] != 0.0:
        g = g + row[L2] * p
    return g


@triton.jit
def update_tile(
    entry, codes, row, scale, clip, seed, start, count,
    RULE: tl.constexpr, STATES: tl.constexpr, STORED: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Elements start .. start + count - 1, count <= BLOCK. WIDE: every address is 16-byte aligned and count a multiple of 8."""
    lane = tl.arange(0, BLOCK)
    valid = lane < count
    p = load_param(entry, codes, start, lane, valid, WIDE)
    g = load_f32(tl.load(entry + GRAD), code_of(codes, GRAD_CODE), start, lane, valid, WIDE)
    s0, s1, s2, s3 = g, g, g, g  # what a rule does not read
    if STATES > 0:
        s0 = load_state(entry, codes, start, lane, valid, 0, WIDE)
    if STATES > 1:
        s1 = load_state(entry, codes, start, lane, valid, 1, WIDE)
    if STATES > 2:
        s2 = load_state(entry, codes, start, lane, valid, 2, WIDE)
    if STATES > 3:
        s3 = load_state(entry, codes, start, lane, valid, 3, WIDE)
    g = prepare_gradient(g, p, row, scale, clip)
    p, s0, s1, s2, s3 = RULE(p * row[DECAY], g, s0, s1, s2, s3, row)
    mask = tl.load(entry + MASK)
    masked = mask != 0
    keep = valid
    if masked:
        keep = trainable(mask, start, lane, count, BLOCK, WIDE)
    store_param(entry, codes, start, lane, valid, masked, keep, p, seed, row[STEP], STOCHASTIC, BLOCK, WIDE)
    if STORED > 0:
        store_state(entry, codes, start, lane, valid, masked, keep, s0, 0, WIDE)
    if STORED > 1:
        store_state(entry, codes, start, lane, valid, masked, keep, s1, 1, WIDE)
    if STORED > 2:
        store_state(entry, codes, start, lane, valid, masked, keep, s2, 2, WIDE)
    if STORED > 3:
        store_state(entry, codes, start, lane, valid, masked, keep, s3, 3, WIDE)


@triton.jit
def piece(desc, chunks, chunk):
    """This program's share: table entry, first element, first element of the narrow path, end."""
    mine = chunks + 2 * program()
    entry = desc + WORDS * tl.load(mine)
    begin = tl.multiple_of(tl.load(mine + 1), 16)  # hints hold only where they meet the value's own definition: not in a callee
    end = tl.minimum(begin + chunk, tl.load(entry + NUMEL))
    aligned = code_of(tl.load(entry + CODES), ALIGNED) != 0
    return entry, begin, tl.where(aligned, begin + (end - begin) // 8 * 8, begin), end


@triton.jit
def gradient_piece(desc, chunks, chunk):
    """The same share of a gradient, whose alignment and length may differ from a compact entry's."""
    mine = chunks + 2 * program()
    entry = desc + WORDS * tl.load(mine)
    begin = tl.multiple_of(tl.load(mine + 1), 16)
    end = tl.minimum(begin + chunk, tl.load(entry + GRAD_NUMEL))
    aligned = tl.load(entry + GRAD) % 16 == 0
    return entry, begin, tl.where(aligned, begin + (end - begin) // 8 * 8, begin), end


@triton.jit
def eights(left, BLOCK: tl.constexpr):
    """Elements of the next wide tile; being a multiple of 8 lets one predicate cover a whole vector."""
    return tl.multiple_of(tl.minimum(left, BLOCK).to(tl.int32), 8)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def sweep(
    desc, chunks, rows, grad_scale, found_inf, clip, seed: tl.int64, chunk: tl.int64,
    RULE: tl.constexpr, STATES: tl.constexpr, STORED: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale = tl.load(grad_scale)
    factor = tl.load(clip)
    entry, begin, narrow, end = piece(desc, chunks, chunk)
    if tl.load(found_inf) != 0.0:  # not `return`: an early exit ends Triton's alignment analysis and every access goes scalar
        narrow = begin
        end = begin
    codes = tl.load(entry + CODES)
    row = load_row(rows, tl.load(entry + ROW_GROUP) & 0xFFFFFFFF)
    for start in range(begin, narrow, BLOCK):
        count = eights(narrow - start, BLOCK)
        update_tile(entry, codes, row, scale, factor, seed, start, count, RULE, STATES, STORED, STOCHASTIC, BLOCK, True)
    for start in range(narrow, end, BLOCK):  # misaligned tensors, and the last few elements of the others
        count = tl.minimum(end - start, BLOCK).to(tl.int32)
        update_tile(entry, codes, row, scale, factor, seed, start, count, RULE, STATES, STORED, STOCHASTIC, BLOCK, False)


@triton.jit
def square_tile(entry, codes, scale, start, count, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    g = load_f32(tl.load(entry + GRAD), code_of(codes, GRAD_CODE), start, lane, lane < count, WIDE)
    if scale != 1.0:
        g = tl.div_rn(g, scale)
    wide = g.to(tl.float64)
    return wide * wide


@triton.jit(do_not_specialize=_NOT_SPECIALIZED + ["out"])
def square_sums(desc, chunks, grad_scale, out, chunk: tl.int64, BLOCK: tl.constexpr):
    """out[c] = sum of (g / grad_scale)^2 over chunk c, in fp64 and in a fixed order."""
    scale = tl.load(grad_scale)
    entry, begin, narrow, end = gradient_piece(desc, chunks, chunk)
    codes = tl.load(entry + CODES)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, narrow, BLOCK):
        total += square_tile(entry, codes, scale, start, eights(narrow - start, BLOCK), BLOCK, True)
    for start in range(narrow, end, BLOCK):
        total += square_tile(entry, codes, scale, start, tl.minimum(end - start, BLOCK).to(tl.int32), BLOCK, False)
    tl.store(out + program(), tl.sum(total, 0))


_neutral: dict[torch.device, torch.Tensor] = {}


def _scalar(value: torch.Tensor | None, default: int, device: torch.device) -> torch.Tensor:
    """`value`, or the constant that changes nothing: a pointer either way, so None costs no second compilation."""
    if value is not None:
        return value
    if device not in _neutral:
        _neutral[device] = torch.arange(2, dtype=torch.float32, device=device)  # filled by a kernel: no copy from the host to wait for
    return _neutral[device][default:]


def _check(op: str, desc: torch.Tensor, chunks: torch.Tensor, chunk: int) -> None:
    for name, tensor, width in (("desc", desc, WORDS.value), ("chunks", chunks, 2)):
        if tensor.dtype != torch.int64 or tensor.ndim != 2 or tensor.shape[1] != width or not tensor.is_contiguous():
            got = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{op}: expected {name} as contiguous int64 [n, {width}]; got {got}; build it with _core.Table")
    if chunk < 16 or chunk % 16:
        raise ValueError(f"{op}: expected a chunk that is a multiple of 16; got {chunk}; use the one the chunk list was made with")


def step_(
    desc: torch.Tensor,
    chunks: torch.Tensor,
    rows: torch.Tensor,
    rule: str,
    *,
    chunk: int,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    clip: torch.Tensor | None = None,
    seed: int = 0,
    stochastic: bool = False,
    scattered: bool = False,
    block: int = 0,
) -> None:
    """Updates every tensor of the table in place: parameters, states and master weights. Steps and aux scalars are left to the caller.

    Args:
        desc: int64 [n, 26], the entries of csrc/core/table.h, on the tensors' device; an entry's row index points into `rows`.
        chunks: int64 [c, 2], (tensor, offset); one program each.
        rows: fp32 [r, 24], what `_core.make_row` gives.
        rule: a name in `RULES`.
        chunk: elements per chunk, a multiple of 16.
        grad_scale, found_inf, clip: fp32 scalars on the same device, read by the kernel: gradients are divided by the first and
            multiplied by the last; unless `found_inf` is 0 nothing is written.
        seed: 64 bits, the key of the stochastic rounding.
        stochastic: round bf16 parameters without a split master stochastically.
        scattered: the chunks may be of any entries; else only of dense ones that decay towards zero.
        block: elements per block of the entries' coded states, a power of two up to `chunk`; 0: they have none.

    Raises:
        KeyError: no such rule.
        ValueError: a table of another shape or dtype, or a chunk that is not a multiple of 16.
    """
    _check("step_", desc, chunks, chunk)
    if rows.dtype != torch.float32 or rows.ndim != 2 or rows.shape[1] != 24 or not rows.is_contiguous():
        raise ValueError(f"step_: expected rows as contiguous float32 [r, 24]; got {rows.dtype} {list(rows.shape)}; use _core.make_row")
    if block and (block & (block - 1) or chunk % block or block < 32):
        raise ValueError(f"step_: expected blocks of a power of two, 32 or more, that divides the chunk {chunk}; got {block}")
    from . import optim_coded, optim_scattered  # they take their parts from here

    entry = RULES[rule]
    if not chunks.shape[0]:
        return
    device = desc.device
    seed &= 2**64 - 1
    with torch.cuda.device_of(desc):  # Triton launches on the current device
        scalars = (_scalar(grad_scale, 1, device), _scalar(found_inf, 0, device), _scalar(clip, 1, device), seed - (seed >> 63 << 64), chunk)
        if block:
            size, options = optim_coded.tile(block)
            optim_coded.sweep[(chunks.shape[0],)](
                desc, chunks, rows, *scalars, optim_coded.tables(device), entry.fn, entry.states, entry.stored, bool(stochastic), scattered,
                block, size, **options,
            )  # fmt: skip
            return
        kernel, size = (optim_scattered.sweep, optim_scattered.BLOCK) if scattered else (sweep, BLOCK)
        kernel[(chunks.shape[0],)](
            desc, chunks, rows, *scalars, entry.fn, entry.states, entry.stored, bool(stochastic), size, **OPTIONS,
        )  # fmt: skip


def squares(desc: torch.Tensor, chunks: torch.Tensor, *, chunk: int, grad_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of squares of gradient / grad_scale of every chunk: fp64 [c]. Add them in order for a norm that repeats bit for bit.

    Arguments and errors as for `step_`.
    """
    _check("squares", desc, chunks, chunk)
    out = torch.empty(chunks.shape[0], dtype=torch.float64, device=desc.device)
    if not chunks.shape[0]:
        return out
    with torch.cuda.device_of(desc):
        square_sums[(chunks.shape[0],)](desc, chunks, _scalar(grad_scale, 1, desc.device), out, chunk, BLOCK, **OPTIONS)
    return out

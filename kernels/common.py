"""What the Triton kernels share: the tensor table's layout, element types and their rounding, random bits.

Repeats csrc/core/{table,dtypes,philox,numbers}.h; tests/test_triton_optim.py holds the two to the same bits. Rounding is integer
arithmetic because the interpreter truncates fp32 -> bf16, and because a GPU's own conversion turns every NaN into one.
"""

import triton
import triton.language as tl

# Element types (csrc/core/dtypes.h).
NONE, F32, BF16, F16, I16 = (tl.constexpr(code) for code in range(5))
I64 = tl.constexpr(8)
D8S, D8U, F8X = (tl.constexpr(code) for code in (11, 12, 13))  # coded states: csrc/core/lowbit.h, fusedadapt/reference/lowbit.py

# Words of a tensor's entry (csrc/core/table.h, TensorDesc). ROW_GROUP packs two int32, CODES eight bytes.
WORDS = tl.constexpr(26)
PARAM, GRAD, STATE0, STATE1, STATE2, STATE3, EXTRA, MASK, STEP_AT, AUX0, AUX1, NUMEL, ROW_GROUP, CODES = (tl.constexpr(word) for word in range(14))
ORDINAL, INDEX_BASE, INDEX_INNER, INDEX_OUTER, INDEX, ANCHOR, GRAD_NUMEL, KINDS = (tl.constexpr(word) for word in range(14, 22))
SCALE0, SCALE1, SCALE2, SCALE3 = (tl.constexpr(word) for word in range(22, 26))
PARAM_CODE, GRAD_CODE, STATE_CODE, EXTRA_CODE, ALIGNED = (tl.constexpr(byte) for byte in (0, 1, 2, 6, 7))
INDEX_CODE, ANCHOR_CODE, COMPACT_GRAD, BLOCK_LOG2 = (tl.constexpr(byte) for byte in range(4))  # bytes of KINDS

# Fields of a row (csrc/core/table.h, FA_ROW_FIELDS).
FIELDS = tl.constexpr(24)
ROW_FIELDS = (
    "sign l2 decay step step_size beta1 alpha1 beta2 alpha2 beta3 alpha3 eps eps_state mix wd clip corr1 corr2 pow1 pow2 mode pull spare1 spare2"
).split()
SIGN, L2, DECAY, STEP, STEP_SIZE, BETA1, ALPHA1, BETA2, ALPHA2, BETA3, ALPHA3 = (tl.constexpr(field) for field in range(11))
EPS, EPS_STATE, MIX, WD, CLIP, CORR1, CORR2, POW1, POW2, MODE, PULL = (tl.constexpr(field) for field in range(11, 22))


@triton.jit
def program():
    """This program's number in 64 bits: what is computed from it must not wrap at 2^31."""
    return tl.program_id(0).to(tl.int64)


@triton.jit
def load_row(rows, index):
    """A row as a tuple of scalars, indexed by the fields' names. Read once, before the first store: Triton cannot move a load over one."""
    r = rows + index * FIELDS
    a = (tl.load(r), tl.load(r + 1), tl.load(r + 2), tl.load(r + 3), tl.load(r + 4), tl.load(r + 5), tl.load(r + 6))
    b = (tl.load(r + 7), tl.load(r + 8), tl.load(r + 9), tl.load(r + 10), tl.load(r + 11), tl.load(r + 12), tl.load(r + 13))
    c = (tl.load(r + 14), tl.load(r + 15), tl.load(r + 16), tl.load(r + 17), tl.load(r + 18), tl.load(r + 19), tl.load(r + 20))
    return a + b + c


@triton.jit
def as_bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def as_float(u):
    return u.to(tl.float32, bitcast=True)


@triton.jit
def to_bf16(x):
    """fp32 -> bf16 bits, to nearest even; NaN stays NaN."""
    u = as_bits(x)
    nan = (u & 0x7FFFFFFF) > 0x7F800000
    return tl.where(nan, (u >> 16) | 0x40, (u + 0x7FFF + ((u >> 16) & 1)) >> 16).to(tl.uint16)


@triton.jit
def to_bf16_stochastic(x, random):
    """fp32 -> bf16 bits by adding 16 random bits below the kept ones; a finite value is cut rather than carried into infinity."""
    u = as_bits(x)
    magnitude = u & 0x7FFFFFFF
    carried = u + (random & 0xFFFF)
    keep = (magnitude >= 0x7F800000) | ((carried & 0x7F800000) == 0x7F800000)
    bits = tl.where(keep, u, carried) >> 16
    return tl.where(magnitude > 0x7F800000, bits | 0x40, bits).to(tl.uint16)


@triton.jit
def to_bf16_split(x):
    """fp32 -> (bf16 bits, ties away from zero; signed remainder): the 16+16 master. `join_split` is the inverse."""
    u = as_bits(x)
    nan = (u & 0x7FFFFFFF) > 0x7F800000
    high = tl.where(nan, (u >> 16) | 0x40, (u + 0x8000) >> 16).to(tl.uint16)
    return high, tl.where(nan, 0, u & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def join_split(x, low):
    """x: the bf16 part widened to fp32; low: the int16 remainder."""
    return as_float(as_bits(x) + low.to(tl.int32).to(tl.uint32, bitcast=True))


@triton.jit
def at(address, start, dtype: tl.constexpr, WIDE: tl.constexpr):
    """Pointer to element `start`. WIDE promises 16-byte alignment: the compiler cannot see through the table."""
    pointer = address.to(tl.pointer_type(dtype))
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def load_f32(address, code, start, lane, valid, WIDE: tl.constexpr):
    """Elements start + lane of an fp32, bf16 or fp16 array as fp32; 0 where not `valid`."""
    if code == F32:
        x = tl.load(at(address, start, tl.float32, WIDE) + lane, valid, 0.0)
    elif code == BF16:
        x = as_float(tl.load(at(address, start, tl.uint16, WIDE) + lane, valid, 0).to(tl.uint32) << 16)
    else:
        x = tl.load(at(address, start, tl.float16, WIDE) + lane, valid, 0.0).to(tl.float32)
    return x


@triton.jit
def put(pointer, value, valid, masked, keep):
    """Stores; frozen elements get their own bits back, so that the store stays 16 bytes wide (a mask would split it)."""
    if masked:
        value = tl.where(keep, value, tl.load(pointer, valid, 0))
    tl.store(pointer, value, valid)


@triton.jit
def store_f32(address, code, start, lane, valid, masked, keep, x, WIDE: tl.constexpr):
    """Rounds fp32 `x` once, to nearest even, into an fp32, bf16 or fp16 array."""
    if code == F32:
        put(at(address, start, tl.float32, WIDE) + lane, x, valid, masked, keep)
    elif code == BF16:
        put(at(address, start, tl.uint16, WIDE) + lane, to_bf16(x), valid, masked, keep)
    else:
        half = x.to(tl.float16).to(tl.uint16, bitcast=True)
        put(at(address, start, tl.uint16, WIDE) + lane, half, valid, masked, keep)


@triton.jit
def trainable(address, start, lane, count, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Mask bits of elements start + lane, `start` a multiple of 8, read as bytes (little-endian words, lowest bit first)."""
    flags = address.to(tl.pointer_type(tl.uint8)) + start // 8
    if WIDE:  # one load per eight elements, spread by arithmetic
        byte = tl.arange(0, BLOCK // 8)
        bits = tl.load(flags + byte, byte * 8 < count, 0).to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]
        bits = tl.reshape(bits, [BLOCK])
    else:
        bits = tl.load(flags + lane // 8, lane < count, 0).to(tl.int32) >> (lane % 8)
    return (bits & 1) != 0


@triton.jit
def random_block(seed, block, tensor, step):
    """Philox4x32-10 at counter (block lo, block hi, tensor, step), key `seed`: csrc/core/philox.h."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, tensor, step)


@triton.jit
def random16(seed, element, tensor, step):
    """16 random bits of each global element number (the upper half of the result is noise)."""
    r0, r1, r2, r3 = random_block(seed, element >> 3, tensor, step)
    word = (element >> 1) & 3
    r = tl.where(word < 2, tl.where(word == 0, r0, r1), tl.where(word == 2, r2, r3))
    return tl.where((element & 1) == 0, r, r >> 16)


@triton.jit
def spread16(r0, r1, r2, r3):
    """16-bit lanes of Philox results [..., n] in the order of their elements: [..., n, 2, 2, 2], to be reshaped to [..., 8 n]."""
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # [i, j, k] is word 2j + k of block i
    return tl.join(words, words >> 16)


@triton.jit
def random16_run(seed, first, tensor, step, BLOCK: tl.constexpr):
    """The same for elements first .. first + BLOCK - 1, `first` a multiple of 8: eight elements share one Philox."""
    r0, r1, r2, r3 = random_block(seed, (first >> 3) + tl.arange(0, BLOCK // 8), tensor, step)
    return tl.reshape(spread16(r0, r1, r2, r3), [BLOCK])


@triton.jit
def sign_of(x):
    """sign(0) = 0, sign(NaN) = 0, as torch."""
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit
def max_nan(a, b):
    """Maximum that keeps a NaN of either side."""
    return tl.where((a >= b) | (a != a), a, b)


@triton.jit
def exp_neg(x):
    """exp(x) for x <= 0 within 1 ulp, 0 below -87. Products and sums alone: what the interpreter shows is what a GPU gives."""
    y = tl.where(x >= -87.0, x, -87.0)
    n = (y * 1.44269504 - 0.5).to(tl.int32).to(tl.float32)
    # ln 2 in two parts, the first with so few bits that n times it is exact
    r = (y - n * 0.693359375) - n * -2.12194440e-4
    e = 1.0 / 5040.0
    e = e * r + 1.0 / 720.0
    e = e * r + 1.0 / 120.0
    e = e * r + 1.0 / 24.0
    e = e * r + 1.0 / 6.0
    e = e * r + 0.5
    e = (e * (r * r) + r) + 1.0
    scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, tl.where(x != x, x, e * scale))


@triton.jit
def pow_f32(x, power):
    """x^power for x >= 0 through fp64, rounded once."""
    wide = tl.exp(tl.log(x.to(tl.float64)) * power.to(tl.float64)).to(tl.float32)
    return tl.where(power == 0.0, 1.0, wide)


# Decided by the decorator when this file is imported: nothing here reads the environment.
INTERPRETED = tl.constexpr(not isinstance(program, triton.JITFunction))


@triton.jit
def finite_rest(x, part):
    """x - part, exact; 0 where the part is infinite already, or the rest would be NaN."""
    return tl.where(tl.abs(part) == float("inf"), 0.0, x - part)


@triton.jit
def upper8(x):
    """x cut to bf16's 8 significant bits, still fp32."""
    return as_float(as_bits(x) & 0xFFFF0000)


@triton.jit
def dot(a, b, acc):
    """acc + a b on the matrix units, accumulated in fp32 and of fp32 grade for every pair of fp32, bf16 and fp16 operands.

    Two operands of the same 16-bit type are multiplied as they are. An fp32 operand against a bf16 one is cut into three bf16 terms, which
    hold all its 24 bits: three fast products, and the other operand stays as it lies in shared memory. Against fp16, whose range is too small
    for such terms, it is cut into two tf32 ones (fp16 fits in tf32). Two fp32 operands take Triton's own three tf32 products.
    """
    if a.dtype == tl.float32 and b.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    elif a.dtype == b.dtype:
        if INTERPRETED:  # its product of bf16 multiplies the bits as integers
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc)
    elif a.dtype == tl.float32:
        acc = split_dot(b, a, acc, True)
    else:
        acc = split_dot(a, b.to(tl.float32), acc, False)
    return acc


@triton.jit
def ordered_dot(narrow, term, acc, SWAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """acc + narrow term, or acc + term narrow if SWAPPED."""
    if SWAPPED:
        acc = tl.dot(term, narrow, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(narrow, term, acc, input_precision=PRECISION)
    return acc


@triton.jit
def split_dot(narrow, x, acc, SWAPPED: tl.constexpr):
    """`dot` of a 16-bit and an fp32 operand, the smallest term first."""
    if narrow.dtype == tl.bfloat16:
        high = upper8(x)
        rest = finite_rest(x, high)
        middle = upper8(rest)
        low = rest - middle
        if INTERPRETED:
            narrow = narrow.to(tl.float32)
        acc = ordered_dot(narrow, low.to(narrow.dtype), acc, SWAPPED, "ieee")
        acc = ordered_dot(narrow, middle.to(narrow.dtype), acc, SWAPPED, "ieee")
        acc = ordered_dot(narrow, high.to(narrow.dtype), acc, SWAPPED, "ieee")
    else:
        high = as_float((as_bits(x) + 0x1000) & 0xFFFFE000)  # rounded, so that the rest fits tf32 but for its last bit
        low = finite_rest(x, high)
        narrow = narrow.to(tl.float32)
        acc = ordered_dot(narrow, low, acc, SWAPPED, "tf32")
        acc = ordered_dot(narrow, high, acc, SWAPPED, "tf32")
    return acc


@triton.jit
def store_rounded(pointer, x, valid):
    """Rounds fp32 `x` once, to nearest even, into an fp32, bf16 or fp16 array."""
    if pointer.dtype.element_ty == tl.bfloat16:
        tl.store(pointer.to(tl.pointer_type(tl.uint16), bitcast=True), to_bf16(x), valid)
    else:
        tl.store(pointer, x.to(pointer.dtype.element_ty), valid)


@triton.jit
def round_like(pointer, x):
    """What `store_rounded` would store, as fp32."""
    if pointer.dtype.element_ty == tl.bfloat16:
        x = as_float(to_bf16(x).to(tl.uint32) << 16)
    else:
        x = x.to(pointer.dtype.element_ty).to(tl.float32)
    return x

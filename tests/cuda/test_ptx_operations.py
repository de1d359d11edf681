"""Does each instruction compute what PTX says? Against rational numbers, Python's integers, and bits one by one."""

import math
import operator
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from ptx_machine import Memory, run

COMPARISONS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def computed(body, *operands, result=np.uint32, **options):
    """What instructions make of operands in %a0, %a1 ..., for each row of them in %d."""
    operands = np.broadcast_arrays(*map(np.atleast_1d, operands))
    count = operands[0].size
    kinds = [array.dtype.itemsize * 8 for array in operands]
    memory = Memory()
    arrays = [*map(np.array, operands), np.zeros(count, result)]
    for array in arrays:
        memory.add(array.ctypes.data, array.nbytes, writable=array is arrays[-1])
    size = np.dtype(result).itemsize
    loads = "".join(
        f".reg .b{max(bits, 16)} %a{i}; ld.param.u64 %x, [p{i}]; mad.wide.u32 %x, %t, {bits // 8}, %x;"
        f"ld.global.u{bits} %a{i}, [%x];"
        for i, bits in enumerate(kinds)
    )
    text = f"""
.visible .entry kernel({", ".join(f".param .u64 p{i}" for i in range(len(arrays)))}) {{
    .reg .b64 %x; .reg .b32 %t, %n; .reg .pred %p, %q; .reg .b{max(16, 8 * size)} %d;
    mov.u32 %t, %ctaid.x; mov.u32 %n, %ntid.x; mul.lo.u32 %t, %t, %n; mov.u32 %n, %tid.x; add.u32 %t, %t, %n;
    setp.ge.u32 %q, %t, {count};
    @%q bra end;
    {loads}
    {body}
    ld.param.u64 %x, [p{len(kinds)}];
    mad.wide.u32 %x, %t, {size}, %x;
    st.global.u{8 * size} [%x], %d;
end:
    ret;
}}
"""
    run(text, -(-count // 64), 64, [np.uint64(array.ctypes.data) for array in arrays], memory, **options)
    return arrays[-1]


def bits(values, dtype):
    return np.asarray(values, dtype).view(f"u{np.dtype(dtype).itemsize}")


def numbers(rng, dtype, count=4096):
    """Of any size, near each other, and at the ends."""
    word = np.dtype(f"u{np.dtype(dtype).itemsize}")
    anything = rng.integers(0, np.iinfo(word).max, count, word, endpoint=True).view(dtype)
    info = np.finfo(dtype)
    ends = [0.0, info.smallest_subnormal, info.tiny, info.tiny * 3, 1, 1 + info.eps, 1.5, 3, info.max, np.inf]
    ends = np.array([*ends, *(-end for end in ends), np.nan], dtype)
    near = rng.choice([-1, 1], count).astype(dtype) * (1 + rng.integers(0, 4, count).astype(dtype) * info.eps)
    return np.concatenate([np.resize(ends, count), near, anything])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fma_is_rounded_once(rng, dtype):
    a, b, c = (rng.permutation(numbers(rng, dtype)) for _ in range(3))
    with np.errstate(all="ignore"):
        # near what cancels the product, and what is half a unit beside it
        c = np.where(
            rng.random(c.size) < 0.5, -(a * b) * (1 + rng.integers(-2, 3, c.size) * np.finfo(dtype).eps / 2), c
        ).astype(dtype)
        c = np.where(rng.random(c.size) < 0.3, (a * b * dtype(2.0 ** (np.finfo(dtype).nmant + 1))).astype(dtype), c)
    bits_of = f"f{8 * np.dtype(dtype).itemsize}"
    word = np.dtype(f"u{np.dtype(dtype).itemsize}")
    result = computed(f"fma.rn.{bits_of} %d, %a0, %a1, %a2;", *(bits(x, dtype) for x in (a, b, c)), result=word).view(dtype)
    expected = np.array([exact_fma(*numbers_, dtype) for numbers_ in zip(a, b, c, strict=True)], dtype)
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(np.signbit(result)[~np.isnan(result)], np.signbit(expected)[~np.isnan(result)])
    if dtype == np.float32:
        assert set(result[np.isnan(result)].view(np.uint32)) == {0x7FFFFFFF}


def exact_fma(a, b, c, dtype):
    """By rational numbers, and Python's rounding of them to float64, or a search among float32."""
    a, b, c = map(float, (a, b, c))
    if not all(map(math.isfinite, (a, b))) or not math.isfinite(c):
        return math.nan if math.isnan(a) or math.isnan(b) else special_fma(a, b, c)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        is_negative = math.copysign(1, a) * math.copysign(1, b) < 0 and math.copysign(1, c) < 0
        return -0.0 if is_negative and (a == 0 or b == 0) and c == 0 else 0.0
    return nearest(exact, dtype)


def special_fma(a, b, c):
    """Where one of them is Inf, or c is NaN."""
    if math.isinf(a) or math.isinf(b):
        if a == 0 or b == 0:
            return math.nan
        product = math.copysign(math.inf, math.copysign(1, a) * math.copysign(1, b))
        return math.nan if math.isnan(c) or c == -product else product
    return c


def nearest(exact, dtype):
    """The float nearest to a rational number, to even: the integer multiple of the unit of its last place."""
    info = np.finfo(dtype)
    exponent = max(exact_log2(abs(exact)), int(info.minexp)) - info.nmant
    unit = Fraction(2) ** exponent
    rounded = round(exact / unit) * unit
    if abs(rounded) >= Fraction(2) ** int(info.maxexp):
        return math.copysign(math.inf, -1 if exact < 0 else 1)
    return math.copysign(float(abs(rounded)), -1 if exact < 0 else 1)


def exact_log2(number):
    """The largest power of two that is not above it, as its exponent."""
    estimate = number.numerator.bit_length() - number.denominator.bit_length()
    return estimate if Fraction(2) ** estimate <= number else estimate - 1


@pytest.mark.parametrize("rounding", [1, 0, -1])
@pytest.mark.parametrize(("name", "exact"), [("rcp", lambda x: 1 / x), ("rsqrt", lambda x: 1 / np.sqrt(x))])
def test_approximate_instructions_are_as_wrong_as_they_may_be(rng, name, exact, rounding):
    """Within the largest error of the PTX ISA, to which the next number is too far."""
    x = np.exp(rng.uniform(-87, 87, 5000)).astype(np.float32)
    x[:20] = 2.0 ** np.arange(-10, 10)
    result = computed(f"{name}.approx.f32 %d, %a0;", x.view(np.uint32), rounding=rounding).view(np.float32)
    with np.errstate(under="ignore"):
        next_result = np.nextafter(result, np.float32(rounding * np.inf)).astype(float)
    expected = exact(x.astype(float))
    limit = expected * 2.0**-22.9 if name == "rsqrt" else np.ldexp(1.0, np.maximum(np.frexp(expected)[1], -125) - 24)
    if rounding:
        assert ((result - expected) * rounding > 0).all()
        assert ((result - expected) * rounding <= limit * (1 + 1e-9)).all()
        assert ((next_result - expected) * rounding > limit * (1 - 1e-9)).all()
    else:
        np.testing.assert_array_equal(result, expected.astype(np.float32))


def test_approximate_instructions_of_what_is_no_number():
    x = np.array([-np.inf, -1, -0.0, 0.0, np.inf, np.nan, 1e-45, -1e-45], np.float32)
    for rounding in (1, 0, -1):
        root = computed("rsqrt.approx.f32 %d, %a0;", x.view(np.uint32), rounding=rounding).view(np.float32)
        inverse = computed("rcp.approx.f32 %d, %a0;", x.view(np.uint32), rounding=rounding).view(np.float32)
        np.testing.assert_array_equal(root[:6], np.float32([np.nan, np.nan, -np.inf, np.inf, 0, np.nan]))
        np.testing.assert_allclose(root[6], 1.401298464324817e-45**-0.5, rtol=1e-6)
        np.testing.assert_array_equal(inverse[[0, 2, 3, 4, 5, 6, 7]], [0, -np.inf, np.inf, 0, np.nan, np.inf, -np.inf])
        assert list(np.signbit(inverse[[0, 4]])) == [True, False]
        assert np.isnan(root).sum() == (root.view(np.uint32) == 0x7FFFFFFF).sum()
        # with .ftz a subnormal number is a zero
        root = computed("rsqrt.approx.ftz.f32 %d, %a0;", x.view(np.uint32), rounding=rounding).view(np.float32)
        assert list(root[6:]) == [np.inf, -np.inf]


def test_sums_flush_where_they_are_told_to():
    tiny = np.finfo(np.float32).tiny
    a = bits([tiny, tiny * 1.5, -1e-45, 1e-45], np.float32)
    b = bits([-tiny * 1.25, -tiny, 0, 1], np.float32)
    with np.errstate(under="ignore"):
        kept = a.view(np.float32) + b.view(np.float32)
    np.testing.assert_array_equal(computed("add.f32 %d, %a0, %a1;", a, b).view(np.float32), kept)
    flushed = computed("add.ftz.f32 %d, %a0, %a1;", a, b).view(np.float32)
    np.testing.assert_array_equal(flushed, [0, 0, 0, 1])
    assert list(np.signbit(flushed)) == [True, False, False, False]


@pytest.mark.parametrize(("name", "storage"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_rounding_to_16_bits(rng, name, storage):
    with np.errstate(invalid="ignore"):
        every = np.arange(1 << 16, dtype=np.uint16).view(storage).astype(np.float32)
    finite = np.sort(every[np.isfinite(every)])
    middles = finite[:-1] + (finite[1:] - finite[:-1]) / 2
    with np.errstate(under="ignore"):
        x = np.concatenate(
            [every, middles, *(np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf)), np.float32([3e38])]
        )
    pairs = computed(f"cvt.rn.{name}x2.f32 %d, %a0, %a1;", bits(x[::-1].copy(), np.float32), bits(x, np.float32))
    single = computed(f"cvt.rn.{name}.f32 %d, %a0;", bits(x, np.float32), result=np.uint16)
    with np.errstate(all="ignore"):
        expected = x.astype(storage)
    for halves in (pairs & 0xFFFF, (pairs >> 16)[::-1], single):
        halves = halves.astype(np.uint16)
        np.testing.assert_array_equal(halves.view(storage).astype(np.float32), expected.astype(np.float32))
        assert (halves[np.isnan(x)] == 0x7FFF).all()
    if name == "f16":
        wide = computed("cvt.f32.f16 %d, %a0;", np.arange(1 << 16, dtype=np.uint16)).view(np.float32)
        np.testing.assert_array_equal(wide, every)


@pytest.mark.parametrize(("name", "storage"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_sums_of_16_bits_and_32(rng, name, storage):
    a, b = rng.standard_normal((2, 500)).astype(storage)
    c = rng.standard_normal(500).astype(np.float32)
    operands = a.view(np.uint16), b.view(np.uint16), c.view(np.uint32)
    wide_a, wide_b = a.astype(np.float32), b.astype(np.float32)
    for operation, expected in (("add", wide_a + c), ("sub", wide_a - c)):
        found = computed(f"{operation}.rn.f32.{name} %d, %a0, %a2;", *operands)
        np.testing.assert_array_equal(found.view(np.float32), expected)
    found = computed(f"fma.rn.f32.{name} %d, %a0, %a1, %a2;", *operands)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(wide_a, wide_b, c, strict=True)]
    np.testing.assert_array_equal(found.view(np.float32), [nearest(x, np.float32) for x in exact])


def test_conversions_of_floats_to_integers():
    x = np.array([2.5, 3.5, -2.5, 2.7, -2.7, 3e9, -3e9, 1e20, -1e20, np.inf, -np.inf, np.nan, 2147483648.0, 0.5], np.float32)
    expected = {
        "rni.s32": [2, 4, -2, 3, -3, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 0, 2**31 - 1, 0],
        "rzi.s32": [2, 3, -2, 2, -2, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 0, 2**31 - 1, 0],
        "rmi.s32": [2, 3, -3, 2, -3, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 0, 2**31 - 1, 0],
        "rpi.u32": [3, 4, 0, 3, 0, 3000000000, 0, 2**32 - 1, 0, 2**32 - 1, 0, 0, 2147483648, 1],
        "rzi.s64": [2, 3, -2, 2, -2, 3 * 10**9, -3 * 10**9, 2**63 - 1, -(2**63), 2**63 - 1, -(2**63), -(2**63), 2**31, 0],
        "rzi.u64": [2, 3, 0, 2, 0, 3 * 10**9, 0, 2**64 - 1, 0, 2**64 - 1, 0, 2**63, 2**31, 0],
    }
    for name, values in expected.items():
        dtype = np.dtype(f"{'i' if name[4] == 's' else 'u'}{int(name[5:]) // 8}")
        result = computed(f"cvt.{name}.f32 %d, %a0;", bits(x, np.float32), result=f"u{dtype.itemsize}").view(dtype)
        assert list(map(int, result)) == values, name


@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64", "u16", "s16"])
@pytest.mark.parametrize("to", ["f32", "f64"])
def test_conversions_of_integers_to_floats(rng, source, to):
    size = int(source[1:]) // 8
    dtype = np.dtype(f"{'i' if source[0] == 's' else 'u'}{size}")
    x = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, 2000, dtype, endpoint=True) >> rng.integers(
        0, 8 * size, 2000
    ).astype(dtype)
    float_type = np.dtype(f"f{int(to[1:]) // 8}").type
    result = computed(f"cvt.rn.{to}.{source} %d, %a0;", x.view(f"u{size}"), result=f"u{float_type().itemsize}").view(
        float_type
    )
    np.testing.assert_array_equal(result, [nearest(Fraction(int(n)), float_type) if n else 0 for n in x])


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integers(rng, kind):
    """Against Python's, which have no width."""
    width = int(kind[1:])
    dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{width // 8}")
    info = np.iinfo(dtype)
    ends = np.array([info.min, info.min + 1, 0, 1, 2, info.max - 1, info.max, info.max // 2], dtype)
    a, b, c = (
        np.concatenate([rng.choice(ends, 200), rng.integers(info.min, info.max, 200, dtype, endpoint=True)])
        for _ in range(3)
    )
    b[b == 0] = 3
    word = np.dtype(f"u{width // 8}")

    def quotient(x, y):
        return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)

    def check(name, function, *operands, result=word):
        found = computed(
            f"{name} %d, {', '.join(f'%a{i}' for i in range(len(operands)))};",
            *(x.view(f"u{x.itemsize}") for x in operands),
            result=result,
        )
        bits_of_result = 8 * np.dtype(result).itemsize
        expected = [function(*map(int, row)) % (1 << bits_of_result) for row in zip(*operands, strict=True)]
        assert list(map(int, found)) == expected, name

    check(f"add.{kind}", lambda x, y: x + y, a, b)
    check(f"sub.{kind}", lambda x, y: x - y, a, b)
    check(f"min.{kind}", min, a, b)
    check(f"max.{kind}", max, a, b)
    check(f"mul.lo.{kind}", lambda x, y: x * y, a, b)
    check(f"mul.hi.{kind}", lambda x, y: x * y >> width, a, b)
    check(f"mad.lo.{kind}", lambda x, y, z: x * y + z, a, b, c)
    check(f"mad.hi.{kind}", lambda x, y, z: (x * y >> width) + z, a, b, c)
    if width < 64:
        wide = np.dtype(f"u{width // 4}")
        check(f"mul.wide.{kind}", lambda x, y: x * y, a, b, result=wide)
        check(f"mad.wide.{kind}", lambda x, y, z: x * y + z, a, b, c.astype(f"{dtype.kind}{width // 4}"), result=wide)
    check(f"div.{kind}", quotient, a, b)
    check(f"rem.{kind}", lambda x, y: x - y * quotient(x, y), a, b)
    count = rng.choice(np.array([0, 1, width - 1, width, width + 1, 2**31, 2**32 - 1], np.uint32), a.size)
    check(f"shr.{kind}", lambda x, n: x >> min(n, 4 * width), a, count)
    check(f"shl.b{width}", lambda x, n: x << min(n, 4 * width), a, count)
    for name, compare in COMPARISONS.items():
        same = np.where(rng.random(a.size) < 0.5, a, b)
        body = f"setp.{name}.{kind} %p, %a0, %a1; selp.u32 %d, 1, 0, %p;"
        found = computed(body, a.view(word), same.view(word))
        assert list(found) == [compare(int(x), int(y)) for x, y in zip(a, same, strict=True)], name


def test_comparisons_with_nan():
    x = np.float32([0, -0.0, 1, np.inf, np.nan, -np.inf])
    a, b = (grid.ravel() for grid in np.meshgrid(x, x))
    is_nan = np.isnan(a) | np.isnan(b)
    expected = {"num": ~is_nan, "nan": is_nan}
    for name, compare in COMPARISONS.items():
        expected[name] = compare(a, b) & ~is_nan
        expected[name + "u"] = compare(a, b) | is_nan
    for name, values in expected.items():
        found = computed(f"setp.{name}.f32 %p, %a0, %a1; selp.u32 %d, 1, 0, %p;", bits(a, np.float32), bits(b, np.float32))
        np.testing.assert_array_equal(found, values, err_msg=name)


def test_the_larger_and_the_smaller_number():
    x = np.float32([0, -0.0, 1, np.inf, np.nan, -np.inf])
    a, b = (grid.ravel() for grid in np.meshgrid(x, x))
    for name, function in (("min", np.fmin), ("max", np.fmax)):
        found = computed(f"{name}.f32 %d, %a0, %a1;", bits(a, np.float32), bits(b, np.float32)).view(np.float32)
        np.testing.assert_array_equal(found, function(a, b))
        zeros = (a == 0) & (b == 0)
        combine = np.logical_or if name == "min" else np.logical_and
        np.testing.assert_array_equal(np.signbit(found[zeros]), combine(np.signbit(a[zeros]), np.signbit(b[zeros])))


def test_fields_of_bits(rng):
    values, others = rng.integers(0, 1 << 64, (2, 500), np.uint64, endpoint=False)
    position, length = rng.choice(np.array([0, 1, 7, 31, 32, 40, 63, 64, 65, 255], np.uint32), (2, 500))
    for width in (32, 64):
        word = np.dtype(f"u{width // 8}")
        a, b = values.astype(word), others.astype(word)
        for sign in "us":
            found = computed(f"bfe.{sign}{width} %d, %a0, %a1, %a2;", a, position, length, result=word)
            expected = [field(*map(int, row), width, sign == "s") for row in zip(a, position, length, strict=True)]
            assert list(map(int, found)) == expected
        found = computed(f"bfi.b{width} %d, %a0, %a1, %a2, %a3;", a, b, position, length, result=word)
        for result, x, into, at, count in zip(*(map(int, v) for v in (found, a, b, position, length)), strict=True):
            mask = (((1 << count) - 1) << at) & ((1 << width) - 1)
            assert result == (into & ~mask) | ((x << at) & mask)


def field(value, position, length, width, is_signed):
    """Bit by bit, as the PTX ISA has it."""
    last = min(position + length - 1, width - 1)
    sign = (value >> last) & 1 if is_signed and length else 0
    result = 0
    for i in range(width):
        bit = (value >> (position + i)) & 1 if i < length and position + i < width else sign
        result |= bit << i
    return result


def test_bytes_of_words(rng):
    a, b, selector = rng.integers(0, 1 << 32, (3, 300), np.uint32, endpoint=False)
    found = computed("prmt.b32 %d, %a0, %a1, %a2;", a, b, selector)
    for result, x, y, choices in zip(*(map(int, v) for v in (found, a, b, selector)), strict=True):
        both = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        expected = []
        for i in range(4):
            choice = choices >> 4 * i & 15
            byte = both[choice & 7]
            expected.append(0xFF * (byte >> 7) if choice & 8 else byte)
        assert result.to_bytes(4, "little") == bytes(expected)


def test_words_in_parts(rng):
    a, b = rng.integers(0, 1 << 32, (2, 100), np.uint32, endpoint=False)
    packed = computed("mov.b64 %d, {%a0, %a1};", a, b, result=np.uint64)
    np.testing.assert_array_equal(packed, a | b.astype(np.uint64) << np.uint64(32))
    halves = ".reg .b16 %low, %high; mov.b32 {%low, %high}, %a0; mov.b32 %d, {%high, %low};"
    np.testing.assert_array_equal(computed(halves, a), a << np.uint32(16) | a >> np.uint32(16))
    upper = ".reg .b16 %high; mov.b32 {_, %high}, %a0; cvt.u32.u16 %d, %high;"
    np.testing.assert_array_equal(computed(upper, a), a >> np.uint32(16))


def test_wider_and_narrower_integers(rng):
    a = rng.integers(0, 1 << 32, 200, np.uint32, endpoint=False)
    np.testing.assert_array_equal(computed("cvt.s32.s8 %d, %a0;", a), a.astype(np.int8).astype(np.uint32))
    np.testing.assert_array_equal(computed("cvt.u32.u16 %d, %a0;", a), a & 0xFFFF)
    extended = computed("cvt.s64.s32 %d, %a0;", a, result=np.uint64)
    np.testing.assert_array_equal(extended, a.view(np.int32).astype(np.int64).view(np.uint64))
    # as a load extends what is narrower than its register
    bytes_ = rng.integers(0, 256, 200, np.uint8, endpoint=False)
    np.testing.assert_array_equal(computed("cvt.u32.u16 %d, %a0;", bytes_), bytes_)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div.rn"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_and_products(rng, name, dtype):
    """Rounded to nearest, against rational numbers."""
    function = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div.rn": operator.truediv}[name]
    a, b = (rng.permutation(numbers(rng, dtype, 1000)) for _ in range(2))
    is_finite = np.isfinite(a) & np.isfinite(b) & (b != 0) & (a != 0)
    a, b = a[is_finite], b[is_finite]
    word = np.dtype(f"u{np.dtype(dtype).itemsize}")
    found = computed(f"{name}.f{8 * word.itemsize} %d, %a0, %a1;", a.view(word), b.view(word), result=word).view(dtype)
    exact = [function(Fraction(float(x)), Fraction(float(y))) for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(found, [nearest(x, dtype) if x else 0 for x in exact])


def test_nan_are_the_hardware_s():
    a, b = bits([np.inf, np.nan, 0, 1], np.float32), bits([-np.inf, 1, np.inf, np.nan], np.float32)
    for name in ("add", "mul", "min", "sub"):
        found = computed(f"{name}.f32 %d, %a0, %a1;", a, b)
        assert set(found[np.isnan(found.view(np.float32))]) <= {0x7FFFFFFF}
    assert list(computed("sqrt.rn.f32 %d, %a0;", bits([-1], np.float32))) == [0x7FFFFFFF]

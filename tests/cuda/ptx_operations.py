"""What each instruction computes in registers: from its name, the types of its operands and a function of arrays of them.

A modifier that is not in these patterns is one that the machine does not know.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import ptx_floats as floats
from ptx import TYPES, Fault


class Refused(Exception):  # noqa: N818  it becomes a Fault, which names the thread
    """What is wrong, of which of the lanes at work."""

    def __init__(self, what, lane=0):
        super().__init__(what)
        self.lane = lane


class Operation(NamedTuple):
    """A function of arrays of these types; one with a largest error gets which end of it is wanted beside them."""

    sources: tuple[np.dtype, ...]
    result: np.dtype
    function: Callable
    is_approximate: bool = False


INT = r"([us](?:16|32|64))"
FLOAT = r"(?:(\.ftz)?\.f(32)|\.f(64))"


@functools.cache
def operation(name):
    """What the instruction of this name computes."""
    for pattern, make in RULES.items():
        if found := re.fullmatch(pattern, name):
            return make(*found.groups())
    raise Fault(f"unknown instruction {name}")


def _same(dtype, count, function):
    return Operation((dtype,) * count, dtype, function)


# integers


def _sum(name, kind):
    functions = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}
    return _same(TYPES[kind], 2, functions[name])


def _product(name, half, kind):
    dtype = TYPES[kind]
    if half == "wide" and dtype.itemsize < 8:
        result = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
    elif half == "wide":
        raise Fault(f"unknown instruction {name}.{half}.{kind}")
    else:
        result = dtype

    def product(a, b):
        if half == "lo":
            return a * b
        if half == "wide":
            return a.astype(result) * b.astype(result)
        return _high_product(a, b)

    if name == "mul":
        return Operation((dtype, dtype), result, product)
    return Operation((dtype, dtype, result), result, lambda a, b, c: product(a, b) + c)


def _high_product(a, b):
    dtype = a.dtype
    if dtype.itemsize < 8:
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(8 * dtype.itemsize)).astype(dtype)
    # by halves: the low ones have no sign
    mask, half = dtype.type(0xFFFFFFFF), dtype.type(32)
    a_low, a_high, b_low, b_high = a & mask, a >> half, b & mask, b >> half
    low = ((a_low.view("u8") * b_low.view("u8")) >> np.uint64(32)).view(dtype)
    middle = a_high * b_low + low
    other = a_low * b_high + (middle & mask)
    return a_high * b_high + (middle >> half) + (other >> half)


def _quotient(name, kind):
    def divided(a, b):
        if not b.all():
            raise Refused("division by zero", int(np.argmin(np.broadcast_to(b != 0, np.broadcast_shapes(a.shape, b.shape)))))
        quotient = a // b
        # towards zero
        quotient += (quotient * b != a) & ((a < 0) != (b < 0))
        return quotient if name == "div" else a - quotient * b

    return _same(TYPES[kind], 2, divided)


def _integer_sign(name, kind):
    return _same(TYPES[kind], 1, np.negative if name == "neg" else np.abs)


def _bitwise(name, kind):
    return _same(TYPES[kind], 2, {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name])


def _inverted(kind):
    return _same(TYPES[kind], 1, np.invert)


def _shift(name, kind):
    dtype = TYPES[kind]
    width = 8 * dtype.itemsize
    shift = np.left_shift if name == "shl" else np.right_shift

    def shifted(a, count):
        # beyond the width there are zeros, or signs
        inside = shift(a, np.minimum(count, width - 1).astype(dtype))
        beyond = dtype.type(0) if name == "shl" or dtype.kind == "u" else a >> dtype.type(width - 1)
        return np.where(count < width, inside, beyond)

    return Operation((dtype, TYPES["u32"]), dtype, shifted)


def _extraction(kind):
    dtype = TYPES[kind]
    width = 8 * dtype.itemsize
    word = np.dtype(f"u{dtype.itemsize}").type

    def extracted(a, position, length):
        position, length = position & np.uint32(255), length & np.uint32(255)
        bits = a.view(word)
        field = _shifted_right(bits, position) & _ones(length, width, word)
        if dtype.kind == "u":
            return field
        # the last bit of the field, or the number's where it ends before
        last = np.minimum(position + length - np.uint32(1), width - 1).astype(word)
        is_negative = ((bits >> last) & word(1)).astype(bool) & (length > 0)
        return np.where(is_negative, field | ~_ones(np.minimum(length, _rest(position, width)), width, word), field).view(
            dtype
        )

    return Operation((dtype, TYPES["u32"], TYPES["u32"]), dtype, extracted)


def _rest(position, width):
    """Bits of a number from the position on."""
    return np.where(position < width, np.uint32(width) - position, np.uint32(0))


def _insertion(kind):
    dtype = TYPES[kind]
    word, width = dtype.type, 8 * dtype.itemsize

    def inserted(field, a, position, length):
        position, length = position & np.uint32(255), length & np.uint32(255)
        place = _shifted_left(_ones(length, width, word), position)
        return (a & ~place) | (_shifted_left(field, position) & place)

    return Operation((dtype, dtype, TYPES["u32"], TYPES["u32"]), dtype, inserted)


def _ones(length, width, word):
    """So many bits that are set."""
    return ~_shifted_left(np.full(length.shape, ~word(0), word), np.minimum(length, width).astype(np.uint32))


def _shifted_left(a, count):
    return operation(f"shl.b{8 * a.dtype.itemsize}").function(a, count)


def _shifted_right(a, count):
    return operation(f"shr.u{8 * a.dtype.itemsize}").function(a, count)


def _permutation():
    def permuted(a, b, selector):
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        result = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint32)
        for i in range(4):
            choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> (np.uint64(8) * (choice & np.uint32(7)).astype(np.uint64))).astype(np.uint32) & np.uint32(255)
            # the fourth bit asks for the byte's sign
            byte = np.where(choice & np.uint32(8), np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0)), byte)
            result |= byte << np.uint32(8 * i)
        return result

    return _same(TYPES["b32"], 3, permuted)


# floats


def _with_ftz(function, ftz):
    return (lambda *values: floats.flushed(function(*map(floats.flushed, values)))) if ftz else function


def _canonical(function):
    return lambda *values: floats.canonical(function(*values))


def _float_sum(name, ftz, single, double):
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name]
    return _same(TYPES[f"f{single or double}"], 2, _with_ftz(_canonical(function), ftz))


def _fma(ftz, single, double):
    return _same(TYPES[f"f{single or double}"], 3, _with_ftz(floats.fma, ftz))


def _mixed(name, half):
    """With operands of 16 bits, which become float32 first; the last one is a float32."""
    count = 2 if name == "fma" else 1
    function = {"add": _canonical(np.add), "sub": _canonical(np.subtract), "fma": floats.fma}[name]
    widen = floats.from_bfloat16 if half == "bf16" else (lambda a: a.astype(np.float32))

    def computed(*values):
        return function(*map(widen, values[:count]), *values[count:])

    return Operation((TYPES["b16" if half == "bf16" else "f16"],) * count + (TYPES["f32"],), TYPES["f32"], computed)


def _exact_quotient(name, ftz, single, double):
    function = {"div": np.divide, "sqrt": np.sqrt, "rcp": np.reciprocal}[name]
    dtype = TYPES[f"f{single or double}"]
    return _same(dtype, 2 if name == "div" else 1, _with_ftz(_canonical(function), ftz))


def _approximation(name, ftz):
    function = {"rcp": floats.rcp, "rsqrt": floats.rsqrt}[name]

    def approximate(values, rounding):
        return floats.flushed(function(floats.flushed(values), rounding)) if ftz else function(values, rounding)

    return Operation((TYPES["f32"],), TYPES["f32"], approximate, is_approximate=True)


def _float_extreme(name, ftz, single, double):
    function = floats.minimum if name == "min" else floats.maximum
    return _same(TYPES[f"f{single or double}"], 2, _with_ftz(function, ftz))


def _float_sign(name, ftz, single, double):
    return _same(TYPES[f"f{single or double}"], 1, _with_ftz(np.abs if name == "abs" else np.negative, ftz))


# comparisons and choices

COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
# of numbers without a sign
OTHER_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _comparison(name, kind):
    if kind[0] == "b" and name not in ("eq", "ne"):
        raise Fault(f"unknown instruction setp.{name}.{kind}")
    return Operation((TYPES[kind],) * 2, TYPES["pred"], COMPARISONS[OTHER_NAMES.get(name, name)])


def _float_comparison(name, unordered, ftz, single, double):
    def compared(a, b):
        if ftz:
            a, b = floats.flushed(a), floats.flushed(b)
        is_nan = np.isnan(a) | np.isnan(b)
        if name in ("num", "nan"):
            return is_nan if name == "nan" else ~is_nan
        compare = COMPARISONS[name]
        return compare(a, b) | is_nan if unordered else compare(a, b) & ~is_nan

    return Operation((TYPES[f"f{single or double}"],) * 2, TYPES["pred"], compared)


def _choice(kind):
    dtype = TYPES[kind]
    return Operation((dtype, dtype, TYPES["pred"]), dtype, lambda a, b, chosen: np.where(chosen, a, b))


def _copy(kind, address):
    return _same(TYPES[kind or address], 1, np.copy)


# conversions


def _cvt_integers(to, source):
    return Operation((TYPES[source],), TYPES[to], lambda a: a.astype(TYPES[to]))


def _cvt_from_integer(bits, source):
    dtype = TYPES[f"f{bits}"]
    return Operation((TYPES[source],), dtype, lambda a: a.astype(dtype))


def _cvt_to_integer(mode, ftz, to, bits):
    def converted(a):
        return floats.to_integer(floats.flushed(a) if ftz else a, mode, TYPES[to])

    return Operation((TYPES[f"f{bits}"],), TYPES[to], converted)


def _cvt_wider(ftz, to, source):
    if int(source) >= int(to) or (ftz and source == "16"):
        raise Fault(f"unknown instruction cvt.f{to}.f{source}")
    dtype = TYPES[f"f{to}"]

    def widened(a):
        return floats.canonical((floats.flushed(a) if ftz else a).astype(dtype))

    return Operation((TYPES[f"f{source}"],), dtype, widened)


def _cvt_narrower(to, source):
    if int(source) <= int(to):
        raise Fault(f"unknown instruction cvt.rn.f{to}.f{source}")
    dtype = TYPES[f"f{to}"]
    return Operation((TYPES[f"f{source}"],), dtype, lambda a: floats.canonical(a.astype(dtype)))


def _cvt_bfloat16():
    return Operation((TYPES["f32"],), TYPES["b16"], floats.bfloat16)


def _cvt_pair(kind):
    def converted(high, low):
        rounded = floats.bfloat16 if kind == "bf16" else lambda a: floats.canonical(a.astype(np.float16)).view(np.uint16)
        return rounded(low).astype(np.uint32) | rounded(high).astype(np.uint32) << np.uint32(16)

    return Operation((TYPES["f32"],) * 2, TYPES["b32"], converted)


# of each name that is known, what makes an operation of the pattern's groups
RULES: dict[str, Callable] = {
    rf"(add|sub|min|max)\.{INT}": _sum,
    rf"(mul|mad)\.(lo|hi|wide)\.{INT}": _product,
    rf"(div|rem)\.{INT}": _quotient,
    r"(neg|abs)\.(s(?:16|32|64))": _integer_sign,
    r"(and|or|xor)\.(pred|b16|b32|b64)": _bitwise,
    r"not\.(pred|b16|b32|b64)": _inverted,
    r"(shl|shr)\.([bus](?:16|32|64))": _shift,
    r"bfe\.([us](?:32|64))": _extraction,
    r"bfi\.(b(?:32|64))": _insertion,
    r"prmt\.b32": _permutation,
    rf"(add|sub|mul)(?:\.rn)?{FLOAT}": _float_sum,
    rf"fma\.rn{FLOAT}": _fma,
    r"(add|sub|fma)\.rn\.f32\.(f16|bf16)": _mixed,
    rf"(div|sqrt|rcp)\.rn{FLOAT}": _exact_quotient,
    r"(rcp|rsqrt)\.approx(\.ftz)?\.f32": _approximation,
    rf"(min|max){FLOAT}": _float_extreme,
    rf"(abs|neg){FLOAT}": _float_sign,
    r"setp\.(eq|ne|lt|le|gt|ge|lo|ls|hi|hs)\.([bus](?:16|32|64))": _comparison,
    rf"setp\.(eq|ne|lt|le|gt|ge|num|nan)(u?){FLOAT}": _float_comparison,
    r"selp\.([busf](?:16|32|64))": _choice,
    r"(?:mov\.([busf](?:16|32|64)|pred)|cvta(?:\.to)?\.global\.(u64))": _copy,
    r"cvt\.([us](?:8|16|32|64))\.([us](?:8|16|32|64))": _cvt_integers,
    r"cvt\.rn\.f(32|64)\.([us](?:8|16|32|64))": _cvt_from_integer,
    r"cvt\.(rni|rzi|rmi|rpi)(\.ftz)?\.([us](?:32|64))\.f(32|64)": _cvt_to_integer,
    r"cvt(\.ftz)?\.f(32|64)\.f(16|32)": _cvt_wider,
    r"cvt\.rn\.f(16|32)\.f(32|64)": _cvt_narrower,
    r"cvt\.rn\.bf16\.f32": _cvt_bfloat16,
    r"cvt\.rn\.(f16|bf16)x2\.f32": _cvt_pair,
}

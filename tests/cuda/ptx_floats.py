"""Floating-point arithmetic as PTX defines it, on arrays: where NumPy has not the operation, or another result for NaN.

NumPy's own sums, products, quotients, roots and conversions are rounded to nearest, and keep subnormal numbers.
"""

from fractions import Fraction

import numpy as np

F16, F32, F64 = np.float16, np.float32, np.float64
SIGNS = {F32: np.uint32(1 << 31), F64: np.uint64(1 << 63)}
WORDS = {F16: np.uint16, F32: np.uint32, F64: np.uint64}
# what float32 and float16 instructions give for any NaN
CANONICAL = {F32: np.uint32(0x7FFFFFFF), F16: np.uint16(0x7FFF)}
# the largest errors that the PTX ISA documents, over the full range: of rcp in units of the last place, of rsqrt relative
RCP_ULPS = 1
RSQRT_ERROR = 2.0**-22.9


def canonical(result):
    """The result with the NaN that the hardware has; float64's keep theirs."""
    if result.dtype != F64:
        is_nan = np.isnan(result)
        if is_nan.any():
            result.view(WORDS[result.dtype.type])[is_nan] = CANONICAL[result.dtype.type]
    return result


def flushed(values):
    """Subnormal float32 as zeros of their sign."""
    return np.where(np.abs(values) < np.finfo(F32).tiny, np.copysign(F32(0), values), values)


def fma(a, b, c):
    """a * b + c, rounded once."""
    return canonical((_fma32 if a.dtype == F32 else _fma64)(a, b, c))


def _fma32(a, b, c):
    # float64 has all of the product; the sum is rounded twice, which matters between two float32 and to subnormal ones
    product = a.astype(F64) * b
    wide = product + c
    result = wide.astype(F32)
    is_middle = (wide.view(np.uint64) & np.uint64(0x1FFFFFFF)) == 0x10000000
    doubtful = is_middle | ((np.abs(wide) < np.finfo(F32).tiny) & (wide != 0))
    if doubtful.any():
        product, c = np.broadcast_arrays(product, c.astype(F64))
        result[doubtful] = _sum_to_odd(product[doubtful], c[doubtful]).astype(F32)
    return result


def _two_sum(a, b):
    """The rounded sum and its error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _sum_to_odd(a, b):
    """The sum, or where it is inexact its neighbour with an odd last bit, which rounds to fewer bits as the sum does."""
    total, error = _two_sum(a, b)
    is_inexact = (error != 0) & np.isfinite(total)
    bits = total.view(np.int64) - (is_inexact & (np.signbit(error) != np.signbit(total)))
    return (bits | is_inexact).view(F64)


def _fma64(a, b, c):
    """Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums", figure 5; the rest in fractions."""
    a, b, c = np.broadcast_arrays(a, b, c)
    high, low = _two_product(a, b)
    c_high, c_low = _two_sum(c, low)
    total, error = _two_sum(high, c_high)
    result = total + _sum_to_odd(c_low, error)
    size = np.abs(high)
    # none of the errors above is too small for a float64, and nothing overflows
    is_exact = (np.abs(a) < 2.0**500) & (np.abs(b) < 2.0**500) & (size > 2.0**-900) & (np.abs(c) < 2.0**1000)
    if not is_exact.all():
        rest = np.flatnonzero(~is_exact)
        result[rest] = [_fma_of_numbers(*map(float, numbers)) for numbers in zip(a[rest], b[rest], c[rest], strict=True)]
    return result


def _two_product(a, b):
    """The rounded product and its error (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = map(_split, (a, b))
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _split(a):
    """Two numbers of half as many bits (Veltkamp)."""
    scaled = a * F64(2**27 + 1)
    high = scaled - (scaled - a)
    return high, a - high


def _fma_of_numbers(a, b, c):
    with np.errstate(all="ignore"):
        if not np.isfinite([a, b]).all() or a == 0 or b == 0:
            return float(F64(a) * F64(b) + F64(c))
    if not np.isfinite(c):
        return c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        # the product is a float64, and its sum with c a zero, of the sign that floats give it
        return a * b + c
    try:
        return float(exact)
    except OverflowError:
        return float(np.copysign(np.inf, float(exact > 0) - 0.5))


def rcp(values, rounding):
    exact = 1 / values.astype(F64)
    # units of the last place, of which a subnormal number has that of the smallest normal one
    return _approximate(exact, RCP_ULPS * np.ldexp(1.0, np.maximum(np.frexp(exact)[1], -125) - 24), rounding)


def rsqrt(values, rounding):
    wide = values.astype(F64)
    # the root of a negative zero would be one
    exact = np.where(wide == 0, np.copysign(np.inf, wide), 1 / np.sqrt(wide))
    return _approximate(exact, np.abs(exact) * RSQRT_ERROR, rounding)


def _approximate(exact, error, rounding):
    """The float32 that is the largest within the error, or the smallest; with no rounding the nearest."""
    result = exact.astype(F32)
    if rounding:
        limit = exact + rounding * error
        furthest = limit.astype(F32)
        is_beyond = furthest.astype(F64) * rounding > limit * rounding
        furthest = np.where(is_beyond, np.nextafter(furthest, F32(-rounding * np.inf)), furthest)
        result = np.where(np.isfinite(result) & (result != 0), furthest, result)
    return canonical(result)


def minimum(a, b):
    """The number where the other is NaN; -0 is less than 0."""
    return _chosen(a, b, (a < b) | ((a == b) & np.signbit(a)))


def maximum(a, b):
    return _chosen(a, b, (a > b) | ((a == b) & ~np.signbit(a)))


def _chosen(a, b, is_first):
    return canonical(np.where(np.isnan(b) | (is_first & ~np.isnan(a)), a, b))


def bfloat16(values):
    """The bits of the nearest bfloat16, to even, of float32."""
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bfloat16(words):
    return (words.astype(np.uint32) << np.uint32(16)).view(F32)


ROUNDED = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(values, mode, dtype):
    """The nearest integer that the type has; of NaN 0, or of 64 bits 2^63, as `cvt` says."""
    ends = np.iinfo(dtype)
    rounded = ROUNDED[mode](values.astype(F64))
    # float64 has not the largest of 64 bits: what is not below the next one becomes it
    is_over, is_under = rounded >= float(ends.max) + (ends.bits < 64), rounded < float(ends.min)
    is_nan = np.isnan(rounded)
    # NumPy's conversion of numbers beyond int64 is not defined
    result = np.where(is_over | is_under | is_nan, 0, rounded)
    result = result.astype(np.uint64 if ends.min == 0 else np.int64).astype(dtype)
    result[is_over] = ends.max
    result[is_under] = ends.min
    if ends.bits == 64:
        result.view(np.uint64)[is_nan] = np.uint64(1 << 63)
    return result

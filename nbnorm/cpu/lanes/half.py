"""Float16 and bfloat16 as LLVM converts them: sixteen at once, exactly, rounded once to nearest even.

The processor's own instructions where it has them for float16; elsewhere, and for bfloat16, integer arithmetic.
"""

from llvmlite import ir
from numba.core import cgutils

from nbnorm.cpu.lanes import processor

I16, I32 = ir.IntType(16), ir.IntType(32)
F32 = ir.FloatType()


def from_bfloat16(builder, raw):
    """Float32 from int16."""
    bits = builder.shl(builder.zext(raw, _like(raw, I32)), _constant(raw, 16))
    return builder.bitcast(bits, _like(raw, F32))


def to_bfloat16(builder, values):
    """Int16 from float32."""
    bits, rounded = _rounded(builder, values)
    # a NaN stays one when its lower half is cut off
    is_nan = builder.fcmp_unordered("uno", values, values)
    return _upper_half(builder, builder.select(is_nan, builder.or_(bits, _constant(bits, 0x400000)), rounded))


def sum_to_bfloat16(builder, values):
    """The same of sums of two bfloat16: the lower half of a NaN among these is 0, and what is added to it stays there."""
    return _upper_half(builder, _rounded(builder, values)[1])


def held_by_bfloat16(builder, values):
    """The same of float32 that are bfloat16."""
    return _upper_half(builder, builder.bitcast(values, _like(values, I32)))


def _upper_half(builder, bits):
    return builder.trunc(builder.lshr(bits, _constant(bits, 16)), _like(bits, I16))


def _rounded(builder, values):
    """The bits of float32, and these with their upper halves rounded."""
    bits = builder.bitcast(values, _like(values, I32))
    last = builder.and_(builder.lshr(bits, _constant(bits, 16)), _constant(bits, 1))
    return bits, builder.add(bits, builder.add(last, _constant(bits, 0x7FFF)))


def from_float16(builder, raw):
    """Float32 from uint16."""
    if processor.has_half_instructions():
        return builder.fpext(builder.bitcast(raw, _like(raw, ir.HalfType())), _like(raw, F32))
    return from_float16_by_integers(builder, raw)


def from_float16_by_integers(builder, raw):
    """The same on any processor."""
    bits = builder.zext(raw, _like(raw, I32))
    sign = builder.shl(builder.and_(bits, _constant(bits, 0x8000)), _constant(bits, 16))
    size = builder.shl(builder.and_(bits, _constant(bits, 0x7FFF)), _constant(bits, 13))
    # the exponent's bias, by a product that is exact for subnormal numbers too
    product = builder.fmul(builder.bitcast(size, _like(bits, F32)), _constant(bits, 2.0**112, F32))
    is_finite = builder.icmp_unsigned("<", size, _constant(bits, 0x7C00 << 13))
    infinite = builder.or_(size, _constant(bits, 0x7F800000))
    size = builder.select(is_finite, builder.bitcast(product, bits.type), infinite)
    return builder.bitcast(builder.or_(sign, size), _like(bits, F32))


def to_float16(builder, values):
    """Uint16 from float32."""
    if processor.has_half_instructions():
        return builder.bitcast(builder.fptrunc(values, _like(values, ir.HalfType())), _like(values, I16))
    bits = builder.bitcast(values, _like(values, I32))
    size = builder.and_(bits, _constant(bits, 0x7FFFFFFF))
    sign = builder.lshr(builder.xor(bits, size), _constant(bits, 16))
    # normal: the exponent's bias taken off, and nearly half a unit added, which rounds to nearest even
    last = builder.and_(builder.lshr(size, _constant(bits, 13)), _constant(bits, 1))
    rebiased = builder.add(size, _constant(bits, 0xFFF - (112 << 23)))
    normal = builder.lshr(builder.add(rebiased, last), _constant(bits, 13))
    # subnormal: the sum with 0.5 has the wanted bits at its end, rounded by the addition
    moved = builder.fadd(builder.bitcast(size, values.type), _constant(bits, 0.5, F32))
    subnormal = builder.sub(builder.bitcast(moved, bits.type), _constant(bits, 0x3F000000))
    result = builder.select(builder.icmp_unsigned("<", size, _constant(bits, 0x38800000)), subnormal, normal)
    result = builder.select(builder.icmp_unsigned(">=", size, _constant(bits, 0x477FF000)), _constant(bits, 0x7C00), result)
    is_nan = builder.icmp_unsigned(">", size, _constant(bits, 0x7F800000))
    result = builder.select(is_nan, _constant(bits, 0x7E00), result)
    return builder.trunc(builder.or_(sign, result), _like(values, I16))


def to_odd(builder, wide):
    """Float32 from float64 with the last bit set where inexact: the next rounding is then as if it were the only one.

    Boldo and Melquiond, "When double rounding is odd", 2005.
    """
    near = builder.fptrunc(wide, _like(wide, F32))
    back = builder.fpext(near, wide.type)
    bits = builder.bitcast(near, _like(wide, I32))
    is_even = builder.icmp_signed("==", builder.and_(bits, _constant(bits, 1)), _constant(bits, 0))
    is_inexact = builder.and_(is_even, builder.fcmp_ordered("!=", back, wide))
    step = builder.select(_is_smaller(builder, back, wide), _constant(bits, 1), _constant(bits, -1))
    odd = builder.add(bits, builder.select(is_inexact, step, _constant(bits, 0)))
    return builder.bitcast(odd, near.type)


def _is_smaller(builder, a, b):
    name = f"llvm.fabs.v{a.type.count}f64"
    fabs = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type]), name)
    return builder.fcmp_ordered("<", builder.call(fabs, [a]), builder.call(fabs, [b]))


def _like(vector, element):
    return ir.VectorType(element, vector.type.count)


def _constant(vector, value, element=I32):
    return _like(vector, element)([value] * vector.type.count)

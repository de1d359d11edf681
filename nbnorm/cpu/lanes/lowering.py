"""How Numba compiles the operations of `meaning`: each as a few instructions of LLVM's on vectors of sixteen.

No operation carries a fast-math flag, so that LLVM keeps the order that a kernel is written in. What makes pointers of
arrays is in `pointers`, what reads and writes their memory in `access`, and the mode that all is computed in, `control`.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import lower_builtin

from nbnorm.cpu.lanes import access, control, meaning, pointers  # noqa: F401  which teach Numba operations too
from nbnorm.cpu.lanes.rules import MASK, NOTHING, Lanes, Mask, element_of, lowers, types_call
from nbnorm.cpu.lanes.vectors import I8, I16, I32, I64, call, converted, first, halves_added, name, splat

FLOATS = types.float32, types.float64
COMPARISONS = {
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.eq: "==",
    operator.ne: "!=",
}


def _lanes_of(a, b):
    """The type of the lanes among two operands of which the other has it too, or is a number of it; else None."""
    lanes = a if isinstance(a, Lanes) else b
    is_ours = isinstance(lanes, Lanes) and a in (lanes, lanes.element) and b in (lanes, lanes.element)
    return lanes if is_ours else None


def _lowers_operator(function, code):
    def lower(context, builder, typed, arguments):
        is_lanes = [isinstance(argument_type, Lanes) for argument_type in typed.args]
        pairs = zip(arguments, is_lanes, strict=True)
        return code(builder, *(value if is_sixteen else splat(builder, value) for value, is_sixteen in pairs))

    for signature in ((Lanes, Lanes), (Lanes, types.Float), (types.Float, Lanes)):
        lower_builtin(function, *signature)(lower)


def _arithmetic(function, code):
    # the quotient of two integers is a float
    numbers = FLOATS if function is operator.truediv else (types.int64, *FLOATS)

    def result(a, *others):
        if not others:
            return a if isinstance(a, Lanes) else None
        # of numbers too, for which Numba would first look at all that NumPy has for arrays
        return a if (a in numbers and others == (a,)) else _lanes_of(a, *others)

    types_call(function, result)
    _lowers_operator(function, code)


def _comparison(function, sign):
    # NaN is not equal to anything
    compare = ir.IRBuilder.fcmp_unordered if sign == "!=" else ir.IRBuilder.fcmp_ordered

    def result(a, b):
        if a == b and a in (types.int64, *FLOATS):
            return types.boolean
        return MASK if _lanes_of(a, b) else None

    types_call(function, result)
    _lowers_operator(function, lambda builder, a, b: compare(builder, sign, a, b))


_arithmetic(operator.add, ir.IRBuilder.fadd)
_arithmetic(operator.sub, ir.IRBuilder.fsub)
_arithmetic(operator.mul, ir.IRBuilder.fmul)
_arithmetic(operator.truediv, ir.IRBuilder.fdiv)
types_call(operator.neg, lambda a: a if isinstance(a, Lanes) or a in FLOATS else None)
lower_builtin(operator.neg, Lanes)(lambda context, builder, typed, arguments: builder.fneg(*arguments))
for _function, _sign in COMPARISONS.items():
    _comparison(_function, _sign)
types_call(operator.and_, lambda a, b: a if a == b and a in (MASK, types.boolean) else None)
lower_builtin(operator.and_, Mask, Mask)(lambda context, builder, typed, arguments: builder.and_(*arguments))
# what each branch asks for
types_call(bool, lambda value: types.boolean if value in (types.boolean, types.int64) else None)


@lowers(meaning.element_of)
def of_element(source):
    return types.NumberClass(element_of(source)), lambda builder, source: I8.as_pointer()(None)


@lowers(meaning.keep)
def keep(lanes, count):
    return lanes, lambda builder, value, count: builder.select(first(builder, count), value, value.type(None))


@lowers(meaning.fill)
def fill(number):
    return Lanes(number), splat


@lowers(meaning.fill_for)
def fill_for(destination, value):
    return NOTHING if destination == types.none else (Lanes(value), lambda builder, _, value: splat(builder, value))


@lowers(meaning.widen)
def widen(values):
    return _cast(values, types.float64)


@lowers(meaning.cast)
def cast(values, element):
    return _cast(values, element.dtype)


def _cast(values, wanted):
    if isinstance(values, Lanes):
        return Lanes(wanted), lambda builder, value, *_: converted(builder, value, values.element, wanted)
    return (wanted, lambda builder, value, *_: converted(builder, value, values, wanted)) if values in FLOATS else None


@lowers(meaning.multiply_add)
def multiply_add(a, b, c):
    lanes: Any = next((operand for operand in (a, b, c) if isinstance(operand, Lanes)), None)
    has_factor, has_term = b != types.none, c != types.none

    def code(builder, *values):
        a, b, c = (
            splat(builder, value) if operand == lanes.element else value
            for operand, value in zip(operands, values, strict=True)
        )
        if has_factor and has_term:
            return call(builder, f"llvm.fmuladd.{name(a.type)}", a.type, [a, b, c])
        if has_factor:
            return builder.fmul(a, b)
        return builder.fadd(a, c) if has_term else a

    operands = a, b, c
    is_ours = lanes and a != types.none and all(operand in (lanes, lanes.element, types.none) for operand in operands)
    return (lanes, code) if is_ours else None


@lowers(meaning.total)
def total(lanes):
    def code(builder, value):
        while value.type.count > 1:
            value = halves_added(builder, value)
        return builder.extract_element(value, I32(0))

    return lanes.element, code


@lowers(meaning.root)
def root(values):
    return values, lambda builder, value: call(builder, f"llvm.sqrt.{name(value.type)}", value.type, [value])


@lowers(meaning.every)
def every(condition):
    if condition == types.boolean:
        return condition, lambda builder, value: value
    return types.boolean, lambda builder, value: builder.icmp_unsigned("==", builder.bitcast(value, I16), I16(-1))


@lowers(meaning.choose)
def choose(condition, values, others):
    return (values, lambda builder, *arguments: builder.select(*arguments)) if condition == MASK else None


@lowers(meaning.at_least_zero)
def at_least_zero(values):
    def code(builder, value):
        zero = value.type(None) if isinstance(values, Lanes) else value.type(0.0)
        return builder.select(builder.fcmp_ordered("<", value, zero), zero, value)

    return values, code


def _chosen(function, sign):
    @lowers(function)
    def rule(a, b):
        a, b = types.unliteral(a), types.unliteral(b)
        if a == b and isinstance(a, types.Float):
            return a, lambda builder, a, b: builder.select(builder.fcmp_ordered(sign, b, a), b, a)

        def code(builder, *values):
            a, b = (value if value.type == I64 else builder.sext(value, I64) for value in values)
            return builder.select(builder.icmp_signed(sign, b, a), b, a)

        return (types.int64, code) if a in types.signed_domain and b in types.signed_domain else None


_chosen(meaning.larger, ">")
_chosen(meaning.smaller, "<")

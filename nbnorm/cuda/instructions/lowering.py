"""How numba-cuda compiles the operations of `instructions`: accesses of up to 16 bytes, converted in registers, and PTX.

It is imported where a kernel is compiled, and by nothing that runs in the simulator.
"""

import functools
import hashlib

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import (
    infer_getattr,
    lower_builtin,
    lower_getattr_generic,
    register_model,
    type_callable,
    typeof_impl,
)
from numba.cuda.models import models
from numba.cuda.typing.templates import AttributeTemplate

from nbnorm.cuda.instructions import meaning

I16, I32, I64 = (ir.IntType(bits) for bits in (16, 32, 64))
HALF, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
FLOAT16, BFLOAT16 = types.uint16, types.int16
LLVM_TYPES = {types.float32: F32, types.float64: F64, FLOAT16: I16, BFLOAT16: I16}
# the place of the data pointer in Numba's structure of an array: after meminfo, parent, size and itemsize
ARRAY_DATA = 4


class ConstantsType(types.Dummy):
    """The type of `Constants`, which knows their values: there is nothing to hand over when a kernel runs."""

    def __init__(self, constants):
        self.constants = constants
        # short, since the names of all functions that take them have it
        super().__init__(f"Constants({hashlib.sha256(repr(constants).encode()).hexdigest()[:16]})")


register_model(ConstantsType)(models.OpaqueModel)


@typeof_impl.register(meaning.Constants)
def _type_of_constants(constants, context):
    return ConstantsType(constants)


@infer_getattr
class _Constant(AttributeTemplate):
    key = ConstantsType

    def generic_resolve(self, kind, name):
        value = getattr(kind.constants, name)
        if isinstance(value, tuple):
            # a tile, whose numbers have names too
            return ConstantsType(value)
        return types.maybe_literal(value) or self.context.resolve_value_type(value)


@lower_getattr_generic(ConstantsType)
def _constant(context, builder, kind, value, name):
    constant = getattr(kind.constants, name)
    return context.get_constant_generic(builder, context.typing_context.resolve_getattr(kind, name), constant)


def accesses(function):
    """Decorate a rule: from the types of an element, computed and stored, and the constants behind them, to the code."""

    def register(rule):
        def code_of(values, pointer, constants):
            if all(isinstance(constant, types.IntegerLiteral) for constant in constants):
                return rule(values.dtype, pointer.dtype, *(constant.literal_value for constant in constants))
            return None

        @type_callable(function)
        def typing(context):
            # Numba asks for the names of the arguments
            @functools.wraps(function)
            def typer(values, k, pointer, at, *constants):
                return types.none if code_of(values, pointer, constants) else None

            return typer

        @lower_builtin(function, types.VarArg(types.Any))
        def lower(context, builder, signature, arguments):
            values, _, pointer, _, *constants = signature.args
            code_of(values, pointer, constants)(builder, *arguments)
            return context.get_dummy_value()

        return rule

    return register


@accesses(meaning.load)
def _load(computed, stored, width, access):
    # no access is wider than 16 bytes, which a vector of parameters wider than x may be
    access = min(access, 16 // _bytes(stored))

    def code(builder, values, k, source, at, *_):
        for first in range(0, width, access):
            kind = _words(stored, access)
            raw = builder.load(_address(builder, source, at, first, kind), align=_bytes(stored) * access)
            for i, element in enumerate(_decoded(builder, _parts(builder, raw), stored, computed)):
                builder.store(element, _element(builder, values, k, first + i))

    return code


@accesses(meaning.fetch)
def _fetch(computed, stored, width, access):
    if not _is_kept_packed(computed, stored):
        return _load(computed, stored, width, access)

    def code(builder, ahead, k, source, at, *_):
        for first in range(0, width, access):
            kind = _words(stored, access)
            raw = builder.load(_address(builder, source, at, first, kind), align=_bytes(stored) * access)
            for i, part in enumerate(_parts(builder, raw)):
                word = builder.zext(part, I32) if part.type == I16 else part
                builder.store(builder.bitcast(word, F32), _element(builder, ahead, k, first + i))

    return code


@accesses(meaning.unpack)
def _unpack(computed, stored, width, access):
    is_packed = _is_kept_packed(computed, stored)

    def code(builder, values, k, source, ahead, *_):
        for first in range(0, width, access):
            count = max(1, access // 2) if is_packed else access
            parts = [builder.load(_element(builder, ahead, k, first + i)) for i in range(count)]
            if is_packed:
                parts = [builder.bitcast(part, I32) for part in parts]
                parts = parts if access > 1 else [builder.trunc(part, I16) for part in parts]
                parts = _decoded(builder, parts, stored, computed)
            for i, part in enumerate(parts):
                builder.store(part, _element(builder, values, k, first + i))

    return code


@accesses(meaning.store)
def _store(computed, stored, width, access, rounds_pairs):
    def code(builder, values, k, destination, at, *_):
        elements = [builder.load(_element(builder, values, k, i)) for i in range(width)]
        for first in range(0, width, access):
            words = _encoded(builder, elements[first : first + access], stored, rounds_pairs)
            builder.store(words, _address(builder, destination, at, first, words.type), align=_bytes(stored) * access)

    return code


@accesses(meaning.round_as)
def _round_as(computed, stored, width, rounds_pairs):
    def code(builder, values, k, *_):
        if LLVM_TYPES[stored] == LLVM_TYPES[computed]:
            return
        places = [_element(builder, values, k, i) for i in range(width)]
        raw = _encoded(builder, list(map(builder.load, places)), stored, rounds_pairs)
        for place, element in zip(places, _decoded(builder, _parts(builder, raw), stored, computed), strict=True):
            builder.store(element, place)

    return code


def _computes(function, code):
    """Decorate nothing: a function of one float32 or float64 is what `code` builds."""

    @type_callable(function)
    def typing(context):
        def typer(value):
            return value if value in (types.float32, types.float64) else None

        return typer

    @lower_builtin(function, types.Float)
    def lower(context, builder, signature, arguments):
        return code(builder, *arguments)


def _inverse(builder, value):
    if value.type == F32:
        return _assembled(builder, "rcp.approx.f32 $0, $1;", F32, value)
    return builder.fdiv(F64(1), value)


def _inverse_root(builder, value):
    if value.type == F32:
        return _assembled(builder, "rsqrt.approx.f32 $0, $1;", F32, value)
    return builder.fdiv(F64(1), _assembled(builder, "sqrt.rn.f64 $0, $1;", F64, value))


def _inverse_power_of_two(builder, value):
    """The exponent, of which that of 1 is the middle, mirrored there; a subnormal result would lose digits."""
    word, digits = (I32, 23) if value.type == F32 else (I64, 52)
    one = (1 << word.width - digits - 2) - 1
    exponent = builder.lshr(builder.bitcast(value, word), word(digits))
    exponent = builder.select(builder.icmp_unsigned("<", exponent, word(1)), word(1), exponent)
    last = word(2 * one - 1)
    exponent = builder.select(builder.icmp_unsigned(">", exponent, last), last, exponent)
    return builder.bitcast(builder.shl(builder.sub(word(2 * one), exponent), word(digits)), value.type)


_computes(meaning.inverse, _inverse)
_computes(meaning.inverse_root, _inverse_root)
_computes(meaning.inverse_power_of_two, _inverse_power_of_two)


def _is_kept_packed(computed, stored):
    """Whether an array of the computed type holds what is fetched as it is in memory: two elements of 16 bits, or one."""
    return computed == types.float32 and stored in (FLOAT16, BFLOAT16)


def _bytes(stored):
    return stored.bitwidth // 8


def _words(stored, count):
    """The type of one access: elements, or of 16-bit ones 32-bit words of two, since LLVM splits vectors of eight."""
    if _bytes(stored) > 2 or count == 1:
        return _vector(LLVM_TYPES[stored], count)
    return _vector(I32, count // 2)


def _vector(element, count):
    return element if count == 1 else ir.VectorType(element, count)


def _address(builder, pointer, at, first, kind):
    address = builder.gep(pointer, [builder.add(at, at.type(first))])
    # in global memory, as every pointer that a kernel is given is
    return builder.addrspacecast(builder.bitcast(address, kind.as_pointer()), kind.as_pointer(1))


def _element(builder, values, k, i):
    return builder.gep(builder.extract_value(values, ARRAY_DATA), [builder.add(k, k.type(i))])


def _parts(builder, raw):
    """What one access reads: elements, or words of two."""
    if not isinstance(raw.type, ir.VectorType):
        return [raw]
    return [builder.extract_element(raw, I32(i)) for i in range(raw.type.count)]


def _decoded(builder, parts, stored, computed):
    """The elements of one access, in the type that a kernel computes in."""
    if stored == BFLOAT16:
        elements = []
        for part in parts:
            word = builder.zext(part, I32) if part.type == I16 else part
            elements.append(builder.shl(word, I32(16)))
            if part.type == I32:
                elements.append(builder.and_(word, I32(0xFFFF0000)))
        elements = [builder.bitcast(element, F32) for element in elements]
    elif stored == FLOAT16:
        elements = []
        for part in parts:
            elements.append(builder.trunc(part, I16) if part.type == I32 else part)
            if part.type == I32:
                elements.append(builder.trunc(builder.lshr(part, I32(16)), I16))
        elements = [builder.fpext(builder.bitcast(element, HALF), F32) for element in elements]
    else:
        elements = parts
    return [_cast(builder, element, LLVM_TYPES[computed]) for element in elements]


def _encoded(builder, elements, stored, rounds_pairs):
    """What one access writes."""
    if stored in (FLOAT16, BFLOAT16):
        elements = [_cast(builder, element, F32) for element in elements]
        if len(elements) == 1:
            return builder.trunc(_packed(builder, elements[0], F32(0), stored, rounds_pairs), I16)
        pairs = zip(elements[::2], elements[1::2], strict=True)
        elements = [_packed(builder, low, high, stored, rounds_pairs) for low, high in pairs]
    else:
        elements = [_cast(builder, element, LLVM_TYPES[stored]) for element in elements]
    if len(elements) == 1:
        return elements[0]
    vector = _vector(elements[0].type, len(elements))(ir.Undefined)
    for i, element in enumerate(elements):
        vector = builder.insert_element(vector, element, I32(i))
    return vector


def _cast(builder, element, wanted):
    if element.type == wanted:
        return element
    return builder.fpext(element, wanted) if wanted == F64 else builder.fptrunc(element, wanted)


def _packed(builder, low, high, stored, rounds_pairs):
    """Two float32 as two elements of 16 bits in a word."""
    if rounds_pairs:
        name = "f16x2" if stored == FLOAT16 else "bf16x2"
        return _assembled(builder, f"cvt.rn.{name}.f32 $0, $2, $1;", I32, low, high)
    if stored == FLOAT16:
        low, high = (builder.zext(builder.bitcast(builder.fptrunc(e, HALF), I16), I32) for e in (low, high))
        return builder.or_(low, builder.shl(high, I32(16)))
    low, high = (_rounded_to_bfloat16(builder, element) for element in (low, high))
    return builder.or_(builder.lshr(low, I32(16)), builder.and_(high, I32(0xFFFF0000)))


def _assembled(builder, instruction, result, *values):
    """One instruction of PTX."""
    registers = {I32: "r", F32: "f", F64: "d"}
    constraints = ",".join(["=" + registers[result], *(registers[value.type] for value in values)])
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(ir.InlineAsm(kind, instruction, constraints), values)


def _rounded_to_bfloat16(builder, element):
    """A float32's bits, of which the upper half is the nearest bfloat16, to even; a NaN stays one."""
    bits = builder.bitcast(element, I32)
    is_odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
    rounded = builder.add(bits, builder.add(is_odd, I32(0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", element, element)
    return builder.select(is_nan, builder.or_(bits, I32(0x400000)), rounded)

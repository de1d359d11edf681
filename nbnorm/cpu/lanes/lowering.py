"""How Numba compiles the operations of `lanes`: each as a few instructions of LLVM's on vectors of sixteen.

No operation carries a fast-math flag, so that LLVM keeps the order that a kernel is written in.
"""

import operator
import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, register_model

from nbnorm.cpu.lanes import control, half, meaning
from nbnorm.cpu.lanes.meaning import COUNT

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
LLVM_TYPES = {types.float32: F32, types.float64: F64, types.uint16: I16, types.int16: I16}
FROM_HALF = {types.uint16: half.from_float16, types.int16: half.from_bfloat16}
TO_HALF = {types.uint16: half.to_float16, types.int16: half.to_bfloat16}
IS_X86 = platform.machine() in ("x86_64", "AMD64")
# the place of the data pointer in Numba's structure of an array: after meminfo, parent, size and itemsize
ARRAY_DATA = 4


class Lanes(types.Type):
    """Numba's type of sixteen float32 or float64."""

    def __init__(self, element):
        self.element = element
        super().__init__(name=f"Lanes({element})")


@register_model(Lanes)
class LanesModel(PrimitiveModel):
    def __init__(self, manager, lanes_type):
        super().__init__(manager, lanes_type, _vector(LLVM_TYPES[lanes_type.element]))


def lowers(function):
    """Decorate a rule: from the types of the arguments to the type of the result, and the code that computes it."""

    def register(rule):
        def result(*argument_types):
            answer = rule(*argument_types)
            return answer and answer[0]

        _types(function, result)

        @lower_builtin(function, types.VarArg(types.Any))
        def lower(context, builder, typed, arguments):
            return rule(*typed.args)[1](builder, *arguments)

        return rule

    return register


def _types(function, result):
    """Tell Numba the type of a call's result, from those of its arguments; None for arguments that are not ours.

    Not by `type_callable`, which looks at signatures in every call, nor after Numba's own rules for an operator, which take
    longer to fail than ours to succeed: without both, a first use takes 0.9 of the time.
    """

    class Template(AbstractTemplate):
        key = function
        # before what is for any target
        metadata = {"target": "cpu"}  # noqa: RUF012

        def generic(self, args, kws):
            result_type = result(*args)
            return result_type and signature(result_type, *args)

    infer_global(function, types.Function(Template))


def _returning_none(code):
    def wrapped(builder, *arguments):
        code(builder, *arguments)
        return I8.as_pointer()(None)

    return wrapped


NOTHING = types.none, _returning_none(lambda builder, *arguments: None)


def _arithmetic(function, instruction):
    # the quotient of two integers is a float
    numbers = FLOATS if function is operator.truediv else (types.int64, *FLOATS)
    # of numbers too, for which Numba would first look at all that NumPy has for arrays
    _types(function, lambda a, *others: a if (isinstance(a, Lanes) or a in numbers) and others == (a,) else None)

    @lower_builtin(function, Lanes, Lanes)
    def lower(context, builder, typed, arguments):
        return getattr(builder, instruction)(*arguments)


FLOATS = types.float32, types.float64
_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")
for _function in (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne):
    _types(_function, lambda a, b: types.boolean if a == b and a in (types.int64, *FLOATS) else None)
# what each branch asks for
_types(bool, lambda value: types.boolean if value in (types.boolean, types.int64) else None)


@lowers(meaning.pointer)
def _(array):
    def code(builder, value):
        return builder.extract_value(value, ARRAY_DATA)

    return types.CPointer(array.dtype), code


@lowers(meaning.standard_mode)
def _(operands):
    def code(builder, operands_):
        bits = control.read(builder)
        with builder.if_then(control.is_other(builder, bits), likely=False):
            control.write(builder, I64(control.STANDARD[control.MACHINE]))
        pinned = operands_
        for i, operand in enumerate(operands):
            if operand != types.none:
                pinned = builder.insert_value(pinned, control.pinned(builder, builder.extract_value(operands_, i)), i)
        return cgutils.pack_struct(builder, [bits, pinned])

    return types.Tuple((types.int64, operands)), code


@lowers(meaning.restore_mode)
def _(thread_mode):
    def code(builder, bits):
        control.finish(builder)
        with builder.if_then(control.is_other(builder, bits), likely=False):
            control.write(builder, bits)

    return types.none, _returning_none(code)


@lowers(meaning.load)
def _(source, k, element):
    if source == types.none:
        return NOTHING
    stored, wanted = source.dtype, element.dtype

    def code(builder, source, k, element):
        vector = _vector(LLVM_TYPES[stored])
        raw = builder.load(_address(builder, source, k, vector), align=_size(stored))
        return _decoded(builder, raw, stored, wanted)

    return Lanes(wanted), code


@lowers(meaning.load_part)
def _(source, k, count, element, rest):
    if source == types.none:
        return NOTHING
    stored, wanted = source.dtype, element.dtype

    def code(builder, source, k, count, element, rest):
        vector = _vector(LLVM_TYPES[stored])
        mask = _first(builder, count)
        arguments = [_address(builder, source, k, vector), I32(_size(stored)), mask, vector(None)]
        raw = _call(builder, f"llvm.masked.load.{_name(vector)}.p0", vector, arguments)
        decoded = _decoded(builder, raw, stored, wanted)
        return builder.select(mask, decoded, _splat(builder, rest, LLVM_TYPES[wanted]))

    return Lanes(wanted), code


@lowers(meaning.keep)
def _(values, count):
    return values, lambda builder, value, count: builder.select(_first(builder, count), value, value.type(None))


@lowers(meaning.load_one)
def _(source, k):
    stored = source.dtype

    def code(builder, source, k):
        raw = _splat(builder, builder.load(builder.gep(source, [k])), LLVM_TYPES[stored])
        if stored == types.uint16:
            # the instruction that loads one float16 keeps the rest of a register, for whose last value it so waits: with it,
            # a backward of rows of 16 or 32 takes 1.4 times as long
            values = _converted(builder, half.from_float16_by_integers(builder, raw), types.float32, types.float64)
        else:
            values = _decoded(builder, raw, stored, types.float64)
        return builder.extract_element(values, I32(0))

    return types.float64, code


@lowers(meaning.store)
def _(destination, k, values):
    def code(builder, destination, k, values):
        raw = _encoded(builder, values, values_type, destination_type)
        builder.store(raw, _address(builder, destination, k, raw.type), align=_size(destination_type))

    destination_type, values_type = destination.dtype, values.element
    return types.none, _returning_none(code)


@lowers(meaning.store_one)
def _(destination, k, value):
    def code(builder, destination, k, value):
        raw = _encoded(builder, _splat(builder, value, F64), types.float64, destination_type)
        builder.store(builder.extract_element(raw, I32(0)), builder.gep(destination, [k]))

    destination_type = destination.dtype
    return types.none, _returning_none(code)


@lowers(meaning.stream)
def _(destination, k, values):
    def code(builder, destination, k, values):
        raw = _encoded(builder, values, values_type, destination_type)
        for start in range(0, COUNT, 16 // _size(destination_type)):
            _stream_piece(builder, raw, start, destination, k, _size(destination_type))

    destination_type, values_type = destination.dtype, values.element
    return types.none, _returning_none(code)


@lowers(meaning.store_part)
def _(destination, k, count, values):
    def code(builder, destination, k, count, values):
        raw = _encoded(builder, values, values_type, destination_type)
        address = _address(builder, destination, k, raw.type)
        arguments = [raw, address, I32(_size(destination_type)), _first(builder, count)]
        _call(builder, f"llvm.masked.store.{_name(raw.type)}.p0", ir.VoidType(), arguments)

    destination_type, values_type = destination.dtype, values.element
    return types.none, _returning_none(code)


@lowers(meaning.stream_part)
def _(destination, k, count, values):
    def code(builder, destination, k, count, values):
        raw = _encoded(builder, values, values_type, destination_type)
        for start in range(0, COUNT - 1, 16 // _size(destination_type)):
            with builder.if_then(builder.icmp_signed("<", I64(start), count)):
                _stream_piece(builder, raw, start, destination, k, _size(destination_type))

    destination_type, values_type = destination.dtype, values.element
    return types.none, _returning_none(code)


@lowers(meaning.until_aligned)
def _(destination, k):
    if destination == types.none:
        return types.int64, lambda builder, destination, k: I64(0)

    def code(builder, destination, k):
        address = builder.ptrtoint(builder.gep(destination, [k]), I64)
        return builder.and_(builder.neg(builder.udiv(address, I64(size))), I64(COUNT - 1))

    size = _size(destination.dtype)
    return types.int64, code


@lowers(meaning.fence)
def _():
    return types.none, _returning_none(lambda builder: builder.fence("seq_cst"))


@lowers(meaning.prefetch)
def _(source, k, ahead):
    if ahead == types.none:
        return NOTHING

    def code(builder, source, k, ahead):
        address = builder.bitcast(builder.gep(source, [builder.add(k, ahead)]), I8.as_pointer())
        # to read, into the second-level cache, as data: in the first, it would take the place of the rows worked on
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), [address, I32(0), I32(2), I32(1)])

    return types.none, _returning_none(code)


@lowers(meaning.fill)
def _(value):
    return Lanes(value), lambda builder, value_: _splat(builder, value_, LLVM_TYPES[value])


@lowers(meaning.widen)
def _(values):
    return Lanes(types.float64), lambda builder, value: _converted(builder, value, values.element, types.float64)


@lowers(meaning.multiply_add)
def _(a, b, c):
    has_factor, has_term = b != types.none, c != types.none

    def code(builder, a, b, c):
        if has_factor and has_term:
            return _call(builder, f"llvm.fmuladd.{_name(a.type)}", a.type, [a, b, c])
        if has_factor:
            return builder.fmul(a, b)
        return builder.fadd(a, c) if has_term else a

    return (a, code) if b in (a, types.none) and c in (a, types.none) else None


@lowers(meaning.total)
def _(values):
    def code(builder, value):
        while value.type.count > 1:
            value = _halves_added(builder, value)
        return builder.extract_element(value, I32(0))

    return values.element, code


@lowers(meaning.scratch)
def _(count, element):
    # Numba asks with the constant's type after it has asked with int64
    if not isinstance(count, types.Literal):
        return None

    def code(builder, count_, element_):
        room = cgutils.alloca_once(builder, LLVM_TYPES[element.dtype], size=I64(count.literal_value))
        # unaligned, sixteen float32 may lie in two lines, by where a process's stack begins: a forward of rows of 16 then
        # takes up to 1.8 times as long
        room.align = 64
        return room

    return types.CPointer(element.dtype), code


@lowers(meaning.store_folded)
def _(destination, k, values):
    def code(builder, destination, k, values):
        folded = _halves_added(builder, values)
        if values_type != destination_type:
            folded = builder.fpext(folded, ir.VectorType(LLVM_TYPES[destination_type], folded.type.count))
        builder.store(folded, _address(builder, destination, k, folded.type), align=_size(destination_type))

    destination_type, values_type = destination.dtype, values.element
    return types.none, _returning_none(code)


@lowers(meaning.totals)
def _(source, k):
    def code(builder, source, k):
        width = COUNT // 2
        row = ir.VectorType(LLVM_TYPES[source_type], width)
        rows = [
            builder.load(_address(builder, source, builder.add(k, I64(width * i)), row), align=_size(source_type))
            for i in range(COUNT)
        ]
        # two vectors become one, with the sums of their halves, until it has one number of each row
        while width > 1:
            width //= 2
            lower = [i for i in range(2 * rows[0].type.count) if i % (2 * width) < width]
            rows = [
                builder.fadd(_shuffle(builder, a, lower, b), _shuffle(builder, a, [i + width for i in lower], b))
                for a, b in zip(rows[::2], rows[1::2], strict=True)
            ]
        return _shuffle(builder, rows[0], range(COUNT), rows[1])

    source_type = source.dtype
    return Lanes(source_type), code


@lowers(meaning.cast)
def _(values, element):
    wanted = element.dtype
    return Lanes(wanted), lambda builder, value, _: _converted(builder, value, values.element, wanted)


@lowers(meaning.root)
def _(values):
    return values, lambda builder, value: _call(builder, f"llvm.sqrt.{_name(value.type)}", value.type, [value])


@lowers(meaning.at_least_zero)
def _(values):
    def code(builder, value):
        zero = value.type(None)
        return builder.select(builder.fcmp_ordered("<", value, zero), zero, value)

    return values, code


@lowers(meaning.all_below)
def _(a, b):
    def code(builder, a, b):
        bits = builder.bitcast(builder.fcmp_ordered("<", a, b), I16)
        return builder.icmp_unsigned("==", bits, I16(-1))

    return types.boolean, code


def _chosen(function, sign):
    @lowers(function)
    def _(a, b):
        a, b = types.unliteral(a), types.unliteral(b)
        if a == b and isinstance(a, types.Float):
            return a, lambda builder, a, b: builder.select(builder.fcmp_ordered(sign, b, a), b, a)

        def code(builder, *values):
            a, b = (value if value.type == I64 else builder.sext(value, I64) for value in values)
            return builder.select(builder.icmp_signed(sign, b, a), b, a)

        return (types.int64, code) if a in types.signed_domain and b in types.signed_domain else None


_chosen(meaning.larger, ">")
_chosen(meaning.smaller, "<")


def _halves_added(builder, value):
    half_ = value.type.count // 2
    return builder.fadd(_shuffle(builder, value, range(half_)), _shuffle(builder, value, range(half_, 2 * half_)))


def _vector(element):
    return ir.VectorType(element, COUNT)


def _name(vector):
    """How intrinsics' names spell a vector: v16f32."""
    return f"v{vector.count}{ {F32: 'f32', F64: 'f64', I16: 'i16'}[vector.element] }"


def _size(dtype):
    return dtype.bitwidth // 8


def _address(builder, pointer, k, vector):
    return builder.bitcast(builder.gep(pointer, [k]), vector.as_pointer())


def _call(builder, name, result, arguments):
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def _shuffle(builder, value, indices, other=None):
    indices = list(indices)
    other = other or value.type(ir.Undefined)
    return builder.shuffle_vector(value, other, ir.VectorType(I32, len(indices))(indices))


def _splat(builder, scalar, element):
    vector = _vector(element)
    return _shuffle(builder, builder.insert_element(vector(ir.Undefined), scalar, I32(0)), [0] * COUNT)


def _first(builder, count):
    """The mask of the lanes below count."""
    numbers = _vector(I32)(list(range(COUNT)))
    return builder.icmp_signed("<", numbers, _splat(builder, builder.trunc(count, I32), I32))


def _stream_piece(builder, raw, start, destination, k, size):
    """Write 16 bytes of what lanes are in memory, past the caches; more, LLVM would cut by way of the stack."""
    piece = _shuffle(builder, raw, range(start, start + 16 // size))
    if IS_X86:
        # LLVM must not see what these are: float16 it would write by way of the caches, and a line that is written in both
        # ways takes twice as long
        piece = builder.asm(ir.FunctionType(piece.type, [piece.type]), "", "=x,0", [piece], side_effect=False)
    store = builder.store(piece, _address(builder, destination, builder.add(k, I64(start)), piece.type), align=16)
    store.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


def _converted(builder, values, from_type, to_type):
    if from_type == to_type:
        return values
    convert = builder.fpext if to_type == types.float64 else builder.fptrunc
    return convert(values, _vector(LLVM_TYPES[to_type]))


def _decoded(builder, raw, stored, wanted):
    """Lanes of the type `wanted` from what is in memory."""
    if stored in FROM_HALF:
        raw, stored = FROM_HALF[stored](builder, raw), types.float32
    return _converted(builder, raw, stored, wanted)


def _encoded(builder, values, values_type, stored):
    """What to write to memory, rounded once."""
    if stored in TO_HALF:
        near = half.to_odd(builder, values) if values_type == types.float64 else values
        return TO_HALF[stored](builder, near)
    return _converted(builder, values, values_type, stored)

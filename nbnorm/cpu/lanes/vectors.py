"""The instructions of LLVM's on vectors of sixteen that operations are made of."""

from llvmlite import ir
from numba import types
from numba.core import cgutils

from nbnorm.cpu.lanes import half, processor
from nbnorm.cpu.lanes.meaning import COUNT

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
LLVM_TYPES = {types.float32: F32, types.float64: F64, types.uint16: I16, types.int16: I16}
FROM_HALF = {types.uint16: half.from_float16, types.int16: half.from_bfloat16}
TO_HALF = {types.uint16: half.to_float16, types.int16: half.to_bfloat16}
HELD_BY_HALF = {types.uint16: half.to_float16, types.int16: half.held_by_bfloat16}


def vector(element):
    return ir.VectorType(element, COUNT)


def size(dtype):
    return dtype.bitwidth // 8


def call(builder, name, result, arguments):
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def name(llvm_type):
    """How intrinsics' names spell a type: v16f32, f64."""
    if isinstance(llvm_type, ir.VectorType):
        return f"v{llvm_type.count}{name(llvm_type.element)}"
    return {F32: "f32", F64: "f64", I16: "i16"}[llvm_type]


def address(builder, pointer, k, llvm_type):
    return builder.bitcast(builder.gep(pointer, [k]), llvm_type.as_pointer())


def shuffle(builder, value, indices, other=None):
    indices = list(indices)
    other = other or value.type(ir.Undefined)
    return builder.shuffle_vector(value, other, ir.VectorType(I32, len(indices))(indices))


def splat(builder, scalar):
    first = builder.insert_element(vector(scalar.type)(ir.Undefined), scalar, I32(0))
    return shuffle(builder, first, [0] * COUNT)


def first(builder, count):
    """The mask of the lanes below count."""
    numbers = vector(I32)(list(range(COUNT)))
    return builder.icmp_signed("<", numbers, splat(builder, builder.trunc(count, I32)))


def halves_added(builder, value):
    half_ = value.type.count // 2
    return builder.fadd(shuffle(builder, value, range(half_)), shuffle(builder, value, range(half_, 2 * half_)))


def stream_piece(builder, raw, start, destination, k, itemsize):
    """Write 16 bytes of what lanes are in memory, past the caches; more, LLVM would cut by way of the stack."""
    piece = shuffle(builder, raw, range(start, start + 16 // itemsize))
    if processor.MACHINE == "x86":
        # LLVM must not see what these are: float16 it would write by way of the caches, and a line that is written in both
        # ways takes twice as long
        piece = builder.asm(ir.FunctionType(piece.type, [piece.type]), "", "=x,0", [piece], side_effect=False)
    store = builder.store(piece, address(builder, destination, builder.add(k, I64(start)), piece.type), align=16)
    store.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


def converted(builder, values, from_type, to_type):
    """Lanes, or a number, of another type."""
    if from_type == to_type:
        return values
    convert = builder.fpext if to_type == types.float64 else builder.fptrunc
    llvm_type = LLVM_TYPES[to_type]
    return convert(values, vector(llvm_type) if isinstance(values.type, ir.VectorType) else llvm_type)


def decoded(builder, raw, stored, wanted):
    """Lanes of the type `wanted` from what is in memory."""
    if stored in FROM_HALF:
        raw, stored = FROM_HALF[stored](builder, raw), types.float32
    return converted(builder, raw, stored, wanted)


def encoded(builder, values, values_type, stored):
    """What to write to memory, rounded once."""
    if stored in TO_HALF:
        near = half.to_odd(builder, values) if values_type == types.float64 else values
        return TO_HALF[stored](builder, near)
    return converted(builder, values, values_type, stored)


def held(builder, values, values_type, stored):
    """As `encoded`, of values that need no rounding."""
    if stored in HELD_BY_HALF:
        return HELD_BY_HALF[stored](builder, converted(builder, values, values_type, types.float32))
    return converted(builder, values, values_type, stored)

"""How Numba compiles what makes pointers of arrays, and of pointers others."""

from numba import types
from numba.core import cgutils

from nbnorm.cpu.lanes import meaning
from nbnorm.cpu.lanes.rules import NOTHING, Added, Column, Holder, Operand, element_of, lowers
from nbnorm.cpu.lanes.vectors import I64, LLVM_TYPES

# the places of the data pointer and the shape in Numba's structure of an array, after meminfo, parent, size and itemsize
ARRAY_DATA, ARRAY_SHAPE = 4, 5


def _array(arrays, i):
    """The type of an array, which may be one of a tuple, and where in the structures of both its data pointer is."""
    return (arrays[i], [i, ARRAY_DATA]) if isinstance(arrays, types.BaseTuple) else (arrays, [ARRAY_DATA])


@lowers(meaning.shape_of)
def shape_of(arrays):
    array, place = _array(arrays, 0)
    return types.UniTuple(types.int64, array.ndim), lambda builder, value: builder.extract_value(
        value, [*place[:-1], ARRAY_SHAPE]
    )


@lowers(meaning.operand)
def operand(arrays, element):
    array, place = _array(arrays, 0)
    return Operand(array.dtype, element.dtype), lambda builder, value, element: builder.extract_value(value, place)


@lowers(meaning.operand_beside)
def operand_beside(arrays, element):
    if not isinstance(arrays, types.BaseTuple):
        return NOTHING
    array, place = _array(arrays, 1)
    return Operand(array.dtype, element.dtype), lambda builder, value, element: builder.extract_value(value, place)


@lowers(meaning.added)
def added(x, residual):
    if residual == types.none:
        return x, lambda builder, x, residual: x
    return Added(x, residual), lambda builder, *parts: cgutils.pack_struct(builder, parts)


@lowers(meaning.pointer)
def pointer(arrays):
    array, place = _array(arrays, 0)
    return types.CPointer(array.dtype), lambda builder, value: builder.extract_value(value, place)


@lowers(meaning.pointer_beside)
def pointer_beside(arrays):
    if not isinstance(arrays, types.BaseTuple):
        return NOTHING
    array, place = _array(arrays, 1)
    return Holder(array.dtype), lambda builder, value: builder.extract_value(value, place)


@lowers(meaning.holder)
def holder(pointer):
    return Holder(pointer.dtype), lambda builder, pointer: pointer


@lowers(meaning.reread)
def reread(place, source):
    return Operand(place.dtype, element_of(source)), lambda builder, place, source: place


@lowers(meaning.behind)
def behind(source, k):
    if source == types.none:
        return NOTHING
    return source, lambda builder, source, k: builder.gep(source, [k])


@lowers(meaning.column)
def column(source, at, pitch):
    if source == types.none:
        return NOTHING
    if isinstance(source, Added):
        (x, of_x), (residual, of_residual) = column(source.x, at, pitch), column(source.residual, at, pitch)

        def code_of_both(builder, source, at, pitch):
            parts = of_x(builder, builder.extract_value(source, 0), at, pitch), builder.extract_value(source, 1)
            return cgutils.pack_struct(builder, [parts[0], of_residual(builder, parts[1], at, pitch)])

        return Added(x, residual), code_of_both

    def code(builder, source, at, pitch):
        return cgutils.pack_struct(builder, [builder.gep(source, [at]), pitch])

    return Column(source), code


@lowers(meaning.scratch)
def scratch(count, element):
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

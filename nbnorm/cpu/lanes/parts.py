"""How fewer than sixteen elements are read and written: under a mask, or where a processor has none, 16 bytes at a time."""

from llvmlite import ir
from numba.core import cgutils

from nbnorm.cpu.lanes import processor
from nbnorm.cpu.lanes.meaning import COUNT
from nbnorm.cpu.lanes.vectors import F32, F64, I8, I16, I32, I64, address, call, first, name, shuffle, vector

SIZES = {I16: 2, F32: 4, F64: 8}
REGISTER = ir.VectorType(I8, 16)
# make of a register the bytes whose places an index has, and 0 where that is 128
TAKES: dict[str | None, str] = {"x86": "llvm.x86.ssse3.pshuf.b.128", "arm": "llvm.aarch64.neon.tbl1.v16i8"}


def load_first(builder, source, k, count, element):
    """The `count` < 16 elements from k on, in the first lanes; the others are anything."""
    if _is_masked(element):
        sixteen = vector(element)
        arguments = [address(builder, source, k, sixteen), I32(SIZES[element]), first(builder, count), sixteen(None)]
        return call(builder, f"llvm.masked.load.{name(sixteen)}.p0", sixteen, arguments)
    ways = []
    has_room = builder.icmp_signed(">=", builder.add(k, count), I64(16 // SIZES[element]))
    with builder.if_else(has_room) as (holds, otherwise):
        with holds:
            ways.append((_moved(builder, source, k, count, element), builder.block))
        with otherwise:
            # so near the first element of an array that 16 bytes would begin before it
            ways.append((_copied(builder, source, k, count, element), builder.block))
    raw = builder.phi(vector(element))
    for way in ways:
        raw.add_incoming(*way)
    return raw


def store_first(builder, values, destination, k, count):
    """Write the first `count` < 16 lanes to the elements from k on."""
    element = values.type.element
    if _is_masked(element):
        arguments = [values, address(builder, destination, k, values.type), I32(SIZES[element]), first(builder, count)]
        call(builder, f"llvm.masked.store.{name(values.type)}.p0", ir.VoidType(), arguments)
        return
    room = _room(builder, element)
    builder.store(values, address(builder, room, I64(0), values.type))
    _copy(builder, room, builder.gep(destination, [k]), count, COUNT // 2)


def _is_masked(element):
    return processor.has_masks(SIZES[element]) or not processor.moves_bytes()


def _moved(builder, source, k, count, element):
    """By registers of 16 bytes, of which the last ends with the last element, and then has its bytes moved.

    A load of what two stores wrote would wait for these: bfloat16 rows of 47 take 1.7 times as long so, forward.
    """
    width = 16 // SIZES[element]
    places = cgutils.global_constant(builder, "nbnorm_places", ir.Constant(ir.ArrayType(I8, 32), [*range(16), *[128] * 16]))
    last = builder.sub(count, I64(width))
    registers = []
    for i in range(0, COUNT, width):
        start = _smaller(builder, I64(i), last)
        by = _smaller(builder, builder.sub(I64(i), start), I64(width))
        raw = builder.load(address(builder, source, builder.add(k, start), REGISTER), align=1)
        place = builder.gep(places, [I64(0), builder.mul(by, I64(SIZES[element]))])
        indices = builder.load(builder.bitcast(place, REGISTER.as_pointer()), align=1)
        moved = call(builder, TAKES[processor.MACHINE], REGISTER, [raw, indices])
        registers.append(builder.bitcast(moved, ir.VectorType(element, width)))
    while len(registers) > 1:
        pairs = zip(registers[::2], registers[1::2], strict=True)
        registers = [shuffle(builder, a, range(2 * a.type.count), b) for a, b in pairs]
    return registers[0]


def _copied(builder, source, k, count, element):
    room = _room(builder, element)
    _copy(builder, builder.gep(source, [k]), room, count, COUNT // 2)
    return builder.load(address(builder, room, I64(0), vector(element)))


def _copy(builder, source, destination, count, width):
    """Copy `count` < 2 * width elements: twice as many as the largest power of two in it, which may overlap."""
    with builder.if_else(builder.icmp_signed(">=", count, I64(width))) as (holds, otherwise):
        with holds:
            element = source.type.pointee
            piece = ir.VectorType(element, width)
            for at in (I64(0), builder.sub(count, I64(width))):
                value = builder.load(address(builder, source, at, piece), align=SIZES[element])
                builder.store(value, address(builder, destination, at, piece), align=SIZES[element])
        with otherwise:
            if width > 1:
                _copy(builder, source, destination, count, width // 2)


def _room(builder, element):
    room = cgutils.alloca_once(builder, element, size=I64(COUNT))
    room.align = 64
    return room


def _smaller(builder, a, b):
    return builder.select(builder.icmp_signed("<", a, b), a, b)

"""The floating-point control register of a thread, which says how it rounds and whether subnormal numbers are 0 to it.

It is MXCSR on x86-64 and FPCR on aarch64. Elsewhere none is touched, and MACHINE is None.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils

from nbnorm.cpu.lanes import meaning
from nbnorm.cpu.lanes.processor import MACHINE
from nbnorm.cpu.lanes.rules import lowers, returning_none
from nbnorm.cpu.lanes.vectors import I8, I32, I64, call

VOID = ir.VoidType()
# to nearest even, with subnormal numbers, no exception trapped: what a process begins with
STANDARD = {"x86": 0x1F80, "arm": 0, None: 0}
# the others say which exceptions there have been
CONTROL_BITS = {"x86": 0xFFC0, "arm": 0xFFFFFFFF, None: 0}


@lowers(meaning.standard_mode)
def standard_mode(operands):
    def code(builder, values):
        bits = _read(builder)
        with builder.if_then(_is_other(builder, bits), likely=False):
            _write(builder, I64(STANDARD[MACHINE]))
        result = values
        for i, operand in enumerate(operands):
            if operand != types.none:
                result = builder.insert_value(result, _pinned(builder, builder.extract_value(values, i)), i)
        return cgutils.pack_struct(builder, [bits, result])

    return types.Tuple((types.int64, operands)), code


@lowers(meaning.restore_mode)
def restore_mode(thread_mode):
    def code(builder, bits):
        _finish(builder)
        with builder.if_then(_is_other(builder, bits), likely=False):
            _write(builder, bits)

    return types.none, returning_none(code)


def _read(builder):
    """All bits, as an int64."""
    if MACHINE == "x86":
        room = cgutils.alloca_once(builder, I32)
        call(builder, "llvm.x86.sse.stmxcsr", VOID, [builder.bitcast(room, I8.as_pointer())])
        return builder.zext(builder.load(room), I64)
    return call(builder, "llvm.aarch64.get.fpcr", I64, []) if MACHINE else I64(0)


def _write(builder, bits):
    if MACHINE == "x86":
        room = cgutils.alloca_once(builder, I32)
        builder.store(builder.trunc(bits, I32), room)
        call(builder, "llvm.x86.sse.ldmxcsr", VOID, [builder.bitcast(room, I8.as_pointer())])
    elif MACHINE:
        call(builder, "llvm.aarch64.set.fpcr", VOID, [bits])


def _is_other(builder, bits):
    """Whether these set another mode than the standard one, which is then to be written: in 15 ns, reading takes 1."""
    return builder.icmp_unsigned("!=", builder.and_(bits, I64(CONTROL_BITS[MACHINE])), I64(STANDARD[MACHINE]))


def _pinned(builder, value):
    """The value, which LLVM knows only from here on: it models no modes, and computes before a mode is set what it can."""
    if MACHINE is None or (isinstance(value.type, ir.IntType) and value.type.width != 64):
        return value
    if isinstance(value.type, ir.LiteralStructType | ir.ArrayType):
        # a tuple, whose parts may be of one type
        for i in range(len(value.type)):
            value = builder.insert_value(value, _pinned(builder, builder.extract_value(value, i)), i)
        return value
    if isinstance(value.type, ir.DoubleType):
        return builder.bitcast(_pinned(builder, builder.bitcast(value, I64)), value.type)
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", "=r,0", [value], side_effect=True)


def _finish(builder):
    """Have all that is stored stored, before a mode is restored."""
    builder.asm(ir.FunctionType(VOID, []), "", "~{memory}", [], side_effect=True)

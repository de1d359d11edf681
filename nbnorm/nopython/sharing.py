"""How Numba's threads come to work on a call in compiled code without Python being asked, by the rules of `cpu.workers`.

Python decides, and opens the way while nothing speaks against it. Compiled code looks whether it is open, calls the parallel
build of the kernel, and takes the time: of a call that may have stalled it tells Python, which may close the way.
"""

import ctypes
import time
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.workers import parallel
from nbnorm.nopython.instructions import I32, I64, KERNELS, give_up, word_of

# to mypy, what this makes takes the typing context too
intrinsic: Any = extending.intrinsic
# words of a table: from KERNELS on the addresses of serial builds, then of parallel ones; that of `parallel.native`; of the
# system's clock; of a function of Python's
BUILDS = 4
SHARED = KERNELS + BUILDS
NATIVE, CLOCK, WATCH, WORDS = range(SHARED + BUILDS, SHARED + BUILDS + 4)
# what `time.perf_counter` reads, where there is one: else Python makes such calls
CLOCK_ID = getattr(time, "CLOCK_MONOTONIC", None)
TIMESPEC = ir.ArrayType(I64, 2)
# of `parallel.native`
IS_OPEN, WORKED = range(2)
LONG = parallel.STALL_SECONDS


def clock_address():
    """Of the system's function, 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value if CLOCK_ID is not None else 0
    except (AttributeError, OSError, TypeError):
        return 0


@intrinsic
def word(typing_context, table, index):
    def codegen(context, builder, signature, args):
        return word_of(builder, args[0], args[1])

    return types.int64(table, index), codegen


@intrinsic
def now(typing_context, clock):
    """In seconds."""

    def codegen(context, builder, signature, args):
        result = cgutils.alloca_once(builder, TIMESPEC)
        kind = ir.FunctionType(I32, [I32, TIMESPEC.as_pointer()])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [I32(CLOCK_ID), result])
        double = ir.DoubleType()
        seconds, nanoseconds = (builder.sitofp(builder.extract_value(builder.load(result), i), double) for i in range(2))
        return builder.fadd(seconds, builder.fmul(nanoseconds, double(1e-9)))

    return types.float64(clock), codegen


@intrinsic
def add_worked(typing_context, native, seconds):
    def codegen(context, builder, signature, args):
        place = builder.gep(builder.inttoptr(args[0], ir.DoubleType().as_pointer()), [I64(WORKED)])
        builder.store(builder.fadd(builder.load(place), args[1]), place)
        return context.get_dummy_value()

    return types.void(native, seconds), codegen


@intrinsic
def tell(typing_context, watch, place, seconds, rows, cols):
    """Call a function of Python's, whose address this is."""

    def codegen(context, builder, signature, args):
        python = context.get_python_api(builder)
        lock = python.gil_ensure()
        objects = [python.from_native_value(*parts) for parts in zip(signature.args[1:], args[1:], strict=True)]
        told = python.call_function_objargs(builder.inttoptr(args[0], python.pyobj), objects)
        for operand in objects:
            python.decref(operand)
        with cgutils.if_unlikely(builder, cgutils.is_null(builder, told)):
            give_up(context, builder, python, lock, RuntimeError, "nbnorm: interrupted")
        python.decref(told)
        python.gil_release(lock)
        return context.get_dummy_value()

    return types.void(watch, types.int64, types.float64, types.int64, types.int64), codegen


@inlined
def begin(table, place):
    """The time at which a call begins, where it is shared."""
    return now(word(table, CLOCK)) if place >= SHARED else 0.0


@inlined
def end(table, place, begun, rows, cols):
    if place >= SHARED:
        seconds = now(word(table, CLOCK)) - begun
        if seconds > LONG:
            tell(word(table, WATCH), place, seconds, rows, cols)
        else:
            add_worked(word(table, NATIVE), seconds)


@inlined
def is_open(table):
    return word(word(table, NATIVE), IS_OPEN) != 0

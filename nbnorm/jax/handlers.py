"""What XLA calls: handlers of its foreign function interface, which call an entry of `nopython.entries` for a call's frame.

XLA calls them from threads of its own, without Python's lock. They are compiled, and kept on disk, as kernels are; so all
that differs between processes is in words that they are given: see `targets`. What an entry does not take goes to Python.

Frames and buffers are structs of XLA's `ffi/api/c_api.h`, read here as words of 8 bytes.
"""

import functools
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

from nbnorm.cpu import compiled
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.disk.sources import digest
from nbnorm.nopython import entries, sharing
from nbnorm.nopython.instructions import ENTRY, I64

# called without the context that they are declared with
intrinsic: Any = extending.intrinsic
word: Any = sharing.word

# of a frame: its size, what asks for more than a call, the API, the stage, the pointers to operands, results and attributes
FRAME_SIZE, EXTENSION, API, STAGE, ARGS, RETS, ATTRS = 0, 1, 2, 4, 9, 14, 20
FRAME_BYTES = 21 * 8
# of an extension, and of the metadata that one of type 1 asks for
EXTENSION_TYPE, NEXT, METADATA, METADATA_VERSION = 1, 2, 3, 3
# of the API, before its functions: the version, as two int32, and the function that makes errors
API_VERSION, ERROR_CREATE = 4, 6
# of a buffer, and of an attribute
DTYPE, DATA, RANK, DIMS, VALUE = 2, 3, 4, 5, 1
IS_METADATA, EXECUTE = 1, 3
# attributes, in the order of their names
EPS, KERNELS, VARIANCE = range(3)
# XLA's numbers of the dtypes
F16, F32, F64, BF16 = 10, 11, 12, 16
# of the words: the API's version; from how many elements on Python makes a call, its function, and how many calls may be in
# it; what says that Python has ended; the tables
VERSION, MANY, PYTHON, INSIDE, ENDED, TABLES = range(6)
# the address of what a call does not have, such as a residual
ABSENT = 0


@functools.cache
def address(name):
    """The address of a handler, as a function of C, compiled now or loaded."""
    entry = entries.Entry(f"jax.{name}", (), digest(__file__) + digest(compiled.__file__))
    function = compiled.compiled(entry, types.int64(types.int64), False, MADE[name], is_called_from_c=True)
    (made,) = function.overloads.values()
    return made.library.get_pointer_to_function(made.fndesc.llvm_cfunc_wrapper_name)


def _forward():
    return _handler(entries.FACTORIES["forward"][1], rows_of_forward, operands_of_forward)


def _backward():
    return _handler(entries.FACTORIES["backward"][1], rows_of_backward, operands_of_backward)


def _handler(signature, rows_of, operands_of):
    """A handler that calls entries of a signature: for how many rows, columns and samples, and for what of each sample."""
    call = _calling(signature)

    def handler(frame):
        words = words_for(frame)
        if words == 0:
            return 0
        args, rets, attrs = word(frame, ARGS), word(frame, RETS), word(frame, ATTRS)
        rows, cols, samples = rows_of(args, rets)
        table, eps = word(words, TABLES + word(value_of(attrs, KERNELS), 0)), number(value_of(attrs, EPS))
        # before MANY is read, which changes when Python ends
        add(words, INSIDE, 1)
        sample = 0
        if table != 0 and is_known(frame, words) and rows * cols < word(words, MANY):
            add(words, INSIDE, -1)
            while sample < samples and call(
                word(table, ENTRY), (table, rows, cols), operands_of(args, rets, eps, sample)
            ):  # fmt: skip
                sample += 1
            add(words, INSIDE, 1)
        result = 0 if sample == samples else pythons(words, frame)
        add(words, INSIDE, -1)
        return result

    return handler


MADE = {"forward": _forward, "backward": _backward}


@inlined
def rows_of_forward(args, rets):
    """How many rows, columns and samples there are; samples that are rows of one call are one."""
    x, weight, bias, y = word(args, 0), word(args, 1), word(args, 2), word(rets, 0)
    rows, cols, samples = size_of(y, -2), size_of(y, -1), samples_of(y, 2)
    if samples_of(x, 2) == samples and samples_of(weight, 1) == samples_of(bias, 1) == 1:
        rows, samples = rows * samples, 1
    return rows, cols, samples


@inlined
def operands_of_forward(args, rets, eps, sample):
    x, weight, bias = word(args, 0), word(args, 1), word(args, 2)
    y, mean, rstd = word(rets, 0), word(rets, 1), word(rets, 2)
    return (
        part(x, 2, sample, y, 2), ABSENT, part(weight, 1, sample, y, 2), part(bias, 1, sample, y, 2), eps, False,
        part(y, 2, sample, y, 2), ABSENT, part(mean, 1, sample, y, 2), part(rstd, 1, sample, y, 2),
    )  # fmt: skip


@inlined
def rows_of_backward(args, rets):
    dy, x, weight, rstd = word(args, 0), word(args, 1), word(args, 2), word(args, 4)
    dx, dweight, dbias = word(rets, 0), word(rets, 1), word(rets, 2)
    rows, cols, samples = size_of(x, -2), size_of(x, -1), samples_of(dx, 2)
    are_alike = samples_of(dy, 2) == samples_of(x, 2) == samples_of(rstd, 1) == samples and samples_of(weight, 1) == 1
    if are_alike and size_of(dweight, -1) == size_of(dbias, -1) == 0:
        rows, samples = rows * samples, 1
    return rows, cols, samples


@inlined
def operands_of_backward(args, rets, eps, sample):
    dy, x, weight, mean, rstd = word(args, 0), word(args, 1), word(args, 2), word(args, 3), word(args, 4)
    dx, dweight, dbias = word(rets, 0), word(rets, 1), word(rets, 2)
    return (
        part(dy, 2, sample, dx, 2), ABSENT, part(x, 2, sample, dx, 2), part(weight, 1, sample, dx, 2), eps, False,
        part(mean, 1, sample, dx, 2), part(rstd, 1, sample, dx, 2), part(dx, 2, sample, dx, 2),
        part(dweight, 1, sample, dx, 2), part(dbias, 1, sample, dx, 2),
    )  # fmt: skip


@inlined
def words_for(frame):
    """The words, for a call; 0 where there is none to make. An odd address is not a frame's, but brings the words."""
    slot = words_slot()
    if frame & 1 != 0:
        set_word(slot, 0, frame - 1)
        return 0
    words, extension = word(slot, 0), word(frame, EXTENSION)
    is_asked = False
    while extension != 0:
        if word(extension, EXTENSION_TYPE) & 0xFFFFFFFF == IS_METADATA:
            set_word(word(extension, METADATA), METADATA_VERSION, word(words, VERSION))
            is_asked = True
        extension = word(extension, NEXT)
    return 0 if is_asked or word(frame, STAGE) & 0xFFFFFFFF != EXECUTE else words


@inlined
def is_known(frame, words):
    """Whether the frame is of an API that is read as the one which was registered for."""
    version = word(word(frame, API), API_VERSION)
    return word(frame, FRAME_SIZE) >= FRAME_BYTES and version & 0xFFFFFFFF == word(words, VERSION) & 0xFFFFFFFF


@inlined
def pythons(words, frame):
    """What Python answers, or its end."""
    if word(words, ENDED) != 0:
        return asked(word(word(frame, API), ERROR_CREATE), word(words, ENDED))
    return asked(word(words, PYTHON), frame)


@inlined
def value_of(attributes, index):
    return word(word(attributes, index), VALUE)


@inlined
def size_of(buffer, dimension):
    return word(word(buffer, DIMS), word(buffer, RANK) + dimension)


@inlined
def samples_of(buffer, ndim):
    """How many arrays of so many dimensions a buffer has: vmap puts dimensions in front, of 1 where all are the same."""
    result = 1
    for i in range(word(buffer, RANK) - ndim):
        result *= word(word(buffer, DIMS), i)
    return result


@inlined
def part(buffer, ndim, sample, of_all, of_all_ndim):
    """The address of a sample's array, of so many dimensions, in a buffer; 0 where it is absent, of no elements.

    Samples are counted as in the buffer `of_all`, which has every dimension that vmap has put in front.
    """
    dims, dtype = word(buffer, DIMS), word(buffer, DTYPE) & 0xFFFFFFFF
    before = word(buffer, RANK) - ndim
    step = 8 if dtype == F64 else 4 if dtype == F32 else 2
    for i in range(before, before + ndim):
        step *= word(dims, i)
    if step == 0:
        return 0
    result = word(buffer, DATA)
    for i in range(before - 1, -1, -1):
        size = word(word(of_all, DIMS), i)
        if word(dims, i) == size:
            result += sample % size * step
            step *= size
        sample //= size
    return result


@intrinsic
def words_slot(typing_context):
    """The address of where the handler keeps that of its words."""

    def codegen(context, builder, signature, args):
        name = "nbnorm_words"
        slot = builder.module.globals.get(name)
        if slot is None:
            slot = cgutils.add_global_variable(builder.module, I64, name)
            slot.linkage, slot.initializer = "internal", I64(0)
        return builder.ptrtoint(slot, I64)

    return types.int64(), codegen


@intrinsic
def set_word(typing_context, address, index, value):
    def codegen(context, builder, signature, args):
        builder.store(args[2], builder.gep(builder.inttoptr(args[0], I64.as_pointer()), [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def add(typing_context, address, index, value):
    """Add to a word, in one step for all threads."""

    def codegen(context, builder, signature, args):
        builder.atomic_rmw("add", builder.gep(builder.inttoptr(args[0], I64.as_pointer()), [args[1]]), args[2], "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def number(typing_context, address):
    """The float64 that lies there."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.inttoptr(args[0], ir.DoubleType().as_pointer()))

    return types.float64(address), codegen


@intrinsic
def asked(typing_context, function, frame):
    """What a function of C answers about the frame."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(I64, [I64])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])

    return types.int64(function, frame), codegen


def _calling(signature):
    """An instruction that calls the entry at an address, and says whether it has done what was asked for."""

    @intrinsic
    def call(typing_context, entry, problem, operands):
        def codegen(context, builder, of_call, args):
            kind = context.call_conv.get_function_type(signature.return_type, signature.args)
            function = builder.inttoptr(args[0], kind.as_pointer())
            parts = [part for operand in args[1:] for part in cgutils.unpack_tuple(builder, operand)]
            kinds = [kind for operand in of_call.args[1:] for kind in operand.types]
            given = zip(parts, kinds, signature.args, strict=True)
            values = [context.cast(builder, *parts) for parts in given]
            status, result = context.call_conv.call_function(
                builder, function, signature.return_type, signature.args, values
            )
            # such as no memory, which Python's call will say
            return builder.and_(result, builder.not_(status.is_error))

        return types.boolean(entry, problem, operands), codegen

    return call

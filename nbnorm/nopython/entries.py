"""What a table's compiled function is: it calls a kernel where the call is plain, and leaves any other to Python.

Such an entry is compiled with this package, and kept on disk as its kernels are. So all that is known of kernels, which one
takes what, how it is called and what it wants prepared, is known here, and not in functions of users.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from nbnorm.cpu import choice, compiled, sizes
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.disk.sources import digest
from nbnorm.nopython import sharing
from nbnorm.nopython.instructions import I32, I64, KERNELS, call_address, holds_lock

# from so many elements on, several threads work on a call. Python has to be asked first, which costs some 10 us
MANY_ELEMENTS = 1 << 17
# from so many on, Python makes it, whose results are written past the caches
MOST_ELEMENTS = sizes.STREAMED_BYTES // 8


class Entry(NamedTuple):
    """A factory of this file, by its name, and its arguments: what the cache on disk knows an entry by."""

    name: str
    choices: tuple
    sources: str

    def __str__(self):
        return f"nopython.{self.name}({', '.join(map(str, self.choices))})"


def ready(name, *choices):
    """The address of an entry for kernels of these choices, compiled now or loaded."""
    return address(_ready(name, *choices))


def function(name, *choices):
    """The same as a function for Python, of numbers."""
    return compiled.entry_of(_ready(name, *choices))


def of(kernel):
    """The name and the choices of the entry that calls a kernel of `cpu.choice`."""
    if kernel.name == "forward":
        x_dtype, dtype, _, _, _, *added = kernel.choices
        return "forward", x_dtype, dtype, *(added or (None, False))
    *dtypes, _, _, mask = kernel.choices[:8]
    return "backward", *dtypes, *(kernel.choices[8:] or (None,)), sum(mask[1:])


def is_kept(name, *choices):
    """Whether the code of an entry is on disk."""
    return compiled.is_kept(Entry(name, choices, digest(__file__)), FACTORIES[name][1], False)


@functools.cache
def _ready(name, *choices):
    factory, signature = FACTORIES[name]
    entry = Entry(name, choices, digest(__file__))
    return compiled.compiled(entry, signature, False, functools.partial(factory, *choices))


def address(function):
    """Where the code of what `compiled` has made lies."""
    (made,) = function.overloads.values()
    return made.library.get_pointer_to_function(made.fndesc.llvm_func_name)


def kernel_at(is_short, use_diff_of_squares):
    """Where a table has the address of a kernel."""
    return KERNELS + 2 * use_diff_of_squares + is_short


def _forward(x_dtype, dtype, residual_dtype, with_total):
    is_added = residual_dtype is not None
    size, dtype_size, residual_size = x_dtype.itemsize, dtype.itemsize, residual_dtype.itemsize if is_added else 1
    signature = choice.SIGNATURES["forward"](x_dtype, dtype, True, True, "centred", residual_dtype, with_total)
    call = _calling(signature)
    (rows_at, residual_at), (y_at, total_at) = (_each_array_at(signature.args[i]) for i in (0, 5))
    row_at, statistics_at = (_array_at(signature.args[i]) for i in (1, 6))

    def entry(table, rows, cols, x, residual, weight, bias, eps, use_diff_of_squares, y, total, mean, rstd):
        kernel, place = kernel_in(table, rows, cols, size, use_diff_of_squares)
        if kernel == 0 or (x | y | total | mean | rstd) % size != 0:
            return False
        if residual % residual_size != 0 or (weight | bias) % dtype_size != 0:
            return False
        y_bytes, row_bytes, residual_bytes = rows * cols * size, cols * dtype_size, rows * cols * residual_size
        for result in (y, total):
            result_bytes = given(result, y_bytes)
            if result != x and overlaps(result, result_bytes, x, y_bytes):
                return False
            if (result != residual or size != residual_size) and overlaps(result, result_bytes, residual, residual_bytes):
                return False
            if overlaps(result, result_bytes, weight, row_bytes) or overlaps(result, result_bytes, bias, row_bytes):
                return False
        if overlaps(y, y_bytes, total, given(total, y_bytes)):
            return False
        x_rows, y_rows = rows_at(x, (rows, cols)), y_at(y, (rows, cols))
        operands = (
            (x_rows, residual_at(residual, (rows, cols))) if is_added else x_rows,
            row_at(weight, (given(weight, cols),)), row_at(bias, (given(bias, cols),)), eps, False,
            (y_rows, total_at(total, (rows, cols))) if with_total else y_rows,
            statistics_at(mean, (given(mean, rows),)), statistics_at(rstd, (given(rstd, rows),)),
        )  # fmt: skip
        begun = sharing.begin(table, place)
        call(kernel, operands)
        sharing.end(table, place, begun, rows, cols)
        return True

    return entry


def _backward(dy_dtype, x_dtype, dtype, statistics_dtype, sum_dtype, dtotal_dtype, sums):
    is_added = dtotal_dtype is not None
    dy_size, size, dtype_size = dy_dtype.itemsize, x_dtype.itemsize, dtype.itemsize
    statistics_size, sum_size, dtotal_size = (
        statistics_dtype.itemsize,
        sum_dtype.itemsize,
        (dtotal_dtype or x_dtype).itemsize,
    )
    signature = choice.SIGNATURES["backward"](
        dy_dtype, x_dtype, dtype, statistics_dtype, sum_dtype, True, "given", (True,) * 3, dtotal_dtype
    )
    call = _calling(signature)
    dy_at, dtotal_at = _each_array_at(signature.args[0])
    x_at, row_at, statistics_at, dx_at, sum_at = (_array_at(signature.args[i]) for i in (1, 2, 4, 10, 12))

    def entry(table, rows, cols, dy, dtotal, x, weight, eps, use_diff_of_squares, mean, rstd, dx, dweight, dbias):
        kernel, place = kernel_in(table, rows, cols, size, use_diff_of_squares)
        if kernel == 0 or dy % dy_size != 0 or (x | dx) % size != 0 or weight % dtype_size != 0:
            return False
        if dtotal % dtotal_size != 0 or (mean | rstd) % statistics_size != 0 or (dweight | dbias) % sum_size != 0:
            return False
        dx_bytes, sum_bytes = given(dx, rows * cols * size), cols * sum_size
        if (dx != x and overlaps(dx, dx_bytes, x, dx_bytes)) or overlaps(dx, dx_bytes, weight, cols * dtype_size):
            return False
        if (dx != dy or size != dy_size) and overlaps(dx, dx_bytes, dy, rows * cols * dy_size):
            return False
        if (dx != dtotal or size != dtotal_size) and overlaps(dx, dx_bytes, dtotal, rows * cols * dtotal_size):
            return False
        if overlaps(dx, dx_bytes, mean, rows * statistics_size) or overlaps(dx, dx_bytes, rstd, rows * statistics_size):
            return False
        if overlaps(dx, dx_bytes, dweight, sum_bytes) or overlaps(dx, dx_bytes, dbias, sum_bytes):
            return False
        if dweight != 0 and overlaps(dweight, sum_bytes, dbias, sum_bytes):
            return False
        block_rows = rows_of_block(rows, cols)
        room = np.empty((sums, -(-rows // block_rows), cols))
        dy_rows = dy_at(dy, (rows, cols))
        operands = (
            (dy_rows, dtotal_at(dtotal, (rows, cols))) if is_added else dy_rows, x_at(x, (rows, cols)),
            row_at(weight, (given(weight, cols),)), eps, statistics_at(mean, (given(mean, rows),)),
            statistics_at(rstd, (given(rstd, rows),)), 0, block_rows, True, False,
            dx_at(dx, (given(dx, rows), cols)), room, sum_at(dweight, (given(dweight, cols),)),
            sum_at(dbias, (given(dbias, cols),)),
        )  # fmt: skip
        begun = sharing.begin(table, place)
        call(kernel, operands)
        sharing.end(table, place, begun, rows, cols)
        return True

    return entry


INTEGERS = [types.int64] * 9
FACTORIES: dict[str, Any] = {
    # table, rows, cols, x, residual, weight, bias, eps, use_diff_of_squares, y, total, mean, rstd
    "forward": (_forward, types.boolean(*INTEGERS[:7], types.float64, types.boolean, *INTEGERS[:4])),
    # table, rows, cols, dy, dtotal, x, weight, eps, use_diff_of_squares, mean, rstd, dx, dweight, dbias
    "backward": (_backward, types.boolean(*INTEGERS[:7], types.float64, types.boolean, *INTEGERS[:5])),
}

place_of_kernel = inlined(kernel_at)
is_short = inlined(sizes.is_short)
rows_of_block = inlined(sizes.block_rows)


@inlined
def kernel_in(table, rows, cols, itemsize, use_diff_of_squares):
    """The address of the kernel for a call, and its place; 0 where it is not loaded, or the call is for Python to make."""
    elements = rows * cols
    if not 0 < elements < MOST_ELEMENTS or cols > sizes.LONG_ROW:
        return 0, KERNELS
    place = place_of_kernel(is_short(cols, itemsize), use_diff_of_squares)
    # in no loop of `prange`, nor in a function that is compiled with nogil=True
    if elements >= MANY_ELEMENTS and is_locked():  # type: ignore[call-arg]
        if not sharing.is_open(table):
            return 0, place
        place += sharing.BUILDS
    return sharing.word(table, place), place


@inlined
def given(array, size):
    """The size of an array that may be absent: its address is 0 then."""
    return size if array != 0 else 0


@inlined
def overlaps(a, a_bytes, b, b_bytes):
    return a < b + b_bytes and b < a + a_bytes


@intrinsic
def is_locked(typing_context):
    def codegen(context, builder, signature, args):
        return builder.icmp_signed("!=", holds_lock(builder), I32(0))

    return types.boolean(), codegen


def _each_array_at(kind):
    """`_array_at` of rows and of what is beside them, in its place the former where there are no others."""
    rows, *beside = map(_array_at, getattr(kind, "types", (kind,)))
    return rows, beside[0] if beside else rows


def _array_at(kind):
    """An instruction that makes an array, of a type, of what lies at an address."""

    @intrinsic
    def array_at(typing_context, data, shape):
        def codegen(context, builder, signature, args):
            array = context.make_array(kind)(context, builder)
            shape = cgutils.unpack_tuple(builder, args[1])
            itemsize = I64(context.get_abi_sizeof(context.get_data_type(kind.dtype)))
            strides = [itemsize]
            for size in reversed(shape[1:]):
                strides.insert(0, builder.mul(strides[0], size))
            data = builder.inttoptr(args[0], array.data.type)
            populate_array(array, data=data, shape=shape, strides=strides, itemsize=itemsize, meminfo=None)
            return array._getvalue()

        return kind(data, shape), codegen

    return array_at


def _calling(signature):
    """An instruction that calls the kernel at an address."""

    @intrinsic
    def call(typing_context, kernel, operands):
        def codegen(context, builder, types_of_call, args):
            values = cgutils.unpack_tuple(builder, args[1], len(signature.args))
            given = zip(values, types_of_call.args[1].types, signature.args, strict=True)
            call_address(context, builder, args[0], signature, [context.cast(builder, *parts) for parts in given])
            return context.get_dummy_value()

        return types.void(kernel, operands), codegen

    return call

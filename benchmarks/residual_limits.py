"""What no norm of a sum can beat: a parallel loop that moves its bytes, and writes them past the caches where nbnorm does.

A loop over numbers, as in `limits`, has no such stores. This one is written in the lanes of nbnorm's kernels.
"""

import functools

import numpy as np
from numba import njit, prange

from nbnorm.cpu import sizes
from nbnorm.cpu.kernels.normalise import put, put_part
from nbnorm.cpu.lanes import lowering  # noqa: F401  teaches Numba the operations on lanes
from nbnorm.cpu.lanes.meaning import (
    added,
    fence,
    load,
    load_part,
    operand,
    operand_beside,
    pointer,
    pointer_beside,
    shape_of,
    smaller,
)
from nbnorm.cpu.staging import storage
from nbnorm.cpu.workers import parallel


def forward(x, residual, total, y):
    """Reads x and residual, writes total and y."""
    x, residual, total, y = map(moved, (x, residual, total, y))
    sums(np.float32)(x, residual, (total, y), is_streamed(total, y))


def backward(dy, dtotal, total, dx):
    """Reads dy, dtotal and total, writes dx."""
    dy, dtotal, total, dx = map(moved, (dy, dtotal, total, dx))
    sums(np.float32)((dy, total), dtotal, dx, is_streamed(dx))


def add(x, residual, total):
    """No limit, but the first of two steps: the sum, rounded to the dtype of the arrays; `total` may be x."""
    if total.size < parallel.ELEMENTS:
        # as one would without this kernel, whose threads cost more than they save there
        np.add(x, residual, out=total)
        return
    element = np.float64 if total.dtype == np.float64 else np.float32
    streaming = is_streamed(total) and total is not x
    x, residual, total = (array.reshape(-1).view(storage(array.dtype)) for array in (x, residual, total))
    sums(element)(x, residual, total, streaming)


def moved(array):
    """As float32, since 16-bit numbers would be converted. What two of them are together is no number to use, but normal."""
    flat = array.reshape(-1)
    return flat[: flat.size // 2 * 2].view(np.float32)


def is_streamed(*results):
    """As nbnorm decides it."""
    return all(
        array.nbytes >= sizes.STREAMED_BYTES and array.ctypes.data % 16 == array.nbytes % 16 == 0 for array in results
    )


@functools.cache
def sums(element):
    """The kernel for numbers that are read as this type; its first operand may be a tuple of two, and so may its result."""

    @njit(parallel=True)
    def kernel(first, second, results, streaming):
        (size,) = shape_of(results)
        read = added(added(operand(first, element), operand(second, element)), operand_beside(first, element))
        result, other = pointer(results), pointer_beside(results)
        for task in prange(-(-size // sizes.STREAMED_TASK_ELEMENTS)):
            begin = task * sizes.STREAMED_TASK_ELEMENTS
            end = smaller(begin + sizes.STREAMED_TASK_ELEMENTS, size)
            for k in range(begin, end - 15, 16):
                values = load(read, k)
                put(result, k, values, streaming)
                put(other, k, values, streaming)
            count = end & 15
            if count:
                values = load_part(read, end - count, count, 0.0)
                put_part(result, end - count, count, values, streaming)
                put_part(other, end - count, count, values, streaming)
            if streaming:
                fence()

    return kernel

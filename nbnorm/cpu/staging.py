"""Arrays of any layout and dtype as blocks of contiguous rows, which is what the kernels take.

Where an array already is contiguous rows of a dtype that kernels read, one block is a view of all of it. Otherwise blocks of
a few rows are copied through a buffer, so that the temporary memory does not grow with the number of rows.
"""

import itertools
import math

import numpy as np

from nbnorm.calls.arrays import convert

# elements of a buffer: 512 KiB of float32. A channels-first call at (16, 96, 56, 56) takes, in ms, one thread and two: 13.2
# and 9.9 with 2^15, 10.8 and 7.1 with 2^16, 11.0 and 6.6 with 2^17, 12.6 and 8.0 with 2^18
BUFFER_ELEMENTS = 1 << 17
# what the kernels take for dtypes that Numba does not have on the CPU
STORAGE = {"float16": np.dtype(np.uint16), "bfloat16": np.dtype(np.int16)}


def storage(dtype):
    """The dtype in which a kernel takes rows of `dtype`, of the same size but for integers and booleans, as float64."""
    if dtype.kind in "biu":
        return np.dtype(np.float64)
    if dtype.itemsize == 2:
        return STORAGE[dtype.name]
    return dtype if dtype.isnative else dtype.newbyteorder("=")


def is_ready(array):
    """Whether a kernel can use the array as it is: a native float, C-contiguous, aligned."""
    return array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative and array.dtype.kind not in "biu"


def order_of_blocks(outs, inputs):
    """How blocks of rows must follow each other for results to overwrite nothing that is still to be read; None for absent.

    0: in any order, since it overlaps no input in another way than element for element. 1 or -1: forwards or backwards,
    each block read before it is written. None: there is no such order.
    """
    pairs = itertools.product(_present(outs), _present(inputs))
    orders = {_order(out, array) for out, array in pairs if np.may_share_memory(out, array)} - {0}
    return None if len(orders) > 1 else orders.pop() if orders else 0


def _present(arrays):
    return [array for array in arrays if array is not None]


def _order(out, array):
    if out.shape != array.shape or out.strides != array.strides or out.dtype != array.dtype:
        return None
    distance = out.ctypes.data - array.ctypes.data
    if distance == 0:
        return 0
    span = array.itemsize
    for stride, size in zip(reversed(array.strides), reversed(array.shape), strict=True):
        if size > 1 and stride < span:
            # what follows in the rows' order does not follow in memory
            return None
        span += stride * (size - 1)
    return -1 if distance > 0 else 1


def row_blocks(batch, limit, order=0, span=None):
    """Split the rows of a batch shape, or those of a slice of them, into blocks of at most `limit`; backwards for order -1.

    Yields (index, rows): `array[index]` is a view, for any strides, of the rows `rows` of the flattened batch.

    >>> list(row_blocks((2, 3), limit=2))  # doctest: +NORMALIZE_WHITESPACE
    [((0, slice(0, 2, None)), slice(0, 2, None)), ((0, slice(2, 3, None)), slice(2, 3, None)),
     ((1, slice(0, 2, None)), slice(3, 5, None)), ((1, slice(2, 3, None)), slice(5, 6, None))]
    >>> list(row_blocks((2, 3), limit=9, span=slice(2, 6)))
    [((0, slice(2, 3, None)), slice(2, 3, None)), ((slice(1, 2, None),), slice(3, 6, None))]
    """
    count = math.prod(batch)
    at, stop = (0, count) if span is None else (span.start, span.stop)
    if (at, stop) == (0, count) and count <= limit:
        yield (), slice(0, count)
        return
    if order == -1:
        yield from reversed(list(row_blocks(batch, limit, 0, span)))
        return
    inner = math.prod(batch[1:])
    while at < stop:
        i, inside = divmod(at, inner)
        entries = min(limit, stop - at) // inner
        if entries and not inside:
            end = at + entries * inner
            yield (slice(i, i + entries),), slice(at, end)
        else:
            begin, end = i * inner, min((i + 1) * inner, stop)
            for index, rows in row_blocks(batch[1:], limit, 0, slice(inside, end - begin)):
                yield (i, *index), slice(begin + rows.start, begin + rows.stop)
        at = end


def block_limit(problem, order, *arrays):
    """Rows a block: all where no array needs a buffer, else as many as a buffer holds."""
    if order in (0, None) and all(map(is_ready, _present(arrays))):
        return problem.rows
    return min(problem.rows, max(1, BUFFER_ELEMENTS // problem.cols))


def buffer_for(array, problem, limit, order=0):
    """A buffer for blocks of `limit` rows of the array, or None where its blocks are views, or there is no array."""
    return (
        None
        if array is None or (is_ready(array) and order in (0, None))
        else np.empty((limit, problem.cols), storage(array.dtype))
    )


def beside(rows, others):
    """What a kernel takes rows as that have others beside them, or None."""
    return rows if others is None else (rows, others)


def rows_of(block, buffer, cols):
    """The rows that a kernel reads or writes for a block: a view of it, or as many rows of the buffer."""
    if buffer is not None:
        return buffer[: block.size // cols]
    rows = block if block.ndim == 2 and block.shape[1] == cols else block.reshape(-1, cols)
    return rows.view(storage(rows.dtype)) if rows.itemsize == 2 else rows


def load(block, buffer, cols):
    """The rows of a block, filled with its values."""
    rows = rows_of(block, buffer, cols)
    if buffer is not None:
        convert(block, _values(rows, block))
    return rows


def store(rows, block, buffer):
    """Copy what a kernel wrote into `rows_of(block, buffer, cols)` back into the block."""
    if buffer is not None:
        convert(_values(rows, block), block)


def _values(rows, block):
    """A buffer's rows as an array of the block's shape and, but for integers, dtype."""
    values = rows if block.dtype.kind in "biu" else rows.view(block.dtype.newbyteorder("="))
    return values.reshape(block.shape)

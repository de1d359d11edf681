"""Arrays of any layout and dtype as blocks of contiguous rows, which is what the kernels take.

Where an array already is contiguous rows of the kernel's dtype, one block is a view of all of it. Otherwise blocks of a
few rows are copied through a buffer, so that the temporary memory does not grow with the number of rows.
"""

import math

import numpy as np

from nbnorm.arrays import convert
from nbnorm.problem import row_dtype

# elements of a buffer: 1 MiB of float32
BUFFER_ELEMENTS = 1 << 18


def is_ready(array, dtype):
    """Whether a kernel can use the array as it is: native dtype, C-contiguous, aligned."""
    return array.dtype == dtype and array.flags.c_contiguous and array.flags.aligned


def row_blocks(batch, limit):
    """Split the rows of a batch shape into blocks of at most `limit` rows, in order.

    Yields (index, rows): `array[index]` is a view, for any strides, of the rows `rows` of the flattened batch.

    >>> list(row_blocks((2, 3), limit=2))  # doctest: +NORMALIZE_WHITESPACE
    [((0, slice(0, 2, None)), slice(0, 2, None)), ((0, slice(2, 3, None)), slice(2, 3, None)),
     ((1, slice(0, 2, None)), slice(3, 5, None)), ((1, slice(2, 3, None)), slice(5, 6, None))]
    """
    count = math.prod(batch)
    if count <= limit:
        yield (), slice(0, count)
        return
    inner = math.prod(batch[1:])
    step = max(1, limit // inner)
    for i in range(0, batch[0], step):
        if inner <= limit:
            stop = min(i + step, batch[0])
            yield (slice(i, stop),), slice(i * inner, stop * inner)
        else:
            for index, rows in row_blocks(batch[1:], limit):
                yield (i, *index), slice(i * inner + rows.start, i * inner + rows.stop)


def block_limit(problem, *arrays):
    """Rows a block: all where no array needs a buffer, else as many as a buffer holds."""
    if all(array is None or is_ready(array, row_dtype(array.dtype)) for array in arrays):
        return problem.rows
    return min(problem.rows, max(1, BUFFER_ELEMENTS // problem.cols))


def buffer_for(array, problem, limit):
    """A buffer for blocks of `limit` rows of the array, or None where its blocks are views."""
    dtype = row_dtype(array.dtype)
    return None if is_ready(array, dtype) else np.empty((limit, problem.cols), dtype)


def rows_of(block, buffer, cols):
    """The rows that a kernel reads or writes for a block: a view of it, or as many rows of the buffer."""
    return block.reshape(-1, cols) if buffer is None else buffer[: block.size // cols]


def load(block, buffer, cols):
    """The rows of a block, filled with its values."""
    rows = rows_of(block, buffer, cols)
    if buffer is not None:
        convert(block, rows.reshape(block.shape))
    return rows


def store(rows, block, buffer):
    """Copy what a kernel wrote into `rows_of(block, buffer, cols)` back into the block."""
    if buffer is not None:
        convert(rows.reshape(block.shape), block)

"""Arrays that a file keeps in chunks, each of which is read, and unpacked, once."""

import math
from typing import Any

import numpy as np

from nbnorm.cpu.staging import row_blocks

# of rows that are kept until the last of them was taken. Where they are more, their chunks are read again for each block: of
# chunks of 12 MB that took 2.2 times the CPU time in HDF5, with gzip, and 1.8 times in zarr, with zstd
KEPT_BYTES = 1 << 27


def rows_of_a_chunk(array, batch):
    """The fewest rows of the batch, one behind the other, that whole chunks have, or 1 where there are no chunks."""
    sizes = (array.chunks or ())[: len(batch)]
    axis = next((axis for axis, size in enumerate(sizes) if size > 1), None)
    # behind the first axis in which a chunk has several entries, all of them
    return 1 if axis is None else max(1, min(sizes[axis], batch[axis]) * math.prod(batch[axis + 1 :]))


def reader(array, batch, limit):
    """A function that reads the blocks of `row_blocks(batch, limit)`, in their order, each by its index and its rows."""
    unit = rows_of_a_chunk(array, batch)
    row = array.shape[len(batch) :]
    if limit % unit == 0 or unit * math.prod(row) * array.dtype.itemsize > KEPT_BYTES:
        return lambda index, _: array.read(index)
    wholes = row_blocks(batch, max(1, limit // unit) * unit)
    kept: Any = None
    kept_rows = slice(0, 0)

    def read(index, rows):
        nonlocal kept, kept_rows
        block = np.empty((rows.stop - rows.start, *row), array.dtype)
        start = rows.start
        while start < rows.stop:
            if start == kept_rows.stop:
                # before the next is read, not after
                kept = None
                index_of_kept, kept_rows = next(wholes)
                kept = array.read(index_of_kept).reshape(-1, *row)
            stop = min(rows.stop, kept_rows.stop)
            block[start - rows.start : stop - rows.start] = kept[start - kept_rows.start : stop - kept_rows.start]
            start = stop
        sizes = [1 if isinstance(i, int) else i.stop - i.start for i in index]
        return block.reshape(*sizes, *array.shape[len(index) :])

    return read

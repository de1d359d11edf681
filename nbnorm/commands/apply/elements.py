"""The elements of an array that lie in a file as they would in memory, read in blocks.

Read, not memory-mapped: where the file shrinks or its disk fails, mapped memory kills the process, and it counts as the
process's own.
"""

import itertools
import math
import os
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from nbnorm.commands.apply import files

# what is between neighbours in a Fortran-ordered block is read too, up to this: a disk gives whole pages, and from memory
# a read of its own takes as long as copying 12 KB more
GAP_BYTES = 1 << 12
BUFFER_BYTES = 1 << 24


class Elements(NamedTuple):
    """Where they are: in an open file of this path, from `offset` on."""

    path: Any
    file: Any
    identity: tuple[int, ...]
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool = False


def block(array, bounds):
    """A copy of what is within the bounds, in C order."""
    block = np.empty([stop - start for start, stop in bounds], array.dtype)
    with files.system_errors(array.path):
        if array.fortran_order:
            _read_fortran(block, array, bounds)
        else:
            first = sum(start * math.prod(array.shape[axis + 1 :]) for axis, (start, _) in enumerate(bounds))
            _fill(block.reshape(-1).view(np.uint8), array, first * block.itemsize)
    files.unchanged(array.path, array.identity)
    return block


def _read_fortran(block, array, bounds):
    """Fill the block with the elements within the bounds, which are all over the file."""
    if block.size == 0:
        return
    strides = [block.itemsize * math.prod(array.shape[:axis]) for axis in range(block.ndim)]
    for piece in _pieces(bounds, strides, block.itemsize):
        within = [slice(start - first, stop - first) for (start, stop), (first, _) in zip(piece, bounds, strict=True)]
        block[tuple(within)] = _piece(array, piece, strides)


def _pieces(bounds, strides, itemsize):
    """Bounds (start, stop) that together cover the given ones, each for a piece that the buffer has room for."""
    axes, span = _run(bounds, strides, itemsize)
    sizes = [stop - start for start, stop in bounds]
    if math.prod(sizes[axes:]) * span <= BUFFER_BYTES or max(sizes) == 1:
        yield bounds
        return
    axis = max(axis for axis, size in enumerate(sizes) if size > 1)
    start, stop = bounds[axis]
    middle = (start + stop) // 2
    for half in ((start, middle), (middle, stop)):
        yield from _pieces([*bounds[:axis], half, *bounds[axis + 1 :]], strides, itemsize)


def _run(bounds, strides, itemsize):
    """How many of the first axes lie near enough in the file to be read at once, and how many bytes that takes."""
    span = itemsize
    for axis, ((start, stop), stride) in enumerate(zip(bounds, strides, strict=True)):
        if stop - start > 1 and stride > span + GAP_BYTES:
            return axis, span
        span += stride * (stop - start - 1)
    return len(bounds), span


def _piece(array, bounds, strides):
    """The elements within the bounds, as a view of a buffer with what lies between them in the file."""
    axes, span = _run(bounds, strides, array.dtype.itemsize)
    sizes = [stop - start for start, stop in bounds]
    places = [range(start * stride, stop * stride, stride) for (start, stop), stride in zip(bounds, strides, strict=True)]
    first = sum(place.start for place in places[:axes])
    buffer = np.empty((math.prod(sizes[axes:]), span), np.uint8)
    for run, others in zip(buffer, itertools.product(*places[axes:]), strict=True):
        _fill(run, array, first + sum(others))
    buffer_strides = [*strides[:axes], *(span * math.prod(sizes[axis + 1 :]) for axis in range(axes, len(sizes)))]
    return np.ndarray(sizes, array.dtype, buffer, strides=buffer_strides)


def _fill(target, array, place):
    """Read as many bytes as the target has from this place in the array on."""
    array.file.seek(array.offset + place)
    # one call to the system gives two gigabytes at most
    while target.size:
        count = array.file.readinto(target)
        if count == 0:
            raise files.changed(array.path)
        target = target[count:]


@contextmanager
def writer(path, begin):
    """A function that writes the next block to an open file, behind what `begin` has written to it."""
    with path.open("r+b") as file:
        begin(file)
        yield lambda _, block: file.write(block.reshape(-1).view(np.uint8))
        file.flush()
        # a full disk or a lost network drive may show only here
        os.fsync(file.fileno())

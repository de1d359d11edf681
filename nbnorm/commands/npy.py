"""The array in a .npy file, read in blocks.

Read, not memory-mapped: where the file shrinks or its disk fails, mapped memory kills the process, and it counts as the
process's own.
"""

import itertools
import math
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nbnorm.commands import files

# what is between neighbours in a Fortran-ordered block is read too, up to this: a disk gives whole pages, and from memory
# a read of its own takes as long as copying 12 KB more
GAP_BYTES = 1 << 12
BUFFER_BYTES = 1 << 24


class Npy(NamedTuple):
    """An open .npy file, and what its header says."""

    path: Any
    file: Any
    identity: tuple[int, ...]
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool

    def stand_in(self):
        """An array of the same shape and dtype, which takes no memory and has no values."""
        return np.broadcast_to(np.empty((), self.dtype), self.shape)


@contextmanager
def opened(path):
    """The array in the file at the path; None for no path."""
    if path is None:
        yield None
        return
    files.source(path)
    # not buffered, as what is read at once is large or far from the rest
    with Path(path).open("rb", buffering=0) as file:
        identity = _identity(os.fstat(file.fileno()))
        with named(path):
            header = files.npy_header(path, file)
        yield Npy(path, file, identity, *header)


@contextmanager
def named(path):
    """Errors say which file they are about: those of the system in reading or writing an open one do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def read(array, index=()):
    """A copy of a block of the array, in C order: all of it, or at one of the indices of `staging.row_blocks`."""
    bounds = [(i, i + 1) if isinstance(i, int) else (i.start, i.stop) for i in index]
    bounds += [(0, size) for size in array.shape[len(index) :]]
    block = np.empty([stop - start for start, stop in bounds], array.dtype)
    with named(array.path):
        if array.fortran_order:
            _read_fortran(block, array, bounds)
        else:
            first = sum(start * math.prod(array.shape[axis + 1 :]) for axis, (start, _) in enumerate(bounds))
            _fill(block.reshape(-1).view(np.uint8), array, first * block.itemsize)
    files.unchanged(array.path, _identity(Path(array.path).stat()) == array.identity)
    return block


def _identity(status):
    """What changes where another file takes the name, or this one is written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


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
        files.unchanged(array.path, count > 0)
        target = target[count:]

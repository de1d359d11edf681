"""Memory for large results, kept for the next one when nothing refers to it any more.

The system gives fresh memory page by page, zeroed, which takes longer than layer norm: 7.3 ms of a call at (4096, 4096)
against 3.2 with `out=`. malloc keeps what is freed, but only up to 32 MiB.
"""

import math

import numpy as np

SMALLEST = 1 << 24
# results begin with a cache line: rows of whole lines, written past the caches, are then written a line at a time
LINE_BYTES = 64
# what is kept at most, all together: two float32 arrays of (4096, 4096), a result and a gradient
KEPT_BYTES = 1 << 27

_kept: dict[int, list[np.ndarray]] = {}


class Block:
    """The owner of an array's memory, which outlives every view of it."""

    def __init__(self, memory):
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self):
        _keep(self.memory)


def empty(shape, dtype):
    """An array whose elements are not set, like `numpy.empty`'s."""
    size = math.prod(shape) * dtype.itemsize
    if not SMALLEST <= size <= KEPT_BYTES:
        return _fresh(shape, dtype)
    try:
        memory = _kept[size].pop()
    except (KeyError, IndexError):
        # NumPy's begins 16 bytes behind the beginning of a line
        memory = _fresh(size + LINE_BYTES, np.uint8)
        start = -memory.ctypes.data % LINE_BYTES
        memory = memory[start : start + size]
    return np.asarray(Block(memory)).view(dtype).reshape(shape)


def _fresh(shape, dtype):
    """Memory from the system, for which what is kept gives way."""
    try:
        return np.empty(shape, dtype)
    except MemoryError:
        _kept.clear()
        return np.empty(shape, dtype)


def _keep(memory):
    _kept.setdefault(memory.nbytes, []).append(memory)
    # the sizes that were kept first go first
    for size in list(_kept):
        if sum(kept_size * len(blocks) for kept_size, blocks in list(_kept.items())) <= KEPT_BYTES:
            break
        _kept.pop(size, None)

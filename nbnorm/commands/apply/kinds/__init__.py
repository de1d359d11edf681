"""The kinds of files that arrays are in: how each is read and written, and what may be wrong with one."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Input(NamedTuple):
    """An array in an open file.

    `block` copies what is within bounds (start, stop) of each axis, in C order; a file that can be read only from its
    beginning to its end gives blocks in that order. `identity` is what changes where the file does, `chunks` the shape of
    what it keeps in one piece, if it does.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    block: Callable
    identity: tuple[int, ...]
    fortran_order: bool = False
    chunks: tuple[int, ...] | None = None
    # the file has no name for its elements
    taken_as_bfloat16: bool = False

    def stand_in(self):
        """An array of the same shape and dtype, which takes no memory and has no values."""
        return np.broadcast_to(np.empty((), self.dtype), self.shape)

    def read(self, index=()):
        """A block of the array: all of it, or at one of the indices of `staging.row_blocks`."""
        bounds = [(i, i + 1) if isinstance(i, int) else (i.start, i.stop) for i in index]
        return self.block(bounds + [(0, size) for size in self.shape[len(index) :]])

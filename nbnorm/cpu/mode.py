"""The floating-point mode of the kernels for what NumPy computes beside them."""

import functools
from contextlib import contextmanager

from numba import types

from nbnorm.cpu.compiled import compiled

SMALLEST_NORMAL, VANISHING = 2.0**-1022, 2.0**-60


@contextmanager
def standard():
    """A context in which the calling thread rounds to nearest even, and takes subnormal numbers as they are."""
    if is_standard():
        yield
        return
    begin, end = _functions()
    thread_mode = begin()
    try:
        yield
    finally:
        end(thread_mode)


def is_standard():
    """Whether it does so anyway. Python's arithmetic shows it, in 0.1 us."""
    return SMALLEST_NORMAL / 2 > 0 and 1 + VANISHING == 1 == 1 - VANISHING


# compiled where a thread has another mode
@functools.cache
def _functions():
    begin = compiled("mode.begin", types.int64(), False, _made_begin)
    end = compiled("mode.end", types.void(types.int64), False, _made_end)
    return begin, end


def _made_begin():
    from nbnorm.cpu.lanes import lowering  # noqa: F401  teaches Numba to set a mode
    from nbnorm.cpu.lanes.meaning import standard_mode

    def begin():
        thread_mode, _ = standard_mode((0,))
        return thread_mode

    return begin


def _made_end():
    from nbnorm.cpu.lanes import lowering  # noqa: F401
    from nbnorm.cpu.lanes.meaning import restore_mode

    def end(thread_mode):
        restore_mode(thread_mode)

    return end

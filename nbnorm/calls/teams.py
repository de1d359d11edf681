"""Checks of what a device function is made for: a row, and the threads that hold it. The errors are as in `checks`."""

from contextlib import suppress

import numpy as np

from nbnorm.calls import checks
from nbnorm.calls.shown import described, shown

WARP = 32
MOST_THREADS = 1024
DTYPES = ("float32", "float64")


def team(cols, threads, width, dtype):
    """These as ints, and the dtype's name."""
    checks.numba_cuda_is_there("nbnorm.cuda.device")
    if checks.in_simulator():
        raise TypeError(f"nbnorm.cuda.device: {checks.cuda_fault()}")
    cols, threads, width = (_count(*given) for given in (("cols", cols), ("threads", threads), ("width", width)))
    is_part, is_warps = threads <= WARP and WARP % threads == 0, threads <= MOST_THREADS and threads % WARP == 0
    if not (is_part or is_warps):
        raise ValueError(
            f"threads: {threads}; expected a whole warp, 32, or a part of one, 1, 2, 4, 8 or 16; or a block of several, a "
            f"multiple of 32, at most {MOST_THREADS}"
        )
    if cols % width != 0:
        raise ValueError(f"width: {width}; expected a divisor of cols, {cols}")
    return cols, threads, width, _name(dtype)


def _name(dtype):
    """Also of one of Numba's types."""
    name = str(dtype)
    if name not in DTYPES and dtype is not None:
        with suppress(TypeError):
            name = np.dtype(dtype).name
    if name not in DTYPES:
        raise TypeError(f"dtype: {shown(dtype)}; expected {' or '.join(DTYPES)}: convert others where they are loaded")
    return name


def _count(name, value):
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name}: {described(value)}; expected an int")
    if value < 1:
        raise ValueError(f"{name}: {shown(value)}; expected a number from 1 on")
    return int(value)

"""The norms of Dask arrays: graphs of calls on chunks, which are made without computing anything.

A chunk that has whole rows is a call of its own (`whole`), with the bits of the whole array's. Rows in several chunks have
their statistics found by parts (`parts`).
"""

import dask.array as da
import numpy as np

from nbnorm.calls import arrays, axes, checks, chunked
from nbnorm.dask import parts, whole


def forward(call):
    """As `run.forward`, of a call whose x is a Dask array."""
    call, first = _with_axes_last(call, "x", ("x", "residual"))
    problem, given = chunked.forward(call._replace(axis=None))
    results = _graphs(problem, given.x).forward(problem, given, call)
    return tuple(_moved_back(result, problem, first) for result in results)


def backward(call):
    """As `run.backward`, the same way."""
    x_name = "total" if call.is_added else "x"
    call, first = _with_axes_last(call, x_name, ("x", "dy", "dtotal", "mean", "rstd"))
    problem, given = chunked.backward(call._replace(axis=None))
    dx, *sums = _graphs(problem, given.x).backward(problem, given, call)
    return _moved_back(dx, problem, first), *sums


def _with_axes_last(call, x_name, names):
    """The call with its axes at the end of these arrays, from the first of which on they were; None where they are last.

    Chunks are moved as views. One that has whole rows has its axes moved back before it is worked on.
    """
    if call.axis is None:
        return call, None
    normalized_shape, x = checks.shape(call.normalized_shape, checks.ORDER), call.x
    first, count = axes.first_of(call.axis, normalized_shape, x_name, x), len(normalized_shape)
    if first + count == x.ndim:
        return call._replace(axis=None), None
    axis = tuple(range(first, first + count))

    def moved(array):
        if getattr(array, "ndim", None) != x.ndim:
            # what is wrong the checks say
            return array
        move = da.moveaxis if arrays.is_dask(array) else np.moveaxis
        return move(array, axis, range(-count, 0))

    return call._replace(axis=axis, **{name: moved(getattr(call, name)) for name in names}), first


def _moved_back(result, problem, first):
    if result is None or first is None:
        return result
    count = len(problem.normalized_shape)
    return da.moveaxis(result, range(-count, 0), range(first, first + count))


def _graphs(problem, x):
    return whole if all(count == 1 for count in x.numblocks[len(problem.batch) :]) else parts

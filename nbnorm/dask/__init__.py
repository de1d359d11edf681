"""The norms of Dask arrays: graphs of calls on chunks, which are made without computing anything.

A chunk that has whole rows is a call of its own (`whole`), with the bits of the whole array's. Rows in several chunks have
their statistics found by parts (`parts`).
"""

import dask.array as da
import numpy as np

from nbnorm.calls import arrays, chunked
from nbnorm.dask import parts, whole


def forward(call):
    """As `run.forward`, of a call whose x is a Dask array."""
    problem, given = chunked.forward(call)
    problem, given, axis = _with_axes_last(problem, given, ("x", "residual"))
    results = _graphs(problem, given.x).forward(problem, given, call._replace(axis=axis))
    return tuple(_moved_back(result, axis) for result in results)


def backward(call):
    """As `run.backward`, the same way."""
    problem, given = chunked.backward(call)
    problem, given, axis = _with_axes_last(problem, given, ("x", "dy", "dtotal", "mean", "rstd"))
    dx, *sums = _graphs(problem, given.x).backward(problem, given, call._replace(axis=axis))
    return _moved_back(dx, axis), *sums


def _with_axes_last(problem, given, names):
    """These with the axes at the end of arrays of these names, and which they were; None where they are last.

    Chunks are moved as views. One that has whole rows has its axes moved back before it is worked on.
    """
    if not problem.behind:
        return problem, given, None
    first, count = len(problem.batch), len(problem.normalized_shape)
    axis = tuple(range(first, first + count))

    def moved(array):
        move = da.moveaxis if arrays.is_dask(array) else np.moveaxis
        return None if array is None else move(array, axis, range(-count, 0))

    given = given._replace(**{name: moved(getattr(given, name)) for name in names})
    return problem.at_end, given, axis


def _moved_back(result, axis):
    return result if result is None or axis is None else da.moveaxis(result, range(-len(axis), 0), axis)


def _graphs(problem, x):
    return whole if all(count == 1 for count in x.numblocks[len(problem.batch) :]) else parts

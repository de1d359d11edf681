"""The norms of Dask arrays: graphs of calls on chunks, which are made without computing anything.

A chunk that has whole rows is a call of its own (`whole`), with the bits of the whole array's. Rows in several chunks have
their statistics found by parts (`parts`).
"""

from nbnorm.calls import chunked
from nbnorm.dask import parts, whole


def forward(call):
    """As `run.forward`, of a call whose x is a Dask array."""
    problem, given = chunked.forward(call)
    return _graphs(problem, given.x).forward(problem, given, call)


def backward(call):
    """As `run.backward`, the same way."""
    problem, given = chunked.backward(call)
    return _graphs(problem, given.x).backward(problem, given, call)


def _graphs(problem, x):
    return whole if all(count == 1 for count in x.numblocks[len(problem.batch) :]) else parts

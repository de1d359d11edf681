"""Graphs of calls whose rows each lie in one chunk: a call on each chunk, of one thread."""

from functools import partial

import numpy as np

from nbnorm import cpu
from nbnorm.calls import checks
from nbnorm.cpu import mode
from nbnorm.cpu.workers import parallel
from nbnorm.dask.graphs import chunked_like, entry, name_of, of_chunks, statistics_chunks, summed
from nbnorm.functional import run


def forward(problem, given, call):
    """Returns y, total, mean and rstd, None for what is not asked for."""
    x, ndim = given.x, len(problem.batch)
    operands = [
        x,
        chunked_like(given.residual, x.chunks),
        *(chunked_like(array, x.chunks[ndim:]) for array in (given.weight, given.bias)),
    ]
    options = call._replace(
        x=None, residual=None, weight=None, bias=None, out=None, normalized_shape=problem.normalized_shape, eps=problem.eps
    )
    results = of_chunks(partial(_forward, options), name_of(call), operands, problem.dtype)
    if not given.with_total and not call.return_stats:
        return results, None, None, None
    total = entry(results, 1, problem.dtype) if given.with_total else None
    mean = rstd = None
    if call.return_stats:
        row = tuple(range(ndim, x.ndim))
        mean = None if call.is_rms else entry(results, 2, problem.statistics_dtype, row)
        rstd = entry(results, 3, problem.statistics_dtype, row)
    return entry(results, 0, problem.dtype), total, mean, rstd


def backward(problem, given, call):
    """Returns dx, dweight and dbias, the same way."""
    x, ndim = given.x, len(problem.batch)
    batched = [chunked_like(array, x.chunks) for array in (given.dy, given.dtotal)]
    statistics = [chunked_like(array, statistics_chunks(x, ndim)) for array in (given.mean, given.rstd)]
    options = call._replace(
        x=None, dy=None, dtotal=None, weight=None, mean=None, rstd=None, out=None,
        normalized_shape=problem.normalized_shape, eps=problem.eps,
        output_mask=given.output_mask[: 2 if call.is_rms else 3],
    )  # fmt: skip
    operands = [x, *batched, *statistics, chunked_like(given.weight, x.chunks[ndim:])]
    results = of_chunks(partial(_backward, options), name_of(call), operands, problem.dtype)
    with_dx, *with_sums = given.output_mask
    dx = entry(results, 0, problem.dtype) if with_dx else None
    return dx, *(
        summed(results, i, ndim, problem.weight_dtype) if is_wanted else None for i, is_wanted in enumerate(with_sums, 1)
    )


def _forward(options, x, residual, weight, bias):
    """Of a chunk: y, or a tuple of all results where another is asked for."""
    x, residual = (_moved_back(array, options.axis) for array in (x, residual))
    with parallel.alone():
        results = run.forward(options._replace(x=x, residual=residual, weight=weight, bias=bias), {}, None)
    results = tuple(_with_axes_last(result, options.axis) for result in results)
    return results if options.return_stats or options.total_out is not False else results[0]


def _backward(options, x, dy, dtotal, mean, rstd, weight):
    """Of a chunk: dx, and the float64 sums over its rows, with the dimensions of x."""
    x, dy, dtotal, mean, rstd = (_moved_back(array, options.axis) for array in (x, dy, dtotal, mean, rstd))
    call = options._replace(x=x, dy=dy, dtotal=dtotal, mean=mean, rstd=rstd, weight=weight)
    with parallel.alone(), mode.standard(), np.errstate(all="ignore"):
        problem, given = checks.backward(call)
        dx, *sums = cpu.backward_of_part(problem, given)
    ones = (1,) * (len(problem.batch) + len(problem.behind))
    dx = _with_axes_last(dx, options.axis)
    return dx, *(None if part is None else part.reshape(ones + part.shape) for part in sums)


def _moved_back(array, axis):
    """A chunk with its last axes where they were, as it lies in memory."""
    return array if array is None or axis is None else np.moveaxis(array, range(-len(axis), 0), axis)


def _with_axes_last(array, axis):
    return array if array is None or axis is None else np.moveaxis(array, axis, range(-len(axis), 0))

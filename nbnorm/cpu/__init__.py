"""Norms of NumPy arrays that `checks` has passed: allocate, and leave the rest to what knows how the rows lie."""

import math
from typing import Any

import numpy as np

from nbnorm.calls.problem import wide_dtype
from nbnorm.cpu import channels_first, last_axes, memory
from nbnorm.cpu.operands import delivered, parameter_like
from nbnorm.cpu.staging import order_of_blocks


def forward(problem, given, return_stats):
    """Returns y, x + residual, mean and rstd; these two have one entry a row, and none at all unless asked for."""
    x, residual, out, total_out, with_total = given.x, given.residual, given.out, given.total_out, given.with_total
    order = _order(problem, (out, total_out), (x, residual))
    y = _rows_like(problem, out, order)
    total = _rows_like(problem, total_out, order) if with_total else None
    statistics = problem.rows if return_stats else 0
    mean = np.empty(statistics, wide_dtype(x.dtype))
    rstd = np.empty(statistics, wide_dtype(x.dtype))

    if problem.rows > 0 and problem.cols > 0:
        _rows_of(problem).normalise(problem, order, given, (y, total, mean, rstd))
    else:
        # a row of no columns has no mean
        mean.fill(math.nan)
        rstd.fill(math.nan)

    return delivered(y, out), delivered(total, total_out) if with_total else None, mean, rstd


def backward(problem, given):
    """Returns dx, dweight and dbias, None where not asked for; recomputes the statistics where mean and rstd are None."""
    dy, dtotal, x, weight, mean, rstd, output_mask, out = given
    with_dx, with_dweight, with_dbias = output_mask
    dx_out, dweight_out, dbias_out = out
    order = _order(problem, (dx_out,), (dy, dtotal, x))
    if order == -1 and (with_dweight or with_dbias):
        # sums over rows go forwards, whatever dx overlaps
        only_sums = given._replace(output_mask=(False, with_dweight, with_dbias), out=(None, None, None))
        _, dweight, dbias = backward(problem, only_sums)
        backward(problem, given._replace(output_mask=(True, False, False), out=(dx_out, None, None)))
        return dx_out, delivered(dweight, dweight_out), delivered(dbias, dbias_out)

    # where it is not asked for, it is never touched
    dx: Any = dx_out
    if with_dx:
        dx = _rows_like(problem, dx_out, order)
    inputs = [array for array in (dy, dtotal, x, weight, mean, rstd) if array is not None]
    dweight = parameter_like(with_dweight, problem, dweight_out, inputs)
    dbias = parameter_like(with_dbias, problem, dbias_out, inputs)

    if problem.rows > 0 and problem.cols > 0 and any(output_mask):
        _rows_of(problem).gradients(problem, order, given, (dx, dweight, dbias))
    else:
        dweight.fill(0)
        dbias.fill(0)

    return (
        delivered(dx, dx_out) if with_dx else None,
        delivered(dweight, dweight_out) if with_dweight else None,
        delivered(dbias, dbias_out) if with_dbias else None,
    )


def backward_of_part(problem, given):
    """As `backward`, of some rows of an array: dweight and dbias are their float64 sums, which are not rounded."""
    with_dx, with_dweight, with_dbias = given.output_mask
    shape = problem.normalized_shape
    dx = memory.empty(problem.shape, problem.dtype) if with_dx else None
    totals = np.zeros((with_dweight + with_dbias, *shape))
    if problem.rows > 0 and problem.cols > 0 and any(given.output_mask):
        rounded = (parameter_like(is_wanted, problem, None, ()) for is_wanted in given.output_mask[1:])
        sums = _rows_of(problem).gradients(problem, 0, given, (dx, *rounded), True)
        np.add.reduce(sums, axis=1, out=totals.reshape(len(sums), problem.cols))
    return dx, totals[0] if with_dweight else None, totals[-1] if with_dbias else None


def _rows_of(problem):
    return channels_first if problem.behind else last_axes


def _order(problem, outs, inputs):
    """That of the blocks; rows that lie beside each other are in no block of memory, and have none."""
    order = order_of_blocks(outs, inputs)
    return None if problem.behind and order else order


def _rows_like(problem, out, order):
    """What a kernel writes rows into: `out` where it can."""
    return memory.empty(problem.shape, problem.dtype) if out is None or order is None else out

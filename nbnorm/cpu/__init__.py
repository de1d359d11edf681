"""Layer norm on NumPy arrays that `checks` has passed: allocate, bring the operands into rows, run the kernels."""

import math
from typing import Any

import numpy as np

from nbnorm.calls.problem import given_dtype, wide_dtype
from nbnorm.cpu import channels_first, choice, memory, sizes
from nbnorm.cpu.operands import delivered, flat, is_streamed, parameter_like
from nbnorm.cpu.staging import beside, block_limit, buffer_for, load, order_of_blocks, rows_of, storage, store
from nbnorm.cpu.workers import blocks, threads
from nbnorm.cpu.workers.parallel import ONE


def forward(problem, given, return_stats):
    """Returns y, x + residual, mean and rstd; these two have one entry a row, and none at all unless asked for."""
    if problem.behind:
        return channels_first.forward(problem, given, return_stats)
    x, residual, weight, bias, out, total_out, with_total = given
    order = order_of_blocks((out, total_out), (x, residual))
    y = _rows_like(problem, out, order)
    total = _rows_like(problem, total_out, order) if with_total else None
    statistics = problem.rows if return_stats else 0
    mean = np.empty(statistics, wide_dtype(x.dtype))
    rstd = np.empty(statistics, wide_dtype(x.dtype))

    if problem.rows > 0 and problem.cols > 0:
        dtype = problem.compute_dtype
        present = (weight is not None, bias is not None)
        weight_row = flat(weight, dtype, y, total)
        bias_row = flat(bias, dtype, y, total)
        streaming = all(is_streamed(result, x, residual) for result in (y, total) if result is not None)
        limit = block_limit(problem, order, x, residual, y, total)

        def new_buffers(limit):
            inputs = (buffer_for(array, problem, limit, order) for array in (x, residual))
            return *inputs, *(buffer_for(array, problem, limit) for array in (y, total))

        def work(kernel, buffers, index, rows, last):
            x_buffer, residual_buffer, y_buffer, total_buffer = buffers
            x_rows, y_rows = load(x[index], x_buffer, problem.cols), rows_of(y[index], y_buffer, problem.cols)
            residual_rows = None if residual is None else load(residual[index], residual_buffer, problem.cols)
            total_rows = None if total is None else rows_of(total[index], total_buffer, problem.cols)
            kernel(
                beside(x_rows, residual_rows), weight_row, bias_row, problem.eps, streaming, beside(y_rows, total_rows),
                mean[rows], rstd[rows],
            )  # fmt: skip
            store(y_rows, y[index], y_buffer)
            if total is not None:
                store(total_rows, total[index], total_buffer)

        chosen = choice.forward(problem, *present, None if residual is None else residual.dtype, with_total)
        blocks.run(problem, order, limit, False, chosen, threads.forward, new_buffers, work)
    else:
        # a row of no columns has no mean
        mean.fill(math.nan)
        rstd.fill(math.nan)

    return delivered(y, out), delivered(total, total_out) if with_total else None, mean, rstd


def backward(problem, given):
    """Returns dx, dweight and dbias, None where not asked for; recomputes the statistics where mean and rstd are None."""
    if problem.behind:
        return channels_first.backward(problem, given)
    dy, dtotal, x, weight, mean, rstd, output_mask, out = given
    with_dx, with_dweight, with_dbias = output_mask
    dx_out, dweight_out, dbias_out = out
    order = order_of_blocks((dx_out,), (dy, dtotal, x))
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
        _gradients(problem, order, given, (dx, dweight, dbias))
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
    if problem.behind:
        return channels_first.backward_of_part(problem, given)
    with_dx, with_dweight, with_dbias = given.output_mask
    shape = problem.normalized_shape
    dx = memory.empty(problem.shape, problem.dtype) if with_dx else None
    totals = np.zeros((with_dweight + with_dbias, *shape))
    if problem.rows > 0 and problem.cols > 0 and any(given.output_mask):
        rounded = (parameter_like(is_wanted, problem, None, ()) for is_wanted in given.output_mask[1:])
        sums = _gradients(problem, 0, given, (dx, *rounded), True)
        np.add.reduce(sums, axis=1, out=totals.reshape(len(sums), problem.cols))
    return dx, totals[0] if with_dweight else None, totals[-1] if with_dbias else None


def _gradients(problem, order, given, results, keeps_sums=False):
    """Write the results, of which those that are not asked for are never touched; returns the sums of blocks of rows.

    A kernel for long rows has them in no array unless `keeps_sums`.
    """
    dy, dtotal, x, weight, mean, rstd, output_mask, _ = given
    dx, dweight, dbias = results
    with_dx, with_dweight, with_dbias = output_mask
    dtotal = dtotal if with_dx else None
    x_dtype = storage(x.dtype)
    dtype = problem.compute_dtype
    given_statistics = given_dtype(mean, rstd)
    statistics_dtype = given_statistics or wide_dtype(x.dtype)
    sum_dtype = storage(problem.weight_dtype)
    weight_row = flat(weight, dtype, dx)
    mean_row = flat(mean, statistics_dtype, dx)
    rstd_row = flat(rstd, statistics_dtype, dx)
    dweight_row = dweight.reshape(-1).view(sum_dtype)
    dbias_row = dbias.reshape(-1).view(sum_dtype)
    # a kernel for long rows writes dweight and dbias past the caches too
    streaming = with_dx and is_streamed(dx, dy, dtotal, x) and dweight.ctypes.data % 16 == dbias.ctypes.data % 16 == 0
    absent_dx = np.empty((0, problem.cols), x_dtype)
    limit = block_limit(problem, order, dy, dtotal, x, dx)
    has_sums = with_dweight or with_dbias
    block_rows = sizes.block_rows(problem.rows, problem.cols)
    blocks_of_sums = max(_blocks_of_sums(problem, block_rows, limit), int(keeps_sums))
    sums = np.empty((with_dweight + with_dbias, blocks_of_sums, problem.cols))

    def new_buffers(limit):
        inputs = (buffer_for(array, problem, limit, order) for array in (dy, dtotal, x))
        return *inputs, buffer_for(dx, problem, limit)

    def work(kernel, buffers, index, rows, last):
        dy_buffer, dtotal_buffer, x_buffer, dx_buffer = buffers
        dy_rows, x_rows = load(dy[index], dy_buffer, problem.cols), load(x[index], x_buffer, problem.cols)
        dtotal_rows = None if dtotal is None else load(dtotal[index], dtotal_buffer, problem.cols)
        dx_rows = rows_of(dx[index], dx_buffer, problem.cols) if with_dx else absent_dx
        kernel(
            beside(dy_rows, dtotal_rows), x_rows, weight_row, problem.eps, mean_row[rows], rstd_row[rows], rows.start,
            block_rows, last, streaming, dx_rows, sums, dweight_row, dbias_row,
        )  # fmt: skip
        if with_dx:
            store(dx_rows, dx[index], dx_buffer)

    dtotal_dtype = None if dtotal is None else dtotal.dtype
    chosen = choice.backward(problem, dy.dtype, weight is not None, given_statistics, output_mask, dtotal_dtype)
    _, kernel = blocks.run(problem, order, limit, has_sums, chosen, threads.backward, new_buffers, work)

    def no_rows(dtype):
        return np.empty((0, problem.cols), storage(dtype))

    if kernel is None and has_sums:
        # no rows, only the sums of the blocks
        blocks.kernel_for(ONE, chosen, None)(
            beside(no_rows(dy.dtype), None if dtotal is None else no_rows(dtotal.dtype)), absent_dx, weight_row,
            problem.eps, mean_row[:0], rstd_row[:0], 0, block_rows, True, False, absent_dx, sums, dweight_row, dbias_row,
        )  # fmt: skip
    return sums


def _blocks_of_sums(problem, block_rows, limit):
    if problem.cols > sizes.LONG_ROW:
        # a kernel for long rows has sums of its own, unless there are several calls to add up
        return int(limit < problem.rows)
    return -(-problem.rows // block_rows)


def _rows_like(problem, out, order):
    """What a kernel writes rows into: `out` where it can."""
    return memory.empty(problem.shape, problem.dtype) if out is None or order is None else out

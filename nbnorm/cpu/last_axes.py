"""Norms over the last axes: bring the operands into rows, run the kernels."""

import numpy as np

from nbnorm.calls.problem import given_dtype, wide_dtype
from nbnorm.cpu import choice, sizes
from nbnorm.cpu.operands import flat, is_streamed
from nbnorm.cpu.staging import beside, block_limit, buffer_for, load, rows_of, storage, store
from nbnorm.cpu.workers import blocks, threads
from nbnorm.cpu.workers.parallel import ONE


def normalise(problem, order, given, results):
    """Write y, the total unless it is None, and mean and rstd unless they are empty; `order` is that of the blocks."""
    x, residual, weight, bias, *_ = given
    y, total, mean, rstd = results
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

    chosen = choice.forward(problem, *present, None if residual is None else residual.dtype, given.with_total)
    blocks.run(problem, order, limit, False, chosen, threads.forward, new_buffers, work)


def gradients(problem, order, given, results, keeps_sums=False):
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

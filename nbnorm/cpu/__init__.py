"""Layer norm on NumPy arrays that `checks` has passed: allocate, bring the operands into rows, run the kernels."""

from typing import Any

import numpy as np

from nbnorm.arrays import convert
from nbnorm.cpu import kernels
from nbnorm.cpu.staging import block_limit, buffer_for, is_ready, load, row_blocks, rows_of, store
from nbnorm.problem import row_dtype

# below this many elements a parallel region costs more than it saves: float32 forward on two cores of an AMD EPYC takes
# 1.8 us serial and 2.3 us parallel at (8, 768), 5.1 and 3.8 us at (32, 768)
PARALLEL_ELEMENTS = 1 << 14

# dweight and dbias are summed by blocks of rows. Their number depends on the shape alone, so that the bits are the same at
# any thread count; at most 64 of them, and at most 8 MiB of float64 sums for each of the two
MIN_BLOCK_ROWS = 16
MAX_BLOCKS = 64
MAX_BLOCK_SUMS = 1 << 20


def forward(problem, x, weight, bias, out, return_stats):
    """Returns y, mean and rstd; mean and rstd have one entry a row, and none at all unless asked for."""
    x_dtype = row_dtype(x.dtype)
    y = _destination(out, problem.shape, problem.dtype, (x, weight, bias))
    statistics = problem.rows if return_stats else 0
    # a row of no columns has no mean
    mean = np.full(statistics, np.nan, x_dtype)
    rstd = np.full(statistics, np.nan, x_dtype)

    if problem.rows > 0 and problem.cols > 0:
        dtype = problem.compute_dtype
        present = (weight is not None, bias is not None)
        kernel = kernels.forward(x_dtype, dtype, *present, problem.variance, _is_parallel(problem))
        weight_row = _flat(weight, dtype)
        bias_row = _flat(bias, dtype)
        limit = block_limit(problem, x, y)
        x_buffer = buffer_for(x, problem, limit)
        y_buffer = buffer_for(y, problem, limit)
        for index, rows in row_blocks(problem.batch, limit):
            x_rows = load(x[index], x_buffer, problem.cols)
            y_rows = rows_of(y[index], y_buffer, problem.cols)
            kernel(x_rows, weight_row, bias_row, problem.eps, y_rows, mean[rows], rstd[rows])
            store(y_rows, y[index], y_buffer)

    return _delivered(y, out), mean, rstd


def backward(problem, dy, x, weight, mean, rstd, output_mask, out):
    """Returns dx, dweight and dbias, None where not asked for; recomputes the statistics where mean and rstd are None."""
    with_dx, with_dweight, with_dbias = output_mask
    dx_out, dweight_out, dbias_out = out
    dx: Any = _destination(dx_out, problem.shape, problem.dtype, (dy, x, weight, mean, rstd)) if with_dx else None
    block_rows = _block_rows(problem)
    blocks = -(-problem.rows // block_rows)
    dweight_sums = np.zeros((blocks if with_dweight else 0, problem.cols))
    dbias_sums = np.zeros((blocks if with_dbias else 0, problem.cols))

    if problem.rows > 0 and problem.cols > 0 and any(output_mask):
        x_dtype = row_dtype(x.dtype)
        dtype = problem.compute_dtype
        statistics_dtype = x_dtype if mean is None else np.result_type(row_dtype(mean.dtype), row_dtype(rstd.dtype))
        dtypes = (row_dtype(dy.dtype), x_dtype, dtype, statistics_dtype)
        statistics = problem.variance if mean is None else "given"
        kernel = kernels.backward(*dtypes, weight is not None, statistics, output_mask, _is_parallel(problem))
        weight_row = _flat(weight, dtype)
        mean_row = _flat(mean, statistics_dtype)
        rstd_row = _flat(rstd, statistics_dtype)
        limit = block_limit(problem, dy, x, dx)
        dy_buffer = buffer_for(dy, problem, limit)
        x_buffer = buffer_for(x, problem, limit)
        dx_buffer = buffer_for(dx, problem, limit) if with_dx else None
        absent_dx = np.empty((0, problem.cols), x_dtype)
        for index, rows in row_blocks(problem.batch, limit):
            dx_rows = rows_of(dx[index], dx_buffer, problem.cols) if with_dx else absent_dx
            kernel(
                load(dy[index], dy_buffer, problem.cols),
                load(x[index], x_buffer, problem.cols),
                weight_row,
                problem.eps,
                mean_row[rows],
                rstd_row[rows],
                rows.start,
                block_rows,
                dx_rows,
                dweight_sums,
                dbias_sums,
            )
            if with_dx:
                store(dx_rows, dx[index], dx_buffer)

    return (
        _delivered(dx, dx_out) if with_dx else None,
        _summed(dweight_sums, problem, dweight_out) if with_dweight else None,
        _summed(dbias_sums, problem, dbias_out) if with_dbias else None,
    )


def _is_parallel(problem):
    return problem.rows * problem.cols >= PARALLEL_ELEMENTS


def _block_rows(problem):
    blocks = min(MAX_BLOCKS, max(1, MAX_BLOCK_SUMS // max(1, problem.cols)))
    return max(MIN_BLOCK_ROWS, -(-problem.rows // blocks))


def _flat(array, dtype):
    """The operand as one contiguous row; a kernel takes what is absent as an empty one."""
    if array is None:
        return np.empty(0, dtype)
    if not is_ready(array, dtype):
        converted = np.empty(array.shape, dtype)
        convert(array, converted)
        array = converted
    return array.reshape(-1)


def _summed(sums, problem, out):
    """The blocks' sums added in order, rounded once to the dtype of weight."""
    result = np.empty(problem.normalized_shape, problem.weight_dtype) if out is None else out
    with np.errstate(all="ignore"):
        total = np.add.reduce(sums, axis=0)
    convert(total.reshape(problem.normalized_shape), result)
    return result


def _destination(out, shape, dtype, inputs):
    """`out` where a kernel may write it while it reads the inputs, else a new array."""
    if out is None or any(array is not None and _overlaps(out, array) for array in inputs):
        return np.empty(shape, dtype)
    return out


def _overlaps(out, array):
    """Whether the two may share memory in another way than element for element."""
    return np.may_share_memory(out, array) and not (
        out.ctypes.data == array.ctypes.data
        and out.shape == array.shape
        and out.strides == array.strides
        and out.dtype == array.dtype
    )


def _delivered(result, out):
    """`out` with the result in it, or the result where there is no `out`."""
    if out is None or out is result:
        return result
    np.copyto(out, result)
    return out

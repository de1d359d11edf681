"""Calls on NumPy arrays that were made before: each goes to its kernel at once, as `calls.plans` has it.

A call has a plan where a kernel takes all of its rows at once, as they are. How many rows there are, who works, and whether
results share memory with operands, a plan asks each time. It takes each call's own eps: 0.0 equals -0.0, and in a thread
that takes subnormal numbers for 0, those as well.
"""

import functools
from math import prod
from typing import Any

import numpy as np
from numpy import empty, may_share_memory, ndarray

from nbnorm.calls.problem import given_dtype, wide_dtype
from nbnorm.cpu import channels_first, choice
from nbnorm.cpu import sizes as limits
from nbnorm.cpu.compiled import entry_of
from nbnorm.cpu.staging import is_ready, storage
from nbnorm.cpu.workers import blocks, parallel, threads
from nbnorm.cpu.workers.parallel import ONE

# of each public function its own, since another one does something else for the same arrays
LAYER_NORM: dict[tuple, Any] = {}
LAYER_NORM_BACKWARD: dict[tuple, Any] = {}
RMS_NORM: dict[tuple, Any] = {}
RMS_NORM_BACKWARD: dict[tuple, Any] = {}
ADD_LAYER_NORM: dict[tuple, Any] = {}
ADD_LAYER_NORM_BACKWARD: dict[tuple, Any] = {}
ADD_RMS_NORM: dict[tuple, Any] = {}
ADD_RMS_NORM_BACKWARD: dict[tuple, Any] = {}
# of torch's tensors, which are known by other things; one of all functions
TENSORS: dict[tuple, Any] = {}
TENSORS_BACKWARD: dict[tuple, Any] = {}
ALL = (
    LAYER_NORM, LAYER_NORM_BACKWARD, RMS_NORM, RMS_NORM_BACKWARD,
    ADD_LAYER_NORM, ADD_LAYER_NORM_BACKWARD, ADD_RMS_NORM, ADD_RMS_NORM_BACKWARD,
    TENSORS, TENSORS_BACKWARD,
)  # fmt: skip


def forward(problem, call):
    """How a forward is done again, of which the checks made this problem: a function of its arrays and eps; None for none.

    The function returns y, or y, mean and rstd; or None where the call goes the long way, since memory is shared, or there
    are too few elements or too many.
    """
    x, weight, bias, out, return_stats = call.x, call.weight, call.bias, call.out, call.return_stats
    dtype = problem.compute_dtype
    if not _is_one_call(problem, x, out) or not _are_rows(dtype, weight, bias):
        return None
    is_beside = len(problem.behind) > 0
    share = threads.forward_blocks if is_beside else threads.forward
    kernels = _Kernels(choice.forward(problem, weight is not None, bias is not None), share)
    y_dtype, cols, statistics_dtype = problem.dtype, problem.cols, problem.statistics_dtype
    ones, most = (1,) * len(problem.normalized_shape), limits.STREAMED_BYTES // 8
    first, end = len(problem.batch), len(problem.batch) + len(ones)
    is_shaped, is_deep, flat_rows = is_beside or first != 1 or len(ones) != 1, len(ones) > 1, (-1, cols)
    stored, weight_is_narrow, bias_is_narrow = _stored(y_dtype), _is_narrow(weight, dtype), _is_narrow(bias, dtype)
    are_owners = _are_owners(x, weight, bias, out)
    absent, no_statistics = np.empty(0, dtype), np.empty(0, statistics_dtype)

    def run(x, weight, bias, eps, out):
        shape, size = x.shape, x.size
        if not 0 < size < most:
            return None
        if out is None:
            y = empty(shape, y_dtype)
        elif _shares_memory(out, (None if out is x else x, weight, bias), are_owners):
            return None
        else:
            y = out
        mean = rstd = no_statistics
        if return_stats:
            mean, rstd = empty(size // cols, statistics_dtype), empty(size // cols, statistics_dtype)
        weight = absent if weight is None else weight.astype(dtype) if weight_is_narrow else weight
        bias = absent if bias is None else bias.astype(dtype) if bias_is_narrow else bias
        if is_deep:
            weight, bias = weight.reshape(-1), bias.reshape(-1)
        x_rows, y_rows = x, y
        if is_shaped:
            rows = (-1, cols, prod(shape[end:])) if is_beside else flat_rows
            x_rows, y_rows = x.reshape(rows), y.reshape(rows)
        if stored is not None:
            x_rows, y_rows = x_rows.view(stored), y_rows.view(stored)
        kernel = kernels[ONE if size < parallel.from_elements else parallel.workers(size)]
        operands = x_rows, weight, bias, eps, False, y_rows, mean, rstd
        if is_beside:
            operands += channels_first.all_blocks(x_rows.shape, dtype)
        kernel(*operands)
        if not return_stats:
            return y
        statistics_shape = shape[:first] + ones + shape[end:] if is_beside else shape[:first] + ones
        return y, mean.reshape(statistics_shape), rstd.reshape(statistics_shape)

    if call.eps is None:
        return lambda x, weight, bias, eps, out: run(x, weight, bias, problem.eps, out)
    return run


def added(problem, call):
    """The same where a residual is added: the function returns y, total, mean and rstd, None for what is not asked for."""
    with_total = call.total_out is not False
    arrays = call.x, call.residual, call.out, call.total_out if with_total else None
    weight, bias, dtype, cols, usual_eps = call.weight, call.bias, problem.compute_dtype, problem.cols, problem.eps
    if not _is_one_call(problem, *arrays) or not _are_rows(dtype, weight, bias):
        return None
    chosen = choice.forward(problem, weight is not None, bias is not None, call.residual.dtype, with_total)
    is_beside = len(problem.behind) > 0
    kernels = _Kernels(chosen, threads.forward_blocks if is_beside else threads.forward)
    y_dtype, statistics_dtype, return_stats = problem.dtype, problem.statistics_dtype, call.return_stats
    ones, most = (1,) * len(problem.normalized_shape), limits.STREAMED_BYTES // 8
    first, end = len(problem.batch), len(problem.batch) + len(ones)
    is_shaped, flat_rows = is_beside or first != 1 or len(ones) != 1, (-1, cols)
    are_owners = _are_owners(*arrays, weight, bias)
    stored, residual_stored = _stored(y_dtype), _stored(call.residual.dtype)
    absent, no_statistics, no_total = np.empty(0, dtype), np.empty(0, statistics_dtype), np.empty((0, cols), y_dtype)

    def run(x, residual, weight, bias, eps, out, total_out):
        shape, size = x.shape, x.size
        if not 0 < size < most:
            return None
        y, total = out, total_out if with_total else no_total
        if out is not None and _is_shared(y, x, residual, (weight, bias, total), are_owners):
            return None
        if with_total and total is not None and _is_shared(total, x, residual, (weight, bias, y), are_owners):
            return None
        if y is None:
            y = empty(shape, y_dtype)
        if total is None:
            total = empty(shape, y_dtype)
        mean = rstd = no_statistics
        if return_stats:
            mean, rstd = empty(size // cols, statistics_dtype), empty(size // cols, statistics_dtype)
        weight = absent if weight is None else weight.astype(dtype, copy=False).reshape(-1)
        bias = absent if bias is None else bias.astype(dtype, copy=False).reshape(-1)
        x_rows, y_rows, total_rows = x, y, total
        if is_shaped:
            rows = (-1, cols, prod(shape[end:])) if is_beside else flat_rows
            x_rows, residual = x.reshape(rows), residual.reshape(rows)
            y_rows, total_rows = y.reshape(rows), total.reshape(rows)
        if residual_stored is not None:
            residual = residual.view(residual_stored)
        if stored is not None:
            x_rows, y_rows, total_rows = x_rows.view(stored), y_rows.view(stored), total_rows.view(stored)
        kernel = kernels[ONE if size < parallel.from_elements else parallel.workers(size)]
        written = (y_rows, total_rows) if with_total else y_rows
        operands = (x_rows, residual), weight, bias, usual_eps if eps is None else eps, False, written, mean, rstd
        if is_beside:
            operands += channels_first.all_blocks(x_rows.shape, dtype)
        kernel(*operands)
        if not return_stats:
            return y, total if with_total else None, None, None
        statistics_shape = shape[:first] + ones + shape[end:] if is_beside else shape[:first] + ones
        return y, total if with_total else None, mean.reshape(statistics_shape), rstd.reshape(statistics_shape)

    return run


def backward(problem, call, output_mask):
    """The same of a backward that is asked for dx: the function returns dx, dweight and dbias, None where not asked for."""
    dy, dtotal, x, weight, mean, rstd = call.dy, call.dtotal, call.x, call.weight, call.mean, call.rstd
    out = () if call.out is None else call.out
    with_dx, with_dweight, with_dbias = output_mask
    dtype = problem.compute_dtype
    if not with_dx or not _is_one_call(problem, dy, dtotal, x, mean, rstd, *out) or not _are_rows(dtype, weight):
        return None
    given = given_dtype(mean, rstd)
    if any(array is not None and array.dtype != given for array in (mean, rstd)):
        return None
    dtotal_dtype = None if dtotal is None else dtotal.dtype
    chosen = choice.backward(problem, dy.dtype, weight is not None, given, output_mask, dtotal_dtype)
    is_beside = len(problem.behind) > 0
    kernels = _Kernels(chosen, threads.backward_blocks if is_beside else threads.backward)
    row, cols, dx_dtype, sum_dtype = problem.normalized_shape, problem.cols, problem.dtype, problem.weight_dtype
    is_shaped, is_deep = is_beside or len(problem.batch) != 1 or len(row) != 1, len(row) > 1
    flat_rows, most = (-1, cols), limits.STREAMED_BYTES // 8
    weight_is_narrow, are_owners = _is_narrow(weight, dtype), _are_owners(dy, dtotal, x, weight, mean, rstd, *out)
    dy_stored, stored, sum_stored = _stored(dy.dtype), _stored(dx_dtype), _stored(sum_dtype)
    dtotal_stored = None if dtotal is None else _stored(dtotal_dtype)
    absent, no_statistics = np.empty(0, dtype), np.empty(0, given or wide_dtype(dx_dtype))
    no_sums = np.empty(0, storage(sum_dtype))
    results, end = with_dweight + with_dbias, len(problem.batch) + len(row)

    def run(dy, x, weight, eps, mean, rstd, out, dtotal=None):
        size = x.size
        if not 0 < size < most:
            return None
        dx: Any = None
        dweight = dbias = None
        if out is not None:
            dx, dweight, dbias = out
            inputs = None if dx is dy else dy, None if dx is x else x, None if dx is dtotal else dtotal
            others = *inputs, weight, mean, rstd, dweight, dbias
            # dweight and dbias may overlap an input, which has been read when they are written
            if _shares_memory(dx, others, are_owners) or _shares_memory(dweight, (dbias,), are_owners):
                return None
        if dx is None:
            dx = empty(x.shape, dx_dtype)
        if with_dweight and dweight is None:
            dweight = empty(row, sum_dtype)
        if with_dbias and dbias is None:
            dbias = empty(row, sum_dtype)
        weight = absent if weight is None else weight.astype(dtype) if weight_is_narrow else weight
        dweight_row, dbias_row = no_sums if dweight is None else dweight, no_sums if dbias is None else dbias
        if is_deep:
            weight, dweight_row, dbias_row = weight.reshape(-1), dweight_row.reshape(-1), dbias_row.reshape(-1)
        mean_row = rstd_row = no_statistics
        if rstd is not None:
            rstd_row = rstd.reshape(-1)
            if mean is not None:
                mean_row = mean.reshape(-1)
        dx_rows = dx
        if is_shaped:
            rows = (-1, cols, prod(x.shape[end:])) if is_beside else flat_rows
            dy, x, dx_rows = dy.reshape(rows), x.reshape(rows), dx.reshape(rows)
            dtotal = None if dtotal is None else dtotal.reshape(rows)
        summed = channels_first.all_summed(x.shape, dtype, results) if is_beside else _sums(size, cols, results)
        block_rows, sums_shape, which = summed
        if dy_stored is not None:
            dy = dy.view(dy_stored)
        if stored is not None:
            x, dx_rows = x.view(stored), dx_rows.view(stored)
        if sum_stored is not None:
            dweight_row, dbias_row = dweight_row.view(sum_stored), dbias_row.view(sum_stored)
        if dtotal is not None:
            dy = dy, dtotal if dtotal_stored is None else dtotal.view(dtotal_stored)
        kernel = kernels[ONE if size < parallel.from_elements else parallel.workers(size)]
        sums = empty(sums_shape)
        operands = (
            dy, x, weight, eps, mean_row, rstd_row, 0, block_rows, True, False, dx_rows, sums, dweight_row, dbias_row
        )  # fmt: skip
        kernel(*(operands + which))
        return dx, dweight, dbias

    if call.eps is None:
        return lambda dy, x, weight, eps, *others: run(dy, x, weight, problem.eps, *others)
    return run


# a tenth of a backward at (1, 64), uncached
@functools.lru_cache
def _sums(size, cols, results):
    """The rows of a block, the shape of the blocks' sums, and what else a kernel is told."""
    rows = size // cols
    block_rows = limits.block_rows(rows, cols)
    return block_rows, (results, -(-rows // block_rows), cols), ()


class _Kernels(dict):
    """The kernel of a plan, by who works: asked for when they first do, since that changes."""

    def __init__(self, chosen, share):
        self.chosen, self.share = chosen, share

    def __missing__(self, workers):
        kernel = blocks.kernel_for(workers, self.chosen, self.share)
        self[workers] = entry_of(kernel) if workers == ONE else kernel
        return self[workers]


def _is_one_call(problem, *arrays):
    """Whether a kernel takes all rows of the arrays, of those that there are, at once and as they are."""
    size = problem.rows * problem.cols
    # of no dtype would a result be written past the caches
    is_usual = 0 < size * 8 < limits.STREAMED_BYTES and problem.cols <= limits.LONG_ROW
    return is_usual and all(array is None or _is_plain(array) for array in arrays)


def _are_rows(dtype, *parameters):
    """Whether a kernel takes weight and bias, those that there are, as they are or once they are widened."""
    return all(array is None or _is_row(array, dtype) or _is_narrow(array, dtype) for array in parameters)


def _is_plain(array):
    # a dtype's metadata is no part of what it equals
    return type(array) is ndarray and is_ready(array) and array.dtype.metadata is None


def _is_row(array, dtype):
    return _is_plain(array) and array.dtype == dtype


def _is_narrow(array, dtype):
    """Whether a parameter's 16 bits become float32, which they do alike in every floating-point mode."""
    return array is not None and _is_plain(array) and array.itemsize == 2 and dtype == np.float32


def _stored(dtype):
    """What a kernel takes elements of this dtype as, if not as they are."""
    return storage(dtype) if dtype.itemsize == 2 else None


def _are_owners(*arrays):
    """Whether each array has memory of its own, which two of them share only where they are one array."""
    return all(array is None or array.flags.owndata for array in arrays)


def _is_shared(result, x, residual, others, are_owners):
    """Whether a result shares memory with another array; it may be x or residual."""
    inputs = None if result is x else x, None if result is residual else residual
    return _shares_memory(result, (*inputs, *others), are_owners)


def _shares_memory(result, others, are_owners):
    """Whether a result that is given shares memory with another array."""
    if result is None:
        return False
    for array in others:
        if array is not None and (result is array if are_owners else may_share_memory(result, array)):
            return True
    return False

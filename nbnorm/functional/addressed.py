"""Calls on torch's CPU tensors by the addresses of their memory: past NumPy's arrays, to an entry of `nopython.entries`.

A tensor gives its address in a tenth of the time in which it becomes an array. A call is known by the shapes and dtypes of
its tensors and by its options, and keeps a plan, as `calls.plans` has it, or False where it has to go another way. What a
tensor may lose from one call to the next, such as its memory, is asked each time.
"""

import ctypes
import sys

import numpy as np
from numba.core import config

from nbnorm.calls import arrays, checks, lent_by_torch
from nbnorm.calls.plans import sizes
from nbnorm.calls.problem import BackwardCall, ForwardCall, given_dtype
from nbnorm.cpu import choice, keys, plans
from nbnorm.cpu import sizes as limits
from nbnorm.cpu.workers import parallel

_tables: dict = {}


def forward(operands, options, is_rms=False, is_added=False):
    """y, total, mean and rstd, None for what is not asked for; None for all where the call goes another way.

    `operands` are x, residual, weight, bias, out and total_out, `options` normalized_shape, eps, use_diff_of_squares and
    return_stats.
    """
    x, residual, weight, bias, out, total_out = operands
    normalized_shape, eps, use_diff_of_squares, return_stats = options
    if not lent_by_torch.is_plain(x) or type(return_stats) is not bool or not _are_usual(eps, use_diff_of_squares):
        return None
    if type(normalized_shape) is not int and (normalized_shape := sizes(normalized_shape)) is None:
        return None
    weight_at = bias_at = residual_at = y_at = total_at = 0
    weight_shape = weight_dtype = bias_shape = bias_dtype = others = None
    address = lent_by_torch.address
    try:
        # written out: a loop would take a twentieth more of a call at (1, 64)
        x_at, size, x_shape = address(x), x.numel(), x.shape
        if weight is not None:
            weight_at, weight_shape, weight_dtype = address(weight), weight.shape, weight.dtype
        if bias is not None:
            bias_at, bias_shape, bias_dtype = address(bias), bias.shape, bias.dtype
        if is_added or out is not None:
            others, (residual_at, y_at, total_at) = _seen((residual, out, total_out))
    except Exception:
        # of what has no memory of its own; another way says what it is
        return None
    if size >= parallel.from_elements:
        return None
    key = (
        normalized_shape, eps, use_diff_of_squares, return_stats, x_shape, x.dtype, weight_shape, weight_dtype,
        bias_shape, bias_dtype, others, is_rms, is_added,
    )  # fmt: skip
    plan = plans.TENSORS.get(key)
    if plan is None:
        plan = _made(plans.TENSORS, key, _forward_plan, operands)
    if not plan:
        return None
    addresses = x_at, residual_at, weight_at, bias_at, y_at, total_at
    return plan(size, addresses, x, weight, bias, eps, out, total_out)


def backward(operands, options, out, is_rms=False, is_added=False):
    """The same of dx, dweight and dbias: `operands` are x, dy, dtotal, weight, mean and rstd, the last option the mask."""
    x, dy, dtotal, weight, mean, rstd = operands
    normalized_shape, eps, use_diff_of_squares, mask = options
    if not lent_by_torch.is_plain(x) or type(mask) is not tuple or not _are_usual(eps, use_diff_of_squares):
        return None
    if type(normalized_shape) is not int and (normalized_shape := sizes(normalized_shape)) is None:
        return None
    outs = (None, None, None) if out is None else out
    if type(outs) is not tuple or not all(map(_is_bool, mask)):
        return None
    weight_at, others, others_at = 0, None, (0, 0, 0, 0, 0, 0)
    weight_shape = weight_dtype = None
    address = lent_by_torch.address
    try:
        x_at, dy_at, size, x_shape, dy_shape = address(x), address(dy), x.numel(), x.shape, dy.shape
        if weight is not None:
            weight_at, weight_shape, weight_dtype = address(weight), weight.shape, weight.dtype
        if is_added or out is not None or mean is not None or rstd is not None:
            others, others_at = _seen((dtotal, mean, rstd, *outs))
    except Exception:
        return None
    if size >= parallel.from_elements:
        return None
    key = (
        normalized_shape, eps, use_diff_of_squares, mask, x_shape, x.dtype, dy_shape, dy.dtype, weight_shape,
        weight_dtype, others, is_rms, is_added,
    )  # fmt: skip
    plan = plans.TENSORS_BACKWARD.get(key)
    if plan is None:
        plan = _made(plans.TENSORS_BACKWARD, key, _backward_plan, (*operands, out))
    return plan(size, (x_at, dy_at, weight_at, *others_at), x, weight, eps, out) if plan else None


def _are_usual(eps, use_diff_of_squares):
    return (type(eps) is float or eps is None) and type(use_diff_of_squares) is bool


def _is_bool(value):
    return type(value) is bool


def _seen(operands):
    """By what each is known, and its address."""
    known, addresses = [], []
    for array in operands:
        is_absent = array is None or array is False
        known.append(array if is_absent else (array.shape, array.dtype))
        addresses.append(0 if is_absent else lent_by_torch.address(array))
    return tuple(known), addresses


def _made(kept, key, make, operands):
    """The plan of another number of rows, or of a call that is made for the first time, after the checks."""
    plan = keys.of_other_rows(kept, key)
    if plan is None:
        plan = make(operands, key[:4], *key[-2:])
        keys.keep_for_any_rows(kept, key, plan)
    return plan


def _forward_plan(operands, options, is_rms, is_added):
    """How a forward is done again, a function of what differs from call to call; False where an entry does not take it."""
    x, residual, weight, bias, out, total_out = operands
    shape, eps, use_diff_of_squares, return_stats = options
    call = ForwardCall(
        x, shape, weight, bias, eps, use_diff_of_squares, out, return_stats, None, residual, total_out, is_rms, is_added
    )
    problem, given = checks.forward(call)
    if not _is_entrys(problem, given.x, given.weight, given.bias):
        return False
    with_total, cols, usual_eps = given.with_total, problem.cols, problem.eps
    residual_dtype = None if residual is None else given.residual.dtype
    kernel = choice.forward(problem, weight is not None, bias is not None, residual_dtype, with_total)
    run_entry, table = _entry(kernel)
    weight_is_narrow, bias_is_narrow = (_is_narrow(array, problem.compute_dtype) for array in (given.weight, given.bias))
    empty_like, ndim, ones = sys.modules["torch"].empty_like, len(problem.batch), (1,) * len(problem.normalized_shape)

    def run(size, addresses, x, weight, bias, eps, out, total_out):
        x_at, residual_at, weight_at, bias_at, y_at, total_at = addresses
        y, total, mean, rstd, mean_at, rstd_at = out, None, None, None, 0, 0
        is_given = y_at or total_at
        if is_given and not _may_be_written(out, total_out):
            return None
        if y is None:
            y = empty_like(x)
            y_at = y.data_ptr()
        if with_total:
            total = total_out
            if total is None:
                total = empty_like(x)
                total_at = total.data_ptr()
        if weight_is_narrow:
            weight = weight.float()
            weight_at = weight.data_ptr()
        if bias_is_narrow:
            bias = bias.float()
            bias_at = bias.data_ptr()
        if return_stats:
            shape = *x.shape[:ndim], *ones
            mean, rstd = (_new(shape, problem.statistics_dtype) for _ in range(2))
            mean_at, rstd_at = mean.data_ptr(), rstd.data_ptr()
        if not run_entry(
            table, size // cols, cols, x_at, residual_at, weight_at, bias_at, usual_eps if eps is None else eps, False,
            y_at, total_at, mean_at, rstd_at,
        ):  # fmt: skip
            return None
        if is_given:
            _mark_written(out, total_out)
        return y, total, mean, rstd

    return run


def _backward_plan(operands, options, is_rms, is_added):
    """The same of a backward."""
    x, dy, dtotal, weight, mean, rstd, out = operands
    shape, eps, use_diff_of_squares, mask = options
    if is_rms:
        # of which the last entry is for a bias
        mask, out = mask[:-1], None if out is None else out[:-1]
    call = BackwardCall(
        dy, x, shape, weight, eps, use_diff_of_squares, mean, rstd, mask, out, None, dtotal, is_rms, is_added
    )
    problem, given = checks.backward(call)
    statistics_dtype = given_dtype(given.mean, given.rstd)
    are_alike = all(array is None or array.dtype == statistics_dtype for array in (given.mean, given.rstd))
    if not (are_alike and any(given.output_mask) and _is_entrys(problem, given.x, given.weight)):
        return False
    if given.dy.dtype.kind in "biu" or (dtotal is not None and given.dtotal.dtype.kind in "biu"):
        return False
    with_dx, with_dweight, with_dbias = given.output_mask
    dtotal_dtype = None if dtotal is None or not with_dx else given.dtotal.dtype
    kernel = choice.backward(problem, given.dy.dtype, weight is not None, statistics_dtype, given.output_mask, dtotal_dtype)
    run_entry, table = _entry(kernel)
    weight_is_narrow = _is_narrow(given.weight, problem.compute_dtype)
    empty_like, cols, row, usual_eps = sys.modules["torch"].empty_like, problem.cols, problem.normalized_shape, problem.eps

    def run(size, addresses, x, weight, eps, out):
        x_at, dy_at, weight_at, dtotal_at, mean_at, rstd_at, dx_at, dweight_at, dbias_at = addresses
        dx, dweight, dbias = (None, None, None) if out is None else out
        if out is not None and not _may_be_written(*out):
            return None
        if with_dx and dx is None:
            dx = empty_like(x)
            dx_at = dx.data_ptr()
        if with_dweight and dweight is None:
            dweight = x.new_empty(row) if weight is None else empty_like(weight)
            dweight_at = dweight.data_ptr()
        if with_dbias and dbias is None:
            dbias = x.new_empty(row) if weight is None else empty_like(weight)
            dbias_at = dbias.data_ptr()
        if weight_is_narrow:
            weight = weight.float()
            weight_at = weight.data_ptr()
        if not run_entry(
            table, size // cols, cols, dy_at, dtotal_at if with_dx else 0, x_at, weight_at,
            usual_eps if eps is None else eps, False, mean_at, rstd_at, dx_at, dweight_at, dbias_at,
        ):  # fmt: skip
            return None
        if out is not None:
            _mark_written(*out)
        return dx, dweight, dbias

    return run


def _is_entrys(problem, x, *parameters):
    """Whether an entry takes such calls, of parameters once they are widened."""
    dtype = problem.compute_dtype
    are_parameters = all(array is None or array.dtype == dtype or _is_narrow(array, dtype) for array in parameters)
    is_usual = 0 < problem.cols <= limits.LONG_ROW and x.dtype == problem.dtype
    return are_parameters and is_usual and not config.DISABLE_JIT


def _is_narrow(array, dtype):
    return array is not None and array.itemsize == 2 and array.dtype.kind in "fV" and dtype == np.float32


def _entry(kernel):
    """A kernel's entry as a function of addresses, and the address of a table with this kernel alone, kept for ever."""
    # which nothing but tensors, and compiled code, has a use for
    from nbnorm.nopython import entries, sharing

    if kernel not in _tables:
        words = np.zeros(sharing.WORDS, np.int64)
        words[sharing.NATIVE] = ctypes.addressof(parallel.native)
        # the kernel knows how it finds a variance
        words[entries.kernel_at(kernel.module == "short_rows", False)] = entries.address(choice.ready(kernel, False))
        _tables.setdefault(kernel, words)
    return entries.function(*entries.of(kernel)), _tables[kernel].ctypes.data


def _new(shape, dtype):
    # in a third of the time of torch.empty
    return arrays.give_back(np.empty(shape, dtype), None, "torch")


def _may_be_written(*outs):
    return all(out is None or out is False or arrays.may_be_written(out) for out in outs)


def _mark_written(*outs):
    for out in outs:
        if out is not None and out is not False:
            arrays.mark_written(out)

"""Calls as most are, without the cost of the checks: contiguous NumPy arrays, all float32 or all float64; or 16-bit ones
with parameters of float32 or of their own dtype.

What is asked here is only whether a call is such a one, and right; the kernels' own look at the types of their arguments is
a part of that, for strides. Every other call, wrong ones among them, is left to `checks`, and so is one whose kernel is not
compiled yet. The two functions share no helpers, since each call of one would add a twentieth to a forward at (1, 64), which
takes 1.6 us on an AMD EPYC, and 27 by way of `checks`.
"""

from math import inf
from typing import Any

import numpy as np
from numpy import empty, may_share_memory, ndarray

from nbnorm.cpu import sizes
from nbnorm.cpu.workers import parallel
from nbnorm.cpu.workers.parallel import ONE

# the kernels that calls had compiled, by x's dtype, whether rows are short, which parameters are absent (backward: weight's
# dtype, or None) or asked for, the variance or None for given statistics, and who works; with the dtype that they take
# parameters in, and the one that they take what has 16 bits as, or None
FORWARD: dict[tuple, Any] = {}
BACKWARD: dict[tuple, Any] = {}
# what a kernel takes for an absent parameter or statistics
ABSENT = {dtype: np.empty(0, dtype) for dtype in (np.dtype(np.float32), np.dtype(np.float64))}


def forward(x: Any, normalized_shape, weight, bias, eps, use_diff_of_squares, out=None, return_stats=False):
    """Layer norm of x, in `out` if there is one, with mean and rstd where they are asked for; or None."""
    if type(x) is not ndarray or type(eps) is not float or type(use_diff_of_squares) is not bool:
        return None
    shape, size, dtype = x.shape, x.size, x.dtype
    if type(normalized_shape) is tuple and len(normalized_shape) == 1:
        normalized_shape = normalized_shape[0]
    if type(normalized_shape) is not int or not shape or shape[-1] != normalized_shape or not 0 <= eps < inf:
        return None
    workers = parallel.many if size >= parallel.from_elements else ONE
    # as in `sizes.is_short`
    is_short = normalized_shape < sizes.SHORT_ROW or (normalized_shape < sizes.SHORT_16_BIT_ROW and dtype.itemsize == 2)
    found = FORWARD.get((dtype, is_short, weight is None, bias is None, use_diff_of_squares, workers))
    if found is None or not 0 < size * 8 < sizes.STREAMED_BYTES or normalized_shape > sizes.LONG_ROW:
        return None
    kernel, wide, stored = found
    absent = ABSENT[wide]
    row = shape[-1:]
    if weight is None:
        weight = absent
    elif type(weight) is not ndarray or weight.shape != row:
        return None
    elif weight.dtype != wide:
        if weight.dtype != dtype:
            return None
        weight = weight.astype(wide)
    if bias is None:
        bias = absent
    elif type(bias) is not ndarray or bias.shape != row:
        return None
    elif bias.dtype != wide:
        if bias.dtype != dtype:
            return None
        bias = bias.astype(wide)
    if not x.flags.c_contiguous:
        return None
    y = empty(shape, dtype) if out is None else out
    if out is not None:
        if type(out) is not ndarray or out.shape != shape or out.dtype != dtype:
            return None
        # C-contiguous, aligned and writable
        if not out.flags.carray:
            return None
        if (out is not x and may_share_memory(out, x)) or may_share_memory(out, weight) or may_share_memory(out, bias):
            return None
    mean = rstd = absent
    if return_stats is True:
        mean, rstd = empty(size // normalized_shape, wide), empty(size // normalized_shape, wide)
    elif return_stats is not False:
        return None
    x_rows, y_rows = x, y
    if len(shape) != 2:
        x_rows, y_rows = x.reshape(-1, normalized_shape), y.reshape(-1, normalized_shape)
    if stored is not None:
        x_rows, y_rows = x_rows.view(stored), y_rows.view(stored)
    try:
        kernel(x_rows, weight, bias, eps, False, y_rows, mean, rstd)
    except TypeError:
        # strides that a kernel does not take
        return None
    if return_stats is False:
        return y
    statistics_shape = (*shape[:-1], 1)
    return y, mean.reshape(statistics_shape), rstd.reshape(statistics_shape)


def backward(
    dy: Any, x: Any, normalized_shape, weight, eps, use_diff_of_squares, output_mask, out=None, mean=None, rstd=None
):  # fmt: skip
    """dx, dweight and dbias, the latter two None where not asked for, or None for all; dx is always asked for."""
    if type(x) is not ndarray or type(eps) is not float or type(use_diff_of_squares) is not bool:
        return None
    shape, size, dtype = x.shape, x.size, x.dtype
    if type(normalized_shape) is tuple and len(normalized_shape) == 1:
        normalized_shape = normalized_shape[0]
    if type(normalized_shape) is not int or not shape or shape[-1] != normalized_shape or not 0 <= eps < inf:
        return None
    workers = parallel.many if size >= parallel.from_elements else ONE
    if type(output_mask) is not tuple or len(output_mask) != 3:
        return None
    with_dx, with_dweight, with_dbias = output_mask
    # 1 is True to a dictionary, but not to the checks
    if with_dx is not True or type(with_dweight) is not bool or type(with_dbias) is not bool:
        return None
    mode = use_diff_of_squares if mean is None else None
    row = shape[-1:]
    if weight is None:
        parameter = None
    elif type(weight) is not ndarray or weight.shape != row:
        return None
    else:
        parameter = weight.dtype
    is_short = normalized_shape < sizes.SHORT_ROW or (normalized_shape < sizes.SHORT_16_BIT_ROW and dtype.itemsize == 2)
    found = BACKWARD.get((dtype, is_short, parameter, output_mask, mode, workers))
    if found is None or not 0 < size * 8 < sizes.STREAMED_BYTES or normalized_shape > sizes.LONG_ROW:
        return None
    kernel, wide, stored = found
    absent = ABSENT[wide]
    if weight is None:
        weight, parameter = absent, dtype
    elif parameter != wide:
        weight = weight.astype(wide)
    if type(dy) is not ndarray or dy.shape != shape or dy.dtype != dtype:
        return None
    if not x.flags.c_contiguous or not dy.flags.c_contiguous:
        return None
    if mean is not None:
        statistics_shape = (*shape[:-1], 1)
        if type(mean) is not ndarray or mean.dtype != wide or mean.shape != statistics_shape:
            return None
        if type(rstd) is not ndarray or rstd.dtype != wide or rstd.shape != statistics_shape:
            return None
        mean, rstd = mean.reshape(-1), rstd.reshape(-1)
    elif rstd is not None:
        return None
    else:
        mean = rstd = absent
    dx: Any
    dweight: Any
    if out is None:
        dx = empty(shape, dtype)
        dweight = empty(normalized_shape if with_dweight else 0, parameter)
        dbias = empty(normalized_shape if with_dbias else 0, parameter)
    elif not isinstance(out, tuple) or len(out) != 3:
        return None
    else:
        grads = []
        shapes, dtypes = (shape, row, row), (dtype, parameter, parameter)
        for grad, wanted, grad_shape, grad_dtype in zip(out, output_mask, shapes, dtypes, strict=True):
            if grad is None:
                grad = empty(grad_shape if wanted else 0, grad_dtype)
            elif not wanted or type(grad) is not ndarray or grad.shape != grad_shape or grad.dtype != grad_dtype:
                return None
            if not grad.flags.carray:
                return None
            grads.append(grad)
        dx, dweight, dbias = grads
        # dweight and dbias may overlap an input, which has been read when they are written
        if (
            (dx is not x and may_share_memory(dx, x))
            or (dx is not dy and may_share_memory(dx, dy))
            or may_share_memory(dx, weight)
            or may_share_memory(dx, mean)
            or may_share_memory(dx, rstd)
            or may_share_memory(dx, dweight)
            or may_share_memory(dx, dbias)
            or may_share_memory(dweight, dbias)
        ):
            return None
    if len(shape) == 2:
        dy_rows, x_rows, dx_rows = dy, x, dx
    else:
        dy_rows = dy.reshape(-1, normalized_shape)
        x_rows = x.reshape(-1, normalized_shape)
        dx_rows = dx.reshape(-1, normalized_shape)
    if stored is not None:
        dy_rows, x_rows, dx_rows = dy_rows.view(stored), x_rows.view(stored), dx_rows.view(stored)
    dweight_row, dbias_row = dweight, dbias
    if parameter != wide:
        dweight_row, dbias_row = dweight.view(stored), dbias.view(stored)
    block_rows = sizes.block_rows(len(x_rows), normalized_shape)
    sums = empty((with_dweight + with_dbias, -(-len(x_rows) // block_rows), normalized_shape))
    try:
        kernel(
            dy_rows, x_rows, weight, eps, mean, rstd, 0, block_rows, True, False, dx_rows, sums, dweight_row, dbias_row
        )  # fmt: skip
    except TypeError:
        # strides that a kernel does not take
        return None
    return dx, dweight if with_dweight else None, dbias if with_dbias else None

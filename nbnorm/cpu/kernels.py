"""The CPU kernels, each made by a factory for one set of compile-time choices.

A factory compiles for one pinned signature: C-contiguous arrays, inputs declared read-only, which both writable and
read-only arrays match. `dtype` is what a kernel computes in and what its parameters have, the widest of all operands; rows
may be narrower. What a kernel does not need (`has_weight=False`, say) it takes as an empty array.

The serial and the parallel build of a kernel give the same bits, since the loops over a row are compiled once, in `rows.py`.
"""

import functools
import hashlib
import inspect

import numpy as np
from numba import from_dtype, njit, prange, types

from nbnorm.cpu import rows
from nbnorm.cpu.rows import (
    add_parameter_gradients,
    centred,
    diff_of_squares,
    gradient_means,
    input_gradient,
    normalise,
    reciprocal_std,
)

# Numba's disk cache tells kernels apart by their own source and what they close over, not by the helpers that they call or
# by their options; a kernel closes over this and `parallel` for that reason alone
ROWS_SOURCE = hashlib.sha256(inspect.getsource(rows).encode()).hexdigest()


def _inputs(dtype, ndim):
    return types.Array(from_dtype(dtype), ndim, "C", readonly=True)


def _outputs(dtype, ndim):
    return types.Array(from_dtype(dtype), ndim, "C")


@functools.cache
def forward(x_dtype, dtype, has_weight, has_bias, variance, parallel):
    """One iteration owns row r and writes y[r] and, where these are not empty, mean[r] and rstd[r].

    Formula: Ba, Kiros and Hinton 2016, eq. 4; `variance` is "centred" or "diff_of_squares".
    """
    element = dtype.type
    build = f"{ROWS_SOURCE} parallel={parallel}"
    signature = types.void(
        _inputs(x_dtype, 2),  # x
        _inputs(dtype, 1),  # weight
        _inputs(dtype, 1),  # bias
        types.float64,  # eps
        _outputs(x_dtype, 2),  # y
        _outputs(x_dtype, 1),  # mean
        _outputs(x_dtype, 1),  # rstd
    )

    @njit(signature, parallel=parallel, nogil=True, error_model="numpy", cache=True)
    def kernel(x, weight, bias, eps, y, mean, rstd):
        build  # noqa: B018  closed over for the disk cache
        for r in prange(x.shape[0]):
            # statistics
            if variance == "centred":
                hi, lo, var = centred(x[r], element)
            else:
                hi, lo, var = diff_of_squares(x[r], element)
            scale = element(reciprocal_std(var, eps))
            if mean.size > 0:
                mean[r] = hi + lo
                rstd[r] = scale

            # normalise and store
            if has_weight and has_bias:
                normalise(x[r], hi, lo, scale, weight, bias, y[r])
            elif has_weight:
                normalise(x[r], hi, lo, scale, weight, None, y[r])
            elif has_bias:
                normalise(x[r], hi, lo, scale, None, bias, y[r])
            else:
                normalise(x[r], hi, lo, scale, None, None, y[r])

    return kernel


@functools.cache
def backward(dy_dtype, x_dtype, dtype, has_weight, statistics, output_mask, parallel):
    """Gradients of layer norm: one iteration owns a block of rows; it writes dx of each and adds to the block's own sums.

    `statistics` is "given" or the variance to recompute them by. Block b owns rows b * block_rows to (b + 1) * block_rows of
    the whole problem, of which x holds those from `first` on, and adds dy * x_hat to dweight[b] and dy to dbias[b].
    Formula: the derivative of eq. 4 of Ba, Kiros and Hinton 2016, as in llm.c's doc/layernorm.
    """
    element = dtype.type
    build = f"{ROWS_SOURCE} parallel={parallel}"
    with_dx, with_dweight, with_dbias = output_mask
    signature = types.void(
        _inputs(dy_dtype, 2),  # dy
        _inputs(x_dtype, 2),  # x
        _inputs(dtype, 1),  # weight
        types.float64,  # eps
        _inputs(dtype, 1),  # mean
        _inputs(dtype, 1),  # rstd
        types.int64,  # first
        types.int64,  # block_rows
        _outputs(x_dtype, 2),  # dx
        _outputs(np.dtype(np.float64), 2),  # dweight
        _outputs(np.dtype(np.float64), 2),  # dbias
    )

    @njit(signature, parallel=parallel, nogil=True, error_model="numpy", cache=True)
    def kernel(dy, x, weight, eps, mean, rstd, first, block_rows, dx, dweight, dbias):
        build  # noqa: B018  closed over for the disk cache
        last = first + x.shape[0]
        for b in prange(first // block_rows, (last + block_rows - 1) // block_rows):
            for r in range(max(b * block_rows, first) - first, min((b + 1) * block_rows, last) - first):
                # statistics
                if statistics == "given":
                    hi, lo, scale = mean[r], element(0), rstd[r]
                else:
                    if statistics == "centred":
                        hi, lo, var = centred(x[r], element)
                    else:
                        hi, lo, var = diff_of_squares(x[r], element)
                    scale = element(reciprocal_std(var, eps))

                # the sums over rows first: dx may overwrite dy or x
                if with_dweight and with_dbias:
                    add_parameter_gradients(dy[r], x[r], hi, lo, scale, dweight[b], dbias[b])
                elif with_dweight:
                    add_parameter_gradients(dy[r], x[r], hi, lo, scale, dweight[b], None)
                elif with_dbias:
                    add_parameter_gradients(dy[r], x[r], hi, lo, scale, None, dbias[b])

                # the means over the row
                if with_dx and has_weight:
                    mean_g, mean_gx, mean_x_hat = gradient_means(dy[r], x[r], hi, lo, scale, weight)
                elif with_dx:
                    mean_g, mean_gx, mean_x_hat = gradient_means(dy[r], x[r], hi, lo, scale, None)
                if with_dx and statistics != "given":
                    # 0 but for rounding, which a large mean of g would make visible
                    mean_gx -= mean_g * mean_x_hat

                # dx
                if with_dx and has_weight:
                    input_gradient(dy[r], x[r], hi, lo, scale, weight, mean_g, mean_gx, element, dx[r])
                elif with_dx:
                    input_gradient(dy[r], x[r], hi, lo, scale, None, mean_g, mean_gx, element, dx[r])

    return kernel

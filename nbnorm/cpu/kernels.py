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
    gradients_extreme,
    input_gradient,
    normalise,
    normalise_extreme,
    reciprocal_std,
    split,
)

# Numba's disk cache tells kernels apart by their own source and what they close over, not by the helpers that they call or
# by their options; a kernel closes over this and `parallel` for that reason alone
ROWS_DIGEST = hashlib.sha256(inspect.getsource(rows).encode()).hexdigest()

# where the variance is outside these bounds, a square or a deviation may be 0 or Inf in the type that the kernel computes in
VARIANCE_BOUNDS = {"float32": (2.0**-220, 2.0**210), "float64": (2.0**-960, 2.0**960)}


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
    cache_key = f"{ROWS_DIGEST} parallel={parallel}"
    smallest, largest = VARIANCE_BOUNDS[dtype.name]
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
        cache_key  # noqa: B018  closed over, for the disk cache
        row_weight = weight if has_weight else None
        row_bias = bias if has_bias else None
        for r in prange(x.shape[0]):
            # statistics
            if variance == "centred":
                hi, lo, var = centred(x[r], element)
            else:
                hi, lo, var = diff_of_squares(x[r], element)

            # normalise and store; NaN fails the comparison too
            if smallest <= var + eps <= largest:
                scale = element(reciprocal_std(var, eps))
                normalise(x[r], hi, lo, scale, row_weight, row_bias, y[r])
                row_mean, row_rstd = np.float64(hi) + np.float64(lo), np.float64(scale)
            else:
                row_mean, row_rstd = normalise_extreme(x[r], eps, row_weight, row_bias, y[r])
            if mean.size > 0:
                mean[r] = row_mean
                rstd[r] = row_rstd

    return kernel


@functools.cache
def backward(dy_dtype, x_dtype, dtype, statistics_dtype, has_weight, statistics, output_mask, parallel):
    """Gradients of layer norm: one iteration owns a block of rows; it writes dx of each and adds to the block's own sums.

    `statistics` is "given" or the variance to recompute them by. Block b owns rows b * block_rows to (b + 1) * block_rows of
    the whole problem, of which x holds those from `first` on, and adds dy * x_hat to dweight[b] and dy to dbias[b].
    Formula: the derivative of eq. 4 of Ba, Kiros and Hinton 2016, as in llm.c's doc/layernorm.
    """
    element = dtype.type
    cache_key = f"{ROWS_DIGEST} parallel={parallel}"
    smallest, largest = VARIANCE_BOUNDS[dtype.name]
    with_dx, with_dweight, with_dbias = output_mask
    needs_statistics = with_dx or with_dweight
    signature = types.void(
        _inputs(dy_dtype, 2),  # dy
        _inputs(x_dtype, 2),  # x
        _inputs(dtype, 1),  # weight
        types.float64,  # eps
        _inputs(statistics_dtype, 1),  # mean
        _inputs(statistics_dtype, 1),  # rstd
        types.int64,  # first
        types.int64,  # block_rows
        _outputs(x_dtype, 2),  # dx
        _outputs(np.dtype(np.float64), 2),  # dweight
        _outputs(np.dtype(np.float64), 2),  # dbias
    )

    @njit(signature, parallel=parallel, nogil=True, error_model="numpy", cache=True)
    def kernel(dy, x, weight, eps, mean, rstd, first, block_rows, dx, dweight, dbias):
        cache_key  # noqa: B018  closed over, for the disk cache
        row_weight = weight if has_weight else None
        last = first + x.shape[0]
        for b in prange(first // block_rows, (last + block_rows - 1) // block_rows):
            block_dweight = dweight[b] if with_dweight else None
            block_dbias = dbias[b] if with_dbias else None
            for r in range(max(b * block_rows, first) - first, min((b + 1) * block_rows, last) - first):
                row_dx = dx[r] if with_dx else None

                # statistics
                if not needs_statistics:
                    hi, lo, scale = element(0), element(0), element(0)
                elif statistics == "given":
                    hi, lo = split(np.float64(mean[r]), element)
                    scale = element(rstd[r])
                else:
                    if statistics == "centred":
                        hi, lo, var = centred(x[r], element)
                    else:
                        hi, lo, var = diff_of_squares(x[r], element)
                    if not smallest <= var + eps <= largest:
                        gradients_extreme(dy[r], x[r], eps, row_weight, row_dx, block_dweight, block_dbias)
                        continue
                    scale = element(reciprocal_std(var, eps))

                # the sums over rows first: dx may overwrite dy or x
                if with_dweight or with_dbias:
                    add_parameter_gradients(dy[r], x[r], hi, lo, scale, block_dweight, block_dbias)

                # the means over the row, and dx
                if with_dx:
                    mean_g, mean_gx, mean_x_hat = gradient_means(dy[r], x[r], hi, lo, scale, row_weight)
                    if statistics != "given":
                        # 0 but for rounding, which a large mean of g would make visible
                        mean_gx -= mean_g * mean_x_hat
                    input_gradient(dy[r], x[r], hi, lo, scale, row_weight, mean_g, mean_gx, scale, element, row_dx)

    return kernel

"""A call of JAX's programs as calls on NumPy arrays: for one sample, or for each of those that vmap has put together.

Arrays are x, dy, y and dx of two dimensions, rows and columns, the others of one; those that are absent have no elements. In
front of these, vmap has put dimensions, of 1 where all samples have the same array.
"""

import math

import numpy as np

import nbnorm
from nbnorm.cpu.workers import parallel


def forward(variance, eps, operands, results):
    """Write y, mean and rstd of x, weight and bias, into results that are given."""
    (all_x, *parameters), all_y = operands, results[0]
    is_one_call = _count(all_x, 2) == _count(all_y, 2) and all(_count(parameter, 1) == 1 for parameter in parameters)
    with parallel.another_librarys():
        for x, weight, bias, y, mean, rstd in _samples(is_one_call, (*operands, *results), all_y):
            cols = x.shape[-1]
            if variance == "mean_square":
                _, rstd[:, np.newaxis] = nbnorm.rms_norm(x, cols, weight, eps, out=y, return_stats=True)
            else:
                given = x, cols, weight, bias, eps, variance == "diff_of_squares"
                _, mean[:, np.newaxis], rstd[:, np.newaxis] = nbnorm.layer_norm(*given, out=y, return_stats=True)


def backward(variance, eps, operands, results):
    """Write dx, dweight and dbias of dy, x, weight, mean and rstd; those of no elements are not asked for."""
    (all_dy, all_x, all_weight, _, all_rstd), (all_dx, *sums) = operands, results
    asked = True, *(array.size > 0 for array in sums)
    samples = _count(all_dx, 2)
    are_alike = _count(all_dy, 2) == _count(all_x, 2) == _count(all_rstd, 1) == samples and _count(all_weight, 1) == 1
    is_one_call = are_alike and not any(asked[1:])
    with parallel.another_librarys():
        for dy, x, weight, mean, rstd, dx, dweight, dbias in _samples(is_one_call, (*operands, *results), all_dx):
            if weight is not None and dweight is not None:
                # it was widened
                weight = weight.astype(dweight.dtype, copy=False)
            given, rstd = (dy, x, x.shape[-1], weight, eps), rstd[:, np.newaxis]
            if variance == "mean_square":
                nbnorm.rms_norm_backward(*given, rstd=rstd, output_mask=asked[:2], out=(dx, dweight))
            else:
                statistics = {"mean": mean[:, np.newaxis], "rstd": rstd}
                nbnorm.layer_norm_backward(*given, **statistics, output_mask=asked, out=(dx, dweight, dbias))


# with how many operands and results
CALLS = {"forward": (forward, 3, 3), "backward": (backward, 5, 3)}


def _count(array, ndim):
    """How many samples have an array of their own."""
    return math.prod(array.shape[: array.ndim - ndim])


def _samples(is_one_call, arrays, of_all):
    """The arrays of each sample, None for those that are absent; of all at once where they are rows of one call."""
    ndims = [array.ndim - of_all.ndim + 2 for array in arrays]
    if is_one_call:
        arrays = [
            array.reshape(-1, *array.shape[array.ndim - ndim + 1 :]) for array, ndim in zip(arrays, ndims, strict=True)
        ]
    shape = () if is_one_call else of_all.shape[:-2]
    for index in np.ndindex(shape):
        yield [
            array[tuple(i if size > 1 else 0 for i, size in zip(index, array.shape, strict=False))] if array.size else None
            for array in arrays
        ]

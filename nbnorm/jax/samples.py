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
    x, weight, bias = operands
    y, mean, rstd = results
    can_be_one = _count(x, 2) == _count(y, 2) and _count(weight, 1) == _count(bias, 1) == 1
    with parallel.another_librarys():
        for x, weight, bias, y, mean, rstd in _samples(can_be_one, (x, weight, bias, y, mean, rstd), y):
            if variance == "mean_square":
                *_, rstd[:, np.newaxis] = nbnorm.rms_norm(x, x.shape[-1], weight, eps, out=y, return_stats=True)
            else:
                options = eps, variance == "diff_of_squares"
                _, mean[:, np.newaxis], rstd[:, np.newaxis] = nbnorm.layer_norm(
                    x, x.shape[-1], weight, bias, *options, out=y, return_stats=True
                )


def backward(variance, eps, operands, results):
    """Write dx, dweight and dbias of dy, x, weight, mean and rstd; those of no elements are not asked for."""
    dx, dweight, dbias = results
    asked = True, dweight.size > 0, dbias.size > 0
    can_be_one = all(_count(a, ndim) == _count(dx, 2) for a, ndim in zip(operands, (2, 2, 1, 1, 1)) if a is not operands[2])
    can_be_one = can_be_one and _count(operands[2], 1) == 1 and not any(asked[1:])
    with parallel.another_librarys():
        for dy, x, weight, mean, rstd, dx, dweight, dbias in _samples(can_be_one, (*operands, *results), dx):
            if weight is not None and dweight is not None:
                # which was widened
                weight = weight.astype(dweight.dtype, copy=False)
            given = dy, x, x.shape[-1], weight, eps
            rstd = rstd[:, np.newaxis]
            if variance == "mean_square":
                nbnorm.rms_norm_backward(*given, rstd=rstd, output_mask=asked[:2], out=(dx, dweight))
            else:
                mean = mean[:, np.newaxis]
                nbnorm.layer_norm_backward(*given, mean=mean, rstd=rstd, output_mask=asked, out=(dx, dweight, dbias))


# with how many operands and results
CALLS = {"forward": (forward, 3, 3), "backward": (backward, 5, 3)}


def _count(array, ndim):
    """How many samples have an array of their own."""
    return math.prod(array.shape[: array.ndim - ndim])


def _samples(are_one, arrays, of_all):
    """The arrays of each sample, None for those that are absent; of all at once where they are rows of one call."""
    ndims = [array.ndim - of_all.ndim + 2 for array in arrays]
    if are_one:
        arrays = [
            array.reshape(-1, *array.shape[array.ndim - ndim + 1 :]) for array, ndim in zip(arrays, ndims, strict=True)
        ]
    shape = () if are_one else of_all.shape[:-2]
    for index in np.ndindex(shape):
        yield [
            array[tuple(i if size > 1 else 0 for i, size in zip(index, array.shape, strict=False))] if array.size else None
            for array in arrays
        ]

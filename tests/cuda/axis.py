"""Norms over axes that are not the last: results with the axes at the end; how far off they are."""

import numpy as np

import nbnorm
from device import to_device, to_host
from tolerances import CUDA_GRADIENT_EPS, CUDA_STATISTICS_EPS, CUDA_Y_EPS, assert_grads, assert_statistics, assert_y


def sizes_along(x, axis):
    axes = axis if isinstance(axis, tuple) else (axis,)
    return tuple(x.shape[a] for a in axes)


def at_end(array, axis):
    """In C order with the axes at the end, as the oracle has them."""
    if array is None:
        return None
    array = array if isinstance(array, np.ndarray) else to_host(array)
    axes = axis if isinstance(axis, tuple) else (axis,)
    return np.ascontiguousarray(np.moveaxis(array, axes, range(-len(axes), 0)))


def placed(array):
    return None if array is None else to_device(array)


def sums_of(*arrays):
    return "float64" if any(a is not None and a.dtype == np.float64 for a in arrays) else "float32"


def assert_forward(results, x, axis, weight, bias, is_squares=False, is_rms=False):
    count = len(sizes_along(x, axis))
    y, rstd = at_end(results.y, axis), at_end(results.rstd, axis)
    assert results.y.shape == x.shape
    assert y.dtype == x.dtype
    sums = sums_of(x, weight, bias)
    rows = at_end(x, axis)
    narrow = x.dtype.itemsize == 2
    assert_y(y, rows, count, weight, bias, 1e-5, is_squares, 1 if narrow else CUDA_Y_EPS, sums, is_rms)
    mean = None if is_rms else at_end(results.mean, axis)
    assert rstd.shape == (*rows.shape[:-count], *(1,) * count)
    assert_statistics(mean, rstd, rows, count, 1e-5, is_squares, CUDA_STATISTICS_EPS, sums, is_rms)


def assert_backward(grads, dy, x, axis, weight, is_squares=False, is_rms=False, **given):
    count = len(sizes_along(x, axis))
    dx = None if grads.dx is None else at_end(grads.dx, axis)
    others = [None if grad is None else to_host(grad) for grad in grads[1:]]
    grads = nbnorm.functional.LayerNormGrads(dx, *others, *(None,) * is_rms)
    given = {name: at_end(array, axis) for name, array in given.items()}
    sums = {"sums": sums_of(dy, x, weight), "is_rms": is_rms}
    assert_grads(
        grads, at_end(dy, axis), at_end(x, axis), count, weight, 1e-5, is_squares, gradient_eps=CUDA_GRADIENT_EPS,
        **sums, **given,
    )  # fmt: skip

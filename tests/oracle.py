"""The oracle: the plain NumPy reference in longdouble, whatever the dtype of its input."""

import numpy as np

from nbnorm import reference

WIDE = np.longdouble


def forward(x, ndim, weight=None, bias=None, eps=1e-5, use_diff_of_squares=False, is_rms=False):
    x, weight, bias = map(_wide, (x, weight, bias))
    with np.errstate(all="ignore"):
        if is_rms:
            y, rstd = reference.rms_norm(x, ndim, weight, WIDE(eps))
            return y, np.zeros_like(rstd), rstd
        first = _first_of_row(x, ndim)
        y, mean, rstd = reference.layer_norm(x - first, ndim, weight, bias, eps, use_diff_of_squares)
        return y, mean + first, rstd


def backward(dy, x, ndim, weight=None, eps=1e-5, use_diff_of_squares=False, mean=None, rstd=None, is_rms=False):
    dy, x, weight, mean, rstd = map(_wide, (dy, x, weight, mean, rstd))
    with np.errstate(all="ignore"):
        if is_rms:
            return *reference.rms_norm_backward(dy, x, ndim, weight, WIDE(eps), rstd), None
        first = _first_of_row(x, ndim)
        mean = None if mean is None else mean - first
        return reference.layer_norm_backward(dy, x - first, ndim, weight, eps, use_diff_of_squares, mean, rstd)


def _wide(array):
    return None if array is None else np.asarray(array).astype(WIDE)


def _first_of_row(x, ndim):
    """What to subtract first: it changes neither y nor a gradient, and even longdouble loses digits at a mean of 1e6."""
    return x[(..., *(slice(1),) * ndim)] if x.size else WIDE(0)

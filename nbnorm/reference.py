"""Layer norm and RMS norm in plain NumPy, in the dtype of their input: what the kernels are checked against.

In float64 or longdouble this is the reference of `nbnorm check` and of the tests, in float32 it is what one would write
without this package. It makes no checks.
"""

import numpy as np


def layer_norm(x, ndim, weight=None, bias=None, eps=1e-5, use_diff_of_squares=False):
    """Returns y, mean and rstd for normalisation over the last `ndim` dimensions."""
    axes = tuple(range(-ndim, 0))
    mean = x.mean(axes, keepdims=True)
    if use_diff_of_squares:
        var = np.maximum((x * x).mean(axes, keepdims=True) - mean * mean, 0)
    else:
        var = ((x - mean) ** 2).mean(axes, keepdims=True)
    rstd = 1 / np.sqrt(var + eps)
    y = (x - mean) * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y, mean, rstd


def layer_norm_backward(dy, x, ndim, weight=None, eps=1e-5, use_diff_of_squares=False, mean=None, rstd=None):
    """Returns dx, dweight and dbias; recomputes mean and rstd where they are None."""
    axes = tuple(range(-ndim, 0))
    batch_axes = tuple(range(x.ndim - ndim))
    if mean is None:
        _, mean, rstd = layer_norm(x, ndim, eps=eps, use_diff_of_squares=use_diff_of_squares)
    x_hat = (x - mean) * rstd
    g = dy if weight is None else dy * weight
    dx = rstd * (g - g.mean(axes, keepdims=True) - x_hat * (g * x_hat).mean(axes, keepdims=True))
    return dx, (dy * x_hat).sum(batch_axes), dy.sum(batch_axes)


def rms_norm(x, ndim, weight=None, eps=0.0):
    """Returns y and rstd for normalisation over the last `ndim` dimensions."""
    rstd = 1 / np.sqrt((x * x).mean(tuple(range(-ndim, 0)), keepdims=True) + eps)
    y = x * rstd
    return (y if weight is None else y * weight), rstd


def rms_norm_backward(dy, x, ndim, weight=None, eps=0.0, rstd=None):
    """Returns dx and dweight; recomputes rstd where it is None."""
    if rstd is None:
        _, rstd = rms_norm(x, ndim, eps=eps)
    x_hat = x * rstd
    g = dy if weight is None else dy * weight
    dx = rstd * (g - x_hat * (g * x_hat).mean(tuple(range(-ndim, 0)), keepdims=True))
    return dx, (dy * x_hat).sum(tuple(range(x.ndim - ndim)))


def error_of_y(y, x, ndim, weight=None, bias=None, eps=1e-5, is_rms=False):
    """The largest error of y against this reference, of RMS norm or layer norm, computed in the dtype of x.

    In eps of y's dtype, of (|normalised part| + |bias| + 1).
    """
    scaled = (rms_norm(x, ndim, weight, eps) if is_rms else layer_norm(x, ndim, weight, None, eps))[0]
    shift = 0 if bias is None else bias
    error = np.max(np.abs(y.astype(x.dtype) - (scaled + shift)) / (np.abs(scaled) + np.abs(shift) + 1))
    # of which NumPy knows nothing
    return error / (2.0**-7 if y.dtype.name == "bfloat16" else np.finfo(y.dtype).eps)

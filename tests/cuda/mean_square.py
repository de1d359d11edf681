"""RMS norm on the device, and in longdouble on the host; and how far the one may be from the other."""

import numpy as np

import nbnorm
import oracle
import tolerances
from device import to_device, to_host
from tolerances import CUDA_GRADIENT_EPS, CUDA_STATISTICS_EPS, CUDA_Y_EPS, EPS, SMALLEST


def forward(x, weight=None, eps=1e-5, **options):
    """y and rstd of NumPy arrays, by way of the device."""
    results = nbnorm.rms_norm(to_device(x), x.shape[1], _placed(weight), eps, return_stats=True, **options)
    return [to_host(result) for result in results]


def backward(dy, x, weight=None, eps=1e-5, rstd=None, **options):
    grads = nbnorm.rms_norm_backward(
        *map(to_device, (dy, x)), x.shape[1], _placed(weight), eps, rstd=_placed(rstd), **options
    )
    return nbnorm.functional.RMSNormGrads(*(None if grad is None else to_host(grad) for grad in grads))


@np.errstate(all="ignore")
def exact_forward(x, weight=None, eps=1e-5):
    x, weight = _wide(x), 1 if weight is None else _wide(weight)
    rstd = 1 / np.sqrt((x * x).mean(1, keepdims=True) + oracle.WIDE(eps))
    return x * rstd * weight, rstd


@np.errstate(all="ignore")
def exact_backward(dy, x, weight=None, eps=1e-5, rstd=None):
    """dx and dweight."""
    dy, x = _wide(dy), _wide(x)
    g = dy if weight is None else dy * _wide(weight)
    rstd = exact_forward(x, eps=eps)[1] if rstd is None else _wide(rstd)
    x_hat = x * rstd
    return rstd * (g - x_hat * (g * x_hat).mean(1, keepdims=True)), (dy * x_hat).sum(0)


@np.errstate(all="ignore")
def assert_y(y, rstd, x, weight=None, eps=1e-5):
    """Nothing is subtracted: y is within 16 eps of itself, a 16-bit one within 1, and rstd within 16."""
    exact, exact_rstd = exact_forward(x, weight, eps)
    name = np.asarray(y).dtype.name
    y_eps = CUDA_Y_EPS if name in ("float32", "float64") else 1
    scales = 1 if weight is None else np.abs(_wide(weight))
    tolerances._assert_close("y", y, exact, y_eps * EPS[name] * np.abs(exact) + SMALLEST[name] * scales)
    tolerances._assert_close("rstd", rstd, exact_rstd, CUDA_STATISTICS_EPS * EPS[rstd.dtype.name] * exact_rstd)


@np.errstate(all="ignore")
def assert_grads(grads, dy, x, weight=None, eps=1e-5, rstd=None):
    """dx within 16 eps of the row's largest of the two terms that it is a difference of; dweight as in `tolerances`."""
    dx, dweight = grads
    exact_dx, exact_dweight = exact_backward(dy, x, weight, eps, rstd)
    dy, x = _wide(dy), _wide(x)
    g = dy if weight is None else dy * _wide(weight)
    rstd = exact_forward(x, eps=eps)[1] if rstd is None else _wide(rstd)
    x_hat = x * rstd
    if dx is not None:
        largest = np.abs(g).max(1, keepdims=True)
        largest = largest + np.abs(x_hat).max(1, keepdims=True) * np.abs(g * x_hat).mean(1, keepdims=True)
        allowed = CUDA_GRADIENT_EPS * EPS[dx.dtype.name] * np.abs(rstd) * largest
        tolerances._assert_close("dx", dx, exact_dx, allowed)
    if dweight is not None:
        root = np.sqrt((dy * x_hat * dy * x_hat).sum(0))
        allowed = CUDA_GRADIENT_EPS * EPS[dweight.dtype.name] * (np.abs(exact_dweight) + root)
        tolerances._assert_close("dweight", dweight, exact_dweight, allowed)


def _placed(array):
    return None if array is None else to_device(array)


def _wide(array):
    return np.asarray(array).astype(oracle.WIDE)

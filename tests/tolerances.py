"""How far a result may be from the oracle, derived from the dtype it is stored in.

eps is the distance from 1 to the next number of the dtype; a correctly rounded result is within eps / 2.
"""

import math
import sys

import numpy as np

import oracle
from nbnorm.cpu import sizes

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}

# the smallest number above 0, of which subnormal results are multiples
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}
LARGEST = {
    "float16": 65504.0,
    "bfloat16": 2.0**128 - 2.0**120,
    "float32": 2.0**128 - 2.0**104,
    "float64": sys.float_info.max,
}

# y is rounded at the subtraction of the mean, the products with rstd and weight, and the sum with bias: half an eps each
# of the part that is there, and one more for rstd itself
Y_EPS = 4
# dx is a difference of three terms, each rounded as often as y
GRADIENT_EPS = 8
# mean(x²) and mean(x)² are each within a few eps of the type that they are computed in, relative to themselves and not to
# their difference
SQUARES_EPS = 4
# CUDA kernels compute in float32 throughout: sums of up to 32 elements in a thread, then of pairs, and a mean in two parts
CUDA_Y_EPS = 16
CUDA_STATISTICS_EPS = 16
CUDA_GRADIENT_EPS = 16


@np.errstate(all="ignore")
def assert_y(
    y, x, ndim, weight=None, bias=None, eps=1e-5, use_diff_of_squares=False, y_eps=Y_EPS, sums="float64", is_rms=False
):
    """|y - exact| <= 4 eps (|normalised part| + |bias| + 1), with NaN and Inf where the oracle has them.

    That is `y_eps`, where the sums that statistics come from are of the type `sums`.
    """
    scaled = oracle.forward(x, ndim, weight, None, eps, is_rms=is_rms)[0]
    exact = oracle.forward(x, ndim, weight, bias, eps, is_rms=is_rms)[0]
    shift = 0 if bias is None else np.abs(np.asarray(bias).astype(oracle.WIDE))
    allowed = y_eps * EPS[np.asarray(y).dtype.name] * (np.abs(scaled) + shift + 1)
    if use_diff_of_squares:
        # the mean is one number of that type, but for float32 rows summed in float64
        _, mean, rstd = oracle.forward(x, ndim, eps=eps)
        weights = 1 if weight is None else np.abs(np.asarray(weight).astype(oracle.WIDE))
        allowed = allowed + _rstd_error(x, ndim, eps, sums) * np.abs(scaled)
        allowed = allowed + y_eps / 2 * EPS[sums] * np.abs(mean * rstd) * weights
    _assert_close("y", y, exact, allowed)


@np.errstate(all="ignore")
def assert_statistics(
    mean, rstd, x, ndim, eps=1e-5, use_diff_of_squares=False, statistics_eps=2, sums="float64", is_rms=False
):
    """Mean within 2 eps of the row's largest element, rstd within 2 of itself; 8 of short 16-bit rows, with float32 sums.

    RMS norm has no mean.
    """
    x = np.asarray(x)
    if x.dtype.itemsize == 2 and math.prod(x.shape[x.ndim - ndim :]) < sizes.SHORT_16_BIT_ROW:
        statistics_eps = max(statistics_eps, 8)
    _, exact_mean, exact_rstd = oracle.forward(x, ndim, eps=eps, is_rms=is_rms)
    if not is_rms:
        scale = np.abs(x.astype(oracle.WIDE)).max(tuple(range(-ndim, 0)), keepdims=True, initial=0)
        _assert_close("mean", mean, exact_mean, statistics_eps * EPS[mean.dtype.name] * scale)
    relative = statistics_eps * EPS[rstd.dtype.name] + (_rstd_error(x, ndim, eps, sums) if use_diff_of_squares else 0)
    _assert_close("rstd", rstd, exact_rstd, relative * exact_rstd)


@np.errstate(all="ignore")
def assert_grads(
    grads, dy, x, ndim, weight=None, eps=1e-5, use_diff_of_squares=False, cancels=True,
    gradient_eps=GRADIENT_EPS, sums="float64", mean=None, rstd=None, rows_alike=False, is_rms=False,
):  # fmt: skip
    """Within 8 eps: dx of |dx| + the row's largest |dx|; dweight and dbias of themselves + the root of their terms' squares,
    as random sums grow.

    That is `gradient_eps`, where the sums that statistics come from are of the type `sums`.

    With `cancels`, dx may be small against the terms that it is a difference of, and is measured against the largest of
    them: no arithmetic in the dtype can do better for, say, rows of two elements, whose dx is nearly zero.

    With `rows_alike`, all additions of a float64 sum over n rows may be rounded the same way: by n / 4 eps of it in all.
    """
    exact_dx, exact_dweight, exact_dbias = oracle.backward(dy, x, ndim, weight, eps, mean=mean, rstd=rstd, is_rms=is_rms)
    dy = np.asarray(dy).astype(oracle.WIDE)
    g = dy if weight is None else dy * np.asarray(weight).astype(oracle.WIDE)
    is_given = rstd is not None
    if is_given:
        mean, rstd = (0 if array is None else np.asarray(array).astype(oracle.WIDE) for array in (mean, rstd))
        x_hat = (np.asarray(x).astype(oracle.WIDE) - mean) * rstd
    else:
        x_hat, _, rstd = oracle.forward(x, ndim, eps=eps, is_rms=is_rms)
    rstd_error = _rstd_error(x, ndim, eps, sums) if use_diff_of_squares else 0
    if grads.dx is not None:
        axes = tuple(range(-ndim, 0))
        largest = np.abs(exact_dx).max(axes, keepdims=True, initial=0)
        if cancels:
            largest = largest + rstd * np.abs(g).max(axes, keepdims=True, initial=0)
        if is_given:
            # x_hat may be any number then
            scale = np.abs(x_hat).max(axes, keepdims=True, initial=0) * np.abs(g * x_hat).mean(axes, keepdims=True)
            largest = largest + np.abs(rstd) * scale
        relative = gradient_eps * EPS[grads.dx.dtype.name] + rstd_error
        _assert_close("dx", grads.dx, exact_dx, relative * (np.abs(exact_dx) + largest))
    for name, value, exact, terms in (
        ("dweight", grads.dweight, exact_dweight, dy * np.maximum(np.abs(x_hat), 1)),
        ("dbias", None if is_rms else grads.dbias, exact_dbias, dy),
    ):
        if value is not None:
            relative = gradient_eps * EPS[value.dtype.name] + np.max(rstd_error, initial=0)
            batch = tuple(range(terms.ndim - ndim))
            root = np.sqrt((terms * terms).sum(batch))
            additions = EPS["float64"] / 4 * len(terms) * np.abs(terms).sum(batch) if rows_alike else 0
            _assert_close(name, value, exact, relative * (np.abs(exact) + root) + additions)


def _rstd_error(x, ndim, eps, sums="float64"):
    """The relative error of rstd that difference of squares may add: that of the variance, which is rstd² times it."""
    _, mean, rstd = oracle.forward(x, ndim, eps=eps)
    return SQUARES_EPS * EPS[sums] * (mean**2 * rstd**2 + 1)


def _assert_close(name, value, exact, tolerance):
    value = np.asarray(value)
    assert value.shape == exact.shape, f"{name}: shape {value.shape}, the oracle's is {exact.shape}"
    rounded = exact.astype(value.dtype)
    is_nan = np.isnan(rounded)
    assert np.array_equal(np.isnan(value), is_nan), f"{name}: NaN elsewhere than in the oracle"
    error = np.abs(value.astype(oracle.WIDE) - exact)
    allowed = np.broadcast_to(tolerance + SMALLEST[value.dtype.name], exact.shape)
    # what is nearly too large may be Inf
    is_inf = np.isinf(value) & (np.abs(exact) + allowed >= LARGEST[value.dtype.name])
    is_right = (error <= allowed) | (value == rounded) | is_inf | is_nan
    for wrong in np.argwhere(~is_right)[:1]:
        at = tuple(wrong)
        raise AssertionError(f"{name}: {value[at]} at {at}, the oracle has {exact[at]:.9g}, allowed are {allowed[at]:.3g}")

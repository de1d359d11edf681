"""Every eps that a call takes, and rows of every size: what the tests of both devices sweep."""

import sys

import numpy as np

import oracle
from tolerances import EPS, LARGEST, SMALLEST, assert_grads, assert_statistics, assert_y

EPSILONS = (0.0, 5e-324, 2.2e-308, 1e-60, 1e-45, 1e-38, 1e-5, 1.0, 1e38, 1e50, 1e300, sys.float_info.max)
# of 3, a row is rescaled by 1
SCALES = (1e-310, 1e-160, 1e-40, 1e-21, 1e-7, 1.0, 3.0, 6e4, 1e25, 1e38, 1e160, 1e308)


def rows(rng, dtype, cols, eps):
    """Of each scale that the dtype has, one with a mean near 0; and one of equal elements, which an eps of 0 makes NaN."""
    name = np.dtype(dtype).name
    scales = np.array([scale for scale in SCALES if SMALLEST[name] * 8 < scale <= LARGEST[name]])
    with np.errstate(under="ignore"):
        x = (rng.uniform(-1, 1, (scales.size, cols)) * scales[:, None]).astype(dtype)
    return np.concatenate([x, np.broadcast_to(x[:, :1], x.shape)]) if eps > 0 else x


@np.errstate(all="ignore")
def assert_forward(y, mean, rstd, x, eps, use_diff_of_squares, y_eps, statistics_eps, sums):
    """Also relative to the row's largest y, which is far below 1 where eps is far above the variance."""
    assert_y(y, x, 1, None, None, eps, use_diff_of_squares, y_eps, sums)
    assert_statistics(mean, rstd, x, 1, eps, use_diff_of_squares, statistics_eps, sums)
    exact, _, exact_rstd = oracle.forward(x, 1, eps=eps)
    error = np.abs(np.asarray(y).astype(oracle.WIDE) - exact).max(1)
    name = np.asarray(y).dtype.name
    allowed = 2 * y_eps * EPS[name] * np.abs(exact).max(1) + 2 * SMALLEST[name] * np.maximum(exact_rstd[:, 0], 1)
    assert (error <= allowed).all(), f"y: off by {error} of {np.abs(exact).max(1)}"


def assert_backward(grads, dy, x, weight, eps, use_diff_of_squares, gradient_eps, sums):
    assert_grads(grads, dy, x, 1, weight, eps, use_diff_of_squares, gradient_eps=gradient_eps, sums=sums)

"""Is every eps that the checks accept the one that kernels add, beside rows of every size?"""

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from levels import deep
from magnitudes import EPSILONS, assert_backward, assert_forward, rows

DTYPES = [np.float32, *deep(np.float64, np.float16, ml_dtypes.bfloat16)]


def assert_right(rng, x, weight_dtype, eps, use_diff_of_squares):
    cols = x.shape[1]
    with np.errstate(under="ignore"):
        dy = rng.standard_normal(x.shape).astype(x.dtype)
    weight = rng.standard_normal(cols).astype(weight_dtype)
    y, mean, rstd = nbnorm.layer_norm(x, cols, eps=eps, use_diff_of_squares=use_diff_of_squares, return_stats=True)
    assert_forward(y, mean, rstd, x, eps, use_diff_of_squares, y_eps=4, statistics_eps=2, sums="float64")
    grads = nbnorm.layer_norm_backward(dy, x, cols, weight, eps, use_diff_of_squares)
    assert_backward(grads, dy, x, weight, eps, use_diff_of_squares, gradient_eps=8, sums="float64")


@pytest.mark.parametrize("use_diff_of_squares", [False, *deep(True)])
# sixteen rows a step, and one
@pytest.mark.parametrize("cols", [24, *deep(300)])
@pytest.mark.parametrize("weight_dtype", [np.float32, *deep(np.float64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_eps(rng, dtype, weight_dtype, cols, use_diff_of_squares):
    for eps in EPSILONS:
        assert_right(rng, rows(rng, dtype, cols, eps), weight_dtype, eps, use_diff_of_squares)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cols", [24, 300])
def test_minus_zero_is_zero(rng, dtype, cols):
    """Of a constant row rstd was -Inf."""
    x = rows(rng, dtype, cols, 0.0)
    x[0] = 7
    with np.errstate(all="ignore"):
        results = []
        for eps in (0.0, -0.0):
            results.append(
                nbnorm.layer_norm(x, cols, eps=eps, return_stats=True) + nbnorm.layer_norm_backward(x, x, cols, eps=eps)
            )
    for array, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(array, expected)
    assert (results[0][2] > 0).all()


@pytest.mark.deep
@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_long_rows(rng, dtype):
    for eps in (0.0, 1e-60, 1e300):
        # of equal elements, too
        assert_right(rng, rows(rng, dtype, 70_000, eps)[::3].copy(), dtype, eps, False)

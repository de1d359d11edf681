"""Is every eps that the checks accept the one that CUDA kernels add, beside rows of every size?"""

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from device import DTYPES, normal, to_device, to_host
from magnitudes import EPSILONS, assert_backward, assert_forward, rows
from nbnorm.cuda import sizes
from tolerances import CUDA_GRADIENT_EPS, CUDA_STATISTICS_EPS, CUDA_Y_EPS, assert_statistics, assert_y

pytestmark = pytest.mark.hardware


def assert_right(rng, x, weight_dtype, eps, use_diff_of_squares):
    cols, dtype = x.shape[1], x.dtype.type
    dy, weight = normal(rng, x.shape, dtype), normal(rng, cols, weight_dtype)
    is_wide = np.float64 in (dtype, weight_dtype)
    sums = "float64" if is_wide else "float32"
    narrow = dtype in (np.float16, ml_dtypes.bfloat16)
    arguments = cols, None, None, eps, use_diff_of_squares
    results = [to_host(result) for result in nbnorm.layer_norm(to_device(x), *arguments, return_stats=True)]
    y_eps = 1 if narrow else CUDA_Y_EPS
    # without weight and bias, float64 or not
    assert_forward(
        *results, x, eps, use_diff_of_squares, y_eps, CUDA_STATISTICS_EPS, "float64" if dtype == np.float64 else "float32"
    )
    results = nbnorm.layer_norm_backward(*map(to_device, (dy, x)), cols, to_device(weight), eps, use_diff_of_squares)
    grads = nbnorm.functional.LayerNormGrads(*map(to_host, results))
    assert_backward(grads, dy, x, weight, eps, use_diff_of_squares, CUDA_GRADIENT_EPS, sums)


@pytest.mark.parametrize("eps", EPSILONS)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "use_diff_of_squares"),
    [*((dtype, dtype, False) for dtype in DTYPES), (np.float32, np.float64, False)]
    + [(dtype, dtype, True) for dtype in (np.float32, np.float64)],
)
def test_whole_rows(rng, dtype, weight_dtype, use_diff_of_squares, eps):
    # a part of a warp, of which others have rows of another scale
    assert_right(rng, rows(rng, dtype, 24, eps), weight_dtype, eps, use_diff_of_squares)


@pytest.mark.parametrize(
    ("dtype", "eps"),
    [(np.float32, eps) for eps in (0.0, 1e-60, 1e-5, 1e50, 1e300)] + [(np.float64, eps) for eps in (5e-324, 1e300)],
)
def test_long_rows(rng, short_segments, dtype, eps):
    # of equal elements, too, and for the simulator's sake not all
    x = rows(rng, dtype, short_segments, eps)[1::3].copy()
    assert_right(rng, x, dtype, eps, False)


def test_means_of_segments_whose_squares_overflow(short_segments):
    # the elements of each are equal, so that no segment is extreme by its own variance
    _, segment_cols = sizes.segments(short_segments, 4, "forward")
    x = np.where(np.arange(short_segments) < segment_cols, np.float32(1e20), np.float32(-1e20))[None]
    y, mean, rstd = map(to_host, nbnorm.layer_norm(to_device(x), short_segments, return_stats=True))
    assert_y(y, x, 1, y_eps=CUDA_Y_EPS)
    assert_statistics(mean, rstd, x, 1, statistics_eps=CUDA_STATISTICS_EPS)

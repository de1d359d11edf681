"""Is y right on CUDA arrays, for every combination of dtypes, parameters and modes, row length, and extreme row?"""

import itertools

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from device import DTYPES, SHAPES, large, normal, to_device, to_host
from tolerances import CUDA_STATISTICS_EPS, CUDA_Y_EPS, assert_statistics, assert_y

pytestmark = pytest.mark.hardware

# the first that a block cannot hold; vectors and single elements
LONG_SHAPES = [(2, 32776), (1, 32769)]


def layer_norm(x, cols, weight=None, bias=None, *arguments, **options):
    """Of NumPy arrays, by way of the device."""
    operands = [None if array is None else to_device(array) for array in (weight, bias)]
    results = nbnorm.layer_norm(to_device(x), cols, *operands, *arguments, **options)
    return [to_host(result) for result in (results if isinstance(results, tuple) else (results,))]


def tolerances(dtype, *parameters):
    """The arguments of the assertions, for float64 the same as on the CPU but for sums that are plain."""
    is_wide = any(array is not None and array.dtype == np.float64 for array in (np.empty(0, dtype), *parameters))
    narrow = dtype in (np.float16, ml_dtypes.bfloat16)
    return {"y_eps": 1 if narrow else CUDA_Y_EPS, "sums": "float64" if is_wide else "float32"}


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_product(rng, dtype, use_diff_of_squares, rows, cols):
    x = normal(rng, (rows, cols), dtype) * dtype(3) + dtype(1)
    # half of them in each mode, which is the same from the statistics on
    parameters = list(itertools.product([None, dtype, np.float32, np.float64], repeat=2))
    for weight_dtype, bias_dtype in parameters[use_diff_of_squares::2]:
        weight = None if weight_dtype is None else normal(rng, cols, weight_dtype)
        bias = None if bias_dtype is None else normal(rng, cols, bias_dtype)
        y, mean, rstd = layer_norm(x, cols, weight, bias, 1e-3, use_diff_of_squares, return_stats=True)
        assert y.dtype == dtype
        assert mean.dtype == rstd.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert mean.shape == rstd.shape == (rows, 1)
        allowed = tolerances(dtype, weight, bias)
        assert_y(y, x, 1, weight, bias, 1e-3, use_diff_of_squares, **allowed)
        sums = {"statistics_eps": CUDA_STATISTICS_EPS, "sums": allowed["sums"]}
        assert_statistics(mean, rstd, x, 1, 1e-3, use_diff_of_squares, **sums)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("use_diff_of_squares", [False, True])
def test_order_of_threads(rng, order, use_diff_of_squares, rows, cols):
    x, weight, bias = normal(rng, (rows, cols), np.float32), *normal(rng, (2, cols), np.float32)
    (y,) = layer_norm(x, cols, weight, bias, 1e-5, use_diff_of_squares)
    assert_y(y, x, 1, weight, bias, 1e-5, use_diff_of_squares, **tolerances(np.float32))


@pytest.mark.large
@pytest.mark.parametrize(("rows", "cols"), LONG_SHAPES)
@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_no_block_holds(rng, dtype, use_diff_of_squares, rows, cols):
    # a mean that drifts, which the segments have each their own of
    x = normal(rng, (rows, cols), dtype) + np.linspace(0, 9, cols).astype(dtype)
    weight, bias = rng.standard_normal((2, cols)).astype(np.float32)
    y, mean, rstd = layer_norm(x, cols, weight, bias, 1e-3, use_diff_of_squares, return_stats=True)
    allowed = tolerances(dtype)
    assert_y(y, x, 1, weight, bias, 1e-3, use_diff_of_squares, **allowed)
    sums = {"statistics_eps": CUDA_STATISTICS_EPS, "sums": allowed["sums"]}
    assert_statistics(mean, rstd, x, 1, 1e-3, use_diff_of_squares, **sums)


@pytest.mark.parametrize("cols", [7, 768, 2500, large(32776)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e3, 1e30])
@pytest.mark.parametrize("mean", [0, 1, 1e3])
def test_magnitudes_and_means(rng, cols, scale, mean):
    x = ((rng.standard_normal((2, cols)) + mean) * scale).astype(np.float32)
    # an eps that leaves the smallest rows normalised
    (y,) = layer_norm(x, cols, eps=0.0 if scale < 1 else 1e-5)
    assert_y(y, x, 1, eps=0.0 if scale < 1 else 1e-5, y_eps=CUDA_Y_EPS)


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_larger_means_are_as_good_as_the_rounding_of_x(rng, mean):
    x = (rng.standard_normal((4, 768)) + mean).astype(np.float32)
    (y,) = layer_norm(x, 768)
    assert_y(y, x, 1, y_eps=CUDA_Y_EPS)


@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("cols", [5, 256, 2500])
def test_finite_rows_are_never_nan(dtype, cols, use_diff_of_squares):
    for eps in (1e-5, 1e-300, 1e300):
        (y,) = layer_norm(extreme_rows(dtype, cols), cols, None, None, eps, use_diff_of_squares)
        assert np.isfinite(y.astype(np.float64)).all()


@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_finite_long_rows_are_never_nan(short_segments, dtype, use_diff_of_squares):
    x = extreme_rows(dtype, short_segments)
    (y,) = layer_norm(x, short_segments, None, None, 1e-300, use_diff_of_squares)
    assert np.isfinite(y.astype(np.float64)).all()


def extreme_rows(dtype, cols):
    largest = float(ml_dtypes.finfo(dtype).max)
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    rows = [np.full(cols, value) for value in (0, 1, -3e5, largest, tiny, 255.0)]
    rows += [np.where(np.arange(cols) % 2 == 0, value, -value) for value in (largest, tiny, 1e-20)]
    rows.append(np.where(np.arange(cols) == 1, largest, 0))
    return np.stack(rows).astype(dtype)


@pytest.mark.parametrize("cols", [5, 64, 2500, large(32776)])
def test_nan_and_inf_stay_in_their_rows(rng, cols):
    x = rng.standard_normal((5, cols)).astype(np.float32)
    (expected,) = layer_norm(x, cols)
    x[1, 0], x[2, cols - 1], x[4, cols // 2] = np.nan, np.inf, -np.inf
    (y,) = layer_norm(x, cols)
    assert np.isnan(y[[1, 2, 4]]).all()
    np.testing.assert_array_equal(y[[0, 3]], expected[[0, 3]])


@pytest.mark.parametrize("cols", [6, 64, 300, 2500])
def test_a_row_is_the_same_in_any_batch(rng, order, cols):
    rows = 9
    x = rng.standard_normal((rows, cols)).astype(np.float32)
    # an extreme one must not change its neighbours
    x[1] *= np.float32(1e30)
    weight = rng.standard_normal(cols).astype(np.float32)
    y, mean, rstd = layer_norm(x, cols, weight, return_stats=True)
    for r in range(rows):
        for whole, alone in zip((y, mean, rstd), layer_norm(x[r : r + 1], cols, weight, return_stats=True), strict=True):
            np.testing.assert_array_equal(alone, whole[r : r + 1])
    backwards = np.ascontiguousarray(x[::-1])
    np.testing.assert_array_equal(layer_norm(backwards, cols, weight)[0], y[::-1])


@pytest.mark.large
def test_a_long_row_is_the_same_in_any_batch(rng):
    x = rng.standard_normal((2, 32776)).astype(np.float32)
    x[1] *= np.float32(1e30)
    np.testing.assert_array_equal(layer_norm(x[1:], 32776)[0], layer_norm(x, 32776)[0][1:])


def test_zero_rows_and_zero_columns():
    y, mean, rstd = layer_norm(np.empty((0, 8), np.float32), 8, return_stats=True)
    assert y.shape == (0, 8)
    assert mean.shape == rstd.shape == (0, 1)
    y, mean, rstd = layer_norm(np.empty((3, 0), np.float32), 0, return_stats=True)
    assert y.shape == (3, 0)
    assert mean.shape == (3, 1)
    assert np.isnan(mean).all()
    assert np.isnan(rstd).all()


def test_several_normalized_dimensions(rng):
    x = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    weight = rng.standard_normal((4, 5)).astype(np.float32)
    y, mean, _ = layer_norm(x, (4, 5), weight, return_stats=True)
    assert mean.shape == (2, 3, 1, 1)
    assert_y(y, x, 2, weight, y_eps=CUDA_Y_EPS)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16, np.int16, bool])
def test_integers_become_float64(rng, dtype):
    x = rng.integers(0, 2 if dtype is bool else 100, (3, 8)).astype(dtype)
    (y,) = layer_norm(x, 8, rng.integers(0, 5, 8).astype(np.int32))
    assert y.dtype == np.float64
    np.testing.assert_allclose(layer_norm(x, 8)[0], nbnorm.layer_norm(x, 8), rtol=1e-13, atol=1e-13)

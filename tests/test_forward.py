"""Is y right, for every combination of dtype, parameters and mode, and on rows that are hard to normalise?"""

import itertools

import ml_dtypes
import numpy as np
import pytest

import nbnorm
import oracle
from levels import deep
from nbnorm.cpu.workers.parallel import NUMBAS
from tolerances import assert_statistics, assert_y

DTYPES = [np.float32, *deep(np.float64, np.float16, ml_dtypes.bfloat16)]

# (shape, normalized_shape): one element; fewer than a vector; a vector and a rest; two normalized dimensions; more rows than
# a block of the backward; a batch of two dimensions
SHAPES = [((1, 1), 1), ((3, 5), 5), ((4, 67), 67), ((2, 3, 4, 5), (4, 5)), ((70, 9), 9), ((3, 2, 16), (16,))]


@pytest.mark.parametrize(("shape", "normalized_shape"), SHAPES)
@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_mixed", [False, *deep(True)])
def test_full_product(rng, build, is_mixed, dtype, use_diff_of_squares, shape, normalized_shape):
    x = (3 * rng.standard_normal(shape) + 1).astype(dtype)
    row = shape[-np.size(normalized_shape) :]
    # the parallel build is of the same source; that it gives the same bits is tested elsewhere
    dtypes = [None, dtype, np.float32, np.float64] if is_mixed and build == "serial" else [None, np.float32]
    for weight_dtype, bias_dtype in itertools.product(dtypes, repeat=2):
        weight = None if weight_dtype is None else rng.standard_normal(row).astype(weight_dtype)
        bias = None if bias_dtype is None else rng.standard_normal(row).astype(bias_dtype)
        y, mean, rstd = nbnorm.layer_norm(x, normalized_shape, weight, bias, 1e-3, use_diff_of_squares, return_stats=True)
        assert type(y) is np.ndarray
        assert y.dtype == dtype
        assert mean.dtype == rstd.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert_y(y, x, len(row), weight, bias, 1e-3, use_diff_of_squares)
        assert_statistics(mean, rstd, x, len(row), 1e-3, use_diff_of_squares)


def test_difference_of_squares_loses_the_digits_that_its_formula_loses():
    # eps of 1e12 is 1e-4: what is left of the variance has four digits
    x = np.array([[1e6 + 0.1, 1e6 + 1.3, 1e6 + 2.7, 1e6 + 3.1]])
    _, _, rstd = nbnorm.layer_norm(x, 4, use_diff_of_squares=True, return_stats=True)
    _, _, centred = nbnorm.layer_norm(x, 4, return_stats=True)
    assert 1e-8 < abs(rstd / centred - 1) < 1e-2


@pytest.mark.parametrize(("shape", "parallel"), [((4, 200), False), ((64, 1024), True)])
def test_only_large_arrays_run_in_parallel(monkeypatch, the_long_way, shape, parallel):
    builds = []

    def ready(kernel, parallel):
        builds.append(parallel)
        return lambda *_: None

    monkeypatch.setattr("nbnorm.cpu.choice.ready", ready)
    # however busy this machine is
    monkeypatch.setattr("nbnorm.cpu.workers.parallel.is_crowded", lambda: False)
    monkeypatch.setattr("nbnorm.cpu.workers.parallel._paused_until", 0.0)
    monkeypatch.setattr("nbnorm.cpu.workers.parallel._is_decided", False)
    monkeypatch.setattr("nbnorm.cpu.workers.parallel.many", NUMBAS)
    x = np.ones(shape)
    nbnorm.layer_norm(x, shape[1])
    nbnorm.layer_norm_backward(x, x, shape[1])
    assert builds == [parallel] * 2


@pytest.mark.compiled
def test_large_arrays(rng):
    x = rng.standard_normal((300, 1000), dtype=np.float32)
    weight, bias = rng.standard_normal((2, 1000), dtype=np.float32)
    assert_y(nbnorm.layer_norm(x, 1000, weight, bias), x, 1, weight, bias)


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(lambda z: z + 1e3, id="mean 1e3"),
        pytest.param(lambda z: z + 1e4, id="mean 1e4"),
        pytest.param(lambda z: z + 1e6, id="mean 1e6"),
        pytest.param(lambda z: z * 1e-30, id="1e-30"),
        pytest.param(lambda z: z * 1e30, id="1e30"),
        pytest.param(lambda z: np.where(np.arange(z.shape[1]) == 3, 1e4, z), id="one outlier"),
        pytest.param(lambda z: np.full_like(z, 0.1), id="constant"),
        pytest.param(lambda z: z * 0 + np.arange(z.shape[1]), id="ramp"),
    ],
)
@pytest.mark.parametrize("cols", [5, 768])
def test_hard_rows_keep_their_digits(rng, rows, cols, dtype):
    x = rows(rng.standard_normal((24, cols))).astype(dtype)
    weight, bias = rng.standard_normal((2, cols)).astype(dtype)
    assert_y(nbnorm.layer_norm(x, cols, weight, bias), x, 1, weight, bias)


# float64 rows whose squares leave its range, far from 0: their mean and their deviation
FAR = [(1e155, 1e150), (1e160, 1e147), (-1e300, 1e290), (1e-150, 1e-156), (1e-140, 1e-150)]


@pytest.mark.parametrize(("mean", "deviation"), FAR)
@pytest.mark.parametrize("cols", [5, 1000])
def test_far_rows_whose_squares_leave_the_range_keep_their_digits(rng, mean, deviation, cols):
    x = mean + deviation * rng.standard_normal((3, cols))
    y, row_mean, rstd = nbnorm.layer_norm(x, cols, eps=0.0, return_stats=True)
    assert_y(y, x, 1, eps=0.0)
    assert_statistics(row_mean, rstd, x, 1, eps=0.0)


EXTREME = [
    pytest.param(np.float64, [1e154, 2e154, 3e154, 4e154], 1e-5, id="squares beyond float64"),
    pytest.param(np.float64, [1e308, 1.2e308, 1.3e308, 1.1e308], 1e-5, id="sum beyond float64"),
    pytest.param(np.float64, [1.7e308] * 4, 1e-5, id="constant, sum beyond float64"),
    pytest.param(np.float64, [-1.7e308, 1.7e308, 0, 1], 0, id="difference beyond float64"),
    pytest.param(np.float64, [1e-170, 2e-170, 3e-170, 4e-170], 0, id="squares vanish in float64"),
    pytest.param(np.float64, [1e-161, 2e-161, 3e-161, 4e-161], 0, id="squares lose digits in float64"),
    pytest.param(np.float64, [1e-170, 2e-170, 3e-170, 4e-170], 1e-300, id="eps is all that is left"),
    pytest.param(np.float64, [5e-324, 1e-323, 0, 2e-323], 0, id="subnormal float64"),
    pytest.param(np.float32, [3e38, -3e38, -3e38, -3e38], 1e-5, id="difference beyond float32"),
    pytest.param(np.float32, [1e-40, 2e-40, 3e-40, 4e-40], 0, id="rstd beyond float32"),
    pytest.param(np.float32, [1e-45, 3e-45, 0, 4e-45], 0, id="subnormal float32"),
]


@pytest.mark.parametrize(("dtype", "row", "eps"), EXTREME)
@pytest.mark.parametrize("use_diff_of_squares", [False, True])
def test_squares_that_leave_the_range_of_the_dtype(build, dtype, row, eps, use_diff_of_squares):
    x = np.array([row, [1, 2, 3, 5]], dtype)
    weight, bias = np.array([[1, 2, -1, 1], [0, 1, 0, -1]], np.float32)
    y, mean, _ = nbnorm.layer_norm(x, 4, weight, bias, eps, use_diff_of_squares, return_stats=True)
    assert_y(y, x, 1, weight, bias, eps, use_diff_of_squares)
    with np.errstate(under="ignore"):
        exact_mean = oracle.forward(x, 1)[1][0, 0].astype(dtype)
    # a sum of numbers that cancel, such as 1.7e308 and -1.7e308, may round them away
    np.testing.assert_allclose(mean[0, 0], exact_mean, rtol=0, atol=2.0**-52 * float(np.abs(x[0]).max()))


def test_256_with_one_255_is_finite_in_diff_of_squares():
    # TensorRT-LLM's difference of squares gives NaN here
    x = np.full((1, 10240), 256, np.float32)
    x[0, 77] = 255
    y = nbnorm.layer_norm(x, 10240, use_diff_of_squares=True)
    assert_y(y, x, 1, use_diff_of_squares=True)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e10, 255.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_diff_of_squares_of_constant_rows_is_never_nan(value, dtype):
    y = nbnorm.layer_norm(np.full((3, 1001), value, dtype), 1001, use_diff_of_squares=True)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_or_inf_stays_in_its_row(rng, build, bad, use_diff_of_squares):
    x = rng.standard_normal((5, 37), dtype=np.float32)
    clean = nbnorm.layer_norm(x, 37, use_diff_of_squares=use_diff_of_squares)
    x[2, 20] = bad
    y = nbnorm.layer_norm(x, 37, use_diff_of_squares=use_diff_of_squares)
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(y[others], clean[others])
    assert np.isnan(y[2]).all()
    x[2] = bad
    _, mean, rstd = nbnorm.layer_norm(x, 37, use_diff_of_squares=use_diff_of_squares, return_stats=True)
    np.testing.assert_array_equal([mean[2], rstd[2]], [[bad], [np.nan]])
    np.testing.assert_array_equal(np.isnan(oracle.forward(x, 1)[0]), np.isnan(y))


@pytest.mark.parametrize("use_diff_of_squares", [False, True])
def test_a_result_beyond_the_dtype_is_inf(use_diff_of_squares):
    x = np.array([[1, 2, 3, 1000]], np.float16)
    y = nbnorm.layer_norm(x, 4, np.full(4, 60000, np.float16), use_diff_of_squares=use_diff_of_squares)
    assert_y(y, x, 1, np.full(4, 60000))
    assert np.isposinf(y[0, 3])


def test_16_bit_rounds_to_nearest_even():
    # y = weight exactly where x_hat is 1: halfway between two float16, the even one is taken
    x = np.array([[-1, 1], [1, -1]], np.float16)
    halfway = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11], np.float32)
    y = nbnorm.layer_norm(x, 2, halfway, eps=0)
    np.testing.assert_array_equal(np.abs(y), np.array([[1, 1 + 2.0**-9]] * 2, np.float16))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_eps_zero_and_a_constant_row(dtype):
    # 0 / 0, as the formula says and as torch has it
    y = nbnorm.layer_norm(np.full((1, 8), 2, dtype), 8, eps=0)
    assert np.isnan(y).all()

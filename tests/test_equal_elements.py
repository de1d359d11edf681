"""Are rows whose elements are equal, nearly equal, or mostly equal as right as others?"""

import ml_dtypes
import numpy as np
import pytest

import nbnorm
import oracle
from levels import deep
from tolerances import EPS, assert_grads, assert_statistics, assert_y

COLS = [5, 100, 768, *deep(1)]
COLS += [pytest.param(cols, marks=[pytest.mark.compiled, pytest.mark.deep]) for cols in (4100, 65536, 100_001)]
# of x, of weight and bias, and the largest power of ten among the constants
DTYPES = [
    (np.float32, np.float32, 37),
    pytest.param(np.float64, np.float64, 300, marks=pytest.mark.deep),
    pytest.param(np.int64, np.float64, 18, marks=pytest.mark.deep),
    pytest.param(np.float32, np.float64, 37, marks=pytest.mark.deep),
    pytest.param(np.float16, np.float32, 4, marks=pytest.mark.deep),
    pytest.param(ml_dtypes.bfloat16, np.float32, 37, marks=pytest.mark.deep),
]
DTYPES_OF_ULPS = [
    (np.float32, np.float32),
    pytest.param(np.float64, np.float64, marks=pytest.mark.deep),
    pytest.param(np.float32, np.float64, marks=pytest.mark.deep),
]
ROWS = 5


def constants(rng, dtype, largest):
    """A column: of random signs and sizes, the first as large as can be."""
    least = 0 if dtype == np.int64 else -largest
    sizes = rng.uniform(least, largest, (ROWS, 1))
    sizes[0] = largest
    return (rng.choice([-1, 1], (ROWS, 1)) * 10.0**sizes).astype(dtype)


@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize(("dtype", "weight_dtype", "largest"), DTYPES)
def test_equal_elements_are_bias_exactly(rng, dtype, weight_dtype, largest, cols, use_diff_of_squares):
    c = constants(rng, dtype, largest)
    x = np.repeat(c, cols, axis=1)
    weight, bias = rng.standard_normal((2, cols)).astype(weight_dtype)
    for eps in (1e-5, 1e-60):
        y, mean, rstd = nbnorm.layer_norm(x, cols, weight, bias, eps, use_diff_of_squares, return_stats=True)
        with np.errstate(under="ignore"):
            np.testing.assert_array_equal(y, np.broadcast_to(bias.astype(y.dtype), y.shape))
        np.testing.assert_array_equal(mean, c.astype(mean.dtype))
        np.testing.assert_allclose(rstd.astype(np.float64), 1 / np.sqrt(eps), rtol=EPS[rstd.dtype.name])


@pytest.mark.parametrize("use_diff_of_squares", [False, *deep(True)])
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize(("dtype", "weight_dtype", "largest"), DTYPES)
def test_equal_elements_have_no_share_in_dweight(rng, dtype, weight_dtype, largest, cols, use_diff_of_squares):
    x = np.repeat(constants(rng, dtype, largest), cols, axis=1)
    dy = rng.standard_normal(x.shape).astype(weight_dtype)
    weight = rng.standard_normal(cols).astype(weight_dtype)
    _, mean, rstd = nbnorm.layer_norm(x, cols, return_stats=True)
    for given in ({}, {"mean": mean, "rstd": rstd}):
        grads = nbnorm.layer_norm_backward(dy, x, cols, weight, 1e-5, use_diff_of_squares, **given)
        assert (grads.dweight == 0).all()
        assert_grads(grads, dy, x, 1, weight)
        # and none in dx where g is constant too
        grads = nbnorm.layer_norm_backward(np.ones_like(dy), x, cols, None, 1e-5, use_diff_of_squares, **given)
        assert (grads.dx == 0).all()
        assert (grads.dweight == 0).all()


def test_one_row_of_equal_elements_leaves_the_dweight_of_a_batch_as_it_is(rng):
    x = rng.standard_normal((3, 4096))
    x[1] = 1e37
    dy = rng.standard_normal(x.shape)
    assert_grads(nbnorm.layer_norm_backward(dy, x, 4096), dy, x, 1)


@pytest.mark.parametrize("use_diff_of_squares", [False, *deep(True)])
@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES_OF_ULPS)
def test_elements_a_few_ulps_apart(rng, dtype, weight_dtype, cols, use_diff_of_squares):
    x = np.repeat(constants(rng, dtype, 30), cols, axis=1)
    # of all, of some, and of one element
    steps = rng.integers(0, 3, x.shape) * (rng.random(x.shape) < np.array([[1], [1], [0.5], [0.1], [0]]))
    steps[-1, cols // 2] = 1
    for least in (1, 2):
        x = np.where(steps >= least, np.nextafter(x, dtype(np.inf)), x)
    dy = rng.standard_normal(x.shape).astype(weight_dtype)
    weight, bias = rng.standard_normal((2, cols)).astype(weight_dtype)
    for eps in (1e-5, 1e-60):
        y, mean, rstd = nbnorm.layer_norm(x, cols, weight, bias, eps, use_diff_of_squares, return_stats=True)
        assert_y(y, x, 1, weight, bias, eps)
        assert_statistics(mean, rstd, x, 1, eps)
        grads = nbnorm.layer_norm_backward(dy, x, cols, weight, eps, use_diff_of_squares)
        assert_grads(grads, dy, x, 1, weight, eps)


def places(rng, rows, cols):
    """Where in rows of mostly one value the others are: anywhere, at an end, in the middle, or at every so many elements."""
    at = np.arange(cols)
    result = np.zeros((rows, cols), bool)
    for row in result:
        count = min(cols - 1, int(2 ** rng.uniform(0, np.log2(cols)))) if rng.random() < 0.5 else int(rng.integers(1, cols))
        start = rng.choice([0, cols - count, rng.integers(cols - count + 1)])
        period = int(rng.choice([2, 3, 7, 8, 16, 28, 32, 56, 64]))
        kind = rng.integers(5)
        if kind == 0:
            row[rng.choice(cols, count, replace=False)] = True
        elif kind == 1:
            row[start : start + count] = True
        elif kind == 2:
            row[(at + rng.integers(period)) % period < rng.integers(1, period)] = True
        elif kind == 3:
            # whole vectors, the same in each block
            row[:] = rng.choice([False, True], rng.choice([4, 8]))[at // 16 % 4]
        else:
            row[: count // 2 + 1] = row[cols - count // 2 :] = True
        if rng.random() < 0.3:
            # as near to each other as elements that are looked at first may be
            row[rng.choice(cols, min(cols, 8))] ^= True
    return result ^ (rng.random((rows, 1)) < 0.3)


def mostly_one_value(rng, rows, cols):
    """float32 rows of one value and some larger elements, equal ones or not."""
    value, factor = np.exp(2 * rng.standard_normal((2, rows, 1))) * rng.choice([-1, 1], (2, rows, 1))
    value = value * (rng.random((rows, 1)) < 0.8)
    larger = np.where(value == 0, factor, value * (1 + factor))
    larger = larger * np.where(rng.random((rows, 1)) < 0.2, rng.uniform(0.5, 1.5, (rows, cols)), 1)
    return np.where(places(rng, rows, cols), larger, value).astype(np.float32)


@pytest.mark.compiled
@pytest.mark.parametrize("use_diff_of_squares", [False, True])
def test_rows_that_are_mostly_one_value(rng, use_diff_of_squares):
    """2 eps for y and rstd: one by one, equal squares are rounded the same way, and were 4 eps off."""
    for cols in (16, 31, 64, 127, 128, 129, 191, 197, 255, 256, 384, 512, 768, 1000, 4096):
        for _ in range(4):
            x = mostly_one_value(rng, max(64, 50_000 // cols), cols)
            y, mean, rstd = nbnorm.layer_norm(x, cols, None, None, 1e-5, use_diff_of_squares, return_stats=True)
            assert_y(y, x, 1, y_eps=2)
            assert_statistics(mean, rstd, x, 1)


@pytest.mark.compiled
@pytest.mark.parametrize("use_diff_of_squares", [False, *deep(True)])
def test_gradients_of_rows_that_are_mostly_one_value(rng, use_diff_of_squares):
    for cols in (16, 31, 127, 128, 197, 255, 256, 768, 1000):
        for _ in range(2):
            x = mostly_one_value(rng, 24, cols)
            dy = rng.standard_normal(x.shape, dtype=np.float32)
            grads = nbnorm.layer_norm_backward(dy, x, cols, None, 1e-5, use_diff_of_squares)
            assert_grads(grads, dy, x, 1, gradient_eps=4)


def test_padding_of_a_reported_row():
    x = np.repeat(np.array([52.897762, 0.6393219], np.float32), [16, 496])[None]
    y, _, rstd = nbnorm.layer_norm(x, 512, return_stats=True)
    exact, _, exact_rstd = oracle.forward(x, 1)
    assert np.max(np.abs(y - exact) / (np.abs(exact) + 1)) < 2 * EPS["float32"]
    assert np.abs(rstd / exact_rstd - 1).item() < 2 * EPS["float32"]

"""Are rows that are split over the threads as right, and as reproducible, as those that are not?"""

import itertools

import numpy as np
import pytest

import nbnorm
from levels import deep
from nbnorm.cpu import sizes
from nbnorm.cpu.kernels import long_rows
from nbnorm.cpu.workers.parallel import WORKERS
from test_forward import FAR
from tolerances import assert_grads, assert_statistics, assert_y

# two segments and a part of one that is no multiple of 16
COLS = 2 * long_rows.SEGMENT + 1003


pytestmark = pytest.mark.compiled


@pytest.fixture(autouse=True)
def every_row_is_long(monkeypatch):
    monkeypatch.setattr(sizes, "LONG_ROW", 0)


def operands(rng, rows, cols, dtype=np.float32):
    with np.errstate(under="ignore"):
        x = (rng.standard_normal((rows, cols)) * 3 + 2).astype(dtype)
        dy = rng.standard_normal((rows, cols)).astype(dtype)
    weight, bias = rng.standard_normal((2, cols)).astype(np.float32)
    return x, dy, weight, bias


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("cols", [1, 16, 1003, long_rows.SEGMENT, COLS])
@pytest.mark.parametrize("use_diff_of_squares", [False, *deep(True)])
def test_any_length(rng, build, rows, cols, use_diff_of_squares):
    x, dy, weight, bias = operands(rng, rows, cols)
    y, mean, rstd = nbnorm.layer_norm(x, cols, weight, bias, 1e-3, use_diff_of_squares, return_stats=True)
    assert_y(y, x, 1, weight, bias, 1e-3, use_diff_of_squares)
    assert_statistics(mean, rstd, x, 1, 1e-3, use_diff_of_squares)
    grads = nbnorm.layer_norm_backward(dy, x, cols, weight, 1e-3, use_diff_of_squares)
    assert_grads(grads, dy, x, 1, weight, 1e-3, use_diff_of_squares)


@pytest.mark.parametrize("dtype", deep(np.float64, np.float16))
def test_other_dtypes(rng, dtype):
    x, dy, weight, bias = operands(rng, 2, COLS, dtype)
    assert_y(nbnorm.layer_norm(x, COLS, weight, bias), x, 1, weight, bias)
    assert_grads(nbnorm.layer_norm_backward(dy, x, COLS, weight), dy, x, 1, weight)


def test_mean_that_differs_from_segment_to_segment(rng):
    x = (rng.standard_normal((2, COLS)) + 1e4 * np.sin(np.arange(COLS) / 5000)).astype(np.float32)
    assert_y(nbnorm.layer_norm(x, COLS), x, 1)
    dy = rng.standard_normal(x.shape, dtype=np.float32) + np.float32(5)
    assert_grads(nbnorm.layer_norm_backward(dy, x, COLS), dy, x, 1)


def test_rows_beyond_the_range_of_their_type_between_others(rng):
    x, dy, weight, bias = operands(rng, 7, COLS)
    with np.errstate(over="ignore"):
        x[[1, 2, 6]] *= np.float32(1e38)
    x = np.clip(x, -3e38, 3e38)
    x[4, 5] = np.nan
    dy[4] = 0
    assert_y(nbnorm.layer_norm(x, COLS, weight, bias), x, 1, weight, bias)
    assert_grads(nbnorm.layer_norm_backward(dy, x, COLS, weight), dy, x, 1, weight)


@pytest.mark.deep
@pytest.mark.parametrize(("mean", "deviation"), FAR)
def test_far_rows_whose_squares_leave_the_range_keep_their_digits(rng, mean, deviation):
    x = mean + deviation * rng.standard_normal((3, COLS))
    dy = rng.standard_normal(x.shape)
    assert_y(nbnorm.layer_norm(x, COLS, eps=0.0), x, 1, eps=0.0)
    assert_grads(nbnorm.layer_norm_backward(dy, x, COLS, eps=0.0), dy, x, 1, eps=0.0)


@pytest.mark.deep
@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)])
def test_output_mask(rng, mask):
    x, dy, weight, _ = operands(rng, 5, COLS)
    full = nbnorm.layer_norm_backward(dy, x, COLS, weight)
    for grad, expected, wanted in zip(
        nbnorm.layer_norm_backward(dy, x, COLS, weight, output_mask=mask), full, mask, strict=True
    ):
        np.testing.assert_array_equal(grad, expected if wanted else None)


@pytest.mark.deep
def test_given_statistics(rng):
    x, dy, weight, _ = operands(rng, 5, COLS, np.float64)
    _, mean, rstd = nbnorm.layer_norm(x, COLS, return_stats=True)
    grads = nbnorm.layer_norm_backward(dy, x, COLS, weight, mean=mean, rstd=rstd)
    assert_grads(grads, dy, x, 1, weight)


def test_strided_arrays_give_the_same_bits(rng):
    # one row a buffer: sums go from call to call
    x, dy, weight, bias = operands(rng, 5, COLS)
    padded_x, padded_dy = np.zeros((2, 5, COLS + 3), np.float32)
    padded_x[:, :COLS], padded_dy[:, :COLS] = x, dy
    y = nbnorm.layer_norm(padded_x[:, :COLS], COLS, weight, bias)
    np.testing.assert_array_equal(y, nbnorm.layer_norm(x, COLS, weight, bias))
    grads = nbnorm.layer_norm_backward(padded_dy[:, :COLS], padded_x[:, :COLS], COLS, weight)
    for grad, expected in zip(grads, nbnorm.layer_norm_backward(dy, x, COLS, weight), strict=True):
        np.testing.assert_array_equal(grad, expected)


def test_the_same_bits_whoever_works_and_in_every_batch(rng, choose_workers):
    x, dy, weight, bias = operands(rng, 9, COLS)
    results = []
    for workers in WORKERS:
        choose_workers(workers)
        y = nbnorm.layer_norm(x, COLS, weight, bias)
        results.append((y, *nbnorm.layer_norm_backward(dy, x, COLS, weight)))
        np.testing.assert_array_equal(nbnorm.layer_norm(x[4:5], COLS, weight, bias), y[4:5])
    for a, b in itertools.pairwise(results):
        for value, expected in zip(a, b, strict=True):
            np.testing.assert_array_equal(value, expected)

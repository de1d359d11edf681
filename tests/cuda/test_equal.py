"""Is nothing of a mean's rounding in results, where all elements of a row are equal, or a few units apart?"""

import itertools

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from device import normal, to_device, to_host
from tolerances import (
    CUDA_GRADIENT_EPS,
    CUDA_STATISTICS_EPS,
    CUDA_Y_EPS,
    assert_grads,
    assert_statistics,
    assert_y,
)

pytestmark = pytest.mark.hardware

# one by one, a part of a warp, a warp, several
COLS = (1, 6, 24, 129, 1000, 1999)
# (dtype of x, dtype of weight, exponents of ten that the elements have)
DTYPES = [
    (np.float64, np.float64, (10, 300)),
    (np.float32, np.float64, (-30, 38)),
    (np.float32, np.float32, (-30, 38)),
    (np.float16, np.float32, (-3, 4)),
    (ml_dtypes.bfloat16, ml_dtypes.bfloat16, (-30, 38)),
]
MODES = list(itertools.product([1e-5, 1e-60], [False, True]))
BOTH_MODES = pytest.mark.parametrize("use_diff_of_squares", [False, True])


def forward(x, *parameters, **options):
    results = nbnorm.layer_norm(to_device(x), x.shape[1], *map(to_device, parameters), return_stats=True, **options)
    return [to_host(result) for result in results]


def backward(dy, x, weight, statistics=(), **options):
    given = dict(zip(("mean", "rstd"), map(to_device, statistics), strict=False))
    results = nbnorm.layer_norm_backward(*map(to_device, (dy, x)), x.shape[1], to_device(weight), **given, **options)
    return nbnorm.functional.LayerNormGrads(*map(to_host, results))


def constants(rng, rows, exponents, dtype):
    """Of any size, at which a sum of equal numbers is rounded; 1e37 and 1e20 among float64's."""
    with np.errstate(over="ignore"):
        values = (rng.choice([-1, 1], rows) * 10 ** rng.uniform(*exponents, rows)).astype(dtype)
    if dtype == np.float64:
        values[:2] = 1e37, 1e20
    return values[:, None]


def assert_equal_elements(rng, values, cols, weight_dtype, eps, use_diff_of_squares):
    x = np.repeat(values, cols, axis=1)
    dy, weight, bias = normal(rng, x.shape, np.float32), *normal(rng, (2, cols), weight_dtype)
    options = {"eps": eps, "use_diff_of_squares": use_diff_of_squares}
    y, mean, rstd = forward(x, weight, bias, **options)
    np.testing.assert_array_equal(y, np.broadcast_to(bias.astype(x.dtype), x.shape))
    np.testing.assert_array_equal(mean, values.astype(mean.dtype))
    np.testing.assert_allclose(rstd, 1 / np.sqrt(eps), rtol=2 * np.finfo(mean.dtype).eps)
    for statistics in ((), (mean, rstd)):
        grads = backward(dy, x, weight, statistics, **options)
        np.testing.assert_array_equal(grads.dweight, np.zeros(cols))
        assert_grads(grads, dy, x, 1, weight, eps, gradient_eps=CUDA_GRADIENT_EPS, sums="float32")


# rows of several warps, which the simulator is slow with, have each eps in one of the modes
@pytest.mark.parametrize(
    ("cols", "eps", "use_diff_of_squares"),
    [(cols, *mode) for cols in COLS for mode in (MODES if cols < 1000 else MODES[::3])],
)
@pytest.mark.parametrize(("dtype", "weight_dtype", "exponents"), DTYPES)
def test_equal_elements(rng, dtype, weight_dtype, exponents, cols, eps, use_diff_of_squares):
    values = constants(rng, max(3, 60 // cols), exponents, dtype)
    assert_equal_elements(rng, values, cols, weight_dtype, eps, use_diff_of_squares)


@BOTH_MODES
@pytest.mark.parametrize("eps", [1e-5, 1e-60])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_elements_of_long_rows(rng, short_segments, dtype, eps, use_diff_of_squares):
    values = np.array([[1e37], [np.finfo(dtype).max]], dtype)
    assert_equal_elements(rng, values, short_segments, dtype, eps, use_diff_of_squares)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cols", [6, 129, 512, "long"])
def test_elements_a_few_units_apart(rng, short_segments, monkeypatch, dtype, cols, eps):
    exponents = (10, 300) if dtype == np.float64 else (0, 37)
    if cols == "long":
        cols = short_segments
    else:
        monkeypatch.undo()
    values = constants(rng, 3, exponents, dtype)
    x = values + rng.integers(-2, 3, (3, cols)) * np.spacing(values)
    x[:, :2] = values + [0, 1] * np.spacing(values)
    y, mean, rstd = forward(x, eps=eps)
    assert_y(y, x, 1, None, None, eps, y_eps=CUDA_Y_EPS)
    assert_statistics(mean, rstd, x, 1, eps, statistics_eps=CUDA_STATISTICS_EPS)
    dy, weight = normal(rng, x.shape, dtype), normal(rng, cols, dtype)
    grads = backward(dy, x, weight, eps=eps)
    assert_grads(grads, dy, x, 1, weight, eps, gradient_eps=CUDA_GRADIENT_EPS, sums=np.dtype(dtype).name)

"""Are rows that lie in several chunks of a Dask array as accurate as whole ones, however hard they are?"""

import ml_dtypes
import numpy as np
import pytest

import magnitudes
import nbnorm
from levels import deep
from test_accuracy import KINDS
from tolerances import GRADIENT_EPS, Y_EPS, assert_grads, assert_statistics, assert_y

dask = pytest.importorskip("dask")
pytest.importorskip("dask.array")
from dask_calls import COLS, NAMES, PARTS, SHAPE, call, computed, lazy, operands  # noqa: E402


@pytest.fixture(autouse=True)
def scheduler():
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture
def arrays(rng):
    return operands(rng)


@pytest.mark.parametrize("chunks", PARTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_as_accurate_as_whole_ones(arrays, name, chunks):
    results, grads = call(name, arrays, lambda a: lazy(a, chunks))
    expected, expected_grads = call(name, arrays)
    x, weight, is_rms = arrays["x"], arrays["weight"], name.endswith("rms_norm")
    for result, value in zip((*results, *grads), (*expected, *expected_grads), strict=True):
        assert (result.shape, result.dtype) == (value.shape, value.dtype)
        assert result.ndim < 3 or result.chunks[:2] == lazy(x, chunks).chunks[:2]
    assert results.y.chunks == grads.dx.chunks == lazy(x, chunks).chunks
    results, grads = (type(found)(*computed(found)) for found in (results, grads))
    for result, value in zip((*results, *grads), (*expected, *expected_grads), strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5)
    total, eps = x, 2.0**-23 if is_rms else 1e-5
    if name.startswith("add"):
        np.testing.assert_array_equal(results.total, expected.total, strict=True)
        total = expected.total
    assert_y(results.y, total, 1, weight, None if is_rms else arrays["bias"], eps, is_rms=is_rms)
    assert_statistics(None if is_rms else results.mean, results.rstd, total, 1, eps, is_rms=is_rms)
    if not name.startswith("add"):
        grads = nbnorm.LayerNormGrads(*grads, *(None,) * (3 - len(grads)))
        assert_grads(grads, arrays["dy"], x, 1, weight, eps, is_rms=is_rms)


@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, *deep(np.float16, ml_dtypes.bfloat16)])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_hard_rows(rng, dtype, kind, use_diff_of_squares):
    cols = 768
    with np.errstate(over="ignore", under="ignore"):
        x = kind(rng.standard_normal((24, cols))).astype(dtype)
        dy = rng.standard_normal(x.shape).astype(dtype)
    weight, bias = rng.standard_normal((2, cols)).astype(np.float32 if np.dtype(dtype).itemsize == 2 else dtype)
    x_lazy, dy_lazy = (lazy(array, (16, (100, 1, 667))) for array in (x, dy))
    options = {"use_diff_of_squares": use_diff_of_squares}
    y, mean, rstd = computed(nbnorm.layer_norm(x_lazy, cols, weight, bias, return_stats=True, **options))
    assert_y(y, x, 1, weight, bias)
    if np.isfinite(x).all():
        assert_statistics(mean, rstd, x, 1)
    grads = nbnorm.layer_norm_backward(dy_lazy, x_lazy, cols, weight, **options)
    assert_grads(nbnorm.LayerNormGrads(*computed(grads)), dy, x, 1, weight)
    y, rstd = computed(nbnorm.rms_norm(x_lazy, cols, weight, return_stats=True))
    eps = float(np.finfo(np.float64 if dtype is np.float64 else np.float32).eps)
    assert_y(y, x, 1, weight, eps=eps, is_rms=True)
    if np.isfinite(x).all():
        assert_statistics(None, rstd, x, 1, eps=eps, is_rms=True)
    grads = computed(nbnorm.rms_norm_backward(dy_lazy, x_lazy, cols, weight))
    assert_grads(nbnorm.LayerNormGrads(*grads, None), dy, x, 1, weight, eps=eps, is_rms=True)
    if (x != x[:, :1]).any(axis=1).all():
        assert_y(nbnorm.layer_norm(x_lazy, cols, eps=0.0).compute(), x, 1, eps=0.0)


def test_rows_of_two_dimensions_in_chunks_of_both(arrays):
    x, dy = arrays["x"], arrays["dy"]
    weight, bias = np.random.default_rng(1).standard_normal((2, *SHAPE[1:]))
    x_lazy, dy_lazy = (lazy(array, (4, 2, 20)) for array in (x, dy))
    y, mean, rstd = nbnorm.layer_norm(x_lazy, SHAPE[1:], weight, bias, return_stats=True)
    assert mean.shape == rstd.shape == (10, 1, 1)
    assert_y(y.compute(), x, 2, weight, bias)
    grads = nbnorm.layer_norm_backward(dy_lazy, x_lazy, SHAPE[1:], weight)
    assert [grad.dtype for grad in grads] == [np.float32, np.float64, np.float64]
    assert_grads(nbnorm.LayerNormGrads(*computed(grads)), dy, x, 2, weight)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_with_nan_and_inf(rng, dtype):
    x, dy = rng.standard_normal((2, 8, 12)).astype(dtype)
    x[1, 0], x[2, 11], x[3, 5], x[4, :], x[5, 0], x[5, 3], x[6, 2:] = (
        np.inf,
        -np.inf,
        np.nan,
        np.inf,
        np.inf,
        -np.inf,
        np.nan,
    )
    x_lazy, dy_lazy = (lazy(array, (3, 5)) for array in (x, dy))
    pairs = [
        (norm(x_lazy, 12, return_stats=True), norm(x, 12, return_stats=True))
        for norm in (nbnorm.layer_norm, nbnorm.rms_norm)
    ]
    pairs.append((nbnorm.layer_norm_backward(dy_lazy, x_lazy, 12), nbnorm.layer_norm_backward(dy, x, 12)))
    pairs.append((nbnorm.rms_norm_backward(dy_lazy, x_lazy, 12), nbnorm.rms_norm_backward(dy, x, 12)))
    for results, expected in pairs:
        for result, value in zip(computed(results), expected, strict=True):
            np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5)


@pytest.mark.deep
@pytest.mark.parametrize("eps", magnitudes.EPSILONS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_eps_and_magnitude(rng, dtype, eps):
    for cols in (2, 5, 100):
        x = magnitudes.rows(rng, dtype, cols, eps)
        dy, weight = rng.standard_normal(x.shape).astype(dtype), rng.standard_normal(cols).astype(dtype)
        x_lazy, dy_lazy = (lazy(array, (7, (1, cols - 1))) for array in (x, dy))
        results = computed(nbnorm.layer_norm(x_lazy, cols, eps=eps, return_stats=True))
        magnitudes.assert_forward(*results, x, eps, False, Y_EPS, 2, "float64")
        grads = nbnorm.LayerNormGrads(*computed(nbnorm.layer_norm_backward(dy_lazy, x_lazy, cols, weight, eps=eps)))
        magnitudes.assert_backward(grads, dy, x, weight, eps, False, GRADIENT_EPS, "float64")


def test_float64_gradients_of_narrow_rows_keep_their_digits(rng):
    """Of which a mean in one float64 would lose four."""
    x, dy = rng.standard_normal((2, 20, COLS), dtype=np.float32) + np.float32(1e4)
    x, weight = (x - np.float32(1e4)) * 0.1 + 1e4, rng.standard_normal(COLS)
    grads = nbnorm.layer_norm_backward(lazy(dy, (6, 20)), lazy(x.astype("f4"), (6, 20)), COLS, weight)
    assert_grads(nbnorm.LayerNormGrads(*computed(grads)), dy, x.astype("f4"), 1, weight)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_same_bits_at_any_chunks_of_the_batch(rng, dtype):
    x, dy = rng.standard_normal((2, 30, 700)).astype(dtype)
    expected = None
    for rows in (1, 4, 30):
        for order in "CF":
            x_lazy, dy_lazy = (lazy(np.asarray(array, order=order), (rows, 300)) for array in (x, dy))
            results = nbnorm.layer_norm(x_lazy, 700, return_stats=True)
            results = computed((*results, nbnorm.layer_norm_backward(dy_lazy, x_lazy, 700).dx))
            expected = expected or results
            for result, value in zip(results, expected, strict=True):
                np.testing.assert_array_equal(result, value, strict=True)

"""Are calls on Dask arrays lazy, checked first, and right whatever the chunks?"""

import pickle
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from levels import deep
from test_accuracy import KINDS
from tolerances import assert_grads, assert_statistics, assert_y

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

SHAPE, COLS = (10, 3, 48), 48
# of whole rows, and of rows in several chunks
WHOLE = [(10, 3, 48), (3, 2, 48), ((4, 0, 6), 3, 48), (1, 1, 48)]
PARTS = [(10, 3, 16), (4, (1, 2), (5, 0, 43)), ((0, 10), 3, (1,) * 48)]
NAMES = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")


@pytest.fixture(autouse=True)
def scheduler():
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture
def arrays(rng):
    """Operands of all functions by name, float32."""
    batched = ("x", "residual", "dy", "dtotal")
    found = dict(zip(batched, rng.standard_normal((4, *SHAPE), dtype=np.float32), strict=True))
    return found | dict(zip(("weight", "bias"), rng.standard_normal((2, COLS), dtype=np.float32), strict=True))


def lazy(array, chunks):
    return da.from_array(array, chunks=chunks)


def call(name, arrays, make=lambda array: array, **options):
    """All results of both passes of a norm, whose batched operands `make` has made."""
    is_added, is_rms = name.startswith("add"), name.endswith("rms_norm")
    x, residual, dy, dtotal = (make(arrays[key]) for key in ("x", "residual", "dy", "dtotal"))
    weight = arrays["weight"]
    parameters = (weight,) if is_rms else (weight, arrays["bias"])
    forward, backward = getattr(nbnorm, name), getattr(nbnorm, f"{name}_backward")
    results = forward(x, *((residual,) if is_added else ()), COLS, *parameters, return_stats=True, **options)
    grads = backward(dy, *((dtotal,) if is_added else ()), x, COLS, weight, **options)
    return results, grads


def computed(results):
    return dask.compute(*results)


@pytest.mark.parametrize("chunks", WHOLE, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_whole_rows_have_the_bits_of_the_whole(arrays, name, chunks):
    for results, expected in zip(call(name, arrays, lambda a: lazy(a, chunks)), call(name, arrays), strict=True):
        assert type(results) is type(expected)
        for field, result, value in zip(expected._fields, results, expected, strict=True):
            assert isinstance(result, da.Array)
            assert (result.shape, result.dtype, type(result._meta)) == (value.shape, value.dtype, np.ndarray)
            if result.ndim == 3:
                assert result.chunks[:2] == lazy(arrays["x"], chunks).chunks[:2]
            result = result.compute()
            if field in ("dweight", "dbias"):
                root = np.sqrt(np.square(arrays["dy"]).sum((0, 1)))
                assert (np.abs(result - value) <= 8 * 2.0**-23 * (np.abs(value) + root)).all()
                assert result.dtype == value.dtype
            else:
                np.testing.assert_array_equal(result, value, strict=True)


@pytest.mark.parametrize("chunks", PARTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_rows_in_several_chunks_are_as_accurate_as_whole_ones(arrays, name, chunks):
    results, grads = call(name, arrays, lambda a: lazy(a, chunks))
    expected, expected_grads = call(name, arrays)
    x, weight, is_rms = arrays["x"], arrays["weight"], name.endswith("rms_norm")
    for result, value in zip((*results, *grads), (*expected, *expected_grads), strict=True):
        assert (result.shape, result.dtype) == (value.shape, value.dtype)
        assert result.ndim < 3 or result.chunks[:2] == lazy(x, chunks).chunks[:2]
    assert results.y.chunks == grads.dx.chunks == lazy(x, chunks).chunks
    results = type(results)(*computed(results))
    if name.startswith("add"):
        np.testing.assert_array_equal(results.total, expected.total, strict=True)
    total = expected.total if name.startswith("add") else x
    assert_y(results.y, total, 1, weight, None if is_rms else arrays["bias"], 2.0**-23 if is_rms else 1e-5, is_rms=is_rms)
    mean = None if is_rms else results.mean
    assert_statistics(mean, results.rstd, total, 1, 2.0**-23 if is_rms else 1e-5, is_rms=is_rms)
    grads = type(grads)(*computed(grads))
    if name.startswith("add"):
        grads = grads._replace(dx=grads.dx.astype(np.float64) - arrays["dtotal"])
    grads = nbnorm.LayerNormGrads(*grads, *(None,) * (3 - len(grads)))
    if not name.startswith("add"):
        assert_grads(grads, arrays["dy"], x, 1, weight, 2.0**-23 if is_rms else 1e-5, is_rms=is_rms)


@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, *deep(np.float16, ml_dtypes.bfloat16)])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_hard_rows_in_several_chunks(rng, dtype, kind, use_diff_of_squares):
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

"""Are norms over axes that are not the last right on CUDA arrays: layouts, dtypes, options, and what plans are kept?"""

import itertools

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from axis import assert_backward, assert_forward, at_end, placed, sizes_along
from device import DTYPES, LEVEL, normal, to_device, to_host
from nbnorm.calls import checks
from nbnorm.cuda import plans
from tolerances import CUDA_Y_EPS, assert_y

pytestmark = pytest.mark.hardware

# (shape, axis): channels first, a warp of positions and a rest; few positions; the first axis; two axes; nothing behind but
# a dimension of one
PROBLEMS = [((2, 5, 3, 11), 1), ((3, 70, 4), -2), ((9, 40), 0), ((2, 3, 4, 5), (1, 2)), ((3, 9, 1), 1)]


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    for known in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(plans, known, {})


def strided(array, shape, strides):
    """A view of the array's memory."""
    if LEVEL != "device":
        return type(array)(np.lib.stride_tricks.as_strided(array._ary, shape, strides))
    from numba.cuda.cudadrv.devicearray import DeviceNDArray

    return DeviceNDArray(shape, strides, array.dtype, gpu_data=array.gpu_data)


@pytest.mark.parametrize(("shape", "axis"), PROBLEMS)
@pytest.mark.parametrize("is_squares", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(rng, dtype, is_squares, shape, axis):
    dy, x = normal(rng, (2, *shape), dtype)
    x += dtype(1)
    sizes = sizes_along(x, axis)
    for weight_dtype, bias_dtype in ((None, None), (np.float32, dtype)):
        weight = None if weight_dtype is None else normal(rng, sizes, weight_dtype)
        bias = None if bias_dtype is None else normal(rng, sizes, bias_dtype)
        parameters = placed(weight), placed(bias)
        results = nbnorm.layer_norm(
            to_device(x), sizes, *parameters, use_diff_of_squares=is_squares, return_stats=True, axis=axis
        )
        assert_forward(results, x, axis, weight, bias, is_squares)
        operands = to_device(dy), to_device(x), sizes, parameters[0]
        grads = nbnorm.layer_norm_backward(*operands, use_diff_of_squares=is_squares, axis=axis)
        assert_backward(grads, dy, x, axis, weight, is_squares)


@pytest.mark.parametrize(("shape", "axis"), PROBLEMS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rms_norm(rng, dtype, shape, axis):
    dy, x = normal(rng, (2, *shape), dtype)
    sizes = sizes_along(x, axis)
    weight = normal(rng, sizes, np.float32)
    results = nbnorm.rms_norm(to_device(x), sizes, to_device(weight), 1e-5, return_stats=True, axis=axis)
    assert_forward(results, x, axis, weight, None, is_rms=True)
    grads = nbnorm.rms_norm_backward(to_device(dy), to_device(x), sizes, to_device(weight), 1e-5, axis=axis)
    assert_backward(grads, dy, x, axis, weight, is_rms=True)


@pytest.mark.parametrize("mask", list(itertools.product((True, False), repeat=3)), ids=str)
@pytest.mark.parametrize("is_given", [False, True])
def test_masks_and_given_statistics(rng, is_given, mask):
    dy, x = normal(rng, (2, 2, 5, 3, 11), np.float32)
    weight = normal(rng, 5, np.float32)
    # of any value: they are not recomputed
    statistics = {"mean": normal(rng, (2, 1, 3, 11), np.float32), "rstd": np.full((2, 1, 3, 11), 2, np.float32)}
    given = statistics if is_given else {}
    options = {name: to_device(array) for name, array in given.items()}
    operands = to_device(dy), to_device(x), 5, to_device(weight)
    grads = nbnorm.layer_norm_backward(*operands, output_mask=mask, axis=1, **options)
    assert tuple(grad is not None for grad in grads) == mask
    assert_backward(grads, dy, x, 1, weight, **given)


@pytest.mark.parametrize("with_total", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_residual(rng, dtype, with_total):
    """It is the sum and then the norm, to the bit."""
    x, dtotal = normal(rng, (2, 2, 5, 3, 11), dtype)
    residual = normal(rng, x.shape, np.float32)
    weight = to_device(normal(rng, 5, np.float32))
    total = (x.astype(np.float32) + residual).astype(dtype)
    expected = to_host(nbnorm.layer_norm(to_device(total), 5, weight, axis=1))
    options = {} if with_total else {"total_out": False}
    results = nbnorm.add_layer_norm(to_device(x), to_device(residual), 5, weight, axis=1, **options)
    np.testing.assert_array_equal(to_host(results.y), expected)
    if with_total:
        np.testing.assert_array_equal(to_host(results.total), total)
    dy = normal(rng, x.shape, np.float32)
    plain = nbnorm.layer_norm_backward(to_device(dy), to_device(total), 5, weight, axis=1)
    grads = nbnorm.add_layer_norm_backward(*map(to_device, (dy, dtotal, total)), 5, weight, axis=1)
    exact = to_host(plain.dx).astype(np.float64) + dtotal.astype(np.float64)
    rounding = 2.0 ** (-22 if dtype == np.float32 else -6)
    np.testing.assert_allclose(to_host(grads.dx).astype(np.float64), exact, rtol=rounding, atol=rounding)
    for grad, wanted in zip(grads[1:], plain[1:], strict=True):
        np.testing.assert_array_equal(to_host(grad), to_host(wanted))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_call_is_remembered(rng, monkeypatch, direction):
    """On arrays in C order, which the kernels take as they are."""
    x = to_device(normal(rng, (2, 5, 7), np.float32))
    calls = []
    check = getattr(checks, direction)
    monkeypatch.setattr(checks, direction, lambda call: calls.append(call) or check(call))

    def result():
        if direction == "forward":
            return [nbnorm.layer_norm(x, 5, axis=1)]
        return nbnorm.layer_norm_backward(x, x, 5, axis=1)

    first, second = result(), result()
    assert len(calls) == 1
    for array, wanted in zip(second, first, strict=True):
        np.testing.assert_array_equal(to_host(array), to_host(wanted))


def test_several_axes_and_layouts(rng):
    """The memory of channels last, seen as channels first; gaps; backwards; into results of each of them."""
    dy, x = normal(rng, (2, 2, 5, 3, 11), np.float32)
    weight, bias = normal(rng, (2, 5), np.float32)
    parameters = to_device(weight), to_device(bias)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    strides = last.strides[0], last.strides[3], *last.strides[1:3]
    of_last = strided(to_device(last), x.shape, strides)
    twice = to_device(np.repeat(x, 2, axis=-1))
    for seen in (of_last, twice[..., ::2]):
        out = strided(to_device(np.zeros_like(last)), x.shape, strides)
        for options in ({}, {"out": out}):
            # the second time by its plan, where it has one
            for _ in range(2):
                results = nbnorm.layer_norm(seen, 5, *parameters, return_stats=True, axis=1, **options)
                assert_forward(results, x, 1, weight, bias)
        dx = strided(to_device(np.zeros_like(last)), x.shape, strides)
        for out in (None, (dx, None, None)):
            for _ in range(2):
                grads = nbnorm.layer_norm_backward(to_device(dy), seen, 5, parameters[0], axis=1, out=out)
                assert_backward(grads, dy, x, 1, weight)


@pytest.mark.parametrize("distance", [0, 1, 11, 33, 165])
def test_an_out_that_overlaps_x(rng, distance):
    flat = rng.standard_normal(700).astype(np.float32)
    x = flat[:330].reshape(2, 5, 3, 11).copy()
    expected = to_host(nbnorm.layer_norm(to_device(x), 5, axis=1))
    device = to_device(flat)
    out = device[distance : distance + 330].reshape(x.shape)
    nbnorm.layer_norm(device[:330].reshape(x.shape), 5, axis=1, out=out)
    flat[distance : distance + 330] = expected.ravel()
    np.testing.assert_array_equal(to_host(device), flat)
    device = to_device(x)
    dy = to_device(normal(rng, x.shape, np.float32))
    expected = [to_host(grad) for grad in nbnorm.layer_norm_backward(dy, device, 5, axis=1)]
    grads = nbnorm.layer_norm_backward(dy, device, 5, axis=1, out=(device if distance else dy, None, None))
    for grad, wanted in zip(grads, expected, strict=True):
        np.testing.assert_array_equal(to_host(grad), wanted)


def test_a_plan_is_of_its_axis(rng):
    """Shapes that are alike along several axes; each call three times, between the others."""
    x = normal(rng, (6, 6, 6), np.float32)
    device, weight = to_device(x), to_device(normal(rng, 6, np.float32))
    for _ in range(3):
        for axis in (None, 2, -1, 0, 1, -2):
            options = {} if axis is None else {"axis": axis}
            along = -1 if axis is None else axis
            results = nbnorm.layer_norm(device, 6, weight, return_stats=True, **options)
            assert_forward(results, x, along, to_host(weight), None)
            grads = nbnorm.layer_norm_backward(device, device, 6, weight, **options)
            assert_backward(grads, x, x, along, to_host(weight))
        for axes in ((0, 1), (1, 2)):
            assert_forward(nbnorm.layer_norm(device, (6, 6), return_stats=True, axis=axes), x, axes, None, None)


def test_integers(rng):
    x = rng.integers(0, 100, (2, 5, 7))
    y = to_host(nbnorm.layer_norm(to_device(x), 5, axis=1))
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, nbnorm.layer_norm(x, 5, axis=1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0), (2, 0, 3)])
def test_nothing_to_do(shape):
    x = np.empty(shape, np.float32)
    y, mean, rstd = map(to_host, nbnorm.layer_norm(to_device(x), shape[1], return_stats=True, axis=1))
    assert y.shape == shape
    assert mean.shape == rstd.shape == (shape[0], 1, shape[2])
    assert np.isnan(mean).all()
    dx, dweight, dbias = map(to_host, nbnorm.layer_norm_backward(to_device(x), to_device(x), shape[1], axis=1))
    assert dx.shape == shape
    np.testing.assert_array_equal(dweight, np.zeros(shape[1]))
    np.testing.assert_array_equal(dbias, np.zeros(shape[1]))


def test_the_layers(rng):
    x = normal(rng, (2, 5, 7), np.float32)
    for make, is_rms in ((nbnorm.LayerNorm, False), (nbnorm.RMSNorm, True)):
        layer = make(5, eps=1e-5, device="cuda", axis=1)
        weight = to_host(layer.weight)
        y = layer(to_device(x))
        assert_y(at_end(y, 1), at_end(x, 1), 1, weight, None, 1e-5, False, CUDA_Y_EPS, "float32", is_rms)
        assert_backward(layer.backward(to_device(x), to_device(x)), x, x, 1, weight, is_rms=is_rms)

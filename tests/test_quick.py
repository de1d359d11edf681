"""Does the fast path of a call give what the checked path gives, and leave to the checks what is theirs?"""

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from levels import deep
from nbnorm.cpu import quick

COLS = 24


@pytest.fixture(params=[np.float32, *deep(np.float64)])
def operands(request, rng):
    x, dy = rng.standard_normal((2, 6, COLS)).astype(request.param)
    weight, bias = rng.standard_normal((2, COLS)).astype(request.param)
    # the first calls compile, and take the checked path
    nbnorm.layer_norm(x, COLS, weight, bias)
    nbnorm.layer_norm_backward(dy, x, COLS, weight)
    return x, dy, weight, bias


@pytest.mark.compiled
@pytest.mark.parametrize("normalized_shape", [COLS, (COLS,)])
@pytest.mark.parametrize("shape", [(6, COLS), (2, 3, COLS), (COLS,)])
def test_the_same_bits(operands, shape, normalized_shape):
    x, dy, weight, bias = operands
    x, dy = x[: np.prod(shape) // COLS].reshape(shape), dy[: np.prod(shape) // COLS].reshape(shape)
    y = quick.forward(x, normalized_shape, weight, bias, 1e-5, False)
    # a list takes the checked path
    expected = nbnorm.layer_norm(x, [COLS], weight, bias, return_stats=True)
    np.testing.assert_array_equal(y, expected.y)
    out = np.empty_like(x)
    assert quick.forward(x, normalized_shape, weight, bias, 1e-5, False, out) is out
    np.testing.assert_array_equal(out, expected.y)
    in_place = x.copy()
    assert quick.forward(in_place, normalized_shape, weight, bias, 1e-5, False, in_place) is in_place
    np.testing.assert_array_equal(in_place, expected.y)
    result = quick.forward(x, normalized_shape, weight, bias, 1e-5, False, None, True)
    assert_same(result, expected)
    mask = (True, True, True)
    for statistics in ({}, {"mean": expected.mean, "rstd": expected.rstd}):
        grads = nbnorm.layer_norm_backward(dy, x, [COLS], weight, **statistics)
        assert_same(quick.backward(dy, x, normalized_shape, weight, 1e-5, False, mask, **statistics), grads)


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [np.float32, *deep(np.float16)])
def test_rows_are_short_as_on_the_long_way(rng, dtype):
    # with another kernel, the last bits of mean and rstd would be others
    with np.errstate(under="ignore"):
        cases = [rng.standard_normal((3, 53, cols)).astype(dtype) for cols in (127, 128, 256, 257)]
    expected = []
    for x, dy, (weight, *_) in cases:
        y = nbnorm.layer_norm(x, [x.shape[1]], weight, weight, return_stats=True)
        expected.append((*y, *nbnorm.layer_norm_backward(dy, x, [x.shape[1]], weight)))
    for (x, dy, (weight, *_)), results in zip(cases, expected, strict=True):
        cols = x.shape[1]
        assert_same(quick.forward(x, cols, weight, weight, 1e-5, False, None, True), results[:3])
        assert_same(quick.backward(dy, x, cols, weight, 1e-5, False, (True, True, True)), results[3:])


def assert_same(results, expected):
    for result, value in zip(results, expected, strict=True):
        assert (result.shape, result.dtype) == (value.shape, value.dtype)
        np.testing.assert_array_equal(result, value)


@pytest.mark.parametrize("mask", [(True, True, True), (True, False, True), (True, False, False)])
@pytest.mark.parametrize("shape", [(6, COLS), (2, 3, COLS), (COLS,)])
def test_gradients_into_out(operands, shape, mask):
    x, dy, weight, _ = operands
    x, dy = x[: np.prod(shape) // COLS].reshape(shape), dy[: np.prod(shape) // COLS].reshape(shape)
    expected = nbnorm.layer_norm_backward(dy, x, [COLS], weight, output_mask=mask)
    in_place_of_x, in_place_of_dy, in_place_of_weight = x.copy(), dy.copy(), weight.copy()
    for arrays, *out in (
        ((dy, x, weight), np.empty_like(x), np.empty_like(weight), np.empty_like(weight)),
        ((dy, x, weight), np.empty_like(x), None, None),
        ((dy, x, weight), None, np.empty_like(weight), np.empty_like(weight)),
        ((dy, in_place_of_x, weight), in_place_of_x, None, None),
        ((in_place_of_dy, x, weight), in_place_of_dy, None, None),
        ((dy, x, in_place_of_weight), None, in_place_of_weight, None),
    ):
        out = tuple(array if wanted else None for array, wanted in zip(out, mask, strict=True))
        grads = quick.backward(*arrays[:2], COLS, arrays[2], 1e-5, False, mask, out)
        for grad, given, value in zip(grads, out, expected, strict=True):
            assert given is None or grad is given
            np.testing.assert_array_equal(grad, value)


@pytest.mark.parametrize("shape", [(6, COLS), (2, 3, COLS), (COLS,)])
@pytest.mark.parametrize("dtype", [np.float16, *deep(ml_dtypes.bfloat16)])
def test_the_same_bits_in_16_bits(rng, dtype, shape):
    x = rng.standard_normal(shape).astype(dtype)
    wide = rng.standard_normal((2, COLS), np.float32)
    narrow = wide.astype(dtype)
    for weight, bias in ((*wide,), (*narrow,), (wide[0], narrow[1]), (narrow[0], None), (None, wide[1])):
        expected = nbnorm.layer_norm(x, [COLS], weight, bias, return_stats=True)
        assert_same(quick.forward(x, COLS, weight, bias, 1e-5, False, None, True), expected)
        in_place = x.copy()
        assert quick.forward(in_place, COLS, weight, bias, 1e-5, False, in_place) is in_place
        np.testing.assert_array_equal(in_place, expected.y)
    swapped = x.dtype.newbyteorder()
    for array in (x[..., ::-1], x.view(np.uint16), x.view(np.int16), x.astype(swapped)):
        assert quick.forward(array, COLS, None, wide[1], 1e-5, False) is None
        assert quick.forward(x, COLS, None, wide[1], 1e-5, False, array) is None
    other = ml_dtypes.bfloat16 if dtype == np.float16 else np.float16
    for bias in (wide[1].astype(np.float64), wide[1].astype(other), narrow[1].astype(swapped), wide[1:]):
        assert quick.forward(x, COLS, None, bias, 1e-5, False) is None


@pytest.mark.parametrize("shape", [(6, COLS), (2, 3, COLS), (COLS,)])
@pytest.mark.parametrize("dtype", [np.float16, *deep(ml_dtypes.bfloat16)])
def test_gradients_of_16_bits(rng, dtype, shape):
    x, dy = rng.standard_normal((2, *shape), np.float32).astype(dtype)
    wide = rng.standard_normal(COLS, np.float32)
    _, mean, rstd = nbnorm.layer_norm(x, COLS, wide, return_stats=True)
    for weight in (wide, wide.astype(dtype), None):
        for statistics in ({}, {"mean": mean, "rstd": rstd}):
            for mask in ((True, True, True), (True, False, True)):
                expected = nbnorm.layer_norm_backward(dy, x, [COLS], weight, output_mask=mask, **statistics)
                out = tuple(None if value is None else np.empty_like(value) for value in expected)
                for outs in (None, out):
                    grads = quick.backward(dy, x, COLS, weight, 1e-5, False, mask, outs, **statistics)
                    for grad, value in zip(grads, expected, strict=True):
                        assert (grad is None) == (value is None)
                        assert value is None or grad.dtype == value.dtype
                        np.testing.assert_array_equal(grad, value)
    other = np.dtype(ml_dtypes.bfloat16 if dtype == np.float16 else np.float16)
    for weight in (wide.astype(np.float64), wide.astype(other), wide.astype(x.dtype.newbyteorder()), wide[1:]):
        assert quick.backward(dy, x, COLS, weight, 1e-5, False, (True, True, True)) is None
    for dweight in (np.empty(COLS, other), np.empty(COLS, np.float32), np.empty(COLS, x.dtype.newbyteorder())):
        out = (np.empty_like(x), dweight, np.empty(COLS, dtype))
        assert quick.backward(dy, x, COLS, wide.astype(dtype), 1e-5, False, (True, True, True), out) is None


@pytest.mark.compiled
def test_statistics_that_are_left_to_the_checks(operands):
    x, dy, weight, bias = operands
    assert quick.forward(x, COLS, weight, bias, 1e-5, False, None, 1) is None
    mask = (True, True, True)
    _, mean, rstd = nbnorm.layer_norm(x, COLS, weight, bias, return_stats=True)
    expected = nbnorm.layer_norm_backward(dy, x, COLS, weight, mean=mean, rstd=rstd)
    other = np.float64 if x.dtype == np.float32 else np.float32
    swapped = mean.astype(x.dtype.newbyteorder())
    for wrong in (None, mean.tolist(), mean[0], mean[:, 0], mean.astype(other), swapped, np.repeat(mean, 2, 1)[:, :1]):
        assert quick.backward(dy, x, COLS, weight, 1e-5, False, mask, None, wrong, rstd) is None
        assert quick.backward(dy, x, COLS, weight, 1e-5, False, mask, None, mean, wrong) is None
    # within what is written
    for name in ("mean", "rstd"):
        statistics = {"mean": mean, "rstd": rstd}
        dx = np.zeros_like(x)
        within = dx[0, :6].reshape(6, 1)
        within[...] = statistics[name]
        statistics[name] = within
        out = (dx, None, None)
        assert quick.backward(dy, x, COLS, weight, 1e-5, False, mask, out, **statistics) is None
        assert_same(nbnorm.layer_norm_backward(dy, x, COLS, weight, out=out, **statistics), expected)


@pytest.mark.compiled
def test_a_step_of_training_goes_the_short_way(operands, monkeypatch):
    x, dy, weight, bias = operands

    def step():
        y, mean, rstd = nbnorm.layer_norm(x, COLS, weight, bias, return_stats=True)
        return y, *nbnorm.layer_norm_backward(dy, x, COLS, weight, mean=mean, rstd=rstd)

    expected = step()
    monkeypatch.setattr("nbnorm.calls.checks.forward", None)
    monkeypatch.setattr("nbnorm.calls.checks.backward", None)
    assert_same(step(), expected)


@pytest.mark.compiled
def test_layers_go_the_short_way(operands, monkeypatch):
    x, _, _, _ = operands
    ln = nbnorm.LayerNorm(COLS, dtype=x.dtype)
    expected = ln(x)
    monkeypatch.setattr("nbnorm.calls.checks.forward", None)
    np.testing.assert_array_equal(ln(x), expected)
    np.testing.assert_array_equal(ln.forward(x[None]), expected[None])


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (TypeError, {"normalized_shape": float(COLS)}),
        (TypeError, {"normalized_shape": (float(COLS),)}),
        (ValueError, {"normalized_shape": COLS + 1}),
        (TypeError, {"eps": True}),
        (ValueError, {"eps": -1.0}),
        (ValueError, {"eps": float("nan")}),
        (ValueError, {"eps": float("inf")}),
        (TypeError, {"use_diff_of_squares": 0}),
        (ValueError, {"weight": np.ones(COLS - 1, np.float32)}),
        (ValueError, {"weight": np.ones((1, COLS), np.float32)}),
        (TypeError, {"weight": np.ma.ones(COLS)}),
        (TypeError, {"weight": np.ones(COLS, complex)}),
        (TypeError, {"x": np.ma.ones((6, COLS))}),
        (ValueError, {"x": np.float32(1)}),
        (ValueError, {"x": np.ones(0, np.float32)}),
    ],
)
def test_wrong_calls_are_left_to_the_checks(operands, error, arguments):
    x, dy, weight, bias = operands
    right = {"x": x, "normalized_shape": COLS, "weight": weight, "eps": 1e-5, "use_diff_of_squares": False}
    with pytest.raises(error):
        nbnorm.layer_norm(**right | arguments, bias=bias)
    with pytest.raises(error):
        nbnorm.layer_norm_backward(dy, **right | arguments)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ValueError, {"dy": np.ones((6, COLS - 1), np.float32)}),
        (TypeError, {"output_mask": (1, 1, 1)}),
        (ValueError, {"output_mask": (True, True)}),
        (ValueError, {"mean": np.ones((6, 1))}),
    ],
)
def test_wrong_backward_calls_too(operands, error, arguments):
    x, dy, weight, _ = operands
    with pytest.raises(error):
        nbnorm.layer_norm_backward(**{"dy": dy, "x": x, "normalized_shape": COLS, "weight": weight} | arguments)


@pytest.mark.parametrize("bias", [np.ones(COLS - 1, np.float32), np.ones((COLS, 1), np.float32)])
def test_a_wrong_bias(operands, bias):
    x, _, weight, _ = operands
    with pytest.raises(ValueError, match=r"^bias: shape"):
        nbnorm.layer_norm(x, COLS, weight, bias)


@pytest.mark.compiled
def test_an_out_that_overlaps_or_is_wrong_is_left_to_the_checks(operands):
    x, _, weight, bias = operands
    memory = np.zeros(x.size + COLS, x.dtype)
    shifted = memory[COLS:].reshape(x.shape)
    shifted[...] = x
    for out in (memory[:-COLS].reshape(x.shape), np.asfortranarray(x), x[1:], x.astype(np.float16), x.tolist()):
        assert quick.forward(shifted, COLS, weight, bias, 1e-5, False, out) is None
    read_only = x.copy()
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        nbnorm.layer_norm(x, COLS, weight, bias, out=read_only)
    np.testing.assert_array_equal(read_only, x)


def test_outs_of_gradients_too(operands):
    x, dy, weight, _ = operands
    memory = np.zeros(x.size + COLS, x.dtype)
    shifted, overlapping = memory[COLS:].reshape(x.shape), memory[:-COLS].reshape(x.shape)
    dx, dweight, dbias = np.empty_like(x), np.empty_like(weight), np.empty_like(weight)
    mask = (True, True, True)
    for arrays, out in (
        ((dy, shifted, weight), (overlapping, dweight, dbias)),
        ((shifted, x, weight), (overlapping, dweight, dbias)),
        ((dy, x, dx[1]), (dx, dweight, dbias)),
        ((dy, x, weight), (np.asfortranarray(dx), dweight, dbias)),
        ((dy, x, weight), (dx, np.empty(2 * COLS, x.dtype)[::2], dbias)),
        ((dy, x, weight), (dx, dweight, dbias.astype(dbias.dtype.newbyteorder()))),
        ((dy, x, weight), (dx, dweight, dbias.tolist())),
    ):
        assert quick.backward(*arrays[:2], COLS, arrays[2], 1e-5, False, mask, out) is None
    read_only = np.empty_like(x)
    read_only.flags.writeable = False
    for out, message in (
        ((dx, dx[0], dbias), "shares memory"),
        ((dx, dweight, dx[0]), "shares memory"),
        ((dx, dweight, dweight), "shares memory"),
        ((read_only, dweight, dbias), "read-only"),
        ((dx, read_only[0], dbias), "read-only"),
        ((dx[None], dweight, dbias), "shape"),
        ((dx, dweight[None], dbias), "shape"),
        ((np.empty_like(dx, np.float16), dweight, dbias), "dtype"),
        ((dx, dweight), "2 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            nbnorm.layer_norm_backward(dy, x, COLS, weight, out=out)
    nbnorm.layer_norm_backward(dy, x, COLS, weight, output_mask=(True, False, True))
    with pytest.raises(ValueError, match="output_mask"):
        nbnorm.layer_norm_backward(dy, x, COLS, weight, output_mask=(True, False, True), out=(dx, dweight, dbias))


@pytest.mark.parametrize("swapped", ["x", "dy", "weight", "bias"])
def test_other_byte_orders_go_the_long_way(operands, swapped):
    x, dy, weight, bias = operands
    y, grads = nbnorm.layer_norm(x, COLS, weight, bias), nbnorm.layer_norm_backward(dy, x, COLS, weight)
    arrays = {"x": x, "dy": dy, "weight": weight, "bias": bias}
    arrays[swapped] = arrays[swapped].astype(x.dtype.newbyteorder())
    dy, bias = arrays.pop("dy"), arrays.pop("bias")
    np.testing.assert_array_equal(nbnorm.layer_norm(**arrays, normalized_shape=COLS, bias=bias), y)
    out = np.empty_like(x, x.dtype.newbyteorder())
    np.testing.assert_array_equal(nbnorm.layer_norm(**arrays, normalized_shape=COLS, bias=bias, out=out), y)
    for grad, expected in zip(nbnorm.layer_norm_backward(dy, **arrays, normalized_shape=COLS), grads, strict=True):
        np.testing.assert_array_equal(grad, expected)


def test_other_layouts_and_dtypes_go_the_long_way(operands):
    x, dy, weight, bias = operands
    y, grads = nbnorm.layer_norm(x, COLS, weight, bias), nbnorm.layer_norm_backward(dy, x, COLS, weight)
    strided = np.asfortranarray(x)
    np.testing.assert_array_equal(nbnorm.layer_norm(strided, COLS, weight, bias), y)
    np.testing.assert_array_equal(nbnorm.layer_norm(x, COLS, weight.astype(">f8").astype(x.dtype), bias), y)
    np.testing.assert_array_equal(nbnorm.layer_norm_backward(np.asfortranarray(dy), strided, COLS, weight).dx, grads.dx)
    reversed_weight = weight[::-1].copy()[::-1]
    np.testing.assert_array_equal(nbnorm.layer_norm(x, COLS, reversed_weight, bias), y)
    wide = nbnorm.layer_norm(x, COLS, weight.astype(np.float64), bias)
    np.testing.assert_allclose(wide, y, rtol=1e-4, atol=1e-5)

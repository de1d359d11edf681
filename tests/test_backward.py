"""Are dx, dweight and dbias right, for every combination of dtype, weight, mode, statistics and output_mask?"""

import itertools

import ml_dtypes
import numpy as np
import pytest

import nbnorm
import oracle
from levels import deep
from test_forward import DTYPES, EXTREME, FAR, SHAPES
from tolerances import EPS, assert_grads

MASKS = list(itertools.product([True, False], repeat=3))
# all gradients, one of them, or none; and two of them
MASKS_BY_LEVEL = [*(mask for mask in MASKS if sum(mask) != 2), *deep(*(mask for mask in MASKS if sum(mask) == 2))]


@pytest.mark.parametrize(("shape", "normalized_shape"), SHAPES)
@pytest.mark.parametrize("given", [False, *deep(True)])
@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_mixed", [False, *deep(True)])
def test_full_product(rng, build, is_mixed, dtype, use_diff_of_squares, given, shape, normalized_shape):
    x = (3 * rng.standard_normal(shape) + 1).astype(dtype)
    row = shape[-np.size(normalized_shape) :]
    statistics = {}
    if given:
        wide = x.astype(np.float64)
        _, mean, rstd = nbnorm.layer_norm(wide, normalized_shape, None, None, 1e-3, return_stats=True)
        statistics = {"mean": mean, "rstd": rstd}
    weight_dtypes, dy_dtypes = [None, np.float32], [dtype]
    # the parallel build is of the same source; that it gives the same bits is tested elsewhere
    if is_mixed and build == "serial":
        weight_dtypes, dy_dtypes = [None, dtype, np.float32, np.float64], [dtype, np.float32, np.float64]
        if np.dtype(dtype).itemsize == 2:
            # each of these is a kernel of its own, a second to compile; float64 beside 16 bits has a test of its own
            weight_dtypes, dy_dtypes = weight_dtypes[:3], dy_dtypes[:2]
    for weight_dtype, dy_dtype in itertools.product(weight_dtypes, dy_dtypes):
        weight = None if weight_dtype is None else rng.standard_normal(row).astype(weight_dtype)
        dy = rng.standard_normal(shape).astype(dy_dtype)
        grads = nbnorm.layer_norm_backward(dy, x, normalized_shape, weight, 1e-3, use_diff_of_squares, **statistics)
        assert [type(grad) for grad in grads] == [np.ndarray] * 3
        assert grads.dx.dtype == dtype
        assert grads.dweight.dtype == grads.dbias.dtype == (weight_dtype or dtype)
        assert_grads(grads, dy, x, len(row), weight, 1e-3, use_diff_of_squares)


@pytest.mark.deep
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("dy_dtype", "weight_dtype"), [("x", np.float64), (np.float64, "x"), (np.float64, np.float64)])
def test_float64_beside_16_bits(rng, dtype, dy_dtype, weight_dtype):
    x = rng.standard_normal((20, 37)).astype(dtype)
    dy = rng.standard_normal(x.shape).astype(dtype if dy_dtype == "x" else dy_dtype)
    weight = rng.standard_normal(37).astype(dtype if weight_dtype == "x" else weight_dtype)
    assert_grads(nbnorm.layer_norm_backward(dy, x, 37, weight), dy, x, 1, weight)


@pytest.mark.parametrize("cols", [31, 300])
@pytest.mark.parametrize("scales", [(1e-36, 1e-3), (1e-20, 1e-20), (1e-11, 1e-33), (1e10, 1e33), (1e30, 1e-3), (1.0, 1e34)])
@pytest.mark.parametrize("long_row", [1 << 16, *deep(0)])
def test_products_beyond_the_range_of_float32(rng, monkeypatch, long_row, scales, cols):
    monkeypatch.setattr("nbnorm.cpu.sizes.LONG_ROW", long_row)
    with np.errstate(under="ignore"):
        x, dy = (np.reshape(scales, (2, 1, 1)) * rng.standard_normal((2, 20, cols))).astype(np.float32)
    dx = nbnorm.layer_norm_backward(dy, x, cols, eps=0.0).dx
    exact, _, _ = oracle.backward(dy, x, 1, None, 0.0)
    assert (abs(dx - exact) <= 8 * EPS["float32"] * (abs(exact) + abs(exact).max(1, keepdims=True))).all()


@pytest.mark.parametrize("mask", MASKS_BY_LEVEL)
@pytest.mark.parametrize("with_weight", [True, *deep(False)])
def test_output_mask_leaves_out_what_is_not_asked_for(rng, build, with_weight, mask):
    x, dy = rng.standard_normal((2, 40, 11), dtype=np.float32)
    weight = rng.standard_normal(11, dtype=np.float32) if with_weight else None
    all_grads = nbnorm.layer_norm_backward(dy, x, 11, weight)
    grads = nbnorm.layer_norm_backward(dy, x, 11, weight, output_mask=mask)
    for grad, full, wanted in zip(grads, all_grads, mask, strict=True):
        if wanted:
            np.testing.assert_array_equal(grad, full)
        else:
            assert grad is None


def test_given_statistics_are_used(rng):
    x, dy = rng.standard_normal((2, 6, 10))
    mean, rstd = rng.standard_normal((2, 6, 1))
    x_hat = (x - mean) * rstd
    dx = rstd * (dy - dy.mean(1, keepdims=True) - x_hat * (dy * x_hat).mean(1, keepdims=True))
    grads = nbnorm.layer_norm_backward(dy, x, 10, mean=mean, rstd=rstd)
    np.testing.assert_allclose(grads.dx, dx, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(grads.dweight, (dy * x_hat).sum(0), rtol=1e-12, atol=1e-14)


@pytest.mark.compiled
def test_large_arrays(rng):
    x, dy = rng.standard_normal((2, 3000, 96), dtype=np.float32)
    weight = rng.standard_normal(96, dtype=np.float32)
    assert_grads(nbnorm.layer_norm_backward(dy, x, 96, weight), dy, x, 1, weight)


def test_difference_of_squares_loses_the_digits_that_its_formula_loses():
    x, dy = np.array([[[1e6 + 0.1, 1e6 + 1.3, 1e6 + 2.7, 1e6 + 3.1]], [[1, 0, 2, 0]]])
    dx, centred = (nbnorm.layer_norm_backward(dy, x, 4, None, 1e-5, mode).dx for mode in (True, False))
    assert 1e-8 < np.abs(dx / centred - 1).max() < 1e-2


@pytest.mark.parametrize("dtype", [np.float32, *deep(np.float64)])
@pytest.mark.parametrize("mean", [1e3, 1e4, 1e6])
def test_rows_with_a_large_mean_keep_their_digits(rng, mean, dtype):
    x = (rng.standard_normal((24, 768)) + mean).astype(dtype)
    dy = rng.standard_normal((24, 768)).astype(dtype)
    weight = rng.standard_normal(768).astype(dtype)
    assert_grads(nbnorm.layer_norm_backward(dy, x, 768, weight), dy, x, 1, weight, cancels=False)


def test_float32_dy_with_a_large_mean_keeps_its_digits(rng):
    x = rng.standard_normal((24, 768), dtype=np.float32)
    dy = rng.standard_normal((24, 768), dtype=np.float32) + np.float32(1e4)
    assert_grads(nbnorm.layer_norm_backward(dy, x, 768, output_mask=(True, False, False)), dy, x, 1, cancels=False)


@pytest.mark.parametrize("first", [0.7, 0.1, -0.9])
@pytest.mark.parametrize("cols", [31, 48, 100, 127, 255, 768, 4096])
@pytest.mark.parametrize("long_row", [1 << 16, *deep(0)])
def test_dy_of_one_element_keeps_its_digits(rng, monkeypatch, long_row, cols, first):
    # all other g are the same distance from the first one: sums of them are off by the same in every lane, if they are off;
    # the elements that the shift comes from are far from the mean, and there is a deviation that is large
    monkeypatch.setattr("nbnorm.cpu.sizes.LONG_ROW", long_row)
    x = rng.standard_normal((8, cols), dtype=np.float32)
    x[:, [0, cols // 3, cols * 2 // 3, -1]] = np.linspace(-2.4, 2.4, 8)[:, None]
    x[:, 7] = cols**0.5 * 0.9
    dy = np.zeros_like(x)
    dy[:, 0] = first
    weight = rng.standard_normal(cols, dtype=np.float32)
    weight[:2] = 1
    assert_grads(nbnorm.layer_norm_backward(dy, x, cols), dy, x, 1, cancels=False)
    assert_grads(nbnorm.layer_norm_backward(dy, x, cols, weight), dy, x, 1, weight, cancels=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [20, 300])
@pytest.mark.parametrize("long_row", [1 << 16, *deep(0)])
def test_rows_of_padding(rng, monkeypatch, long_row, cols, dtype):
    monkeypatch.setattr("nbnorm.cpu.sizes.LONG_ROW", long_row)
    x, dy = (rng.standard_normal((9, cols)).astype(dtype) for _ in range(2))
    dy[[0, 3, 8]] = 0
    dy[3, 5] = -0.0
    grads = nbnorm.layer_norm_backward(dy, x, cols)
    assert not grads.dx[[0, 3, 8]].any()
    assert_grads(grads, dy, x, 1)


@pytest.mark.deep
@pytest.mark.parametrize("cols", [100, 300])
@pytest.mark.parametrize("dy_scale", [0, 1e-36, 1e38])
@pytest.mark.parametrize("long_row", [1 << 16, *deep(0)])
def test_statistics_do_not_depend_on_dy(rng, monkeypatch, long_row, dy_scale, cols):
    # where the sums of g need another sweep than the statistics; dweight of rows that have a dy shows it
    monkeypatch.setattr("nbnorm.cpu.sizes.LONG_ROW", long_row)
    x = rng.standard_normal((64, cols), dtype=np.float32) + np.float32(1)
    x[:, [0, -1]] = 1.5
    with np.errstate(under="ignore"):
        dy = (dy_scale * rng.uniform(-1, 1, x.shape)).astype(np.float32)
    dy[:, 1] = 1
    for use_diff_of_squares in (False, True):
        alone, both = (
            nbnorm.layer_norm_backward(dy, x, cols, use_diff_of_squares=use_diff_of_squares, output_mask=mask).dweight
            for mask in ((False, True, False), (True, True, True))
        )
        np.testing.assert_array_equal(both, alone)


@pytest.mark.parametrize("use_diff_of_squares", [False, *deep(True)])
@pytest.mark.parametrize(
    ("dy_dtype", "x_dtype", "weight_dtype"),
    [
        ("f4", "f2", "f4"),
        pytest.param("f2", "f4", "f2", marks=pytest.mark.deep),
        pytest.param("f4", ml_dtypes.bfloat16, ml_dtypes.bfloat16, marks=pytest.mark.deep),
        pytest.param(ml_dtypes.bfloat16, "f4", "f4", marks=pytest.mark.deep),
    ],
)
@pytest.mark.parametrize("cols", [128, 300])
def test_mixed_dtypes_of_longer_rows(rng, cols, dy_dtype, x_dtype, weight_dtype, use_diff_of_squares):
    x, dy = (rng.standard_normal((9, cols)).astype(dtype) for dtype in (x_dtype, dy_dtype))
    weight = rng.standard_normal(cols).astype(weight_dtype)
    grads = nbnorm.layer_norm_backward(dy, x, cols, weight, use_diff_of_squares=use_diff_of_squares)
    assert_grads(grads, dy, x, 1, weight, use_diff_of_squares=use_diff_of_squares, sums="float32")


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (np.float32, 1e38),
        pytest.param(np.float64, 1e305, marks=pytest.mark.deep),
        (np.float32, 1e-35),
        pytest.param(np.float64, 1e-300, marks=pytest.mark.deep),
    ],
)
def test_given_statistics_of_rows_at_the_edge_of_their_range(rng, dtype, scale):
    # any two of them differ by less than the largest number; underflow is what the small ones are for
    with np.errstate(under="ignore"):
        x = (scale * rng.uniform(-1.5, 1.5, (20, 300))).astype(dtype)
    dy = rng.standard_normal(x.shape).astype(dtype)
    _, mean, rstd = nbnorm.layer_norm(x, 300, eps=0.0, return_stats=True)
    grads = nbnorm.layer_norm_backward(dy, x, 300, eps=0.0, mean=mean, rstd=rstd)
    assert_grads(grads, dy, x, 1, eps=0.0, mean=mean, rstd=rstd)


@pytest.mark.parametrize("cols", [15, 40, 127, 200])
def test_given_statistics_beside_a_large_dy(rng, cols):
    # float32 cannot hold the sum of a row
    x = rng.standard_normal((20, cols), dtype=np.float32)
    dy = (3e37 * rng.uniform(0.5, 1.5, x.shape)).astype(np.float32)
    _, mean, rstd = nbnorm.layer_norm(x, cols, return_stats=True)
    assert_grads(nbnorm.layer_norm_backward(dy, x, cols, mean=mean, rstd=rstd), dy, x, 1)


@pytest.mark.parametrize("dtype", [np.float16, *deep(ml_dtypes.bfloat16)])
def test_sums_over_rows_are_wider_than_16_bit(rng, dtype):
    # 4096 ones in float16 stop growing at 2048
    dy = np.ones((4096, 3), dtype)
    x = rng.standard_normal((4096, 3)).astype(dtype)
    np.testing.assert_array_equal(nbnorm.layer_norm_backward(dy, x, 3).dbias, np.full(3, 4096, dtype))


@pytest.mark.deep
@pytest.mark.parametrize("dtype", [np.float16, *deep(ml_dtypes.bfloat16)])
@pytest.mark.parametrize("given", [False, *deep(True)])
def test_sums_over_rows_are_rounded_once(dtype, given):
    # a little off the middle of two 16-bit numbers, by less than float32 holds
    half = EPS[np.dtype(dtype).name] / 2
    dy = np.array([[1 + half + 2.0**-40, 1 + 3 * half - 2.0**-40, -1 - half - 2.0**-40, 1e300]])
    out = (None, None, np.empty(4, dtype)) if given else None
    dbias = nbnorm.layer_norm_backward(dy, np.zeros((1, 4), dtype), 4, np.zeros(4, dtype), out=out).dbias
    np.testing.assert_array_equal(dbias, np.array([1 + 2 * half, 1 + 2 * half, -1 - 2 * half, np.inf], dtype))


@pytest.mark.parametrize(("dtype", "row", "eps"), EXTREME)
@pytest.mark.parametrize("mask", [MASKS[0], *deep(*MASKS[1:-1])])
def test_squares_that_leave_the_range_of_the_dtype(build, dtype, row, eps, mask):
    x = np.array([row, [1, 2, 3, 5]], dtype)
    dy = np.array([[1, 2, -1, 0.5], [0, 1, 0, -1]], np.float32)
    weight = np.array([1, 2, -1, 1], dtype)
    assert_grads(nbnorm.layer_norm_backward(dy, x, 4, weight, eps, output_mask=mask), dy, x, 1, weight, eps)


@pytest.mark.parametrize(("mean", "deviation"), FAR)
def test_far_rows_whose_squares_leave_the_range_keep_their_digits(rng, mean, deviation):
    x = mean + deviation * rng.standard_normal((3, 1000))
    dy = rng.standard_normal(x.shape)
    assert_grads(nbnorm.layer_norm_backward(dy, x, 1000, eps=0.0), dy, x, 1, eps=0.0)


@pytest.mark.deep
def test_float64_dy_of_float32_rows_keeps_its_digits(rng):
    x = rng.standard_normal((24, 768), dtype=np.float32)
    dy = rng.standard_normal((24, 768)) + 1e7
    grads = nbnorm.layer_norm_backward(dy, x, 768, output_mask=(True, False, False))
    assert_grads(grads, dy, x, 1, cancels=False)


@pytest.mark.parametrize(
    ("dtype", "value", "eps"),
    [(np.float32, 3e37, 1e-5), (np.float32, 1e25, 1e-30), pytest.param(np.float64, 1e306, 1e-5, marks=pytest.mark.deep)],
)
@pytest.mark.parametrize("long_row", [1 << 16, *deep(0)])
def test_constant_rows_of_large_numbers(rng, monkeypatch, long_row, dtype, value, eps):
    monkeypatch.setattr("nbnorm.cpu.sizes.LONG_ROW", long_row)
    x = np.full((3, 21), value, dtype)
    dy = rng.standard_normal(x.shape).astype(dtype)
    assert_grads(nbnorm.layer_norm_backward(dy, x, 21, eps=eps), dy, x, 1, eps=eps)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (np.float32, 1),
        (np.float32, 1e37),
        pytest.param(np.float64, 1, marks=pytest.mark.deep),
        pytest.param(np.float64, 1e306, marks=pytest.mark.deep),
    ],
)
@pytest.mark.parametrize("cols", [21, 300])
@pytest.mark.parametrize("long_row", [1 << 16, *deep(0)])
def test_what_all_elements_have_in_common_is_no_part_of_dx(rng, monkeypatch, long_row, cols, dtype, scale):
    monkeypatch.setattr("nbnorm.cpu.sizes.LONG_ROW", long_row)
    x = (rng.standard_normal((3, cols)) * scale).astype(dtype)
    dy = np.full(x.shape, -1.4, dtype)
    for weight in (None, np.ones(cols, dtype), np.full(cols, 0.5, dtype)):
        np.testing.assert_array_equal(nbnorm.layer_norm_backward(dy, x, cols, weight).dx, 0)
    # here dy * weight is no number of the type: twice as many digits as that has are left
    dx = nbnorm.layer_norm_backward(dy, x, cols, np.full(cols, 0.3, dtype)).dx
    largest_rstd = 1 / float((x / dtype(scale)).std(axis=1).min()) / scale
    assert np.abs(dx).max() <= float(np.finfo(dtype).eps) ** 2 * 1.4 * 0.3 * largest_rstd


@pytest.mark.deep
@pytest.mark.parametrize("cols", [15, 768])
def test_float64_dweight_of_far_float32_rows_keeps_its_digits(rng, cols):
    x = rng.standard_normal((24, cols), dtype=np.float32) + np.float32(1e4)
    dy = rng.standard_normal((24, cols))
    grads = nbnorm.layer_norm_backward(dy, x, cols, np.ones(cols), output_mask=(False, True, False))
    assert_grads(grads, dy, x, 1, np.ones(cols))


@pytest.mark.deep
def test_float64_statistics_of_float32_rows_keep_their_digits(rng):
    x = rng.standard_normal((24, 768), dtype=np.float32) + np.float32(1e6)
    dy = rng.standard_normal((24, 768), dtype=np.float32)
    _, mean, rstd = nbnorm.layer_norm(x.astype(np.float64), 768, return_stats=True)
    assert_grads(nbnorm.layer_norm_backward(dy, x, 768, mean=mean, rstd=rstd), dy, x, 1, cancels=False)


@pytest.mark.parametrize("use_diff_of_squares", [False, *deep(True)])
@pytest.mark.parametrize("with_weight", [True, *deep(False)])
@pytest.mark.parametrize("with_bias", [True, *deep(False)])
def test_numerical_derivative_of_our_own_forward(rng, with_bias, with_weight, use_diff_of_squares):
    x, dy = rng.standard_normal((2, 3, 7))
    weight = rng.standard_normal(7) if with_weight else None
    bias = rng.standard_normal(7) if with_bias else None
    grads = nbnorm.layer_norm_backward(dy, x, 7, weight, 1e-2, use_diff_of_squares)

    def loss(x, weight, bias):
        return (dy * nbnorm.layer_norm(x, 7, weight, bias, 1e-2, use_diff_of_squares)).sum()

    def derivative(arguments, which):
        # central difference: its own error is step² and eps / step, 1e-10 both
        step = 1e-5
        result = np.empty(arguments[which].shape)
        for index in np.ndindex(result.shape):
            high, low = ([np.copy(a) for a in arguments] for _ in range(2))
            high[which][index] += step
            low[which][index] -= step
            result[index] = (loss(*high) - loss(*low)) / (2 * step)
        return result

    arguments = [x, np.ones(7) if weight is None else weight, np.zeros(7) if bias is None else bias]
    for which, grad in enumerate(grads):
        np.testing.assert_allclose(grad, derivative(arguments, which), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_or_inf_stays_in_its_rows_dx(rng, build, bad):
    x, dy = rng.standard_normal((2, 5, 37), dtype=np.float32)
    clean = nbnorm.layer_norm_backward(dy, x, 37).dx
    x[1, 4] = bad
    dy[3, 5] = bad
    dx = nbnorm.layer_norm_backward(dy, x, 37).dx
    np.testing.assert_array_equal(dx[[0, 2, 4]], clean[[0, 2, 4]])
    assert np.isnan(dx[[1, 3]]).any(axis=1).all()


def test_saved_float32_statistics_are_good_enough(rng):
    x, dy = rng.standard_normal((2, 50, 64), dtype=np.float32)
    _, mean, rstd = nbnorm.layer_norm(x, 64, return_stats=True)
    saved = nbnorm.layer_norm_backward(dy, x, 64, mean=mean, rstd=rstd)
    recomputed = nbnorm.layer_norm_backward(dy, x, 64)
    np.testing.assert_allclose(saved.dx, recomputed.dx, atol=16 * EPS["float32"])

"""Are the gradients right on CUDA arrays, for every combination of dtypes, weight, statistics, modes and masks?"""

import itertools

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from device import DTYPES, LEVEL, SHAPES, large, normal, to_device, to_host
from nbnorm.cuda import sizes
from tolerances import CUDA_GRADIENT_EPS, assert_grads

pytestmark = pytest.mark.hardware

# rows longer than a block holds backward, in vectors and one by one; and in float64, where they are shorter
LONG_SHAPES = [(3, 8200), (2, 8193)]
LONG_64 = 2056
OPTIONS = [{}, {"use_diff_of_squares": True}, {"is_given": True}]
MASKS = [mask for mask in itertools.product([False, True], repeat=3) if any(mask)]


def backward(dy, x, cols, weight=None, *arguments, mean=None, rstd=None, **options):
    """Of NumPy arrays, by way of the device."""
    dy, x, weight, mean, rstd = (None if array is None else to_device(array) for array in (dy, x, weight, mean, rstd))
    grads = nbnorm.layer_norm_backward(dy, x, cols, weight, *arguments, mean=mean, rstd=rstd, **options)
    return nbnorm.functional.LayerNormGrads(*(None if grad is None else to_host(grad) for grad in grads))


def sums(*operands):
    """The type that the kernels compute in."""
    return "float64" if any(array is not None and array.dtype == np.float64 for array in operands) else "float32"


@pytest.fixture
def few_groups(monkeypatch):
    """Blocks that take many rows each, as on a device they do where there are many."""
    if LEVEL != "device":
        monkeypatch.setattr(sizes, "MULTIPROCESSORS", 1)


def assert_right(grads, dy, x, weight=None, eps=1e-5, use_diff_of_squares=False, cancels=True):
    assert_grads(
        grads, dy, x, 1, weight, eps, use_diff_of_squares, cancels,
        gradient_eps=CUDA_GRADIENT_EPS, sums=sums(dy, x, weight),
    )  # fmt: skip


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("use_diff_of_squares", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(rng, dtype, use_diff_of_squares, rows, cols):
    x = normal(rng, (rows, cols), dtype) * dtype(3) + dtype(1)
    # half of them in each mode, which is the same from the statistics on
    combinations = ((None, dtype), (dtype, np.float32)), ((np.float32, dtype), (np.float64, np.float16))
    for weight_dtype, dy_dtype in combinations[use_diff_of_squares]:
        dy = normal(rng, (rows, cols), dy_dtype)
        weight = None if weight_dtype is None else normal(rng, cols, weight_dtype)
        grads = backward(dy, x, cols, weight, 1e-3, use_diff_of_squares)
        assert grads.dx.dtype == dtype
        assert grads.dweight.dtype == grads.dbias.dtype == (weight_dtype or dtype)
        assert_right(grads, dy, x, weight, 1e-3, use_diff_of_squares)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int32])
def test_a_bfloat16_weight_of_other_rows(rng, dtype):
    """dweight and dbias are of the weight's dtype, which x's library has no other array of; also of a known call."""
    x = (10 * rng.standard_normal((3, 16))).astype(dtype)
    dy = normal(rng, (3, 16), np.float32)
    weight = normal(rng, 16, ml_dtypes.bfloat16)
    for _ in range(2):
        grads = backward(dy, x, 16, weight)
        assert grads.dweight.dtype == grads.dbias.dtype == ml_dtypes.bfloat16
        assert grads.dx.dtype == (np.float64 if dtype == np.int32 else dtype)
        assert_right(grads, dy, x, weight)


def test_many_equal_rows(rng, few_groups):
    """The same number added again and again is rounded the same way each time."""
    dy = np.full((6000, 3), 0.1, np.float32)
    x = normal(rng, (6000, 3), np.float32)
    assert_right(backward(dy, x, 3), dy, x)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(3, 5), (70, 9), (9, 256), (3, 1000), (2, 1001)])
def test_masks_and_statistics(rng, rows, cols, is_given, mask):
    dy, x = normal(rng, (2, rows, cols), np.float32)
    weight = normal(rng, cols, np.float32)
    whole = backward(dy, x, cols, weight)
    statistics = {}
    if is_given:
        _, mean, rstd = nbnorm.layer_norm(x, cols, return_stats=True)
        statistics = {"mean": mean, "rstd": rstd}
        whole = backward(dy, x, cols, weight, **statistics)
    assert_right(whole, dy, x, weight)
    # what is not asked for changes nothing else
    for wanted, expected, grad in zip(
        mask, whole, backward(dy, x, cols, weight, output_mask=mask, **statistics), strict=True
    ):
        np.testing.assert_array_equal(grad, expected if wanted else None)


@pytest.mark.parametrize("dtypes", [(np.float64, np.float64), (np.float16, np.float32), (np.int32, np.float64)], ids=str)
def test_statistics_of_any_dtype(rng, dtypes):
    dy, x = normal(rng, (2, 4, 24), np.float32)
    mean, rstd = np.full((4, 1), 2).astype(dtypes[0]), np.full((4, 1), 0.5).astype(dtypes[1])
    grads = backward(dy, x, 24, mean=mean, rstd=rstd)
    x_hat = (x.astype(np.float64) - 2) / 2
    dx = (dy - dy.mean(1, keepdims=True) - x_hat * (dy * x_hat).mean(1, keepdims=True)) / 2
    np.testing.assert_allclose(grads.dx, dx, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads.dweight, (dy * x_hat).sum(0), rtol=1e-5, atol=1e-6)


def statistics_of(x, options):
    """The mode and, for "is_given", mean and rstd, of the parameters of a test."""
    _, mean, rstd = nbnorm.layer_norm(x, x.shape[1], return_stats=True)
    mode = {"use_diff_of_squares": bool(options.get("use_diff_of_squares"))}
    mask = {"output_mask": options["output_mask"]} if "output_mask" in options else {}
    return mode | mask | ({"mean": mean, "rstd": rstd} if "is_given" in options else {})


@pytest.mark.large
@pytest.mark.parametrize(("rows", "cols"), LONG_SHAPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rows_that_no_block_holds(rng, dtype, options, rows, cols):
    # means that drift, which the segments have each their own of
    drift = np.linspace(0, 5, cols).astype(dtype)
    x, dy = normal(rng, (rows, cols), dtype) + drift, normal(rng, (rows, cols), dtype) + drift
    weight = normal(rng, cols, np.float32)
    options = statistics_of(x, options)
    assert_right(backward(dy, x, cols, weight, **options), dy, x, weight, use_diff_of_squares=options["use_diff_of_squares"])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_long_rows_in_float64(rng, options):
    dy, x = normal(rng, (2, 2, LONG_64), np.float64)
    options = statistics_of(x, options)
    whole = backward(dy, x, LONG_64, **options)
    assert_right(whole, dy, x, use_diff_of_squares=options["use_diff_of_squares"])
    for mask in MASKS:
        grads = backward(dy, x, LONG_64, output_mask=mask, **options)
        for wanted, expected, grad in zip(mask, whole, grads, strict=True):
            np.testing.assert_array_equal(grad, expected if wanted else None)


@pytest.mark.parametrize(("rows", "cols"), [(9, 6), (40, 64), (5, 300), (3, 2500)])
@pytest.mark.parametrize("is_given", [False, True])
def test_order_of_threads(rng, order, is_given, rows, cols):
    dy, x = normal(rng, (2, rows, cols), np.float32)
    weight = normal(rng, cols, np.float32)
    statistics = {}
    if is_given:
        _, mean, rstd = nbnorm.layer_norm(x, cols, return_stats=True)
        statistics = {"mean": mean, "rstd": rstd}
    assert_right(backward(dy, x, cols, weight, **statistics), dy, x, weight)


@pytest.mark.parametrize(
    ("rows", "cols", "dtype"),
    [(300, 9, np.float32), (77, 300, np.float32), (21, 1001, np.float32), (5, LONG_64, np.float64)],
)
@pytest.mark.parametrize("options", [*OPTIONS, {"use_diff_of_squares": True, "output_mask": (False, True, False)}], ids=str)
def test_many_rows_of_a_block(rng, order, few_groups, options, rows, cols, dtype):
    dy, x = normal(rng, (2, rows, cols), dtype)
    weight = normal(rng, cols, dtype)
    options = statistics_of(x, options)
    grads = backward(dy, x, cols, weight, **options)
    assert_right(grads, dy, x, weight, use_diff_of_squares=options["use_diff_of_squares"])


@pytest.mark.parametrize(("cols", "mean"), [(5, 0), (5, 1e3), (768, 0), (768, 1e3), large(8200, 1e3)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_magnitudes_and_means(rng, cols, scale, mean):
    x = ((rng.standard_normal((2, cols)) + mean) * scale).astype(np.float32)
    dy = normal(rng, (2, cols), np.float32)
    eps = 0.0 if scale < 1 else 1e-5
    assert_right(backward(dy, x, cols, eps=eps), dy, x, eps=eps, cancels=cols < 10)


@pytest.mark.parametrize("cols", [64, 2500, large(8200)])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_magnitudes_of_dy(rng, cols, scale):
    dy, x = normal(rng, (2, 2, cols), np.float32)
    dy *= np.float32(scale)
    # the allowed error of the sums over rows is absolute
    assert_right(backward(dy, x, cols, output_mask=(True, False, False)), dy, x, cancels=False)


@pytest.mark.parametrize("cols", [64, 768, 8200])
def test_a_large_mean_of_dy_costs_dx_no_digits(rng, cols):
    dy = (rng.standard_normal((2, cols)) + 1e4).astype(np.float32)
    x = normal(rng, (2, cols), np.float32)
    assert_right(backward(dy, x, cols, output_mask=(True, False, False)), dy, x, cancels=False)


@pytest.mark.parametrize("cols", [5, 64, 2500, large(8200)])
def test_nan_and_inf_stay_in_their_rows(rng, cols):
    dy, x = normal(rng, (2, 5, cols), np.float32)
    expected = backward(dy[[0, 3]], x[[0, 3]], cols).dx
    x[1, 0], x[2, cols - 1], dy[4, cols // 2] = np.nan, np.inf, -np.inf
    dx = backward(dy, x, cols).dx
    assert np.isnan(dx[[1, 2]]).all()
    assert not np.isfinite(dx[4]).any()
    np.testing.assert_array_equal(dx[[0, 3]], expected)


@pytest.mark.parametrize("cols", [6, 64, 300, 600])
def test_dx_of_a_row_is_the_same_in_any_batch(rng, order, cols):
    dy, x = normal(rng, (2, 9, cols), np.float32)
    x[1] *= np.float32(1e30)
    weight = normal(rng, cols, np.float32)
    whole = backward(dy, x, cols, weight)
    for r in range(9):
        np.testing.assert_array_equal(backward(dy[r : r + 1], x[r : r + 1], cols, weight).dx, whole.dx[r : r + 1])
    np.testing.assert_array_equal(backward(dy[::-1].copy(), x[::-1].copy(), cols, weight).dx, whole.dx[::-1])


def test_constant_rows(rng):
    dy = normal(rng, (3, 64), np.float32)
    x = np.full((3, 64), 255, np.float32)
    for eps in (1e-5, 1e-60, 1e-300):
        assert_right(backward(dy, x, 64, eps=eps), dy, x, eps=eps, cancels=False)


def test_zero_rows_and_zero_columns():
    grads = backward(*np.empty((2, 0, 8), np.float32), 8, np.ones(8, np.float16))
    assert grads.dx.shape == (0, 8)
    for grad in grads[1:]:
        assert grad.dtype == np.float16
        np.testing.assert_array_equal(grad, np.zeros(8))
    grads = backward(*np.empty((2, 3, 0), np.float32), 0)
    assert [grad.shape for grad in grads] == [(3, 0), (0,), (0,)]


def test_several_normalized_dimensions(rng):
    dy, x = normal(rng, (2, 2, 3, 4, 5), np.float32)
    weight = normal(rng, (4, 5), np.float32)
    _, mean, rstd = nbnorm.layer_norm(x, (4, 5), return_stats=True)
    for statistics in ({}, {"mean": mean, "rstd": rstd}):
        grads = backward(dy, x, (4, 5), weight, **statistics)
        assert grads.dweight.shape == grads.dbias.shape == (4, 5)
        assert_grads(grads, dy, x, 2, weight, gradient_eps=CUDA_GRADIENT_EPS)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, bool])
def test_integers_become_float64(rng, dtype):
    x = rng.integers(0, 2 if dtype is bool else 100, (3, 8)).astype(dtype)
    dy = rng.integers(0, 5, (3, 8)).astype(np.int32)
    grads = backward(dy, x, 8, rng.integers(0, 5, 8).astype(np.int32))
    assert {grad.dtype for grad in grads} == {np.dtype(np.float64)}
    grads = backward(dy, x, 8)
    for grad, expected in zip(grads, nbnorm.layer_norm_backward(dy, x, 8), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-13, atol=1e-13)


def test_the_derivative_of_our_own_forward(rng):
    """Of the sum of y * dy, along a random direction of each operand."""
    dy, x = normal(rng, (2, 4, 96), np.float64)
    weight, bias = normal(rng, (2, 96), np.float64)
    grads = backward(dy, x, 96, weight)

    def value(x, weight, bias):
        return (to_host(nbnorm.layer_norm(*map(to_device, (x,)), 96, *map(to_device, (weight, bias)))) * dy).sum()

    step = 1e-6
    operands = (x, weight, bias)
    for i, (operand, grad) in enumerate(zip(operands, grads, strict=True)):
        direction = rng.standard_normal(operand.shape)
        ahead, behind = (
            value(*(o + sign * step * direction if j == i else o for j, o in enumerate(operands))) for sign in (1, -1)
        )
        np.testing.assert_allclose((ahead - behind) / (2 * step), (grad * direction).sum(), rtol=1e-7)

"""Do the kernels for short rows give the bits of the ordinary ones, or, of 16 bits, where sums differ, right results?"""

import itertools

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from levels import deep
from nbnorm.cpu import sizes
from nbnorm.cpu.kernels.statistics import BLOCK
from tolerances import assert_grads, assert_statistics, assert_y

# parts of sixteen, and all numbers of sixteens
COLS = [1, 2, 15, 16, 17, 40, 64, 100, 127]


def operands(rng, rows, cols, dtype):
    """Ordinary rows between constant ones, ones with NaN or Inf, and ones whose squares leave the range of float32."""
    with np.errstate(all="ignore"):
        x, dy = rng.standard_normal((2, rows, cols)).astype(dtype)
        x[3::7] = 5
        x[5::16] *= np.float32(1e-30)
        x[6::16] *= np.float32(1e30)
        x[8:9, -1:] = np.nan
        x[15:16, :1] = np.inf
        x[16:17, :1] = 1e4
        # padding, and where products with x leave the range of float32
        dy[2::9] *= np.float32(1e-36)
        dy[4::9] = 0
        weight, bias = rng.standard_normal((2, cols)).astype(dtype)
    return x, dy, weight, bias


def results(x, dy, weight, bias, **options):
    cols = x.shape[1]
    y, mean, rstd = nbnorm.layer_norm(x, cols, weight, bias, return_stats=True, **options)
    grads = nbnorm.layer_norm_backward(dy, x, cols, weight, **options)
    given = nbnorm.layer_norm_backward(dy, x, cols, weight, mean=mean, rstd=rstd, **options)
    return y, mean, rstd, *grads, *given


@pytest.mark.parametrize("dtype", [np.float32, *deep(np.float64)])
@pytest.mark.parametrize("options", [{}, {"eps": 0.0}, *deep({"use_diff_of_squares": True})], ids=str)
@pytest.mark.parametrize("streamed_bytes", [sizes.STREAMED_BYTES, *deep(0)])
def test_same_bits(rng, monkeypatch, the_long_way, dtype, options, streamed_bytes):
    monkeypatch.setattr(sizes, "STREAMED_BYTES", streamed_bytes)
    for cols, rows in itertools.product(COLS, [1, 16, 53]):
        case = operands(rng, rows, cols, dtype)
        actual = results(*case, **options)
        with monkeypatch.context() as patches:
            patches.setattr(sizes, "SHORT_ROW", 0)
            expected = results(*case, **options)
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{rows} x {cols}")


@pytest.mark.parametrize("dtype", [np.float16, *deep(ml_dtypes.bfloat16)])
@pytest.mark.parametrize("use_diff_of_squares", [False, *deep(True)])
@pytest.mark.parametrize("cols", [1, 17, 64, 127, 128, 200, 256, 257])
def test_rows_of_16_bits(rng, cols, use_diff_of_squares, dtype):
    x, dy, weight, bias = operands(rng, 53, cols, dtype)
    options = {"use_diff_of_squares": use_diff_of_squares}
    y, mean, rstd, dx, *_ = results(x, dy, weight, bias, **options)
    for i in (0, 2, 3, 5, 6, 8, 15, 16, 52):
        alone = results(x[i : i + 1], dy[i : i + 1], weight, bias, **options)
        for a, b in zip(alone[:4], (y[i], mean[i], rstd[i], dx[i]), strict=True):
            # NumPy knows no NaN of bfloat16
            np.testing.assert_array_equal(a[0].astype(np.float32), b.astype(np.float32))
    is_finite = np.isfinite(x.astype(np.float32)).all(1)
    x, dy = x[is_finite], dy[is_finite]
    assert_y(y[is_finite], x, 1, weight, bias, **options)
    assert_statistics(mean[is_finite], rstd[is_finite], x, 1, **options)
    assert_grads(nbnorm.layer_norm_backward(dy, x, cols, weight, **options), dy, x, 1, weight, **options)


def test_any_given_statistics(rng, monkeypatch, the_long_way):
    x, dy, weight, _ = operands(rng, 37, 40, np.float32)
    values = np.array([0, 1, np.inf, -np.inf, np.nan, 3e38], np.float32)
    mean, rstd = (statistics.reshape(-1, 1)[:36] for statistics in np.meshgrid(values, values))
    call = dy[:36], x[:36], 40, weight
    with np.errstate(all="ignore"):
        actual = nbnorm.layer_norm_backward(*call, mean=mean, rstd=rstd)
        monkeypatch.setattr(sizes, "SHORT_ROW", 0)
        for a, b in zip(actual, nbnorm.layer_norm_backward(*call, mean=mean, rstd=rstd), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("has_weight", [True, *deep(False)])
@pytest.mark.parametrize("output_mask", [(True, False, False), *deep((False, True, False), (False, False, True))])
def test_gradients_alone(rng, monkeypatch, the_long_way, has_weight, output_mask):
    x, dy, weight, _ = operands(rng, 53, 40, np.float32)
    call = dy, x, 40, weight if has_weight else None
    actual = nbnorm.layer_norm_backward(*call, output_mask=output_mask)
    monkeypatch.setattr(sizes, "SHORT_ROW", 0)
    for a, b in zip(actual, nbnorm.layer_norm_backward(*call, output_mask=output_mask), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b)


def test_a_row_is_short_up_to_what_the_kernels_take():
    # of longer ones, the ordinary kernels take float64 sums of float32 ones
    assert sizes.SHORT_ROW <= BLOCK

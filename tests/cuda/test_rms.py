"""Is RMS norm right on CUDA arrays, and its gradients: dtypes, weight, statistics, masks, row length, extreme rows?"""

import numpy as np
import pytest

import nbnorm
from device import DTYPES, LEVEL, normal, to_device, to_host
from magnitudes import EPSILONS, rows
from mean_square import assert_grads, assert_y, backward, forward
from nbnorm.cuda import sizes

pytestmark = pytest.mark.hardware

# a single element; rows that share warps, the last one not full; a warp, odd rows, read one by one; several warps
SHAPES = [(1, 1), (70, 9), (3, 1000), (2, 129), (1, 1100)]
MASKS = [(True, True), (True, False), (False, True)]


@pytest.fixture
def few_groups(monkeypatch):
    """Blocks that take many rows each, as on a device they do where there are many."""
    if LEVEL != "device":
        monkeypatch.setattr(sizes, "MULTIPROCESSORS", 1)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(rng, dtype, rows, cols):
    # a mean that is large beside the deviations, which nothing here depends on
    x = normal(rng, (rows, cols), dtype) + dtype(3)
    combinations = (None, dtype, False), (dtype, np.float32, True), (np.float64, np.float16, False)
    for weight_dtype, dy_dtype, is_given in combinations:
        weight = None if weight_dtype is None else normal(rng, cols, weight_dtype)
        dy = normal(rng, (rows, cols), dy_dtype)
        y, rstd = forward(x, weight)
        assert y.dtype == dtype
        assert rstd.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert rstd.shape == (rows, 1)
        assert_y(y, rstd, x, weight)
        given = rstd if is_given else None
        grads = backward(dy, x, weight, rstd=given)
        assert (grads.dx.dtype, grads.dweight.dtype) == (dtype, weight_dtype or dtype)
        assert_grads(grads, dy, x, weight, rstd=given)


def test_rows_that_no_block_holds(rng, short_segments):
    cols = short_segments
    # segments of other sizes of numbers, of which squares overflow
    dy, x = normal(rng, (2, 2, cols), np.float32)
    x *= np.geomspace(1e-5, 1e25, cols).astype(np.float32)
    weight = normal(rng, cols, np.float32)
    y, rstd = forward(x, weight)
    assert_y(y, rstd, x, weight)
    for given in (None, rstd):
        assert_grads(backward(dy, x, weight, rstd=given), dy, x, weight, rstd=given)


def assert_masks(whole, *arguments, **options):
    """What is not asked for changes nothing else."""
    for mask in MASKS[1:]:
        for wanted, expected, grad in zip(mask, whole, backward(*arguments, output_mask=mask, **options), strict=True):
            np.testing.assert_array_equal(grad, expected if wanted else None)


@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(300, 9), (3, 1001)])
def test_masks_and_many_rows_of_a_block(rng, order, few_groups, rows, cols, is_given):
    dy, x = normal(rng, (2, rows, cols), np.float32)
    weight = normal(rng, cols, np.float32)
    rstd = forward(x)[1] if is_given else None
    whole = backward(dy, x, weight, rstd=rstd)
    assert_grads(whole, dy, x, weight, rstd=rstd)
    assert_masks(whole, dy, x, weight, rstd=rstd)


@pytest.mark.parametrize("rstd_dtype", [np.float64, np.float16, np.int32])
def test_a_given_rstd_of_any_dtype(rng, rstd_dtype):
    """And of any value: it is not recomputed."""
    dy, x = normal(rng, (2, 4, 24), np.float32)
    rstd = np.full((4, 1), 2).astype(rstd_dtype)
    assert_grads(backward(dy, x, rstd=rstd), dy, x, rstd=rstd)


@pytest.mark.parametrize("cols", [7, 768])
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_magnitudes(rng, cols, scale):
    x = (rng.standard_normal((2, cols)) * scale).astype(np.float32)
    # beside one of zeros
    x[1, 1:] = 0
    dy = normal(rng, (2, cols), np.float32)
    eps = 0.0 if scale < 1 else 1e-5
    assert_y(*forward(x, eps=eps), x, eps=eps)
    assert_grads(backward(dy, x, eps=eps), dy, x, eps=eps)


@pytest.mark.parametrize("eps", EPSILONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_eps(rng, dtype, eps):
    x = rows(rng, dtype, 24, eps)
    dy = normal(rng, x.shape, dtype)
    assert_y(*forward(x, eps=eps), x, eps=eps)
    assert_grads(backward(dy, x, eps=eps), dy, x, eps=eps)


def test_the_default_of_eps(rng):
    """That of float32 for 16-bit types too."""
    for dtype, eps in ((np.float64, 2.0**-52), (np.float32, 2.0**-23), (np.float16, 2.0**-23)):
        x = rng.uniform(0.001, 0.002, (3, 24)).astype(dtype)
        for result, expected in zip(forward(x, eps=None), forward(x, eps=eps), strict=True):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("cols", [5, 64, 1100])
def test_rows_of_zeros(rng, cols):
    x = np.zeros((3, cols), np.float32)
    dy = normal(rng, (3, cols), np.float32)
    y, rstd = forward(x, eps=1e-4)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_allclose(rstd, 100, rtol=1e-6)
    assert_grads(backward(dy, x, eps=1e-4), dy, x, eps=1e-4)
    # 0 / 0, as in NumPy
    y, rstd = forward(x, eps=0.0)
    assert np.isnan(y).all()
    assert np.isinf(rstd).all()


@pytest.mark.parametrize("cols", [5, 64, 1100])
def test_nan_and_inf_stay_in_their_rows(rng, cols):
    dy, x = normal(rng, (2, 5, cols), np.float32)
    kept = [0, 3]
    expected, expected_dx = forward(x)[0][kept], backward(dy[kept], x[kept]).dx
    x[1, 0], x[2, cols - 1], dy[4, cols // 2] = np.nan, np.inf, -np.inf
    y, rstd = forward(x)
    # a row with an Inf is divided by it
    assert_y(y, rstd, x)
    dx = backward(dy, x).dx
    assert np.isnan(y[1]).all()
    assert np.isnan(dx[[1, 2]]).all()
    assert not np.isfinite(dx[4]).any()
    np.testing.assert_array_equal(y[kept], expected)
    np.testing.assert_array_equal(dx[kept], expected_dx)


@pytest.mark.parametrize("cols", [6, 64, 600])
def test_a_row_is_the_same_in_any_batch(rng, order, cols):
    dy, x = normal(rng, (2, 5, cols), np.float32)
    # an extreme one must not change its neighbours
    x[1] *= np.float32(1e30)
    weight = normal(rng, cols, np.float32)
    whole = *forward(x, weight), backward(dy, x, weight).dx
    for r in range(5):
        alone = *forward(x[r : r + 1], weight), backward(dy[r : r + 1], x[r : r + 1], weight).dx
        for one, all_ in zip(alone, whole, strict=True):
            np.testing.assert_array_equal(one, all_[r : r + 1])


def test_no_rows_and_no_columns():
    y, rstd = forward(np.empty((0, 8), np.float32))
    assert (y.shape, rstd.shape) == ((0, 8), (0, 1))
    y, rstd = forward(np.empty((3, 0), np.float32))
    assert (y.shape, rstd.shape) == ((3, 0), (3, 1))
    assert np.isnan(rstd).all()
    grads = backward(*np.empty((2, 0, 8), np.float32), np.ones(8, np.float16))
    assert grads.dx.shape == (0, 8)
    np.testing.assert_array_equal(grads.dweight, np.zeros(8, np.float16))


@pytest.mark.parametrize("place", ["x", "dy", "shifted"])
def test_in_place(rng, place):
    """And where dx lies a row further on than x."""
    host = normal(rng, (6, 64), np.float32)
    dy, weight = normal(rng, (5, 64), np.float32), normal(rng, 64, np.float32)
    expected = forward(host[:5], weight)[0], *backward(dy, host[:5], weight)
    for _ in range(2):
        memory = to_device(host)
        out = {"x": memory[:5], "shifted": memory[1:]}.get(place, to_device(dy))
        assert nbnorm.rms_norm(memory[:5], 64, to_device(weight), 1e-5, out=out) is out
        results = [to_host(out)]
        memory, gradient = to_device(host), to_device(dy)
        outs = {"x": memory[:5], "dy": gradient, "shifted": memory[1:]}.get(place, to_device(dy)), to_device(weight)
        grads = nbnorm.rms_norm_backward(gradient, memory[:5], 64, to_device(weight), 1e-5, out=outs)
        assert all(map(lambda grad, out: grad is out, grads, outs))
        results += map(to_host, grads)
        for result, wanted in zip(results, expected, strict=True):
            np.testing.assert_array_equal(result, wanted)


def test_several_normalized_dimensions(rng):
    x, weight = normal(rng, (2, 3, 4, 5), np.float32), normal(rng, (4, 5), np.float32)
    y, rstd = map(to_host, nbnorm.rms_norm(to_device(x), (4, 5), to_device(weight), 1e-5, return_stats=True))
    assert rstd.shape == (2, 3, 1, 1)
    assert_y(y.reshape(6, 20), rstd.reshape(6, 1), x.reshape(6, 20), weight.reshape(20))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"output_mask": (True, True, True)}, ValueError, "output_mask: .*two bools, for dx and dweight"),
        ({"out": (None, None, None)}, ValueError, "out: 3 entries; expected two"),
        ({"rstd": (3,)}, ValueError, "rstd: shape"),
        ({"eps": -1.0}, ValueError, "eps: -1.0"),
        ({"weight": (5,)}, ValueError, "weight: shape"),
    ],
)
def test_wrong_calls(arguments, error, message):
    """Also after a right one, which has a plan."""
    x = to_device(np.ones((3, 4), np.float32))
    nbnorm.rms_norm_backward(x, x, 4)
    arguments = {
        name: to_device(np.ones(value, np.float32)) if name in ("rstd", "weight") else value
        for name, value in arguments.items()
    }
    with pytest.raises(error, match=f"^{message}"):
        nbnorm.rms_norm_backward(x, x, 4, **arguments)


def test_a_host_array_does_not_mix():
    x = np.ones((3, 4), np.float32)
    for name, host in (("weight", x[0]), ("out", x)):
        with pytest.raises(TypeError, match=f"^{name}: numpy.ndarray in CPU memory; expected an array on CUDA device 0"):
            nbnorm.rms_norm(to_device(x), 4, **{name: host})
    with pytest.raises(TypeError, match="^rstd: numpy.ndarray in CPU memory"):
        nbnorm.rms_norm_backward(*map(to_device, (x, x)), 4, rstd=x[:, :1])


def test_the_derivative_of_our_own_forward(rng):
    """Of the sum of y * dy, along a random direction of each operand."""
    dy, x = normal(rng, (2, 4, 96), np.float64)
    weight = normal(rng, 96, np.float64)
    step = 1e-6
    for i, grad in enumerate(backward(dy, x, weight)):
        direction = rng.standard_normal(grad.shape)
        moved = [[o + sign * step * direction if j == i else o for j, o in enumerate((x, weight))] for sign in (1, -1)]
        ahead, behind = ((forward(*operands)[0] * dy).sum() for operands in moved)
        np.testing.assert_allclose((ahead - behind) / (2 * step), (grad * direction).sum(), rtol=1e-7)

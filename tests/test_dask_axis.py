"""Are norms of Dask arrays over axes that are not the last those of the whole array, whatever the chunks?"""

import numpy as np
import pytest

import nbnorm

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
CHUNKS = [(6, 5, 7, 9), (2, 5, 3, 4), (1, 5, 7, 1)]


@pytest.fixture(autouse=True)
def scheduler():
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture
def arrays(rng):
    return rng.standard_normal((4, 6, 5, 7, 9), np.float32), rng.standard_normal((2, 5), np.float32)


def assert_same_bits(result, expected):
    np.testing.assert_array_equal(result.compute().view(np.uint32), expected.view(np.uint32), strict=True)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_chunks_of_whole_rows(arrays, chunks):
    (x, residual, dy, dtotal), (weight, bias) = arrays
    lazy = [da.from_array(array, chunks) for array in (x, residual, dy, dtotal)]
    expected = nbnorm.add_layer_norm(x, residual, 5, weight, bias, axis=1, return_stats=True)
    results = nbnorm.add_layer_norm(*lazy[:2], 5, weight, bias, axis=1, return_stats=True)
    assert results.y.chunks == results.total.chunks == lazy[0].chunks
    for result, value in zip(results, expected, strict=True):
        assert_same_bits(result, value)

    expected = nbnorm.add_layer_norm_backward(dy, dtotal, x, 5, weight, axis=1)
    grads = nbnorm.add_layer_norm_backward(*lazy[2:], lazy[0], 5, weight, axis=1)
    assert_same_bits(grads.dx, expected.dx)
    for grad, value in zip(grads[1:], expected[1:], strict=True):
        np.testing.assert_allclose(grad.compute(), value, rtol=2**-20, atol=2**-20)

    _, mean, rstd = nbnorm.layer_norm(x, 5, axis=1, return_stats=True)
    given = {"mean": da.from_array(mean, (chunks[0], 1, *chunks[2:])), "rstd": rstd}
    dx = nbnorm.layer_norm_backward(lazy[2], lazy[0], 5, weight, axis=1, **given).dx
    assert_same_bits(dx, nbnorm.layer_norm_backward(dy, x, 5, weight, axis=1, mean=mean, rstd=rstd).dx)


@pytest.mark.parametrize(("axis", "shape"), [(1, 5), ((1, 2), (5, 7)), (-4, 6)])
def test_rows_in_several_chunks(arrays, axis, shape):
    x, _, dy, _ = arrays[0]
    weight = np.full(shape, 1.5, np.float32)
    lazy = [da.from_array(array, (4, 3, 4, 9)) for array in (x, dy)]
    y = nbnorm.layer_norm(lazy[0], shape, weight, axis=axis)
    assert y.chunks == lazy[0].chunks
    np.testing.assert_allclose(y.compute(), nbnorm.layer_norm(x, shape, weight, axis=axis), atol=2**-19)
    grads = nbnorm.layer_norm_backward(lazy[1], lazy[0], shape, weight, axis=axis)
    for grad, value in zip(grads, nbnorm.layer_norm_backward(dy, x, shape, weight, axis=axis), strict=True):
        np.testing.assert_allclose(grad.compute(), value, atol=2**-15)


def test_what_is_wrong(arrays):
    x = da.from_array(arrays[0][0], (2, 5, 7, 9))
    with pytest.raises(ValueError, match=r"x: shape \(6, 5, 7, 9\), \(6,\) along axis 0; expected \(5,\) there"):
        nbnorm.layer_norm(x, 5, axis=0)
    with pytest.raises(ValueError, match=r"weight: shape \(4,\); expected \(5,\)"):
        nbnorm.layer_norm(x, 5, np.ones(4), axis=1)
    with pytest.raises(ValueError, match="axis: 4; expected axes from -4 to 3"):
        nbnorm.layer_norm(x, 5, axis=4)
    with pytest.raises(ValueError, match=r"dy: shape \(6, 5, 7\); expected \(6, 5, 7, 9\), the shape of x"):
        nbnorm.layer_norm_backward(x[..., 0], x, 5, axis=1)
    mean = np.zeros((6, 7, 9, 1))
    with pytest.raises(ValueError, match=r"mean: shape \(6, 7, 9, 1\); expected \(6, 1, 7, 9\)"):
        nbnorm.layer_norm_backward(x, x, 5, axis=1, mean=mean, rstd=mean)


def test_lists_and_unknown_sizes(arrays):
    x = arrays[0][0]
    lazy = da.from_array(x, (2, 5, 7, 9))
    dy = np.ones_like(x).tolist()
    expected = nbnorm.layer_norm_backward(dy, x, 5, axis=1).dx
    np.testing.assert_array_equal(nbnorm.layer_norm_backward(dy, lazy, 5, axis=1).dx, expected)
    # behind the axis
    some = da.from_array(x, (6, 5, 7, 3))[..., da.from_array(np.arange(9) != 4, 3)]
    expected = nbnorm.layer_norm_backward(x, x, 5, axis=1).dx
    np.testing.assert_array_equal(nbnorm.layer_norm_backward(some, some, 5, axis=1).dx, np.delete(expected, 4, -1))

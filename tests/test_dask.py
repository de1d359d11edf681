"""Are calls on Dask arrays lazy, checked first, and right whatever the chunks?"""

import subprocess
import sys

import numpy as np
import pytest

import nbnorm
from levels import deep
from test_errors import BACKWARD, FORWARD, X
from tolerances import assert_grads

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
from dask_calls import COLS, NAMES, PARTS, SHAPE, WHOLE, call, computed, lazy, operands  # noqa: E402


@pytest.fixture(autouse=True)
def scheduler():
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture
def arrays(rng):
    return operands(rng)


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


def never(block):
    pytest.fail("computed")


def unseen(array, chunks=-1):
    """A Dask array whose chunks fail where they are asked for."""
    meta = np.empty((0,) * array.ndim, array.dtype)
    return lazy(array, chunks).map_blocks(never, dtype=array.dtype, meta=meta)


@pytest.mark.parametrize("chunks", [-1, *PARTS[:1]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_computed_before_it_is_asked_for(arrays, name, chunks):
    results, grads = call(name, arrays, lambda array: unseen(array, chunks))
    for result in (*results, *grads):
        assert isinstance(result, da.Array)
        with pytest.raises(pytest.fail.Exception, match="computed"):
            result.compute()


def is_of_dask_too(arguments):
    """Whether it is no matter of an `out`, or of an x that is no array, or too large to be one in memory."""
    x = arguments.get("x", X)
    return "out" not in arguments and type(x) is np.ndarray and x.nbytes < 1 << 20


WRONG = [("layer_norm", *case) for case in FORWARD] + [("layer_norm_backward", *case) for case in BACKWARD]


@pytest.mark.parametrize(("function", "arguments", "error", "message"), [case for case in WRONG if is_of_dask_too(case[1])])
def test_what_is_wrong_is_said_before_there_is_a_graph(function, arguments, error, message):
    right = {"x": X, "normalized_shape": 4} | ({"dy": X} if function == "layer_norm_backward" else {})
    made = {name: unseen(value) if type(value) is np.ndarray else value for name, value in (right | arguments).items()}
    for name in {"eps", "output_mask"} & arguments.keys():
        made[name] = arguments[name]
    with pytest.raises(error, match=f"^{message}"):
        getattr(nbnorm, function)(**made)


def test_what_dask_arrays_cannot_be(arrays):
    x, weight = unseen(arrays["x"]), arrays["weight"]
    ways = "expected None, since results of Dask arrays are new ones"
    for out in (np.empty(SHAPE, np.float32), x):
        with pytest.raises(TypeError, match=f"^out: .*; {ways}"):
            nbnorm.layer_norm(x, COLS, out=out)
        with pytest.raises(TypeError, match=rf"^out\[0\]: .*; {ways}"):
            nbnorm.layer_norm_backward(x, x, COLS, out=(out, None, None))
        with pytest.raises(TypeError, match=f"^total_out: .*; {ways}"):
            nbnorm.add_layer_norm(x, x, COLS, total_out=out)
    masked = lazy(np.ma.masked_array(arrays["x"]), -1)
    with pytest.raises(TypeError, match="^x: a Dask array of numpy.ma.*MaskedArray; expected one of numpy.ndarray"):
        nbnorm.layer_norm(masked, COLS)
    # a NumPy x has NumPy results, for which all would be computed
    with pytest.raises(TypeError, match=r"^dy: dask.array.core.Array, which is lazy .*dy.compute\(\), or a Dask array as x"):
        nbnorm.layer_norm_backward(x, arrays["x"], COLS, weight)
    with pytest.raises(TypeError, match=r"^residual: dask.array.core.Array, which is lazy .*residual.compute\(\)"):
        nbnorm.add_layer_norm(arrays["x"], x, COLS)


@pytest.mark.parametrize("chunks", [*WHOLE[1:2], *PARTS[:1]], ids=str)
def test_operands_of_other_kinds_and_chunks(arrays, chunks):
    """NumPy's beside Dask's, and others' chunks, which become those of x."""
    x, dy, weight, bias = (arrays[name] for name in ("x", "dy", "weight", "bias"))
    x_lazy = lazy(x, chunks)
    expected = computed([nbnorm.layer_norm(x_lazy, COLS, weight, bias)])[0]
    for parameter in (lambda a: lazy(a, 7), lambda a: lazy(a, -1), np.ndarray.tolist):
        y = nbnorm.layer_norm(x_lazy, COLS, parameter(weight), parameter(bias))
        assert y.chunks == x_lazy.chunks
        if parameter is not np.ndarray.tolist:
            np.testing.assert_array_equal(y.compute(), expected, strict=True)
    expected = computed(nbnorm.layer_norm_backward(lazy(dy, chunks), x_lazy, COLS, weight))
    for other in (dy, lazy(dy, (4, 3, 11)), lazy(dy.astype(">f4"), chunks)):
        grads = nbnorm.layer_norm_backward(other, x_lazy, COLS, weight)
        assert grads.dx.chunks == x_lazy.chunks
        for grad, value in zip(computed(grads), expected, strict=True):
            np.testing.assert_array_equal(grad, value, strict=True)


@pytest.mark.parametrize("chunks", [*deep(WHOLE[1]), *PARTS[:2]], ids=str)
def test_given_statistics_and_masks(arrays, chunks):
    x, dy, weight = (arrays[name] for name in ("x", "dy", "weight"))
    _, mean, rstd = nbnorm.layer_norm(x, COLS, return_stats=True)
    mean = mean + np.float32(0.25)
    x_lazy, dy_lazy = lazy(x, chunks), lazy(dy, chunks)
    for given in ((mean, rstd), (lazy(mean, (3, 2, 1)), lazy(rstd, -1))):
        grads = nbnorm.layer_norm_backward(dy_lazy, x_lazy, COLS, weight, mean=given[0], rstd=given[1])
        assert_grads(nbnorm.LayerNormGrads(*computed(grads)), dy, x, 1, weight, mean=mean, rstd=rstd)
        grads = computed(nbnorm.rms_norm_backward(dy_lazy, x_lazy, COLS, weight, rstd=given[1]))
        assert_grads(nbnorm.LayerNormGrads(*grads, None), dy, x, 1, weight, rstd=rstd, is_rms=True)
    everything = computed(nbnorm.layer_norm_backward(dy_lazy, x_lazy, COLS, weight))
    for mask in np.ndindex(2, 2, 2):
        grads = nbnorm.layer_norm_backward(dy_lazy, x_lazy, COLS, weight, output_mask=tuple(map(bool, mask)))
        for grad, is_wanted, value in zip(grads, mask, everything, strict=True):
            assert is_wanted == (grad is not None)
            if is_wanted:
                np.testing.assert_array_equal(grad.compute(), value, strict=True)


@pytest.mark.parametrize("cols", [4, (2, 4)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_few_rows(rng, cols, count):
    shape = (count, *np.atleast_1d(cols))
    x, dy = rng.standard_normal((2, *shape))
    _, mean, rstd = nbnorm.layer_norm(x, cols, return_stats=True)
    for make in (lambda a: lazy(a, -1), lambda a: lazy(a, (2,) * a.ndim), lambda a: lazy(a, ((0, count), *a.shape[1:]))):
        results = nbnorm.layer_norm(make(x), cols, return_stats=True)
        results += nbnorm.layer_norm_backward(make(dy), make(x), cols)
        results += nbnorm.layer_norm_backward(make(dy), make(x), cols, mean=mean, rstd=rstd)
        expected = nbnorm.layer_norm(x, cols, return_stats=True) + nbnorm.layer_norm_backward(dy, x, cols)
        expected += nbnorm.layer_norm_backward(dy, x, cols, mean=mean, rstd=rstd)
        for result, value in zip(computed(results), expected, strict=True):
            np.testing.assert_allclose(result, value, rtol=1e-12, atol=1e-12, strict=True)


@pytest.mark.parametrize("chunks", [4, (1, 0, 3)], ids=str)
def test_no_batch(rng, chunks):
    """An array that is one row."""
    x, dy = rng.standard_normal((2, 4))
    results = nbnorm.layer_norm(lazy(x, (chunks,)), 4, return_stats=True)
    results += nbnorm.layer_norm_backward(lazy(dy, (chunks,)), lazy(x, (chunks,)), 4)
    expected = nbnorm.layer_norm(x, 4, return_stats=True) + nbnorm.layer_norm_backward(dy, x, 4)
    for result, value in zip(computed(results), expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-12, atol=1e-12, strict=True)


def test_rows_of_no_elements():
    for chunks in ((2, 0), (2, (0, 0))):
        y, mean, _ = computed(nbnorm.layer_norm(da.zeros((5, 0), chunks=chunks), 0, return_stats=True))
        assert y.shape == (5, 0)
        assert np.isnan(mean).all()


@pytest.mark.parametrize("chunks", [(3, 3, -1), (3, 3, 20)], ids=str)
def test_chunks_of_unknown_sizes(arrays, chunks):
    x, dy = arrays["x"], arrays["dy"]
    kept = x[:, 0, 0] > 0
    x_lazy, dy_lazy = (lazy(array, chunks)[lazy(kept, 3)] for array in (x, dy))
    assert np.isnan(x_lazy.shape[0])
    results = nbnorm.layer_norm(x_lazy, COLS, return_stats=True) + nbnorm.layer_norm_backward(dy_lazy, x_lazy, COLS)
    expected = nbnorm.layer_norm(x[kept], COLS, return_stats=True) + nbnorm.layer_norm_backward(dy[kept], x[kept], COLS)
    for result, value in zip(computed(results), expected, strict=True):
        np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5, strict=True)
    for other in (dy, lazy(dy, chunks), lazy(dy, (5, 3, -1))[lazy(kept, 5)]):
        with pytest.raises(ValueError, match=r"^dy: (other chunks than x, whose|chunks of unknown) sizes"):
            nbnorm.layer_norm_backward(other, x_lazy, COLS)
    unknown = lazy(arrays["weight"], 20)[lazy(arrays["weight"], 20) > 0]
    for arguments in ({"x": unknown}, {"weight": unknown}):
        with pytest.raises(ValueError, match=r"chunks of unknown sizes; pass \w+.compute_chunk_sizes\(\)"):
            nbnorm.layer_norm(**{"x": lazy(x, chunks), "normalized_shape": COLS} | arguments)


def test_the_same_bits_run_after_run_on_any_threads(rng):
    x, dy = rng.standard_normal((2, 250, COLS), dtype=np.float32)
    for chunks in ((7, -1), (7, 20)):
        grads = nbnorm.layer_norm_backward(lazy(dy, chunks), lazy(x, chunks), COLS)
        expected = computed(grads)
        for workers in (1, 4):
            for grad, value in zip(dask.compute(*grads, scheduler="threads", num_workers=workers), expected, strict=True):
                np.testing.assert_array_equal(grad, value, strict=True)
        # whatever a configuration says of sums
        with dask.config.set(split_every=2):
            again = nbnorm.layer_norm_backward(lazy(dy, chunks), lazy(x, chunks), COLS)
        assert [grad.name for grad in again] == [grad.name for grad in grads]


def test_sums_are_rounded_once(rng):
    """Each of 300 chunks' sums, or those of the tree, would be rounded to other bits."""
    dy = rng.standard_normal((600, 4), dtype=np.float32)
    dbias = nbnorm.layer_norm_backward(lazy(dy, (2, -1)), lazy(dy, (2, -1)), 4).dbias
    np.testing.assert_array_equal(dbias.compute(), dy.sum(axis=0, dtype=np.float64).astype(np.float32), strict=True)


def test_integers_and_layers(arrays):
    x = (arrays["x"] * 10).astype(np.int16)
    ln, rms = nbnorm.LayerNorm(COLS, dtype=np.float64), nbnorm.RMSNorm(COLS, dtype=np.float64)
    dy = arrays["dy"].astype(np.float64)
    for chunks in (WHOLE[1], PARTS[0]):
        for layer in (ln, rms):
            y, grads = layer(lazy(x, chunks)), layer.backward(dy, lazy(x, chunks))
            np.testing.assert_allclose(y.compute(), layer(x), rtol=1e-12, atol=1e-12, strict=True)
            for grad, value in zip(computed(grads), layer.backward(dy, x), strict=True):
                np.testing.assert_allclose(grad, value, rtol=1e-12, atol=1e-12, strict=True)


def test_a_weight_is_in_the_graph_once(arrays):
    y = nbnorm.layer_norm(lazy(arrays["x"], (1, 1, COLS)), COLS, arrays["weight"], arrays["bias"])
    (optimised,) = dask.optimize(y)
    tasks = dict(optimised.__dask_graph__()).values()
    assert sum(isinstance(getattr(task, "value", None), np.ndarray) and task.value.ndim == 1 for task in tasks) == 2
    # of those at the call, whatever is written into them later
    expected = y.compute()
    arrays["weight"][:] = np.nan
    np.testing.assert_array_equal(y.compute(), expected)


@pytest.mark.parametrize("cols", deep(70_000))
def test_chunks_of_long_rows(rng, cols):
    x, dy = rng.standard_normal((2, 6, cols), dtype=np.float32)
    for chunks in ((4, -1), (4, 30_000)):
        grads = computed(nbnorm.layer_norm_backward(lazy(dy, chunks), lazy(x, chunks), cols))
        assert_grads(nbnorm.LayerNormGrads(*grads), dy, x, 1)
    np.testing.assert_array_equal(nbnorm.layer_norm(lazy(x, (4, -1)), cols).compute(), nbnorm.layer_norm(x, cols))


def test_plain_dask_arrays_need_no_distributed(python_environment):
    code = """
import sys
import nbnorm
assert "dask" not in sys.modules
# as where it is not installed
sys.modules["distributed"] = None
import dask.array as da
y = nbnorm.layer_norm(da.ones((4, 4), chunks=2), 4).compute()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=python_environment, check=True)

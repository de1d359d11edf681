"""Do RMS norm and the norms of a sum give in compiled code what they give in Python's?"""

from contextlib import nullcontext

import numpy as np
import pytest
from numba import njit, prange
from numba.core.errors import TypingError

import nbnorm
from compiled_calls import again, assert_same, native, without_python
from levels import deep

pytestmark = pytest.mark.compiled

# each of operands that are dy, x, what is beside one of them, weight and bias: as Python runs it, it says what is expected
PLAIN = {
    "rms_norm": lambda dy, x, beside, w, b: nbnorm.rms_norm(x, w.size, w, return_stats=True),
    "rms_norm_backward": lambda dy, x, beside, w, b: nbnorm.rms_norm_backward(dy, x, w.size, w),
    "add_layer_norm": lambda dy, x, beside, w, b: nbnorm.add_layer_norm(x, beside, w.size, w, b, return_stats=True),
    "add_layer_norm_backward": lambda dy, x, beside, w, b: nbnorm.add_layer_norm_backward(dy, beside, x, w.size, w),
    "add_rms_norm": lambda dy, x, beside, w, b: nbnorm.add_rms_norm(x, beside, w.size, w, return_stats=True),
    "add_rms_norm_backward": lambda dy, x, beside, w, b: nbnorm.add_rms_norm_backward(dy, beside, x, w.size, w),
}
# the same with other options
OPTIONS = {
    "rms_norm, eps": lambda dy, x, beside, w, b: nbnorm.rms_norm(x, w.size, w, 1e-3),
    "rms_norm, eps None": lambda dy, x, beside, w, b: nbnorm.rms_norm(x, w.shape, None, None),
    "rms_norm_backward, given": lambda dy, x, beside, w, b: nbnorm.rms_norm_backward(
        dy, x, w.size, w, 1e-3, rstd=x[:, :1].copy()
    ),
    "rms_norm_backward, dx": lambda dy, x, beside, w, b: nbnorm.rms_norm_backward(dy, x, w.size, output_mask=(True, False)),
    "rms_norm_backward, dweight": lambda dy, x, beside, w, b: nbnorm.rms_norm_backward(
        dy, x, w.size, w, out=(None, np.empty_like(w)), output_mask=(False, True)
    ),
    "rms_norm_backward, out": lambda dy, x, beside, w, b: nbnorm.rms_norm_backward(
        dy, x, w.size, w, out=(np.empty_like(x), None)
    ),
    "add_layer_norm, unwritten": lambda dy, x, beside, w, b: nbnorm.add_layer_norm(x, beside, w.size, w, total_out=False),
    "add_layer_norm, outs": lambda dy, x, beside, w, b: nbnorm.add_layer_norm(
        x, beside, w.size, None, b, 0.5, True, out=np.empty_like(x), total_out=np.empty_like(x)
    ),
    "add_layer_norm_backward, given": lambda dy, x, beside, w, b: nbnorm.add_layer_norm_backward(
        dy, beside, x, w.size, mean=x[:, :1].copy(), rstd=x[:, 1:2].copy()
    ),
    "add_layer_norm_backward, no dtotal": lambda dy, x, beside, w, b: nbnorm.add_layer_norm_backward(dy, None, x, w.size, w),
    "add_layer_norm_backward, sums": lambda dy, x, beside, w, b: nbnorm.add_layer_norm_backward(
        dy, beside, x, w.size, w, output_mask=(False, True, True)
    ),
    "add_rms_norm, unwritten": lambda dy, x, beside, w, b: nbnorm.add_rms_norm(
        x, beside, w.size, w, 0.5, total_out=False, return_stats=True
    ),
    "add_rms_norm, total": lambda dy, x, beside, w, b: nbnorm.add_rms_norm(x, beside, w.size, total_out=np.empty_like(x)),
    "add_rms_norm_backward, given": lambda dy, x, beside, w, b: nbnorm.add_rms_norm_backward(
        dy, beside, x, w.size, w, rstd=x[:, :1].copy(), out=(np.empty_like(x), np.empty_like(w))
    ),
    "add_rms_norm_backward, dweight": lambda dy, x, beside, w, b: nbnorm.add_rms_norm_backward(
        dy, beside, x, w.size, w, output_mask=(False, True)
    ),
}


def operands(rng, shape, *dtypes):
    """dy, x, what is beside one of them, weight and bias; all of a dtype, or each of one."""
    shapes = shape, shape, shape, shape[-1:], shape[-1:]
    dtypes = dtypes * 5 if len(dtypes) == 1 else dtypes
    return [rng.standard_normal(shape).astype(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


@pytest.mark.parametrize("cols", [200, *deep(8)])
@pytest.mark.parametrize("dtype", [np.float32, *deep(np.float64)])
@pytest.mark.parametrize("name", PLAIN)
def test_results(rng, name, dtype, cols):
    function = PLAIN[name]
    arguments = operands(rng, (50, cols), dtype)
    assert_same(native(njit(function), *arguments), function(*arguments))


@pytest.mark.deep
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(rng, name, dtype):
    function = OPTIONS[name]
    arguments = operands(rng, (50, 40), dtype)
    assert_same(native(njit(function), *arguments), function(*arguments))


@pytest.mark.deep
@pytest.mark.parametrize("shape", [(40,), (0, 5), (5, 0), (2, 3, 130), (256, 768), (2, 70000)])
@pytest.mark.parametrize("name", PLAIN)
def test_shapes(rng, name, shape):
    """Python makes those calls that have nothing to do, and those that are worth several threads."""
    function = PLAIN[name]
    arguments = operands(rng, shape, np.float32)
    assert_same(again(njit(function), *arguments), function(*arguments))


F32, F64 = np.float32, np.float64


@pytest.mark.deep
@pytest.mark.parametrize(
    ("name", "dtypes", "made"),
    [
        ("add_layer_norm", (F32, F32, F64, F64, F64), native),
        ("add_layer_norm", (F32, F32, F64, F32, F32), again),
        ("add_rms_norm", (F64, F64, F32, F64, F32), native),
        ("add_layer_norm_backward", (F32, F32, F64, F64, F32), native),
        ("add_layer_norm_backward", (F32, F32, F64, F32, F32), again),
        ("add_rms_norm_backward", (F64, F32, F32, F64, F32), native),
        ("rms_norm", (F32, F32, F32, F64, F32), native),
        ("rms_norm_backward", (F64, F32, F32, F64, F32), native),
    ],
)
def test_mixed_dtypes(rng, name, dtypes, made):
    function, arguments = PLAIN[name], operands(rng, (50, 40), *dtypes)
    assert_same(made(njit(function), *arguments), function(*arguments))


@njit
def added(x, residual, weight, out, total_out):
    return nbnorm.add_layer_norm(x, residual, weight.size, weight, out=out, total_out=total_out)


@njit
def gradient(dy, dtotal, total, weight, out):
    return nbnorm.add_rms_norm_backward(dy, dtotal, total, weight.size, weight, out=(out, None))


@pytest.mark.deep
@pytest.mark.parametrize("places", [(0, 800), (800, 0), (0, 2000), (2000, 800), (40, 2000), (2000, 760), (2050, 1250)])
def test_results_in_the_place_of_operands(rng, places):
    """Of x and the residual, which begin at 0 and 800, or overlapping these and the weight in other ways."""
    memory = rng.standard_normal(2900, dtype=np.float32)
    before = memory.copy()
    x, residual, weight = memory[:800].reshape(20, 40), memory[800:1600].reshape(20, 40), memory[1640:1680]
    y, total = (memory[place : place + 800].reshape(20, 40) for place in places)
    other = np.ones_like(x)
    expected = nbnorm.add_layer_norm(x.copy(), residual.copy(), 40, weight.copy())
    expected_dx = nbnorm.add_rms_norm_backward(x.copy(), residual.copy(), other, 40, weight.copy()).dx
    is_plain = {*places} <= {0, 800, 2000}
    for context in (nullcontext, nullcontext, without_python if is_plain else nullcontext):
        with context():
            memory[:] = before
            assert_same(added(x, residual, weight, y, total), expected)
            for dx in (y, total):
                memory[:] = before
                assert_same(gradient(x, residual, other, weight, dx).dx, expected_dx)


# what is wrong with a call of (20, 40) arrays, of those that the functions above name
X, ROW = np.ones((20, 40), np.float32), np.ones(40, np.float32)
WRONG = [
    (added, {"residual": X[1:]}, "residual: shape"),
    (added, {"weight": ROW[1:]}, "residual|normalized_shape"),
    (added, {"total_out": X[1:].copy()}, "total_out: shape"),
    (gradient, {"dtotal": X[1:]}, "dtotal: shape"),
    (gradient, {"dy": X[1:]}, "dy: .*the shape of total"),
]


@pytest.mark.deep
@pytest.mark.parametrize(("function", "wrong", "message"), WRONG)
def test_wrong_values(function, wrong, message):
    names = function.py_func.__code__.co_varnames[: function.py_func.__code__.co_argcount]
    right = {name: ROW if name == "weight" else X.copy() for name in names}
    for call in (right | wrong, right | wrong):
        with pytest.raises(ValueError, match=message) as expected:
            function.py_func(*call.values())
        with pytest.raises(ValueError, match=message) as error:
            function(*call.values())
        assert str(error.value) == str(expected.value)
        # so that the next one is not the first of its kind
        function(*right.values())


@pytest.mark.deep
def test_results_that_share_memory():
    out = np.empty((21, 40), np.float32)
    added(X, X, ROW, X.copy(), X.copy())
    for y, total in ((out[:20], out[1:]), (out[1:], out[1:])):
        with pytest.raises(ValueError, match="total_out: shares memory with out"):
            added(X, X, ROW, y, total)
    with pytest.raises(ValueError, match="eps: -1.0"):
        njit(lambda x: nbnorm.rms_norm(x, 40, None, -1.0))(X)


# functions that Numba must refuse, and what must be said; x is of (20, 40)
REFUSED = {
    "no residual": (lambda x: nbnorm.add_layer_norm(x, None, 40), "residual: none; expected an array"),
    "a strided residual": (lambda x: nbnorm.add_rms_norm(x, x.T, 40), "residual: an array that may have any strides"),
    "a residual of one dimension": (lambda x: nbnorm.add_rms_norm(x, x[0], 40), "residual: 1 dimensions; expected 2"),
    "a strided dtotal": (lambda x: nbnorm.add_rms_norm_backward(x, x.T, x, 40), "dtotal: an array that may have"),
    "a total of integers": (
        lambda x: nbnorm.add_rms_norm_backward(x, x, x.astype(np.int64), 40), "total: dtype int64",
    ),
    "total_out of a variable": (
        lambda x: nbnorm.add_layer_norm(x, x, 40, total_out=x.size == 0), "total_out: bool; expected an array, None, or"
    ),
    "total_out of another dtype": (
        lambda x: nbnorm.add_layer_norm(x, x, 40, total_out=x.astype(np.float64)), "total_out: dtype float64",
    ),
    "a mask of three": (
        lambda x: nbnorm.rms_norm_backward(x, x, 40, output_mask=(True, True, True)), "a tuple of two, for dx and dweight",
    ),
    "outs of three": (
        lambda x: nbnorm.rms_norm_backward(x, x, 40, out=(None, None, None)), "out: .*a tuple of two, for dx and dweight",
    ),
    "eps of another kind": (lambda x: nbnorm.rms_norm(x, 40, None, x), "eps: .*expected a real number"),
    "return_stats of a variable": (
        lambda x: nbnorm.rms_norm(x, 40, return_stats=x.size == 0), "return_stats: bool; .*written in the call",
    ),
}  # fmt: skip


@pytest.mark.deep
@pytest.mark.parametrize("case", REFUSED)
def test_refused_types(case):
    function, message = REFUSED[case]
    with pytest.raises(TypingError, match=message):
        njit(function)(X)


@pytest.mark.deep
def test_in_prange_and_from_defaults(rng):
    """What a function of the user's own has as defaults, Numba gives as a type of its own."""

    @njit
    def norm(x, residual, weight=None, eps=None, total_out=None):
        return nbnorm.add_rms_norm(x, residual, x.shape[1], weight, eps, total_out=total_out)

    @njit(parallel=True)
    def rows(x, residual, y):
        for i in prange(x.shape[0]):
            y[i], _ = norm(x[i], residual[i])

    x, residual = rng.standard_normal((2, 8, 5, 40))
    y = np.empty_like(x)
    rows(x, residual, y)
    assert_same(y, nbnorm.add_rms_norm(x, residual, 40).y)

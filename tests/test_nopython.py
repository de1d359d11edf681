"""Do calls in people's own compiled code give what Python's calls give, bit for bit and word for word?"""

import itertools
import threading

import numba
import numpy as np
import pytest
from numba import njit, prange, types
from numba.core.errors import TypingError
from numba.core.runtime import _nrt_python, rtsys
from numba.experimental import jitclass

import nbnorm
from compiled_calls import again, assert_same, native, numbas_threads_work
from levels import deep
from nbnorm.cpu.workers import parallel
from nbnorm.nopython import served

compiled = pytest.mark.compiled
BOTH = [np.float32, *deep(np.float64)]


@njit
def forward(x, normalized_shape, weight, bias, eps, use_diff_of_squares):
    return nbnorm.layer_norm(x, normalized_shape, weight, bias, eps, use_diff_of_squares)


@njit
def forward_into(x, normalized_shape, weight, bias, out):
    return nbnorm.layer_norm(x, normalized_shape, weight, bias, out=out)


@njit
def forward_and_statistics(x, normalized_shape, weight, bias):
    return nbnorm.layer_norm(x, normalized_shape, weight, bias, return_stats=True)


@njit
def backward(dy, x, normalized_shape, weight, eps, use_diff_of_squares):
    return nbnorm.layer_norm_backward(dy, x, normalized_shape, weight, eps, use_diff_of_squares)


@njit
def backward_into(dy, x, normalized_shape, weight, out):
    return nbnorm.layer_norm_backward(dy, x, normalized_shape, weight, out=out)


@njit
def backward_given(dy, x, normalized_shape, weight, mean, rstd):
    return nbnorm.layer_norm_backward(dy, x, normalized_shape, weight, mean=mean, rstd=rstd)


@njit
def backward_given_into(dy, x, normalized_shape, weight, mean, rstd, out):
    return nbnorm.layer_norm_backward(dy, x, normalized_shape, weight, mean=mean, rstd=rstd, out=out)


def test_a_process_that_compiles_nothing_or_all(rng):
    """The function is the same under NUMBA_DISABLE_JIT=1, where it is Python's."""
    x, weight = (rng.standard_normal(shape, dtype=np.float32) for shape in ((3, 4, 8), (4, 8)))
    call = x, (4, 8), weight, weight, 1e-3, False
    assert_same(forward(*call), nbnorm.layer_norm(*call))
    assert_same(backward(x, *call[:3], *call[4:]), nbnorm.layer_norm_backward(x, *call[:3], *call[4:]))


@compiled
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("cols", [200, *deep(8)])
def test_forward(rng, dtype, cols):
    x, weight, bias = (rng.standard_normal(shape).astype(dtype) for shape in ((5, 2, cols), cols, cols))
    assert_same(native(forward, x, cols, weight, bias, 1e-3, False), nbnorm.layer_norm(x, cols, weight, bias, 1e-3))
    expected = nbnorm.layer_norm(x, cols, weight, bias, return_stats=True)
    for normalized_shape in (cols, (cols,)):
        assert_same(native(forward_and_statistics, x, normalized_shape, weight, bias), expected)
    out = np.full_like(x, 7)
    assert np.shares_memory(native(forward_into, x, cols, weight, bias, out), out)
    assert_same(out, expected.y)


@compiled
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("cols", [200, *deep(8)])
def test_backward(rng, dtype, cols):
    dy, x, weight = (rng.standard_normal(shape).astype(dtype) for shape in ((50, 2, cols), (50, 2, cols), cols))
    expected = nbnorm.layer_norm_backward(dy, x, cols, weight, 1e-3)
    assert_same(native(backward, dy, x, cols, weight, 1e-3, False), expected)
    outs = tuple(np.full_like(grad, 7) for grad in expected)
    expected = nbnorm.layer_norm_backward(dy, x, (cols,), weight)
    assert_same(native(backward_into, dy, x, (cols,), weight, outs), expected)
    assert_same(nbnorm.LayerNormGrads(*outs), expected)


@compiled
@pytest.mark.deep
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(0,), (1,), (40,), (700,), (0, 5), (5, 0), (6, 1), (9, 130), (2, 3, 4, 5)])
def test_shapes_and_modes(rng, dtype, shape):
    dy, x = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    row = shape[-1:] if len(shape) < 4 else shape[-2:]
    weight, bias = (rng.standard_normal(row).astype(dtype) for _ in range(2))
    made = native if x.size else again
    for given, use_diff_of_squares in itertools.product(itertools.product((weight, None), (bias, None)), (False, True)):
        call = x, row, *given, 1e-5, use_diff_of_squares
        assert_same(made(forward, *call), nbnorm.layer_norm(*call))
    for given, use_diff_of_squares in itertools.product((weight, None), (False, True)):
        call = dy, x, row, given, 0.0, use_diff_of_squares
        assert_same(made(backward, *call), nbnorm.layer_norm_backward(*call))
    _, mean, rstd = nbnorm.layer_norm(x, row, return_stats=True)
    expected = nbnorm.layer_norm_backward(dy, x, row, weight, mean=mean, rstd=rstd)
    assert_same(made(backward_given, dy, x, row, weight, mean, rstd), expected)


@compiled
@pytest.mark.deep
@pytest.mark.parametrize("mask", [*itertools.product((True, False), repeat=3)])
def test_masks(rng, mask):
    dy, x, weight = (rng.standard_normal(shape, dtype=np.float32) for shape in ((40, 200), (40, 200), 200))
    # a tuple of written values
    namespace = {"nbnorm": nbnorm}
    exec(f"def masked(dy, x, weight): return nbnorm.layer_norm_backward(dy, x, 200, weight, output_mask={mask})", namespace)
    expected = nbnorm.layer_norm_backward(dy, x, 200, weight, output_mask=mask)
    assert_same((native if any(mask) else again)(njit(namespace["masked"]), dy, x, weight), expected)


@compiled
@pytest.mark.deep
@pytest.mark.parametrize("dtypes", [*itertools.product((np.float32, np.float64), repeat=3)])
def test_mixed_dtypes(rng, dtypes):
    x, weight, bias = (
        rng.standard_normal(shape).astype(dtype) for shape, dtype in zip(((6, 40), 40, 40), dtypes, strict=True)
    )
    assert_same(again(forward, x, 40, weight, bias, 1e-5, False), nbnorm.layer_norm(x, 40, weight, bias))
    dy = bias * x
    assert_same(again(backward, dy, x, 40, weight, 1e-5, False), nbnorm.layer_norm_backward(dy, x, 40, weight))
    mean, rstd = x[:, :1].astype(dtypes[1]), x[:, 1:2].astype(dtypes[2])
    expected = nbnorm.layer_norm_backward(dy, x, 40, None, mean=mean, rstd=rstd)
    assert_same(again(backward_given, dy, x, 40, None, mean, rstd), expected)


@compiled
@pytest.mark.deep
@pytest.mark.parametrize("shape", [(256, 768), (3, 70000), (5000, 600)])
def test_large_calls(rng, shape):
    """Of which Python makes those that are worth several threads, and those of long rows or of very many elements."""
    dy, x, weight = (rng.standard_normal(s, dtype=np.float32) for s in (shape, shape, shape[1]))
    cols = shape[1]
    expected = nbnorm.layer_norm(x, cols, weight, weight), nbnorm.layer_norm_backward(dy, x, cols, weight)
    for function, back in ((forward, backward), (without_lock(forward), without_lock(backward))):
        assert_same(function(x, cols, weight, weight, 1e-5, False), expected[0])
        assert_same(back(dy, x, cols, weight, 1e-5, False), expected[1])
    with_statistics = nbnorm.layer_norm(x, cols, weight, weight, return_stats=True)
    assert_same(forward_and_statistics(x, cols, weight, weight), with_statistics)
    mean, rstd = with_statistics[1:]
    expected = nbnorm.layer_norm_backward(dy, x, cols, weight, mean=mean, rstd=rstd)
    assert_same(backward_given(dy, x, cols, weight, mean, rstd), expected)


def without_lock(function):
    return njit(nogil=True)(function.py_func)


@njit(parallel=True)
def in_prange(x, weight, y):
    for i in prange(x.shape[0]):
        nbnorm.layer_norm(x[i], x.shape[2], weight, out=y[i])
    return nbnorm.layer_norm(y, x.shape[2])


@compiled
@pytest.mark.deep
@pytest.mark.parametrize("shape", [(40, 3, 16), (7, 50, 768), (3, 300, 768), (3, 2, 70000)])
def test_in_prange(rng, shape):
    x, weight = rng.standard_normal(shape, dtype=np.float32), rng.standard_normal(shape[2], dtype=np.float32)
    expected = nbnorm.layer_norm(x, shape[2], weight)
    y = np.empty_like(x)
    assert_same(in_prange(x, weight, y), nbnorm.layer_norm(expected, shape[2]))
    assert_same(y, expected)


@compiled
@pytest.mark.deep
def test_who_works(monkeypatch, rng):
    """Threads share what a thread with Python's lock calls; where it has none, it may be in a parallel region."""
    x = rng.standard_normal((2, 200, 768), dtype=np.float32)
    weight, y = np.ones(768, np.float32), np.empty_like(x)
    in_prange(x, weight, y), forward(x, 768, weight, weight, 0.0, False)
    seen = []
    functional = served.functional.layer_norm

    def layer_norm(x, *options, **others):
        seen.append((x.ndim, parallel.workers(x.size), parallel.our_threads() > 1))
        return functional(x, *options, **others)

    numbas_threads_work(monkeypatch)
    monkeypatch.setattr(served.functional, "layer_norm", layer_norm)
    in_prange(x, weight, y)
    assert seen == [(3, parallel.NUMBAS, numba.get_num_threads() > 1)]
    seen.clear()
    # of its kind that was the first of which Python was asked
    in_prange(x, weight, y)
    assert seen == []
    long = np.ones((1, 70000), np.float32)
    forward(long, 70000, None, None, 0.0, False)
    in_prange(np.ones((1, 1, 70000), np.float32), long[0], np.empty((1, 1, 70000), np.float32))
    without_lock(forward)(long, 70000, None, None, 0.0, False)
    assert [(ndim, who) for ndim, who, _ in seen] == [
        (2, parallel.NUMBAS), (2, parallel.ONE), (3, parallel.NUMBAS), (2, parallel.ONE),
    ]  # fmt: skip


@compiled
@pytest.mark.deep
@pytest.mark.parametrize("distance", [-200, -3, 0, 3, 200, 4000])
def test_overlapping_results(rng, distance):
    memory = rng.standard_normal(12000, dtype=np.float32)
    dy, x = rng.standard_normal((20, 200), dtype=np.float32), memory[4000:8000].reshape(20, 200)
    weight, row = np.ones(200, np.float32), memory[4000:4200]
    mean, rstd = memory[4000:4020].reshape(20, 1), memory[4050:4070].reshape(20, 1)
    out = memory[4000 + distance : 8000 + distance].reshape(20, 200)
    before = memory.copy()

    def expect(function, *arguments):
        """What it gives of copies, for calls that are the first of their kind and that are not."""
        copies = [array.copy() if isinstance(array, np.ndarray) else array for array in arguments]
        result = function.py_func(*copies, *without)
        for _ in range(2):
            function(*arguments, *given)
            assert_same(out, result if without == (None,) else result.dx)
            memory[:] = before

    given, without = (out,), (None,)
    expect(forward_into, x, 200, weight, weight)
    expect(forward_into, dy, 200, row, weight)
    expect(forward_into, dy, 200, weight, row)
    given, without = ((out, None, None),), ((None, None, None),)
    expect(backward_into, dy, x, 200, weight)
    expect(backward_into, x, dy, 200, weight)
    expect(backward_into, dy, dy.copy(), 200, row)
    expect(backward_given_into, dy, dy.copy(), 200, weight, mean, rstd)


@compiled
@pytest.mark.deep
def test_results_that_share_memory(rng):
    dy, x, weight = (rng.standard_normal(shape, dtype=np.float32) for shape in ((20, 200), (20, 200), 200))
    rows = np.zeros(300, np.float32)
    # so that the calls below are not the first of their kinds
    for out in ((None, weight.copy(), weight.copy()), (x, weight.copy(), None), (x, None, weight.copy())):
        again(backward_into, dy, x, 200, weight, out)
    for out in ((None, rows[:200], rows[100:]), (x, x[1], None), (x, None, x[2])):
        with pytest.raises(ValueError, match="shares memory") as expected:
            nbnorm.layer_norm_backward(dy, x, 200, weight, out=out)
        with pytest.raises(ValueError, match="shares memory") as error:
            backward_into(dy, x, 200, weight, out)
        assert str(error.value) == str(expected.value)
    assert (rows == 0).all()


@compiled
@pytest.mark.deep
def test_misaligned_arrays(monkeypatch, rng):
    """Python makes these calls."""
    x = np.zeros(20 * 200 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(20, 200)
    x[:] = rng.standard_normal((20, 200))
    weight, aligned = np.ones(200, np.float32), x.copy()
    again(forward, aligned, 200, weight, weight, 1e-5, False), again(backward, aligned, aligned, 200, weight, 1e-5, False)
    asked = []
    monkeypatch.setattr(served.functional, "layer_norm", lambda *call, **out: asked.append(call))
    monkeypatch.setattr(served.functional, "layer_norm_backward", lambda *call, **out: asked.append(call))
    forward(x, 200, weight, weight, 1e-5, False)
    backward(x, aligned, 200, weight, 1e-5, False), backward(aligned, x, 200, weight, 1e-5, False)
    assert [array.flags.aligned for call in asked for array in call[:2] if isinstance(array, np.ndarray)] == [
        False, False, True, True, False,
    ]  # fmt: skip
    monkeypatch.undo()
    assert_same(forward(x, 200, weight, weight, 1e-5, False), nbnorm.layer_norm(x, 200, weight, weight))
    assert_same(backward(x, x, 200, weight, 1e-5, False), nbnorm.layer_norm_backward(x, x, 200, weight))


X = np.ones((6, 4), np.float32)
# what is wrong with a call, whose x has shape (6, 4) and is what Python says
WRONG = {
    "columns": {"normalized_shape": 5},
    "rows": {"normalized_shape": (4, 4)},
    "negative": {"normalized_shape": -4},
    "weight": {"weight": np.ones(3, np.float32)},
    "bias": {"bias": np.ones(5, np.float32)},
    "eps below 0": {"eps": -1e-9},
    "eps NaN": {"eps": np.nan},
    "eps Inf": {"eps": np.inf},
}


@compiled
@pytest.mark.parametrize("case", WRONG)
def test_wrong_values(case):
    call = {"x": X, "normalized_shape": 4, "weight": None, "bias": None, "eps": 0.0, "use_diff_of_squares": False}
    # so that the next one is not the first of its kind
    forward(*call.values())
    call |= WRONG[case]
    with pytest.raises(ValueError, match=":") as expected:
        nbnorm.layer_norm(**call)
    with pytest.raises(ValueError, match=":") as error:
        forward(*call.values())
    assert str(error.value) == str(expected.value)


@compiled
@pytest.mark.deep
def test_wrong_values_of_a_backward():
    x, row, one = np.ones((6, 4), np.float32), np.ones(4, np.float32), np.ones((6, 1), np.float32)
    for dy, weight, mean, rstd in ((x[1:], row, one, one), (x, row[1:], one, one), (x, row, one[1:], one), (x, row, one, x)):
        with pytest.raises(ValueError, match="shape") as expected:
            nbnorm.layer_norm_backward(dy, x, 4, weight, mean=mean, rstd=rstd)
        with pytest.raises(ValueError, match="shape") as error:
            backward_given(dy, x, 4, weight, mean, rstd)
        assert str(error.value) == str(expected.value)
    with pytest.raises(ValueError, match=r"out\[0\]: shape"):
        backward_into(x, x, 4, row, (x[1:], None, None))


@compiled
@pytest.mark.deep
def test_what_a_function_catches(rng):
    @njit
    def guarded(x, normalized_shape):
        try:
            y = nbnorm.layer_norm(x, normalized_shape)
        except Exception:
            return -x
        return y

    @njit
    def raising(x, text):
        if x.size == 0:
            raise ValueError(text)
        return nbnorm.layer_norm_backward(nbnorm.layer_norm(x, 8), x, 8).dx

    x = rng.standard_normal((6, 8))
    assert_same(guarded(x, 8), nbnorm.layer_norm(x, 8))
    assert_same(guarded(x, 7), -x)
    assert_same(raising(x, "none"), nbnorm.layer_norm_backward(nbnorm.layer_norm(x, 8), x, 8).dx)
    with pytest.raises(ValueError, match="the user's own"):
        raising(x[:0], "the user's own")
    with pytest.raises(ValueError, match="expected one that ends in normalized_shape"):
        raising(x[:, :7].copy(), "none")


def maybe(x, weight, is_given):
    given = None
    if is_given:
        given = weight
    return nbnorm.layer_norm(x, 4, given)


# functions that Numba must refuse, their arguments, and what must be said
REFUSED = {
    "strided x": (
        lambda x: nbnorm.layer_norm(x, 3),
        (X[:, 1:],),
        "x: an array that may have any strides",
        "np.ascontiguousarray(x)",
    ),
    "a row that loses its layout": (
        lambda x: nbnorm.layer_norm(np.asarray(next(iter(x.T))), 6),
        (X,),
        "np.ascontiguousarray(x)",
    ),
    "strided weight": (
        lambda x, w: nbnorm.layer_norm(x, 4, w),
        (X, X[0, ::-1]),
        "weight: an array",
        "np.ascontiguousarray(weight)",
    ),
    "integers": (lambda x: nbnorm.layer_norm(x, 4), (X.astype(int),), "x: dtype int64", "x.astype(np.float64)"),
    "float16": (lambda x: nbnorm.layer_norm(x, 4), (X.astype(np.float16),), "x: dtype float16", "outside of compiled code"),
    "complex": (lambda x: nbnorm.layer_norm(x, 4), (X.astype(complex),), "x: dtype complex128", "outside of compiled code"),
    "a number for x": (lambda x: nbnorm.layer_norm(x, 4), (3.0,), "x: float64; expected an array"),
    "a list of sizes": (lambda x: nbnorm.layer_norm(x, [4]), (X,), "normalized_shape: ", "an int or a tuple of ints"),
    "no sizes": (lambda x: nbnorm.layer_norm(x, ()), (X,), "normalized_shape: "),
    "more sizes than x has": (lambda x: nbnorm.layer_norm(x, (2, 6, 4)), (X,), "x: 2 dimensions"),
    "weight of two dimensions": (lambda x: nbnorm.layer_norm(x, 4, x), (X,), "weight: 2 dimensions; expected 1"),
    "eps of another kind": (lambda x: nbnorm.layer_norm(x, 4, None, None, x), (X,), "eps: ", "expected a real number"),
    "a flag of another kind": (lambda x: nbnorm.layer_norm(x, 4, use_diff_of_squares=1), (X,), "use_diff_of_squares: "),
    "return_stats of a variable": (
        lambda x, b: nbnorm.layer_norm(x, 4, return_stats=b),
        (X, True),
        "return_stats: bool",
        "written in the call",
    ),
    "a mask of a variable": (
        lambda x, b: nbnorm.layer_norm_backward(x, x, 4, output_mask=(True, b, True)),
        (X, True),
        "output_mask[1]: bool",
        "written in the call",
    ),
    "a mask of two": (
        lambda x: nbnorm.layer_norm_backward(x, x, 4, output_mask=(True, True)),
        (X,),
        "output_mask: ",
        "three",
    ),
    "a stream": (lambda x: nbnorm.layer_norm(x, 4, stream=1), (X,), "stream: "),
    "out of another dtype": (
        lambda x, y: nbnorm.layer_norm(x, 4, out=y),
        (X, X.astype(float)),
        "out: dtype float64; expected float32",
    ),
    "out of another rank": (lambda x, y: nbnorm.layer_norm(x, 4, out=y), (X, X[0]), "out: 1 dimensions; expected 2"),
    "out for what is not wanted": (
        lambda x: nbnorm.layer_norm_backward(x, x, 4, output_mask=(True, False, True), out=(None, x[0], None)),
        (X,),
        "out[1]: ",
        "output_mask",
    ),
    "out that is strided": (
        lambda x, y: nbnorm.layer_norm(x, 4, out=y),
        (X, X[::2]),
        "out: an array",
        "expected a contiguous array",
    ),
    "mean alone": (lambda x: nbnorm.layer_norm_backward(x, x, 4, mean=x), (X,), "rstd: None, but mean is given"),
    "dy that is None": (lambda x: nbnorm.layer_norm_backward(None, x, 4), (X,), "dy: none"),
    "weight that may be None": (
        maybe,
        (X, X[0], True),
        "weight: None or an array",
        "`if weight is None`",
    ),
}


@compiled
@pytest.mark.parametrize("case", ["strided x", "return_stats of a variable", *deep(*sorted({*REFUSED} - {"strided x"}))])
def test_refused_types(case):
    function, arguments, *texts = REFUSED[case]
    with pytest.raises(TypingError) as error:
        njit(function)(*arguments)
    for text in texts:
        assert text in str(error.value)


@compiled
@pytest.mark.deep
def test_a_mask_in_prange():
    """Numba takes it out of the loop, and then knows no more what it is."""

    @njit(parallel=True)
    def masked(x):
        for i in prange(x.shape[0]):
            nbnorm.layer_norm_backward(x[i], x[i], 4, output_mask=(True, False, False))

    with pytest.raises(TypingError, match=r"output_mask\[0\]: bool; .* call a function that has the mask"):
        masked(X)


@compiled
@pytest.mark.deep
def test_a_read_only_result():
    x = X.copy()
    x.flags.writeable = False
    with pytest.raises(TypingError, match="out: a read-only array"):
        njit(lambda x, y: nbnorm.layer_norm(x, 4, out=y))(x, x)
    # which may be read
    assert_same(forward(x, 4, None, None, 0.0, False), nbnorm.layer_norm(x, 4, eps=0.0))


@compiled
@pytest.mark.deep
def test_options_of_other_types(rng):
    x = rng.standard_normal((6, 40))
    assert_same(njit(lambda x: nbnorm.layer_norm(x, np.uint8(40), eps=1))(x), nbnorm.layer_norm(x, 40, eps=1))
    assert_same(njit(lambda x: nbnorm.layer_norm(x, x.shape[1:], eps=np.float32(0.5)))(x), nbnorm.layer_norm(x, 40, eps=0.5))
    # all rows are constant: rstd would be -Inf
    ones = np.ones((6, 40))
    assert_same(
        native(njit(lambda x: nbnorm.layer_norm(x, 40, eps=-0.0, return_stats=True)), ones),
        nbnorm.layer_norm(ones, 40, eps=-0.0, return_stats=True),
    )


@compiled
@pytest.mark.deep
def test_fast_math_of_the_users_function(rng):
    x = rng.standard_normal((6, 40), dtype=np.float32)
    x[2, 3] = np.nan
    fast = njit(fastmath=True)(forward.py_func)
    assert_same(fast(x, 40, None, None, 1e-5, False), nbnorm.layer_norm(x, 40))
    with pytest.raises(ValueError, match="eps: nan"):
        fast(x, 40, None, None, np.nan, False)


@compiled
@pytest.mark.deep
def test_a_jitclass_that_holds_the_parameters(rng):
    @jitclass([("weight", types.float32[::1]), ("bias", types.float32[::1])])
    class Layer:
        def __init__(self, cols):
            self.weight = np.ones(cols, np.float32)
            self.bias = np.zeros(cols, np.float32)

        def forward(self, x):
            return nbnorm.layer_norm(x, self.weight.size, self.weight, self.bias)

        def step(self, dy, x, rate):
            grads = nbnorm.layer_norm_backward(dy, x, self.weight.size, self.weight)
            self.weight -= rate * grads.dweight
            self.bias -= rate * grads.dbias
            return grads.dx

    dy, x = rng.standard_normal((2, 6, 40), dtype=np.float32)
    layer = Layer(40)
    assert_same(layer.forward(x), nbnorm.layer_norm(x, 40, np.ones(40, np.float32), np.zeros(40, np.float32)))
    dx, dweight, dbias = nbnorm.layer_norm_backward(dy, x, 40, np.ones(40, np.float32))
    assert_same(layer.step(dy, x, np.float32(0.5)), dx)
    weight, bias = np.ones(40, np.float32) - np.float32(0.5) * dweight, -np.float32(0.5) * dbias
    assert_same(layer.forward(x), nbnorm.layer_norm(x, 40, weight, bias))


@compiled
@pytest.mark.deep
def test_an_overloaded_call_from_a_default(rng):
    """What a function of the user's own has as defaults, Numba gives as a type of its own."""

    @njit
    def norm(x, normalized_shape, weight=None, eps=1e-3, use_diff_of_squares=True, out=None):
        return nbnorm.layer_norm(x, normalized_shape, weight, None, eps, use_diff_of_squares, out)

    x = rng.standard_normal((6, 40))
    assert_same(njit(lambda x: norm(x, 40))(x), nbnorm.layer_norm(x, 40, None, None, 1e-3, True))


@compiled
@pytest.mark.deep
def test_threads_at_once(rng):
    """Eight, on a function that is compiled and asks for its tables then."""

    @njit(nogil=True)
    def normed(x, n):
        for _ in range(n):
            y = nbnorm.layer_norm(x, x.shape[1])
        return y

    x = rng.standard_normal((6, 40))
    results, barrier = [], threading.Barrier(8)

    def work():
        barrier.wait()
        results.append(normed(x, 1000))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for y in results:
        assert_same(y, nbnorm.layer_norm(x, 40))
    assert len(results) == 8


@compiled
@pytest.mark.deep
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, OSError])
def test_what_python_raises_on_its_way(monkeypatch, rng, error):
    x = rng.standard_normal((1, 70000))
    forward(x, 70000, None, None, 0.0, False)

    def layer_norm(*_, **__):
        raise error("why")

    monkeypatch.setattr(served.functional, "layer_norm", layer_norm)
    _nrt_python.memsys_enable_stats()
    before = rtsys.get_allocation_stats()
    for _ in range(100):
        with pytest.raises(RuntimeError if error is OSError else error, match="^$" if error is KeyboardInterrupt else "why"):
            forward(x, 70000, None, None, 0.0, False)
    after = rtsys.get_allocation_stats()
    # x is lost to Numba, as in any function that calls one which raises; the result is not
    assert (after.mi_alloc - after.mi_free) - (before.mi_alloc - before.mi_free) == 100

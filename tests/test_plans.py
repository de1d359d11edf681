"""Does a call that was made before give what it gave then, and leave to the checks what is theirs?"""

import weakref
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from levels import deep
from nbnorm.calls import checks
from nbnorm.cpu import plans
from nbnorm.cpu.workers import blocks, parallel
from tolerances import assert_grads, assert_y

COLS = 24


@pytest.fixture(params=[np.float32, *deep(np.float64)])
def operands(request, rng):
    x, dy = rng.standard_normal((2, 6, COLS)).astype(request.param)
    weight, bias = rng.standard_normal((2, COLS)).astype(request.param)
    # the first calls leave a plan
    nbnorm.layer_norm(x, COLS, weight, bias)
    nbnorm.layer_norm_backward(dy, x, COLS, weight)
    return x, dy, weight, bias


def planned(function, *arguments, **options):
    """What a call gives by its plan, which a call like it has left."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checks, "forward", None)
        patched.setattr(checks, "backward", None)
        return function(*arguments, **options)


def assert_same(results, expected):
    for result, value in zip(results, expected, strict=True):
        assert (result is None) == (value is None)
        if value is not None:
            assert (result.shape, result.dtype) == (value.shape, value.dtype)
            np.testing.assert_array_equal(result, value)


@pytest.mark.parametrize("normalized_shape", [COLS, (COLS,)])
@pytest.mark.parametrize("shape", [(6, COLS), (2, 3, COLS), (COLS,)])
def test_the_same_bits(operands, shape, normalized_shape):
    x, dy, weight, bias = operands
    x, dy = x[: np.prod(shape) // COLS].reshape(shape), dy[: np.prod(shape) // COLS].reshape(shape)
    # a list takes the checked path
    expected = nbnorm.layer_norm(x, [COLS], weight, bias, return_stats=True)
    parameters = normalized_shape, weight, bias
    assert_same([nbnorm.layer_norm(x, *parameters)], [expected.y])
    assert_same([planned(nbnorm.layer_norm, x, *parameters)], [expected.y])
    nbnorm.layer_norm(x, *parameters, return_stats=True)
    result = planned(nbnorm.layer_norm, x, *parameters, return_stats=True)
    assert type(result) is nbnorm.LayerNormResult
    assert_same(result, expected)
    for copy in (np.empty_like, np.copy):
        for _ in range(2):
            array = copy(x)
            x_or_out = array if copy is np.copy else x
            assert nbnorm.layer_norm(x_or_out, *parameters, out=array) is array
            np.testing.assert_array_equal(array, expected.y)
        array = copy(x)
        x_or_out = array if copy is np.copy else x
        assert planned(nbnorm.layer_norm, x_or_out, *parameters, out=array) is array
        np.testing.assert_array_equal(array, expected.y)
    for statistics in ({}, {"mean": expected.mean, "rstd": expected.rstd}):
        grads = nbnorm.layer_norm_backward(dy, x, [COLS], weight, **statistics)
        assert_same(nbnorm.layer_norm_backward(dy, x, normalized_shape, weight, **statistics), grads)
        again = planned(nbnorm.layer_norm_backward, dy, x, normalized_shape, weight, **statistics)
        assert type(again) is nbnorm.LayerNormGrads
        assert_same(again, grads)


@pytest.mark.parametrize("use_diff_of_squares", [False, *deep(True)])
def test_several_normalized_dimensions(rng, use_diff_of_squares):
    x, dy = rng.standard_normal((2, 5, 3, COLS), np.float32)
    weight, bias = rng.standard_normal((2, 3, COLS), np.float32)
    mode = {"use_diff_of_squares": use_diff_of_squares}
    call = x, (3, COLS), weight, bias
    first = nbnorm.layer_norm(*call, return_stats=True, **mode)
    assert_same(planned(nbnorm.layer_norm, *call, return_stats=True, **mode), first)
    call = dy, x, (3, COLS), weight
    first = nbnorm.layer_norm_backward(*call, **mode)
    assert_same(planned(nbnorm.layer_norm_backward, *call, **mode), first)


@pytest.mark.deep
@pytest.mark.parametrize(
    "dtypes", [("f4", "f8", "f8"), ("f8", "f4", "f4"), ("f4", "f2", "f2"), ("f2", "f4", "f4"), ("f2", "f8", "f2")], ids=str
)
def test_mixed_dtypes(rng, dtypes):
    """Where parameters have to be converted in another way than from 16 bits to float32, there is no plan."""
    x_dtype, weight_dtype, dy_dtype = dtypes
    x, dy = rng.standard_normal((5, COLS)).astype(x_dtype), rng.standard_normal((5, COLS)).astype(dy_dtype)
    weight, bias = rng.standard_normal((2, COLS)).astype(weight_dtype)
    first = nbnorm.layer_norm(x, COLS, weight, bias, return_stats=True)
    assert distinct()[0] == (dtypes != ("f8", "f4", "f4"))
    assert_same(nbnorm.layer_norm(x, COLS, weight, bias, return_stats=True), first)
    grads = nbnorm.layer_norm_backward(dy, x, COLS, weight)
    assert_same(nbnorm.layer_norm_backward(dy, x, COLS, weight), grads)


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [np.float32, *deep(np.float16)])
def test_rows_are_short_as_on_the_long_way(rng, dtype):
    # with another kernel, the last bits of mean and rstd would be others
    with np.errstate(under="ignore"):
        cases = [rng.standard_normal((3, 53, cols)).astype(dtype) for cols in (127, 128, 256, 257)]
    for x, dy, (weight, *_) in cases:
        cols = x.shape[1]
        y = nbnorm.layer_norm(x, cols, weight, weight, return_stats=True)
        grads = nbnorm.layer_norm_backward(dy, x, cols, weight)
        assert_same(planned(nbnorm.layer_norm, x, cols, weight, weight, return_stats=True), y)
        assert_same(planned(nbnorm.layer_norm_backward, dy, x, cols, weight), grads)


@pytest.mark.parametrize("mask", [(True, True, True), (True, False, True), (True, False, False)])
@pytest.mark.parametrize("shape", [(6, COLS), (2, 3, COLS), (COLS,)])
def test_gradients_into_out(operands, shape, mask):
    x, dy, weight, _ = operands
    x, dy = x[: np.prod(shape) // COLS].reshape(shape), dy[: np.prod(shape) // COLS].reshape(shape)
    expected = nbnorm.layer_norm_backward(dy, x, [COLS], weight, output_mask=mask)

    def cases():
        in_place_of_x, in_place_of_dy, in_place_of_weight = x.copy(), dy.copy(), weight.copy()
        return (
            ((dy, x, weight), np.empty_like(x), np.empty_like(weight), np.empty_like(weight)),
            ((dy, x, weight), np.empty_like(x), None, None),
            ((dy, x, weight), None, np.empty_like(weight), np.empty_like(weight)),
            ((dy, in_place_of_x, weight), in_place_of_x, None, None),
            ((in_place_of_dy, x, weight), in_place_of_dy, None, None),
            ((dy, x, in_place_of_weight), None, in_place_of_weight, None),
        )

    def call(backward, arrays, *out):
        out = tuple(array if wanted else None for array, wanted in zip(out, mask, strict=True))
        grads = backward(*arrays[:2], COLS, arrays[2], output_mask=mask, out=out)
        for grad, given, value in zip(grads, out, expected, strict=True):
            assert given is None or grad is given
            np.testing.assert_array_equal(grad, value)

    for case in cases():
        call(nbnorm.layer_norm_backward, *case)
    for case in cases():
        call(lambda *arrays, **options: planned(nbnorm.layer_norm_backward, *arrays, **options), *case)


@pytest.mark.parametrize("shape", [(6, COLS), (2, 3, COLS), (COLS,)])
@pytest.mark.parametrize("dtype", [np.float16, *deep(ml_dtypes.bfloat16)])
def test_the_same_bits_in_16_bits(rng, checked, dtype, shape):
    x = rng.standard_normal(shape).astype(dtype)
    wide = rng.standard_normal((2, COLS), np.float32)
    narrow = wide.astype(dtype)
    for weight, bias in ((*wide,), (*narrow,), (wide[0], narrow[1]), (narrow[0], None), (None, wide[1])):
        expected = nbnorm.layer_norm(x, COLS, weight, bias, return_stats=True)
        assert_same(planned(nbnorm.layer_norm, x, COLS, weight, bias, return_stats=True), expected)
        for _ in range(2):
            in_place = x.copy()
            assert nbnorm.layer_norm(in_place, COLS, weight, bias, out=in_place) is in_place
            np.testing.assert_array_equal(in_place, expected.y)
    nbnorm.layer_norm(x, COLS, None, wide[1])
    nbnorm.layer_norm(x, COLS, None, wide[1], out=np.empty_like(x))
    swapped = x.dtype.newbyteorder()
    other = ml_dtypes.bfloat16 if dtype == np.float16 else np.float16
    checked.clear()
    arrays = (x[..., ::-1], x.view(np.uint16), x.view(np.int16), x.astype(swapped))
    biases = (wide[1].astype(np.float64), wide[1].astype(other), narrow[1].astype(swapped))
    for array in arrays:
        nbnorm.layer_norm(array, COLS, None, wide[1])
    for bias in biases:
        nbnorm.layer_norm(x, COLS, None, bias)
    assert len(checked) == len(arrays) + len(biases)
    for array in arrays[1:3]:
        with pytest.raises(ValueError, match="dtype"):
            nbnorm.layer_norm(x, COLS, None, wide[1], out=array)


@pytest.mark.parametrize("shape", [(6, COLS), (2, 3, COLS), (COLS,)])
@pytest.mark.parametrize("dtype", [np.float16, *deep(ml_dtypes.bfloat16)])
def test_gradients_of_16_bits(rng, checked, dtype, shape):
    x, dy = rng.standard_normal((2, *shape), np.float32).astype(dtype)
    wide = rng.standard_normal(COLS, np.float32)
    _, mean, rstd = nbnorm.layer_norm(x, COLS, wide, return_stats=True)
    for weight in (wide, wide.astype(dtype), None):
        for statistics in ({}, {"mean": mean, "rstd": rstd}):
            for mask in ((True, True, True), (True, False, True)):
                options = {"output_mask": mask, **statistics}
                expected = nbnorm.layer_norm_backward(dy, x, COLS, weight, **options)
                assert_same(planned(nbnorm.layer_norm_backward, dy, x, COLS, weight, **options), expected)
                out = tuple(None if value is None else np.empty_like(value) for value in expected)
                nbnorm.layer_norm_backward(dy, x, COLS, weight, out=out, **options)
                assert_same(planned(nbnorm.layer_norm_backward, dy, x, COLS, weight, out=out, **options), expected)
    other = np.dtype(ml_dtypes.bfloat16 if dtype == np.float16 else np.float16)
    checked.clear()
    weights = (wide.astype(np.float64), wide.astype(other), wide.astype(x.dtype.newbyteorder()))
    for weight in weights:
        nbnorm.layer_norm_backward(dy, x, COLS, weight)
    assert len(checked) == len(weights)
    for dweight in (np.empty(COLS, other), np.empty(COLS, np.float32)):
        out = (np.empty_like(x), dweight, np.empty(COLS, dtype))
        with pytest.raises(ValueError, match="dtype"):
            nbnorm.layer_norm_backward(dy, x, COLS, wide.astype(dtype), out=out)


def unaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:]
    result = memory.view(array.dtype).reshape(array.shape)
    result[...] = array
    assert not result.flags.aligned
    return result


class Array(np.ndarray):
    pass


class Exported:
    """An object that NumPy makes an array of, as any library's."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


# what is as right as the array that a plan was kept for, but in another way
OTHERS = {
    "a subclass": lambda array: array.view(Array),
    "a matrix or a memmap": lambda array: array.view(np.memmap),
    "an object": Exported,
    "a list": lambda array: array.tolist(),
    "swapped bytes": lambda array: array.astype(array.dtype.newbyteorder()),
    "strided": lambda array: np.repeat(array, 2, -1)[..., ::2],
    "backwards": lambda array: array[..., ::-1].copy()[..., ::-1],
    "columns first": lambda array: np.asfortranarray(array) if array.ndim > 1 else np.repeat(array, 3)[::3],
    "unaligned": unaligned,
    "another dtype": lambda array: array.astype(np.float64 if array.dtype == np.float32 else np.float32),
}
# by kernels of their own
MIXED = ("a list", "another dtype")
WAYS = [*(way for way in OTHERS if way not in MIXED), *deep(*MIXED)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["x", "weight", "bias", "out"])
def test_other_arrays_are_checked(operands, checked, way, name):
    x, _, weight, bias = operands
    arrays = {"x": x, "weight": weight, "bias": bias, "out": np.empty_like(x)}
    expected = nbnorm.layer_norm(normalized_shape=COLS, **arrays).copy()
    planned(nbnorm.layer_norm, normalized_shape=COLS, **arrays)
    checked.clear()
    arrays[name] = OTHERS[way](arrays[name])
    if way == "another dtype" or (name in ("x", "out") and way == "a list"):
        arrays["out"] = None if name == "x" else arrays["out"]
    if name == "out" and way in ("an object", "a list", "another dtype"):
        with pytest.raises((TypeError, ValueError), match=r"^out: "):
            nbnorm.layer_norm(normalized_shape=COLS, **arrays)
    else:
        result = nbnorm.layer_norm(normalized_shape=COLS, **arrays)
        assert arrays["out"] is None or result is arrays["out"]
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
        if way not in MIXED:
            np.testing.assert_array_equal(result, expected)
    assert len(checked) == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["dy", "x", "weight", "mean", "rstd", "dx", "dweight", "dbias"])
def test_other_arrays_of_a_backward_are_checked(operands, checked, way, name):
    x, dy, weight, bias = operands
    _, mean, rstd = nbnorm.layer_norm(x, COLS, weight, bias, return_stats=True)
    arrays = {"dy": dy, "x": x, "weight": weight, "mean": mean, "rstd": rstd}
    arrays |= {"dx": np.empty_like(x), "dweight": np.empty_like(weight), "dbias": np.empty_like(weight)}

    def call():
        inputs = {key: array for key, array in arrays.items() if not key.startswith("d") or key == "dy"}
        out = arrays["dx"], arrays["dweight"], arrays["dbias"]
        return nbnorm.layer_norm_backward(normalized_shape=COLS, out=out, **inputs)

    expected = [grad.copy() for grad in call()]
    planned(call)
    checked.clear()
    arrays[name] = OTHERS[way](arrays[name])
    is_other = way in MIXED
    if name in ("dx", "dweight", "dbias") and (is_other or way == "an object"):
        with pytest.raises((TypeError, ValueError), match=r"^out\[\d\]: "):
            call()
    elif name in ("x", "weight") and (way == "another dtype" or (way == "a list" and x.dtype == np.float32)):
        # of which results have another dtype
        with pytest.raises(ValueError, match=r"^out\[\d\]: dtype"):
            call()
    else:
        for grad, value in zip(call(), expected, strict=True):
            np.testing.assert_allclose(grad, value, rtol=1e-4, atol=1e-5)
    # a single column is as it was
    assert len(checked) == (name not in ("mean", "rstd") or way not in ("backwards", "columns first"))


def test_a_read_only_array_is_read_and_not_written(operands):
    x, dy, weight, bias = (array.copy() for array in operands)
    out = np.empty_like(x)
    expected = nbnorm.layer_norm(x, COLS, weight, bias, out=out).copy()
    for array in (x, weight, bias):
        array.flags.writeable = False
        for _ in range(2):
            np.testing.assert_array_equal(nbnorm.layer_norm(x, COLS, weight, bias, out=out), expected)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        nbnorm.layer_norm(x, COLS, weight, bias, out=out)
    grads = nbnorm.layer_norm_backward(dy, x, COLS, weight, out=(None, weight.copy(), None))
    locked = grads.dweight
    locked.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        nbnorm.layer_norm_backward(dy, x, COLS, weight, out=(None, locked, None))


def test_an_array_whose_shape_was_changed(operands):
    x, _, weight, bias = operands
    x = x.copy()
    expected = nbnorm.layer_norm(x, COLS, weight, bias)
    x.shape = 2, 3, COLS
    np.testing.assert_array_equal(nbnorm.layer_norm(x, COLS, weight, bias), expected.reshape(x.shape))
    x.shape = 12, COLS // 2
    with pytest.raises(ValueError, match=r"^x: shape"):
        nbnorm.layer_norm(x, COLS, weight, bias)


def test_dtypes_that_equal_others(rng, checked):
    x = rng.standard_normal((6, COLS), np.float32)
    nbnorm.layer_norm(x, COLS)
    with_fields = x.view(np.dtype((np.float32, {"low": (np.int16, 0), "high": (np.int16, 2)})))
    assert with_fields.dtype == x.dtype
    with pytest.raises(TypeError, match=r"^x: dtype"):
        nbnorm.layer_norm(with_fields, COLS)
    plans.LAYER_NORM.clear()
    # of which a result must not keep what another call's array had
    nbnorm.layer_norm(x.view(np.dtype(np.float32, metadata={"unit": "m"})), COLS)
    assert not plans.LAYER_NORM


class Size(tuple):
    """As torch has it."""

    __slots__ = ()


class Odd(tuple):
    """Not what it says that it is."""

    __slots__ = ()

    def __iter__(self):
        return iter((COLS,))


OPTIONS = [
    ({"normalized_shape": np.int64(COLS)}, None),
    ({"normalized_shape": (np.int64(COLS),)}, None),
    ({"normalized_shape": [COLS]}, None),
    ({"normalized_shape": np.array([COLS])}, None),
    ({"normalized_shape": float(COLS)}, "normalized_shape: 24.0"),
    ({"normalized_shape": (float(COLS),)}, "normalized_shape: "),
    ({"normalized_shape": None}, "normalized_shape: None"),
    ({"normalized_shape": COLS + 1}, "x: shape"),
    ({"eps": True}, "eps: True"),
    ({"eps": 1}, None),
    ({"eps": np.float64(1.0)}, None),
    ({"eps": np.float32(1.0)}, None),
    ({"eps": np.ones(())}, None),
    ({"eps": float("nan")}, "eps: nan"),
    ({"eps": float("inf")}, "eps: inf"),
    ({"eps": -1.0}, "eps: -1.0"),
    ({"eps": "1"}, "eps: "),
    ({"eps": [1.0]}, "eps: "),
    ({"eps": 0.5}, None),
    ({"use_diff_of_squares": 0}, "use_diff_of_squares: 0"),
    ({"use_diff_of_squares": 0.0}, "use_diff_of_squares: 0.0"),
    ({"use_diff_of_squares": None}, "use_diff_of_squares: None"),
    ({"use_diff_of_squares": np.False_}, None),
    ({"use_diff_of_squares": True}, None),
    ({"stream": 0}, "stream: 0"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=str)
@pytest.mark.parametrize("known", [COLS, (COLS,)])
def test_options_that_are_equal_are_not_the_same(operands, checked, known, options, message):
    x, dy, weight, bias = operands
    right = {"x": x, "normalized_shape": known, "weight": weight, "eps": 1.0, "use_diff_of_squares": False}
    for function, others in ((nbnorm.layer_norm, {"bias": bias}), (nbnorm.layer_norm_backward, {"dy": dy})):
        expected = function(**right, **others)
        planned(function, **right, **others)
        checked.clear()
        if message is None:
            result = function(**right | options, **others)
            if options.get("eps", 1) == 1:
                np.testing.assert_allclose(result[0], expected[0], rtol=1e-4, atol=1e-5)
        else:
            with pytest.raises((TypeError, ValueError), match=f"^{message}"):
                function(**right | options, **others)
        assert len(checked) == 1


def test_a_shape_is_known_by_what_the_checks_read(operands):
    x, dy, weight, bias = operands
    shape = Odd((COLS // 2,))
    for _ in range(2):
        np.testing.assert_array_equal(nbnorm.layer_norm(x, shape, weight, bias), nbnorm.layer_norm(x, COLS, weight, bias))
        assert_same(nbnorm.layer_norm_backward(dy, x, shape, weight), nbnorm.layer_norm_backward(dy, x, COLS, weight))
    for function, arguments in ((nbnorm.layer_norm, (x,)), (nbnorm.layer_norm_backward, (dy, x))):
        with pytest.raises(ValueError, match=r"^x: shape"):
            function(*arguments, tuple.__getitem__(shape, slice(None)), weight)


@pytest.mark.parametrize(
    ("flag", "message"), [(0, "return_stats: 0"), (1, "return_stats: 1"), (None, "return_stats: None"), (np.True_, None)]
)
def test_statistics_are_asked_for_by_a_bool(operands, checked, flag, message):
    x, _, weight, bias = operands
    for known in (False, True):
        nbnorm.layer_norm(x, COLS, weight, bias, return_stats=known)
    checked.clear()
    if message is None:
        assert type(nbnorm.layer_norm(x, COLS, weight, bias, return_stats=flag)) is nbnorm.LayerNormResult
    else:
        with pytest.raises(TypeError, match=f"^{message}"):
            nbnorm.layer_norm(x, COLS, weight, bias, return_stats=flag)
    assert len(checked) == 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ((1, 1, 1), r"output_mask\[0\]: 1"),
        ((True, 1, True), r"output_mask\[1\]: 1"),
        ((True, True), "output_mask: "),
        ((True,) * 4, "output_mask: "),
        ("TTT", "output_mask: "),
        (True, "output_mask: True"),
        ([True, True, True], None),
        ((np.True_, True, True), None),
        (np.ones(3, bool), None),
    ],
    ids=str,
)
def test_masks_that_are_equal_are_not_the_same(operands, checked, mask, message):
    x, dy, weight, _ = operands
    expected = nbnorm.layer_norm_backward(dy, x, COLS, weight)
    checked.clear()
    if message is None:
        assert_same(nbnorm.layer_norm_backward(dy, x, COLS, weight, output_mask=mask), expected)
    else:
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            nbnorm.layer_norm_backward(dy, x, COLS, weight, output_mask=mask)
    assert len(checked) == 1


@pytest.mark.parametrize("normalized_shape", [(1.0,), (True,), 1.0, True, ("1",), None])
def test_sizes_that_are_equal_are_not_the_same(normalized_shape):
    x = np.ones((4, 1), np.float32)
    for right in (1, (1,)):
        nbnorm.layer_norm(x, right)
    with pytest.raises(TypeError, match=r"^normalized_shape: "):
        nbnorm.layer_norm(x, normalized_shape)
    x = np.ones((4, 1, COLS), np.float32)
    nbnorm.layer_norm(x, (1, COLS))
    for wrong in ((True, COLS), (1.0, COLS)):
        with pytest.raises(TypeError, match=r"^normalized_shape: "):
            nbnorm.layer_norm(x, wrong)
    nbnorm.layer_norm(x, Size((1, COLS)))


@pytest.mark.parametrize("eps", [0.0, -0.0])
def test_a_zero_of_another_sign(operands, eps):
    x, dy, weight, bias = operands
    x[3] = 1
    nbnorm.layer_norm(x, COLS, weight, bias, -eps, return_stats=True)
    nbnorm.layer_norm_backward(dy, x, COLS, weight, -eps)
    y = planned(nbnorm.layer_norm, x, COLS, weight, bias, eps, return_stats=True)
    grads = planned(nbnorm.layer_norm_backward, dy, x, COLS, weight, eps)
    # a list takes the checked path
    expected = (*nbnorm.layer_norm(x, [COLS], weight, bias, eps, return_stats=True),)
    expected += nbnorm.layer_norm_backward(dy, x, [COLS], weight, eps)
    for array, value in zip((*y, *grads), expected, strict=True):
        np.testing.assert_array_equal(array.view(np.uint8), value.view(np.uint8))


def test_no_plans_without_elements():
    for shape in ((0, COLS), (3, 0), (0,)):
        x = np.ones(shape, np.float32)
        for _ in range(2):
            nbnorm.layer_norm(x, shape[-1])
            nbnorm.layer_norm_backward(x, x, shape[-1])
    assert not plans.LAYER_NORM
    assert not plans.LAYER_NORM_BACKWARD


@pytest.mark.parametrize("given", [{"mean": None}, {"rstd": None}])
def test_one_of_the_statistics_is_missing(operands, given):
    x, dy, weight, bias = operands
    _, mean, rstd = nbnorm.layer_norm(x, COLS, weight, bias, return_stats=True)
    nbnorm.layer_norm_backward(dy, x, COLS, weight)
    nbnorm.layer_norm_backward(dy, x, COLS, weight, mean=mean, rstd=rstd)
    with pytest.raises(ValueError, match="expected both"):
        nbnorm.layer_norm_backward(dy, x, COLS, weight, **{"mean": mean, "rstd": rstd} | given)


def test_statistics_within_what_is_written(operands):
    x, dy, weight, bias = operands
    _, mean, rstd = nbnorm.layer_norm(x, COLS, weight, bias, return_stats=True)
    expected = nbnorm.layer_norm_backward(dy, x, COLS, weight, mean=mean, rstd=rstd)
    for name in ("mean", "rstd"):
        for is_within in (False, True):
            statistics = {"mean": mean, "rstd": rstd}
            dx = np.zeros_like(x)
            memory = dx if is_within else np.zeros_like(x)
            view = memory[0, :6].reshape(6, 1)
            view[...] = statistics[name]
            statistics[name] = view
            out = (dx, None, None)
            assert_same(nbnorm.layer_norm_backward(dy, x, COLS, weight, out=out, **statistics), expected)
        assert len(plans.LAYER_NORM_BACKWARD) > 0


def test_memory_that_is_shared(rng, checked):
    """In every way, after like calls that share none: views of one array, and arrays that own their memory."""
    size = 6 * COLS
    host = rng.standard_normal(3 * size, np.float32)

    def call(memory, places):
        x_at, weight_at, bias_at, out_at = places
        x, out = (memory[at : at + size].reshape(6, COLS) for at in (x_at, out_at))
        weight, bias = (memory[at : at + COLS] for at in (weight_at, bias_at))
        return nbnorm.layer_norm(x, COLS, weight, bias, out=out)

    apart = (0, 2 * size, 2 * size + COLS, size)
    for places in (
        (0, 2 * size, 2 * size + COLS, COLS),
        (COLS, 2 * size, 2 * size + COLS, 0),
        (0, size + COLS, 2 * size, size),
        (0, 2 * size, size, size),
        (0, 2 * size, size + size - COLS, size),
    ):
        plans.LAYER_NORM.clear()
        call(host.copy(), apart)
        x_at, weight_at, bias_at, _ = places
        expected = nbnorm.layer_norm(
            host[x_at : x_at + size].reshape(6, COLS), [COLS], host[weight_at:][:COLS], host[bias_at:][:COLS]
        )
        checked.clear()
        np.testing.assert_array_equal(call(host.copy(), places), expected)
        assert len(checked) == 1
        np.testing.assert_array_equal(call(host.copy(), apart), call(host.copy(), apart))
        assert len(checked) == 1


def test_arrays_that_are_one(rng, checked):
    x, weight, bias = rng.standard_normal((3, COLS), np.float32)
    x, weight, bias = x.copy(), weight.copy(), bias.copy()
    expected = nbnorm.layer_norm(x, COLS, weight, bias, out=np.empty_like(x))
    for name in ("x", "weight", "bias"):
        arrays = {"x": x.copy(), "weight": weight.copy(), "bias": bias.copy()}
        checked.clear()
        out = arrays[name]
        assert nbnorm.layer_norm(normalized_shape=COLS, **arrays, out=out) is out
        np.testing.assert_array_equal(out, expected)
        assert len(checked) == (name != "x")
    dy = rng.standard_normal(COLS).astype(np.float32)
    grads = nbnorm.layer_norm_backward(dy, x, COLS, weight, out=(np.empty_like(x), *np.empty((2, COLS), np.float32)))
    owned = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    nbnorm.layer_norm_backward(dy, x, COLS, weight, out=owned)
    for name in ("dy", "x", "weight"):
        arrays = {"dy": dy.copy(), "x": x.copy(), "weight": weight.copy()}
        checked.clear()
        result = nbnorm.layer_norm_backward(
            normalized_shape=COLS, **arrays, out=(arrays[name], np.empty_like(x), np.empty_like(x))
        )
        assert_same(result, grads)
        assert len(checked) == (name == "weight")
    for out in ((owned[0], owned[0], owned[1]), (owned[0], owned[1], owned[0]), (owned[0], owned[1], owned[1])):
        with pytest.raises(ValueError, match="shares memory"):
            nbnorm.layer_norm_backward(dy, x, COLS, weight, out=out)


def test_a_result_is_new_each_time(operands):
    x, dy, weight, bias = operands
    results = [nbnorm.layer_norm(x, COLS, weight, bias, return_stats=True) for _ in range(3)]
    results += [nbnorm.layer_norm_backward(dy, x, COLS, weight) for _ in range(3)]
    arrays = [array for result in results for array in result]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


def distinct():
    """How many plans of each function there are: each has a key of its shapes, and one of any number of rows."""
    return len(set(plans.LAYER_NORM.values())), len(set(plans.LAYER_NORM_BACKWARD.values()))


def test_a_plan_keeps_no_arrays():
    arrays = [np.ones((6, COLS), np.float32) for _ in range(3)] + [np.ones(COLS, np.float32) for _ in range(4)]
    x, dy, out, weight, bias, dweight, dbias = arrays
    nbnorm.layer_norm(x, COLS, weight, bias, out=out)
    nbnorm.layer_norm_backward(dy, x, COLS, weight, out=(out, dweight, dbias))
    assert distinct() == (1, 1)
    references = [weakref.ref(array) for array in arrays]
    del x, dy, out, weight, bias, dweight, dbias
    arrays.clear()
    assert [reference() for reference in references] == [None] * 7


def test_plans_stay_bounded(rng, monkeypatch):
    monkeypatch.setattr("nbnorm.calls.plans.MOST", 3)
    for cols in range(1, 9):
        x = rng.standard_normal((6, cols), np.float32)
        for _ in range(2):
            nbnorm.layer_norm(x, cols)
            nbnorm.layer_norm_backward(x, x, cols)
        assert 1 <= len(plans.LAYER_NORM) <= 3
        assert 1 <= len(plans.LAYER_NORM_BACKWARD) <= 3


@pytest.mark.parametrize("batches", [[(1,), (6,), (40,), (0,), (6,)], [(2, 3), (5, 1), (1, 8), (0, 4), (3, 2)]], ids=str)
def test_a_plan_is_of_any_number_of_rows(rng, batches):
    weight, bias = rng.standard_normal((2, COLS), np.float32)
    for batch in batches:
        x, dy = rng.standard_normal((2, *batch, COLS), np.float32)
        result = nbnorm.layer_norm(x, COLS, weight, bias, return_stats=True)
        grads = nbnorm.layer_norm_backward(dy, x, COLS, weight)
        given = nbnorm.layer_norm_backward(dy, x, COLS, weight, mean=result.mean, rstd=result.rstd)
        assert [array.shape for array in result] == [x.shape, (*batch, 1), (*batch, 1)]
        assert [array.shape for array in (*grads, *given)] == [x.shape, (COLS,), (COLS,)] * 2
        if 0 not in batch:
            assert_y(result.y, x, 1, weight, bias)
            assert_grads(grads, dy, x, 1, weight)
            assert_grads(given, dy, x, 1, weight, mean=result.mean, rstd=result.rstd)
    # flags say of an array of one row, or of none, that it lies both ways
    assert distinct()[0] <= 2


@pytest.mark.parametrize("other", ["dy", "out", "mean", "dx"])
def test_other_numbers_of_rows_are_refused(rng, other):
    """Where a plan is kept for calls in which they are the same."""
    x = rng.standard_normal((6, COLS), np.float32)
    calls = {
        "dy": lambda array, statistics: nbnorm.layer_norm_backward(array, x, COLS),
        "out": lambda array, statistics: nbnorm.layer_norm(x, COLS, out=array),
        "mean": lambda array, statistics: nbnorm.layer_norm_backward(x, x, COLS, mean=statistics, rstd=statistics),
        "dx": lambda array, statistics: nbnorm.layer_norm_backward(x, x, COLS, out=(array, None, None)),
    }
    for rows in (6, 6):
        calls[other](np.ones((rows, COLS), np.float32), np.ones((rows, 1), np.float32))
    for rows in (5, 7):
        with pytest.raises(ValueError, match=rf"shape \({rows}, "):
            calls[other](np.ones((rows, COLS), np.float32), np.ones((rows, 1), np.float32))


def test_a_plan_is_of_one_function(operands):
    x, dy, weight, bias = operands
    nbnorm.layer_norm(x, COLS, weight, bias)
    assert distinct() == (1, 1)
    plans.LAYER_NORM.clear()
    plans.LAYER_NORM_BACKWARD.clear()
    nbnorm.layer_norm_backward(dy, x, COLS, weight)
    assert distinct() == (0, 1)


def test_a_call_that_failed_leaves_no_plan(operands):
    x, dy, weight, _ = operands
    plans.LAYER_NORM.clear()
    plans.LAYER_NORM_BACKWARD.clear()
    with pytest.raises(ValueError, match=r"^eps: "):
        nbnorm.layer_norm(x, COLS, weight, eps=-1.0)
    with pytest.raises(ValueError, match=r"^eps: "):
        nbnorm.layer_norm_backward(dy, x, COLS, weight, eps=float("nan"))
    assert not plans.LAYER_NORM
    assert not plans.LAYER_NORM_BACKWARD


@pytest.mark.parametrize("workers", [parallel.OURS, *deep(parallel.NUMBAS)])
def test_who_works_is_asked_each_time(rng, monkeypatch, choose_workers, workers):
    x, dy = rng.standard_normal((2, 40, COLS), np.float32)
    choose_workers(parallel.ONE)
    first = nbnorm.layer_norm(x, COLS, return_stats=True), nbnorm.layer_norm_backward(dy, x, COLS)
    kept = dict(plans.LAYER_NORM), dict(plans.LAYER_NORM_BACKWARD)
    choose_workers(workers)
    # which empties them
    plans.LAYER_NORM.update(kept[0])
    plans.LAYER_NORM_BACKWARD.update(kept[1])
    asked = []
    kernel_for = blocks.kernel_for
    monkeypatch.setattr(blocks, "kernel_for", lambda who, *rest: asked.append(who) or kernel_for(who, *rest))
    for _ in range(2):
        assert_same(planned(nbnorm.layer_norm, x, COLS, return_stats=True), first[0])
        assert_same(planned(nbnorm.layer_norm_backward, dy, x, COLS), first[1])
    assert asked == [workers] * 2


def test_threads_share_plans(rng, monkeypatch):
    """Many, of few kinds, while plans are dropped all the time."""
    monkeypatch.setattr("nbnorm.calls.plans.MOST", 2)
    cases = [rng.standard_normal((2, rows, COLS), np.float32) for rows in (1, 3, 5, 6)]
    expected = [
        (*nbnorm.layer_norm(x, COLS, return_stats=True), *nbnorm.layer_norm_backward(dy, x, COLS)) for x, dy in cases
    ]

    def work(first):
        for k in range(first, first + 60):
            x, dy = cases[k % len(cases)]
            y, mean, rstd = nbnorm.layer_norm(x, COLS, return_stats=True)
            grads = nbnorm.layer_norm_backward(dy, x, COLS)
            assert_same((y, mean, rstd, *grads), expected[k % len(cases)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


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
    np.testing.assert_array_equal(ln.forward(x), expected)


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


def test_outs_that_are_wrong(operands):
    x, dy, weight, bias = operands
    out = np.empty_like(x)
    nbnorm.layer_norm(x, COLS, weight, bias, out=out)
    for wrong in (out[1:], out[None], out.astype(np.float16), out.tolist()):
        with pytest.raises((TypeError, ValueError), match=r"^out: "):
            nbnorm.layer_norm(x, COLS, weight, bias, out=wrong)
    dx, dweight, dbias = np.empty_like(x), np.empty_like(weight), np.empty_like(weight)
    nbnorm.layer_norm_backward(dy, x, COLS, weight, out=(dx, dweight, dbias))
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
        ((dx, dweight, dbias, None), "4 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            nbnorm.layer_norm_backward(dy, x, COLS, weight, out=out)
    nbnorm.layer_norm_backward(dy, x, COLS, weight, output_mask=(True, False, True))
    with pytest.raises(ValueError, match="output_mask"):
        nbnorm.layer_norm_backward(dy, x, COLS, weight, output_mask=(True, False, True), out=(dx, dweight, dbias))


def test_gradients_that_overlap_operands(operands, checked):
    x, dy, weight, _ = operands
    memory = np.zeros(x.size + COLS, x.dtype)
    shifted, overlapping = memory[COLS:].reshape(x.shape), memory[:-COLS].reshape(x.shape)
    elsewhere = np.zeros(x.size + COLS, x.dtype)[:-COLS].reshape(x.shape)
    expected = nbnorm.layer_norm_backward(dy, x, [COLS], weight)
    for name, source in (("dy", dy), ("x", x)):
        for dx in (elsewhere, overlapping):
            shifted[...] = source
            checked.clear()
            arrays = {"dy": dy, "x": x} | {name: shifted}
            out = (dx, np.empty_like(weight), np.empty_like(weight))
            assert_same(nbnorm.layer_norm_backward(**arrays, normalized_shape=COLS, weight=weight, out=out), expected)
            # all four, but for what overlaps, are alike
            assert len(checked) == (dx is overlapping or name == "dy")
    dx = np.empty_like(x)
    for place in (np.empty_like(x), dx):
        within = place[1]
        within[...] = weight
        checked.clear()
        out = (dx, np.empty_like(weight), np.empty_like(weight))
        assert_same(nbnorm.layer_norm_backward(dy, x, COLS, within, out=out), expected)
        assert len(checked) == 1


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

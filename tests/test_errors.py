"""Does every wrong call raise the right error, with a message that names the argument, before anything is written?"""

from decimal import Decimal
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import nbnorm

X = np.arange(12, dtype=np.float32).reshape(3, 4)
F32 = np.dtype(np.float32)


def read_only(a):
    a.flags.writeable = False
    return a


FORWARD = [
    # TypeError: a wrong kind of object, dtype or device
    ({"x": None}, TypeError, "x: dtype object; supported are float16, bfloat16, float32, float64"),
    ({"x": "text"}, TypeError, "x: dtype <U4; supported"),
    ({"x": ...}, TypeError, "x: dtype object; supported"),
    ({"x": X.astype(complex)}, TypeError, "x: dtype complex128; supported"),
    ({"x": np.ndarray}, TypeError, "x: dtype object; supported"),
    ({"x": [[np.longdouble(1)] * 4]}, TypeError, f"x: dtype {np.dtype(np.longdouble)}; supported"),
    ({"x": X.view(np.dtype((np.float32, {"a": ("i2", 0), "b": ("i2", 2)})))}, TypeError, "x: dtype .*; supported"),
    ({"x": X.astype(np.longdouble)}, TypeError, f"x: dtype {np.dtype(np.longdouble)}; supported"),
    ({"x": X.astype(object)}, TypeError, "x: dtype object; supported"),
    ({"x": X.astype("M8[s]")}, TypeError, "x: dtype datetime64"),
    ({"x": X.astype(ml_dtypes.float8_e4m3fn)}, TypeError, "x: dtype float8_e4m3fn; supported"),
    ({"x": np.zeros((3, 4), [("a", "f4")])}, TypeError, "x: dtype .*; supported"),
    ({"x": np.ma.masked_array(X, X > 3)}, TypeError, "x: a masked array; expected"),
    ({"x": [[1, 2, 3, 4j]]}, TypeError, "x: dtype complex128; supported"),
    ({"weight": np.ones(4, complex)}, TypeError, "weight: dtype complex128; supported"),
    ({"bias": "text"}, TypeError, "bias: dtype <U4; supported"),
    ({"normalized_shape": 4.0}, TypeError, r"normalized_shape: 4.0; expected an int or a sequence of ints"),
    ({"normalized_shape": "4"}, TypeError, "normalized_shape: '4'; expected an int"),
    ({"normalized_shape": b"\x04"}, TypeError, r"normalized_shape: b'\\x04'; expected an int"),
    ({"normalized_shape": None}, TypeError, "normalized_shape: None; expected an int"),
    ({"normalized_shape": [4.0]}, TypeError, r"normalized_shape: \[4.0\]; expected an int"),
    ({"normalized_shape": {4}}, TypeError, r"normalized_shape: \{4\}; expected an int"),
    ({"normalized_shape": True}, TypeError, "normalized_shape: True; expected an int"),
    ({"eps": "1e-5"}, TypeError, "eps: '1e-5' of type str; expected a real number"),
    ({"eps": 1j}, TypeError, "eps: 1j of type complex; expected a real number"),
    ({"eps": None}, TypeError, "eps: None of type NoneType; expected a real number"),
    ({"eps": True}, TypeError, "eps: True of type bool; expected a real number"),
    ({"use_diff_of_squares": 1}, TypeError, "use_diff_of_squares: 1 of type int; expected a bool"),
    ({"return_stats": "yes"}, TypeError, "return_stats: 'yes' of type str; expected a bool"),
    ({"out": [[0.0] * 4] * 3}, TypeError, "out: list; expected an array"),
    ({"out": np.ma.zeros((3, 4), "f4")}, TypeError, "out: a masked array; expected"),
    # ValueError: a wrong shape, eps, or layout
    ({"x": [[1, 2], [3]]}, ValueError, "x: list has no view as a NumPy array"),
    ({"x": X[0, 0]}, ValueError, r"x: shape \(\); expected one that ends in normalized_shape, \(4,\)"),
    ({"x": np.broadcast_to(np.int8(1), (1 << 60, 4))}, ValueError, r"x: shape .*; expected one that a result of float64"),
    ({"x": 3.0}, ValueError, r"x: shape \(\); expected one that ends"),
    ({"normalized_shape": ()}, ValueError, r"normalized_shape: \(\); expected at least one dimension, none negative"),
    ({"normalized_shape": -4}, ValueError, "normalized_shape: -4; expected at least one dimension, none negative"),
    ({"normalized_shape": 5}, ValueError, r"x: shape \(3, 4\); expected one that ends in normalized_shape, \(5,\)"),
    ({"normalized_shape": 10**40}, ValueError, "normalized_shape: 1000.*; expected one that an array can have"),
    ({"normalized_shape": (2**32, 2**32)}, ValueError, r"normalized_shape: \(.*\); expected one that an array can have"),
    ({"normalized_shape": [1] * 65}, ValueError, r"normalized_shape: \[.*\]; expected one that an array can have"),
    ({"normalized_shape": (2, 3, 4)}, ValueError, r"x: shape \(3, 4\); expected one that ends"),
    ({"normalized_shape": 0}, ValueError, r"x: shape \(3, 4\); expected one that ends in normalized_shape, \(0,\)"),
    ({"weight": np.ones(3)}, ValueError, r"weight: shape \(3,\); expected \(4,\), normalized_shape"),
    ({"weight": np.ones((1, 4))}, ValueError, r"weight: shape \(1, 4\); expected \(4,\)"),
    ({"weight": 2.0}, ValueError, r"weight: shape \(\); expected \(4,\)"),
    ({"bias": np.ones(5)}, ValueError, r"bias: shape \(5,\); expected \(4,\), normalized_shape"),
    ({"eps": -1e-9}, ValueError, "eps: -1e-09; expected a finite number that is not negative"),
    ({"eps": float("nan")}, ValueError, "eps: nan; expected a finite number"),
    ({"eps": float("inf")}, ValueError, "eps: inf; expected a finite number"),
    ({"eps": np.float32("inf")}, ValueError, "eps: np.float32\\(inf\\); expected a finite number"),
    ({"eps": Fraction(-1, 10**400)}, ValueError, "eps: Fraction.*; expected a finite number that is not negative"),
    ({"eps": 10**400}, ValueError, "eps: 1000.*; expected a finite number"),
    ({"out": np.zeros((4, 3), "f4")}, ValueError, r"out: shape \(4, 3\); expected \(3, 4\), the shape of the result"),
    ({"out": np.zeros((3, 4))}, ValueError, "out: dtype float64; expected float32, the dtype of the result"),
    ({"out": np.zeros((3, 4), "i4")}, ValueError, "out: dtype int32; expected float32"),
    ({"out": read_only(np.zeros((3, 4), "f4"))}, ValueError, "out: a read-only array; expected a writable one"),
    (
        {"out": np.lib.stride_tricks.as_strided(np.zeros(4, "f4"), (3, 4), (0, 4))},
        ValueError,
        r"out: strides \(0, 4\); expected an array whose elements each have memory of their own",
    ),
    (
        {"out": np.lib.stride_tricks.as_strided(np.zeros(20, "f4"), (3, 4), (8, 4))},
        ValueError,
        r"out: strides \(8, 4\); expected an array whose elements each have memory of their own",
    ),
    ({"stream": 0}, ValueError, "stream: 0; expected None, since CPU arrays have no streams"),
]

BACKWARD = [
    *(case for case in FORWARD if not {"bias", "return_stats", "out"} & set(case[0])),
    ({"dy": None}, TypeError, "dy: dtype object; supported"),
    ({"dy": X.astype(complex)}, TypeError, "dy: dtype complex128; supported"),
    ({"dy": X[:2]}, ValueError, r"dy: shape \(2, 4\); expected \(3, 4\), the shape of x"),
    ({"mean": np.zeros((3, 1))}, ValueError, "rstd: None, but mean is given; expected both, or neither"),
    ({"rstd": np.zeros((3, 1))}, ValueError, "mean: None, but rstd is given; expected both, or neither"),
    ({"mean": np.zeros(3), "rstd": np.zeros((3, 1))}, ValueError, r"mean: shape \(3,\); expected \(3, 1\), x's, with 1"),
    ({"mean": np.zeros((3, 1)), "rstd": np.zeros((1, 3))}, ValueError, r"rstd: shape \(1, 3\); expected \(3, 1\)"),
    ({"mean": np.zeros((3, 1), complex), "rstd": np.zeros((3, 1))}, TypeError, "mean: dtype complex128"),
    ({"output_mask": True}, TypeError, "output_mask: True; expected three bools"),
    ({"output_mask": np.array(True)}, TypeError, r"output_mask: array\(True\); expected three bools"),
    ({"output_mask": "yes"}, TypeError, "output_mask: 'yes'; expected three bools"),
    ({"output_mask": (1, 0, 1)}, TypeError, r"output_mask\[0\]: 1 of type int; expected a bool"),
    ({"output_mask": [True, [False], True]}, TypeError, r"output_mask\[1\]: \[False\] of type list; expected a bool"),
    ({"output_mask": (True, True)}, ValueError, r"output_mask: \(True, True\); expected three bools"),
    ({"out": np.zeros((3, 4), "f4")}, TypeError, "out: numpy.ndarray; expected a tuple of arrays or None"),
    ({"out": (None, None)}, ValueError, "out: 2 entries; expected three"),
    ({"out": (np.zeros((3, 4)), None, None)}, ValueError, r"out\[0\]: dtype float64; expected float32"),
    ({"out": (None, np.zeros(3, "f4"), None)}, ValueError, r"out\[1\]: shape \(3,\); expected \(4,\)"),
    ({"out": (None, None, read_only(np.zeros(4, "f4")))}, ValueError, r"out\[2\]: a read-only array"),
    ({"out": (None, [0.0] * 4, None)}, TypeError, r"out\[1\]: list; expected an array"),
    (
        {"out": (None, np.zeros(4, "f4"), None), "output_mask": (True, False, True)},
        ValueError,
        r"out\[1\]: numpy.ndarray; expected None, since output_mask\[1\] is False",
    ),
]

LAYER = [
    ({"normalized_shape": ()}, ValueError, "normalized_shape: "),
    ({"normalized_shape": "4"}, TypeError, "normalized_shape: '4'"),
    ({"eps": -1}, ValueError, "eps: -1"),
    ({"elementwise_affine": None}, TypeError, "elementwise_affine: None of type NoneType; expected a bool"),
    ({"bias": np.zeros(4)}, TypeError, r"bias: numpy.ndarray of shape \(4,\) and dtype float64; expected a bool"),
    ({"device": "gpu"}, TypeError, "device: 'gpu'; expected 'cpu', 'cuda', 'cuda:1'"),
    ({"device": 0}, TypeError, "device: 0; expected 'cpu', 'cuda', 'cuda:1'"),
    ({"dtype": "int32"}, TypeError, "dtype: 'int32'; expected one of float16, bfloat16, float32, float64"),
    ({"dtype": complex}, TypeError, "dtype: <class 'complex'>; expected one of"),
    ({"dtype": "2(f4"}, TypeError, r"dtype: '2\(f4'; expected one of"),
    ({"dtype": "float99"}, TypeError, "dtype: 'float99'; expected one of"),
    ({"dtype": 4}, TypeError, "dtype: 4; expected one of"),
    ({"use_diff_of_squares": None}, TypeError, "use_diff_of_squares: None"),
]


def ids(case):
    return str(case)[:60] if isinstance(case, dict) else ""


@pytest.mark.parametrize(("arguments", "error", "message"), FORWARD, ids=ids)
def test_forward(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        nbnorm.layer_norm(**{"x": X, "normalized_shape": 4} | arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), BACKWARD, ids=ids)
def test_backward(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        nbnorm.layer_norm_backward(**{"dy": X, "x": X, "normalized_shape": 4} | arguments)


@pytest.mark.parametrize(("arguments", "error", "message"), LAYER, ids=ids)
def test_layer(arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        nbnorm.LayerNorm(**{"normalized_shape": 4} | arguments)


@pytest.mark.parametrize("argument", ["normalized_shape", "eps", "use_diff_of_squares", "output_mask"])
def test_a_number_that_python_does_not_show(argument):
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: a number too long to show"):
        nbnorm.layer_norm_backward(**{"dy": X, "x": X, "normalized_shape": 4} | {argument: 10**5000})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"normalized_shape": np.ones((4, 5))},
            r"normalized_shape: numpy.ndarray of shape \(4, 5\) and dtype float64; expected",
        ),
        ({"normalized_shape": [np.ones(9999)]}, r"normalized_shape: \[numpy.ndarray of shape \(9999,\) and dtype float64\]"),
        ({"normalized_shape": [0.5] * 9999}, r"normalized_shape: \[0.5, .*, \.\.\.\]; expected"),
        ({"normalized_shape": "4" * 9999}, r"normalized_shape: '4+\.\.\.4+'; expected"),
        ({"normalized_shape": [1] * 9999}, r"normalized_shape: \[1, .*, \.\.\.\]; expected one that an array can have"),
        ({"eps": np.ones((4, 5))}, r"eps: numpy.ndarray of shape \(4, 5\) and dtype float64; expected a real number"),
        ({"eps": [1e-5] * 9999}, r"eps: \[1e-05, .*\] of type list; expected a real number"),
        ({"eps": -(10**4000)}, r"eps: -1000.*; expected a finite number that is not negative"),
        ({"use_diff_of_squares": np.ones(9999)}, r"use_diff_of_squares: numpy.ndarray of shape \(9999,\)"),
        (
            {"output_mask": np.ones((3, 999), bool)},
            r"output_mask\[0\]: numpy.ndarray of shape \(999,\) and dtype bool; expected",
        ),
        ({"output_mask": np.ones(9999)}, r"output_mask: numpy.ndarray of shape \(9999,\) and dtype float64; expected"),
        ({"stream": np.ones(9999)}, r"stream: numpy.ndarray of shape \(9999,\) and dtype float64; expected None"),
        ({"stream": object()}, "stream: an object of type object; expected None"),
        ({"x": np.zeros(4, [(f"field {i}", "f4") for i in range(999)])}, r"x: dtype \[\('field 0'"),
    ],
)
def test_messages_stay_short(arguments, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}") as error:
        nbnorm.layer_norm_backward(**{"dy": X, "x": X, "normalized_shape": 4} | arguments)
    assert len(str(error.value)) < 400


def test_a_wrong_order_of_arguments_names_the_right_one():
    order = "the order of the arguments is x, normalized_shape, weight, bias"
    for call in (lambda: nbnorm.layer_norm(X, X[0], X[1], 4), lambda: nbnorm.layer_norm(4, X)):
        with pytest.raises(
            TypeError, match=rf"^normalized_shape: numpy.ndarray of shape \(.*\) and dtype float32; .*{order}"
        ):
            call()


EPS = [
    np.array(1e-3),
    np.float32(1e-3),
    np.array(1e-3, ">f4"),
    ml_dtypes.bfloat16(1e-3),
    Decimal("1e-3"),
    Fraction(1, 1000),
    1,
]


@pytest.mark.parametrize("eps", EPS, ids=lambda eps: type(eps).__name__)
def test_eps_is_what_float_takes_of_numbers(eps):
    ln = nbnorm.LayerNorm(4, eps=eps)
    assert type(ln.eps) is float
    assert ln.eps == float(eps)
    for _ in range(2):
        np.testing.assert_array_equal(nbnorm.layer_norm(X, 4, eps=eps), nbnorm.layer_norm(X, 4, eps=float(eps)))
        dx = nbnorm.layer_norm_backward(X, X, 4, eps=eps).dx
        np.testing.assert_array_equal(dx, nbnorm.layer_norm_backward(X, X, 4, eps=float(eps)).dx)


def test_an_array_of_a_wrong_eps():
    for eps in (
        np.array(-1.0),
        np.array(np.nan),
        np.array(np.inf),
        np.array(-1),
        Decimal("NaN"),
        Decimal(-1),
        Decimal("-1e-999"),
    ):
        with pytest.raises(ValueError, match="^eps: .*; expected a finite number that is not negative"):
            nbnorm.layer_norm(X, 4, eps=eps)
    wrong = [
        np.array(True),
        np.array("1e-5"),
        np.array(1e-5, object),
        np.array(1j),
        np.array(1, "m8[s]"),
        np.array(1, "M8[s]"),
    ]
    wrong += [
        np.ma.masked,
        np.ma.masked_array(1e-5),
        np.timedelta64(1, "s"),
        np.complex64(1),
        np.str_("1"),
        bytearray(b"1"),
        np.bool_(0),
    ]
    for eps in (*wrong, Decimal("sNaN"), np.array([1e-5])):
        with pytest.raises(TypeError, match="^eps: .*; expected a real number"):
            nbnorm.layer_norm(X, 4, eps=eps)
        with pytest.raises(TypeError, match="^eps: .*; expected a real number"):
            nbnorm.LayerNorm(4, eps=eps)


def test_outs_that_overlap_each_other():
    shared = np.zeros(6, np.float32)
    with pytest.raises(ValueError, match=r"^out\[2\]: shares memory with out\[1\]"):
        nbnorm.layer_norm_backward(X, X, 4, out=(None, shared[:4], shared[2:]))
    dx = np.zeros((4, 4), np.float32)
    for outs in ((dx[:3], dx[1], None), (dx[:3], None, dx[2])):
        which = 1 if outs[1] is not None else 2
        with pytest.raises(ValueError, match=rf"^out\[{which}\]: shares memory with out\[0\]"):
            nbnorm.layer_norm_backward(X, X, 4, out=outs)
    # the same stretch of memory, but no element in common
    interleaved = np.zeros(8, np.float32)
    nbnorm.layer_norm_backward(X, X, 4, out=(None, interleaved[::2], interleaved[1::2]))
    np.testing.assert_array_equal(interleaved[1::2], X.sum(0))


def test_overlap_of_outs_that_is_too_hard_to_decide_is_refused():
    # every stride steps over what the smaller ones span, but by little: the exact question is exponential
    a, b = (
        [1488816, 744409, 372204, 186102, 93051, 46525, 23263, 11632, 5816, 2908, 1454, 726, 364, 181, 91, 46, 22, 12, 6, 3],
        [1426414, 713207, 356604, 178301, 89151, 44576, 22287, 11144, 5572, 2786, 1393, 696, 348, 174, 88, 44, 21, 11, 6, 3],
    )
    shape = (2,) * 20
    memory = np.zeros(3 << 20, np.float32)
    dweight = np.lib.stride_tricks.as_strided(memory, shape, [4 * stride for stride in a])
    dbias = np.lib.stride_tricks.as_strided(memory[1:], shape, [4 * stride for stride in b])
    x = np.zeros((0, *shape), np.float32)
    with pytest.raises(ValueError, match=r"^out\[2\]: shares memory with out\[1\]"):
        nbnorm.layer_norm_backward(x, x, shape, out=(None, dweight, dbias))


def test_nothing_is_written_when_a_check_fails():
    out = np.full((3, 4), 7, np.float32)
    with pytest.raises(ValueError, match="eps"):
        nbnorm.layer_norm(X, 4, eps=-1, out=out)
    with pytest.raises(ValueError, match=r"out\[1\]"):
        nbnorm.layer_norm_backward(X, X, 4, out=(out, np.zeros(3), None))
    np.testing.assert_array_equal(out, np.full((3, 4), 7))


def test_an_array_on_another_device():
    class OnAnotherDevice:
        __cuda_array_interface__ = {}  # noqa: RUF012  a stand-in for a CUDA array

    for argument in ("weight", "bias", "out"):
        with pytest.raises(
            TypeError, match=f"^{argument}: .*OnAnotherDevice on a CUDA device; expected an array in CPU memory"
        ):
            nbnorm.layer_norm(**{"x": X, "normalized_shape": 4} | {argument: OnAnotherDevice()})
    with pytest.raises(TypeError, match="^x: an array on a CUDA device; (nbnorm needs|Numba finds no device)"):
        nbnorm.layer_norm(OnAnotherDevice(), 4)


def test_dlpack_arrays_of_another_device_or_without_a_way_back():
    class Dlpack:
        def __init__(self, device):
            self.device = device

        def __dlpack__(self, **_):
            return X.__dlpack__()

        def __dlpack_device__(self):
            return self.device

    with pytest.raises(TypeError, match="^x: .*Dlpack on DLPack device 8:1; expected an array in CPU memory"):
        nbnorm.layer_norm(Dlpack((8, 1)), 4)
    with pytest.raises(TypeError, match="^x: .*Dlpack, whose library has no from_dlpack"):
        nbnorm.layer_norm(Dlpack((1, 0)), 4)
    # nothing is given back for a gradient that comes in
    np.testing.assert_array_equal(nbnorm.layer_norm_backward(Dlpack((1, 0)), X, 4).dbias, X.sum(0))


def test_errors_of_an_array_like_name_the_argument():
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("no data")

    with pytest.raises(TypeError, match="^weight: .*Broken has no view as a NumPy array: no data"):
        nbnorm.layer_norm(X, 4, Broken())


def raises(error):
    class Broken:
        def __iter__(self):
            raise error

        def __array__(self, dtype=None, copy=None):
            raise error

        def __getattr__(self, name):
            if name.startswith("__cuda") or name == "dtype":
                raise error
            raise AttributeError(name)

        def numpy(self):
            return X

    return Broken()


@pytest.mark.parametrize(
    "error", [IndexError("tuple index out of range"), KeyError(0), OSError("gone"), ValueError("closed")]
)
def test_whatever_a_conversion_raises_names_the_argument(error):
    for name in ("x", "dy", "weight"):
        with pytest.raises(
            TypeError, match=rf"^{name}: .*Broken has no view as a NumPy array: .*; pass {name}.numpy\(\)"
        ) as raised:
            nbnorm.layer_norm_backward(**{"dy": X, "x": X, "normalized_shape": 4} | {name: raises(error)})
        assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_no_fault_of_an_array_passes_through(error):
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise error

    with pytest.raises(error):
        nbnorm.layer_norm(X, 4, Broken())


def test_an_object_with_every_attribute_is_no_cuda_array():
    class Everything:
        def __getattr__(self, name):
            return Everything()

        def __call__(self, *_):
            return Everything()

    with pytest.raises(TypeError, match="^x: .*Everything has no view as a NumPy array"):
        nbnorm.layer_norm(Everything(), 4)
    with pytest.raises(TypeError, match="^normalized_shape: an object of type .*Everything; expected an int"):
        nbnorm.layer_norm(X, Everything())
    with pytest.raises(TypeError, match="^eps: an object of type .*Everything; expected a real number"):
        nbnorm.layer_norm(X, 4, eps=Everything())


def test_what_numpy_takes_for_objects_is_named():
    for value, name in (({1: 2.0}, "dict"), (iter([1.0]), "list_iterator")):
        with pytest.raises(
            TypeError, match=f"^x: dtype object; supported .*; NumPy makes no numbers of a {name}: pass its values"
        ):
            nbnorm.layer_norm(value, 4)


def test_masked_arrays_have_no_fill_value_that_is_right():
    with pytest.raises(TypeError, match=r"^x: a masked array; .*no fill value .* docs/howto/arrays.md"):
        nbnorm.layer_norm(np.ma.masked_array(X, X > 3), 4)
    with pytest.raises(TypeError, match=r"^x: a masked array; .*: pass x.data, since nothing is masked"):
        nbnorm.layer_norm(np.ma.masked_array(X), 4)


def test_nothing_is_shown_by_its_address():
    for value in (lambda: 1, object(), print, np.ndarray.sum):
        with pytest.raises(TypeError, match="^eps: ") as error:
            nbnorm.layer_norm(X, 4, eps=value)
        assert "0x" not in str(error.value)


def test_an_array_like_with_a_mask():
    class Variable:
        def __array__(self, dtype=None, copy=None):
            return np.ma.masked_array(X, X > 3)

    with pytest.raises(TypeError, match="^x: a masked array"):
        nbnorm.layer_norm(Variable(), 4)


def test_bfloat16_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match="^dtype: bfloat16 needs the package ml_dtypes: pip install ml_dtypes"):
        nbnorm.LayerNorm(4, dtype="bfloat16")


STATES = [
    (None, TypeError, "mapping: NoneType; expected a mapping of names to arrays"),
    ([("weight", X[0])], TypeError, "mapping: list; expected a mapping"),
    (dict, TypeError, "mapping: type; expected a mapping"),
    (
        {"weight": X[0]},
        ValueError,
        r"mapping: has \['weight'\]; expected \['bias', 'weight'\]: .* is LayerNorm\(..., bias=False\)",
    ),
    ({"weight": X[0], "bias": X[0], "scale": X[0]}, ValueError, r"mapping: has \['bias', 'scale', 'weight'\]; expected"),
    ({"weight": X[0], "bias": X[0], 3: X[0]}, ValueError, r"mapping: has \['3', 'bias', 'weight'\]; expected"),
    (
        {str(i): X[0] for i in range(2000)},
        ValueError,
        r"mapping: has \['0', .{,60}\] and 1992 more; expected \['bias', 'weight'\]$",
    ),
    ({"weight": X[0], "bias": X[0, :3]}, ValueError, r"bias: shape \(3,\); expected \(4,\), normalized_shape"),
    ({"weight": X[0], "bias": None}, TypeError, r"bias: None; .* is LayerNorm\(..., bias=False\)"),
    ({"weight": X[0], "bias": X[0] * 1j}, TypeError, "bias: dtype complex64"),
    ({"weight": X[0], "bias": X[0].astype(np.int8)}, TypeError, "bias: dtype int8; .*must be dequantised first"),
    ({"weight": X[0], "bias": X[0] > 1}, TypeError, "bias: dtype bool; .*must be dequantised first"),
    ({"weight": X[0], "bias": X[0].astype(np.uint16)}, TypeError, "bias: dtype uint16; .*must be dequantised first"),
    (
        {"weight": X[0], "bias": np.zeros(4, "V2")},
        TypeError,
        r"bias: dtype \|V2; .* bfloat16 .*bias.view\(ml_dtypes.bfloat16\)",
    ),
    ({"weight": X[0], "bias": X[0].astype(ml_dtypes.float8_e4m3fn)}, TypeError, "bias: dtype float8_e4m3fn"),
    (
        {"weight": X[0], "bias": [0, 0, -1e39, 0]},
        ValueError,
        r"bias: -1e\+39 at \(2,\); expected numbers within the range of float32, the layer's dtype",
    ),
]


@pytest.mark.parametrize(("state", "error", "message"), STATES)
def test_load_state_dict_changes_nothing_when_it_fails(state, error, message):
    ln = nbnorm.LayerNorm(4)
    with pytest.raises(error, match=f"^{message}"):
        ln.load_state_dict(state)
    np.testing.assert_array_equal(ln.weight, np.ones(4))
    np.testing.assert_array_equal(ln.bias, np.zeros(4))


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        ([0.0] * 4, TypeError, "the layer's bias: list; expected an array"),
        (read_only(np.zeros(4)), ValueError, "the layer's bias: a read-only array; expected a writable one"),
        (np.zeros(3), ValueError, r"the layer's bias: shape \(3,\); expected \(4,\)"),
    ],
)
def test_load_state_dict_into_parameters_that_cannot_be_written(bias, error, message):
    ln = nbnorm.LayerNorm(4)
    ln.bias = bias
    with pytest.raises(error, match=f"^{message}"):
        ln.load_state_dict({"weight": X[1], "bias": X[2]})
    np.testing.assert_array_equal(ln.weight, np.ones(4))

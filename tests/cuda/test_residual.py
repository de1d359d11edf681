"""Is a norm of x + residual the sum and then the norm, to the bit, on CUDA arrays, and dx with dtotal its sum?"""

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from device import LEVEL, normal, to_device, to_host
from nbnorm.cuda import plans, sizes
from tolerances import CUDA_GRADIENT_EPS, EPS

pytestmark = pytest.mark.hardware

# parts of a warp, the last one not full; several warps
SHAPES = [(70, 9), (1, 1100)]
# (x or total, residual or dtotal): of one type, and each of another size beside it
DTYPES = [
    (np.float32, np.float32),
    (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
    (np.float16, np.float16),
    (np.float64, np.float64),
    (ml_dtypes.bfloat16, np.float32),
    (np.float64, np.float16),
]
FORWARD = {"layer": (nbnorm.add_layer_norm, nbnorm.layer_norm), "rms": (nbnorm.add_rms_norm, nbnorm.rms_norm)}
BACKWARD = {
    "layer": (nbnorm.add_layer_norm_backward, nbnorm.layer_norm_backward),
    "rms": (nbnorm.add_rms_norm_backward, nbnorm.rms_norm_backward),
}


@pytest.fixture(params=["layer", "rms"])
def norm(request):
    return request.param


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    for known in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(plans, known, {})


def total_of(x, residual):
    """Their sum in the wider type, which has all digits of two of the same size, rounded to x's."""
    wide = np.float64 if np.float64 in (x.dtype, residual.dtype) else np.float32
    return (x.astype(wide) + residual.astype(wide)).astype(x.dtype)


def assert_same_bits(array, expected):
    array, expected = (a if isinstance(a, np.ndarray) else to_host(a) for a in (array, expected))
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array.view(np.uint8), expected.view(np.uint8))


def rows_of(rng, shape, dtype):
    """Of which the last one's squares overflow, or for float16 do not, and vanish when they are all of the sum."""
    x = normal(rng, shape, dtype)
    if dtype != np.float16:
        x[-1] *= dtype(1e200 if dtype == np.float64 else 1e30)
    return x


def assert_in_two_steps(norm, x, residual, weight, **options):
    """y, total and the statistics are those of the sum and then the norm; without the total, y is the same."""
    add, plain = FORWARD[norm]
    cols = x.shape[1]
    on_device = to_device(x), to_device(residual), cols, None if weight is None else to_device(weight)
    total = total_of(x, residual)
    expected = plain(to_device(total), cols, on_device[3], eps=1e-5, return_stats=True, **options)
    results = add(*on_device, eps=1e-5, return_stats=True, **options)
    assert results._fields == ("y", "total", *expected._fields[1:])
    assert_same_bits(results.total, total)
    for name in expected._fields:
        assert_same_bits(getattr(results, name), getattr(expected, name))
    y, total = add(*on_device, eps=1e-5, total_out=False, **options)
    assert total is None
    assert_same_bits(y, expected.y)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize(("dtype", "residual_dtype"), DTYPES)
def test_the_bits_of_two_steps(rng, norm, dtype, residual_dtype, rows, cols):
    x, residual = rows_of(rng, (rows, cols), dtype), normal(rng, (rows, cols), residual_dtype)
    weight = normal(rng, cols, np.float32) if rows > 1 else None
    assert_in_two_steps(norm, x, residual, weight)


def test_a_bias_too(rng):
    x, residual = normal(rng, (2, 3, 64), np.float32)
    weight, bias = normal(rng, (2, 64), np.float32)
    assert_in_two_steps("layer", x, residual, weight, bias=to_device(bias))


def test_rows_that_no_block_holds(rng, norm, short_segments):
    x, residual = rows_of(rng, (2, short_segments), np.float32), normal(rng, (2, short_segments), np.float32)
    assert_in_two_steps(norm, x, residual, normal(rng, short_segments, np.float32))


@pytest.mark.parametrize("with_total", [True, False])
def test_long_rows_in_place(rng, norm, short_segments, with_total):
    cols = short_segments
    x, residual = rows_of(rng, (1, cols), np.float32), normal(rng, (1, cols), np.float32)
    weight = to_device(normal(rng, cols, np.float32))
    add, _ = FORWARD[norm]
    y, total = map(to_host, add(to_device(x), to_device(residual), cols, weight, eps=1e-5))
    out, total_out = to_device(residual), to_device(x)
    add(total_out, out, cols, weight, eps=1e-5, out=out, total_out=total_out if with_total else False)
    assert_same_bits(out, y)
    assert_same_bits(total_out, total if with_total else x)


def assert_dx(dx, plain_dx, dtotal):
    """dx of the plain backward is itself rounded; the sum is rounded once where that is added before it is."""
    exact = plain_dx.astype(np.longdouble) + dtotal.astype(np.longdouble)
    largest = np.abs(plain_dx.astype(np.longdouble)) + np.abs(exact)
    error = np.abs(dx.astype(np.longdouble) - exact)
    assert (error <= EPS[dx.dtype.name] * largest).all()


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize(("dtype", "dtotal_dtype"), [DTYPES[0], *DTYPES[3:]])
def test_gradients(rng, norm, dtype, dtotal_dtype, rows, cols, monkeypatch):
    if LEVEL != "device":
        # blocks of several rows
        monkeypatch.setattr(sizes, "MULTIPROCESSORS", 1)
    assert_gradients(rng, norm, dtype, dtotal_dtype, (rows, cols))


def test_gradients_of_rows_that_no_block_holds(rng, norm, short_segments):
    assert_gradients(rng, norm, np.float32, np.float32, (2, short_segments))


def assert_gradients(rng, norm, dtype, dtotal_dtype, shape):
    _, cols = shape
    total, dy, dtotal = (normal(rng, shape, d) for d in (dtype, dtype, dtotal_dtype))
    weight = normal(rng, cols, np.float32)
    add, plain = BACKWARD[norm]
    operands = to_device(total), cols, to_device(weight), 1e-5
    expected = plain(to_device(dy), *operands)
    grads = add(to_device(dy), to_device(dtotal), *operands)
    assert_dx(to_host(grads.dx), to_host(expected.dx), dtotal)
    for grad, other in zip(grads[1:], expected[1:], strict=True):
        assert_same_bits(grad, other)


def test_no_dtotal_or_no_dx(rng, norm):
    """From nowhere else; and where there is nothing that it would be added to. The second time, by a plan."""
    total, dy, dtotal = normal(rng, (3, 5, 24), np.float32)
    add, plain = BACKWARD[norm]
    operands = to_device(total), 24, None, 1e-5
    expected = plain(to_device(dy), *operands)
    mask = (False, *(True for _ in expected[1:]))
    for _ in range(2):
        for grad, other in zip(add(to_device(dy), None, *operands), expected, strict=True):
            assert_same_bits(grad, other)
        grads = add(to_device(dy), to_device(dtotal), *operands, output_mask=mask)
        assert grads.dx is None
        for grad, other in zip(grads[1:], expected[1:], strict=True):
            assert_same_bits(grad, other)


def test_dx_is_rounded_once(rng):
    """In float32 all along, against a sum of two numbers that were rounded to bfloat16."""
    total, dy, dtotal = normal(rng, (3, 8, 64), ml_dtypes.bfloat16)
    wide = nbnorm.layer_norm_backward(*(to_device(a.astype(np.float32)) for a in (dy, total)), 64)
    grads = nbnorm.add_layer_norm_backward(*map(to_device, (dy, dtotal, total)), 64)
    exact = to_host(wide.dx) + dtotal.astype(np.float32)
    error = np.abs(to_host(grads.dx).astype(np.float32) - exact)
    largest = np.abs(to_host(wide.dx)).max()
    assert (error <= EPS["bfloat16"] / 2 * np.abs(exact) + CUDA_GRADIENT_EPS * EPS["float32"] * largest).all()


@pytest.mark.parametrize("cols", [64, 1100])
@pytest.mark.parametrize("places", [("x", "residual"), ("residual", "x"), ("x", None), ("residual", False)], ids=str)
def test_in_place(rng, norm, checked, places, cols):
    """y and the total over x and the residual, of rows that are read again too; the second time, by a plan."""
    # of 64 elements, four share a warp
    x, residual = rows_of(rng, (3, cols), np.float32), normal(rng, (3, cols), np.float32)
    weight = normal(rng, cols, np.float32)
    add, _ = FORWARD[norm]
    y, total = map(to_host, add(*map(to_device, (x, residual)), cols, to_device(weight), eps=1e-5))
    plans.FORWARD.clear()
    checked.clear()
    for _ in range(2):
        arrays = {"x": to_device(x), "residual": to_device(residual)}
        out, total_out = (arrays.get(place, place) for place in places)
        operands = arrays["x"], arrays["residual"], cols, to_device(weight)
        results = add(*operands, eps=1e-5, out=out, total_out=total_out)
        assert results.y is out
        assert total_out is None or results.total is (total_out or None)
        assert_same_bits(out, y)
        if results.total is not None:
            assert_same_bits(results.total, total)
    assert len(checked) == 1


@pytest.mark.parametrize("place", ["dy", "dtotal", "total"])
def test_gradients_in_place(rng, norm, checked, place):
    arrays = dict(zip(("dy", "dtotal", "total"), normal(rng, (3, 7, 64), np.float32), strict=True))
    weight = normal(rng, 64, np.float32)
    add, _ = BACKWARD[norm]
    expected = [to_host(grad) for grad in add(*map(to_device, arrays.values()), 64, to_device(weight), 1e-5)]
    checked.clear()
    for _ in range(2):
        on_device = {name: to_device(array) for name, array in arrays.items()}
        out = on_device[place], *(None for _ in expected[1:])
        grads = add(*on_device.values(), 64, to_device(weight), 1e-5, out=out)
        assert grads.dx is out[0]
        for grad, wanted in zip(grads, expected, strict=True):
            assert_same_bits(grad, wanted)
    assert len(checked) == 1


def test_results_that_overlap_inputs(rng, norm, checked):
    """With memory shared in other ways than in place, after like calls that share none."""
    add, _ = FORWARD[norm]
    rows, cols = 5, 24
    size = rows * cols
    host = normal(rng, 10 * size, np.float32)

    def call(places):
        memory = to_device(host)
        x, residual, out, total_out = (memory[at : at + size].reshape(rows, cols) for at in places[:4])
        weight = memory[places[4] : places[4] + cols]
        y, total = add(x, residual, cols, weight, eps=1e-5, out=out, total_out=total_out)
        return to_host(y), to_host(total)

    apart = (0, 2 * size, 4 * size, 6 * size, 8 * size)
    expected = call(apart)
    # y or the total a row further on than x or the residual; and over weight
    for which, at in ((2, cols), (3, cols), (2, 2 * size + cols), (3, 2 * size + cols), (2, 8 * size), (3, 8 * size)):
        plans.FORWARD.clear()
        call(apart)
        checked.clear()
        places = [*apart]
        places[which] = at
        for result, wanted in zip(call(places), expected, strict=True):
            assert_same_bits(result, wanted)
        assert len(checked) == 1
    # each other
    with pytest.raises(ValueError, match="total_out: shares memory with out"):
        call((0, 2 * size, 4 * size, 4 * size + cols, 8 * size))


def test_other_layouts(rng, norm):
    """Rows apart, one that stands for all, integers, and elements that are no neighbours."""
    x = normal(rng, (4, 24), np.float32)
    add, plain = FORWARD[norm]
    wide = normal(rng, (4, 48), np.float32)
    integers = rng.integers(-3, 3, (4, 24)).astype(np.int16)
    for residual in (to_device(wide)[:, :24], to_device(wide)[:, 1::2], to_device(np.ascontiguousarray(wide.T))[:24].T):
        y, total = add(to_device(x), residual, 24, eps=1e-5)
        expected = total_of(x, to_host(residual))
        assert_same_bits(total, expected)
        assert_same_bits(y, plain(to_device(expected), 24, eps=1e-5))
    y, total = add(to_device(x.astype(np.float64)), to_device(integers), 24, eps=1e-5)
    assert_same_bits(total, x.astype(np.float64) + integers)
    out, total_out = to_device(wide)[:, ::2], to_device(wide)[:, 24:]
    add(to_device(x), to_device(x), 24, eps=1e-5, out=out, total_out=total_out)
    assert_same_bits(total_out, x + x)
    assert_same_bits(out, plain(to_device(x + x), 24, eps=1e-5))


def test_a_known_call(rng, norm, checked):
    """With other values in other memory; with and without the total, and the statistics."""
    add, _ = FORWARD[norm]
    weight = normal(rng, 24, np.float32)
    for options in ({}, {"total_out": False}, {"return_stats": True}, {"eps": None} if norm == "rms" else {"eps": 0.1}):
        results = []
        for _ in range(2):
            x, residual = normal(rng, (2, 5, 24), np.float32)
            checked.clear()
            kept = len(plans.FORWARD)
            results = add(to_device(x), to_device(residual), 24, to_device(weight), **options)
        assert not checked
        assert kept == len(plans.FORWARD)
        plans.FORWARD.clear()
        again = add(to_device(x), to_device(residual), 24, to_device(weight), **options)
        assert len(checked) == 1
        for result, wanted in zip(results, again, strict=True):
            assert (result is None) == (wanted is None)
            if result is not None:
                assert_same_bits(result, wanted)


def test_the_functions_do_not_share_plans(rng, checked):
    """Calls that have the same arrays and options but for what is asked."""
    x, other = (to_device(normal(rng, (5, 24), np.float32)) for _ in range(2))
    calls = [
        lambda: nbnorm.layer_norm(x, 24, eps=1e-5),
        lambda: nbnorm.rms_norm(x, 24, eps=1e-5),
        lambda: nbnorm.add_layer_norm(x, other, 24, eps=1e-5),
        lambda: nbnorm.add_rms_norm(x, other, 24, eps=1e-5),
        lambda: nbnorm.layer_norm_backward(other, x, 24, eps=1e-5),
        lambda: nbnorm.rms_norm_backward(other, x, 24, eps=1e-5),
        lambda: nbnorm.add_layer_norm_backward(other, other, x, 24, eps=1e-5),
        lambda: nbnorm.add_layer_norm_backward(other, None, x, 24, eps=1e-5),
        lambda: nbnorm.add_rms_norm_backward(other, other, x, 24, eps=1e-5),
    ]

    def results(call):
        found = call()
        return [to_host(array) for array in (found if isinstance(found, tuple) else (found,))]

    first = [results(call) for call in calls]
    assert len(checked) == len(calls)
    for call, expected in zip(calls, first, strict=True):
        for result, wanted in zip(results(call), expected, strict=True):
            assert_same_bits(result, wanted)
    assert len(checked) == len(calls)
    assert (len(plans.FORWARD), len(plans.BACKWARD)) == (4, 5)


def test_no_rows_and_no_columns(norm):
    add, _ = FORWARD[norm]
    for shape in ((0, 8), (3, 0)):
        x = to_device(np.empty(shape, np.float32))
        y, total, *statistics = add(x, x, shape[1], return_stats=True)
        assert y.shape == total.shape == shape
        assert {array.shape for array in statistics} == {(shape[0], 1)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"residual": (3, 5)}, ValueError, r"residual: shape \(3, 5\); expected \(3, 4\), the shape of x"),
        ({"total_out": (3, 5)}, ValueError, "total_out: shape"),
        ({"total_out": True}, TypeError, "total_out: "),
        ({"residual": np.ones((3, 4), np.float32)}, TypeError, "residual: numpy.ndarray in CPU memory"),
        ({"total_out": np.ones((3, 4), np.float32)}, TypeError, "total_out: numpy.ndarray in CPU memory"),
    ],
)
def test_wrong_calls(norm, arguments, error, message):
    """Also after a right one, which has a plan."""
    add, _ = FORWARD[norm]
    x = to_device(np.ones((3, 4), np.float32))
    right = {"x": x, "residual": x, "normalized_shape": 4}
    add(**right)
    wrong = {name: to_device(np.ones(v, np.float32)) if isinstance(v, tuple) else v for name, v in arguments.items()}
    with pytest.raises(error, match=f"^{message}"):
        add(**right | wrong)


def test_a_wrong_dtotal(norm):
    add, _ = BACKWARD[norm]
    x = to_device(np.ones((3, 4), np.float32))
    add(x, x, x, 4)
    with pytest.raises(ValueError, match=r"^dtotal: shape \(4,\); expected \(3, 4\), the shape of total"):
        add(x, to_device(np.ones(4, np.float32)), x, 4)

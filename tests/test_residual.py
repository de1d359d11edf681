"""Is a norm of a sum the same as the sum and then the norm, bit for bit, whatever is written where?"""

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from levels import deep, deep_and_compiled
from nbnorm.cpu.operands import is_streamed
from nbnorm.cpu.workers.parallel import WORKERS
from tolerances import EPS

BFLOAT16 = ml_dtypes.bfloat16
NORMS = ["layer", "rms"]
# short rows, a vector and a rest, whole rows, long ones
ROWS = [(np.float32, 5), (np.float32, 37)]
ROWS += deep((np.float32, 300), (np.float64, 37), (np.float16, 37), (BFLOAT16, 37), (BFLOAT16, 300))
ROWS += deep_and_compiled((np.float32, 70_001), (np.float64, 70_001), (BFLOAT16, 70_001))
SHORT = [(np.float32, 37)]
SEVERAL = [(np.float32, 37), *deep((np.float32, 300), (BFLOAT16, 37)), *deep_and_compiled((np.float32, 70_001))]


class Case:
    """A residual block's arrays, and what its two steps give."""

    def __init__(self, rng, norm, dtype, cols, rows=None):
        self.cols, shape = cols, (rows or (3 if cols > 1000 else 41), cols)
        with np.errstate(under="ignore"):
            self.x, self.residual, self.dy, self.dtotal = rng.standard_normal((4, *shape)).astype(dtype)
            self.weight, bias = rng.standard_normal((2, cols)).astype(dtype)
        # a sum of equal numbers, and one beyond the range of squares
        self.x[0], self.residual[0] = 3.25, 1.5
        if np.dtype(dtype).itemsize > 2:
            self.x[1] *= dtype(1e30)
            self.residual[1] *= dtype(1e30)
        self.total = self.x + self.residual
        self.parameters = (self.weight, bias) if norm == "layer" else (self.weight,)
        self.add = nbnorm.add_layer_norm if norm == "layer" else nbnorm.add_rms_norm
        self.add_backward = nbnorm.add_layer_norm_backward if norm == "layer" else nbnorm.add_rms_norm_backward
        self.norm = nbnorm.layer_norm if norm == "layer" else nbnorm.rms_norm
        self.norm_backward = nbnorm.layer_norm_backward if norm == "layer" else nbnorm.rms_norm_backward
        self.y, *self.statistics = self.norm(self.total, cols, *self.parameters, return_stats=True)

    def __call__(self, x, residual, **options):
        return self.add(x, residual, self.cols, *self.parameters, **options)


@pytest.fixture
def case(rng, norm, rows):
    return Case(rng, norm, *rows)


def cases(rows):
    """Decorate a test of the fixture `case`, with rows of these dtypes and lengths."""

    def decorated(test):
        return pytest.mark.parametrize("norm", NORMS)(pytest.mark.parametrize("rows", rows, ids=str)(test))

    return decorated


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


def assert_sum(dx, addend, dtotal):
    """Within an eps of the sum, which is rounded once, of what itself was rounded."""
    wide = addend.astype(np.longdouble) + dtotal.astype(np.longdouble)
    with np.errstate(over="ignore"):
        allowed = EPS[dx.dtype.name] * (np.abs(addend.astype(np.longdouble)) + np.abs(wide))
    assert (np.abs(dx.astype(np.longdouble) - wide) <= allowed + np.finfo(np.float32).tiny).all()


@cases(ROWS)
def test_the_bits_of_two_steps(case):
    y, total, *statistics = case(case.x, case.residual, return_stats=True)
    assert_same((y, total, *statistics), (case.y, case.total, *case.statistics))
    assert_same(case(case.x, case.residual), (case.y, case.total))
    y, total = case(case.x, case.residual, total_out=False)
    assert_same((y,), (case.y,))
    assert total is None


@cases(ROWS)
def test_backward(case):
    cols = case.cols
    alone = case.norm_backward(case.dy, case.total, cols, case.weight)
    grads = case.add_backward(case.dy, case.dtotal, case.total, cols, case.weight)
    assert_same(grads[1:], alone[1:])
    assert_sum(grads.dx, alone.dx, case.dtotal)
    # zero, and nothing, add nothing
    assert_same(case.add_backward(case.dy, None, case.total, cols, case.weight), alone)
    zero = np.zeros_like(case.dtotal)
    np.testing.assert_array_equal(case.add_backward(case.dy, zero, case.total, cols, case.weight).dx, alone.dx)
    names = ("mean", "rstd")[-len(case.statistics) :]
    given = dict(zip(names, case.statistics, strict=True))
    alone = case.norm_backward(case.dy, case.total, cols, case.weight, **given)
    dx, *sums = case.add_backward(case.dy, case.dtotal, case.total, cols, case.weight, **given)
    assert_same(sums, alone[1:])
    assert_sum(dx, alone.dx, case.dtotal)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mask", [(True, False), (False, True)])
def test_output_mask(rng, norm, mask):
    case = Case(rng, norm, np.float32, 37)
    if norm == "layer":
        mask = (*mask, True)
    every = case.add_backward(case.dy, case.dtotal, case.total, 37, case.weight)
    grads = case.add_backward(case.dy, case.dtotal, case.total, 37, case.weight, output_mask=mask)
    for grad, expected, wanted in zip(grads, every, mask, strict=True):
        if wanted:
            np.testing.assert_array_equal(grad, expected)
        else:
            assert grad is None


# which results are written to which operands, and a result between two of them
@cases(SEVERAL)
@pytest.mark.parametrize("out", [None, "x", "residual", "beside x"])
@pytest.mark.parametrize("total_out", [None, False, "x", "residual", "beside residual"])
def test_results_over_operands(case, out, total_out):
    if out == total_out and out is not None:
        return
    for _ in range(2):
        memory = {}
        for name in ("x", "residual"):
            memory[name] = np.concatenate([getattr(case, name), np.zeros_like(case.x[:1])])
        places = {None: None, False: False, "x": memory["x"][:-1], "residual": memory["residual"][:-1]}
        places |= {"beside x": memory["x"][1:], "beside residual": memory["residual"][1:]}
        y_out, total = places[out], places[total_out]
        if isinstance(y_out, np.ndarray) and isinstance(total, np.ndarray) and np.shares_memory(y_out, total):
            return
        y, total = case(places["x"], places["residual"], out=y_out, total_out=total)
        np.testing.assert_array_equal(y, case.y)
        assert y_out is None or y is y_out
        if total_out is False:
            assert total is None
        else:
            np.testing.assert_array_equal(total, case.total)


@cases(SHORT)
@pytest.mark.parametrize("place", ["dy", "dtotal", "total", "beside dtotal"])
def test_dx_over_operands(case, place):
    expected = case.add_backward(case.dy, case.dtotal, case.total, case.cols, case.weight)
    for _ in range(2):
        memory = {}
        for name in ("dy", "dtotal", "total"):
            memory[name] = np.concatenate([getattr(case, name), np.zeros_like(case.x[:1])])
        given = [memory[name][:-1] for name in ("dy", "dtotal", "total")]
        dx = memory["dtotal"][1:] if place == "beside dtotal" else given[("dy", "dtotal", "total").index(place)]
        out = (dx, *(None for _ in expected[1:]))
        grads = case.add_backward(*given, case.cols, case.weight, out=out)
        assert grads.dx is dx
        assert_same(grads, expected)


@cases(SHORT)
def test_layouts(case):
    x, residual = np.asfortranarray(case.x), np.repeat(case.residual, 2, 1)[:, ::2]
    assert_same(case(x, residual), (case.y, case.total))
    y, total = np.empty_like(x), np.zeros((*x.shape, 2), x.dtype)[..., 0]
    case(x, residual, out=y, total_out=total)
    assert_same((y, total), (case.y, case.total))
    expected = case.add_backward(case.dy, case.dtotal, case.total, case.cols, case.weight)
    grads = case.add_backward(*map(np.asfortranarray, (case.dy, case.dtotal, case.total)), case.cols, case.weight)
    np.testing.assert_array_equal(grads.dx, expected.dx)


@pytest.mark.parametrize(
    ("dtype", "residual_dtype"), [(BFLOAT16, np.float32), (np.float32, np.float64), (np.float32, np.int64)]
)
def test_a_residual_of_another_dtype(rng, dtype, residual_dtype):
    x, residual = 100 * rng.standard_normal((2, 20, 37))
    x, residual = x.astype(dtype), residual.astype(residual_dtype)
    expected = (x.astype(np.result_type(np.float32, residual)) + residual).astype(dtype)
    for _ in range(2):
        y, total = nbnorm.add_layer_norm(x, residual, 37)
        np.testing.assert_array_equal(total, expected, strict=True)
        assert y.dtype == dtype


@cases(SEVERAL)
def test_whoever_works(case, choose_workers):
    gradients = case.add_backward(case.dy, case.dtotal, case.total, case.cols, case.weight)
    for workers in WORKERS:
        choose_workers(workers)
        assert_same(case(case.x, case.residual), (case.y, case.total))
        assert_same(case.add_backward(case.dy, case.dtotal, case.total, case.cols, case.weight), gradients)


# several times as many rows as are added before their norms, of one part and of several; a row beyond the room for its sums
@cases([(np.float32, 32, 130), *deep((BFLOAT16, 32, 130), (np.float32, 320, 20), (np.float32, (1 << 15) + 4, 3))])
@pytest.mark.parametrize("total_out", [None, False])
@pytest.mark.parametrize("streamed_bytes", [0, 1 << 24])
def test_past_the_caches_and_by_way_of_them(case, monkeypatch, total_out, streamed_bytes):
    monkeypatch.setattr("nbnorm.cpu.sizes.STREAMED_BYTES", streamed_bytes)
    for out in (None, case.x):
        y, total = case(case.x, case.residual, out=out, total_out=total_out)
        assert is_streamed(y, out) == (streamed_bytes == 0 and out is None)
        np.testing.assert_array_equal(y, case.y)
        if total_out is None:
            np.testing.assert_array_equal(total, case.total)


@pytest.mark.compiled
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [37, (37,)])
def test_a_second_call_goes_the_short_way(rng, monkeypatch, norm, shape):
    case = Case(rng, norm, np.float32, 37)

    def step():
        out = np.empty_like(case.x)
        results = [*case.add(case.x, case.residual, shape, *case.parameters, return_stats=True)]
        results += case.add(case.x, case.residual, shape, *case.parameters, total_out=False)[:1]
        results += case.add(case.x, case.residual, shape, *case.parameters, out=out)
        results += case.add_backward(case.dy, case.dtotal, case.total, shape, case.weight)
        return [*results, *case.add_backward(case.dy, None, case.total, shape, case.weight)]

    expected = step()
    monkeypatch.setattr("nbnorm.calls.checks.forward", None)
    monkeypatch.setattr("nbnorm.calls.checks.backward", None)
    assert_same(step(), expected)


def test_a_mean_far_from_zero_keeps_its_digits():
    # SkipLayerNormalization of ONNX Runtime takes E[x²] - E[x]² in float32, and is 3 in 100 off
    x, residual = np.full((1, 10_240), 128, np.float32), np.full((1, 10_240), 128, np.float32)
    x[0, 17] = 127
    y, _ = nbnorm.add_layer_norm(x, residual, 10_240)
    expected = -1 / np.sqrt(1 / 10_240 - 1 / 10_240**2 + 1e-5) * (1 - 1 / 10_240)
    np.testing.assert_allclose(y[0, 17], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "residual: ", lambda x: nbnorm.add_layer_norm(x, None, 4)),
        (ValueError, r"residual: shape \(4,\); expected \(2, 4\), the shape of x",
         lambda x: nbnorm.add_layer_norm(x, x[0], 4)),
        (ValueError, "total_out: shares memory with out", lambda x: nbnorm.add_rms_norm(x, x, 4, out=x, total_out=x)),
        (ValueError, "total_out: shape", lambda x: nbnorm.add_rms_norm(x, x, 4, total_out=x[0])),
        (ValueError, "total_out: dtype", lambda x: nbnorm.add_rms_norm(x, x, 4, total_out=np.empty((2, 4)))),
        (TypeError, "total_out: bool; expected an array", lambda x: nbnorm.add_rms_norm(x, x, 4, total_out=True)),
        (ValueError, "total: shape", lambda x: nbnorm.add_layer_norm_backward(x, x, x, 5)),
        (TypeError, "total: ", lambda x: nbnorm.add_layer_norm_backward(x, x, None, 4)),
        (ValueError, "dtotal: shape .*, the shape of total", lambda x: nbnorm.add_layer_norm_backward(x, x[0], x, 4)),
        (ValueError, "stream: 1; expected None", lambda x: nbnorm.add_layer_norm(x, x, 4, stream=1)),
    ],
)  # fmt: skip
def test_messages(error, message, call):
    with pytest.raises(error, match=message):
        call(np.ones((2, 4), np.float32))

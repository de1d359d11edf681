"""Is any call right, or refused, and does it write nothing but its results? Calls are drawn by hypothesis.

With NBNORM_FUZZ_EXAMPLES=5000 each test takes so many, drawn anew and over more kinds of kernels.
"""

import itertools
import math
import os
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nbnorm
import oracle
from conftest import JIT_DISABLED
from drawn import BATCHES, BFLOAT16, EPS, FULL_BATCHES, FULL_ROWS, KINDS, PLAIN, ROWS, Memories, operands, outs, values
from nbnorm.cpu import plans, sizes, staging
from tolerances import assert_grads, assert_statistics, assert_y
from wrong import wrong_values

BY_HAND = "NBNORM_FUZZ_EXAMPLES" in os.environ
fuzzed = settings(
    max_examples=50 if JIT_DISABLED else int(os.environ.get("NBNORM_FUZZ_EXAMPLES", 700)),
    derandomize=not BY_HAND,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# plain NumPy, which the placed arrays are made with, warns of them
pytestmark = [pytest.mark.deep, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]

F16, F32, F64 = map(np.dtype, (np.float16, np.float32, np.float64))
INTEGERS = [np.dtype(name) for name in ("bool", "int8", "uint16", "int64")]
# of x, of weight and bias, and of dy: each mix is a kernel of its own, half a second to compile
MIXES = [(F32, F32, F32), (F64, F64, F64), (F16, F32, F16), (BFLOAT16, F32, BFLOAT16), (F16, F16, F16), (F32, F64, F32)]
MIXES += [(dtype, F64, dtype) for dtype in INTEGERS]
if BY_HAND:
    MIXES += [(F32, F16, F16), (BFLOAT16, BFLOAT16, F32), (F16, F64, F16), (F64, F32, F32)]
ALL = True, True, True
MASKS = list(itertools.product([True, False], repeat=3))


class Call:
    """A right call: its operands as plain arrays and as arrays that lie anywhere, and the ways that it takes."""

    def __init__(self, draw):
        self.draw = draw
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.memories = Memories(self.rng)
        self.batch, self.row = tuple(draw(BATCHES)), tuple(draw(ROWS))
        self.x_dtype, self.parameter_dtype, self.dy_dtype = draw(st.sampled_from(MIXES))
        self.use_diff_of_squares = draw(st.booleans())
        self.eps = draw(EPS)
        self.operands = {}
        # by way of buffers of a few rows, past the caches, by the kernels for long rows, not by those for short rows
        self.buffer = draw(st.sampled_from([1 << 18, 50, 1]))
        self.streamed = draw(st.sampled_from([sizes.STREAMED_BYTES, 0]))
        # half a second each, too
        self.has_all_kernels = self.x_dtype == self.parameter_dtype == F32 or (BY_HAND and self.x_dtype == F64)
        self.long_row = draw(st.sampled_from([sizes.LONG_ROW, 0])) if self.has_all_kernels else sizes.LONG_ROW
        self.short_row = draw(st.sampled_from([sizes.SHORT_ROW, 0])) if self.has_all_kernels else sizes.SHORT_ROW
        self.plans = {name: {} for name in ("LAYER_NORM", "LAYER_NORM_BACKWARD")}

    @property
    def shape(self):
        return self.batch + self.row

    def add(self, name, plain):
        self.operands[name] = self.draw(operands(self.memories, plain))

    def add_rows(self, name, dtype, kinds):
        rows = self.draw(values(self.rng, (math.prod(self.batch), math.prod(self.row)), dtype, kinds))
        self.add(name, rows.reshape(self.shape))

    def add_parameter(self, name):
        if self.draw(st.booleans()):
            parameter = self.draw(values(self.rng, (1, math.prod(self.row)), self.parameter_dtype, PLAIN))
            if self.parameter_dtype.kind not in "biu" and parameter.size and self.draw(st.integers(0, 9)) == 0:
                parameter[0, 0] = np.nan
            self.add(name, parameter.reshape(self.row))

    def flat(self, name):
        """An operand as rows, or a parameter as one; None where there is none."""
        operand = self.operands.get(name)
        if operand is None:
            return None
        return operand.plain.reshape(-1) if name in ("weight", "bias") else self.as_rows(operand.plain)

    def as_rows(self, array):
        return array.reshape(math.prod(self.batch), math.prod(self.row))

    def __call__(self, function, is_placed, **arguments):
        arrays = {name: o.placed if is_placed else o.plain for name, o in self.operands.items()}
        forms = [self.row, list(self.row), np.array(self.row), tuple(map(np.int32, self.row))]
        shape = self.draw(st.sampled_from(forms + [self.row[0]] * (len(self.row) == 1)))
        with (
            patch.object(staging, "BUFFER_ELEMENTS", self.buffer),
            patch.object(sizes, "STREAMED_BYTES", self.streamed),
            patch.object(sizes, "LONG_ROW", self.long_row),
            patch.object(sizes, "SHORT_ROW", self.short_row),
            patch.multiple(plans, **self.plans),
        ):
            mode = {"normalized_shape": shape, "eps": self.eps, "use_diff_of_squares": self.use_diff_of_squares}
            results = function(**arrays | arguments, **mode)
            if not is_placed:
                # by the plan that was kept, if it was
                again = function(**arrays | arguments, **mode)
                pairs = zip(results, again, strict=True) if isinstance(results, tuple) else [(results, again)]
                for result, other in pairs:
                    assert_same_bits(other, result)
            return results


def result_dtype(dtype):
    return F64 if dtype.kind in "biu" else dtype


def is_finite(*arrays):
    """Which rows are."""
    return np.logical_and.reduce([np.isfinite(array.astype(np.float64)).all(1) for array in arrays])


def has_digits(x, eps):
    """Rows whose difference of squares has digits left."""
    _, mean, rstd = oracle.forward(x, 1, eps=eps)
    return (4 * 2.0**-52 * (mean**2 * rstd**2 + 1) < 0.5)[:, 0]


def assert_same_bits(actual, expected):
    """But for those of NaN, of which a processor gives either operand's."""
    assert (actual.dtype.newbyteorder("="), actual.shape) == (expected.dtype, expected.shape)
    actual, expected = (np.ascontiguousarray(a, expected.dtype).reshape(-1) for a in (actual, expected))
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), is_nan)
    np.testing.assert_array_equal(actual[~is_nan].view(np.uint8), expected[~is_nan].view(np.uint8))


@fuzzed
@given(st.data())
def test_forward(data):
    call = Call(data.draw)
    call.add_rows("x", call.x_dtype, KINDS)
    call.add_parameter("weight")
    call.add_parameter("bias")
    dtype = result_dtype(call.x_dtype)
    out = data.draw(st.none() | outs(call.memories, call.shape, dtype, *call.operands.values()))
    call.memories.remember()

    y, mean, rstd = call(nbnorm.layer_norm, False, return_stats=True)
    placed_y, placed_mean, placed_rstd = call(nbnorm.layer_norm, True, out=out, return_stats=True)
    assert out is None or placed_y is out
    assert_same_bits(placed_y, y)
    assert_same_bits(placed_mean, mean)
    assert_same_bits(placed_rstd, rstd)
    assert_same_bits(call(nbnorm.layer_norm, False), y)
    call.memories.assert_nothing_else_was_written()
    assert (y.dtype, y.shape, mean.shape) == (dtype, call.shape, call.batch + (1,) * len(call.row))

    x, y = call.flat("x"), call.as_rows(y)
    mean, rstd = (a.reshape(-1, 1) for a in (mean, rstd))
    right = is_finite(x)
    if x.size:
        assert np.isnan(y[~right]).all()
        assert np.isnan(rstd[~right]).all()
        if call.use_diff_of_squares:
            assert call.eps == 0 or not np.isnan(rstd[right]).any()
            right &= has_digits(x, call.eps)
        mode = call.eps, call.use_diff_of_squares
        assert_y(y[right], x[right], 1, call.flat("weight"), call.flat("bias"), *mode)
        assert_statistics(mean[right], rstd[right], x[right], 1, *mode)


@fuzzed
@given(st.data())
def test_backward(data):
    draw = data.draw
    call = Call(draw)
    call.add_rows("x", call.x_dtype, KINDS)
    call.add_rows("dy", call.dy_dtype, (*PLAIN, "far", "not finite"))
    call.add_parameter("weight")
    is_given = draw(st.booleans())
    if is_given:
        x = call.operands["x"].plain
        if x.size:
            mean, rstd = oracle.forward(x, len(call.row), eps=call.eps)[1:]
        else:
            mean, rstd = np.ones((2, *call.batch, *(1,) * len(call.row)))
        dtype = draw(st.sampled_from([F32, F64])) if BY_HAND else F64
        call.add("mean", mean.astype(dtype))
        call.add("rstd", rstd.astype(dtype))
    is_plain = not (call.use_diff_of_squares or is_given or call.long_row == 0)
    mask = draw(st.sampled_from(MASKS)) if call.has_all_kernels and is_plain else ALL
    dtypes = [result_dtype(call.x_dtype)] + [
        result_dtype(call.parameter_dtype if "weight" in call.operands else call.x_dtype)
    ] * 2
    out = None
    if draw(st.booleans()):
        overlapped = [
            [call.operands[name] for name in names if name in call.operands] for names in (("x", "dy"), ("weight",), ())
        ]
        out = tuple(
            draw(st.none() | outs(call.memories, shape, dtype, *others)) if wanted else None
            for wanted, shape, dtype, others in zip(mask, (call.shape, call.row, call.row), dtypes, overlapped, strict=True)
        )
    call.memories.remember()

    grads = call(nbnorm.layer_norm_backward, False)
    placed = call(nbnorm.layer_norm_backward, True, output_mask=mask, out=out)
    for grad, expected, wanted, given_out in zip(placed, grads, mask, out or (None,) * 3, strict=True):
        assert (grad is not None) == wanted
        assert given_out is None or grad is given_out
        if wanted:
            assert_same_bits(grad, expected)
    for grad, expected in zip(call(nbnorm.layer_norm_backward, False), grads, strict=True):
        assert_same_bits(grad, expected)
    call.memories.assert_nothing_else_was_written()
    assert [grad.dtype for grad in grads] == dtypes
    assert [grad.shape for grad in grads] == [call.shape, call.row, call.row]

    dx, dweight, dbias = call.as_rows(grads.dx), grads.dweight.reshape(-1), grads.dbias.reshape(-1)
    x, dy, weight = map(call.flat, ("x", "dy", "weight"))
    if not x.size:
        np.testing.assert_array_equal(dweight, 0)
        np.testing.assert_array_equal(dbias, 0)
        return
    statistics = {}
    right = is_finite(x, dy)
    if is_given:
        statistics = {name: call.operands[name].plain.reshape(-1, 1) for name in ("mean", "rstd")}
        # what is given is used as it is, in the type of the operands; rounded to float32, it may be far from the row's own
        most = 2.0**1000 if F64 in dtypes or call.dy_dtype.itemsize == 8 else 2.0**110
        wide_x, mean, rstd = (array.astype(oracle.WIDE) for array in (x, *statistics.values()))
        right &= is_finite(mean, rstd) & (np.abs(rstd) < most)[:, 0] & (np.abs(wide_x) < most).all(1)
        right &= (np.abs((wide_x - mean) * rstd) < 1e6).all(1)
    elif call.use_diff_of_squares:
        right &= has_digits(x, call.eps)
    mode = weight, call.eps, call.use_diff_of_squares and not is_given
    of_rows = {name: value[right] for name, value in statistics.items()}
    assert_grads(nbnorm.LayerNormGrads(dx[right], None, None), dy[right], x[right], 1, *mode, **of_rows)
    if right.all():
        assert_grads(nbnorm.LayerNormGrads(None, dweight, dbias), dy, x, 1, *mode, **statistics, rows_alike=True)


@fuzzed
@given(st.data())
def test_wrong_calls(data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    row = tuple(draw(FULL_ROWS))
    batch = (2, *draw(FULL_BATCHES))
    dtype = draw(st.sampled_from([F32, F32, F64]))
    arguments = {"x": rng.standard_normal(batch + row).astype(dtype), "normalized_shape": row}
    for name in ("weight", "bias"):
        if draw(st.booleans()):
            arguments[name] = rng.standard_normal(row).astype(dtype)
    arguments["out"] = rng.standard_normal(batch + row).astype(dtype)
    function = nbnorm.layer_norm
    if draw(st.booleans()):
        function = nbnorm.layer_norm_backward
        arguments.pop("bias", None)
        arguments["dy"] = rng.standard_normal(batch + row).astype(dtype)
        arguments["out"] = (arguments["out"], *rng.standard_normal((2, *row)).astype(dtype))
        if draw(st.booleans()):
            arguments |= dict(zip(("mean", "rstd"), rng.standard_normal((2, *batch, *(1,) * len(row))), strict=True))
    # so that there is a plan
    function(**arguments)
    name, value = draw(st.sampled_from(wrong_values(arguments)))
    arguments[name] = value
    arrays = [
        a
        for entry in arguments.values()
        for a in (entry if isinstance(entry, tuple) else [entry])
        if isinstance(a, np.ndarray)
    ]
    before = [array.tobytes() for array in arrays]
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
        function(**arguments)
    assert [array.tobytes() for array in arrays] == before

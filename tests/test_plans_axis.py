"""Does a call over an axis that was made before give what it gave then, and leave to the checks what is theirs?"""

import copy
from functools import partial

import numpy as np
import pytest

import nbnorm
from levels import deep
from nbnorm.cpu import plans
from nbnorm.cpu.workers import blocks
from nbnorm.cpu.workers.parallel import NUMBAS, ONE, OURS
from test_axis import BFLOAT16, Case, bits
from test_plans import MIXED, OTHERS, planned

# images, one dimension behind the axis and none before it, and adjacent axes
AXES = [((2, 5, 3, 4), 1), ((2, 5, 7), -2), ((6, 37), 0), ((2, 3, 4, 5, 3), (1, 2))]
DTYPES = [np.float32, *deep(np.float64, np.float16, BFLOAT16)]


@pytest.fixture
def case(rng):
    return Case(rng, (2, 5, 3, 7), 1, np.float32)


def layer(case):
    yield case.forward(case.x)
    y, mean, rstd = case.forward(case.x, return_stats=True)
    yield y, mean, rstd
    yield case.backward(case.dy, case.x)
    yield case.backward(case.dy, case.x, mean=mean, rstd=rstd)
    yield case.backward(case.dy, case.x, output_mask=(True, False, False))


def rms(case):
    y, rstd = case.forward(case.x, return_stats=True)
    yield y, rstd
    yield case.backward(case.dy, case.x)
    yield case.backward(case.dy, case.x, rstd=rstd)


def added(case):
    shape, weight, axis = case.normalized_shape, case.weight, {"axis": case.axis}
    of_bias = () if case.is_rms else (case.bias,)
    forward, backward = nbnorm.add_layer_norm, nbnorm.add_layer_norm_backward
    if case.is_rms:
        forward, backward = nbnorm.add_rms_norm, nbnorm.add_rms_norm_backward
    yield forward(case.x, case.residual, shape, weight, *of_bias, return_stats=True, **axis)
    yield forward(case.x, case.residual, shape, weight, *of_bias, total_out=False, **axis)
    yield backward(case.dy, case.dtotal, case.x, shape, weight, **axis)


CALLS = [(layer, "layer"), (rms, "rms"), (added, "layer")]
CALLS += [pytest.param(calls, mode, marks=pytest.mark.deep) for calls, mode in ((added, "rms"), (layer, "squares"))]


def arrays(results):
    """All of several calls' results, of which a single one is an array."""
    return [array for result in results for array in ((result,) if isinstance(result, np.ndarray) else result)]


def assert_same(results, expected):
    for result, value in zip(results, expected, strict=True):
        assert type(result) is type(value)
        assert value is None or (result.shape, result.dtype) == (value.shape, value.dtype)
    assert bits(results) == bits(expected)


def by_plan(calls, case):
    return planned(lambda: list(calls(case)))


def the_long_way(calls, case):
    """With a list for normalized_shape, which takes the checked path."""
    case = copy.copy(case)
    case.normalized_shape = list(case.normalized_shape)
    return list(calls(case))


@pytest.mark.parametrize("shape_and_axis", AXES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("calls", "mode"), CALLS)
def test_the_same_bits(rng, calls, mode, dtype, shape_and_axis):
    case = Case(rng, *shape_and_axis, dtype, mode)
    if dtype == np.float64:
        # others than these are widened, by the long way
        case.weight, case.bias = (None if array is None else array.astype(dtype) for array in (case.weight, case.bias))
    expected = the_long_way(calls, case)
    assert not any(plans.ALL)
    for results in (list(calls(case)), by_plan(calls, case)):
        assert list(map(type, results)) == list(map(type, expected))
        assert_same(arrays(results), arrays(expected))


@pytest.mark.parametrize(("calls", "mode"), CALLS)
def test_a_plan_is_of_any_shape_around_the_rows(rng, calls, mode):
    list(calls(Case(rng, (2, 5, 3, 4), 1, np.float32, mode)))
    for shape in ((3, 5, 1, 2), (2, 5, 9, 31)):
        case = Case(rng, shape, 1, np.float32, mode)
        assert_same(arrays(by_plan(calls, case)), arrays(the_long_way(calls, case)))


def test_a_plan_is_of_a_number_of_dimensions(rng):
    for shape in ((2, 5, 3, 4), (5, 3, 4), (3, 2, 5, 3, 4)):
        case = Case(rng, shape, -3, np.float32)
        assert_same(arrays(layer(case)), arrays(the_long_way(layer, case)))


@pytest.mark.parametrize("workers", [OURS, *deep(NUMBAS)])
@pytest.mark.parametrize(("calls", "mode"), CALLS)
def test_who_works_is_asked_each_time(rng, monkeypatch, choose_workers, calls, mode, workers):
    """Of more blocks than are summed in one go."""
    monkeypatch.setattr("nbnorm.cpu.sizes.MOST_ABREAST", 16)
    monkeypatch.setattr("nbnorm.cpu.sizes.MAX_BLOCKS", 4)
    case = Case(rng, (3, 5, 55), 1, np.float32, mode)
    choose_workers(ONE)
    expected = arrays(calls(case))
    kept = [dict(those) for those in plans.ALL]
    choose_workers(workers)
    # which empties them
    for those, before in zip(plans.ALL, kept, strict=True):
        those.update(before)
    asked = set()
    kernel_for = blocks.kernel_for
    monkeypatch.setattr(blocks, "kernel_for", lambda who, *rest: asked.add(who) or kernel_for(who, *rest))
    assert_same(arrays(by_plan(calls, case)), expected)
    assert asked == {workers}


@pytest.mark.parametrize("way", [way for way in OTHERS if way not in MIXED])
def test_other_arrays_are_checked(case, checked, way):
    """Each of a call's, in a way in which it is as right."""

    def forward(**given):
        return [nbnorm.layer_norm(normalized_shape=5, axis=1, **given)]

    def backward(dx, **given):
        return nbnorm.layer_norm_backward(normalized_shape=5, axis=1, out=(dx, None, None), **given)

    inputs = {"x": case.x, "weight": case.weight}
    results = () if way == "an object" else ("out", "dx")
    for call, given in (
        (forward, inputs | {"bias": case.bias, "out": np.empty_like(case.x)}),
        (backward, inputs | {"dy": case.dy, "dx": np.empty_like(case.x)}),
    ):
        expected = [array.copy() for array in call(**given)]
        planned(call, **given)
        for name in {*given} - {"out", "dx"} | {*given} & {*results}:
            checked.clear()
            for array, value in zip(call(**given | {name: OTHERS[way](given[name])}), expected, strict=True):
                np.testing.assert_array_equal(array, value, err_msg=name)
            assert len(checked) == 1


def test_memory_that_is_shared(case, checked):
    x, dy = case.x, case.dy
    expected, grads = case.forward(x), case.backward(dy, x)
    memory = np.zeros(x.size + 8, np.float32)
    shifted, place = memory[8:].reshape(x.shape), memory[:-8].reshape(x.shape)
    apart = np.zeros(x.size + 8, np.float32)[:-8].reshape(x.shape)
    for _ in range(2):
        case.forward(x, out=apart)
        case.backward(dy, x, out=(apart, None, None))
        in_place = x.copy()
        assert case.forward(in_place, out=in_place) is in_place
        assert bits([in_place]) == bits([expected])
        in_place = dy.copy()
        assert bits(case.backward(in_place, x, out=(in_place, None, None))) == bits(grads)
    checked.clear()
    shifted[...] = x
    assert bits([case.forward(shifted, out=place)]) == bits([expected])
    shifted[...] = dy
    assert bits(case.backward(shifted, x, out=(place, None, None))) == bits(grads)
    assert len(checked) == 2
    with pytest.raises(ValueError, match="shares memory"):
        case.backward(dy, x, out=(apart, apart.ravel()[:5], None))


def test_a_read_only_out_is_refused(case):
    out = np.empty_like(case.x)
    case.forward(case.x, out=out)
    planned(case.forward, case.x, out=out)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        case.forward(case.x, out=out)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"axis": True}, TypeError),
        ({"axis": 1.0}, TypeError),
        ({"axis": (1.0,)}, TypeError),
        ({"axis": (True,)}, TypeError),
        ({"axis": ()}, ValueError),
        ({"axis": 2}, ValueError),
        ({"axis": 4}, ValueError),
        ({"axis": -5}, ValueError),
        ({"axis": (1, 2)}, ValueError),
        ({"axis": (1, 1)}, ValueError),
        ({"axis": (2, 1), "normalized_shape": (3, 5)}, ValueError),
        ({"axis": (-1, 0), "normalized_shape": (7, 2)}, ValueError),
        ({"normalized_shape": (5.0,)}, TypeError),
        ({"normalized_shape": True}, TypeError),
        ({"normalized_shape": (5, 3)}, ValueError),
        ({"normalized_shape": ()}, ValueError),
        ({"eps": 1}, None),
        ({"eps": -1.0}, ValueError),
        ({"axis": np.int64(1)}, None),
        ({"axis": [1]}, None),
        ({"axis": (np.int64(1),)}, None),
    ],
    ids=str,
)
def test_options_that_are_equal_are_not_the_same(case, checked, options, error):
    right = {"normalized_shape": 5, "weight": case.weight, "eps": 1.0, "axis": 1}
    forward = partial(nbnorm.layer_norm, bias=case.bias)
    for function, operands in ((forward, (case.x,)), (nbnorm.layer_norm_backward, (case.dy, case.x))):
        for axis in (1, (1,), -3):
            expected = function(*operands, **right | {"axis": axis})
            planned(function, *operands, **right | {"axis": axis})
        checked.clear()
        if error is None:
            assert bits(arrays([function(*operands, **right | options)])) == bits(arrays([expected]))
        else:
            with pytest.raises(error):
                function(*operands, **right | options)
        assert len(checked) == 1


def test_other_shapes_are_refused(case):
    """Where a plan is kept for calls in which they are right."""
    calls = {
        "x": lambda x: case.forward(x),
        "dy": lambda dy: case.backward(dy, case.x),
        "out": lambda out: case.forward(case.x, out=out),
        "mean": lambda mean: case.backward(case.dy, case.x, mean=mean, rstd=np.ones((2, 1, 3, 7), np.float32)),
    }
    for name, call in calls.items():
        right = (2, 1, 3, 7) if name == "mean" else (2, 5, 3, 7)
        call(np.ones(right, np.float32))
        planned(call, np.ones(right, np.float32))
        for wrong in ((2, 6, 3, 7), (2, 3, 5, 7), (7, 3, 1, 2)):
            with pytest.raises(ValueError, match=rf"^{name}: shape"):
                call(np.ones(wrong, np.float32))


def test_axes_and_sizes_are_not_taken_for_each_other(rng):
    """A row of 5 along axis 1, and one of (1, 5) at the end."""
    x, weight = rng.standard_normal((3, 5, 1, 5)).astype(np.float32), np.ones((1, 5), np.float32)
    for _ in range(2):
        y = nbnorm.layer_norm(x, 5, weight[0], weight[0], axis=1)
        assert bits([y]) == bits([nbnorm.layer_norm(x, [5], weight[0], weight[0], axis=1)])
        y = nbnorm.layer_norm(x, (1, 5), weight, weight)
        assert bits([y]) == bits([nbnorm.layer_norm(x, [1, 5], weight, weight)])


def test_the_last_axes_have_the_plans_of_calls_without(rng):
    x, weight = rng.standard_normal((2, 3, 4, 5)).astype(np.float32), rng.standard_normal((4, 5)).astype(np.float32)
    for axes, shape, scale in (((-1, 3), 5, weight[0]), ([(2, 3), (-2, -1)], (4, 5), weight), ([(-1,), (3,)], 5, weight[0])):
        expected = nbnorm.layer_norm(x, shape, scale, scale)
        kept = len(plans.LAYER_NORM)
        for axis in axes:
            assert bits([planned(nbnorm.layer_norm, x, shape, scale, scale, axis=axis)]) == bits([expected])
        assert len(plans.LAYER_NORM) == kept


def test_axes_that_end_with_the_last_are_not_the_last(case):
    """Where a plan is kept for a call without an axis."""
    weight = np.ones((3, 7), np.float32)
    for axis in (None, (2, 3), (-2, 3)):
        nbnorm.layer_norm(case.x, (3, 7), weight, weight, axis=axis)
    for axis in ((1, 3), (3,), -1, (1, 2, 3), (3, 3)):
        with pytest.raises(ValueError, match=r"^axis: "):
            nbnorm.layer_norm(case.x, (3, 7), weight, weight, axis=axis)


def test_layers_go_the_short_way(rng):
    # with as many elements along the last axis
    case = Case(rng, (2, 5, 3, 5), 1, np.float32)
    nbnorm.LayerNorm(5)(case.x)
    for layer, of_rows in ((nbnorm.LayerNorm(5, axis=1), nbnorm.layer_norm), (nbnorm.RMSNorm(5, axis=-3), nbnorm.rms_norm)):
        parameters = (layer.weight, layer.bias) if of_rows is nbnorm.layer_norm else (layer.weight,)
        expected, grads = layer(case.x), layer.backward(case.dy, case.x)
        assert bits([planned(layer, case.x)]) == bits([expected])
        assert bits([of_rows(case.x, [5], *parameters, axis=1)]) == bits([expected])
        assert bits(planned(layer.backward, case.dy, case.x)) == bits(grads)


def test_tensors_go_the_short_way(case):
    torch = pytest.importorskip("torch")
    x, dy, weight, bias = map(torch.from_numpy, (case.x, case.dy, case.weight, case.bias))
    expected, grads = case.forward(case.x), case.backward(case.dy, case.x)
    for _ in range(2):
        y = nbnorm.layer_norm(x, 5, weight, bias, axis=1)
        nbnorm.layer_norm_backward(dy, x, 5, weight, axis=1)
    y = planned(nbnorm.layer_norm, x, 5, weight, bias, axis=1)
    dx, dweight, dbias = planned(nbnorm.layer_norm_backward, dy, x, 5, weight, axis=1)
    assert isinstance(y, torch.Tensor)
    assert bits([y.numpy()]) == bits([expected])
    assert bits([dx.numpy(), dweight.numpy(), dbias.numpy()]) == bits(grads)
    last = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert bits([nbnorm.layer_norm(last, 5, weight, bias, axis=1).numpy()]) == bits([expected])
    with pytest.raises(ValueError, match=r"axis: 4; expected axes from -4 to 3"):
        nbnorm.layer_norm(x, 5, weight, bias, axis=4)


def test_no_plans_without_elements_or_past_the_caches(case, monkeypatch):
    for shape in ((0, 5, 3), (2, 5, 0), (2, 0, 3)):
        for _ in range(2):
            nbnorm.layer_norm(np.ones(shape, np.float32), shape[1], axis=1)
    monkeypatch.setattr("nbnorm.cpu.sizes.STREAMED_BYTES", case.x.size)
    case.forward(case.x)
    assert not plans.LAYER_NORM

"""Does a backward call that is remembered give what the first one gave, and leave to the checks what is theirs?"""

import itertools
import threading

import ml_dtypes
import numpy as np
import pytest
from numba import cuda

import nbnorm
from device import LEVEL, to_device, to_host
from nbnorm.cuda import arrays, launch, plans

pytestmark = pytest.mark.hardware

ROWS, COLS = 5, 24


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch):
    monkeypatch.setattr(plans, "BACKWARD", {})


@pytest.fixture
def operands(rng):
    shapes = (ROWS, COLS), (ROWS, COLS), (COLS,)
    return [cuda.to_device(rng.standard_normal(shape, np.float32)) for shape in shapes]


def values(grads):
    return [None if grad is None else to_host(grad) for grad in grads]


def assert_same_bits(grads, expected):
    for grad, other in zip(values(grads), expected, strict=True):
        assert (grad is None) == (other is None)
        if grad is not None:
            assert grad.dtype == other.dtype
            np.testing.assert_array_equal(grad.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("weight_dtype", [None, np.float32])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_diff_of_squares": True}, {"output_mask": (False, True, False)}, {"output_mask": (True, False, False)}],
    ids=str,
)
@pytest.mark.parametrize("is_given", [False, True])
def test_the_same_bits(rng, checked, dtype, weight_dtype, options, is_given):
    sets = []
    for _ in range(2):
        dy, x = rng.standard_normal((2, ROWS, COLS)).astype(dtype)
        weight = None if weight_dtype is None else rng.standard_normal(COLS).astype(weight_dtype)
        statistics = {}
        if is_given:
            mean, rstd = np.abs(rng.standard_normal((2, ROWS, 1))).astype(np.float32)
            statistics = {"mean": mean, "rstd": rstd}
        sets.append(((dy, x, weight), statistics))

    def call(operands, statistics):
        dy, x, weight = (None if array is None else to_device(array) for array in operands)
        on_device = {name: to_device(array) for name, array in statistics.items()}
        return nbnorm.layer_norm_backward(dy, x, COLS, weight, **on_device, **options)

    # remembered with other values in other memory
    call(*sets[0])
    grads = values(call(*sets[1]))
    assert len(checked) == 1
    plans.BACKWARD.clear()
    assert_same_bits(call(*sets[1]), grads)
    assert len(checked) == 2


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("place", ["new", "dy", "x"])
def test_into_out_and_in_place(operands, checked, given, place):
    expected = values(nbnorm.layer_norm_backward(*operands[:2], COLS, operands[2]))
    plans.BACKWARD.clear()
    checked.clear()
    for _ in range(2):
        dy, x, weight = (cuda.to_device(array.copy_to_host()) for array in operands)
        dx = {"dy": dy, "x": x}.get(place, cuda.device_array_like(x))
        arrays_of_call = dx, cuda.device_array_like(weight), cuda.device_array_like(weight)
        out = tuple(array if wanted else None for array, wanted in zip(arrays_of_call, given, strict=True))
        grads = nbnorm.layer_norm_backward(dy, x, COLS, weight, out=out)
        for grad, array in zip(grads, out, strict=True):
            assert array is None or grad is array
        assert_same_bits(grads, expected)
    assert len(checked) == 1


def test_one_array_for_all(rng, checked):
    """dy, x and dx in one place, after a call where they are three."""
    host = rng.standard_normal((ROWS, COLS), np.float32)
    for _ in range(2):
        x = cuda.to_device(host)
        expected = values(nbnorm.layer_norm_backward(cuda.to_device(host), x, COLS))
        assert_same_bits(nbnorm.layer_norm_backward(x, x, COLS, out=(x, None, None)), expected)
    assert len(checked) == 2


def test_a_result_is_new_each_time(operands, checked):
    dy, x, weight = operands
    first, second = (nbnorm.layer_norm_backward(dy, x, COLS, weight) for _ in range(2))
    assert len(checked) == 1
    addresses = {grad.device_ctypes_pointer.value for grad in (*first, *second)}
    assert len(addresses) == 6


def test_an_out_that_overlaps(rng, checked):
    """With memory shared in every way, after like calls that share none."""
    size = ROWS * COLS
    host = rng.standard_normal(4 * size + 4 * COLS, np.float32)

    def rows(array, at):
        return array[at : at + size].reshape(ROWS, COLS)

    def row(array, at):
        return array[at : at + COLS]

    # where dy, x, weight, dx, dweight and dbias begin, in elements
    end = 4 * size
    apart = (0, size, end, 2 * size, end + COLS, end + 2 * COLS)
    for i, at in ((3, COLS), (3, size + COLS), (3, end - size + COLS), (4, 2 * size), (5, end + COLS)):
        plans.BACKWARD.clear()
        memory = cuda.to_device(host)
        places = [*apart]
        operands = rows(memory, 0), rows(memory, size), COLS, row(memory, end)
        out = rows(memory, places[3]), row(memory, places[4]), row(memory, places[5])
        nbnorm.layer_norm_backward(*operands, out=out)
        places[i] = at
        memory = cuda.to_device(host)
        operands = rows(memory, 0), rows(memory, size), COLS, row(memory, end)
        out = rows(memory, places[3]), row(memory, places[4]), row(memory, places[5])
        checked.clear()
        if i > 3:
            with pytest.raises(ValueError, match="shares memory"):
                nbnorm.layer_norm_backward(*operands, out=out)
        else:
            copies = (cuda.to_device(a) for a in (rows(host, 0), rows(host, size)))
            expected = values(nbnorm.layer_norm_backward(*copies, COLS, cuda.to_device(row(host, end))))
            checked.clear()
            assert_same_bits(nbnorm.layer_norm_backward(*operands, out=out), expected)
        assert len(checked) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": True}, TypeError, "eps: True"),
        ({"eps": float("nan")}, ValueError, "eps: nan"),
        ({"use_diff_of_squares": 0}, TypeError, "use_diff_of_squares: 0"),
        ({"output_mask": (1, 1, 1)}, TypeError, r"output_mask\[0\]: 1"),
        ({"output_mask": (True, True)}, ValueError, "output_mask: "),
        ({"stream": "0"}, TypeError, "stream: '0'"),
        ({"out": (None, None)}, ValueError, "out: 2 entries"),
        ({"normalized_shape": 24.0}, TypeError, "normalized_shape: "),
    ],
    ids=str,
)
def test_options_that_are_equal_are_not_the_same(operands, options, error, message):
    dy, x, weight = operands
    nbnorm.layer_norm_backward(dy, x, COLS, weight, eps=1.0)
    with pytest.raises(error, match=f"^{message}"):
        nbnorm.layer_norm_backward(**{"dy": dy, "x": x, "normalized_shape": COLS, "weight": weight, "eps": 1.0} | options)


def test_a_list_of_outs_or_bools(operands, checked):
    dy, x, weight = operands
    expected = values(nbnorm.layer_norm_backward(dy, x, COLS, weight))
    out = [cuda.device_array_like(x), None, None]
    for _ in range(2):
        grads = nbnorm.layer_norm_backward(dy, x, COLS, weight, output_mask=[True, True, True], out=out)
        assert grads.dx is out[0]
        assert_same_bits(grads, expected)
    assert len(checked) == 3


def test_calls_of_other_sizes_share_their_workspace(rng):
    """Kept memory grows with the largest call, and a small call after a large one is right."""
    for rows, cols in ((3, 8), (40, 300), (3, 8), (7, 40)):
        dy, x = rng.standard_normal((2, rows, cols)).astype(np.float32)
        expected = nbnorm.layer_norm_backward(dy, x, cols)
        for _ in range(2):
            grads = nbnorm.layer_norm_backward(to_device(dy), to_device(x), cols)
            for grad, wanted in zip(grads, expected, strict=True):
                np.testing.assert_allclose(to_host(grad), wanted, rtol=1e-4, atol=1e-4)


def test_a_workspace_is_one_threads_own():
    like = cuda.device_array(4, np.float32)
    dtype = np.dtype(np.float32)

    def workspace(size, handle=0):
        return arrays.workspace(size, dtype, like, "numba", 0, handle)

    first = workspace(100)
    assert workspace(50) is first
    assert workspace(200) is not first
    # of another stream, or large: not kept
    kept = workspace(200)
    if LEVEL == "device":
        assert workspace(200, cuda.stream().handle.value) is not kept
    assert workspace(arrays.KEPT // 4 + 1) is not kept
    assert workspace(200) is kept
    others = []
    thread = threading.Thread(target=lambda: others.append(workspace(200)))
    thread.start()
    thread.join()
    assert others[0] is not kept


def test_another_device(operands, checked, monkeypatch):
    dy, x, weight = operands
    nbnorm.layer_norm_backward(dy, x, COLS, weight)
    checked.clear()
    nbnorm.layer_norm_backward(dy, x, COLS, weight)
    assert not checked
    monkeypatch.setattr(launch, "current_device", lambda: 1)
    nbnorm.layer_norm_backward(dy, x, COLS, weight)
    assert len(checked) == 1


def test_what_is_remembered_stays_bounded(rng, monkeypatch):
    monkeypatch.setattr("nbnorm.calls.plans.MOST", 3)
    for rows in range(1, 9):
        x = cuda.to_device(rng.standard_normal((rows, 2), np.float32))
        for _ in range(2):
            nbnorm.layer_norm_backward(x, x, 2)
        assert len(plans.BACKWARD) <= 3
    assert plans.BACKWARD

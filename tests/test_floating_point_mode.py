"""Are the bits those of a thread in the usual floating-point mode, whichever mode a thread has, and does it keep that?"""

import itertools
import subprocess
import sys
import threading
from queue import SimpleQueue

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from floating_point import HARDEST, IS_KNOWN, MODES, STANDARD, control, mode
from levels import deep
from nbnorm.cpu import plans
from nbnorm.cpu.workers.parallel import NUMBAS, ONE, OURS, WORKERS

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(not IS_KNOWN, reason="sets modes as glibc does on x86-64 and aarch64"),
]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# subnormal
TINY = {"float16": 1e-7, "bfloat16": 1e-40, "float32": 1e-40, "float64": 1e-310}
ROWS = 37


def operands(cols, dtype):
    """Ordinary rows, subnormal and constant subnormal ones, and large ones; subnormal numbers in dy, weight and bias."""
    rng = np.random.default_rng(20260101)
    dtype = np.dtype(dtype)
    tiny = TINY[dtype.name]
    with np.errstate(under="ignore"):
        x, dy = rng.standard_normal((2, ROWS, cols))
        weight, bias = rng.standard_normal((2, cols))
        x[::3] *= tiny
        x[4] = tiny
        x[5::9] *= 1e4
        dy[2::8] *= tiny
        weight[::5] *= tiny
        bias[::7] *= tiny
        return tuple(array.astype(dtype) for array in (x, dy, weight, bias))


def results(case, eps=0.0, use_diff_of_squares=False):
    x, dy, weight, bias = case
    cols = x.shape[1]
    y, mean, rstd = nbnorm.layer_norm(x, cols, weight, bias, eps, use_diff_of_squares, return_stats=True)
    grads = nbnorm.layer_norm_backward(dy, x, cols, weight, eps, use_diff_of_squares)
    given = nbnorm.layer_norm_backward(dy, x, cols, weight, eps, mean=mean, rstd=rstd)
    return [y, mean, rstd, *grads, *given]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        # also the sign of 0
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize(
    ("dtype", "cols", "long_row"),
    [
        (np.float32, 40, 1 << 16),
        (np.float32, 333, 1 << 16),
        *(
            pytest.param(*case, marks=pytest.mark.deep)
            for case in (
                *itertools.product([np.float64], [40, 333], [1 << 16]),
                *itertools.product([np.float32, np.float64], [333], [0]),
                (np.float16, 40, 1 << 16),
                (BFLOAT16, 333, 1 << 16),
            )
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("workers", [ONE, *deep(*(workers for workers in WORKERS if workers != ONE))])
def test_same_bits_in_any_mode(monkeypatch, choose_workers, workers, dtype, cols, long_row):
    monkeypatch.setattr("nbnorm.cpu.sizes.LONG_ROW", long_row)
    case = operands(cols, dtype)
    # subnormal, where it is not 0
    for eps in (0.0, 1e-310):
        choose_workers(ONE)
        expected = results(case, eps)
        choose_workers(workers)
        for names in MODES:
            with mode(*names):
                actual = results(case, eps)
            assert_same(actual, expected)


def test_an_eps_that_a_mode_takes_for_another():
    """A plan is found by its eps, and a mode may have 1e-310 == 0."""
    case = operands(40, np.float32)
    numbers = 0.0, 1e-310
    expected = [results(case, eps) for eps in numbers]
    for names in MODES:
        plans.LAYER_NORM.clear()
        plans.LAYER_NORM_BACKWARD.clear()
        with mode(*names):
            actual = [results(case, eps) for eps in numbers]
        for results_of_one, values in zip(actual, expected, strict=True):
            assert_same(results_of_one, values)


@pytest.mark.parametrize("cols", [40, 333])
def test_same_bits_in_any_mode_by_difference_of_squares(cols):
    case = operands(cols, np.float32)
    expected = results(case, use_diff_of_squares=True)
    for names in MODES:
        with mode(*names):
            actual = results(case, use_diff_of_squares=True)
        assert_same(actual, expected)


@pytest.mark.parametrize("long_row", [1 << 16, *deep(0)])
def test_same_bits_written_past_the_caches(monkeypatch, build, long_row):
    monkeypatch.setattr("nbnorm.cpu.sizes.LONG_ROW", long_row)
    monkeypatch.setattr("nbnorm.cpu.sizes.STREAMED_BYTES", 0)
    case = operands(336, np.float32)
    expected = results(case)
    with mode(*HARDEST):
        actual = results(case)
    assert_same(actual, expected)


def test_rows_of_1e_40_are_no_nan(build):
    with np.errstate(under="ignore"):
        x = (np.random.default_rng(0).standard_normal((64, 48)) * 1e-40).astype(np.float32)
    expected = nbnorm.layer_norm(x, 48, eps=0.0)
    with mode(*HARDEST):
        y = nbnorm.layer_norm(x, 48, eps=0.0)
    assert np.isfinite(y).all()
    assert np.abs(y).max() > 1
    assert_same([y], [expected])


def test_threads_of_ours_that_began_in_another_mode(monkeypatch, choose_workers):
    case = operands(333, np.float32)
    choose_workers(ONE)
    expected = results(case)
    choose_workers(OURS)
    monkeypatch.setattr("nbnorm.cpu.workers.threads._threads", 0)
    monkeypatch.setattr("nbnorm.cpu.workers.threads._calls", SimpleQueue())
    with mode(*HARDEST):
        assert_same(results(case), expected)
    for _ in range(20):
        assert_same(results(case), expected)


def test_numbas_threads_that_began_in_another_mode(python_environment):
    code = """
import numpy as np, nbnorm
from floating_point import HARDEST, mode
from nbnorm.cpu.workers import parallel
from test_floating_point_mode import assert_same, operands, results
case = operands(333, np.float32)
parallel.from_elements = float("inf")
expected = results(case)
parallel.from_elements, parallel.many, parallel._is_decided, parallel.STALL_SECONDS = 0, parallel.NUMBAS, True, float("inf")
with mode(*HARDEST):
    assert_same(results(case), expected)
for _ in range(20):
    assert_same(results(case), expected)
"""
    environment = python_environment | {"PYTHONPATH": ":".join([python_environment["PYTHONPATH"], *sys.path])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("workers", [ONE, NUMBAS])
def test_calls_of_threads_in_several_modes(choose_workers, workers):
    case = operands(40, np.float32)
    choose_workers(workers)
    expected = results(case)
    errors = []

    def call(names):
        try:
            with mode(*names):
                for _ in range(20):
                    assert_same(results(case), expected)
        # of any kind, in another thread
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(names,)) for names in MODES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@np.errstate(under="ignore")
def converted_operands():
    """Calls with operands that NumPy converts, and some beside them: x, dy, weight and bias."""
    rng = np.random.default_rng(20260101)
    x, dy = rng.standard_normal((2, 5, 40))
    weight, bias = rng.standard_normal((2, 40))
    integers = rng.integers(1 << 53, 1 << 62, (5, 40), np.int64) | 1
    small = x * 1e-310, dy * 1e-310, weight * 1e-310, bias * 1e-310
    cases = {
        "integers": (integers, integers[::-1], weight, bias),
        "lists": (integers.tolist(), integers[::-1].tolist(), weight.tolist(), bias.tolist()),
        "strided": (small[0][:, ::-1], small[1][:, ::-1], *small[2:]),
        "of the other byte order": tuple(array.astype(">f8") for array in small),
    }
    for dtype in (np.dtype(np.float32), BFLOAT16, np.dtype(np.float16)):
        tiny = TINY[dtype.name]
        parameters = (weight * tiny).astype(dtype), (bias * tiny).astype(dtype)
        cases[f"parameters of {dtype}"] = x, dy, *parameters
        cases[f"all of {dtype}"] = x.astype(dtype), dy.astype(dtype), *parameters
    return cases


CONVERTED = converted_operands()


@pytest.mark.parametrize("name", CONVERTED)
def test_conversions_of_operands(name):
    x, dy, weight, bias = CONVERTED[name]
    with np.errstate(under="ignore"):
        subnormal = np.full((5, 1), 1e-40, np.float32)

    def call():
        y, mean, rstd = nbnorm.layer_norm(x, 40, weight, bias, return_stats=True)
        return y, mean, rstd, *nbnorm.layer_norm_backward(dy, x, 40, weight, mean=subnormal, rstd=rstd)

    expected = call()
    for names in MODES:
        # more than once: the first call of a kind goes another way than those after it
        for _ in range(2):
            with mode(*names):
                actual = call()
            assert_same(actual, expected)


def test_a_state_that_is_converted(rng):
    state = {"weight": rng.standard_normal(40), "bias": rng.standard_normal(40) * 1e-40}
    layer = nbnorm.LayerNorm(40)
    for names in MODES:
        with mode(*names):
            layer.load_state_dict(state)
        for name, parameter in layer.state_dict().items():
            with np.errstate(under="ignore"):
                np.testing.assert_array_equal(parameter, state[name].astype(np.float32))


def test_a_call_without_rows_and_a_wrong_one_leave_the_mode():
    x = np.ones((4, 8), np.float32)
    for names in MODES:
        with mode(*names):
            nbnorm.layer_norm(x[:0], 8)
            with pytest.raises(ValueError, match="^x: "):
                nbnorm.layer_norm(x, 7)
            with pytest.raises(ValueError, match="^eps: "):
                nbnorm.layer_norm([[1 << 60, 2]], 2, eps=-1)
    assert control() == STANDARD


def test_flush_denormal_of_torch():
    torch = pytest.importorskip("torch")
    case = [torch.from_numpy(array) for array in operands(40, np.float32)]
    expected = [result.numpy() for result in results(case)]
    if not torch.set_flush_denormal(True):
        pytest.skip("torch has no flush-to-zero here")
    try:
        actual = [result.numpy() for result in results(case)]
        assert control() != STANDARD
    finally:
        torch.set_flush_denormal(False)
    assert_same(actual, expected)

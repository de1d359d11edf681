"""Are the bits the same at any thread count, in the serial and the parallel build, run after run, row by row?"""

import itertools

import numba
import numpy as np
import pytest

import nbnorm
from levels import deep
from nbnorm.cpu.workers.parallel import WORKERS

# for several blocks of the backward
ROWS = 203

# a vector and a rest; the shorter rows are normalised in pairs
CASES = [*itertools.product([np.float32], [37, 333]), *deep(*itertools.product([np.float64, np.float16], [37, 333]))]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def case(request, rng):
    dtype, cols = request.param
    with np.errstate(under="ignore"):
        x, dy = rng.standard_normal((2, ROWS, cols)).astype(dtype)
        weight, bias = rng.standard_normal((2, cols)).astype(dtype)
    # rows that need another arithmetic, but for float16: two together, one alone, the last one
    x[[3, 4, 10, ROWS - 1]] *= np.finfo(dtype).max / 100
    return x, dy, weight, bias


def results(case, use_diff_of_squares):
    x, dy, weight, bias = case
    y, mean, rstd = nbnorm.layer_norm(x, x.shape[1], weight, bias, 1e-5, use_diff_of_squares, return_stats=True)
    return y, mean, rstd, *nbnorm.layer_norm_backward(dy, x, x.shape[1], weight, 1e-5, use_diff_of_squares)


# kernels as plain Python do in our threads, to which `numpy.errstate` does not go
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("use_diff_of_squares", [False, *deep(True)])
def test_any_thread_count_and_workers(case, use_diff_of_squares, choose_workers):
    expected = results(case, use_diff_of_squares)
    threads = numba.get_num_threads()
    for workers in WORKERS:
        choose_workers(workers)
        for count in range(1, threads + 1):
            numba.set_num_threads(count)
            try:
                actual = results(case, use_diff_of_squares)
            finally:
                numba.set_num_threads(threads)
            for a, b in zip(actual, expected, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("use_diff_of_squares", [False, *deep(True)])
def test_a_row_does_not_depend_on_the_others(case, use_diff_of_squares):
    x, dy, weight, bias = case
    y, mean, rstd, dx, _, _ = results(case, use_diff_of_squares)
    for i in (0, 1, 3, 4, 5, 11, 100, 202):
        alone = results((x[i : i + 1], dy[i : i + 1], weight, bias), use_diff_of_squares)
        for a, b in zip(alone[:4], (y[i], mean[i], rstd[i], dx[i]), strict=True):
            np.testing.assert_array_equal(a[0], b)
    order = np.random.default_rng(1).permutation(ROWS)
    permuted = results((x[order], dy[order], weight, bias), use_diff_of_squares)
    for a, b in zip(permuted[:4], (y, mean, rstd, dx), strict=True):
        np.testing.assert_array_equal(a, b[order])


# kernels as plain Python do in our threads, to which `numpy.errstate` does not go
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("long_row", [1 << 16, *deep(0)])
@pytest.mark.parametrize("workers", WORKERS)
def test_whatever_new_memory_holds(case, monkeypatch, choose_workers, workers, long_row):
    choose_workers(workers)
    monkeypatch.setattr("nbnorm.cpu.sizes.LONG_ROW", long_row)
    # sums go from call to call, which begin in the middle of a block of rows
    monkeypatch.setattr("nbnorm.cpu.staging.BUFFER_ELEMENTS", 10 * case[0].shape[1])
    x, dy, weight, bias = case
    strided = np.concatenate([x, dy], 1)[:, : x.shape[1]]
    cases = [case, (strided, dy, weight, bias), (x[:1], dy[:1], weight, bias)]
    expected = [results(operands, False) for operands in cases]

    def full_of_nan(*arguments, empty=np.empty):
        array = empty(*arguments)
        array.reshape(-1).view(np.uint8).fill(255)
        return array

    monkeypatch.setattr(np, "empty", full_of_nan)
    monkeypatch.setattr("nbnorm.cpu.plans.empty", full_of_nan)
    for operands, values in zip(cases, expected, strict=True):
        for a, b in zip(results(operands, False), values, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("offset", [1, 2, 5, 9])
def test_any_alignment_of_whole_elements(case, offset):
    x, dy, weight, bias = case
    moved = np.empty(x.size + offset, x.dtype)[offset:].reshape(x.shape)
    moved[...] = x
    for a, b in zip(results((moved, dy, weight, bias), False), results(case, False), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("long_row", [1 << 16, *deep(0)])
@pytest.mark.parametrize("cols", [8, 16, 40, 1000])
@pytest.mark.parametrize("dtype", [np.float32, *deep(np.float64, np.float16)])
def test_written_past_the_caches(rng, monkeypatch, the_long_way, dtype, cols, long_row):
    monkeypatch.setattr("nbnorm.cpu.sizes.LONG_ROW", long_row)
    with np.errstate(under="ignore"):
        x, dy = rng.standard_normal((2, 37, cols)).astype(dtype)
        weight, bias = rng.standard_normal((2, cols)).astype(dtype)
    results = []
    for streamed_bytes in (1 << 24, 0):
        monkeypatch.setattr("nbnorm.cpu.sizes.STREAMED_BYTES", streamed_bytes)
        assert nbnorm.cpu.operands.is_streamed(np.empty_like(x), x) == (streamed_bytes == 0)
        y = nbnorm.layer_norm(x, cols, weight, bias)
        results.append((y, *nbnorm.layer_norm_backward(dy, x, cols, weight)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("long_row", [1 << 16, *deep(0)])
@pytest.mark.parametrize("cols", [8, 48, 136, 1000])
@pytest.mark.parametrize("dtype", [np.float32, *deep(np.float64, np.float16)])
def test_written_past_the_caches_wherever_a_line_begins(rng, monkeypatch, dtype, cols, long_row):
    monkeypatch.setattr("nbnorm.cpu.sizes.LONG_ROW", long_row)
    with np.errstate(under="ignore"):
        x, dy = rng.standard_normal((2, 7, cols)).astype(dtype)
        weight = rng.standard_normal(cols).astype(dtype)
    expected = nbnorm.layer_norm_backward(dy, x, cols, weight)
    monkeypatch.setattr("nbnorm.cpu.sizes.STREAMED_BYTES", 0)
    memory = np.empty(x.size + 256, dtype)
    begin = -memory.ctypes.data % 128 // memory.itemsize
    pieces = 16 // memory.itemsize
    for offset in range(begin, begin + 128 // memory.itemsize, pieces):
        dx = memory[offset : offset + x.size].reshape(x.shape)
        memory[:] = 7
        assert nbnorm.cpu.operands.is_streamed(dx, dy, x)
        for a, b in zip(nbnorm.layer_norm_backward(dy, x, cols, weight, out=(dx, None, None)), expected, strict=True):
            np.testing.assert_array_equal(a, b)
        assert (memory[:offset] == 7).all()
        assert (memory[offset + x.size :] == 7).all()


@pytest.mark.parametrize("shape", [(1, 21), (1, 1, 21), (21,)])
@pytest.mark.parametrize("long_row", [1 << 16, *deep(0)])
def test_one_row_of_a_wider_array_is_written_to_its_end(rng, monkeypatch, long_row, shape):
    # its pitch, to which there is no next row, is a multiple of 16 bytes; its length is not
    monkeypatch.setattr("nbnorm.cpu.sizes.LONG_ROW", long_row)
    monkeypatch.setattr("nbnorm.cpu.sizes.STREAMED_BYTES", 0)
    x, dy = rng.standard_normal((2, *shape), np.float32)
    out, dx = np.zeros((2, *(1,) * (len(shape) - 1), 24), np.float32)[..., :21]
    assert nbnorm.cpu.operands.is_ready(out)
    np.testing.assert_array_equal(nbnorm.layer_norm(x, 21, out=out), nbnorm.layer_norm(x, 21))
    expected = nbnorm.layer_norm_backward(dy, x, 21).dx
    np.testing.assert_array_equal(nbnorm.layer_norm_backward(dy, x, 21, out=(dx, None, None)).dx, expected)


def test_what_is_not_written_past_the_caches(monkeypatch):
    monkeypatch.setattr("nbnorm.cpu.sizes.STREAMED_BYTES", 0)
    memory = np.empty(33, np.float32)
    x = np.ones((4, 8), np.float32)
    assert not nbnorm.cpu.operands.is_streamed(memory[1:].reshape(4, 8), x)
    assert not nbnorm.cpu.operands.is_streamed(np.empty((4, 7), np.float32), x)
    assert not nbnorm.cpu.operands.is_streamed(np.empty((4, 16), np.float32)[:, ::2], x)
    assert not nbnorm.cpu.operands.is_streamed(x, x)

"""Is the temporary memory bounded, whatever the number of rows and columns? (test_apply measures the command line's.)"""

import platform
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import nbnorm
from levels import deep
from nbnorm.calls import checks
from nbnorm.calls.problem import ForwardCall
from nbnorm.cpu import memory, sizes, staging
from nbnorm.cpu.workers import blocks, parallel


def problem(rows, cols):
    return checks.forward(ForwardCall(np.broadcast_to(1.0, (rows, cols)), cols))[0]


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 1000, 1 << 30])
@pytest.mark.parametrize("cols", [1, 100, 1 << 14, 1 << 20, 1 << 25])
def test_sums_of_dweight_and_dbias(rows, cols):
    block_rows = sizes.block_rows(rows, cols)
    blocks = -(-rows // block_rows)
    assert block_rows >= sizes.MIN_BLOCK_ROWS
    assert blocks <= sizes.MAX_BLOCKS
    assert blocks == 1 or blocks * cols <= sizes.MAX_BLOCK_SUMS
    # enough of them for many threads where there are rows enough
    assert blocks >= min(32, rows // sizes.MIN_BLOCK_ROWS, sizes.MAX_BLOCK_SUMS // cols // 2)


@pytest.mark.parametrize(("rows", "cols"), [(1, 10), (1 << 30, 1), (1 << 20, 1000), (100, 1 << 25)])
def test_buffers(rows, cols):
    strided = np.broadcast_to(1.0, (rows, cols))
    limit = staging.block_limit(problem(rows, cols), 0, strided)
    assert limit == rows or limit == 1 or limit * cols <= staging.BUFFER_ELEMENTS
    assert limit == min(rows, max(1, staging.BUFFER_ELEMENTS // cols))


@pytest.mark.parametrize("cols", [100, 1 << 16, 1 << 20, 1 << 25])
def test_buffers_of_many_threads(monkeypatch, cols):
    monkeypatch.setattr(parallel, "our_threads", lambda: 500)
    case = problem(1 << 20, cols)
    limit = staging.block_limit(case, 0, np.broadcast_to(1.0, (1 << 20, cols)))
    count = blocks._sharers(case, limit, is_copied=True)
    assert count == 1 or count * limit * cols <= blocks.BUFFERS_ELEMENTS
    assert count == max(1, min(500, blocks.BUFFERS_ELEMENTS // (limit * cols)))


def test_arrays_that_are_ready_need_no_buffer():
    x = np.ones((1000, 1000), np.float32)
    case = checks.forward(ForwardCall(x, 1000))[0]
    assert staging.block_limit(case, 0, x) == 1000
    assert staging.buffer_for(x, case, 1000) is None


@pytest.mark.compiled
@pytest.mark.parametrize("layout", ["contiguous", "strided", "reversed", "overlapping forwards", "overlapping backwards"])
@pytest.mark.parametrize("dtype", [np.float32, *deep(np.float64, np.float16)])
@pytest.mark.parametrize("workers", [parallel.NUMBAS, parallel.OURS])
def test_a_call_takes_a_few_mebibytes(layout, dtype, workers, choose_workers):
    # or after a stall a second call would compile what the first had no use for
    choose_workers(workers)
    rows, cols = 40_000, 200
    memory = np.ones((2, rows + 1, cols + 1), dtype)
    x, out = memory[0, 1:, 1:].copy(), memory[1, 1:, 1:].copy()
    if layout == "strided":
        x, out = memory[:, 1:, 1:]
    elif layout == "reversed":
        x, out = x[::-1], out[::-1]
    elif layout == "overlapping forwards":
        x, out = memory[0, 1:], memory[0, :-1]
    elif layout == "overlapping backwards":
        x, out = memory[0, :-1], memory[0, 1:]
    dy = np.ones_like(x)
    weight = np.ones(x.shape[1], np.float32)
    for call in (
        lambda: nbnorm.layer_norm(x, x.shape[1], weight, weight, out=out),
        lambda: nbnorm.layer_norm_backward(dy, x, x.shape[1], weight, out=(out, None, None)),
    ):
        call()
        tracemalloc.start()
        try:
            call()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # x alone has 15 to 64 MB
        assert peak < 7 << 20


# the parallel build of long rows, which makes arrays of its own
GIVEN_BACK = """
import numpy as np
import nbnorm
from nbnorm.cpu.workers import parallel

parallel.from_elements, parallel.many, parallel._is_decided, parallel.STALL_SECONDS = 0, parallel.NUMBAS, True, np.inf
rng = np.random.default_rng(0)
for rows, cols in ((3, 300_000), (64, 262_144)):
    x, dy = rng.standard_normal((2, rows, cols), np.float32)
    grads = [nbnorm.layer_norm_backward(dy, x, cols) for _ in range(3)]
    for grad in grads:
        np.testing.assert_allclose(grad.dbias, dy.sum(0, dtype=np.float64), atol=1e-5)
"""


@pytest.mark.deep
@pytest.mark.compiled
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its allocator can be told to have one arena")
def test_what_a_kernel_has_given_back_it_does_not_use(python_environment):
    """Numba frees an array behind the last statement that names it, whatever points to it; in one arena, another thread gets
    it then.
    """
    environment = {**python_environment, "MALLOC_ARENA_MAX": "1", "NUMBA_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "error", "-c", GIVEN_BACK]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def nothing_kept(monkeypatch):
    monkeypatch.setattr(memory, "_kept", {})
    monkeypatch.setattr(memory, "SMALLEST", 1000)


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_of_a_result_is_used_again_only_when_nothing_refers_to_it(nothing_kept):
    dtype = np.dtype(np.float32)
    first = memory.empty((100, 100), dtype)
    first[...] = 1
    view = first[10:20].T
    del first
    second = memory.empty((100, 100), dtype)
    second[...] = 2
    assert (view == 1).all()
    where = address(view) - 10 * 400
    del view
    third = memory.empty((50, 100, 2), dtype)
    assert address(third) == where
    assert third.flags.writeable
    assert third.flags.c_contiguous
    assert (second == 2).all()


def test_small_results_are_not_kept(nothing_kept):
    assert memory.empty((10,), np.dtype(np.float32)).base is None
    assert memory.empty((1 << 15, 1 << 15), np.dtype(np.float32)).base is None
    assert not memory._kept


def test_what_is_kept_is_bounded(nothing_kept, monkeypatch):
    monkeypatch.setattr(memory, "KEPT_BYTES", 100_000)
    arrays = [memory.empty((size,), np.dtype(np.uint8)) for size in (40_000, 30_000, 30_000, 50_000, 20_000)]
    del arrays
    assert sum(size * len(blocks) for size, blocks in memory._kept.items()) <= 100_000
    assert memory._kept

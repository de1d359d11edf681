"""Do Numba's threads work on large calls in compiled code without Python being asked, and only while they may?"""

import ctypes
import time

import numpy as np
import pytest
from numba import njit

import nbnorm
from compiled_calls import assert_same, native, numbas_threads_work, without_python
from nbnorm.cpu.workers import parallel
from nbnorm.nopython import served, sharing

pytestmark = [pytest.mark.deep, pytest.mark.compiled]

CALLS = {
    "layer_norm": lambda dy, x, w: nbnorm.layer_norm(x, w.size, w, return_stats=True),
    "layer_norm_backward": lambda dy, x, w: nbnorm.layer_norm_backward(dy, x, w.size, w),
    "add_rms_norm": lambda dy, x, w: nbnorm.add_rms_norm(x, dy, w.size, w),
    "add_rms_norm_backward": lambda dy, x, w: nbnorm.add_rms_norm_backward(dy, dy, x, w.size, w),
}


@njit
def norm(x):
    return nbnorm.layer_norm(x, x.shape[1], use_diff_of_squares=True)


@pytest.fixture(autouse=True)
def numbas(monkeypatch):
    numbas_threads_work(monkeypatch)


@pytest.fixture
def x(rng):
    return rng.standard_normal((200, 768), dtype=np.float32)


@pytest.fixture
def clock(monkeypatch, x):
    """A clock by which every call of `norm` takes a second, and the calls of Python's that it makes."""
    norm(x)
    now, asked = [0], []

    def gettime(clock, result):
        now[0] += 1
        result[0], result[1] = now[0], 0
        return 0

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int64))(gettime)
    (table,) = (t for request, t in served._tables.items() if t.words[sharing.SHARED + 2])
    address = table.words[sharing.CLOCK]
    table.words[sharing.CLOCK] = ctypes.cast(kind, ctypes.c_void_p).value
    layer_norm = served.functional.layer_norm
    monkeypatch.setattr(served.functional, "layer_norm", lambda *call, **out: asked.append(1) or layer_norm(*call, **out))
    yield asked
    table.words[sharing.CLOCK] = address


@pytest.mark.parametrize(("cols", "dtype"), [(768, np.float32), (64, np.float64)])
@pytest.mark.parametrize("name", CALLS)
def test_without_python(rng, name, cols, dtype):
    function = CALLS[name]
    shape = 200_000 // cols, cols
    dy, x, w = (rng.standard_normal(size).astype(dtype) for size in (shape, shape, cols))
    compiled = njit(function)
    expected = function(dy, x, w)
    assert_same(native(compiled, dy, x, w), expected)
    assert 0 < parallel.native.worked < 60
    # Python is asked again where they may not
    parallel.native.is_open = 0
    with without_python(), pytest.raises(RuntimeError, match="NoneType"):
        compiled(dy, x, w)
    assert_same(compiled(dy, x, w), expected)


def test_a_stall_is_told(monkeypatch, clock, x):
    expected = norm(x)
    assert clock == []
    assert parallel.native.worked == pytest.approx(1)
    monkeypatch.setattr(parallel, "STALL_SECONDS", 5e-4)
    assert_same(norm(x), expected)
    assert clock == []
    assert (parallel.many, parallel.native.is_open) == (parallel.OURS, 0)
    assert parallel._paused_until > time.perf_counter() + 0.05
    # they pause, and Python makes the calls
    monkeypatch.setattr(parallel, "is_crowded", lambda: False)
    for _ in range(2):
        assert_same(norm(x), expected)
    assert (clock, parallel.native.is_open) == ([1, 1], 0)
    # their pause is over
    parallel._paused_until = 1e-9
    monkeypatch.setattr(parallel, "STALL_SECONDS", float("inf"))
    assert_same(norm(x), expected)
    assert (len(clock), parallel.native.is_open) == (3, 1)
    assert_same(norm(x), expected)
    assert len(clock) == 3


def test_what_they_have_worked_counts_for_the_next_pause(monkeypatch, clock, x):
    """Which is twice as long only where they have worked for less than that."""
    monkeypatch.setattr(parallel, "PAUSE_FOR_LOSS", 0)
    monkeypatch.setattr(parallel, "_pause", 3.0)
    monkeypatch.setattr(parallel, "_paused_until", 1e-9)
    norm(x)
    monkeypatch.setattr(parallel, "STALL_SECONDS", 5e-4)
    norm(x)
    assert parallel._pause == parallel.PAUSE
    assert parallel.native.worked == 0


def test_a_system_without_such_a_clock(monkeypatch, clock, x):
    (table,) = (t for t in served._tables.values() if t.words[sharing.SHARED + 2])
    parallel.native.is_open = 0
    table.words[sharing.CLOCK] = 0
    for _ in range(2):
        norm(x)
    assert (clock, parallel.native.is_open) == ([1, 1], 0)

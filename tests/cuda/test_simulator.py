"""Does the simulator notice threads that wait for others in vain, and no others?"""

import numpy as np
import pytest
from numba import types

import simulator
from nbnorm.cuda.kernels.reduce import ALL_LANES

pytestmark = pytest.mark.hardware

THREADS = 70


def run(monkeypatch, kernel, order="forward"):
    """What each thread of a block writes, with the threads in this order."""
    out = simulator.cuda.to_device(np.zeros(THREADS, np.int32))
    monkeypatch.setattr(simulator, "order", order)
    signature = types.void(types.CPointer(types.int32))
    simulator.run(kernel, signature, 1, THREADS, out.device_ctypes_pointer)
    return out.copy_to_host()


def neighbours(out):
    """Shuffles in three warps, of which the last is not full, around barriers that some threads never come to."""
    i = simulator.cuda.threadIdx.x
    out[i] = simulator.shfl_xor_sync(ALL_LANES, i, 1)
    if i >= 64:
        return
    simulator.syncthreads()
    of_another_warp = out[i ^ 32]
    simulator.syncthreads()
    out[i] += 100 * simulator.shfl_xor_sync(ALL_LANES, of_another_warp, 2)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_threads_meet(monkeypatch, order):
    i = np.arange(THREADS)
    expected = np.where(i < 64, (i ^ 1) + 100 * (i ^ 32 ^ 2 ^ 1), i ^ 1)
    np.testing.assert_array_equal(run(monkeypatch, neighbours, order), expected)


def shuffle_of_some(out):
    i = simulator.cuda.threadIdx.x
    if i != 40:
        simulator.shfl_xor_sync(ALL_LANES, i, 1)
    simulator.syncthreads()


def test_a_shuffle_that_a_lane_never_comes_to(monkeypatch):
    with pytest.raises(simulator.Deadlock) as caught:
        run(monkeypatch, shuffle_of_some)
    assert "lanes 0xfffffeff of warp 1 wait at shfl_xor_sync of lanes 0xffffffff: test_simulator.py:" in str(caught.value)
    assert "lanes 0x00000100 of warp 1 wait at syncthreads" in str(caught.value)


def not_in_its_mask(out):
    simulator.any_sync(0xFFFF, True)


def test_a_lane_that_is_not_in_its_own_mask(monkeypatch):
    with pytest.raises(RuntimeError, match=r"block 0, thread 16: .*lane 16 is not in its own mask"):
        run(monkeypatch, not_in_its_mask)

"""The CUDA tests run on a device or in the simulator, for which a test starts a process of its own."""

import ctypes
import itertools
from contextlib import nullcontext

import numba
import pytest

import offline

IS_SIMULATED = bool(numba.config.ENABLE_CUDASIM)
# the header of the run says what is missing
collect_ignore = [] if offline.missing() is None else ["test_compiled.py"]

if IS_SIMULATED:
    import simulator

    simulator.install()

    from nbnorm import checks
    from nbnorm.cuda import arrays, combine, kernels, launch, rows, sizes

    def prepare(kernel, signature, device, blocks, threads):
        return lambda stream, *arguments: simulator.run(kernel, signature, blocks, threads, *arguments)

    def aligned(access_memory):
        """As the operation, where the addresses are what accesses of that many elements need: a device faults elsewhere."""

        def checked(values, k, memory, at, width, access, *rounds_pairs):
            itemsize = memory.array.itemsize
            address = memory.array.ctypes.data + (memory.origin + at) * itemsize
            assert address % min(16, access * itemsize) == 0, f"{access} elements at {address:#x}"
            assert width % access == 0, f"{width} elements by {access}"
            access_memory(values, k, memory, at, width, access, *rounds_pairs)

        return checked

    for module, name in itertools.product((combine, kernels, rows), ("load", "fetch", "store")):
        if hasattr(module, name):
            setattr(module, name, aligned(getattr(module, name)))
    launch.prepare = prepare
    launch.compute_capability = lambda device: (9, 0)
    launch.stream_object = lambda handle, device: handle
    launch.on = lambda device: nullcontext()
    launch.current_device = lambda: 0
    launch.fill = lambda view, byte, stream: ctypes.memset(view.address, byte, view.size * view.itemsize)
    checks.has_numba_cuda = lambda: True


@pytest.fixture(params=["forward", "reverse", "random"] if IS_SIMULATED else [None])
def order(request, monkeypatch):
    """The order of blocks and threads, which a device chooses itself."""
    if IS_SIMULATED:
        monkeypatch.setattr(simulator, "order", request.param)


@pytest.fixture
def short_segments(monkeypatch):
    """Columns of a row that no block holds: in the simulator none of two warps, which it is through with sooner."""
    if not IS_SIMULATED:
        return 32776
    monkeypatch.setattr(sizes, "MOST_THREADS", {"forward": 64, "backward": 64})
    return 2052


@pytest.fixture(autouse=True)
def arrays_of_one_test():
    yield
    if IS_SIMULATED:
        simulator.forget()
        # the memory that calls work in is of that test too
        vars(arrays._kept).clear()

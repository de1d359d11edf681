"""The CUDA tests run on a device, as PTX or in the simulator, for which two a test starts processes of their own."""

import ctypes
import itertools
import zlib
from contextlib import nullcontext

import pytest

import device
import offline

ORDERS = ("forward", "reverse", "random")
# the header of the run says what is missing
collect_ignore = [] if offline.missing() is None else ["test_compiled.py", "test_steps.py"]
collect_ignore += [] if device.LEVEL == "ptx" else ["test_variants.py", "test_broken.py"]
# a block of 1024 threads takes the simulator a minute; its own tests are of nothing else
collect_ignore += ["test_ends.py"] if device.LEVEL == "simulator" else ["test_simulator.py"]

if device.LEVEL == "ptx":
    import ptx_device as level

    level.capability = tuple(map(int, device.PTX.split(".")))
    level.install()

if device.LEVEL == "simulator":
    import simulator as level

    level.install()

    from nbnorm.calls import checks
    from nbnorm.cuda import launch, sizes
    from nbnorm.cuda.kernels import combine, gradients, rows, statistics, whole_rows

    def prepare(kernel, signature, device, blocks, threads):
        return lambda stream, *arguments: level.run(kernel, signature, blocks, threads, *arguments)

    def aligned(access_memory):
        """As the operation, where the addresses are what accesses of that many elements need: a device faults elsewhere."""

        def checked(values, k, memory, at, width, access, *rounds_pairs):
            itemsize = memory.array.itemsize
            address = memory.address + at * itemsize
            assert address % min(16, access * itemsize) == 0, f"{access} elements at {address:#x}"
            assert width % access == 0, f"{width} elements by {access}"
            access_memory(values, k, memory, at, width, access, *rounds_pairs)

        return checked

    for module, name in itertools.product((combine, gradients, rows, statistics, whole_rows), ("load", "fetch", "store")):
        if hasattr(module, name):
            setattr(module, name, aligned(getattr(module, name)))
    launch.prepare = prepare
    launch.compute_capability = lambda device: (9, 0)
    launch.stream_object = lambda handle, device: handle
    launch.on = lambda device: nullcontext()
    launch.current_device = lambda: 0
    launch.fill = lambda view, byte, stream: ctypes.memset(view.address, byte, view.size * view.itemsize)
    checks.has_numba_cuda = lambda: True
    # of a backward of few rows, most threads are those that add up the groups: two warps of a block do it as four would
    sizes.MOST_ADDING_WARPS = 2

if device.LEVEL != "device":
    from nbnorm.cuda import arrays


@pytest.fixture(params={"device": [None], "simulator": ["random"], "ptx": ORDERS}[device.LEVEL])
def order(request, monkeypatch):
    """The order of blocks and threads, which a device chooses itself; the simulator's other tests have the first of them."""
    if request.param:
        monkeypatch.setattr(level, "order", request.param)


@pytest.fixture(autouse=True)
def what_a_device_leaves_open(request, monkeypatch):
    """Which thread is first, and which way an approximate instruction is off: each test has its own, always the same."""
    if device.LEVEL == "ptx":
        drawn = zlib.crc32(request.node.nodeid.encode())
        monkeypatch.setattr(level, "order", ORDERS[drawn % 3])
        monkeypatch.setattr(level, "rounding", (1, -1)[drawn // 3 % 2])


@pytest.fixture
def short_segments(monkeypatch):
    """Columns of a row that no block holds: in the simulator none of two warps, which it is through with sooner."""
    if device.LEVEL != "simulator":
        return 32776
    monkeypatch.setattr(sizes, "MOST_THREADS", {"forward": 64, "backward": 64})
    return 2052


@pytest.fixture(autouse=True)
def arrays_of_one_test():
    yield
    if device.LEVEL == "simulator":
        level.forget()
    if device.LEVEL != "device":
        # the memory that calls work in is of that test too
        vars(arrays._kept).clear()
    if device.LEVEL == "ptx":
        level.launches.clear()

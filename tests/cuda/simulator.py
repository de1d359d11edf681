"""CUDA kernels as plain Python: each thread is a greenlet, and runs alone until it waits for others or ends.

The arrays are those of Numba's own simulator, which has a thread of the system for each CUDA thread, and no warps.
"""

import contextvars
import ctypes
import functools
import heapq
import inspect
import random
import sys
import traceback
from collections import defaultdict
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
from greenlet import getcurrent, greenlet
from numba import cuda, types
from numba.cuda.simulator.cudadrv import devicearray
from numba.np.numpy_support import as_dtype

WARP = 32
ALL_LANES = 0xFFFFFFFF
# what kernels declare as integers, as their STORAGE says
FLOATS_OF_16_BITS = {types.uint16: np.dtype(np.float16), types.int16: np.dtype(ml_dtypes.bfloat16)}

# which block is first, and which of the threads that can go on: "forward", "reverse" or "random". So one warp runs far
# ahead of another where no barrier holds it back, and a barrier that is missing shows in one order or another
order = "forward"
# start, end and array; the array keeps the memory
allocations: list[tuple[int, int, Any]] = []
# a context in which NumPy does not warn: to copy it takes a tenth of what np.errstate does
IGNORING = contextvars.copy_context()
IGNORING.run(np.seterr, all="ignore")


class Deadlock(RuntimeError):  # noqa: N818  the usual word
    """Threads wait for others that never arrive."""


class Memory:
    """A pointer to element `origin` of a flat array: indices count from there, and none is outside the array.

    `address` is the pointer, where it is one to what was allocated.
    """

    __slots__ = ("address", "array", "origin", "size")

    def __init__(self, array, origin=0, address=None):
        self.address = address
        self.array = array
        self.origin = origin
        self.size = array.size

    def __getitem__(self, at):
        # most are of one element, of a thread's own array
        if type(at) is int and 0 <= (element := at + self.origin) < self.size:
            return self.array[element]
        return self.array[self._checked(at)]

    def __setitem__(self, at, value):
        if type(at) is int and 0 <= (element := at + self.origin) < self.size:
            self.array[element] = value
        else:
            self.array[self._checked(at)] = value

    def _checked(self, at):
        if isinstance(at, slice):
            first, end = at.start + self.origin, at.stop + self.origin
            if at.step is None and 0 <= first <= end <= self.size:
                return slice(first, end)
        elif 0 <= at + self.origin < self.size:
            return at + self.origin
        raise IndexError(f"{at} is not within elements {-self.origin} to {self.size - self.origin - 1}")


class Thread(greenlet):
    """A CUDA thread, by its number in its block."""

    def __init__(self, block, number):
        super().__init__()
        # NumPy's setting is that of one greenlet
        self.gr_context = IGNORING.copy()
        self.block = block
        self.number = number
        self.warp, self.lane = divmod(number, WARP)

    def run(self, kernel, arguments):
        try:
            kernel(*arguments)
        except Exception as error:
            raise RuntimeError(f"block {self.block.number}, thread {self.number}: {error!r}") from error
        self.block.leave()

    def meet(self, kind, warp, mask, awaited, value=None):
        """Wait for so many threads; then what each has brought, by its number.

        All lanes of the warp in `mask`, or, where that is None, all of the block.
        """
        block, place = self.block, (kind, warp, mask)
        arrived = block.meetings.get(place)
        if arrived is None:
            arrived = block.meetings[place] = {}
        arrived[self.number] = value
        if len(arrived) == awaited:
            block.end(place)
        # from thread to thread at once, but for one that has not begun: it would take on how deep this one's calls are
        thread = block.threads[block.ready[0][1]] if block.ready else None
        if not thread:
            self.parent.switch()
        else:
            heapq.heappop(block.ready)
            if thread is not self:
                thread.switch()
        return arrived

    def place(self):
        """The lines where it waits, the kernel's own first."""
        stack = traceback.walk_stack(self.gr_frame)
        lines = [f"{Path(f.f_code.co_filename).name}:{line}" for f, line in stack if f.f_globals is not globals()]
        return ", ".join(reversed(lines))


class Block:
    def __init__(self, number, size, priority):
        self.number = number
        self.size = size
        self.priority = priority
        self.threads = [Thread(self, n) for n in range(size)]
        self.running = size
        # by priority, of those that can go on
        self.ready = []
        self.shared = {}
        # what each thread that waits has brought, by its number
        self.meetings = {}
        # the lanes of a warp that are in a mask, and how many
        self.present = {}

    def run(self, kernel, arguments):
        self.make_ready(range(self.size))
        try:
            while self.ready:
                thread = self.threads[heapq.heappop(self.ready)[1]]
                # those that have begun take no arguments
                thread.switch() if thread else thread.switch(kernel, arguments)
            if self.running:
                raise Deadlock(self.waiting())
        finally:
            for thread in self.threads:
                if not thread.dead:
                    thread.throw()

    def make_ready(self, numbers):
        for number in numbers:
            heapq.heappush(self.ready, (self.priority(number), number))

    def end(self, place):
        self.make_ready(self.meetings.pop(place))

    def leave(self):
        """Threads that have ended are not waited for at a barrier, but are in a mask."""
        self.running -= 1
        for place, arrived in list(self.meetings.items()):
            if place[2] is None and len(arrived) == self.running:
                self.end(place)

    def waiting(self):
        """Which threads wait, and where."""
        meetings = {number: place for place, arrived in self.meetings.items() for number in arrived}
        lanes = defaultdict(int)
        for thread in self.threads:
            state = "have ended"
            if not thread.dead:
                kind, _, mask = meetings[thread.number]
                state = f"wait at {kind if mask is None else f'{kind} of lanes {mask:#010x}'}: {thread.place()}"
            lanes[thread.number // WARP, state] |= 1 << thread.number % WARP
        lines = [f"lanes {found:#010x} of warp {warp} {state}" for (warp, state), found in lanes.items()]
        return "\n  ".join([f"no thread of block {self.number} can go on", *lines])


class Index:
    """`cuda.threadIdx` and the like: `of` is a function of the current thread."""

    def __init__(self, of):
        self.of = of

    @property
    def x(self):
        return self.of(getcurrent())


def install():
    """Take the place of `numba.cuda`, before kernels are imported."""
    cuda.jit = jit
    cuda.threadIdx = Index(attrgetter("number"))
    cuda.blockIdx = Index(attrgetter("block.number"))
    cuda.blockDim = Index(attrgetter("block.size"))
    cuda.shared = SimpleNamespace(array=shared_array)
    cuda.local = SimpleNamespace(array=local_array)
    for function in (syncthreads, syncwarp, shfl_xor_sync, any_sync):
        setattr(cuda, function.__name__, function)
    to_device, device_array = devicearray.to_device, devicearray.device_array
    array_type = devicearray.FakeCUDAArray
    array_type.device_ctypes_pointer = property(lambda array: ctypes.c_void_p(array._ary.ctypes.data))
    array_type.view = lambda array, dtype: array_type(array._ary.view(dtype))
    array_type.gpu_data = SimpleNamespace(_view=SimpleNamespace(context=SimpleNamespace(device=SimpleNamespace(id=0))))
    cuda.to_device = lambda *arguments, **options: _known(to_device(*arguments, **options))
    cuda.device_array = lambda *arguments, **options: _known(_unwritten(device_array(*arguments, **options)))
    # what `device_array_like` calls
    devicearray.device_array = cuda.device_array


def run(kernel, signature, blocks, threads, *arguments):
    """The kernel on a grid of one dimension: of each argument the signature says what it is."""
    if len(arguments) != sum(getattr(kind, "count", 1) for kind in signature.args):
        raise TypeError(f"{len(arguments)} arguments for {signature}")
    remaining = iter(arguments)
    converted = [_converted(kind, remaining) for kind in signature.args]
    generator = random.Random(0)
    priorities = {"forward": lambda n: n, "reverse": lambda n: -n, "random": lambda n: generator.random()}
    for number in sorted(range(blocks), key=priorities[order]):
        Block(number, threads, priorities[order]).run(kernel, converted)


def forget():
    """Let go of all arrays; kernels take none that was allocated before."""
    allocations.clear()


def jit(function=None, *arguments, **options):
    """A decorator, with or without arguments, that leaves a function as it is."""
    return function if inspect.isfunction(function) else lambda function: function


def shared_array(shape, dtype):
    """One array for a block's threads that are at the same place of the code."""
    caller = sys._getframe(1)
    place = caller.f_code, caller.f_lasti
    arrays = getcurrent().block.shared
    if place not in arrays:
        arrays[place] = local_array(shape, dtype)
    return arrays[place]


def local_array(shape, dtype):
    return Memory(_unwritten_of(shape, dtype).copy())


def syncthreads():
    thread = getcurrent()
    thread.meet("syncthreads", None, None, thread.block.running)


def syncwarp(mask=ALL_LANES):
    _gathered(getcurrent(), "syncwarp", mask)


def shfl_xor_sync(mask, value, lane_mask):
    thread = getcurrent()
    return _gathered(thread, "shfl_xor_sync", mask, value).get(thread.number ^ lane_mask, value)


def any_sync(mask, predicate):
    return any(_gathered(getcurrent(), "any_sync", mask, predicate).values())


def _gathered(thread, kind, mask, value=None):
    """What the lanes of the mask bring, by their numbers in the block; there are none beyond its size."""
    block, warp = thread.block, thread.warp
    found = block.present.get((warp, mask))
    if found is None:
        present = mask & ALL_LANES & ((1 << block.size - warp * WARP) - 1)
        found = block.present[warp, mask] = present, present.bit_count()
    present, awaited = found
    if not present >> thread.lane & 1:
        raise ValueError(f"lane {thread.lane} is not in its own mask, {present:#010x}")
    return thread.meet(kind, warp, present, awaited, value)


def _converted(kind, remaining):
    """The next argument, or for a tuple the next few."""
    if isinstance(kind, types.BaseTuple):
        return tuple(_converted(part, remaining) for part in kind.types)
    argument = next(remaining)
    # ctypes' numbers have one
    value = getattr(argument, "value", argument)
    if isinstance(kind, types.CPointer):
        return _memory(value, kind.dtype) if value else None
    if isinstance(kind, types.Boolean):
        return bool(value)
    return as_dtype(kind).type(value) if isinstance(kind, types.Float) else value


def _memory(address, element):
    """All of the allocation that has the address, seen from there."""
    found = [allocation for allocation in allocations if allocation[0] <= address < allocation[1]]
    if not found:
        raise ValueError(f"{address:#x} is in no array that was allocated since the last `forget`")
    ((start, end, array),) = found
    dtype = as_dtype(element)
    # integers are only what was allocated as such
    if array.dtype != dtype:
        dtype = FLOATS_OF_16_BITS.get(element, dtype)
    before, shift = divmod(address - start, dtype.itemsize)
    size = (end - start - shift) // dtype.itemsize
    content = (ctypes.c_byte * (size * dtype.itemsize)).from_address(start + shift)
    return Memory(np.ndarray(size, dtype, content), before, address)


def _known(array):
    # there is none where `to_device` was given one to copy to
    if array is not None:
        allocations.append((*np.lib.array_utils.byte_bounds(array._ary), array))
    return array


@functools.cache
def _unwritten_of(shape, dtype):
    return _unwritten(np.empty(shape, dtype))


def _unwritten(array):
    """The array, full of NaN."""
    ctypes.memset(array.ctypes.data, 0xFF, array.nbytes)
    return array

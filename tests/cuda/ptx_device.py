"""A device that is not there: its memory is the host's, and a launch runs, on `ptx_machine`, the PTX that is built for it.

`install` replaces what nbnorm and the tests ask of the driver. All else of a call is as on a device: the checks, the layout,
the choice of kernels, the workspaces, and the numbers that a kernel is handed.
"""

import ctypes
from contextlib import contextmanager, nullcontext

import numpy as np
from numba import cuda

import offline
import ptx_machine
from nbnorm import cuda as nbnorm_cuda
from nbnorm.calls import checks
from nbnorm.cuda import arrays, launch, plans

# of an allocation's address, as the driver gives them; and bytes around it that nothing may touch
ALIGNMENT = 256

capability = (9, 0)
# in which order threads run, and which way an approximate instruction is off
order = "forward"
rounding = 1
# each launch: the kernel, its blocks and threads, and what it did of each kind
launches: list = []
_calls: list["Call"] = []


class Array:
    """As much of Numba's device array as the tests use, with NumPy's array for its memory."""

    def __init__(self, host):
        self._ary = host
        self.shape, self.strides, self.dtype = host.shape, host.strides, host.dtype
        self.ndim, self.size, self.nbytes = host.ndim, host.size, host.nbytes
        self.stream = 0
        address = host.ctypes.data if host.size else 0
        self.device_ctypes_pointer = ctypes.c_void_p(address)
        place = {"shape": host.shape, "strides": host.strides, "typestr": host.dtype.str, "data": (address, False)}
        self.__cuda_array_interface__ = place | {"version": 3}

    def __getitem__(self, index):
        return Array(self._ary[index])

    def view(self, dtype):
        return Array(self._ary.view(dtype))

    def reshape(self, *shape):
        return Array(self._ary.reshape(*shape, copy=False))

    def copy_to_host(self):
        return self._ary.copy()

    def copy_to_device(self, source):
        self._ary[...] = getattr(source, "_ary", source)


class Call:
    """What the kernels of one call may touch: its operands, to read, and its outs and what it allocates, also to write."""

    def __init__(self, operands, outs):
        self.operands, self.outs = operands, outs
        self.allocated = []

    def regions(self, is_to_write):
        """Of what may be touched at all, or written, the first address of each and the one behind its last."""
        given = self.outs if is_to_write else [*self.operands, *self.outs]
        views = [arrays.view(array, arrays.kind(array)) for array in given if array is not None]
        return _joined([*map(_runs, views), *self.allocated])

    def memory(self):
        memory = ptx_machine.Memory()
        for is_to_write in (False, True):
            for start, stop in self.regions(is_to_write):
                memory.add(start, stop - start, is_to_write)
        return memory


def install():
    """Take the place of the driver, for nbnorm and for tests."""
    cuda.to_device = to_device
    cuda.device_array = device_array
    cuda.device_array_like = lambda like: device_array(like.shape, like.dtype)
    cuda.gpus = [nullcontext()]
    checks.cuda_fault = lambda: None
    arrays.device_of = lambda address: 0
    arrays.workspace = _given_anew(arrays.workspace)
    launch.compute_capability = lambda device: capability
    launch.prepare = prepare
    launch.fill = fill
    launch.stream_object = lambda handle, device: handle
    launch.on = lambda device: nullcontext()
    launch.current_device = lambda: 0
    launch.is_captured = lambda handle: False
    plans.forward = _in_a_call(plans.forward, _of_forward)
    plans.backward = _in_a_call(plans.backward, _of_backward)
    nbnorm_cuda.forward = _in_a_call(nbnorm_cuda.forward, lambda *checked: _of_forward(checked[-1]))
    nbnorm_cuda.backward = _in_a_call(nbnorm_cuda.backward, lambda *checked: _of_backward(checked[-1]))


def to_device(host, stream=0):
    array = _allocated(host.shape, host.dtype)
    array.copy_to_device(host)
    return array


def device_array(shape, dtype=np.float64, stream=0):
    """Full of NaN, and for the call that asks for it to write."""
    array = _allocated(shape, np.dtype(dtype))
    if _calls:
        _calls[-1].allocated.append(_runs(arrays.view(array, "interface")))
    return array


def prepare(kernel, signature, device, blocks, threads):
    text = offline.ptx(kernel, signature, capability)

    def enqueue(stream, *arguments):
        memory = _calls[-1].memory()
        counts = ptx_machine.run(
            text, blocks, threads, list(map(_scalar, arguments)), memory, order=order, rounding=rounding
        )
        launches.append((kernel, blocks, threads, counts))

    return enqueue


def fill(view, byte, stream):
    start, stop = (end.item() for end in _runs(view))
    if not any(first <= start and stop <= end for first, end in _calls[-1].regions(is_to_write=True)):
        raise ptx_machine.Fault(f"a fill of {start:#x} to {stop:#x}, which is not for the call to write")
    ctypes.memset(start, byte, stop - start)


def _scalar(argument):
    """What `cuda.core.launch` makes of it, by its Python type."""
    if isinstance(argument, bool):
        return np.bool_(argument)
    if isinstance(argument, int):
        return np.int64(argument)
    return {ctypes.c_float: np.float32, ctypes.c_double: np.float64}[type(argument)](argument.value)


def _allocated(shape, dtype):
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.full(size + 3 * ALIGNMENT, 0xFF, np.uint8)
    start = ALIGNMENT + -memory.ctypes.data % ALIGNMENT
    return Array(memory[start : start + size].view(dtype).reshape(shape))


def _given_anew(workspace):
    def of_a_call(size, dtype, *place):
        """As much as was asked for, and nothing in it, also of memory that is kept."""
        array = workspace(size, dtype, *place)
        start, length = array.device_ctypes_pointer.value or 0, size * dtype.itemsize
        ctypes.memset(start, 0xFF, length)
        if _calls:
            _calls[-1].allocated.append((np.array([start]), np.array([start + length])))
        return array

    return of_a_call


def _in_a_call(function, operands_and_outs):
    def in_a_call(*arguments):
        with _given(*operands_and_outs(*arguments)):
            return function(*arguments)

    return in_a_call


@contextmanager
def _given(operands, outs):
    _calls.append(Call(operands, outs))
    try:
        yield
    finally:
        _calls.pop()


def _of_forward(call):
    return (call.x, call.residual, call.weight, call.bias), (call.out, None if call.total_out is False else call.total_out)


def _of_backward(call):
    return (call.dy, call.dtotal, call.x, call.weight, call.mean, call.rstd), call.out or ()


def _runs(view):
    """Where the memory of an array's elements begins and ends, each time that there is none between them."""
    starts, size = np.array([view.address]), view.itemsize
    for extent, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if stride == size and starts.size == 1:
            size *= extent
        elif extent != 1:
            starts = (starts[:, None] + stride * np.arange(extent)).ravel()
    return starts, starts + size


def _joined(runs):
    """The same memory in as few pieces as there are: the first address of each, and the one behind its last."""
    if not runs:
        return
    starts, stops = (np.concatenate(ends) for ends in zip(*runs, strict=True))
    edges, at = np.unique(np.concatenate([starts, stops]), return_inverse=True)
    # how many runs there are behind each edge
    depth = np.zeros(edges.size, np.int64)
    np.add.at(depth, at, np.repeat([1, -1], starts.size))
    changes = np.flatnonzero(np.diff(np.cumsum(depth) > 0, prepend=False))
    yield from zip(edges[changes[::2]].tolist(), edges[changes[1::2]].tolist(), strict=True)

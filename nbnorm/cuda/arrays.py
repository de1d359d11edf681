"""CUDA arrays of each library: told apart and looked at without importing it, and new ones made as its own."""

import functools
import sys
import threading
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np

from nbnorm.calls import stand_ins
from nbnorm.calls.arrays import bfloat16
from nbnorm.cuda import launch

# the addresses of the stream that all threads' work is in order on
DEFAULT_STREAMS = (0, 1)
# bytes of a workspace that are kept at most, for each device and thread
KEPT = 1 << 25
_kept = threading.local()
_captured: list[Any] = []


class BFloat16(NamedTuple):
    """As much of a dtype as is needed of one that NumPy has not; the libraries each have their own."""

    name: str = "bfloat16"
    kind: str = "f"
    itemsize: int = 2
    isnative: bool = True
    str: str = "bfloat16"

    def __str__(self):
        return self.name


BFLOAT16 = BFloat16()


class View(NamedTuple):
    """An array's memory: its address, and the rest as NumPy's arrays have it, the strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    device: int
    writeable: bool = True

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def size(self):
        return int(np.prod(self.shape, dtype=object))

    @property
    def itemsize(self):
        return self.dtype.itemsize

    @property
    def flags(self):
        return self

    @property
    def __array_interface__(self):
        """For `numpy.shares_memory`, which reads nothing there."""
        place = {"data": (self.address, True), "shape": self.shape, "strides": self.strides}
        return {"typestr": f"|V{self.itemsize}", "version": 3, **place}

    @property
    def span(self):
        """The address of its first byte, and the one behind its last."""
        steps = [stride * (size - 1) for stride, size in zip(self.strides, self.shape, strict=True)]
        start = self.address + sum(step for step in steps if step < 0)
        return start, self.address + sum(step for step in steps if step > 0) + (self.itemsize if self.size else 0)


def kind(array):
    """Whose array it is: "torch", "cupy", "numba", or "interface" for others with a `__cuda_array_interface__`."""
    array_type: Any = type(array)
    return _kind(array_type)


@functools.lru_cache(maxsize=64)
def _kind(array_type):
    if hasattr(array_type, "data_ptr"):
        return "torch"
    if hasattr(array_type, "__cuda_ndarray__"):
        return "numba"
    return "cupy" if array_type.__module__.partition(".")[0] == "cupy" else "interface"


def view(array, array_kind):
    """The array's memory."""
    if array_kind == "torch":
        if array.is_neg():
            raise TypeError("its negative bit is set; expected an array that is as its memory is, such as by resolve_neg()")
        itemsize, address = array.element_size(), array.data_ptr()
        strides = tuple(stride * itemsize for stride in array.stride())
        if address == 0 and array.numel() > 0:
            raise TypeError("it has no memory; of a ZeroTensor, pass the clone")
        return View(address, tuple(array.shape), strides, dtype_of(array.dtype), array.get_device())
    if array_kind == "cupy":
        return View(array.data.ptr, array.shape, array.strides, dtype_of(array.dtype), array.data.device_id)
    if array_kind == "numba":
        address = array.device_ctypes_pointer.value or 0
        return View(address, tuple(array.shape), array.strides, dtype_of(array.dtype), numba_device(array))
    interface = array.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise TypeError("it has a mask; expected an array without one")
    address, is_read_only = interface["data"]
    own_dtype = getattr(array, "dtype", None)
    # NumPy's name for bfloat16 is that of any two bytes
    dtype = BFLOAT16 if getattr(own_dtype, "name", None) == "bfloat16" else np.dtype(interface["typestr"])
    shape = tuple(interface["shape"])
    strides = interface.get("strides") or contiguous_strides(shape, dtype.itemsize)
    return View(address or 0, shape, tuple(strides), dtype, device_of(address), not is_read_only)


def dtype_of(dtype):
    """NumPy's dtype, or BFLOAT16, for a dtype of NumPy's or torch's."""
    name = getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")
    if name == "bfloat16":
        return BFLOAT16
    # its name does not tell the byte order
    return dtype if isinstance(dtype, np.dtype) else np.dtype(name)


def device_of(address):
    """The device of the memory at an address; 0 for that of an empty array."""
    if not address:
        return 0
    from cuda.bindings import driver

    error, device = driver.cuPointerGetAttribute(driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise ValueError(f"its address {address:#x} is no device memory: {error.name}")
    return int(device)


def contiguous_strides(shape, itemsize):
    """In bytes, of an array in C order."""
    strides: list[int] = []
    for size in reversed(shape):
        strides.insert(0, itemsize)
        itemsize *= max(1, size)
    return tuple(strides)


def address(array, array_kind):
    if array_kind == "torch":
        return array.data_ptr()
    if array_kind == "cupy":
        return array.data.ptr
    if array_kind == "numba":
        return array.device_ctypes_pointer.value or 0
    return array.__cuda_array_interface__["data"][0] or 0


def signature(array, array_kind):
    """The address, and all else that the checks and a kernel's choice depend on, as the library has it at hand."""
    if array_kind == "torch":
        torch = sys.modules["torch"]
        is_recorded = array.requires_grad and torch.is_grad_enabled()
        is_locked = array.is_inference() and not torch.is_inference_mode_enabled()
        seen = array.shape, array.stride(), array.dtype, array.device, is_recorded, is_locked, array.is_neg()
        return array.data_ptr(), seen
    if array_kind == "cupy":
        data = array.data
        return data.ptr, (array.shape, array.strides, array.dtype, data.device_id)
    if array_kind == "numba":
        return array.device_ctypes_pointer.value or 0, (array.shape, array.strides, array.dtype, numba_device(array))
    seen = view(array, array_kind)
    return seen.address, (*seen[1:3], seen.dtype.str, *seen[4:])


def numba_device(array):
    memory = array.gpu_data
    # of memory that is another library's, Numba says that it is on the device that was the current one
    if not hasattr(memory, "_view"):
        return device_of(array.device_ctypes_pointer.value)
    # past what hands on every attribute, in 0.7 us
    return memory._view.context.device.id


def is_recording():
    """Whether torch may be recording derivatives forwards, or a graph of calls, which a tensor does not show cheaply."""
    return sys.modules["torch"].autograd.forward_ad._current_level >= 0 or stand_ins.recorder() is not None


def empty(shape, dtype, like, like_kind, handle):
    """A new array in C order, of the library and on the device of `like`, which is the current one.

    Numba's knows the stream that it is written on, of this address, for those who read it next.
    """
    if like_kind == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype.name), device=like.device)
    if dtype == BFLOAT16:
        dtype = bfloat16()
    if like_kind == "cupy":
        return sys.modules["cupy"].empty(shape, dtype)
    from numba import cuda

    return cuda.device_array(shape, dtype, stream=_numba_stream(handle) if handle else 0)


def temporary(shape, dtype, like, like_kind, handle):
    """A new array for kernels of one call on this stream. One that a graph will use again is kept: torch does so itself."""
    array = empty(shape, dtype, like, like_kind, handle)
    if like_kind != "torch" and handle not in DEFAULT_STREAMS and launch.is_captured(handle):
        _captured.append(array)
    return array


def workspace(size, dtype, like, like_kind, device, handle):
    """An array of at least so many elements, for kernels of one call on this stream.

    Numba has no pool, and takes 13 us for new memory: on the default stream, a thread's calls use the same again, in order.
    """
    is_pooled = like_kind in ("torch", "cupy")
    if is_pooled or handle not in DEFAULT_STREAMS or size * dtype.itemsize > KEPT:
        return temporary((size,), dtype, like, like_kind, handle)
    arrays = vars(_kept).setdefault("arrays", {})
    if device not in arrays or arrays[device].nbytes < size * dtype.itemsize:
        arrays[device] = empty((size * dtype.itemsize,), np.dtype(np.uint8), like, like_kind, 0)
    return arrays[device]


@functools.lru_cache(maxsize=256)
def _numba_stream(handle):
    from numba import cuda

    return cuda.external_stream(handle)


def stream_handle(stream, like, like_kind, device):
    """The address of a stream: the one that is given, or the library's current one."""
    if stream is None:
        if like_kind == "torch":
            torch = sys.modules["torch"]
            # without making an object of the stream, where torch has such a function
            current = getattr(torch._C, "_cuda_getCurrentRawStream", None)
            return torch.cuda.current_stream(device).cuda_stream if current is None else current(device)
        if like_kind == "cupy":
            return sys.modules["cupy"].cuda.get_current_stream(device).ptr
        stream = like.stream if like_kind == "numba" else like.__cuda_array_interface__.get("stream") or 0
    return handle_of(stream)


def handle_of(stream):
    """The address of a stream, which may be an int itself; None for what is no stream."""
    if isinstance(stream, int):
        return stream if stream >= 0 and not isinstance(stream, bool) else None
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    if hasattr(stream, "cuda_stream"):
        return int(stream.cuda_stream)
    is_cupy_stream = type(stream).__module__.startswith("cupy.") and hasattr(stream, "ptr") and hasattr(stream, "use")
    return int(stream.ptr) if is_cupy_stream else None


def allocating_on(handle, stream, like_kind, device):
    """A context in which the library's pool gives memory that this stream alone uses."""
    if like_kind == "torch":
        torch = sys.modules["torch"].cuda
        # torch takes the address 0 for a wish for another stream
        return torch.stream(torch.ExternalStream(handle, device) if handle else torch.default_stream(device))
    if like_kind == "cupy":
        streams = sys.modules["cupy"].cuda
        has_new_way = hasattr(streams.Stream, "from_external")
        return streams.Stream.from_external(stream) if has_new_way else streams.ExternalStream(handle, device)
    return nullcontext()

"""Compiling a kernel for a device, and enqueueing it, by what numba-cuda itself launches with.

Kernels take addresses, and go straight to `cuda.core.launch`: Numba's own way of a launch looks at every argument anew.
"""

import ctypes
import functools
from contextlib import nullcontext
from typing import Any

import numpy as np
from numba import cuda

TINY, MAX = (float(end) for end in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


@functools.cache
def compute_capability(device):
    return tuple(cuda.gpus[device].compute_capability)


@functools.cache
def compiled(kernel, signature, device):
    """The kernel for the current device, which is this one."""
    from nbnorm.cuda import lowering  # noqa: F401  teaches numba-cuda what kernels ask of the machine

    overload = kernel.compile(signature.args)
    overload.bind()
    return overload.library.get_cufunc().kernel


def prepare(kernel, signature, device, blocks, threads):
    """A function of a stream and the kernel's arguments that enqueues it: addresses, ints and ctypes' floats."""
    from cuda.core import LaunchConfig, launch

    handle = compiled(kernel, signature, device)
    config = LaunchConfig(grid=blocks, block=threads)

    def enqueue(stream, *arguments):
        launch(stream, config, handle, *arguments)

    return enqueue


@functools.lru_cache(maxsize=256)
def stream_object(handle, device) -> Any:
    """What `cuda.core.launch` takes for a stream."""
    from cuda.core import Stream

    return Stream.from_handle(handle)


def on(device):
    """A context in which the device is the current one."""
    return nullcontext() if current_device() == device else cuda.gpus[device]


def current_device():
    """Its number; None where none is current in this thread."""
    from cuda.bindings import driver

    error, device = driver.cuCtxGetDevice()
    return int(device) if error == driver.CUresult.CUDA_SUCCESS else None


def is_captured(handle):
    """Whether what is enqueued on the stream becomes part of a graph."""
    from cuda.bindings import driver

    _, status = driver.cuStreamIsCapturing(handle)
    return status == driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE


def number(value, dtype):
    """A float argument of a kernel that computes in `dtype`."""
    if dtype == np.float64:
        return ctypes.c_double(value)
    # eps must not vanish, since a constant row would be NaN, or be Inf
    return ctypes.c_float(min(max(value, TINY), MAX) if value > 0 else 0.0)


def fill(view, byte, stream):
    """Enqueue the writing of one byte to all of an array in C order: 0 makes zeros, 0xFF NaN."""
    from cuda.bindings import driver

    (error,) = driver.cuMemsetD8Async(view.address, byte, view.size * view.itemsize, int(stream.handle))
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuMemsetD8Async: {error.name}")

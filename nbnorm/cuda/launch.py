"""Compiling a kernel for a device, and enqueueing it, by what numba-cuda itself launches with.

Kernels take addresses, and go straight to `cuda.core.launch`: Numba's own way of a launch looks at every argument anew.
"""

import ctypes
import functools
import math
from contextlib import nullcontext
from typing import Any

import numpy as np
from numba import cuda


@functools.cache
def compute_capability(device):
    return tuple(cuda.gpus[device].compute_capability)


@functools.cache
def compiled(kernel, signature, device):
    """The kernel for the current device, which is this one."""
    from nbnorm.cuda import steps
    from nbnorm.cuda.instructions import lowering  # noqa: F401  teaches numba-cuda what kernels ask of the machine

    with steps.fewer():
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


def epsilon(eps, dtype):
    """What kernels that compute in `dtype` take for eps: eps, a power of two, and what divided by that is 1 / sqrt(eps).

    float32 has roots, and deviations that are as large, of which it does not have the squares. The power is the largest that
    the type has and that is not above the root.
    """
    number = ctypes.c_double if dtype == np.float64 else ctypes.c_float
    ends = np.finfo(dtype)
    root = math.sqrt(eps)
    power = math.ldexp(1.0, min(max(math.frexp(root)[1] - 1, ends.minexp), ends.maxexp - 2) if eps else ends.minexp)
    # a constant row's deviations are 0, and multiplied by this: it is Inf where eps is 0
    rest = min(power / root, float(ends.max)) if eps else math.inf
    return number(eps), number(power), number(rest)


def fill(view, byte, stream):
    """Enqueue the writing of one byte to all of an array in C order: 0 makes zeros, 0xFF NaN."""
    from cuda.bindings import driver

    (error,) = driver.cuMemsetD8Async(view.address, byte, view.size * view.itemsize, int(stream.handle))
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuMemsetD8Async: {error.name}")

"""The library that holds the arrays of a comparison on a CUDA device, moves and checks them, and times by its events."""

import importlib.util

import numpy as np
from numba import cuda

from nbnorm.calls.arrays import give_back, on_device, read


class Torch:
    modules = ("torch",)

    def __init__(self):
        import torch

        self.torch = torch

    def array(self, host):
        return give_back(host, None, "torch").cuda()

    def empty_like(self, array):
        return self.torch.empty_like(array)

    def copy(self, source, destination):
        destination.copy_(source)

    def add(self, dy, x, dx):
        self.torch.add(dy, x, out=dx)

    def poison(self, array):
        array.view(self.torch.uint8).fill_(0xFF)

    def is_written(self, array):
        """Whether no element is as `poison` leaves it; CuPy's results are here as well."""
        array = self.torch.as_tensor(array, device="cuda")
        return not (array.view(getattr(self.torch, f"int{8 * array.element_size()}")) == -1).any().item()

    def read(self, array, rows):
        return read(self.torch.as_tensor(array, device="cuda")[rows])

    def event(self):
        return self.torch.cuda.Event(enable_timing=True)

    def milliseconds(self, start, end):
        return start.elapsed_time(end)


class CuPy:
    modules = ("cupy",)

    def __init__(self):
        import cupy

        self.cupy = cupy

    def array(self, host):
        return self.cupy.asarray(host)

    def empty_like(self, array):
        return self.cupy.empty_like(array)

    def copy(self, source, destination):
        self.cupy.copyto(destination, source)

    def add(self, dy, x, dx):
        self.cupy.add(dy, x, out=dx)

    def poison(self, array):
        array.view(self.cupy.uint8).fill(0xFF)

    def is_written(self, array):
        return not (array.view(f"i{array.itemsize}") == -1).any().item()

    def read(self, array, rows):
        return read(array[rows])

    def event(self):
        return self.cupy.cuda.Event()

    def milliseconds(self, start, end):
        return self.cupy.cuda.get_elapsed_time(start, end)


class Numba:
    """Copies are of bytes: Numba makes none of bfloat16 arrays."""

    modules = ()

    def array(self, host):
        return on_device(host, "cuda")

    def empty_like(self, array):
        return cuda.device_array(array.shape, array.dtype)

    def copy(self, source, destination):
        destination.view(np.uint8).copy_to_device(source.view(np.uint8))

    def add(self, dy, x, dx):
        """No sum, which Numba has not, but copies that move as many bytes: of x, and of half of dy over it."""
        half = x.nbytes // 2
        self.copy(x, dx)
        dx.view(np.uint8).ravel()[:half].copy_to_device(dy.view(np.uint8).ravel()[:half])

    def poison(self, array):
        array = array.view(np.uint8)
        array.copy_to_device(np.full(array.shape, 0xFF, np.uint8))

    def is_written(self, array):
        return not np.any(read(array).view(f"i{array.dtype.itemsize}") == -1)

    def read(self, array, rows):
        return read(array)[rows]

    def event(self):
        return cuda.event()

    def milliseconds(self, start, end):
        return start.elapsed_time(end)


def torch_has_cuda():
    import torch

    return torch.cuda.is_available()


def library(dtype):
    """The first that is there, can use the device and has the dtype. All work on the default stream, which is the same."""
    for candidate in (Torch, CuPy, Numba):
        if all(importlib.util.find_spec(module) for module in candidate.modules):
            if (candidate is CuPy and dtype == "bfloat16") or (candidate is Torch and not torch_has_cuda()):
                continue
            return candidate()
    raise AssertionError("Numba is always there")

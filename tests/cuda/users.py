"""A kernel of a user's own, launched on what the CUDA tests run on."""

from functools import cache

import numpy as np
from numba import cuda, types
from numba.np.numpy_support import from_dtype

import device


def launch(kernel, blocks, threads, *arrays):
    """Run it on NumPy arrays, which it may all write to."""
    if device.LEVEL == "device":
        on_device = [cuda.to_device(array) for array in arrays]
        kernel[blocks, threads](*on_device)
        for array, copy in zip(arrays, on_device, strict=True):
            copy.copy_to_host(array)
    elif device.LEVEL == "simulator":
        _simulate(kernel, blocks, threads, arrays)
    else:
        _run_ptx(kernel, blocks, threads, arrays)


def _simulate(kernel, blocks, threads, arrays):
    import simulator

    for number in range(blocks):
        simulator.Block(number, threads, lambda n: -n if simulator.order == "reverse" else n).run(kernel, arrays)


def _run_ptx(kernel, blocks, threads, arrays):
    import ptx_device
    import ptx_machine

    memory = ptx_machine.Memory()
    arguments = []
    for array in arrays:
        memory.add(array.ctypes.data, array.nbytes)
        # as Numba hands an array to a kernel: two words that are 0 here, its size, an element's, the address, shape, strides
        numbers = array.size, array.itemsize, array.ctypes.data, *array.shape, *array.strides
        arguments += [np.int64(number) for number in (0, 0, *numbers)]
    signature = types.void(*(types.Array(from_dtype(array.dtype), array.ndim, "C") for array in arrays))
    text = ptx(kernel, signature, ptx_device.capability)
    counts = ptx_machine.run(
        text, blocks, threads, arguments, memory, order=ptx_device.order, rounding=ptx_device.rounding
    )  # fmt: skip
    ptx_device.launches.append((kernel, blocks, threads, counts))


@cache
def ptx(kernel, signature, capability):
    """What the machine code of a launch is made of."""
    import offline

    return offline.user_ptx(kernel, signature, capability)

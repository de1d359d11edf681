"""Copies between arrays of any strides: what brings an input into rows, or a result into an `out` without rows."""

import functools

import numpy as np
from numba import cuda, types

from nbnorm.cuda import launch
from nbnorm.cuda.compiled import compiled
from nbnorm.cuda.kernels.signatures import STORAGE

THREADS = 256
# dimensions that a copy takes, after those are joined that follow each other in memory
DIMENSIONS = 8
# integers and booleans, which become float64
INTEGERS = (types.int8, types.int16, types.int32, types.int64, types.uint8, types.uint16, types.uint32, types.uint64)
STORAGE_OF_INTEGERS = {integer.name: integer for integer in INTEGERS} | {"bool": types.uint8}


def enqueue(source, destination, place):
    """Copy an array into one of the same shape, and of the same dtype or, from integers, float64."""
    shape, *strides = joined(source.shape, source.strides, destination.strides)
    if len(shape) > DIMENSIONS:
        for i in range(shape[0]):
            inner = [
                view._replace(address=view.address + i * steps[0], shape=tuple(shape[1:]), strides=tuple(steps[1:]))
                for view, steps in zip((source, destination), strides, strict=True)
            ]
            enqueue(inner[0], inner[1], place)
        return
    missing = DIMENSIONS - len(shape)
    shape = [1] * missing + shape
    strides = [
        [0] * missing + [stride // view.itemsize for stride in steps]
        for steps, view in zip(strides, (source, destination), strict=True)
    ]
    names = source.dtype.name, destination.dtype.name
    kernel = copy(place.capability, *names)
    blocks = -(-source.size // THREADS)
    run = launch.prepare(kernel, copy_signature(*names), place.device, blocks, THREADS)
    run(place.stream, source.address, destination.address, source.size, *shape, *strides[0], *strides[1])


def copy_signature(source_dtype, dtype):
    strides = types.UniTuple(types.int64, DIMENSIONS)
    source = STORAGE.get(source_dtype) or STORAGE_OF_INTEGERS[source_dtype]
    return types.void(
        types.CPointer(source), types.CPointer(STORAGE[dtype]), types.int64, strides, strides, strides
    )  # fmt: skip


@functools.cache
def copy(compute_capability, source_dtype, dtype):
    """One thread owns an element; strides are in elements. The dtypes differ where integers become float64."""
    converted = np.float64 if source_dtype != dtype else None

    @compiled(compute_capability, THREADS)
    def kernel(source, destination, size, shape, source_strides, strides):
        rest = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if rest >= size:
            return
        source_at = np.int64(0)
        at = np.int64(0)
        for dimension in range(DIMENSIONS - 1, -1, -1):
            index = rest % shape[dimension]
            rest //= shape[dimension]
            source_at += index * source_strides[dimension]
            at += index * strides[dimension]
        value = source[source_at]
        destination[at] = value if converted is None else converted(value)

    return kernel


def joined(shape, *strides):
    """The shape and strides with dimensions joined that follow each other in memory in every array, and none of size 1.

    >>> joined((2, 3, 4), (96, 16, 4), (96, 32, 8))
    ([2, 12], [96, 4], [96, 8])
    """
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for size, *step in zip(reversed(shape), *map(reversed, strides), strict=True):
        if size == 1:
            continue
        if sizes and all(new == old[0] * sizes[0] for new, old in zip(step, steps, strict=True)):
            sizes[0] *= size
        else:
            sizes.insert(0, size)
            for old, new in zip(steps, step, strict=True):
                old.insert(0, new)
    return sizes, *steps

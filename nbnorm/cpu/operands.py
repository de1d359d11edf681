"""Operands and results of a call as a kernel takes them, but for its rows, which `staging` has."""

import numpy as np

from nbnorm.calls.arrays import convert
from nbnorm.cpu import memory, sizes
from nbnorm.cpu.staging import is_ready


def is_streamed(result, *inputs):
    """Whether it is large, in one piece of which every row starts at a multiple of 16 bytes, and apart from the inputs."""
    return (
        result.nbytes >= sizes.STREAMED_BYTES
        and is_ready(result)
        and result.ctypes.data % 16 == 0
        and result.shape[-1] * result.itemsize % 16 == 0
        and not any(array is not None and np.may_share_memory(result, array) for array in inputs)
    )


def flat(array, dtype, *results):
    """The operand as one contiguous row, apart from the results; a kernel takes what is absent as an empty one."""
    if array is None:
        return np.empty(0, dtype)
    is_apart = not any(result is not None and np.may_share_memory(array, result) for result in results)
    if array.dtype != dtype or not is_ready(array) or not is_apart:
        converted = np.empty(array.shape, dtype)
        convert(array, converted)
        array = converted
    return array.reshape(-1)


def parameter_like(is_wanted, problem, out, inputs):
    """What the kernel writes dweight or dbias into: `out` where it can, which of few long rows is as large as dx."""
    if not is_wanted:
        return np.empty(0, problem.weight_dtype)
    if out is not None and is_ready(out) and not any(np.may_share_memory(out, array) for array in inputs):
        return out
    return memory.empty(problem.normalized_shape, problem.weight_dtype)


def delivered(result, out):
    """`out` with the result in it, or the result where there is no `out`."""
    if out is None or out is result:
        return result
    np.copyto(out, result)
    return out

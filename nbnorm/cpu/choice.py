"""Which kernel a call needs: what a call, or the description of one, and the cache on disk know a kernel by.

Nothing here needs the kernels themselves, which are imported by what compiles one.
"""

import functools
import importlib
from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype, types

from nbnorm.calls.problem import wide_dtype
from nbnorm.cpu import compiled, sizes
from nbnorm.cpu.staging import storage


class Kernel(NamedTuple):
    """A kernel's factory, by its module and name, and its arguments: the compile-time choices."""

    module: str
    name: str
    choices: tuple

    def __str__(self):
        words = [choice.name if isinstance(choice, np.dtype) else str(choice) for choice in self.choices]
        return f"{self.module}.{self.name}({', '.join(words)})"


def forward(problem, has_weight, has_bias, residual_dtype=None, with_total=False):
    """`residual_dtype` is that of what is added to x, or None; `with_total` says whether the sum is written."""
    choices: tuple = storage(problem.dtype), problem.compute_dtype, has_weight, has_bias, problem.variance
    if residual_dtype is not None:
        choices += storage(residual_dtype), with_total
    return Kernel(_module(problem), "forward", choices)


def backward(problem, dy_dtype, has_weight, statistics_dtype, output_mask, dtotal_dtype=None):
    """`statistics_dtype` is that of the mean and rstd which are given, or None, `dtotal_dtype` that of what dx adds to."""
    statistics_from = problem.variance
    if statistics_dtype:
        statistics_from = "given rstd" if problem.variance == "mean_square" else "given"
    choices: tuple = (
        storage(dy_dtype),
        storage(problem.dtype),
        problem.compute_dtype,
        statistics_dtype or wide_dtype(problem.dtype),
        storage(problem.weight_dtype),
        has_weight,
        statistics_from,
        output_mask,
    )
    if dtotal_dtype is not None:
        choices += (storage(dtotal_dtype),)
    return Kernel(_module(problem), "backward", choices)


@functools.cache
def ready(kernel, parallel):
    """The serial or the parallel build of a kernel, as a function: from the disk, or compiled now."""
    return compiled.compiled(kernel, _signature(kernel), parallel, functools.partial(_made, kernel))


def is_kept(kernel, parallel):
    """Whether a build of a kernel is on disk."""
    return compiled.is_kept(kernel, _signature(kernel), parallel)


def is_short(problem):
    return sizes.is_short(problem.cols, problem.dtype.itemsize)


def _module(problem):
    if problem.behind:
        return "channels_first.kernels"
    if problem.cols > sizes.LONG_ROW:
        return "long_rows"
    return "short_rows" if is_short(problem) else "whole_rows"


def _made(kernel):
    module: Any = importlib.import_module(f"nbnorm.cpu.kernels.{kernel.module}")
    return getattr(module, kernel.name)(*kernel.choices)


def _signature(kernel):
    signature = SIGNATURES[kernel.name](*kernel.choices)
    if not kernel.module.startswith("channels_first"):
        return signature
    # rows of one more dimension; and width, of a forward lead, begin and end
    numbers = (types.int64,) * (4 if kernel.name == "forward" else 3)
    return types.void(*(_with_one_dimension_more(argument) for argument in signature.args), *numbers)


def _with_one_dimension_more(argument: Any):
    """The type of rows that lie beside each other, or what else an argument is."""
    if isinstance(argument, types.Tuple):
        return types.Tuple(tuple(_with_one_dimension_more(part) for part in argument.types))
    if isinstance(argument, types.UniTuple):
        return types.UniTuple(_with_one_dimension_more(argument.dtype), argument.count)
    return argument.copy(ndim=3) if isinstance(argument, types.Array) and argument.ndim == 2 else argument


def _inputs(dtype, ndim):
    return types.Array(from_dtype(dtype), ndim, "C", readonly=True)


def _outputs(dtype, ndim):
    return types.Array(from_dtype(dtype), ndim, "C")


def _beside(make, first_dtype, second_dtype):
    """The type of rows, or of a tuple of rows and what is beside them."""
    first = make(first_dtype, 2)
    return first if second_dtype is None else types.Tuple((first, make(second_dtype, 2)))


def _forward_signature(x_dtype, dtype, has_weight, has_bias, variance, residual_dtype=None, with_total=False):
    statistics_dtype = np.dtype(np.float64 if x_dtype == np.float64 else np.float32)
    return types.void(
        _beside(_inputs, x_dtype, residual_dtype),  # x, or x and the residual
        _inputs(dtype, 1),  # weight
        _inputs(dtype, 1),  # bias
        types.float64,  # eps
        types.boolean,  # streaming
        _beside(_outputs, x_dtype, x_dtype if with_total else None),  # y, or y and the total
        _outputs(statistics_dtype, 1),  # mean
        _outputs(statistics_dtype, 1),  # rstd
    )


def _backward_signature(
    dy_dtype, x_dtype, dtype, statistics_dtype, sum_dtype, has_weight, statistics_from, output_mask, dtotal_dtype=None
):
    return types.void(
        _beside(_inputs, dy_dtype, dtotal_dtype),  # dy, or dy and dtotal
        _inputs(x_dtype, 2),  # x
        _inputs(dtype, 1),  # weight
        types.float64,  # eps
        _inputs(statistics_dtype, 1),  # mean
        _inputs(statistics_dtype, 1),  # rstd
        types.int64,  # first
        types.int64,  # block_rows
        types.boolean,  # last
        types.boolean,  # streaming
        _outputs(x_dtype, 2),  # dx
        _outputs(np.dtype(np.float64), 3),  # sums
        _outputs(sum_dtype, 1),  # dweight
        _outputs(sum_dtype, 1),  # dbias
    )


SIGNATURES: dict[str, Any] = {"forward": _forward_signature, "backward": _backward_signature}

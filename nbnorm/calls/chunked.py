"""Checks of calls on Dask arrays: those of `checks`, on stand-ins of the same shapes and dtypes, before there is a graph.

The errors are as in `checks`. What is in the chunks nobody has seen yet: each is checked again as it is worked on.
"""

from math import isnan

import numpy as np

from nbnorm.calls import arrays, axes, checks, options
from nbnorm.calls.shown import type_name

# what a call may have beside x that has the batch's dimensions, and what has not
BATCHED, PARAMETERS = ("residual", "dy", "dtotal", "mean", "rstd"), ("weight", "bias")


def forward(call):
    """As `checks.forward`, with Dask's among the arrays as they came; the batch has 1 where a size is not known yet."""
    _no_out("out", call.out)
    _no_out("total_out", None if call.total_out is False else call.total_out)
    return _checked(call, "x", checks.forward)


def backward(call):
    """The same of a `BackwardCall`."""
    for i, out in enumerate(call.out if isinstance(call.out, tuple | list) else ()):
        _no_out(f"out[{i}]", out)
    return _checked(call, "total" if call.is_added else "x", checks.backward)


def _checked(call, x_name, check):
    given = {name: getattr(call, name, None) for name in ("x", *BATCHED, *PARAMETERS)}
    lazy = {name: array for name, array in given.items() if arrays.is_dask(array)}
    names = {name: name for name in lazy} | {"x": x_name}
    batch = _batch_axes(call, x_name)
    unknown = _unknown_axes(call.x)
    for name, array in lazy.items():
        allowed = unknown if name in BATCHED else [axis for axis in unknown if name == "x" and axis in batch]
        if _unknown_axes(array) != allowed:
            raise ValueError(f"{names[name]}: chunks of unknown sizes; pass {names[name]}.compute_chunk_sizes()")
    for name in BATCHED if unknown else ():
        array = given[name]
        if array is not None and (name not in lazy or _blocks(array, batch) != _blocks(call.x, batch)):
            raise ValueError(
                f"{name}: other chunks than {x_name}, whose sizes are unknown; pass {x_name}.compute_chunk_sizes(), or what "
                "has the same chunks"
            )
    problem, operands = check(call._replace(**{name: _stand_in(names[name], array) for name, array in lazy.items()}))
    return problem, operands._replace(**lazy)


def _batch_axes(call, x_name):
    """The axes of x that normalized_shape has not."""
    shape = options.shape(call.normalized_shape, options.ORDER)
    first = call.x.ndim - len(shape) if call.axis is None else axes.first_of(call.axis, shape, x_name, call.x)
    return [axis for axis in range(call.x.ndim) if not first <= axis < first + len(shape)]


def _blocks(array, batch):
    return [count for axis, count in enumerate(array.numblocks) if axis in batch]


def _unknown_axes(array):
    return [axis for axis, size in enumerate(array.shape) if isnan(size)]


def _stand_in(name, array):
    """What takes no memory and has no values."""
    if type(array._meta) is not np.ndarray:
        raise TypeError(f"{name}: a Dask array of {type_name(array._meta)}; expected one of numpy.ndarray")
    return np.broadcast_to(np.empty((), array.dtype), tuple(1 if isnan(size) else size for size in array.shape))


def _no_out(name, out):
    if out is not None:
        raise TypeError(f"{name}: {type_name(out)}; expected None, since results of Dask arrays are new ones")

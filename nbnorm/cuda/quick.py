"""Calls that were made before, without the cost of the checks: what they say depends on nothing but what is asked here.

A call is known by its arrays' shapes, strides, dtypes, devices and alignment, and its options. The long way remembers it
where it was one kernel on the arrays as they are. With `out` and without what the driver takes, that is 6.5 us of the host
for Numba's and CuPy's arrays and 8.5 for torch's, 1 of them `cuda.core.launch`, where the long way takes 250
(`benchmarks/host_cost.py`).
"""

from typing import Any, NamedTuple

from nbnorm.cuda import arrays, launch

# bounded, since a program may make calls of ever new shapes
MOST = 1024
FORWARD: dict[tuple, "Plan"] = {}


class Plan(NamedTuple):
    """A kernel that is ready to be enqueued, and what stays the same; sizes in bytes, from an array's first to its last."""

    enqueue: Any
    fixed: tuple
    problem: Any
    device: int
    input_sizes: list
    y_size: int


def remember(plan, call):
    known = _known(*call[:-1])
    if known is not None:
        if len(FORWARD) >= MOST:
            FORWARD.clear()
        FORWARD[known[0]] = plan


def forward(x, normalized_shape, weight, bias, eps, use_diff_of_squares, out, return_stats, stream):
    """As the long way does, or None where the call is not known."""
    # what is allocated for a stream other than the library's current one is the long way's matter
    if stream is not None and (out is None or return_stats or arrays.handle_of(stream) is None):
        return None
    known = _known(x, normalized_shape, weight, bias, eps, use_diff_of_squares, out, return_stats)
    if known is None:
        return None
    key, (*inputs, y_address) = known
    plan = FORWARD.get(key)
    if plan is None or launch.current_device() != plan.device:
        return None
    problem = plan.problem
    kind = arrays.kind(x)
    handle = arrays.stream_handle(stream, x, kind, plan.device)
    y = mean = rstd = None
    mean_address = rstd_address = 0
    if out is None:
        y = arrays.empty(problem.shape, problem.dtype, x, kind, handle)
        y_address = arrays.address(y, kind)
    elif not _is_apart(y_address, inputs, plan, out is x):
        return None
    if return_stats:
        shape, dtype = problem.statistics_shape, problem.statistics_dtype
        mean, rstd = (arrays.empty(shape, dtype, x, kind, handle) for _ in range(2))
        mean_address, rstd_address = arrays.address(mean, kind), arrays.address(rstd, kind)
    plan.enqueue(launch.stream_object(handle, plan.device), *inputs, *plan.fixed, y_address, mean_address, rstd_address, 0)
    return y, mean, rstd


def _is_apart(y, inputs, plan, is_in_place):
    """Whether what is at the address y shares no memory with an input, but for an x that is written over row by row."""
    x, weight, bias = inputs
    x_size, weight_size, bias_size = plan.input_sizes
    end = y + plan.y_size
    return (
        ((is_in_place and x == y) or x >= end or y >= x + x_size)
        and (weight >= end or y >= weight + weight_size)
        and (bias >= end or y >= bias + bias_size)
    )


def _known(x, normalized_shape, weight, bias, eps, use_diff_of_squares, out, return_stats):
    """What a plan is remembered by, and the addresses of x, weight, bias and out; None for what has to be checked."""
    # equal keys must be equally right, which True and 1.0 for 1 are not
    if type(eps) is not float or type(use_diff_of_squares) is not bool or type(return_stats) is not bool:
        return None
    for size in normalized_shape if isinstance(normalized_shape, tuple) else (normalized_shape,):
        if type(size) is not int:
            return None
    key: list[Any] = [normalized_shape, eps, use_diff_of_squares, return_stats]
    addresses = []
    is_torch = False
    try:
        for array in (x, weight, bias, out):
            if array is None:
                addresses.append(0)
                key.append(None)
                continue
            kind = arrays.kind(array)
            is_torch = is_torch or kind == "torch"
            address, seen = arrays.signature(array, kind)
            addresses.append(address)
            key += kind, address % 16, seen
    except (AttributeError, TypeError, ValueError, RuntimeError, BufferError):
        # of what is no such array
        return None
    if is_torch and arrays.is_recording():
        return None
    return tuple(key), addresses

"""Calls that were made before, without the cost of the checks: what they say depends on nothing but what is asked here.

A call is known by its arrays' shapes, strides, dtypes, devices and alignment, and its options. The long way remembers it
where it was one kernel on the arrays as they are.
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
    known = _known(x, normalized_shape, weight, bias, eps, use_diff_of_squares, out, return_stats)
    if known is None or stream is not None:
        return None
    key, kind, inputs, y_address = known
    plan = FORWARD.get(key)
    if plan is None or launch.current_device() != plan.device:
        return None
    y = None
    if out is None:
        y = arrays.empty(plan.problem.shape, plan.problem.dtype, x, kind)
        y_address = arrays.address(y, kind)
    else:
        end = y_address + plan.y_size
        for address, size in zip(inputs, plan.input_sizes, strict=True):
            if address < end and y_address < address + size and not (out is x and address == y_address):
                return None
    mean = rstd = None
    statistics = (0, 0)
    if return_stats:
        mean, rstd = (arrays.empty(plan.problem.statistics_shape, plan.problem.statistics_dtype, x, kind) for _ in range(2))
        statistics = arrays.address(mean, kind), arrays.address(rstd, kind)
    stream = launch.stream_object(arrays.stream_handle(None, x, kind, plan.device), plan.device)
    plan.enqueue(stream, *inputs, *plan.fixed, y_address, *statistics, 0)
    return y, mean, rstd


def _known(x, normalized_shape, weight, bias, eps, use_diff_of_squares, out, return_stats):
    """What a plan is remembered by, x's kind and the addresses of the inputs and of out; None for what has to be checked."""
    # equal keys must be equally right, which True and 1.0 for 1 are not
    sizes = normalized_shape if type(normalized_shape) is tuple else (normalized_shape,)
    types = (type(eps), type(use_diff_of_squares), type(return_stats))
    if types != (float, bool, bool) or any(type(size) is not int for size in sizes):
        return None
    kind = arrays.kind(x)
    if kind == "torch" and arrays.is_recording(x):
        return None
    key: list[Any] = [kind, normalized_shape, eps, use_diff_of_squares, return_stats]
    addresses = []
    for array in (x, weight, bias, out):
        address = 0
        if array is not None:
            if arrays.kind(array) != kind:
                return None
            address, seen = arrays.signature(array, kind)
            key.append(seen)
            key.append(address % 16)
        else:
            key.append(None)
        addresses.append(address)
    return tuple(key), kind, addresses[:3], addresses[3]

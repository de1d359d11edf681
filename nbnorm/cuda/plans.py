"""Calls on CUDA arrays that were made before: each enqueues its kernels at once, as `calls.plans` has it.

A call is known by its arrays' shapes, strides, dtypes, devices and alignment, and its options. It has a plan where its
kernels work on the arrays as they are, each row whole. With `out` and without what the driver takes, a call is
7 us of the host for Numba's and CuPy's arrays and 9 for torch's, backward 12, 15 and 19, of which `cuda.core.launch` takes 1
each time; the checked path takes 250 (`benchmarks/host_cost.py`).
"""

import operator
from typing import Any, NamedTuple

from nbnorm.calls.plans import keep, sizes
from nbnorm.cuda import arrays, launch

# of all public functions: the key says of which
FORWARD: dict[tuple, "Forward"] = {}
BACKWARD: dict[tuple, "Backward"] = {}
# of a call that has to be checked: its key, and the addresses of its arrays
UNKNOWN = None, ()


class Forward(NamedTuple):
    """A kernel that is ready to be enqueued, and what stays the same; sizes in bytes, from an array's first to its last."""

    enqueue: Any
    fixed: tuple
    problem: Any
    device: int
    input_sizes: list
    y_size: int


class Backward(NamedTuple):
    """As `Forward`; `add` is the second kernel, or None, and `sums_size` the elements of what it adds up."""

    enqueue: Any
    fixed: tuple
    add: Any
    problem: Any
    dtype: Any
    sums_size: int
    device: int
    input_sizes: list
    result_sizes: list


def keep_forward(plan, call):
    key, _ = _known_forward(call)
    keep(FORWARD, key, plan)


def keep_backward(plan, call):
    key, _ = _known_backward(call)
    keep(BACKWARD, key, plan)


def forward(call):
    """As the checked path does, or None where the call is not known."""
    x, out, return_stats, stream = call.x, call.out, call.return_stats, call.stream
    # what is allocated for a stream other than the library's current one is the checked path's matter
    if stream is not None and (out is None or return_stats or arrays.handle_of(stream) is None):
        return None
    key, addresses = _known_forward(call)
    plan = FORWARD.get(key)
    if plan is None or launch.current_device() != plan.device:
        return None
    *inputs, y_address = addresses
    problem = plan.problem
    kind = arrays.kind(x)
    handle = arrays.stream_handle(stream, x, kind, plan.device)
    y = mean = rstd = None
    mean_address = rstd_address = 0
    if out is None:
        y = arrays.empty(problem.shape, problem.dtype, x, kind, handle)
        y_address = arrays.address(y, kind)
    elif not _is_apart(y_address, plan.y_size, inputs, plan.input_sizes, (out is x, False, False)):
        return None
    if return_stats:
        shape, dtype = problem.statistics_shape, problem.statistics_dtype
        rstd = arrays.empty(shape, dtype, x, kind, handle)
        rstd_address = arrays.address(rstd, kind)
        if not call.is_rms:
            mean = arrays.empty(shape, dtype, x, kind, handle)
            mean_address = arrays.address(mean, kind)
    plan.enqueue(launch.stream_object(handle, plan.device), *inputs, *plan.fixed, y_address, mean_address, rstd_address, 0)
    return y, mean, rstd


def backward(call):
    """As the checked path does, or None where the call is not known."""
    # temporary memory for a stream other than the library's current one is the checked path's matter
    if call.stream is not None:
        return None
    dy, x, output_mask, out = call.dy, call.x, call.output_mask, call.out
    key, addresses = _known_backward(call)
    plan = BACKWARD.get(key)
    if plan is None or launch.current_device() != plan.device:
        return None
    inputs, results = addresses[:5], addresses[5:]
    if call.is_rms:
        # it has no dbias
        results.append(0)
    if out is not None and not _are_apart(results, plan.result_sizes, inputs, plan.input_sizes, (out[0] is dy, out[0] is x)):
        return None
    problem = plan.problem
    kind = arrays.kind(x)
    handle = arrays.stream_handle(None, x, kind, plan.device)
    stream_object = launch.stream_object(handle, plan.device)
    grads: list[Any] = [None, None, None]
    for i, wanted in enumerate(output_mask):
        if wanted and (out is None or out[i] is None):
            shape, dtype = (problem.normalized_shape, problem.weight_dtype) if i else (problem.shape, problem.dtype)
            grads[i] = arrays.empty(shape, dtype, x, kind, handle)
            results[i] = arrays.address(grads[i], kind)
    sums_address = 0
    if plan.add is not None:
        sums = arrays.workspace(plan.sums_size, plan.dtype, x, kind, plan.device, handle)
        sums_address = arrays.address(sums, kind)
    dx, dweight, dbias = results
    plan.enqueue(stream_object, *inputs, *plan.fixed, dx, 0, 0, sums_address)
    if plan.add is not None:
        _, cols, groups, *_ = plan.fixed
        plan.add(stream_object, sums_address, groups, cols, dweight or dbias, dbias or dweight)
    return grads


def _are_apart(results, result_sizes, inputs, input_sizes, in_place):
    """Whether gradients share no memory with each other, nor dx with an input, but for one that is written over by rows.

    What is not given has the address 0.
    """
    dx, dweight, dbias = results
    dx_end, dweight_end, dbias_end = map(operator.add, results, result_sizes)
    if (
        (dx and dx < dweight_end and dweight < dx_end)
        or (dx and dx < dbias_end and dbias < dx_end)
        or (dweight and dweight < dbias_end and dbias < dweight_end)
    ):
        return False
    return not dx or _is_apart(dx, result_sizes[0], inputs, input_sizes, (*in_place, False, False, False))


def _is_apart(result, result_size, inputs, input_sizes, in_place):
    """Whether a result shares no memory with an input, but for one that it is written over row by row."""
    end = result + result_size
    for address, size, is_result in zip(inputs, input_sizes, in_place, strict=False):
        if address < end and result < address + size and not (is_result and address == result):
            return False
    return True


def _known_forward(call):
    """The key of a call, and the addresses of x, weight, bias and out."""
    flags = call.use_diff_of_squares, call.return_stats
    return _known(call, flags, (call.x, call.weight, call.bias, call.out))


def _known_backward(call):
    """The same, with the addresses of the inputs and then of the results."""
    number = 2 if call.is_rms else 3
    output_mask, out = call.output_mask, (None,) * number if call.out is None else call.out
    if type(output_mask) is not tuple or not isinstance(out, tuple) or len(output_mask) != number or len(out) != number:
        return UNKNOWN
    flags = call.use_diff_of_squares, *output_mask
    return _known(call, flags, (call.dy, call.x, call.weight, call.mean, call.rstd, *out))


def _known(call, flags, operands):
    normalized_shape, eps = sizes(call.normalized_shape), call.eps
    # RMS norm has a default of its own for None, which layer norm refuses
    if normalized_shape is None or (type(eps) is not float and eps is not None):
        return UNKNOWN
    for flag in flags:
        if type(flag) is not bool:
            return UNKNOWN
    key: list[Any] = [call.is_rms, normalized_shape, eps, *flags]
    addresses = []
    is_torch = False
    try:
        for array in operands:
            if array is None:
                addresses.append(0)
                key.append(None)
                continue
            kind = arrays.kind(array)
            is_torch = is_torch or kind == "torch"
            address, seen = arrays.signature(array, kind)
            if address == 0:
                # without elements, or without the memory for them
                return UNKNOWN
            addresses.append(address)
            key += kind, address % 16, seen
    except (AttributeError, TypeError, ValueError, RuntimeError, BufferError):
        # of what is no such array
        return UNKNOWN
    if is_torch and arrays.is_recording():
        return UNKNOWN
    return tuple(key), addresses

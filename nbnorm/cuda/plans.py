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
    """A kernel that is ready to be enqueued, and what stays the same; sizes in bytes, from an array's first to its last.

    `steps` are elements from one row of the residual to the next, and of the total, where something is added.
    """

    enqueue: Any
    fixed: tuple
    problem: Any
    device: int
    input_sizes: list
    result_sizes: list
    steps: tuple


class Backward(NamedTuple):
    """As `Forward`; `add` is the second kernel, or None, and `sums_size` the elements of what it adds up.

    The one of `steps` is that of dtotal, where it is added to dx.
    """

    enqueue: Any
    fixed: tuple
    add: Any
    problem: Any
    dtype: Any
    sums_size: int
    device: int
    input_sizes: list
    result_sizes: list
    steps: tuple


def keep_forward(plan, call):
    key, _ = _known_forward(call)
    keep(FORWARD, key, plan)


def keep_backward(plan, call):
    key, _ = _known_backward(call)
    keep(BACKWARD, key, plan)


def forward(call):
    """As the checked path does, or None where the call is not known."""
    x, out, return_stats, stream, is_added = call.x, call.out, call.return_stats, call.stream, call.is_added
    # what is allocated for a stream other than the library's current one is the checked path's matter
    if stream is not None and (out is None or call.total_out is None or return_stats or arrays.handle_of(stream) is None):
        return None
    key, addresses = _known_forward(call)
    plan = FORWARD.get(key)
    if plan is None or launch.current_device() != plan.device:
        return None
    inputs, results = (addresses[:4], addresses[4:]) if is_added else (addresses[:3], addresses[3:])
    y_size = plan.result_sizes[0]
    if is_added:
        if not _are_sums_apart(call, plan, inputs, results):
            return None
    elif out is not None and not _is_apart(results[0], y_size, inputs, plan.input_sizes, (out is x, False, False)):
        return None
    problem = plan.problem
    kind = arrays.kind(x)
    handle = arrays.stream_handle(stream, x, kind, plan.device)
    y = total = mean = rstd = None
    mean_address = rstd_address = 0
    if out is None:
        y = arrays.empty(problem.shape, problem.dtype, x, kind, handle)
        results[0] = arrays.address(y, kind)
    if call.total_out is None:
        total = arrays.empty(problem.shape, problem.dtype, x, kind, handle)
        results[1] = arrays.address(total, kind)
    if return_stats:
        shape, dtype = problem.statistics_shape, problem.statistics_dtype
        rstd = arrays.empty(shape, dtype, x, kind, handle)
        rstd_address = arrays.address(rstd, kind)
        if not call.is_rms:
            mean = arrays.empty(shape, dtype, x, kind, handle)
            mean_address = arrays.address(mean, kind)
    # what is added is behind all else
    added = (inputs.pop(), plan.steps[0], results[1], plan.steps[1]) if is_added else ()
    stream_object = launch.stream_object(handle, plan.device)
    plan.enqueue(stream_object, *inputs, *plan.fixed, results[0], mean_address, rstd_address, 0, *added)
    return y, total, mean, rstd


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
    number = 6 if call.is_added else 5
    inputs, results = addresses[:number], addresses[number:]
    if call.is_rms:
        # it has no dbias
        results.append(0)
    if out is not None:
        in_place = out[0] is dy, out[0] is x, False, False, False, out[0] is call.dtotal
        if not _are_apart(results, plan.result_sizes, inputs, plan.input_sizes, in_place):
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
    added = (inputs[5], *plan.steps) if plan.steps else ()
    plan.enqueue(stream_object, *inputs[:5], *plan.fixed, dx, 0, 0, sums_address, *added)
    if plan.add is not None:
        _, cols, groups, *_ = plan.fixed
        plan.add(stream_object, sums_address, groups, cols, dweight or dbias, dbias or dweight)
    return grads


def _are_sums_apart(call, plan, inputs, results):
    """Whether y and the total share no memory with each other or with an input, but for one that they are written over.

    What is not given has the address 0.
    """
    x, residual, out, total_out = call.x, call.residual, call.out, call.total_out
    (y, total), (y_size, total_size) = results, plan.result_sizes
    if y and not _is_apart(y, y_size, inputs, plan.input_sizes, (out is x, False, False, out is residual)):
        return False
    in_place = total_out is x, False, False, total_out is residual, False
    return not total or _is_apart(total, total_size, (*inputs, y), (*plan.input_sizes, y_size), in_place)


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
    return not dx or _is_apart(dx, result_sizes[0], inputs, input_sizes, in_place)


def _is_apart(result, result_size, inputs, input_sizes, in_place):
    """Whether a result shares no memory with an input, but for one that it is written over row by row."""
    end = result + result_size
    for address, size, is_result in zip(inputs, input_sizes, in_place, strict=False):
        if address < end and result < address + size and not (is_result and address == result):
            return False
    return True


def _known_forward(call):
    """The key of a call, and the addresses of x, weight and bias, of a residual, of out, and of total_out beside one."""
    flags = call.use_diff_of_squares, call.return_stats
    if not call.is_added:
        return _known(call, flags, (call.x, call.weight, call.bias, call.out))
    with_total = call.total_out is not False
    operands = call.x, call.weight, call.bias, call.residual, call.out, call.total_out if with_total else None
    return _known(call, (*flags, with_total), operands)


def _known_backward(call):
    """The same, with the addresses of the inputs and then of the results."""
    number = 2 if call.is_rms else 3
    output_mask, out = call.output_mask, (None,) * number if call.out is None else call.out
    if type(output_mask) is not tuple or not isinstance(out, tuple) or len(output_mask) != number or len(out) != number:
        return UNKNOWN
    flags = call.use_diff_of_squares, *output_mask
    inputs = call.dy, call.x, call.weight, call.mean, call.rstd
    return _known(call, flags, (*inputs, call.dtotal, *out) if call.is_added else (*inputs, *out))


def _known(call, flags, operands):
    normalized_shape, axis, eps = sizes(call.normalized_shape), call.axis, call.eps
    if axis is not None:
        axis = sizes(axis)
        if axis is None:
            return UNKNOWN
    # RMS norm has a default of its own for None, which layer norm refuses
    if normalized_shape is None or (type(eps) is not float and eps is not None):
        return UNKNOWN
    for flag in flags:
        if type(flag) is not bool:
            return UNKNOWN
    key: list[Any] = [call.is_rms, call.is_added, normalized_shape, axis, eps, *flags]
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

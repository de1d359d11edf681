"""Layer norm on CUDA arrays that `checks` has passed: allocate, bring the operands into rows, enqueue the kernels."""

from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from nbnorm.cuda import arrays, kernels, launch, layout, quick, sizes, strided
from nbnorm.cuda.rows import STATE
from nbnorm.problem import wide_dtype

# it allows every access
ABSENT = arrays.View(0, (), (), np.dtype(np.float32), 0)


class Place(NamedTuple):
    """Where a call runs: a device, a stream of it, and by one of its arrays the library that the results are of.

    Temporary arrays live until all is enqueued: their libraries then free them in the stream's order, or wait.
    """

    like: Any
    kind: str
    device: int
    handle: int
    stream: Any
    temporaries: list

    @property
    def capability(self):
        return launch.compute_capability(self.device)

    def empty(self, shape, dtype):
        return arrays.empty(shape, dtype, self.like, self.kind, self.handle)

    def temporary(self, shape, dtype):
        # x's library may have no bfloat16 of its own: what counts here is two bytes
        self.temporaries.append(self.empty(shape, np.dtype(np.float16) if dtype == arrays.BFLOAT16 else dtype))
        return self.view(self.temporaries[-1])._replace(dtype=dtype)

    def view(self, array):
        return arrays.view(array, self.kind)


def forward(problem, x, weight, bias, out, call):
    """Returns y, or None where there is an `out`, and mean and rstd, None unless asked for.

    `call` has the arguments as they came, which `quick` will know such a call by.
    """
    like, return_stats, stream = call[0], call[-2], call[-1]
    kind = arrays.kind(like)
    handle = arrays.stream_handle(stream, like, kind, x.device)
    with ExitStack() as stack:
        stack.enter_context(launch.on(x.device))
        stream_object = launch.stream_object(handle, x.device)
        if stream is not None:
            stack.enter_context(arrays.allocating_on(handle, stream_object, kind, x.device))
        place = Place(like, kind, x.device, handle, stream_object, [])
        y = place.empty(problem.shape, problem.dtype) if out is None else None
        mean = rstd = None
        if return_stats:
            mean, rstd = (place.empty(problem.statistics_shape, problem.statistics_dtype) for _ in range(2))
        if problem.rows > 0 and problem.cols > 0:
            views = [None if array is None else place.view(array) for array in (mean, rstd)]
            plan = _enqueue(problem, x, weight, bias, out or place.view(y), views, place)
            if plan is not None:
                quick.remember(plan, call)
        elif return_stats and problem.rows > 0:
            # a row of no columns has no mean
            for array in (mean, rstd):
                launch.fill_with_nan(place.view(array), place.stream)
    return y, mean, rstd


def _enqueue(problem, x, weight, bias, target, statistics, place):
    """Returns how the same is done again, where it is one kernel on the arrays as they are, else None."""
    y, y_pitch, x_pitch = target, layout.pitch(target, problem), layout.pitch(x, problem)
    if y_pitch is None or layout.may_overwrite(y, y_pitch, x, x_pitch, problem):
        y = place.temporary(problem.shape, problem.dtype)
        y_pitch = layout.pitch(y, problem)
    if x_pitch is None or x.dtype != problem.dtype:
        x = _copied(x, problem.dtype, place)
        x_pitch = layout.pitch(x, problem)
    weight, bias = (_parameter(array, y, place) for array in (weight, bias))

    dtype, itemsize = problem.compute_dtype, x.itemsize
    segments = sizes.segments(problem.cols, dtype.itemsize)
    tile = sizes.tile(problem.cols, itemsize, dtype.itemsize)
    names = tuple(None if array is None else array.dtype.name for array in (x, weight, bias))
    access = layout.access(itemsize, tile.width, x.address, x_pitch, y.address, y_pitch)
    parameter_access = min(layout.access(p.itemsize, tile.piece, p.address) for p in (weight, bias, ABSENT) if p is not None)

    def prepare(step, blocks):
        kernel = kernels.forward(place.capability, names, dtype.name, problem.variance, tile, access, parameter_access, step)
        signature = kernels.forward_signature(names, dtype.name)
        return launch.prepare(kernel, signature, place.device, blocks, tile.threads)

    inputs = [_address(array) for array in (x, weight, bias)]
    eps = launch.number(problem.eps, dtype)
    fixed = (problem.rows, problem.cols, segments, x_pitch // itemsize, y_pitch // itemsize, eps, statistics[0] is not None)
    results = [_address(array) for array in (y, *statistics)]
    plan = None
    if segments == 1:
        enqueue = prepare("whole", -(-problem.rows // tile.teams))
        enqueue(place.stream, *inputs, *fixed, *results, 0)
        if not place.temporaries:
            input_sizes = [layout.extent(array) for array in (x, weight, bias)]
            plan = quick.Plan(enqueue, fixed, problem, place.device, input_sizes, layout.extent(y))
    else:
        blocks = problem.rows * segments
        parts, whole = (place.temporary((count, STATE), dtype).address for count in (blocks, problem.rows))
        prepare("states", blocks)(place.stream, *inputs, *fixed, *results, parts)
        merge, signature = kernels.merge(place.capability, dtype.name), kernels.merge_signature(dtype.name)
        enqueue = launch.prepare(merge, signature, place.device, problem.rows, kernels.MERGE_THREADS)
        enqueue(place.stream, parts, problem.cols, segments, whole)
        prepare("normalise", blocks)(place.stream, *inputs, *fixed, *results, whole)
    if y is not target:
        strided.enqueue(y, target, place)
    return plan


def _address(array):
    return 0 if array is None else array.address


def _parameter(array, y, place):
    """Weight or bias as floats in C order, apart from y, of which a row may be written before another one reads it."""
    if array is None or (layout.is_flat(array) and array.dtype.kind == "f" and not layout.share_memory(array, y)):
        return array
    return _copied(array, wide_dtype(array.dtype) if array.dtype.kind in "biu" else array.dtype, place)


def _copied(array, dtype, place):
    """The array in C order, of this dtype."""
    result = place.temporary(array.shape, dtype)
    strided.enqueue(array, result, place)
    return result

"""Norms of CUDA arrays that `checks` has passed: allocate, bring the operands into rows, enqueue the kernels."""

from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np

from nbnorm.calls.problem import given_dtype, wide_dtype
from nbnorm.cuda import arrays, axes, launch, layout, plans, sizes
from nbnorm.cuda.kernels import combine, signatures, strided, whole_rows
from nbnorm.cuda.kernels.rows import MEANS, STATE

# it allows every access
ABSENT = arrays.View(0, (), (), np.dtype(np.float32), 0)


class Rows(NamedTuple):
    """An array whose rows are `pitch` bytes apart; None where there is none."""

    view: Any
    pitch: int = 0

    @property
    def step(self):
        """The same in elements."""
        return self.pitch // self.view.itemsize if self.view else 0


NO_ROWS = Rows(None)


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
        stored = np.dtype(np.float16) if dtype == arrays.BFLOAT16 else dtype
        self.temporaries.append(arrays.temporary(shape, stored, self.like, self.kind, self.handle))
        return self.view(self.temporaries[-1])._replace(dtype=dtype)

    def workspace(self, counts, dtype):
        """The addresses of so many elements each, in one temporary array."""
        self.temporaries.append(arrays.workspace(sum(counts), dtype, self.like, self.kind, self.device, self.handle))
        start = arrays.address(self.temporaries[-1], self.kind)
        return [start + sum(counts[:i]) * dtype.itemsize for i in range(len(counts))]

    def view(self, array):
        return None if array is None else arrays.view(array, self.kind)


def forward(problem, given, call):
    """Returns y and x + residual, or None where there is an `out` of them, and mean and rstd, None unless asked for.

    `call` has the arguments as they came, by which `plans` will know one like it.
    """
    return_stats = call.return_stats
    with _placed(call.x, given.x.device, call.stream) as place:
        y = place.empty(problem.shape, problem.dtype) if given.out is None else None
        total = place.empty(problem.shape, problem.dtype) if given.with_total and given.total_out is None else None
        mean = rstd = None
        if return_stats:
            mean, rstd = (
                place.empty(problem.statistics_shape, problem.statistics_dtype) if is_returned else None
                for is_returned in (not call.is_rms, True)
            )
        if problem.rows > 0 and problem.cols > 0:
            targets = given.out or place.view(y), given.total_out or place.view(total)
            plan = _enqueue_forward(problem, given, targets, (place.view(mean), place.view(rstd)), place)
            if plan is not None:
                plans.keep_forward(plan._replace(problem=problem), call)
        elif return_stats and problem.rows > 0:
            # a row of no columns has no mean
            for array in filter(None, (mean, rstd)):
                launch.fill(place.view(array), 0xFF, place.stream)
    return y, total, mean, rstd


def backward(problem, given, call):
    """Returns dx, dweight and dbias, None where not asked for or where there is an `out`; `call` is as in `forward`."""
    output_mask, out = given.output_mask, given.out
    with _placed(call.x, given.x.device, call.stream) as place:
        shapes = problem.shape, problem.normalized_shape, problem.normalized_shape
        dtypes = problem.dtype, problem.weight_dtype, problem.weight_dtype
        grads = [
            place.empty(shape, dtype) if wanted and target is None else None
            for wanted, target, shape, dtype in zip(output_mask, out, shapes, dtypes, strict=True)
        ]
        targets = [target or place.view(grad) for target, grad in zip(out, grads, strict=True)]
        if problem.rows > 0 and problem.cols > 0 and any(output_mask):
            plan = _enqueue_backward(problem, given, targets, place)
            if plan is not None:
                plans.keep_backward(plan._replace(problem=problem), call)
        elif problem.cols > 0:
            # sums over no rows
            for target in filter(None, targets[1:]):
                zeros = _flat_target(target, place)
                launch.fill(zeros, 0, place.stream)
                _deliver(zeros, target, place)
    return grads


@contextmanager
def _placed(like, device, stream):
    """The place of a call, where its device is the current one and memory is allocated for its stream."""
    kind = arrays.kind(like)
    handle = arrays.stream_handle(stream, like, kind, device)
    with ExitStack() as stack:
        stack.enter_context(launch.on(device))
        stream_object = launch.stream_object(handle, device)
        if stream is not None:
            stack.enter_context(arrays.allocating_on(handle, stream_object, kind, device))
        yield Place(like, kind, device, handle, stream_object, [])


def _enqueue_forward(problem, given, targets, statistics, place):
    """Returns how the same is done again, where it is one kernel on the arrays as they are, else None."""
    problem, given, targets = axes.forward(problem, given, targets)
    summands = given.x, given.residual
    y, total = (_row_target(target, summands, problem, place) for target in targets)
    x, residual = (_rows(array, problem, place) for array in summands)
    weight, bias = (_parameter(array, (y.view, total.view), place) for array in (given.weight, given.bias))

    dtype = problem.compute_dtype
    segments, tile = axes.shared_out(problem, dtype, "forward")
    parameter_access = min(layout.access(p.itemsize, tile.piece, p.address) for p in (weight, bias, ABSENT) if p is not None)
    eps = launch.epsilon(problem.eps, dtype)
    results = [_address(array) for array in (y.view, *statistics)]

    def enqueue(step, blocks, states, x, residual=NO_ROWS, total=NO_ROWS):
        names = _names(x.view, weight, bias, residual.view, total.view)
        accesses = _access(tile, x, y, total), parameter_access, _access(tile, residual)
        kernel = whole_rows.forward(place.capability, names, dtype.name, problem.variance, tile, accesses, step)
        signature = signatures.forward(names, dtype.name)
        prepared = launch.prepare(kernel, signature, place.device, blocks, tile.threads)
        fixed = (problem.rows, problem.cols, *segments, x.step, y.step, *eps, statistics[1] is not None)
        inputs = [_address(array) for array in (x.view, weight, bias)]
        prepared(place.stream, *inputs, *fixed, *results, states, *_added(residual, total))
        return prepared, fixed

    plan = None
    if segments.number == 1:
        prepared, fixed = enqueue("whole", -(-problem.rows // tile.teams), 0, x, residual, total)
        if not place.temporaries:
            input_sizes, result_sizes = _extents(x.view, weight, bias, residual.view), _extents(y.view, total.view)
            steps = (residual.step, total.step) if residual.view else ()
            plan = plans.Forward(prepared, fixed, problem, place.device, input_sizes, result_sizes, steps)
    else:
        blocks = problem.rows * segments.number
        parts, whole = place.workspace((blocks * STATE, problem.rows * STATE), dtype)
        enqueue("states", blocks, parts, x, residual, total)
        _merge(problem, dtype, segments, (parts, 0), (whole, 0), place)
        # what is written is not added up again
        enqueue("normalise", blocks, whole, *((x, residual) if total.view is None else (total,)))
    for result, target in zip((y, total), targets, strict=True):
        _deliver(result.view, target, place)
    return plan


def _enqueue_backward(problem, given, targets, place):
    """As `_enqueue_forward`, with the sum over the groups of rows behind it."""
    output_mask = with_dx, with_dweight, with_dbias = tuple(target is not None for target in targets)
    is_x_read = with_dx or with_dweight
    given_statistics = given_dtype(given.mean, given.rstd) if is_x_read else None
    dtype = np.result_type(problem.compute_dtype, given_statistics or problem.compute_dtype)
    problem, given, targets = axes.backward(problem, given, targets, dtype)
    # what is not read is none of the kernel's choices
    dtotal, weight = (given.dtotal, given.weight) if with_dx else (None, None)
    mean, rstd = (given.mean, given.rstd) if is_x_read else (None, None)
    dx = _row_target(targets[0], (given.dy, given.x, dtotal), problem, place)
    dy, dtotal = (_rows(array, problem, place) for array in (given.dy, dtotal))
    # for dbias alone, only dy is
    x = _rows(given.x, problem, place) if is_x_read else dy
    weight, mean, rstd = (_parameter(array, (dx.view,), place) for array in (weight, mean, rstd))

    is_given = rstd is not None
    statistics_from = ("given rstd" if mean is None else "given") if is_given else problem.variance
    segments, tile = axes.shared_out(problem, dtype, "backward")
    groups = sizes.groups(problem.rows, segments.number, tile)
    parameter_access = tile.piece if weight is None else layout.access(weight.itemsize, tile.piece, weight.address)
    inputs = [_address(array) for array in (dy.view, x.view, weight, mean, rstd)]
    eps = launch.epsilon(problem.eps, dtype)
    fixed = (problem.rows, problem.cols, groups, *segments, dy.step, x.step, dx.step, *eps)

    def enqueue(step, *results, dtotal=NO_ROWS):
        names = _names(dy.view, x.view, weight, mean, rstd, dtotal.view)
        accesses = _access(tile, dy), _access(tile, x, dx), parameter_access, _access(tile, dtotal)
        options = dtype.name, statistics_from, output_mask, tile, accesses, step
        kernel = whole_rows.backward(place.capability, names, *options)
        signature = signatures.backward(names, dtype.name)
        prepared = launch.prepare(kernel, signature, place.device, groups * segments.number, tile.threads)
        prepared(place.stream, *inputs, *fixed, _address(dx.view), *results, *_added(dtotal))
        return prepared

    # before there is a workspace, which is made anew for each call
    is_plain = segments.number == 1 and not place.temporaries
    sums_size = (with_dweight + with_dbias) * groups * problem.cols
    states = means = sums = 0
    if segments.number > 1:
        rows, parts = problem.rows, problem.rows * segments.number
        counts = sums_size, rows * STATE, rows * MEANS, parts * STATE, parts * MEANS
        sums, states, means, *parts = place.workspace(counts, dtype)
        if with_dx or (with_dweight and not is_given):
            enqueue("means", *parts, 0)
            _merge(problem, dtype, segments, parts, (states, means), place, has_states=not is_given, has_means=with_dx)
    elif sums_size:
        (sums,) = place.workspace((sums_size,), dtype)
    prepared = enqueue("whole" if segments.number == 1 else "gradients", states, means, sums, dtotal=dtotal)

    wanted = [target for target in targets[1:] if target is not None]
    results = [_flat_target(target, place) for target in wanted]
    add = _add_groups(problem, dtype, groups, sums, results, place) if wanted else None
    for result, target in ((dx.view, targets[0]), *zip(results, wanted, strict=True)):
        _deliver(result, target, place)
    if not is_plain or results != wanted:
        return None
    extents = _extents(dy.view, x.view, weight, mean, rstd, dtotal.view), _extents(*targets)
    steps = (dtotal.step,) if dtotal.view else ()
    return plans.Backward(prepared, fixed, add, problem, dtype, sums_size, place.device, *extents, steps)


def _add_groups(problem, dtype, groups, sums, results, place):
    """Enqueue the sums over the groups, of which there are one or two; returns how it is done again."""
    warps = sizes.adding_warps(groups)
    kernel = combine.add_groups(place.capability, dtype.name, problem.weight_dtype.name, warps)
    signature = combine.add_groups_signature(dtype.name, problem.weight_dtype.name)
    blocks = -(-problem.cols // sizes.WARP) * len(results)
    enqueue = launch.prepare(kernel, signature, place.device, blocks, warps * sizes.WARP)
    enqueue(place.stream, sums, groups, problem.cols, results[0].address, results[-1].address)
    return enqueue


def _merge(problem, dtype, segments, parts, whole, place, has_states=True, has_means=False):
    """Enqueue what makes the states and means of rows from those of their segments."""
    kernel = combine.merge(place.capability, dtype.name, has_states, has_means)
    signature = combine.merge_signature(dtype.name)
    enqueue = launch.prepare(kernel, signature, place.device, problem.rows, combine.MERGE_THREADS)
    enqueue(place.stream, *parts, problem.cols, *segments, *whole)


def _address(array):
    return 0 if array is None else array.address


def _names(*operands):
    return tuple(None if array is None else array.dtype.name for array in operands)


def _extents(*views):
    return [layout.extent(view) for view in views]


def _access(tile, *rows):
    """Elements that one access of a vector may have, which of these rows are each a part."""
    views = [r.view for r in rows if r.view is not None]
    if not views:
        return 1
    return layout.access(views[0].itemsize, tile.width, *(n for r in rows if r.view for n in (r.view.address, r.pitch)))


def _added(*rows):
    """What a kernel is handed of a residual and the total, or of dtotal: nothing where nothing is added."""
    if rows[0].view is None:
        return ()
    return [number for r in rows for number in (_address(r.view), r.step)]


def _row_target(target, inputs, problem, place):
    """The rows that are written: the target's, or a temporary array's where it has none or is still to be read."""
    if target is None:
        return NO_ROWS
    pitch = layout.pitch(target, problem)
    if pitch is not None and not any(
        layout.may_overwrite(target, pitch, x, layout.pitch(x, problem), problem) for x in inputs if x is not None
    ):
        return Rows(target, pitch)
    temporary = place.temporary(problem.shape, problem.dtype)
    return Rows(temporary, layout.pitch(temporary, problem))


def _flat_target(target, place):
    return target if layout.is_flat(target) else place.temporary(target.shape, target.dtype)


def _deliver(result, target, place):
    """Enqueue the copy of a result into where it belongs, if it is not there."""
    if result is not target:
        strided.enqueue(result, target, place)


def _rows(array, problem, place):
    """An input as floats in rows."""
    if array is None:
        return NO_ROWS
    pitch = layout.pitch(array, problem)
    if pitch is None or array.dtype.kind in "biu":
        array = _copied(array, place)
        pitch = layout.pitch(array, problem)
    return Rows(array, pitch)


def _parameter(array, results, place):
    """An operand as floats in C order, apart from results, of which a row may be written before another one reads it."""
    if array is None or (
        layout.is_flat(array)
        and array.dtype.kind == "f"
        and not any(layout.share_memory(array, result) for result in results if result is not None)
    ):
        return array
    return _copied(array, place)


def _copied(array, place):
    """The array in C order, as floats."""
    result = place.temporary(array.shape, wide_dtype(array.dtype) if array.dtype.kind in "biu" else array.dtype)
    strided.enqueue(array, result, place)
    return result

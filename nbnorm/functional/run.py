"""What all functions do with a call for which there is no plan: the checks, then the kernels where its arrays lie."""

import functools

from nbnorm import cpu
from nbnorm.calls import arrays, checks, lent_by_jax, lent_by_torch
from nbnorm.cpu import keys, plans

OF_FORWARD = "x", "residual", "weight", "bias", "out", "total_out"
OF_BACKWARD = "x", "dy", "dtotal", "weight", "mean", "rstd", "out"


def forward(call, kept, key):
    """Returns y, total, mean and rstd, None for what is not asked for; a plan of the key is kept among the function's."""
    if key is None and call.stream is None:
        if views := lent_by_torch.lent(call, OF_FORWARD):
            outs = call.out, call.total_out, None, None
            return lent_by_torch.given_back(_forward_on_views(call, views, kept), outs)
        if views := lent_by_jax.lent(call, OF_FORWARD):
            views[4] = lent_by_jax.memory_for(views[0])
            if call.is_added and call.total_out is None:
                views[5] = lent_by_jax.memory_for(views[0])
            return lent_by_jax.given_back(_forward_on_views(call, views, kept), call.x)
    if arrays.is_dask(call.x):
        return _dask().forward(call)
    out, total_out = call.out, None if call.total_out is False else call.total_out
    if arrays.is_cuda(call.x):
        cuda = _cuda()
        y, total, mean, rstd = cuda.plans.forward(call) or cuda.forward(*checks.forward(call), call)
        return _written(y, out), _written(total, total_out), mean, rstd
    problem, operands = checks.forward(call)
    kind = arrays.kind(call.x)
    if out is None:
        operands = operands._replace(out=arrays.empty(problem.shape, problem.dtype, kind))
    if operands.with_total and total_out is None:
        operands = operands._replace(total_out=arrays.empty(problem.shape, problem.dtype, kind))
    y, total, mean, rstd = cpu.forward(problem, operands, call.return_stats)
    if key is not None:
        plan = plans.added(problem, call) if call.is_added else plans.forward(problem, call)
        keys.keep_for_any_rows(kept, key, plan)
    y = _written(y if out is not None else arrays.give_back(y, call.x, kind), out)
    total = _written(total if total_out is not None else arrays.give_back(total, call.x, kind), total_out)
    if not call.return_stats:
        return y, total, None, None
    mean, rstd = (arrays.give_back(array.reshape(problem.statistics_shape), call.x, kind) for array in (mean, rstd))
    return y, total, mean, rstd


def backward(call, kept, key):
    """The same of dx, dweight and dbias."""
    if key is None and call.stream is None:
        if views := lent_by_torch.lent(call, OF_BACKWARD):
            outs = (None, None, None) if call.out is None else (*call.out, None)[:3]
            return lent_by_torch.given_back(_backward_on_views(call, views, kept), outs)
        if views := lent_by_jax.lent(call, OF_BACKWARD):
            dx = lent_by_jax.memory_for(views[0])
            if dx is not None and type(call.output_mask) is tuple and call.output_mask[:1] == (True,):
                views[-1] = (dx, None) if call.is_rms else (dx, None, None)
            return lent_by_jax.given_back(_backward_on_views(call, views, kept), call.x)
    if arrays.is_dask(call.x):
        return _dask().backward(call)
    outs = (None, None, None) if call.out is None else call.out
    if arrays.is_cuda(call.x):
        cuda = _cuda()
        grads = cuda.plans.backward(call) or cuda.backward(*checks.backward(call), call)
        return [_written(grad, out) for grad, out in zip(grads, outs, strict=False)]
    problem, operands = checks.backward(call)
    kind = arrays.kind(call.x)
    dx_out, *others = operands.out
    if dx_out is None and operands.output_mask[0]:
        operands = operands._replace(out=(arrays.empty(problem.shape, problem.dtype, kind), *others))
    grads = cpu.backward(problem, operands)
    if key is not None:
        keys.keep_for_any_rows(kept, key, plans.backward(problem, call, operands.output_mask))
    return [
        _written(grad if out is not None else arrays.give_back(grad, call.x, kind), out)
        for grad, out in zip(grads, outs, strict=False)
    ]


def _forward_on_views(call, views, kept):
    """y, total, mean and rstd of a call whose arrays were lent, by its plan where there is one."""
    x, residual, weight, bias, out, total_out = views
    shape, eps, return_stats = _shape(call), call.eps, call.return_stats
    key = keys.forward_key(x, shape, weight, bias, eps, call.use_diff_of_squares, out, return_stats)
    if call.is_added:
        key = keys.added_key(key, residual, total_out)
    plan = kept.get(key) or keys.of_other_rows(kept, key)
    result = None
    if plan is not None and call.is_added:
        result = plan(x, residual, weight, bias, eps, out, total_out)
    elif plan is not None and (found := plan(x, weight, bias, eps, out)) is not None:
        y, mean, rstd = found if return_stats else (found, None, None)
        result = y, None, mean, rstd
    if result is None:
        # what is wrong is said of the arrays as they came
        checks.forward(call)
        result = forward(call._replace(**dict(zip(OF_FORWARD, views, strict=True))), kept, None if plan else key)
    return result


def _backward_on_views(call, views, kept):
    """dx, dweight and dbias, the same way."""
    x, dy, dtotal, weight, mean, rstd, out = views
    shape, eps, mask = _shape(call), call.eps, call.output_mask
    if call.is_rms:
        mask = (*mask, False) if type(mask) is tuple and len(mask) == 2 else None
    key = keys.backward_key(dy, x, shape, weight, eps, call.use_diff_of_squares, mean, rstd, mask, out)
    if call.is_added:
        key = keys.added_key(key, dtotal)
    plan = kept.get(key) or keys.of_other_rows(kept, key)
    if call.is_rms and out is not None:
        out = *out, None
    grads = plan and plan(dy, x, weight, eps, mean, rstd, out, dtotal)
    if grads is None:
        checks.backward(call)
        grads = backward(call._replace(**dict(zip(OF_BACKWARD, views, strict=True))), kept, None if plan else key)
    return (*grads, None)[:3]


def _shape(call):
    return call.normalized_shape if call.axis is None else keys.along(call.axis, call.normalized_shape, call.x)


@functools.cache
def _cuda():
    """The package of the CUDA kernels, which is imported when it is needed."""
    checks.cuda_is_supported("x: an array on a CUDA device")
    from nbnorm import cuda

    return cuda


def _dask():
    """The package that makes graphs of calls, which is imported when it is needed."""
    from nbnorm import dask

    return dask


def _written(result, out):
    """The result, which is in `out` where there is one."""
    if out is None:
        return result
    arrays.mark_written(out)
    return out

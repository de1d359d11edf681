"""What all functions do with a call for which there is no plan: the checks, then the kernels where its arrays lie."""

import functools

from nbnorm import cpu
from nbnorm.calls import arrays, checks
from nbnorm.cpu import keys, plans


def forward(call, kept, key, given=None):
    """Returns y, total, mean and rstd, None for what is not asked for; a plan of the key is kept among the function's.

    Of a call on lent arrays, `given` is x, weight, bias and out as they came.
    """
    known, call = call, _as_it_came(call, ("x", "weight", "bias", "out"), given)
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
        plan = plans.added(problem, known) if call.is_added else plans.forward(problem, known)
        keys.keep_for_any_rows(kept, key, plan)
    y = _written(y if out is not None else arrays.give_back(y, call.x, kind), out)
    total = _written(total if total_out is not None else arrays.give_back(total, call.x, kind), total_out)
    if not call.return_stats:
        return y, total, None, None
    mean, rstd = (arrays.give_back(array.reshape(problem.statistics_shape), call.x, kind) for array in (mean, rstd))
    return y, total, mean, rstd


def backward(call, kept, key, given=None):
    """The same of dx, dweight and dbias; `given` is x, dy, weight, mean, rstd and out."""
    known, call = call, _as_it_came(call, ("x", "dy", "weight", "mean", "rstd", "out"), given)
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
        keys.keep_for_any_rows(kept, key, plans.backward(problem, known, operands.output_mask))
    return [
        _written(grad if out is not None else arrays.give_back(grad, call.x, kind), out)
        for grad, out in zip(grads, outs, strict=False)
    ]


def _as_it_came(call, names, given):
    """Before its arrays were lent."""
    return call if given is None else call._replace(**dict(zip(names, given, strict=True)))


@functools.cache
def _cuda():
    """The package of the CUDA kernels, which is imported when it is needed."""
    checks.cuda_is_supported("x: an array on a CUDA device")
    from nbnorm import cuda

    return cuda


def _written(result, out):
    """The result, which is in `out` where there is one."""
    if out is None:
        return result
    arrays.mark_written(out)
    return out

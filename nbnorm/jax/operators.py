"""Both passes as one step of a program of JAX's: a call of a handler, or of Python where there is none."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from nbnorm.calls.problem import wide_dtype
from nbnorm.jax import samples, targets


def forward(norm, x, weight, bias):
    """y, mean and rstd, of which RMS norm's mean is an array of no elements; statistics have an entry a row."""
    cols = math.prod(norm.normalized_shape)
    dtype, statistics_dtype = _compute_dtype(x, weight, bias), wide_dtype(x.dtype)
    rows = x.size // cols if cols else math.prod(x.shape[: x.ndim - len(norm.normalized_shape)])
    results = (
        jax.ShapeDtypeStruct((rows, cols), x.dtype),
        jax.ShapeDtypeStruct((0 if norm.is_rms else rows,), statistics_dtype),
        jax.ShapeDtypeStruct((rows,), statistics_dtype),
    )
    if x.size == 0:
        y, mean, rstd = (jnp.zeros(result.shape, result.dtype) for result in results)
    else:
        operands = x.reshape(rows, cols), _row(weight, dtype), _row(bias, dtype)
        choices = x.dtype.name, dtype.name, weight is not None, bias is not None, norm.variance
        y, mean, rstd = _call("forward", norm, choices, operands, results)
    return y.reshape(x.shape), mean, rstd


def backward(norm, dy, x, weight, mean, rstd, mask):
    """dx, dweight and dbias, None where the mask has no True."""
    cols, dtype = math.prod(norm.normalized_shape), _compute_dtype(x, weight)
    weight_dtype = (x if weight is None else weight).dtype
    results: tuple = (
        jax.ShapeDtypeStruct((rstd.size, cols), x.dtype),
        *(jax.ShapeDtypeStruct((cols if wanted else 0,), weight_dtype) for wanted in mask[1:]),
    )
    if x.size == 0:
        grads = tuple(jnp.zeros(result.shape, result.dtype) for result in results)
    else:
        operands = dy.reshape(-1, cols), x.reshape(-1, cols), _row(weight, dtype), mean, rstd
        choices = x.dtype.name, dtype.name, weight_dtype.name, weight is not None, norm.variance, mask
        grads = _call("backward", norm, choices, operands, results)
    shapes = x.shape, norm.normalized_shape, norm.normalized_shape
    return tuple(grad.reshape(shape) if wanted else None for grad, shape, wanted in zip(grads, shapes, mask, strict=True))


def _call(function, norm, choices, operands, results):
    known = zip(operands, _dtypes(function, choices), strict=False)
    if any(operand.size and operand.dtype.name != name for operand, name in known):
        # as of a gradient whose forward was in the other mode: a kernel would read what is not there
        raise TypeError("float64 arrays outside of JAX's 64-bit mode, which they are from; make all of the call in it")
    if targets.are_registered():
        number = targets.number(function, *choices, cols=results[0].shape[-1])
        call = jax.ffi.ffi_call(targets.NAMES[function], results, vmap_method="expand_dims")
        return call(
            *operands, eps=np.float64(norm.eps), kernels=number, variance=np.int64(targets.VARIANCES.index(norm.variance))
        )
    call = partial(_called_back, function, norm, [(result.shape, result.dtype) for result in results])
    return jax.pure_callback(call, results, *operands, vmap_method="expand_dims")


def _dtypes(function, choices):
    """Of the operands, as a kernel reads them: x, weight and bias, or dy, x and weight."""
    x, dtype, *_ = choices
    return (x, dtype, dtype) if function == "forward" else (x, x, dtype)


def _called_back(function, norm, results, *operands):
    arrays = [np.asarray(operand) for operand in operands]
    # what vmap has put in front
    own = (2, 1, 1) if function == "forward" else (2, 2, 1, 1, 1)
    batch = np.broadcast_shapes(*(a.shape[: a.ndim - ndim] for a, ndim in zip(arrays, own, strict=True)))
    made = [np.empty((*batch, *shape), dtype) for shape, dtype in results]
    samples.CALLS[function][0](norm.variance, norm.eps, arrays, made)
    return tuple(made)


def _row(parameter, dtype):
    return jnp.zeros(0, dtype) if parameter is None else parameter.astype(dtype).reshape(-1)


def _compute_dtype(*operands):
    return np.result_type(*(wide_dtype(operand.dtype) for operand in operands if operand is not None))

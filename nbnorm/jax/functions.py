"""Both norms as functions of JAX that have gradients, and these gradients have theirs."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from nbnorm.jax import derivatives, operators


class Norm(NamedTuple):
    """What a norm is of, beside its arrays; JAX compiles one program for each."""

    normalized_shape: tuple[int, ...]
    eps: float
    variance: str

    @property
    def is_rms(self):
        return self.variance == "mean_square"


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def norm(call, x, weight, bias):
    """y, mean and rstd; these two have no gradients: their part of a gradient's gradient is in that of x."""
    return operators.forward(call, x, weight, bias)


def _norm_forward(call, x, weight, bias):
    # weight and bias may be absent, or constants of what is derived. Which are asked for is known by a shape, since values
    # would be traced, and JAX 0.7 wants one structure of what a function returns
    asked = jnp.zeros((*(int(operand is not None and operand.perturbed) for operand in (weight, bias)), 0))
    x, weight, bias = (None if operand is None else operand.value for operand in (x, weight, bias))
    y, mean, rstd = norm(call, x, weight, bias)
    like_bias = None if bias is None else jnp.zeros(0, bias.dtype)
    return (y, mean, rstd), (x, weight, like_bias, mean, rstd, asked)


def _norm_backward(call, kept, grads):
    x, weight, like_bias, mean, rstd, asked = kept
    dy = jnp.zeros(x.shape, x.dtype) if isinstance(grads[0], SymbolicZero) else grads[0]
    mask = (True, *map(bool, asked.shape[:2]))
    dx, *sums = gradients(call, mask, dy, x, weight, mean, rstd)
    return dx, *(_like(operand, call, grad) for operand, grad in zip((weight, like_bias), sums, strict=True))


def _like(parameter, call, grad):
    """The gradient of a parameter in its dtype, zeros where it was not asked for; None where there is no parameter."""
    if parameter is None:
        return None
    return jnp.zeros(call.normalized_shape, parameter.dtype) if grad is None else grad.astype(parameter.dtype)


norm.defvjp(_norm_forward, _norm_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gradients(call, mask, dy, x, weight, mean, rstd):
    """dx, dweight and dbias, None where the mask has no True."""
    return operators.backward(call, dy, x, weight, mean, rstd, mask)


def _gradients_forward(call, mask, dy, x, weight, mean, rstd):
    return gradients(call, mask, dy, x, weight, mean, rstd), (dy, x, weight, mean, rstd)


def _gradients_backward(call, mask, kept, doubles):
    *operands, _, _ = kept
    found = jax.vjp(partial(derivatives.gradients, call, mask), *operands)[1](doubles)
    return *found, None, None


gradients.defvjp(_gradients_forward, _gradients_backward)

"""Both norms as functions of JAX that have gradients, and these gradients have theirs."""

from functools import partial
from typing import NamedTuple

import jax
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
    # weight and bias may be absent, or constants of what is derived
    asked = tuple(() if parameter is not None and parameter.perturbed else None for parameter in (weight, bias))
    x, weight, bias = (None if operand is None else operand.value for operand in (x, weight, bias))
    y, mean, rstd = norm(call, x, weight, bias)
    # what is asked for is no array, but a part of the structure
    return (y, mean, rstd), (x, weight, mean, rstd, asked)


def _norm_backward(call, kept, grads):
    x, weight, mean, rstd, asked = kept
    dy = jax.numpy.zeros(x.shape, x.dtype) if isinstance(grads[0], SymbolicZero) else grads[0]
    mask = (True, *(wanted is not None for wanted in asked))
    return gradients(call, mask, dy, x, weight, mean, rstd)


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

"""Both norms as functions of JAX that have gradients, and these gradients have theirs."""

from functools import partial
from typing import NamedTuple

import jax

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
    """y, mean and rstd; only that of y is a gradient."""
    return operators.forward(call, x, weight, bias)


def _norm_forward(call, x, weight, bias):
    y, mean, rstd = norm(call, x, weight, bias)
    # their part of a gradient's gradient is in that of x
    statistics = jax.lax.stop_gradient((mean, rstd))
    return (y, mean, rstd), (x, weight, bias is not None, *statistics)


def _norm_backward(call, kept, grads):
    x, weight, has_bias, mean, rstd = kept
    return gradients(call, (True, weight is not None, has_bias), grads[0], x, weight, mean, rstd)


norm.defvjp(_norm_forward, _norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gradients(call, mask, dy, x, weight, mean, rstd):
    """dx, dweight and dbias, None where the mask has no True."""
    return operators.backward(call, dy, x, weight, mean, rstd, mask)


def _gradients_forward(call, mask, dy, x, weight, mean, rstd):
    return gradients(call, mask, dy, x, weight, mean, rstd), (dy, x, weight, mean, rstd)


def _gradients_backward(call, mask, kept, doubles):
    *operands, mean, rstd = kept
    found = jax.vjp(partial(derivatives.gradients, call, mask), *operands)[1](doubles)
    return *found, jax.numpy.zeros_like(mean), jax.numpy.zeros_like(rstd)


gradients.defvjp(_gradients_forward, _gradients_backward)

"""layer_norm and rms_norm as functions of JAX."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nbnorm.calls import checks
from nbnorm.calls.operands import no_varying
from nbnorm.calls.problem import ForwardCall
from nbnorm.functional.types import Shape
from nbnorm.jax import functions

_norm = partial(jax.jit, static_argnums=0, inline=True)(functions.norm)


def layer_norm(
    x: Any,
    normalized_shape: Shape,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    use_diff_of_squares: bool = False,
) -> jax.Array:
    """Layer norm over the trailing dimensions, in JAX's programs: under jit, grad and vmap, on the CPU.

    Parameters
    ----------
    x : array, shape ``(*batch, *normalized_shape)``
        float16, bfloat16, float32 or, in JAX's 64-bit mode, float64; traced, or with values. Integers and booleans become
        JAX's widest float. So does a float64 array from the 64-bit mode outside of it: float32, as in ``jax.numpy.mean``.
    normalized_shape : int or sequence of int
        The trailing dimensions that make up a row; an int stands for the last one.
    weight, bias : array, shape normalized_shape, optional
        Scale and shift, each of any of these dtypes.
    eps : float
        Added to the variance; a number that is not traced.
    use_diff_of_squares : bool
        Take the variance as ``mean(x**2) - mean(x)**2``, as in `nbnorm.layer_norm`.

    Returns
    -------
    jax.Array, shape of x
        Of x's dtype, with the bits that `nbnorm.layer_norm` has on NumPy arrays.

    Raises
    ------
    TypeError
        For a wrong kind of object or dtype, when the function is traced.
    ValueError
        For a wrong shape or eps.

    See Also
    --------
    nbnorm.layer_norm : The same for arrays of any library, outside of programs.

    Notes
    -----
    x, weight, mean and rstd are kept for the backward, which has the bits of `nbnorm.layer_norm_backward` with these
    statistics. The gradients of weight and bias are summed in float64 and rounded once, also of 16-bit types; under vmap,
    once for each sample. Gradients of gradients are found by JAX's own operations. Forward-mode derivatives are refused by
    JAX.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nbnorm.jax
    >>> x = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    >>> jax.jit(lambda x: nbnorm.jax.layer_norm(x, 4))(x).round(4)
    Array([[-1.3416, -0.4472,  0.4472,  1.3416]], dtype=float32)
    >>> jax.grad(lambda x: nbnorm.jax.layer_norm(x, 4)[0, 0])(x).round(3)
    Array([[ 0.268, -0.358, -0.089,  0.179]], dtype=float32)
    """
    return _applied(ForwardCall(x, normalized_shape, weight, bias, eps, use_diff_of_squares))


def rms_norm(x: Any, normalized_shape: Shape, weight: Any = None, eps: float | None = None) -> jax.Array:
    """RMS norm over the trailing dimensions, in JAX's programs: under jit, grad and vmap, on the CPU.

    Parameters
    ----------
    x : array, shape ``(*batch, *normalized_shape)``
        As in `layer_norm`.
    normalized_shape : int or sequence of int
        As in `layer_norm`.
    weight : array, shape normalized_shape, optional
        Scale of each element of a row.
    eps : float, optional
        Added to the mean square; None is the eps of float32, or of float64 for float64.

    Returns
    -------
    jax.Array, shape of x
        As in `layer_norm`.

    Raises
    ------
    TypeError
        For a wrong kind of object or dtype, when the function is traced.
    ValueError
        For a wrong shape or eps.

    See Also
    --------
    nbnorm.rms_norm : The same for arrays of any library, outside of programs.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nbnorm.jax
    >>> jax.jit(lambda x: nbnorm.jax.rms_norm(x, 2))(jnp.array([[3.0, -3.0]]))
    Array([[ 1., -1.]], dtype=float32)
    """
    return _applied(ForwardCall(x, normalized_shape, weight, eps=eps, is_rms=True))


def _applied(call):
    problem = _checked(call)
    given = call.x, call.weight, call.bias
    operands = [None if array is None else _floating(array) for array in given]
    if any(operand is not array for operand, array in zip(operands, given, strict=True)):
        # JAX may have rounded it to fewer bits, for which another eps is the usual one
        problem = _checked(call._replace(x=operands[0], weight=operands[1], bias=operands[2]))
    for name, operand in zip(("x", "weight", "bias"), operands, strict=True):
        no_varying(name, operand)
    norm = functions.Norm(problem.normalized_shape, problem.eps, problem.variance)
    return _norm(norm, *operands)[0]


def _checked(call):
    """The problem of a call on JAX's arrays, in whose place the checks see others of their shapes and dtypes."""
    return checks.forward(call._replace(x=_seen(call.x), weight=_seen(call.weight), bias=_seen(call.bias)))[0]


def _seen(array):
    if isinstance(array, jax.Array) and isinstance(array.dtype, np.dtype):
        return np.broadcast_to(np.empty((), array.dtype), array.shape)
    return array


def _floating(array):
    """In a float dtype of the mode that JAX is in, whose own operations have no float64 outside of the 64-bit mode."""
    if not isinstance(array, jax.Array):
        array = jnp.asarray(array)
    # bfloat16 is of NumPy's kind V
    dtype = jax.dtypes.canonicalize_dtype(array.dtype if array.dtype.kind in "fV" else np.float64)
    return array if array.dtype == dtype else array.astype(dtype)

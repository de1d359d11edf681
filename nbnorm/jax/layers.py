"""Both norms as pytrees of JAX that hold their parameters."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from nbnorm.calls import options
from nbnorm.functional.types import Shape
from nbnorm.jax.functional import layer_norm, rms_norm


class LayerNorm:
    """Layer norm with its parameters: a pytree, whose leaves are weight and bias, and a function of x.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The trailing dimensions of the input that make up a row.
    eps : float
        Added to the variance.
    elementwise_affine : bool
        Whether there are a weight and, unless switched off, a bias.
    bias : bool
        Whether there is a bias.
    device : jax.Device or jax.sharding.Sharding, optional
        Where the parameters live.
    dtype : dtype, optional
        Of the parameters: float16, bfloat16, float32 (the default) or, in JAX's 64-bit mode, float64.
    use_diff_of_squares : bool
        Take the variance as ``mean(x**2) - mean(x)**2``.

    Attributes
    ----------
    normalized_shape : tuple of int
    eps : float
    elementwise_affine : bool
    use_diff_of_squares : bool
    weight : jax.Array, shape normalized_shape, or None
        Ones at first.
    bias : jax.Array, shape normalized_shape, or None
        Zeros at first.

    Raises
    ------
    TypeError
        For a wrong kind of argument or dtype.
    ValueError
        For an empty or negative normalized_shape, or an eps that is negative or not finite.

    See Also
    --------
    nbnorm.jax.layer_norm : The function, which says what x may be.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nbnorm.jax
    >>> ln = nbnorm.jax.LayerNorm(4)
    >>> ln
    LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
    >>> x = jnp.array([[1.0, 2.0, 3.0, 4.0]])
    >>> grads = jax.grad(lambda ln: ln(x).sum())(ln)
    >>> grads.bias
    Array([1., 1., 1., 1.], dtype=float32)
    >>> ln = jax.tree.map(lambda parameter, grad: parameter - 0.5 * grad, ln, grads)
    >>> jax.jit(lambda ln, x: ln(x))(ln, x).sum().round(3)
    Array(-4., dtype=float32)
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        use_diff_of_squares: bool = False,
    ) -> None:
        self.normalized_shape = options.shape(normalized_shape)
        self.eps = options.epsilon(eps)
        self.elementwise_affine = options.flag("elementwise_affine", elementwise_affine)
        self.use_diff_of_squares = options.flag("use_diff_of_squares", use_diff_of_squares)
        has_bias = options.flag("bias", bias) and self.elementwise_affine
        dtype = options.float_dtype(dtype)
        self.weight: Any = jnp.ones(self.normalized_shape, dtype, device=device) if self.elementwise_affine else None
        self.bias: Any = jnp.zeros(self.normalized_shape, dtype, device=device) if has_bias else None

    def __call__(self, x: Any) -> jax.Array:
        """Layer norm of x with this layer's parameters; see `layer_norm`."""
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, self.use_diff_of_squares)

    def __repr__(self) -> str:
        mode = ", use_diff_of_squares=True" if self.use_diff_of_squares else ""
        return (
            f"LayerNorm({self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}{mode})"
        )


class RMSNorm:
    """RMS norm with its weight: a pytree, whose leaf is the weight, and a function of x.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The trailing dimensions of the input that make up a row.
    eps : float, optional
        Added to the mean square; None is `rms_norm`'s default.
    elementwise_affine : bool
        Whether there is a weight.
    device, dtype : optional
        As in `LayerNorm`.

    Attributes
    ----------
    normalized_shape : tuple of int
    eps : float or None
    elementwise_affine : bool
    weight : jax.Array, shape normalized_shape, or None
        Ones at first.

    Raises
    ------
    TypeError
        For a wrong kind of argument or dtype.
    ValueError
        For an empty or negative normalized_shape, or an eps that is negative or not finite.

    See Also
    --------
    nbnorm.jax.rms_norm : The function.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import nbnorm.jax
    >>> nbnorm.jax.RMSNorm(2)(jnp.array([[3.0, -3.0]]))
    Array([[ 1., -1.]], dtype=float32)
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self.normalized_shape = options.shape(normalized_shape)
        self.eps = None if eps is None else options.epsilon(eps)
        self.elementwise_affine = options.flag("elementwise_affine", elementwise_affine)
        dtype = options.float_dtype(dtype)
        self.weight: Any = jnp.ones(self.normalized_shape, dtype, device=device) if self.elementwise_affine else None

    def __call__(self, x: Any) -> jax.Array:
        """RMS norm of x with this layer's weight; see `rms_norm`."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)

    def __repr__(self) -> str:
        return f"RMSNorm({self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine})"


def _flatten_with_keys(names, layer):
    options = tuple((name, value) for name, value in vars(layer).items() if name not in names)
    return [(GetAttrKey(name), getattr(layer, name)) for name in names], options


def _unflatten(names, kind, options, leaves):
    # past the constructor: JAX puts tracers, stacked parameters and its own markers in the places of leaves
    layer = object.__new__(kind)
    vars(layer).update(options)
    vars(layer).update(zip(names, leaves, strict=True))
    return layer


for _kind, _names in ((LayerNorm, ("weight", "bias")), (RMSNorm, ("weight",))):
    jax.tree_util.register_pytree_with_keys(_kind, partial(_flatten_with_keys, _names), partial(_unflatten, _names, _kind))

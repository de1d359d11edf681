"""Layer norm as an object that holds its parameters."""

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from nbnorm.calls import arrays, axes, checks, operands, options, state
from nbnorm.cpu import keys, plans
from nbnorm.functional import (
    Array,
    Axis,
    LayerNormGrads,
    RMSNormGrads,
    Shape,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)


class Named(Protocol):
    """A mapping of names to arrays, or a group in a file or the file, which give their arrays in ways of their own."""

    def keys(self) -> Iterable[Any]: ...


class LayerNorm:
    """Layer normalisation with a learnable scale and shift, with the arguments of ``torch.nn.LayerNorm``.

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
    device : str, optional
        Where the parameters live: "cpu", which None stands for, or "cuda", "cuda:1" and so on, as Numba device arrays, which
        go with inputs of any library on that device.
    dtype : dtype, optional
        Of the parameters: float16, bfloat16, float32 (the default) or float64.
    use_diff_of_squares : bool
        Take the variance as ``mean(x**2) - mean(x)**2``.
    axis : int or sequence of int, optional
        The axes of the input along which it has normalized_shape, as in `layer_norm`; all from the front or all from the
        back. ``LayerNorm(96, axis=1)`` is for images with the channels first.

    Attributes
    ----------
    normalized_shape : tuple of int
    axis : int, tuple of int or None
    eps : float
    elementwise_affine : bool
    use_diff_of_squares : bool
    device : str
    weight : array, shape normalized_shape, or None
        Ones at first.
    bias : array, shape normalized_shape, or None
        Zeros at first.

    Raises
    ------
    TypeError
        For a wrong kind of argument, dtype or device.
    ValueError
        For an empty or negative normalized_shape, or an eps that is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> ln = nbnorm.LayerNorm(4)
    >>> ln
    LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
    >>> x = np.arange(8, dtype=np.float32).reshape(2, 4)
    >>> ln(x).dtype
    dtype('float32')
    >>> dx, dweight, dbias = ln.backward(np.ones_like(x), x)
    >>> dbias
    array([2., 2., 2., 2.], dtype=float32)
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
        axis: Axis = None,
    ) -> None:
        self.normalized_shape = options.shape(normalized_shape)
        self.axis = axes.of_layer(axis, self.normalized_shape)
        self.eps = options.epsilon(eps)
        self.elementwise_affine = options.flag("elementwise_affine", elementwise_affine)
        self.use_diff_of_squares = options.flag("use_diff_of_squares", use_diff_of_squares)
        self.device, number = checks.device(device)
        has_bias = options.flag("bias", bias) and self.elementwise_affine
        dtype = options.float_dtype(dtype)
        ones = np.ones(self.normalized_shape, dtype) if self.elementwise_affine else None
        zeros = np.zeros(self.normalized_shape, dtype) if has_bias else None
        self.weight: Any = arrays.on_device(ones, self.device, number)
        self.bias: Any = arrays.on_device(zeros, self.device, number)

    def forward(self, x: Array) -> Array:
        """Layer norm of x with this layer's parameters; see `layer_norm`."""
        # past one more call, which is a twentieth of the time at (1, 64)
        weight, bias, eps = self.weight, self.bias, self.eps
        shape = self.normalized_shape if self.axis is None else keys.along(self.axis, self.normalized_shape, x)
        key = keys.forward_key(x, shape, weight, bias, eps, self.use_diff_of_squares, None, False)
        plan = plans.LAYER_NORM.get(key)
        y = None if plan is None else plan(x, weight, bias, eps, None)
        if y is not None:
            return y
        operands.no_training(x, "LayerNorm", (weight, bias))
        return layer_norm(x, self.normalized_shape, weight, bias, eps, self.use_diff_of_squares, axis=self.axis)

    def __call__(self, x: Array) -> Array:
        """The same as `forward`."""
        return self.forward(x)

    def backward(self, dy: Array, x: Array) -> LayerNormGrads:
        """Gradients for dy at the input x, None for a parameter that is switched off; see `layer_norm_backward`.

        They are of x's library, whatever the parameters are. Nothing is kept from the forward pass, so that several threads
        can use one layer.
        """
        return layer_norm_backward(
            dy,
            x,
            self.normalized_shape,
            self.weight,
            self.eps,
            self.use_diff_of_squares,
            output_mask=(True, self.weight is not None, self.bias is not None),
            axis=self.axis,
        )

    def state_dict(self) -> dict[str, Array]:
        """The parameters that are present, by name: the arrays themselves, not copies."""
        parameters = {"weight": self.weight, "bias": self.bias}
        return {name: array for name, array in parameters.items() if array is not None}

    def load_state_dict(self, mapping: Named, prefix: str = "") -> None:
        """Copy parameters from a mapping of names to arrays, all or none of them.

        Parameters
        ----------
        mapping : mapping of str to array_like
            Has the names that `state_dict` returns; floats of any supported library, device and dtype, cast to this layer's.
            Also an open safetensors file, or a group of an HDF5 or Zarr file.
        prefix : str
            What the layer's names begin with in the mapping of a whole model, such as ``"encoder.norm1."``; other names are
            not looked at. It leads into groups within groups as well.

        Raises
        ------
        TypeError
            For what is no mapping, or an entry that is no array of floats.
        ValueError
            For a missing or unexpected name, an array of another shape, or a number that is beyond the range of this
            layer's dtype.
        """
        _load(self, mapping, prefix)

    def extra_repr(self) -> str:
        """The arguments, as `repr` shows them."""
        mode = ", use_diff_of_squares=True" if self.use_diff_of_squares else ""
        mode += "" if self.axis is None else f", axis={self.axis}"
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
            f"bias={self.bias is not None}{mode}"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class RMSNorm:
    """RMS normalisation with a learnable scale, with the arguments of ``torch.nn.RMSNorm``.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The trailing dimensions of the input that make up a row.
    eps : float, optional
        Added to the mean square; None is `rms_norm`'s default.
    elementwise_affine : bool
        Whether there is a weight.
    device, dtype, axis : optional
        As in `LayerNorm`.

    Attributes
    ----------
    normalized_shape : tuple of int
    axis : int, tuple of int or None
    eps : float or None
    elementwise_affine : bool
    device : str
    weight : array, shape normalized_shape, or None
        Ones at first.

    Raises
    ------
    TypeError
        For a wrong kind of argument, dtype or device.
    ValueError
        For an empty or negative normalized_shape, or an eps that is negative or not finite.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> rms = nbnorm.RMSNorm(4)
    >>> rms
    RMSNorm((4,), eps=None, elementwise_affine=True)
    >>> x = np.arange(8, dtype=np.float32).reshape(2, 4)
    >>> rms(x).dtype
    dtype('float32')
    >>> dx, dweight = rms.backward(np.ones_like(x), x)
    >>> dweight.shape
    (4,)
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        axis: Axis = None,
    ) -> None:
        self.normalized_shape = options.shape(normalized_shape)
        self.axis = axes.of_layer(axis, self.normalized_shape)
        self.eps = None if eps is None else options.epsilon(eps)
        self.elementwise_affine = options.flag("elementwise_affine", elementwise_affine)
        self.device, number = checks.device(device)
        dtype = options.float_dtype(dtype)
        ones = np.ones(self.normalized_shape, dtype) if self.elementwise_affine else None
        self.weight: Any = arrays.on_device(ones, self.device, number)

    def forward(self, x: Array) -> Array:
        """RMS norm of x with this layer's weight; see `rms_norm`."""
        if type(x) is not np.ndarray:
            operands.no_training(x, "RMSNorm", (self.weight,))
        return rms_norm(x, self.normalized_shape, self.weight, self.eps, axis=self.axis)

    def __call__(self, x: Array) -> Array:
        """The same as `forward`."""
        return self.forward(x)

    def backward(self, dy: Array, x: Array) -> RMSNormGrads:
        """Gradients for dy at the input x, None for a weight that is switched off; see `rms_norm_backward`.

        They are of x's library, whatever the weight is. Nothing is kept from the forward pass.
        """
        output_mask = (True, self.weight is not None)
        return rms_norm_backward(
            dy, x, self.normalized_shape, self.weight, self.eps, output_mask=output_mask, axis=self.axis
        )

    def state_dict(self) -> dict[str, Array]:
        """The weight by its name, if there is one: the array itself, not a copy."""
        return {} if self.weight is None else {"weight": self.weight}

    def load_state_dict(self, mapping: Named, prefix: str = "") -> None:
        """Copy the weight from a mapping of names to arrays, as `LayerNorm.load_state_dict` does."""
        _load(self, mapping, prefix)

    def extra_repr(self) -> str:
        """The arguments, as `repr` shows them."""
        axis = "" if self.axis is None else f", axis={self.axis}"
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}{axis}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def _load(layer, mapping, prefix):
    for parameter, place, array in state.matched(mapping, prefix, layer.state_dict(), layer.normalized_shape):
        arrays.write(array, place)
        arrays.mark_written(parameter)

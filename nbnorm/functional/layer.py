"""Layer norm and its gradients as functions of arrays."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from nbnorm.calls.problem import BackwardCall, ForwardCall
from nbnorm.cpu import keys, plans
from nbnorm.functional import addressed, run
from nbnorm.functional.types import Array, Axis, Shape, ends_a_graph


class LayerNormResult(NamedTuple):
    """What `layer_norm` returns with ``return_stats=True``."""

    y: Array
    mean: Array
    rstd: Array


class LayerNormGrads(NamedTuple):
    """What `layer_norm_backward` returns; an entry that was not asked for is None."""

    dx: Array
    dweight: Array
    dbias: Array


@ends_a_graph
def layer_norm(
    x: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    use_diff_of_squares: bool = False,
    *,
    out: Array | None = None,
    return_stats: bool = False,
    stream: Any = None,
    axis: Axis = None,
) -> Any:
    """Normalise an array over its trailing dimensions.

    Parameters
    ----------
    x : array_like, shape ``(*batch, *normalized_shape)``
        float16, bfloat16, float32 or float64; integers, booleans, lists and scalars become float64. NumPy arrays of any
        strides, torch CPU tensors, JAX CPU arrays and other DLPack CPU arrays are read where they lie, and so are
        Numba, CuPy and torch arrays on a CUDA device and other objects with a ``__cuda_array_interface__``,
        but for JAX's. Of a Dask array, the results are Dask arrays, which are computed when they are asked for.
    normalized_shape : int or sequence of int
        The trailing dimensions of x that make up a row; an int stands for the last one.
    weight, bias : array_like, shape normalized_shape, optional
        Scale and shift of each element of a row, of any of the dtypes of x, on the device of x.
    eps : float
        Added to the variance, not negative.
    use_diff_of_squares : bool
        Take the variance as ``mean(x**2) - mean(x)**2``, clamped at 0, from one sweep over the row. In float64 it is
        less accurate where the mean is large against the deviations.
    out : array, shape of x, dtype of y, optional
        Where to write y. It may be x itself, or overlap any input.
    return_stats : bool
        Return mean and rstd too.
    stream : stream or int, optional
        For CUDA arrays only: where to enqueue the work, a stream of Numba, CuPy, torch or cuda.core, or its address. By
        default the current stream of x's library. The call returns before the work is done. Whatever fills the
        other arrays must be enqueued on this stream before the call.
    axis : int or sequence of int, optional
        The axes of x along which it has normalized_shape: adjacent ones, in their order, that count from the front or, below
        0, from the back. By default the last ones. weight and bias lie along them. ``axis=1`` is the norm over the channels
        of images ``(n, channels, height, width)``.

    Returns
    -------
    y : array, shape of x
        Of x's dtype and library, in C order; or `out`. JAX has float64 only in its 64-bit mode, and rounds to float32
        without. For an object with nothing but a ``__cuda_array_interface__``, a Numba device array.
    LayerNormResult
        With ``return_stats=True``: y, mean and rstd, the latter two of shape ``(*batch, 1, ..., 1)`` with a 1 for each
        normalized dimension, float64 for float64 input, else float32.

    Raises
    ------
    TypeError
        For a wrong kind of object, dtype or device.
    ValueError
        For a wrong shape, eps or layout, a read-only `out`, or an `out` of another dtype than y.

    Notes
    -----
    ``y = (x - mean) * rstd * weight + bias`` with ``rstd = 1 / sqrt(var + eps)`` [1]_, where var is
    ``mean((x - mean)**2)``. On the CPU, sums are float64 wherever float32 would lose digits; CUDA kernels compute in
    float32, for float64 operands in float64. The mean is subtracted in two parts, so that rows with a large mean keep their
    digits. A NaN or Inf stays in its row.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", arXiv:1607.06450, 2016.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x = np.array([[1.0, 2.0, 3.0, 4.0], [10.0, 10.0, 20.0, 20.0]])
    >>> nbnorm.layer_norm(x, 4).round(4)
    array([[-1.3416, -0.4472,  0.4472,  1.3416],
           [-1.    , -1.    ,  1.    ,  1.    ]])
    >>> y, mean, rstd = nbnorm.layer_norm(x, 4, weight=np.full(4, 2.0), bias=np.ones(4), return_stats=True)
    >>> mean
    array([[ 2.5],
           [15. ]])
    """
    shape = normalized_shape if axis is None else keys.along(axis, normalized_shape, x)
    key = keys.forward_key(x, shape, weight, bias, eps, use_diff_of_squares, out, return_stats)
    if key is None and stream is None:
        options = shape, eps, use_diff_of_squares, return_stats
        found = addressed.forward((x, None, weight, bias, out, False), options)
        if found is not None:
            return LayerNormResult(found[0], *found[2:]) if return_stats else found[0]
    plan = plans.LAYER_NORM.get(key) or keys.of_other_rows(plans.LAYER_NORM, key)
    if plan is not None and stream is None:
        result = plan(x, weight, bias, eps, out)
        if result is not None:
            return LayerNormResult(*result) if return_stats else result
    call = ForwardCall(x, normalized_shape, weight, bias, eps, use_diff_of_squares, out, return_stats, stream, axis=axis)
    y, _, mean, rstd = run.forward(call, plans.LAYER_NORM, None if plan else key)
    return LayerNormResult(y, mean, rstd) if return_stats else y


@ends_a_graph
def layer_norm_backward(
    dy: Array,
    x: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
    eps: float = 1e-5,
    use_diff_of_squares: bool = False,
    *,
    mean: Array | None = None,
    rstd: Array | None = None,
    output_mask: Sequence[bool] = (True, True, True),
    out: Sequence[Array | None] | None = None,
    stream: Any = None,
    axis: Axis = None,
) -> LayerNormGrads:
    """Gradients of `layer_norm` with respect to x, weight and bias.

    Parameters
    ----------
    dy : array_like, shape of x
        The gradient with respect to y; its dtype may differ from x's.
    x : array_like, shape ``(*batch, *normalized_shape)``
        As in `layer_norm`.
    normalized_shape : int or sequence of int
        As in `layer_norm`.
    weight : array_like, shape normalized_shape, optional
        As in `layer_norm`.
    eps : float
        As in `layer_norm`.
    use_diff_of_squares : bool
        As in `layer_norm`; decides how the statistics are recomputed.
    mean, rstd : array_like, shape ``(*batch, 1, ..., 1)``, optional
        The statistics that `layer_norm` returned. Without them they are recomputed while the row is in the cache, which
        is more accurate for rows with a large mean, since a stored float32 mean is rounded. Both or neither.
    output_mask : sequence of three bools
        Which of dx, dweight and dbias to compute. The others are None and cost nothing.
    out : tuple of three arrays or None, optional
        Where to write the gradients. dx may be dy or x itself, or overlap any input.
    stream : stream or int, optional
        As in `layer_norm`.
    axis : int or sequence of int, optional
        As in `layer_norm`.

    Returns
    -------
    LayerNormGrads
        dx of x's shape and dtype; dweight and dbias of shape normalized_shape and of weight's dtype (x's where weight is
        None), also when weight is None. All of x's library.

    Raises
    ------
    TypeError
        For a wrong kind of object, dtype or device.
    ValueError
        For a wrong shape, eps, mask or layout, or only one of mean and rstd.

    Notes
    -----
    With ``x_hat = (x - mean) * rstd``, ``g = dy * weight`` and means over a row [1]_::

        dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))
        dweight = sum over rows of dy * x_hat
        dbias = sum over rows of dy

    Both variance modes have these same gradients, since they are the same function; where difference of squares had to be
    clamped, its rstd is used as it is. dweight and dbias are float64 sums, on CUDA float32 ones where no operand is float64,
    rounded once; the order of every sum depends on the shape alone, so the results have the same bits at any number of
    threads, and call after call.

    References
    ----------
    .. [1] A. Karpathy, "LayerNorm", llm.c, doc/layernorm/layernorm.md, 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x = np.array([[1.0, 2.0, 3.0, 4.0], [10.0, 10.0, 20.0, 20.0]])
    >>> dx, dweight, dbias = nbnorm.layer_norm_backward(np.eye(2, 4), x, 4)
    >>> dx[0].round(3)
    array([ 0.268, -0.358, -0.089,  0.179])
    >>> dbias
    array([1., 1., 0., 0.])
    """
    shape = normalized_shape if axis is None else keys.along(axis, normalized_shape, x)
    key = keys.backward_key(dy, x, shape, weight, eps, use_diff_of_squares, mean, rstd, output_mask, out)
    if key is None and stream is None:
        options = shape, eps, use_diff_of_squares, output_mask
        grads = addressed.backward((x, dy, None, weight, mean, rstd), options, out)
        if grads is not None:
            return LayerNormGrads(*grads)
    plan = plans.LAYER_NORM_BACKWARD.get(key) or keys.of_other_rows(plans.LAYER_NORM_BACKWARD, key)
    if plan is not None and stream is None:
        grads = plan(dy, x, weight, eps, mean, rstd, out)
        if grads is not None:
            return LayerNormGrads(*grads)
    call = BackwardCall(
        dy, x, normalized_shape, weight, eps, use_diff_of_squares, mean, rstd, output_mask, out, stream, axis=axis
    )
    return LayerNormGrads(*run.backward(call, plans.LAYER_NORM_BACKWARD, None if plan else key))

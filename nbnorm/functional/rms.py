"""RMS norm and its gradients."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from nbnorm.calls.problem import BackwardCall, ForwardCall
from nbnorm.cpu import keys, plans
from nbnorm.functional import addressed, run
from nbnorm.functional.types import Array, Axis, Shape, ends_a_graph


class RMSNormResult(NamedTuple):
    """What `rms_norm` returns with ``return_stats=True``."""

    y: Array
    rstd: Array


class RMSNormGrads(NamedTuple):
    """What `rms_norm_backward` returns; an entry that was not asked for is None."""

    dx: Array
    dweight: Array


@ends_a_graph
def rms_norm(
    x: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
    eps: float | None = None,
    *,
    out: Array | None = None,
    return_stats: bool = False,
    stream: Any = None,
    axis: Axis = None,
) -> Any:
    """Divide an array by its root mean square over its trailing dimensions.

    Parameters
    ----------
    x : array_like, shape ``(*batch, *normalized_shape)``
        As in `layer_norm`.
    normalized_shape : int or sequence of int
        The trailing dimensions of x that make up a row; an int stands for the last one.
    weight : array_like, shape normalized_shape, optional
        Scale of each element of a row, of any of the dtypes of x, on the device of x.
    eps : float, optional
        Added to the mean square, not negative. By default as in torch: 2**-52 where x is float64, integers or booleans,
        else 2**-23, for 16-bit types too.
    out : array, shape of x, dtype of y, optional
        Where to write y. It may be x itself, or overlap any input.
    return_stats : bool
        Return rstd too.
    stream : stream or int, optional
        As in `layer_norm`.
    axis : int or sequence of int, optional
        As in `layer_norm`.

    Returns
    -------
    y : array, shape of x
        Of x's dtype and library, in C order; or `out`.
    RMSNormResult
        With ``return_stats=True``: y and rstd, the latter of shape ``(*batch, 1, ..., 1)`` with a 1 for each normalized
        dimension, float64 for float64 input, else float32.

    Raises
    ------
    TypeError
        For a wrong kind of object, dtype or device.
    ValueError
        For a wrong shape, eps or layout, a read-only `out`, or an `out` of another dtype than y.

    Notes
    -----
    ``y = x * rstd * weight`` with ``rstd = 1 / sqrt(mean(x**2) + eps)`` [1]_. Rows whose squares are beyond the range of the
    dtype, or vanish, are scaled first. A NaN or Inf stays in its row.

    References
    ----------
    .. [1] B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467, 2019.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x = np.array([[3.0, 4.0], [30.0, 40.0]])
    >>> nbnorm.rms_norm(x, 2).round(4)
    array([[0.8485, 1.1314],
           [0.8485, 1.1314]])
    >>> y, rstd = nbnorm.rms_norm(x, 2, weight=np.full(2, 2.0), return_stats=True)
    >>> (1 / rstd).round(4)
    array([[ 3.5355],
           [35.3553]])
    """
    shape = normalized_shape if axis is None else keys.along(axis, normalized_shape, x)
    key = keys.forward_key(x, shape, weight, None, eps, False, out, return_stats)
    if key is None and stream is None:
        found = addressed.forward((x, None, weight, None, out, False), (shape, eps, False, return_stats), True)
        if found is not None:
            return RMSNormResult(found[0], found[3]) if return_stats else found[0]
    plan = plans.RMS_NORM.get(key) or keys.of_other_rows(plans.RMS_NORM, key)
    if plan is not None and stream is None:
        result = plan(x, weight, None, eps, out)
        if result is not None:
            return RMSNormResult(result[0], result[2]) if return_stats else result
    call = ForwardCall(
        x, normalized_shape, weight, eps=eps, out=out, return_stats=return_stats, stream=stream, is_rms=True, axis=axis
    )
    y, _, _, rstd = run.forward(call, plans.RMS_NORM, None if plan else key)
    return RMSNormResult(y, rstd) if return_stats else y


@ends_a_graph
def rms_norm_backward(
    dy: Array,
    x: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
    eps: float | None = None,
    *,
    rstd: Array | None = None,
    output_mask: Sequence[bool] = (True, True),
    out: Sequence[Array | None] | None = None,
    stream: Any = None,
    axis: Axis = None,
) -> RMSNormGrads:
    """Gradients of `rms_norm` with respect to x and weight.

    Parameters
    ----------
    dy : array_like, shape of x
        The gradient with respect to y; its dtype may differ from x's.
    x : array_like, shape ``(*batch, *normalized_shape)``
        As in `rms_norm`.
    normalized_shape : int or sequence of int
        As in `rms_norm`.
    weight : array_like, shape normalized_shape, optional
        As in `rms_norm`.
    eps : float, optional
        As in `rms_norm`.
    rstd : array_like, shape ``(*batch, 1, ..., 1)``, optional
        What `rms_norm` returned. Without it, it is recomputed while the row is in the cache.
    output_mask : sequence of two bools
        Which of dx and dweight to compute. The other is None and costs nothing.
    out : tuple of two arrays or None, optional
        Where to write the gradients. dx may be dy or x itself, or overlap any input.
    stream : stream or int, optional
        As in `layer_norm`.
    axis : int or sequence of int, optional
        As in `layer_norm`.

    Returns
    -------
    RMSNormGrads
        dx of x's shape and dtype; dweight of shape normalized_shape and of weight's dtype (x's where weight is None), also
        when weight is None. Both of x's library.

    Raises
    ------
    TypeError
        For a wrong kind of object, dtype or device.
    ValueError
        For a wrong shape, eps, mask or layout.

    Notes
    -----
    With ``x_hat = x * rstd``, ``g = dy * weight`` and means over a row::

        dx = rstd * (g - x_hat * mean(g * x_hat))
        dweight = sum over rows of dy * x_hat

    How dweight is summed, and what its bits depend on, is as in `layer_norm_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x = np.array([[3.0, 4.0], [30.0, 40.0]])
    >>> dx, dweight = nbnorm.rms_norm_backward(np.eye(2), x, 2)
    >>> dx.round(3)
    array([[ 0.181, -0.136],
           [-0.014,  0.01 ]])
    >>> dweight.round(3)
    array([0.849, 1.131])
    """
    shape = normalized_shape if axis is None else keys.along(axis, normalized_shape, x)
    mask = (*output_mask, False) if type(output_mask) is tuple and len(output_mask) == 2 else None
    key = keys.backward_key(dy, x, shape, weight, eps, False, None, rstd, mask, out)
    if key is None and stream is None:
        outs = (*out, None) if type(out) is tuple else out
        grads = addressed.backward((x, dy, None, weight, None, rstd), (shape, eps, False, mask), outs, True)
        if grads is not None:
            return RMSNormGrads(*grads[:2])
    plan = plans.RMS_NORM_BACKWARD.get(key) or keys.of_other_rows(plans.RMS_NORM_BACKWARD, key)
    if plan is not None and stream is None:
        grads = plan(dy, x, weight, eps, None, rstd, None if out is None else (*out, None))
        if grads is not None:
            return RMSNormGrads(grads[0], grads[1])
    call = BackwardCall(
        dy, x, normalized_shape, weight, eps, False, None, rstd, output_mask, out, stream, is_rms=True, axis=axis
    )
    dx, dweight, *_ = run.backward(call, plans.RMS_NORM_BACKWARD, None if plan else key)
    return RMSNormGrads(dx, dweight)

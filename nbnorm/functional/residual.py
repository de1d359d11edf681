"""Norms of a sum: a residual is added, and its gradient, while the row is in the cache anyway."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from nbnorm.calls.problem import BackwardCall, ForwardCall
from nbnorm.cpu import keys, plans
from nbnorm.functional import addressed, run
from nbnorm.functional.layer import LayerNormGrads
from nbnorm.functional.rms import RMSNormGrads
from nbnorm.functional.types import Array, Axis, Shape, ends_a_graph


class AddNormResult(NamedTuple):
    """What `add_layer_norm` and `add_rms_norm` return."""

    y: Array
    total: Array


class AddLayerNormResult(NamedTuple):
    """What `add_layer_norm` returns with ``return_stats=True``."""

    y: Array
    total: Array
    mean: Array
    rstd: Array


class AddRMSNormResult(NamedTuple):
    """What `add_rms_norm` returns with ``return_stats=True``."""

    y: Array
    total: Array
    rstd: Array


@ends_a_graph
def add_layer_norm(
    x: Array,
    residual: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    use_diff_of_squares: bool = False,
    *,
    out: Array | None = None,
    total_out: Any = None,
    return_stats: bool = False,
    stream: Any = None,
    axis: Axis = None,
) -> Any:
    """Add a residual, and normalise the sum over its trailing dimensions.

    Parameters
    ----------
    x : array_like, shape ``(*batch, *normalized_shape)``
        As in `layer_norm`.
    residual : array_like, shape of x
        What is added to x, of any of the dtypes of x, on its device.
    normalized_shape : int or sequence of int
        As in `layer_norm`.
    weight, bias : array_like, shape normalized_shape, optional
        As in `layer_norm`.
    eps : float
        As in `layer_norm`.
    use_diff_of_squares : bool
        As in `layer_norm`.
    out : array, shape of x, dtype of y, optional
        Where to write y. It may be x or residual itself, or overlap any input.
    total_out : array, shape of x, dtype of y, or False, optional
        Where to write the sum, apart from `out`. It may be x or residual itself. False spares writing it.
    return_stats : bool
        Return mean and rstd of the sum too.
    stream : stream or int, optional
        As in `layer_norm`.
    axis : int or sequence of int, optional
        As in `layer_norm`.

    Returns
    -------
    AddNormResult
        y and total, of x's shape, dtype and library; total is None with ``total_out=False``.
    AddLayerNormResult
        With ``return_stats=True``: y, total, mean and rstd, the latter two as `layer_norm` returns them.

    Raises
    ------
    TypeError
        For a wrong kind of object, dtype or device.
    ValueError
        For a wrong shape, eps or layout, or an `out` or `total_out` that is read-only or of another dtype.

    Notes
    -----
    ``total = x + residual`` in the wider of both dtypes, rounded to x's, and ``y = layer_norm(total, ...)``: the same bits
    as in two steps, with x and residual read, and total and y written once. Beside a float64 residual, y is computed in
    float64, which the second step alone would not do. A pre-norm block goes on with total, a post-norm block with y.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> x, residual = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[9.0, 8.0, 17.0, 16.0]])
    >>> y, total = nbnorm.add_layer_norm(x, residual, 4)
    >>> total
    array([[10., 10., 20., 20.]])
    >>> y.round(4)
    array([[-1., -1.,  1.,  1.]])
    """
    shape = normalized_shape if axis is None else keys.along(axis, normalized_shape, x)
    key = keys.added_key(
        keys.forward_key(x, shape, weight, bias, eps, use_diff_of_squares, out, return_stats), residual, total_out
    )
    plan = plans.ADD_LAYER_NORM.get(key) or keys.of_other_rows(plans.ADD_LAYER_NORM, key)
    result = None
    if key is None and stream is None:
        options = shape, eps, use_diff_of_squares, return_stats
        result = addressed.forward((x, residual, weight, bias, out, total_out), options, is_added=True)
    if plan is not None and stream is None:
        result = plan(x, residual, weight, bias, eps, out, total_out)
    if result is None:
        call = ForwardCall(
            x, normalized_shape, weight, bias, eps, use_diff_of_squares, out, return_stats, stream, residual, total_out,
            is_added=True, axis=axis,
        )  # fmt: skip
        result = run.forward(call, plans.ADD_LAYER_NORM, None if plan else key)
    return AddLayerNormResult(*result) if return_stats else AddNormResult(*result[:2])


@ends_a_graph
def add_layer_norm_backward(
    dy: Array,
    dtotal: Array | None,
    total: Array,
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
    """Gradients of `add_layer_norm` with respect to x and residual, which are one, and to weight and bias.

    Parameters
    ----------
    dy : array_like, shape of total
        The gradient with respect to y.
    dtotal : array_like, shape of total, or None
        The gradient with respect to total, from where else it went; None where it went nowhere.
    total : array_like, shape ``(*batch, *normalized_shape)``
        What `add_layer_norm` returned.
    normalized_shape : int or sequence of int
        As in `layer_norm`.
    weight : array_like, shape normalized_shape, optional
        As in `layer_norm`.
    eps : float
        As in `layer_norm`.
    use_diff_of_squares : bool
        As in `layer_norm`.
    mean, rstd : array_like, shape ``(*batch, 1, ..., 1)``, optional
        The statistics that `add_layer_norm` returned. Both or neither.
    output_mask : sequence of three bools
        As in `layer_norm_backward`.
    out : tuple of three arrays or None, optional
        Where to write the gradients. dx may be dy, dtotal or total itself, or overlap any input.
    stream : stream or int, optional
        As in `layer_norm`.
    axis : int or sequence of int, optional
        As in `layer_norm`.

    Returns
    -------
    LayerNormGrads
        dx, which is the gradient with respect to x and that with respect to residual, of total's dtype; dweight and dbias.

    Raises
    ------
    TypeError
        For a wrong kind of object, dtype or device.
    ValueError
        For a wrong shape, eps, mask or layout, or only one of mean and rstd.

    Notes
    -----
    ``dx = dtotal + dx of layer_norm_backward(dy, total, ...)``, rounded once; dweight and dbias are the same.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> total = np.array([[1.0, 2.0, 3.0, 4.0]])
    >>> dx, _, _ = nbnorm.add_layer_norm_backward(np.eye(1, 4), np.ones((1, 4)), total, 4)
    >>> dx.round(3)
    array([[1.268, 0.642, 0.911, 1.179]])
    """
    shape = normalized_shape if axis is None else keys.along(axis, normalized_shape, total)
    key = keys.backward_key(dy, total, shape, weight, eps, use_diff_of_squares, mean, rstd, output_mask, out)
    key = keys.added_key(key, dtotal)
    plan = plans.ADD_LAYER_NORM_BACKWARD.get(key) or keys.of_other_rows(plans.ADD_LAYER_NORM_BACKWARD, key)
    grads = None
    if key is None and stream is None:
        options = shape, eps, use_diff_of_squares, output_mask
        grads = addressed.backward((total, dy, dtotal, weight, mean, rstd), options, out, is_added=True)
    if plan is not None and stream is None:
        grads = plan(dy, total, weight, eps, mean, rstd, out, dtotal)
    if grads is not None:
        return LayerNormGrads(*grads)
    call = BackwardCall(
        dy, total, normalized_shape, weight, eps, use_diff_of_squares, mean, rstd, output_mask, out, stream, dtotal,
        is_added=True, axis=axis,
    )  # fmt: skip
    return LayerNormGrads(*run.backward(call, plans.ADD_LAYER_NORM_BACKWARD, None if plan else key))


@ends_a_graph
def add_rms_norm(
    x: Array,
    residual: Array,
    normalized_shape: Shape,
    weight: Array | None = None,
    eps: float | None = None,
    *,
    out: Array | None = None,
    total_out: Any = None,
    return_stats: bool = False,
    stream: Any = None,
    axis: Axis = None,
) -> Any:
    """Add a residual, and divide the sum by its root mean square over its trailing dimensions.

    Parameters
    ----------
    x, residual : array_like, shape ``(*batch, *normalized_shape)``
        As in `add_layer_norm`.
    normalized_shape : int or sequence of int
        As in `rms_norm`.
    weight : array_like, shape normalized_shape, optional
        As in `rms_norm`.
    eps : float, optional
        As in `rms_norm`.
    out, total_out : array, shape of x, dtype of y, optional
        As in `add_layer_norm`.
    return_stats : bool
        Return rstd of the sum too.
    stream : stream or int, optional
        As in `layer_norm`.
    axis : int or sequence of int, optional
        As in `layer_norm`.

    Returns
    -------
    AddNormResult
        y and total, of x's shape, dtype and library; total is None with ``total_out=False``.
    AddRMSNormResult
        With ``return_stats=True``: y, total and rstd, the latter as `rms_norm` returns it.

    Raises
    ------
    TypeError
        For a wrong kind of object, dtype or device.
    ValueError
        For a wrong shape, eps or layout, or an `out` or `total_out` that is read-only or of another dtype.

    Notes
    -----
    ``total = x + residual`` in the wider of both dtypes, rounded to x's, and ``y = rms_norm(total, ...)``: the same bits as
    in two steps.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> y, total = nbnorm.add_rms_norm(np.array([[1.0, 1.0]]), np.array([[2.0, 3.0]]), 2)
    >>> total
    array([[3., 4.]])
    >>> y.round(4)
    array([[0.8485, 1.1314]])
    """
    shape = normalized_shape if axis is None else keys.along(axis, normalized_shape, x)
    key = keys.forward_key(x, shape, weight, None, eps, False, out, return_stats)
    key = keys.added_key(key, residual, total_out)
    plan = plans.ADD_RMS_NORM.get(key) or keys.of_other_rows(plans.ADD_RMS_NORM, key)
    result = None
    if key is None and stream is None:
        options = shape, eps, False, return_stats
        result = addressed.forward((x, residual, weight, None, out, total_out), options, True, True)
    if plan is not None and stream is None:
        result = plan(x, residual, weight, None, eps, out, total_out)
    if result is None:
        call = ForwardCall(
            x, normalized_shape, weight, None, eps, False, out, return_stats, stream, residual, total_out,
            is_rms=True, is_added=True, axis=axis,
        )  # fmt: skip
        result = run.forward(call, plans.ADD_RMS_NORM, None if plan else key)
    return AddRMSNormResult(result[0], result[1], result[3]) if return_stats else AddNormResult(*result[:2])


@ends_a_graph
def add_rms_norm_backward(
    dy: Array,
    dtotal: Array | None,
    total: Array,
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
    """Gradients of `add_rms_norm` with respect to x and residual, which are one, and to weight.

    Parameters
    ----------
    dy, dtotal, total : array_like, shape of total
        As in `add_layer_norm_backward`.
    normalized_shape : int or sequence of int
        As in `rms_norm`.
    weight : array_like, shape normalized_shape, optional
        As in `rms_norm`.
    eps : float, optional
        As in `rms_norm`.
    rstd : array_like, shape ``(*batch, 1, ..., 1)``, optional
        What `add_rms_norm` returned.
    output_mask : sequence of two bools
        As in `rms_norm_backward`.
    out : tuple of two arrays or None, optional
        Where to write the gradients. dx may be dy, dtotal or total itself, or overlap any input.
    stream : stream or int, optional
        As in `layer_norm`.
    axis : int or sequence of int, optional
        As in `layer_norm`.

    Returns
    -------
    RMSNormGrads
        dx, which is the gradient with respect to x and that with respect to residual, of total's dtype; and dweight.

    Raises
    ------
    TypeError
        For a wrong kind of object, dtype or device.
    ValueError
        For a wrong shape, eps, mask or layout.

    Notes
    -----
    ``dx = dtotal + dx of rms_norm_backward(dy, total, ...)``, rounded once; dweight is the same.

    Examples
    --------
    >>> import numpy as np
    >>> import nbnorm
    >>> dx, _ = nbnorm.add_rms_norm_backward(np.eye(1, 2), np.ones((1, 2)), np.array([[3.0, 4.0]]), 2)
    >>> dx.round(3)
    array([[1.181, 0.864]])
    """
    shape = normalized_shape if axis is None else keys.along(axis, normalized_shape, total)
    mask = (*output_mask, False) if type(output_mask) is tuple and len(output_mask) == 2 else None
    key = keys.added_key(keys.backward_key(dy, total, shape, weight, eps, False, None, rstd, mask, out), dtotal)
    plan = plans.ADD_RMS_NORM_BACKWARD.get(key) or keys.of_other_rows(plans.ADD_RMS_NORM_BACKWARD, key)
    grads = None
    if key is None and stream is None:
        outs = (*out, None) if type(out) is tuple else out
        options = shape, eps, False, mask
        grads = addressed.backward((total, dy, dtotal, weight, None, rstd), options, outs, True, True)
    if plan is not None and stream is None:
        grads = plan(dy, total, weight, eps, None, rstd, None if out is None else (*out, None), dtotal)
    if grads is not None:
        return RMSNormGrads(grads[0], grads[1])
    call = BackwardCall(
        dy, total, normalized_shape, weight, eps, False, None, rstd, output_mask, out, stream, dtotal,
        is_rms=True, is_added=True, axis=axis,
    )  # fmt: skip
    dx, dweight, *_ = run.backward(call, plans.ADD_RMS_NORM_BACKWARD, None if plan else key)
    return RMSNormGrads(dx, dweight)

"""Checks of the axes of a call; the errors are as in `checks`."""

import operator

from nbnorm.calls.shown import is_sequence, shown


def first_of(axis, normalized_shape, x_name, x):
    """The first of the axes along which x has normalized_shape."""
    axes = _numbers(axis)
    if x.ndim == 0:
        raise ValueError(f"{x_name}: shape (); expected one with axis {shown(axis)}")
    for number in axes:
        if not -x.ndim <= number < x.ndim:
            raise ValueError(f"axis: {shown(axis)}; expected axes from {-x.ndim} to {x.ndim - 1}, which {x_name} has")
    first, *others = (number % x.ndim for number in axes)
    _check_adjacent(axis, (first, *others), normalized_shape)
    sizes = x.shape[first : first + len(axes)]
    if sizes != normalized_shape:
        raise ValueError(f"{x_name}: shape {x.shape}, {sizes} along axis {shown(axis)}; expected {normalized_shape} there")
    return first


def of_layer(axis, normalized_shape):
    """An int or a tuple of ints, of which whether an input has them is not known yet."""
    if axis is None:
        return None
    axes = _numbers(axis)
    if min(axes) < 0 <= max(axes):
        raise ValueError(f"axis: {shown(axis)}; expected axes that all count from the front, or all from the back")
    _check_adjacent(axis, axes, normalized_shape)
    return axes[0] if len(axes) == 1 else axes


def _numbers(axis):
    axes = axis if is_sequence(axis) and not isinstance(axis, str | bytes) else (axis,)
    try:
        result = tuple(operator.index(number) for number in axes)
    except TypeError:
        result = ()
    if any(isinstance(number, bool) for number in axes) or (not result and len(axes) > 0):
        raise TypeError(f"axis: {shown(axis)}; expected an int, or a sequence of ints")
    if not result:
        raise ValueError(f"axis: {shown(axis)}; expected at least one axis")
    return result


def _check_adjacent(axis, axes, normalized_shape):
    if len(axes) != len(normalized_shape):
        raise ValueError(
            f"axis: {shown(axis)}; expected {len(normalized_shape)} of them, one for each dimension of normalized_shape, "
            f"{normalized_shape}"
        )
    if axes != tuple(range(axes[0], axes[0] + len(axes))):
        raise ValueError(
            f"axis: {shown(axis)}; expected adjacent axes, in their order: numpy.moveaxis makes others adjacent"
        )

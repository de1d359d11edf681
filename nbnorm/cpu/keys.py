"""What a call on NumPy arrays is known by, as `calls.plans` has it.

By its options and by the shapes, dtypes and flags of its arrays, and in the second place by the same for any number of rows,
since a program may make calls of ever new ones.

The keys are written out: a helper for each array would add a twentieth to a forward at (1, 64), which takes 1.8 us on an
Intel Xeon, and 30 by way of the checks.
"""

from numpy import ndarray

from nbnorm.calls.plans import keep, sizes

# where a key has the shape of x
X_SHAPE = 4


class Along(tuple):
    """Axes and normalized_shape, both tuples, so that it equals no tuple of sizes: what a key has in the place of these."""

    __slots__ = ()


def along(axis, normalized_shape, x):
    """What is normalized_shape to the keys beside an axis; where it is the last, as in a call without; None for no plan."""
    axes = (axis,) if type(axis) is int else sizes(axis)
    row = (normalized_shape,) if type(normalized_shape) is int else sizes(normalized_shape)
    if not axes or row is None:
        return None
    behind = axes[-1] + 1
    is_last = behind == 0 or behind == getattr(x, "ndim", 0)
    if is_last and (len(axes) == len(row) == 1 or axes == (*range(behind - len(row), behind),)):
        return normalized_shape
    return Along((axes, row))


def forward_key(x, normalized_shape, weight, bias, eps, use_diff_of_squares, out, return_stats):
    """What a forward is known by; None where an option is of another type than usual."""
    if type(x) is not ndarray or (type(eps) is not float and eps is not None):
        return None
    if type(use_diff_of_squares) is not bool or type(return_stats) is not bool:
        return None
    if type(normalized_shape) is not int:
        if type(normalized_shape) is tuple and len(normalized_shape) == 1 and type(normalized_shape[0]) is int:
            # a layer's, without a call
            normalized_shape = normalized_shape[0]
        elif type(normalized_shape) is not Along and (normalized_shape := sizes(normalized_shape)) is None:
            return None
    weight_shape = weight_dtype = weight_flags = bias_shape = bias_dtype = bias_flags = None
    if weight is not None:
        if type(weight) is not ndarray:
            return None
        weight_shape, weight_dtype, weight_flags = weight.shape, weight.dtype, weight.flags.num
    if bias is not None:
        if type(bias) is not ndarray:
            return None
        bias_shape, bias_dtype, bias_flags = bias.shape, bias.dtype, bias.flags.num
    return (
        normalized_shape,
        eps,
        use_diff_of_squares,
        return_stats,
        x.shape,
        x.dtype,
        x.flags.num,
        weight_shape,
        weight_dtype,
        weight_flags,
        bias_shape,
        bias_dtype,
        bias_flags,
        None if out is None else _seen(out),
    )


def backward_key(dy, x, normalized_shape, weight, eps, use_diff_of_squares, mean, rstd, output_mask, out):
    """The same of a backward."""
    if type(x) is not ndarray or (type(eps) is not float and eps is not None):
        return None
    if type(use_diff_of_squares) is not bool or type(output_mask) is not tuple:
        return None
    for wanted in output_mask:
        if type(wanted) is not bool:
            return None
    if type(normalized_shape) is not int and type(normalized_shape) is not Along:
        normalized_shape = sizes(normalized_shape)
        if normalized_shape is None:
            return None
    return (
        normalized_shape,
        eps,
        use_diff_of_squares,
        output_mask,
        x.shape,
        x.dtype,
        x.flags.num,
        _seen(dy),
        None if weight is None else _seen(weight),
        None if mean is rstd is None else (_seen(mean), _seen(rstd)),
        None if out is None else isinstance(out, tuple) and (*map(_seen, out),),
    )


def added_key(key, other, total_out=None):
    """The same where another array is added, from the key without it."""
    if key is None:
        return None
    if total_out is False:
        # which is no array, and not that there is none
        return (*key, _seen(other), "spared")
    return (*key, _seen(other), None if total_out is None else _seen(total_out))


def _seen(array):
    """What is known of an array, None of what is absent; False of anything else, for which no plan is kept."""
    return None if array is None else type(array) is ndarray and (array.shape, array.dtype, array.flags.num)


def of_other_rows(plans, key):
    """The plan of a call that differs in the number of rows alone, if there is one, which is kept for this one too."""
    if key is None:
        return None
    plan = plans.get(_of_any_rows(key))
    keep(plans, key, plan)
    return plan


def keep_for_any_rows(plans, key, plan):
    keep(plans, key, plan)
    keep(plans, _of_any_rows(key), plan)


def _of_any_rows(key):
    """A key without the shape around the rows, but for which arrays have it."""
    normalized_shape, shape = key[0], key[X_SHAPE]
    first, end = _place(normalized_shape, len(shape))
    row = shape[first:end]
    names = {shape[:first] + (1,) * len(row) + shape[end:]: "the statistics'", shape: "x's"}
    return len(shape), row, *(_renamed(part, names) for part in key)


def _place(normalized_shape, ndim):
    """From where to where a shape of so many dimensions has a row."""
    if type(normalized_shape) is not Along:
        return ndim - (1 if type(normalized_shape) is int else len(normalized_shape)), ndim
    (first, *_), row = normalized_shape
    first += 0 if first >= 0 else ndim
    return first, first + len(row)


def _renamed(part, names):
    if type(part) is tuple and part not in names:
        return tuple(_renamed(inner, names) for inner in part)
    return names.get(part, part)

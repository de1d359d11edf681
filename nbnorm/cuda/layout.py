"""How arrays lie in memory: whether a kernel can take their rows as they are, and in accesses of how many bytes."""

from math import gcd

from nbnorm.cuda.arrays import contiguous_strides


def pitch(view, problem):
    """Bytes from one row to the next where each is contiguous and all are as far apart; None where not.

    Where something is behind the axes, rows lie abreast: their elements are as far apart as that is long.
    """
    if problem.behind:
        return view.itemsize if is_flat(view) else None
    batch_ndim = len(problem.batch)
    expected = contiguous_strides(problem.normalized_shape, view.itemsize)
    for size, stride, wanted in zip(problem.normalized_shape, view.strides[batch_ndim:], expected, strict=True):
        if size > 1 and stride != wanted:
            return None
    result = step = None
    for size, stride in zip(reversed(problem.batch), reversed(view.strides[:batch_ndim]), strict=True):
        if size == 1:
            continue
        if result is None:
            result = stride
        elif stride != step:
            return None
        step = stride * size
    row = problem.cols * view.itemsize
    if result is None:
        return row
    return result if result >= 0 and result % view.itemsize == 0 else None


def is_flat(view):
    """Whether it is in C order without gaps."""
    wanted = contiguous_strides(view.shape, view.itemsize)
    return all(size == 1 or a == b for size, a, b in zip(view.shape, view.strides, wanted, strict=True))


def access(itemsize, most, *bytes_between):
    """Elements that one access may have, at most `most`, where these addresses and pitches allow it."""
    return min(most, max(1, gcd(16, *bytes_between) // itemsize))


def extent(view):
    """Bytes from its first to its last; 0 for None."""
    if view is None:
        return 0
    start, stop = view.span
    return stop - start


def share_memory(a, b):
    """Whether the memory of two arrays, from the first byte to the last, has a byte in common."""
    (a_start, a_stop), (b_start, b_stop) = a.span, b.span
    return a_start < b_stop and b_start < a_stop


def may_overwrite(y, y_pitch, x, x_pitch, problem):
    """Whether writing a row of y may overwrite another one of x, which may still have to be read."""
    if not share_memory(y, x):
        return False
    if x_pitch is None or x_pitch != y_pitch or x.itemsize != y.itemsize:
        return True
    if problem.behind:
        return y.address != x.address
    row = problem.cols * x.itemsize
    distance = (y.address - x.address) % y_pitch if y_pitch else 0
    # in place, or in other columns of the same rows
    return y.address != x.address and not row <= distance <= y_pitch - row

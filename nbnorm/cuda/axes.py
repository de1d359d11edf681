"""Axes that are not the last: rows that lie abreast, or, where these are too long, views with the axes at the end."""

import math

from nbnorm.cuda import sizes


def shared_out(problem, dtype, direction):
    """What a row is cut into, and the tile; of rows that lie abreast, the one segment has how far apart columns are."""
    numbers = problem.cols, problem.dtype.itemsize, dtype.itemsize, direction
    if problem.behind:
        return sizes.Segments(1, math.prod(problem.behind)), sizes.tile_abreast(*numbers)
    return sizes.segments(problem.cols, dtype.itemsize, direction), sizes.tile(*numbers)


def forward(problem, given, targets):
    """A forward, of such views where it has to be."""
    if are_kept(problem, problem.compute_dtype, "forward"):
        return problem, given, targets
    x, residual = (at_end(array, problem) for array in (given.x, given.residual))
    moved = tuple(at_end(target, problem) for target in targets)
    return problem.at_end, given._replace(x=x, residual=residual), moved


def backward(problem, given, targets, dtype):
    """The same of a backward that is computed in this dtype."""
    if are_kept(problem, dtype, "backward"):
        return problem, given, targets
    dy, dtotal, x = (at_end(array, problem) for array in (given.dy, given.dtotal, given.x))
    dx, *sums = targets
    return problem.at_end, given._replace(dy=dy, dtotal=dtotal, x=x), [at_end(dx, problem), *sums]


def are_kept(problem, dtype, direction):
    numbers = problem.cols, problem.dtype.itemsize, dtype.itemsize, direction
    return not problem.behind or sizes.tile_abreast(*numbers) is not None


def at_end(array, problem):
    """A view of an array with the axes behind all other dimensions; None of None."""
    if array is None:
        return None
    first = len(problem.batch)
    end = first + len(problem.normalized_shape)
    order = [*range(first), *range(end, array.ndim), *range(first, end)]
    shape, strides = (tuple(numbers[i] for i in order) for numbers in (array.shape, array.strides))
    return array._replace(shape=shape, strides=strides)

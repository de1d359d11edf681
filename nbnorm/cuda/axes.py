"""Axes that are not the last: the same arrays, seen with these behind all other dimensions."""


def at_end(array, problem):
    """A view of an array with the axes at its end; None of None."""
    if array is None or not problem.behind:
        return array
    first = len(problem.batch)
    end = first + len(problem.normalized_shape)
    order = [*range(first), *range(end, array.ndim), *range(first, end)]
    shape, strides = (tuple(numbers[i] for i in order) for numbers in (array.shape, array.strides))
    return array._replace(shape=shape, strides=strides)


def problem_at_end(problem):
    """The problem of such views: statistics have the same order in memory."""
    return problem._replace(batch=problem.batch + problem.behind, behind=())


def forward_at_end(problem, given, targets):
    """As `_enqueue_forward` takes them."""
    x, residual = (at_end(array, problem) for array in (given.x, given.residual))
    moved = tuple(at_end(target, problem) for target in targets)
    return problem_at_end(problem), given._replace(x=x, residual=residual), moved


def backward_at_end(problem, given, targets):
    """As `_enqueue_backward` takes them."""
    dy, dtotal, x = (at_end(array, problem) for array in (given.dy, given.dtotal, given.x))
    dx, *sums = targets
    return problem_at_end(problem), given._replace(dy=dy, dtotal=dtotal, x=x), [at_end(dx, problem), *sums]

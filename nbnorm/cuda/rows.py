"""The steps of a kernel on one row, which a team of threads holds in registers: `values` is one thread's part of it.

Vector k of a thread is vector lane + k * team of the row, of `width` elements. Those beyond the row's end are 0; only from
vector `complete` on can there be any.
"""

from nbnorm.cuda.instructions import inverse, inverse_power_of_two, inverse_root
from nbnorm.cuda.reduce import inlined, team_sum
from nbnorm.cuda.sizes import WARP

# elements of shared memory that `statistics` takes
SHARED = 3 * WARP
# numbers of a state, which a segment of a long row is known by: a power of two that x was multiplied by, the mean in two
# parts, and the sum of squared deviations. The row's own has the variance instead
STATE = 4


@inlined
def statistics(values, cols, lane, team, held, width, complete, is_centred, shared, at, element):
    """The mean in two parts, of which the first is subtracted from the values, and the variance."""
    per_element = inverse(element(cols))
    if is_centred:
        return centred(values, cols, lane, team, held, width, complete, per_element, shared, at, element)
    return diff_of_squares(values, team, held, width, per_element, shared, at, element)


@inlined
def centred(values, cols, lane, team, held, width, complete, per_element, shared, at, element):
    """From the deviations from a first, rounded mean, whose own mean corrects both results.

    Formula: Chan, Golub and LeVeque 1983, eq. 1.7.
    """
    total = element(0)
    for i in range(held * width):
        # divided before it is added, so that no sum overflows
        total += values[i] * per_element
    hi = team_sum(total, team, shared, at, element)
    total = element(0)
    squares = element(0)
    for k in range(held):
        if k < complete or (lane + k * team) * width < cols:
            for i in range(width):
                d = values[k * width + i] - hi
                values[k * width + i] = d
                total += d
                squares += d * d
    lo = team_sum(total, team, shared, at + WARP, element) * per_element
    var = team_sum(squares, team, shared, at + 2 * WARP, element) * per_element - lo * lo
    return hi, lo, not_negative(var, element)


@inlined
def diff_of_squares(values, team, held, width, per_element, shared, at, element):
    """From one sweep over the row."""
    total = element(0)
    squares = element(0)
    for i in range(held * width):
        total += values[i] * per_element
        squares += values[i] * values[i]
    mean = team_sum(total, team, shared, at, element)
    var = team_sum(squares, team, shared, at + WARP, element) * per_element - mean * mean
    subtract(values, held * width, element(1), mean)
    return mean, element(0), not_negative(var, element)


@inlined
def subtract(values, size, factor, hi):
    for i in range(size):
        values[i] = values[i] * factor - hi


@inlined
def not_negative(var, element):
    """The variance clamped at 0; a NaN stays one, as it would not in max."""
    return element(0) if var < element(0) else var


@inlined
def rescaling(values, cols, eps, team, size, shared, at, element):
    """A power of two by which the row, and the root of eps, neither overflow nor vanish when they are squared."""
    per_element = inverse(element(cols))
    total = element(0)
    for i in range(size):
        total += abs(values[i]) * per_element
    scale = max(team_sum(total, team, shared, at, element), inverse(inverse_root(eps)))
    return inverse_power_of_two(scale)


@inlined
def keep_state(states, at, factor, hi, lo, squares):
    states[at * STATE] = factor
    states[at * STATE + 1] = hi
    states[at * STATE + 2] = lo
    states[at * STATE + 3] = squares


@inlined
def state_of(states, at):
    return states[at * STATE], states[at * STATE + 1], states[at * STATE + 2], states[at * STATE + 3]

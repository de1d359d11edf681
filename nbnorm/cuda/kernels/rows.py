"""The steps of a kernel on one row, which a team of threads holds in registers: `values` is one thread's part of it.

Vector k of a thread is vector lane + k * team of the row, of `width` elements. Those beyond the row's end are its first
element where statistics are computed, else 0; only from vector `complete` on can there be any.
"""

from numba import cuda

from nbnorm.cuda.instructions.meaning import fetch, inverse, inverse_power_of_two, inverse_root, load, store, unpack
from nbnorm.cuda.kernels.reduce import ALL_LANES, inlined, team_sum, team_sums
from nbnorm.cuda.sizes import WARP

# elements of shared memory that `statistics` takes, and `row_statistics`
SHARED = 3 * WARP
ROW_SHARED = 2 * SHARED + WARP
# numbers of a state, which a segment of a long row is known by: a power of two that x was multiplied by, the mean in two
# parts, and the sum of squared deviations. The row's own has the variance instead
STATE = 4
# numbers of the means of a segment, as parts of the row's, or of a row: of g without its shift, of that times the deviation,
# and the shift
MEANS = 3


@inlined
def load_row(values, x, at, lane, team, held, width, complete, cols, access, beyond):
    """The row that starts at x[at], and what is to be beyond its end."""
    for k in range(held):
        j = (lane + k * team) * width
        if k < complete or j < cols:
            load(values, k * width, x, at + j, width, access)
        else:
            for i in range(width):
                values[k * width + i] = beyond


@inlined
def fetch_row(ahead, x, at, lane, team, held, width, complete, cols, access):
    """Begin to load a row, of which `unpack_row` is the end."""
    for k in range(held):
        j = (lane + k * team) * width
        if k < complete or j < cols:
            fetch(ahead, k * width, x, at + j, width, access)


@inlined
def unpack_row(values, x, ahead, lane, team, held, width, complete, cols, access, beyond):
    for k in range(held):
        if k < complete or (lane + k * team) * width < cols:
            unpack(values, k * width, x, ahead, width, access)
        else:
            for i in range(width):
                values[k * width + i] = beyond


@inlined
def store_row(values, y, at, lane, team, held, width, complete, cols, access, rounds_pairs):
    """Write the row to y[at] and on."""
    for k in range(held):
        j = (lane + k * team) * width
        if k < complete or j < cols:
            store(values, k * width, y, at + j, width, access, rounds_pairs)


@inlined
def add_row(values, before, y, at, is_begun, lane, team, held, width, complete, cols, access, element):
    """Add the row to what is at y[at] and on, in the type that it is computed in, where something is."""
    if is_begun:
        load_row(before, y, at, lane, team, held, width, complete, cols, access, element(0))
        for i in range(held * width):
            values[i] += before[i]
    store_row(values, y, at, lane, team, held, width, complete, cols, access, 0)


@inlined
def row_statistics(
    values, origin, x, at, cols, eps, lane, team, held, width, complete, access, is_centred,
    smallest, largest, shared, shared_at, element,
):  # fmt: skip
    """The power of two by which the row was scaled, the mean in two parts, of which the first is subtracted, the variance.

    A row whose squares overflow or vanish is read once more, and scaled. The origin is its first element.
    """
    hi, lo, var = statistics(values, origin, cols, lane, team, held, width, complete, is_centred, shared, shared_at, element)
    factor = element(1)
    # of a segment, the square of the mean is a part of the row's variance. NaN fails the comparisons too
    is_extreme = not (smallest <= var + eps and hi * hi + var + eps <= largest)
    if cuda.any_sync(ALL_LANES, is_extreme):
        load_row(values, x, at, lane, team, held, width, complete, cols, access, origin)
        power = rescaling(values, cols, team, held * width, shared, shared_at + SHARED, element)
        # the other rows of a warp are not changed by one that is extreme
        factor = power if is_extreme else element(1)
        for i in range(held * width):
            values[i] *= factor
        shared_at += SHARED + WARP
        hi, lo, var = statistics(
            values, origin * factor, cols, lane, team, held, width, complete, is_centred, shared, shared_at, element
        )
    return factor, hi, lo, var


@inlined
def statistics(values, origin, cols, lane, team, held, width, complete, is_centred, shared, at, element):
    """The mean in two parts, of which the first is subtracted from the values, and the variance.

    The origin is an element of the row: where all are equal, what they have beyond it is exactly 0, and so are its sums.
    """
    per_element = inverse(element(cols))
    if is_centred:
        return centred(values, origin, cols, lane, team, held, width, complete, per_element, shared, at, element)
    return diff_of_squares(values, origin, cols, lane, team, held, width, complete, per_element, shared, at, element)


@inlined
def centred(values, origin, cols, lane, team, held, width, complete, per_element, shared, at, element):
    """From the deviations from a first, rounded mean, whose own mean corrects both results.

    Formula: Chan, Golub and LeVeque 1983, eq. 1.7.
    """
    total = element(0)
    for i in range(held * width):
        # a sum that overflows makes the row an extreme one
        total += values[i] - origin
    hi = origin + team_sum(total, team, shared, at, element) * per_element
    total = element(0)
    squares = element(0)
    for k in range(held):
        if k < complete or (lane + k * team) * width < cols:
            for i in range(width):
                d = values[k * width + i] - hi
                values[k * width + i] = d
                total += d
                squares += d * d
    total, squares = team_sums(total, squares, team, shared, at + WARP, element)
    lo = total * per_element
    return hi, lo, not_negative(squares * per_element - lo * lo, element)


@inlined
def diff_of_squares(values, origin, cols, lane, team, held, width, complete, per_element, shared, at, element):
    """From one sweep over the row: the squares of its elements, or of what they have beyond the origin.

    Those with the smaller mean lose fewer digits, and never more than sqrt(cols) deviations cost.
    """
    total = element(0)
    squares = element(0)
    shifted_squares = element(0)
    for k in range(held):
        if k < complete or (lane + k * team) * width < cols:
            for i in range(width):
                x = values[k * width + i]
                d = x - origin
                total += d
                squares += x * x
                shifted_squares += d * d
    total, squares = team_sums(total, squares, team, shared, at, element)
    shifted_squares = team_sum(shifted_squares, team, shared, at + 2 * WARP, element)
    distance = total * per_element
    hi = origin + distance
    lo = distance - (hi - origin)
    subtract(values, held * width, element(1), hi)
    is_shifted = abs(distance) <= abs(hi)
    mean = distance if is_shifted else hi
    squares = shifted_squares if is_shifted else squares
    return hi, lo, not_negative(squares * per_element - mean * mean, element)


@inlined
def subtract(values, size, factor, hi):
    for i in range(size):
        values[i] = values[i] * factor - hi


@inlined
def not_negative(var, element):
    """The variance clamped at 0; a NaN stays one, as it would not in max."""
    return element(0) if var < element(0) else var


@inlined
def rescaling(values, cols, team, size, shared, at, element):
    """A power of two by which the row neither overflows nor vanishes when it is squared."""
    per_element = inverse(element(cols))
    total = element(0)
    for i in range(size):
        # divided before it is added, so that no sum overflows
        total += abs(values[i]) * per_element
    return inverse_power_of_two(team_sum(total, team, shared, at, element))


@inlined
def inverse_deviation(var, eps, eps_power, eps_rest, factor, smallest, element):
    """What brings deviations, which were multiplied by `factor`, to a variance of 1; and rstd, as two numbers' product."""
    scale = inverse_root(var + eps)
    # a row that was scaled by 1 has a sum that vanishes, or overflows where eps does, whose root is Inf or 0
    if factor == element(1) and var + eps >= smallest and scale > element(0):
        return scale, scale, element(1)
    root = inverse(eps_rest) * (eps_power * factor)
    if var == element(0) or root > element(1 << 40):
        # eps alone counts, and its root may be a number that the type holds only so
        larger = inverse_power_of_two(eps_power)
        scale = eps_rest if var == element(0) else eps_rest * larger * inverse_power_of_two(factor)
        return scale, eps_rest, larger
    scale = inverse_root(var + root * root)
    return scale, scale, factor


@inlined
def gradient_sums(
    values, dys, dweights, dbiases, weight, scales, first, lo, scale, shift, per_element,
    is_mine, lane, team, held, width, piece, complete, cols, access, with_weight, with_dweight, with_dbias, element,
):  # fmt: skip
    """Make x_hat of the deviations, and of dy what g = dy * weight has beyond the shift, and return a thread's part of the
    means of that and of that times x_hat. The row's part of dweight and dbias is added to them.
    """
    mean_g = element(0)
    mean_gx = element(0)
    for k in range(held):
        j = (lane + k * team) * width
        if is_mine and (k < complete or j < cols):
            for i in range(0, width, piece):
                if with_weight:
                    load(scales, 0, weight, first + j + i, piece, access)
                for n in range(piece):
                    at = k * width + i + n
                    x_hat = (values[at] - lo) * scale
                    g = dys[at]
                    if with_dweight:
                        dweights[at] += g * x_hat
                    if with_dbias:
                        dbiases[at] += g
                    if with_weight:
                        g *= scales[n]
                    g -= shift
                    values[at] = x_hat
                    dys[at] = g
                    # divided before it is added, so that no sum overflows
                    g *= per_element
                    mean_g += g
                    mean_gx += g * x_hat
    return mean_g, mean_gx


@inlined
def keep_means(means, at, mean_g, mean_gx, shift):
    means[at * MEANS] = mean_g
    means[at * MEANS + 1] = mean_gx
    means[at * MEANS + 2] = shift


@inlined
def means_of(means, at):
    return means[at * MEANS], means[at * MEANS + 1], means[at * MEANS + 2]


@inlined
def keep_state(states, at, factor, hi, lo, squares):
    states[at * STATE] = factor
    states[at * STATE + 1] = hi
    states[at * STATE + 2] = lo
    states[at * STATE + 3] = squares


@inlined
def state_of(states, at):
    return states[at * STATE], states[at * STATE + 1], states[at * STATE + 2], states[at * STATE + 3]

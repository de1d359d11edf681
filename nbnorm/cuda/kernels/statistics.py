"""The statistics of a row that a team of threads holds, and what normalises it."""

from numba import cuda

from nbnorm.cuda.instructions.meaning import inverse, inverse_power_of_two, inverse_root, load, store
from nbnorm.cuda.kernels.known import Normaliser, Room, Statistics
from nbnorm.cuda.kernels.reduce import ALL_LANES, inlined, team_sum, team_sums
from nbnorm.cuda.kernels.rows import add_rounded, column, has, load_row, statistics_of
from nbnorm.cuda.sizes import PIECE, WARP

# elements of shared memory that `statistics` takes, and `row_statistics`
SHARED = 3 * WARP
ROW_SHARED = 2 * SHARED + WARP


@inlined
def row_statistics(values, origin, start, residual, share, eps, room):
    """The row's, of which hi is subtracted. The origin is its first element.

    A row whose squares overflow or vanish is read once more, and scaled: from `start` on, and what starts at `residual` is
    added again, where the sum is not in memory.
    """
    found = statistics(values, origin, share, room)
    is_extreme = is_beyond(found, eps, share.made)
    if cuda.any_sync(ALL_LANES, is_extreme):
        load_row(values, start, share, share.made.access, origin)
        if share.made.is_sum_unwritten:
            add_rounded(values, residual, start, share)
        found = statistics_rescaled(values, origin, is_extreme, share, room)
    return found


@inlined
def held_statistics(values, origin, share, eps, room):
    """The same of a row that is nowhere but in the values, which are kept for it."""
    kept = cuda.local.array(share.made.tile.size, share.made.element)
    for i in range(share.made.tile.size):
        kept[i] = values[i]
    found = statistics(values, origin, share, room)
    is_extreme = is_beyond(found, eps, share.made)
    if cuda.any_sync(ALL_LANES, is_extreme):
        for i in range(share.made.tile.size):
            values[i] = kept[i]
        found = statistics_rescaled(values, origin, is_extreme, share, room)
    return found


@inlined
def is_beyond(found, eps, made):
    """Whether a square may be 0 or Inf where the deviation is not."""
    var, added = found.var, eps.value
    # of a segment, the square of the mean is a part of the row's variance. NaN fails the comparisons too
    return not (made.smallest <= var + added and found.hi * found.hi + var + added <= made.largest)


@inlined
def statistics_rescaled(values, origin, is_extreme, share, room):
    """Of values as they were, which are multiplied by a power of two; those of the other rows of a warp by 1."""
    made = share.made
    power = rescaling(values, share, Room(room.shared, room.at + SHARED))
    factor = power if is_extreme else made.element(1)
    for i in range(made.tile.size):
        values[i] *= factor
    _, hi, lo, var = statistics(values, origin * factor, share, Room(room.shared, room.at + SHARED + WARP))
    return Statistics(factor, hi, lo, var)


@inlined
def statistics(values, origin, share, room):
    """Those of the values, and hi subtracted.

    The origin is an element of the row: where all are equal, what they have beyond it is exactly 0, and so are its sums.
    """
    per_element = inverse(share.made.element(share.cols))
    if not share.made.has_mean:
        return mean_square(values, per_element, share, room)
    if share.made.is_centred:
        return centred(values, origin, per_element, share, room)
    return diff_of_squares(values, origin, per_element, share, room)


@inlined
def centred(values, origin, per_element, share, room):
    """From the deviations from a first, rounded mean, whose own mean corrects both results.

    Formula: Chan, Golub and LeVeque 1983, eq. 1.7.
    """
    tile, element = share.made.tile, share.made.element
    total = element(0)
    for i in range(tile.size):
        # a sum that overflows makes the row an extreme one
        total += values[i] - origin
    hi = origin + team_sum(total, tile.team, room, element, tile.abreast) * per_element
    total = element(0)
    squares = element(0)
    for k in range(tile.held):
        if has(share, k):
            for i in range(tile.width):
                d = values[k * tile.width + i] - hi
                values[k * tile.width + i] = d
                total += d
                squares += d * d
    total, squares = team_sums(total, squares, tile.team, Room(room.shared, room.at + WARP), element, tile.abreast)
    lo = total * per_element
    return Statistics(element(1), hi, lo, not_negative(squares * per_element - lo * lo, element))


@inlined
def diff_of_squares(values, origin, per_element, share, room):
    """From one sweep over the row: the squares of its elements, or of what they have beyond the origin.

    Those with the smaller mean lose fewer digits, and never more than sqrt(cols) deviations cost.
    """
    tile, element = share.made.tile, share.made.element
    total = element(0)
    squares = element(0)
    shifted_squares = element(0)
    for k in range(tile.held):
        if has(share, k):
            for i in range(tile.width):
                x = values[k * tile.width + i]
                d = x - origin
                total += d
                squares += x * x
                shifted_squares += d * d
    total, squares = team_sums(total, squares, tile.team, room, element, tile.abreast)
    shifted_squares = team_sum(shifted_squares, tile.team, Room(room.shared, room.at + 2 * WARP), element, tile.abreast)
    distance = total * per_element
    hi = origin + distance
    lo = distance - (hi - origin)
    subtract(values, element(1), hi, share)
    is_shifted = abs(distance) <= abs(hi)
    mean = distance if is_shifted else hi
    squares = shifted_squares if is_shifted else squares
    return Statistics(element(1), hi, lo, not_negative(squares * per_element - mean * mean, element))


@inlined
def mean_square(values, per_element, share, room):
    """About 0: the mean is left alone, and what is beyond the row's end is 0."""
    tile, element = share.made.tile, share.made.element
    squares = element(0)
    for i in range(tile.size):
        squares += values[i] * values[i]
    var = team_sum(squares, tile.team, room, element, tile.abreast) * per_element
    return Statistics(element(1), element(0), element(0), var)


@inlined
def merged_statistics(values, states, row, share):
    """Those that `merge` has made of the row's segments, and hi subtracted."""
    found = statistics_of(states, row)
    subtract(values, found.factor, found.hi, share)
    return found


@inlined
def subtract(values, factor, hi, share):
    for i in range(share.made.tile.size):
        values[i] = values[i] * factor - hi


@inlined
def not_negative(var, element):
    """The variance clamped at 0; a NaN stays one, as it would not in max."""
    return element(0) if var < element(0) else var


@inlined
def rescaling(values, share, room):
    """A power of two by which the row neither overflows nor vanishes when it is squared."""
    tile, element = share.made.tile, share.made.element
    per_element = inverse(element(share.cols))
    total = element(0)
    for i in range(tile.size):
        # divided before it is added, so that no sum overflows
        total += abs(values[i]) * per_element
    return inverse_power_of_two(team_sum(total, tile.team, room, element, tile.abreast))


@inlined
def normaliser_of(statistics, eps, made):
    """What brings the deviations to a variance of 1."""
    element, smallest = made.element, made.smallest
    factor, _, lo, var = statistics
    total = var + eps.value
    scale = inverse_root(total)
    # a row that was scaled by 1 has a sum that vanishes, or overflows where eps does, whose root is Inf or 0
    if factor == element(1) and total >= smallest and scale > element(0):
        return Normaliser(lo, scale, scale, element(1))
    root = inverse(eps.rest) * (eps.power * factor)
    if var == element(0) or root > element(1 << 40):
        # eps alone counts, and its root may be a number that the type holds only so
        larger = inverse_power_of_two(eps.power)
        scale = eps.rest if var == element(0) else eps.rest * larger * inverse_power_of_two(factor)
        return Normaliser(lo, scale, eps.rest, larger)
    scale = inverse_root(var + root * root)
    return Normaliser(lo, scale, scale, factor)


@inlined
def undivided(lo, element):
    """What leaves deviations as they are, but for their own mean."""
    return Normaliser(lo, element(1), element(1), element(1))


@inlined
def mean_of(statistics):
    return (statistics.hi + statistics.lo) * inverse_power_of_two(statistics.factor)


@inlined
def store_normalised(values, normaliser, weight, bias, y, share):
    """Make y of a row, and write it; what weight and bias have for the columns starts where these say."""
    width = share.made.tile.width
    for k in range(share.made.tile.held):
        if has(share, k):
            normalise(values, k, normaliser, weight, bias, share)
            at = y.at + column(share, k) * share.apart
            store(values, k * width, y.memory, at, width, share.made.access, share.made.rounds_pairs)


@inlined
def normalise(values, k, normaliser, weight, bias, share):
    """Make y of vector k of a row."""
    made = share.made
    scales = cuda.local.array(PIECE, made.element)
    shifts = cuda.local.array(PIECE, made.element)
    for i in range(0, made.tile.width, made.tile.piece):
        j = column(share, k) + i
        if made.has_weight:
            load(scales, 0, weight.memory, weight.at + j, made.tile.piece, made.parameter_access)
        if made.has_bias:
            load(shifts, 0, bias.memory, bias.at + j, made.tile.piece, made.parameter_access)
        for n in range(made.tile.piece):
            at = k * made.tile.width + i + n
            y = (values[at] - normaliser.lo) * normaliser.scale
            if made.has_weight:
                y *= scales[n]
            if made.has_bias:
                y += shifts[n]
            values[at] = y

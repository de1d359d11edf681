"""The statistics and the means of up to sixteen short rows at once, which lie one behind the other.

Of a row of a few elements, adding up the lanes and finding the square root takes longer than the sums. Here these are steps
on lanes, each of which is a row: what they cost is shared by all rows, and none waits for another's.
"""

from typing import Any, NamedTuple

import numpy as np

from nbnorm.cpu.kernels.gradients import first_gradient, gradient_block_sums
from nbnorm.cpu.kernels.modes import DIFF_OF_SQUARES, DIFF_OF_SQUARES_64, MEAN_SQUARE, ONE_SWEEP, ONE_SWEEP_64, TWO_SWEEPS
from nbnorm.cpu.kernels.row import (
    KNOWN_NUMBERS,
    Moments,
    Span,
    Statistics,
    Sums,
    kept_statistics,
    known_in,
    means_of,
    moments_of,
    statistics_of,
    store_row,
    two_sum,
    usable,
)
from nbnorm.cpu.kernels.statistics import FLOAT32_SUMS, FLOAT64_SUMS, FLOAT64_SUMS_64, is_enough, near_mean, sums_over
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import (
    COUNT,
    at_least_zero,
    behind,
    element_of,
    fill,
    load,
    load_one,
    store,
    store_folded,
    totals,
    widen,
)

# rows that are worked on together
ROWS = COUNT
# what is where in a scratch for their sums: three numbers of each row, and four sums, of FOLDED lanes each; then the means
# and the variances
FOLDED = COUNT // 2
SHIFTS, G_SHIFTS, SCALES, FIRST_SUMS = 0, ROWS, 2 * ROWS, 3 * ROWS
SECOND_SUMS, THIRD_SUMS, FOURTH_SUMS, MEANS = (FIRST_SUMS + ROWS * FOLDED * sums for sums in (1, 2, 3, 4))
VARIANCES, SUMS_SIZE = MEANS + ROWS, MEANS + 2 * ROWS
# numbers that are known of them
KNOWN_SIZE = KNOWN_NUMBERS * ROWS


class Sixteen(NamedTuple):
    """What is known of the rows that are worked on together: where that is kept."""

    sums: Any
    means: Any
    variances: Any
    known: Any


class Group(NamedTuple):
    """Rows that are worked on together: where the first starts, how many they are, and of how many columns."""

    at: Any
    count: Any
    cols: Any


class SumsOf(NamedTuple):
    """How sums for statistics are taken: their type, whether about a number near the mean, and when they are enough.

    None for `is_near` is False, and for `limits` that they always are.
    """

    type: Any
    is_near: Any
    limits: Any


def sums_of(mode, x_dtype, dtype):
    """How a kernel takes sums.

    With 16-bit rows, float32 sums make a forward 1.1 to 1.4 times as fast. float32 rows would gain in the caches alone, and
    lose the last bit of rstd.
    """
    if x_dtype.itemsize == 2 and dtype == np.float32:
        return np.float32, True if mode == ONE_SWEEP else None, FLOAT32_SUMS
    return np.float64, None, {DIFF_OF_SQUARES: FLOAT64_SUMS, DIFF_OF_SQUARES_64: FLOAT64_SUMS_64}.get(mode)


@inlined
def sixteen_in(sums, room):
    """Of a scratch of SUMS_SIZE, and one of KNOWN_SIZE."""
    return Sixteen(sums, behind(sums, MEANS), behind(sums, VARIANCES), known_in(room, ROWS))


@inlined
def compensated_of_rows(find, x, group, eps, ahead, sixteen):
    """Write the statistics of each row, and its mean and variance."""
    his, los, _ = sixteen.known.statistics
    for i in range(group.count):
        row = find(x, row_of(group, i), TWO_SWEEPS, ahead)
        store(his, i, row.hi)
        store(los, i, row.lo)
        store(sixteen.variances, i, row.variance)
    store_moments(sixteen, Moments(load(his, 0), load(los, 0), load(sixteen.variances, 0)), eps, element_of(x))


@inlined
def statistics_of_rows(operands, dy, group, how, mode, ahead, sixteen):
    """As `compensated_of_rows`, of any other mode.

    And write the means of each row, from sums of the same sweep, unless dy is None; dy is for rows computed in float32.
    Where sums are not enough, they are taken again, in float64, and about the row's first element.
    """
    x, cols, sums = operands.x, group.cols, sixteen.sums
    for i in range(group.count):
        span = row_of(group, i)
        shifts = shift_of(x, span, how.is_near, mode), g_shift_of(dy, operands.weight, span.at, element_of(x), mode)
        sums_of_row(operands, dy, span, i, shifts, how.type, ahead, sums)
    rests, variances = enough(operands, dy, group, how.limits, mode, sixteen)
    element = element_of(x)
    store(sixteen.variances, 0, variances)
    means, lost = two_sum(load(sums, SHIFTS), 0.0, rests)
    store_moments(sixteen, moments_of(means, lost, variances, element), operands.eps, element)
    store_means_of_g(dy, rests, cols, mode, element, sixteen)


@inlined
def row_of(group, i):
    at = group.at + i * group.cols
    return Span(at, at - at, group.cols)


@inlined
def shift_of(x, span, is_near, mode):
    """What the sums of a row are about."""
    if is_near is not None:
        return near_mean(x, span)
    return load_one(x, span.at) if mode == ONE_SWEEP or mode == ONE_SWEEP_64 else 0.0


@inlined
def sums_of_row(operands, dy, span, i, shifts, sum_type, ahead, sums):
    """Write the sums over row i, and what they are about: the shifts of x and of g."""
    shift, g_shift = shifts
    row_totals, row_squares, of_g = sums_over(dy, operands.x, operands.weight, span, shift, g_shift, sum_type, ahead)
    store(sums, SHIFTS + i, shift)
    store_folded(sums, FIRST_SUMS + FOLDED * i, row_totals)
    store_folded(sums, SECOND_SUMS + FOLDED * i, row_squares)
    if dy is not None:
        store(sums, G_SHIFTS + i, g_shift)
        store_folded(sums, THIRD_SUMS + FOLDED * i, of_g.g)
        store_folded(sums, FOURTH_SUMS + FOLDED * i, of_g.projected)


@inlined
def g_shift_of(dy, weight, at, element, mode):
    if dy is None:
        return 0.0
    return np.float64(first_gradient(dy, weight, at, element)) if mode < MEAN_SQUARE else 0.0


@inlined
def moments_of_rows(sums, cols, mode):
    """The means of sixteen rows less their shifts, and the variances, from what `sums_of_row` wrote."""
    per_element = 1.0 / np.float64(cols)
    rests = totals(sums, FIRST_SUMS) * per_element if mode < MEAN_SQUARE else fill(0.0)
    return rests, at_least_zero(totals(sums, SECOND_SUMS) * per_element - rests * rests)


@inlined
def enough(operands, dy, group, limits, mode, sixteen):
    """As `moments_of_rows`, with the sums of rows taken again where they are not enough."""
    sums, means, variances = sixteen.sums, sixteen.means, sixteen.variances
    row_rests, row_variances = moments_of_rows(sums, group.cols, mode)
    if limits is None:
        return row_rests, row_variances
    if is_enough(row_rests, row_variances, limits):
        return row_rests, row_variances
    # until the means are known
    store(means, 0, row_rests)
    store(variances, 0, row_variances)
    for i in range(group.count):
        if not is_enough(means[i], variances[i], limits):
            span = row_of(group, i)
            shift = load_one(operands.x, span.at) if mode < MEAN_SQUARE else 0.0
            shifts = shift, g_shift_of(dy, operands.weight, span.at, element_of(operands.x), mode)
            sums_of_row(operands, dy, span, i, shifts, np.float64, None, sums)
    return moments_of_rows(sums, group.cols, mode)


@inlined
def store_moments(sixteen, moments, eps, element):
    """Write the statistics and the means of sixteen rows."""
    store_row(sixteen.known.statistics, 0, statistics_of(moments, eps, element))
    store(sixteen.means, 0, widen(moments.hi) + widen(moments.lo))


@inlined
def store_means_of_g(dy, rests, cols, mode, element, sixteen):
    """Write the means of sixteen rows, from what `sums_of_row` wrote; nothing where dy is None."""
    if dy is None:
        return
    sums = sixteen.sums
    projected = totals(sums, FOURTH_SUMS)
    g = totals(sums, THIRD_SUMS) if mode < MEAN_SQUARE else fill(0.0)
    of_g = Sums(g, projected - rests * g)
    rstds = load(sixteen.known.statistics.rstd, 0)
    store_row(sixteen.known.means, 0, means_of(load(sums, G_SHIFTS), of_g, rstds, cols, element))


@inlined
def means_of_rows(operands, group, has_mean, is_given, ahead, sixteen):
    """Write the means of each row, from sums that are now taken."""
    sums, statistics = sixteen.sums, sixteen.known.statistics
    element = element_of(operands.x)
    for i in range(group.count):
        span = row_of(group, i)
        has_shift = has_mean and not is_given
        shift = first_gradient(operands.dy, operands.weight, span.at, element) if has_shift else element(0)
        row = kept_statistics(statistics, i)
        # recomputed, it is one, or the row needs another arithmetic anyway
        scale = usable(row.rstd, element) if is_given else row.rstd
        scaled = Statistics(row.hi, row.rest, scale)
        of_row = gradient_block_sums(operands.dy, operands.x, operands.weight, span, scaled, shift, ahead, is_given)
        store(sums, SCALES + i, scale)
        store(sums, G_SHIFTS + i, shift)
        store_folded(sums, FIRST_SUMS + FOLDED * i, widen(of_row.g))
        store_folded(sums, SECOND_SUMS + FOLDED * i, widen(of_row.projected))
    g = totals(sums, FIRST_SUMS) if has_mean else fill(0.0)
    of_g = Sums(g, totals(sums, SECOND_SUMS) / load(sums, SCALES))
    rstds = load(statistics.rstd, 0)
    store_row(sixteen.known.means, 0, means_of(load(sums, G_SHIFTS), of_g, rstds, group.cols, element))

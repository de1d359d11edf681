"""The arithmetic of up to sixteen short rows at once, which lie one behind the other; what is done to one row is in `rows`.

Of a row of a few elements, adding up the lanes and finding the square root takes longer than the sums. Here these are steps
on lanes, each of which is a row: what they cost is shared by all rows, and none waits for another's.
"""

import numpy as np

from nbnorm.cpu.kernels.rows import (
    DIFF_OF_SQUARES,
    DIFF_OF_SQUARES_64,
    compensated,
    first_gradient,
    gradient_block_sums,
    is_enough,
    near_mean,
    normalised,
    put,
    put_part,
    sums_over,
    two_sum,
    usable,
)
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import (
    COUNT,
    all_below,
    at_least_zero,
    cast,
    fill,
    load,
    load_one,
    load_part,
    root,
    store,
    store_folded,
    totals,
    widen,
)

# rows that are worked on together
ROWS = COUNT
# what is where in a scratch for their sums: three numbers of each row, and four sums, of FOLDED lanes each
FOLDED = COUNT // 2
SHIFTS, G_SHIFTS, SCALES, FIRST_SUMS = 0, ROWS, 2 * ROWS, 3 * ROWS
SECOND_SUMS, THIRD_SUMS, FOURTH_SUMS, SUMS_SIZE = (FIRST_SUMS + ROWS * FOLDED * sums for sums in (1, 2, 3, 4))


@inlined
def compensated_of_rows(x, at, rows, cols, element, eps, ahead, row_statistics, means, variances):
    """Write hi, rest and rstd of each row into the three arrays `row_statistics`, and its mean and variance."""
    his, los, _ = row_statistics
    for i in range(rows):
        his[i], los[i], variances[i] = compensated(x, at + i * cols, cols, element, ahead)
    hi, lo = load(his, 0, element), load(los, 0, element)
    store_statistics(row_statistics, means, hi, lo, load(variances, 0, np.float64), eps, element)


@inlined
def statistics_of_rows(
    dy, x, at, rows, cols, weight, element, mode, sum_type, is_near, limits, eps, ahead,
    sums, row_statistics, means, variances, g_means,
):  # fmt: skip
    """As `compensated_of_rows`, of any other mode.

    And write what `remember` does into the three arrays `g_means`, from sums of the same sweep, unless dy is None; dy is for
    rows whose `element` is float32. Sums over a row are of the type `sum_type`, and about a number near the mean where
    `is_near` is not None; where they are not enough, by their `limits`, they are float64, and about the row's first element.
    None for limits says that they always are. `sums` is a scratch.
    """
    is_diff_of_squares = mode == DIFF_OF_SQUARES or mode == DIFF_OF_SQUARES_64
    for i in range(rows):
        k = at + i * cols
        shift = 0.0
        if is_near is not None:
            shift = near_mean(x, k, cols, element)
        elif not is_diff_of_squares:
            shift = load_one(x, k)
        sums_of_row(dy, x, k, i, cols, shift, weight, element, sum_type, ahead, sums)
    row_rests, row_variances = moments_of_rows(sums, cols)
    if limits is not None and not are_enough(row_rests, row_variances, limits):
        # until the means are known
        store(means, 0, row_rests)
        store(variances, 0, row_variances)
        for i in range(rows):
            if not is_enough(means[i], variances[i], limits):
                k = at + i * cols
                sums_of_row(dy, x, k, i, cols, load_one(x, k), weight, element, np.float64, None, sums)
        row_rests, row_variances = moments_of_rows(sums, cols)
    row_means, lost = two_sum(load(sums, SHIFTS, np.float64), fill(0.0), row_rests)
    store(variances, 0, row_variances)
    hi, lo = split_rows(row_means, lost, element)
    store_statistics(row_statistics, means, hi, lo, row_variances, eps, element)
    if dy is not None:
        g_totals = totals(sums, THIRD_SUMS)
        projected = totals(sums, FOURTH_SUMS) - row_rests * g_totals
        _, _, rstds = row_statistics
        remember_rows(g_means, load(rstds, 0, element), load(sums, G_SHIFTS, np.float64), g_totals, projected, cols, element)


@inlined
def sums_of_row(dy, x, k, i, cols, shift, weight, element, sum_type, ahead, sums):
    """Write the sums over row i, which starts at k, and what they are about."""
    g_shift = 0.0 if dy is None else np.float64(first_gradient(dy, k, weight, element))
    row_totals, row_squares, row_g, row_projected = sums_over(dy, x, k, cols, shift, g_shift, weight, -k, sum_type, ahead)
    sums[SHIFTS + i] = shift
    store_folded(sums, FIRST_SUMS + FOLDED * i, row_totals)
    store_folded(sums, SECOND_SUMS + FOLDED * i, row_squares)
    if dy is not None:
        sums[G_SHIFTS + i] = g_shift
        store_folded(sums, THIRD_SUMS + FOLDED * i, row_g)
        store_folded(sums, FOURTH_SUMS + FOLDED * i, row_projected)


@inlined
def moments_of_rows(sums, cols):
    """The means of sixteen rows less their shifts, and the variances, from what `sums_of_row` wrote."""
    per_element = fill(1.0 / np.float64(cols))
    row_rests = totals(sums, FIRST_SUMS) * per_element
    return row_rests, at_least_zero(totals(sums, SECOND_SUMS) * per_element - row_rests * row_rests)


@inlined
def are_enough(row_rests, row_variances, limits):
    """Whether `is_enough` of each of sixteen rows; False too where a number is exactly at a limit."""
    condition, smallest, largest = limits
    are_near = all_below(row_rests * row_rests, fill(condition) * row_variances)
    return are_near and all_below(fill(smallest), row_variances) and all_below(row_variances, fill(largest))


@inlined
def store_statistics(row_statistics, means, hi, lo, row_variances, eps, element):
    """Write hi, rest, rstd and mean of sixteen rows."""
    his, rests, rstds = row_statistics
    row_rstds = cast(fill(1.0) / root(row_variances + fill(eps)), element)
    store(his, 0, hi)
    store(rests, 0, rests_of(lo, row_rstds, element))
    store(rstds, 0, row_rstds)
    store(means, 0, widen(hi) + widen(lo))


@inlined
def means_of_rows(dy, x, at, rows, cols, row_statistics, is_given, weight, element, ahead, sums, g_means):
    """Write what `remember` does of each row, from the same sums, into the three arrays `g_means`; `sums` is a scratch."""
    his, rests, rstds = row_statistics
    for i in range(rows):
        k = at + i * cols
        shift = element(0) if is_given else first_gradient(dy, k, weight, element)
        # recomputed, it is one, or the row needs another arithmetic anyway
        scale = usable(rstds[i], element) if is_given else rstds[i]
        row_totals, row_projected = gradient_block_sums(
            dy, x, k, cols, fill(his[i]), fill(rests[i]), fill(scale), fill(-shift), weight, 0, element, ahead, is_given
        )
        sums[SCALES + i] = scale
        sums[G_SHIFTS + i] = shift
        store_folded(sums, FIRST_SUMS + FOLDED * i, widen(row_totals))
        store_folded(sums, SECOND_SUMS + FOLDED * i, widen(row_projected))
    projected = totals(sums, SECOND_SUMS) / load(sums, SCALES, np.float64)
    shifts = load(sums, G_SHIFTS, np.float64)
    remember_rows(g_means, load(rstds, 0, element), shifts, totals(sums, FIRST_SUMS), projected, cols, element)


@inlined
def remember_rows(g_means, row_rstds, shifts, g_totals, projected, cols, element):
    """As `remember`, of sixteen."""
    g_his, g_rests, slopes = g_means
    per_element = fill(1.0 / np.float64(cols))
    means, lost = two_sum(shifts, fill(0.0), g_totals * per_element)
    hi, lo = split_rows(means, lost, element)
    store(g_his, 0, hi)
    store(g_rests, 0, rests_of(lo, row_rstds, element))
    slope = cast(projected * per_element * widen(row_rstds), element) * row_rstds
    store(slopes, 0, slope * fill(element(-1)))


@inlined
def split_rows(values, rests, element):
    """As `split`, of sixteen."""
    hi = cast(values, element)
    return hi, cast((values - widen(hi)) + rests, element)


@inlined
def rests_of(lo, rstd, element):
    """As `rest_of`, of sixteen."""
    return lo * rstd * fill(element(-1))


@inlined
def normalise_rows(x, at, begin, end, cols, row_statistics, weight, bias, element, streaming, y):
    """As `normalise`, column by column, for the rows from `begin` to `end` of those that start at `at`."""
    his, rests, rstds = row_statistics
    for c in range(cols >> 4):
        weights = load(weight, 16 * c, element)
        biases = load(bias, 16 * c, element)
        for i in range(begin, end):
            k = at + i * cols + 16 * c
            values = normalised(load(x, k, element), his[i], rests[i], rstds[i], weights, biases)
            put(y, k, values, streaming)
    count = cols & 15
    if count:
        j = cols - count
        weights = load_part(weight, j, count, element, element(0))
        biases = load_part(bias, j, count, element, element(0))
        for i in range(begin, end):
            k = at + i * cols + j
            xs = load_part(x, k, count, element, element(0))
            values = normalised(xs, his[i], rests[i], rstds[i], weights, biases)
            put_part(y, k, count, values, streaming)

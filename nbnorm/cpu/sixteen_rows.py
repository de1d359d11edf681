"""The arithmetic of up to sixteen short rows at once, which lie one behind the other; what is done to one row is in `rows`.

Of a row of a few elements, adding up the lanes and finding the square root takes longer than the sums. Here these are steps
on lanes, each of which is a row: what they cost is shared by all rows, and none waits for another's.
"""

import numpy as np

from nbnorm.cpu.lanes import (
    COUNT,
    at_least_zero,
    fill,
    load,
    load_one,
    load_part,
    multiply_add,
    narrow,
    prefetch,
    root,
    store,
    store_folded,
    store_part,
    stream,
    stream_part,
    totals,
    widen,
)
from nbnorm.cpu.rows import (
    ONE_SWEEP,
    ONE_SWEEP_64,
    TWO_SWEEPS,
    first_gradient,
    gradient_block_sums,
    inlined,
    normalised,
    statistics,
    two_sum,
    usable,
)

# rows that are worked on together
ROWS = COUNT
# what is where in a scratch for their sums: two numbers of each row, and two sums, of FOLDED lanes each
FOLDED = COUNT // 2
SHIFTS, SCALES, FIRST_SUMS = 0, ROWS, 2 * ROWS
SECOND_SUMS = FIRST_SUMS + ROWS * FOLDED
SUMS_SIZE = SECOND_SUMS + ROWS * FOLDED


@inlined
def statistics_of_rows(x, at, rows, cols, element, mode, eps, ahead, sums, row_statistics, variances):
    """Write hi, lo and rstd of each row into the three arrays `row_statistics`, and its variance; `sums` is a scratch."""
    his, los, rstds = row_statistics
    if mode == TWO_SWEEPS:
        for i in range(rows):
            his[i], los[i], variances[i] = statistics(x, at + i * cols, cols, element, mode, ahead)
        store(rstds, 0, narrow(fill(1.0) / root(load(variances, 0, np.float64) + fill(eps)), element))
        return
    for i in range(rows):
        k = at + i * cols
        shift = load_one(x, k) if mode in (ONE_SWEEP, ONE_SWEEP_64) else 0.0
        shifts = fill(shift)
        row_totals = row_squares = fill(0.0)
        for _ in range(cols >> 4):
            prefetch(x, k + ahead)
            d = load(x, k, np.float64) - shifts
            row_totals = row_totals + d
            row_squares = multiply_add(d, d, row_squares)
            k += 16
        if cols & 15:
            d = load_part(x, k, cols & 15, np.float64, shift) - shifts
            row_totals = row_totals + d
            row_squares = multiply_add(d, d, row_squares)
        sums[SHIFTS + i] = shift
        store_folded(sums, FIRST_SUMS + FOLDED * i, row_totals)
        store_folded(sums, SECOND_SUMS + FOLDED * i, row_squares)
    per_element = fill(1.0 / np.float64(cols))
    rests = totals(sums, FIRST_SUMS) * per_element
    row_variances = at_least_zero(totals(sums, SECOND_SUMS) * per_element - rests * rests)
    row_means, lost = two_sum(load(sums, SHIFTS, np.float64), fill(0.0), rests)
    store_split(his, los, row_means, lost, element)
    store(variances, 0, row_variances)
    store(rstds, 0, narrow(fill(1.0) / root(row_variances + fill(eps)), element))


@inlined
def means_of_rows(dy, x, at, rows, cols, row_statistics, is_given, weight, element, ahead, sums, means):
    """Write what `remember` does of each row, from the same sums, into the three arrays `means`; `sums` is a scratch."""
    his, los, rstds = row_statistics
    g_his, g_los, slopes = means
    for i in range(rows):
        k = at + i * cols
        shift = element(0) if is_given else first_gradient(dy, k, weight, element)
        # recomputed, it is one, or the row needs another arithmetic anyway
        scale = usable(rstds[i], element) if is_given else rstds[i]
        row_totals, row_projected = gradient_block_sums(
            dy, x, k, cols, fill(his[i]), fill(los[i]), fill(scale), fill(shift), weight, 0, element, ahead, is_given
        )
        sums[SHIFTS + i] = shift
        sums[SCALES + i] = scale
        store_folded(sums, FIRST_SUMS + FOLDED * i, widen(row_totals))
        store_folded(sums, SECOND_SUMS + FOLDED * i, widen(row_projected))
    per_element = fill(1.0 / np.float64(cols))
    g_means, lost = two_sum(load(sums, SHIFTS, np.float64), fill(0.0), totals(sums, FIRST_SUMS) * per_element)
    store_split(g_his, g_los, g_means, lost, element)
    projected = totals(sums, SECOND_SUMS) / load(sums, SCALES, np.float64)
    row_rstds = load(rstds, 0, element)
    slope = narrow(projected * per_element * widen(row_rstds), element) * row_rstds
    store(slopes, 0, slope * fill(element(-1)))


@inlined
def store_split(his, los, values, rests, element):
    """As `split`, of sixteen."""
    hi = narrow(values, element)
    store(his, 0, hi)
    store(los, 0, narrow((values - widen(hi)) + rests, element))


@inlined
def normalise_rows(x, at, begin, end, cols, row_statistics, weight, bias, element, streaming, y):
    """As `normalise`, column by column, for the rows from `begin` to `end` of those that start at `at`."""
    his, los, rstds = row_statistics
    for c in range(cols >> 4):
        weights = load(weight, 16 * c, element)
        biases = load(bias, 16 * c, element)
        for i in range(begin, end):
            k = at + i * cols + 16 * c
            values = normalised(load(x, k, element), his[i], los[i], rstds[i], weights, biases)
            if streaming:
                stream(y, k, values)
            else:
                store(y, k, values)
    count = cols & 15
    if count:
        j = cols - count
        weights = load_part(weight, j, count, element, element(0))
        biases = load_part(bias, j, count, element, element(0))
        for i in range(begin, end):
            k = at + i * cols + j
            xs = load_part(x, k, count, element, element(0))
            values = normalised(xs, his[i], los[i], rstds[i], weights, biases)
            if streaming:
                stream_part(y, k, count, values)
            else:
                store_part(y, k, count, values)

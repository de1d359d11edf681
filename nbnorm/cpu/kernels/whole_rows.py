"""Kernels for rows that fit a core's cache, each made by a factory for one set of compile-time choices."""

import functools

import numpy as np

from nbnorm.cpu.kernels import loops
from nbnorm.cpu.kernels.gradients import GROUP_ELEMENTS, GROUP_ROWS, first_gradient, gradient_sums, gradients
from nbnorm.cpu.kernels.modes import are_given, in_one_sweep, is_centred
from nbnorm.cpu.kernels.normalise import normalise, store_statistics
from nbnorm.cpu.kernels.rescaled import row_gradients_rescaled, row_rescaled
from nbnorm.cpu.kernels.row import (
    KNOWN_NUMBERS,
    Placed,
    Rows,
    Span,
    Statistics,
    Sums,
    given_moments,
    is_ordinary,
    kept_statistics,
    known_in,
    means_of,
    statistics_of,
    store_row,
    usable,
    with_rstd,
)
from nbnorm.cpu.kernels.statistics import AHEAD, finds_both, finds_moments
from nbnorm.cpu.kernels.sums import norms_of_sums
from nbnorm.cpu.lanes.inlined import inlined
from nbnorm.cpu.lanes.meaning import larger, scratch, smaller, store, widen

# rows of at most so many elements are normalised in pairs, which read weight and bias once. Of longer ones, a pair's results
# would not be fetched ahead: float16 at (8192, 768) takes 1.15 to 1.3 times as long
PAIRED_COLS = 1 << 8
# numbers that are known of a group's rows
KNOWN_SIZE = KNOWN_NUMBERS * GROUP_ROWS


def forward(x_dtype, dtype, has_weight, has_bias, variance, residual_dtype=None, with_total=False):
    """One iteration owns some rows, and of each writes y[r] and, where these are asked for, mean[r] and rstd[r].

    Formula: Ba, Kiros and Hinton 2016, eq. 4, where `variance` is "centred" or "diff_of_squares"; with "mean_square", Zhang
    and Sennrich 2019, eq. 4.
    """
    rows_from = _forward(x_dtype, dtype, variance)
    if residual_dtype is not None:
        rows_from = norms_of_sums(rows_from, x_dtype, 1)
    return loops.forward(rows_from, dtype.type, has_weight, has_bias, is_centred(variance))


def backward(
    dy_dtype, x_dtype, dtype, statistics_dtype, sum_dtype, has_weight, statistics_from, output_mask, dtotal_dtype=None
):
    """Gradients of layer norm: one iteration owns a block of rows, writes dx of each and adds to the block's own sums.

    `statistics_from` is "given", "given rstd" or the variance to recompute them by.
    Formula: the derivative of eq. 4 of Ba, Kiros and Hinton 2016, as in llm.c's doc/layernorm.
    """
    rows_from = _backward(x_dtype, dtype, statistics_from, output_mask)
    return loops.backward(rows_from, dtype.type, has_weight, output_mask, is_centred(statistics_from))


@functools.cache
def _forward(x_dtype, dtype, variance):
    element = dtype.type
    mode, find, bounds = finds_moments(variance, x_dtype, dtype)
    has_mean = is_centred(variance)

    @inlined
    def rows_from(operands, begin, end, streaming):
        cols = operands.cols
        ahead = cols * -(-AHEAD // cols)
        # a row that waits for the other of its pair
        is_waiting = False
        waiting = Placed(0, Statistics(element(0), element(0), element(0)))
        for r in range(begin, end):
            at = r * cols

            # statistics
            found = find(operands.x, Span(at, 0, cols), mode, ahead)

            # normalise and store
            if is_ordinary(found.variance, operands.eps, bounds):
                row = Placed(at, statistics_of(found, operands.eps, element))
                if is_waiting:
                    normalise(operands, (waiting, row), 0, cols, streaming)
                waiting = row
                is_waiting = not is_waiting
                row_mean, row_rstd = widen(found.hi) + widen(found.lo), widen(row.known.rstd)
            else:
                row_mean, row_rstd = row_rescaled(operands, at, has_mean)
            if is_waiting and (cols > PAIRED_COLS or r + 1 == end):
                normalise(operands, (waiting,), 0, cols, streaming)
                is_waiting = False
            store_statistics(operands, r, row_mean, row_rstd)

    return rows_from


@functools.cache
def _backward(x_dtype, dtype, statistics_from, output_mask):
    element = dtype.type
    with_dx, has_mean = output_mask[0], is_centred(statistics_from)
    find_statistics, find_means = _steps(x_dtype, dtype, statistics_from, output_mask)

    @inlined
    def rows_from(operands, begin, end, columns, streaming):
        cols = operands.cols
        group_rows = larger(1, smaller(GROUP_ROWS, GROUP_ELEMENTS // cols))
        known = known_in(scratch(KNOWN_SIZE, element), GROUP_ROWS)
        sums = Sums(scratch(GROUP_ROWS, np.float64), scratch(GROUP_ROWS, np.float64))
        r = begin
        while r < end:
            # statistics of the rows of a group, up to one that needs another arithmetic
            group_end = smaller(r + group_rows, end)
            count = find_statistics(operands, r, group_end, known.statistics, sums)

            # their means, in a loop of its own: a processor works on several rows while they wait for square roots
            if with_dx:
                find_means(operands, r, count, known, sums)

            # the gradients of the group, then of that row; the next group is fetched meanwhile
            gradients(operands, Rows(r * cols, cols, 0, count), columns, known, (r + count) * cols, streaming)
            r += count
            if r < group_end:
                row_gradients_rescaled(operands, r * cols, columns, has_mean)
                r += 1

    return rows_from


def _steps(x_dtype, dtype, statistics_from, output_mask):
    """What finds the statistics of a group's rows, and what finds their means."""
    element = dtype.type
    is_given, has_mean = are_given(statistics_from), is_centred(statistics_from)
    mode, find, bounds = finds_moments(statistics_from, x_dtype, dtype)
    find_both = finds_both(statistics_from)
    has_shift = has_mean and not is_given
    needs_statistics = output_mask[0] or output_mask[1]
    has_sums = in_one_sweep(statistics_from, dtype, output_mask)

    @inlined
    def find_statistics(operands, begin, end, kept, sums):
        """Write the statistics of rows, up to one that is not ordinary; returns how many these are."""
        for r in range(begin, end if needs_statistics else begin):
            i = r - begin
            if is_given:
                store_row(kept, i, with_rstd(given_moments(operands.mean, r, element), element(operands.rstd[r])))
                continue
            span = Span(r * operands.cols, 0, operands.cols)
            if has_sums:
                shift = first_gradient(operands.dy, operands.weight, span.at, element)
                found, of_g = find_both(operands.dy, operands.x, operands.weight, span, shift, mode, None)
                store(sums.g, i, of_g.g)
                store(sums.projected, i, of_g.projected)
            else:
                found = find(operands.x, span, mode, None)
            if not is_ordinary(found.variance, operands.eps, bounds):
                return i
            store_row(kept, i, statistics_of(found, operands.eps, element))
        return end - begin

    @inlined
    def find_means(operands, begin, count, known, sums):
        cols = operands.cols
        for i in range(count):
            span = Span((begin + i) * cols, 0, cols)
            row = kept_statistics(known.statistics, i)
            shift = first_gradient(operands.dy, operands.weight, span.at, element) if has_shift else element(0)
            if has_sums:
                of_g = Sums(sums.g[i], sums.projected[i])
            else:
                scaled = Statistics(row.hi, row.rest, usable(row.rstd, element))
                of_g = gradient_sums(operands.dy, operands.x, operands.weight, span, scaled, shift, None, is_given)
                of_g = Sums(of_g.g if has_mean else 0.0, of_g.projected)
            store_row(known.means, i, means_of(shift, of_g, row.rstd, cols, element))

    return find_statistics, find_means
